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
import fcntl
import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
from torch import Tensor

from fastgan.checkpoint import write
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
    """An open, locked run folder. UsageError if another process holds it or its config differs."""

    def __init__(self, path: Path, config: Config):
        self.path = path
        self._events: Any = None  # a SummaryWriter
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = (path / ".lock").open("a")
        except OSError as error:
            raise UsageError(f"--run-dir {path} cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise UsageError(
                f"--run-dir {path} is in use by a live process; wait for it or choose another folder"
            ) from None
        try:
            self._check(config)
        except UsageError:
            self.close()
            raise
        (path / "samples").mkdir(exist_ok=True)
        (path / "checkpoints").mkdir(exist_ok=True)
        write(path / "config.json", json.dumps(dataclasses.asdict(config), indent=2) + "\n")

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
        except (json.JSONDecodeError, AttributeError):
            raise UsageError(f"{file} is damaged; restore it or choose another --run-dir") from None
        if changed:
            what = ", ".join(f"{flag(k)} {old.get(k)} -> {getattr(config, k)}" for k in changed)
            raise UsageError(
                f"--run-dir {self.path} holds a run with another config: {what}; "
                "use its options or another folder"
            )

    def close(self) -> None:
        if self._events:
            self._events.close()
        self._lock.close()  # releases the lock; the system does so too when the process dies

    def record_session(self, session: dict[str, Any]) -> None:
        """Add what is started to sessions.jsonl; "images" of it are those seen before."""
        sessions = [*read_metrics(self.path / SESSIONS), session]
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
        """Drop what a stopped run logged after its last checkpoint, a half-written line included."""
        file = self.path / METRICS
        if not file.exists():
            return
        kept = []
        for line in file.read_text().splitlines():
            try:
                if json.loads(line)["images"] > images:
                    break
            except (json.JSONDecodeError, KeyError, TypeError):
                break
            kept.append(line + "\n")
        write(file, "".join(kept))

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
        figure.savefig(self.path / "losses.png", dpi=110)


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl up to the first that is damaged; none if there is no file."""
    lines = []
    for text in file.read_bytes().splitlines() if file.exists() else []:
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            break
        if not isinstance(line, dict) or type(line.get("images")) is not int:
            break
        lines.append(line)
    return lines


def check_tensorboard() -> None:
    """UsageError where TensorBoard is not installed."""
    if find_spec("tensorboard") is None:
        raise UsageError("--tensorboard needs a package: pip install 'fastgan[tensorboard]'")


def save_generator(path: Path, state: dict[str, Tensor], config: Config, images: int) -> None:
    """The EMA generator of an engine's state ("ema.*") as one of our files."""
    weights = {k.removeprefix("ema."): t for k, t in state.items() if k.startswith("ema.")}
    write_own(path, Pretrained(config, weights, None, {}, {}, images))


def load_generator(path: Path) -> tuple[dict[str, Tensor], Config]:
    """(weights, config) of one of our files, or of the run folder that holds one.

    They alone do not make a converted network: `pretrained.load` builds any.
    """
    found = read_own(path)
    if found.generator is None or found.generator_options:
        raise UsageError(f"{path} holds no generator of a training run")
    return found.generator, found.config
