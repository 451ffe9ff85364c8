"""lmppl: probabilistic programming with language models, on Pyro."""

from lmppl._infer import infer
from lmppl._infer_batch import infer_batch
from lmppl.diagnostics import Diagnosis, diagnose
from lmppl.distributions import LMText
from lmppl.engines import SMC, Engine, Exact, GFlowNet, Importance, register_engine
from lmppl.guides import LMGuide
from lmppl.guides.learning import learn
from lmppl.lm import LM
from lmppl.lm.memory import Memory
from lmppl.posterior import Posterior, ZeroEvidenceError
from lmppl.primitives import chat, lm_sample, require, tool, use
from lmppl.profiling import Profile, profile
from lmppl.runtime import ReplayError
from lmppl.text import Text

__version__ = "0.1.0"

__all__ = [
    "LM",
    "SMC",
    "Diagnosis",
    "Engine",
    "Exact",
    "GFlowNet",
    "Importance",
    "LMGuide",
    "LMText",
    "Memory",
    "Posterior",
    "Profile",
    "ReplayError",
    "Text",
    "ZeroEvidenceError",
    "chat",
    "diagnose",
    "infer",
    "infer_batch",
    "learn",
    "lm_sample",
    "profile",
    "register_engine",
    "require",
    "tool",
    "use",
]
