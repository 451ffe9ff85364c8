"""What the tests of guides share."""

import torch

import lmppl
from lmppl import lm_sample, runtime
from lmppl.testing import tiny_lm
from lmppl.training.samples import Sample

LM = tiny_lm("ab.", seed=0)
QUICK = {"batch_size": 8, "progress": False, "seed": 0}


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
            score_closing=True,
        )
        with runtime.ending(particles):
            runtime.run_to_end(particles)
    return [Sample.of(p, "guide") for p in particles]


def latent_ids(particle):
    """Token ids of every latent text."""
    return {name: node["fn"].token_ids(node["value"]) for name, node in particle.latents.items()}


def latent_values(sample):
    """The numbers of every latent of a sample: equal for equal traces."""
    latents = sample.particle.latents
    return {name: node["value"].reshape(-1).tolist() for name, node in latents.items()}


def infill(x, y=None):
    z = lm_sample("z", x, max_tokens=2, stop=".")
    lm_sample("y", [x, z], max_tokens=2, obs=y)
    return z


def new_guide(program=infill, **options):
    return lmppl.LMGuide(program, lm=LM, **options)


def weights(guide):
    return {name: p.detach().clone() for name, p in guide.named_parameters().items()}


def equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
