"""Guides: distributions over a program's latent sites that stand in for its posterior."""

from lmppl.guides.program import proposer_factory

__all__ = ["proposer_factory"]
