"""Upsample by zero insertion, pad or crop, FIR filter, downsample by decimation.

    y[n, c, i, j] = gain * sum_{u, v} f[u, v] * z[n, c, i * down_y + u, j * down_x + v]

where z is x with up - 1 zeros after every sample, then padded; f is read backwards unless `flip_filter`
(a true convolution). The adjoint is the same operation with up and down exchanged and the filter flipped, so
one registered op is its own derivative, to any order. Kernels see images as [planes, H, W, channels]: N * C
planes of one channel in NCHW, N planes of C channels in channels_last.
Conventions of stylegan2-ada-pytorch and stylegan3; filters of one dimension are applied along both axes.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgan.kernels.dispatch import Build, Op, bucket, capped, check_tensors, jit, tl, tuned
from fastgan.kernels.memory import dense, is_channels_last, load

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
    """The reference of `upfirdn2d`."""
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
    # A correlation pads for itself, by less than its taps; more, uneven or negative takes a pass of its own.
    if x0 == x1 and y0 == y1 and 0 <= x0 < f.shape[-1] and 0 <= y0 < f.shape[0]:
        pad = (y0, x0)
    else:
        x, pad = F.pad(x, [x0, x1, y0, y1]), (0, 0)
    # Decimation comes after: the gradient of a strided depthwise convolution takes oneDNN 5 to 14 times as
    # long.
    if f.ndim == 2:
        return _correlate(x, f, *pad)[:, :, ::down_y, ::down_x]
    x = _correlate(x, f[None, :], 0, pad[1])[:, :, :, ::down_x]
    return _correlate(x, f[:, None], pad[0], 0)[:, :, ::down_y]


def _correlate(x: Tensor, f: Tensor, pad_y: int, pad_x: int) -> Tensor:
    return (_depthwise if f.requires_grad else _correlate_op)(x, f, pad_y, pad_x)


def _depthwise(x: Tensor, f: Tensor, pad_y: int, pad_x: int) -> Tensor:
    c = x.shape[1]
    return F.conv2d(x, f.expand(c, 1, *f.shape), padding=(pad_y, pad_x), groups=c)


# aten's double backward of a grouped convolution computes the gradient of the weight, wanted or not, and one
# group at a time. This operation has none; torch.compile sees through it to the convolution.
@torch.library.triton_op("fastgan::correlate", mutates_args=())
def _correlate_op(x: Tensor, f: Tensor, pad_y: int, pad_x: int) -> Tensor:
    """Every channel of x [N, C, H, W] with f [fh, fw]; its adjoint is itself with f turned round."""
    return _depthwise(x, f, pad_y, pad_x)


def _save_correlate(ctx, inputs, output):
    _, f, *ctx.pad = inputs
    ctx.save_for_backward(f)


def _correlate_adjoint(ctx, dy):
    (f,) = ctx.saved_tensors
    pad_y, pad_x = ctx.pad
    dx = _correlate_op(dy, f.flip([0, 1]), f.shape[0] - 1 - pad_y, f.shape[1] - 1 - pad_x)
    return dx, None, None, None


_correlate_op.register_autograd(_correlate_adjoint, setup_context=_save_correlate)


@jit
def _fir_kernel(
    p_x,
    p_f,
    p_y,
    n,
    h,
    w,
    out_h,
    out_w,
    n_channels,
    y0,
    x0,
    FH: tl.constexpr,
    FW: tl.constexpr,
    UP_Y: tl.constexpr,
    UP_X: tl.constexpr,
    DOWN_Y: tl.constexpr,
    DOWN_X: tl.constexpr,
    FLIP: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Output positions n = planes * out_h * out_w. Only taps that meet a sample of x, not an inserted
    zero."""
    i_p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    i_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    if WIDE:
        i_p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    m_p, m_c = i_p < n, (i_c < n_channels)[None, :]
    plane = i_p // (out_h * out_w)
    # Sample s of x lies at row s * UP_Y of the upsampled image; `back` keeps the divisions positive.
    back_y, back_x = tl.maximum(y0, 0) // UP_Y + 1, tl.maximum(x0, 0) // UP_X + 1
    top = (i_p // out_w % out_h) * DOWN_Y - y0 + back_y * UP_Y
    left = (i_p % out_w) * DOWN_X - x0 + back_x * UP_X
    u0, v0 = (UP_Y - top % UP_Y) % UP_Y, (UP_X - left % UP_X) % UP_X
    row, column = (top + u0) // UP_Y - back_y, (left + v0) // UP_X - back_x
    y = tl.zeros([BLOCK_P, BLOCK_C], tl.float64 if p_x.dtype.element_ty == tl.float64 else tl.float32)
    for k in range((FH + UP_Y - 1) // UP_Y):
        for j in tl.static_range((FW + UP_X - 1) // UP_X):
            u, v = u0 + k * UP_Y, v0 + j * UP_X
            m = m_p & (u < FH) & (v < FW)
            tap = load(p_f + (u * FW + v if FLIP else (FH - 1 - u) * FW + (FW - 1 - v)), m)
            m &= (row + k >= 0) & (row + k < h) & (column + j >= 0) & (column + j < w)
            o = ((plane * h + row + k) * w + column + j) * n_channels
            y += tap[:, None].to(y.dtype) * load(p_x + o[:, None] + i_c[None, :], m[:, None] & m_c)
    tl.store(p_y + (i_p * n_channels)[:, None] + i_c[None, :], y, mask=m_p[:, None] & m_c)


@jit
def _store_pair(p_y, o, n_channels, even, odd, m_even, m_odd, JOIN: tl.constexpr):
    """Two neighbours of a row: in NCHW as one access of twice the width."""
    if JOIN:
        right = tl.arange(0, 2)[None, None, :]
        m = (m_even[:, :, None] & (right == 0)) | (m_odd[:, :, None] & (right == 1))
        tl.store(p_y + o[:, :, None] + right, tl.join(even, odd), mask=m)
    else:
        tl.store(p_y + o, even, mask=m_even)
        tl.store(p_y + o + n_channels, odd, mask=m_odd)


@jit
def _fir2x_kernel(
    p_x,
    p_f,
    p_y,
    n,
    h,
    w,
    out_h,
    out_w,
    n_channels,
    y0,
    x0,
    UP: tl.constexpr,
    ODD_Y: tl.constexpr,
    ODD_X: tl.constexpr,
    FLIP: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    JOIN: tl.constexpr,
):
    """4x4 taps, 2x up or 2x down: each position makes 2x2 outputs from one window of x.

    Going up the window has 3x3 samples (2 along an axis whose padding is odd), where the outputs on their own
    would load 16; going down it has 6x6 in place of 64. Positions n = planes * ceil(out_h / 2) * ceil(out_w
    / 2).
    """
    i_p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    i_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    if WIDE:
        i_p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    half_w, half_h = (out_w + 1) // 2, (out_h + 1) // 2
    b, a = i_p % half_w, i_p // half_w % half_h
    plane = i_p // (half_w * half_h)
    m_p, m_c = i_p < n, i_c < n_channels
    if UP:
        row, column = a - (y0 - ODD_Y) // 2, b - (x0 - ODD_X) // 2
    else:
        row, column = 4 * a - y0, 4 * b - x0
    zero = tl.zeros([BLOCK_P, BLOCK_C], tl.float64 if p_x.dtype.element_ty == tl.float64 else tl.float32)
    y00, y01, y10, y11 = zero, zero, zero, zero
    for t in tl.static_range(3 - ODD_Y if UP else 6):
        for s in tl.static_range(3 - ODD_X if UP else 6):
            m = m_p & (row + t >= 0) & (row + t < h) & (column + s >= 0) & (column + s < w)
            o = ((plane * h + row + t) * w + column + s) * n_channels
            x = load(p_x + o[:, None] + i_c, m[:, None] & m_c)
            for r in tl.static_range(4):
                u = 2 * t + ODD_Y - r // 2 if UP else t - 2 * (r // 2)
                v = 2 * s + ODD_X - r % 2 if UP else s - 2 * (r % 2)
                if u >= 0 and u < 4 and v >= 0 and v < 4:
                    tap = tl.load(p_f + (u * 4 + v if FLIP else 15 - u * 4 - v)).to(zero.dtype)
                    if r == 0:
                        y00 += tap * x
                    elif r == 1:
                        y01 += tap * x
                    elif r == 2:
                        y10 += tap * x
                    else:
                        y11 += tap * x
    o = ((plane * out_h + 2 * a) * out_w + 2 * b)[:, None] * n_channels + i_c
    m = m_p[:, None] & m_c
    right, below = (2 * b + 1 < out_w)[:, None], (2 * a + 1 < out_h)[:, None]
    _store_pair(p_y, o, n_channels, y00, y01, m, m & right, JOIN)
    _store_pair(p_y, o + out_w * n_channels, n_channels, y10, y11, m & below, m & below & right, JOIN)


def _output_size(
    x: Tensor, f: Tensor, up: Sequence[int], down: Sequence[int], pad: Sequence[int]
) -> tuple[int, int]:
    height = (x.shape[2] * up[1] + pad[2] + pad[3] - f.shape[0]) // down[1] + 1
    width = (x.shape[3] * up[0] + pad[0] + pad[1] - f.shape[1]) // down[0] + 1
    return height, width


def _new_output(x: Tensor, f: Tensor, up: Sequence[int], down: Sequence[int], pad: Sequence[int]) -> Tensor:
    memory_format = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    size = (x.shape[0], x.shape[1], *_output_size(x, f, up, down, pad))
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=memory_format)


CONFIGS = ((1024, 4), (2048, 8))  # elements of a tile, warps
CONFIGS_2X_SMALL = ((512, 4), (1024, 8))  # in NCHW, and where 6x6 windows of fp32 fill the registers


def _block_c(channels: int) -> int:
    return 1 if channels == 1 else min(64, max(16, 1 << (channels - 1).bit_length()))


@torch.library.custom_op("fastgan::upfirdn2d", mutates_args=())
def _upfirdn2d(
    x: Tensor, f: Tensor, up: Sequence[int], down: Sequence[int], pad: Sequence[int], flip: bool
) -> Tensor:
    """f [fh, fw]; up and down (x, y); pad (x0, x1, y0, y1)."""
    x = dense(x)
    y = _new_output(x, f, up, down, pad)
    if y.numel() == 0:
        return y
    f = f.contiguous()
    (h, w), (out_h, out_w) = x.shape[2:], y.shape[2:]
    last = is_channels_last(x)
    planes, channels = (x.shape[0], x.shape[1]) if last else (x.shape[0] * x.shape[1], 1)
    sizes = (h, w, out_h, out_w, channels, pad[2], pad[0])
    wide = max(x.numel(), y.numel()) >= 2**31
    block_c = _block_c(channels)
    twice = tuple(f.shape) == (4, 4) and (tuple(up), tuple(down)) in (((2, 2), (1, 1)), ((1, 1), (2, 2)))
    n = planes * (-(-out_h // 2) * -(-out_w // 2) if twice else out_h * out_w)

    def launch(config: tuple[int, int]) -> None:
        block, warps = config
        block_p = block // block_c
        grid = (-(-n // block_p), -(-channels // block_c))
        if twice:
            _fir2x_kernel[grid](
                x,
                f,
                y,
                n,
                *sizes,
                UP=up[0] == 2,
                ODD_Y=pad[2] % 2,
                ODD_X=pad[0] % 2,
                FLIP=flip,
                WIDE=wide,
                BLOCK_P=block_p,
                BLOCK_C=block_c,
                JOIN=channels == 1,
                num_warps=warps,
                **capped(x.device),
            )
        else:
            _fir_kernel[grid](
                x,
                f,
                y,
                n,
                *sizes,
                FH=f.shape[0],
                FW=f.shape[1],
                UP_Y=up[1],
                UP_X=up[0],
                DOWN_Y=down[1],
                DOWN_X=down[0],
                FLIP=flip,
                WIDE=wide,
                BLOCK_P=block_p,
                BLOCK_C=block_c,
                num_warps=warps,
                **capped(x.device),
            )

    key = (x.dtype, tuple(f.shape), tuple(up), tuple(down), last, bucket(y.numel()))
    with torch.cuda.device_of(x):
        small = twice and (not last or x.element_size() > 2)
        launch(tuned("upfirdn2d", key, CONFIGS_2X_SMALL if small else CONFIGS, launch, x.device))
    return y


@_upfirdn2d.register_fake
def _(x, f, up, down, pad, flip):
    return _new_output(dense(x), f, up, down, pad)


def _setup(ctx, inputs, output):
    x, f, ctx.up, ctx.down, ctx.pad, ctx.flip = inputs
    ctx.sizes = (*x.shape[2:], *output.shape[2:])
    ctx.save_for_backward(f)


def _adjoint(ctx, dy):
    (f,) = ctx.saved_tensors
    h, w, out_h, out_w = ctx.sizes
    (up_x, up_y), (down_x, down_y), (x0, _, y0, _) = ctx.up, ctx.down, ctx.pad
    pad = [
        f.shape[1] - x0 - 1,
        w * up_x - out_w * down_x + x0 - up_x + 1,
        f.shape[0] - y0 - 1,
        h * up_y - out_h * down_y + y0 - up_y + 1,
    ]
    return _upfirdn2d(dy, f, ctx.down, ctx.up, pad, not ctx.flip), None, None, None, None, None


_upfirdn2d.register_autograd(_adjoint, setup_context=_setup)


def upfirdn2d_triton(
    x: Tensor,
    f: Tensor | None,
    up: tuple[int, int],
    down: tuple[int, int],
    padding: tuple[int, int, int, int],
    flip_filter: bool,
    gain: float,
) -> Tensor:
    """The registered op, once for a filter of two dimensions, once an axis for a separable one."""
    if f is not None and f.requires_grad:  # a filter is a constant to the kernels
        return upfirdn2d_ref(x, f, up, down, padding, flip_filter, gain)
    if f is None or f.numel() == 0:
        return _upfirdn2d(x, x.new_full((1, 1), gain), up, down, padding, flip_filter)
    if gain != 1:
        f = f * gain ** (f.ndim / 2)
    if f.ndim == 2:
        return _upfirdn2d(x, f, up, down, padding, flip_filter)
    x0, x1, y0, y1 = padding
    x = _upfirdn2d(x, f[None, :], (up[0], 1), (down[0], 1), (x0, x1, 0, 0), flip_filter)
    return _upfirdn2d(x, f[:, None], (1, up[1]), (1, down[1]), (0, 0, y0, y1), flip_filter)


def _sample(dtype: torch.dtype, device: torch.device, key: Any, small: bool) -> tuple:
    """Arguments of the class (size bucket, channels_last, filter shape, up, down, padding, flip, gain)."""
    size, channels_last, shape, up, down, padding, flip, gain = key
    channels = 5 if small else 2 ** min(size // 3, 7)
    side = max(*(shape or (1,)), 12) + 1 if small else int((2**size / channels) ** 0.5)
    side = max(side, *(max(shape or (1,)) - p for p in padding))
    x = torch.randn(1, channels, side, side, device=device).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    f = None if shape is None else torch.rand(shape, device=device) / max(shape)
    return x.requires_grad_(), f, up, down, padding, flip, gain


UPFIRDN2D = Op("upfirdn2d", {"triton": upfirdn2d_triton, "reference": upfirdn2d_ref}, _sample)


def upfirdn2d(
    x: Tensor,
    f: Tensor | None,
    up: Pair = 1,
    down: Pair = 1,
    padding: Pair = 0,
    flip_filter: bool = False,
    gain: float = 1,
    *,
    impl: str | None = None,
) -> Tensor:
    """Zero-insertion upsampling, padding, FIR filter and decimation of x [N, C, H, W].

    f [fh, fw], or [taps] applied along both axes, or None (or empty) for the identity; `up` and `down` an int
    or (x, y); `padding` an int, (x, y) or (x0, x1, y0, y1) of the upsampled image, negative to crop.
    Returns [N, C, (H * up_y + y0 + y1 - fh) // down_y + 1, ...] in x's dtype.
    Raises ValueError for a wrong rank or an image smaller than its filter.
    """
    check_tensors(x, f=f)
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

    def key():
        shape = None if f is None else tuple(f.shape)
        return bucket(x.numel()), is_channels_last(x), shape, up, down, padding, flip_filter, gain

    return UPFIRDN2D(x, f, up, down, padding, flip_filter, gain, key=key, impl=impl)


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


def _offline() -> list[Build]:
    builds = []
    sizes = dict.fromkeys(("n", "h", "w", "out_h", "out_w", "n_channels", "y0", "x0"), "i32")
    for dtype, size in (("bf16", 2), ("fp32", 4)):
        signature = {"p_x": f"*{dtype}", "p_f": "*fp32", "p_y": f"*{dtype}", **sizes}
        for last in (False, True):
            block_c, layout = (64, "nhwc") if last else (1, "nchw")
            # Padding is no multiple of 16, nor are the sizes of one plane in NCHW.
            unaligned = ("y0", "x0", "n") if last else (*sizes,)
            for up, odd in ((True, 0), (True, 1), (False, 1)):
                for block, warps in CONFIGS if last and dtype == "bf16" else CONFIGS_2X_SMALL:
                    meta = {"UP": up, "ODD_Y": odd, "ODD_X": odd, "FLIP": False, "WIDE": False}
                    meta |= {"BLOCK_P": block // block_c, "BLOCK_C": block_c, "JOIN": not last}
                    meta |= {} if last else {"n_channels": 1}
                    name = f"upfirdn2d 2x {'up' if up else 'down'} odd{odd} {dtype} {layout} {block}"
                    least = size * (1.25 if up else 5)
                    kept = {k: v for k, v in signature.items() if k not in meta}
                    skip = tuple(u for u in unaligned if u in kept)
                    builds.append(Build(name, _fir2x_kernel, kept, meta, warps, 2, 4 * block, least, skip))
            for taps, up, down in (((4, 4), 1, 1), ((12, 1), 2, 1), ((1, 12), 1, 2), ((4, 4), 2, 3)):
                for block, warps in CONFIGS if dtype == "bf16" else CONFIGS[:1]:
                    meta = {"FH": taps[0], "FW": taps[1], "UP_Y": up if taps[0] > 1 else 1}
                    meta |= {"UP_X": up if taps[1] > 1 else 1, "DOWN_Y": down if taps[0] > 1 else 1}
                    meta |= {"DOWN_X": down if taps[1] > 1 else 1, "FLIP": False, "WIDE": False}
                    meta |= {"BLOCK_P": block // block_c, "BLOCK_C": block_c}
                    meta |= {} if last else {"n_channels": 1}
                    name = f"upfirdn2d {taps[0]}x{taps[1]} up{up} down{down} {dtype} {layout} {block}"
                    inputs = meta["DOWN_Y"] * meta["DOWN_X"] / (meta["UP_Y"] * meta["UP_X"])
                    least = size * (1 + inputs)
                    kept = {k: v for k, v in signature.items() if k not in meta}
                    skip = tuple(u for u in unaligned if u in kept)
                    builds.append(Build(name, _fir_kernel, kept, meta, warps, 2, block, least, skip))
    return builds


OFFLINE = _offline()
