"""Recorded phases, on a CPU: `Tape` stands in for a CUDA graph.

Like one it runs nothing but kernels again, on the memory that they were recorded on; and what a shared pool
could overwrite between two replays, it does overwrite, with NaN.
"""

import itertools
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from family_cases import tiny_config
from test_step import phases, tiny
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastgan.compiled import CudaCapture, Recording, Recordings
from fastgan.config import PRESETS, make_config
from fastgan.engine import Engine, blend
from fastgan.limit import random_step
from fastgan.models import dcgan

CPU = torch.device("cpu")


def memory(*values: Any) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in tree_leaves(values) if isinstance(t, Tensor)}


class Tape(TorchDispatchMode):
    """Records the aten operations of one run. `replay` repeats them into the tensors of the recording.

    `scratch`, which captures may share, are all tensors that any of them made.
    """

    def __init__(self, scratch: list[Tensor]):
        super().__init__()
        self.scratch = scratch
        self.operations: list[tuple[Callable, tuple, dict, Any, set[int]]] = []
        self.before: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        written = [
            tensor
            for argument, value in zip(func._schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
            for tensor in tree_leaves(value)
        ]
        if func is torch.ops.aten.native_batch_norm.default:  # its schema keeps its running means silent
            written += [t for t in args[3:5] if t is not None]
        self.before += [(value, value.clone()) for value in written]
        result = func(*args, **kwargs)
        made = memory(result) - memory(args, kwargs)
        self.operations.append((func, args, kwargs, result, made))
        self.scratch += [t for t in tree_leaves(result) if isinstance(t, Tensor) and memory(t) <= made]
        return result

    @torch.no_grad()
    def undo(self) -> None:
        """A capture runs nothing: give back what was written in place."""
        for tensor, value in reversed(self.before):
            tensor.copy_(value)

    @torch.no_grad()
    def replay(self) -> None:
        for tensor in self.scratch:
            tensor.fill_(float("nan") if tensor.is_floating_point() else 77)
        for func, args, kwargs, result, made in self.operations:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and memory(old) <= made:
                    old.copy_(new)


def recordings() -> Recordings:
    scratch: list[Tensor] = []

    def capture(run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        tape = Tape(scratch)
        with torch.random.fork_rng([]), tape:
            result = run()
        tape.undo()
        return tape.replay, result

    return Recordings(capture)


@pytest.mark.parametrize("phase", ["D", "D with R1", "G", "G with path length"])
@pytest.mark.parametrize("arch", ["stylegan", "dcgan"])
def test_a_replay_depends_on_its_inputs_alone(arch: str, phase: str):
    """Against the phase itself, on fresh numbers each time, whose tensors are overwritten after the call and
    never touched again."""
    recorded: dict[str, Recording] = {}
    given: list[Tensor] = []
    ours, theirs = tiny(arch, torch.float32), tiny(arch, torch.float32)
    for net in itertools.chain(ours, theirs):
        if isinstance(net, dcgan.Discriminator):
            net.instance_noise = 0.1  # drawn inside the phase

    def by_recording(function):
        recording = recorded.setdefault("", Recording(function, recordings()))

        def call(*args, **kwargs):
            recording.function = partial(function, **kwargs)
            result = recording(*args)
            given.extend(a.fill_(float("nan")) for a in tree_leaves(args) if isinstance(a, Tensor))
            return result

        return call

    for seed in range(4):
        torch.manual_seed(seed)
        expected = phases(arch)[phase](lambda f: f, *theirs, torch.float32, seed)
        torch.manual_seed(seed)
        result = phases(arch)[phase](by_recording, *ours, torch.float32, seed)
        pairs = zip(tree_leaves(result), tree_leaves(expected), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), f"call {seed}"
        for mine, other in zip(ours, theirs, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine.buffers(), other.buffers(), strict=True))
        assert all(t.isnan().all() for t in given)
    assert recorded[""].replay is not None


def test_results_last_until_the_next_replay_of_any_recording():
    """They are the recording's own memory, and the pool's."""
    shared = recordings()
    double = Recording(lambda x: 2 * x, shared)
    triple = Recording(lambda x: 3 * x, shared)
    for recording in (double, triple):
        recording(torch.ones(2))
    first = double(torch.ones(2))
    assert first.tolist() == [2, 2]
    assert double(torch.full([2], 5.0)) is first and first.tolist() == [10, 10]
    assert triple(torch.ones(2)).tolist() == [3, 3]
    assert first.isnan().all()


@pytest.mark.parametrize(
    "fault",
    [
        lambda x: x * x.sum().item(),
        lambda x: x * (2 if x[0] > 1 else 3),
        lambda x: torch.from_numpy(x.numpy() * 2) + x,
    ],
    ids=["item", "branch", "numpy"],
)
def test_the_tape_shows_what_a_replay_cannot_repeat(fault: Callable[[Tensor], Tensor]):
    recording = Recording(fault, recordings())
    for value in (1.0, 1.0):
        assert recording(torch.full([2], value)).equal(fault(torch.full([2], value)))
    assert not recording(torch.full([2], 5.0)).equal(fault(torch.full([2], 5.0)))


def test_other_arguments_than_the_recorded_ones_are_refused():
    recording = Recording(lambda x, gain: gain * x, recordings())
    for _ in range(2):
        recording(torch.ones(2), 3.0)
    with pytest.raises(ValueError, match=r"argument 1 is a constant of the recording, 3.0: got 4.0"):
        recording(torch.ones(2), 4.0)
    with pytest.raises(ValueError, match=r"argument 0 was recorded as torch.float32 \[2\]: got .* \[1\]"):
        recording(torch.ones(1), 3.0)
    with pytest.raises(ValueError, match=r"got torch.float64 \[2\]"):
        recording(torch.ones(2).double(), 3.0)


def test_a_failed_capture_is_one_warning():
    """Training goes on without any recording, those made before included."""
    fail = False

    def capture(run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        if fail:
            raise RuntimeError(
                "operation not permitted when stream is capturing\nCUDA kernel errors might be"
            )
        return whole.capture(run)

    whole, shared = recordings(), Recordings(capture)
    before, after = (Recording(lambda x: 2 * x, shared) for _ in range(2))
    for _ in range(2):
        kept = before(torch.ones(2))
    fail = True
    after(torch.ones(2))
    message = r"CUDA graphs are off .*: RuntimeError: operation not permitted when stream is capturing \(--no"
    with pytest.warns(RuntimeWarning, match=message) as caught:
        assert after(torch.full([2], 4.0)).tolist() == [8, 8]
    assert len(caught) == 1 and "\n" not in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert after(torch.ones(2)).tolist() == [2, 2]
        assert before(torch.full([2], 3.0)).tolist() == [6, 6] and kept.tolist() == [2, 2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/test_gpu.py makes a capture fail on the device")
def test_a_capture_without_a_device_is_one_warning():
    recording = Recording(lambda x: 2 * x, Recordings(CudaCapture(torch.device("cuda"))))
    assert recording(torch.ones(2)).tolist() == [2, 2]
    with pytest.warns(RuntimeWarning, match=r"CUDA graphs are off .*--no-cuda-graphs"):
        assert recording(torch.ones(2)).tolist() == [2, 2]


@pytest.mark.parametrize("arch", PRESETS)
def test_training_by_replay_is_training(arch: str):
    """All phases among each other, bit for bit: optimizers, running means, accumulated gradients and the log
    use a phase's results before the next phase overwrites them."""
    more: dict[str, Any] = {"stylegan": {"r1_every": 3, "accumulate": 2}, "cgan": {"ada": 0.6}}.get(arch, {})
    config = tiny_config(arch, **more)
    plain, replayed = Engine(config, CPU), Engine(config, CPU)
    replayed.recordings = shared = recordings()
    for phase in replayed.phases:
        phase.recordings = shared
    for step in range(9):
        batch = random_step(config, CPU)
        for engine in (plain, replayed):
            engine.step(*batch)
        expected = plain.state()
        assert all(torch.equal(value, expected[name]) for name, value in replayed.state().items()), step
    ran = [phase.recording for phase in replayed.phases if phase.recording]
    assert len(ran) >= 2 and all(recording.replay for recording in ran)


def test_a_recorded_update_reads_its_rates_anew(monkeypatch: pytest.MonkeyPatch):
    """Learning rate and decay as scalar tensors, which they are on CUDA: in float64 they are the floats."""
    config = make_config("dcgan", device="cpu", precision="fp32", resolution=8, ngf=4, ndf=4)
    plain = Engine(config, CPU)
    monkeypatch.setattr(
        "fastgan.engine.number", lambda value, device: torch.tensor(value, dtype=torch.float64)
    )
    replayed = Engine(config, CPU)
    (rates,), (group,) = plain.g_optimizer.param_groups, replayed.g_optimizer.param_groups
    weights = list(zip(plain.G.parameters(), replayed.G.parameters(), strict=True))
    averages = list(zip(plain.ema.parameters(), replayed.ema.parameters(), strict=True))
    shared = recordings()
    adam = Recording(replayed.g_optimizer.step, shared)
    average = Recording(
        lambda: blend([b for _, b in averages], [b.detach() for _, b in weights], replayed.ema_rate),
        shared,
    )
    for parameter in itertools.chain.from_iterable(weights):
        parameter.grad = torch.empty_like(parameter)
    for step in range(4):
        for ours, theirs in weights:
            assert ours.grad is not None and theirs.grad is not None
            theirs.grad.copy_(ours.grad.normal_())
        rates["lr"] = 0.3 / (step + 1)
        group["lr"].fill_(rates["lr"])
        plain.g_optimizer.step()
        adam()
        assert all(a.equal(b) for a, b in weights), step
        plain.images += 40 * (step + 1)
        plain._average()
        assert isinstance(plain.ema_rate, float) and isinstance(replayed.ema_rate, Tensor)
        replayed.ema_rate.fill_(plain.ema_rate)
        average()
        for ours, theirs in averages:
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    assert adam.replay and average.replay


def test_the_average_follows_the_images_seen(monkeypatch: pytest.MonkeyPatch):
    """The same by a tensor as by a float, whatever the ramp-up says."""
    config = make_config("dcgan", device="cpu", precision="fp32", resolution=8, ngf=4, ndf=4)
    plain = Engine(config, CPU)
    monkeypatch.setattr("fastgan.engine.number", lambda value, device: torch.tensor(value))
    other = Engine(config, CPU)
    for e in (plain, other):
        with torch.no_grad():
            for parameter in e.G.parameters():
                parameter.fill_(1.0)
        for images in (32, 640, 10**6):
            e.images = images
            e._average()
    pairs = zip(plain.ema.parameters(), other.ema.parameters(), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_a_compiled_phase_is_recorded_anew():
    """What a rare phase recorded before it was compiled is let go."""
    engine = Engine(make_config("dcgan", device="cpu", precision="fp32", resolution=8, ngf=4, ndf=4), CPU)
    phase = engine.g
    phase.recordings = recordings()
    args = engine.g_args(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), None)
    for _ in range(2):
        phase(0, *args)
    eager = phase.recording
    phase.compiled = lambda *args: phase.function(*args)
    phase(1, *args)
    assert eager is not None and eager.replay is not None
    assert phase.recording is not eager and phase.recording is not None and phase.recording.replay is None
    phase(2, *args)
    assert phase.recording.function is phase.compiled and phase.recording.replay is not None
