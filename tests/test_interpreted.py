"""Runs the tests of the kernels themselves in Triton's interpreter, on all cores.

The interpreter has to be chosen before a kernel is imported, so they have a process of their own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def test_the_kernels_in_the_interpreter():
    files = sorted(str(f) for f in HERE.glob("interpreted_*.py"))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-p", "no:cacheprovider"]
    command += ["-p", "no:benchmark", "-n", "auto", "--dist", "worksteal", *files]
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    env.pop("FASTGAN_KERNELS", None)
    done = subprocess.run(command, env=env, cwd=HERE.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert len(files) == 3 and " passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-300:]


@pytest.mark.exhaustive
def test_every_mutant_is_caught():
    done = subprocess.run([sys.executable, HERE / "mutants.py"], capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "SURVIVED" not in done.stdout and done.stdout.count("caught") > 30
