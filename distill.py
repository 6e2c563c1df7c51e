"""Distil MAR's inner chain of 100 denoising steps to one. Stage 0: a teacher where there is none. Stage 1: GSIM.

Must exist: nothing for shapes; for ImageNet the latent cache (data.py) and the public teacher (data.py --get mar_base).

    python distill.py --data shapes                                  # CPU, from nothing, under 15 minutes
    python distill.py --data cifar10                                 # one GPU; python data.py --get cifar10 first
    python distill.py --data path/to/images                          # train/<class>/*; below 64 px directly
    torchrun --nproc_per_node=8 distill.py                           # ImageNet 256, public MAR-B
    torchrun --nproc_per_node=8 distill.py --resume                  # goes on from the last checkpoint, bit for bit

The paper (MARVAL, arXiv 2511.15190) distils with guided score implicit matching: METHOD below, `gsim_loss`. Here
1. the loss is weighted by sigma^2 / alpha, which states it in units of x0: without it small t drowns the rest;
2. the critic and the student are updated from the same weights (neither first), so that gradient accumulation and
   ranks change nothing; betas (0, .99), as SiD, because the critic's target moves;
3. t_init, learning rates and update ratio, which the paper does not state, are ours (README has the measurements);
4. guidance g means 1.0 = none; the paper's "1.2" is read as g = 1.2.
"""
import copy
import functools
import json
import math
import os
import signal
import threading
import time
from dataclasses import asdict, replace
from statistics import NormalDist

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from data import PUBLIC, Parser, check_numbers, is_small, load_vae, open_data, run_main, setup, train_indices
from fid import feature_statistics, judge, load_or_train_classifier
from model import (MAR, SIZES, TRAIN, UserError, alpha_sigma, bf16_weights, compile_blocks, diffusion_loss, gaussian,
                   image_keys, load_mar, mask_counts, read_checkpoint, replacing, save_checkpoint, take, token_orders,
                   uniform, write_json)
from sample import draw_together, save_grid

# Which random number is for what (see model.py: noise is a function of picture, purpose, token, channel)
TEACHER_T, TEACHER_EPS, DROP, NOISE, CRITIC_T, CRITIC_EPS, STUDENT_T, STUDENT_EPS = (TRAIN + 64 * i for i in range(8))
T_MIN, T_MAX = 20, 973  # levels of the student's loss: sigma .04 to 24.7, SiD's and DMD2's range on MAR's schedule

# What `--data` changes; an explicit flag always wins. Figures for shapes: README, "What was tried".
DEFAULTS = {
    "shapes": dict(
        size="shapes", teacher=None, teacher_steps=3000, teacher_batch=64, teacher_lr=1e-3, teacher_ema=0.995, draws=2,
        steps=400, batch=32, lr=5e-4, critic_lr=1e-3, ema=0.99, guidance=2.0, warmup=0,
        ar_steps=8, eval_every=200, eval_images=2048, save_every=200),
    "cifar10": dict(
        size="cifar10", teacher=None, teacher_steps=60000, teacher_batch=128, teacher_lr=4e-4, teacher_ema=0.9995,
        steps=8000, batch=128, lr=5e-5, critic_lr=1e-4, ema=0.999, guidance=2.0,
        ar_steps=16, eval_every=1000, eval_images=2000, save_every=500),
}


def parse_args(argv=None):
    """Flags, in the order: files, data and model, teacher, distillation, optimiser, watching, system."""
    p = Parser("Train a MAR teacher where there is none, and distil it to one step.")
    p.add_argument("--data", default="data/imagenet", help="shapes, cifar10, an image folder with train/<class>/*, "
                   "or a cache built by data.py")
    p.add_argument("--out", default=None, help="folder of the run (default out/<name of the data>)")
    p.add_argument("--resume", action="store_true", help="go on from the run's last checkpoint")
    p.add_argument("--vae", default=None, help="KL-16 file, to show pictures of latents while training")
    p.add_argument("--size", default="base", choices=list(SIZES), help="network of a teacher trained here")
    p.add_argument("--teacher", default=PUBLIC["mar_base"][1], help="teacher checkpoint; its size is read off the file")
    p.add_argument("--teacher_steps", type=int, default=0, help="updates of stage 0; 0 = --teacher is needed")
    p.add_argument("--teacher_batch", type=int, default=256, help="images an update of stage 0, all ranks")
    p.add_argument("--teacher_lr", type=float, default=1e-4, help="peak learning rate of stage 0")
    p.add_argument("--teacher_ema", type=float, default=0.9999, help="averaging a step, stage 0")
    p.add_argument("--draws", type=int, default=4, help="(t, noise) draws a token in stage 0: the transformer "
                   "runs once for all, so more is cheap where the head is small")
    p.add_argument("--loss", default="gsim", choices=["gsim", "vsd"], help="vsd: the Diff-Instruct / DMD baseline")
    p.add_argument("--critic", type=critic_blocks, default="full", help="what of the critic is trained: full, or N, "
                   "the decoder's last N blocks and the head; it shares the rest with the teacher, which saves up to 3 "
                   "of 8 passes a step, and memory")
    p.add_argument("--guidance", type=float, default=2.9, help="scale baked into the student; 1 = none")
    p.add_argument("--guidance_schedule", default="constant", choices=["constant", "linear"],
                   help="linear: the scale grows with the share revealed, as MAR samples")
    p.add_argument("--t_init", type=int, default=None, help="time step the student starts from (default: "
                   "the size's, 755 for ImageNet); higher: noisier start, larger eps errors")
    p.add_argument("--critic_steps", type=int, default=1, help="critic updates a student update")
    p.add_argument("--steps", type=int, default=150000, help="updates of the critic in stage 1")
    p.add_argument("--batch", type=int, default=256, help="images an update of stage 1, all ranks together")
    p.add_argument("--accumulate", type=int, default=1, help="micro-batches an update: more if memory ends")
    p.add_argument("--recompute", action="store_true", help="recompute the transformers' blocks in backward: less "
                   "memory, a third more time")
    p.add_argument("--compile", action="store_true", help="torch.compile the blocks of transformer and head: the first "
                   "updates take minutes, the others less time; on a CPU hardly worth it")
    p.add_argument("--lr", type=float, default=1e-5, help="student's learning rate")
    p.add_argument("--critic_lr", type=float, default=1e-5, help="critic's learning rate")
    p.add_argument("--warmup", type=int, default=100, help="updates of linear warm-up, both stages")
    p.add_argument("--decay", type=float, default=0.4, help="share of each stage, its last, over which "
                   "the learning rate falls to 0 (the critic's stays)")
    p.add_argument("--clip", type=float, default=1.0, help="gradient norm limit, each network; 0 = none")
    p.add_argument("--ema", type=float, default=0.9999, help="averaging of the student a step")
    p.add_argument("--ar_steps", type=int, default=64, help="AR steps of the pictures shown and judged")
    p.add_argument("--ar_steps_aware", action="store_true", help="distil on the mask ratios that sampling in "
                   "--ar_steps meets, not on MAR's: for a student that will draw with that K only")
    p.add_argument("--teacher_head_steps", type=int, default=100, help="chain length of the teacher shown")
    p.add_argument("--eval_every", type=int, default=5000, help="updates between grids and figures")
    p.add_argument("--eval_images", type=int, default=2048, help="images a Frechet distance")
    p.add_argument("--save_every", type=int, default=1000, help="updates between checkpoints")
    p.add_argument("--log_every", type=int, default=20, help="updates between log lines (a host sync each)")
    p.add_argument("--seed", type=int, default=0, help="of everything random")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    known, _ = p.parse_known_args(argv)
    name = known.data if known.data in DEFAULTS else "cifar10" if is_small(known.data) else None
    given = known.teacher != p.get_default("teacher")
    p.set_defaults(**DEFAULTS.get(name, {}))
    if given:  # a teacher by --teacher: none is trained, whatever the data's default
        p.set_defaults(teacher_steps=0)
    elif known.teacher_steps:  # one is to be trained: none is read, whatever the data's default
        p.set_defaults(teacher=None)
    args = p.parse_args(argv)
    check_numbers(args, one="teacher_batch draws t_init critic_steps batch accumulate ar_steps teacher_head_steps eval_every eval_images save_every log_every", share="teacher_ema ema")
    args.out = args.out or os.path.join("out", os.path.basename(os.path.normpath(args.data)))
    return args


def critic_blocks(text):
    """The argparse type of --critic: "full" or an int from 0."""
    return text if text == "full" else int(text)


# ----------------------------------------------------------------------------------------------------------------------
# A batch: real pictures, some tokens known, the rest to be predicted


def masked_count(config, seed, step, ar_steps=None):
    """Tokens masked in this step, one draw for the whole batch as MAR: normal(1, .25) cut to [mask_ratio_min, 1].

    ar_steps K: instead, one of the K counts that K-step sampling meets, each as often as tokens are revealed from it:
    so the loss, a mean over masked tokens, is in expectation the mean over all tokens of a picture drawn in K steps.
    """
    if ar_steps:
        counts = np.array(mask_counts(config.seq_len, ar_steps))  # (K + 1,), down to 0
        return int(np.random.default_rng([seed, step]).choice(counts[:-1], p=-np.diff(counts) / config.seq_len))
    normal = NormalDist(1.0, 0.25)
    low, high = normal.cdf(config.mask_ratio_min), normal.cdf(1.0)
    ratio = normal.inv_cdf(low + (high - low) * np.random.default_rng([seed, step]).random())
    return min(config.seq_len, max(1, math.ceil(config.seq_len * ratio)))


def share_revealed(masked, seq_len, ar_steps=None):
    """What the linear guidance grows with, where `masked` tokens are unknown: the share known. With ar_steps as MAR's
    sampler counts it: after the AR step that begins there, and never all (model.unmask)."""
    if ar_steps:
        counts = mask_counts(seq_len, ar_steps)
        return min(seq_len - counts[counts.index(masked) + 1], seq_len - 1) / seq_len
    return 1 - masked / seq_len


def upload(x, device):
    """x on `device`. From memory that is not pinned the copy would wait for all that the GPU has still to do."""
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


def training_batch(data, model, batch, seed, step, device, rank, world, ar_steps=None):
    """-> tokens (B, L, C), labels (B,), keys (B,), visible (B, V), masked (B, P) on device; B = batch / world.

    Everything depends on (seed, step) and the picture's place in the global batch alone (but the noise of the VAE's
    posterior, which is drawn by rank). All masked tokens are to be predicted, also where sampling (ar_steps, see
    masked_count) would reveal some of them: orders are random, so those some are like all, and all is more signal for
    the same transformer pass.
    """
    indices, flip = train_indices(len(data), batch, step, seed, rank, world)
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) * 4096 + rank)  # the VAE's posterior noise
    x, labels = data.batch(indices, flip, generator)
    place = step * batch + rank * len(indices) + torch.arange(len(indices))
    keys = upload(image_keys(torch.stack([torch.full_like(place, seed), place], 1)), device)
    orders = token_orders(keys, model.config.seq_len)
    m = masked_count(model.config, seed, step, ar_steps)
    masked, visible = orders[:, :m].sort(dim=1).values, orders[:, m:].sort(dim=1).values
    return model.patchify(upload(x, device)), upload(labels, device), keys, visible, masked


def random_steps(keys, purpose, positions, low, high):
    """Integer time steps, uniform in low..high, one a token: -> (B * P,) long."""
    span = high - low + 1
    steps = low + (uniform(keys, purpose, positions)[:, :, 0] * span).long().clamp(max=span - 1)  # float32 may round up
    return steps.flatten()


# ----------------------------------------------------------------------------------------------------------------------
# The losses. Rows are tokens: N = B * P.


def teacher_loss(model, tokens, labels, keys, visible, masked, draws):
    """MAR's own training loss, mean over masked tokens and `draws` of (t, noise) each. One transformer pass."""
    hidden = uniform(keys, DROP, torch.zeros_like(masked[:, :1]))[:, 0, 0] < model.config.label_drop
    c = model.context(tokens, visible, labels.masked_fill(hidden, -1), masked).flatten(0, 1)  # (N, D)
    x0 = take(tokens, masked).flatten(0, 1).repeat(draws, 1)  # (draws * N, C)
    t = torch.cat([random_steps(keys, TEACHER_T + i, masked, 0, 999) for i in range(draws)])
    eps = torch.cat([gaussian(keys, TEACHER_EPS + i, masked, tokens.shape[2]).flatten(0, 1) for i in range(draws)])
    alpha, sigma = alpha_sigma(t)
    x_t = alpha * x0 + sigma * eps
    return diffusion_loss(model.head(x_t, t, c.repeat(draws, 1)), x0, x_t, t, eps).mean()


def pseudo_huber(y, r=1e-5):
    """d(y) = sqrt(|y|^2 + r^2) - r for each row, and its derivative d'(y): (N, C) -> (N,), (N, C)."""
    root = (y.square().sum(1, keepdim=True) + r * r).sqrt()
    return root[:, 0] - r, y / root


def gsim_loss(x_t, eps, alpha, sigma, score_q, score_p, distance=pseudo_huber):
    """Guided score implicit matching for each token: x_t, eps (N, C), alpha, sigma (N, 1) -> (N,).

    KL(student || teacher) is an integral over t of |s_q - s_p|^2. L2 carries the gradient that reaches it through where
    x_t lies, L1 the one through the student's score itself, whose parameters we cannot differentiate: it is traded
    for a derivative of the samples. score_q, score_p: x_t -> (N, C), differentiable in x_t.
    """
    s_q, s_p = score_q(x_t), score_p(x_t)
    d, d_prime = distance(s_q - s_p)
    L1 = -(d_prime * (s_q + eps / sigma)).sum(1)  # grad log p(x_t | x0) = -eps / sigma
    L2 = d
    return (sigma**2 / alpha)[:, 0] * (L1 + L2)  # the weight states the loss in x0's units


def gsim_gradient(x0, t, eps, eps_q, eps_p):
    """d loss / d x0 (N, C) for fixed heads, and the loss (N,). x0 detached (N, C); eps_q, eps_p: x_t -> (N, C).

    The loss reaches the student only through x_t = alpha x0 + sigma eps: so differentiate down to x_t here and let
    the caller push the result into the student's graph. The heads' weights get no gradient.
    """
    alpha, sigma = alpha_sigma(t)
    x_t = (alpha * x0 + sigma * eps).requires_grad_()
    loss = gsim_loss(x_t, eps, alpha, sigma, lambda x: -eps_q(x) / sigma, lambda x: -eps_p(x) / sigma)
    return alpha * torch.autograd.grad(loss.sum(), x_t)[0], loss.detach()


@torch.no_grad()
def vsd_gradient(x0, t, eps, eps_q, eps_p):
    """Variational score distillation (Diff-Instruct, DMD): the difference of scores itself, in x0's units and
    normalised for each token by the teacher's distance. No derivative of a network. Shapes as gsim_gradient."""
    alpha, sigma = alpha_sigma(t)
    x_t = alpha * x0 + sigma * eps
    real = eps_p(x_t)
    x0_p = (x_t - sigma * real) / alpha
    difference = sigma / alpha * (real - eps_q(x_t))
    gradient = difference / ((x0 - x0_p).abs().mean(1, keepdim=True) + 1e-3)
    return gradient, difference.square().sum(1).sqrt()


def critic_loss(eps_q, x0, t, eps):
    """Denoising score matching on the student's samples: plain eps error, (N,). x0 detached."""
    alpha, sigma = alpha_sigma(t)
    return (eps_q(alpha * x0 + sigma * eps) - eps).square().mean(1)


# ----------------------------------------------------------------------------------------------------------------------
# What a run costs, told before it starts


def forward_flops(config, masked, last=1):
    """FLOPs of a transformer pass over one picture, `masked` of its tokens unknown, of the decoder's `last` blocks in
    it, and of the head on one token. On meta tensors, which have shapes and no memory; a backward pass costs twice."""
    with torch.device("meta"):
        model = MAR(config)
        visible, predict = (torch.zeros(1, n, dtype=torch.long) for n in (config.seq_len - masked, masked))
        tokens, label = torch.empty(1, config.seq_len, config.token_dim), torch.zeros(1, dtype=torch.long)
        with FlopCounterMode(display=False) as trunk:
            x = model.trunk(tokens, visible, label, last)
        with FlopCounterMode(display=False) as tail:
            model.tail(x, predict, last)
        with FlopCounterMode(display=False) as head:
            model.head(tokens[0, :1], label, torch.empty(1, config.width))
    return trunk.get_total_flops() + tail.get_total_flops(), tail.get_total_flops(), head.get_total_flops()


def plan(config, args, world, device, stage):
    """Parameters, bytes a process by kind, and FLOPs an image of one stage, "teacher" or "student".

    Activations are an estimate (within 15 % of a real run's peak, README). A transformer block keeps 16 D numbers a
    token for backward (inputs of two norms, four matrices, attention and GELU), a block of the head 10 W a row.
    """
    K = args.ar_steps if args.ar_steps_aware and stage == "student" else None
    P = round(np.mean([masked_count(config, 0, step, K) for step in range(1000)]))
    images = (args.teacher_batch if stage == "teacher" else args.batch) // (world * args.accumulate)
    with torch.device("meta"):
        model = MAR(config)
    heads, total, critic = (sum(p.numel() for p in ps) for ps in (
        model.head_net.parameters(), model.parameters(), critic_parameters(model, args.critic)))
    tokens = config.encoder_depth * (config.buffer_size + config.seq_len - P) \
        + config.decoder_depth * (config.buffer_size + config.seq_len)
    # with bf16 36 bytes for 16 numbers: what enters a norm stays float32. Recomputing keeps the blocks' inputs alone
    a_token = 4 if args.recompute else 36 if device.type == "cuda" else 64
    transformer = images * tokens * config.width * a_token
    head = images * P * 4 * config.head_width * (10 * config.head_depth + 10)
    pass_flops, tail_flops, row_flops = forward_flops(config, P, tail_of(args.critic))
    # the share of a transformer that the critic runs for itself
    own = 1 if args.critic == "full" else tail_flops / pass_flops if args.critic else 0
    if stage == "teacher":
        trained, frozen, passes, rows = total, 0, 3, 3 * args.draws
        activations = transformer + args.draws * head
    else:
        trained, frozen = total + critic, 4 * heads + (2 if device.type == "cuda" else 4) * (total - heads)
        guided, student = (1 if args.guidance == 1 else 2), 1 / args.critic_steps
        passes = guided + 3 * own + student * 3 + (1 - student)  # backward counts as two
        rows = 3 + student * (3 + (2 if args.loss == "gsim" else 1) * (1 + guided)) + (1 - student)
        # kept together: the student's pass, and then the critic's or, after it, the score nets' heads
        activations = transformer + head + max(head + own * transformer,
                                               (1 + guided) * head if args.loss == "gsim" else 0)
    return {"parameters": total, "in the head": heads, "weights": 4 * trained + frozen, "gradients": 4 * trained,
            "optimiser": 8 * trained, "EMA": 4 * total, "activations": activations,
            "flops": passes * pass_flops + rows * P * row_flops, "passes": passes, "in heads": rows * P * row_flops}


def print_plan(config, args, world, device, stage):
    """The plan, in three lines."""
    p, batch = plan(config, args, world, device, stage), args.teacher_batch if stage == "teacher" else args.batch
    memory = {kind: p[kind] / 2**30 for kind in ("weights", "gradients", "optimiser", "EMA", "activations")}
    tqdm.write(f"{stage}: {p['parameters'] / 1e6:.1f} M parameters ({p['in the head'] / 1e6:.1f} M in the head), "
               f"{config.seq_len} tokens; {batch} images an update on {world} process(es)\n"
               f"GiB a process: {', '.join(f'{kind} {value:.2f}' for kind, value in memory.items())} (estimated); "
               f"together {sum(memory.values()):.2f}\n"
               f"an update: {p['passes']:.3g} transformer passes an image, {p['flops'] * batch / 1e12:.3g} TFLOP, "
               f"{p['in heads'] / p['flops']:.0%} of them in heads")


# ----------------------------------------------------------------------------------------------------------------------
# Optimisers and watching


def make_optimizer(model, lr, betas, weight_decay=0.0):
    """AdamW in one fused call; decay on the transformer's matrices only, as MAR: vectors and the head are exempt."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decayed = [p for name, p in named if p.ndim > 1 and not name.startswith("head_net.")]
    others = [p for name, p in named if p.ndim <= 1 or name.startswith("head_net.")]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, fused=True)


def cut_by_t(t, value, bins=10):
    """Sums and counts of value (N,) by time step: -> (2, bins). What a mean over t hides."""
    index = (t * bins) // 1000
    out = torch.zeros(2, bins, device=t.device)
    out[0].index_add_(0, index, value)
    out[1].index_add_(0, index, torch.ones_like(value))
    return out


class Watch:
    """The judge of a run: draws pictures of a network on all ranks, gives its row of the table, writes the grid.

    Pixels are judged by the data's own classifier. Latents are shown (with --vae) and not judged: that is fid.py's.
    """

    def __init__(self, args, data, vae, device, rank, world):
        self.args, self.vae, self.rank, self.world = args, vae, rank, world
        self.pixels, self.can_show, self.classifier = data.pixels, data.pixels or vae is not None, None
        if data.pixels and rank == 0:
            self.classifier = load_or_train_classifier(data, args.out, device=device)
            self.reference = feature_statistics(self.classifier, data)
        self.labels = torch.arange(-(-args.eval_images // world) * world) % data.num_classes  # ranks get equal shares
        self.shown = torch.arange(-(-min(2 * data.num_classes, 20) // world) * world) % data.num_classes
        self.rows, self.grid = {}, {}  # of the table: name -> figures; of the grid: name -> images
        if args.resume and os.path.exists(os.path.join(args.out, "results.json")):
            with open(os.path.join(args.out, "results.json")) as f:
                self.rows = json.load(f)

    def pictures(self, model, labels, head_steps, guidance, seed):
        return draw_together(model, labels, self.rank, self.world, seed=seed, vae=self.vae, head_steps=head_steps,
                             ar_steps=self.args.ar_steps, guidance=guidance,
                             guidance_schedule=self.args.guidance_schedule)

    def look(self, name, model, head_steps, guidance):
        """Draw with `model` a row of the grid and, of pixels, the row {"fd", "accuracy", "seconds_per_image"} of the
        table. Rows of the grid share classes, orders and noise. Cost: eval_images pictures; a teacher's row that a
        resumed run has already is not made again."""
        if self.can_show:
            self.grid[name] = self.pictures(model, self.shown, head_steps, guidance, self.args.seed)
        if self.pixels and (name == "student" or name not in self.rows):
            start = time.time()
            images = self.pictures(model, self.labels, head_steps, guidance, self.args.seed + 1)
            seconds = (time.time() - start) / len(self.labels)
            if self.rank == 0:
                self.rows[name] = {**judge(self.classifier, images, self.labels, self.reference),
                                   "seconds_per_image": seconds}
        return self.rows.get(name, {})

    def write(self, grid_name):
        """The grid drawn so far, results.json, and the table on the terminal."""
        if self.rank == 0 and self.grid:
            save_grid(list(self.grid.items()), os.path.join(self.args.out, grid_name))
        if self.rank == 0 and self.rows:
            write_json(os.path.join(self.args.out, "results.json"), self.rows)
            tqdm.write(f"{'':12s}{'FD':>8s}{'accuracy':>10s}{'s/image':>10s}")
            for name, row in self.rows.items():
                tqdm.write(f"{name:12s}{row['fd']:8.2f}{row['accuracy']:10.3f}{row['seconds_per_image']:10.4f}")


def check_fit(args, config, data):
    """The teacher, the data and the flags must speak of the same pictures."""
    for what, theirs, ours in (("pictures of side", config.img_size, data.img_size),
                               ("classes", config.num_classes, data.num_classes)):
        if theirs != ours:
            raise UserError(f"the teacher draws {what} {theirs}, --data {args.data} has {ours}: choose another")
    if config.pixels != data.pixels:
        raise UserError(f"the teacher works on {'pixels' if config.pixels else 'latents'}, --data {args.data} holds "
                        "the other: build the latent cache with data.py, or choose another teacher")
    if config.latent_size % config.patch_size or config.img_size % config.vae_stride:
        raise UserError(f"--data {args.data}: pictures of {config.img_size} px cannot be cut into tokens of "
                        f"{config.vae_stride * config.patch_size} px: bring them to a multiple of it")
    if args.vae and config.pixels:
        raise UserError("--vae: these pictures are trained on as pixels, no VAE has a part in it: leave it out")
    if args.critic != "full" and args.critic > config.decoder_depth:
        raise UserError(f"--critic {args.critic}: the decoder has {config.decoder_depth} blocks; full trains all")
    if args.ar_steps > config.seq_len:
        raise UserError(f"--ar_steps {args.ar_steps}: a picture has {config.seq_len} tokens, at most that many")
    if args.t_init and args.t_init > T_MAX:
        raise UserError(f"--t_init {args.t_init} must lie in 1..{T_MAX}: beyond, eps errors grow by thousands")


# ----------------------------------------------------------------------------------------------------------------------
# Stage 0: the teacher, by MAR's own loss


def train_teacher(args, config, data, device, rank, world, resumed):
    """Train a MAR of `config` on `data`, write teacher.pt, return it (EMA weights, eval mode, frozen).

    A step costs one transformer pass forward and backward, and `draws` head passes on the masked tokens.
    """
    torch.manual_seed(args.seed)
    model = MAR(config).to(device).train()
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = make_optimizer(model, args.teacher_lr, (0.9, 0.95), weight_decay=0.02)
    start = 0
    if resumed:
        start = resumed["step"]
        restore(resumed, args, model=model, ema=ema, optimizer=optimizer)
    model.checkpoint_blocks = args.recompute
    if args.compile:
        compile_blocks(model)
    gradients = Gradients(model)
    flops, rate = plan(config, args, world, device, "teacher")["flops"], 1.0
    bad, clock, clock_step, stop = torch.tensor(NEVER, device=device), time.time(), start, on_sigterm()
    bar = tqdm(range(start, args.teacher_steps), initial=start, total=args.teacher_steps, desc="teacher", unit="step",
               disable=rank > 0 or None, mininterval=1)
    for step in bar:
        set_lr(optimizer, args.teacher_lr, step, args.teacher_steps, args.warmup, args.decay)
        torch.manual_seed(hash((args.seed, step, rank)) & 0x7FFFFFFF)  # dropout; so a resumed run drops the same

        batch = training_batch(data, model, args.teacher_batch, args.seed, step, device, rank, world)
        gradients.zero()
        parts = [z.chunk(args.accumulate) for z in batch]
        total = 0.0
        for i, part in enumerate(zip(*parts)):
            if i == len(parts[0]) - 1:
                gradients.begin()
            loss = teacher_loss(model, *part, args.draws) / len(parts[0])
            loss.backward()
            total = total + loss.detach()
        norm = gradients.finish(args.clip)
        optimizer.step()
        update_ema(ema, model, min(args.teacher_ema, (1 + step) / (10 + step)))  # ramp: forget the random start

        bad = torch.minimum(bad, torch.where(torch.isfinite(norm), NEVER, step))  # a bad loss makes a bad norm
        last, told_to_stop = step + 1 == args.teacher_steps, False
        if (step + 1) % args.log_every == 0 or last:
            told_to_stop = any_rank(stop.is_set(), device, world)
            stop_if_bad(bad, args)
            loss = average(total, world).item()  # waits for the device: read the clock after it
            images_per_s = args.teacher_batch * (step + 1 - clock_step) / (time.time() - clock)
            log_line(args, rank, bar, stage="teacher", step=step + 1, loss=loss, grad_norm=norm,
                     images_per_s=images_per_s, mfu=images_per_s * flops / rate, **peak_memory(device))
            clock, clock_step = time.time(), step + 1
        if (step + 1) % args.save_every == 0 or last or told_to_stop:
            stop_if_bad(bad, args)
            if rank == 0:
                save_checkpoint({"config": asdict(config), "stage": "teacher", "step": step + 1, "args": vars(args),
                                 "model": model.state_dict(), "ema": ema.state_dict(),
                                 "optimizer": optimizer.state_dict()},
                                os.path.join(args.out, "resume.pt"))
        if told_to_stop:
            leave(args, step + 1)
    write_product(args, data, ema, "teacher", args.teacher_steps, rank)
    return ema


def write_product(args, data, model, stage, step, rank):
    """teacher.pt or student.pt: what sample.py, fid.py and rl.py read. Weights and sizes; no optimiser."""
    if rank == 0:
        save_checkpoint({"config": asdict(model.config), "stage": stage, "ema": model.state_dict(), "step": step,
                         "args": vars(args), "class_names": list(data.class_names)},
                        os.path.join(args.out, f"{stage}.pt"))


# ----------------------------------------------------------------------------------------------------------------------
# Stage 1: distillation


def distil(args, data, teacher, device, rank, world, watch, resumed):
    """Distil `teacher` (frozen) to a one-step student; write student.pt and results.json.

    Transformer passes a step, in forward equivalents: teacher 2 (with its null class), student 3, critic 3 or, with
    --critic N, three times what N blocks are of a pass. Each runs once and serves every head call of the step.
    """
    C = teacher.config.token_dim
    student = copy.deepcopy(teacher).requires_grad_(True)  # eval mode all: scores must differ for one reason only
    ema = copy.deepcopy(teacher)
    own = {id(p) for p in critic_parameters(teacher, args.critic)}
    critic = copy.deepcopy(teacher, memo={id(p): p for p in teacher.parameters() if id(p) not in own})
    for p in critic_parameters(critic, args.critic):
        p.requires_grad_(True)
    optimizer = make_optimizer(student, args.lr, (0.0, 0.99))
    critic_optimizer = make_optimizer(critic, args.critic_lr, (0.0, 0.99))
    start = 0
    if resumed:
        start = resumed["step"]
        restore(resumed, args, model=student, ema=ema, critic=critic, optimizer=optimizer,
                critic_optimizer=critic_optimizer)
    student.checkpoint_blocks = critic.checkpoint_blocks = args.recompute
    if device.type == "cuda":
        bf16_weights(teacher)
    if args.compile:
        compile_blocks(student, critic, teacher)
    gradients, critic_gradients = Gradients(student), Gradients(critic)
    flops, rate = plan(teacher.config, args, world, device, "student")["flops"], 1.0
    ar_steps = args.ar_steps if args.ar_steps_aware else None
    distillation_gradient = gsim_gradient if args.loss == "gsim" else vsd_gradient
    bad, clock, clock_step = torch.tensor(NEVER, device=device), time.time(), start
    bins, critic_bins, norm = (torch.zeros(shape, device=device) for shape in ((2, 10), (2, 10), ()))
    stop = on_sigterm()
    bar = tqdm(range(start, args.steps), initial=start, total=args.steps, desc=args.loss, unit="step",
               disable=rank > 0 or None, mininterval=1)
    for step in bar:
        student_turn = step % args.critic_steps == 0
        set_lr(optimizer, args.lr, step, args.steps, args.warmup, args.decay)
        set_lr(critic_optimizer, args.critic_lr, step, args.steps, args.warmup, 0.0)

        # ---- gradients of both networks, at the same weights
        batch = training_batch(data, teacher, args.batch, args.seed + 1, step, device, rank, world, ar_steps)
        parts = [z.chunk(args.accumulate) for z in batch]
        gradients.zero(), critic_gradients.zero()
        for i, (tokens, labels, keys, visible, masked) in enumerate(zip(*parts)):
            if i == len(parts[0]) - 1:
                critic_gradients.begin()
                if student_turn:
                    gradients.begin()
            g = args.guidance
            if args.guidance_schedule == "linear":  # the scale that sampling has at this share revealed
                g = 1 + (g - 1) * share_revealed(masked.shape[1], teacher.config.seq_len, ar_steps)
            with torch.no_grad():
                c_p, c_null, x_p = teacher_contexts(teacher, tokens, visible, labels, masked, g, args.critic)
            with torch.set_grad_enabled(student_turn):
                c_theta = student.context(tokens, visible, labels, masked).flatten(0, 1)  # (N, D)
                x0 = student.one_step(gaussian(keys, NOISE, masked, C).flatten(0, 1), c_theta)  # (N, C)
            fake = x0.detach()
            if args.critic == "full":
                c_phi = critic.context(tokens, visible, labels, masked).flatten(0, 1)  # (N, D)
            else:
                c_phi = critic.tail(x_p, masked, args.critic).flatten(0, 1) if args.critic else c_p

            t = random_steps(keys, CRITIC_T, masked, 0, 999)
            eps = gaussian(keys, CRITIC_EPS, masked, C).flatten(0, 1)
            loss_phi = critic_loss(lambda x: critic.eps(x, t, c_phi), fake, t, eps)  # (N,)
            (loss_phi.mean() / len(parts[0])).backward()
            critic_bins += cut_by_t(t, loss_phi.detach())

            if student_turn:
                t = random_steps(keys, STUDENT_T, masked, T_MIN, T_MAX)
                eps = gaussian(keys, STUDENT_EPS, masked, C).flatten(0, 1)
                c_q = c_phi.detach()
                v, loss_theta = distillation_gradient(fake, t, eps, lambda x: critic.eps(x, t, c_q),
                                                      lambda x: guided_eps(teacher, x, t, c_p, c_null, g))
                x0.backward(v / (len(v) * len(parts[0])))
                bins += cut_by_t(t, loss_theta)

        # ---- updates
        critic_norm = critic_gradients.finish(args.clip)
        critic_optimizer.step()
        if student_turn:
            norm = gradients.finish(args.clip)
            optimizer.step()
            update_ema(ema, student, args.ema)
        bad = torch.minimum(bad, torch.where(torch.isfinite(norm + critic_norm), NEVER, step))

        # ---- log, evaluate, save
        last, told_to_stop = step + 1 == args.steps, False
        if (step + 1) % args.log_every == 0 or last:
            told_to_stop = any_rank(stop.is_set(), device, world)
            stop_if_bad(bad, args)
            # waits for the device, before the clock; clamp: with --critic_steps no student may have been updated
            loss = (average(bins, world)[0].sum() / bins[1].sum().clamp(min=1)).item()
            average(critic_bins, world)
            images_per_s = args.batch * (step + 1 - clock_step) / (time.time() - clock)
            log_line(args, rank, bar, stage="student", step=step + 1, loss=loss,
                     critic_loss=critic_bins[0].sum() / critic_bins[1].sum(), grad_norm=norm, critic_norm=critic_norm,
                     images_per_s=images_per_s, mfu=images_per_s * flops / rate, **peak_memory(device),
                     loss_by_t=bins[0] / bins[1].clamp(min=1), critic_by_t=critic_bins[0] / critic_bins[1].clamp(min=1))
            bins.zero_(), critic_bins.zero_()
            clock, clock_step = time.time(), step + 1
        if (step + 1) % args.eval_every == 0 or last:
            stop_if_bad(bad, args)  # waits for the device
            before = time.time()
            row = watch.look("student", ema, 1, 1.0)
            watch.write(f"grid_{step + 1:06d}.png")
            if row:
                log_line(args, rank, bar, stage="student", step=step + 1, **row)
            clock += time.time() - before  # no part of images/s
        if (step + 1) % args.save_every == 0 or last or told_to_stop:
            stop_if_bad(bad, args)
            write_product(args, data, ema, "student", step + 1, rank)
            if rank == 0:
                save_checkpoint({"config": asdict(ema.config), "stage": "student", "step": step + 1,
                                 "args": vars(args), "model": student.state_dict(), "ema": ema.state_dict(),
                                 "critic": critic.state_dict(), "optimizer": optimizer.state_dict(),
                                 "critic_optimizer": critic_optimizer.state_dict()},
                                os.path.join(args.out, "resume.pt"))
        if told_to_stop:
            leave(args, step + 1)


def critic_parameters(model, blocks):
    """The parameters that `--critic blocks` trains: all, or the head's and those of the decoder's last blocks."""
    if blocks == "full":
        return list(model.parameters())
    tail = [*model.decoder_blocks[-blocks:].parameters(), *model.decoder_norm.parameters(),
            model.diffusion_pos_embed_learned] if blocks else []
    return [*model.head_net.parameters(), *tail]


def tail_of(blocks):
    """Where the teacher's pass is cut in two (MAR.trunk, MAR.tail) so that a critic of `--critic blocks` can go on from
    there: before that many of the decoder's blocks, and before the last where nobody does."""
    return 1 if blocks in ("full", 0) else blocks


def teacher_contexts(teacher, tokens, visible, labels, masked, g, blocks):
    """c_p and, with guidance, the null class's c: (N, D) each, one pass of both halves; c_null is None for g = 1.
    Third: x_p (B, S + L, D) on the way to c_p, before the last `blocks` of the decoder, where a critic may go on."""
    B, last = len(tokens), tail_of(blocks)
    if g != 1:
        tokens, visible, masked = (torch.cat([z, z]) for z in (tokens, visible, masked))
        labels = torch.cat([labels, torch.full_like(labels, -1)])
    x = teacher.trunk(tokens, visible, labels, last)  # (B or 2B, S + L, D)
    c = teacher.tail(x, masked, last).flatten(0, 1)
    c_p, c_null = (c, None) if g == 1 else c.chunk(2)
    return c_p, c_null, x[:B]


def guided_eps(teacher, x, t, c_p, c_null, g):
    """eps_p(x, t, null) + g (eps_p(x, t, c_p) - eps_p(x, t, null)), one head call of both halves: -> (N, C)."""
    if c_null is None:
        return teacher.eps(x, t, c_p)
    eps, null = teacher.eps(torch.cat([x, x]), torch.cat([t, t]), torch.cat([c_p, c_null])).chunk(2)
    return null + g * (eps - null)


def main(argv=None):
    """Check everything that can be checked, train a teacher or load one, look at it, distil it."""
    args = parse_args(argv)
    if args.teacher and args.teacher_steps:
        raise UserError("--teacher and --teacher_steps: give a checkpoint or train one here, not both")
    if not args.teacher and not args.teacher_steps:
        raise UserError("no teacher: give --teacher FILE (python data.py --get mar_base fetches the public one), or "
                        "--teacher_steps N to train one")
    device, rank, world = setup(args.device)
    data = open_data(args.data)
    teacher = load_mar(args.teacher) if args.teacher else None
    if teacher and (stage := read_checkpoint(args.teacher).get("stage", "teacher")) != "teacher":
        raise UserError(f"--teacher {args.teacher} is of stage {stage}, its head knows one time step only: give the "
                        "teacher.pt it was distilled from")
    config = teacher.config if teacher else replace(SIZES[args.size], img_size=data.img_size,
                                                    num_classes=data.num_classes)
    check_fit(args, config, data)
    vae = load_vae(args.vae).to(device) if args.vae else None
    divided = ["batch"] * bool(args.steps) + ["teacher_batch"] * bool(args.teacher_steps)
    resumed = check_folder(args, world, ("teacher", "student"), divided)
    start_folder(args, rank, world, resumed)
    for stage, steps in (("teacher", args.teacher_steps), ("student", args.steps)):
        if rank == 0 and steps:
            print_plan(config, args, world, device, stage)
    watch = Watch(args, data, vae, device, rank, world)

    if teacher is None and resumed and resumed["stage"] == "student":
        teacher = load_mar(os.path.join(args.out, "teacher.pt"))
    if teacher is None:
        teacher, resumed = train_teacher(args, config, data, device, rank, world, resumed), None
    if args.t_init:
        teacher.config = replace(teacher.config, t_init=args.t_init)
    teacher = teacher.to(device)

    watch.look(f"teacher_{args.teacher_head_steps}", teacher, args.teacher_head_steps, args.guidance)
    watch.look("teacher_1", teacher, 1, args.guidance)  # the student at iteration 0
    watch.write("grid_000000.png")
    distil(args, data, teacher, device, rank, world, watch, resumed)


# ----------------------------------------------------------------------------------------------------------------------
# What training needs, here and in rl.py: averages, learning rates, the run's folder, data parallelism


@torch.no_grad()
def update_ema(ema, model, decay):
    """ema <- decay * ema + (1 - decay) * model, all parameters in one call."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def set_lr(optimizer, peak, step, total, warmup, decay):
    """Linear warm-up, constant, linear to 0 over the last share `decay`."""
    lr = peak * min(1.0, (step + 1) / (warmup + 1), (total - step) / max(1.0, decay * total))
    for group in optimizer.param_groups:
        group["lr"] = lr


class Gradients:
    """Data parallelism by hand: gradients live in a few flat buffers, averaged over the ranks while backward runs.

    Each parameter's .grad is a view into a bucket. Autograd adds into the views; when the last gradient of a bucket has
    arrived, its all-reduce starts, beside the backward of the layers below. One object a network, one cycle a step:

        gradients.zero()
        with nothing: loss_1.backward() ... loss_{m-1}.backward()     # micro-steps: no communication
        gradients.begin(); loss_m.backward()                          # the last micro-step communicates
        norm = gradients.finish(clip=1.0)                             # wait, average, clip; then optimizer.step()

    Buckets start in one fixed order on every rank, so ranks cannot cross over; a parameter that got no gradient keeps
    zeros and its bucket is sent by finish(). Clipping costs a handful of kernels, no host sync.
    """

    def __init__(self, model, bucket_bytes=25 << 20):  # 25 MB: big enough for bandwidth, small enough to overlap
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        params = [p for p in model.parameters() if p.requires_grad][::-1]  # gradients arrive from the last layer down
        if self.world > 1:
            for p in model.parameters():  # every rank starts from rank 0's weights
                dist.broadcast(p.data, 0)
        groups, size = [[]], 0
        for p in params:
            if size + 4 * p.numel() > bucket_bytes and groups[-1]:
                groups.append([])
                size = 0
            groups[-1].append(p)
            size += 4 * p.numel()
        self.flats, self.sizes, self.waiting, self.works = [], [len(g) for g in groups], None, []
        self.views = []  # all .grad
        for b, group in enumerate(groups):
            flat = torch.zeros(sum(p.numel() for p in group), device=group[0].device)
            for p, piece in zip(group, flat.split([p.numel() for p in group])):
                p.grad = piece.view_as(p)
                self.views.append(p.grad)
                if self.world > 1:
                    p.register_post_accumulate_grad_hook(lambda _, b=b: self._arrived(b))
            self.flats.append(flat)

    def zero(self):
        torch._foreach_zero_(self.flats)

    def begin(self):
        """From now on count arrivals: the next backward is the last of this step."""
        self.waiting, self.works = list(self.sizes), []

    def _arrived(self, b):
        if self.waiting is None:
            return  # an earlier micro-step
        self.waiting[b] -= 1
        while len(self.works) < len(self.flats) and self.waiting[len(self.works)] == 0:
            self.works.append(dist.all_reduce(self.flats[len(self.works)], async_op=True))

    def finish(self, clip):
        """Average over ranks and clip to the global norm `clip` (0: measure only). -> the norm before clipping, a
        0-d tensor on the device."""
        if self.world > 1:
            while len(self.works) < len(self.flats):  # buckets with unused parameters
                self.works.append(dist.all_reduce(self.flats[len(self.works)], async_op=True))
            for work in self.works:
                work.wait()
            torch._foreach_div_(self.flats, self.world)
        self.waiting = None
        # of the views: a CPU adds up one long buffer in float32, which is 3e-4 off at 2.4 M numbers
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(self.views)))
        if clip > 0:
            torch._foreach_mul_(self.flats, (clip / (norm + 1e-6)).clamp(max=1.0))
        return norm


def check_folder(args, world, stages, divided, same=()):
    """Refuse to write over another run, and to divide what cannot be divided. -> the checkpoint to resume, or None.

    stages: those that the program can go on with. divided: flags that count images an update, each must split evenly
    over processes and micro-batches. same: flags that a resumed run must have as it began.
    """
    path = os.path.join(args.out, "resume.pt")
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) and os.path.exists(path):
        args.resume = True  # torchrun --max-restarts started us again after a rank died
    if args.resume and not os.path.exists(path):
        raise UserError(f"--resume: {path} is not there; leave --resume away to start")
    if not args.resume and os.path.exists(path):
        raise UserError(f"{args.out} already holds a run: --resume goes on with it, another --out starts a new one")
    for name in divided:
        if vars(args)[name] % (world * args.accumulate):
            raise UserError(f"--{name} {vars(args)[name]} must be a multiple of processes x --accumulate = "
                            f"{world} x {args.accumulate}")
    if not args.resume:
        return None
    resumed = read_checkpoint(path)
    if resumed.get("stage") not in stages:
        raise UserError(f"--resume: {path} was written by another program (stage {resumed.get('stage')}, not "
                        f"{' or '.join(stages)}): give --out of a run of this one")
    was = resumed["args"]
    changed = [name for name, value in vars(args).items() if name != "resume" and was.get(name, value) != value]
    for name in changed:
        if name in same:
            raise UserError(f"--resume: the run in {args.out} has --{name} {was[name]}, not {vars(args)[name]}: give "
                            "that, or start another run with another --out")
    if changed and rank_and_world()[0] == 0:
        print("resumed with other flags:", ", ".join(f"--{name} {vars(args)[name]} (was {was[name]})"
                                                     for name in changed), flush=True)
    return resumed


def restore(resumed, args, **targets):
    """Load what resume.pt holds under the names of `targets` into these networks and optimisers."""
    try:
        for name, target in targets.items():
            target.load_state_dict(resumed[name])
    except (KeyError, RuntimeError, ValueError) as error:
        raise UserError(f"{args.out}/resume.pt does not fit these flags ({name}: {str(error).splitlines()[0][:80]}): "
                        "give those that the run began with, or another --out") from None


def start_folder(args, rank, world, resumed):
    """Make the run's folder with config.json; drop log lines of steps that are going to be done again."""
    log = os.path.join(args.out, "log.jsonl")

    def is_done(line):  # without a checkpoint nothing is: the run was killed before the first
        if resumed is None or line["stage"] != resumed["stage"]:
            return resumed is not None and line["stage"] == "teacher"
        return line["step"] <= resumed["step"]

    try:
        if rank == 0:
            os.makedirs(args.out, exist_ok=True)
            write_json(os.path.join(args.out, "config.json"), vars(args))
            if os.path.exists(log):
                with open(log) as f:  # a line without its end was cut off by a kill
                    lines = [line for line in f if line.endswith("\n") and is_done(json.loads(line))]
                with replacing(log) as f:
                    f.writelines(lines)
    except OSError as error:
        raise UserError(f"cannot write to --out {args.out}: {error.strerror}") from None
    if world > 1:
        dist.barrier()  # nobody writes into the folder before it is there


def log_line(args, rank, bar, **values):
    """One json line in log.jsonl; tensors are read here, so this is where the loop waits for the device."""
    values = {k: v.tolist() if torch.is_tensor(v) else v for k, v in values.items()}
    if rank == 0:
        try:
            with open(os.path.join(args.out, "log.jsonl"), "a") as f:
                f.write(json.dumps(values) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {args.out}/log.jsonl: {error.strerror}; the last checkpoint is kept, "
                            "--resume goes on from it") from None
        bar.set_postfix({k: f"{values[k]:.3g}" for k in ("loss", "reward", "kl", "fd", "fid", "grad_norm")
                         if k in values})


def peak_memory(device):
    """{"peak_gb"}: most GiB that this process has had on its GPU, for logs; {} on a CPU, where nobody counts."""
    return {"peak_gb": torch.cuda.max_memory_allocated(device) / 2**30} if device.type == "cuda" else {}


NEVER = 1 << 60  # a step that is not reached


def stop_if_bad(bad, args):
    """bad: 0-d int64, the first step with a gradient that was not finite (NEVER if none). Checked before any save."""
    if bad < NEVER:
        raise UserError(f"the gradient was not finite at step {int(bad)}: the last good checkpoint in {args.out} is "
                        "kept; lower the learning rate (or mend the reward), or go on with --resume and another --seed")


@functools.lru_cache(maxsize=None)  # one a process: what comes while a stage ends must reach the next one
def on_sigterm():
    """-> a threading.Event that SIGTERM sets, instead of ending the process at once."""
    event = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: event.set())
    return event


def leave(args, step):
    """End after SIGTERM, as a cluster sends before it takes the machine away; the checkpoint is written."""
    print(f"stopped by SIGTERM at step {step}; {args.out}/resume.pt is written, --resume goes on", flush=True)
    raise SystemExit(0)


def average(tensor, world):
    """Mean of a tensor over the ranks, for logs; in place, returned."""
    if world > 1:
        dist.all_reduce(tensor)
        tensor /= world
    return tensor


def any_rank(flag, device, world):
    """Whether `flag` is true on any rank: what one decides, all do. A host sync; call it where there is one anyway."""
    return bool(average(torch.tensor(float(flag), device=device), world) > 0)


if __name__ == "__main__":
    run_main(main)
