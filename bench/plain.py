"""What the engine makes of a step beside plain PyTorch: python -m bench.plain CASE

Three ways to compute the same step in the same precision, taken in turn within one process: `plain`, written
as its users write it (DCGAN as in pytorch/examples, under autocast and channels_last; StyleGAN2 as scale,
convolution, scale, with FIR filters as strided depthwise convolutions; R3GAN with PyTorch's grouped
convolutions and a backward pass of its own for the loss; CycleGAN with PyTorch's instance norm), then this
project's step eagerly, then compiled. Printed are medians of the rounds, images/s, the speed against `plain`,
and the fraction of the limit (fastgan/limit.py). But for DCGAN, a step is the sum of its phases, each at its
share, and of the update that follows them; compiling the phases takes minutes. The last row is inference.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.settings import BOTH, CPU, FULL, Case, described, limit_of_step
from fastgan.compiled import Phase
from fastgan.config import Config, build_generator, make_config, resolve_device
from fastgan.engine import Engine, place
from fastgan.kernels import conv2d_resample, modulated_conv2d
from fastgan.kernels.upfirdn2d import Pair, parse_padding
from fastgan.limit import PhaseCall, limit, phase_calls, random_images, synchronize, update_call
from fastgan.models import cyclegan, r3gan
from fastgan.train import peak_memory_mib

Run = Callable[[], object]

CASES: dict[str, Case] = {
    "dcgan": CPU["dcgan"],
    "stylegan": ("stylegan", {**FULL, "resolution": 64, "batch": 8, "channel_base": 16384}, BOTH),
    "default-stylegan": CPU["default-stylegan"],
    "r3gan": (  # the size that the paper trains on CIFAR-10
        "r3gan",
        {"resolution": 32, "batch": 16, "width": 768, "cardinality": 96, "blocks": 2, "z_dim": 64},
        BOTH,
    ),
    "cyclegan": (  # the paper's networks at 128 pixels
        "cyclegan",
        {"resolution": 128, "batch": 1, "ngf": 64, "ndf": 64, "blocks": 9, "layers": 3, "identity": 0.5},
        BOTH,
    ),
}


class PlainDCGAN:
    """The step of pytorch/examples' dcgan, 64 pixels: D on real and on generated images, then G."""

    def __init__(self, config: Config, device: torch.device):
        self.config, self.device = config, device
        n = config.ngf
        g: list[nn.Module] = [nn.ConvTranspose2d(config.z_dim, 8 * n, 4, 1, 0, bias=False)]
        for fan_in, fan_out in ((8 * n, 4 * n), (4 * n, 2 * n), (2 * n, n), (n, config.channels)):
            g += [nn.BatchNorm2d(fan_in), nn.ReLU(inplace=True)]
            g.append(nn.ConvTranspose2d(fan_in, fan_out, 4, 2, 1, bias=False))
        n = config.ndf
        d: list[nn.Module] = [nn.Conv2d(config.channels, n, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, True)]
        for fan_in in (n, 2 * n, 4 * n):
            d += [nn.Conv2d(fan_in, 2 * fan_in, 4, 2, 1, bias=False), nn.BatchNorm2d(2 * fan_in)]
            d.append(nn.LeakyReLU(0.2, True))
        d.append(nn.Conv2d(8 * n, 1, 4, 1, 0, bias=False))
        place = {"device": device, "memory_format": torch.channels_last}
        self.G, self.D = nn.Sequential(*g, nn.Tanh()).to(**place), nn.Sequential(*d).to(**place)
        rates = {"lr": config.g_lr, "betas": (config.beta1, config.beta2)}
        self.g_optimizer = torch.optim.Adam(self.G.parameters(), **rates)
        self.d_optimizer = torch.optim.Adam(self.D.parameters(), **rates)

    def step(self, real: Tensor) -> None:
        count, bf16 = self.config.batch, self.config.precision == "bf16"
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=bf16)
        loss, ones = nn.BCEWithLogitsLoss(), torch.ones(count, device=self.device)
        self.D.zero_grad()
        with autocast:
            logits = self.D(real.float() / 127.5 - 1).flatten()
        loss(logits.float(), ones).backward()
        with autocast:
            fake = self.G(torch.randn(count, self.config.z_dim, 1, 1, device=self.device))
            logits = self.D(fake.detach()).flatten()
        loss(logits.float(), torch.zeros_like(ones)).backward()
        self.d_optimizer.step()
        self.G.zero_grad()
        with autocast:
            logits = self.D(fake).flatten()
        loss(logits.float(), ones).backward()
        self.g_optimizer.step()


def plain_fir(
    x: Tensor,
    f: Tensor | None,
    up: int = 1,
    down: int = 1,
    padding: Pair = 0,
    flip_filter: bool = False,
    gain: float = 1,
) -> Tensor:
    """`upfirdn2d` as it is defined: zero insertion, padding and a strided depthwise convolution."""
    n, c, h, w = x.shape
    if f is None:
        return F.pad(x, list(parse_padding(padding)))
    if up > 1:
        x = F.pad(x.reshape(n, c, h, 1, w, 1), [0, up - 1, 0, 0, 0, up - 1]).reshape(n, c, h * up, w * up)
    x = F.pad(x, list(parse_padding(padding)))
    f = (f if flip_filter else f.flip([0, 1])).to(x.dtype) * gain
    return F.conv2d(x, f.expand(c, 1, *f.shape), stride=down, groups=c)


def plain_instance_norm(
    x: Tensor, act: str = "linear", alpha: float = 0.0, weight: None = None, bias: None = None
) -> Tensor:
    y = F.instance_norm(x)
    return y if act == "linear" else F.leaky_relu(y, alpha if act == "lrelu" else 0.0)


def plain_grouped_conv2d(x: Tensor, w: Tensor, groups: int) -> Tensor:
    return F.conv2d(x, w.to(x.dtype), padding=w.shape[2] // 2, groups=groups)


PLAINLY: dict[str, list[tuple[object, str, object]]] = {  # what stands in for what is this project's own
    "stylegan": [(conv2d_resample, "fir_ref", plain_fir), (modulated_conv2d, "fir_ref", plain_fir)],
    "r3gan": [(r3gan, "grouped_conv2d", plain_grouped_conv2d), (r3gan.Discriminator, "homogeneous", False)],
    "cyclegan": [(cyclegan, "instance_norm_act", plain_instance_norm)],
}


def plainly(arch: str) -> ExitStack:
    """While it is open, the family is written in plain PyTorch."""
    stack = ExitStack()
    for owner, name, stand_in in PLAINLY[arch]:
        stack.enter_context(mock.patch.object(owner, name, stand_in))
    return stack


def measured(ways: dict[str, Run], device: torch.device, rounds: int) -> dict[str, float]:
    """Median seconds of each, taken in turn; the first two runs, which compile, do not count."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(rounds + 2):
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            synchronize(device)
            if i >= 2:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def dcgan_step(config: Config, device: torch.device, rounds: int) -> tuple[dict[str, float], float]:
    """Seconds of a step by each way, and the limit."""
    real = random_images(config, device)
    peer = PlainDCGAN(config, device)
    eager, compiled = (Engine(replace(config, compile=compile), device) for compile in (False, True))
    ways = {"plain": peer.step, "eager": eager.step, "compiled": compiled.step}
    found = measured({name: partial(step, real) for name, step in ways.items()}, device, rounds)
    return found, limit_of_step(config, phase_calls(eager, real))


def phases_step(config: Config, device: torch.device, rounds: int) -> tuple[dict[str, float], float]:
    """Seconds of a step by each way, and the limit."""
    real = random_images(config, device)
    engines = [Engine(replace(config, compile=compile), device) for compile in (False, True)]
    seconds: dict[str, float] = dict.fromkeys(("plain", "eager", "compiled"), 0.0)
    alone = 0.0
    for eager, compiled in zip(*(phase_calls(e, real) for e in engines), strict=True):

        def plain(call: PhaseCall = eager) -> None:
            with plainly(config.arch):
                call()

        found = measured({"plain": plain, "eager": eager, "compiled": compiled}, device, rounds)
        of_limit = limit(eager, config.dtype)
        print(row(eager.phase.name, found, of_limit, config.batch), flush=True)
        for way, t in found.items():
            seconds[way] += eager.share * t
        alone += eager.share * of_limit
    update = measured({"update": update_call(engines[0])}, device, rounds)["update"]
    return {way: t + update for way, t in seconds.items()}, alone


def inference(config: Config, device: torch.device, rounds: int) -> tuple[dict[str, float], float]:
    """Seconds of a batch of images from latents, or of translations, by each way, and the limit."""
    G = build_generator(config).eval().requires_grad_(False)
    place(G, device)
    if config.domains == 2:
        args: tuple = None, random_images(config, device) / 127.5 - 1
    else:
        args = (torch.randn(config.batch, config.z_dim, device=device),)
    eager, compiled = (
        PhaseCall(Phase("generating", lambda G, *args: G(*args), device, compile), (G, *args), 1.0)
        for compile in (False, True)
    )

    def plain() -> None:
        with plainly(config.arch) if config.arch in PLAINLY else ExitStack():
            eager()

    with torch.no_grad():
        ways: dict[str, Run] = {"plain": plain, "eager": eager, "compiled": compiled}
        return measured(ways, device, 3 * rounds), limit(eager, config.dtype)


def row(name: str, seconds: dict[str, float], alone: float, batch: int) -> str:
    best = min(seconds["eager"], seconds["compiled"])
    cells = [f"{t:7.3f} s {batch / t:7.1f} img/s {seconds['plain'] / t:5.2f}x" for t in seconds.values()]
    return f"{name:20} " + " | ".join(cells) + f" | limit {alone:.3f} s = {alone / best:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.plain", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("case", choices=[*CASES])
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    arch, options, _ = CASES[args.case]
    if arch == "dcgan":  # the example knows neither
        options = {**options, "r1": 0.0, "instance_noise": 0.0}
    config, device = resolve_device(make_config(arch, precision=args.precision, **options))
    print(f"{described(config)}\n{'':20} plain | eager | compiled | fraction of the limit")
    measure = dcgan_step if arch == "dcgan" else phases_step
    print(row("step", *measure(config, device, args.rounds), config.batch))
    print(row("inference", *inference(config, device, args.rounds), config.batch))
    print(f"peak memory {peak_memory_mib(device)} MiB, of all ways together")


if __name__ == "__main__":
    main()
