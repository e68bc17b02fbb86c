"""Network files as stylegan2-ada-pytorch and stylegan3 write them, made of a state dict.

NVIDIA's persistent classes pickle an object as a call of torch_utils.persistence._reconstruct_persistent_obj
with the class's name, the source code of its module and its attributes. Neither code base is here: classes of
the same names are made up, and their modules hold functions that fail when they are called.
"""

import pickle
import re
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

BUFFERS = ("resample_filter", "noise_const", "w_avg", "p", "Hz_geom")
SOURCE = "raise SystemExit('the source code of a pickle was run')\n" * 3


def _reconstruct_persistent_obj(meta: dict) -> Any:
    raise AssertionError("a function of the pickle was called")


class EasyDict(dict):
    """As dnnlib's, a dict whose items are attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


EasyDict.__module__, EasyDict.__qualname__ = "dnnlib.util", "EasyDict"
_reconstruct_persistent_obj.__module__ = "torch_utils.persistence"


class Persistent(nn.Module):
    class_name = ""

    def __reduce__(self) -> tuple:
        state = {k: v for k, v in self.__dict__.items() if k != "class_name"}
        meta = dict(type="class", version=6, module_src=SOURCE, class_name=self.class_name, state=state)
        return _reconstruct_persistent_obj, (meta,), None

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return self.__reduce__()


def _class_name(path: str, generator: bool) -> str:
    name = path.rpartition(".")[2]
    if not path:
        return "Generator" if generator else "Discriminator"
    if re.fullmatch(r"b\d+", name):
        return (
            "SynthesisBlock"
            if generator
            else "DiscriminatorEpilogue"
            if name == "b4"
            else "DiscriminatorBlock"
        )
    if re.fullmatch(r"fc\d*|embed|affine|out", name):
        return "FullyConnectedLayer"
    names = {"mapping": "MappingNetwork", "synthesis": "SynthesisNetwork", "torgb": "ToRGBLayer"}
    names |= {"mbstd": "MinibatchStdLayer"}
    convs = "SynthesisLayer" if generator and name.startswith("conv") else "Conv2dLayer"
    return names.get(name, convs)


def module(
    state: dict[str, Tensor], kwargs: dict[str, Any], attributes: dict[str, dict[str, Any]]
) -> Persistent:
    """The module of `state`, made with `kwargs`; `attributes` are those of classes, by their names."""
    generator = any(name.startswith("synthesis.") for name in state)

    def make(path: str) -> Persistent:
        made = Persistent()
        made.class_name = _class_name(path, generator)
        made.__dict__ |= attributes.get(made.class_name, {})
        made.__dict__ |= {"_init_args": (), "_init_kwargs": EasyDict(kwargs if not path else {})}
        if made.class_name == "FullyConnectedLayer":
            made.__dict__ |= {"activation": "lrelu" if re.search(r"\.fc\d*$", path) else "linear"}
            lr_multiplier = attributes.get("MappingNetwork", {}).get("lr_multiplier", 0.01)
            made.__dict__ |= {"weight_gain": np.float64(0.5)}  # as numpy's square root makes it
            made.__dict__ |= {"bias_gain": lr_multiplier if "mapping.fc" in path else 1}
        return made.eval()

    root = make("")
    for name, tensor in state.items():
        *modules, leaf = name.split(".")
        place = root
        for i, part in enumerate(modules):
            if part not in place._modules:
                place.add_module(part, make(".".join(modules[: i + 1])))
            place = place._modules[part]
            assert place is not None
        if leaf in BUFFERS:
            place.register_buffer(leaf, tensor.clone())
        else:
            place.register_parameter(leaf, nn.Parameter(tensor.clone()))
    return root.requires_grad_(False)


def save(path: Path, root: Any, monkeypatch: pytest.MonkeyPatch, protocol: int = 4) -> None:
    """Pickle `root` as if it were of their code bases, which are gone afterwards."""
    with monkeypatch.context() as patch:
        for name in ("torch_utils", "torch_utils.persistence", "dnnlib", "dnnlib.util"):
            patch.setitem(sys.modules, name, types.ModuleType(name))
        sys.modules["torch_utils.persistence"].__dict__["_reconstruct_persistent_obj"] = (
            _reconstruct_persistent_obj
        )
        sys.modules["dnnlib.util"].__dict__["EasyDict"] = EasyDict
        path.write_bytes(pickle.dumps(root, protocol))


def augment_pipe() -> Persistent:
    made = Persistent()
    made.class_name = "AugmentPipe"
    made.register_buffer("p", torch.tensor(0.25))
    made.register_buffer("Hz_geom", torch.ones(12))
    made.__dict__ |= {"xflip": 1.0, "xint_max": 0.125}
    return made
