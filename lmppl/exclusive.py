"""One run at a time: threads of a process take turns.

Pyro's stack of handlers, torch's random stream and the caches of a language model belong to the
process. So whatever runs a program or a language model holds a lock, a re-entrant one. What runs on a
stack of its own, suspended and resumed, does not take it: whoever resumes it has it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from greenlet import getcurrent, greenlet

_LOCK = threading.RLock()


class Stack(greenlet):
    """A stack on which a run is suspended and resumed, by somebody who holds the lock."""


@contextmanager
def exclusive() -> Iterator[None]:
    """``with exclusive():`` no other thread runs a program or a language model. (Or a decorator.)"""
    if isinstance(getcurrent(), Stack):
        yield
    else:
        with _LOCK:
            yield
