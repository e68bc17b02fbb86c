"""Feature networks: the classifier learns, is remembered and repeats itself; Inception is the papers' own."""

import io
import os
import sys
import urllib.error
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor

from fastgan import evaluate, features
from fastgan.config import UsageError, build_generator, make_config
from fastgan.data import ImageSet, cache, load_images
from fastgan.run_folder import save_generator

CPU = torch.device("cpu")


def digits(name: str = "digits:train", resolution: int = 8, channels: int = 1) -> ImageSet:
    return load_images(name, resolution, channels)


def network(data: ImageSet, name: str = "classifier") -> features.FeatureNetwork:
    return features.make(name, data, features.content_hash(data), CPU)


def test_the_classifier_learns(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(features, "LEAST_UPDATES", 200)
    monkeypatch.setattr(features, "EPOCHS", 1)
    found, test = network(digits()), digits("digits:test")
    assert test.labels is not None
    assert features.accuracy(found.net, test.images, test.labels) > 0.95
    hidden, logits = found(digits().images)
    assert hidden.shape == (1400, 128) and logits is not None and logits.shape == (1400, 10)
    assert hidden.square().mean().sqrt().item() == pytest.approx(1, rel=1e-5)
    torch.testing.assert_close(found(test.images.float())[0], found(test.images)[0])  # bytes or not


@pytest.mark.parametrize(("resolution", "channels"), [(8, 3), (28, 1), (64, 3), (9, 1)])
def test_the_classifier_takes_any_size(resolution: int, channels: int):
    net = features.Classifier(channels, 3, resolution).eval()
    hidden, logits = net(torch.zeros(2, channels, resolution, resolution, dtype=torch.uint8))
    assert hidden.shape == (2, 128) and logits.shape == (2, 3)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(features, "LEAST_UPDATES", 6)
    monkeypatch.setattr(features, "MOST_UPDATES", 6)


@pytest.mark.usefixtures("quick")
def test_the_classifier_is_remembered_and_repeats_itself(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = network(digits())
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(3)
    monkeypatch.setenv("FASTGAN_CACHE", os.environ["FASTGAN_CACHE"] + "/other")
    assert network(digits()).checksum == first.checksum  # learned anew
    monkeypatch.setattr(features, "train_classifier", None)
    assert network(digits()).checksum == first.checksum  # from the cache
    with pytest.raises(TypeError):  # other images: it would have to learn
        network(digits("digits:test"))
    monkeypatch.setattr(features, "LEAST_UPDATES", 5)
    with pytest.raises(TypeError):  # other settings
        network(digits())


@pytest.mark.usefixtures("quick")
def test_a_damaged_cache_is_made_anew():
    first = network(digits())
    (file,) = cache.location("").parent.glob("classifier-*")
    foreign = safetensors.torch.save({"a": torch.zeros(1)})
    for content in (file.read_bytes()[:-9], b"", foreign):
        file.write_bytes(content)
        with pytest.warns(UserWarning, match=r"damaged.*classifier"):
            assert network(digits()).checksum == first.checksum
        assert network(digits()).checksum == first.checksum


@pytest.mark.usefixtures("quick")
def test_no_cache_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTGAN_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="FASTGAN_CACHE"):
        network(digits())


def test_content_tells_sets_apart():
    data = digits()
    assert data.labels is not None
    hashes = {
        features.content_hash(d)
        for d in (
            data,
            digits(resolution=16),
            ImageSet(data.images, data.labels.flip(0), data.classes, "digits"),
            ImageSet(data.images, None, (), "digits"),
            ImageSet(data.images.flip(0), data.labels, data.classes, "digits"),
        )
    }
    assert len(hashes) == 5
    assert features.content_hash(digits()) in hashes


def test_pixels():
    data = digits(resolution=32)
    found = network(data, "pixels")
    rows, logits = found(data.images[:3])
    assert logits is None
    want = data.images[:3, 0].float().unfold(1, 2, 2).unfold(2, 2, 2).mean(dim=(3, 4)).flatten(1) / 255
    torch.testing.assert_close(rows, want)
    assert found.resize == "area to 16x16"


def test_a_classifier_without_labels():
    data = digits()
    with pytest.raises(UsageError, match=r"digits.*--features inception"):
        network(ImageSet(data.images, None, (), "digits"))


# Inception


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """torch-fidelity's own extractor, initialised at random, and a file of its weights."""
    if find_spec("torch_fidelity") is None:
        pytest.skip("torch-fidelity is not installed")
    module = features._torch_fidelity()

    class Fresh(module.FeatureExtractorInceptionV3):
        def load_state_dict(self, state: dict) -> None:
            """Keep what the constructor drew."""

    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fresh = Fresh("fresh", ["2048", "logits_unbiased"], nothing)
    file = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(fresh.state_dict(), file)
    return fresh, file


def test_inception_is_torch_fidelitys(inception: tuple[Any, Path]):
    fresh, file = inception
    before = torch.random.get_rng_state()
    data = digits(channels=1)
    found = features.make("inception", data, "", CPU, file)
    assert torch.equal(torch.random.get_rng_state(), before)
    images = data.images[:2]
    with torch.no_grad():
        rows, logits = found(images)
        theirs = fresh(images.repeat(1, 3, 1, 1))
    assert rows.shape == (2, 2048) and rows.std() > 0
    assert torch.equal(rows, theirs[0])
    assert logits is not None and torch.equal(logits, theirs[1])
    assert found.checksum == features.file_checksum(file) and found.resize == "bilinear to 299x299"
    with pytest.raises(ValueError, match="uint8"):
        found(images.float())


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("it_ran",)


def test_bad_inception_files(inception: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"fc.weight": torch.zeros(1)}, "other.pth")
    torch.save(Hostile(), "hostile.pth")
    Path("text.pth").write_text("not one")
    Path("cut.pth").write_bytes(inception[1].read_bytes()[:1000])
    for name in ("other.pth", "hostile.pth", "text.pth", "cut.pth", "missing.pth"):
        with pytest.raises(UsageError, match=rf"{name}.*download https") as caught:
            features.make("inception", digits(), "", CPU, Path(name))
        assert "\n" not in str(caught.value)
    assert not Path("it_ran").exists()


def test_downloading_inception(inception: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch):
    def fail(url: str, file: str, digits: str) -> None:
        raise urllib.error.URLError("no route to host")

    def fetch(url: str, file: str, digits: str) -> None:
        assert url.startswith("https://") and digits == "6726825d"
        Path(file).write_text("weights")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(UsageError, match=r"no route to host.*--inception FILE"):
        features.inception_weights()
    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    file = features.inception_weights()
    assert file.read_text() == "weights" and file.parent == Path(os.environ["FASTGAN_CACHE"])
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    assert features.inception_weights() == file  # once


def test_without_torch_fidelity(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(features, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'fastgan\[metrics\]'"):
        features.make("inception", digits(), "", CPU)


def test_torch_fidelity_itself_can_still_be_imported(inception: tuple[Any, Path]):
    assert "torch_fidelity" not in sys.modules or hasattr(sys.modules["torch_fidelity"], "__version__")


@pytest.mark.exhaustive
def test_fid_by_inception(inception: tuple[Any, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(20):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    config = make_config("gan", data=str(folder), resolution=8, ngf=2, ndf=2, device="cpu", precision="fp32")
    state: dict[str, Tensor] = {f"ema.{k}": v for k, v in build_generator(config).state_dict().items()}
    save_generator(tmp_path / "g.safetensors", state, config, 0)
    command = ["--weights", str(tmp_path / "g.safetensors"), "--features", "inception", "--count", "20"]
    command += ["--metrics", "fid,kid,is,pr", "--inception", str(inception[1])]
    assert evaluate.main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[:3]] == ["FID", "KID", "KID's deviation over subsets"]
    checksum = features.file_checksum(inception[1])[:12]
    said = f"20 samples, 20 of {folder} (resize lanczos), inception {checksum} (resize bilinear to 299x299)"
    assert all(line.endswith(said) for line in lines)
