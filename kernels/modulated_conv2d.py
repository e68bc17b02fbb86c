"""Modulated convolution (Karras et al. 2019, section 2.2, equations 1 to 3), with everything around it.

    y = act(d[n, o] * conv(x * s[n, i], w) + noise + b) * gain
    d[n, o] = rsqrt(sum_{i, k} (w[o, i, k] s[n, i])^2 + 1e-8)

Scaling the input and the output instead of the weights gives one dense convolution for the whole batch in
place of one group a sample; d needs only w summed over its taps, a small matrix product, and is kept in fp32.
"""

import torch
from torch import Tensor

from fastgan.kernels.bias_act import bias_act
from fastgan.kernels.conv2d_resample import conv2d_resample
from fastgan.kernels.upfirdn2d import Pair


def demodulation(weight: Tensor, styles: Tensor) -> Tensor:
    """d [N, Cout] = rsqrt(sum_i s[n, i]^2 * sum_k w[o, i, k]^2 + 1e-8), in fp32 at least."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    w2 = weight.to(dtype).square().sum(dim=[2, 3])
    return (styles.to(dtype).square() @ w2.t() + 1e-8).rsqrt()


def modulated_conv2d_ref(
    x: Tensor,
    weight: Tensor,
    styles: Tensor,
    noise: Tensor | None,
    up: int,
    down: int,
    padding: Pair,
    resample_filter: Tensor | None,
    demodulate: bool,
) -> Tensor:
    x = x * styles.to(x.dtype)[:, :, None, None]
    x = conv2d_resample(x, weight, resample_filter, up=up, down=down, padding=padding, flip_weight=up == 1)
    if demodulate:
        x = x * demodulation(weight, styles).to(x.dtype)[:, :, None, None]
    if noise is not None:
        x = x + noise.to(x.dtype)
    return x


def modulated_conv2d(
    x: Tensor,
    weight: Tensor,
    styles: Tensor,
    noise: Tensor | None = None,
    up: int = 1,
    down: int = 1,
    padding: Pair = 0,
    resample_filter: Tensor | None = None,
    demodulate: bool = True,
    bias: Tensor | None = None,
    act: str = "linear",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
) -> Tensor:
    """StyleGAN2's layer: modulate, convolve and resample, demodulate, add noise, then `bias_act`.

    x [N, Cin, H, W]; weight [Cout, Cin, kh, kw], shared by the batch; styles [N, Cin]; noise broadcastable to
    the output, [N, 1, H', W'] or [H', W']; bias [Cout]. Resampling as in `conv2d_resample`.
    With up = 1 the taps correlate, with up > 1 they convolve (a transposed convolution as it is), StyleGAN2's
    convention, so its weights load unchanged.
    Returns [N, Cout, H', W'] in x's dtype; demodulation is computed in fp32.
    Raises ValueError for wrong ranks or channel counts that do not match.
    """
    if x.ndim != 4:
        raise ValueError(f"x must be [N, C, H, W]: got shape {list(x.shape)}")
    if weight.ndim != 4 or weight.shape[1] != x.shape[1]:
        raise ValueError(f"weight must be [Cout, {x.shape[1]}, kh, kw] to match x: got {list(weight.shape)}")
    if styles.shape != (x.shape[0], x.shape[1]):
        raise ValueError(f"styles must be [{x.shape[0]}, {x.shape[1]}] to match x: got {list(styles.shape)}")
    y = modulated_conv2d_ref(x, weight, styles, noise, up, down, padding, resample_filter, demodulate)
    if bias is None and act == "linear" and gain is None and clamp is None:
        return y
    return bias_act(y, bias, act=act, alpha=alpha, gain=gain, clamp=clamp)
