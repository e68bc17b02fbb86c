"""Two runs of the benchmarks side by side: python -m bench.compare A.json B.json

The files are pytest-benchmark's (--benchmark-json). A ratio is B's median time over A's. It is a regression
("slower") or a gain ("faster") if it lies beyond the threshold and the medians' notches, median +- 1.57 IQR /
sqrt(rounds) (McGill, Tukey and Larsen 1978: about 95% confidence that they differ), do not overlap. Exit code
1 on a regression.
"""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastgan import cli
from fastgan.config import UsageError


def load(path: Path) -> dict[str, dict[str, Any]]:
    """The statistics of each benchmark by its full name. UsageError for what is no such file."""
    try:
        found = json.loads(path.read_text())["benchmarks"]
        return {b["fullname"]: {k: b["stats"][k] for k in ("median", "iqr", "rounds")} for b in found}
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{path} is no result of pytest --benchmark-json") from None


def notch(stats: dict[str, Any]) -> float:
    """Half the width, in seconds."""
    return 1.57 * stats["iqr"] / math.sqrt(stats["rounds"])


def verdict(a: dict[str, Any], b: dict[str, Any], threshold: float) -> str:
    """ "slower", "faster", or "" for a difference within `threshold` (0.05: 5%) or within the noise."""
    slow, fast = (b, a) if b["median"] > a["median"] else (a, b)
    apart = slow["median"] - notch(slow) > fast["median"] + notch(fast)
    if not apart or slow["median"] <= (1 + threshold) * fast["median"]:
        return ""
    return "slower" if slow is b else "faster"


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(_main, argv)


def _main(argv: Sequence[str] | None) -> int:
    p = cli.Parser(prog="python -m bench.compare", description=__doc__, formatter_class=cli.Prose)
    p.add_argument("a", type=Path, metavar="A.json", help="before")
    p.add_argument("b", type=Path, metavar="B.json", help="after")
    p.add_argument("--threshold", type=float, default=0.05, help="least change to flag (default: 0.05)")
    args = p.parse_args(argv)
    if not args.threshold >= 0:
        raise UsageError(f"--threshold must be at least 0: got {args.threshold}")
    before, after = load(args.a), load(args.b)
    both = [name for name in before if name in after]
    if not both:
        raise UsageError(f"{args.a} and {args.b} have no benchmark in common")
    slower = 0
    for name in both:
        a, b = before[name], after[name]
        word = verdict(a, b, args.threshold)
        slower += word == "slower"
        print(f"{b['median'] / a['median']:7.3f}  {a['median']:.3e} -> {b['median']:.3e} s  {word:6}  {name}")
    alone = len(before) + len(after) - 2 * len(both)
    print(f"{len(both)} compared, {slower} slower, {alone} in one file only")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
