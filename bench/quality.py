"""Are generated digits digits? python -m bench.quality IMAGES.npz [...]

A small CNN learns the embedded digits at 8x8 (1,400 to learn from, 397 held out; the figure is printed) and
judges `images` uint8 [N, H, W, C] of files written by `python -m fastgan.generate --format npz`:

    accepted   share of images to which it gives a class with probability 0.9 or more
    entropy    of the classes that it predicts, in nats; ln 10 = 2.303 is all classes alike
    spread     mean distance between two images of one predicted class, as a share of the same for real digits
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import fastgan.data

DIGITS = Path(fastgan.data.__file__).parent / "digits.safetensors"
LEARN = 1400


def real_digits() -> tuple[Tensor, Tensor]:
    """float32 [1797, 8, 8] in 0..1 and labels, shuffled by a fixed seed."""
    tensors = load_file(DIGITS)
    order = torch.randperm(len(tensors["labels"]), generator=torch.Generator().manual_seed(0))
    return tensors["images"][order].float() / 16, tensors["labels"][order].long()


def train_classifier(images: Tensor, labels: Tensor, epochs: int = 60) -> nn.Module:
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
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            x = images[batch, None] + 0.05 * torch.randn(len(batch), 1, 8, 8)
            loss = F.cross_entropy(net(x), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return net.eval()


def spread(images: Tensor, classes: Tensor) -> float:
    """Mean over the classes of the mean distance between two of its images [N, 8, 8]; a class of one: 0."""
    means = []
    for k in range(10):
        mine = images[classes == k].flatten(1)
        pairs = max(len(mine) * (len(mine) - 1), 1)
        means.append(torch.cdist(mine, mine).sum() / pairs)
    return torch.stack(means).mean().item()


@torch.no_grad()
def judge(net: nn.Module, images: np.ndarray) -> dict[str, float]:
    """uint8 [N, H, W, C] with a side that is a multiple of 8."""
    gray = torch.from_numpy(images).float().mean(dim=3)[:, None] / 255
    small = F.adaptive_avg_pool2d(gray, 8)
    probability, classes = net(small).softmax(dim=1).max(dim=1)
    shares = torch.bincount(classes, minlength=10) / len(classes)
    real, labels = real_digits()
    return {
        "accepted": (probability >= 0.9).float().mean().item(),
        "entropy": -torch.special.xlogy(shares, shares).sum().item(),
        "spread": spread(small[:, 0], classes) / spread(real, labels),
    }


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit("usage: python -m bench.quality IMAGES.npz [...]")
    images, labels = real_digits()
    net = train_classifier(images[:LEARN], labels[:LEARN])
    right = (net(images[LEARN:, None]).argmax(dim=1) == labels[LEARN:]).float().mean()
    print(f"classifier: {right:.1%} of {len(labels) - LEARN} held-out real digits")
    for path in sys.argv[1:]:
        with np.load(path, allow_pickle=False) as arrays:
            result = judge(net, arrays["images"])
        print(f"{path}: " + ", ".join(f"{name} {value:.3f}" for name, value in result.items()))


if __name__ == "__main__":
    main()
