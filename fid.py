"""The judges of samples: FID, inception score, KID, precision and recall; a classifier of the data; CLIP, PickScore,
ImageReward. Their figures agree with those of the public implementations, which test_all.py checks.

Samples are a folder of images, an .npz of sample.py --num, or drawn here from a checkpoint. The judges' public weights
are needed. Each row is added to OUT/results.jsonl, a line of JSON with what its figures mean.

    python data.py --get inception adm_reference               # once; also: clip bpe pickscore ...
    python fid.py samples.npz --ref pretrained_models/fid/VIRTUAL_imagenet256_labeled.npz
    torchrun --nproc_per_node=8 -- fid.py --ckpt student.pt --vae kl16.ckpt --ref VIRTUAL_imagenet256_labeled.npz
    python fid.py --ckpt a.pt b.pt --vae kl16.ckpt --judges clip pickscore imagereward --guidance 1 2   # a row per way
    python fid.py --ckpt out/shapes/student.pt --judges classifier --classifier out/shapes/classifier_0.pt --num 2048
    python fid.py FOLDER --size 256 --save_stats mine.npz      # statistics of your own images, a later --ref
(Without the --, torchrun takes --num for an abbreviation of its own flags.)
"""
import contextlib
import functools
import gzip
import html
import json
import math
import os
import re
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from data import (PUBLIC, SHAPE_MODES, Data, Parser, check_numbers, find_images, load_vae, open_data,
                  read_class_names, read_image, run_main, sequence, setup, shape_modes, train_indices)
from model import (UserError, bf16_weights, fill_model, load_mar, load_network, need_file, printable, read_checkpoint,
                   reading, replacing, save_checkpoint, say)
from sample import check_output, check_vae, draw, drawing_flags, ways_to_draw

WEIGHTS = {name: file[1] for name, file in PUBLIC.items()}  # where --get puts the public files
PROMPTED = ["clip", "pickscore", "imagereward"]  # judges that compare a picture with the prompt of its class
JUDGES = ["inception", *PROMPTED, "classifier"]
TEMPLATE = "a high-quality and harmonious picture of {class}"  # the paper's prompt

# ----------------------------------------------------------------------------------------------------------------------
# Metrics: numbers from features. Float64 on the CPU where a small difference of large numbers is taken.


def mean_and_covariance(features):
    """(N, F) features -> mu (F,), sigma (F, F), float64, as numpy.cov. 50,000 of Inception's take 1.6 GB meanwhile."""
    x = features.double()
    return x.mean(0), torch.cov(x.T)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(s1 + s2 - 2 (s1 s2)^1/2) of two Gaussians: (F,), (F, F), (F,), (F, F) -> float.

    With A A^T = s1 the product s1 s2 has the eigenvalues of the symmetric A^T s2 A: two symmetric decompositions do.
    A singular covariance (fewer images than features) needs no special case, as scipy's general matrix root would.
    FID: Heusel et al. 2017, arXiv 1706.08500."""
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(a).double().cpu() for a in (mu1, sigma1, mu2, sigma2))
    values, vectors = torch.linalg.eigh(sigma1)
    root = vectors * values.clamp(min=0).sqrt()  # A, (F, F); rounding leaves some zero eigenvalues slightly negative
    cross = torch.linalg.eigvalsh(root.T @ sigma2 @ root).clamp(min=0).sqrt().sum()
    return float((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * cross)


def inception_score(logits, splits=10, shuffle=False):
    """exp(mean KL(p(y|x) || p(y))) over contiguous splits of logits (N, classes) -> (mean, std) over the splits.

    shuffle: permute first with numpy's seed 2020, as torch-fidelity does; without, as ADM. Samples in class order need
    it, else each split knows a tenth of the classes. Salimans et al. 2016, arXiv 1606.03498."""
    N, scores = len(logits), []
    if shuffle:
        logits = logits[torch.from_numpy(np.random.RandomState(2020).permutation(N))]
    for i in range(splits):
        log_p = logits[i * N // splits:(i + 1) * N // splits].double().log_softmax(1)
        p = log_p.exp()
        scores.append(float((p * (log_p - p.mean(0).log())).sum(1).mean().exp()))
    return float(np.mean(scores)), float(np.std(scores))


def kernel_distance(a, b, subsets=100, subset_size=1000, seed=2020):
    """KID: squared MMD of features a (N, F) and b (M, F) under (x.y / F + 1)^3, unbiased -> (mean, std) over subsets.

    Subsets are torch-fidelity's. Few images do not bias it, so it may be negative. The std is None where a subset is
    the whole of a set, which would seem to have no spread. Binkowski et al. 2018, arXiv 1801.01401."""
    size = min(subset_size, len(a), len(b))
    random, values = np.random.RandomState(seed), []
    kernel = lambda p, q: (p @ q.T / a.shape[1] + 1) ** 3  # (size, size)
    for _ in range(subsets):
        x = a[random.choice(len(a), size, replace=False)].double()
        y = b[random.choice(len(b), size, replace=False)].double()
        k_xx, k_yy, k_xy = kernel(x, x), kernel(y, y), kernel(x, y)
        # the diagonal, a picture with itself, is what would bias the estimate
        within = (k_xx.sum() - k_xx.trace() + k_yy.sum() - k_yy.trace()) / (size * (size - 1))
        values.append(float(within - 2 * k_xy.mean()))
    return float(np.mean(values)), float(np.std(values)) if size < min(len(a), len(b)) else None


def precision_recall(generated, reference, k=3, chunk=1000):
    """Features (N, F), (M, F) -> (precision, recall) as Kynkaanniemi et al. 2019 define them, arXiv 1904.06991.

    A set's manifold is the union of balls around its features, each reaching to the k-th nearest other one.
    precision = share of the *generated* inside the *reference* manifold; recall = share of the reference inside the
    generated one. A collapsed generator has precision 1 and recall 0."""
    a, b = generated.float(), reference.float()
    a, b = a - b.mean(0), b - b.mean(0)  # |a|^2 + |b|^2 - 2ab in float32: near the origin the subtraction loses least

    def radii(x):  # (N,) distance to the k-th nearest other feature: the nearest of k + 1 is the feature itself
        distances = (torch.cdist(part, x) for part in x.split(chunk))  # (chunk, N) each
        return torch.cat([d.topk(k + 1, largest=False).values[:, -1] for d in distances])

    b_radius, precise, recalled = radii(b), 0, torch.zeros(len(b), dtype=torch.bool)
    for part, radius in zip(a.split(chunk), radii(a).split(chunk)):  # 50,000 x 50,000 distances at once would be 10 GB
        d = torch.cdist(part, b)  # (chunk, M)
        precise += int((d <= b_radius).any(1).sum())
        recalled |= (d <= radius[:, None]).any(0)
    return precise / len(a), float(recalled.float().mean())


# ----------------------------------------------------------------------------------------------------------------------
# Inception: the FID network of 2015-12-05, as torch-fidelity and pytorch-fid ported it. Names are nearly the file's.


def conv(c_in, c_out, kernel, stride=1, padding="same", first=nn.Identity()):
    """`first`, a pooling, if there is one; convolution, batch norm, ReLU. kernel: a side, or (height, width)."""
    return sequence(first=first, conv=nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False),
                    bn=nn.BatchNorm2d(c_out, eps=0.001), relu=nn.ReLU(inplace=True))


class Branches(nn.ModuleDict):
    """Modules side by side, whose outputs are concatenated."""

    def forward(self, x):
        return torch.cat([branch(x) for branch in self.values()], 1)


def chain(c, *shapes, last=()):
    """Convolutions of (channels, kernel, ...) on c channels, then the modules `last`: the public file's _1, _2, ..."""
    convs = [conv(c_in, *shape) for c_in, shape in zip((c, *(shape[0] for shape in shapes)), shapes)]
    return sequence(**{f"_{i}": module for i, module in enumerate([*convs, *last], 1)})


# a border pixel is the mean of what there is, not of zeros: TensorFlow's way
mean_pool = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
max_pool, halve = nn.MaxPool2d(3, 1, 1), nn.MaxPool2d(3, 2)


def mixed_a(c, pool):  # (N, c, 35, 35) -> (N, 224 + pool, 35, 35)
    return Branches({"branch1x1": conv(c, 64, 1),
                     "branch5x5": chain(c, (48, 1), (64, 5)),
                     "branch3x3dbl": chain(c, (64, 1), (96, 3), (96, 3)),
                     "branch_pool": conv(c, pool, 1, first=mean_pool)})


def mixed_b(c):  # (N, 288, 35, 35) -> (N, 768, 17, 17)
    return Branches({"branch3x3": conv(c, 384, 3, 2, 0),
                     "branch3x3dbl": chain(c, (64, 1), (96, 3), (96, 3, 2, 0)),
                     "pool": halve})


def mixed_c(c, mid):  # (N, 768, 17, 17) -> the same; a 7x7 convolution as two thin ones
    return Branches({"branch1x1": conv(c, 192, 1),
                     "branch7x7": chain(c, (mid, 1), (mid, (1, 7)), (192, (7, 1))),
                     "branch7x7dbl": chain(c, (mid, 1), (mid, (7, 1)), (mid, (1, 7)), (mid, (7, 1)), (192, (1, 7))),
                     "branch_pool": conv(c, 192, 1, first=mean_pool)})


def mixed_d(c):  # (N, 768, 17, 17) -> (N, 1280, 8, 8)
    return Branches({"branch3x3": chain(c, (192, 1), (320, 3, 2, 0)),
                     "branch7x7x3": chain(c, (192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2, 0)),
                     "pool": halve})


def mixed_e(c, pool):  # (N, c, 8, 8) -> (N, 2048, 8, 8)
    thin = lambda: [Branches({"a": conv(384, 384, (1, 3)), "b": conv(384, 384, (3, 1))})]
    return Branches({"branch1x1": conv(c, 320, 1),
                     "branch3x3": chain(c, (384, 1), last=thin()),
                     "branch3x3dbl": chain(c, (448, 1), (384, 3), last=thin()),
                     "branch_pool": conv(c, 192, 1, first=pool)})


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
        self.stem = sequence(Conv2d_1a_3x3=conv(3, 32, 3, 2, 0), Conv2d_2a_3x3=conv(32, 32, 3, 1, 0),
                             Conv2d_2b_3x3=conv(32, 64, 3), pool_1=halve,  # (N, 64, 73, 73)
                             Conv2d_3b_1x1=conv(64, 80, 1), Conv2d_4a_3x3=conv(80, 192, 3, 1, 0), pool_2=halve)
        # the last block pools by maximum: a slip of the original network, but the weights were trained with it
        self.mixed = sequence(Mixed_5b=mixed_a(192, 32), Mixed_5c=mixed_a(256, 64), Mixed_5d=mixed_a(288, 64),
                              Mixed_6a=mixed_b(288), Mixed_6b=mixed_c(768, 128), Mixed_6c=mixed_c(768, 160),
                              Mixed_6d=mixed_c(768, 160), Mixed_6e=mixed_c(768, 192), Mixed_7a=mixed_d(768),
                              Mixed_7b=mixed_e(1280, mean_pool), Mixed_7c=mixed_e(2048, max_pool))
        self.fc = nn.Linear(2048, 1008)

    @torch.no_grad()
    def forward(self, images):
        x = resize_tf1(images.to(self.fc.weight.device).float())
        x = ((x - 128) / 128).contiguous(memory_format=torch.channels_last)
        # TF32 and autocast would each move FID in the second decimal
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False), torch.autocast(x.device.type, enabled=False):
            pool = self.mixed(self.stem(x)).mean((2, 3))  # (N, 192, 35, 35) after the stem; (N, 2048)
        # the inception score leaves the bias out: so did the original code. In float64, or a GPU's TF32 would show
        return pool, (pool.double() @ self.fc.weight.double().T).float()


def load_inception(path):
    """The Inception of torch-fidelity's or pytorch-fid's weight file."""
    names = [(r"^(stem|mixed)\.", ""), (r"\._", "_"), (r"\.([ab])\.", r"\1.")]
    return load_network(Inception, path, "inception", names).to(memory_format=torch.channels_last)


# ----------------------------------------------------------------------------------------------------------------------
# A small classifier of the data set: the judge of the small runs, for Inception knows photographs and not 16 px shapes.
# The Frechet distance of its features is called FD, never FID. Features of a class need not see what the class leaves
# open: pictures that are all yellow can have the best FD and accuracy. So two figures look at no class, fd_thumb and
# modes. A mode is, for shapes, one of the 8 pairs of colour and ground; else one of 64 kinds of thumbnail.


class Classifier(nn.Module):
    """uint8 or float-in-[0,1] images (N, 3, side, side) -> features (N, 96), logits (N, classes).

    One CPU core trains it in minutes. Features are the 96 averaged channels before the last layer, few enough for 2,048
    images. Their mean variance on the training images is scaled to 1, or weight decay would decide the size of FD: now
    means one standard deviation off in every feature are FD 96."""

    def __init__(self, num_classes, img_size):
        super().__init__()
        self.num_classes, self.img_size = num_classes, img_size
        layers = []
        for c_in, c_out, stride in ((3, 24, 1), (24, 48, 2), (48, 48, 1), (48, 96, 2), (96, 96, 1)):
            layers += [nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]
        # channels last: 1.5x faster on a CPU for so few channels
        self.body = nn.Sequential(*layers).to(memory_format=torch.channels_last)
        self.last = nn.Linear(96, num_classes)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, images):
        if images.shape[1:] != (3, self.img_size, self.img_size):
            raise UserError(f"this classifier reads images of {self.img_size} px, not {tuple(images.shape)}")
        if images.dtype == torch.uint8:
            images = images.float() / 255
        x = images.to(self.last.weight.device, torch.float32) * 2 - 1
        features = self.body(x.contiguous(memory_format=torch.channels_last)).mean((2, 3))  # (N, 96)
        return features * self.scale, self.last(features)


def train_classifier(data, seed, device, batch=128):
    """A Classifier trained on a data set of pixels, in eval mode. `.accuracy` is that on images it has not seen,
    `.reference` the statistics of up to 10,000 training images that `figures_of` compares with."""
    if len(data) < 2:
        raise UserError(f"{data.name}: one picture is no data set: what is learnt from it cannot be tried on another")
    indices, test = np.arange(len(data)), None
    with contextlib.suppress(UserError):  # a folder need not have a test split, and many have one without classes
        test = open_data(data.name, "test", data.img_size, pixels=True)
    if test and test.class_names == data.class_names:
        held = evenly(test, 5000)
    else:
        say(f"{data.name}: no whole test split of these classes: every 20th picture is held out")
        test, held, indices = data, indices[::20], indices[indices % 20 > 0]
    with torch.random.fork_rng(devices=[]):  # the caller's random state is left alone: resume stays bit-exact
        torch.manual_seed(seed)
        net = Classifier(data.num_classes, data.img_size).to(device)
    # 240 training images per pixel of an image: 61 k for 16 px shapes, 246 k (5 epochs) for CIFAR-10
    steps = 240 * min(data.img_size, 32) ** 2 // batch
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps, pct_start=0.25)
    labels = torch.as_tensor(data.labels)
    for step in tqdm(range(steps), desc=f"classifier {seed}", unit="step", leave=False, disable=None, mininterval=1):
        picks, flips = train_indices(len(indices), batch, step, seed)
        picks = indices[picks]
        logits = net(data.images(picks, flips).to(device))[1]
        loss = F.cross_entropy(logits, labels[picks].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    net.eval().requires_grad_(False)
    spread = mean_and_covariance(classify(net, data.images(evenly(data, 5000)))[0])[1]
    net.scale.fill_((net.last.in_features / spread.trace()) ** 0.5)
    net.reference = statistics_of(net, data)
    logits = classify(net, test.images(held))[1]
    net.accuracy = float((logits.argmax(1) == torch.as_tensor(test.labels[held])).float().mean())
    return net


def load_or_train_classifier(data, folder, seed=0, device="cpu"):
    """The Classifier of `data` (a train split of pixels), from folder/classifier_<seed>.pt, or trained and put there.
    One rank or all may call. Classifiers of two seeds are independent judges: train against one, report the other."""
    if not data.pixels:
        raise UserError("the small classifier reads pixels, and this data set holds latents: judge with inception")
    path = Path(folder) / f"classifier_{seed}.pt"
    made_from = {"data": Path(data.name).name, "img_size": data.img_size, "classes": data.class_names, "seed": seed,
                 "sha256": data.sha256}
    if not path.exists():
        os.makedirs(folder, exist_ok=True)  # complains now, not after the training
        net = train_classifier(data, seed, device).cpu()
        save_checkpoint({"made_from": made_from, "accuracy": net.accuracy, "model": net.state_dict(),
                         "reference": net.reference}, path)
        say(f"classifier {seed} of {data.name}: test accuracy {net.accuracy:.4f}, saved as {path}")
    net = load_classifier(path, device)
    other = [name for name in ("classes", "seed", "sha256") if net.made_from.get(name) != made_from[name]]
    if other:
        raise UserError(f"{path} was made with another {', '.join(other)} than {data.name} has: judge by it without "
                        "--data, or choose another folder (rl.py: copy the student there) for one of this data")
    return net


def load_classifier(path, device="cpu"):
    """The Classifier in a file. It judges without data: the file holds the data's statistics too."""
    saved = read_checkpoint(path)
    with reading(path, "classifier", ": give the classifier_0.pt that a run of distill.py leaves in its folder"):
        made_from, reference = saved["made_from"], saved["reference"]
        net = fill_model(lambda: Classifier(len(made_from["classes"]), made_from["img_size"]), saved["model"], path)
        net.made_from, net.reference, net.accuracy = made_from, reference, saved["accuracy"]
        net.class_names, net.counts = made_from["classes"], reference["classes"]
    net.name = str(path)
    return net.to(device, memory_format=torch.channels_last)


def classifier_beside(checkpoint, seed=0):
    """The file of the data's classifier that lies beside a checkpoint: classifier_<seed>.pt, or None."""
    path = Path(checkpoint).with_name(f"classifier_{seed}.pt")
    return path if path.exists() else None


def labels_like(counts, n):
    """(n,) labels with the shares of `counts` (classes,): a distance to data compares how classes are mixed too."""
    if counts.max() <= 1.01 * counts.min():
        return torch.arange(n) % len(counts)
    ends = counts.double().cumsum(0)
    # steps of the golden ratio fill [0, 1) evenly, however many: picture i is of one class whatever n is
    at = torch.arange(n).double() * (5**0.5 - 1) / 2 % 1
    return torch.searchsorted(ends / ends[-1], at, right=True)


def evenly(data, n=10000):
    """Indices of `n` images spread evenly over a data set."""
    return np.linspace(0, len(data) - 1, min(n, len(data))).astype(np.int64)


def finite(x):
    """What a judge says, on the CPU; UserError for NaN, which argmax would take for the largest."""
    if not x.isfinite().all():
        raise UserError("a judge says NaN or infinity: look at the images, and at the judge's weights")
    return x.cpu()


@torch.no_grad()
def classify(classifier, images):
    """uint8 (N, 3, H, W) -> features (N, F), logits (N, classes) on the CPU."""
    features, logits = zip(*map(classifier, images.split(500)))
    return finite(torch.cat(features)), finite(torch.cat(logits))


def thumbnails(images):
    """uint8 (N, 3, H, W) -> (N, 48): the means of 4 x 4 parts, in [-1, 1]."""
    return torch.cat([F.adaptive_avg_pool2d(part.float() / 127.5 - 1, 4).flatten(1) for part in images.split(500)])


def thumbnail_modes(reference, thumbs):
    """Thumbnails (N, 48) -> the mode of each, (N,) long in 0..63: on which side of the mean it lies in 6 directions."""
    bits = (thumbs.double() - reference["thumb_mu"]) @ reference["directions"] > 0  # (N, 6)
    return bits.long() @ 2 ** torch.arange(bits.shape[1])


def statistics_of(classifier, data):
    """What real pictures are like: mean and covariance of features ("mu", "sigma") and of thumbnails, the "shares" (M,)
    of modes, how many pictures each of the "classes" has; but for shapes, 6 main "directions" (48, 6) of thumbnails."""
    images, reference = data.images(evenly(data)), {"classes": data.counts}
    thumbs = thumbnails(images)
    reference["mu"], reference["sigma"] = mean_and_covariance(classify(classifier, images)[0])
    reference["thumb_mu"], reference["thumb_sigma"] = mean_and_covariance(thumbs)
    if data.name == "shapes":
        return {**reference, "shares": torch.ones(len(SHAPE_MODES)).double() / len(SHAPE_MODES)}
    reference["directions"] = torch.linalg.eigh(reference["thumb_sigma"])[1][:, -6:].contiguous()
    counts = torch.bincount(thumbnail_modes(reference, thumbs), minlength=64).double() + 0.5  # 0 has no logarithm
    return {**reference, "shares": counts / counts.sum()}


def examine(classifier, images, labels=None):
    """uint8 images (N, 3, H, W) -> {"features" (N, F), "thumbs" (N, 48), "mode" (N,)}; with labels (N,), the classes
    that were asked for, "accuracy" too: (N,) bool, whether the classifier sees these."""
    features, logits = classify(classifier, images)
    thumbs, reference = thumbnails(images), classifier.reference
    modes = thumbnail_modes(reference, thumbs) if "directions" in reference else shape_modes(images)
    seen = {"features": features, "thumbs": thumbs, "mode": modes}
    return seen if labels is None else {**seen, "accuracy": logits.argmax(1) == torch.as_tensor(labels).cpu()}


def figures_of(classifier, seen):
    """What `examine` saw of all images -> {"fd", "accuracy", "fd_thumb", "modes"}; of shapes each mode's share too.

    With q and p the shares of generated and of real pictures in each of M modes, "modes" is M exp(-KL(q || p)): M where
    q = p (of 500 pictures chance leaves 60 of 64), half of it where half of p is lost."""
    real = classifier.reference
    row = {"fd": frechet_distance(*mean_and_covariance(seen["features"]), real["mu"], real["sigma"])}
    if "accuracy" in seen:
        row["accuracy"] = float(seen["accuracy"].double().mean())
    # like the classifier's features, thumbnails count as if scaled to a mean variance of 1
    row["fd_thumb"] = frechet_distance(*mean_and_covariance(seen["thumbs"]), real["thumb_mu"], real["thumb_sigma"])
    row["fd_thumb"] *= float(len(real["thumb_mu"]) / real["thumb_sigma"].trace())
    p = real["shares"]
    q = torch.bincount(seen["mode"], minlength=len(p)).double() / len(seen["mode"])
    row["modes"] = len(p) * math.exp(-torch.xlogy(q, q / p).sum())
    if len(p) == len(SHAPE_MODES):
        row["census"] = dict(zip(SHAPE_MODES, q.numpy().round(4).tolist()))
    return row


def judge(classifier, images, labels):
    """`figures_of` uint8 images (N, 3, H, W) that were asked to show labels (N,)."""
    return figures_of(classifier, examine(classifier, images, labels))


# ----------------------------------------------------------------------------------------------------------------------
# CLIP, and PickScore, which is a CLIP: do picture and prompt belong together?

PIXEL_MEAN, PIXEL_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # openai/CLIP


def clip_pixels(pixels, side):
    """[0,1] (N, 3, H, W) -> normalised (N, 3, side, side): short side by bicubic, centre crop, CLIP's mean and std.
    Differentiable. Pillow's bicubic, which the public code uses, rounds to 8 bits after each direction: at most 1.2/255
    apart, 0.3/255 on average (test_all.py)."""
    h, w = pixels.shape[2:]
    if (h, w) != (side, side):
        size = (side, int(side * w / h)) if h <= w else (int(side * h / w), side)
        for part in ((h, size[1]), size):  # width first, then height, cut to the range after each, as Pillow does
            pixels = F.interpolate(pixels, part, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        top, left = round((size[0] - side) / 2), round((size[1] - side) / 2)
        pixels = pixels[:, :, top:top + side, left:left + side]
    mean, std = (torch.tensor(v, device=pixels.device).view(3, 1, 1) for v in (PIXEL_MEAN, PIXEL_STD))
    return (pixels - mean) / std


def transformer(width, depth, heads, mlp, act, eps):
    """Pre-norm blocks, as CLIP, PickScore and BLIP's image tower have them: (T, N, width) -> the same. With N first
    torch turns them inside, by which the gradient takes twice as long on a CPU."""
    block = nn.TransformerEncoderLayer(width, heads, mlp, 0.0, act, eps, norm_first=True)
    return nn.TransformerEncoder(block, depth, enable_nested_tensor=False)


class ImageTower(nn.Module):
    """[0,1] pixels (N, 3, H, W) -> normed tokens (N, 1 + patches, width), the class token first.
    clip: a norm before the blocks and no bias in the patch embedding; BLIP has it the other way round."""

    def __init__(self, width, depth, heads, mlp, patch, side, act, eps=1e-5, clip=True):
        super().__init__()
        self.side = side  # px
        self.patch = nn.Conv2d(3, width, patch, patch, bias=not clip)
        self.class_token = nn.Parameter(torch.empty(width))
        self.position = nn.Parameter(torch.empty(1 + (side // patch) ** 2, width))
        self.norm_pre = nn.LayerNorm(width, eps) if clip else nn.Identity()
        self.blocks = transformer(width, depth, heads, mlp, act, eps)
        self.norm_post = nn.LayerNorm(width, eps)

    def forward(self, pixels):
        x = self.patch(clip_pixels(pixels, self.side)).flatten(2).transpose(1, 2)  # (N, patches, width)
        x = torch.cat([self.class_token.expand(len(x), 1, -1), x], 1)  # (N, 1 + patches, width)
        x = self.norm_pre(x + self.position).transpose(0, 1).contiguous()  # (1 + patches, N, width)
        return self.norm_post(self.blocks(x)).transpose(0, 1)


class TextTower(nn.Module):
    """ids (N, T <= 77) -> (N, width) at the end-of-text token; causal."""

    def __init__(self, width, depth, heads, mlp, act):
        super().__init__()
        self.tokens, self.position = nn.Embedding(49408, width), nn.Parameter(torch.empty(77, width))
        self.blocks = transformer(width, depth, heads, mlp, act, 1e-5)
        self.norm = nn.LayerNorm(width)

    def forward(self, ids):
        x = self.tokens(ids) + self.position[:ids.shape[1]]
        causal = nn.Transformer.generate_square_subsequent_mask(ids.shape[1], x.device, x.dtype)
        x = self.blocks(x.transpose(0, 1).contiguous(), causal, is_causal=True).transpose(0, 1)
        # the end of text is the largest id; argmax finds the first, so Hugging Face's padding by it changes nothing
        return self.norm(x)[torch.arange(len(x), device=x.device), ids.argmax(1)]


class CLIP(nn.Module):
    """Image and text towers with a common space of E dimensions."""

    def __init__(self, image, text, embed, act):
        super().__init__()
        self.image, self.text = ImageTower(**image, act=act), TextTower(**text, act=act)
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


# OpenAI's CLIP and PickScore. No file tells heads and activation: LAION's ViT-L/14, which has OpenAI's shapes but GELU,
# would be read without a complaint and score slightly wrong
VIT_L14 = {"image": dict(width=1024, depth=24, heads=16, mlp=4096, patch=14, side=224),
           "text": dict(width=768, depth=12, heads=12, mlp=3072),
           "embed": 768, "act": lambda x: x * torch.sigmoid(1.702 * x)}
VIT_H14 = {"image": dict(width=1280, depth=32, heads=16, mlp=5120, patch=14, side=224),
           "text": dict(width=1024, depth=24, heads=16, mlp=4096), "embed": 1024, "act": F.gelu}

CLIP_NAMES = [  # ours, in OpenAI's files, in Hugging Face's
    (r"^image\.patch", "visual.conv1", "vision_model.embeddings.patch_embedding"),
    (r"^image\.class_token", "visual.class_embedding", "vision_model.embeddings.class_embedding"),
    (r"^image\.position", "visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    (r"^image\.norm_pre", "visual.ln_pre", "vision_model.pre_layrnorm"),  # the typing error is in the public files
    (r"^image\.norm_post", "visual.ln_post", "vision_model.post_layernorm"),
    (r"^image\.blocks\.layers", "visual.transformer.resblocks", "vision_model.encoder.layers"),
    (r"^image_proj", "visual.proj", "visual_projection.weight"),
    (r"^text_proj", "text_projection", "text_projection.weight"),
    (r"^text\.tokens", "token_embedding", "text_model.embeddings.token_embedding"),
    (r"^text\.position", "positional_embedding", "text_model.embeddings.position_embedding.weight"),
    (r"^text\.norm", "ln_final", "text_model.final_layer_norm"),
    (r"^text\.blocks\.layers", "transformer.resblocks", "text_model.encoder.layers"),
    (r"self_attn\.in_proj_(\w+)", r"attn.in_proj_\1", r"self_attn.{q,k,v}_proj.\1"),
    (r"self_attn\.out_proj", "attn.out_proj", "self_attn.out_proj"),
    (r"\.norm([12])\.", r".ln_\1.", r".layer_norm\1."),
    (r"\.linear1\.", ".mlp.c_fc.", ".mlp.fc1."), (r"\.linear2\.", ".mlp.c_proj.", ".mlp.fc2.")]


def load_clip(path):
    """OpenAI's CLIP ViT-L/14: their .pt file, which is a TorchScript archive, or its state dict."""
    names = [(ours, openai) for ours, openai, _ in CLIP_NAMES]
    return load_network(lambda: CLIP(**VIT_L14), path, "clip", names)


def load_pickscore(path):
    """PickScore, a CLIP ViT-H/14 in Hugging Face's names: its pytorch_model.bin."""
    names = [(ours, hugging_face) for ours, _, hugging_face in CLIP_NAMES]
    turned = ("visual_projection.weight", "text_projection.weight")  # an nn.Linear's: the transpose of OpenAI's
    return load_network(lambda: CLIP(**VIT_H14), path, "pickscore", names, turned=turned)


class Tokenizer:
    """CLIP's byte-pair encoding: Tokenizer(bpe_path)(texts) -> ids (N, 77) long. The standard library stands for the
    public code's ftfy and regex: curly quotes and ligatures stay, U+00B2 and its like count as letters."""

    def __init__(self, path):
        with (reading(path, "merge table of CLIP", "; python data.py --get bpe fetches it"),
              gzip.open(need_file(path, "bpe"), "rt", encoding="utf-8") as file):
            merges = [tuple(line.split()) for line in file.read().split("\n")[1:1 + 48894]]
            if len(merges) != 48894 or any(len(pair) != 2 for pair in merges):
                raise ValueError(f"{len(merges)} pairs, 48894 are wanted")
        # every byte gets a printable character: itself where it has one, else the next free one from 256 on (GPT-2)
        shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [b for b in range(256) if b not in shown]
        self.byte = {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(others)}
        symbols = [self.byte[b] for b in shown + others]
        words = [*symbols, *(s + "</w>" for s in symbols), *map("".join, merges), "<|startoftext|>", "<|endoftext|>"]
        self.ids = {word: i for i, word in enumerate(words)}
        self.rank = {pair: i for i, pair in enumerate(merges)}

    def pieces(self, word):
        """One word -> its byte-pair pieces: the earliest merge of the table first, until none applies."""
        parts = [self.byte[b] for b in word.encode(errors="replace")]  # a class's name may hold bytes of no encoding
        parts[-1] += "</w>"
        while len(parts) > 1:
            ranks = [self.rank.get(pair, math.inf) for pair in zip(parts, parts[1:])]
            i = ranks.index(min(ranks))
            if ranks[i] == math.inf:
                break
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        return parts

    def __call__(self, texts, length=77):
        out = torch.zeros(len(texts), length, dtype=torch.long)
        start, end = self.ids["<|startoftext|>"], self.ids["<|endoftext|>"]
        for row, text in zip(out, texts):
            # the public pattern: 's 't 're 've 'm 'll 'd, letters, single digits, the rest
            words = re.findall(r"'(?:s|t|re|ve|m|ll|d)|[^\W\d_]+|\d|(?:[^\s\w]|_)+", html.unescape(text).lower())
            ids = [self.ids[piece] for word in words for piece in self.pieces(word)]
            ids = [start, *ids[:length - 2], end]  # too long a text is cut, its end marked all the same
            row[:len(ids)] = torch.tensor(ids)
        return out


# ----------------------------------------------------------------------------------------------------------------------
# ImageReward: BLIP's image tower, a BERT that looks at it, and a line of weights: what would people prefer?


class ImageReward(nn.Module):
    """THUDM/ImageReward, Xu et al. 2023, arXiv 2304.05977."""

    def __init__(self):
        super().__init__()
        self.image = ImageTower(width=1024, depth=24, heads=16, mlp=4096, patch=16, side=224, act=F.gelu, eps=1e-6,
                                clip=False)
        self.words, self.positions = nn.Embedding(30524, 768), nn.Embedding(512, 768)
        self.norm = nn.LayerNorm(768, 1e-12)
        layer = nn.TransformerDecoderLayer(768, 12, 3072, 0.0, F.gelu, 1e-12)
        layer.multihead_attn = nn.MultiheadAttention(768, 12, kdim=1024, vdim=1024)  # to the image
        self.bert = nn.TransformerDecoder(layer, 12)
        # linear after linear: the activations are commented out in the public code, and the weights are trained so
        self.mlp = sequence(_0=nn.Linear(768, 1024), _2=nn.Linear(1024, 128), _4=nn.Linear(128, 64),
                            _6=nn.Linear(64, 16), _7=nn.Linear(16, 1))

    def read_text(self, input_ids, attention_mask, image):
        """(N, T) ids, (N, T) 1 = a word, image tokens (N, 197, 1024) -> the last state at [CLS], (N, 768)."""
        x = self.norm(self.words(input_ids) + self.positions.weight[:input_ids.shape[1]])  # (N, T, 768)
        x, image = (y.transpose(0, 1).contiguous() for y in (x, image))  # (T, N, 768), (197, N, 1024)
        return self.bert(x, image, tgt_key_padding_mask=attention_mask == 0)[0]

    def score(self, pixels, input_ids, attention_mask):
        """Pixels in [0,1] (N, 3, H, W) and WordPiece ids (N, 35) -> (N,): about mean 0, variance 1 on its own data."""
        x = self.mlp(self.read_text(input_ids, attention_mask, self.image(pixels)))
        return (x[:, 0] - 0.16717362830052426) / 1.0333394966054072  # the public constants


BLIP_NAMES = [  # ours, in ImageReward.pt
    (r"^image\.class_token", "blip.visual_encoder.cls_token"), (r"^image\.position", "blip.visual_encoder.pos_embed"),
    (r"^image\.patch", "blip.visual_encoder.patch_embed.proj"), (r"^image\.norm_post", "blip.visual_encoder.norm"),
    (r"^(image\..*)self_attn\.in_proj_", r"\1attn.qkv."), (r"^(image\..*)self_attn\.out_proj", r"\1attn.proj"),
    (r"^(image\..*)linear", r"\1mlp.fc"), (r"^image\.blocks\.layers", "blip.visual_encoder.blocks"),
    (r"^words", "blip.text_encoder.embeddings.word_embeddings"),
    (r"^positions", "blip.text_encoder.embeddings.position_embeddings"),
    (r"^norm", "blip.text_encoder.embeddings.LayerNorm"), (r"^bert\.layers", "blip.text_encoder.encoder.layer"),
    (r"self_attn\.in_proj_(\w+)", r"attention.self.{query,key,value}.\1"),
    (r"multihead_attn\.in_proj_bias", "crossattention.self.{query,key,value}.bias"),
    (r"multihead_attn\.q_proj_weight", "crossattention.self.query.weight"),
    (r"multihead_attn\.k_proj_weight", "crossattention.self.key.weight"),
    (r"multihead_attn\.v_proj_weight", "crossattention.self.value.weight"),
    (r"self_attn\.out_proj", "attention.output.dense"), (r"multihead_attn\.out_proj", "crossattention.output.dense"),
    (r"encoder\.layer(.*)\.norm1", r"encoder.layer\1.attention.output.LayerNorm"),
    (r"encoder\.layer(.*)\.norm2", r"encoder.layer\1.crossattention.output.LayerNorm"),
    (r"encoder\.layer(.*)\.norm3", r"encoder.layer\1.output.LayerNorm"),
    (r"\.linear1", ".intermediate.dense"), (r"\.linear2", ".output.dense"), (r"^mlp\._", "mlp.layers.")]


def load_imagereward(path):
    """ImageReward.pt, a plain state dict. Its contrastive projections have no part in the reward and are left out."""
    unused = ("blip.vision_proj.", "blip.text_proj.")
    return load_network(ImageReward, path, "imagereward", BLIP_NAMES, unused)


class WordPiece:
    """bert-base-uncased's tokenizer from its vocab.txt: WordPiece(path)(texts) -> ids (N, 35), mask (N, 35), long."""

    def __init__(self, path):
        with reading(path, "vocabulary", "; python data.py --get imagereward_vocab fetches it"):
            words = Path(need_file(path, "imagereward_vocab")).read_text(encoding="utf-8").split("\n")
            self.ids = {word: i for i, word in enumerate(words)}
            self.pad, self.unknown, self.start, self.end = (self.ids[f"[{word}]"] for word in "PAD UNK CLS SEP".split())

    def pieces(self, word):
        """The longest known beginning, then the longest known ##continuation, ...; one gap and all is [UNK]."""
        found, mark = [], ""
        while word:
            stop = next((n for n in range(len(word), 0, -1) if mark + word[:n] in self.ids), None)
            if stop is None:
                return [self.unknown]
            found.append(self.ids[mark + word[:stop]])
            word, mark = word[stop:], "##"
        return found

    def __call__(self, texts, length=35):
        ids = torch.full((len(texts), length), self.pad)
        for row, text in zip(ids, texts):
            # lower case without accents, split at spaces and around every sign
            text = "".join(c for c in unicodedata.normalize("NFD", text.lower()) if unicodedata.category(c) != "Mn")
            found = [piece for word in re.findall(r"[^\W_]+|[^\w\s]|_", text) for piece in self.pieces(word)]
            found = [self.start, *found[:length - 2], self.end]
            row[:len(found)] = torch.tensor(found)
        return ids, (ids != self.pad).long()


def prompt_scorer(kind, class_names, template, folder=".", device="cpu"):
    """score(pixels in [0,1] (N, 3, H, W), labels (N,)) -> (N,), differentiable in the pixels: rl.py's rewards.
    kind: clip, pickscore or imagereward; folder: where data.py --get put the public files."""
    if "{class}" not in template:
        raise UserError(f"the prompt {template!r} has no {{class}} in it")
    prompts = [template.replace("{class}", name) for name in class_names]
    place = lambda name: os.path.join(folder, WEIGHTS[name])
    if kind == "imagereward":
        ids, mask = (x.to(device) for x in WordPiece(place("imagereward_vocab"))(prompts))  # (classes, 35)
        model = load_imagereward(place(kind)).to(device)
        return lambda pixels, labels: model.score(pixels, ids[labels], mask[labels])
    ids = Tokenizer(place("bpe"))(prompts).to(device)
    ids = ids[:, :int(ids.argmax(1).max()) + 1]  # up to the end token, the highest id: a fifth of the work
    model = (load_clip if kind == "clip" else load_pickscore)(place(kind)).to(device)
    with torch.no_grad():  # once
        text = torch.cat([model.encode_text(part) for part in ids.split(64)])  # (classes, E)
    return lambda pixels, labels: model.score(pixels, text[labels])


# ----------------------------------------------------------------------------------------------------------------------
# What is judged, and what it is compared with


@dataclass
class Pictures(Data):
    """Pictures to be judged. A label is -1 where nobody says what the picture shows. Without class_names (None) labels
    are numbers of the judges' classes."""
    made_by: dict = field(default_factory=dict)  # {setting: value} of what is drawn here

    def __post_init__(self):
        if len(self) < 10:
            raise UserError(f"{self.name}: {len(self)} image(s) are no distribution: 10 at least")


def read_npz(path):
    """{name: array} of all that an .npz holds."""
    if not str(need_file(path)).endswith(".npz"):
        raise UserError(f"{path} is no .npz of images, or of mu and sigma")
    with reading(path, ".npz file"), np.load(path) as file:  # numpy's default refuses pickled objects
        return dict(file)


def npz_pictures(path, arrays):
    """The pictures in an .npz of sample.py --num or ADM: arr_0 uint8 (N, H, W, 3), perhaps labels (ADM's arr_1) and
    class_names. The file is read again at the pictures' turn: 9.8 GB for 50,000 of 256 px, in every process."""
    images = arrays.get("arr_0", np.empty(0))
    if images.dtype != np.uint8 or images.shape[3:] != (3,):
        here = {name: f"{array.dtype} {array.shape}" for name, array in arrays.items()}
        raise UserError(f"{path}: wanted is arr_0, uint8 (N, H, W, 3), RGB in 0..255; here are {here}")
    names = arrays["class_names"].tolist() if "class_names" in arrays else None
    unknown = np.full(len(images), -1)
    labels = arrays.get("labels", arrays.get("arr_1", unknown))
    if labels.shape != unknown.shape or labels.dtype.kind not in "iu":
        labels = unknown
    again = functools.cache(lambda: read_npz(path)["arr_0"])
    return Pictures(str(path), names, images.shape[1], labels,
                    lambda numbers: torch.from_numpy(again()[numbers].transpose(0, 3, 1, 2).copy()))  # NHWC -> NCHW


def folder_pictures(path, size=None):
    """Every image below a folder. size: crop to it as ADM does; None: as they are, all of one size."""
    names, files, labels = find_images(path)
    if len(names) == 1:
        names, labels = None, np.full_like(labels, -1)  # one folder names no classes
    side = size or read_image(files[0]).shape[2]

    def read_one(number):
        picture = read_image(files[number], size)
        _, height, width = picture.shape
        if (height, width) != (side, side):
            raise UserError(f"{files[number]} is {width} x {height}, not {side} x {side}: crop all by --size")
        return picture

    def read(numbers):
        with ThreadPoolExecutor(8) as pool:  # decoding runs outside Python's lock
            return torch.from_numpy(np.stack(list(pool.map(read_one, numbers))))

    return Pictures(f"{path} (ADM centre crop to {size} px)" if size else str(path), names, side, labels, read)


def checkpoint_pictures(path, args, device, vae, classifier):
    """-> [Pictures] for each of --ar_steps and --guidance, drawn from a checkpoint as they are judged.
    Image i is that of (seed, i). Classes are as frequent as in the classifier's data, where it knows their names."""
    model = load_mar(path)
    check_vae(model, vae)
    known = dict(zip(classifier.class_names, classifier.counts.tolist())) if classifier else {}
    names, counts = model.class_names or [*known], torch.ones(model.config.num_classes)
    if len(names) == len(counts) and set(names) <= known.keys():
        counts = torch.tensor([known[name] for name in names])
    labels = labels_like(counts, args.num).numpy()

    again = functools.cache(lambda: bf16_weights(load_mar(path).to(device)))  # the memory holds one row's network

    def read(how, numbers):
        return draw(again(), labels[numbers], start=int(numbers[0]), vae=vae, batch=args.batch, **how)

    said = lambda how: ", ".join(f"{name} {value}" for name, value in how.items())
    return [Pictures(f"{path} ({said(how)})", model.class_names, model.config.img_size, labels,
                     functools.partial(read, how), made_by=how) for how in ways_to_draw(args, model)]


def agree_on_classes(sources, classifier, need_labels):
    """-> class names: the classifier's; else the first that a source has; else ImageNet's. Changes the labels of each
    source to numbers of these names; where they do not fit, to -1, or UserError if the judges `need_labels`."""
    named = [x.class_names for x in (classifier, *sources) if x and x.class_names]
    names = named[0] if named else read_class_names()
    shown = f"{names[0]}, ... ({len(names)} classes)"
    for source in sources:
        source_names, labels = source.class_names or names, source.labels
        if set(source_names) <= set(names) and labels.min() >= 0 and labels.max() < len(source_names):
            if source.class_names is None:
                say(f"{source.name}: labels without names are taken to mean {shown}")
            source.labels = np.array([names.index(name) for name in source_names])[labels]
            source.class_names = names
            if classifier:
                compare_frequencies(source, classifier)
        elif need_labels:
            raise UserError(f"{source.name} has no labels, or others than {shown}: give an .npz with labels, or a "
                            "folder of class folders, and other classes in another call")
        else:
            say(f"{source.name} has no labels, or others than {shown}: no accuracy of it")
            source.labels = np.full(len(source), -1)
    return names


def compare_frequencies(source, classifier):
    """Say where classes are not as frequent as in the classifier's data: FD measures the frequencies too."""
    distance = (source.counts / len(source) - classifier.counts / classifier.counts.sum()).abs().sum() / 2
    if distance > 0.1:
        say(f"note: {source.name}: class frequencies differ from the data's (total variation {distance:.0%})")


def statistics_in(path, arrays):
    """mu, sigma of a statistics file: keys mu, sigma, as ADM, MAR, torch-fidelity and pytorch-fid write them."""
    mu, sigma = (np.asarray(arrays.get(name, 0), np.float64) for name in ("mu", "sigma"))
    if mu.shape != (2048,) or sigma.shape != (2048, 2048) or not np.isfinite(mu.sum() + sigma.sum()):
        raise UserError(f"{path} holds {sorted(map(str, arrays))[:6]}; wanted are mu (2048,), here {mu.shape}, and "
                        f"sigma (2048, 2048), here {sigma.shape}, without NaN and infinity")
    return mu, sigma


def open_reference(path, sources):
    """--ref -> (statistics in a file: {"mu", "sigma", "n" (None: unknown)}, or {}; Pictures, or None). ADM's file has
    both: statistics of all of ImageNet, for FID, and 10,000 pictures, for KID, precision and recall."""
    if os.path.isdir(path):
        sizes = {source.img_size for source in sources}
        if len(sizes) > 1:
            raise UserError(f"--ref {path} is cropped to the size of the samples, and these have {sizes} px: give "
                            "samples of one size in a call")
        return {}, folder_pictures(path, *sizes)
    arrays = read_npz(path)
    images = npz_pictures(path, arrays) if "arr_0" in arrays else None
    if images and "mu" not in arrays:
        return {}, images
    mu, sigma = statistics_in(path, arrays)
    if not images and "made_from" not in arrays:  # neither ADM's nor --save_stats': nothing in it says whose it is
        say(f"note: {path} must come from TF1's bilinear resize, as ADM's, MAR's and torch-fidelity's do; those of "
            "pytorch-fid come from another, by which a folder has FID 112 against itself")
    return {"mu": mu, "sigma": sigma, "n": arrays.get("n")}, images


# ----------------------------------------------------------------------------------------------------------------------
# Judging

FIGURES = {  # a row's figures, in the table's order, and what they say
    "fid": "to mu, sigma of {ref}, n = {n}; images resized to 299 by TF1 bilinear, no half-pixel centres, float32",
    "is": "10 splits after a shuffle, as torch-fidelity's; logits without bias",
    "kid": "to {images} images of {ref}; mean of 100 subsets of 1,000 or all, unbiased, (x.y/2048+1)^3",
    "precision": "share of the generated inside the manifold of the images that KID is to, k = 3",
    "recall": "share of the images that KID is to inside the manifold of the generated, k = 3",
    "fd": "by {classifier} to 10,000 training images at most; not FID",
    "fd_thumb": "Frechet distance of 4 x 4 thumbnails to the images that FD is to",
    "modes": "M exp(-KL(q || p)), q and p the shares of generated and real images in M modes: 8 of shapes, else 64",
    "accuracy": "by {classifier}, whose own on test images is {accuracy:.4f}",
    "clip": "exp(logit_scale) * cosine with the prompt {prompt!r}; OpenAI's ViT-L/14, pixels by bicubic",
    "pickscore": "exp(logit_scale) * cosine with the prompt {prompt!r}; pixels by bicubic",
    "imagereward": "normalised as published, prompt {prompt!r}",
}


def meanings(row, reference, classifier, args):
    """FIGURES' lines of the figures that a row has, filled in."""
    facts = {"ref": args.ref, "prompt": args.prompt}
    facts["n"] = reference.get("n") or "unknown"
    facts["images"] = len(reference.get("features", ()))
    if classifier:
        facts |= {"classifier": classifier.name, "accuracy": classifier.accuracy}
    return [f"{name}: {text.format(**facts)}" for name, text in FIGURES.items() if name in row]


def make_judges(args, names, classifier, device):
    """-> (Inception or None, ask). ask(images uint8 (n, 3, H, W), labels (n,) or None) is what all of --judges say,
    {what: tensor (n, ...)}. names: of the classes that labels are numbers of."""
    scorers = {kind: prompt_scorer(kind, read_class_names(of_data=names), args.prompt, args.folder, device)
               for kind in PROMPTED if kind in args.judges}
    inception = None
    if "inception" in args.judges:
        inception = load_inception(os.path.join(args.folder, WEIGHTS["inception"])).to(device)

    def ask(images, labels):
        said = {kind: score(images.to(device).float() / 255, labels.to(device)) for kind, score in scorers.items()}
        if inception:
            said["pool"], said["logits"] = inception(images)
        if classifier:
            said |= examine(classifier, images, labels)
        return said
    return inception, ask


@torch.no_grad()
def collect(pictures, ask, batch, rank, world):
    """What `ask` says of every picture -> {what: tensor (N, ...)} on rank 0, None on the others.
    A rank judges one stretch and keeps what was said in memory: 600 MB of Inception of 50,000, all ranks together."""
    mine, parts = np.array_split(np.arange(len(pictures)), world)[rank], []
    starts = range(0, len(mine), batch)
    for start in tqdm(starts, printable(pictures.name[:40]), unit="batch", disable=rank > 0 or None):
        numbers = mine[start:start + batch]
        labels = torch.from_numpy(pictures.labels[numbers])
        said = ask(pictures.read(numbers), labels if labels[0] >= 0 else None)
        parts.append({what: finite(values) for what, values in said.items()})
    if world > 1:
        of_ranks = [None] * world if rank == 0 else None
        dist.gather_object(parts, of_ranks)
        if rank > 0:
            return None
        parts = sum(of_ranks, [])
    return {what: torch.cat([part[what] for part in parts]) for what in parts[0]}


def make_row(pictures, said, reference, classifier, args):
    """What the judges said of every picture -> a row of the table: what was judged, the figures, their meaning."""
    row = {"name": pictures.name, "n": len(pictures), "made_by": pictures.made_by}
    if "pool" in said:
        row["is"], row["is_std"] = inception_score(said["logits"], shuffle=True)
        mu, sigma = mean_and_covariance(said["pool"])
        if args.save_stats:
            kept = {"mu": mu.float().numpy(), "sigma": sigma.numpy()}  # torch-fidelity compares these types
            with replacing(args.save_stats, "wb") as file:
                np.savez(file, n=len(pictures), made_from=pictures.name, **kept)
    if reference:
        row["fid"] = frechet_distance(mu, sigma, reference["mu"], reference["sigma"])
    if "features" in reference:
        row["kid"], row["kid_std"] = kernel_distance(said["pool"], reference["features"])
        row["precision"], row["recall"] = precision_recall(said["pool"], reference["features"])
    if classifier:
        row |= figures_of(classifier, said)
    for kind in PROMPTED:
        if kind in said:
            row[kind] = float(said[kind].double().mean())
    few = min(len(pictures), reference.get("n") or len(pictures))
    if few < 2048 and {"fid", "fd"} & set(row):
        say(f"warning: {pictures.name}: {few} images on one side. Below 2,048 FID and FD say more about n than about "
            "the images, and KID scatters: compare with equal n only")
    row["conventions"] = meanings(row, reference, classifier, args)
    return row


def table(rows, columns):
    """The text of rows (name, {column: number}); a number that a row lacks is "-"."""
    lines = ["".join(f"{column[-11:]:>12}" for column in columns) + "  of"]
    for name, row in rows:
        cells = [f"{row[column]:.5g}" if column in row else "-" for column in columns]
        lines.append("".join(f"{cell:>12}" for cell in cells) + f"  {name}")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------------------
# The command


def parse_args(argv=None):
    """The flags, contradictions refused."""
    p = Parser("The judges of samples.")
    flag = p.add_argument
    flag("samples", nargs="*", default=[], help="images to judge: .npz files (arr_0) or folders, a row each")
    flag("--ckpt", nargs="+", default=[], help="checkpoints to judge: images are drawn on the fly")
    flag("--judges", nargs="+", choices=JUDGES, default=["inception"], help="each brings columns")
    flag("--ref", help=".npz of mu and sigma (FID alone) or of images; or a folder, cropped like the samples")
    flag("--save_stats", help="write mu, sigma, n of the (only) samples to this .npz: a later --ref")
    flag("--size", type=int, help="px: crop images of judged folders as ADM does; None: as they are")
    flag("--num", type=int, default=50000, help="--ckpt: images to draw, classes as often as in the classifier's data")
    drawing_flags(flag)
    flag("--folder", default=".", help="where data.py --get put the judges' weights (its --folder)")
    flag("--classifier", help="file of the judge classifier: a run of distill.py leaves classifier_0.pt in its folder")
    flag("--prompt", default=TEMPLATE, help="clip, pickscore, imagereward: what to ask of an image")
    flag("--out", default="out/fid", help="folder of results.jsonl")
    args = p.parse_args(argv)
    check_numbers(args, one="size num ar_steps head_steps batch")
    if not args.samples + args.ckpt:
        raise UserError("nothing to judge: give folders or .npz files, or checkpoints by --ckpt")
    for name in "num ar_steps head_steps guidance guidance_schedule temperature order seed vae".split():
        if not args.ckpt and getattr(args, name) != p.get_default(name):
            raise UserError(f"--{name} is for images drawn from a --ckpt: leave it out")
    if (args.ref or args.save_stats) and "inception" not in args.judges:
        raise UserError("--ref and --save_stats are for --judges inception: name that judge")
    if bool(args.classifier) != ("classifier" in args.judges):
        raise UserError("--judges classifier and --classifier FILE belong together: give both")
    return args


def main(argv=None):
    """Judge every row that was asked for, add each to results.jsonl, print the table with its conventions."""
    args = parse_args(argv)
    device, rank, world = setup(args.device, args.dtype)
    vae = load_vae(args.vae).to(device) if args.vae else None
    classifier = load_classifier(args.classifier, device) if args.classifier else None
    # all that is judged is checked before hours go into the first of it, and before a folder is made
    sources = [folder_pictures(path, args.size) if os.path.isdir(path) else npz_pictures(path, read_npz(path))
               for path in args.samples]
    for path in args.ckpt:
        sources += checkpoint_pictures(path, args, device, vae, classifier)
    if args.save_stats and len(sources) > 1:
        raise UserError("--save_stats keeps the statistics of one set of samples: give one")
    reference, images = open_reference(args.ref, sources) if args.ref else ({}, None)
    prompted = bool(set(PROMPTED) & set(args.judges))
    names = None
    if classifier or prompted:
        names = agree_on_classes(sources, classifier, need_labels=prompted)
    inception, ask = make_judges(args, names, classifier, device)
    if rank == 0:
        if args.save_stats:
            check_output(args.save_stats, ".npz")
        os.makedirs(args.out, exist_ok=True)
        results = open(Path(args.out) / "results.jsonl", "a")  # complains now, not after the work
    if images:
        said = collect(images, lambda part, _: {"pool": inception(part)[0]}, args.batch, rank, world)
        if rank == 0:
            if not reference:  # no statistics in the file
                mu, sigma = mean_and_covariance(said["pool"])
                reference = {"mu": mu, "sigma": sigma, "n": len(images)}
            reference["features"] = said["pool"][evenly(images)]
        images = said = None  # ADM's take 2 GB
    rows = []
    while sources:
        pictures = sources.pop(0)  # the last one's network goes with it, if it had one: this one's needs the memory
        said = collect(pictures, ask, args.batch, rank, world)
        if rank == 0:
            rows.append(make_row(pictures, said, reference, classifier, args))
            print(json.dumps(rows[-1]), file=results, flush=True)  # at once: a later fault takes no row with it
    if rank == 0:
        say("\n".join(dict.fromkeys(line for row in rows for line in row["conventions"])))
        columns = ["n", *(name for name in FIGURES if any(name in row for row in rows))]
        say(table([(row["name"], row) for row in rows], columns))


if __name__ == "__main__":
    run_main(main)
