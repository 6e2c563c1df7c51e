"""A checkpoint -> pictures, an animation, an .npz for fid.py, timings; and a run's log -> curves.

Needs a checkpoint of distill.py or rl.py (out/<data>/teacher.pt, student.pt), or a public LTH14/mar one. Models of
latents also need the VAE (python data.py --get kl16). What no flag says, the checkpoint says: a student draws in one
step without guidance, a teacher by its whole chain and with the guidance of its run.

    python sample.py --ckpt out/shapes/student.pt --classes 0 1 2 --out grid.png
    python sample.py --ckpt out/shapes/student.pt --ar_steps 4 8 16             # a row of pictures for each K
    python sample.py --ckpt out/shapes/student.pt --gif unmasking.gif           # the picture appear, AR step by AR step
    python sample.py --ckpt out/shapes/student.pt --order outward --gif outward.gif         # any order: one network
    python sample.py --ckpt mar_base/checkpoint-last.pth --vae kl16.ckpt --classes 207 pug --out dogs.png
    python sample.py --ckpt student.pt --vae kl16.ckpt --edit photo.jpg --box 64 64 192 192 --classes 207 --out dog.png
    torchrun --nproc_per_node=8 -- sample.py --ckpt student.pt --vae kl16.ckpt --num 50000 --out samples.npz
    python sample.py --ckpt student.pt --export mar.pth                         # for the public LTH14/mar code
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
import signal
import sys
import time
import unicodedata
import zipfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from data import (LATENT_SCALE, Parser, check_numbers, load_vae, rank_and_world, read_class_names, read_image, run_main,
                  setup)
from model import (MAR, ORDERS, SIZES, UserError, bf16_weights, compile_blocks, graphed, load_mar, mask_counts,
                   read_checkpoint, replacing, save_checkpoint)

# ----------------------------------------------------------------------------------------------------------------------
# Library: what fid.py, distill.py and rl.py use


def to_uint8(x):
    """Pictures in [-1, 1], any shape -> uint8 by MAR's rounding; what lies outside the range is clipped."""
    return ((x.float() + 1) * 127.5).clamp(0, 255).round().byte()


def decode(model, latents, vae=None, chunk=16):
    """What `generate` returns (B, c, h, w) -> uint8 (B, 3, H, W), and (B,) bool: which are finite. On the same device.

    A NaN becomes a black pixel, and nobody could tell it from a real one later: hence the second tensor.
    chunk: pictures decoded at once; one of 256 px fills hundreds of MB inside the VAE, far more than in the MAR.
    """
    pictures, finite = [], []
    for part in latents.split(chunk):
        x = part if model.config.pixels else vae.decode(part / LATENT_SCALE)  # (chunk, 3, H, W)
        pictures.append(to_uint8(x))
        finite.append(x.isfinite().flatten(1).all(1))
    return torch.cat(pictures), torch.cat(finite)


def check_finite(model, finite):
    """Stop where pictures are NaN or infinite. Costs a wait for the device, which handing over the bytes costs too."""
    broken = len(finite) - int(finite.sum())
    if broken:
        raise UserError(f"{getattr(model, 'source', 'this network')}: {broken} of {len(finite)} pictures hold numbers "
                        "that are not finite: its training blew up, or the file is damaged; take another checkpoint")


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
def draw(model, labels, seed=0, start=0, vae=None, batch=64, progress=None, generate=None, stop=None, **how):
    """Pictures of the classes `labels` (N,), ints in any form -> uint8 (N, 3, H, W) on the CPU.

    Picture i depends on (model, seed, start + i, labels[i]) alone: not on `batch`, nor on who else is drawn with it.
    Runs on the model's device, where the VAE of a model of latents must be too. how: ar_steps, head_steps, guidance,
    ... for MAR.generate; generate: what draws a batch instead, model.graphed(model, batch, ...). progress: a tqdm bar,
    moved by the number of pictures done. stop(): asked after every batch; once it is true, None is returned.
    """
    check_vae(model, vae)
    generate = generate or functools.partial(model.generate, **how)
    labels = torch.as_tensor(labels, dtype=torch.int64, device=next(model.parameters()).device)
    side = model.config.img_size
    pictures = torch.empty(len(labels), 3, side, side, dtype=torch.uint8)
    for i in range(0, len(labels), batch):
        part = labels[i:i + batch]
        drawn, finite = decode(model, generate(part, seeds=image_seeds(seed, start + i, len(part))), vae)
        check_finite(model, finite)
        pictures[i:i + batch] = drawn  # bytes leave the device: a quarter of the floats
        if progress is not None:
            progress.update(len(part))
        if stop is not None and stop():
            return None
    return pictures


def draw_together(model, labels, rank, world, start=0, **draw_kwargs):
    """`draw` with the work divided among the ranks: uint8 (N, 3, H, W) on every one; N must be a multiple of world.

    None where stop() ended it. Its answer must be the same on all ranks; they ask it equally often.
    """
    share = len(labels) // world
    images = draw(model, labels[rank * share:(rank + 1) * share], start=start + rank * share, **draw_kwargs)
    if world == 1 or images is None:
        return images
    device = next(model.parameters()).device  # nccl sends nothing that lies on the CPU
    parts = [torch.empty_like(images, device=device) for _ in range(world)]
    dist.all_gather(parts, images.to(device))
    return torch.cat(parts).cpu()


def compile_or_refuse(*models):
    """compile_blocks, and one block run at once: a machine that cannot compile says so now, not in the first update."""
    try:
        compile_blocks(*models)
        x = torch.zeros(2, models[0].config.head_width, device=next(models[0].parameters()).device)
        models[0].head_net.res_blocks[0](x, x)
    except (RuntimeError, OSError) as error:  # of torch: no compiler, one that fails, no Triton, no room for its files
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"--compile: PyTorch cannot compile here ({reason}): leave --compile out, or install a C++ "
                        "compiler") from None


# ----------------------------------------------------------------------------------------------------------------------
# A grid of pictures

GAP, PAPER, INK = 4, (255, 255, 255), (30, 30, 30)  # px between pictures; colours of pictures' surroundings and of text
LETTERS = 24  # of a row's title: more would leave no room for pictures


def title_of(name, otherwise="?", most=LETTERS):
    """A name in at most `most` letters of Pillow's font: e for é, ? for what it lacks; `otherwise` for ? alone."""
    font = ImageFont.load_default(14)
    missing = bytes(font.getmask("\uffff"))  # the box it draws for a letter that it lacks

    def letter(c):
        if bytes(font.getmask(c)) == missing:
            c = unicodedata.normalize("NFKD", c).encode("ascii", "ignore").decode()
        return c if c and c.isprintable() else "?"

    title = "".join(map(letter, unicodedata.normalize("NFC", name)))
    title = title if len(title) <= most else title[:most - 3] + "..."
    return title if title.strip("? .") else otherwise


def grid_image(rows):
    """rows: list of (title, uint8 (n, 3, H, W)) -> Pillow image: one row each, titles at the left.

    Small pictures are enlarged to 96 px without smoothing, so that the pixels of a 16 px picture can be told apart.
    """
    font, titles = ImageFont.load_default(14), [title and title_of(title) for title, _ in rows]
    left = max(math.ceil(font.getbbox(title)[2]) + 16 if title else GAP for title in titles)
    tiles = []
    for _, pictures in rows:
        zoom = max(1, 96 // pictures.shape[3])
        pictures = pictures.cpu().repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
        pictures = torch.nn.functional.pad(pictures, (0, GAP, 0, GAP), value=PAPER[0])  # right of and below each
        tiles.append(pictures.permute(2, 0, 3, 1).flatten(1, 2).numpy())  # (H + GAP, n * (W + GAP), 3)
    width, height = left + max(tile.shape[1] for tile in tiles), GAP + sum(tile.shape[0] for tile in tiles)
    canvas, y = Image.new("RGB", (width, height), PAPER), GAP
    pen = ImageDraw.Draw(canvas)
    for title, tile in zip(titles, tiles):
        canvas.paste(Image.fromarray(tile), (left, y))
        pen.text((8, y + (tile.shape[0] - GAP) / 2), title, INK, font, anchor="lm")
        y += tile.shape[0]
    return canvas


def save_image(image, path, kind="PNG", **options):
    """A Pillow image -> file, whole or not at all."""
    with replacing(path, "wb") as file:
        image.save(file, kind, **options)


def save_grid(rows, path):
    """rows: list of (title, uint8 (n, 3, H, W)) -> PNG file, as grid_image lays them out."""
    save_image(grid_image(rows), path)


def draw_grid(model, classes, titles, args, **how):
    """Rows for save_grid: a class each; of several K a row each, with the same classes, noise and orders."""
    several = len(args.ar_steps) > 1
    per_class = args.per_class or (1 if several else 4)
    labels, rows = [label for label in classes for _ in range(per_class)], []
    for K in args.ar_steps:
        with tqdm(total=len(labels), unit="img", desc=f"K = {K}") as bar:
            pictures = draw(model, labels, batch=args.batch, progress=bar, **{**how, "ar_steps": K})
        rows += [(f"K = {K}", pictures)] if several else zip(titles, pictures.split(per_class))
    return rows


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
        pictures, finite = decode(model, model.unpatchify(tokens), vae)
        check_finite(model, finite)
        yield torch.where(in_pixels(c, known), pictures, 128).cpu()


def save_gif(model, classes, titles, per_class, path, seed, vae, **how):
    """The unmasking of per_class pictures of each class -> an animated GIF file."""
    labels = torch.tensor(classes, device=next(model.parameters()).device).repeat_interleave(per_class)
    frames = []
    for pictures in tqdm(unmasking(model, labels, seed, vae, **how), total=how["ar_steps"] + 1):
        frames.append(grid_image(list(zip(titles, pictures.split(per_class)))).quantize(256))  # a third of the memory
    # about three seconds in all, whatever K is, and two more to look at the result
    durations = [max(20, 3000 // len(frames))] * (len(frames) - 1) + [2000]
    save_image(frames[0], path, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)


# ----------------------------------------------------------------------------------------------------------------------
# Editing: since any order will do, what is known may be any part of a picture


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
    # upright as every viewer shows it, for so the box was measured; then cropped as training pictures are
    picture = torch.from_numpy(read_image(path, model.config.img_size, upright=True))[None]  # (1, 3, H, W)
    x = picture.to(next(model.parameters()).device).float() / 127.5 - 1
    if vae is not None:
        x = vae.moments(x).chunk(2, dim=1)[0] * LATENT_SCALE  # the posterior's mean
    stays = torch.where(in_pixels(model.config, redraw), 128, picture)
    return (model.patchify(x), redraw), torch.cat([picture, stays])


# ----------------------------------------------------------------------------------------------------------------------
# Many pictures: an .npz as fid.py and ADM's evaluator read it, or a folder of PNGs


def draw_rounds(model, labels, rank, world, batch, **how):
    """Yields the pictures of `labels` (N,) numpy in order, world * batch at a time, on every rank alike.

    A round ends by sending, so no shared disk is needed; the ranks wait for the slowest, but all do equal work.
    """
    with tqdm(total=len(labels), unit="img", disable=rank > 0) as bar:
        for start in range(0, len(labels), world * batch):
            part = labels[start:start + world * batch]
            padded = np.pad(part, (0, -len(part) % world), "edge")  # ranks get equal shares
            yield draw_together(model, padded, rank, world, start, batch=batch, **how)[:len(part)]
            bar.update(len(part))


def save_npz(rounds, labels, side, path):
    """Pictures -> .npz with arr_0 uint8 (N, H, W, 3) and labels int64 (N,), in index order.

    What a round brings is appended: whatever N is, memory holds one round. The file has its name once it is whole.
    """
    N, part = len(labels), f"{path}.{os.getpid()}"
    if shutil.disk_usage(Path(path).parent).free < N * side * side * 3:
        raise UserError(f"{path} will have {N * side * side * 3 / 1e9:.1f} GB, more than is free there: other --out")
    try:
        with zipfile.ZipFile(part, "w") as archive:  # not compressed: can be mapped
            with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                header = {"descr": "|u1", "fortran_order": False, "shape": (N, side, side, 3)}
                np.lib.format.write_array_header_1_0(file, header)
                for pictures in rounds:
                    file.write(pictures.permute(0, 2, 3, 1).contiguous().numpy().data)  # (n, H, W, 3)
            with archive.open("labels.npy", "w") as file:
                np.lib.format.write_array(file, labels)
        os.replace(part, path)
    finally:
        if os.path.exists(part):
            os.remove(part)


def save_folder(rounds, labels, folder):
    """Pictures -> folder/<index>_<label>.png. Those of a stopped call stay."""
    pictures = (picture for part in rounds for picture in part.permute(0, 2, 3, 1).numpy())  # (H, W, 3) each
    for i, picture in enumerate(pictures):
        os.makedirs(folder, exist_ok=True)  # not before a picture is there: what fails leaves no folder
        Image.fromarray(picture).save(Path(folder) / f"{i:06d}_{labels[i]}.png")


def save_samples(model, labels, path, rank, world, batch, **how):
    """Pictures of `labels` (N,) numpy, drawn by all ranks, to an .npz or, where `path` names none, into a folder."""
    rounds = draw_rounds(model, labels, rank, world, batch, **how)
    if rank > 0:
        for _ in rounds:  # take part in drawing and sending, write nothing
            pass
    elif path.lower().endswith(".npz"):
        save_npz(rounds, labels, model.config.img_size, path)
    else:
        save_folder(rounds, labels, path)


def export(model, file, path):
    """Write a network as LTH14/mar does, whose loader wants "model" and "model_ema" under its names of weights.

    The config, and what else a file of ours says, come along: so load_mar still knows a student from a teacher.
    """
    state = {name.replace("head_net.", "diffloss.net."): value for name, value in model.state_dict().items()}
    ours = {key: file[key] for key in ("stage", "step", "args", "class_names") if "stage" in file and key in file}
    save_checkpoint({**ours, "config": asdict(model.config), "model": state, "model_ema": state}, path)


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


def bench(model, args, device):
    """A table of seconds an image. Student and teacher differ in head steps and guidance alone: one network is both."""
    teacher_ar_steps = args.teacher_ar_steps or args.ar_steps
    mask_counts(model.config.seq_len, max(teacher_ar_steps))  # complains when K is above the number of tokens
    if args.compile:
        compile_or_refuse(model)
    on_cuda = device.type == "cuda"
    print(f"{torch.cuda.get_device_name(device) if on_cuda else f'CPU, {torch.get_num_threads()} threads'}; "
          f"{'bf16 transformer, TF32 head' if on_cuda else 'float32'}{'; compiled blocks' * args.compile}"
          f"{'; one CUDA graph a batch' * args.graph}; {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M "
          f"parameters; {model.config.seq_len} tokens\ntimed: labels and seeds to latents, no VAE; warm, median of "
          f"{args.repeat}; ratio: to the student of equal batch and K\n")
    print(f"{'':8}{'batch':>6}{'K':>5}{'head steps':>11}{'guidance':>9}{'s/image':>10}{'images/s':>10}{'ratio':>8}")
    jobs = [("student", K, 1, 1.0) for K in args.ar_steps]
    jobs += [("teacher", K, args.head_steps, args.guidance) for K in teacher_ar_steps]
    for batch in sorted({1, args.batch}):
        labels = torch.arange(batch, device=device) % model.config.num_classes
        seeds, students = image_seeds(0, 0, batch).to(device), {}
        for who, K, head_steps, guidance in jobs:
            how = {"ar_steps": K, "guidance": guidance, "guidance_schedule": args.guidance_schedule}
            model.generate(labels, seeds=seeds, head_steps=min(2, head_steps), **how)  # meets every shape of a hundred
            how["head_steps"] = head_steps
            generate = graphed(model, batch, **how) if args.graph else functools.partial(model.generate, **how)
            seconds = seconds_of(lambda: generate(labels, seeds=seeds), device, args.repeat)
            if who == "student":
                students[K] = seconds
            ratio = f"{seconds / students[K]:.1f}x" if K in students else "-"
            print(f"{who:8}{batch:6}{K:5}{head_steps:11}{guidance:9.2f}{seconds / batch:10.4f}{batch / seconds:10.2f}"
                  f"{ratio:>8}", flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# Curves

PANEL, COLUMNS = (840, 480), 3  # px of a panel, at twice the final size: drawn large and shrunk, lines come out smooth
CURVES = [(31, 119, 180), (214, 39, 40), (44, 160, 44), (255, 127, 14), (148, 103, 189), (140, 86, 75), (23, 190, 207)]


def read_log(path):
    """log.jsonl -> {(stage, quantity): {step: value}} of finite numbers; of a repeated step (resume) the last."""
    curves = {}
    lines = Path(path).read_text(errors="replace").splitlines()
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


def draw_panel(pen, left, top, title, curves):
    """One quantity: curves, a list of (colour, {step: value}), into the PANEL whose corner is (left, top)."""
    font, x0, y0, x1, y1 = ImageFont.load_default(26), left + 130, top + 56, left + PANEL[0] - 30, top + PANEL[1] - 60
    steps = [s for _, curve in curves for s in curve]
    values = [v for _, curve in curves for v in curve.values()]
    first, last, low, high = min(steps), max(steps), min(values), max(values)
    pen.rectangle([x0, y0, x1, y1], outline=INK, width=2)
    for place, text, anchor in (((x0, top + 12), title, "la"), ((x0 - 10, y0), f"{high:.3g}", "rt"),
                                ((x0 - 10, y1), f"{low:.3g}", "rb"), ((x0, y1 + 10), f"{first}", "la"),
                                ((x1, y1 + 10), f"{last}", "ra")):
        pen.text(place, text, INK, font, anchor)
    for colour, curve in curves:
        points = np.array(sorted(curve.items()), float)  # (n, 2)
        # more points than can be seen are averaged in groups, else a noisy loss is a solid band
        size = -(-len(points) // 200)
        points = np.stack([points[i:i + size].mean(0) for i in range(0, len(points), size)])
        x = x0 + (points[:, 0] - first) / max(last - first, 1) * (x1 - x0)
        y = y1 - (points[:, 1] - low) / ((high - low) or 1) * (y1 - y0)
        pen.line([*zip(x, y)], colour, 4, joint="curve")
        if len(points) < 30:  # few: show where they are
            for a, b in zip(x, y):
                pen.ellipse([a - 6, b - 6, a + 6, b + 6], colour)


def save_panels(runs, out):
    """runs: list of (title, {(stage, quantity): {step: value}}) -> PNG with a panel a quantity, a colour a run."""
    panels = list(dict.fromkeys(key for _, curves in runs for key in curves))  # in order of appearance
    if not panels:
        raise UserError(f"no numbers to draw in {', '.join(title for title, _ in runs)}")
    colours, legend = [CURVES[i % len(CURVES)] for i in range(len(runs))], 40 * len(runs) + 20
    size = min(COLUMNS, len(panels)) * PANEL[0], -(-len(panels) // COLUMNS) * PANEL[1] + legend
    canvas = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(canvas)
    for i, (title, _) in enumerate(runs):
        pen.line([(60, 40 * i + 36), (110, 40 * i + 36)], colours[i], 6)
        pen.text((126, 40 * i + 36), title_of(title, most=50), INK, ImageFont.load_default(28), anchor="lm")
    for i, key in enumerate(panels):
        curves = [(colour, run[key]) for colour, (_, run) in zip(colours, runs) if key in run]
        left, top = i % COLUMNS * PANEL[0], legend + i // COLUMNS * PANEL[1]
        draw_panel(pen, left, top, ": ".join(filter(None, key)), curves)
    save_image(canvas.resize((canvas.width // 2, canvas.height // 2), Image.LANCZOS), out)


# ----------------------------------------------------------------------------------------------------------------------
# The command


def parse():
    """The flags -> (args, job). A flag that the chosen job would ignore is refused."""
    p, heeded_by = Parser("A checkpoint -> pictures, an animation, an .npz, timings, curves."), {}

    def flag(jobs, name, **options):
        heeded_by[p.add_argument(name, **options).dest] = jobs.split()

    # the job: one of these, else a grid of pictures
    job = p.add_mutually_exclusive_group()
    job.add_argument("--gif", metavar="FILE", help="write the unmasking, a frame an AR step, to this .gif")
    job.add_argument("--num", type=int, help="draw this many pictures, all classes alike often, to --out")
    job.add_argument("--edit", metavar="PICTURE", help="draw the part --box of this picture anew, for each class")
    job.add_argument("--export", metavar="FILE", help="write the network as LTH14/mar reads it, a .pth")
    job.add_argument("--bench", action="store_true", help="time student and teacher on this machine")
    job.add_argument("--curves", nargs="+", metavar="LOG", help="draw the curves of these log.jsonl files")

    # the network
    network = "grid gif num edit export bench"
    flag(network, "--ckpt", help="teacher.pt or student.pt of a run, or a public MAR's .pth")
    flag(network, "--raw", action="store_true", help="the weights as trained, where a file holds their average too")
    flag(network, "--heads", type=int, help="attention heads of a public file that is none of MAR-B, L, H")
    flag("bench", "--size", choices=SIZES, help="random weights of this size, instead of --ckpt")

    # what is drawn
    pictures = "grid gif num edit"
    flag(pictures, "--classes", nargs="+", help="numbers (2, or index:2) or names; a grid of many shows 4 by itself")
    flag("grid gif edit", "--per_class", type=int, help="pictures of each class; by itself 4, with several K 1")
    flag("edit", "--box", type=int, nargs=4, metavar=("LEFT", "TOP", "RIGHT", "BOTTOM"),
         help="in pixels of the cropped picture; whole tokens are drawn")
    flag(pictures, "--seed", type=int, default=0, help="picture i is that of (seed, i)")
    flag(pictures, "--vae", help="kl16.ckpt, for models of latents")
    flag("grid num edit curves", "--out", help="a .png; with --num an .npz, or a folder for PNGs")

    # how it is drawn; what is not given is as the checkpoint was made for
    timed = pictures + " bench"
    flag(timed, "--ar_steps", type=int, nargs="+", metavar="K", help="1 to the number of tokens; a grid takes several")
    flag(timed, "--head_steps", type=int, help="denoising steps of a teacher: 100 are MAR's, fewer are faster")
    flag(timed, "--guidance", type=float, help="1 = none; a teacher's: MAR has 2.9, 3.0, 3.2 for B, L, H")
    flag(timed, "--guidance_schedule", choices=["linear", "constant"], help="linear grows it from AR step to AR step")
    flag(pictures, "--temperature", type=float, default=1.0, help="scale of the noise; MAR: 0.95 unguided")
    flag(pictures, "--order", choices=ORDERS, default="random", help="of the tokens; random is what MAR is trained for")

    # the machine
    flag("grid num edit bench", "--batch", type=int, default=64, help="pictures at once; fewer if memory is short")
    flag("num bench", "--compile", action="store_true", help="join small kernels: a minute first; on a CPU it loses")
    flag("num bench", "--graph", action="store_true", help="a batch is one CUDA graph: for small ones; never run yet")
    flag("bench", "--teacher_ar_steps", type=int, nargs="+", metavar="K", help="fewer than --ar_steps save time")
    flag("bench", "--repeat", type=int, default=3, help="timings to take the median of")
    flag(timed, "--device", default="auto", help="auto, cpu, cuda or cuda:N")
    args = p.parse_args()
    check_numbers(args, one="num per_class ar_steps head_steps batch teacher_ar_steps repeat heads")
    job = next((job for job in ("gif", "num", "edit", "export", "bench", "curves") if getattr(args, job)), "grid")
    for name, jobs in heeded_by.items():
        if job not in jobs and getattr(args, name) != p.get_default(name):
            raise UserError(f"--{name} does nothing for {'a grid' if job == 'grid' else f'--{job}'}: leave it out")
    if bool(args.edit) != bool(args.box):
        raise UserError("--edit PICTURE and --box LEFT TOP RIGHT BOTTOM belong together: give both")
    if args.edit and not os.path.isfile(args.edit):
        raise UserError(f"--edit: no such file: {args.edit}")
    if len(args.ar_steps or []) > 1 and job in ("gif", "num", "edit"):
        raise UserError(f"several --ar_steps make a grid; --{job} takes one")
    if job != "curves" and bool(args.ckpt) == bool(args.size):
        raise UserError("give --ckpt (a run's student.pt or teacher.pt, or a public MAR checkpoint)"
                        + " or --size, one of them" * args.bench)
    return args, job


def open_network(args):
    """--ckpt or --size -> (the checkpoint's dict, MAR)."""
    if args.size:
        return {}, MAR(SIZES[args.size]).eval()
    file = read_checkpoint(args.ckpt)
    if args.raw and "model" not in file:
        raise UserError(f"{args.ckpt} holds one set of weights: leave --raw out")
    if args.heads and "config" in file:
        raise UserError(f"{args.ckpt} says itself how many heads it has: leave --heads out")
    model = load_mar(args.ckpt, ema=not args.raw, **({"heads": args.heads} if args.heads else {}))
    if model.config.width % model.config.heads:
        raise UserError(f"--heads {args.heads} does not divide the width, {model.config.width}")
    return file, model


def fill_in(args, file, config):
    """Flags not given take the values the checkpoint was made for, in place; contradictions with it are refused.

    args: the namespace of `parse`, or one with the same names (fid.py); file: the checkpoint; config: its MARConfig.
    """
    made = file["args"] if "stage" in file else {"guidance": {768: 2.9, 1024: 3.0, 1280: 3.2}.get(config.width, 2.0)}
    if file.get("stage", "teacher") != "teacher" and not args.bench:  # public files, and random weights, are teachers
        for flag in ("head_steps", "guidance"):
            if getattr(args, flag) not in (None, 1):
                raise UserError(f"{args.ckpt} is a student, made for one step and with guidance built in: --{flag} "
                                f"{getattr(args, flag):g} is for a teacher's checkpoint")
        made = {**made, "teacher_head_steps": 1, "guidance": 1.0}
    args.ar_steps = args.ar_steps or [min(made.get("ar_steps", 64), config.seq_len)]
    for K in args.ar_steps:
        mask_counts(config.seq_len, K)  # complains when K is above the number of tokens
    args.head_steps = args.head_steps or made.get("teacher_head_steps", 100)
    args.guidance = made.get("guidance", 1.0) if args.guidance is None else args.guidance
    args.guidance_schedule = args.guidance_schedule or made.get("guidance_schedule", "linear")


def find_classes(wanted, names, count):
    """Words of the command line -> class numbers. A word may be a number, index:number, or a name; one that means two
    classes is refused: folders called 0..11 are sorted as text, so the class called 2 is number 4."""
    classes = []
    for word in wanted:
        number = word.removeprefix("index:")
        meant = {int(number)} & set(range(count)) if number.isdecimal() else set()
        meant |= {i for i in range(count) if names[i] == word}
        if not meant:
            raise UserError(f"--classes {word}: this checkpoint has the classes 0..{count - 1}"
                            f" ({', '.join(names[:10])}{', ...' if count > 10 else ''})")
        if len(meant) > 1:
            raise UserError(f"--classes {word} may be " + " or ".join(
                f"index:{i}, the class called {names[i]}" for i in sorted(meant)) + ": write one of these")
        classes += meant
    return classes


def check_output(path, suffixes):
    """Refuse a file that could not be written, before hours are spent on what belongs into it."""
    path = Path(path)
    if path.suffix.lower() not in suffixes:
        raise UserError(f"{path}: the name must end in {' or '.join(suffixes)}")
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        trial = path.with_name(f"{path.name}.{os.getpid()}")
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another file") from None


def check_num_output(path):
    """The same for --num: an .npz, or a folder, new or empty, for PNGs of two calls must not mix."""
    if not (path.endswith("/") or os.path.isdir(path) or not Path(path).suffix):
        return check_output(path, [".npz"])
    if os.path.exists(path) and (os.path.isfile(path) or os.listdir(path)):
        raise UserError(f"{path}: --num writes an .npz, or into a folder that is new or empty: choose another name")
    check_output(os.path.normpath(path) + ".png", [".png"])  # whether one can write beside it


def main():
    """Draw, animate, save, time or plot, as the flags say; whatever can be refused is refused first."""
    args, job = parse()
    out = args.gif or args.export or args.out or {"num": "samples.npz", "curves": "curves.png"}.get(job, "grid.png")
    if job == "curves":
        logs = [(str(Path(path).parent), read_log(path)) for path in args.curves]
        check_output(out, [".png"])
        save_panels(logs, out)
        return print(f"{out}: {len(logs)} run(s); curves of more than 200 points are averaged")
    device, rank, world = setup(args.device)
    if world > 1 and job != "num":
        raise UserError("only --num is shared among processes: start this with python, not torchrun")
    file, model = open_network(args)
    if job == "export":
        check_output(out, [".pth", ".pt"])
        export(model, file, out)
        return print(f"{out}: {model.config}")
    model.to(device)
    fill_in(args, file, model.config)
    if device.type == "cuda":
        bf16_weights(model)
    elif args.graph:
        raise UserError("--graph: a CUDA graph needs a GPU: leave it out on the CPU")
    if job == "bench":
        return bench(model, args, device)
    vae = load_vae(args.vae).to(device) if args.vae else None
    check_vae(model, vae)

    count = model.config.num_classes
    names = file.get("class_names") or [f"class {i}" for i in range(count)]
    if count == 1000:  # public files have no names, students those of ImageNet's folders; words tell a reader more
        names = read_class_names(own=file.get("class_names"))
    if args.classes:
        classes = find_classes(args.classes, names, count)
    elif job == "num" or count <= 16:  # what is to be judged must be of all classes
        classes = list(range(count))
    else:  # nobody looks at 1,000 rows
        classes = [i * count // 4 for i in range(4)]
    titles = [title_of(names[label], f"class {label}") for label in classes]
    how = {"ar_steps": args.ar_steps[0], "head_steps": args.head_steps, "guidance": args.guidance,
           "guidance_schedule": args.guidance_schedule, "temperature": args.temperature, "orders": args.order}
    rows, start = [], time.time()
    if job == "edit":
        how["known"], stays = open_edit(model, args.edit, args.box, vae)
        rows = [("picture", stays)]
        how["ar_steps"] = min(args.ar_steps[0], int(how["known"][1].sum()))  # every step reveals a token
        args.ar_steps = [how["ar_steps"]]
    if rank == 0:
        check_num_output(out) if job == "num" else check_output(out, [".gif" if job == "gif" else ".png"])
    if job == "num":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C does: what is half-written goes
        if args.compile:
            compile_or_refuse(model)
        # classes take turns, so every stretch of the file is balanced: the inception score is computed on tenths of it
        labels = np.array(classes)[np.arange(args.num) % len(classes)]
        generate = graphed(model, min(args.batch, args.num), **how) if args.graph else None
        save_samples(model, labels, out, rank, world, args.batch, seed=args.seed, vae=vae, generate=generate, **how)
    elif job == "gif":
        save_gif(model, classes, titles, args.per_class or 4, out, args.seed, vae, **how)
    else:
        save_grid(rows + draw_grid(model, classes, titles, args, seed=args.seed, vae=vae, **how), out)
    if rank == 0:
        print(f"{out}: AR steps {', '.join(map(str, args.ar_steps))}, head steps {args.head_steps}, guidance "
              f"{args.guidance:g}, seed {args.seed}, {time.time() - start:.1f} s")


if __name__ == "__main__":
    run_main(main)
