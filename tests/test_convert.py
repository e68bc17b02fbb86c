"""Networks of public implementations through python -m fastgan.convert: whole files, every golden case, and
networks of other sizes."""

import argparse
import collections
import json
import pickle
import re
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import stylegan_pickles as pickles
import torch
from golden_cases import GOLDEN, Case, _index
from safetensors.torch import save_file
from torch import Tensor, nn

import fastgan
from fastgan import convert
from fastgan.config import UsageError
from fastgan.equalized import BLUR
from fastgan.kernels.upfirdn2d import setup_filter
from fastgan.models import biggan, progan, r3gan, stylegan
from fastgan.pretrained import build, read_own
from fastgan.spectral import SelfAttention

PARTS = ("weight", "bias")
CHECKPOINTS = json.loads((GOLDEN / "index.json").read_text())["checkpoints"]
WHOLE = ("dcgan", "stylegan2", "biggan", "cyclegan", "progan", "r3gan", "rosinality")
NETWORKS = [
    Case(f"{family}_nets", spec)
    for family in WHOLE
    for spec in _index()[f"{family}_nets"]["cases"]
    if re.search(r"(_G|_D|generator|discriminator)$", spec["op"]) and "loss" not in spec["op"]
]
IDS = [f"{case.family}-{case.spec['name']}" for case in NETWORKS]


def named(name: str) -> Case:
    """The case "family/name"."""
    (case,) = [c for c in NETWORKS if f"{c.family}/{c.spec['name']}" == name]
    return case


def converted(src: Path, *options: str) -> Path:
    out = src.with_suffix(".safetensors")
    assert convert.main([str(src), str(out), *options]) == 0
    return out


def refused(src: Path, capsys: pytest.CaptureFixture, *options: str, out: Path | None = None) -> str:
    """What the command says of a file that it does not take; nothing is written."""
    out = out or src.with_name("refused.safetensors")
    assert convert.main([str(src), str(out), *options]) == 2 and not out.exists()
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and str(src) in message, message
    return message


def is_generator(case: Case) -> bool:
    return case.spec["op"].endswith(("_G", "generator"))


def peer_state(case: Case) -> dict[str, Tensor]:
    return {k: v.float() if v.is_floating_point() else v for k, v in case.group("in.param.").items()}


@torch.no_grad()
def output(net: Any, case: Case) -> Tensor:
    """What `net` makes of the case's inputs, as the peer returns it."""
    given = {
        k: case.tensor(f"in.{k}")
        for k in ("z", "x", "img", "c", "labels")
        if f"in.{k}" in case.spec["tensors"]
    }
    c = given.get("labels", given.get("c"))
    x = next(given[k].float() for k in ("z", "x", "img") if k in given)
    if is_generator(case) and case.family == "dcgan_nets":
        x = x[:, :, 0, 0]
    y = net(x, c) if c is not None and c.shape[-1] else net(x)
    y = y.reshape(case.tensor("out.y").shape).double()
    return y.sigmoid() if case.spec["op"] == "dcgan_D" else y


def check(path: Path, case: Case) -> None:
    net = fastgan.load(path, "generator" if is_generator(case) else "discriminator", "cpu")
    net.train(case.args.get("train", False))
    case.check("out.y", output(net, case), tol=max(case.spec["tol"] or 0, 2e-5))


@pytest.mark.parametrize("case", NETWORKS, ids=IDS)
def test_golden_networks(case: Case, tmp_path: Path):
    """Saved with torch.save, converted, loaded: the golden output, of training where the case is."""
    torch.save(peer_state(case), tmp_path / "peer.pth")
    options = ["--alpha", str(case.args["alpha"])] if "alpha" in case.args else []
    group = case.args.get("ctor", {}).get("epilogue_kwargs", {}).get("mbstd_group_size", 4)
    options += [] if group == 4 else ["--set", f"mbstd_group={group}"]
    check(converted(tmp_path / "peer.pth", *options), case)


@pytest.mark.parametrize("entry", CHECKPOINTS, ids=lambda entry: Path(entry["file"]).stem)
def test_golden_checkpoints(entry: dict, tmp_path: Path):
    src = tmp_path / Path(entry["file"]).name
    src.write_bytes((GOLDEN / entry["file"]).read_bytes())
    alpha = ["--alpha", str(entry["ctor"]["alpha"])] if "alpha" in entry["ctor"] else []
    path = converted(src, *alpha)
    family = entry["matches_case"].split("/")[0]
    names = re.findall(r"[GD]\w+", entry["matches_case"].split("/")[1].split(" (")[0])
    for name in names:
        check(path, named(f"{family}/{name}"))
    assert len(names) == (2 if "rosinality" in entry["file"] else 1)


def test_rosinality_truncates_towards_its_latent_avg(tmp_path: Path):
    case = named("rosinality_nets/G0")
    src = GOLDEN / "checkpoints" / "rosinality_public0.pt"
    G = build(convert.read(src), device="cpu")
    case.check("out.image_psi07", G(case.tensor("in.z").float(), truncation=0.7), tol=2e-5)
    # A state dict alone has no mean: it is estimated.
    torch.save({"g_ema": peer_state(case)}, tmp_path / "g.pt")
    first, second = (convert.read(tmp_path / "g.pt").generator for _ in range(2))
    assert first is not None and second is not None
    w = G.mapping(torch.randn(4000, 8, generator=torch.Generator().manual_seed(1)))[:, 0]
    assert (first["mapping.w_avg"] - w.mean(0)).abs().max() < 5 * (w.std(0) / 60).max()
    assert torch.equal(first["mapping.w_avg"], second["mapping.w_avg"])


# StyleGAN2's .pkl

CLAMPED = ("SynthesisLayer", "ToRGBLayer", "Conv2dLayer")  # classes with conv_clamp


def pickled(names: tuple[str, str], path: Path, monkeypatch: pytest.MonkeyPatch, protocol: int = 4) -> None:
    """A snapshot of the two cases' networks, with a G that has other weights than G_ema."""
    made = {}
    for key, name in zip(("G_ema", "D"), names, strict=True):
        ctor = named(f"stylegan2_nets/{name}").args["ctor"]
        clamp = {"conv_clamp": ctor.get("synthesis_kwargs", ctor).get("conv_clamp")}
        clamp |= {"activation": "lrelu"}
        attributes: dict[str, Any] = {name: clamp for name in CLAMPED}
        attributes["MappingNetwork"] = {k: ctor[k] for k in ("z_dim", "c_dim", "w_dim") if k in ctor}
        group = ctor.get("epilogue_kwargs", {}).get("mbstd_group_size", 4)
        attributes["MinibatchStdLayer"] = {"group_size": group, "num_channels": 1}
        state = peer_state(named(f"stylegan2_nets/{name}"))
        made[key] = pickles.module(state, ctor, attributes)
        if key == "D":
            made[key]._modules["b4"].add_module("mbstd", pickles.module({}, {}, {}))
            made[key]._modules["b4"]._modules["mbstd"].__dict__ |= attributes["MinibatchStdLayer"]
        else:
            made["G"] = pickles.module({k: v + 1 for k, v in state.items()}, ctor, attributes)
    made |= {
        "training_set_kwargs": pickles.EasyDict(
            class_name="training.dataset.ImageFolderDataset", path="a.zip"
        )
    }
    made["augment_pipe"] = pickles.augment_pipe()
    pickles.save(path, made, monkeypatch, protocol)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("cfg", ["cfg0_res32_c0_skip_resnet", "cfg1_res16_c5_resnet_skip"])
def test_stylegan2_pickles(cfg: str, protocol: int, tmp_path: Path, monkeypatch, capsys):
    """Names and attributes of a persistent pickle make the golden networks; nothing of it is run."""
    pickled((f"G_{cfg}", f"D_{cfg}"), tmp_path / "network.pkl", monkeypatch, protocol)
    path = converted(tmp_path / "network.pkl")
    assert "G_ema: " in (told := capsys.readouterr().out) and "left out      generator G" in told
    for name in (f"G_{cfg}", f"D_{cfg}"):
        check(path, named(f"stylegan2_nets/{name}"))
    case, own = named(f"stylegan2_nets/G_{cfg}"), read_own(path)
    clamp = case.args["ctor"]["synthesis_kwargs"]["conv_clamp"]
    assert own.generator_options.get("conv_clamp") == own.discriminator_options.get("conv_clamp") == clamp
    G = fastgan.load(path, device="cpu")
    c = case.tensor("in.c")
    c = c if c.shape[1] else None
    case.check("out.w", G.mapping(case.tensor("in.z"), c), tol=2e-5)
    case.check("out.image_no_noise", G(case.tensor("in.z"), c, noise="none"), tol=2e-4)
    if case.args["cutoff"] is None:
        case.check("out.image_psi", G(case.tensor("in.z"), c, truncation=case.args["psi"]), tol=2e-4)


@torch.no_grad()
def test_stylegan2_pickles_with_other_arguments(tmp_path: Path, monkeypatch):
    """Other filters, mapping networks and learning rate multipliers, no noise, no mean, orig, no mbstd."""
    torch.manual_seed(0)
    taps = [1.0, 2.0, 1.0]
    G = stylegan.Generator(
        5, 3, 6, 8, 1, 2, 64, 6, "orig", 0.5, taps=taps, embed_features=4, layer_features=7
    )
    D = stylegan.Discriminator(3, 8, 1, 64, 6, "orig", 1, 2, 0, 0.5, taps=taps, cmap_dim=5, embed_features=4)
    for name, p in (*G.named_parameters(), *D.named_parameters()):
        p += 0.1 * torch.randn_like(p) * (not name.endswith("noise_strength"))
    made = {}
    for key, net in (("G_ema", G), ("D", D)):
        state = dict(net.state_dict()) | {
            f"{name}.resample_filter": b
            for name, b in net.named_buffers()
            if name.endswith("resample_filter")
        }
        state = {
            k.replace(".resample_filter.resample_filter", ".resample_filter"): v for k, v in state.items()
        }
        dropped = ("noise_const", "noise_strength", "w_avg")
        state = {k: v for k, v in state.items() if not k.endswith(dropped)}
        state |= {k: v * 0.1 for k, v in state.items() if ".fc" in f".{k}" and k.startswith("mapping.")}
        attributes: dict[str, Any] = {name: {"conv_clamp": 0.5} for name in CLAMPED}
        made[key] = pickles.module(state, {}, attributes | {"MappingNetwork": {"lr_multiplier": 0.1}})
    pickles.save(tmp_path / "network.pkl", made, monkeypatch)
    read = convert.read(tmp_path / "network.pkl")
    z, c, images = torch.randn(4, 5), torch.eye(3)[[0, 1, 2, 0]], torch.randn(4, 1, 8, 8)
    again = build(read, device="cpu")
    torch.testing.assert_close(again(z, c), G(z, c, noise="none"), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        build(read, "discriminator", "cpu")(images, c), D(images, c), rtol=1e-4, atol=1e-6
    )
    assert read.generator is not None and read.generator["mapping.w_avg"].abs().max() > 0
    assert read.generator_options["taps"] == pytest.approx([0.25, 0.5, 0.25])


def test_what_fastgan_has_not_is_refused_by_name(tmp_path: Path, capsys, monkeypatch):
    network = pickles.module({"synthesis.input.affine.weight": torch.ones(4, 8)}, {}, {})
    pickles.save(tmp_path / "sg3.pkl", {"G_ema": network}, monkeypatch)
    assert "a StyleGAN3, whose alias-free layers" in refused(tmp_path / "sg3.pkl", capsys)
    pickled(("G_cfg0_res32_c0_skip_resnet", "D_cfg0_res32_c0_skip_resnet"), tmp_path / "a.pkl", monkeypatch)
    data = (tmp_path / "a.pkl").read_bytes()
    (tmp_path / "a.pkl").write_bytes(data.replace(b"lrelu", b"swish"))
    assert "the activation swish" in refused(tmp_path / "a.pkl", capsys)
    torch.save({"model.model.0.weight": torch.ones(2, 3, 4, 4)}, tmp_path / "unet.pth")
    assert "a U-Net of pytorch-CycleGAN" in refused(tmp_path / "unet.pth", capsys)
    torch.save({"a": torch.ones(3), "b": 3}, tmp_path / "other.pth")
    assert "holds no network that is known; kinds are stylegan2, " in refused(tmp_path / "other.pth", capsys)
    torch.save(peer_state(named("dcgan_nets/G0_eval")), tmp_path / "g.pth")
    assert "no network that is known" in refused(tmp_path / "g.pth", capsys, "--kind", "progan")
    with pytest.raises(UsageError, match=r"kind must be one of stylegan2, .*: got gan"):
        convert.read(tmp_path / "g.pth", "gan")
    state = peer_state(named("biggan_nets/G_0_res32_attn0_hier0_eval"))
    del state["linear.u0"]
    torch.save(state, tmp_path / "biggan.pth")
    said = refused(tmp_path / "biggan.pth", capsys)
    assert "names of a biggan generator" in said and "linear.parametrizations.weight" in said
    state["output_layer.0.gain"] = torch.ones([])
    torch.save(state, tmp_path / "biggan.pth")
    assert "--ngf must be at least 1: got 0" in refused(tmp_path / "biggan.pth", capsys)


def refuses(state: dict[str, Any], text: str, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "refused.pth")
    with pytest.raises(UsageError, match=text):
        convert.read(tmp_path / "refused.pth")


def test_a_refusal_says_what_fastgan_has_not(tmp_path: Path):
    """Arguments of the peers' constructors for which ours have none."""
    G = peer_state(named("biggan_nets/G_0_res32_attn0_hier0_eval"))
    D = peer_state(named("biggan_nets/D_0_res32_attn0_hier0_eval"))
    refuses({k: v for k, v in G.items() if not k.endswith(".u0")}, "not spectrally normalized", tmp_path)
    refuses({k: v for k, v in G.items() if ".stored_" not in k}, "are no batch norms", tmp_path)
    wide = G | {f"linear.{part}": G[f"linear.{part}"].repeat_interleave(4, 0) for part in ("weight", "bias")}
    refuses(wide, "first map is not one of 4x4 pixels", tmp_path)
    refuses(D | {"blocks.0.0.conv1.weight": torch.ones(3, 3, 3, 3)}, r"narrow .*D_wide", tmp_path)
    deep = biggan.Generator(5, 4, 32, ngf=4, shared_dim=3, deep=True, attention=0)
    state = biggan_names(deep)
    odd = {k: v for k, v in state.items() if not k.startswith("blocks.5.")}
    refuses(odd, r"not two blocks a stage \(--G_depth\)", tmp_path)
    state = biggan_names(biggan.Discriminator(c_dim=4, resolution=32, ndf=4, deep=True, attention=0))
    odd = {k: v for k, v in state.items() if not re.match(r"blocks\.\d\.1\.", k)}
    refuses(odd, r"not two blocks a stage \(--D_depth\)", tmp_path)
    resnet = {k: v for k, v in peer_state(named("cyclegan_nets/G0_resnet_instance")).items()}
    refuses(resnet | {"model.7.filt": torch.ones(8, 1, 3, 3)}, "antialiased", tmp_path)
    last = max(int(k.split(".")[1]) for k in resnet)
    bare = {k: v for k, v in resnet.items() if not k.endswith("bias") or k == f"model.{last}.bias"}
    refuses(bare, "no norms", tmp_path)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"equalizedlR": False}, "equalizedlR is False"),
        ({"leakyReluLeak": 0.1}, "leakyReluLeak is 0.1"),
        ({"perChannelNormalization": False}, "perChannelNormalization is False"),
        ({"lossCriterion": "DCGAN"}, "lossCriterion is DCGAN, and WGANGP alone is known"),
        ({"equalizedlR": [[]]}, "equalizedlR is a list"),
    ],
)
def test_a_config_of_the_zoo_with_other_layers(config: dict[str, Any], text: str, tmp_path: Path):
    refuses({"config": config, "netG": peer_state(named("progan_nets/G0"))}, text, tmp_path)
    D = peer_state(named("progan_nets/D0"))
    classes = {
        f"decisionLayer.module.{p}": D[f"decisionLayer.module.{p}"].repeat_interleave(3, 0) for p in PARTS
    }
    refuses({"netD": D | classes}, r"3 outputs, some of them classes \(AC-GAN\)", tmp_path)
    G = peer_state(named("dcgan_nets/G0_eval"))
    refuses({"config": {"lossCriterion": "WGANGP"}, "netG": G}, "lossCriterion is WGANGP", tmp_path)
    torch.save({"config": {"lossCriterion": "MSE"}, "netG": G}, tmp_path / "g.pth")
    assert convert.read(tmp_path / "g.pth").config.arch == "dcgan"


# DCGAN of other builds


def dcgan_generator(kernels: list[int], widths: list[int], sides: list[int], bias: bool) -> nn.Sequential:
    """z [N, 6, 1, 1] through transposed convolutions to maps of `sides`; BatchNorm and ReLU between."""
    layers: list[nn.Module] = [nn.ConvTranspose2d(6, widths[0], kernels[0], bias=bias)]
    for i in range(1, len(kernels)):
        k, a, b = kernels[i], sides[i - 1], sides[i]
        padding = (k - 1) // 2 if b == 2 * a else k // 2
        extra = b - (2 * a - 2 - 2 * padding + k)
        layers += [nn.BatchNorm2d(widths[i - 1]), nn.ReLU()]
        layers.append(nn.ConvTranspose2d(widths[i - 1], widths[i], k, 2, padding, extra, bias=bias))
    return nn.Sequential(*layers, nn.Tanh())


def dcgan_discriminator(kernels: list[int], widths: list[int], sides: list[int], bias: bool) -> nn.Sequential:
    """From the last of `sides` to the first and to one logit, a dropout behind the first layer."""
    layers: list[nn.Module] = []
    for i in range(len(kernels) - 1, 0, -1):
        k = kernels[i]
        padding = (k - 1) // 2 if sides[i] % 2 == 0 else k // 2
        layers.append(nn.Conv2d(widths[i], widths[i - 1], k, 2, padding, bias=bias))
        layers += [nn.BatchNorm2d(widths[i - 1])] * (i < len(kernels) - 1) + [nn.LeakyReLU(0.2)]
        layers += [nn.Dropout(0.3)] * (i == len(kernels) - 1)
    return nn.Sequential(*layers, nn.Conv2d(widths[0], 1, kernels[0], bias=bias))


BUILDS: dict[str, tuple[list[int], list[int], list[int], bool]] = {
    "32 pixels": ([4, 4, 4, 4], [8, 4, 2, 3], [4, 8, 16, 32], False),
    "kernel 5, biases": ([4, 5, 5], [4, 2, 1], [4, 8, 16], True),
    "kernel 3, other widths": ([4, 3, 3], [5, 3, 1], [4, 8, 16], False),
    "28 pixels from 7": ([7, 4, 4], [4, 2, 1], [7, 14, 28], True),
    "28 pixels from 4": ([4, 3, 4, 4], [6, 5, 2, 1], [4, 7, 14, 28], False),
    "from 2, kernel 6": ([2, 6, 6], [4, 2, 3], [2, 4, 8], False),
    "128 pixels, rising": ([4, 4, 4, 4, 4, 4], [2, 3, 4, 3, 2, 1], [4, 8, 16, 32, 64, 128], False),
}


def randomized(net: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for tensor in net.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(
                    torch.rand_like(tensor) + 0.5 if tensor.ndim == 1 else 0.3 * torch.randn_like(tensor)
                )
    return net.eval()


@pytest.mark.parametrize("build_name", BUILDS)
@torch.no_grad()
def test_dcgan_of_other_builds(build_name: str, tmp_path: Path):
    kernels, widths, sides, bias = BUILDS[build_name]
    G = randomized(dcgan_generator(kernels, widths, sides, bias))
    D = randomized(dcgan_discriminator(kernels, widths, sides, bias))
    state = {f"generator.module.main.{k}": v for k, v in G.state_dict().items()}
    state |= {f"discriminator.net.{k}": v for k, v in D.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state, "hyper": argparse.Namespace(lr=1)}, tmp_path / "all.tar")
    path = converted(tmp_path / "all.tar")
    z = torch.randn(3, 6)
    images = G(z[:, :, None, None])
    assert images.shape[-1] == sides[-1]
    torch.testing.assert_close(fastgan.load(path, device="cpu")(z), images, rtol=1e-5, atol=1e-6)
    logits = fastgan.load(path, "discriminator", "cpu")(images)
    torch.testing.assert_close(logits, D(images).flatten(1), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_resolution_that_kernels_do_not_tell(tmp_path: Path, capsys):
    """The variant of 28 pixels on maps of 2, 4, 7, 14: its kernels would make 32 as well."""
    sides, kernels = [2, 4, 7, 14, 28], [2, 4, 4, 4, 4]
    G = randomized(dcgan_generator(kernels, [8, 8, 4, 2, 3], sides, False))
    torch.save(G.state_dict(), tmp_path / "g.pth")
    assert convert.read(tmp_path / "g.pth").config.resolution == 32
    read = convert.read(tmp_path / "g.pth", resolution=28)
    z = torch.randn(2, 6)
    torch.testing.assert_close(build(read, device="cpu")(z), G(z[:, :, None, None]), rtol=1e-5, atol=1e-6)
    assert "4 doublings do not lead from there to 64" in refused(
        tmp_path / "g.pth", capsys, "--resolution", "64"
    )


# CycleGAN of other builds


def cyclegan_generator(norm: Callable[[int], nn.Module], pad: bool, dropout: bool) -> nn.Module:
    """pytorch-CycleGAN's ResNet with one block: 2 channels in, 3 out, ngf 4."""
    bias = isinstance(norm(1), nn.InstanceNorm2d)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            edge = [nn.ReflectionPad2d(1)] if pad else []
            first = [*edge, nn.Conv2d(16, 16, 3, padding=0 if pad else 1, bias=bias), norm(16), nn.ReLU()]
            first += [nn.Dropout(0.5)] * dropout
            second = [*edge, nn.Conv2d(16, 16, 3, padding=0 if pad else 1, bias=bias), norm(16)]
            self.conv_block = nn.Sequential(*first, *second)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.conv_block(x)

    layers = [nn.ReflectionPad2d(3), nn.Conv2d(2, 4, 7, bias=bias), norm(4), nn.ReLU()]
    for i, o in ((4, 8), (8, 16)):
        layers += [nn.Conv2d(i, o, 3, 2, 1, bias=bias), norm(o), nn.ReLU()]
    layers.append(Block())
    for i, o in ((16, 8), (8, 4)):
        layers += [nn.ConvTranspose2d(i, o, 3, 2, 1, 1, bias=bias), norm(o), nn.ReLU()]
    return nn.Sequential(*layers, nn.ReflectionPad2d(3), nn.Conv2d(4, 3, 7), nn.Tanh())


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.InstanceNorm2d])
@pytest.mark.parametrize(("pad", "dropout"), [(True, False), (True, True), (False, False), (False, True)])
@torch.no_grad()
def test_cyclegan_generators_of_other_builds(norm: type[nn.Module], pad: bool, dropout: bool, tmp_path: Path):
    G = randomized(cyclegan_generator(norm, pad, dropout))
    torch.save({f"module.model.{k}": v for k, v in G.state_dict().items()}, tmp_path / "latest_net_G_B.pth")
    x = torch.randn(2, 2, 12, 16)
    again = fastgan.load(converted(tmp_path / "latest_net_G_B.pth"), device="cpu")
    torch.testing.assert_close(again(x), G(x), rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match="knows one way alone"):
        again(x, to="a")


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.InstanceNorm2d])
@pytest.mark.parametrize("layers", [0, 1, 4])
@torch.no_grad()
def test_cyclegan_discriminators_of_other_builds(norm: type[nn.Module], layers: int, tmp_path: Path):
    """PatchGANs of other depths, and the PixelGAN."""
    bias, (k, s, p) = norm is nn.InstanceNorm2d, (4, 2, 1) if layers else (1, 1, 0)
    widths = [2 * min(2**i, 8) for i in range(max(layers, 1) + 1)]
    modules: list[nn.Module] = [nn.Conv2d(3, 2, k, s, p), nn.LeakyReLU(0.2)]
    for i in range(1, len(widths)):
        stride = s if i < len(widths) - 1 else 1
        modules += [
            nn.Conv2d(widths[i - 1], widths[i], k, stride, p, bias=bias),
            norm(widths[i]),
            nn.LeakyReLU(0.2),
        ]
    modules.append(nn.Conv2d(widths[-1], 1, k, 1, p, bias=bias or layers > 0))
    D = randomized(nn.Sequential(*modules))
    torch.save(
        {f"{'model' if layers else 'net'}.{n}": v for n, v in D.state_dict().items()}, tmp_path / "d.pth"
    )
    images = torch.randn(2, 3, 64, 64)
    again = fastgan.load(converted(tmp_path / "d.pth"), "discriminator", "cpu")
    torch.testing.assert_close(again(images), D(images), rtol=1e-4, atol=1e-4)


# Networks of other sizes: ours under the peers' names, the inverse of what the converter does.


def biggan_names(net: Any) -> dict[str, Tensor]:
    """BigGAN-PyTorch's state dict of one of our networks."""
    deep = any(".conv4." in name for name in net.state_dict())
    generator, places, blocks = hasattr(net, "bn"), {}, 0
    for i, module in enumerate(net.blocks):
        if type(module).__name__.endswith("SpectralConv2d"):
            places[i] = "input_conv"
            continue
        if isinstance(module, SelfAttention):
            stage, block = places[i - 1].split(".")[1:]
            places[i] = f"blocks.{stage}.{int(block) + 1}"
            continue
        pairs = deep and not generator  # of blocks that share a list
        places[i] = f"blocks.{blocks // 2}.{blocks % 2}" if pairs else f"blocks.{blocks}.0"
        blocks += 1
    state: dict[str, Tensor] = {}
    for name, tensor in net.state_dict().items():
        for i, place in places.items():
            name = re.sub(rf"^blocks\.{i}\.", f"@{place}.", name)
        name = name.lstrip("@")
        if name.endswith("num_batches_tracked"):
            continue
        if generator:
            name = re.sub(r"^bn\.weight", "output_layer.0.gain", name)
            name = re.sub(r"^bn\.", "output_layer.0.", name)
            name = re.sub(r"^conv\.", "output_layer.2.", name)
        name = name.replace("shift.", "bias.")
        name = name.replace("running_mean", "stored_mean").replace("running_var", "stored_var")
        if name.endswith("parametrizations.weight.0.u"):
            name, tensor = name.replace("parametrizations.weight.0.u", "u0"), tensor[None]
            state[name.replace(".u0", ".sv0")] = torch.ones(1)
        state[name.replace("parametrizations.weight.original", "weight")] = tensor
    return state


BIGGANS: dict[str, dict[str, Any]] = {
    "shared": {"z_dim": 7, "c_dim": 4, "resolution": 32, "ngf": 2, "shared_dim": 3, "hier": False},
    "hier": {
        "z_dim": 10,
        "c_dim": 4,
        "resolution": 64,
        "ngf": 1,
        "shared_dim": 3,
        "attention_behind": [1, 2],
    },
    "deep": {
        "z_dim": 5,
        "c_dim": 4,
        "resolution": 32,
        "ngf": 4,
        "shared_dim": 3,
        "deep": True,
        "attention_behind": [1],
    },
    "plain 128": {
        "z_dim": 5,
        "c_dim": 3,
        "resolution": 128,
        "ngf": 1,
        "shared_dim": 0,
        "hier": False,
        "attention": 0,
    },
}


@pytest.mark.parametrize("name", BIGGANS)
@torch.no_grad()
def test_biggan_of_other_sizes(name: str, tmp_path: Path):
    options: dict[str, Any] = {"attention": 0} | BIGGANS[name]
    torch.manual_seed(0)
    G = biggan.Generator(**options).eval()
    shared: dict[str, Any] = {k: options[k] for k in ("c_dim", "resolution", "attention")} | {
        "deep": options.get("deep", False)
    }
    D = biggan.Discriminator(**shared, ndf=1, channels=3, attention_behind=[0]).eval()
    for net in (G, D):
        for key, tensor in net.state_dict().items():
            if tensor.is_floating_point() and not key.endswith(".u"):
                tensor += 0.1 * torch.rand_like(tensor)
    torch.save(biggan_names(G), tmp_path / "G_ema.pth")
    torch.save(biggan_names(D), tmp_path / "D.pth")
    z, c = torch.randn(2, options["z_dim"]).double(), torch.eye(options["c_dim"])[:2].double()
    images = G.double()(z, c)
    again = fastgan.load(converted(tmp_path / "G_ema.pth"), device="cpu").double()
    again.net.dtype = torch.float64
    torch.testing.assert_close(again(z, c), images)
    again = fastgan.load(converted(tmp_path / "D.pth"), "discriminator", "cpu").double()
    again.net.dtype = torch.float64
    torch.testing.assert_close(again(images, c), D.double()(images, c))


@pytest.mark.parametrize("renamed", ["cross_replica", "mybn", "num_G_SVs"])
@torch.no_grad()
def test_biggan_with_other_buffers(renamed: str, tmp_path: Path):
    """Statistics in a batch norm of their own, or singular vectors beyond the first."""
    torch.manual_seed(0)
    G = randomized(biggan.Generator(**BIGGANS["shared"], attention=0))
    state = biggan_names(G)
    if renamed == "num_G_SVs":
        state |= {k.replace(".u0", ".u1"): v for k, v in state.items() if k.endswith(".u0")}
        state |= {k.replace(".sv0", ".sv1"): v for k, v in state.items() if k.endswith(".sv0")}
    else:
        name, count = (
            ("running", "num_batches_tracked")
            if renamed == "cross_replica"
            else ("stored", "accumulation_counter")
        )
        state |= {
            k.replace("stored_mean", f"bn.{count}"): torch.ones(1) for k in state if k.endswith("stored_mean")
        }
        state = {k.replace(".stored_", f".bn.{name}_"): v for k, v in state.items()}
    torch.save(state, tmp_path / "G_ema.pth")
    z, c = torch.randn(2, 7), torch.eye(4)[:2]
    torch.testing.assert_close(fastgan.load(tmp_path / "G_ema.pth", device="cpu")(z, c), G(z, c))


def test_a_discriminator_alone_of_256_pixels(tmp_path: Path):
    """No generator has to fit beside it: the preset's z does not divide by 7."""
    D = biggan.Discriminator(c_dim=2, resolution=256, ndf=1, attention=0)
    torch.save(biggan_names(D), tmp_path / "D.pth")
    assert convert.read(tmp_path / "D.pth").config.resolution == 256


def r3gan_names(net: Any) -> dict[str, Tensor]:
    generator = isinstance(net, r3gan.Generator)
    state = {}
    for name, tensor in net.state_dict().items():
        name = re.sub(r"^to_rgb\.weight", "AggregationLayer.Layer.weight", name)
        name = re.sub(r"^from_rgb\.weight", "ExtractionLayer.Layer.weight", name)
        name = re.sub(r"^embedding", "EmbeddingLayer.weight", name)
        last, behind = len(net.stages) - 1, len(net.stages[-1])
        basis = "MainLayers.0.Layers.0" if generator else f"MainLayers.{last}.Layers.{behind}"
        name = re.sub(r"^project", f"{basis}.LinearLayer.weight", name)
        name = re.sub(r"^basis", f"{basis}.Basis" + "" * generator + ".weight" * (not generator), name)
        if found := re.fullmatch(r"transitions\.(\d+)\.weight", name):
            i = int(found[1])
            place = f"{i + 1}.Layers.0" if generator else f"{i}.Layers.{len(net.stages[i])}"
            name = f"MainLayers.{place}.LinearLayer.Layer.weight"
        if found := re.fullmatch(r"stages\.(\d+)\.(\d+)\.(conv|bias)(\d)(\.weight)?", name):
            place = f"MainLayers.{found[1]}.Layers.{int(found[2]) + generator}"
            part = (
                f"LinearLayer{found[4]}.Layer.weight"
                if found[3] == "conv"
                else f"NonLinearity{found[4]}.Bias"
            )
            name = f"{place}.{part}"
        if name.endswith(".Layer.weight") and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        state[f"Model.{name}"] = tensor[:, None] if name.endswith("Basis.weight") else tensor
    return state


@pytest.mark.parametrize(
    "sizes",
    [
        [[12, 3, 2], [12, 3, 2], [6, 1, 2]],
        [[8, 2, 1], [12, 6, 3]],
        [[8, 4, 1], [8, 4, 1], [4, 2, 1], [2, 1, 1]],
    ],
)
@torch.no_grad()
def test_r3gan_of_other_sizes(sizes: list[list[int]], tmp_path: Path):
    torch.manual_seed(0)
    common = {
        "c_dim": 3,
        "resolution": 2 << len(sizes),
        "channels": 3,
        "expansion": 3,
        "kernel": 5,
        "sizes": sizes,
    }
    G = randomized(r3gan.Generator(5, embed_dim=4, **common))
    D = randomized(r3gan.Discriminator(embed_dim=7, **common))
    for name, net in (("G", G), ("D", D)):
        torch.save({name: r3gan_names(net)}, tmp_path / f"{name}.pth")
    z, c = torch.randn(2, 5), torch.eye(3)[:2]
    images = G(z, c)
    torch.testing.assert_close(fastgan.load(converted(tmp_path / "G.pth"), device="cpu")(z, c), images)
    again = fastgan.load(converted(tmp_path / "D.pth"), "discriminator", "cpu")
    torch.testing.assert_close(again(images, c), D(images, c))


@pytest.mark.parametrize("protocol", [2, 4])
@torch.no_grad()
def test_r3gan_pickles(protocol: int, tmp_path: Path, monkeypatch):
    """As its training writes them: plain modules of its own classes, stages with a dtype, no state dict."""
    modules = ("training", "training.networks", "R3GAN", "R3GAN.Networks")
    for name in modules:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))

    def made(module: str, name: str) -> type[nn.Module]:
        made = type(name, (nn.Module,), {"__module__": module})
        return sys.modules[module].__dict__.setdefault(name, made)

    torch.manual_seed(0)
    sizes = {"resolution": 8, "sizes": [[8, 2, 1], [4, 2, 1]], "c_dim": 3}
    nets = {"G_ema": randomized(r3gan.Generator(5, **sizes)), "D": randomized(r3gan.Discriminator(**sizes))}
    data: dict[str, Any] = {"training_set_kwargs": {"path": "a.zip"}}
    for key, net in nets.items():
        name = "Discriminator" if key == "D" else "Generator"
        root = data[key] = made("training.networks", name)()
        for path, tensor in r3gan_names(net).items():
            *places, leaf = path.split(".")
            place = root
            for part in places:
                if part not in place._modules:
                    inner = made("R3GAN.Networks", name if part == "Model" else f"Layer{part}")()
                    inner.__dict__["DataType"] = torch.bfloat16 if part == "0" else torch.float32
                    place.add_module(part, inner)
                place = place.get_submodule(part)
            place.register_parameter(leaf, nn.Parameter(tensor.clone()))
        for i in range(2):
            resampled = root.get_submodule(f"Model.MainLayers.{i}.Layers.0")
            resampled.register_module("Resampler", made("R3GAN.Networks", "Resampler")())
            resampled.get_submodule("Resampler").register_buffer("Kernel", setup_filter(BLUR))
    (tmp_path / "network.pkl").write_bytes(pickle.dumps(data, protocol))
    for name in modules:
        monkeypatch.delitem(sys.modules, name)
    z, c = torch.randn(2, 5), torch.eye(3)[:2]
    images = nets["G_ema"](z, c)
    path = converted(tmp_path / "network.pkl")
    torch.testing.assert_close(fastgan.load(path, device="cpu")(z, c), images)
    again = fastgan.load(path, "discriminator", "cpu")
    torch.testing.assert_close(again(images, c), nets["D"](images, c))


@torch.no_grad()
def test_progan_without_minibatch_deviation_in_the_zoos_nesting(tmp_path: Path):
    """Widths that rise, one channel, alpha from the config, the averaged generator before the other."""

    class BaseConfig:
        pass

    BaseConfig.__module__, BaseConfig.__qualname__ = "models.utils.config", "BaseConfig"
    torch.manual_seed(0)
    widths, root = [4, 6, 3], 2**0.5
    G = progan.Generator(5, 0, 16, 1, widths=widths)
    D = progan.Discriminator(0, 16, 1, widths=widths, mbstd_channels=0)
    G.grow(1.75)
    D.grow(1.75)

    def zoo(net: nn.Module, names: list[tuple[str, str]]) -> dict[str, Tensor]:
        state = {}
        for ours, theirs in names:
            weight, bias = (net.state_dict()[f"{ours}.{part}"] for part in ("weight", "bias"))
            hidden = not theirs.startswith(("toRGB", "decision"))
            flipped = theirs.startswith("scaleLayers") and theirs.endswith(".0") and net is G
            state[f"{theirs}.module.weight"] = (weight.flip([2, 3]) if flipped else weight) / (
                1 if hidden else root
            )
            state[f"{theirs}.module.bias"] = bias * weight[0].numel() ** 0.5 / (1 if hidden else root)
        return state

    names = [("dense", "formatLayer"), ("blocks.0.0", "groupScale0.0")]
    names += [(f"blocks.{i + 1}.{j}", f"scaleLayers.{i}.{j}") for i in range(2) for j in range(2)]
    g = zoo(G, names + [(f"torgb.{i}", f"toRGBLayers.{i}") for i in range(3)])
    names = [("b4.conv", "groupScaleZero.0"), ("b4.fc", "groupScaleZero.1"), ("b4.out", "decisionLayer")]
    names += [(f"blocks.{i}.{j}", f"scaleLayers.{i}.{j}") for i in range(2) for j in range(2)]
    d = zoo(D, names + [(f"fromrgb.{i}", f"fromRGBLayers.{i}") for i in range(3)])
    config = BaseConfig()
    config.__dict__ |= {"alpha": 0.25, "depthOtherScales": [6, 3]}
    with pytest.MonkeyPatch.context() as patch:
        for name in ("models", "models.utils", "models.utils.config"):
            patch.setitem(sys.modules, name, argparse.Namespace(BaseConfig=BaseConfig))
        other = {k: v + 1 for k, v in g.items()}
        torch.save({"config": config, "netG": other, "netD": d, "avgG": g}, tmp_path / "zoo.pth")
    read = convert.read(tmp_path / "zoo.pth")
    z, images = torch.randn(4, 5), torch.randn(4, 1, 16, 16)
    torch.testing.assert_close(build(read, device="cpu")(z), G(z), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(build(read, "discriminator", "cpu")(images), D(images), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_rosinality_of_other_sizes(tmp_path: Path):
    """One channel, other widths, w wider than its layers; half precision becomes single."""
    case = named("rosinality_nets/G0")
    state = {
        k: v for k, v in peer_state(case).items() if not k.startswith(("convs.2", "convs.3", "to_rgbs.1"))
    }
    state = {
        k: v[:, :1]
        if k.endswith(("to_rgb1.bias", "to_rgbs.0.bias", "to_rgb1.conv.weight", "to_rgbs.0.conv.weight"))
        else v
        for k, v in state.items()
    }
    torch.save(
        {"g_ema": {k: v.half() for k, v in state.items()}, "args": argparse.Namespace(size=8)},
        tmp_path / "g.pt",
    )
    read = convert.read(tmp_path / "g.pt")
    assert (read.config.resolution, read.config.channels, read.config.mapping_layers) == (8, 1, 2)
    assert read.generator is not None and all(t.dtype == torch.float32 for t in read.generator.values())
    assert build(read, device="cpu")(torch.randn(2, 8)).shape == (2, 1, 8, 8)


# Files


@pytest.mark.parametrize("legacy", [False, True])
def test_formats_of_torch_save(legacy: bool, tmp_path: Path):
    """Both of them, with views, memory orders and what a trainer puts beside the networks."""
    case = named("dcgan_nets/G0_eval")
    state = collections.OrderedDict(peer_state(case))
    shared = torch.cat([t.reshape(-1) for t in state.values() if t.is_floating_point()])
    start = 0
    for name, tensor in state.items():
        if tensor.is_floating_point():
            state[name] = shared[start : start + tensor.numel()].view(tensor.shape)
            start += tensor.numel()
    state["main.3.weight"] = state["main.3.weight"].to(memory_format=torch.channels_last)
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([parameter])
    parameter.sum().backward()
    optimizer.step()
    whole = {"optimizer": optimizer.state_dict(), "nets": [{"model": state}], "args": argparse.Namespace(a=1)}
    torch.save(whole, tmp_path / "g.pth", _use_new_zipfile_serialization=not legacy)
    check(converted(tmp_path / "g.pth"), case)


@pytest.mark.parametrize("legacy", [False, True])
@torch.no_grad()
def test_a_module_saved_whole(legacy: bool, tmp_path: Path):
    """Its layers keep their order; the old format holds classes beside the module's source."""
    net = randomized(dcgan_generator([4, 4, 4], [4, 3, 2], [4, 8, 16], bias=False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of sources that could not be found
        torch.save(net, tmp_path / "g.pth", _use_new_zipfile_serialization=not legacy)
    z = torch.randn(2, 6)
    again = fastgan.load(converted(tmp_path / "g.pth"), device="cpu")
    torch.testing.assert_close(again(z), net(z[:, :, None, None]))


def test_our_own_files_pass_through(tmp_path: Path):
    (tmp_path / "g.pth").write_bytes((GOLDEN / "checkpoints" / "biggan_public0_G.pth").read_bytes())
    first = read_own(converted(tmp_path / "g.pth"))
    assert convert.main([str(tmp_path / "g.safetensors"), str(tmp_path / "again.safetensors")]) == 0
    again = read_own(tmp_path / "again.safetensors")
    assert again.config == first.config and again.generator_options == first.generator_options
    assert first.generator is not None and again.generator is not None
    assert all(torch.equal(first.generator[k], again.generator[k]) for k in first.generator)


def test_one_network_alone(tmp_path: Path, capsys):
    """Loading looks at no other network than the one wanted; --network converts one of two."""
    G, D = named("rosinality_nets/G0"), named("rosinality_nets/D0")
    strange = {**peer_state(D), "convs.0.0.weight": torch.ones(5, 3, 1, 1)}
    src = tmp_path / "odd.pt"
    torch.save({"g_ema": peer_state(G), "d": strange, "latent_avg": torch.zeros(8)}, src)
    said = refused(src, capsys)
    assert "d of " in said and said.endswith("and --network generator takes that one alone\n")
    check(converted(src, "--network", "generator"), G)
    assert fastgan.load(src, device="cpu").config.arch == "stylegan"
    with pytest.raises(UsageError, match="cannot be one that is known"):
        fastgan.load(src, "discriminator", "cpu")
    ours = src.with_suffix(".safetensors")
    assert "holds no discriminator" in refused(ours, capsys, "--network", "discriminator")
    with pytest.raises(UsageError, match="network must be generator or discriminator: got 'both'"):
        fastgan.load(src, "both")
    src = GOLDEN / "checkpoints" / "rosinality_public0.pt"
    assert convert.main([str(src), str(ours), "--network", "discriminator"]) == 0
    check(ours, D)
    assert read_own(ours).generator is None


def test_a_public_state_dict_as_safetensors_is_loaded(tmp_path: Path):
    case = named("dcgan_nets/G0_eval")
    save_file(peer_state(case), tmp_path / "netG.safetensors")
    z = case.tensor("in.z").float()
    case.check("out.y", fastgan.load(tmp_path / "netG.safetensors", device="cpu")(z), tol=2e-5)


def test_what_the_command_prints(tmp_path: Path, capsys):
    src, out = GOLDEN / "checkpoints" / "rosinality_public0.pt", tmp_path / "out.safetensors"
    assert convert.main([str(src), str(out)]) == 0
    told = capsys.readouterr().out
    assert f"{src}: rosinality, in fastgan --arch stylegan\n" in told
    assert "  generator     g_ema: 16 pixels, 3 channels, 3,854 parameters, z of 8\n" in told
    assert "  discriminator d: 16 pixels, 3 channels, 4,193 parameters\n" in told
    assert f"  left out      generator g\nwrote {out}, 0.0 MiB\n" in told
    for option, value, kinds in (("--resolution", "16", "cyclegan and dcgan"), ("--alpha", "0.5", "progan")):
        assert f"a rosinality, only to {kinds}" in refused(
            src, capsys, option, value, out=tmp_path / "no.safetensors"
        )
    assert "--set depth: no network of --arch stylegan" in refused(
        src, capsys, "--set", "depth=3", out=tmp_path / "no.safetensors"
    )


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("conv_clamp=wide", "conv_clamp must be of type float | None: got wide"),
        ("conv_clamp=NaN", "conv_clamp must be of type float | None: got nan"),
        ("conv_clamp", "must be NAME=VALUE: got conv_clamp"),
        ("mbstd_group=2.5", "mbstd_group must be of type int | None: got 2.5"),
        ("taps=[1, true]", "taps must be of type Sequence[float]: got [1, True]"),
        ("mapping_layers=true", "mapping_layers must be of type int: got True"),
        ("dtype=3", "dtype must be of type torch.dtype | None: got 3"),
    ],
)
def test_a_wrong_value_of_set(argument: str, said: str, tmp_path: Path, capsys):
    src, out = GOLDEN / "checkpoints" / "rosinality_public0.pt", tmp_path / "no.safetensors"
    assert convert.main([str(src), str(out), "--set", argument]) == 2 and not out.exists()
    assert said in capsys.readouterr().err
