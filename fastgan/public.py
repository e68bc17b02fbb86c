"""Weights of public implementations under our names, and the sizes of the networks that they are of.

Each implementation has functions from state dicts to state dicts, which are differentiable and copy nothing,
so that gradients can be compared through them. `PEERS` says how each of its networks is told from others and
what arguments of our constructors make one of its size.
"""

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastgan.equalized import BLUR, channels_up_to
from fastgan.kernels.upfirdn2d import setup_filter
from fastgan.models import biggan as biggan_model
from fastgan.models import r3gan as r3gan_model

State = Mapping[str, Tensor]
# In the config of pytorch_GAN_zoo's ProGAN; with another loss its images end in tanh.
ZOO_PROGAN = {
    "equalizedlR": (True,),
    "leakyReluLeak": (0.2,),
    "perChannelNormalization": (True,),
    "lossCriterion": ("WGANGP",),
}


@dataclass(frozen=True)
class Source:
    """What is known of a network beside its tensors.

    attributes    of its module, from a pickle of it: those of submodules under "_modules"
    beside        what the checkpoint holds next to it
    alpha         of a ProGAN that was fading in: the weight of the old branch
    resolution    side of its images, where tensors do not tell
    """

    attributes: Mapping[str, Any] = field(default_factory=dict)
    beside: Mapping[str, Any] = field(default_factory=dict)
    alpha: float | None = None
    resolution: int | None = None

    def attribute(self, module: str, name: str, default: Any = None) -> Any:
        """`name` of the submodule "a.b.c", a number, string or None; `default` where there is none."""
        found: Any = self.attributes
        for part in module.split("."):
            found = found.get("_modules", {}).get(part, {})
        value = found.get(name, default)
        if not isinstance(value, int | float | str | None):
            raise ValueError(f"{name} of its {module} is no number")
        return value


Converted = tuple[dict[str, Tensor], dict[str, Any]]  # tensors and constructor arguments under our names


@dataclass(frozen=True)
class Peer:
    """One network of a public implementation: `matches` its tensors, and `convert`s them."""

    kind: str
    arch: str
    network: str  # "generator" or "discriminator"
    matches: Callable[[Mapping[str, Any]], bool]
    convert: Callable[[State, Source], Converted]


def _with(*names: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda state: all(name in state for name in names)


def progan_generator(state: dict[str, Tensor], alpha: float = 0.0) -> dict[str, Tensor]:
    """pytorch_GAN_zoo's ProGAN generator as `progan.Generator`'s state, grown to all of its scales.

    `alpha` is the zoo's, the weight of the old branch. Its layers multiply weight and bias by sqrt(2 / fan
    in); ours the weight alone, and hidden layers by sqrt(2) behind the activation. Its taps correlate with
    the upsampled image, ours convolve with it.
    """
    stages = _count(state, "scaleLayers.{}.0.module.weight")
    out = {"growth": torch.tensor(stages - alpha, dtype=torch.float64)}
    out |= _zoo_layer(state, "formatLayer", "dense") | _zoo_layer(state, "groupScale0.0", "blocks.0.0")
    for i in range(stages):
        out |= _zoo_layer(state, f"scaleLayers.{i}.0", f"blocks.{i + 1}.0")
        out[f"blocks.{i + 1}.0.weight"] = out[f"blocks.{i + 1}.0.weight"].flip([2, 3])
        out |= _zoo_layer(state, f"scaleLayers.{i}.1", f"blocks.{i + 1}.1")
    for i in range(stages + 1):
        out |= _zoo_layer(state, f"toRGBLayers.{i}", f"torgb.{i}", hidden=False)
    return out


def progan_discriminator(state: dict[str, Tensor], alpha: float = 0.0, group: int = 4) -> dict[str, Tensor]:
    """pytorch_GAN_zoo's ProGAN discriminator as `progan.Discriminator`'s state (see `progan_generator`).

    Its minibatch standard deviation is the unbiased one: that of ours for values sqrt(group / (group - 1))
    times larger, as the layers before it here make them, and the one behind it makes up for. Its groups are
    consecutive samples, ours are strided.
    """
    stages = _count(state, "scaleLayers.{}.0.module.weight")
    out = {"growth": torch.tensor(stages - alpha, dtype=torch.float64)}
    for i in range(stages):
        for j in range(2):
            out |= _zoo_layer(state, f"scaleLayers.{i}.{j}", f"blocks.{i}.{j}")
    for i in range(stages + 1):
        out |= _zoo_layer(state, f"fromRGBLayers.{i}", f"fromrgb.{i}")
    out |= _zoo_layer(state, "groupScaleZero.0", "b4.conv") | _zoo_layer(state, "groupScaleZero.1", "b4.fc")
    out |= _zoo_layer(state, "decisionLayer", "b4.out", hidden=False)
    if out["b4.conv.weight"].shape[1] == out["b4.conv.weight"].shape[0]:
        return out  # without minibatch standard deviation
    larger = math.sqrt(group / (group - 1))
    for layer in ("fromrgb.0", "blocks.0.1")[: stages + 1]:  # what the last 4x4 sees, grown or not
        out |= {f"{layer}.{part}": out[f"{layer}.{part}"] * larger for part in ("weight", "bias")}
    features, deviation = out["b4.conv.weight"].split([out["b4.conv.weight"].shape[1] - 1, 1], dim=1)
    out["b4.conv.weight"] = torch.cat([features / larger, deviation], dim=1)
    return out


def _channels(widths: Sequence[int]) -> dict[str, Any]:
    """Arguments that make these channels at 4, 8, ... pixels."""
    resolution = _side(len(widths) - 1)
    base = max(width * (4 << i) for i, width in enumerate(widths))
    options: dict[str, Any] = {"channel_base": base, "channel_max": max(widths)}
    if channels_up_to(resolution, base, max(widths)) != list(widths):
        options["widths"] = list(widths)
    return options


def _side(doublings: int) -> int:
    """Of images; what is filled in for missing noise has this side, so a name alone must not make it huge."""
    if 4 << doublings > 8192:
        raise ValueError(f"its {doublings} doublings lead from 4 to {4 << min(doublings, 60)} pixels")
    return 4 << doublings


def _check_zoo(source: Source, usual: Mapping[str, Any]) -> None:
    """ValueError if the zoo's config, beside the networks, has none of the `usual` values, which are ours."""
    config = source.beside.get("config")
    if not isinstance(config, Mapping):
        return
    for name, values in usual.items():
        given = config.get(name, values[0])
        if given not in values:
            # Of other kinds a name alone: what holds itself over and over has no end of a text.
            said = given if isinstance(given, bool | int | float | str) else f"a {type(given).__name__}"
            known = " or ".join(map(str, values))
            raise ValueError(f"its config's {name} is {said!s:.20}, and {known} alone is known")


def _progan_generator(state: State, source: Source) -> Converted:
    _check_zoo(source, ZOO_PROGAN)
    weights = progan_generator(dict(state), _alpha(source))
    stages = _count(state, "scaleLayers.{}.0.module.weight")
    widths = [state[f"toRGBLayers.{i}.module.weight"].shape[1] for i in range(stages + 1)]
    options = {
        "z_dim": state["formatLayer.module.weight"].shape[1],
        "c_dim": 0,
        "resolution": _side(stages),
        "channels": state["toRGBLayers.0.module.weight"].shape[0],
    }
    return weights, options | _channels(widths)


def _progan_discriminator(state: State, source: Source) -> Converted:
    _check_zoo(source, ZOO_PROGAN)
    if (outputs := len(state["decisionLayer.module.weight"])) != 1:
        raise ValueError(f"it has {outputs} outputs, some of them classes (AC-GAN), where fastgan's has one")
    stages = _count(state, "scaleLayers.{}.0.module.weight")
    weights = progan_discriminator(dict(state), _alpha(source) if stages > 1 else 0.0)
    widths = [state[f"fromRGBLayers.{i}.module.weight"].shape[0] for i in range(stages + 1)]
    options = {
        "c_dim": 0,
        "resolution": _side(stages),
        "channels": state["fromRGBLayers.0.module.weight"].shape[1],
        "mbstd_group": 4,
        "mbstd_channels": state["groupScaleZero.0.module.weight"].shape[1] - widths[0],
    }
    return weights, options | _channels(widths)


def _alpha(source: Source) -> float:
    alpha = source.alpha
    if alpha is None:
        config = source.beside.get("config")
        alpha = config.get("alpha", 0.0) if isinstance(config, Mapping) else 0.0
    if not isinstance(alpha, int | float) or not 0 <= alpha < 1:
        raise ValueError("alpha, the weight of the old branch, must be at least 0 and below 1")
    return float(alpha)


def _zoo_layer(state: dict[str, Tensor], theirs: str, ours: str, hidden: bool = True) -> dict[str, Tensor]:
    weight, bias = state[f"{theirs}.module.weight"], state[f"{theirs}.module.bias"]
    gain = 1.0 if hidden else math.sqrt(2)
    return {f"{ours}.weight": weight * gain, f"{ours}.bias": bias * gain / math.sqrt(weight[0].numel())}


def rosinality_generator(state: dict[str, Tensor], latent_avg: Tensor | None = None) -> dict[str, Tensor]:
    """rosinality/stylegan2-pytorch's generator as `stylegan.Generator`'s state.

    `state` is a checkpoint's "g" or "g_ema", `latent_avg` its entry of that name. Weights carry a batch
    dimension of one; a resolution's layers are convs.2i, which upsamples, and convs.2i+1; the noise buffers
    may be missing.
    """
    out = {"mapping.w_avg": torch.zeros_like(state["style.1.bias"])}
    if latent_avg is not None:
        out["mapping.w_avg"] = latent_avg.reshape(-1)
    for i in range(_count(state, "style.{}.weight", first=1)):
        for part in ("weight", "bias"):
            out[f"mapping.fc{i}.{part}"] = state[f"style.{i + 1}.{part}"]
    out["synthesis.b4.const"] = state["input.input"][0]
    outputs, layers, sides = {"to_rgb1": "b4"}, {"conv1": "b4.conv1"}, [4]
    for i in range(_count(state, "to_rgbs.{}.bias")):
        side = 8 << i
        outputs[f"to_rgbs.{i}"] = f"b{side}"
        layers |= {f"convs.{2 * i}": f"b{side}.conv0", f"convs.{2 * i + 1}": f"b{side}.conv1"}
        sides += [side, side]
    for theirs, block in outputs.items():
        out |= _modulated(state, theirs, f"synthesis.{block}.torgb")
        out[f"synthesis.{block}.torgb.bias"] = state[f"{theirs}.bias"].reshape(-1)
    for i, ((theirs, ours), side) in enumerate(zip(layers.items(), sides, strict=True)):
        out |= _modulated(state, theirs, f"synthesis.{ours}")
        out[f"synthesis.{ours}.bias"] = state[f"{theirs}.activate.bias"]
        out[f"synthesis.{ours}.noise_strength"] = state[f"{theirs}.noise.weight"][0]
        noise = state.get(f"noises.noise_{i}")
        noise = out["synthesis.b4.const"].new_zeros(side, side) if noise is None else noise[0, 0]
        out[f"synthesis.{ours}.noise_const"] = noise
    return out


def _modulated(state: dict[str, Tensor], theirs: str, ours: str) -> dict[str, Tensor]:
    return {
        f"{ours}.weight": state[f"{theirs}.conv.weight"][0],
        f"{ours}.affine.weight": state[f"{theirs}.conv.modulation.weight"],
        f"{ours}.affine.bias": state[f"{theirs}.conv.modulation.bias"],
    }


def rosinality_discriminator(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """rosinality/stylegan2-pytorch's discriminator as `stylegan.Discriminator`'s state.

    A residual block, convs.1 at the full resolution, is conv1, conv2 (behind a blur) and skip.
    """
    blocks = _count(state, "convs.{}.conv1.0.weight", first=1)
    names = {"convs.0.0.weight": f"b{4 << blocks}.fromrgb.weight"}
    names["convs.0.1.bias"] = f"b{4 << blocks}.fromrgb.bias"
    for i in range(1, blocks + 1):
        theirs, ours = f"convs.{i}", f"b{8 << (blocks - i)}"
        names |= {f"{theirs}.conv1.0.weight": f"{ours}.conv0.weight"}
        names |= {f"{theirs}.conv1.1.bias": f"{ours}.conv0.bias"}
        names |= {f"{theirs}.conv2.1.weight": f"{ours}.conv1.weight"}
        names |= {f"{theirs}.conv2.2.bias": f"{ours}.conv1.bias"}
        names |= {f"{theirs}.skip.1.weight": f"{ours}.skip.weight"}
    names |= {"final_conv.0.weight": "b4.conv.weight", "final_conv.1.bias": "b4.conv.bias"}
    for i, ours in enumerate(("fc", "out")):
        names |= {f"final_linear.{i}.{part}": f"b4.{ours}.{part}" for part in ("weight", "bias")}
    return {ours: state[theirs] for theirs, ours in names.items()}


def _rosinality_generator(state: State, source: Source) -> Converted:
    """The checkpoint's latent_avg is the mean w; a state dict alone has none."""
    mean, blocks = source.beside.get("latent_avg"), _count(state, "to_rgbs.{}.bias")
    side = _side(blocks)
    weights = rosinality_generator(dict(state), mean if isinstance(mean, Tensor) else None)
    if mean is None:
        del weights["mapping.w_avg"]
    widths = [state["to_rgb1.conv.weight"].shape[2]]
    widths += [state[f"to_rgbs.{i}.conv.weight"].shape[2] for i in range(blocks)]
    options = {
        "z_dim": state["style.1.weight"].shape[1],
        "c_dim": 0,
        "w_dim": state["conv1.conv.modulation.weight"].shape[1],
        "resolution": side,
        "channels": state["to_rgb1.bias"].numel(),
        "mapping_layers": _count(state, "style.{}.weight", first=1),
        "taps": _taps([t for k, t in state.items() if k.endswith(".kernel")]),
    }
    return weights, options | _channels(widths)


def _rosinality_discriminator(state: State, source: Source) -> Converted:
    blocks = _count(state, "convs.{}.conv1.0.weight", first=1)
    widths = [state["convs.0.0.weight"].shape[0]]
    widths += [state[f"convs.{i}.conv2.1.weight"].shape[0] for i in range(1, blocks + 1)]
    last = state["final_conv.0.weight"]
    options = {
        "c_dim": 0,
        "resolution": _side(blocks),
        "channels": state["convs.0.0.weight"].shape[1],
        "mbstd_group": 4,
        "mbstd_num_channels": last.shape[1] - last.shape[0],
        "taps": _taps([t for k, t in state.items() if k.endswith(".kernel")]),
    }
    return rosinality_discriminator(dict(state)), options | _channels(widths[::-1])


def _taps(filters: Sequence[Tensor]) -> list[float]:
    """The one low-pass filter that all `filters` are, as taps that sum to 1, or as BLUR."""
    filters = [f.double() / f.double().sum() for f in filters]
    if all(_same(f, setup_filter(BLUR).double()) for f in filters):
        return list(BLUR)
    taps = filters[0] if filters[0].ndim == 1 else filters[0].sum(0)
    if not all(_same(f, taps if f.ndim == 1 else taps.outer(taps)) for f in filters):
        raise ValueError("its low-pass filters differ from one another, or are not separable")
    return taps.tolist()


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-5)


def _block_filters(state: State) -> list[Tensor]:
    """Those of StyleGAN2's blocks. Layers have some as well, which not all of them use."""
    return [t for k, t in state.items() if re.fullmatch(r"(synthesis\.)?b\d+\.resample_filter", k)]


def _stylegan2_generator(state: State, source: Source) -> Converted:
    """stylegan2-ada-pytorch's and stylegan3's StyleGAN2, whose names are ours.

    Layers without noise are layers with noise of strength zero. A mapping network's learning rate multiplier
    m is part of its equations, w m / sqrt(in): weights are made to those of our 0.01.
    """
    _check_activations(source)
    doublings = _count_sides(state, "synthesis.b{}.conv1.weight") - 1
    sides = [4 << i for i in range(doublings + 1) if _side(doublings)]
    weights = {k: t for k, t in state.items() if not k.endswith("resample_filter")}
    for side, i in itertools.product(sides, range(2)):
        layer = f"synthesis.b{side}.conv{i}"
        if f"{layer}.weight" in weights and f"{layer}.noise_const" not in weights:
            weights[f"{layer}.noise_const"] = weights[f"{layer}.weight"].new_zeros(side, side)
            weights[f"{layer}.noise_strength"] = weights[f"{layer}.weight"].new_zeros([])
    weights, mapping = _stylegan2_mapping(weights, source, state["synthesis.b4.conv1.affine.weight"].shape[1])
    last = state[f"synthesis.b{sides[-1]}.torgb.weight"]
    architecture = "orig"
    if "synthesis.b8.skip.weight" in state:
        architecture = "resnet"
    elif "synthesis.b4.torgb.weight" in state:
        architecture = "skip"
    first = state["mapping.fc0.weight"].shape[1] if "mapping.fc0.weight" in state else 0
    embedded = state["mapping.embed.weight"].shape[0] if "mapping.embed.weight" in state else 0
    options = {
        "z_dim": source.attribute("mapping", "z_dim", first - embedded),
        "w_dim": state["synthesis.b4.conv1.affine.weight"].shape[1],
        "resolution": sides[-1],
        "channels": last.shape[0],
        "architecture": architecture,
        "conv_clamp": source.attribute("synthesis.b4.conv1", "conv_clamp"),
        "taps": _taps(_block_filters(state)),
    }
    widths = [state[f"synthesis.b{side}.conv1.weight"].shape[0] for side in sides]
    return weights, options | mapping | _channels(widths)


def _stylegan2_discriminator(state: State, source: Source) -> Converted:
    _check_activations(source)
    blocks = _count_sides(state, "b{}.conv0.weight", first=8)
    side = _side(blocks)
    widths = [state[f"b{8 << i}.conv1.weight"].shape[0] for i in range(blocks)]
    widths.append(state[f"b{side}.fromrgb.weight"].shape[0])
    outputs = state["b4.out.weight"].shape[0]
    weights = {k: t for k, t in state.items() if not k.endswith("resample_filter")}
    weights, mapping = _stylegan2_mapping(weights, source, outputs)
    architecture = "orig"
    if "b8.skip.weight" in state:
        architecture = "resnet"
    elif "b4.fromrgb.weight" in state:
        architecture = "skip"
    options = {
        "resolution": side,
        "channels": state[f"b{side}.fromrgb.weight"].shape[1],
        "architecture": architecture,
        "conv_clamp": source.attribute("b4.conv", "conv_clamp"),
        "mbstd_group": source.attribute("b4.mbstd", "group_size", 4),
        "mbstd_num_channels": state["b4.conv.weight"].shape[1] - widths[0],
        "taps": _taps(_block_filters(state)),
    }
    if mapping["c_dim"] > 0 and outputs != widths[0]:
        options["cmap_dim"] = outputs
    return weights, options | mapping | _channels(widths)


def _check_activations(source: Source) -> None:
    left = [source.attributes]
    while left:
        module = left.pop()
        activation = module.get("activation", "linear")
        if activation not in ("linear", "lrelu"):
            name = activation[:20] if isinstance(activation, str) else "of no name"
            raise ValueError(f"it has the activation {name}; only lrelu is known")
        left += [m for m in module.get("_modules", {}).values() if isinstance(m, Mapping)]


def _stylegan2_mapping(weights: dict[str, Tensor], source: Source, w_dim: int) -> Converted:
    layers = _count(weights, "mapping.fc{}.weight")
    gain = source.attribute("mapping.fc0", "bias_gain", 0.01) / 0.01
    if gain != 1:
        names = [f"mapping.fc{i}.{part}" for i in range(layers) for part in ("weight", "bias")]
        weights = weights | {name: weights[name] * gain for name in names}
    embed = weights.get("mapping.embed.weight")
    options: dict[str, Any] = {"c_dim": 0 if embed is None else embed.shape[1], "mapping_layers": layers}
    if embed is not None and embed.shape[0] != w_dim:
        options["embed_features"] = embed.shape[0]
    if layers > 1 and weights["mapping.fc0.weight"].shape[0] != w_dim:
        options["layer_features"] = weights["mapping.fc0.weight"].shape[0]
    return weights, options


def _count_sides(state: State, name: str, first: int = 4) -> int:
    """How many of name.format(first), name.format(2 * first), ... there are in a row."""
    count = 0
    while name.format(first << count) in state:
        count += 1
    return count


def _count(state: State, name: str, first: int = 0) -> int:
    """How many of name.format(first), name.format(first + 1), ... there are in a row."""
    last = first
    while name.format(last) in state:
        last += 1
    return last - first


def biggan_generator(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """BigGAN-PyTorch's G.pth or G_ema.pth, of BigGAN.py or BigGANdeep.py, for `models.biggan.Generator`."""
    return _biggan(state)


def biggan_discriminator(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """BigGAN-PyTorch's D.pth, of BigGAN.py or BigGANdeep.py, for `models.biggan.Discriminator`."""
    return _biggan(state)


def _biggan(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Blocks in one list, not one a stage; a weight with a u0 beside it is spectrally normalized.

    Its u1 and so on are for singular values that it logs. With --cross_replica or --mybn a batch norm keeps
    its statistics in a module "bn".
    """
    state = {re.sub(r"\.bn\.(running|stored)_(mean|var)$", r".stored_\2", k): t for k, t in state.items()}
    nested = sorted({tuple(map(int, k.split(".")[1:3])) for k in state if k.startswith("blocks.")})
    stem = any(k.startswith("input_conv.") for k in state)
    places = {f"blocks.{i}.{j}": f"blocks.{n + stem}" for n, (i, j) in enumerate(nested)}
    places |= {"input_conv": "blocks.0", "output_layer.0": "bn", "output_layer.2": "conv"}
    ours = {}
    for key, tensor in state.items():
        owner, _, name = key.rpartition(".")
        for theirs, place in places.items():
            if owner == theirs or owner.startswith(f"{theirs}."):
                owner = place + owner.removeprefix(theirs)
                break
        if owner.endswith((".bn1.bias", ".bn2.bias", ".bn3.bias", ".bn4.bias")):  # a layer, not a vector
            owner = owner.removesuffix("bias") + "shift"
        if name == "u0":
            ours[f"{owner}.parametrizations.weight.0.u"] = tensor[0]
        elif name == "weight" and f"{key.removesuffix('weight')}u0" in state:
            ours[f"{owner}.parametrizations.weight.original"] = tensor
        elif name == "stored_mean":
            ours[f"{owner}.running_mean"] = tensor
            ours[f"{owner}.num_batches_tracked"] = torch.tensor(0)
        elif name == "stored_var":
            ours[f"{owner}.running_var"] = tensor
        elif not re.fullmatch(r"sv\d+|u\d+|num_batches_tracked|accumulation_counter", name):
            ours[f"{owner}.{'weight' if name == 'gain' else name}".lstrip(".")] = tensor
    return ours


def _biggan_generator(state: State, source: Source) -> Converted:
    """A stage doubles the side. In BigGAN-deep it has two blocks, each in a list of its own, as attention
    goes into the second's list; in BigGAN one."""
    deep = "blocks.0.0.conv4.weight" in state
    first = state["linear.weight"].shape[1]
    lists = _count(state, "blocks.{}.0.conv1.weight")
    stages = lists // 2 if deep else lists
    resolution = _side(stages)
    if not any(name.endswith(".u0") for name in state):
        raise ValueError("its layers are not spectrally normalized (--G_param), which fastgan's always are")
    weights = biggan_generator(dict(state))
    if "bn.running_mean" not in weights or "blocks.0.bn1.running_mean" not in weights:
        raise ValueError("its norms are no batch norms (--norm_style), which fastgan's always are")
    if state["linear.weight"].shape[0] != 16 * state["blocks.0.0.conv1.weight"].shape[1]:
        raise ValueError("its first map is not one of 4x4 pixels (--bottom_width), as fastgan's always is")
    seen = state["blocks.0.0.bn1.gain.weight"]  # [C, what BatchNorms see], or an embedding [classes, C]
    shared = state.get("shared.weight")
    z_dim, hier = first, False
    if shared is not None:
        chunk = seen.shape[1] - shared.shape[1]
        hier = chunk > 0
        z_dim = chunk if deep else chunk * (stages + 1) if hier else first
    last = state["output_layer.0.gain"].numel()
    widths = _factor(biggan_model.G_WIDTHS, resolution)
    ngf = last // widths[-1]
    outputs = [state[f"blocks.{i}.0.conv4.weight"].shape[0] for i in range(lists) if deep]
    if deep and (lists % 2 or outputs[1::2] != [ngf * width for width in widths]):
        raise ValueError("it has not two blocks a stage (--G_depth), as fastgan's BigGAN-deep always has")
    options = {
        "z_dim": z_dim,
        "c_dim": seen.shape[0] if shared is None else shared.shape[0],
        "resolution": resolution,
        "channels": state["output_layer.2.weight"].shape[0],
        "ngf": ngf,
        "shared_dim": 0 if shared is None else shared.shape[1],
        "hier": hier,
        "deep": deep,
        "attention": 0,
        "attention_behind": [i // 2 if deep else i for i in _attention_lists(state)] or None,
    }
    return weights, options


def _biggan_discriminator(state: State, source: Source) -> Converted:
    deep = "input_conv.weight" in state
    stages = _count(state, "blocks.{}.0.conv1.weight")
    first = state["input_conv.weight" if deep else "blocks.0.0.conv1.weight"]
    by_stages = {len(widths) - deep: resolution for resolution, widths in biggan_model.D_WIDTHS.items()}
    if stages not in by_stages:
        raise ValueError(f"a discriminator of {stages} stages is of no known resolution")
    resolution = by_stages[stages]
    if deep and _count(state, "blocks.0.{}.conv1.weight") != 2:
        raise ValueError("it has not two blocks a stage (--D_depth), as fastgan's BigGAN-deep always has")
    if not deep and first.shape[0] != state["blocks.0.0.conv2.weight"].shape[0]:
        raise ValueError("its blocks are narrow in their middle (without --D_wide), as fastgan's never are")
    embed = state.get("embed.weight")
    options = {
        "c_dim": 0 if embed is None else embed.shape[0],
        "resolution": resolution,
        "channels": first.shape[1],
        "ndf": first.shape[0] // biggan_model.D_WIDTHS[resolution][0],
        "deep": deep,
        "attention": 0,
        "attention_behind": _attention_lists(state) or None,
    }
    return biggan_discriminator(dict(state)), options


def _factor(widths: Mapping[int, tuple[int, ...]], resolution: int) -> tuple[int, ...]:
    if resolution not in widths:
        raise ValueError(f"a generator that doubles the side to {resolution} is of no known resolution")
    return widths[resolution]


def _attention_lists(state: State) -> list[int]:
    """Numbers of the lists of blocks that end in attention."""
    return [int(k.split(".")[1]) for k in state if re.fullmatch(r"blocks\.\d+\.\d+\.gamma", k)]


_R3GAN_NAMES = [
    (r"AggregationLayer\.Layer", "to_rgb"),
    (r"ExtractionLayer\.Layer", "from_rgb"),
    (r"EmbeddingLayer\.weight", "embedding"),
    (r"MainLayers\.\d+\.Layers\.\d+\.Basis(\.weight)?", "basis"),
    (r"MainLayers\.\d+\.Layers\.\d+\.LinearLayer\.weight", "project"),
]


def r3gan(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state_dict of a generator or discriminator of brownvc/R3GAN for models/r3gan.py."""
    generator = any("AggregationLayer" in name for name in state)
    ours = {}
    for name, tensor in state.items():
        name = name.removeprefix("Model.")
        if name.endswith("Resampler.Kernel"):
            continue
        for theirs, new in _R3GAN_NAMES:
            name = re.sub(theirs, new, name)
        if layer := re.fullmatch(r"MainLayers\.(\d+)\.Layers\.(\d+)\.(.*)", name):
            stage, i, rest = int(layer[1]), int(layer[2]), layer[3]
            if rest == "LinearLayer.Layer.weight":  # in G it leads to the stage, in D it ends it
                name = f"transitions.{stage - generator}.weight"
            else:
                rest = rest.replace("LinearLayer", "conv").replace(".Layer", "")
                rest = re.sub(r"NonLinearity(\d)\.Bias", r"bias\1", rest)
                name = f"stages.{stage}.{i - generator}.{rest}"
        if name.endswith("basis"):
            tensor = tensor.reshape(-1, 4, 4)
        elif tensor.ndim == 4 and tensor.shape[2:] == (1, 1):
            tensor = tensor[:, :, 0, 0]
        ours[name] = tensor
    return ours


def _r3gan_generator(state: State, source: Source) -> Converted:
    weights = r3gan(dict(state))
    embedding = weights.get("embedding")
    embedded = 0 if embedding is None else embedding.shape[0]
    z_dim = weights["project"].shape[1] - embedded
    options = {
        "z_dim": z_dim,
        "c_dim": 0 if embedding is None else embedding.shape[1],
        "channels": weights["to_rgb.weight"].shape[0],
    }
    if embedded not in (0, z_dim):
        options["embed_dim"] = embedded
    return weights, options | _r3gan_sizes(state, weights, reverse=False)


def _r3gan_discriminator(state: State, source: Source) -> Converted:
    weights = r3gan(dict(state))
    embedding = weights.get("embedding")
    options = {
        "c_dim": 0 if embedding is None else embedding.shape[1],
        "channels": weights["from_rgb.weight"].shape[1],
    }
    if embedding is not None and embedding.shape[0] != len(weights["basis"]):
        options["embed_dim"] = embedding.shape[0]
    return weights, options | _r3gan_sizes(state, weights, reverse=True)


def _r3gan_sizes(state: State, weights: State, reverse: bool) -> dict[str, Any]:
    if _taps([t for k, t in state.items() if k.endswith(".Kernel")]) != list(BLUR):
        raise ValueError("its resampling filter is not 1, 3, 3, 1")
    sizes = []
    for i in range(_count(weights, "stages.{}.0.conv1.weight")):
        inner, channels = weights[f"stages.{i}.0.conv1.weight"].shape
        group = weights[f"stages.{i}.0.conv2.weight"].shape[1]
        sizes.append([channels, inner // max(group, 1), _count(weights, f"stages.{i}.{{}}.conv1.weight")])
    if not sizes:
        raise ValueError("it has no stages")
    inner, channels = weights["stages.0.0.conv1.weight"].shape
    options: dict[str, Any] = {
        "resolution": _side(len(sizes) - 1),
        "expansion": inner // max(channels, 1),
        "kernel": weights["stages.0.0.conv2.weight"].shape[-1],
    }
    sizes = sizes[::-1] if reverse else sizes
    width, cardinality, blocks = sizes[0]
    base = max(channels * (4 << i) for i, (channels, _, _) in enumerate(sizes))
    try:
        usual = r3gan_model.stage_sizes(width, cardinality, 2 << len(sizes), base)
    except ValueError:
        usual = []
    if [[*size, blocks] for size in usual] != sizes:
        return options | {"sizes": sizes}
    named = {"width": width, "cardinality": cardinality, "channel_base": base, "blocks": blocks}
    return options | named


def cyclegan_generator(state: State) -> dict[str, Tensor]:
    """pytorch-CycleGAN's ResNet generator, latest_net_G_A.pth, for `cyclegan.ResNet`.

    Its layers are numbered through one Sequential: stem 1, downsampling 4 and 7, blocks from 10 on, then
    upsampling and the output; a batch norm comes behind its convolution. In a block with borders of its own
    layers the convolutions are 1 and 5, or 6 behind a dropout; with zeros for borders they are 0 and 3, or 4.
    """
    state = _without_idle_statistics(state)
    after = 10 + len({k.split(".")[1] for k in state if ".conv_block." in k})
    names = {1: "stem", 4: "down.0", 7: "down.1", after: "up.0", after + 3: "up.1", after + 7: "out"}
    names |= {2: "norms.0", 5: "norms.1", 8: "norms.2", after + 1: "norms.3", after + 4: "norms.4"}
    new = {f"model.{place}": name for place, name in names.items()}
    for place in range(10, after):
        convs, norms = _layers(state, f"model.{place}.conv_block.")
        new |= {name: f"blocks.{place - 10}.conv{i}" for i, name in enumerate(convs)}
        new |= {name: f"blocks.{place - 10}.norms.{i}" for i, name in enumerate(norms)}
    return _renamed(state, new)


def _layers(state: State, prefix: str) -> tuple[list[str], list[str]]:
    """Names of the convolutions and of the batch norms in a Sequential, both in order."""
    places = {k.removeprefix(prefix).split(".")[0] for k in state if k.startswith(prefix)}
    modules = [f"{prefix}{place}" for place in sorted(places, key=int)]
    convs = [module for module in modules if state[f"{module}.weight"].ndim == 4]
    return convs, [module for module in modules if module not in convs]


def _renamed(state: State, modules: Mapping[str, str]) -> dict[str, Tensor]:
    split = {name: name.rpartition(".") for name in state}
    return {f"{modules[split[k][0]]}.{split[k][2]}": tensor for k, tensor in state.items()}


def _check_cyclegan(state: State) -> None:
    if any(name.endswith(".filt") for name in state):
        raise ValueError("it is antialiased (--no_antialias is off), as fastgan's CycleGAN never is")
    modules = {name.rpartition(".")[0] for name in state}
    inner = [m for m in modules if state[f"{m}.weight"].ndim == 4 and f"{m}.bias" not in state]
    if inner and not any(state[f"{m}.weight"].ndim == 1 for m in modules):
        raise ValueError("it has no norms (--norm none), where fastgan's has instance or batch norms")


def _cyclegan_generator(state: State, source: Source) -> Converted:
    state = _without_idle_statistics(state)
    _check_cyclegan(state)
    weights = cyclegan_generator(state)
    out_channels, channels = weights["out.weight"].shape[0], weights["stem.weight"].shape[1]
    options = {
        "channels": channels,
        "resolution": source.resolution or 256,
        "ngf": weights["stem.weight"].shape[0],
        "blocks": _count(weights, "blocks.{}.conv0.weight"),
        "one_way": True,
        "out_channels": None if out_channels == channels else out_channels,
        "batch_norm": "norms.0.weight" in weights,
        "padding": "zero" if "model.10.conv_block.0.weight" in state else "reflect",
    }
    return {f"a_to_b.{name}": tensor for name, tensor in weights.items()}, options


def cyclegan_discriminator(state: State) -> dict[str, Tensor]:
    """pytorch-CycleGAN's PatchGAN, latest_net_D_A.pth, or PixelGAN for `cyclegan.PatchGAN`: a Sequential."""
    state = _without_idle_statistics(state)
    convs, norms = _layers(state, next(iter(state)).split(".")[0] + ".")
    new = {name: f"convs.{i}" for i, name in enumerate(convs[1:-1])}
    new |= {name: f"norms.{i}" for i, name in enumerate(norms)}
    ours = _renamed(state, new | {convs[0]: "stem", convs[-1]: "out"})
    if "out.bias" not in ours:  # of a PixelGAN with batch norm
        ours["out.bias"] = ours["out.weight"].new_zeros(1)
    return ours


def _cyclegan_discriminator(state: State, source: Source) -> Converted:
    state = _without_idle_statistics(state)
    _check_cyclegan(state)
    weights = cyclegan_discriminator(state)
    stem = weights["stem.weight"]
    layers = 0 if stem.shape[-1] == 1 else _count(weights, "convs.{}.weight")
    options = {
        "channels": stem.shape[1],
        "resolution": source.resolution or 256,
        "ndf": stem.shape[0],
        "layers": layers,
        "pool": 0,
        "one_way": True,
        "batch_norm": "norms.0.weight" in weights,
    }
    return {f"a.{name}": tensor for name, tensor in weights.items()}, options


def _without_idle_statistics(state: State) -> dict[str, Tensor]:
    """`state` without the statistics that instance norm kept in old versions and never used."""
    idle = (".running_mean", ".running_var", ".num_batches_tracked")
    return {
        k: v for k, v in state.items() if not k.endswith(idle) or f"{k.rpartition('.')[0]}.weight" in state
    }


def _is_resnet(state: Mapping[str, Any]) -> bool:
    return any(re.fullmatch(r"model\.\d+\.conv_block\.\d+\.weight", name) for name in state)


def _is_patchgan(state: Mapping[str, Any]) -> bool:
    """A Sequential "model" of 4x4 convolutions, or "net" of 1x1 ones, the first of which has a bias."""
    for root, kernel in (("model", 4), ("net", 1)):
        first = state.get(f"{root}.0.weight")
        if first is not None and f"{root}.0.bias" in state and tuple(first.shape[2:]) == (kernel, kernel):
            return all(re.fullmatch(rf"{root}\.\d+\.\w+", name) for name in state)
    return False


@dataclass(frozen=True)
class _Row:
    """Convolutions in a row, each with the BatchNorm behind it, as names of modules."""

    convs: list[str]
    norms: list[str | None]


def _row(state: Mapping[str, Any]) -> _Row | None:
    """None where there is anything but square convolutions and BatchNorms."""
    convs: list[str] = []
    norms: list[str | None] = []
    for module in dict.fromkeys(name.rpartition(".")[0] for name in state):
        weight = state.get(f"{module}.weight")
        if weight is None:
            return None
        shape = tuple(weight.shape)
        if len(shape) == 4 and shape[2] == shape[3] and min(shape) > 0:
            convs.append(module)
            norms.append(None)
        elif len(shape) == 1 and f"{module}.running_var" in state and convs and norms[-1] is None:
            norms[-1] = module
        else:
            return None
    return _Row(convs, norms) if len(convs) > 1 else None


def _is_dcgan_generator(state: Mapping[str, Any]) -> bool:
    """Transposed convolutions [in, out, k, k], each fitting the next, the first followed by BatchNorm."""
    row = _row(state)
    if row is None or row.norms[0] is None or row.norms[-1] is not None:
        return False
    shapes = [tuple(state[f"{conv}.weight"].shape) for conv in row.convs]
    norms = [None if norm is None else tuple(state[f"{norm}.weight"].shape) for norm in row.norms]
    fits = all(a[1] == b[0] for a, b in itertools.pairwise(shapes))
    return fits and all(norm in (None, (shape[1],)) for norm, shape in zip(norms, shapes, strict=True))


def _is_dcgan_discriminator(state: Mapping[str, Any]) -> bool:
    """Convolutions [out, in, k, k], each fitting the next, the last to one channel; bare at the ends."""
    row = _row(state)
    if row is None or row.norms[0] is not None or row.norms[-1] is not None:
        return False
    shapes = [tuple(state[f"{conv}.weight"].shape) for conv in row.convs]
    return shapes[-1][0] == 1 and all(a[0] == b[1] for a, b in itertools.pairwise(shapes))


def _dcgan_maps(kernels: list[int], resolution: int | None) -> dict[str, Any]:
    """resolution and blocks from the kernels, the smallest map's first.

    A kernel of stride 2 doubles the side. An odd one among even ones is there to make an odd side, 2 s - 1 (4
    to 7, which 28 pixels have). The user's `resolution` goes before.
    """
    first, *rest = kernels
    if resolution is None:
        resolution = first
        mixed = any(k % 2 == 0 for k in rest)
        for kernel in rest:
            resolution = 2 * resolution - (kernel % 2 if mixed else 0)
    halves = [-(-resolution >> i) for i in range(len(rest), -1, -1)]
    if halves[0] != first:
        raise ValueError(
            f"its first map has {first} pixels; {len(rest)} doublings do not lead from there to {resolution}"
        )
    usual = first in (4, 7) and resolution == first << len(rest)
    return {"resolution": resolution, "blocks": 0 if usual else len(rest)}


def _dcgan_sizes(
    row: _Row, state: State, kernels: list[int], widths: list[int], width: str
) -> dict[str, Any]:
    """`kernels` and `widths` from the smallest map on; `width` is the name of ngf or ndf."""
    options: dict[str, Any] = {"c_dim": 0, width: widths[-1]}
    if len(set(kernels)) == 1 and kernels[0] in (4, 5):
        options["kernel"] = kernels[0]
    else:
        options["kernels"] = kernels
    if widths != [widths[-1] << i for i in range(len(widths) - 1, -1, -1)]:
        options["widths"] = widths
    options["bias"] = any(f"{conv}.bias" in state for conv in row.convs)
    return options


def _dcgan_layers(
    row: _Row, state: State, outputs: list[int], bias: bool, places: list[tuple[int, int | None]]
) -> dict[str, Tensor]:
    """Tensors under our places of each convolution and its BatchNorm; where the peer has no BatchNorm or no
    bias, ours do nothing."""
    ours: dict[str, Tensor] = {}
    layers = zip(row.convs, row.norms, outputs, places, strict=True)
    for conv, norm, width, (place, norm_place) in layers:
        weight = ours[f"main.{place}.weight"] = state[f"{conv}.weight"]
        if bias:
            ours[f"main.{place}.bias"] = state.get(f"{conv}.bias", weight.new_zeros(width))
        if norm_place is None:
            continue
        new = f"main.{norm_place}"
        ours[f"{new}.weight"] = weight.new_full([width], math.sqrt(1 + 1e-5))  # 1e-5 is BatchNorm's own
        ours |= {f"{new}.{part}": weight.new_zeros(width) for part in ("bias", "running_mean")}
        ours[f"{new}.running_var"] = weight.new_ones(width)
        ours[f"{new}.num_batches_tracked"] = torch.tensor(0)
        if norm is not None:
            prefix = f"{norm}."
            ours |= {f"{new}.{k.removeprefix(prefix)}": t for k, t in state.items() if k.startswith(prefix)}
    return ours


def _dcgan_generator(state: State, source: Source) -> Converted:
    """pytorch/examples' generator, or any row of transposed convolutions with BatchNorm and ReLU between."""
    _check_zoo(source, {"lossCriterion": ("DCGAN", "MSE")})  # images of others do not end in tanh
    row = _row(state)
    assert row is not None
    shapes = [state[f"{conv}.weight"].shape for conv in row.convs]
    kernels = [shape[2] for shape in shapes]
    options: dict[str, Any] = {"z_dim": shapes[0][0], "channels": shapes[-1][1]}
    options |= _dcgan_maps(kernels, source.resolution)
    outputs = [shape[1] for shape in shapes]
    options |= _dcgan_sizes(row, state, kernels[1:], outputs[:-1], "ngf")
    last = len(shapes) - 1
    places = [(3 * i, 3 * i + 1 if i < last else None) for i in range(len(shapes))]
    return _dcgan_layers(row, state, outputs, options["bias"], places), options


def _dcgan_discriminator(state: State, source: Source) -> Converted:
    """pytorch/examples' discriminator, or any row of convolutions, BatchNorm and LeakyReLU 0.2 between."""
    row = _row(state)
    assert row is not None
    shapes = [state[f"{conv}.weight"].shape for conv in row.convs]
    kernels = [shape[2] for shape in shapes][::-1]
    options: dict[str, Any] = {"channels": shapes[0][1]} | _dcgan_maps(kernels, source.resolution)
    options |= {"slope": 0.2, "dropout": 0.0, "instance_noise": 0.0}
    outputs = [shape[0] for shape in shapes]
    options |= _dcgan_sizes(row, state, kernels[1:], outputs[-2::-1], "ndf")
    last = len(shapes) - 1
    places = [(0, None)] + [(3 * i - 1, 3 * i if i < last else None) for i in range(1, len(shapes))]
    return _dcgan_layers(row, state, outputs, options["bias"], places), options


G, D = "generator", "discriminator"
PEERS = (
    Peer("stylegan2", "stylegan", G, _with("synthesis.b4.const"), _stylegan2_generator),
    Peer("stylegan2", "stylegan", D, _with("b4.out.weight", "b4.fc.weight"), _stylegan2_discriminator),
    Peer("rosinality", "stylegan", G, _with("input.input", "style.1.weight"), _rosinality_generator),
    Peer("rosinality", "stylegan", D, _with("final_linear.1.weight"), _rosinality_discriminator),
    Peer("biggan", "biggan", G, _with("blocks.0.0.bn1.gain.weight", "linear.weight"), _biggan_generator),
    Peer("biggan", "biggan", D, _with("blocks.0.0.conv1.u0", "linear.weight"), _biggan_discriminator),
    Peer("progan", "progan", G, _with("formatLayer.module.weight"), _progan_generator),
    Peer("progan", "progan", D, _with("decisionLayer.module.weight"), _progan_discriminator),
    Peer("r3gan", "r3gan", G, _with("AggregationLayer.Layer.weight"), _r3gan_generator),
    Peer("r3gan", "r3gan", D, _with("ExtractionLayer.Layer.weight"), _r3gan_discriminator),
    Peer("cyclegan", "cyclegan", G, _is_resnet, _cyclegan_generator),
    Peer("cyclegan", "cyclegan", D, _is_patchgan, _cyclegan_discriminator),
    Peer("dcgan", "dcgan", G, _is_dcgan_generator, _dcgan_generator),
    Peer("dcgan", "dcgan", D, _is_dcgan_discriminator, _dcgan_discriminator),
)
UNSUPPORTED = {
    "synthesis.input.affine.weight": "a StyleGAN3, whose alias-free layers fastgan has not",
    "model.model.0.weight": "a U-Net of pytorch-CycleGAN, which fastgan has not; only its ResNets",
}
