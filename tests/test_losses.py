"""Adversarial losses and regularizers: golden values, and the equations written out."""

import pytest
import torch
import torch.nn.functional as F
from golden_cases import Case, golden
from torch import Tensor

from fastgan.losses import (
    LOSSES,
    drift,
    feature_matching,
    gradient_penalty,
    hinge_d,
    least_squares_d,
    logistic_d,
    orthogonal,
    wasserstein_d,
)

HALVES = {
    "minimax": logistic_d,
    "non-saturating": logistic_d,
    "hinge": hinge_d,
    "least-squares": least_squares_d,
    "wasserstein": wasserstein_d,
}


@golden("losses_hinge_logistic")
def test_hinge_and_logistic(case: Case):
    name = "hinge" if case.spec["op"].startswith("hinge") else "non-saturating"
    inputs = {k: v.requires_grad_() for k, v in case.group("in.").items()}
    if case.spec["op"].endswith("_dis"):
        y = torch.stack(HALVES[name](inputs["real"], inputs["fake"]))
    else:
        y = LOSSES[name].g(inputs["fake"], None)
    case.check_derivatives(y, inputs)


@golden("rosinality_losses", "rosi_losses")
def test_rosinality_logistic(case: Case):
    inputs = {k: v.requires_grad_() for k, v in case.group("in.").items()}
    loss = LOSSES["non-saturating"]
    y = [loss.d(inputs["real"], inputs["fake"], 0.0), loss.g(inputs["fake"], None)]
    case.check_derivatives(torch.stack(y), inputs)


@golden("cyclegan_losses", "cyclegan_ganloss")
def test_cyclegan_losses(case: Case):
    """The peer's loss of one prediction, taken for real and for fake; of G it is that of a real."""
    name = {"lsgan": "least-squares", "vanilla": "non-saturating", "wgangp": "wasserstein"}[case.args["mode"]]
    pred = case.tensor("in.pred").requires_grad_()
    as_real, as_fake = HALVES[name](pred, pred)
    case.check_derivatives(torch.stack([as_real, as_fake]), {"pred": pred})
    torch.testing.assert_close(LOSSES[name].g(pred, None), as_real)


@golden("cyclegan_losses", "wgangp_cyclegan")
def test_gradient_penalty_of_patches(case: Case):
    inputs = {k: case.tensor(f"in.{k}").requires_grad_() for k in case.spec["differentiable"]}

    def D(x: Tensor) -> Tensor:
        for i, layer in enumerate((0, 2, 5, 8)):
            weight, bias = (inputs[f"param.model.{layer}.{kind}"] for kind in ("weight", "bias"))
            x = F.conv2d(x, weight, bias, stride=2 if i < 2 else 1, padding=1)
            x = F.instance_norm(x) if i in (1, 2) else x
            x = x if i == 3 else F.leaky_relu(x, 0.2)
        return x

    assert (case.args["n_layers"], case.args["constant"]) == (2, 1)
    alpha = case.tensor("in.alpha")[:, :, None, None]
    penalty = gradient_penalty(D, case.tensor("in.real"), case.tensor("in.fake"), alpha)
    unused = 0 * inputs["param.model.8.bias"].sum()  # the last bias moves no gradient: golden zero
    case.check_derivatives(case.args["lambda_gp"] * penalty + unused, inputs)


@golden("r3gan_nets", "r3gan_loss_D")
def test_relativistic_pairs(case: Case):
    """The networks' part is tested with them: from the differences of their logits on."""
    difference, zero = case.tensor("out.rel"), torch.zeros(3, dtype=torch.float64)
    loss = LOSSES["relativistic"]
    y = loss.d(difference, zero, 0.0) if case.args["phase"] == "D" else loss.g(difference, zero)
    torch.testing.assert_close(y, case.tensor("out.adv").mean(), rtol=1e-6, atol=0)


def logits(seed: int) -> Tensor:
    return 2 * torch.randn(6, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cross_entropy(x: Tensor, label: float) -> Tensor:
    return F.binary_cross_entropy_with_logits(x, torch.full_like(x, label))


def test_the_equations():
    real, fake = logits(0), logits(1)
    assert LOSSES.keys() == HALVES.keys() | {"relativistic"}
    for name, halves in HALVES.items():
        torch.testing.assert_close(LOSSES[name].d(real, fake, 0.0), sum(halves(real, fake)))
    expected = {
        "minimax": (1 - fake.sigmoid()).log().mean(),
        "non-saturating": -fake.sigmoid().log().mean(),
        "hinge": -fake.mean(),
        "least-squares": (fake - 1).square().mean(),
        "wasserstein": -fake.mean(),
        "relativistic": -(fake - real).sigmoid().log().mean(),
    }
    for name, value in expected.items():
        torch.testing.assert_close(LOSSES[name].g(fake, real if LOSSES[name].relativistic else None), value)
    torch.testing.assert_close(
        LOSSES["relativistic"].d(real, fake, 0.0), -(real - fake).sigmoid().log().mean()
    )


def test_labels_of_reals_alone_are_smoothed():
    real, fake = logits(0), logits(1)
    smoothed = {
        "minimax": cross_entropy(real, 0.9) + cross_entropy(fake, 0),
        "non-saturating": cross_entropy(real, 0.9) + cross_entropy(fake, 0),
        "least-squares": (real - 0.9).square().mean() + fake.square().mean(),
    }
    assert smoothed.keys() == {name for name, loss in LOSSES.items() if loss.smooths}
    for name, value in smoothed.items():
        torch.testing.assert_close(LOSSES[name].d(real, fake, 0.1), value)


@pytest.mark.parametrize("name", LOSSES)
def test_g_and_d_pull_against_each_other(name: str):
    """D raises real and lowers fake logits, G raises fake ones; a map of patches counts as one mean."""
    real, fake = (logits(s).expand(6, 4).reshape(6, 1, 2, 2).requires_grad_() for s in (2, 3))
    loss = LOSSES[name]
    d = loss.d(real * 0.1, fake * 0.1, 0.0)  # where no loss has turned over
    g = loss.g(fake * 0.1, real * 0.1)
    assert d.ndim == g.ndim == 0
    d_real, d_fake = torch.autograd.grad(d, (real, fake))
    assert (d_real < 0).all() and (torch.autograd.grad(g, fake)[0] < 0).all()
    assert (d_fake > 0).all() or name == "least-squares"


def test_feature_matching_compares_means():
    real, fake = torch.randn(5, 3, 2, 2), torch.randn(7, 3, 2, 2)
    expected = sum((real[:, i].mean() - fake[:, i].mean()) ** 2 for i in range(3))
    torch.testing.assert_close(
        feature_matching(real.mean(dim=(2, 3)), fake.mean(dim=(2, 3))), torch.as_tensor(expected)
    )
    assert feature_matching(real, real.flip(0)) < 1e-12
    assert feature_matching(real.bfloat16(), fake.bfloat16()).dtype == torch.float32


def test_drift_is_the_mean_square():
    assert drift(torch.tensor([[3.0], [-1.0]])) == 5


def test_orthogonal_rows_cost_nothing():
    q, _ = torch.linalg.qr(torch.randn(12, 4, dtype=torch.float64))
    rows = (q.t() * torch.arange(1, 5)[:, None]).reshape(4, 3, 2, 2).requires_grad_()  # of any length
    assert orthogonal([rows]) < 1e-20
    weights = [torch.randn(4, 3, 2, 2).double().requires_grad_(), torch.randn(3, 5).double().requires_grad_()]
    total = orthogonal(iter(weights))
    by_pairs = 0.0
    for weight in weights:
        for i, a in enumerate(weight):
            by_pairs += sum(((a * b).sum() ** 2).item() for j, b in enumerate(weight) if j != i)
    assert total.item() == pytest.approx(by_pairs)
    w = weights[1]
    gram = w @ w.t() * (1 - torch.eye(3))
    torch.testing.assert_close(torch.autograd.grad(total, w)[0], 4 * gram @ w)
