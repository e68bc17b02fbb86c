"""A history of generated images for the discriminator (Shrivastava et al. 2017, arXiv:1612.07828, section
2.3)."""

import torch
from torch import Tensor, nn


class Pool(nn.Module):
    """`from_pool` with a memory: pairs of generated images [N, 2C, R, R] -> what D is shown of them."""

    images: Tensor
    filled: Tensor

    def __init__(self, size: int, channels: int, resolution: int):
        super().__init__()
        self.register_buffer("images", torch.zeros(size, channels, resolution, resolution))
        self.register_buffer("filled", torch.zeros([], dtype=torch.int64))

    def forward(self, fakes: Tensor) -> Tensor:
        draws = torch.rand(len(fakes), 2, device=fakes.device)
        shown, images, filled = from_pool(self.images, self.filled, fakes, draws)
        self.images.copy_(images)
        self.filled.copy_(filled)
        return shown


def from_pool(pool: Tensor, filled: Tensor, fakes: Tensor, draws: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(what D is shown [N, 2C, R, R], the new pool, the new `filled`) for pairs `fakes` [N, 2C, R, R].

    One pool for each half of the channels, K images each in `pool` [K, 2C, R, R], of which the first `filled`
    (an int64 scalar) are there. One pair after the other: while the pools fill, a pair is stored and shown;
    then each half is with probability 1/2 shown itself, else it takes the place of a stored image, which is
    shown. draws [N, 2] uniform in [0, 1): below 1/2 a half is shown itself, the rest tells the place.

    Zhu et al. 2017 (CycleGAN, section 4) have K = 50. Nothing is read back and no shape depends on the data.
    """
    size = pool.shape[0]
    pool, fakes = pool.clone(), fakes.detach()
    halves = torch.arange(2, device=pool.device)
    stored = pool.unflatten(1, (2, -1))  # a view: [K, 2, C, R, R]
    shown = []
    for fake, draw in zip(fakes.to(pool.dtype).unflatten(1, (2, -1)), draws, strict=True):
        full = filled >= size
        place = ((2 * draw - 1) * size).long().clamp(0, size - 1)
        place = torch.where(full, place, filled)
        swapped = (full & (draw >= 0.5)).view(2, 1, 1, 1)
        old = stored[place, halves]
        stored[place, halves] = torch.where(swapped | ~full, fake, old)
        shown.append(torch.where(swapped, old, fake).flatten(0, 1))
        filled = filled + (~full).to(filled.dtype)
    return torch.stack(shown).to(fakes.dtype), pool, filled
