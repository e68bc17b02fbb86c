"""The cache of decoded images."""

import errno
import fcntl
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from image_cases import message, never, noise, pixels, put
from PIL import Image
from safetensors.torch import load_file, save_file

from fastgan.data import Feed, cache, load_images, stored
from fastgan.data.decode import Fit
from fastgan.data.source import Source

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTGAN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def files(path: Path) -> list[Path]:
    return sorted(path.iterdir()) if path.exists() else []


def test_the_second_load_maps_the_cache(data: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch):
    for i in range(3):
        put(noise(16, seed=i), data / str(i % 2) / f"{i}.png")
    first = load_images("data", 16)
    [file] = files(cache_folder)
    assert file.suffix == ".safetensors"
    assert set(load_file(file)) == {"labels", "left_out_labels", "state", "images"}
    monkeypatch.setattr(stored, "decode", never)
    second = load_images("data", 16)
    assert torch.equal(first.images, second.images)
    assert first.labels is not None and second.labels is not None
    assert torch.equal(first.labels, second.labels) and first.classes == second.classes


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="asks Linux what is in memory")
def test_a_mapped_set_is_not_read_into_memory(tmp_path: Path):
    image = np.asarray(noise(128))
    path = tmp_path / "big.safetensors"
    stored.write(path, Source("big", 800, lambda i: noise(128), str, ""), Fit(128))
    images = load_images(str(path), 128)
    assert images.images.shape == (800, 3, 128, 128)
    streamed = Feed(images, CPU, resident=False)
    got, _ = streamed.batch(0, 4)
    streamed.close()
    assert (got.permute(0, 2, 3, 1).numpy() == image).all()
    smaps = Path("/proc/self/smaps").read_text()
    sizes = re.findall(re.escape(str(path)) + r"\nSize: +(\d+) kB(?:.|\n)*?\nRss: +(\d+) kB", smaps)
    assert sum(int(size) for size, _ in sizes) * 1024 >= 800 * image.nbytes
    assert sum(int(rss) for _, rss in sizes) * 1024 < 400 * image.nbytes


def test_the_cache_key_follows_files_and_options(data: Path, cache_folder: Path):
    path = data / "a.png"
    put(noise(32), path)
    (data / "b.png").write_text("bad")

    def load(resolution=16, channels=3, crop="none"):
        load_images("data", resolution, channels, crop, skip_bad=True)
        return len(files(cache_folder))

    assert load() == 1 and load() == 1
    assert load(resolution=8) == 2 and load(channels=1) == 3 and load(crop="center") == 4
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    assert load() == 5
    path.rename(data / "aa.png")
    assert load() == 6
    state = (data / "b.png").stat()
    (data / "b.png").write_text("longer")
    os.utime(data / "b.png", ns=(state.st_atime_ns, state.st_mtime_ns))
    assert load() == 7
    (data / "b.png").unlink()
    assert load() == 8
    load_images("data", 16)
    assert len(files(cache_folder)) == 9
    shutil.copytree(data, "elsewhere")  # keeps times: the same content, so the same file
    load_images("elsewhere", 16)
    assert len(files(cache_folder)) == 9


def test_a_changed_image_is_decoded_anew(data: Path):
    put(noise(16), data / "a.png")
    load_images("data", 16)
    changed = put(noise(16, seed=1), data / "a.png")
    os.utime(data / "a.png", ns=(1, 1))
    assert (pixels(load_images("data", 16)) == changed).all()


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty", "other tensors", "other shape"])
def test_a_damaged_cache_is_rebuilt_with_one_warning(data: Path, cache_folder: Path, damage: str):
    expected = put(noise(16), data / "a.png")
    load_images("data", 16)
    [file] = files(cache_folder)
    whole = file.read_bytes()
    if damage == "cut":
        file.write_bytes(whole[:-1])
    elif damage == "garbage":
        file.write_bytes(bytes(range(256)) * 4)
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "other tensors":
        save_file({"state": torch.ones(1, dtype=torch.uint8)}, file)
    else:
        images = torch.zeros(1, 16, 16, 1, dtype=torch.uint8)
        about = {"fastgan": json.dumps({"classes": [], "crop": "none", "filter": "lanczos"})}
        save_file({"state": torch.ones(1, dtype=torch.uint8), "images": images}, file, about)
    with pytest.warns(UserWarning) as caught:  # noqa: PT030
        images = load_images("data", 16)
    [warning] = caught
    assert f"ignored the damaged cache file {file}" in str(warning.message)
    assert (pixels(images) == expected).all()
    assert file.read_bytes() == whole and files(cache_folder) == [file]


def test_without_a_cache_folder_images_stay_in_memory(data: Path, monkeypatch: pytest.MonkeyPatch):
    Path("taken").touch()
    monkeypatch.setenv("FASTGAN_CACHE", "taken/cache")
    expected = put(noise(16), data / "dog" / "a.png")
    (data / "cat").mkdir()
    (data / "cat" / "bad.png").touch()
    with pytest.warns(UserWarning, match="no cache at taken/cache.*FASTGAN_CACHE") as caught:
        images = load_images("data", 16, skip_bad=True)
    assert len(caught) == 1
    assert (pixels(images) == expected).all()
    assert images.labels is not None and images.labels.tolist() == [1]
    assert images.images.shape == (1, 3, 16, 16) and images.skipped == ("data/cat/bad.png",)


def test_a_full_disk_leaves_nothing_behind(data: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    expected = put(noise(16), data / "a.png")
    with pytest.warns(UserWarning, match="No space left"):
        images = load_images("data", 16)
    assert (pixels(images) == expected).all()
    assert files(cache_folder) == []


def test_a_set_that_fails_leaves_nothing_behind(data: Path, cache_folder: Path):
    put(noise(16), data / "a.png")
    (data / "b.png").touch()
    message("data", 16)
    assert files(cache_folder) == []


def test_what_a_killed_writer_left_is_removed(data: Path, cache_folder: Path):
    put(noise(16), data / "a.png")
    load_images("data", 16)
    (made,) = cache_folder.iterdir()
    made.unlink()
    left, living = (cache_folder / f".{made.name}.{name}" for name in ("00000000", "11111111"))
    left.write_bytes(b"half")
    with open(living, "xb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        load_images("data", 16)
        assert sorted(cache_folder.iterdir()) == sorted([made, living])


def test_the_file_appears_in_the_cache_only_when_it_is_whole(tmp_path: Path):
    path = tmp_path / "cache" / "x.safetensors"

    def picture(i: int) -> Image.Image:
        assert not path.exists()
        return noise(8)

    stored.write(path, Source("three", 3, picture, str, ""), Fit(8))
    assert files(path.parent) == [path]


def test_the_cache_is_in_the_home_folder_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("FASTGAN_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.location("key") == tmp_path / ".cache" / "fastgan" / "key.safetensors"
