"""Scores of generated images, as functions of features [N, F] that a network (features.py) gives them.

Everything is computed in float64, on the device that the features are on.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

NETWORKS = ("inception", "classifier", "pixels")  # that give features: see features.py
BLOCK = 2048  # rows of a distance matrix held at a time


class Metric(NamedTuple):
    """What a name in --metrics stands for."""

    figures: dict[str, str]  # key of each figure it gives: title
    ranks: str  # the figure by which snapshots are compared
    lower_is_better: bool
    of_features: bool = True  # its figures depend on the feature network, and carry its name


METRICS = {
    "fid": Metric({"fid": "FID"}, "fid", lower_is_better=True),
    "kid": Metric({"kid": "KID", "kid_std": "KID's deviation over subsets"}, "kid", lower_is_better=True),
    "is": Metric({"is": "Inception Score", "is_std": "Inception Score's deviation over splits"}, "is", False),
    "pr": Metric(
        {"precision": "precision", "recall": "recall", "f_score": "F score of precision and recall"},
        "f_score",
        False,
    ),
    "dc": Metric({"density": "density", "coverage": "coverage"}, "coverage", lower_is_better=False),
    "ppl": Metric({"ppl": "perceptual path length"}, "ppl", lower_is_better=True),
    "tstr": Metric(
        {"tstr": "TSTR/CAS"},
        "tstr",
        lower_is_better=False,
        of_features=False,
    ),
}


def parse(names: str) -> tuple[str, ...]:
    """The names in "fid,kid"; none in "". ValueError for one that is unknown."""
    given = tuple(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    for name in given:
        if name not in METRICS:
            raise ValueError(f"{name} is no metric; there are {', '.join(METRICS)}")
    return given


class Moments:
    """Mean [F] and covariance [F, F] (over N - 1) of features that come batch by batch, in float64.

    Each batch is centred on its own mean before it is added up (Chan, Golub and LeVeque 1979, equation 2.1),
    so that a mean far from zero costs no digits.
    """

    def __init__(self, features: Tensor | None = None):
        self.count = 0
        if features is not None:
            self.add(features)

    def add(self, features: Tensor) -> None:
        """features [n, F] of any floating dtype."""
        x = features.double()
        n, mean = len(x), x.mean(dim=0)
        scatter = (x - mean).T @ (x - mean)
        if self.count == 0:
            self.count, self.mean, self.scatter = n, mean, scatter
            return
        apart, total = mean - self.mean, self.count + n
        self.scatter = self.scatter + scatter + torch.outer(apart, apart) * (self.count * n / total)
        self.mean = self.mean + apart * (n / total)
        self.count = total

    @property
    def covariance(self) -> Tensor:
        """The unbiased covariance of all features so far [F, F]."""
        return self.scatter / (self.count - 1)


def frechet(a: Moments, b: Moments) -> float:
    """Frechet distance between the Gaussians of these moments.

        |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))

    (Heusel et al. 2017, arXiv 1706.08500, equation 6). With S = R R^T, the trace of the root is the sum of
    R_a^T R_b's singular values. S is singular where there are fewer images than features: what eigenvalues of
    0 are rounded to is left out of R, as its root is no small number.
    """

    def root(covariance: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(covariance)
        least = len(values) * torch.finfo(values.dtype).eps * values[-1]
        return vectors * torch.where(values > least, values, 0).sqrt()

    cov_a, cov_b = a.covariance, b.covariance
    trace_of_root = torch.linalg.svdvals(root(cov_a).T @ root(cov_b)).sum()
    means = (a.mean - b.mean).square().sum()
    return (means + cov_a.trace() + cov_b.trace() - 2 * trace_of_root).item()


def mmd2(x: Tensor, y: Tensor) -> Tensor:
    """Unbiased squared maximum mean discrepancy of x [N, F] and y [M, F] under k(x, y) = (x.y / F + 1)^3.

        mean over i != j of k(x_i, x_j) + the same of y - 2 mean over i, j of k(x_i, y_j)

    (Gretton et al. 2012, equation 3; the kernel is that of Binkowski et al. 2018, arXiv 1801.01401).
    """

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def within(a: Tensor) -> Tensor:
        k = kernel(a, a)
        return (k.sum() - k.trace()) / (len(a) * (len(a) - 1))

    return within(x) + within(y) - 2 * kernel(x, y).mean()


def kid(
    real: Tensor, generated: Tensor, subsets: int = 100, subset: int = 1000, seed: int = 2020
) -> tuple[float, float]:
    """Kernel Inception Distance: mean and deviation of `mmd2` over random subsets (Binkowski et al. 2018).

    As in stylegan3 and torch-fidelity, each of the subsets has `subset` generated images, drawn first, and as
    many real ones, none twice; fewer where there are fewer. The draws are NumPy's RandomState of `seed`.
    """
    size = min(subset, len(real), len(generated))
    random, values = np.random.RandomState(seed), []
    for _ in range(subsets):
        mine, theirs = (torch.from_numpy(random.choice(len(x), size, False)) for x in (generated, real))
        values.append(
            mmd2(generated[mine.to(generated.device)].double(), real[theirs.to(real.device)].double())
        )
    all_values = torch.stack(values)
    return all_values.mean().item(), all_values.std(correction=0).item()


def inception_score(probabilities: Tensor, splits: int = 10) -> tuple[float, float]:
    """Mean and deviation over consecutive splits of exp(mean_x KL(p(y|x) || p(y))), for p(y|x) [N, K].

    (Salimans et al. 2016, arXiv 1606.03498, section 4.) Samples are taken in their order.
    """
    p, count, scores = probabilities.double(), len(probabilities), []
    for i in range(splits):
        part = p[i * count // splits : (i + 1) * count // splits]
        divergence = torch.special.xlogy(part, part) - torch.special.xlogy(part, part.mean(dim=0))
        scores.append(divergence.sum(dim=1).mean().exp())
    values = torch.stack(scores)
    return values.mean().item(), values.std(correction=0).item()


def distances(x: Tensor, y: Tensor) -> Tensor:
    """[N, M]: from each of x [N, F] to each of y [M, F], of their differences.

    `torch.cdist` would rather multiply matrices. That loses the digits of features far from zero, and whether
    two distances are equal, on which it depends what lies in a ball.
    """
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def neighbour_distance(x: Tensor, k: int) -> Tensor:
    """[N]: from each of x [N, F] to its k-th nearest other."""
    x = x.double()
    nearest = [distances(part, x).topk(k + 1, largest=False).values for part in x.split(BLOCK)]
    return torch.cat(nearest)[:, k]


def precision_recall(real: Tensor, generated: Tensor, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991, equations 1 and 2).

    A set's manifold is the union of balls around its members, each reaching its k-th nearest other. Precision
    is the share of generated images [M, F] within the real manifold, recall that of real ones [N, F] within
    the generated.
    """
    real, generated = real.double(), generated.double()
    reach = neighbour_distance(generated, k)
    precise, recalled = torch.zeros_like(reach, dtype=torch.bool), 0
    for part, radius in zip(real.split(BLOCK), neighbour_distance(real, k).split(BLOCK), strict=True):
        apart = distances(part, generated)
        precise |= (apart <= radius[:, None]).any(dim=0)
        recalled += (apart <= reach).any(dim=1).sum()
    return float(precise.sum()) / len(generated), float(recalled) / len(real)


def density_coverage(real: Tensor, generated: Tensor, k: int = 5) -> tuple[float, float]:
    """Density and coverage (Naeem et al. 2020, arXiv 2002.09797, equations 3 and 4).

    Around each real image [N, F] lies an open ball that reaches its k-th nearest other. Density is the number
    of balls that a generated image [M, F] lies in, on average, over k: above 1 where real images are dense.
    Coverage is the share of balls that hold a generated image.
    """
    real, generated = real.double(), generated.double()
    inside = nearest = 0
    radius = neighbour_distance(real, k)
    for part, reach in zip(real.split(BLOCK), radius.split(BLOCK), strict=True):
        within = distances(part, generated) < reach[:, None]
        inside += within.sum()
        nearest += within.any(dim=1).sum()
    return float(inside) / (k * len(generated)), float(nearest) / len(real)


def path_length(distances: Tensor, epsilon: float) -> float:
    """Mean of d(G(t), G(t + epsilon)) / epsilon^2 over paths, [N], without the extremes.

    (Karras et al. 2018, arXiv 1812.04948, equation 2.) What lies beyond the 1st and the 99th percentile, each
    a member of the set, is left out, as in the authors' code.
    """
    d = np.sort(distances.double().cpu().numpy()) / epsilon**2
    low, high = np.percentile(d, 1, method="lower"), np.percentile(d, 99, method="higher")
    return float(d[(d >= low) & (d <= high)].mean())
