"""Several processes, the ranks, that train one network: what they tell each other.

A run is the same on any number of ranks. Rank r of n takes every n-th row of a batch, from the r-th on: of
the data's draws, of the latents (every rank draws the whole batch's and keeps its rows), hence also whole
groups of minibatch-stddev, which are strided. After a phase one all-reduce of one flat bucket averages over
the ranks what the phase made of those rows: gradients, losses, running statistics. So whatever the engine
holds is the same everywhere, and a checkpoint of rank 0 can be resumed on any number of ranks. What only
perturbs (dropout, noise on images, augmentation, where a gradient penalty is taken) each rank draws for
itself.

Where a phase is no sum over samples (the mean path length, feature matching, BatchNorm on request), it takes
`mean_over_ranks`, a collective that is its own derivative.

Every wait ends: when a rank dies or is silent for `--dist-timeout`, the others raise `Lost`. No object is
pickled; texts and tensors are all that is sent.
"""

import hashlib
import json
import os
import re
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from fastgan.config import Config, UsageError, batch_unit, build_networks

ALIGNMENT = 4  # elements: a tensor in the bucket starts where four floats can be read at once
DEFAULT_PORT = 29500


class Lost(Exception):
    """The ranks cannot go on together. One line, for the terminal."""


class NoAnswer(Lost):
    """The other ranks are gone or silent."""


@dataclass(frozen=True)
class Launch:
    """What a launcher has told this process: which rank of how many it is, and where they meet."""

    rank: int
    size: int
    local: int  # among the ranks on this machine
    meeting: str  # an init_method of torch.distributed


def launched(env: Mapping[str, str] = os.environ) -> Launch | None:
    """Read torchrun's variables (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT), and SLURM's where
    those are missing; None for a single process. UsageError for a set that is incomplete or makes no sense.
    """
    torchs, slurms = ("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
    names = torchs if "WORLD_SIZE" in env else slurms
    if env.get(names[1], "1") == "1":
        return None
    missing = [name for name in names if name not in env]
    if missing:
        raise UsageError(
            f"{names[1]} is {env[names[1]]}, but {missing[0]} is not set; start by torchrun or srun"
        )
    try:
        rank, size, local = (int(env[name]) for name in names)
    except ValueError:
        raise UsageError(f"{', '.join(names)} must be whole numbers: got {[env[n] for n in names]}") from None
    if not 0 <= rank < size or local < 0:
        raise UsageError(f"{names[0]} must be below {names[1]}: got {rank} of {size}, local {local}")
    if "MASTER_ADDR" in env and "MASTER_PORT" in env:
        # Not spelled out: under torchrun this also finds the store that its agent keeps between restarts.
        return Launch(rank, size, local, "env://")
    if names == torchs:
        raise UsageError(
            f"WORLD_SIZE is {size}, but MASTER_ADDR and MASTER_PORT are not set; start by torchrun"
        )
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_NODELIST", "")
    host = env.get("MASTER_ADDR") or first_host(nodes)
    # A port of its own for each job, so that two of them can share a machine.
    port = env.get("MASTER_PORT") or 10000 + int(env.get("SLURM_JOB_ID", DEFAULT_PORT - 10000)) % 50000
    return Launch(rank, size, local, f"tcp://{host}:{port}")


def first_host(nodes: str) -> str:
    """The first name of SLURM's list: gpu03 of gpu[03-07,12],cpu1; this machine where the list is empty."""
    match = re.match(r"([^,\[]+)(?:\[(\d+))?", nodes)
    return (match[1] + (match[2] or "")) if match else "127.0.0.1"


def own_device(device: torch.device, launch: Launch) -> torch.device:
    """The GPU of this rank, made the current one; a CPU as it is."""
    if device.type != "cuda":
        return device
    if device.index is not None:
        raise UsageError(f"--device {device}: {launch.size} ranks need a GPU each; use --device cuda")
    count = torch.cuda.device_count()
    if launch.local >= count > 1:
        raise UsageError(
            f"rank {launch.rank} is number {launch.local} on its machine, which has {count} GPUs; "
            f"start at most {count} ranks there"
        )
    own = torch.device("cuda", launch.local if count > 1 else 0)  # SLURM may show a task its own GPU alone
    torch.cuda.set_device(own)
    return own


def check_shares(config: Config, size: int) -> None:
    """UsageError where a batch cannot be shared out so that every rank's part is like every other's.

    Each rank works through whole groups of minibatch-stddev, and a whole number of path lengths.
    """
    unit = size * batch_unit(config)
    if config.batch % unit:
        below = config.batch // unit * unit
        raise UsageError(
            f"--batch {config.batch} is the total of {size} ranks and cannot be shared out by them; "
            f"use {f'{below} or {below + unit}' if below else unit}, or another number of ranks"
        )
    if size > 1 and config.part == size and not config.sync_batchnorm:
        with torch.device("meta"):
            networks = build_networks(config)
        if any(isinstance(m, torch.nn.BatchNorm1d) for net in networks for m in net.modules()):
            raise UsageError(
                f"--batch {config.batch} leaves each of {size} ranks one image, of which BatchNorm can take "
                f"no statistics; use {2 * unit} or more, or --sync-batchnorm"
            )


@torch.library.custom_op("fastgan::mean_over_ranks", mutates_args=())
def _mean_over_ranks(x: Tensor, size: int) -> Tensor:
    y = x.clone(memory_format=torch.contiguous_format)
    with _contact("within a phase"):
        dist.all_reduce(y)
    return y.div_(size)


@_mean_over_ranks.register_fake
def _(x, size):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _keep_size(ctx, inputs, output):
    ctx.size = inputs[1]


# y_r = sum_s x_s / n is symmetric in the ranks, so it is its own adjoint, and that one's: with the ranks'
# gradients averaged, dL/dx_s of L = sum_r L_r / n comes out right to any order.
_mean_over_ranks.register_autograd(
    lambda ctx, dy: (_mean_over_ranks(dy, ctx.size), None), setup_context=_keep_size
)


@contextmanager
def _contact(where: str) -> Iterator[None]:
    """Around collectives alone: what they raise is that others are gone or silent."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        reason = re.sub(r"^\[[^\]]*\]\s*", "", reason)  # gloo's source line
        raise NoAnswer(f"lost the other ranks {where}: {reason}") from error


class Ranks:
    """The ranks of a run as one of them sees them. Without a launcher there is one, and nothing is sent."""

    def __init__(self, rank: int = 0, size: int = 1, local: int = 0):
        self.rank, self.size, self.local = rank, size, local
        self._asked: tuple[Tensor, Any] | None = None  # see `most`

    def __deepcopy__(self, memo: dict) -> "Ranks":
        return self  # networks that are copied stay with their ranks

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes, draws pictures and talks."""
        return self.rank == 0

    def rows(self, batch: Tensor) -> Tensor:
        """This rank's rows of a whole batch [n * share, ...]: [share, ...]."""
        return batch if self.size == 1 else batch[self.rank :: self.size].contiguous()

    def mean(self, x: Tensor) -> Tensor:
        """The mean of the ranks' x, differentiable any number of times."""
        return x if self.size == 1 else _mean_over_ranks(x, self.size)

    def batch_mean(self, x: Tensor) -> Tensor:
        """The mean over the whole batch of which this rank has x [share, ...]."""
        return self.mean(x.mean(dim=0))

    def average(self, tensors: Sequence[Tensor], forms: Sequence[Tensor]) -> list[Tensor]:
        """Means over the ranks, laid out in memory as `forms`: views of one bucket, reduced at once."""
        starts, end = [], 0
        for form in forms:
            starts.append(end)
            end += -(-form.numel() // ALIGNMENT) * ALIGNMENT
        bucket = forms[0].new_zeros(end)
        slots = [
            bucket[start : start + form.numel()].as_strided(form.shape, form.stride())
            for start, form in zip(starts, forms, strict=True)
        ]
        torch.ops.aten._foreach_copy_(slots, list(tensors))
        with _contact("behind a phase"):
            dist.all_reduce(bucket)
        bucket.div_(self.size)
        return slots

    def most(self, number: int) -> int:
        """The largest `number` that any rank passed to the call before this one; 0 at the first call.

        So ranks agree on every step whether one of them has been asked to stop, and none waits: the answer
        has travelled during the step in between. One rank alone is answered at once.
        """
        if self.size == 1:
            return number
        largest = self._answer()
        told = torch.tensor([number])
        with _contact("at the end of a step"):
            self._asked = told, dist.all_reduce(told, dist.ReduceOp.MAX, async_op=True)
        return largest

    def _answer(self) -> int:
        if self._asked is None:
            return 0
        (told, work), self._asked = self._asked, None
        with _contact("at the end of a step"):
            work.wait()
        return int(told)

    def texts(self, text: str, where: str) -> list[str]:
        """What every rank says, in the ranks' order."""
        if self.size == 1:
            return [text]
        mine = torch.frombuffer(bytearray(text.encode() or b"\0"), dtype=torch.uint8)
        with _contact(where):
            lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
            dist.all_gather(lengths, torch.tensor([len(mine)]))
            room = int(torch.cat(lengths).max())
            said = [torch.zeros(room, dtype=torch.uint8) for _ in range(self.size)]
            dist.all_gather(said, torch.cat([mine, mine.new_zeros(room - len(mine))]))
        return [s.numpy().tobytes().rstrip(b"\0").decode() for s in said]

    @contextmanager
    def errors_shared(self, doing: str) -> Iterator[None]:
        """Ranks leave this together, and with an error where one of them has met one."""
        error: Exception | None = None
        try:
            yield
        except Exception as own:
            if isinstance(own, Lost) or self.size == 1:
                raise
            error = own
        said = self.texts("" if error is None else f"{error or type(error).__name__}", doing)
        if error is not None:
            raise error
        for rank, message in enumerate(said):
            if message:
                raise UsageError(f"rank {rank}: {message}")

    def require_same(self, what: dict[str, Any]) -> None:
        """UsageError that names the first entry of `what` in which a rank differs from the first."""
        said = [json.loads(text) for text in self.texts(json.dumps(what), "while comparing options")]
        for rank, other in enumerate(said):
            for name, value in said[0].items():
                if other.get(name) != value:
                    raise UsageError(
                        f"rank {rank} differs from rank 0 in {name}: {other.get(name)}, not {value}; "
                        "start all of them with the same options, data and versions"
                    )

    def broadcast(self, saved: tuple[dict[str, Tensor], int] | None) -> tuple[dict[str, Tensor], int] | None:
        """The first rank's (tensors on the CPU, images) on all of them, which need not see its disk."""
        if self.size == 1:
            return saved
        said = None
        if self.first and saved:
            shapes = {k: [str(t.dtype).removeprefix("torch."), list(t.shape)] for k, t in saved[0].items()}
            said = {"images": saved[1], "tensors": shapes}
        header = json.loads(self.texts(json.dumps(said), "while loading a checkpoint")[0])
        if header is None:
            return None
        state = {}
        for name, (dtype, shape) in header["tensors"].items():
            mine = saved[0][name].contiguous() if self.first and saved else None
            state[name] = torch.empty(shape, dtype=getattr(torch, dtype)) if mine is None else mine
            with _contact("while loading a checkpoint"):
                dist.broadcast(state[name], 0)
        return state, header["images"]

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The ranks' tensors at the first rank, in their order; nothing at the others."""
        there = [torch.empty_like(tensor) for _ in range(self.size)] if self.first else []
        with _contact("while saving a checkpoint"):
            dist.gather(tensor, there if self.first else None)
        return there

    def verify(self, state: dict[str, Tensor], images: int) -> None:
        """Lost where a rank holds other bits than the first: from there on they would train apart."""
        if self.size == 1:
            return
        hashes = json.dumps({name: fingerprint(tensor) for name, tensor in state.items()})
        said = [json.loads(text) for text in self.texts(hashes, "while comparing weights")]
        for rank, other in enumerate(said):
            strange = [name for name, value in said[0].items() if other.get(name) != value]
            if strange:
                more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
                raise Lost(
                    f"the ranks have drifted apart by {images / 1000:.1f} kimg: rank {rank} differs from "
                    f"rank 0 in {strange[0]}{more}; nothing was saved"
                )


ALONE = Ranks()


def fingerprint(tensor: Tensor) -> str:
    """A hash of the tensor's bits, in whatever memory order and on whatever device it lies."""
    bits = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.blake2b(bits.data, digest_size=8).hexdigest()


def fresh_part(store: Store, launch: Launch, timeout: float) -> Store:
    """A part of `store` that holds nothing of earlier starts.

    torchrun's agent keeps one store over its restarts, and in it the addresses of ranks that are dead
    (pytorch/pytorch#135712); its count of restarts is not the same on all nodes. So rank 0 names each start
    and answers the token that another rank has just drawn, until all have taken the name.
    """
    name = secrets.token_hex(8)
    if launch.rank:
        store.set(f"fastgan/token/{launch.rank}", name)
        name = store.get(f"fastgan/name/{name}").decode()
        store.set(f"fastgan/taken/{name}/{launch.rank}", "")
        return PrefixStore(name, store)
    missing = list(range(1, launch.size))
    end = time.monotonic() + timeout
    while missing:
        for rank in missing:
            if store.check([token := f"fastgan/token/{rank}"]):
                store.set(f"fastgan/name/{store.get(token).decode()}", name)
        missing = [rank for rank in missing if not store.check([f"fastgan/taken/{name}/{rank}"])]
        if time.monotonic() > end:
            raise RuntimeError(f"rank {missing[0]} did not come")
        time.sleep(0.02)
    return PrefixStore(name, store)


@contextmanager
def joined(launch: Launch | None, device: torch.device, timeout: float) -> Iterator[Ranks]:
    """The ranks, after all of them have come; `Lost` if they do not within `timeout` seconds, or go later."""
    if launch is None:
        yield ALONE
        return
    ranks = Ranks(launch.rank, launch.size, launch.local)
    try:
        with _contact(f"at the start, of which there are to be {launch.size}"):
            limit = timedelta(seconds=timeout)
            store, _, _ = next(rendezvous(launch.meeting, launch.rank, launch.size, timeout=limit))
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                store=fresh_part(store, launch, timeout),
                rank=launch.rank,
                world_size=launch.size,
                timeout=limit,
            )
        yield ranks
        ranks._answer()
        dist.destroy_process_group()  # not after an error: NCCL would wait for those who are gone
    except NoAnswer as error:
        raise NoAnswer(
            f"rank {launch.rank} of {launch.size} {error}. A rank has ended or was silent for more than "
            f"--dist-timeout {timeout:g} s; the same command goes on from the last checkpoint"
        ) from error
