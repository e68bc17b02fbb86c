"""Tests run single runs of a few images: they must not touch the user's caches.

The kernels' tests in Triton's interpreter need a process of their own. It starts when the session does and
runs beside the other tests, on the second core; test_interpreted.py, last, waits for it.
"""

import dataclasses
import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO

import pytest

# Tensors are small here, and busy processes of two threads each would wait for one another at every barrier.
os.environ.setdefault("OMP_NUM_THREADS", "1")

if os.environ.get("TRITON_INTERPRET") == "1":
    from triton.runtime import interpreter

    # Outside its debug mode Triton's interpreter computes an overflow check of every integer operation, then
    # ignores it; and it patches its language anew in every call of every function: two thirds of its time.
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    interpreter._LangPatchScope.restore = lambda self: None
    interpreter._patch_lang = functools.cache(interpreter._patch_lang)

HERE = Path(__file__).parent
INTERPRETER = "test_the_kernels_in_the_interpreter"
RUNNING = pytest.StashKey[tuple[subprocess.Popen, IO[str]]]()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FASTGAN_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that the tests call `data`."""
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    return Path("data")


@pytest.fixture
def in_the_interpreter(request: pytest.FixtureRequest) -> tuple[subprocess.Popen, IO[str]]:
    """The pytest process of interpreted_*.py and the file that it prints to."""
    return request.config.stash[RUNNING]


def pytest_collection_modifyitems(items: list[pytest.Item]):
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="there is no CUDA device"))
    items.sort(key=lambda item: item.name == INTERPRETER)


def pytest_collection_finish(session: pytest.Session):
    chosen = [item.name for item in session.items]
    if INTERPRETER not in chosen or session.config.option.collectonly:
        return
    files = sorted(str(f) for f in HERE.glob("interpreted_*.py"))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-p", "no:cacheprovider"]
    workers = "1" if len(chosen) > 1 else "auto"
    command += ["-p", "no:benchmark", "-n", workers, "--dist", "worksteal", *files]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    env.pop("FASTGAN_KERNELS", None)
    output = tempfile.TemporaryFile("w+")  # noqa: SIM115 (open as long as the session)
    process = subprocess.Popen(command, env=env, cwd=HERE.parent, stdout=output, stderr=subprocess.STDOUT)
    session.config.stash[RUNNING] = process, output


def pytest_sessionfinish(session: pytest.Session):
    if RUNNING in session.config.stash:
        process, output = session.config.stash[RUNNING]
        process.terminate()  # of no effect on one that has ended
        process.wait()
        output.close()
