"""The folder of a run: its config, lock, log, pictures and networks.

config.json            every field of the configuration
metrics.jsonl          a line a tick
samples/  reals.png    grids of fixed latents, a grid of the data
losses.png             the losses over the images seen
checkpoints/           what resuming needs
generator.safetensors  EMA weights with the config in the header: what generating needs
"""

import dataclasses
import fcntl
import json
from pathlib import Path
from typing import Any

import matplotlib.figure
from torch import Tensor

from fastgan.checkpoint import write
from fastgan.config import Config, UsageError, changed_fields, flag
from fastgan.pretrained import Pretrained, read_own, write_own

METRICS = "metrics.jsonl"
LOSS_PREFIXES = ("loss", "r1", "path")


def new_run_dir(config: Config, root: Path = Path("runs")) -> Path:
    """runs/00007-stylegan-digits: one more than the highest number there is."""
    numbers = [int(p.name[:5]) for p in root.glob("[0-9][0-9][0-9][0-9][0-9]-*")]
    return root / f"{max(numbers, default=-1) + 1:05d}-{config.arch}-{Path(config.data).name}"


class RunFolder:
    """An open, locked run folder. UsageError if another process holds it or its config differs."""

    def __init__(self, path: Path, config: Config):
        self.path = path
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
        self._lock.close()  # releases the lock; the system does so too when the process dies

    def log(self, line: dict[str, Any]) -> None:
        with (self.path / METRICS).open("a") as file:
            file.write(json.dumps(line) + "\n")

    def read_log(self) -> list[dict[str, Any]]:
        file = self.path / METRICS
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

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
