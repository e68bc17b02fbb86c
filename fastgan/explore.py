"""What `fastgan generate` does in the latent space: its flags, and the files that come of them."""

import argparse
import io
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fastgan import cli
from fastgan.checkpoint import load_tensors, replacing, save_tensors
from fastgan.config import Config, UsageError, flag
from fastgan.data.decode import MODES, read, reason
from fastgan.engine import one_hot
from fastgan.equalized import StyleGenerator
from fastgan.images import save_image, sheet, to_uint8
from fastgan.latent import (
    bend,
    find_directions,
    mix,
    once,
    pictures,
    points,
    shifted,
    slerp,
    ways,
)
from fastgan.models import Generator
from fastgan.projection import load_discriminator, project
from fastgan.sampling import latents

STRENGTHS = (-3, -2, -1, 0, 1, 2, 3)  # standard deviations
STYLES = {"coarse": (4, 8), "middle": (16, 32), "fine": (64, math.inf)}  # pixels; Karras 2018, figure 3
TILE = 64  # pixels that small pictures are enlarged to
MOST_SEEDS = 1000
MOVIES = ("gif", "webp", "mp4")
APPLIES = {  # the modes that a flag is for
    "seeds": ("interpolate", "directions"),
    **dict.fromkeys(("frames", "loop", "movie", "fps"), ("interpolate",)),
    **dict.fromkeys(("rows", "cols"), ("mix",)),
    "layers": ("mix", "directions", "direction"),
    "directions_method": ("directions", "direction"),
    "strength": ("direction",),
    **dict.fromkeys(("features", "steps"), ("project",)),
    "zoom": ("interpolate", "mix", "directions", "project"),
}
PLAIN = ("count", "format", "raw", "latents", "labels", "translate", "to")  # not for sheets and movies
NEUTRAL = {"truncation": 1.0, "noise": "const"}
FIXED = ("truncation", "truncation_cutoff", "noise", "compile")  # not for a projection, a loop of its own


def add_flags(p: cli.Parser) -> None:
    """The latent space's flags of `fastgan generate`, in a group of their own."""
    group = p.add_argument_group(
        "the latent space",
        "SEEDS are 1,5,9 or 3-6; 5 stands for the first picture of --seed 5, 5:17 for its picture 17, and "
        "FILE.safetensors for what --project has found. Conditional runs need a --class. Sheets and movies "
        "go to --out; --count and --format are for plain pictures.",
    )
    modes, add = group.add_mutually_exclusive_group(), group.add_argument
    modes.add_argument(
        "--interpolate",
        choices=("slerp", "lerp"),
        help="from seed to seed: slerp on circles in z, lerp on straight lines in w (z where there is no w)",
    )
    modes.add_argument(
        "--mix", action="store_true", help="a table that mixes the styles of --rows and --cols; StyleGANs"
    )
    modes.add_argument(
        "--directions", metavar="K", type=int, help="the K main directions, walked from -3 to 3 deviations"
    )
    modes.add_argument(
        "--direction",
        metavar="I",
        help="move all pictures along direction I, from 0 on, or along FILE:I of a directions.safetensors",
    )
    modes.add_argument("--project", metavar="IMAGE", type=Path, help="find the latents of an image")
    add("--seeds", help="to pass through, or to start from with --directions (default: from --seed on)")
    add("--frames", type=int, help="pictures from one seed to the next (default: 8, in a movie 24)")
    add("--loop", action="store_true", default=None, help="back to the first seed in the end")
    add("--movie", choices=MOVIES, help="instead of a sheet of stills; mp4 needs ffmpeg")
    add("--fps", type=int, help="frames of a movie a second (default: 24)")
    add("--rows", metavar="SEEDS", help="that give the rows their styles (default: three from --seed on)")
    add("--cols", metavar="SEEDS", help="whose styles columns take in --mix-layers (default: the next five)")
    add(
        "--mix-layers",
        "--layers",
        dest="layers",
        help="of a StyleGAN, to mix or to move in: coarse (4 and 8 pixels), middle (16, 32), fine (64 on) or "
        "numbers as 0-3,5 (default: coarse to mix, all to move)",
    )
    add(
        "--directions-method",
        choices=("pca", "sefa"),
        help="principal components of w, or eigenvectors of what reads w or z (default: pca if there is w)",
    )
    add("--strength", type=float, help="of --direction in standard deviations (default: 2)")
    add(
        "--features",
        choices=("discriminator", "pixels"),
        help="to project by (default: the discriminator's and pixels, if the run has a checkpoint)",
    )
    add("--steps", type=int, help="of the projection (default: 1000)")
    add("--zoom", type=int, help=f"enlarge pixels so many times (default: small pictures to {TILE} pixels)")


def mode(args: argparse.Namespace) -> str | None:
    """Which of the latent space's modes is asked for."""
    names = ("interpolate", "mix", "directions", "direction", "project")
    return next((n for n in names if getattr(args, n) is not None and getattr(args, n) is not False), None)


def check(args: argparse.Namespace, config: Config, G: Generator) -> None:
    """UsageError for flags that make no sense, together or for the family."""
    asked = mode(args)
    for name, modes in APPLIES.items():
        if getattr(args, name) is not None and asked not in modes:
            flags = " or ".join(flag(m) for m in modes)
            raise UsageError(f"{_shown(name)} applies to {flags} only; add one of them or leave it out")
    if args.fps is not None and not args.movie:
        raise UsageError("--fps applies to --movie only; add it or leave it out")
    if args.strength is not None and not math.isfinite(args.strength):
        raise UsageError(f"--strength must be finite: got {args.strength}")
    if asked is None:
        return
    for name in (*(PLAIN if asked != "direction" else ()), *(FIXED if asked == "project" else ())):
        if getattr(args, name) not in (None, False, NEUTRAL.get(name)):
            raise UsageError(f"{_shown(name)} does not apply to {flag(asked)}; leave it out")
    if args.to_dataset and asked != "direction":
        raise UsageError(f"{flag(asked)} writes pictures: give --out, not --to-dataset")
    arch, styled = f"--arch {config.arch}", isinstance(G, StyleGenerator)
    if getattr(G, "translates", False):
        raise UsageError(f"{flag(asked)}: {arch} translates images and has no latent space; see --translate")
    if (args.mix or args.layers is not None) and not styled:
        raise UsageError(f"{'--mix' if args.mix else '--mix-layers'} needs styles, which {arch} has not")
    if args.project and config.domains == 2:
        raise UsageError(f"--project does not apply to {arch}, whose pictures are pairs")
    if config.cond and args.label is None:
        raise UsageError(f"{flag(asked)}: the run is conditional; choose a --class, 0 to {config.c_dim - 1}")
    if args.label is not None and not 0 <= args.label < G.c_dim:
        raise UsageError(
            f"--class does not apply to {arch}"
            if not G.c_dim
            else f"--class must lie between 0 and {G.c_dim - 1}: got {args.label}"
        )
    for name in ("frames", "fps", "steps", "zoom", "directions"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UsageError(f"{flag(name)} must be at least 1: got {getattr(args, name)}")
    if args.movie == "mp4" and not shutil.which("ffmpeg"):
        raise UsageError("--movie mp4 needs ffmpeg, which is not here; install it or use --movie gif or webp")


def running(args: argparse.Namespace) -> dict[str, Any]:
    """How the pictures are computed, as `sampling.in_chunks` takes it."""

    def announce(message: str) -> None:
        print(message, file=sys.stderr, flush=True)

    return {"compile": args.compile, "ahead": args.batch, "announce": announce}


def run(G: Generator, config: Config, args: argparse.Namespace) -> str | None:
    """Do what `args` ask of the latent space, with G frozen in eval mode, and say what came of it.

    None if plain pictures are still to be made; --direction bends G for them.
    """
    asked = mode(args)
    if asked is None:
        return None
    G.requires_grad_(False)
    c = None
    if config.cond:
        c = one_hot(torch.tensor([args.label], device=next(G.parameters()).device), config.c_dim)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
    makers = {"interpolate": _interpolate, "mix": _mix, "directions": _directions, "project": _project}
    if asked in makers:
        return makers[asked](G, config, args, c)
    vector, scale = _direction(G, args, c)
    strength = 2.0 if args.strength is None else args.strength
    bend(G, strength * scale * vector, layer_numbers(args.layers, G))
    return None


class Source(NamedTuple):
    """A point of the latent space by a name; z is unknown where a projection found w."""

    name: str
    z: Tensor | None
    point: Tensor


def sources(
    text: str, what: str, G: Generator, c: Tensor | None, truncation: float, cutoff: int | None = None
) -> list[Source]:
    """The points that a flag `what` names: seeds, SEED:I and files of projections, with commas between."""
    found, bound = [], None if isinstance(G, StyleGenerator) or truncation == 1 else truncation
    device = next(G.parameters()).device
    for part in (part.strip() for part in text.split(",")):
        if part.endswith(".safetensors"):
            found.append(Source(Path(part).stem, *_projected(Path(part), G)))
            continue
        if picture := re.fullmatch(r"(\d{1,18}):(\d{1,9})", part):
            seed, first = map(int, picture.groups())
            draws = [(part, latents(seed, 1, G.z_dim, bound, first))]
        else:
            seeds = numbers(part, what, "seeds as 1,5,9 or 3-6, pictures as 0:17 and .safetensors files")
            draws = [(f"seed {seed}", latents(seed, 1, G.z_dim, bound)) for seed in seeds]
        for name, z in draws:
            z = z.to(device)
            found.append(Source(name, z[0], points(G, z, c, truncation, cutoff)[0]))
    return found


def numbers(text: str, what: str, takes: str) -> list[int]:
    """5, or the ends and all between of 3-6."""
    match = re.fullmatch(r"(\d{1,18})(?:-(\d{1,18}))?", text)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if not 0 <= last - first < MOST_SEEDS:
        raise UsageError(f"{what} takes {takes}: got {text!r}")
    return list(range(first, last + 1))


def layer_numbers(text: str | None, G: Generator) -> list[int]:
    """The ws that coarse, middle, fine or numbers name; all if nothing does, none where there are no ws."""
    if not isinstance(G, StyleGenerator):
        return []
    count = G.synthesis.num_ws
    if text is None:
        return list(range(count))
    if text in STYLES:
        low, high = STYLES[text]  # two ws a resolution, from 4 pixels on
        named = [i for i in range(count) if low <= 4 << i // 2 <= high]
        if not named:
            raise UsageError(
                f"--mix-layers {text}: this generator ends at {4 << (count - 1) // 2} pixels; "
                f"name some of its layers, 0-{count - 1}"
            )
        return named
    takes = f"coarse, middle, fine or numbers between 0 and {count - 1}, as 0-3"
    named = [i for part in text.split(",") for i in numbers(part.strip(), "--mix-layers", takes)]
    if max(named) >= count:
        raise UsageError(f"--mix-layers takes {takes}: got {text!r}")
    return named


def _shown(name: str) -> str:
    return {"layers": "--mix-layers", "raw": "--float"}.get(name, flag(name))


def _projected(path: Path, G: Generator) -> tuple[Tensor | None, Tensor]:
    """(z or None, point) of a file that --project wrote."""
    if not path.is_file():
        raise UsageError(f"{path} does not exist; --project writes such files")
    device, styled = next(G.parameters()).device, isinstance(G, StyleGenerator)
    name, size = ("w", G.mapping.w_avg.shape[0]) if styled else ("z", G.z_dim)
    try:
        latent = load_tensors(path)[0].get(name)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if latent is None or latent.shape != (size,):
        raise UsageError(f"{path} holds no {name} of {size} numbers, as --project finds for this generator")
    latent = latent.to(device)
    return (None, latent.expand(G.synthesis.num_ws, -1)) if styled else (latent, latent)


def _truncation(args: argparse.Namespace) -> tuple[float, int | None]:
    return args.truncation, args.truncation_cutoff


def _drawing(args: argparse.Namespace) -> dict[str, Any]:
    return {"noise": args.noise, "seed": args.seed, **running(args)}


def _consecutive(seed: int, count: int) -> str:
    return f"{seed}-{seed + count - 1}"


def _enlarged(images: np.ndarray, zoom: int | None) -> np.ndarray:
    """uint8 [..., H, W, C], every pixel `zoom` times as large; small pictures `TILE` pixels high."""
    zoom = zoom or max(1, TILE // images.shape[-3])
    return images.repeat(zoom, axis=-3).repeat(zoom, axis=-2)


def _interpolate(G: Generator, config: Config, args: argparse.Namespace, c: Tensor | None) -> str:
    found = sources(args.seeds or _consecutive(args.seed, 4), "--seeds", G, c, *_truncation(args))
    if len(found) < 2:
        raise UsageError("--interpolate goes from one seed to the next: give two or more --seeds")
    frames = args.frames or (24 if args.movie else 8)
    if args.interpolate == "slerp":
        z = [s.z for s in found if s.z is not None]
        if len(z) < len(found):
            raise UsageError("--interpolate slerp needs z, but --project has found a w; use lerp")
        way = ways(torch.stack(z), frames, slerp, args.loop)
        way = points(G, way.flatten(0, 1), c, *_truncation(args)).unflatten(0, way.shape[:2])
    else:
        way = ways(torch.stack([s.point for s in found]), frames, torch.lerp, args.loop)
    if args.movie:
        path = args.out / f"interpolation.{args.movie}"
        images = _enlarged(pictures(G, config, once(way, args.loop), c, **_drawing(args)), args.zoom)
        save_movie(path, images, args.fps or 24)
        return f"{len(images)} frames through {len(found)} seeds: {path}"
    path = args.out / "interpolation.png"
    images = _enlarged(pictures(G, config, way.flatten(0, 1), c, **_drawing(args)), args.zoom)
    names = [s.name for s in found]
    save_image(path, sheet(images.reshape(*way.shape[:2], *images.shape[1:]), names[: len(way)]))
    return f"{len(way)} rows from {', '.join(names)}: {path}"


def _mix(G: Generator, config: Config, args: argparse.Namespace, c: Tensor | None) -> str:
    layers = layer_numbers(args.layers or "coarse", G)
    rows = sources(args.rows or _consecutive(args.seed, 3), "--rows", G, c, *_truncation(args))
    columns = sources(args.cols or _consecutive(args.seed + 3, 5), "--cols", G, c, *_truncation(args))
    a, b = (torch.stack([s.point for s in some]) for some in (rows, columns))
    table = torch.cat([torch.cat([b[None], mix(a, b, layers)]), torch.cat([b[:1], a])[:, None]], dim=1)
    table = table.roll(1, 1)  # the sources stand above and on the left, and nothing in the corner
    images = _enlarged(pictures(G, config, table.flatten(0, 1), c, **_drawing(args)), args.zoom)
    images = images.reshape(*table.shape[:2], *images.shape[1:])
    images[0, 0] = 255
    path = args.out / "mixing.png"
    save_image(path, sheet(images, ["", *(s.name for s in rows)], ["", *(s.name for s in columns)]))
    return f"layers {', '.join(map(str, layers))} of the columns, the others of the rows: {path}"


def _directions(G: Generator, config: Config, args: argparse.Namespace, c: Tensor | None) -> str:
    layers, method = layer_numbers(args.layers, G), _method(G, args)
    found = find_directions(G, args.directions, method, c, layers)
    bases = sources(args.seeds or str(args.seed), "--seeds", G, c, *_truncation(args))
    tensors = {"directions": found.vectors, "scales": found.scales}
    save_tensors(args.out / "directions.safetensors", tensors, method=method, arch=config.arch)
    strengths = torch.tensor(STRENGTHS, device=found.scales.device, dtype=torch.float32)
    shifts = torch.einsum("s,k,kd->ksd", strengths, found.scales, found.vectors)
    rows = [f"direction {i}" for i in range(len(shifts))]
    columns = [f"{s:+d}" if s else "0" for s in STRENGTHS]
    for base in bases:
        moved = shifted(base.point[None], shifts.flatten(0, 1), layers)
        images = _enlarged(pictures(G, config, moved, c, **_drawing(args)), args.zoom)
        name = re.sub(r"[^\w.-]+", "-", base.name)
        tiles = images.reshape(*shifts.shape[:2], *images.shape[1:])
        save_image(args.out / f"directions-{name}.png", sheet(tiles, rows, columns))
    return f"{len(shifts)} directions by {method}, from {', '.join(s.name for s in bases)}: {args.out}"


def _method(G: Generator, args: argparse.Namespace) -> str:
    return args.directions_method or ("pca" if isinstance(G, StyleGenerator) else "sefa")


def _direction(G: Generator, args: argparse.Namespace, c: Tensor | None) -> tuple[Tensor, Tensor]:
    """The unit vector [D] and the deviation that --direction names."""
    file, _, number = args.direction.rpartition(":")
    if not re.fullmatch(r"\d{1,9}", number):
        raise UsageError(f"--direction takes a number or FILE:NUMBER: got {args.direction!r}")
    index = int(number)
    if not file:
        found = find_directions(G, index + 1, _method(G, args), c, layer_numbers(args.layers, G))
        return found.vectors[index], found.scales[index]
    try:
        tensors, _ = load_tensors(Path(file))
        vectors, scales = tensors["directions"], tensors["scales"]
    except (ValueError, KeyError, OSError):
        raise UsageError(f"--direction: {file} holds no directions, as --directions saves them") from None
    size = G.mapping.w_avg.shape[0] if isinstance(G, StyleGenerator) else G.z_dim
    if vectors.ndim != 2 or vectors.shape[1] != size or len(scales) != len(vectors):
        raise UsageError(f"--direction: {file} is of another generator, whose latents have other sizes")
    if index >= len(vectors):
        raise UsageError(f"--direction: {file} holds directions 0 to {len(vectors) - 1}: got {index}")
    device = next(G.parameters()).device
    return vectors[index].to(device), scales[index].to(device)


def _project(G: Generator, config: Config, args: argparse.Namespace, c: Tensor | None) -> str:
    device = next(G.parameters()).device
    target = read_target(args.project, config).to(device)
    D = load_discriminator(args.run or args.weights, config, device) if args.features != "pixels" else None
    if D is None and args.features == "discriminator":
        raise UsageError(
            f"--features discriminator: {args.run or args.weights} has no checkpoint; use --features pixels"
        )
    if hasattr(G, "match_reals"):
        target = G.match_reals(target)
    found = project(G, target, c, D, args.steps or 1000, args.seed)
    images = _enlarged(np.concatenate([to_uint8(x) for x in (target, found.start, found.result)]), args.zoom)
    save_image(args.out / "projection.png", sheet(images[None], None, ["target", "start", "result"]))
    kind = "z" if found.noise is None else "w"
    tensors = {kind: found.latent} | ({} if found.noise is None else {"noise": found.noise})
    path = args.out / "projection.safetensors"
    save_tensors(path, tensors, image=args.project.name, seed=args.seed, label=args.label)
    before, after = (F.mse_loss(x, target).sqrt().item() for x in (found.start, found.result))
    by = "pixels alone" if D is None else "pixels and the discriminator's features"
    return f"{kind} found by {by}, pixels off by {before:.3f} before and {after:.3f} after: {path}"


def read_target(path: Path, config: Config) -> Tensor:
    """The centre square of an image file at the run's size, -1..1 [1, C, R, R]."""
    try:
        image = read(str(path), MODES[config.channels])
    except Exception as error:  # on damaged bytes Pillow raises OSError, SyntaxError, struct.error, ...
        takes = "it takes a PNG, JPEG or WebP image"
        raise UsageError(f"--project {path} cannot be read ({reason(error)}); {takes}") from None
    short, side = min(image.size), config.resolution
    left, top = (image.width - short) // 2, (image.height - short) // 2
    square = image.crop((left, top, left + short, top + short))  # first, or the filter would see beyond it
    pixels = np.array(square.resize((side, side), Image.Resampling.LANCZOS)).reshape(1, side, side, -1)
    if config.channels == 4:
        pixels *= pixels[..., 3:] > 0  # as the images that it was trained on
    return torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1


def save_movie(path: Path, frames: np.ndarray, fps: int) -> None:
    """uint8 [N, H, W, 1, 3 or 4] as an endless GIF or (lossless) WebP, or by ffmpeg as an MP4."""
    if path.suffix == ".mp4":
        return _save_mp4(path, frames, fps)
    first, *others = [Image.fromarray(f[:, :, 0] if f.shape[2] == 1 else f) for f in frames]
    options = {"append_images": others, "duration": round(1000 / fps), "loop": 0}
    if path.suffix == ".webp":
        options["lossless"] = True
    movie = io.BytesIO()  # Pillow's own writing to a file forgets why it failed
    first.save(movie, path.suffix[1:], save_all=True, **options)
    with replacing(path, durable=False) as file:
        file.write(movie.getbuffer())


def _save_mp4(path: Path, frames: np.ndarray, fps: int) -> None:
    height, width, channels = frames.shape[1:]
    layout = {1: "gray", 3: "rgb24", 4: "rgba"}[channels]
    even = "pad=ceil(iw/2)*2:ceil(ih/2)*2"  # yuv420p, which all players know, has a colour for 2x2 pixels
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        part = Path(folder) / path.name
        given = f"-f rawvideo -pix_fmt {layout} -s {width}x{height} -r {fps} -i -".split()
        command = ["ffmpeg", "-loglevel", "error", *given, "-vf", even, "-pix_fmt", "yuv420p", str(part)]
        done = subprocess.run(command, input=frames.tobytes(), capture_output=True)
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip().splitlines() or ["no reason given"]
            raise UsageError(f"ffmpeg could not write {path}: {said[-1]}; use --movie gif or webp")
        os.replace(part, path)
