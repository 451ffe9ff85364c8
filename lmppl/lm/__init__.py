"""A language model as a batched density over token sequences."""

from lmppl.lm.model import LM, begin_draws

__all__ = ["LM", "begin_draws"]
