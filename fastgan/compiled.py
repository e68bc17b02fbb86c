"""How a phase is compiled, captured and replayed.

A phase is traced whole: the inner gradients of R1 and path length are `torch.autograd.grad` calls inside the
traced function (`trace_autograd_ops`), so one graph holds forward, backward and double backward.

On CUDA a phase, compiled or not, is captured as a CUDA graph: its kernels are recorded once and from then on
launched all together. A capture knows memory, not values: arguments are copied to buffers of its own, and
results lie where the next replay writes them (`Recording`).
"""

import copy
import subprocess
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from torch.utils._pytree import tree_flatten, tree_map_only

from fastgan import losses
from fastgan.config import UsageError

# A phase that runs at every step is compiled at once. A rare one runs eagerly until it has run this often, by
# when compiling it would have paid for itself (README, "Compile time"). Which runs are compiled is a function
# of the images seen alone, so that resuming stays exact.
EAGER_RUNS_OF_A_RARE_PHASE = 3000


def check_compiler(what: str) -> None:
    """UsageError where there is no C++ compiler, which `what` needs."""
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise UsageError(f"{what} needs a C++ compiler: install g++ or clang, or set CXX") from None


def compile_phase(phase: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """`phase` as a single graph; an error says what keeps it from being one."""
    if device.type == "cpu":
        check_compiler("--compile on a CPU")
    torch._dynamo.config.trace_autograd_ops = True
    if not losses.TRACES_LEAVES:
        losses.zero = torch.zeros((), device=device, requires_grad=True)
    torch._dynamo.config.recompile_limit = 64  # of one function: every phase and stage of a family is its own
    # On a CPU one C++ file for the whole graph: starting a compiler for each kernel took 1.4 times as long.
    options: dict[str, Any] = {"cpp_wrapper": True} if device.type == "cpu" else {}
    return torch.compile(phase, fullgraph=True, dynamic=False, options=options)


T = TypeVar("T")
# Records what `run` launches, without running it; returns how to replay that, and run's result, whose tensors
# every replay writes anew.
Capture = Callable[[Callable[[], T]], tuple[Callable[[], None], T]]


class CudaCapture:
    """Captures CUDA graphs that share one pool of memory.

    Captures use each other's scratch memory, results of another one included, so they must not run at the
    same time, and a result is to be used before any other capture is replayed. Random numbers that are drawn
    inside come from the device's default generator, which every capture registers: a replay continues from
    the generator's seed and offset as they then are, so torch.manual_seed works as without a capture.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.pool: Any = None

    def __call__(self, run: Callable[[], T]) -> tuple[Callable[[], None], T]:
        with torch.cuda.device(self.device):
            self.pool = self.pool or torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            generator = torch.cuda.default_generators[torch.cuda.current_device()]
            random_state = generator.clone_state()
            try:
                # The outer stream is for a capture that fails: it leaves its own the current one. The feed's
                # thread may pin memory meanwhile, so only what this thread does can break the capture.
                with (
                    torch.cuda.stream(torch.cuda.current_stream()),
                    torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"),
                ):
                    result = run()
            except Exception:  # it also leaves the generator capturing
                generator.graphsafe_set_state(random_state)
                raise
        return graph.replay, result


class Recordings:
    """What a run's recordings share: how to capture, and whether a capture has failed.

    After a failure nothing is replayed any more, for the failed capture may have left the random generator
    that the others draw from behind.
    """

    def __init__(self, capture: Capture):
        self.capture = capture
        self.failed = False

    def give_up(self, error: Exception) -> None:
        """No recording from now on; one warning says why."""
        self.failed = True
        reason = str(error).partition("\n")[0]
        warnings.warn(
            f"CUDA graphs are off for this run, which goes on a little slower: {type(error).__name__}: "
            f"{reason} (--no-cuda-graphs avoids the attempt)",
            RuntimeWarning,
            stacklevel=2,
        )


class Recording:
    """`function`, replayed: the same results, without its launches.

    The first call runs `function` as it is, to let libraries set themselves up, the second records it. Tensor
    arguments are copied to `inputs` before each replay, and not kept; all others (networks, numbers) are
    constants of the recording, and the networks' parameters and buffers are read and written where they lay.

    The tensors returned are `outputs`, the same at each call: **copy or use them before the next replay** of
    this or any other recording of the same `Recordings`, which share their memory.

    Raises ValueError for a tensor of another shape or dtype, or another constant, than the one recorded.
    """

    def __init__(self, function: Callable[..., Any], recordings: Recordings):
        self.function, self.recordings = function, recordings
        self.warm = False
        self.inputs: list[Any] = []
        self.outputs: Any = None
        self.replay: Callable[[], None] | None = None

    def __call__(self, *args: Any) -> Any:
        if not self.warm or self.recordings.failed:
            self.warm = True
            return self.function(*args)
        if self.replay is None:
            self.inputs = tree_map_only(Tensor, torch.empty_like, list(args))
        self._load(args)
        if self.replay is None:
            try:
                self.replay, self.outputs = self.recordings.capture(lambda: self.function(*self.inputs))
            except Exception as error:  # whatever it is: training can go on without
                self.recordings.give_up(error)
                return self.function(*args)
        self.replay()
        return self.outputs

    def _load(self, args: Sequence[Any]) -> None:
        (ours, form), (theirs, given_form) = tree_flatten(self.inputs), tree_flatten(list(args))
        if form != given_form:
            raise ValueError(f"arguments were recorded as {form}: got {given_form}")
        for i, (mine, given) in enumerate(zip(ours, theirs, strict=True)):
            if not isinstance(mine, Tensor):
                if mine is not given and mine != given:
                    raise ValueError(f"argument {i} is a constant of the recording, {mine}: got {given}")
            elif (mine.shape, mine.dtype) != (given.shape, given.dtype):
                raise ValueError(
                    f"argument {i} was recorded as {mine.dtype} {list(mine.shape)}: "
                    f"got {given.dtype} {list(given.shape)}"
                )
            else:
                mine.copy_(given)


class Phase:
    """A phase that runs every so many steps, eagerly or compiled, and replayed where there are `recordings`.

    Called with the number of the step and the phase's own arguments. Its result is to be used before the next
    phase is called (see `Recording`). `seconds` is the time that its first compiled call took, None before
    that; `announce` is told when that call begins and ends; `helper` is a process that compiles the phase
    meanwhile (precompile.py), to be waited for.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        device: torch.device,
        compile: bool = False,
        every: int = 1,
        recordings: Recordings | None = None,
        announce: Callable[[str], None] = lambda message: None,
    ):
        self.name, self.function, self.device = name, function, device
        self.compiled = compile_phase(function, device) if compile else None
        self.recordings = recordings
        self.recording: Recording | None = None
        self.eager_steps = EAGER_RUNS_OF_A_RARE_PHASE * every if every > 1 else 0
        self.seconds: float | None = None
        self.announce = announce
        self.helper: subprocess.Popen | None = None

    def __call__(self, step: int, *args: Any) -> Any:
        if self.compiled is None or step < self.eager_steps:
            return self._run(self.function, args)
        if self.seconds is not None:
            return self._run(self.compiled, args)
        if self.device.type == "cuda":
            self._choose_kernels(args)
        self.announce(f"compiling {self.name}")
        start = time.perf_counter()
        if self.helper:
            self.helper.wait()
        result = self._run(self.compiled, args)
        self.seconds = time.perf_counter() - start
        self.announce(f"compiled {self.name} in {self.seconds:.0f} s")
        return result

    def _run(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        if self.recordings is None:
            return function(*args)
        if self.recording is None or self.recording.function is not function:
            self.recording = Recording(function, self.recordings)  # lets an eager phase's memory go
        return self.recording(*args)

    def _choose_kernels(self, args: tuple[Any, ...]) -> None:
        """One eager run on copies: dispatch verifies and times kernels, which it cannot while a graph is
        traced."""
        with torch.random.fork_rng([self.device] if torch.cuda.is_available() else []):
            self.function(*copy.deepcopy(args))
