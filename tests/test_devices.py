"""What would break or stall a phase on a GPU, found without one: on meta tensors under a dispatch mode, and
on fake CUDA tensors as far as they go (a CPU build of PyTorch has no CUDA backward for them).
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from family_cases import tiny_config
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastgan.config import PRESETS, Config, build_networks
from fastgan.engine import Engine, blend, number, set_precision
from fastgan.limit import PhaseCall, phase_calls, random_images

aten = torch.ops.aten
CPU, META, CUDA = torch.device("cpu"), torch.device("meta"), torch.device("cuda:0")
PHASES = ("D", "D with R1", "G", "G with path length")
# What a family's own recipe leaves out, so that each switch stands in the phases of some family.
SWITCHES: dict[str, dict[str, Any]] = {
    "gan": {"feature_matching": 1.0, "label_smoothing": 0.1},
    "cgan": {"ada": 0.6},
    "dcgan": {"dropout": 0.1, "r1": 1.0, "pl": 1.0, "diffaugment": "color,translation,cutout"},
    "cogan": {"ada": 0.6},
    "stylegan": {"cond": True, "classes": 3},
    "stylegan1": {"spectral_norm": True, "accumulate": 2},
    "r3gan": {"cond": True, "classes": 3},
}


def config(arch: str, precision: str = "bf16") -> Config:
    return tiny_config(arch, precision=precision, **SWITCHES.get(arch, {}))


def phase_call(config: Config, name: str) -> PhaseCall:
    calls = phase_calls(Engine(config, CPU), random_images(config, CPU))
    for call in calls:
        if call.phase.name == name:
            return call
    pytest.skip(f"{config.arch} has no phase {name!r}")


class OneDevice(TorchDispatchMode):
    """Raises AssertionError for an operation that a captured graph on `device` could not repeat or that would
    wait for it: a tensor on another device, copies included, or a result or shape that depends on values.

    Scalar CPU tensors, which PyTorch takes beside tensors on any device, count as another device: a CUDA
    graph keeps the number they held when it was captured. `shapes` is what every operation took and returned.
    """

    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device
        self.shapes: list[tuple[str, list[torch.Size]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.check(func, args, kwargs)
        if func.overloadpacket in (aten.index, aten.index_put, aten.index_put_):
            masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            assert not masks, f"{func} by a mask depends on values"
        else:
            tags = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
            assert not tags.intersection(func.tags), f"{func} depends on values"
        result = func(*args, **kwargs)
        self.check(func, result, {})
        self.shapes.append(
            (str(func), [t.shape for t in tree_leaves((args, kwargs, result)) if is_tensor(t)])
        )
        return result

    def check(self, func: Any, values: Any, more: dict[str, Any]) -> None:
        for value in tree_leaves((values, more)):
            device = value.device if is_tensor(value) else value
            if isinstance(device, torch.device):
                assert device == self.device, f"{func} on {device} in a phase on {self.device}"


def is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("arch", PRESETS)
def test_a_phase_stays_on_its_device(arch: str, phase: str, precision: str):
    """Two steps: the same operations on the same shapes."""
    call = phase_call(config(arch, precision), phase)
    function, args = call.phase.function, call.meta_args()
    steps = []
    for _ in range(2):
        with OneDevice(META) as mode:
            result = function(*args)
        assert all(t.device == META for t in tree_leaves(result))
        steps.append(mode.shapes)
    assert len(steps[0]) > 20
    assert steps[0] == steps[1]


def item(x: Tensor) -> Tensor:
    return x * x.sum().item()


def branch(x: Tensor) -> Tensor:
    return x if x.sum() > 0 else -x


def nonzero(x: Tensor) -> Tensor:
    return x[x.flatten().nonzero().flatten()]


def masked(x: Tensor) -> Tensor:
    return x[x > 0]


def unique(x: Tensor) -> Tensor:
    return x + x.unique().sum()


def to_the_host(x: Tensor) -> Tensor:
    return x + x.cpu().sum()


def cpu_operand(x: Tensor) -> Tensor:
    return nn.functional.conv2d(x, torch.ones(3, 3, 1, 1))


def cpu_scalar(x: Tensor) -> Tensor:
    return x * torch.ones([])


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (item, "aten._local_scalar_dense.default depends on values"),
        (branch, "depends on values"),
        (nonzero, "aten.nonzero.default depends on values"),
        (masked, "aten.index.Tensor by a mask depends on values"),
        (unique, "unique.* depends on values"),
        (to_the_host, "aten._to_copy.default on cpu in a phase on meta"),
        (cpu_operand, "on cpu in a phase on meta"),
        (cpu_scalar, "on cpu in a phase on meta"),
    ],
    ids=lambda f: getattr(f, "__name__", ""),
)
def test_a_planted_fault_is_found(fault: Callable[[Tensor], Tensor], message: str):
    """In the middle of a phase: on what D sees."""
    call = phase_call(config("dcgan"), "D")
    function, (G, D, *args) = call.phase.function, call.meta_args()

    class Faulty(nn.Module):
        def forward(self, x: Tensor, c: Tensor | None) -> Tensor:
            return D(fault(x), c)

    with OneDevice(META), pytest.raises(AssertionError, match=message):
        function(G, Faulty(), *args)


@pytest.fixture
def without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Methods spelt out in operations that do not ask for the CUDA that is not there."""

    def contiguous(x: Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
        lies_so = x.is_contiguous(memory_format=memory_format)
        return x if lies_so else aten.clone(x, memory_format=memory_format)

    if torch.cuda.is_available():
        pytest.skip("tests/test_gpu.py runs them on the device")
    monkeypatch.setattr(Tensor, "__getitem__", indexed)
    monkeypatch.setattr(Tensor, "copy_", lambda x, other, non_blocking=False: x.zero_().add_(other))
    monkeypatch.setattr(Tensor, "contiguous", contiguous)


def indexed(x: Tensor, index: Any) -> Tensor:
    index, dim = index if isinstance(index, tuple) else (index,), 0
    for i, part in enumerate(index):
        if part is None:
            x = aten.unsqueeze(x, dim)
        elif part is Ellipsis:
            dim = x.ndim - sum(other is not None for other in index[i + 1 :]) - 1
        elif isinstance(part, slice):
            x = aten.slice(x, dim, part.start, part.stop, part.step or 1)
        else:
            x = aten.select(x, dim, part)
            continue
        dim += 1
    return x


def on_fake_cuda(net: nn.Module) -> None:
    """In evaluation: training BatchNorm copies its statistics, which does not go without CUDA."""
    for module in net.eval().modules():
        for name, t in (*module._parameters.items(), *module._buffers.items()):
            if t is not None:
                delattr(module, name)
                fake = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=CUDA)
                module.register_buffer(name, fake)


@pytest.mark.usefixtures("without_cuda")
@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("arch", PRESETS)
def test_forward_passes_on_fake_cuda(arch: str, impl: str, monkeypatch: pytest.MonkeyPatch):
    """Training samples and their logits, by PyTorch's own rules about devices and the registered kernels'."""
    monkeypatch.setenv("FASTGAN_KERNELS", impl)
    c = config(arch)
    G, D = build_networks(c)
    with FakeTensorMode(), torch.no_grad(), OneDevice(CUDA):
        for net in (G, D):
            on_fake_cuda(net)
        normal, uniform = (torch.empty(4, n, device=CUDA) for n in (G.normals, G.uniforms))
        shape = (4, c.domains * c.channels, c.resolution, c.resolution)
        labels = torch.empty(shape if c.domains == 2 else (4, c.c_dim), device=CUDA)
        images, _ = G.sample(normal, uniform, labels)
        assert images.device == CUDA and images.shape == shape
        assert D(images, labels).device == CUDA


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/test_gpu.py runs them on the device")
@pytest.mark.parametrize("fault", [item, branch, cpu_operand, cpu_scalar], ids=lambda f: f.__name__)
def test_a_fault_on_fake_cuda_is_found(fault: Callable[[Tensor], Tensor]):
    c = config("dcgan")
    _, D = build_networks(c)
    with FakeTensorMode(), torch.no_grad():
        on_fake_cuda(D)
        x = torch.empty(4, 3, c.resolution, c.resolution, device=CUDA)
        with OneDevice(CUDA), pytest.raises(AssertionError, match=r"depends on values|on cpu in a phase"):
            D(fault(x))
        if fault in (item, branch):
            with pytest.raises(DataDependentOutputException):
                D(fault(x))


def test_rates_are_tensors_on_cuda():
    """And stay there when the average is updated; elsewhere they are numbers, with all their digits."""
    with FakeTensorMode():
        rate = number(0.1, CUDA)
        assert isinstance(rate, Tensor) and rate.device == CUDA and rate.dtype == torch.float32
        mine, theirs = ([torch.empty(3, device=CUDA), torch.empty(2, 2, device=CUDA)] for _ in range(2))
        with OneDevice(CUDA) as mode:
            rate.fill_(0.2)
            blend(mine, theirs, rate)
    assert len(mode.shapes) == 4, "launches do not grow with the number of tensors"
    assert number(0.1, CPU) == 0.1


def test_precision_on_cuda():
    """TF32 for what bf16 leaves over, none under --precision fp32; on a CPU all stays as it was."""
    owners: list[tuple[Any, str]] = [
        (torch.backends.cuda.matmul, "allow_tf32"),
        (torch.backends.cudnn, "allow_tf32"),
        (torch.backends.cudnn, "benchmark"),
    ]

    def flags() -> list[bool]:
        return [getattr(owner, name) for owner, name in owners]

    before, cuda = flags(), torch.device("cuda")
    try:
        set_precision(config("dcgan"), CPU)
        assert flags() == before
        set_precision(config("dcgan"), cuda)
        assert flags() == [True, True, True]
        set_precision(config("dcgan", "fp32"), cuda)
        assert flags() == [False, False, True]
    finally:
        for (owner, name), value in zip(owners, before, strict=True):
            setattr(owner, name, value)
