"""Other projects' weights under our names."""

import torch
from torch import Tensor


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
