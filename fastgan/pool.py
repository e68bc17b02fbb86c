"""A history of generated images for the discriminator (Shrivastava et al. 2017, arXiv:1612.07828, section
2.3; 50 images in Zhu et al. 2017, section 4)."""

import torch
from torch import Tensor, nn


class Pool(nn.Module):
    """The state of `from_pool`, saved with the network that it belongs to: `size` pairs [2C, R, R]."""

    images: Tensor
    filled: Tensor

    def __init__(self, size: int, shape: tuple[int, int, int]):
        super().__init__()
        self.register_buffer("images", torch.zeros(size, *shape))
        self.register_buffer("filled", torch.zeros([], dtype=torch.int64))

    def forward(self, fakes: Tensor) -> Tensor:
        """What the discriminator is to see for `fakes` [N, 2C, R, R]."""
        draws = torch.rand(len(fakes), 2, device=fakes.device)
        return from_pool(self.images, self.filled, fakes, draws)


@torch.no_grad()
def from_pool(pool: Tensor, filled: Tensor, fakes: Tensor, draws: Tensor) -> Tensor:
    """Pairs to show instead of `fakes` [N, 2C, R, R]; moves `pool` and `filled` in place.

    Each half of the channels has a pool of its own: K images in pool [K, 2C, R, R], of which the first
    `filled` (an int64 scalar) are there. One pair after the other: while the pools fill, a pair is stored and
    shown; then each half is with probability 1/2 shown itself, else it takes the place of a stored image,
    which is shown. draws [N, 2] uniform in [0, 1): below 1/2 a half is shown itself, the rest is the place.

    Nothing is read back and no shape depends on the data.
    """
    size = len(pool)
    halves = torch.arange(2, device=pool.device)
    stored = pool.unflatten(1, (2, -1))  # a view: [K, 2, C, R, R]
    shown = []
    for fake, draw in zip(fakes.to(pool.dtype).unflatten(1, (2, -1)), draws, strict=True):
        full = filled >= size
        place = torch.where(full, ((2 * draw - 1) * size).long().clamp(0, size - 1), filled)
        swapped = (full & (draw >= 0.5)).view(2, 1, 1, 1)
        old = stored[place, halves]
        stored[place, halves] = torch.where(swapped | ~full, fake, old)
        shown.append(torch.where(swapped, old, fake).flatten(0, 1))
        filled += ~full
    return torch.stack(shown).to(fakes.dtype)
