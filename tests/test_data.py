"""Data: the digits, folders of images, their cache, and the endless shuffle."""

import errno
import io
import os
import re
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastgan.config import UsageError
from fastgan.data import Feed, ImageSet, cache, feed, folder, load_images
from fastgan.data.digits import FILE

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTGAN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that the tests call `data`."""
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    return Path("data")


def noise(width: int, height: int | None = None, seed: int = 0) -> Image.Image:
    shape = (height or width, width, 3)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def put(image: Image.Image, path: Path, **options) -> np.ndarray:
    """Save an image, make its folder if need be, return its pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return np.asarray(image)


def pixels(images: ImageSet, i: int = 0) -> np.ndarray:
    return images.images[i].permute(1, 2, 0).numpy()


def message(*arguments, **options) -> str:
    """The one line of the UsageError that load_images raises."""
    with pytest.raises(UsageError) as caught:
        load_images(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# The digits


def test_digits_are_the_uci_set():
    digits = load_images("digits", 8, channels=1)
    assert (len(digits), digits.name, digits.skipped) == (1797, "digits", ())
    assert digits.classes == ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")
    assert digits.images.shape == (1797, 1, 8, 8) and digits.images.dtype == torch.uint8
    assert digits.labels is not None and digits.labels.dtype == torch.int64
    assert digits.labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    first_rows = torch.tensor([[0, 0, 5, 13, 9, 1, 0, 0], [0, 0, 13, 15, 10, 15, 5, 0]])
    assert torch.equal(digits.images[0, 0, :2], (first_rows * 255 / 16).round().to(torch.uint8))


def test_digits_file_holds_the_originals_and_their_credit():
    stored = load_file(FILE)
    assert {name: (x.dtype, tuple(x.shape)) for name, x in stored.items()} == {
        "images": (torch.uint8, (1797, 8, 8)),
        "labels": (torch.uint8, (1797,)),
    }
    assert (stored["images"].min(), stored["images"].max()) == (0, 16)
    with safe_open(FILE, framework="pt") as file:
        credit = " ".join(file.metadata().values())
    assert "Alpaydin" in credit and "Kaynak" in credit and "CC BY 4.0" in credit


@pytest.mark.parametrize("resolution", [9, 32, 64])
def test_digits_are_enlarged_smoothly(resolution: int):
    small, large = load_images("digits", 8).images[:300], load_images("digits", resolution).images[:300]
    assert large.shape == (300, 3, resolution, resolution)
    assert (large == large[:, :1]).all()
    # A value that wrapped round instead of being clamped would be black within white.
    assert (large.float().mean((1, 2, 3)) - small.float().mean((1, 2, 3))).abs().max() < 12
    if resolution % 8 == 0:
        shrunk = torch.nn.functional.interpolate(large.float(), 8, mode="area")
        assert (shrunk - small.float()).abs().mean() < 12
    if resolution == 64:
        assert large.float().diff(dim=-1).abs().max() < 100, "there are steps"
        assert large.unique().numel() > 200


def test_too_small_a_resolution_is_an_error(data: Path):
    assert message("digits", 7) == "--resolution 7 is too small; use 8 or more"
    put(noise(16), data / "a.png")
    assert message("data", 4) == "--resolution 4 is too small; use 8 or more"


def test_bad_arguments_are_errors():
    assert "--channels 4" in message("digits", 8, channels=4)
    assert "--crop left" in message("digits", 8, crop="left")


# Folders


def test_images_at_the_top_have_no_labels(data: Path):
    b = put(noise(16, seed=1), data / "b.PNG")
    a = put(noise(16, seed=2), data / "a.png")
    put(noise(16), data / ".hidden.png")
    put(noise(16), data / ".thumbnails" / "a.png")
    put(noise(16), data / "c.bmp")
    (data / "notes.txt").write_text("not an image")
    (data / "empty").mkdir()
    images = load_images("data", 16)
    assert (images.labels, images.classes, images.name, images.skipped) == (None, (), "data", ())
    assert images.images.shape == (2, 3, 16, 16) and images.images.dtype == torch.uint8
    assert images.images.is_contiguous(memory_format=torch.channels_last)
    assert (pixels(images, 0) == a).all() and (pixels(images, 1) == b).all()


def test_sub_folders_are_classes(data: Path):
    dogs = put(noise(16, seed=1), data / "dog" / "1.png")
    cats = put(noise(16, seed=2), data / "cat" / "9.png")
    deep = put(noise(16, seed=3), data / "cat" / "old" / "1.png")
    put(noise(16, seed=4), data / "cat" / ".old" / "1.png")
    images = load_images("data", 16)
    assert images.classes == ("cat", "dog")
    assert images.labels is not None and images.labels.dtype == torch.int64
    assert images.labels.tolist() == [0, 0, 1]
    assert [(pixels(images, i) == x).all() for i, x in enumerate([cats, deep, dogs])] == [True] * 3


def test_jpeg_and_webp_are_read(data: Path):
    for name in ("a.jpg", "b.jpeg", "c.JPG", "d.webp"):
        put(noise(16), data / name)
    images = load_images("data", 16)
    for i, name in enumerate(sorted(os.listdir(data))):
        with Image.open(data / name) as image:
            assert (pixels(images, i) == np.asarray(image.convert("RGB"))).all()


def test_a_jpeg_with_several_pictures_gives_the_first(data: Path):
    put(noise(16), data / "a.jpg", format="MPO", save_all=True, append_images=[noise(16, seed=1)])
    with Image.open(data / "a.jpg") as image:
        assert image.format == "MPO"
        first = np.asarray(image)
    assert (pixels(load_images("data", 16)) == first).all()


def test_links_to_folders_are_followed_but_not_for_ever(data: Path):
    put(noise(16), Path("elsewhere/1.png"))
    (data / "cat").symlink_to(Path("elsewhere").resolve())
    (data / "dog").symlink_to(Path("elsewhere").resolve())
    for name in ("loop", "again"):  # without care, every level doubles the paths
        (Path("elsewhere") / name).symlink_to(data.resolve())
    (Path("elsewhere") / "self").symlink_to(".")
    images = load_images("data/", 16)
    assert images.classes == ("cat", "dog") and images.name == "data/"
    assert images.labels is not None and images.labels.tolist() == [0, 1]


def test_images_beside_class_folders_are_an_error(data: Path):
    put(noise(16), data / "cat" / "1.png")
    put(noise(16), data / "stray.png")
    assert message("data", 16).startswith("data has class folders, but data/stray.png is in none of them;")


def test_missing_and_empty_folders_are_errors(data: Path):
    way_out = "; --data takes digits or a folder of PNG, JPEG or WebP images"
    assert message("nowhere", 16) == "no folder nowhere" + way_out
    assert message("data", 16) == "no images in data" + way_out
    Path("file.png").touch()
    assert message("file.png", 16) == "no folder file.png" + way_out


def test_a_folder_called_digits_can_be_named(data: Path):
    data.rename("digits")
    put(noise(16), Path("digits/a.png"))
    assert len(load_images("./digits", 16)) == 1
    assert len(load_images("digits", 16)) == 1797


# Size and crop


def test_square_images_are_demanded(data: Path):
    put(noise(64, 48), data / "a.png")
    assert message("data", 16) == "images must be square: data/a.png is 64x48; use --crop center"


@pytest.mark.parametrize(("size", "box"), [((64, 48), (8, 0, 56, 48)), ((48, 65), (0, 8, 48, 56))])
def test_center_crop_takes_the_middle_and_resizes_with_lanczos(data: Path, size, box):
    image = noise(*size)
    put(image, data / "a.png")
    images = load_images("data", 16, crop="center")
    expected = image.crop(box).resize((16, 16), Image.Resampling.LANCZOS)
    assert (pixels(images) == np.asarray(expected)).all()


def test_too_small_images_are_an_error(data: Path):
    put(noise(40, 24), data / "b.png")
    expected = "data/b.png is 40x24, too small for --resolution 32; use --resolution 24 or less, or remove it"
    assert message("data", 32, crop="center") == expected
    assert load_images("data", 24, crop="center").images.shape == (1, 3, 24, 24)


def test_the_first_bad_file_in_order_is_named(data: Path):
    for i in range(40):
        put(noise(16 if i % 2 else 12), data / f"{i:02}.png")
    assert message("data", 16).startswith("data/00.png is 12x12")


# Modes


GRAY = np.arange(256, dtype=np.uint8).reshape(16, 16)


def modes() -> dict[str, tuple[Image.Image, np.ndarray]]:
    """Images in each mode that files have, with the RGB that they mean."""
    gray, colour = Image.fromarray(GRAY), noise(16)
    same = np.stack([GRAY] * 3, -1)
    wide = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    palette = colour.quantize(16)
    clear = Image.new("L", (16, 16), 255)
    clear.paste(0, (0, 0, 8, 16))
    rgba, gray_alpha = colour.copy(), gray.copy()
    rgba.putalpha(clear)
    gray_alpha.putalpha(clear)
    on_white, gray_on_white = np.asarray(colour).copy(), same.copy()
    on_white[:, :8] = gray_on_white[:, :8] = 255
    return {
        "L": (gray, same),
        "1": (gray.convert("1"), np.asarray(gray.convert("1").convert("RGB"))),
        "P": (palette, np.asarray(palette.convert("RGB"))),
        "RGBA": (rgba, on_white),
        "LA": (gray_alpha, gray_on_white),
        "I;16": (Image.fromarray(wide), np.stack([(wide / 257).round().astype(np.uint8)] * 3, -1)),
    }


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", modes())
def test_modes_are_converted(data: Path, mode: str, channels: int):
    image, expected = modes()[mode]
    assert image.mode == mode
    put(image, data / "a.png")
    with Image.open(data / "a.png") as saved:
        assert saved.mode == mode
    if channels == 1:
        expected = np.asarray(Image.fromarray(expected).convert("L"))[..., None]
    assert (pixels(load_images("data", 16, channels)) == expected).all()


def test_half_transparent_pixels_are_blended_with_white(data: Path):
    put(Image.new("RGBA", (16, 16), (0, 100, 200, 51)), data / "a.png")
    expected = [round(255 * 0.8 + 0.2 * value) for value in (0, 100, 200)]
    assert (pixels(load_images("data", 16)) == expected).all()


@pytest.mark.parametrize("mode", ["P", "RGB"])
def test_a_transparent_colour_becomes_white(data: Path, mode: str):
    if mode == "P":
        image = Image.fromarray(np.repeat(np.array([0, 1], np.uint8), 128).reshape(16, 16)).convert("P")
        image.putpalette([10, 20, 30, 40, 50, 60])
        put(image, data / "a.png", transparency=0)
    else:
        image = Image.new("RGB", (16, 16), (10, 20, 30))
        image.paste((40, 50, 60), (0, 8, 16, 16))
        put(image, data / "a.png", transparency=(10, 20, 30))
    got = pixels(load_images("data", 16))
    assert (got[:8] == 255).all() and (got[8:] == [40, 50, 60]).all()


def test_cmyk_is_converted(data: Path):
    put(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), data / "a.jpg")
    got = pixels(load_images("data", 16)).astype(int)
    assert (abs(got - [255, 0, 0]) <= 3).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_honoured(data: Path, orientation: int):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = noise(24, 16)
    put(image, data / "a.png", exif=exif)
    with Image.open(data / "a.png") as saved:
        upright = ImageOps.exif_transpose(saved)
    side = 4 if upright.width == 24 else 0
    expected = upright.crop((side, 4 - side, side + 16, 4 - side + 16))
    assert (orientation > 4) == (side == 0)
    assert (pixels(load_images("data", 16, crop="center")) == np.asarray(expected)).all()


# Bad files


def break_file(kind: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "truncated":
        put(noise(32), path)
        path.write_bytes(path.read_bytes()[:-1000])
    elif kind == "damaged":
        put(noise(32), path)
        whole = bytearray(path.read_bytes())
        whole[100:300] = bytes(200)
        path.write_bytes(whole)
    elif kind == "text":
        path.write_text("<html>404</html>")
    elif kind == "empty":
        path.touch()
    elif kind == "other format":
        noise(32).save(path, format="GIF")
    elif kind == "dangling link":
        path.symlink_to("nowhere.png")
    elif kind == "bomb":
        put(noise(64), path)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 32 * 32)


@pytest.mark.parametrize(
    "kind", ["truncated", "damaged", "text", "empty", "other format", "dangling link", "bomb"]
)
def test_files_that_cannot_be_decoded(data: Path, monkeypatch: pytest.MonkeyPatch, kind: str):
    good = put(noise(32), data / "cat" / "a.png"), put(noise(32, seed=1), data / "dog" / "c.png")
    break_file(kind, data / "cat" / "b.png", monkeypatch)
    text = message("data", 32)
    assert re.fullmatch(r"data/cat/b.png cannot be decoded \((.+)\); remove it or use --skip-bad", text), text
    assert text.count("b.png") == 1, "Pillow's message names the file once more"
    for _ in range(2):  # the second from the cache
        images = load_images("data", 32, skip_bad=True)
        assert images.skipped == ("data/cat/b.png",)
        assert images.labels is not None and images.labels.tolist() == [0, 1]
        assert [(pixels(images, i) == x).all() for i, x in enumerate(good)] == [True, True]


def test_truncated_jpeg_is_bad(data: Path):
    put(noise(64), data / "a.jpg")
    (data / "a.jpg").write_bytes((data / "a.jpg").read_bytes()[:1500])
    assert "data/a.jpg cannot be decoded" in message("data", 16)


def test_nothing_but_bad_files_is_an_error(data: Path):
    (data / "a.png").write_text("no")
    (data / "b.png").write_text("no")
    assert message("data", 16, skip_bad=True).startswith("none of the 2 images in data can be decoded")


def test_skip_bad_does_not_skip_images_that_do_not_fit(data: Path):
    put(noise(32, 16), data / "a.png")
    assert "must be square" in message("data", 16, skip_bad=True)


# The cache


def never(*_):
    raise AssertionError("decoded again")


def files(path: Path) -> list[Path]:
    return sorted(path.iterdir()) if path.exists() else []


def test_the_second_load_maps_the_cache(data: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch):
    for i in range(3):
        put(noise(16, seed=i), data / str(i % 2) / f"{i}.png")
    first = load_images("data", 16)
    [file] = files(cache_folder)
    assert file.suffix == ".safetensors"
    assert set(load_file(file)) == {"kept", "images"}
    monkeypatch.setattr(folder, "decode", never)
    second = load_images("data", 16)
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.labels, second.labels) and first.classes == second.classes  # pyright: ignore


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="asks Linux what is in memory")
def test_a_mapped_set_is_not_read_into_memory(tmp_path: Path):
    image = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    path = tmp_path / "big.safetensors"
    cache.write(path, 800, image.shape, (image for _ in range(800)))
    kept, images = cache.mapped(path, 800, image.shape)
    assert (int(kept.sum()), images.shape) == (800, (800, 128, 128, 3))
    streamed = Feed(ImageSet(images.permute(0, 3, 1, 2), None, (), "big"), CPU, resident=False)
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
        save_file({"kept": torch.ones(1, dtype=torch.uint8)}, file)
    else:
        images = torch.zeros(1, 16, 16, 1, dtype=torch.uint8)
        save_file({"kept": torch.ones(1, dtype=torch.uint8), "images": images}, file)
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


def test_the_file_appears_in_the_cache_only_when_it_is_whole(tmp_path: Path):
    path, image = tmp_path / "cache" / "x.safetensors", np.zeros((8, 8, 1), np.uint8)

    def slow():
        for _ in range(3):
            assert not path.exists()
            yield image

    cache.write(path, 3, image.shape, slow())
    assert files(path.parent) == [path]


def test_the_cache_is_in_the_home_folder_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("FASTGAN_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.location("key") == tmp_path / ".cache" / "fastgan" / "key.safetensors"


def test_decoding_keeps_few_images_in_memory(monkeypatch: pytest.MonkeyPatch):
    calls = []
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(folder, "decode", lambda path, *_: calls.append(path))
    decoded = folder.decode_all([str(i) for i in range(1000)], 16, 3, "none", False)
    next(decoded)
    time.sleep(0.05)
    assert len(calls) <= 9
    assert len(list(decoded)) == 999 and sorted(calls, key=int) == [str(i) for i in range(1000)]


def test_progress_is_shown_on_a_terminal_only(data: Path, monkeypatch: pytest.MonkeyPatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    put(noise(16), data / "a.png")
    for stream, shown in ((io.StringIO(), False), (Terminal(), True)):
        monkeypatch.setattr(sys, "stderr", stream)
        load_images("data", 16 if shown else 8)
        assert ("decoding" in stream.getvalue()) == shown


# The feed


def numbered(count: int, channels: int = 3, labels: bool = True) -> ImageSet:
    """Images that tell which they are (pixel 0, 0) and whether they are flipped (the last column is 255)."""
    images = torch.zeros(count, 8, 8, channels, dtype=torch.uint8)
    images[:, 0, :7, 0] = torch.arange(count, dtype=torch.uint8)[:, None]
    images[:, :, 7] = 255
    labels_ = torch.arange(count) * 10 if labels else None
    return ImageSet(images.permute(0, 3, 1, 2), labels_, (), "numbered")


def which(images: torch.Tensor) -> list[int]:
    return images[:, 0, 0, 4].tolist()


def flipped(images: torch.Tensor) -> list[bool]:
    return (images[:, 0, 5, 0] == 255).tolist()


BOTH = pytest.mark.parametrize("resident", [True, False])


@BOTH
@pytest.mark.parametrize("channels", [1, 3])
def test_a_batch_is_what_it_says(resident: bool, channels: int):
    images = numbered(50, channels)
    batch, labels = Feed(images, CPU, resident=resident).batch(0, 16)
    assert batch.shape == (16, channels, 8, 8) and batch.dtype == torch.uint8
    assert batch.is_contiguous(memory_format=torch.channels_last)
    assert labels is not None and labels.dtype == torch.int64
    assert labels.tolist() == [10 * i for i in which(batch)]
    assert torch.equal(batch, images.images[which(batch)])
    assert Feed(numbered(50, labels=False), CPU, resident=resident).batch(0, 16)[1] is None


@BOTH
def test_each_epoch_is_a_new_permutation(resident: bool):
    drawn = Feed(numbered(50), CPU, resident=resident)
    epochs = [which(drawn.batch(50 * i, 50)[0]) for i in range(4)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, range(50)]}) == 5


@BOTH
@pytest.mark.parametrize("mirror", [False, True])
def test_a_draw_depends_on_seed_and_place_alone(resident: bool, mirror: bool):
    def make(seed=3):
        return Feed(numbered(50), CPU, seed, mirror, resident)

    whole, labels = make().batch(0, 230)
    resumed = make()
    for start, count in [
        (225, 5),
        (7, 32),
        (39, 32),
        (71, 32),
        (0, 1),
        (49, 2),
        (103, 127),
        (39, 32),
        (10**12, 3),
    ]:
        batch, classes = resumed.batch(start, count)
        if start < 230:
            assert torch.equal(batch, whole[start : start + count])
            assert torch.equal(classes, labels[start : start + count])  # pyright: ignore
    assert not torch.equal(make(seed=4).batch(0, 230)[0], whole)
    far = make().batch(10**12, 3)[0]
    assert torch.equal(far, batch)  # pyright: ignore


def test_the_shuffle_is_the_same_for_ever():
    order, flips = feed.shuffled(10, seed=1, epoch=2)
    assert order.tolist() == [2, 0, 9, 5, 7, 1, 6, 4, 8, 3]
    assert flips.tolist() == [0, 1, 0, 1, 1, 0, 1, 0, 0, 0]


def test_orders_of_epochs_and_seeds_are_unrelated():
    seen = {tuple(feed.shuffled(20, seed, epoch)[0]) for seed in range(20) for epoch in range(20)}
    assert len(seen) == 400
    first = np.bincount([feed.shuffled(10, 0, epoch)[0][0] for epoch in range(2000)], minlength=10)
    assert first.min() > 140 and first.max() < 260


@BOTH
def test_mirror_flips_half_of_the_draws(resident: bool):
    images = numbered(200)
    batch, _ = Feed(images, CPU, mirror=True, resident=resident).batch(0, 1000)
    assert batch.is_contiguous(memory_format=torch.channels_last)
    flips = torch.tensor(flipped(batch))
    assert 430 < int(flips.sum()) < 570
    upright = torch.where(flips.view(-1, 1, 1, 1), batch.flip(3), batch)
    assert torch.equal(upright, images.images[which(upright)])
    per_image = torch.zeros(200).index_add(0, torch.tensor(which(upright)), flips.float())
    assert per_image.min() < 5 and per_image.max() > 0 and per_image.unique().numel() > 3
    assert not any(flipped(Feed(images, CPU, resident=resident).batch(0, 1000)[0]))


def test_only_two_epochs_are_kept():
    drawn = Feed(numbered(10), CPU)
    drawn.batch(0, 55)
    assert drawn.epoch.cache_info().currsize == 2
    misses = drawn.epoch.cache_info().misses
    for start in (42, 48, 44):
        drawn.batch(start, 6)
    assert drawn.epoch.cache_info().misses == misses


def test_streaming_takes_the_batch_that_the_thread_gathered(monkeypatch: pytest.MonkeyPatch):
    streamed = Feed(numbered(50), CPU, resident=False)
    asked = []
    gather = streamed.gather
    monkeypatch.setattr(streamed, "gather", lambda *request: asked.append(request) or gather(*request))
    for i in range(5):
        streamed.batch(8 * i, 8)
    streamed.close()
    assert asked[:5] == [(8 * i, 8) for i in range(5)], "each gathered once"


def test_streamed_batches_are_not_overwritten():
    streamed, resident = (Feed(numbered(50), CPU, mirror=True, resident=r) for r in (False, True))
    batches = [streamed.batch(8 * i, 8)[0] for i in range(20)]
    assert torch.equal(torch.cat(batches), resident.batch(0, 160)[0])


def test_an_error_in_the_thread_is_raised(monkeypatch: pytest.MonkeyPatch):
    streamed = Feed(numbered(50), CPU, resident=False)
    streamed.batch(0, 8)
    streamed.close()
    streamed = Feed(numbered(50), CPU, resident=False)
    monkeypatch.setattr(streamed, "ahead", ((0, 8), streamed.thread.submit(never)))
    with pytest.raises(AssertionError, match="decoded again"):
        streamed.batch(0, 8)


def test_a_streaming_process_ends_by_itself():
    code = """if True:
        import torch
        from fastgan.data import Feed, load_images
        feed = Feed(load_images("digits", 8), torch.device("cpu"), resident=False)
        feed.batch(0, 8)
        """
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, check=False, timeout=60, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_residence_is_decided_by_free_memory(monkeypatch: pytest.MonkeyPatch):
    assert feed.fits(1000, CPU) and not feed.fits(1 << 60, CPU)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 5000))
    cuda = torch.device("cuda", 0)
    assert feed.fits(500, cuda) and not feed.fits(501, cuda)
    assert Feed(numbered(5), CPU).resident
    monkeypatch.setattr(feed, "fits", lambda size, device: size < 5 * 3 * 64)
    assert not Feed(numbered(5), CPU).resident and Feed(numbered(4), CPU).resident
    assert Feed(numbered(5), CPU, resident=True).resident


@BOTH
def test_images_are_not_copied_on_the_cpu(resident: bool):
    images = numbered(50)
    assert Feed(images, CPU, resident=resident).rows.data_ptr() == images.images.data_ptr()
    plain = ImageSet(images.images.contiguous(), images.labels, (), "plain layout")
    expected, got = (Feed(x, CPU, resident=resident).batch(0, 99)[0] for x in (images, plain))
    assert torch.equal(expected, got)
    assert got.is_contiguous(memory_format=torch.channels_last)


def test_a_resident_batch_never_waits_for_the_device():
    # Meta tensors have no values: anything that reads one raises.
    batch, labels = Feed(numbered(50), torch.device("meta"), mirror=True, resident=True).batch(40, 20)
    assert batch.device.type == "meta" and batch.shape == (20, 3, 8, 8)
    assert labels is not None and labels.device.type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@BOTH
def test_cuda_gives_the_same_batches_without_a_sync(resident: bool):
    images, cuda = numbered(50), torch.device("cuda", 0)
    on_cpu = Feed(images, CPU, mirror=True)
    on_cuda = Feed(images, cuda, mirror=True, resident=resident)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch calls this mode a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        batches = [on_cuda.batch(16 * i, 16) for i in range(40)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for i, (batch, labels) in enumerate(batches):
        expected, classes = on_cpu.batch(16 * i, 16)
        assert batch.device == cuda and batch.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(batch.cpu(), expected)
        assert torch.equal(labels.cpu(), classes)  # pyright: ignore


def test_a_small_batch_takes_well_under_a_millisecond():
    drawn = Feed(load_images("digits", 32), CPU, mirror=True, resident=True)
    times = []
    for i in range(300):
        begin = time.perf_counter()
        drawn.batch(32 * i, 32)
        times.append(time.perf_counter() - begin)
    assert sorted(times)[150] < 1e-3
