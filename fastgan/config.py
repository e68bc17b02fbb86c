"""What a run is: one flat configuration, and what each `--arch` means (`PRESETS`)."""

import dataclasses
import difflib
import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fastgan import metrics as scores
from fastgan.augment import make_augment
from fastgan.losses import LOSSES
from fastgan.models import Discriminator, Generator, family
from fastgan.spectral import add_spectral_norm

# Beyond these a number is a mistake, and building networks from it may take for ever.
MOST = 2**31 - 1
MOST_OF = {"mapping_layers": 128, "blocks": 128, "layers": 128, "seed": 2**63 - 1}


class UsageError(Exception):
    """Bad input: one line that names the culprit and the way out. Commands print it and exit with code 2."""


def _option(default: Any, help: str, network: bool = False, mutable: bool = False, choices=None) -> Any:
    """A field and its flag's help. `network`: it applies to families whose networks take it; `mutable`: a
    resumed run may change it."""
    metadata = {"help": help, "network": network, "mutable": mutable, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


def _network(default: Any, help: str, choices=None) -> Any:
    return _option(default, help, network=True, choices=choices)


@dataclass(frozen=True)
class Config:
    """Every number that a run depends on. Flags are the field names with dashes."""

    arch: str
    data: str = _option(
        "digits",
        "'digits' (embedded), a variant of them, a folder or zip of images with sub-folders or a dataset.json"
        " for classes, a .safetensors (see fastgan prepare), .npz, .npy or .parquet file, or hf:NAME[:SPLIT]",
    )
    image_key: str = _option("", "array or column of the images, where its type does not tell")
    label_key: str = _option("", "array or column of the labels, where its type does not tell")
    data_b: str = _option("", "the second domain of a family that joins two, as --data")
    resolution: int = _option(16, "side of the images in pixels")
    channels: int = _option(3, "channels of the images: gray, RGB or RGBA", choices=(1, 3, 4))
    crop: str = _option("none", "how images are cut to squares: none, center, center:SIDE or wide (4:3)")
    filter: str = _option(
        "lanczos", "what images are made smaller with", choices=("lanczos", "box", "bicubic")
    )
    mirror: bool = _option(False, "flip half of the images horizontally")
    skip_bad: bool = _option(False, "leave out and count files that cannot be read")
    cond: bool = _option(False, "condition the networks on the images' classes")
    classes: int = _option(0, "how many there are, read off the data")
    batch: int = _option(32, "images of an update")
    accumulate: int = _option(1, "parts in which a batch is worked through, their gradients added up")
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
    d_steps: int = _option(1, "updates of the discriminator a step, each on new images")
    g_steps: int = _option(1, "updates of the generator a step")
    optimizer: str = _option("adam", "what updates the networks", choices=("adam", "rmsprop"))
    g_lr: float = _option(0.002, "learning rate of the generator")
    d_lr: float = _option(0.002, "learning rate of the discriminator")
    lr_decay: float = _option(0.0, "learning rates fall to 0, linearly, over this last share of the run")
    beta1: float = _option(0.0, "Adam's first decay rate")
    beta2: float = _option(0.99, "Adam's second decay rate, RMSprop's only one")
    clip: float = _option(0.0, "the critic's weights are clipped to -clip..clip after each update; 0: not")
    label_smoothing: float = _option(0.0, "the target for real images is 1 - this")
    r1: float = _option(0.0, "weight gamma of the R1 penalty gamma / 2 |grad D|^2 on reals; 0: none")
    r2: float = _option(0.0, "the same on generated images")
    r1_every: int = _option(16, "R1 and R2 every so many updates of D, weighted up accordingly")
    gradient_penalty: float = _option(0.0, "weight of (|grad D| - 1)^2 between real and generated; 0: none")
    drift: float = _option(0.0, "weight of the mean D(real)^2; 0: none")
    feature_matching: float = _option(0.0, "weight for G of D's mean hidden features being alike; 0: none")
    orthogonal: float = _option(0.0, "weight for G of orthogonal regularization; 0: none")
    spectral_norm: bool = _option(False, "divide each of the discriminator's weights by its largest stretch")
    diffaugment: str = _option("", "what D sees is augmented: any of color,translation,cutout")
    ada: float = _option(0.0, "augment what D sees so much that its sign on reals averages this; 0: not")
    pl: float = _option(0.0, "weight of path length regularization; 0: none")
    pl_every: int = _option(4, "path length regularization every so many updates of G, weighted up")
    pl_batch_shrink: int = _option(2, "path length on batch / this many samples")
    pl_decay: float = _option(0.01, "decay rate of the mean path length")
    ema_kimg: float = _option(10.0, "half-life of the generator's moving average in thousands of images")
    ema_rampup: float = _option(0.05, "half-life at most this share of the images seen; 0: no ramp-up")

    sync_batchnorm: bool = _option(False, "on several ranks, BatchNorm statistics of all their images")

    z_dim: int = _network(512, "dimensions of the latent z (stylegan: --channel-max if not given)")
    w_dim: int = _network(512, "dimensions of the latent w (--channel-max if not given)")
    mapping_layers: int = _network(8, "layers of the mapping network")
    channel_base: int = _network(32768, "channels at resolution r: min(channel base / r, channel max)")
    channel_max: int = _network(512, "most channels of a layer")
    style_mixing: float = _network(0.9, "probability of mixing two styles in a sample")
    mbstd_group: int = _network(4, "group size of the minibatch standard deviation")
    body: str = _network("dcgan", "which networks", choices=("dcgan", "mlp", "resnet"))
    ngf: int = _network(64, "width of the generator, as its paper counts")
    ndf: int = _network(64, "width of the discriminator, as its paper counts")
    width: int = _network(768, "channels of the stages up to 32 pixels")
    cardinality: int = _network(96, "groups of a stage that wide")
    expansion: int = _network(2, "a bottleneck is so many times as wide as its block")
    blocks: int = _network(0, "residual blocks (dcgan: doublings; 0: as many as fit)")
    layers: int = _network(3, "strided layers of a PatchGAN")
    kernel: int = _network(4, "kernel size")
    norm: str = _network("batch", "of the critic", choices=("batch", "layer", "instance", "none"))
    slope: float = _network(0.2, "slope of the discriminator's LeakyReLU")
    dropout: float = _network(0.0, "dropout in the discriminator")
    instance_noise: float = _network(0.0, "deviation of noise on the images that D sees")
    attention: int = _network(32, "side of the maps with self-attention; 0: none")
    shared_dim: int = _network(128, "dimensions of the class embedding that all layers share; 0: own ones")
    hier: bool = _network(True, "z reaches every block")
    deep: bool = _network(False, "BigGAN-deep")
    cycle: float = _network(10.0, "weight of cycle consistency")
    identity: float = _network(0.5, "weight of the identity loss, as a share of --cycle")
    pool: int = _network(50, "past images of which the discriminator is shown some; 0: none")
    fade_kimg: float = _network(600.0, "a new resolution fades in over so many thousand images")
    stable_kimg: float = _network(600.0, "and is trained on for so many")

    tick_kimg: float = _option(4.0, "a log line and sample grid every so many thousand images", mutable=True)
    checkpoint_kimg: float = _option(16.0, "a checkpoint every so many thousand images", mutable=True)
    on_nan: str = _option(
        "rollback",
        "on numbers that are not finite: back to the last checkpoint, to try other noise, or stop",
        mutable=True,
        choices=("rollback", "stop"),
    )
    keep: int = _option(2, "checkpoints kept", mutable=True)
    metrics: str = _option(
        "",
        "any of fid,kid,is,pr,dc,ppl,tstr, of the averaged generator; the first picks the best snapshot",
        mutable=True,
    )
    eval_every: int = _option(5, "judge every so many ticks; 0: never", mutable=True)
    eval_count: int = _option(5000, "generated images to judge")
    eval_features: str = _option("classifier", "feature network of --metrics", choices=scores.NETWORKS)
    test_data: str = _option("", "of --metrics tstr: real images that training does not see", mutable=True)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            choices, value = field.metadata.get("choices"), getattr(self, field.name)
            if choices and value not in choices:
                raise UsageError(f"{flag(field.name)} must be {' or '.join(map(str, choices))}: got {value}")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            most = MOST_OF.get(field.name, MOST)
            if field.type is int and not 0 <= value <= most:
                raise UsageError(f"{flag(field.name)} must lie between 0 and {most}: got {value}")
        counts = ("resolution", "batch", "accumulate", "d_steps", "g_steps", "r1_every", "pl_every")
        for name in (*counts, "pl_batch_shrink", "keep", "z_dim", "ngf", "ndf"):
            if getattr(self, name) < 1:
                raise UsageError(f"{flag(name)} must be at least 1: got {getattr(self, name)}")
        for name in ("kimg", "g_lr", "d_lr", "ema_kimg", "tick_kimg", "checkpoint_kimg"):
            if not 0 < getattr(self, name) < math.inf:
                raise UsageError(f"{flag(name)} must be above 0: got {getattr(self, name)}")
        weights = ("r1", "r2", "gradient_penalty", "drift", "feature_matching", "orthogonal", "pl")
        for name in (*weights, "clip", "ema_rampup", "instance_noise"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(f"{flag(name)} must be at least 0: got {getattr(self, name)}")
        shares = ("beta1", "beta2", "pl_decay", "label_smoothing", "ada", "dropout")
        for name in (*shares, "style_mixing", "lr_decay"):
            if not 0 <= getattr(self, name) <= (0.999999 if name in shares else 1):
                raise UsageError(f"{flag(name)} must lie between 0 and 1: got {getattr(self, name)}")
        if self.batch % self.accumulate:
            raise UsageError(f"--accumulate {self.accumulate} does not divide --batch {self.batch}")
        if "mbstd_group" in network_options(self.arch) and self.part % min(self.mbstd_group, self.part):
            raise UsageError(
                f"--batch {self.batch} is not divisible by the groups of minibatch-stddev; use a multiple of "
                f"{self.mbstd_group} or --mbstd-group {math.gcd(self.part, self.mbstd_group)}"
            )
        if self.pl > 0 and self.part % self.pl_batch_shrink:
            raise UsageError(f"--pl-batch-shrink {self.pl_batch_shrink} does not divide --batch {self.batch}")
        if self.pl > 0 and hasattr(family(self.arch), "schedule"):
            raise UsageError(f"--pl does not apply to --arch {self.arch}, whose images grow; leave it out")
        if self.label_smoothing > 0 and not LOSSES[self.loss].smooths:
            able = ", ".join(name for name, loss in LOSSES.items() if loss.smooths)
            raise UsageError(f"--label-smoothing has no meaning for --loss {self.loss}, only for {able}")
        if self.ada > 0 and self.diffaugment:
            raise UsageError("--ada and --diffaugment exclude each other; choose one")
        if self.domains == 2 and not self.data_b:
            raise UsageError(f"--arch {self.arch} joins two domains; name the second with --data-b")
        if self.domains == 1 and self.data_b:
            raise UsageError(f"--data-b does not apply to --arch {self.arch}, which knows one domain")
        if self.cond and "c_dim" not in network_options(self.arch):
            raise UsageError(f"--cond does not apply to --arch {self.arch}, which takes no classes")
        try:
            scores.parse(self.metrics)
        except ValueError as error:
            raise UsageError(f"--metrics: {error}") from None
        if self.eval_every < 0:
            raise UsageError(f"--eval-every must be at least 0: got {self.eval_every}")
        if self.metrics and self.eval_every * self.tick_kimg > self.kimg:
            raise UsageError(
                f"--eval-every {self.eval_every} ticks of {self.tick_kimg:g} kimg are more than --kimg "
                f"{self.kimg:g}, so that nothing would be judged; use a smaller --eval-every or --tick-kimg"
            )
        try:
            with torch.device("meta"):
                build_networks(self)
            make_augment(self.diffaugment, self.ada > 0, self.channels)
        except (ValueError, ArithmeticError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]
            raise UsageError(f"--arch {self.arch} cannot be built: {reason}") from None

    @property
    def step_images(self) -> int:
        """Images that D sees in a step: what `images seen` counts."""
        return self.batch * self.d_steps

    @property
    def part(self) -> int:
        """Images of a phase's call: a batch, or a part of it whose gradients are added to the others'."""
        return self.batch // self.accumulate

    @property
    def images(self) -> int:
        """Length of the run: `kimg` in images, rounded up to whole steps."""
        return math.ceil(self.kimg * 1000 / self.step_images - 1e-9) * self.step_images

    @property
    def domains(self) -> int:
        """Images that a sample is: 2 for a family that joins two domains."""
        return getattr(family(self.arch), "DOMAINS", 1)

    @property
    def c_dim(self) -> int:
        """Classes that the networks know: 0 without --cond; any number until the data has been read."""
        return (self.classes or 2) if self.cond else 0

    @property
    def dtype(self) -> torch.dtype:
        """Of convolutions; fp32 as long as precision is auto."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32


# The papers' recipes, sized for the embedded digits on two CPU cores.
_MLP: dict[str, Any] = {
    "batch": 64,
    "kimg": 200.0,
    "z_dim": 100,
    "dropout": 0.3,
    "g_lr": 0.0004,
    "d_lr": 0.0004,
    "beta1": 0.5,
    "beta2": 0.999,
    "tick_kimg": 10.0,
    "checkpoint_kimg": 50.0,
}
PRESETS: dict[str, dict[str, Any]] = {
    "gan": _MLP,
    "cgan": _MLP | {"cond": True},
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
    "wgan": {
        "batch": 64,
        "kimg": 800.0,
        "loss": "wasserstein",
        "optimizer": "rmsprop",
        "clip": 0.01,
        "d_steps": 5,
        "z_dim": 100,
        "body": "mlp",
        "ngf": 64,
        "ndf": 64,
        "g_lr": 0.0005,
        "d_lr": 0.0005,
        "tick_kimg": 20.0,
        "checkpoint_kimg": 100.0,
    },
    "wgan-gp": {
        "batch": 32,
        "kimg": 1200.0,
        "loss": "wasserstein",
        "gradient_penalty": 10.0,
        "d_steps": 5,
        "body": "dcgan",
        "norm": "none",
        "z_dim": 128,
        "ngf": 32,
        "ndf": 32,
        "g_lr": 0.001,
        "d_lr": 0.002,
        "beta2": 0.99,
        "lr_decay": 0.5,
        "ema_kimg": 5.0,
        "tick_kimg": 20.0,
        "checkpoint_kimg": 100.0,
    },
    "cyclegan": {
        "data_b": "digits:inverted",
        "batch": 4,
        "kimg": 6.0,
        "loss": "least-squares",
        "ngf": 16,
        "ndf": 32,
        "blocks": 6,
        "layers": 1,
        "identity": 0.0,  # an inverted digit is not to be itself
        "g_lr": 0.0004,
        "d_lr": 0.0004,
        "beta1": 0.5,
        "beta2": 0.999,
        "lr_decay": 0.5,
        "ema_kimg": 1.0,
        "tick_kimg": 1.0,
        "checkpoint_kimg": 4.0,
    },
    "cogan": {
        "data_b": "digits:colored",
        "batch": 32,
        "kimg": 100.0,
        "z_dim": 100,
        "ngf": 64,
        "ndf": 20,
        "r1": 0.5,
        "r1_every": 4,
        "g_lr": 0.001,
        "d_lr": 0.001,
        "beta1": 0.5,
        "beta2": 0.999,
        "ema_kimg": 5.0,
        "tick_kimg": 10.0,
        "checkpoint_kimg": 50.0,
    },
    "progan": {
        "batch": 16,
        "kimg": 160.0,
        "loss": "wasserstein",
        "gradient_penalty": 10.0,
        "drift": 0.001,
        "z_dim": 64,
        "channel_base": 512,
        "channel_max": 64,
        "fade_kimg": 10.0,
        "stable_kimg": 10.0,
        "g_lr": 0.003,
        "d_lr": 0.003,
        "lr_decay": 0.5,
        "ema_kimg": 2.0,
    },
    "sagan": {
        "cond": True,
        "batch": 32,
        "kimg": 80.0,
        "loss": "hinge",
        "z_dim": 128,
        "ngf": 16,
        "ndf": 32,
        "attention": 8,
        "g_lr": 0.0005,
        "d_lr": 0.002,
        "beta2": 0.9,
        "ema_kimg": 5.0,
    },
    "biggan": {
        "cond": True,
        "batch": 32,
        "kimg": 60.0,
        "loss": "hinge",
        "d_steps": 2,
        "orthogonal": 0.00005,
        "z_dim": 60,
        "ngf": 16,
        "ndf": 16,
        "attention": 8,
        "shared_dim": 32,
        "g_lr": 0.0005,
        "d_lr": 0.002,
        "beta2": 0.999,
        "ema_kimg": 5.0,
    },
    "stylegan1": {
        "batch": 16,
        "mapping_layers": 2,
        "channel_base": 512,
        "channel_max": 64,
        "g_lr": 0.004,
        "d_lr": 0.004,
        "r1": 1.0,
        "ema_kimg": 2.0,
        "kimg": 100.0,
    },
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
    "r3gan": {
        "batch": 32,
        "kimg": 120.0,
        "loss": "relativistic",
        "r1": 0.2,
        "r2": 0.2,
        "r1_every": 1,
        "z_dim": 64,
        "width": 32,
        "cardinality": 4,
        "blocks": 2,
        "kernel": 3,
        "channel_base": 24576,
        "g_lr": 0.002,
        "d_lr": 0.002,
        "lr_decay": 0.5,
        "ema_kimg": 2.0,
    },
}


def flag(name: str) -> str:
    """The option of a field."""
    return "--" + name.replace("_", "-")


def applies(field: dataclasses.Field, arch: str) -> bool:
    """Whether a field means anything to a family."""
    return not field.metadata.get("network") or field.name in network_options(arch)


@functools.cache
def network_options(arch: str) -> frozenset[str]:
    """Names of all parameters of the family's networks."""
    makers = (getattr(family(arch), name, None) for name in ("Generator", "Discriminator", "schedule"))
    return frozenset(name for make in makers if make for name in _parameters(make))


def _parameters(make: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(make).parameters)


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
            others = ", ".join(other for other in PRESETS if applies(fields[name], other))
            raise UsageError(f"{flag(name)} does not apply to --arch {arch}, only to {others}")
    options = PRESETS[arch] | given
    if "w_dim" in network_options(arch):  # the papers' latents are as wide as their widest layer
        options = {"z_dim": options["channel_max"], "w_dim": options["channel_max"]} | options
    return Config(arch=arch, **options)


def read_config(fields: Any) -> Config:
    """The Config that JSON holds, whoever has written it. UsageError if it holds none."""
    if not isinstance(fields, dict) or not isinstance(fields.get("arch"), str):
        raise UsageError("a config is a JSON object that names its arch")
    if fields["arch"] not in PRESETS:
        raise UsageError(f"unknown arch {fields['arch']!r}; there are {', '.join(PRESETS)}")
    known: dict[str, Any] = {f.name: f.type for f in dataclasses.fields(Config)}
    for name, value in fields.items():
        if name not in known:
            raise UsageError(f"unknown option {name!r}, perhaps of a newer version")
        kind = known[name]
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise UsageError(f"{flag(name)} must be of type {kind.__name__}: got {value!r:.40}")
    return Config(**fields)


def batch_unit(config: Config) -> int:
    """Batches are multiples of this."""
    groups = config.mbstd_group if "mbstd_group" in network_options(config.arch) else 1
    return config.accumulate * math.lcm(groups, config.pl_batch_shrink if config.pl > 0 else 1)


def changed_fields(old: dict[str, Any], new: Config) -> list[str]:
    """Names of the fields in which a resumed run must not, but does, differ from the run's own config.

    Where learning rates fall towards the end of the run, its length is one of them.
    """
    own = [f.name for f in dataclasses.fields(new) if not f.metadata.get("mutable")]
    own += ["kimg"] * (new.lr_decay > 0)
    return [name for name in own if old.get(name) != getattr(new, name)]


def build_generator(config: Config, **options: Any) -> Generator:
    """The generator alone, freshly initialised from torch's global random state.

    `options` are constructor arguments beside or in place of the configuration's.
    """
    return _build(family(config.arch).Generator, config, options)


def build_discriminator(config: Config, **options: Any) -> Discriminator:
    """The same of the discriminator."""
    D = _build(family(config.arch).Discriminator, config, options)
    if config.spectral_norm:
        add_spectral_norm(D)
    return D


def build_networks(config: Config) -> tuple[Generator, Discriminator]:
    """(G, D), freshly initialised from torch's global random state."""
    return build_generator(config), build_discriminator(config)


def _build(make: Callable[..., Any], config: Config, options: dict[str, Any]) -> Any:
    """A network from the options that its parameters name."""
    named = {name: getattr(config, name) for name in _parameters(make) if hasattr(config, name)}
    return make(**(named | options))


def resolve_device(config: Config, name: str | None = None) -> tuple[Config, torch.device]:
    """`auto` device and precision replaced by what this machine has; UsageError for a CUDA it lacks.

    `name` takes the place of the config's device.
    """
    name = name or config.device
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
