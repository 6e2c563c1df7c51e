"""Pictures and latents: where every training batch, reference image and decoded sample comes from.

Three kinds of data, one class (`Data`):
  shapes     8 classes of coloured shapes, drawn on the fly; nothing to download
  cifar10    the official binary archive             python data.py --get cifar10
  PATH       any image folder, PATH/train/<class>/*  (and PATH/test, PATH/val or PATH/validation for the other split)
Images below 64 px are used as pixels (--pixels: larger ones too). Larger ones become KL-16 latents, computed once:
    python data.py --get kl16
    python data.py --data PATH --vae pretrained_models/vae/kl16.ckpt                              # one process
    torchrun --nproc_per_node=8 data.py --data PATH --vae pretrained_models/vae/kl16.ckpt         # all GPUs
    python data.py --data NPZ_FOLDER                         # or taken over from MAR's main_cache.py: <class>/*.npz
Killed at any moment, the same command goes on where it stopped. Nothing is downloaded unless --get names it.
"""
import argparse
import contextlib
import fcntl
import functools
import hashlib
import http.client
import json
import os
import re
import shlex
import shutil
import socket
import sys
import tarfile
import time
import urllib.error
import urllib.request
from collections import Counter, namedtuple
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import numpy as np
import PIL
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from torch.distributed.rendezvous import rendezvous
from tqdm import tqdm

from model import UserError, fill_model, read_checkpoint, replacing, write_json

LATENT_SCALE = 0.2325  # the public MAR trains on VAE samples times this (LTH14/mar main_mar.py)

# ----------------------------------------------------------------------------------------------------------------------
# Shapes, drawn on the fly

# Eight outlines that an eye tells apart at 16 px. Colour and ground say nothing about the class, so that a model must
# get the outline right; few colours, all saturated, so that a wrong mixture of two is seen at once.
SHAPES = ["disc", "ring", "square", "triangle", "plus", "cross", "bars", "diamond"]
COLOURS = torch.tensor([[235, 60, 50], [70, 200, 80], [70, 120, 250], [250, 210, 60]], dtype=torch.float32)
GROUNDS = torch.tensor([[18, 18, 24], [70, 30, 80]], dtype=torch.float32)
SUB = 4  # sub-samples a pixel side: 16 grey levels along an edge are enough at 16 px


def index_uniform(index, stream):
    """Numbers in [0, 1), float64, that depend on (index, stream) alone: splitmix64 (Steele et al. 2014), vectorised."""
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is the point
        z = np.asarray(index).astype(np.uint64) * np.uint64(16) + np.uint64(stream + 1)
        z = z * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53


def inside(kind, x, y):
    """Which points of the plane a shape covers. x (N, 1, W), y (N, H, 1), in about [-1, 1] -> bool (N, H, W)."""
    ax, ay = x.abs(), y.abs()
    if kind == "disc":
        return x * x + y * y < 1
    if kind == "ring":
        square = x * x + y * y
        return (square < 1.1) & (square > 0.3)
    if kind == "square":
        return (ax < 0.85) & (ay < 0.85)
    if kind == "triangle":
        return (ax < (y + 1) * 0.6) & (y < 0.8)
    if kind == "plus":
        return ((ax < 0.32) & (ay < 1)) | ((ay < 0.32) & (ax < 1))
    if kind == "cross":
        return ((ax - ay).abs() < 0.42) & (ax < 0.95) & (ay < 0.95)
    if kind == "bars":
        return (ax < 1) & ((ay - 0.6).abs() < 0.3)
    return ax + ay < 1.15  # diamond


def draw_shapes(index, img_size=16):
    """Images number `index` (N,) of the endless shapes data, of class index % 8. -> uint8 (N, 3, img_size, img_size).

    The picture depends on its index alone, not on the batch. Every class is symmetric under a mirror, so random
    flips in training leave the distribution as it is.
    """
    index = np.asarray(index)
    draw = lambda stream, low, high: torch.from_numpy(low + (high - low) * index_uniform(index, stream))
    cx, cy, radius = draw(0, -0.2, 0.2).float(), draw(1, -0.2, 0.2).float(), draw(2, 0.56, 0.72).float()
    colour = COLOURS[draw(3, 0, len(COLOURS)).long()][:, :, None, None]  # (N, 3, 1, 1)
    ground = GROUNDS[draw(4, 0, len(GROUNDS)).long()][:, :, None, None]
    grid = (torch.arange(img_size * SUB) + 0.5) * (2 / (img_size * SUB)) - 1
    # in the shape's own coordinates; the largest radius at the farthest place still leaves a rim of ground
    x = ((grid - cx[:, None]) / radius[:, None])[:, None, :]  # (N, 1, S*SUB)
    y = ((grid - cy[:, None]) / radius[:, None])[:, :, None]  # (N, S*SUB, 1)
    cover = torch.empty(len(index), 1, img_size, img_size)
    for label, kind in enumerate(SHAPES):
        rows = torch.from_numpy(np.flatnonzero(index % len(SHAPES) == label))
        if len(rows):
            fine = inside(kind, x[rows], y[rows]).float()[:, None]
            cover[rows] = F.avg_pool2d(fine, SUB)  # (n, 1, S, S)
    return (ground + cover * (colour - ground)).round().byte()  # (N, 3, S, S)


# ----------------------------------------------------------------------------------------------------------------------
# Image folders

PIXEL_LIMIT = 64  # px: below it tokens are pixels, from it on latents
SPLITS = {"train": ["train"], "test": ["test", "val", "validation"]}  # names of the folder, the first that is there

# What Pillow decodes. Of these formats it only knows the header, or it starts another program (Ghostscript for EPS).
# MPO, a camera's pair of pictures, is read as the JPEG that it begins with.
Image.init()
NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
SUFFIXES = {suffix for suffix, kind in Image.registered_extensions().items()
            if kind in {*Image.OPEN, "MPO"} - NOT_DECODED}


def say(text):
    """Print a line on rank 0; a name that is not UTF-8 is no obstacle."""
    if rank_and_world()[0] == 0:
        print(text.encode("utf-8", "backslashreplace").decode(), flush=True)


def split_folder(path, split):
    for name in SPLITS[split]:
        if (Path(path) / name).is_dir():
            return Path(path) / name
    raise UserError(f"{path}: no folder {' or '.join(map(repr, SPLITS[split]))} in it; images belong in "
                    f"{path}/{SPLITS[split][0]}/<class>/*.jpg (of MAR's latents, <class>/*.npz, "
                    f"{command('--data', path)} makes a cache)")


def entries(folder, suffixes, passed):
    """One level of a folder -> (its folders, its files with a known suffix), in the order of names; links are followed.
    `passed` counts what is passed over, by reason."""
    folders, files = [], []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        suffix = os.path.splitext(entry.name)[1].lower()
        if entry.name.startswith("."):  # .DS_Store; beside x.jpg macOS keeps a ._x.jpg that is no picture
            passed["hidden"] += 1
        elif entry.is_symlink() and not os.path.exists(entry.path):
            passed["links to nothing"] += 1
        elif entry.is_dir():
            folders.append(entry.path)
        elif entry.is_file() and suffix in suffixes:
            files.append(entry.path)
        else:
            passed[suffix or "without a suffix"] += 1
    return folders, files


def walk(folder, suffixes, passed, above=()):
    """The files with a known suffix in `folder` and below. above: real paths of the folders it lies in."""
    real = os.path.realpath(folder)
    if real in above:
        passed["links back up"] += 1
        return
    folders, files = entries(folder, suffixes, passed)
    yield from files
    for inner in folders:
        yield from walk(inner, suffixes, passed, (*above, real))


def find_images(folder, suffixes=SUFFIXES):
    """-> (class names, files, labels int64 (N,)): the one reader of image folders, for training and for judging.

    The class is the first folder below `folder`, however deep a picture lies in it (torchvision's rule). Pictures in no
    folder are of the class "", unless some lie in one. Sorted by class, then by name: the same on every machine and
    rank, and for ImageNet's wnids the usual label order. One line says what was passed over.
    """
    passed, above = Counter(), (os.path.realpath(folder),)
    folders, loose = entries(folder, suffixes, passed)
    found = {os.path.basename(inner): list(walk(inner, suffixes, passed, above)) for inner in folders}
    if not any(found.values()):
        found = {"": loose}
    elif loose:
        passed["in no class folder"] = len(loose)
    if passed:
        reasons = [f"{count:,} {reason}" for reason, count in passed.most_common()]
        say(f"passed over in {folder}: {', '.join(reasons[:9])}{', ...' if len(reasons) > 9 else ''}")
    if found == {"": []}:
        raise UserError(f"{folder}: no images in it; they belong in {folder}/<class>/*.jpg")
    for name, files in found.items():
        if not files:  # a class that is never trained would yet be drawn, and judged
            raise UserError(f"{folder}/{name}: no images in it, and each folder there is a class: remove it")
    labels = np.repeat(np.arange(len(found)), [len(files) for files in found.values()])
    return list(found), [file for files in found.values() for file in files], labels


def list_images(path, split):
    return find_images(split_folder(path, split))


def own_size(path, split, pixels=False):
    """px at which a folder is used unless told otherwise: its first image's if below 64 or if they are to be used as
    `pixels`, else 256, the public MAR's."""
    folder = split_folder(path, split)
    # class by class: to list all of ImageNet takes long
    for inner in entries(folder, SUFFIXES, Counter())[0] or [folder]:
        for file in walk(inner, SUFFIXES, Counter()):
            with contextlib.suppress(UserError), decoding(file), Image.open(file) as image:
                return min(image.size) if pixels or min(image.size) < PIXEL_LIMIT else 256  # a broken one is passed by
    raise UserError(f"{folder}: no images in it; they belong in {folder}/<class>/*.jpg")


def is_small(path):
    """Whether a folder's images are trained on as pixels: then CIFAR-10's defaults suit it, else ImageNet's."""
    try:
        built = read_meta(Path(path) / "train")  # a cache by its own path
        return built["kind"] == "images" if built else own_size(path, "train") < PIXEL_LIMIT
    except UserError:  # open_data says what is wrong with the folder
        return False


@contextlib.contextmanager
def decoding(path):
    """The many errors of a bad file become one that names it. An error of the disk stays what it is: a file that cannot
    be reached now is not broken."""
    try:
        yield
    except Exception as error:  # Pillow and numpy raise a dozen kinds
        if isinstance(error, MemoryError) or getattr(error, "errno", None):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: broken image ({reason})") from None


def to_rgb(image):
    """Any Pillow image -> 8-bit RGB. Transparency is laid over white: what hides under alpha 0 is often garbage."""
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion would clip at 255
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    if "A" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def adm_crop(image, size):
    """Centre crop to size x size exactly as ADM and MAR do it (openai/guided-diffusion image_datasets.py)."""
    if image.size == (size, size):
        return image  # the steps below would not change it, but cost time on data like CIFAR
    while min(image.size) >= 2 * size:  # halving by BOX first keeps the bicubic step from aliasing
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def read_image(path, size, upright=False):
    """-> uint8 (3, size, size). UserError naming the file when it cannot be decoded.

    As it is stored, as ADM and MAR train: what a camera notes of its being turned (EXIF) is not heeded. upright: turned
    as a viewer shows it, for a picture that someone gives to edit.
    """
    with decoding(path), Image.open(path) as image:
        image = ImageOps.exif_transpose(image) if upright else image
        return np.array(adm_crop(to_rgb(image), size)).transpose(2, 0, 1)  # (3, size, size)


def read_moments(path, side=None):
    """What MAR's main_cache.py wrote of an image and of its mirror image -> float16 (2, 32, side, side)."""
    with decoding(path), np.load(path) as arrays:
        moments = np.stack([arrays["moments"], arrays["moments_flip"]]).astype(np.float16)
        side = side or moments.shape[-1]
        if moments.shape != (2, 32, side, side) or not np.isfinite(moments).all():
            raise ValueError(f"moments of {moments.shape}, wanted are (2, 32, {side}, {side}), all of them finite")
        return moments


# ----------------------------------------------------------------------------------------------------------------------
# The cache: what was read once

# A folder with images.npy  uint8 (N, 3, H, W) or moments.npy float16 (N, 2, 32, h, w), a row a picture
#               keys.npy    uint64 (N,), whose row it is; 0 if that picture has changed or is gone
#               labels.npy  int64 (N,), its class once the row is written
#               cache.json  settings and class names
# A row is never given to another picture, new ones are put behind: who has the cache open reads on undisturbed.

UNDONE, BROKEN = -2, -1  # in labels.npy: not written yet; a broken image that was skipped, or one that is gone
Listing = namedtuple("Listing", "source class_names files labels keys")  # the pictures of a folder, as they are now


def make_listing(folder, suffixes=SUFFIXES):
    """find_images for training, so there must be classes. keys: hashes of all that a picture's row depends on: its name
    below `folder`, its size, the time of its last change. For 100,000 pictures that takes 2 s (local disk,
    one slow core), so half a minute for ImageNet; on a network disk minutes. A cache by its own path does without."""
    class_names, files, labels = find_images(folder, suffixes)
    if class_names == [""]:
        raise UserError(f"{folder}: its images lie in no class folder; they belong in {folder}/<class>/*.jpg")
    keys, start = np.empty(len(files), np.uint64), len(os.fsencode(folder)) + 1
    for i, file in enumerate(files):
        stat = os.stat(file)
        content = b"%s %d %d" % (os.fsencode(file)[start:], stat.st_size, stat.st_mtime_ns)  # a name may be no UTF-8
        keys[i] = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little") or 1
    return Listing(os.path.realpath(folder), class_names, files, labels, keys)


def find_rows(held, listing):
    """Rows (N,) of the listing's pictures. held: what keys.npy says. -1: none."""
    row = {key: i for i, key in enumerate(held.tolist())}
    return np.array([row.get(key, -1) for key in listing.keys.tolist()], np.int64)


def default_cache(path, img_size, pixels, root="out/cache"):
    """Where the builder puts a folder's cache and open_data looks for it, so that --data PATH is all one has to say."""
    return Path(root) / f"{Path(path).resolve().name}-{img_size}{'' if pixels else '-latents'}"


def command(*words):
    """A line to paste into a shell."""
    return f"python data.py {shlex.join(map(str, words))}"


def read_meta(folder):
    """What cache.json says; {} where none is."""
    try:
        return json.loads((folder / "cache.json").read_text())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except ValueError as error:
        raise UserError(f"{folder}/cache.json is damaged ({error}); delete {folder} and build it again") from None


def check_settings(folder, found, wanted):
    for key, value in wanted.items():
        if found.get(key) != value:
            raise UserError(f"{folder}: this cache was made by other settings ({key} {found.get(key)}, wanted {value});"
                            " delete it, or rename the folder of one of the two")


def open_array(path, mmap_mode=None, count=0):
    """np.load of a part of a cache, of at least `count` rows; UserError where it is damaged."""
    try:
        array = np.load(path, mmap_mode)
        if len(array) < count:
            raise ValueError(f"{count - len(array)} rows are gone")
        return array
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: the cache is damaged, or an old one ({error}); delete {path.parent} and build it "
                        f"again (--data {path.parent.parent} uses an old one as it is)") from None


def lengthen(path, count, row):
    """An .npy file of `count` rows, made, or made longer: what it holds stays. Sparse: only written rows take space."""
    with open(path, "ab") as file:
        file.truncate(128 + count * row.itemsize)  # numpy's header takes 128 bytes, with room for a larger count
    with open(path, "r+b") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": row.base.str, "fortran_order": False,
                                                    "shape": (count, *row.shape)})


def write_rows(path, rows, values):
    """Rows of an .npy file, on the disk on return. Through a memory map a full disk would kill us (SIGBUS)."""
    start = open_array(path, "r").offset
    with open(path, "r+b") as file:
        for row, value in zip(rows.tolist(), values):
            file.seek(start + row * value.nbytes)
            file.write(value.tobytes())
        file.flush()
        os.fsync(file.fileno())


def prepare_cache(out, settings, listing):
    """Give every picture of `listing` a row of the cache in folder `out`, whatever a stopped or an earlier run left
    there. UserError when the disk is too full."""
    meta, data, size = read_meta(out), out / f"{settings['kind']}.npy", settings["img_size"]
    shape = (2, 32, size // 16, size // 16)  # of a row: [0] of the image, [1] of its mirror image
    row = np.dtype((np.uint8, (3, size, size)) if settings["kind"] == "images" else (np.float16, shape))
    held, marks = np.empty(0, np.uint64), np.empty(0, np.int64)
    if meta:
        check_settings(out, meta, settings)
        held, marks = open_array(out / "keys.npy"), open_array(out / "labels.npy")
        open_array(data, "r", len(held))
    rows = find_rows(held, listing)
    new = rows < 0
    rows[new] = len(held) + np.arange(new.sum())
    count = len(held) + int(new.sum())
    state = np.append(marks, np.full(count, UNDONE))[rows]  # marks are written after keys, so may be fewer
    new_held, new_marks = np.zeros(count, np.uint64), np.full(count, BROKEN)
    new_held[rows] = listing.keys
    new_marks[rows] = np.where(state < 0, state, listing.labels)  # a class that is added shifts the labels
    changed = not (np.array_equal(held, new_held) and np.array_equal(marks, new_marks)
                   and meta["class_names"] == listing.class_names)
    if meta and changed:  # else another folder of the same name would take our pictures for gone
        check_settings(out, meta, {"source": listing.source})
    out.mkdir(parents=True, exist_ok=True)
    if undone := int((state == UNDONE).sum()):
        # a new array is sparse, so what it takes on the disk is what is written already
        on_disk, free = data.stat().st_blocks * 512 if data.exists() else 0, shutil.disk_usage(out).free
        need, gone = count * row.itemsize - on_disk, count - len(rows)
        say(f"{out}: {undone:,} of {len(rows):,} pictures are to be read, {count * row.itemsize / 1e9:.2f} GB in all, "
            f"{free / 1e9:.1f} GB free{f'; {gone:,} rows are of pictures that changed or went' if gone else ''}")
        if need > free:
            raise UserError(f"{out}: the disk has {free / 1e9:.2f} GB free, {need / 1e9:.2f} are needed; make room or "
                            "use another folder (--out)")
    if changed:  # in this order: whenever we are killed, nothing passes for written that is not
        if meta:
            write_json(out / "cache.json", {**meta, "class_names": None})  # for a moment the labels mean nothing
        lengthen(data, count, row)
        for name, array in (("keys.npy", new_held), ("labels.npy", new_marks)):
            with replacing(out / name, "wb") as file:
                np.save(file, array)
        write_json(out / "cache.json", {**settings, "source": listing.source, "class_names": listing.class_names})


def read_files(pool, read, files, skip_broken, advice):
    """Read files in the pool's threads (Pillow lets go of Python's lock). -> list of arrays, None for a broken file."""
    def one(file):
        try:
            return read(file)
        except UserError as error:
            if not skip_broken:
                raise UserError(f"{error}; {advice}") from None
            tqdm.write(f"skipped: {error}", file=sys.stderr)
    return list(pool.map(one, files))


def build_cache(out, settings, listing, read, encode, batch, advice, skip_broken=False, alone=False):
    """Read what the cache in folder `out` lacks of `listing`; every rank its own share, or one rank `alone` all of it.
    What a stopped run did is kept.

    read: file -> array. encode: (n, ...) of those -> (n, ...) rows. advice: what to do about a broken image. A label is
    written after the row's data has reached the disk, so a row that has one is whole, whatever happened since.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() and not alone else (0, 1)
    if rank == 0:
        prepare_cache(out, settings, listing)
    if world > 1:
        dist.barrier()
    rows = find_rows(open_array(out / "keys.npy"), listing)
    if (rows < 0).any():  # what another rank has listed
        raise UserError(f"{out}: its pictures changed in this moment; the same command goes on")
    # neighbours in the file go to one rank: a disk likes that better
    mine = np.array_split(np.arange(len(rows)), world)[rank]
    mine = mine[open_array(out / "labels.npy")[rows[mine]] == UNDONE]
    chunks = [mine[i:i + batch] for i in range(0, len(mine), batch)]
    # `ahead` has the next chunk decoded while this one is encoded: else GPU and CPU would wait for each other
    with (ThreadPoolExecutor(os.cpu_count() // world + 1) as pool, ThreadPoolExecutor(1) as ahead,
          tqdm(total=len(mine), disable=rank > 0 or not len(mine), unit="img", desc=f"rank 0 of {world}") as bar):
        begin = lambda some: ahead.submit(read_files, pool, read, [listing.files[i] for i in some], skip_broken, advice)
        coming = [begin(some) for some in chunks[:1]]
        for i, some in enumerate(chunks):
            start = time.time()
            arrays = coming.pop().result()
            coming = [begin(after) for after in chunks[i + 1:i + 2]]
            good = np.array([array is not None for array in arrays])
            if good.any():
                encoded = encode(np.stack([array for array in arrays if array is not None]))
                write_rows(out / f"{settings['kind']}.npy", rows[some][good], encoded)
            write_rows(out / "labels.npy", rows[some], np.where(good, listing.labels[some], BROKEN))
            if i == 0 and rank == 0:
                minutes = (time.time() - start) / len(some) * len(mine) / 60
                bar.write(f"about {minutes:.1f} minutes; if stopped, the same command goes on from there")
            bar.update(len(some))


def open_cache(folder, name, split, img_size=None, listing=None, advice="the command that began it goes on with it"):
    """A cache -> Data: of `listing`, a folder's pictures as they are now, or None: of those it was built from. advice:
    what to do where some are not in it."""
    meta, marks = read_meta(folder), open_array(folder / "labels.npy")
    check_settings(folder, meta, {"img_size": img_size or meta["img_size"]})
    array = np.asarray(open_array(folder / f"{meta['kind']}.npy", "r", len(marks)))  # plain arrays are indexed faster
    class_names, rows = meta["class_names"], np.arange(len(marks))
    if listing:
        class_names, rows = listing.class_names, find_rows(open_array(folder / "keys.npy"), listing)
        state = np.where(rows < 0, UNDONE, marks[np.minimum(rows, len(marks) - 1)])
        marks = np.where(state < 0, state, listing.labels)
    undone = int((marks == UNDONE).sum())
    if undone or class_names is None:
        raise UserError(f"{folder}: {undone:,} of {len(marks):,} pictures are not in this cache (new, changed or not "
                        f"read yet), it is not finished: {advice}")
    rows, labels = rows[marks >= 0], marks[marks >= 0]  # to a user of Data broken images do not exist
    if not len(rows):
        raise UserError(f"{folder}: not one of its images could be decoded; delete it")
    read = lambda indices, *flips: torch.from_numpy(array[(rows[indices], *flips)])  # a copy of these rows alone
    return Data(name, split, class_names, meta["img_size"], labels, read, meta["kind"] == "images")


# ----------------------------------------------------------------------------------------------------------------------
# Data sets and their batches


class Data:
    """One split of one data set. Indices run from 0 to len - 1.

    name, split, class_names (list of str), num_classes, img_size (px), labels (int64 (N,)), pixels (bool; else
    latents), latent_channels (3 for pixels). read(indices) -> uint8 (B, 3, H, W), read(indices, flips) -> moments.
    """

    def __init__(self, name, split, class_names, img_size, labels, read, pixels=True):
        self.name, self.split, self.class_names, self.num_classes = name, split, class_names, len(class_names)
        self.img_size, self.labels, self.read, self.pixels = img_size, labels, read, pixels
        self.latent_channels = 3 if pixels else 16

    def __len__(self):
        return len(self.labels)

    def images(self, indices):
        """uint8 (B, 3, H, W), as stored: never flipped."""
        if not self.pixels:
            raise UserError(f"{self.name}: this data holds latents, not images")
        return self.read(np.asarray(indices))

    def batch(self, indices, flip, generator=None):
        """indices (B,), flip (B,) bool -> x (B, C, h, w) float32 on the CPU, labels (B,) int64.

        Pixels are in [-1, 1]. Latents are a fresh sample of the VAE's posterior, drawn with `generator`, times 0.2325.
        """
        indices, flip = np.asarray(indices), np.asarray(flip)
        labels = torch.from_numpy(self.labels[indices])
        if self.pixels:
            x = self.read(indices)
            x = torch.where(torch.from_numpy(flip)[:, None, None, None], x.flip(-1), x)  # as bytes: a quarter the work
            return x.float().mul_(2 / 255).sub_(1), labels
        mean, logvar = self.read(indices, flip.astype(np.int64)).float().chunk(2, dim=1)  # 2 x (B, 16, h, w)
        std = logvar.clamp(-30, 20).mul_(0.5).exp_()  # the clamp is the public VAE's
        # fresh noise at every visit, as MAR trains: 40 % of this method's time, and still 9 ms for 256 latents
        noise = torch.randn(mean.shape, generator=generator)
        return torch.addcmul(mean, std, noise).mul_(LATENT_SCALE), labels


def open_data(name, split="train", img_size=None, cache="out/cache", skip_broken=False, alone=False, pixels=False):
    """-> Data. name: "shapes", "cifar10", the path of an image folder, or the path of a built cache.

    split: "train" or "test". img_size: px, None for the data's own (16 for shapes, own_size for a folder). Images below
    64 px, or of any size with `pixels`, are read once, into `cache`; for others their latents must have been computed
    before. Pictures that were added, changed or taken away since are noticed, but not by a cache's own path: that is
    used as it is. Under torchrun all ranks must call it, since they share the work; or one of them, with `alone`.
    """
    name = str(name)
    if split not in SPLITS:
        raise UserError(f"split {split}: train or test")
    if name == "shapes":
        first, count = (0, 50_000) if split == "train" else (2**32, 10_000)
        read = lambda indices: draw_shapes(first + indices, img_size or 16)
        return Data(name, split, SHAPES, img_size or 16, (first + np.arange(count)) % len(SHAPES), read)
    if name == "cifar10":
        return open_cifar10(split, img_size)
    path = Path(name)
    if not path.is_dir():
        raise UserError(f"{name}: no such folder; --data takes shapes, cifar10 or a folder with train/<class>/*.jpg")
    if (path / split / "cache.json").exists():
        return open_cache(path / split, name, split, img_size)
    img_size = img_size or own_size(path, split, pixels)
    pixels = pixels or img_size < PIXEL_LIMIT
    folder = default_cache(path, img_size, pixels, cache) / split
    build = ["--data", name, "--split", split, "--img_size", img_size]
    build += ["--pixels"] if pixels else ["--vae", PUBLIC["kl16"][1]]
    if not pixels and not read_meta(folder):
        raise UserError(f"{name}: images of {img_size} px need their latents computed once, by: {command(*build)}; "
                        "or use them as pixels (--pixels)")
    listing = make_listing(split_folder(path, split))
    if pixels:
        build_cache(folder, {"kind": "images", "img_size": img_size}, listing, lambda file: read_image(file, img_size),
                    lambda images: images, 1024, f"{command(*build, '--skip_broken')} leaves it out, or remove it",
                    skip_broken, alone)
        if dist.is_initialized() and not alone:
            dist.barrier()  # the other ranks' rows
    return open_cache(folder, name, split, None, listing,
                      f"{command(*build)} goes on with it; --data {folder.parent} uses it as it was built")


CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
CIFAR10_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"


def open_cifar10(split, img_size=None, root="data"):
    """The official binary archive: per image 1 label byte, then 3,072 pixel bytes (red, green, blue planes)."""
    folder = Path(root) / "cifar-10-batches-bin"  # under the current folder, where --get cifar10 puts it
    files = [f"data_batch_{i}.bin" for i in range(1, 6)] if split == "train" else ["test_batch.bin"]
    if img_size not in (None, 32):
        raise UserError(f"cifar10 is of 32 px, not {img_size}")
    if not folder.is_dir():
        unpack_cifar10(Path(root))
    parts = []  # 154 MB in all: no need of a cache, the files are one
    for file in files:
        if not (folder / file).is_file() or (folder / file).stat().st_size != 10_000 * 3073:
            raise UserError(f"{folder / file}: missing or not of 30,730,000 bytes; delete {folder} and run "
                            "python data.py --get cifar10")
        parts.append(np.fromfile(folder / file, np.uint8).reshape(10_000, 3073))
    records = np.concatenate(parts)  # (N, 3073)
    images = np.ascontiguousarray(records[:, 1:]).reshape(-1, 3, 32, 32)  # (N, 3, 32, 32)
    return Data("cifar10", split, CIFAR10, 32, records[:, 0].astype(np.int64), lambda i: torch.from_numpy(images[i]))


def unpack_cifar10(root):
    """Unpack the official binary archive in `root`, after its md5 and its members were checked; UserError otherwise."""
    archive = root / "cifar-10-binary.tar.gz"
    if not archive.is_file():
        python = [name for name in ("cifar-10-batches-py", "cifar-10-python.tar.gz") if (root / name).exists()]
        raise UserError(f"no CIFAR-10 in {root}: run python data.py --get cifar10" + (
            f" ({python[0]} is its Python version, a pickle, which can run code: it is not read)" if python else ""))
    if file_hash(archive, "md5") != CIFAR10_MD5:
        raise UserError(f"{archive}: wrong checksum, damaged; delete it and run python data.py --get cifar10")
    part = root / f"cifar-10.{os.getpid()}"  # a folder of one's own, so that ranks can unpack at the same time
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(part, filter="data")  # the filter refuses links and paths that leave the folder
        with contextlib.suppress(OSError):  # another rank was first
            os.rename(part / "cifar-10-batches-bin", root / "cifar-10-batches-bin")
    finally:
        shutil.rmtree(part, ignore_errors=True)


def file_hash(path, kind="sha256"):
    """The hex digest of a file, however large: it is read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, kind).hexdigest()


@functools.lru_cache(maxsize=2)  # a step can touch two epochs
def epoch_order(n, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(n)


def train_indices(n, batch, step, seed, rank=0, world=1):
    """The step-th batch of endless shuffled epochs over n images -> this rank's (indices, flips), each (batch/world,).

    A pure function of its arguments: resuming needs no saved state, and the ranks' parts make up the one-process batch.
    """
    if batch % world:
        raise UserError(f"--batch {batch} cannot be divided among {world} processes")
    share = batch // world
    place = step * batch + rank * share + np.arange(share)  # counted from the first image of the first epoch
    indices = np.empty(share, np.int64)
    for epoch in np.unique(place // n):
        here = place // n == epoch
        indices[here] = epoch_order(n, seed, int(epoch))[place[here] % n]
    flips = np.random.default_rng([seed, step, 1]).random(batch) < 0.5  # of the whole batch, whatever world is
    return indices, flips[rank * share:(rank + 1) * share]


# ----------------------------------------------------------------------------------------------------------------------
# Words for classes

IMAGENET_NAMES = Path(__file__).parent / "assets" / "imagenet_class_names.json"  # 1,000, in label order


def read_class_names(path=None, own=None):
    """Words for classes, in label order: those in the file `path` if given, else a data set's `own` names, else
    ImageNet's (also when its own are ImageNet's folders, n01440764 and so on, which no text encoder knows)."""
    if path is None and own and not re.fullmatch(r"n\d{8}", own[0]):
        return own
    path = path or IMAGENET_NAMES
    try:
        text = Path(path).read_text("utf-8-sig")  # some editors of Windows begin a file by a mark
        names = json.loads(text) if text.lstrip()[:1] in ("[", "{") else text.rstrip().splitlines()
        if isinstance(names, dict):  # {"0": "tench", ...}
            names = [names[str(k)] for k in range(len(names))]
        names = [name if isinstance(name, str) else name[-1] for name in names]  # ["n01440764", "tench"]
        names = [re.sub(r"^n\d{8}\s+", "", name.strip()) for name in names]  # "n01440764 tench"
        if not names or not all(names):  # an empty line would shift all that follow
            raise ValueError(f"name {names.index('') if names else 0} is empty")
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise UserError(f"{path} holds no class names ({error}): wanted are a name a line, a JSON list, or JSON "
                        '{"0": "tench", ...} or {"0": ["n01440764", "tench"], ...}') from None
    if own and len(own) != len(names):
        raise UserError(f"{path} names {len(names)} classes, here are {len(own)} ({own[0]}, ...): give --class_names")
    return names


# ----------------------------------------------------------------------------------------------------------------------
# The KL-16 VAE
# Module names are those of the public file (LTH14/mar models/vae.py), so its weights load without a table of renames.

CHANNELS = (128, 128, 256, 256, 512)  # a level: full size, 1/2, 1/4, 1/8, 1/16


def norm(channels):
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """GroupNorm, SiLU, 3 x 3 convolution, twice, beside a shortcut. (B, c_in, h, w) -> (B, c_out, h, w)."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1, self.conv1 = norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = norm(c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.nin_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class SelfAttention(nn.Module):
    """One head as wide as the feature map is deep; its scale c^-0.5 is scaled_dot_product_attention's own."""

    def __init__(self, c):
        super().__init__()
        self.norm = norm(c)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2).transpose(1, 2) for conv in (self.q, self.k, self.v))  # (B, h*w, c)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)  # (B, c, h, w)
        return x + self.proj_out(h)


def middle(c):
    return nn.ModuleDict({"block_1": ResnetBlock(c, c), "attn_1": SelfAttention(c), "block_2": ResnetBlock(c, c)})


class Encoder(nn.Module):
    """(B, 3, H, W) -> (B, 32, H/16, W/16). Attention at the deepest level only: elsewhere H*W is too many."""

    def __init__(self):
        super().__init__()
        self.conv_in = nn.Conv2d(3, CHANNELS[0], 3, padding=1)
        self.down, c = nn.ModuleList(), CHANNELS[0]
        for level, width in enumerate(CHANNELS):
            last = level == len(CHANNELS) - 1
            stage = nn.ModuleDict({"block": nn.ModuleList([ResnetBlock(c, width), ResnetBlock(width, width)]),
                                   "attn": nn.ModuleList([SelfAttention(width) for _ in range(2 * last)])})
            if not last:
                stage["downsample"] = nn.ModuleDict({"conv": nn.Conv2d(width, width, 3, stride=2)})
            self.down.append(stage)
            c = width
        self.mid, self.norm_out, self.conv_out = middle(c), norm(c), nn.Conv2d(c, 32, 3, padding=1)

    def forward(self, x):
        h = self.conv_in(x)  # (B, 128, H, W)
        for stage in self.down:
            for i, block in enumerate(stage["block"]):
                h = block(h)
                if len(stage["attn"]):
                    h = stage["attn"][i](h)
            if "downsample" in stage:
                h = stage["downsample"]["conv"](F.pad(h, (0, 1, 0, 1)))  # half; padded right and below
        for layer in self.mid.values():
            h = layer(h)
        return self.conv_out(F.silu(self.norm_out(h)))  # (B, 32, H/16, W/16)


class Decoder(nn.Module):
    """(B, 16, h, w) -> (B, 3, 16h, 16w). A block a level more than the encoder, and no attention on the way up."""

    def __init__(self):
        super().__init__()
        c = CHANNELS[-1]
        self.conv_in, self.mid = nn.Conv2d(16, c, 3, padding=1), middle(c)
        self.up = nn.ModuleList()
        for level, width in reversed(list(enumerate(CHANNELS))):
            blocks = nn.ModuleList([ResnetBlock(c if i == 0 else width, width) for i in range(3)])
            stage = nn.ModuleDict({"block": blocks})
            if level:
                stage["upsample"] = nn.ModuleDict({"conv": nn.Conv2d(width, width, 3, padding=1)})
            self.up.insert(0, stage)  # the public list is indexed by level and run from its end
            c = width
        self.norm_out, self.conv_out = norm(c), nn.Conv2d(c, 3, 3, padding=1)

    def forward(self, z):
        h = self.conv_in(z)  # (B, 512, h, w)
        for layer in self.mid.values():
            h = layer(h)
        for stage in reversed(self.up):
            for block in stage["block"]:
                h = block(h)
            if "upsample" in stage:
                h = stage["upsample"]["conv"](F.interpolate(h, scale_factor=2.0, mode="nearest"))
        return self.conv_out(F.silu(self.norm_out(h)))  # (B, 3, 16h, 16w)


class KLVAE(nn.Module):
    """KL-16: a picture of H x W px <-> 16 channels of H/16 x W/16. Always in float32."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = Encoder(), Decoder()
        self.quant_conv, self.post_quant_conv = nn.Conv2d(32, 32, 1), nn.Conv2d(16, 16, 1)

    @torch.no_grad()
    def moments(self, images):
        """(B, 3, H, W) in [-1, 1] -> (B, 32, H/16, W/16): 16 means, then 16 log-variances, not scaled."""
        return self.quant_conv(self.encoder(images))

    def decode(self, latents):
        """(B, 16, h, w), divided by LATENT_SCALE already -> (B, 3, 16h, 16w). Differentiable, for rl.py."""
        return self.decoder(self.post_quant_conv(latents))


def load_vae(path):
    """The public kl16.ckpt -> KLVAE, frozen, on the CPU. UserError when the file is another, or not whole."""
    file = read_checkpoint(path)
    state = file["model"] if isinstance(file.get("model"), dict) else file
    state = {name: value for name, value in state.items() if not name.startswith("loss.")}  # a discriminator, unused
    if "quant_conv.weight" not in state:
        raise UserError(f"{path} is not the KL-16 VAE{' but a MAR' * ('mask_token' in state)}: "
                        "python data.py --get kl16 gets it")
    return fill_model(KLVAE, state, path)


# ----------------------------------------------------------------------------------------------------------------------
# Public files

# Each can be fetched by hand from its url and put into its place; the same command then verifies it.
# name: (url, place, bytes (about, unless there is a checksum), checksum as published). A checksum shorter than its hash
# is a prefix: torch hub puts one into file names. "sha256:" alone: none is published, ours is written beside the file.
HUB, OPENAI = "https://huggingface.co", "https://openaipublic.azureedge.net/clip/models"
DROPBOX = "https://www.dropbox.com/scl/fi"
ADM = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches"
CLIPS = {"clip_b32": ("ViT-B-32.pt", "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"),
         "clip_b16": ("ViT-B-16.pt", "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"),
         "clip": ("ViT-L-14.pt", "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"),
         "clip_l14_336": ("ViT-L-14-336px.pt", "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02")}
PUBLIC = {
    "kl16": (f"{DROPBOX}/hhmuvaiacrarfg28qxhwz/kl16.ckpt?rlkey=l44xipsezc8atcffdp4q7mwmh&dl=0",
             "pretrained_models/vae/kl16.ckpt", 254 << 20, "sha256:"),
    "mar_base": (f"{DROPBOX}/f6dpuyjb7fudzxcyhvrhk/checkpoint-last.pth?rlkey=a6i4bo71vhfo4anp33n9ukujb&dl=0",
                 "pretrained_models/mar/mar_base/checkpoint-last.pth", 1587 << 20, "sha256:"),
    "mar_large": (f"{DROPBOX}/pxacc5b2mrt3ifw4cah6k/checkpoint-last.pth?rlkey=m48ovo6g7ivcbosrbdaz0ehqt&dl=0",
                  "pretrained_models/mar/mar_large/checkpoint-last.pth", 3650 << 20, "sha256:"),
    "mar_huge": (f"{DROPBOX}/1qmfx6fpy3k7j9vcjjs3s/checkpoint-last.pth?rlkey=4lae281yzxb406atp32vzc83o&dl=0",
                 "pretrained_models/mar/mar_huge/checkpoint-last.pth", 7191 << 20, "sha256:"),
    "inception": ("https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
                  "weights-inception-2015-12-05-6726825d.pth",
                  "pretrained_models/fid/weights-inception-2015-12-05-6726825d.pth", None, "sha256:6726825d"),
    "adm_reference": (f"{ADM}/imagenet/256/VIRTUAL_imagenet256_labeled.npz",
                      "pretrained_models/fid/VIRTUAL_imagenet256_labeled.npz", None, "sha256:"),
    **{name: (f"{OPENAI}/{digest}/{file}", f"pretrained_models/clip/{file}", None, f"sha256:{digest}")
       for name, (file, digest) in CLIPS.items()},
    "bpe": ("https://github.com/openai/CLIP/raw/main/clip/bpe_simple_vocab_16e6.txt.gz",
            "pretrained_models/clip/bpe_simple_vocab_16e6.txt.gz", 1_356_917,
            "sha256:924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"),
    "pickscore": (f"{HUB}/yuvalkirstain/PickScore_v1/resolve/main/model.safetensors",
                  "pretrained_models/pickscore/model.safetensors", None, "sha256:"),
    "pickscore_config": (f"{HUB}/yuvalkirstain/PickScore_v1/resolve/main/config.json",
                         "pretrained_models/pickscore/config.json", None, "sha256:"),
    "imagereward": (f"{HUB}/THUDM/ImageReward/resolve/main/ImageReward.pt",
                    "pretrained_models/imagereward/ImageReward.pt", None, "sha256:"),
    "imagereward_vocab": (f"{HUB}/bert-base-uncased/resolve/main/vocab.txt",
                          "pretrained_models/imagereward/vocab.txt", None, "sha256:"),
    "cifar10": ("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", "data/cifar-10-binary.tar.gz",
                170_052_171, f"md5:{CIFAR10_MD5}"),
}


def verify(name, file, note, size, checksum):
    """-> sha256 of a file. UserError when it is not the published one, or, where none is published, the one noted."""
    kind, digest = checksum.split(":")
    if not digest and note.exists():
        digest = note.read_text().split()[0]
    found, bytes_ = file_hash(file, kind), file.stat().st_size
    if not found.startswith(digest) or (size and abs(bytes_ - size) > 0.01 * size):
        raise UserError(f"{name}: {file} is damaged or another file: {bytes_:,} bytes, {kind} {found}; published: "
                        f"{f'{size:,}' if size else '?'} bytes, {kind} {digest or '?'}; delete it and get it again")
    return found if kind == "sha256" else file_hash(file)


def fetch(name, url, part):
    """Download url into the file `part`, going on where an earlier try stopped."""
    start = part.stat().st_size if part.exists() else 0
    # Dropbox sends the file itself, and not a page about it, to this user agent (LTH14/mar util/download.py)
    headers = {"User-Agent": "Wget/1.16 (linux-gnu)", "Range": f"bytes={start}-"}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60) as reply:
            if reply.status != 206:  # the server sends the whole file again
                start = 0
            total = start + int(reply.headers.get("Content-Length") or 0)
            with open(part, "ab" if start else "wb") as file, tqdm(total=total or None, initial=start, unit="B",
                                                                   unit_scale=True, desc=name) as bar:
                while block := reply.read(1 << 20):
                    file.write(block)
                    bar.update(len(block))
    except urllib.error.HTTPError as error:
        if error.code != 416:  # 416: nothing is left to send
            raise UserError(f"{name}: the server answered {error.code} {error.reason} for {url}") from None
        return
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"{name}: download of {url} stopped ({error}); the same command goes on from there") from None
    if part.stat().st_size < total:
        raise UserError(f"{name}: download of {url} stopped at {part.stat().st_size:,} of {total:,} bytes; the same "
                        "command goes on from there")


def get(names, folder="."):
    """Download public files by name into `folder`; what is to happen is printed first. UserError for anything amiss."""
    for name in names:
        if name not in PUBLIC:
            raise UserError(f"--get {name}: unknown; known are {' '.join(PUBLIC)}")
    for name in names:
        url, place, size, checksum = PUBLIC[name]
        path = Path(folder) / place
        part, note = Path(f"{path}.part"), Path(f"{path}.sha256")
        print(f"{name}: {url}\n  -> {path}; {f'{size / 2**20:,.0f} MiB' if size else 'size not published'}; {checksum}"
              f"{f'not published, will be noted in {note}' if checksum.endswith(':') else ''}", flush=True)
        if not path.exists():  # else only verify: it may have been put there by hand
            path.parent.mkdir(parents=True, exist_ok=True)
            fetch(name, url, part)
            try:
                verify(name, part, note, size, checksum)
            except UserError:
                part.unlink()  # going on from damaged bytes would never end well
                raise
            os.replace(part, path)  # only now does the name say that the file is whole
        sha256 = verify(name, path, note, size, checksum)
        if not note.exists():  # else it says the same, and may be read-only
            note.write_text(f"{sha256}  {path.name}\n")
        print(f"  is there, sha256 {sha256}", flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# How a command starts: flags, errors, processes. Here, for data.py is the lowest file that is one.


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line and whose help shows defaults."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                         allow_abbrev=False)

    def error(self, message):
        raise UserError(message)


def check_numbers(args, one="", share=""):
    """Refuse numbers that cannot be meant: negative ones and NaN; of flags named in `one` 0; in `share` 1 and more."""
    for name, value in vars(args).items():
        for number in value if isinstance(value, list) else [value]:
            low, high = int(name in one.split()), 1 if name in share.split() else 2**31
            if isinstance(number, (int, float)) and not low <= number < high:  # false for NaN too
                raise UserError(f"--{name} {number}: must be at least {low} and below {high}")


def run_main(main):
    """main() as a command: what a user can mend becomes one line on stderr and exit code 2."""
    code = 0
    try:
        if sys.version_info < (3, 11) or tuple(map(int, PIL.__version__.split(".")[:2])) < (10, 1):
            raise UserError(f"Python 3.11 and Pillow 10.1 are the least that works, here are {sys.version.split()[0]} "
                            f"and {PIL.__version__}: upgrade")
        main()
    except UserError as error:
        code = f"error: {error}"
    except KeyboardInterrupt:  # where no `Run` saves first (distill.py): nothing is left half-written
        code = 130
    except BrokenPipeError:  # the reader of our output left, as `| head` does: what was to be done was not done
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except OSError as error:  # it knows its file and its reason: disk full, no permission, not there
        code = f"error: {error.filename or 'file system'}: {error.strerror or error}; what was written before is kept"
    except SystemExit as end:  # --help, a stopped run
        code = end.code or 0
    if isinstance(code, str):
        print(" ".join(code.split()), file=sys.stderr)
        code = 2
    if dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)  # gloo's threads (PyTorch 2.13) now and then abort a process that takes itself apart in order
    sys.exit(code)


def rank_and_world():
    """torchrun's numbers of this process and of all; (0, 1) without it, or where they are set to nothing."""
    return int(os.environ.get("RANK") or 0), int(os.environ.get("WORLD_SIZE") or 1)


OWNED = {}  # {folder: its lock, open}


def own(folder, rank=0):
    """Make `folder`, and make it this command's own until the command ends, however that may be; rank 0 does so for all
    ranks. UserError where another has it."""
    os.makedirs(folder, exist_ok=True)
    if rank > 0 or os.path.abspath(folder) in OWNED:
        return
    lock = open(Path(folder) / ".lock", "a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of a process that was killed the system lets go
    except BlockingIOError:
        lock.seek(0)
        raise UserError(f"{folder} is in use by {lock.read() or 'another process'}: wait until that has ended, or give "
                        "another --out") from None
    except OSError:  # some network disks have no locks
        pass
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}")
    lock.flush()
    OWNED[os.path.abspath(folder)] = lock


def setup(device="auto"):
    """Join torchrun's process group if there is one. -> (device, rank, world). One process a GPU; gloo on CPUs."""
    rank, world = rank_and_world()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = device.partition(":")
    if kind == "cuda":
        if not torch.cuda.is_available():
            raise UserError("--device cuda: this PyTorch sees no GPU; use --device cpu")
        index, count = index or os.environ.get("LOCAL_RANK", "0"), torch.cuda.device_count()
        if not index.isdecimal() or int(index) >= count:
            raise UserError(f"--device cuda:{index}: this machine has {count} GPU(s), numbered from 0; torchrun takes "
                            "at most as many processes")
        device = f"cuda:{index}"
        # every step masks another number of tokens, and blocks of fixed size leave gaps between them (not measured)
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # read at the first allocation
        torch.cuda.set_device(device)
        # float32 products (head, VAE, reward networks) by TF32: 10 bits of mantissa where bf16 has 7, at about eight
        # times the rate. Else the head, a quarter of the arithmetic, would take most of a step. Inception opts out.
        torch.set_float32_matmul_precision("high")
    elif device == "cpu":
        torch.set_flush_denormal(True)  # near-zero gradients otherwise slow the CPU tenfold
    else:
        raise UserError(f"--device {device}: auto, cpu, cuda or cuda:N")
    if world > 1 and not dist.is_initialized():
        store = next(rendezvous("env://"))[0]
        # torchrun (PyTorch 2.13) keeps its store over --max-restarts: there a new life finds the addresses of the dead
        # one. Hence a prefix; on several nodes the counts may differ: TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 (README)
        one_node = os.environ.get("LOCAL_WORLD_SIZE") == str(world)
        life = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0) if one_node else 0
        # rank 0 may judge alone for minutes (fid.py: precision of 50,000 images) and nccl gives up after 10; a dead
        # rank is torchrun's to notice
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", rank=rank, world_size=world,
                                store=dist.PrefixStore(f"life {life}", store), timeout=timedelta(hours=2))
    return torch.device(device), rank, world


# ----------------------------------------------------------------------------------------------------------------------
# Command line

def build_latents(args, source, advice, device):
    """python data.py --data PATH --vae FILE: both flips of every image as VAE moments."""
    vae = load_vae(args.vae).to(device)

    def encode(images):
        # both flips: the VAE is not exactly symmetric, so mirrored latents are not the latents of the mirror image
        x = torch.from_numpy(images).to(device).float() / 127.5 - 1  # (n, 3, S, S); bytes travel
        moments = vae.moments(torch.cat([x, x.flip(-1)]))  # (2n, 32, h, w)
        return moments.unflatten(0, (2, -1)).transpose(0, 1).half().cpu().numpy()  # (n, 2, 32, h, w): [i, flip]

    settings = {"kind": "moments", "img_size": args.img_size, "vae_sha256": file_hash(args.vae)[:16]}
    out = Path(args.out or default_cache(args.data, args.img_size, False)) / args.split
    build_cache(out, settings, make_listing(source), lambda file: read_image(file, args.img_size), encode,
                args.batch, advice, args.skip_broken)


def take_moments(args, advice):
    """python data.py --data NPZ_FOLDER: the latents of MAR's main_cache.py become a cache like any other."""
    listing = make_listing(args.data, {".npz"})
    side = read_moments(listing.files[0]).shape[-1]
    out = Path(args.out or default_cache(args.data, 16 * side, False)) / args.split
    build_cache(out, {"kind": "moments", "img_size": 16 * side}, listing, lambda file: read_moments(file, side),
                lambda moments: moments, args.batch, advice, args.skip_broken)
    say(f"train on it by --data {out.parent}")


def main(argv=None):
    """Download what --get names, or build the cache of --data; UserError before anything long."""
    parser = Parser("Build the cache of an image folder, or download public files.")
    # the cache
    parser.add_argument("--data", help="image folder with train/<class>/*, or MAR's latents, <class>/*.npz")
    parser.add_argument("--split", choices=list(SPLITS), default="train", help="test reads test, val or validation")
    parser.add_argument("--vae", help="KL-16 VAE file (--get kl16); needed from 64 px on")
    parser.add_argument("--img_size", type=int, help="px a side; default 256, or what small images have")
    parser.add_argument("--pixels", action="store_true", help="use images of 64 px and more as pixels, not as latents")
    parser.add_argument("--out", help="folder of a latent cache; default out/cache/<name>-<size>-latents")
    parser.add_argument("--skip_broken", action="store_true", help="name and leave out images that cannot be decoded")
    parser.add_argument("--batch", type=int, default=64, help="images encoded at once; less if memory is short")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto: cuda where there is one")
    # downloads
    parser.add_argument("--get", nargs="+", default=[], metavar="NAME", help=f"download: {', '.join(PUBLIC)}")
    parser.add_argument("--folder", default=".", help="where --get puts its files; other scripts look in the default")
    args = parser.parse_args(argv)
    check_numbers(args, one="img_size batch")
    if not args.get and not args.data:
        raise UserError("nothing to do: give --data PATH --vae FILE, or --get NAME")
    get(args.get, args.folder)
    if not args.data:
        return
    if not Path(args.data).is_dir():
        raise UserError(f"--data {args.data}: no such folder; shapes and cifar10 need no cache")
    device, _, _ = setup(args.device)
    words = sys.argv[1:] if argv is None else argv
    advice = f"{command(*words, '--skip_broken')} leaves it out, or remove it"
    if next(Path(args.data).glob("*/*.npz"), None):  # what main_cache.py writes
        if args.vae or args.img_size or args.pixels:
            raise UserError(f"--data {args.data} holds latents: no --vae, no --img_size, no --pixels")
        return take_moments(args, advice)
    source = split_folder(args.data, args.split)
    args.img_size = args.img_size or own_size(args.data, args.split, args.pixels)
    if args.pixels or args.img_size < PIXEL_LIMIT:
        if args.vae or args.out:
            raise UserError(f"--img_size {args.img_size}: used as pixels: no --vae, no --out")
        open_data(args.data, args.split, args.img_size, skip_broken=args.skip_broken, pixels=args.pixels)
    elif not args.vae or args.img_size % 16:
        raise UserError("latents need --vae FILE (python data.py --get kl16) and an --img_size that 16 divides")
    else:
        build_latents(args, source, advice, device)


if __name__ == "__main__":
    run_main(main)
