"""Post-train the one-step student with a reward: any function of (finished picture, class), differentiable or not.

Must exist: a student from distill.py; for rewards by CLIP, PickScore, ImageReward their weights (data.py --get).

    python rl.py --data shapes --reward classifier                   # CPU, minutes; distill.py --data shapes first
    python rl.py --data shapes --reward jpeg --out out/shapes/jpeg   # smaller files: no gradient, no network
    python rl.py --data shapes --reward classifier --estimator pathwise        # the reward's own gradient
    python rl.py --reward clip --ckpt out/imagenet/student.pt        # one GPU
    torchrun --nproc_per_node=8 rl.py                                # ImageNet 256, PickScore, as the paper
    torchrun --nproc_per_node=8 rl.py --resume                       # goes on from the last checkpoint, bit for bit

The paper (MARVAL, arXiv 2511.15190) makes a whole picture in K fast AR steps, scores it, and follows the gradient of
the score. Single steps are never scored: half a picture has no CLIP score, and what a token is worth is decided by the
tokens that follow. Here
1. the default needs no gradient of the reward: REINFORCE, with a Gaussian policy on the finished picture (one action an
   episode); `reinforce_direction` beside `pathwise_direction`, the paper's. All else is shared;
2. the textbook form, a Gaussian on each revealed token at each AR step, is left out: it hardly moved;
3. the KL to the start is taken step by step along the student's own path (`retrace`): two chains of the same noise part
   for good at the first token that differs, and pulling finished pictures together then only washes them out;
4. learning rate, batch, KL weight, which the paper does not state, are ours (assets/measurements.md).
"""
import copy
import io
import math
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image

from data import (DTYPES, LATENT_SCALE, PUBLIC, Parser, check_numbers, load_vae, open_data, read_class_names,
                  run_main, setup)
from distill import Gradients, Run, defaults_of, episodes, prepare, set_lr, update_ema
from fid import (TEMPLATE, WEIGHTS, Watch, classifier_beside, frechet_distance, judge, load_classifier, load_inception,
                 load_or_train_classifier, mean_and_covariance, need_file, prompt_scorer, read_npz, statistics_in)
from model import (START, TRAIN, UserError, gaussian, image_keys, load_mar, mask_counts, put, read_checkpoint,
                   reveal_plan, take, token_orders, write_json)

EXPLORE = TRAIN + 1024  # purpose of the policy's noise (model.py: noise is a function of picture, purpose, place)
S_KL = 0.1  # s of the KL, in the units of x: KL(N(x, s^2 I) || N(x_ref, s^2 I)) = |x - x_ref|^2 / (2 s^2) nats
# --kl of a single reward; of others, and of sums, KL_ELSE. Every pixel has to move for red, so its pull is weak, but at
# 0.01 all pictures became red squares.
KL = {"classifier": 0.1, "red": 0.05}
KL_ELSE = 0.2

# What the student's size or `--data` changes; an explicit flag wins. How found: assets/measurements.md, "Tried".
DEFAULTS = {
    "shapes": dict(reward=["classifier"], watch=["judge", "jpeg", "red"], steps=120, batch=16, pairs=64, lr=1e-4,
                   ema=0.97, warmup=0, eval_every=40, save_every=40, log_every=10, chunk=2048),
    "cifar10": dict(reward=["classifier"], watch=["judge", "jpeg"], steps=500, batch=32, pairs=128, lr=2e-5, ema=0.99,
                    warmup=10, eval_every=100, save_every=100, log_every=10, chunk=2048),
    "cifar10_cpu": dict(reward=["classifier"], watch=["judge", "jpeg"], steps=60, batch=16, pairs=64, lr=2e-5, ema=0.97,
                        warmup=10, kl=0.2, eval_every=60, eval_images=500, save_every=30, log_every=10, chunk=2048),
}


def parse_args(argv=None):
    """The flags, with the defaults of the student's size or of --data, and of the reward."""
    p = Parser("Post-train a one-step student with rewards.")
    flag = p.add_argument
    # files and data
    flag("--data", default=None, help="what distill.py was run on: shapes, cifar10, a folder; left out, the "
         "classifiers are those beside --ckpt")
    flag("--ckpt", default=None, help="the student (default out/<name of the data, or imagenet>/student.pt)")
    flag("--out", default=None, help="folder of the run (default rl/ beside the student)")
    flag("--resume", action="store_true", help="go on from the run's last checkpoint")
    flag("--vae", default=PUBLIC["kl16"][1], help="KL-16 file, for students of latents")
    flag("--folder", default=".", help="where data.py --get put the judges' weights (its --folder)")
    flag("--ref", default=None, help="students of latents: .npz with mu, sigma of Inception features, to watch FID by")
    flag("--class_names", default=None, help="names for the prompts (default the checkpoint's, or ImageNet's)")
    flag("--prompt", default=TEMPLATE, help="text that CLIP, PickScore, ImageReward compare a picture with")
    # the reward
    flag("--reward", nargs="+", default=["pickscore"], metavar="NAME[:WEIGHT]",
         help=f"what to raise, several are added up, jpeg:-1 lowers: {' '.join(REWARDS)}")
    flag("--watch", nargs="*", default=["clip", "imagereward"], metavar="NAME",
         help="rewards that are only watched: the first to fall when the trained one is being hacked")
    flag("--kl", type=float, default=None, help="pull towards the student of the start, in reward per nat and "
         "dimension; raise it when FD rises (jpeg on CIFAR-10: 5), lower it when the reward does not "
         f"(default {KL_ELSE} and at the size cifar10_cpu; of a single "
         f"{', of '.join(f'{name} {kl}' for name, kl in KL.items())})")
    flag("--max_fd_rise", type=float, default=0.2, help="share by which FD may lie above the start's in best.pt")
    # its gradient
    flag("--estimator", default="reinforce", choices=["reinforce", "pathwise"],
         help="pathwise: differentiate the reward; less noise, differentiable rewards only")
    flag("--pairs", type=int, default=64, help="antithetic pairs an image: 2 reward calls each")
    flag("--noise_std", type=float, default=0.1, help="of the policy; pixels lie in [-1, 1], latents have std 1")
    flag("--ar_steps", type=int, default=None, help="K of an episode (default the student's)")
    flag("--steps", type=int, default=2000, help="updates")
    flag("--batch", type=int, default=64, help="images (episodes) an update, all ranks together")
    # optimiser
    flag("--lr", type=float, default=1e-5, help="learning rate")
    flag("--warmup", type=int, default=20, help="updates of linear warm-up")
    flag("--decay", type=float, default=0.5, help="last share of the run, in which the learning rate falls to 0")
    flag("--clip", type=float, default=1.0, help="gradient norm limit; 0 = none")
    flag("--ema", type=float, default=0.99, help="averaging of the student's weights a step")
    # memory and speed
    flag("--accumulate", type=int, default=1, help="micro-batches an update: more if memory ends")
    flag("--chunk", type=int, default=32, help="images decoded and scored at once: lower it likewise")
    flag("--recompute", action="store_true", help="compute the blocks again in backward: less memory, 1/3 more time")
    # watching
    flag("--eval_every", type=int, default=200, help="updates between grids and figures")
    flag("--eval_images", type=int, default=2048, help="images a row of figures")
    flag("--save_every", type=int, default=100, help="updates between checkpoints")
    flag("--log_every", type=int, default=5, help="updates between log lines (a host sync each)")
    # system
    flag("--seed", type=int, default=0, help="of everything random")
    flag("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    flag("--dtype", default="auto", choices=DTYPES, help="of the transformer; auto: bfloat16 where it is fast")
    known, _ = p.parse_known_args(argv)  # a first reading: it sets the defaults of the second
    p.set_defaults(**recipe(known))
    args = p.parse_args(argv)
    check_numbers(args, one="pairs ar_steps batch accumulate chunk eval_every eval_images save_every log_every",
                  share="ema")
    if args.noise_std == 0:
        raise UserError("--noise_std 0: a policy without noise tries nothing; 0.1 is a good start")
    if args.kl is None:
        names = list(parse_rewards(args.reward))
        args.kl = KL.get(names[0], KL_ELSE) if len(names) == 1 else KL_ELSE
    folder, name = os.path.split(args.ckpt)
    if name.endswith("_student.pt"):  # assets/cifar10_student.pt -> out/cifar10/rl
        folder = os.path.join("out", name.removesuffix("_student.pt"))
    args.out = args.out or os.path.join(folder, "rl")
    return args


def recipe(known):
    """The defaults: those of the size of the student, else of the data."""
    ckpt = known.ckpt or os.path.join("out", os.path.basename(os.path.normpath(known.data or "imagenet")), "student.pt")
    file = read_checkpoint(ckpt) if os.path.isfile(ckpt) else {}  # not there: open_student says so
    found = {"ckpt": ckpt, **defaults_of(DEFAULTS, file, known.data)}
    if not known.data and not classifier_beside(ckpt, 1):  # the judge cannot be had
        found["watch"] = [name for name in found.get("watch", ["clip", "imagereward"]) if name != "judge"]
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Rewards: f(images (N, 3, H, W) float in [0, 1], labels (N,) long) -> (N,), on the images' device. To add one of your
# own, add a line to REWARDS: a builder, called once with (args, data, class names, device), that returns such an f.
# `data` is None where --data is not given or the student makes latents.


def prompt_reward(kind):
    """How well a picture fits the prompt of its class, by one of fid.py's public judges."""
    def build(args, data, names, device):
        return prompt_scorer(kind, names, args.prompt, args.folder, device)
    return build


def classifier_of(args, data, seed, device):
    """The data's classifier of this seed: trained where there is none yet and `data` is given; None if it is not, and
    for latents, of which it knows nothing."""
    if data:
        return load_or_train_classifier(data, os.path.dirname(args.ckpt) or ".", seed, device)
    path = args.pixels and classifier_beside(args.ckpt, seed)
    return load_classifier(path, device) if path else None


def classifier_reward(seed):
    """Log-probability of the class that was asked for, by the data's own classifier of this seed."""
    def build(args, data, names, device):
        net = classifier_of(args, data, seed, device)
        if net is None:
            raise UserError(f"the rewards classifier and judge want classifier_{seed}.pt beside {args.ckpt}, or the "
                            "pixels to train it on: give --data, or use --reward clip, pickscore or imagereward")
        # net: -> features (N, F), logits (N, classes)
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
    "jpeg": lambda *_: lambda images, labels: -jpeg_bytes(images),  # nothing to build: the f itself
    "red": lambda *_: lambda images, labels: (images[:, 0] - images[:, 1:].mean(1)).mean((1, 2)),  # the toy
}


def parse_rewards(words):
    """["clip:1", "jpeg:-0.1"] -> {"clip": 1.0, "jpeg": -0.1}."""
    weights = {}
    for word in words:
        name, _, weight = word.partition(":")
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
# Both: score(x (N, c, h, w), labels (N,)) -> (N,); x (B, c, h, w) -> v like x, rewards (B,), agreement.


def in_chunks(score, x, labels, chunk):
    """score(x, labels) of any number of pictures, `chunk` at a time: a decoder or a judge fills the memory."""
    return torch.cat([score(*part) for part in zip(x.split(chunk), labels.split(chunk))])


@torch.no_grad()
def reinforce_direction(score, x, labels, keys, args):
    """From rewards alone. The policy is a Gaussian on the finished picture, a = x + s e ~ N(x, s^2 I). Its score
    function, d log p(a) / dx = e / s, and H antithetic pairs give

        v = 1 / (2 s H) sum_h [r(x + s e_h) - r(x - s e_h)] e_h,      e_h ~ N(0, I),

    the gradient of the reward smoothed by s, unbiased. A pair is its own baseline: what both of its pictures earn says
    nothing about e and cancels. No division by the rewards' spread (GRPO's), which made it worse. 2H reward calls a
    picture. v gets worse with the root of the dimensions, so latents are perturbed where there are some: 4,096 numbers
    at 256 px, and not 196,608 pixels. Third result: q, the cosine between the v of the even pairs and that of the odd
    ones. A free estimate: v's cosine with the true gradient is about sqrt(2 q / (1 + q)) (Spearman-Brown).
    """
    B, dims, s = len(x), x[0].numel(), args.noise_std
    together = max(1, args.chunk // (2 * B))  # pairs scored at once
    halves = torch.zeros(2, B, dims, device=x.device)
    for first in range(0, args.pairs, together):
        h = torch.arange(first, min(first + together, args.pairs), device=x.device)
        e = gaussian(keys, EXPLORE, h.expand(B, -1), dims)  # (B, h, dims)
        a = x.flatten(1)[:, None] + s * torch.cat([e, -e], dim=1)  # (B, 2h, dims)
        r = in_chunks(score, a.view(-1, *x.shape[1:]), labels.repeat_interleave(2 * len(h)), args.chunk).view(B, 2, -1)
        weight = (r[:, 0] - r[:, 1]) / (2 * s * args.pairs)  # (B, h), of each e in v
        for half in (0, 1):
            halves[half] += torch.einsum("bh,bhd->bd", weight * (h % 2 == half), e)
    agreement = F.cosine_similarity(halves[0].flatten(), halves[1].flatten(), dim=0)
    return halves.sum(0).view_as(x), in_chunks(score, x, labels, args.chunk), agreement


def pathwise_direction(score, x, labels, keys, args):
    """By autograd: v = dr/dx. Exact, so agreement is 1; one reward call a picture, differentiable rewards only."""
    v, rewards = [], []
    for part, part_labels in zip(x.split(args.chunk), labels.split(args.chunk)):
        part = part.detach().requires_grad_()
        r = score(part, part_labels)
        v.append(torch.autograd.grad(r.sum(), part)[0])
        rewards.append(r.detach())
    return torch.cat(v), torch.cat(rewards), torch.ones((), device=x.device)


# ----------------------------------------------------------------------------------------------------------------------
# The chain of AR steps, backwards


@torch.no_grad()
def retrace(model, x, labels, keys, ar_steps):
    """What `model` would have put at each AR step of another's pictures x (B, c, h, w), given the tokens put before it
    and the same noise: -> like x. Teacher forcing, along the other's path. A finished picture holds the context of
    every step, because no token is ever changed.
    """
    C, tokens = model.config.token_dim, model.patchify(x)  # (B, L, C)
    found = torch.zeros_like(tokens)
    for visible, predict in reveal_plan(token_orders(keys, tokens.shape[1]), ar_steps):
        c = model.transformer(tokens, visible, labels, predict)  # (B, P, D); masked tokens are never read
        found = put(found, predict, model.one_step(gaussian(keys, START, predict, C), c))
    return model.unpatchify(found)


def backward_chain(model, x, slope, labels, keys, ar_steps, before_last=lambda: None):
    """Backpropagate slope = dL/dx (B, c, h, w) of finished pictures x = generate(labels, ar_steps, seeds) into .grad.

    As in `retrace` the picture is all that had to be kept of the rollout: the steps are run again, with a graph, last
    step first. When a step's turn comes, `slope` at its tokens is complete: the loss's own part, and what they did to
    all later tokens. This is exact backpropagation through the chain, in the memory of one step whatever K is.
    before_last is called before the last backward: gradients.begin, by which ranks exchange gradients beside it.
    """
    L, C = model.config.seq_len, model.config.token_dim
    tokens, slope = model.patchify(x), model.patchify(slope)  # (B, L, C)
    plan = list(reveal_plan(token_orders(keys, L), ar_steps))
    for k, (visible, predict) in reversed(list(enumerate(plan))):
        context = tokens.detach().requires_grad_()
        c = model.transformer(context, visible, labels, predict)  # (B, P, D)
        x0 = model.one_step(gaussian(keys, START, predict, C), c)  # (B, P, C), the tokens of this step
        if k == 0:
            before_last()
        x0.backward(take(slope, predict))
        slope = slope + context.grad  # zero but at the visible tokens, which earlier steps wrote


# ----------------------------------------------------------------------------------------------------------------------
# The loop


def train(args, reference, score, run, watch, class_names):
    """Post-train a copy of the frozen `reference`; write student.pt (the last), best.pt and results.json.

    An update costs, an image, the K steps of the chain three times over (the student's, the reference's, the student's
    again with its backward) and 2 * pairs + 1 decodings and reward calls (pathwise: one, with its backward).
    """
    # all in eval mode: dropout would be noise that the policy knows nothing of, and no chain could be run again
    student, ema = copy.deepcopy(reference).requires_grad_(True), copy.deepcopy(reference)
    # no weight decay, which pulls towards 0: the KL pulls towards the start
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    state = dict(model=student, ema=ema, optimizer=optimizer)
    run.restore("rl", **state)
    row = watch.look("before", reference)  # which all later ones are compared with
    if run.rank == 0 and not {"fd", "fid"} & row.keys():
        print("no distance to the data is watched (pixels: give --data; latents: --ref), so there will be no best.pt",
              flush=True)
    prepare(args, student, frozen=[reference])
    gradients = Gradients(student)
    direction = {"reinforce": reinforce_direction, "pathwise": pathwise_direction}[args.estimator]
    dims = reference.config.latent_size**2 * reference.config.vae_channels
    sums = torch.zeros(5, device=run.device)  # for the log: over the updates since its last line

    for step in run.steps("rl", args.steps, args.batch):
        # look at the student, before the update: so a look that was broken off is made when the run goes on
        if step > 0 and step % args.eval_every == 0:
            evaluate(args, run, watch, ema, step, class_names)

        set_lr(optimizer, args.lr, step, args.steps, args.warmup, args.decay)

        # whole pictures, of all classes equally often: a reward easier to earn with some cannot shift the mixture
        batch = episodes(reference.config, args.batch, args.seed + 2, step, run)

        # the gradient; `accumulate` parts of the batch, one after the other, where memory is short
        gradients.zero()
        parts = list(zip(*(z.chunk(args.accumulate) for z in batch)))
        for i, (labels, seeds) in enumerate(parts):
            # 1. an episode: K AR steps of the student, no graph; then what the start would have put at each of them
            keys = image_keys(seeds, run.device)
            x = student.generate(labels, args.ar_steps, seeds=seeds)  # (B, c, h, w)
            x_ref = retrace(reference, x, labels, keys, args.ar_steps)

            # 2. the direction in which the reward rises: the one line in which the estimators differ
            v, r, agreement = direction(score, x, labels, keys, args)

            # 3. L = mean(-<v, x> + kl * |x - x_ref|^2 / (2 s^2 dims)), v and x_ref constants, the mean over the images
            #    of all parts. Down L's slope the reward rises, at the price of the KL. The slope at x ...
            kl = (x - x_ref).square().mean() / (2 * S_KL**2)  # nats a dimension
            slope = (args.kl / (S_KL**2 * dims) * (x - x_ref) - v) / (len(x) * args.accumulate)
            # 4. ... is pushed back through the chain, last AR step first, into .grad
            last_part = i == len(parts) - 1
            backward_chain(student, x, slope, labels, keys, args.ar_steps,
                           gradients.begin if last_part else lambda: None)
            sums[:4] += torch.stack([r.mean(), r.std(correction=0), kl, agreement]) / args.accumulate

        # the update: ranks' gradients are averaged and clipped; the average of the student's weights is the product
        norm = gradients.finish(args.clip)
        optimizer.step()
        update_ema(ema, student, args.ema)
        sums[4] += norm
        run.check(norm)  # a reward that is not finite makes such a norm: the next log line stops the run

        # log and save: only here does the loop wait for the device
        if run.due(args.log_every):
            run.log(sums, "reward", "reward_std", "kl", "agreement", "grad_norm")
        if run.due(args.save_every, args.eval_every):  # before a look too, which may be broken off
            run.save("student", ema, class_names, **state)
    evaluate(args, run, watch, ema, run.step, class_names)


def evaluate(args, run, watch, ema, step, class_names):
    """The row "after" of the averaged student; best.pt where it is the best yet."""
    row = watch.look("after", ema, step)
    if is_best(row, watch.rows, args.max_fd_rise):
        watch.rows["best"] = row
        run.write("best", ema, class_names)
        write_json(run.path("results.json"), watch.rows)
        print(f"best.pt is now that of step {step}", flush=True)


def is_best(row, rows, max_rise):
    """The most reward yet, at a distance to the data not too far above the start's: what costs more was hacked. Where
    no distance is measured (or not on this rank), nothing is best."""
    distance = "fd" if "fd" in row else "fid"
    if distance not in row:
        return False
    before, best = rows["before"], rows.get("best", rows["before"])
    if {**best["made_by"], "step": None} != before["made_by"]:  # made before a --resume with other --seed, ...
        best = before
    return row[distance] <= (1 + max_rise) * before[distance] and row["reward"] > best["reward"]


# ----------------------------------------------------------------------------------------------------------------------
# What is watched


def make_figures(args, data, functions, weights, device):
    """-> figures(images uint8 (N, 3, H, W), labels (N,)) -> {name: number} for the Watch: the mean of each reward,
    their weighted sum "reward", "diversity", and the distance to the data: of pixels "fd" and "accuracy", of latents
    "fid"."""
    # FD and accuracy by the classifier of seed 1, which no reward has seen; or by that of seed 0, if it is the only one
    # and not the reward
    classifier = classifier_of(args, data, 1, device) or (
        None if "classifier" in weights else classifier_of(args, data, 0, device))
    if args.ref:
        inception = load_inception(os.path.join(args.folder, WEIGHTS["inception"])).to(device)
        reference = statistics_in(args.ref, read_npz(args.ref))

    @torch.no_grad()
    def figures(images, labels):
        def mean(f):  # of what was saved, 8 bits a channel
            return in_chunks(lambda part, part_labels: f(part.to(device).float() / 255, part_labels), images,
                             labels.to(device), args.chunk).mean().item()

        row = {name: mean(f) for name, f in functions.items()}
        reward = sum(weight * row[name] for name, weight in weights.items())
        row = {"reward": reward, **row, "diversity": diversity(images, labels)}
        if classifier:
            row.update(judge(classifier, images, labels))
        elif args.ref:
            pool = torch.cat([inception(part.to(device))[0].cpu() for part in images.split(args.chunk)])
            row["fid"] = frechet_distance(*mean_and_covariance(pool), *reference)
        return row
    return figures


def diversity(images, labels):
    """Standard deviation of a pixel among pictures of one class, in units of [-1, 1]: images uint8 (N, 3, H, W).
    Falls when a class collapses to one picture."""
    squares, freedom = 0.0, 0
    for label in labels.unique():
        x = images[labels == label].double() / 127.5
        squares, freedom = squares + (x - x.mean(0)).square().mean((1, 2, 3)).sum().item(), freedom + len(x) - 1
    return (squares / max(1, freedom)) ** 0.5


# ----------------------------------------------------------------------------------------------------------------------
# The command


def open_student(args, device):
    """--ckpt -> (the frozen student, class names); flags that were left out take the student's values."""
    if not os.path.isfile(args.ckpt):
        raise UserError(f"no student at {args.ckpt}: make one by distill.py first, or give --ckpt")
    file = read_checkpoint(args.ckpt)
    if file.get("stage") not in ("student", "rl"):  # the public files have no stage: they are teachers
        raise UserError(f"{args.ckpt} is a teacher's checkpoint, and an episode of 100 steps a token is out of reach: "
                        "distill it first (distill.py) and give its student.pt")
    student = load_mar(args.ckpt).to(device)
    args.pixels = student.config.pixels
    args.ar_steps = args.ar_steps or file["args"]["ar_steps"]
    mask_counts(student.config.seq_len, args.ar_steps)  # complains about a K above the number of tokens
    names, wanted = file["class_names"], {**parse_rewards(args.reward), **parse_rewards(args.watch)}
    if args.class_names or {"clip", "pickscore", "imagereward"} & wanted.keys():
        names = read_class_names(args.class_names, names)  # words, which those of folders need not be
    return student, names


def main(argv=None):
    """Check everything that can be checked, open the student and the rewards, train."""
    args = parse_args(argv)
    device, rank, world = setup(args.device, args.dtype)
    reference, names = open_student(args, device)
    config, data, vae = reference.config, None, None
    # same: what the rows' columns mean. A row of another reward, prompt or reference could not be compared
    run = Run(args, device, rank, world, ["rl"], divided=["batch"],
              same=["reward", "watch", "prompt", "class_names", "ref"])
    if config.pixels and args.ref:
        raise UserError("--ref is for students of latents; pixels are judged by a classifier of the data: leave it out")
    if config.pixels and args.data:
        data = open_data(args.data, img_size=config.img_size, pixels=True)
        if data.num_classes != config.num_classes:
            raise UserError(f"--data {args.data} has {data.num_classes} classes, the student {config.num_classes}: "
                            "give --data as distill.py had it")
    if not config.pixels:
        vae = load_vae(need_file(args.vae, "kl16")).to(device)
    if rank > 0:
        dist.barrier()  # rank 0 first: it trains the classifiers that are not there yet
    functions, weights = build_rewards(args, config, data, names, device, rank)
    watch = Watch(run, config, lambda: make_figures(args, data, functions, weights, device), vae=vae)
    if rank == 0 and world > 1:
        dist.barrier()
    run.start()
    if not run.resumed and rank == 0 and os.path.exists(run.path("best.pt")):
        os.remove(run.path("best.pt"))  # of a run that was killed before its first checkpoint

    def score(x, labels):  # the clamp: or a reward is earned outside the range that a screen can show
        pictures = x if vae is None else vae.decode(x / LATENT_SCALE)  # about [-1, 1]; differentiable
        images = ((pictures + 1) / 2).clamp(0, 1)
        return sum(weight * functions[name](images, labels) for name, weight in weights.items())

    train(args, reference, score, run, watch, names)


if __name__ == "__main__":
    run_main(main)
