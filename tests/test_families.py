"""What every family must do: step, learn, resume, and compile to the gradients that it has."""

import ast
import copy
import re
from pathlib import Path

import pytest
import torch
import torch._inductor.config
from family_cases import CPU, exact_calls, tiny_config
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastgan import generate, models, train
from fastgan.compiled import compile_phase
from fastgan.config import PRESETS, UsageError, make_config
from fastgan.engine import Engine
from fastgan.limit import random_step

PHASES = ["D", "D with R1", "G", "G with path length"]


def steps(engine: Engine, first: int, count: int) -> None:
    """Steps number `first` to first + count - 1, each on images that its number decides."""
    for step in range(first, first + count):
        torch.manual_seed(step)
        engine.step(*random_step(engine.config, CPU))


@pytest.mark.parametrize("arch", PRESETS)
def test_a_few_steps_move_every_weight_and_nothing_overflows(arch: str):
    engine = Engine(tiny_config(arch), CPU)
    before = copy.deepcopy(engine.state())
    steps(engine, 0, 12)
    losses = engine.take_losses()
    assert {"loss_d", "loss_g", "real_score", "fake_score"} <= losses.keys()
    state = engine.state()
    assert all(torch.isfinite(t).all() for t in state.values() if t.is_floating_point())
    named = [(f"G.{n}", p) for n, p in engine.G.named_parameters()]
    named += [(f"D.{n}", p) for n, p in engine.D.named_parameters()]
    still = [name for name, p in named if torch.equal(p, before[name]) and not in_vain(arch, name)]
    assert not still, "weights that no phase trains"


def in_vain(arch: str, name: str) -> bool:
    """Weights that their papers have, but that change no loss: the last bias of a Wasserstein critic, biases
    in front of instance normalization."""
    if arch == "cyclegan":
        return name.endswith("bias") and not name.endswith(("out.bias", "D.a.stem.bias", "D.b.stem.bias"))
    return (arch, name) == ("wgan-gp", "D.main.2.bias")


@pytest.mark.parametrize("arch", PRESETS)
def test_a_resumed_run_is_the_undisturbed_one(arch: str):
    """Bit for bit; ProGAN changes its stage before, at and after the stop."""
    whole = Engine(tiny_config(arch), CPU)
    steps(whole, 0, 12)
    half = Engine(tiny_config(arch), CPU)
    steps(half, 0, 7)
    resumed = Engine(tiny_config(arch), CPU)
    resumed.load_state(copy.deepcopy(half.state()), half.images)
    steps(resumed, 7, 5)
    ours, theirs = resumed.state(), whole.state()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def run(call, function) -> tuple[list[Tensor], list[Tensor]]:
    """What `function` returns for the call's arguments, and the networks' buffers behind it."""
    torch.manual_seed(0)
    args = copy.deepcopy(call.args)
    result = tree_leaves(function(*args))
    return result, [*args[0].buffers(), *args[1].buffers()]


def check_compiled(arch: str, phase: str, compile, **options) -> None:
    calls = {call.phase.name: call for call in exact_calls(arch, **options)}
    if phase not in calls:
        pytest.skip(f"{arch} has no phase {phase!r}")
    call = calls[phase]
    torch._dynamo.reset()
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        expected = run(call, call.phase.function)
        for value in expected[0]:
            assert torch.isfinite(value).all()
        # Compiled code would draw other random numbers of its own.
        with torch._inductor.config.patch(fallback_random=True):
            ours = run(call, compile(call.phase.function))
    for mine, theirs in zip(ours[0] + ours[1], expected[0] + expected[1], strict=True):
        scale = max(float(theirs.abs().max()), 1e-3) if theirs.numel() else 1.0
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-8 * scale)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("arch", PRESETS)
def test_traced_gradients_equal_eager_ones(arch: str, phase: str):
    """One graph, double backward included, in float64, as the compiler takes it over: without code."""
    check_compiled(
        arch, phase, lambda f: torch.compile(f, backend="aot_eager", fullgraph=True, dynamic=False)
    )


@pytest.mark.exhaustive
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("arch", PRESETS)
def test_compiled_gradients_equal_eager_ones(arch: str, phase: str):
    """The same through Inductor's code, as --compile runs it."""
    check_compiled(arch, phase, lambda f: compile_phase(f, CPU))


def test_an_update_is_adams_whatever_the_gradients_layout():
    """A penalty's gradients come in a layout other than the weights', which fused Adam does not look at."""
    engine = Engine(tiny_config("wgan-gp"), CPU)
    config = engine.config
    torch.manual_seed(0)
    images, _ = random_step(config, CPU)
    result = engine.d(0, *engine.d_args(images[: config.part], None))
    assert any(g.stride() != p.stride() for g, p in zip(result.grads, engine.D.parameters(), strict=True))
    expected = [p.detach().clone().requires_grad_() for p in engine.D.parameters()]
    for p, g in zip(expected, result.grads, strict=True):
        p.grad = g.clone()
    torch.optim.Adam(expected, config.d_lr, (config.beta1, config.beta2), foreach=False).step()
    engine._update(engine.D, engine.d_optimizer, [result])
    for mine, theirs in zip(engine.D.parameters(), expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_the_readmes_family_is_one_file_and_one_preset(tmp_path, monkeypatch):
    """Its module and its preset, as printed there, train, resume and generate."""
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    section = readme.partition("### A family of your own")[2]
    code, preset = re.findall(r"```python\n(.*?)```|`\"mine\": (\{.*?\})`", section, re.DOTALL)[:2]
    (tmp_path / "mine.py").write_text(code[0])
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(tmp_path)])
    monkeypatch.setitem(PRESETS, "mine", ast.literal_eval(preset[1]))
    run, out = str(tmp_path / "run"), tmp_path / "out"
    for kimg in ("0.1", "0.2"):
        options = ["--ngf", "16", "--device", "cpu", "--kimg", kimg, "--run-dir", run]
        assert train.main(["--arch", "mine", *options]) == 0
    assert generate.main(["--run", run, "--count", "2", "--out", str(out)]) == 0
    assert len(list(out.glob("*.png"))) == 2
    with pytest.raises(UsageError, match="body"):
        make_config("mine", body="dcgan")
