"""Upsample by zero insertion, pad or crop, FIR filter, downsample by decimation.

    y[n, c, i, j] = gain * sum_{u, v} f[u, v] * z[n, c, i * down_y + u, j * down_x + v]

where z is x with up - 1 zeros after every sample, then padded; f is read backwards unless `flip_filter`
(a true convolution). The adjoint is the same operation with up and down exchanged and the filter flipped.
Conventions of stylegan2-ada-pytorch and stylegan3; filters of one dimension are applied along both axes.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = int | Sequence[int]


def setup_filter(
    taps: Tensor | Sequence[float] | Sequence[Sequence[float]] | float | None,
    device: torch.device | str | None = None,
    normalize: bool = True,
    flip_filter: bool = False,
    gain: float = 1,
    separable: bool | None = None,
) -> Tensor:
    """A float32 filter for `upfirdn2d`: [taps] when separable (by default from 8 taps on), else [taps, taps].

    `normalize` makes the taps sum to one (gain 1 for a constant image); `gain` multiplies the whole 2-D
    response, so a separable filter carries sqrt(gain) an axis. None is the identity, [1, 1].
    Raises ValueError for an empty filter or one of more than two dimensions.
    """
    f = torch.as_tensor(1.0 if taps is None else taps, dtype=torch.float32)
    if f.ndim > 2 or f.numel() == 0:
        raise ValueError(
            f"taps must be a scalar, a list or a matrix with at least one tap: got shape {list(f.shape)}"
        )
    if f.ndim == 0:
        f = f[None]
    if separable is None:
        separable = f.ndim == 1 and f.numel() >= 8
    if f.ndim == 2 and separable:
        raise ValueError(f"separable needs a filter of one dimension: got shape {list(f.shape)}")
    if f.ndim == 1 and not separable:
        f = f.outer(f)
    if normalize:
        f = f / f.sum()
    if flip_filter:
        f = f.flip(list(range(f.ndim)))
    return (f * gain ** (f.ndim / 2)).to(device=device)


def _pair(value: Pair, name: str) -> tuple[int, int]:
    x, y = (value, value) if isinstance(value, int) else tuple(value)
    if x < 1 or y < 1:
        raise ValueError(f"{name} must be at least 1: got {value}")
    return x, y


def parse_padding(padding: Pair) -> tuple[int, int, int, int]:
    """An int, (x, y) or (x0, x1, y0, y1) as (x0, x1, y0, y1)."""
    if isinstance(padding, int):
        return padding, padding, padding, padding
    if len(padding) == 2:
        x, y = padding
        return x, x, y, y
    if len(padding) == 4:
        x0, x1, y0, y1 = padding
        return x0, x1, y0, y1
    raise ValueError(f"padding must be an int, [x, y] or [x0, x1, y0, y1]: got {list(padding)}")


def filter_size(f: Tensor | None) -> tuple[int, int]:
    """(width, height) of the 2-D response."""
    return (1, 1) if f is None or f.numel() == 0 else (f.shape[-1], f.shape[0])


def upfirdn2d_ref(
    x: Tensor,
    f: Tensor | None,
    up: tuple[int, int],
    down: tuple[int, int],
    padding: tuple[int, int, int, int],
    flip_filter: bool,
    gain: float,
) -> Tensor:
    n, c, h, w = x.shape
    (up_x, up_y), (down_x, down_y), (x0, x1, y0, y1) = up, down, padding
    if up != (1, 1):
        x = F.pad(x.reshape(n, c, h, 1, w, 1), [0, up_x - 1, 0, 0, 0, up_y - 1])
        x = x.reshape(n, c, h * up_y, w * up_x)
    if f is None or f.numel() == 0:
        x = F.pad(x, [x0, x1, y0, y1]) * gain
        return x[:, :, ::down_y, ::down_x]
    f = (f * gain ** (f.ndim / 2)).to(x.dtype)
    if not flip_filter:
        f = f.flip(list(range(f.ndim)))
    # Convolutions pad for themselves; only uneven or negative padding needs a pass of its own.
    if x0 == x1 >= 0 and y0 == y1 >= 0:
        pad = (y0, x0)
    else:
        x, pad = F.pad(x, [x0, x1, y0, y1]), (0, 0)
    if f.ndim == 2:
        return F.conv2d(x, f.expand(c, 1, *f.shape), stride=(down_y, down_x), padding=pad, groups=c)
    x = F.conv2d(x, f.expand(c, 1, 1, -1), stride=(1, down_x), padding=(0, pad[1]), groups=c)
    return F.conv2d(x, f[:, None].expand(c, 1, -1, 1), stride=(down_y, 1), padding=(pad[0], 0), groups=c)


def upfirdn2d(
    x: Tensor,
    f: Tensor | None,
    up: Pair = 1,
    down: Pair = 1,
    padding: Pair = 0,
    flip_filter: bool = False,
    gain: float = 1,
) -> Tensor:
    """Zero-insertion upsampling, padding, FIR filter and decimation of x [N, C, H, W].

    f [fh, fw], or [taps] applied along both axes, or None (or empty) for the identity; `up` and `down` an int
    or (x, y); `padding` an int, (x, y) or (x0, x1, y0, y1) of the upsampled image, negative to crop.
    Returns [N, C, (H * up_y + y0 + y1 - fh) // down_y + 1, ...] in x's dtype.
    Raises ValueError for a wrong rank or an image smaller than its filter.
    """
    if x.ndim != 4:
        raise ValueError(f"x must be [N, C, H, W]: got shape {list(x.shape)}")
    if f is not None and f.ndim not in (1, 2):
        raise ValueError(f"f must have one or two dimensions: got shape {list(f.shape)}")
    up, down, padding = _pair(up, "up"), _pair(down, "down"), parse_padding(padding)
    fw, fh = filter_size(f)
    width = x.shape[3] * up[0] + padding[0] + padding[1]
    height = x.shape[2] * up[1] + padding[2] + padding[3]
    if width < fw or height < fh:
        raise ValueError(
            f"padding {list(padding)} leaves x {width}x{height}: smaller than the {fw}x{fh} filter"
        )
    return upfirdn2d_ref(x, f, up, down, padding, flip_filter, gain)


def filter2d(
    x: Tensor, f: Tensor | None, padding: Pair = 0, flip_filter: bool = False, gain: float = 1
) -> Tensor:
    """`upfirdn2d` that keeps the size of x [N, C, H, W]; `padding` comes on top."""
    (x0, x1, y0, y1), (fw, fh) = parse_padding(padding), filter_size(f)
    pad = [x0 + fw // 2, x1 + (fw - 1) // 2, y0 + fh // 2, y1 + (fh - 1) // 2]
    return upfirdn2d(x, f, padding=pad, flip_filter=flip_filter, gain=gain)


def upsample2d(
    x: Tensor, f: Tensor | None, up: Pair = 2, padding: Pair = 0, flip_filter: bool = False, gain: float = 1
) -> Tensor:
    """x [N, C, H, W] -> [N, C, H * up_y, W * up_x], magnitudes kept (gain up_x * up_y inside)."""
    (ux, uy), (x0, x1, y0, y1), (fw, fh) = _pair(up, "up"), parse_padding(padding), filter_size(f)
    pad = [x0 + (fw + ux - 1) // 2, x1 + (fw - ux) // 2, y0 + (fh + uy - 1) // 2, y1 + (fh - uy) // 2]
    return upfirdn2d(x, f, up=(ux, uy), padding=pad, flip_filter=flip_filter, gain=gain * ux * uy)


def downsample2d(
    x: Tensor, f: Tensor | None, down: Pair = 2, padding: Pair = 0, flip_filter: bool = False, gain: float = 1
) -> Tensor:
    """x [N, C, H, W] -> [N, C, H // down_y, W // down_x]."""
    (dx, dy), (x0, x1, y0, y1), (fw, fh) = _pair(down, "down"), parse_padding(padding), filter_size(f)
    pad = [x0 + (fw - dx + 1) // 2, x1 + (fw - dx) // 2, y0 + (fh - dy + 1) // 2, y1 + (fh - dy) // 2]
    return upfirdn2d(x, f, down=(dx, dy), padding=pad, flip_filter=flip_filter, gain=gain)
