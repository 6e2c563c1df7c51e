"""Post-train the one-step student with a reward: any function of (finished picture, class), differentiable or not.

Must exist: a student from distill.py; for rewards by CLIP, PickScore, ImageReward their weights (data.py --get).

    python rl.py --data shapes --reward classifier                   # CPU, minutes; distill.py --data shapes first
    python rl.py --data shapes --reward jpeg --out out/shapes/jpeg   # smaller files: no gradient, no network
    python rl.py --data shapes --reward classifier --estimator pathwise        # the reward's own gradient
    python rl.py --reward clip --ckpt out/imagenet/student.pt        # one GPU
    torchrun --nproc_per_node=8 rl.py                                # ImageNet 256, PickScore; or --resume

The paper (MARVAL, arXiv 2511.15190) makes a whole picture in K fast AR steps, scores it, and follows the gradient of
the score. Single steps are never scored: half a picture has no CLIP score, and what a token is worth is decided by the
tokens that follow. Let v be a direction in which the reward of the finished picture x rises, held constant. The loss is

    loss = mean(-<v, x> + kl * KL_path),    KL_path = 1 / (2 s^2 dims) * sum_k |x_k - ref_k|^2

x_k are the tokens of AR step k; ref_k are those that the start (the student before its first update) would put there,
from the same noise and after the same earlier tokens of the student; a picture has dims numbers; s is --noise_std.
Ours are:
1. the default v needs no gradient of the reward: REINFORCE, with a Gaussian policy on the finished picture (one action
   an episode), in the low frequencies that the generator can follow. The textbook form, a Gaussian on each revealed
   token at each AR step, is left out: it hardly moved. Beside it `pathwise_direction`, the paper's;
2. KL_path, which is the KL per dimension between two Gaussians of width s, one around the student's tokens and one
   around the start's, given noise and context. Finished pictures drawn from one noise have little in common once an
   early token differs: pulling those together blurs them;
3. learning rate, batch and kl, which the paper does not state (assets/measurements.md).
"""
import copy
import io
import math
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image

from data import LATENT_SCALE, PUBLIC, Parser, load_vae, open_data, read_class_names, run_main, setup
from distill import (MAX_NORM, Gradients, Run, Watch, check_names, defaults_of, labels_and_seeds, make_optimizer,
                     micro_batches, read_flags, set_lr, update_ema)
from fid import (TEMPLATE, WEIGHTS, classifier_beside, finite, frechet_distance, judge, load_classifier, load_inception,
                 load_or_train_classifier, mean_and_covariance, prompt_scorer, read_npz, statistics_in)
from model import (START, TRAIN, UserError, bf16_weights, gaussian, image_keys, load_mar, mask_counts, need_file,
                   read_checkpoint, reveal_plan, say, take, token_orders, write_json)
from sample import steps_of

EXPLORE = TRAIN + 1024  # purpose (model.py) of the policy's noise, beyond all of distill.py's

# ----------------------------------------------------------------------------------------------------------------------
# v, the direction in which the reward of a finished picture rises: the one thing in which the estimators differ.
# Both: reward(x (n, c, h, w), labels (n,)) -> (n,); x (B, c, h, w), keys (B,) of its noise -> v like x, rewards (B,).


@torch.no_grad()
def reinforce_direction(reward, x, labels, keys, args):
    """From rewards alone. The policy is a Gaussian on the finished picture, white in each channel's lowest f x f
    frequencies, Q (c f f, c h w):

        e_n = z_n Q,  z_n ~ N(0, I),  r_n = r(x + s e_n),     v = 1 / (s (N - 1)) sum_n (r_n - mean r) e_n

    Q's rows, a cosine down times a cosine across, are orthonormal, so v is unbiased in the subspace: E v = Q^T Q
    (gradient of the reward smoothed by this noise). The baseline is the picture's own mean reward, because pictures
    differ more from each other than from their own neighbours. It contains r_n itself, hence N - 1. The other r_m in it
    add no bias, though z_m and z_n are at right angles: given z_m, z_n is as likely as -z_n.

    The generator passes little but low frequencies on to its weights, and N calls cannot tell more than N numbers
    apart: f is the least with c f f >= N, or --frequencies. N + 1 reward calls per picture."""
    B, channels, side, _ = x.shape
    N, s = args.calls, args.noise_std
    f = math.ceil((N / channels) ** 0.5) if args.frequencies is None else args.frequencies
    f = min(f or side, side)  # 0: all
    waves = cosines(side, f, x.device)  # (f, side): Q's rows are products
    spread = lambda z: torch.einsum("bncfg,fh,gw->bnchw", z.unflatten(2, (channels, f, f)), waves, waves)
    z = orthogonal_noise(keys, N, channels * f * f)  # (B, N, c f f)
    tried = (x[:, None] + s * spread(z)).flatten(0, 1)  # (B N, c, h, w): 128 MiB for ImageNet's 64 x 128 latents
    r = reward_in_chunks(reward, tried, labels.repeat_interleave(N), args.chunk).view(B, N)
    advantage = (r - r.mean(1, keepdim=True)) / (s * (N - 1))
    v = spread(torch.einsum("bn,bnm->bm", advantage, z)[:, None])[:, 0]  # (B, c, h, w)
    return v, reward_in_chunks(reward, x, labels, args.chunk)


def pathwise_direction(reward, x, labels, keys, args):
    """By autograd: v = dr/dx. Exact, one reward call per picture, differentiable rewards only."""
    v, rewards = [], []
    for part, part_labels in zip(x.split(args.chunk), labels.split(args.chunk)):
        part = part.detach().requires_grad_()
        r = reward(part, part_labels)
        v.append(torch.autograd.grad(r.sum(), part)[0])
        rewards.append(r.detach())
    return torch.cat(v), torch.cat(rewards)


def reward_in_chunks(reward, x, labels, chunk):
    """reward(x, labels) of any number of pictures, `chunk` at a time: a decoder or a judge fills the memory."""
    return torch.cat([reward(*part) for part in zip(x.split(chunk), labels.split(chunk))])


def cosines(side, count, device=None):
    """The `count` lowest frequencies of the orthonormal DCT-II as rows: (count, side)."""
    k, place = torch.arange(count, device=device)[:, None], torch.arange(side, device=device) + 0.5
    return torch.cos(math.pi / side * k * place) * torch.where(k > 0, 2 / side, 1 / side).sqrt()


def orthogonal_noise(keys, N, m):
    """(B,) keys -> (B, N, m): N standard normal vectors per picture, those of each group of m (of N, if fewer) at right
    angles: so calls do not ask the same twice. Their directions are uniform, their lengths those of independent
    Gaussians (Choromanski et al. 2018)."""
    size, device = min(N, m), keys.device
    groups = -(-N // size)
    if device.type == "mps":  # which has no QR in PyTorch before 2.11
        keys = keys.cpu()
    z = gaussian(keys, EXPLORE, torch.arange(groups * size, device=keys.device), m).unflatten(1, (groups, size))
    q, r = torch.linalg.qr(z.mT)  # (B, groups, m, size), (B, groups, size, size); r's signs are the algorithm's choice
    lengths = r.diagonal(dim1=2, dim2=3).sign() * z.norm(dim=3)  # (B, groups, size)
    return (q * lengths[:, :, None]).mT.flatten(1, 2)[:, :N].to(device)


# ----------------------------------------------------------------------------------------------------------------------
# The chain of AR steps, backwards, and its KL to the start


def backward_chain(student, start, x, slope, kl, s, labels, keys, ar_steps):
    """Backpropagate <slope, x> + kl * KL_path, summed over the pictures, into the student's .grad; -> the mean KL_path,
    nats per dimension. x (B, c, h, w) = student.generate(labels, ar_steps, seeds), slope like x, keys those of the
    seeds. The finished picture is all that had to be kept: no token is ever changed, so it holds the context of every
    step. For k = K-1 .. 0, with the tokens before step k as `context`:

        x_k = student(context),  ref_k = start(context)          run again, with a graph
        (<slope at x_k, x_k> + kl * KL_k).backward()             into the student's weights, and into context.grad
        slope += context.grad                                    what these earlier tokens do to x_k and to ref_k

    When a step's turn comes, the slope at its tokens is complete but for its own KL. ref_k is no constant: the start is
    frozen, but it reads tokens that move with the student. This is exact backpropagation through both chains, in the
    memory of one step whatever K is, for another forward and a backward of student and start."""
    L, C = student.config.seq_len, student.config.token_dim
    tokens, slope, kl_path = student.patchify(x), student.patchify(slope), 0.0  # (B, L, C)
    for visible, predict in reversed(list(reveal_plan(token_orders(keys, L), ar_steps))):
        context = tokens.detach().requires_grad_()
        n = gaussian(keys, START, predict, C)  # (B, P, C), as x was made of
        x_k = student.one_step(n, student.transformer(context, visible, labels, predict))  # (B, P, C)
        ref_k = start.one_step(n, start.transformer(context, visible, labels, predict))
        kl_k = (x_k - ref_k).square().sum() / (2 * s**2 * L * C)
        ((take(slope, predict) * x_k).sum() + kl * kl_k).backward()
        slope = slope + context.grad  # zero but at the visible tokens, which earlier steps wrote
        kl_path = kl_path + kl_k.detach()
    return kl_path / len(x)


# ----------------------------------------------------------------------------------------------------------------------
# Rewards: f(images (N, 3, H, W) float in [0, 1], labels (N,) long) -> (N,), on the images' device. To add one of your
# own, add a line to REWARDS: a builder, called once with (args, classifiers, class names, device), that returns such an
# f. The classifiers are two of the data, trained from different seeds: "classifier" is the one that distill.py shows
# its figures by, "judge" another, since what fools one may not fool two. Of latents there are none, and both are None.


def prompt_reward(kind):
    """How well a picture fits the prompt of its class, by one of fid.py's public judges."""
    return lambda args, classifiers, names, device: prompt_scorer(kind, read_class_names(of_data=names), args.prompt,
                                                                  args.folder, device)


def writable_folder(ckpt):
    """The folder of a student; for one in assets/, which is shipped, that of the same name in out/."""
    folder, shipped = Path(ckpt).parent, Path(__file__).resolve().parent / "assets"
    return Path("out", folder.name) if folder.resolve().is_relative_to(shipped) else folder


def open_classifier(ckpt, data, seed, device):
    """The data's classifier of this seed, from beside the student; where none is there, trained on `data`, or None."""
    path = classifier_beside(ckpt, seed)
    if data:
        return load_or_train_classifier(data, path.parent if path else writable_folder(ckpt), seed, device)
    return load_classifier(path, device) if path else None


def class_reward(net):
    """Log-probability of the class that was asked for, by one of the data's classifiers."""
    if net is None:
        raise UserError("the rewards classifier and judge want classifier_0.pt and _1.pt beside --ckpt, or pixels to "
                        "train them on: give --data, or use --reward clip, pickscore or imagereward")
    # net: -> features (N, F), logits (N, classes)
    return lambda images, labels: -F.cross_entropy(net(images)[1], labels, reduction="none")


def jpeg_bytes(images, quality=95):
    """Size of each image as a JPEG file, in hundreds of bytes. Quality: as DDPO's (Black et al. 2023)."""
    sizes = []
    for image in (images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy():  # (H, W, 3) each
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=quality)
        sizes.append(file.tell() / 100)
    return torch.tensor(sizes, device=images.device)


REWARDS = {
    "clip": prompt_reward("clip"),  # 100 cos(picture, prompt)
    "pickscore": prompt_reward("pickscore"),  # about 20; what people chose among pictures of one prompt
    "imagereward": prompt_reward("imagereward"),  # mean 0, variance 1; corrupts pictures when trained on: watch it
    "classifier": lambda args, classifiers, *_: class_reward(classifiers["classifier"]),
    "judge": lambda args, classifiers, *_: class_reward(classifiers["judge"]),
    "jpeg": lambda *_: lambda images, labels: -jpeg_bytes(images),  # needs nothing to be built from
    "red": lambda *_: lambda images, labels: (images[:, 0] - images[:, 1:].mean(1)).mean((1, 2)),  # the toy
}


def parse_rewards(words):
    """["clip:1", "jpeg:-0.1"] -> {"clip": 1.0, "jpeg": -0.1}."""
    weights = {}
    for word in words:
        name, _, weight = word.partition(":")
        if name not in REWARDS or name in weights:
            raise UserError(f"reward {name} is unknown or named twice: there are {', '.join(REWARDS)}")
        try:
            weights[name] = float(weight or 1)
        except ValueError:
            weights[name] = math.nan
        if not math.isfinite(weights[name]):
            raise UserError(f"reward {word}: the weight {weight} is no number; write {name}:0.5")
    return weights


def guarded(name, f):
    """f, made safe: it may change its arguments, return counts, truth values or doubles, or drop the dimension of a
    single picture."""
    def reward(images, labels):
        r = f(images.clone(), labels.clone())
        r = torch.as_tensor([] if r is None else r, device=images.device)  # None: a forgotten return
        if r.numel() != len(images):
            raise UserError(f"reward {name} must return a number per image, not {tuple(r.shape)} for {len(images)}")
        return r.float().reshape(len(images))
    return reward


def build_rewards(args, config, classifiers, names, device, rank):
    """-> functions {name: f} of all rewards trained on or, by rank 0 alone, watched, weights {name: float} of those
    trained on. Each is tried on two pictures, so that most faults show here, not after an episode."""
    weights, watched = parse_rewards(args.reward), parse_rewards(args.watch) if rank == 0 else {}
    images = torch.linspace(0, 1, 2 * 3 * config.img_size**2, device=device).view(2, 3, config.img_size, -1)
    labels = torch.tensor([0, config.num_classes - 1], device=device)
    functions = {}
    for name in weights | watched:
        functions[name] = guarded(name, REWARDS[name](args, classifiers, names, device))
        differentiated = args.estimator == "pathwise" and name in weights
        r = functions[name](images.clone().requires_grad_(differentiated), labels)
        if not r.isfinite().all():
            raise UserError(f"reward {name} is not finite: {r.tolist()} for two test pictures")
        if differentiated and not r.requires_grad:
            raise UserError(f"reward {name} has no gradient: --estimator pathwise needs one, reinforce does not")
    return functions, weights


# ----------------------------------------------------------------------------------------------------------------------
# The loop

MAX_DISTANCE, MIN_MODES = 1.2, 0.9  # of best.pt, in the start's distance to the data and in its number of modes


def train(args, start, reward, run, watch):
    """Post-train a copy of the frozen `start`; write student.pt (the last), best.pt and results.json. An update costs,
    an image, K passes of the student for the episode, then K of the student and K of the start with their backwards;
    and --calls + 1 decodings and reward calls (pathwise: one, with its backward)."""
    # all in eval mode: dropout would be noise that the policy knows nothing of, and no chain could be run again
    student, ema = copy.deepcopy(start).requires_grad_(True), copy.deepcopy(start)
    # no weight decay, which pulls towards 0: the KL pulls towards the start
    optimizer = make_optimizer(student, args.lr, (0.9, 0.99))
    run.restore("rl", model=student, ema=ema, optimizer=optimizer)
    row = watch.look("before", start)  # which all later ones are compared with
    if not {"fd", "fid"} & row.keys():
        say("no distance to the data is watched (pixels: give --data; latents: --ref), so there will be no best.pt")
    student.checkpoint_blocks = start.checkpoint_blocks = args.recompute
    bf16_weights(start)  # it is frozen
    gradients = Gradients(student)
    direction = {"reinforce": reinforce_direction, "pathwise": pathwise_direction}[args.estimator]

    for step in run.steps(args.steps, args.batch):
        # a look comes before the update: broken off, it is made anew when the run goes on from the same step
        if step > 0 and step % args.eval_every == 0:
            evaluate(run, watch, ema, step)

        set_lr(optimizer, args.lr, step, args.steps, args.warmup, decay=0.5)

        # classes come equally often whatever they earn, so the reward cannot shift their mixture
        batch = labels_and_seeds(start.config, args.batch, args.seed + 2, step, run)  # + 2: not those that Watch draws

        # the gradient, zeroed here; `accumulate` parts of the batch, one after the other, where memory is short. It is
        # sent to other ranks during the last part's K calls of backward()
        for labels, seeds in micro_batches(batch, args.accumulate, [gradients], backwards=args.ar_steps):
            # 1. an episode: K AR steps of the student, no graph
            keys = image_keys(seeds, run.device)
            x = student.generate(labels, args.ar_steps, seeds=seeds)  # (B, c, h, w)
            # 2. the direction in which the reward rises
            v, r = direction(reward, x, labels, keys, args)
            # 3. mean(-<v, x> + kl * KL_path) over the images of all parts, back through the chain, last AR step first,
            #    into .grad
            share = 1 / (len(x) * args.accumulate)
            kl_path = backward_chain(student, start, x, -v * share, args.kl * share, args.noise_std, labels, keys,
                                     args.ar_steps)
            # reward_std is among the pictures of a part
            run.add(args.accumulate, reward=r.mean(), reward_std=r.std(correction=0), kl=kl_path)

        # the update: ranks' gradients are averaged and clipped; the average of the student's weights is the product
        norm = gradients.finish(MAX_NORM)
        optimizer.step()
        update_ema(ema, student, args.ema)
        run.add(grad_norm=norm)

        run.log_and_save("student", ema)  # where due: only here does the loop itself wait for the device
    evaluate(run, watch, ema, run.step)
    if "best" in watch.rows:  # which the last table may not have had
        watch.show(run.step)


def evaluate(run, watch, ema, step):
    """The row "after" of the averaged student; best.pt where it is the best yet."""
    row = watch.look("after", ema, step)
    if run.rank == 0 and is_best(row, watch.rows):
        run.write("best", ema.config, step=step, ema=ema.state_dict())
        watch.rows["best"] = row
        write_json(run.path("results.json"), watch.rows)
        say(f"best.pt is now that of step {step}")


def is_best(row, rows):
    """Whether it has the most reward yet, near enough to the data and with enough modes. Reward that costs more of
    these was hacked. Without a distance that is measured no row is best."""
    distance, before = "fd" if "fd" in row else "fid", rows.get("before", {})
    if distance not in row.keys() & before.keys():
        return False
    near = row[distance] <= MAX_DISTANCE * before[distance]
    varied = row.get("modes", 0) >= MIN_MODES * before.get("modes", 0)
    return near and varied and row["reward"] > rows.get("best", before)["reward"]


def make_figures(args, classifiers, functions, weights, device):
    """-> figures(images uint8 (N, 3, H, W), labels (N,)) -> {name: number} for the Watch: the mean of each reward, the
    weighted sum "reward" of those trained on, "diversity", and of pixels what fid.judge says, of latents "fid"."""
    # one that is rewarded would judge itself
    classifier = next((net for name, net in classifiers.items() if net and name not in weights), None)
    if "judge" in weights:
        say(f"judge is rewarded, so figures are {'by classifier_0.pt' if classifier else 'without FD'}")
    if args.ref:
        inception = load_inception(os.path.join(args.folder, WEIGHTS["inception"])).to(device)
        reference = statistics_in(args.ref, read_npz(args.ref))

    @torch.no_grad()
    def figures(images, labels):
        row = {}
        for name, f in functions.items():  # of what would be saved, 8 bits per channel
            reward = lambda part, part_labels: f(part.to(device).float() / 255, part_labels)
            row[name] = reward_in_chunks(reward, images, labels.to(device), args.chunk).mean().item()
        total = sum(weight * row[name] for name, weight in weights.items())
        row = {"reward": total, **row, "diversity": diversity(images, labels)}
        if classifier:
            row.update(judge(classifier, images, labels))
        elif args.ref:
            pool = torch.cat([finite(inception(part.to(device))[0]) for part in images.split(args.chunk)])
            row["fid"] = frechet_distance(*mean_and_covariance(pool), *reference)
        return row
    return figures


def diversity(images, labels):
    """Standard deviation of a pixel among pictures of one class, in units of [-1, 1]: images uint8 (N, 3, H, W).
    Falls when a class collapses to one picture."""
    squares, freedom = 0.0, 0
    for label in labels.unique():
        x = images[labels == label].double() / 127.5
        squares += (x - x.mean(0)).square().mean((1, 2, 3)).sum().item()
        freedom += len(x) - 1
    return (squares / max(1, freedom)) ** 0.5


# ----------------------------------------------------------------------------------------------------------------------
# The command

# By reward, the least pull that kept the modes of shapes. ImageReward's and others' own are not known: 0.2
DEFAULT_KL = {"classifier": 2.0, "judge": 2.0, "red": 5.0, "jpeg": 20.0}
# What the student's size or `--data` changes; an explicit flag wins. How found: assets/measurements.md.
COMMON = dict(reward=["classifier"], watch=["judge", "jpeg"], log_every=10, chunk=2048)
DEFAULTS = {
    "shapes": dict(COMMON, watch=["judge", "jpeg", "red"], steps=120, batch=16, lr=1e-4, ema=0.97, warmup=0,
                   eval_every=40, save_every=40),
    "cifar10": dict(COMMON, steps=500, batch=32, calls=256, lr=2e-5, warmup=10, eval_every=100),
    "cifar10_cpu": dict(COMMON, steps=60, batch=32, calls=64, lr=2e-5, ema=0.97, warmup=10,
                        eval_every=60, eval_images=500, save_every=30),
}


def parse_args(argv=None):
    """The flags, with the defaults of the student's size or of --data, and of the reward; `read_flags` adds those that
    distill.py has too."""
    p = Parser("Post-train a one-step student with rewards.")
    flag = p.add_argument
    # files and data
    flag("--data", default=None, help="for students of pixels, what distill.py was run on; left out: the classifiers "
         "beside --ckpt")
    flag("--ckpt", default=None, help="the student (default out/<name of the data, or imagenet>/student.pt)")
    flag("--out", default=None, help="folder of the run (default rl/ beside the student)")
    flag("--vae", default=PUBLIC["kl16"][1], help="KL-16 file, for students of latents")
    flag("--folder", default=".", help="where data.py --get put the judges' weights (its --folder)")
    flag("--ref", default=None, help="students of latents: .npz with mu, sigma of Inception features, to watch FID by")
    flag("--prompt", default=TEMPLATE, help="text that CLIP, PickScore, ImageReward compare a picture with")
    # the reward
    flag("--reward", nargs="+", default=["pickscore"], metavar="NAME[:WEIGHT]",
         help=f"what to raise, several are added up, red:-1 lowers it: {' '.join(REWARDS)}")
    flag("--watch", nargs="*", default=["clip", "imagereward"], metavar="NAME",
         help="rewards that are only watched: they may fall when the trained one is being hacked")
    flag("--kl", type=float, default=None, help="pull towards the start, in reward per nat per dimension; raise it if "
         "FD rises or modes go, lower it if the reward does not move; twice the --noise_std wants it 4 times as strong "
         f"(left out: the sum of |weight| of each reward times {DEFAULT_KL}, 0.2 for others)")
    # its gradient
    flag("--estimator", default="reinforce", choices=["reinforce", "pathwise"],
         help="pathwise: differentiate the reward; less noise, differentiable rewards only")
    flag("--calls", type=int, default=128, help="rewards from which a picture's direction is found, 2 or more")
    flag("--frequencies", type=int, default=None, help="side of the square of lowest frequencies that REINFORCE tries; "
         "0: all, for rewards of fine texture (left out: as many as --calls can tell apart, with jpeg 0)")
    flag("--noise_std", type=float, default=0.1, help="s, of the policy and of the KL; pixels lie in [-1, 1], "
         "latents have std 1")
    flag("--ar_steps", type=int, default=None, help="K of an episode (default the student's)")
    flag("--steps", type=int, default=2000, help="updates")
    flag("--batch", type=int, default=64, help="images (episodes) an update, all ranks together")
    flag("--chunk", type=int, default=32, help="images decoded and scored at once: lower it if memory runs out")
    args = read_flags(p, argv, recipe, warmup=20, ema=0.99, eval_every=200, save_every=100, log_every=5)
    if args.noise_std == 0:
        raise UserError("--noise_std 0: a policy without noise tries nothing; 0.1 is a good start")
    weights = parse_rewards(args.reward)
    if args.kl is None:
        args.kl = sum(abs(weight) * DEFAULT_KL.get(name, 0.2) for name, weight in weights.items())
    if args.frequencies is None and "jpeg" in weights:
        args.frequencies = 0
    args.out = args.out or str(writable_folder(args.ckpt) / "rl")
    return args


def recipe(known):
    """The defaults: those of the size of the student, else of the data."""
    name = os.path.basename(os.path.normpath(known.data or "imagenet"))
    ckpt = known.ckpt or f"out/{name}/student.pt"
    file = read_checkpoint(ckpt) if os.path.isfile(ckpt) else {}  # not there: main says so
    found = {"ckpt": ckpt, **defaults_of(DEFAULTS, file, known.data)}
    if "watch" in found and not known.data and not classifier_beside(ckpt, 1):  # the judge cannot be had
        found["watch"] = [name for name in found["watch"] if name != "judge"]
    return found


def main(argv=None):
    """Check everything that can be checked, open the student and the rewards, train."""
    args = parse_args(argv)
    device, rank, world = setup(args.device, args.dtype)
    if not os.path.isfile(args.ckpt):
        raise UserError(f"no student at {args.ckpt}: make one by distill.py first, or give --ckpt")
    start = load_mar(args.ckpt).to(device)
    config, data = start.config, None
    if start.stage == "teacher":
        raise UserError(f"{args.ckpt} is a teacher's, of 100 steps a token: distill it first (distill.py)")
    args.ar_steps = args.ar_steps or steps_of(start)
    mask_counts(config.seq_len, args.ar_steps)  # complains about a K above the number of tokens
    names = start.class_names or [*map(str, range(config.num_classes))]
    args.vae = None if config.pixels else need_file(args.vae, "kl16")
    # same: what figures mean, and of which pictures they are. Rows of others could not be compared
    run = Run(args, device, rank, world, ["rl"], names, files=["ckpt", "ref", "vae"],
              same=["reward", "watch", "prompt", "data", "seed", "eval_images", "ar_steps"])
    if config.pixels and args.ref:
        raise UserError("--ref is for students of latents, and this one draws pixels: leave it out")
    if args.data and not config.pixels:
        raise UserError("--data is for students of pixels, and this one draws latents: give --ref")
    if args.data:
        data = open_data(args.data, img_size=config.img_size, pixels=True)
        if data.num_classes != config.num_classes:
            raise UserError(f"--data {args.data} has {data.num_classes} classes, the student {config.num_classes}: "
                            "give --data as distill.py had it")
        check_names(start, data)
    vae = load_vae(args.vae).to(device) if args.vae else None
    if rank > 0:
        dist.barrier()  # rank 0 first: it trains the classifiers that are not there yet
    classifiers = {name: open_classifier(args.ckpt, data, seed, device) if config.pixels else None
                   for name, seed in (("judge", 1), ("classifier", 0))}
    for classifier in filter(None, classifiers.values()):
        check_names(start, classifier)
    functions, weights = build_rewards(args, config, classifiers, names, device, rank)
    watch = Watch(run, config, data or classifiers["judge"] or classifiers["classifier"],
                  lambda: make_figures(args, classifiers, functions, weights, device), vae)
    if rank == 0 and world > 1:
        dist.barrier()
    run.start()
    if not run.resumed and rank == 0 and os.path.exists(run.path("best.pt")):
        os.remove(run.path("best.pt"))  # of an earlier run here, whose resume.pt was removed by hand

    def reward(x, labels):  # the clamp: or a reward is earned outside the range that a screen can show
        pictures = x if vae is None else vae.decode(x / LATENT_SCALE)  # about [-1, 1]; differentiable
        images = ((pictures + 1) / 2).clamp(0, 1)
        return sum(weight * functions[name](images, labels) for name, weight in weights.items())

    train(args, start, reward, run, watch)


if __name__ == "__main__":
    run_main(main)
