"""python -m fastgan.export: a trained generator as an ONNX file or an AOTInductor package.

    images [N, C, R, R] = G(z [N, z_dim], c [N, c_dim] one-hot, of a conditional run only)

float32 and around -1..1, N any number; StyleGANs add their constant noise, a family of two domains joins its
pairs along the channels. CycleGAN takes images [N, C, R, R] in -1..1 and gives their translations. A .pt2
takes its arguments by name. Convolutions are in --precision, whatever the run was trained in, which is what
fastgan.load computes in.

Operations run as their references, and our own operators that PyTorch can see through as what they stand
for, so that the file holds nothing of fastgan but its config, in the metadata under "fastgan". It is written
only if what it computes agrees with the network.
"""

import contextlib
import dataclasses
import importlib.util
import json
import logging
import os
import secrets
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS

from fastgan import cli, pretrained
from fastgan.checkpoint import write
from fastgan.compiled import check_compiler
from fastgan.config import Config, UsageError
from fastgan.engine import one_hot

OPSET = 18  # ONNX Runtime runs it from 1.14 on
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}  # of the largest value


def parser() -> cli.Parser:
    """The command's options."""
    p = cli.Parser(prog="fastgan export", description=__doc__, formatter_class=cli.Prose)
    p.add_argument("run", type=Path, metavar="RUN", help="folder of a run, or a file of weights")
    p.add_argument("out", type=Path, metavar="OUT", help="file to write: .onnx, or .pt2 for AOTInductor")
    p.add_argument("--to", choices=("a", "b"), help="of CycleGAN: domain to translate to (default: b)")
    p.add_argument(
        "--precision",
        choices=("fp32", "bf16"),
        default="fp32",
        help="of convolutions; ONNX is fp32 (default: fp32)",
    )
    p.add_argument("--device", default="auto", help="that a .pt2 is compiled for (default: auto)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return cli.run(_main, argv)


def _main(argv: Sequence[str] | None) -> int:
    args = parser().parse_args(argv)
    if args.out.suffix not in (".onnx", ".pt2"):
        raise UsageError(f"OUT must end in .onnx or .pt2: got {args.out}")
    if not args.out.parent.is_dir():
        raise UsageError(f"{args.out} cannot be written: there is no folder {args.out.parent}")
    if args.out.is_dir():
        raise UsageError(f"{args.out} cannot be written: it is a folder")
    onnx = args.out.suffix == ".onnx"
    if onnx:
        if args.precision != "fp32":
            raise UsageError("--precision bf16 is for .pt2: ONNX Runtime has no bf16 convolutions on a CPU")
        for package in ("onnx", "onnxscript", "onnxruntime"):
            if importlib.util.find_spec(package) is None:
                raise UsageError(f"exporting to ONNX needs {package}: pip install 'fastgan[export]'")
    else:
        check_compiler("a .pt2")
    networks = pretrained.read(args.run)
    config = dataclasses.replace(networks.config, precision=args.precision)
    networks = dataclasses.replace(networks, config=config)
    net = pretrained.build(networks, device="cpu" if onnx else args.device).net
    if getattr(net, "translates", False):
        net = net.b_to_a if args.to == "a" else net.a_to_b
    elif args.to:
        raise UsageError(f"--to: --arch {config.arch} translates nothing; leave it out")
    device = next(net.parameters()).device
    example = inputs(net, config, 2, device)
    metadata = json.dumps({"config": dataclasses.asdict(config), "images": networks.images})
    # Inductor wants a name with the package's ending.
    partial = args.out.with_name(f".{args.out.stem}.{secrets.token_hex(4)}{args.out.suffix}")
    try:
        partial.touch()
    except OSError as error:
        raise UsageError(f"{args.out} cannot be written: {error.strerror}") from None
    try:
        program = trace(net, example)
        (write_onnx if onnx else write_package)(program, partial, metadata)
        run = (load_onnx if onnx else load_package)(partial)
        error = max(disagreement(run, net, inputs(net, config, n, device)) for n in (1, 3))
        if not error <= TOLERANCE[config.dtype]:
            raise UsageError(f"{args.out} would differ from the network by {error:.2g} of its largest value")
        os.replace(partial, args.out)
    finally:
        partial.unlink(missing_ok=True)
    size = args.out.stat().st_size / 2**20
    taken = " and ".join(f"{name} [N, {', '.join(map(str, x.shape[1:]))}]" for name, x in example.items())
    print(f"{args.out}: {size:.3g} MiB, takes {taken}, float32; within {error:.1g} of the network")
    return 0


def inputs(net: Any, config: Config, count: int, device: torch.device) -> dict[str, Tensor]:
    """Random arguments of `net` by name, for a batch of `count`."""
    generator = torch.Generator().manual_seed(count)
    if not hasattr(net, "z_dim"):  # a translator
        shape = (count, config.channels, config.resolution, config.resolution)
        return {"images": torch.rand(shape, generator=generator).to(device) * 2 - 1}
    given = {"z": torch.randn(count, net.z_dim, generator=generator).to(device)}
    if config.cond:
        given["c"] = one_hot(torch.arange(count, device=device) % config.c_dim, config.c_dim)
    return given


def trace(net: nn.Module, args: dict[str, Tensor]) -> torch.export.ExportedProgram:
    """`net` as a graph of PyTorch's own operators, the first dimension of all arguments one free size."""
    batch = torch.export.Dim("batch", min=1)
    with _quiet(), mock.patch.dict(os.environ, FASTGAN_KERNELS="reference"), torch.no_grad():
        program = torch.export.export(net, (), args, dynamic_shapes={name: {0: batch} for name in args})
        table = torch.export.default_decompositions()
        for node in program.graph.nodes:
            if getattr(node.target, "namespace", "") == "fastgan":
                table[node.target] = OPDEFS[node.target.name()]._init_fn
        return program.run_decompositions(table)


def write_onnx(program: torch.export.ExportedProgram, path: Path, metadata: str) -> None:
    """The program as an ONNX file."""
    with _quiet():
        converted = torch.onnx.export(program, opset_version=OPSET, dynamo=True, verbose=False)
    assert converted is not None
    model = converted.model
    for value in (*model.graph.inputs, *model.graph.outputs):
        assert value.shape is not None
        value.shape[0] = "batch"
    model.graph.outputs[0].name = "translated" if model.graph.inputs[0].name == "images" else "images"
    for node in model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces, with the paths of this machine
    model.metadata_props["fastgan"] = metadata
    write(path, converted.model_proto.SerializeToString())


def load_onnx(path: Path) -> Callable[..., Tensor]:
    """What an ONNX file computes, by ONNX Runtime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(**args: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {k: x.numpy() for k, x in args.items()})[0])

    return run


def write_package(program: torch.export.ExportedProgram, path: Path, metadata: str) -> None:
    """The program compiled by AOTInductor, in a .pt2 file."""
    with _quiet():
        torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(path),
            inductor_configs={"aot_inductor.metadata": {"fastgan": metadata}},
        )


def load_package(path: Path) -> Callable[..., Tensor]:
    """What a .pt2 file computes."""
    return torch._inductor.aoti_load_package(str(path))


@torch.no_grad()
def disagreement(run: Callable[..., Tensor], net: nn.Module, args: dict[str, Tensor]) -> float:
    """The largest difference between the images of `run` and `net`, over the largest value."""
    exact = net(**args).double()
    return ((run(**args).double() - exact).abs().max() / exact.abs().max()).item()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """PyTorch's exporters without what they say about themselves."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)  # torchvision is not installed
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r".*LeafSpec\)` is deprecated", FutureWarning)
            yield
    finally:
        log.setLevel(level)


if __name__ == "__main__":
    sys.exit(main())
