"""Trained networks from files, ready to use: of a run, converted ones, public checkpoints.

Our own files are safetensors. A generator's tensors have their plain names, a discriminator's the prefix
"discriminator."; a file holds either or both. Its header has one key, "fastgan", with JSON:

    config         every field of Config
    images         how many images the networks were trained on
    generator, discriminator    constructor arguments beside or in place of the config's, if there are any
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgan.checkpoint import checkpoints, load_tensors, save_tensors
from fastgan.config import (
    Config,
    UsageError,
    build_discriminator,
    build_generator,
    read_config,
    resolve_device,
)
from fastgan.engine import one_hot, place
from fastgan.images import join_pair, quantize
from fastgan.sampling import NOISES, Plan, labels, noises, samples

GENERATOR_FILE = "generator.safetensors"  # of a run
NETWORKS = ("generator", "discriminator")
PREFIX = "discriminator."


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """Networks as state dicts; the options are constructor arguments that the config does not give."""

    config: Config
    generator: dict[str, Tensor] | None
    discriminator: dict[str, Tensor] | None
    generator_options: dict[str, Any]
    discriminator_options: dict[str, Any]
    images: int


def write_own(path: Path, networks: Pretrained) -> None:
    """One of our files, whole or not at all."""
    tensors = dict(networks.generator or {})
    tensors |= {PREFIX + name: tensor for name, tensor in (networks.discriminator or {}).items()}
    options = {"generator": networks.generator_options, "discriminator": networks.discriminator_options}
    save_tensors(
        path,
        tensors,
        config=dataclasses.asdict(networks.config),
        images=networks.images,
        **{network: given for network, given in options.items() if given},
    )


def read_own(path: Path | str) -> Pretrained:
    """What one of our files holds, or a run's folder: the averaged generator, and the discriminator of the
    newest checkpoint.

    Raises UsageError for a file that is missing, damaged or not ours.
    """
    path = Path(path)
    file = path / GENERATOR_FILE if path.is_dir() else path
    if not file.is_file():
        raise UsageError(
            f"{file} does not exist; take a file, or the folder of a run that has saved its generator"
        )
    try:
        tensors, header = load_tensors(file)
        if "config" not in header and any(name.startswith("ema.") for name in tensors):
            raise ValueError("it is a checkpoint of training; take the folder of its run")
        if not header.keys() >= {"config", "images"}:
            raise ValueError("its header has no config; python -m fastgan.convert reads public checkpoints")
        config, images = read_config(header["config"]), header["images"]
        if type(images) is not int:
            raise ValueError(f"its count of images is {images!r:.40}")
        options = [dict(header.get(name, {})) for name in NETWORKS]
        generator = {name: t for name, t in tensors.items() if not name.startswith(PREFIX)}
        discriminator = {name.removeprefix(PREFIX): t for name, t in tensors.items() if name not in generator}
        if path.is_dir() and (found := checkpoints(path / "checkpoints")):
            discriminator = load_tensors(found[-1], "D.")[0]
        return Pretrained(config, generator or None, discriminator or None, *options, images=images)
    except (UsageError, ValueError, TypeError) as error:
        raise UsageError(f"{file} holds no network of fastgan: {error}") from None


def read(path: Path | str, network: str = "generator") -> Pretrained:
    """That network in any file or folder that fastgan knows, public checkpoints included."""
    # Here, as that module imports this one.
    from fastgan.convert import read as read_any

    return read_any(Path(path), network=network)


def load(path: Path | str, network: str = "generator", device: str = "auto") -> Any:
    """A network of the file or run folder at `path`, ready to use.

    network   "generator": a LoadedGenerator or, of CycleGAN, a LoadedTranslator; "discriminator": a
              LoadedDiscriminator
    device    auto (CUDA if there is one), cpu, cuda or cuda:N

    Raises UsageError where there is no such network or device.
    """
    return build(read(path, network), network, device)


def build(networks: Pretrained, network: str = "generator", device: str | torch.device = "auto") -> Any:
    """`load` of networks that have been read. torch's random state stays as it is."""
    state = getattr(networks, network)
    if state is None:
        raise UsageError(f"there is no {network} of --arch {networks.config.arch} in it")
    config, place_at = resolve_device(networks.config, str(device))
    make = build_generator if network == "generator" else build_discriminator
    options = getattr(networks, f"{network}_options")
    try:
        with torch.device("meta"):  # before memory is taken for what may be of another size
            check_fit(make(config, **options), state)
        with torch.random.fork_rng([]):
            net = make(config, **options)
        net.load_state_dict(state)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise UsageError(
            f"the {network} does not fit its own config (--arch {config.arch}): {reason}"
        ) from None
    place(net.eval().requires_grad_(False), place_at)
    if network == "discriminator":
        return LoadedDiscriminator(net, config, options)
    return (LoadedTranslator if getattr(net, "translates", False) else LoadedGenerator)(net, config, options)


def check_fit(net: torch.nn.Module, state: dict[str, Tensor]) -> None:
    """ValueError names the first tensor that is missing, of another shape, or too many."""
    wanted = {name: list(tensor.shape) for name, tensor in net.state_dict().items()}
    for name, shape in wanted.items():
        if name not in state:
            raise ValueError(f"{name} is missing")
        if list(state[name].shape) != shape:
            raise ValueError(f"{name} is {list(state[name].shape)} and should be {shape}")
    if strangers := state.keys() - wanted.keys():
        raise ValueError(f"it has no {min(strangers)}")


class _Loaded(torch.nn.Module):
    """A family's network `net`, made from the `config` of its run and from `options`."""

    def __init__(self, net: Any, config: Config, options: dict[str, Any]):
        super().__init__()
        self.net, self.config = net, config
        self._channels = options.get("channels", config.channels)
        self.eval()  # what net is already

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.net.parameters()).device

    def _tensor(self, x: Any) -> Tensor:
        """x where the network is and in its dtype."""
        weight = next(self.net.parameters())
        return torch.as_tensor(x, dtype=weight.dtype, device=weight.device)

    def _images(self, x: Any, channels: int) -> Tensor:
        """The same of images; ValueError for others."""
        x = torch.as_tensor(x)
        if x.ndim != 4 or x.shape[1] != channels or not x.is_floating_point():
            raise ValueError(
                f"images must be floats in -1..1 [N, {channels}, H, W]: got {x.dtype} {list(x.shape)}"
            )
        return self._tensor(x)

    def _labels(self, c: Any, count: int) -> Tensor | None:
        """Labels int64 [N] or weights of the classes [N, c_dim] as the latter; ValueError for others."""
        c_dim = self.net.c_dim
        form = f"labels int64 [{count}] below {c_dim} or one-hot [{count}, {c_dim}]"
        if c is None:
            if c_dim == 0:
                return None
            raise ValueError(f"c must be given to a conditional network: {form}")
        c = torch.as_tensor(c, device=self.device)
        if c_dim == 0:
            if c.shape == (count, 0):
                return None
            raise ValueError("c must not be given: the network knows no classes")
        if c.shape == (count, c_dim):
            return self._tensor(c)
        if c.shape != (count,) or c.is_floating_point() or (count and not 0 <= c.min() <= c.max() < c_dim):
            raise ValueError(f"c must be {form}: got {c.dtype} {list(c.shape)}")
        return self._tensor(one_hot(c, c_dim))


class _Part:
    """A StyleGAN's `module`, called as the whole network is; all else is the module's own."""

    def __init__(self, module: Any, call: Callable[..., Tensor]):
        self._module, self._call = module, call

    def __call__(self, *args: Any, **named: Any) -> Tensor:
        return self._call(*args, **named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class LoadedGenerator(_Loaded):
    """A trained generator. Arrays are taken where tensors are, and moved to its device."""

    @property
    def z_dim(self) -> int:
        """Dimensions of the latent."""
        return self.net.z_dim

    @property
    def c_dim(self) -> int:
        """Number of classes, 0 without."""
        return self.net.c_dim

    @property
    def styled(self) -> bool:
        """Whether it is a StyleGAN's, with `mapping` and `synthesis`."""
        return hasattr(self.net, "mapping")

    @property
    def mapping(self) -> Any:
        """Of a StyleGAN: (z, c=None, truncation=1, truncation_cutoff=None) -> w [N, num_ws, w_dim]."""
        return _Part(self.net.mapping, self._mapped)

    @property
    def synthesis(self) -> Any:
        """Of a StyleGAN: (ws [N, num_ws, w_dim], noise="const", seed=0) -> images."""
        return _Part(self.net.synthesis, self._synthesized)

    def _mapped(
        self, z: Any, c: Any = None, truncation: float = 1.0, truncation_cutoff: int | None = None
    ) -> Tensor:
        z = self._latents(z)
        return self.net.mapping(z, self._labels(c, len(z)), truncation, truncation_cutoff)

    def _synthesized(self, ws: Any, noise: str | Tensor = "const", seed: int = 0) -> Tensor:
        ws = self._tensor(ws)
        if ws.ndim != 3 or ws.shape[1] != self.synthesis.num_ws:
            raise ValueError(f"w must be [N, {self.synthesis.num_ws}, w_dim]: got {list(ws.shape)}")
        return self.net.synthesis(ws, self._noise(noise, len(ws), seed))

    def _latents(self, z: Any) -> Tensor:
        """[N, z_dim]; ValueError for others."""
        z = self._tensor(z)
        if z.ndim == 4 and z.shape[2:] == (1, 1):
            z = z.flatten(1)
        if z.ndim != 2 or z.shape[1] != self.z_dim:
            raise ValueError(f"z must be [N, {self.z_dim}]: got {list(z.shape)}")
        return z

    def _noise(self, noise: Any, count: int, seed: int = 0) -> Tensor | str:
        """What a synthesis network takes; ValueError for what it does not."""
        if isinstance(noise, str) and noise == "random":
            noise = noises(seed, count, self.synthesis.noise_size)
        if isinstance(noise, str) and noise in NOISES:
            return noise
        shape = (count, self.synthesis.noise_size)
        if isinstance(noise, str) or tuple(np.shape(noise)) != shape:
            raise ValueError(f"noise must be {', '.join(NOISES)} or numbers {list(shape)}: got {noise!r:.40}")
        return self._tensor(noise)

    def forward(
        self,
        z: Any,
        c: Any = None,
        truncation: float = 1.0,
        noise: str | Tensor = "const",
        truncation_cutoff: int | None = None,
        seed: int = 0,
    ) -> Tensor:
        """Images float32 [N, C, H, W], unclamped, in about -1..1; pairs [N, 2C, H, W] of two domains.

        z [N, z_dim] (or [N, z_dim, 1, 1]); c labels int64 [N] or one-hot [N, c_dim]. `noise` is "const" (the
        network's own), "none", "random" (sample i's is drawn from seed and i) or unit normal numbers
        [N, synthesis.noise_size]; a network without noise inputs gives the same images for each. `truncation`
        moves w towards its mean, on the first `truncation_cutoff` layers if given: StyleGANs alone.

        Raises ValueError for what does not fit.
        """
        z = self._latents(z)
        c = self._labels(c, len(z))
        if self.styled:
            return self.net(z, c, truncation, truncation_cutoff, self._noise(noise, len(z), seed))
        if isinstance(noise, str) and noise not in NOISES:
            raise ValueError(f"noise must be {', '.join(NOISES)}: got {noise!r}")
        if truncation != 1:
            raise ValueError(
                f"--arch {self.config.arch} has no w to truncate: draw z within bounds (sample does)"
            )
        return self.net(z, c)

    def sample(
        self, n: int, seed: int = 0, label: int | None = None, truncation: float = 1.0, noise: str = "const"
    ) -> np.ndarray:
        """uint8 [n, H, W, C], the i-th a function of (seed, i) alone and the i-th of fastgan.generate.

        Classes take turns unless `label` chooses one; pairs stand side by side [n, H, 2W, C].
        """
        if n < 1:
            raise ValueError(f"n must be at least 1: got {n}")
        if seed < 0:
            raise ValueError(f"seed must be at least 0: got {seed}")
        if label is not None and self.c_dim == 0:
            raise ValueError("label must be None: the network knows no classes")
        if label is not None and (isinstance(label, str) or np.ndim(label) or not 0 <= label < self.c_dim):
            raise ValueError(f"label must be a number from 0 to {self.c_dim - 1}: got {label!r}")
        if not (self.styled or 0 < truncation <= 1):
            raise ValueError(f"truncation must lie above 0 and be at most 1: got {truncation}")
        if noise not in NOISES:
            raise ValueError(f"noise must be {', '.join(NOISES)}: got {noise!r}")
        plan = Plan(n, seed, truncation, noise=noise, c=labels(n, self.c_dim, label))
        return np.concatenate(list(samples(self, plan, self.shown)))

    def shown(self, images: Tensor) -> Tensor:
        """Images as one looks at them: uint8 [N, H, W, C] on their device, pairs side by side."""
        return quantize(join_pair(images) if self.config.domains == 2 else images)


class LoadedTranslator(_Loaded):
    """CycleGAN's trained generators."""

    def forward(self, images: Any, to: str = "b") -> Tensor:
        """Images [N, C, H, W] in -1..1 of one domain as images of the domain `to`, "a" or "b".

        Raises ValueError for what does not fit.
        """
        return self.net.translate(self._images(images, self._channels), to)

    translate = forward


class LoadedDiscriminator(_Loaded):
    """A trained discriminator; a minibatch standard deviation in it looks at the images given together."""

    def forward(self, images: Any, c: Any = None) -> Tensor:
        """Logits of images [N, C, H, W] in -1..1 (pairs [N, 2C, H, W]) with labels c as a generator's.

        Raises ValueError for what does not fit.
        """
        pairs = self.config.domains == 2 and getattr(self.net, "b", self) is not None  # else of one domain
        images = self._images(images, self._channels * (2 if pairs else 1))
        return self.net(images, self._labels(c, len(images)))
