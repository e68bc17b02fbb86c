"""A training that is killed over and over: python -m bench.kills --kills 200

Trains a small StyleGAN2 with SIGKILL at random moments, every other one while a file is being written, and a
resume after each; then to its end, and once more undisturbed. The exit code is 0 if every resume went on,
every checkpoint left by a kill is a file of the undisturbed run byte for byte, and the ends are the same.

Trainers are forked from this process, which has imported everything: a kill costs a fraction of a second.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from fastgan import train
from fastgan.checkpoint import UNFINISHED, checkpoints, load_tensors

STEP = 4  # images; a checkpoint after each
RUN = (
    "--arch stylegan --resolution 8 --z-dim 6 --w-dim 6 --channel-base 64 --channel-max 8 --mapping-layers 1 "
    f"--batch {STEP} --mbstd-group 2 --precision fp32 --device cpu --tick-kimg 0.008 "
    f"--checkpoint-kimg {STEP / 1000}"
).split()
OWN_FIGURES = ("seconds", "cpu_seconds", "images_per_second", "memory_mib")  # a process's, not a run's


def forked(run_dir: Path, images: int, keep: int, log: Path) -> int:
    """The id of a new process that trains `run_dir` up to `images`."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        options = ["--kimg", str(images / 1000), "--keep", str(keep), "--run-dir", str(run_dir)]
        code = train.main([*RUN, *options])
    finally:
        os._exit(code)


def await_write(pid: int, run_dir: Path, before: set[str]) -> None:
    """Until the trainer writes a network that was not there `before`; RuntimeError if it ends by itself."""
    while not unfinished(run_dir) - before:
        if os.waitpid(pid, os.WNOHANG)[0]:
            raise RuntimeError("the trainer ended by itself")


def kill(pid: int) -> None:
    """SIGKILL; RuntimeError if the trainer had ended by itself."""
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if os.waitstatus_to_exitcode(status) != -signal.SIGKILL:
        raise RuntimeError("the trainer ended by itself")


def unfinished(run_dir: Path) -> set[str]:
    """Networks that are being written now, or were when the last writer died."""
    folders = [f for f in (run_dir / "checkpoints", run_dir) if f.is_dir()]
    return {n for f in folders for n in os.listdir(f) if n.endswith(UNFINISHED) and ".safetensors." in n}


def digest(file: Path) -> str:
    return hashlib.blake2b(file.read_bytes()).hexdigest()


def generator(run_dir: Path) -> tuple[dict[str, torch.Tensor], int]:
    """(tensors, images); ValueError if it is damaged."""
    file = run_dir / "generator.safetensors"
    tensors, metadata = load_tensors(file, checked=True) if file.exists() else ({}, {"images": 0})
    return tensors, metadata["images"]


def logged(run_dir: Path) -> list[dict]:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in OWN_FIGURES} for line in lines]


def differences(run_dir: Path, reference: Path, seen: dict[str, str]) -> list[str]:
    """What of a run, or of the checkpoints `seen` on the way, is not as in the undisturbed one."""
    found = [f"checkpoint {n}" for n, d in seen.items() if digest(reference / "checkpoints" / n) != d]
    pictures = [p.name for p in sorted((reference / "samples").iterdir())]
    found += [n for n in pictures if digest(run_dir / "samples" / n) != digest(reference / "samples" / n)]
    (ours, images), (theirs, all_images) = generator(run_dir), generator(reference)
    if images != all_images or not all(torch.equal(t, ours[name]) for name, t in theirs.items()):
        found.append("generator.safetensors")
    if logged(run_dir) != logged(reference):
        found.append("metrics.jsonl")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="bench.kills", description="Train, being killed over and over.")
    p.add_argument("--kills", type=int, default=200, help="how many (default: 200)")
    p.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    args = p.parse_args(argv)
    torch.set_num_threads(1)
    moments = random.Random(args.seed)
    seen: dict[str, str] = {}
    inside = between = 0
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        run_dir, reference, log = folder / "run", folder / "reference", folder / "log.txt"
        os.waitpid(forked(folder / "one step", STEP, 2, log), 0)
        span = 2.5 * (time.perf_counter() - began)  # the moments' range, in which a few steps fit
        for i in range(args.kills):
            images = max((int(f.stem) for f in checkpoints(run_dir / "checkpoints")), default=0)
            before = unfinished(run_dir)
            pid = forked(run_dir, 10**9, 2, log)
            try:
                time.sleep(moments.uniform(0, span))
                if i % 2 == 0:
                    await_write(pid, run_dir, before)
                    time.sleep(moments.uniform(0, 0.002))
                kill(pid)
            except RuntimeError as error:
                print(f"kill {i}: {error}: {log.read_text()}")
                return 1
            inside += bool(unfinished(run_dir) - before)
            left = checkpoints(run_dir / "checkpoints")
            for file in left:
                load_tensors(file, checked=True)  # ValueError if it is damaged
                if seen.setdefault(file.name, digest(file)) != digest(file):
                    print(f"kill {i}: {file.name} has changed")
                    return 1
            if max((int(f.stem) for f in left), default=0) < images:
                print(f"kill {i}: the checkpoint of {images} images is lost")
                return 1
            between += bool(left) and generator(run_dir)[1] != int(left[-1].stem)
        killing = time.perf_counter() - began
        end = max((int(f.stem) for f in checkpoints(run_dir / "checkpoints")), default=0) + 2 * STEP
        for path, keep in ((run_dir, 2), (reference, end)):
            _, status = os.waitpid(forked(path, end, keep, log), 0)
            if status:
                print(f"training {path.name} to its end: {log.read_text()}")
                return 1
        left_over = [p.name for p in run_dir.rglob(f".*{UNFINISHED}")]
        found = differences(run_dir, reference, seen) + left_over
    print(
        f"{args.kills} kills and resumes in {killing:.0f} s over {end // STEP} steps: {inside} while "
        f"a network was being written, {between} between a checkpoint and its generator"
    )
    print(f"{len(seen)} checkpoints seen on the way; differing from the undisturbed run: {found or 'none'}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
