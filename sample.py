"""A checkpoint -> pictures, an animation, an .npz for fid.py, a file for others.

Needs a checkpoint of distill.py or rl.py (out/<data>/teacher.pt, student.pt), or a public LTH14/mar one. Models of
latents also need the VAE (python data.py --get kl16). The checkpoint gives the defaults: a student draws a token in one
head step, without guidance; a teacher takes its whole chain and the guidance of its run.

    python sample.py --ckpt out/shapes/student.pt --classes 0 1 2 --out grid.png
    python sample.py --ckpt out/shapes/student.pt --ar_steps 4 8 16             # a row of pictures for each K
    python sample.py --ckpt out/shapes/student.pt --order outward --gif outward.gif     # AR step by AR step, any order
    python sample.py --ckpt mar_base/checkpoint-last.pth --vae kl16.ckpt --classes 207 pug --out dogs.png
    python sample.py --ckpt student.pt --vae kl16.ckpt --edit photo.jpg --box 64 64 192 192 --classes 207 --out dog.png
    torchrun --nproc_per_node=8 -- sample.py --ckpt student.pt --vae kl16.ckpt --num 50000 --out samples.npz
    python sample.py --ckpt student.pt --export mar.pth                         # for the public LTH14/mar code
(Without the --, torchrun takes --num for an abbreviation of its own flags.)
"""
import glob
import itertools
import json
import math
import os
import shutil
import signal
import sys
import tempfile
import unicodedata
import zipfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from data import (DTYPES, LATENT_SCALE, Parser, check_numbers, file_hash, load_vae, read_class_names, read_image,
                  run_main, setup)
from model import ORDERS, UserError, bf16_weights, load_mar, mask_counts, replacing, runs_bf16, save_checkpoint, say

# ----------------------------------------------------------------------------------------------------------------------
# Drawing: what fid.py, distill.py and rl.py use too


def to_uint8(x):
    """Pictures in [-1, 1], any shape -> uint8 by MAR's rounding; what lies outside the range is clipped."""
    return ((x.float() + 1) * 127.5).clamp(0, 255).round().byte()


def decode(model, latents, vae):
    """What `generate` returns (B, c, h, w) -> uint8 (B, 3, H, W), on the same device. UserError if a picture is not
    finite: a NaN would become a black pixel, and nobody could tell it from a real one later."""
    pictures, broken = [], 0
    for part in latents.split(16):  # at 256 px the VAE needs hundreds of MB per picture, far more than the MAR
        x = part if model.config.pixels else vae.decode(part / LATENT_SCALE)  # (16, 3, H, W)
        pictures.append(to_uint8(x))
        broken += len(x) - x.isfinite().flatten(1).all(1).sum()
    if broken:  # this waits for the device; the caller, who copies the bytes from it, would wait anyway
        raise UserError(f"{getattr(model, 'source', 'this network')}: {broken} of {len(latents)} pictures hold numbers "
                        "that are not finite: its training blew up, or the file is damaged; take another checkpoint")
    return torch.cat(pictures)


def steps_of(model):
    """The AR steps that a network is drawn in by default: those of its own run."""
    return min(model.made.get("ar_steps", 64), model.config.seq_len)


def check_vae(model, vae):
    """Ask for the VAE before the work starts."""
    if model.config.pixels != (vae is None):
        raise UserError("this model draws pixels, not latents: leave --vae out" if model.config.pixels else
                        "this model draws latents: give --vae kl16.ckpt (python data.py --get kl16 downloads it)")


def image_seeds(seed, start, count):
    """(count, 2) int64 pairs (seed, index), which fix the noise and the order of each picture (model.image_keys)."""
    return torch.tensor([(seed, index) for index in range(start, start + count)])


@torch.no_grad()
def draw(model, labels, seed=0, start=0, vae=None, batch=64, **how):
    """Pictures of the classes `labels` (N,), ints in any form -> uint8 (N, 3, H, W) on the CPU.

    Picture i depends on model, vae, how, labels[i], seed and start + i: not on `batch`, not on the other pictures.
    Runs on the model's device, where the VAE must be too. how: ar_steps, head_steps, ... for MAR.generate."""
    check_vae(model, vae)
    device, pictures = next(model.parameters()).device, []
    labels = torch.as_tensor(labels, dtype=torch.int64, device=device)
    for part in labels.split(batch):
        drawn = decode(model, model.generate(part, seeds=image_seeds(seed, start, len(part)), **how), vae)
        pictures.append(drawn.cpu())  # bytes leave the device: a quarter of the floats
        start += len(part)
    return torch.cat(pictures)


def draw_together(model, labels, rank, world, start=0, **how):
    """`draw`, divided among the ranks -> uint8 (N, 3, H, W) on each of them."""
    labels = torch.as_tensor(labels)
    share = -(-len(labels) // world)  # equal shares: the last label is drawn again to fill them
    padded = torch.cat([labels, labels[-1:].expand(share * world - len(labels))])
    first = rank * share
    images = draw(model, padded[first:first + share], start=start + first, **how)
    if world == 1:
        return images
    device = next(model.parameters()).device  # nccl sends nothing that lies on the CPU
    parts = [torch.empty_like(images, device=device) for _ in range(world)]
    dist.all_gather(parts, images.to(device))
    return torch.cat(parts)[:len(labels)].cpu()


# ----------------------------------------------------------------------------------------------------------------------
# A grid of pictures

GAP, PAPER, INK = 4, (255, 255, 255), (30, 30, 30)  # px between pictures; colours of the background, the text


def title_of(name, label):
    """A class's name in ASCII, which Pillow's own font has: e for é. "class 3" where nothing is left of the name."""
    title = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return " ".join(title.split())[:24] or f"class {label}"  # more letters would leave no room for pictures


def grid_image(rows):
    """rows: list of (title, uint8 (n, 3, H, W)) -> Pillow image: one row each, titles at the left. Small pictures are
    enlarged to at most 96 px without smoothing, so that the pixels of a 16 px picture can be told apart."""
    font, size = ImageFont.load_default(14), rows[0][1].shape[3]
    side = size * max(1, 96 // size)  # of a picture, as it is shown
    left = max(math.ceil(font.getlength(title)) + 16 if title else GAP for title, _ in rows)
    width = left + (side + GAP) * max(len(pictures) for _, pictures in rows)
    canvas = Image.new("RGB", (width, GAP + (side + GAP) * len(rows)), PAPER)
    for i, (title, pictures) in enumerate(rows):
        y = GAP + i * (side + GAP)
        ImageDraw.Draw(canvas).text((8, y + side / 2), title, INK, font, anchor="lm")
        for j, picture in enumerate(pictures.permute(0, 2, 3, 1).numpy()):  # (H, W, 3) each
            tile = Image.fromarray(picture).resize((side, side), Image.NEAREST)
            canvas.paste(tile, (left + j * (side + GAP), y))
    return canvas


def save_grid(rows, path):
    """rows: list of (title, uint8 (n, 3, H, W)) -> PNG file, as grid_image lays them out."""
    with replacing(path, "wb") as file:
        grid_image(rows).save(file, "PNG")


def draw_grid(model, classes, titles, ways, per_class, **shared):
    """Rows for save_grid: one per class; of several ways to draw one per way, with the same noise and orders."""
    drawn = [draw(model, np.repeat(classes, per_class), **how, **shared) for how in ways]
    if len(ways) == 1:
        return list(zip(titles, drawn[0].split(per_class)))
    titles = [f"K = {how['ar_steps']}" + f", g = {how['guidance']:g}" * (model.stage == "teacher") for how in ways]
    return list(zip(titles, drawn))


# ----------------------------------------------------------------------------------------------------------------------
# The animation, one frame per AR step; and editing: the order is free, so any part of a picture may be known


def in_pixels(config, tokens):
    """(B, L) bool, one per token -> (B, 1, H, W), one per pixel."""
    side = math.isqrt(config.seq_len)
    return F.interpolate(tokens.view(-1, 1, side, side).float(), config.img_size).bool()


@torch.no_grad()
def unmasking(model, labels, seed, vae, **how):
    """Yields uint8 (B, 3, H, W) before the first and after every AR step; tokens not yet known are grey."""
    c, B = model.config, len(labels)
    known = torch.zeros(B, c.seq_len, dtype=torch.bool, device=labels.device)
    yield torch.full((B, 3, c.img_size, c.img_size), 128, dtype=torch.uint8)
    for tokens, _, predict in model.unmask(labels, seeds=image_seeds(seed, 0, B), **how):
        known = known.scatter(1, predict, True)
        # the decoder is given zeros for unknown latents, their mean; known cells near them change colour a little
        # until their neighbours are there: that is the decoder, not the model changing its mind
        yield torch.where(in_pixels(c, known), decode(model, model.unpatchify(tokens), vae), 128).cpu()


def save_gif(model, classes, titles, per_class, path, **how):
    """The unmasking of per_class pictures of each class -> an animated GIF file."""
    labels = torch.tensor(classes, device=next(model.parameters()).device).repeat_interleave(per_class)
    frames = [grid_image(list(zip(titles, pictures.split(per_class)))).quantize(256)  # a third of the memory
              for pictures in tqdm(unmasking(model, labels, **how), total=how["ar_steps"] + 1)]
    each = max(20, 3000 // len(frames))  # ms: three seconds in all, but browsers slow down below 20
    with replacing(path, "wb") as file:
        frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], loop=0,
                       duration=[each] * (len(frames) - 1) + [2000])


def open_edit(model, path, box, vae):
    """-> (given and redraw for MAR.generate, uint8 (2, 3, H, W): the picture, what stays of it). What lies outside the
    tokens that the box touches stays: pixels as they are, latents as the VAE encodes and decodes them."""
    left, top, right, bottom = box
    size, side = model.config.img_size, math.isqrt(model.config.seq_len)  # px; tokens
    if not (0 <= left < right <= size and 0 <= top < bottom <= size):
        raise UserError(f"--box wants left < right and top < bottom, in 0..{size} px of the cropped picture")
    cell, redraw = size // side, torch.zeros(side, side, dtype=torch.bool)
    redraw[top // cell:-(-bottom // cell), left // cell:-(-right // cell)] = True  # every token that the box touches
    redraw = redraw.flatten()  # (L,)
    # upright, because the box was measured in a viewer; then cropped as training pictures are
    picture = torch.from_numpy(read_image(path, size, upright=True))[None]  # (1, 3, H, W)
    x = picture.to(next(model.parameters()).device).float() / 127.5 - 1
    if vae is not None:
        x = vae.moments(x).chunk(2, dim=1)[0] * LATENT_SCALE  # the posterior's mean
    stays = torch.where(in_pixels(model.config, redraw), 128, picture)
    return {"given": model.patchify(x), "redraw": redraw}, torch.cat([picture, stays])


# ----------------------------------------------------------------------------------------------------------------------
# Many pictures: an .npz as fid.py and ADM's evaluator read it, or a folder of PNGs; and one network for others


def save_npz(rounds, labels, class_names, side, path):
    """Pictures -> .npz with arr_0 uint8 (N, H, W, 3), labels int64 (N,) and the class_names that these are numbers of.
    Each round of pictures is appended: memory holds one round, whatever N is."""
    shape = (len(labels), side, side, 3)
    if shutil.disk_usage(Path(path).parent).free < math.prod(shape):
        raise UserError(f"{path} will have {math.prod(shape) / 1e9:.1f} GB, more than is free: choose another --out")
    with replacing(path, "wb") as part, zipfile.ZipFile(part, "w") as archive:  # not compressed: it saves little
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for pictures in rounds:
                file.write(pictures.permute(0, 2, 3, 1).numpy().tobytes())  # (n, H, W, 3)
        for name, array in ("labels", labels), ("class_names", class_names):
            if array is not None:
                with archive.open(f"{name}.npy", "w") as file:
                    np.lib.format.write_array(file, np.asarray(array))


def open_folder(folder, drawn_by):
    """A folder for PNGs: new, empty, or begun by a call that drew alike. drawn_by: what pictures depend on, JSON."""
    note, text = Path(folder) / ".drawn_by.json", json.dumps(drawn_by)  # hidden: readers of pictures pass it over
    os.makedirs(folder, exist_ok=True)
    if os.listdir(folder) and not (note.exists() and note.read_bytes() == text.encode()):
        raise UserError(f"{folder} holds other files than pictures drawn in this way from this checkpoint: "
                        "--out wants a new or empty folder, or an .npz")
    for left in note.parent.glob("*.writing"):  # model.replacing's names, after a kill
        left.unlink()
    with replacing(note) as file:
        file.write(text)


def save_samples(model, labels, path, rank, world, batch, **how):
    """Pictures of `labels` (N,) numpy, drawn by all ranks in rounds of world * batch, to an .npz; or to a folder as
    <index>_<label>.png, where a round that is there already is not drawn again."""
    names, size = [f"{i:06d}_{label}.png" for i, label in enumerate(labels)], world * batch
    to_folder = not Path(path).suffix
    found = [set(os.listdir(path)) if to_folder and rank == 0 else set()]
    if world > 1:
        dist.broadcast_object_list(found)  # other ranks, on other machines, need not see the folder
    if later := sum(name.endswith(".png") for name in found[0].difference(names)):
        say(f"note: {path} holds {later} pictures of an earlier, larger --num, which a judge would count")
    firsts = [i for i in range(0, len(labels), size) if not found[0].issuperset(names[i:i + size])]
    rounds = (draw_together(model, labels[i:i + size], rank, world, i, batch=batch, **how)
              for i in tqdm(firsts, unit="round", disable=rank > 0 or None))
    if rank == 0 and not to_folder:
        return save_npz(rounds, labels, model.class_names, model.config.img_size, path)
    for first, pictures in zip(firsts, rounds):
        if rank > 0:
            continue  # this rank has drawn and sent its share; rank 0 writes
        for name, picture in zip(names[first:], pictures):
            with replacing(Path(path) / name, "wb") as file:
                Image.fromarray(picture.permute(1, 2, 0).numpy()).save(file, "PNG")


def export(model, path):
    """Write a network as LTH14/mar does, whose loader wants "model" and "model_ema" under its names of weights. The
    config and the rest of our own files come along, so that load_mar still knows a student from a teacher."""
    state = {name.replace("head_net.", "diffloss.net."): value for name, value in model.state_dict().items()}
    ours = {"config": asdict(model.config), "stage": model.stage, "args": model.made, "class_names": model.class_names}
    save_checkpoint({**ours, "model": state, "model_ema": state}, path)
    say(f"{path}: {model.config}")
    if model.stage != "teacher":
        say(f"LTH14/mar draws a student only with README's patch of DiffLoss.sample, t = {model.config.t_init} in it")
    elif model.config.pixels:
        say("LTH14/mar cannot draw a teacher of pixels: it clamps none of them")


# ----------------------------------------------------------------------------------------------------------------------
# The command


def drawing_flags(flag):
    """How pictures are drawn: fid.py has the same flags. flag: a parser's add_argument."""
    flag("--ar_steps", type=int, nargs="+", metavar="K", help="up to the number of tokens; each K gets a row")
    flag("--guidance", type=float, nargs="+", metavar="G", help="of teachers, 1 = none; MAR-B, L, H: 2.9, 3.0, 3.2")
    flag("--guidance_schedule", choices=["linear", "constant"], help="of teachers; linear grows with the AR steps")
    flag("--head_steps", type=int, help="denoising steps of teachers: MAR takes 100, fewer are faster")
    flag("--temperature", type=float, default=1.0, help="scale of the noise; MAR: 0.95 unguided")
    flag("--order", choices=ORDERS, default="random", help="of the tokens; MAR is trained for random")
    flag("--seed", type=int, default=0, help="picture i is that of (seed, i)")
    flag("--vae", help="kl16.ckpt, for models of latents")
    flag("--batch", type=int, default=64, help="pictures at once per process; fewer if memory is short")
    flag("--device", default="auto", help="auto, cpu, cuda or mps")
    flag("--dtype", default="auto", choices=DTYPES, help="of matrix products; auto: bfloat16 if it is fast")


def parse_args(argv=None):
    """The flags -> (args, job)."""
    p = Parser("A checkpoint -> pictures, an animation, an .npz.")
    # the job: one of these, or a grid of pictures
    jobs = p.add_mutually_exclusive_group()
    jobs.add_argument("--gif", metavar="FILE", help="write the unmasking, one frame per AR step, to this .gif")
    jobs.add_argument("--num", type=int, help="draw this many pictures, classes in turn, to --out")
    jobs.add_argument("--edit", metavar="PICTURE", help="draw the part --box of this picture anew, for each class")
    jobs.add_argument("--export", metavar="FILE", help="write the network as LTH14/mar reads it, a .pth")
    # of what
    p.add_argument("--ckpt", required=True, help="teacher.pt or student.pt of a run, or a public MAR's .pth")
    p.add_argument("--classes", nargs="+", help="names, else numbers; by default all, but a grid takes 4 of over 16")
    p.add_argument("--per_class", type=int, help="pictures of each class; by default 4, but 1 for several K or G")
    p.add_argument("--box", type=int, nargs=4, help="left top right bottom, px of the cropped picture: --edit redraws "
                   "each token that the box touches; a VAE reencodes the rest")
    p.add_argument("--out", help="a .png; with --num an .npz, or a folder, which a rerun completes")
    # how; by default as the checkpoint was made for
    drawing_flags(p.add_argument)
    args = p.parse_args(argv)
    check_numbers(args, one="num per_class ar_steps head_steps batch")
    job = next((job for job in ("gif", "num", "edit", "export") if getattr(args, job)), "grid")
    if bool(args.edit) != bool(args.box):
        raise UserError("--edit PICTURE and --box LEFT TOP RIGHT BOTTOM belong together: give both")
    unused = {"gif": ["out", "batch"], "num": ["per_class"],
              "export": sorted(vars(args).keys() - {"ckpt", "export", "device"})}
    for name in unused.get(job, []):
        if getattr(args, name) != p.get_default(name):
            raise UserError(f"--{job} does not use --{name}: leave it out")
    return args, job


def ways_to_draw(args, model):
    """Keyword arguments of `draw`, for each of --ar_steps and --guidance. By default a checkpoint is drawn as it was
    made for, a public one as MAR draws it. A student has one head step and its own guidance, whatever the flags say:
    fid.py judges teachers beside students."""
    made, config = model.made, model.config
    steps = args.ar_steps or [steps_of(model)]
    mask_counts(config.seq_len, max(steps))  # complains when K is above the number of tokens
    how = {"head_steps": args.head_steps or made.get("teacher_head_steps", 100),
           "guidance_schedule": args.guidance_schedule or made.get("guidance_schedule", "linear"),
           "temperature": args.temperature, "orders": args.order, "seed": args.seed}
    of_mar = {768: 2.9, 1024: 3.0, 1280: 3.2}  # by the width of B, L, H
    scales = args.guidance or [made.get("guidance", of_mar.get(config.width, 2.0))]
    if model.stage != "teacher":
        how["head_steps"], scales = 1, [1.0]
    return [{"ar_steps": K, "guidance": g, **how} for K, g in itertools.product(steps, scales)]


def find_classes(words, names):
    """Words -> class numbers. A name goes first: of folders 0..11, sorted as text, the one named 2 has number 4."""
    classes, numbers = [], range(len(names))
    for word in words:
        meant = [i for i in numbers if names[i] == word] or [i for i in numbers if str(i) == word]
        if len(meant) != 1:
            raise UserError(f"--classes {word} means {meant or 'no class'}: give a number, 0..{len(names) - 1}, "
                            f"or the name of one class: {', '.join(names[:10])}")
        classes += meant
    return classes


def check_output(path, *suffixes):
    """Refuse a file that could not be written, before the work starts. Remove what a killed call has left of it."""
    path = Path(path)
    if path.suffix.lower() not in suffixes or path.is_dir():
        raise UserError(f"cannot write {path}: give a file whose name ends in {' or '.join(suffixes)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=path.parent).close()  # an OSError says why not
    for left in path.parent.glob(f"{glob.escape(path.name)}.*.writing"):  # model.replacing's names
        left.unlink()


def main(argv=None):
    """Draw, animate, edit or export. Whatever can be refused is refused before a file is made."""
    args, job = parse_args(argv)
    device, rank, world = setup(args.device, args.dtype)
    if world > 1 and job != "num":
        raise UserError("only --num is divided among processes: start one for a grid, a gif, an edit or an export")
    model = load_mar(args.ckpt)
    if job == "export":
        check_output(args.export, ".pth", ".pt")
        return export(model, args.export)
    if model.stage != "teacher" and (args.head_steps not in (None, 1) or args.guidance not in (None, [1])):
        raise UserError(f"{args.ckpt} is a student, whose guidance and one head step are built in: "
                        "leave --head_steps and --guidance out")
    ways = ways_to_draw(args, model)
    if len(ways) > 1 and job in ("gif", "num"):
        raise UserError(f"several --ar_steps or --guidance make a grid; --{job} takes one")
    bf16_weights(model.to(device))
    vae = load_vae(args.vae).to(device) if args.vae else None
    check_vae(model, vae)

    # public files have no names, students have those of ImageNet's folders; words tell a reader more
    count, own = model.config.num_classes, model.class_names
    names = read_class_names(of_data=own) if count == 1000 else own or [f"class {i}" for i in range(count)]
    # judges need all classes, but nobody looks at 1,000 rows
    some = range(0, count, 1 if job == "num" or count <= 16 else -(-count // 4))
    classes = find_classes(args.classes, names) if args.classes else list(some)
    titles = [title_of(names[label], label) for label in classes]
    per_class, rows = args.per_class or (4 if len(ways) == 1 else 1), []
    if job == "edit":
        how_to_edit, shown = open_edit(model, args.edit, args.box, vae)
        rows = [("picture", shown)]
        tokens = int(how_to_edit["redraw"].sum())  # every AR step must reveal one
        ways = [{**how, **how_to_edit, "ar_steps": min(how["ar_steps"], tokens)} for how in ways]
    out = args.gif or args.out or ("samples.npz" if job == "num" else "grid.png")
    if rank == 0 and job == "num" and not Path(out).suffix:
        files = [file_hash(path) for path in (args.ckpt, args.vae) if path]
        open_folder(out, {"files_sha256": files, "bf16": runs_bf16(device), "classes": classes, **ways[0]})
    elif rank == 0:
        check_output(out, {"gif": ".gif", "num": ".npz"}.get(job, ".png"))
    if job == "num":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C does: half-written files go
        # classes take turns, so that each tenth of the file is balanced: the inception score is computed on tenths
        labels = np.resize(classes, args.num)
        save_samples(model, labels, out, rank, world, args.batch, vae=vae, **ways[0])
    elif job == "gif":
        save_gif(model, classes, titles, per_class, out, vae=vae, **ways[0])
    else:
        save_grid(rows + draw_grid(model, classes, titles, ways, per_class, vae=vae, batch=args.batch), out)
    for how in ways:
        say(f"{out}: K = {how['ar_steps']}, head steps {how['head_steps']}, guidance {how['guidance']}")


if __name__ == "__main__":
    run_main(main)
