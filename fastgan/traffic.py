"""python -m fastgan.traffic: how many kernels a phase launches and how many bytes they move through memory,
unfused and fused. Takes the options of train.

What is left besides convolutions and matrix products is bound by memory, so its bytes are its cost. Unfused,
every aten operation reads its operands and writes its results once, but BatchNorm reads twice, forward and
backward: for sums over the batch, then to use them. Fused, every node that Inductor schedules for the CPU
reads and writes once: what it passes to itself stays in registers. Both are counted from shapes alone.
"""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastgan import cli
from fastgan.config import Config, make_config, resolve_device
from fastgan.engine import Engine
from fastgan.limit import grown, phase_calls, random_images

PRODUCTS = {"convolution", "convolution_backward", "mm", "addmm", "bmm", "baddbmm"}
# FIR filters and grouped convolutions, to Inductor convolutions.
PRODUCTS |= {"correlate", "grouped_conv2d", "grouped_conv2d_weight"}
WRITES_ONLY = {"copy_", "fill_", "zero_"}
READ_TWICE = {"native_batch_norm", "native_batch_norm_backward"}


class Traffic(NamedTuple):
    """Kernels of a phase, and what they move through memory."""

    products: int  # launches of convolutions and matrix products
    launches: int  # of all other kernels
    bytes: int  # that those others read and write


def unfused(function: Callable[..., Any], *args: Any) -> Traffic:
    """Of `function` as PyTorch runs it eagerly; on meta tensors nothing is computed."""
    counter = _Counter()
    with counter:
        function(*args)
    return Traffic(counter.products, counter.launches, counter.bytes)


def fused(function: Callable[..., Any], *args: Any) -> Traffic:
    """Of `function`, on CPU tensors, as Inductor schedules it; stops there, before any code is made."""
    nodes: list[Any] = []

    def stop(scheduled: list[Any]) -> list[Any]:
        nodes.extend((n, n.get_read_write_buffers_sizes()) for n in scheduled)
        raise _Scheduled

    options: dict[str, Any] = {"_post_fusion_custom_pass": stop}
    compiled = torch.compile(function, fullgraph=True, dynamic=False, options=options)
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        try:
            compiled(*args)
        except BackendCompilerFailed as error:
            if not isinstance(error.inner_exception, _Scheduled):
                raise
    products = launches = moved = 0
    for node, size in nodes:
        kernel = str(getattr(node.node, "python_kernel_name", None)).split(".")
        if PRODUCTS.intersection(kernel):
            products += 1
        elif size:  # 0: what only names a result or an input
            launches, moved = launches + 1, moved + size
    return Traffic(products, launches, moved)


def table(config: Config) -> str:
    """Both counts for each phase that `config` runs."""
    row = "{:18}  {:>8}  {:>9} {:>7}  {:>9} {:>7}".format
    lines = [row("", "products", "launches", "fused", "MB moved", "fused")]
    cpu = torch.device("cpu")
    engine = grown(Engine(dataclasses.replace(config, compile=False), cpu))
    for call in phase_calls(engine, random_images(config, cpu)):
        a, b = unfused(call.on_meta()), fused(call.phase.function, *call.args)
        moved = (f"{t.bytes / 1e6:.0f}" for t in (a, b))
        lines.append(row(call.phase.name, a.products, a.launches, b.launches, *moved))
    return "\n".join(lines)


class _Scheduled(Exception):
    """The graph has been scheduled, which is all that `fused` wants."""


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.products = self.launches = self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        operands, results = _tensors(args, kwargs), _tensors(result)
        name = func.overloadpacket.__name__
        if name in PRODUCTS:
            self.products += 1
        elif not func.is_view and not name.startswith(("empty", "new_empty")):
            written = operands[0] if name in WRITES_ONLY else None
            times = 2 if name in READ_TWICE else 1
            moved = times * sum(_footprint(t) for t in operands if t is not written)
            moved += sum(map(_footprint, results))
            self.launches, self.bytes = self.launches + times * (moved > 0), self.bytes + moved
        return result


def _tensors(*values: Any) -> list[Tensor]:
    """Those among `values`, each once."""
    return list({id(t): t for t in tree_leaves(values) if isinstance(t, Tensor)}.values())


def _footprint(t: Tensor) -> int:
    """Bytes of memory behind `t`: those of an expanded dimension count once."""
    count = t.itemsize
    for size, stride in zip(t.shape, t.stride(), strict=True):
        count *= size if stride or not size else 1
    return count


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return cli.run(_main, argv)


def _main(argv: Sequence[str] | None) -> int:
    p = cli.Parser(prog="fastgan traffic", description=__doc__, formatter_class=cli.Prose)
    p.add_config()
    config, _ = resolve_device(make_config(**vars(p.parse_args(argv))))
    print(table(config))
    return 0


if __name__ == "__main__":
    sys.exit(main())
