"""What the engine does around the phases: updates, rates, growth, augmentation's strength, classes."""

import dataclasses
from pathlib import Path

import pytest
import torch
from family_cases import CPU, tiny_config
from image_cases import noise, put
from torch import Tensor

from fastgan.config import UsageError, changed_fields, make_config
from fastgan.engine import Engine
from fastgan.limit import grown, random_step
from fastgan.step import PhaseResult
from fastgan.train import open_data


def made_up(net: torch.nn.Module, seed: int) -> PhaseResult:
    generator = torch.Generator().manual_seed(seed)
    grads = [torch.randn(p.shape, generator=generator) for p in net.parameters()]
    return PhaseResult({"loss_g": torch.tensor(float(seed))}, grads)


def test_accumulated_gradients_are_averaged():
    whole, parts = (Engine(tiny_config("stylegan", accumulate=k), CPU) for k in (1, 2))
    a, b = (made_up(whole.G, seed) for seed in (1, 2))
    mean = [(x + y) / 2 for x, y in zip(a.grads, b.grads, strict=True)]
    whole._update(whole.G, whole.g_optimizer, [PhaseResult(a.losses, mean)])
    parts._update(parts.G, parts.g_optimizer, iter([a, b]))
    for mine, theirs in zip(parts.G.parameters(), whole.G.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert parts.take_losses()["loss_g"] == 1.5


def test_rates_fall_over_the_last_share_of_the_run():
    config = tiny_config("cyclegan", kimg=0.4, lr_decay=0.5, g_lr=0.1, d_lr=0.2)
    engine = Engine(config, CPU)
    rates = {}
    for images in (0, 200, 300, 396):
        engine.images = images
        engine._decay_rates()
        rates[images] = [o.param_groups[0]["lr"] for _, _, o in engine._optimizers()]
    assert rates[0] == rates[200] == [0.1, 0.2]
    assert rates[300] == pytest.approx([0.05, 0.1]) and rates[396] == pytest.approx([0.002, 0.004])


@pytest.mark.parametrize(("lr_decay", "changed"), [(0.0, []), (0.5, ["kimg"])])
def test_a_run_whose_rates_fall_keeps_its_length(lr_decay: float, changed: list[str]):
    old, new = (tiny_config("cyclegan", kimg=kimg, lr_decay=lr_decay) for kimg in (1.0, 2.0))
    assert changed_fields(dataclasses.asdict(old), new) == changed


def test_the_critic_is_clipped_and_updated_more_often():
    config = tiny_config("wgan", clip=0.003, d_steps=3, optimizer="adam")
    engine = Engine(config, CPU)
    engine.step(*random_step(config, CPU))
    largest = max(p.abs().max() for p in engine.D.parameters())
    assert largest == torch.tensor(0.003)
    counts = [next(iter(o.state.values()))["step"].item() for _, _, o in engine._optimizers()]
    assert counts == [1, 3] and engine.images == 3 * config.batch


@pytest.mark.parametrize(("target", "grows"), [(0.01, True), (0.99, False)])
def test_augmentation_follows_the_critics_sign(target: float, grows: bool):
    """p moves every fourth update of D, up where its sign on reals is above the target."""
    engine = Engine(tiny_config("cgan", ada=target), CPU)
    assert engine.strength is not None
    for _ in range(8):
        engine.strength.fill_(0.5)
        engine.signs.fill_(4 * 0.5)
        seen = engine.strength.clone()
        torch.manual_seed(0)
        engine.step(*random_step(engine.config, CPU))
        if (engine.images // engine.config.batch) % 4:
            assert engine.strength == seen
        else:
            assert (engine.strength > seen) == grows and engine.signs == 0
            move = abs(float(engine.strength - seen))
            assert move == pytest.approx(4 * engine.config.batch / 500_000, rel=1e-2)


def test_a_new_stage_starts_with_fresh_optimizers_and_graphs():
    config = tiny_config("progan", stable_kimg=0.008, fade_kimg=0.008)
    engine = Engine(config, CPU)
    sides, steps, phases = [], [], []
    for _ in range(5):
        phases.append(engine.d)
        engine.step(*random_step(config, CPU))
        sides.append(engine.G(torch.randn(2, config.z_dim)).shape[-1])
        steps.append(engine.g_optimizer.state[next(engine.G.parameters())]["step"].item())
        assert engine.ema.growth == engine.G.growth == engine.D.growth
    assert sides == [4, 4, 4, 8, 8] and steps == [1, 2, 3, 1, 2]
    assert phases[0] is phases[2] and phases[3] is not phases[4] is engine.d


def test_what_is_measured_is_the_grown_network():
    config = tiny_config("progan", kimg=0.1)
    engine = grown(Engine(config, CPU))
    assert engine.G.stage == engine.D.stage == engine.ema.stage == 1
    engine.step(*random_step(config, CPU))
    assert engine.G(torch.randn(2, config.z_dim)).shape[-1] == config.resolution
    plain = Engine(tiny_config("gan"), CPU)
    assert grown(plain).images == 0


def test_orthogonal_regularization_leaves_the_class_embedding_alone():
    grads = []
    for weight in (0.0, 10.0):
        engine = Engine(tiny_config("biggan", orthogonal=weight), CPU)
        torch.manual_seed(0)
        result = engine.g(0, *engine.g_args(random_step(engine.config, CPU)[0], None))
        named = zip((n for n, _ in engine.G.named_parameters()), result.grads, strict=True)
        grads.append({name: grad for name, grad in named if grad.ndim >= 2})
    shared = [name for name in grads[0] if name.startswith("shared.")]
    several = [name for name, grad in grads[0].items() if len(grad) > 1 and name not in shared]  # rows
    assert shared and all(torch.equal(grads[0][name], grads[1][name]) for name in shared)
    assert several and not any(torch.equal(grads[0][name], grads[1][name]) for name in several)


def test_labels_reach_both_networks():
    """Other labels, other gradients; and the fakes' own labels are drawn anew."""
    engine = Engine(tiny_config("cgan", dropout=0.0), CPU)
    real, _ = random_step(engine.config, CPU)
    grads = []
    for label in (0, 1):
        torch.manual_seed(0)
        c = engine.one_hot(torch.full((len(real),), label))
        grads.append(engine.d(0, *engine.d_args(real, c)).grads[0].clone())
    assert not torch.allclose(*grads)
    drawn = engine.latents(64).c
    assert isinstance(drawn, Tensor) and drawn.sum(dim=1).eq(1).all() and drawn.sum(dim=0).gt(0).all()


def test_the_data_says_how_many_classes_there_are(tmp_path: Path):
    for name in ("cats", "dogs", "owls"):
        put(noise(8), tmp_path / name / "a.png")
    config = make_config("cgan", data=str(tmp_path), resolution=8, device="cpu", precision="fp32")
    config, feed, about = open_data(config, CPU)
    assert config.classes == config.c_dim == 3 and "3 images" in about
    real, labels = feed.batch(0, 3)
    assert labels is not None and sorted(labels.tolist()) == [0, 1, 2] and len(real) == 3
    feed.close()
    plain = make_config("cgan", data=str(tmp_path / "cats"), resolution=8, device="cpu")
    with pytest.raises(UsageError, match=r"--cond needs classes, but --data .*cats has none"):
        open_data(plain, CPU)


@pytest.mark.parametrize(
    ("arch", "options", "message"),
    [
        (
            "sagan",
            {"label_smoothing": 0.1},
            "--label-smoothing has no meaning for --loss hinge",
        ),
        ("cogan", {"data_b": ""}, "--arch cogan joins two domains; name the second with --data-b"),
        ("gan", {"data_b": "digits"}, "--data-b does not apply to --arch gan"),
        ("cogan", {"cond": True}, "--cond does not apply to --arch cogan"),
        ("progan", {"pl": 1.0}, "--pl does not apply to --arch progan"),
        ("dcgan", {"ada": 0.6, "diffaugment": "color"}, "--ada and --diffaugment exclude each other"),
        ("dcgan", {"diffaugment": "colour"}, "unknown policy 'colour'"),
        ("dcgan", {"accumulate": 5}, "--accumulate 5 does not divide --batch 32"),
        ("dcgan", {"body": "mlp"}, "--body does not apply to --arch dcgan, only to wgan, wgan-gp"),
        ("stylegan", {"batch": 12, "accumulate": 2}, "--batch 12 is not divisible by the groups"),
        ("biggan", {"z_dim": 8}, "z_dim must be a multiple of 3 with hier"),
        ("sagan", {"attention": 32}, "attention must be 0 or the side of a map"),
        ("wgan", {"optimizer": "sgd"}, "--optimizer must be adam or rmsprop: got sgd"),
        ("gan", {"clip": -1.0}, "--clip must be at least 0"),
    ],
)
def test_what_does_not_fit_together_is_said(arch: str, options: dict, message: str):
    with pytest.raises(UsageError, match=message):
        make_config(arch, **options)
