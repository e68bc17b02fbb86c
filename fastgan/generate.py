"""python -m fastgan.generate: pictures from a trained generator."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fastgan import cli, explore, outputs
from fastgan.config import UsageError
from fastgan.data import images_for
from fastgan.engine import keep_freed_memory
from fastgan.images import grid, quantize, save_image, split_pair
from fastgan.pretrained import LoadedGenerator, LoadedTranslator, build, read, read_own
from fastgan.sampling import NOISES, Plan, labels, samples, translations

COUNT = 64
ARCHIVES = (".npz", ".safetensors", ".zip")  # data sets of one file; any other name is a folder


def parser() -> cli.Parser:
    """The command's options."""
    p = cli.Parser(
        prog="fastgan generate",
        description="Generate pictures. Same seed, same pictures, whatever --count and --batch.",
    )
    source = p.add_argument_group("the network").add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, help="folder of a run")
    source.add_argument(
        "--weights",
        metavar="FILE",
        type=Path,
        help="a .safetensors of ours, or a checkpoint that convert reads",
    )
    _add_inputs(p.add_argument_group("what it is given"))
    _add_outputs(p)
    explore.add_flags(p)
    speed = p.add_argument_group("how it is run")
    speed.add_argument(
        "--batch",
        type=int,
        default=64,
        help="images that a GPU works ahead; changes no picture (default: 64)",
    )
    speed.add_argument(
        "--compile",
        action="store_true",
        help="compile the network first: on a CPU it pays from some 10,000 images of 64 pixels on, later for "
        "smaller ones",
    )
    speed.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    return p


def _add_inputs(p: argparse._ArgumentGroup) -> None:
    p.add_argument(
        "--count", type=int, help=f"number of images (default: {COUNT}, or all of --latents or --translate)"
    )
    p.add_argument("--seed", type=int, default=0, help="seed of the latents and of random noise (default: 0)")
    p.add_argument(
        "--class",
        dest="label",
        metavar="CLASS",
        type=int,
        help="of a conditional network (default: all in turn)",
    )
    p.add_argument(
        "--latents", metavar="Z.npy", type=Path, help="these latents [N, z_dim] in place of drawn ones"
    )
    p.add_argument("--labels", metavar="C.npy", type=Path, help="their classes [N], or one-hot [N, classes]")
    p.add_argument(
        "--truncation",
        metavar="PSI",
        type=float,
        default=1.0,
        help="below 1: less varied, more typical. StyleGANs move w towards its mean (0: all the way), others "
        "redraw the numbers of z that lie beyond (default: 1, off)",
    )
    p.add_argument(
        "--truncation-cutoff", metavar="LAYERS", type=int, help="truncate w for so many layers (default: all)"
    )
    p.add_argument(
        "--noise",
        choices=NOISES,
        default="const",
        help="of StyleGANs: the network's own, none, or another for each image; others have none "
        "(default: const)",
    )
    p.add_argument(
        "--translate",
        metavar="DATA",
        help="of CycleGAN: what to translate (default: the run's own data). Pictures show it on the left and "
        "what comes of it on the right; --to-dataset and --float hold the latter alone",
    )
    p.add_argument(
        "--to",
        choices=("a", "b"),
        help="of CycleGAN: domain to translate to; of CoGAN: domain of --to-dataset's images (default: b)",
    )


def _add_outputs(p: cli.Parser) -> None:
    group = p.add_argument_group("what is written")
    target = group.add_mutually_exclusive_group(required=True)
    target.add_argument("--out", type=Path, help="folder to write pictures to")
    target.add_argument(
        "--to-dataset",
        metavar="OUT",
        type=Path,
        help="a data set to train on: a folder with a sub-folder a class, a .zip, .npz or .safetensors",
    )
    group.add_argument(
        "--format", choices=("png", "npz", "grid"), help="single images (default), one array or one grid"
    )
    group.add_argument(
        "--float",
        dest="raw",
        action="store_true",
        help="with --format npz: what the network returns, float32 [N, C, H, W] in about -1..1, not clamped",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return cli.run(_main, argv)


def _main(argv: Sequence[str] | None) -> int:
    args = parser().parse_args(argv)
    _check_options(args)
    G = build(read_own(args.run) if args.run else read(args.weights), "generator", args.device)
    keep_freed_memory(G.device)
    explore.check(args, G.config, G.net)
    if isinstance(G, LoadedGenerator):
        _check_truncation(args, G)
    with _writing(args.to_dataset or args.out):
        said = explore.run(G.net, G.config, args)
    if said is None:
        job = _translating(args, G) if isinstance(G, LoadedTranslator) else _sampling(args, G)
        with _writing(args.to_dataset or args.out):
            if args.to_dataset:
                where = _save_dataset(args.to_dataset, job)
            else:
                where = _save_pictures(args.out, job, args.format, args.seed)
        said = f"{job.count} images: {where}"
    print(said)
    return 0


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    """UsageError for what the system says against it."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"{target} cannot be written: {error.strerror or error}") from None


def _check_options(args: argparse.Namespace) -> None:
    """What can be said before the network is read."""
    if args.batch < 1 or (args.count is not None and args.count < 1):
        raise UsageError(f"--count and --batch must be at least 1: got {args.count} and {args.batch}")
    if not 0 <= args.truncation <= 1:
        raise UsageError(f"--truncation must lie between 0 and 1: got {args.truncation}")
    if args.seed < 0:
        raise UsageError(f"--seed must be at least 0: got {args.seed}")
    if args.labels and not args.latents:
        raise UsageError("--labels are those of --latents, which are missing; --class takes one for all")
    if args.labels and args.label is not None:
        raise UsageError("--labels and --class exclude each other; choose one")
    if args.to_dataset and args.format:
        raise UsageError("--format does not go with --to-dataset, whose name says its format")
    if args.raw and args.format != "npz":
        raise UsageError("--float is for --format npz alone")
    target, single = args.to_dataset or args.out, bool(args.to_dataset) and args.to_dataset.suffix in ARCHIVES
    if target.exists() and target.is_dir() == single:
        what = "a folder; name a file" if single else "a file; name a folder"
        raise UsageError(f"{'--to-dataset' if args.to_dataset else '--out'} {target} is {what}")


def _check_truncation(args: argparse.Namespace, G: LoadedGenerator) -> None:
    """UsageError for a truncation that the family has not."""
    arch, cutoff = f"--arch {G.config.arch}", args.truncation_cutoff
    if args.truncation == 0 and not G.styled:
        raise UsageError(f"--truncation 0 leaves {arch} no z to draw; take a number above 0")
    if cutoff is not None and not G.styled:
        raise UsageError(f"--truncation-cutoff does not apply to {arch}, only to StyleGANs")
    if cutoff is not None and not 0 <= cutoff <= G.synthesis.num_ws:
        raise UsageError(f"--truncation-cutoff must lie between 0 and {G.synthesis.num_ws}: got {cutoff}")


@dataclass(frozen=True)
class Job:
    """Images to be made, uint8 [n, H, W, C] or, with --float, float32 [n, C, H, W], chunk by chunk."""

    count: int
    chunks: Iterator[np.ndarray]
    labels: np.ndarray | None  # int64 [count], or weights of the classes float32 [count, classes]
    classes: tuple[str, ...]

    def shown(self) -> Iterator[np.ndarray]:
        """The chunks, behind a progress bar."""
        with tqdm(total=self.count, unit="img", unit_scale=True, disable=None, leave=False) as bar:
            for chunk in self.chunks:
                yield chunk
                bar.update(len(chunk))


def _sampling(args: argparse.Namespace, G: LoadedGenerator) -> Job:
    """The job of a generator of images from latents."""
    arch = f"--arch {G.config.arch}"
    if args.translate:
        raise UsageError(f"--translate does not apply to {arch}, which makes images from latents")
    if args.to and not (G.config.domains == 2 and args.to_dataset):
        raise UsageError(f"--to does not apply to {arch}" + ", but to --to-dataset" * (G.config.domains == 2))
    if args.label is not None and G.c_dim == 0:
        raise UsageError(f"--class: this network of {arch} is not conditional; train with --cond")
    if args.label is not None and not 0 <= args.label < G.c_dim:
        raise UsageError(f"--class must lie between 0 and {G.c_dim - 1}: got {args.label}")
    if args.latents and args.truncation < 1 and not G.styled:
        raise UsageError(f"--truncation draws the latents of {arch}, so it does not go with --latents")
    z = _read_latents(args.latents, G.z_dim) if args.latents else None
    count = _count(args.count, len(z), str(args.latents)) if z is not None else args.count or COUNT
    c = _read_labels(args.labels, len(z), G.c_dim) if args.labels and z is not None else None
    c = labels(count, G.c_dim, args.label) if c is None else c[:count]
    if args.to_dataset and c is not None and c.ndim == 2:
        raise UsageError(
            "--to-dataset needs one class an image: give --labels as numbers [N] or as one-hot rows"
        )

    def finish(images: Tensor) -> Tensor:
        if args.raw:
            return images.clone()
        if args.to_dataset and G.config.domains == 2:
            return quantize(split_pair(images)["ab".index(args.to or "b")])
        return G.shown(images)

    plan = Plan(count, args.seed, args.truncation, args.truncation_cutoff, args.noise, z, c)
    width = len(str(max(G.c_dim - 1, 0)))
    names = tuple(f"{label:0{width}d}" for label in range(G.c_dim))
    return Job(count, samples(G, plan, finish, **explore.running(args)), c, names)


def _translating(args: argparse.Namespace, G: LoadedTranslator) -> Job:
    """The job of a translator of images."""
    given = {"--class": args.label, "--latents": args.latents, "--truncation-cutoff": args.truncation_cutoff}
    given["--truncation"] = None if args.truncation == 1 else args.truncation
    for name, value in given.items():
        if value is not None:
            raise UsageError(
                f"{name} does not apply to --arch {G.config.arch}, which has no latents; it translates"
            )
    to, config = args.to or "b", G.config
    if getattr(G.net, "a_to_b" if to == "b" else "b_to_a") is None:
        raise UsageError(f"--to {to}: this network translates the other way alone")
    data = args.translate or (config.data if to == "b" else config.data_b)
    try:
        found = images_for(config, data)
    except UsageError as error:  # may name options that this command has not
        raise UsageError(f"--translate: {error}; python -m fastgan.prepare makes data that fits") from None
    count = _count(args.count or (None if args.translate else min(COUNT, len(found))), len(found), data)

    def finish(real: Tensor, fake: Tensor) -> Tensor:
        if args.raw:
            return fake.clone()
        if args.to_dataset:
            return quantize(fake)
        channels = max(real.shape[1], fake.shape[1])  # gray beside colours becomes gray in three channels
        return quantize(torch.cat([x.expand(-1, channels, -1, -1) for x in (real, fake)], dim=3))

    chunks = translations(G, found.images[:count], to, finish, **explore.running(args))
    return Job(count, chunks, None if found.labels is None else found.labels[:count].numpy(), found.classes)


def _count(asked: int | None, there: int, source: str) -> int:
    if asked is not None and asked > there:
        raise UsageError(f"--count {asked} is more than the {there} of {source}")
    return asked or there


def _read_latents(path: Path, z_dim: int) -> np.ndarray:
    """[N, z_dim], mapped into memory."""
    z = _read_npy(path, "--latents")
    if z.ndim == 4 and z.shape[2:] == (1, 1):
        z = z[:, :, 0, 0]
    if z.ndim != 2 or z.shape[1] != z_dim or len(z) == 0 or z.dtype.kind != "f":
        raise UsageError(f"--latents {path} must be floats [N, {z_dim}]: got {z.dtype} {list(z.shape)}")
    return z


def _read_labels(path: Path, count: int, c_dim: int) -> np.ndarray:
    """int64 [count], from one-hot rows as well; other rows stay weights, float32 [count, c_dim]."""
    if c_dim == 0:
        raise UsageError(f"--labels {path}: this network is not conditional, it knows no classes")
    c = _read_npy(path, "--labels")
    if c.shape == (count, c_dim) and c.dtype.kind in "fiub":
        one_hot = np.isin(c, (0, 1)).all() and (c.sum(axis=1) == 1).all()
        return c.argmax(axis=1) if one_hot else c.astype(np.float32)
    if c.shape != (count,) or c.dtype.kind not in "iu":
        raise UsageError(
            f"--labels {path} must be integers [{count}] or one-hot [{count}, {c_dim}], as there are {count} "
            f"latents: got {c.dtype} {list(c.shape)}"
        )
    if c.min() < 0 or c.max() >= c_dim:
        raise UsageError(f"--labels {path} must lie between 0 and {c_dim - 1}: got {c.min()} to {c.max()}")
    return c.astype(np.int64)


def _read_npy(path: Path, name: str) -> np.ndarray:
    """The array of a .npy file, mapped into memory."""
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError) as error:
        raise UsageError(f"{name} {path} cannot be read as a .npy file of numbers: {error}") from None
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise UsageError(f"{name} {path} holds numbers that are not finite")
    return array


def _save_pictures(out: Path, job: Job, form: str | None, seed: int) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    if form == "npz":
        path = out / f"seed{seed}.npz"
        outputs.save_npz(path, job.count, job.shown(), job.labels)
    elif form == "grid":
        path = out / f"seed{seed}.png"
        save_image(path, grid(np.concatenate(list(job.shown()))))
    else:
        path = out
        outputs.save_pngs([out / f"seed{seed}-{i:05d}.png" for i in range(job.count)], job.shown())
    return path


def _save_dataset(out: Path, job: Job) -> Path:
    """UsageError if `out` is a folder with something else in it."""
    names = [f"img{i:08d}.png" for i in range(job.count)]
    if job.labels is not None:
        names = [f"{job.classes[k]}/{name}" for k, name in zip(job.labels.tolist(), names, strict=True)]
    if out.suffix not in ARCHIVES and (found := outputs.stranger(out, names)):
        raise UsageError(
            f"--to-dataset {out} holds {found}, which is not of this data set; take another folder"
        )
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    if out.suffix in (".npz", ".safetensors"):
        save = outputs.save_npz if out.suffix == ".npz" else outputs.save_safetensors
        save(out, job.count, job.shown(), job.labels)
    else:
        save = outputs.save_zip if out.suffix == ".zip" else outputs.save_folder
        save(out, names, job.shown(), job.labels)
    return out


if __name__ == "__main__":
    sys.exit(main())
