"""GAN, conditional GAN, DCGAN with labels, norms and 28 pixels, WGAN and WGAN-GP: against their own layers
run one by one by PyTorch, to second order, and against the public implementations' parameter counts."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastgan.layers import run_layers
from fastgan.losses import gradient_penalty, gradient_square, leaf, non_saturating_g
from fastgan.models import cgan, dcgan, gan, wgan, wgan_gp

CLASSES = 3
BACKEND = "aot_eager"  # traces as "inductor" does, and is quick


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def labels(count: int) -> Tensor:
    return torch.eye(CLASSES, dtype=torch.float64)[torch.arange(count) % CLASSES]


# name -> (generator, discriminator), tiny ones for 8x8 pixels and 2 channels
TINY: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "gan": (
        lambda: gan.Generator(5, 0, 8, 2, ngf=2),
        lambda: gan.Discriminator(0, 8, 2, ndf=2, dropout=0.0),
    ),
    "cgan": (
        lambda: cgan.Generator(5, CLASSES, 8, 2, ngf=2),
        lambda: cgan.Discriminator(CLASSES, 8, 2, ndf=2, dropout=0.0),
    ),
    "dcgan": (
        lambda: dcgan.Generator(5, 4, 2, 8, c_dim=CLASSES),
        lambda: dcgan.Discriminator(4, 2, 8, c_dim=CLASSES),
    ),
    "dcgan, 3 blocks, layer norm": (
        lambda: dcgan.Generator(5, 2, 2, 13, blocks=3),
        lambda: dcgan.Discriminator(2, 2, 13, blocks=3, norm="layer"),
    ),
    "dcgan, 3 blocks, kernel 5, instance norm": (
        lambda: dcgan.Generator(5, 2, 2, 13, 5, blocks=3),
        lambda: dcgan.Discriminator(2, 2, 13, 5, blocks=3, norm="instance"),
    ),
    "wgan": (
        lambda: wgan.Generator(5, 0, 16, 2, ngf=4),
        lambda: wgan.Discriminator(0, 16, 2, ndf=4),
    ),
    "wgan, mlp": (
        lambda: wgan.Generator(5, 0, 8, 2, ngf=1, body="mlp"),
        lambda: wgan.Discriminator(0, 8, 2, ndf=1, body="mlp"),
    ),
    "wgan-gp": (
        lambda: wgan_gp.Generator(5, CLASSES, 16, 2, ngf=4),
        lambda: wgan_gp.Discriminator(CLASSES, 16, 2, ndf=4),
    ),
    "wgan-gp, dcgan": (
        lambda: wgan_gp.Generator(5, CLASSES, 16, 2, ngf=4, body="dcgan"),
        lambda: wgan_gp.Discriminator(CLASSES, 16, 2, ndf=4, body="dcgan"),
    ),
    "wgan-gp, mlp": (
        lambda: wgan_gp.Generator(5, CLASSES, 8, 2, ngf=1, body="mlp"),
        lambda: wgan_gp.Discriminator(CLASSES, 8, 2, ndf=1, body="mlp"),
    ),
}
families = pytest.mark.parametrize("family", TINY)


def build(family: str) -> tuple[Any, Any]:
    """In float64, with weights large enough for second derivatives to matter."""
    torch.manual_seed(0)
    networks = tuple(make().double() for make in TINY[family])
    for net in networks:
        for p in net.parameters():
            p.data.normal_(0.0 if p.ndim > 1 else 0.5, 0.5)
    return networks[0], networks[1]


def plain_generator(G: nn.Module, z: Tensor, c: Tensor) -> Tensor:
    z = torch.cat([z, c], dim=1) if G.c_dim else z
    if isinstance(G, gan.Generator):
        return G.main(z).reshape(len(z), *G.shape)
    if isinstance(G, dcgan.Generator):
        return G.main(z[:, :, None, None])
    assert isinstance(G, wgan_gp.ResidualGenerator)
    x = G.input(z).reshape(len(z), -1, G.start, G.start)
    for block in G.blocks:
        assert isinstance(block, wgan_gp.UpBlock)
        up = nn.Upsample(scale_factor=2)
        y = block.conv1(up(F.relu(block.norm1(x))))
        x = block.shortcut(up(x)) + block.conv2(F.relu(block.norm2(y)))
    return torch.tanh(G.output(F.relu(G.norm(x))))


def plain_discriminator(D: nn.Module, img: Tensor, c: Tensor) -> Tensor:
    if isinstance(D, gan.Discriminator):
        return D.main(torch.cat([img.flatten(1), c], dim=1) if D.c_dim else img.flatten(1))
    if isinstance(D, dcgan.Discriminator):
        features = D.main[:-1](img)
        logits = D.main[-1](features).flatten(1)
    else:
        assert isinstance(D, wgan_gp.ResidualCritic)
        for block in D.blocks:
            assert isinstance(block, wgan_gp.CriticBlock)
            y = block.conv2(F.relu(block.conv1(img if block.first else F.relu(img))))
            y = F.avg_pool2d(y, 2) if block.halve else y
            if block.shortcut is not None:
                img = F.avg_pool2d(block.shortcut(img), 2)
            img = img + y
        features = F.relu(img).mean(dim=(2, 3))
        logits = D.output(features)
    if D.embed is not None:
        logits = logits + (D.embed(c.argmax(dim=1)) * features.flatten(1)).sum(dim=1, keepdim=True)
    return logits


def to_second_order(y: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """y, its gradients for a random cotangent, and the gradients of their squared norm."""
    r = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1)).requires_grad_()
    first = torch.autograd.grad((y * r).sum(), inputs, create_graph=True)
    norm = sum(g.square().sum() for g in first)
    assert isinstance(norm, Tensor)
    second = torch.autograd.grad(norm, [*inputs, r], allow_unused=True, materialize_grads=True)
    return [y, *first, *second]


@families
@pytest.mark.parametrize("training", [True, False])
def test_fused_networks_are_their_layers_in_a_row(family: str, training: bool):
    z, c = torch.randn(5, 5, dtype=torch.float64), labels(5)
    for i, plain in enumerate((plain_generator, plain_discriminator)):
        ours, theirs = build(family)[i], build(family)[i]
        x = z if i == 0 else torch.randn_like(build(family)[0](z, c))
        ours.train(training)
        theirs.train(training)
        x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
        mine = to_second_order(ours(x1, c), [x1, *ours.parameters()])
        expected = to_second_order(plain(theirs, x2, c), [x2, *theirs.parameters()])
        for a, b in zip(mine, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-8 * max(b.abs().max().item(), 1))
        for (name, a), b in zip(ours.named_buffers(), theirs.buffers(), strict=True):
            torch.testing.assert_close(a, b, msg=name)


def test_normalisation_without_an_activation():
    x = torch.randn(3, 2, 6, 6, dtype=torch.float64)
    for norm in (nn.BatchNorm2d(4), nn.InstanceNorm2d(4, affine=True), nn.GroupNorm(1, 4)):
        layers = nn.Sequential(nn.Conv2d(2, 4, 3), norm).double()
        torch.testing.assert_close(run_layers(layers, x, None), layers(x))
    layers = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)).double()
    torch.testing.assert_close(run_layers(layers, x[:, 0, 0], None), layers(x[:, 0, 0]))


def test_parameter_counts():
    # PyTorch-GAN gan.py, wgan.py and wgan_gp.py (the same perceptrons), 28x28x1, latent_dim 100
    assert parameters(gan.Generator()) == 1_510_032
    assert parameters(gan.Discriminator()) == 533_505
    # PyTorch-GAN cgan.py, but for its 10x10 embeddings, for which one-hot labels stand here
    assert parameters(cgan.Generator()) == 1_511_412 - 100
    assert parameters(cgan.Discriminator()) == 533_505 + 10 * 512
    assert parameters(gan.Discriminator(10, widths=[512] * 3)) == 932_965 - 100
    # pytorch/examples dcgan; WassersteinGAN's dcgan.py has the same layers without extra ones
    assert parameters(wgan.Generator()) == 3_576_704
    assert parameters(wgan.Discriminator()) == 2_765_568
    # WassersteinGAN's mlp.py, 64x64x3
    assert parameters(wgan.Generator(body="mlp")) == 6_880_768
    assert parameters(wgan.Discriminator(body="mlp")) == 6_817_793
    # improved_wgan_training's gan_cifar_resnet.py without labels, 32x32x3
    assert parameters(wgan_gp.Generator()) == 1_204_483
    assert parameters(wgan_gp.Discriminator()) == 1_053_825
    # the 28-pixel variant, layer by layer: BatchNorm's two vectors, 4x4 kernels, 2x2 ends
    widths = [1024, 512, 256, 128]
    pairs = sum(16 * a * b for a, b in itertools.pairwise(widths)) + 16 * 128 * 3
    G = dcgan.Generator(100, 128, 3, 28, blocks=4)
    D = dcgan.Discriminator(128, 3, 28, dropout=0.3, blocks=4)
    assert parameters(G) == 4 * 100 * 1024 + pairs + 2 * sum(widths)
    assert parameters(D) == pairs + 2 * sum(widths[:-1]) + 4 * 1024


def test_the_28_pixel_variant_goes_through_2_4_7_14_pixels():
    G = dcgan.Generator(10, 4, 3, 28, blocks=4)
    x, shapes = torch.randn(2, 10, 1, 1), []
    for layer in G.main:
        x = layer(x)
        if isinstance(layer, nn.ConvTranspose2d):
            shapes.append((x.shape[1], x.shape[2]))
    assert shapes == [(32, 2), (16, 4), (8, 7), (4, 14), (3, 28)]
    D = dcgan.Discriminator(4, 3, 28, dropout=0.3, blocks=4)
    assert D.features(x).shape == (2, 32, 2, 2)
    assert sum(isinstance(m, nn.Dropout) for m in D.modules()) == 4


@pytest.mark.parametrize(("resolution", "channels"), [(1, 1), (9, 4), (32, 3)])
def test_perceptrons_take_any_resolution(resolution: int, channels: int):
    G, D = gan.Generator(4, 0, resolution, channels, 1), gan.Discriminator(0, resolution, channels, 1)
    images, latents = G.sample(torch.randn(3, G.normals), torch.rand(3, G.uniforms))
    assert images.shape == (3, channels, resolution, resolution) and images.abs().max() <= 1
    assert latents.shape == (3, 4) and D(images).shape == (3, 1)


@pytest.mark.parametrize("resolution", [8, 14, 32, 64])
def test_residual_networks_take_4_or_7_times_a_power_of_two(resolution: int):
    G, D = wgan_gp.Generator(6, 0, resolution, 1, 2), wgan_gp.Discriminator(0, resolution, 1, 2)
    images = G(torch.randn(2, 6))
    assert images.shape == (2, 1, resolution, resolution) and D(images).shape == (2, 1)


@families
def test_heads_finish_what_features_begin(family: str):
    G, D = (net.eval() for net in build(family))
    c = labels(4)
    images = G(torch.randn(4, 5, dtype=torch.float64), c)
    features = D.features(images, c)
    assert features.shape[0] == 4 and torch.equal(D.head(features, c), D(images, c))


@families
def test_labels_are_asked_for_and_matter(family: str):
    G, D = (net.eval() for net in build(family))
    z, c = torch.randn(3, 5, dtype=torch.float64), labels(3)
    images = G(z, c)
    if not G.c_dim:
        assert torch.equal(G(z), images) and torch.equal(D(images), D(images, c))
        return
    for net, x in ((G, z), (D, images)):
        assert not torch.allclose(net(x, c.roll(1, 0)), net(x, c))
        with pytest.raises(ValueError, match=r"c must be given.*\[N, 3\]"):
            net(x)


@pytest.mark.parametrize("family", [name for name in TINY if name.startswith("wgan-gp") or "norm" in name])
def test_a_penalized_critic_sees_each_image_alone(family: str):
    G, D = build(family)
    images, c = torch.randn_like(G(torch.randn(4, 5, dtype=torch.float64), labels(4))), labels(4)
    assert not any(isinstance(m, _BatchNorm) for m in D.modules())
    torch.testing.assert_close(D(images, c)[:1], D(images[:1], c[:1]))
    assert not torch.allclose(D(images, c), D(2 * images, c))  # and its contrast


def d_loss(D: nn.Module, real: Tensor, fake: Tensor, alpha: Tensor, c: Tensor) -> list[Tensor]:
    real = leaf(real)
    logits = D(real, c)
    loss = F.softplus(-logits).mean() + F.softplus(D(fake, c)).mean() + gradient_square(logits, real)
    loss = loss + gradient_penalty(lambda x: D(x, c), real, fake, alpha)
    grads = torch.autograd.grad(loss, list(D.parameters()), allow_unused=True, materialize_grads=True)
    return [loss.detach(), *(g.detach() for g in grads)]


def g_loss(G: Any, D: Any, normal: Tensor, uniform: Tensor, c: Tensor) -> list[Tensor]:
    loss = non_saturating_g(D(G.sample(normal, uniform, c)[0], c))
    return [loss.detach(), *(g.detach() for g in torch.autograd.grad(loss, list(G.parameters())))]


@families
@torch._dynamo.config.patch(trace_autograd_ops=True)
def test_compiled_gradients_are_the_eager_ones(family: str):
    torch._dynamo.reset()
    c, alpha = labels(4), torch.rand(4, 1, 1, 1, dtype=torch.float64)
    normal, uniform = torch.randn(4, 5, dtype=torch.float64), torch.empty(4, 0, dtype=torch.float64)
    results = []
    for compiled in (False, True):
        G, D = build(family)
        fake = G(normal, c).detach()
        real = torch.randn(fake.shape, dtype=fake.dtype, generator=torch.Generator().manual_seed(2))
        d, g = d_loss, g_loss
        if compiled:
            d, g = (torch.compile(f, fullgraph=True, dynamic=False, backend=BACKEND) for f in (d, g))
        mine = d(D, real, fake, alpha, c) + g(G, D, normal, uniform, c)
        results.append([*mine, *G.buffers(), *D.buffers()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@families
def test_bf16_leaves_weights_images_and_logits_in_fp32(family: str):
    G, D = (net.float() for net in build(family))
    z, c = torch.randn(6, 5), labels(6).float()
    exact = G(z, c), D(torch.randn_like(G(z, c)), c)
    for net in (G, D):
        net.dtype = torch.bfloat16
    images = G(z, c)
    assert images.dtype == torch.float32 and D(images, c).dtype == torch.float32
    assert (images - exact[0]).abs().mean() < 0.05
    (grad,) = torch.autograd.grad(D(images, c).sum(), next(G.parameters()))
    assert grad.dtype == torch.float32


def test_dropout_and_instance_noise_stop_in_evaluation():
    img = torch.randn(4, 1, 8, 8)
    for D in (
        gan.Discriminator(0, 8, 1, 2, dropout=0.5),
        gan.Discriminator(0, 8, 1, 2, dropout=0.0, instance_noise=0.3),
        wgan_gp.Discriminator(0, 8, 1, 2, instance_noise=0.3),
    ):
        assert not torch.equal(D(img), D(img))
        D.eval()
        assert torch.equal(D(img), D(img))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cgan.Generator(c_dim=0), "c_dim must be the number of classes.*0"),
        (lambda: cgan.Discriminator(c_dim=0), "c_dim must be the number of classes.*0"),
        (lambda: dcgan.Discriminator(norm="group"), "norm must be one of batch, layer.*group"),
        (lambda: dcgan.Generator(resolution=28, blocks=5), "blocks 5 halves resolution 28 below 2"),
        (lambda: wgan.Generator(body="resnet"), "body must be dcgan or mlp: got 'resnet'"),
        (lambda: wgan.Discriminator(body="resnet"), "body must be dcgan or mlp: got 'resnet'"),
        (lambda: wgan_gp.Generator(body="cnn"), "body must be resnet, dcgan or mlp: got 'cnn'"),
        (lambda: wgan_gp.Discriminator(norm="batch"), "norm batch mixes the images"),
        (lambda: wgan_gp.Discriminator(norm="layer"), "norm layer is for body dcgan"),
        (lambda: wgan_gp.Generator(resolution=24), "4 or 7 times a power of two.*24"),
    ],
)
def test_what_cannot_be_built_says_why(make: Callable[[], nn.Module], message: str):
    with pytest.raises(ValueError, match=message):
        make()
