"""Runs the interpreter's tests in a process of their own; offline compilation in this one, which must be
without."""

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


def representatives(op: str) -> list[offline.Build]:
    """One build a kernel, dtype and layout: what every test run can afford; CI's offline step compiles
    all."""
    chosen = {}
    for build in offline.builds(op):
        words = build.name.split()
        kind = (build.kernel.__name__, words[0], "bf16" in words, "nhwc" in words, "up2" in words)
        chosen.setdefault(kind, build)
    return [b for b in chosen.values() if "bf16" in b.name]


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
@pytest.mark.parametrize("op", OPS)
def test_offline_no_spills_and_wide_loads(op: str, arch: str):
    results = [offline.measure(op, build, arch) for build in representatives(op)]
    assert results
    assert not [r for r in results if not r.good], offline.table(results)
    narrow = [r for r in results if not r.wide_loads and "fill" not in r.name and op != "upfirdn2d"]
    assert not narrow, offline.table(narrow)


@pytest.mark.parametrize("arch", ARCHS)
def test_offline_every_target(arch: str):
    build = offline.builds("bias_act")[0]
    result = offline.measure("bias_act", build, arch)
    assert result.good and result.wide_loads, result
    assert build.least <= result.bytes_per_element < 1.5 * build.least


def test_offline_reports_what_does_not_compile():
    build = offline.builds("bias_act")[0]
    broken = build._replace(constexprs={**build.constexprs, "BLOCK": 1000})
    assert offline.measure("bias_act", broken, "sm_90").error


def test_offline_finds_spills():
    build = next(b for b in offline.builds("norm_act") if b.name.startswith("pixel_norm order 2 bf16 nchw"))
    huge = build._replace(constexprs={**build.constexprs, "BLOCK_P": 128}, num_warps=1)
    assert not offline.measure("norm_act", huge, "sm_80").good


def test_offline_refuses_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        offline.report(["sm_90"], ["bias_act"])
