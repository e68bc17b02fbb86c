"""Counts of kernels and bytes: by hand on small functions, and what fusion saves on phases."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fastgan import traffic
from fastgan.config import make_config
from fastgan.engine import Engine
from fastgan.limit import phase_calls, random_images
from fastgan.traffic import Traffic, fused, unfused

CPU, META = torch.device("cpu"), torch.device("meta")


def pointwise(x: Tensor) -> Tensor:
    return (2 * x + 1).relu()


def product(x: Tensor) -> Tensor:
    return (x @ x.t()).relu()


@pytest.mark.parametrize(
    ("function", "eager", "compiled"),
    [
        (pointwise, Traffic(0, 3, 3 * 2 * 256), Traffic(0, 1, 2 * 256)),
        (product, Traffic(1, 1, 2 * 256), Traffic(1, 1, 2 * 256)),
    ],
    ids=["pointwise", "product"],
)
def test_counts_by_hand(function: Any, eager: Traffic, compiled: Traffic):
    """x is 8 x 8 numbers of four bytes; views move nothing."""
    assert unfused(function, torch.empty(8, 8, device=META)) == eager
    assert fused(function, torch.ones(8, 8)) == compiled


def test_operations_in_place():
    """Some do not read what they write; an expanded operand is read once."""

    def run(x: Tensor) -> None:
        x.zero_()
        x.copy_(torch.empty_like(x))
        x.add_(x[:1].expand(4))

    assert unfused(run, torch.empty(4, device=META)) == Traffic(0, 3, 16 + 32 + 36)


def test_batch_norm_reads_twice():
    """2 x 3 x 4 x 4 numbers of four bytes: statistics, then normalisation; backward two sums, then dx."""
    x = torch.empty(2, 3, 4, 4, device=META, requires_grad=True)

    def forward() -> Tensor:
        return torch.nn.functional.batch_norm(x, None, None, None, None, training=True)

    image, channels = 4 * x.numel(), 4 * 3
    y = forward()
    assert unfused(forward) == Traffic(0, 2, 2 * image + image + 2 * channels)
    backward = unfused(torch.autograd.grad, y, x, torch.empty_like(y))
    assert backward == Traffic(0, 2, 2 * (2 * image + 2 * channels) + image)


@pytest.mark.parametrize(
    ("arch", "phase", "size"),
    [
        ("stylegan", "D", {"resolution": 8, "batch": 16}),
        ("dcgan", "D with R1", {"resolution": 16, "batch": 32}),
    ],
)
def test_fusion_halves_the_bytes(arch: str, phase: str, size: dict[str, Any]):
    """Of all but convolutions and matrix products."""
    config = make_config(arch, device="cpu", precision="bf16", **size)
    calls = phase_calls(Engine(config, CPU), random_images(config, CPU))
    (call,) = (c for c in calls if c.phase.name == phase)
    eager, compiled = unfused(call.on_meta()), fused(call.phase.function, *call.args)
    assert 0 < compiled.products <= eager.products
    assert 2 * compiled.bytes <= eager.bytes and compiled.launches < eager.launches


def test_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(traffic, "fused", lambda *args: Traffic(1, 2, 3_000_000))
    assert traffic.main(["--arch", "dcgan", "--batch", "2", "--device", "cpu"]) == 0
    assert "D with R1" in capsys.readouterr().out
    assert traffic.main(["--arch", "dcgam"]) == 2


def test_table(monkeypatch: pytest.MonkeyPatch):
    """Only the phases that the run has."""
    monkeypatch.setattr(traffic, "fused", lambda *args: Traffic(1, 2, 3_000_000))
    lines = traffic.table(make_config("dcgan", device="cpu", precision="fp32", batch=2, r1=0.0)).splitlines()
    assert [line.split()[0] for line in lines] == ["products", "D", "G"]
    assert lines[1].split()[3] == "2" and lines[1].split()[5] == "3"
