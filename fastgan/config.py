"""What a run is: one flat configuration, and what each `--arch` means (`PRESETS`)."""

import dataclasses
import difflib
import math
from dataclasses import dataclass
from typing import Any

import torch

from fastgan.losses import LOSSES
from fastgan.models import Discriminator, Generator, dcgan, stylegan


class UsageError(Exception):
    """Bad input: one line that names the culprit and the way out. Commands print it and exit with code 2."""


def _option(default: Any, help: str, archs: tuple[str, ...] = (), mutable: bool = False, choices=None) -> Any:
    """A field and its flag's help; the `archs` it belongs to (empty: all); may a resumed run change it."""
    metadata = {"help": help, "archs": archs, "mutable": mutable, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


_STYLEGAN, _DCGAN = ("stylegan",), ("dcgan",)


@dataclass(frozen=True)
class Config:
    """Every number that a run depends on. Flags are the field names with dashes."""

    arch: str
    data: str = _option("digits", "'digits' (embedded) or a folder of images; its sub-folders are classes")
    resolution: int = _option(16, "side of the images in pixels")
    channels: int = _option(3, "channels of the images", choices=(1, 3))
    crop: str = _option("none", "how images that are not square are cut", choices=("none", "center"))
    mirror: bool = _option(False, "flip half of the images horizontally")
    skip_bad: bool = _option(False, "leave out and count files that cannot be read")
    batch: int = _option(32, "images a step")
    kimg: float = _option(100.0, "length of the run in thousands of images", mutable=True)
    seed: int = _option(0, "seed of every random number")
    device: str = _option("auto", "auto (CUDA if there is one), cpu, cuda or cuda:N")
    precision: str = _option(
        "auto", "of convolutions; auto: bf16 where native", choices=("auto", "fp32", "bf16")
    )
    compile: bool = _option(False, "compile each phase into one graph")
    # Mutable: a replay launches the very kernels that were recorded, so the numbers stay the same.
    cuda_graphs: bool = _option(True, "on CUDA, replay each phase as a CUDA graph", mutable=True)

    loss: str = _option("non-saturating", "adversarial loss", choices=tuple(LOSSES))
    g_lr: float = _option(0.002, "learning rate of the generator")
    d_lr: float = _option(0.002, "learning rate of the discriminator")
    beta1: float = _option(0.0, "Adam's first decay rate")
    beta2: float = _option(0.99, "Adam's second decay rate")
    r1: float = _option(0.0, "weight gamma of the R1 penalty gamma / 2 |grad D|^2 on reals; 0: none")
    r1_every: int = _option(16, "R1 every so many steps, weighted up accordingly")
    pl: float = _option(0.0, "weight of path length regularization; 0: none")
    pl_every: int = _option(4, "path length regularization every so many steps, weighted up accordingly")
    pl_batch_shrink: int = _option(2, "path length on batch / this many samples")
    pl_decay: float = _option(0.01, "decay rate of the mean path length")
    ema_kimg: float = _option(10.0, "half-life of the generator's moving average in thousands of images")
    ema_rampup: float = _option(0.05, "half-life at most this share of the images seen; 0: no ramp-up")

    z_dim: int = _option(512, "dimensions of the latent z (stylegan: --channel-max if not given)")
    w_dim: int = _option(512, "dimensions of the latent w (--channel-max if not given)", _STYLEGAN)
    mapping_layers: int = _option(8, "layers of the mapping network", _STYLEGAN)
    channel_base: int = _option(
        32768, "channels at resolution r: min(channel base / r, channel max)", _STYLEGAN
    )
    channel_max: int = _option(512, "most channels of a layer", _STYLEGAN)
    style_mixing: float = _option(0.9, "probability of mixing two styles in a sample", _STYLEGAN)
    mbstd_group: int = _option(4, "group size of the minibatch standard deviation", _STYLEGAN)
    ngf: int = _option(64, "channels of the generator's last hidden layer", _DCGAN)
    ndf: int = _option(64, "channels of the discriminator's first layer", _DCGAN)
    kernel: int = _option(4, "kernel size", _DCGAN, choices=(4, 5))
    slope: float = _option(0.2, "slope of the discriminator's LeakyReLU", _DCGAN)
    dropout: float = _option(0.0, "dropout in the discriminator", _DCGAN)
    instance_noise: float = _option(0.0, "deviation of noise on the images that D sees", _DCGAN)

    tick_kimg: float = _option(4.0, "a log line and sample grid every so many thousand images", mutable=True)
    checkpoint_kimg: float = _option(16.0, "a checkpoint every so many thousand images", mutable=True)
    keep: int = _option(2, "checkpoints kept", mutable=True)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            choices, value = field.metadata.get("choices"), getattr(self, field.name)
            if choices and value not in choices:
                raise UsageError(f"{flag(field.name)} must be {' or '.join(map(str, choices))}: got {value}")
        for name in ("resolution", "batch", "r1_every", "pl_every", "pl_batch_shrink", "keep", "z_dim"):
            if getattr(self, name) < 1:
                raise UsageError(f"{flag(name)} must be at least 1: got {getattr(self, name)}")
        for name in ("kimg", "g_lr", "d_lr", "ema_kimg", "tick_kimg", "checkpoint_kimg"):
            if not 0 < getattr(self, name) < math.inf:
                raise UsageError(f"{flag(name)} must be above 0: got {getattr(self, name)}")
        for name in ("r1", "pl", "ema_rampup", "instance_noise"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(f"{flag(name)} must be at least 0: got {getattr(self, name)}")
        for name in ("beta1", "beta2", "pl_decay", "style_mixing", "dropout"):
            if not 0 <= getattr(self, name) <= (1 if name == "style_mixing" else 0.999999):
                raise UsageError(f"{flag(name)} must lie between 0 and 1: got {getattr(self, name)}")
        if self.arch == "stylegan" and self.batch % min(self.mbstd_group, self.batch):
            raise UsageError(
                f"--batch {self.batch} is not divisible by the groups of minibatch-stddev; use a multiple of "
                f"{self.mbstd_group} or --mbstd-group {math.gcd(self.batch, self.mbstd_group)}"
            )
        if self.pl > 0 and self.batch % self.pl_batch_shrink:
            raise UsageError(f"--pl-batch-shrink {self.pl_batch_shrink} does not divide --batch {self.batch}")
        try:
            with torch.device("meta"):
                build_networks(self)
        except ValueError as error:
            raise UsageError(f"--arch {self.arch} cannot be built: {error}") from None

    @property
    def images(self) -> int:
        """Length of the run: `kimg` in images, rounded up to whole batches."""
        return math.ceil(self.kimg * 1000 / self.batch - 1e-9) * self.batch

    @property
    def dtype(self) -> torch.dtype:
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[self.precision]


# The recipes, sized for the embedded digits on two CPU cores.
PRESETS: dict[str, dict[str, Any]] = {
    "stylegan": {
        "batch": 16,
        "mapping_layers": 2,
        "channel_base": 512,
        "channel_max": 64,
        "g_lr": 0.008,
        "d_lr": 0.008,
        "r1": 0.4,
        "pl": 0.5,
        "ema_kimg": 2.0,
    },
    "dcgan": {
        "resolution": 32,
        "batch": 32,
        "kimg": 200.0,
        "z_dim": 100,
        "ngf": 32,
        "ndf": 32,
        "g_lr": 0.002,
        "d_lr": 0.001,
        "beta1": 0.5,
        "beta2": 0.999,
        "r1": 0.3,
        "r1_every": 4,
        "instance_noise": 0.3,
        "ema_kimg": 5.0,
        "tick_kimg": 10.0,
        "checkpoint_kimg": 50.0,
    },
}


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def applies(field: dataclasses.Field, arch: str) -> bool:
    return not field.metadata.get("archs") or arch in field.metadata["archs"]


def make_config(arch: str, **given: Any) -> Config:
    """The preset of `arch` with what is `given` on top.

    Raises UsageError for an unknown arch (with the nearest name), an option of another arch or a bad value.
    """
    if arch not in PRESETS:
        near = difflib.get_close_matches(arch, PRESETS, n=1, cutoff=0.0)[0]
        raise UsageError(f"unknown --arch {arch}: did you mean {near}? There are {', '.join(PRESETS)}")
    fields = {f.name: f for f in dataclasses.fields(Config)}
    for name in given:
        if not applies(fields[name], arch):
            raise UsageError(
                f"{flag(name)} does not apply to --arch {arch}, only to "
                + ", ".join(fields[name].metadata["archs"])
            )
    options = PRESETS[arch] | given
    if arch == "stylegan":  # the paper's latents are as wide as its widest layer
        options = {"z_dim": options["channel_max"], "w_dim": options["channel_max"]} | options
    return Config(arch=arch, **options)


def changed_fields(old: dict[str, Any], new: Config) -> list[str]:
    """Names of the fields in which a resumed run must not, but does, differ from the run's own config."""
    own = [f.name for f in dataclasses.fields(new) if not f.metadata.get("mutable")]
    return [name for name in own if old.get(name) != getattr(new, name)]


def build_generator(config: Config) -> Generator:
    c = config
    dtype = None if c.precision == "auto" else c.dtype
    if c.arch == "stylegan":
        return stylegan.Generator(
            c.z_dim,
            0,
            c.w_dim,
            c.resolution,
            c.channels,
            c.mapping_layers,
            c.channel_base,
            c.channel_max,
            dtype=dtype,
            style_mixing=c.style_mixing,
        )
    return dcgan.Generator(c.z_dim, c.ngf, c.channels, c.resolution, c.kernel, dtype)


def build_networks(config: Config) -> tuple[Generator, Discriminator]:
    """(G, D), freshly initialised from torch's global random state."""
    c, G = config, build_generator(config)
    dtype = None if c.precision == "auto" else c.dtype
    if c.arch == "stylegan":
        D: Discriminator = stylegan.Discriminator(
            0,
            c.resolution,
            c.channels,
            c.channel_base,
            c.channel_max,
            mbstd_group_size=c.mbstd_group,
            dtype=dtype,
        )
    else:
        D = dcgan.Discriminator(
            c.ndf, c.channels, c.resolution, c.kernel, c.slope, c.dropout, c.instance_noise, dtype
        )
    return G, D


def resolve_device(config: Config) -> tuple[Config, torch.device]:
    """`auto` device and precision replaced by what this machine has; UsageError for a CUDA it lacks."""
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device must be auto, cpu, cuda or cuda:N: got {name}") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device must be auto, cpu, cuda or cuda:N: got {name}")
    if device.type == "cuda" and (
        not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()
    ):
        raise UsageError(
            f"--device {name}: there are {torch.cuda.device_count()} CUDA devices here; "
            "use --device cpu, or a torch built for CUDA on a machine with a driver"
        )
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if _native_bf16(device) else "fp32"
    return dataclasses.replace(config, device=name, precision=precision), device


def _native_bf16(device: torch.device) -> bool:
    """Tensor cores of sm_80 on, AMD's matrix cores, or a CPU's AMX or AVX512-BF16 instructions."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported()  # every CPU with AMX has these as well
