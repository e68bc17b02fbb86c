"""bench.compare, and what the benchmarks measure on a device."""

import copy
import json
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path

import pytest
import torch
from family_cases import exact_calls

from bench import compare, plain, settings
from fastgan import doctor
from fastgan.config import build_networks, make_config, resolve_device
from fastgan.kernels.dispatch import Op
from fastgan.kernels.modulated_conv2d import modulated_conv2d
from fastgan.kernels.upfirdn2d import setup_filter, upfirdn2d
from fastgan.limit import random_images
from fastgan.operations import NETWORKS, calls

ROOT = Path(__file__).parents[1]


def results(path: Path, **medians: tuple[float, float]) -> str:
    """A file of (median, iqr) a benchmark, nine rounds each."""
    found = [
        {"fullname": name, "stats": {"median": median, "iqr": iqr, "rounds": 9, "mean": 0}}
        for name, (median, iqr) in medians.items()
    ]
    path.write_text(json.dumps({"benchmarks": found}))
    return str(path)


@pytest.mark.parametrize(
    ("a", "b", "word"),
    [
        ((1.0, 0.01), (1.2, 0.01), "slower"),
        ((1.2, 0.01), (1.0, 0.01), "faster"),
        ((1.0, 0.01), (1.04, 0.001), ""),  # within the threshold
        ((1.0, 0.3), (1.2, 0.3), ""),  # within the noise: notches of 0.157 overlap
        ((1.0, 0.18), (1.2, 0.18), "slower"),  # notches of 0.094 do not
        ((1.0, 0.0), (1.0, 0.0), ""),
    ],
)
def test_a_regression_lies_beyond_the_threshold_and_the_noise(
    a: tuple[float, float],
    b: tuple[float, float],
    word: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    files = [results(tmp_path / "a", step=a, gone=a), results(tmp_path / "b", step=b, new=b)]
    assert compare.main(files) == (word == "slower")
    first, last = capsys.readouterr().out.splitlines()
    assert float(first.split()[0]) == pytest.approx(b[0] / a[0], abs=0.001)
    assert first.split()[-2] == (word or "s") and first.endswith("step")
    assert last == f"1 compared, {int(word == 'slower')} slower, 2 in one file only"


def test_the_threshold_can_be_chosen(tmp_path: Path):
    files = [results(tmp_path / "a", step=(1.0, 0.0)), results(tmp_path / "b", step=(1.04, 0.0))]
    assert compare.main(files) == 0
    assert compare.main([*files, "--threshold", "0.01"]) == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot be read"),
        ("{", "no result of pytest"),
        ("[]", "no result of pytest"),
        ('{"benchmarks": [{"fullname": "x"}]}', "no result of pytest"),
        ('{"benchmarks": []}', "no benchmark in common"),
    ],
)
def test_bad_files_are_one_line(
    text: str | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    good, bad = results(tmp_path / "a", step=(1.0, 0.1)), tmp_path / "b"
    if text is not None:
        bad.write_text(text)
    assert compare.main([good, str(bad)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and said in err


def test_ids_say_arch_resolution_batch_precision_and_mode():
    ids = [case.id for case in settings.configs()]
    assert len(ids) == len(set(ids))
    for case in settings.configs():
        (config,) = case.values
        mode = "compiled" if config.compile else "eager"
        parts = case.id.split("-")
        assert config.arch in parts and mode in parts and config.precision in parts
        assert f"{config.resolution}px" in parts and f"batch{config.batch}" in parts


@pytest.mark.parametrize("resolution", [128, 256, 512, 1024])
def test_gpu_settings_are_the_published_ones(resolution: int):
    arch, options, modes = settings.GPU[f"stylegan-{resolution}"]
    assert (arch, options["resolution"], modes) == ("stylegan", resolution, (False, True))
    assert options["channel_base"] == 32768 and options["channel_max"] == 512


@pytest.mark.parametrize(
    "file", [f for f in sorted(Path(settings.__file__).parent.glob("bench_*.py"))], ids=lambda f: f.stem
)
def test_every_file_has_a_smoke_case(file: Path):
    text = file.read_text()
    assert "configs(" in text or '"smoke"' in text


@pytest.mark.parametrize(("up", "down", "padding"), [(1, 1, (2, 2, 2, 2)), (2, 1, (2, 1, 2, 1)), (1, 2, 1)])
def test_plain_filters_compute_the_same(up: int, down: int, padding):
    x, f = torch.randn(2, 3, 8, 8, dtype=torch.float64), setup_filter((1, 2, 3, 4))
    assert torch.allclose(
        plain.plain_fir(x, f, up, down, padding, gain=2.0), upfirdn2d(x, f, up, down, padding, gain=2.0)
    )


def test_plain_filters_are_used_while_open():
    x, w, styles = torch.randn(1, 2, 4, 4), torch.randn(2, 2, 3, 3), torch.randn(1, 2)
    f = setup_filter((1, 3, 3, 1))

    def operators() -> tuple[str, ...]:
        with torch.profiler.profile(acc_events=True) as seen:
            modulated_conv2d(x, w, styles, up=2, padding=1, resample_filter=f)
        return tuple(e.name for e in seen.events() or () if e.name.startswith("fastgan"))

    assert operators() == ("fastgan::correlate",)
    with plain.plainly("stylegan"):
        assert operators() == ()


@pytest.mark.parametrize("network", NETWORKS)
def test_operations_are_found_on_the_meta_device(network: str):
    """Those of networks too large for this machine included: only a GPU's benchmarks and tests use them."""
    found = list(calls(network))
    assert len(found) > 1
    assert {a.device.type for call in found for a in call.args if isinstance(a, torch.Tensor)} == {"meta"}


def test_every_operation_is_called_by_a_network_that_doctor_asks():
    modules = [import_module(f"fastgan.kernels.{file.stem}") for file in (ROOT / "kernels").glob("*.py")]
    operations = {op.name for module in modules for op in vars(module).values() if isinstance(op, Op)}
    assert {op.name for op, _ in doctor.classes()} == operations


@pytest.mark.parametrize("arch", ["r3gan", "cyclegan"])
def test_a_family_in_plain_pytorch_has_the_same_gradients(arch: str):
    def stand_in() -> list[bool]:
        return [getattr(owner, name) is other for owner, name, other in plain.PLAINLY[arch]]

    for call in exact_calls(arch):
        grads = []
        for plainly in (False, True):
            torch.manual_seed(0)
            with plain.plainly(arch) if plainly else ExitStack():
                assert all(stand_in()) if plainly else not any(stand_in())
                grads.append(call.phase.function(*copy.deepcopy(call.args)).grads)
        for ours, theirs in zip(*grads, strict=True):
            scale = max(1.0, float(theirs.abs().max()))
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9 * scale)


def test_plain_dcgan_has_the_size_of_ours_and_trains():
    options = {"resolution": 64, "batch": 2, "ngf": 4, "ndf": 4}
    config, device = resolve_device(make_config("dcgan", device="cpu", precision="bf16", **options))
    peer = plain.PlainDCGAN(config, device)
    for mine, theirs in zip((peer.G, peer.D), build_networks(config), strict=True):
        assert [p.shape for p in mine.parameters()] == [p.shape for p in theirs.parameters()]
    before = [p.clone() for net in (peer.G, peer.D) for p in net.parameters()]
    peer.step(random_images(config, device))
    after = [p for net in (peer.G, peer.D) for p in net.parameters()]
    assert all(p.isfinite().all() and (p != q).any() for p, q in zip(after, before, strict=True))
