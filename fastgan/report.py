"""python -m fastgan.report: a run, or several beside each other, as one page that needs only a browser.

The page holds all that it shows and asks no network for anything. Its size has a bound however long the run:
a curve has at most POINTS points, each the mean of so many neighbouring ticks; of the sample grids every 2nd,
4th, 8th ... and the newest are shown, at most GRIDS; a picture of more than EMBEDDED bytes is shrunk to SIDE
pixels and stored as a JPEG.
"""

import base64
import dataclasses
import functools
import hashlib
import html
import io
import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from statistics import fmean
from typing import Any

from PIL import Image

from fastgan import __version__, cli
from fastgan.checkpoint import write as write_file
from fastgan.config import PRESETS, Config, UsageError, applies, flag
from fastgan.run_folder import METRICS, SESSIONS, read_lines, read_metrics

POINTS, GRIDS, WARNINGS = 400, 24, 20
EMBEDDED, SIDE = 128 << 10, 1024

TITLES = {
    "images_per_second": "Throughput, images/s",
    "memory_mib": "Peak memory, MiB",
    "power_watts": "Power, W",
}
NO_CURVES = ("images", "seconds", "cpu_seconds")


def parser() -> cli.Parser:
    """The command's options."""
    p = cli.Parser(
        prog="fastgan report",
        description="Write a page on a run (training does so at every tick), or one that compares several.",
    )
    p.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run")
    p.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="page to write (default: report.html in the run's folder, or comparison.html here of several)",
    )
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m fastgan.report` with the arguments `argv`; returns the exit code."""
    return cli.run(_main, argv)


def _main(argv: Sequence[str] | None) -> int:
    args = parser().parse_args(argv)
    folders = [folder.resolve() for folder in args.runs]
    twice = next(
        (run for run, folder in zip(args.runs, folders, strict=True) if folders.count(folder) > 1), None
    )
    if twice:
        raise UsageError(f"{twice} is given twice; name different runs")
    several = len(folders) > 1
    out = args.out or (Path("comparison.html") if several else args.runs[0] / "report.html")
    runs = [read(folder) for folder in args.runs]
    try:
        write_file(out, comparison(runs) if several else page(runs[0]))
    except OSError as error:
        raise UsageError(f"{out} cannot be written: {error.strerror}") from None
    print(f"report: {out}")
    return 0


def write(folder: Path) -> None:
    """report.html of the run in `folder`, from what is there."""
    write_file(folder / "report.html", page(read(folder)))


@dataclass(frozen=True)
class Run:
    """What a run folder says: its options, ticks, and each start or resumption of its training."""

    folder: Path
    config: dict[str, Any]
    ticks: list[dict[str, Any]]
    sessions: list[dict[str, Any]]

    @property
    def images(self) -> int:
        """Seen up to the last tick."""
        return self.ticks[-1]["images"] if self.ticks else 0

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.folder.resolve().name

    def elapsed(self) -> list[float]:
        """Seconds of training at each tick, over all sessions; a tick counts from its session's start."""
        starts = [session["images"] for session in self.sessions]
        total, last, images, times = 0.0, 0.0, 0, []
        for tick in self.ticks:
            seconds = tick.get("seconds", last)
            if not math.isfinite(seconds):  # no clock says so, but the file may
                seconds = last
            anew = seconds < last or any(images <= start < tick["images"] for start in starts)
            total += seconds if anew else seconds - last
            last, images = seconds, tick["images"]
            times.append(total)
        return times

    def grids(self) -> list[Path]:
        """Sample grids, at most GRIDS: with the newest last, those that stay when more are added."""
        files = sorted(file for file in (self.folder / "samples").glob("*.png") if file.stem.isdecimal())
        stride = 1
        while len(files) > (GRIDS - 1) * stride:
            stride *= 2
        return [*files[:-1:stride], *files[-1:]]

    def curves(self) -> dict[str, dict[str, list]]:
        """{key: {kimg, seconds, y}} of every figure that the ticks have, at most POINTS each."""
        times = self.elapsed()
        keys = dict.fromkeys(k for tick in self.ticks for k in tick if k not in NO_CURVES)
        curves = {}
        for key in keys:
            points = [
                (tick["images"] / 1000, seconds, tick[key])
                for tick, seconds in zip(self.ticks, times, strict=True)
                if isinstance(tick.get(key), int | float) and not isinstance(tick[key], bool)
            ]
            if points:
                kimg, seconds, y = zip(*_thinned(points), strict=True)
                curves[key] = {"kimg": kimg, "seconds": seconds, "y": [_rounded(v) for v in y]}
        return curves


def read(folder: Path) -> Run:
    """The run in `folder`, also while it is being trained. UsageError if there is none."""
    file = folder / "config.json"
    try:
        config = json.loads(file.read_bytes())
    except OSError as error:
        raise UsageError(f"{folder} is no run: {file} cannot be read ({error.strerror})") from None
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise UsageError(f"{file} is damaged; restore it or leave {folder} out")
    return Run(folder, config, read_metrics(folder / METRICS), read_lines(folder / SESSIONS))


def _thinned(points: list[tuple[float, float, float]]) -> list[tuple[float, float, float]]:
    """Means of equally many neighbours, at most POINTS, each where its last neighbour was."""
    size = -(-len(points) // POINTS)
    if size == 1:
        return points
    parts = (points[i : i + size] for i in range(0, len(points), size))
    return [(*part[-1][:2], fmean(p[2] for p in part)) for part in parts]


def _rounded(value: float) -> float | None:
    """To five digits; None, a gap in a curve, for what is no number: JSON has no NaN."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


def _label(key: str) -> str:
    return key.removeprefix("metric_").replace("_", " ")


def _title(key: str) -> str:
    """Of the chart that shows `key`: losses share one, scores another."""
    if key.startswith("loss"):
        return "Losses"
    if key.endswith("_score"):
        return "Scores of the discriminator"
    return TITLES.get(key, _label(key))


def _rank(key: str) -> int:
    """Charts in order: losses, scores, metrics, all else, the machine."""
    firsts = (key.startswith("loss"), key.endswith("_score"), key.startswith("metric_"), key not in TITLES)
    return firsts.index(True) if True in firsts else len(firsts)


def charts(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """[{title, lines: [{name, color, kimg, seconds, y}]}]: of one run a chart for all figures of a kind, of
    several a chart for each figure with a line for each run."""
    several, curves = len(runs) > 1, [run.curves() for run in runs]
    found: dict[str, list[dict[str, Any]]] = {}
    for key in sorted(dict.fromkeys(key for own in curves for key in own), key=_rank):
        lines = found.setdefault(TITLES.get(key, _label(key)) if several else _title(key), [])
        for i, (name, own) in enumerate(zip(names(runs), curves, strict=True)):
            if key in own:
                about = {"name": name, "color": i} if several else {"name": _label(key), "color": len(lines)}
                lines.append(about | own[key])
    return [{"title": title, "lines": lines} for title, lines in found.items()]


def names(runs: Sequence[Run]) -> list[str]:
    """The folders' own names, or their paths where two have the same."""
    short = [run.name for run in runs]
    return short if len(set(short)) == len(short) else [str(run.folder) for run in runs]


def options(run: Run) -> dict[str, Any]:
    """{flag: value} of those that mean something to the family; of a family that is not known, all."""
    fields, arch = {field.name: field for field in dataclasses.fields(Config)}, str(run.config.get("arch"))
    known = fields if arch in PRESETS else {}
    return {flag(k): v for k, v in run.config.items() if k not in known or applies(known[k], arch)}


def page(run: Run) -> str:
    """HTML on one run."""
    return _document(
        run.name,
        [
            f"<h1>{_text(run.name)}</h1>",
            f"<p>{_text(_summary(run))}</p>",
            f'<progress max="{_text(_length(run))}" value="{run.images / 1000}"></progress>',
            *_warnings(run),
            "<h2>Samples</h2>",
            f'<div class="pictures">{_slider(run)}{_reals(run)}</div>',
            *_metrics([run]),
            *_charts([run]),
            *_sessions(run),
            "<h2>Options</h2>",
            _pairs(options(run)),
        ],
        [run],
    )


def comparison(runs: Sequence[Run]) -> str:
    """HTML on several runs beside each other."""
    parts = [f"<h1>{len(runs)} runs</h1>", '<div class="pictures">']
    for name, run in zip(names(runs), runs, strict=True):
        grids = run.grids()
        samples = "<p>No samples yet.</p>"
        if grids:
            samples = f"{_picture(grids[-1], _about(grids[-1]))}<figcaption>last samples</figcaption>"
        about = f"<h2>{_text(name)}</h2><p>{_text(_summary(run))}</p>"
        parts.append(f"<figure>{about}{samples}</figure>")
    parts.append("</div>")
    for name, run in zip(names(runs), runs, strict=True):
        parts += _warnings(run, name)
    own = [options(run) for run in runs]
    rows = [[key, *(o.get(key, "–") for o in own)] for key in dict.fromkeys(key for o in own for key in o)]
    rows = [row for row in rows if any(value != row[1] for value in row[2:])]
    table = _table(["", *names(runs)], rows) if rows else "<p>All options are the same.</p>"
    parts += [*_metrics(runs), *_charts(runs), "<h2>Options that differ</h2>", table]
    return _document(" · ".join(names(runs)), parts, runs)


def _text(value: object) -> str:
    return html.escape(str(value))


def _length(run: Run) -> float:
    """In thousands of images."""
    kimg = run.config.get("kimg")
    return kimg if isinstance(kimg, int | float) else run.images / 1000


def _summary(run: Run) -> str:
    own = run.config.get
    data = " and ".join(str(own(key)) for key in ("data", "data_b") if own(key))
    said = (
        f"{own('arch')} on {data}, {own('resolution')} pixels; {run.images / 1000:g} of {_length(run):g} kimg"
    )
    if run.ticks:
        rate = run.ticks[-1].get("images_per_second")
        said += f" in {cli.duration(run.elapsed()[-1])}" + (f", last {rate:.0f} images/s" if rate else "")
    return said


def _warnings(run: Run, name: str = "") -> list[str]:
    said = [
        f"<p>{_text(name)} at {tick['images'] / 1000:g} kimg: {_text(tick['warning'])}</p>"
        for tick in run.ticks
        if "warning" in tick
    ]
    hidden = len(said) - WARNINGS
    shown = said[-WARNINGS:]
    if hidden > 0:
        shown.insert(0, f"<p>{hidden} earlier warnings are in {METRICS}.</p>")
    return ['<div class="warnings">', *shown, "</div>"] if shown else []


def _about(grid: Path) -> str:
    return f"samples after {int(grid.stem) / 1000:g} kimg"


def _slider(run: Run) -> str:
    grids = run.grids()
    if not grids:
        return "<p>No samples yet.</p>"
    pictures = [_picture(grid, _about(grid), hidden=grid is not grids[-1]) for grid in grids]
    last = len(grids) - 1
    return (
        f'<figure id="grids">{"".join(pictures)}'
        f'<input type="range" id="tick" min="0" max="{last}" value="{last}" aria-label="sample grids">'
        f'<figcaption id="shown">{_text(_about(grids[-1]))}</figcaption></figure>'
    )


def _reals(run: Run) -> str:
    file = run.folder / "reals.png"
    if not file.exists():
        return ""
    return f"<figure>{_picture(file, 'real images')}<figcaption>real images</figcaption></figure>"


def _picture(file: Path, about: str, hidden: bool = False) -> str:
    try:
        source, width = _embedded(file, file.stat().st_mtime_ns)
    except Exception as error:
        # Torn by a crash, whereon Pillow raises OSError, SyntaxError, struct.error, ..., or too large for it:
        # training is not to stop over its report.
        return f'<img alt="{_text(f"{about}: {file.name} cannot be read ({error})")}"{" hidden" * hidden}>'
    look = ' class="pixels"' if width < SIDE // 2 else ""
    return f'<img src="{source}" alt="{_text(about)}"{look}{" hidden" * hidden}>'


@functools.lru_cache(maxsize=4 * GRIDS)
def _embedded(file: Path, modified: int) -> tuple[str, int]:
    """(data URI, width) of the PNG `file`, shrunk where it is large; kept, as a tick adds but one picture."""
    data, kind = file.read_bytes(), "png"
    with Image.open(io.BytesIO(data)) as image:
        width = image.width
        image.load()
        if len(data) > EMBEDDED:
            image = image.convert("RGB")
            image.thumbnail((SIDE, SIDE))
            shrunk = io.BytesIO()
            image.save(shrunk, "JPEG", quality=85)
            data, kind = shrunk.getvalue(), "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}", width


def _metrics(runs: Sequence[Run]) -> list[str]:
    """A table of each metric's last, lowest and highest value, with where it was."""
    rows = []
    for name, run in zip(names(runs), runs, strict=True):
        found: dict[str, list[tuple[float, float]]] = {}
        for tick in run.ticks:
            for key, value in tick.items():
                if key.startswith("metric_") and isinstance(value, int | float) and math.isfinite(value):
                    found.setdefault(key, []).append((value, tick["images"] / 1000))
        for key, values in found.items():
            cells = [
                f"{value:.5g} at {kimg:g} kimg" for value, kimg in (values[-1], min(values), max(values))
            ]
            rows.append([*([name] if len(runs) > 1 else []), _label(key), *cells])
    head = [*(["run"] if len(runs) > 1 else []), "metric", "last", "lowest", "highest"]
    return ["<h2>Metrics</h2>", _table(head, rows)] if rows else []


def _charts(runs: Sequence[Run]) -> list[str]:
    if not any("seconds" in tick for run in runs for tick in run.ticks):  # of more than a warning
        return ["<p>No ticks yet.</p>"]
    return [
        "<h2>Curves</h2>",
        '<div class="tools"><label>over <select id="axis"><option value="kimg">images</option>'
        '<option value="seconds">time</option></select></label>'
        '<label><input type="checkbox" id="log">logarithmic</label>'
        '<label>smoothing <input type="range" id="smooth" min="0" max="0.98" step="0.02" value="0"></label>'
        "</div>",
        '<noscript><p>The curves are drawn by a script.</p></noscript><div class="charts" id="charts"></div>',
    ]


def _sessions(run: Run) -> list[str]:
    """Each start's command; the environment of the last, and of any other that was another."""
    parts = []
    for i, session in enumerate(run.sessions):
        verb = "Started" if session["images"] == 0 else f"Resumed at {session['images'] / 1000:g} kimg"
        parts.append(
            f"<p>{verb}, {_text(session.get('time', ''))}, in {_text(session.get('folder', ''))}</p>"
        )
        parts.append(f"<pre>{_text(session.get('command', ''))}</pre>")
        environment = session.get("environment")
        if isinstance(environment, dict) and (
            i + 1 == len(run.sessions) or run.sessions[i + 1].get("environment") != environment
        ):
            parts.append(_pairs(environment, "long"))
    return ["<h2>Command and environment</h2>", *parts] if parts else []


def _pairs(pairs: dict[str, Any], look: str = "") -> str:
    rows = (f"<div><dt>{_text(k)}</dt><dd>{_text(v)}</dd></div>" for k, v in pairs.items())
    return f'<dl class="{look}">{"".join(rows)}</dl>'


def _table(head: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    first = "".join(f"<th>{_text(cell)}</th>" for cell in head)
    rest = ("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{first}</tr>{"".join(rest)}</table></div>'


@functools.cache
def _asset(name: str) -> tuple[str, str]:
    """A file beside this one, and the source by which the page's policy admits it."""
    text = resources.files("fastgan").joinpath(name).read_text()
    return text, f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _document(title: str, parts: Iterable[str], runs: Sequence[Run]) -> str:
    (style, style_hash), (script, script_hash) = _asset("report.css"), _asset("report.js")
    policy = f"default-src 'none'; img-src data:; style-src {style_hash}; script-src {script_hash}"
    # In a script element only "<" could end it or open a comment.
    data = json.dumps(charts(runs), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="generator" content="fastgan {__version__}">
<title>{_text(title)}</title>
<style>{style}</style>
</head>
<body>
{chr(10).join(parts)}
<script type="application/json" id="data">{data}</script>
<script>{script}</script>
</body>
</html>
"""


if __name__ == "__main__":
    sys.exit(main())
