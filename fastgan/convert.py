"""python -m fastgan.convert: networks of public implementations as files of ours.

Reads, by what a file holds and whatever its name is:

    stylegan2     stylegan2-ada-pytorch's and stylegan3's StyleGAN2, .pkl or a state dict
    rosinality    rosinality/stylegan2-pytorch, .pt
    biggan        BigGAN-PyTorch and its BigGAN-deep, G.pth, G_ema.pth and D.pth
    cyclegan      pytorch-CycleGAN, latest_net_G_A.pth and latest_net_D_A.pth: ResNets, PatchGANs, PixelGANs
    dcgan         pytorch/examples' dcgan and others of its build
    progan        pytorch_GAN_zoo's ProGAN
    r3gan         R3GAN, .pkl or a state dict
    fastgan       a run's folder or a .safetensors of ours

No code of the file is run, nothing that it names is imported, and what it claims to hold must be in it. Kind
and sizes are read off the tensors' names and shapes. State dicts are looked for under other keys and behind
prefixes such as "module."; of several generators an averaged one is taken.
"""

import argparse
import collections
import dataclasses
import inspect
import json
import math
import re
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastgan import cli, unpickle
from fastgan.checkpoint import load_tensors
from fastgan.config import (
    Config,
    UsageError,
    build_discriminator,
    build_generator,
    make_config,
    network_options,
)
from fastgan.engine import one_hot
from fastgan.models import family
from fastgan.pretrained import NETWORKS, Pretrained, check_fit, read_own, write_own
from fastgan.public import PEERS, UNSUPPORTED, Peer, Source
from fastgan.unpickle import Claim, Record, printable

KINDS = (*dict.fromkeys(peer.kind for peer in PEERS), "fastgan")
PREFIXES = 4  # in front of a name: "state_dict.generator.module.main.0.weight" has so many at most
DEPTH, MOST_NAMES, LONGEST_NAME = 16, 100_000, 200  # of what a checkpoint is searched for
LARGEST = 1 << 20  # of a network's sizes
AVERAGED = re.compile(r"ema|avg|average", re.IGNORECASE)
# What shapes that make no network come to, in adapters and constructors.
UNFIT = (ValueError, LookupError, TypeError, RuntimeError, ArithmeticError, AttributeError, AssertionError)
BUILDERS = {"generator": build_generator, "discriminator": build_discriminator}
BATCHES = 64  # of 64 samples of w, where its mean has to be estimated: as many as rosinality takes


@dataclasses.dataclass(frozen=True)
class Found:
    """A network in a file: its place there, what it is, its tensors, and what was beside them."""

    place: str
    peer: Peer
    claims: Mapping[str, Claim | Tensor]
    source: Source

    @property
    def network(self) -> str:
        """ "generator" or "discriminator"."""
        return self.peer.network


def parser() -> cli.Parser:
    """The command's options."""
    p = cli.Parser(prog="fastgan convert", description=__doc__, formatter_class=cli.Prose)
    p.add_argument("src", metavar="SRC", type=Path, help="a checkpoint, or the folder of a run")
    p.add_argument("out", metavar="OUT", type=Path, help="the .safetensors to write")
    p.add_argument("--kind", choices=KINDS, help="whose it is (default: what its tensors' names say)")
    p.add_argument(
        "--resolution",
        type=int,
        help="side of the images, where the tensors do not tell: of cyclegan, whose networks take any "
        "(default: 256), and of dcgan, for sides that are no doublings of the first map's",
    )
    p.add_argument(
        "--alpha",
        type=float,
        help="of a progan saved while a resolution was fading in: the weight of the old one, as "
        "pytorch_GAN_zoo counts (default: what the checkpoint's config says, or 0)",
    )
    p.add_argument(
        "--set",
        dest="arguments",
        metavar="NAME=VALUE",
        type=_argument,
        action="append",
        default=[],
        help="an argument of the networks' constructors that tensors cannot tell, such as mbstd_group=2, "
        "conv_clamp=256 or slope=0.1; may be given again",
    )
    p.add_argument(
        "--network", choices=NETWORKS, help="convert this one alone (default: whichever there are)"
    )
    return p


def _argument(text: str) -> tuple[str, Any]:
    name, sign, value = text.partition("=")
    if not sign:
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE: got {text}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def read(
    path: Path,
    kind: str | None = None,
    resolution: int | None = None,
    alpha: float | None = None,
    arguments: Mapping[str, Any] | None = None,
    network: str | None = None,
) -> Pretrained:
    """The networks in any file that fastgan knows, under our names.

    `kind` is one of KINDS, for what is taken for another; the rest as the command's options, `arguments`
    those of --set. With `network` the other one is not looked at. Raises UsageError for a file that is
    damaged, hostile, or holds no network that is known.
    """
    path = Path(path)
    if kind is not None and kind not in KINDS:
        raise UsageError(f"kind must be one of {', '.join(KINDS)}: got {kind}")
    if network not in (None, *NETWORKS):
        raise UsageError(f"network must be {' or '.join(NETWORKS)}: got {network!r}")
    if kind == "fastgan" or (kind is None and _is_own(path)):
        return _own(path, network)
    found = find(path, kind, network)
    return _converted(path, _chosen(path, found, resolution, alpha, network), arguments or {})


def _own(path: Path, network: str | None) -> Pretrained:
    networks = read_own(path)
    if network is None:
        return networks
    if getattr(networks, network) is None:
        raise UsageError(f"{path} holds no {network}")
    other = next(name for name in NETWORKS if name != network)
    return dataclasses.replace(networks, **{other: None, f"{other}_options": {}})


def _is_own(path: Path) -> bool:
    """A folder, or a safetensors file with a header of ours."""
    if path.is_dir():
        return True
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            return "fastgan" in (file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path} is no intact safetensors file: {error}") from None


def find(path: Path, kind: str | None = None, network: str | None = None) -> list[Found]:
    """All networks of that kind and sort, or of any, in the file."""
    if path.suffix == ".safetensors":
        if not path.is_file():
            raise UsageError(f"{path} does not exist")
        try:
            root: Any = dict(sorted(load_tensors(path)[0].items(), key=_in_a_row))
        except (ValueError, OSError) as error:
            raise UsageError(f"{path} cannot be read: {error}") from None
    else:
        root = unpickle.read(path)
    found: list[Found] = []
    seen: set[int] = set()
    left: collections.deque[tuple[tuple[str, ...], Any, Any]] = collections.deque([((), root, {})])
    while left:
        place, value, beside = left.popleft()
        if id(value) in seen or len(place) > DEPTH:
            continue
        seen.add(id(value))
        if isinstance(value, list | tuple):
            inner = ((i, item) for i, item in enumerate(value) if isinstance(item, dict | list | tuple))
            left.extend(((*place, str(i)), item, {}) for i, item in inner)
        if not isinstance(value, dict):
            continue
        module = isinstance(value, Record) and "_modules" in value
        state = _flat(path, value) if module else value
        state = {k: v for k, v in state.items() if isinstance(k, str) and isinstance(v, Claim | Tensor)}
        source = Source(attributes=value if module else {}, beside=beside)
        networks = list(_networks(path, place, state, source, kind))
        found += networks
        if not module and not any(network.place == _named(place) for network in networks):
            left.extend(
                ((*place, key), item, value)
                for key, item in value.items()
                if isinstance(key, str) and len(key) <= LONGEST_NAME and isinstance(item, dict | list | tuple)
            )
    return [f for f in found if network in (None, f.network)]


def _in_a_row(item: tuple[str, Any]) -> list[str | int]:
    """A key that puts layer 10 behind layer 2: safetensors are sorted as text, and dcgan's rows by place."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", item[0]))]


def _named(place: tuple[str, ...]) -> str:
    return printable(".".join(place))


def _flat(path: Path, module: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict of a module of which only attributes are known."""
    state: dict[str, Any] = {}
    left, count = [("", module, 0)], 0
    while left:
        prefix, record, depth = left.pop()
        inner = record.get("_modules")
        for group in (record.get("_parameters"), record.get("_buffers"), inner):
            if not isinstance(group, dict):
                continue
            count += len(group)
            named = all(isinstance(name, str) and len(name) <= LONGEST_NAME for name in group)
            if count > MOST_NAMES or depth > DEPTH or not named:
                raise UsageError(f"{path} is refused: its modules hold one another without end")
            if group is inner:
                inside = [(f"{prefix}{n}.", m, depth + 1) for n, m in group.items() if isinstance(m, dict)]
                left += inside[::-1]  # the first is the next
            else:
                state |= {f"{prefix}{name}": tensor for name, tensor in group.items()}
    return state


def _networks(
    path: Path,
    place: tuple[str, ...],
    state: Mapping[str, Claim | Tensor],
    source: Source,
    kind: str | None,
    prefixes: int = 0,
) -> Iterator[Found]:
    """The networks that `state` is or, behind prefixes, has."""
    for key, what in UNSUPPORTED.items():
        if key in state:
            raise UsageError(f"{path} holds {what}")
    for peer in PEERS if state else ():
        if kind in (None, peer.kind) and peer.matches(state):
            yield Found(_named(place), peer, state, source)
            return
    groups: dict[str, dict[str, Claim | Tensor]] = {}
    for name, claim in state.items():
        head, dot, rest = name.partition(".")
        if dot and prefixes < PREFIXES:
            groups.setdefault(head, {})[rest] = claim
    for head, group in groups.items():
        inner = source.attributes.get("_modules", {}).get(head, {})
        inner = dataclasses.replace(source, attributes=inner if isinstance(inner, Mapping) else {})
        yield from _networks(path, (*place, head), group, inner, kind, prefixes + 1)


def _chosen(
    path: Path,
    found: Sequence[Found],
    resolution: int | None,
    alpha: float | None,
    sort: str | None,
) -> dict[str, Found]:
    """One network of each sort, of one kind: averaged before others, the first before later ones."""
    if not found:
        raise UsageError(
            f"{path} holds no {sort or 'network'} that is known; kinds are {', '.join(KINDS)}, "
            "and --kind names one"
        )
    chosen: dict[str, Found] = {}
    for network in sorted(found, key=lambda f: not AVERAGED.search(f.place)):
        if all(network.peer.kind == other.peer.kind for other in chosen.values()):
            chosen.setdefault(network.network, network)
    kind = next(iter(chosen.values())).peer.kind
    for option, value, kinds in (
        ("--resolution", resolution, ("cyclegan", "dcgan")),
        ("--alpha", alpha, ("progan",)),
    ):
        if value is not None and kind not in kinds:
            raise UsageError(f"{option} does not apply to {path}, a {kind}, only to {' and '.join(kinds)}")
    return {
        name: dataclasses.replace(
            network, source=dataclasses.replace(network.source, resolution=resolution, alpha=alpha)
        )
        for name, network in chosen.items()
    }


def _converted(path: Path, chosen: Mapping[str, Found], arguments: Mapping[str, Any]) -> Pretrained:
    states: dict[str, dict[str, Tensor]] = {}
    options: dict[str, dict[str, Any]] = {"generator": {}, "discriminator": {}}
    for name in chosen:
        states[name], options[name] = _convert(path, chosen, name)
    arch = next(iter(chosen.values())).peer.arch
    known = {name: inspect.signature(getattr(family(arch), name.capitalize())).parameters for name in states}
    for key, value in arguments.items():
        if not any(key in parameters for parameters in known.values()):
            raise UsageError(f"--set {key}: no network of --arch {arch} in {path} has such an argument")
        for name, parameters in known.items():
            if key in parameters:
                _check_argument(key, value, parameters[key].annotation)
                options[name][key] = value
    config = _config(path, arch, options["discriminator"] | options["generator"])
    for name, state in states.items():
        options[name] = _beyond(config, name, options[name])
        mean = arch == "stylegan" and name == "generator" and "mapping.w_avg" not in state
        try:
            with torch.device("meta"):
                net = BUILDERS[name](config, **options[name])
            check_fit(net, state | ({"mapping.w_avg": net.mapping.w_avg} if mean else {}))
        except UNFIT as error:
            raise _unknown(path, chosen, name, error) from None
        if mean:
            state["mapping.w_avg"] = _mean_w(config, options[name], state)
    return Pretrained(
        config,
        states.get("generator"),
        states.get("discriminator"),
        options["generator"],
        options["discriminator"],
        images=0,
    )


def _check_argument(key: str, value: Any, kind: Any) -> None:
    """UsageError if `value` of --set, as JSON has it, is not of the `kind` that a parameter declares."""

    def fits(value: Any, kind: Any) -> bool:
        if typing.get_origin(kind) is Sequence:
            return isinstance(value, list) and all(fits(v, *typing.get_args(kind)) for v in value)
        if isinstance(kind, types.UnionType):
            return any(fits(value, k) for k in typing.get_args(kind))
        if kind is float:
            return type(value) in (int, float) and math.isfinite(value)
        return kind in (int, bool, str, types.NoneType) and type(value) is kind

    if not fits(value, kind):
        wanted = kind.__name__ if isinstance(kind, type) else str(kind).replace("collections.abc.", "")
        raise UsageError(f"--set {key} must be of type {wanted}: got {value!s:.40}")


def _convert(path: Path, chosen: Mapping[str, Found], name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors, in fp32 at least, and constructor arguments under our names."""
    network = chosen[name]
    state = _read(path, network.claims)
    beside = {k: v for k, v in network.source.beside.items() if k in ("latent_avg", "config")}
    mean = beside.get("latent_avg")
    if isinstance(mean, Claim):
        beside |= _read(path, {"latent_avg": mean})
    try:
        weights, options = network.peer.convert(state, dataclasses.replace(network.source, beside=beside))
    except UNFIT as error:
        raise _unknown(path, chosen, name, error) from None
    return weights, options


def _read(path: Path, claims: Mapping[str, Claim | Tensor]) -> dict[str, Tensor]:
    state = {k: v for k, v in claims.items() if isinstance(v, Tensor)}
    state |= unpickle.tensors(path, {k: v for k, v in claims.items() if isinstance(v, Claim)})
    half = (torch.float16, torch.bfloat16)
    return {k: state[k].float() if state[k].dtype in half else state[k] for k in claims}


def _unknown(path: Path, chosen: Mapping[str, Found], name: str, error: Exception) -> UsageError:
    network = chosen[name]
    what = f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
    what = printable((what or type(error).__name__).splitlines()[0])
    where = f"{network.place} of {path}" if network.place else str(path)
    return UsageError(
        f"{where} has the names of a {network.peer.kind} {network.network}, but cannot be one that is known: "
        f"{what}; --kind names another kind, of {', '.join(KINDS)}"
        + "".join(f", and --network {other} takes that one alone" for other in chosen if other != name)
    )


def _config(path: Path, arch: str, options: Mapping[str, Any]) -> Config:
    """The preset of `arch` with the networks' sizes, as far as it has fields for them, and in fp32: outputs
    are to equal the peer's."""
    if any(type(value) is int and value > LARGEST for value in options.values()):
        raise UsageError(f"{path} holds --arch {arch} in sizes that no network has")
    fields = {f.name: f for f in dataclasses.fields(Config)}
    given = {k: v for k, v in options.items() if k in fields and k in network_options(arch) and v is not None}
    given = {k: v for k, v in given.items() if not (choices := fields[k].metadata["choices"]) or v in choices}
    if "c_dim" in options:
        given |= {"cond": options["c_dim"] > 0, "classes": options["c_dim"]}
    if "hier" in network_options(arch) and "z_dim" not in options:
        given["hier"] = False  # of the generator that is not there, and has to fit every resolution
    try:
        if (group := given.get("mbstd_group", 1)) > 0:
            given["batch"] = group * max(1, 16 // group) * 2
        return make_config(arch, precision="fp32", **given)
    except (UsageError, *UNFIT) as error:
        raise UsageError(f"{path} holds --arch {arch} in sizes that fastgan cannot build: {error}") from None


def _beyond(config: Config, network: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a network's arguments that neither the config nor its constructor gives."""
    parameters = inspect.signature(getattr(family(config.arch), network.capitalize())).parameters
    usual = {name: parameter.default for name, parameter in parameters.items()}
    usual |= {name: getattr(config, name) for name in usual if hasattr(config, name)}
    usual = {name: list(value) if isinstance(value, tuple) else value for name, value in usual.items()}
    return {name: value for name, value in options.items() if usual[name] != value}


@torch.inference_mode()
def _mean_w(config: Config, options: Mapping[str, Any], state: Mapping[str, Tensor]) -> Tensor:
    """The mean w of random latents, and labels; a function of the weights alone."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        G = build_generator(config, **options)
        G.load_state_dict({**state, "mapping.w_avg": G.mapping.w_avg})
        total = torch.zeros_like(G.mapping.w_avg)
        for _ in range(BATCHES):
            z = torch.randn(64, G.z_dim)
            c = one_hot(torch.randint(G.c_dim, [64]), G.c_dim) if G.c_dim else None
            total += G.mapping(z, c)[:, 0].mean(0)
        return (total / BATCHES).clone()


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return cli.run(_main, argv)


def _main(argv: Sequence[str] | None) -> int:
    args = parser().parse_args(argv)
    _check_out(args)
    if args.kind == "fastgan" or (args.kind is None and _is_own(args.src)):
        networks = _own(args.src, args.network)
        print(f"{args.src}: fastgan, --arch {networks.config.arch}")
        places, left = {}, []
    else:
        found = find(args.src, args.kind, args.network)
        chosen = _chosen(args.src, found, args.resolution, args.alpha, args.network)
        networks = _converted(args.src, chosen, dict(args.arguments))
        kind = next(iter(chosen.values())).peer.kind
        print(f"{args.src}: {kind}, in fastgan --arch {networks.config.arch}")
        places = {name: network.place for name, network in chosen.items()}
        left = [f"{f.network} {f.place or '(all of it)'}" for f in found if f.place not in places.values()]
    for name in NETWORKS:
        state = getattr(networks, name)
        if state is not None:
            print(f"  {name:14}{_described(networks, name, places.get(name, ''))}")
    if left:
        print(f"  {'left out':14}{', '.join(left)}")
    try:
        write_own(args.out, networks)
    except OSError as error:
        raise UsageError(f"{args.out} cannot be written: {error.strerror}") from None
    print(f"wrote {args.out}, {args.out.stat().st_size / 2**20:.1f} MiB")
    return 0


def _check_out(args: argparse.Namespace) -> None:
    if args.out.suffix != ".safetensors":
        raise UsageError(f"OUT must end in .safetensors: got {args.out}")
    if not args.out.parent.is_dir():
        raise UsageError(f"{args.out.parent} is not a folder; make it or choose another OUT")
    if args.resolution is not None and args.resolution < 1:
        raise UsageError(f"--resolution must be at least 1: got {args.resolution}")


def _described(networks: Pretrained, name: str, place: str) -> str:
    config, options = networks.config, getattr(networks, f"{name}_options")

    def value(key: str) -> Any:
        return options.get(key, getattr(config, key))

    with torch.device("meta"):
        count = sum(p.numel() for p in BUILDERS[name](config, **options).parameters())
    parts = [f"{value('resolution')} pixels, {value('channels')} channels, {count:,} parameters"]
    if "z_dim" in network_options(config.arch) and name == "generator":
        parts.append(f"z of {value('z_dim')}")
    if "c_dim" in network_options(config.arch) and value("c_dim"):
        parts.append(f"{value('c_dim')} classes")
    parts += [f"{k} {v}" for k, v in options.items() if k not in ("resolution", "channels", "z_dim", "c_dim")]
    return (f"{place}: " if place else "") + ", ".join(parts)


if __name__ == "__main__":
    sys.exit(main())
