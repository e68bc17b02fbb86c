"""Blocks that two or more families use."""

import torch.nn.functional as F
from torch import Tensor, nn


def weigh(x: Tensor, layer: nn.Module, bias: bool = True) -> Tensor:
    """A linear layer or convolution in x's dtype, with its bias or without."""
    assert isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d)
    weight = layer.weight.to(x.dtype)
    b = layer.bias.to(x.dtype) if bias and layer.bias is not None else None
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, b)
    stride, padding = layer.stride[0], int(layer.padding[0])
    if isinstance(layer, nn.ConvTranspose2d):
        return F.conv_transpose2d(x, weight, b, stride, padding, layer.output_padding[0])
    return F.conv2d(x, weight, b, stride, padding)
