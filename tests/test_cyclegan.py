"""CycleGAN: against pytorch-CycleGAN's numbers, and what its pairs promise."""

from pathlib import Path

import torch
from golden_cases import Case, golden
from torch import Tensor, nn

from fastgan.convert import cyclegan_discriminator, cyclegan_generator
from fastgan.losses import LOSSES, gradient_penalty
from fastgan.models import cyclegan

CHECKPOINT = Path(__file__).parent / "golden" / "cyclegan_public0_latest_net_G_A.pth"


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def load(net: nn.Module, case: Case, convert) -> dict[str, Tensor]:
    """Fill `net` with the peer's tensors; its parameters by the peer's names."""
    state = case.group("in.param.")
    net.to(case.dtype).load_state_dict(convert(state), strict=True)
    ours = dict(net.named_parameters())
    return {f"param.{k}": ours[name] for k, name in zip(state, convert(state), strict=True)}


def generator(args: dict) -> cyclegan.ResNet:
    return cyclegan.ResNet(args["in"], args["ngf"], args["n_blocks"], None)


def discriminator(args: dict) -> cyclegan.PatchGAN:
    return cyclegan.PatchGAN(args["in"], args["ndf"], args["n_layers"], None)


@golden("cyclegan_nets", "cyclegan_G")
def test_generator(case: Case):
    net = generator(case.args)
    inputs = load(net, case, cyclegan_generator) | {"x": case.tensor("in.x").requires_grad_()}
    case.check_derivatives(net(inputs["x"]), inputs)


@golden("cyclegan_nets", "cyclegan_D")
def test_discriminator(case: Case):
    net = discriminator(case.args)
    inputs = load(net, case, cyclegan_discriminator) | {"x": case.tensor("in.x").requires_grad_()}
    case.check_derivatives(net(inputs["x"]), inputs)


@golden("cyclegan_losses", "cyclegan_ganloss")
def test_losses(case: Case):
    loss = LOSSES[
        {"lsgan": "least-squares", "vanilla": "non-saturating", "wgangp": "wasserstein"}[case.args["mode"]]
    ]
    pred = case.tensor("in.pred").requires_grad_()
    case.check_derivatives(torch.stack(loss.d(pred, pred)), {"pred": pred})
    case.check("out.y", torch.stack([loss.g(pred), loss.d(pred, pred)[1]]))  # G's is D's for reals, of fakes


@golden("cyclegan_losses", "wgangp_cyclegan")
def test_gradient_penalty_of_patches(case: Case):
    assert case.args["constant"] == 1
    net = discriminator(case.args)
    inputs = load(net, case, cyclegan_discriminator)
    alpha = case.tensor("in.alpha")[:, :, None, None]
    penalty = gradient_penalty(net, case.tensor("in.real"), case.tensor("in.fake"), alpha)
    case.check_derivatives(penalty * case.args["lambda_gp"], inputs)
