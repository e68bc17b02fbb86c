"""The elementwise kernels themselves, in Triton's interpreter (test_interpreted.py starts it)."""

import os

import pytest
import torch
from golden_cases import Case, golden
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import LAYOUTS, cases, image, vector
from torch._subclasses.fake_tensor import FakeTensorMode

from fastgan.kernels import bias_act as bias_act_kernels
from fastgan.kernels.bias_act import ACTIVATIONS, BIAS_ACT, _launch, bias_act
from fastgan.kernels.dispatch import disagreement
from fastgan.kernels.minibatch_stddev import minibatch_stddev
from fastgan.kernels.norm_act import adain, batch_norm_act, conditional_batch_norm_act, instance_norm_act
from fastgan.kernels.pixel_norm import pixel_norm
from fastgan.kernels.upfirdn2d import UPFIRDN2D, downsample2d, filter2d, setup_filter, upfirdn2d, upsample2d

IMPLS = pytest.mark.parametrize("impl", ["triton", "reference"])


@pytest.fixture(autouse=True)
def _interpreted():
    assert os.environ["TRITON_INTERPRET"] == "1"


@pytest.fixture
def poisoned(monkeypatch):
    """Fresh memory is NaN, so that a result nobody wrote shows."""
    for name in ("empty", "empty_like"):
        make = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, make=make, **k: make(*a, **k).fill_(float("nan")))
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: new_empty(*a, **k).fill_(float("nan")))


@pytest.fixture
def forced(monkeypatch):
    """Choose the implementation by the environment, as a user would."""
    return lambda impl: monkeypatch.setenv("FASTGAN_KERNELS", impl)


def leaves(case: Case) -> dict[str, torch.Tensor]:
    tensors = case.group("in.")
    return {k: t.requires_grad_() if k in case.spec["differentiable"] else t for k, t in tensors.items()}


@golden("bias_act")
@IMPLS
def test_golden_bias_act(case: Case, impl: str):
    inputs = leaves(case)
    case.check_derivatives(bias_act(inputs["x"], inputs.get("b"), **case.args, impl=impl), inputs)


@golden("upfirdn2d", "upfirdn2d", "filter2d", "upsample2d", "downsample2d")
@pytest.mark.parametrize("impl", ["triton", "triton nhwc", "reference"])
def test_golden_upfirdn2d(case: Case, impl: str, forced):
    forced(impl.split()[0])
    inputs = leaves(case)
    x = inputs["x"]
    if "nhwc" in impl:
        x = x.contiguous(memory_format=torch.channels_last)
    op = {f.__name__: f for f in (upfirdn2d, filter2d, upsample2d, downsample2d)}[case.spec["op"]]
    case.check_derivatives(op(x, inputs["f"], **case.args), inputs)


@golden("minibatch_std")
@IMPLS
def test_golden_minibatch_stddev(case: Case, impl: str):
    inputs = leaves(case)
    case.check_derivatives(minibatch_stddev(inputs["x"], **case.args, impl=impl), inputs)


@golden("progan_layers", "pixelnorm")
@IMPLS
def test_golden_pixel_norm(case: Case, impl: str):
    inputs = leaves(case)
    case.check_derivatives(pixel_norm(inputs["x"], impl=impl), inputs)


@golden("progan_layers", "upscale2d")
@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_golden_nearest_upsampling(case: Case, impl: str, forced):
    forced(impl)
    inputs = leaves(case)
    up = case.args["factor"]
    y = upsample2d(inputs["x"], setup_filter(torch.ones(up)), up=up)
    case.check_derivatives(y, inputs)


@golden("progan_layers", "equalized_linear")
@IMPLS
def test_golden_equalized_linear(case: Case, impl: str):
    inputs = leaves(case)
    weight, bias = inputs["param.module.weight"], inputs["param.module.bias"]
    scale = (2 / weight.shape[1]) ** 0.5 * case.args["lrMul"]  # the constant multiplies the bias too
    y = bias_act(inputs["x"] @ (weight * scale).t(), bias * scale, impl=impl)
    case.check_derivatives(y, inputs)


@golden("bn_lrelu_fused", "instance_norm_relu")
@IMPLS
def test_golden_instance_norm(case: Case, impl: str):
    inputs = leaves(case)
    case.check_derivatives(instance_norm_act(inputs["x"], **case.args, act="relu", impl=impl), inputs)


@golden("adain")
@IMPLS
def test_golden_adain(case: Case, impl: str):
    inputs = leaves(case)
    weight, bias = (inputs[f"param.styleModulator.module.{k}"] for k in ("weight", "bias"))
    # The peer's equalised linear layer: the constant multiplies the bias too.
    style = (inputs["w"] @ weight.t() + bias) * (2 / weight.shape[1]) ** 0.5
    scale, shift = style.chunk(2, dim=1)
    case.check_derivatives(adain(inputs["x"], scale, shift, impl=impl), inputs)


@golden("cond_batchnorm")
@IMPLS
def test_golden_conditional_batch_norm(case: Case, impl: str):
    inputs = leaves(case)
    mean, var = inputs["param.stored_mean"], inputs["param.stored_var"]
    if case.spec["op"] == "biggan_bn":
        gain, bias = inputs["param.gain"], inputs["param.bias"]
        y = batch_norm_act(inputs["x"], gain, bias, mean, var, case.args["train"], impl=impl)
    else:
        gain, bias = (inputs[f"param.{k}.weight"] for k in ("gain", "bias"))
        cond = inputs["y_cond"]
        if case.args["which_linear"] == "embedding":
            gain, bias = gain[cond.long()], bias[cond.long()]
        else:
            gain, bias = cond @ gain.t(), cond @ bias.t()
        train = case.args["train"]
        y = conditional_batch_norm_act(inputs["x"], 1 + gain, bias, mean, var, train, act="linear", impl=impl)
    case.check_derivatives(y, inputs)
    case.check("out.new.stored_mean", mean)
    case.check("out.new.stored_var", var)


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((2, 8, 4, 4), "nchw"),
        ((2, 8, 4, 4), "nhwc"),
        ((3, 3, 5, 7), "nhwc"),
        ((3, 3, 5, 7), "strided"),
        ((1, 17, 3, 1), "nchw"),
    ],
    ids=str,
)
def test_kernels_agree_to_second_order(shape: tuple[int, int, int, int], layout: str, poisoned):
    """Value, gradients for random cotangents and gradients of their norm, every result written."""
    found = {}
    for case in cases(*shape, layout, torch.float64):
        problem = disagreement(case.triton, case.reference, case.args)
        found |= {case.name: problem} if problem else {}
    assert not found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("size", [1, 3, 63, 65])
def test_odd_sizes_within_twice_the_references_error(size, dtype):
    found = {}
    for case in cases(2, 3, 5, size, "nhwc" if size % 2 else "nchw", dtype):
        problem = disagreement(case.triton, case.reference, case.args, order=1)
        found |= {case.name: problem} if problem else {}
    assert not found


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_empty_batch(layout):
    for case in cases(0, 3, 4, 5, layout, torch.float32):
        expected, y = (f(*case.args) for f in (case.reference, case.triton))
        assert y.shape == expected.shape and y.dtype == expected.dtype, case.name
        (g,) = torch.autograd.grad(y.sum(), case.args[:1])
        assert g.shape == case.args[0].shape


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_layout_is_kept_and_matches_the_fake_kernel(layout):
    for case in cases(2, 3, 4, 5, layout, torch.float32):
        y = case.triton(*case.args)
        memory_format = torch.channels_last if layout == "nhwc" else torch.contiguous_format
        assert y.is_contiguous(memory_format=memory_format), case.name
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            args = [mode.from_tensor(a.detach()) if isinstance(a, torch.Tensor) else a for a in case.args]
            fake = case.triton(*args)
        assert (fake.shape, fake.stride(), fake.dtype) == (y.shape, y.stride(), y.dtype), case.name


def _names() -> list[str]:
    return [c.name for c in cases(2, 2, 2, 3, "nchw", torch.float64)]


@pytest.mark.parametrize("index", range(len(_names())), ids=_names())
def test_gradcheck_and_gradgradcheck(index):
    layout = ("nchw", "nhwc")[index % 2]
    case = list(cases(2, 2, 2, 3, layout, torch.float64))[index]
    tensors = [a for a in case.args if isinstance(a, torch.Tensor) and a.requires_grad]

    def run(*inputs):
        left = iter(inputs)
        return case.triton(
            *(next(left) if isinstance(a, torch.Tensor) and a.requires_grad else a for a in case.args)
        )

    torch.autograd.gradcheck(run, tensors, fast_mode=True)
    torch.autograd.gradgradcheck(run, tensors, fast_mode=True, atol=1e-4)


SMALL = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@SMALL
@given(
    shape=st.tuples(*(st.integers(1, 9) for _ in range(4))),
    layout=st.sampled_from(LAYOUTS),
    act=st.sampled_from(list(ACTIVATIONS)),
    gain=st.sampled_from([1.0, 0.5, -2.0]),
    clamp=st.sampled_from([None, 0.4]),
    dim=st.integers(0, 3),
)
def test_bias_act_for_drawn_arguments(shape: tuple[int, int, int, int], layout, act, gain, clamp, dim):
    x = image(*shape, layout, torch.float64)
    args = (x, vector(shape[dim], dtype=torch.float64), dim, act, 0.3, gain, clamp)
    assert disagreement(BIAS_ACT.candidates["triton"], BIAS_ACT.candidates["reference"], args) is None


@SMALL
@given(
    size=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    layout=st.sampled_from(LAYOUTS),
    taps=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    up=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    down=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    pad=st.tuples(*(st.integers(-1, 4) for _ in range(4))),
    flip=st.booleans(),
)
def test_upfirdn2d_for_drawn_arguments(size, layout, taps, up, down, pad, flip):
    h, w = size
    if h * up[1] + pad[2] + pad[3] < taps[0] or w * up[0] + pad[0] + pad[1] < taps[1]:
        return
    f = torch.rand(taps, generator=torch.Generator().manual_seed(0))
    args = (image(2, 3, h, w, layout, torch.float64), f, up, down, pad, flip, 1.0)
    assert disagreement(UPFIRDN2D.candidates["triton"], UPFIRDN2D.candidates["reference"], args) is None


def discriminator(x, params):
    """A network of every operation, whose R1 penalty reaches all of them twice."""
    f = torch.tensor([1.0, 3.0, 3.0, 1.0]).outer(torch.tensor([1.0, 3.0, 3.0, 1.0])).to(x) / 64
    w, b, gamma, beta = params
    x = bias_act(torch.nn.functional.conv2d(x, w, padding=1), b, act="swish")
    x = downsample2d(x, f)
    x = instance_norm_act(x, gamma, beta, act="lrelu")
    x = pixel_norm(batch_norm_act(x, gamma, beta, None, None, act="lrelu", upsample=2))
    return minibatch_stddev(x, 2).square().mean([1, 2, 3])


def r1_gradients(x, *params):
    (g,) = torch.autograd.grad(discriminator(x, params).sum(), x, create_graph=True)
    return torch.autograd.grad(g.square().sum(), params, allow_unused=True, materialize_grads=True)


@torch._dynamo.config.patch(trace_autograd_ops=True)
def test_r1_compiled_whole_equals_eager_and_the_reference(forced):
    x = image(4, 2, 4, 4, "nhwc", torch.float64)
    params = [vector(*s, dtype=torch.float64, seed=i) for i, s in enumerate([(3, 2, 3, 3), (3,), (3,), (3,)])]
    eager = r1_gradients(x, *params)
    compiled = torch.compile(r1_gradients, fullgraph=True, backend="aot_eager")(x, *params)
    forced("reference")
    reference = r1_gradients(x, *params)
    for e, c, r in zip(eager, compiled, reference, strict=True):
        torch.testing.assert_close(c, e, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(e, r, rtol=1e-7, atol=1e-10)


class RawLaunches(torch.autograd.Function):
    """bias_act as an autograd.Function whose backward launches a kernel itself: right to first order."""

    @staticmethod
    def forward(ctx, *inputs):
        x, b, *args = inputs
        y = x.new_empty(x.shape)
        _launch("bias_act", bias_act_kernels._forward_kernel, (x, b, y), *args)
        ctx.save_for_backward(x, b)
        ctx.args = args
        return y

    @staticmethod
    def backward(ctx, *grad_outputs):
        (g,) = grad_outputs
        x, b = ctx.saved_tensors
        dx = torch.empty_like(x)
        _launch("bias_act_backward", bias_act_kernels._backward_kernel, (g.contiguous(), x, b, dx), *ctx.args)
        return dx, dx.sum([0, 2, 3]), *(None,) * 5


def test_a_raw_launch_in_a_backward_is_noticed(monkeypatch):
    """The check above would not pass were an op swapped for RawLaunches."""
    x = image(4, 2, 4, 4, "nchw", torch.float64)
    params = [vector(*s, dtype=torch.float64, seed=i) for i, s in enumerate([(3, 2, 3, 3), (3,), (3,), (3,)])]
    right = r1_gradients(x, *params)
    raw = lambda x, b, *args: RawLaunches.apply(x.contiguous(), b, *args)  # noqa: E731
    monkeypatch.setitem(BIAS_ACT.candidates, "triton", raw)
    first = torch.autograd.grad(discriminator(x, params).sum(), params[0])
    monkeypatch.undo()
    torch.testing.assert_close(
        first, torch.autograd.grad(discriminator(x, params).sum(), params[0]), rtol=1e-9, atol=1e-12
    )
    monkeypatch.setitem(BIAS_ACT.candidates, "triton", raw)
    wrong = r1_gradients(x, *params)
    assert not all(torch.allclose(a, b, rtol=1e-3) for a, b in zip(right, wrong, strict=True))
    assert disagreement(
        raw, BIAS_ACT.candidates["reference"], (x, vector(2, dtype=torch.float64), 1, "tanh", 0.0, 1.0, None)
    )


def test_backward_launches_no_raw_kernel():
    """Under create_graph every gradient that depends on an input must say so: a raw launch in a backward
    cuts it."""
    for case in cases(2, 3, 4, 5, "nchw", torch.float64):
        y = case.triton(*case.args)
        cotangent = torch.randn_like(y).requires_grad_()
        tensors = [a for a in case.args if isinstance(a, torch.Tensor) and a.requires_grad]
        for g in torch.autograd.grad(y, tensors, cotangent, create_graph=True):
            assert g.requires_grad, case.name
            (d,) = torch.autograd.grad(g.sum(), cotangent, retain_graph=True)
            assert d.abs().sum() > 0, case.name


def test_third_order_is_an_error_not_a_wrong_number():
    x = image(2, 3, 2, 2, "nchw", torch.float64)
    (g,) = torch.autograd.grad(bias_act(x, act="tanh").sum(), x, create_graph=True)
    (h,) = torch.autograd.grad(g.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double_backward"):
        torch.autograd.grad(h.square().sum(), x)
