"""Running many copies of one program side by side, batching their language-model calls."""

from lmppl.runtime.coroutine import suspend
from lmppl.runtime.particle import (
    Given,
    Particle,
    Proposer,
    Rejected,
    ReplayError,
    Wait,
    is_latent,
    site_log_weight,
)
from lmppl.runtime.serving import (
    closing,
    complete,
    draw,
    fresh_seed,
    settle,
    slot_seeds,
    start,
)

__all__ = [
    "Given",
    "Particle",
    "Proposer",
    "Rejected",
    "ReplayError",
    "Wait",
    "closing",
    "complete",
    "draw",
    "fresh_seed",
    "is_latent",
    "settle",
    "site_log_weight",
    "slot_seeds",
    "start",
    "suspend",
]
