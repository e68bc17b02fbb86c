"""The latent space: ways through it, mixed styles, directions, projections, and their commands."""

import itertools
import math
import stat
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from family_cases import CPU, tiny_config
from PIL import Image
from torch import Tensor

from fastgan import generate
from fastgan.checkpoint import load_tensors, save_checkpoint
from fastgan.config import UsageError, build_generator
from fastgan.engine import Engine, one_hot
from fastgan.explore import layer_numbers, read_target, save_movie, sources
from fastgan.images import save_image, sheet, to_uint8
from fastgan.latent import (
    bend,
    find_directions,
    first_layer,
    mix,
    once,
    pictures,
    principal_directions,
    semantic_directions,
    slerp,
    style_layers,
    ways,
)
from fastgan.projection import Projection, load_discriminator, noise_regularizer, project
from fastgan.run_folder import save_generator
from fastgan.sampling import latents, noises

STYLED = ["stylegan", "stylegan1"]


def generator(arch: str, **options: Any) -> Any:
    """A random one, frozen, whose pictures depend on every input."""
    torch.manual_seed(3)
    G = build_generator(tiny_config(arch, **options)).eval().requires_grad_(False)
    for name, parameter in G.named_parameters():
        if name.endswith("noise_strength"):
            parameter.fill_(0.3)
    return G


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of untrained runs by --arch; that of stylegan has a checkpoint."""
    root = tmp_path_factory.mktemp("runs")
    for arch in ("stylegan", "stylegan1", "dcgan", "cgan", "cogan", "cyclegan"):
        config = tiny_config(arch)
        engine = Engine(config, CPU)
        (root / arch).mkdir()
        save_generator(root / arch / "generator.safetensors", engine.state(), config, 0)
        if arch == "stylegan":
            save_checkpoint(root / arch / "checkpoints", engine.state(), 0, 1)
    return root


def make(run: Path, out: Path, *more: str) -> int:
    return generate.main(["--run", str(run), "--out", str(out), "--device", "cpu", *more])


def picture(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def plain(run: Path, out: Path, *more: str) -> np.ndarray:
    """What generate makes without the latent space's flags."""
    assert make(run, out, "--format", "npz", *more) == 0
    (path,) = out.glob("seed*.npz")
    with np.load(path) as arrays:
        return arrays["images"]


def test_slerp_turns_at_constant_speed():
    a, b = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 3, 40)))
    b = b * (a.norm(dim=-1) / b.norm(dim=-1))[:, None]
    assert torch.allclose(slerp(a, b, 0.0), a)
    assert torch.allclose(slerp(a, b, 1.0), b)
    steps = torch.stack([slerp(a, b, i / 10) for i in range(11)])
    assert torch.allclose(steps.norm(dim=-1), a.norm(dim=-1).expand(11, -1))
    turns = torch.acos((steps[1:] * steps[:-1]).sum(dim=-1) / a.square().sum(dim=-1))
    whole = torch.acos((a * b).sum(dim=-1) / a.square().sum(dim=-1))
    assert torch.allclose(turns, (whole / 10).expand(10, -1))


def test_slerp_is_shoemakes_whatever_the_lengths():
    a, b = torch.tensor([2.0, 0.0, 0.0]), torch.tensor([0.0, 3.0, 0.0])
    assert torch.allclose(slerp(a, b, 0.5), torch.tensor([2.0, 3.0, 0.0]) * math.sqrt(0.5))
    angle = math.radians(60)
    b = 5 * torch.tensor([math.cos(angle), math.sin(angle), 0.0])
    wanted = (math.sin(0.7 * angle) * a + math.sin(0.3 * angle) * b) / math.sin(angle)
    assert torch.allclose(slerp(a, b, 0.3), wanted)
    assert torch.allclose(slerp(a, -a, 0.25), 0.5 * a)  # no circle is named: straight


def test_slerp_between_parallel_latents_is_a_line():
    a = torch.linspace(-1, 1, 5)
    assert torch.allclose(slerp(a, 3 * a, 0.5), 2 * a)
    assert torch.allclose(slerp(a, a, 0.3), a)


def test_ways_meet():
    points = torch.tensor([[0.0], [1.0], [5.0]])
    there = ways(points, 4, torch.lerp)
    assert there[..., 0].tolist() == [[0, 0.25, 0.5, 0.75, 1], [1, 2, 3, 4, 5]]
    assert once(there)[:, 0].tolist() == [0, 0.25, 0.5, 0.75, 1, 2, 3, 4, 5]
    back = ways(points, 4, torch.lerp, loop=True)
    assert back[2, :, 0].tolist() == [5, 3.75, 2.5, 1.25, 0]
    assert once(back, loop=True)[:, 0].tolist() == [0, 0.25, 0.5, 0.75, 1, 2, 3, 4, 5, 3.75, 2.5, 1.25]


@pytest.mark.parametrize("arch", STYLED)
def test_mixing_takes_the_named_layers_and_no_others(arch: str):
    G, config = generator(arch), tiny_config(arch)
    a, b = (G.mapping(latents(seed, 2, G.z_dim)) for seed in (0, 1))
    ws = mix(a, b, [0, 2])
    assert ws.shape == (2, 2, 4, 8)
    for i, j in itertools.product(range(2), range(2)):
        by_hand = torch.stack([b[j, 0], a[i, 1], b[j, 2], a[i, 3]])
        assert torch.equal(ws[i, j], by_hand)
        assert np.array_equal(pictures(G, config, ws[i, j][None], None), to_uint8(G.synthesis(by_hand[None])))


def test_the_table_of_mixed_styles(runs: Path, tmp_path: Path):
    options = ["--rows", "4,9", "--cols", "1-3", "--mix-layers", "1-2", "--zoom", "2"]
    assert make(runs / "stylegan", tmp_path, "--mix", *options) == 0
    tensors, _ = load_tensors(runs / "stylegan" / "generator.safetensors")
    G = build_generator(tiny_config("stylegan")).eval()
    G.load_state_dict(tensors)
    w = {seed: G.mapping(latents(seed, 1, G.z_dim))[0] for seed in (4, 9, 1, 2, 3)}
    tiles = np.full((3, 4, 8, 8, 3), 255, np.uint8)
    for j, column in enumerate((1, 2, 3)):
        tiles[0, 1 + j] = to_uint8(G.synthesis(w[column][None]))[0]
        for i, row in enumerate((4, 9)):
            tiles[1 + i, 0] = to_uint8(G.synthesis(w[row][None]))[0]
            ws = torch.stack([w[row][0], w[column][1], w[column][2], w[row][3]])
            tiles[1 + i, 1 + j] = to_uint8(G.synthesis(ws[None]))[0]
    names = ["", "seed 4", "seed 9"], ["", "seed 1", "seed 2", "seed 3"]
    wanted = sheet(tiles.repeat(2, axis=2).repeat(2, axis=3), *names)
    found = picture(tmp_path / "mixing.png")
    assert found.shape == wanted.shape
    assert abs(found.astype(int) - wanted).max() <= 1  # batches of other sizes may round otherwise


def test_layers_by_name():
    G = generator("stylegan", resolution=64, channel_base=128)
    assert layer_numbers("coarse", G) == [0, 1, 2, 3]
    assert layer_numbers("middle", G) == [4, 5, 6, 7]
    assert layer_numbers("fine", G) == [8, 9]
    assert layer_numbers("0-2,5", G) == [0, 1, 2, 5]
    assert layer_numbers(None, G) == list(range(10))


def test_principal_directions_are_those_of_numpys_svd():
    rng = np.random.default_rng(0)
    w = (
        rng.standard_normal((500, 6)) * [1, 5, 2, 0.5, 3, 4] @ np.linalg.qr(rng.standard_normal((6, 6)))[0]
        + 7
    )
    _, values, rows = np.linalg.svd(w - w.mean(axis=0), full_matrices=False)
    found = principal_directions(torch.from_numpy(w), 4)
    assert np.allclose(found.scales, values[:4] / math.sqrt(499), rtol=1e-5)
    assert np.allclose(np.abs((found.vectors.numpy() * rows[:4]).sum(axis=1)), 1, atol=1e-5)
    assert (found.vectors.gather(1, found.vectors.abs().argmax(1, keepdim=True)) > 0).all()


def test_semantic_directions_are_eigenvectors():
    rng = np.random.default_rng(1)
    weight, w = (torch.from_numpy(rng.standard_normal(shape)) for shape in ((20, 7), (400, 7)))
    found = semantic_directions(weight, 7, w)
    n = found.vectors.double()
    products = n @ weight.t() @ weight
    values = (products * n).sum(dim=1)
    assert torch.allclose(products, values[:, None] * n, atol=1e-5)
    assert values.tolist() == sorted(values.tolist(), reverse=True)
    assert torch.allclose(n @ n.t(), torch.eye(7).double(), atol=1e-5)
    along = n @ torch.cov(w.t()) @ n.t()
    assert torch.allclose(found.scales.double(), along.diag().sqrt(), rtol=1e-5)
    assert semantic_directions(weight, 2).scales.tolist() == [1, 1]


@pytest.mark.parametrize("arch", ["gan", "cgan", "dcgan", "wgan", "wgan-gp", "cogan", "progan", "r3gan"])
def test_the_first_layer_is_where_z_enters(arch: str):
    """A number of z whose column is zero has no influence, but for pixel norm, which sees its square."""
    G = generator(arch)
    c = one_hot(torch.tensor([1, 2]), G.c_dim) if G.c_dim else None
    z = latents(0, 2, G.z_dim)
    flipped = z.clone()
    flipped[:, 2] *= -1
    assert not torch.equal(G(z, c), G(flipped, c))
    weight = first_layer(G)
    assert weight.shape[1] == G.z_dim
    weight[:, 2].zero_()  # in the generator itself
    assert torch.equal(G(z, c), G(flipped, c))


@pytest.mark.parametrize("options", [{}, {"hier": False}, {"deep": True}, {"cond": False}])
def test_the_first_layer_of_biggan(options: dict[str, bool]):
    G = generator("biggan", **options)
    c = one_hot(torch.tensor([1]), G.c_dim) if G.c_dim else None
    kept: list[Tensor] = []
    G.linear.register_forward_hook(lambda layer, args, out: kept.append(out))

    def entered(z: Tensor) -> Tensor:
        G(z, c)
        return kept.pop()

    jacobian = torch.autograd.functional.jacobian(entered, latents(0, 1, G.z_dim))
    assert isinstance(jacobian, Tensor)
    wanted, found = jacobian[0, :, 0], first_layer(G)
    assert torch.allclose(found, wanted[:, : found.shape[1]], atol=1e-6)
    assert wanted[:, found.shape[1] :].abs().sum() == 0


@pytest.mark.parametrize("arch", STYLED)
def test_style_layers_are_those_that_read_a_w(arch: str):
    """Where all other ws are zero, only the affine maps of that one have a gradient."""
    G = generator(arch, resolution=16)
    affines = [m for name, m in G.synthesis.named_modules() if name.endswith("affine")]
    for affine in affines:
        affine.weight.requires_grad_()
    whole = 0
    for layer in range(G.synthesis.num_ws):
        ws = torch.zeros(1, G.synthesis.num_ws, 8)
        ws[:, layer] = torch.linspace(1, 2, 8)
        grads = torch.autograd.grad(G.synthesis(ws).square().sum(), [a.weight for a in affines])
        readers = [a.weight * a.weight_gain for a, g in zip(affines, grads, strict=True) if g.abs().max() > 0]
        found = style_layers(G, [layer])
        assert sorted(found.flatten().tolist()) == sorted(torch.cat(readers).flatten().tolist())
        whole += len(found)
    assert len(style_layers(G, range(G.synthesis.num_ws))) == whole == sum(len(a.weight) for a in affines)


@pytest.mark.parametrize("arch", STYLED)
def test_a_bent_stylegan(arch: str):
    G, shift = generator(arch), torch.linspace(-1, 1, 8)
    z = latents(0, 3, G.z_dim)
    ws = G.mapping(z).clone()
    ws[:, [1, 3]] += shift
    wanted = G.synthesis(ws)
    bend(G, shift, [1, 3])
    assert torch.allclose(G(z), wanted, atol=1e-6)


def test_a_bent_generator_without_w():
    G, shift = generator("cgan"), torch.linspace(-1, 1, 8)
    z, c = latents(0, 3, G.z_dim), one_hot(torch.tensor([0, 1, 2]), 3)
    wanted = G(z + shift, c)
    bend(G, shift, [])
    assert torch.allclose(G(z, c), wanted, atol=1e-6)


def test_directions_on_paper(runs: Path, tmp_path: Path):
    run = runs / "stylegan"
    assert make(run, tmp_path, "--directions", "3", "--seeds", "5,0:2") == 0
    tensors, metadata = load_tensors(tmp_path / "directions.safetensors")
    assert tensors["directions"].shape == (3, 8) and tensors["scales"].shape == (3,)
    assert metadata == {"method": "pca", "arch": "stylegan"}
    tile = picture(tmp_path / "directions-seed-5.png").shape[1]
    assert picture(tmp_path / "directions-0-2.png").shape[1] == tile > 7 * 64
    straight = plain(run, tmp_path / "plain", "--count", "3")
    known = tmp_path / "directions.safetensors"
    moved = [
        plain(run, tmp_path / name, "--count", "3", "--direction", direction, "--strength", "1.5")
        for name, direction in (("a", "1"), ("b", f"{known}:1"))
    ]
    assert np.array_equal(moved[0], moved[1])
    assert not np.array_equal(moved[0], straight)
    still = plain(run, tmp_path / "c", "--count", "3", "--direction", "1", "--strength", "0")
    assert np.array_equal(still, straight)
    G = build_generator(tiny_config("stylegan")).eval()
    G.load_state_dict(load_tensors(run / "generator.safetensors")[0])
    ws = G.mapping(latents(0, 3, G.z_dim)) + 1.5 * tensors["scales"][1] * tensors["directions"][1]
    assert abs(to_uint8(G.synthesis(ws)).astype(int) - moved[0]).max() <= 1


def test_sefa_where_there_is_no_w(runs: Path, tmp_path: Path):
    assert make(runs / "dcgan", tmp_path, "--directions", "8") == 0
    tensors, metadata = load_tensors(tmp_path / "directions.safetensors")
    assert metadata["method"] == "sefa"
    weight = load_tensors(runs / "dcgan" / "generator.safetensors")[0]["main.0.weight"].flatten(1)
    _, _, rows = np.linalg.svd(weight.t().numpy())
    assert np.allclose(np.abs((tensors["directions"].numpy() * rows).sum(axis=1)), 1, atol=1e-4)


def test_hierarchical_z_has_directions_in_its_first_part():
    found = find_directions(generator("biggan"), 3, "sefa")
    assert found.vectors.shape == (3, 9)
    assert found.vectors[:, 3:].abs().max() == 0
    with pytest.raises(UsageError, match="3 directions"):
        find_directions(generator("biggan"), 4, "sefa")
    with pytest.raises(UsageError, match="use sefa"):
        find_directions(generator("biggan"), 1, "pca")


def test_noise_regularizer():
    rng = np.random.default_rng(0)
    maps = [rng.standard_normal((1, 1, side, side)) for side in (4, 16)]

    def correlated(n: np.ndarray) -> float:
        side, total = len(n), 0.0
        across = sum(n[y, x] * n[y, x - 1] for y in range(side) for x in range(side)) / side**2
        along = sum(n[y, x] * n[y - 1, x] for y in range(side) for x in range(side)) / side**2
        return total + across**2 + along**2

    small, large = maps[0][0, 0], maps[1][0, 0]
    half = np.array(
        [[large[y : y + 2, x : x + 2].sum() / 2 for x in range(0, 16, 2)] for y in range(0, 16, 2)]
    )
    wanted = correlated(small) + correlated(large) + correlated(half)
    assert math.isclose(noise_regularizer([torch.from_numpy(m) for m in maps]).item(), wanted, rel_tol=1e-9)


def distances(found: Projection, target: Tensor) -> list[float]:
    """Root mean squares of start's and result's differences from the target."""
    return [(x - target).square().mean().sqrt().item() for x in (found.start, found.result)]


def test_projecting_a_picture_of_the_generators_own():
    G = generator("stylegan")
    target = G(latents(7, 1, G.z_dim))
    found = project(G, target, steps=150, seed=1)
    before, after = distances(found, target)
    assert after < before / 3
    assert found.noise is not None
    remade = G.synthesis(found.latent.expand(1, G.synthesis.num_ws, -1), found.noise[None])
    assert torch.allclose(remade, found.result, atol=1e-6)
    for noise in found.noise.split([layer.noise_const.numel() for layer in G.synthesis.layers]):
        assert abs(noise.mean()) < 1e-5 and abs(noise.square().mean() - 1) < 1e-4


def test_projecting_into_z():
    G = generator("wgan", body="mlp")
    for parameter in G.parameters():
        parameter.mul_(3)  # pictures of an untrained one are all alike
    target = G(latents(7, 1, G.z_dim))
    found = project(G, target, steps=200)
    before, after = distances(found, target)
    assert after < before / 3
    assert found.noise is None
    assert torch.allclose(G(found.latent[None]), found.result, atol=1e-6)


def test_projections_are_functions_of_the_seed():
    G = generator("stylegan1")
    target = G(latents(7, 1, G.z_dim))
    first, again, other = (project(G, target, steps=8, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.latent, again.latent) and torch.equal(first.result, again.result)
    assert not torch.equal(first.latent, other.latent)


def test_a_projection_and_what_starts_from_it(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = runs / "stylegan"
    image = plain(run, tmp_path / "own", "--count", "1", "--seed", "3")[0]
    save_image(tmp_path / "target.png", image)
    asked = ["--project", str(tmp_path / "target.png"), "--steps", "20"]
    assert make(run, tmp_path / "a", *asked) == 0
    assert "the discriminator's features" in capsys.readouterr().out
    assert make(run, tmp_path / "b", *asked) == 0
    name = "projection.safetensors"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert make(run, tmp_path / "c", *asked, "--features", "pixels") == 0
    assert "pixels alone" in capsys.readouterr().out
    tensors, metadata = load_tensors(tmp_path / "a" / name)
    assert tensors["w"].shape == (8,)
    assert metadata == {"image": "target.png", "seed": 0, "label": None}
    assert not torch.equal(tensors["w"], load_tensors(tmp_path / "c" / name)[0]["w"])
    assert (picture(tmp_path / "a" / "projection.png") != picture(tmp_path / "c" / "projection.png")).any()
    G = build_generator(tiny_config("stylegan")).eval()
    seed, file = sources(f"5,{tmp_path / 'a' / name}", "--seeds", G, None, 1.0)
    assert seed.z is not None and file.z is None
    assert torch.equal(file.point, tensors["w"].expand(4, -1))
    there = f"5,{tmp_path / 'a' / name}"
    assert make(run, tmp_path / "d", "--interpolate", "lerp", "--seeds", there) == 0
    capsys.readouterr()
    assert make(run, tmp_path / "d", "--interpolate", "slerp", "--seeds", there) == 2
    assert "use lerp" in capsys.readouterr().err


def test_a_target_is_the_centre_of_its_image(tmp_path: Path):
    image = np.zeros((20, 60, 3), np.uint8)
    image[:, 20:40] = (255, 0, 51)
    save_image(tmp_path / "wide.png", image)
    target = read_target(tmp_path / "wide.png", tiny_config("stylegan"))
    assert target.shape == (1, 3, 8, 8)
    assert torch.allclose(target, torch.tensor([1, -1, -0.6])[:, None, None])
    assert read_target(tmp_path / "wide.png", tiny_config("stylegan", channels=1)).shape == (1, 1, 8, 8)
    see_through = np.full((8, 8, 4), 200, np.uint8)
    see_through[:, :4, 3] = 0
    save_image(tmp_path / "alpha.png", see_through)
    target = read_target(tmp_path / "alpha.png", tiny_config("stylegan", channels=4))
    assert target.shape == (1, 4, 8, 8) and (target[..., :4] == -1).all() and (target[..., 4:] > 0).all()


def test_the_discriminator_of_a_run(runs: Path):
    D = load_discriminator(runs / "stylegan", tiny_config("stylegan"), CPU)
    saved = load_tensors(next((runs / "stylegan" / "checkpoints").iterdir()))[0]
    assert D is not None and not D.training
    assert all(torch.equal(t, saved[f"D.{name}"]) for name, t in D.state_dict().items())
    assert load_discriminator(runs / "dcgan", tiny_config("dcgan"), CPU) is None


def test_seeds_name_generates_pictures(runs: Path, tmp_path: Path):
    for arch, more in (("dcgan", []), ("cgan", ["--class", "1"])):
        config = tiny_config(arch)
        G = build_generator(config).eval()
        G.load_state_dict(load_tensors(runs / arch / "generator.safetensors")[0])
        c = one_hot(torch.tensor([1]), 3) if more else None
        found = sources("5:2, 7-8", "--seeds", G, c, 1.0)
        assert [s.name for s in found] == ["5:2", "seed 7", "seed 8"]
        shown = pictures(G, config, torch.stack([s.point for s in found]), c)
        five = plain(runs / arch, tmp_path / f"{arch}5", "--seed", "5", "--count", "3", *more)
        eight = plain(runs / arch, tmp_path / f"{arch}8", "--seed", "8", "--count", "1", *more)
        assert np.array_equal(shown[0], five[2]) and np.array_equal(shown[2], eight[0])


@pytest.mark.parametrize("way", ["slerp", "lerp"])
@pytest.mark.parametrize("form", ["gif", "webp"])
def test_movies(form: str, way: str, runs: Path, tmp_path: Path):
    asked = ["--interpolate", way, "--movie", form, "--seeds", "1,2,3", "--frames", "4", "--fps", "20"]
    for arch in ("stylegan1", "dcgan"):
        for loop, count in (([], 9), (["--loop"], 12)):
            out = tmp_path / arch / str(count)
            assert make(runs / arch, out, *asked, *loop) == 0
            with Image.open(out / f"interpolation.{form}") as movie:
                assert getattr(movie, "n_frames", 1) == count
                assert movie.size == (64, 64)
                movie.load()
                assert movie.info["loop"] == 0
                assert movie.info["duration"] == 50
            assert not list(out.glob(".*"))


def test_stills_of_an_interpolation(runs: Path, tmp_path: Path):
    for name in ("a", "b"):
        asked = ["--interpolate", "slerp", "--seeds", "1,2,3", "--frames", "4", "--zoom", "1"]
        assert make(runs / "stylegan", tmp_path / name, *asked) == 0
    bytes_ = [(tmp_path / name / "interpolation.png").read_bytes() for name in ("a", "b")]
    assert bytes_[0] == bytes_[1]
    image = picture(tmp_path / "a" / "interpolation.png")
    seeds = [plain(runs / "stylegan", tmp_path / s, "--seed", s, "--count", "1")[0] for s in "123"]
    height, width = 2 + 2 * 10, 5 * 10  # tiles of 8 pixels and gaps of 2
    image = image[:, -width:].astype(int)
    assert len(image) == height
    for y, x, seed in ((2, 0, 0), (2, 40, 1), (12, 0, 1), (12, 40, 2)):
        assert abs(image[y : y + 8, x : x + 8] - seeds[seed]).max() <= 1


@pytest.mark.parametrize("arch", ["stylegan", "stylegan1", "dcgan"])
def test_a_sheet_is_the_same_whatever_the_batch(arch: str, runs: Path, tmp_path: Path):
    asked = ["--interpolate", "lerp", "--frames", "15", "--noise", "random"]
    sheets = []
    for batch in ("1", "5", "64"):
        assert make(runs / arch, tmp_path, *asked, "--batch", batch) == 0
        sheets.append((tmp_path / "interpolation.png").read_bytes())
    assert sheets[0] == sheets[1] == sheets[2]


def test_noise_and_truncation_in_the_latent_space(tmp_path: Path):
    config, G = tiny_config("stylegan"), generator("stylegan")
    G.mapping.w_avg += 1
    save_generator(
        tmp_path / "generator.safetensors", {f"ema.{k}": t for k, t in G.state_dict().items()}, config, 0
    )
    asked = ["--interpolate", "lerp", "--seeds", "4,5", "--frames", "1", "--zoom", "1", "--seed", "9"]
    asked += ["--truncation", "0.5", "--truncation-cutoff", "1"]
    ws = torch.cat([G.mapping(latents(seed, 1, G.z_dim), None, 0.5, 1) for seed in (4, 5)])
    for noise in ("none", "random"):
        assert make(tmp_path, tmp_path, *asked, "--noise", noise) == 0
        given = noises(9, 2, G.synthesis.noise_size) if noise == "random" else noise
        wanted = sheet(to_uint8(G.synthesis(ws, given))[None], ["seed 4"])
        assert abs(picture(tmp_path / "interpolation.png").astype(int) - wanted).max() <= 1


def test_pairs_are_shown_side_by_side(runs: Path, tmp_path: Path):
    assert make(runs / "cogan", tmp_path, "--interpolate", "slerp", "--movie", "gif", "--zoom", "1") == 0
    with Image.open(tmp_path / "interpolation.gif") as movie:
        assert movie.size == (32, 16)


def test_mp4_by_ffmpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A program in ffmpeg's place keeps what it is given."""
    script = tmp_path / "bin" / "ffmpeg"
    script.parent.mkdir()
    script.write_text(
        f"#!{sys.executable}\nimport sys\nif '9x9' in sys.argv:\n    sys.exit('no encoder\\nnot today')\n"
        "open(sys.argv[-1], 'wb').write(' '.join(sys.argv[1:-1]).encode() + sys.stdin.buffer.read())\n"
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(script.parent))
    frames = np.random.default_rng(0).integers(0, 255, (3, 5, 7, 3), np.uint8)
    save_movie(tmp_path / "a b.mp4", frames, 12)
    data = (tmp_path / "a b.mp4").read_bytes()
    assert data.endswith(frames.tobytes())
    assert b"-pix_fmt rgb24 -s 7x5 -r 12 " in data
    save_movie(tmp_path / "a b.mp4", np.zeros((3, 5, 7, 4), np.uint8), 12)
    assert b"-pix_fmt rgba -s 7x5 " in (tmp_path / "a b.mp4").read_bytes()
    with pytest.raises(UsageError, match=r"not today.*gif"):
        save_movie(tmp_path / "b.mp4", np.zeros((2, 9, 9, 1), np.uint8), 12)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a b.mp4", "bin"]


def test_a_sheet_names_its_rows_and_columns():
    tiles = np.zeros((2, 3, 20, 30, 1), np.uint8) + np.arange(6, dtype=np.uint8).reshape(2, 3, 1, 1, 1)
    bare = sheet(tiles)
    assert bare.shape == (2 + 2 * 22, 2 + 3 * 32, 1)
    assert [bare[2 + 22 * (i // 3), 2 + 32 * (i % 3), 0] for i in range(6)] == [0, 1, 2, 3, 4, 5]
    named = sheet(tiles, ["first", "second"], ["a", "b", "c"])
    body = named[-(2 * 22) :, -(3 * 32) :]
    assert np.array_equal(body[:20, :30, 0], tiles[0, 0, :, :, 0])
    margin = named[:, : -(3 * 32)]
    assert margin.max() == 255 and margin[-44:-22].min() < 128 and margin[-22:].min() < 128
    assert named[: -(2 * 22)].min() < 128


BAD = [
    ("stylegan", "--frames 3", ["--frames", "--interpolate"]),
    ("stylegan", "--mix --seeds 3", ["--seeds", "--directions"]),
    ("stylegan", "--mix --interpolate lerp", ["--interpolate", "--mix"]),
    ("stylegan", "--interpolate lerp --seeds 4", ["two or more"]),
    ("stylegan", "--interpolate lerp --seeds 4,x", ["--seeds", "'x'"]),
    ("stylegan", "--interpolate lerp --seeds 9-4", ["--seeds", "'9-4'"]),
    ("stylegan", "--interpolate lerp --seeds 0-99999999", ["--seeds", "0-99999999"]),
    ("stylegan", "--interpolate lerp --seeds 4,gone.safetensors", ["gone.safetensors", "--project"]),
    ("stylegan", "--interpolate lerp --seeds 4,{run}/generator.safetensors", ["no w of 8 numbers"]),
    ("stylegan", "--interpolate lerp --frames 0", ["--frames", "0"]),
    ("stylegan", "--interpolate lerp --zoom 0", ["--zoom", "0"]),
    ("stylegan", "--interpolate round", ["round", "slerp"]),
    ("stylegan", "--interpolate lerp --movie mp4", ["ffmpeg", "gif or webp"]),
    ("stylegan", "--mix --mix-layers middle", ["middle", "ends at 8 pixels", "0-3"]),
    ("stylegan", "--mix --mix-layers 2-4", ["--mix-layers", "0 and 3"]),
    ("stylegan", "--mix --mix-layers some", ["--mix-layers", "some"]),
    ("dcgan", "--mix", ["--mix", "dcgan"]),
    ("dcgan", "--directions 2 --layers 0", ["--mix-layers", "dcgan"]),
    ("dcgan", "--directions 2 --directions-method pca", ["pca", "sefa"]),
    ("dcgan", "--directions 9", ["8 directions", "9"]),
    ("dcgan", "--directions 0", ["--directions", "0"]),
    ("dcgan", "--direction 8", ["8 directions"]),
    ("dcgan", "--direction up", ["--direction", "up"]),
    ("dcgan", "--direction gone.safetensors:0", ["gone.safetensors"]),
    ("dcgan", "--direction {run}/generator.safetensors:0", ["holds no directions"]),
    ("dcgan", "--strength 2", ["--strength", "--direction"]),
    ("dcgan", "--project gone.png", ["gone.png"]),
    ("dcgan", "--project {run}/generator.safetensors", ["generator.safetensors"]),
    ("dcgan", "--project {image} --features discriminator", ["no checkpoint", "--features pixels"]),
    ("cgan", "--interpolate slerp", ["conditional", "--class"]),
    ("cogan", "--project {image}", ["cogan", "pairs"]),
    ("cyclegan", "--interpolate lerp", ["cyclegan", "--translate"]),
    ("stylegan", "--interpolate lerp --count 3", ["--count", "--interpolate"]),
    ("stylegan", "--interpolate lerp --fps 9", ["--fps", "--movie"]),
    ("stylegan", "--mix --format npz --float", ["--format", "--mix"]),
    ("stylegan", "--mix --truncation-cutoff -1", ["--truncation-cutoff", "0 and 4", "-1"]),
    ("stylegan", "--directions 2 --latents z.npy", ["--latents", "--directions"]),
    ("stylegan", "--project {image} --truncation 0.5", ["--truncation", "--project"]),
    ("stylegan", "--project {image} --noise none", ["--noise", "--project"]),
    ("stylegan", "--project {image} --compile", ["--compile", "--project"]),
    ("stylegan", "--direction 1 --strength nan", ["--strength", "nan"]),
    ("dcgan", "--interpolate slerp --truncation 0", ["--truncation 0", "dcgan"]),
    ("stylegan", "--mix --out {image}/below", ["image.png/below", "Not a directory"]),
]


@pytest.mark.parametrize(
    ("arch", "options", "words"), BAD, ids=[f"{arch} {options}" for arch, options, _ in BAD]
)
def test_errors(
    arch: str,
    options: str,
    words: list[str],
    runs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("PATH", "")
    image = tmp_path / "image.png"
    save_image(image, np.zeros((16, 16, 3), np.uint8))
    command = options.format(run=runs / arch, image=image).split()
    assert make(runs / arch, tmp_path / "out", *command) == 2
    err = capsys.readouterr().err
    assert len(err.strip().splitlines()) == 1, err
    for word in words:
        assert word in err
    assert not list(tmp_path.glob("out/*"))
