"""Which implementation of an operation runs.

The tensor decides: a GPU tensor runs the Triton kernel, a CPU tensor too under TRITON_INTERPRET=1, any other
the reference, called directly so that Inductor can fuse it. `impl=` forces a candidate by name; so does the
environment variable FASTGAN_KERNELS.

On a GPU the first use of (operation, dtype, shape class) compares every candidate with the reference on small
random inputs, to second order, and times those that agree; the fastest is remembered on disk. The verdict is
a constant to torch.compile: deciding runs while Dynamo traces, never inside the traced program. While tracing
nothing is timed, so a phase runs once eagerly before it is compiled (compiled.py).
"""

import contextlib
import functools
import hashlib
import inspect
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.library import CustomOpDef

if TYPE_CHECKING:
    import triton.language as tl

    jit: Callable[[Callable[..., Any]], Any]
else:
    try:
        import triton.language as tl
        from triton import jit
    except ImportError:  # no Triton for this platform: kernels cannot run, the reference can
        tl, jit = SimpleNamespace(constexpr=object), lambda fn: fn

C = TypeVar("C")
REGISTERS = 232  # of a thread: enough for every kernel, few enough for 8 warps
__all__ = ["Build", "Op", "bucket", "capped", "check_tensors", "interpreting", "jit", "tl", "tuned"]


class Build(NamedTuple):
    """One kernel in one configuration, as `python -m fastgan.kernels.offline` compiles it.

    `signature` maps every runtime argument to its Triton type ("*bf16", "i32", ...); those in `unaligned` are
    not taken to be multiples of 16. `elements` is the number of results that one pass over the kernel's body
    makes, `least` the bytes per result that any implementation has to move.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    elements: int = 0
    least: float = 0.0
    unaligned: tuple[str, ...] = ()


def capped(device: torch.device) -> dict[str, int]:
    """The launch option that caps a thread's registers, on NVIDIA GPUs from sm_100 on: left to itself, their
    assembler spills a few for an occupancy that nothing needs."""
    if device.type != "cuda" or torch.version.hip is not None:
        return {}
    return {"maxnreg": REGISTERS} if torch.cuda.get_device_capability(device)[0] >= 10 else {}


def interpreting() -> bool:
    """True when Triton kernels run on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def check_tensors(x: Tensor, **others: Tensor | None) -> None:
    """Every operation's first check: floating tensors on x's device. TypeError, ValueError otherwise."""
    for name, t in {"x": x, **others}.items():
        if t is None:
            continue
        if not t.is_floating_point():
            raise TypeError(f"{name} must be a floating tensor: got {t.dtype}; convert it with .float()")
        if t.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}: got {t.device}")


def bucket(n: int) -> int:
    """Size class: the number of bits of n, so that sizes within a factor of two share a verdict."""
    return int(n).bit_length()


def versions(device: torch.device) -> str:
    """What a measurement depends on: the device's name, and the torch and triton versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    try:
        import triton
    except ImportError:
        return f"{name}, torch {torch.__version__}, no triton"
    return f"{name}, torch {torch.__version__}, triton {triton.__version__}"


def cache_file(device: torch.device) -> Path:
    """FASTGAN_CACHE, or ~/.cache/fastgan, /kernels-<device and versions>.json."""
    folder = os.environ.get("FASTGAN_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "fastgan"
    )
    name = "".join(c if c.isalnum() or c in ".+" else "-" for c in versions(device))
    return Path(folder) / f"kernels-{name}.json"


_remembered: dict[Path, dict[str, Any]] = {}


def recall(device: torch.device, key: str) -> Any:
    """What is remembered of `key` on this device; None if nothing is."""
    file = cache_file(device)
    if file not in _remembered:
        _remembered[file] = {}
        try:
            stored = json.loads(file.read_text())
            if not isinstance(stored, dict):
                raise ValueError(f"expected a JSON object, found {type(stored).__name__}")
            _remembered[file] = stored
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            warnings.warn(f"ignoring the kernel cache {file}: {error}", RuntimeWarning, stacklevel=2)
    return _remembered[file].get(key)


def remember(device: torch.device, key: str, value: Any) -> None:
    """Keep `value` for `key`, here and on disk."""
    file = cache_file(device)
    recall(device, key)
    _remembered[file][key] = value
    partial = file.with_suffix(f".{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(_remembered[file], indent=1, sort_keys=True))
        partial.replace(file)
    except OSError as error:
        warnings.warn(f"cannot write the kernel cache {file}: {error}", RuntimeWarning, stacklevel=2)


def _sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Callable[[], Any], device: torch.device, repeats: int = 10) -> float:
    """Median time of `run`, after two runs to warm up."""
    times = []
    for _ in range(repeats + 2):
        _sync(device)
        start = time.perf_counter()
        run()
        _sync(device)
        times.append(time.perf_counter() - start)
    return sorted(times[2:])[repeats // 2]


def _may_run(device: torch.device) -> bool:
    """False where real work cannot run on the side: during CUDA graph capture, or under fake tensors."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return False
    return not torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)


def _tracing() -> bool:
    return torch._guards.TracingContext.try_get() is not None


def tuned(
    name: str, key: Hashable, configs: Sequence[C], launch: Callable[[C], Any], device: torch.device
) -> C:
    """The config for which `launch` is fastest on this device, remembered on disk by (name, key).

    To be called inside an op's implementation, where tensors are real; `launch` must be repeatable. The first
    config where nothing is to be measured: one candidate, the CPU, a CUDA graph being captured.
    """
    if len(configs) == 1 or device.type != "cuda":
        return configs[0]
    full = f"config {name} {key} of {configs}"
    best = recall(device, full)
    if best is None:
        if not _may_run(device):
            return configs[0]
        times = [seconds(lambda c=c: launch(c), device) for c in configs]
        best = min(range(len(configs)), key=times.__getitem__)
        remember(device, full, best)
    return configs[best]


def _derivatives(run: Callable, args: Sequence[Any], order: int) -> list[Tensor]:
    """Outputs, gradients for fixed random cotangents and, for order 2, the gradients of their squared
    norm."""
    args = [a.detach().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a for a in args]
    leaves = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    out = run(*args)
    outs = [out] if isinstance(out, Tensor) else [o for o in out if o.requires_grad]
    if not leaves or order == 0:
        return [o.detach() for o in outs]
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(o.shape, generator=generator).to(o) for o in outs]
    grads = torch.autograd.grad(outs, leaves, cotangents, create_graph=order > 1, materialize_grads=True)
    results = [*outs, *grads]
    if order > 1:
        norm = torch.stack([g.square().sum() for g in grads if g.requires_grad] or [outs[0].sum() * 0]).sum()
        results += torch.autograd.grad(norm, leaves, allow_unused=True, materialize_grads=True)
    return [r.detach() for r in results]


def _double(args: Sequence[Any]) -> list[Any]:
    return [
        a.detach().double().requires_grad_(a.requires_grad)
        if isinstance(a, Tensor) and a.is_floating_point()
        else a
        for a in args
    ]


def disagreement(candidate: Callable, reference: Callable, args: Sequence[Any], order: int = 2) -> str | None:
    """How the candidate differs from the reference on `args`, or None: values and derivatives up to `order`.

    The error against the reference in float64 may be twice the reference's own, plus a few roundings of the
    largest value; second derivatives amplify roundings, so wider types get a floor far below any mistake.
    """
    floor = {torch.float64: 1e-8, torch.float32: 1e-4}
    exact = _derivatives(reference, _double(args), order)
    plain = _derivatives(reference, args, order)
    fused = _derivatives(candidate, args, order)
    for i, (e, p, f) in enumerate(zip(exact, plain, fused, strict=True)):
        if f.shape != p.shape:
            return f"result {i}: shape {list(f.shape)}, the reference has {list(p.shape)}"
        if not e.numel():
            continue
        scale = e.abs().max().item()
        allowed = (
            2 * (p - e).abs().max().item() + floor.get(p.dtype, 8 * torch.finfo(p.dtype).eps) * scale + 1e-30
        )
        error = (f - e).abs().max().item()
        if not error <= allowed:
            return f"result {i}: error {error:.3g}, allowed {allowed:.3g}, largest value {scale:.3g}"
    return None


def deviation(run: Callable, args: Sequence[Any], order: int = 2) -> float:
    """The largest |result - exact| / |exact| (2-norms) of values and derivatives up to `order`.

    Exact is float64. A result that is exactly zero must be zero; NaN counts as infinite.
    """
    worst = 0.0
    for r, e in zip(_derivatives(run, args, order), _derivatives(run, _double(args), order), strict=True):
        error = ((r - e).norm() / e.norm().clamp_min(1e-30)).item()
        worst = max(worst, math.inf if math.isnan(error) else error)
    return worst


class Op:
    """An operation's candidates, all called with the same positional arguments.

    `candidates` maps names to functions and holds "reference" and at least one other, the preferred first.
    `sample(dtype, device, key, small)` makes arguments of a shape class: `key` is what `__call__`'s `key()`
    returned, small ones to verify with, or full ones to time with; floating tensors that require grad are
    verified to `order`.
    """

    def __init__(
        self,
        name: str,
        candidates: dict[str, Callable],
        sample: Callable[[torch.dtype, torch.device, Any, bool], Sequence[Any]],
        order: int = 2,
    ):
        self.name = name
        self.candidates = candidates
        self.sample = sample
        self.order = order
        self.verdicts: dict[tuple, str] = {}

        @torch.compiler.assume_constant_result
        def decide(dtype: torch.dtype, device: torch.device, key: Any) -> str:
            return self._decide(dtype, device, key)

        self.decide = decide

    @property
    def preferred(self) -> str:
        """The candidate that runs where nothing has been measured."""
        return next(name for name in self.candidates if name != "reference")

    def forced(self, impl: str | None, device: torch.device) -> str | None:
        """The candidate that `impl` or FASTGAN_KERNELS asks for; the preferred one where an operation has no
        "library" or "triton"."""
        name = impl or os.environ.get("FASTGAN_KERNELS")
        if not name:
            return None
        if name in ("triton", "library") and name not in self.candidates:
            name = self.preferred
        if name not in self.candidates:
            raise ValueError(f"impl (or FASTGAN_KERNELS) must be triton, library or reference: got {name!r}")
        if name != "reference" and device.type != "cuda" and not interpreting():
            raise ValueError(
                f"{self.name}: impl {name!r} needs a tensor on a GPU, or TRITON_INTERPRET=1 set before the "
                f"import on the CPU: got a tensor on {device}"
            )
        return name

    def __call__(
        self, x: Tensor, *rest: Any, key: Callable[[], Hashable] = tuple, impl: str | None = None
    ) -> Any:
        """Run the operation on (x, *rest). `key()`, made of constants, is the shape class beside the
        dtype."""
        name = self.forced(impl, x.device)
        if name is None:
            if x.device.type == "cuda":
                name = self.decide(x.dtype, x.device, key())
            elif interpreting() and x.dtype != torch.bfloat16:  # the interpreter truncates bfloat16
                name = self.preferred
            else:
                name = "reference"
        return self.candidates[name](x, *rest)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Changes with the source of the candidates, so that no verdict outlives the kernel it was about."""
        functions = (f._init_fn if isinstance(f, CustomOpDef) else f for f in self.candidates.values())
        files = sorted({inspect.getfile(inspect.unwrap(f)) for f in functions})
        return hashlib.sha256(b"".join(Path(f).read_bytes() for f in files)).hexdigest()[:12]

    def _decide(self, dtype: torch.dtype, device: torch.device, key: Any) -> str:
        known = self.verdicts.get((dtype, device, key))
        if known:
            return known
        full = f"{self.name} {dtype} {key} {self.fingerprint}"
        stored = recall(device, full)
        if isinstance(stored, dict) and stored.get("choice") in self.candidates:
            for message in stored.get("wrong", []):
                warnings.warn(message, RuntimeWarning, stacklevel=2)
            self.verdicts[dtype, device, key] = stored["choice"]
            return stored["choice"]
        if not _may_run(device):
            return self.preferred
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
            right, wrong = self.verify(dtype, device, key)
            if _tracing():
                choice = right[0]
            else:
                times = self.measure(right, dtype, device, key)
                choice = min(times, key=times.__getitem__).removesuffix(" compiled")
                remember(device, full, {"choice": choice, "wrong": wrong, "seconds": times})
                self.verdicts[dtype, device, key] = choice
        return choice

    def verify(self, dtype: torch.dtype, device: torch.device, key: Any) -> tuple[list[str], list[str]]:
        """The names that agree with the reference (itself last), and a warning for each that does not."""
        right, wrong = [], []
        args = self.sample(dtype, device, key, True)
        for name, candidate in self.candidates.items():
            if name == "reference":
                continue
            try:
                problem = disagreement(candidate, self.candidates["reference"], args, self.order)
            except Exception as error:  # a kernel that does not build here must not stop training
                problem = f"{type(error).__name__}: {error}"
            if problem is None:
                right.append(name)
                continue
            message = (
                f"kernel {self.name} ({name}) is wrong on this device and is turned off for {dtype}, "
                f"class {key}: "
                f"{problem}. The reference runs instead: correct, slower. Please report this message: "
                f"{versions(device)}"
            )
            wrong.append(message)
            warnings.warn(message, RuntimeWarning, stacklevel=2)
        return [*right, "reference"], wrong

    def measure(
        self, names: list[str], dtype: torch.dtype, device: torch.device, key: Any
    ) -> dict[str, float]:
        """Seconds of forward and first gradients, of the reference as Inductor compiles it too."""
        if names == ["reference"]:
            return {"reference": 0.0}
        args = self.sample(dtype, device, key, False)
        runs = {name: self.candidates[name] for name in names}
        runs["reference compiled"] = torch.compile(self.candidates["reference"], dynamic=False)
        return {
            name: seconds(lambda run=run: _derivatives(run, args, 1), device) for name, run in runs.items()
        }
