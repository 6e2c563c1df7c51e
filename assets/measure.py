"""Prints the figures of measurements.md that no test and no program prints: python assets/measure.py NAME. They take
minutes or gigabytes, or want what is not here (a GPU, the public code).

    python assets/measure.py              # the names
    python assets/measure.py rl_memory
"""
import argparse
import copy
import importlib
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
import timeit
import weakref
from dataclasses import asdict
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from test_all import (HERE, Skip, TinyVAE, about, close, fake_distillation, fake_rl, fresh, on_fake_gpu, one_of,
                      replayed, scratch, write_judges, write_student)  # first: it says how torch multiplies
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import distill
import fid
import model as model_file
import rl
from data import open_data, run_main, setup, train_indices
from distill import Gradients
from fid import classify, load_classifier
from model import (MAR, SIZES, UserError, alpha_sigma, bf16_weights, image_keys, load_mar,
                   read_checkpoint, save_checkpoint, token_orders)
from sample import draw, image_seeds


def shortcuts(repeat=3, batches=(1, 4), size="base", K=8):
    """Section "Speed": CPU seconds an image with random weights, in one thread, each shortcut of a student taken away
    in turn; and the teacher's. CPU and not wall seconds, so that a busy machine gives the same."""
    def embed_each_token(self, n, c, c_null=None, guidance=1.0):
        alpha, sigma = alpha_sigma(s := torch.full(n.shape[:-1], self.config.t_init))
        return (sigma * n - sigma * self.eps(sigma * n, s, c)) / alpha

    def whole_last_block(self, tokens, visible, labels, predict, transformer=MAR.transformer):
        everything = torch.arange(self.config.seq_len).expand(len(tokens), -1)
        return model_file.take(transformer(self, tokens, visible, labels, everything), predict)

    model, figures = MAR(SIZES[size]).eval().requires_grad_(False), []
    without = {"nothing": (MAR, "generate", MAR.generate),
               "one time step for all": (MAR, "one_step", embed_each_token),
               "the last block's cut": (MAR, "transformer", whole_last_block)}
    jobs = [("student", B, name, {}) for B in batches for name in without]
    jobs += [("teacher", 1, "nothing", {"head_steps": 100, "guidance": 2.9})]
    for who, B, name, how in jobs:
        times = []
        for _ in range(repeat if who == "student" else 1):
            with mock.patch.object(*without[name]):
                start = time.process_time()
                model.generate(torch.arange(B) % model.config.num_classes, K, **how)
                times.append(time.process_time() - start)
        figures.append(f"{who}, batch {B}, without {name}: {np.median(times) / B:.2f} s")
    return f"{size}, K = {K}\n" + "\n".join(figures)


def public_mar(size):
    """The public MAR of a checkout of github.com/LTH14/mar, every weight random: the zeros of its initialisation would
    hide most of the network. The checkout's folder is in the environment variable MAR; it imports timm and scipy."""
    folder = Path(os.environ.get("MAR", "no MAR="))
    if not (folder / "models/mar.py").is_file():
        raise Skip(f"{folder}: no checkout of github.com/LTH14/mar; MAR=folder in front names one")
    try:
        with mock.patch.object(sys, "path", [str(folder), *sys.path]):
            public = importlib.import_module("models.mar")
    except ImportError as error:
        raise Skip(f"the public code wants timm 0.9.12 and scipy: {error}") from None
    torch.manual_seed(0)
    build = getattr(public, f"mar_{size}")  # its command line gives the head's size
    model = build(diffloss_d=SIZES[size].head_depth, diffloss_w=SIZES[size].head_width).eval().requires_grad_(False)
    for p in model.parameters():
        p.add_(0.02 * torch.randn_like(p))
    return model


def agrees_with_public(ours, theirs, B=2, ar_steps=3, head_steps=4):
    """Assert that both draw the same latents from the same orders and noise, with guidance, in float32."""
    spaced = importlib.import_module("diffusion").create_diffusion(str(head_steps), "cosine")
    labels, orders, draws = torch.arange(B), token_orders(image_keys(range(B)), ours.config.seq_len), []

    def recorded(draw):
        return lambda *args: draws.append(draw(*args)) or draws[-1]

    with (mock.patch.object(theirs, "sample_orders", lambda count: orders),
          mock.patch.object(theirs.diffloss, "gen_diffusion", spaced),
          mock.patch.object(torch, "randn", recorded(torch.randn)),
          mock.patch.object(torch, "randn_like", recorded(torch.randn_like))):
        expected = theirs.sample_tokens(B, ar_steps, 2.9, "linear", labels)
    with (mock.patch.object(model_file, "BF16", False),
          mock.patch.object(model_file, "gaussian", replayed(draws, head_steps))):
        close(ours.generate(labels, ar_steps, head_steps, 2.9, orders=orders), expected)


def beside_public_mar():
    """Section "Speed": seconds an image of the public code, our teacher and our student with the same weights, in one
    run and one thread, in turns; before it, that the pictures agree. In front, beside MAR (see public_mar):

        ROUNDS=1 KS="8 64" BATCHES="1 4" SIZE=base

    Ours multiply as --dtype auto decides. With KS=8 BATCHES=1 about 5 CPU minutes on a core with AVX2, 40 s of them for
    the check; all four cells more than an hour (an estimate).
    """
    size, rounds = os.environ.get("SIZE", "base"), int(os.environ.get("ROUNDS", 1))
    cells = [(int(K), int(B)) for K in os.environ.get("KS", "8 64").split()
             for B in os.environ.get("BATCHES", "1 4").split()]
    theirs, times = public_mar(size), {}
    with scratch() as folder:
        save_checkpoint({"model": {}, "model_ema": theirs.state_dict()}, folder / "public.pth")
        ours = load_mar(folder / "public.pth")
    setup("cpu")
    dtype = "bf16" if model_file.BF16 else "float32"
    kinds = {"public, 100 head steps, guidance":
                 lambda labels, K: theirs.sample_tokens(len(labels), K, 2.9, "linear", labels),
             f"our teacher, the same, {dtype}": lambda labels, K: ours.generate(labels, K, 100, 2.9),
             f"our student, 1 head step, {dtype}": lambda labels, K: ours.generate(labels, K)}
    with mock.patch.object(torch.Tensor, "cuda", lambda tensor: tensor), torch.no_grad():  # the public code is for GPUs
        agrees_with_public(ours, theirs)
        if model_file.BF16:
            bf16_weights(ours)
        for _, (K, B), kind in itertools.product(range(rounds), cells, kinds):
            cpu, wall = time.process_time(), time.perf_counter()
            kinds[kind](torch.arange(B), K)
            spent = time.process_time() - cpu, time.perf_counter() - wall
            times.setdefault((kind, K, B), []).append(np.array(spent) / B)
            print(f"{kind}, K = {K}, batch {B}: {spent[0] / B:.1f} s", flush=True)  # minutes apart
    rows = [f"| MAR-{size}: CPU (wall) seconds an image |" + "".join(f" K = {K}, batch {B} |" for K, B in cells)]
    for kind in kinds:
        medians = [np.median(times[kind, *cell], axis=0) for cell in cells]
        rows.append(f"| {kind} |" + "".join(f" {cpu:.1f} ({wall:.1f}) |" for cpu, wall in medians))
    return "\n".join(["the pictures agree", *rows])


def random_latents(folder, images=16):
    """A latent cache of noise at ImageNet's size, for what does not depend on what the numbers say."""
    folder.mkdir(exist_ok=True)
    moments = np.random.default_rng(0).standard_normal((images, 2, 32, 16, 16)).astype(np.float16)
    np.save(folder / "moments.npy", moments)
    np.save(folder / "done.npy", np.full(images, data.DONE, np.uint8))
    meta = {"img_size": 256, "classes": {f"{i}": int(i < images) for i in range(1000)}}
    (folder / "cache.json").write_text(json.dumps(meta))
    return folder


def random_teacher(path, config):
    torch.manual_seed(0)
    save_checkpoint({"config": asdict(config), "stage": "teacher", "ema": MAR(config).state_dict(), "step": 0,
                     "args": {"ar_steps": 8}, "class_names": [*map(str, range(config.num_classes))]}, path)
    return path


def on_a_gpu(images=32, updates=60, device="cuda"):
    """Distillation of random latents at ImageNet's size, as a user starts it: images/s and peak memory;
    then `speed`, one picture and 128. SIZES="base large huge" in front for others."""
    if device == "cuda" and not torch.cuda.is_available():
        raise Skip("no GPU: none of the figures that it prints has been taken")
    setup(device)
    for size in os.environ.get("SIZES", "base").split():
        with scratch() as folder:
            latents = random_latents(folder / "latents")
            teacher = random_teacher(folder / "teacher.pt", SIZES[size])
            for flags in ([], ["--recompute"]):
                argv = ["--data", latents, "--teacher", teacher, "--batch", images, "--steps", updates, "--log_every",
                        updates // 3, "--save_every", 10 * updates, "--device", device, *flags, "--out", folder / "out"]
                result = fresh("distill.py", *argv)
                assert result.returncode == 0, result.stderr[-2000:]
                last = json.loads((folder / "out/log.jsonl").read_text().splitlines()[-1])  # warm
                print(f"{size}, {images} images an update{''.join(f', {flag}' for flag in flags)}: "
                      f"{last['images_per_s']:.1f} images/s, peak {last.get('peak_gb', 0):.1f} GiB", flush=True)
                shutil.rmtree(folder / "out")
        speed(size, (4, 64), (1, 4 * images), device)


class LiveBytes(TorchDispatchMode):
    """Bytes of the CUDA tensors alive, and their peak."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak, self.known = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for storage in {x.untyped_storage() for x in tree_leaves(out) if torch.is_tensor(x) and x.is_cuda}:
            if storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.alive += storage.nbytes()
                weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.alive)
        return out

    def freed(self, key, nbytes):
        self.known.discard(key)
        self.alive -= nbytes


def memory_on_fake_gpu():
    """In a process of its own, with a CUDA that does nothing: the most bytes alive at once in two updates of distill.py
    (32 images) and in one of rl.py (64 images, K = 16), by size and flags, printed in GiB. Source: LiveBytes."""
    plain = F.scaled_dot_product_attention

    def attention(q, k, v, dropout_p=0.0):  # in bf16 a GPU takes the kernel that keeps no T x T matrix
        if q.dtype != torch.bfloat16:
            return plain(q, k, v, dropout_p=dropout_p)
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p)[0]

    with mock.patch.object(F, "scaled_dot_product_attention", attention):
        for size, flags in itertools.product(("base", "large", "huge"), ([], ["--recompute"])):
            live = fake_distillation("student", SIZES[size], size, "--batch", "32", "--log_every", "2", *flags,
                                     mode=LiveBytes)
            name = " ".join([f"distill {size}, 32 images", *flags])
            print(f"{name}: alive {live.peak / 2**30:.1f} GiB")
        for size, *flags in (["base"], ["base", "--estimator", "pathwise"], ["large"], ["huge"],
                             ["huge", "--recompute"]):
            live = fake_rl(SIZES[size], "--ar_steps", "16", *flags, mode=LiveBytes)
            print(f"rl {size}, 64 images {' '.join(flags)}: alive {live.peak / 2**30:.1f} GiB", flush=True)
    os._exit(0)  # and takes no fake tensor apart


def cuda_memory():
    """Section "Memory": bytes of all tensors alive in an update on CUDA, bf16: distillation of 32 images,
    post-training of 64 with everything but the judge."""
    return "\n".join(line for line in on_fake_gpu(memory_on_fake_gpu).splitlines() if "alive" in line)


PEAK = """
import os, resource, sys
if os.fork():  # the peak of a process begins with that of the one that started it: only a fork of a small one is clean
    sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
import torch
sys.path.insert(0, '.')
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MiB: Linux counts KiB
"""


def peaks(script, **env):
    """The numbers, in MiB, in the last line that this script prints in a new process, where PEAK went before it."""
    result = fresh("-c", PEAK + script, **env)
    assert result.returncode == 0, result.stderr[-2000:]
    return [float(word) for word in result.stdout.splitlines()[-1].split()]


def distillation_memory():
    """Section "Memory": the peak of a real run: MAR-B, two updates on random latents, float32, on the CPU."""
    figures = []
    with scratch() as folder:
        latents = random_latents(folder / "latents")
        teacher = random_teacher(folder / "teacher.pt", SIZES["base"])
        for flags in (["--batch", "2"], ["--batch", "4"], ["--batch", "4", "--recompute"],
                      ["--batch", "4", "--loss", "vsd"]):
            argv = ["--data", str(latents), "--teacher", str(teacher), "--steps", "2", "--log_every", "1", "--device",
                    "cpu", *flags, "--out", str(folder / "out")]
            # writing is left out: it comes after the peak and would want 11 GB of disk a setting
            (more,) = peaks(f"""
import distill
distill.save_checkpoint, before = lambda *_: None, peak()
distill.main({argv!r})
print(peak() - before)
""")
            figures.append(f"{' '.join(flags)}: {more / 1024:.2f} GiB")
            shutil.rmtree(folder / "out")
    return "\n".join(figures)


def rl_memory():
    """Peak memory of one RL update's chain for K = 8 and 64: ours, and one graph of the whole chain. glibc is told to
    give freed blocks back at once: else the peak tells how its heap is broken up by 64 shapes."""
    figures = []
    for K in (8, 64):
        for kind in ("ours", "graph"):
            whole, more = peaks(f"""
import copy, model, rl
from model import *
torch.manual_seed(0)
model, labels, seeds = MAR(SIZES['cifar10']).eval(), torch.arange(4), [(0, i) for i in range(4)]
keys, C = image_keys(seeds), model.config.token_dim
for p in model.parameters():
    p.grad = torch.zeros_like(p)
before = peak()
if {kind!r} == 'graph':
    tokens = torch.zeros(4, model.config.seq_len, C)
    for visible, predict in reveal_plan(token_orders(keys, model.config.seq_len), {K}):
        c = model.transformer(tokens, visible, labels, predict)
        tokens = put(tokens, predict, model.one_step(gaussian(keys, START, predict, C), c))
    tokens.mean().backward()
else:
    x = model.generate(labels, {K}, seeds=seeds)
    start = copy.deepcopy(model).requires_grad_(False)
    rl.backward_chain(model, start, x, torch.ones_like(x) / x.numel(), 0.1, 0.1, labels, keys, {K})
print(peak(), peak() - before)
""", MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536")
            figures.append(f"K {K} {kind}: {whole:.0f} MiB ({more:.0f} above weights and gradients)")
    return "\n".join(figures)


def gradient_cosine(batches=10, settings=((8, 0.1, 64), (6, 0.1, 64), (5, 0.1, 64), (4, 0.1, 64), (3, 0.1, 64),
                                          (8, 0.1, 128))):
    """Cosine of the gradient that REINFORCE gives the student's weights with the pathwise one, on the same pictures:
    the student in assets/, its classifier's log p as reward, 16 pictures a batch. In brackets, of v itself."""
    student = load_mar(HERE / "assets/cifar10/student.pt").requires_grad_(True)
    net = load_classifier(HERE / "assets/cifar10/classifier_0.pt")
    start, K = copy.deepcopy(student).requires_grad_(False), 8

    def score(x, labels):
        return F.log_softmax(net(((x + 1) / 2).clamp(0, 1))[1], dim=1).gather(1, labels[:, None])[:, 0]

    def pushed_back(v):
        student.zero_grad()
        rl.backward_chain(student, start, x, v, 0, 1, labels, keys, K)
        return torch.cat([p.grad.flatten() for p in student.parameters()])

    cosine = lambda a, b: F.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()
    found = {setting: [] for setting in settings}
    for batch in range(batches):
        labels, seeds = torch.arange(16) % 10, torch.tensor([(77 + batch, i) for i in range(16)])
        keys, x = image_keys(seeds), student.generate(labels, K, seeds=seeds)
        exact = rl.pathwise_direction(score, x, labels, keys, argparse.Namespace(chunk=16))[0]
        gradient = pushed_back(exact)
        for count, s, N in settings:
            args = argparse.Namespace(frequencies=count, noise_std=s, calls=N, chunk=2048)
            v = rl.reinforce_direction(score, x, labels, keys, args)[0]
            found[count, s, N].append((cosine(pushed_back(v), gradient), cosine(v, exact)))
    for (count, s, N), rows in found.items():
        g, v = np.array(rows).T
        print(f"frequencies {count or 'all':4} s {s:4} calls {N:4}: {g.mean():.3f} +- "
              f"{g.std(ddof=1) / len(g)**0.5:.3f} ({v.mean():.3f})   each batch {np.round(g, 2).tolist()}", flush=True)


def paired():
    """What post-training did to the same pictures: START and STUDENTS (checkpoints), JUDGE (a classifier's file that no
    reward has seen) are environment variables, SEED and COUNT too. Change of the judge's log p with its paired standard
    error, and every figure of both."""
    judge, count = load_classifier(os.environ["JUDGE"]), int(os.environ.get("COUNT", 1000))
    labels = torch.arange(count) % judge.num_classes

    def judged(path):
        model = load_mar(path)
        K = read_checkpoint(path)["args"].get("ar_steps", 8)
        images = draw(model, labels, seed=int(os.environ.get("SEED", 1)), ar_steps=K)
        log_p = F.log_softmax(classify(judge, images)[1], dim=1).gather(1, labels[:, None])[:, 0].double()
        row = fid.judge(judge, images, labels)
        row["diversity"] = rl.diversity(images, labels)
        row["jpeg"] = 100 * rl.jpeg_bytes(images.float() / 255).mean().item()
        return log_p, {name: value for name, value in row.items() if name != "census"}

    before, row = judged(os.environ["START"])
    tell = lambda row: ", ".join(f"{name} {value:.4g}" for name, value in row.items())
    print(f"{os.environ['START']}: log p {before.mean():.4f}; {tell(row)}", flush=True)
    for path in os.environ["STUDENTS"].split():
        after, row = judged(path)
        gain = after - before
        print(f"{path}: log p {after.mean():.4f}, {gain.mean():+.4f} +- {gain.std() / count**0.5:.4f}; {tell(row)}",
              flush=True)


BANDS = ((1, 4), (4, 8), (8, 16), (16, 24), (24, 46))  # of frequencies, in half waves a picture of 32 px


def grain():
    """Section "What FD and accuracy cannot see": rulers that nobody chose anything by. COUNT pictures of each of
    DRAWN, "checkpoint guidance head_steps temperature; ...", against 5,000 real ones of DATA: energy of the brightness
    in bands of the DCT, as a multiple of theirs; Frechet and kernel distance and precision / recall by the means and
    standard deviations of three layers of random convolutions."""
    real, count = open_data(os.environ["DATA"]), int(os.environ.get("COUNT", 1000))
    generator = torch.Generator().manual_seed(0)
    widths = (3, 64, 96, 128)
    layers = [torch.randn(after, before, 3, 3, generator=generator) * (2 / 9 / before) ** 0.5
              for before, after in zip(widths, widths[1:])]
    layers[0] -= layers[0].mean((1, 2, 3), keepdim=True)  # blind to the brightness itself
    waves = rl.cosines(real.img_size, real.img_size).double()
    k = torch.arange(real.img_size).double()
    frequency = (k[:, None] ** 2 + k**2).sqrt()

    def features(images):  # uint8 (N, 3, H, W) -> (N, 576)
        found = []
        for part in images.split(250):
            h, own = part.float() / 127.5 - 1, []
            for layer in layers:
                h = F.relu(F.conv2d(h, layer, padding=1))
                own += [h.mean((2, 3)), h.std((2, 3))]
                h = F.avg_pool2d(h, 2)
            found.append(torch.cat(own, 1))
        return torch.cat(found)

    def energies(images):  # -> a number a band
        energy = (waves @ (images.double() / 127.5 - 1).mean(1) @ waves.T).square().mean(0)  # (H, W)
        return torch.stack([energy[(low <= frequency) & (frequency < high)].mean() for low, high in BANDS])

    picks = torch.randperm(len(real), generator=generator).numpy()[:5000 + count]
    pictures = ((real.batch(picks, np.zeros(len(picks), bool))[0] + 1) * 127.5).round().byte()
    found = features(pictures[:5000])
    mean, std = found.mean(0), found.std(0) + 1e-6
    known = (found - mean) / std
    statistics, real_energies = fid.mean_and_covariance(known), energies(pictures[:5000])

    def tell(name, images):
        x = (features(images) - mean) / std
        fd = fid.frechet_distance(*fid.mean_and_covariance(x), *statistics)
        precision, recall = fid.precision_recall(x, known[:1000])
        bands = " ".join(f"{share:.2f}" for share in energies(images) / real_energies)
        print(f"{name}: FD {fd:.1f}, KID {fid.kernel_distance(x, known)[0]:.3f}, precision {precision:.2f}, recall "
              f"{recall:.2f}; energy in bands {bands}", flush=True)

    tell("real", pictures[5000:])
    for drawn in os.environ["DRAWN"].split(";"):
        path, guidance, head_steps, temperature = drawn.split()
        model = bf16_weights(load_mar(path))
        tell(drawn, draw(model, torch.arange(count) % model.config.num_classes, seed=1, ar_steps=8,
                         guidance=float(guidance), guidance_schedule="constant", head_steps=int(head_steps),
                         temperature=float(temperature)))


STUB_VAE = """
import sys
sys.path.insert(0, '.')
from test_all import TinyVAE, data
data.load_vae = lambda path: TinyVAE()
data.run_main(data.main)
"""


def latent_cache():
    """20,000 JPEGs become a cache on two processes that are killed on the way, then it is read at random. The encoder
    is a stand-in, for the true one takes seconds an image here; decoding, cropping, writing, resuming are real."""
    with scratch() as folder:
        rng = np.random.default_rng(0)
        coarse = rng.integers(0, 256, (200, 18, 20, 3), dtype=np.uint8)
        for name in range(10):
            (folder / f"jpeg/train/{name}").mkdir(parents=True)
        for i in range(20_000):  # 320 x 288 px; no two alike
            pixels = np.roll(coarse[i % 200], (i // 200 % 20, i // 4000), axis=(1, 0))
            image = Image.fromarray(pixels).resize((320, 288), Image.BILINEAR)
            image.save(folder / f"jpeg/train/{i % 10}/{i:05d}.jpg", quality=85)
        (folder / "stub.py").write_text(STUB_VAE), (folder / "vae").write_bytes(b"x")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--",
                   str(folder / "stub.py"), "--data", str(folder / "jpeg"), "--vae", str(folder / "vae"), "--out",
                   str(folder / "latents"), "--device", "cpu"]
        kills, start = 0, time.time()
        while True:
            process = subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                       start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            try:
                said = process.communicate(timeout=20 + 15 * kills if kills < 3 else 3000)[0]
                break
            except subprocess.TimeoutExpired:
                # torchrun's workers are in sessions of their own: when it alone is killed they go on, and own --out
                subprocess.run(["pkill", "-KILL", "-f", str(folder / "stub.py")], check=True)
                process.wait()
                kills += 1
        assert process.returncode == 0, said[-2000:]
        seconds = time.time() - start
        latents = open_data(folder / "latents")
        assert len(latents) == 20_000 and latents.num_classes == 10
        for i in (0, 7_777, 19_999):
            file = sorted((folder / "jpeg/train").rglob("*.jpg"))[i]
            x = torch.from_numpy(data.read_image(file, 256)).float()[None] / 127.5 - 1
            close(latents.read(np.array([i]), np.array([0])).float(), TinyVAE().moments(x), 2e-3)
        for _ in range(2):  # the first time touches each page
            clock = time.time()
            for _ in range(80):
                latents.batch(rng.integers(0, 20_000, 256), rng.random(256) < 0.5)
            rate = 80 * 256 / (time.time() - clock)
        size = (folder / "latents/moments.npy").stat().st_size
    return (f"built in {seconds:.0f} s with {kills} kills of both processes, {size / 2**20:.0f} MiB; 20,480 latents of "
            f"256 px read at random in batches of 256: {rate:,.0f}/s, one thread")


def true_size(kind):
    """{name: shape} of the public weights of CLIP ViT-L/14, PickScore (ViT-H/14) or ImageReward: the names are those
    of the references' smaller networks, widths and depths the public ones."""
    names = {"clip": "clip_vit_b32", "pickscore": "pickscore_tiny", "imagereward": "imagereward"}[kind]
    shapes = about(names)["shapes"]
    if kind == "imagereward":
        return shapes  # they are at full size
    # of the vision and of the text tower: width in the reference, true width, true depth; then the joint width
    (v0, v, v_depth), (t0, t, t_depth), joint = {
        "clip": ((768, 1024, 24), (512, 768, 12), 768), "pickscore": ((80, 1280, 32), (64, 1024, 24), 1024)}[kind]
    out = {}
    for name, shape in shapes.items():
        old, new = (v0, v) if name.startswith(("vis", "visual")) else (t0, t)
        out[name] = [{old: new, 3 * old: 3 * new, 4 * old: 4 * new}.get(n, n) for n in shape]
        if "mlp.fc1" in name:  # PickScore's reference has its own ratios
            out[name] = [4 * new, new][:len(shape)]
        if "mlp.fc2" in name and len(shape) == 2:
            out[name] = [new, 4 * new]
    if kind == "clip":
        out |= {"visual.conv1.weight": [v, 3, 14, 14], "visual.positional_embedding": [257, v],
                "visual.proj": [v, joint], "text_projection": [t, joint]}
        layer, towers = "resblocks.0.", (("visual.", v_depth), ("transformer.", t_depth))
    else:
        front = "vision_model.embeddings."
        out |= {front + "patch_embedding.weight": [v, 3, 14, 14], front + "position_embedding.weight": [257, v],
                "visual_projection.weight": [joint, v], "text_projection.weight": [joint, t]}
        layer, towers = "layers.0.", (("vision_model.", v_depth), ("text_model.", t_depth))
    for tower, depth in towers:
        for name in [n for n in out if n.startswith(tower) and layer in n]:
            for i in range(depth):
                out[name.replace(layer, layer.replace("0", str(i)))] = out[name]
    return out


def judges():
    """rl.py with CLIP, PickScore, ImageReward at their true sizes and random weights, tiny student, one update each."""
    figures = []
    with scratch() as folder:
        write_judges(folder), write_student(folder)
        for kind in ("clip", "pickscore", "imagereward"):
            torch.manual_seed(0)
            state = {name: torch.randn(shape) * (0.02 if len(shape) > 1 else 0.1)
                     + (name.endswith("weight") and len(shape) == 1) for name, shape in true_size(kind).items()}
            place, count = folder / fid.WEIGHTS[kind], sum(value.numel() for value in state.values())
            save_checkpoint(state, place)
            del state
            for estimator, calls in (("reinforce", 4 * 3), ("pathwise", 4)):
                spent, direction = [], getattr(rl, f"{estimator}_direction")

                def timed(*args):
                    start = time.time()
                    found = direction(*args)
                    spent.append(time.time() - start)
                    return found

                with mock.patch.object(rl, f"{estimator}_direction", timed):
                    rl.main(["--data", "shapes", "--ckpt", str(folder / "student.pt"), "--folder", str(folder),
                             "--reward", kind, "--watch", "--steps", "1", "--batch", "4", "--calls", "2",
                             "--chunk", "4", "--eval_images", "2", "--ar_steps", "2", "--estimator", estimator,
                             "--out", str(folder / f"{kind}_{estimator}")])
                log = json.loads((folder / f"{kind}_{estimator}/log.jsonl").open().readline())
                figures.append(f"{kind} ({count / 1e6:.0f} M) {estimator}: {spent[0] / calls:.2f} s a reward call, "
                               f"gradient norm {log['grad_norm']:.2g}")
            os.remove(place)
    return "\n".join(figures)


def seconds_of(work, device):
    """Median wall time of three calls. The caller warms up."""
    wait, times = torch.cuda.synchronize if device.type == "cuda" else lambda: None, []
    for _ in range(3):
        wait()  # launches on a GPU return at once: without it the clock would measure Python
        start = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def speed(size="base", ar_steps=(8,), batches=(1, 4), device="cpu", head_steps=100, guidance=2.9):
    """Section "Speed": wall seconds an image with random weights, without VAE. Student and teacher differ in head steps
    and guidance alone: one network is both. SIZE=large DEVICE=cuda in front for others."""
    size, device = os.environ.get("SIZE", size), torch.device(os.environ.get("DEVICE", device))
    model = MAR(SIZES[size]).eval().requires_grad_(False).to(device)
    if device.type == "cuda":
        bf16_weights(model)
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{machine}; {size}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters; warm, median of 3\n"
          "           batch    K  head steps  guidance   s/image  images/s  teacher/student", flush=True)
    for batch, K in itertools.product(batches, ar_steps):
        labels, seconds = torch.arange(batch, device=device) % model.config.num_classes, {}
        seeds = image_seeds(0, 0, batch).to(device)
        for who, steps, g in ("student", 1, 1.0), ("teacher", head_steps, guidance):
            # the row begins before its time is taken: a teacher's takes minutes
            print(f"{who:10}{batch:6}{K:5}{steps:12}{g:10.2f}", end="", flush=True)
            generate = lambda steps: model.generate(labels, K, head_steps=steps, guidance=g, seeds=seeds)
            generate(min(2, steps))  # meets every shape of a hundred
            seconds[who] = seconds_of(lambda: generate(steps), device)
            print(f"{seconds[who] / batch:10.4g}{batch / seconds[who]:10.3g}"
                  f"{seconds[who] / seconds['student']:16.1f}x", flush=True)


def profile_of_a_step():
    """Section "Cost and memory of distillation": where a distillation step's time goes."""
    shapes, model = open_data("shapes"), MAR(SIZES["shapes"]).eval()
    B = distill.DEFAULTS["shapes"]["batch"]
    pictures = distill.real_pictures(shapes, model, B, 0, 3, one_of())
    tokens, labels, keys, visible, masked = distill.training_batch(pictures, model.config, B, 0, 3, one_of())
    x = torch.randn(*masked.shape, model.config.token_dim, requires_grad=True)
    t = torch.randint(0, 1000, masked.shape)
    c = torch.randn(*masked.shape, model.config.width, requires_grad=True)
    transformer = lambda: model.transformer(tokens, visible, labels, masked)
    gradients, optimizer = Gradients(model), distill.make_optimizer(model, 1e-4, (0.0, 0.99))
    seconds = lambda work: statistics.median(timeit.repeat(work, timer=time.process_time, repeat=7, number=1))
    # one GSIM step: teacher 2 forward, student and critic forward + backward; heads: student and critic's own loss
    # with weights, critic and (twice) the teacher once more down to x_t; two updates
    parts = {"data": seconds(lambda: shapes.batch(*train_indices(len(shapes), B, 3, 0), torch.Generator())),
             "transformers": 2 * seconds(torch.no_grad()(transformer))
             + 2 * seconds(lambda: transformer().sum().backward()),
             "heads": 5 * seconds(lambda: model.eps(x, t, c).sum().backward()),
             "optimiser": 2 * seconds(lambda: (gradients.finish(1.0), optimizer.step()))}
    total = sum(parts.values())
    return ", ".join(f"{name} {value / total:.1%}" for name, value in parts.items())


MEASUREMENTS = {measurement.__name__: measurement for measurement in (
    gradient_cosine, paired, grain, beside_public_mar, cuda_memory, distillation_memory, judges, latent_cache, on_a_gpu,
    profile_of_a_step, rl_memory, shortcuts, speed)}


def main():
    """Run the measurement that is named, in one thread, and print its figures."""
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["--rank"]:  # a process that a measurement started
        return globals()[sys.argv[2]]()
    if len(sys.argv) != 2 or sys.argv[1] not in MEASUREMENTS:
        raise UserError(f"python assets/measure.py NAME, a name of: {', '.join(MEASUREMENTS)}")
    try:
        print(MEASUREMENTS[sys.argv[1]]() or "", flush=True)
    except Skip as reason:
        raise UserError(str(reason)) from None


if __name__ == "__main__":
    run_main(main)
