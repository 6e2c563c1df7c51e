"""A checkpoint -> pictures, an animation, an .npz for fid.py, timings; and a run's log -> curves.

Needs a checkpoint of distill.py or rl.py (out/<data>/teacher.pt, student.pt), or a public LTH14/mar one; models of
latents also need the VAE (python data.py --get kl16). What a flag does not say, the checkpoint does: a student draws in
one step without guidance, a teacher by its chain with the guidance it was trained to be compared at.

    python sample.py --ckpt out/shapes/student.pt --classes 0 1 2 --out grid.png
    python sample.py --ckpt out/shapes/student.pt --gif unmasking.gif           # the picture appear, AR step by AR step
    python sample.py --ckpt out/shapes/teacher.pt --teacher --ar_steps 4 8 16   # a row of pictures and a time for each
    python sample.py --ckpt mar_base/checkpoint-last.pth --vae kl16.ckpt --classes 207 pug --out dogs.png
    python sample.py --ckpt out/shapes/student.pt --order outward --gif outward.gif         # any order: one network
    python sample.py --ckpt student.pt --vae kl16.ckpt --edit photo.jpg --box 64 64 192 192 --classes 207 --out dog.png
    torchrun --nproc_per_node=8 -- sample.py --ckpt student.pt --vae kl16.ckpt --num 50000 --out samples.npz
    python sample.py --bench --size base --ar_steps 8 --batch 4                 # no checkpoint: speed needs no training
    python sample.py --bench --ckpt student.pt --batch 128 --compile --graph    # a GPU: a batch is one CUDA graph
    python sample.py --curves out/a/log.jsonl out/b/log.jsonl --out curves.png
(Without the --, torchrun takes --num for an abbreviation of its own flags.)
"""
import functools
import json
import math
import os
import shutil
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from data import (LATENT_SCALE, Parser, check_numbers, load_vae, rank_and_world, read_class_names, read_image, run_main,
                  setup)
from model import (MAR, ORDERS, SIZES, UserError, bf16_weights, compile_blocks, graphed, load_mar, mask_counts,
                   read_checkpoint)

# ----------------------------------------------------------------------------------------------------------------------
# Library: what fid.py, distill.py and rl.py use


def to_uint8(x):
    """Pictures in [-1, 1], any shape -> uint8 by MAR's rounding; what lies outside the range is clipped."""
    return ((x.float() + 1) * 127.5).clamp(0, 255).round().byte()


def decode(model, latents, vae=None, chunk=16):
    """What `generate` returns (B, c, h, w) -> uint8 (B, 3, H, W) on the same device, by the VAE where there is one.

    chunk: pictures decoded at once; one of 256 px fills hundreds of MB inside the decoder, far more than in the MAR.
    """
    if model.config.pixels:
        return to_uint8(latents)
    return torch.cat([to_uint8(vae.decode(part / LATENT_SCALE)) for part in latents.split(chunk)])


def check_vae(model, vae):
    """Ask for the VAE before the work is done, not after."""
    if not model.config.pixels and vae is None:
        raise UserError("this model draws latents, which only the VAE turns into pictures: give --vae kl16.ckpt "
                        "(python data.py --get kl16 downloads it)")
    if model.config.pixels and vae is not None:
        raise UserError("this model draws pixels, not latents: leave --vae out")


def image_seeds(seed, start, count):
    """(count, 2) int64 pairs (seed, index): what fixes noise and order of each picture (see model.image_keys)."""
    index = torch.arange(start, start + count)
    return torch.stack([torch.full_like(index, seed), index], dim=1)


@torch.no_grad()
def draw(model, labels, seed=0, start=0, vae=None, batch=64, progress=None, generate=None, stop=None,
         **generate_kwargs):
    """Pictures of the classes `labels` (N,), ints in any form -> uint8 (N, 3, H, W) on the CPU.

    Picture i depends on (model, seed, start + i, labels[i]) alone: not on `batch`, nor on who else is drawn with it.
    Runs on the model's device; vae is needed for models of latents, on that device too; progress: a tqdm bar,
    moved by the number of pictures done; generate: what draws a batch, model.graphed(model, batch, ...), instead of
    MAR.generate, to which the rest goes (ar_steps, head_steps, guidance, ...).
    """
    check_vae(model, vae)
    generate = generate or functools.partial(model.generate, **generate_kwargs)
    labels = torch.as_tensor(labels, dtype=torch.int64, device=next(model.parameters()).device)
    side = model.config.img_size
    pictures = torch.empty(len(labels), 3, side, side, dtype=torch.uint8)
    for i in range(0, len(labels), batch):
        part = labels[i:i + batch]
        latents = generate(part, seeds=image_seeds(seed, start + i, len(part)))
        pictures[i:i + batch] = decode(model, latents, vae)  # bytes leave the device: a quarter of the floats
        if progress is not None:
            progress.update(len(part))
        if stop is not None and stop():
            return None
    return pictures


def draw_together(model, labels, rank, world, **draw_kwargs):
    """`draw` with the work divided among the ranks: uint8 (N, 3, H, W) on every one; N must be a multiple of world."""
    share = len(labels) // world
    images = draw(model, labels[rank * share:(rank + 1) * share], start=rank * share, **draw_kwargs)
    if world == 1 or images is None:
        return images
    device = next(model.parameters()).device  # nccl sends nothing that lies on the CPU
    parts = [torch.empty_like(images, device=device) for _ in range(world)]
    dist.all_gather(parts, images.to(device))
    return torch.cat(parts).cpu()


GAP, PAPER, INK = 4, (255, 255, 255), (30, 30, 30)  # px between pictures; colours of pictures' surroundings and of text


def grid_image(rows, scale=None):
    """rows: list of (title, uint8 (n, 3, H, W)) -> Pillow image: one row each, titles at the left.

    scale: whole-number enlargement without smoothing, so that the pixels of a 16 px picture can be told apart;
    None makes small pictures up to 96 px wide and leaves larger ones as they are.
    """
    font = ImageFont.load_default(14)
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    widths = [measure.multiline_textbbox((0, 0), title, font)[2] for title, _ in rows if title]
    left = math.ceil(max(widths)) + 16 if widths else GAP
    tiles = []
    for _, pictures in rows:
        zoom = scale or max(1, 96 // pictures.shape[3])
        pictures = pictures.cpu().repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
        pictures = torch.nn.functional.pad(pictures, (0, GAP, 0, GAP), value=PAPER[0])  # right of and below each
        tiles.append(pictures.permute(2, 0, 3, 1).flatten(1, 2).numpy())  # (H + GAP, n * (W + GAP), 3)
    width, height = left + max(tile.shape[1] for tile in tiles), GAP + sum(tile.shape[0] for tile in tiles)
    canvas, y = Image.new("RGB", (width, height), PAPER), GAP
    pen = ImageDraw.Draw(canvas)
    for (title, _), tile in zip(rows, tiles):
        canvas.paste(Image.fromarray(tile), (left, y))
        pen.multiline_text((8, y + (tile.shape[0] - GAP) / 2), title, INK, font, anchor="lm")
        y += tile.shape[0]
    return canvas


def save_image(image, path, **options):
    """A Pillow image -> PNG or GIF file; under a temporary name, then renamed: nobody sees half a picture."""
    part = f"{path}.{os.getpid()}"
    try:
        image.save(part, format="GIF" if "save_all" in options else "PNG", **options)
        os.replace(part, path)
    except OSError as error:
        if os.path.exists(part):
            os.remove(part)
        raise UserError(f"cannot write {path}: {error}") from None


def save_grid(rows, path, scale=None):
    """rows: list of (title, uint8 (n, 3, H, W)) -> PNG file, as grid_image lays them out."""
    save_image(grid_image(rows, scale), path)


# ----------------------------------------------------------------------------------------------------------------------
# The animation: one frame an AR step


def in_pixels(config, cells):
    """(B, L), a value a token -> (B, 1, H, W), the same a pixel."""
    side, cell = config.latent_size // config.patch_size, config.patch_size * config.vae_stride  # tokens a side; px
    return cells.view(-1, 1, side, side).repeat_interleave(cell, 2).repeat_interleave(cell, 3)


@torch.no_grad()
def unmasking(model, labels, seed=0, vae=None, **generate_kwargs):
    """Yields uint8 (B, 3, H, W) before the first and after every AR step; tokens not yet known are grey."""
    c, B = model.config, len(labels)
    known = torch.zeros(B, c.seq_len, dtype=torch.bool, device=labels.device)
    yield torch.full((B, 3, c.img_size, c.img_size), 128, dtype=torch.uint8)
    for tokens, _, predict in model.unmask(labels, seeds=image_seeds(seed, 0, B), **generate_kwargs):
        known = known.scatter(1, predict, True)
        # the decoder is given zeros for unknown latents, their mean; known cells near them change colour a little
        # until their neighbours are there: that is the decoder, not the model changing its mind
        yield torch.where(in_pixels(c, known), decode(model, model.unpatchify(tokens), vae), 128).cpu()


def save_gif(model, classes, names, per_class, path, seed, vae, generate_kwargs):
    labels = torch.tensor(classes, device=next(model.parameters()).device).repeat_interleave(per_class)
    frames = []
    for pictures in tqdm(unmasking(model, labels, seed, vae, **generate_kwargs), total=generate_kwargs["ar_steps"] + 1):
        frames.append(grid_image(list(zip(names, pictures.split(per_class)))).quantize(256))  # a third of the memory
    # about three seconds in all, whatever K is, and two more to look at the result
    durations = [max(20, 3000 // len(frames))] * (len(frames) - 1) + [2000]
    save_image(frames[0], path, save_all=True, append_images=frames[1:], duration=durations, loop=0)


# ----------------------------------------------------------------------------------------------------------------------
# Editing: since any order will do, what is known may be any part of a picture


def tokens_of(model, picture, vae=None):
    """A picture (1, 3, H, W) uint8 on the model's device -> its tokens (1, L, C); of latents the posterior's mean."""
    x = picture.float() / 127.5 - 1
    if vae is not None:
        with torch.no_grad():
            x = vae.moments(x).chunk(2, dim=1)[0] * LATENT_SCALE
    return model.patchify(x)


def cells_in(config, box):
    """box: left, top, right, bottom in pixels -> (L,) bool, true for every token that it touches."""
    side, cell = config.latent_size // config.patch_size, config.patch_size * config.vae_stride
    left, top, right, bottom = box
    if not (0 <= left < right <= config.img_size and 0 <= top < bottom <= config.img_size):
        raise UserError(f"--box {left} {top} {right} {bottom}: wanted are left < right and top < bottom within "
                        f"0..{config.img_size}, pixels of the picture once it is cropped to {config.img_size}")
    inside = torch.zeros(side, side, dtype=torch.bool)
    inside[top // cell:-(-bottom // cell), left // cell:-(-right // cell)] = True
    return inside.flatten()


def open_edit(model, path, box, vae=None):
    """What --edit and --box say -> (known for MAR.generate, uint8 (2, 3, H, W): the picture and what stays of it)."""
    redraw = cells_in(model.config, box)
    picture = torch.from_numpy(read_image(path, model.config.img_size))[None]  # cropped as training pictures are
    tokens = tokens_of(model, picture.to(next(model.parameters()).device), vae)
    return (tokens, redraw), torch.cat([picture, torch.where(in_pixels(model.config, redraw), 128, picture)])


# ----------------------------------------------------------------------------------------------------------------------
# Many pictures: the .npz that fid.py, and ADM's evaluator, read


def save_samples(model, labels, path, rank, world, batch, **draw_kwargs):
    """Pictures of `labels` (N,) numpy -> .npz with arr_0 uint8 (N, H, W, 3) and labels int64 (N,), in index order.

    Rank 0 appends to the file what a round brings: whatever N is, memory holds one round. The file has its name only
    once it is whole.
    """
    rounds = draw_rounds(model, labels, rank, world, batch, draw_kwargs)
    if rank > 0:
        for _ in rounds:  # take part in drawing and sending, write nothing
            pass
        return
    N, side, part = len(labels), model.config.img_size, f"{path}.writing"
    if shutil.disk_usage(Path(path).parent).free < N * side * side * 3:
        raise UserError(f"{path} will have {N * side * side * 3 / 1e9:.1f} GB, more than is free there: other --out")
    try:
        with zipfile.ZipFile(part, "w") as archive, tqdm(total=N, unit="img") as bar:  # not compressed: can be mapped
            with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                header = {"descr": "|u1", "fortran_order": False, "shape": (N, side, side, 3)}
                np.lib.format.write_array_header_1_0(file, header)
                for pictures in rounds:
                    file.write(pictures.permute(0, 2, 3, 1).contiguous().numpy().data)  # (n, H, W, 3)
                    bar.update(len(pictures))
            with archive.open("labels.npy", "w") as file:
                np.lib.format.write_array(file, labels)
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from None
    finally:
        if os.path.exists(part):
            os.remove(part)


def draw_rounds(model, labels, rank, world, batch, draw_kwargs):
    """Every round the ranks draw consecutive shares of world * batch pictures; rank 0 yields each share, in order.

    A round ends by sending, so no shared disk is needed; the ranks wait for the slowest, but all do equal work.
    """
    for start in range(0, len(labels), world * batch):
        n = min(world * batch, len(labels) - start)
        cuts = [start + n * r // world for r in range(world + 1)]
        pictures = draw(model, labels[cuts[rank]:cuts[rank + 1]], start=cuts[rank], batch=batch, **draw_kwargs)
        if world == 1:
            yield pictures
            continue
        # all ranks must send equally much: shares of one round differ by at most one picture
        padded = torch.zeros(-(-n // world), *pictures.shape[1:], dtype=torch.uint8,
                             device=next(model.parameters()).device)
        padded[:len(pictures)] = pictures
        shares = [torch.empty_like(padded) for _ in range(world)] if rank == 0 else None
        dist.gather(padded, shares)
        if rank == 0:
            for r in range(world):
                yield shares[r][:cuts[r + 1] - cuts[r]].cpu()


# ----------------------------------------------------------------------------------------------------------------------
# Speed


def seconds_of(work, device, repeat=1):
    """Median wall time of `repeat` calls. The caller warms up."""
    times = []
    for _ in range(repeat):
        if device.type == "cuda":
            torch.cuda.synchronize()  # launches return at once: without it the clock would measure Python
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def shares_of(model, work, device):
    """One more call of `work` -> (share of the transformer, share of the head) of its time.

    Not from the timed calls: to time the parts the device must be waited for after each, which slows the whole.
    """
    spent = {}

    def timed(name):
        inner = getattr(model, name)

        def call(*args):
            result = []
            spent[name] = spent.get(name, 0) + seconds_of(lambda: result.append(inner(*args)), device)
            return result[0]
        return call

    for name in ("context", "one_step", "denoise"):
        setattr(model, name, timed(name))  # on the object, hiding the class's method
    total = seconds_of(work, device)
    for name in ("context", "one_step", "denoise"):
        delattr(model, name)
    return spent["context"] / total, (spent.get("one_step", 0) + spent.get("denoise", 0)) / total


def flops_of(model, generate_kwargs):
    """Arithmetic of one picture in floating-point operations, multiply and add apart, matrix products only."""
    by_onednn = {torch.ops.aten.mkldnn_linear: lambda x, weight, *_, **__: 2 * math.prod(x) * weight[0]}  # of shapes

    def counted(head_steps):
        # attention as plain products: of the fused kernels the counter knows only those for CUDA
        with FlopCounterMode(display=False, custom_mapping=by_onednn) as counter, sdpa_kernel(SDPBackend.MATH):
            model.generate(torch.zeros(1, dtype=torch.long, device=next(model.parameters()).device),
                           **{**generate_kwargs, "head_steps": head_steps})
        return counter.get_total_flops()

    if generate_kwargs["head_steps"] == 1:
        return counted(1)
    two, three = counted(2), counted(3)  # a chain's steps are all alike, so counting is linear in them (time is not)
    return two + (generate_kwargs["head_steps"] - 2) * (three - two)


@torch.no_grad()
def matrix_rate(device, rounds=5):
    """FLOP/s of a large matrix product here, at the transformer's precision: what MFU is a share of."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (2048, torch.float32)
    a, bias = torch.ones(size, size, device=device, dtype=dtype), torch.ones(size, device=device, dtype=dtype)
    work = lambda: torch.nn.functional.linear(a, a, bias)
    # a limit is the best that is seen, not the median: a moment of other work would make shares of more than 100 %
    return 2 * size**3 / min(seconds_of(work, device) for _ in range(rounds))


def copy_rate(device):
    """Bytes/s, read and written, of a copy far beyond any cache."""
    a = torch.ones(256 << 20, device=device, dtype=torch.uint8)
    b = torch.empty_like(a)
    return 2 * a.numel() / min(seconds_of(lambda: b.copy_(a), device) for _ in range(10))


def bench(model, args, device):
    """Time teacher and student, which differ in head steps and guidance alone, so one network serves as both."""
    rate, bandwidth = matrix_rate(device, rounds=50), copy_rate(device)
    on_cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_cuda else f"CPU, {torch.get_num_threads()} threads"
    heads = sum(p.numel() for p in model.head_net.parameters())
    total = sum(p.numel() for p in model.parameters())
    size = sum(p.numel() * p.element_size() for p in model.parameters())  # bytes; the head's are float32
    print(f"device: {name}; precision: {'bf16 transformer, TF32 head' if on_cuda else 'float32'}; "
          f"{'compiled blocks; ' if args.compile else ''}{'one CUDA graph a batch; ' if args.graph else ''}"
          f"{total / 1e6:.1f} M parameters, of which head {heads / 1e6:.1f} M; {model.config.seq_len} tokens\n"
          f"timed: labels and seeds to latents, no VAE; warm, median of {args.repeat}; measured limits: products "
          f"{rate / 1e12:.2f} TFLOP/s, copy {bandwidth / 1e9:.1f} GB/s\n"
          "ratio: to the student of equal batch and K. matrix: share of the limit. weights: reading every weight once "
          "a pass, as share of the copy limit. transformer, head: shares of the time of a call that waits after each\n")
    print(f"{'':8}{'batch':>6}{'K':>5}{'head steps':>11}{'guidance':>9}{'s/image':>10}{'images/s':>10}{'ratio':>8}"
          f"{'transformer':>12}{'head':>7}{'matrix':>8}{'weights':>8}")
    for batch in sorted({1, args.batch}):
        students = {}
        for who, K in [("student", K) for K in args.ar_steps] + [("teacher", K) for K in args.teacher_ar_steps]:
            kwargs = {"ar_steps": K, "head_steps": 1, "guidance": 1.0} if who == "student" else {
                "ar_steps": K, "head_steps": args.head_steps, "guidance": args.guidance,
                "guidance_schedule": args.guidance_schedule}
            labels = torch.arange(batch, device=device) % model.config.num_classes
            seeds = image_seeds(0, 0, batch).to(device)
            eager = lambda steps=kwargs["head_steps"]: model.generate(labels, seeds=seeds,
                                                                      **{**kwargs, "head_steps": steps})
            # warm-up meets every shape; on a CPU two chain steps do, since nothing is compiled or captured there
            eager(kwargs["head_steps"] if on_cuda else min(2, kwargs["head_steps"]))
            replay = graphed(model, batch, **kwargs) if args.graph else None
            seconds = seconds_of((lambda: replay(labels, seeds)) if replay else eager, device, args.repeat)
            transformer, head = shares_of(model, eager, device)
            if who == "student":
                students[K] = seconds
            ratio = f"{seconds / students[K]:.1f}x" if K in students else "-"
            matrix = flops_of(model, kwargs) * batch / seconds / rate
            weights = K * (size + 4 * heads * (kwargs["head_steps"] - 1)) / seconds / bandwidth
            print(f"{who:8}{batch:6}{K:5}{kwargs['head_steps']:11}{kwargs['guidance']:9.2f}{seconds / batch:10.4f}"
                  f"{batch / seconds:10.2f}{ratio:>8}{transformer:12.0%}{head:7.0%}{matrix:8.1%}{weights:8.1%}",
                  flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# Curves

PANEL, COLUMNS = (840, 480), 3  # px of a panel, at twice the final size: drawn large and shrunk, lines come out smooth
COLOURS = [(31, 119, 180), (214, 39, 40), (44, 160, 44), (255, 127, 14), (148, 103, 189), (140, 86, 75), (23, 190, 207)]


def read_log(path):
    """log.jsonl -> {(stage, quantity): {step: value}} of finite numbers; of a repeated step (resume) the last."""
    curves = {}
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a log.jsonl: {error}") from None
    for i, line in enumerate(lines):
        try:
            entry = json.loads(line)
            step, stage = entry.pop("step"), entry.pop("stage", "")
        except (ValueError, KeyError, TypeError, AttributeError):
            if i == len(lines) - 1 and i > 0:
                continue  # the run is writing it, or was killed while it did
            raise UserError(f"{path}, line {i + 1}: not a log line, which is a JSON object with a \"step\"") from None
        for name, value in entry.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
                curves.setdefault((stage, name), {})[step] = value
    return curves


def ticks(low, high, log):
    """Round numbers within [low, high], three to eight."""
    if log:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        mantissas = (1, 2, 5) if last - first < 4 else (1,)
        found = [m * 10.0**e for e in range(first, last + 1, 1 + (last - first) // 8) for m in mantissas]
        return [v for v in found if low <= v <= high]
    third = (high - low) / 3
    unit = 10.0 ** math.floor(math.log10(third))
    step = unit * max(m for m in (1, 2, 5) if m * unit <= third or m == 1)
    return [round(n * step, 12) for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def draw_panel(pen, left, top, title, curves):
    """One quantity: curves = list of (colour, {step: value}), into the PANEL whose corner is (left, top)."""
    font, small = ImageFont.load_default(28), ImageFont.load_default(22)
    x0, y0, x1, y1 = left + 120, top + 56, left + PANEL[0] - 30, top + PANEL[1] - 60  # the axes' box
    steps = [s for _, curve in curves for s in curve]
    values = [v for _, curve in curves for v in curve.values()]
    log = min(values) > 0 and max(values) > 100 * min(values)
    scale = math.log10 if log else float
    low, high = scale(min(values)), scale(max(values))
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0  # a constant still gets an axis around it
    low, high, first, last = low - margin, high + margin, min(steps), max(max(steps), min(steps) + 1)
    place = lambda s, v: (x0 + (s - first) / (last - first) * (x1 - x0),
                          y1 - (scale(v) - low) / (high - low) * (y1 - y0))
    pen.text((x0, top + 14), title + (" (log scale)" if log else ""), INK, font)
    bounds = (10**low, 10**high, True) if log else (low, high, False)
    for v in ticks(*bounds):
        y = place(first, v)[1]
        pen.line([(x0, y), (x1, y)], (225, 225, 225), 2)
        pen.text((x0 - 12, y), f"{v:g}", INK, small, anchor="rm")
    for s in ticks(first, last, False):
        x = place(s, values[0])[0]
        pen.line([(x, y1), (x, y1 + 8)], INK, 2)
        pen.text((x, y1 + 12), f"{s:g}" if s < 1e5 else f"{s / 1000:g}k", INK, small, anchor="ma")
    pen.rectangle([x0, y0, x1, y1], outline=INK, width=2)
    for colour, curve in curves:
        points = np.array(sorted(curve.items()))  # (n, 2)
        # more points than can be seen are averaged in groups, else a noisy loss is a solid band
        size = -(-len(points) // 200)
        points = [points[i:i + size].mean(0) for i in range(0, len(points), size)]
        points = [place(s, v) for s, v in points]
        pen.line(points, colour, 4, joint="curve")
        if len(points) < 30:  # few: show where they are
            for x, y in points:
                pen.ellipse([x - 6, y - 6, x + 6, y + 6], colour)


def draw_curves(paths, out):
    """log.jsonl files -> PNG with a panel for each quantity of each stage, one colour a run."""
    logs = [read_log(path) for path in paths]
    if not any(logs):
        raise UserError(f"no numbers in {', '.join(paths)}")
    panels = save_panels([(str(Path(path).parent), log) for path, log in zip(paths, logs)], out)
    print(f"{out}: {panels} quantities of {len(paths)} run(s); curves of more than 200 points are averaged")


def save_panels(runs, out):
    """runs: list of (title, {(stage, quantity): {step: value}}) -> PNG with a panel a quantity; returns how many."""
    panels = list(dict.fromkeys(key for _, curves in runs for key in curves))  # in order of appearance
    rows, legend = -(-len(panels) // COLUMNS), 40 * len(runs) + 20
    columns = min(COLUMNS, len(panels))
    canvas = Image.new("RGB", (columns * PANEL[0], rows * PANEL[1] + legend), PAPER)
    pen = ImageDraw.Draw(canvas)
    for i, (title, _) in enumerate(runs):
        pen.line([(60, 40 * i + 36), (110, 40 * i + 36)], COLOURS[i % len(COLOURS)], 6)
        pen.text((126, 40 * i + 36), title, INK, ImageFont.load_default(28), anchor="lm")
    for i, (stage, name) in enumerate(panels):
        curves = [(COLOURS[r % len(COLOURS)], run[stage, name])
                  for r, (_, run) in enumerate(runs) if (stage, name) in run]
        title = f"{stage}: {name}" if stage else name
        draw_panel(pen, i % COLUMNS * PANEL[0], legend + i // COLUMNS * PANEL[1], title, curves)
    save_image(canvas.resize((canvas.width // 2, canvas.height // 2), Image.LANCZOS), out)
    return len(panels)


# ----------------------------------------------------------------------------------------------------------------------
# The command

SAMPLING = {"ckpt", "classes", "teacher", "ar_steps", "head_steps", "guidance", "guidance_schedule", "temperature",
            "order", "seed", "vae", "device"}
USES = {"grid": SAMPLING | {"out", "per_class", "batch", "edit", "box"}, "gif": SAMPLING | {"gif", "per_class"},
        "num": SAMPLING | {"num", "out", "batch", "compile", "graph"}, "curves": {"curves", "out"},
        "bench": {"bench", "ckpt", "size", "ar_steps", "teacher_ar_steps", "head_steps", "guidance",
                  "guidance_schedule", "batch", "repeat", "compile", "graph", "device"}}


def parse():
    """The flags -> (args, mode). A flag that the chosen mode would ignore is refused."""
    p = Parser("A checkpoint -> pictures, an animation, an .npz, timings, curves.")
    p.add_argument("--ckpt", help="checkpoint: teacher.pt or student.pt of a run, or a public MAR's .pth")
    p.add_argument("--out", help="file to write: .png, or .npz with --num; None: grid.png, samples.npz, curves.png")
    p.add_argument("--gif", help="write the unmasking, a frame an AR step, to this file")
    p.add_argument("--num", type=int, help="draw this many pictures, all classes alike often, into an .npz")
    p.add_argument("--bench", action="store_true", help="time teacher and student on this machine")
    p.add_argument("--curves", nargs="+", metavar="LOG", help="draw the curves of these log.jsonl files")
    p.add_argument("--classes", nargs="+", help="class numbers or names; None: all; of more than 16 a "
                   "grid or animation shows 4")
    p.add_argument("--per_class", type=int, help="pictures of each class; None: 4, with several --ar_steps 1")
    p.add_argument("--teacher", action="store_true", help="insist on the full chain: a student's checkpoint is refused")
    p.add_argument("--ar_steps", type=int, nargs="+", metavar="K",
                   help="AR steps, 1 to the number of tokens; several: a row and a time each; None: the checkpoint's")
    p.add_argument("--head_steps", type=int, help="denoising steps; None: 1 for a student, 100 for a teacher")
    p.add_argument("--guidance", type=float, help="1 = none (a student has its own built in); None: the "
                   "checkpoint's, for public ones MAR's 2.9, 3.0, 3.2 of B, L, H")
    p.add_argument("--guidance_schedule", choices=["linear", "constant"], help="None: the checkpoint's; public: linear")
    p.add_argument("--temperature", type=float, default=1.0, help="scale of the noise; MAR: 0.95 unguided")
    p.add_argument("--order", choices=ORDERS, default="random", help="in which tokens are revealed; random is "
                   "what networks are trained for")
    p.add_argument("--edit", metavar="PICTURE", help="draw a part of this picture anew, once for each class")
    p.add_argument("--box", type=int, nargs=4, metavar=("LEFT", "TOP", "RIGHT", "BOTTOM"),
                   help="--edit: the part, in pixels of the cropped picture; whole tokens are drawn")
    p.add_argument("--seed", type=int, default=0, help="picture i is that of (seed, i)")
    p.add_argument("--vae", help="kl16.ckpt, for models of latents")
    p.add_argument("--batch", type=int, default=64, help="pictures at once, a process; less if memory is short")
    p.add_argument("--compile", action="store_true", help="--num, --bench: torch.compile the blocks, which takes a "
                   "minute and joins small kernels; for GPUs, on a CPU it loses oneDNN's products")
    p.add_argument("--graph", action="store_true", help="--num, --bench, on CUDA: all AR steps of a batch as one CUDA "
                   "graph, which saves launches where batches are small; off, for it has never run on a GPU")
    p.add_argument("--size", choices=SIZES, help="--bench: a size with random weights, instead of --ckpt")
    p.add_argument("--teacher_ar_steps", type=int, nargs="+", metavar="K",
                   help="--bench: fewer for a slow teacher; None: those of --ar_steps")
    p.add_argument("--repeat", type=int, default=3, help="--bench: timings to take the median of")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    args = p.parse_args()
    check_numbers(args, one="num per_class ar_steps head_steps batch teacher_ar_steps repeat")
    modes = [mode for mode in ("gif", "num", "bench", "curves") if getattr(args, mode)] or ["grid"]
    if len(modes) > 1:
        raise UserError(f"--{modes[0]} and --{modes[1]} are two different jobs: give one of them")
    ignored = [f for f, value in vars(args).items() if value != p.get_default(f) and f not in USES[modes[0]]]
    if ignored:
        raise UserError(f"--{ignored[0]} does nothing in a {modes[0]} job: leave it out")
    if args.edit and not os.path.isfile(args.edit):
        raise UserError(f"--edit: no such file: {args.edit}")
    if bool(args.edit) != bool(args.box):
        raise UserError("--edit PICTURE and --box LEFT TOP RIGHT BOTTOM belong together: give both")
    if modes[0] != "curves" and bool(args.ckpt) == bool(args.size):
        raise UserError("give --ckpt (a run's student.pt or teacher.pt, or a public MAR checkpoint)"
                        + (" or --size, one of them" if args.bench else ""))
    return args, modes[0]


def fill_in(args, file, config):
    """Flags not given take the values the checkpoint was made for, in place; contradictions with it are refused.

    args: the namespace of `parse`, or one with the same names (fid.py); file: the checkpoint; config: its MARConfig.
    """
    stage = file.get("stage", "teacher")  # public files, and random weights, are teachers
    made = file["args"] if "config" in file else {"guidance": {768: 2.9, 1024: 3.0, 1280: 3.2}.get(config.width, 2.0)}
    if stage != "teacher":
        for flag in ("head_steps", "guidance"):
            if getattr(args, flag) not in (None, 1) and not args.bench:
                raise UserError(f"{args.ckpt} is a student, made for one step and with guidance built in: --{flag} "
                                f"{getattr(args, flag):g} is for a teacher's checkpoint")
        if args.teacher:
            raise UserError(f"{args.ckpt} is a student, it has no chain: give --teacher a teacher's checkpoint")
        if not args.bench:
            made = {**made, "teacher_head_steps": 1, "guidance": 1.0}
    if args.teacher and args.head_steps == 1:
        raise UserError("--teacher means the full chain, --head_steps 1 a single step: give one of them")
    args.ar_steps = args.ar_steps or [min(made.get("ar_steps", 64), config.seq_len)]
    args.teacher_ar_steps = args.teacher_ar_steps or args.ar_steps
    for K in args.ar_steps + args.teacher_ar_steps:
        mask_counts(config.seq_len, K)  # complains when K is above the number of tokens
    if len(args.ar_steps) > 1 and (args.gif or args.num or args.edit):
        raise UserError("several --ar_steps make a grid and a table; --gif, --num and --edit take one")
    args.head_steps = args.head_steps or made.get("teacher_head_steps", 100)
    args.guidance = made.get("guidance", 1.0) if args.guidance is None else args.guidance
    args.guidance_schedule = args.guidance_schedule or made.get("guidance_schedule", "linear")


def find_classes(wanted, names, count):
    """Words of the command line -> class numbers. A number is always an index, even if a class is called so."""
    if wanted is None:
        return list(range(count)) if count <= 16 else [i * count // 4 for i in range(4)]
    classes = [int(w) if w.isdecimal() else names.index(w) if w in names else -1 for w in wanted]
    for word, label in zip(wanted, classes):
        if not 0 <= label < count:
            raise UserError(f"--classes {word}: this checkpoint has the classes 0..{count - 1}"
                            f" ({', '.join(names[:10])}{', ...' if count > 10 else ''})")
    return classes


def check_output(path, suffixes):
    """Refuse a file that could not be written, before hours are spent on what belongs into it."""
    path = Path(path)
    if path.suffix.lower() not in suffixes:
        raise UserError(f"{path}: the name must end in {' or '.join(suffixes)}")
    trial = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another file") from None
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder")


def draw_grid(model, classes, names, args, device, vae, kwargs):
    """One K: a row for each class. Several: a row for each K, of the same classes, noise and orders, and a table."""
    table = len(args.ar_steps) > 1
    per_class = args.per_class or (1 if table else 4)
    labels = [label for label in classes for _ in range(per_class)]
    kwargs = {**kwargs, "seed": args.seed, "vae": vae, "batch": args.batch}
    if not table:
        with tqdm(total=len(labels), unit="img") as bar:
            pictures = draw(model, labels, progress=bar, **kwargs)
        return list(zip(names, pictures.split(per_class)))
    draw(model, labels, **{**kwargs, "ar_steps": min(args.ar_steps)})  # the first call of all also loads and tunes
    print(f"{len(labels)} pictures at batch {min(args.batch, len(labels))}, head steps {args.head_steps}, guidance "
          f"{args.guidance:g}, {device}, to finished pixels\n{'K':>5}{'seconds an image':>20}")
    rows = []
    for K in args.ar_steps:
        work = lambda: rows.append((f"K = {K}", draw(model, labels, **{**kwargs, "ar_steps": K})))
        seconds = seconds_of(work, device)
        print(f"{K:5}{seconds / len(labels):20.4f}", flush=True)
    return rows


def main():
    """Draw, animate, save, time or plot, as the flags say; whatever can be refused is refused first."""
    args, mode = parse()
    out = args.gif or args.out or {"num": "samples.npz", "curves": "curves.png"}.get(mode, "grid.png")
    if rank_and_world()[0] == 0 and mode != "bench":
        check_output(out, {"gif": [".gif"], "num": [".npz"]}.get(mode, [".png"]))
    if mode == "curves":
        return draw_curves(args.curves, out)
    device, rank, world = setup(args.device)
    if world > 1 and mode != "num":
        raise UserError("only --num is shared among processes: start this with python, not torchrun")
    file = read_checkpoint(args.ckpt) if args.ckpt else {}
    if args.ckpt:
        model = load_mar(args.ckpt).to(device)
    else:
        with torch.device(device):
            model = MAR(SIZES[args.size]).eval()
    fill_in(args, file, model.config)
    if device.type == "cuda":
        bf16_weights(model)
    elif args.graph:
        raise UserError("--graph: a CUDA graph needs a GPU: leave it out on the CPU")
    if args.compile:
        compile_blocks(model)
    if mode == "bench":
        return bench(model, args, device)
    count = model.config.num_classes
    names = file.get("class_names") or [f"class {i}" for i in range(count)]
    if count == 1000:  # public files have no names, students those of ImageNet's folders; words tell a reader more
        names = read_class_names(own=file.get("class_names"))
    # nobody looks at 1,000 rows; but what is to be judged must be of all classes
    classes = list(range(count)) if mode == "num" and not args.classes else find_classes(args.classes, names, count)
    vae = load_vae(args.vae).to(device) if args.vae else None
    check_vae(model, vae)
    kwargs = {"ar_steps": args.ar_steps[0], "head_steps": args.head_steps, "guidance": args.guidance,
              "guidance_schedule": args.guidance_schedule, "temperature": args.temperature, "orders": args.order}
    titles = [names[label] for label in classes]
    rows, start = [], time.time()
    if args.edit:
        kwargs["known"], stays = open_edit(model, args.edit, args.box, vae)
        rows = [("picture", stays)]
        args.ar_steps = [min(args.ar_steps[0], int(kwargs["known"][1].sum()))]  # every step reveals a token
        kwargs["ar_steps"] = args.ar_steps[0]
    if mode == "num":
        # classes take turns, so every stretch of the file is balanced: the inception score is computed on tenths of it
        labels = np.array(classes)[np.arange(args.num) % len(classes)]
        generate = graphed(model, min(args.batch, args.num), **kwargs) if args.graph else None
        save_samples(model, labels, out, rank, world, args.batch, seed=args.seed, vae=vae, generate=generate, **kwargs)
    elif mode == "gif":
        save_gif(model, classes, titles, args.per_class or 4, out, args.seed, vae, kwargs)
    else:
        save_grid(rows + draw_grid(model, classes, titles, args, device, vae, kwargs), out)
    if rank == 0:
        print(f"{out}: AR steps {', '.join(map(str, args.ar_steps))}, head steps {args.head_steps}, guidance "
              f"{args.guidance:g}, seed {args.seed}, {time.time() - start:.1f} s")


if __name__ == "__main__":
    run_main(main)
