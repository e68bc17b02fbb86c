"""Convolution with FIR up- or downsampling, in the cheaper order (stylegan2-ada-pytorch's `conv2d_resample`).

    y = downsample(conv(upsample(x)))

A 1x1 convolution runs at the lower resolution; an upsampling one is a strided transposed convolution followed
by the FIR; a downsampling one is the FIR followed by a strided convolution.
"""

import torch.nn.functional as F
from torch import Tensor

from fastgan.kernels.upfirdn2d import Pair, filter_size, parse_padding, upfirdn2d


def _conv2d(
    x: Tensor, w: Tensor, groups: int, flip_weight: bool, stride: int = 1, padding: Pair = 0
) -> Tensor:
    if not flip_weight:  # F.conv2d correlates
        w = w.flip([2, 3])
    pad = padding if isinstance(padding, int) else tuple(padding)
    return F.conv2d(x, w, stride=stride, padding=pad, groups=groups)


def _conv2d_up(x: Tensor, w: Tensor, up: int, pad: tuple[int, int], groups: int, flip_weight: bool) -> Tensor:
    """Zero insertion by `up`, then convolution: a transposed convolution, which flips the taps."""
    if flip_weight:
        w = w.flip([2, 3])
    oc, ic, kh, kw = w.shape
    if groups == 1:
        w = w.transpose(0, 1)
    else:
        w = (
            w.reshape(groups, oc // groups, ic, kh, kw)
            .transpose(1, 2)
            .reshape(groups * ic, oc // groups, kh, kw)
        )
    return F.conv_transpose2d(x, w, stride=up, padding=pad, groups=groups)


def conv2d_resample_ref(
    x: Tensor,
    w: Tensor,
    f: Tensor | None,
    up: int,
    down: int,
    padding: tuple[int, int, int, int],
    groups: int,
    flip_weight: bool,
    flip_filter: bool,
) -> Tensor:
    kh, kw = w.shape[2:]
    fw, fh = filter_size(f)
    x0, x1, y0, y1 = padding
    if up > 1:
        x0, x1 = x0 + (fw + up - 1) // 2, x1 + (fw - up) // 2
        y0, y1 = y0 + (fh + up - 1) // 2, y1 + (fh - up) // 2
    if down > 1:
        x0, x1 = x0 + (fw - down + 1) // 2, x1 + (fw - down) // 2
        y0, y1 = y0 + (fh - down + 1) // 2, y1 + (fh - down) // 2
    pad = (x0, x1, y0, y1)
    pointwise = kh == 1 and kw == 1

    if pointwise and down > 1 and up == 1:
        x = upfirdn2d(x, f, down=down, padding=pad, flip_filter=flip_filter)
        return _conv2d(x, w, groups, flip_weight)
    if pointwise and up > 1 and down == 1:
        x = _conv2d(x, w, groups, flip_weight)
        return upfirdn2d(x, f, up=up, padding=pad, flip_filter=flip_filter, gain=up**2)
    if down > 1 and up == 1:
        x = upfirdn2d(x, f, padding=pad, flip_filter=flip_filter)
        return _conv2d(x, w, groups, flip_weight, stride=down)
    if up > 1:
        # What of the padding the transposed convolution can crop, it crops; the FIR pads the rest.
        x0, x1, y0, y1 = x0 - (kw - 1), x1 - (kw - up), y0 - (kh - 1), y1 - (kh - up)
        px, py = max(min(-x0, -x1), 0), max(min(-y0, -y1), 0)
        x = _conv2d_up(x, w, up, (py, px), groups, flip_weight)
        pad = (x0 + px, x1 + px, y0 + py, y1 + py)
        x = upfirdn2d(x, f, padding=pad, flip_filter=flip_filter, gain=up**2)
        return upfirdn2d(x, f, down=down, flip_filter=flip_filter) if down > 1 else x
    if x0 == x1 >= 0 and y0 == y1 >= 0:
        return _conv2d(x, w, groups, flip_weight, padding=(y0, x0))
    return _conv2d(F.pad(x, [x0, x1, y0, y1]), w, groups, flip_weight)


def conv2d_resample(
    x: Tensor,
    w: Tensor,
    f: Tensor | None = None,
    up: int = 1,
    down: int = 1,
    padding: Pair = 0,
    groups: int = 1,
    flip_weight: bool = True,
    flip_filter: bool = False,
) -> Tensor:
    """Convolution of x [N, Cin, H, W] with w [Cout, Cin / groups, kh, kw], resampled by the FIR `f`.

    `padding` (int, (x, y) or (x0, x1, y0, y1)) is that of the upsampled image; the FIR's comes on top.
    `flip_weight` True correlates as F.conv2d does, False convolves. Returns [N, Cout, H * up / down, ...] for
    padding k // 2, in x's dtype (w is cast). Raises ValueError for wrong ranks, channels or factors.
    """
    if x.ndim != 4:
        raise ValueError(f"x must be [N, C, H, W]: got shape {list(x.shape)}")
    if w.ndim != 4 or w.shape[1] * groups != x.shape[1] or w.shape[0] % groups:
        raise ValueError(
            f"w must be [Cout, {x.shape[1]} / groups, kh, kw] with groups {groups} dividing Cout: "
            f"got {list(w.shape)}"
        )
    if up < 1 or down < 1:
        raise ValueError(f"up and down must be at least 1: got {up} and {down}")
    return conv2d_resample_ref(
        x, w.to(x.dtype), f, up, down, parse_padding(padding), groups, flip_weight, flip_filter
    )
