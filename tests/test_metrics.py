"""The scores: numbers of public codebases, and cases whose answer is known."""

import numpy as np
import pytest
import torch
from golden_cases import Case, golden
from torch import Tensor

from fastgan import metrics
from fastgan.metrics import Moments


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


@golden("metrics", "frechet")
def test_golden_frechet(case: Case):
    moments = {}
    for name in ("real", "gen"):
        moments[name] = Moments()
        for batch in case.tensor(f"in.{name}").split(7):
            moments[name].add(batch)
        case.check(f"out.mu_{name}", moments[name].mean, tol=1e-12)
        case.check(f"out.sigma_{name}", moments[name].covariance, tol=1e-12)
    distance = scalar(metrics.frechet(moments["real"], moments["gen"]))
    case.check("out.fid_sqrtm", distance, tol=1e-12)
    case.check("out.fid_eigvals", distance, tol=1e-12)


@golden("metrics", "kid")
def test_golden_kid(case: Case):
    real, gen, args = case.tensor("in.real"), case.tensor("in.gen"), case.args
    case.check("out.kid_full_unbiased", metrics.mmd2(real, gen), tol=1e-12)
    theirs, _ = metrics.kid(real, gen, args["subsets"], args["subset"], args["seed_nv"])
    case.check("out.kid_subsets_nvlabs", scalar(theirs), tol=1e-12)
    mean, deviation = metrics.kid(real, gen, args["subsets"], args["subset"])
    case.check("out.kid_subsets_torchfidelity_mean", scalar(mean), tol=1e-12)
    case.check("out.kid_subsets_torchfidelity_std", scalar(deviation), tol=1e-12)


@golden("metrics", "prc")
@pytest.mark.parametrize("block", [13, metrics.BLOCK])
def test_golden_precision_recall(case: Case, block: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(metrics, "BLOCK", block)
    real, gen, k = case.tensor("in.real"), case.tensor("in.gen"), case.args["k"]
    case.check("out.kth_real", metrics.neighbour_distance(real, k), tol=1e-12)
    case.check("out.kth_gen", metrics.neighbour_distance(gen, k), tol=1e-12)
    precision, recall = metrics.precision_recall(real, gen)  # k is 3 by default
    case.check("out.precision", scalar(precision), tol=1e-15)
    case.check("out.recall", scalar(recall), tol=1e-15)


@golden("metrics", "inception_score")
def test_golden_inception_score(case: Case):
    mean, deviation = metrics.inception_score(case.tensor("in.probs"), case.args["splits"])
    case.check("out.is_mean", scalar(mean), tol=1e-12)
    assert deviation == pytest.approx(case.tensor("out.is_std").item(), abs=1e-12)


def test_moments_far_from_zero_keep_their_digits():
    x = normal(1000, 3) + 1e6
    whole, parts = Moments(x), Moments()
    for batch in x.split([1, 400, 599]):
        parts.add(batch)
    want = np.cov((x - 1e6).numpy(), rowvar=False)
    for moments in (whole, parts):
        assert moments.count == 1000
        np.testing.assert_allclose(moments.covariance.numpy(), want, rtol=1e-8, atol=1e-9)
    single = Moments(x.float())
    assert single.mean.dtype == single.covariance.dtype == torch.float64


def gaussian(mean: list[float], cov: Tensor, count: int = 50) -> Tensor:
    """[count, 2] whose mean and covariance are exactly these."""
    x = torch.randn(count, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(count))
    x = x - x.mean(dim=0)
    white = x @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T
    return white @ torch.linalg.cholesky(cov).T + torch.tensor(mean, dtype=torch.float64)


def test_frechet_distance_of_gaussians():
    a = torch.tensor([[2.0, 0.6], [0.6, 1.0]], dtype=torch.float64)
    b = torch.tensor([[0.5, -0.3], [-0.3, 3.0]], dtype=torch.float64)
    # Of a 2x2 matrix M with positive eigenvalues, tr M^(1/2) = (tr M + 2 (det M)^(1/2))^(1/2).
    root = ((a @ b).trace() + 2 * (a @ b).det().sqrt()).sqrt()
    want = (1**2 + 3**2 + a.trace() + b.trace() - 2 * root).item()
    x, y = gaussian([1, -1], a), gaussian([0, 2], b, count=70)
    assert metrics.frechet(Moments(x), Moments(y)) == pytest.approx(want, rel=1e-12)
    assert metrics.frechet(Moments(y), Moments(x)) == pytest.approx(want, rel=1e-12)
    assert metrics.frechet(Moments(x), Moments(x)) == pytest.approx(0, abs=1e-12)
    flat = torch.cat([x, torch.zeros(50, 3)], dim=1)  # features that never fire
    assert metrics.frechet(Moments(flat), Moments(flat + 2)) == pytest.approx(5 * 2**2, rel=1e-12)


def test_scores_of_a_set_with_itself():
    x = normal(300, 4)
    assert metrics.frechet(Moments(x), Moments(x)) == pytest.approx(0, abs=1e-10)
    assert metrics.precision_recall(x, x.clone()) == (1, 1)
    assert metrics.density_coverage(x, x.clone()) == (1, 1)  # open balls, up to the 5th: itself and four


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_what_lies_on_the_rim_of_a_ball(offset: float):
    x = normal(90, 40) + offset
    want = torch.stack([(row - x).square().sum(dim=1).sqrt().sort().values[3] for row in x])
    torch.testing.assert_close(metrics.neighbour_distance(x, 3), want, rtol=1e-12, atol=0)
    assert metrics.density_coverage(x, x.flip(0)) == (1, 1)
    twice = x[:45].repeat(2, 1)  # balls of radius 0 when k is 1
    assert metrics.precision_recall(twice, x, k=1) == (0.5, 1)
    assert metrics.density_coverage(twice, x, k=1) == (0, 0)


def test_frechet_distance_of_fewer_images_than_features():
    a, b = normal(20, 300), 2 * normal(30, 300, seed=1)
    # The trace of the root is the sum of singular values of A B^T, of centred rows over (N - 1)^(1/2).
    x, y = ((rows - rows.mean(dim=0)) / (len(rows) - 1) ** 0.5 for rows in (a, b))
    parts = [(a.mean(dim=0) - b.mean(dim=0)).square().sum(), x.square().sum(), y.square().sum()]
    want = (sum(parts) - 2 * torch.linalg.svdvals(x @ y.T).sum()).item()
    assert metrics.frechet(Moments(a), Moments(b)) == pytest.approx(want, rel=1e-12)
    assert metrics.frechet(Moments(a), Moments(a)) == pytest.approx(0, abs=1e-10)


def test_unbiased_mmd_averages_to_zero():
    draws = [
        metrics.mmd2(normal(40, 5, seed=2 * i), normal(30, 5, seed=2 * i + 1)).item() for i in range(400)
    ]
    mean, error = np.mean(draws), np.std(draws) / 20
    assert abs(mean) < 3 * error
    biased = metrics.mmd2(normal(40, 5), normal(30, 5, seed=1) + 1).item()
    assert biased > 100 * error


def test_kid_takes_what_there_is():
    few, many = normal(12, 5), normal(50, 5, seed=1)
    mean, deviation = metrics.kid(few, many, subsets=3, subset=1000)
    assert np.isfinite([mean, deviation]).all() and deviation > 0
    assert metrics.kid(few.float(), many.float(), 3)[0] == pytest.approx(mean, rel=1e-4)


def test_precision_and_recall_tell_the_two_failures_apart():
    real = torch.cat([normal(200, 3), normal(200, 3, seed=1) + 50])
    collapsed = normal(300, 3, seed=2)  # one of two modes
    precision, recall = metrics.precision_recall(real, collapsed)
    assert precision > 0.9 and 0.4 < recall < 0.55
    scattered = torch.cat([real + 0.01, normal(400, 3, seed=3) - 90])
    precision, recall = metrics.precision_recall(real, scattered)
    assert 0.45 < precision < 0.55 and recall > 0.9
    density, coverage = metrics.density_coverage(real, collapsed)
    assert density > 0.8 and 0.4 < coverage < 0.55
    assert metrics.density_coverage(real, real - 500) == (0, 0)


def test_density_and_coverage_by_hand():
    real = torch.tensor([[0.0], [1.0], [3.0], [7.0]])  # radii for k = 1: 1, 1, 2, 4
    generated = torch.tensor([[0.5], [2.5], [100.0], [1.0]])
    # 0.5 lies in the balls of 0 and 1; 2.5 in that of 3; 1.0 in 1's, and on the rims of 0's and 3's.
    density, coverage = metrics.density_coverage(real, generated, k=1)
    assert (density, coverage) == (4 / 4, 3 / 4)


def test_inception_score_bounds():
    certain = torch.eye(10).repeat(5, 1)
    mean, deviation = metrics.inception_score(certain, splits=5)
    assert mean == pytest.approx(10) and deviation == pytest.approx(0, abs=1e-9)
    assert metrics.inception_score(torch.full((50, 10), 0.1))[0] == pytest.approx(1)


def test_path_length_leaves_out_the_extremes():
    d = torch.cat([torch.full((492,), 2.0), torch.tensor([1e6, -1e6] * 4)])[torch.randperm(500)]
    assert metrics.path_length(d, epsilon=0.1) == pytest.approx(200)


def test_names():
    assert metrics.parse("fid, kid,fid") == ("fid", "kid")
    with pytest.raises(ValueError, match=r"fidd.*fid, kid, is, pr, dc, ppl, tstr"):
        metrics.parse("fid,fidd")
    for metric in metrics.METRICS.values():
        assert metric.ranks in metric.figures
