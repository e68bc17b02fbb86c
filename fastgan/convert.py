"""Other projects' weights under our names."""

import re

from torch import Tensor


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
