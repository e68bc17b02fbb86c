"""Memory and file handles of a long training: python -m bench.soak --minutes 60

Trains the smallest family in a process of its own, with frequent ticks and checkpoints, and looks at it from
outside every second. The exit code is 0 if, after a warm-up of a tenth of the time, memory grows by at most
1% (the mean of the last quarter over that of the first) and the count of open files stays what it was.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

GROWTH = 0.01
SMALLEST = "--arch gan --resolution 8 --batch 32 --ngf 8 --ndf 8 --kimg 1e9 --tick-kimg 2 --checkpoint-kimg 8"


def watched(process: subprocess.Popen, seconds: float) -> tuple[list[float], list[int]]:
    """MiB of resident memory and open files of `process`, each second; RuntimeError if it ends before."""
    page, memory, files = os.sysconf("SC_PAGESIZE"), [], []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"the training ended early, with exit code {process.returncode}")
        memory.append(int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * page / 2**20)
        files.append(len(os.listdir(f"/proc/{process.pid}/fd")))
        time.sleep(1)
    return memory, files


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="bench.soak", description="Memory and open files of a long training.")
    p.add_argument("--minutes", type=float, default=60.0, help="how long (default: 60)")
    minutes = p.parse_args(argv).minutes
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "-m", "fastgan.train", *SMALLEST.split(), "--device", "cpu"]
        process = subprocess.Popen([*command, "--run-dir", str(run)], stdout=subprocess.DEVNULL)
        try:
            while not list(run.glob("checkpoints/*.safetensors")) and process.poll() is None:
                time.sleep(0.1)
            warm_up, _ = watched(process, 6 * minutes)
            memory, files = watched(process, 54 * minutes)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait()
        ticks = len((run / "metrics.jsonl").read_text().splitlines())
    quarter = max(len(memory) // 4, 1)
    first, last = fmean(memory[:quarter]), fmean(memory[-quarter:])
    growth = last / first - 1
    print(f"soak: {minutes:g} minutes, {ticks} ticks and {ticks // 4} checkpoints")
    print(f"memory: {warm_up[0]:.1f} MiB at first, then {first:.1f} to {last:.1f} MiB, {100 * growth:+.2f}%")
    # One more is open while something is being written, which a look a second may or may not meet.
    steady = min(files[-quarter:]) <= min(files[:quarter])
    print(f"open files: {min(files)} to {max(files)}, {'constant' if steady else 'more and more'}")
    return 0 if growth <= GROWTH and steady else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the training must not outlive this process
    sys.exit(main())
