"""Minibatch standard deviation (Karras et al. 2018, section 3): the discriminator sees how its batch varies.

    y = concat(x, mean_{c, h, w} sqrt(var_group(x) + 1e-8))

Member i of group m is sample i * (N / group_size) + m, as in StyleGAN2. With h_i = x_i - mean_group(x),
sigma = sqrt(mean_i h_i^2 + 1e-8), G the group size, K the values that a statistic averages and t the sum of
dy over the pixels and members that show the statistic: dx_i = dy_i + t / (G K) * h_i / sigma. For a
cotangent v of dx, with V_i = v_i - mean_group(v) and c = mean_i h_i V_i: d t = sum c / (K sigma) and
d x_i = t / (G K sigma) * (V_i - h_i c / sigma^2).
"""

from typing import Any

import torch
from torch import Tensor

from fastgan.kernels.dispatch import Build, Op, bucket, capped, check_tensors, jit, tl
from fastgan.kernels.memory import dense, is_channels_last, like, load

BLOCK = 2048  # 128-bit loads with the 64-wide warps of AMD too


@jit
def _member(p, i, o, m, group, n_groups, i_group, n_out):
    """Member i of the group, of a tensor whose samples have n_out values."""
    return load(p + (i * n_groups + i_group).to(tl.int64) * n_out + o, m)


@jit
def _forward_kernel(
    p_x,
    p_y,
    p_sums,
    group,
    n_groups,
    n_sample,
    n_channels,
    pixels,
    per_stat,
    NUM: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copy x into y and sum sigma: p_sums [NUM, groups, blocks]. Offset o of a sample holds the same value
    of every member, so one program sees whole groups; a second read of a tile comes from the cache."""
    i_group = tl.program_id(1)
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = o < n_sample
    if CHANNELS_LAST:
        i_c = o % n_channels
        o_y = o // n_channels * (n_channels + NUM) + i_c
    else:
        i_c = o // pixels
        o_y = o
    n_y = n_sample + NUM * pixels
    first = _member(p_x, 0, o, m, group, n_groups, i_group, n_sample)
    s1 = tl.zeros_like(first)
    s2 = tl.zeros_like(first)
    for i in range(group):
        x = _member(p_x, i, o, m, group, n_groups, i_group, n_sample)
        tl.store(p_y + (i * n_groups + i_group).to(tl.int64) * n_y + o_y, x, mask=m)
        s1 += x - first
        s2 += (x - first) * (x - first)
    mean = s1 / group
    sigma = tl.sqrt(tl.maximum(s2 / group - mean * mean, 0.0) + 1e-8)
    for i_stat in tl.static_range(NUM):
        mine = m & (i_c // per_stat == i_stat)
        o_sum = (i_stat * n_groups + i_group) * tl.num_programs(0) + tl.program_id(0)
        tl.store(p_sums + o_sum, tl.sum(tl.where(mine, sigma, 0.0), axis=0))


@jit
def _fill_kernel(
    p_stat,
    p_y,
    group,
    n_groups,
    n_sample,
    n_channels,
    pixels,
    NUM: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The NUM last channels of sample n show the statistics [NUM, groups] of its group n % groups."""
    n = tl.program_id(1)
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = o < NUM * pixels
    if CHANNELS_LAST:
        i_stat = o % NUM
        o_y = o // NUM * (n_channels + NUM) + n_channels + i_stat
    else:
        i_stat = o // pixels
        o_y = n_sample + o
    value = load(p_stat + i_stat * n_groups + n % n_groups, m)
    tl.store(p_y + n.to(tl.int64) * (n_sample + NUM * pixels) + o_y, value, mask=m)


@jit
def _backward_kernel(
    p_v,
    p_g,
    p_x,
    p_t,
    p_dx,
    p_sums,
    group,
    n_groups,
    n_sample,
    n_channels,
    pixels,
    per_stat,
    NUM: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """With t [NUM, groups] scaled by 1 / (G K): dx = g + t h / sigma, g being the first channels of dy. With
    p_v instead of p_g: dx = t / sigma (V - h c / sigma^2), and the sums of c / sigma [NUM, groups,
    blocks]."""
    i_group = tl.program_id(1)
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = o < n_sample
    if CHANNELS_LAST:
        i_c = o % n_channels
        o_g = o // n_channels * (n_channels + NUM) + i_c
    else:
        i_c = o // pixels
        o_g = o
    t = load(p_t + i_c // per_stat * n_groups + i_group, m)
    first = _member(p_x, 0, o, m, group, n_groups, i_group, n_sample)
    s1 = tl.zeros_like(first)
    s2 = tl.zeros_like(first)
    s_v = tl.zeros_like(first)
    s_xv = tl.zeros_like(first)
    for i in range(group):
        x = _member(p_x, i, o, m, group, n_groups, i_group, n_sample) - first
        s1 += x
        s2 += x * x
        if p_v is not None:
            v = _member(p_v, i, o, m, group, n_groups, i_group, n_sample)
            s_v += v
            s_xv += x * v
    mean = s1 / group
    rsigma = 1 / tl.sqrt(tl.maximum(s2 / group - mean * mean, 0.0) + 1e-8)
    c = s_xv / group - mean * s_v / group
    for i in range(group):
        h = _member(p_x, i, o, m, group, n_groups, i_group, n_sample) - first - mean
        if p_v is None:
            n_y = n_sample + NUM * pixels
            dx = _member(p_g, i, o_g, m, group, n_groups, i_group, n_y) + t * h * rsigma
        else:
            v = _member(p_v, i, o, m, group, n_groups, i_group, n_sample) - s_v / group
            dx = t * rsigma * (v - h * c * rsigma * rsigma)
        tl.store(p_dx + (i * n_groups + i_group).to(tl.int64) * n_sample + o, dx, mask=m)
    if p_v is not None:
        for i_stat in tl.static_range(NUM):
            mine = m & (i_c // per_stat == i_stat)
            o_sum = (i_stat * n_groups + i_group) * tl.num_programs(0) + tl.program_id(0)
            tl.store(p_sums + o_sum, tl.sum(tl.where(mine, c * rsigma, 0.0), axis=0))


def _launch(kernel: Any, tensors: tuple, x: Tensor, group: int, num: int) -> None:
    n, c, h, w = x.shape
    groups, sample = n // group, c * h * w
    with torch.cuda.device_of(x):
        kernel[(-(-sample // BLOCK), groups)](
            *tensors,
            group,
            groups,
            sample,
            c,
            h * w,
            c // num,
            NUM=num,
            CHANNELS_LAST=is_channels_last(x),
            BLOCK=BLOCK,
            **capped(x.device),
        )


def _block_sums(x: Tensor, group: int, num: int) -> Tensor:
    blocks = -(-(x.numel() // x.shape[0]) // BLOCK)
    return x.new_empty((num, x.shape[0] // group, blocks), dtype=torch.promote_types(x.dtype, torch.float32))


def _widened(x: Tensor, num: int) -> Tensor:
    n, c, h, w = x.shape
    memory_format = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    return torch.empty((n, c + num, h, w), dtype=x.dtype, device=x.device, memory_format=memory_format)


@torch.library.custom_op("fastgan::minibatch_stddev", mutates_args=())
def _minibatch_stddev(x: Tensor, group: int, num: int) -> Tensor:
    x = dense(x)
    y = _widened(x, num)
    if x.numel() == 0:
        return y.zero_()
    n, c, h, w = x.shape
    last = is_channels_last(x)
    sums = _block_sums(x, group, num)
    _launch(_forward_kernel, (x, y, sums), x, group, num)
    stat = sums.sum(2) / (c // num * h * w)
    with torch.cuda.device_of(x):
        _fill_kernel[(-(-num * h * w // BLOCK), n)](
            *(stat, y, group, n // group, c * h * w, c, h * w),
            NUM=num,
            CHANNELS_LAST=last,
            BLOCK=BLOCK,
            **capped(x.device),
        )
    return y


@_minibatch_stddev.register_fake
def _(x, group, num):
    return _widened(dense(x), num)


@torch.library.custom_op("fastgan::minibatch_stddev_backward", mutates_args=())
def _minibatch_stddev_backward(dy: Tensor, t: Tensor, x: Tensor, group: int, num: int) -> Tensor:
    """dx from dy [N, C + num, H, W] and t [num, groups], the sums of dy over what shows a statistic / (G
    K)."""
    x = dense(x)
    dx = torch.empty_like(x)
    if x.numel():
        tensors = (None, like(dy, x), x, t.contiguous(), dx, None)
        _launch(_backward_kernel, tensors, x, group, num)
    return dx


@_minibatch_stddev_backward.register_fake
def _(dy, t, x, group, num):
    return torch.empty_like(dense(x))


@torch.library.custom_op("fastgan::minibatch_stddev_double_backward", mutates_args=())
def _minibatch_stddev_double_backward(
    v: Tensor, t: Tensor, x: Tensor, group: int, num: int
) -> tuple[Tensor, Tensor]:
    """d x and d t of <v, dx>."""
    x = dense(x)
    dx = torch.empty_like(x)
    if x.numel() == 0:
        return dx, torch.zeros_like(t)
    sums = _block_sums(x, group, num)
    tensors = (like(v, x), None, x, t.contiguous(), dx, sums)
    _launch(_backward_kernel, tensors, x, group, num)
    return dx, sums.sum(2) * group


@_minibatch_stddev_double_backward.register_fake
def _(v, t, x, group, num):
    return torch.empty_like(dense(x)), torch.empty_like(t)


def _setup(ctx, inputs, output):
    x, ctx.group, ctx.num = inputs
    ctx.save_for_backward(x)


def _backward(ctx, dy):
    (x,) = ctx.saved_tensors
    (n, c, h, w), group, num = x.shape, ctx.group, ctx.num
    t = dy[:, c:].to(torch.promote_types(x.dtype, torch.float32)).sum([2, 3])
    t = t.reshape(group, n // group, num).sum(0).t() / max(group * (c // num) * h * w, 1)
    return _minibatch_stddev_backward(dy, t, x, group, num), None, None


def _setup_backward(ctx, inputs, output):
    _, t, x, ctx.group, ctx.num = inputs
    ctx.save_for_backward(t, x)


def _double_backward(ctx, v):
    t, x = ctx.saved_tensors
    dx, dt = _minibatch_stddev_double_backward(v, t, x, ctx.group, ctx.num)
    shown = v.new_zeros(()).expand(x.shape[0], ctx.num, *x.shape[2:])
    return torch.cat([v, shown], dim=1), dt, dx, None, None


_minibatch_stddev.register_autograd(_backward, setup_context=_setup)
_minibatch_stddev_backward.register_autograd(_double_backward, setup_context=_setup_backward)


def minibatch_stddev_ref(x: Tensor, group_size: int, num_channels: int) -> Tensor:
    """The reference of `minibatch_stddev`."""
    c, h, w = x.shape[1:]
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    y = y.reshape(group_size, -1, num_channels, c // num_channels, h, w)
    y = (y.var(dim=0, correction=0) + 1e-8).sqrt().mean(dim=[2, 3, 4])  # [n / group_size, num_channels]
    y = y.reshape(-1, num_channels, 1, 1).repeat(group_size, 1, h, w)
    return torch.cat([x, y.to(x.dtype)], dim=1)


def _sample(dtype: torch.dtype, device: torch.device, key: Any, small: bool) -> tuple:
    size, channels_last, group, num = key
    n, c, side = 2 * group, 3 * num, 5
    if not small:
        c = 512 // num * num or num
        side = max(int((2 ** (size - 1) / (n * c)) ** 0.5), 1)
    x = torch.randn(n, c, side, side, device=device).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    return x.requires_grad_(), group, num


MINIBATCH_STDDEV = Op(
    "minibatch_stddev", {"triton": _minibatch_stddev, "reference": minibatch_stddev_ref}, _sample
)


def minibatch_stddev(
    x: Tensor, group_size: int | None = 4, num_channels: int = 1, *, impl: str | None = None
) -> Tensor:
    """x [N, C, H, W] -> [N, C + num_channels, H, W]; the statistics are computed in fp32.

    `group_size` None, or larger than the batch, means the whole batch.
    Raises ValueError when the groups do not divide the batch or `num_channels` does not divide the channels.
    """
    check_tensors(x)
    if x.ndim != 4:
        raise ValueError(f"x must be [N, C, H, W]: got shape {list(x.shape)}")
    n, c = x.shape[:2]
    group = n if group_size is None else min(group_size, n)
    if group < 1 or n % group:
        raise ValueError(f"group_size must divide the batch: got group_size {group_size} and batch {n}")
    if num_channels < 1 or c % num_channels:
        raise ValueError(f"num_channels must divide the {c} channels of x: got {num_channels}")

    def key():
        return bucket(x.numel()), is_channels_last(x), group, num_channels

    return MINIBATCH_STDDEV(x, group, num_channels, key=key, impl=impl)


def _offline() -> list[Build]:
    builds = []
    names = ("group", "n_groups", "n_sample", "n_channels", "pixels", "per_stat")
    sizes, unaligned = dict.fromkeys(names, "i32"), ("group", "n_groups")
    for dtype, size in (("bf16", 2), ("fp32", 4)):
        x = f"*{dtype}"
        for last in (False, True):
            meta = {"NUM": 1, "CHANNELS_LAST": last, "BLOCK": BLOCK}
            tail = f"{dtype} {'nhwc' if last else 'nchw'}"
            skip = (*unaligned, "pixels") if last else unaligned
            forward = {"p_x": x, "p_y": x, "p_sums": "*fp32", **sizes}
            builds.append(
                Build(
                    f"minibatch_stddev {tail}",
                    _forward_kernel,
                    forward,
                    meta,
                    4,
                    2,
                    BLOCK,
                    2 * size,
                    skip,
                )
            )
            fill = {k: v for k, v in sizes.items() if k != "per_stat"}
            builds.append(
                Build(
                    f"minibatch_stddev_fill {tail}",
                    _fill_kernel,
                    {"p_stat": "*fp32", "p_y": x, **fill},
                    meta,
                    4,
                    2,
                    BLOCK,
                    size,
                    skip,
                )
            )
            backward = {"p_g": x, "p_x": x, "p_t": "*fp32", "p_dx": x, **sizes}
            builds.append(
                Build(
                    f"minibatch_stddev_backward {tail}",
                    _backward_kernel,
                    backward,
                    {**meta, "p_v": None, "p_sums": None},
                    4,
                    2,
                    BLOCK,
                    3 * size,
                    skip,
                )
            )
            double = {"p_v": x, "p_x": x, "p_t": "*fp32", "p_dx": x, "p_sums": "*fp32", **sizes}
            builds.append(
                Build(
                    f"minibatch_stddev_double_backward {tail}",
                    _backward_kernel,
                    double,
                    {**meta, "p_g": None},
                    4,
                    2,
                    BLOCK,
                    3 * size,
                    skip,
                )
            )
    return builds


OFFLINE = _offline()
