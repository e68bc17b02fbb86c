"""What one of several ranks does for test_distributed.py: `python rank_cases.py FOLDER`, with torchrun's
variables set. Every case runs on all ranks; each rank writes what came out to FOLDER/RANK.json.

In float64, so that a batch shared out must give the parameters of the whole one but for roundings.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from family_cases import CPU, tiny_config
from torch import Tensor

from fastgan.compiled import compile_phase
from fastgan.config import Config, UsageError
from fastgan.distributed import ALONE, Lost, Ranks, joined, launched
from fastgan.engine import Engine
from fastgan.layers import normalize, synchronize_batch_norms
from fastgan.losses import leaf

TIMEOUT = 100.0
SYNCED = {"sync_batchnorm": True, "dropout": 0.0, "instance_noise": 0.0}
# Families and objectives without random numbers inside a phase, and options that bring out what could differ.
EQUAL: dict[str, tuple[str, dict[str, Any]]] = {
    "lazy penalties and groups": ("stylegan", {"mbstd_group": 4}),
    "parts of a batch": ("stylegan", {"mbstd_group": 2, "accumulate": 2, "feature_matching": 1.0}),
    "growth": ("progan", {"gradient_penalty": 0.0, "r1": 1.0, "r1_every": 1}),
    "images from images": ("cyclegan", {"pool": 0}),
    "clipping and BatchNorm": ("wgan", {**SYNCED, "clip": 0.01}),
    "R1 through BatchNorm": ("dcgan", {**SYNCED, "r1": 1.0, "r1_every": 1}),
    "pairs of logits": ("r3gan", {"r2": 0.5}),
    "labels and singular vectors": ("biggan", {"sync_batchnorm": True}),
}
QUICK = tuple(EQUAL)[:6]
STEPS = 3


def exact(config: Config, ranks: Ranks) -> Engine:
    engine = Engine(config, CPU, ranks)
    for net in (engine.G, engine.D, engine.ema):
        net.double()
        for module in net.modules():
            if isinstance(getattr(module, "dtype", None), torch.dtype):
                module.dtype = torch.float64
    return engine


def train(engine: Engine, steps: int = STEPS) -> Engine:
    """`steps` on images and labels that depend on the images seen alone."""
    c, ranks = engine.config, engine.ranks
    shape = (c.step_images, c.domains * c.channels, c.resolution, c.resolution)
    for _ in range(steps):
        generator = torch.Generator().manual_seed(engine.images)
        real = torch.rand(shape, generator=generator) * 2 - 1
        labels = torch.randint(c.c_dim, shape[:1], generator=generator) if c.cond else None
        engine.step(ranks.rows(real), None if labels is None else ranks.rows(labels))
    return engine


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    return max(float((a[k].double() - b[k].double()).abs().max()) for k in a if a[k].numel())


def equal(ranks: Ranks, name: str) -> dict[str, float]:
    """How far the ranks' run is from one process', how far when that resumes it, and how far it came."""
    arch, options = EQUAL[name]
    config = tiny_config(arch, batch=16, **options)
    shared = train(exact(config, ranks))
    ranks.verify(shared.shared_state(), shared.images)
    saved = {k: t.clone() for k, t in shared.state().items()}
    train(shared, 1)
    if not ranks.first:
        return {}
    alone = exact(config, ALONE)
    began = {k: t.clone() for k, t in alone.state().items()}
    apart = difference(saved, train(alone).state())
    moved = max(float((saved[k] - began[k]).abs().max()) for k in began)
    resumed = exact(config, ALONE)
    resumed.load_state(saved, alone.images)
    return {
        "apart": apart,
        "resumed": difference(shared.state(), train(resumed, 1).state()),
        "moved": moved,
    }


def perturbations_differ(ranks: Ranks) -> list[float]:
    """What the ranks draw within a phase, and the latents they are given."""
    engine = exact(tiny_config("dcgan", batch=8), ranks)
    engine._seed_step()
    latents = engine.latents(4).normal[:, 0].tolist()
    return [float(torch.rand([])), *latents]


def resume_with_a_pool(ranks: Ranks) -> dict[str, Any]:
    """A run whose ranks have pools of their own, and dropout: stopped, handed over and resumed."""
    config = tiny_config("cyclegan", batch=4, pool=3)
    engine = train(exact(config, ranks))
    state = {k: t.clone() for k, t in engine.whole_state().items()}
    said = ranks.broadcast((state, engine.images) if ranks.first else None)
    assert said is not None
    resumed = exact(config, ranks)
    resumed.load_state(*said)
    states = [train(e, 2).whole_state() for e in (engine, resumed)]
    fresh = exact(config, ranks)  # of a checkpoint that knows rank 0 alone
    fresh.load_state({k: t for k, t in said[0].items() if not k.startswith("rank")}, said[1])
    return {
        "apart": difference(*states),
        "own": float(states[0]["D.pool.images"].sum()),
        "of_others": sorted(k for k in states[0] if k.startswith("rank")),
        "empty": int(fresh.state()["D.pool.filled"]),
    }


def adaptive(ranks: Ranks) -> list[float]:
    """Augmentation's strength: it follows the sign on all ranks' reals."""
    engine = exact(tiny_config("cgan", batch=8, ada=0.5), ranks)
    assert engine.strength is not None
    engine.strength.fill_(0.5)
    train(engine, 4)
    ranks.verify(engine.shared_state(), engine.images)
    return [float(engine.strength)]


def unsynchronized(ranks: Ranks) -> float:
    """BatchNorm's running statistics without synchronised ones: the ranks' mean, the same everywhere."""
    engine = train(exact(tiny_config("dcgan", batch=8), ranks))
    ranks.verify(engine.shared_state(), engine.images)
    return max(float(t.abs().max()) for k, t in engine.state().items() if k.endswith("running_mean"))


def drift(ranks: Ranks) -> None:
    engine = exact(tiny_config("stylegan"), ranks)
    if ranks.rank == ranks.size - 1:
        next(engine.D.parameters()).data.flatten()[0].add_(1e-6)
    ranks.verify(engine.shared_state(), 5000)


def one_error(ranks: Ranks) -> None:
    with ranks.errors_shared("while testing"):
        if ranks.rank == 1:
            raise UsageError("no images here")


def other_options(ranks: Ranks) -> None:
    ranks.require_same({"a": 1, "seed": min(ranks.rank, 1)})


def asked(ranks: Ranks) -> list[int]:
    """Rank 1 is asked to stop at its third step."""
    return [ranks.most(15 if ranks.rank == 1 and step >= 2 else 0) for step in range(5)]


def other_layout(ranks: Ranks) -> list[float]:
    """Averages of tensors in another memory order than the parameters'."""
    form = torch.zeros(3, 2, 2, 2).contiguous(memory_format=torch.channels_last)
    mine = torch.arange(24.0).view(3, 2, 2, 2) * (ranks.rank + 1)
    mean, scalar = ranks.average([mine, torch.tensor(float(ranks.rank))], [form, torch.zeros([])])
    assert mean.stride() == form.stride()
    return [
        float((mean - torch.arange(24.0).view(3, 2, 2, 2) * (ranks.size + 1) / 2).abs().max()),
        float(scalar),
    ]


def second_order(ranks: Ranks, compile: bool = False) -> float:
    """d/dw of |d/dx sum BN(w x)^3|^2 through synchronised statistics, against the whole batch in one."""

    def penalty(x: Tensor, norm: torch.nn.Module, w: Tensor) -> Tensor:
        x = leaf(x)
        y = normalize(x * w, norm)
        (grad,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        loss = grad.square().flatten(1).sum(1).mean()
        return torch.autograd.grad(loss, w)[0]

    x = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    w = torch.tensor(0.7, requires_grad=True)
    whole, shared = torch.nn.BatchNorm2d(3), torch.nn.BatchNorm2d(3)
    synchronize_batch_norms([shared], ranks.mean, ranks.size)
    run = compile_phase(penalty, CPU) if compile else penalty
    (mine,) = ranks.average([run(ranks.rows(x), shared, w)], [w])
    apart = (mine - penalty(x, whole, w)).abs() / mine.abs()
    pairs = zip(shared.buffers(), whole.buffers(), strict=True)
    return float(torch.stack([apart, *((a - b).abs().max() for a, b in pairs)]).max())


CASES: dict[str, Callable[[Ranks], Any]] = {
    **{name: lambda ranks, name=name: equal(ranks, name) for name in EQUAL},
    **{
        f.__name__: f
        for f in (
            *(perturbations_differ, resume_with_a_pool, adaptive, unsynchronized, drift, one_error),
            *(other_options, asked, other_layout, second_order),
        )
    },
    "compiled": lambda ranks: second_order(ranks, compile=True),
}


def main() -> None:
    launch = launched()
    assert launch is not None
    torch.set_default_dtype(torch.float64)
    said: dict[str, Any] = {"launch": dataclasses.asdict(launch), "seconds": {}}
    with joined(launch, CPU, TIMEOUT) as ranks:
        for name in sys.argv[2:]:
            began = time.perf_counter()
            try:
                said[name] = CASES[name](ranks)
            except (Lost, UsageError) as error:
                said[name] = f"{type(error).__name__}: {error}"
            said["seconds"][name] = time.perf_counter() - began
    Path(sys.argv[1], f"{launch.rank}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main()
