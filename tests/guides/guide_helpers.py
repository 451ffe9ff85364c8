"""What the tests of guides share."""

import torch

import lmppl
from lmppl import runtime
from lmppl.guides.samples import Sample


def shaken(guide, seed=0, size=0.1):
    """The guide with random adapter weights, so that it is far from the prior."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)
    return guide


def draw_samples(guide, program, args, num, seed=0, **options):
    """Complete traces, as training draws them."""
    with lmppl.use(guide.base), torch.no_grad():
        particles = runtime.start(
            program,
            args,
            num,
            seed=seed,
            proposer=guide.proposer_factory(args, **options),
            closing=True,
        )
        with runtime.closing(particles):
            runtime.complete(particles)
    return [Sample.of(p, "guide") for p in particles]


def latent_ids(particle):
    """Token ids of every latent text."""
    return {name: node["fn"].token_ids(node["value"]) for name, node in particle.latents.items()}
