"""Zips, dataset.json, arrays, crops and the tables of Hugging Face: what they mean, and bad ones refused."""

import io
import json
import os
import struct
import sys
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_cases import message, noise, pixels, put
from PIL import Image
from safetensors.numpy import save_file

from fastgan import train
from fastgan.config import PRESETS, UsageError, make_config
from fastgan.data import ImageSet, archive, arrays, labels, load_images


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def pack(entries: dict[str, Any], path: str = "data.zip", method: int = zipfile.ZIP_STORED) -> str:
    """A zip: images, bytes, and what becomes JSON."""
    with zipfile.ZipFile(path, "w", method) as file:
        for name, entry in entries.items():
            entry = png(entry) if isinstance(entry, Image.Image) else entry
            file.writestr(name, entry if isinstance(entry, bytes) else json.dumps(entry))
    return path


def labels_of(images: ImageSet) -> list[int]:
    assert images.labels is not None and images.labels.dtype == torch.int64
    return images.labels.tolist()


# The layout of stylegan2-ada and stylegan3

NAMES = ["00000/img00000000.png", "00000/img00000001.png", "00001/img00000002.png"]


def layout(given: Any) -> dict[str, Any]:
    return {name: noise(16, seed=i) for i, name in enumerate(NAMES)} | {"dataset.json": {"labels": given}}


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_with_dataset_json(data: Path, method: int):
    images = load_images(pack(layout([[n, 2 * i] for i, n in enumerate(NAMES)]), method=method), 16)
    assert images.classes == ("0", "1", "2", "3", "4") and labels_of(images) == [0, 2, 4]
    assert [(pixels(images, i) == np.asarray(noise(16, seed=i))).all() for i in range(3)] == [True] * 3
    assert images.images.is_contiguous(memory_format=torch.channels_last)
    assert load_images(pack(layout(None)), 16).labels is None
    windows = [[n.replace("/", "\\"), 0] for n in NAMES]
    assert labels_of(load_images(pack(layout(windows)), 16)) == [0, 0, 0]
    wrapped = {f"photos/{name}": entry for name, entry in layout([[n, 1] for n in NAMES]).items()}
    assert labels_of(load_images(pack(wrapped), 16)) == [1, 1, 1]


def test_a_folder_with_dataset_json(data: Path):
    for i, name in enumerate(NAMES):
        put(noise(16, seed=i), data / name)
    (data / "dataset.json").write_text(json.dumps({"labels": [[n, i] for i, n in enumerate(NAMES)]}))
    images = load_images("data", 16)
    assert images.classes == ("0", "1", "2") and labels_of(images) == [0, 1, 2]
    (data / "dataset.json").write_text(json.dumps({"labels": [[n, 2 - i] for i, n in enumerate(NAMES)]}))
    assert labels_of(load_images("data", 16)) == [2, 1, 0], "labels of an older cache file"
    (data / "dataset.json").write_text('{"labels": null}')
    assert load_images("data", 16).classes == ()


def test_classes_of_a_dataset_json_are_called_by_their_folders_if_those_are_theirs(data: Path):
    def classes(*given: tuple[str, int]) -> tuple[str, ...]:
        entries: dict[str, Any] = {name: noise(16) for name, _ in given}
        images = load_images(pack(entries | {"dataset.json": {"labels": list(given)}}), 16)
        assert labels_of(images) == [label for _, label in sorted(given)]
        return images.classes

    assert classes(("dog/1.png", 0), ("cat/1.png", 1), ("cat/2.png", 1)) == ("dog", "cat")
    assert classes(("dog/1.png", 0), ("cat/1.png", 1), ("dog/2.png", 1)) == ("0", "1")
    assert classes(("dog/1.png", 0), ("cat/1.png", 0), ("cow/1.png", 1)) == ("0", "1")
    assert classes(("dog/1.png", 0), ("cat/1.png", 2)) == ("0", "1", "2")
    assert classes(("dog/1.png", 0), ("1.png", 1)) == ("0", "1")
    assert classes(("00000/1.png", 0), ("00000/2.png", 0)) == ("0",)


def test_a_zip_of_class_folders(data: Path):
    entries = {
        "dog/1.png": noise(16, seed=1),
        "./cat/1.png": noise(16),
        "__MACOSX/cat/._1.png": b"",
        "notes.txt": b"",
    }
    for root in ("", "pets/"):
        images = load_images(pack({root + name: entry for name, entry in entries.items()}), 16)
        assert images.classes == ("cat", "dog") and labels_of(images) == [0, 1]
    assert load_images(pack({"all/1.png": noise(16), "all/2.png": noise(16)}), 16).classes == ()


def test_labels_that_do_not_match(data: Path):
    given = [[NAMES[0], 1], [NAMES[1], 0], ["00009/gone.png", 1]]
    for source in ("zip", "folder"):
        if source == "folder":
            for i, name in enumerate(NAMES):
                put(noise(16, seed=i), data / name)
            (data / "dataset.json").write_text(json.dumps({"labels": given}))
        name = pack(layout(given)) if source == "zip" else "data"
        said = message(name, 16)
        assert said.startswith(
            f"dataset.json of {name} has no label for {NAMES[2]}; mend dataset.json or use"
        )
        images = load_images(name, 16, skip_bad=True)
        assert labels_of(images) == [1, 0]
        assert images.skipped == (f"{name}/{NAMES[2]}", f"{name}/00009/gone.png")
    both = [[n, 0] for n in NAMES] + given[2:]
    assert "names 00009/gone.png, which is not there" in message(pack(layout(both)), 16)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([[NAMES[0], 0], [NAMES[0], 1]], "gives '00000/img00000000.png' two labels, 0 and 1"),
        ([[NAMES[0], 0.5]], 'must list ["image.png", class number]: got'),
        ([[NAMES[0], True]], "must list"),
        ([[NAMES[0]]], "must list"),
        ([[NAMES[0], [0, 1]]], "[0, 1]]; mend it, or remove it to train without it"),
        ([["x" * 500, None]], "..."),
        ({NAMES[0]: 0}, 'must hold {"labels": [["image.png", 0], ...]}'),
        ([[n, -2] for n in NAMES], "holds the label -2; labels count from 0"),
        ([[n, 10**30] for n in NAMES], "holds the label 1000000000000000000000000000000; there may be 65536"),
    ],
)
def test_labels_that_are_none(data: Path, given: Any, words: str):
    said = message(pack(layout(given)), 16)
    assert words in said and "data.zip" in said and len(said) < 300


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"[" * 100_000, b"\xff\xfe", b"9" * 5000])
def test_a_listing_that_is_no_json(data: Path, text: bytes):
    assert "data.zip/dataset.json" in message(pack({NAMES[0]: noise(16), "dataset.json": text}), 16)


# Hostile zips


@pytest.mark.parametrize(
    "name", ["../a.png", "/etc/a.png", "x/../../a.png", "..\\a.png", "C:\\a.png", "../x/"]
)
def test_paths_out_of_a_zip_are_refused(data: Path, name: str):
    assert "a path out of it: not a zip to trust" in message(pack({"ok.png": noise(16), name: b""}), 16)


def test_two_entries_of_one_name_are_refused(data: Path):
    name = pack({"a.png": noise(16), "./a.png": noise(16, seed=1)})
    assert "holds 'a.png' twice" in message(name, 16)


def test_what_a_zip_unpacks_to_is_bounded(data: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(archive, "LARGEST_IMAGE", 1 << 20)
    monkeypatch.setattr(labels, "LARGEST_FILE", 1 << 20)
    good = noise(16)
    name = pack({"a.png": good, "b.png": bytes(2 << 20)}, method=zipfile.ZIP_DEFLATED)
    assert "data.zip/b.png unpacks to 2 MiB, more than 1; remove it" in message(name, 16)
    assert load_images(name, 16, skip_bad=True).skipped == ("data.zip/b.png",)
    name = pack({"a.png": good, "dataset.json": bytes(2 << 20)}, method=zipfile.ZIP_DEFLATED)
    assert "dataset.json unpacks to 2 MiB: no list of labels" in message(name, 16)
    put(good, data / "a.png")
    (data / "dataset.json").write_bytes(bytes(2 << 20))
    assert "data/dataset.json is larger than 1 MiB" in message("data", 16)


def test_a_zip_that_understates_its_size_is_not_unpacked_whole(data: Path):
    """64 MiB of zeros that say they are 1000 bytes."""
    name = pack({"a.png": bytes(64 << 20), "b.png": noise(16)}, method=zipfile.ZIP_DEFLATED)
    packed = bytearray(Path(name).read_bytes())
    for signature, offset in ((b"PK\3\4", 22), (b"PK\1\2", 24)):
        at = packed.index(signature) + offset
        assert struct.unpack_from("<I", packed, at)[0] == 64 << 20
        struct.pack_into("<I", packed, at, 1000)
    Path(name).write_bytes(packed)
    tracemalloc.start()
    assert "data.zip/a.png cannot be decoded (Bad CRC-32" in message(name, 16)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 8 << 20
    assert load_images(name, 16, skip_bad=True).skipped == ("data.zip/a.png",)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_methods_that_cannot_be_bounded_are_refused(data: Path, method: int):
    assert "data.zip/a.png cannot be decoded (packed with a method other than deflate)" in message(
        pack({"a.png": noise(16)}, method=method), 16
    )


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "flipped"])
def test_damaged_zips(data: Path, damage: str):
    name = pack({f"{i}.png": noise(16, seed=i) for i in range(3)})
    whole = Path(name).read_bytes()
    flipped = whole[:300] + bytes([whole[300] ^ 1]) + whole[301:]
    Path(name).write_bytes({"cut": whole[:-50], "empty": b"", "text": b"<html>", "flipped": flipped}[damage])
    if damage == "flipped":
        assert "data.zip/0.png cannot be decoded (Bad CRC-32" in message(name, 16)
        assert len(load_images(name, 16, skip_bad=True)) == 2
    else:
        assert "data.zip is no intact zip: File is not a zip file" in message(name, 16)


def test_a_zip_without_images(data: Path):
    assert message(pack({"a.txt": b""}), 16).startswith(
        "no images in data.zip; --data takes a folder or a zip"
    )


# Arrays


def batch(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def save(path: str, **named: np.ndarray) -> str:
    ending = Path(path).suffix
    if ending == ".npy":
        np.save(path, named["images"])
    elif ending == ".npz":
        np.savez_compressed(path, allow_pickle=False, **named)
    else:
        save_file({name: np.ascontiguousarray(array) for name, array in named.items()}, path)
    return path


@pytest.mark.parametrize("ending", [".npy", ".npz", ".safetensors"])
@pytest.mark.parametrize("order", ["NHWC", "NCHW", "NHW"])
def test_arrays(data: Path, ending: str, order: str):
    rows = batch(5, 16, 16, 1 if order == "NHW" else 3)
    stored = {"NHWC": rows, "NCHW": rows.transpose(0, 3, 1, 2), "NHW": rows[..., 0]}[order]
    given = {"images": stored, "digit": np.array([[1], [0], [3], [1], [0]], np.int32)}
    name = save(f"a{ending}", **given, note=np.zeros(3))
    images = load_images(name, 16, rows.shape[3])
    assert torch.equal(images.images.permute(0, 2, 3, 1), torch.from_numpy(rows))
    if ending != ".npy":
        assert images.classes == ("0", "1", "2", "3") and labels_of(images) == [1, 0, 3, 1, 0]
    assert len(load_images(name, 8)) == 5


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="asks Linux what is mapped")
def test_arrays_of_the_right_form_are_not_copied(data: Path):
    for name in (
        save("a.npy", images=batch(4, 16, 16, 3)),
        save("a.safetensors", images=batch(4, 16, 16, 3)),
    ):
        load_images(name, 16)
        assert not list(Path(os.environ["FASTGAN_CACHE"]).glob("*")), "a cache of what is mapped anyway"
        kept = load_images(name, 16)
        assert name in Path("/proc/self/maps").read_text() and len(kept) == 4


def test_labels_beside_an_npy_file(data: Path):
    save("a.npy", images=batch(3, 16, 16))
    np.save("b.npy", np.array([2, 0, 1], np.uint8))
    assert labels_of(load_images("a.npy", 16, label_key="b.npy")) == [2, 0, 1]
    assert "--image-key does not apply to a.npy" in message("a.npy", 16, image_key="x")
    np.save("b.npy", np.array([2, 0]))
    assert "--label-key b.npy must be integers [3], one an image: it is int64 [2]" in message(
        "a.npy", 16, label_key="b.npy"
    )


@pytest.mark.parametrize("ending", [".npz", ".safetensors"])
def test_arrays_are_chosen_by_name_where_type_does_not_tell(data: Path, ending: str):
    name = save(
        f"mnist{ending}",
        x_train=batch(4, 16, 16),
        x_test=batch(2, 16, 16),
        y_train=np.arange(4),
        y_test=np.arange(2),
        fine=np.arange(4) % 2,
        real=np.zeros((4, 16, 16)),
    )
    assert f"{name} holds several arrays of images; choose with --image-key x_test or x_train" in message(
        name, 16
    ).replace("x_train or x_test", "x_test or x_train")
    assert labels_of(load_images(name, 16, image_key="x_test")) == [0, 1]
    said = message(name, 16, image_key="x_train")
    assert (
        "several arrays of labels; choose with --label-key" in said and "fine" in said and "y_train" in said
    )
    assert labels_of(load_images(name, 16, image_key="x_train", label_key="fine")) == [0, 1, 0, 1]
    assert f"--image-key x: {name} has no such array" in message(name, 16, image_key="x")
    assert "must hold images, uint8 [N, H, W]" in message(name, 16, image_key="real")
    assert "--label-key y_test must be integers [4], one an image" in message(
        name, 16, image_key="x_train", label_key="y_test"
    )


@pytest.mark.parametrize("ending", [".npz", ".safetensors"])
def test_arrays_of_labels_that_do_not_match(data: Path, ending: str):
    name = save(f"a{ending}", x=batch(4, 8, 8, 3), y=np.arange(3))
    assert f"{name} holds 4 images, but 3 labels (y); mend it" in message(name, 8)
    name = save(f"b{ending}", x=batch(4, 8, 8, 3), y=np.eye(4), seed=np.array([7]))
    assert load_images(name, 8).labels is None


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (np.array([0, 1, -1]), "holds the label -1"),
        (np.array([0, 1, 2**40]), "holds the label 1099511627776; there may be 65536"),
        (np.array([0, 1, 2**64 - 1], np.uint64), "there may be 65536"),
    ],
)
def test_labels_out_of_range(data: Path, given: np.ndarray, words: str):
    assert words in message(save("a.npz", images=batch(3, 16, 16), y=given), 16)
    images = load_images(save("b.npz", images=batch(3, 16, 16), y=np.full(3, -1)), 16)
    assert images.labels is None and images.classes == ()


@pytest.mark.parametrize(
    "array", [batch(0, 16, 16), batch(2, 0, 16, 3), batch(2, 16, 16, 2), np.zeros((2, 16, 16)), batch(9)]
)
@pytest.mark.parametrize("ending", [".npy", ".npz", ".safetensors"])
def test_arrays_that_are_no_images(data: Path, ending: str, array: np.ndarray):
    assert f"a{ending} must hold images, uint8" in message(save(f"a{ending}", images=array), 16)


def test_arrays_too_large_for_memory(data: Path, monkeypatch: pytest.MonkeyPatch):
    save("a.npz", images=batch(3, 16, 16))
    monkeypatch.setattr(arrays, "fits", lambda size, device: False)
    assert "a.npz: images takes 0 MiB, more than half of the free memory; unzip a.npz" in message("a.npz", 16)


def test_nothing_is_unpickled(data: Path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, ("owned",)

    trap = np.array([Trap(), Trap()], dtype=object)
    np.savez("a.npz", images=trap)
    np.save("a.npy", trap)
    Path("b.npy").write_bytes(b"cos\nsystem\n(S'mkdir owned'\ntR.")
    for name in ("a.npz", "a.npy", "b.npy"):
        message(name, 16)
    assert not Path("owned").exists()


def header(shape: str, descr: str = "|u1") -> bytes:
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


@pytest.mark.parametrize("shape", ["(1000000000000, 16, 16)", "(-1, 16, 16)", "(2, 16", "(2**63, 2, 2)"])
def test_arrays_that_claim_more_than_they_hold(data: Path, shape: str):
    hollow = header(shape) + bytes(100)
    pack({"images.npy": hollow}, "a.npz")
    Path("a.npy").write_bytes(hollow)
    for name in ("a.npz", "a.npy"):
        assert name in message(name, 16)
    if shape.startswith("(1000"):
        assert "images: no array (of another size than its header says)" in message("a.npz", 16)
    claim = {"images": {"dtype": "U8", "shape": [10**12, 16, 16], "data_offsets": [0, 256 * 10**12]}}
    text = json.dumps(claim).encode()
    Path("a.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(100))
    assert "a.safetensors is no intact safetensors file" in message("a.safetensors", 16)


# Crops, filters, channels


def test_center_takes_a_square_of_so_many_pixels(data: Path):
    image = noise(178, 218)
    put(image, data / "a.png")
    expected = image.crop((35, 55, 143, 163)).resize((64, 64), Image.Resampling.LANCZOS)
    assert (pixels(load_images("data", 64, crop="center:108")) == np.asarray(expected)).all()
    assert "data/a.png is 178x218, too small for --crop center:200" in message("data", 64, crop="center:200")


@pytest.mark.parametrize(
    ("size", "box"),
    [((128, 96), (0, 0, 128, 96)), ((128, 110), (0, 7, 128, 103)), ((150, 96), (11, 0, 139, 96))],
)
@pytest.mark.parametrize("resolution", [64, 30])
def test_wide_is_cut_to_4_by_3_and_padded(data: Path, size, box, resolution: int):
    image = noise(*size)
    put(image, data / "a.png")
    high = round(resolution * 3 / 4)
    above = (resolution - high) // 2
    got = pixels(load_images("data", resolution, crop="wide"))
    expected = image.crop(box).resize((resolution, high), Image.Resampling.LANCZOS)
    assert (got[above : above + high] == np.asarray(expected)).all()
    assert not got[:above].any() and not got[above + high :].any()


@pytest.mark.parametrize("filter", ["lanczos", "box", "bicubic"])
def test_filters(data: Path, filter: str):
    put(noise(32), data / "a.png")
    images = load_images("data", 16, filter=filter)
    expected = noise(32).resize((16, 16), getattr(Image.Resampling, filter.upper()))
    assert (pixels(images) == np.asarray(expected)).all() and images.filter == filter


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "LA", "I;16", "CMYK"])
def test_every_mode_becomes_rgba(data: Path, mode: str):
    gray = Image.fromarray(np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16))
    image = gray if mode == "I;16" else noise(16).convert(mode)
    put(image, data / ("a.jpg" if mode == "CMYK" else "a.png"))
    got, plain = pixels(load_images("data", 16, 4)), pixels(load_images("data", 16, 3))
    assert (got[..., :3] == plain).all() and (got[..., 3] == 255).all()


def test_digits_in_rgba_are_opaque():
    four, three = load_images("digits", 16, 4).images, load_images("digits", 16).images
    assert torch.equal(four[:, :3], three) and (four[:, 3] == 255).all()


@pytest.mark.parametrize("arch", PRESETS)
def test_every_family_takes_four_channels(arch: str):
    make_config(arch, channels=4)
    with pytest.raises(UsageError, match="ADA changes colors of gray and RGB images: got 4"):
        make_config(arch, channels=4, ada=0.6)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bomb_of_which_pillow_only_warns_is_refused(data: Path, monkeypatch: pytest.MonkeyPatch):
    put(noise(16), data / "a.png")
    put(noise(20), data / "b.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 16 * 16)
    assert "data/b.png cannot be decoded (400 pixels, more than 256); remove it" in message("data", 16)
    assert len(load_images("data", 16, skip_bad=True)) == 1


# Training


def test_training_takes_them_all(data: Path, capsys: pytest.CaptureFixture[str]):
    put(noise(8), data / "a.png")
    pack({"a/0.png": noise(8), "b/0.png": noise(8), "b/1.png": b"", "b/1.txt": b""})
    save("a.npz", x=batch(4, 8, 8, 3), y=np.array([0, 2, 0, 2]), z=batch(4, 8, 8, 3))
    small = "--resolution 8 --batch 2 --kimg 0.004 --z-dim 4 --ngf 4 --ndf 4 --device cpu"
    runs = {
        "--arch dcgan --data data": "1 images of data",
        "--arch cgan --data data.zip --skip-bad": "2 images of data.zip, 1 files left out, 1 other files or ",
        "--arch cgan --data a.npz --image-key x": "4 images of a.npz, no images of 1 class (1)",
    }
    for i, (options, said) in enumerate(runs.items()):
        assert train.main([*options.split(), *small.split(), "--run-dir", f"run{i}"]) == 0
        assert said in capsys.readouterr().out


# The Hugging Face hub's tables


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory):
    os.environ["HF_HOME"] = str(tmp_path_factory.mktemp("hf"))  # read when the package is imported
    os.environ["HF_HUB_OFFLINE"] = "1"
    datasets = pytest.importorskip("datasets", reason="the extra [hf] is not installed")
    datasets.disable_progress_bars()
    return datasets


def table(datasets: Any, path: str = "a.parquet", **more: Any) -> str:
    features = {"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    columns = {"img": [noise(16, seed=i) for i in range(4)], "label": [0, 1, 1, 0], **more}
    features |= {name: datasets.Value("string") for name in more}
    datasets.Dataset.from_dict(columns, datasets.Features(features)).to_parquet(path)
    return path


def test_parquet(datasets: Any, data: Path):
    Path("rows").mkdir()
    for name in (table(datasets), "rows", "hf:rows:train", "hf:./rows"):
        table(datasets, "rows/train-0.parquet")
        images = load_images(name, 16)
        assert images.classes == ("cat", "dog") and labels_of(images) == [0, 1, 1, 0]
        assert all((pixels(images, i) == np.asarray(noise(16, seed=i))).all() for i in range(4))
    assert labels_of(load_images("hf:rows:train[:2]", 16)) == [0, 1]


def test_an_imagefolder(datasets: Any, data: Path):
    put(noise(16, seed=1), data / "train" / "dog" / "1.png")
    put(noise(16, seed=2), data / "train" / "cat" / "1.png")
    put(noise(16, seed=3), data / "test" / "cat" / "2.png")
    images = load_images("hf:data", 16)
    assert images.classes == ("cat", "dog") and sorted(labels_of(images)) == [0, 1]
    assert labels_of(load_images("hf:data:test", 16)) == [0]


def test_columns_by_name(datasets: Any, data: Path):
    name = table(datasets, kind=["b", "a", "c", "b"])
    images = load_images(name, 16, label_key="kind")
    assert images.classes == ("a", "b", "c") and labels_of(images) == [1, 0, 2, 1]
    assert "a.parquet has no such column, but img, label, kind" in message(name, 16, image_key="x")
    assert "image 0 of a.parquet holds no image" in message(name, 16, image_key="kind")
    features = {f"{side}": datasets.Image() for side in ("left", "right")}
    columns = {side: [noise(16)] for side in features}
    datasets.Dataset.from_dict(columns, datasets.Features(features)).to_parquet("b.parquet")
    assert "several columns of images; choose with --image-key left or right" in message("b.parquet", 16)
    assert load_images("b.parquet", 16, image_key="left").labels is None


@pytest.mark.parametrize(
    ("cells", "name", "values", "found"),
    [
        ("struct", "label", [2, 0, 2, 1], [2, 0, 2, 1]),
        ("binary", "label", ["b", "a", "b", "b"], [1, 0, 1, 1]),
        ("large_binary", "kind", [1, 0, 1, 1], [1, 0, 1, 1]),
        ("struct", "kind", ["b", "a", "b", "b"], None),  # captions, for all that is known
        ("struct", "number", [3, 2, 1, 0], None),  # of the image
        ("struct", "taken", [1 << 40, 1 << 40, 0, 0], None),
        ("struct", "kind", [1, 0, 1, None], None),
    ],
)
def test_columns_that_others_wrote_are_found_by_type(
    datasets: Any, data: Path, cells: str, name: str, values: list, found: list[int] | None
):
    import pyarrow
    from pyarrow import parquet

    files = [png(noise(16, seed=i)) for i in range(4)]
    if cells == "struct":
        picture = pyarrow.array([{"bytes": file, "path": None} for file in files])
    else:
        picture = pyarrow.array(files, getattr(pyarrow, cells)())
    parquet.write_table(pyarrow.table({"picture": picture, name: values}), "a.parquet")
    images = load_images("a.parquet", 16)
    assert (pixels(images, 3) == np.asarray(noise(16, seed=3))).all()
    assert (labels_of(images) if images.labels is not None else None) == found


def test_the_splits_of_a_folder_of_tables(datasets: Any, data: Path):
    for folder in ("data", "rows/data", "parquet"):  # the last one has the name of a loader of `datasets`
        Path(folder).mkdir(parents=True, exist_ok=True)
        for file in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
            table(datasets, f"{folder}/{file}.parquet")
    for name in ("data", "rows", "hf:parquet", "hf:rows"):
        assert len(load_images(name, 16)) == 8
    assert len(load_images("hf:rows:test", 16)) == 4
    Path("one").mkdir()
    table(datasets, "one/test.parquet")
    assert len(load_images("one", 16)) == 4
    table(datasets, "one/validation.parquet")
    assert "none called train; choose one, as hf:one:validation" in message("one", 16)


def test_what_save_to_disk_wrote(datasets: Any, data: Path):
    rows = datasets.load_dataset("parquet", data_files=table(datasets), split="train")
    rows.save_to_disk("one")
    datasets.DatasetDict(train=rows, test=rows.select([1])).save_to_disk("two")
    assert labels_of(load_images("hf:one", 16)) == labels_of(load_images("hf:two", 16)) == [0, 1, 1, 0]
    assert len(load_images("hf:two:test", 16)) == 1


def test_an_imagefolder_of_the_hub(datasets: Any, data: Path, monkeypatch: pytest.MonkeyPatch):
    put(noise(16, seed=1), data / "1.png")
    Path("zipped").mkdir()
    pack({"2.png": noise(16, seed=2), "metadata.csv": b"file_name,label\n2.png,3\n"}, "zipped/train.zip")
    local = datasets.load_dataset
    fetched = {"nobody/photos": "data", "nobody/zipped": "zipped"}
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, **k: local(os.path.abspath(fetched[name]), **k)
    )
    assert (pixels(load_images("hf:nobody/photos", 16)) == np.asarray(noise(16, seed=1))).all()
    images = load_images("hf:nobody/zipped", 16)
    assert (pixels(images) == np.asarray(noise(16, seed=2))).all() and labels_of(images) == [3]


def test_a_label_without_a_name(datasets: Any, data: Path):
    from pyarrow import parquet

    rows = parquet.read_table(table(datasets))
    place = rows.schema.get_field_index("label")
    parquet.write_table(rows.set_column(place, rows.schema.field(place), [[0, 1, 7, 0]]), "a.parquet")
    assert "a.parquet holds the label 7, but names 2 classes" in message("a.parquet", 16)


def test_bad_tables(datasets: Any, data: Path):
    Path("a.parquet").write_text("no")
    assert "--data a.parquet cannot be loaded by datasets" in message("a.parquet", 16)
    assert "--data hf:nobody/nothing cannot be loaded by datasets" in message("hf:nobody/nothing", 16)
    assert "--data hf: lacks a name" in message("hf:", 16)
    datasets.Dataset.from_dict({"n": [1, 2]}).to_parquet("b.parquet")
    assert "b.parquet has no column of images; name one of n by --image-key" in message("b.parquet", 16)
    assert "--image-key n" in message("b.parquet", 16, image_key="n")
    table(datasets)
    assert "error occurred while generating the dataset: Couldn't cast" in message("hf:.", 16)  # its cause


def test_a_table_names_no_files_of_this_machine(datasets: Any, data: Path):
    import pyarrow
    from pyarrow import parquet

    put(noise(16), data / "mine.png")
    cells = [
        {"bytes": png(noise(16)), "path": None},
        {"bytes": None, "path": os.path.abspath("data/mine.png")},
    ]
    parquet.write_table(pyarrow.table({"img": cells}), "c.parquet")
    assert load_images("c.parquet", 16, image_key="img", skip_bad=True).skipped == ("image 1 of c.parquet",)


def test_without_the_package(data: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "need a package more: pip install 'fastgan[hf]'" in message("hf:mnist", 16)
