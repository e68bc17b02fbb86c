"""The kernels compiled for GPUs that are not here: spills, shared memory, wide loads, matrix instructions."""

import os

import pytest

from fastgan.kernels import offline

ARCHS = [*offline.SHARED_LIMIT]
WINDOWS = ("_fir_kernel", "_fir2x_kernel")  # of any alignment, but for channels_last's runs of channels
CONVOLUTIONS = ("_conv_kernel", "_weight_kernel")


def shortcomings(results: list[offline.Result]) -> list[offline.Result]:
    """What does not compile, spills, takes too much shared memory, or lacks what its kind has to have."""
    short = []
    for r in results:
        kernel = next(b.kernel.__name__ for b in offline.builds(r.op) if b.name == r.name)
        lacks_matrix = kernel in CONVOLUTIONS and not r.matrix
        narrow = kernel == "_fill_kernel" or kernel in CONVOLUTIONS  # the first loads a statistic a sample
        narrow = narrow or (kernel in WINDOWS and not ("nhwc" in r.name and r.arch.startswith("sm_")))
        lacks_width = not narrow and not r.wide_loads
        short += [r] if not r.good or lacks_matrix or lacks_width else []
    return short


def representatives(op: str) -> list[offline.Build]:
    """One bf16 build a kernel and layout: what every test run can afford."""
    chosen = {}
    for build in offline.builds(op):
        if "bf16" in build.name:
            chosen.setdefault((build.kernel.__name__, "nhwc" in build.name, "up2" in build.name), build)
    return list(chosen.values())


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
@pytest.mark.parametrize("op", offline.OPS)
def test_one_build_of_every_kernel(op: str, arch: str):
    results = [offline.measure(op, build, arch) for build in representatives(op)]
    assert results and not shortcomings(results), offline.table(shortcomings(results))


@pytest.mark.exhaustive
def test_every_configuration_on_every_target():
    results = offline.report(ARCHS, [*offline.OPS], os.cpu_count() or 1)
    print(offline.table(results))
    assert len(results) > 1000 and {r.arch for r in results} == {*ARCHS}
    assert not shortcomings(results), offline.table(shortcomings(results))


@pytest.mark.parametrize("arch", ARCHS)
def test_every_target(arch: str):
    build = offline.builds("bias_act")[0]
    result = offline.measure("bias_act", build, arch)
    assert result.good and result.wide_loads, result
    assert build.least <= result.bytes_per_element < 1.5 * build.least


def test_reports_what_does_not_compile():
    build = offline.builds("bias_act")[0]
    broken = build._replace(constexprs={**build.constexprs, "BLOCK": 1000})
    assert offline.measure("bias_act", broken, "sm_90").error


def test_finds_spills():
    build = next(b for b in offline.builds("pixel_norm") if b.name.startswith("pixel_norm order 2 bf16 nchw"))
    huge = build._replace(constexprs={**build.constexprs, "BLOCK_P": 128}, num_warps=1)
    assert not offline.measure("pixel_norm", huge, "sm_80").good


def test_refuses_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        offline.report(["sm_90"], ["bias_act"])
