"""What every engine returns."""

from lmppl.posterior.pooling import pool
from lmppl.posterior.posterior import Posterior
from lmppl.posterior.weighted import ZeroEvidenceError

__all__ = ["Posterior", "ZeroEvidenceError", "pool"]
