"""Networks, optimizers and one training step.

All state is tensors plus the count of images seen; every random number of a step derives from (seed, images
seen), so that a run stopped after any step and resumed is the run that was never stopped, bit for bit. On
several ranks (distributed.py) every one holds the same state; only a pool of past images is a rank's own.
"""

import copy
import ctypes
import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from fastgan.augment import ADAPT_STEPS, adapt, make_augment
from fastgan.compiled import CudaCapture, Phase, Recordings
from fastgan.config import Config, build_networks
from fastgan.distributed import ALONE, Ranks
from fastgan.health import Trouble, Watch, all_finite
from fastgan.layers import synchronize_batch_norms
from fastgan.models import family
from fastgan.step import Latents, Objective, PhaseResult, d_phase, g_path_phase, g_phase

# BatchNorm's statistics, which `settle` makes anew, and how far a growing network has grown.
NOT_AVERAGED = ("running_mean", "running_var", "num_batches_tracked", "growth")
# Buffers that hold means over what a rank has seen, or follow them: averaged over the ranks as gradients are.
STATISTICS = ("running_mean", "running_var", "w_avg", "u")
MOMENTS = {"adam": ("exp_avg", "exp_avg_sq"), "rmsprop": ("square_avg",)}
SETTLING_BATCHES, SETTLING_BATCH = 16, 64


class Engine:
    """A run's networks in training: `step` updates them, `state` is all of them, as tensors.

    `ranks` share out each batch; every rank calls the same methods in the same order.
    """

    def __init__(self, config: Config, device: torch.device, ranks: Ranks = ALONE):
        self.config, self.device, self.ranks = config, device, ranks
        self.images = 0
        self.retries = 0  # since the last checkpoint; each draws other noise
        torch.manual_seed(_seed(config.seed, "init"))
        self.G, self.D = build_networks(config)
        place(self.G, device)
        place(self.D, device)
        self.ema = copy.deepcopy(self.G).eval().requires_grad_(False)
        # What ranks must draw alike has a generator of its own: torch's gives each rank other numbers.
        self.alike = torch.Generator(device) if ranks.size > 1 else None
        if config.sync_batchnorm and ranks.size > 1:
            synchronize_batch_norms((self.G, self.D), ranks.mean, ranks.size)
        self.statistics = [
            buffer
            for net in (self.G, self.D)
            for name, buffer in net.named_buffers()
            if name.rpartition(".")[2] in STATISTICS
        ]
        self.g_optimizer = _optimizer(self.G, number(config.g_lr, device), config)
        self.d_optimizer = _optimizer(self.D, number(config.d_lr, device), config)
        self.ema_rate = number(0.0, device)
        self.pl_mean = torch.zeros([], device=device)
        self.strength = torch.zeros([], device=device) if config.ada > 0 else None  # ADA's p
        self.signs = torch.zeros([], device=device)  # of D on reals, since p last moved
        self.watch = Watch(device)
        self.losses: dict[str, Tensor] = {}  # since the last tick: name -> [sum, count]
        self.stage: int | None = None  # of a growing family
        self.announce: Callable[[str], None] = lambda message: None  # told what is being compiled
        self.compiled_seconds = 0.0  # spent on phases of earlier stages

        set_precision(config, device)
        keep_freed_memory(device)
        graphs = config.cuda_graphs and device.type == "cuda"
        self.recordings = Recordings(CudaCapture(device)) if graphs else None
        self._make_phases()
        self.grow()

    def _make_phases(self) -> None:
        c = self.config
        phase = partial(
            Phase,
            device=self.device,
            compile=c.compile,
            announce=lambda message: self.announce(message),
        )
        always = Objective(
            loss=c.loss,
            label_smoothing=c.label_smoothing,
            gradient_penalty=c.gradient_penalty,
            drift=c.drift,
            feature_matching=c.feature_matching,
            orthogonal=c.orthogonal,
            pl_decay=c.pl_decay,
            batch_mean=self.ranks.batch_mean,
            augment=make_augment(c.diffaugment, c.ada > 0, c.channels),
        )
        lazy = replace(always, r1=c.r1 / 2 * c.r1_every, r2=c.r2 / 2 * c.r1_every)
        path = replace(always, pl=c.pl * c.pl_every)
        # What the ranks tell each other within a phase is no part of a recording.
        several = self.ranks.size > 1
        d = None if several and c.sync_batchnorm else self.recordings
        g = None if several and (c.sync_batchnorm or c.feature_matching > 0) else self.recordings
        g_path = None if several else self.recordings
        self.d = phase("D", partial(d_phase, objective=always), recordings=d)
        self.d_r1 = phase("D with R1", partial(d_phase, objective=lazy), every=c.r1_every, recordings=d)
        self.g = phase("G", partial(g_phase, objective=always), recordings=g)
        self.g_path = phase(
            "G with path length", partial(g_path_phase, objective=path), every=c.pl_every, recordings=g_path
        )

    @property
    def phases(self) -> tuple[Phase, ...]:
        """All four."""
        return self.d, self.d_r1, self.g, self.g_path

    @property
    def compiling(self) -> float:
        """Seconds spent compiling so far."""
        return self.compiled_seconds + sum(phase.seconds or 0.0 for phase in self.phases)

    def step(self, real: Tensor, labels: Tensor | None = None) -> None:
        """`d_steps` updates of D, `g_steps` of G and one of the moving average.

        real uint8 [d_steps * batch, C, R, R], labels int64 [d_steps * batch] where the run is conditional; on
        several ranks the rows of them that are this rank's.
        """
        c, step = self.config, self.images // self.config.step_images
        self._seed_step()
        share = c.part // self.ranks.size
        self.grow()
        self._decay_rates()
        one_hot = self.one_hot(labels)
        parts = [
            (real[i : i + share], None if one_hot is None else one_hot[i : i + share])
            for i in range(0, len(real), share)
        ]
        for i in range(c.d_steps):
            update = step * c.d_steps + i
            phase = self._d_phase(update)
            mine = parts[i * c.accumulate : (i + 1) * c.accumulate]
            results = (phase(update, *self.d_args(*part)) for part in mine)
            self._update(self.D, self.d_optimizer, results, step * (c.d_steps + c.g_steps) + i)
            if c.clip > 0:
                _clip(self.D, c.clip)
            if self.strength is not None and (update + 1) % ADAPT_STEPS == 0:
                self.strength.copy_(
                    adapt(self.strength, self.signs / ADAPT_STEPS, c.ada, c.batch * ADAPT_STEPS)
                )
                self.signs.zero_()
        for i in range(c.g_steps):
            update = step * c.g_steps + i
            if self._g_phase(update) is self.g_path:
                results = (self._with_path(update, *part) for part in parts[-c.accumulate :])
            else:
                results = (self.g(update, *self.g_args(*part)) for part in parts[-c.accumulate :])
            number = step * (c.d_steps + c.g_steps) + c.d_steps + i
            self._update(self.G, self.g_optimizer, results, number)
        self.images += c.step_images
        self._average()

    def _d_phase(self, update: int) -> Phase:
        c = self.config
        return self.d_r1 if (c.r1 > 0 or c.r2 > 0) and update % c.r1_every == 0 else self.d

    def _g_phase(self, update: int) -> Phase:
        return self.g_path if self.config.pl > 0 and update % self.config.pl_every == 0 else self.g

    def _seed_step(self) -> None:
        c, again = self.config, [self.retries] if self.retries else []
        seed = _seed(c.seed, "step", self.images, *again)
        if self.alike is None:
            torch.manual_seed(seed)
        else:
            self.alike.manual_seed(seed)
            torch.manual_seed(_seed(c.seed, "rank", self.images, self.ranks.rank, *again))

    def d_args(self, real: Tensor, c: Tensor | None) -> tuple:
        """Arguments of D's phases, new random numbers among them: real uint8 [N, C, R, R], c [N, c_dim]."""
        return self.G, self.D, real, c, self.latents(len(real), real), self.strength

    g_args = d_args

    def path_args(self, real: Tensor, c: Tensor | None) -> tuple:
        """Arguments of the phase with path length regularization."""
        args, count = self.g_args(real, c), len(real) // self.config.pl_batch_shrink
        noise = self._drawn(torch.randn, count, *real.shape[1:])
        return *args[:-1], self.latents(count, real[:count]), noise, self.pl_mean, self.strength

    def _with_path(self, update: int, real: Tensor, c: Tensor | None) -> PhaseResult:
        result, pl_mean = self.g_path(update, *self.path_args(real, c))
        self.pl_mean.copy_(pl_mean)  # a phase's results last until the next phase (compiled.py)
        return result

    def latents(self, count: int, real: Tensor | None = None) -> Latents:
        """The random numbers and labels of `count` samples; `real` [count, C, R, R] where G translates.

        Of the whole batch's, drawn by every rank alike, the rows that are this rank's.
        """
        normal = self._drawn(torch.randn, count, self.G.normals)
        uniform = self._drawn(torch.rand, count, self.G.uniforms)
        if getattr(self.G, "translates", False):
            return Latents(normal, uniform, real)
        if not self.config.cond:
            return Latents(normal, uniform)
        labels = self._drawn(partial(torch.randint, self.config.c_dim), count)
        return Latents(normal, uniform, self.one_hot(labels))

    def _drawn(self, draw: Callable[..., Tensor], count: int, *shape: int) -> Tensor:
        whole = draw((count * self.ranks.size, *shape), device=self.device, generator=self.alike)
        return self.ranks.rows(whole)

    def one_hot(self, labels: Tensor | None) -> Tensor | None:
        """float [N, c_dim] of labels int64 [N]; None where the run is not conditional."""
        if not self.config.cond or labels is None:
            return None
        return one_hot(labels, self.config.c_dim)

    def _update(
        self,
        net: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        results: Iterable[PhaseResult],
        number: int = 0,
    ) -> None:
        """One update from the mean gradient of `results`, each to be used before the next is computed.

        `number` counts the run's updates, of both networks.
        """
        share, total, losses = 1 / self.config.accumulate, None, {}
        for result in results:
            if share == 1:
                total, losses = result.grads, result.losses
            elif total is None:
                total = list(torch.ops.aten._foreach_mul.Scalar(result.grads, share))
                losses = {name: share * value for name, value in result.losses.items()}
            else:
                torch.ops.aten._foreach_add_.List(total, result.grads, alpha=share)
                losses = {name: losses[name] + share * value for name, value in result.losses.items()}
        assert total is not None
        if self.ranks.size > 1:
            total, losses = self._over_ranks(net, total, losses)
        self._log(losses)
        for parameter, grad in zip(net.parameters(), total, strict=True):
            # Fused Adam walks memory, not indices; a gradient through a penalty may be laid out otherwise.
            same = grad.stride() == parameter.stride()
            parameter.grad = grad if same else torch.empty_like(parameter).copy_(grad)
        grads = [p.grad for p in net.parameters() if p.grad is not None]
        self.watch.see(number, [*grads, *losses.values()])
        optimizer.step()
        net.zero_grad(set_to_none=True)  # not held while the other network's phase runs

    def _over_ranks(
        self, net: torch.nn.Module, grads: list[Tensor], losses: dict[str, Tensor]
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """The means of gradients and losses over the ranks; the networks' statistics become theirs too."""
        parameters, values = list(net.parameters()), list(losses.values())
        means = self.ranks.average(
            [*grads, *values, *self.statistics], [*parameters, *values, *self.statistics]
        )
        if self.statistics:
            torch.ops.aten._foreach_copy_(self.statistics, means[-len(self.statistics) :])
        return means[: len(grads)], dict(zip(losses, means[len(grads) :], strict=False))

    def _log(self, losses: dict[str, Tensor]) -> None:
        if "real_sign" in losses:
            self.signs += losses["real_sign"]
        for name, value in losses.items():
            if name not in self.losses:
                self.losses[name] = torch.zeros(2, device=self.device, dtype=torch.float64)
            self.losses[name] += torch.stack([value, torch.ones_like(value)])

    def grow(self) -> None:
        """Take a growing family to where its schedule is. A new stage has new graphs and fresh optimizers."""
        if not hasattr(self.G, "grow"):
            return
        c = self.config
        growth = family(c.arch).schedule(self.images, c.fade_kimg, c.stable_kimg, self.G.stages)
        for net in (self.G, self.D, self.ema):
            net.grow(growth)
        if self.stage not in (None, self.G.stage):
            self.compiled_seconds = self.compiling
            self._make_phases()
            self.g_optimizer.state.clear()
            self.d_optimizer.state.clear()
        self.stage = self.G.stage

    def _decay_rates(self) -> None:
        """Learning rates fall to 0 over the last `lr_decay` of the run."""
        c = self.config
        if c.lr_decay > 0:
            factor = min(1.0, (c.images - self.images) / (c.images * c.lr_decay))
            for optimizer, rate in ((self.g_optimizer, c.g_lr), (self.d_optimizer, c.d_lr)):
                set_rate(optimizer, rate * factor)

    @torch.no_grad()
    def _average(self) -> None:
        """EMA of the generator: half-life ema_kimg, at most ema_rampup of the images seen (Karras 2020)."""
        half_life = self.config.ema_kimg * 1000
        if self.config.ema_rampup > 0:
            half_life = min(half_life, self.images * self.config.ema_rampup)
        rate = 1 - 0.5 ** (self.config.step_images / max(half_life, 1e-8))
        if isinstance(self.ema_rate, Tensor):
            self.ema_rate.fill_(rate)  # a launch: the host waits for nothing
        else:
            self.ema_rate = rate
        mine, theirs = _state(self.ema), _state(self.G)
        names = [k for k in mine if not k.endswith(NOT_AVERAGED)]
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
        c = self.config
        for norm in norms:
            norm.reset_running_stats()
        generator = torch.Generator().manual_seed(_seed(c.seed, "settle"))
        self.ema.train()
        for i in range(SETTLING_BATCHES):
            for norm in norms:
                norm.momentum = 1 / (i + 1)  # the mean over all batches
            z = torch.randn(SETTLING_BATCH, c.z_dim, generator=generator).to(self.device)
            labels = torch.arange(SETTLING_BATCH, device=self.device) % c.c_dim if c.cond else None
            self.ema(z, self.one_hot(labels))
        self.ema.eval()

    def take_losses(self) -> dict[str, float]:
        """Means since the last call."""
        means = {name: (pair[0] / pair[1]).item() for name, pair in self.losses.items()}
        self.losses.clear()
        return means

    def trouble(self) -> Trouble | None:
        """Where the first gradient or loss that is not finite was seen, since the state was loaded."""
        number, c = self.watch.first(), self.config
        if number is None:
            return None
        step, i = divmod(number, c.d_steps + c.g_steps)
        if i < c.d_steps:
            return Trouble("D", self._d_phase(step * c.d_steps + i).name, step, step * c.step_images)
        phase = self._g_phase(step * c.g_steps + i - c.d_steps)
        return Trouble("G", phase.name, step, step * c.step_images)

    def spoilt(self) -> Trouble | None:
        """The same where gradients were finite, but an update has made a weight that is not."""
        step = self.images // self.config.step_images - 1
        for name, net in (("D", self.D), ("G", self.G), ("G", self.ema)):
            if not all_finite([t for t in _state(net).values() if t.is_floating_point()]):
                return Trouble(name, "update", step, step * self.config.step_images)
        return None

    def restart(self) -> None:
        """Back to how the run began."""
        c = self.config
        torch.manual_seed(_seed(c.seed, "init"))
        for net, fresh in zip((self.G, self.D), build_networks(c), strict=True):
            net.load_state_dict(fresh.state_dict())
        self.ema.load_state_dict(self.G.state_dict())
        self.images = 0
        self.g_optimizer.state.clear()
        self.d_optimizer.state.clear()
        self.pl_mean.zero_()
        self.signs.zero_()
        if self.strength is not None:
            self.strength.zero_()
        self.losses.clear()
        self.watch.forget()
        self.grow()

    def state(self) -> dict[str, Tensor]:
        """Everything but `images`, by name; the tensors are the engine's own."""
        state = self._scalars()
        for prefix, net in (("G", self.G), ("D", self.D), ("ema", self.ema)):
            state |= {f"{prefix}.{name}": tensor for name, tensor in _state(net).items()}
        for prefix, net, optimizer in self._optimizers():
            for name, parameter in net.named_parameters():
                for key, value in optimizer.state[parameter].items():
                    state[f"{prefix}.{name}.{key}"] = value
        state["retries"] = torch.tensor(self.retries)
        return state | {f"losses.{name}": pair for name, pair in self.losses.items()}

    def whole_state(self) -> dict[str, Tensor]:
        """`state`; at the first of several ranks also what the others have of their own, as
        rank1.D.pool.images. All ranks must call it."""
        state = self.state()
        if self.ranks.size > 1:
            for name in self._own_names():
                for rank, tensor in enumerate(self.ranks.gather(state[name])[1:], 1):
                    state[f"rank{rank}.{name}"] = tensor
        return state

    def shared_state(self) -> dict[str, Tensor]:
        """That part of `state` in which the ranks must agree: all but pools and what `settle` does."""
        own = {*self._own_names(), *(f"ema.{k}" for k in _state(self.ema) if k.endswith(NOT_AVERAGED))}
        return {name: tensor for name, tensor in self.state().items() if name not in own}

    def _own_names(self) -> list[str]:
        """Of the tensors in `state` that are a rank's own: past images that the rank has generated."""
        pool = getattr(self.D, "pool", None)
        return [f"D.pool.{name}" for name in _state(pool)] if isinstance(pool, torch.nn.Module) else []

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor], images: int) -> None:
        """Take over `state` as saved after `images` images. KeyError for a tensor that is missing."""
        self.images, self.retries = images, int(state["retries"])
        self.watch.forget()
        for name, tensor in self._scalars().items():
            tensor.copy_(state[name])
        for prefix, net in (("G", self.G), ("D", self.D), ("ema", self.ema)):
            for name, tensor in _state(net).items():
                tensor.copy_(state[f"{prefix}.{name}"])
        for name in self._own_names() if self.ranks.rank else ():
            own, saved = self.D.get_buffer(name.removeprefix("D.")), f"rank{self.ranks.rank}.{name}"
            own.copy_(state[saved]) if saved in state else own.zero_()  # an empty pool: it fills again
        self.grow()
        for prefix, net, optimizer in self._optimizers():
            for name, parameter in net.named_parameters():
                moments = {
                    key: torch.zeros_like(parameter).copy_(state[f"{prefix}.{name}.{key}"])
                    for key in MOMENTS[self.config.optimizer]
                }
                step = state[f"{prefix}.{name}.step"].to(self.device)
                optimizer.state[parameter] = {"step": step, **moments}
        self.losses = {
            name.removeprefix("losses."): tensor.to(self.device)
            for name, tensor in state.items()
            if name.startswith("losses.")
        }

    def _scalars(self) -> dict[str, Tensor]:
        scalars = {"pl_mean": self.pl_mean}
        return (
            scalars if self.strength is None else scalars | {"ada.p": self.strength, "ada.signs": self.signs}
        )

    def _optimizers(self) -> tuple:
        return ("g_optimizer", self.G, self.g_optimizer), ("d_optimizer", self.D, self.d_optimizer)


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


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """float32 [N, classes] of labels int64 [N], without waiting for the device as PyTorch's own does."""
    return (labels[:, None] == torch.arange(classes, device=labels.device)).float()


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The learning rate of every parameter."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


@torch.no_grad()
def _clip(net: torch.nn.Module, bound: float) -> None:
    """Every weight to -bound..bound (Arjovsky et al. 2017, algorithm 1)."""
    torch.ops.aten._foreach_clamp_min_.Scalar(list(net.parameters()), -bound)
    torch.ops.aten._foreach_clamp_max_.Scalar(list(net.parameters()), bound)


def _optimizer(net: torch.nn.Module, lr: float | Tensor, config: Config) -> torch.optim.Optimizer:
    if config.optimizer == "rmsprop":
        capturable = isinstance(lr, Tensor)
        return torch.optim.RMSprop(net.parameters(), lr, config.beta2, foreach=True, capturable=capturable)
    betas = (config.beta1, config.beta2)
    return torch.optim.Adam(net.parameters(), lr, betas, fused=True, capturable=True)


def _seed(seed: int, *what: str | int) -> int:
    """A 63-bit seed of its own for every (seed, what)."""
    words = [int.from_bytes(w.encode(), "little") if isinstance(w, str) else w for w in what]
    return int(np.random.SeedSequence([seed, *words]).generate_state(1, np.uint64)[0] >> 1)
