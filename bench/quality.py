"""Do the GANs learn? Judges samples, or trains every family and prints the README's table.

python -m bench.quality IMAGES.npz [...]
    judges what `python -m fastgan.generate --format npz` has written

python -m bench.quality --train [ROW ...] [--seeds 0 1 2] [--threads N] [--kimg K] [--out DIR] [--jobs J]
    trains each row by its preset with each seed, judges it, and prints the medians over the seeds. A row is
    an --arch; ROW-cond is that --arch with --cond. The same command again goes on where it was stopped and
    repeats no training that has ended. --picture also draws samples of each row, from the first seed, into
    bench/results/families.png. Exit code 1 if a requirement is not met.

accepted, entropy, spread, frechet   of 1,000 samples, see judge.py. cogan: of the first halves of its pairs;
          cyclegan: of 1,000 images of the other domain that it has learned, translated
asked     share of images to which the classifier gives the class that was asked for
TSTR      share of real held-out digits that a classifier trained on 2,000 generated images alone gets right
same      cogan: share of pairs whose halves show the same digit; cyclegan: share of held-out digits that keep
          their class both in the other domain and on the way back
time      of the training, compiling included: on the clock or of the processor, whichever is less. What has
          taken three minutes of processor time takes no longer on an idle machine, however busy this one was.
images/s  on the clock, without compiling: the machine's own only where nothing else runs, with --jobs 1

Rows judged by held-out digits (TSTR, cyclegan) have learned `digits:train`, the others all digits.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from bench import families, judge
from bench.families import SECONDS, Figures, required
from fastgan import cli
from fastgan.cli import duration
from fastgan.config import PRESETS, UsageError

JUDGED = ("accepted", "entropy", "spread", "frechet", "asked", "tstr", "same")
HEADS = ("`--arch`", *JUDGED[:5], "TSTR", "same", "kimg", "images/s", "time", "met")
PICTURE = Path(__file__).parent / "results" / "families.png"
ACROSS, TILE, LABEL = 20, 32, 130  # images across the picture, their side, the width of a row's name


def parser() -> cli.Parser:
    p = cli.Parser(prog="bench.quality", description=__doc__, formatter_class=cli.Prose)
    p.add_argument("files", nargs="*", type=Path, metavar="IMAGES.npz", help="samples to judge")
    p.add_argument(
        "--train", nargs="*", metavar="ROW", help=f"train these, or all: {' '.join(families.ROWS)}"
    )
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds (default: 0 1 2)")
    p.add_argument("--threads", type=int, help="threads of each training (default: torch's choice)")
    p.add_argument("--kimg", type=float, help="length of each run (default: its preset's)")
    p.add_argument("--out", type=Path, default=Path("runs/families"), help="(default: runs/families)")
    p.add_argument("--jobs", type=int, default=1, help="trainings at a time (default: 1)")
    p.add_argument("--picture", action=argparse.BooleanOptionalAction, help=f"also draw {PICTURE.name}")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(_main, argv)


def _main(argv: Sequence[str] | None) -> int:
    args = parser().parse_args(argv)
    if bool(args.files) == (args.train is not None):
        raise UsageError("give files of images or --train, one of the two")
    rows = list(dict.fromkeys(args.train or families.ROWS))
    for row in rows if args.train is not None else ():
        if row.removesuffix("-cond") not in PRESETS:
            raise UsageError(f"--train {row} is unknown; there are {', '.join(families.ROWS)}")
    if args.jobs < 1:
        raise UsageError(f"--jobs must be at least 1: got {args.jobs}")
    digits, labels = judge.real_digits("test")
    right = judge.accuracy(judge.classifier(), digits, labels)
    print(f"classifier: {right:.1%} of {len(labels)} held-out real digits", flush=True)
    if args.files:
        for path in args.files:
            print(f"{path}: {sentence(judge_file(path))}")
        return 0

    results: dict[str, dict[int, Figures | None]] = {row: {} for row in rows}
    runs = families.run_all(rows, args.seeds, args.out, args.kimg, args.threads, args.jobs)
    for row, seed, figures in runs:
        results[row][seed] = figures
        log = families.log_of(families.run_folder(args.out, row, seed))
        print(f"{row} seed {seed}: {sentence(figures) if figures else f'failed, see {log}'}", flush=True)
    lines, verdicts = zip(*(table_line(row, list(results[row].values())) for row in rows), strict=True)
    print(f"\n| {' | '.join(HEADS)} |\n|{'---|' * len(HEADS)}\n" + "\n".join(lines))
    if args.picture:
        first = args.seeds[0]
        drawn = {row: families.run_folder(args.out, row, first) for row in rows if results[row][first]}
        picture(
            {row: families.strips(*families.load(folder), ACROSS) for row, folder in drawn.items()}, PICTURE
        )
        print(f"\npicture: {PICTURE}")
    return 0 if all(verdicts) else 1


def judge_file(path: Path) -> Figures:
    """UsageError if it holds no square images."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            images, labels = arrays["images"], arrays.get("labels")
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"{path} is no result of fastgan.generate --format npz: {error}") from None
    if images.ndim != 4 or images.shape[1] != images.shape[2]:
        raise UsageError(f"{path} holds {images.shape}, no square images; pairs are judged by --train")
    asked = {} if labels is None else {"asked": judge.asked_class(images, torch.from_numpy(labels))}
    return judge.judge(images) | asked


def sentence(figures: Figures) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in figures.items())


def table_line(row: str, runs: list[Figures | None]) -> tuple[str, bool]:
    """A line of medians over the runs, and whether all requirements are met; None is a run that failed."""
    needs, done = required(row), [figures for figures in runs if figures]
    name = f"`{row.replace('-cond', ' --cond')}`"
    if not done:
        return f"| {name} |{' |' * (len(HEADS) - 2)} no: failed |", False
    median = {key: statistics.median(figures[key] for figures in done) for key in done[0]}
    seconds = statistics.median(min(figures["seconds"], figures["cpu"]) for figures in done)
    met = len(done) == len(runs) and seconds <= SECONDS
    cells = []
    for key in JUDGED:
        value, need = median.get(key), needs.get(key)
        short = need is not None and not (value is not None and value >= need)
        digits = 1 if key == "frechet" else 3
        cells.append(("" if value is None else f"{value:.{digits}f}") + (f" < {need}" if short else ""))
        met = met and not short
    cells += [f"{median['kimg']:g}", f"{median['rate']:.0f}", duration(seconds)]
    failed = f": {len(runs) - len(done)} failed" if len(done) < len(runs) else ""
    return f"| {' | '.join([name, *cells, 'yes' if met else f'no{failed}'])} |", met


def picture(rows: dict[str, list[np.ndarray]], path: Path) -> None:
    """The strips of images uint8 [ACROSS, R, R, C] of each row below one another, its name before them."""
    height = TILE * sum(len(strips) for strips in rows.values())
    sheet = Image.new("RGB", (LABEL + ACROSS * TILE, height), "white")
    pen, font, y = ImageDraw.Draw(sheet), ImageFont.load_default(14), 0
    for row, strips in rows.items():
        middle = y + TILE * len(strips) / 2
        pen.text((6, middle), row.replace("-cond", " --cond"), "black", font, anchor="lm")
        for strip in strips:
            for i, image in enumerate(strip):
                tile = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
                sheet.paste(tile.resize((TILE, TILE), Image.Resampling.BOX), (LABEL + i * TILE, y))
            y += TILE
    sheet.save(path)


if __name__ == "__main__":
    sys.exit(main())
