"""Trained networks from files, and what is made with them: from Python, and by python -m fastgan.generate."""

import dataclasses
import errno
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import torch
from family_cases import CPU, tiny_config
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import fastgan
from fastgan import generate, images, outputs, sampling, train
from fastgan.checkpoint import checkpoints, load_tensors
from fastgan.config import PRESETS, Config, UsageError, build_discriminator, build_generator
from fastgan.data import load_images
from fastgan.pretrained import Pretrained, read_own, write_own
from fastgan.run_folder import load_generator

STYLED = ("stylegan", "stylegan1")
TRANSLATOR = "cyclegan"
SAMPLERS = [arch for arch in PRESETS if arch != TRANSLATOR]
COUNT = 40  # more than a chunk
SMALL = "--resolution 8 --ngf 2 --ndf 2 --z-dim 6 --batch 4 --kimg 0.012 --device cpu"
TRAINING = SMALL.split()


class Networks(Pretrained):
    """Both are there."""

    generator: dict[str, Tensor]
    discriminator: dict[str, Tensor]


def networks(config: Config, **options: Any) -> Networks:
    """Fresh networks; noise strong enough to be seen."""
    torch.manual_seed(0)
    G, D = build_generator(config, **options), build_discriminator(config, **options)
    for name, parameter in G.named_parameters():
        if name.endswith("noise_strength"):
            torch.nn.init.constant_(parameter, 0.3)
    return Networks(config, G.state_dict(), D.state_dict(), options, options, images=7)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A file of ours for each family."""
    folder = tmp_path_factory.mktemp("files")
    for arch in PRESETS:
        write_own(folder / f"{arch}.safetensors", networks(tiny_config(arch)))
    write_own(folder / "styles.safetensors", networks(tiny_config("stylegan", cond=True, classes=3)))
    return {path.stem: path for path in folder.iterdir()}


def run(weights: Path, out: Path, *more: str) -> None:
    target = [] if "--to-dataset" in more else ["--out", str(out)]
    assert generate.main(["--weights", str(weights), "--device", "cpu", *target, *more]) == 0


def arrays(weights: Path, out: Path, *more: str) -> dict[str, np.ndarray]:
    run(weights, out, "--format", "npz", *more)
    with np.load(out / "seed0.npz", allow_pickle=False) as found:
        return dict(found)


def save_npy(path: Path, array: np.ndarray) -> str:
    np.save(path, array)
    return str(path)


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    return err


def classes_of(config: Config, count: int) -> Tensor | None:
    return torch.eye(config.c_dim)[torch.arange(count) % config.c_dim] if config.cond else None


@pytest.mark.parametrize("arch", SAMPLERS)
def test_a_loaded_generator_is_the_one_that_was_saved(arch: str, files: dict[str, Path]):
    before = torch.get_rng_state()
    G, saved = fastgan.load(files[arch], device="cpu"), networks(tiny_config(arch))
    torch.set_rng_state(before)
    config = tiny_config(arch)
    assert G.config == config and (G.z_dim, G.c_dim) == (config.z_dim, config.c_dim)
    assert all(torch.equal(tensor, saved.generator[name]) for name, tensor in G.net.state_dict().items())
    z, c = torch.randn(5, config.z_dim), classes_of(config, 5)
    images = G(z, c)
    assert images.shape == (5, config.domains * config.channels, config.resolution, config.resolution)
    assert images.dtype == torch.float32 and not images.requires_grad and not G.net.training
    assert torch.equal(images, G.net(z, c))
    assert torch.equal(images, G(z[:, :, None, None], c))
    assert torch.equal(images, G(z.numpy(), None if c is None else c.argmax(1)))
    for bad in (z[:, :-1], z[0], torch.randn(5, config.z_dim, 2, 2)):
        with pytest.raises(ValueError, match="z must be"):
            G(bad, c)
    with pytest.raises(ValueError, match="c must"):
        G(z, torch.zeros(5, dtype=torch.int64) if c is None else None)
    if c is not None:
        for wrong in (torch.full((5,), config.c_dim), torch.full((5,), -1), c[:4], c.sum(1)):
            with pytest.raises(ValueError, match="c must be"):
                G(z, wrong)
    with pytest.raises(ValueError, match="noise"):
        G(z, c, noise="loud")


@pytest.mark.parametrize("arch", PRESETS)
def test_a_loaded_discriminator_is_the_one_that_was_saved(arch: str, files: dict[str, Path]):
    D, config = fastgan.load(files[arch], network="discriminator", device="cpu"), tiny_config(arch)
    images = torch.randn(4, config.domains * config.channels, config.resolution, config.resolution)
    c = classes_of(config, 4)
    logits = D(images, c)
    assert logits.shape[0] == 4 and torch.equal(logits, D.net(images, c)) and D.config == config
    if c is not None:
        assert torch.equal(logits, D(images, c.argmax(1)))
    saved = networks(config).discriminator
    assert all(torch.equal(tensor, saved[name]) for name, tensor in D.net.state_dict().items())


def test_loading_draws_no_random_numbers(files: dict[str, Path]):
    before = torch.get_rng_state()
    fastgan.load(files["stylegan"], device="cpu")
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("arch", STYLED)
def test_a_stylegan_has_its_two_networks(arch: str, files: dict[str, Path]):
    G = fastgan.load(files[arch], device="cpu")
    z = torch.randn(3, G.z_dim)
    ws = G.mapping(z)
    assert torch.equal(G.synthesis(ws), G(z))
    assert torch.equal(G.synthesis(ws, noise="none"), G(z, noise="none"))
    mean = G.mapping.w_avg + 0.3
    G.mapping.w_avg.copy_(mean)
    near = G(z, truncation=0.5, truncation_cutoff=2)
    assert torch.equal(near, G.synthesis(torch.cat([mean.lerp(ws, 0.5)[:, :2], ws[:, 2:]], dim=1)))
    assert not torch.equal(near, G(z, truncation=0.5))
    shown = [G(z, noise=noise) for noise in sampling.NOISES]
    assert all(not torch.equal(a, b) for a, b in ((shown[0], shown[1]), (shown[0], shown[2])))
    assert torch.equal(shown[2], G(z, noise="random")) and not torch.equal(
        shown[2], G(z, noise="random", seed=1)
    )
    alone = G(z.expand(3, -1)[:1].expand(2, -1), noise="random")
    assert not torch.equal(alone[0], alone[1])  # noise is each sample's own
    given = torch.randn(3, G.synthesis.noise_size)
    assert torch.equal(G(z, noise=given), G.synthesis(ws, given))


def test_a_stylegans_parts_take_what_the_whole_takes(files: dict[str, Path]):
    G = fastgan.load(files["styles"], device="cpu")
    z, labels = np.random.default_rng(0).standard_normal((3, G.z_dim)), [2, 0, 1]
    ws = G.mapping(z, labels)
    assert torch.equal(ws, G.mapping(z=torch.from_numpy(z)[:, :, None, None], c=torch.eye(3)[labels]))
    assert G.mapping.w_avg is G.net.mapping.w_avg
    for noise in sampling.NOISES:
        assert torch.equal(G.synthesis(ws.double().numpy(), noise), G(z, labels, noise=noise))
        assert torch.equal(G.synthesis(ws, noise=noise), G(z, labels, noise=noise))
    near = G.mapping(z, labels, 0.5, truncation_cutoff=1)
    assert torch.equal(G.synthesis(near), G(z, labels, 0.5, truncation_cutoff=1))
    for noise in (None, "loud", torch.zeros(3, 5)):
        with pytest.raises(ValueError, match="noise must be"):
            G(z, labels, noise=noise)
    with pytest.raises(ValueError, match=r"w must be \[N, 4, w_dim\]"):
        G.synthesis(ws[:, 0])
    with pytest.raises(ValueError, match="c must be given"):
        G.mapping(z)


def test_loaded_networks_say_what_they_take(files: dict[str, Path]):
    G, D = (fastgan.load(files["gan"], network, device="cpu") for network in ("generator", "discriminator"))
    assert not G.training and not D.training
    with pytest.raises(ValueError, match="knows no classes"):
        G(torch.zeros(2, G.z_dim), [0, 1])
    for label in (0, "0", [0]):
        with pytest.raises(ValueError, match="label must be None"):
            G.sample(1, label=label)
    for label in (3, "0", [0]):
        with pytest.raises(ValueError, match="label must be a number from 0 to 2"):
            fastgan.load(files["cgan"], device="cpu").sample(1, label=label)
    with pytest.raises(ValueError, match="seed must be"):
        G.sample(1, seed=-1)
    pairs = fastgan.load(files["cyclegan"], "discriminator", "cpu")
    size = G.config.resolution
    for net, channels in ((D, 3), (fastgan.load(files["cyclegan"], device="cpu"), 3), (pairs, 6)):
        good = torch.zeros(2, channels, size, size)
        net(good)
        for bad in (good[0], good[:, 1:], good.byte()):
            with pytest.raises(ValueError, match=rf"images must be floats in -1..1 \[N, {channels}, H, W\]"):
                net(bad)


def test_networks_without_styles_have_no_mapping_and_nothing_to_truncate(files: dict[str, Path]):
    G = fastgan.load(files["dcgan"], device="cpu")
    assert not hasattr(G, "mapping") and not hasattr(G, "synthesis")
    z = torch.randn(2, G.z_dim)
    assert torch.equal(G(z), G(z, noise="none")) and torch.equal(G(z), G(z, noise="random"))
    with pytest.raises(ValueError, match="truncate"):
        G(z, truncation=0.5)
    assert not np.array_equal(G.sample(3), G.sample(3, truncation=0.5))
    for bad in ({"n": 0}, {"n": 1, "truncation": 0.0}, {"n": 1, "label": 0}, {"n": 1, "noise": "loud"}):
        with pytest.raises(ValueError, match=r"must (be|lie)"):
            G.sample(**bad)


@pytest.mark.parametrize("arch", SAMPLERS)
def test_no_picture_depends_on_count_or_batch(arch: str, files: dict[str, Path], tmp_path: Path):
    """Bit for bit; what a library makes of a batch may depend on its size."""
    options = ["--float", "--noise", "random"]
    few = arrays(files[arch], tmp_path, "--count", "35", "--batch", "1", *options)
    many = arrays(files[arch], tmp_path, "--count", "71", "--batch", "64", *options)
    assert few.keys() == many.keys() == ({"images", "labels"} if PRESETS[arch].get("cond") else {"images"})
    for name, array in few.items():
        assert np.array_equal(array, many[name][:35]), name
    G = fastgan.load(files[arch], device="cpu")
    at_once = G(sampling.latents(0, 71, G.z_dim), classes_of(G.config, 71), noise="random", seed=0)
    np.testing.assert_allclose(many["images"], at_once, rtol=0, atol=1e-5)
    assert np.array_equal(G.sample(3, noise="random"), G.shown(torch.from_numpy(few["images"][:3])))


def test_noise_is_the_samples_own_and_the_seeds(files: dict[str, Path], tmp_path: Path):
    z = save_npy(tmp_path / "z.npy", np.zeros((3, 8), np.float32) + 1)
    made = {
        noise: arrays(files["stylegan"], tmp_path, "--latents", z, "--noise", noise, "--float")["images"]
        for noise in sampling.NOISES
    }
    for noise in ("const", "none"):
        assert np.array_equal(made[noise][0], made[noise][2])
    assert not np.array_equal(made["const"], made["none"])
    assert not np.array_equal(made["random"][0], made["random"][2])
    run(
        files["stylegan"],
        tmp_path,
        "--latents",
        z,
        "--noise",
        "random",
        "--float",
        "--format",
        "npz",
        "--seed",
        "1",
    )
    with np.load(tmp_path / "seed1.npz") as other:
        assert not np.array_equal(other["images"], made["random"])


@pytest.mark.parametrize("arch", ["styles", "cgan", "dcgan", "cogan"])
def test_given_latents_and_labels(arch: str, files: dict[str, Path], tmp_path: Path):
    G = fastgan.load(files[arch], device="cpu")
    z = np.random.default_rng(0).standard_normal((COUNT, G.z_dim)) * 2
    command = ["--latents", save_npy(tmp_path / "z.npy", z), "--float", "--noise", "none"]
    c = np.arange(COUNT, dtype=np.int32) // 7 % G.c_dim if G.c_dim else None
    if c is not None:
        command += ["--labels", save_npy(tmp_path / "c.npy", c)]
    found = arrays(files[arch], tmp_path, *command)
    images = found["images"]
    expected = G(z, c, noise="none").numpy()
    assert images.dtype == np.float32 and images.shape == expected.shape
    np.testing.assert_allclose(images, expected, rtol=0, atol=1e-5)
    deep = save_npy(tmp_path / "deep.npy", z.astype(np.float32)[:, :, None, None])
    assert np.array_equal(images, arrays(files[arch], tmp_path, *command, "--latents", deep)["images"])
    if c is None:
        return
    assert np.array_equal(found["labels"], c) and found["labels"].dtype == np.int64
    as_rows = ["--labels", save_npy(tmp_path / "rows.npy", np.eye(G.c_dim)[c])]
    again = arrays(files[arch], tmp_path, *command, *as_rows)
    assert all(np.array_equal(again[name], found[name]) for name in found)
    between = ["--labels", save_npy(tmp_path / "rows.npy", np.full((COUNT, G.c_dim), 1 / G.c_dim))]
    mixed = arrays(files[arch], tmp_path, *command, *between)
    assert mixed["labels"].shape == (COUNT, G.c_dim) and not np.array_equal(mixed["images"], images)
    two = arrays(files[arch], tmp_path, *command[:-2], "--class", "2", "--count", "5")
    assert two["labels"].tolist() == [2] * 5


@pytest.mark.parametrize("arch", STYLED)
def test_a_truncation_of_0_shows_the_mean(arch: str, files: dict[str, Path], tmp_path: Path):
    made = arrays(files[arch], tmp_path, "--count", "3", "--truncation", "0", "--float")["images"]
    G = fastgan.load(files[arch], device="cpu")
    mean = G.synthesis(G.mapping.w_avg.expand(3, G.synthesis.num_ws, -1))
    np.testing.assert_allclose(made, mean, rtol=0, atol=1e-5)


def test_floats_are_not_clamped(files: dict[str, Path], tmp_path: Path):
    loud = networks(tiny_config("stylegan"))
    loud.generator["synthesis.b8.torgb.bias"] += 3
    write_own(tmp_path / "loud.safetensors", loud)
    assert arrays(tmp_path / "loud.safetensors", tmp_path, "--float")["images"].mean() > 2


def test_files_of_each_format(files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    images = arrays(files["cgan"], tmp_path / "a", "--count", "6", "--truncation", "0.5")["images"]
    run(files["cgan"], tmp_path / "b", "--count", "6", "--truncation", "0.5")
    names = [f"seed0-{i:05d}.png" for i in range(6)]
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == names
    assert np.array_equal([np.asarray(Image.open(tmp_path / "b" / name)) for name in names], images)
    run(files["cgan"], tmp_path / "c", "--count", "6", "--format", "grid", "--truncation", "0.5")
    with Image.open(tmp_path / "c" / "seed0.png") as sheet:
        assert sheet.size == (24, 16)
        assert np.array_equal(np.asarray(sheet)[8:, 16:], images[5])
    assert "6 images" in capsys.readouterr().out
    assert not np.array_equal(images, arrays(files["cgan"], tmp_path / "a", "--count", "6")["images"])
    (tmp_path / "b" / names[0]).write_bytes(b"old")
    before = (tmp_path / "b" / names[1]).read_bytes()
    run(files["cgan"], tmp_path / "b", "--count", "6", "--truncation", "0.5")
    assert (tmp_path / "b" / names[1]).read_bytes() == before
    assert np.array_equal(np.asarray(Image.open(tmp_path / "b" / names[0])), images[0])


def dataset(path: Path) -> tuple[np.ndarray, list[int]]:
    """Images and labels of a data set, in the order in which they were made."""
    if path.suffix == ".npz":
        with np.load(path) as found:
            return found["images"], found["labels"].tolist()
    if path.suffix == ".safetensors":
        found = load_file(path)
        return found["images"].numpy(), found["labels"].tolist()
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            pairs = json.loads(archive.read("dataset.json"))["labels"]
            assert archive.testzip() is None and len(archive.namelist()) == len(pairs) + 1
            return np.stack([np.asarray(Image.open(archive.open(name))) for name, _ in pairs]), [
                k for _, k in pairs
            ]
    pairs = json.loads((path / "dataset.json").read_text())["labels"]
    assert all(name.split("/")[0] == str(label) for name, label in pairs)
    return np.stack([np.asarray(Image.open(path / name)) for name, _ in pairs]), [label for _, label in pairs]


@pytest.mark.parametrize("name", ["set", "set.zip", "set.npz", "set.safetensors"])
def test_a_data_set(name: str, files: dict[str, Path], tmp_path: Path):
    out = tmp_path / "new" / name
    command = ["--to-dataset", str(out), "--count", str(COUNT)]
    run(files["cgan"], tmp_path, *command)
    expected = arrays(files["cgan"], tmp_path / "npz", "--count", str(COUNT))
    images, labels = dataset(out)
    assert np.array_equal(images, expected["images"]) and labels == expected["labels"].tolist()

    def content() -> dict[str, bytes]:
        paths = [out, *out.rglob("*")] if out.is_dir() else [out]
        return {str(p): p.read_bytes() for p in paths if p.is_file()}

    before = content()
    run(files["cgan"], tmp_path, *command)
    assert content() == before
    assert [p.name for p in out.parent.iterdir()] == [name]


def test_training_reads_a_synthetic_data_set(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("FASTGAN_CACHE", str(tmp_path / "cache"))
    run(files["cgan"], tmp_path, "--to-dataset", str(tmp_path / "set"), "--count", "9")
    found = load_images(str(tmp_path / "set"), 8, 3)
    assert found.classes == ("0", "1", "2") and found.labels is not None
    assert found.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    images = arrays(files["cgan"], tmp_path, "--count", "9")["images"]
    assert np.array_equal(
        found.images.permute(0, 2, 3, 1).numpy(),
        images.reshape(3, 3, 8, 8, 3).swapaxes(0, 1).reshape(9, 8, 8, 3),
    )
    assert (
        train.main(
            [*TRAINING, "--arch", "cgan", "--data", str(tmp_path / "set"), "--run-dir", str(tmp_path / "run")]
        )
        == 0
    )
    assert read_own(tmp_path / "run").config.classes == 3


def test_data_sets_without_classes_and_of_pairs(files: dict[str, Path], tmp_path: Path):
    run(files["dcgan"], tmp_path, "--to-dataset", str(tmp_path / "flat"), "--count", "3")
    assert sorted(p.name for p in (tmp_path / "flat").iterdir()) == [
        "dataset.json",
        *(f"img{i:08d}.png" for i in range(3)),
    ]
    assert json.loads((tmp_path / "flat" / "dataset.json").read_text()) == {"labels": None}
    pairs = arrays(files["cogan"], tmp_path, "--count", "3")["images"]
    for to, half in (("a", pairs[:, :, :16]), ("b", pairs[:, :, 16:])):
        run(files["cogan"], tmp_path, "--to-dataset", str(tmp_path / "half.npz"), "--count", "3", "--to", to)
        with np.load(tmp_path / "half.npz") as found:
            assert np.array_equal(found["images"], half)


def test_a_data_set_replaces_its_own_files_alone(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "set"
    command = ["--weights", str(files["cgan"]), "--to-dataset", str(out), "--count"]
    (out / "0").mkdir(parents=True)
    (out / "0" / "mine.png").write_bytes(b"mine")
    assert generate.main([*command, "4"]) == 2
    assert "0/mine.png" in one_line(capsys)
    (out / "0" / "mine.png").unlink()
    assert generate.main([*command, "4"]) == 0
    capsys.readouterr()
    assert generate.main([*command, "3"]) == 2  # would leave the fourth image behind, or remove it
    assert "img00000003.png" in one_line(capsys)
    assert generate.main([*command, "5"]) == 0
    assert len(dataset(out)[0]) == 5


@pytest.mark.parametrize("name", ["set", "set.zip", "set.npz", "set.safetensors"])
def test_nothing_half_written_stays_behind(name: str, tmp_path: Path):
    def chunks() -> Iterator[np.ndarray]:
        yield np.zeros((2, 8, 8, 3), np.uint8)
        raise OSError(errno.ENOSPC, "No space left on device")

    names, labels = [f"0/{i}.png" for i in range(4)], np.zeros(4, np.int64)
    save: dict[str, Callable[..., None]] = {
        "set": partial(outputs.save_folder, names=names),
        "set.zip": partial(outputs.save_zip, names=names),
        "set.npz": partial(outputs.save_npz, count=4),
        "set.safetensors": partial(outputs.save_safetensors, count=4),
    }
    with pytest.raises(OSError, match="No space"):
        save[name](tmp_path / name, chunks=chunks(), labels=labels)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_is_one_line(
    files: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    def write_half(file: IO[bytes], image: np.ndarray) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(images, "write_png", write_half)
    command = ["--weights", str(files["gan"]), "--count", "1", "--out", str(tmp_path / "out")]
    for form in ("png", "grid"):
        assert generate.main([*command, "--format", form]) == 2
        assert "out cannot be written: No space left on device" in one_line(capsys)
        assert not list((tmp_path / "out").iterdir())


def test_translations(files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FASTGAN_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        path = tmp_path / "photos" / "xy"[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(path)
    T, photos = fastgan.load(files[TRANSLATOR], device="cpu"), str(tmp_path / "photos")
    found = load_images(photos, 8, 3)
    assert found.labels is not None
    expected = {to: T(found.images / 127.5 - 1, to) for to in "ab"}
    assert torch.equal(expected["a"], T.translate(found.images / 127.5 - 1, to="a"))
    for to in "ab":
        command = ["--translate", photos, "--to", to]
        made = arrays(files[TRANSLATOR], tmp_path, *command, "--float")
        np.testing.assert_allclose(made["images"], expected[to], rtol=0, atol=1e-5)
        assert np.array_equal(made["labels"], found.labels)
        few = arrays(files[TRANSLATOR], tmp_path, *command, "--float", "--count", "5", "--batch", "1")
        assert np.array_equal(few["images"], made["images"][:5])
    shown = arrays(files[TRANSLATOR], tmp_path, "--translate", photos)["images"]
    assert np.array_equal(shown[:, :, :8], found.images.permute(0, 2, 3, 1)) and shown.shape[2] == 16
    run(files[TRANSLATOR], tmp_path, "--translate", photos, "--to-dataset", str(tmp_path / "set"))
    again = load_images(str(tmp_path / "set"), 8, 3)
    assert again.classes == ("x", "y")
    assert np.array_equal(again.images.permute(0, 2, 3, 1), shown[:, :, 8:])


def test_a_translator_of_one_way(
    files: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    T = fastgan.load(files[TRANSLATOR], device="cpu")
    T.net.b_to_a = None
    monkeypatch.setattr(generate, "build", lambda *given: T)
    command = ["--weights", str(files[TRANSLATOR]), "--count", "2", "--out", str(tmp_path / "out"), "--to"]
    assert generate.main([*command, "a"]) == 2
    assert "--to a" in one_line(capsys)
    assert generate.main([*command, "b"]) == 0


def test_options_in_the_header_are_honoured(tmp_path: Path):
    config = tiny_config("stylegan")
    options = {"architecture": "skip", "conv_clamp": 0.1}
    write_own(tmp_path / "skip.safetensors", networks(config, **options))
    _, header = load_tensors(tmp_path / "skip.safetensors")
    assert header["generator"] == header["discriminator"] == options
    again = read_own(tmp_path / "skip.safetensors")
    assert (again.generator_options, again.discriminator_options, again.images) == (options, options, 7)
    G = fastgan.load(tmp_path / "skip.safetensors", device="cpu")
    assert G.synthesis.b4.conv1.conv_clamp == 0.1
    D = fastgan.load(tmp_path / "skip.safetensors", network="discriminator", device="cpu")
    assert D.net.b8.architecture == "skip"
    with pytest.raises(UsageError, match=r"skip.safetensors holds no generator of a training run"):
        load_generator(tmp_path / "skip.safetensors")
    other = dataclasses.replace(networks(config, **options), discriminator_options={})
    write_own(tmp_path / "other.safetensors", other)
    with pytest.raises(UsageError, match=r"discriminator does not fit .*b8.skip.weight is missing"):
        fastgan.load(tmp_path / "other.safetensors", network="discriminator")
    unknown = dataclasses.replace(networks(config, **options), generator_options={"depth": 3})
    write_own(tmp_path / "unknown.safetensors", unknown)
    with pytest.raises(UsageError, match="depth"):
        fastgan.load(tmp_path / "unknown.safetensors")


def test_a_run_folder_holds_both_networks(tmp_path: Path):
    folder = tmp_path / "run"
    assert train.main([*TRAINING, "--arch", "gan", "--run-dir", str(folder)]) == 0
    G, D = (fastgan.load(str(folder), network, device="cpu") for network in ("generator", "discriminator"))
    state = load_tensors(checkpoints(folder / "checkpoints")[-1])[0]
    assert all(torch.equal(t, state[f"ema.{name}"]) for name, t in G.net.state_dict().items())
    assert all(torch.equal(t, state[f"D.{name}"]) for name, t in D.net.state_dict().items())
    code = (
        "import sys, fastgan; assert 'torch' not in sys.modules\n"
        f"G = fastgan.load({str(folder)!r}); print(G.sample(2, seed=3).sum(), G.config.arch)"
    )
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    told = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert told.stdout == f"{fastgan.load(folder).sample(2, seed=3).sum()} gan\n", told.stderr
    out = ["--out", str(tmp_path / "out"), "--format", "npz", "--count", "3"]
    assert generate.main(["--run", str(folder), *out]) == 0
    weights, config = load_generator(folder)
    assert config == G.config and weights.keys() == G.net.state_dict().keys()
    with pytest.raises(UsageError, match="a checkpoint of training; take the folder of its run"):
        fastgan.load(checkpoints(folder / "checkpoints")[0])
    (folder / "checkpoints").rename(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="no discriminator"):
        fastgan.load(folder, network="discriminator")


@pytest.mark.parametrize(
    ("arch", "options", "words"),
    [
        ("gan", "--count 0", ["--count", "0"]),
        ("gan", "--batch 0", ["--batch", "0"]),
        ("gan", "--seed -1", ["--seed", "-1"]),
        ("gan", "--truncation 2", ["--truncation", "2"]),
        ("gan", "--truncation-cutoff 1", ["--truncation-cutoff", "gan"]),
        ("gan", "--truncation 0", ["--truncation 0", "gan"]),
        ("stylegan", "--truncation -0.5", ["--truncation", "-0.5"]),
        ("stylegan", "--truncation-cutoff 9", ["--truncation-cutoff", "4", "9"]),
        ("stylegan", "--truncation-cutoff -1", ["--truncation-cutoff", "4", "-1"]),
        ("gan", "--class 1", ["--class", "--cond"]),
        ("cgan", "--class 3", ["--class", "2", "3"]),
        ("gan", "--translate photos", ["--translate", "gan"]),
        ("gan", "--to a", ["--to", "gan"]),
        ("cogan", "--to a", ["--to", "--to-dataset"]),
        ("gan", "--float", ["--float", "npz"]),
        ("gan", "--noise loud", ["--noise", "loud"]),
        ("gan", "--latents gone.npy", ["--latents", "gone.npy"]),
        ("gan", "--latents text", ["--latents", "text"]),
        ("gan", "--latents objects.npy", ["--latents", "objects.npy"]),
        ("gan", "--latents narrow.npy", ["--latents", "[N, 8]", "[4, 7]"]),
        ("gan", "--latents c.npy", ["--latents", "[N, 8]", "int64"]),
        ("gan", "--latents nan.npy", ["--latents", "not finite"]),
        ("gan", "--latents z.npy --count 5", ["--count 5", "4"]),
        ("gan", "--latents z.npy --truncation 0.5", ["--truncation", "--latents"]),
        ("gan", "--latents z.npy --labels c.npy", ["--labels", "not conditional"]),
        ("cgan", "--labels c.npy", ["--labels", "--latents"]),
        ("cgan", "--latents z.npy --labels c.npy --class 1", ["--labels", "--class"]),
        ("cgan", "--latents z.npy --labels high.npy", ["--labels", "between 0 and 2", "3"]),
        ("cgan", "--latents z.npy --labels short.npy", ["--labels", "[4]", "[3]"]),
        ("cgan", "--latents z.npy --labels z.npy", ["--labels", "[4, 3]", "[4, 8]"]),
        ("cyclegan", "--latents z.npy", ["--latents", "cyclegan"]),
        ("cyclegan", "--truncation 0.5", ["--truncation", "cyclegan"]),
        ("cyclegan", "--translate nowhere", ["--translate", "nowhere"]),
        ("cyclegan", "--translate wide", ["--translate", "wide.png is 12x9", "fastgan.prepare"]),
        ("cyclegan", "--count 1798", ["1798", "1797"]),
        ("gan", "--device tpu", ["--device", "tpu"]),
    ],
)
def test_bad_options(
    arch: str,
    options: str,
    words: list[str],
    files: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    Path("text").write_text("no array")
    Path("wide").mkdir()
    Image.new("RGB", (12, 9)).save("wide/wide.png")
    np.save("objects.npy", np.array([{}, None]), allow_pickle=True)
    z = np.ones((4, 8), np.float32)
    for name, array in {
        "z": z,
        "narrow": z[:, :7],
        "nan": z * np.nan,
        "c": np.arange(4) % 3,
        "high": np.arange(4),
        "short": np.arange(3),
    }.items():
        np.save(f"{name}.npy", array)
    assert generate.main(["--weights", str(files[arch]), "--out", "out", *options.split()]) == 2
    err = one_line(capsys)
    assert all(word in err for word in words), err
    assert not Path("out").exists()


def test_bad_files(files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = str(tmp_path / "out")

    def attempt(*options: str, **given: str) -> str:
        assert generate.main([*options]) == 2
        return one_line(capsys)

    assert "gone" in attempt("--run", str(tmp_path / "gone"), "--out", out)
    assert "one of the arguments --run --weights is required" in attempt("--out", out)
    weights = ["--weights", str(files["gan"])]
    assert "not allowed with" in attempt(*weights, "--run", "x", "--out", out)
    assert "--out --to-dataset is required" in attempt(*weights)
    file = tmp_path / "a.file"
    file.write_text("")
    assert "a.file is a file; name a folder" in attempt(*weights, "--out", str(file))
    assert "a.file is a file; name a folder" in attempt(*weights, "--to-dataset", str(file))
    assert "Not a directory" in attempt(*weights, "--out", str(file / "below"))
    (tmp_path / "a.zip").mkdir()
    assert "a.zip is a folder; name a file" in attempt(*weights, "--to-dataset", str(tmp_path / "a.zip"))
    assert "--format" in attempt(*weights, "--to-dataset", str(tmp_path / "b.zip"), "--format", "npz")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(files["gan"].read_bytes()[:-100])
    assert "broken.safetensors" in attempt("--weights", str(broken), "--out", out)
    strange = tmp_path / "strange.safetensors"
    outputs.save_safetensors(strange, 1, [np.zeros((1, 8, 8, 3), np.uint8)], None)
    assert "no generator that is known" in attempt("--weights", str(strange), "--out", out)
    misfit = dataclasses.replace(networks(tiny_config("gan")), config=tiny_config("gan", ngf=4))
    write_own(tmp_path / "misfit.safetensors", misfit)
    assert "main.0.weight is [4, 8]" in attempt(
        "--weights", str(tmp_path / "misfit.safetensors"), "--out", out
    )
    with pytest.raises(UsageError, match="network must be generator or discriminator"):
        fastgan.load(files["gan"], network="critic")
    assert not (tmp_path / "out").exists()


def test_truncation_of_z_redraws_what_lies_beyond():
    z = sampling.latents(0, 50, 40)
    near = sampling.latents(0, 50, 40, bound=0.7)
    assert near.abs().max() <= 0.7
    kept = z.abs() <= 0.7
    assert torch.equal(z[kept], near[kept])
    assert 0.3 < near.std() < 0.45
    assert torch.equal(z[30:], sampling.latents(0, 20, 40, first=30))
    noise = sampling.noises(0, 50, 40)
    assert torch.equal(noise[30:], sampling.noises(0, 20, 40, first=30))
    assert abs(np.corrcoef(noise.flatten(), z.flatten())[0, 1]) < 0.1


def test_chunks_of_one_size_run_ahead_of_what_is_asked_for():
    size, run_on = sampling.chunk_size(64, CPU), []
    assert size == 32 and sampling.chunk_size(256, CPU) == 2 and sampling.chunk_size(1024, CPU) == 1

    def inputs(first: int, count: int) -> tuple[Tensor, None]:
        return torch.arange(first, first + count, dtype=torch.float32)[:, None], None

    def double(net: torch.nn.Module, x: Tensor, nothing: None) -> Tensor:
        assert len(x) == 4 and nothing is None
        run_on.append(int(x[0]))
        return 2 * x

    net = torch.nn.Linear(1, 1)
    results = sampling.in_chunks(net, double, 18, 4, inputs, lambda x: x, ahead=8)
    assert next(results).tolist() == [[0], [2], [4], [6]]
    assert run_on == [0, 4, 8]
    assert np.concatenate(list(results)).flatten().tolist() == list(range(8, 36, 2))


@pytest.mark.exhaustive
def test_compiled_pictures_are_the_same_but_for_roundings(files: dict[str, Path], tmp_path: Path):
    command = ["--count", str(COUNT), "--noise", "random"]
    eager = arrays(files["styles"], tmp_path, *command)["images"].astype(int)
    ours = arrays(files["styles"], tmp_path, *command, "--compile")["images"].astype(int)
    assert abs(ours - eager).max() <= 1
