"""Running many copies of one program side by side, batching their language-model calls."""

from lmppl.runtime.batching import (
    closing,
    complete,
    draw,
    fresh_seed,
    nth_seed,
    settle,
    slot_seeds,
    start,
)
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
from lmppl.runtime.scheduler import Member, advance, own_usage
from lmppl.runtime.weights import ess, log_mean_exp

__all__ = [
    "Given",
    "Member",
    "Particle",
    "Proposer",
    "Rejected",
    "ReplayError",
    "Wait",
    "advance",
    "closing",
    "complete",
    "draw",
    "ess",
    "fresh_seed",
    "is_latent",
    "log_mean_exp",
    "nth_seed",
    "own_usage",
    "settle",
    "site_log_weight",
    "slot_seeds",
    "start",
    "suspend",
]
