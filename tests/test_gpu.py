"""The kernels on a GPU, at the shapes of the real networks. `pytest -m gpu`, or under a checker of memory:

compute-sanitizer --tool memcheck python -m pytest -m gpu tests/test_gpu.py -k "dcgan64 or stylegan64"
"""

import dataclasses
import warnings

import pytest
import torch

from fastgan.compiled import CudaCapture, Recording, Recordings
from fastgan.config import make_config
from fastgan.engine import Engine, blend
from fastgan.kernels import dispatch
from fastgan.operations import NETWORKS, calls

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("network", [n for n in NETWORKS if not n.startswith("smoke")])
def test_every_shape_within_twice_the_references_error(network: str, dtype: torch.dtype, monkeypatch):
    """Values, gradients and, where their float64 reference fits, gradients of gradients."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)
    found = {}
    for call in calls(network):
        args = call.tensors(CUDA, dtype)
        order = 2 if call.args[0].numel() < 2**22 else 1
        for name, candidate in call.op.candidates.items():
            if name != "reference":
                problem = dispatch.disagreement(candidate, call.op.candidates["reference"], args, order)
                found |= {(call.name, name): problem} if problem else {}
    assert not found


@pytest.mark.parametrize("arch", ["stylegan", "dcgan"])
def test_dispatch_verifies_and_remembers(arch: str, tmp_path, monkeypatch):
    """No kernel of a default training step is turned off, and the verdicts outlive the process."""
    monkeypatch.setenv("FASTGAN_CACHE", str(tmp_path))
    monkeypatch.setattr(dispatch, "_remembered", {})
    config = make_config(arch, batch=8, precision="bf16", device="cuda")
    real = torch.randint(0, 256, (8, 3, config.resolution, config.resolution), dtype=torch.uint8, device=CUDA)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Engine(config, CUDA).step(real)
    (file,) = tmp_path.iterdir()
    assert torch.cuda.get_device_name().split()[0] in file.name and "choice" in file.read_text()


@pytest.mark.parametrize("arch", ["stylegan", "dcgan"])
def test_a_compiled_step_equals_an_eager_one(arch: str):
    """Penalties included: the first step has R1 and path length."""
    config = make_config(arch, batch=8, precision="fp32", device="cuda")
    real = torch.randint(0, 256, (8, 3, config.resolution, config.resolution), dtype=torch.uint8, device=CUDA)
    eager, compiled = Engine(config, CUDA), Engine(config, CUDA)
    for phase in compiled.phases:
        phase.compiled = torch.compile(phase.function, fullgraph=True, dynamic=False)
        phase.eager_steps = 0
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        for engine in (eager, compiled):
            engine.step(real)
    for a, b in zip(eager.G.parameters(), compiled.G.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("arch", ["stylegan", "dcgan"])
def test_replayed_steps_equal_launched_ones(arch: str, monkeypatch):
    """All four phases among each other, each recorded at its second call, and what D draws inside of them."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    config = make_config(
        arch, batch=8, precision="fp32", device="cuda", r1=1.0, r1_every=2, pl=1.0, pl_every=2
    )
    real = torch.randint(0, 256, (8, 3, config.resolution, config.resolution), dtype=torch.uint8, device=CUDA)
    launched = Engine(dataclasses.replace(config, cuda_graphs=False), CUDA)
    replayed = Engine(config, CUDA)
    for _ in range(6):
        launched.step(real)
        replayed.step(real)
    for phase in replayed.phases:
        assert phase.recording and phase.recording.replay
    expected = launched.state()
    for name, value in replayed.state().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4, msg=name)


def test_a_captured_update_reads_its_rates_anew():
    """Learning rates and the decay of the average are on the device: a replay follows them."""
    config = make_config("dcgan", batch=8, precision="fp32", device="cuda", beta1=0.0)
    engine = Engine(config, CUDA)
    real = torch.randint(0, 256, (8, 3, config.resolution, config.resolution), dtype=torch.uint8, device=CUDA)
    for _ in range(2):
        engine.step(real)
    weight, average = next(engine.G.parameters()), next(engine.ema.parameters())
    lr = engine.g_optimizer.param_groups[0]["lr"]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        engine.g_optimizer.step()
        blend([average], [weight.detach()], engine.ema_rate)
    moved = []
    for rate in (0.0, 0.01, 0.02):
        lr.fill_(rate)
        assert isinstance(engine.ema_rate, torch.Tensor)
        engine.ema_rate.fill_(1.0 if rate else 0.0)
        before = weight.detach().clone(), average.clone()
        graph.replay()
        moved.append((weight.detach() - before[0]).abs().mean())
        assert average.equal(before[1]) if rate == 0 else torch.allclose(average, weight)
    assert moved[0] == 0 and 1.8 < moved[2] / moved[1] < 2.2


def test_a_failed_capture_leaves_no_trace():
    """The stream is the current one again and the generator draws."""
    recording = Recording(lambda x: x * x.sum().item() + torch.rand_like(x), Recordings(CudaCapture(CUDA)))
    x, stream = torch.ones(4, device=CUDA), torch.cuda.current_stream()
    recording(x)
    with pytest.warns(RuntimeWarning, match="CUDA graphs are off"):
        recording(x)
    assert torch.cuda.current_stream() == stream
    drawn = []
    for _ in range(2):
        torch.manual_seed(0)
        drawn.append(recording(x))
    assert drawn[0].equal(drawn[1])


def test_deterministic_on_request():
    """The same bits twice: no kernel adds in floating point with atomics."""
    torch.use_deterministic_algorithms(True)
    try:
        for call in calls("stylegan64"):
            args = call.tensors(CUDA, torch.bfloat16)
            run = call.op.candidates[call.op.preferred]
            first, second = (dispatch._derivatives(run, args, 1) for _ in range(2))
            assert all(a.equal(b) for a, b in zip(first, second, strict=True)), call.name
    finally:
        torch.use_deterministic_algorithms(False)
