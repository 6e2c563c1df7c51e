"""The judges of samples: FID, inception score, KID, precision and recall; a classifier of the data; CLIP, PickScore,
ImageReward. What they say agrees with the public implementations, which test_all.py checks.

Needs samples (a folder of images, an .npz of sample.py --num) or a checkpoint, from which they are drawn as they are
judged; and the judges' public weights, which are fetched only when asked for:

    python data.py --get inception adm_reference               # once; also: clip bpe pickscore pickscore_config ...
    python fid.py samples.npz --ref pretrained_models/fid/VIRTUAL_imagenet256_labeled.npz
    torchrun --nproc_per_node=8 fid.py --ckpt student.pt --vae kl16.ckpt --ref VIRTUAL_imagenet256_labeled.npz
    python fid.py --ckpt a.pt b.pt --vae kl16.ckpt --ref REF --judges inception clip pickscore imagereward
    python fid.py --ckpt out/shapes/student.pt --data shapes --judges classifier --num 2048       # needs no download
    python fid.py --ckpt out/shapes/teacher.pt out/shapes/student.pt --data shapes --judges classifier --num 2048 \
        --ar_steps 4 8 16 --plot fd_vs_k.png                   # quality against K, the number of AR steps
    python fid.py --ckpt teacher.pt --guidance 1 2 3 4 ...     # and against guidance
    python fid.py FOLDER --size 256 --save_stats mine.npz      # statistics of your own images, a later --ref

The same call again goes on where a stopped one was. Rows, with what they were made by and what they mean, are added to
OUT/results.json; the same thing judged again replaces its row.
"""
import argparse
import fcntl
import functools
import gzip
import hashlib
import html
import json
import math
import os
import re
import time
import unicodedata
import zipfile
import zlib
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm import tqdm

from data import (PUBLIC, SPLITS, Parser, check_numbers, disown, file_hash, find_images, load_vae, open_data, own,
                  rank_and_world, read_class_names, read_image, run_main, setup, train_indices)
from model import (ORDERS, UserError, bf16_weights, fill_model, load_mar, read_checkpoint, replacing, save_checkpoint,
                   write_json)
from sample import check_output, check_vae, draw, draw_together, fill_in, save_grid, save_panels

WEIGHTS = {name: place for name, (_, place, _, _) in PUBLIC.items()}  # where --get puts the public files
WEIGHTS["pickscore"] = os.path.dirname(WEIGHTS["pickscore"])  # a folder: weights and config.json
JUDGES = ["inception", "clip", "pickscore", "imagereward", "classifier"]
METRICS = ["fid", "is", "kid", "prc"]  # of inception; prc: precision and recall

# ----------------------------------------------------------------------------------------------------------------------
# Metrics: numbers from features. Float64 on the CPU where a small difference of large numbers is taken.


def as_features(x):
    """(N, F) tensor or array -> float tensor on the CPU; UserError when it is neither finite nor two-dimensional."""
    x = torch.as_tensor(x).detach().cpu()
    if x.ndim != 2 or not x.is_floating_point():
        raise UserError(f"features must be float (N, F), not {x.dtype} {tuple(x.shape)}")
    if not bool(torch.isfinite(x).all()):
        raise UserError("the features hold NaN or infinity: look at the images they were made from")
    return x


def mean_and_covariance(features, chunk=4096):
    """(N, F) features -> mu (F,), sigma (F, F), float64 numpy; N - 1 in the denominator, as numpy.cov."""
    x = as_features(features)
    if len(x) < 2:
        raise UserError(f"a covariance needs at least 2 images, there are {len(x)}: generate or give more")
    mu = sum(part.double().sum(0) for part in x.split(chunk)) / len(x)
    # two passes, in chunks: exact to the last digits, and never a float64 copy of 50,000 x 2,048 numbers
    centred = ((part.double() - mu) for part in x.split(chunk))
    sigma = sum(part.T @ part for part in centred) / (len(x) - 1)
    return mu.numpy(), sigma.numpy()


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(s1 + s2 - 2 (s1 s2)^1/2) of two Gaussians: (F,), (F, F), (F,), (F, F) -> float.

    With A A^T = s1 the product s1 s2 has the eigenvalues of the symmetric A^T s2 A, so two symmetric
    eigen-decompositions do: no general matrix root (scipy's is slower and turns complex), and a singular covariance
    (fewer images than features) needs no special case. FID: Heusel et al. 2017, arXiv 1706.08500.
    """
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(a).double().cpu() for a in (mu1, sigma1, mu2, sigma2))
    if not mu1.shape == mu2.shape == sigma1.shape[:1] or not sigma1.shape == sigma2.shape == (len(mu1), len(mu1)):
        raise UserError(f"cannot compare {len(mu1)} features with {len(mu2)}: the statistics come from other networks")
    if not all(bool(torch.isfinite(a).all()) for a in (mu1, sigma1, mu2, sigma2)):
        raise UserError("the statistics hold NaN or infinity: look at the images they were made from")
    values, vectors = torch.linalg.eigh(sigma1)
    root = vectors * values.clamp(min=0).sqrt()  # A, (F, F); rounding leaves some zero eigenvalues slightly negative
    cross = torch.linalg.eigvalsh(root.T @ sigma2 @ root).clamp(min=0).sqrt().sum()
    return float((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * cross)


def inception_score(logits, splits=10, shuffle=False):
    """exp(mean KL(p(y|x) || p(y))) over contiguous splits of logits (N, classes) -> (mean, std) over the splits.

    shuffle: permute first with numpy's seed 2020, as torch-fidelity does; without, as ADM. Samples in class order need
    it, else each split knows a tenth of the classes. Salimans et al. 2016, arXiv 1606.03498.
    """
    x = as_features(logits)
    if len(x) < splits:
        raise UserError(f"inception score: {len(x)} images cannot be split in {splits}: more images, or leave 'is' out")
    if shuffle:
        x = x[torch.from_numpy(np.random.RandomState(2020).permutation(len(x)))]
    scores = []
    for i in range(splits):
        log_p = x[i * len(x) // splits:(i + 1) * len(x) // splits].double().log_softmax(1)
        p = log_p.exp()
        scores.append(float((p * (log_p - p.mean(0).log())).sum(1).mean().exp()))
    return float(np.mean(scores)), float(np.std(scores))


def kernel_distance(a, b, subsets=100, subset_size=1000, seed=2020):
    """KID: squared MMD of features a (N, F) and b (M, F) under (x.y / F + 1)^3, unbiased -> (mean, std) over subsets.

    Subsets are drawn as torch-fidelity draws them, by its seed. Unlike FID it has no bias from few images, so it may
    be negative. The std is None where a subset is the whole of a set: that set would seem to have no spread.
    Binkowski et al. 2018, arXiv 1801.01401.
    """
    a, b = as_features(a), as_features(b)
    size = min(subset_size, len(a), len(b))
    if size < 2 or a.shape[1] != b.shape[1]:
        raise UserError(f"KID needs two sets of two or more features, not {tuple(a.shape)}, {tuple(b.shape)}")
    random, values = np.random.RandomState(seed), []
    for _ in range(subsets):
        x = a[random.choice(len(a), size, replace=False)].double()
        y = b[random.choice(len(b), size, replace=False)].double()
        k_xx, k_yy, k_xy = (((p @ q.T) / a.shape[1] + 1) ** 3 for p, q in ((x, x), (y, y), (x, y)))  # (size, size)
        # the diagonal, a picture with itself, is what would bias the estimate
        within = (k_xx.sum() - k_xx.trace() + k_yy.sum() - k_yy.trace()) / (size * (size - 1))
        values.append(float(within - 2 * k_xy.mean()))
    return float(np.mean(values)), float(np.std(values)) if size < min(len(a), len(b)) else None


def squared_distances(a, a_norm, b, b_norm):
    """(n, F), (n,), (m, F), (m,) -> (n, m)."""
    return torch.addmm(a_norm[:, None] + b_norm, a, b.T, alpha=-2)


def precision_recall(generated, reference, k=3, chunk=1000):
    """Features (N, F), (M, F) -> (precision, recall) as Kynkaanniemi et al. 2019 define them, arXiv 1904.06991.

    A set's manifold is the union of balls around its features, each reaching to the k-th nearest other one.
    precision = share of the *generated* inside the *reference* manifold; recall = share of the reference inside the
    generated one. (Some forks print them swapped.) A collapsed generator has precision 1 and recall 0.
    """
    a, b = as_features(generated).float(), as_features(reference).float()
    if min(len(a), len(b)) <= k or a.shape[1] != b.shape[1]:
        raise UserError(f"precision/recall with k = {k} needs more than {k} images of one feature width in each set, "
                        f"not {tuple(a.shape)} and {tuple(b.shape)}")
    centre = b.mean(0)  # |a|^2 + |b|^2 - 2ab in float32: near the origin the subtraction loses least
    a, b = a - centre, b - centre
    a_norm, b_norm = a.square().sum(1), b.square().sum(1)

    def radii(x, norm):  # (N,) squared distance to the k-th nearest other feature
        found = []
        for i in range(0, len(x), chunk):  # blockwise: 50,000 x 50,000 distances would be 10 GB
            d = squared_distances(x[i:i + chunk], norm[i:i + chunk], x, norm)
            d[torch.arange(len(d)), torch.arange(i, i + len(d))] = torch.inf  # itself
            found.append(d.topk(k, largest=False).values[:, -1])
        return torch.cat(found)

    a_radius, b_radius = radii(a, a_norm), radii(b, b_norm)
    precise, recalled = 0, torch.zeros(len(b), dtype=torch.bool)
    for i in range(0, len(a), chunk):
        d = squared_distances(a[i:i + chunk], a_norm[i:i + chunk], b, b_norm)  # (chunk, M)
        precise += int((d <= b_radius).any(1).sum())
        recalled |= (d <= a_radius[i:i + chunk, None]).any(0)
    return precise / len(a), float(recalled.float().mean())


# ----------------------------------------------------------------------------------------------------------------------
# Loading foreign weights: renamed by a table, then strict


def renamed(state, table):
    """A state dict, every name put through the substitutions of `table`, [(pattern, replacement)], in order."""
    out = {}
    for name, value in state.items():
        for pattern, replacement in table:
            name = re.sub(pattern, replacement, name)
        out[name] = value
    return out


def need_file(path, name):
    """The path, if it is a file; else a UserError that says how to get it."""
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder, and the file {os.path.basename(PUBLIC[name][1])} is wanted")
    if not os.path.isfile(path):
        raise UserError(f"no such file: {path}; get it by: python data.py --get {name}")
    return path


# ----------------------------------------------------------------------------------------------------------------------
# Inception: the FID network of 2015-12-05, as torch-fidelity and pytorch-fid ported it. Names are the file's.


class Conv(nn.Module):
    """Convolution, batch norm, ReLU. `fold` puts the batch norm into the convolution: the same numbers, half the memory
    traffic."""

    def __init__(self, c_in, c_out, kernel, stride=1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=0.001)

    def fold(self):
        self.conv = nn.utils.fusion.fuse_conv_bn_eval(self.conv, self.bn)
        self.bn = nn.Identity()

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


def mean_pool(x):  # a border pixel is the mean of what there is, not of zeros: TensorFlow's way
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def max_pool(x):
    return F.max_pool2d(x, 3, 1, 1)


# The blocks as tables: a row is a branch, their outputs are concatenated. In a row: (name, channels, kernel, stride,
# padding) one after the other; a list of two tuples splits the branch; a bare function pools first.
ROW, COLUMN, ROW3, COLUMN3 = ((1, 7), 1, (0, 3)), ((7, 1), 1, (3, 0)), ((1, 3), 1, (0, 1)), ((3, 1), 1, (1, 0))


def mixed_a(pool):  # (N, c, 35, 35) -> (N, 224 + pool, 35, 35)
    return [[("branch1x1", 64, 1)],
            [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5, 1, 2)],
            [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3, 1, 1), ("branch3x3dbl_3", 96, 3, 1, 1)],
            [mean_pool, ("branch_pool", pool, 1)]]


def mixed_b():  # (N, 288, 35, 35) -> (N, 768, 17, 17)
    return [[("branch3x3", 384, 3, 2)],
            [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3, 1, 1), ("branch3x3dbl_3", 96, 3, 2)],
            [lambda x: F.max_pool2d(x, 3, 2)]]


def mixed_c(mid):  # (N, 768, 17, 17) -> the same; a 7x7 convolution as two thin ones
    return [[("branch1x1", 192, 1)],
            [("branch7x7_1", mid, 1), ("branch7x7_2", mid, *ROW), ("branch7x7_3", 192, *COLUMN)],
            [("branch7x7dbl_1", mid, 1), ("branch7x7dbl_2", mid, *COLUMN), ("branch7x7dbl_3", mid, *ROW),
             ("branch7x7dbl_4", mid, *COLUMN), ("branch7x7dbl_5", 192, *ROW)],
            [mean_pool, ("branch_pool", 192, 1)]]


def mixed_d():  # (N, 768, 17, 17) -> (N, 1280, 8, 8)
    return [[("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3, 2)],
            [("branch7x7x3_1", 192, 1), ("branch7x7x3_2", 192, *ROW), ("branch7x7x3_3", 192, *COLUMN),
             ("branch7x7x3_4", 192, 3, 2)],
            [lambda x: F.max_pool2d(x, 3, 2)]]


def mixed_e(pool):  # (N, c, 8, 8) -> (N, 2048, 8, 8)
    return [[("branch1x1", 320, 1)],
            [("branch3x3_1", 384, 1), [("branch3x3_2a", 384, *ROW3), ("branch3x3_2b", 384, *COLUMN3)]],
            [("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3, 1, 1),
             [("branch3x3dbl_3a", 384, *ROW3), ("branch3x3dbl_3b", 384, *COLUMN3)]],
            [pool, ("branch_pool", 192, 1)]]


class Mixed(nn.Module):
    """One block of such a table on c channels."""

    def __init__(self, c, table):
        super().__init__()
        self.table = table
        for row in table:
            channels = c
            for step in row:
                if not callable(step):
                    for name, *shape in step if isinstance(step, list) else [step]:
                        setattr(self, name, Conv(channels, *shape))
                    channels = shape[0]

    def forward(self, x):
        outs = []
        for row in self.table:
            y = x
            for step in row:
                if callable(step):
                    y = step(y)
                elif isinstance(step, list):
                    y = torch.cat([getattr(self, name)(y) for name, *_ in step], 1)
                else:
                    y = getattr(self, step[0])(y)
            outs.append(y)
        return torch.cat(outs, 1)


def resize_tf1(x, side=299):
    """(N, 3, H, W) float -> (N, 3, side, side): TensorFlow 1's bilinear, corners at pixel corners, no half-pixel shift
    and no antialiasing. The published FIDs were made with it; PIL or F.interpolate give other numbers."""
    for dim in (3, 2):  # x first, then y
        size = x.shape[dim]
        at = torch.arange(side, device=x.device, dtype=torch.float32) * (size / side)
        low = at.floor().long().clamp(max=size - 1)
        weight = (at - low).view(-1, 1) if dim == 2 else at - low
        x_low = x.index_select(dim, low)
        x = x_low + (x.index_select(dim, (low + 1).clamp(max=size - 1)) - x_low) * weight
    return x


class Inception(nn.Module):
    """uint8 images (N, 3, H, W) of any size -> (pool (N, 2048), logits without bias (N, 1008)), float32."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3, self.Conv2d_2a_3x3 = Conv(3, 32, 3, 2), Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, 1, 1)
        self.Conv2d_3b_1x1, self.Conv2d_4a_3x3 = Conv(64, 80, 1), Conv(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c = Mixed(192, mixed_a(32)), Mixed(256, mixed_a(64))
        self.Mixed_5d, self.Mixed_6a = Mixed(288, mixed_a(64)), Mixed(288, mixed_b())
        self.Mixed_6b, self.Mixed_6c = Mixed(768, mixed_c(128)), Mixed(768, mixed_c(160))
        self.Mixed_6d, self.Mixed_6e = Mixed(768, mixed_c(160)), Mixed(768, mixed_c(192))
        # the last block pools by maximum: a slip of the original network, but the weights were trained with it
        self.Mixed_7a, self.Mixed_7b, self.Mixed_7c = (Mixed(768, mixed_d()), Mixed(1280, mixed_e(mean_pool)),
                                                       Mixed(2048, mixed_e(max_pool)))
        self.fc = nn.Linear(2048, 1008)

    @torch.no_grad()
    def forward(self, images):
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise UserError(f"Inception reads uint8 (N, 3, H, W), not {images.dtype} {tuple(images.shape)}: "
                            "round float images to 0..255 first, as the published numbers do")
        x = resize_tf1(images.to(self.fc.weight.device).float())
        x = ((x - 128) / 128).contiguous(memory_format=torch.channels_last)
        # TF32 and autocast would each move FID in the second decimal
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False), torch.autocast(x.device.type, enabled=False):
            x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (N, 64, 147, 147)
            x = F.max_pool2d(x, 3, 2)
            x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))  # (N, 192, 71, 71)
            x = F.max_pool2d(x, 3, 2)
            for block in (self.Mixed_5b, self.Mixed_5c, self.Mixed_5d, self.Mixed_6a, self.Mixed_6b, self.Mixed_6c,
                          self.Mixed_6d, self.Mixed_6e, self.Mixed_7a, self.Mixed_7b, self.Mixed_7c):
                x = block(x)
            pool = x.mean((2, 3))  # (N, 2048)
            return pool, self.logits(pool)

    def logits(self, pool):
        """(N, 2048) -> (N, 1008). The inception score leaves the bias out: so did the original code. In float64, or
        a GPU's TF32 setting would show."""
        return (pool.to(self.fc.weight.device).double() @ self.fc.weight.double().T).float()


def load_inception(path):
    """The Inception of torch-fidelity's or pytorch-fid's weight file. A hash in the file's name is verified."""
    digest = re.search(r"-([0-9a-f]{8,64})\.\w+$", os.path.basename(path))
    state = read_checkpoint(need_file(path, "inception"))
    if digest and not file_hash(path).startswith(digest[1]):
        raise UserError(f"{path}: its sha256 is {file_hash(path)[:8]}..., its name says {digest[1]}: get it again")
    model = fill_model(Inception, state, path)
    for module in model.modules():
        if isinstance(module, Conv):
            module.fold()
    return model.to(memory_format=torch.channels_last).requires_grad_(False)


# ----------------------------------------------------------------------------------------------------------------------
# A small classifier of the data set: the judge of the small runs. Inception was trained on 299 px photographs and says
# little about 16 px shapes; a network that has learnt the data's own classes gives features that matter there, and
# tells besides whether a picture shows the class that was asked for. Its distance is called FD, never FID.


class Classifier(nn.Module):
    """uint8 or float-in-[0,1] images (N, 3, side, side) -> features (N, 4 * width), logits (N, classes).

    Five 3x3 convolutions with batch norm and a mean over what is left of the image: small enough to be trained on one
    CPU core in minutes. Features are the 96 averaged channels before the last layer; 2,048 images are 20 times that,
    so their covariance is well determined. They are scaled to a mean variance of 1 on the training images, or the size
    of a distance would depend on the weight decay: FD 96 is one standard deviation off in every feature.
    """

    def __init__(self, num_classes, img_size, width=24):
        super().__init__()
        self.num_classes, self.img_size = num_classes, img_size
        self.accuracy = self.reference = None  # `train_classifier` finds them
        layers, channels = [], 3
        for out, stride in ((width, 1), (2 * width, 2), (2 * width, 1), (4 * width, 2), (4 * width, 1)):
            layers += [nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
            channels = out
        # channels last: 1.5x faster on a CPU for so few channels
        self.body = nn.Sequential(*layers).to(memory_format=torch.channels_last)
        self.last = nn.Linear(channels, num_classes)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, images):
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, self.img_size, self.img_size):
            raise UserError(f"this classifier reads images of {self.img_size} px, not {tuple(images.shape)}")
        if images.dtype == torch.uint8:
            images = images.float() / 255
        x = images.to(self.last.weight.device, torch.float32) * 2 - 1
        features = self.body(x.contiguous(memory_format=torch.channels_last)).mean((2, 3))  # (N, 4 * width)
        return features * self.scale, self.last(features)


def train_classifier(data, seed, device, batch=128):
    """Train a Classifier on a data set of pixels -> it, in eval mode.

    Its `.accuracy` is that on images it has not seen: the test split, or every 20th training image where there is none.
    Its `.reference` is (mu, sigma) of its features of 10,000 training images: what `judge` compares with.
    """
    indices = np.arange(len(data))
    if data.name in ("shapes", "cifar10") or any((Path(data.name) / split).is_dir() for split in SPLITS["test"]):
        test = open_data(data.name, "test", data.img_size, pixels=data.pixels)
        if test.class_names != data.class_names:  # numbered by its own folders: a missing one would shift the others
            raise UserError(f"{data.name}: the classes of its test split are not those of train: "
                            f"{sorted(set(test.class_names) ^ set(data.class_names))[:5]}; make them alike")
        held = np.linspace(0, len(test) - 1, min(len(test), 5000)).astype(int)
    else:
        test, held, indices = data, indices[::20], indices[indices % 20 > 0]
    with torch.random.fork_rng(devices=[]):  # the caller's random state is left alone: resume stays bit-exact
        torch.manual_seed(seed)
        net = Classifier(data.num_classes, data.img_size).to(device)
    # 240 training images a pixel of an image: 61 k for 16 px shapes, 246 k (5 epochs) for CIFAR-10
    steps = 240 * min(data.img_size, 32) ** 2 // batch
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps, pct_start=0.25)
    labels = torch.as_tensor(data.labels)
    bar = tqdm(range(steps), desc=f"classifier {seed}", unit="step", leave=False, mininterval=1)
    for step in bar:
        picks, flips = train_indices(len(indices), batch, step, seed)
        picks = indices[picks]
        images = data.images(picks)
        images = torch.where(torch.as_tensor(flips)[:, None, None, None], images.flip(3), images)
        loss = F.cross_entropy(net(images.to(device))[1], labels[picks].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    net.eval().requires_grad_(False)
    net.scale.fill_(float((net.last.in_features / np.trace(feature_statistics(net, data, 5000)[1])) ** 0.5))
    hits = [net(test.images(part).to(device))[1].argmax(1).cpu() == torch.as_tensor(test.labels[part])
            for part in np.array_split(held, -(-len(held) // 500))]
    net.accuracy = float(torch.cat(hits).float().mean())
    net.reference = feature_statistics(net, data)
    return net


def fingerprint(data):
    """(256, 3) mean colours of images spread evenly over a data set: other pictures under the same names change it,
    another decoder of JPEG hardly."""
    return data.images(np.linspace(0, len(data) - 1, 256).astype(int)).float().mean((2, 3)) / 255


def load_classifier(path):
    """The Classifier in a file of `load_or_train_classifier`, without its data set, on the CPU. `.reference` is None in
    files of before it was kept."""
    saved = read_checkpoint(path)
    if not {"made_from", "accuracy", "model"} <= set(saved):
        raise UserError(f"{path} holds no classifier but {sorted(map(str, saved))[:6]}")
    made_from = saved["made_from"]
    net = fill_model(lambda: Classifier(len(made_from["classes"]), made_from["img_size"]), saved["model"], path)
    net.accuracy = saved["accuracy"]
    net.reference = tuple(x.numpy() for x in saved["reference"]) if "reference" in saved else None
    return net.to(memory_format=torch.channels_last)


def load_or_train_classifier(data, folder, seed=0, device="cpu"):
    """The Classifier of `data` (a train split of pixels), from folder/classifier_<seed>.pt, or trained and put there.

    Classifiers of two seeds are two independent judges: train against one, report the other. No collective call is
    made here, so one rank or all ranks may call it.
    """
    if not data.pixels:
        raise UserError("the small classifier reads pixels, and this data set holds latents: judge with inception")
    made_from = {"data": Path(data.name).name, "img_size": int(data.img_size), "classes": [*map(str, data.class_names)],
                 "images": len(data), "seed": int(seed), "recipe": 1}
    path = Path(folder) / f"classifier_{seed}.pt"
    if path.exists():
        saved = read_checkpoint(path)
        if saved.get("made_from") != made_from:
            raise UserError(f"{path} was made from {saved.get('made_from')}, wanted is {made_from}: delete that file")
        if "fingerprint" in saved and (saved["fingerprint"] - fingerprint(data)).abs().max() > 0.02:
            raise UserError(f"{path} was made from other pictures than {data.name} holds now: delete that file")
        net = load_classifier(path).to(device)
        net.reference = net.reference or feature_statistics(net, data)
        return net
    net = train_classifier(data, seed, device)
    os.makedirs(folder, exist_ok=True)
    save_checkpoint({"made_from": made_from, "fingerprint": fingerprint(data), "accuracy": net.accuracy,
                     "reference": tuple(map(torch.from_numpy, net.reference)), "model": net.cpu().state_dict()}, path)
    print(f"classifier {seed} of {data.name}: test accuracy {net.accuracy:.4f}, saved as {path}", flush=True)
    return net.to(device)


@torch.no_grad()
def classify(classifier, images, batch=500):
    """uint8 or float images (N, 3, H, W) -> features (N, F), logits (N, classes), float32 on the CPU."""
    parts = [classifier(part) for part in images.split(batch)]
    return torch.cat([f for f, _ in parts]).cpu(), torch.cat([y for _, y in parts]).cpu()


def feature_statistics(classifier, images, n=10000):
    """(mu (F,), sigma (F, F)) float64 of the classifier's features of images: a uint8 (N, 3, H, W) tensor, or a data
    set, of which at most `n` images, evenly spread over it, are read."""
    if torch.is_tensor(images):
        return mean_and_covariance(classify(classifier, images[:n])[0])
    picked = np.linspace(0, len(images) - 1, min(n, len(images))).astype(np.int64)
    parts = np.array_split(picked, -(-len(picked) // 500))
    return mean_and_covariance(torch.cat([classify(classifier, images.images(part))[0] for part in parts]))


def judge(classifier, images, labels, reference):
    """{"fd", "accuracy"} of uint8 images (N, 3, H, W) that were asked to show labels (N,); reference = (mu, sigma)."""
    features, logits = classify(classifier, images)
    accuracy = float((logits.argmax(1) == torch.as_tensor(labels).cpu()).float().mean())
    return {"fd": frechet_distance(*mean_and_covariance(features), *reference), "accuracy": accuracy}


# ----------------------------------------------------------------------------------------------------------------------
# CLIP, and PickScore, which is a CLIP: do picture and prompt belong together?

PIXEL_MEAN, PIXEL_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # openai/CLIP


def clip_pixels(pixels, side):
    """[0,1] (N, 3, H, W) -> normalised (N, 3, side, side): short side by bicubic, centre crop, CLIP's mean and std.

    Differentiable. Pillow's bicubic, which the public code uses, has the same kernel and antialiasing but rounds to 8
    bits after each direction: at most 1.2/255 apart, 0.3/255 on average (test_all.py).
    """
    h, w = pixels.shape[2:]
    if (h, w) != (side, side):
        size = (side, int(side * w / h)) if h <= w else (int(side * h / w), side)
        for part in ((h, size[1]), size):  # rows first, then columns, cut to the range after each, as Pillow does
            pixels = F.interpolate(pixels, part, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        top, left = round((size[0] - side) / 2), round((size[1] - side) / 2)
        pixels = pixels[:, :, top:top + side, left:left + side]
    mean, std = (torch.tensor(v, device=pixels.device).view(3, 1, 1) for v in (PIXEL_MEAN, PIXEL_STD))
    return (pixels - mean) / std


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    """Pre-norm transformer block of CLIP, PickScore and BLIP's image tower: (N, T, width) -> the same."""

    def __init__(self, width, heads, mlp, act, eps):
        super().__init__()
        self.heads, self.act = heads, act
        self.norm1, self.norm2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, mlp), nn.Linear(mlp, width)

    def forward(self, x, causal=False):
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (N, heads, T, d)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        x = x + self.proj(out.transpose(1, 2).flatten(2))
        return x + self.fc2(self.act(self.fc1(self.norm2(x))))


class ImageTower(nn.Module):
    """[0,1] pixels (N, 3, H, W) -> normed tokens (N, 1 + patches, width), the class token first.

    clip: a norm before the blocks and no bias in the patch embedding; BLIP has it the other way round.
    """

    def __init__(self, width, depth, heads, mlp, patch, tokens, act, eps, clip=True):
        super().__init__()
        self.side = patch * math.isqrt(tokens - 1)  # pixels
        self.patch = nn.Conv2d(3, width, patch, patch, bias=not clip)
        self.class_token, self.position = nn.Parameter(torch.empty(width)), nn.Parameter(torch.empty(tokens, width))
        self.norm_pre = nn.LayerNorm(width, eps) if clip else nn.Identity()
        self.blocks = nn.ModuleList(Block(width, heads, mlp, act, eps) for _ in range(depth))
        self.norm_post = nn.LayerNorm(width, eps)

    def forward(self, pixels):
        x = self.patch(clip_pixels(pixels, self.side)).flatten(2).transpose(1, 2)  # (N, patches, width)
        x = torch.cat([self.class_token.expand(len(x), 1, -1), x], 1)  # (N, 1 + patches, width)
        x = self.norm_pre(x + self.position)
        for block in self.blocks:
            x = block(x)
        return self.norm_post(x)


class TextTower(nn.Module):
    """ids (N, T <= 77) -> (N, width) at the end-of-text token; causal."""

    def __init__(self, width, depth, heads, mlp, vocabulary, tokens, act, eps):
        super().__init__()
        self.tokens, self.position = nn.Embedding(vocabulary, width), nn.Parameter(torch.empty(tokens, width))
        self.blocks = nn.ModuleList(Block(width, heads, mlp, act, eps) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps)

    def forward(self, ids):
        x = self.tokens(ids) + self.position[:ids.shape[1]]
        for block in self.blocks:
            x = block(x, causal=True)
        # the end of text is the largest id; argmax finds the first, so Hugging Face's padding by it changes nothing
        return self.norm(x)[torch.arange(len(x), device=x.device), ids.argmax(1)]


class CLIP(nn.Module):
    """Image and text towers with a common space of E dimensions."""

    def __init__(self, image, text, embed):
        super().__init__()
        self.image, self.text = ImageTower(**image), TextTower(**text)
        self.image_proj = nn.Parameter(torch.empty(image["width"], embed))
        self.text_proj = nn.Parameter(torch.empty(text["width"], embed))
        self.logit_scale = nn.Parameter(torch.empty(()))

    def encode_image(self, pixels):
        """Pixels in [0,1] (N, 3, H, W), any size -> features (N, E), not normalised."""
        return self.image(pixels)[:, 0] @ self.image_proj

    def encode_text(self, ids):
        """Token ids (N, T <= 77) -> features (N, E), not normalised."""
        return self.text(ids) @ self.text_proj

    def score(self, pixels, text_features):
        """exp(logit_scale) * cosine of N pictures with N texts (N, E) -> (N,): 100 * cosine with the released weights.
        CLIP score and PickScore are this one formula."""
        image = F.normalize(self.encode_image(pixels), dim=1)
        return self.logit_scale.exp() * (image * F.normalize(text_features, dim=1)).sum(1)


COMMON = [(r"attn\.in_proj_", "qkv."), (r"(self_)?attn\.out_proj", "proj"), (r"(ln_|layer_norm)([12])\.", r"norm\2."),
          (r"mlp\.c_fc", "fc1"), (r"mlp\.c_proj", "fc2"), (r"mlp\.fc", "fc")]
OPENAI_NAMES = COMMON + [
    (r"^visual\.transformer\.resblocks", "image.blocks"), (r"^visual\.conv1", "image.patch"),
    (r"^visual\.class_embedding", "image.class_token"), (r"^visual\.positional_embedding", "image.position"),
    (r"^visual\.ln_", "image.norm_"), (r"^visual\.proj", "image_proj"), (r"^transformer\.resblocks", "text.blocks"),
    (r"^token_embedding", "text.tokens"), (r"^positional_embedding", "text.position"), (r"^ln_final", "text.norm"),
    (r"^text_projection", "text_proj")]
HF_NAMES = COMMON + [
    (r"^vision_model\.embeddings\.patch_embedding", "image.patch"), (r"^vision_model\.encoder\.layers", "image.blocks"),
    (r"^vision_model\.embeddings\.class_embedding", "image.class_token"),
    (r"^vision_model\.embeddings\.position_embedding\.weight", "image.position"),
    (r"^vision_model\.pre_layrnorm", "image.norm_pre"),  # the typing error is in the public files
    (r"^vision_model\.post_layernorm", "image.norm_post"), (r"^visual_projection\.weight", "image_proj"),
    (r"^text_model\.embeddings\.token_embedding", "text.tokens"), (r"^text_model\.encoder\.layers", "text.blocks"),
    (r"^text_model\.embeddings\.position_embedding\.weight", "text.position"),
    (r"^text_model\.final_layer_norm", "text.norm"), (r"^text_projection\.weight", "text_proj")]


def build_clip(state, path, image_heads, text_heads, image_act, text_act, image_eps=1e-5, text_eps=1e-5):
    """A CLIP whose sizes are read off a renamed state dict; heads, activation and eps are in no shape."""
    try:
        sizes = {}
        for tower, heads, act, eps in (("image", image_heads, image_act, image_eps),
                                       ("text", text_heads, text_act, text_eps)):
            depth = len({name.split(".")[2] for name in state if name.startswith(f"{tower}.blocks.")})
            mlp, width = state[f"{tower}.blocks.0.fc1.weight"].shape
            if heads(width) < 1 or width % heads(width):
                raise UserError(f"{path}: {heads(width)} heads do not divide the {tower} tower's width of {width}")
            sizes[tower] = {"width": width, "depth": depth, "mlp": mlp, "eps": eps, "act": act, "heads": heads(width),
                            "tokens": len(state[f"{tower}.position"])}
        image = {**sizes["image"], "patch": state["image.patch.weight"].shape[-1]}
        text = {**sizes["text"], "vocabulary": len(state["text.tokens.weight"])}
        embed = state["image_proj"].shape[1]
    except KeyError as error:
        raise UserError(f"{path} is no CLIP file: {error.args[0]} missing") from None
    return fill_model(lambda: CLIP(image, text, embed), state, path)


def openai_clip(state, path):
    """A CLIP of a state dict in OpenAI's names: all of theirs have heads of 64 and the quick GELU."""
    heads = lambda width: width // 64
    return build_clip(renamed(state, OPENAI_NAMES), path, heads, heads, quick_gelu, quick_gelu)


def read_clip(path):
    """The state dict of an OpenAI file, which is a TorchScript archive, or of a plain one -> (state, is plain)."""
    need_file(path, "clip")
    try:
        inside = zipfile.ZipFile(path).namelist() if zipfile.is_zipfile(path) else []
        plain = not any(name.endswith("/constants.pkl") for name in inside)
        # TorchScript's own reader, not Python's pickle; only the numbers are taken, its forward is never called
        state = read_checkpoint(path) if plain else torch.jit.load(path, map_location="cpu").state_dict()
    except (RuntimeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is no whole TorchScript archive: {str(error).splitlines()[0][:100]}") from None
    return {k: v for k, v in state.items() if k not in ("input_resolution", "context_length", "vocab_size")}, plain


# Widths of image tower, text tower and common space, tokens a text, vocabulary. B/32 and B/16; L/14 and L/14@336px
OPENAI_SIZES = {(768, 512, 512, 77, 49408), (1024, 768, 768, 77, 49408)}


def load_clip(path):
    """An OpenAI CLIP: their .pt files, which are TorchScript archives, or a plain state dict (torch file or
    .safetensors) in their names.

    open_clip's and LAION's files have the same names and, for ViT-B and ViT-L, the same shapes. Most of theirs were
    trained with GELU, which no file tells: scores would be slightly wrong. So a plain state dict is taken for OpenAI's
    and that is printed, and whatever OpenAI never made (ViT-H, ViT-g, other contexts or vocabularies) is refused.
    """
    state, plain = read_clip(path)
    clip = openai_clip(state, path)
    sizes = (len(clip.image_proj), *clip.text_proj.shape, len(clip.text.position), len(clip.text.tokens.weight))
    if sizes not in OPENAI_SIZES:
        raise UserError(f"{path} is no CLIP of OpenAI's, who made none of sizes {sizes}; those of open_clip and LAION "
                        "have another activation or other heads, which no file tells")
    if plain and rank_and_world()[0] == 0:
        print(f"{path}: a plain state dict, taken for OpenAI's: quick GELU, heads of 64. Of open_clip and LAION most "
              "are not so", flush=True)
    return clip


def hf_tower(config, tower, heads, path):
    """(heads, activation, eps) of one tower in a Hugging Face CLIP configuration.

    As in transformers, `<tower>_config_dict` has the whole say where it is there, and what is left out has the default.
    """
    part = config.get(f"{tower}_config_dict")
    part = config.get(f"{tower}_config") if part is None else part
    if not isinstance(part, dict):
        raise UserError(f"{path} is no CLIP configuration: its {tower}_config is {json.dumps(part)[:40]}")
    acts = {"gelu": F.gelu, "quick_gelu": quick_gelu}
    act, eps = part.get("hidden_act", "quick_gelu"), part.get("layer_norm_eps", 1e-5)
    heads = part.get("num_attention_heads", heads)
    if act not in list(acts) or type(heads) is not int or type(eps) is not float:
        raise UserError(f"{path}: {tower}_config has hidden_act {act} (known: {', '.join(acts)}), num_attention_heads "
                        f"{heads}, layer_norm_eps {eps}")
    return heads, acts[act], eps


def read_sharded(folder, names):
    """{name: tensor} of a Hugging Face folder: of the first file in it of `names`, or of the shards that its index
    (the name and .index.json) lists; None where there is neither."""
    for name in names:
        index = folder / f"{name}.index.json"
        if (folder / name).exists():
            return read_checkpoint(folder / name)
        if index.exists():
            try:
                shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
                return {name: value for shard in shards for name, value in read_checkpoint(folder / shard).items()}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{index} is no index of shards: {str(error)[:100]}") from None
    return None


def load_pickscore(folder):
    """A Hugging Face CLIP folder, as PickScore's: config.json beside model.safetensors or pytorch_model.bin, in one
    file or in shards with an index."""
    folder = Path(folder)
    path = need_file(folder / "config.json", "pickscore_config")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is no JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} is no CLIP configuration but a {type(config).__name__}")
    image = hf_tower(config, "vision", 12, path)
    text = hf_tower(config, "text", 8, path)
    state = read_sharded(folder, ["model.safetensors", "pytorch_model.bin"])
    if state is None:
        need_file(folder / "model.safetensors", "pickscore")
    state = renamed({k: v for k, v in state.items() if not k.endswith("position_ids")}, HF_NAMES)
    for name in [name for name in state if ".self_attn.q_proj." in name]:  # three matrices there, one here
        parts = [name.replace("q_proj", f"{p}_proj") for p in "qkv"]
        if all(part in state for part in parts):
            state[name.replace("self_attn.q_proj", "qkv")] = torch.cat([state.pop(part) for part in parts])
    for name in ("image_proj", "text_proj"):  # stored as nn.Linear: the transpose of OpenAI's
        if name in state:
            state[name] = state[name].T.contiguous()
    return build_clip(state, folder, lambda _: image[0], lambda _: text[0], image[1], text[1], image[2], text[2])


class Tokenizer:
    """CLIP's byte-pair encoding: Tokenizer(bpe_path)(texts) -> ids (N, 77) long.

    The public code cleans text with ftfy and splits it with `regex`. Here the standard library does both, alike for
    every character of Unicode 14. What is not done is ftfy's repair of mojibake (text once decoded by the wrong code
    page, as "cafÃ©"), and its rule that text with a "<" is HTML, whose entities it leaves until after its other work.
    """

    def __init__(self, path):
        try:
            with gzip.open(need_file(path, "bpe"), "rt", encoding="utf-8") as file:
                merges = [tuple(line.split()) for line in file.read().split("\n")[1:49152 - 256 - 2 + 1]]
        except (gzip.BadGzipFile, EOFError, ValueError, zlib.error) as error:
            raise UserError(f"{path} is no gzipped merge table: {error}") from None
        if len(merges) != 48894 or any(len(pair) != 2 for pair in merges):
            raise UserError(f"{path} is not CLIP's merge table: it has {len(merges)} pairs, 48894 are wanted")
        # every byte gets a printable character: itself where it has one, else the next free one from 256 on (GPT-2)
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [b for b in range(256) if b not in printable]
        self.byte = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
        symbols = [self.byte[b] for b in printable + others]
        words = symbols + [s + "</w>" for s in symbols] + ["".join(pair) for pair in merges]
        words += ["<|startoftext|>", "<|endoftext|>"]
        self.ids = {word: i for i, word in enumerate(words)}
        self.rank = {pair: i for i, pair in enumerate(merges)}
        self.known = {"<|startoftext|>": ["<|startoftext|>"], "<|endoftext|>": ["<|endoftext|>"]}

    @staticmethod
    def clean(text):
        text = html.unescape(html.unescape(text))
        text = re.sub(r"\x1b\[[\d;]*[a-zA-Z]", "", text)  # a terminal's colours
        # as browsers do: a control character of Latin-1 is meant as what Windows has in its place
        text = re.sub("[\x80-\x9f]", lambda m: html.unescape(f"&#{ord(m[0])};"), text)
        # ligatures and full-width letters are taken apart before quotes are straightened: U+0149 has one in it
        text = re.sub("[\u0132\u0133\u0149\u01c4-\u01cc\u01f1-\u01f3\ufb00-\ufb04\ufb06\uff01-\uffef\u3000]",
                      lambda m: unicodedata.normalize("NFKC", m[0]), text.replace("\ufb05", "\u017ft"))
        text = re.sub("[\u02bc\u2018-\u201b]", "'", re.sub("[\u201c-\u201f]", '"', text))
        text = re.sub("[\0-\x08\x0b\x0e-\x1f\x7f\u206a-\u206f\ufeff\ufff9-\ufffc]", "", text)
        return " ".join(unicodedata.normalize("NFC", text).split()).lower()

    @staticmethod
    def split(text):
        """Words by the public pattern: special tokens, 's 't 're 've 'm 'll 'd, letters, single digits, the rest."""
        space = lambda c: c.isspace() or c == "\u0345"  # which `regex` counts in none of the pattern's kinds
        kinds = "".join({"L": "L", "N": "N"}.get(unicodedata.category(c)[0], "_" if space(c) else "x") for c in text)
        at = 0
        while at < len(text):
            special = re.compile(r"<\|startoftext\|>|<\|endoftext\|>|'(?:s|t|re|ve|m|ll|d)").match(text, at)
            run = re.compile("L+|N|x+|_+").match(kinds, at)
            end = (special or run).end()
            if kinds[at] != "_":
                yield text[at:end]
            at = end

    def pieces(self, word):
        """One word -> its byte-pair pieces: the earliest merge of the table first, until none applies."""
        if word in self.known:
            return self.known[word]
        parts = [self.byte[b] for b in word.encode(errors="replace")]  # a class's name may hold bytes of no encoding
        parts[-1] += "</w>"
        while len(parts) > 1:
            best = min(zip(parts, parts[1:]), key=lambda pair: self.rank.get(pair, math.inf))
            if best not in self.rank:
                break
            merged, i = [], 0
            while i < len(parts):
                hit = tuple(parts[i:i + 2]) == best
                merged.append(parts[i] + parts[i + 1] if hit else parts[i])
                i += 2 if hit else 1
            parts = merged
        self.known[word] = parts
        return parts

    def __call__(self, texts, length=77):
        out = torch.zeros(len(texts), length, dtype=torch.long)
        start, end = self.ids["<|startoftext|>"], self.ids["<|endoftext|>"]
        for row, text in zip(out, texts):
            ids = [self.ids[piece] for word in self.split(self.clean(text)) for piece in self.pieces(word)]
            ids = [start, *ids[:length - 2], end]  # too long a text is cut, its end marked all the same
            row[:len(ids)] = torch.tensor(ids)
        return out


# ----------------------------------------------------------------------------------------------------------------------
# ImageReward: BLIP's image tower, a BERT that looks at it, and a line of weights: what would people prefer?


class BertAttention(nn.Module):
    """x (N, T, 768) asks, `source` (N, S, C) answers, post-norm; bias (N, 1, 1, S) is added to the scores."""

    def __init__(self, source_width):
        super().__init__()
        self.query, self.dense = nn.Linear(768, 768), nn.Linear(768, 768)
        self.key, self.value = nn.Linear(source_width, 768), nn.Linear(source_width, 768)
        self.LayerNorm = nn.LayerNorm(768, 1e-12)

    def forward(self, x, source, bias=None):
        q, k, v = self.query(x), self.key(source), self.value(source)
        q, k, v = (y.unflatten(2, (12, 64)).transpose(1, 2) for y in (q, k, v))  # (N, 12, T or S, 64)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)  # (N, 12, T, 64)
        return self.LayerNorm(x + self.dense(out.transpose(1, 2).flatten(2)))


class BertLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.crossattention = BertAttention(768), BertAttention(1024)
        self.fc1, self.fc2, self.norm = nn.Linear(768, 3072), nn.Linear(3072, 768), nn.LayerNorm(768, 1e-12)

    def forward(self, x, bias, image):
        x = self.crossattention(self.attention(x, x, bias), image)
        return self.norm(x + self.fc2(F.gelu(self.fc1(x))))


class ImageReward(nn.Module):
    """THUDM/ImageReward, Xu et al. 2023, arXiv 2304.05977."""

    def __init__(self):
        super().__init__()
        self.image = ImageTower(1024, 24, 16, 4096, 16, 197, F.gelu, 1e-6, clip=False)
        self.words, self.positions = nn.Embedding(30524, 768), nn.Embedding(512, 768)
        self.norm = nn.LayerNorm(768, 1e-12)
        self.layers = nn.ModuleList(BertLayer() for _ in range(12))
        # linear after linear: the activations are commented out in the public code, and the weights are trained so;
        # the numbers are the places in the public list, dropouts between them
        sizes = {"0": (768, 1024), "2": (1024, 128), "4": (128, 64), "6": (64, 16), "7": (16, 1)}
        self.mlp = nn.ModuleDict({place: nn.Linear(*size) for place, size in sizes.items()})

    def read_text(self, input_ids, attention_mask, image):
        """(N, T) ids, (N, T) 1 = a word, image tokens (N, 197, 1024) -> the last state at [CLS], (N, 768)."""
        x = self.norm(self.words(input_ids) + self.positions.weight[:input_ids.shape[1]])  # (N, T, 768)
        bias = (1.0 - attention_mask[:, None, None].to(x.dtype)) * -10000
        for layer in self.layers:
            x = layer(x, bias, image)
        return x[:, 0]

    def score(self, pixels, input_ids, attention_mask):
        """Pixels in [0,1] (N, 3, H, W) and WordPiece ids (N, 35) -> (N,): about mean 0, variance 1 on its own data."""
        x = self.read_text(input_ids, attention_mask, self.image(pixels))
        for layer in self.mlp.values():
            x = layer(x)
        return (x[:, 0] - 0.16717362830052426) / 1.0333394966054072  # the public constants


BLIP_NAMES = [
    (r"^blip\.visual_encoder\.cls_token", "image.class_token"), (r"^blip\.visual_encoder\.pos_embed", "image.position"),
    (r"^blip\.visual_encoder\.patch_embed\.proj", "image.patch"),
    (r"^blip\.visual_encoder\.norm\.", "image.norm_post."), (r"^blip\.visual_encoder\.", "image."),
    (r"\.attn\.(qkv|proj)", r".\1"), (r"\.mlp\.fc", ".fc"),
    (r"^blip\.text_encoder\.embeddings\.word_embeddings", "words"), (r"attention\.(self|output)\.", "attention."),
    (r"^blip\.text_encoder\.embeddings\.position_embeddings", "positions"), (r"\.output\.dense", ".fc2"),
    (r"^blip\.text_encoder\.embeddings\.LayerNorm", "norm"), (r"\.intermediate\.dense", ".fc1"),
    (r"^blip\.text_encoder\.encoder\.layer\.", "layers."), (r"(layers\.\d+)\.output\.LayerNorm", r"\1.norm"),
    (r"^mlp\.layers\.", "mlp.")]


def load_imagereward(path):
    """ImageReward.pt, a plain state dict. Its contrastive projections have no part in the reward and are left out."""
    state = read_checkpoint(need_file(path, "imagereward"))
    unused = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")
    state = renamed({k: v for k, v in state.items() if not k.startswith(unused)}, BLIP_NAMES)
    for name in ("image.class_token", "image.position"):
        if name in state:
            state[name] = state[name].squeeze()  # (1, 197, 1024) -> (197, 1024)
    return fill_model(ImageReward, state, path)


class WordPiece:
    """bert-base-uncased's tokenizer from its vocab.txt: WordPiece(path)(texts) -> ids (N, 35), mask (N, 35), long."""

    def __init__(self, path):
        try:
            words = Path(need_file(path, "imagereward_vocab")).read_text(encoding="utf-8").split("\n")
        except UnicodeDecodeError:
            raise UserError(f"{path} is no BERT vocabulary: not a text file") from None
        self.ids = {word.rstrip("\r"): i for i, word in enumerate(words) if word.strip()}
        missing = [word for word in ("[PAD]", "[UNK]", "[CLS]", "[SEP]") if word not in self.ids]
        if missing:
            raise UserError(f"{path} is no BERT vocabulary: {' '.join(missing)} missing")

    @staticmethod
    def words(text):
        """Lower case without accents, split at spaces, around punctuation and around every Chinese character. Of the
        control characters tab, newline and return are spaces, the others are dropped."""
        text = "".join(c for c in text if c in "\t\n\r" or unicodedata.category(c)[0] != "C" and c != "\ufffd")
        text = unicodedata.normalize("NFD", text.lower())
        out = []
        for c in text:
            category = unicodedata.category(c)
            if category == "Mn":  # an accent, parted from its letter by NFD
                continue
            cjk = 0x4E00 <= ord(c) <= 0x9FFF or 0x3400 <= ord(c) <= 0x4DBF or 0xF900 <= ord(c) <= 0xFAFF \
                or 0x20000 <= ord(c) <= 0x2CEAF or 0x2F800 <= ord(c) <= 0x2FA1F
            # BERT counts every ASCII sign as punctuation, $ + ~ and so on too
            alone = category[0] == "P" or cjk or c.isascii() and c.isprintable() and not c.isalnum() and c != " "
            out.append(f" {c} " if alone else c)
        return "".join(out).split()

    def pieces(self, word):
        """The longest known beginning, then the longest known ##continuation, ...; one gap and all is [UNK]."""
        found, start = [], 0
        while start < len(word) <= 100:
            stop = next((stop for stop in range(len(word), start, -1)
                         if ("##" if start else "") + word[start:stop] in self.ids), None)
            if stop is None:
                return [self.ids["[UNK]"]]
            found.append(self.ids[("##" if start else "") + word[start:stop]])
            start = stop
        return found or [self.ids["[UNK]"]]

    def __call__(self, texts, length=35):
        ids = torch.full((len(texts), length), self.ids["[PAD]"])
        mask = torch.zeros_like(ids)
        for i, text in enumerate(texts):
            found = [piece for word in self.words(text) for piece in self.pieces(word)]
            found = [self.ids["[CLS]"], *found[:length - 2], self.ids["[SEP]"]]
            ids[i, :len(found)], mask[i, :len(found)] = torch.tensor(found), 1
        return ids, mask


TEMPLATE = "a high-quality and harmonious picture of {class}"  # the paper's prompt


def prompt_scorer(kind, class_names, template, weights, vocabulary, device="cpu"):
    """score(pixels in [0,1] (N, 3, H, W), labels (N,)) -> (N,), differentiable in the pixels: rl.py's rewards.

    kind: clip, pickscore or imagereward; weights and vocabulary: where the public files lie. The prompts of all
    classes are read once, here.
    """
    if "{class}" not in template:
        raise UserError(f"the prompt {template!r} has no {{class}} in it")
    prompts = [template.replace("{class}", name) for name in class_names]
    if kind == "imagereward":
        ids, mask = (x.to(device) for x in WordPiece(vocabulary)(prompts))  # (classes, 35)
        model = load_imagereward(weights).to(device)
        return lambda pixels, labels: model.score(pixels, ids[labels], mask[labels])
    ids = Tokenizer(vocabulary)(prompts).to(device)
    ids = ids[:, :int(ids.argmax(1).max()) + 1]  # up to the end token, the highest id: a fifth of the work
    model = (load_clip if kind == "clip" else load_pickscore)(weights).to(device)
    with torch.no_grad():
        text = torch.cat([model.encode_text(part) for part in ids.split(64)])  # (classes, E)
    return lambda pixels, labels: model.score(pixels, text[labels])


# ----------------------------------------------------------------------------------------------------------------------
# What is judged: a source gives uint8 images by number, so that ranks and resumed runs can take any part

Source = namedtuple("Source", "name count side labels class_names read key made_by")
# labels (N,) or None, numbers of class_names (None: the user's own numbers); read(start, stop) -> uint8 (n, 3, H, W);
# key: all that the images depend on, for shards; made_by: {setting: value} of what was drawn or cropped here


def file_key(path):
    """Place, size and time of a file, or of every file in a folder."""
    if os.path.isdir(path):
        return [file_key(file) for file in sorted(Path(path).iterdir())]
    stat = os.stat(path)
    return [os.path.abspath(path), stat.st_size, stat.st_mtime_ns]


def read_npz(path, *names):
    """{name: array} of all that an .npz holds, or of those of `names` that it has."""
    try:
        with np.load(path) as file:  # numpy's default refuses pickled objects
            return {name: file[name] for name in names or file.files if name in file.files}
    except Exception as error:  # numpy raises a dozen kinds for a bad file; all mean the same to the user
        raise UserError(f"{path} is no whole .npz file: {str(error)[:100] or type(error).__name__}") from None


def npz_source(path, arrays):
    """arr_0 uint8 (N, H, W, 3), and labels (N,) where there are some: what sample.py --num and ADM's scripts write.

    The images of one source are in memory, in every process: 9.8 GB for 50,000 of 256 px. They are read once to be
    checked and again when their turn comes.
    """
    if "arr_0" not in arrays:
        raise UserError(f"{path} has no arr_0 but {sorted(arrays)}: images are expected there as uint8 (N, H, W, 3)")
    images = arrays["arr_0"]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise UserError(f"{path}: arr_0 is {images.dtype} {images.shape}, wanted is uint8 (N, H, W, 3), RGB in 0..255")
    labels = arrays.get("labels", arrays.get("arr_1"))  # sample.py's name, ADM's
    if labels is not None and (labels.shape != (len(images),) or labels.dtype.kind not in "iu"):
        labels = None
    if labels is not None and labels.min(initial=0) < 0:
        raise UserError(f"{path}: class {labels.min()} among its labels; classes are numbered from 0")
    again = functools.lru_cache(lambda: read_npz(path, "arr_0")["arr_0"])
    read = lambda start, stop: torch.from_numpy(again()[start:stop].transpose(0, 3, 1, 2).copy())  # NHWC -> NCHW
    return Source(str(path), len(images), images.shape[1], labels, None, read, file_key(path), {})


def read_judged(path):
    """One image that is judged as it is -> uint8 (3, H, W). What is not 8-bit RGB is refused: how grey, alpha or 16
    bits should become RGB is not this file's to guess."""
    try:
        with open(path, "rb") as file, Image.open(file) as image:
            pixels = np.asarray(image)
            file.seek(24)  # of a PNG: its bit depth, of which Pillow says nothing and silently drops the low byte
            mode = "16-bit" if image.format == "PNG" and file.read(1) == b"\x10" else image.mode
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: broken image ({(str(error) or type(error).__name__).splitlines()[0][:80]})") from None
    if mode != "RGB":
        raise UserError(f"{path} is {mode}, judged images must be 8-bit RGB: convert them, or do so by --size")
    return pixels.transpose(2, 0, 1)  # HWC -> CHW


def folder_source(path, size=None):
    """Every image below a folder. size: crop to it as ADM does, any mode to RGB; None: as they are, all of one size.

    The key has size and time of every file: a stat each, little beside decoding it.
    """
    classes, files, labels = find_images(path)
    if not len(files):
        raise UserError(f"{path}: no images in it")
    side = size or read_judged(files[0]).shape[1]

    def one(file):
        image = read_image(file, size) if size else read_judged(file)
        if image.shape[1:] != (side, side):
            raise UserError(f"{file} is {image.shape[2]} x {image.shape[1]}, not {side} x {side}: crop all by --size")
        return image

    def read(start, stop):
        with ThreadPoolExecutor(8) as pool:  # decoding runs outside Python's lock
            return torch.from_numpy(np.stack(list(pool.map(one, files[start:stop]))))

    if len(classes) < 2:
        classes, labels = None, None
    key = [size, hashlib.sha256(json.dumps([file_key(file) for file in files]).encode()).hexdigest()]
    return Source(str(path), len(files), side, labels, classes, read, key, {"size": size} if size else {})


def checkpoint_source(path, given, args, device, vae):
    """Images drawn from a checkpoint when they are asked for: image i is that of (seed, i), with class i % classes, so
    that every stretch is balanced. Nothing is written but what the judges say. given: this row's flags, or None for
    what the checkpoint was made for."""
    file, model = read_checkpoint(path), load_mar(path)
    K = given["ar_steps"]
    flags = argparse.Namespace(**{**vars(args), **given, "ckpt": path, "ar_steps": K and [K], "teacher": False,
                                  "bench": False, "teacher_ar_steps": None})
    fill_in(flags, file, model.config)  # what was not given is as the checkpoint was made for
    check_vae(model, vae)
    how = {"ar_steps": flags.ar_steps[0], "head_steps": flags.head_steps, "guidance": flags.guidance,
           "guidance_schedule": flags.guidance_schedule, "temperature": flags.temperature, "orders": flags.order,
           "seed": args.seed}
    labels = np.arange(args.num) % model.config.num_classes

    def read(start, stop):
        if next(model.parameters()).device != device:  # the first call; until then the file is mapped, not read
            bf16_weights(model.to(device))
        return draw(model, labels[start:stop], start=start, vae=vae, batch=args.batch, **how)
    key = [file_key(path), args.vae and file_key(args.vae), how]
    name = f"{path} ({', '.join(f'{k} {v}' for k, v in how.items())})"
    return Source(name, args.num, model.config.img_size, labels, file.get("class_names"), read, key, how)


def open_source(path, given, args, device, vae):
    """A path of the command line -> Source, checked and not yet read. given: this row's flags for a checkpoint."""
    if path in args.ckpt:
        source = checkpoint_source(path, given, args, device, vae)
    elif os.path.isdir(path):
        source = folder_source(path, args.size)
    elif path.endswith(".npz"):
        source = npz_source(path, read_npz(path))
    else:
        raise UserError(f"{path}: judged are a folder of images, an .npz with arr_0, or a checkpoint by --ckpt")
    if source.count < 2:
        raise UserError(f"{path}: {source.count} image(s); a distribution has at least 2, a good figure thousands")
    return source


# ----------------------------------------------------------------------------------------------------------------------
# Judging

SHARD = 256  # images whose results are one file: what a kill can lose, a process


def shard_folder(source, key, args, rank):
    """Where a stopped call finds what the judges loaded from `key` have said of a source; made if it is not there."""
    made_from = json.dumps([source.key, source.count, key], sort_keys=True)
    folder = Path(args.out) / "shards" / hashlib.sha256(made_from.encode()).hexdigest()[:16]
    own(folder, rank)  # two calls that judge the same would delete each other's
    return folder


@torch.no_grad()
def collect(source, judges, folder, args, rank, world):
    """What every judge says of every image -> {name: array (N, ...)} on rank 0, None on the others.

    judges: {name: f(uint8 images, labels, class names) -> {name: tensor (n, ...)}}. Shards go to the ranks in turns;
    each is a file in `folder`, written once it is whole. The caller deletes them when nothing can be lost any more.
    """
    if world > 1:
        dist.barrier()  # rank 0 has made the folder
    shards = [(start, min(start + SHARD, source.count)) for start in range(0, source.count, SHARD)]
    bar = tqdm(shards[rank::world], desc=source.name[:40], unit="shard", disable=rank > 0, mininterval=1)
    began, done = time.time(), 0
    for start, stop in bar:
        path = folder / f"{start}.npz"
        if path.exists():
            continue
        parts = []
        images = source.read(start, stop)
        labels = None if source.labels is None else torch.as_tensor(source.labels[start:stop]).long()
        for i in range(0, stop - start, args.batch):
            pick = slice(i, i + args.batch)
            answers = [f(images[pick], None if labels is None else labels[pick], source.class_names)
                       for f in judges.values()]
            parts.append({k: v.cpu().numpy() for part in answers for k, v in part.items()})
        answers = {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}
        for name, values in answers.items():
            bad = int((~np.isfinite(values)).reshape(len(values), -1).any(1).sum())
            if bad:
                raise UserError(f"{source.name}: {name} is NaN or infinite for {bad} of images {start} to {stop - 1}: "
                                "the judge's weights are damaged")
        save_npz(path, **answers)
        done += stop - start
        bar.set_postfix_str(f"{done * world / (time.time() - began):.1f} images/s")
    if world > 1:
        dist.barrier()  # every shard is on disk
    if rank > 0:
        return None
    answers = [read_npz(folder / f"{start}.npz") for start, _ in shards]
    return {k: np.concatenate([part[k] for part in answers]) for k in answers[0]}


def save_npz(path, **arrays):
    """An .npz that has its name only once it is whole."""
    with replacing(path, "wb") as file:
        np.savez(file, **arrays)


# by name too: what numpy 1 has written, numpy 2 finds in another module
NUMPY_ARRAYS = [np.ndarray, np.dtype, type(np.dtype(np.float32)), type(np.dtype(np.float64)),
                *[(np.empty(0).__reduce__()[0], f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]]
# whose statistics a file holds cannot be seen in it
OTHER_RESIZE = ("must come from TF1's bilinear resize, as ADM's, MAR's, torch-fidelity's and our own do; pytorch-fid's "
                "and clean-fid's legacy files come from another, by which a folder has FID 112 against itself")


def statistics_in(path, arrays):
    """mu, sigma of a statistics file: keys mu, sigma, as ADM, MAR, torch-fidelity and pytorch-fid write them."""
    if not {"mu", "sigma"} <= set(arrays):
        raise UserError(f"{path} holds {sorted(map(str, arrays))[:6]}: statistics are mu and sigma")
    mu, sigma = (np.asarray(arrays[k], np.float64) for k in ("mu", "sigma"))
    if mu.shape != (2048,) or sigma.shape != (2048, 2048):
        raise UserError(f"{path}: mu is {mu.shape}, sigma {sigma.shape}: not statistics of inception's 2048 features")
    if not np.allclose(sigma, sigma.T, atol=1e-4 * np.nanmax(np.abs(sigma)), equal_nan=True):
        raise UserError(f"{path}: its sigma is not symmetric, so no covariance")
    return mu, sigma


def open_reference(path, args, side):
    """--ref -> ({"mu", "sigma", "n", "text"} of a file of statistics or {}, Source of its images or None).

    n is None where the file does not say it. The Source is None, too, where no figure needs the images.
    """
    arrays, source, out = {}, None, {}
    if os.path.isdir(path):
        source = folder_source(path, side)
    elif path.endswith(".npz"):
        arrays = read_npz(path)
        source = npz_source(path, arrays) if "arr_0" in arrays else None
    else:  # torch-fidelity's cache, {"mu", "sigma"} by torch.save: numpy's arrays, which are plain data
        with torch.serialization.safe_globals(NUMPY_ARRAYS):
            arrays = read_checkpoint(path)
    if source is None and not {"fid", "is"} & set(args.metrics):
        raise UserError(f"{path} holds no images: --metrics {' '.join(args.metrics)} compare with images in --ref")
    if source is None or "mu" in arrays:
        mu, sigma = statistics_in(path, arrays)
        n = int(arrays["n"]) if "n" in arrays else None
        text = f"mu, sigma of {path}{f', n = {n}' if n else ' (their n is not in the file)'}"
        ours = "made_from" in arrays or source is not None  # --save_stats; ADM's, which have images beside them
        out = {"mu": mu, "sigma": sigma, "n": n, "text": text if ours else f"{text}, which {OTHER_RESIZE}"}
        if not {"kid", "prc"} & set(args.metrics):
            source = None
    return out, source


def complete_reference(out, source, pool):
    """The statistics of `open_reference` with what its images' features `pool` (N, 2048) add: mu and sigma where there
    were none, and the "features" that KID and the manifolds need, 10,000 as in ADM's reference."""
    if not out:
        mu, sigma = mean_and_covariance(pool)
        crop = "".join(f", ADM centre crop to {size} px" for size in source.made_by.values())
        out = {"mu": mu, "sigma": sigma, "n": source.count,
               "text": f"mu, sigma of {source.count} images of {source.name}{crop}"}
    features = pool[np.linspace(0, source.count - 1, min(source.count, 10000)).astype(int)]
    text = f"{out['text']}; KID, precision, recall against {len(features)} of {source.count} images of {source.name}"
    return {**out, "features": features, "text": text}


def inception_row(pool, inception, reference, args):
    """The figures of features (N, 2048) -> {"fid", "is", "is_std", "kid", "kid_std", "precision", "recall"}."""
    row = {}
    if "is" in args.metrics:
        logits = torch.cat([inception.logits(part).cpu() for part in torch.from_numpy(pool).split(4096)])
        row["is"], row["is_std"] = inception_score(logits, shuffle=args.is_order == "torch-fidelity")
    if reference and "fid" in args.metrics:
        row["fid"] = frechet_distance(*mean_and_covariance(pool), reference["mu"], reference["sigma"])
    if reference and "features" in reference:
        if "kid" in args.metrics:
            row["kid"], row["kid_std"] = kernel_distance(pool, reference["features"])
            if row["kid_std"] is None:
                del row["kid_std"]
        if "prc" in args.metrics:
            row["precision"], row["recall"] = precision_recall(pool, reference["features"])
    return row


def make_judges(args, sources, device, rank, world):
    """--judges -> ({name: f(images, labels, class names)}, key, models for the figures)."""
    judges, key, models = {}, {}, {}
    place = lambda name: os.path.join(args.folder, WEIGHTS[name])
    for name in args.judges:
        if name == "inception":
            path = args.inception or place(name)
            models[name] = model = load_inception(path).to(device)
            key[name] = args.inception_hash = file_hash(path)
            judges[name] = lambda images, *_, model=model: {"pool": model(images)[0]}
        elif name == "classifier":
            data = open_data(args.data)
            folder = args.classifier or f"out/{Path(args.data).name}"
            for turn in (0, 1):  # rank 0 trains it where there is none, the others read the file
                if turn == min(rank, 1):
                    models[name] = load_or_train_classifier(data, folder, device=device)
                if world > 1:
                    dist.barrier()
            key[name] = file_key(Path(folder) / "classifier_0.pt")

            def classify_shard(images, labels, names, net=models[name], own=data.class_names):
                features, logits = classify(net, images)
                if labels is None or names and not set(names) <= set(own):
                    return {"features": features}  # a folder's classes are others, or are no classes
                if names:  # numbered by another list, a folder's own
                    labels = torch.tensor([own.index(name) for name in names])[labels]
                return {"features": features, "hit": logits.argmax(1) == labels}
            judges[name] = classify_shard
        else:
            names = prompt_names(sources, args)
            path = args.clip if name == "clip" and args.clip else place(name)
            words = place("imagereward_vocab" if name == "imagereward" else "bpe")
            score = prompt_scorer(name, names, args.prompt, path, words, device)
            key[name] = [file_key(path), file_key(words), names, args.prompt]

            def score_shard(images, labels, _, name=name, score=score):
                return {name: score(images.to(device).float() / 255, labels.to(device))}
            judges[name] = score_shard
    return judges, key, models


def prompt_names(sources, args):
    """The names of the classes that the labels of all `sources` number: one list, since prompts are read once."""
    for source in sources:
        if source.labels is None:
            raise UserError(f"{source.name} has no labels, and its images are to be compared with their class's prompt:"
                            " give an .npz with labels, or a folder with one of each class in it")
        names = read_class_names(args.class_names, source.class_names)
        if source.labels.max() >= len(names):
            raise UserError(f"{source.name} has class {source.labels.max()}, and there are only {len(names)} class "
                            "names: give --class_names")
        if names != read_class_names(args.class_names, sources[0].class_names):
            raise UserError(f"{source.name} has other classes than {sources[0].name}: judge them in two calls")
    return names


# ----------------------------------------------------------------------------------------------------------------------
# Watching a run


class Watch:
    """What a run is watched by: pictures of a network, drawn on all ranks and judged on rank 0; a table and a grid.

    run: distill.Run. make_figures: called once, on rank 0, if `judges`; what it returns takes images uint8 (N, 3, H, W)
    and their labels (N,) and gives {name: number}.
    Rows of the grid share classes, orders and noise, so that a picture can be compared with the one above.
    """

    def __init__(self, run, config, make_figures, judges=True, shows=True, vae=None):
        self.run, self.judges, self.shows, self.vae = run, judges, shows, vae
        self.figures = make_figures() if judges and run.rank == 0 else None
        whole = lambda count: torch.arange(-(-count // run.world) * run.world) % config.num_classes  # equal shares
        self.labels, self.shown = whole(run.args.eval_images), whole(min(2 * config.num_classes, 20))
        self.rows, self.grid = {}, {}  # of the table: name -> figures; of the grid: name -> images
        if run.resumed and os.path.exists(run.path("results.json")):
            # rows of steps that are going to be done again go, as the log's lines; best.pt stays, and so its row
            done = 0 if run.resumed["stage"] == "teacher" else run.resumed["step"]
            with open(run.path("results.json")) as f:
                self.rows = {name: row for name, row in json.load(f).items()
                             if name == "best" or (row["made_by"]["step"] or 0) <= done}

    def look(self, name, model, step=None, **how):
        """Draw with `model` a row of the grid and one of the table. how: head_steps, guidance, ... of `generate`.

        -> the row, with what it was `made_by`; it is not made again where an earlier one was made alike. {} when a signal
        came while drawing. Cost: eval_images pictures. A row of a step goes to the log too.
        """
        args, seed = self.run.args, self.run.args.seed
        how = {"ar_steps": args.ar_steps, "head_steps": 1, "guidance": 1.0, **how}
        draw_with = lambda labels, seed: draw_together(model, labels, self.run.rank, self.run.world, seed=seed,
                                                       vae=self.vae, stop=self.run.is_told, **how)
        if self.shows:
            self.grid[name] = draw_with(self.shown, seed)
        made_by = {"n": len(self.labels), "seed": seed + 1, "step": step, **how}
        if self.judges and not self.run.told and self.rows.get(name, {}).get("made_by") != made_by:
            start = time.time()
            images = draw_with(self.labels, seed + 1)
            seconds = (time.time() - start) / len(self.labels)
            if images is not None:
                row = self.figures(images, self.labels) if self.run.rank == 0 else {}
                self.rows[name] = {**row, "seconds_per_image": seconds, "made_by": made_by}
                if step is not None:  # "reward" in the log is of the pictures trained on, this of the average's
                    self.run.note({"step": step} | {"eval_reward" if key == "reward" else key: value for key, value in row.items()})
        if self.run.told:
            return {}
        self.show(step or 0)
        return self.rows.get(name, {})

    def show(self, step):
        """The grid drawn so far, results.json, and the table on the terminal."""
        if self.run.rank > 0:
            return
        rows = [(name, images) for name, images in self.grid.items() if images is not None]
        if rows:
            save_grid(rows, self.run.path(f"grid_{step:06d}.png"))
        if self.rows:
            write_json(self.run.path("results.json"), self.rows)
            columns = [name for name in next(iter(self.rows.values())) if name != "made_by"]
            tqdm.write(" " * 12 + "".join(f"{name[-11:]:>12}" for name in columns))
            for name, row in self.rows.items():
                tqdm.write(f"{name:12}" + "".join(f"{row[column]:12.4g}" for column in columns))


# ----------------------------------------------------------------------------------------------------------------------
# The command


def parse():
    """The flags -> (args, what is to be judged), contradictions refused."""
    p = Parser("The judges of samples.")
    # what is judged, by whom, against what
    p.add_argument("samples", nargs="*", default=[], help="images to judge: .npz files (arr_0) or folders, a row each")
    p.add_argument("--ckpt", nargs="+", default=[], help="checkpoints to judge: images are drawn on the fly")
    p.add_argument("--judges", nargs="+", choices=JUDGES, default=["inception"], help="each brings columns")
    p.add_argument("--metrics", nargs="+", choices=METRICS, default=METRICS, help="kid and prc need images in --ref")
    p.add_argument("--ref", help="reference: .npz or .pt of mu and sigma, an .npz of images, or a folder of images")
    p.add_argument("--save_stats", help="write mu, sigma, n of the (only) samples to this .npz: a later --ref")
    p.add_argument("--is_order", choices=["torch-fidelity", "adm"], default="torch-fidelity",
                   help="inception score: shuffled by seed 2020, or the splits as the images come")
    p.add_argument("--size", type=int, help="px: crop images of judged folders as ADM does; None: as they are")
    # images drawn from --ckpt; None: as the checkpoint was made for
    p.add_argument("--num", type=int, default=50000, help="--ckpt: images to draw, all classes alike often")
    p.add_argument("--ar_steps", type=int, nargs="+", default=[None], metavar="K", help="AR steps, a row each")
    p.add_argument("--guidance", type=float, nargs="+", default=[None], metavar="G", help="1 = none, a row each")
    p.add_argument("--guidance_schedule", choices=["linear", "constant"], help="--ckpt: guidance over the AR steps")
    p.add_argument("--head_steps", type=int, help="--ckpt: denoising steps")
    p.add_argument("--temperature", type=float, default=1.0, help="--ckpt: scale of the noise")
    p.add_argument("--order", choices=ORDERS, default="random", help="--ckpt: in which tokens are revealed")
    p.add_argument("--seed", type=int, default=0, help="--ckpt: image i is that of (seed, i)")
    p.add_argument("--vae", help="--ckpt: kl16.ckpt, for models of latents")
    p.add_argument("--plot", help="draw figures against --ar_steps or --guidance, a curve a checkpoint, into this .png")
    # the judges' weights and words
    p.add_argument("--folder", default=".", help="where data.py --get put the judges' weights (its --folder)")
    p.add_argument("--inception", help="this file instead of the one in --folder")
    p.add_argument("--clip", help="this file instead: OpenAI's; a plain state dict is taken for theirs (quick GELU)")
    p.add_argument("--data", help="classifier: the data set whose train split it learns (shapes, cifar10, a folder)")
    p.add_argument("--classifier", help="classifier: the folder where it is kept; None: out/<data>, as distill.py")
    p.add_argument("--class_names", help="JSON list for the prompts; None: the source's names, else ImageNet's")
    p.add_argument("--prompt", default=TEMPLATE, help="clip, pickscore, imagereward: what to ask of an image")
    # where and how
    p.add_argument("--out", default="out/fid", help="folder of results.json and, while it runs, of the shards")
    p.add_argument("--batch", type=int, default=64, help="images at once, a process; less if memory is short")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    args = p.parse_args()
    check_numbers(args, one="size num ar_steps head_steps batch")
    judged = args.samples + args.ckpt
    if not judged:
        raise UserError("nothing to judge: give folders or .npz files, or checkpoints by --ckpt")
    for path in judged + [args.ref] * bool(args.ref):
        if not os.path.exists(path):
            raise UserError(f"no such file or folder: {path}")
    drawing = ("num", "ar_steps", "head_steps", "guidance", "guidance_schedule", "temperature", "order", "seed", "vae")
    ignored = [flag for flag in drawing if not args.ckpt and getattr(args, flag) != p.get_default(flag)]
    if ignored:
        raise UserError(f"--{ignored[0]} is for images drawn from a --ckpt: leave it out")
    if "inception" in args.judges and not (args.ref or args.save_stats or "is" in args.metrics):
        raise UserError(f"--metrics {' '.join(args.metrics)} compare with a reference: give --ref")
    if args.ref and "inception" not in args.judges or args.data and "classifier" not in args.judges:
        raise UserError("--ref is for --judges inception, --data for --judges classifier: name that judge")
    if "classifier" in args.judges and not args.data:
        raise UserError("--judges classifier needs --data: the set whose classes it learns")
    if args.plot and not (args.ckpt and len(swept(args)) == 1):
        raise UserError("--plot draws figures against AR steps or guidance: give --ckpt and several of one of them")
    if args.save_stats and (len(judged) > 1 or swept(args) or "inception" not in args.judges):
        raise UserError("--save_stats keeps inception's statistics of one set of samples: give one, and that judge")
    return args, judged


def swept(args):
    """The flags that were given several values."""
    return [flag for flag in ("ar_steps", "guidance") if len(set(getattr(args, flag))) > 1]


def rows_wanted(args, judged):
    """The rows of the table: yields (path, {flag: value}), of a checkpoint for each of --ar_steps and --guidance.

    Where there are teachers and students, --guidance and --head_steps are for the teachers: a student has its own.
    """
    teachers = [path for path in args.ckpt if read_checkpoint(path).get("stage", "teacher") == "teacher"]
    for path in judged:
        beside = bool(teachers) and path not in teachers
        for K in args.ar_steps if path in args.ckpt else [None]:
            for g in [None] if beside or path not in args.ckpt else args.guidance:
                yield path, {"ar_steps": K, "guidance": g, "head_steps": None if beside else args.head_steps}


def make_row(source, answers, models, reference, args):
    """One row of the table from what the judges said of every image: what was judged, its figures, their meaning."""
    row = {"name": source.name, "n": source.count, "made_by": source.made_by}
    if "pool" in answers:
        row |= inception_row(answers["pool"], models["inception"], reference, args)
        if args.save_stats:
            mu, sigma = mean_and_covariance(answers["pool"])
            save_npz(args.save_stats, n=source.count, made_from=json.dumps([source.key, args.inception_hash]),
                     mu=mu.astype(np.float32), sigma=sigma)  # torch-fidelity compares these types
    for name in ("clip", "pickscore", "imagereward"):
        if name in answers:
            row[name] = float(answers[name].astype(np.float64).mean())
    if "features" in answers:
        row["fd"] = frechet_distance(*mean_and_covariance(answers["features"]), *models["classifier"].reference)
        if "hit" in answers:
            row["accuracy"] = float(answers["hit"].mean())
        elif source.labels is not None:
            print(f"note: {source.name}: its folders are not the classifier's classes, so no accuracy", flush=True)
    few = min(source.count, (reference or {}).get("n") or source.count)
    if few < 2048 and {"fid", "fd", "kid"} & set(row):
        print(f"warning: {source.name}: {few} images on one side. Below 2,048 FID and FD say more about n than about "
              "the images, and KID scatters: compare with equal n only", flush=True)
    return {**row, "conventions": conventions(row, reference, models, args)}


def conventions(row, reference, models, args):
    """What the figures of a row mean, in lines; printed and saved with them."""
    lines = []
    if "inception" in models:
        lines.append(f"inception: 2015-12-05, weights sha256 {args.inception_hash[:8]}, resized to 299 by TF1 bilinear "
                     "without half-pixel centres, (x-128)/128, float32")
        lines.append(f"reference: {reference['text'] if reference else 'none, so no FID'}")
    if "is" in row:
        lines.append(f"is: 10 splits, {args.is_order} order, logits without bias")
    if "kid" in row:
        size = min(1000, row["n"], len(reference["features"]))
        lines.append(f"kid: mean of 100 subsets of {size}, unbiased, (x.y/2048 + 1)^3")
    if "precision" in row:
        lines.append("precision: share of the generated inside the reference's manifold, recall: the reverse, k = 3, "
                     "inception's 2048 features")
    if "clip" in row:
        lines.append(f"clip: {args.clip or os.path.basename(WEIGHTS['clip'])} as OpenAI's: quick GELU, heads of 64")
    for name in [name for name in ("clip", "pickscore") if name in row]:
        lines.append(f"{name}: exp(logit_scale) * cosine with the prompt {args.prompt!r}; pixels by bicubic")
    if "imagereward" in row:
        lines.append(f"imagereward: normalised as published, prompt {args.prompt!r}")
    if "fd" in row:
        lines.append(f"fd, accuracy: by the classifier of {args.data} (its own test accuracy "
                     f"{models['classifier'].accuracy:.4f}); fd to 10,000 training images; not comparable with FID")
    return lines


def print_table(rows):
    """Figures by row, under what they mean; the columns are those that some row has."""
    print("\n".join(dict.fromkeys(line for row in rows for line in row["conventions"])))
    others = ("name", "ckpt", "is_std", "kid_std", "made_by", "conventions")
    columns = list(dict.fromkeys(k for row in rows for k in row if k not in others))
    print("".join(f"{c:>12}" for c in columns) + "  of")
    for row in rows:
        cells = [f"{row[c]:.4f}" if isinstance(row.get(c), float) else str(row.get(c, "-")) for c in columns]
        print("".join(f"{cell:>12}" for cell in cells) + f"  {row['name']}", flush=True)


def read_results(out):
    """The rows in out/results.json; [] where none are."""
    path = Path(out) / "results.json"
    try:
        return json.loads(path.read_text())["rows"] if path.exists() else []
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is no table of results: move it away, or choose another --out") from None


def add_results(out, rows):
    """Put rows into out/results.json. They replace those of the same samples judged the same way; others stay."""
    same = lambda row: [row.get(key) for key in ("name", "n", "conventions")]
    folder = os.open(out, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)  # another call may end in the same moment
    try:
        kept = [row for row in read_results(out) if same(row) not in [same(new) for new in rows]] + rows
        lines = list(dict.fromkeys(line for row in kept for line in row.get("conventions", [])))
        write_json(Path(out) / "results.json", {"rows": kept, "conventions": lines})
    finally:
        os.close(folder)


def curves_against(flag, rows, path):
    """Figures of one checkpoint as save_panels draws them: {("", "fd against ar_steps"): {K: value}, ...}."""
    curves = {}
    for row in rows:
        for name in ("fid", "is", "kid", "precision", "recall", "fd", "accuracy", "clip", "pickscore", "imagereward"):
            if row.get("ckpt") == path and name in row and flag in row:
                curves.setdefault(("", f"{name} against {flag}"), {})[row[flag]] = row[name]
    return curves


def main():
    """Judge every row that was asked for, print the table with its conventions, add it to results.json."""
    args, judged = parse()
    device, rank, world = setup(args.device)
    os.makedirs(args.out, exist_ok=True)
    read_results(args.out)  # complains now, not after the work
    for path, suffix in ((args.plot, ".png"), (args.save_stats, ".npz")):
        if path and rank == 0:
            check_output(path, [suffix])
    vae = load_vae(args.vae).to(device) if args.vae else None
    wanted = list(rows_wanted(args, judged))
    sources = [open_source(path, given, args, device, vae) for path, given in wanted]  # all, before hours go into one
    for metric, least in {"is": 10, "prc": 4}.items():
        few = [source for source in sources if source.count < least]
        if few and metric in args.metrics and "inception" in args.judges:
            raise UserError(f"{few[0].name}: {few[0].count} images, and {metric} needs {least}: more, or leave it out")
    sides = {source.side for source in sources}
    if args.ref and os.path.isdir(args.ref) and len(sides) > 1:
        raise UserError(f"--ref is cropped to the size of the samples, and these are of {sorted(sides)} px: judge them "
                        "in calls of their own, or crop folders by --size")
    judges, key, models = make_judges(args, sources, device, rank, world)
    reference, images = open_reference(args.ref, args, max(sides)) if args.ref else (None, None)
    rows, folders = [], []

    def ask(source, judges, key):
        """`collect`, with shards that stay until all is done: a call stopped in its last row must not draw the first
        again."""
        folders.append(shard_folder(source, key, args, rank))
        return collect(source, judges, folders[-1], args, rank, world)

    if images:
        answers = ask(images, {"inception": judges["inception"]}, key["inception"])
        reference = complete_reference(reference, images, answers["pool"]) if rank == 0 else None
    for path, given in wanted:
        source = sources.pop(0)  # the last one's network goes with it, if it had one: this one's needs the memory
        began = time.time()
        answers = ask(source, judges, key)
        if rank == 0:
            rows.append(make_row(source, answers, models, reference, args) | {"seconds": round(time.time() - began, 1)})
            rows[-1] |= {"ckpt": path} if path in args.ckpt else {}
            rows[-1] |= {flag: given[flag] for flag in swept(args) if given[flag] is not None}
    if rank > 0:
        return
    print_table(rows)
    add_results(args.out, rows)
    if args.plot:
        save_panels([(path, curves_against(*swept(args), rows, path)) for path in args.ckpt], args.plot)
    for folder in set(folders):
        disown(folder)  # deletes it


if __name__ == "__main__":
    run_main(main)
