"""Networks whose features generated images are judged by, and the classifier that TSTR trains.

inception    the TF-Inception network of the papers' FID, through torch-fidelity
classifier   a small CNN that learns the data's own labels here and now: no download, any size of images
pixels       the pixels themselves

A score by one of them says nothing about a score by another.
"""

import hashlib
import importlib
import io
import pickle
import sys
import urllib.error
from dataclasses import dataclass
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from fastgan.config import UsageError
from fastgan.data import ImageSet, cache

LAYOUT = "1"  # raise it when the classifier or its training changes, so that older ones are not read
LEAST_UPDATES, MOST_UPDATES, EPOCHS, BATCH = 600, 6000, 10, 64  # of training a classifier
RATE, NOISE = 3e-3, 0.1
MOST_PIXELS = 16  # side of the images whose pixels are features


@dataclass(frozen=True)
class FeatureNetwork:
    """A network in evaluation mode: images [N, C, H, W] in 0..255, uint8 or float -> (features [N, F], logits
    [N, K] or None)."""

    name: str
    net: nn.Module
    resize: str  # what it does to images that are not of its own size
    checksum: str  # of its weights

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.net(images)

    def __str__(self) -> str:
        return f"{self.name} {self.checksum[:12]} (resize {self.resize})"


def make(
    name: str, data: ImageSet, content: str, device: torch.device, inception: Path | None = None
) -> FeatureNetwork:
    """The network called `name` on `device`; `content` is the data's `content_hash`.

    Raises UsageError if the data, the weights or a package do not do.
    """
    if name == "inception":
        file = inception or inception_weights()
        network = FeatureNetwork(name, Inception(file), "bilinear to 299x299", file_checksum(file))
    elif name == "classifier":
        network = named(classifier_of(data, content))
    else:
        side = min(data.images.shape[-1], MOST_PIXELS)
        network = FeatureNetwork(name, Pixels(), f"area to {side}x{side}", "none")
    network.net.to(device).eval().requires_grad_(False)
    return network


def named(net: "Classifier") -> FeatureNetwork:
    """A classifier as a feature network."""
    return FeatureNetwork("classifier", net, f"area to {net.side}x{net.side}", checksum(net))


def checksum(net: nn.Module) -> str:
    """Of a network's tensors and their names, SHA-256."""
    digest = hashlib.sha256()
    for name, tensor in net.state_dict().items():
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def file_checksum(path: Path) -> str:
    """Of a file's bytes, SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_hash(data: ImageSet) -> str:
    """Of the pixels and labels, wherever they come from."""
    digest = hashlib.sha256(repr((tuple(data.images.shape), len(data.classes))).encode())
    for part in data.images.permute(0, 2, 3, 1).split(1024):
        digest.update(part.contiguous().numpy().tobytes())
    if data.labels is not None:
        digest.update(data.labels.numpy().tobytes())
    return digest.hexdigest()


def key(content: str, settings: tuple[object, ...]) -> str:
    """A name for what is made of that content by these settings."""
    return hashlib.sha256(f"{content} {settings}".encode()).hexdigest()[:32]


def shrunk(images: Tensor, side: int) -> Tensor:
    """Images of `side` pixels at most, each the mean over its share of the area."""
    return F.adaptive_avg_pool2d(images, side) if images.shape[-1] > side else images


class Pixels(nn.Module):
    """The pixels in 0..1, shrunk by area to MOST_PIXELS."""

    def forward(self, images: Tensor) -> tuple[Tensor, None]:
        """Images in 0..255 [N, C, H, W] -> (their pixels [N, F], None)."""
        return shrunk(images.float(), MOST_PIXELS).flatten(1) / 255, None


class Classifier(nn.Module):
    """Three convolutions, each followed by pooling while there are pixels left, and a hidden layer of 128.

    That layer over its root mean square on real images, `scale`, gives the features, so that scores of
    different data have about the same range. Images above 32 pixels are shrunk to that.
    """

    scale: Tensor

    def __init__(self, channels: int, classes: int, resolution: int):
        super().__init__()
        self.side = min(resolution, 32)
        layers: list[nn.Module] = []
        side, width = self.side, channels
        for wider in (32, 64, 128):
            layers += [nn.Conv2d(width, wider, 3, padding=1), nn.ReLU()]
            if side >= 8:
                layers.append(nn.MaxPool2d(2))
                side //= 2
            width = wider
        layers += [nn.AdaptiveAvgPool2d(min(side, 4)), nn.Flatten(), nn.Dropout(0.3)]
        self.hidden = nn.Sequential(*layers, nn.Linear(width * min(side, 4) ** 2, 128), nn.ReLU())
        self.head = nn.Linear(128, classes)
        self.register_buffer("scale", torch.ones([]))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images in 0..255 [N, C, H, W] -> (features [N, F], logits [N, classes])."""
        hidden = self.hidden(shrunk(images.float() / 127.5 - 1, self.side))
        return hidden / self.scale, self.head(hidden)


def train_classifier(images: Tensor, labels: Tensor, classes: int) -> Classifier:
    """A Classifier of images uint8 [N, C, H, W], made slightly noisy, and labels int64 [N].

    It is trained on the CPU: the same images, labels and number of threads give the same network, whatever
    the caller's device. Nothing is drawn from the global random state.
    """
    updates = min(max(LEAST_UPDATES, EPOCHS * len(images) // BATCH), MOST_UPDATES)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        net = Classifier(images.shape[1], classes, images.shape[2])
        optimizer = torch.optim.Adam(net.parameters(), RATE, fused=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, updates)
        order = torch.empty(0, dtype=torch.int64)
        for _ in tqdm(range(updates), desc="classifier", unit=" updates", disable=None, leave=False):
            while len(order) < BATCH:
                order = torch.cat([order, torch.randperm(len(images))])
            chosen, order = order[:BATCH], order[BATCH:]
            x = images[chosen].float()
            logits = net(x + NOISE * 127.5 * torch.randn_like(x))[1]
            loss = F.cross_entropy(logits, labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        squares = [net.eval()(part)[0].square().sum() for part in images.split(256)]
        net.scale.copy_((torch.stack(squares).sum() / (128 * len(images))).sqrt())
    return net


def classifier_of(data: ImageSet, content: str) -> Classifier:
    """The one that has learned the data's labels: from the cache, or trained and put there."""
    if data.labels is None or len(data.classes) < 2:
        raise UsageError(
            f"--features classifier learns labels, but {data.name} has none; use sub-folders as classes, "
            "--features inception or --features pixels"
        )
    images, labels, classes = data.images, data.labels, len(data.classes)

    def train() -> dict[str, Tensor]:
        return train_classifier(images, labels, classes).state_dict()

    settings = (LAYOUT, LEAST_UPDATES, MOST_UPDATES, EPOCHS, BATCH, RATE, NOISE, torch.get_num_threads())
    state = cache.remember("classifier", key(content, settings), train)
    with torch.random.fork_rng(devices=[]):
        net = Classifier(images.shape[1], classes, images.shape[2])
    net.load_state_dict(state)
    return net.eval()


@torch.no_grad()
def accuracy(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images uint8 [N, C, H, W] to which `net` gives their label."""
    parts = zip(images.split(256), labels.split(256), strict=True)
    return sum(int((net(x)[1].argmax(dim=1) == y).sum()) for x, y in parts) / len(images)


class Inception(nn.Module):
    """The features (2048) and the logits without biases (1008) that FID, KID and IS are defined by.

    Weights come from `file`, torch-fidelity's state dict, which is read as tensors only: nothing else in it
    is run. Takes uint8 images; gray ones are repeated, transparency is left out.
    """

    def __init__(self, file: Path):
        super().__init__()
        module = _torch_fidelity()
        try:
            weights = torch.load(file, map_location="cpu", weights_only=True)
            again = io.BytesIO()  # torch-fidelity unpickles whatever it is given: only what was written here
            torch.save(weights, again)
            again.seek(0)
            layers = ["2048", "logits_unbiased"]
            with torch.random.fork_rng(devices=[]):
                self.net = module.FeatureExtractorInceptionV3("inception-v3-compat", layers, again)
        except (OSError, EOFError, RuntimeError, ValueError, TypeError, pickle.UnpicklingError) as error:
            reason = " ".join(str(error).split())[:100] or type(error).__name__
            raise UsageError(
                f"{file} does not hold the weights of torch-fidelity's InceptionV3 ({reason}); "
                f"download {module.URL_INCEPTION_V3}"
            ) from None

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images in 0..255 [N, C, H, W] -> (features [N, 2048], logits [N, 1008])."""
        if images.dtype != torch.uint8:
            raise ValueError(f"the Inception network takes uint8 images: got {images.dtype}")
        return self.net(images[:, :3].expand(-1, 3, -1, -1))


def _torch_fidelity() -> ModuleType:
    """torch-fidelity's module of the Inception network.

    The package imports torchvision for its other networks, and fails where no torchvision fits the torch that
    is installed. The module itself needs none, so it is imported without the package's `__init__`.
    """
    name = "torch_fidelity"
    found = find_spec(name)
    if found is None:
        raise UsageError("--features inception needs torch-fidelity; pip install 'fastgan[metrics]'")
    present = sys.modules.get(name)
    sys.modules[name] = present or module_from_spec(found)
    try:
        return importlib.import_module(f"{name}.feature_extractor_inceptionv3")
    finally:
        if present is None:
            del sys.modules[name]


def inception_weights() -> Path:
    """The weights in the cache, downloaded if they are not there yet. UsageError if they cannot be."""
    url = _torch_fidelity().URL_INCEPTION_V3
    file = cache.location("").parent / url.rsplit("/", 1)[-1]
    if file.exists():
        return file
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # The name ends in the first digits of the file's SHA-256, which is checked.
        torch.hub.download_url_to_file(url, str(file), file.stem.rsplit("-", 1)[-1])
    except (OSError, RuntimeError, urllib.error.URLError) as error:
        raise UsageError(
            f"cannot download the Inception network ({error}); get {url} elsewhere and put it at {file}, "
            "or give --inception FILE"
        ) from None
    return file
