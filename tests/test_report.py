"""The report page: what it says, that it stays small, and, in a headless browser, that it works."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from browser import CHROMIUM, Browser
from family_cases import tiny_config
from PIL import Image

from fastgan import report, run_folder, train
from fastgan.images import save_image

EVIL = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">&amp;"


def make_run(
    folder: Path,
    count: int = 6,
    pixels: int = 16,
    grids: int | None = None,
    sessions: list[dict[str, Any]] | None = None,
    **options: Any,
) -> Path:
    """A run folder of `count` ticks of 1,000 images and 2 seconds each, as training would leave it."""
    (folder / "samples").mkdir(parents=True)
    config = dataclasses.asdict(tiny_config("dcgan", kimg=float(count or 1))) | options
    (folder / "config.json").write_text(json.dumps(config))
    ticks = [
        {
            "images": 1000 * i,
            "seconds": 2.0 * i,
            "cpu_seconds": 3.0 * i,
            "images_per_second": 500.0,
            "loss_d": 1 / i,
            "loss_g": float(i),
            "memory_mib": 300,
        }
        for i in range(1, count + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(tick) + "\n" for tick in ticks))
    sessions = [{"images": 0, "command": "python -m fastgan.train"}] if sessions is None else sessions
    (folder / "sessions.jsonl").write_text("".join(json.dumps(s) + "\n" for s in sessions))
    rng = np.random.default_rng(0)
    for i in range(1, (count if grids is None else grids) + 1):
        noise = rng.integers(0, 256, (pixels, pixels, 3), np.uint8)
        save_image(folder / "samples" / f"{1000 * i:09d}.png", noise)
    save_image(folder / "reals.png", np.zeros((pixels, pixels, 3), np.uint8))
    return folder


def change_ticks(folder: Path, **figures: Any) -> None:
    """`figures` {key: {tick: value}} on top of the run's metrics."""
    ticks = run_folder.read_metrics(folder / "metrics.jsonl")
    for key, values in figures.items():
        for i, value in values.items():
            ticks[i][key] = value
    (folder / "metrics.jsonl").write_text("".join(json.dumps(tick) + "\n" for tick in ticks))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def assert_at_peace(browser: Browser) -> None:
    """The page asked nobody for anything, and its console is empty."""
    assert browser.complaints == []
    assert {request.partition(":")[0] for request in browser.requests} <= {"file", "data"}
    assert sum(request.startswith("file:") for request in browser.requests) == 1


def text(browser: Browser, selector: str) -> list[str]:
    return browser.run(f"[...document.querySelectorAll({selector!r})].map((e) => e.textContent)")


def turn(browser: Browser, control: str, event: str, **change: Any) -> None:
    """Set properties of the control with that id as a user does."""
    script = f"document.getElementById({control!r})"
    browser.run(
        f"Object.assign({script}, {json.dumps(change)}); {script}.dispatchEvent(new Event({event!r}))"
    )


def test_a_page_in_a_browser(browser: Browser, tmp_path: Path):
    folder = make_run(tmp_path / "run", sessions=[{"images": 0, "command": "train --g-lr 0.1"}])
    change_ticks(folder, metric_fid={2: 9.0, 5: 7.5}, loss_d={3: float("nan")}, r1={4: 0.25})
    report.write(folder)
    browser.open(folder / "report.html")
    assert text(browser, ".chart h3") == [
        *("Losses6 kimg", "fid6 kimg", "r15 kimg"),
        *("Throughput, images/s6 kimg", "Peak memory, MiB6 kimg"),
    ]
    assert text(browser, ".chart li")[:2] == ["loss d 0.1667", "loss g 6"]
    assert "fid7.5 at 6 kimg7.5 at 6 kimg9 at 3 kimg" in text(browser, "table")[0].replace("highest", "")
    # A value that is no number is a gap: the curve is lifted there once.
    pens = browser.run("[...document.querySelectorAll('.chart path')].map((p) => p.getAttribute('d'))")
    assert [d.count("M") for d in pens[:2]] == [2, 1]

    assert browser.run("document.querySelectorAll('#grids img:not([hidden])').length") == 1
    turn(browser, "tick", "input", value=1)
    assert text(browser, "#shown") == ["samples after 2 kimg"]
    shown = "document.querySelector('#grids img:not([hidden])')"
    assert browser.run(f"{shown}.alt") == "samples after 2 kimg"
    assert browser.run(f"{shown}.naturalWidth") == 16

    left, width, y = browser.run(
        "(() => { const svg = document.querySelector('.chart svg'); svg.scrollIntoView();"
        "const b = svg.getBoundingClientRect(); return [b.left, b.width, b.top + 50] })()"
    )
    browser.move(left + 52 + (width - 60) / 2, y)  # half way: 3 kimg
    assert text(browser, ".chart h3 span")[0] == "3 kimg"
    assert text(browser, ".chart li")[:2] == ["loss d 0.3333", "loss g 3"]

    turn(browser, "axis", "change", value="seconds")
    assert text(browser, ".chart h3 span")[0] == "12 seconds"
    before = browser.run("document.querySelectorAll('.chart path')[1].getAttribute('d')")
    turn(browser, "log", "change", checked=True)
    assert browser.run("document.querySelectorAll('.chart path')[1].getAttribute('d')") != before
    turn(browser, "smooth", "input", value=0.5)
    # 1, 2 ... 6, each counting half of the next one.
    mean = sum(i * 0.5 ** (6 - i) for i in range(1, 7)) / sum(0.5**i for i in range(6))
    assert text(browser, ".chart li")[1] == f"loss g {mean:.4g}"
    assert_at_peace(browser)


def test_a_page_by_keyboard(browser: Browser, tmp_path: Path):
    """The slider, then past the three controls to the first curves."""
    folder = make_run(tmp_path / "run")
    report.write(folder)
    browser.requests.clear()
    browser.open(folder / "report.html")
    for key in ("Tab", "ArrowLeft"):
        browser.press(key)
    assert text(browser, "#shown") == ["samples after 5 kimg"]
    for key in ("Tab", "Tab", "Tab", "Tab", "ArrowLeft", "ArrowLeft", "ArrowLeft", "ArrowRight"):
        browser.press(key)
    assert text(browser, ".chart h3 span")[0] == "4 kimg"
    assert text(browser, ".chart li")[1] == "loss g 4"
    browser.press("Tab")
    assert text(browser, ".chart h3 span")[0] == "6 kimg"
    assert_at_peace(browser)


def test_a_phone_and_the_dark(browser: Browser, tmp_path: Path):
    long = "x" * 300
    session = {"images": 0, "command": long, "environment": {"variables": long}, "folder": "/" + long}
    folders = [
        make_run(tmp_path / name / ("run" * 30), sessions=[session], data=long, seed=i)
        for i, name in enumerate("ab")
    ]
    change_ticks(folders[0], warning={1: long}, **{"metric_" + long: {1: 1.0}})
    report.write(folders[0])
    assert report.main([*map(str, folders), "--out", str(tmp_path / "both.html")]) == 0
    light = []
    for page in (folders[0] / "report.html", tmp_path / "both.html"):
        for dark in (False, True):
            browser.requests.clear()
            browser.open(page, width=390, height=800, dark=dark)
            assert browser.run("document.documentElement.scrollWidth") == 390
            assert (
                browser.run("Math.max(...[...document.querySelectorAll('svg')].map((e) => e.clientWidth))")
                < 390
            )
            style = browser.run(
                "(() => { const s = getComputedStyle(document.body); return [s.backgroundColor, s.color] })()"
            )
            paper, ink = (int(color.removeprefix("rgb(").partition(",")[0]) for color in style)
            light.append(paper > ink)
            assert_at_peace(browser)
    assert light == [True, False, True, False]


def test_nothing_in_a_run_is_taken_for_html(browser: Browser, tmp_path: Path):
    evil: dict[str, Any] = {EVIL: EVIL, "data": EVIL}
    session = {"images": 0, "command": EVIL, "folder": EVIL, "environment": evil}
    folder = make_run(tmp_path / "<b>run", sessions=[session], **evil)
    change_ticks(folder, warning={1: EVIL}, **{EVIL: {1: 1.0}, f"metric_{EVIL}": {1: 1.0}})
    report.write(folder)
    other = make_run(tmp_path / "other")
    both = tmp_path / "both.html"
    assert report.main([str(folder), str(other), "--out", str(both)]) == 0
    for page in (folder / "report.html", both):
        html = page.read_text()
        assert html.count("<script") == 2 and html.count("</script") == 2
        assert "onerror=" not in html.replace("onerror=&quot;", "").replace('onerror=\\"', "")
        browser.requests.clear()
        browser.open(page)
        assert "owned" not in browser.run("document.title")
        assert "<b>run" in text(browser, "h1, h2")[0 if page != both else 1]
        assert any(EVIL in said for said in text(browser, ".warnings p"))
        assert any(EVIL.replace("_", " ") in title for title in text(browser, ".chart h3"))
        assert_at_peace(browser)


def test_the_policy_admits_only_what_the_page_holds(tmp_path: Path):
    folder = make_run(tmp_path / "run")
    report.write(folder)
    html = (folder / "report.html").read_text()
    assert "default-src 'none'; img-src data:; style-src 'sha256-" in html
    addresses = html.replace("http://www.w3.org/2000/svg", "")
    assert "http:" not in addresses and "https:" not in addresses and "url(" not in html


def test_a_page_before_the_first_tick(browser: Browser, tmp_path: Path):
    """Also its slider works: a run that went back to its start has grids, but no ticks."""
    folder = make_run(tmp_path / "run", 0, grids=3)
    report.write(folder)
    browser.requests.clear()
    browser.open(folder / "report.html")
    turn(browser, "tick", "input", value=1)
    assert text(browser, "#shown") == ["samples after 2 kimg"]
    assert_at_peace(browser)


def test_every_scale_can_be_read(browser: Browser, tmp_path: Path):
    """From at least two numbers beside it, whatever the range."""
    folder = make_run(tmp_path / "run", 2)
    change_ticks(folder, **{f"metric_{i}": {0: 1.23, 1: 2.0 + i / 2} for i in range(40)})
    report.write(folder)
    browser.requests.clear()
    browser.open(folder / "report.html")
    numbers = "(svg) => svg.querySelectorAll('.rule').length"
    counts = browser.run(f"[...document.querySelectorAll('svg')].map({numbers})")
    assert len(counts) > 40 and min(counts) >= 2 and max(counts) <= 8
    assert_at_peace(browser)


def test_a_single_tick_can_be_seen(browser: Browser, tmp_path: Path):
    folder = make_run(tmp_path / "run", 1)
    report.write(folder)
    browser.requests.clear()
    browser.open(folder / "report.html")
    style = "getComputedStyle(document.querySelector('.chart path.c0'))"
    assert browser.run(f"[{style}.strokeLinecap, {style}.strokeWidth]") == ["round", "6px"]
    assert_at_peace(browser)


def test_a_long_value_leaves_its_option_readable(browser: Browser, tmp_path: Path):
    """Names of options take one line each."""
    folder = make_run(tmp_path / "run", 1, data="/a/long/folder/of/pictures" * 3)
    report.write(folder)
    browser.open(folder / "report.html", width=360)
    lines = "(dt) => { const r = new Range(); r.selectNodeContents(dt); return r.getClientRects().length }"
    counts = browser.run(f"[...document.querySelectorAll('dl:not(.long) dt')].map({lines})")
    assert set(counts) == {1}
    assert browser.run("document.documentElement.scrollWidth") == 360


def test_a_long_run_makes_no_long_page(tmp_path: Path):
    """400 ticks with 24 grids, or 4,000 with 200: pages of like sizes."""
    sizes = []
    for name, count, grids in (("short", 400, 24), ("long", 4000, 200)):
        folder = make_run(tmp_path / name, count, grids=grids)
        report.write(folder)
        sizes.append((folder / "report.html").stat().st_size)
        run = report.read(folder)
        shown = [int(grid.stem) // 1000 for grid in run.grids()]
        assert len(shown) <= report.GRIDS and shown[0] == 1 and shown[-1] == grids
        curve = run.curves()["loss_g"]
        assert len(curve["y"]) <= report.POINTS
        assert curve["kimg"][-1] == count
        assert np.mean(curve["y"]) == pytest.approx((count + 1) / 2)
    assert sizes[1] < 1.1 * sizes[0]
    assert "4000 of 4000 kimg in 2h13m" in (tmp_path / "long" / "report.html").read_text()


def test_a_large_picture_is_shrunk(tmp_path: Path):
    folder = make_run(tmp_path / "run", 1, pixels=16)
    file = folder / "samples" / "000001000.png"
    save_image(file, np.random.default_rng(0).integers(0, 256, (1500, 3000, 1), np.uint8))
    source, width = report._embedded(file, 0)
    assert source.startswith("data:image/jpeg;base64,") and width == 3000
    assert len(source) < file.stat().st_size / 4
    assert report._embedded(folder / "reals.png", 0)[0].startswith("data:image/png;base64,")


def test_time_runs_on_over_a_resumption(tmp_path: Path):
    """The second session began at 3,000 images, and its first tick took longer than the first session."""
    folder = make_run(tmp_path / "run", 5, sessions=[{"images": 0}, {"images": 3000}])
    change_ticks(folder, seconds={3: 10.0, 4: 11.0})
    assert report.read(folder).elapsed() == [2, 4, 6, 16, 17]
    html = report.page(report.read(folder))
    assert "Resumed at 3 kimg" in html and "5 of 5 kimg in 17s" in html


def test_runs_beside_each_other(browser: Browser, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", 4, g_lr=0.5, ngf=9, slope=0.1, width=3)]
    out = tmp_path / "both.html"
    assert report.main([*map(str, runs), "--out", str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    browser.requests.clear()
    browser.open(out)
    assert browser.run("document.title") == "a · b"
    table = text(browser, "table")[0]
    assert "--g-lr0.0020.5" in table and "--ngf49" in table and "--kimg6.04.0" in table
    assert "--batch" not in table
    assert "--width" not in table  # DCGAN has none
    assert text(browser, ".chart h3") == [
        *("loss d6 kimg", "loss g6 kimg", "Throughput, images/s6 kimg", "Peak memory, MiB6 kimg")
    ]
    assert text(browser, ".chart li")[2:4] == ["a 6", "b 4"]
    assert browser.run("document.querySelectorAll('.pictures img').length") == 2
    assert_at_peace(browser)


def test_many_runs_of_unlike_lengths(browser: Browser, tmp_path: Path):
    """Nine lines differ in colour or dashes; the readout starts where the longest run ends, not where the run
    with most ticks does."""
    runs = [make_run(tmp_path / str(i), 1 + i % 3) for i in range(8)]
    longest = make_run(tmp_path / "long", 1)
    change_ticks(longest, images={0: 9000})
    report.main(
        [*map(str, [*runs, longest, make_run(tmp_path / "new", 0)]), "--out", str(tmp_path / "all.html")]
    )
    browser.requests.clear()
    browser.open(tmp_path / "all.html")
    assert text(browser, ".chart h3 span")[0] == "9 kimg"
    look = "(path) => [path.className.baseVal, getComputedStyle(path).stroke]"
    looks = browser.run(f"[...document.querySelectorAll('.chart:first-child path')].map({look})")
    assert len({tuple(look) for look in looks}) == len(looks) == 9
    assert text(browser, "figcaption").count("last samples") == 9
    assert_at_peace(browser)


def test_a_run_that_has_just_begun_or_crashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    new = make_run(tmp_path / "new", 0)
    report.write(new)
    assert "No ticks yet" in (new / "report.html").read_text()
    torn = make_run(tmp_path / "torn", 3)
    with (torn / "metrics.jsonl").open("a") as file:
        file.write('{"images": 9')
    newest = torn / "samples" / "000003000.png"
    newest.write_bytes(newest.read_bytes()[:40])
    damaged = torn / "samples" / "000002000.png"
    before, at, after = damaged.read_bytes().partition(b"IDAT")
    size = int.from_bytes(before[-4:], "big") - 6
    damaged.write_bytes(before[:-4] + size.to_bytes(4, "big") + at + after)
    report.write(torn)
    html = (torn / "report.html").read_text()
    assert "3 of 3 kimg" in html
    assert "000003000.png cannot be read" in html and "000002000.png cannot be read (broken PNG" in html
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # twice as many are an error
    report._embedded.cache_clear()
    report.write(torn)
    assert "000001000.png cannot be read (Image size (256 pixels) exceeds limit" in (
        (torn / "report.html").read_text()
    )


def test_numbers_that_no_training_has_written(tmp_path: Path):
    run, huge = make_run(tmp_path / "run", 2), 10**400
    change_ticks(run, seconds={1: float("nan")})
    log = (run / "metrics.jsonl").read_text()
    for line in ({"images": huge}, {"images": 3000, "loss_d": huge}):
        (run / "metrics.jsonl").write_text(log + json.dumps(line) + "\n")
        report.write(run)
        assert "2 of 2 kimg in 2s" in (run / "report.html").read_text()
    (run / "sessions.jsonl").write_text(json.dumps({"images": huge}) + "\n")
    assert report.read(run).sessions == []


def test_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run, damaged = make_run(tmp_path / "run"), make_run(tmp_path / "damaged")
    (damaged / "config.json").write_text("[")
    for argv, words in (
        ([tmp_path / "nowhere"], ["nowhere", "No such file"]),
        ([tmp_path], ["config.json"]),
        ([run, damaged], ["damaged", "config.json"]),
        ([run, f"{run}/."], ["given twice"]),
        ([run, "--out", tmp_path / "gone" / "x.html"], ["gone", "cannot be written"]),
        ([], ["RUN"]),
    ):
        assert report.main([*map(str, argv)]) == 2
        err = capsys.readouterr().err
        assert len(err.splitlines()) == 1 and all(word in err for word in words), err


TRAIN = "--arch gan --resolution 8 --batch 4 --ngf 1 --ndf 1 --precision fp32 --device cpu --tick-kimg 0.008"


def trained(folder: Path, kimg: float, *more: str) -> int:
    return train.main([*TRAIN.split(), "--kimg", str(kimg), "--run-dir", str(folder), *more])


def test_training_writes_it_and_says_how_it_was_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OMP_DYNAMIC", "FALSE")
    folder, pages = tmp_path / "a run", []
    write = report.write
    monkeypatch.setattr(
        report, "write", lambda folder: (write(folder), pages.append(report.read(folder).images))
    )
    assert trained(folder, 0.016) == 0
    assert pages == [0, 8, 16]
    assert trained(folder, 0.024) == 0
    assert pages[3:] == [16, 24]
    sessions = [json.loads(line) for line in (folder / "sessions.jsonl").read_text().splitlines()]
    assert [session["images"] for session in sessions] == [0, 16]
    command = f"python -m fastgan.train {TRAIN} --kimg 0.024 --run-dir '{folder}'"
    assert sessions[1]["command"] == command
    environment = sessions[1]["environment"]
    wanted = {"fastgan", "system", "python", "versions", "processor", "device", "precision", "threads"}
    assert wanted <= environment.keys()
    assert "OMP_DYNAMIC=FALSE" in environment["variables"]
    html = (folder / "report.html").read_text()
    assert "Resumed at 0.016 kimg" in html and "samples after 0.024 kimg" in html
    assert command.replace("'", "&#x27;") in html


def test_a_session_says_how_many_ranks_there_are():
    for size in (1, 2):
        ranks: Any = SimpleNamespace(size=size)
        config, device = tiny_config("gan"), torch.device("cpu")
        engine: Any = SimpleNamespace(images=0, device=device, config=config, ranks=ranks)
        assert train.session(engine, "python")["environment"].get("ranks") == (None, "2")[size - 1]


def test_tensorboard_goes_on_where_a_resumed_run_does(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert trained(tmp_path, 0.024, "--tensorboard", "--checkpoint-kimg", "0.016") == 0
    # As if killed before the last checkpoint: two ticks have been written beyond the one that is resumed.
    (tmp_path / "checkpoints" / "000000024.safetensors").unlink()
    assert trained(tmp_path, 0.032, "--tensorboard") == 0
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss_d")] == [8, 16, 24, 32]
    assert [event.step for event in events.Images("samples")][-1] == 32
    assert {"images_per_second", "loss_g", "memory_mib"} <= set(events.Tags()["scalars"])
    last = run_folder.read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert events.Scalars("loss_d")[-1].value == pytest.approx(last["loss_d"])
    with Image.open(tmp_path / "samples" / "000000032.png") as image:
        assert events.Images("samples")[-1].width == image.width


def test_tensorboard_goes_back_where_a_run_does(tmp_path: Path):
    """As after gradients that were not finite."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = run_folder.RunFolder(tmp_path, tiny_config("gan"))
    folder.open_events(0)
    for images, loss in ((8, 1.0), (16, 2.0), (24, 3.0)):
        folder.log({"images": images, "loss_d": loss})
    folder.rewind_log(8)
    folder.log({"images": 16, "loss_d": 4.0})
    folder.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss_d")] == [(8, 1.0), (16, 4.0)]


def test_tensorboard_that_is_missing_is_missed_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(run_folder, "find_spec", lambda name: None)
    assert trained(tmp_path / "run", 0.008, "--tensorboard") == 2
    assert "pip install 'fastgan[tensorboard]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
