"""Post-train the one-step student with a reward: any function of (finished picture, class), differentiable or not.

Must exist: a student from distill.py; for rewards by CLIP, PickScore, ImageReward their weights (data.py --get).

    python rl.py --data shapes --reward classifier                   # CPU, minutes; distill.py --data shapes first
    python rl.py --data shapes --reward jpeg --out out/shapes/jpeg   # smaller files: no gradient, no network
    python rl.py --data shapes --reward classifier --estimator pathwise        # the reward's own gradient
    python rl.py --reward clip --ckpt out/imagenet/student.pt     # one GPU
    torchrun --nproc_per_node=8 rl.py                                # ImageNet 256, PickScore, as the paper
    torchrun --nproc_per_node=8 rl.py --resume                       # goes on from the last checkpoint, bit for bit

The paper (MARVAL, arXiv 2511.15190) makes a whole picture in K fast AR steps, scores it, and follows the gradient of
the score. Single steps are never scored: half a picture has no CLIP score, and what a token is worth is decided by the
tokens that follow. Here
1. the default needs no gradient of the reward: REINFORCE, with a Gaussian policy on the finished picture (one action an
   episode); `reinforce_direction` beside `pathwise_direction`, the paper's. All else is shared;
2. the textbook form, a Gaussian on each revealed token at each AR step, is left out: it hardly moved (README);
3. the KL to the start is taken step by step along the student's own path (`retrace`): two chains of the same noise part
   for good at the first token that differs, and pulling finished pictures together then only washes them out;
4. learning rate, batch, KL weight, which the paper does not state, are ours (README has the measurements).
"""
import copy
import io
import math
import os
import sys
import time
from dataclasses import asdict

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from data import (LATENT_SCALE, PUBLIC, Parser, check_numbers, is_small, load_vae, open_data, read_class_names,
                  run_main, setup, train_indices)
from distill import (NEVER, Gradients, any_rank, average, check_folder, leave, log_line, on_sigterm, peak_memory, restore,
                     set_lr, start_folder, stop_if_bad, update_ema)
from fid import (TEMPLATE, WEIGHTS, feature_statistics, frechet_distance, judge, load_inception,
                 load_or_train_classifier, mean_and_covariance, need_file, prompt_scorer, read_npz, statistics_in)
from model import (START, TRAIN, UserError, bf16_weights, compile_blocks, gaussian, image_keys, load_mar, mask_counts,
                   put, read_checkpoint, reveal_plan, save_checkpoint, take, token_orders, write_json)
from sample import draw_together, save_grid

EXPLORE = TRAIN + 1024  # purpose of the policy's noise (see model.py: noise is a function of picture, purpose, place)
S_KL = 0.1  # width of the Gaussian around a picture that the KL is stated for, in the units of x
KL = {"classifier": 0.1, "red": 0.05}  # --kl of a single reward, others KL_ELSE; figures in README. Every pixel has to
KL_ELSE = 0.2  # move for red; at 0.01 all pictures became red squares

# What `--data` changes; an explicit flag always wins. Figures: README, "What was tried".
DEFAULTS = {
    "shapes": dict(reward=["classifier"], watch=["judge", "jpeg", "red"], steps=120, batch=16, pairs=64, lr=1e-4,
                   ema=0.97, warmup=0, eval_every=40, save_every=40, log_every=10, chunk=2048),
    "cifar10": dict(reward=["classifier"], watch=["judge", "jpeg"], steps=500, batch=32, pairs=128, lr=2e-5, ema=0.99,
                    warmup=10, eval_every=100, save_every=100, log_every=10, chunk=2048),
}


def parse_args(argv=None):
    """Flags, in the order: files, data and model, reward, estimator, optimiser, watching, system."""
    p = Parser("Post-train a one-step student with rewards.")
    p.add_argument("--data", default="data/imagenet", help="what distill.py was run on: shapes, cifar10 or a folder")
    p.add_argument("--ckpt", default=None, help="the student (default out/<name of the data>/student.pt)")
    p.add_argument("--out", default=None, help="folder of the run (default rl/ beside the student)")
    p.add_argument("--resume", action="store_true", help="go on from the run's last checkpoint")
    p.add_argument("--vae", default=PUBLIC["kl16"][1], help="KL-16 file, for students of latents")
    p.add_argument("--folder", default=".", help="where data.py --get put the judges' weights (its --folder)")
    p.add_argument("--ref", default=None, help="for students of latents: .npz with mu, sigma of Inception features, to "
                   "watch FID by")
    p.add_argument("--class_names", default=None, help="json list of names for the prompts (default the checkpoint's; "
                   "ImageNet's for ImageNet's folders)")
    p.add_argument("--prompt", default=TEMPLATE, help="text that CLIP, PickScore, ImageReward compare a picture with")
    p.add_argument("--reward", nargs="+", default=["pickscore"], metavar="NAME[:WEIGHT]",
                   help=f"what to raise, several are added up: {' '.join(REWARDS)}")
    p.add_argument("--watch", nargs="*", default=["clip", "imagereward"], metavar="NAME",
                   help="rewards that are only watched: the first to fall when the trained one is being hacked")
    p.add_argument("--kl", type=float, default=None, help="pull towards the student of the start, in "
                   "reward per nat and dimension; raise it when FD rises, lower it when the reward does not "
                   f"(default {KL_ELSE}, of a single {', of '.join(f'{name} {kl}' for name, kl in KL.items())})")
    p.add_argument("--kl_to", default="path", choices=["path", "picture"], help="path: to what the start would put at "
                   "each AR step after the student's own tokens; picture: to its finished picture of the same noise")
    p.add_argument("--estimator", default="reinforce", choices=["reinforce", "pathwise"],
                   help="pathwise: differentiate the reward; less noise, differentiable rewards only")
    p.add_argument("--pairs", type=int, default=64, help="antithetic pairs an image: 2 reward calls each")
    p.add_argument("--noise_std", type=float, default=0.1, help="of the policy, in units of what it "
                   "perturbs: pixels lie in [-1, 1], latents have std 1")
    p.add_argument("--perturb", default="latent", choices=["latent", "pixel"], help="what the policy's noise is put "
                   "on; v gets worse with the root of its dimensions: 4,096 against 196,608 at 256 px")
    p.add_argument("--detach", action="store_true", help="each AR step learns for its own tokens only, not for what "
                   "they do to later ones: biased, trains as well")
    p.add_argument("--ar_steps", type=int, default=None, help="K of an episode (default the student's)")
    p.add_argument("--steps", type=int, default=2000, help="updates")
    p.add_argument("--batch", type=int, default=64, help="images (episodes) an update, all ranks together")
    p.add_argument("--accumulate", type=int, default=1, help="micro-batches an update: more if memory ends")
    p.add_argument("--chunk", type=int, default=32, help="images decoded and scored at once: lower it likewise")
    p.add_argument("--recompute", action="store_true", help="recompute the transformer's blocks in backward: a third "
                   "more time, a fraction of the memory; before --accumulate when memory ends")
    p.add_argument("--compile", action="store_true", help="torch.compile the blocks of transformer and head: the first "
                   "updates take minutes, the others less time; on a CPU hardly worth it")
    p.add_argument("--lr", type=float, default=1e-5, help="learning rate")
    p.add_argument("--warmup", type=int, default=20, help="updates of linear warm-up")
    p.add_argument("--decay", type=float, default=0.5, help="share of the run, its last, over which the "
                   "learning rate falls to 0")
    p.add_argument("--clip", type=float, default=1.0, help="gradient norm limit; 0 = none")
    p.add_argument("--ema", type=float, default=0.99, help="averaging of the student a step")
    p.add_argument("--eval_every", type=int, default=200, help="updates between grids and figures")
    p.add_argument("--eval_images", type=int, default=2048, help="images a row of figures")
    p.add_argument("--max_fd_rise", type=float, default=0.2, help="share by which FD may lie above the "
                   "start's in best.pt")
    p.add_argument("--save_every", type=int, default=100, help="updates between checkpoints")
    p.add_argument("--log_every", type=int, default=5, help="updates between log lines")
    p.add_argument("--seed", type=int, default=0, help="of everything random")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    # argparse takes "-jpeg" for a flag; with a space in front it is a value, and `parse_rewards` strips it
    argv = [f" {a}" if a.startswith("-jpeg") else a for a in (argv if argv is not None else sys.argv[1:])]
    known, _ = p.parse_known_args(argv)
    name = known.data if known.data in DEFAULTS else "cifar10" if is_small(known.data) else None
    p.set_defaults(**DEFAULTS.get(name, {}))
    args = p.parse_args(argv)
    check_numbers(args, one="pairs ar_steps batch accumulate chunk eval_every eval_images save_every log_every", share="ema")
    if args.kl is None:
        names = list(parse_rewards(args.reward))
        args.kl = KL.get(names[0], KL_ELSE) if len(names) == 1 else KL_ELSE
    args.ckpt = args.ckpt or os.path.join("out", os.path.basename(os.path.normpath(args.data)), "student.pt")
    args.out = args.out or os.path.join(os.path.dirname(args.ckpt), "rl")
    return args


# ----------------------------------------------------------------------------------------------------------------------
# Rewards: f(images (N, 3, H, W) float in [0, 1], labels (N,) long) -> (N,), on the images' device. To add one of your
# own, add a line to REWARDS: a builder, called once with (args, data, class names, device), that returns such an f.


def prompt_reward(kind):
    """How well a picture fits the prompt of its class, by one of fid.py's public judges."""
    def build(args, data, names, device):
        weights, words = WEIGHTS[kind], WEIGHTS["imagereward_vocab" if kind == "imagereward" else "bpe"]
        return prompt_scorer(kind, names, args.prompt, os.path.join(args.folder, weights),
                             os.path.join(args.folder, words), device)
    return build


def classifier_reward(seed):
    """Log-probability of the class that was asked for, by the data's own classifier of this seed."""
    def build(args, data, names, device):
        if data is None:
            raise UserError("the classifier of the data set reads pixels, and this student makes latents: "
                            "use --reward clip, pickscore or imagereward")
        net = load_or_train_classifier(data, os.path.dirname(args.ckpt) or ".", seed, device)
        return lambda images, labels: F.log_softmax(net(images)[1], dim=1).gather(1, labels[:, None])[:, 0]
    return build


def jpeg_bytes(images, quality=95):
    """Size of each image as a JPEG file, in hundreds of bytes. Quality: as DDPO's (Black et al. 2023)."""
    sizes = []
    for image in (images.detach() * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy():  # (H, W, 3) each
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=quality)
        sizes.append(file.tell() / 100)
    return torch.tensor(sizes, device=images.device)


REWARDS = {
    "clip": prompt_reward("clip"),  # 100 cos(picture, prompt)
    "pickscore": prompt_reward("pickscore"),  # about 20; what people chose among pictures of one prompt
    "imagereward": prompt_reward("imagereward"),  # mean 0, variance 1; corrupts pictures when trained on: watch it
    "classifier": classifier_reward(seed=0),  # the one distill.py shows its figures by
    "judge": classifier_reward(seed=1),  # another one, to watch: what fools one network need not fool two
    "jpeg": lambda *_: lambda images, labels: -jpeg_bytes(images),
    "-jpeg": lambda *_: lambda images, labels: jpeg_bytes(images),
    "red": lambda *_: lambda images, labels: (images[:, 0] - images[:, 1:].mean(1)).mean((1, 2)),  # the toy
}


def parse_rewards(words):
    """["clip:1", "jpeg:0.1"] -> {"clip": 1.0, "jpeg": 0.1}."""
    weights = {}
    for word in words:
        name, _, weight = word.strip().partition(":")
        if name not in REWARDS:
            raise UserError(f"unknown reward {name}: there are {', '.join(REWARDS)}")
        if name in weights:
            raise UserError(f"reward {name} is named twice: once, with the sum of the weights, does the same")
        try:
            weights[name] = float(weight or 1)
        except ValueError:
            weights[name] = math.nan
        if not math.isfinite(weights[name]):
            raise UserError(f"reward {word}: the weight {weight} is no number; write {name}:0.5")
    return weights


def build_rewards(args, config, data, names, device, rank):
    """-> functions {name: f} of all rewards trained on or watched, weights {name: float} of those trained on.

    Each is tried on two pictures, so that a wrong one ends here and not after the first episode. Rank 0 alone watches.
    """
    weights, watched = parse_rewards(args.reward), parse_rewards(args.watch) if rank == 0 else {}
    functions = {name: REWARDS[name](args, data, names, device) for name in {**weights, **watched}}
    for name, f in functions.items():
        images = torch.linspace(0, 1, 2 * 3 * config.img_size**2, device=device).view(2, 3, config.img_size, -1)
        r = f(images.requires_grad_(), torch.zeros(2, dtype=torch.long, device=device))
        if not torch.is_tensor(r) or r.shape != (2,):
            raise UserError(f"reward {name} must return one number an image, shape (2,) for 2 images: "
                            f"it returned {tuple(r.shape) if torch.is_tensor(r) else type(r).__name__}")
        if not torch.isfinite(r).all():
            raise UserError(f"reward {name} is not finite: {r.tolist()} for two pictures of grey levels")
        if args.estimator == "pathwise" and name in weights and not r.requires_grad:
            raise UserError(f"reward {name} has no gradient: --estimator pathwise needs one, reinforce does not")
    return functions, weights


# ----------------------------------------------------------------------------------------------------------------------
# v, the direction in which the reward of a finished picture rises: the one thing in which the estimators differ.
# Both: score(z (N, ...), labels (N,)) -> (N,); z (B, ...) pictures, latents -> v like z, rewards (B,), agreement.


def in_chunks(score, z, labels, chunk):
    """score(z, labels) of any number of pictures, `chunk` at a time: a decoder or a judge fills the memory."""
    return torch.cat([score(*part) for part in zip(z.split(chunk), labels.split(chunk))])


def reinforce_direction(score, z, labels, keys, args):
    """From rewards alone. The policy is a Gaussian on the finished picture, a ~ N(z, s^2 I): its score function gives

        v = 1 / (2 s H) sum_h [r(z + s e_h) - r(z - s e_h)] e_h,      e_h ~ N(0, I),

    the gradient of the reward smoothed by s, unbiased. A pair is its own baseline: what both of its pictures earn says
    nothing about e and cancels. No division by the rewards' spread, which made it worse. 2H reward calls a picture.
    Third result: q, the cosine between the v of the even pairs and that of the odd ones. A free estimate: v's cosine
    with the true gradient is about sqrt(2 q / (1 + q)) (Spearman-Brown); for H << dims theory says sqrt(H / dims).
    """
    B, dims, s = len(z), z[0].numel(), args.noise_std
    together = max(1, args.chunk // (2 * B))  # pairs scored at once
    halves = torch.zeros(2, B, dims, device=z.device)
    for first in range(0, args.pairs, together):
        h = torch.arange(first, min(first + together, args.pairs), device=z.device)
        e = gaussian(keys, EXPLORE, h.expand(B, -1), dims)  # (B, h, dims)
        a = z.flatten(1)[:, None] + s * torch.cat([e, -e], dim=1)  # (B, 2h, dims)
        r = in_chunks(score, a.view(-1, *z.shape[1:]), labels.repeat_interleave(2 * len(h)), args.chunk).view(B, 2, -1)
        gain = (r[:, 0] - r[:, 1]) / (2 * s * args.pairs)  # (B, h)
        for half in (0, 1):
            halves[half] += torch.einsum("bh,bhd->bd", gain * (h % 2 == half), e)
    agreement = F.cosine_similarity(halves[0].flatten(), halves[1].flatten(), dim=0)
    return halves.sum(0).view_as(z), in_chunks(score, z, labels, args.chunk), agreement


def pathwise_direction(score, z, labels, keys, args):
    """By autograd: v = dr/dz. Exact, one reward call a picture, differentiable rewards only."""
    v, rewards = [], []
    for part, part_labels in zip(z.split(args.chunk), labels.split(args.chunk)):
        with torch.enable_grad():
            part = part.detach().requires_grad_()
            r = score(part, part_labels)
            v.append(torch.autograd.grad(r.sum(), part)[0])
        rewards.append(r.detach())
    return torch.cat(v), torch.cat(rewards), torch.ones((), device=z.device)


def pull_back(decode, x, v, chunk):
    """A direction v of pictures decode(x) -> the direction of x that it means, by the chain rule."""
    pulled = []
    for part, part_v in zip(x.split(chunk), v.split(chunk)):
        with torch.enable_grad():
            part = part.detach().requires_grad_()
            pulled.append(torch.autograd.grad(decode(part), part, part_v)[0])
    return torch.cat(pulled)


# ----------------------------------------------------------------------------------------------------------------------
# The chain of AR steps, backwards


@torch.no_grad()
def retrace(model, x, labels, keys, ar_steps):
    """What `model` would have put at each AR step of another's pictures x (B, c, h, w), given the tokens put before it
    and the same noise: -> like x. A finished picture holds the context of every step, because no token is ever changed.
    """
    C, tokens = model.config.token_dim, model.patchify(x)  # (B, L, C)
    found = torch.zeros_like(tokens)
    for visible, predict in reveal_plan(token_orders(keys, tokens.shape[1]), ar_steps):
        c = model.context(tokens, visible, labels, predict).flatten(0, 1)  # (N, D); masked tokens are never read
        x0 = model.one_step(gaussian(keys, START, predict, C).flatten(0, 1), c)  # (N, C)
        found = put(found, predict, x0.view(len(x), -1, C))
    return model.unpatchify(found)


def backward_chain(model, x, slope, labels, keys, ar_steps, detach=False, before_last=lambda: None):
    """Backpropagate slope = dL/dx (B, c, h, w) of finished pictures x = generate(labels, ar_steps, seeds) into .grad.

    As in `retrace` the picture is all that had to be kept of the rollout: the steps are run again, with a graph, last
    step first. When a step's turn comes, `slope` at its tokens is complete: the loss's own part, and what they did to
    all later tokens. This is exact backpropagation through the chain, in the memory of one step whatever K is. `detach`
    leaves the second part out. before_last is called before the last backward: gradients.begin.
    """
    L, C = model.config.seq_len, model.config.token_dim
    tokens, slope = model.patchify(x), model.patchify(slope)  # (B, L, C)
    plan = list(reveal_plan(token_orders(keys, L), ar_steps))
    for k, (visible, predict) in reversed(list(enumerate(plan))):
        context = tokens.detach().requires_grad_(not detach)
        c = model.context(context, visible, labels, predict).flatten(0, 1)  # (N, D)
        x0 = model.one_step(gaussian(keys, START, predict, C).flatten(0, 1), c)  # (N, C), the tokens of this step
        if k == 0:
            before_last()
        x0.backward(take(slope, predict).flatten(0, 1))
        if not detach:
            slope = slope + context.grad  # zero but at the visible tokens, which earlier steps wrote


# ----------------------------------------------------------------------------------------------------------------------
# Watching


class Watch:
    """The judge of a run: draws pictures of a network on all ranks, gives its row of the table, writes the grid."""

    def __init__(self, args, config, data, functions, weights, vae, statistics, device, rank, world):
        self.args, self.vae, self.device, self.rank, self.world = args, vae, device, rank, world
        self.functions, self.weights, self.classifier, self.inception = functions, weights, None, None
        if data and rank == 0:  # seed 1: FD and accuracy come from a network that no reward has seen
            self.classifier = load_or_train_classifier(data, os.path.dirname(args.ckpt) or ".", 1, device)
            self.reference = feature_statistics(self.classifier, data)
        elif statistics and rank == 0:
            self.inception = load_inception(os.path.join(args.folder, WEIGHTS["inception"])).to(device)
            self.reference = statistics
        self.labels = torch.arange(-(-args.eval_images // world) * world) % config.num_classes  # ranks: equal shares
        self.shown = torch.arange(-(-min(2 * config.num_classes, 20) // world) * world) % config.num_classes
        self.rows, self.grid = {}, {}  # of the table: name -> figures; of the grid: name -> images

    def pictures(self, model, labels, seed):
        return draw_together(model, labels, self.rank, self.world, seed=seed, vae=self.vae, ar_steps=self.args.ar_steps)

    @torch.no_grad()
    def look(self, name, model, judged=True, **more):
        """Draw with `model` a row of the grid and a row of the table: mean of each reward, their weighted sum "reward",
        "diversity" and, of pixels, "fd" and "accuracy". All rows share classes, orders and noise, so that a picture
        can be compared with the one above. `more` joins the row. Cost: eval_images pictures. -> the row, on rank 0."""
        self.grid[name] = self.pictures(model, self.shown, self.args.seed)
        if judged:
            images = self.pictures(model, self.labels, self.args.seed + 1)
            if self.rank == 0:
                self.rows[name] = {**self.figures(images), **more}
        return self.rows.get(name, {})

    def is_best(self, row):
        """The most reward yet, at a distance to the data not too far above the start's: what costs more was hacked.
        Where no distance is measured, nothing is best."""
        distance = "fd" if "fd" in row else "fid"
        if distance not in row:  # or not rank 0
            return False
        before, best = self.rows["before"], self.rows.get("best", self.rows["before"])
        near = row[distance] <= (1 + self.args.max_fd_rise) * before[distance]
        return near and row["reward"] > best["reward"]

    def figures(self, images):
        """The row of images (N, 3, H, W) uint8 of classes self.labels, on rank 0."""
        def mean(f):  # of what was saved, 8 bits a channel
            return in_chunks(lambda part, labels: f(part.to(self.device).float() / 255, labels), images,
                             self.labels.to(self.device), self.args.chunk).mean().item()

        row = {name: mean(f) for name, f in self.functions.items()}
        row = {"reward": sum(w * row[name] for name, w in self.weights.items()), **row,
               "diversity": diversity(images, self.labels)}
        if self.classifier:
            row.update(judge(self.classifier, images, self.labels, self.reference))
        if self.inception:
            pool = torch.cat([self.inception(part.to(self.device))[0].cpu() for part in images.split(self.args.chunk)])
            row["fid"] = frechet_distance(*mean_and_covariance(pool), *self.reference)
        return row

    def write(self, grid_name):
        """The grid drawn so far, results.json, and the table on the terminal."""
        if self.rank == 0:
            save_grid(list(self.grid.items()), os.path.join(self.args.out, grid_name))
            write_json(os.path.join(self.args.out, "results.json"), self.rows)
            columns = list(self.rows["before"])
            tqdm.write(" " * 7 + "".join(f"{name[:11]:>12s}" for name in columns))
            for name, row in self.rows.items():
                tqdm.write(f"{name:7s}" + "".join(f"{row[column]:12.4g}" for column in columns))


def diversity(images, labels):
    """Standard deviation of a pixel among pictures of one class, in units of [-1, 1]: images uint8 (N, 3, H, W).
    Falls when a class collapses to one picture."""
    squares, freedom = 0.0, 0
    for label in labels.unique():
        x = images[labels == label].double() / 127.5
        squares, freedom = squares + (x - x.mean(0)).square().mean((1, 2, 3)).sum().item(), freedom + len(x) - 1
    return (squares / max(1, freedom)) ** 0.5


class Stopwatch:
    """Seconds spent in the parts of an update. On CUDA work is only queued, so each lap waits for it: an update is a
    whole chain of AR steps, and three waits in it cost nothing that can be measured."""

    def __init__(self, device, seconds):
        self.device, self.seconds, self.last = device, seconds, time.time()

    def lap(self, part):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.time()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self.last
        self.last = now


# ----------------------------------------------------------------------------------------------------------------------
# The loop


def write_product(args, model, name, class_names, step, rank):
    """student.pt or best.pt: what sample.py and fid.py read. Weights and sizes; no optimiser."""
    if rank == 0:
        save_checkpoint({"config": asdict(model.config), "stage": "rl", "ema": model.state_dict(), "step": step,
                         "args": vars(args), "class_names": class_names}, os.path.join(args.out, f"{name}.pt"))


def episodes(config, args, step, rank, world):
    """Classes and noise of this rank's share of an update: labels (B,), seeds (B, 2), B = batch / world.

    Classes come in shuffled rounds of all of them, so each is drawn equally often: a reward that is easier to earn with
    some classes cannot shift the mixture. All of it depends on (seed, step) and the place in the global batch alone.
    """
    labels, _ = train_indices(config.num_classes, args.batch, step, args.seed + 2, rank, world)
    place = step * args.batch + rank * len(labels) + torch.arange(len(labels))
    return torch.from_numpy(labels), torch.stack([torch.full_like(place, args.seed + 2), place], dim=1)


def train(args, student, reference, decode, score, watch, class_names, device, rank, world, resumed):
    """Post-train `student` (a copy of the frozen `reference`); write student.pt (the last), best.pt and results.json.

    An update costs, an image, the K steps of the chain three times over (the student's, the reference's, the student's
    again with its backward) and 2 * pairs + 1 decodings and reward calls (pathwise: one, with its backward).
    """
    dims, S = reference.config.latent_size**2 * reference.config.vae_channels, args.accumulate
    calls = args.batch * (2 * args.pairs + 1 if args.estimator == "reinforce" else 1)  # of the reward, an update
    if rank == 0:
        total = sum(p.numel() for p in student.parameters())
        tqdm.write(f"student: {total / 1e6:.1f} M parameters, {reference.config.seq_len} tokens; an update: "
                   f"{args.batch} episodes of {args.ar_steps} AR steps on {world} process(es), {calls:,} reward calls")
    student.requires_grad_(True)  # eval mode, all: the noise of a picture must be the policy's alone
    ema = copy.deepcopy(reference)
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    start, seconds = 0, {}
    if resumed:
        start, seconds, watch.rows = (resumed[key] for key in ("step", "seconds", "rows"))
        restore(resumed, args, model=student, ema=ema, optimizer=optimizer)
    watch.look("before", reference, judged=not resumed)
    if not resumed:
        watch.write("grid_000000.png")
        if rank == 0 and os.path.exists(os.path.join(args.out, "best.pt")):
            os.remove(os.path.join(args.out, "best.pt"))  # of a run that was killed before its first checkpoint
    student.checkpoint_blocks = args.recompute
    if device.type == "cuda":
        bf16_weights(reference)
    if args.compile:
        compile_blocks(student, reference)
    gradients = Gradients(student)
    direction = {"reinforce": reinforce_direction, "pathwise": pathwise_direction}[args.estimator]
    # what the direction is searched for in: the latents, scored through the decoder, or the decoded pictures
    perturbed = score if args.perturb == "pixel" else lambda z, labels: score(decode(z), labels)
    sums, since, bad = torch.zeros(5, device=device), start, torch.tensor(NEVER, device=device)
    clock, stop = Stopwatch(device, seconds), on_sigterm()
    bar = tqdm(range(start, args.steps), initial=start, total=args.steps, desc=args.estimator, unit="step",
               disable=rank > 0 or None, mininterval=1)
    for step in bar:
        set_lr(optimizer, args.lr, step, args.steps, args.warmup, args.decay)

        # ---- gradient of the student
        parts = [z.to(device).chunk(S) for z in episodes(reference.config, args, step, rank, world)]
        gradients.zero()
        for i, (labels, seeds) in enumerate(zip(*parts)):
            keys = image_keys(seeds, device)
            x = student.generate(labels, args.ar_steps, seeds=seeds)  # (B, c, h, w), no graph
            x_ref = (retrace(reference, x, labels, keys, args.ar_steps) if args.kl_to == "path" else
                     reference.generate(labels, args.ar_steps, seeds=seeds))
            clock.lap("chain_s")

            with torch.no_grad():
                z = torch.cat([decode(part) for part in x.split(args.chunk)]) if args.perturb == "pixel" else x
                v, r, agreement = direction(perturbed, z, labels, keys, args)  # the one line that differs
            if args.perturb == "pixel":
                v = pull_back(decode, x, v, args.chunk)
            clock.lap("reward_s")

            # L = -mean <v, x> + kl * |x - x_ref|^2 / (2 s^2 dims), v and x_ref constants: push its slope at x back
            kl = (x - x_ref).square().mean() / (2 * S_KL**2)
            slope = (args.kl / (S_KL**2 * dims) * (x - x_ref) - v) / (len(x) * len(parts[0]))
            last_part = i == len(parts[0]) - 1
            backward_chain(student, x, slope, labels, keys, args.ar_steps, args.detach,
                           gradients.begin if last_part else lambda: None)
            sums[:4] += torch.stack([r.mean(), r.std(correction=0), kl, agreement]) / len(parts[0])
            clock.lap("update_s")

        # ---- update
        norm = gradients.finish(args.clip)
        optimizer.step()
        update_ema(ema, student, args.ema)
        bad = torch.minimum(bad, torch.where(torch.isfinite(norm), NEVER, step))
        sums[4] += norm
        clock.lap("update_s")

        # ---- log, evaluate, save
        last, told_to_stop = step + 1 == args.steps, False
        if (step + 1) % args.log_every == 0 or last:
            told_to_stop = any_rank(stop.is_set(), device, world)
            stop_if_bad(bad, args)
            reward, std, kl, agreement, norm = average(sums, world) / (step + 1 - since)
            log_line(args, rank, bar, stage="rl", step=step + 1, reward=reward, reward_std=std, kl=kl,
                     agreement=agreement, grad_norm=norm, reward_calls=calls * (step + 1), **peak_memory(device),
                     **clock.seconds)
            since = step + 1
            sums.zero_()
        if (step + 1) % args.eval_every == 0 or last:
            stop_if_bad(bad, args)
            row = watch.look("after", ema, step=step + 1, seconds=sum(clock.seconds.values()),
                             reward_calls=calls * (step + 1))
            if row:
                # not "reward": that is of the episodes trained on, this of the averaged weights' pictures
                log_line(args, rank, bar, stage="rl", eval_reward=row["reward"],
                         **{name: value for name, value in row.items() if name != "reward"})
            if watch.is_best(row):
                watch.rows["best"] = row
                write_product(args, ema, "best", class_names, step + 1, rank)
            watch.write(f"grid_{step + 1:06d}.png")
        if (step + 1) % args.save_every == 0 or last or told_to_stop:
            stop_if_bad(bad, args)
            write_product(args, ema, "student", class_names, step + 1, rank)
            if rank == 0:
                save_checkpoint({"config": asdict(ema.config), "stage": "rl", "step": step + 1, "args": vars(args),
                                 "model": student.state_dict(), "ema": ema.state_dict(),
                                 "optimizer": optimizer.state_dict(),
                                 "rows": watch.rows, "seconds": clock.seconds}, os.path.join(args.out, "resume.pt"))
        if told_to_stop:
            leave(args, step + 1)
        clock.last = time.time()  # watching and saving are no part of an update


def open_student(args, device):
    """--ckpt -> (the frozen student, class names); flags that were left out take the student's values."""
    if not os.path.isfile(args.ckpt):
        raise UserError(f"no student at {args.ckpt}: run  python distill.py --data {args.data}  first, or give --ckpt")
    file = read_checkpoint(args.ckpt)
    if file.get("stage") not in ("student", "rl"):  # the public files have no stage: they are teachers
        raise UserError(f"{args.ckpt} is a teacher's checkpoint, and an episode of 100 steps a token is out of reach: "
                        "distill it first (distill.py) and give its student.pt")
    student = load_mar(args.ckpt).to(device)
    args.ar_steps = args.ar_steps or file["args"]["ar_steps"]
    mask_counts(student.config.seq_len, args.ar_steps)  # complains about a K above the number of tokens
    names, wanted = file["class_names"], {**parse_rewards(args.reward), **parse_rewards(args.watch)}
    if args.class_names or {"clip", "pickscore", "imagereward"} & wanted.keys():
        names = read_class_names(args.class_names, names)  # words, which those of folders need not be
    return student, names


def main(argv=None):
    """Check everything that can be checked, open the student and the rewards, train."""
    args = parse_args(argv)
    device, rank, world = setup(args.device)
    reference, names = open_student(args, device)
    config, data, vae = reference.config, None, None
    resumed = check_folder(args, world, ["rl"], ["batch"], ["reward", "watch"])
    if config.pixels and args.ref:
        raise UserError("--ref is for students of latents; pixels are judged by a classifier of the data: leave it out")
    statistics = statistics_in(args.ref, read_npz(args.ref)) if args.ref else None
    if rank == 0 and not (config.pixels or args.ref):
        tqdm.write("FID is watched with --ref only: without it there is a student.pt, and no best.pt")
    if config.pixels:
        data = open_data(args.data, img_size=config.img_size)
        if data.num_classes != config.num_classes:
            raise UserError(f"--data {args.data} has {data.num_classes} classes, the student {config.num_classes}: "
                            "give --data as distill.py had it")
    else:
        vae = load_vae(need_file(args.vae, "kl16")).to(device)
    if rank > 0:
        dist.barrier()  # rank 0 first: it trains the classifiers that are not there yet
    functions, weights = build_rewards(args, config, data, names, device, rank)
    watch = Watch(args, config, data, functions, weights, vae, statistics, device, rank, world)
    if rank == 0 and world > 1:
        dist.barrier()
    start_folder(args, rank, world, resumed)

    def decode(x):  # latents -> pictures, about [-1, 1]; differentiable
        return x if vae is None else vae.decode(x / LATENT_SCALE)

    def score(pictures, labels):  # the clamp: or a reward is earned outside the range that a screen can show
        images = ((pictures + 1) / 2).clamp(0, 1)
        return sum(weight * functions[name](images, labels) for name, weight in weights.items())

    train(args, copy.deepcopy(reference), reference, decode, score, watch, names, device, rank, world, resumed)


if __name__ == "__main__":
    run_main(main)
