"""profile, doctor and what they are made of: the limit, the estimate, NVML's readings."""

import json
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgan import doctor, estimate, limit, nvml, profile, scaling
from fastgan.config import build_networks, make_config, resolve_device
from fastgan.engine import Engine
from fastgan.estimate import DEVICES, Device, Meter
from fastgan.kernels.dispatch import Op
from fastgan.limit import Form, Product, Shape, phase_calls, products

CPU = torch.device("cpu")
TINY = "--arch stylegan --resolution 8 --batch 4 --z-dim 6 --w-dim 6 --channel-base 64 --channel-max 8"
OPTIONS = [*TINY.split(), "--device", "cpu", "--precision", "fp32", "--r1-every", "4"]
aten = torch.ops.aten


def tiny_engine(**options: Any) -> tuple[Engine, Tensor]:
    config = make_config(
        "stylegan", resolution=8, batch=4, z_dim=6, w_dim=6, channel_base=64, channel_max=8, **options
    )
    config, _ = resolve_device(config)
    return Engine(config, CPU), profile.random_images(config, CPU)


def test_products_are_counted_forward_backward_and_twice_backward():
    x, w = torch.randn(2, 3, 8, 8, requires_grad=True), torch.randn(5, 3, 3, 3, requires_grad=True)

    def run():
        y = F.conv2d(x, w, padding=1)
        (gx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        torch.autograd.grad(gx.square().sum(), w)

    found = {op.overloadpacket: 0 for op, _ in products(run)}
    for (op, _), count in products(run).items():
        found[op.overloadpacket] += count
    assert found[aten.convolution] >= 2 and found[aten.convolution_backward] >= 2
    (forward,) = [p for p in products(lambda: F.conv2d(x, w, padding=1))]
    assert forward.args[:2] == (Shape((2, 3, 8, 8)), Shape((5, 3, 3, 3)))


def test_filters_are_no_products_and_equal_calls_are_one():
    x = torch.randn(2, 3, 8, 8)
    assert not products(lambda: F.conv2d(x, torch.randn(3, 1, 4, 4), groups=3))
    a = torch.randn(4, 4)
    assert list(products(lambda: [a @ a for _ in range(3)]).values()) == [3]


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    "run",
    [
        lambda: torch.ones(3, 4) @ torch.ones(4, 5),
        lambda: F.linear(torch.ones(3, 4), torch.ones(5, 4), torch.ones(5)),
        lambda: torch.bmm(torch.ones(2, 3, 4), torch.ones(2, 4, 5)),
        lambda: F.conv_transpose2d(torch.ones(1, 3, 4, 4), torch.ones(3, 5, 4, 4), None, 2, 1),
        lambda: F.conv2d(torch.ones(1, 3, 4, 4).requires_grad_(), torch.ones(5, 3, 3, 3)).sum().backward(),
    ],
)
def test_a_product_runs_again_in_every_form(run: Any, last: bool):
    for product in products(run):
        wanted = product.op(*(torch.zeros(a) if isinstance(a, Shape) else a for a in product.args))
        y = limit.prepared(product, Form(torch.bfloat16, last), CPU)()
        for ours, theirs in zip(*(o if isinstance(o, tuple) else (o,) for o in (y, wanted)), strict=True):
            if theirs is not None:
                assert ours.shape == theirs.shape and ours.dtype == torch.bfloat16
                assert theirs.ndim != 4 or not last or ours.is_contiguous(memory_format=torch.channels_last)


def test_phases_on_meta_compute_the_products_of_the_real_ones():
    engine, real = tiny_engine()
    calls = phase_calls(engine, real)
    assert [c.phase.name for c in calls] == ["D", "D with R1", "G", "G with path length"]
    assert sum(c.share for c in calls) == 2
    for call in calls:
        on_meta = products(call.on_meta())
        assert on_meta and on_meta == products(lambda call=call: call.phase.function(*call.args))
    engine, real = tiny_engine(r1=0.0, pl=0.0)
    assert [(c.phase.name, c.share) for c in phase_calls(engine, real)] == [("D", 1), ("G", 1)]


def test_the_limit_takes_the_best_form_as_often_as_the_product_occurs(monkeypatch: pytest.MonkeyPatch):
    cost = {Form(torch.float32, True): 3.0, Form(torch.bfloat16, True): 1.0}
    monkeypatch.setattr(limit, "form_time", lambda product, form, *_, **__: cost.get(form, 5.0))
    monkeypatch.setattr(limit, "products", lambda run: {Product(aten.mm.default, ()): 7})
    limit.best_form.cache_clear()
    engine, real = tiny_engine()
    call = phase_calls(engine, real)[0]
    assert limit.limit(call, torch.float32) == 21
    assert limit.limit(call, torch.bfloat16) == 7
    limit.best_form.cache_clear()


def test_what_is_timed_as_an_update_is_one():
    """Gradients are let go after each step, and an optimizer without any does nothing."""
    engine, real = tiny_engine()
    engine.step(real)
    run = limit.update_call(engine)
    before = [o.state[p]["step"].item() for o in (engine.d_optimizer, engine.g_optimizer) for p in o.state]
    run()
    after = [o.state[p]["step"].item() for o in (engine.d_optimizer, engine.g_optimizer) for p in o.state]
    assert after == [n + 1 for n in before] and len(after) > 10


def test_the_limit_is_the_time_of_the_work():
    """Of a chain of matrix products that is nothing but products: close to one."""
    a = torch.randn(700, 700)
    (product,) = products(lambda: a @ a)
    alone = limit.form_time(product, limit.best_form(product, (torch.float32,), CPU), CPU, 0.2)
    assert 0.2 < alone / profile.timed(lambda: a @ a, CPU, 0.2) < 3


DEVICE = Device(bf16=2.0, tf32=1.0, bandwidth=1.0, memory=1.0, source="")


def metered(run: Any) -> Meter:
    with Meter(DEVICE) as meter:
        run()
    return meter


def test_a_roofline_by_hand():
    a, b = torch.empty(1000, 1000, device="meta"), torch.empty(1000, 1000, device="meta")
    assert metered(lambda: a + b).everything == pytest.approx(12e6 / 1e9)
    assert metered(lambda: a + b).products == 0
    assert metered(lambda: a.view(-1, 10).t()[3:]).everything == 0
    assert metered(lambda: a.add_(b)).everything > 0
    big = torch.empty(8000, 8000, device="meta")
    m = metered(lambda: big @ big)
    assert m.flops == 2 * 8000**3 and m.products == m.everything == pytest.approx(1.024)
    half = big.bfloat16()
    assert metered(lambda: half @ half).products == pytest.approx(0.512)
    assert metered(lambda: a @ b).products == pytest.approx(12e6 / 1e9)  # bound by bandwidth


def test_peak_memory_by_hand():
    x = torch.empty(1000, device="meta")

    def run():
        y = x * 2
        z = y * 2
        del y
        return z.view(10, 100) * 2

    assert metered(run).peak == 8000
    assert metered(lambda: (x * 2, x * 2, x * 2)).peak == 12000
    w = torch.empty(1000, device="meta", requires_grad=True)
    assert metered(lambda: w.exp().exp().exp().sum().backward()).peak >= 12000  # held for backward


def test_the_estimate_scales_as_it_should():
    sizes: dict[str, Any] = dict(resolution=8, z_dim=6, w_dim=6, channel_base=64, channel_max=8)
    config = make_config("stylegan", precision="bf16", batch=8, **sizes)
    slow, fast = (estimate.estimate(config, DEVICES[name]) for name in ("4090", "h200"))
    assert fast.flops == slow.flops > 0
    assert slow.seconds_at_least < slow.seconds_unfused
    assert fast.seconds_unfused < slow.seconds_unfused
    assert fast.peak_bytes == slow.peak_bytes and fast.largest_batch > slow.largest_batch
    assert slow.largest_batch % config.mbstd_group == 0
    small = Device(1, 1, 1, memory=1.52, source="")
    largest = estimate.estimate(config, small).largest_batch
    at = make_config("stylegan", precision="bf16", batch=largest, **sizes)
    assert 0.95 * 0.02e9 < estimate.peak_bytes(at) - estimate.RESERVED < 1.02 * 0.02e9


class NoCounter(Exception):
    pass


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A pretended NVML: 100 W, 50% busy, an energy counter of 100 W, no temperature."""

    def missing(*_: Any) -> None:
        raise NoCounter("not supported")

    fake: Any = ModuleType("pynvml")
    fake.NVMLError, fake.NVML_CLOCK_SM, fake.NVML_CLOCK_MEM, fake.NVML_TEMPERATURE_GPU = NoCounter, 1, 2, 0
    fake.nvmlInit = fake.nvmlShutdown = lambda: None
    fake.nvmlDeviceGetHandleByUUID = lambda uuid: {"GPU-7": "handle"}[uuid]
    fake.nvmlDeviceGetUtilizationRates = lambda h: SimpleNamespace(gpu=50)
    fake.nvmlDeviceGetPowerUsage = lambda h: 100_000
    fake.nvmlDeviceGetClockInfo = lambda h, which: 1000 * which
    fake.nvmlDeviceGetTemperature = missing
    fake.nvmlDeviceGetMemoryInfo = lambda h: SimpleNamespace(used=3 << 20)
    fake.nvmlDeviceGetTotalEnergyConsumption = lambda h: int(time.perf_counter() * 100_000)
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d: SimpleNamespace(uuid="7"))
    return fake


@pytest.mark.parametrize("counter", [True, False])
def test_nvml_is_sampled_in_the_background(gpu: Any, counter: bool):
    if not counter:
        gpu.nvmlDeviceGetTotalEnergyConsumption = gpu.nvmlDeviceGetTemperature
    with nvml.Sampler(torch.device("cuda"), interval=0.01) as sampler:
        time.sleep(0.3)
    summary = sampler.summary(images=10)
    assert len(sampler.samples["power_watts"]) > 3
    assert summary["power_watts"] == {"mean": 100, "max": 100}
    assert summary["clock_mhz"]["max"] == 1000 and summary["memory_clock_mhz"]["max"] == 2000
    assert summary["utilisation_percent"]["mean"] == 50 and summary["memory_mib"]["max"] == 3
    assert "temperature_celsius" not in summary
    assert summary["joules"] == pytest.approx(100 * summary["seconds"], rel=0.05)
    assert summary["joules_per_image"] == pytest.approx(summary["joules"] / 10, abs=0.01)


def test_power_between_readings(gpu: Any):
    meter = nvml.Meter(torch.device("cuda"))
    for _ in range(2):
        time.sleep(0.1)
        assert meter.read() == {"power_watts": pytest.approx(100, rel=0.05)}
    gpu.nvmlDeviceGetTotalEnergyConsumption = gpu.nvmlDeviceGetTemperature
    assert meter.read() == {}
    assert nvml.Meter(torch.device("cpu")).read() == {}


def test_without_a_driver_nvml_says_so(gpu: Any):
    gpu.nvmlInit = gpu.nvmlDeviceGetTemperature
    with pytest.raises(nvml.Unavailable, match="not supported; no power"):
        nvml.Sampler(torch.device("cuda"))
    assert "not supported" in nvml.driver(torch.device("cuda"))


def test_profile_prints_and_writes_everything(tmp_path, capsys: pytest.CaptureFixture[str]):
    trace, figures = tmp_path / "trace.json", tmp_path / "figures.json"
    files = ["--trace", str(trace), "--json", str(figures)]
    assert profile.main([*OPTIONS, "--seconds", "0.02", *files]) == 0
    out = capsys.readouterr().out
    for said in (
        "images/s",
        "s/kimg",
        "G with path length",
        "fraction",
        "costliest",
        "aten::",
        "peak memory",
    ):
        assert said in out
    assert out.count("NVML: cpu is no NVIDIA device") == 1
    written = json.loads(figures.read_text())
    assert written["config"]["resolution"] == 8 and written["environment"]["precision"] == "fp32"
    assert len(written["phases"]) == 4 and len(written["costliest"]) == 10
    total = sum(p["share"] * p["seconds"] for p in written["phases"]) + written["update_seconds"]
    assert written["step_seconds"] == pytest.approx(total)
    assert written["images_per_second"] == pytest.approx(4 / total)
    assert all(0 < p["fraction"] == p["limit"] / p["seconds"] for p in written["phases"])
    events = {e.get("name") for e in json.loads(trace.read_text())["traceEvents"]}
    assert "aten::convolution" in events


def test_estimates_are_labelled(tmp_path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "figures.json"
    options = [o for o in OPTIONS if o not in ("--device", "cpu")]
    assert profile.main([*options, "--estimate", "mi300x", "--json", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "every figure is an estimate" in lines[0] and "MI300X" in lines[0]
    assert len(lines) == 6 and all(line.startswith("estimate: ") for line in lines[1:])
    assert json.loads(out.read_text())["largest_batch"] > 1000


def test_a_ring_moves_almost_twice_the_gradients():
    assert scaling.ring_seconds(4, 100.0, 0, 50.0, 1.0) == pytest.approx(2 * 3 / 4 * 100 / 50)
    assert scaling.ring_seconds(4, 0.0, 2, 50.0, 0.1) == pytest.approx(2 * 6 * 0.1)
    config = make_config("wgan", precision="bf16", resolution=16, ngf=4, ndf=4, d_steps=5)
    g, d = (sum(4 * p.numel() for p in net.parameters()) for net in build_networks(config))
    assert scaling.gradient_bytes(config) == (g + 5 * d, 6)


def test_more_gpus_gain_as_much_as_their_link_allows(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    out = tmp_path / "figures.json"
    options = ["--arch", "gan", "--ngf", "2", "--ndf", "2", "--resolution", "8", "--precision", "bf16"]
    wide = [*options, "--batch", "64", "--estimate", "h100", "--json", str(out)]
    assert profile.main([*wide, "--gpus", "16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("estimate: ") for line in lines[1:])
    assert "a second machine of 8 pays from" in lines[-1]
    figures = json.loads(out.read_text())["scaling"]
    one, *more = figures["rows"]
    assert [row["gpus"] for row in more] == [2, 4, 8, 16, 16, 16]
    assert one["reduce"] == 0 and one["speed_up"] == [1, 1] and one["images"] == 64
    for row in more:
        assert row["images"] * row["gpus"] == 64 and row["reduce"] < row["low"] < row["high"]
        assert row["speed_up"] == pytest.approx([one[k] / row[k] for k in ("low", "high")])
    slow, middle, fast = (row["high"] for row in more[3:])
    assert slow > middle > fast
    assert profile.main([*wide, "--batch", "4", "--gpus", "64"]) == 0
    assert "more GPUs would need a --batch above 4" in capsys.readouterr().out


def test_a_second_machine_pays_where_its_link_breaks_even():
    config = make_config("dcgan", precision="bf16")
    size, reductions = scaling.gradient_bytes(config)

    def step(gpus: int, compute: float, gbit: float) -> scaling.Row:
        reduce = scaling.ring_seconds(gpus, size, reductions, gbit / 8 * 1e9, scaling.NETWORK_LATENCY)
        return scaling.Row(gpus, 1, "", reduce, compute + reduce, compute + reduce, (1, 1))

    one = scaling.Row(8, 1, "", 0.0, 0.1, 0.2, (1, 1))
    pays = scaling.second_machine(config, [one, step(16, 0.05, 10)])
    assert pays is not None
    assert step(16, 0.05, pays[0]).low == pytest.approx(one.low)
    assert step(16, 0.05, pays[1]).high == pytest.approx(one.high)
    assert scaling.second_machine(config, [one, step(16, 0.2, 10)]) == (float("inf"), float("inf"))
    assert scaling.second_machine(config, [one]) is None


def test_a_sweep_ends_and_names_the_best_batch(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(profile, "step_times", lambda engine, calls, _: ([0.1] * len(calls), 0.1))
    monkeypatch.setattr(estimate, "peak_bytes", lambda config: config.batch)
    monkeypatch.setattr(profile, "fits", lambda size, device: size < 32)
    assert profile.main([*OPTIONS, "--sweep", "batch"]) == 0
    lines = capsys.readouterr().out.splitlines()
    batches = ["batch 4", "batch 8", "batch 16", "batch 32"]
    assert [line.partition(":")[0] for line in lines] == [*batches, "best"]
    assert "half of the free memory" in lines[3] and "--batch 16," in lines[4]
    monkeypatch.setattr(profile, "fits", lambda size, device: True)
    times = iter([1.0, 1.0, 3.0, 9.0])
    monkeypatch.setattr(profile, "step_times", lambda engine, calls, _: ([0.0] * len(calls), next(times)))
    assert profile.main([*OPTIONS, "--sweep", "batch"]) == 0
    out = capsys.readouterr().out
    assert "best: --batch 8," in out and "batch 64" not in out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--arch", "styelgan"], "did you mean stylegan"),
        (["--arch", "dcgan", "--w-dim", "3"], "--w-dim does not apply"),
        (["--arch", "dcgan", "--estimate", "v100"], "--estimate"),
        (["--arch", "dcgan", "--estimate", "a100", "--sweep", "batch"], "leave out"),
        (["--arch", "dcgan", "--gpus", "4"], "--gpus takes 2 or more, and needs --estimate"),
        (["--arch", "dcgan", "--seconds", "0"], "--seconds must be above 0"),
        (["--arch", "dcgan", "--json", "/nowhere/x.json"], "no folder /nowhere"),
    ],
)
def test_bad_usage_is_one_line(options: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    assert profile.main(options) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and said in err


def test_doctor_finds_a_healthy_machine(capsys: pytest.CaptureFixture[str]):
    assert doctor.main(["--device", "cpu"]) == 0
    out = capsys.readouterr().out
    for said in (
        "torch 2",
        "threads",
        "caches",
        "kernels    run as their references",
        "bias_act",
        "norm_act",
    ):
        assert said in out
    assert out.splitlines()[-1].startswith("verdict: good: 8 operations agree with float64")


def sample(dtype, device, key, small):
    return (torch.linspace(-1, 1, 8, dtype=dtype, device=device).requires_grad_(),)


def cubed(x):
    return x**3


@pytest.mark.parametrize(
    "wrong", [lambda x: x**3 + 1e-4, lambda x: x.detach() ** 2 * x, lambda x: x.float() / 0 * 0]
)
def test_doctor_finds_a_wrong_reference(
    wrong: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def broken(x: Tensor) -> Tensor:
        return cubed(x) if x.dtype == torch.float64 else wrong(x)

    op = Op("cube", {"triton": cubed, "reference": broken}, sample)
    monkeypatch.setattr(doctor, "classes", lambda: iter([(op, ())]))
    assert doctor.main(["--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert "cube" in out and "WRONG" in out and "differs from float64" in out
    assert out.splitlines()[-1].startswith("verdict: NOT GOOD: cube")


def test_doctor_compares_kernels_in_the_interpreter(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    op = Op("cube", {"triton": lambda x: x**3 * 1.01, "reference": cubed}, sample)
    monkeypatch.setattr(doctor, "classes", lambda: iter([(op, ())]))
    assert doctor.main(["--device", "cpu"]) == 1
    assert "kernel cube (triton) is wrong on this device" in capsys.readouterr().out


def test_doctor_refuses_a_device_that_is_not_there(capsys: pytest.CaptureFixture[str]):
    assert doctor.main(["--device", "tpu"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
