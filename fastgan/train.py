"""python -m fastgan.train: flags to a configuration, then the loop."""

import dataclasses
import os
import resource
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from fastgan import cli, doctor, nvml, precompile, report
from fastgan.checkpoint import load_checkpoint, save_checkpoint
from fastgan.cli import duration
from fastgan.config import Config, UsageError, make_config, resolve_device
from fastgan.data import Feed, PairFeed, load_images
from fastgan.engine import Engine
from fastgan.evaluate import Evaluator
from fastgan.images import grid, save_image, side_by_side, to_uint8
from fastgan.run_folder import BEST, RunFolder, check_tensorboard, new_run_dir, save_generator

GRID = 64  # images of a sample grid


def parser() -> cli.Parser:
    p = cli.Parser(
        prog="fastgan train",
        description="Train a GAN. Rerun the same command with the same --run-dir to resume it.",
    )
    p.add_argument("--run-dir", type=Path, help="folder of the run (default: a new one under runs/)")
    p.add_argument(
        "--tensorboard", action="store_true", help="write TensorBoard's event files, too, to its sub-folder"
    )
    p.add_config()
    return p


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(_main, argv)


def _main(argv: Sequence[str] | None) -> int:
    given = vars(parser().parse_args(argv))
    run_dir, tensorboard = given.pop("run_dir"), given.pop("tensorboard")
    if tensorboard:
        check_tensorboard()
    config, device = resolve_device(make_config(**given))
    command = shlex.join(["python", "-m", "fastgan.train", *(sys.argv[1:] if argv is None else argv)])
    return train(config, device, run_dir or new_run_dir(config), command, tensorboard)


class StopRequest:
    """SIGINT or SIGTERM ask for a stop after the current step; a second one stops at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self.restore()
        print(f"\n{signal.Signals(number).name}: finishing the step, then saving", file=sys.stderr)

    def restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Progress:
    """A tqdm bar on a terminal, a plain line a tick elsewhere."""

    def __init__(self, total: int, start: int):
        self.bar = tqdm(total=total, initial=start, unit="img", unit_scale=True, disable=None, smoothing=0.1)

    def say(self, message: str) -> None:
        if self.bar.disable:
            print(message, flush=True)
        else:
            self.bar.write(message)

    def advance(self, images: int) -> None:
        self.bar.update(images)

    def tick(self, line: dict[str, Any], left: float, losses: dict[str, float]) -> None:
        figures = {"img/s": f"{line['images_per_second']:.0f}"}
        figures |= {k.replace("loss_", ""): f"{v:.3g}" for k, v in losses.items() if not k.endswith("score")}
        if self.bar.disable:
            shown = "  ".join(f"{k} {v}" for k, v in figures.items())
            print(f"{line['images'] / 1000:8.1f} kimg  {shown}  {duration(left)} left", flush=True)
        else:
            self.bar.set_postfix(figures)

    def close(self) -> None:
        self.bar.close()


def cpu_seconds() -> float:
    """That this process, on all its threads, and what it has started and waited for have computed."""
    uses = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(use.ru_utime + use.ru_stime for use in uses)


def peak_memory_mib(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) >> 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def out_of_memory(config: Config, device: torch.device) -> str:
    """Where the memory of a GPU went, and the ways out; asked while what fills it is still held."""
    allocated, reserved = (
        f"{read(device) / 2**30:.2f} GiB"
        for read in (torch.cuda.memory_allocated, torch.cuda.memory_reserved)
    )
    ways = [f"use a --batch below {config.batch}"]
    given = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
    if "expandable_segments:True" not in given:
        setting = ",".join(filter(None, (given, "expandable_segments:True")))
        ways.append(f"set PYTORCH_ALLOC_CONF={setting}, which leaves fewer gaps between blocks")
    return f"out of memory on {device}: {allocated} allocated of {reserved} reserved; {' or '.join(ways)}"


def session(engine: Engine, command: str) -> dict[str, Any]:
    """What the report says on this start of the training."""
    return {
        "images": engine.images,
        "time": datetime.now().astimezone().isoformat(" ", "seconds"),
        "command": command,
        "folder": os.getcwd(),
        "environment": doctor.environment(engine.device, engine.config.precision),
    }


def open_data(config: Config, device: torch.device) -> tuple[Config, Feed | PairFeed, str]:
    """The config, now with the number of classes, the feed, and a line on what it holds."""
    sets = [
        load_images(name, config.resolution, config.channels, config.crop, config.skip_bad)
        for name in (config.data, config.data_b)[: config.domains]
    ]
    if config.cond:
        if len(sets[0].classes) < 2:
            raise UsageError(f"--cond needs classes, but --data {config.data} has none; use sub-folders")
        config = dataclasses.replace(config, classes=len(sets[0].classes))
    feeds = [Feed(images, device, config.seed + i, config.mirror) for i, images in enumerate(sets)]
    skipped = sum(len(images.skipped) for images in sets)
    about = " and ".join(f"{len(images)} images of {images.name}" for images in sets)
    about += f", {skipped} files left out" if skipped else ""
    return config, feeds[0] if len(feeds) == 1 else PairFeed(*feeds), about


def train(config: Config, device: torch.device, run_dir: Path, command: str, tensorboard: bool) -> int:
    """Run or resume `config` in `run_dir`; returns the exit code. `command` is what the report says."""
    config, feed, about = open_data(config, device)
    judge = Evaluator.of_run(config, device) if config.metrics and config.eval_every > 0 else None
    folder = RunFolder(run_dir, config)
    stop = StopRequest()
    progress = helper = None
    try:
        engine = Engine(config, device)
        engine.g.helper = helper = precompile.start(config)
        checkpoint = load_checkpoint(run_dir / "checkpoints")
        if checkpoint:
            engine.load_state(*checkpoint)
        folder.rewind_log(engine.images)
        folder.record_session(session(engine, command))
        if tensorboard:
            folder.open_events(engine.images)
        progress = Progress(config.images, min(engine.images, config.images))
        engine.announce = progress.say
        progress.say(f"{config.arch} on {about}: {run_dir}")
        if engine.images:
            progress.say(f"resuming at {engine.images / 1000:.1f} kimg")
        reals = feed.batch(0, min(GRID, feed.count))[0]
        save_image(run_dir / "reals.png", picture(config, reals / 127.5 - 1))
        report.write(run_dir)
        return _loop(config, engine, feed, reals, folder, judge, stop, progress)
    except torch.OutOfMemoryError:
        raise UsageError(out_of_memory(config, device)) from None
    finally:
        stop.restore()
        if helper:
            helper.terminate()
            helper.wait()
        if progress:
            progress.close()
        feed.close()
        folder.close()


def _loop(
    config: Config,
    engine: Engine,
    feed: Feed | PairFeed,
    reals: torch.Tensor,
    folder: RunFolder,
    judge: Evaluator | None,
    stop: StopRequest,
    progress: Progress,
) -> int:
    latents = torch.randn(GRID, engine.G.z_dim, generator=torch.Generator().manual_seed(config.seed))
    power = nvml.Meter(engine.device)
    first, began = engine.images, time.perf_counter()
    tick_first, tick_began, tick_compiling = first, began, 0.0
    best = folder.best(judge.better) if judge else None

    def save() -> None:
        engine.settle()
        state = engine.state()
        save_checkpoint(folder.path / "checkpoints", state, engine.images, config.keep)
        save_generator(folder.path / "generator.safetensors", state, config, engine.images)

    while engine.images < config.images and stop.signal is None:
        engine.step(*feed.batch(engine.images, config.step_images))
        progress.advance(config.step_images)
        done = engine.images >= config.images
        if done or crossed(engine.images, config.step_images, config.tick_kimg):
            losses = engine.take_losses()  # waits for the device, so the clock is read after it
            now = time.perf_counter()
            training = now - tick_began - (engine.compiling - tick_compiling)
            rate = (engine.images - tick_first) / max(training, 1e-9)
            line = {
                "images": engine.images,
                "seconds": round(now - began, 3),
                "cpu_seconds": round(cpu_seconds(), 3),
                "images_per_second": round(rate, 2),
                **losses,
                "memory_mib": peak_memory_mib(engine.device),
                **power.read(),
            }
            if judge and crossed(engine.images, config.step_images, config.tick_kimg * config.eval_every):
                engine.settle()
                figures = judge.measure(engine.ema)
                progress.say(f"{engine.images / 1000:8.1f} kimg  {judge.summary(figures)}")
                if judge.better(figures, best):
                    best = figures
                    save_generator(folder.path / BEST, engine.state(), config, engine.images)
                line |= {f"metric_{key}": value for key, value in figures.items()}
            folder.log(line)
            progress.tick(line, (config.images - engine.images) / rate, losses)
            folder.save_samples(engine.images, sample_grid(engine, latents, reals))
            report.write(folder.path)
            tick_first, tick_began, tick_compiling = engine.images, time.perf_counter(), engine.compiling
        if done or crossed(engine.images, config.step_images, config.checkpoint_kimg):
            save()
            folder.plot()

    if stop.signal is not None and engine.images < config.images:
        save()
        progress.say(
            f"stopped at {engine.images / 1000:.1f} kimg; "
            f"the same command with --run-dir {folder.path} resumes"
        )
        return 128 + stop.signal
    seconds = time.perf_counter() - began
    trained, training = engine.images - first, seconds - engine.compiling
    progress.close()
    if trained:
        print(
            f"trained {trained / 1000:.1f} kimg in {duration(seconds)}, "
            f"of which {duration(engine.compiling)} compiling: "
            f"{trained / training:.0f} images/s, {1000 * training / trained:.2f} s/kimg"
        )
    print(f"report:   {folder.path / 'report.html'}")
    print(f"pictures: {folder.path / 'samples'}")
    if best:
        print(f"best:     {folder.path / BEST}")
    print(f"more:     python -m fastgan.generate --run {folder.path} --count 100 --out pictures")
    return 0


def crossed(images: int, batch: int, kimg: float) -> bool:
    """Whether the last batch took `images` over a multiple of `kimg` thousand."""
    every = kimg * 1000
    return images // every > (images - batch) // every


@torch.no_grad()
def sample_grid(engine: Engine, latents: torch.Tensor, reals: torch.Tensor) -> np.ndarray:
    """Samples of fixed latents, class by class where there are classes; what becomes of real images where
    the generator translates them."""
    engine.settle()
    c = engine.config
    labels = torch.arange(len(latents), device=engine.device) % c.c_dim if c.cond else None
    if getattr(engine.ema, "translates", False):
        pairs = reals / 127.5 - 1
        return grid(np.concatenate([side_by_side(pairs), side_by_side(engine.ema(None, pairs))], axis=2))
    return picture(c, engine.ema(latents.to(engine.device), engine.one_hot(labels)))


def picture(config: Config, images: torch.Tensor) -> np.ndarray:
    """A grid of -1..1 [N, C, R, R]; of two domains, pairs side by side."""
    return grid(side_by_side(images) if config.domains == 2 else to_uint8(images))


if __name__ == "__main__":
    sys.exit(main())
