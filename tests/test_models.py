"""Networks against the public implementations' numbers: values, gradients, parameter counts."""

import pytest
import torch
from golden_cases import Case, golden
from torch import nn

from fastgan import equalized
from fastgan.kernels.pixel_norm import pixel_norm
from fastgan.models import dcgan, stylegan


def load(net: nn.Module, case: Case, prefix: str = "in.param.") -> dict[str, torch.Tensor]:
    """Fill `net` with the peer's tensors of the same names; its FIR buffers have no part."""
    state = {k: v for k, v in case.group(prefix).items() if not k.endswith("resample_filter")}
    net.to(case.dtype).load_state_dict(state, strict=True)
    return {f"param.{k}": p for k, p in net.named_parameters()}


def without_prefix(kwargs: dict) -> dict:
    """stylegan2-ada-pytorch's nested constructor arguments as ours."""
    flat = {k: v for k, v in kwargs.items() if not k.endswith("_kwargs")}
    flat |= kwargs.get("synthesis_kwargs", {})
    names = {"img_resolution": "resolution", "img_channels": "channels"}
    flat = {names.get(k, k): v for k, v in flat.items()}
    if "num_layers" in kwargs.get("mapping_kwargs", {}):
        flat["mapping_layers"] = kwargs["mapping_kwargs"]["num_layers"]
    epilogue = {"mbstd_group_size": "mbstd_group"}
    return flat | {epilogue.get(k, k): v for k, v in kwargs.get("epilogue_kwargs", {}).items()}


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def test_parameter_counts():
    assert parameters(stylegan.Generator(512, 0, 512, 64, 3, 8, 16384, 512)) == 23_819_544
    assert parameters(stylegan.Discriminator(0, 64, 3, 16384, 512)) == 23_407_361
    assert parameters(dcgan.Generator(100, 64, 3, 64)) == 3_576_704
    assert parameters(dcgan.Discriminator(64, 3, 64)) == 2_765_568


@golden("stylegan2_layers", "synthesis_layer")
def test_synthesis_layer(case: Case):
    layer = stylegan.SynthesisLayer(**case.args["ctor"])
    inputs = load(layer, case) | {k: case.tensor(f"in.{k}").requires_grad_() for k in ("x", "w")}
    y = layer(inputs["x"], inputs["w"], layer.noise_const, gain=case.args["gain"])
    case.check_derivatives(y, inputs)


@golden("stylegan2_layers", "torgb_layer")
def test_torgb(case: Case):
    layer = stylegan.ToRGB(**case.args["ctor"])
    inputs = load(layer, case) | {k: case.tensor(f"in.{k}").requires_grad_() for k in ("x", "w")}
    case.check_derivatives(layer(inputs["x"], inputs["w"]), inputs)


@golden("stylegan2_layers", "fully_connected_layer")
def test_fully_connected(case: Case):
    layer = equalized.FullyConnected(**case.args["ctor"])
    inputs = load(layer, case) | {"x": case.tensor("in.x").requires_grad_()}
    case.check_derivatives(layer(inputs["x"]), inputs)


@golden("stylegan2_layers", "conv2d_layer")
def test_conv2d(case: Case):
    layer = equalized.Conv2d(**case.args["ctor"])
    inputs = load(layer, case) | {"x": case.tensor("in.x").requires_grad_()}
    case.check_derivatives(layer(inputs["x"], gain=case.args["gain"]), inputs)


@golden("stylegan2_layers", "normalize_2nd_moment")
def test_normalize_2nd_moment(case: Case):
    x = case.tensor("in.x").requires_grad_()
    assert case.args == {"dim": 1}
    case.check_derivatives(pixel_norm(x), {"x": x})


@golden("stylegan2_nets", "sg2_generator")
def test_stylegan_generator(case: Case):
    G = stylegan.Generator(**without_prefix(case.args["ctor"]))
    inputs = load(G, case) | {"z": case.tensor("in.z").requires_grad_()}
    c = case.tensor("in.c")
    case.check_derivatives(G(inputs["z"], c), inputs)
    case.check("out.w", G.mapping(inputs["z"], c))
    case.check("out.image_no_noise", G(inputs["z"], c, noise="none"))
    case.check("out.image_psi", G(inputs["z"], c, case.args["psi"], case.args["cutoff"]))


@golden("stylegan2_nets", "sg2_synthesis")
def test_stylegan_synthesis(case: Case):
    S = stylegan.Synthesis(**case.args["ctor"])
    inputs = load(S, case) | {"ws": case.tensor("in.ws").requires_grad_()}
    case.check_derivatives(S(inputs["ws"]), inputs)


@golden("stylegan2_nets", "sg2_discriminator")
def test_stylegan_discriminator(case: Case):
    D = stylegan.Discriminator(**without_prefix(case.args["ctor"]))
    inputs = load(D, case) | {"img": case.tensor("in.img").requires_grad_()}
    case.check_derivatives(D(inputs["img"], case.tensor("in.c")), inputs)


@golden("dcgan_nets")
def test_dcgan(case: Case):
    args = case.args
    if case.spec["op"] == "dcgan_G":
        net, source = dcgan.Generator(args["nz"], args["ngf"], args["nc"]), "z"
    else:
        net, source = dcgan.Discriminator(args["ndf"], args["nc"]), "x"
    net.train(args["train"])
    inputs = load(net, case) | {source: case.tensor(f"in.{source}")}
    if not args["train"]:
        case.check("out.y", run_dcgan(net, inputs[source]))
        return
    inputs[source].requires_grad_()
    case.check_derivatives(run_dcgan(net, inputs[source]), inputs)
    for name in case.group("out.new."):
        case.check(f"out.new.{name}", net.state_dict()[name])


def run_dcgan(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The peer takes z [N, nz, 1, 1] and returns the probability [N]."""
    return net(x[:, :, 0, 0]) if isinstance(net, dcgan.Generator) else net(x).sigmoid().flatten()


@pytest.mark.parametrize("resolution", [8, 28, 32, 56, 128])
@pytest.mark.parametrize("kernel", [4, 5])
def test_dcgan_shapes(resolution: int, kernel: int):
    G = dcgan.Generator(6, 2, 3, resolution, kernel)
    D = dcgan.Discriminator(2, 3, resolution, kernel, slope=0.1, dropout=0.3)
    images = G(torch.randn(3, 6))
    assert images.shape == (3, 3, resolution, resolution) and images.abs().max() <= 1
    assert D(images).shape == (3, 1)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: dcgan.Generator(resolution=48), "4 or 7 times a power of two.*48"),
        (lambda: dcgan.Discriminator(kernel=3), "kernel must be 4 or 5: got 3"),
        (lambda: stylegan.Generator(8, 0, 8, 48, 3), "power of two.*48"),
        (lambda: stylegan.Discriminator(0, 16, 3, architecture="unet"), "orig, skip, resnet.*unet"),
    ],
)
def test_what_cannot_be_built_says_why(build, message: str):
    with pytest.raises(ValueError, match=message):
        build()


def test_style_mixing_takes_the_second_w_from_the_crossover_on():
    torch.manual_seed(0)
    G = stylegan.Generator(4, 0, 4, 16, 3, 2, 64, 8, style_mixing=0.5)
    normal = torch.randn(3, G.normals)
    uniform = torch.tensor([[0.49, 0.0], [0.49, 0.99], [0.51, 0.0]])
    _, ws = G.sample(normal, uniform)
    a, b = G.mapping(normal[:, :4]), G.mapping(normal[:, 4:8])
    assert torch.equal(ws[0], torch.cat([a[0, :1], b[0, 1:]]))  # crosses over at the first place it may
    assert torch.equal(ws[1], torch.cat([a[1, :5], b[1, 5:]]))  # at the last
    assert torch.equal(ws[2], a[2])  # not at all


def test_noise_depends_on_its_numbers_and_strength():
    G = stylegan.Generator(4, 0, 4, 16, 3, 2, 64, 8)
    ws, noise = torch.randn(2, 6, 4), torch.randn(2, G.synthesis.noise_size)
    assert torch.equal(G.synthesis(ws, noise), G.synthesis(ws, -noise))  # strengths start at zero
    for name, p in G.named_parameters():
        if name.endswith("noise_strength"):
            torch.nn.init.ones_(p)
    assert not torch.allclose(G.synthesis(ws, noise), G.synthesis(ws, -noise))
