"""python -m fastgan.generate: pictures from a trained generator."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from fastgan import cli, explore
from fastgan.config import Config, UsageError, build_generator, resolve_device
from fastgan.data import ImageSet, load_images
from fastgan.engine import keep_freed_memory, one_hot, place
from fastgan.images import grid, save_image, side_by_side, to_uint8
from fastgan.models import Generator
from fastgan.run_folder import load_generator
from fastgan.sampling import latents


def parser() -> cli.Parser:
    p = cli.Parser(prog="fastgan generate", description="Generate pictures. Same seed, same pictures.")
    p.add_argument("--run", type=Path, required=True, help="folder of a run, or a generator.safetensors")
    p.add_argument("--count", type=int, default=64, help="number of images (default: 64)")
    p.add_argument("--out", type=Path, required=True, help="folder to write to")
    p.add_argument("--seed", type=int, default=0, help="seed of the latents (default: 0)")
    p.add_argument(
        "--class", dest="label", metavar="CLASS", type=int, help="of a conditional run (default: all in turn)"
    )
    p.add_argument(
        "--truncation", type=float, default=1.0, help="below 1: less varied, more typical (default: 1, off)"
    )
    p.add_argument(
        "--format", choices=("png", "npz", "grid"), default="png", help="single images, one array or one grid"
    )
    p.add_argument(
        "--translate", metavar="DATA", help="of CycleGAN: what to translate (default: the run's own data)"
    )
    p.add_argument("--to", choices=("a", "b"), default="b", help="of CycleGAN: domain to translate to")
    p.add_argument("--batch", type=int, default=64, help="images computed at a time (default: 64)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    explore.add_flags(p)
    return p


@torch.inference_mode()
def generate(
    G: Generator,
    config: Config,
    count: int,
    seed: int = 0,
    truncation: float = 1.0,
    batch: int = 64,
    label: int | None = None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Images uint8 [count, R, R, C] and, of a conditional run, their labels int64 [count].

    `label` is the class of all; without it they take turns. Families that map z to w truncate w towards its
    mean, others redraw z. A family of two domains gives pairs side by side, [count, R, 2R, C].
    """
    device = next(G.parameters()).device
    in_w = hasattr(G, "mapping")
    z = latents(seed, count, G.z_dim, None if in_w or truncation == 1 else truncation)
    options = {"truncation": truncation} if in_w else {}
    labels = None
    if config.cond:
        labels = torch.arange(count) % config.c_dim if label is None else torch.full((count,), label)
    parts = []
    for i in range(0, count, batch):
        c = None if labels is None else one_hot(labels[i : i + batch].to(device), config.c_dim)
        images = G(z[i : i + batch].to(device), c, **options)
        parts.append(side_by_side(images) if config.domains == 2 else to_uint8(images))
    return np.concatenate(parts), None if labels is None else labels.numpy()


@torch.inference_mode()
def translate(G: Generator, images: ImageSet, to: str, batch: int = 64) -> np.ndarray:
    """Images and their translations to domain `to` ("a" or "b"), side by side: uint8 [N, R, 2R, C]."""
    device = next(G.parameters()).device
    parts = []
    for part in images.images.split(batch):
        real = part.to(device) / 127.5 - 1
        parts.append(side_by_side(torch.cat([real, G.translate(real, to)], dim=1)))
    return np.concatenate(parts)


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(_main, argv)


def _main(argv: Sequence[str] | None) -> int:
    args = parser().parse_args(argv)
    if args.count < 1 or args.batch < 1:
        raise UsageError(f"--count and --batch must be at least 1: got {args.count} and {args.batch}")
    if not 0 < args.truncation <= 1:
        raise UsageError(f"--truncation must lie above 0 and be at most 1: got {args.truncation}")
    if args.seed < 0:
        raise UsageError(f"--seed must be at least 0: got {args.seed}")
    weights, config = load_generator(args.run)
    _check_label(args.label, config)
    _, device = resolve_device(dataclasses.replace(config, device=args.device))
    G = build_generator(config)
    try:
        G.load_state_dict(weights)
    except RuntimeError as error:
        raise UsageError(
            f"{args.run} does not fit its own config: {str(error).splitlines()[-1].strip()}"
        ) from None
    explore.check(args, config, G)
    place(G.eval(), device)
    keep_freed_memory(device)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {args.out} cannot be written: {error.strerror}") from None
    if (said := explore.run(G, config, args)) is not None:
        print(said)
        return 0
    if getattr(G, "translates", False):
        name = args.translate or (config.data if args.to == "b" else config.data_b)
        found = load_images(name, config.resolution, config.channels, config.crop)
        chosen = dataclasses.replace(found, images=found.images[: args.count], labels=None)
        images, labels = translate(G, chosen, args.to, args.batch), None
    else:
        images, labels = generate(G, config, args.count, args.seed, args.truncation, args.batch, args.label)
    print(_write(images, labels, args.out, args.format, args.seed))
    return 0


def _check_label(label: int | None, config: Config) -> None:
    if label is None:
        return
    if not config.cond:
        raise UsageError("--class: the run is not conditional; train with --cond")
    if not 0 <= label < config.c_dim:
        raise UsageError(f"--class must lie between 0 and {config.c_dim - 1}: got {label}")


def _write(images: np.ndarray, labels: np.ndarray | None, out: Path, form: str, seed: int) -> str:
    if form == "npz":
        path = out / f"seed{seed}.npz"
        if labels is None:
            np.savez_compressed(path, images=images)
        else:
            np.savez_compressed(path, images=images, labels=labels)
    elif form == "grid":
        path = out / f"seed{seed}.png"
        save_image(path, grid(images))
    else:
        for i, image in enumerate(images):
            save_image(out / f"seed{seed}-{i:05d}.png", image)
        path = out
    return f"{len(images)} images: {path}"


if __name__ == "__main__":
    sys.exit(main())
