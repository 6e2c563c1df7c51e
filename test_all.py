"""All tests: python test_all.py [words]. Only functions whose name holds one of the words run, if words are given.

Three kinds: the mathematics against closed forms; agreement with the public code's outputs in ../shared/fixtures
(skipped, with the reason, where that folder is missing); every stage end to end at a tiny size. They are also meant to
be read: a test states one fact of the method and shows it.
"""
import contextlib
import copy
import functools
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import distill
from data import open_data, train_indices
from fid import load_or_train_classifier
from model import (CHAIN, MAR, SIZES, START, Gradients, MARConfig, UserError, alpha_sigma, cosine_schedule,
                   diffusion_loss, gaussian, image_keys, load_mar, random_orders, read_checkpoint, reveal_plan,
                   save_checkpoint)

os.environ.setdefault("TQDM_DISABLE", "1")  # progress bars would drown the verdicts
HERE = Path(__file__).resolve().parent
SHARED = HERE.parent / "shared"
FIXTURES = SHARED / "fixtures"


class Skip(Exception):
    """Raised by a test that cannot run here; the message says why."""


def need_shared():
    """The fixtures' `fill` function. Skips where ../shared is missing."""
    if not (FIXTURES / "fill.py").is_file():
        raise Skip("../shared/fixtures is not there")
    space = {}
    exec(compile((FIXTURES / "fill.py").read_text(), "fill.py", "exec"), space)  # a plain script of the fixtures' own
    return space["fill"]


def fill(shapes, seed=0):
    """{name: float32 array}: the fixtures' deterministic weights for {name: shape}."""
    return need_shared()(shapes, seed)


def fixture(name):
    """The arrays of ../shared/fixtures/NAME.npz as tensors."""
    need_shared()
    with np.load(FIXTURES / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(np.asarray(arrays[key])) for key in arrays.files}


def run(*argv, timeout=300, **env):
    """One of our programs as a user starts it: -> CompletedProcess with text output, in one thread."""
    return subprocess.run([sys.executable, *map(str, argv)], cwd=HERE, capture_output=True, text=True, timeout=timeout,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **env})


def torchrun(world, *argv, timeout=300, **env):
    """The same on `world` gloo processes of this machine."""
    return run("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}", *argv, timeout=timeout, **env)


@contextlib.contextmanager
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


def refuses(result, *words):
    """Assert that a program ended with exit code 2 and one line on stderr that holds the words."""
    assert result.returncode == 2, f"exit code {result.returncode}: {result.stderr[-800:]}"
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in result.stderr, result.stderr[-800:]
    for word in words:
        assert word in lines[0], f"{word!r} not in: {lines[0]}"


# ----------------------------------------------------------------------------------------------------------------------
# model.py: the networks and the diffusion are the public ones


def tiny_config(**changes):
    """A MAR of 16 pixel tokens, small enough for a test and complete: every code path of the real one."""
    return MARConfig(**{**dict(img_size=8, vae_stride=1, patch_size=2, vae_channels=3, num_classes=4, width=32, heads=2,
                               encoder_depth=2, decoder_depth=2, buffer_size=2, head_depth=1, head_width=32,
                               dropout=0.0, mask_ratio_min=0.5, t_init=625), **changes})


def tiny_mar(seed=0, **changes):
    """A tiny MAR whose every weight is random: the initialisation's zeros would hide most of the network."""
    torch.manual_seed(seed)
    model = MAR(tiny_config(**changes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) / (p.shape[-1] ** 0.5 if p.ndim > 1 else 10))
    return model.requires_grad_(False)


def test_schedule_is_the_public_one():
    theirs = fixture("diffusion")
    for steps, prefix in ((1000, "train"), (10, "gen10"), (25, "gen25"), (100, "gen100")):
        ours = cosine_schedule(steps)
        names = {"betas": "beta", "alphas_cumprod": "abar", "posterior_log_variance_clipped": "log_post_var"}
        names |= {"timesteps": "t"} if steps < 1000 else {"posterior_mean_coef1": "coef_x0", "posterior_mean_coef2": "coef_xt"}
        for name, key in names.items():
            close(ours[key], theirs[f"{prefix}_{name}"], 1e-10)


def test_noise_levels_quoted_in_the_text():
    alpha, sigma = alpha_sigma(torch.tensor([755, 973, 999]))
    ratio = (sigma / alpha)[:, 0]  # 2.5 where the student starts, 24.7 the noisiest level trained, 20,291 unusable
    assert abs(ratio[0] - 2.5) < 0.01 and abs(ratio[1] - 24.7) < 0.1 and abs(ratio[2] - 20291) < 300, ratio


def test_mar_tiny_agrees_with_the_public_mar():
    z = fixture("mar_tiny")
    model = load_mar(FIXTURES / "mar_tiny.pth", ema=False, heads=4)
    tokens = model.patchify(z["latents"])
    close(tokens, z["tokens"]), close(model.unpatchify(tokens), z["latents"])
    visible = z["mask"].argsort(dim=1, stable=True)[:, :16 - int(z["mask"][0].sum())]
    close(model.encode(tokens, visible, z["labels"]), z["encoded"])
    close(model.condition(tokens, z["mask"], z["labels"]), z["z"])
    close(model.condition(tokens, z["mask"], None), z["z_uncond"])
    close(model.head(z["head_x"], z["head_t"], z["head_c"]), z["head_out"])


def test_loss_agrees_with_the_public_mar():
    z = fixture("mar_tiny")
    model = load_mar(FIXTURES / "mar_tiny.pth", ema=False, heads=4)
    tokens = model.patchify(z["latents"])
    c = model.condition(tokens, z["mask"], z["labels"]).flatten(0, 1).repeat(2, 1)  # diffusion_batch_mul 2
    x0, t, eps, mask = tokens.flatten(0, 1).repeat(2, 1), z["loss_t"], z["loss_noise"], z["mask"].flatten().repeat(2)
    alpha, sigma = alpha_sigma(t)
    x_t = alpha * x0 + sigma * eps
    loss = diffusion_loss(model.head(x_t, t, c), x0, x_t, t, eps)
    close((loss * mask).sum() / mask.sum(), z["loss"])


def test_sampling_runs_of_the_public_mar_replay():
    z = fixture("mar_tiny")
    model = load_mar(FIXTURES / "mar_tiny.pth", ema=False, heads=4)
    for name, schedule in (("plain", "linear"), ("cfg_linear", "linear"), ("cfg_const_cold", "constant")):
        temperature, guidance, ar_steps, head_steps = z[f"sample_{name}_args"].tolist()
        rows = z[f"sample_{name}_noise_rows"].tolist()
        draws = z[f"sample_{name}_noise"].split([16 * n for n in rows])  # start noise, then one draw a chain step

        def noise(k, j, predict, draws=draws, steps=int(head_steps)):
            draw = draws[k * (steps + 1) + (0 if j is None else steps - j)].view(-1, 16)
            return draw[:predict.numel()].view(*predict.shape, 16)

        out = model.generate(z["labels"], int(ar_steps), int(head_steps), guidance, schedule, temperature,
                             orders=z[f"sample_{name}_orders"], noise=noise)
        close(out, z[f"sample_{name}_out"])


def test_public_checkpoint_gives_ema_by_default():
    need_shared()
    raw = load_mar(FIXTURES / "mar_tiny.pth", ema=False, heads=4).state_dict()
    for name, value in load_mar(FIXTURES / "mar_tiny.pth", heads=4).state_dict().items():
        close(value, raw[name] / 2, 1e-6)  # the fixture's EMA is half of its model


def test_mar_base_agrees_with_the_public_mar_at_full_size():
    z, shapes = fixture("mar_base"), json.loads((FIXTURES / "mar_full_shapes.json").read_text())
    with scratch() as folder:
        weights = fill(shapes["mar_base"]["shapes"])
        torch.save({"model": {}, "model_ema": {name: torch.from_numpy(w) for name, w in weights.items()}},
                   folder / "base.pth")
        model = load_mar(folder / "base.pth")
        assert model.config == SIZES["base"]
        c = model.condition(model.patchify(z["latents"]), z["mask"], z["labels"])
        close(c, z["z"])
        close(model.head(z["head_x"], z["head_t"], z["z"][0, :8]), z["head_out"])


def test_parameter_counts():
    for name, count in (("base", 207_924_768), ("large", 478_326_304), ("huge", 942_403_104)):
        with torch.device("meta"):
            assert sum(p.numel() for p in MAR(SIZES[name]).parameters()) == count


def test_last_block_computes_only_what_is_asked():
    model = tiny_mar()
    tokens, labels = torch.randn(3, 16, 12), torch.tensor([0, 1, 3])
    orders = random_orders(image_keys(range(3)), 16)
    visible, predict = orders[:, 11:].sort(dim=1).values, orders[:, 4:11].sort(dim=1).values
    mask = torch.ones(3, 16).scatter(1, visible, 0.0)
    whole = model.condition(tokens, mask, labels)
    close(model.context(tokens, visible, labels, predict), whole.gather(1, predict[:, :, None].expand(-1, -1, 32)), 1e-5)


def test_masked_tokens_never_leak_into_the_condition():
    model, labels = tiny_mar(), torch.tensor([0, 1])
    mask = torch.zeros(2, 16)
    mask[:, ::2] = 1
    tokens = torch.randn(2, 16, 12)
    other = torch.where(mask[:, :, None] == 1, torch.randn(2, 16, 12), tokens)
    close(model.condition(tokens, mask, labels), model.condition(other, mask, labels), 0.0)


def test_reveal_plan_covers_every_token_once():
    for seq_len, ar_steps in ((16, 1), (16, 16), (256, 64), (256, 256), (64, 7)):
        orders = random_orders(image_keys(range(2)), seq_len)
        seen = torch.zeros(2, seq_len)
        for visible, predict in reveal_plan(orders, ar_steps):
            assert predict.shape[1] >= 1 and (seen.gather(1, visible) == 1).all()
            seen.scatter_add_(1, predict, torch.ones(predict.shape))
        assert (seen == 1).all()


def test_noise_is_standard_normal_and_has_no_state():
    keys = image_keys(range(4000))
    positions = torch.arange(16).expand(4000, 16)
    n = gaussian(keys, START, positions, 8)
    assert abs(n.mean()) < 0.006 and abs(n.var() - 1) < 0.01 and abs((n**4).mean() - 3) < 0.06
    for a, b in ((n[1:], n[:-1]), (n[:, 1:], n[:, :-1]), (n[..., 1:], n[..., :-1]), (n, gaussian(keys, CHAIN, positions, 8))):
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


def test_checkpoints_that_do_not_fit_are_refused():
    def says(path, *words, **overrides):
        try:
            load_mar(path, **overrides)
        except UserError as error:
            assert all(word in str(error) for word in words) and "\n" not in str(error), error
        else:
            raise AssertionError(f"{path} was accepted")

    model = tiny_mar()
    with scratch() as folder:
        good = {"config": asdict(model.config), "stage": "teacher", "ema": model.state_dict(), "args": {}, "step": 1}
        save_checkpoint(good, folder / "good.pt")
        close(load_mar(folder / "good.pt").z_proj.weight, model.z_proj.weight, 0.0)
        says(folder / "nothing.pt", "no such file")
        (folder / "cut.pt").write_bytes((folder / "good.pt").read_bytes()[:20000])
        says(folder / "cut.pt", "truncated")
        torch.save({"model": {"decoder.conv_in.weight": torch.zeros(2)}}, folder / "vae.pt")
        says(folder / "vae.pt", "no MAR checkpoint")
        less = {name: value for name, value in good["ema"].items() if name != "mask_token"}
        save_checkpoint({**good, "ema": {**less, "extra": torch.zeros(1)}}, folder / "less.pt")
        says(folder / "less.pt", "mask_token missing", "extra unexpected")
        says(folder / "good.pt", "z_proj.weight is (32, 12), not (32, 3)", patch_size=1)

        class Evil:
            def __reduce__(self):
                return os.system, ("touch " + str(folder / "owned"),)

        import pickle
        (folder / "evil.pt").write_bytes(pickle.dumps({"model": Evil()}))
        says(folder / "evil.pt", "cannot be read")
        assert not (folder / "owned").exists()


def test_checkpoint_write_is_all_or_nothing():
    with scratch() as folder:
        path = folder / "x.pt"
        save_checkpoint({"a": torch.ones(3)}, path)
        before = path.read_bytes()
        try:
            save_checkpoint({"a": lambda: 0}, path)  # fails half-way
        except Exception:
            pass
        assert path.read_bytes() == before and [p.name for p in folder.iterdir()] == ["x.pt"]


# ----------------------------------------------------------------------------------------------------------------------
# distill.py: the loss


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
    loss = distill.gsim_loss(alpha * x0 + sigma * eps, eps, alpha, sigma, lambda x: -(x - alpha * 0.7) / variance,
                             lambda x: -x, distance)
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


def test_pseudo_huber_and_its_derivative():
    y = torch.randn(50, 12, dtype=torch.float64, requires_grad=True)
    d, d_prime = distill.pseudo_huber(y)
    close(torch.autograd.grad(d.sum(), y)[0], d_prime.detach(), 1e-8)
    close(d, y.norm(dim=1), 1e-4)  # a norm, but smooth at 0


def test_distillation_gradients_vanish_when_student_is_teacher():
    """Equal scores: VSD's gradient is 0 for every sample. GSIM's is 0 on average only (L1 is a trade in expectation)."""
    n = 200_000
    t = torch.randint(20, 974, (n,), generator=torch.Generator().manual_seed(0))
    alpha, sigma = alpha_sigma(t)
    x0, eps = torch.randn(n, 1), torch.randn(n, 1)
    exact = lambda x: sigma * x  # eps of data N(0, 1), for teacher and critic alike
    assert distill.vsd_gradient(x0, t, eps, exact, exact)[0].abs().max() == 0
    v, _ = distill.gsim_gradient(x0, t, eps, exact, exact)
    assert v.mean().abs() < 4 * v.std() / n**0.5 + 1e-6 and (v * x0).mean().abs() < 4 * (v * x0).std() / n**0.5 + 1e-6


def test_vsd_points_from_student_to_teacher():
    """Student N(1, 1), teacher N(0, 1): descending the gradient must lower x0's mean."""
    t = torch.randint(20, 974, (10_000,), generator=torch.Generator().manual_seed(0))
    alpha, sigma = alpha_sigma(t)
    x0, eps = 1 + torch.randn(10_000, 1), torch.randn(10_000, 1)
    student, teacher = (lambda x: sigma * (x - alpha)), (lambda x: sigma * x)
    for gradient in (distill.vsd_gradient, distill.gsim_gradient):
        assert gradient(x0, t, eps, student, teacher)[0].mean() > 0, gradient


def test_guidance_of_one_is_none_and_zero_is_the_null_class():
    model, n = tiny_mar(), torch.randn(6, 12)
    t, c, null = torch.full((6,), 300), torch.randn(6, 32), torch.randn(6, 32)
    close(distill.guided_eps(model, n, t, c, None, 1.0), model.eps(n, t, c), 1e-6)
    close(distill.guided_eps(model, n, t, c, null, 1.0), model.eps(n, t, c), 1e-5)
    close(distill.guided_eps(model, n, t, c, null, 0.0), model.eps(n, t, null), 1e-5)


def test_masked_share_follows_the_public_distribution():
    counts = np.array([distill.masked_count(SIZES["base"], 0, step) for step in range(4000)])
    assert counts.min() >= 180 and counts.max() <= 256 and abs(counts.mean() / 256 - 0.867) < 0.006, counts.mean() / 256


# ----------------------------------------------------------------------------------------------------------------------
# distill.py: the program

TINY = ("distill.py", "--data", "shapes", "--device", "cpu", "--size", "shapes", "--teacher_steps", 6, "--teacher_batch", 8,
        "--steps", 6, "--batch", 8, "--eval_images", 16, "--teacher_head_steps", 4, "--log_every", 2, "--eval_every", 4,
        "--save_every", 1, "--ar_steps", 4)


@functools.lru_cache(maxsize=None)
def shapes_classifier():
    """The bytes of the shapes' classifier, trained once for all tests (20 s)."""
    with scratch() as folder:
        load_or_train_classifier(open_data("shapes"), folder)
        return (folder / "classifier_0.pt").read_bytes()


def distill_tiny(out, *flags, world=1):
    """A whole tiny run of distill.py into the folder `out`; asserts that it ended well."""
    out.mkdir(exist_ok=True)
    (out / "classifier_0.pt").write_bytes(shapes_classifier())
    result = torchrun(world, *TINY, "--out", out, *flags) if world > 1 else run(*TINY, "--out", out, *flags)
    assert result.returncode == 0, result.stderr[-2000:]


def weights(folder, name="student.pt", key="ema"):
    return read_checkpoint(folder / name)[key]


def test_distill_end_to_end_and_resume_is_bit_exact():
    """A run killed at some step of either stage and resumed ends in the very bits of the run left alone."""
    with scratch() as folder:
        distill_tiny(folder / "whole")
        for name in ("config.json", "log.jsonl", "results.json", "teacher.pt", "student.pt", "grid_000006.png"):
            assert (folder / "whole" / name).is_file(), name
        table = json.loads((folder / "whole" / "results.json").read_text())
        assert set(table) == {"teacher_100", "teacher_1", "student"} and table["student"]["fd"] > 0
        whole = weights(folder / "whole", "resume.pt", "model")
        for wanted in (3, 9):  # stage 0 has 6 steps, so 9 is step 3 of stage 1
            out = folder / str(wanted)
            out.mkdir()
            (out / "classifier_0.pt").write_bytes(shapes_classifier())
            process = subprocess.Popen([sys.executable, *map(str, TINY), "--out", out], cwd=HERE, text=True,
                                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                       env={**os.environ, "OMP_NUM_THREADS": "1"})
            while process.poll() is None:  # kill -9 as soon as the checkpoint of that step is there
                with contextlib.suppress(UserError):
                    file = read_checkpoint(out / "resume.pt")
                    if file["step"] + 6 * (file["stage"] == "student") >= wanted:
                        process.kill()
                time.sleep(0.01)
            distill_tiny(out, "--resume")
            resumed = weights(out, "resume.pt", "model")
            assert all(torch.equal(whole[name], resumed[name]) for name in whole), wanted


def test_two_processes_train_as_one():
    """The same batch on one process and on two: teacher, student and critic end equal but for rounding."""
    with scratch() as folder:
        distill_tiny(folder / "one", "--eval_images", 8)
        distill_tiny(folder / "two", "--eval_images", 8, world=2)
        # Adam turns the rounding of a gradient that is zero by symmetry (the bias of attention's keys) into whole
        # steps, and the distillation's beta_1 = 0 does not average them out: hence the looser bound there
        for name, key, bound in (("teacher.pt", "ema", 1e-6), ("resume.pt", "model", 1e-3), ("resume.pt", "critic", 1e-3)):
            one, two = weights(folder / "one", name, key), weights(folder / "two", name, key)
            apart = sum((one[n] - two[n]).square().sum() for n in one) / sum(one[n].square().sum() for n in one)
            assert apart**0.5 < bound, (name, key, apart**0.5)


def test_accumulation_and_variants_run():
    with scratch() as folder:
        distill_tiny(folder / "t", "--steps", 1, "--eval_images", 8)
        teacher = ("--teacher", folder / "t" / "teacher.pt", "--teacher_steps", 0, "--steps", 2, "--eval_images", 8)
        results = {}
        for name, flags in {"plain": (), "accumulate": ("--accumulate", 4), "vsd": ("--loss", "vsd"),
                            "head": ("--critic", "head"), "linear": ("--guidance_schedule", "linear"),
                            "turns": ("--critic_steps", 2), "plain_g1": ("--guidance", 1)}.items():
            distill_tiny(folder / name, *teacher, *flags)
            results[name] = weights(folder / name, "resume.pt", "model")
        start = weights(folder / "t", "teacher.pt")
        for name, state in results.items():
            moved = sum((results["plain"][key] - start[key]).square().sum() for key in start) ** 0.5
            other = sum((results["plain"][key] - state[key]).square().sum() for key in start) ** 0.5 / moved
            assert other < 0.01 if name in ("plain", "accumulate") else other > 0.015, (name, other)


def test_distill_refuses_bad_input():
    with scratch() as folder:
        model = tiny_mar()
        save_checkpoint({"config": asdict(model.config), "stage": "teacher", "ema": model.state_dict(), "args": {},
                         "step": 1}, folder / "tiny.pt")
        (folder / "cut.pt").write_bytes((folder / "tiny.pt").read_bytes()[:9999])
        (folder / "empty").mkdir()
        (folder / "file").write_text("")
        shapes = ("distill.py", "--data", "shapes", "--device", "cpu", "--out", folder / "out")
        given = (*shapes, "--teacher_steps", 0, "--teacher")
        refuses(run(*given, folder / "nothing.pt"), "no such file")
        refuses(run(*given, folder / "cut.pt"), "truncated")
        refuses(run(*given, folder / "tiny.pt"), "side 8", "16")
        refuses(run(*shapes, "--teacher", folder / "tiny.pt"), "not both")
        refuses(run(*shapes, "--teacher_steps", 0), "no teacher")
        refuses(run(*shapes, "--ar_steps", 17), "16 tokens")
        refuses(run(*shapes, "--ar_steps", 0), "--ar_steps", "at least 1")
        refuses(run(*shapes, "--steps", -1), "--steps", "at least 0")
        refuses(run(*shapes, "--lr", "nan"), "--lr")
        refuses(run(*shapes, "--size", "medium"), "--size")
        refuses(run(*shapes, "--no_such_flag"), "--no_such_flag")
        refuses(run(*shapes, "--t_init", 999), "t_init")
        refuses(run(*shapes, "--batch", 10, "--accumulate", 4), "multiples")
        refuses(run(*shapes, "--resume"), "not there")
        refuses(run("distill.py", "--data", folder / "empty", "--device", "cpu", "--teacher_steps", 1), "train")
        refuses(run(*shapes[:-1], folder / "file" / "out"), "cannot write")
        assert not (folder / "out").exists()  # nothing half-written


def test_sigterm_writes_a_checkpoint_and_ends_well():
    """What a cluster sends before it takes a machine away; then --resume ends in the bits of an undisturbed run."""
    with scratch() as folder:
        (folder / "classifier_0.pt").write_bytes(shapes_classifier())
        flags = (*TINY, "--out", folder, "--teacher_steps", 100000, "--save_every", 100000, "--log_every", 1)
        process = subprocess.Popen([sys.executable, *map(str, flags)], cwd=HERE, text=True, stdout=subprocess.PIPE,
                                   env={**os.environ, "OMP_NUM_THREADS": "1"})
        while not (folder / "log.jsonl").exists():
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0 and "SIGTERM" in out, out
        assert read_checkpoint(folder / "resume.pt")["step"] == int(re.search(r"step (\d+)", out)[1])


def test_non_finite_loss_stops_and_keeps_the_last_checkpoint():
    with scratch() as folder:
        (folder / "classifier_0.pt").write_bytes(shapes_classifier())
        refuses(run(*TINY, "--out", folder, "--teacher_lr", "1e30", "--clip", 0, "--save_every", 2), "not finite at step")


def test_profile_of_a_step():
    """Where a distillation step's time goes: data loading must be under 2 %."""
    data, (device, rank, world) = open_data("shapes"), ("cpu", 0, 1)
    model = MAR(SIZES["shapes"]).eval()
    args = distill.parse_args(["--data", "shapes"])

    def seconds(f, n=6):
        f()
        start = time.perf_counter()
        for _ in range(n):
            f()
        return (time.perf_counter() - start) / n

    batch = lambda: distill.training_batch(data, model, args.batch, 0, 3, torch.device("cpu"), 0, 1)
    tokens, labels, keys, visible, masked = batch()
    raw = seconds(lambda: data.batch(*train_indices(len(data), args.batch, 3, 0), torch.Generator()))
    with torch.no_grad():
        forward = seconds(lambda: model.context(tokens, visible, labels, masked))
    transformer = seconds(lambda: model.context(tokens, visible, labels, masked).sum().backward())
    N, C = masked.numel(), model.config.token_dim
    x, t = torch.randn(N, C, requires_grad=True), torch.randint(0, 1000, (N,))
    c = torch.randn(N, model.config.width, requires_grad=True)
    with torch.no_grad():
        head_forward = seconds(lambda: model.eps(x, t, c))
    head = seconds(lambda: model.eps(x, t, c).sum().backward())
    optimizer = distill.make_optimizer(model, 1e-4, (0.0, 0.99))
    gradients = Gradients(model)
    update = seconds(lambda: (gradients.finish(1.0), optimizer.step()))
    # one GSIM step: teacher 2 forward, student and critic forward + backward; heads: student and critic's own loss
    # with weights, critic and (twice) the teacher once more down to x_t; two updates
    parts = {"data": raw, "noise and masks": seconds(batch) - raw, "transformers": 2 * forward + 2 * transformer,
             "heads": 2 * head + 3 * head, "optimiser": 2 * update}
    total = sum(parts.values())
    print("   " + ", ".join(f"{name} {100 * value / total:.1f} %" for name, value in parts.items())
          + f" of {1000 * total:.0f} ms (batch {args.batch}, one thread)")
    assert parts["data"] < 0.02 * total, parts


# ----------------------------------------------------------------------------------------------------------------------


def main():
    words, passed, failed, skipped = sys.argv[1:], 0, 0, 0
    torch.set_num_threads(1)  # sums in one order, and two threads on a busy machine wait for each other
    for name, test in list(globals().items()):
        if not name.startswith("test_") or words and not any(word in name for word in words):
            continue
        start = time.time()
        try:
            test()
            passed, verdict = passed + 1, "ok"
        except Skip as reason:
            skipped, verdict = skipped + 1, f"skipped: {reason}"
        except Exception:
            failed, verdict = failed + 1, f"FAILED\n{traceback.format_exc()}"
        print(f"{name} {verdict} ({time.time() - start:.1f} s)", flush=True)
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
