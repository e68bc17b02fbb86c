"""fastgan: every classic GAN family, trained fast."""

from typing import Any

__version__ = "0.1.0"


def load(path: Any, network: str = "generator", device: str = "auto") -> Any:
    """A trained network, ready to use: of a run's folder, a .safetensors of ours, or a public checkpoint.

        G = fastgan.load("runs/00000-stylegan-digits")
        images = G.sample(16, seed=0)  # uint8 [16, H, W, C]
        images = G(torch.randn(16, G.z_dim), truncation=0.7)  # float32 [16, C, H, W] in about -1..1
        D = fastgan.load("runs/00000-stylegan-digits", network="discriminator")

    `fastgan.pretrained` says what is returned and raised.
    """
    from fastgan import pretrained  # here, so that importing fastgan imports no torch

    return pretrained.load(path, network, device)
