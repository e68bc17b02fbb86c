"""The folder of a run: its config, lock, log, pictures and networks.

config.json            every field of the configuration
metrics.jsonl          a line a tick
sessions.jsonl         a line for each start of the training: command and environment
report.html            all of this on a page
tensorboard/           event files, if asked for
samples/  reals.png    grids of fixed latents, a grid of the data
losses.png             the losses over the images seen
checkpoints/           what resuming needs
generator.safetensors  EMA weights with the config in the header: what generating needs
best.safetensors       with --metrics, the same of the snapshot that the first of them found best
"""

import dataclasses
import errno
import fcntl
import gc
import io
import json
import os
import socket
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
from torch import Tensor

from fastgan.checkpoint import clear_unfinished, load_tensors, write
from fastgan.config import Config, UsageError, changed_fields, flag
from fastgan.images import save_image
from fastgan.pretrained import Pretrained, read_own, write_own

METRICS, SESSIONS = "metrics.jsonl", "sessions.jsonl"
BEST = "best.safetensors"
Figures = dict[str, float]
LOSS_PREFIXES = ("loss", "r1", "path")


def new_run_dir(config: Config, root: Path = Path("runs")) -> Path:
    """runs/00007-stylegan-digits: one more than the highest number there is."""
    numbers = [int(p.name[:5]) for p in root.glob("[0-9][0-9][0-9][0-9][0-9]-*")]
    return root / f"{max(numbers, default=-1) + 1:05d}-{config.arch}-{Path(config.data).name}"


class RunFolder:
    """An open, locked run folder. UsageError if another process holds it or its config differs.

    The lock is the system's (flock), not the file: it ends with the process that holds it, however that ends,
    and the file that is left stops nobody. It says who holds it, for the message.
    """

    def __init__(self, path: Path, config: Config):
        self.path = path
        self._events: Any = None  # a SummaryWriter
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = (path / ".lock").open("a+")
        except OSError as error:
            raise UsageError(f"--run-dir {path} cannot be written: {error.strerror}") from None
        try:
            self._take_lock()
            self._check(config)
        except UsageError:
            self.close()
            raise
        # Before all else: a folder of a run that was killed here is recognised by it.
        write(path / "config.json", json.dumps(dataclasses.asdict(config), indent=2) + "\n")
        for name in ("samples", "checkpoints"):
            (path / name).mkdir(exist_ok=True)
            clear_unfinished(path / name)

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise UsageError(
                    f"--run-dir {self.path} is on a file system that cannot lock ({error.strerror}), so two "
                    "runs could write to it at once; choose a folder on another one"
                ) from None
            self._lock.seek(0)
            holder = " ".join(self._lock.read(200).split())
            raise UsageError(
                f"--run-dir {self.path} is in use by a live process ({holder or 'unknown'}); wait for it or "
                "choose another folder"
            ) from None
        clear_unfinished(self.path)
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._lock.flush()

    def _check(self, config: Config) -> None:
        file = self.path / "config.json"
        if not file.exists():
            strangers = [p.name for p in self.path.iterdir() if p.name != ".lock"]
            if strangers:
                raise UsageError(
                    f"--run-dir {self.path} holds {strangers[0]} but no config.json: not a run; "
                    "choose another folder"
                )
            return
        try:
            old = json.loads(file.read_text())
            changed = changed_fields(old, config)
        except (ValueError, RecursionError, AttributeError, OSError):
            raise UsageError(f"{file} is damaged; restore it or choose another --run-dir") from None
        if changed:
            what = ", ".join(f"{flag(k)} {old.get(k)} -> {getattr(config, k)}" for k in changed)
            raise UsageError(
                f"--run-dir {self.path} holds a run with another config: {what}; "
                "use its options or another folder"
            )

    def close(self) -> None:
        """Let go of the folder."""
        if self._events:
            self._events.close()
        self._lock.close()  # releases the lock; the system does so too when the process dies

    def record_session(self, session: dict[str, Any]) -> None:
        """Add what is started to sessions.jsonl; "images" of it are those seen before."""
        sessions = [*read_lines(self.path / SESSIONS), session]
        write(self.path / SESSIONS, "".join(json.dumps(line) + "\n" for line in sessions))

    def open_events(self, images: int) -> None:
        """Let `log` and `save_samples` write TensorBoard's event files as well, from `images` on; what they
        hold beyond is void."""
        from torch.utils.tensorboard import SummaryWriter  # here: the package is an extra

        self._events = SummaryWriter(self.path / "tensorboard", purge_step=images + 1)

    def log(self, line: dict[str, Any]) -> None:
        """A tick's figures, by the images seen."""
        with (self.path / METRICS).open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())  # a checkpoint that is on disk has its log there, too
        if self._events:
            for name, value in line.items():
                if name != "images" and isinstance(value, int | float):
                    self._events.add_scalar(name, value, line["images"])
            self._events.flush()

    def save_samples(self, images: int, grid: np.ndarray) -> None:
        """A tick's sample grid uint8 [H, W, C]."""
        save_image(self.path / "samples" / f"{images:09d}.png", grid)
        if self._events:
            self._events.add_image("samples", grid, images, dataformats="HWC")
            self._events.flush()

    def read_log(self) -> list[dict[str, Any]]:
        """The log's lines."""
        return read_metrics(self.path / METRICS)

    def best(self, better: Callable[[Figures, Figures | None], bool]) -> Figures | None:
        """Of all `metric_` figures in the log those that are `better` than the others, None without any."""
        best = None
        for line in self.read_log() if (self.path / BEST).exists() else ():
            figures = {k.removeprefix("metric_"): v for k, v in line.items() if k.startswith("metric_")}
            if figures and better(figures, best):
                best = figures
        return best

    def rewind_log(self, images: int) -> None:
        """Drop what was logged after `images`, a half-written line included; void such events."""
        kept = [line for line in self.read_log() if line["images"] <= images]
        if kept or (self.path / METRICS).exists():
            write(self.path / METRICS, "".join(json.dumps(line) + "\n" for line in kept))
        if self._events:
            self._events.close()
            self.open_events(images)

    def plot(self) -> None:
        """losses.png from the log."""
        lines = self.read_log()
        if not lines:
            return
        figure = matplotlib.figure.Figure(figsize=(8, 4), layout="constrained")
        axes = figure.add_subplot()
        for name in dict.fromkeys(k for line in lines for k in line if k.startswith(LOSS_PREFIXES)):
            points = [(line["images"] / 1000, line[name]) for line in lines if name in line]
            axes.plot(*zip(*points, strict=True), label=name.replace("_", " "))
        axes.set(xlabel="thousand images", ylabel="loss")
        axes.grid(alpha=0.3)
        axes.legend()
        png = io.BytesIO()
        figure.savefig(png, dpi=110)
        (self.path / "losses.png").write_bytes(png.getvalue())
        del figure, axes
        gc.collect()  # a figure is a circle of references, 1 MB for each that waits to be found


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl up to the first that is damaged; none if there is no file."""
    lines = read_lines(file)
    whole = [all(_is_number(v) for k, v in line.items() if k != "warning") for line in lines]
    return lines[: whole.index(False)] if False in whole else lines


def read_lines(file: Path) -> list[dict[str, Any]]:
    """JSON objects with a count of images, a line each, up to the first that is damaged."""
    lines = []
    for text in file.read_bytes().splitlines() if file.exists() else []:
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            break
        if (
            not isinstance(line, dict)
            or type(line.get("images")) is not int
            or not _is_number(line["images"])
        ):
            break
        lines.append(line)
    return lines


def _is_number(value: object) -> bool:
    """Whether a float or an integer of a size that floats have."""
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)


def check_tensorboard() -> None:
    """UsageError where TensorBoard is not installed."""
    if find_spec("tensorboard") is None:
        raise UsageError("--tensorboard needs a package: pip install 'fastgan[tensorboard]'")


def save_generator(path: Path, state: dict[str, Tensor], config: Config, images: int) -> None:
    """The EMA generator of an engine's state ("ema.*") as one of our files."""
    weights = {k.removeprefix("ema."): t for k, t in state.items() if k.startswith("ema.")}
    write_own(path, Pretrained(config, weights, None, {}, {}, images))


def restore_generator(path: Path, state: dict[str, Tensor], images: int, config: Config) -> None:
    """`save_generator`, unless `path` is intact and as old: a kill may come between it and the checkpoint."""
    try:
        if load_tensors(path, checked=True)[1]["images"] == images:
            return
    except (ValueError, KeyError):
        pass
    save_generator(path, state, config, images)


def load_generator(path: Path) -> tuple[dict[str, Tensor], Config]:
    """(weights, config) of one of our files, or of the run folder that holds one.

    They alone do not make a converted network: `pretrained.load` builds any.
    """
    found = read_own(path)
    if found.generator is None or found.generator_options:
        raise UsageError(f"{path} holds no generator of a training run")
    return found.generator, found.config
