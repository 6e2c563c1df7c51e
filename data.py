"""Pictures and latents: where every training batch, reference image and decoded sample comes from.

What --data takes, all of one class (`Data`):
  shapes     8 classes of coloured shapes, drawn on the fly; nothing to download
  cifar10    the official binary files               python data.py --get cifar10
  PATH       any image folder, PATH/train/<class>/*  (and PATH/test, PATH/val or PATH/validation for the other split)
  CACHE      a folder of latents that this program has made of such a one
Images below 64 px are used as pixels and decoded into memory at each start. Larger ones become KL-16 latents, once:
    python data.py --get kl16                                          # downloads what it names, and nothing else
    python data.py --data PATH --vae pretrained_models/vae/kl16.ckpt   # or torchrun --nproc_per_node=8 data.py ...
Killed at any moment, the same command goes on where it stopped. At the end it says what to give to --data.
"""
import argparse
import contextlib
import functools
import hashlib
import http.client
import json
import os
import re
import shlex
import shutil
import sys
import traceback
import warnings
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain
from pathlib import Path
from urllib.request import Request, urlopen

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from torch.distributed.rendezvous import rendezvous
from tqdm import tqdm

import model
from model import UserError, load_network, printable, reading, say, splitmix, write_json

LATENT_SCALE = 0.2325  # the public MAR trains on VAE samples times this (LTH14/mar main_mar.py)

# ----------------------------------------------------------------------------------------------------------------------
# Shapes, drawn on the fly

# Eight outlines that an eye tells apart at 16 px. Colour and ground say nothing about the class: a model must get the
# outline right. Colours are few and saturated, so that a wrong mixture of two is seen at once.
OUTLINES = {  # which points each covers: x (N, 1, width), y (N, height, 1), in about [-1, 1] -> bool
    "disc": lambda x, y: x * x + y * y < 1,
    "ring": lambda x, y: (x * x + y * y < 1.1) & (x * x + y * y > 0.3),
    "square": lambda x, y: (x.abs() < 0.85) & (y.abs() < 0.85),
    "triangle": lambda x, y: (x.abs() < (y + 1) * 0.6) & (y < 0.8),
    "plus": lambda x, y: ((x.abs() < 0.32) & (y.abs() < 1)) | ((y.abs() < 0.32) & (x.abs() < 1)),
    "cross": lambda x, y: ((x.abs() - y.abs()).abs() < 0.42) & (x.abs() < 0.95) & (y.abs() < 0.95),
    "bars": lambda x, y: (x.abs() < 1) & ((y.abs() - 0.6).abs() < 0.3),
    "diamond": lambda x, y: x.abs() + y.abs() < 1.15,
}
SHAPES = list(OUTLINES)
COLOURS = torch.tensor([[235, 60, 50], [70, 200, 80], [70, 120, 250], [250, 210, 60]], dtype=torch.float32)
GROUNDS = torch.tensor([[18, 18, 24], [70, 30, 80]], dtype=torch.float32)
SUB = 4  # sub-samples per side of a pixel: 17 grey levels along an edge are enough at 16 px


def index_uniform(index, stream):
    """Numbers in [0, 1), float64 (N,), that depend on (index, stream) alone."""
    bits = splitmix((torch.as_tensor(index) * 16 + stream + 1) * -0x61C8864680B583EB)  # int64, modulo 2^64
    return (bits >> 11 & (1 << 53) - 1).double() * 2.0**-53


def draw_shapes(index, img_size=16):
    """Images number `index` (N,) of the endless shapes data, of class index % 8. -> uint8 (N, 3, img_size, img_size).
    Every class is symmetric under a mirror: random flips in training leave the distribution as it is."""
    index = np.asarray(index)
    draw = lambda stream, low, high: low + (high - low) * index_uniform(index, stream)
    cx, cy = draw(0, -0.2, 0.2).float(), draw(1, -0.2, 0.2).float()
    radius = draw(2, 0.56, 0.72).float()
    colour = COLOURS[draw(3, 0, len(COLOURS)).long()][..., None, None]  # (N, 3, 1, 1)
    ground = GROUNDS[draw(4, 0, len(GROUNDS)).long()][..., None, None]
    grid = (torch.arange(img_size * SUB) + 0.5) * (2 / (img_size * SUB)) - 1
    # in the shape's own coordinates. Shapes reach into the rim, the largest diamonds past it; its median stays ground
    x = ((grid - cx[:, None]) / radius[:, None])[:, None]  # (N, 1, SUB*img_size)
    y = ((grid - cy[:, None]) / radius[:, None])[..., None]  # (N, SUB*img_size, 1)
    cover = torch.empty(len(index), 1, img_size, img_size)
    for label, inside in enumerate(OUTLINES.values()):
        rows = torch.from_numpy(np.flatnonzero(index % len(SHAPES) == label))
        if len(rows):
            cover[rows] = F.avg_pool2d(inside(x[rows], y[rows]).float()[:, None], SUB)  # (n, 1, img_size, img_size)
    return (ground + cover * (colour - ground)).round().byte()


SHAPE_MODES = [f"{colour} on {ground}" for colour in ("red", "green", "blue", "yellow")  # in the order of COLOURS
               for ground in ("dark", "purple")]


def shape_modes(images):
    """The colour and ground of shapes, as an index into SHAPE_MODES: uint8 (N, 3, H, W) -> (N,) long. The ground is
    nearest to the median of the rim; the colour, to the mean of the pixels that differ most from the ground."""
    x = images.float()
    rim = torch.cat([x[:, :, 0], x[:, :, -1], x[..., 0], x[..., -1]], 2)  # (N, 3, 2 H + 2 W)
    ground = torch.cdist(rim.median(2).values, GROUNDS).argmin(1)
    far = (x - GROUNDS[ground][..., None, None]).norm(dim=1).flatten(1)  # (N, H * W)
    inside = far >= 0.7 * far.max(1, keepdim=True).values
    mean = (x.flatten(2) * inside[:, None]).sum(2) / inside.sum(1, keepdim=True)  # (N, 3)
    return torch.cdist(mean, COLOURS).argmin(1) * len(GROUNDS) + ground


# ----------------------------------------------------------------------------------------------------------------------
# Image folders

PIXEL_LIMIT = 64  # px: below it tokens are pixels, from it on latents
SPLITS = {"train": ["train"], "test": ["test", "val", "validation"]}  # names of the folder, the first that is there
SUFFIXES = tuple(".jpg .jpeg .jpe .jfif .mpo .png .webp .avif .bmp .gif .tif .tiff .ppm .pgm".split())
say_once = functools.cache(say)  # threads that meet there may say it twice
LAYOUT = "put pictures into DATA/train/<class>/*.jpg, where DATA is what --data names; a class may be called train"

# Above 90 megapixels a picture is refused by name: decoded, each thread's would take half a gigabyte and more
warnings.simplefilter("error", Image.DecompressionBombWarning)


def split_folder(path, split):
    for name in SPLITS[split]:
        if Path(path, name).is_dir():
            return Path(path, name)
    raise UserError(f"{path}: no folder {' or '.join(map(repr, SPLITS[split]))} there; {LAYOUT}")


def walk(folder, above=()):
    """The images in `folder` and below, in the order of names. Hidden files are passed over: beside x.jpg macOS keeps a
    ._x.jpg that is no picture. Links are followed, but not back up. above: real paths of the folders above."""
    above = (*above, os.path.realpath(folder))
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        if name.startswith("."):
            continue
        if os.path.isdir(path):  # also if its name ends like a picture's
            if os.path.realpath(path) not in above:
                yield from walk(path, above)
        elif name.lower().endswith(SUFFIXES) and os.path.isfile(path):  # not a link to nowhere
            yield path


def find_images(folder, need_classes=False):
    """-> (class names, files, labels int64 (N,)), sorted by class, then by name: ImageNet's usual label order.

    The class is the first folder below `folder`, however deep a picture lies in it (torchvision's rule). If no picture
    lies in a folder, all are of the class ""."""
    found = {path.name: [] for path in sorted(Path(folder).iterdir()) if path.is_dir() and path.name[0] != "."}
    loose, start = [], len(os.path.join(folder, ""))
    for file in walk(folder):
        name = file[start:].split(os.sep)[0]
        found.get(name, loose).append(file)
    if not any(found.values()):
        found = {"": loose}
    elif loose:
        say(f"{folder}: {len(loose):,} images are in no class folder, and passed over: {loose[0]}, ...")
    if need_classes and "" in found:
        raise UserError(f"{folder}: no images in class folders there; {LAYOUT}")
    if set(found) <= {name for names in SPLITS.values() for name in names}:
        raise UserError(f"{folder}: {', '.join(found)} are no classes: give the folder of one, {folder}/{[*found][0]}")
    for name, files in found.items():
        if not files:
            raise UserError(f"{Path(folder, name)}: no images in it: fill it, or remove it if it is no class")
    labels = np.repeat(np.arange(len(found)), [*map(len, found.values())])
    return list(found), [*chain(*found.values())], labels


def native_size(path, split, pixels=False):
    """px at which a folder is used unless told otherwise: its first image's if below 64 or if `pixels`, else 256."""
    folder = split_folder(path, split)
    for file in walk(folder):  # the first that is whole is enough: to list all of ImageNet takes long
        with contextlib.suppress(UserError):
            side = min(read_image(file).shape[1:])
            return side if pixels or side < PIXEL_LIMIT else 256
    raise UserError(f"{folder}: no images in it")


def is_small(path):
    """Whether a folder's images are trained on as pixels: then CIFAR-10's defaults suit it, else ImageNet's."""
    with contextlib.suppress(UserError):  # a latent cache has no images; of other faults open_data speaks
        return native_size(path, "train") < PIXEL_LIMIT
    return False


def to_rgb(image):
    """Any Pillow image -> 8-bit RGB. Transparency is laid over white: what hides under alpha 0 is often garbage."""
    if image.mode.startswith("I"):  # which Pillow's own conversion would clip at 255
        say_once("16-bit pictures are divided by 257, where torchvision's loader clips them at 255")
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    if "A" in image.mode or "transparency" in image.info:
        say_once("transparent pictures are laid over white, where torchvision's loader shows what is hidden")
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def adm_crop(image, size):
    """Centre crop to size x size exactly as ADM and MAR do it (openai/guided-diffusion image_datasets.py)."""
    while min(image.size) >= 2 * size:  # halving by BOX first keeps the bicubic step from aliasing
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def read_image(path, size=None, upright=False):
    """-> uint8 (3, size, size), or whole, (3, H, W); upright: turned as a camera's note (EXIF) says and viewers do."""
    with reading(path, "image", ": mend it or remove it"), Image.open(path) as image:
        image = to_rgb(ImageOps.exif_transpose(image) if upright else image)
        return np.array(adm_crop(image, size) if size else image).transpose(2, 0, 1)


# ----------------------------------------------------------------------------------------------------------------------
# The latent cache

# A folder with moments.npy  float16 (N, 2, 32, h, w), a row per picture: [0] of it, [1] of its mirror image
#               done.npy     uint8 (N,): LACKING, DONE once the row is on the disk, BROKEN: it cannot be decoded
#               cache.json   what it is made of: settings, {class: how many}, a digest of names, sizes and times
# Rows are in the order of find_images, so a cache is of one list of pictures. Only its builder looks at them again.
LACKING, DONE, BROKEN = 0, 1, 2


def default_cache(path, img_size):
    """Where the builder puts a folder's cache unless told otherwise."""
    return Path("out/cache") / f"{Path(path).resolve().name}-{img_size}-latents"


def start_cache(out, folder, pictures, img_size, vae):
    """Make the files of a cache, or make sure that those which are there are of the same pictures."""
    lock_folder(out)  # two builders would write over each other's rows
    class_names, files, labels = pictures
    path, count, side = out / "cache.json", len(files), img_size // 16
    need, free = count * 2 * 32 * side**2 * 2, shutil.disk_usage(out).free  # bytes
    say(f"{out}: {count:,} pictures, {need / 1e9:.2f} GB; if stopped, the same command goes on")
    digest, start = hashlib.sha256(), len(os.path.join(folder, ""))
    for file in files:  # half a minute for ImageNet on a local disk
        stat = os.stat(file)
        digest.update(os.fsencode(f"{file[start:]} {stat.st_size} {stat.st_mtime_ns}\n"))
    meta = {"img_size": img_size, "vae_sha256": file_hash(vae)[:16], "digest": digest.hexdigest(),
            "classes": dict(zip(class_names, np.bincount(labels).tolist()))}
    if not path.exists():
        if need > free:
            raise UserError(f"{out}: only {free / 1e9:.2f} GB are free: make room, or give another --out")
        np.lib.format.open_memmap(out / "done.npy", "w+", np.uint8, (count,))
        np.lib.format.open_memmap(out / "moments.npy", "w+", np.float16, (count, 2, 32, side, side))
        write_json(path, meta)
    with reading(path, "cache.json", f": delete {out}"):
        found = json.loads(path.read_text())
    if found != meta:
        raise UserError(f"{out} is of other pictures, or made otherwise: delete it, or give another --out")


def build_cache(args):
    """Build the latent cache of args.data, or go on with it; each rank encodes a stretch of the pictures. A picture
    that cannot be decoded is named and left out."""
    folder = split_folder(args.data, "train")
    size = args.img_size or native_size(args.data, "train")
    if size < PIXEL_LIMIT:
        raise UserError(f"{args.data}: images of {size} px are used as pixels: nothing is to be built, train on them")
    if not args.vae or size % 16:
        raise UserError("latents need --vae FILE (python data.py --get kl16) and an --img_size that 16 divides")
    out = Path(args.out or default_cache(args.data, size))
    device, rank, world = setup(args.device)
    vae = load_vae(args.vae).to(device)
    pictures = find_images(folder, need_classes=True)  # of ImageNet slow: last
    files = pictures[1]
    barrier = dist.barrier if world > 1 else lambda: None
    if rank == 0:
        start_cache(out, folder, pictures, size, args.vae)
    barrier()
    with reading(out, "latent cache", ": delete it"):
        moments, done = (np.load(out / f"{name}.npy", "r+") for name in ("moments", "done"))
    mine = np.array_split(np.arange(len(files)), world)[rank]  # neighbours: a disk likes that better
    lacking = mine[done[mine] == LACKING]

    def read(row):
        try:
            return read_image(files[row], size), DONE
        except UserError as error:
            tqdm.write(printable(f"left out: {error}"), file=sys.stderr)
            return np.zeros((3, size, size), np.uint8), BROKEN

    with ThreadPoolExecutor() as pool, tqdm(total=len(lacking), disable=rank > 0 or None, unit="img") as bar:
        for start in range(0, len(lacking), args.batch):
            rows = lacking[start:start + args.batch]
            images, states = zip(*pool.map(read, rows))
            x = torch.from_numpy(np.stack(images)).to(device).float() / 127.5 - 1  # (n, 3, H, W)
            both = [vae.moments(x), vae.moments(x.flip(-1))]  # the VAE is not symmetric: mirrored latents would differ
            moments[rows] = torch.stack(both, 1).half().cpu().numpy()
            moments.flush()
            done[rows] = states  # only now: a row that is done is whole
            bar.update(len(rows))
    done.flush()
    barrier()
    say(f"finished, {(done == BROKEN).sum():,} pictures left out; from now on: --data {out}")


def open_cache(folder):
    """A finished latent cache -> Data."""
    folder = Path(folder)
    with reading(folder, "latent cache", ": delete it and build it again"):
        meta = json.loads((folder / "cache.json").read_text())
        size, classes = meta["img_size"], meta["classes"]
        labels = np.repeat(np.arange(len(classes)), [*classes.values()])
        done = np.load(folder / "done.npy")
        moments = np.asarray(np.load(folder / "moments.npy", "r"))  # plain arrays are indexed faster
        if not len(labels) == len(done) == len(moments):
            raise ValueError(f"{len(labels)} pictures, {len(moments)} rows")
    if (done == LACKING).any():
        raise UserError(f"{folder}: this cache is not finished: the command that began it goes on with it")
    rows = np.flatnonzero(done == DONE)
    read = lambda indices, flips: torch.from_numpy(moments[rows[indices], flips])  # a copy of these rows alone
    return Data(str(folder), [*classes], size, labels[rows], read, pixels=False)


# ----------------------------------------------------------------------------------------------------------------------
# Data sets, their batches, words for their classes


@dataclass
class Data:
    """One split of one data set. Indices run from 0 to len - 1."""
    name: str
    class_names: list
    img_size: int  # px
    labels: np.ndarray  # int64 (N,)
    read: Callable  # of pixels: indices -> uint8 (B, 3, H, W); of latents: indices, flips -> moments (B, 32, h, w)
    pixels: bool = True

    num_classes = property(lambda self: len(self.class_names))
    counts = property(lambda self: torch.from_numpy(np.bincount(self.labels, minlength=self.num_classes)))  # (classes,)

    def __len__(self):
        return len(self.labels)

    @functools.cached_property
    def sha256(self):
        """Of labels and pixels: what tells two data sets apart. Once; a second or two for 50,000 images."""
        digest = hashlib.sha256(self.labels.tobytes())
        for indices in torch.arange(len(self)).split(500):
            digest.update(self.images(indices).numpy())
        return digest.hexdigest()

    def images(self, indices, flip=None):
        """uint8 (B, 3, H, W) of indices (B,), mirrored where flip (B,) bool says so. Of data of pixels."""
        x = self.read(np.asarray(indices))
        if flip is None:
            return x
        return torch.where(torch.from_numpy(flip)[:, None, None, None], x.flip(-1), x)

    def batch(self, indices, flip, generator=None):
        """indices (B,), flip (B,) bool -> x (B, C, h, w) float32 on the CPU, labels (B,) int64. Pixels are in [-1, 1];
        latents are a fresh sample of the VAE's posterior, drawn with `generator`, times 0.2325."""
        indices, flip = np.asarray(indices), np.asarray(flip)
        labels = torch.from_numpy(self.labels[indices])
        if self.pixels:  # mirrored as bytes: a quarter of the work
            return self.images(indices, flip).float().mul_(2 / 255).sub_(1), labels
        mean, logvar = self.read(indices, flip.astype(np.int64)).float().chunk(2, dim=1)  # 2 x (B, 16, h, w)
        std = logvar.clamp(-30, 20).mul_(0.5).exp_()  # the clamp is the public VAE's
        # fresh noise at every visit, as MAR trains: 40 % of this method's time, and still 9 ms for 256 latents
        noise = torch.randn(mean.shape, generator=generator)
        return torch.addcmul(mean, std, noise).mul_(LATENT_SCALE), labels


def open_data(name, split="train", img_size=None, pixels=False):
    """-> Data. name: "shapes", "cifar10", or the path of an image folder or of a latent cache. img_size: px; None: 16
    for shapes, native_size for a folder. pixels: no latents, whatever the size."""
    name = str(name)
    if name in ("shapes", "cifar10") and Path(name, "train").is_dir():
        say(f"--data {name} is data that this program knows; the folder of that name here is --data ./{name}")
    if name == "shapes":
        first, count = (0, 50_000) if split == "train" else (2**32, 10_000)
        read = lambda indices: draw_shapes(first + indices, img_size or 16)
        return Data(name, SHAPES, img_size or 16, (first + np.arange(count)) % len(SHAPES), read)
    if name == "cifar10":
        return open_cifar10(split, img_size)
    if not Path(name).is_dir():
        raise UserError(f"{name}: no such folder; --data takes shapes, cifar10 or a folder with train/<class>/*.jpg")
    if Path(name, "cache.json").exists():
        if pixels:
            raise UserError(f"{name}: a latent cache, which holds no pixels: give the folder of the images")
        return open_cache(name)
    img_size = img_size or native_size(name, split, pixels)
    if pixels or img_size < PIXEL_LIMIT:
        return open_images(name, split, img_size)
    raise UserError(f"{name}: images of {img_size} px become latents, once, by: python data.py --data "
                    f"{shlex.quote(name)} --img_size {img_size} --vae {PUBLIC['kl16'][1]}; then give --data "
                    f"{default_cache(name, img_size)}; or use them as pixels (distill.py --pixels)")


def open_images(name, split, img_size):
    """The pictures of a folder -> Data, in memory: 50,000 JPEGs of 32 px take half a minute and 154 MB per process."""
    class_names, files, labels = find_images(split_folder(name, split), need_classes=True)
    shape = np.dtype((np.uint8, (3, img_size, img_size)))
    with ThreadPoolExecutor() as pool:  # Pillow lets go of Python's lock
        decoded = tqdm(pool.map(lambda file: read_image(file, img_size), files), printable(f"decoding {name}"),
                       len(files), leave=False, disable=int(os.environ.get("RANK") or 0) > 0 or None)
        images = torch.from_numpy(np.fromiter(decoded, shape, len(files)))
    return Data(name, class_names, img_size, labels, lambda indices: images[indices])


def open_cifar10(split, img_size=None):
    """The official binary files: per image 1 label byte, then 3,072 pixel bytes (red, green, blue planes)."""
    if img_size not in (None, 32):
        raise UserError(f"cifar10 is of 32 px, not {img_size}")
    folder = Path("data/cifar-10-batches-bin")  # under the current folder, where --get cifar10 puts it
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] if split == "train" else ["test_batch.bin"]
    try:
        records = np.concatenate([np.fromfile(folder / name, np.uint8).reshape(10_000, 3073) for name in names])
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: missing or not whole ({error}): run python data.py --get cifar10 (the Python "
                        "version, cifar-10-batches-py, is a pickle, which can run code)") from None
    images = torch.from_numpy(records[:, 1:].reshape(-1, 3, 32, 32))  # (N, 3073) -> (N, 3, 32, 32)
    classes = "airplane automobile bird cat deer dog frog horse ship truck".split()
    return Data("cifar10", classes, 32, records[:, 0].astype(np.int64), lambda indices: images[indices])


@functools.lru_cache(maxsize=2)  # a step can touch two epochs
def epoch_order(n, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(n)


def train_indices(n, batch, step, seed, rank=0, world=1):
    """The step-th batch of endless shuffled epochs over n images -> this rank's (indices, flips), each (batch/world,).
    A pure function of its arguments: resuming needs no saved state, and the ranks' parts are the one-process batch."""
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


def read_class_names(of_data=None):
    """Words for classes, in label order: the data's own, or ImageNet's where it has none, or has ImageNet's folders
    (n01440764 and so on), which no text encoder knows."""
    if of_data and not re.fullmatch(r"n\d{8}", of_data[0]):
        return of_data
    names = json.loads((Path(__file__).parent / "assets/imagenet_class_names.json").read_text("utf-8"))
    if of_data and len(of_data) != len(names):
        raise UserError(f"ImageNet names {len(names)} classes, here are {len(of_data)}: call their folders by words")
    return names


# ----------------------------------------------------------------------------------------------------------------------
# The KL-16 VAE
# Module names are nearly those of the public file (LTH14/mar models/vae.py); load_vae knows the rest.

CHANNELS = (128, 128, 256, 256, 512)  # per level: full size, 1/2, 1/4, 1/8, 1/16
norm = functools.partial(nn.GroupNorm, 32, eps=1e-6)
conv3 = functools.partial(nn.Conv2d, kernel_size=3, padding=1)


class ResnetBlock(nn.Module):
    """GroupNorm, SiLU, 3 x 3 convolution, twice, beside a shortcut. (B, c_in, h, w) -> (B, c_out, h, w)."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1, self.conv1 = norm(c_in), conv3(c_in, c_out)
        self.norm2, self.conv2 = norm(c_out), conv3(c_out, c_out)
        self.nin_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return self.conv2(F.silu(self.norm2(h))) + self.nin_shortcut(x)


class SelfAttention(nn.Module):
    """One head as wide as the feature map is deep."""

    def __init__(self, c):
        super().__init__()
        self.norm = norm(c)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2).transpose(1, 2) for conv in (self.q, self.k, self.v))  # (B, h*w, c)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)  # (B, c, h, w)
        return x + self.proj_out(h)


def sequence(**modules):
    return nn.Sequential(OrderedDict(modules))


def middle(c):
    return sequence(block_1=ResnetBlock(c, c), attn_1=SelfAttention(c), block_2=ResnetBlock(c, c))


def encoder():
    """(B, 3, H, W) -> (B, 32, H/16, W/16). Attention at the deepest level only: elsewhere H*W is too many."""
    pad = nn.ZeroPad2d((0, 1, 0, 1))  # right and below
    half = lambda c: sequence(pad=pad, conv=nn.Conv2d(c, c, 3, stride=2))
    down = [sequence(block0=ResnetBlock(c_in, c), block1=ResnetBlock(c, c), downsample=half(c))
            for c_in, c in zip((128, *CHANNELS), CHANNELS[:-1])]
    deepest = sequence(block0=ResnetBlock(256, 512), attn0=SelfAttention(512),
                       block1=ResnetBlock(512, 512), attn1=SelfAttention(512))
    return sequence(conv_in=conv3(3, 128), down=nn.Sequential(*down, deepest), mid=middle(512),
                    norm_out=norm(512), silu=nn.SiLU(), conv_out=conv3(512, 32))


def decoder():
    """(B, 16, h, w) -> (B, 3, 16h, 16w). One block per level more than the encoder, no attention on the way up."""
    double = lambda c: sequence(nearest=nn.Upsample(scale_factor=2), conv=conv3(c, c))
    up = {}
    for level in (4, 3, 2, 1, 0):  # the public list begins with the full size
        c_in, c = CHANNELS[min(level + 1, 4)], CHANNELS[level]
        up[str(level)] = sequence(block0=ResnetBlock(c_in, c), block1=ResnetBlock(c, c), block2=ResnetBlock(c, c),
                                  upsample=double(c) if level else nn.Identity())
    return sequence(conv_in=conv3(16, 512), mid=middle(512), up=sequence(**up),
                    norm_out=norm(128), silu=nn.SiLU(), conv_out=conv3(128, 3))


class KLVAE(nn.Module):
    """KL-16: a picture of H x W px <-> 16 channels of H/16 x W/16. Always in float32."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = encoder(), decoder()
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
    names = [(r"(block|attn)(\d)", r"\1.\2")]
    return load_network(KLVAE, path, "kl16", names, drop=["loss."])  # a discriminator's, of the training


# ----------------------------------------------------------------------------------------------------------------------
# Public files

# Each can be fetched by hand from its url and put into its place; the same command then checks it.
# name: (url, place, bytes (about), checksum), None where it is not published; of inception the beginning is.
DROPBOX = "https://www.dropbox.com/scl/fi"
HUB = "https://huggingface.co"
ADM = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches"
CLIP_SHA256 = "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"
PUBLIC = {
    "kl16": (f"{DROPBOX}/hhmuvaiacrarfg28qxhwz/kl16.ckpt?rlkey=l44xipsezc8atcffdp4q7mwmh&dl=0",
             "pretrained_models/vae/kl16.ckpt", 254 << 20, None),
    "mar_base": (f"{DROPBOX}/f6dpuyjb7fudzxcyhvrhk/checkpoint-last.pth?rlkey=a6i4bo71vhfo4anp33n9ukujb&dl=0",
                 "pretrained_models/mar/mar_base/checkpoint-last.pth", 1587 << 20, None),
    "mar_large": (f"{DROPBOX}/pxacc5b2mrt3ifw4cah6k/checkpoint-last.pth?rlkey=m48ovo6g7ivcbosrbdaz0ehqt&dl=0",
                  "pretrained_models/mar/mar_large/checkpoint-last.pth", 3650 << 20, None),
    "mar_huge": (f"{DROPBOX}/1qmfx6fpy3k7j9vcjjs3s/checkpoint-last.pth?rlkey=4lae281yzxb406atp32vzc83o&dl=0",
                 "pretrained_models/mar/mar_huge/checkpoint-last.pth", 7191 << 20, None),
    "inception": ("https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
                  "weights-inception-2015-12-05-6726825d.pth",
                  "pretrained_models/fid/weights-inception-2015-12-05-6726825d.pth", None, "sha256:6726825d"),
    "adm_reference": (f"{ADM}/imagenet/256/VIRTUAL_imagenet256_labeled.npz",
                      "pretrained_models/fid/VIRTUAL_imagenet256_labeled.npz", None, None),
    "clip": (f"https://openaipublic.azureedge.net/clip/models/{CLIP_SHA256}/ViT-L-14.pt",
             "pretrained_models/clip/ViT-L-14.pt", None, f"sha256:{CLIP_SHA256}"),
    "bpe": ("https://github.com/openai/CLIP/raw/main/clip/bpe_simple_vocab_16e6.txt.gz",
            "pretrained_models/clip/bpe_simple_vocab_16e6.txt.gz", 1_356_917,
            "sha256:924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"),
    "pickscore": (f"{HUB}/yuvalkirstain/PickScore_v1/resolve/main/pytorch_model.bin",
                  "pretrained_models/pickscore/pytorch_model.bin", None, None),
    "imagereward": (f"{HUB}/THUDM/ImageReward/resolve/main/ImageReward.pt",
                    "pretrained_models/imagereward/ImageReward.pt", None, None),
    "imagereward_vocab": (f"{HUB}/bert-base-uncased/resolve/main/vocab.txt",
                          "pretrained_models/imagereward/vocab.txt", None, None),
    "cifar10": ("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", "data/cifar-10-binary.tar.gz",
                170_052_171, "md5:c32a1d4ab5d03f1284b67883e8d87530"),
}


def file_hash(path, kind="sha256"):
    """The hex digest of a file, however large: it is read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, kind).hexdigest()


def fetch(name, url, part):
    """Download url into the file `part`, going on where an earlier try stopped."""
    start = part.stat().st_size if part.exists() else 0
    # Dropbox sends the file itself, and not a page about it, to this user agent (LTH14/mar util/download.py)
    headers = {"User-Agent": "Wget/1.16 (linux-gnu)", "Range": f"bytes={start}-"}
    try:
        with urlopen(Request(url, headers=headers), timeout=60) as reply:
            start = start if reply.status == 206 else 0  # else the server sends the whole file again
            total = start + int(reply.headers.get("Content-Length") or 0)
            with (open(part, "ab" if start else "wb") as file,
                  tqdm.wrapattr(file, "write", total=total or None, initial=start, desc=name) as counted):
                shutil.copyfileobj(reply, counted)
        if part.stat().st_size < total:
            raise OSError(f"at {part.stat().st_size:,} of {total:,} bytes")
    except (OSError, http.client.HTTPException) as error:
        if getattr(error, "code", None) != 416:  # 416: nothing is left to send
            raise UserError(f"{name}: download of {url} stopped ({error}); the same command goes on") from None


def get(names, folder="."):
    """Download public files by name into `folder`; each is checked before it gets its name."""
    for name in names:
        url, place, size, checksum = PUBLIC[name]
        path, part = Path(folder) / place, Path(folder) / f"{place}.part"
        kind, digest = checksum.split(":") if checksum else ("sha256", "")
        wanted = f"{kind} {digest or '(not published)'}" + (f", about {size:,} bytes" if size else "")
        print(f"{name}: {url}\n  -> {path}; {wanted}", flush=True)
        if not path.exists():  # else only checked: it may have been put there by hand
            path.parent.mkdir(parents=True, exist_ok=True)
            fetch(name, url, part)
        file = path if path.exists() else part
        found, count = file_hash(file, kind), file.stat().st_size
        if not found.startswith(digest) or (size and abs(count - size) > 0.01 * size):
            if file == part:
                part.unlink()  # to go on from damaged bytes would never end well
            advice = "it is deleted now" if file == part else "delete it"
            raise UserError(f"{file} is damaged or another file: {kind} {found}, {count:,} bytes; wanted: {wanted}; "
                            f"{advice}, and get it again")
        os.replace(file, path)
        print(f"  is there: {kind} {found}, {count:,} bytes", flush=True)
        if name == "cifar10":
            shutil.unpack_archive(path, path.parent, filter="data")  # refuses links and paths that leave the folder


# ----------------------------------------------------------------------------------------------------------------------
# How a command starts: flags, errors, processes. The same for all; data.py is the lowest file that is a command

DTYPES = "auto", "float32", "bfloat16"  # of the transformer: --dtype
LOCKS = []  # the .lock of each folder, kept open


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but not None and False, which say nothing."""

    def _get_help_string(self, action):
        silent = action.default is None or action.default is False
        return action.help if silent else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line and whose help shows defaults."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=Help, allow_abbrev=False)

    def error(self, message):
        raise UserError(message)


def check_numbers(args, one="", two="", share=""):
    """Refuse NaN and numbers below 0; of flags in `one` those below 1, in `two` below 2; in `share` those from 1 on."""
    for name, value in vars(args).items():
        low = 2 if name in two.split() else int(name in one.split())
        high = 1 if name in share.split() else 2**31
        if name.endswith("head_steps"):
            high = 1001  # a chain has 1,000 time steps
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, (int, float)) and not low <= number < high:  # false for NaN too
                raise UserError(f"--{name} {number}: must be at least {low} and below {high}")


def run_main(main):
    """main() as a command: what a user can mend becomes one line on stderr and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a console's code page need not have every letter of a name
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
        code = 0
    except UserError as error:
        code = f"error: {error}"
    # an error of a disk (full, no permission, not there) mostly names its file; those of services and memory do not
    except (OSError, MemoryError) as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = getattr(error, "filename", None) or f"{type(error).__name__} in line {place.lineno} of {place.filename}"
        code = f"error: {where}: {getattr(error, 'strerror', None) or error}; what was written before is kept"
    except KeyboardInterrupt:  # outside a training loop, which listens itself (distill.py)
        code = 130
    except SystemExit as end:  # --help, a stopped run
        code = end.code or 0
    if isinstance(code, str):
        print(printable(" ".join(code.split())), file=sys.stderr)
        code = 2
    if dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)  # gloo's threads (PyTorch 2.13) now and then abort a process that takes itself apart in order
    sys.exit(code)


def lock_folder(folder):
    """Make `folder` and keep other processes out of it until this one ends; UserError where another has it. Files that
    a killed process left half-written go."""
    os.makedirs(folder, exist_ok=True)
    LOCKS.append(open(Path(folder) / ".lock", "a"))
    try:  # the system's lock, which ends with the process
        import fcntl
        fcntl.lockf(LOCKS[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # POSIX lets a system choose
        raise UserError(f"{folder} is in use by another process: wait for its end, or give another --out") from None
    except (OSError, ImportError):  # some network disks, and Windows, have no such locks
        pass
    for left in Path(folder).glob("*.*.*.writing"):  # model.replacing's names
        left.unlink(missing_ok=True)


def setup(device="auto", dtype="auto"):
    """Join torchrun's process group if there is one -> (device, rank, world). One process per GPU; gloo on CPUs. dtype
    is one of DTYPES; auto goes by what the machine is, never by a stopwatch: a resumed run decides alike."""
    # some machines set these to nothing
    rank, local, world = (int(os.environ.get(name) or 0) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    world = world or 1
    device = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        if local >= torch.cuda.device_count():
            raise UserError(f"--device cuda: PyTorch sees {torch.cuda.device_count()} GPU(s) here, and each process "
                            "needs one: use --device cpu, or fewer processes")
        # every step masks another number of tokens: blocks of fixed size would leave gaps (not measured)
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # read at the first allocation
        torch.cuda.set_device(local)
        # TF32, or the head, a quarter of the arithmetic, would take most of a step. Inception opts out
        torch.set_float32_matmul_precision("high")
    elif device == "cpu":
        torch.set_flush_denormal(True)  # near-zero gradients otherwise slow the CPU tenfold
    elif device != "mps" or world > 1 or not torch.backends.mps.is_available():
        raise UserError(f"--device {device}: auto, cpu, cuda (CUDA_VISIBLE_DEVICES picks one); mps in one process, "
                        "where PyTorch has it")
    if world > 1 and not dist.is_initialized():
        join_processes("nccl" if device == "cuda" else "gloo", rank, world)
    fast = device == "cuda" or device == "cpu" and model.multiplies_bf16()
    model.BF16 = dtype == "bfloat16" or dtype == "auto" and fast
    if device == "cpu" and model.BF16:
        say("products are in bf16, but for the head that distils (--dtype float32: not)")
        # oneDNN keeps buffers for each of the last 1,024 shapes of products: gigabytes. Read at its first product
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    return torch.device(device, local) if device == "cuda" else torch.device(device), rank, world


def join_processes(backend, rank, world):
    """torchrun's processes become a group that outlives --max-restarts."""
    try:
        store = next(rendezvous("env://"))[0]
    except ValueError:  # not torchrun's doing
        raise UserError("WORLD_SIZE is set, but not MASTER_ADDR: start with torchrun, or unset it") from None
    # torchrun keeps its store over a restart, with the dead processes' addresses: hence a prefix. On several nodes the
    # counts may differ; there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 makes the store anew (README)
    one_node = os.environ.get("LOCAL_WORLD_SIZE") == str(world)
    life = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0) if one_node else 0
    # rank 0 may judge alone for minutes and nccl gives up after 10; a dead rank is torchrun's to notice
    dist.init_process_group(backend, rank=rank, world_size=world, store=dist.PrefixStore(f"life {life}", store),
                            timeout=timedelta(hours=2))


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def main(argv=None):
    """Download what --get names, or build the latent cache of --data."""
    p = Parser("Build the latent cache of an image folder, or download public files.")
    flag = p.add_argument
    flag("--data", help="image folder with train/<class>/*")
    flag("--vae", help="KL-16 VAE file (--get kl16)")
    flag("--img_size", type=int, help="px a side; default 256")
    flag("--out", help="folder of the cache; default out/cache/<name>-<size>-latents")
    flag("--batch", type=int, default=64, help="images encoded at once; less if memory is short")
    flag("--device", default="auto", help="cpu, cuda, mps, or auto: cuda where there is one")
    flag("--get", nargs="+", default=[], choices=PUBLIC, metavar="NAME", help=f"download: {', '.join(PUBLIC)}")
    flag("--folder", default=".", help="where --get puts judges' weights; fid.py and rl.py need the same")
    args = p.parse_args(argv)
    check_numbers(args, one="img_size batch")
    if bool(args.get) == bool(args.data):
        raise UserError("give --get NAME or --data PATH --vae FILE, one of the two")
    if args.data:
        build_cache(args)
    else:
        get(args.get, args.folder)


if __name__ == "__main__":
    run_main(main)
