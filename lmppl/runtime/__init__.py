"""Running many copies of one program side by side, batching their language-model calls."""

from lmppl.runtime.batching import (
    ending,
    fresh_seed,
    nth_seed,
    rare_collections,
    resume,
    run_to_draws,
    run_to_end,
    serve_draws,
    slot_seeds,
    start,
)
from lmppl.runtime.coroutine import suspend
from lmppl.runtime.particle import Given, Particle, Proposer, ProposerFactory
from lmppl.runtime.replay import Replay, ReplayError
from lmppl.runtime.scheduler import Member, advance, own_usage, run_members
from lmppl.runtime.sites import is_latent, latents_of
from lmppl.runtime.waits import ChoiceWait, DrawWait, HiddenWait, ModelWait, ScoreWait, Wait
from lmppl.runtime.weights import ess, log_mean_exp

__all__ = [
    "ChoiceWait", "DrawWait", "Given", "HiddenWait", "Member", "ModelWait", "Particle",
    "Proposer", "ProposerFactory", "Replay", "ReplayError", "ScoreWait", "Wait", "advance",
    "ending", "ess", "fresh_seed", "is_latent", "latents_of", "log_mean_exp", "nth_seed",
    "own_usage", "rare_collections", "resume", "run_members", "run_to_draws", "run_to_end",
    "serve_draws", "slot_seeds", "start", "suspend",
]  # fmt: skip
