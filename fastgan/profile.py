"""python -m fastgan.profile: where the time, the memory and the energy of a training step go."""

import dataclasses
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from fastgan import cli, doctor, estimate, nvml, scaling
from fastgan.config import Config, UsageError, batch_unit, make_config, resolve_device
from fastgan.data.feed import Batch, fits
from fastgan.engine import Engine
from fastgan.limit import (
    PhaseCall,
    grown,
    limit,
    phase_calls,
    random_images,
    random_step,
    synchronize,
    update_call,
)
from fastgan.train import peak_memory_mib

TOP = 10
OUT_OF_STEAM = 1.02  # a doubled batch that gains less than this ends a sweep


def parser() -> cli.Parser:
    """The command's options."""
    p = cli.Parser(prog="fastgan profile", description="Measure a training step on this device.")
    p.add_argument("--seconds", type=float, default=3.0, help="time to measure each phase for (default: 3)")
    p.add_argument("--trace", type=Path, metavar="FILE", help="write a Chrome trace of a step with penalties")
    p.add_argument("--json", type=Path, metavar="FILE", help="write every figure")
    p.add_argument(
        "--estimate", choices=[*estimate.DEVICES], help="predict for a device that is not here, run nothing"
    )
    p.add_argument(
        "--gpus", type=int, metavar="N", help="with --estimate: predict the gain of up to N of them"
    )
    p.add_argument("--sweep", choices=("batch",), help="find the batch with most images/s on this device")
    p.add_config()
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return cli.run(_main, argv)


def _main(argv: Sequence[str] | None) -> int:
    given = vars(parser().parse_args(argv))
    seconds, trace, out, other, gpus, sweep = (
        given.pop(k) for k in ("seconds", "trace", "json", "estimate", "gpus", "sweep")
    )
    if not seconds > 0:
        raise UsageError(f"--seconds must be above 0: got {seconds}")
    if other and (trace or sweep):
        raise UsageError("--estimate runs nothing: leave out --trace and --sweep")
    if gpus is not None and (gpus < 2 or not other):
        raise UsageError("--gpus takes 2 or more, and needs --estimate")
    for path in (trace, out):
        if path and not path.parent.is_dir():
            raise UsageError(f"{path} cannot be written: there is no folder {path.parent}")
    config = make_config(**given)
    if other:
        precision = "bf16" if config.precision == "auto" else config.precision
        config = dataclasses.replace(config, precision=precision)
        lines, figures = estimate.report(config, other)
        if gpus:
            more, figures["scaling"] = scaling.report(config, other, gpus)
            lines += more
        print("\n".join(lines))
    else:
        config, device = resolve_device(config)
        if sweep:
            figures = {"sweep": sweep_batch(config, device, seconds)}
        else:
            figures = profile(config, device, seconds, trace)
    if out:
        out.write_text(json.dumps({"config": dataclasses.asdict(config), **figures}, indent=1))
    return 0


def timed(run: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """Median seconds of a run: at least three, for about `seconds`, after one to warm up."""
    run()
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def step_times(engine: Engine, calls: list[PhaseCall], seconds: float) -> tuple[list[float], float]:
    """Median seconds of each phase, and of the optimizers and the moving average."""
    times = [timed(call, engine.device, seconds) for call in calls]
    return times, timed(update_call(engine), engine.device, seconds / 4)


def costliest(calls: list[PhaseCall], device: torch.device) -> list[tuple[str, float]]:
    """The (kernel or op, own seconds a step) that take longest, every phase weighted by its share."""
    cuda = device.type == "cuda"
    total: defaultdict[str, float] = defaultdict(float)
    for call in calls:
        with torch.profiler.profile(activities=_activities(device), acc_events=True) as profiler:
            call()
            synchronize(device)
        for event in profiler.key_averages():
            if cuda and event.device_type.name != "CUDA":
                continue  # the op that launched a kernel
            microseconds = event.self_device_time_total if cuda else event.self_cpu_time_total
            total[event.key] += call.share * microseconds / 1e6
    return sorted(total.items(), key=lambda item: -item[1])[:TOP]


def _activities(device: torch.device) -> list[ProfilerActivity]:
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]


def energy(engine: Engine, batch: Batch, calls: list[PhaseCall], seconds: float) -> dict[str, Any] | str:
    """NVML's readings over whole periods of the lazy penalties, or the line that says why there are none."""
    try:
        sampler = nvml.Sampler(engine.device)
    except nvml.Unavailable as error:
        return str(error)
    period = max(round(1 / min(call.share for call in calls)), 1)
    first = engine.images
    with sampler:
        start = time.perf_counter()
        while time.perf_counter() - start < seconds:
            for _ in range(period):
                engine.step(*batch)
            synchronize(engine.device)
    return sampler.summary(engine.images - first)


def profile(config: Config, device: torch.device, seconds: float, trace: Path | None) -> dict[str, Any]:
    """Measure, print, and return every figure; times in seconds."""
    engine, batch = grown(Engine(config, device)), random_step(config, device)
    engine.step(*batch)  # gives the optimizers their state
    calls = phase_calls(engine, random_images(config, device))
    mode = "compiled" if config.compile else "eager"
    size = f"{config.resolution}x{config.resolution}"
    print(f"{config.arch} {size}, batch {config.batch}, {config.precision}, {mode}, on {device}")
    times, update = step_times(engine, calls, seconds)
    step = update + sum(call.share * t for call, t in zip(calls, times, strict=True))
    memory = peak_memory_mib(device)
    readings = energy(engine, batch, calls, seconds)
    limits = [limit(call, config.dtype) for call in calls]
    limit_of_step = sum(call.share * each for call, each in zip(calls, limits, strict=True))
    top = costliest(calls, device)
    if trace:
        write_trace(engine, batch, trace)

    phases = [
        {"phase": c.phase.name, "share": c.share, "seconds": t, "limit": each, "fraction": each / t}
        for c, t, each in zip(calls, times, limits, strict=True)
    ]
    figures = {
        "environment": doctor.environment(device, config.precision),
        "phases": phases,
        "update_seconds": update,
        "step_seconds": step,
        "fraction_of_limit": limit_of_step / step,
        "images_per_second": config.step_images / step,
        "seconds_per_kimg": 1000 * step / config.step_images,
        "peak_memory_mib": memory,
        "costliest": [{"name": name, "seconds_per_step": t} for name, t in top],
        "nvml": readings,
    }
    _print(figures)
    return figures


def _print(figures: dict[str, Any]) -> None:
    step = figures["step_seconds"]
    print("\nphase                 runs a step        ms  of the step  fraction of the limit")
    rows = [(p["phase"], p["share"], p["seconds"], f"{p['fraction']:.2f}") for p in figures["phases"]]
    rows.append(("Adam and EMA", 1.0, figures["update_seconds"], ""))
    for name, share, seconds, fraction in rows:
        part = share * seconds / step
        print(f"{name:20}  {share:11.3f}  {1000 * seconds:8.2f}  {part:11.1%}  {fraction:>21}")
    print(f"{'step':20}  {'':11}  {1000 * step:8.2f}  {'':11}  {figures['fraction_of_limit']:21.2f}")
    print(
        f"\n{figures['images_per_second']:.2f} images/s, {figures['seconds_per_kimg']:.3f} s/kimg, "
        f"peak memory {figures['peak_memory_mib']} MiB"
    )
    print("\ncostliest              ms a step  of the step")
    for row in figures["costliest"]:
        seconds = row["seconds_per_step"]
        print(f"{1000 * seconds:32.2f}  {seconds / step:11.1%}  {row['name'][:70]}")
    readings = figures["nvml"]
    print()
    if isinstance(readings, str):
        print(readings)
        return
    for name, value in readings.items():
        shown = f"mean {value['mean']}, max {value['max']}" if isinstance(value, dict) else value
        print(f"{name:20}  {shown}")


def write_trace(engine: Engine, batch: Batch, path: Path) -> None:
    """A step with both penalties, for chrome://tracing or ui.perfetto.dev."""
    engine.images = 0
    with torch.profiler.profile(activities=_activities(engine.device), acc_events=True) as profiler:
        engine.step(*batch)
        synchronize(engine.device)
    profiler.export_chrome_trace(str(path))


def sweep_batch(config: Config, device: torch.device, seconds: float) -> list[dict[str, Any]]:
    """Double the batch until it gains nothing or does not fit; prints a line each and the best."""
    unit, rows = batch_unit(config), []
    batch = unit
    while True:
        each = dataclasses.replace(config, batch=batch)
        if device.type == "cpu" and not fits(int(estimate.peak_bytes(each)), device):
            print(f"batch {batch}: would take half of the free memory or more (estimate)")
            break
        try:
            engine = grown(Engine(each, device))
            engine.step(*random_step(each, device))
            calls = phase_calls(engine, random_images(each, device))
            times, update = step_times(engine, calls, seconds)
        except torch.OutOfMemoryError:
            print(f"batch {batch}: out of memory")
            break
        step = update + sum(call.share * t for call, t in zip(calls, times, strict=True))
        rows.append({"batch": batch, "images_per_second": each.step_images / step, "step_seconds": step})
        print(
            f"batch {batch}: {each.step_images / step:.2f} images/s, {1000 * step:.1f} ms a step", flush=True
        )
        if len(rows) > 2 and rows[-1]["images_per_second"] < OUT_OF_STEAM * rows[-3]["images_per_second"]:
            break
        batch *= 2
    if not rows:
        raise UsageError(f"--sweep batch: not even a batch of {unit} fits on {device}")
    best = max(rows, key=lambda row: row["images_per_second"])
    print(f"best: --batch {best['batch']}, {best['images_per_second']:.2f} images/s")
    return rows


if __name__ == "__main__":
    sys.exit(main())
