"""What every engine returns."""

from lmppl.posterior.posterior import Posterior, ZeroEvidenceError

__all__ = ["Posterior", "ZeroEvidenceError"]
