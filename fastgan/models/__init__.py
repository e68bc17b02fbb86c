"""The families, one paper a file: `--arch NAME` is the module of that name, PRESETS in config.py its recipe.

Each has a Generator and a Discriminator, a class or a function that makes a module. Their parameters are
passed by name from the configuration: `resolution`, `channels`, `c_dim` (number of classes, 0: none),
`dtype` (of convolutions), `z_dim`, and every other field of Config that has the parameter's name. What the
engine asks of a Generator:

    z_dim, c_dim        dimensions of its latent and of its labels
    normals, uniforms   how many unit normal and uniform numbers a training sample takes
    sample(normal [N, normals], uniform [N, uniforms], c [N, c_dim] or None)
        -> (images [N, C, R, R], latents behind them)
    forward(z [N, z_dim], c) -> images in about -1..1

and of a Discriminator:

    features(images, c) -> its last hidden representation
    head(features, c) -> logits
    forward(images, c) -> head(features(images, c), c)

A family may also have:

    DOMAINS = 2                     in its module: images are pairs, joined along channels [N, 2C, R, R]
    G.translates                    samples come from images: `c` is a real pair, z_dim is 0
    G.penalties(images, c) -> dict  more for G to minimise, already weighted
    G.grow(growth), D.grow(growth)  progressive growing; G.match_reals(images) gives reals the fakes' size
    D.pool(images) -> images        generated images as D is shown them, past ones among them
    D.homogeneous                   D takes a `scale` too: see losses.homogeneous_logits
"""

from importlib import import_module
from types import ModuleType
from typing import Any

Generator = Any  # what the engine asks of it is above; families owe each other no common class
Discriminator = Any


def family(arch: str) -> ModuleType:
    """The module of `--arch`."""
    return import_module(f"{__name__}.{arch.replace('-', '_')}")
