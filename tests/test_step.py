"""Losses and phases: golden values, and compiled gradients against eager ones, second order included."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from golden_cases import Case, golden
from test_models import load, without_prefix
from torch import Tensor, nn

from fastgan import losses
from fastgan.compiled import Phase, compile_phase
from fastgan.engine import place
from fastgan.losses import gradient_penalty, gradient_square, path_length
from fastgan.models import Discriminator, Generator, dcgan, stylegan
from fastgan.public import rosinality_discriminator, rosinality_generator
from fastgan.step import Latents, Objective, d_phase, g_path_phase, g_phase

CPU = torch.device("cpu")


def critic(weights: dict[str, Tensor]):
    """The critic of the golden family gradient_penalties (its documentation in golden/index.json)."""

    def D(x: Tensor) -> Tensor:
        h = F.leaky_relu(x.flatten(1) @ weights["w1"].t() + weights["b1"], 0.2)
        return F.softplus(h @ weights["w2"].t() + weights["b2"]) - 0.1 * h.square().mean(dim=1, keepdim=True)

    return D


@golden("gradient_penalties")
def test_gradient_penalties(case: Case):
    weights = {k: case.tensor(f"in.{k}").requires_grad_() for k in ("w1", "b1", "w2", "b2")}
    D = critic(weights)
    if case.spec["op"] == "wgangp_erik":
        y = gradient_penalty(D, *(case.tensor(f"in.{k}") for k in ("real", "fake", "alpha")))
    else:
        x = case.tensor("in.x").requires_grad_()
        y = case.args["gamma"] / 2 * gradient_square(D(x), x)
    case.check_derivatives(y, weights)


def check_rosinality_gradients(case: Case, y: Tensor, net: nn.Module, expected: dict[str, Tensor]):
    case.check("out.y", y)
    named = dict(net.named_parameters())
    grads = torch.autograd.grad(y * case.tensor("r"), list(named.values()), materialize_grads=True)
    for name, grad in zip(named, grads, strict=True):
        torch.testing.assert_close(
            grad, expected[name].reshape(grad.shape), rtol=2e-7, atol=1e-9
        )  # stored in fp32


@golden("rosinality_losses", "rosi_path")
def test_rosinality_path_length(case: Case):
    a = case.args
    G = stylegan.Generator(
        a["style_dim"], 0, a["style_dim"], a["size"], 3, a["n_mlp"], 4096, a["ch"]
    ).double()
    G.load_state_dict(rosinality_generator(case.group("in.param.")))
    ws = G.mapping(case.tensor("in.z"))
    mean = case.tensor("in.mean_path_length")
    y, new_mean, lengths = path_length(G.synthesis(ws), ws, case.tensor("in.pl_noise"), mean, 0.01)
    case.check("out.path_lengths", lengths)
    case.check("out.path_mean_new", new_mean)
    check_rosinality_gradients(case, y, G, rosinality_generator(case.group("g.param.")))


@golden("rosinality_losses", "rosi_r1")
def test_rosinality_r1(case: Case):
    a = case.args
    D = stylegan.Discriminator(0, a["size"], 3, 4096, a["ch"]).double()
    D.load_state_dict(rosinality_discriminator(case.group("in.param.")))
    x = case.tensor("in.x").requires_grad_()
    expected = rosinality_discriminator(case.group("g.param."))
    check_rosinality_gradients(case, gradient_square(D(x), x), D, expected)


@golden("stylegan2_loss_phases")
def test_stylegan_phases(case: Case):
    """Ours add a penalty's gradient to the adversarial one; the peer's regularization phases hold it."""
    a = case.args
    G = stylegan.Generator(**without_prefix(a["G_ctor"]), style_mixing=0, noise="const")
    D = stylegan.Discriminator(**without_prefix(a["D_ctor"]))
    load(G, case, "in.G.")
    load(D, case, "in.D.")
    z, real, none = case.tensor("in.z"), case.tensor("in.real"), torch.empty(4, 0)
    latents = Latents(z, none)
    if a["phase"].startswith("D"):
        net, prefix = D, "D"
        main = d_phase(G, D, real, None, latents).grads
        both = d_phase(G, D, real, None, latents, objective=Objective(r1=a["r1_gamma"] / 2)).grads
    else:
        net, prefix, count = G, "G", len(z) // a["pl_batch_shrink"]
        main = g_phase(G, D, real, None, latents).grads
        path = Latents(z[:count], none[:count]), case.tensor("in.pl_noise"), case.tensor("in.pl_mean")
        objective = Objective(pl=a["pl_weight"], pl_decay=a["pl_decay"])
        result, pl_mean = g_path_phase(G, D, real, None, latents, *path, objective=objective)
        both = result.grads
        if a["phase"] == "Greg":
            case.check("out.pl_mean_new", pl_mean)
    for (name, _), m, b in zip(net.named_parameters(), main, both, strict=True):
        case.check(f"out.grad.{prefix}.{name}", m if a["phase"].endswith("main") else b - m, floor=1e-2)


@golden("stylegan2_loss_phases")
def test_running_mean_of_w(case: Case):
    a = case.args
    G = stylegan.Generator(**without_prefix(a["G_ctor"]), style_mixing=0, noise="const")
    D = stylegan.Discriminator(**without_prefix(a["D_ctor"]))
    load(G, case, "in.G.")
    load(D, case, "in.D.")
    args = G, D, case.tensor("in.real"), None, Latents(case.tensor("in.z"), torch.empty(4, 0))
    if a["phase"] == "Gmain":
        g_phase(*args)
    elif a["phase"] == "Dmain":
        d_phase(*args)
    else:
        pytest.skip("the peer's regularization phase runs the mapping without the adversarial phase")
    case.check("out.w_avg_new", G.mapping.w_avg)


def tiny(arch: str, dtype: torch.dtype) -> tuple[Generator, Discriminator]:
    torch.manual_seed(3)
    if arch == "stylegan":
        G: Generator = stylegan.Generator(6, 0, 5, 8, 3, 2, 32, 6, style_mixing=0.9)
        D: Discriminator = stylegan.Discriminator(0, 8, 3, 32, 6, mbstd_group=2)
        for name, p in G.named_parameters():
            if name.endswith("noise_strength"):
                nn.init.constant_(p, 0.3)
    else:
        G, D = dcgan.Generator(6, 4, 3, 8), dcgan.Discriminator(4, 3, 8, slope=0.1)
        for p in itertools.chain(G.parameters(), D.parameters()):
            p.data.mul_(8 if p.ndim == 4 else 1)  # weights of deviation 0.02 make second derivatives vanish
    for net in (G, D):
        net.to(dtype)
        place(net, CPU)
    return G, D


def draws(G: Generator, count: int, dtype: torch.dtype, seed: int = 0) -> Latents:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(count, G.normals, generator=generator, dtype=torch.float64)
    uniform = torch.rand(count, G.uniforms, generator=generator, dtype=torch.float64)
    return Latents(normal.to(dtype), uniform.to(dtype))


def reals(count: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 3, 8, 8, generator=generator, dtype=torch.float64) * 2 - 1
    return images.to(dtype).contiguous(memory_format=torch.channels_last)


def phases(arch: str):
    """name -> (function of (call, G, D, dtype, seed), trained network's index), `call` eager or compiled."""

    def args(G, D, dtype, seed):
        return G, D, reals(4, dtype, seed), None, draws(G, 4, dtype, seed)

    def d(call, G, D, dtype, seed):
        return call(d_phase)(*args(G, D, dtype, seed))

    def d_r1(call, G, D, dtype, seed):
        return call(d_phase)(*args(G, D, dtype, seed), objective=Objective(r1=5.0))

    def g(call, G, D, dtype, seed):
        return call(g_phase)(*args(G, D, dtype, seed))

    def g_path(call, G, D, dtype, seed):
        noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        path = draws(G, 2, dtype, seed + 50), noise.to(dtype), torch.tensor(0.1, dtype=dtype)
        return call(g_path_phase)(*args(G, D, dtype, seed), *path, objective=Objective(pl=8.0))[0]

    return {"D": d, "D with R1": d_r1, "G": g, "G with path length": g_path}


@pytest.mark.parametrize("phase", ["D", "D with R1", "G", "G with path length"])
@pytest.mark.parametrize("arch", ["stylegan", "dcgan"])
def test_compiled_gradients_equal_eager_ones(arch: str, phase: str):
    """One graph, no recompilation for new numbers; fp32 within its own eager error of float64."""
    torch._dynamo.reset()
    compiled = {}

    def by_compiler(function):
        return compiled.setdefault(function, compile_phase(function, CPU))

    def eager(function):
        return function

    run = phases(arch)[phase]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in (0, 1):
            results = []
            for call, dtype in ((by_compiler, torch.float32), (eager, torch.float32), (eager, torch.float64)):
                nets = tiny(arch, dtype)
                if seed == 0 and call is by_compiler:
                    compiled_nets = nets
                elif call is by_compiler:
                    for old, new in zip(compiled_nets, nets, strict=True):
                        old.load_state_dict(new.state_dict())
                    nets = compiled_nets
                results.append((run(call, *nets, dtype, seed), copy.deepcopy(nets)))
            (ours, our_nets), (single, _), (exact, exact_nets) = results
            for k, loss in exact.losses.items():
                torch.testing.assert_close(ours.losses[k].double(), loss, rtol=2e-4, atol=2e-5)
            largest = max(g.abs().max() for g in exact.grads)
            for ours_g, single_g, exact_g in zip(ours.grads, single.grads, exact.grads, strict=True):
                error = (ours_g.double() - exact_g).abs().max()
                eager_error = (single_g.double() - exact_g).abs().max()
                assert error <= 3 * eager_error + 2e-6 * largest
            for ours_net, exact_net in zip(our_nets, exact_nets, strict=True):  # running means moved alike
                for ours_b, exact_b in zip(ours_net.buffers(), exact_net.buffers(), strict=True):
                    torch.testing.assert_close(ours_b.double(), exact_b.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arch", ["stylegan", "dcgan"])
def test_penalties_reach_every_layer(arch: str):
    """What R1 and path length add to the gradients, against central differences of the penalties."""
    G, D = tiny(arch, torch.float64)
    for phase, net in (("D", D), ("G", G)):
        penalty = {"D": "D with R1", "G": "G with path length"}[phase]
        key, weight = ("r1", 5.0) if phase == "D" else ("path_length", 8.0)
        clones = copy.deepcopy((G, D))
        plain = phases(arch)[phase](lambda f: f, *copy.deepcopy(clones), torch.float64, 0)
        full = phases(arch)[penalty](lambda f: f, *copy.deepcopy(clones), torch.float64, 0)
        added = [f - p for f, p in zip(full.grads, plain.grads, strict=True)]
        generator = torch.Generator().manual_seed(1)
        directions = [
            torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in net.parameters()
        ]
        values = []
        for sign in (1, -1):
            nets = copy.deepcopy(clones)
            for p, d in zip(nets[1 if phase == "D" else 0].parameters(), directions, strict=True):
                p.data.add_(d, alpha=sign * 1e-6)
            values.append(phases(arch)[penalty](lambda f: f, *nets, torch.float64, 0).losses[key])
        slope = weight * (values[0] - values[1]) / 2e-6
        expected = sum((a * d).sum() for a, d in zip(added, directions, strict=True))
        torch.testing.assert_close(slope, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("arch", ["stylegan", "dcgan"])
def test_bf16_gradients_point_the_same_way(arch: str):
    for phase, run in phases(arch).items():
        G, D = tiny(arch, torch.float32)
        exact = run(lambda f: f, G, D, torch.float32, 0)
        G, D = tiny(arch, torch.float32)
        for net in (G, D):
            target = net.synthesis if isinstance(net, stylegan.Generator) else net
            target.dtype = torch.bfloat16
        rough = run(lambda f: f, G, D, torch.float32, 0)
        a, b = (torch.cat([g.flatten() for g in r.grads]) for r in (exact, rough))
        assert all(g.dtype == torch.float32 for g in rough.grads)
        assert F.cosine_similarity(a, b, dim=0) > 0.98, phase


@pytest.mark.parametrize("noise", [0.3, 0.0])
def test_contrast_is_seen_only_against_noise(noise: float):
    """DCGAN's discriminator is blind to a factor on all images of its batch (eps aside)."""
    G, D = dcgan.Generator(6, 4, 3, 16).double(), dcgan.Discriminator(4, 3, 16, instance_noise=noise).double()
    for p in D.parameters():
        p.data.mul_(20 if p.ndim == 4 else 1)
    real, latents = torch.rand(4, 3, 16, 16).double() * 2 - 1, draws(G, 4, torch.float64)
    scores = []
    for gain in (1.0, 1.5):
        G.main[-1] = nn.Sequential(nn.Identity(), Gain(gain))
        torch.manual_seed(0)
        scores.append(d_phase(G, D, real, None, latents).losses["fake_score"])
    assert torch.isclose(scores[0], scores[1], rtol=1e-3) == (noise == 0)


def test_instance_noise_is_drawn_in_training_alone():
    D, x = dcgan.Discriminator(4, 3, 16, instance_noise=0.3), torch.randn(4, 3, 16, 16)
    assert not D(x).equal(D(x))
    D.eval()
    assert D(x).equal(D(x))


class Gain(nn.Module):
    def __init__(self, gain: float):
        super().__init__()
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * x


def test_kernels_are_chosen_by_an_eager_run_on_copies(monkeypatch):
    """A graph being traced can time nothing: on a GPU a phase runs beforehand and leaves nothing behind."""
    monkeypatch.setattr(losses, "TRACES_LEAVES", True)  # with torch 2.11 it asks for a tensor on the GPU
    seen = []

    def function(net, x):
        seen.append(net)
        return net(x) + torch.rand(1)

    net, x = nn.BatchNorm1d(2), torch.randn(4, 2)
    phase = Phase("D", function, torch.device("cuda"), compile=True)
    phase.compiled = lambda net, x: x
    random_state = torch.get_rng_state()
    for step in range(2):
        phase(step, net, x)
    assert len(seen) == 1 and seen[0] is not net
    assert net.num_batches_tracked == 0 and torch.get_rng_state().equal(random_state)
