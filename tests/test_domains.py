"""Two domains: the digits in other forms, pairs of feeds, pictures of pairs."""

import numpy as np
import pytest
import torch
from torch import Tensor

from fastgan.config import UsageError
from fastgan.data import Feed, ImageSet, PairFeed, load_images
from fastgan.data.digits import colored, edges, inverted
from fastgan.images import side_by_side, split_pair, to_uint8

CPU = torch.device("cpu")
FORMS = ("inverted", "edges", "colored")


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_the_digits(form: str):
    plain, other = load_images("digits", 16), load_images(f"digits:{form}", 16)
    assert other.images.shape == plain.images.shape and other.images.dtype == torch.uint8
    assert other.images.is_contiguous(memory_format=torch.channels_last)
    assert plain.labels is not None and other.labels is not None
    assert torch.equal(other.labels, plain.labels) and other.classes == plain.classes
    assert other.name == f"digits:{form}"
    assert torch.equal(other.images, load_images(f"digits:{form}", 16).images)
    assert not torch.equal(other.images, plain.images)


@pytest.mark.parametrize("form", ["", *FORMS])
def test_parts_of_a_form_are_parts_of_the_whole(form: str):
    suffix = f":{form}" if form else ""
    whole = load_images(f"digits{suffix}", 8)
    parts = [load_images(f"digits:{subset}{suffix}", 8) for subset in ("train", "test")]
    assert [len(part) for part in parts] == [1400, 397]
    assert parts[0].images.is_contiguous(memory_format=torch.channels_last)
    rows = torch.cat([part.images for part in parts]).flatten(1)
    assert torch.equal(sorted_rows(rows), sorted_rows(whole.images.flatten(1)))


def sorted_rows(rows: Tensor) -> Tensor:
    return rows[np.lexsort(rows.numpy().T)]


def test_inverted_twice_is_plain():
    gray = load_images("digits", 16, 1).images
    assert torch.equal(inverted(inverted(gray)), gray)
    assert torch.equal(load_images("digits:inverted", 16, 1).images, 255 - gray)


def test_edges_of_a_square_are_its_outline():
    gray = torch.zeros(1, 1, 9, 9, dtype=torch.uint8)
    gray[:, :, 2:7, 2:7] = 100
    outline = torch.full((7, 7), 255, dtype=torch.uint8)
    outline[2:5, 2:5] = 0
    assert torch.equal(edges(gray)[0, 0, 1:8, 1:8], outline)
    assert edges(gray)[0, 0, 0].max() == 0
    assert (load_images("digits:edges", 16, 1).images.amax((1, 2, 3)) == 255).all()


def test_colors_are_full_and_differ():
    gray = load_images("digits", 16, 1).images
    images = load_images("digits:colored", 16).images
    assert torch.equal(images, colored(gray))
    assert torch.equal(images.amax(dim=1), gray[:, 0])  # as bright as the plain ones
    assert (images.amin(dim=1) == 0).all()  # and as saturated as can be
    white = colored(torch.full((12, 1, 1, 1), 255, dtype=torch.uint8)).flatten(1)
    assert white[0].tolist() == [255, 0, 0]
    assert torch.cdist(white.float(), white.float()).add(1000 * torch.eye(12)).min() > 60


@pytest.mark.parametrize(
    ("data", "channels", "message"),
    [
        ("digits:colored", 1, "digits:colored has colors; use --channels 3"),
        ("digits:test:colored", 1, "digits:test:colored has colors; use --channels 3"),
        ("digits:invert", 3, "digits:invert is unknown.*digits:inverted, digits:edges, digits:colored"),
        ("digits:inverted:train", 3, "digits:inverted:train is unknown.*digits:train:inverted"),
        ("digits:", 3, "digits: is unknown"),
    ],
)
def test_unknown_forms(data: str, channels: int, message: str):
    with pytest.raises(UsageError, match=message):
        load_images(data, 16, channels)


def numbered(count: int, first: int = 0) -> ImageSet:
    """Images of one value each."""
    values = torch.arange(first, first + count, dtype=torch.uint8)
    return ImageSet(
        values.view(-1, 1, 1, 1).expand(-1, 3, 8, 8), torch.zeros(count).long(), ("x",), "numbers"
    )


def drawn(feed: PairFeed, start: int, count: int) -> list[tuple[int, int]]:
    images, labels = feed.batch(start, count)
    assert labels is None and images.shape == (count, 6, 8, 8) and images.dtype == torch.uint8
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert (images[:, :3] == images[:, :1]).all() and (images[:, 3:] == images[:, 3:4]).all()
    return list(zip(images[:, 0, 0, 0].tolist(), images[:, 3, 0, 0].tolist(), strict=True))


@pytest.mark.parametrize("resident", [True, False])
def test_pairs_of_feeds(resident: bool):
    a, b = numbered(20), numbered(30, 100)
    feed = PairFeed(Feed(a, CPU, 5, resident=resident), Feed(b, CPU, 6, resident=resident))
    assert feed.count == 30
    pairs = drawn(feed, 0, 60)
    for i in range(3):
        assert sorted(p[0] for p in pairs[20 * i : 20 * i + 20]) == list(range(20))
    for i in range(2):
        assert sorted(p[1] for p in pairs[30 * i : 30 * i + 30]) == list(range(100, 130))
    assert len(set(pairs)) > 50  # unpaired: each meets another in another epoch
    assert drawn(feed, 7, 25) + drawn(feed, 32, 4) == pairs[7:36]
    alone = Feed(b, CPU, 6).batch(0, 60)[0][:, 0, 0, 0].tolist()
    assert [p[1] for p in pairs] == alone
    feed.close()
    if not resident:
        with pytest.raises(RuntimeError):
            feed.batch(0, 5)


def test_pictures_of_pairs():
    images = torch.randn(3, 6, 4, 4).clamp(-1, 1)
    a, b = split_pair(images)
    assert torch.equal(torch.cat([a, b], dim=1), images) and a.shape == (3, 3, 4, 4)
    both = side_by_side(images)
    assert both.shape == (3, 4, 8, 3) and both.dtype == np.uint8
    assert (both[:, :, :4] == to_uint8(a)).all() and (both[:, :, 4:] == to_uint8(b)).all()
