"""Memory order: kernels walk tensors as they lie, [outer, channel, inner], and never copy a dense one.

In NCHW the channel of offset o is (o // (H * W)) % C, in channels_last o % C: both are (o // inner) % C.
"""

import torch
from torch import Tensor

from fastgan.kernels.dispatch import jit, tl

FLAT_CONFIGS = ((2048, 4), (1024, 2))  # offsets a program, warps: two 128-bit loads a thread


def is_channels_last(x: Tensor) -> bool:
    """Whether x [N, C, H, W] lies in memory as [N, H, W, C], and only so."""
    return x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def dense(x: Tensor) -> Tensor:
    """x itself in either layout, else a contiguous copy."""
    return x if is_channels_last(x) else x.contiguous()


def like(g: Tensor, x: Tensor) -> Tensor:
    """g in the memory order of the dense x of its shape."""
    if is_channels_last(x):
        return g.contiguous(memory_format=torch.channels_last)
    return g.contiguous()


def group_of(run: int) -> int:
    """Offsets handled as one: 8 when they share a channel, or run along the channels, in groups of 8; else
    1."""
    return 8 if run % 8 == 0 else 1


def splits_of(positions: int, programs: int, block: int) -> tuple[int, int]:
    """(splits, positions a split) of a reduction that has `programs` programs already; about 1024 in all."""
    blocks = -(-positions // block)
    splits = max(1, min(blocks, 1024 // max(programs, 1)))
    per_split = -(-blocks // splits) * block
    return -(-positions // per_split), per_split


@jit
def load(p, m):
    """Masked load as fp32, or as fp64 when the memory holds fp64."""
    x = tl.load(p, mask=m, other=0.0)
    if x.dtype == tl.float64:
        return x
    else:
        return x.to(tl.float32)


@jit
def flat_offsets(BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """First offset of every group [BLOCK / GROUP] and all offsets [BLOCK / GROUP, GROUP]."""
    i_group = tl.arange(0, BLOCK // GROUP) * GROUP
    return i_group, i_group[:, None] + tl.arange(0, GROUP)[None, :]


@jit
def flat_channels(base, i_group, n_channels, inner, GROUP: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Channel of the offsets base + i_group: [groups, GROUP] in channels_last, else [groups, 1]."""
    if CHANNELS_LAST:
        i_c = (tl.multiple_of((base % n_channels).to(tl.int32), GROUP) + i_group) % n_channels
        return i_c[:, None] + tl.arange(0, GROUP)[None, :]
    else:
        row = base // inner
        rest = (base - row * inner).to(tl.int32)
        return (((row % n_channels).to(tl.int32) + (rest + i_group) // inner) % n_channels)[:, None]


@jit
def tile_offsets(i_p, i_c, n_channels, inner, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr):
    """Offsets [positions, channels] of the positions i_p = outer * inner and channels i_c."""
    if WIDE:
        i_p, i_c = i_p.to(tl.int64), i_c.to(tl.int64)
    if CHANNELS_LAST:
        return i_p[:, None] * n_channels + i_c[None, :]
    else:
        row = (i_p // inner) * n_channels * inner + i_p % inner
        return row[:, None] + (i_c * inner)[None, :]
