"""Which implementation runs, with a pretended GPU: verdicts, their cache, and what torch.compile sees of
them."""

import warnings
from pathlib import Path

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd

from fastgan.kernels import dispatch
from fastgan.kernels.bias_act import BIAS_ACT, bias_act
from fastgan.kernels.conv2d_resample import CONV2D_RESAMPLE
from fastgan.kernels.minibatch_stddev import MINIBATCH_STDDEV
from fastgan.kernels.pixel_norm import PIXEL_NORM

CPU = torch.device("cpu")


def double(x):
    return 2 * x


def sample(dtype, device, key, small):
    return (torch.linspace(-1, 1, 8, dtype=dtype).requires_grad_(),)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTGAN_CACHE", str(tmp_path))
    monkeypatch.setattr(dispatch, "_remembered", {})
    monkeypatch.setattr(dispatch.Op, "measure", lambda self, names, *_: {n: i for i, n in enumerate(names)})
    return tmp_path


def op(candidate):
    return dispatch.Op("double", {"triton": candidate, "reference": double}, sample)


def test_a_right_kernel_is_chosen_and_remembered(cache, monkeypatch):
    assert op(lambda x: x + x)._decide(torch.float32, CPU, ()) == "triton"
    (file,) = cache.iterdir()
    assert torch.__version__ in file.name
    fresh = op(lambda x: x + x)
    monkeypatch.setattr(fresh, "verify", None)
    dispatch._remembered.clear()
    assert fresh._decide(torch.float32, CPU, ()) == "triton"


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: 2.001 * x,
        lambda x: 2 * x.detach() + 0 * x,
        lambda x: (2 * x)[:-1],
        lambda x: 1 / 0,
    ],
    ids=["value", "gradient", "shape", "raises"],
)
def test_a_wrong_kernel_is_turned_off_with_one_warning(cache, wrong):
    broken = op(wrong)
    with pytest.warns(RuntimeWarning, match="Please report") as caught:
        assert broken._decide(torch.float32, CPU, ()) == "reference"
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert broken._decide(torch.float32, CPU, ()) == "reference"


def test_a_kernel_wrong_to_second_order_only_is_found():
    class Cut(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx, *grad_outputs):
            (x,) = ctx.saved_tensors
            return grad_outputs[0] * 3 * x.detach() ** 2

    args = (torch.linspace(-1, 1, 8, requires_grad=True),)
    assert dispatch.disagreement(Cut.apply, lambda x: x**3, args, order=1) is None
    assert dispatch.disagreement(Cut.apply, lambda x: x**3, args, order=2)


@pytest.mark.parametrize("text", ["{", "[]", "\x00"])
def test_a_corrupt_cache_is_ignored_with_a_warning(cache, text):
    dispatch.cache_file(CPU).write_text(text)
    with pytest.warns(RuntimeWarning, match="ignoring the kernel cache"):
        assert op(double)._decide(torch.float32, CPU, ()) == "triton"


def test_an_unwritable_cache_is_ignored_with_a_warning(cache, monkeypatch):
    (cache / "file").write_text("")
    monkeypatch.setenv("FASTGAN_CACHE", str(cache / "file" / "below"))
    with pytest.warns(RuntimeWarning, match="kernel cache"):
        assert op(double)._decide(torch.float32, CPU, ()) == "triton"


def test_the_cpu_runs_the_reference_and_inductor_sees_no_op():
    x = torch.randn(2, 3, 4, 4)
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    backend = aot_autograd(fw_compiler=keep)
    torch.compile(lambda x: bias_act(x, act="lrelu"), fullgraph=True, backend=backend)(x)
    assert "fastgan" not in graphs[0].code and "leaky_relu" in graphs[0].code


def test_impl_and_environment_force_and_are_checked(monkeypatch):
    x = torch.randn(2, 3)
    with pytest.raises(ValueError, match="TRITON_INTERPRET"):
        bias_act(x, impl="triton")
    with pytest.raises(ValueError, match="impl"):
        bias_act(x, impl="cuda")
    monkeypatch.setenv("FASTGAN_KERNELS", "triton")
    with pytest.raises(ValueError, match="needs a tensor on a GPU"):
        bias_act(x)
    monkeypatch.setenv("FASTGAN_KERNELS", "reference")
    assert bias_act(x).equal(x)


def test_one_name_forces_every_operation(monkeypatch):
    cuda = torch.device("cuda")
    assert BIAS_ACT.forced("library", cuda) == BIAS_ACT.forced("triton", cuda) == "triton"
    monkeypatch.setenv("FASTGAN_KERNELS", "library")
    assert CONV2D_RESAMPLE.forced(None, cuda) == "library" and BIAS_ACT.forced(None, cuda) == "triton"


def test_tracing_takes_the_verdict_as_a_constant(cache, monkeypatch):
    """Deciding happens while Dynamo traces and verifies for real, but times nothing and leaves nothing in
    the graph."""
    tried = op(lambda x: x + x)
    monkeypatch.setattr(dispatch.Op, "measure", None)
    monkeypatch.setattr(
        dispatch.Op, "__call__", lambda self, x: self.candidates[self.decide(x.dtype, x.device, ())](x)
    )
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    x = torch.randn(4)
    assert torch.compile(lambda x: tried(x), fullgraph=True, backend=keep)(x).equal(2 * x)
    assert "randn" not in graphs[0].code and " + " in graphs[0].code


def test_no_kernel_adds_with_atomics():
    """Which would make every result depend on the order of arrival: runs are deterministic on request."""
    files = list(Path(dispatch.__file__).parent.glob("*.py"))
    assert len(files) > 10 and not [f.name for f in files if "tl.atomic" in f.read_text()]


@pytest.mark.parametrize("op", [BIAS_ACT, MINIBATCH_STDDEV, PIXEL_NORM], ids=lambda op: op.name)
def test_registered_ops_have_a_fingerprint(op: dispatch.Op):
    """A candidate may be an op as torch.library returns it, which is no function."""
    assert len(op.fingerprint) == 12
