"""MAR, the masked autoregressive image model, and its one-step form: the networks, the diffusion, the sampler.

A picture is L continuous tokens of C channels (256 x 16 for ImageNet 256). A transformer reads the tokens that are
known and gives every unknown token a condition vector c; a small MLP, the head, turns noise into the token given c.
Slow, as published: 100 denoising steps of the head at each of K AR steps. Fast, after distill.py: one call at each.

This file needs nothing before it. It is imported, not run:

    from model import MAR, SIZES, load_mar
    teacher = load_mar("mar_base/checkpoint-last.pth")                   # the public LTH14/mar file, or one of ours
    latents = teacher.generate(labels, ar_steps=64, head_steps=100, guidance=2.9)
    latents = load_mar("out/imagenet/student.pt").generate(labels, ar_steps=64)

Alphabet, here and in every other file:
    B images   L tokens an image   C channels a token   D transformer width   W head width   S buffer slots
    V visible tokens   P tokens to predict   T, Q positions in attention, those that ask   ... any leading dimensions
    K AR steps   t integer time step 0..999
    x0 a clean token   n, eps Gaussian noise   c condition   alpha_t = sqrt(abar_t), sigma_t = sqrt(1 - abar_t)
    x_t = alpha_t x0 + sigma_t eps   s = t_init, the one t of the one-step form   z = sigma_s n, what it starts from
    theta the student, p the teacher, q the critic; s_q, s_p scores, -eps / sigma; y = s_q - s_p, d(y) its length
Architecture and file formats: github.com/LTH14/mar (Li et al. 2024). One-step form: MARVAL, arXiv 2511.15190.
"""
import argparse
import contextlib
import functools
import json
import math
import os
import re
import zipfile
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


class UserError(Exception):
    """Bad input. The message says in one line what is wrong and what to do; programs end with exit code 2."""


# ----------------------------------------------------------------------------------------------------------------------
# Sizes


@dataclass(frozen=True)
class MARConfig:
    """All that is needed to rebuild a network; saved in every checkpoint. Lengths in pixels, tokens or channels."""

    img_size: int = 256
    vae_stride: int = 16  # pixels a latent cell; 1 = no VAE, the tokens are pixels in [-1, 1]
    patch_size: int = 1  # latent cells (or pixels) a token, per side
    vae_channels: int = 16
    num_classes: int = 1000
    width: int = 768
    heads: int = 12
    encoder_depth: int = 12
    decoder_depth: int = 12
    buffer_size: int = 64  # class-embedding slots in front of the tokens, so that an empty picture still has an input
    head_depth: int = 6
    head_width: int = 1024
    dropout: float = 0.1  # training the teacher only; distillation and sampling run without
    label_drop: float = 0.1  # share of training pictures whose class is hidden: what guidance compares with
    mask_ratio_min: float = 0.7  # training masks are drawn from a normal(1, .25) cut to [this, 1]
    t_init: int = 755  # where the one step starts. Errors of eps grow by sigma/alpha: 2.5, as in SiD; at 999, 20,000

    @property
    def pixels(self):
        return self.vae_stride == 1

    @property
    def latent_size(self):
        return self.img_size // self.vae_stride

    @property
    def seq_len(self):
        return (self.latent_size // self.patch_size) ** 2

    @property
    def token_dim(self):
        return self.vae_channels * self.patch_size**2


PIXELS = dict(vae_stride=1, patch_size=4, vae_channels=3, t_init=625)  # no VAE: a token is 4 x 4 pixels
SIZES = {
    "base": MARConfig(),
    "large": MARConfig(width=1024, heads=16, encoder_depth=16, decoder_depth=16, head_depth=8, head_width=1280),
    "huge": MARConfig(width=1280, heads=16, encoder_depth=20, decoder_depth=20, head_depth=12, head_width=1536),
    "shapes": MARConfig(**PIXELS, img_size=16, num_classes=8, width=96, heads=3, encoder_depth=3, decoder_depth=3,
                        buffer_size=4, head_depth=3, head_width=192, dropout=0.0, mask_ratio_min=0.1),
    "cifar10": MARConfig(**PIXELS, img_size=32, num_classes=10, width=384, heads=6, encoder_depth=6, decoder_depth=6,
                         buffer_size=16, head_depth=4, head_width=512, mask_ratio_min=0.5),
    "cifar10_cpu": MARConfig(**PIXELS, img_size=32, num_classes=10, width=128, heads=4, encoder_depth=4,
                             decoder_depth=4, buffer_size=8, head_depth=3, head_width=192, dropout=0.0,
                             mask_ratio_min=0.1),
}

# ----------------------------------------------------------------------------------------------------------------------
# Diffusion: the schedule of noise


@functools.lru_cache(maxsize=None)
def cosine_schedule(steps=1000):
    """The 1,000-step cosine schedule (Nichol & Dhariwal 2021), respaced to `steps`, two or more: -> float64 arrays of
    that length, t (the index the network sees), abar (cumulative alpha), log_beta, log_post_var (the two bounds of the
    learned variance), coef_x0, coef_xt (posterior mean)."""
    f = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    abar = np.cumprod(1 - np.minimum(1 - f[1:] / f[:-1], 0.999))
    # the stride added up, as in the public code, whose rounding it decides: at 21, 23, 31, ... i * stride differs
    t = np.cumsum([0.0] + [999 / (steps - 1)] * (steps - 1)).round().astype(int)
    abar = abar[t]
    abar_prev = np.append(1.0, abar[:-1])
    beta = 1 - abar / abar_prev  # so that products of 1 - beta are the kept abar
    post_var = beta * (1 - abar_prev) / (1 - abar)  # 0 at index 0: its logarithm is that of index 1, as in MAR
    log_post_var = np.log(np.append(post_var[1], post_var[1:]))
    return {"t": t, "abar": abar, "log_beta": np.log(beta), "log_post_var": log_post_var,
            "coef_x0": beta * np.sqrt(abar_prev) / (1 - abar),
            "coef_xt": (1 - abar_prev) * np.sqrt(1 - beta) / (1 - abar)}


@functools.lru_cache(maxsize=None)
def schedule_tables(device, steps=1000):
    """The schedule as float32 tensors on `device`, alpha and sigma added. Kept: a copy from the host at each AR step
    would wait for the GPU."""
    tables = dict(cosine_schedule(steps))
    tables["alpha"], tables["sigma"] = np.sqrt(tables["abar"]), np.sqrt(1 - tables["abar"])
    return {name: torch.tensor(value, dtype=torch.float32, device=device) for name, value in tables.items()}


def alpha_sigma(t):
    """alpha_t and sigma_t of integer steps t (...): (..., 1) each, as x_t = alpha_t x0 + sigma_t eps wants them."""
    tables = schedule_tables(t.device)
    return tables["alpha"][t][..., None], tables["sigma"][t][..., None]


# ----------------------------------------------------------------------------------------------------------------------
# Noise as a function. Every random number that shapes a picture is a hash of (seed, index of the picture, purpose,
# token, channel), no draw of a generator: so a picture does not depend on the batch it is drawn in, on the rank that
# draws it or on the device, and a resumed run needs no saved state.

ORDER, START, CHAIN = 0, 1, 2  # purposes while sampling; chain step j of AR step k uses CHAIN + 1000 * k + j
TRAIN = 1 << 20  # purposes from here on belong to training (distill.py, rl.py)


def splitmix(x):
    """splitmix64's finaliser (Steele et al. 2014) on int64 tensors: (...) -> (...). Wrap-around is what is wanted."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47  # >> keeps the sign in torch: the mask makes it logical
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def image_keys(seeds, device="cpu"):
    """Seeds of pictures, (B,) ints or (B, 2) pairs (seed, index) -> (B,) int64 keys for `uniform` and `gaussian`."""
    seeds = torch.as_tensor(seeds, dtype=torch.int64, device=device)
    if seeds.dim() == 1:
        seeds = torch.stack([torch.zeros_like(seeds), seeds], 1)  # a bare int i is the pair (0, i)
    return splitmix(splitmix(seeds[:, 0] + 0x51ED270B) + seeds[:, 1])


def _bits(keys, purpose, positions, channels):
    """(B,) keys, positions (B, P), or (P,) alike for all -> (B, P, channels) int64 hashes."""
    keys = splitmix(keys ^ splitmix(torch.tensor(purpose + 1)).item())[:, None, None]
    channel = torch.arange(channels, device=keys.device)
    return splitmix(keys + positions[..., None] * 0x100000 + channel)


def uniform(keys, purpose, positions):
    """Uniform numbers in (0, 1], one for each (picture, position): -> (B, P) float32."""
    bits = _bits(keys, purpose, positions, 1)[:, :, 0]
    return (((bits >> 40) & 0xFFFFFF).float() + 0.5) * 2.0**-24


def gaussian(keys, purpose, positions, channels):
    """Standard normal numbers by Box-Muller, one for each (picture, position, channel): -> (B, P, channels) float32."""
    bits = _bits(keys, purpose, positions, channels)
    u1 = (((bits >> 40) & 0xFFFFFF).float() + 0.5) * 2.0**-24  # the two halves of one hash are the two uniforms,
    u2 = (bits & 0xFFFFFF).float() * 2.0**-24  # 24 bits each: all that float32 holds; tails reach 5.9
    return torch.sqrt(-2 * torch.log(u1)) * torch.cos(2 * math.pi * u2)


ORDERS = "random", "raster", "outward", "inward"


def token_orders(keys, seq_len, kind="random"):
    """An order of the tokens for each picture: (B,) keys -> (B, L) long. Its last token is drawn first: when m tokens
    are masked, they are its first m. kind: "random", as MAR is trained; for the sampler also by rows, from the centre
    or from the border. Tokens equally far from the centre come in random order."""
    side, place = math.isqrt(seq_len), torch.arange(seq_len, device=keys.device)
    row, column = place // side, place % side
    from_centre = (2 * row - side + 1) ** 2 + (2 * column - side + 1) ** 2  # squared distance, in half tokens
    rank = {"random": torch.zeros_like(place), "raster": place, "outward": from_centre, "inward": -from_centre}[kind]
    return (uniform(keys, ORDER, place) - rank).argsort(dim=1, stable=True)


def mask_counts(seq_len, ar_steps):
    """How many tokens are masked before each AR step, and 0 at the end: K + 1 ints. The cosine schedule of MaskGIT."""
    if not 1 <= ar_steps <= seq_len:
        raise UserError(f"ar_steps {ar_steps} must lie in 1..{seq_len}, the number of tokens to draw")
    counts = [seq_len]
    for k in range(1, ar_steps):
        masked = math.floor(seq_len * math.cos(math.pi / 2 * k / ar_steps))
        counts.append(max(1, min(counts[-1] - 1, masked)))
    return counts + [0]


def reveal_plan(orders, ar_steps, masked=None):
    """The AR steps as index tensors: yields (visible (B, V), predict (B, P)), each ascending, for k = 0..K-1. masked:
    how many of the tokens are unknown at the beginning, the first of each order; None: all."""
    counts = mask_counts(orders.shape[1] if masked is None else masked, ar_steps)
    for now, after in zip(counts, counts[1:]):
        yield orders[:, now:].sort(dim=1).values, orders[:, after:now].sort(dim=1).values


# ----------------------------------------------------------------------------------------------------------------------
# The head: a residual MLP on one token. t and c enter by shift, scale and gate: adaLN (Peebles & Xie 2023)


class ResBlock(nn.Module):
    """One block of the head: x (..., W) and y, the embedded t and c, which broadcasts to it -> (..., W)."""

    def __init__(self, width):
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x, y):
        shift, scale, gate = self.adaLN_modulation(y).chunk(3, dim=-1)
        return x + gate * self.mlp(self.in_ln(x) * (1 + scale) + shift)


class TimeEmbed(nn.Module):
    """Integer steps t (...), used raw, not divided by 1,000 -> (..., W)."""

    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        frequencies = torch.exp(-math.log(10000) / 128 * torch.arange(128, device=t.device))
        angles = t[..., None].float() * frequencies  # (..., 128)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))


class FinalLayer(nn.Module):
    """The head's last layer, (..., W) -> (..., out)."""

    def __init__(self, width, out):
        super().__init__()
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, y):
        shift, scale = self.adaLN_modulation(y).chunk(2, dim=-1)
        return self.linear(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift)


class Head(nn.Module):
    """eps and variance of a noisy token. `forward` takes t and c embedded, as y: a chain embeds its c only once."""

    def __init__(self, token_dim, cond_dim, width, depth):
        super().__init__()
        self.time_embed = TimeEmbed(width)
        self.cond_embed = nn.Linear(cond_dim, width)
        self.input_proj = nn.Linear(token_dim, width)
        self.res_blocks = nn.ModuleList(ResBlock(width) for _ in range(depth))
        self.final_layer = FinalLayer(width, 2 * token_dim)

    def embed(self, t, c):
        """Steps t, conditions c (..., D) -> y (..., W); one t for all (1,) broadcasts."""
        return self.time_embed(t) + self.cond_embed(c)

    def forward(self, x, y):  # (..., C), (..., W) -> (..., 2C)
        x = self.input_proj(x)  # (..., W)
        for block in self.res_blocks:
            x = block(x, y)
        return self.final_layer(x, y)


# ----------------------------------------------------------------------------------------------------------------------
# The transformer


def take(x, index):
    """Rows of each picture: x (B, T, D), or (1, T, D) alike for all, index (B, Q) -> (B, Q, D)."""
    return x.take_along_dim(index[:, :, None], dim=1)


def put(x, index, rows):
    """x (B, T, D) with `rows` (B, Q, D) written at index (B, Q), as a new tensor that gradients flow through."""
    return x.scatter(1, index[:, :, None].expand_as(rows), rows.to(x.dtype))


class Attention(nn.Module):
    """Multi-head self-attention with bias, (B, T, D) -> (B, T, D), no mask; timm's."""

    def __init__(self, width, heads, dropout):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, ask=None):  # (B, T, D); ask (B, Q): positions whose queries are computed; None: all
        q, k, v = self.qkv(x).chunk(3, dim=2)
        if ask is not None:
            q = take(q, ask)
        q, k, v = (a.unflatten(2, (self.heads, -1)).transpose(1, 2) for a in (q, k, v))  # (B, heads, T or Q, D/heads)
        dropout = self.dropout if self.training else 0.0
        if q.dtype == torch.bfloat16 and not q.is_cuda:  # the fused kernel's backward takes a CPU 8 times as long
            x = F.dropout((q * q.shape[-1]**-0.5 @ k.mT).softmax(-1), dropout) @ v
        else:
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        x = self.proj(x.transpose(1, 2).flatten(2))  # (B, T or Q, D)
        return F.dropout(x, self.dropout, self.training)


class Mlp(nn.Module):
    """(..., D) -> (..., D), four times as wide inside."""

    def __init__(self, width, dropout):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = dropout

    def forward(self, x):
        x = F.dropout(F.gelu(self.fc1(x)), self.dropout, self.training)
        return F.dropout(self.fc2(x), self.dropout, self.training)


class Block(nn.Module):
    """Pre-norm transformer block (timm's Block), with one addition: `ask` computes only some of the positions."""

    def __init__(self, width, heads, dropout):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads, dropout)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, dropout)

    def forward(self, x, ask=None):  # (B, T, D) -> (B, T, D), or (B, Q, D) for ask (B, Q)
        asked = x if ask is None else take(x, ask)
        x = asked + self.attn(self.norm1(x), ask)
        return x + self.mlp(self.norm2(x))


class MAR(nn.Module):
    """The public MAR, function for function, but faster; pixels, which it does not draw, are clamped. Parameters have
    the public names but for the head's prefix (`head_net.` here, `diffloss.net.` there)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        D, L, S = config.width, config.seq_len, config.buffer_size
        self.class_emb = nn.Embedding(config.num_classes, D)
        self.fake_latent = nn.Parameter(torch.zeros(1, D))  # the null class
        self.z_proj = nn.Linear(config.token_dim, D)
        self.z_proj_ln = nn.LayerNorm(D, eps=1e-6)
        self.encoder_pos_embed_learned = nn.Parameter(torch.zeros(1, S + L, D))
        self.encoder_blocks = nn.ModuleList(Block(D, config.heads, config.dropout) for _ in range(config.encoder_depth))
        self.encoder_norm = nn.LayerNorm(D, eps=1e-6)
        self.decoder_embed = nn.Linear(D, D)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, D))
        self.decoder_pos_embed_learned = nn.Parameter(torch.zeros(1, S + L, D))
        self.decoder_blocks = nn.ModuleList(Block(D, config.heads, config.dropout) for _ in range(config.decoder_depth))
        self.decoder_norm = nn.LayerNorm(D, eps=1e-6)
        self.diffusion_pos_embed_learned = nn.Parameter(torch.zeros(1, L, D))
        self.head_net = Head(config.token_dim, D, config.head_width, config.head_depth)
        self.checkpoint_blocks = False  # recompute blocks in backward: a third more time for a fraction of the memory
        self.initialise()

    def initialise(self):
        """MAR's initialisation: Xavier for matrices, normal(.02) for embeddings, zero for adaLN and the head's end."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for p in (self.class_emb.weight, self.fake_latent, self.mask_token, self.encoder_pos_embed_learned,
                  self.decoder_pos_embed_learned, self.diffusion_pos_embed_learned,
                  self.head_net.time_embed.mlp[0].weight, self.head_net.time_embed.mlp[2].weight):
            nn.init.normal_(p, std=0.02)
        # the head starts as the identity on its residual stream, and predicts 0
        nn.init.zeros_(self.head_net.final_layer.linear.weight)
        for block in (*self.head_net.res_blocks, self.head_net.final_layer):
            nn.init.zeros_(block.adaLN_modulation[1].weight)

    def patchify(self, latents):
        """(B, c, h, w) -> (B, L, C), raster order; a token's channels are ordered (c, row, column) as in MAR."""
        return F.pixel_unshuffle(latents, self.config.patch_size).flatten(2).mT.contiguous()  # from (B, C, L)

    def unpatchify(self, tokens):
        """(B, L, C) -> (B, c, h, w), the inverse of patchify."""
        side = math.isqrt(self.config.seq_len)
        return F.pixel_shuffle(tokens.mT.unflatten(2, (side, side)), self.config.patch_size).contiguous()

    def run_blocks(self, blocks, x):
        for block in blocks:
            if self.checkpoint_blocks and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x

    def encode(self, tokens, visible, labels):
        """Known tokens only: tokens (B, L, C), visible (B, V) ascending, labels (B,) -> (B, S + V, D). V is a shape,
        known to the host, so nothing has to be counted on the device. Masked tokens never enter."""
        S = self.config.buffer_size
        x = self.z_proj(take(tokens, visible))  # (B, V, D)
        x = x + take(self.encoder_pos_embed_learned[:, S:], visible)
        # a label of -1 is the null class. No host sync: both are computed, one is chosen
        classes = torch.where(labels[:, None] < 0, self.fake_latent, self.class_emb(labels.clamp(min=0)))  # (B, D)
        buffer = classes[:, None] + self.encoder_pos_embed_learned[:, :S]  # (B, S, D)
        x = self.z_proj_ln(torch.cat([buffer, x], dim=1))  # (B, S + V, D)
        return self.encoder_norm(self.run_blocks(self.encoder_blocks, x))

    def transformer(self, tokens, visible, labels, predict):
        """One pass: tokens (B, L, C) of which `visible` (B, V) are known, labels (B,) (-1: null class) -> conditions c
        (B, P, D) of the tokens `predict` (B, P), float32. Inside bf16 where that is fast.
        In the last block only P queries are computed, and only P rows of its MLP: nobody reads the others."""
        S = self.config.buffer_size
        with bf16_products(tokens.device):
            x = self.decoder_embed(self.encode(tokens, visible, labels))  # (B, S + V, D)
            full = self.mask_token.to(x.dtype).expand(len(x), self.config.seq_len, -1)
            x = torch.cat([x[:, :S], put(full, visible, x[:, S:])], dim=1)  # (B, S + L, D)
            x = self.run_blocks(self.decoder_blocks[:-1], x + self.decoder_pos_embed_learned)
            x = self.decoder_norm(self.decoder_blocks[-1](x, ask=predict + S))  # (B, P, D)
            x = x + take(self.diffusion_pos_embed_learned, predict)
        return x.float()

    def conditions(self, tokens, visible, labels, predict, guidance):
        """`transformer` for guidance: c and the null class's c, (B, P, D) each, by one pass of 2B pictures; for a scale
        of 1 the latter is None."""
        if guidance == 1:
            return self.transformer(tokens, visible, labels, predict), None
        tokens, visible, predict = (torch.cat([a, a]) for a in (tokens, visible, predict))
        labels = torch.cat([labels, torch.full_like(labels, -1)])
        return self.transformer(tokens, visible, labels, predict).chunk(2)

    def condition(self, tokens, mask, labels):
        """For outsiders, who know masks and not indices: tokens (B, L, C), mask (B, L) with 1 = masked and the same
        count in every row, labels (B,) long or None for the null class -> c (B, L, D). Waits for the device."""
        counts = mask.sum(dim=1).long().tolist()
        if len(set(counts)) != 1:
            raise ValueError(f"condition: every row of the mask must hold the same number of ones, got {counts}")
        visible = mask.argsort(dim=1, stable=True)[:, :mask.shape[1] - counts[0]]  # stable: raster order is kept
        if labels is None:
            labels = torch.full((len(tokens),), -1, device=tokens.device)
        everything = torch.arange(mask.shape[1], device=tokens.device).expand(len(tokens), -1)
        return self.transformer(tokens, visible, labels, everything)

    def head(self, x, t, c):
        """x (..., C) noisy tokens, t (...) integer steps, c (..., D) -> (..., 2C): eps, then the variance outputs."""
        return self.head_net(x, self.head_net.embed(t, c))

    def eps(self, x, t, c):
        """The half of the head that makes the score, -eps / sigma: (..., C). The variance outputs are no part of it."""
        return self.head(x, t, c)[..., :self.config.token_dim]

    def one_step(self, n, c, c_null=None, guidance=1.0):
        """The one-step generator: noise n (..., C), conditions c (..., D) -> x0 = (z - sigma_s eps(z, s, c)) / alpha_s,
        z = sigma_s n, s = t_init. guidance with c_null: the undistilled teacher's one step."""
        s = torch.full((1,), self.config.t_init, device=n.device)  # one t for all tokens: it is embedded once
        alpha, sigma = alpha_sigma(s)
        z = sigma * n
        eps = self.eps(z, s, c)
        if c_null is not None:
            null = self.eps(z, s, c_null)
            eps = null + guidance * (eps - null)
        return (z - sigma * eps) / alpha

    def denoise(self, x, c, c_null, guidance, steps, temperature, noise):
        """The slow inner chain: x (B, P, C) start noise, c (B, P, D), c_null the same or None, noise(j) -> (B, P, C) of
        chain step j -> x0 (B, P, C). Conditions and time steps are embedded once for all steps; both halves of the
        guidance go through the head as one batch."""
        schedule, B, C = cosine_schedule(steps), len(x), self.config.token_dim
        y_c = self.head_net.cond_embed(c if c_null is None else torch.cat([c, c_null]))  # (B or 2B, P, W)
        y_t = self.head_net.time_embed(schedule_tables(x.device, steps)["t"])  # (steps, W)
        head, dtype = self.head_net, torch.float32
        if runs_bf16(x.device):  # as MAR samples, in half the time; cast once an AR step: autocast would at each call
            dtype, half = torch.bfloat16, {name: p.bfloat16() for name, p in head.named_parameters()}
            head = lambda *x_and_y: torch.func.functional_call(self.head_net, half, x_and_y)
        for j in reversed(range(steps)):
            now = {name: float(value[j]) for name, value in schedule.items()}
            x_in = x if c_null is None else torch.cat([x, x])
            out = head(x_in.to(dtype), (y_t[j] + y_c).to(dtype)).float()  # (B or 2B, P, 2C)
            eps, v = out[:B, ..., :C], out[:B, ..., C:]  # the variance is the conditional half's, as in MAR
            if c_null is not None:
                null = out[B:, ..., :C]
                eps = null + guidance * (eps - null)
            x0 = math.sqrt(1 / now["abar"]) * x - math.sqrt(1 / now["abar"] - 1) * eps
            if self.config.pixels:
                # pixels are known to lie there; unclamped, a small head's errors at t near 999 grow by 20,000 and
                # never come back. MAR does not clamp latents, whose range nobody knows. + 0 * x0: infinity becomes NaN,
                # or a failed head would draw grey pictures
                x0 = x0.clamp(-1, 1) + 0 * x0
            x = now["coef_x0"] * x0 + now["coef_xt"] * x
            if j > 0:
                frac = (v + 1) / 2
                log_var = frac * now["log_beta"] + (1 - frac) * now["log_post_var"]
                x = x + temperature * torch.exp(0.5 * log_var) * noise(j)
        return x

    @torch.no_grad()
    def unmask(self, labels, ar_steps=64, head_steps=1, guidance=1.0, guidance_schedule="linear", temperature=1.0,
               seeds=None, orders="random", given=None, redraw=None):
        """`generate` step by step: yields (tokens (B, L, C), visible (B, V) before the step, predict (B, P) in it)."""
        B, L, C = len(labels), self.config.seq_len, self.config.token_dim
        keys = image_keys(range(B) if seeds is None else seeds, labels.device)
        if isinstance(orders, str):
            orders = token_orders(keys, L, orders)  # (B, L)
        tokens, masked = torch.zeros(B, L, C, device=labels.device), L
        if redraw is not None:
            tokens, masked = tokens + given.to(labels.device), int(redraw.sum())
            kept = (~redraw).to(labels.device).long()[orders]  # (B, L)
            orders = orders.gather(1, kept.argsort(dim=1, stable=True))  # what is redrawn comes first in each order
        for k, (visible, predict) in enumerate(reveal_plan(orders, ar_steps, masked)):
            # share known after this step; MAR never counts the last token, so its last step has (L - 1) / L
            revealed = min(visible.shape[1] + predict.shape[1], L - 1) / L
            g = 1 + (guidance - 1) * revealed if guidance_schedule == "linear" else guidance
            n = gaussian(keys, START, predict, C)  # (B, P, C): one draw a token, whatever step reveals it
            c, c_null = self.conditions(tokens, visible, labels, predict, guidance)  # (B, P, D) each
            if head_steps == 1:
                x0 = self.one_step(temperature * n, c, c_null, g)
            else:
                x0 = self.denoise(n, c, c_null, g, head_steps, temperature,
                                  lambda j: gaussian(keys, CHAIN + 1000 * k + j, predict, C))
            tokens = put(tokens, predict, x0)
            yield tokens, visible, predict

    def generate(self, labels, ar_steps=64, head_steps=1, guidance=1.0, **how):
        """Pictures from nothing: labels (B,) long on the model's device -> latents (B, c, h, w) float32.

        ar_steps K in 1..L; head_steps 1 (the student) or the length of the teacher's chain (100); guidance 1.0 = none.
        how, the rest of `unmask`'s: guidance_schedule "linear" grows it with the share revealed (MAR), "constant" does
        not; temperature scales the chain's noise, or in one step the start noise; seeds (B,) ints or (B, 2) pairs
        (seed, index) fix noise and order of each picture whatever the batch; orders one of ORDERS, or (B, L) long.
        To redraw part of a picture: its tokens given (1 or B, L, C) and redraw (L,) bool on the host, at least K True.
        Cost: K transformer passes and K * head_steps of the head, twice with guidance."""
        for tokens, _, _ in self.unmask(labels, ar_steps, head_steps, guidance, **how):
            pass
        return self.unpatchify(tokens)


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints: the public ones and ours
# Ours: {"config", "stage", "step", "args", "ema", "class_names"}, what drawing needs; resume.pt has "model", optimisers
# and whatever else its stage goes on from beside these.
STAGES = "teacher", "student", "rl"


@contextlib.contextmanager
def reading(path, what, advice=""):
    """Whatever a damaged or foreign file raises inside becomes one line that names it. A disk's own errors pass."""
    try:
        yield
    except Exception as error:
        if isinstance(error, (UserError, MemoryError)) or getattr(error, "errno", None):
            raise
        reason = " ".join(str(error).split())[:100] or "truncated?"
        raise UserError(f"{path} is no whole {what} ({type(error).__name__}: {reason}){advice}") from None


def printable(text):
    """Control characters become escapes, or a terminal would obey them: names of classes and files are foreign."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def say(text):
    """Print on rank 0."""
    if not int(os.environ.get("RANK") or 0):
        print(printable(text), flush=True)


def weights_in(file, ema=True):
    """The state dict of a network in a checkpoint, wherever people keep it: averaged or not, Lightning's, or the file
    itself; without what DDP, torch.compile and Lightning put before the names."""
    places = ["model_ema", "ema"] * ema + ["model", "state_dict"]
    holds = lambda place: isinstance(file.get(place), dict) and any(map(torch.is_tensor, file[place].values()))
    place = next(filter(holds, places), None)
    if ema and place == "model" and {"model_ema", "ema"} & set(file):
        say("note: the averaged weights cannot be read, so the last ones are")
    return {re.sub(r"^((module|model|_orig_mod)\.)+|_orig_mod\.", "", str(name)): value
            for name, value in (file[place] if place else file).items()}


def config_of_public(state, args, heads, path):
    """MARConfig of a public state dict: sizes off the shapes; the number of heads is in no shape, so off the width."""
    depth = lambda kind: len({key[len(kind):].split(".")[1] for key in state if key.startswith(kind)})
    args = getattr(args, "__dict__", args) or {}  # a Namespace, a dict, or nothing
    width, token_dim = state["z_proj.weight"].shape
    channels, stride = args.get("vae_embed_dim") or 16, args.get("vae_stride") or 16  # released files carry no args
    patch, tokens = math.isqrt(token_dim // channels), state["diffusion_pos_embed_learned"].shape[1]
    heads = heads or {768: 12, 1024: 16, 1280: 16}.get(width)  # MAR-B, L, H
    if not heads:
        raise UserError(f"{path}: width {width} is none of MAR-B, L, H, heads are in no shape: load_mar(..., heads=N)")
    return MARConfig(img_size=math.isqrt(tokens) * patch * stride, vae_stride=stride, patch_size=patch,
                     vae_channels=channels, num_classes=len(state["class_emb.weight"]), width=width, heads=heads,
                     encoder_depth=depth("encoder_blocks"), decoder_depth=depth("decoder_blocks"),
                     head_depth=depth("diffloss.net.res_blocks"),
                     head_width=len(state["diffloss.net.input_proj.weight"]),
                     buffer_size=state["encoder_pos_embed_learned"].shape[1] - tokens)


def check_settings(config, made, path):
    """UserError naming the first setting of a network, or flag of its run (`made`), that none can have."""
    # floats are shares of 1, but for guidance; whole numbers begin at 1
    highest = {"dropout": 1.0, "label_drop": 1.0, "mask_ratio_min": 1.0, "guidance": math.inf, "t_init": 999,
               "encoder_depth": 999, "decoder_depth": 999, "head_depth": 999, "teacher_head_steps": 1000}
    of_run = {name: made[name] for name in ("ar_steps", "teacher_head_steps", "guidance") if name in made}
    for name, value in {**asdict(config), **of_run}.items():
        high = highest.get(name, 1 << 16)
        low = 0 if type(high) is float else 1
        if type(value) not in (int, type(high)) or not low <= value <= high:
            raise UserError(f"{path}: no {'run' if name in of_run else 'network'} has {name} {value!r}")
    for whole, part in (("width", "heads"), ("img_size", "vae_stride"), ("latent_size", "patch_size")):
        a, b = getattr(config, whole), getattr(config, part)
        if a % b:
            raise UserError(f"{path}: {whole} {a} must be a multiple of {part} {b}")


def load_mar(path, ema=True, **config_overrides):
    """A MAR in eval mode on the CPU from a public LTH14/mar checkpoint or one of ours; UserError where that cannot be.
    ema: the averaged weights (what every published number uses), where there are some. config_overrides: fields of
    MARConfig to set against the file. The model tells what the file says of it: source (the path), stage (of STAGES),
    made (the flags of its run; {} in public files), class_names (None where it has none)."""
    file = read_checkpoint(path)
    state, ours = weights_in(file, ema), "config" in file
    head = "head_net." if ours and "head_net.input_proj.weight" in state else "diffloss.net."  # the public name
    if not {"class_emb.weight", "z_proj.weight", head + "input_proj.weight"} <= set(state):
        raise UserError(f"{path} is no MAR checkpoint{'' if ema else ' with weights as trained'}: it holds "
                        f"{sorted(map(str, file))[:6]}")
    stage, names = file.get("stage") or "teacher", file.get("class_names")
    if stage not in STAGES:
        raise UserError(f"{path}: stage {stage!r} is none of {', '.join(STAGES)}: how it is drawn is not known")
    with reading(path, "MAR checkpoint"):
        made = dict(file.get("args") or {}) if ours else {}
        config = (MARConfig(**file["config"]) if ours else
                  config_of_public(state, file.get("args"), config_overrides.get("heads"), path))
        config = replace(config, **config_overrides)
        check_settings(config, made, path)
        if names is not None and [type(name) for name in names] != [str] * config.num_classes:
            raise UserError(f"{path}: class_names are no text for each of its {config.num_classes} classes")
        model = fill_model(lambda: MAR(config), state, path, [("^head_net.", head)])
    if ours and not file.get("stage"):
        say(f"note: {path} names no stage, so it is taken for a teacher")
    model.source, model.stage, model.made, model.class_names = str(path), stage, made, names
    return model


def load_network(build, path, get, names=(), drop=(), turned=()):
    """A public network: fill_model of a file, `get` for data.py --get. drop: how names begin that are left out."""
    state = weights_in(read_checkpoint(need_file(path, get)))
    state = {name: value for name, value in state.items() if not name.startswith(tuple(drop))}
    return fill_model(build, state, path, names, turned, f"; python data.py --get {get} fetches it")


def fill_model(build, state, path, names=(), turned=(), advice=""):
    """build() on the CPU with the tensors of `state` as float32, in eval mode, frozen. UserError, in the file's own
    names, where they are not those that are wanted. names: substitutions (pattern, replacement), done in order, that
    turn our name into the file's; where it is a.{q,k,v}.b, the file has three parts, of which ours is put together.
    turned: the file's names of what it has transposed."""
    with torch.device("meta"):  # no initialisation that is overwritten
        model = build()
    places = {}  # a name in the file -> the part of our tensor that it fills
    for name, ours in model.to_empty(device="cpu").state_dict().items():
        for pattern, replacement in names:
            name = re.sub(pattern, replacement, name)
        first, middle, last = re.fullmatch(r"([^{]*)\{?([^}]*)\}?(.*)", name).groups()
        parts = [first + part + last for part in middle.split(",")]
        ours = torch.atleast_1d(ours.T if name in turned else ours)
        places.update(zip(parts, ours.chunk(len(parts))))
    # dimensions of 1 are no difference; whole numbers are quantised, with scales elsewhere, or count training's batches
    kind = lambda value: tuple(value.squeeze().shape) if value.is_floating_point() else value.dtype
    wanted = {name: kind(place) for name, place in places.items() if place.is_floating_point()}
    found = {name: kind(value) for name, value in state.items()
             if torch.is_tensor(value) and (value.is_floating_point() or name in wanted)}
    wrong = [f"{name} is {found.get(name, 'missing')}, not {wanted.get(name, 'expected')}"
             for name in sorted({**wanted, **found}, key=found.__contains__)  # what is missing comes first
             if found.get(name) != wanted.get(name)]
    if wrong:
        raise UserError(f"{path} is no {type(model).__name__} file that fits: {'; '.join(wrong[:4])} "
                        f"({len(wrong)} in all){advice}")
    for count in model.buffers():  # of batches seen, which files may lack
        count.zero_()
    for name in wanted:
        places[name].copy_(state[name].reshape(places[name].shape))
    return model.eval().requires_grad_(False)


def need_file(path, get=None):
    """The path, if it is a file; else a UserError, which says how to --get it."""
    if not os.path.isfile(path):
        what = "that is a folder" if os.path.isdir(path) else "no such file"
        raise UserError(f"{what}: {path}" + (f"; get it by: python data.py --get {get}" if get else ""))
    return path


def read_checkpoint(path):
    """The dict in a torch file, on the CPU, without running any code it may hold. UserError when that cannot be had."""
    archive = zipfile.is_zipfile(need_file(path))  # files from before PyTorch 1.6 are none
    try:
        if archive and any(name.endswith("/constants.pkl") for name in zipfile.ZipFile(path).namelist()):
            return torch.jit.load(path, map_location="cpu").state_dict()  # OpenAI's CLIP: code that is never called
        # the public files carry their command line as an argparse.Namespace: plain data, allowed by name
        torch.serialization.add_safe_globals([argparse.Namespace])
        file = torch.load(path, map_location="cpu", weights_only=True, mmap=archive)  # unused parts are never read
    except Exception as error:  # torch raises a dozen kinds for a bad file; two of them tell the user something
        foreign = re.search(r"(?:GLOBAL|class|global|type) ([\w.]+\.\w+)", str(error))
        what = f"it holds an object of {foreign[1]}, which could run code" if foreign else "truncated, or no torch file"
        raise UserError(f"{path} cannot be read as a checkpoint: {what}") from None
    if not isinstance(file, dict):
        raise UserError(f"{path} holds no checkpoint but a {type(file).__name__}")
    return file


@contextlib.contextmanager
def replacing(path, mode="w"):
    """A file to write whose contents get the name `path` when the block ends well: at any moment there is the old file
    or the new one, whole. A full disk becomes one line, not a traceback."""
    # two programs, or ranks, may finish one thing in the same moment; on two nodes they may have one process number
    temporary = f"{path}.{os.getpid()}.{os.environ.get('RANK', '')}.writing"
    try:
        with open(temporary, mode) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())  # before the rename: else a power cut could leave the new name on empty blocks
        os.replace(temporary, path)
    except BaseException as error:
        if os.path.exists(temporary):
            os.remove(temporary)
        # torch turns a full disk into a RuntimeError; a GPU's memory that runs out is one's child
        if not isinstance(error, OSError) and type(error) is not RuntimeError:
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"cannot write {path}: {reason} (disk full? no permission?); the old file is kept") from None


def save_checkpoint(file, path):
    """Write a dict with torch.save so that `path` holds either the old file or the new one, whole, at any moment."""
    with replacing(path, "wb") as f:
        torch.save(file, f)


def write_json(path, content):
    with replacing(path) as f:
        json.dump(content, f, indent=1)


# ----------------------------------------------------------------------------------------------------------------------
# bf16: faster where a machine multiplies it faster


BF16 = None  # whether networks multiply in bf16; None: on GPUs. A command's --dtype decides (data.setup)


def multiplies_bf16():
    """Whether this CPU has instructions for bf16 products: AVX512-BF16, AMX, or ARM's. ATEN_CPU_CAPABILITY=avx2, an
    environment variable of PyTorch's, hides those of x86."""
    has = getattr(torch.cpu, "get_capabilities", dict)()
    arm = has.get("bf16") and torch.backends.mkldnn.is_available()  # PyTorch for macOS has no oneDNN to use it with
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return bool(arm or wide and (has.get("avx512_bf16") or has.get("amx_bf16")))


def runs_bf16(device):
    return device.type == "cuda" if BF16 is None else BF16


def bf16_products(device):
    """Inside it matrix products are in bf16, where `runs_bf16`: those of the transformer, and of a teacher's head while
    it is trained. (Its chain casts by itself.) The head that distils stays float32: what is learned is a difference of
    two heads, which bf16 drowns at low noise."""
    return torch.autocast("cuda" if device.type == "cuda" else "cpu", torch.bfloat16, enabled=runs_bf16(device))


def bf16_weights(model):
    """Where the transformer runs in bf16, store its matrices so, in place: for networks that are neither trained nor
    saved any more. -> the model. The same bits come out: autocast rounds the weights of frozen networks at every call,
    which at batch 1 moves 8 bytes a weight, and the product itself 2. Embeddings, norms and the head stay float32."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not name.startswith("head_net.") and runs_bf16(module.weight.device):
            module.weight.data, module.bias.data = module.weight.data.bfloat16(), module.bias.data.bfloat16()
    return model
