"""The random numbers behind samples."""

import numpy as np
import torch
from torch import Tensor


def latents(seed: int, count: int, z_dim: int, bound: float | None = None, first: int = 0) -> Tensor:
    """float32 [count, z_dim], the i-th a function of (seed, first + i) alone.

    `bound` redraws every number beyond it, the truncation trick on z (Brock et al. 2018, section 3.1).
    """
    z = np.empty((count, z_dim), np.float32)
    for i in range(count):
        rng = np.random.default_rng([seed, first + i])
        z[i] = rng.standard_normal(z_dim, np.float32)
        while bound is not None and (far := np.abs(z[i]) > bound).any():
            z[i, far] = rng.standard_normal(int(far.sum()), np.float32)
    return torch.from_numpy(z)
