"""The limit of a phase: the time that its convolutions and matrix products alone need.

The phase runs once on the meta device, where every product is recorded with its shapes: forward, backward and
double backward. Each different one is then timed by itself, in every memory layout and dtype that the run's
precision allows, and the best times are added up, each as often as the product occurs. The limit over the
phase's own time is its fraction of the limit: 1 is a phase that does nothing else and does that at its best.

FIR filters (depthwise convolutions) are not counted: they are traffic, which fusion can hide.
"""

import copy
import functools
import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from fastgan.compiled import Phase
from fastgan.config import Config
from fastgan.engine import Engine
from fastgan.kernels import grouped_conv2d  # noqa: F401  registers its operations
from fastgan.step import PhaseResult

aten = torch.ops.aten
CONVOLUTIONS = {aten.convolution: 1, aten.convolution_backward: 2}  # position of the weight
MATRIX_PRODUCTS = {aten.mm: 1, aten.addmm: 2, aten.bmm: 1, aten.baddbmm: 2}  # of the second factor
GROUPED = (torch.ops.fastgan.grouped_conv2d, torch.ops.fastgan.grouped_conv2d_weight)
META = torch.device("meta")


class PhaseCall(NamedTuple):
    """A phase with arguments of the run's shapes; `share` is how often it runs in a step."""

    phase: Phase
    args: tuple
    share: float

    def __call__(self) -> Any:
        """Run it as late steps do: compiled, if the run compiles."""
        return self.phase(self.phase.eager_steps, *self.args)

    def on_meta(self) -> Callable[[], Any]:
        """The eager phase with its arguments on the meta device: shapes alone, no computation."""
        return functools.partial(self.phase.function, *self.meta_args())

    def meta_args(self) -> tuple:
        """The arguments on the meta device."""
        return tree_map(_to_meta, self.args)


def _to_meta(x: Any) -> Any:
    if isinstance(x, nn.Module):
        return copy.deepcopy(x).to(META)
    return x.to(META) if isinstance(x, Tensor) else x


def random_images(config: Config, device: torch.device, updates: int | None = None) -> Tensor:
    """uint8 in channels_last, as the feed gives them: of a phase's call, or of `updates` updates of D."""
    count = config.part if updates is None else updates * config.batch
    shape = (count, config.domains * config.channels, config.resolution, config.resolution)
    real = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    return real.contiguous(memory_format=torch.channels_last)


def random_step(config: Config, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Arguments of `Engine.step`: images of random pixels and, if the run is conditional, random labels."""
    real = random_images(config, device, config.d_steps)
    labels = torch.randint(config.c_dim, (len(real),), device=device) if config.cond else None
    return real, labels


def grown(engine: Engine) -> Engine:
    """`engine`; where its networks grow, as far as they are at the end of the run."""
    if engine.stage is not None:
        engine.images = engine.config.images
        engine.grow()
    return engine


def phase_calls(engine: Engine, real: Tensor) -> list[PhaseCall]:
    """The phases that `engine.step` runs, on real uint8 [part, C, R, R]; `share` is how often in a step."""
    c = engine.config
    labels = engine.one_hot(torch.zeros(len(real), dtype=torch.int64, device=engine.device))
    d, g = (steps * c.accumulate for steps in (c.d_steps, c.g_steps))
    r1 = 1 / c.r1_every if c.r1 > 0 or c.r2 > 0 else 0.0
    pl = 1 / c.pl_every if c.pl > 0 else 0.0
    calls = [
        PhaseCall(engine.d, engine.d_args(real, labels), d * (1 - r1)),
        PhaseCall(engine.d_r1, engine.d_args(real, labels), d * r1),
        PhaseCall(engine.g, engine.g_args(real, labels), g * (1 - pl)),
    ]
    if pl > 0:
        calls.append(PhaseCall(engine.g_path, engine.path_args(real, labels), g * pl))
    return [call for call in calls if call.share > 0]


def update_call(engine: Engine) -> Callable[[], None]:
    """What follows the phases of a step: both optimizers, given gradients of zero, and the moving average."""
    pairs = [(engine.D, engine.d_optimizer), (engine.G, engine.g_optimizer)]
    results = [PhaseResult({}, [torch.zeros_like(p) for p in net.parameters()]) for net, _ in pairs]

    def run() -> None:
        for (net, optimizer), result in zip(pairs, results, strict=True):
            engine._update(net, optimizer, [result] * engine.config.accumulate)
        engine._average()

    return run


class Shape(tuple):
    """Stands for a tensor of this shape among a product's arguments."""


class Product(NamedTuple):
    """A convolution, a convolution's gradients or a matrix product; tensors are given by their shapes."""

    op: torch._ops.OpOverload
    args: tuple


class Recorder(TorchDispatchMode):
    """Counts in `products` the different products that run under it."""

    def __init__(self) -> None:
        super().__init__()
        self.products: Counter[Product] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (*MATRIX_PRODUCTS, *GROUPED) or (
            func.overloadpacket in CONVOLUTIONS and not _depthwise(args[CONVOLUTIONS[func.overloadpacket]])
        ):
            self.products[Product(func, tuple(_hashable(a) for a in args))] += 1
        return func(*args, **(kwargs or {}))


def _depthwise(weight: Tensor) -> bool:
    return weight.shape[1] == 1 and weight.shape[0] > 1


def _hashable(a: Any) -> Any:
    if isinstance(a, Tensor):
        return Shape(a.shape)
    return tuple(a) if isinstance(a, list) else a


def products(run: Callable[[], Any]) -> Counter[Product]:
    """How often `run` computes each product. Tensors must be outside inference mode."""
    with Recorder() as recorder:
        run()
    return recorder.products


class Form(NamedTuple):
    """How a product's tensors lie: `last` is channels_last, or a second factor that is stored transposed."""

    dtype: torch.dtype
    last: bool


def prepared(product: Product, form: Form, device: torch.device) -> Callable[[], Any]:
    """The product on random tensors of this form, ready to be timed."""
    second = MATRIX_PRODUCTS.get(product.op.overloadpacket)
    args: list[Any] = []
    for i, a in enumerate(product.args):
        if not isinstance(a, Shape):
            args.append(a)
            continue
        x = torch.randn(a, device=device, dtype=form.dtype)
        if form.last and x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        elif form.last and i == second:
            x = x.mT.contiguous().mT
        args.append(x)
    return lambda: product.op(*args)


def form_time(product: Product, form: Form, device: torch.device, seconds: float, least: int = 3) -> float:
    """Seconds of one run, the median of bursts that together take about `seconds`, of `least` at least.

    On a GPU a burst is ten runs, so that the wait at its end weighs little.
    """
    run = prepared(product, form, device)
    burst = 10 if device.type == "cuda" else 1

    def once() -> float:
        start = time.perf_counter()
        for _ in range(burst):
            run()
        synchronize(device)
        return (time.perf_counter() - start) / burst

    once()  # picks an algorithm, fills caches
    times = [once()]
    while len(times) < least or (sum(times) * burst < seconds and len(times) < 50):
        times.append(once())
    return statistics.median(times)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@functools.cache
def best_form(product: Product, dtypes: tuple[torch.dtype, ...], device: torch.device) -> Form:
    """The fastest of all forms, measured once in a process."""
    forms = [Form(dtype, last) for dtype in dtypes for last in (False, True)]
    return min(forms, key=lambda form: form_time(product, form, device, 0.005, least=1))


def limit(call: PhaseCall, precision: torch.dtype) -> float:
    """Seconds that the products of one run of the phase need: the sum of count times best time, measured now.

    `precision` is the run's: fp32 products may always be fp32, and bf16 in a bf16 run.
    """
    dtypes = tuple(dict.fromkeys((torch.float32, precision)))
    device = call.phase.device
    return sum(
        count * form_time(product, best_form(product, dtypes, device), device, 0.05)
        for product, count in products(call.on_meta()).items()
    )
