"""Several processes train one network: as one would, to the same files, and none waits for ever."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from family_cases import tiny_config
from rank_cases import CASES, EQUAL, QUICK
from torch.distributed.rendezvous import rendezvous

from fastgan import distributed, train
from fastgan.checkpoint import checkpoints
from fastgan.config import UsageError

HERE = Path(__file__).parent
STYLES = "--arch stylegan --z-dim 6 --w-dim 6 --channel-base 64 --channel-max 8 --mbstd-group 2"
SMALL = "--r1-every 3 --resolution 8 --batch 8 --precision fp32 --device cpu"
RUN = [*STYLES.split(), *SMALL.split(), "--tick-kimg", "0.04", "--checkpoint-kimg", "0.08"]
LONG = 300  # seconds: an upper bound, on a busy machine


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def environment(**more: str) -> dict[str, str]:
    """This process's, without a launcher's variables."""
    ours = ("MASTER_", "SLURM_", "TORCHELASTIC_")
    env = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    return {**env, "PYTHONPATH": f"{HERE.parent}:{HERE}", "OMP_NUM_THREADS": "1", **more}


def start_one(rank: int, size: int, *command: str, **more: str) -> subprocess.Popen:
    """A rank as torchrun starts it, all its output together."""
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}
    return subprocess.Popen(
        [sys.executable, *command],
        env=environment(**place, **more),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def start(size: int, *command: str) -> list[subprocess.Popen]:
    port = free_port()
    return [start_one(rank, size, *command, MASTER_PORT=port) for rank in range(size)]


def finish(ranks: list[subprocess.Popen]) -> list[tuple[int, str]]:
    """Exit codes and outputs; no rank outlives the test."""
    try:
        outputs = [rank.communicate(timeout=LONG)[0] for rank in ranks]
        return [(rank.returncode, output) for rank, output in zip(ranks, outputs, strict=True)]
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


def wait_for(rank: subprocess.Popen, said: str) -> None:
    assert rank.stdout is not None
    heard = ""
    while not re.search(said, line := rank.stdout.readline()):
        heard += line
        assert line, f"ended before saying {said}: {heard}"


def session(folder: Path, size: int, *cases: str) -> list[dict[str, Any]]:
    """What each rank says of the `cases` in rank_cases.py."""
    for code, output in finish(start(size, str(HERE / "rank_cases.py"), str(folder), *cases)):
        assert code == 0, output
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    cases = [name for name in CASES if name not in EQUAL and name != "compiled"]
    return session(tmp_path_factory.mktemp("two"), 2, *QUICK, *cases)


def assert_equal_runs(said: dict[str, float], name: str) -> None:
    # Behind a norm the gradient of a bias is zero but for roundings, which Adam scales up.
    tolerance = 1e-8 if "sync_batchnorm" in EQUAL[name][1] else 1e-10
    assert said["apart"] < tolerance and said["resumed"] < tolerance and said["moved"] > 1e-4, said


@pytest.mark.parametrize("name", QUICK)
def test_two_ranks_of_8_are_one_of_16(name: str, two: list[dict[str, Any]]):
    """To roundings of float64, whatever is resumed by whom."""
    assert_equal_runs(two[0][name], name)


def test_ranks_perturb_by_numbers_of_their_own(two: list[dict[str, Any]]):
    drawn = [number for rank in two for number in rank["perturbations_differ"]]
    assert len(set(drawn)) == len(drawn)


def test_a_rank_resumes_with_its_own_pool(two: list[dict[str, Any]]):
    first, second = (rank["resume_with_a_pool"] for rank in two)
    assert first["apart"] == second["apart"] == 0
    assert first["of_others"] == ["rank1.D.pool.filled", "rank1.D.pool.images"] and second["of_others"] == []
    assert first["own"] != second["own"]
    assert (first["empty"], second["empty"]) == (3, 0)  # one that no checkpoint knows starts anew


def test_statistics_never_drift_apart(two: list[dict[str, Any]]):
    for name in ("adaptive", "unsynchronized"):
        assert two[0][name] == two[1][name]
    assert two[0]["adaptive"] != [0.5] and two[0]["unsynchronized"] > 0
    for rank in two:
        assert "by 5.0 kimg: rank 1 differs from rank 0 in D.b8.fromrgb.weight; nothing" in rank["drift"]


def test_an_error_of_one_is_everyones(two: list[dict[str, Any]]):
    assert two[0]["one_error"] == "UsageError: rank 1: no images here"
    assert two[1]["one_error"] == "UsageError: no images here"
    assert all("rank 1 differs from rank 0 in seed: 1, not 0" in rank["other_options"] for rank in two)


def test_ranks_agree_when_to_stop(two: list[dict[str, Any]]):
    assert two[0]["asked"] == two[1]["asked"] == [0, 0, 0, 15, 15]
    assert distributed.ALONE.most(2) == 2


def test_the_bucket_keeps_layouts(two: list[dict[str, Any]]):
    assert two[0]["other_layout"] == two[1]["other_layout"] == [0, 0.5]


def test_synchronised_statistics_are_differentiable_twice(two: list[dict[str, Any]]):
    assert two[0]["second_order"] < 1e-9 and two[1]["second_order"] < 1e-9


def test_all_stop_together_and_none_waits_for_the_dead(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    run_dir = tmp_path / "run"
    command = ["-m", "fastgan.train", *RUN, "--kimg", "1000", "--run-dir", str(run_dir)]
    ranks = start(2, *command)
    wait_for(ranks[0], r"kimg  img/s")
    ranks[1].send_signal(signal.SIGTERM)
    (code, said), (other_code, other_said) = finish(ranks)
    assert (code, other_code) == (143, 143), said + other_said
    assert "the same command with --run-dir" in said and "kimg" not in other_said
    stopped = int(checkpoints(run_dir / "checkpoints")[-1].stem)

    ranks = start(2, *command)
    wait_for(ranks[0], f"resuming at {stopped / 1000:.1f} kimg")
    wait_for(ranks[0], r"kimg  img/s")
    ranks[1].kill()
    code, said = finish(ranks)[0]
    assert code == 1 and "Traceback" not in said
    (line,) = [line for line in said.splitlines() if line.startswith("fastgan: ")]
    assert re.match(r"fastgan: rank 0 of 2 lost the other ranks .*--dist-timeout 600 s; the same", line)

    newest = int(checkpoints(run_dir / "checkpoints")[-1].stem)
    assert train.main([*command[2:-3], str((newest + 16) / 1000), *command[-2:]]) == 0  # one process goes on
    seen = [json.loads(line)["images"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert seen == sorted(set(seen)) and seen[-1] == newest + 16


def test_a_batch_that_does_not_come_out_even_is_refused(monkeypatch: pytest.MonkeyPatch, capsys):
    def refused(size: int, arch: str = "stylegan", **options: Any) -> str:
        with pytest.raises(UsageError) as error:
            distributed.check_shares(tiny_config(arch, **options), size)
        return str(error.value)

    distributed.check_shares(tiny_config("stylegan", batch=16, mbstd_group=4), 4)
    said = refused(4, "dcgan", batch=30)
    assert "--batch 30 is the total of 4 ranks and cannot be shared out by them; use 28 or 32" in said
    assert "use 8, or another" in refused(4, "dcgan", batch=4, accumulate=2)
    assert "use 32, or another" in refused(8, batch=16, mbstd_group=4)  # groups stay within a rank
    assert "use 16, or another" in refused(4, batch=8, mbstd_group=2, pl_batch_shrink=4)
    assert "one image, of which BatchNorm can take no statistics; use 8" in refused(4, "gan", batch=4)
    distributed.check_shares(tiny_config("gan", batch=4, sync_batchnorm=True), 4)
    for name, value in {"RANK": "2", "WORLD_SIZE": "3", "LOCAL_RANK": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    assert train.main([*RUN, "--kimg", "1"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "--batch 8 is the total of 3 ranks" in err
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert train.main([*RUN, "--kimg", "1", "--batch", "12"]) == 2
    assert "--max-restarts needs --run-dir" in capsys.readouterr().err


TORCHS = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
SLURMS = {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"}
MEETING = {"MASTER_ADDR": "here", "MASTER_PORT": "29501"}


@pytest.mark.parametrize(
    ("env", "launch"),
    [
        ({}, None),
        ({"WORLD_SIZE": "1"}, None),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, None),
        (TORCHS | MEETING, distributed.Launch(3, 8, 1, "env://")),
        (TORCHS | MEETING | {"SLURM_NTASKS": "2"}, distributed.Launch(3, 8, 1, "env://")),
        (SLURMS | MEETING, distributed.Launch(3, 8, 1, "env://")),
        (
            SLURMS | {"SLURM_STEP_NODELIST": "gpu[03-07,12],cpu1", "SLURM_JOB_ID": "1234567"},
            distributed.Launch(3, 8, 1, "tcp://gpu03:44567"),
        ),
        (SLURMS | {"SLURM_NODELIST": "one,two"}, distributed.Launch(3, 8, 1, "tcp://one:29500")),
        (SLURMS, distributed.Launch(3, 8, 1, "tcp://127.0.0.1:29500")),
    ],
)
def test_launchers_are_understood(env: dict[str, str], launch: distributed.Launch | None):
    assert distributed.launched(env) == launch


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"WORLD_SIZE": "8", "RANK": "1"}, "WORLD_SIZE is 8, but LOCAL_RANK is not set"),
        (TORCHS, "not both MASTER_ADDR and MASTER_PORT|MASTER_ADDR and MASTER_PORT are not set"),
        (TORCHS | MEETING | {"RANK": "8"}, "RANK must be below WORLD_SIZE: got 8 of 8"),
        (SLURMS | {"SLURM_PROCID": "x"}, "must be whole numbers"),
    ],
)
def test_half_a_launcher_is_an_error(env: dict[str, str], message: str):
    with pytest.raises(UsageError, match=message):
        distributed.launched(env)


def test_a_rank_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch):
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    launch = distributed.Launch(5, 8, 1, "env://")
    cuda = torch.device("cuda")
    for count, index in ((4, 1), (1, 0)):  # SLURM may show a rank one alone
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        assert distributed.own_device(cuda, launch) == torch.device("cuda", index) == chosen.pop()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UsageError, match="rank 5 is number 3 on its machine, which has 2 GPUs"):
        distributed.own_device(cuda, distributed.Launch(5, 8, 3, "env://"))
    with pytest.raises(UsageError, match="8 ranks need a GPU each; use --device cuda"):
        distributed.own_device(torch.device("cuda:1"), launch)
    assert distributed.own_device(torch.device("cpu"), launch) == torch.device("cpu")


@pytest.mark.exhaustive
def test_four_ranks_are_one_as_well(tmp_path: Path):
    names = [*QUICK[:2], *(name for name in EQUAL if name not in QUICK)]
    said = session(tmp_path, 4, *names, "second_order")
    for name in names:
        assert_equal_runs(said[0][name], name)
    assert said[3]["second_order"] < 1e-9


@pytest.mark.exhaustive
def test_a_collective_is_compiled_into_a_phase(tmp_path: Path):
    assert all(rank["compiled"] < 1e-9 for rank in session(tmp_path, 2, "compiled"))


@pytest.mark.exhaustive
def test_a_stalled_rank_stops_the_others(tmp_path: Path):
    more = ["--kimg", "1000", "--dist-timeout", "15", "--run-dir", str(tmp_path / "run")]
    ranks = start(2, "-m", "fastgan.train", *RUN, *more)
    wait_for(ranks[0], r"kimg  img/s")
    ranks[1].send_signal(signal.SIGSTOP)
    began = time.perf_counter()
    assert ranks[0].stdout is not None
    said = ranks[0].stdout.read()
    assert ranks[0].wait() == 1 and 10 < time.perf_counter() - began < LONG
    assert "silent for more than --dist-timeout 15 s; the same command goes on" in said
    ranks[1].kill()
    finish(ranks)


def torchrun(run_dir: Path, *more: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    options = ["-m", "fastgan.train", *RUN, "--kimg", "0.64", "--run-dir", str(run_dir)]
    return subprocess.Popen(
        [*command, *more, *options],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def children(of: int) -> dict[str, int]:
    """RANK -> process id of torchrun's workers."""
    found = {}
    for pid in Path(f"/proc/{of}/task/{of}/children").read_text().split():
        env = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        found |= {e.decode().partition("=")[2]: int(pid) for e in env if e.startswith(b"RANK=")}
    return found


TIMED = (".lock", "metrics.jsonl", "losses.png", "sessions.jsonl", "report.html")


def outcome(run_dir: Path) -> dict[str, Any]:
    """Every file of a run, the times in its log left out."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    varying = ("seconds", "cpu_seconds", "images_per_second", "memory_mib")
    files: dict[str, Any] = {"log": [{k: v for k, v in x.items() if k not in varying} for x in lines]}
    for path in sorted(run_dir.rglob("*")):
        if path.is_file() and path.name not in TIMED:
            files[str(path.relative_to(run_dir))] = path.read_bytes()
    return files


JOIN = """
import os, sys, time, torch
from fastgan.distributed import joined, launched
time.sleep(float(sys.argv[1]))
with joined(launched(), torch.device("cpu"), 60) as ranks:
    print(ranks.texts(f"{sys.argv[2]}.{ranks.rank}", "in a test"), flush=True)
    os._exit(0)  # as one that is killed: nothing is taken back
"""


def test_a_store_that_outlives_a_start_misleads_nobody():
    """torchrun's agent keeps its store over restarts, with the addresses of ranks that are dead."""
    port = free_port()
    _agent = next(rendezvous(f"tcp://127.0.0.1:{port}", 0, 1))  # the store lives as long
    kept = {"MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for late, number in (("0", "1"), ("6", "5")):  # gloo tries an address for some 4 s
        ranks = [
            start_one(rank, 2, "-c", JOIN, late if rank == 0 else "0", number, **kept) for rank in range(2)
        ]
        for code, said in finish(ranks):
            assert code == 0 and f"{number}.0" in said and f"{number}.1" in said, said


@pytest.mark.exhaustive
def test_torchrun_restarts_what_was_killed(tmp_path: Path):
    """The files of a run, one of whose ranks was killed, are those of an undisturbed one."""
    killed = torchrun(tmp_path / "killed", "--max-restarts=2")
    wait_for(killed, r"0\.2 kimg  img/s")
    os.kill(children(killed.pid)["1"], signal.SIGKILL)
    code, said = finish([killed])[0]
    assert code == 0 and "resuming at" in said, said
    code, said = finish([torchrun(tmp_path / "whole")])[0]
    assert code == 0, said
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")


@pytest.mark.exhaustive
def test_all_go_back_together_where_numbers_are_not_finite(tmp_path: Path):
    more = ["--kimg", "1", "--g-lr", "1e30", "--run-dir", str(tmp_path / "run")]
    for code, said in finish(start(2, "-m", "fastgan.train", *RUN, *more)):
        assert code == 2 and "also with 3 other draws of noise from the start" in said
