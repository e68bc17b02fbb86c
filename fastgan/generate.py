"""python -m fastgan.generate: pictures from a trained generator."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastgan import cli
from fastgan.config import Config, UsageError, build_generator, resolve_device
from fastgan.engine import keep_freed_memory, place
from fastgan.images import grid, save_image, to_uint8
from fastgan.models import Generator
from fastgan.run_folder import load_generator


def parser() -> cli.Parser:
    p = cli.Parser(prog="fastgan generate", description="Generate pictures. Same seed, same pictures.")
    p.add_argument("--run", type=Path, required=True, help="folder of a run, or a generator.safetensors")
    p.add_argument("--count", type=int, default=64, help="number of images (default: 64)")
    p.add_argument("--out", type=Path, required=True, help="folder to write to")
    p.add_argument("--seed", type=int, default=0, help="seed of the latents (default: 0)")
    p.add_argument(
        "--truncation", type=float, default=1.0, help="below 1: less varied, more typical (default: 1, off)"
    )
    p.add_argument(
        "--format", choices=("png", "npz", "grid"), default="png", help="single images, one array or one grid"
    )
    p.add_argument("--batch", type=int, default=64, help="images computed at a time (default: 64)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    return p


def latents(seed: int, count: int, z_dim: int, bound: float | None = None) -> Tensor:
    """float32 [count, z_dim], the i-th a function of (seed, i) alone.

    `bound` redraws every number beyond it, the truncation trick on z (Brock et al. 2018, section 3.1).
    """
    z = np.empty((count, z_dim), np.float32)
    for i in range(count):
        rng = np.random.default_rng([seed, i])
        z[i] = rng.standard_normal(z_dim, np.float32)
        while bound is not None and (far := np.abs(z[i]) > bound).any():
            z[i, far] = rng.standard_normal(int(far.sum()), np.float32)
    return torch.from_numpy(z)


@torch.inference_mode()
def generate(
    G: Generator, config: Config, count: int, seed: int = 0, truncation: float = 1.0, batch: int = 64
) -> np.ndarray:
    """uint8 [count, R, R, C]. StyleGAN truncates w towards its mean, other families redraw z."""
    device = next(G.parameters()).device
    in_w = config.arch == "stylegan"
    z = latents(seed, count, config.z_dim, None if in_w or truncation == 1 else truncation)
    options = {"truncation": truncation} if in_w else {}
    parts = [to_uint8(G(part.to(device), **options)) for part in z.split(batch)]
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
    _, device = resolve_device(dataclasses.replace(config, device=args.device))
    G = build_generator(config)
    try:
        G.load_state_dict(weights)
    except RuntimeError as error:
        raise UsageError(
            f"{args.run} does not fit its own config: {str(error).splitlines()[-1].strip()}"
        ) from None
    place(G.eval(), device)
    keep_freed_memory(device)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {args.out} cannot be written: {error.strerror}") from None
    images = generate(G, config, args.count, args.seed, args.truncation, args.batch)
    print(_write(images, args.out, args.format, args.seed))
    return 0


def _write(images: np.ndarray, out: Path, form: str, seed: int) -> str:
    if form == "npz":
        path = out / f"seed{seed}.npz"
        np.savez_compressed(path, images=images)
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
