"""Networks of public implementations through python -m fastgan.convert: whole files, every golden case, and
networks of other sizes against the peers' equations; what a hostile file comes to."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_cases import GOLDEN, Case, _index
from torch import Tensor, nn

import fastgan
from fastgan import convert

CHECKPOINTS = json.loads((GOLDEN / "index.json").read_text())["checkpoints"]
WHOLE = ("dcgan", "stylegan2", "biggan", "cyclegan", "progan", "r3gan", "rosinality")


def cases(family: str) -> list[Case]:
    """Of whole networks: no losses, no synthesis network alone."""
    made = [Case(family, spec) for spec in _index()[family]["cases"]]
    return [
        case
        for case in made
        if case.spec["op"].endswith(("_G", "_D", "generator", "discriminator"))
        and "loss" not in case.spec["op"]
    ]


NETWORKS = [case for family in WHOLE for case in cases(f"{family}_nets")]


def converted(src: Path, *options: str) -> Path:
    out = src.with_suffix(".safetensors")
    assert convert.main([str(src), str(out), *options]) == 0
    return out


def is_generator(case: Case) -> bool:
    return case.spec["op"].endswith(("_G", "generator"))


def output(net: Any, case: Case) -> Tensor:
    """What `net` makes of the case's inputs, as the peer returns it."""
    args = {
        k: case.tensor(f"in.{k}")
        for k in ("z", "x", "img", "c", "labels")
        if f"in.{k}" in case.spec["tensors"]
    }
    c = args.get("labels", args.get("c"))
    x = next(args[k] for k in ("z", "x", "img") if k in args)
    if case.family == "cyclegan_nets":
        return net(x.float()).double()
    y = net(x, c) if c is not None and c.shape[-1] else net(x)
    y = y.reshape(case.tensor("out.y").shape).double()
    return y.sigmoid() if case.spec["op"] == "dcgan_D" else y


@pytest.mark.parametrize("case", NETWORKS, ids=lambda case: f"{case.family}-{case.spec['name']}")
def test_golden_networks(case: Case, tmp_path: Path):
    """Saved with torch.save, converted, loaded: the golden output, of evaluation as of training."""
    state = {k: v.float() if v.is_floating_point() else v for k, v in case.group("in.param.").items()}
    torch.save(state, tmp_path / "peer.pth")
    alpha = ["--alpha", str(case.args["alpha"])] if "alpha" in case.args else []
    path = converted(tmp_path / "peer.pth", *alpha)
    net = fastgan.load(path, "generator" if is_generator(case) else "discriminator", "cpu")
    net.train(case.args.get("train", False))
    with torch.no_grad():
        case.check("out.y", output(net, case), tol=max(case.spec["tol"] or 0, 2e-5))
