"""The convolution kernels themselves, in Triton's interpreter (test_interpreted.py starts it)."""

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from golden_cases import Case, golden
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from fastgan.kernels import conv_gemm as gemm
from fastgan.kernels.conv2d_resample import conv2d_resample, output_size
from fastgan.kernels.conv_gemm import conv_gemm, conv_gemm_stats, conv_gemm_weight, convolve
from fastgan.kernels.conv_transpose_bn_act import conv2d_bn_act, conv_transpose2d_bn_act
from fastgan.kernels.modulated_conv2d import modulated_conv2d
from fastgan.kernels.upfirdn2d import setup_filter

DOUBLE = torch.float64
# up, down, kernel, (H, W)
GEOMETRIES = [
    (1, 1, 3, (5, 4)),
    (1, 2, 4, (6, 6)),
    (2, 1, 4, (3, 4)),
    (1, 1, 1, (1, 3)),
    (3, 1, 5, (2, 3)),
]


@pytest.fixture(autouse=True)
def few_splits(monkeypatch):
    """The interpreter pays for every program; 20 still split the weight gradient of a 3x3 convolution."""
    monkeypatch.setattr(gemm, "WEIGHT_PROGRAMS", 20)


@pytest.fixture
def poison():
    """Memory that nothing was written to reads as NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def random(
    *shape: int, dtype: torch.dtype = DOUBLE, layout: torch.memory_format = torch.contiguous_format
) -> Tensor:
    x = torch.randn(shape, dtype=torch.float32).to(dtype)
    return (x.contiguous(memory_format=layout) if len(shape) == 4 else x).requires_grad_()


def convolve_ref(
    x: Tensor, w: Tensor, s_in: Tensor | None, s_out: Tensor | None, geometry: tuple, flip: bool
) -> Tensor:
    up, down, pad_y, pad_x, out_h, out_w = geometry
    n, c, h, width = x.shape
    kh, kw = w.shape[2:]
    x = x if s_in is None else x * s_in[:, :, None, None]
    z = F.pad(x.reshape(n, c, h, 1, width, 1), [0, up - 1, 0, 0, 0, up - 1]).reshape(n, c, h * up, width * up)
    right, bottom = (out_w - 1) * down + kw - pad_x - width * up, (out_h - 1) * down + kh - pad_y - h * up
    z = F.pad(z, [pad_x, max(right, 0), pad_y, max(bottom, 0)])
    y = F.conv2d(z, w.flip([2, 3]) if flip else w, stride=down)[:, :, :out_h, :out_w]
    return y if s_out is None else y * s_out[:, :, None, None]


def geometry_of(up: int, down: int, k: int, size: tuple[int, int]) -> tuple[int, ...]:
    return up, down, k // 2, (k - 1) // 2, size[0] * up // down or 1, size[1] * up // down or 1


def agree(run: Callable, reference: Callable, inputs: list[Tensor], tol: float = 1e-9) -> None:
    """Values, gradients for random cotangents, and gradients of those for random cotangents."""
    generator = torch.Generator().manual_seed(7)
    results = []
    for f in (run, reference):
        generator.manual_seed(7)
        y = f(*inputs)
        cotangent = torch.randn(y.shape, generator=generator, dtype=DOUBLE).to(y.dtype).requires_grad_()
        grads = torch.autograd.grad(y, inputs, cotangent, create_graph=True)
        weights = [torch.randn(g.shape, generator=generator, dtype=DOUBLE) for g in grads]
        loss = torch.stack([(g * v).sum() for g, v in zip(grads, weights, strict=True)]).sum()
        seconds = torch.autograd.grad(loss, [*inputs, cotangent], materialize_grads=True, allow_unused=True)
        results.append([y, *grads, *seconds])
    for i, (ours, theirs) in enumerate(zip(*results, strict=True)):
        error = (ours - theirs).abs().max().item()
        assert error <= tol * max(theirs.abs().max().item(), 1e-3), f"result {i}: error {error:.3g}"


@pytest.mark.parametrize("i", range(len(GEOMETRIES)))
def test_primitive_agrees_to_second_order(i, poison):
    up, down, k, size = GEOMETRIES[i]
    layout = torch.channels_last if i % 2 else torch.contiguous_format
    x, w = random(2, 3, *size, layout=layout), random(5, 3, k, k)
    args = {"geometry": geometry_of(up, down, k, size), "flip": down == 1}
    inputs = [x, w, random(2, 3), random(2, 5)]
    agree(partial(convolve, **args), partial(convolve_ref, **args), inputs)


@pytest.mark.parametrize(
    ("act", "clamp", "noise_shape"),
    [
        ("lrelu", 0.9, (2, 1, 6, 4)),
        ("relu", None, (6, 4)),
        ("linear", 0.7, (6, 4)),
        ("lrelu", None, (1, 1, 1, 4)),
    ],
)
def test_epilogue_agrees_to_second_order(act, clamp, noise_shape, poison):
    geometry = geometry_of(2, 1, 4, (3, 2))
    noise, bias = random(*noise_shape), random(5)
    alpha = {"lrelu": 0.3, "relu": 0.0, "linear": 1.0}[act]

    def reference(x, w, s_in, s_out, noise, bias):
        y = convolve_ref(x, w, s_in, s_out, geometry, True) + noise + bias[:, None, None]
        y = torch.where(y > 0, y, alpha * y) * 1.7
        return y if clamp is None else y.clamp(-clamp, clamp)

    def run(*tensors):
        return conv_gemm(*tensors, geometry, True, act, alpha, 1.7, clamp)

    agree(run, reference, [random(2, 3, 3, 2), random(5, 3, 4, 4), random(2, 3), random(2, 5), noise, bias])


def test_zero_styles_have_right_gradients():
    """A zero scale stops nothing: its own gradient needs the unscaled product."""
    args = {"geometry": geometry_of(1, 1, 3, (3, 3)), "flip": False}
    s_in = torch.zeros(1, 2, dtype=DOUBLE, requires_grad=True)
    inputs = [random(1, 2, 3, 3), random(2, 2, 3, 3), s_in, random(1, 2)]
    agree(partial(convolve, **args), partial(convolve_ref, **args), inputs)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    ("act", "clamp", "noise_shape", "demodulate"),
    [("lrelu", 0.6, (2, 1, 5, 4), True), ("relu", None, (5, 4), False), ("lrelu", None, None, True)],
)
def test_library_epilogue_agrees_to_second_order(act, clamp, noise_shape, demodulate, layout, poison):
    noise = [random(*noise_shape)] if noise_shape else []
    inputs = [random(2, 3, 5, 4, layout=layout), random(8, 3, 3, 3), random(2, 3), random(8), *noise]

    def run(x, weight, styles, bias, noise=None, *, impl):
        rest = {"demodulate": demodulate, "bias": bias, "act": act, "clamp": clamp}
        return modulated_conv2d(x, weight, styles, noise, padding=1, **rest, impl=impl)

    agree(partial(run, impl="library"), partial(run, impl="reference"), inputs)


@pytest.mark.parametrize("size", [1, 3, 63, 65])
def test_odd_sizes_and_channels(size, poison):
    x, w = random(1, 1, size, 3), random(size, 1, 3, 3)
    geometry = (1, 1, 1, 1, size, 3)
    y = convolve(x, w, None, None, geometry, False)
    torch.testing.assert_close(y, F.conv2d(x, w, padding=1))
    g = torch.randn_like(y)
    ours = torch.autograd.grad(y, [x, w], g)
    for a, b in zip(ours, torch.autograd.grad(F.conv2d(x, w, padding=1), [x, w], g), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("config", gemm.CONV_CONFIGS, ids=str)
def test_every_forward_configuration(config, poison):
    for n, size in ((3, (5, 3)), (1, (12, 13))):  # a tile that spans images, tiles within one
        x, w, s_in, s_out = random(n, 35, *size), random(17, 35, 4, 4), random(n, 35), random(n, 17)
        geometry = geometry_of(2, 1, 4, size)
        with torch.no_grad():
            plain = (None, None, geometry, False, "linear", 0.0, 1.0, None)
            y, _, _ = gemm.launch_conv(x, w, s_in, s_out, *plain, config=config)
            expected = convolve_ref(x, w, s_in, s_out, geometry, False)
            torch.testing.assert_close(y, expected)
            _, mean, var = gemm.launch_conv(x + 50, w, None, None, *plain, stats=True, config=config)
            expected = convolve_ref(x + 50, w, None, None, geometry, False)
        assert mean is not None and var is not None
        torch.testing.assert_close(mean, expected.mean([0, 2, 3]))
        torch.testing.assert_close(var, expected.var([0, 2, 3], correction=0))


@pytest.mark.parametrize("config", gemm.WEIGHT_CONFIGS, ids=str)
@pytest.mark.parametrize("programs", [1, 200])
def test_every_weight_configuration(config, programs, monkeypatch, poison):
    monkeypatch.setattr(gemm, "WEIGHT_PROGRAMS", programs)
    for up, down in ((1, 2), (2, 1)):
        geometry = geometry_of(up, down, 3, (6, 8))
        x, w, s_in, s_out = random(3, 18, 6, 8), random(19, 18, 3, 3), random(3, 18), random(3, 19)
        y = convolve_ref(x, w, s_in, s_out, geometry, True)
        g = torch.randn_like(y)
        with torch.no_grad():
            dw = gemm.launch_weight(x, g, s_in, s_out, geometry, True, 3, 3, config=config)
        torch.testing.assert_close(dw, torch.autograd.grad(y, w, g)[0])


def check_gradients(run: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    """gradcheck and gradgradcheck along random directions; `agree` above compares whole gradients."""
    assert gradcheck(run, inputs, fast_mode=True)
    assert gradgradcheck(run, inputs, fast_mode=True, check_undefined_grad=False)


def test_gradcheck_of_the_primitives():
    geometry = geometry_of(2, 1, 3, (2, 1))
    x, w, s_in, s_out = random(1, 2, 2, 1), random(2, 2, 3, 3), random(1, 2), random(1, 2)

    def forward(*tensors):
        return conv_gemm(*tensors, geometry, False, "lrelu", 0.2, 1.4, None)

    check_gradients(forward, [x, w, s_in, s_out, random(1, 1, 4, 2), random(2)])
    g = random(1, 2, 4, 2)
    check_gradients(lambda *t: conv_gemm_weight(*t, geometry, True, 3, 3), [x, g, s_in, s_out])
    inputs = [random(2, 2, 2, 3), random(2, 2, 2, 2), random(2)]
    check_gradients(lambda *t: conv_gemm_stats(*t, (1, 1, 1, 1, 3, 4), False)[0], inputs)


@pytest.mark.parametrize(("up", "down"), [(2, 1), (1, 2)])
def test_gradcheck_of_modulated_conv2d(up, down):
    x = random(1, 1, 4, 2).detach().transpose(2, 3).requires_grad_()  # neither layout
    out = (2 * up // down, 4 * up // down)
    inputs = [x, random(2, 1, 3, 3), random(1, 1), random(1, 1, *out), random(2)]

    def run(x, weight, styles, noise, bias):
        f = setup_filter([1, 2])
        act = {"up": up, "down": down, "padding": 1, "resample_filter": f, "bias": bias, "act": "lrelu"}
        return modulated_conv2d(x, weight, styles, noise, **act, impl="triton")

    check_gradients(run, inputs)


@pytest.mark.parametrize(
    ("op", "training", "layout"),
    [
        (conv_transpose2d_bn_act, True, torch.channels_last),
        (conv2d_bn_act, True, torch.contiguous_format),
        (conv_transpose2d_bn_act, False, torch.contiguous_format),
    ],
)
def test_gradcheck_of_batch_norm(op, training, layout):
    weight = random(2, 3, 2, 2) if op is conv_transpose2d_bn_act else random(3, 2, 2, 2)
    inputs = [random(2, 2, 2, 3, layout=layout), weight, random(3), random(3), random(3)]

    def run(x, weight, gamma, beta, bias):
        mean, var = torch.zeros(3, dtype=DOUBLE), torch.ones(3, dtype=DOUBLE)
        return op(x, weight, gamma, beta, mean, var, bias, padding=0, training=training, impl="triton")

    check_gradients(run, inputs)


def test_empty_batch():
    x, w = random(0, 3, 4, 4), random(5, 3, 3, 3)
    y = modulated_conv2d(x, w, random(0, 3), padding=1, act="lrelu", bias=random(5), impl="triton")
    assert y.shape == (0, 5, 4, 4)
    y.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape and w.grad is not None and not w.grad.any()


@pytest.mark.parametrize("op", [conv_transpose2d_bn_act, conv2d_bn_act])
def test_empty_batch_leaves_the_statistics(op):
    x, w = random(0, 3, 4, 4), random(3, 3, 4, 4)
    mean, var = torch.zeros(3, dtype=DOUBLE), torch.ones(3, dtype=DOUBLE)
    y = op(x, w, random(3), random(3), mean, var, impl="triton")
    assert y.shape[:2] == (0, 3) and not mean.any() and var.eq(1).all()
    y.sum().backward()
    assert w.grad is not None and not w.grad.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("up", [1, 2])
def test_error_is_at_most_twice_the_reference(dtype, up):
    f = setup_filter([1, 3, 3, 1])
    inputs = [random(2, 16, 6, 6), random(8, 16, 3, 3), random(2, 16), random(8)]

    def run(impl: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in inputs]
        x, weight, styles, bias = leaves
        y = modulated_conv2d(
            x,
            weight,
            styles,
            up=up,
            padding=1,
            resample_filter=f,
            bias=bias,
            act="lrelu",
            clamp=256,
            impl=impl,
        )
        g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        return [t.double() for t in (y, *torch.autograd.grad(y, leaves, g))]

    for exact, plain, ours in zip(
        run("reference", DOUBLE), run("reference", dtype), run("triton", dtype), strict=True
    ):
        slack = 4 * torch.finfo(dtype).eps * exact.abs().max()
        assert (ours - exact).abs().max() <= 2 * (plain - exact).abs().max() + slack


def leaves(case: Case) -> dict[str, Tensor]:
    return {k: t.requires_grad_(k in case.spec["differentiable"]) for k, t in case.group("in.").items()}


@pytest.mark.parametrize("impl", ["triton", "library"])
@golden("conv2d_resample")
def test_golden_conv2d_resample(case: Case, impl: str):
    inputs = leaves(case)
    y = conv2d_resample(inputs["x"], inputs["w"], inputs.get("f"), **case.args, impl=impl)
    case.check_derivatives(y, inputs)


@pytest.mark.parametrize("impl", ["triton", "library"])
@golden("modulated_conv2d", "modulated_conv2d", fused_modconv=True)  # the others hold the same numbers
def test_golden_modulated_conv2d(case: Case, impl: str):
    args = {k: v for k, v in case.args.items() if k not in ("flip_weight", "fused_modconv")}
    inputs = leaves(case)
    x, weight, styles = inputs["x"], inputs["weight"], inputs["styles"]
    y = modulated_conv2d(
        x, weight, styles, inputs.get("noise"), resample_filter=inputs["f"], **args, impl=impl
    )
    case.check_derivatives(y, inputs)


@pytest.mark.parametrize("impl", ["triton", "library", "reference"])
@golden("bn_lrelu_fused", "convT_bn_lrelu", "conv_bn_lrelu")
def test_golden_batch_norm(case: Case, impl: str):
    inputs = leaves(case)
    args = {k: v for k, v in case.args.items() if k != "train"}
    op = conv_transpose2d_bn_act if case.spec["op"] == "convT_bn_lrelu" else conv2d_bn_act
    case.check_derivatives(op(**inputs, **args, training=case.args["train"], impl=impl), inputs)
    case.check("out.running_mean", inputs["running_mean"])
    case.check("out.running_var", inputs["running_var"])


@pytest.mark.parametrize("impl", ["triton", "library", "reference"])
@golden("progan_layers", "equalized_conv")
def test_golden_equalized_conv(case: Case, impl: str):
    inputs = leaves(case)
    weight, bias = inputs["param.module.weight"], inputs["param.module.bias"]
    scale = (2 / weight[0].numel()) ** 0.5 * case.args["lrMul"]  # the constant multiplies the bias too
    y = conv2d_resample(inputs["x"], weight * scale, padding=case.args["pad"], bias=bias * scale, impl=impl)
    case.check_derivatives(y, inputs)


SMALL = settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much],
)


@settings(SMALL, max_examples=6)
@given(
    size=st.tuples(st.integers(1, 4), st.integers(1, 3)),
    channels=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    batch=st.integers(1, 2),
    kernel=st.integers(1, 3),
    rates=st.sampled_from([(1, 1), (2, 1), (1, 2), (2, 2), (3, 1)]),
    taps=st.sampled_from([None, [1, 2], [1, 3, 3, 1]]),
    padding=st.integers(0, 3),
    layout=st.sampled_from([torch.contiguous_format, torch.channels_last]),
    act=st.sampled_from(["linear", "relu", "lrelu", "swish"]),
    demodulate=st.booleans(),
)
def test_modulated_conv2d_for_drawn_arguments(
    size, channels, batch, kernel, rates, taps, padding, layout, act, demodulate
):
    (up, down), f = rates, None if taps is None else setup_filter(taps)
    x = random(batch, channels[0], *size, layout=layout)
    weight = random(channels[1], channels[0], kernel, kernel)
    try:
        output_size(x, weight, f, up, down, (padding,) * 4)
    except ValueError:
        assume(False)

    def run(x, weight, styles, bias, impl):
        rest = {"resample_filter": f, "demodulate": demodulate, "bias": bias, "act": act, "clamp": 3.0}
        return modulated_conv2d(x, weight, styles, None, up, down, padding, **rest, impl=impl)

    inputs = [x, weight, random(batch, channels[0]), random(channels[1])]
    agree(partial(run, impl="triton"), partial(run, impl="reference"), inputs)


@SMALL
@given(
    size=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    channels=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    kernel=st.integers(1, 5),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    output_padding=st.integers(0, 2),
    transposed=st.booleans(),
    training=st.booleans(),
    slope=st.sampled_from([0.0, 0.2, 1.0]),
    layout=st.sampled_from([torch.contiguous_format, torch.channels_last]),
)
def test_batch_norm_for_drawn_arguments(
    size, channels, kernel, stride, padding, output_padding, transposed, training, slope, layout
):
    c_in, c_out = channels
    x = random(2, c_in, *size, layout=layout)
    weight = random(*((c_in, c_out) if transposed else (c_out, c_in)), kernel, kernel)
    op = conv_transpose2d_bn_act if transposed else conv2d_bn_act
    extra = output_padding if transposed and output_padding < stride else 0

    def run(x, weight, gamma, beta, bias, impl):
        mean, var = torch.zeros(c_out, dtype=DOUBLE), torch.ones(c_out, dtype=DOUBLE)
        return op(
            x, weight, gamma, beta, mean, var, bias, stride, padding, extra, training, slope=slope, impl=impl
        )

    inputs = [x, weight, random(c_out), random(c_out), random(c_out)]
    try:
        values = run(*inputs, impl="reference")[:, 0].numel()
    except ValueError:
        assume(False)
    else:
        assume(values > 4 or not training)  # few values a channel: the variance cancels to nothing
    agree(partial(run, impl="triton"), partial(run, impl="reference"), inputs, tol=1e-6)


def penalty_of(layers: Callable[..., Tensor], wrt: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """Gradients, for every parameter, of the squared norm of d <layers, fixed noise> / d wrt."""
    y = layers(wrt, *parameters)
    noise = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
    (g,) = torch.autograd.grad((y * noise).sum(), wrt, create_graph=True)
    # The last bias never reaches g.
    return list(torch.autograd.grad(g.square().sum(), parameters, allow_unused=True, materialize_grads=True))


def as_one_graph(step: Callable) -> Callable:
    torch._dynamo.reset()
    return torch.compile(step, fullgraph=True, backend="aot_eager")


def discriminator(x, w0, b0, w1, b1, impl):
    f = setup_filter([1, 3, 3, 1])
    x = conv2d_resample(x, w0, padding=1, bias=b0, act="lrelu", impl=impl)
    return conv2d_resample(x, w1, f, down=2, padding=1, bias=b1, act="lrelu", clamp=256.0, impl=impl)


def generator(styles, x, w0, w1, b, impl):
    f = setup_filter([1, 3, 3, 1])
    x = modulated_conv2d(x, w0, styles, up=2, padding=1, resample_filter=f, act="lrelu", bias=b, impl=impl)
    return modulated_conv2d(x, w1, styles, padding=1, act="lrelu", impl=impl)


def batch_norm_discriminator(x, w0, w1, gamma, beta, impl):
    mean, var = torch.zeros_like(gamma), torch.ones_like(gamma)
    x = conv2d_bn_act(x, w0, gamma, beta, mean, var, impl=impl)
    return conv_transpose2d_bn_act(x, w1, gamma, beta, mean, var, impl=impl)


@pytest.mark.parametrize("net", [discriminator, generator, batch_norm_discriminator])
@torch._dynamo.config.patch(trace_autograd_ops=True)
def test_compiled_second_order_equals_eager(net):
    """R1 and path length in one graph: equal to eager, and eager to the reference, for every parameter."""
    if net is discriminator:
        inputs = [random(1, 2, 4, 4), random(3, 2, 3, 3), random(3), random(2, 3, 3, 3), random(2)]
    elif net is generator:
        inputs = [random(1, 2), random(1, 2, 3, 3), random(2, 2, 3, 3), random(3, 2, 3, 3), random(2)]
    else:
        inputs = [random(2, 2, 6, 6), random(3, 2, 4, 4), random(3, 3, 4, 4), random(3), random(3)]
    wrt, *parameters = inputs
    expected = penalty_of(partial(net, impl="reference"), wrt, parameters)
    kernels = partial(net, impl="triton")
    eager = penalty_of(kernels, wrt, parameters)
    step = as_one_graph(lambda wrt, *parameters: penalty_of(kernels, wrt, parameters))
    assert sum(bool(c.any()) for c in expected) >= len(expected) - 2
    for a, b, c in zip(eager, step(wrt, *parameters), expected, strict=True):
        torch.testing.assert_close(a, c, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(b, c, rtol=1e-8, atol=1e-8)


def test_running_statistics_inside_one_graph():
    x, weight, gamma, beta = random(2, 2, 4, 4), random(2, 3, 4, 4), random(3), random(3)
    eager, traced = ((torch.zeros(3, dtype=DOUBLE), torch.ones(3, dtype=DOUBLE)) for _ in range(2))

    def step(x, weight, gamma, beta, mean, var):
        return conv_transpose2d_bn_act(x, weight, gamma, beta, mean, var, impl="triton")

    y = step(x, weight, gamma, beta, *eager)
    torch.testing.assert_close(as_one_graph(step)(x, weight, gamma, beta, *traced), y)
    for a, b in zip(traced, eager, strict=True):
        torch.testing.assert_close(a, b)
    assert eager[0].abs().min() > 0
