"""ProGAN against pytorch_GAN_zoo's numbers, its growth, and its compiled gradients."""

import copy
import io
import itertools

import pytest
import torch
from golden_cases import Case, golden
from torch import Tensor, nn

from fastgan import equalized
from fastgan.kernels.minibatch_stddev import minibatch_stddev
from fastgan.kernels.pixel_norm import pixel_norm
from fastgan.losses import gradient_penalty
from fastgan.models import progan
from fastgan.public import _zoo_layer, progan_discriminator, progan_generator


def leaves(case: Case) -> dict[str, Tensor]:
    return {k: v.requires_grad_() for k, v in case.group("in.").items()}


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def check_layer(layer: nn.Module, case: Case) -> None:
    inputs = leaves(case)
    state = {k.replace("param", "x", 1): v for k, v in inputs.items()}
    ours = {k.removeprefix("x."): v for k, v in _zoo_layer(state, "x", "x", hidden=False).items()}
    case.check_derivatives(torch.func.functional_call(layer.double(), ours, inputs["x"]), inputs)


@golden("progan_layers", "equalized_conv")
def test_equalized_conv(case: Case):
    check_layer(equalized.Conv2d(case.args["cin"], case.args["cout"], case.args["k"]), case)


@golden("progan_layers", "equalized_linear")
def test_equalized_linear(case: Case):
    check_layer(equalized.FullyConnected(case.args["cin"], case.args["cout"]), case)


@golden("progan_layers", "pixelnorm", "upscale2d")
def test_pixel_norm_and_upsampling(case: Case):
    inputs = leaves(case)
    op = pixel_norm if case.spec["op"] == "pixelnorm" else progan._double
    case.check_derivatives(op(inputs["x"]), inputs)


@golden("progan_layers", "progan_mbstd")
def test_minibatch_stddev(case: Case):
    """The peer's variance is unbiased, ours of values larger by sqrt(G / (G - 1)) the same; one group."""
    inputs = leaves(case)
    x, group = inputs["x"], case.args["group"]
    assert len(x) == group
    deviation = minibatch_stddev(x * (group / (group - 1)) ** 0.5, group)[:, -1:]
    case.check_derivatives(torch.cat([x, deviation], dim=1), inputs)


@golden("progan_nets")
def test_networks(case: Case):
    a = case.args
    assert a["depths"] == [6, 4] and a["d0"] == 6  # channels at 8 and 16, and at 4 pixels
    inputs = leaves(case)
    peer = {k.removeprefix("param."): v for k, v in inputs.items() if k.startswith("param.")}
    if case.spec["op"] == "progan_G":
        net: nn.Module = progan.Generator(a["z"], 0, 16, 3, 64, 6)
        state, x = progan_generator(peer, a["alpha"]), inputs["z"]
    else:
        net = progan.Discriminator(0, 16, 3, 64, 6)
        state, x = progan_discriminator(peer, a["alpha"]), inputs["x"]
    net.double().load_state_dict(state)
    case.check("out.y", net(x))
    case.check_derivatives(torch.func.functional_call(net, state, x), inputs)


def test_parameter_counts():
    """pytorch_GAN_zoo's and the paper's 23.1M (table 2) at 1024 pixels. The official code prints 23,079,115
    for G, as it shares the first layer's bias among the 16 pixels, and the same for D."""
    with torch.device("meta"):
        G, D = progan.Generator(), progan.Discriminator()
    assert parameters(G) == 23_086_795 == 23_079_115 + 15 * 512
    assert parameters(D) == 23_087_249


def test_schedule():
    def at(kimg: float, fade: float = 2, stable: float = 3, stages: int = 2) -> float:
        return progan.schedule(int(kimg * 1000), fade, stable, stages)

    assert [at(k) for k in (0, 2.999, 3, 4, 5, 6, 7.999, 8, 9, 10, 13, 1000)] == pytest.approx(
        [0, 0, 0, 0.5, 1, 1, 1, 1, 1.5, 2, 2, 2]
    )
    assert [at(k, fade=0) for k in (2.999, 3, 5.999, 6)] == [0, 1, 1, 2]
    assert [at(k, stable=0) for k in (0, 1, 2, 3, 4)] == [0, 0.5, 1, 1.5, 2]
    assert at(0, 0, 0) == 2


def tiny(c_dim: int = 0, dtype: torch.dtype = torch.float64) -> tuple[progan.Generator, progan.Discriminator]:
    torch.manual_seed(1)
    G = progan.Generator(5, c_dim, 16, 3, 64, 6)
    D = progan.Discriminator(c_dim, 16, 3, 64, 6)
    for p in itertools.chain(G.parameters(), D.parameters()):
        nn.init.normal_(p)
    return G.to(dtype), D.to(dtype)


def test_a_new_resolution_fades_in_from_the_old_one():
    G, D = tiny()
    z = torch.randn(4, 5, dtype=torch.float64)
    for stage in (1, 2):
        nets = copy.deepcopy((G, D))
        images, logits = {}, {}
        for growth in (stage - 1, stage - 1 + 1e-6, stage - 0.5, stage):
            for net in nets:
                net.grow(growth)
            images[growth] = nets[0](z)
            if growth > stage - 1:
                logits[growth] = nets[1](images[stage - 1].repeat_interleave(2, 2).repeat_interleave(2, 3))
            else:
                logits[growth] = nets[1](images[growth])
        old, starting, half, new = images.values()
        assert new.shape == (4, 3, 4 << stage, 4 << stage)
        doubled = old.repeat_interleave(2, 2).repeat_interleave(2, 3)
        torch.testing.assert_close(starting, doubled, atol=1e-4, rtol=0)
        torch.testing.assert_close(half, (doubled + new) / 2)
        old, starting, half, new = logits.values()
        torch.testing.assert_close(starting, old, atol=1e-4, rtol=0)
        assert not torch.allclose(half, new) and not torch.allclose(half, old)


def test_real_images_match_the_growth():
    real = torch.randn(2, 3, 16, 16)
    small = real.reshape(2, 3, 4, 4, 4, 4).mean([3, 5])
    torch.testing.assert_close(progan.match_reals(real, 0, 0.0), small)
    medium = real.reshape(2, 3, 8, 2, 8, 2).mean([3, 5])
    torch.testing.assert_close(progan.match_reals(real, 1, torch.tensor(1.0)), medium)
    doubled = small.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(
        progan.match_reals(real, 1, torch.tensor(0.25)), 0.75 * doubled + 0.25 * medium
    )
    assert torch.equal(progan.match_reals(real, 2, torch.tensor(2.0)), real)


@pytest.mark.parametrize("growth", [0, 0.3, 1, 1 + 1e-9, 1.7, 2])
def test_a_checkpoint_restores_the_growth(growth: float):
    for net, other in zip(tiny(dtype=torch.float32), tiny(dtype=torch.float32), strict=True):
        net.grow(growth)
        buffer = io.BytesIO()
        torch.save(net.state_dict(), buffer)
        buffer.seek(0)
        where = other.growth.data_ptr()
        other.load_state_dict(torch.load(buffer, weights_only=True))
        assert (other.stage, other.growth) == (net.stage, net.growth)
        assert other.growth.data_ptr() == where


def test_labels_matter_and_must_be_given():
    G, D = tiny(c_dim=3)
    c = torch.eye(3, dtype=torch.float64)[[0, 1, 2, 0]]
    images, latents = G.sample(
        z := torch.randn(4, G.normals, dtype=torch.float64), torch.empty(4, G.uniforms), c
    )
    assert torch.equal(latents, z)
    assert not torch.allclose(images, G(z, c.roll(1, 0)))
    logits = D(images, c)
    assert logits.shape == (4, 1) and not torch.allclose(logits, D(images, c.roll(1, 0)))
    for net, x in ((G, z), (D, images)):
        with pytest.raises(ValueError, match=r"labels \[N, 3\]"):
            net(x)


def test_what_is_wrong_says_why():
    for build in (progan.Generator, progan.Discriminator):
        with pytest.raises(ValueError, match=r"power of two.*48"):
            build(resolution=48)
    G, D = tiny()
    with pytest.raises(ValueError, match=r"between 0 and 2: got 2\.5"):
        G.grow(2.5)
    D.grow(1)
    with pytest.raises(ValueError, match="8 pixels wide at growth stage 1"):
        D(torch.zeros(4, 3, 16, 16, dtype=torch.float64))


def test_bf16_convolutions_keep_images_and_logits_in_fp32():
    G = progan.Generator(5, 0, 16, 3, 64, 6, dtype=torch.bfloat16)
    D = progan.Discriminator(0, 16, 3, 64, 6, dtype=torch.bfloat16)
    for growth in (0, 0.5, 2):
        G.grow(growth)
        D.grow(growth)
        images = G(torch.randn(4, 5))
        assert images.dtype == D(images).dtype == torch.float32


def critic_gradients(G: progan.Generator, D: progan.Discriminator, z: Tensor, real: Tensor) -> list[Tensor]:
    fake = G(z).detach()
    real = progan.match_reals(real, D.stage, D.growth)
    penalty = gradient_penalty(D, real, fake, torch.full_like(real[:, :1, :1, :1], 0.4))
    real_logits = D(real)
    loss = (D(fake) - real_logits).mean() + 10 * penalty + 1e-3 * real_logits.square().mean()
    return [g.detach() for g in torch.autograd.grad(loss, list(D.parameters()), materialize_grads=True)]


def generator_gradients(
    G: progan.Generator, D: progan.Discriminator, z: Tensor, real: Tensor
) -> list[Tensor]:
    loss = -D(G.sample(z, z[:, :0])[0]).mean()
    return [g.detach() for g in torch.autograd.grad(loss, list(G.parameters()), materialize_grads=True)]


@pytest.mark.parametrize("gradients", [critic_gradients, generator_gradients])
def test_compiled_gradients_equal_eager_ones(gradients):
    """One graph a stage: fading on does not make new ones."""
    torch._dynamo.reset()
    G, D = tiny()
    z = torch.randn(4, 5, dtype=torch.float64)
    real = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    compiled = torch.compile(gradients, fullgraph=True, dynamic=False, backend="aot_eager")
    for growth, known in ((0.3, False), (0.9, True), (1, True), (0, False)):
        G.grow(growth)
        D.grow(growth)
        with torch._dynamo.config.patch(trace_autograd_ops=True, error_on_recompile=known):
            for ours, exact in zip(compiled(G, D, z, real), gradients(G, D, z, real), strict=True):
                torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-12)
