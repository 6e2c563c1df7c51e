"""Distil MAR's inner chain of 100 denoising steps to one. Stage 0: a teacher where there is none. Stage 1: GSIM.

Needed before: nothing for shapes; for ImageNet the public teacher (data.py --get mar_base), and no picture.

    python distill.py --data shapes                                  # CPU, from nothing: 4 to 8 minutes
    python distill.py --data cifar10                                 # one GPU; python data.py --get cifar10 first
    python distill.py --data path/to/images                          # train/<class>/*; under 64 px: as pixels
    python distill.py --teacher out/shapes/teacher.pt --out out/own  # a teacher alone, no data: see OwnPictures
    torchrun --nproc_per_node=8 distill.py                           # ImageNet 256, public MAR-B, no data; or --resume

The paper (MARVAL, arXiv 2511.15190) distils with guided score implicit matching, GSIM: `distil` is the loop,
`gsim_loss` the loss. Here
1. the loss is weighted by sigma^2 / alpha, which states it in units of x0: without it small t drowns the rest;
2. an update takes the critic's loss and then the student's at the same weights, and then both step. So accumulation
   and ranks change nothing, but for a VAE's noise and stage 0's dropout; betas (0, .99): no momentum, as in SiD (Zhou
   et al. 2024), because the critic's target moves;
3. t_init, learning rates and update ratio (1 : 1), which the paper does not state, are ours (assets/measurements.md);
4. guidance g means 1.0 = none; the paper's "1.2" is read as g = 1.2;
5. for shapes the teacher is guided at t < 500 only and 100 <= t < 400 counts a tenth: else the student loses modes of
   the data, such as colours (`guidance_at`, `weight_at`). CIFAR-10 would lose its classes: there the size for a CPU
   is guided below 700, and t < 100 counts threefold. Other sizes, untried, have the paper's target.

At the end stands what every loop trains with, rl.py's too: `Run`, a run's folder, `Watch`, its figures, and
`Gradients`, data parallelism by hand.
"""
import copy
import itertools
import json
import math
import os
import signal
import sys
import time
from dataclasses import asdict, replace
from statistics import NormalDist

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from data import (DTYPES, PUBLIC, Parser, check_numbers, file_hash, is_small, load_vae, lock_folder, open_data,
                  read_class_names, run_main, say_once, setup, train_indices)
from fid import classifier_beside, judge, labels_like, load_classifier, load_or_train_classifier, table
from model import (MAR, SIZES, TRAIN, UserError, alpha_sigma, bf16_products, bf16_weights, gaussian, image_keys,
                   load_mar, mask_counts, need_file, read_checkpoint, reading, replacing, runs_bf16, save_checkpoint,
                   say, schedule_tables, take, token_orders, uniform, write_json)
from sample import draw_together, image_seeds, save_grid

# ----------------------------------------------------------------------------------------------------------------------
# The losses: tensors in, one number per token out


def pseudo_huber(y, r=1e-5):
    """d(y) = sqrt(|y|^2 + r^2) - r, the length of y made smooth at 0; and d'(y): (..., C) -> (...), (..., C).
    Not the square, which would give all weight to tokens that are far off; it is zero at the same place."""
    root = (y.square().sum(-1, keepdim=True) + r * r).sqrt()
    return root[..., 0] - r, y / root


def gsim_loss(eps, eps_q, eps_p, alpha, sigma, distance=pseudo_huber):
    """Guided score implicit matching, for each token: eps, eps_q, eps_p (..., C) are the noise in x_t and what the
    student's critic and the guided teacher predict of it, both differentiable in x_t; alpha, sigma (..., 1) -> (...).

    The distance of the two distributions is an integral over t of E d(s_q - s_p): with d = |.|^2, weighted, their KL.
    The student's weights move x_t: d differentiated through x_t is the paper's L2. They also move s_q at a fixed x_t, a
    derivative we do not have. But E[u(x_t)^T (s_q + eps / sigma)] is 0 for every u at any weights (by parts), and so is
    its derivative: with u = d' that turns this part into one through x_t, L1. In it autograd runs through s_q(x_t) and
    d'(x_t), too: only the networks' weights are constant.
    """
    s_q, s_p = -eps_q / sigma, -eps_p / sigma  # scores
    L2, d_prime = distance(s_q - s_p)
    L1 = -(d_prime * (s_q + eps / sigma)).sum(-1)  # -eps / sigma: the score of x_t given x0
    # L1 + L2 is of order 1 / sigma, changes over a distance of sigma in x_t, and d x_t / d x0 = alpha: a slope at x0 of
    # order alpha / sigma^2. This weight makes it of order 1 at every t
    return (sigma**2 / alpha)[..., 0] * (L1 + L2)


def gsim_slope(x_t, eps, eps_q, eps_p, alpha, sigma):
    """d loss / d x0 (..., C) for heads held fixed, and the loss (...). x_t has a graph to eps_q and eps_p. The loss
    reaches the student only through x_t = alpha x0 + sigma eps, eps a constant: it is differentiated down to x_t here,
    and the caller pushes the result into the student's graph. The heads' weights get no gradient."""
    loss = gsim_loss(eps, eps_q, eps_p, alpha, sigma)
    return alpha * torch.autograd.grad(loss.sum(), x_t)[0], loss.detach()


def vsd_slope(x_t, eps, eps_q, eps_p, alpha, sigma):
    """Variational score distillation (Diff-Instruct, DMD), the baseline: the difference of scores itself, in x0's units
    and normalised for each token by the teacher's distance. No network is differentiated. Shapes as in gsim_slope."""
    q_minus_p = sigma / alpha * (eps_p - eps_q)  # x0 by the critic minus x0 by the teacher
    x0_minus_p = sigma / alpha * (eps_p - eps)  # the x0 that is in x_t minus x0 by the teacher
    slope = q_minus_p / (x0_minus_p.abs().mean(-1, keepdim=True) + 1e-3)
    return slope, q_minus_p.square().sum(-1).sqrt()  # for the log, not normalised


SLOPES = {"gsim": gsim_slope, "vsd": vsd_slope}


def critic_loss(eps_q, eps):
    """Denoising score matching on the student's samples: the plain eps error, (..., C) -> (...)."""
    return (eps_q - eps).square().mean(-1)


# Modes of the data, such as colours, overlap at high noise, and only there does a score say how frequent each is. A
# student of a score guided there makes frequent modes more so and loses rare ones. At low noise a score sees one mode:
# guidance is safe, but much learning there lets frequencies drift. Grain is seen, and learned away, at the lowest only.
T_FINE, T_LOW = 100, 400  # sigma / alpha .17 and .74


def guidance_at(t, args):
    """The scale at t (...): --guidance below t_guided, else 1, none -> (..., 1). In samplers: Kynkaanniemi et al."""
    return torch.where(t < args.t_guided, args.guidance, 1.0)[..., None]


def weight_at(t, args):
    """A factor on the student's slope at t (...), not in the log's loss -> (..., 1): fine_weight below T_FINE, then
    low_weight below T_LOW, else 1."""
    return torch.where(t < T_FINE, args.fine_weight, torch.where(t < T_LOW, args.low_weight, 1.0))[..., None]


def guided_eps(teacher, x, t, c_p, c_null, g):
    """eps_p(x, t, null) + g (eps_p(x, t, c_p) - eps_p(x, t, null)), one head call of both halves: -> like x."""
    if c_null is None:  # --guidance 1
        return teacher.eps(x, t, c_p)
    eps, null = teacher.eps(torch.cat([x, x]), torch.cat([t, t]), torch.cat([c_p, c_null])).chunk(2)
    return null + g * (eps - null)


# ----------------------------------------------------------------------------------------------------------------------
# A batch: pictures, some tokens known, the rest to be predicted

# What each random number is for (model.py: noise is a function of a picture's key, a hash of its seeds, of a purpose,
# token and channel). Where tokens are made noisy, `purpose` gives the time step and `purpose + 64` the noise.
TEACHER = TRAIN  # + i for draw i of the teacher's loss, of which there are at most 64
DROP = TRAIN + 128  # whether the teacher sees a picture's class
NOISE = TRAIN + 192  # what the student draws from
CRITIC = TRAIN + 256
STUDENT = TRAIN + 384
# With --seed s, seed s is for the teacher's batches and the grid; s + 1 for the student's batches and the table, which
# share the orders but no noise; s + 2 for pictures that students draw to learn from.
T_MIN, T_MAX = 20, 973  # time steps of the student's loss: sigma / alpha .043 to 24.7


def masked_count(config, seed, step):
    """Tokens masked in this step, one draw for the whole batch as MAR: normal(1, .25) cut to [mask_ratio_min, 1]."""
    normal = NormalDist(1.0, 0.25)
    low, high = normal.cdf(config.mask_ratio_min), normal.cdf(1.0)
    ratio = normal.inv_cdf(low + (high - low) * np.random.default_rng([seed, step]).random())
    return min(config.seq_len, max(1, math.ceil(config.seq_len * ratio)))


def real_pictures(data, model, batch, seed, step, run):
    """This rank's share of `batch` pictures of the data: -> tokens (B, L, C), labels (B,) on the device."""
    indices, flip = train_indices(len(data), batch, step, seed, run.rank, run.world)
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) * 4096 + run.rank)  # the VAE's posterior noise
    x, labels = data.batch(indices, flip, generator)
    return model.patchify(run.upload(x)), run.upload(labels)


def labels_and_seeds(config, batch, seed, step, run):
    """Classes and noise of this rank's share of `batch` pictures to draw: labels (B,), seeds (B, 2), on the device, by
    (seed, step) and the place in the global batch alone. Shuffled rounds of all classes draw each equally often."""
    labels, _ = train_indices(config.num_classes, batch, step, seed, run.rank, run.world)
    seeds = image_seeds(seed, step * batch + run.rank * len(labels), len(labels))
    return run.upload(torch.from_numpy(labels)), run.upload(seeds)


class OwnPictures(torch.nn.Module):
    """Pictures drawn by the student's averaged weights, in place of data: the last POOL batches of them. GSIM never
    reads a masked token's value, so data give it only contexts, and the student's own are nearer to those that it meets
    when it draws. Nothing drifts: in every context the loss is at rest where q = p, and which contexts come decides
    only how much each counts. Every rank holds the whole pool, as buffers, so that resume.pt has it too."""

    POOL, EVERY, AR_STEPS = 16, 8, 8  # AR_STEPS transformer passes every EVERY updates: 1 an update beside GSIM's 8

    def __init__(self, config, batch):
        super().__init__()
        self.batch, self.ar_steps = batch, min(self.AR_STEPS, config.seq_len)
        self.register_buffer("tokens", torch.zeros(self.POOL * batch, config.seq_len, config.token_dim))
        self.register_buffer("labels", torch.zeros(self.POOL * batch, dtype=torch.long))

    def pictures(self, model, seed, step, run):
        """As real_pictures, but any of the pool, whose oldest `batch` pictures `model` draws anew every EVERY steps."""
        drawing = step // self.EVERY
        if step % self.EVERY == 0:
            labels, seeds = labels_and_seeds(model.config, self.batch, seed, drawing, run)
            # one head call a token; so the very first pictures are those of the undistilled network in one step
            tokens = model.patchify(model.generate(labels, self.ar_steps, seeds=seeds))  # (B, L, C), this rank's
            start = drawing % self.POOL * self.batch
            for mine, pool in ((tokens, self.tokens), (labels, self.labels)):
                parts = list(pool[start:start + self.batch].chunk(run.world))  # of all ranks; views, written in place
                if run.world > 1:
                    dist.all_gather(parts, mine.contiguous())
                else:
                    parts[0].copy_(mine)
        filled = min(drawing + 1, self.POOL) * self.batch
        picks = np.random.default_rng([seed, step, 1]).integers(filled, size=self.batch)
        picks = run.upload(torch.as_tensor(np.array_split(picks, run.world)[run.rank]))
        return self.tokens[picks], self.labels[picks]


def training_batch(pictures, config, batch, seed, step, run):
    """pictures: tokens (B, L, C), labels (B,), this rank's share of `batch` -> tokens, labels, keys (B,), visible
    (B, V), masked (B, P) on the device, by (seed, step) and the place in the global batch alone. All masked tokens are
    predicted, though sampling reveals only some of them next: in a random order all are alike, and more is learned from
    the same transformer pass."""
    tokens, labels = pictures
    keys = run.upload(image_keys(image_seeds(seed, step * batch + run.rank * len(labels), len(labels))))
    orders = token_orders(keys, config.seq_len)
    m = masked_count(config, seed, step)
    masked = orders[:, :m].sort(dim=1).values
    visible = orders[:, m:].sort(dim=1).values
    return tokens, labels, keys, visible, masked


def micro_batches(batch, count, gradients, backwards=1):
    """A batch in `count` parts. `gradients` are zeroed first; at the last part they `begin` to be sent to other ranks.
    backwards: how many calls of backward() a part has."""
    for g in gradients:
        g.zero()
    for i, part in enumerate(zip(*(a.chunk(count) for a in batch))):
        if i == count - 1:
            for g in gradients:
                g.begin(backwards)
        yield part


def noised(x0, keys, purpose, positions, low=0, high=999):
    """x_t = alpha_t x0 + sigma_t eps, each token with its own t, uniform in low..high: x0 (B, P, C), keys (B,),
    positions (B, P) of the tokens -> x_t (B, P, C), t (B, P), eps (B, P, C), alpha and sigma (B, P, 1)."""
    span = high - low + 1
    t = low + (uniform(keys, purpose, positions) * span).long().clamp(max=span - 1)  # float32 may round up
    eps = gaussian(keys, purpose + 64, positions, x0.shape[-1])
    alpha, sigma = alpha_sigma(t)
    return alpha * x0 + sigma * eps, t, eps, alpha, sigma


# ----------------------------------------------------------------------------------------------------------------------
# Stage 1: distillation

DECAY = 0.4  # last share of a stage's updates, in which the learning rate falls to 0
MAX_NORM = 1.0  # of a gradient


def distil(args, teacher, data, run, watch):
    """Distil `teacher` (frozen) to a one-step student; write student.pt; `watch` writes results.json."""
    # copies are in eval mode, as the teacher: the two scores must differ for one reason only, whose samples they score
    student, ema, critic = (copy.deepcopy(teacher) for _ in range(3))
    # Adam without momentum: the critic's target moves with every update of the student, and the other way round
    optimizer = make_optimizer(student.requires_grad_(True), args.lr, (0.0, 0.99))
    critic_optimizer = make_optimizer(critic.requires_grad_(True), args.critic_lr, (0.0, 0.99))
    pool = OwnPictures(teacher.config, 0 if data else args.batch).to(run.device)  # with data an empty one
    run.restore("student", model=student, ema=ema, critic=critic, optimizer=optimizer,
                critic_optimizer=critic_optimizer, pool=pool)
    student.checkpoint_blocks = critic.checkpoint_blocks = args.recompute
    bf16_weights(teacher)  # in place, now that float32 copies are made: it is frozen
    gradients, critic_gradients = Gradients(student), Gradients(critic)

    for step in run.steps(args.steps, args.batch):
        # a look comes before the update: broken off, it is made anew when the run goes on from the same step
        if step > 0 and step % args.eval_every == 0:
            watch.look("student", ema, step)
        # learning rates: the student's ends at 0, the critic's stays, since its target never comes to rest
        set_lr(optimizer, args.lr, step, args.steps, args.warmup, DECAY)
        set_lr(critic_optimizer, args.critic_lr, step, args.steps, args.warmup, decay=0.0)

        # pictures of which a part is known: a batch is a single AR step of them, never whole pictures
        if data:
            pictures = real_pictures(data, ema, args.batch, args.seed + 1, step, run)
        else:
            pictures = pool.pictures(ema, args.seed + 2, step, run)
        batch = training_batch(pictures, teacher.config, args.batch, args.seed + 1, step, run)

        micro = micro_batches(batch, args.accumulate, [critic_gradients, gradients])
        for tokens, labels, keys, visible, masked in micro:
            # 1. what is known -> a condition for each masked token. With backward the cost of 8 passes: the teacher's 2
            #    (1 without guidance), the critic's and the student's 3 each
            c_p, c_null = teacher.conditions(tokens, visible, labels, masked, args.guidance)  # (B, P, D) each
            c_q = critic.transformer(tokens, visible, labels, masked)  # (B, P, D)
            # 2. the student draws all masked tokens at once, each from its own noise; true values are never read
            c_theta = student.transformer(tokens, visible, labels, masked)  # (B, P, D)
            x0 = student.one_step(gaussian(keys, NOISE, masked, tokens.shape[2]), c_theta)  # (B, P, C)
            fake = x0.detach()
            # 3. the critic learns the score of what the student draws
            x_q, t_q, noise_q, _, _ = noised(fake, keys, CRITIC, masked)
            loss_q = critic_loss(critic.eps(x_q, t_q, c_q), noise_q).mean()
            (loss_q / args.accumulate).backward()
            # 4. the student: the slope of its loss at x0, through both heads held fixed, goes into its own graph
            x_t, t, eps, alpha, sigma = noised(fake, keys, STUDENT, masked, T_MIN, T_MAX)
            x_t.requires_grad_()
            with torch.set_grad_enabled(args.loss == "gsim"):  # VSD differentiates no network: no graph is kept
                eps_q = critic.eps(x_t, t, c_q.detach())  # (B, P, C), as eps_p
                eps_p = guided_eps(teacher, x_t, t, c_p, c_null, guidance_at(t, args))
            slope, loss_theta = SLOPES[args.loss](x_t, eps, eps_q, eps_p, alpha, sigma)
            slope = slope * weight_at(t, args) / (masked.numel() * args.accumulate)  # of the mean over masked tokens
            x0.backward(slope)
            run.add(args.accumulate, loss=loss_theta.mean(), critic_loss=loss_q)

        # updates: ranks' gradients are averaged and clipped; the average of the student's weights is the product
        critic_norm, norm = critic_gradients.finish(MAX_NORM), gradients.finish(MAX_NORM)
        critic_optimizer.step()
        optimizer.step()
        update_ema(ema, student, args.ema)
        run.add(grad_norm=norm, critic_norm=critic_norm)

        run.log_and_save("student", ema)  # where due: only here does the loop itself wait for the device
    watch.look("student", ema, run.step)


# ----------------------------------------------------------------------------------------------------------------------
# Stage 0: the teacher, by MAR's own loss


def train_teacher(args, config, data, run):
    """Train a MAR of `config` on `data`, write teacher.pt, return it (EMA weights, eval mode, frozen). An update costs
    a transformer pass forward and backward, and `draws` head passes on the masked tokens."""
    torch.manual_seed(args.seed)
    model = MAR(config).to(run.device).train()  # with dropout, for sizes that have some
    # the average of the weights is the teacher: the last ones still follow their last batches
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizers = teacher_optimizers(model, args)
    run.restore("teacher", model=model, ema=ema, **optimizers)
    model.checkpoint_blocks = args.recompute
    gradients = Gradients(model)

    for step in run.steps(args.teacher_steps, args.teacher_batch):
        # to 0 at the end: by then the average has little noise of single batches left
        for optimizer in optimizers.values():
            set_lr(optimizer, args.teacher_lr, step, args.teacher_steps, args.warmup, DECAY)
        # dropout's generator starts anew each step: so a resumed run drops the same
        torch.manual_seed(hash((args.seed, step, run.rank)) & 0x7FFFFFFF)

        # real pictures, of which every update masks another share: the values there are what is learned. Masks and
        # noise go by (seed, step, place): alike on any number of ranks, and after a resume
        pictures = real_pictures(data, model, args.teacher_batch, args.seed, step, run)
        batch = training_batch(pictures, config, args.teacher_batch, args.seed, step, run)
        for part in micro_batches(batch, args.accumulate, [gradients]):
            loss = teacher_loss(model, *part, args.draws, args.max_weight) / args.accumulate
            loss.backward()
            run.add(loss=loss)  # for the next log line, which stops the run where a figure is not finite

        # the update: ranks' gradients are averaged and clipped, for a rare steep batch would throw the weights far
        norm = gradients.finish(MAX_NORM)
        for optimizer in optimizers.values():
            optimizer.step()
        # the average's decay grows from 0.1, to forget the random start
        update_ema(ema, model, min(args.teacher_ema, (1 + step) / (10 + step)))
        run.add(grad_norm=norm)

        run.log_and_save("teacher", ema)  # where due: only here does the loop itself wait for the device
    return ema


def teacher_loss(model, tokens, labels, keys, visible, masked, draws, max_weight=1.0):
    """MAR's own training loss, mean over masked tokens and `draws` of (t, noise) each. One transformer pass.
    max_weight: see diffusion_loss."""
    chance = uniform(keys, DROP, torch.zeros_like(masked[:, :1]))[:, 0]  # one per picture
    labels = labels.masked_fill(chance < model.config.label_drop, -1)
    c = model.transformer(tokens, visible, labels, masked)  # (B, P, D)
    x0 = take(tokens, masked)  # (B, P, C)
    each = [noised(x0, keys, TEACHER + i, masked) for i in range(draws)]
    x_t, t, eps = (torch.stack([draw[i] for draw in each]) for i in range(3))  # (draws, B, P, ...)
    with bf16_products(c.device):  # the head's too, as MAR trains
        out = model.head(x_t, t, c).float()  # (draws, B, P, 2C)
    return diffusion_loss(out, x0, x_t, t, eps, max_weight).mean()


def diffusion_loss(out, x0, x_t, t, eps, max_weight=1.0):
    """MAR's training loss of the head for each token: eps error + the whole variational bound in bits. out (..., 2C)
    the head's eps and variance, x0, x_t, eps (..., C), t (...) -> (...). Source: Nichol & Dhariwal 2021, eq. 16, as
    LTH14/mar runs it: the bound is not scaled down, and the mean is detached, so it trains the variance. max_weight
    above 1, ours: the eps error counts as the error of v = alpha eps - sigma x0, 1 / alpha^2 times as much (Salimans &
    Ho 2022), up to this. Of eps alone it is easy to be right at high noise, where pictures are decided."""
    eps_hat, variance = out.chunk(2, dim=-1)  # (..., C) each
    tables = {name: value[t][..., None] for name, value in schedule_tables(t.device).items()}  # (..., 1) each
    frac = (variance + 1) / 2
    log_var = frac * tables["log_beta"] + (1 - frac) * tables["log_post_var"]
    x0_hat = (x_t - tables["sigma"] * eps_hat.detach()) / tables["alpha"]
    mean_hat = tables["coef_x0"] * x0_hat + tables["coef_xt"] * x_t
    mean = tables["coef_x0"] * x0 + tables["coef_xt"] * x_t
    kl = 0.5 * (log_var - tables["log_post_var"] - 1 + torch.exp(tables["log_post_var"] - log_var)
                + (mean - mean_hat) ** 2 * torch.exp(-log_var))
    bound = torch.where(t[..., None] == 0, -discretised_log_likelihood(x0, mean_hat, 0.5 * log_var), kl) / math.log(2)
    weight = (1 / tables["alpha"][..., 0].square()).clamp(max=max_weight)  # (...)
    return weight * ((eps - eps_hat) ** 2).mean(-1) + bound.mean(-1)


def discretised_log_likelihood(x, mean, log_scale):
    """Log-probability of x, on a grid of 1/127.5, under a Gaussian; (..., C) each. The bound at its last step."""
    def cdf(z):  # the public code's tanh approximation, kept so that losses agree
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    upper = cdf((x - mean + 1 / 255) * torch.exp(-log_scale))
    lower = cdf((x - mean - 1 / 255) * torch.exp(-log_scale))
    inner = torch.log((upper - lower).clamp(min=1e-12))
    left = torch.log(upper.clamp(min=1e-12))
    right = torch.log((1 - lower).clamp(min=1e-12))
    return torch.where(x < -0.999, left, torch.where(x > 0.999, right, inner))


def teacher_optimizers(model, args):
    """{name: optimiser} of stage 0: AdamW with MAR's betas and weight decay; where the size says muon, Muon for the
    matrices of all blocks, the head's too (there these decay as well), which on small data needs half the updates, and
    AdamW for others."""
    if args.teacher_optimizer == "adamw":
        return {"optimizer": make_optimizer(model, args.teacher_lr, (0.9, 0.95), 0.02)}
    blocks = {name: p for name, p in model.named_parameters() if p.ndim == 2 and "blocks." in name}
    return {"optimizer": make_optimizer(model, args.teacher_lr, (0.9, 0.95), 0.02, without=blocks),
            "muon": Muon(blocks.values(), args.teacher_lr)}


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose direction is made orthogonal: all singular values of a matrix's update are about 1
    (Jordan et al. 2024). Times .2 sqrt(longer side) it is as long as AdamW's, whose learning rate it takes (Liu et al.
    2025). Matrices of one shape go through one batched product."""

    def __init__(self, matrices, lr, momentum=0.95, weight_decay=0.02):
        super().__init__(matrices, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        shape = lambda p: p.shape
        for _, same in itertools.groupby(sorted(group["params"], key=shape), key=shape):
            matrices = list(same)
            for p in matrices:
                if p not in self.state:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            momenta = [self.state[p]["momentum"] for p in matrices]
            gradients = [p.grad for p in matrices]
            torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
            ahead = torch._foreach_lerp(gradients, momenta, group["momentum"])
            update = orthogonal(torch.stack(ahead))  # (n, rows, columns)
            torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(matrices, list(update), alpha=-0.2 * max(update.shape[1:])**0.5 * group["lr"])


def orthogonal(x):
    """Matrices x (n, rows, columns) with their singular values moved to about 1: Newton-Schulz steps, X <- a X + b (X
    X^T) X + c (X X^T)^2 X, whose polynomial takes .0015 .. 1 to .7 .. 1.2 in five (Jordan's a, b, c). In bf16 where
    transformers are: it need not be exact."""
    tall = x.shape[1] > x.shape[2]
    out = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    out = (out.mT if tall else out).to(torch.bfloat16 if runs_bf16(x.device) else x.dtype)
    for _ in range(5):
        gram = out @ out.mT
        out = torch.baddbmm(out, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), out, beta=3.4445)
    return (out.mT if tall else out).to(x.dtype)


# ----------------------------------------------------------------------------------------------------------------------
# The command

PUBLIC_FILES = {path: name for name, (_, path, *_) in PUBLIC.items()}  # name: what data.py --get calls it
# What the size or `--data` changes; an explicit flag wins. How these were found: assets/measurements.md.
ON_CPU = dict(teacher_optimizer="muon", teacher_batch=64, teacher_lr=1e-3, draws=2, max_weight=5.0,
              steps=1000, lr=5e-4, critic_lr=1e-3, ema=0.99, ar_steps=8)
DEFAULTS = {
    "shapes": dict(
        ON_CPU, size="shapes", teacher_steps=1300, teacher_ema=0.995,
        batch=32, guidance=2.0, warmup=0, t_guided=500, low_weight=0.1,
        eval_every=500, eval_images=1024, save_every=200),
    "cifar10": dict(
        size="cifar10", teacher_steps=60000, teacher_batch=128, teacher_lr=4e-4, teacher_ema=0.9995, max_weight=5.0,
        steps=8000, batch=128, lr=5e-5, critic_lr=1e-4, ema=0.999, guidance=2.0,
        ar_steps=16, eval_every=1000, eval_images=2000, save_every=500),
    "cifar10_cpu": dict(
        ON_CPU, size="cifar10_cpu", teacher_steps=7000, teacher_ema=0.999,
        steps=2400, batch=16, guidance=2.0, t_guided=700, fine_weight=3.0,
        eval_every=1200, eval_images=500, save_every=100),
}


def parse_args(argv=None):
    """The flags, with the defaults of `recipe`."""
    p = Parser("Train a MAR teacher where there is none, and distil it to one step.")
    flag = p.add_argument
    # files and data
    flag("--data", default=None, help="shapes, cifar10, folder with train/<class>/*, cache; left out: no data")
    flag("--pixels", action="store_true", help="use a folder's images as pixels, whatever their size")
    flag("--out", default=None, help="folder of the run (default out/<name of the data or of the teacher>)")
    flag("--vae", default=None, help="KL-16 file, to show pictures of latents while training")
    # stage 0, the teacher
    flag("--teacher", default=None, help="its file (left out: one is trained, or the public MAR-B)")
    flag("--size", default="base", choices=list(SIZES), help="network of a teacher trained here")
    flag("--teacher_steps", type=int, default=0, help="updates of stage 0; 0 = --teacher is needed")
    flag("--teacher_batch", type=int, default=256, help="images an update of stage 0, all ranks together")
    flag("--teacher_lr", type=float, default=1e-4, help="peak learning rate of stage 0")
    # stage 1, the student
    flag("--loss", default="gsim", choices=list(SLOPES), help="vsd: the Diff-Instruct / DMD baseline")
    flag("--guidance", type=float, default=1.2, help="scale baked into the student; 1 = none, 1.2 is the paper's: a "
         "student wants less than its teacher's sampler")
    flag("--t_init", type=int, default=None, help="time step the student starts from (left out: the size's); "
         "higher: noisier start, larger eps errors")
    flag("--steps", type=int, default=150000, help="updates of stage 1")
    flag("--batch", type=int, default=256, help="images an update of stage 1, all ranks together")
    flag("--critic_lr", type=float, default=1e-5, help="of the critic; raise it when critic_norm in the log stays high")
    # what is shown
    flag("--ar_steps", type=int, default=64, help="AR steps of the pictures shown and judged")
    flag("--teacher_head_steps", type=int, default=100, help="chain length of the teacher shown")
    # what a size decides, and no flag: the teacher's optimiser, and averaging of its weights a step; (t, noise) draws a
    # token in stage 0, cheap where the head is small, and how much the highest t count there (diffusion_loss); where in
    # t the student's target is guided, and how much low t counts. guidance_schedule: how sample.py draws the teacher
    p.set_defaults(teacher_optimizer="adamw", teacher_ema=0.9999, draws=4, max_weight=1.0, t_guided=1000,
                   fine_weight=1.0, low_weight=1.0, guidance_schedule="constant")
    args = read_flags(p, argv, recipe)
    source = "imagenet" if args.teacher in PUBLIC_FILES else os.path.dirname(os.path.abspath(args.teacher or ""))
    args.out = args.out or f"out/{os.path.basename(os.path.normpath(args.data or source))}"
    return args


def read_flags(p, argv, recipe, **defaults):
    """The flags of `p`, and those that all training has, with `defaults`. They are read twice: first for what decides
    the defaults, then with those that `recipe` makes of it, so that --help shows them."""
    flag = p.add_argument
    # optimiser
    flag("--lr", type=float, default=1e-5, help="student's learning rate")
    flag("--warmup", type=int, default=100, help="updates of linear warm-up")
    flag("--ema", type=float, default=0.9999, help="decay of the average of the student's weights, an update")
    # memory
    flag("--accumulate", type=int, default=1, help="micro-batches an update: more if memory runs out")
    flag("--recompute", action="store_true", help="compute the blocks again in backward: less memory, 1/3 more time")
    # watching
    flag("--eval_every", type=int, default=5000, help="updates between grids and figures")
    flag("--eval_images", type=int, default=2048, help="images a row of figures")
    flag("--save_every", type=int, default=1000, help="updates between checkpoints")
    flag("--log_every", type=int, default=20, help="updates between log lines (a host sync each)")
    # system
    flag("--resume", action="store_true", help="go on from the run's last checkpoint")
    flag("--seed", type=int, default=0, help="of everything random")
    flag("--device", default="auto", help="auto, cpu, cuda or mps; CUDA_VISIBLE_DEVICES picks a GPU")
    flag("--dtype", default="auto", choices=DTYPES, help="of matrix products; auto: bfloat16 where it is fast")
    p.set_defaults(**defaults)
    argv = sys.argv[1:] if argv is None else argv
    known, _ = p.parse_known_args([word for word in argv if word not in ("-h", "--help")])
    p.set_defaults(**recipe(known))
    args = p.parse_args(argv)
    # two: a covariance is taken of the images, and REINFORCE divides by calls - 1
    check_numbers(args, one="teacher_batch t_init teacher_head_steps chunk batch accumulate ar_steps eval_every "
                  "save_every log_every", two="eval_images calls", share="ema")
    return args


def recipe(known):
    """The defaults, by the flags that decide them, `known` from a first reading:
    --teacher FILE   those of the size of its network; without --data also the AR steps of its run
    only --data      those of --size, else of the data's name; a teacher is trained if they say for how long
    neither          the flags' own, with the public MAR-B as teacher"""
    given = known.teacher or not known.data
    teacher = known.teacher or PUBLIC["mar_base"][1]
    file = read_checkpoint(teacher) if given and os.path.isfile(teacher) else {}  # not there: main says so
    found = dict(defaults_of(DEFAULTS, file, known.data, known.size, known.pixels))
    trained = not given and (known.teacher_steps or found)  # a flag or the size says for how long
    found["teacher"] = None if trained else teacher
    if given:
        found["teacher_steps"] = 0
    made = file.get("args")  # the flags of its run; in public files no dict
    if not known.data and isinstance(made, dict) and "ar_steps" in made:
        found["ar_steps"] = made["ar_steps"]
    return found


def defaults_of(defaults, file, data, size=None, pixels=False):
    """The entry of `defaults` for a checkpoint's dict (the size of its network is told by the width), or for `size`, or
    for the data's name; pictures of another name that are used as pixels are trained on as CIFAR-10's."""
    if file:
        config = file.get("config")
        width = config.get("width") if isinstance(config, dict) else None
        size = next((name for name, config in SIZES.items() if config.width == width), None)
    by_data = "cifar10" if data and data not in defaults and (pixels or is_small(data)) else data
    return defaults.get(size, defaults.get(by_data, {}))


def check_fit(args, teacher, config, data):
    """The teacher, the data (of both one may be None) and the flags must speak of the same pictures."""
    if teacher and teacher.stage != "teacher":
        raise UserError(f"--teacher {args.teacher} is of stage {teacher.stage}: give its own teacher, a teacher.pt")
    kind = lambda x: f"{x.num_classes} classes of {'pixels' if x.pixels else 'latents'} of side {x.img_size}"
    if data and kind(config) != kind(data):
        raise UserError(f"the teacher draws {kind(config)}, --data {args.data} has {kind(data)}: choose another")
    token = config.vae_stride * config.patch_size
    if config.img_size % token:
        raise UserError(f"--data {args.data}: pictures of {config.img_size} px cannot be cut into tokens of {token} px")
    if args.vae and config.pixels:
        raise UserError("--vae: these pictures are trained on as pixels: leave it out")
    mask_counts(config.seq_len, args.ar_steps)  # complains about a K above the number of tokens
    if args.t_init and args.t_init > T_MAX:
        raise UserError(f"--t_init {args.t_init} must lie in 1..{T_MAX}: beyond, eps errors grow 25-fold and more")


def check_names(network, data):
    """Class i of a network must be class i of the data, or of a Classifier, where both name theirs. (Names that are the
    numbers 0, 1, ... are none: main gives them where a public teacher names nothing.)"""
    theirs, ours = network.class_names or [*map(str, range(network.config.num_classes))], list(data.class_names)
    if theirs == [*map(str, range(len(ours)))]:
        say_once(f"{network.source} names no classes: its class 0 is taken for {ours[0]}, the last for {ours[-1]}")
        return
    for i, (name, other) in enumerate(itertools.zip_longest(theirs, ours)):
        if name != other:
            raise UserError(f"class {i} of {network.source} is {name}, of {data.name} it is {other}: name them alike")


def main(argv=None):
    """Check everything that can be checked, train a teacher or load one, look at it, distil it."""
    args = parse_args(argv)
    if bool(args.teacher) == bool(args.teacher_steps):  # without --data there is always a --teacher
        raise UserError("give either --teacher FILE (the public one: data.py --get mar_base), or --data and "
                        "--teacher_steps N")
    device, rank, world = setup(args.device, args.dtype)
    data = open_data(args.data, pixels=args.pixels) if args.data else None
    teacher = load_mar(need_file(args.teacher, PUBLIC_FILES.get(args.teacher))) if args.teacher else None
    config = teacher.config if teacher else replace(SIZES[args.size], img_size=data.img_size,
                                                    num_classes=data.num_classes)
    check_fit(args, teacher, config, data)
    # without data figures are by a classifier beside the teacher; latents are shown, with --vae: fid.py judges them
    beside = None if data or not config.pixels else classifier_beside(args.teacher)
    real = data or beside and load_classifier(beside)
    if real and teacher:
        check_names(teacher, real)
    class_names = data.class_names if data else teacher.class_names or (
        read_class_names() if config.num_classes == 1000 else [*map(str, range(config.num_classes))])
    vae = load_vae(args.vae).to(device) if args.vae else None
    # the rows of the table are of this t_init, the pool of own pictures is of this batch
    run = Run(args, device, rank, world, ["teacher", "student"], class_names,
              same=["t_init"] + ["batch"] * (not data), files=["teacher"])
    run.start()
    if not data and config.pixels:
        say(f"no data: figures are by {beside or 'none: no classifier_0.pt lies beside the teacher'}")
    if beside and rank == 0:
        with replacing(run.path("classifier_0.pt"), "wb") as f:  # so that rl.py and fid.py find it beside the student
            f.write(beside.read_bytes())

    def make_figures():
        classifier = real.to(device) if beside else load_or_train_classifier(data, args.out, 0, device)
        return lambda images, labels: judge(classifier, images, labels)

    watch = Watch(run, config, real, make_figures if config.pixels and real else None, vae)
    if teacher is None:
        done = run.resumed.get("stage") == "student"
        teacher = load_mar(run.path("teacher.pt")) if done else train_teacher(args, config, data, run)
    if args.t_init:
        teacher.config = replace(teacher.config, t_init=args.t_init)
    teacher = teacher.to(device)

    # what the student is compared with: the chain and one step of the teacher, guided by the same g but at every t
    for head_steps in (args.teacher_head_steps, 1):
        watch.look(f"teacher_{head_steps}", teacher, head_steps=head_steps, guidance=args.guidance,
                   guidance_schedule=args.guidance_schedule)
    distil(args, teacher, data, run, watch)


# ----------------------------------------------------------------------------------------------------------------------
# What all training needs, rl.py's too: optimiser, averages, the run's folder, data parallelism

# signal in a loop -> exit code once a checkpoint is written. 0, or torchrun --max-restarts would start the run again
SIGNALS = {signal.SIGTERM: 0, signal.SIGINT: 130}


def make_optimizer(model, lr, betas, weight_decay=0.0, without=()):
    """AdamW in one fused call; decay on the transformer's matrices only, as MAR: vectors and the head are exempt.
    without: names of parameters that another optimiser has."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad and name not in without]
    decayed = [p for name, p in named if p.ndim > 1 and not name.startswith("head_net.")]
    others = [p for name, p in named if p.ndim <= 1 or name.startswith("head_net.")]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


@torch.no_grad()
def update_ema(ema, model, decay):
    """ema <- decay * ema + (1 - decay) * model, all parameters in one call."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def set_lr(optimizer, peak, step, total, warmup, decay):
    """Linear warm-up, constant, linear to 0 over the last share `decay`."""
    lr = peak * min(1.0, (step + 1) / (warmup + 1), (total - step) / max(1.0, decay * total))
    for group in optimizer.param_groups:
        group["lr"] = lr


class Run:
    """A run's folder and its bookkeeping: config.json, log.jsonl, resume.pt, products, signals, NaN. It never sees a
    batch or an optimiser's step. A loop calls `restore`, goes through `steps`, and in each `add`s what the log is to
    have and calls `log_and_save`. Written files are whole at any moment, so a run killed in any line resumes from its
    last checkpoint, on a CPU bit for bit. `step` counts updates done; a loop's own is the number of its update, from
    0."""

    def __init__(self, args, device, rank, world, stages, class_names, same=(), files=()):
        """stages: those that the program can go on with; same: flags that a resumed run must have as it began; files:
        flags whose files (None: none) must be as they were then, whatever they are called now."""
        self.args, self.class_names = args, class_names
        self.device, self.rank, self.world = device, rank, world
        self.heard = self.stopping = 0  # the signal that this process heard; that all agreed to obey
        path = self.path("resume.pt")
        restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0)  # by torchrun --max-restarts, as a rank died
        if restarted and os.path.exists(path) and not args.resume:
            args.resume = True
            same = [*vars(args)]  # all flags: with others it is another run's file
        if args.resume != os.path.exists(path):
            raise UserError(f"--resume: {path} is not there; leave --resume away to start" if args.resume else
                            f"{args.out} already holds a run: --resume goes on with it, another --out starts a new one")
        for steps, batch in (("steps", "batch"), ("teacher_steps", "teacher_batch")):
            if vars(args).get(steps) and vars(args)[batch] % (world * args.accumulate):
                raise UserError(f"--{batch} must be a multiple of {world} processes x --accumulate {args.accumulate}")
        paths = {flag: vars(args)[flag] for flag in files}
        hashes = {f"{flag}_sha256": path and file_hash(path)[:16] for flag, path in paths.items()}
        vars(args).update(hashes)  # in config.json and checkpoints they stand beside the flags
        self.resumed = read_checkpoint(path) if args.resume else {}
        if self.resumed:
            self.check_resumed(stages, {*same, *hashes})

    def check_resumed(self, stages, same):
        """Refuse to go on where what must be as at the start is not; say what else has changed."""
        was, stage = self.resumed.get("args", {}), self.resumed.get("stage")
        changed = {name: f"{name} {value} (was {was[name]})" for name, value in vars(self.args).items()
                   if name != "resume" and was.get(name, value) != value}
        wrong = [text for name, text in changed.items() if name in same]
        if stage not in stages:
            wrong = [f"another program (its stage is {stage}, not {' or '.join(stages)})"]
        if wrong:
            raise UserError(f"--resume: the run in {self.args.out} cannot go on with {', with '.join(wrong)}: give "
                            "what it had, or another --out")
        if changed:
            say(f"resumed with other flags: {', '.join(changed.values())}")

    def path(self, name):
        return os.path.join(self.args.out, name)

    def start(self):
        """Own the folder, write config.json, cut the log back to where resume.pt was saved."""
        if self.rank == 0:
            lock_folder(self.args.out)
            write_json(self.path("config.json"), vars(self.args))
            with open(self.path("log.jsonl"), "ab") as f:
                f.truncate(min(f.tell(), self.resumed.get("log_bytes", 0)))
        if self.world > 1:
            dist.barrier()  # nobody writes into the folder before it is there

    def restore(self, stage, **state):
        """A stage begins: load what resume.pt holds of it under the names of `state` into these networks and
        optimisers, which `save` saves."""
        self.stage, self.step, self.state = stage, 0, state
        if self.resumed.get("stage") == stage:
            with reading(self.path("resume.pt"), "checkpoint for these flags", ": give those of its start"):
                for name, target in state.items():
                    target.load_state_dict(self.resumed[name])
            self.step = self.resumed["step"]
            self.resumed = {"stage": stage, "step": self.step}  # or the old file keeps its place on the disk
        self.kept = self.step  # that of resume.pt

    def upload(self, x):
        """x on the device. A copy from memory that is not pinned would wait for the GPU's queue."""
        return x.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else x.to(self.device)

    def steps(self, total, images):
        """The steps that are left, with a bar. images: an update's, of all ranks. Only in between is there something to
        save: elsewhere a signal ends the process at once, as always."""
        self.total, self.images, self.sums = total, images, {}
        self.logged, self.clock = self.step, time.time()  # step of the last log line; since when training goes on
        say(f"{self.stage}: updates {self.step} to {total}, {images} images each on {self.world} process(es)")
        self.bar = tqdm(range(self.step, total), self.stage, total, initial=self.step, disable=self.rank > 0 or None)
        before = {number: signal.getsignal(number) for number in SIGNALS}
        try:
            for number, handler in before.items():
                if handler != signal.SIG_IGN:  # as a shell sets SIGINT for a background job
                    signal.signal(number, self.hear)
            for step in self.bar:
                self.step = step + 1  # updates done when the loop's body ends
                yield step
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def hear(self, number, frame):
        """A first signal ends the run as soon as an update is saved, a second the process at once."""
        if not self.heard:
            self.heard, self.heard_at = number, time.time()
            if self.rank == 0:  # not by print, which may be what the signal interrupts
                when = "an update" if self.world == 1 else "the next log line"
                os.write(2, f"\nstopping after {when}; once more ends now\n".encode())
        elif time.time() - self.heard_at > 1:  # torchrun passes on what the terminal has sent already
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def add(self, count=1, **values):
        """Add 0-d tensors by name, of one of `count` micro-batches, to sums since the last log line. No host sync."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach() / count

    def log_and_save(self, product, model):
        """Log and save every so many updates, at the last one, when the run is to end, and before a look, which a kill
        may break off."""
        if self.world == 1:  # several agree at a log line
            self.stopping = self.heard
        due = lambda *every: self.stopping or self.step == self.total or any(self.step % n == 0 for n in every)
        if due(self.args.log_every, self.args.save_every, self.args.eval_every):
            self.log()  # before each save, so that nothing is saved of a gradient that was not finite
        if due(self.args.save_every, self.args.eval_every):
            self.save(product, model)

    def log(self):
        """A line of log.jsonl: means of what was added, over the updates since the last line and over the ranks, and
        images/s. So here the loop waits for the device, ranks agree whether to stop, and what is not finite is seen."""
        sums = torch.stack(list(self.sums.values()))
        if self.world > 1:
            heard = torch.tensor(self.heard, device=self.device)
            dist.all_reduce(heard, op=dist.ReduceOp.MAX)  # what one rank heard all obey
            self.stopping = int(heard)
            dist.all_reduce(sums)
        updates = self.step - self.logged
        values = dict(zip(self.sums, (sums / (self.world * updates)).tolist()))
        if not all(map(math.isfinite, values.values())):  # a sum stays what one of its terms was
            raise UserError(f"not finite in updates {self.logged + 1} to {self.step}: {values}: lower the learning "
                            "rate or mend the reward" + f"; --resume goes on from step {self.kept}" * (self.kept > 0))
        self.bar.set_postfix(list(values.items())[:1])  # the loss or the reward
        values["images_per_s"] = self.images * updates / (time.time() - self.clock)
        if self.device.type == "cuda":
            values["peak_gb"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        self.sums, self.logged = {}, self.step
        self.note(values)

    def note(self, values):
        """A line of log.jsonl. The clock of images/s restarts: the time before may not have been training."""
        if self.rank == 0:
            with open(self.path("log.jsonl"), "a") as f:
                f.write(json.dumps({"stage": self.stage, "step": self.step, **values}) + "\n")
        self.clock = time.time()

    def save(self, product, model):
        """<product>.pt and resume.pt, whole files at any moment. Here a run ends that a signal has told so."""
        if self.rank == 0:
            self.write(product, model.config, ema=model.state_dict())
            self.write("resume", model.config, **{name: x.state_dict() for name, x in self.state.items()},
                       log_bytes=os.path.getsize(self.path("log.jsonl")))
        self.kept = self.step
        if self.world == 1:  # a signal while the files were written is obeyed, too
            self.stopping = self.heard
        if self.stopping:
            if self.world > 1:
                dist.barrier()  # when one rank is gone torchrun ends the others: not before rank 0 has written
            say(f"stopped by {signal.Signals(self.stopping).name} at step {self.step}; --resume goes on")
            raise SystemExit(SIGNALS[self.stopping])
        self.clock = time.time()

    def write(self, name, sizes, /, **contents):
        """<name>.pt, with `ema`, weights, what sample.py, fid.py and rl.py read. sizes: a MARConfig."""
        save_checkpoint({"config": asdict(sizes), "stage": self.stage, "step": self.step, "args": vars(self.args),
                         "class_names": list(self.class_names), **contents}, self.path(f"{name}.pt"))


class Watch:
    """What a run is watched by: pictures of a network, drawn on all ranks and judged on rank 0; a table and a grid.
    real: Data or Classifier whose mixture of classes the table has; None: alike often. make_figures: None, no table; or
    called once, on rank 0, for a function of images uint8 (N, 3, H, W) and labels (N,) -> {name: number}. Rows of the
    grid share classes, orders and noise, so that a picture can be compared with the one above; latents need a vae."""

    def __init__(self, run, config, real, make_figures, vae=None):
        self.run, self.vae = run, vae
        self.judges = make_figures is not None
        self.figures = make_figures() if self.judges and run.rank == 0 else None
        fits = real and len(real.counts) == config.num_classes
        self.labels = labels_like(real.counts if fits else torch.ones(config.num_classes), run.args.eval_images)
        self.shown = torch.arange(min(2 * config.num_classes, 20)) % config.num_classes  # of the grid
        self.rows, self.grid = {}, {}  # of the table: name -> figures; of the grid: name -> images
        if run.resumed and os.path.exists(run.path("results.json")):
            with open(run.path("results.json")) as f, reading(f.name, "table of figures", ": delete it"):
                self.rows = dict(json.load(f))

    def look(self, name, model, step=None, **how):
        """Draw with `model` a row of the grid and one of the table, which costs eval_images pictures: -> the row, with
        what it was `made_by`; it is not made again where results.json has one made alike. how: head_steps, guidance,
        ... of `generate`. A row of a step goes to the log too."""
        args, seed = self.run.args, self.run.args.seed
        how = {"ar_steps": args.ar_steps, "head_steps": 1, "guidance": 1.0, **how}
        draw_with = lambda labels, seed: draw_together(model, labels, self.run.rank, self.run.world, seed=seed,
                                                       vae=self.vae, **how)
        if self.vae or model.config.pixels:
            self.grid[name] = draw_with(self.shown, seed)
        made_by = {"n": len(self.labels), "seed": seed + 1, "step": step, **how}
        if self.judges and self.rows.get(name, {}).get("made_by") != made_by:
            start = time.time()
            images = draw_with(self.labels, seed + 1)
            seconds = (time.time() - start) / len(self.labels)
            row = self.figures(images, self.labels) if self.run.rank == 0 else {}
            self.rows[name] = {**row, "seconds_per_image": seconds, "made_by": made_by}
        row = self.rows.get(name, {})
        self.show(step or 0)
        if self.judges and step is not None:
            self.run.note({"step": step, "eval": row})
        return row

    def show(self, step):
        """The grid drawn so far, results.json, and the table on the terminal."""
        if self.run.rank > 0:
            return
        if self.grid:
            save_grid(list(self.grid.items()), self.run.path(f"grid_{step:06d}.png"))
        if self.rows:
            write_json(self.run.path("results.json"), self.rows)
            # of all rows: after a resume fewer figures may be had, or more
            columns = dict.fromkeys(itertools.chain(*self.rows.values()))
            columns = [name for name in columns if name not in ("made_by", "census")]
            tqdm.write(table(self.rows.items(), columns))


class Gradients:
    """Data parallelism by hand: gradients live in a few flat buffers, averaged over the ranks while backward runs.

    Each parameter's .grad is a view into a bucket, whose all-reduce starts when its last gradient has arrived, beside
    the backward of the layers below. One object a network, one cycle a step:

        gradients.zero()
        loss_1.backward() ... loss_{m-1}.backward()                   # micro-steps: no communication
        gradients.begin(); loss_m.backward()                          # the last micro-step communicates
        norm = gradients.finish(clip=1.0)                             # wait, average, clip; then optimizer.step()

    Buckets start in one fixed order on every rank, so ranks cannot cross over; that of a parameter which got no
    gradient, zeros, is sent by finish(). Clipping costs a handful of kernels, no host sync."""

    def __init__(self, model, bucket_bytes=25 << 20):  # 25 MB: big enough for bandwidth, small enough to overlap
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        if self.world > 1:
            for p in model.parameters():  # every rank starts from rank 0's weights
                dist.broadcast(p.data, 0)
        params = [p for p in model.parameters() if p.requires_grad][::-1]  # gradients arrive from the last layer down
        ends = itertools.accumulate(4 * p.numel() for p in params)
        bucket_of = {p: end // bucket_bytes for p, end in zip(params, ends)}
        self.flats, self.views, self.sizes = [], [], []  # buckets; all .grad; how many parameters a bucket has
        self.waiting, self.works = None, []  # gradients that a bucket waits for; all-reduces on their way
        for b, (_, group) in enumerate(itertools.groupby(params, bucket_of.get)):
            group = list(group)
            flat = torch.zeros(sum(p.numel() for p in group), device=group[0].device)
            for p, piece in zip(group, flat.split([p.numel() for p in group])):
                p.grad = piece.view_as(p)
                self.views.append(p.grad)
                if self.world > 1:
                    p.register_post_accumulate_grad_hook(lambda _, b=b: self._arrived(b))
            self.flats.append(flat)
            self.sizes.append(len(group))

    def zero(self):
        torch._foreach_zero_(self.flats)

    def begin(self, backwards=1):
        """From now on count arrivals: the next so many calls of backward() are the last of this step."""
        self.waiting, self.works = [backwards * size for size in self.sizes], []

    def _arrived(self, b):
        if self.waiting is not None:  # None: an earlier micro-step
            self.waiting[b] -= 1
            self._send()

    def _send(self):
        """Start the all-reduce of the next buckets, in order, up to the first that waits for a gradient."""
        while len(self.works) < len(self.flats) and self.waiting[len(self.works)] == 0:
            self.works.append(dist.all_reduce(self.flats[len(self.works)], async_op=True))

    def finish(self, clip):
        """Average over ranks and clip to the global norm `clip` (0: measure only). -> the norm before clipping, a
        0-d tensor on the device."""
        if self.world > 1:
            self.waiting = [0] * len(self.flats)  # what is left are buckets with unused parameters
            self._send()
            for work in self.works:
                work.wait()
            torch._foreach_div_(self.flats, self.world)
        self.waiting = None
        # of the views: one long buffer, added up in float32, loses digits
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(self.views)))
        if clip > 0:
            torch._foreach_mul_(self.flats, (clip / (norm + 1e-6)).clamp(max=1.0))
        return norm


if __name__ == "__main__":
    run_main(main)
