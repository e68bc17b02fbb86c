"""Which batch fits the memory: an estimate after it ran out, real steps for --batch auto.

A real step is `python -m fastgan.fit CONFIG BYTES`, a process of its own with that much memory: what a CPU's
system gives away and later cannot keep costs no more than that process.
"""

import dataclasses
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from fastgan import estimate
from fastgan.config import Config, UsageError, batch_unit, read_config
from fastgan.data.feed import available
from fastgan.engine import Engine
from fastgan.limit import grown, phase_calls, random_images, random_step

SHARE = 0.9  # of the free memory; the rest is for samples, checkpoints and the gaps between blocks
NO_ROOM = 3  # exit code
LIBRARIES = (
    int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
)  # addresses, no memory


def ran_out(error: BaseException) -> bool:
    """Whether memory has run out: on a GPU, in Python or NumPy, or in PyTorch on a CPU."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def room(device: torch.device) -> int:
    """Bytes that a process may newly take on `device`."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return available() if soft == resource.RLIM_INFINITY else min(available(), soft - LIBRARIES)


def smaller_batch(config: Config, bytes: int) -> int:
    """Below the batch of `config`, for which `bytes` were too few: what they are enough for, an estimate.

    0 if that is less than the family's unit.
    """
    below = estimate.whole(config.batch - 1, config)
    return min(estimate.batch_that_fits(config, bytes), below)


def largest_batch(config: Config, device: torch.device, most: int) -> int:
    """The largest batch, of at most `most`, of which a real step of every phase fits; to within an eighth.

    UsageError if not even the family's unit does.
    """
    unit, free = batch_unit(config), int(SHARE * room(device))
    smallest = dataclasses.replace(config, batch=unit)
    guess = estimate.batch_that_fits(smallest, free)
    found = bisect(lambda batch: _fits(dataclasses.replace(config, batch=batch), free), unit, guess, most)
    if not found:
        raise UsageError(
            f"--batch auto: not even a batch of {unit} fits the {free / 2**30:.1f} GiB that are free on "
            f"{device}; use smaller networks or a lower --resolution"
        )
    return found


def bisect(fits: Callable[[int], bool], unit: int, guess: int, most: int) -> int:
    """The largest multiple of `unit` up to `most` that `fits`, to within an eighth of it; 0 if none does."""
    most = max(most // unit, 1)
    low, high = 0, most + 1  # in units: fits, does not
    batch = min(max(guess // unit, 1), most)
    while True:
        if fits(batch * unit):
            low = batch
        else:
            high = batch
        if high - low <= max(1, low // 8):
            return low * unit
        rising = high > most and low > 0  # nothing has failed yet
        batch = min(2 * low, most) if rising else (low + high) // 2


def _fits(config: Config, bytes: int) -> bool:
    command = [sys.executable, "-m", "fastgan.fit", json.dumps(dataclasses.asdict(config)), str(bytes)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode not in (0, NO_ROOM) and done.returncode > 0:
        raise UsageError(f"--batch auto: a step failed: {done.stderr.strip().splitlines()[-1]}")
    return done.returncode == 0  # below 0: killed by the system, for its memory


def main() -> int:
    """The process that tries a batch; its exit code says whether it fitted."""
    config, bytes = read_config(json.loads(sys.argv[1])), int(sys.argv[2])
    device = torch.device(config.device)
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(min(1.0, bytes / torch.cuda.mem_get_info(device)[1]))
    else:
        resource.setrlimit(resource.RLIMIT_DATA, (bytes, bytes))
    try:
        engine = grown(Engine(dataclasses.replace(config, compile=False), device))
        engine.step(*random_step(config, device))
        for call in phase_calls(engine, random_images(config, device)):
            call()
    except (RuntimeError, MemoryError) as error:
        if ran_out(error):
            return NO_ROOM
        raise
    return 0


def own_batch(run_dir: Path | None) -> int | None:
    """The batch of the run in `run_dir`, None if there is none."""
    file = run_dir / "config.json" if run_dir else None
    if file is None or not file.exists():
        return None
    try:
        return read_config(json.loads(file.read_text())).batch
    except (ValueError, RecursionError, OSError, UsageError) as error:
        raise UsageError(f"{file} is damaged: {error}") from None


if __name__ == "__main__":
    sys.exit(main())
