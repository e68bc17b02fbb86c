"""How a phase is compiled.

A phase is traced whole: the inner gradients of R1 and path length are `torch.autograd.grad` calls inside the
traced function (`trace_autograd_ops`), so one graph holds forward, backward and double backward.
"""

import copy
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch

# A phase that runs at every step is compiled at once. A rare one runs eagerly until it has run this often, by
# when compiling it would have paid for itself (README, "Compile time"). Which runs are compiled is a function
# of the images seen alone, so that resuming stays exact.
EAGER_RUNS_OF_A_RARE_PHASE = 3000


def compile_phase(phase: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """`phase` as a single graph; an error says what keeps it from being one."""
    torch._dynamo.config.trace_autograd_ops = True
    # On a CPU one C++ file for the whole graph: starting a compiler for each kernel took 1.4 times as long.
    options: dict[str, Any] = {"cpp_wrapper": True} if device.type == "cpu" else {}
    return torch.compile(phase, fullgraph=True, dynamic=False, options=options)


class Phase:
    """A phase that runs every so many steps, eagerly or compiled.

    Called with the number of the step and the phase's own arguments. `seconds` is the time that its first
    compiled call took, None before that; `announce` is told when that call begins and ends; `helper` is a
    process that compiles the phase meanwhile (precompile.py), to be waited for.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        device: torch.device,
        compile: bool = False,
        every: int = 1,
    ):
        self.name, self.function, self.device = name, function, device
        self.compiled = compile_phase(function, device) if compile else None
        self.eager_steps = EAGER_RUNS_OF_A_RARE_PHASE * every if every > 1 else 0
        self.seconds: float | None = None
        self.announce: Callable[[str], None] = lambda message: None
        self.helper: subprocess.Popen | None = None

    def __call__(self, step: int, *args: Any) -> Any:
        if self.compiled is None or step < self.eager_steps:
            return self.function(*args)
        if self.seconds is not None:
            return self.compiled(*args)
        if self.device.type == "cuda":
            self._choose_kernels(args)
        self.announce(f"compiling {self.name}")
        start = time.perf_counter()
        if self.helper:
            self.helper.wait()
        result = self.compiled(*args)
        self.seconds = time.perf_counter() - start
        self.announce(f"compiled {self.name} in {self.seconds:.0f} s")
        return result

    def _choose_kernels(self, args: tuple[Any, ...]) -> None:
        """One eager run on copies: dispatch verifies and times kernels, which it cannot while a graph is
        traced."""
        with torch.random.fork_rng([self.device] if torch.cuda.is_available() else []):
            self.function(*copy.deepcopy(args))
