"""How good an answer is."""

from lmppl.diagnostics.diagnose import Diagnosis, diagnose
from lmppl.diagnostics.diversity import TextDiversity

__all__ = ["Diagnosis", "TextDiversity", "diagnose"]
