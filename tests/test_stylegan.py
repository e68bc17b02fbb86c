"""StyleGAN2 with labels, and with the weights of rosinality/stylegan2-pytorch."""

import pytest
import torch
from golden_cases import Case, golden
from torch import Tensor, nn

from fastgan.losses import leaf
from fastgan.models import stylegan
from fastgan.public import rosinality_discriminator, rosinality_generator


def peer_inputs(case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(all inputs, the peer's state dict), of the same tensors."""
    inputs = {k: v.requires_grad_() for k, v in case.group("in.").items()}
    return inputs, {k.removeprefix("param."): v for k, v in inputs.items() if k.startswith("param.")}


@golden("rosinality_nets", "rosi_G")
def test_rosinality_generator(case: Case):
    a = case.args
    inputs, peer = peer_inputs(case)
    state = rosinality_generator(peer, inputs["mean_latent"])
    G = stylegan.Generator(
        a["style_dim"], 0, a["style_dim"], a["size"], 3, a["n_mlp"], 4096, a["ch"]
    ).double()
    G.load_state_dict(state)
    case.check("out.latents", G.mapping(inputs["z"]))
    case.check("out.image_psi07", G(inputs["z"], truncation=0.7))
    case.check_derivatives(torch.func.functional_call(G, state, inputs["z"]), inputs)


@golden("rosinality_nets", "rosi_D")
def test_rosinality_discriminator(case: Case):
    a = case.args
    inputs, peer = peer_inputs(case)
    state = rosinality_discriminator(peer)
    D = stylegan.Discriminator(0, a["size"], 3, 4096, a["ch"]).double()
    D.load_state_dict(state)
    case.check_derivatives(torch.func.functional_call(D, state, inputs["x"]), inputs)


def conditional() -> tuple[stylegan.Generator, stylegan.Discriminator]:
    torch.manual_seed(0)
    G = stylegan.Generator(5, 3, 4, 8, 3, 2, 64, 6).double()
    return G, stylegan.Discriminator(3, 8, 3, 64, 6, mapping_layers=2).double()


def test_labels_matter_and_must_be_given():
    G, D = conditional()
    c = torch.eye(3).double()[[0, 1, 2, 0]]
    normal, uniform = torch.randn(4, G.normals).double(), torch.rand(4, G.uniforms).double()
    images, ws = G.sample(normal, uniform, c)
    others, other_ws = G.sample(normal, uniform, c.roll(1, 0))
    assert not torch.allclose(images, others) and not torch.allclose(ws, other_ws)
    assert not torch.allclose(G(normal[:, :5], c), G(normal[:, :5], c.roll(1, 0)))
    logits = D(images, c)
    assert logits.shape == (4, 1) and not torch.allclose(logits, D(images, c.roll(1, 0)))
    for wrong in (lambda: G(normal[:, :5]), lambda: G.sample(normal, uniform), lambda: D(images)):
        with pytest.raises(ValueError, match=r"c must be given .*\[N, 3\]"):
            wrong()


def test_mixed_styles_are_of_one_label():
    G, _ = conditional()
    c = torch.eye(3).double()[[0, 1]]
    normal = torch.randn(2, G.normals).double()
    _, ws = G.sample(normal, torch.tensor([[0.0, 0.0], [0.0, 0.99]]).double(), c)
    torch.testing.assert_close(ws[:, 0], G.mapping(normal[:, :5], c)[:, 0])
    torch.testing.assert_close(ws[:, -1], G.mapping(normal[:, 5:10], c)[:, -1])


@pytest.mark.parametrize("architecture", stylegan.ARCHITECTURES)
def test_a_discriminator_is_its_head_behind_its_features(architecture: str):
    D = stylegan.Discriminator(0, 16, 3, 64, 6, architecture)
    seen = []
    D.b4.out.register_forward_hook(lambda layer, args, y: seen.append((args[0], y)))
    images = torch.randn(4, 3, 16, 16)
    logits = D(images)
    features, scores = seen[0]
    assert torch.equal(D.features(images), features) and features.shape == (4, 6)
    assert torch.equal(D.head(features), logits) and torch.equal(scores, logits)


def gradients(net: nn.Module, images: Tensor, c: Tensor) -> list[Tensor]:
    images = leaf(images)
    logits = net(images, c)
    (grad,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return [
        g.detach()
        for g in torch.autograd.grad(
            grad.square().sum() + logits.sum(), list(net.parameters()), materialize_grads=True
        )
    ]


def test_compiled_conditional_gradients_equal_eager_ones():
    torch._dynamo.reset()
    _, D = conditional()
    args = D, torch.randn(4, 3, 8, 8).double(), torch.eye(3).double()[[0, 1, 2, 0]]
    compiled = torch.compile(gradients, fullgraph=True, dynamic=False, backend="aot_eager")
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        for ours, exact in zip(compiled(*args), gradients(*args), strict=True):
            torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-12)
