"""lmppl: probabilistic programming with language models, on Pyro."""

from lmppl import constraints
from lmppl.diagnostics.diagnose import Diagnosis, diagnose
from lmppl.distributions import LMText
from lmppl.engines import (
    MCMC,
    SMC,
    Engine,
    Exact,
    GFlowNet,
    Importance,
    RandomWalk,
    Redraw,
    Suffix,
    register_engine,
)
from lmppl.engines.dispatch import infer
from lmppl.engines.infer_batch import infer_batch
from lmppl.engines.infer_island import infer_island
from lmppl.lm import LM
from lmppl.lm.network.memory import Memory
from lmppl.lm.tokens.text import Text
from lmppl.posterior import Posterior, ZeroEvidenceError, pool
from lmppl.primitives import chat, lm_sample, require, tool, use
from lmppl.report.profiling import Profile, profile
from lmppl.runtime import ReplayError
from lmppl.training import losses
from lmppl.training.learn import learn
from lmppl.training.lm_guide import LMGuide

__version__ = "0.1.0"

__all__ = [
    "LM", "SMC", "Diagnosis", "Engine", "Exact", "GFlowNet", "Importance", "LMGuide", "LMText",
    "MCMC", "Memory", "Posterior", "Profile", "RandomWalk", "Redraw", "ReplayError", "Suffix", "Text",
    "ZeroEvidenceError", "chat", "constraints", "diagnose", "infer", "infer_batch", "infer_island",
    "learn", "lm_sample", "losses", "pool", "profile", "register_engine", "require", "tool", "use",
]  # fmt: skip
