"""What goes wrong with a run's numbers, noticed at a tick: values that are not finite, and collapse."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastgan.config import Config

RETRIES = 3  # from one checkpoint, each with another draw of noise
SPAN = 256  # updates that share a buffer of flags
NEVER = 2**62
TICKS = 5  # so many in a row and a symptom is a warning
ALIKE = 0.02  # samples' spread over the data's
CERTAIN = 0.01  # loss of D; one that cannot tell has 0.5 to 2, by --loss
# (tensors, flag, scale): tensors *= scale, flag = 1 if a value is not finite. Made for scaled gradients; flag
# and scale are fp32, whatever the tensors are.
flag_non_finite = torch.ops.aten._amp_foreach_non_finite_check_and_unscale_.default


class Watch:
    """Remembers, on the device, the first update whose gradients or losses were not all finite.

    `see` is one operator that sets a flag; nobody waits for the device before `first` is asked.
    """

    def __init__(self, device: torch.device):
        self.one = torch.ones([], device=device, dtype=torch.float32)
        self.flags = torch.zeros(SPAN, device=device, dtype=torch.float32)
        self.numbers = torch.arange(SPAN, device=device)
        self.earliest = torch.tensor(NEVER, device=device)
        self.start = self.count = 0

    def see(self, number: int, tensors: list[Tensor]) -> None:
        """`tensors` belong to update `number`; calls count up. Their values are kept."""
        if self.count == SPAN:
            self._fold()
        if self.count == 0:
            self.start = number
        flag_non_finite(tensors, self.flags[self.count], self.one)
        self.count += 1

    def first(self) -> int | None:
        """The number of that update. Waits for the device."""
        self._fold()
        earliest = int(self.earliest.item())
        return None if earliest == NEVER else earliest

    def forget(self) -> None:
        """As if nothing had been seen."""
        self.count = 0
        self.flags.zero_()
        self.earliest.fill_(NEVER)

    def _fold(self) -> None:
        found = torch.where(self.flags != 0, self.numbers + self.start, NEVER)
        torch.minimum(self.earliest, found.min(), out=self.earliest)
        self.flags.zero_()
        self.count = 0


@torch.no_grad()
def all_finite(tensors: list[Tensor]) -> bool:
    """Whether every value of floating `tensors` is finite. Waits for the device."""
    flag = torch.zeros([], device=tensors[0].device, dtype=torch.float32)
    one = torch.ones_like(flag)
    for dtype in {t.dtype for t in tensors}:
        same = [t for t in tensors if t.dtype == dtype]
        flag_non_finite(same, flag, one)
    return not flag.item()


class Trouble(NamedTuple):
    """Where the first value that is not finite was seen."""

    network: str  # G or D
    phase: str
    step: int  # counted from 0
    images: int  # seen before that step

    def __str__(self) -> str:
        return (
            f"{self.network}'s gradients or losses are not finite (phase {self.phase}, step {self.step}, "
            f"{self.images:,} images)"
        )


def diagnosis(trouble: Trouble, config: Config, retries: int, checkpoint: str | None) -> str:
    """What was tried, and what else to try."""
    again = f", also with {retries} other draws of noise from {checkpoint or 'the start'}" if retries else ""
    rates = f"--g-lr {config.g_lr:g}, --d-lr {config.d_lr:g} and {config.precision}"
    ways = ["a lower --g-lr or --d-lr"]
    if config.precision == "bf16":
        ways.append("--precision fp32")
    penalties = ("r1", "r2", "gradient_penalty", "pl", "orthogonal", "feature_matching")
    if given := [p.replace("_", "-") for p in penalties if getattr(config, p) > 0]:
        ways.append(f"a lower --{' or --'.join(given)}")
    elif config.loss != "wasserstein":
        ways.append("a penalty (--r1 1)")
    way_back = f"; or delete {checkpoint} and rerun, to go on from an earlier one" if checkpoint else ""
    return f"{trouble}{again}, with {rates}. In a new run, try {', '.join(ways)}{way_back}"


def spread(images: np.ndarray) -> float:
    """Mean over pixels of the deviation between images uint8 [N, H, W, C], in grey levels."""
    return float(images.astype(np.float32).std(axis=0).mean())


def collapse(lines: list[dict[str, Any]], loss: str) -> str | None:
    """A warning if the last lines of a log, of `TICKS` ticks, all show the same symptom."""
    last = lines[-TICKS:]
    if len(last) < TICKS:
        return None
    if all(line.get("spread", 1.0) < ALIKE for line in last):
        return (
            f"G has collapsed: for {TICKS} ticks all samples have been alike "
            f"({100 * last[-1]['spread']:.2g}% of the data's spread)"
        )
    # The Wasserstein loss is a distance, whose sign and size say nothing of this.
    if loss != "wasserstein" and all(0 <= line.get("loss_d", 1.0) < CERTAIN for line in last):
        return (
            f"D is saturated: for {TICKS} ticks it has told generated images for certain (scores "
            f"{last[-1].get('real_score', 0):.3g} and {last[-1].get('fake_score', 0):.3g}), so G learns "
            "little; try a lower --d-lr, --ada 0.6, --diffaugment or a higher --r1"
        )
    return None
