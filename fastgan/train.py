"""python -m fastgan.train: flags to a configuration, then the loop.

Started by torchrun or srun, each process is a rank of one run (distributed.py), of which the first alone
prints and writes.
"""

import dataclasses
import errno
import os
import resource
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from fastgan import cli, distributed, doctor, fit, nvml, precompile, report
from fastgan.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from fastgan.cli import duration
from fastgan.config import Config, UsageError, batch_unit, make_config, resolve_device
from fastgan.data import Feed, PairFeed, images_for
from fastgan.data.images import empty_classes
from fastgan.distributed import ALONE, Launch, Ranks
from fastgan.engine import Engine
from fastgan.evaluate import Evaluator
from fastgan.health import RETRIES, TICKS, Trouble, collapse, diagnosis, spread
from fastgan.images import grid, save_image, side_by_side, to_uint8
from fastgan.run_folder import (
    BEST,
    RunFolder,
    check_tensorboard,
    new_run_dir,
    restore_generator,
    save_generator,
)

GRID = 64  # images of a sample grid


def parser() -> cli.Parser:
    """The command's options."""
    p = cli.Parser(
        prog="fastgan train",
        description="Train a GAN. Rerun the same command with the same --run-dir to resume it.",
    )
    p.add_argument("--run-dir", type=Path, help="folder of the run (default: a new one under runs/)")
    p.add_argument(
        "--tensorboard",
        action="store_true",
        help="write TensorBoard's event files, too, to the folder's tensorboard/",
    )
    p.add_argument(
        "--dist-timeout",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="with several ranks: how long one may be silent before the others end (default: 600)",
    )
    p.add_config(batch=batch_or_auto)
    return p


def batch_or_auto(given: str) -> int | str:
    """The type of --batch."""
    return given if given == "auto" else int(given)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return cli.run(_main, argv)


def _main(argv: Sequence[str] | None) -> int:
    given = vars(parser().parse_args(argv))
    run_dir, tensorboard, timeout = (given.pop(k) for k in ("run_dir", "tensorboard", "dist_timeout"))
    if tensorboard:
        check_tensorboard()
    launch = distributed.launched()
    if given.get("batch") == "auto":
        given["batch"] = find_batch(given, run_dir, launch)
    config, device = resolve_device(make_config(**given))
    command = shlex.join(["python", "-m", "fastgan.train", *(sys.argv[1:] if argv is None else argv)])
    if launch is None:
        return train(config, device, run_dir or new_run_dir(config), command, tensorboard)
    if not timeout > 0:
        raise UsageError(f"--dist-timeout must be above 0: got {timeout}")
    distributed.check_shares(config, launch.size)
    if run_dir is None and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        raise UsageError("torchrun --max-restarts needs --run-dir, for a restart to find the run")
    device = distributed.own_device(device, launch)
    try:
        with distributed.joined(launch, device, timeout) as ranks:
            return train(config, device, run_dir or new_run_dir(config), command, tensorboard, ranks)
    except distributed.Lost as error:
        print(f"fastgan: {error}", file=sys.stderr)
        return 1


def find_batch(given: dict[str, Any], run_dir: Path | None, launch: Launch | None) -> int:
    """What --batch auto means: the batch of the run in `run_dir`, else the largest that fits the memory.

    At most as many as there are images, which are loaded meanwhile, as they take their share of a GPU.
    """
    if known := fit.own_batch(run_dir):
        return known
    if launch:
        raise UsageError(
            f"--batch auto finds the batch of one process: try it with one, and give {launch.size} times that"
        )
    config, device = resolve_device(make_config(**{k: v for k, v in given.items() if k != "batch"}))
    config, feed, _ = open_data(config, device)
    try:
        batch = fit.largest_batch(config, device, feed.count)
    finally:
        feed.close()
    print(f"--batch auto: {batch}", flush=True)
    return batch


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
        """Signals do again what they did before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Progress:
    """A tqdm bar on a terminal, a plain line a tick elsewhere; nothing at all if not `shown`."""

    def __init__(self, total: int, start: int, shown: bool = True):
        self.shown, hidden = shown, None if shown else True  # None: where there is no terminal
        self.bar = tqdm(
            total=total, initial=start, unit="img", unit_scale=True, disable=hidden, smoothing=0.1
        )

    def say(self, message: str) -> None:
        """A line of its own."""
        if not self.shown:
            return
        if self.bar.disable:
            print(message, flush=True)
        else:
            self.bar.write(message)

    def advance(self, images: int) -> None:
        """So many images more."""
        self.bar.update(images)

    def tick(self, line: dict[str, Any], left: float, losses: dict[str, float]) -> None:
        """A tick's figures; `left` is the time to the end in seconds."""
        figures = {"img/s": f"{line['images_per_second']:.0f}"}
        figures |= {k.replace("loss_", ""): f"{v:.3g}" for k, v in losses.items() if not k.endswith("score")}
        if self.bar.disable:
            shown = "  ".join(f"{k} {v}" for k, v in figures.items())
            print(f"{line['images'] / 1000:8.1f} kimg  {shown}  {duration(left)} left", flush=True)
        else:
            self.bar.set_postfix(figures)

    def back_to(self, images: int) -> None:
        """As many images as a checkpoint has seen."""
        self.bar.n = images
        self.bar.refresh()

    def close(self) -> None:
        """No bar any more."""
        self.bar.close()


def cpu_seconds() -> float:
    """That this process, on all its threads, and what it has started and waited for have computed."""
    uses = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(use.ru_utime + use.ru_stime for use in uses)


def peak_memory_mib(device: torch.device) -> int:
    """Of a GPU what tensors took at most, of a CPU what the process did."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) >> 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def memory_held(device: torch.device) -> str:
    """Where the memory went; asked while what fills it is still held."""
    if device.type != "cuda":
        return f"out of memory on {device} at {peak_memory_mib(device) / 1024:.2f} GiB"
    allocated, reserved = (
        f"{read(device) / 2**30:.2f} GiB"
        for read in (torch.cuda.memory_allocated, torch.cuda.memory_reserved)
    )
    return f"out of memory on {device}: {allocated} allocated of {reserved} reserved"


def out_of_memory(held: str, config: Config, device: torch.device, ranks: int = 1) -> str:
    """One line on `memory_held` and the ways out; asked when the run has let go of its memory."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    share = dataclasses.replace(config, batch=config.batch // ranks)
    smaller = ranks * fit.smaller_batch(share, fit.room(device))
    ways = [f"use --batch {smaller}, which should fit (estimate{'; --batch auto tries' * (ranks == 1)})"]
    if not smaller:
        ways = [f"not even --batch {ranks * batch_unit(config)} should fit (estimate): use smaller networks"]
    given = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
    if device.type == "cuda" and "expandable_segments:True" not in given:
        setting = ",".join(filter(None, (given, "expandable_segments:True")))
        ways.append(f"set PYTORCH_ALLOC_CONF={setting}, which leaves fewer gaps between blocks")
    return f"{held}; {' or '.join(ways)}"


def disk_full(run_dir: Path, error: OSError) -> str:
    """What is safe, and the way out."""
    kept = checkpoints(run_dir / "checkpoints")
    safe = (
        f"the checkpoint of {int(kept[-1].stem):,} images is intact" if kept else "there is no checkpoint yet"
    )
    return (
        f"--run-dir {run_dir} cannot be written to: {error.strerror}; {safe}. Make room there, then rerun "
        f"the same command with --run-dir {shlex.quote(str(run_dir))} to go on"
    )


def session(engine: Engine, command: str) -> dict[str, Any]:
    """What the report says on this start of the training."""
    ranks = engine.ranks.size  # of which the command says nothing: a launcher has its own
    return {
        "images": engine.images,
        "time": datetime.now().astimezone().isoformat(" ", "seconds"),
        "command": command,
        "folder": os.getcwd(),
        "environment": doctor.environment(engine.device, engine.config.precision)
        | ({"ranks": str(ranks)} if ranks > 1 else {}),
    }


def open_data(config: Config, device: torch.device) -> tuple[Config, Feed | PairFeed, str]:
    """The config, now with the number of classes, the feed, and a line on what it holds."""
    sets = [images_for(config, name) for name in (config.data, config.data_b)[: config.domains]]
    if config.cond:
        if len(sets[0].classes) < 2:
            raise UsageError(
                f"--cond needs classes, but --data {config.data} has none; use sub-folders or labels"
            )
        config = dataclasses.replace(config, classes=len(sets[0].classes))
    feeds = [Feed(images, device, config.seed + i, config.mirror) for i, images in enumerate(sets)]
    skipped = sum(len(images.skipped) for images in sets)
    about = " and ".join(f"{len(images)} images of {images.name}" for images in sets)
    about += f", {skipped} files left out" if skipped else ""
    others = sum(len(images.others) for images in sets)
    about += f", {others} other files or empty folders not read" if others else ""
    empty = empty_classes(sets[0].labels, sets[0].classes)
    about += f", no images of {enumerated(empty)}" if empty else ""
    return config, feeds[0] if len(feeds) == 1 else PairFeed(*feeds), about


def enumerated(classes: Sequence[str]) -> str:
    """How many classes there are, and the first of them."""
    shown = ", ".join(classes[:5]) + (", ..." if len(classes) > 5 else "")
    return f"{len(classes)} class{'es' * (len(classes) > 1)} ({shown})"


def open_shared_data(
    config: Config, device: torch.device, ranks: Ranks
) -> tuple[Config, Feed | PairFeed, str]:
    """`open_data` on every rank; a machine's first rank fills the cache that the others read."""
    data = None
    for turn in (True, False):
        with ranks.errors_shared("while the data is read"):
            if turn == (ranks.local == 0):
                data = open_data(config, device)
    assert data is not None
    config, _, about = data
    ranks.require_same({"data": about, "torch": torch.__version__, **dataclasses.asdict(config)})
    return data


def train(
    config: Config,
    device: torch.device,
    run_dir: Path,
    command: str,
    tensorboard: bool,
    ranks: Ranks = ALONE,
) -> int:
    """Run or resume `config` in `run_dir`; returns the exit code. `command` is what the report says."""
    config, feed, about = open_shared_data(config, device, ranks)
    folder = judge = stop = engine = progress = helper = None
    try:
        with ranks.errors_shared("while the run folder is opened"):
            if ranks.first:
                judge = Evaluator.of_run(config, device) if config.metrics and config.eval_every > 0 else None
                folder = RunFolder(run_dir, config)
        stop = StopRequest()
        engine = Engine(config, device, ranks)
        engine.g.helper = helper = precompile.start(config) if ranks.size == 1 else None
        if checkpoint := load_shared_checkpoint(folder, ranks, print):
            engine.load_state(*checkpoint)
        ranks.verify(engine.shared_state(), engine.images)
        progress = Progress(config.images, min(engine.images, config.images), shown=ranks.first)
        engine.announce = progress.say
        over = f", {ranks.size} ranks" if ranks.size > 1 else ""
        progress.say(f"{config.arch} on {about}{over}: {run_dir}")
        if engine.images:
            progress.say(f"resuming at {engine.images / 1000:.1f} kimg")
        reals = feed.batch(0, min(GRID, feed.count))[0]
        if folder:
            if checkpoint:
                restore_generator(run_dir / "generator.safetensors", *checkpoint, config)
            folder.rewind_log(engine.images)
            folder.record_session(session(engine, command))
            if tensorboard:
                folder.open_events(engine.images)
            save_image(run_dir / "reals.png", picture(config, reals / 127.5 - 1))
            report.write(run_dir)
        return _loop(config, engine, feed, reals, folder, judge, stop, progress)
    except (RuntimeError, MemoryError) as error:
        if not fit.ran_out(error):
            raise
        held = memory_held(device)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise UsageError(disk_full(run_dir, error)) from None
    finally:
        if stop:
            stop.restore()
        if helper:
            helper.terminate()
            helper.wait()
        if progress:
            progress.close()
        feed.close()
        if folder:
            folder.close()
    del engine, feed  # what had run out is free again, for the estimate
    raise UsageError(out_of_memory(held, config, device, ranks.size))


def load_shared_checkpoint(
    folder: RunFolder | None, ranks: Ranks, warn: Callable[[str], None]
) -> tuple[dict[str, torch.Tensor], int] | None:
    """`load_checkpoint` of the first rank's `folder`, on all ranks."""
    checkpoint = None
    with ranks.errors_shared("while a checkpoint is read"):
        if folder:
            checkpoint = load_checkpoint(folder.path / "checkpoints", warn)
    return ranks.broadcast(checkpoint)


def _loop(
    config: Config,
    engine: Engine,
    feed: Feed | PairFeed,
    reals: torch.Tensor,
    folder: RunFolder | None,
    judge: Evaluator | None,
    stop: StopRequest,
    progress: Progress,
) -> int:
    ranks, share = engine.ranks, config.step_images // engine.ranks.size
    latents = torch.randn(GRID, engine.G.z_dim, generator=torch.Generator().manual_seed(config.seed))
    power = nvml.Meter(engine.device)
    first, began = engine.images, time.perf_counter()
    tick_first, tick_began, tick_compiling = first, began, 0.0
    best, recent = remembered(folder, judge)
    data_spread = max(spread(shown(config, reals / 127.5 - 1)), 1e-9)
    warnings: list[str] = []

    def trouble(saving: bool) -> Trouble | None:
        return engine.trouble() or (engine.spoilt() if saving else None)

    def save() -> None:
        engine.settle()
        ranks.verify(engine.shared_state(), engine.images)
        state = engine.whole_state()
        if not folder:
            return
        save_checkpoint(folder.path / "checkpoints", state, engine.images, config.keep)
        save_generator(folder.path / "generator.safetensors", state, config, engine.images)

    asked = 0  # the signal by which any rank has been asked to stop
    while engine.images < config.images and not (asked := ranks.most(stop.signal or 0)):
        engine.step(*feed.batch(engine.images + ranks.rank, share, ranks.size))
        progress.advance(config.step_images)
        done = engine.images >= config.images
        ticks = done or crossed(engine.images, config.step_images, config.tick_kimg)
        regular = crossed(engine.images, config.step_images, config.checkpoint_kimg)
        saves = done or regular
        if (ticks or saves) and (found := trouble(saves)):
            warnings.append(roll_back(engine, folder, found, progress))
            best, recent = remembered(folder, judge)
            tick_first, tick_began, tick_compiling = engine.images, time.perf_counter(), engine.compiling
            continue
        losses = engine.take_losses() if ticks else {}  # waits for the device; the clock is read after it
        if ticks and folder:
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
            samples = sample_images(engine, latents, reals)
            line["spread"] = round(spread(samples) / data_spread, 4)
            if symptom := collapse([*recent, line], config.loss):
                warnings.append(symptom)
                progress.say(f"warning: {symptom}")
            if warnings:
                line["warning"] = "; ".join(warnings)
                warnings.clear()
            recent = [*recent, line][1 - TICKS :]
            folder.log(line)
            progress.tick(line, (config.images - engine.images) / rate, losses)
            folder.save_samples(engine.images, grid(samples))
            report.write(folder.path)
            tick_first, tick_began, tick_compiling = engine.images, time.perf_counter(), engine.compiling
        if regular:
            engine.retries = 0  # a stop between two checkpoints changes no noise
        if saves:
            save()
            if folder:
                folder.plot()

    if asked:
        if found := trouble(saving=True):
            progress.say(f"nothing saved since the last checkpoint: {found}")
        else:
            save()
        if folder:
            progress.say(
                f"stopped at {engine.images / 1000:.1f} kimg; "
                f"the same command with --run-dir {shlex.quote(str(folder.path))} resumes"
            )
        return 128 + asked
    if not folder:
        return 0
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
    run = shlex.quote(str(folder.path))
    print(f"more:     python -m fastgan.generate --run {run} --count 100 --out pictures")
    return 0


def crossed(images: int, batch: int, kimg: float) -> bool:
    """Whether the last batch took `images` over a multiple of `kimg` thousand."""
    every = kimg * 1000
    return images // every > (images - batch) // every


def remembered(
    folder: RunFolder | None, judge: Evaluator | None
) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """What a resumed run knows of before: the best figures, and the log's last lines, by which collapse is
    told."""
    if not folder:
        return None, []
    return folder.best(judge.better) if judge else None, folder.read_log()[1 - TICKS :]


def roll_back(engine: Engine, folder: RunFolder | None, trouble: Trouble, progress: Progress) -> str:
    """Back to the last checkpoint, or to the start, to go on with other noise; returns what to log.

    The checkpoint is told how often it has been gone back to: a run that is killed after this goes on as this
    one does. UsageError with a diagnosis if it has been often enough, or --on-nan is stop.
    """
    config, retries, failed = engine.config, engine.retries + 1, engine.images
    files = checkpoints(folder.path / "checkpoints") if folder else []
    if config.on_nan == "stop" or retries > RETRIES:
        said = diagnosis(trouble, config, engine.retries, str(files[-1]) if files else None)
        if folder:
            folder.log({"images": trouble.images, "warning": f"stopped: {said}"})
            report.write(folder.path)
        raise UsageError(said)
    if checkpoint := load_shared_checkpoint(folder, engine.ranks, progress.say):
        engine.load_state(*checkpoint)
        engine.retries = retries
        state = engine.whole_state()
        if folder:
            save_checkpoint(folder.path / "checkpoints", state, engine.images, config.keep)
    else:
        engine.restart()
        engine.retries = retries
    if folder:
        folder.rewind_log(engine.images)
    progress.back_to(engine.images)
    said = (
        f"{trouble}: went back from {failed:,} to {engine.images:,} images, to go on with other noise "
        f"({retries} of {RETRIES})"
    )
    progress.say(f"warning: {said}")
    return said


@torch.no_grad()
def sample_images(engine: Engine, latents: torch.Tensor, reals: torch.Tensor) -> np.ndarray:
    """uint8 [N, H, W, C]: samples of fixed latents, class by class where there are classes; what becomes of
    real images where the generator translates them."""
    engine.settle()
    c = engine.config
    labels = torch.arange(len(latents), device=engine.device) % c.c_dim if c.cond else None
    if getattr(engine.ema, "translates", False):
        pairs = reals / 127.5 - 1
        return np.concatenate([side_by_side(pairs), side_by_side(engine.ema(None, pairs))], axis=2)
    return shown(c, engine.ema(latents.to(engine.device), engine.one_hot(labels)))


def picture(config: Config, images: torch.Tensor) -> np.ndarray:
    """A grid of -1..1 [N, C, R, R]; of two domains, pairs side by side."""
    return grid(shown(config, images))


def shown(config: Config, images: torch.Tensor) -> np.ndarray:
    """Images -1..1 [N, C, R, R] as uint8 [N, H, W, C]; of two domains, pairs side by side."""
    return side_by_side(images) if config.domains == 2 else to_uint8(images)


if __name__ == "__main__":
    sys.exit(main())
