"""Break the kernels on purpose and see the suite catch every one: python tests/mutants.py [NAME ...]

A mutant is a substitution in the text of one kernel file, tried on a copy of the repository. Exit status 1
when one survives.
"""

import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

os.environ |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}  # before torch and Triton are imported

import hypothesis  # noqa: F401 (these are imported for the processes forked below)
import numpy  # noqa: F401
import pytest
import safetensors.torch  # noqa: F401
import torch._dynamo  # noqa: F401
import triton.language  # noqa: F401

ROOT = Path(__file__).parent.parent


class Mutant(NamedTuple):
    file: str
    old: str
    new: str
    tests: str  # pytest -k
    suite: str = "elementwise"


MUTANTS = {
    "wrong slope": Mutant(
        "bias_act",
        "d = tl.where(u > 0, tl.zeros_like(u) + 1, tl.zeros_like(u) + ALPHA)",
        "d = tl.where(u > 0, tl.zeros_like(u) + 1, tl.zeros_like(u) + 0.9 * ALPHA)",
        "agree_to_second",
    ),
    "slope at the kink": Mutant(
        "bias_act", "d = tl.where(u > 0, 1.0, 0.0)", "d = tl.where(u >= 0, 1.0, 0.0)", "bias_act"
    ),
    "clamp blocks its boundary": Mutant("bias_act", "* GAIN) <= CLAMP", "* GAIN) < CLAMP", "golden_bias_act"),
    "grid rounded down": Mutant(
        "bias_act", "kernel[(-(-n // block),)]", "kernel[(n // block,)]", "agree_to_second"
    ),
    "channel of a neighbour": Mutant(
        "memory", "return (((row % n_channels)", "return ((((row + 1) % n_channels)", "golden_bias_act"
    ),
    "bias gradient of one split": Mutant(
        "bias_act", "return dx, db.sum(0)", "return dx, db[0] * 2", "agree_to_second"
    ),
    "swish curvature": Mutant(
        "bias_act", "(2 + u * (1 - 2 * s))", "(1 + u * (1 - 2 * s))", "golden_bias_act and swish"
    ),
    "raw launch in the backward of bias_act": Mutant(
        "bias_act",
        "_bias_act_backward.register_autograd(_double_backward, setup_context=_setup_backward)",
        "_bias_act_backward.register_autograd(lambda ctx, *g: (None,) * 9, setup_context=_setup_backward)",
        "raw_kernel",
    ),
    "missing mask": Mutant(
        "upfirdn2d",
        "            m &= (row + k >= 0) & (row + k < h) & (column + j >= 0) & (column + j < w)",
        "            m &= (row + k >= 0) & (column + j >= 0) & (column + j < w)",
        "golden_upfirdn2d",
    ),
    "transposed filter": Mutant(
        "upfirdn2d",
        "p_f + (u * 4 + v if FLIP else 15 - u * 4 - v)",
        "p_f + (v * 4 + u if FLIP else 15 - v * 4 - u)",
        "agree_to_second",
    ),
    "adjoint without flip": Mutant("upfirdn2d", "pad, not ctx.flip)", "pad, ctx.flip)", "golden_upfirdn2d"),
    "odd output column dropped": Mutant(
        "upfirdn2d", "half_w, half_h = (out_w + 1) // 2,", "half_w, half_h = out_w // 2,", "agree_to_second"
    ),
    "variance of the shifted sums": Mutant("norm_act", "(s2 - s1.square())", "s2", "conditional_batch_norm"),
    "statistics taken as constants": Mutant(
        "norm_act", "return lambda s: s / pixels", "return lambda s: 0 * s / pixels", "golden_instance_norm"
    ),
    "double backward without the covariance": Mutant(
        "norm_act", "(2 * vh * wh - covariance)", "(2 * vh * wh)", "golden_conditional"
    ),
    "unbiased running variance": Mutant("norm_act", "(m / (m - 1))", "1.0", "golden_conditional"),
    "three copies of four": Mutant(
        "norm_act",
        "return x + load(p + o + below, m) + load(p + o + below + n_channels, m)",
        "return x + 2 * load(p + o + below, m)",
        "agree_to_second",
    ),
    "pixel norm's second order": Mutant("pixel_norm", "(d - 3 * k * a * b)", "(d - k * a * b)", "pixel_norm"),
    "groups of consecutive samples": Mutant(
        "minibatch_stddev", "p + (i * n_groups + i_group)", "p + (i_group * group + i)", "golden_minibatch"
    ),
    "minibatch double backward": Mutant(
        "minibatch_stddev", "return dx, sums.sum(2) * group", "return dx, sums.sum(2)", "golden_minibatch"
    ),
    "convolution: taps not flipped": Mutant(
        "conv_gemm", "KH - 1 - u_y, KW - 1 - u_x", "u_y, u_x", "primitive_agrees", "conv"
    ),
    "convolution: phase off by one": Mutant(
        "conv_gemm", "(pad - phase) % UP", "(pad - phase + 1) % UP", "primitive_agrees", "conv"
    ),
    "convolution: missing mask": Mutant(
        "conv_gemm", "& (i_x >= 0) & (i_x < in_w)", "& (i_x < in_w)", "primitive_agrees", "conv"
    ),
    "convolution: grid rounded down": Mutant(
        "conv_gemm",
        "n * _cdiv(pixels, b_m) if per_image",
        "n * (pixels // b_m) if per_image",
        "every_forward",
        "conv",
    ),
    "convolution: wrong slope": Mutant(
        "conv_gemm",
        "acc, acc * ALPHA) * GAIN",
        "acc, acc * 0.9 * ALPHA) * GAIN",
        "epilogue",
        "conv",
    ),
    "weight gradient of one split": Mutant(
        "conv_gemm", "partial.sum(0)", "(partial[0] * 2)", "every_weight", "conv"
    ),
    "convolution: raw launch in backward": Mutant(
        "conv_gemm",
        "    x, w, s_in, s_out, noise, bias, y = ctx.saved_tensors\n",
        "    x, w, s_in, s_out, noise, bias, y = ctx.saved_tensors\n    g = g.detach()\n",
        "primitive_agrees",
        "conv",
    ),
    "batch norm's second order": Mutant(
        "conv_transpose_bn_act",
        " - h * scale * wide(r) * mean_of(a_pu)",
        "",
        "golden_batch_norm",
        "conv",
    ),
    "batch norm: variance not merged": Mutant(
        "conv_gemm", "+ count * delta * delta", "", "every_forward", "conv"
    ),
    "norm: grid rounded down": Mutant(
        "norm_act", "kernel[(-(-n // block),)](", "kernel[(n // block,)](", "agree_to_second"
    ),
    "norm: missing mask": Mutant(
        "norm_act",
        "tl.where(m, load(p_x + o, m) - k[None, :], 0.0)",
        "load(p_x + o, m) - k[None, :]",
        "golden_adain",
    ),
    "norm: raw launch in backward": Mutant(
        "norm_act",
        "_norm_act_backward.register_autograd(_double_backward, setup_context=_setup_backward)",
        "_norm_act_backward.register_autograd(lambda ctx, *g: (None,) * 11, setup_context=_setup_backward)",
        "raw_kernel",
    ),
    "minibatch: missing mask": Mutant(
        "minibatch_stddev", "    m = o < n_sample\n", "    m = o < n_sample - 1\n", "golden_minibatch"
    ),
    "resampling: transposed filter": Mutant(
        "conv2d_resample",
        "flip_filter=not flip_filter, gain",
        "flip_filter=flip_filter, gain",
        "golden_conv2d_resample or golden_modulated",
        "conv",
    ),
    "modulation: styles only on the way out": Mutant(
        "modulated_conv2d", "around = (styles, d,", "around = (None, d,", "golden_modulated", "conv"
    ),
    "epilogue: noise of the first sample": Mutant(
        "modulated_conv2d", "p_noise + i_n * noise_n + i_p", "p_noise + i_p", "library_epilogue", "conv"
    ),
    "epilogue: scale taken as constant": Mutant(
        "modulated_conv2d", "gd = None if x is None", "gd = None if True", "library_epilogue", "conv"
    ),
    "epilogue: clamp lets gradients through": Mutant(
        "conv_gemm", "slope if clamp is None else", "slope if True else", "library_epilogue", "conv"
    ),
    "batch norm: wrong slope": Mutant(
        "conv_transpose_bn_act",
        "tl.where(u > 0, u, u * SLOPE), mask=m)",
        "tl.where(u > 0, u, u * SLOPE * 0.9), mask=m)",
        "golden_batch_norm",
        "conv",
    ),
    "batch norm: raw launch in backward": Mutant(
        "conv_transpose_bn_act",
        "bn_lrelu_backward.register_autograd(_double_backward, setup_context=_save_backward)",
        "bn_lrelu_backward.register_autograd(lambda ctx, *g: (None,) * 7, setup_context=_save_backward)",
        "golden_batch_norm",
        "conv",
    ),
}


def copy_of(mutant: Mutant, folder: Path) -> None:
    """The repository in `folder`, with the substitution made."""
    for part in ("fastgan", "kernels", "tests"):
        shutil.copytree(ROOT / part, folder / part, symlinks=True, ignore=shutil.ignore_patterns("golden"))
    (folder / "tests" / "golden").symlink_to(ROOT / "tests" / "golden")
    shutil.copy(ROOT / "pyproject.toml", folder)
    file = folder / "kernels" / f"{mutant.file}.py"
    text = file.read_text()
    if mutant.old not in text:
        raise ValueError(f"{mutant.file}.py no longer holds {mutant.old!r}: update tests/mutants.py")
    file.write_text(text.replace(mutant.old, mutant.new))


def run_tests(mutant: Mutant, folder: Path) -> NoReturn:
    """The rest of a forked process: pytest in `folder`, its exit status the process's own."""
    status = 2
    try:
        with open(folder / "output", "w") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        os.chdir(folder)
        options = ["-qx", "--tb=line", "--basetemp=scratch", "-p", "no:cacheprovider", "-p", "no:benchmark"]
        options += ["-p", "no:xdist", "-W", "ignore:Module already:pytest.PytestAssertRewriteWarning"]
        status = pytest.main([*options, f"tests/interpreted_{mutant.suite}.py", "-k", mutant.tests])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def verdicts(names: list[str]) -> Iterator[tuple[str, bool]]:
    """(name, whether the tests still pass on the mutant), in the order in which they end.

    A process for each mutant, as many at once as there are CPUs. They are forked from this one, which has
    imported everything slow but nothing of fastgan.
    """
    waiting, running = list(reversed(names)), {}
    with tempfile.TemporaryDirectory() as parent:
        while waiting or running:
            while waiting and len(running) < (os.cpu_count() or 1):
                name = waiting.pop()
                folder = Path(tempfile.mkdtemp(dir=parent))
                copy_of(MUTANTS[name], folder)
                process = os.fork()
                if not process:
                    run_tests(MUTANTS[name], folder)
                running[process] = name, folder
            process, status = os.wait()
            name, folder = running.pop(process)
            code = os.waitstatus_to_exitcode(status)
            if code > 1:  # below zero is a signal: the mutant read out of bounds
                raise RuntimeError(f"{name}: pytest could not run: {(folder / 'output').read_text()[-2000:]}")
            yield name, code == 0


def main() -> int:
    names = sys.argv[1:] or list(MUTANTS)
    survivors = []
    for name, alive in verdicts(names):
        print(f"{'SURVIVED' if alive else 'caught':9} {name}", flush=True)
        survivors += [name] if alive else []
    print(f"{len(survivors)} survived" if survivors else f"all {len(names)} caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
