"""Minibatch standard deviation (Karras et al. 2018, section 3): the discriminator sees how its batch varies.

    y = concat(x, mean_{c, h, w} sqrt(var_group(x) + 1e-8))

Member i of group n is sample i * (N / group_size) + n, as in StyleGAN2.
"""

import torch
from torch import Tensor


def minibatch_stddev_ref(x: Tensor, group_size: int, num_channels: int) -> Tensor:
    c, h, w = x.shape[1:]
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    y = y.reshape(group_size, -1, num_channels, c // num_channels, h, w)
    y = (y.var(dim=0, correction=0) + 1e-8).sqrt().mean(dim=[2, 3, 4])  # [n / group_size, num_channels]
    y = y.reshape(-1, num_channels, 1, 1).repeat(group_size, 1, h, w)
    return torch.cat([x, y.to(x.dtype)], dim=1)


def minibatch_stddev(x: Tensor, group_size: int | None = 4, num_channels: int = 1) -> Tensor:
    """x [N, C, H, W] -> [N, C + num_channels, H, W]; the statistics are computed in fp32.

    `group_size` None, or larger than the batch, means the whole batch.
    Raises ValueError when the groups do not divide the batch or `num_channels` does not divide the channels.
    """
    if x.ndim != 4:
        raise ValueError(f"x must be [N, C, H, W]: got shape {list(x.shape)}")
    n, c = x.shape[:2]
    group = n if group_size is None else min(group_size, n)
    if group < 1 or n % group:
        raise ValueError(f"group_size must divide the batch: got group_size {group_size} and batch {n}")
    if num_channels < 1 or c % num_channels:
        raise ValueError(f"num_channels must divide the {c} channels of x: got {num_channels}")
    return minibatch_stddev_ref(x, group, num_channels)
