"""Public implementations' weights under our names."""

import re

from torch import Tensor

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
