"""Numbers made by public codebases (golden/index.json explains them), as test parameters."""

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"


@functools.cache
def _index() -> dict:
    return {f["family"]: f for f in json.loads((GOLDEN / "index.json").read_text())["families"]}


@functools.cache
def _arrays(file: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / file, allow_pickle=False) as arrays:
        return dict(arrays)


@dataclass(frozen=True)
class Case:
    family: str
    spec: dict

    @property
    def args(self) -> dict:
        return self.spec["args"]

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.spec["compute_dtype"])

    def tensor(self, name: str) -> Tensor:
        """The tensor called `name` ("in.x", "out.y", "g.x", ...), floating ones in the case's dtype."""
        entry = self.spec["tensors"][name]
        key = entry[2] if len(entry) == 3 else f"{self.spec['name']}/{name}"
        value = torch.from_numpy(_arrays(_index()[self.family]["file"])[key].copy())
        stays = not value.is_floating_point() or name in ("in.f", "in.fu", "in.fd")  # FIR filters are float32
        return value if stays else value.to(self.dtype)

    def group(self, prefix: str) -> dict[str, Tensor]:
        """All tensors whose name starts with `prefix`, by the rest of their name."""
        return {k[len(prefix) :]: self.tensor(k) for k in self.spec["tensors"] if k.startswith(prefix)}

    def check(self, name: str, value: Tensor, tol: float | None = None, floor: float = 0.0) -> None:
        """max |value - golden| <= tol * max(max |golden|, floor), by default the case's own tolerance."""
        expected = self.tensor(name)
        tol = tol or self.spec["tol"] or (1e-9 if self.dtype == torch.float64 else 2e-5)
        stored = self.spec["tensors"][name][1]
        if stored == "float32":  # computed in float64, rounded for storage
            tol = max(tol, 2e-7)
        assert value.shape == expected.shape, (
            f"{name}: shape {list(value.shape)}, golden {list(expected.shape)}"
        )
        error = (value.detach().double() - expected.double()).abs().max().item() if expected.numel() else 0.0
        scale = expected.double().abs().max().item() if expected.numel() else 0.0
        assert error <= tol * max(scale, floor, 1e-12), (
            f"{name}: error {error:.3g} over scale {scale:.3g}, tol {tol:.1g}"
        )

    def check_derivatives(self, y: Tensor, inputs: dict[str, Tensor]) -> None:
        """Compare y, its gradient for the cotangent r, and the gradient of ||gradient||^2 (r included)."""
        self.check("out.y", y)
        r = self.tensor("r").requires_grad_()
        differentiable = {k: inputs[k] for k in self.spec["differentiable"]}
        # A bias in front of an instance norm has no part in y, here; in the peer's network it cancels.
        grads = torch.autograd.grad(
            *((y * r).sum(), list(differentiable.values())),
            create_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        # What cancels to almost nothing holds the peer's rounding errors alone.
        floor = 1e-3 * max(float(self.tensor(f"g.{k}").abs().max()) for k in differentiable)
        for name, grad in zip(differentiable, grads, strict=True):
            self.check(f"g.{name}", grad, floor=floor)
        by_name = dict(zip(differentiable, grads, strict=True))
        for source in self.spec["second_order"]:
            p = by_name[source].square().sum()
            self.check(f"p.{source}", p)
            names = [k for k in self.spec["tensors"] if k.startswith(f"d2.{source}.")]
            wrt = [r if k.endswith(".r") else inputs[k.removeprefix(f"d2.{source}.")] for k in names]
            seconds = torch.autograd.grad(
                p, wrt, allow_unused=True, retain_graph=True, materialize_grads=True
            )
            floor = 1e-3 * max(float(self.tensor(k).abs().max()) for k in names)
            for name, second in zip(names, seconds, strict=True):
                self.check(name, second, floor=floor)


def golden(family: str, *ops: str, **args: object):
    """Parametrize a test over the cases of a family, or those of its `ops` that were made with `args`."""
    cases = [Case(family, c) for c in _index()[family]["cases"] if not ops or c["op"] in ops]
    cases = [c for c in cases if args.items() <= c.args.items()]
    assert cases, f"no golden cases of {family} {ops}"
    return pytest.mark.parametrize("case", cases, ids=[c.spec["name"] for c in cases])
