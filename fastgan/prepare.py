"""python -m fastgan.prepare: any data to one file that training maps."""

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from shlex import quote
from shutil import disk_usage

from fastgan import cli
from fastgan.config import UsageError
from fastgan.data import load_images, open_source
from fastgan.data.arrays import rows_source
from fastgan.data.decode import FILTERS, MODES, Fit, part
from fastgan.data.images import empty_classes
from fastgan.data.source import NOT_SQUARE, REASONS, TOO_SMALL, Source, Unfit, digest, plain
from fastgan.data.stored import Layout, Stored, partial_of, read, write_resumably
from fastgan.train import duration, enumerated

ADVICE = {
    NOT_SQUARE: " (--crop center takes them)",
    TOO_SMALL: " (a lower --resolution or another --crop takes them)",
}


def parser() -> cli.Parser:
    """The command's options."""
    p = cli.Parser(
        prog="fastgan prepare",
        formatter_class=cli.Prose,
        description="Decode, cut and resize images once, into one .safetensors file that training maps:\n"
        "fastgan train --data OUT. Stopped or killed, the same command goes on where it was.",
    )
    p.add_argument("data", metavar="SRC", help="what --data of fastgan train takes")
    p.add_argument("out", metavar="OUT", type=Path, help="the .safetensors file to write")
    p.add_argument(
        "--resolution",
        type=int,
        help="side in pixels; smaller images are left out, not enlarged (default: that of the first image, "
        "once cut)",
    )
    p.add_argument(
        "--channels", type=int, default=3, choices=tuple(MODES), help="gray, RGB or RGBA (default: 3)"
    )
    p.add_argument(
        "--crop",
        default="none",
        help="none: only squares; center: the largest square; center:SIDE: one of so many pixels; wide: the "
        "largest 4:3 part, padded to a square with black (default: none)",
    )
    p.add_argument(
        "--filter",
        default="lanczos",
        choices=tuple(FILTERS),
        help="what images are made smaller with; FID depends on it, so the file says it (default: lanczos)",
    )
    p.add_argument("--image-key", default="", help="array or column of the images (default: by type)")
    p.add_argument("--label-key", default="", help="array or column of the labels (default: by type)")
    p.add_argument("--drop-copies", action="store_true", help="leave out images that equal one before them")
    p.add_argument(
        "--strict", action="store_true", help="stop at an image that does not fit, instead of leaving it out"
    )
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return cli.run(_main, argv)


def _main(argv: Sequence[str] | None) -> int:
    args = parser().parse_args(argv)
    out = args.out
    if out.suffix != ".safetensors":
        raise UsageError(f"OUT {out} must end in .safetensors, by which --data knows it")
    if out.exists():
        raise UsageError(f"{out} exists; remove it or choose another name")
    given = args.resolution is not None
    fit = Fit(args.resolution if given else 16, args.channels, args.crop, args.filter)
    source = find(args.data, fit, args.image_key, args.label_key)
    if not given:
        fit = replace(fit, resolution=first_side(source, replace(fit, resolution=8)))
    seen: set[bytes] = set()
    began = time.perf_counter()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        check_room(out, Layout(source, fit).end(source.count))
        write_resumably(out, source, fit, () if args.strict else REASONS, seen, args.drop_copies)
    except OSError as error:
        raise UsageError(f"{out} cannot be written: {error.strerror}{goes_on(out)}") from error
    except KeyboardInterrupt:
        print(f"\nstopped{goes_on(out)}", file=sys.stderr)
        return 130
    except UsageError as error:
        raise UsageError(str(error).replace("use --skip-bad", "leave out --strict")) from error
    stored = read(out)
    if len(stored.rows) == 0:
        out.unlink()
        raise UsageError(f"no image of {args.data} fits: {'; '.join(left_out(source, stored))}")
    seconds = time.perf_counter() - began
    print("\n".join(report(out, source, stored, len(stored.rows) - len(seen), seconds)))
    return 0


def find(data: str, fit: Fit, image_key: str, label_key: str) -> Source:
    """What `data` names; the digits, which have no size of their own, at the resolution of `fit`."""
    if data.split(":")[0] != "digits":
        return open_source(data, image_key, label_key)
    digits = load_images(data, fit.resolution, fit.channels, image_key=image_key, label_key=label_key)
    rows = digits.images.permute(0, 2, 3, 1)
    return rows_source(data, rows, digits.labels, digits.classes, digest([data, rows.shape]), digits.filter)


def first_side(source: Source, fit: Fit) -> int:
    """The largest resolution for the first picture that can be cut as `fit` says."""
    for i in range(source.count):
        try:
            return part(source, i, fit).width
        except Unfit as unfit:
            problem = unfit
    reason = str(problem).replace(" or use --skip-bad", "")
    raise UsageError(f"no image of {source.name} fits; one reason: {reason}")


def check_room(out: Path, size: int) -> None:
    """UsageError if the disk cannot hold the file."""
    partial = partial_of(out)
    room = disk_usage(out.parent).free + (partial.stat().st_size if partial.exists() else 0)
    if size > room:
        raise UsageError(
            f"{out} may take {size / 2**30:.2f} GiB, but {room / 2**30:.2f} GiB are free in {out.parent}; "
            "use a lower --resolution or another disk"
        )


def goes_on(out: Path) -> str:
    """What an error says of the part that is there."""
    partial = partial_of(out)
    return f"; the same command goes on from {partial}" if partial.exists() else ""


def report(out: Path, source: Source, stored: Stored, copies: int, seconds: float) -> list[str]:
    """The lines that are printed in the end."""
    count, side, _, channels = stored.rows.shape
    classes = f"{len(stored.classes) or 'no'} class{'es' * (len(stored.classes) != 1)}"
    size = out.stat().st_size / 2**20
    lines = [
        f"{out}: {count} images of {side}x{side} pixels, {MODES[channels]}, {classes}, crop {stored.crop}, "
        f"filter {stored.filter}, {size:.1f} MiB, in {duration(seconds)}",
        *left_out(source, stored),
    ]
    if source.others:
        first = plain(source.others[0])
        lines.append(f"not read: {len(source.others)} (other files, empty folders), the first {first}")
    if copies:
        lines.append(f"{copies} images are copies of others; --drop-copies leaves them out")
    if empty := empty_classes(stored.labels, stored.classes):
        lines.append(f"no images of {enumerated(empty)}")
    arch, trained = suggestion(side)
    options = f"--data {quote(str(out))} --resolution {trained}" + f" --channels {channels}" * (channels != 3)
    return [*lines, f"train on it: python -m fastgan.train --arch {arch} {options}"]


def suggestion(side: int) -> tuple[str, int]:
    """A family, and the largest resolution at which it trains on images of that side."""
    sevenths, rest = divmod(side, 7)
    if rest == 0 and sevenths.bit_count() == 1:  # MNIST's 28
        return "dcgan", side
    return "stylegan", 1 << side.bit_length() - 1


def left_out(source: Source, stored: Stored) -> list[str]:
    """A line for each reason: how many, and the first of them."""
    return [
        f"left out of {source.count}: {len(places)} {reason}{ADVICE.get(reason, '')}, the first "
        f"{source.where(places[0])}"
        for reason, places in stored.left_out().items()
    ]


if __name__ == "__main__":
    sys.exit(main())
