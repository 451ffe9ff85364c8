"""Programs and runs that several tests of particles use."""

from __future__ import annotations

from lmppl import lm_sample, runtime
from lmppl.runtime import Particle


def run(program, *args, seed: int = 0, **options) -> Particle:
    """A particle that has run to its end."""
    particle = Particle(program, args, seed=seed, **options)
    particle.resume()
    runtime.run_to_end([particle])
    return particle


def infill(x: str, y: str):
    z = lm_sample("z", x, max_tokens=3, stop=".")
    lm_sample("y", [x, z], obs=y)
    return z


def sites(*names):
    for name in names:
        lm_sample(name, "ab", max_tokens=1)
