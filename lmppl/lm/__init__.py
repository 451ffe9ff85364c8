"""A language model as a batched density over token sequences."""

from lmppl.lm.model import LM

__all__ = ["LM"]
