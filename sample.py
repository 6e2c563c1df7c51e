"""A checkpoint -> pictures, an animation, an .npz for fid.py, a file for others.

Needs a checkpoint of distill.py or rl.py (out/<data>/teacher.pt, student.pt), or a public LTH14/mar one. Models of
latents also need the VAE (python data.py --get kl16). What no flag says, the checkpoint says: a student draws a token
in one head step, without guidance, a teacher by its whole chain and with the guidance of its run.

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
from model import (ORDERS, UserError, bf16_weights, load_mar, mask_counts, reading, replacing, save_checkpoint,
                   say, write_json)

# ----------------------------------------------------------------------------------------------------------------------
# Drawing: what fid.py, distill.py and rl.py use too


def to_uint8(x):
    """Pictures in [-1, 1], any shape -> uint8 by MAR's rounding; what lies outside the range is clipped."""
    return ((x.float() + 1) * 127.5).clamp(0, 255).round().byte()


def decode(model, latents, vae=None, chunk=16):
    """What `generate` returns (B, c, h, w) -> uint8 (B, 3, H, W), on the same device. UserError if one is not finite: a
    NaN becomes a black pixel, and nobody could tell it from a real one later. chunk: pictures decoded at once; one of
    256 px fills hundreds of MB inside the VAE, far more than in the MAR."""
    pictures, finite = [], []
    for part in latents.split(chunk):
        x = part if model.config.pixels else vae.decode(part / LATENT_SCALE)  # (chunk, 3, H, W)
        pictures.append(to_uint8(x))
        finite.append(x.isfinite().flatten(1).all(1))
    check_finite(model, torch.cat(finite))
    return torch.cat(pictures)


def check_finite(model, finite):
    """Stop where one of `finite` (B,) is false. Costs a wait for the device, which handing over the bytes costs too."""
    broken = len(finite) - int(finite.sum())
    if broken:
        raise UserError(f"{getattr(model, 'source', 'this network')}: {broken} of {len(finite)} pictures hold numbers "
                        "that are not finite: its training blew up, or the file is damaged; take another checkpoint")


def steps_of(model):
    """AR steps that a network is drawn in if nobody says otherwise: those of its own run."""
    return min(model.made.get("ar_steps", 64), model.config.seq_len)


def check_vae(model, vae):
    """Ask for the VAE before the work is done, not after."""
    if model.config.pixels != (vae is None):
        raise UserError("this model draws pixels, not latents: leave --vae out" if model.config.pixels else
                        "this model draws latents: give --vae kl16.ckpt (python data.py --get kl16 downloads it)")


def image_seeds(seed, start, count):
    """(count, 2) int64 pairs (seed, index): what fixes noise and order of each picture (see model.image_keys)."""
    return torch.tensor([(seed, index) for index in range(start, start + count)])


@torch.no_grad()
def draw(model, labels, seed=0, start=0, vae=None, batch=64, **how):
    """Pictures of the classes `labels` (N,), ints in any form -> uint8 (N, 3, H, W) on the CPU.

    Picture i depends on (model, seed, start + i, labels[i]) alone: not on `batch`, nor on who else is drawn with it.
    Runs on the model's device, where the VAE must be too. how: ar_steps, head_steps, ... for MAR.generate."""
    check_vae(model, vae)
    device, pictures = next(model.parameters()).device, []
    labels = torch.as_tensor(labels, dtype=torch.int64, device=device)
    for part in labels.split(batch):
        drawn = decode(model, model.generate(part, seeds=image_seeds(seed, start, len(part)), **how), vae)
        pictures.append(drawn.cpu())  # bytes leave the device: a quarter of the floats
        start += len(part)
    return torch.cat(pictures)


def draw_together(model, labels, rank, world, start=0, **draw_kwargs):
    """`draw` divided among the ranks: uint8 (N, 3, H, W) on every one."""
    labels = torch.as_tensor(labels)
    share = -(-len(labels) // world)  # equal shares: the last label is drawn again to fill them
    padded = torch.cat([labels, labels[-1:].expand(share * world - len(labels))])
    first = rank * share
    images = draw(model, padded[first:first + share], start=start + first, **draw_kwargs)
    if world == 1:
        return images
    device = next(model.parameters()).device  # nccl sends nothing that lies on the CPU
    parts = [torch.empty_like(images, device=device) for _ in range(world)]
    dist.all_gather(parts, images.to(device))
    return torch.cat(parts)[:len(labels)].cpu()


# ----------------------------------------------------------------------------------------------------------------------
# A grid of pictures

GAP, PAPER, INK = 4, (255, 255, 255), (30, 30, 30)  # px between pictures; colours of pictures' surroundings and of text


def title_of(name, otherwise=""):
    """A class name in ASCII, which Pillow's own font has: e for é. `otherwise` where nothing is left of it."""
    title = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return " ".join(title.split())[:24] or otherwise  # more letters would leave no room for pictures


def grid_image(rows):
    """rows: list of (title, uint8 (n, 3, H, W)) -> Pillow image: one row each, titles at the left. Small pictures are
    enlarged to 96 px without smoothing, so that the pixels of a 16 px picture can be told apart."""
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


def draw_grid(model, classes, titles, ways, per_class=None, **draw_kwargs):
    """Rows for save_grid: one a class. Of several ways to draw: one a way, with the same classes, noise and orders."""
    per_class = per_class or (4 if len(ways) == 1 else 1)
    drawn = [draw(model, np.repeat(classes, per_class), **how, **draw_kwargs) for how in ways]
    if len(ways) == 1:
        return list(zip(titles, drawn[0].split(per_class)))
    guided = [f", g = {how['guidance']:g}" * (model.stage == "teacher") for how in ways]
    return [(f"K = {how['ar_steps']}{g}", pictures) for how, g, pictures in zip(ways, guided, drawn)]


# ----------------------------------------------------------------------------------------------------------------------
# The animation, a frame an AR step; and editing: since any order will do, what is known may be any part of a picture


def in_pixels(config, tokens):
    """(B, L) bool, one a token -> (B, 1, H, W), one a pixel."""
    side = math.isqrt(config.seq_len)
    return F.interpolate(tokens.view(-1, 1, side, side).float(), config.img_size).bool()


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


def save_gif(model, classes, titles, per_class, path, **how):
    """The unmasking of per_class pictures of each class -> an animated GIF file."""
    labels = torch.tensor(classes, device=next(model.parameters()).device).repeat_interleave(per_class)
    frames = [grid_image(list(zip(titles, pictures.split(per_class)))).quantize(256)  # a third of the memory
              for pictures in tqdm(unmasking(model, labels, **how), total=how["ar_steps"] + 1)]
    # about three seconds in all, up to K = 150, and two more to look at the result
    durations = [max(20, 3000 // len(frames))] * (len(frames) - 1) + [2000]
    with replacing(path, "wb") as file:
        frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)


def open_edit(model, path, box, vae=None):
    """What --edit and --box say -> (given and redraw for MAR.generate, uint8 (2, 3, H, W): the picture, what stays)."""
    left, top, right, bottom = box
    size, side = model.config.img_size, math.isqrt(model.config.seq_len)  # px; tokens
    if not (0 <= left < right <= size and 0 <= top < bottom <= size):
        raise UserError(f"--box: wanted are left < right and top < bottom, in 0..{size} px of the cropped picture")
    cell, redraw = size // side, torch.zeros(side, side, dtype=torch.bool)
    redraw[top // cell:-(-bottom // cell), left // cell:-(-right // cell)] = True  # every token that the box touches
    redraw = redraw.flatten()  # (L,)
    # upright as every viewer shows it, for so the box was measured; then cropped as training pictures are
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
    What a round brings is appended: whatever N is, memory holds one round."""
    shape = (len(labels), side, side, 3)
    if shutil.disk_usage(Path(path).parent).free < math.prod(shape):
        raise UserError(f"{path} will have {math.prod(shape) / 1e9:.1f} GB, more than is free there: other --out")
    with replacing(path, "wb") as part, zipfile.ZipFile(part, "w") as archive:  # not compressed: noise does not shrink
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for pictures in rounds:
                file.write(pictures.permute(0, 2, 3, 1).contiguous().numpy().data)  # (n, H, W, 3)
        for name, array in ("labels", labels), ("class_names", class_names):
            if array is not None:
                with archive.open(f"{name}.npy", "w") as file:
                    np.lib.format.write_array(file, np.asarray(array))


def open_folder(folder, drawn_by):
    """A folder for PNGs: new, empty, or one that a call which drew alike (`drawn_by`, JSON) has begun."""
    record = Path(folder) / ".drawn_by.json"  # hidden: who reads the folder's pictures passes it over
    os.makedirs(folder, exist_ok=True)
    with reading(record, "note of how a folder's pictures are drawn", ": choose another --out"):
        if os.listdir(folder) and (not record.exists() or json.loads(record.read_text()) != drawn_by):
            raise UserError(f"{folder} holds something else than pictures of this checkpoint, drawn in this way: --num "
                            "writes an .npz, or into a new or empty folder, or goes on with what it began")
    for left in record.parent.glob("*.writing"):  # model.replacing's names, after a kill
        left.unlink()
    write_json(record, drawn_by)


def save_samples(model, labels, path, rank, world, batch, **how):
    """Pictures of `labels` (N,) numpy, drawn by all ranks, to an .npz; or to a folder as <index>_<label>.png, where
    batches that are there already are not drawn again."""
    together, names = world * batch, [f"{i:06d}_{label}.png" for i, label in enumerate(labels)]
    to_folder = not Path(path).suffix
    there = [set(os.listdir(path)) if to_folder and rank == 0 else set()]
    if world > 1:
        dist.broadcast_object_list(there)  # rank 0 says: it is already writing when another one looks
    if beyond := sum(name.endswith(".png") for name in there[0].difference(names)):
        say(f"note: {path} holds {beyond} pictures of an earlier, larger --num too: who judges the folder judges them")
    starts = [i for i in range(0, len(labels), together) if not there[0].issuperset(names[i:i + together])]
    rounds = (draw_together(model, labels[i:i + together], rank, world, i, batch=batch, **how)
              for i in tqdm(starts, unit="round", disable=rank > 0 or None))
    if rank > 0:
        for _ in rounds:  # take part in drawing and sending, write nothing
            pass
    elif to_folder:
        for i, pictures in zip(starts, rounds):
            for name, picture in zip(names[i:], pictures):
                with replacing(Path(path) / name, "wb") as file:
                    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(file, "PNG")
    else:
        save_npz(rounds, labels, model.class_names, model.config.img_size, path)


def export(model, path):
    """Write a network as LTH14/mar does, whose loader wants "model" and "model_ema" under its names of weights. The
    config, and what else a file of ours says, come along: so load_mar still knows a student from a teacher."""
    state = {name.replace("head_net.", "diffloss.net."): value for name, value in model.state_dict().items()}
    ours = {"config": asdict(model.config), "stage": model.stage, "args": model.made, "class_names": model.class_names}
    save_checkpoint({**ours, "model": state, "model_ema": state}, path)
    say(f"{path}: {model.config}")
    if model.stage != "teacher":
        print(f"LTH14/mar draws a student only with README's patch of DiffLoss.sample, t = {model.config.t_init} in it")
    elif model.config.pixels:
        print("LTH14/mar cannot draw a teacher of pixels: it clamps none of them")


# ----------------------------------------------------------------------------------------------------------------------
# The command


def drawing_flags(flag):
    """How pictures are drawn: fid.py has the same flags. flag: a parser's add_argument."""
    flag("--ar_steps", type=int, nargs="+", metavar="K", help="up to the number of tokens; of several each")
    flag("--guidance", type=float, nargs="+", metavar="G", help="of teachers, 1 = none; MAR-B, L, H: 2.9, 3.0, 3.2")
    flag("--guidance_schedule", choices=["linear", "constant"], help="linear grows it AR step by AR step")
    flag("--head_steps", type=int, help="denoising steps of teachers: 100 are MAR's, fewer are faster")
    flag("--temperature", type=float, default=1.0, help="scale of the noise; MAR: 0.95 unguided")
    flag("--order", choices=ORDERS, default="random", help="of the tokens; random is what MAR is trained for")
    flag("--seed", type=int, default=0, help="picture i is that of (seed, i)")
    flag("--vae", help="kl16.ckpt, for models of latents")
    flag("--batch", type=int, default=64, help="pictures at once, a process; fewer if memory is short")
    flag("--device", default="auto", help="auto, cpu, cuda or mps")
    flag("--dtype", default="auto", choices=DTYPES, help="of matrix products; auto: bfloat16 if it is fast")


def parse_args(argv=None):
    """The flags -> (args, job)."""
    p = Parser("A checkpoint -> pictures, an animation, an .npz.")
    # the job: one of these, else a grid of pictures
    jobs = p.add_mutually_exclusive_group()
    jobs.add_argument("--gif", metavar="FILE", help="write the unmasking, a frame an AR step, to this .gif")
    jobs.add_argument("--num", type=int, help="draw this many pictures, all classes alike often, to --out")
    jobs.add_argument("--edit", metavar="PICTURE", help="draw the part --box of this picture anew, for each class")
    jobs.add_argument("--export", metavar="FILE", help="write the network as LTH14/mar reads it, a .pth")
    # of what
    p.add_argument("--ckpt", required=True, help="teacher.pt or student.pt of a run, or a public MAR's .pth")
    p.add_argument("--classes", nargs="+", help="names, or numbers where none is called so; a grid of many shows 4")
    p.add_argument("--per_class", type=int, help="pictures of each class in a grid; by itself 4, in rows of several 1")
    p.add_argument("--box", type=int, nargs=4, help="for --edit: left top right bottom, px of the cropped picture")
    p.add_argument("--out", help="a .png; with --num an .npz, or a folder for PNGs, which can go on")
    # how; what is not given is as the checkpoint was made for
    drawing_flags(p.add_argument)
    args = p.parse_args(argv)
    check_numbers(args, one="num per_class ar_steps head_steps batch")
    job = next((job for job in ("gif", "num", "edit", "export") if getattr(args, job)), "grid")
    if bool(args.edit) != bool(args.box):
        raise UserError("--edit PICTURE and --box LEFT TOP RIGHT BOTTOM belong together: give both")
    return args, job


def ways_to_draw(args, model):
    """Keyword arguments of `draw`, for each of --ar_steps and --guidance. What no flag says is as the checkpoint was
    made for, or as the public ones; a student has head steps and guidance of its own."""
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
    """Words -> class numbers. A name goes first: folders 0..11 are sorted as text, so that called 2 is number 4."""
    classes, numbers = [], range(len(names))
    for word in words:
        meant = [i for i in numbers if names[i] == word] or [i for i in numbers if str(i) == word]
        if len(meant) != 1:
            called = " and ".join(map(str, meant)) or "none"
            raise UserError(f"--classes {word}: {called} are called so; give a number, 0..{len(names) - 1}, or a name: "
                            + ", ".join(names[:10]))
        classes += meant
    return classes


def check_output(path, *suffixes):
    """Refuse a file that could not be written, before hours are spent on it. What a killed call has left of it goes."""
    path = Path(path)
    if path.suffix.lower() not in suffixes or path.is_dir():
        raise UserError(f"cannot write {path}: wanted is a file whose name ends in {' or '.join(suffixes)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=path.parent).close()  # an OSError says why not
    for left in path.parent.glob(f"{glob.escape(path.name)}.*.writing"):  # model.replacing's names
        left.unlink()


def main(argv=None):
    """Draw, animate, edit or export, as the flags say; whatever can be refused is refused before a file is made."""
    args, job = parse_args(argv)
    device, rank, world = setup(args.device, args.dtype)
    if world > 1 and job != "num":
        raise UserError("only --num is divided among processes: start one for a grid, a gif, an edit or an export")
    model = load_mar(args.ckpt)
    if job == "export":
        check_output(args.export, ".pth", ".pt")
        return export(model, args.export)
    if model.stage != "teacher" and (args.head_steps not in (None, 1) or args.guidance not in (None, [1])):
        raise UserError(f"{args.ckpt} is a student, of one head step and with guidance built in: leave --head_steps "
                        "and --guidance out")
    ways = ways_to_draw(args, model)
    if len(ways) > 1 and job in ("gif", "num"):
        raise UserError(f"several --ar_steps or --guidance make a grid; --{job} takes one")
    model.to(device)
    bf16_weights(model)
    vae = load_vae(args.vae).to(device) if args.vae else None
    check_vae(model, vae)

    # public files have no names, students those of ImageNet's folders; words tell a reader more
    count, own = model.config.num_classes, model.class_names
    names = read_class_names(of_data=own) if count == 1000 else own or [f"class {i}" for i in range(count)]
    # what is to be judged must be of all classes, but nobody looks at 1,000 rows
    some = range(0, count, 1 if job == "num" or count <= 16 else -(-count // 4))
    classes = find_classes(args.classes, names) if args.classes else list(some)
    titles, rows = [title_of(names[label], f"class {label}") for label in classes], []
    if job == "edit":
        part, stays = open_edit(model, args.edit, args.box, vae)
        rows, tokens = [("picture", stays)], int(part["redraw"].sum())  # every AR step must reveal one
        ways = [{**how, **part, "ar_steps": min(how["ar_steps"], tokens)} for how in ways]
    out = args.gif or args.out or ("samples.npz" if job == "num" else "grid.png")
    if rank == 0 and job == "num" and not Path(out).suffix:
        open_folder(out, {"ckpt_sha256": file_hash(args.ckpt), "classes": classes, **ways[0]})
    elif rank == 0:
        check_output(out, {"gif": ".gif", "num": ".npz"}.get(job, ".png"))
    if job == "num":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C does: what is half-written goes
        # classes take turns, so every stretch of the file is balanced: the inception score is computed on tenths of it
        labels = np.resize(classes, args.num)
        save_samples(model, labels, out, rank, world, args.batch, vae=vae, **ways[0])
    elif job == "gif":
        save_gif(model, classes, titles, args.per_class or 4, out, vae=vae, **ways[0])
    else:
        save_grid(rows + draw_grid(model, classes, titles, ways, args.per_class, vae=vae, batch=args.batch), out)
    for how in ways:
        say(f"{out}: K = {how['ar_steps']}, head steps {how['head_steps']}, guidance {how['guidance']}, "
            f"seed {args.seed}")


if __name__ == "__main__":
    run_main(main)
