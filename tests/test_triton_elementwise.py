"""Runs the interpreter's tests in a process of their own; offline compilation in this one, which must be without."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastgan.kernels import offline

HERE = Path(__file__).parent
ARCHS = [*offline.SHARED_LIMIT]
OPS = ["bias_act", "upfirdn2d", "minibatch_stddev", "norm_act"]


def test_the_kernels_in_the_interpreter():
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--no-header",
        "-x",
        str(HERE / "interpreted_elementwise.py"),
    ]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    env.pop("FASTGAN_KERNELS", None)
    done = subprocess.run(command, env=env, cwd=HERE.parent, capture_output=True, text=True, check=False)
    print(done.stdout[-4000:])
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
