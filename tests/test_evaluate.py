"""Figures of generators whose quality is known, the command, and judging during training."""

import dataclasses
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from family_cases import TINY, tiny_config
from PIL import Image
from torch import Tensor, nn

from fastgan import evaluate, features, metrics, train
from fastgan.checkpoint import checkpoints, load_tensors
from fastgan.config import Config, UsageError, build_generator
from fastgan.data import load_images
from fastgan.engine import Engine
from fastgan.evaluate import Evaluator
from fastgan.run_folder import save_generator
from fastgan.sampling import latents

CPU = torch.device("cpu")
ALL = "fid,kid,is,pr,dc"


@pytest.fixture(scope="module", autouse=True)
def _one_cache(tmp_path_factory: pytest.TempPathFactory):
    """Classifiers that learn for a short while, once for all tests here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "LEAST_UPDATES", 60)
        patch.setattr(features, "EPOCHS", 1)
        patch.setenv("FASTGAN_CACHE", str(tmp_path_factory.mktemp("shared")))
        yield


@pytest.fixture(autouse=True)
def _own_cache():
    """In place of the one of conftest.py."""


def gan(**options: Any) -> Config:
    return dataclasses.replace(tiny_config("gan", data="digits:train", channels=1), **options)


def cgan(**options: Any) -> Config:
    config = tiny_config("cgan", data="digits:train", channels=1)
    return dataclasses.replace(config, **{"classes": 10, **options})


class Draws(nn.Module):
    """Real digits, drawn by z; of class c + `shift` if there is one; with some noise."""

    z_dim = 8

    def __init__(self, shift: int = 0, noise: float = 0.0):
        super().__init__()
        data = load_images("digits:train", 8, 1)
        assert data.labels is not None
        self.images, self.labels = data.images / 127.5 - 1, data.labels
        self.shift, self.noise, self.asked = shift, noise, Counter()

    def forward(self, z: Tensor, c: Tensor | None = None) -> Tensor:
        at = (z[:, 0].abs() * 1e4).long()
        if c is None:
            images = self.images[at % len(self.images)]
        else:
            self.asked.update(c.argmax(dim=1).tolist())
            wanted = (c.argmax(dim=1) + self.shift) % 10
            of_class = [(self.labels == k).nonzero()[:, 0] for k in range(10)]
            images = self.images[[int(of_class[k][i % 100]) for k, i in zip(wanted, at, strict=True)]]
        return images + self.noise * z[:, 1:2, None, None]


def figures(config: Config, names: str, G: nn.Module, **options: Any) -> dict[str, float]:
    return Evaluator(config, CPU, names, **{"count": 400, **options}).measure(G)


def test_good_and_bad_generators():
    good = figures(gan(), ALL, Draws())
    names = ["fid", "kid", "kid_std", "is", "is_std", "precision", "recall", "f_score", "density", "coverage"]
    assert list(good) == [f"{name}_classifier" for name in names]
    assert good["fid_classifier"] < 2 and abs(good["kid_classifier"]) < 0.02
    assert good["precision_classifier"] == 1 and good["recall_classifier"] > 0.9
    assert good["is_classifier"] > 5 and good["coverage_classifier"] > 0.7
    bad = figures(gan(), ALL, Draws(noise=1.0))
    assert bad["fid_classifier"] > 10 * good["fid_classifier"]
    assert bad["kid_classifier"] > 10 * abs(good["kid_classifier"])
    assert bad["precision_classifier"] < 0.8 and bad["coverage_classifier"] < good["coverage_classifier"]


def test_batches_and_counts():
    config = gan()
    whole, parts = (figures(config, ALL, Draws(), batch=batch) for batch in (400, 7))
    for key, value in whole.items():
        assert parts[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key
    assert figures(config, "fid", Draws(), seed=1) != figures(config, "fid", Draws())


def test_labels_are_drawn_as_the_data_has_them(tmp_path: Path):
    for name, count in (("a", 60), ("b", 20)):
        (tmp_path / name).mkdir()
        for i in range(count):
            pixels = np.random.default_rng(i).integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    G = Draws()
    found = figures(cgan(classes=2, data=str(tmp_path)), "fid", G, network="pixels", count=2000)
    assert found.keys() == {"fid_pixels"}
    assert G.asked.total() == 2000 and set(G.asked) == {0, 1}
    assert G.asked[0] / 2000 == pytest.approx(0.75, abs=0.04)


def test_tstr():
    judged = Evaluator(cgan(), CPU, "tstr", count=1400)
    found = judged.measure(Draws())
    assert found["tstr"] > 0.85 and figures(cgan(), "tstr", Draws(shift=1), count=1400)["tstr"] < 0.1
    assert judged.network is None and judged.held_out is not None and judged.held_out.name == "digits:test"
    (line,), learner = judged.lines(found), judged.learner
    assert learner is not None and judged.about["learner_checksum"] == learner.checksum
    told = f"1400 samples to teach classifier {learner.checksum[:12]} (resize area to 8x8)"
    assert line.startswith(f"TSTR/CAS  {found['tstr']:<10.5g}  {told}, 397 of digits:test (resize bicubic)")
    other = cgan(data="digits:train:inverted")
    found = Evaluator(other, CPU, "tstr").held_out
    assert found is not None and found.name == "digits:test:inverted"
    found = Evaluator(cgan(), CPU, "tstr", data="digits:test:edges").held_out
    assert found is not None and found.name == "digits:test"
    with pytest.raises(UsageError, match="--test-data"):  # the run has seen digits:test
        Evaluator(cgan(data="digits"), CPU, "tstr", data="digits:train")
    found = Evaluator(cgan(test_data="digits:test:edges"), CPU, "tstr").held_out  # as in training
    assert found is not None and found.name == "digits:test:edges"


def test_statistics_of_the_real_images_are_remembered(monkeypatch: pytest.MonkeyPatch):
    seen = []
    call = features.FeatureNetwork.__call__
    monkeypatch.setattr(
        features.FeatureNetwork, "__call__", lambda net, images: seen.append(len(images)) or call(net, images)
    )
    first = Evaluator(gan(), CPU, "fid", network="pixels", data="digits:test", batch=100)
    assert seen == [100, 100, 100, 97]
    again = Evaluator(gan(), CPU, "fid", network="pixels", data="digits:test")
    assert len(seen) == 4
    assert again.statistics.keys() == first.statistics.keys() == {"count", "mean", "scatter"}
    torch.testing.assert_close(again.statistics, first.statistics)
    Evaluator(gan(), CPU, "fid,kid", network="pixels", data="digits:test")  # needs the features too
    Evaluator(gan(), CPU, "fid", network="pixels", data="digits:test:inverted")
    assert sum(seen) == 3 * 397


def test_every_figure_tells_what_it_depends_on():
    judged = Evaluator(gan(), CPU, "fid,pr", count=50)
    found = judged.measure(Draws())
    lines = judged.lines(found)
    assert [line[:41].strip() for line in lines] == [
        "FID (classifier features)",
        "precision (classifier features)",
        "recall (classifier features)",
        "F score of precision and recall (classifier features)"[:41],
    ]
    assert judged.network is not None
    said = f"50 samples, 1400 of digits:train (resize bicubic), classifier {judged.network.checksum[:12]} "
    assert all(line.endswith(said + "(resize area to 8x8)") for line in lines)
    assert judged.summary(found).startswith("fid_classifier ") and judged.summary(found).count(said) == 1


def test_the_global_random_state_stays():
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    np.random.seed(3)
    figures(cgan(), "fid,kid,tstr,ppl", Draws(), count=40)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert np.random.rand() == np.random.RandomState(3).rand()


def test_figures_are_free_of_tf32(monkeypatch: pytest.MonkeyPatch):
    def allowed() -> tuple[object, object]:
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    class Watches(Draws):
        def forward(self, z: Tensor, c: Tensor | None = None) -> Tensor:
            assert allowed() == (False, False)
            return super().forward(z, c)

    call = features.FeatureNetwork.__call__
    seen = []
    monkeypatch.setattr(
        features.FeatureNetwork, "__call__", lambda net, images: seen.append(allowed()) or call(net, images)
    )
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    before = allowed()
    figures(gan(), "fid,ppl", Watches(), network="pixels", count=20, batch=1400, data="digits:test:edges")
    assert seen == 3 * [(False, False)] and allowed() == before and before[1]


# Perceptual path length


class Linear(nn.Module):
    z_dim = 64

    def forward(self, z: Tensor, c: Tensor | None = None) -> Tensor:
        return z.reshape(-1, 1, 8, 8) - 1  # pixels in 0..1 are z / 2


def test_path_length_of_a_linear_generator():
    """Features are z / |z|, so that d is the squared chord of the angle walked."""
    found = figures(gan(), "ppl", Linear(), network="pixels", count=300)["ppl_pixels"]
    z, to = latents(0, 600, 64).double().split(300)
    angles = nn.functional.cosine_similarity(z, to).acos()
    want = metrics.path_length(angles.square(), epsilon=1)
    assert found == pytest.approx(want, rel=1e-3)


@pytest.mark.parametrize("arch", ["stylegan", "dcgan"])
def test_path_length_is_a_derivative(arch: str, monkeypatch: pytest.MonkeyPatch):
    """Ten times the step, the same length: 1e-4 is neither too coarse nor lost in roundings, bf16 or not."""
    config = tiny_config(arch, data="digits", precision="bf16")
    torch.manual_seed(0)
    G = build_generator(config).eval()
    lengths = []
    for step in (1e-4, 1e-3):
        monkeypatch.setattr(evaluate, "EPSILON", step)
        lengths.append(figures(config, "ppl", G, network="pixels", count=60)["ppl_pixels"])
    assert lengths[0] == pytest.approx(lengths[1], rel=0.05)
    assert any(getattr(m, "dtype", None) is torch.bfloat16 for m in G.modules())  # G itself is as it was


# Families of two domains


def test_cogan_is_judged_by_its_first_halves():
    class Pairs(Draws):
        def forward(self, z: Tensor, c: Tensor | None = None) -> Tensor:
            digits = super().forward(z)
            return torch.cat([digits, -digits], dim=1)

    config = tiny_config("cogan", data="digits:train", data_b="digits:inverted", channels=1, resolution=16)
    G = Pairs()
    G.images = load_images("digits:train", 16, 1).images / 127.5 - 1
    assert figures(config, "fid,ppl", G, network="pixels")["fid_pixels"] < 1


def test_cyclegan_is_judged_by_its_translations():
    class Inverts(nn.Module):
        def translate(self, images: Tensor, to: str) -> Tensor:
            return images * (-1 if to == "b" else 1)

    config = tiny_config("cyclegan", data="digits:train", data_b="digits:train:inverted", channels=1)
    judged = Evaluator(config, CPU, "fid,tstr", network="pixels")
    assert judged.count == 1400 and judged.real.name == "digits:train:inverted"  # as many as there are
    found = judged.measure(Inverts())
    assert found["fid_pixels"] == pytest.approx(0, abs=1e-6) and found["tstr"] > 0.85
    back = Evaluator(config, CPU, "fid", network="pixels", to="a", count=100)
    assert (
        back.real.name == "digits:train" and back.measure(Inverts())["fid_pixels"] > 10
    )  # it does not invert


def test_what_cyclegan_translates_is_a_sample_of_all_classes(tmp_path: Path):
    """A folder's images come class by class: a score of the first ones, or its splits, would see only one."""
    for name, value in (("a", 0), ("b", 255)):
        (tmp_path / name).mkdir()
        for i in range(50):
            Image.new("L", (8, 8), value).save(tmp_path / name / f"{i}.png")
    config = tiny_config("cyclegan", data=str(tmp_path), data_b="digits:test", channels=1)
    judged = Evaluator(config, CPU, "fid", network="pixels", count=40)
    same = SimpleNamespace(translate=lambda images, to: images)
    means = torch.cat(list(judged._samples(same))).float().mean(dim=(1, 2, 3))  # type: ignore[arg-type]
    assert judged.labels is not None and torch.equal(means, judged.labels * 255.0)
    assert 0.2 < judged.labels.float().mean() < 0.8 and judged.labels.diff().any()
    other = Evaluator(config, CPU, "fid", network="pixels", count=40, seed=1).labels
    assert other is not None and not torch.equal(judged.labels, other)


@pytest.mark.parametrize("arch", TINY)
def test_every_family(arch: str):
    config = tiny_config(arch, data="digits:train") if arch != "cogan" else tiny_config(arch)
    config = dataclasses.replace(config, classes=10) if config.cond else config
    names = "fid" if arch == "cyclegan" else "fid,ppl"
    engine = Engine(config, CPU)
    engine.settle()
    found = figures(config, names, engine.ema, network="pixels", count=20, batch=10)
    assert all(np.isfinite(value) and value > 0 for value in found.values())


# Errors


@pytest.mark.parametrize(
    ("config", "names", "options", "words"),
    [
        (gan, "fidd", {}, ["--metrics", "fidd", "fid, kid"]),
        (gan, "is", {"network": "pixels"}, ["--metrics is", "--features pixels"]),
        (gan, "ppl", {"network": "inception"}, ["--metrics ppl", "inception", "classifier"]),
        (gan, "tstr", {}, ["--metrics tstr", "--cond"]),
        (lambda: cgan(data="digits"), "tstr", {}, ["--metrics tstr", "--test-data", "digits:train"]),
        (lambda: cgan(classes=3), "fid", {}, ["3 classes", "digits:train has 10", "--data"]),
        (gan, "fid", {"count": 19}, ["20 images", "19", "--count"]),
        (lambda: tiny_config("cyclegan"), "ppl", {}, ["--metrics ppl", "cyclegan"]),
        (lambda: tiny_config("cyclegan"), "fid", {"truncation": 0.5}, ["--truncation", "cyclegan"]),
        (gan, "fid", {"to": "a"}, ["--to", "cyclegan", "--arch gan"]),
    ],
)
def test_errors(config: Any, names: str, options: dict[str, Any], words: list[str]):
    with pytest.raises(UsageError) as caught:
        Evaluator(config(), CPU, names, **options)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_errors_of_data(tmp_path: Path):
    Image.new("L", (8, 8)).save(tmp_path / "0.png")
    for name in ("few", "plain"):
        (tmp_path / name).mkdir()
    for i in range(20):
        Image.new("L", (8, 8), i).save(tmp_path / "plain" / f"{i}.png")
    Image.new("L", (8, 8)).save(tmp_path / "few" / "0.png")
    with pytest.raises(UsageError, match=r"plain.*--features inception"):
        Evaluator(gan(), CPU, "fid", data=str(tmp_path / "plain"))
    with pytest.raises(UsageError, match=r"20 images or more.*1 of .*few"):
        Evaluator(gan(), CPU, "fid", data=str(tmp_path / "few"))
    with pytest.raises(UsageError, match=r"plain has 0"):
        Evaluator(cgan(), CPU, "fid", data=str(tmp_path / "plain"))
    with pytest.raises(UsageError, match=r"--test-data .*plain must have the same classes"):
        Evaluator(cgan(), CPU, "tstr", test_data=str(tmp_path / "plain"))


# The command


@pytest.fixture
def weights(tmp_path: Path) -> str:
    config = gan()
    state = {f"ema.{name}": tensor for name, tensor in build_generator(config).state_dict().items()}
    save_generator(tmp_path / "generator.safetensors", state, config, 0)
    return str(tmp_path / "generator.safetensors")


def test_the_command(weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    command = ["--count", "30", "--metrics", "fid,kid", "--data", "digits:test", "--device", "cpu"]
    assert evaluate.main(["--weights", weights, *command, "--json", str(tmp_path / "f.json")]) == 0
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) == 3 and shown.startswith("FID (classifier features) ")
    found = json.loads((tmp_path / "f.json").read_text())
    assert found["figures"].keys() == {"fid_classifier", "kid_classifier", "kid_std_classifier"}
    assert (found["samples"], found["reals"], found["real"]) == (30, 397, "digits:test")
    assert (found["resize"], found["features"], len(found["checksum"])) == ("bicubic", "classifier", 64)
    assert evaluate.main(["--run", str(tmp_path), *command]) == 0
    assert capsys.readouterr().out == shown
    assert evaluate.main(["--run", str(tmp_path), *command, "--truncation", "0.5"]) == 0
    assert capsys.readouterr().out != shown


def test_bad_commands(weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for command, words in (
        ([], ["--run", "--weights"]),
        (["--weights", weights, "--run", weights], ["--run", "--weights"]),
        (["--weights", weights, "--features", "vgg"], ["--features", "vgg"]),
        (["--weights", weights, "--metrics", "fidd"], ["--metrics", "fidd"]),
        (["--weights", weights, "--metrics", ""], ["--metrics", "fid, kid"]),
        (["--weights", weights, "--truncation", "2"], ["--truncation"]),
        (["--weights", weights, "--batch", "0"], ["--batch"]),
        (["--weights", weights, "--inception", "a.pth"], ["--features inception"]),
        (["--weights", weights, "--json", str(tmp_path / "gone" / "a.json")], ["--json", "gone"]),
        (["--run", str(tmp_path / "gone")], ["gone"]),
    ):
        assert evaluate.main(command) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        for word in words:
            assert word in said


# During training


def run(folder: Path, images: int, *more: str) -> int:
    options = "--arch dcgan --z-dim 6 --ngf 4 --ndf 4 --dropout 0.1 --resolution 8 --batch 4 --device cpu"
    options += f" --precision fp32 --tick-kimg 0.008 --checkpoint-kimg 1 --kimg {images / 1000}"
    return train.main([*options.split(), *more, "--run-dir", str(folder)])


JUDGED = ["--metrics", "fid,kid", "--eval-every", "2", "--eval-count", "20", "--eval-features", "pixels"]


def log(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def newest(folder: Path) -> dict[str, Tensor]:
    return load_tensors(checkpoints(folder / "checkpoints")[-1])[0]


def test_judging_changes_nothing_and_resumes_exactly(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    plain, whole, parts = (tmp_path / name for name in ("plain", "whole", "parts"))
    assert run(plain, 64) == 0
    assert run(whole, 64, *JUDGED) == 0
    shown = capsys.readouterr().out
    assert f"best:     {whole / 'best.safetensors'}" in shown
    assert "fid_pixels " in shown and "[20 samples, 1797 of digits (resize bicubic), pixels none" in shown
    assert not (plain / "best.safetensors").exists()
    ours, theirs = newest(plain), newest(whole)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())

    lines = log(whole)
    judged = [line for line in lines if "metric_fid_pixels" in line]
    assert [line["images"] for line in judged] == [16, 32, 48, 64]
    assert {k for k in judged[0] if k.startswith("metric_")} == {
        "metric_fid_pixels",
        "metric_kid_pixels",
        "metric_kid_std_pixels",
    }
    best = min(judged, key=lambda line: line["metric_fid_pixels"])
    assert load_tensors(whole / "best.safetensors")[1]["images"] == best["images"]
    for name, line in (("best", best), ("generator", judged[-1])):
        tensors, header = load_tensors(whole / f"{name}.safetensors")
        config = Config(**header["config"])
        G = build_generator(config)
        G.load_state_dict(tensors)
        again = Evaluator.of_run(config, CPU).measure(G.eval())
        assert again["fid_pixels"] == line["metric_fid_pixels"]

    assert run(parts, 40, *JUDGED) == 0
    assert run(parts, 64, *JUDGED) == 0
    kept = [(line["images"], line.get("metric_fid_pixels")) for line in log(parts)]
    assert kept == [(line["images"], line.get("metric_fid_pixels")) for line in lines]
    assert (parts / "best.safetensors").read_bytes() == (whole / "best.safetensors").read_bytes()


def test_the_best_so_far_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(metrics, "frechet", lambda real, mine: 1.0)
    assert run(tmp_path, 32, *JUDGED) == 0
    assert load_tensors(tmp_path / "best.safetensors")[1]["images"] == 16  # the first of equals
    monkeypatch.setattr(metrics, "frechet", lambda real, mine: 2.0)
    assert run(tmp_path, 64, *JUDGED) == 0
    assert load_tensors(tmp_path / "best.safetensors")[1]["images"] == 16
    monkeypatch.setattr(metrics, "frechet", lambda real, mine: 0.5)
    assert run(tmp_path, 80, *JUDGED) == 0
    assert load_tensors(tmp_path / "best.safetensors")[1]["images"] == 80
    monkeypatch.setattr(metrics, "kid", lambda real, mine: (-1.0, 0.0))
    assert run(tmp_path, 96, "--metrics", "kid", *JUDGED[2:]) == 0  # another first metric
    assert load_tensors(tmp_path / "best.safetensors")[1]["images"] == 96


@pytest.mark.parametrize(
    ("name", "low_is_better"), [("fid", True), ("kid", True), ("pr", False), ("is", False)]
)
def test_the_direction_of_each_metric(name: str, low_is_better: bool):
    judged = Evaluator(gan(), CPU, name, count=20)
    key = judged.key(name, metrics.METRICS[name].ranks)
    assert judged.better({key: 1.0}, {key: 2.0}) == low_is_better
    assert judged.better({key: 2.0}, {key: 1.0}) != low_is_better
    assert not judged.better({key: 1.0}, {key: 1.0})
    assert judged.better({key: 1.0}, None) and not judged.better({"other": 1.0}, None)


def test_training_refuses_what_cannot_be_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for options, words in (
        ("--metrics fidd", ["--metrics", "fidd"]),
        ("--metrics fid --eval-every 9", ["--eval-every 9", "--kimg"]),
        ("--metrics tstr --eval-every 1", ["--metrics tstr", "--cond"]),
        ("--metrics fid --eval-every -1", ["--eval-every", "-1"]),
        ("--metrics fid --eval-every 1 --eval-count 19", ["--eval-count", "19"]),
        ("--metrics is --eval-every 1 --eval-features pixels", ["--eval-features pixels"]),
    ):
        assert run(tmp_path / "run", 64, *options.split()) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        for word in words:
            assert word in said
        assert not (tmp_path / "run").exists()
    assert run(tmp_path / "run", 16, "--metrics", "tstr", "--eval-every", "0") == 0  # never
