"""How good generated digits are, in the eyes of a small CNN that has learned real ones.

Every judge takes images as uint8 [N, H, W, C], averages them down to 8x8 and gray, and goes by a classifier
that has learned the 1,400 digits of `digits:train`; the 397 of `digits:test` are held out from it. A GAN
trained on `digits` has seen those as well, one trained on `digits:train` has not.
"""

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgan.data import load_images
from fastgan.data.digits import stored_digits
from fastgan.metrics import Moments, frechet

EPOCHS = 60  # of training a classifier
Reader = Callable[[np.ndarray], Tensor]  # images uint8 [N, H, W, C] -> classes int64 [N]


def real_digits(subset: str = "") -> tuple[Tensor, Tensor]:
    """float32 [N, 8, 8] in 0..1 and labels of the digits as stored: all, "train" or "test"."""
    images, labels = stored_digits(subset)
    return images.float() / 16, labels


def shrink(images: np.ndarray) -> Tensor:
    """uint8 [N, H, W, C] -> float32 [N, 8, 8] in 0..1, each pixel the mean over its share of the area."""
    gray = torch.from_numpy(images).float().mean(dim=3)[:, None] / 255
    k = 8 // math.gcd(8, images.shape[1])  # at a side of 28, a pixel covers 3.5: average 7 halves
    return F.adaptive_avg_pool2d(gray.repeat_interleave(k, 2).repeat_interleave(k, 3), 8)[:, 0]


def as_arrays(images: Tensor) -> np.ndarray:
    """uint8 [N, C, H, W] -> [N, H, W, C]."""
    return images.permute(0, 2, 3, 1).numpy()


def train_classifier(images: Tensor, labels: Tensor) -> nn.Sequential:
    """A CNN for images [N, 1, 8, 8] in 0..1, trained on [N, 8, 8]. Same images, same threads, same CNN."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(64 * 16, 128),
            nn.ReLU(),
            nn.Linear(128, 10),
        )
        optimizer = torch.optim.Adam(net.parameters(), 1e-3)
        for _ in range(EPOCHS):
            for batch in torch.randperm(len(images)).split(64):
                x = images[batch, None] + 0.05 * torch.randn(len(batch), 1, 8, 8)
                loss = F.cross_entropy(net(x), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return net.eval()


@lru_cache
def classifier() -> nn.Sequential:
    """The one that has learned `digits:train`."""
    return train_classifier(*real_digits("train"))


@torch.no_grad()
def accuracy(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images [N, 8, 8] to which `net` gives their label."""
    return (net(images[:, None]).argmax(dim=1) == labels).float().mean().item()


@torch.no_grad()
def judge(images: np.ndarray) -> dict[str, float]:
    """What any generator is judged by.

    accepted  share of images to which the classifier gives a class with probability 0.9 or more
    entropy   of the classes that it gives, in nats; ln 10 = 2.303 is all classes alike
    spread    mean distance between two images of one given class, as a share of the same for the stored
              digits; as training sees them, enlarged smoothly, these have 0.83 at 16 pixels and 0.81 at 32
    frechet   distance to all digits, enlarged to the images' size, in the 128 features that the last hidden
              layer gives; the scale is this classifier's own
    """
    net, small = classifier(), shrink(images)
    probability, classes = net(small[:, None]).softmax(dim=1).max(dim=1)
    shares = torch.bincount(classes, minlength=10) / len(classes)
    return {
        "accepted": (probability >= 0.9).float().mean().item(),
        "entropy": torch.special.entr(shares).sum().item(),
        "spread": spread(small, classes) / spread(*real_digits()),
        "frechet": frechet(Moments(net[:-1](small[:, None])), _real_moments(max(images.shape[1], 8))),
    }


@lru_cache
@torch.no_grad()
def _real_moments(side: int) -> Moments:
    digits = as_arrays(load_images("digits", side, channels=1).images)
    return Moments(classifier()[:-1](shrink(digits)[:, None]))


def spread(images: Tensor, classes: Tensor) -> float:
    """Mean over the classes of the mean distance between two of its images [N, 8, 8]; a class of one: 0."""
    means = []
    for k in range(10):
        mine = images[classes == k].flatten(1)
        pairs = max(len(mine) * (len(mine) - 1), 1)
        means.append(torch.cdist(mine, mine).sum() / pairs)
    return torch.stack(means).mean().item()


def asked_class(images: np.ndarray, asked: Tensor) -> float:
    """Share of images that the classifier gives the class that was asked for, int64 [N]."""
    return accuracy(classifier(), shrink(images), asked)


def tstr(images: np.ndarray, asked: Tensor) -> float:
    """Train on synthetic, test on real: held-out digits that a classifier of these images alone gets right.

    Says something about digits never seen only if the GAN has learned `digits:train`.
    """
    return accuracy(train_classifier(shrink(images), asked), *real_digits("test"))


@torch.no_grad()
def read(images: np.ndarray) -> Tensor:
    """The classes that the classifier gives to digits."""
    return classifier()(shrink(images)[:, None]).argmax(dim=1)


@lru_cache
def reader(data: str, resolution: int, channels: int) -> Reader:
    """What reads digits as they look in the set `data`, a form of the embedded digits.

    Inverted ones are inverted back for the classifier; to read another form one learns four fifths of it.
    """
    if data.endswith(":inverted"):
        return lambda images: read(255 - images)
    known = load_images(data, resolution, channels)
    if known.labels is None:
        raise ValueError(f"{data} has no classes, so that nothing can learn to read it")
    small, labels = shrink(as_arrays(known.images)), known.labels
    held_out = torch.arange(len(labels)) % 5 == 0
    net = train_classifier(small[~held_out], labels[~held_out])
    print(f"classifier of {data}: {accuracy(net, small[held_out], labels[held_out]):.1%} of held-out ones")
    return lambda images: net(shrink(images)[:, None]).argmax(dim=1)


def same_digit(first: np.ndarray, second: np.ndarray, read_second: Reader) -> float:
    """Share of pairs, of digits and of the same in another form, whose halves are read as the same digit."""
    return (read(first) == read_second(second)).float().mean().item()


def kept_class(there: np.ndarray, back: np.ndarray, labels: Tensor, read_there: Reader) -> float:
    """Share of digits read as their label both in the other form and after the way back."""
    return ((read_there(there) == labels) & (read(back) == labels)).float().mean().item()
