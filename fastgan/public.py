"""Weights of public implementations under our names: state dicts in, state dicts out.

The functions are differentiable and copy nothing, so that gradients can be compared through them.
"""

import math
import re

import torch
from torch import Tensor


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
    larger = math.sqrt(group / (group - 1))
    for layer in ("fromrgb.0", "blocks.0.1"):  # what the last 4x4 sees, grown or not
        out |= {f"{layer}.{part}": out[f"{layer}.{part}"] * larger for part in ("weight", "bias")}
    features, deviation = out["b4.conv.weight"].split([out["b4.conv.weight"].shape[1] - 1, 1], dim=1)
    out["b4.conv.weight"] = torch.cat([features / larger, deviation], dim=1)
    return out


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


def _count(state: dict[str, Tensor], name: str, first: int = 0) -> int:
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
    """Blocks in one list, not one a stage; a weight with a u0 beside it is spectrally normalized."""
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
        elif not name.startswith("sv"):  # what sigma last was
            ours[f"{owner}.{'weight' if name == 'gain' else name}".lstrip(".")] = tensor
    return ours


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


def cyclegan_generator(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """pytorch-CycleGAN's ResNet generator, latest_net_G_A.pth, for `cyclegan.ResNet`.

    Its layers are numbered through one Sequential: stem 1, downsampling 4 and 7, blocks from 10 on, then
    upsampling and the output. In a block the second convolution comes fifth, or sixth behind a dropout.
    """
    after = 10 + len({k.split(".")[1] for k in state if ".conv_block." in k})
    names = {"1": "stem", "4": "down.0", "7": "down.1"}
    names |= {str(after): "up.0", str(after + 3): "up.1", str(after + 7): "out"}

    def ours(name: str) -> str:
        block = re.fullmatch(r"model\.(\d+)\.conv_block\.([156])\.(weight|bias)", name)
        if block:
            place, conv, kind = block.groups()
            return f"blocks.{int(place) - 10}.conv{int(conv != '1')}.{kind}"
        _, place, kind = name.split(".")
        return f"{names[place]}.{kind}"

    return {ours(name): tensor for name, tensor in _cyclegan_convolutions(state).items()}


def cyclegan_discriminator(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """pytorch-CycleGAN's PatchGAN, latest_net_D_A.pth, for `cyclegan.PatchGAN`: a Sequential."""
    state = _cyclegan_convolutions(state)
    places = sorted({int(k.split(".")[1]) for k in state})
    names = {place: f"convs.{i}" for i, place in enumerate(places[1:-1])}
    names |= {places[0]: "stem", places[-1]: "out"}
    return {f"{names[int(k.split('.')[1])]}.{k.split('.')[2]}": v for k, v in state.items()}


def _cyclegan_convolutions(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state` without the statistics that instance norm kept in old versions and never used."""
    kept = {k: v for k, v in state.items() if "running_" not in k and "num_batches_tracked" not in k}
    for name, tensor in kept.items():
        if name.endswith("weight") and tensor.ndim != 4:
            raise ValueError(f"{name} belongs to a batch norm; only networks made with --norm instance load")
    return kept
