"""Networks, optimizers and one training step.

All state is tensors plus the count of images seen; every random number of a step derives from (seed, images
seen), so that a run stopped after any step and resumed is the run that was never stopped, bit for bit.
"""

import copy
import ctypes
import os
from functools import partial

import numpy as np
import torch
from torch import Tensor

from fastgan.compiled import CudaCapture, Phase, Recordings
from fastgan.config import Config, build_networks
from fastgan.step import PhaseResult, d_phase, g_path_phase, g_phase

BATCH_NORM_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
SETTLING_BATCHES, SETTLING_BATCH = 16, 64


class Engine:
    """A run's networks in training: `step` updates them, `state` is all of them, as tensors."""

    def __init__(self, config: Config, device: torch.device):
        self.config, self.device = config, device
        self.images = 0
        torch.manual_seed(_seed(config.seed, "init"))
        self.G, self.D = build_networks(config)
        place(self.G, device)
        place(self.D, device)
        self.ema = copy.deepcopy(self.G).eval().requires_grad_(False)
        self.g_optimizer = _adam(self.G, number(config.g_lr, device), config)
        self.d_optimizer = _adam(self.D, number(config.d_lr, device), config)
        self.ema_rate = number(0.0, device)
        self.pl_mean = torch.zeros([], device=device)
        self.losses: dict[str, Tensor] = {}  # since the last tick: name -> [sum, count]

        set_precision(config, device)
        keep_freed_memory(device)
        graphs = config.cuda_graphs and device.type == "cuda"
        phase = partial(
            Phase,
            device=device,
            compile=config.compile,
            recordings=Recordings(CudaCapture(device)) if graphs else None,
        )
        c = config
        self.d = phase("D", partial(d_phase, loss=c.loss))
        self.d_r1 = phase(
            "D with R1", partial(d_phase, loss=c.loss, r1_weight=c.r1 / 2 * c.r1_every), every=c.r1_every
        )
        self.g = phase("G", partial(g_phase, loss=c.loss))
        self.g_path = phase(
            "G with path length",
            partial(g_path_phase, loss=c.loss, pl_weight=c.pl * c.pl_every, pl_decay=c.pl_decay),
            every=c.pl_every,
        )

    def step(self, real: Tensor) -> None:
        """One update of D, one of G, one of the moving average: real uint8 [batch, C, R, R]."""
        c, G, D = self.config, self.G, self.D
        step = self.images // c.batch
        torch.manual_seed(_seed(c.seed, "step", self.images))

        d = self.d_r1 if c.r1 > 0 and step % c.r1_every == 0 else self.d
        self._update(D, self.d_optimizer, d(step, G, D, real, *self.latents(c.batch)))

        latents = self.latents(c.batch)
        if c.pl > 0 and step % c.pl_every == 0:
            count = c.batch // c.pl_batch_shrink
            noise = torch.randn(count, *real.shape[1:], device=self.device)
            result, pl_mean = self.g_path(step, G, D, *latents, *self.latents(count), noise, self.pl_mean)
            self.pl_mean.copy_(pl_mean)  # a phase's results last until the next phase (compiled.py)
        else:
            result = self.g(step, G, D, *latents)
        self._update(G, self.g_optimizer, result)

        self.images += c.batch
        self._average()

    def latents(self, count: int) -> tuple[Tensor, Tensor]:
        """The random numbers of `count` samples: normal [count, G.normals], uniform [count, G.uniforms]."""
        return (
            torch.randn(count, self.G.normals, device=self.device),
            torch.rand(count, self.G.uniforms, device=self.device),
        )

    def _update(self, net: torch.nn.Module, optimizer: torch.optim.Optimizer, result: PhaseResult) -> None:
        for parameter, grad in zip(net.parameters(), result.grads, strict=True):
            parameter.grad = grad
        optimizer.step()
        net.zero_grad(set_to_none=True)  # not held while the other network's phase runs
        for name, value in result.losses.items():
            if name not in self.losses:
                self.losses[name] = torch.zeros(2, device=self.device, dtype=torch.float64)
            self.losses[name] += torch.stack([value, torch.ones_like(value)])

    @torch.no_grad()
    def _average(self) -> None:
        """EMA of the generator: half-life ema_kimg, at most ema_rampup of the images seen (Karras 2020)."""
        half_life = self.config.ema_kimg * 1000
        if self.config.ema_rampup > 0:
            half_life = min(half_life, self.images * self.config.ema_rampup)
        rate = 1 - 0.5 ** (self.config.batch / max(half_life, 1e-8))
        if isinstance(self.ema_rate, Tensor):
            self.ema_rate.fill_(rate)  # a launch: the host waits for nothing
        else:
            self.ema_rate = rate
        mine, theirs = _state(self.ema), _state(self.G)
        names = [k for k in mine if not k.endswith(BATCH_NORM_STATISTICS)]
        blend([mine[k] for k in names], [theirs[k] for k in names], self.ema_rate)

    @torch.no_grad()
    def settle(self) -> None:
        """Give the moving average BatchNorm statistics of its own (standing statistics, Brock et al. 2018).

        Averaged weights have activations of another scale than the weights that they average, so G's running
        statistics do not fit them. A function of the weights alone; call it before `ema` is used or saved.
        """
        norms = [m for m in self.ema.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
        if not norms:
            return
        for norm in norms:
            norm.reset_running_stats()
        generator = torch.Generator().manual_seed(_seed(self.config.seed, "settle"))
        self.ema.train()
        for i in range(SETTLING_BATCHES):
            for norm in norms:
                norm.momentum = 1 / (i + 1)  # the mean over all batches
            self.ema(torch.randn(SETTLING_BATCH, self.config.z_dim, generator=generator).to(self.device))
        self.ema.eval()

    def take_losses(self) -> dict[str, float]:
        """Means since the last call."""
        means = {name: (pair[0] / pair[1]).item() for name, pair in self.losses.items()}
        self.losses.clear()
        return means

    def state(self) -> dict[str, Tensor]:
        """Everything but `images`, by name; the tensors are the engine's own."""
        state = {"pl_mean": self.pl_mean}
        for prefix, net in (("G", self.G), ("D", self.D), ("ema", self.ema)):
            state |= {f"{prefix}.{name}": tensor for name, tensor in _state(net).items()}
        for prefix, net, optimizer in (
            ("g_optimizer", self.G, self.g_optimizer),
            ("d_optimizer", self.D, self.d_optimizer),
        ):
            for name, parameter in net.named_parameters():
                for key, value in optimizer.state[parameter].items():
                    state[f"{prefix}.{name}.{key}"] = value
        return state | {f"losses.{name}": pair for name, pair in self.losses.items()}

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor], images: int) -> None:
        """Take over `state` as saved after `images` images. KeyError for a tensor that is missing."""
        self.images = images
        self.pl_mean = state["pl_mean"].to(self.device)
        for prefix, net in (("G", self.G), ("D", self.D), ("ema", self.ema)):
            for name, tensor in _state(net).items():
                tensor.copy_(state[f"{prefix}.{name}"])
        for prefix, net, optimizer in (
            ("g_optimizer", self.G, self.g_optimizer),
            ("d_optimizer", self.D, self.d_optimizer),
        ):
            for name, parameter in net.named_parameters():
                moments = {
                    key: torch.zeros_like(parameter).copy_(state[f"{prefix}.{name}.{key}"])
                    for key in ("exp_avg", "exp_avg_sq")
                }
                step = state[f"{prefix}.{name}.step"].to(self.device)
                optimizer.state[parameter] = {"step": step, **moments}
        self.losses = {
            name.removeprefix("losses."): tensor.to(self.device)
            for name, tensor in state.items()
            if name.startswith("losses.")
        }


def set_precision(config: Config, device: torch.device) -> None:
    """What CUDA's libraries may do on their own: TF32, 10 bits of mantissa, and trying out convolutions.

    With --precision bf16 what is left in fp32 (mapping network, D's last layers) runs as TF32, still more
    precise than its surroundings; with fp32 it is fp32. Shapes never change, so cuDNN times its algorithms
    once for each convolution; a resumed run may find another one the fastest, and differ by roundings.
    """
    if device.type == "cuda":
        tf32 = config.precision != "fp32"
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        torch.backends.cudnn.benchmark = True


def keep_freed_memory(device: torch.device) -> None:
    """On a CPU, let glibc keep what is freed for the next step; without glibc, and on CUDA, nothing.

    It maps every block over 32 MiB anew, gives it back when freed, and each step pays a page fault for each
    page again: D and G at 128 pixels, batch 16, took 1.4 times as long.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if device.type == "cpu" and mallopt:
        m_trim_threshold, m_mmap_threshold, most = -1, -3, 2**31 - 1  # malloc.h
        mallopt(m_mmap_threshold, most)
        mallopt(m_trim_threshold, most)


def place(net: torch.nn.Module, device: torch.device) -> None:
    """Move `net` to `device`, its weights channels_last."""
    net.to(device)
    for p in net.parameters():
        if p.ndim == 4:
            p.data = p.data.contiguous(memory_format=torch.channels_last)


def number(value: float, device: torch.device) -> float | Tensor:
    """`value` where an update reads it: on CUDA a scalar tensor, for a capture of the update to read anew.

    Elsewhere nothing is captured, and the float keeps the digits that a float32 tensor would lose.
    """
    return torch.tensor(value, device=device) if device.type == "cuda" else value


@torch.no_grad()
def blend(mine: list[Tensor], theirs: list[Tensor], rate: float | Tensor) -> None:
    """mine += rate * (theirs - mine), in place."""
    if isinstance(rate, Tensor):  # lerp takes no tensor for many tensors in one launch
        steps = torch.ops.aten._foreach_sub.List(theirs, mine)
        torch.ops.aten._foreach_mul_.Tensor(steps, rate)
        torch.ops.aten._foreach_add_.List(mine, steps)
    else:
        torch.ops.aten._foreach_lerp_.Scalar(mine, theirs, rate)


def _state(net: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in net.state_dict().items()}


def _adam(net: torch.nn.Module, lr: float | Tensor, config: Config) -> torch.optim.Adam:
    betas = (config.beta1, config.beta2)
    return torch.optim.Adam(net.parameters(), lr, betas, fused=True, capturable=True)


def _seed(seed: int, *what: str | int) -> int:
    """A 63-bit seed of its own for every (seed, what)."""
    words = [int.from_bytes(w.encode(), "little") if isinstance(w, str) else w for w in what]
    return int(np.random.SeedSequence([seed, *words]).generate_state(1, np.uint64)[0] >> 1)
