"""Data: the digits and folders of images."""

import io
import os
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from image_cases import message, noise, pixels, put
from PIL import Image, ImageOps
from safetensors import safe_open
from safetensors.torch import load_file

from fastgan.data import ImageSet, load_images, stored
from fastgan.data.decode import Fit
from fastgan.data.digits import FILE
from fastgan.data.source import Source

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


def test_digits_are_split_into_two_parts():
    parts = [load_images(f"digits:{part}", 8, channels=1) for part in ("train", "test")]
    assert [(len(part), part.name) for part in parts] == [(1400, "digits:train"), (397, "digits:test")]
    whole = load_images("digits", 8, channels=1)

    def counted(sets: list[ImageSet]) -> Counter[tuple[bytes, int]]:
        """How often each image with its label is there."""
        labels = [label for part in sets for label in cast(torch.Tensor, part.labels).tolist()]
        images = [image.numpy().tobytes() for part in sets for image in part.images]
        return Counter(zip(images, labels, strict=True))

    assert counted(parts) == counted([whole])
    assert parts[1].labels is not None and parts[1].labels.bincount().min() > 20


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


def test_digits_larger_than_memory_are_an_error():
    assert "at --resolution 1000000 takes" in message("digits", 1_000_000)


def test_bad_arguments_are_errors():
    assert "--channels 2" in message("digits", 8, channels=2)
    assert "--filter nearest" in message("digits", 8, filter="nearest")
    assert "--crop left" in message("digits", 8, crop="left")
    assert message("digits:tset", 8).startswith(
        "--data digits:tset is unknown; there are digits, digits:train, digits:test, digits:inverted"
    )
    assert message("digits:", 8).startswith("--data digits: is unknown; there are digits, digits:train")


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
    assert message("nowhere", 16).startswith(
        "no folder or file nowhere; --data takes digits, a folder or a zip"
    )
    way_out = "--data takes a folder or a zip of PNG, JPEG or WebP images"
    assert message("data", 16) == f"no images in data; {way_out}"
    Path("file.png").touch()
    assert message("file.png", 16).startswith("cannot read file.png; --data takes digits, a folder")


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
    expected = "data/b.png is 24x24 once cut, too small for --resolution 32; use --resolution 24 or less, or"
    assert message("data", 32, crop="center").startswith(expected)
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


@pytest.mark.parametrize("mode", ["P", "RGB", "I;16"])
def test_a_transparent_colour_becomes_white(data: Path, mode: str):
    if mode == "P":
        image = Image.fromarray(np.repeat(np.array([0, 1], np.uint8), 128).reshape(16, 16)).convert("P")
        image.putpalette([10, 20, 30, 40, 50, 60])
        put(image, data / "a.png", transparency=0)
    elif mode == "I;16":
        wide = np.repeat(np.array([300, 50 * 257], np.uint16), 128).reshape(16, 16)
        put(Image.fromarray(wide), data / "a.png", transparency=300)
    else:
        image = Image.new("RGB", (16, 16), (10, 20, 30))
        image.paste((40, 50, 60), (0, 8, 16, 16))
        put(image, data / "a.png", transparency=(10, 20, 30))
    got = pixels(load_images("data", 16))
    assert (got[:8] == 255).all() and (got[8:] == ([50] * 3 if mode == "I;16" else [40, 50, 60])).all()


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


def test_a_pipe_is_not_waited_for(data: Path):
    os.mkfifo(data / "a.png")
    put(noise(16), data / "b.png")
    assert "data/a.png is no file; remove it or use --skip-bad" in message("data", 16)
    assert load_images("data", 16, skip_bad=True).skipped == ("data/a.png",)


def test_nothing_but_bad_files_is_an_error(data: Path):
    (data / "a.png").write_text("no")
    (data / "b.png").write_text("no")
    assert message("data", 16, skip_bad=True).startswith("none of the 2 images in data can be decoded")


def test_skip_bad_does_not_skip_images_that_do_not_fit(data: Path):
    put(noise(32, 16), data / "a.png")
    assert "must be square" in message("data", 16, skip_bad=True)


def test_decoding_keeps_few_images_in_memory(monkeypatch: pytest.MonkeyPatch):
    calls = []
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(stored, "decode", lambda source, i, fit: calls.append(i))
    decoded = stored.decoded(Source("x", 1000, str, str, ""), Fit(16), ())
    next(decoded)
    time.sleep(0.05)
    assert len(calls) <= 9
    assert len(list(decoded)) == 999 and sorted(calls) == list(range(1000))


def test_progress_is_shown_on_a_terminal_only(data: Path, monkeypatch: pytest.MonkeyPatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    put(noise(16), data / "a.png")
    for stream, shown in ((io.StringIO(), False), (Terminal(), True)):
        monkeypatch.setattr(sys, "stderr", stream)
        load_images("data", 16 if shown else 8)
        assert ("decoding" in stream.getvalue()) == shown
