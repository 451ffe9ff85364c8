"""How good an answer is."""

from lmppl.diagnostics.diagnose import Diagnosis, diagnose
from lmppl.diagnostics.diversity import TextDiversity
from lmppl.runtime.mismatch import Mismatch

__all__ = ["Diagnosis", "Mismatch", "TextDiversity", "diagnose"]
