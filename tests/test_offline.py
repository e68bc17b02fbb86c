"""The kernels compiled for GPUs that are not here: spills, shared memory, wide loads, matrix instructions."""

import pytest

from fastgan.kernels import offline

ARCHS = [*offline.SHARED_LIMIT]
OPS = ["bias_act", "upfirdn2d", "minibatch_stddev", "norm_act"]


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
    huge = build._replace(constexprs={**build.constexprs, "BLOCK_P": 512}, num_warps=1)
    assert not offline.measure("norm_act", huge, "sm_80").good


def test_offline_refuses_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        offline.report(["sm_90"], ["bias_act"])
