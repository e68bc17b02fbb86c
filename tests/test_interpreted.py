"""The kernels themselves in Triton's interpreter, and mutants of them."""

import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest

HERE = Path(__file__).parent


def test_the_kernels_in_the_interpreter(in_the_interpreter: tuple[subprocess.Popen, IO[str]]):
    """interpreted_*.py, which conftest.py has started."""
    process, output = in_the_interpreter
    process.wait()
    output.seek(0)
    printed = output.read()
    assert process.returncode == 0, printed[-8000:]
    assert " passed" in printed and "skipped" not in printed, printed[-300:]


@pytest.mark.exhaustive
def test_every_mutant_is_caught():
    done = subprocess.run([sys.executable, HERE / "mutants.py"], capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "SURVIVED" not in done.stdout and done.stdout.count("caught") > 30
