"""The families, one paper a file.

Each has a Generator and a Discriminator. What the engine asks of a Generator:

    z_dim               dimensions of its latent
    normals, uniforms   how many unit normal and uniform numbers a training sample takes
    sample(normal [N, normals], uniform [N, uniforms]) -> (images [N, C, R, R], latents behind them)
    forward(z [N, z_dim]) -> images in about -1..1

and of a Discriminator:

    forward(images) -> logits
"""

from fastgan.models import dcgan, stylegan

Generator = dcgan.Generator | stylegan.Generator
Discriminator = dcgan.Discriminator | stylegan.Discriminator
