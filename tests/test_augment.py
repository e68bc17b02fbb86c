"""Augmentations: against plain loops and matrices, their statistics, and their second derivatives."""

import math

import pytest
import torch
from torch import Tensor

from fastgan.augment import ADA, DiffAugment, adapt, make_augment
from fastgan.losses import leaf

ONE = torch.tensor(1.0, dtype=torch.float64)
# Columns of ADA's uniform numbers for RGB: whether a transformation takes place, then what it takes.
GATES = {"mirror": 0, "quarter": 1, "shift": 2, "scale": 3, "stretch": 4, "drift": 5, "turn": 6, "turn2": 7}
COLORS = {"brightness": 14, "contrast": 15, "flip": 16, "hue": 17, "saturation": 18}
GATES |= COLORS


def draws(n: int, *on: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random numbers with which ADA for RGB makes the transformations `on` at p = 1, and no others."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(n, 21, generator=generator, dtype=torch.float64)
    for name, column in GATES.items():
        uniform[:, column] = 0.5 if name in on else 1.0
    return uniform, torch.randn(n, 7, generator=generator, dtype=torch.float64)


def pictures(n: int, channels: int = 3, h: int = 16, w: int = 16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, channels, h, w, generator=generator, dtype=torch.float64) * 2 - 1


def test_diffaugment_is_the_papers_pixel_by_pixel():
    n, h, w = 40, 9, 16
    augment = make_augment("cutout, color,translation", False, 3)
    assert augment is not None and augment.uniforms == 7 and augment.normals == 0
    x, u = pictures(n, 3, h, w), torch.rand(n, 7, dtype=torch.float64)
    y = augment(x, u, torch.empty(n, 0), torch.tensor(0.0))
    moves, squares = set(), set()
    for i, (brightness, saturation, contrast, *places) in enumerate(u.tolist()):
        image = x[i] + brightness - 0.5
        image = (image - image.mean(0)) * 2 * saturation + image.mean(0)
        image = (image - image.mean()) * (contrast + 0.5) + image.mean()
        down, right = math.floor(places[0] * 3) - 1, math.floor(places[1] * 5) - 2  # sides / 8, rounded
        expected = torch.zeros_like(image)
        for r in range(h):
            for c in range(w):
                if 0 <= r - down < h and 0 <= c - right < w:
                    expected[:, r, c] = image[:, r - down, c - right]
        top, left = math.floor(places[2] * 9) - 2, math.floor(places[3] * 17) - 4  # squares of 5 by 8
        expected[:, max(top, 0) : top + 5, max(left, 0) : left + 8] = 0
        torch.testing.assert_close(y[i], expected)
        moves.add((down, right))
        squares.add((top, left))
    assert {m[0] for m in moves} == {-1, 0, 1} and {m[1] for m in moves} == {-2, -1, 0, 1, 2}
    assert min(s[0] for s in squares) == -2 and max(s[1] for s in squares) > 8


@pytest.mark.parametrize("policy", ["color", "translation", "cutout", "color,cutout"])
def test_a_policy_takes_its_own_numbers_alone(policy: str):
    augment = make_augment(policy, False, 1)
    assert augment is not None
    x, middle = pictures(2, 1), torch.full((2, augment.uniforms), 0.5, dtype=torch.float64)
    changed = (augment(x, middle, torch.empty(2, 0), ONE) - x).abs() > 1e-12
    assert changed.sum() == (2 * 64 if "cutout" in policy else 0)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_ada_at_zero_is_the_identity(channels: int, dtype: torch.dtype):
    augment = ADA(channels)
    x = pictures(8, channels).to(dtype)
    x[:, :, 0, 0] = -0.0  # what passed through any arithmetic would lose its sign
    x.requires_grad_()
    u, z = torch.rand(8, augment.uniforms), torch.randn(8, augment.normals)
    u[0] = 0
    y = augment(x, u, z, torch.tensor(0.0))
    assert y.dtype == dtype and y.view(torch.uint8).equal(x.view(torch.uint8))
    g = torch.randn_like(y)
    assert torch.autograd.grad(y, x, g)[0].equal(g)
    assert not augment(x, u, z, torch.tensor(0.5)).equal(x)


def test_mirrors_quarter_turns_and_shifts_move_values_unchanged():
    x = pictures(200).float()
    u, z = draws(200, "mirror", "quarter", "shift", "scale", "turn", "drift")
    u[:, [GATES["scale"], GATES["turn"], GATES["drift"]]] = 1.0
    y = ADA(3)(x, u, z, ONE)
    for i, (mirror, quarter, right, down) in enumerate(u[:, 8:12].tolist()):
        image = x[i].flip(2) if mirror >= 0.5 else x[i]
        image = image.rot90(math.floor(4 * quarter), (1, 2))
        rows, columns = (
            [15 - abs(15 - abs(k - round((2 * v - 1) * 2))) for k in range(16)] for v in (down, right)
        )
        assert y[i].equal(image[:, rows][:, :, columns])


def homogeneous(xx: float, xy: float, yx: float, yy: float, x: float = 0.0, y: float = 0.0) -> Tensor:
    return torch.tensor([[xx, xy, x], [yx, yy, y], [0, 0, 1]], dtype=torch.float64)


def forward_matrix(u: list[float], z: list[float], h: int, w: int) -> Tensor:
    """The product of all geometric transformations as the paper's appendix B lists them."""

    def turn(angle: float) -> Tensor:
        return homogeneous(math.cos(angle), -math.sin(angle), math.sin(angle), math.cos(angle))

    steps = [
        homogeneous(1 - 2 * math.floor(2 * u[8]), 0, 0, 1),
        turn(-math.pi / 2 * math.floor(4 * u[9])),
        homogeneous(1, 0, 0, 1, round((2 * u[10] - 1) * w / 8), round((2 * u[11] - 1) * h / 8)),
        homogeneous(2 ** (0.2 * z[0]), 0, 0, 2 ** (0.2 * z[0])),
        turn(-math.pi * (2 * u[12] - 1)),
        homogeneous(2 ** (0.2 * z[1]), 0, 0, 2 ** (-0.2 * z[1])),
        turn(-math.pi * (2 * u[13] - 1)),
        homogeneous(1, 0, 0, 1, z[2] * w / 8, z[3] * h / 8),
    ]
    product = torch.eye(3, dtype=torch.float64)
    for step in steps:
        product = step @ product
    return product


@pytest.mark.parametrize(("h", "w"), [(32, 32), (24, 40)])
def test_the_warp_is_the_product_of_its_matrices(h: int, w: int):
    """On cosines, which continue themselves by reflection: their warp is known everywhere."""

    def wave(x: Tensor, y: Tensor) -> Tensor:
        return torch.stack([torch.cos(math.pi * (i * x / (w - 1) + j * y / (h - 1))) for i, j in waves])

    waves = [(1, 0), (0, 1), (2, 0)]
    y, x = torch.meshgrid(torch.arange(h).double(), torch.arange(w).double(), indexing="ij")
    u, z = draws(12, *(GATES.keys() - COLORS.keys()))
    ours = ADA(3)(wave(x, y).expand(12, 3, h, w), u, z, ONE)
    for i in range(12):
        back = forward_matrix(u[i].tolist(), z[i].tolist(), h, w).inverse()
        points = torch.stack([x - (w - 1) / 2, y - (h - 1) / 2, torch.ones_like(x)]).flatten(1)
        source = (back @ points).unflatten(1, (h, w))
        expected = wave(source[0] + (w - 1) / 2, source[1] + (h - 1) / 2)
        torch.testing.assert_close(ours[i], expected, rtol=0, atol=0.01)


def test_the_warp_keeps_fine_detail():
    """Three quarters of the way to the finest detail, half a pixel away: bilinear alone keeps 38% of it."""
    x = torch.cos(0.75 * math.pi * torch.arange(64, dtype=torch.float64)).expand(1, 3, 64, 64)
    u, z = draws(1, "drift")
    z[:, 2], z[:, 3] = 0.5 * 8 / 64, 0
    y = ADA(3)(x, u, z, ONE)
    expected = torch.cos(0.75 * math.pi * (torch.arange(64, dtype=torch.float64) - 0.5))
    torch.testing.assert_close(y[0, 0, 30, 12:52], 0.826 * expected[12:52], rtol=0, atol=0.01)


def test_colors_are_the_product_of_their_matrices():
    u, z = draws(20, *COLORS)
    x = pictures(20, 3, 4, 4)
    y = ADA(3)(x, u, z, ONE)
    axis = torch.full((3,), 1 / math.sqrt(3), dtype=torch.float64)
    cross = torch.linalg.cross(axis.expand(3, 3), torch.eye(3).double()).t()
    gray = axis.outer(axis)
    for i in range(20):
        image = x[i].flatten(1) + 0.2 * z[i, 4]
        image = image * 2 ** (0.5 * z[i, 5])
        image = image - 2 * (gray @ image) * (u[i, 19] >= 0.5)
        image = torch.linalg.matrix_exp(math.pi * (2 * u[i, 20] - 1) * cross) @ image
        image = gray @ image + 2 ** z[i, 6] * (image - gray @ image)
        torch.testing.assert_close(y[i].flatten(1), image)


def test_gray_images_are_recolored_like_gray_colors():
    x, (u, z) = pictures(20, 1), draws(20, *COLORS)
    colored = ADA(3)(x.expand(-1, 3, -1, -1), u, z, ONE)
    gray = ADA(1)(x, torch.cat([u[:, :17], u[:, 19:20]], dim=1), z[:, :6], ONE)
    torch.testing.assert_close(colored, gray.expand(-1, 3, -1, -1))


def matrices(n: int, p: float) -> tuple[Tensor, Tensor]:
    """What ADA did to `n` images, read off ramps (output to source, [n, 2, 2]), and its draws."""
    y, x = torch.meshgrid(torch.arange(24).double(), torch.arange(24).double(), indexing="ij")
    u, z = torch.rand(n, 21, dtype=torch.float64), torch.randn(n, 7, dtype=torch.float64)
    u[:, [GATES["shift"], GATES["drift"], *COLORS.values()]] = 1.0  # never below p
    ramps = ADA(3)(torch.stack([x, y, y]).expand(n, 3, 24, 24), u, z, torch.tensor(p).double())[:, :2]
    return torch.stack([ramps[:, :, 11, 12], ramps[:, :, 12, 11]], dim=2) - ramps[:, :, 11, 11, None], u


def test_statistics_of_what_ada_does():
    torch.manual_seed(0)
    n, p = 1500, 0.6
    m, u = matrices(n, p)
    determinant = m[:, 0, 0] * m[:, 1, 1] - m[:, 0, 1] * m[:, 1, 0]
    spread = 3 * 0.5 / math.sqrt(n)
    assert abs((determinant < 0).double().mean() - p / 2) < spread  # mirrored
    scaled = determinant.abs().log2()
    assert abs((scaled.abs() > 1e-6).double().mean() - p) < spread
    assert abs(scaled[scaled.abs() > 1e-6].std() - 2 * 0.2) < 0.04
    # Neither scaled nor stretched: what is left is orthogonal; turned by a quarter or not at all, or freely.
    rigid = m[(u[:, 3] >= p) & (u[:, 4] >= p)]
    torch.testing.assert_close(rigid @ rigid.mT, torch.eye(2).double().expand_as(rigid), rtol=0, atol=1e-9)
    quarters = (rigid.abs().amax(dim=(1, 2)) > 1 - 1e-9).double().mean()
    assert abs(quarters - (1 - p)) < 3 * 0.5 / math.sqrt(len(rigid))
    straight = rigid[rigid.abs().amax(dim=(1, 2)) > 1 - 1e-9]
    swapped = (straight[:, 0, 1].abs() > 0.5).double().mean()
    assert abs(swapped - p / 2) < 3 * 0.5 / math.sqrt(len(straight))


def test_angles_are_uniform_at_one():
    torch.manual_seed(0)
    m, _ = matrices(1000, 1.0)
    angle = torch.atan2(m[:, 1, 0], m[:, 0, 0])
    assert angle.cos().mean().abs() < 0.1 and angle.sin().mean().abs() < 0.1
    assert (2 * angle).cos().mean().abs() < 0.1


@pytest.mark.parametrize("name", ["diffaugment", "ada"])
def test_domains_share_their_numbers(name: str):
    augment = make_augment("" if name == "ada" else "color,translation,cutout", name == "ada", 3)
    assert augment is not None
    x = pictures(4, 6)
    u, z = torch.rand(4, augment.uniforms), torch.randn(4, augment.normals)
    both = augment(x, u, z, ONE)
    torch.testing.assert_close(both[:, :3], augment(x[:, :3], u, z, ONE))
    torch.testing.assert_close(both[:, 3:], augment(x[:, 3:], u, z, ONE))


def r1(augment: DiffAugment | ADA, images: Tensor, u: Tensor, z: Tensor, p: Tensor, weight: Tensor):
    """A penalty's gradient for a critic's weight and for the images, through two gradients."""
    images, weight = leaf(images), leaf(weight)
    score = (augment(images, u, z, p) * weight).tanh().sum()
    (grad,) = torch.autograd.grad(score, images, create_graph=True)
    return torch.autograd.grad(score + grad.square().sum(), [images, weight])


AUGMENTS = [DiffAugment(("color", "translation", "cutout"), 3), DiffAugment(("cutout",), 1), ADA(3), ADA(1)]
AUGMENT = pytest.mark.parametrize("augment", AUGMENTS, ids=["color", "cutout", "ada", "gray"])


@AUGMENT
def test_derivatives(augment: DiffAugment | ADA):
    torch.manual_seed(1)
    x = pictures(3, augment.channels, 8, 8).requires_grad_()
    u, z = torch.rand(3, augment.uniforms).double(), torch.randn(3, augment.normals).double()

    def squared(x: Tensor) -> Tensor:
        return augment(x, u, z, 0.7 * ONE).square()

    assert torch.autograd.gradcheck(squared, x, fast_mode=True)
    assert torch.autograd.gradgradcheck(squared, x, fast_mode=True)


@AUGMENT
def test_compiled_derivatives_equal_eager_ones(augment: DiffAugment | ADA):
    torch._dynamo.reset()
    config = torch._dynamo.config.patch(trace_autograd_ops=True, error_on_recompile=True)
    with config:
        compiled = torch.compile(r1, fullgraph=True, dynamic=False, backend="aot_eager")
        for seed, p in ((0, 0.0), (1, 0.5), (2, 1.0)):
            torch.manual_seed(seed)
            x = pictures(3, augment.channels, 8, 8, seed)
            u, z = torch.rand(3, augment.uniforms).double(), torch.randn(3, augment.normals).double()
            args = (augment, x, u, z, p * ONE, torch.randn_like(x))
            for ours, eager in zip(compiled(*args), r1(*args), strict=True):
                torch.testing.assert_close(ours, eager, rtol=1e-10, atol=1e-10)


@AUGMENT
@pytest.mark.parametrize("size", [(4, 4), (8, 12)])
def test_shapes_dtypes_and_devices(augment: DiffAugment | ADA, size: tuple[int, int]):
    """bf16 follows single precision; on meta tensors nothing asks for a value."""
    x = pictures(5, 2 * augment.channels, *size).float()
    u, z, p = torch.rand(5, augment.uniforms), torch.randn(5, augment.normals), torch.tensor(0.8)
    exact = augment(x, u, z, p)
    rough = augment(x.bfloat16(), u, z, p)
    assert rough.dtype == torch.bfloat16
    torch.testing.assert_close(rough.float(), exact, rtol=0.05, atol=0.2)
    meta = [t.to("meta") for t in (x, u, z, p, torch.randn_like(x))]
    assert [g.shape for g in r1(augment, *meta)] == [x.shape, x.shape]


def test_p_follows_the_sign_of_the_logits():
    p = torch.tensor(0.5)
    assert adapt(p, torch.tensor(0.7), 0.6, 256) == pytest.approx(0.5 + 256 / 500_000)
    assert adapt(p, torch.tensor(0.5), 0.6, 256, kimg=100) == pytest.approx(0.5 - 256 / 100_000)
    assert adapt(p, torch.tensor(0.6), 0.6, 256) == 0.5
    assert adapt(torch.tensor(0.0), torch.tensor(-1.0), 0.6, 256) == 0
    assert adapt(torch.tensor(1.0), torch.tensor(1.0), 0.6, 256) == 1


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: make_augment("color,cutuot", False, 3), "'cutuot'.*choose from color, translation, cutout"),
        (lambda: make_augment("color", True, 3), "use one of them"),
        (lambda: make_augment("", True, 4), "got 4 channels"),
        (
            lambda: ADA(3)(torch.zeros(1, 4, 8, 8), torch.zeros(1, 21), torch.zeros(1, 7), ONE),
            "4 channels.*multiple of 3",
        ),
    ],
)
def test_what_is_impossible_says_why(build, message: str):
    with pytest.raises(ValueError, match=message):
        build()


def test_none_is_asked_for():
    assert make_augment("", False, 4) is None
