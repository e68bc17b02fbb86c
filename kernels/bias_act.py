"""Bias, activation, gain and clamp in one pass (Karras et al. 2019, the tail of every StyleGAN2 layer).

    y = clamp(gain * act(u), -clamp, clamp),   u = x + b
    dx = dy * d,   db = sum dx,   d = gain * act'(u) where |gain * act(u)| <= clamp, else 0

The double backward, for a cotangent v of dx: d dy = v * d and d x = v * dy * gain * act''(u), zero for the
piecewise linear activations. Those keep y in place of x for their backward, so that x can be freed.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgan.kernels.dispatch import Build, Op, bucket, capped, check_tensors, jit, tl, tuned
from fastgan.kernels.memory import (
    FLAT_CONFIGS,
    dense,
    flat_channels,
    flat_offsets,
    group_of,
    is_channels_last,
    like,
    load,
    splits_of,
    tile_offsets,
)


class Activation(NamedTuple):
    """Default slope and the gain that keeps the variance of a unit normal input."""

    alpha: float
    gain: float


ACTIVATIONS = {
    "linear": Activation(0.0, 1.0),
    "relu": Activation(0.0, 2**0.5),
    "lrelu": Activation(0.2, 2**0.5),
    "tanh": Activation(0.0, 1.0),
    "sigmoid": Activation(0.0, 1.0),
    "elu": Activation(0.0, 1.0),
    "selu": Activation(0.0, 1.0),
    "softplus": Activation(0.0, 1.0),
    "swish": Activation(0.0, 2**0.5),
}


PIECEWISE_LINEAR = ("linear", "relu", "lrelu")


def _activate(x: Tensor, act: str, alpha: float) -> Tensor:
    match act:
        case "linear":
            return x
        case "relu":
            return _leaky_relu(x, 0.0)
        case "lrelu":
            return _leaky_relu(x, alpha) if alpha >= 0 else F.leaky_relu(x, alpha)
        case "tanh":
            return torch.tanh(x)
        case "sigmoid":
            return torch.sigmoid(x)
        case "elu":
            return F.elu(x)
        case "selu":
            return F.selu(x)
        case "softplus":
            return F.softplus(x)
        case _:
            return torch.sigmoid(x) * x


# The slope is read off the result, so that x need not be kept, and is a constant to the second derivative,
# where aten would carry zeros back through all layers below. torch.compile sees through both.
@torch.library.triton_op("fastgan::leaky_relu", mutates_args=())
def _leaky_relu(x: Tensor, alpha: float) -> Tensor:
    return torch.ops.aten.leaky_relu(x, alpha)


@torch.library.triton_op("fastgan::leaky_relu_backward", mutates_args=())
def _leaky_relu_backward(dy: Tensor, y: Tensor, alpha: float) -> Tensor:
    return torch.ops.aten.leaky_relu_backward(dy, y, alpha, True)


def _save_leaky_relu(ctx, inputs, output):
    ctx.alpha = inputs[-1]
    ctx.save_for_backward(output if len(inputs) == 2 else inputs[1])


def _leaky_relu_adjoint(ctx, dy):
    (y,) = ctx.saved_tensors
    return _leaky_relu_backward(dy, y.detach(), ctx.alpha), *(None,) * (len(ctx.needs_input_grad) - 1)


_leaky_relu.register_autograd(_leaky_relu_adjoint, setup_context=_save_leaky_relu)
_leaky_relu_backward.register_autograd(_leaky_relu_adjoint, setup_context=_save_leaky_relu)


@jit
def _expm1(x):
    """exp(x) - 1 for x <= 0 without cancellation near 0."""
    if x.dtype == tl.float64:
        e = tl.exp(x)
        inside = (e != 1) & (e > 0.001)
        return tl.where(e == 1, x, tl.where(inside, (e - 1) * x / tl.log(tl.where(inside, e, 0.5)), e - 1))
    else:
        series = x * (1 + x * (0.5 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120)))))
        return tl.where(x > -0.1, series, tl.exp(x) - 1)


@jit
def _log1p(x):
    """log(1 + x) for 0 <= x <= 1 without cancellation near 0."""
    if x.dtype == tl.float64:
        w = 1 + x
        return tl.where(w == 1, x, tl.log(w) * x / tl.where(w == 1, 1.0, w - 1))
    else:
        series = x * (1 - x * (1 / 2 - x * (1 / 3 - x * (1 / 4 - x * (1 / 5)))))
        return tl.where(x < 0.05, series, tl.log(1 + x))


@jit
def _sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1 + e)


@jit
def _tanh(x):
    e = _expm1(-2 * tl.abs(x))
    return tl.where(x >= 0, -e, e) / (2 + e)


@jit
def activation(u, ALPHA: tl.constexpr, ACT: tl.constexpr):
    """act(u), for fp32 or fp64 u."""
    if ACT == "relu":
        u = tl.where(u > 0, u, 0.0)
    elif ACT == "lrelu":
        u = tl.where(u > 0, u, u * ALPHA)
    elif ACT == "tanh":
        u = _tanh(u)
    elif ACT == "sigmoid":
        u = _sigmoid(u)
    elif ACT == "elu":
        u = tl.where(u > 0, u, _expm1(tl.minimum(u, 0.0)))
    elif ACT == "selu":
        u = 1.0507009873554805 * tl.where(u > 0, u, 1.6732632423543772 * _expm1(tl.minimum(u, 0.0)))
    elif ACT == "softplus":
        u = tl.where(u > 20, u, tl.maximum(u, 0.0) + _log1p(tl.exp(-tl.abs(u))))
    elif ACT == "swish":
        u = u * _sigmoid(u)
    return u


@jit
def activation_slope(u, ALPHA: tl.constexpr, ACT: tl.constexpr):
    """act'(u), with PyTorch's subgradients at the kinks."""
    if ACT == "linear":
        d = tl.zeros_like(u) + 1
    elif ACT == "relu":
        d = tl.where(u > 0, 1.0, 0.0).to(u.dtype)
    elif ACT == "lrelu":
        d = tl.where(u > 0, tl.zeros_like(u) + 1, tl.zeros_like(u) + ALPHA)
    elif ACT == "tanh":
        y = _tanh(u)
        d = 1 - y * y
    elif ACT == "sigmoid":
        y = _sigmoid(u)
        d = y * (1 - y)
    elif ACT == "elu":
        d = tl.where(u > 0, 1.0, tl.exp(tl.minimum(u, 0.0)))
    elif ACT == "selu":
        d = 1.0507009873554805 * tl.where(u > 0, 1.0, 1.6732632423543772 * tl.exp(tl.minimum(u, 0.0)))
    elif ACT == "softplus":
        d = tl.where(u > 20, 1.0, _sigmoid(u))
    else:
        s = _sigmoid(u)
        d = s + u * s * (1 - s)
    return d


@jit
def activation_curvature(u, ACT: tl.constexpr):
    """act''(u) of the smooth activations."""
    if ACT == "tanh":
        y = _tanh(u)
        d = -2 * y * (1 - y * y)
    elif ACT == "sigmoid":
        y = _sigmoid(u)
        d = y * (1 - y) * (1 - 2 * y)
    elif ACT == "elu":
        d = tl.where(u > 0, 0.0, tl.exp(tl.minimum(u, 0.0)))
    elif ACT == "selu":
        d = 1.0507009873554805 * 1.6732632423543772 * tl.where(u > 0, 0.0, tl.exp(tl.minimum(u, 0.0)))
    elif ACT == "softplus":
        s = _sigmoid(u)
        d = tl.where(u > 20, 0.0, s * (1 - s))
    else:
        s = _sigmoid(u)
        d = s * (1 - s) * (2 + u * (1 - 2 * s))
    return d


@jit
def _passes(u, ALPHA: tl.constexpr, GAIN: tl.constexpr, CLAMP: tl.constexpr, ACT: tl.constexpr):
    """True where the clamp lets the gradient through: the boundary does."""
    return tl.abs(activation(u, ALPHA, ACT) * GAIN) <= CLAMP


@jit
def _forward_kernel(
    p_x,
    p_b,
    p_y,
    n,
    n_channels,
    inner,
    ALPHA: tl.constexpr,
    GAIN: tl.constexpr,
    CLAMP: tl.constexpr,
    ACT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    base = tl.program_id(0).to(tl.int64) * BLOCK
    i_group, o = flat_offsets(BLOCK, GROUP)
    m = o < n - base
    u = load(p_x + base + o, m)
    if p_b is not None:
        i_c = flat_channels(base, i_group, n_channels, inner, GROUP, CHANNELS_LAST)
        u += tl.load(p_b + i_c).to(u.dtype)
    y = activation(u, ALPHA, ACT) * GAIN
    if CLAMP is not None:
        limit = tl.zeros_like(y) + CLAMP
        y = tl.minimum(tl.maximum(y, -limit), limit)
    tl.store(p_y + base + o, y, mask=m)


@jit
def _backward_kernel(
    p_g,
    p_ref,
    p_b,
    p_dx,
    n,
    n_channels,
    inner,
    ALPHA: tl.constexpr,
    GAIN: tl.constexpr,
    CLAMP: tl.constexpr,
    ACT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dx = g * d; `ref` is x, or y where its sign is that of u."""
    base = tl.program_id(0).to(tl.int64) * BLOCK
    i_group, o = flat_offsets(BLOCK, GROUP)
    m = o < n - base
    g = load(p_g + base + o, m) * GAIN
    if ACT != "linear" or CLAMP is not None:
        u = load(p_ref + base + o, m)
        if p_b is not None:
            i_c = flat_channels(base, i_group, n_channels, inner, GROUP, CHANNELS_LAST)
            u += tl.load(p_b + i_c).to(u.dtype)
        g *= activation_slope(u, ALPHA, ACT)
        if CLAMP is not None:
            g = tl.where(_passes(u, ALPHA, GAIN, CLAMP, ACT), g, 0.0)
    tl.store(p_dx + base + o, g, mask=m)


@jit
def _backward_bias_kernel(
    p_g,
    p_ref,
    p_b,
    p_dx,
    p_db,
    n_positions,
    n_channels,
    inner,
    per_split,
    ALPHA: tl.constexpr,
    GAIN: tl.constexpr,
    CLAMP: tl.constexpr,
    ACT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dx as above and, for every split of the positions, the sum of dx over them: db [splits, channels]."""
    i_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    i_split = tl.program_id(1)
    m_c = i_c < n_channels
    if p_b is not None:
        b = load(p_b + i_c, m_c).to(p_db.dtype.element_ty)
    total = tl.zeros([BLOCK_P, BLOCK_C], p_db.dtype.element_ty)
    end = tl.minimum((i_split + 1) * per_split, n_positions)
    for start in range(i_split * per_split, end, BLOCK_P):
        i_p = start + tl.arange(0, BLOCK_P)
        o = tile_offsets(i_p, i_c, n_channels, inner, CHANNELS_LAST, WIDE)
        m = (i_p < end)[:, None] & m_c[None, :]
        g = load(p_g + o, m) * GAIN
        if ACT != "linear" or CLAMP is not None:
            u = load(p_ref + o, m)
            if p_b is not None:
                u += b[None, :]
            g *= activation_slope(u, ALPHA, ACT)
            if CLAMP is not None:
                g = tl.where(_passes(u, ALPHA, GAIN, CLAMP, ACT), g, 0.0)
        tl.store(p_dx + o, g, mask=m)
        total += g
    tl.store(p_db + i_split * n_channels + i_c, tl.sum(total, axis=0), mask=m_c)


@jit
def _double_backward_kernel(
    p_v,
    p_dy,
    p_x,
    p_b,
    p_ddy,
    p_dx,
    n,
    n_channels,
    inner,
    ALPHA: tl.constexpr,
    GAIN: tl.constexpr,
    CLAMP: tl.constexpr,
    ACT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    base = tl.program_id(0).to(tl.int64) * BLOCK
    i_group, o = flat_offsets(BLOCK, GROUP)
    m = o < n - base
    u = load(p_x + base + o, m)
    if p_b is not None:
        i_c = flat_channels(base, i_group, n_channels, inner, GROUP, CHANNELS_LAST)
        u += tl.load(p_b + i_c).to(u.dtype)
    v = load(p_v + base + o, m) * GAIN
    if CLAMP is not None:
        v = tl.where(_passes(u, ALPHA, GAIN, CLAMP, ACT), v, 0.0)
    tl.store(p_ddy + base + o, v * activation_slope(u, ALPHA, ACT), mask=m)
    tl.store(p_dx + base + o, v * load(p_dy + base + o, m) * activation_curvature(u, ACT), mask=m)


def _launch(
    name: str,
    kernel: Any,
    tensors: tuple[Tensor | None, ...],
    dim: int,
    act: str,
    alpha: float,
    gain: float,
    clamp: float | None,
) -> None:
    """One flat pass over tensors of one shape and memory order, the first of them the model."""
    x = tensors[0]
    assert x is not None
    n, channels, inner = x.numel(), x.shape[dim], x.stride(dim)
    if n == 0:
        return

    def launch(config: tuple[int, int]) -> None:
        block, warps = config
        kernel[(-(-n // block),)](
            *tensors,
            n,
            channels,
            inner,
            ALPHA=alpha,
            GAIN=gain,
            CLAMP=clamp,
            ACT=act,
            CHANNELS_LAST=inner == 1,
            GROUP=group_of(channels if inner == 1 else inner),
            BLOCK=block,
            num_warps=warps,
            **capped(x.device),
        )

    with torch.cuda.device_of(x):
        launch(tuned(name, (x.dtype, act, bucket(n), inner == 1), FLAT_CONFIGS, launch, x.device))


@torch.library.custom_op("fastgan::bias_act", mutates_args=())
def _bias_act(
    x: Tensor, b: Tensor | None, dim: int, act: str, alpha: float, gain: float, clamp: float | None
) -> Tensor:
    x = dense(x)
    y = torch.empty_like(x)
    _launch("bias_act", _forward_kernel, (x, b, y), dim, act, alpha, gain, clamp)
    return y


@_bias_act.register_fake
def _(x, b, dim, act, alpha, gain, clamp):
    return torch.empty_like(dense(x))


@torch.library.custom_op("fastgan::bias_act_backward", mutates_args=())
def _bias_act_backward(
    g: Tensor,
    ref: Tensor,
    b: Tensor | None,
    dim: int,
    act: str,
    alpha: float,
    gain: float,
    clamp: float | None,
    bias_grad: bool,
) -> tuple[Tensor, Tensor]:
    """dx, and db in fp32 (fp64), empty unless `bias_grad`."""
    ref = dense(ref)
    g = like(g, ref)
    dx = torch.empty_like(ref)
    if not bias_grad:
        _launch("bias_act_backward", _backward_kernel, (g, ref, b, dx), dim, act, alpha, gain, clamp)
        return dx, _sums(ref, 0)
    n, channels, inner = ref.numel(), ref.shape[dim], ref.stride(dim)
    if n == 0:
        return dx, _sums(ref, channels).zero_()
    last = inner == 1
    block_p, block_c = (32, 64) if last else (2048, 1)
    blocks_c = -(-channels // block_c)
    splits, per_split = splits_of(n // channels, blocks_c, block_p)
    db = _sums(ref, splits, channels)
    with torch.cuda.device_of(ref):
        _backward_bias_kernel[(blocks_c, splits)](
            g,
            ref,
            b,
            dx,
            db,
            n // channels,
            channels,
            inner,
            per_split,
            ALPHA=alpha,
            GAIN=gain,
            CLAMP=clamp,
            ACT=act,
            CHANNELS_LAST=last,
            WIDE=n >= 2**31,
            BLOCK_P=block_p,
            BLOCK_C=block_c,
            **capped(ref.device),
        )
    return dx, db.sum(0)


def _sums(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=torch.promote_types(x.dtype, torch.float32))


@_bias_act_backward.register_fake
def _(g, ref, b, dim, act, alpha, gain, clamp, bias_grad):
    return torch.empty_like(dense(ref)), _sums(ref, ref.shape[dim] if bias_grad else 0)


@torch.library.custom_op("fastgan::bias_act_double_backward", mutates_args=())
def _bias_act_double_backward(
    v: Tensor,
    dy: Tensor,
    x: Tensor,
    b: Tensor | None,
    dim: int,
    act: str,
    alpha: float,
    gain: float,
    clamp: float | None,
) -> tuple[Tensor, Tensor]:
    """d dy and d x of <v, dx>."""
    x = dense(x)
    v, dy = like(v, x), like(dy, x)
    ddy, dx = torch.empty_like(x), torch.empty_like(x)
    tensors = (v, dy, x, b, ddy, dx)
    _launch("bias_act_double_backward", _double_backward_kernel, tensors, dim, act, alpha, gain, clamp)
    return ddy, dx


@_bias_act_double_backward.register_fake
def _(v, dy, x, b, dim, act, alpha, gain, clamp):
    return torch.empty_like(dense(x)), torch.empty_like(dense(x))


def _setup(ctx, inputs, output):
    x, b, *ctx.args = inputs
    _dim, act, alpha, gain, clamp = ctx.args
    from_y = act in PIECEWISE_LINEAR and clamp is None and gain > 0 and alpha >= 0
    ctx.b_dtype = None if b is None else b.dtype
    ctx.save_for_backward(output if from_y else x, None if from_y else b)


def _backward(ctx, dy):
    ref, b = ctx.saved_tensors
    bias_grad = ctx.b_dtype is not None and ctx.needs_input_grad[1]
    dx, db = _bias_act_backward(dy, ref, b, *ctx.args, bias_grad)
    return dx, db.to(ctx.b_dtype) if bias_grad else None, None, None, None, None, None


def _setup_backward(ctx, inputs, output):
    g, ref, b, *args, ctx.bias_grad = inputs
    ctx.args = args
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(g, ref, b)


def _double_backward(ctx, ddx, ddb):
    g, ref, b = ctx.saved_tensors
    dim, act = ctx.args[:2]
    none = (None,) * 8
    if ddb is not None and ctx.bias_grad:
        ddb = ddb.to(g.dtype).reshape([-1 if i == dim else 1 for i in range(g.ndim)]).expand_as(g)
        ddx = ddb if ddx is None else ddx + ddb
    if ddx is None:
        return None, *none
    if act in PIECEWISE_LINEAR:
        return _bias_act_backward(ddx, ref, b, *ctx.args, False)[0], *none
    ddy, dx = _bias_act_double_backward(ddx, g, ref, b, *ctx.args)
    db = None
    if b is not None and ctx.needs_input_grad[2]:
        db = dx.sum([i for i in range(dx.ndim) if i != dim], dtype=torch.promote_types(dx.dtype, b.dtype))
        db = db.to(b.dtype)
    return ddy, dx, db, None, None, None, None, None, None


_bias_act.register_autograd(_backward, setup_context=_setup)
_bias_act_backward.register_autograd(_double_backward, setup_context=_setup_backward)


def bias_act_ref(
    x: Tensor, b: Tensor | None, dim: int, act: str, alpha: float, gain: float, clamp: float | None
):
    """The reference of `bias_act`."""
    if b is not None:
        x = x + b.to(x.dtype).reshape([-1 if i == dim else 1 for i in range(x.ndim)])
    x = _activate(x, act, alpha)
    if gain != 1:
        x = x * gain
    if clamp is not None:
        # The boundary lets the gradient through, as it did in x.clamp() before torch 2.14.
        x = torch.where(x.abs() <= clamp, x, x.detach().clamp(-clamp, clamp))
    return x


def _sample(dtype: torch.dtype, device: torch.device, key: Any, small: bool) -> tuple:
    """Arguments of the class (size bucket, channels_last, has b, act, alpha, gain, clamp)."""
    size, channels_last, has_b, act, alpha, gain, clamp = key
    channels = 24 if small else 2 ** min(size // 2, 7)
    pixels = 63 if small else max(2 ** (size - 1) // channels, 1)
    x = torch.randn(1, channels, 1, pixels, device=device).to(dtype)
    x = x.transpose(1, 3).contiguous().transpose(1, 3) if channels_last else x
    b = torch.randn(channels, device=device).to(dtype).requires_grad_() if has_b else None
    return x.requires_grad_(), b, 1, act, alpha, gain, clamp


BIAS_ACT = Op("bias_act", {"triton": _bias_act, "reference": bias_act_ref}, _sample)


def bias_act(
    x: Tensor,
    b: Tensor | None = None,
    dim: int = 1,
    act: str = "linear",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
    *,
    impl: str | None = None,
) -> Tensor:
    """y = clamp(gain * act(x + b, alpha)).

    x: any shape and floating dtype; b [x.shape[dim]], cast to x's dtype. `alpha` (slope of lrelu) and `gain`
    default to the activation's own (`ACTIVATIONS`); `clamp` None means off. Returns x's shape and dtype.
    Raises ValueError for an unknown activation, a bias of the wrong shape or a negative clamp; TypeError for
    tensors that are not floating.
    """
    check_tensors(x, b=b)
    if act not in ACTIVATIONS:
        raise ValueError(f"act must be one of {', '.join(ACTIVATIONS)}: got {act!r}")
    if not -x.ndim <= dim < x.ndim:
        raise ValueError(f"dim must lie in [{-x.ndim}, {x.ndim - 1}] for x {tuple(x.shape)}: got {dim}")
    dim %= x.ndim
    if b is not None and b.shape != (x.shape[dim],):
        raise ValueError(f"b must have shape [{x.shape[dim]}] to match dim {dim} of x: got {list(b.shape)}")
    if clamp is not None and clamp < 0:
        raise ValueError(f"clamp must be None or at least 0: got {clamp}")
    default = ACTIVATIONS[act]
    alpha = default.alpha if alpha is None else float(alpha)
    gain = default.gain if gain is None else float(gain)

    def key():
        return bucket(x.numel()), is_channels_last(x), b is not None, act, alpha, gain, clamp

    return BIAS_ACT(x, b, dim, act, alpha, gain, clamp, key=key, impl=impl)


def _offline() -> list[Build]:
    builds = []
    for dtype, size in (("bf16", 2), ("fp32", 4)):
        pointer, b = f"*{dtype}", "*fp32"
        for act, clamp in (("lrelu", None), ("lrelu", 256.0), ("swish", None)):
            for last in (False, True):
                name = f"{act}{' clamp' if clamp else ''} {dtype} {'nhwc' if last else 'nchw'}"
                meta = {"ALPHA": 0.2, "GAIN": 2**0.5, "CLAMP": clamp, "ACT": act, "CHANNELS_LAST": last}
                sizes = {"n": "i32", "n_channels": "i32", "inner": "i32"}
                saved_y = act == "lrelu" and clamp is None
                for block, warps in FLAT_CONFIGS if dtype == "bf16" else FLAT_CONFIGS[:1]:
                    flat = {**meta, "GROUP": 8, "BLOCK": block}
                    tail = f"{name} {block}"
                    bias = {"p_b": b}
                    forward = {"p_x": pointer, **bias, "p_y": pointer, **sizes}
                    builds.append(
                        Build(f"bias_act {tail}", _forward_kernel, forward, flat, warps, 2, block, 2 * size)
                    )
                    backward = {"p_g": pointer, "p_ref": pointer, "p_dx": pointer, **sizes}
                    none = {"p_b": None} if saved_y else {}
                    backward |= {} if saved_y else bias
                    builds.append(
                        Build(
                            f"bias_act_backward {tail}",
                            _backward_kernel,
                            backward,
                            flat | none,
                            warps,
                            2,
                            block,
                            3 * size,
                        )
                    )
                    if act not in PIECEWISE_LINEAR:
                        double = dict.fromkeys(("p_v", "p_dy", "p_x", "p_ddy", "p_dx"), pointer)
                        builds.append(
                            Build(
                                f"bias_act_double_backward {tail}",
                                _double_backward_kernel,
                                double | bias | sizes,
                                flat,
                                warps,
                                2,
                                block,
                                5 * size,
                            )
                        )
                block_p, block_c = (32, 64) if last else (2048, 1)
                builds.append(
                    Build(
                        f"bias_act_backward_bias {name}",
                        _backward_bias_kernel,
                        {
                            **dict.fromkeys(("p_g", "p_ref", "p_dx"), pointer),
                            **({} if saved_y else {"p_b": b}),
                            "p_db": "*fp32",
                            **dict.fromkeys(("n_positions", "n_channels", "inner", "per_split"), "i32"),
                        },
                        {
                            **meta,
                            **({"p_b": None} if saved_y else {}),
                            "WIDE": False,
                            "BLOCK_P": block_p,
                            "BLOCK_C": block_c,
                        },
                        elements=2048,
                        least=3 * size,
                    )
                )
    return builds


OFFLINE = _offline()
