"""Exported generators compute what the network does, at any batch size, without fastgan."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from family_cases import CPU, TINY, tiny_config
from torch._inductor import config as inductor

from fastgan import export
from fastgan.checkpoint import load_tensors, save_tensors
from fastgan.config import Config, build_generator


def saved(path: Path, arch: str, **options: Any) -> tuple[Any, Config]:
    """The generator and config of a generator.safetensors at `path`; its weights are not those of a start."""
    config = tiny_config(arch, **options)
    torch.manual_seed(0)
    G = build_generator(config).eval().requires_grad_(False)
    for name, tensor in G.state_dict().items():
        if name.endswith("noise_strength"):  # 0 at first, and AdaIN divides a constant by its deviation
            tensor.normal_()
    save_tensors(path, G.state_dict(), config=dataclasses.asdict(config), images=0)
    return G, config


def outputs(file: Path, **args: torch.Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    assert [given.name for given in session.get_inputs()] == [*args]
    return np.asarray(session.run(None, {name: x.numpy() for name, x in args.items()})[0])


def close(a: np.ndarray, b: torch.Tensor) -> bool:
    assert a.shape == tuple(b.shape) and a.dtype == np.float32
    return bool(np.abs(a - b.numpy()).max() <= 1e-4 * b.abs().max().item())


@pytest.mark.parametrize(("arch", "options"), [("stylegan", {"cond": True, "classes": 3}), ("dcgan", {})])
def test_onnx(arch: str, options: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    G, config = saved(tmp_path / "g.safetensors", arch, **options)
    file = tmp_path / "g.onnx"
    assert export.main([str(tmp_path / "g.safetensors"), str(file)]) == 0
    out = capsys.readouterr().out
    assert str(file) in out and "z [N, 8]" in out and ("c [N, 3]" in out) == config.cond
    for count in (1, 2, 7):
        args = {"z": torch.randn(count, G.z_dim)}
        if config.cond:
            args["c"] = torch.eye(3)[torch.arange(count) % 3]
        assert close(outputs(file, **args), G(**args))
    model = onnx.load(file)
    onnx.checker.check_model(model)
    assert {node.domain for node in model.graph.node} == {""}
    assert [d.dim_param or d.dim_value for d in model.graph.output[0].type.tensor_type.shape.dim] == [
        *("batch", 3, 8, 8)
    ]
    metadata = json.loads({entry.key: entry.value for entry in model.metadata_props}["fastgan"])
    assert Config(**metadata["config"]) == config
    assert str(Path(__file__).parents[1]) not in str(model)  # no stack traces
    assert sorted(p.name for p in tmp_path.iterdir()) == ["g.onnx", "g.safetensors"]


def test_a_file_that_disagrees_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    saved(tmp_path / "g.safetensors", "dcgan")
    monkeypatch.setattr(export, "load_onnx", lambda path: lambda z: torch.zeros(len(z), 3, 8, 8))
    assert export.main([str(tmp_path / "g.safetensors"), str(tmp_path / "g.onnx")]) == 2
    err = capsys.readouterr().err
    assert "g.onnx would differ from the network" in err and len(err.splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["g.safetensors"]


def test_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    weights = tmp_path / "g.safetensors"
    saved(weights, "dcgan")
    (tmp_path / "a.onnx").mkdir()
    for argv, words in (
        ([weights, tmp_path / "g.pth"], ["g.pth", ".onnx or .pt2"]),
        ([weights, tmp_path / "gone" / "g.onnx"], ["gone", "no folder"]),
        ([tmp_path / "gone.safetensors", tmp_path / "g.onnx"], ["gone", "does not exist"]),
        ([weights, tmp_path / "g.onnx", "--precision", "bf16"], ["bf16", ".pt2"]),
        ([weights, tmp_path / "g.onnx", "--to", "a"], ["--to", "dcgan"]),
        ([weights, tmp_path / "a.onnx"], ["a.onnx", "is a folder"]),
        ([weights, "/proc/g.onnx"], ["/proc/g.onnx", "cannot be written"]),
    ):
        assert export.main([*map(str, argv)]) == 2
        err = capsys.readouterr().err
        assert len(err.splitlines()) == 1 and all(word in err for word in words), err
    with inductor.patch({"cpp.cxx": ("no-compiler",)}):
        assert export.main([str(weights), str(tmp_path / "g.pt2")]) == 2
    err = capsys.readouterr().err
    assert "install g++" in err and len(err.splitlines()) == 1
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    assert export.main([str(weights), str(tmp_path / "g.onnx")]) == 2
    assert "pip install 'fastgan[export]'" in capsys.readouterr().err
    tensors, metadata = load_tensors(weights)
    tensors.pop("main.0.weight")
    save_tensors(weights, tensors, **metadata)
    monkeypatch.undo()
    assert export.main([str(weights), str(tmp_path / "g.onnx")]) == 2
    assert "does not fit" in capsys.readouterr().err


def test_a_package_may_be_read_by_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As any new file, and nothing else is left where it was written."""
    G, _ = saved(tmp_path / "g.safetensors", "dcgan")

    def compile(program: Any, path: Path, metadata: str) -> None:
        path.write_bytes(b"compiled")

    monkeypatch.setattr(export, "write_package", compile)
    monkeypatch.setattr(export, "load_package", lambda path: G)
    assert export.main([str(tmp_path / "g.safetensors"), str(tmp_path / "g.pt2"), "--device", "cpu"]) == 0
    (tmp_path / "new").touch()
    assert (tmp_path / "g.pt2").stat().st_mode == (tmp_path / "new").stat().st_mode
    assert sorted(p.name for p in tmp_path.iterdir()) == ["g.pt2", "g.safetensors", "new"]


@pytest.mark.exhaustive
@pytest.mark.parametrize("arch", [arch for arch in TINY if arch not in ("stylegan", "dcgan")])
def test_every_family_as_onnx(arch: str, tmp_path: Path):
    G, config = saved(tmp_path / "g.safetensors", arch)
    file = tmp_path / "g.onnx"
    for to in ("a", "b") if arch == "cyclegan" else ("",):
        assert export.main([str(tmp_path / "g.safetensors"), str(file), *(["--to", to] if to else [])]) == 0
        for count in (1, 5):
            if to:
                args = {"images": torch.rand(count, 3, 8, 8) * 2 - 1}
                wanted = G.translate(args["images"], to)
            else:
                args = export.inputs(G, config, count, CPU)
                wanted = G(**args)
            assert close(outputs(file, **args), wanted)


@pytest.mark.exhaustive
def test_package(tmp_path: Path):
    """R3GAN has operators of its own, which Inductor rounds otherwise in bf16."""
    G, config = saved(tmp_path / "g.safetensors", "r3gan", precision="bf16")
    file = tmp_path / "g.pt2"
    command = [str(tmp_path / "g.safetensors"), str(file), "--precision", "bf16", "--device", "cpu"]
    assert export.main(command) == 0
    package = torch._inductor.aoti_load_package(str(file))
    for count in (1, 2, 7):
        z = torch.randn(count, G.z_dim)
        images, wanted = package(z=z), G(z)
        assert images.shape == wanted.shape and images.dtype == torch.float32
        assert (images - wanted).abs().max() < 0.03 * wanted.abs().max()
    assert Config(**json.loads(package.get_metadata()["fastgan"])["config"]) == config
