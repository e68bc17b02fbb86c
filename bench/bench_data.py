"""The feed, from the digits, a folder's cache and a prepared file, and a folder's first read.

`resident` sets lie on the device, mapped ones are gathered by a thread. `fraction_of_step` is the median
time of a batch over that of a training step which consumes it: the part of a run that the feed could cost at
worst, with nothing overlapped. `images_per_second` is what the feed delivers, `step_images_per_second` what
the step consumes; `gan` has the fastest step of all families. Together they show whether loading could be a
bottleneck. Run it by pytest bench/bench_data.py --benchmark-only
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bench.settings import configs, rounds, speed
from fastgan import prepare
from fastgan.config import Config
from fastgan.data import Feed, load_images
from fastgan.data.feed import Batch
from fastgan.engine import Engine
from fastgan.limit import synchronize
from fastgan.profile import timed

IMAGES = 96  # in the folder


@pytest.fixture
def folder(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Noise at the case's resolution, which no format can compress: the worst to decode. Own cache."""
    monkeypatch.setenv("FASTGAN_CACHE", str(tmp_path / "cache"))
    side = request.getfixturevalue("config").resolution
    (tmp_path / "photos").mkdir()
    rng = np.random.default_rng(0)
    for i in range(IMAGES):
        pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{i:04d}.png")
    return str(tmp_path / "photos")


# A feed knows nothing of the family that it feeds.
EAGER = [case for case in configs() if not (case.values[0].compile or case.values[0].cond)]
FASTEST = [case for case in configs(families=True) if case.values[0].arch == "gan"]


@pytest.mark.parametrize("resident", [True, False], ids=["resident", "mapped"])
@pytest.mark.parametrize("source", ["digits", "folder", "prepared"])
@pytest.mark.parametrize("config", EAGER + FASTEST)
def test_feed(benchmark, config: Config, source: str, resident: bool, folder: str, tmp_path: Path):
    device = torch.device(config.device)
    data = "digits" if source == "digits" else folder
    if source == "prepared":
        data = str(tmp_path / "photos.safetensors")
        assert prepare.main([folder, data]) == 0
    images = load_images(data, config.resolution, config.channels)
    feed = Feed(images, device, mirror=True, resident=resident)
    drawn = 0

    def batch() -> Batch:
        nonlocal drawn
        drawn_now = feed.batch(drawn, config.step_images)
        drawn += config.step_images
        synchronize(device)
        return drawn_now

    real, _ = benchmark.pedantic(batch, rounds=rounds(benchmark, 50), warmup_rounds=3)
    engine = Engine(config, device)
    seconds = benchmark.stats.stats.median
    step = timed(lambda: engine.step(*batch()), device, 0.0)
    feed.close()
    benchmark.extra_info.update(
        speed(config, seconds),
        fraction_of_step=round(seconds / step, 4),
        step_images_per_second=round(config.step_images / step, 1),
    )
    assert real.shape == (config.step_images, config.channels, config.resolution, config.resolution)


@pytest.mark.parametrize("config", EAGER)
def test_first_read_of_a_folder(benchmark, config: Config, folder: str, tmp_path: Path, monkeypatch):
    """Finding, decoding and caching, once for a folder."""
    caches = iter(range(1000))

    def fresh():
        monkeypatch.setenv("FASTGAN_CACHE", str(tmp_path / f"cache{next(caches)}"))

    images = benchmark.pedantic(
        lambda: load_images(folder, config.resolution, config.channels), setup=fresh, rounds=3
    )
    benchmark.extra_info.update(images_per_second=round(IMAGES / benchmark.stats.stats.median, 1))
    assert len(images) == IMAGES
