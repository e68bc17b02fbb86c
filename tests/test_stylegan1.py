"""StyleGAN: AdaIN against pytorch_GAN_zoo's numbers, parameter counts, compiled gradients."""

import itertools

import pytest
import torch
from golden_cases import Case, golden
from torch import Tensor, nn

from fastgan import equalized
from fastgan.losses import gradient_square, leaf
from fastgan.models import stylegan, stylegan1


@golden("adain")
def test_adain(case: Case):
    """The zoo's linear layer multiplies weight and bias by sqrt(2 / fan in), ours the weight by its root."""
    inputs = {k: v.requires_grad_() for k, v in case.group("in.").items()}
    w_dim, peer = case.args["w_dim"], "param.styleModulator.module"
    state = {
        "affine.weight": inputs[f"{peer}.weight"] * 2**0.5,
        "affine.bias": inputs[f"{peer}.bias"] * (2 / w_dim) ** 0.5,
    }
    layer = stylegan1.AdaIN(w_dim, case.args["channels"]).double()
    y = torch.func.functional_call(layer, state, (inputs["x"], inputs["w"]))
    case.check_derivatives(y, inputs)


def test_parameter_counts():
    """NVlabs/stylegan prints 26,219,627 and 23,087,249 for FFHQ at 1024 pixels, with the 1x1 layers to and
    from the images of each lower resolution that growing leaves behind."""
    with torch.device("meta"):
        G, D = stylegan1.Generator(), stylegan1.Discriminator()
    widths = [min(16384 >> i, 512) for i in range(2, 10)]
    assert sum(p.numel() for p in G.parameters()) + sum(3 * w + 3 for w in widths) == 26_219_627
    assert sum(p.numel() for p in D.parameters()) + sum(3 * w + w for w in widths) == 23_087_249


def tiny(c_dim: int = 0, **kwargs) -> tuple[stylegan1.Generator, stylegan.Discriminator]:
    torch.manual_seed(1)
    G = stylegan1.Generator(5, c_dim, 4, 16, 3, 2, 64, 6, **kwargs)
    D = stylegan1.Discriminator(c_dim, 16, 3, 64, 6, 2, 2)
    for name, p in itertools.chain(G.named_parameters(), D.named_parameters()):
        if name.endswith(("noise_strength", "const")):
            nn.init.normal_(p)
    return G.double(), D.double()


def draws(G: stylegan1.Generator, count: int) -> tuple[Tensor, Tensor]:
    return torch.randn(count, G.normals).double(), torch.rand(count, G.uniforms).double()


def test_new_generators_start_as_the_paper_says():
    G = stylegan1.Generator(5, 0, 4, 16, 3, 2, 64, 6)
    assert torch.equal(G.synthesis.const, torch.ones(6, 4, 4))
    for layer in G.synthesis.layers:
        scale, shift = layer.style.affine.bias.chunk(2)
        assert scale.eq(1).all() and not shift.any()
        assert not layer.noise_strength.any() and not layer.bias.any()


def test_every_layer_is_normalised_and_takes_its_own_style_and_noise():
    G, _ = tiny()
    S = G.synthesis
    assert S.num_ws == len(S.layers) == 6 and S.noise_size == 2 * (16 + 64 + 256)
    ws = torch.randn(2, 6, 4).double()
    noise = torch.randn(2, S.noise_size).double()
    images = S(ws, noise)
    assert images.shape == (2, 3, 16, 16)
    first = 0
    for i, layer in enumerate(S.layers):
        changed = ws.clone()
        changed[:, i] += 1
        assert not torch.allclose(S(changed, noise), images)
        last = first + layer.noise_const.numel()
        changed = noise.clone()
        changed[:, first:last] *= -1
        assert not torch.allclose(S(ws, changed), images)
        first = last
    outputs = []
    S.layers[3].register_forward_hook(lambda layer, args, y: outputs.append((layer.style.affine(args[1]), y)))
    S(ws, noise)
    style, y = outputs[0]
    torch.testing.assert_close(y.mean([2, 3]), style[:, 6:])
    torch.testing.assert_close(y.var([2, 3], unbiased=False).sqrt(), style[:, :6].abs(), rtol=1e-4, atol=1e-6)


def test_resampling_keeps_flat_images_flat():
    """The FIR's gain, up and down, is one away from the borders."""
    up, down = equalized.Conv2d(2, 3, 3, up=2), equalized.Conv2d(2, 3, 3, down=2)
    flat = torch.ones(1, 2, 16, 16)
    for layer in (up, down):
        inner = layer(flat)[:, :, 3:-3, 3:-3]
        expected = (layer.weight * layer.weight_gain).sum([1, 2, 3])
        torch.testing.assert_close(inner, expected[:, None, None].expand_as(inner[0])[None])


def test_sample_mixes_styles_and_moves_the_mean_of_w():
    G, _ = tiny(style_mixing=0.5)
    normal, _ = draws(G, 2)
    images, ws = G.sample(normal, torch.tensor([[0.49, 0.5], [0.51, 0.5]]))
    a, b = G.mapping(normal[:, :5]), G.mapping(normal[:, 5:10])
    torch.testing.assert_close(ws, torch.stack([torch.cat([a[0, :3], b[0, 3:]]), a[1]]))
    torch.testing.assert_close(images, G.synthesis(ws, normal[:, 10:]))
    torch.testing.assert_close(G.mapping.w_avg, 0.005 * a[:, 0].mean(0))
    mean = G(normal[:, :5], truncation=0.0)
    torch.testing.assert_close(mean[0], mean[1])


def test_labels_matter_and_must_be_given():
    G, D = tiny(c_dim=3)
    c = torch.eye(3).double()[[0, 1, 2, 0]]
    normal, uniform = draws(G, 4)
    images, _ = G.sample(normal, uniform, c)
    assert not torch.allclose(images, G.sample(normal, uniform, c.roll(1, 0))[0])
    assert not torch.allclose(D(images, c), D(images, c.roll(1, 0)))
    with pytest.raises(ValueError, match="c must be given"):
        G(normal[:, :5])
    with pytest.raises(ValueError, match="c must be given"):
        D(images)


def test_bf16_convolutions_keep_images_in_fp32():
    G = stylegan1.Generator(5, 0, 4, 16, 3, 2, 64, 6, dtype=torch.bfloat16)
    D = stylegan1.Discriminator(0, 16, 3, 64, 6, dtype=torch.bfloat16)
    images = G(torch.randn(4, 5))
    assert images.dtype == D(images).dtype == torch.float32


def test_bf16_keeps_faint_noise_on_the_constant():
    """It is normalised, so what is left of it after rounding would be the whole picture."""
    torch.manual_seed(0)
    exact, rounded = (
        stylegan1.Synthesis(6, 8, 3, channel_base=64, channel_max=8, dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16)
    )
    for name, parameter in exact.named_parameters():
        if name.endswith("noise_strength"):
            nn.init.constant_(parameter, 0.002)
    rounded.load_state_dict(exact.state_dict())
    ws = torch.randn(16, exact.num_ws, 6)
    with torch.no_grad():
        images, off = exact(ws), rounded(ws) - exact(ws)
    assert off.square().mean() < (0.05 * images).square().mean()


def test_what_cannot_be_built_says_why():
    for build in (stylegan1.Generator, stylegan1.Discriminator):
        with pytest.raises(ValueError, match=r"power of two.*48"):
            build(resolution=48)


def r1_gradients(G: nn.Module, D: nn.Module, normal: Tensor, uniform: Tensor, real: Tensor) -> list[Tensor]:
    real = leaf(real)
    logits = D(real)
    loss = gradient_square(logits, real) + nn.functional.softplus(-logits).mean()
    return [g.detach() for g in torch.autograd.grad(loss, list(D.parameters()))]


def generator_gradients(
    G: stylegan1.Generator, D: nn.Module, normal: Tensor, uniform: Tensor, real: Tensor
) -> list[Tensor]:
    loss = nn.functional.softplus(-D(G.sample(normal, uniform)[0])).mean()
    return [g.detach() for g in torch.autograd.grad(loss, list(G.parameters()))]


@pytest.mark.parametrize("gradients", [r1_gradients, generator_gradients])
def test_compiled_gradients_equal_eager_ones(gradients):
    torch._dynamo.reset()
    G, D = tiny()
    args = (G, D, *draws(G, 4), torch.randn(4, 3, 16, 16).double())
    compiled = torch.compile(gradients, fullgraph=True, dynamic=False, backend="aot_eager")
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        for ours, exact in zip(compiled(*args), gradients(*args), strict=True):
            torch.testing.assert_close(ours, exact, rtol=1e-8, atol=1e-11)
