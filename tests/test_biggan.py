"""SAGAN, BigGAN and the layers they share: against public numbers, and their contract."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from golden_cases import Case, golden
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastgan.losses import leaf, orthogonal
from fastgan.models import biggan, sagan
from fastgan.public import biggan_discriminator, biggan_generator
from fastgan.spectral import (
    ConditionalBatchNorm2d,
    Embedding,
    ProjectionDiscriminator,
    ResidualGenerator,
    SelfAttention,
    SpectralConv2d,
    add_spectral_norm,
    spectral_norm,
)

Names = dict[str, str]  # the peer's name -> ours


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def fill(net: nn.Module, state: dict[str, Tensor], names: Names) -> dict[str, Tensor]:
    """Write the peer's tensors into `net`; its parameters by their names in the golden cases."""
    targets = dict(net.named_parameters()) | dict(net.named_buffers())
    with torch.no_grad():
        for theirs, ours in names.items():
            targets[ours].copy_(state[theirs].reshape(targets[ours].shape))
    return {f"param.{theirs}": targets[ours] for theirs, ours in names.items()}


def check_buffers(case: Case, net: nn.Module, names: Names) -> None:
    state = net.state_dict()
    checked = [theirs for theirs in case.group("out.new.") if theirs in names]
    assert checked
    for theirs in checked:
        name = f"out.new.{theirs}"
        case.check(name, state[names[theirs]].reshape(case.tensor(name).shape))


def one_hot(labels: Tensor, classes: int) -> Tensor:
    return F.one_hot(labels, classes).double()


NORMALIZED = {"weight": "parametrizations.weight.original", "u0": "parametrizations.weight.0.u"}


@golden("spectral_norm")
def test_spectral_norm(case: Case):
    kind, kw = case.args["kind"], dict(case.args["kw"])
    iterations = kw.pop("num_itrs", 1)
    layer = {"conv": nn.Conv2d, "linear": nn.Linear, "embedding": Embedding}[kind](*case.args["ctor"], **kw)
    layer = spectral_norm(layer.double(), iterations).train(case.args["train"])
    x = case.tensor("in.x")
    x = one_hot(x, case.args["ctor"][0]) if kind == "embedding" else x.requires_grad_()
    names = NORMALIZED | ({"bias": "bias"} if hasattr(layer, "bias") and layer.bias is not None else {})
    inputs = {"x": x} | fill(layer, case.group("in.param."), names)
    case.check_derivatives(layer(x), inputs)
    check_buffers(case, layer, names)


@golden("attention_biggan")
def test_attention(case: Case):
    layer = SelfAttention(case.args["ch"]).double()
    names = {"gamma": "gamma"}
    for conv in ("theta", "phi", "g", "o"):
        if case.args["conv"] == "plain":
            parametrize.remove_parametrizations(getattr(layer, conv), "weight", leave_parametrized=False)
            names[f"{conv}.weight"] = f"{conv}.weight"
        else:
            names |= {f"{conv}.{theirs}": f"{conv}.{ours}" for theirs, ours in NORMALIZED.items()}
    inputs = {"x": case.tensor("in.x").requires_grad_()} | fill(layer, case.group("in.param."), names)
    case.check_derivatives(layer(inputs["x"]), inputs)
    if case.args["conv"] == "sn":
        check_buffers(case, layer, names)


@golden("studiogan_layers", "studio_attention")
def test_attention_of_studiogan(case: Case):
    layer = SelfAttention(case.args["ch"]).double()
    names = {"sigma": "gamma"}
    for theirs, ours in {"theta": "theta", "phi": "phi", "g": "g", "attn": "o"}.items():
        names[f"conv1x1_{theirs}.weight_orig"] = f"{ours}.parametrizations.weight.original"
        names[f"conv1x1_{theirs}.weight_u"] = f"{ours}.parametrizations.weight.0.u"
    inputs = {"x": case.tensor("in.x").requires_grad_()} | fill(layer, case.group("in.param."), names)
    layer.gamma.data = layer.gamma.data[None]  # there a vector of one number
    inputs["param.sigma"] = layer.gamma
    case.check_derivatives(layer(inputs["x"]), inputs)
    check_buffers(case, layer, names)


def check_batch_norm(case: Case, layer: nn.Module, y: Tensor | None, names: Names) -> None:
    layer.double().train(case.args["train"])
    inputs = {"x": case.tensor("in.x").requires_grad_()} | fill(layer, case.group("in.param."), names)
    if y is not None and any(k in ("y_cond", "cond") for k in case.spec["differentiable"]):
        inputs |= {"y_cond": y.requires_grad_(), "cond": y}
    case.check_derivatives(layer(inputs["x"], y), inputs)
    check_buffers(case, layer, names)


STORED = {"stored_mean": "running_mean", "stored_var": "running_var"}


@golden("cond_batchnorm", "biggan_ccbn")
def test_conditional_batch_norm(case: Case):
    args, y = case.args, case.tensor("in.y_cond")
    if args["which_linear"] == "embedding":
        y = one_hot(y, args["input_size"])

    def condition(channels: int) -> nn.Module:
        if args["which_linear"] == "embedding":
            return Embedding(args["input_size"], channels)
        return nn.Linear(args["input_size"], channels, bias=False)

    layer = ConditionalBatchNorm2d(args["channels"], condition, args["eps"], act="linear")
    check_batch_norm(case, layer, y, STORED | {"gain.weight": "gain.weight", "bias.weight": "shift.weight"})


@golden("cond_batchnorm", "biggan_bn")
def test_batch_norm(case: Case):
    layer = ConditionalBatchNorm2d(case.args["channels"], eps=case.args["eps"], act="linear")
    check_batch_norm(case, layer, None, STORED | {"gain": "weight", "bias": "bias"})


@golden("studiogan_layers", "studio_cbn")
def test_conditional_batch_norm_of_studiogan(case: Case):
    def condition(channels: int) -> nn.Module:
        return nn.Linear(case.args["in_f"], channels, bias=False)

    names = {f"bn.{name}": name for name in ("running_mean", "running_var", "num_batches_tracked")}
    names |= {"gain.weight": "gain.weight", "bias.weight": "shift.weight"}
    layer = ConditionalBatchNorm2d(case.args["out_f"], condition, eps=1e-4, act="linear")
    check_batch_norm(case, layer, case.tensor("in.cond"), names)


def attention_behind(state: dict[str, Tensor]) -> list[int]:
    """The stages that attention follows in BigGAN-PyTorch's `state`."""
    return [int(k.split(".")[1]) for k in state if k.startswith("blocks.") and k.endswith(".gamma")]


def peer_generator(ctor: dict, state: dict[str, Tensor]) -> biggan.Generator:
    return biggan.Generator(
        z_dim=ctor["dim_z"],
        c_dim=ctor["n_classes"],
        resolution=ctor["resolution"],
        ngf=ctor["G_ch"],
        shared_dim=state["shared.weight"].shape[1] if ctor["G_shared"] else 0,
        hier=ctor["hier"],
        attention_behind=attention_behind(state),
    )


def peer_discriminator(ctor: dict, state: dict[str, Tensor]) -> biggan.Discriminator:
    return biggan.Discriminator(
        c_dim=ctor["n_classes"],
        resolution=ctor["resolution"],
        ndf=ctor["D_ch"],
        attention_behind=attention_behind(state),
    )


def load(net: nn.Module, case: Case, convert: Callable[[dict], dict]) -> dict[str, Tensor]:
    state = case.group("in.param.")
    converted = convert(state)
    net.double().train(case.args["train"]).load_state_dict(converted, strict=True)
    own = dict(net.named_parameters())
    names = {id(tensor): name for name, tensor in converted.items()}
    return {f"param.{k}": own[names[id(v)]] for k, v in state.items() if names.get(id(v)) in own}


def check_state(net: nn.Module, case: Case, convert: Callable[[dict], dict]) -> None:
    """The peer's buffers after the call."""
    state = case.group("in.param.") | case.group("out.new.")
    own = net.state_dict()
    for name, expected in convert(state).items():
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(own[name], expected, rtol=2e-6, atol=2e-7)


@golden("biggan_nets", "biggan_G")
def test_biggan_generator(case: Case):
    G = peer_generator(case.args["ctor"], case.group("in.param."))
    inputs = load(G, case, biggan_generator) | {"z": case.tensor("in.z")}
    c = one_hot(case.tensor("in.labels"), G.c_dim)
    if case.spec["differentiable"]:
        case.check_derivatives(G(inputs["z"].requires_grad_(), c), inputs)
    else:
        case.check("out.y", G(inputs["z"], c))
    check_state(G, case, biggan_generator)


@golden("biggan_nets", "biggan_D")
def test_biggan_discriminator(case: Case):
    D = peer_discriminator(case.args["ctor"], case.group("in.param."))
    inputs = load(D, case, biggan_discriminator) | {"x": case.tensor("in.x")}
    c = one_hot(case.tensor("in.labels"), D.c_dim)
    if case.spec["differentiable"]:
        case.check_derivatives(D(inputs["x"].requires_grad_(), c), inputs)
    else:
        case.check("out.y", D(inputs["x"], c))
    check_state(D, case, biggan_discriminator)


def test_parameter_counts():
    with torch.device("meta"):
        # BigGAN-PyTorch, launch_BigGAN_bs256x8.sh
        assert parameters(biggan.Generator(120, 1000)) == 70_433_988
        assert parameters(biggan.Discriminator(1000)) == 87_982_370
        # The same file's networks without shared embedding and hierarchical z are SAGAN's.
        assert parameters(sagan.Discriminator(1000, ndf=96, attention=64)) == 87_982_370
        # pytorch-pretrained-biggan's biggan-deep-128 makes 128 output channels and looks at 3 of them.
        deep = {"ngf": 128, "z_dim": 128, "c_dim": 1000, "deep": True}
        assert parameters(biggan.Generator(**deep, channels=128)) == 50_388_609
        # 34.6M (Brock et al. 2018, table 2)
        assert round(parameters(biggan.Discriminator(1000, ndf=128, deep=True)) / 1e5) == 346
        # torch-mimicry's SAGANGenerator128(1000); its D has the narrower blocks of SNGAN.
        assert parameters(sagan.Generator(128, 1000)) == 42_078_852
        assert parameters(sagan.Discriminator(1000)) == 39_463_618


def pair(
    arch: str, c_dim: int = 3, resolution: int = 16, **kw
) -> tuple[ResidualGenerator, ProjectionDiscriminator]:
    torch.manual_seed(0)
    half = resolution // 2
    if arch == "sagan":
        return (
            sagan.Generator(6, c_dim, resolution, 1, 8, 8, **kw),
            sagan.Discriminator(c_dim, resolution, 1, 8, half, **kw),
        )
    deep = arch == "biggan deep"
    return (
        biggan.Generator(6, c_dim, resolution, 1, 4, 8, 5 if arch != "biggan plain" else 0, deep=deep, **kw),
        biggan.Discriminator(c_dim, resolution, 1, 4, half, deep, **kw),
    )


ARCHS = ["sagan", "biggan", "biggan plain", "biggan deep"]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("c_dim", [0, 3])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_contract(arch: str, c_dim: int, dtype: torch.dtype | None):
    G, D = pair(arch, c_dim, dtype=dtype)
    z, c = torch.randn(4, G.z_dim), torch.eye(3)[[0, 1, 2, 0]] if c_dim else None
    assert (G.normals, G.uniforms, G.c_dim) == (6, 0, c_dim)
    for param in G.parameters():
        if param.ndim == 0:  # else attention has no part
            nn.init.ones_(param)
    images, latents = G.sample(z, torch.empty(4, 0), c)
    assert latents is z
    assert images.shape == (4, 1, 16, 16) and images.abs().max() <= 1
    logits = D(images, c)
    assert logits.shape == (4, 1) and images.dtype == logits.dtype == torch.float32
    twin = copy.deepcopy(D)
    twin.load_state_dict(D.state_dict())
    assert torch.equal(D(images, c), twin.head(twin.features(images), c))
    if c is not None:
        G.eval()
        D.eval()
        assert not torch.equal(D(images, c), D(images, c.roll(1, 0)))
        for module in G.modules():
            if isinstance(module, Embedding):  # they start at zero
                nn.init.normal_(module.weight)
        assert not torch.equal(G(z, c), G(z, c.roll(1, 0)))
        with pytest.raises(ValueError, match=r"c must be given.*\[N, 3\]"):
            G(z)
        with pytest.raises(ValueError, match=r"c must be given.*\[N, 3\]"):
            D(images)


@pytest.mark.parametrize("resolution", [8, 32, 64])
def test_shapes(resolution: int):
    for G, D in (
        (sagan.Generator(6, 0, resolution, 3, 1, 0), sagan.Discriminator(0, resolution, 3, 1, 0)),
        (
            biggan.Generator(30, 0, resolution, 3, 1, 0, hier=resolution != 32),
            biggan.Discriminator(0, resolution, 3, 1, 0),
        ),
        (
            biggan.Generator(6, 0, resolution, 3, 2, 8, deep=True),
            biggan.Discriminator(0, resolution, 3, 2, 8 if resolution == 32 else 4, deep=True),
        ),
    ):
        images = G(torch.randn(2, G.z_dim))
        assert images.shape == (2, 3, resolution, resolution)
        assert D(images).shape == (2, 1)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: sagan.Generator(resolution=48), "4 times a power of two.*48"),
        (lambda: biggan.Generator(resolution=48), "one of 8, 16, .*48"),
        (lambda: biggan.Discriminator(resolution=1024), "one of 8, 16, .*1024"),
        (lambda: biggan.Generator(102, resolution=32, ngf=1, attention=0), "multiple of 4.*3 blocks.*102"),
        (lambda: sagan.Discriminator(resolution=16, ndf=1, attention=16), "one of 4, 8: got 16"),
        (lambda: sagan.Generator(resolution=16, ngf=1, attention=4), "one of 8, 16: got 4"),
    ],
)
def test_what_cannot_be_built_says_why(build, message: str):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(("up", "down"), [(2, 1), (1, 2), (1, 1)])
@pytest.mark.parametrize("kernel", [1, 3])
def test_folded_resampling_is_the_plain_one(up: int, down: int, kernel: int):
    torch.manual_seed(0)
    conv = SpectralConv2d(3, 5, kernel, "relu", up, down).double().eval()
    assert conv.bias is not None
    nn.init.normal_(conv.bias)
    x = torch.randn(2, 3, 6, 4).double()
    y = F.interpolate(x, scale_factor=2) if up > 1 else x
    y = F.conv2d(y, conv.weight, conv.bias if down == 1 else None, padding=kernel // 2)
    y = F.avg_pool2d(y, 2) + conv.bias[:, None, None] if down > 1 else y
    torch.testing.assert_close(conv(x), y.relu(), rtol=1e-12, atol=1e-12)


def test_spectral_norm_bounds_every_weight_of_any_network():
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
    up, one = nn.ConvTranspose2d(4, 2, 3), nn.Conv2d(2, 2, 1)
    net = nn.Sequential(conv, norm, up, spectral_norm(one))
    add_spectral_norm(net)
    for _ in range(50):
        net(torch.randn(2, 3, 6, 6))
    net.eval()
    assert not parametrize.is_parametrized(norm)
    assert "parametrizations.weight.1.u" not in one.state_dict()
    for weight in (conv.weight, up.weight.transpose(0, 1), one.weight):
        assert torch.linalg.matrix_norm(weight.flatten(1), 2).item() == pytest.approx(1, abs=1e-3)


def test_evaluation_forgets_its_iteration_and_layouts_agree():
    conv = spectral_norm(nn.Conv2d(3, 5, 3)).double()
    twin = copy.deepcopy(conv)
    original = dict(twin.named_parameters())["parametrizations.weight.original"]
    original.data = original.data.contiguous(memory_format=torch.channels_last)
    u = dict(conv.named_buffers())["parametrizations.weight.0.u"]
    before = u.clone()
    torch.testing.assert_close(conv.weight, twin.weight)
    assert not torch.equal(u, before)
    before = u.clone()
    conv.eval()
    assert torch.equal(conv.weight, conv.weight) and torch.equal(u, before)


def test_statistics_of_batch_norm_are_found_and_move():
    G, _ = pair("biggan")
    norms = [m for m in G.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) == 5  # two blocks and the last
    G(torch.randn(4, 6), torch.eye(3)[[0, 1, 2, 0]])
    for norm in norms:
        assert norm.running_mean is not None and norm.running_mean.abs().max() > 0
        assert norm.num_batches_tracked is not None and norm.num_batches_tracked.item() == 1


def test_hierarchical_z_reaches_each_block():
    G, _ = pair("biggan")
    G.eval()
    z, c = torch.randn(1, 6), torch.eye(3)[:1]
    for first in (0, 2, 4):
        other = z.clone()
        other[:, first : first + 2] += 1
        assert not torch.allclose(G(z, c), G(other, c))


def test_orthogonal_regularization():
    torch.manual_seed(0)
    weights = [torch.randn(4, 3, 2, 2).double().requires_grad_(), torch.randn(5, 2).double().requires_grad_()]
    penalty = orthogonal(weights)
    gradients = torch.autograd.grad(penalty, weights)
    expected = 0.0
    for w, gradient in zip(weights, gradients, strict=True):
        m = w.detach().flatten(1)
        off = (m @ m.t()) * (1 - torch.eye(len(m)).double())
        expected += off.square().sum()
        torch.testing.assert_close(gradient.flatten(1), 4 * off @ m)
    torch.testing.assert_close(penalty.detach(), expected)
    assert orthogonal([torch.linalg.qr(torch.randn(6, 3))[0].t() * 3]).item() == pytest.approx(0, abs=1e-9)


def discriminator_phase(G, D, z, c, real, real_c):
    """Hinge loss and R1, with a pass of D on fakes and one on reals."""
    fake = G(z, c).detach()
    real = leaf(real)
    logits = D(real, real_c)
    (grad,) = torch.autograd.grad(logits.sum(), real, create_graph=True)
    loss = F.relu(1 - logits).mean() + F.relu(1 + D(fake, c)).mean() + grad.square().sum()
    return loss.detach(), torch.autograd.grad(loss, list(D.parameters()))


def generator_phase(G, D, z, c, real, real_c):
    loss = -D(G(z, c), c).mean()
    return loss.detach(), torch.autograd.grad(loss, list(G.parameters()))


@pytest.mark.parametrize(
    ("arch", "phase"),
    [
        ("sagan", discriminator_phase),
        ("biggan", discriminator_phase),
        ("biggan", generator_phase),
        ("biggan deep", discriminator_phase),
    ],
)
def test_compiled_gradients_are_the_eager_ones(arch: str, phase):
    torch._dynamo.config.trace_autograd_ops = True  # as compile_phase
    nets = [net.double() for net in pair(arch, resolution=8)]
    for net in nets:
        for name, param in net.named_parameters():
            if name.endswith("gamma"):
                nn.init.ones_(param)
    twins = copy.deepcopy(nets)
    c = torch.eye(3).double()
    arguments = torch.randn(3, 6).double(), c, torch.randn(3, 1, 8, 8).double(), c.roll(1, 0)
    compiled = torch.compile(phase, fullgraph=True, dynamic=False, backend="aot_eager")
    for _ in range(2):  # the second starts from the u and statistics that the first left
        loss, grads = phase(*nets, *arguments)
        other_loss, other_grads = compiled(*twins, *arguments)
        torch.testing.assert_close(other_loss, loss, rtol=1e-9, atol=1e-12)
        scale = max(g.abs().max() for g in grads)
        for a, b in zip(other_grads, grads, strict=True):
            assert (a - b).abs().max() <= 1e-9 * scale
        assert scale > 0
    for net, twin in zip(nets, twins, strict=True):
        torch.testing.assert_close(twin.state_dict(), net.state_dict(), rtol=1e-9, atol=1e-12)


@golden("biggan_nets", "biggan_G", train=False)
def test_a_checkpoint_of_biggan_pytorch_makes_its_pictures(case: Case):
    state = torch.load(
        Path(__file__).parent / "golden" / "checkpoints" / "biggan_public0_G.pth", weights_only=True
    )
    G = peer_generator(case.args["ctor"], state).eval()
    G.load_state_dict(biggan_generator(state), strict=True)
    images = G(case.tensor("in.z").float(), one_hot(case.tensor("in.labels"), G.c_dim))
    case.check("out.y", images, tol=2e-5)
