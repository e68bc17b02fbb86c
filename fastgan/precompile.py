"""Compile G's phase in a second process while the training process compiles D's.

Most of a CPU's compile time is Inductor's own Python, which uses one core. The second process fills
Inductor's cache on disk and ends; the training process then finds the graph there. If it fails, the training
process compiles the phase itself.
"""

import dataclasses
import json
import os
import subprocess
import sys

import torch

from fastgan.config import Config
from fastgan.engine import Engine
from fastgan.limit import random_images


def start(config: Config) -> subprocess.Popen | None:
    """The running process; None where it would gain nothing: not compiling, not on a CPU, one core."""
    if not config.compile or torch.device(config.device).type != "cpu" or (os.cpu_count() or 1) < 2:
        return None
    command = [sys.executable, "-m", "fastgan.precompile", json.dumps(dataclasses.asdict(config))]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def main() -> None:
    """The process that `start` starts."""
    config = Config(**json.loads(sys.argv[1]))
    engine = Engine(config, torch.device(config.device))
    assert engine.g.compiled is not None
    real = random_images(config, engine.device)
    engine.g.compiled(*engine.g_args(real, engine.one_hot(torch.zeros(len(real), dtype=torch.int64))))


if __name__ == "__main__":
    main()
