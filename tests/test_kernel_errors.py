"""What the operations say to arguments that don't fit: the argument, its value, what is allowed."""

import re

import pytest
import torch
from torch._dynamo.exc import Unsupported

from fastgan.kernels.bias_act import bias_act
from fastgan.kernels.conv2d_resample import conv2d_resample
from fastgan.kernels.conv_transpose_bn_act import conv2d_bn_act, conv_transpose2d_bn_act
from fastgan.kernels.minibatch_stddev import minibatch_stddev
from fastgan.kernels.modulated_conv2d import modulated_conv2d
from fastgan.kernels.norm_act import adain, batch_norm_act, conditional_batch_norm_act
from fastgan.kernels.pixel_norm import pixel_norm
from fastgan.kernels.upfirdn2d import upfirdn2d

X, W, WT = torch.ones(2, 3, 4, 4), torch.ones(5, 3, 3, 3), torch.ones(3, 5, 4, 4)
THREE, FIVE, STYLES = torch.ones(3), torch.ones(5), torch.ones(2, 3)
META = torch.ones(3, device="meta")
BATCH_NORM = (FIVE, FIVE, FIVE, FIVE)

ERRORS = {
    "rank": (ValueError, r"x must be \[N, C, H, W\].*\[3\]", lambda: upfirdn2d(THREE, None)),
    "rank of a convolution": (ValueError, r"x must be \[N, C", lambda: conv2d_resample(THREE, W)),
    "rank of stddev": (ValueError, r"x must be \[N, C", lambda: minibatch_stddev(THREE)),
    "no channels": (ValueError, r"x must be \[N, C", lambda: pixel_norm(THREE)),
    "integer x": (TypeError, "x must be a floating tensor: got torch.int64", lambda: bias_act(X.long())),
    "integer weight": (TypeError, "w must be a floating tensor", lambda: conv2d_resample(X, W.long())),
    "integer style": (
        TypeError,
        "styles must be a floating",
        lambda: modulated_conv2d(X, W, STYLES.int()),
    ),
    "device of b": (ValueError, "b must be on x's device cpu: got meta", lambda: bias_act(X, META)),
    "device of f": (ValueError, "f must be on x's device cpu: got meta", lambda: upfirdn2d(X, META)),
    "device of gain": (ValueError, "scale must be on", lambda: batch_norm_act(X, META, THREE, THREE, THREE)),
    "device of gamma": (
        ValueError,
        "gamma must be on x's device",
        lambda: conv2d_bn_act(X, W, META, FIVE, FIVE, FIVE),
    ),
    "activation": (ValueError, "act must be one of linear, .*'gelu'", lambda: bias_act(X, act="gelu")),
    "shape of b": (ValueError, r"b must have shape \[3\].*\[5\]", lambda: bias_act(X, FIVE)),
    "dim": (ValueError, r"dim must lie in \[-4, 3\].*7", lambda: bias_act(X, dim=7)),
    "clamp": (ValueError, "clamp must be None or at least 0: got -1", lambda: bias_act(X, clamp=-1)),
    "filter": (ValueError, r"f must have one or two dimensions", lambda: upfirdn2d(X, torch.ones(1, 1, 1))),
    "filter of a convolution": (
        ValueError,
        "f must have one or two",
        lambda: conv2d_resample(X, W, torch.ones(1, 1, 1), up=2),
    ),
    "filter too large": (ValueError, "smaller than the 6x6 filter", lambda: upfirdn2d(X, torch.ones(6, 6))),
    "factor": (ValueError, "up must be at least 1: got 0", lambda: upfirdn2d(X, None, up=0)),
    "padding": (ValueError, "padding must be an int", lambda: upfirdn2d(X, None, padding=[1, 2, 3])),
    "nothing left": (ValueError, "padding .* leaves x", lambda: conv2d_resample(X, torch.ones(5, 3, 7, 7))),
    "channels": (
        ValueError,
        r"w must be \[Cout, 3 / groups",
        lambda: conv2d_resample(X, torch.ones(5, 4, 3, 3)),
    ),
    "groups": (ValueError, "groups 2 dividing", lambda: conv2d_resample(X, W, groups=2)),
    "bias": (ValueError, r"bias must have shape \[5\]", lambda: conv2d_resample(X, W, bias=THREE)),
    "weight": (ValueError, "weight must be", lambda: modulated_conv2d(X, torch.ones(5, 4, 3, 3), STYLES)),
    "styles": (ValueError, r"styles must be \[2, 3\]", lambda: modulated_conv2d(X, W, torch.ones(2, 5))),
    "noise": (
        ValueError,
        r"noise must be \[2, 1, 4, 4\] or \[4, 4\]: got \[8, 8\]",
        lambda: modulated_conv2d(X, W, STYLES, torch.ones(8, 8), padding=1),
    ),
    "groups of stddev": (
        ValueError,
        "group_size must divide the batch",
        lambda: minibatch_stddev(X[:1].expand(5, 3, 4, 4), 2),
    ),
    "channels of stddev": (ValueError, "num_channels must divide", lambda: minibatch_stddev(X, 2, 2)),
    "transposed weight": (
        ValueError,
        r"weight must be \[Cin, Cout, kh, kw\] with Cin 3",
        lambda: conv_transpose2d_bn_act(X, torch.ones(4, 5, 4, 4), *BATCH_NORM),
    ),
    "gamma": (
        ValueError,
        r"gamma must have shape \[5\]",
        lambda: conv_transpose2d_bn_act(X, WT, THREE, FIVE, FIVE, FIVE),
    ),
    "one value": (
        ValueError,
        "more than one value a channel",
        lambda: conv2d_bn_act(X[:1], torch.ones(5, 3, 4, 4), *BATCH_NORM, padding=0),
    ),
    "output padding": (
        ValueError,
        "output_padding belongs to a transposed",
        lambda: conv2d_bn_act(X, WT.transpose(0, 1), *BATCH_NORM, output_padding=1),
    ),
    "upsample": (
        ValueError,
        "upsample must be 1 or 2: got 3",
        lambda: conditional_batch_norm_act(X, STYLES, STYLES, None, None, upsample=3),
    ),
    "per-sample gain": (
        ValueError,
        r"gain must be \[2, 3\]",
        lambda: conditional_batch_norm_act(X, THREE, STYLES, None, None),
    ),
    "scale": (ValueError, r"scale must be \[2, 3\]", lambda: adain(X, THREE, STYLES)),
    "evaluation": (
        ValueError,
        "evaluation needs running_mean",
        lambda: batch_norm_act(X, None, None, None, None, training=False),
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_an_error_names_the_argument(case: str):
    kind, message, call = ERRORS[case]
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.parametrize("case", ["rank of a convolution", "integer x", "device of b", "noise", "gamma"])
def test_the_same_error_under_compile(case: str):
    kind, message, call = ERRORS[case]
    torch._dynamo.reset()
    with pytest.raises(kind, match=message):
        torch.compile(call, backend="eager")()
    torch._dynamo.reset()
    with pytest.raises(Unsupported) as caught:  # one graph has no way to raise
        torch.compile(call, backend="eager", fullgraph=True)()
    assert re.search(message, f"{caught.value} {caught.value.__cause__}")  # the former with torch 2.11
