"""CycleGAN and CoGAN: against pytorch-CycleGAN's numbers and a CoGAN of separate networks, parameter counts,
and what a pair of domains promises; the pool of generated images."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from golden_cases import Case, golden
from torch import Tensor, nn

from fastgan import losses
from fastgan.losses import gradient_penalty, gradient_square, leaf, least_squares_d, least_squares_g
from fastgan.models import cogan, cyclegan
from fastgan.pool import Pool, from_pool
from fastgan.public import cyclegan_discriminator, cyclegan_generator

CHECKPOINT = Path(__file__).parent / "golden" / "checkpoints" / "cyclegan_public0_latest_net_G_A.pth"


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def load(net: nn.Module, case: Case, convert) -> dict[str, Tensor]:
    """Fill `net` with the peer's tensors; its parameters by the peer's names."""
    state = case.group("in.param.")
    net.to(case.dtype).load_state_dict(convert(state), strict=True)
    ours = dict(net.named_parameters())
    return {f"param.{k}": ours[name] for k, name in zip(state, convert(state), strict=True)}


def generator(args: dict) -> cyclegan.ResNet:
    return cyclegan.ResNet(args["in"], args["ngf"], args["n_blocks"], None)


def discriminator(args: dict) -> cyclegan.PatchGAN:
    return cyclegan.PatchGAN(args["in"], args["ndf"], args["n_layers"], None)


@golden("cyclegan_nets", "cyclegan_G")
def test_generator(case: Case):
    net = generator(case.args)
    inputs = load(net, case, cyclegan_generator) | {"x": case.tensor("in.x").requires_grad_()}
    case.check_derivatives(net(inputs["x"]), inputs)


@golden("cyclegan_nets", "cyclegan_D")
def test_discriminator(case: Case):
    net = discriminator(case.args)
    inputs = load(net, case, cyclegan_discriminator) | {"x": case.tensor("in.x").requires_grad_()}
    case.check_derivatives(net(inputs["x"]), inputs)


@golden("cyclegan_losses", "cyclegan_ganloss")
def test_losses(case: Case):
    """The peer's loss for a target of "real", on reals in D and on fakes in G, and for "fake"."""
    loss_d, loss_g = {
        "lsgan": (losses.least_squares_d, losses.least_squares_g),
        "vanilla": (losses.logistic_d, losses.non_saturating_g),
        "wgangp": (losses.wasserstein_d, losses.critic_g),
    }[case.args["mode"]]
    pred = case.tensor("in.pred").requires_grad_()
    case.check_derivatives(torch.stack(loss_d(pred, pred)), {"pred": pred})
    case.check_derivatives(torch.stack([loss_g(pred), loss_d(pred, pred)[1]]), {"pred": pred})


@golden("cyclegan_losses", "wgangp_cyclegan")
def test_gradient_penalty_of_patches(case: Case):
    assert case.args["constant"] == 1
    net = discriminator(case.args)
    inputs = load(net, case, cyclegan_discriminator)
    alpha = case.tensor("in.alpha")[:, :, None, None]
    penalty = gradient_penalty(net, case.tensor("in.real"), case.tensor("in.fake"), alpha)
    case.check_derivatives(penalty * case.args["lambda_gp"], inputs)


def test_a_public_checkpoint_loads():
    (case,) = golden_case("G0_resnet_instance")
    net = generator(case.args)
    state = torch.load(CHECKPOINT, weights_only=True)
    net.load_state_dict(cyclegan_generator(state), strict=True)
    case.check("out.y", net(case.tensor("in.x").float()), tol=2e-5)


def golden_case(name: str) -> list[Case]:
    mark = golden("cyclegan_nets")
    return [case for case in mark.args[1] if case.spec["name"] == name]


def test_statistics_that_old_versions_kept_for_instance_norm_are_left_out():
    state = cyclegan.ResNet(3, 2, 1, None).state_dict()
    peer = {f"model.1.{part}": state[f"stem.{part}"] for part in ("weight", "bias")}
    peer |= {f"model.2.{part}": torch.ones(2) for part in ("running_mean", "running_var")}
    assert list(cyclegan_generator(peer)) == ["stem.weight", "stem.bias"]


def test_parameter_counts():
    # pytorch-CycleGAN prints 11.378 M and 2.765 M for resnet_9blocks and basic with instance norm.
    assert parameters(cyclegan.ResNet(3, 64, 9, None)) == 11_378_179
    assert parameters(cyclegan.PatchGAN(3, 64, 3, None)) == 2_764_737
    assert parameters(cyclegan.Generator()) == 2 * 11_378_179
    assert parameters(cyclegan.Discriminator()) == 2 * 2_764_737
    # CoGAN for MNIST, by hand: FCONV 1024 4x4, then 512, 256, 128 3x3, with BatchNorm and PReLU; 1 6x6 twice
    fconv = 100 * 1024 * 16 + (1024 * 512 + 512 * 256 + 256 * 128) * 9
    assert parameters(cogan.Generator()) == fconv + 2 * (1024 + 512 + 256 + 128) + 4 + 2 * (128 * 36 + 1)
    # CONV 20 5x5 twice; CONV 50 5x5, FC 500, PReLU, FC 1 shared
    shared = 20 * 50 * 25 + 50 + 50 * 4 * 4 * 500 + 500 + 1 + 500 + 1
    assert parameters(cogan.Discriminator()) == 2 * (20 * 25 + 20) + shared


def pair(n: int = 2, side: int = 16, channels: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(n, 2 * channels, side, side, generator=generator, dtype=torch.float64) * 2 - 1
    return images.contiguous(memory_format=torch.channels_last)


def build(arch: str, channels: int = 2, side: int = 16, **options: Any) -> tuple[Any, Any]:
    """A tiny G and D in float64, with weights large enough for second derivatives to matter."""
    torch.manual_seed(0)
    if arch == "cyclegan":
        G = cyclegan.Generator(channels, side, 2, 1, **options)
        D = cyclegan.Discriminator(channels, side, 3, 2)
    else:
        G, D = cogan.Generator(5, channels, side, 2), cogan.Discriminator(channels, side, 2)
    for p in (*G.parameters(), *D.parameters()):
        p.data.normal_(0.0, 0.3)
    return G.double(), D.double()


def test_each_half_of_a_pair_has_networks_of_its_own():
    G, D = build("cyclegan")
    real = pair()
    a, b = real.chunk(2, dim=1)
    fake, latent = G.sample(real.new_empty(2, 0), real.new_empty(2, 0), real)
    assert latent is real
    assert torch.equal(fake, torch.cat([G.translate(b, to="a"), G.translate(a, to="b")], dim=1))
    assert torch.equal(G.translate(a), G.a_to_b(a)) and torch.equal(G(None, real), fake)
    assert torch.equal(D(real), torch.cat([D.a(a), D.b(b)], dim=1))
    torch.testing.assert_close(D.head(D.features(real)), D(real), rtol=0, atol=0)


@pytest.mark.parametrize("identity", [0.0, 0.25])
def test_penalties_are_half_the_papers_sums(identity: float):
    G, _ = build("cyclegan", cycle=3.0, identity=identity)
    real = pair()
    a, b = real.chunk(2, dim=1)
    fake = G(None, real)
    terms = G.penalties(fake, real)
    cycle = F.l1_loss(G.b_to_a(G.a_to_b(a)), a) + F.l1_loss(G.a_to_b(G.b_to_a(b)), b)
    same = F.l1_loss(G.b_to_a(a), a) + F.l1_loss(G.a_to_b(b), b)
    expected = {"cycle": 3 * cycle / 2} | ({"identity": identity * 3 * same / 2} if identity else {})
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value)


def plain_cogan(G: Any, D: Any) -> tuple[Callable, Callable]:
    """CoGAN as two GANs whose modules are partly the same, run one by one by PyTorch."""

    def generate(z: Tensor) -> Tensor:
        x = G.shared(z[:, :, None, None])
        return torch.cat([G.a(x).tanh(), G.b(x).tanh()], dim=1)

    def judge(img: Tensor) -> Tensor:
        a, b = img.chunk(2, dim=1)
        return torch.cat([D.out(D.shared(D.a(a))), D.out(D.shared(D.b(b)))], dim=1)

    return generate, judge


def to_second_order(y: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """y, its gradients for a random cotangent, and the gradients of their squared norm."""
    r = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1)).requires_grad_()
    first = torch.autograd.grad((y * r).sum(), inputs, create_graph=True)
    norm = torch.stack([g.square().sum() for g in first]).sum()
    return [y, *first, *torch.autograd.grad(norm, [*inputs, r], allow_unused=True, materialize_grads=True)]


@pytest.mark.parametrize("side", [16, 28, 30])
@pytest.mark.parametrize("training", [True, False])
def test_cogan_is_two_gans_with_shared_layers(side: int, training: bool):
    for i, x in enumerate((torch.randn(3, 5, dtype=torch.float64), pair(3, side))):
        ours, theirs = build("cogan", side=side), build("cogan", side=side)
        for net in (*ours, *theirs):
            net.train(training)
        plain = plain_cogan(*theirs)[i]
        x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
        mine = to_second_order(ours[i](x1), [x1, *ours[i].parameters()])
        expected = to_second_order(plain(x2), [x2, *theirs[i].parameters()])
        for a, b in zip(mine, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * max(b.abs().max().item(), 1))
        for (name, a), b in zip(ours[i].named_buffers(), theirs[i].buffers(), strict=True):
            torch.testing.assert_close(a, b, msg=name)


@pytest.mark.parametrize("arch", ["cogan", "cyclegan"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_shapes_and_dtypes(arch: str, dtype: torch.dtype | None):
    for side in (16, 28, 64) if arch == "cyclegan" else (16, 30, 64):
        if arch == "cogan":
            G: Any = cogan.Generator(5, 3, side, 2, dtype)
            D: Any = cogan.Discriminator(3, side, 2, dtype=dtype)
            fake, z = G.sample(torch.randn(4, G.normals), torch.rand(4, G.uniforms))
            assert z.shape == (4, 5)
        else:
            G = cyclegan.Generator(3, side, 2, 1, dtype=dtype)
            D = cyclegan.Discriminator(3, side, 2, 2 if side < 24 else 3, dtype=dtype)
            fake, _ = G.sample(torch.empty(4, 0), torch.empty(4, 0), pair(4, side, 3).float())
        logits = D(fake)
        assert fake.shape == (4, 6, side, side) and fake.abs().max() <= 1 and fake.dtype == torch.float32
        assert logits.shape[:2] == (4, 2) and logits.dtype == torch.float32
        torch.testing.assert_close(D.head(D.features(fake)), logits)


def d_gradients(G: Any, D: Any, real: Tensor, z: Tensor) -> list[Tensor]:
    """D's phase with R1."""
    real = leaf(real)
    with torch.no_grad():
        fake, _ = G.sample(z, z[:, :0], real)
    logits = D(real)
    loss = sum(least_squares_d(logits, D(fake))) + 0.1 * gradient_square(logits, real)
    return list(torch.autograd.grad(loss, list(D.parameters()), allow_unused=True, materialize_grads=True))


def g_gradients(G: Any, D: Any, real: Tensor, z: Tensor) -> list[Tensor]:
    fake, _ = G.sample(z, z[:, :0], real)
    loss = least_squares_g(D(fake))
    if hasattr(G, "penalties"):
        loss = loss + sum(G.penalties(fake, real).values())
    return list(torch.autograd.grad(loss, list(G.parameters()), allow_unused=True, materialize_grads=True))


@pytest.mark.parametrize("arch", ["cogan", "cyclegan"])
@pytest.mark.parametrize("gradients", [d_gradients, g_gradients])
def test_compiled_gradients_are_the_eager_ones(arch: str, gradients: Callable):
    if arch == "cyclegan" and not losses.TRACES_LEAVES:
        pytest.skip("torch 2.11's aot_eager, unlike its Inductor, expects other strides of a convolution")
    torch._dynamo.reset()
    traced = torch.compile(gradients, fullgraph=True, dynamic=False, backend="aot_eager")
    results = []
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        for function in (gradients, traced):
            G, D = build(arch)
            results.append(function(G, D, pair(), torch.full([2, G.z_dim], 0.3, dtype=torch.float64)))
    torch._dynamo.reset()
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-9, atol=1e-12)
    assert sum(bool(g.abs().max() > 0) for g in results[0]) > len(results[0]) / 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cyclegan.Generator(resolution=30), "resolution must be a multiple of 4.*30"),
        (lambda: cyclegan.Generator(blocks=0), "ngf and blocks must be at least 1: got 64 and 0"),
        (lambda: cyclegan.Generator(cycle=-1), "cycle and identity must be at least 0: got -1 and 0.5"),
        (lambda: cyclegan.Generator()(torch.empty(1, 0)), "c must be given to a translator.*pair"),
        (
            lambda: cyclegan.Generator(1, 8, 1, 1).translate(torch.zeros(1, 1, 8, 8), "c"),
            "'a' or 'b': got 'c'",
        ),
        (
            lambda: cyclegan.Discriminator(resolution=16),
            "at least 24 for 3 layers: got 16; take fewer layers",
        ),
        (lambda: cyclegan.Discriminator(ndf=0), "ndf must be at least 1 and layers at least 0: got 0 and 3"),
        (lambda: cyclegan.Discriminator(pool=-1), "pool must be at least 0: got -1"),
        (lambda: cogan.Generator(resolution=7), "resolution must be at least 8: got 7"),
        (lambda: cogan.Generator(ngf=0), "z_dim and ngf must be at least 1: got 100 and 0"),
        (lambda: cogan.Discriminator(resolution=8), "at least 16 for two 5x5 convolutions: got 8"),
        (lambda: cogan.Discriminator(ndf=0), "ndf must be at least 1: got 0"),
    ],
)
def test_what_cannot_be_done_says_why(make: Callable, message: str):
    with pytest.raises(ValueError, match=message):
        make()


def plain_pool(size: int, fakes: list[int], draws: list[float]) -> list[int]:
    """What Shrivastava et al. 2017 and Zhu et al. 2017 do with a history of `size` images, image by image."""
    history: list[int] = []
    shown = []
    for fake, draw in zip(fakes, draws, strict=True):
        if len(history) < size:
            history.append(fake)
            shown.append(fake)
        elif draw < 0.5:
            shown.append(fake)
        else:
            place = int((2 * draw - 1) * size)
            shown.append(history[place])
            history[place] = fake
    return shown


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_pool_is_the_plain_one_for_each_half(batch: int, compiled: bool):
    size, steps = 4, 60 // batch
    rng = random.Random(0)
    draws = [[rng.random() for _ in range(2)] for _ in range(steps * batch)]
    numbers = torch.arange(steps * batch, dtype=torch.float32)[:, None, None, None]
    fakes = torch.cat([numbers, 1000 + numbers], dim=1).expand(-1, -1, 2, 2)
    function = torch.compile(from_pool, fullgraph=True, backend="aot_eager") if compiled else from_pool
    pool, filled = torch.full((size, 2, 2, 2), -1.0), torch.zeros([], dtype=torch.int64)
    shown = []
    for i in range(0, steps * batch, batch):
        part = fakes[i : i + batch].clone()
        shown.append(function(pool, filled, part, torch.tensor(draws[i : i + batch])))
        assert torch.equal(part, fakes[i : i + batch]) and filled == min(i + batch, size)
    shown = torch.cat(shown)
    assert (shown == shown[:, :, :1, :1]).all()
    for half in range(2):
        expected = plain_pool(size, list(range(steps * batch)), [d[half] for d in draws])
        assert (shown[:, half, 0, 0] - 1000 * half).int().tolist() == expected
        assert expected != list(range(steps * batch))


def test_the_pool_is_saved_and_swaps_half_of_the_images():
    torch.manual_seed(0)
    pool = Pool(50, (2, 1, 1))
    shown = [pool(torch.full((1, 2, 1, 1), float(i))).flatten().tolist() for i in range(1050)]
    assert all(s == [i, i] for i, s in enumerate(shown[:50]))
    for half in range(2):
        swapped = [s[half] != i for i, s in enumerate(shown) if i >= 50]
        assert 0.45 < sum(swapped) / 1000 < 0.55
    assert any((a == i) != (b == i) for i, (a, b) in enumerate(shown))  # the halves draw apart
    assert pool.state_dict().keys() == {"images", "filled"} and pool.filled == 50
    assert not list(pool.parameters())
