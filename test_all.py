"""All tests.

    python test_all.py                      # every test_..., each in a process of its own, as many at once as cores
    python test_all.py gsim reinforce       # those with gsim or reinforce in their names

Three kinds: the mathematics against closed forms; agreement with outputs of the public code, which lie in
assets/references; every stage end to end at a tiny size. They are also meant to be read: a test states one fact.
"""
import atexit
import copy
import errno
import faulthandler
import fcntl
import functools
import gc
import gzip
import hashlib
import http.server
import importlib
import inspect
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import traceback
import weakref
import zlib
from argparse import ArgumentParser, Namespace
from contextlib import chdir, contextmanager, ExitStack, redirect_stderr, redirect_stdout, suppress
from dataclasses import asdict, replace
from pathlib import Path
from unittest.mock import Mock, patch

os.environ["ATEN_CPU_CAPABILITY"] = "avx2"  # before torch is read: so --dtype auto is float32 on every x86 machine
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import data
import distill
import fid
import model as model_file
import rl
import sample
from data import PUBLIC, SHAPES, open_data, run_main, setup, train_indices
from distill import Gradients, diffusion_loss
from fid import load_or_train_classifier
from model import (CHAIN, MAR, ORDERS, SIZES, START, MARConfig, UserError, alpha_sigma, bf16_weights,
                   cosine_schedule, gaussian, image_keys, load_mar, mask_counts, read_checkpoint,
                   reveal_plan, save_checkpoint, token_orders, write_json)
from sample import GAP, draw, save_grid, title_of, to_uint8, unmasking

os.environ.setdefault("TQDM_DISABLE", "1")  # progress bars would drown the verdicts
# runs tell data sets apart by a hash of all pixels, which takes 2 s for 50,000 shapes: here 500 of them stand for all
of_all_pictures = data.Data.sha256.func
data.Data.sha256 = property(lambda self: of_all_pictures(
    self if len(self) < 9999 else replace(self, labels=self.labels[:500])))
HERE = Path(__file__).resolve().parent
SHARED = HERE.parent / "shared"
REFERENCES, FIXTURES = HERE / "assets/references", SHARED / "fixtures"
HANG = 1800  # seconds after which a test counts as hanging: no other limit, for a busy machine may take its time
LONG = ("train_alike", "torchrun", "brings_the_student", "bit_exact", "kill_9", "not_there", "mar_base",
        "imagereward_agrees")  # these start first
SKIPPED = 77  # the exit code of a test's process that stands for Skip


class Skip(Exception):
    """Raised by a test that cannot run here; the message says why."""


def need_shared():
    """Skips where ../shared is missing, which has CLIP's merge table."""
    if not (SHARED / "data/bpe_simple_vocab_16e6.txt.gz").is_file():
        raise Skip("../shared/data/bpe_simple_vocab_16e6.txt.gz is not there")


def fill(shapes):
    """{name: tensor} for {name: shape}: weights that a parameter's name and shape decide. With these the public
    networks gave the outputs in assets/references."""
    state = {}
    for name, shape in shapes.items():
        rng = np.random.default_rng([0, zlib.crc32(name.encode())])
        z = torch.from_numpy(rng.standard_normal(tuple(shape), dtype=np.float32))
        if name.endswith("num_batches_tracked"):
            z = torch.zeros(shape, dtype=torch.long)
        elif name.endswith("logit_scale"):
            z = torch.full(shape, 2.5)
        elif name.endswith("running_var"):
            z = 1 + 0.1 * z.abs()
        elif len(shape) < 2:
            z = 0.1 * z + name.endswith("weight")  # a norm's gain is about 1
        elif any(word in name for word in ("embed", "token", "latent", "_emb.weight")):
            z = 0.5 * z
        else:
            gain = 0.01 if "final_layer.linear" in name else 1.6 if len(shape) == 4 else 1.0
            z = (z.double() * (gain / math.prod(shape[1:]) ** 0.5)).float()
        state[name] = z
    return state


def about(name):
    """What assets/references/NAME.json says: a network's parameters, its configuration."""
    return json.loads((REFERENCES / f"{name}.json").read_text())


def fixture(name):
    """Inputs and outputs of public code, tensors: those in assets/references/NAME.npz, or the whole arrays that
    they are the beginnings of, where ../shared/fixtures has them."""
    load = lambda folder: {key: torch.from_numpy(value) for key, value in np.load(folder / f"{name}.npz").items()}
    arrays = load(REFERENCES)
    if not (FIXTURES / f"{name}.npz").is_file():
        return {key: value.float() if value.dtype == torch.half else value for key, value in arrays.items()}
    whole = load(FIXTURES)
    for key, value in arrays.items():
        part = whole[key][tuple(slice(n) for n in value.shape)]
        close(value, part, 5e-4 if value.dtype == torch.half else 0)
    return whole


@functools.cache
def session():
    """A folder that the tests' processes share. It goes when the process that asked first ends."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)  # forks end by os._exit, which runs nothing of the kind
    return Path(folder)


def once(name=""):
    """Of a function of a new folder, which it fills: -> a function without arguments that gives that folder, or the
    file `name` in it. The first test to ask has it filled; others, in processes of their own, wait for that."""
    def decorated(make):
        @functools.wraps(make)
        def path():
            place = session() / make.__name__
            with open(f"{place}.lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not place.exists():
                    with tempfile.TemporaryDirectory(dir=session()) as new:
                        make(Path(new))
                        os.rename(new, place)
            return place / name
        return path
    return decorated


class Command(multiprocessing.get_context("fork").Process):
    """work() as a command of its own. It runs in a fork of this process: so it need not import torch again."""

    def __init__(self, work, **env):
        super().__init__(daemon=True)
        self.work, self.env = work, {name: str(value) for name, value in env.items()}
        self.files = [tempfile.TemporaryFile("w+") for _ in range(2)]  # its stdout and stderr
        self.start()

    def run(self):
        for fd, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(self.files[fd - 1].fileno(), fd)
            setattr(sys, name, open(fd, "w", buffering=1, closefd=False))
        os.environ.update(self.env)
        os.chdir(HERE)
        usual_signals()
        self.work()

    def ended(self, timeout=None):
        """Wait for its end, or kill it after that many seconds: -> CompletedProcess with text output."""
        self.join(timeout)
        self.kill(), self.join()
        for file in self.files:
            file.seek(0)
        return subprocess.CompletedProcess((), self.exitcode, *(file.read() for file in self.files))


def script(program, *argv):
    """What the interpreter does with one of our programs: work for a Command."""
    def work():
        sys.argv = [str(program), *map(str, argv)]
        runpy.run_path(str(HERE / program), run_name="__main__")
    return work


def fresh(*argv, **env):
    """The same in a new interpreter, which costs seconds, for what forks share: -> CompletedProcess."""
    return subprocess.run([sys.executable, *map(str, argv)], cwd=HERE, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **env})


def on_ranks(world, work):
    """work() on `world` gloo processes, told by torchrun's variables who they are: -> rank 0's stdout."""
    port = 10_000 + os.getpid() % 20_000  # another for each test, below those that systems hand out; may be taken
    ranks = [Command(work, RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, LOCAL_WORLD_SIZE=world,
                     MASTER_ADDR="127.0.0.1", MASTER_PORT=port) for rank in range(world)]
    while any(rank.is_alive() for rank in ranks) and not any(rank.exitcode for rank in ranks):
        time.sleep(0.01)
    results = [rank.ended(2) for rank in ranks]  # where one has failed the others wait for it
    assert not any(result.returncode for result in results), "".join(result.stderr[-4000:] for result in results)
    return results[0].stdout


def usual_signals():
    """A program that ran in this process may have taken them over."""
    for number in distill.SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


class Killed(BaseException):
    """As good as a kill in this process: nothing is tidied up."""


@contextmanager
def happens_at(count, accident, *places):
    """Within it the count-th call of all these functions, each a file and a name, begins with accident()."""
    calls = itertools.count(1)

    def counted(real):
        def call(*args, **kwargs):
            if next(calls) == count:
                accident()
            return real(*args, **kwargs)
        return call

    with ExitStack() as stack:
        for file, name in places:
            stack.enter_context(patch.object(file, name, counted(getattr(file, name))))
        yield


@contextmanager
def scratch():
    """A temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def close(ours, theirs, tolerance=1e-4):
    """Assert max|ours - theirs| <= tolerance * max|theirs|."""
    ours, theirs = torch.as_tensor(ours), torch.as_tensor(theirs)
    error = (ours.double() - theirs.double()).abs().max().item() / max(theirs.abs().max().item(), 1e-30)
    assert ours.shape == theirs.shape, f"shape {tuple(ours.shape)}, not {tuple(theirs.shape)}"
    assert error <= tolerance, f"relative error {error:.2e} above {tolerance}"


def refused(call, *words, by=(UserError, OSError)):
    """What `call` ends in, and run_main makes one line of: an error of these kinds that holds all `words`."""
    try:
        call()
    except by as error:
        assert "\n" not in str(error) and all(word in str(error) for word in words), str(error)
        return str(error)
    raise AssertionError(f"accepted, not refused with {words}")


def refused_files(folder, rows, name="file.pt"):
    """Files, bytes or what torch.save takes, are refused in their name: rows of reader, content, words of the line."""
    for load, content, *words in rows:
        (folder / name).write_bytes(content) if isinstance(content, bytes) else torch.save(content, folder / name)
        assert refused(lambda: load(folder / name), name, *words).isprintable(), words


def heard(work):
    """What work() prints."""
    with redirect_stdout(io.StringIO()) as said:
        work()
    return said.getvalue()


def tiny_config(**changes):
    """A MAR of 16 pixel tokens: tiny, but every code path of the real one."""
    config = MARConfig(img_size=8, vae_stride=1, patch_size=2, vae_channels=3, num_classes=4, width=32, heads=2,
                       encoder_depth=2, decoder_depth=2, buffer_size=2, head_depth=1, head_width=32,
                       dropout=0.0, mask_ratio_min=0.5, t_init=625)
    return replace(config, **changes)


LATENT = dict(img_size=64, vae_stride=16, patch_size=1, vae_channels=16)  # of tiny_config: 16 latent tokens
PIXELS_16 = dict(img_size=16, patch_size=4, num_classes=8)
TINY_SHAPES = tiny_config(**PIXELS_16, mask_ratio_min=0.1)
MADE = {"ar_steps": 8, "guidance": 2.0, "guidance_schedule": "constant", "teacher_head_steps": 10}


def tiny_mar(folder=None, stage="student", args=MADE, **changes):
    """A tiny MAR whose every weight is random: the initialisation's zeros would hide most of the network. Saved as
    folder/<stage>.pt too, when a folder is given."""
    config = tiny_config(**changes)
    torch.manual_seed(0)
    model = MAR(config).eval().requires_grad_(False)
    for p in model.parameters():
        p.copy_(torch.randn_like(p) / (p.shape[-1] ** 0.5 if p.ndim > 1 else 10))
    if folder:
        names = [*SHAPES, *map(str, range(8, 99))][:config.num_classes]
        save_checkpoint({"config": asdict(config), "stage": stage, "step": 0, "ema": model.state_dict(), "args": args,
                         "class_names": names}, folder / f"{stage}.pt")
    return model


# ----------------------------------------------------------------------------------------------------------------------
# The mathematics: the losses, the estimators and the chains against closed forms


def gsim_monte_carlo(distance, draws=4_000_000):
    """Gradient of the weighted loss for mean and scale of a Gaussian student N(.7, .5^2), teacher N(0, 1)."""
    g = torch.Generator().manual_seed(0)
    theta = 0.1 + 1.4 * torch.rand(draws, 1, generator=g, dtype=torch.float64)
    alpha, sigma = theta.cos(), theta.sin()
    mean = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    x0 = mean + scale * torch.randn(draws, 1, generator=g, dtype=torch.float64)
    eps = torch.randn(draws, 1, generator=g, dtype=torch.float64)
    variance = alpha**2 * 0.25 + sigma**2  # of the student's x_t: the critic is exact, and no function of theta
    x_t = alpha * x0 + sigma * eps
    eps_q, eps_p = sigma * (x_t - alpha * 0.7) / variance, sigma * x_t  # a score is -eps / sigma
    loss = distill.gsim_loss(eps, eps_q, eps_p, alpha, sigma, distance)
    return torch.stack(torch.autograd.grad(loss.mean(), (mean, scale)))


def test_gsim_is_the_gradient_of_the_score_divergence():
    """METHOD 4's proof. E|s_q - s_p|^2 = alpha^2 m^2 + v - 2 + 1/v with v = alpha^2 s^2 + sigma^2, in closed form."""
    theta = torch.linspace(0.1, 1.5, 200_001, dtype=torch.float64)
    alpha, sigma = theta.cos(), theta.sin()
    weight, v = sigma**2 / alpha, alpha**2 * 0.25 + sigma**2
    exact = torch.stack([(weight * 2 * alpha**2 * 0.7).mean(), (weight * (1 - 1 / v**2) * 2 * alpha**2 * 0.5).mean()])
    both = gsim_monte_carlo(lambda y: (y.square()[:, 0], 2 * y))
    only_1 = gsim_monte_carlo(lambda y: (0 * y[:, 0], 2 * y))
    only_2 = gsim_monte_carlo(lambda y: (y.square()[:, 0], 0 * y))
    close(both, exact, 0.02)
    for part in (only_1, only_2):
        assert ((part - exact).abs() > 0.1 * exact.abs()).all(), (part, exact)  # either alone is another gradient


def slope_at(name, x0, t, eps, eps_q, eps_p):
    """distill.gsim_slope or vsd_slope at x0 for the noise predictions of functions eps_q and eps_p of x_t."""
    alpha, sigma = (z.to(x0.dtype) for z in alpha_sigma(t))
    x_t = (alpha * x0 + sigma * eps).requires_grad_()
    return getattr(distill, name)(x_t, eps, eps_q(x_t), eps_p(x_t), alpha, sigma)


def test_gsim_slope_is_the_derivative_of_the_loss_down_to_x0():
    """Finite differences in x0, through x_t = alpha x0 + sigma eps and two networks that are no Gaussians."""
    torch.manual_seed(0)
    A, B = torch.randn(2, 6, 6, dtype=torch.float64) / 2
    eps_q, eps_p = (lambda x: (x @ A).tanh()), (lambda x: (x @ B).sin())
    t = torch.tensor([20, 150, 500, 800, 973])
    x0, eps, way = torch.randn(3, 5, 6, dtype=torch.float64)
    alpha, sigma = (z.double() for z in alpha_sigma(t))

    def loss(x0):
        x_t = alpha * x0 + sigma * eps
        return distill.gsim_loss(eps, eps_q(x_t), eps_p(x_t), alpha, sigma)

    slope, said = slope_at("gsim_slope", x0, t, eps, eps_q, eps_p)
    close(said, loss(x0), 1e-6)
    close((slope * way).sum(1), (loss(x0 + 1e-6 * way) - loss(x0 - 1e-6 * way)) / 2e-6, 1e-4)  # token by token


def test_vsd_slope_is_its_formula():
    """The difference of the two x0 estimates, over the teacher's mean distance from the student's sample."""
    torch.manual_seed(0)
    (A, B), t = torch.randn(2, 6, 6), torch.tensor([20, 400, 973])
    x0, eps = torch.randn(2, 3, 6)
    alpha, sigma = alpha_sigma(t)
    x_t = alpha * x0 + sigma * eps
    x0_q, x0_p = (x_t - sigma * (x_t @ A)) / alpha, (x_t - sigma * (x_t @ B)) / alpha
    slope, size = slope_at("vsd_slope", x0, t, eps, lambda x: x @ A, lambda x: x @ B)
    close(slope, (x0_q - x0_p) / ((x0 - x0_p).abs().mean(1, keepdim=True) + 1e-3), 1e-4)
    close(size, (x0_q - x0_p).norm(dim=1), 1e-4)


def test_pseudo_huber_and_its_derivative():
    y = torch.randn(50, 12, dtype=torch.float64, requires_grad=True)
    d, d_prime = distill.pseudo_huber(y)
    close(torch.autograd.grad(d.sum(), y)[0], d_prime.detach(), 1e-8)
    close(d, y.norm(dim=1), 1e-4)  # a norm, but smooth at 0


def test_distillation_gradients_vanish_when_student_is_teacher():
    """Equal scores: VSD's gradient is 0 for every sample. GSIM's is 0 on average only: L1 is a trade in expectation."""
    n = 200_000
    t = torch.randint(20, 974, (n,), generator=torch.Generator().manual_seed(0))
    alpha, sigma = alpha_sigma(t)
    x0, eps = torch.randn(n, 1), torch.randn(n, 1)
    exact = lambda x: sigma * x  # eps of data N(0, 1), for teacher and critic alike
    assert slope_at("vsd_slope", x0, t, eps, exact, exact)[0].abs().max() == 0
    v, _ = slope_at("gsim_slope", x0, t, eps, exact, exact)
    assert v.mean().abs() < 4 * v.std() / n**0.5 + 1e-6 and (v * x0).mean().abs() < 4 * (v * x0).std() / n**0.5 + 1e-6


def test_vsd_points_from_student_to_teacher():
    """Student N(1, 1), teacher N(0, 1): descending the gradient must lower x0's mean."""
    t = torch.randint(20, 974, (10_000,), generator=torch.Generator().manual_seed(0))
    alpha, sigma = alpha_sigma(t)
    x0, eps = 1 + torch.randn(10_000, 1), torch.randn(10_000, 1)
    student, teacher = (lambda x: sigma * (x - alpha)), (lambda x: sigma * x)
    for name in ("vsd_slope", "gsim_slope"):
        assert slope_at(name, x0, t, eps, student, teacher)[0].mean() > 0, name


def test_tokens_are_made_noisy_in_one_place():
    """x_t = alpha x0 + sigma eps with a t of its own a token, and no noise that another purpose has."""
    keys, places, x0 = image_keys(range(3)), torch.arange(5).expand(3, -1), torch.randn(3, 5, 7)
    x_t, t, eps, alpha, sigma = distill.noised(x0, keys, distill.STUDENT, places, 20, 973)
    assert t.shape == (3, 5) and alpha.shape == sigma.shape == (3, 5, 1) and len(t.unique()) > 10
    close(alpha**2 + sigma**2, torch.ones(3, 5, 1), 1e-6), close(x_t, alpha * x0 + sigma * eps, 0.0)
    purposes = [distill.TEACHER + i for i in range(8)] + [distill.NOISE, distill.CRITIC, distill.STUDENT]
    draws = torch.stack([distill.noised(x0, keys, purpose, places)[2] for purpose in purposes]).flatten()
    assert len(draws.unique()) > 0.999 * len(draws)


def test_guidance_of_one_is_none_and_zero_is_the_null_class():
    model, n = tiny_mar(), torch.randn(6, 12)
    t, c, null = torch.full((6,), 300), torch.randn(6, 32), torch.randn(6, 32)
    close(distill.guided_eps(model, n, t, c, None, 1.0), model.eps(n, t, c), 1e-6)
    close(distill.guided_eps(model, n, t, c, null, 1.0), model.eps(n, t, c), 1e-5)
    close(distill.guided_eps(model, n, t, c, null, 0.0), model.eps(n, t, null), 1e-5)
    t = torch.tensor([[99, 100, 399], [400, 499, 500]])
    args = Namespace(guidance=3.0, t_guided=500, fine_weight=2.0, low_weight=0.25)
    assert distill.guidance_at(t, args)[..., 0].tolist() == [[3, 3, 3], [3, 3, 1]]
    assert distill.weight_at(t, args)[..., 0].tolist() == [[2, 0.25, 0.25], [1, 1, 1]]


def test_one_step_inverts_a_perfect_head():
    """If the head knew x0, x0 is what one step returns: the formula divides by the right alpha."""
    model, x0 = tiny_mar(), torch.randn(9, 12)
    model.eps = lambda z, s, c: (z - alpha_sigma(s)[0] * x0) / alpha_sigma(s)[1]
    close(model.one_step(torch.randn(9, 12), None), x0, 1e-5)


def test_teacher_chain_samples_a_gaussian_whose_score_is_known():
    """With the exact eps of data N(m, s^2) in the head's place, 100 steps give samples of N(m, s^2)."""
    model, m, s = tiny_mar(vae_stride=2), 0.7, 0.5  # vae_stride 2: no clamp of pixels

    class Exact(torch.nn.Module):
        cond_embed, time_embed = staticmethod(lambda c: c), staticmethod(lambda t: t[:, None].float())

        def forward(self, x, y):
            alpha, sigma = alpha_sigma(y[:, 0].long())
            eps = sigma * (x - alpha * m) / (alpha**2 * s**2 + sigma**2)
            return torch.cat([eps, -torch.ones_like(x)], 1)  # v = -1: the posterior's own variance

    model.head_net = Exact()
    keys = image_keys(range(2000))
    positions = torch.zeros(2000, 1, dtype=torch.long)
    x = model.denoise(gaussian(keys, START, positions, 12)[:, 0], torch.zeros(2000, 1), None, 1.0, 100, 1.0,
                      lambda j: gaussian(keys, CHAIN + j, positions, 12)[:, 0])
    assert abs(x.mean() - m) < 0.02 and abs(x.std() - s) < 0.02, (x.mean(), x.std())


def direction_args(**changes):
    return Namespace(**{**dict(calls=128, frequencies=0, noise_std=0.1, chunk=1000), **changes})


def test_cosines_are_an_orthonormal_basis():
    Q = rl.cosines(8, 8)
    close(Q @ Q.T, torch.eye(8), 1e-6)
    close(Q[0], torch.full((8,), 8**-0.5), 1e-6)
    assert torch.equal(rl.cosines(8, 3), Q[:3])
    wave = torch.cos(math.pi * 3 * (torch.arange(8) + 0.5) / 8)  # DCT-II's third: one coefficient and no other
    assert (Q @ wave).abs().argmax() == 3 and (Q @ wave)[[0, 1, 2, 4, 5, 6, 7]].abs().max() < 1e-6


def test_reinforce_finds_the_gradient_of_linear_and_quadratic_rewards():
    """METHOD 5's proof: v is the gradient, or of fewer frequencies its part in them. A quadratic's curvature, even in
    e, and the mean reward of a picture have no part in it."""
    torch.manual_seed(0)
    w, A, z = torch.randn(3, 16), torch.randn(16, 16) / 2, torch.randn(3, 1, 4, 4)
    labels = torch.tensor([0, 1, 2])

    def linear(a, labels):  # each class has a direction of its own, and a level far from 0
        return (w[labels] * a.flatten(1)).sum(1) + 20 * labels

    def quadratic(a, labels):
        return linear(a, labels) - (a.flatten(1) @ A).square().sum(1) / 2

    for score in (linear, quadratic):
        truth, r_truth = rl.pathwise_direction(score, z, labels, None, direction_args())
        for count in (0, 2):
            args = direction_args(calls=400_000, frequencies=count, chunk=1_200_000)
            v, r = rl.reinforce_direction(score, z, labels, image_keys(range(3)), args)
            Q = rl.cosines(4, count or 4)
            close(r, r_truth, 1e-5), close(v, Q.T @ (Q @ truth @ Q.T) @ Q, 0.02)
    close(truth.flatten(1), w - z.flatten(1) @ A @ A.T, 1e-4)  # and pathwise is the derivative


def test_reinforce_is_as_good_as_its_calls():
    """Of a linear reward v has a cosine of sqrt(N / m) with the gradient, m numbers tried at once (of independent
    directions it would be sqrt(N / (N + m))): in the 8 x 8 lowest frequencies, where all of this reward lies, far more
    than in all 16 x 16."""
    torch.manual_seed(0)
    Q, N = rl.cosines(16, 8), 64
    w, z = Q.T @ torch.randn(60, 3, 8, 8) @ Q, torch.zeros(60, 3, 16, 16)
    for count, m in ((8, 192), (0, 768)):
        score, labels = lambda a, i: (w[i] * a).sum((1, 2, 3)), torch.arange(60)
        v, _ = rl.reinforce_direction(score, z, labels, image_keys(labels), direction_args(calls=N, frequencies=count))
        cosine = F.cosine_similarity(v.flatten(1), w.flatten(1)).mean()
        assert abs(cosine - ((N - 1) / (m + 2)) ** 0.5) < 0.015, (count, cosine)  # the mean costs one, lengths 2 / m
    v, _ = rl.reinforce_direction(score, z, labels, image_keys(labels), direction_args(calls=N, frequencies=None))
    F16 = rl.cosines(16, 16)
    spectrum = (F16 @ v @ F16.T).abs().amax((0, 1))  # by itself what 64 calls can tell apart: 3 x 5 x 5 numbers
    assert spectrum[:5, :5].min() > 0.01 and max(spectrum[5:].max(), spectrum[:, 5:].max()) < 1e-4


def test_directions_of_reinforce_are_gaussian_and_orthogonal():
    """Each is a standard normal vector: mean, covariance, lengths; those of a picture are orthogonal in groups of m."""
    keys, m = image_keys(range(20_000)), 4
    for N in (3, 4, 6):
        z = rl.orthogonal_noise(keys, N, m)
        assert z.shape == (20_000, N, m)
        gram = z @ z.mT
        groups = torch.arange(N) // min(N, m)
        together = (groups[:, None] == groups) & ~torch.eye(N, dtype=torch.bool)
        assert gram[:, together].abs().max() < 1e-4
        for i in range(N):
            assert z[:, i].mean(0).abs().max() < 0.03
            assert (z[:, i].T.cov() - torch.eye(m)).abs().max() < 0.05
            below = (gram[:, i, i] < torch.tensor([[1.0], [3.357], [8.0]])).double().mean(1)
            close(below, torch.tensor([0.0902, 0.5000, 0.9084]), 0.02)  # chi^2 of 4
        assert torch.einsum("bi,bj->ij", z[:, 0], z[:, 1]).abs().max() < 0.03 * len(z)  # no pair is correlated


def chain_problem(K, **changes):
    """A tiny MAR with weights that learn, three episodes of it, and a loss of the finished pictures."""
    model, labels, seeds = tiny_mar(**changes), torch.tensor([0, 1, 3]), [(9, i) for i in range(3)]
    with torch.no_grad():  # gains of 1 and not of 0.1: or no token would heed another
        for name, p in model.requires_grad_(True).named_parameters():
            p += p.ndim == 1 and name.endswith("weight")
    w = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    loss = lambda x: (w * x).mean() + (x.square()).mean() / 2
    x = model.generate(labels, K, seeds=seeds)
    leaf = x.clone().requires_grad_()
    slope = torch.autograd.grad(loss(leaf), leaf)[0]
    return model, labels, seeds, loss, x, slope


def flat_gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def naive_chain(model, labels, keys, K, start=None, detach=False):
    """The chain as one graph: what backward_chain must equal. -> pictures, or with a start the pair of them and the
    summed squared distance of each step's tokens to the start's. detach: hold the start's constant, which is wrong."""
    L, C = model.config.seq_len, model.config.token_dim
    tokens, squares = torch.zeros(len(labels), L, C), 0.0
    for visible, predict in reveal_plan(token_orders(keys, L), K):
        n = gaussian(keys, START, predict, C)
        x0 = model.one_step(n, model.transformer(tokens, visible, labels, predict))
        if start is not None:
            ref = start.one_step(n, start.transformer(tokens, visible, labels, predict))
            squares = squares + (x0 - (ref.detach() if detach else ref)).square().sum()
        tokens = tokens.scatter(1, predict[:, :, None].expand(-1, -1, C), x0)
    return model.unpatchify(tokens) if start is None else (model.unpatchify(tokens), squares)


def shifted(model):
    """A copy some way off, frozen: as the start is to a student that has been trained."""
    other = copy.deepcopy(model).requires_grad_(False)
    other.head_net.input_proj.weight.data *= 1.1
    other.mask_token.data += 0.1
    return other


def test_chain_gradient_is_exact():
    K = 6
    model, labels, seeds, loss, x, slope = chain_problem(K)
    rl.backward_chain(model, model, x, slope, 0, 1, labels, image_keys(seeds), K)
    ours = flat_gradient(model)

    model.zero_grad()
    again = naive_chain(model, labels, image_keys(seeds), K)
    close(again, x, 1e-5)
    loss(again).backward()
    close(ours, flat_gradient(model), 1e-4)  # one graph through all steps

    with torch.no_grad():  # finite differences along the gradient: every weight at once
        start = torch.nn.utils.parameters_to_vector(model.parameters())
        step, along = 1e-3 * ours / ours.norm(), []
        for sign in (1, -1):
            torch.nn.utils.vector_to_parameters(start + sign * step, model.parameters())
            along.append(loss(model.generate(labels, K, seeds=seeds).double()))
        torch.nn.utils.vector_to_parameters(start, model.parameters())
    slope_found = (along[0] - along[1]) / (2 * step.norm())
    assert abs(slope_found / ours.norm() - 1) < 0.01, (slope_found, ours.norm())


def test_kl_gradient_is_that_of_both_chains():
    """ref_k moves with the student's earlier tokens. By one graph through student and start, for several K; held
    constant, the start gives another gradient as soon as there are two steps."""
    for K in (1, 2, 6):
        model, labels, seeds, loss, x, slope = chain_problem(K)
        keys, start, kl, s = image_keys(seeds), shifted(model), 0.7, 0.3
        kl_path = rl.backward_chain(model, start, x, slope, kl / 3, s, labels, keys, K)
        ours = flat_gradient(model)
        graphs = {}
        for detach in (False, True):
            model.zero_grad()
            again, squares = naive_chain(model, labels, keys, K, start, detach)
            KL = squares / (2 * s**2 * x[0].numel()) / 3  # nats per dimension, the mean of three pictures
            (loss(again) + kl * KL).backward()
            graphs[detach] = flat_gradient(model)
        close(kl_path, KL.detach(), 1e-4), close(ours, graphs[False], 1e-4)
        assert K == 1 or (ours - graphs[True]).norm() > 0.05 * ours.norm()


class TwoTokens(torch.nn.Module):
    """x_1 = n_1 + b, x_2 = 3 x_1 + n_2 + c: the smallest chain whose later token heeds the earlier one."""

    config = Namespace(seq_len=2, token_dim=1)

    def __init__(self, b, c):
        super().__init__()
        self.b, self.c = (torch.nn.Parameter(torch.tensor(value)) for value in (b, c))

    def patchify(self, x):
        return x.flatten(1)[:, :, None]

    def transformer(self, tokens, visible, labels, predict):
        known = tokens.gather(1, visible[:, :, None])  # (B, 0 or 1, 1)
        return 3 * known + self.c if visible.shape[1] else (self.b + 0 * tokens[:, :1])

    def one_step(self, n, c):
        return n + c


def test_kl_gradient_of_two_tokens_by_hand():
    """KL = (b^2 + c^2) / (2 s^2) from the start b = c = 0, so its gradient is (b, c) / s^2 = (20, 10). Were the start's
    second token held constant, the first would be asked to undo it: (50, 10)."""
    student, start, keys = TwoTokens(0.2, 0.1), TwoTokens(0.0, 0.0).requires_grad_(False), image_keys(range(5))
    n = gaussian(keys, START, torch.arange(2).expand(5, -1), 1)[:, :, 0]  # (5, 2)
    first = token_orders(keys, 2)[:, 1:]  # drawn first: the last of the order
    x = torch.empty(5, 2)
    x.scatter_(1, first, n.gather(1, first) + 0.2)
    x.scatter_(1, 1 - first, 3 * x.gather(1, first) + n.gather(1, 1 - first) + 0.1)
    dims = 2
    rl.backward_chain(student, start, x[:, None, None], 0 * x[:, None, None], dims / 5, 0.1, None, keys, 2)
    close(torch.stack([student.b.grad, student.c.grad]), torch.tensor([20.0, 10.0]), 1e-4)


def test_rl_gradient_is_autograds_through_the_whole_chain():
    """What Adam is given is the derivative of mean(-r + kl KL_path), by one graph through decoder, clamp and all AR
    steps of student and start: for pixels and for latents, in one micro-batch and in two."""
    torch.manual_seed(0)
    for vae, changes in ((None, {}), (TinyVAE(), LATENT)):
        with scratch() as folder, patch.object(rl, "load_vae", lambda path: vae):
            write_student(folder, **changes)
            flags = ["--vae", folder / "student.pt"] if vae else []
            found = [rl_gradient_and_autograds(folder, vae, "--accumulate", n, "--out", folder / f"in_{n}", *flags)
                     for n in (1, 2)]
            for ours, autograds in found:
                assert autograds.norm() > 1e-3
                close(ours, autograds, 1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# model.py: the networks and the diffusion are the public ones


def test_schedule_is_the_public_one():
    theirs = fixture("diffusion")
    for steps, prefix in ((1000, "train"), (10, "gen10"), (25, "gen25"), (100, "gen100")):
        ours = cosine_schedule(steps)
        close(np.exp(ours["log_beta"]), theirs[f"{prefix}_betas"], 1e-10)
        names = {"alphas_cumprod": "abar", "posterior_log_variance_clipped": "log_post_var"}
        names |= ({"timesteps": "t"} if steps < 1000 else
                  {"posterior_mean_coef1": "coef_x0", "posterior_mean_coef2": "coef_xt"})
        for name, key in names.items():
            close(ours[key], theirs[f"{prefix}_{name}"], 1e-10)
    for steps in range(2, 1001):  # which of the 1,000 are kept: MAR adds the stride up and rounds the sums
        at = itertools.accumulate([999 / (steps - 1)] * (steps - 1), initial=0.0)
        assert cosine_schedule(steps)["t"].tolist() == [round(sum_of_strides) for sum_of_strides in at]
    alpha, sigma = alpha_sigma(torch.tensor([755, 973, 999]))
    ratio = (sigma / alpha)[:, 0]  # where the student starts; the noisiest level trained; unusable
    assert abs(ratio[0] - 2.5) < 0.01 and abs(ratio[1] - 24.7) < 0.1 and abs(ratio[2] - 20291) < 300, ratio


@once("mar_tiny.pth")
def public_mar_file(folder):
    """A whole checkpoint of MAR's training: all it saves beside the networks, too."""
    model = fill(about("mar_tiny")["shapes"])
    torch.save({"model": model, "model_ema": {name: value / 2 for name, value in model.items()}, "epoch": 799,
                "optimizer": {"state": {}, "param_groups": []}, "scaler": {"scale": 65536.0},
                "args": Namespace(model="mar_tiny", **about("mar_tiny")["config"])}, folder / "mar_tiny.pth")


@once("kl16.ckpt")
def vae_file(folder):
    """The references' VAE in the layout of the public file."""
    torch.save({"model": fill(about("vae")["shapes"])}, folder / "kl16.ckpt")


def public(name, folder):
    """Fill the public network `name` of the references and save it as it is published, MAR-B with the EMA alone."""
    path, whole = folder / f"{name}.pt", about("mar_full_shapes")
    state = fill((whole.get(name) or about(name))["shapes"])
    torch.save({"model": {}, "model_ema": state} if name in whole else state, path)
    return path


def floats(images):
    """The references' uint8 (N, H, W, 3) -> [0,1] (N, 3, H, W)."""
    return images.permute(0, 3, 1, 2).float() / 255


def mar_outputs(model, z):
    tokens = model.patchify(z["latents"])
    visible = z["mask"].argsort(dim=1, stable=True)[:, :16 - int(z["mask"][0].sum())]
    assert torch.equal(model.unpatchify(tokens), z["latents"])
    return {"tokens": tokens,
            "encoded": model.encode(tokens, visible, z["labels"]),
            "z": model.condition(tokens, z["mask"], z["labels"]),
            "z_uncond": model.condition(tokens, z["mask"], None),
            "head_out": model.head(z["head_x"], z["head_t"], z["head_c"])}


def mar_base_outputs(model, z):
    assert model.config == SIZES["base"]
    c = model.condition(model.patchify(z["latents"]), z["mask"], z["labels"])
    return {"z": c[:, :z["z"].shape[1]], "head_out": model.head(z["head_x"], z["head_t"], z["z"][0, :8])}


def clip_outputs(clip, z):
    image, text = clip.encode_image(floats(z["images"])), clip.encode_text(z["tokens"].long())
    scores = torch.stack([clip.score(floats(z["images"]), t.expand_as(image)) for t in text])  # text x image
    return {"image_features": image, "text_features": text, **({"scores": scores} if "scores" in z else
                                                               {"logits": scores.T})}


def imagereward_outputs(model, z):
    pixels, ids, mask = floats(z["images"])[:1], z["input_ids"].long()[:1], z["attention_mask"][:1]
    tokens = model.image(pixels)
    z.update({name: z[name][:1] for name in ("image_tokens", "text_cls", "reward")})
    return {"image_tokens": tokens[:, :4], "text_cls": model.read_text(ids, mask, tokens),
            "reward": model.score(pixels, ids, mask)[:, None]}


def clip_size(image, text, embed, act):
    """image: width, depth, heads, mlp, patch, side; text: the first four of them."""
    names = "width depth heads mlp patch side".split()
    return {"image": dict(zip(names, image)), "text": dict(zip(names, text)), "embed": embed, "act": act}


TINY_CLIP = clip_size((64, 2, 1, 256, 8, 32), (64, 2, 1, 256), 32, fid.VIT_L14["act"])
CLIP_B32 = clip_size((768, 12, 12, 3072, 32, 224), (512, 12, 8, 2048), 512, fid.VIT_L14["act"])
TINY_PICK = clip_size((80, 2, 5, 160, 14, 28), (64, 2, 4, 128), 32, F.gelu)


def towers(clip=TINY_CLIP, pick=TINY_PICK):
    """Within it fid.load_clip and load_pickscore make networks of these sizes."""
    return patch.multiple(fid, VIT_L14=clip, VIT_H14=pick)


AGREES = {  # a network's fixture -> what opens its public file; its outputs, by the fixture's names; how close
    "mar_tiny": (lambda _: load_mar(public_mar_file(), ema=False, heads=4), mar_outputs, 1e-4),
    "mar_base": (load_mar, mar_base_outputs, 1e-4),
    "vae": (data.load_vae, lambda net, z: {
        "moments": net.moments(2 * floats(z["images"]) - 1), "decoded": net.decode(z["z"])}, 1e-4),
    "inception": (fid.load_inception, lambda net, z: {
        f"{part}_{name}": out for part in "abc"  # 32, 256 and 299 px: enlarged, enlarged, untouched
        for name, out in zip(("2048", "logits_unbiased"), net(z[f"{part}_images"].permute(0, 3, 1, 2)))}, 1e-3),
    "clip_tiny": (towers()(fid.load_clip), clip_outputs, 1e-4),
    "clip_vit_b32": (towers(CLIP_B32)(fid.load_clip), clip_outputs, 1e-4),
    "pickscore_tiny": (towers()(fid.load_pickscore), clip_outputs, 1e-4),
    "imagereward": (fid.load_imagereward, imagereward_outputs, 1e-3)}


def agrees_with_the_public_code(name):
    """The outputs of a public network, its file filled by a rule, are those of the public code."""
    load, outputs, tolerance = AGREES[name]
    with scratch() as folder, torch.no_grad():
        z = fixture(name)
        for key, ours in outputs(load(public(name, folder)), z).items():
            close(ours, z[key], tolerance)


for fixture_name in AGREES:
    globals()[f"test_{fixture_name}_agrees_with_the_public_code"] = functools.partial(
        agrees_with_the_public_code, fixture_name)


def test_a_teachers_loss_may_count_eps_as_v():
    """max_weight without limit: the squared error of v = alpha eps - sigma x0, for what eps_hat says of both; with one,
    the plain loss where 1 / alpha^2 is far above it, times it; 1 is MAR's loss to the bit."""
    torch.manual_seed(0)
    t = torch.tensor([1, 300, 700, 960])
    alpha, sigma = alpha_sigma(t)
    x0, eps, out = torch.rand(4, 3) - 0.5, torch.randn(4, 3), torch.randn(4, 6)
    x_t, eps_hat = alpha * x0 + sigma * eps, out[:, :3]
    x0_hat = (x_t - sigma * eps_hat) / alpha
    v_error = ((alpha * eps - sigma * x0) - (alpha * eps_hat - sigma * x0_hat)).square().mean(1)
    loss = lambda *limit: diffusion_loss(out, x0, x_t, t, eps, *limit)
    eps_error = (eps - eps_hat).square().mean(1)
    close(loss(math.inf) - loss() + eps_error, v_error, 1e-4)
    close((loss(5.0) - loss())[-1], 4 * eps_error[-1], 1e-5)  # there 1 / alpha^2 is 250
    assert torch.equal(loss(1.0), loss())


def replayed(draws, head_steps):
    """model.gaussian as MAR drew: `draws` in its order, each of at least (B * P, C) numbers (of the 2N rows of a guided
    chain the first N reach the result). It draws at the chain's last step too, which needs none."""
    draws = iter([draw for i, draw in enumerate(draws, start=1) if i % (head_steps + 1)])
    return lambda keys, purpose, positions, C: next(draws).view(-1, C)[:positions.numel()].view(*positions.shape, C)


def test_loss_and_sampling_runs_are_those_of_the_public_mar():
    z = fixture("mar_tiny")
    model = load_mar(public_mar_file(), ema=False, heads=4)
    tokens = model.patchify(z["latents"])
    c = model.condition(tokens, z["mask"], z["labels"]).flatten(0, 1).repeat(2, 1)  # diffusion_batch_mul 2
    x0, mask = tokens.flatten(0, 1).repeat(2, 1), z["mask"].flatten().repeat(2)
    t, eps = z["loss_t"], z["loss_noise"]
    alpha, sigma = alpha_sigma(t)
    x_t = alpha * x0 + sigma * eps
    loss = diffusion_loss(model.head(x_t, t, c), x0, x_t, t, eps)
    close((loss * mask).sum() / mask.sum(), z["loss"])
    for name, schedule in (("plain", "linear"), ("cfg_linear", "linear"), ("cfg_const_cold", "constant")):
        temperature, guidance, ar_steps, head_steps = z[f"sample_{name}_args"].tolist()
        rows = z[f"sample_{name}_noise_rows"].tolist()
        draws = z[f"sample_{name}_noise"].split([16 * n for n in rows])  # start noise, then one draw a chain step

        with patch.object(model_file, "gaussian", replayed(draws, int(head_steps))):
            out = model.generate(z["labels"], int(ar_steps), int(head_steps), guidance, guidance_schedule=schedule,
                                 temperature=temperature, orders=z[f"sample_{name}_orders"])
        close(out, z[f"sample_{name}_out"])


def test_masked_tokens_never_leak_into_the_condition():
    model, labels = tiny_mar(), torch.tensor([0, 1])
    mask = torch.zeros(2, 16)
    mask[:, ::2] = 1
    tokens = torch.randn(2, 16, 12)
    other = torch.where(mask[:, :, None] == 1, torch.randn(2, 16, 12), tokens)
    close(model.condition(tokens, mask, labels), model.condition(other, mask, labels), 0.0)


def test_orders_begin_where_they_say_and_are_revealed_once():
    keys = image_keys(range(200))
    for side in (4, 16):
        for kind in ORDERS:
            orders = token_orders(keys, side * side, kind)
            assert (orders.sort(dim=1).values == torch.arange(side * side)).all()  # each token once
            shown, first = orders.flip(1), orders[:, -1]  # the last is revealed first
            distance = torch.hypot(shown // side - (side - 1) / 2, shown % side - (side - 1) / 2)  # from the centre
            if kind == "random":
                assert abs(first.float().mean() / (side**2 - 1) - 0.5) < 0.1 and len(first.unique()) > 10
            else:  # which of the four equally far from the centre is drawn by lot
                grows, firsts = {"raster": (shown, 1), "outward": (distance, 4), "inward": (-distance, 4)}[kind]
                assert (grows.diff(dim=1) >= -1e-6).all() and len(first.unique()) == firsts
    for seq_len, ar_steps in ((16, 1), (16, 16), (256, 64), (256, 256), (64, 7)):
        orders = token_orders(image_keys(range(2)), seq_len)
        seen = torch.zeros(2, seq_len)
        for visible, predict in reveal_plan(orders, ar_steps):
            assert predict.shape[1] >= 1 and (seen.gather(1, visible) == 1).all()
            seen.scatter_add_(1, predict, torch.ones(predict.shape))
        assert (seen == 1).all()


def test_what_is_known_stays_and_the_rest_is_drawn_to_it():
    model, labels, seeds = tiny_mar(), torch.tensor([0, 1, 2]), [7, 7, 8]  # two classes of the same noise and order
    picture = torch.rand(1, 16, 12, generator=torch.Generator().manual_seed(1)) * 2 - 1
    redraw = torch.zeros(16, dtype=torch.bool)
    redraw[[1, 2, 5, 6, 7]] = True
    for how in (dict(ar_steps=3), dict(ar_steps=5, head_steps=3, guidance=2.0), dict(ar_steps=2, orders="outward")):
        steps = list(model.unmask(labels, given=picture, redraw=redraw, seeds=seeds, **how))
        assert len(steps) == how["ar_steps"]
        assert (steps[0][1] == (~redraw).nonzero()[:, 0]).all()  # the first step sees what is known, nothing else
        drawn = torch.cat([predict for _, _, predict in steps], 1).sort(dim=1).values
        assert (drawn == redraw.nonzero()[:, 0]).all()  # all that is asked for, each token once
        tokens = steps[-1][0]
        assert torch.equal(tokens[:, ~redraw], picture[:, ~redraw].expand(3, -1, -1))
        other = model.patchify(model.generate(labels, given=-picture, redraw=redraw, seeds=seeds, **how))
        # drawn after what is around it and after the class: little where weights are random, but not rounding
        assert (tokens - other)[:, redraw].abs().mean() > 1e-4
        assert (tokens[0] - tokens[1])[redraw].abs().mean() > 1e-4
    everything = torch.ones(16, dtype=torch.bool)
    assert torch.equal(model.generate(labels, 4, given=picture, redraw=everything), model.generate(labels, 4))
    refused(lambda: model.generate(labels, 1, given=picture, redraw=~everything))


def test_noise_is_standard_normal_and_has_no_state():
    keys = image_keys(range(4000))
    positions = torch.arange(16).expand(4000, 16)
    n = gaussian(keys, START, positions, 8)
    assert abs(n.mean()) < 0.006 and abs(n.var() - 1) < 0.01 and abs((n**4).mean() - 3) < 0.06
    other = gaussian(keys, CHAIN, positions, 8)
    for a, b in ((n[1:], n[:-1]), (n[:, 1:], n[:, :-1]), (n[..., 1:], n[..., :-1]), (n, other)):
        assert abs((a * b).mean()) < 0.006  # neighbouring pictures, tokens, channels, purposes: uncorrelated
    close(gaussian(keys[7:9], START, positions[:2, 3:5], 8), n[7:9, 3:5], 0.0)


def test_picture_depends_on_its_seed_and_not_on_the_batch():
    model, labels = tiny_mar(), torch.arange(64) % 4
    pairs = [(5, i) for i in range(64)]
    for head_steps in (1, 4):
        whole = model.generate(labels, 5, head_steps, 2.0, seeds=pairs)
        for size in (1, 7):
            parts = [model.generate(labels[i:i + size], 5, head_steps, 2.0, seeds=pairs[i:i + size])
                     for i in range(0, 64, size)]
            close(torch.cat(parts), whole, 1e-4)
    assert (whole[0] - model.generate(labels[:1], 5, 4, 2.0, seeds=[(6, 0)])[0]).abs().max() > 0.01


# The shortcuts of sampling against the plain path, which is written out here and nowhere else


def test_step_and_chain_with_everything_embedded_once_are_the_plain_ones():
    model, x, c, c_null = tiny_mar(), torch.randn(9, 12), torch.randn(9, 32), torch.randn(9, 32)
    s = torch.full((9,), model.config.t_init)  # the plain path: a row for each token
    alpha, sigma = alpha_sigma(s)
    eps, null = (model.head(sigma * x, s, y)[:, :12] for y in (c, c_null))
    close(model.one_step(x, c), (sigma * x - sigma * eps) / alpha, 1e-5)
    close(model.one_step(x, c, c_null, 3.0), (sigma * x - sigma * (null + 3 * (eps - null))) / alpha, 1e-5)
    noise, table, plain = torch.randn(10, 9, 12), cosine_schedule(10), x
    for j in reversed(range(10)):
        t = torch.full((9,), int(table["t"][j]))
        (eps, v), (null, _) = (model.head(plain, t, y).chunk(2, dim=1) for y in (c, c_null))
        eps = null + 3 * (eps - null)
        x0 = ((plain - (1 - table["abar"][j])**0.5 * eps) / table["abar"][j]**0.5).clamp(-1, 1)
        plain = table["coef_x0"][j] * x0 + table["coef_xt"][j] * plain
        log_var = (v + 1) / 2 * table["log_beta"][j] + (1 - v) / 2 * table["log_post_var"][j]
        plain = plain + (0.8 * torch.exp(log_var / 2) * noise[j] if j else 0)
    close(model.denoise(x, c, c_null, 3.0, 10, 0.8, lambda j: noise[j]), plain, 1e-5)


def test_dtype_is_decided_by_what_the_machine_is():
    """auto: bf16 where the CPU has instructions for it, and never by a stopwatch; pictures stay float32."""
    model, labels = tiny_mar(), torch.arange(4)
    machines = [  # --dtype, what the CPU has, its capability -> whether products are in bf16
        ("auto", {"avx512_bf16": True}, "AVX512", True), ("auto", {"amx_bf16": True}, "AVX512", True),
        ("auto", {"avx2": True}, "AVX2", False), ("bfloat16", {}, "AVX2", True),
        ("auto", {"avx512_bf16": True}, "AVX2", False),  # told so by ATEN_CPU_CAPABILITY
        ("auto", {"bf16": True}, "ARM", True), ("float32", {"bf16": True}, "ARM", False),
        ("auto", {"bf16": True}, "macOS", False)]
    plain = model.generate(labels, 4)
    with patch.object(model_file, "BF16", None), redirect_stdout(io.StringIO()):
        for dtype, has, capability, bf16 in machines:
            with (patch("torch.cpu.get_capabilities", lambda: has, create=True),  # older PyTorch has none
                  patch("torch.backends.cpu.get_cpu_capability", lambda: capability),
                  patch("torch.backends.mkldnn.is_available", lambda: capability != "macOS")):
                setup("cpu", dtype)
            images = model.generate(labels, 4)
            assert model_file.BF16 is bf16, (dtype, has, capability)
            assert images.dtype == torch.float32 and torch.equal(images, plain) is not bf16


def test_bf16_weights_give_the_bits_of_autocast():
    model, tokens, labels = tiny_mar(), torch.randn(3, 16, 12), torch.tensor([0, -1, 3])
    orders = token_orders(image_keys(range(3)), 16)
    visible, predict = orders[:, 11:].sort(dim=1).values, orders[:, 4:11].sort(dim=1).values
    weight = model.decoder_blocks[0].attn.qkv.weight.requires_grad_()
    slope = lambda c: torch.autograd.grad(c.square().sum(), weight)[0]
    plain, slow = model.transformer(tokens, visible, labels, predict), model.generate(labels, 4, 5, 2.0)
    with patch.object(model_file, "BF16", True):  # on the CPU, as on CUDA
        by_autocast = model.transformer(tokens, visible, labels, predict)
        exact = slope(plain)
        assert 1e-4 < (slope(by_autocast) - exact).norm() / exact.norm() < 0.03  # attention is written out in bf16
        assert by_autocast.dtype == torch.float32 and 1e-4 < apart({"": by_autocast}, {"": plain}) < 3e-2
        chain = model.generate(labels, 4, 5, 2.0)
        assert chain.dtype == torch.float32 and 1e-4 < apart({"": chain}, {"": slow}) < 3e-2
        assert bf16_weights(model) is model
        close(model.transformer(tokens, visible, labels, predict), by_autocast, 0.0)
        close(model.generate(labels, 4, 5, 2.0), chain, 0.0)
    kept = {name.split(".")[0] for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert {"class_emb", "fake_latent", "mask_token", "head_net", "z_proj_ln", "decoder_norm"} <= kept
    assert model.decoder_blocks[1].mlp.fc1.weight.dtype == model.z_proj.bias.dtype == torch.bfloat16


class HostTraffic(TorchDispatchMode):
    """Fails at whatever would make a GPU wait for the host: with the device "meta" in the GPU's place, a copy from
    the CPU to it. (Reading a value of it, as .item() does, is an error of PyTorch's own: meta tensors have none.)"""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        devices = {x.device.type for x in tree_leaves((args, kwargs, out)) if torch.is_tensor(x)}
        assert devices != {"cpu", "meta"}, f"{func} copies between host and device"
        return out


def test_sampling_neither_waits_for_the_device_nor_copies_to_it():
    """What a CUDA graph needs, and can be shown without a GPU: after a warm-up no AR step touches the host."""
    with torch.device("meta"):
        model, labels, seeds = MAR(tiny_config()).eval(), torch.zeros(3).long(), torch.zeros(3, 2).long()
    for head_steps, guidance in ((1, 1.0), (1, 2.0), (4, 2.0)):
        model.generate(labels, 5, head_steps, guidance, seeds=seeds)  # copies the schedule's tables, and keeps them
        with HostTraffic():
            model.generate(labels, 5, head_steps, guidance, seeds=seeds)
    with HostTraffic():
        other_chain = lambda: model.generate(labels, 5, 6, 2.0, seeds=seeds)  # whose table is not there yet
        refused(other_chain, "copies between host and device", by=AssertionError)


def test_checkpoints_that_do_not_fit_are_refused(folder):
    """And what one could run is not run."""
    model = tiny_mar()
    good = {"config": asdict(model.config), "stage": "teacher", "ema": model.state_dict(), "args": {}, "step": 1}
    less = {name: value for name, value in good["ema"].items() if name != "mask_token"}
    settings = [("heads", 0), ("heads", 3), ("width", "32"), ("dropout", 2.0), ("encoder_depth", -1), ("t_init", 1000),
                ("patch_size", True), ("mask_ratio_min", math.nan), ("encoder_depth", 65536)]
    made = [("ar_steps", None), ("ar_steps", "8"), ("ar_steps", 0), ("teacher_head_steps", 1001),
            ("guidance", math.nan)]
    save_checkpoint(good, folder / "good.pt")
    refused_files(folder, [
        (load_mar, {"model": {"decoder.conv_in.weight": torch.zeros(2)}}, "no MAR checkpoint"),
        (load_mar, {**good, "ema": {**less, "extra": torch.zeros(2)}}, "mask_token is missing", "extra is (2,), not"),
        (load_mar, {**good, "config": {**good["config"], "depth": 2}}, "'depth'"),
        (load_mar, {**good, "stage": "foo"}, "stage 'foo' is none of teacher, student, rl"),
        *((load_mar, {**good, "config": {**good["config"], name: value}}, f"{name} {value!r}")
          for name, value in settings),
        *((load_mar, {**good, "args": {name: value}}, f"{name} {value!r}") for name, value in made),
        *((load_mar, {**good, "class_names": names}) for names in (["ant"], 7, [*"abc", None])),
        (lambda path: load_mar(path, patch_size=1), good, "z_proj.weight is (32, 12), not (32, 3)"),
        (load_mar, (folder / "good.pt").read_bytes()[:20000], "truncated"),
        (load_mar, f"cos\nsystem\n(S'touch {folder}/owned'\ntR.".encode(), "it holds an object of os.system")])
    assert not (folder / "owned").exists()
    for path, words in (("nothing.pt", "no such file"), ("", "that is a folder")):
        refused(lambda: load_mar(folder / path), words)


def test_a_checkpoint_may_lack_all_but_settings_and_weights(folder):
    write_student(folder)
    whole, optional = read_checkpoint(folder / "student.pt"), ("stage", "step", "args", "class_names")
    for lacks in itertools.chain.from_iterable(itertools.combinations(optional, n) for n in range(5)):
        save_checkpoint({key: value for key, value in whole.items() if key not in lacks}, folder / "slim.pt")
        with redirect_stdout(io.StringIO()) as said:
            model = load_mar(folder / "slim.pt")
        assert ("names no stage" in said.getvalue()) == ("stage" in lacks)
        assert model.stage == ("teacher" if "stage" in lacks else "student")
        assert model.made == ({} if "args" in lacks else whole["args"])
        assert model.class_names == (None if "class_names" in lacks else SHAPES)
    save_checkpoint({key: whole[key] for key in ("config", "ema", "stage")}, folder / "slim.pt")
    said = sample_main(folder / "slim.pt", "--classes", 0, "--per_class", 1, "--out", folder / "x.png")
    assert "K = 16, head steps 1, guidance 1.0" in said, said
    run_rl(folder, "--ckpt", folder / "slim.pt", "--out", folder / "slim", "--steps", 1)
    assert read_checkpoint(folder / "slim/student.pt")["args"]["ar_steps"] == 16


def test_checkpoints_are_read_as_people_keep_them(folder):
    """Whatever stands before the names, wherever the weights lie, with args as an object, a dict or not at all."""
    model = tiny_mar(**LATENT, width=48, heads=4)
    state = {name.replace("head_net.", "diffloss.net."): value for name, value in model.state_dict().items()}
    other = {name: value + 1 for name, value in state.items()}
    before = lambda prefix: {prefix + name: value for name, value in state.items()}
    inner = {name.replace("blocks.0.", "blocks.0._orig_mod."): value for name, value in state.items()}
    kept = {"bare": state,
            "model_ema": {"model": other, "model_ema": state},
            "ddp": {"model": other, "model_ema": before("module.")},
            "compiled": {"model": before("_orig_mod.")},
            "compiled blocks": {"model": inner},
            "lightning": {"state_dict": before("model.")},
            "no ema": {"model": state, "model_ema": None},
            "shadow": {"model": state, "ema": {"decay": 0.9, "shadow_params": [*state.values()]}},
            "dict": {"model": state, "args": {"vae_stride": 16, "vae_embed_dim": 16}},
            "half": {"model": {name: value.half() for name, value in state.items()}}}
    for name, file in kept.items():
        torch.save(file, folder / name)
        loaded = load_mar(folder / name, heads=4)
        assert loaded.config == replace(model.config, dropout=0.1, mask_ratio_min=0.7, t_init=755), name
        close(loaded.mask_token, model.mask_token, 1e-3)
    close(load_mar(folder / "model_ema", ema=False, heads=4).mask_token, model.mask_token + 1, 0.0)
    load, bias = functools.partial(load_mar, heads=4), "diffloss.net.cond_embed.bias"
    refused_files(folder, [
        (load_mar, state, "width 48", "heads=N"),
        (load, {"model": {**state, bias: torch.zeros(9)}}, bias, "is (9,)"),
        (load, {"model": {**state, bias: torch.ones(48).char()}}, bias, "torch.int8"),
        (load, {"model": {**state, bias: "x"}}, bias, "missing"),
        (load, {"model": state, "args": {"vae_embed_dim": "16"}}, "TypeError"),
        (load, {"model": state, "args": {"vae_embed_dim": 17}}, "no network has img_size 0"),
        (load_mar, {"model": state, "args": Namespace(x=Path("x"))}, "it holds an object of", "pathl"),
        (load_mar, {"model": state, "args": Namespace(x=np.float64(1.5))}, "it holds an object of", "numpy")])


def test_checkpoint_write_is_all_or_nothing(folder):
    path = folder / "x.pt"
    save_checkpoint({"a": torch.ones(3)}, path)
    before = path.read_bytes()
    refused(lambda: save_checkpoint({"a": lambda: 0}, path), by=Exception)  # fails half-way
    assert path.read_bytes() == before and [p.name for p in folder.iterdir()] == ["x.pt"]


# ----------------------------------------------------------------------------------------------------------------------
# distill.py: the loss


def test_muon_moves_each_matrix_along_an_orthogonal_one():
    """Singular values of an update are about 1 whatever the gradient's; a step is the textbook's, with an SVD in the
    place of Newton-Schulz; and what is not a matrix of a block is AdamW's."""
    torch.manual_seed(0)
    for shape in ((3, 24, 24), (2, 16, 48), (2, 48, 16)):
        values = torch.linalg.svdvals(distill.orthogonal(torch.randn(shape) * 1e-3))
        assert (values[:, :-2] > 0.6).all() and (values < 1.3).all(), values
    model = tiny_mar().requires_grad_(True)
    args = Namespace(teacher_optimizer="muon", teacher_lr=0.01)
    optimizers = distill.teacher_optimizers(model, args)
    (group,) = optimizers["muon"].param_groups
    by_adam = [p for group in optimizers["optimizer"].param_groups for p in group["params"]]
    assert {*map(id, group["params"])} ^ {*map(id, by_adam)} == {*map(id, model.parameters())}
    p, momentum = model.encoder_blocks[1].mlp.fc1.weight, 0.0  # 128 x 32
    for _ in range(3):
        for q in group["params"]:
            q.grad = torch.randn_like(q)
        momentum, before = 0.95 * momentum + 0.05 * p.grad, p.detach().clone()
        optimizers["muon"].step()
        U, _, V = torch.linalg.svd(0.05 * p.grad + 0.95 * momentum, full_matrices=False)
        textbook = before * (1 - 0.01 * 0.02) - 0.01 * 0.2 * 128**0.5 * U @ V
        assert F.cosine_similarity((p - before).flatten(), (textbook - before).flatten(), dim=0) > 0.98
        assert abs((p - before).norm() / (textbook - before).norm() - 1) < 0.2


def test_average_of_weights_and_levels_of_the_losses(folder):
    """update_ema keeps `decay` of the old. Time steps are uniform over a range with both its ends, and the student's
    are T_MIN..T_MAX, the critic's and the teacher's all 1,000."""
    ema, model = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    ema.weight.data.fill_(1.0), model.weight.data.fill_(2.0)
    distill.update_ema(ema, model, 0.9)
    assert abs(ema.weight.item() - 1.1) < 1e-6 and model.weight.item() == 2.0
    places = torch.arange(8).expand(5000, -1)
    steps = distill.noised(torch.zeros(5000, 8, 1), image_keys(range(5000)), distill.STUDENT, places, 3, 12)[1]
    counts = torch.bincount(steps.flatten(), minlength=14)[3:13]
    assert counts.sum() == 40000 and (counts - 4000).abs().max() < 5 * 4000**0.5, counts

    seen, real = {}, distill.noised
    def noted(x0, keys, purpose, *rest):
        found = real(x0, keys, purpose, *rest)
        seen.setdefault(purpose - purpose % 64, []).append(found[1].flatten())  # the teacher's draws are TEACHER + i
        return found

    with patch.object(distill, "noised", noted):
        blind_distill(folder, "--teacher_batch", 64, "--batch", 64)
    for purpose, low, high in ((distill.STUDENT, 20, 973), (distill.CRITIC, 0, 999), (distill.TEACHER, 0, 999)):
        t = torch.cat(seen[purpose])
        assert low <= t.min() < low + 15 and len(t) > 1500, purpose
        assert high - 15 < t.max() <= high, purpose


def test_distillation_brings_the_student_to_the_data(folder):
    """One step of a teacher of 200 updates is a blur; 50 updates by either loss must take much of that away.
    Measured on the tokens themselves: Frechet distance of their Gaussian to the data's."""
    def distance(folder, name, **how):
        model = load_mar(folder / name)
        tokens = model.patchify(model.generate(labels, 4, **how)).flatten(0, 1)
        return fid.frechet_distance(*fid.mean_and_covariance(tokens), *real)

    shapes, labels = open_data("shapes"), torch.arange(512) % 8
    small = replace(SIZES["shapes"], width=48, encoder_depth=2, decoder_depth=2, head_depth=2, head_width=96)
    model = MAR(small)
    real = fid.mean_and_covariance(model.patchify(shapes.batch(np.arange(2048), np.zeros(2048, bool))[0]).flatten(0, 1))
    with patch.dict(globals(), TINY_SHAPES=small):
        blind_distill(folder, "--teacher_steps", 200, "--teacher_batch", 16, "--steps", 0, "--save_every", 999)
        start, said = distance(folder, "teacher.pt", guidance=2.0, guidance_schedule="constant"), []
        for loss in ("gsim", "vsd"):
            blind_distill(folder / loss, "--teacher", folder / "teacher.pt", "--teacher_steps", 0, "--steps", 50,
                          "--batch", 16, "--save_every", 999, "--loss", loss)
            said.append(distance(folder / loss, "student.pt"))
    assert max(said) < 0.65 * start, (start, said)
    return f"one step of the teacher {start:.2f}, students by gsim and vsd {said[0]:.2f}, {said[1]:.2f}"


def test_masked_share_follows_the_public_distribution():
    counts = np.array([distill.masked_count(SIZES["base"], 0, step) for step in range(4000)])
    assert 180 <= counts.min() and counts.max() <= 256
    assert abs(counts.mean() / 256 - 0.867) < 0.006


# ----------------------------------------------------------------------------------------------------------------------
# distill.py: the program

TINY = ("--data shapes --device cpu --teacher_batch 8 --steps 6 --batch 8 --ar_steps 4 --teacher_head_steps 4 "
        "--eval_images 16 --eval_every 4 --log_every 2 --save_every 1")
NO_DATA = ("--data", "", "--teacher")  # after TINY: of the student's own contexts


@once("classifier_0.pt")
def shapes_classifier(folder):
    """The shapes' classifier, trained once for all tests, by 200 updates and not 480: good enough here."""
    with patch.object(fid, "tqdm", lambda steps, **_: steps[:200]):
        load_or_train_classifier(open_data("shapes"), folder)


class Blind:
    """Stands in for the judges of distill.py and rl.py, where only training is looked at."""
    rows = {}
    __init__ = lambda *_: None
    look = show = lambda *_, **__: {}


def untrained_classifier(data, seed, device="cpu"):
    """In the place of fid.train_classifier: random weights, where it does not matter what has been learned."""
    torch.manual_seed(seed)
    net = fid.Classifier(data.num_classes, data.img_size).eval().requires_grad_(False)
    net.accuracy = 0.5
    with patch.object(fid, "evenly", lambda data: np.arange(0, len(data), max(1, len(data) // 500))):
        net.reference = fid.statistics_of(net, data)
    return net


@contextmanager
def all_tiny():
    """Within it the network of size "shapes" is tiny, classifiers are not trained, and what is printed is kept."""
    with (patch.dict(SIZES, shapes=TINY_SHAPES), patch.object(fid, "train_classifier", untrained_classifier),
          redirect_stdout(io.StringIO()) as said):
        yield said


def tiny_distill(out, *flags):
    """distill.py in this process with TINY's flags, of a tiny network, by a teacher of 6 updates if none is given: ->
    what it printed."""
    teacher = [] if "--teacher" in flags else ["--teacher_steps", "6"]
    with all_tiny() as said:
        distill.main([*TINY.split(), *teacher, "--out", str(out), *map(str, flags)])
    return said.getvalue()


def blind_distill(out, *flags):
    """The same without its judge."""
    with patch.object(distill, "Watch", Blind):
        return tiny_distill(out, *flags)


@once()
def whole_run(folder):
    """A run that nothing disturbed, made once for all tests."""
    tiny_distill(folder, "--log_every", 1)


def table_of(folder):
    """A run's table, {} where there is none."""
    path = folder / "results.json"
    return json.loads(path.read_text()) if path.exists() else {}


def saved(folder):
    """A run's last checkpoint."""
    return read_checkpoint(folder / "resume.pt")


def log_of(folder):
    """A run's log: a dict a line."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_alike(whole, other):
    """Two runs' folders tell of the same run: networks, optimiser, products, log and table, but for the clock."""
    names, others = ({path.name for path in run.glob("*.pt")} for run in (whole, other))
    assert names == others and len(tree_leaves(saved(whole))) > 30, (names, others)
    for name in names:
        a, b = (tree_leaves({**read_checkpoint(run / name), "args": None, "log_bytes": 0}) for run in (whole, other))
        assert all(x == y if not torch.is_tensor(x) else torch.equal(x, y) for x, y in zip(a, b, strict=True)), name
    told = [[*enumerate(log_of(run)), *table_of(run).items()] for run in (whole, other)]
    for _, row in itertools.chain(*told):
        row.get("eval", row).pop("seconds_per_image", None)
        row.pop("images_per_s", None)
    assert told[0] == told[1], told


def apart(ours, theirs):
    """|ours - theirs| / |theirs| of two state dicts, all tensors together."""
    squares = lambda state: sum(value.double().square().sum() for value in state.values())
    return (squares({name: ours[name] - theirs[name] for name in theirs}) / squares(theirs)).sqrt().item()


def test_two_processes_train_as_one_end_to_end(folder):
    """By their judges, who see whole runs of both programs. The next test compares the networks."""
    write_student(folder)
    reward = lambda name: run_rl(folder, "--out", folder / name, "--steps", 2)
    reward("one")
    on_ranks(2, lambda: (tiny_distill(folder / "distill", "--log_every", 1), reward("two")))
    for name in ("config.json", "log.jsonl", "results.json", "teacher.pt", "student.pt", "grid_000006.png"):
        assert (whole_run() / name).is_file() and (folder / "distill" / name).is_file(), name
    assert set(table_of(whole_run())) == {"teacher_4", "teacher_1", "student"}
    for one, two, name in ((folder / "one", folder / "two", "after"), (whole_run(), folder / "distill", "teacher_4"),
                           (whole_run(), folder / "distill", "student")):
        one, two = (table_of(run)[name]["fd"] for run in (one, two))
        assert abs(two / one - 1) < 1e-3, (name, one, two)


TRAINED = {  # what is trained -> the program, and its flags for n updates from folder/teacher.pt or folder/student.pt
    "teacher": (distill, "--data shapes --teacher_batch 8 --teacher_steps {n} --steps 0"),
    "student": (distill, "--data shapes --teacher {folder}/teacher.pt --steps {n} --lr 1e-4 --critic_lr 1e-4"),
    "own": (distill, "--teacher {folder}/teacher.pt --steps {n} --lr 1e-4 --critic_lr 1e-4 --guidance 2"),
    "rl": (rl, "--data shapes --ckpt {folder}/student.pt --reward red --watch --steps {n} --calls 8 --ar_steps 2")}
LOOSE = {  # to what they agree, if not to 1e-6
    # REINFORCE's v is a difference of rewards that agree in their first digits: it loses those
    ("rl model", "gradient"): 1e-5,
    # contexts that differ by rounding, here because each process draws its own, move GSIM's gradient of this random
    # network by 1e-3, and no more when they differ a hundred times as much
    ("own model", "gradient"): 3e-3, ("own model", "parameters"): 1e-4, ("own critic", "parameters"): 2e-6}


def one_and_twenty_steps_of_everything(folder, out, parts=1):
    """What is TRAINED, for one step, and for 20, on as many processes as there are, each in so many parts: into
    folder/out/NAME_N."""
    with all_tiny(), patch.object(distill, "Watch", Blind), patch.object(rl, "Watch", Blind):
        for n, (name, (program, flags)) in itertools.product((1, 20), TRAINED.items()):
            program.main([*flags.format(n=n, folder=folder).split(), "--device", "cpu", "--batch", "8", "--log_every",
                          "20", "--accumulate", str(parts), "--out", f"{folder}/{out}/{name}_{n}"])


def test_one_two_and_four_processes_train_alike(folder):
    """The same batch on 1, 2 (in two parts each) and 4 processes: gradients of a step, and parameters after 20, agree
    to 1e-6 (relative, float32), of all networks that are trained."""
    # What is left is rounding, which training magnifies: about twofold every 3 steps at the student's rates of shapes
    # (5e-4, beta_1 = 0), so with those it is 3e-6 to 9e-6 after 20 steps. Much of it sits in the bias of attention's
    # keys, whose gradient is zero by symmetry: Adam makes full steps of its rounding. No output knows of it.
    for stage in ("teacher", "student"):
        tiny_mar(folder, stage, **PIXELS_16)
    one_and_twenty_steps_of_everything(folder, 1)
    worst = {}
    for world in (2, 4):
        on_ranks(world, lambda: one_and_twenty_steps_of_everything(folder, world, parts=4 // world))
        for name in TRAINED:
            one, many = ([saved(folder / f"{w}" / f"{name}_{n}") for n in (1, 20)] for w in (1, world))
            for network in sorted(one[0].keys() & {"model", "critic"}):
                optimizer = "critic_optimizer" if network == "critic" else "optimizer"
                g, h = ({i: state["exp_avg"] for i, state in z[0][optimizer]["state"].items()} for z in (many, one))
                for what, ours, theirs in (("gradient", g, h), ("parameters", many[1][network], one[1][network])):
                    key = f"{name} {network}", what
                    worst[key] = max(apart(ours, theirs), worst.get(key, 0))  # in this order a NaN stays
                moved = apart(one[1][network], one[0][network])
                assert moved > 1e-4, f"{name} hardly moved: {moved}"
    assert LOOSE.keys() < worst.keys() and len(worst) == 12, worst
    assert all(error < LOOSE.get(key, 1e-6) for key, error in worst.items()), worst
    return ", ".join(f"{name}'s {what} {error:.0e}" for (name, what), error in worst.items())


def test_own_contexts_are_the_students_pictures_and_no_data_are_read(folder):
    """The first drawing is the start's, of (seed, place), of all classes alike often; later ones are the average's."""
    teacher = tiny_mar(folder, "teacher", img_size=16, patch_size=4, num_classes=4)
    judge = Path(shutil.copy(HERE / "assets/cifar10/classifier_0.pt", folder)).read_bytes()
    no_data = patch.object(distill, "open_data", Mock(side_effect=AssertionError("data were opened")))
    with no_data, patch.object(distill, "check_names"):
        blind_distill(folder / "run", *NO_DATA, folder / "teacher.pt", "--steps", 17, "--ar_steps", 8, "--lr", "1e-3",
                      "--warmup", 0, "--ema", 0.5, "--seed", 5)
    assert (folder / "run" / "classifier_0.pt").read_bytes() == judge  # rl.py looks for it there
    file = saved(folder / "run")
    pool, labels = file["pool"]["tokens"], file["pool"]["labels"]
    assert labels.view(-1, 8)[:3].sort(1).values.tolist() == [[0, 0, 1, 1, 2, 2, 3, 3]] * 3  # updates 0, 8, 16
    assert not labels[24:].any() and not pool[24:].any()
    for start in (0, 8, 16):
        seeds, part = [(7, i) for i in range(start, start + 8)], slice(start, start + 8)
        drawn = teacher.patchify(teacher.generate(labels[part], 8, seeds=seeds))
        if start == 0:
            close(pool[part], drawn, 1e-5)
        else:
            assert apart({"": pool[part]}, {"": drawn}) > 1e-4, "drawn by the start, not by the average"
    assert apart(file["model"], teacher.state_dict()) > 1e-3


def test_the_student_in_assets_draws_the_classes_and_so_do_its_own_contexts():
    """100 pictures, judged without data; README has the figures of more. FD of so few is higher."""
    teacher, student = (load_mar(HERE / "assets/cifar10" / f"{name}.pt") for name in ("teacher", "student"))
    classifier, labels = fid.load_classifier(HERE / "assets/cifar10/classifier_0.pt"), torch.arange(100) % 10
    rows = [fid.judge(classifier, draw(model, labels, ar_steps=8), labels) for model in (student, teacher)]
    assert rows[0]["accuracy"] > 0.6
    assert rows[0]["fd"] < 35 < 100 < rows[1]["fd"], rows  # the teacher: in one step
    pool = distill.OwnPictures(student.config, 40)
    pool.pictures(student, 0, 0, one_of())
    assert pool.labels[:40].bincount().tolist() == [4] * 10
    assert fid.judge(classifier, to_uint8(student.unpatchify(pool.tokens[:40])), pool.labels[:40])["accuracy"] > 0.5
    return "; ".join(f"{who} FD {row['fd']:.1f}, accuracy {row['accuracy']:.3f}"
                     for who, row in zip(("student", "teacher in one step"), rows))


def test_without_data_the_teacher_decides_the_defaults_and_the_folder(folder):
    for size in ("shapes", "cifar10_cpu"):
        path = f"{folder}/{size}/teacher.pt"
        os.mkdir(folder / size)
        save_checkpoint({"config": asdict(SIZES[size]), "args": {"ar_steps": 5}}, path)
        args = distill.parse_args(["--teacher", path, "--size", "cifar10"])  # the teacher's size, not --size
        wanted = {**distill.DEFAULTS[size], "teacher": path, "teacher_steps": 0, "out": f"out/{size}", "data": None,
                  "ar_steps": 5, "size": "cifar10"}
        assert wanted.items() <= vars(args).items(), vars(args)
    for flags in [], ["--teacher", PUBLIC["mar_large"][1]]:
        args = distill.parse_args(flags)
        assert (args.out, args.teacher) == ("out/imagenet", (flags or [PUBLIC["mar_base"][1]])[-1])
    args = distill.parse_args(["--data", "cifar10", "--size", "cifar10_cpu"])
    assert (args.batch, args.out, args.teacher) == (16, "out/cifar10", None)
    parsed = distill.parse_args(["--data", "photos", "--teacher_steps", "5"])  # one is trained, so none is read
    assert parsed.teacher is None and distill.parse_args(["--data", "photos"]).teacher


def one_of(rank=0, world=1):
    """What training_batch asks of a Run: who draws which share."""
    return Namespace(rank=rank, world=world, upload=lambda x: x)


def ours_beside_ddp():
    """4 steps of two micro-batches on each rank, ours and by torch's DDP. Rank 0 prints how far they are apart."""
    _, rank, world = setup("cpu")
    config = replace(SIZES["cifar10_cpu"], num_classes=8)
    shapes = open_data("shapes", img_size=config.img_size)
    torch.manual_seed(rank)  # different weights, so that both have to start from rank 0's
    model = MAR(config)
    theirs = copy.deepcopy(model)
    theirs.forward = lambda *batch: distill.teacher_loss(theirs, *batch, 2)  # what DDP takes hold of
    ddp = torch.nn.parallel.DistributedDataParallel(theirs, gradient_as_bucket_view=True)
    gradients, norms_apart = Gradients(model), []
    optimizer, their_optimizer = (distill.make_optimizer(m, 1e-3, (0.9, 0.95), 0.02) for m in (model, theirs))
    for step in range(4):
        pictures = distill.real_pictures(shapes, model, 8, 0, step, one_of(rank, world))
        batch = distill.training_batch(pictures, config, 8, 0, step, one_of(rank, world))
        for part in distill.micro_batches(batch, 2, [gradients]):
            (distill.teacher_loss(model, *part, 2) / 2).backward()
        norm = gradients.finish(0.1)
        optimizer.step()

        their_optimizer.zero_grad(set_to_none=False)
        first, last = zip(*(tensor.chunk(2) for tensor in batch))
        with ddp.no_sync():
            (ddp(*first) / 2).backward()
        (ddp(*last) / 2).backward()
        their_norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.1)
        their_optimizer.step()
        norms_apart.append(abs(norm / their_norm - 1).item())
    parameters = apart(model.state_dict(), theirs.state_dict())
    assert parameters < 1e-6 and max(norms_apart) < 1e-6, (parameters, norms_apart)
    if rank == 0:
        print(f"parameters {parameters:.0e}, norms {max(norms_apart):.0e} apart")


def test_gradients_are_those_of_torchs_ddp():
    """The same training by Gradients and by torch.nn.parallel.DistributedDataParallel, two micro-batches a step:
    parameters and norms agree to 1e-6."""
    return on_ranks(2, ours_beside_ddp).splitlines()[-1]


def test_flags_of_the_loss_change_the_student(folder):
    """By more than a thirtieth of the way that it goes without them."""
    tiny_mar(folder, "teacher", **PIXELS_16, decoder_depth=3)
    students = {}
    for flags, by_size in (((), {}), (("--loss", "vsd"), {}), (("--dtype", "bfloat16"), {}), (("--guidance", 1), {}),
                           ((), {"t_guided": 1000}), ((), {"low_weight": 1.0}), ((), {"fine_weight": 9.0})):
        name = f"{flags}{by_size}"
        with patch.dict(distill.DEFAULTS["shapes"], by_size):
            blind_distill(folder / name, "--teacher", folder / "teacher.pt", "--steps", 2, *flags)
        students[name] = saved(folder / name)["model"]
    plain = students.pop("(){}")
    moved = apart(read_checkpoint(folder / "teacher.pt")["ema"], plain)
    for name, other in students.items():
        assert apart(other, plain) > 0.03 * moved, name


def test_help_shows_the_defaults_that_hold():
    steps = distill.DEFAULTS["shapes"]["steps"]
    for main, argv, wanted in ((distill.main, "--data shapes", f"--steps STEPS updates of stage 1 (default: {steps})"),
                               (distill.main, "", "--steps STEPS updates of stage 1 (default: 150000)"),
                               (distill.main, f"--teacher {HERE}/assets/cifar10/teacher.pt",
                                "scale baked into the student; 1 = none, 1.2 is the paper's: a student wants less than "
                                "its teacher's sampler (default: 2.0)"),
                               (rl.main, "--data shapes", "--steps STEPS updates (default: 120)"),
                               (rl.main, f"--ckpt {HERE}/assets/cifar10/student.pt", "--kl KL")):
        said = heard(lambda: refused(lambda: main([*argv.split(), "--help"]), by=SystemExit))
        assert wanted in " ".join(said.split()), (argv, said)
        assert "(default: None)" not in said and "(default: False)" not in said


def test_classes_are_compared_by_their_names(folder):
    """Of a teacher or a student with the data's, where both have some: as many, otherwise named, is no match."""
    renamed = {  # a network's class names -> what the line says of the first that differs from SHAPES; None: it goes on
        "sorted": (sorted(SHAPES), "class 0 of", f"is {sorted(SHAPES)[0]}", f"it is {SHAPES[0]}"),
        "last": ([*SHAPES[:-1], "tree"], "class 7 of", "is tree", f"it is {SHAPES[-1]}"),
        "swapped": ([*SHAPES[:2], SHAPES[3], SHAPES[2], *SHAPES[4:]], "class 2 of", f"is {SHAPES[3]}"),
        "Capitals": ([name.upper() for name in SHAPES], "class 0 of"),
        "none": (None, None), "numbers": ([*map(str, range(8))], None), "alike": (SHAPES, None)}
    tiny_mar(folder, "teacher", **PIXELS_16)
    write_student(folder)
    for kind, (names, *words) in renamed.items():
        for stage in ("teacher", "student"):
            file = read_checkpoint(folder / f"{stage}.pt")
            save_checkpoint({**file, "class_names": names}, folder / f"{stage}_{kind}.pt")
        teach = lambda *flags: blind_distill(*flags, "--teacher", folder / f"teacher_{kind}.pt")
        reward = lambda out, *flags: run_rl(folder, "--out", out, *flags, "--ckpt", folder / f"student_{kind}.pt")
        for data, program in itertools.product(("shapes", ""), (teach, reward)):  # "": by the classifiers beside them
            out = folder / f"{data}_{kind}_{program is teach}"
            go = lambda: program(out, "--steps", 1, "--data", data)
            if words == [None]:
                warned = "names no classes: its class 0 is taken for disc" in go()
                assert warned == (kind in ("none", "numbers") and data == "shapes"), (kind, data)
            else:
                refused(go, *words)
            assert out.exists() == (words == [None])


def test_resume_with_other_flags_goes_on_or_says_why_not(folder):
    """What does not fit, or another teacher or start under the same name, is refused. What fits and differs is told,
    and holds; so is the same file under another name."""
    tiny_mar(folder, "teacher", **PIXELS_16)
    write_student(folder)
    own = lambda *more: blind_distill(folder / "own", *NO_DATA, folder / "teacher.pt", "--steps", 1, *more)
    run = lambda *more: blind_distill(folder / "run", *more)
    teach = lambda name, *more: blind_distill(folder / "d", "--teacher", folder / name, *more)
    reward = lambda name, *more: run_rl(folder, "--ckpt", folder / name, "--out", folder / "r", *more)
    own(), run()
    with patch.dict(os.environ, TORCHELASTIC_RESTART_COUNT="1"):  # torchrun's second life, after a refusal
        refused(lambda: run("--lr", "1e-5"), "lr 1e-05 (was 0.0005)")
    refused(lambda: own("--resume", "--batch", 16), "batch 16 (was 8)")
    refused(lambda: run("--resume", "--teacher", folder / "teacher.pt"), "teacher_sha256 ", "(was None)")
    refused(lambda: own("--resume", "--data", "shapes"), "for these flags", "OwnPictures")
    refused(lambda: run_rl(folder, "--resume", "--out", folder / "run"), "another program (its stage is student")
    said = run("--resume", "--steps", 8, "--lr", "1e-5")
    assert "other flags: steps 8 (was 6), lr 1e-05 (was 0.0005)" in said, said
    assert saved(folder / "run")["step"] == 8
    assert load_mar(folder / "run/resume.pt").config == TINY_SHAPES  # a checkpoint like others: can be drawn
    for stage, go, out in (("teacher", teach, "d"), ("student", reward, "r")):
        go(f"{stage}.pt", "--steps", 1)
        shutil.move(folder / f"{stage}.pt", folder / f"moved_{stage}.pt")
        go(f"moved_{stage}.pt", "--steps", 2, "--resume")
        save_checkpoint({**read_checkpoint(folder / f"moved_{stage}.pt"), "step": 7}, folder / f"{stage}.pt")
        refused(lambda: go(f"{stage}.pt", "--steps", 3, "--resume"), "cannot go on with", "_sha256 ")
        assert saved(folder / out)["step"] == 2


def test_a_second_signal_ends_at_once(folder):
    """torchrun passes on what the terminal has sent already: within a second it is the same signal."""
    def signals():
        for now in (0, 0.6, 1.2):  # the last is 1.2 s after the first, if 0.6 s after the one before
            os.write(1, f"{now} ".encode())
            with patch.object(distill.time, "time", lambda: now):
                signal.raise_signal(signal.SIGINT)

    with happens_at(2, signals, (distill, "update_ema")):
        result = Command(lambda: blind_distill(folder)).ended()
    assert result.returncode == -signal.SIGINT and result.stdout == "0 0.6 1.2 ", result
    assert "stopping after an update; once more ends now" in result.stderr


def test_a_run_that_ends_anywhere_and_resumes_is_bit_exact(folder):
    """Networks, optimisers, log, table and best.pt are in the end those of a run left alone: no step is told twice.
    After a signal in the loop no more than the update in hand is made, and saved, whatever --save_every says."""
    KILL, INT, TERM = signal.SIGKILL, signal.SIGINT, signal.SIGTERM
    ends = [  # program; function and which call of it; signal, exit code; stage, step and rows that are kept by then
        (distill, (distill, "update_ema"), 4, KILL, -KILL, "teacher", 3, 0),
        (distill, (distill, "update_ema"), 10, KILL, -KILL, "student", 3, 2),
        (distill, (distill, "update_ema"), 9, INT, 130, "student", 3, 2),  # in an update: it is the last, and saved
        (distill, (distill, "draw_together"), 5, TERM, 0, "student", 5, 3),  # in a look: so is the update after it
        (distill, (distill, "save_checkpoint"), 8, INT, 130, "student", 6, 3),  # in the last save: before the look
        (rl, (rl, "update_ema"), 4, KILL, -KILL, "rl", 3, 3),  # "after" and "best" of step 3 come before the next one
        (rl, (distill, "save_checkpoint"), 4, KILL, -KILL, "rl", 2, 1),  # between student.pt and resume.pt
        (rl, (distill, "write_json"), 3, KILL, -KILL, "rl", 3, 1),
        (rl, (distill, "save_checkpoint"), 5, KILL, -KILL, "rl", 3, 2),  # between the row "after" and best.pt
        (rl, (distill, "draw_together"), 4, TERM, 0, "rl", 4, 3),
        (rl, (distill, "draw_together"), 6, TERM, -TERM, "rl", 6, 3)]  # after the loop all is saved: at once
    write_student(folder)
    reward = ("--steps", 6, "--eval_every", 3, "--lr", "3e-3", "--ema", 0.5, "--kl", 0)
    runs = {distill: lambda out, *more: tiny_distill(out, "--log_every", 1, *more),
            rl: lambda out, *more: run_rl(folder, *reward, "--out", out, *more)}
    aloud = patch.object(distill, "say", lambda text: os.write(1, text.encode()))
    with patch.multiple(rl, MAX_DISTANCE=9, MIN_MODES=0):
        runs[rl](folder / "whole")
        for i, (program, place, count, number, code, stage, step, rows) in enumerate(ends):
            out, rarely = folder / f"{i}", ["--save_every", 99] * (number != KILL)
            with happens_at(count, lambda: signal.raise_signal(number), place), aloud:
                result = Command(lambda: runs[program](out, *rarely)).ended()
            assert result.returncode == code, result
            assert code < 0 or f"stopped by {number.name} at step {step}; " in result.stdout, result
            file = saved(out)
            assert (file["stage"], file["step"], len(table_of(out))) == (stage, step, rows), (place, count)
            runs[program](out, *rarely, "--resume")
            assert_alike(whole_run() if program is distill else folder / "whole", out)


def test_rows_of_a_table_may_lack_figures(folder):
    """A run that goes on where its classifier or data are gone, or have come."""
    watch = object.__new__(distill.Watch)
    watch.grid, watch.run = {}, Namespace(rank=0, path=lambda name: folder / name)
    watch.rows = {"teacher_1": {"made_by": {}}, "before": {"fd": 1.5}, "after": {"made_by": {}, "accuracy": 0.5}}
    lines = [line.split() for line in heard(lambda: watch.show(3)).splitlines()]
    assert lines == [["fd", "accuracy", "of"], ["-", "-", "teacher_1"], ["1.5", "-", "before"], ["-", "0.5", "after"]]
    assert table_of(folder) == watch.rows


def test_a_nan_stops_training_and_keeps_the_last_good_checkpoint(folder):
    """A learning rate that blows up, a critic's loss, a reward: nothing may be logged or saved after it, though both
    are due at every step. Mended, the run goes through."""
    def fails(real, at):
        calls = itertools.count(1)
        return lambda *args: real(*args) * (float("nan") if next(calls) >= at else 1.0)

    with patch.object(distill, "MAX_NORM", 0):
        refused(lambda: blind_distill(folder / "lr", "--teacher_lr", "1e9"), "not finite in updates")
    assert [line["step"] for line in log_of(folder / "lr")] == [saved(folder / "lr")["step"]]
    write_student(folder)
    red, always = rl.REWARDS["red"], ("--save_every", 1, "--eval_every", 99)
    for broken, stage, go in (
            (patch.object(distill, "critic_loss", fails(distill.critic_loss, 4)), "student",
             lambda *more: blind_distill(folder / "student", "--log_every", 1, *more)),
            (patch.dict(rl.REWARDS, red=lambda *_: fails(red(), 9)), "rl",  # two for a trial, two for a look
             lambda *more: run_rl(folder, *always, *more))):
        with broken:
            refused(go, "not finite in updates", "--resume goes on from")
        file = saved(folder / stage)
        assert file["stage"] == stage and 1 <= file["step"] == log_of(folder / stage)[-1]["step"] <= 3, file["step"]
        assert all(torch.isfinite(value).all() for value in file["model"].values())
        go("--resume")


def test_kill_9_at_random_moments_and_inside_a_write_loses_nothing(folder):
    """Of distill.py, with data and without, and of rl.py: each ends in the bits, log and table of a run left alone.
    KILLS=20 asks for that many random moments each."""
    kills, rename, writings = int(os.environ.get("KILLS", 1)), os.replace, itertools.count(1)

    def half_written(source, target):
        if str(target).endswith("resume.pt") and next(writings) == 4:
            os.truncate(source, os.path.getsize(source) // 2)
            signal.raise_signal(signal.SIGKILL)
        rename(source, target)

    often = ("--steps", 12, "--save_every", 1, "--log_every", 1)
    programs = {"distill": lambda out, *more: blind_distill(out, "--log_every", 1, *more),
                "without_data": lambda out, *more: blind_distill(out, *NO_DATA, folder / "teacher.pt", *often, *more),
                "rl": lambda out, *more: run_rl(folder, *often, "--out", out, *more)}
    write_student(folder), write_student(folder, "teacher")
    drops = patch.dict(globals(), TINY_SHAPES=replace(TINY_SHAPES, dropout=0.1))  # the teacher's: by (seed, step)
    with patch.object(rl, "Watch", Blind), drops:
        for name, go in programs.items():
            start, out = time.time(), folder / f"{name}_killed"
            go(folder / name)
            moments = np.random.default_rng().uniform(0, 0.7 * (time.time() - start), kills)
            with patch.object(os, "replace", half_written):
                killed = Command(lambda: go(out)).ended()
            assert killed.returncode == -signal.SIGKILL, killed
            for seconds in (*moments, None):
                (out / "config.json.99..writing").write_text('{"data": ')  # half a file beside another
                with open(out / "log.jsonl", "a") as f:  # and half a line
                    f.write('{"stage": "teacher", "st')
                result = Command(lambda: go(out, "--resume")).ended(seconds)
                assert result.returncode in (0, -signal.SIGKILL), result
            assert_alike(folder / name, out)
            assert not list(out.glob("*.writing"))


def test_a_full_disk_ends_in_one_line_and_the_run_goes_on_when_there_is_room(folder):
    """2,300 kB hold one checkpoint of 1,350, its teacher.pt of 340, and not the next beside them. Then every other
    file that a run writes."""
    disk, run = folder / "disk", folder / "disk/run"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2300k", "tmpfs", disk]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        raise Skip("only root may mount a small tmpfs")
    try:
        train = lambda out, *more: blind_distill(out, "--teacher_steps", 4, "--steps", 0, *more)
        refused(lambda: train(run), "cannot write", "resume.pt")
        assert saved(run)["step"] == 1 and not list(run.glob("*.writing"))
        (disk / "grid.png").write_text("old")
        with suppress(OSError):
            (disk / "filler").write_bytes(bytes(2300 * 1024))
        long, grid = {"loss": "0" * 8192}, [("x", torch.randint(0, 255, (9, 3, 64, 64)).byte())]
        logging = Namespace(rank=0, stage="teacher", step=0, path=lambda name: run / name)
        refused(lambda: write_json(run / "results.json", long), "cannot write")
        refused(lambda: save_checkpoint({"x": torch.zeros(9999)}, run / "student.pt"), "cannot write")
        refused(lambda: save_grid(grid, disk / "grid.png"), "No space left")
        refused(lambda: distill.Run.note(logging, long), "No space left")
        refused(lambda: train(disk / "new"), "No space left")
        assert (disk / "grid.png").read_text() == "old"
        subprocess.run(["mount", "-o", "remount,size=300m", disk], check=True)
        train(run, "--resume"), train(folder / "whole")
        assert_alike(folder / "whole", run)
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def twelve_updates(folder, name, *more):
    """Of stage 1."""
    blind_distill(f"{folder}/{name}", "--teacher", f"{folder}/teacher.pt", "--steps", 12, "--save_every", 3,
                  "--log_every", 4, *more)


def updates_with_accidents(folder):
    """The same under torchrun. Rank 1 is killed at step 5 in its first life. In its second, which goes on from step 4,
    SIGTERM comes to it at step 7, and to rank 0 while it writes the last checkpoint."""
    rank_and_life = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
    place, count, number = {("1", "0"): ("training_batch", 6, signal.SIGKILL),
                            ("1", "1"): ("training_batch", 4, signal.SIGTERM),
                            ("0", "1"): ("save_checkpoint", 3, signal.SIGTERM)}.get(rank_and_life, ("uniform", 0, 0))
    with happens_at(count, lambda: os.kill(os.getpid(), number), (distill, place)):
        twelve_updates(folder, "hurt")


def test_torchrun_restarts_a_killed_rank_and_sigterm_ends_all_ranks_well(folder):
    """Both accidents happen to one run, and it ends as the undisturbed run of two processes. After the signals both
    processes end at the next log line."""
    tiny_mar(folder, "teacher", **PIXELS_16)
    result = fresh("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1",
                   "test_all.py", "--rank", "updates_with_accidents", folder)
    assert result.returncode == 0, result.stderr[-9000:]  # torchrun's own account of a failure comes last
    assert saved(folder / "hurt")["step"] == 8
    on_ranks(2, lambda: twelve_updates(folder, "hurt", "--resume"))
    on_ranks(2, lambda: twelve_updates(folder, "whole"))
    assert [line["step"] for line in log_of(folder / "hurt")] == [3, 4, 6, 8, 9, 12]  # a save logs, too
    assert_alike(folder / "whole", folder / "hurt")


# ----------------------------------------------------------------------------------------------------------------------
# data.py: pictures, batches, the cache, the VAE, downloads


def save_picture(pixels, path):
    """pixels: uint8 (H, W, 3)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def make_folder(root, size=(8, 8), classes=("ant", "bee"), each=3, split="train"):
    """An image folder of random colours: root/train/<class>/<i>.png."""
    rng = np.random.default_rng(0)
    for name, i in itertools.product(classes, range(each)):
        save_picture(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8), root / split / name / f"{i}.png")
    return root


def test_shapes_depend_on_their_index_alone():
    shapes = open_data("shapes")
    together = shapes.images(np.arange(64))
    alone = torch.cat([shapes.images([i]) for i in range(64)])
    assert torch.equal(together, alone), "a picture must not depend on its batch"
    assert (shapes.labels[:64] == np.arange(64) % 8).all() and shapes.num_classes == 8
    other = open_data("shapes", split="test").images(np.arange(64))
    assert not any(torch.equal(a, b) for a, b in zip(together, other)), "the splits must not share pictures"
    # anti-aliasing: the same picture at twice the size, averaged down, is the small one but for the sampling grid
    fine = F.avg_pool2d(data.draw_shapes(np.arange(64), 32).float(), 2)
    assert (fine - together.float()).abs().mean() < 2


def test_shapes_classes_can_be_told_apart():
    # the most alike of 4,000 silhouettes has the same class nearly always: a small model can learn these
    shapes = open_data("shapes")

    def silhouettes(index):
        x = shapes.images(index).float()
        x = (x - x[..., :1, :1]).abs().amax(1).flatten(1)  # distance from the ground colour: no colour is left
        return F.normalize(x, dim=1)

    known, new = np.arange(4000), np.arange(4000, 4800)
    nearest = (silhouettes(new) @ silhouettes(known).T).argmax(1).numpy()
    assert (shapes.labels[known][nearest] == shapes.labels[new]).mean() > 0.97


def test_train_indices_are_shuffled_epochs():
    n, batch = 20, 8
    flat = np.concatenate([train_indices(n, batch, step, seed=3)[0] for step in range(5)])
    assert sorted(flat[:n]) == sorted(flat[n:]) == list(range(n)), "every image once an epoch"
    assert (flat[:n] != flat[n:]).any(), "each epoch has an order of its own"
    whole = train_indices(n, batch, 2, seed=3)
    parts = [train_indices(n, batch, 2, seed=3, rank=r, world=4) for r in range(4)]
    for i in range(2):  # indices, flips
        assert (np.concatenate([part[i] for part in parts]) == whole[i]).all(), "the ranks' parts are the batch"
    flips = np.concatenate([train_indices(1000, 500, step, 0)[1] for step in range(8)])
    assert abs(flips.mean() - 0.5) < 0.04
    refused(lambda: train_indices(n, 8, 0, 0, world=3), "8", "3")


def test_image_folders_are_held_in_memory(tmp):
    folder = make_folder(tmp / "bugs", each=120)
    bugs = open_data(folder)
    assert (len(bugs), bugs.img_size, bugs.class_names, bugs.pixels) == (240, 8, ["ant", "bee"], True)
    assert bugs.labels.tolist() == [0] * 120 + [1] * 120
    files = data.find_images(folder / "train")[1]
    pictures = np.stack([np.asarray(Image.open(file)) for file in files]).transpose(0, 3, 1, 2)
    assert (bugs.images(np.arange(240)).numpy() == pictures).all()
    x, labels = bugs.batch([200, 200], np.array([False, True]))
    close((x[0] + 1) * 127.5, pictures[200], 1e-6)
    assert torch.equal(x[1], x[0].flip(-1)) and labels.tolist() == [1, 1]
    large = make_folder(tmp / "large", size=(70, 64))  # from 64 px on they are pixels when told so
    for how, size in (dict(pixels=True), 64), (dict(img_size=32), 32):
        some = open_data(large, **how)
        assert some.pixels and some.img_size == size and some.images([0]).shape == (1, 3, size, size)
    assert not data.is_small(large) and data.is_small(folder)


def test_every_kind_of_image_becomes_rgb(tmp):
    data.say_once.cache_clear()
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    said = ""
    for image, *colour in ((Image.new("L", (4, 4), 7), 7, 7, 7), (palette, 10, 20, 30),
                           (Image.fromarray(np.full((4, 4), 257 * 100, np.uint16)), 100, 100, 100),
                           (Image.new("RGBA", (4, 4), (0, 0, 0, 0)), 255, 255, 255),  # black, but wholly transparent
                           (Image.new("LA", (4, 4), (0, 0)), 255, 255, 255),
                           (Image.new("1", (4, 4), 1), 255, 255, 255), (Image.new("RGB", (4, 4), (1, 2, 3)), 1, 2, 3)):
        image.save(tmp / "x.png")
        said += heard(lambda: close(data.read_image(tmp / "x.png", 4)[:, 2, 2], np.array(colour), 0))
    lines = said.splitlines()  # other loaders show other pixels, so it is said, once
    assert len(lines) == 2 and "torchvision" in lines[1], lines
    assert "16-bit" in lines[0] and "transparent" in lines[1], lines


def test_a_picture_is_cropped_and_read_as_it_is_stored(tmp):
    # 40 x 16 with a white square in the middle: halved once by BOX, then the square is all that is left
    image = np.zeros((16, 40, 3), np.uint8)
    image[:, 12:28] = 255
    assert (np.asarray(data.adm_crop(Image.fromarray(image), 8)) == 255).all()
    for size in [(37, 64), (100, 99), (16, 17), (9, 30)]:
        assert data.adm_crop(Image.new("RGB", size), 16).size == (16, 16)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying: a viewer turns it to the right
    image = Image.new("RGB", (16, 16), "blue")
    image.paste("red", (0, 0, 4, 16))
    image.save(tmp / "phone.png", exif=exif)
    lying, upright = (data.read_image(tmp / "phone.png", 16, upright) for upright in (False, True))
    assert (lying[0, :, :4] == 255).all() and (upright[0, :4] == 255).all() and upright[0].mean() == 255 / 4
    assert {".jpg", ".jfif", ".pgm", ".jpe", ".webp"} <= set(data.SUFFIXES) <= set(Image.registered_extensions())


def test_bad_image_folders_are_refused(tmp):
    folder = make_folder(tmp)
    whole = (folder / "train/ant/0.png").read_bytes()
    rows = [  # a file, or None: a folder, beside train/ant/*, train/bee/*; what is opened there; words of the one line
        ("x", b"", "x", "no such folder"), ("y", None, "nowhere", "no such folder"),
        ("empty", None, "empty", "'train'"), ("empty/train/ant", None, "empty", "no images"),
        ("train/wasp", None, "", "train/wasp", "no images", "remove it"),
        ("train/ant/0.png", b"", "", "train/ant/0.png", "no whole image", "mend it or remove it"),
        ("train/bee/1.png", b"<svg>", "", "train/bee/1.png", "no whole image"),
        ("train/bee/1.png", whole[:150], "", "train/bee/1.png", "no whole image"),
        # 169 and 300 megapixels, as the file's first line has it: named, and not decoded
        ("train/bee/1.png", b"P5 13000 13000 255 ", "", "train/bee/1.png", "169000000 pixels"),
        ("train/bee/1.png", b"P5 20000 15000 255 ", "", "train/bee/1.png", "300000000 pixels"),
        # classes in the place of the splits; one may be called train
        ("bus/1.png", whole, "train", "no folder 'train'", "DATA/train/<class>/*.jpg"),
        ("v/train/1.png", whole, "v", "class folders", "DATA/train/<class>/*.jpg", "class may be called train")]
    for name, content, opened, *words in rows:
        with scratch() as root:
            place = make_folder(root) / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.mkdir() if content is None else place.write_bytes(content)
            refused(lambda: open_data(root / opened), *words)
    refused(lambda: open_data(folder, split="test"), "'test' or 'val' or 'validation'")
    refused(lambda: data.find_images(folder), "train are no classes", str(folder / "train"))
    for error in (OSError(errno.EIO, "Input/output error"), MemoryError()):
        with patch.object(Image, "open", side_effect=error):
            read = lambda: data.read_image(folder / "train/ant/1.png", 8)
            assert refused(read, by=type(error)) == str(error)  # a disk that fails now does not make a picture broken


def test_folders_are_read_as_people_keep_them(tmp):
    pool = make_folder(tmp / "pool", classes=("ant", "bee", "wasp"), each=2)
    train, picture = tmp / "set/train", pool / "train/ant/0.png"
    (train / "ant/images.png").mkdir(parents=True)  # as Tiny ImageNet's <class>/images/*, and called like a picture
    (train / ".checkpoints").mkdir()
    (train / "bee").symlink_to(pool / "train/bee")
    (train / "ant/back").symlink_to(train)
    (train / "ant/images.png/loop.png").symlink_to("loop.png")
    for name in ("images.png/a.PNG", "b.jfif", "._b.jfif", "c.txt", "c", ".DS_Store", "d.avif", "../loose.png"):
        shutil.copy(picture, train / "ant" / name)
    os.makedirs(os.fsencode(train) + b"/caf\xe9/part")  # Latin-1, of an old archive
    shutil.copy(picture, os.fsencode(train) + b"/caf\xe9/part/\xe9t\xe9.png")
    for root in (train, f"{train}/", os.path.relpath(train)):
        said = heard(lambda: data.find_images(root))
        assert said.count("\n") == 1 and "1 images are in no class folder" in said and "loose.png" in said
        classes, files, labels = data.find_images(root)
        assert classes == ["ant", "bee", "caf\udce9"] and labels.tolist() == [0, 0, 0, 1, 1, 2]
        assert [Path(file).name for file in files[:5]] == ["b.jfif", "d.avif", "a.PNG", "0.png", "1.png"]
    with patch.dict(os.environ, RANK="1"):
        assert heard(lambda: data.find_images(train)) == "", "rank 0 speaks for all"
    (tmp / "set/validation").symlink_to(pool / "train")
    assert open_data(tmp / "set", "test").class_names == ["ant", "bee", "wasp"]
    assert data.find_images(pool / "train/bee")[0] == [""], "pictures alone are of one class without a name"


def test_a_folder_called_as_built_in_data_is_named(tmp):
    with chdir(tmp):
        make_folder(tmp / "shapes"), make_folder(tmp / "cifar10")
        for name, opens in (("shapes", lambda: close(open_data("shapes").num_classes, 8)),
                            ("cifar10", lambda: refused(lambda: open_data("cifar10"), "--get cifar10"))):
            said = heard(opens)
            assert said.count("\n") == 1 and f"--data ./{name}" in said
            assert not heard(lambda: open_data(f"./{name}"))
            assert open_data(f"./{name}").class_names == ["ant", "bee"]


class TinyVAE(torch.nn.Module):
    """Stands for KL-16. Its moments are averages of 16 x 16 px; of latents it makes pictures by one random layer."""
    encoded = 0  # pictures, of all of them

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.ConvTranspose2d(16, 3, 16, 16).requires_grad_(False)

    def moments(self, x):  # (n, 3, H, W) -> (n, 32, H / 16, W / 16)
        TinyVAE.encoded += len(x)
        return F.avg_pool2d(x, 16).repeat(1, 11, 1, 1)[:, :32]

    def decode(self, latents):  # (n, 16, h, w), unscaled -> (n, 3, 16h, 16w)
        return self.layer(latents)


def build_bugs(folder, out, stop=0):
    """Make the latent cache of an image folder of 64 px in `out`, killed in the `stop`-th call that changes
    something. -> how many pictures were encoded, None if it was killed."""
    TinyVAE.encoded = 0
    changes = (np.memmap, "flush"), (np.lib.format, "open_memmap"), (data, "write_json"), (TinyVAE, "moments")
    (folder / "vae").touch()
    with (happens_at(stop, Mock(side_effect=Killed), *changes), suppress(Killed),
          patch.object(data, "load_vae", lambda path: TinyVAE())):
        data.main(["--data", f"{folder}", "--out", f"{out}", "--vae", f"{folder}/vae", "--img_size", "64", "--device",
                   "cpu", "--batch", "3"])
        return TinyVAE.encoded // 2  # each and its mirror image


def test_a_cache_that_is_killed_while_it_is_made_goes_on(tmp):
    folder = make_folder(tmp / "bugs", size=(64, 64), each=4)
    (folder / "train/bee/2.png").write_bytes(b"not a picture")
    files = [file for i, file in enumerate(data.find_images(folder / "train")[1]) if i != 6]
    x = torch.from_numpy(np.stack([data.read_image(file, 64) for file in files])).float() / 127.5 - 1
    # done.npy, moments.npy, cache.json made; both opened; 3 times encoded twice, flushed; done.npy flushed
    for stop, again in enumerate([8] * 8 + [5] * 3 + [2] * 3 + [0, None], start=1):
        out = tmp / f"{stop}"
        assert (build_bugs(folder, out, stop) is None) == (again is not None), stop
        if 3 < stop < 15:
            refused(lambda: open_data(out), "not finished")
        assert build_bugs(folder, out) == (again or 0), "what is done is not done again"
        built = open_data(out)
        assert (built.class_names, built.labels.tolist(), built.img_size) == (["ant", "bee"], [0] * 4 + [1] * 3, 64)
        for flip, images in enumerate((x, x.flip(-1))):
            assert torch.equal(built.read(np.arange(7), np.full(7, flip)), TinyVAE().moments(images).half())
    with redirect_stderr(io.StringIO()) as said:
        build_bugs(folder, tmp / "new")
    assert "bee/2.png" in said.getvalue() and "left out" in said.getvalue(), "named, and hours are not lost"


def test_a_damaged_cache_is_not_believed(tmp):
    """Something has cut, removed or exchanged a file: zeros would pass for pictures. And it wants room beforehand."""
    folder = make_folder(tmp / "bugs", size=(64, 64))  # 6 rows of 2 x 32 x 4 x 4 float16 are 12,288 bytes
    with patch("shutil.disk_usage", lambda path: Mock(free=12_000)):
        refused(lambda: build_bugs(folder, tmp / "out"), "0.00 GB are free", "make room")
        assert os.listdir(tmp / "out") == [".lock"]
    build_bugs(folder, tmp / "whole")
    for name, content in itertools.product(("moments.npy", "done.npy", "cache.json"), (None, b"", b"cut", b"[1]")):
        file = shutil.copytree(tmp / "whole", tmp / "cache") / name
        file.unlink() if content is None else file.write_bytes(content)
        refused(lambda: open_data(tmp / "cache"), f"{tmp}/cache", "" if content is None else "delete it")
        shutil.rmtree(tmp / "cache")
    np.save(tmp / "whole/done.npy", np.ones(5, np.uint8))
    refused(lambda: open_data(tmp / "whole"), "6 pictures", "delete it and build it again")


def test_cifar10_binary_files(tmp):
    binary, archive = Path("data/cifar-10-batches-bin"), Path(PUBLIC["cifar10"][1])
    records = np.zeros((10_000, 3073), np.uint8)
    records[7, 0], records[7, 1:1025], records[7, 2049:] = 9, 200, 50  # a truck: red 200, green 0, blue 50
    with chdir(tmp):
        binary.mkdir(parents=True)
        archive.write_bytes(b"half a download")
        refused(lambda: open_data("cifar10"), "--get cifar10", "cifar-10-batches-py", "pickle")
        refused(lambda: data.get(["cifar10"]), "damaged", "c32a1d4ab5d03f1284b67883e8d87530")
        records.tofile(binary / "test_batch.bin")
        with tarfile.open(archive, "w:gz") as tar:
            tar.add(binary, binary.name)
        shutil.rmtree(binary)
        checksum = f"md5:{data.file_hash(archive, 'md5')}"
        with patch.dict(PUBLIC, cifar10=("", archive, None, checksum)):
            data.get(["cifar10"])  # there already: only checked and unpacked
        test = open_data("cifar10", "test")
        assert len(test) == 10_000 and test.class_names[test.labels[7]] == "truck"
        assert test.images([7])[0, :, 5, 5].tolist() == [200, 0, 50]
        refused(lambda: open_data("cifar10"), "data_batch_1.bin", "missing")
        refused(lambda: open_data("cifar10", "test", img_size=64), "32")


def test_other_files_are_no_vae(tmp):
    state = {name: torch.tensor(float(i)).expand(tuple(shape))  # of each tensor a file keeps one number
             for i, (name, shape) in enumerate(about("vae")["shapes"].items())}
    part = {name: value for name, value in state.items() if name != "quant_conv.bias"}
    refused_files(tmp, [(data.load_vae, part, "no KLVAE file", "quant_conv.bias is missing"),
                        (data.load_vae, public_mar_file().read_bytes(), "no KLVAE file", "conv_in.weight is missing")])
    # as latent-diffusion's training on several GPUs leaves it, with the discriminator
    trained = {"loss.logvar": torch.zeros(()), **state}
    torch.save({"state_dict": {f"module.{name}": value for name, value in trained.items()}, "epoch": 3}, tmp / "a.ckpt")
    for name, value in data.load_vae(tmp / "a.ckpt").state_dict().items():
        assert torch.equal(value, state[re.sub(r"(block|attn)(\d)", r"\1.\2", name)]), name


def test_latent_batches(tmp):
    # a cache made by hand: mean 3 (flip: 5), log-variance ln 4, so a sample is (3 or 5, + 2 noise) * 0.2325
    moments = np.zeros((4, 2, 32, 8, 8), np.float16)
    moments[:, 0, :16], moments[:, 1, :16], moments[:, :, 16:] = 3, 5, np.log(4)
    np.save(tmp / "moments.npy", moments)
    np.save(tmp / "done.npy", np.array([data.BROKEN, data.DONE, data.DONE, data.DONE], np.uint8))
    (tmp / "cache.json").write_text(json.dumps({"img_size": 128, "classes": {"a": 2, "b": 2}}))
    latents = open_data(tmp)
    assert (len(latents), latents.pixels, latents.labels.tolist()) == (3, False, [0, 1, 1])
    refused(lambda: open_data(tmp, pixels=True), "holds no pixels")
    draw = lambda seed: latents.batch([1, 2], np.array([False, True]), torch.Generator().manual_seed(seed))
    x, labels = draw(0)
    assert x.shape == (2, 16, 8, 8) and x.dtype == torch.float32 and labels.tolist() == [1, 1]
    assert torch.equal(x, draw(0)[0]) and not torch.equal(x, draw(1)[0]), "the generator decides"
    assert torch.allclose(x.mean((1, 2, 3)), torch.tensor([3, 5]) * 0.2325, atol=0.06)
    assert torch.allclose(x.std((1, 2, 3)), torch.tensor(2 * 0.2325), atol=0.05)


def test_large_pictures_become_latents_by_the_command_that_is_advised(tmp):
    # on two processes; every row must be the VAE's own answer for the image and for its mirror
    folder, vae = make_folder(tmp / "our bugs", size=(70, 64)), data.load_vae(vae_file())
    (tmp / "pretrained_models/vae").mkdir(parents=True)
    (tmp / "pretrained_models/vae/kl16.ckpt").symlink_to(vae_file())
    refused(lambda: open_data(folder), "256 px", "distill.py --pixels")
    advice = refused(lambda: open_data(folder, img_size=64), "64 px")
    command, cache = re.search("python data.py (.*); then give --data (.*); or", advice).groups()
    argv = [*shlex.split(command), "--device", "cpu", "--batch", "2"]
    said = on_ranks(2, lambda: (os.chdir(tmp), data.main(argv)))
    assert said.endswith(f"finished, 0 pictures left out; from now on: --data {cache}\n")
    built = open_data(tmp / cache)
    for i, file in enumerate(data.find_images(folder / "train")[1]):
        image = torch.from_numpy(data.read_image(file, 64)).float()[None] / 127.5 - 1
        both = built.read(np.array([i, i]), np.array([0, 1])).float()
        close(both, vae.moments(torch.cat([image, image.flip(-1)])), 2e-3)  # float16 of the same numbers


def test_a_cache_is_of_one_list_of_pictures(tmp):
    """Its builder notices a picture that changes, comes or goes, and another VAE."""
    changes = {"changed": lambda bugs: Image.new("RGB", (64, 64), "red").save(bugs / "ant/1.png"),
               "came": lambda bugs: shutil.copy(bugs / "bee/0.png", bugs / "ant/9.png"),
               "renamed": lambda bugs: (bugs / "ant/0.png").rename(bugs / "ant/00.png"),
               "touched": lambda bugs: os.utime(bugs / "ant/0.png", ns=(0, 0)),
               "class": lambda bugs: (bugs / "ant").rename(bugs / "cat"),
               "vae": lambda bugs: (bugs.parent / "vae").write_bytes(b"another")}
    folder, cache = make_folder(tmp / "bugs", size=(64, 64)), tmp / "cache"
    build_bugs(folder, cache)
    for name, change in changes.items():
        shutil.copytree(folder, tmp / name)
        change(tmp / name / "train")
        refused(lambda: build_bugs(tmp / name, cache), "other pictures, or made otherwise", "delete it")
    assert build_bugs(folder, cache) == 0 and len(open_data(cache)) == 6


def test_class_names_are_words_and_found_by_word_or_number():
    assert data.read_class_names(["cat", "dog"]) == ["cat", "dog"]
    of_imagenet = data.read_class_names([f"n{i:08}" for i in range(1000)])  # whose folders' names are no words
    assert len(set(of_imagenet)) == 1000 and (of_imagenet[0], of_imagenet[207]) == ("tench", "Golden Retriever")
    if (SHARED / "data" / "imagenet_class_names.json").is_file():
        assert of_imagenet == json.loads((SHARED / "data" / "imagenet_class_names.json").read_text())
    refused(lambda: data.read_class_names(["n01440764"]), "names 1000 classes, here are 1", "words")
    # a name goes before a number
    numbered = sorted(map(str, range(12)))  # as folders are sorted: 0, 1, 10, 11, 2, ...
    twins = ["crane", "dog", "crane"]  # as in ImageNet, a bird and a machine
    for words, names, found in ((["0", "1", "2", "11"], numbered, [0, 1, 4, 3]), (["2", "dog"], twins, [2, 1]),
                                (["100", "1"], ["100", "200"], [0, 1]), (["tench", "207"], of_imagenet, [0, 207])):
        assert sample.find_classes(words, names) == found, words
    refused(lambda: sample.find_classes(["crane"], twins), "[0, 2]", "number")
    refused(lambda: sample.find_classes(["3"], twins), "no class", "0..2")


class FlakyServer(http.server.BaseHTTPRequestHandler):
    """Serves `content` with Range; the first reply to /flaky breaks off in the middle."""
    content, asked = bytes(range(256)) * 4096, []
    log_message = lambda *_: None

    def do_GET(self):
        start = int(self.headers["Range"].split("=")[1].rstrip("-"))
        self.asked.append((self.path, start))
        self.send_response(206)
        self.send_header("Content-Length", str(len(self.content) - start))
        self.end_headers()
        broken = start == 0 and self.path == "/flaky"
        self.wfile.write(self.content[start:len(self.content) // 2 if broken else None])


def test_downloads_resume_and_are_verified(tmp):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FlakyServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url, size = f"http://127.0.0.1:{server.server_port}", len(FlakyServer.content)
    digest, file = hashlib.sha256(FlakyServer.content).hexdigest(), tmp / "a/flaky.bin"
    mine = {"flaky": (f"{url}/flaky", "a/flaky.bin", size, f"sha256:{digest[:8]}"),
            "wrong": (f"{url}/wrong", "a/wrong.bin", size, "sha256:00000000"),
            "short": (f"{url}/short", "a/short.bin", 2 * size, None),
            "named": (f"{url}/named", "a/named.bin", None, None),
            "gone": ("http://127.0.0.1:9/gone", "a/gone.bin", None, None)}
    with patch.dict(data.PUBLIC, mine):
        refused(lambda: data.get(["flaky"], tmp), "stopped")
        assert not file.exists(), "half a file must not have the name of a whole one"
        data.get(["flaky"], tmp)
        assert file.read_bytes() == FlakyServer.content
        data.get(["flaky"], tmp)  # there already: only checked
        assert FlakyServer.asked == [("/flaky", 0), ("/flaky", size // 2)], "the second goes on where the first stopped"
        for name, *words in (("wrong", "damaged", "00000000", "is deleted now"),
                             ("short", "damaged", f"about {2 * size:,}"), ("gone", "gone", "stopped")):
            refused(lambda: data.get([name], tmp), *words)
        assert [p.name for p in file.parent.iterdir()] == ["flaky.bin"]
        assert f"sha256 {digest}, {size:,} bytes" in heard(lambda: data.get(["named"], tmp))
        file.write_bytes(b"bit rot")
        (tmp / "a/flaky.bin.part").touch()
        refused(lambda: data.get(["flaky"], tmp), "damaged", "delete it")
        assert file.exists() and (tmp / "a/flaky.bin.part").exists(), "nothing of the user's is deleted"
    server.shutdown()


# How a command starts and ends


def test_every_end_of_a_command_is_one_line():
    """Exit code 2 and one line for what a user can mend, whatever the names in it hold."""
    def raises(error):
        raise error

    for error, code, *words in [
            (UserError("two\n lines"), 2, "error: two lines\n"),
            (UserError("esc\x1b[31mred \u202e\x07 \udce9 \u00e9"), 2, "esc\\x1b[31mred \\u202e\\x07 \\udce9 \u00e9\n"),
            (OSError(errno.ENOSPC, "No space left", "a.pt"), 2, "error: a.pt: No space left"),
            (OSError(errno.ENOSPC, "No space left"), 2, "error: OSError in line ", "test_all.py: No space left"),
            (ConnectionError("the service did not answer"), 2, "error: ConnectionError in line ", "did not answer"),
            (TimeoutError(), 2, "error: TimeoutError in line "),
            (MemoryError("17 TiB"), 2, "error: MemoryError in line ", "17 TiB"),
            (KeyboardInterrupt(), 130), (SystemExit(3), 3), (SystemExit(), 0)]:
        with redirect_stderr(io.StringIO()) as said:
            try:
                run_main(lambda: raises(error))
            except SystemExit as end:
                assert end.code == code, (error, end.code)
        assert said.getvalue().count("\n") == (code == 2), said.getvalue()
        assert all(word in said.getvalue() for word in words), said.getvalue()
    said = heard(lambda: data.say("class \x1b]0;title\x07 of\ntwo lines"))
    assert said == "class \\x1b]0;title\\x07 of\ntwo lines\n"


def test_a_folder_has_one_owner(folder):
    other = Command(lambda: (data.lock_folder(folder), print("mine"), time.sleep(99)))
    while other.is_alive() and os.stat(other.files[0].fileno()).st_size == 0:
        time.sleep(0.01)
    refused(lambda: data.lock_folder(folder), str(folder), "in use")
    other.kill(), other.join()
    (folder / "x.pt.99..writing").touch(), (folder / "my.writing").touch()
    data.lock_folder(folder), data.lock_folder(folder)  # a dead process owns nothing; what is mine is mine
    assert sorted(os.listdir(folder)) == [".lock", "my.writing"]


def test_commands_start_where_locks_docstrings_and_letters_are_missing(tmp):
    """Windows, as far as another system can show it: no fcntl, and a console that lacks letters."""
    code = ("import sys; sys.modules['fcntl'] = None; sys.argv[1:] = ['--help']; import data, sample; "
            f"data.run_main(lambda: [data.lock_folder({str(tmp)!r}), print('caf\u00e9'), sample.main()])")
    done = fresh("-OO", "-c", code, PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert done.returncode == 0 and done.stdout.startswith("caf\\xe9\nusage: "), done


def test_setup_refuses_what_is_not_there():
    alone, second = dict(RANK="", WORLD_SIZE=""), dict(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1")
    for ranks, device, gpus, mps, *words in ((alone, "cuda", 0, False, "0 GPU(s)"),
                                             (alone, "cuda:1", 2, False, "CUDA_VISIBLE_DEVICES"),
                                             (alone, "mps", 0, False, "where PyTorch has it"),
                                             (alone, "gpu", 1, True, "--device gpu"), (alone, "mps", 0, True),
                                             (second, "cuda", 1, False, "1 GPU(s)", "fewer processes"),
                                             (second, "mps", 0, True, "one process"),
                                             (second, "cpu", 0, False, "MASTER_ADDR")):
        with (patch.dict(os.environ, ranks), patch("torch.cuda.device_count", lambda: gpus),
              patch("torch.backends.mps.is_available", lambda: mps), patch.object(model_file, "BF16", None)):
            if words:
                refused(lambda: setup(device), *words)
            else:
                assert setup(device) == (torch.device("mps"), 0, 1) and model_file.BF16 is False


# ----------------------------------------------------------------------------------------------------------------------
# sample.py: what a picture depends on, and what the command refuses


def sample_main(ckpt, *argv):
    """sample.py's main in this process, of this checkpoint: -> what it printed."""
    return heard(lambda: sample.main([*map(str, ("--ckpt", ckpt, "--device", "cpu", *argv))]))


def test_two_processes_draw_and_judge_as_one(folder):
    tiny_mar(folder, num_classes=20)  # more than a grid shows: all of them are drawn
    common = (folder / "student.pt", "--num", 51)
    on_ranks(2, script("sample.py", "--device", "cpu", "--ckpt", *common, "--batch", 8, "--out", folder / "two.npz"))
    for _ in range(2):  # the second time a part is there
        on_ranks(2, lambda: sample_main(*common, "--batch", 8, "--out", folder / "png"))
        names = sorted(path.name for path in (folder / "png").glob("*.png"))
        assert names == [f"{i:06d}_{i % 20}.png" for i in range(51)]
        (folder / "png" / names[40]).unlink()
    shutil.rmtree(folder / "png")
    sample_main(*common, "--batch", 64, "--out", folder / "one.npz")
    one, two = np.load(folder / "one.npz"), np.load(folder / "two.npz")
    assert one["arr_0"].shape == (51, 8, 8, 3) and one["arr_0"].dtype == np.uint8 and one["arr_0"].std() > 20
    # rounding to bytes may turn a difference of 1e-7 into one level
    difference = np.abs(one["arr_0"].astype(int) - two["arr_0"])
    assert difference.max() <= 1 and (difference > 0).mean() < 1e-3
    assert (one["labels"] == np.arange(51) % 20).all() and (two["labels"] == one["labels"]).all()
    assert sorted(p.name for p in folder.iterdir()) == ["one.npz", "student.pt", "two.npz"]  # nothing left behind
    with patch.object(fid, "load_inception", lambda path: Mock(to=lambda device: quick)):
        for world in (1, 2):  # which judge 51, no equal shares
            argv = [f"{folder}/one.npz", "--save_stats", f"{folder}/stats_{world}.npz", "--out", f"{folder}"]
            on_ranks(world, lambda: run_main(lambda: fid.main(argv)))
    one, two = (np.load(folder / f"stats_{world}.npz") for world in (1, 2))
    close(two["mu"], one["mu"], 1e-6), close(two["sigma"], one["sigma"], 1e-6)
    rows = [json.loads(line) for line in open(folder / "results.jsonl")]
    assert [row["n"] for row in rows] == [51, 51]
    close(rows[1]["is"], rows[0]["is"], 1e-5)


def test_gif_shows_the_unmasking(folder):
    model, labels = tiny_mar(folder), torch.arange(4)
    frames = list(unmasking(model, labels, seed=3, vae=None, ar_steps=5))
    unknown = [int((frame[0] == 128).all(0).sum()) // 4 for frame in frames]  # tokens of 2x2 px
    assert all(abs(u - m) <= 1 for u, m in zip(unknown, mask_counts(16, 5)))  # a token may be grey by chance
    assert torch.equal(frames[-1], draw(model, labels, seed=3, ar_steps=5))
    (folder / "a.gif.7..writing").touch(), (folder / "b.gif.7..writing").touch()  # of kill -9; another one's
    sample_main(folder / "student.pt", "--gif", folder / "a.gif", "--ar_steps", 5, "--per_class", 2)
    assert sorted(path.name for path in folder.iterdir()) == ["a.gif", "b.gif.7..writing", "student.pt"]
    assert Image.open(folder / "a.gif").n_frames == 6  # the empty picture, then one an AR step


def test_edit_keeps_what_is_outside_the_box(folder):
    """A phone stores the sensor's rows and a note how to turn them: --box is measured on what a viewer shows."""
    model, turned = tiny_mar(folder), Image.Exif()  # 8 px, tokens of 2 x 2
    turned[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    picture = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(np.rot90(picture).copy()).save(folder / "p.png", exif=turned)
    how, stays = sample.open_edit(model, folder / "p.png", (3, 0, 6, 5), vae=None)  # touches columns 2..5, rows 0..5
    hole, whole = torch.zeros(8, 8, dtype=torch.bool), torch.from_numpy(picture).permute(2, 0, 1)
    hole[0:6, 2:6] = True
    assert torch.equal(stays, torch.stack([whole, whole.where(~hole, 128)]))
    drawn = draw(model, [0, 1], ar_steps=3, **how)
    assert torch.equal(drawn[:, :, ~hole], whole[:, ~hole].expand(2, -1, -1))
    assert (drawn[:, :, hole] != whole[:, hole]).float().mean() > 0.5
    sample_main(folder / "student.pt", "--edit", folder / "p.png", "--box", 0, 0, 3, 2, "--classes", 1,
                "--out", folder / "e.png")  # two tokens: of the checkpoint's 8 AR steps two are made
    assert Image.open(folder / "e.png").height == GAP + 2 * (96 + GAP)  # the picture's row and the class's


def test_grid_shows_every_pixel_and_titles_in_letters_that_the_font_has(folder):
    pictures = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    save_grid([("first row", pictures), ("", pictures[:2])], folder / "g.png")
    grid = np.asarray(Image.open(folder / "g.png"))
    left = grid.shape[1] - 3 * (96 + GAP)
    assert grid.shape[0] == GAP + 2 * (96 + GAP) and (grid[:100, :left] < 128).any()  # a title stands at the left
    tile = grid[GAP:GAP + 96, left + 96 + GAP:left + 2 * 96 + GAP]  # row 0, picture 1
    assert (tile[::6, ::6] == pictures[1].permute(1, 2, 0).numpy()).all()  # one block of 6 x 6 for each pixel
    assert (tile[5::6, 5::6] == tile[::6, ::6]).all()
    save_grid([("", torch.zeros(2, 3, 256, 256, dtype=torch.uint8))], folder / "big.png")
    assert Image.open(folder / "big.png").size == (GAP + 2 * (256 + GAP), 2 * GAP + 256)  # not enlarged
    same = "great white shark, 7", "K = 64", "teacher_100"
    assert [title_of(name, 3) for name in same] == list(same)
    assert title_of("café", 3) == title_of("cafe\u0301", 3) == "cafe" and title_of("a\tb\udce9", 3) == "a b"
    assert title_of("日本", 3) == title_of("\u200b" * 50, 3) == "class 3"
    assert title_of("macaque, " * 100, 3).startswith("macaque") and len(title_of("macaque, " * 100, 3)) == 24


def test_latents_are_unscaled_and_decoded():
    model = tiny_mar(**LATENT)
    vae = Mock(decode=lambda x: x[:, :3].repeat_interleave(16, 2).repeat_interleave(16, 3))  # 16 px a cell
    labels, seeds = torch.arange(20) % 4, torch.tensor([(0, i) for i in range(20)])
    latents = model.generate(labels, ar_steps=4, seeds=seeds)
    pictures = draw(model, labels, vae=vae, ar_steps=4)  # 20: more than one chunk of the decoder
    difference = pictures[:, :, ::16, ::16].int() - to_uint8(latents[:, :3] / 0.2325).int()
    assert difference.abs().max() <= 1
    assert torch.equal(list(unmasking(model, labels[:2], 0, vae, ar_steps=4))[-1], pictures[:2])
    refused(lambda: draw(model, labels), "--vae")


def test_defaults_come_from_the_checkpoint():
    def filled(size, stage, made, *argv):
        args, _ = sample.parse_args(["--ckpt", "x.pt", *map(str, argv)])
        model = Namespace(config=SIZES[size], stage=stage, made=made)
        return [(how["ar_steps"], how["head_steps"], how["guidance"], how["guidance_schedule"])
                for how in sample.ways_to_draw(args, model)]

    ours = {"ar_steps": 8, "guidance": 2.0, "guidance_schedule": "constant", "teacher_head_steps": 50}
    assert filled("shapes", "student", ours) == [(8, 1, 1.0, "constant")]
    assert filled("shapes", "rl", ours, "--ar_steps", 4) == [(4, 1, 1.0, "constant")]
    assert filled("shapes", "teacher", ours) == [(8, 50, 2.0, "constant")]
    several = "--guidance", 1, 3, "--ar_steps", 2, 4, "--head_steps", 2  # each with each
    assert [way[:3] for way in filled("shapes", "teacher", ours, *several)] == [
        (2, 2, 1), (2, 2, 3), (4, 2, 1), (4, 2, 3)]
    for size, guidance in (("base", 2.9), ("large", 3.0), ("huge", 3.2)):  # MAR's README
        assert filled(size, "teacher", {}) == [(64, 100, guidance, "linear")]
    # what a file leaves out is as in the public ones
    assert filled("shapes", "student", {}) == [(16, 1, 1.0, "linear")]
    assert filled("shapes", "teacher", {"guidance": 1.5}) == [(16, 100, 1.5, "linear")]


def test_flops_are_those_of_the_formula():
    """Floating-point operations of a picture, multiply and add apart, in matrix products only."""
    model = MAR(SIZES["shapes"]).eval()
    c = model.config
    L, D, S, C, W = c.seq_len, c.width, c.buffer_size, c.token_dim, c.head_width
    expected, counts = 0, mask_counts(L, 4)
    for now, after in zip(counts, counts[1:]):
        V, P = L - now, now - after
        block = lambda T: 24 * T * D * D + 4 * T * T * D  # 12 D^2 weights; two products with the T x T attention map
        last = 6 * (S + L) * D * D + 18 * P * D * D + 4 * (S + L) * P * D  # q, k, v of all, the rest of P rows
        head = C * W + D * W + c.head_depth * 5 * W * W + 2 * W * W + 2 * C * W
        expected += (c.encoder_depth * block(S + V) + (c.decoder_depth - 1) * block(S + L) + last
                     + 2 * V * C * D + 2 * (S + V) * D * D + 2 * P * head
                     + 2 * (256 * W + W * W))  # the time step is one for all rows, and embedded once
    for guidance in (1, 2):
        # attention as plain products: of the fused kernels the counter knows only those for CUDA
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model.generate(torch.tensor([0]), 4, guidance=guidance)
        assert counter.get_total_flops() == guidance * expected


def test_pictures_that_are_not_finite_are_never_written(folder):
    """Of weights that hold NaN, or numbers so large that pictures are infinite, or NaN of one class. NaN would be black
    bytes, and black pictures would be judged."""
    tiny_mar(folder)
    file, out = read_checkpoint(folder / "student.pt"), "head_net.final_layer.linear.weight"
    for name, key, change, count in (
            ("nan", out, lambda w: w * math.nan, 4), ("inf", out, lambda w: torch.full_like(w, 1e38), 4),
            ("class", "class_emb.weight", lambda w: w.index_fill(0, torch.tensor([2]), math.nan), 1)):
        torch.save({**file, "ema": {**file["ema"], key: change(file["ema"][key])}}, folder / f"{name}.pt")
        model = load_mar(folder / f"{name}.pt")
        for head_steps in (1, 4):  # the chain's clamp hides none
            refused(lambda: draw(model, range(4), ar_steps=2, head_steps=head_steps), f"{count} of 4", "not finite")
    before = sorted(folder.iterdir())
    num, nan = ("--num", 6, "--batch", 4, "--out"), (folder / "nan.pt", "--ar_steps", 2)
    for *flags, out in (("--per_class", 1, "--out", "x.png"), ("--per_class", 1, "--gif", "x.gif"),
                        (*num, "x.npz"), (*num, "new")):
        refused(lambda: sample_main(*nan, *flags, folder / out), "4 of 4")
    shutil.rmtree(folder / "new")
    assert sorted(folder.iterdir()) == before
    assert draw(model, [0, 1, 3], ar_steps=2).float().std() > 20  # the other classes are as they were
    vae = TinyVAE()
    vae.layer.bias[0] = math.nan
    latents = tiny_mar(**LATENT)
    refused(lambda: draw(latents, [0] * 20, vae=vae, ar_steps=2), "20 of 20")  # finite latents, a broken VAE


def test_a_stopped_npz_leaves_no_half_file(folder):
    tiny_mar(folder)
    typed = f"--ckpt {folder}/student.pt --num 30 --batch 4 --device cpu --out {folder}/x.npz"
    for number, code in ((signal.SIGTERM, "143"), (signal.SIGINT, "130")):
        with happens_at(3, lambda: signal.raise_signal(number), (sample, "draw_together")):
            assert refused(lambda: run_main(lambda: sample.main(typed.split())), by=SystemExit) == code
        assert [path.name for path in folder.iterdir()] == ["student.pt"]


def test_num_writes_a_folder_of_pngs_and_goes_on_with_it(folder):
    tiny_mar(folder), tiny_mar(folder, "teacher")
    common = (folder / "student.pt", "--batch", 4, "--num")
    (folder / "a.npz.17015.0.writing").touch()  # of kill -9
    sample_main(*common, 10, "--out", folder / "a.npz")
    assert not list(folder.glob("*.writing"))
    arrays, out = np.load(folder / "a.npz"), folder / "new"
    with happens_at(3, Mock(side_effect=UserError("killed")), (sample, "draw")):
        refused(lambda: sample_main(*common, 10, "--out", out), "killed")
    assert sorted(path.name for path in out.glob("*.png")) == [f"{i:06d}_{i % 4}.png" for i in range(8)]
    (out / "000008_0.png.7..writing").touch()  # of kill -9
    before = (out / "000003_3.png").stat().st_mtime_ns
    assert "pictures of an earlier" not in sample_main(*common, 10, "--out", out)
    files = sorted(path for path in out.iterdir() if path.name[0] != ".")
    assert [f.name for f in files] == [f"{i:06d}_{i % 4}.png" for i in range(10)]
    assert (np.stack([np.asarray(Image.open(f)) for f in files]) == arrays["arr_0"]).all()
    assert (out / "000003_3.png").stat().st_mtime_ns == before  # not drawn again
    assert "holds 4 pictures of an earlier, larger --num" in sample_main(*common, 6, "--out", out)
    others = [  # what is not the same way of drawing
        (["--seed", 1], out), (["--ar_steps", 2], out), (["--classes", 0, 1], out), (["--dtype", "bfloat16"], out),
        (["--ckpt", folder / "teacher.pt"], out), ([], folder)]  # and a folder with other files in it
    for flags, where in others:
        refused(lambda: sample_main(*common, 12, *flags, "--out", where), str(where), "new or empty")
    (out / ".drawn_by.json").write_text("{")
    refused(lambda: sample_main(*common, 12, "--out", out), str(out), "new or empty")
    refused(lambda: sample_main(*common, 6, "--out", folder / "student.pt"), ".npz")
    tiny_mar(folder, "rl", **LATENT), (folder / "a").write_text("a"), (folder / "b").write_text("b")
    with patch.object(sample, "load_vae", lambda path: TinyVAE()):  # another file, so another VAE
        latent = (folder / "rl.pt", "--num", 4, "--out", folder / "decoded", "--vae")
        sample_main(*latent, folder / "a"), sample_main(*latent, folder / "a")
        refused(lambda: sample_main(*latent, folder / "b"), "new or empty")


def test_export_is_the_public_layout(folder):
    """Keys and shapes of MAR-B, L, H are the public ones. What comes back draws the same bits, a student as one."""
    model = tiny_mar(folder)
    said = sample_main(folder / "student.pt", "--export", folder / "mar.pth")
    assert "patch" in said and "t = 625" in said
    tiny_mar(folder, "teacher")
    assert "cannot draw" in sample_main(folder / "teacher.pt", "--export", folder / "teacher.pth")
    file = read_checkpoint(folder / "mar.pth")
    assert set(file["model"]) == set(file["model_ema"]) and file["stage"] == "student"
    for checkpoint, png in ("mar.pth", "a.png"), ("student.pt", "b.png"):
        sample_main(folder / checkpoint, "--classes", "ring", "--out", folder / png)
    assert (folder / "a.png").read_bytes() == (folder / "b.png").read_bytes()
    assert torch.equal(load_mar(folder / "mar.pth", ema=False).z_proj.weight, model.z_proj.weight)
    refused(lambda: sample_main(folder / "mar.pth", "--export", folder / "x.npz"), ".pth")

    # a public file, once exported, is again a public file: nothing that only we know is needed to read it
    args = Namespace(img_size=8, vae_stride=1, patch_size=2, vae_embed_dim=3)
    torch.save({"model": file["model"], "model_ema": file["model_ema"], "args": args}, folder / "public.pth")
    sample.export(load_mar(folder / "public.pth", heads=2), folder / "again.pth")
    assert torch.equal(draw(load_mar(folder / "again.pth"), range(4), ar_steps=4),
                       draw(load_mar(folder / "public.pth", heads=2), range(4), ar_steps=4))
    for name, public in about("mar_full_shapes").items():
        with torch.device("meta"):
            state = MAR(SIZES[name.removeprefix("mar_")]).state_dict()
        shapes = {key.replace("head_net.", "diffloss.net."): list(value.shape) for key, value in state.items()}
        assert shapes == public["shapes"], name


# ----------------------------------------------------------------------------------------------------------------------
# fid.py: the judges


def test_frechet_distance_has_its_closed_forms():
    mu, sigma = torch.tensor([1.0, 2.0, 0.0]), torch.diag(torch.tensor([4.0, 0.25, 1.0]))
    # N(0, 1) and N(m, s^2) per axis: m^2 + (1 - s)^2 each
    got = fid.frechet_distance(torch.zeros(3), torch.eye(3), mu, sigma)
    assert abs(got - (1 + 4 + 1 + 0.25)) < 1e-9, got
    x = torch.randn(300, 40, dtype=torch.float64)
    a, b = fid.mean_and_covariance(x), fid.mean_and_covariance(1 + 2 * torch.randn_like(x))
    assert abs(fid.frechet_distance(*a, *a)) < 1e-6
    assert abs(fid.frechet_distance(*a, *b) - fid.frechet_distance(*b, *a)) < 1e-6
    assert np.allclose(a[1], np.cov(x.numpy(), rowvar=False), rtol=1e-12)
    few = fid.mean_and_covariance(x[:10])  # rank 9 of 40: where scipy's root needs a fudge
    assert abs(fid.frechet_distance(*few, *few)) < 1e-5 and fid.frechet_distance(*few, *a) > 0


def test_metrics_agree_with_torch_fidelity():
    z, said = fixture("metrics"), about("metrics")
    a, b = z["features_a"], z["features_b"]
    ours, few, theirs = map(fid.mean_and_covariance, (a, a[:40], b))
    close(fid.frechet_distance(*ours, *theirs), said["fid"])
    close(fid.frechet_distance(*few, *theirs), said["fid_singular_first40_of_a_vs_b"])
    close(fid.inception_score(z["logits"]), list(said["isc"].values()))
    # the fixture's one subset of 500 was drawn with seed 0, not with torch-fidelity's default of 2020
    kid = said["kid_one_subset_of_500"]["kernel_inception_distance_mean"]
    close(fid.kernel_distance(a, b, 1, 500, seed=0)[0], kid)
    both = fid.precision_recall(a, b)
    close(both, [said["prc"]["precision"], said["prc"]["recall"]])
    assert fid.precision_recall(a, b, chunk=50) == both  # a matter of memory alone


def test_inception_score_needs_a_shuffle_and_kid_has_a_spread_where_subsets_differ():
    logits = 20 * torch.eye(10).repeat_interleave(50, dim=0)  # ten sure classes, in class order
    assert abs(fid.inception_score(logits, splits=5)[0] - 2) < 1e-3  # each split knows two of them
    assert abs(fid.inception_score(logits, splits=5, shuffle=True)[0] - 10) < 0.8
    a, b = torch.randn(2, 60, 8)
    assert fid.kernel_distance(a, b)[1] is None and fid.kernel_distance(a, b[:20])[1] is None
    assert fid.kernel_distance(a, b, subset_size=20)[1] > 0


def test_clip_loads_from_a_half_precision_torchscript_archive(folder):
    state = {name: value.half() for name, value in fill(about("clip_tiny")["shapes"]).items()}
    extras = {name: torch.tensor(77) for name in ("input_resolution", "context_length", "vocab_size")}
    whole = torch.nn.Identity()
    for name, value in {**state, **extras}.items():
        part, (*path, last) = whole, name.split(".")
        for step in path:
            part.add_module(step, getattr(part, step, torch.nn.Identity()))
            part = getattr(part, step)
        part.register_parameter(last, torch.nn.Parameter(value, value.is_floating_point()))
    torch.jit.save(torch.jit.trace(whole, torch.ones(1)), folder / "ViT.pt")
    torch.save(state, folder / "plain.pt")
    with torch.no_grad(), towers():
        a, b = (fid.load_clip(folder / file) for file in ("ViT.pt", "plain.pt"))
        pixels = torch.rand(2, 3, 32, 32)
        close(a.encode_image(pixels), b.encode_image(pixels), 0)
        assert a.logit_scale.dtype == torch.float32  # what was stored as fp16 is computed in fp32


def test_public_networks_are_refused_in_their_files_names(folder):
    clip, pick = about("clip_tiny")["shapes"], about("pickscore_tiny")["shapes"]
    load_clip, load_pick = (towers()(load) for load in (fid.load_clip, fid.load_pickscore))
    key = "vision_model.encoder.layers.0.self_attn.k_proj.weight"
    for load, shapes, changes, *words in (
            (load_clip, clip, {"visual.ln_pre.bias": None, "more": [2]}, "ln_pre.bias is missing", "more is (2,), not"),
            (load_clip, clip, {"ln_final.weight": [3]}, "ln_final.weight is (3,), not (64,)"),
            (fid.load_clip, clip, {}, "resblocks.2.attn.in_proj_weight is missing"),  # of other heads
            (load_pick, pick, {key: None}, "0.self_attn.k_proj.weight is missing", "(1 in all)"),
            (load_pick, pick, {"visual_projection.weight": [32, 81]}, "visual_projection.weight is (32, 81)"),
            (load_pick, pick, {key: [80, 81]}, "0.self_attn.k_proj.weight is (80, 81), not (80, 80)"),
            (fid.load_imagereward, {}, {"mlp.layers.0.weight": [1, 1]}, "blip.visual_encoder.cls_token is missing")):
        shapes = {**shapes, **changes}
        zeros = {name: torch.zeros(shape) for name, shape in shapes.items() if shape is not None}
        refused_files(folder, [(load, zeros, *words)])
    whole = public("clip_tiny", folder).read_bytes()
    refused_files(folder, [(load_clip, whole[:99]), (fid.Tokenizer, b"no gzip", "merge table"),
                           (fid.WordPiece, b"no gzip", "no whole vocabulary (KeyError: '[PAD]')")])
    for load, what, words in ((load_clip, "", "that is a folder"), (load_pick, "gone.bin", "--get pickscore"),
                              (fid.load_inception, "gone", "--get inception"), (fid.Tokenizer, "gone", "--get bpe"),
                              (fid.WordPiece, "gone", "--get imagereward_vocab")):
        refused(lambda: load(folder / what), words)


def test_clip_tokens_agree_with_openai():
    need_shared()
    tokenizer = fid.Tokenizer(SHARED / "data/bpe_simple_vocab_16e6.txt.gz")
    for name in ("clip_tokens", "clip_tiny"):
        ids = torch.tensor(about(name)["ids"]) if name == "clip_tokens" else fixture(name)["tokens"]
        close(tokenizer(about(name)["prompts"]), ids, 0)
    assert torch.equal(*tokenizer(["caf\udce9", "caf?"]))  # a byte of no encoding
    long = tokenizer(["dog " * 200])[0]
    assert long[76] == 49407 and (long[1:76] == long[1]).all()  # cut, the end marked


def test_wordpiece_on_hand_made_cases(folder):
    words = "[PAD] [UNK] [CLS] [SEP] a high - quality un ##aff ##able cafe ! !? $ naive _".split()
    cases = [("A  high-quality", "a high - quality"),  # lower case, punctuation stands alone
             ("unaffable", "un ##aff ##able"),         # longest piece first
             ("unaffables", "[UNK]"),                  # one gap and the whole word is unknown
             ("Caf\u00c9!!", "cafe ! !"),              # accents go
             ("a$a_a", "a $ a _ a"),                   # signs stand alone
             ("na\u00efve\ta\u3000a\ra", "naive a a a")]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    ids, mask = fid.WordPiece(folder / "vocab.txt")([text for text, _ in cases] + ["a " * 50])
    for row, m, (_, pieces) in zip(ids, mask.bool().numpy(), cases):
        assert " ".join(words[i] for i in row[m > 0]) == f"[CLS] {pieces} [SEP]"
    assert ids.shape == (7, 35) and mask[6].all() and ids[6, 34] == 3  # cut to 35, the end marked


def test_scores_are_differentiable_in_the_pixels(folder):
    with towers():
        clip = fid.load_clip(public("clip_tiny", folder)).double()
    torch.manual_seed(0)
    pixels = torch.rand(2, 3, 40, 50, dtype=torch.float64, requires_grad=True)  # to be resized
    score = functools.partial(clip.score, text_features=torch.randn(2, 32).double())
    assert torch.autograd.gradcheck(score, pixels, eps=1e-5, atol=0, rtol=1e-4, fast_mode=True)


def test_bicubic_is_pillows_but_for_rounding():
    torch.manual_seed(0)
    picture = F.interpolate(255 * torch.rand(1, 3, 9, 12), (180, 240), mode="bicubic").clamp(0, 255).byte()
    image = Image.fromarray(picture[0].permute(1, 2, 0).numpy())
    for side in (96, 224):  # smaller and larger
        small = image.resize((int(side * 240 / 180), side), Image.BICUBIC)
        left = round((small.width - side) / 2)
        theirs = torch.tensor(np.asarray(small.crop((left, 0, left + side, side)))).permute(2, 0, 1) / 255
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (fid.PIXEL_MEAN, fid.PIXEL_STD))
        gap = (fid.clip_pixels(picture / 255, side)[0] * std + mean - theirs).abs() * 255
        assert gap.max() < 1.3 and gap.mean() < 0.33, (gap.max(), gap.mean())


def test_classifier_takes_bytes_and_floats_and_its_pictures_may_lack_a_split(folder):
    net, images = fid.Classifier(8, 16).eval(), open_data("shapes").images(np.arange(64))
    close(net(images)[1], net(images.float() / 255)[1], 1e-6)
    net.last.bias.data[0] = math.nan  # which argmax takes for the largest
    refused(lambda: fid.classify(net, images), "NaN")
    one = open_data(make_folder(folder / "one", classes=("ant",), each=1))
    refused(lambda: fid.train_classifier(one, 0, "cpu"), "one picture")
    make_folder(folder / "tiny", each=20)
    for test in (("images",), ("",), ()):  # Tiny ImageNet's has no classes; others lack folders, or all
        shutil.rmtree(folder / "tiny/test", ignore_errors=True)
        make_folder(folder / "tiny", classes=test, split="test")
        with redirect_stdout(io.StringIO()) as said, patch.object(fid, "tqdm", lambda steps, **_: steps[:9]):
            net = fid.train_classifier(open_data(folder / "tiny"), 0, "cpu")
        assert "held out" in said.getvalue() and 0 <= net.accuracy <= 1, said.getvalue()


def test_a_classifier_remembers_the_pictures_and_the_seed_it_was_made_from(folder):
    """The same pictures in a folder of another name have the same one. One value of one picture makes others."""
    with all_tiny():
        fid.load_or_train_classifier(open_data(make_folder(folder / "one")), folder)
        before = (folder / "classifier_0.pt").read_bytes()
        again = open_data(make_folder(folder / "two"))
        assert fid.load_or_train_classifier(again, folder).made_from["data"] == "one"
        picture = Image.open(folder / "two/train/ant/0.png").convert("RGB")
        picture.putpixel((0, 0), tuple(255 - value for value in picture.getpixel((0, 0))))
        picture.save(folder / "two/train/ant/0.png")
        (folder / "classifier_1.pt").write_bytes(before)  # it would be the judge of itself
        for other, seed, words in ((open_data(folder / "two"), 0, "another sha256 than"), (again, 1, "another seed"),
                                   (open_data("shapes", img_size=8), 0, "another classes, sha256")):
            error = refused(lambda: fid.load_or_train_classifier(other, folder, seed), f"classifier_{seed}.pt", words)
            assert "copy" in error and "delete" not in error
        assert (folder / "classifier_0.pt").read_bytes() == before
    file = read_checkpoint(folder / "classifier_0.pt")
    refused_files(folder, [(fid.load_classifier, {name: file[name] for name in ("made_from", "model", "accuracy")},
                            "KeyError: 'reference'", "give the classifier_0.pt")])


def test_judged_labels_have_the_shares_of_the_data(folder):
    """Any number of labels has, the first of more labels are the fewer ones, and as frequent classes take turns."""
    for counts in ([6250] * 8, [1000, 1004, 996], [1.0]):
        assert fid.labels_like(torch.tensor(counts), 100).tolist() == [i % len(counts) for i in range(100)]
    for counts in map(torch.tensor, ([1, 5, 0, 94], [102, 100], [1300, 732, 1000] * 300)):
        labels = fid.labels_like(counts, 20000)
        for n in (500, 20000):
            drawn = torch.bincount(labels[:n], minlength=len(counts))
            assert (drawn - n * counts / counts.sum()).abs().max() < 4, (n, drawn)
            assert torch.equal(fid.labels_like(counts, n), labels[:n])
    for name, count in (("disc", 380), ("square", 20)):
        make_folder(folder / "set", classes=(name,), each=count)
    with all_tiny():
        pictures = open_data(folder / "set")
        net = fid.load_or_train_classifier(pictures, folder)
        assert net.reference["classes"].tolist() == net.counts.tolist() == [380, 20]
        run = Namespace(args=Namespace(eval_images=400), rank=0, resumed=None)
        watch = lambda real, classes=2: distill.Watch(run, Namespace(num_classes=classes), real, dict).labels
        for source in (pictures, fid.load_classifier(folder / "classifier_0.pt")):
            assert torch.bincount(watch(source)).tolist() == [380, 20]
            assert torch.equal(watch(source, 3), torch.arange(400) % 3)  # not of this data
    # fid.py says how an .npz differs
    taken = "a.npz: labels without names are taken to mean disc, ... (2 classes)\n"
    for labels, said in ((watch(pictures), taken),
                         (torch.arange(400) % 2, f"{taken}note: a.npz: class frequencies differ from the data's (total "
                                                 "variation 45%)\n"),
                         (torch.arange(400) % 3, "a.npz has no labels, or others than disc, ... (2 classes): no "
                                                 "accuracy of it\n")):
        given = fid.Pictures("a.npz", None, 8, labels.numpy(), None)
        assert heard(lambda: fid.agree_on_classes([given], net, need_labels=False)) == said
        assert (given.labels.min() < 0) == ("no accuracy" in said)
    # its checkpoint may have the classes in another order
    tiny_mar(folder, num_classes=2)
    file = read_checkpoint(folder / "student.pt")
    save_checkpoint({**file, "class_names": ["square", "disc"]}, folder / "x.pt")
    args = fid.parse_args(["--ckpt", "x", "--num", "400"])
    (source,) = fid.checkpoint_pictures(folder / "x.pt", args, "cpu", None, net)
    assert abs((source.labels == 0).sum() - 20) <= 2, source.labels  # squares


def test_classifier_keeps_the_statistics_of_its_data_and_colours_of_shapes_are_counted():
    """Pictures of one colour have the classes' shapes right, and are one mode of eight. Modes are counted exactly."""
    shapes, index = open_data("shapes"), np.arange(1000)
    images, labels = shapes.images(index), shapes.labels[index]
    truth = [int(4 * a) * 2 + int(2 * b) for a, b in zip(*(data.index_uniform(index, k) for k in (3, 4)))]
    assert data.shape_modes(images).tolist() == truth
    net = fid.load_or_train_classifier(shapes, shapes_classifier().parent)
    for name, theirs in fid.statistics_of(net, shapes).items():
        close(net.reference[name], theirs, 1e-6)
    row = fid.judge(net, images, labels)
    assert min(net.accuracy, row["accuracy"]) > 0.9
    assert row["fd"] < fid.judge(net, images.flip(1), labels)["fd"] / 4
    assert 7.9 < row["modes"] <= 8 and abs(sum(row["census"].values()) - 1) < 1e-3
    for kept, modes in (([7], 1), ([0, 1, 6, 7], 4)):
        some = torch.from_numpy(np.isin(truth, kept))
        collapsed = fid.judge(net, images[some], labels[some.numpy()])
        assert collapsed["modes"] < modes + 1e-6 and collapsed["fd_thumb"] > 10 * row["fd_thumb"], kept
        assert collapsed["accuracy"] > 0.9  # which sees nothing of it


def test_a_lost_half_of_the_data_is_seen():
    """Real CIFAR-10 pictures of which the warm half and of these the bright half is kept. By the class's features they
    are hardly farther from the data than what a network draws; thumbnails and modes tell which has lost most."""
    need_shared()
    read = lambda member: np.asarray(Image.open(archive.extractfile(member)).convert("RGB"))
    with tarfile.open(SHARED / "data/cifar10-jpeg.tar.xz") as archive:
        files = (member for member in archive if "test" in Path(member.name).parts and member.isfile())
        images = np.stack([read(file) for file in itertools.islice(files, 0, None, 4)])
    images = torch.from_numpy(images).permute(0, 3, 1, 2)  # (N, 3, 32, 32)
    images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
    red, green, blue = images.float().mean((2, 3)).T  # (N,) each
    warm, bright = red - blue, red + green + blue
    half = images[(warm > warm.median()) & (bright > bright.median())]
    net = fid.load_classifier(HERE / "assets/cifar10/classifier_0.pt")
    labels = torch.arange(300) % 10
    weak = draw(load_mar(HERE / "assets/cifar10/student.pt"), labels, ar_steps=8)
    real, half, weak = (fid.judge(net, x[:300], labels) for x in (images, half, weak))
    assert half["modes"] < min(0.7 * real["modes"], 0.8 * weak["modes"])
    assert half["fd_thumb"] > 5 * weak["fd_thumb"] > real["fd_thumb"]
    rows = {"real": real, "the warm, bright quarter": half, "student": weak}
    return "; ".join(f"{name} FD {row['fd']:.1f}, of thumbnails {row['fd_thumb']:.1f}, {row['modes']:.0f} modes of 64"
                     for name, row in rows.items())


def quick(images):
    """Stands in for Inception in the tests of the command: 64 features of a picture, and zeros."""
    mix = torch.randn(192, 64, generator=torch.Generator().manual_seed(0))
    pool = (F.adaptive_avg_pool2d(images.float() / 255, 8).flatten(1) @ mix).relu()
    pool = F.pad(pool, (0, 2048 - 64))
    return pool, pool[:, :1008]


@contextmanager
def judging():
    """fid.py's command in this process, with the stand-in. -> a function that runs it and returns the rows."""
    def judged(*argv):
        """The rows of this call alone, although it adds them to those of the calls before."""
        results = Path("out/fid/results.jsonl")
        results.unlink(missing_ok=True)
        judged.printed = heard(lambda: fid.main(["--device", "cpu", *map(str, argv)]))
        return [json.loads(line) for line in open(results)]

    distance = fid.frechet_distance  # of quick's 64 features: zeros add nothing to it but seconds
    with (scratch() as folder, chdir(folder), patch.multiple(
            fid, load_inception=lambda path: Mock(to=lambda device: quick),
            frechet_distance=lambda m, s, n, t: distance(m[:64], s[:64, :64], n[:64], t[:64, :64]))):
        yield judged


def pictures(count, seed=0, side=16):
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), np.uint8)


def test_fid_command_on_npz_folder_and_statistics():
    with judging() as judged:
        np.savez("a.npz", arr_0=pictures(40)), np.savez_compressed("b.npz", arr_0=pictures(30, seed=1))
        for i, picture in enumerate(pictures(30, seed=1)):
            save_picture(picture, Path("folder", f"class{i % 2}", f"{i:03}.png"))
        ab, bb = judged("a.npz", "b.npz", "--ref", "b.npz")  # a table
        assert {"fid", "is", "kid", "precision", "recall"} <= set(ab) and (ab["n"], bb["n"]) == (40, 30)
        assert abs(bb["fid"]) < 1e-3 and bb["precision"] == bb["recall"] == 1
        for word in ("warning", "to 30 images of b.npz", "share of the generated inside", "as torch-fidelity's",
                     "mean of 100 subsets of 1,000"):
            assert word in judged.printed, word
        assert ab["kid_std"] is None and "TF1's bilinear resize" not in judged.printed
        close(judged("a.npz", "--ref", "folder")[0]["fid"], ab["fid"], 1e-9)  # the same pictures as files
        judged("b.npz", "--save_stats", "stats.npz")
        stats = dict(np.load("stats.npz"))
        assert (stats["mu"].dtype, stats["sigma"].dtype) == (np.float32, np.float64)  # torch-fidelity's
        plain = {name: stats[name] for name in ("mu", "sigma")}
        np.savez("other.npz", **plain)  # no more than that in MAR's and pytorch-fid's
        np.savez("adm.npz", **plain, arr_0=pictures(20, seed=2))  # of all; some of the pictures
        for file in ("stats.npz", "other.npz", "adm.npz"):
            (row,) = judged("a.npz", "--ref", file)
            close(row["fid"], ab["fid"], 1e-6)  # mu is kept in float32
            assert ("kid" in row) == (file == "adm.npz")  # needs images, not only their statistics
            assert ("TF1's bilinear resize" in judged.printed) == (file == "other.npz")  # of unknown origin
        alive, again = [], Mock(side_effect=AssertionError("the file has the reference's statistics"))
        look = lambda: alive.extend(x.name for x in gc.get_objects() if type(x) is fid.Pictures)
        with happens_at(1, look, (fid, "make_row")), happens_at(2, again, (fid, "mean_and_covariance")):
            judged("a.npz", "--ref", "adm.npz")
        assert alive == ["a.npz"], "the reference's pictures go when their features are had"
        nan = lambda *_: {"clip": torch.tensor([1, torch.nan])}  # a judge that says NaN is not believed
        source = fid.npz_pictures("a.npz", fid.read_npz("a.npz"))
        refused(lambda: fid.collect(source, nan, 2, 0, 1), "says NaN or infinity")
        for name, *words in (("broken", "b.png", "no whole image"), ("sizes", "20 x 16")):  # met at their turn
            refused(lambda: judged(bad_files() / name), *words)
        assert not Path("out/fid/results.jsonl").read_text()


def test_results_are_added_to():
    with judging() as judged:
        np.savez("a.npz", arr_0=pictures(20)), np.savez("b.npz", arr_0=pictures(20, seed=1))
        tiny_mar(Path("."), "teacher")
        with patch.object(Path, "unlink"):  # `judged` leaves what is there
            judged("a.npz"), judged("b.npz")
            np.savez("a.npz", arr_0=pictures(20, seed=2))
            judged("a.npz")
            rows = judged("--ckpt", "teacher.pt", "--ar_steps", 2, "--head_steps", 3, "--seed", 5, "--num", 12)
            assert [row["name"] for row in rows[:3]] == ["a.npz", "b.npz", "a.npz"]
            assert rows[2]["is"] != rows[0]["is"] and rows[3]["n"] == 12
            assert rows[3]["made_by"] == dict(ar_steps=2, head_steps=3, guidance=2.0, guidance_schedule="constant",
                                              temperature=1.0, seed=5, orders="random")
            assert any("10 splits" in line for line in rows[3]["conventions"])


def test_fid_judges_checkpoints_and_folders_by_the_classifier():
    with judging() as judged:
        for stage in ("teacher", "student"):
            tiny_mar(Path("."), stage, **PIXELS_16)
        shutil.copy(shapes_classifier(), ".")
        flags = ("--judges", "classifier", "--classifier", "classifier_0.pt")
        draws = ("--ckpt", "teacher.pt", "student.pt", "--num", 16, "--ar_steps", 2, 4, "--guidance", 1, 3)
        rows = judged(*draws, "--head_steps", 5, *flags)  # a student has a guidance and head steps of its own
        assert [[row["made_by"][flag] for flag in ("ar_steps", "guidance", "head_steps")] for row in rows] == [
            [2, 1, 5], [2, 3, 5], [4, 1, 5], [4, 3, 5], [2, 1, 1], [4, 1, 1]]
        assert len({row["fd"] for row in rows}) == 6 and "guidance 3.0, head_steps 5" in rows[1]["name"]
        for kind, i in itertools.product(("disc", "square"), range(8)):  # to the folder 0 and 1, to the judge 0 and 2
            picture = data.draw_shapes([8 * i + SHAPES.index(kind)])[0].permute(1, 2, 0).numpy()
            save_picture(picture, Path("folder", kind, "deeper", f"{i}.png"))
        (row,) = judged("folder", *flags)
        assert row["accuracy"] > 0.8 and row["n"] == 16
        sample_main("student.pt", "--num", 16, "--classes", "square", "disc")
        assert "accuracy" in judged("samples.npz", *flags)[0]  # an .npz of ours names its classes
        assert np.load("samples.npz")["class_names"].tolist() == SHAPES
        os.rename("folder/disc", "folder/part")
        assert "accuracy" not in judged("folder", *flags)[0]  # a class that is not the classifier's


# ----------------------------------------------------------------------------------------------------------------------
# rl.py: directions, the chain backwards, and the loop


def test_reinforce_does_not_depend_on_batch_or_chunk():
    torch.manual_seed(0)
    z, labels, keys = torch.randn(4, 3, 4, 4), torch.tensor([0, 1, 2, 3]), image_keys(range(4))
    score = lambda a, labels: (a.flatten(1).sin().sum(1) * (labels + 1))
    whole = rl.reinforce_direction(score, z, labels, keys, direction_args(calls=14))[0]
    part = rl.reinforce_direction(score, z[1:3], labels[1:3], keys[1:3], direction_args(calls=14, chunk=5))[0]
    close(part, whole[1:3], 1e-4)


def held_by(work):
    """The most bytes that autograd holds for backward at a time during work()."""
    alive, sums = weakref.WeakSet(), []

    def hold(tensor):
        held = lambda: tensor
        alive.add(held)
        sums.append(sum(one().nbytes for one in alive))
        return held

    with torch.autograd.graph.saved_tensors_hooks(hold, lambda held: held()):
        work()
    return max(sums)


def test_chain_memory_is_that_of_one_step():
    ours, graph = {}, {}
    for K in (4, 8, 16):
        model, labels, seeds, loss, x, slope = chain_problem(K)
        keys, start = image_keys(seeds), shifted(model)
        ours[K] = held_by(lambda: rl.backward_chain(model, start, x, slope, 0.1, 0.1, labels, keys, K))
        graph[K] = held_by(lambda: loss(naive_chain(model, labels, keys, K, start)[0]).backward())
    assert max(ours.values()) < 1.1 * ours[4], ours
    assert graph[8] > 1.7 * graph[4] and graph[16] > 5 * ours[16], (graph, ours)


def rl_gradient_and_autograds(folder, vae, *flags):
    """.grad after one update of rl.py, unclipped, and the derivative of the whole loss by one graph."""
    path, kl, s = folder / "student.pt", 0.3, 0.5
    file = read_checkpoint(path)
    with torch.no_grad():  # as in chain_problem: every token shall heed the others
        for name, p in file["ema"].items():
            p += p.ndim == 1 and name.endswith("weight")
    save_checkpoint(file, path)
    reward = lambda images, labels: (labels + 1) * (images - 0.3).square().mean((1, 2, 3))
    model = load_mar(path).requires_grad_(True)
    start, chains = shifted(model), []
    backward, finish = rl.backward_chain, Gradients.finish

    def noted(student, _, x, slope, kl, s, labels, keys, *rest):  # as if the student had been trained some way
        chains.append((student, labels, keys))
        return backward(student, start, x, slope, kl, s, labels, keys, *rest)

    with (patch.object(rl, "backward_chain", noted), patch.dict(rl.REWARDS, smooth=lambda *_: reward),
          patch.object(Gradients, "finish", lambda gradients, clip: finish(gradients, 0))):
        run_rl(folder, "--reward", "smooth", "--estimator", "pathwise", "--kl", kl, "--noise_std", s, "--steps", 1,
               *flags)

    (student, *_), labels, keys = zip(*chains)
    labels, keys = torch.cat(labels), torch.cat(keys)
    x, squares = naive_chain(model, labels, keys, 4, start)  # (B, c, h, w), a graph of all AR steps of both
    pictures = vae.decode(x / data.LATENT_SCALE) if vae else x
    r = reward(((pictures + 1) / 2).clamp(0, 1), labels)
    (kl * squares / (2 * s**2 * x.numel()) - r.mean()).backward()
    return flat_gradient(student), flat_gradient(model)


@once()
def classifiers(folder):
    """Two classifiers of 8 px shapes, made once for all tests."""
    for seed in (0, 1):
        with all_tiny():
            load_or_train_classifier(open_data("shapes", img_size=8), str(folder), seed)


def write_student(folder, stage="student", **changes):
    """A tiny student of 8 px shapes with random weights, as distill.py writes one, and the classifiers beside it."""
    shutil.copytree(classifiers(), folder, dirs_exist_ok=True)
    tiny_mar(folder, stage, {"ar_steps": 4}, **{"num_classes": 8, **changes})
    return folder / f"{stage}.pt"


def run_rl(folder, *flags):
    """rl.py in this process: -> what it printed."""
    data = "" if "--vae" in flags else "shapes"  # students of latents take none
    tiny = ("--data", data, "--device", "cpu", "--ckpt", folder / "student.pt", "--reward", "red", "--watch",
            "--steps", 4, "--batch", 8, "--calls", 8, "--chunk", 64, "--eval_images", 32, "--eval_every", 2,
            "--save_every", 2, "--log_every", 1)
    with all_tiny() as said:
        rl.main([*map(str, tiny), *map(str, flags)])
    return said.getvalue()


def test_rl_raises_a_reward_and_keeps_the_best_checkpoint(folder):
    """A finished run that is resumed changes nothing."""
    write_student(folder)
    whole = ("--steps", 12, "--eval_every", 6, "--lr", "3e-3", "--ema", 0.5, "--kl", 0, "--calls", 64, "--chunk", 1024)
    out = folder / "rl"
    with patch.multiple(rl, MAX_DISTANCE=9, MIN_MODES=0):
        run_rl(folder, *whole)
        files = [out / name for name in ("results.json", "log.jsonl")]
        rows, lines, was = table_of(out), log_of(out), [file.read_text() for file in files]
        before, after, best = (rows[name] for name in ("before", "after", "best"))
        assert after["red"] > before["red"] + 0.05 and best["reward"] >= after["reward"], rows
        assert after["reward"] == after["red"] and after["seconds_per_image"] > 0
        assert before["made_by"] == {"n": 32, "seed": 1, "step": None, "ar_steps": 4, "head_steps": 1, "guidance": 1.0}
        assert after["made_by"] == {**before["made_by"], "step": 12} and (out / "grid_000012.png").exists()
        assert {"reward", "reward_std", "kl", "grad_norm", "images_per_s"} <= set(lines[0])
        assert lines[0]["kl"] == 0 and lines[-2]["kl"] > 0  # the first picture is the reference's own
        assert lines[-1]["eval"] == after and "reward" not in lines[-1]  # its own is of the pictures trained on
        for name in ("student", "best"):  # both can be drawn from, judged, and trained on
            run_rl(folder, "--ckpt", out / f"{name}.pt", "--steps", 1, "--out", folder / name)
        refused(lambda: run_rl(folder), "already holds a run")
        for flag, value in (("reward", "jpeg"), ("eval_images", 16)):
            refused(lambda: run_rl(folder, "--resume", f"--{flag}", value), f"cannot go on with {flag}")
        run_rl(folder, *whole, "--resume")
        assert [file.read_text() for file in files] == was
        files[0].write_text("{")
        refused(lambda: run_rl(folder, *whole, "--resume"), "results.json", "delete it")
    (folder / "none").mkdir()
    (folder / "none/best.pt").write_text("of an earlier run")
    with patch.object(rl, "MAX_DISTANCE", -1):  # nothing can be best
        run_rl(folder, "--steps", 2, "--out", folder / "none")
    assert "best" not in table_of(folder / "none") and not (folder / "none/best.pt").exists()


def test_best_has_the_most_reward_at_a_bounded_distance():
    row = lambda reward, fd: {"reward": reward, "fd": fd}
    none, best = {"before": row(0, 10)}, {"before": row(0, 10), "best": row(2, 10)}
    for new, rows, verdict in (
            (row(1, 12), none, True),
            (row(1, 12.1), none, False),  # too far
            (row(0, 9), none, False),
            (row(3, 10), best, True),
            (row(1, 9), best, False),
            ({"reward": 3}, none, False), ({}, none, False)):
        assert rl.is_best(new, rows) == verdict, (new, rows)
    for modes, verdict in ((7.3, True), (7.1, False)):  # of 8: a reward that costs colours is hacked at any FD
        assert rl.is_best({**row(1, 9), "modes": modes}, {"before": {**row(0, 10), "modes": 8}}) == verdict


def write_judges(folder):
    """CLIP and PickScore with tiny random weights, where `data.py --get` puts the public files. -> --folder's value."""
    for name in ("clip", "pickscore", "imagereward"):
        (folder / PUBLIC[name][1]).parent.mkdir(parents=True)
    public("clip_tiny", folder).rename(folder / PUBLIC["clip"][1])
    public("pickscore_tiny", folder).rename(folder / PUBLIC["pickscore"][1])
    letters = [chr(i) for i in range(0x4E00, 0x4E00 + 222)]  # a table of CLIP's size, whose pairs no prompt has
    pairs = [f"{a} {b}" for a, b in itertools.product(letters, letters)][:48894]
    (folder / PUBLIC["bpe"][1]).write_bytes(gzip.compress("\n".join(["#", *pairs, ""]).encode()))
    (folder / PUBLIC["imagereward_vocab"][1]).write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *SHAPES]))
    return folder


def test_rl_every_reward_runs_with_both_estimators(folder):
    smooth = {"red": 2, "classifier": 1, "judge": 0.5, "clip": 0.1, "pickscore": 1, "imagereward": 0.01}
    before = lambda name: table_of(folder / name)["before"]
    imagereward = Mock(score=lambda pixels, ids, mask: pixels.mean((1, 2, 3)) * (ids * mask).sum(1))
    imagereward.to.return_value = imagereward
    with patch.object(fid, "load_imagereward", lambda path: imagereward), towers():
        write_student(folder)
        flags = ["--folder", write_judges(folder), "--steps", 1, "--eval_images", 16, "--calls", 4, "--reward",
                 *(f"{name}:{weight}" for name, weight in smooth.items())]
        run_rl(folder, *flags, "jpeg:-0.1")
        row = before("rl")
        assert abs(row["reward"] - sum(w * row[name] for name, w in {**smooth, "jpeg": -0.1}.items())) < 1e-6
        run_rl(folder, *flags, "--watch", "jpeg", "--estimator", "pathwise", "--recompute", "--out", folder / "path")
        assert all(abs(before("path")[name] - row[name]) < 1e-6 for name in ("clip", "pickscore", "jpeg", "diversity"))


def test_rl_is_judged_by_a_classifier_that_is_not_rewarded(folder):
    seen, by, pictures = [], {}, torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
    look = lambda args, start, score, run, watch: seen.append(watch.figures(pictures, torch.arange(4)))
    write_student(folder)
    for names in ("red", "classifier", "judge", "classifier judge"):
        with patch.object(rl, "train", look):
            said = run_rl(folder, "--reward", *names.split(), "--out", folder / names)
        by[names] = seen[-1].get("fd")
        assert ("judge is rewarded" in said) == ("judge" in names), said
    assert by["red"] == by["classifier"] != by["judge"] and by["classifier judge"] is None, by
    assert "without FD" in said


def test_rl_asks_for_words_and_not_for_the_names_of_imagenets_folders(folder):
    """A student of ImageNet has classes n01440764 and so on; prompts must be of the names in assets/."""
    scorer = Mock(return_value=lambda images, labels: images.mean((1, 2, 3)))
    path = write_student(folder)
    with patch.object(rl, "check_names"), patch.object(rl, "prompt_scorer", scorer):
        run_rl(folder, "--reward", "clip", "--watch", "clip", "--steps", 1, "--out", folder / "clip")
        assert [call.args[1] for call in scorer.call_args_list] == [SHAPES]  # once, though trained and watched
        save_checkpoint({**read_checkpoint(path), "class_names": [f"n{i:08}" for i in range(8)]}, path)
        run_rl(folder, "--steps", 1, "--out", folder / "red")  # no words are needed: none are asked for
        refused(lambda: run_rl(folder, "--reward", "clip"), "names 1000 classes, here are 8")


def test_rl_red_and_jpeg_mean_what_they_say():
    rewards = {name: rl.REWARDS[name](None, None, None, "cpu") for name in ("red", "jpeg")}
    images, labels = torch.zeros(2, 3, 16, 16), torch.zeros(2, dtype=torch.long)
    images[1, 0] = 1
    close(rewards["red"](images, labels), torch.tensor([0.0, 1.0]))
    images[0] = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    size = -rewards["jpeg"](images, labels) * 100
    assert size[0] > size[1] + 100, size  # noise costs bytes, a flat picture does not
    close(size, size.round(), 1e-5)
    assert rl.parse_rewards(["jpeg:-1", "red"]) == {"jpeg": -1.0, "red": 1.0}  # larger files and more red
    kls = [rl.parse_args(["--reward", *words]).kl for words in (["clip"], ["classifier"], ["jpeg"], ["red:-2", "clip"])]
    assert kls == [0.2, 2.0, 20.0, 10.2], kls


def test_rl_of_latents_scores_decoded_pictures(folder):
    inception = lambda images: (F.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1), None)  # (N, 12)
    write_student(folder, **LATENT)
    vae, ref = folder / "vae.ckpt", folder / "a.npz"
    vae.touch(), ref.touch()
    flags = ["--vae", vae, "--steps", 1, "--kl", 0]
    judged, blind = ([*flags, "--out", folder / name] for name in ("judged", "blind"))
    judged += ["--ref", ref]
    with patch.multiple(
            rl, load_vae=lambda path: TinyVAE(), load_inception=lambda path: Mock(to=lambda device: inception),
            read_npz=lambda path: None, statistics_in=lambda path, arrays: (np.zeros(12), np.eye(12))):
        run_rl(folder, *judged)
        rows = table_of(folder / "judged")
        assert rows["before"]["fid"] > 0 and set(rows["before"]) == set(rows["after"])
        said = run_rl(folder, *blind)  # no --ref, no distance: nothing says what is best
        assert not (folder / "blind/best.pt").exists() and "there will be no best.pt" in said
        for flag, file in (("vae", vae), ("ref", ref)):  # rows by another could not be compared
            file.write_text("another")
            refused(lambda: run_rl(folder, *judged, "--resume"), f"cannot go on with {flag}_sha256 ")
            file.write_text("")
        refused(lambda: run_rl(folder, *blind, "--ref", ref, "--resume"), "ref_sha256", "(was None)")  # no fid so far
        refused(lambda: run_rl(folder, *flags, "--reward", "classifier"), "clip, pickscore")


def test_rewards_of_every_kind_are_numbers(folder):
    """They may write into what they are given. Those that have no gradient may still be watched."""
    numbers = {"count": lambda a, i: (a > 0.5).sum((1, 2, 3)),
               "truth": lambda a, i: a[:, 0, 0, 0] > 0.5,
               "double": lambda a, i: a.double().mean((1, 2, 3)),
               "half": lambda a, i: a.mean((1, 2, 3)).bfloat16(),
               "squeezed": lambda a, i: a.mean((1, 2, 3)).squeeze(),
               "numpy": lambda a, i: a.mean((1, 2, 3)).numpy(),
               "listed": lambda a, i: [float(one.max()) for one in a],
               "in_place": lambda a, i: a.sub_(0.5).mean((1, 2, 3)) + i.zero_()}
    for (name, f), n in itertools.product(numbers.items(), (1, 3)):
        images, labels = torch.ones(n, 3, 8, 8), torch.arange(n)
        r = rl.guarded(name, f)(images, labels)
        assert r.shape == (n,) and r.dtype == torch.float32, name
        assert images.min() == 1 and labels.tolist() == [*range(n)], name
    late = lambda a, i: torch.full((len(a),), math.nan if len(a) > 2 else 0.0)  # a trial has two pictures
    write_student(folder)
    with patch.dict(rl.REWARDS, {name: lambda *_, f=f: f for name, f in {**numbers, "late": late}.items()}):
        refused(lambda: run_rl(folder, "--reward", "late"), "not finite", "'reward': nan")
        shared = ("--reward", "in_place", "--steps", 1)
        run_rl(folder, *shared, "--watch", "listed", "--eval_images", 33, "--chunk", 32, "--out", folder / "rest")
        run_rl(folder, *shared, "--watch", "jpeg", "count", "--estimator", "pathwise", "--out", folder / "path")


# ----------------------------------------------------------------------------------------------------------------------
# What is refused: one line that says what is wrong, exit code 2, nothing half-written

REFUSED = {  # of each program a line a case: what is typed where `bad_files` lie | a word the answer must hold | ...
    "data": """
        | give --get NAME
        --get kl16 --data bugs --vae x | one of the two
        --dat x | --dat
        --get mar_tiny | invalid choice
        --data . --img_size 0 | at least 1
        --data nowhere --vae zero.pt | no folder 'train'
        --data bugs --img_size 256 | --vae
        --data bugs --vae x | used as pixels
        --data bugs --img_size 72 --vae x | 16
        --data bugs --img_size 64 --vae x | no such file: x | --get kl16
        --data bugs --img_size 64 --vae zero.pt | zero.pt""",
    "distill": """
        --data shapes --teacher nowhere.pt | no such file
        --data shapes --teacher teacher.pt | side 8 | 16
        --data shapes --teacher_steps 0 | either
        --data shapes --teacher student.pt | stage student | teacher.pt
        --data shapes --teacher cut.pt | truncated
        --teacher odd.pt | no MAR checkpoint
        --teacher beside/teacher.pt | beside/classifier_0.pt | truncated
        --data shapes --teacher_head_steps 1001 | below 1001
        --data shapes --ar_steps 17 | 1..16
        --data shapes --eval_images 1 | --eval_images 1 | at least 2
        --data shapes --lr nan | --lr
        --data shapes --ema 1.5 | --ema | below 1
        --data shapes --size medium | --size
        --data shapes --t_init 999 | t_init
        --data shapes --batch 10 --accumulate 4 | multiple
        --data shapes --vae zero.pt | leave it out
        --data shapes --resume | not there
        --data shapes --out file/out | Not a directory | file/out
        --data typo | typo
        --data empty --teacher_steps 1 | no folder 'train'
        --data thirty | 30 px | of 4 px
        --teacher_steps 3 | --data and --teacher_steps""",
    "sample": """
        | --ckpt
        --ckpt nowhere.pt --out new/x.png | no such file
        --ckpt kl16.ckpt | no MAR checkpoint
        --ckpt rl.pt | --vae
        --ckpt student.pt --vae kl16.ckpt | no KLVAE file
        --ckpt student.pt --classes 9 --num 4 --out new | 0..7
        --ckpt student.pt --classes cat | ring
        --ckpt student.pt --ar_steps 17 | 1..16
        --ckpt student.pt --head_steps 100 | student
        --ckpt student.pt --guidance 2 | student
        --ckpt student.pt --gif x.gif --out y.gif | --gif does not use --out
        --ckpt student.pt --num 4 --per_class 2 | --num does not use --per_class
        --ckpt student.pt --export x.pth --classes 0 | --export does not use --classes
        --ckpt teacher.pt --guidance nan | at least 0
        --ckpt student.pt --num 5 --ar_steps 2 4 | --num takes one
        --ckpt student.pt --num 5 --out x.png | .npz
        --ckpt student.pt --out x.jpg | .png
        --ckpt student.pt --out student.pt/x.png | File exists
        --ckpt student.pt --edit student.pt | --box
        --ckpt student.pt --edit student.pt --box 4 0 4 4 | 0..8
        --ckpt student.pt --edit student.pt --box 0 0 4 4 | no whole image
        --ckpt student.pt --edit nowhere.png --box 0 0 4 4 | No such file
        --ckpt student.pt --device tpu | --device tpu""",
    "fid": """
        | nothing to judge
        nowhere | nowhere
        empty | no images
        void.npz | 0 image
        float.npz | float64 | uint8
        grey.npz | (20, 16, 16)
        packed.npz | packed.npz
        good.npz none.npz | none.npz | arr_0 | images
        good.npz --ref fidelity.pt | fidelity.pt | no .npz | mu and sigma
        good.npz --ref keys.npz | mean | mu (2048,)
        good.npz --ref width.npz | (64,) | 2048
        good.npz --ref nan.npz | nan.npz | NaN
        good.npz --ref one.npz | one.npz: 1 image
        good.npz small.npz --ref broken | size of the samples | 16 | 8
        minus.npz --judges clip | no labels
        marked.npz good.npz --judges clip | good.npz has no labels
        named.npz drawn.npz --judges clip | drawn.npz has no labels, or others than ant
        marked.npz large.npz --judges clip | large.npz has no labels | 1000 classes
        marked.npz --judges clip | --get bpe
        good.npz --judges classifier | --classifier FILE
        good.npz --ref good.npz --judges clip | inception
        good.npz minus.npz --save_stats s.npz | one set
        good.npz --save_stats file/x.npz | file
        good.npz --num 9 | --num | --ckpt
        --ckpt student.pt --num 1 | 1 image
        --ckpt student.pt --ar_steps 2 99 | ar_steps 99
        --ckpt nowhere.pt | no such file""",
    "rl": """
        --ckpt nowhere.pt | distill
        --ckpt teacher.pt | distill
        --ckpt student.pt --reward red --watch beauty | clip, pickscore
        --ckpt student.pt --reward red:much | no number
        --ckpt student.pt --reward red red:2 | twice
        --ckpt student.pt --reward clip | --get
        --ckpt student.pt --reward imagereward | --get
        --ckpt student.pt --reward clip --prompt "a picture" | {class}
        --ckpt student.pt --reward red --watch --calls 1 | --calls
        --ckpt student.pt --reward red --watch --noise_std 0 | --noise_std
        --ckpt student.pt --reward red --watch --ar_steps 17 | 16
        --ckpt rl.pt --reward red --watch | --get kl16
        --ckpt rl.pt --reward red --watch --vae good.npz --data shapes | --data is for students of pixels
        --ckpt student.pt --reward red --watch --data bugs | bugs has 2 classes, the student 8
        --ckpt student.pt --reward red --watch --ref good.npz | leave it out
        --ckpt student.pt --reward red --watch --resume --out new | resume.pt
        --ckpt student.pt --reward nan --watch | reward nan is not finite
        --ckpt student.pt --reward shape --watch | reward shape must return a number per image | () for 2
        --ckpt student.pt --reward none --watch | reward none must return a number per image
        --ckpt student.pt --reward red jpeg --watch --estimator pathwise | no gradient | jpeg"""}


@once()
def bad_files(folder):
    """What REFUSED speaks of, bad or not fit for what is asked of it; and files that are good."""
    write_student(folder), write_student(folder, "teacher")
    tiny_mar(folder, "rl", vae_stride=2, patch_size=1)
    torch.save({"model": {"encoder.conv_in.weight": torch.zeros(1)}}, folder / "kl16.ckpt")
    torch.save({"config": "base", "ema": {}}, folder / "odd.pt")
    (folder / "cut.pt").write_bytes((folder / "teacher.pt").read_bytes()[:9999])
    (folder / "beside").mkdir(), (folder / "empty").mkdir()
    shutil.copy(folder / "teacher.pt", folder / "beside")
    (folder / "beside/classifier_0.pt").touch(), (folder / "zero.pt").touch(), (folder / "file").touch()
    make_folder(folder / "bugs"), make_folder(folder / "thirty", size=(30, 30))

    good = pictures(20)
    plain, of_class_0 = {"arr_0": good}, {"arr_0": good, "labels": np.zeros(20, np.int64)}
    for name, arrays in {
            "good": plain, "one": {"arr_0": good[:1]}, "none": {"images": good}, "small": {"arr_0": good[:, ::2, ::2]},
            "float": {"arr_0": good / 255}, "grey": {"arr_0": good[..., 0]}, "marked": of_class_0,
            "void": {name: array[:0] for name, array in of_class_0.items()},
            "minus": {**plain, "labels": np.full(20, -1)}, "large": {**plain, "labels": np.full(20, 1000)},
            "drawn": {**of_class_0, "class_names": ["cat", "ant"]},
            "named": {**of_class_0, "class_names": ["ant", "bee"]},
            "keys": {"mean": np.zeros(2048)}, "width": {"mu": np.zeros(64), "sigma": np.eye(64)},
            "nan": {"mu": np.zeros(2048), "sigma": np.eye(2048) * np.nan}}.items():
        np.savez_compressed(folder / f"{name}.npz", **arrays)
    whole = (folder / "good.npz").read_bytes()
    (folder / "packed.npz").write_bytes(whole[:500] + bytes(100) + whole[600:])  # zlib has errors of its own
    shutil.copy(folder / "width.npz", folder / "fidelity.pt")

    for name, last in (("broken", good[0]), ("sizes", np.zeros((16, 20, 3), np.uint8))):
        for i in range(9):
            save_picture(good[i], folder / name / f"a{i}.png")
        save_picture(last, folder / name / "b.png")
    os.truncate(folder / "broken/b.png", 300)


def refuses_bad_input(program):
    """The lines of REFUSED[program], typed where `bad_files` lie, are refused before anything long starts, and no file
    or folder is made. As a user sees it, that is one line and exit code 2."""
    rewards = {"nan": lambda a, i: torch.tensor([0.0] * 7 + [math.nan])[i],  # a trial asks for the last class too
               "shape": lambda a, i: a.mean(), "none": lambda a, i: None}
    with (judging() as judged, scratch() as folder, patch.object(distill.Run, "steps") as trains,
          patch.dict(rl.REWARDS, {name: lambda *_, f=f: f for name, f in rewards.items()}),
          chdir(shutil.copytree(bad_files(), folder, dirs_exist_ok=True))):
        main = (lambda argv: judged(*argv)) if program == "fid" else globals()[program].main
        before = sorted(folder.rglob("*"))
        for line in REFUSED[program].strip("\n").splitlines():
            typed, *words = (part.strip() for part in line.split("|"))
            trains.side_effect = AssertionError(f"trains: {typed}")
            heard(lambda: refused(lambda: main(shlex.split(typed)), *words))
            assert sorted(folder.rglob("*")) == before, typed
    done = Command(script(f"{program}.py", "--ckpt", "x", "--no_such_flag")).ended()
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done
    assert done.stderr.startswith("error: ") and "--no_such_flag" in done.stderr, done.stderr


for program_name in REFUSED:
    globals()[f"test_{program_name}_refuses_bad_input"] = functools.partial(refuses_bad_input, program_name)


# ----------------------------------------------------------------------------------------------------------------------
# A GPU that is not there. PyTorch's fake tensors have a device, a shape and a dtype, and no numbers. A CPU build lacks
# only what autograd asks of a GPU, a device guard and streams: FAKE_GPU adds ones that do nothing. Then whole training
# steps run on "cuda", and what a GPU would refuse is refused: tensors of two devices in one operation, bf16 against
# float32. So is what a host would have to wait for: reading a value, or copying it. No numbers, no kernels, no times.

FAKE_GPU = r"""
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <optional>
namespace c10::impl {
struct Guard : NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device getDevice() const override { return Device(DeviceType::CUDA, 0); }
  Device exchangeDevice(Device) const override { return getDevice(); }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, getDevice()); }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);
}
namespace at {
struct CUDAHooks : CUDAHooksInterface {
  CUDAHooks(CUDAHooksArgs) {}
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
};
REGISTER_CUDA_HOOKS(CUDAHooks);
}
namespace at::accelerator {  // loaded first, it stands in the place of PyTorch's own
__attribute__((visibility("default"))) std::optional<c10::DeviceType> getAccelerator(bool) { return c10::kCUDA; }
}
"""


def on_fake_gpu(work):
    """Run the function `work`, of a file that knows --rank, in a process that believes in a GPU: -> its stdout."""
    if torch.backends.cuda.is_built() or not shutil.which("g++"):
        raise Skip("needs a CPU build of PyTorch, and g++ to give it a GPU that does nothing")
    torch_folder = Path(torch.__file__).parent
    with scratch() as folder:
        (folder / "gpu.cpp").write_text(FAKE_GPU)
        built = subprocess.run(["g++", "-std=c++20", "-shared", "-fPIC", f"-I{torch_folder}/include", "gpu.cpp",
                                "-o", "gpu.so", f"-L{torch_folder}/lib", "-lc10", "-ltorch_cpu",
                                f"-Wl,-rpath,{torch_folder}/lib"], cwd=folder, capture_output=True, text=True)
        if built.returncode:  # these interfaces are PyTorch's own affair, and this is its 2.13
            raise Skip(f"this PyTorch ({torch.__version__}) has other interfaces: {built.stderr[:200]}")
        for _ in range(2):  # fake tensors now and then crash the interpreter (PyTorch 2.13): that is no verdict
            result = fresh(work.__code__.co_filename, "--rank", work.__name__, LD_PRELOAD=str(folder / "gpu.so"))
            if result.returncode != -signal.SIGSEGV:
                break
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


class Strict(TorchDispatchMode):
    """What fake tensors let pass: matrix products of two dtypes, and copies to the host."""
    products = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.convolution}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given, made = ([x for x in tree_leaves(tree) if torch.is_tensor(x)] for tree in ((args, kwargs), out))
        if func.overloadpacket in self.products and len({x.dtype for x in given}) > 1:
            raise RuntimeError(f"{func} of {[x.dtype for x in given]}")
        if any(x.is_cuda for x in given) and not all(x.is_cuda for x in made):
            raise RuntimeError(f"{func} copies from the GPU")
        return out


@contextmanager
def fake_cuda(mode=Strict):
    """Tensors made inside are fake, and bf16 autocast believes in the GPU."""
    with (patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
          patch("torch.cuda.is_bf16_supported", lambda *_: True), patch("torch.cuda.synchronize"),
          patch.object(torch.Tensor, "pin_memory", lambda x: x),
          FakeTensorMode(allow_non_fake_inputs=True), mode() as inside):
        yield inside


def fake_module(build):
    """build() with fake CUDA weights, frozen. (`Module.to` does not know fake tensors.)"""
    with torch.device("cuda", 0):
        module = build().eval().requires_grad_(False)
    module.to = lambda *_, **__: module
    return module


KEPT = []  # what the loops held: taking fake tensors apart now and then crashes the interpreter (PyTorch 2.13)


def to_its_log_line(loop, program, flags, mode=Strict):
    """loop(args, run), a loop of this program, on the GPU that is not there, until it waits for the device at its first
    log line: -> the mode that watched it."""
    args = program.parse_args([*flags, "--out", "nowhere"])
    with fake_cuda(mode) as inside, patch.object(distill.Run, "log", Mock(side_effect=Killed)):
        try:
            loop(args, distill.Run(args, torch.device("cuda", 0), 0, 1, [], []))
        except Killed as end:
            KEPT.append(end)
            return inside
    raise AssertionError("no log line")


def fake_distillation(stage, config, size, *flags, **how):
    """A stage of distill.py, of such a network: `to_its_log_line`."""
    shape = (config.vae_channels, config.latent_size, config.latent_size)

    class Pictures(list):
        def batch(self, indices, flip, generator):
            return torch.zeros(len(indices), *shape), torch.zeros(len(indices), dtype=torch.long)

    def loop(args, run):
        pictures = Pictures([0] * 99) if args.data else None
        if stage == "teacher":
            return distill.train_teacher(args, config, pictures, run)
        teacher = fake_module(lambda: MAR(config))
        teacher.made = {"ar_steps": 4}
        distill.distil(args, teacher, pictures, run, Blind())

    flags = ["--data", "imagenet", "--size", size, "--steps", "9", "--teacher_steps", "9", "--log_every", "1", *flags]
    with patch.object(distill, "MAR", lambda config: fake_module(lambda: MAR(config)).requires_grad_(True)):
        return to_its_log_line(loop, distill, flags, **how)


def fake_rl(config, *flags, **how):
    """rl.train likewise, with a reward that needs no weights."""
    def loop(args, run):
        vae = None if config.pixels else fake_module(data.KLVAE)
        decode = (lambda x: x) if config.pixels else (lambda x: vae.decode(x / data.LATENT_SCALE))
        rl.train(args, fake_module(lambda: MAR(config)), lambda x, labels: decode(x).mean((1, 2, 3)), run, Blind())

    flags = ["--steps", "9", "--log_every", "1", "--ar_steps", "2", "--calls", "6", *flags]
    return to_its_log_line(loop, rl, flags, **how)


def steps_on_fake_gpu():
    pixels, latents = tiny_config(), tiny_config(**LATENT)
    small, parts = ("--batch", "4", "--teacher_batch", "4"), ("--accumulate", "2", "--recompute")
    for flags in ((), parts):
        fake_distillation("teacher", replace(pixels, dropout=0.1), "shapes", *small, *flags)
    for flags in (("--data", ""), ("--guidance", "1"), parts, ("--loss", "vsd", "--log_every", "2")):
        fake_distillation("student", pixels, "shapes", *small, *flags)
    for config, *flags in ((pixels, "--estimator", "pathwise", *parts), (latents, "--log_every", "2"),
                           (latents, "--estimator", "pathwise")):
        fake_rl(config, "--batch", "4", *flags)

    with fake_cuda():
        cuda, seen = torch.device("cuda", 0), set()
        model, vae = bf16_weights(fake_module(lambda: MAR(latents))), fake_module(data.KLVAE)
        model.decoder_blocks[0].mlp.register_forward_hook(lambda _, x, y: seen.add(y.dtype))
        labels, keys = torch.zeros(3, dtype=torch.long, device=cuda), torch.zeros(3, 2, dtype=torch.long, device=cuda)
        for how in ({}, {"head_steps": 3, "guidance": 2.0}):
            latents = model.generate(labels, 4, seeds=keys, **how)
            with patch.object(torch.Tensor, "__bool__", lambda broken: not broken.is_cuda):  # here are no numbers
                images = sample.decode(model, latents, vae)
            assert images.shape == (3, 3, 64, 64) and images.is_cuda
        assert seen == {torch.bfloat16}
        pool, logits = fake_module(fid.Inception)(images)
        assert pool.is_cuda and pool.dtype == logits.dtype == torch.float32

        x = torch.zeros(3, 3, 64, 64, device=cuda).requires_grad_()
        for wrong, words in (  # that the net has no hole: what must be refused is
                (lambda: x + torch.zeros(64), "same device"), (lambda: x.sum().item(), "_local_scalar_dense"),
                (lambda: x.cpu(), "copies from the GPU"), (lambda: x[0, 0].bfloat16() @ x[0, 0], "bfloat16")):
            assert words in refused(wrong, by=(RuntimeError, DataDependentOutputException))
    print("all steps reached", flush=True)
    os._exit(0)  # and takes nothing apart


def test_every_stage_runs_on_a_gpu_that_is_not_there():
    """Devices, dtypes and host syncs of the CUDA path: all loops forward and backward, sampling, the VAE, Inception."""
    assert "all steps reached" in on_fake_gpu(steps_on_fake_gpu)


def test_measurements_name_what_prints_them(folder):
    """Tests and functions of assets/measure.py that assets/measurements.md names are there, and a small one runs."""
    place = patch.object(sys, "path", [str(HERE / "assets"), *sys.path])
    with place, patch.dict(sys.modules, test_all=sys.modules[__name__]):
        measure = importlib.import_module("measure")
    text = (HERE / "assets/measurements.md").read_text()
    functions, tests = re.findall(r"measure\.py ([a-z_]+)", text), re.findall(r"`(test_\w+)`", text)
    words = " ".join(re.findall(r"python test_all\.py ([\w ]+)`", text)).split()
    assert functions and set(functions) <= set(measure.MEASUREMENTS) and tests and set(tests) <= set(globals())
    assert words and all(any("test_" in name and word in name for name in globals()) for word in words), words
    assert "student, batch 4, without the last block's cut" in measure.shortcuts(repeat=1, size="shapes")
    teacher = measure.random_teacher(folder / "x.pt", tiny_config(num_classes=1000, **LATENT))
    distill.check_names(load_mar(teacher), open_data(measure.random_latents(folder)))  # as distill.py would


def judged(test, said):
    """Run a test and end this process, a fork with a group of its own, with the verdict as exit code. The file `said`
    then holds what a reader wants: a result, a reason to skip, or all that was printed and the traceback."""
    os.setpgid(0, 0)
    usual_signals()
    for stream in (1, 2):
        os.dup2(said.fileno(), stream)
    sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)
    faulthandler.dump_traceback_later(HANG, exit=True)
    torch.manual_seed(0)
    try:
        with scratch() as folder:  # for a test that takes one
            result, code = test(*[folder] * len(inspect.signature(test).parameters)), 0
    except Skip as reason:
        result, code = reason, SKIPPED
    except BaseException:  # SystemExit too: a program under test that leaves is no success
        traceback.print_exc()
        os._exit(1)
    said.seek(0), said.truncate(), said.write(str(result or "")), said.flush()
    os._exit(code)


def run_tests(names, jobs):
    """Run these tests, `jobs` at a time, and print their verdicts as they come: -> how many passed, failed, were
    skipped. A test that ends by itself, or by a signal, has failed; what it leaves running is killed."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))  # by way of `finally`
    todo = sorted(names, key=lambda name: not any(word in name for word in LONG))
    running, counts = {}, {"ok": 0, "FAILED": 0, "skipped": 0}
    try:
        while todo or running:
            while todo and len(running) < jobs:
                name, said = todo.pop(0), tempfile.TemporaryFile("w+")
                pid = os.fork()
                if pid == 0:
                    judged(globals()[name], said)
                running[pid] = name, said, time.time()
            pid, status, usage = os.wait4(-1, 0)
            name, said, start = running.pop(pid)
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            said.seek(0)
            code, text = os.waitstatus_to_exitcode(status), said.read()[-6000:]
            verdict = {0: "ok", SKIPPED: "skipped"}.get(code, "FAILED")
            counts[verdict] += 1
            if verdict == "FAILED":
                text = f"exit code {code}\n{text}"
            print(f"{name} {verdict}{': ' * bool(text)}{text} ({time.time() - start:.1f} s, "
                  f"{usage.ru_utime + usage.ru_stime:.1f} of CPU)", flush=True)
    finally:
        for pid in running:
            os.killpg(pid, signal.SIGKILL)
    return counts.values()


def main():
    if sys.argv[1:2] == ["--rank"]:  # a process that a test started
        torch.set_num_threads(1)
        return globals()[sys.argv[2]](*sys.argv[3:])
    p = ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("words", nargs="*", help="run the tests whose names hold one of them")
    p.add_argument("--jobs", type=int, default=getattr(os, "process_cpu_count", os.cpu_count)(), metavar="N",
                   help="so many at once (default: the cores)")
    args = p.parse_args()
    importlib.import_module("torch._dynamo")  # seconds, of the first optimiser: once, and not in each fork
    torch.set_num_threads(1)  # sums in one order, and two threads on a busy machine wait for each other
    session()  # asked for here, it is one for all forks
    words = args.words or [""]
    names = [name for name in globals() if name.startswith("test_") and any(word in name for word in words)]
    if not names:
        raise UserError(f"no test has one of {' '.join(args.words)} in its name")
    passed, failed, skipped = run_tests(names, args.jobs)
    print(f"{passed} passed, {failed} failed" + f", {skipped} skipped" * bool(skipped))
    sys.exit(failed > 0)


if __name__ == "__main__":
    run_main(main)
