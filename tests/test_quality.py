"""The judge of generated digits: real ones pass, noise, grayness and repetition do not."""

import numpy as np
import torch

from bench import quality


def as_images(digits: torch.Tensor) -> np.ndarray:
    return (digits * 255).round().byte().numpy()[..., None].repeat(2, axis=1).repeat(2, axis=2)


def test_judge():
    images, labels = quality.real_digits()
    net = quality.train_classifier(images[:1400], labels[:1400], epochs=25)
    assert (net(images[1400:, None]).argmax(dim=1) == labels[1400:]).float().mean() >= 0.97
    real = quality.judge(net, as_images(images))
    assert real["accepted"] > 0.95
    assert real["entropy"] > 2.29
    assert 0.97 < real["spread"] < 1.03
    noise = quality.judge(net, np.random.default_rng(0).integers(0, 256, (300, 16, 16, 3), dtype=np.uint8))
    assert noise["accepted"] < 0.7 or noise["entropy"] < 2
    one_each = torch.stack([images[labels == k][0] for k in range(10)]).repeat(30, 1, 1)
    assert quality.judge(net, as_images(one_each))["spread"] < 0.05
    zeros = quality.judge(net, as_images(images[labels == 0]))
    assert zeros["entropy"] < 0.2
