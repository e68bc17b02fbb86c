"""The fused operations against golden values: first and second order."""

import pytest
import torch
import torch.nn.functional as F
from golden_cases import Case, golden

from fastgan.kernels.bias_act import bias_act
from fastgan.kernels.conv2d_resample import conv2d_resample
from fastgan.kernels.minibatch_stddev import minibatch_stddev
from fastgan.kernels.modulated_conv2d import modulated_conv2d
from fastgan.kernels.norm_act import instance_norm_act
from fastgan.kernels.upfirdn2d import (
    downsample2d,
    filter2d,
    setup_filter,
    upfirdn2d,
    upsample2d,
)


def leaves(case: Case) -> dict[str, torch.Tensor]:
    tensors = case.group("in.")
    return {k: t.requires_grad_() if k in case.spec["differentiable"] else t for k, t in tensors.items()}


@golden("bias_act")
def test_bias_act(case: Case):
    inputs = leaves(case)
    case.check_derivatives(bias_act(inputs["x"], inputs.get("b"), **case.args), inputs)


@golden("upfirdn2d", "upfirdn2d", "filter2d", "upsample2d", "downsample2d")
def test_upfirdn2d(case: Case):
    inputs = leaves(case)
    op = {f.__name__: f for f in (upfirdn2d, filter2d, upsample2d, downsample2d)}[case.spec["op"]]
    case.check_derivatives(op(inputs["x"], inputs["f"], **case.args), inputs)


@golden("upfirdn2d", "setup_filter")
def test_setup_filter(case: Case):
    case.check("out.f", setup_filter(case.tensor("in.taps"), **case.args))


@golden("conv2d_resample")
def test_conv2d_resample(case: Case):
    inputs = leaves(case)
    case.check_derivatives(conv2d_resample(inputs["x"], inputs["w"], inputs.get("f"), **case.args), inputs)


@golden("minibatch_std")
def test_minibatch_stddev(case: Case):
    inputs = leaves(case)
    case.check_derivatives(minibatch_stddev(inputs["x"], **case.args), inputs)


@golden("modulated_conv2d", "modulated_conv2d")
def test_modulated_conv2d(case: Case):
    args = {k: v for k, v in case.args.items() if k not in ("flip_weight", "fused_modconv")}
    assert case.args["flip_weight"] == (args["up"] == 1)  # the convention that the op has built in
    inputs = leaves(case)
    x, weight, styles = inputs["x"], inputs["weight"], inputs["styles"]
    y = modulated_conv2d(x, weight, styles, inputs.get("noise"), resample_filter=inputs["f"], **args)
    case.check_derivatives(y, inputs)


@pytest.mark.parametrize("shape", [(1, 3, 5, 5), (3, 16, 16, 16), (3, 4, 5, 7), (2, 64, 8, 8)])
def test_instance_norm_stays_in_its_layout(shape: tuple[int, ...]):
    """One sample, samples normalised one by one, samples too small for that."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(shape, generator=generator, dtype=torch.float64) * 3 + 1
    r = torch.randn(shape, generator=generator, dtype=torch.float64)
    results = []
    for memory_format in (torch.channels_last, torch.contiguous_format):
        x = values.clone(memory_format=memory_format).requires_grad_()
        y = instance_norm_act(x, eps=1e-3, act="lrelu", alpha=0.1)
        assert y.is_contiguous(memory_format=memory_format)
        (g,) = torch.autograd.grad((y * r).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(g.square().sum(), x)
        results.append((y, g, second))
    torch.testing.assert_close(results[1][0], F.leaky_relu(F.instance_norm(values, eps=1e-3), 0.1))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
