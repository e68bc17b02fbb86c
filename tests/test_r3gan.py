"""R3GAN against the public implementation's numbers, and its grouped convolution against aten's."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from golden_cases import Case, golden
from kernel_cases import image
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from fastgan import public
from fastgan.kernels.dispatch import deviation, disagreement
from fastgan.kernels.grouped_conv2d import grouped_conv2d, grouped_conv2d_ref
from fastgan.limit import products
from fastgan.losses import gradient_square, homogeneous_logits, leaf, relativistic
from fastgan.models import r3gan


def arguments(ctor: dict) -> dict[str, Any]:
    """The peer's constructor arguments as ours; loading its weights proves that they mean the same."""
    widths = sorted(ctor["WidthPerStage"], reverse=True)
    resolution = 2 ** (len(widths) + 1)
    return ({"z_dim": ctor["NoiseDimension"]} if "NoiseDimension" in ctor else {}) | {
        "width": widths[0],
        "channel_base": widths[-1] * resolution,
        "resolution": resolution,
        "cardinality": max(ctor["CardinalityPerStage"]),
        "blocks": ctor["BlocksPerStage"][0],
        "expansion": ctor["ExpansionFactor"],
    }


def with_weights(net: nn.Module, weights: dict[str, Tensor]) -> Callable[..., Tensor]:
    """`net` as a function of the peer's weights, so that gradients reach them in the peer's shapes."""
    state = public.r3gan(weights)
    assert {k: v.shape for k, v in state.items()} == {k: p.shape for k, p in net.named_parameters()}
    return lambda *inputs: functional_call(net.to(torch.float64), state, inputs)


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


@golden("r3gan_nets", "r3gan_G", "r3gan_D")
def test_golden_networks(case: Case):
    network, source = (r3gan.Generator, "z") if case.spec["op"] == "r3gan_G" else (r3gan.Discriminator, "x")
    weights = {k: v.requires_grad_() for k, v in case.group("in.param.").items()}
    x = case.tensor(f"in.{source}").requires_grad_()
    y = with_weights(network(**arguments(case.args["ctor"])), weights)(x)
    inputs = {source: x} | {f"param.{k}": v for k, v in weights.items()}
    case.check_derivatives(y if source == "z" else y.flatten(), inputs)


@golden("r3gan_nets", "r3gan_loss_D")
def test_golden_losses(case: Case):
    weights = {n: {k: v.requires_grad_() for k, v in case.group(f"in.{n}.").items()} for n in "GD"}
    G = with_weights(r3gan.Generator(**arguments(case.args["G_ctor"])), weights["G"])
    D = with_weights(r3gan.Discriminator(**arguments(case.args["D_ctor"])), weights["D"])
    real, fake = case.tensor("in.real"), G(case.tensor("in.z"))
    trained = case.args["phase"]
    if trained == "D":
        real, fake = real.requires_grad_(), fake.detach().requires_grad_()
    logits = D(real), D(fake)
    assert logits[0].shape == (3, 1)
    difference = logits[0] - logits[1] if trained == "D" else logits[1] - logits[0]
    case.check("out.rel", difference.flatten())
    loss = relativistic(*(logits if trained == "D" else reversed(logits)))
    torch.testing.assert_close(loss, case.tensor("out.adv").mean(), rtol=1e-6, atol=0.0)
    if trained == "D":
        for name, x, y in ("r1", real, logits[0]), ("r2", fake, logits[1]):
            penalty = gradient_square(y, x)
            torch.testing.assert_close(penalty, case.tensor(f"out.{name}").mean(), rtol=1e-6, atol=0.0)
            loss = loss + case.args["gamma"] / 2 * penalty
    expected = case.group(f"out.grad.{trained}.")
    grads = torch.autograd.grad(loss, [weights[trained][k] for k in expected])
    for name, grad in zip(expected, grads, strict=True):
        case.check(f"out.grad.{trained}.{name}", grad)


def test_parameter_counts():
    """brownvc/R3GAN's presets: CIFAR-10 (20.7M, as the paper says), CIFAR-10 with labels, and FFHQ-256."""
    G, D = r3gan.Generator, r3gan.Discriminator
    assert (parameters(G()), parameters(D())) == (20_732_160, 20_683_776)
    assert (parameters(G(c_dim=10)), parameters(D(c_dim=10))) == (20_781_952, 21_280_512)
    sizes = [(768, 96)] * 4 + [(384, 48), (192, 24), (96, 12)]
    assert r3gan.stage_sizes(768, 96, 256, 24576) == sizes
    with torch.device("meta"):
        body = sum(2 * (4 * c * c + 36 * c * c // g + 4 * c) for c, g in sizes)
        between = 768 * 384 + 384 * 192 + 192 * 96
        assert parameters(G(resolution=256)) == 64 * 768 + 16 * 768 + body + between + 3 * 96
        assert parameters(D(resolution=256)) == 3 * 96 + body + between + 16 * 768 + 768


def tiny(c_dim: int = 0) -> tuple[r3gan.Generator, r3gan.Discriminator]:
    """Two stages' widths, and weights that let every parameter have a gradient."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "resolution": 16,
        "channels": 1,
        "width": 8,
        "cardinality": 2,
        "blocks": 1,
        "channel_base": 64,
    }
    G = r3gan.Generator(z_dim=5, c_dim=c_dim, **sizes).double()
    D = r3gan.Discriminator(c_dim=c_dim, **sizes).double()
    for p in [*G.parameters(), *D.parameters()]:
        nn.init.normal_(p, std=0.2)
    return G, D


def labels(n: int, c_dim: int) -> Tensor | None:
    return nn.functional.one_hot(torch.arange(n) % c_dim, c_dim).double() if c_dim else None


@pytest.mark.parametrize("c_dim", [0, 3])
def test_shapes_and_what_the_engine_asks_for(c_dim: int):
    G, D = tiny(c_dim)
    c = labels(4, c_dim)
    normal = torch.randn(4, G.normals, dtype=torch.float64)
    images, latents = G.sample(normal, torch.rand(4, G.uniforms), c)
    assert images.shape == (4, 1, 16, 16) and images.dtype == torch.float64
    assert latents is normal and torch.equal(images, G(normal, c))
    assert D.features(images).shape == (4, 8)
    assert torch.equal(D.head(D.features(images), c), D(images, c)) and D(images, c).shape == (4, 1)
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_labels_reach_images_and_logits():
    G, D = tiny(3)
    z = torch.randn(1, 5, dtype=torch.float64).expand(3, 5)
    images = G(z, labels(3, 3))
    logits = D(images[:1].expand(3, -1, -1, -1), labels(3, 3))
    assert (images[0] - images[1]).abs().max() > 1e-3 and (logits[0] - logits[1]).abs() > 1e-3
    for net, x in (G, z), (D, images):
        with pytest.raises(ValueError, match=r"needs labels c \[N, 3\]"):
            net(x)


def test_initial_weights_are_the_papers():
    """Blocks are the identity at first; the other weights keep the variance of their input."""
    torch.manual_seed(0)
    G, D = r3gan.Generator(width=256, cardinality=32), r3gan.Discriminator(width=256, cardinality=32)
    x = torch.randn(2, 256, 8, 8)
    block: Any = D.get_submodule("stages.0.0")
    assert torch.equal(block(x), x)
    gain = r3gan.GAIN * 8**-0.25
    assert block.conv1.weight.std().item() == pytest.approx(gain / 256**0.5, rel=0.02)
    assert block.conv2.weight.std().item() == pytest.approx(gain / (16 * 9) ** 0.5, rel=0.02)
    assert D.basis.std().item() == pytest.approx(0.25, rel=0.1)
    assert G.project.std().item() == pytest.approx(1 / 8, rel=0.1)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: r3gan.Generator(resolution=48), "power of two from 8 on: got 48"),
        (
            lambda: r3gan.Discriminator(width=64, cardinality=12),
            "cardinality 12 of width 64.*64 channels at 4",
        ),
        (lambda: r3gan.Discriminator(width=8, cardinality=4, channel_base=48), "3 channels at 16"),
        (lambda: r3gan.Generator(kernel=4), "kernel must be odd: got 4"),
        (lambda: grouped_conv2d(torch.ones(3), torch.ones(3), 1), r"x must be \[N, C, H, W\].*\[3\]"),
        (
            lambda: grouped_conv2d(torch.ones(1, 4, 2, 2), torch.ones(4, 2, 3, 3), 3),
            "groups must divide the 4",
        ),
        (
            lambda: grouped_conv2d(torch.ones(1, 4, 2, 2), torch.ones(4, 4, 3, 3), 2),
            r"w must be \[Cout, 2, k, k\]",
        ),
        (lambda: grouped_conv2d(torch.ones(1, 4, 2, 2), torch.ones(4, 2, 2, 2), 2), "odd: got 2x2"),
    ],
)
def test_what_cannot_be_built_says_why(build: Callable, message: str):
    with pytest.raises(ValueError, match=message):
        build()


def test_an_integer_weight_is_refused():
    with pytest.raises(TypeError, match="w must be a floating tensor"):
        grouped_conv2d(torch.ones(1, 4, 2, 2), torch.ones(4, 2, 3, 3).long(), 2)


SIZES = [  # N, Cin, Cout, groups, k, H, W
    (2, 6, 9, 3, 3, 5, 4),
    (1, 4, 4, 4, 3, 1, 1),
    (3, 4, 8, 2, 5, 3, 6),
    (2, 3, 2, 1, 1, 3, 3),
    (0, 4, 4, 2, 3, 3, 3),
    (2, 32, 32, 2, 3, 7, 7),
]


def arrays(size: tuple[int, ...], dtype: torch.dtype, layout: str = "nchw") -> tuple[Tensor, Tensor, int]:
    n, c_in, c_out, groups, k, h, w = size
    weight = image(c_out, c_in // groups, k, k, "nchw", dtype, seed=1)
    return image(n, c_in, h, w, layout, dtype), weight, groups


@pytest.mark.parametrize("layout", ["nchw", "nhwc", "strided"])
@pytest.mark.parametrize("size", SIZES)
def test_grouped_conv2d_is_the_librarys_convolution_to_second_order(size: tuple[int, ...], layout: str):
    for dtype in torch.float64, torch.float32:
        assert disagreement(grouped_conv2d, grouped_conv2d_ref, arrays(size, dtype, layout)) is None


@pytest.mark.parametrize("size", [(1, 2, 4, 2, 3, 2, 3), (2, 4, 2, 1, 1, 1, 2)])
def test_grouped_conv2d_to_third_order(size: tuple[int, ...]):
    x, w, groups = arrays(size, torch.float64)
    function = partial(grouped_conv2d, groups=groups)
    assert torch.autograd.gradcheck(function, (x, w))
    assert torch.autograd.gradgradcheck(function, (x, w))

    def penalty(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        y = function(x, w).square().square().sum()
        return torch.autograd.grad(y, (x, w), create_graph=True)

    assert torch.autograd.gradgradcheck(penalty, (x, w))


def test_grouped_conv2d_in_bfloat16():
    """Derivatives of both orders within a few roundings of the exact ones, in channels_last, as it trains."""
    args = arrays(SIZES[-1], torch.bfloat16, "nhwc")
    assert deviation(grouped_conv2d, args) < 0.02
    y = grouped_conv2d(*args)
    (dx,) = torch.autograd.grad(y.square().sum(), args[0])
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in (y, dx))


def test_grouped_conv2d_without_a_device():
    x, w, groups = arrays(SIZES[0], torch.float32)
    y = grouped_conv2d(x.to("meta"), w.to("meta"), groups)
    (dx,) = torch.autograd.grad(y.sum(), x.to("meta").requires_grad_(), allow_unused=True)
    assert y.shape == (2, 9, 5, 4) and dx is None
    with FakeTensorMode():
        x, w = torch.empty(2, 6, 5, 4, device="cuda:0"), torch.empty(9, 2, 3, 3, device="cuda:0")
        assert grouped_conv2d(x, w, 3).device.type == "cuda"


def test_grouped_conv2d_counts_its_flops():
    x, w, groups = arrays(SIZES[0], torch.float32)
    with FlopCounterMode(display=False) as ours:
        torch.autograd.grad(grouped_conv2d(x, w, groups).sum(), (x, w))
    assert ours.get_total_flops() == 3 * 2 * (2 * 9 * 5 * 4) * (2 * 3 * 3)
    counted = products(lambda: grouped_conv2d(x, w, groups))
    assert sum(counted.values()) == 1


def d_gradients(G: r3gan.Generator, D: r3gan.Discriminator, real: Tensor, z: Tensor, c: Tensor | None):
    """R3GAN's D phase: relativistic pairing loss, R1 and R2 with both halves of one batch."""
    with torch.no_grad():
        fake = G(z, c)
    x = leaf(torch.cat([real, fake]))
    logits = D(x, None if c is None else torch.cat([c, c]))
    real_logits, fake_logits = logits.chunk(2)
    total = relativistic(real_logits, fake_logits) + 0.25 * 2 * gradient_square(logits, x)
    return torch.autograd.grad(total, list(D.parameters()))


def d_gradients_through_the_inner_pass(
    G: r3gan.Generator, D: r3gan.Discriminator, real: Tensor, z: Tensor, c: Tensor | None
):
    """The same ones, by Euler's theorem."""
    with torch.no_grad():
        x = torch.cat([real, G(z, c)])
    cc = None if c is None else torch.cat([c, c])
    logits, dx = homogeneous_logits(lambda x, scale: D(x, cc, scale), x)
    total = relativistic(*logits.chunk(2)) + 0.5 * dx.square().flatten(1).sum(1).mean()
    return torch.autograd.grad(total, list(D.parameters()))


def g_gradients(G: r3gan.Generator, D: r3gan.Discriminator, real: Tensor, z: Tensor, c: Tensor | None):
    loss = relativistic(D(G(z, c), c), D(real, c).detach())
    return torch.autograd.grad(loss, list(G.parameters()))


@torch._dynamo.config.patch(trace_autograd_ops=True)
@pytest.mark.parametrize("c_dim", [0, 3])
@pytest.mark.parametrize("phase", [d_gradients, d_gradients_through_the_inner_pass, g_gradients])
def test_compiled_gradients_equal_eager_ones(phase: Callable, c_dim: int):
    torch._dynamo.reset()
    G, D = tiny(c_dim)
    real, z = torch.randn(2, 1, 16, 16, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    run = partial(phase, G, D, real, z, labels(2, c_dim))
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=False)()
    for a, b in zip(compiled, run(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        assert b.abs().max() > 1e-6


@pytest.mark.parametrize("c_dim", [0, 3])
def test_the_inner_pass_leads_to_the_same_gradients(c_dim: int):
    G, D = tiny(c_dim)
    args = G, D, torch.randn(2, 1, 16, 16, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    plain, short = (f(*args, labels(2, c_dim)) for f in (d_gradients, d_gradients_through_the_inner_pass))
    for a, b in zip(short, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_the_inner_pass_saves_a_third_of_the_products():
    G, D = tiny()
    args = G, D, torch.randn(2, 1, 16, 16, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64), None

    def matrix_products(run: Callable) -> int:
        counted = products(partial(run, *args))
        return sum(n for product, n in counted.items() if "mm" in str(product.op))

    forward = matrix_products(lambda G, D, real, z, c: D(real))
    generator = matrix_products(lambda G, D, real, z, c: G(z))
    assert matrix_products(d_gradients_through_the_inner_pass) - generator <= 4 * forward
    assert matrix_products(d_gradients) - generator >= 5.5 * forward


def test_logits_are_homogeneous_in_image_and_scale():
    _, D = tiny()
    x, scale = torch.randn(3, 1, 16, 16, dtype=torch.float64), torch.ones(3, 1, dtype=torch.float64)
    torch.testing.assert_close(D(x, scale=scale), D(x))
    torch.testing.assert_close(D(2 * x, scale=2 * scale), 2 * D(x))


@torch._dynamo.config.patch(trace_autograd_ops=True)
def test_grouped_conv2d_compiled_to_second_order():
    """By Inductor: R1 of a small convolution, whose gradient must reach the weight through the inner one."""
    torch._dynamo.reset()
    x, w, groups = arrays(SIZES[0], torch.float64, "nhwc")

    def penalty(conv: Callable, x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        y = conv(x, w, groups).square().sum()
        (dx,) = torch.autograd.grad(y, x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), (x, w))

    compiled = torch.compile(partial(penalty, grouped_conv2d), fullgraph=True, dynamic=False)(x, w)
    for a, b in zip(compiled, penalty(grouped_conv2d_ref, x, w), strict=True):
        torch.testing.assert_close(a, b)
