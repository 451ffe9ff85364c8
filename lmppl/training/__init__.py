"""How a guide, or the program itself, learns."""

from lmppl.training.lm_guide import LMGuide
from lmppl.training.options import FitOptions

__all__ = ["FitOptions", "LMGuide"]
