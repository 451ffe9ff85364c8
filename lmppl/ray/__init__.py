"""Inference over many inputs by Ray Data: a row an input, on many processes and machines.

Needs Ray, ``pip install 'lmppl-pyro[ray]'``. Nothing else of lmppl imports this module.
"""

try:
    import pyarrow  # noqa: F401
    import ray.data  # noqa: F401
except ImportError as error:
    raise ImportError(
        "lmppl.ray needs Ray Data and pyarrow: pip install 'lmppl-pyro[ray]'"
    ) from error

from lmppl.ray.actor import Infer
from lmppl.ray.driver import run

__all__ = ["Infer", "run"]
