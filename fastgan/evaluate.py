"""python -m fastgan.evaluate: how good a generator's images are, in figures.

A figure that depends on a feature network is named after it unless that is Inception: "FID (classifier
features)". Figures of different networks, counts or resize filters cannot be compared.
"""

import copy
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from fastgan import cli, features, metrics
from fastgan.checkpoint import write
from fastgan.config import Config, UsageError
from fastgan.data import ImageSet, cache, images_for
from fastgan.engine import one_hot
from fastgan.features import FeatureNetwork
from fastgan.images import quantize, split_pair
from fastgan.latent import slerp
from fastgan.metrics import METRICS, NETWORKS, Moments
from fastgan.models import Generator, family
from fastgan.pretrained import load
from fastgan.sampling import latents

LEAST = 20  # images: enough for ten splits of the Inception Score and five neighbours
EPSILON = 1e-4  # length of a path for perceptual path length, as a share of the way between two latents
UNKNOWN = "unknown"  # the filter of images that came in their size
STATISTICS = "2"  # raise it when what is cached of the real images changes
NEED_ALL_FEATURES = {"kid", "pr", "dc"}  # fid needs only their moments


def parser() -> cli.Parser:
    """The command's options."""
    p = cli.Parser(prog="fastgan evaluate", description=__doc__, formatter_class=cli.Prose)
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, help="folder of a run")
    source.add_argument(
        "--weights", type=Path, metavar="FILE", help="a generator.safetensors or best.safetensors"
    )
    p.add_argument("--data", default="", help="real images to compare with (default: the run's own)")
    p.add_argument(
        "--metrics",
        default="fid,kid,pr",
        help="any of fid, kid, is (Inception Score), pr (precision and recall), dc (density and coverage), "
        "ppl (perceptual path length), tstr (a classifier trained on generated images, tested on real ones); "
        "default: fid,kid,pr",
    )
    p.add_argument(
        "--features",
        choices=NETWORKS,
        default="classifier",
        help="feature network: inception (the papers' own), classifier (learns the data's labels here, works "
        "offline), pixels; default: classifier",
    )
    p.add_argument(
        "--inception",
        type=Path,
        metavar="FILE",
        help="weights of --features inception (default: downloaded once into the cache)",
    )
    p.add_argument(
        "--test-data",
        default="",
        help="of tstr: real images that the run has not seen (default: the run's own, or digits:test)",
    )
    p.add_argument("--count", type=int, default=10000, help="number of generated images (default: 10000)")
    p.add_argument("--seed", type=int, default=0, help="seed of the latents and labels (default: 0)")
    p.add_argument("--batch", type=int, default=64, help="images computed at a time (default: 64)")
    p.add_argument("--truncation", type=float, default=1.0, help="as in generate (default: 1, off)")
    p.add_argument("--to", choices=("a", "b"), default="", help="of CycleGAN: domain to judge (default: b)")
    p.add_argument("--json", type=Path, metavar="FILE", help="write every figure")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    return p


@contextmanager
def without_tf32() -> Iterator[None]:
    """CUDA's fp32 is fp32: TF32 is coarser than a step of perceptual path length, and features by it are not
    those of a CPU."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


class Evaluator:
    """What is needed to judge a run's generators: the real images' statistics and the feature network.

    All that can be wrong is found out when it is made. UsageError names the metric or option at fault.
    """

    def __init__(
        self,
        config: Config,
        device: torch.device,
        names: str,
        data: str = "",
        network: str = "classifier",
        inception: Path | None = None,
        test_data: str = "",
        count: int = 10000,
        seed: int = 0,
        batch: int = 64,
        truncation: float = 1.0,
        to: str = "",
    ):
        self.config, self.device, self.to = config, device, to or "b"
        self.seed, self.batch, self.truncation = seed, batch, truncation
        try:
            self.metrics = metrics.parse(names)
        except ValueError as error:
            raise UsageError(f"--metrics: {error}") from None
        if not self.metrics:
            raise UsageError(f"--metrics names none; there are {', '.join(METRICS)}")
        translates = getattr(family(config.arch).Generator, "translates", False)
        self._check(network, translates, to)

        real, other = config.data, config.data_b
        if translates and self.to == "b":
            real, other = other, real
        self.real = self._load(data or real)
        self.source = self._load(other) if translates else None  # of images to translate
        self.count = min(count, len(self.source)) if self.source else count
        if min(self.count, len(self.real)) < LEAST:
            raise UsageError(
                f"metrics take {LEAST} images or more: there are {self.count} generated ones (--count) and "
                f"{len(self.real)} of {self.real.name}"
            )
        if self.source:  # a folder's images come class by class, of which the first ones are no sample
            self.chosen = torch.from_numpy(self._rng().permutation(len(self.source))[: self.count])
        self.labels = self._labels()
        self.held_out = self._held_out(test_data, real) if "tstr" in self.metrics else None
        self.learner: FeatureNetwork | None = None  # what tstr has taught last
        self.network, self.statistics = None, {}
        if any(METRICS[name].of_features for name in self.metrics):
            content = features.content_hash(self.real)
            self.network = features.make(network, self.real, content, device, inception)
            self.statistics = self._statistics(self.network, content)

    @classmethod
    def of_run(cls, config: Config, device: torch.device) -> "Evaluator":
        """The one that training asks for by --metrics. Its UsageError names the options of training."""
        try:
            return cls(
                config,
                device,
                config.metrics,
                network=config.eval_features,
                test_data=config.test_data,
                count=config.eval_count,
            )
        except UsageError as error:
            said = str(error).replace(", or give --inception FILE", "")
            for option in ("features", "count"):
                said = said.replace(f"--{option}", f"--eval-{option}")
            raise UsageError(said) from None

    def _check(self, network: str, translates: bool, to: str) -> None:
        arch = self.config.arch
        if "is" in self.metrics and network == "pixels":
            raise UsageError("--metrics is needs classes, which --features pixels does not give; use another")
        if "ppl" in self.metrics and network == "inception":
            raise UsageError(
                "--metrics ppl compares images finer than the 8 bits that --features inception takes; "
                "use --features classifier"
            )
        if translates and "ppl" in self.metrics:
            raise UsageError(f"--metrics ppl needs latents: --arch {arch} has none; leave it out")
        if translates and self.truncation != 1:
            raise UsageError(f"--truncation needs latents: --arch {arch} has none; leave it out")
        if to and not translates:
            raise UsageError(f"--to is for --arch cyclegan: --arch {arch} translates nothing; leave it out")

    def _load(self, name: str) -> ImageSet:
        return images_for(self.config, name)

    def _labels(self) -> Tensor | None:
        """Labels int64 [count] of generated images: drawn from the real ones', or those of their source."""
        if self.source:
            return None if self.source.labels is None else self.source.labels[self.chosen]
        if not self.config.cond:
            return None
        if self.real.labels is None or len(self.real.classes) != self.config.c_dim:
            raise UsageError(
                f"the run knows {self.config.c_dim} classes, {self.real.name} has {len(self.real.classes)}; "
                "use --data with the same classes"
            )
        return self.real.labels[torch.from_numpy(self._rng().integers(len(self.real), size=self.count))]

    def _rng(self) -> np.random.Generator:
        return np.random.default_rng([self.seed, 0, 2])  # three words, as latents come from two

    def _held_out(self, test_data: str, seen: str) -> ImageSet:
        if self.labels is None:
            raise UsageError("--metrics tstr needs labelled images; train with --cond or leave it out")
        name = test_data or self.config.test_data or held_out_of(seen)
        if not name:
            raise UsageError(
                "--metrics tstr needs real images that the run has not seen: give --test-data, or train on "
                "digits:train, for which it is digits:test"
            )
        found = self._load(name)
        classes = (self.source or self.real).classes
        if found.labels is None or found.classes != classes:
            raise UsageError(
                f"--test-data {name} must have the same classes as the run: {', '.join(classes)}"
            )
        return found

    def _statistics(self, network: FeatureNetwork, content: str) -> dict[str, Tensor]:
        """Of the real images' features: count, mean and scatter, and all of them where a metric needs all.

        From the cache if they are there.
        """
        whole = bool(NEED_ALL_FEATURES & set(self.metrics))
        if not whole and "fid" not in self.metrics:
            return {}

        def make() -> dict[str, Tensor]:
            moments, parts = Moments(), []
            for images in self._bar(self.real.images.split(self.batch), len(self.real), "real images"):
                found = network(images.to(self.device))[0]
                moments.add(found)
                parts += [found] if whole else []
            known = {"count": torch.tensor(moments.count), "mean": moments.mean, "scatter": moments.scatter}
            return known | ({"features": torch.cat(parts)} if whole else {})

        settings = (STATISTICS, network.name, network.resize, network.checksum, whole)
        with torch.no_grad(), without_tf32():
            found = cache.remember("reals", features.key(content, settings), make)
        return {name: tensor.to(self.device) for name, tensor in found.items()}

    def _bar(self, parts: Iterable[Tensor], total: int, what: str) -> Iterator[Tensor]:
        """The parts, behind a progress bar of their images on a terminal."""
        with tqdm(total=total, desc=what, unit=" images", unit_scale=True, disable=None, leave=False) as bar:
            for part in parts:
                yield part
                bar.update(len(part))

    def key(self, name: str, figure: str) -> str:
        """`figure` of the metric `name` in a log: with the feature network's name unless it is Inception."""
        if not METRICS[name].of_features or self.network is None or self.network.name == "inception":
            return figure
        return f"{figure}_{self.network.name}"

    @property
    def about(self) -> dict[str, Any]:
        """What every figure depends on."""
        about: dict[str, Any] = {"samples": self.count, "seed": self.seed, "truncation": self.truncation}
        about |= {"real": self.real.name, "reals": len(self.real), "resize": self.real.filter or UNKNOWN}
        if self.network:
            about |= {"features": self.network.name, "features_resize": self.network.resize}
            about |= {"checksum": self.network.checksum}
        if self.held_out:
            about |= {"test": self.held_out.name, "tests": len(self.held_out)}
        if self.learner:
            about |= {"learner": self.learner.name, "learner_checksum": self.learner.checksum}
        return about

    def told(self, name: str) -> str:
        """The same in words, as far as it concerns the metric `name`."""
        if name == "tstr" and self.held_out:
            return f"{self.count} samples to teach {self.learner}, {_described(self.held_out)} to test it"
        words = f"{self.count} samples, {_described(self.real)}"
        if self.network:
            words += f", {self.network}"
        return words

    def lines(self, figures: dict[str, float]) -> list[str]:
        """One a figure, with all that it depends on."""
        rows = []
        for name in self.metrics:
            for figure, title in METRICS[name].figures.items():
                key = self.key(name, figure)
                by = f" ({self.network.name} features)" if self.network and key != figure else ""
                rows.append((title + by, figures[key], self.told(name)))
        width = max(len(title) for title, _, _ in rows)
        return [f"{title:{width}}  {value:<10.5g}  {told}" for title, value, told in rows]

    def summary(self, figures: dict[str, float]) -> str:
        """All in one line, for the log of a training."""
        told = dict.fromkeys(self.told(name) for name in self.metrics)
        return f"{'  '.join(f'{k} {v:.5g}' for k, v in figures.items())}  [{'; '.join(told)}]"

    def better(self, figures: dict[str, float], than: dict[str, float] | None) -> bool:
        """Whether the first metric is among `figures` and says so."""
        metric = METRICS[self.metrics[0]]
        key = self.key(self.metrics[0], metric.ranks)
        if key not in figures or than is None:
            return key in figures
        return figures[key] < than[key] if metric.lower_is_better else figures[key] > than[key]

    def measure(self, G: Generator) -> dict[str, float]:
        """Every figure of a generator in evaluation mode, by key. Global random states stay as they are."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.no_grad(), without_tf32():
            figures = self._of_samples(G)
            if "ppl" in self.metrics:
                figures["ppl"] = self._path_length(G)
        named = [(name, figure) for name in self.metrics for figure in METRICS[name].figures]
        return {self.key(name, figure): figures[figure] for name, figure in named}

    def _of_samples(self, G: Generator) -> dict[str, float]:
        wanted = set(self.metrics)
        if wanted == {"ppl"}:
            return {}
        moments, all_features, probabilities, images = Moments(), [], [], []
        for part in self._bar(self._samples(G), self.count, "samples"):
            if self.network and wanted != {"tstr"}:
                found, logits = self.network(part)
                moments.add(found)
                all_features += [found] if wanted & NEED_ALL_FEATURES else []
                probabilities += (
                    [logits.double().softmax(dim=1)] if "is" in wanted and logits is not None else []
                )
            images += [part.cpu()] if "tstr" in wanted else []
        figures: dict[str, float] = {}
        real = self.statistics
        if "fid" in wanted:
            figures["fid"] = metrics.frechet(_moments(real), moments)
        if wanted & NEED_ALL_FEATURES:
            theirs, mine = real["features"], torch.cat(all_features)
            if "kid" in wanted:
                figures["kid"], figures["kid_std"] = metrics.kid(theirs, mine)
            if "pr" in wanted:
                precision, recall = metrics.precision_recall(theirs, mine)
                mean = 2 * precision * recall / max(precision + recall, 1e-12)
                figures |= {"precision": precision, "recall": recall, "f_score": mean}
            if "dc" in wanted:
                figures["density"], figures["coverage"] = metrics.density_coverage(theirs, mine)
        if "is" in wanted:
            figures["is"], figures["is_std"] = metrics.inception_score(torch.cat(probabilities))
        if "tstr" in wanted:
            assert self.held_out is not None and self.held_out.labels is not None and self.labels is not None
            net = features.train_classifier(torch.cat(images), self.labels, len(self.held_out.classes))
            figures["tstr"] = features.accuracy(net, self.held_out.images, self.held_out.labels)
            self.learner = features.named(net)
        return figures

    def _samples(self, G: Generator) -> Iterator[Tensor]:
        """Images uint8 [n, C, R, R] on the device, `count` in all; of two domains, those of the first."""
        for first in range(0, self.count, self.batch):
            if self.source:
                real = self.source.images[self.chosen[first : first + self.batch]].to(self.device)
                images = G.translate(real / 127.5 - 1, self.to)
            else:
                images = self._generated(G, *self._inputs(G, first))
            yield quantize(images).permute(0, 3, 1, 2)

    def _inputs(self, G: Generator, first: int, offset: int = 0) -> tuple[Tensor, Tensor | None]:
        """Latents [n, z_dim] and labels [n, c_dim] of a batch; `offset` starts another series of latents."""
        n = min(self.batch, self.count - first)
        bound = None if hasattr(G, "mapping") or self.truncation == 1 else self.truncation
        z = latents(self.seed, n, G.z_dim, bound, first + offset).to(self.device)
        if not self.config.cond or self.labels is None:
            return z, None
        return z, one_hot(self.labels[first : first + n].to(self.device), self.config.c_dim)

    def _generated(self, G: Generator, z: Tensor, c: Tensor | None) -> Tensor:
        images = G(z, c, truncation=self.truncation) if hasattr(G, "mapping") else G(z, c)
        if self.config.domains == 2:
            images = split_pair(images)[0]
        # A network that grows has small images at first; they are judged at the size of the real ones.
        small = images.shape[-1] < self.config.resolution
        return F.interpolate(images, size=self.config.resolution) if small else images

    def _path_length(self, G: Generator) -> float:
        """Mean squared distance of features, scaled to unit length, along a step of EPSILON from each sample.

        The step is a share of the straight way to another w, or of the circular way to another z in families
        without w (Karras et al. 2018, section 4.1; the end of the path, as in their later work). Their
        distance is LPIPS, this one is of the feature network. Convolutions run in fp32: bf16 is too coarse.
        """
        assert self.network is not None
        G, distances = _in_fp32(G), []
        starts = range(0, self.count, self.batch)
        for first in tqdm(starts, desc="path length", unit=" batches", disable=None, leave=False):
            (z, c), (to, _) = self._inputs(G, first), self._inputs(G, first, self.count)
            if hasattr(G, "mapping"):
                w, other = (G.mapping(x, c, self.truncation) for x in (z, to))
                images = G.synthesis(torch.cat([w, torch.lerp(w, other, EPSILON)]))
            else:
                both = None if c is None else torch.cat([c, c])
                to = F.normalize(to) * z.norm(dim=1, keepdim=True)  # of one length, or it would be no circle
                images = self._generated(G, torch.cat([z, slerp(z, to, EPSILON)]), both)
            found = F.normalize(self.network(images.float() * 127.5 + 127.5)[0])
            before, after = found.chunk(2)
            distances.append((before - after).square().sum(dim=1))
        return metrics.path_length(torch.cat(distances), EPSILON)


def _in_fp32(G: Generator) -> Generator:
    """A copy whose convolutions run in fp32."""
    G = copy.deepcopy(G)
    for module in G.modules():
        if isinstance(getattr(module, "dtype", None), torch.dtype):
            module.dtype = torch.float32
    return G


def _described(images: ImageSet) -> str:
    return f"{len(images)} of {images.name} (resize {images.filter or UNKNOWN})"


def _moments(state: dict[str, Tensor]) -> Moments:
    moments = Moments()
    moments.count = int(state["count"])
    moments.mean, moments.scatter = state["mean"], state["scatter"]
    return moments


def held_out_of(data: str) -> str:
    """The part of the embedded digits that a run on `data` has not seen; "" if there is none."""
    return data.replace("digits:train", "digits:test") if data.startswith("digits:train") else ""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return cli.run(_main, argv)


def _main(argv: Sequence[str] | None) -> int:
    args = parser().parse_args(argv)
    if args.batch < 1 or args.seed < 0:
        raise UsageError(f"--batch must be at least 1 and --seed 0: got {args.batch} and {args.seed}")
    if not 0 < args.truncation <= 1:
        raise UsageError(f"--truncation must lie above 0 and be at most 1: got {args.truncation}")
    if args.inception and args.features != "inception":
        raise UsageError("--inception is for --features inception; give both")
    if args.json and not args.json.parent.is_dir():
        raise UsageError(f"--json {args.json}: there is no folder {args.json.parent}")
    loaded = load(args.run or args.weights, device=args.device)
    G, config = loaded.net, loaded.config
    device = next(G.parameters()).device
    evaluator = Evaluator(
        config,
        device,
        args.metrics,
        args.data,
        args.features,
        args.inception,
        args.test_data,
        args.count,
        args.seed,
        args.batch,
        args.truncation,
        args.to,
    )
    figures = evaluator.measure(G)
    print("\n".join(evaluator.lines(figures)))
    if args.json:
        write(args.json, json.dumps({"figures": figures} | evaluator.about, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
