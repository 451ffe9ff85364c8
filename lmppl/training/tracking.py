"""Training runs in experiment trackers (TensorBoard, Weights & Biases, ...), by accelerate's."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # accelerate is imported when a run is tracked
    from accelerate.tracking import GeneralTracker


class Tracker:
    """Trackers that were started, as one."""

    def __init__(self, trackers: Sequence[GeneralTracker]) -> None:
        self._trackers = trackers

    def log(self, figures: Mapping[str, Any], step: int) -> None:
        """Record a step's figures: those that are finite numbers (``"step"`` is the axis)."""
        finite = {
            name: value
            for name, value in figures.items()
            if name != "step" and isinstance(value, (int, float)) and math.isfinite(value)
        }
        for each in self._trackers if finite else ():
            each.log(finite, step=step)


@contextmanager
def tracker(
    log_with: Any,
    *,
    directory: str | os.PathLike[str] | None,
    name: str,
    config: Mapping[str, Any],
) -> Iterator[Tracker]:
    """Start trackers, and finish them when the block ends, however it ends.

    Args:
        log_with: None, the name of a tracker that accelerate knows (``"tensorboard"``,
            ``"wandb"``, ``"mlflow"``, ``"trackio"``, ...), an ``accelerate.tracking.GeneralTracker``
            object, or a list of these. An object is started and finished here too.
        directory: for trackers that write files.
        name: of the project (TensorBoard: a folder in ``directory``).
        config: what the run was asked to do; what is no number, string, bool or None is recorded
            as its ``str``.

    Raises:
        ValueError: for a name that accelerate does not know, one whose package is not installed, or
            one that needs a directory and has none.
    """
    chosen = _chosen(log_with, directory, name)
    if chosen:
        from accelerate import PartialState

        PartialState()  # which process this is: accelerate's trackers ask for it, and no more
    plain = {key: _plain(value) for key, value in config.items()}
    with ExitStack() as stack:
        for each in chosen:
            each.start()
            stack.callback(each.finish)
            each.store_init_configuration(plain)
        yield Tracker(chosen)


def _chosen(
    log_with: Any, directory: str | os.PathLike[str] | None, name: str
) -> list[GeneralTracker]:
    if log_with is None:
        return []
    from accelerate.tracking import GeneralTracker

    wanted = log_with if isinstance(log_with, (list, tuple)) else [log_with]
    return [
        each if isinstance(each, GeneralTracker) else _made(each, directory, name)
        for each in dict.fromkeys(wanted)
    ]


def _made(kind: Any, directory: str | os.PathLike[str] | None, name: str) -> GeneralTracker:
    """A tracker by its name."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
    from accelerate.utils import LoggerType

    kind = str(kind) if isinstance(kind, LoggerType) else kind
    if not isinstance(kind, str) or kind not in LOGGER_TYPE_TO_CLASS:
        raise ValueError(
            f"log_with={kind!r}, allowed: {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}, an "
            "accelerate.tracking.GeneralTracker object, or a list of these"
        )
    # Kinds that the user registered with accelerate are in neither of its lists.
    missing = kind in LoggerType and LoggerType(kind) not in get_available_trackers()
    if missing:
        package = "lmppl[tracking]" if kind == "tensorboard" else kind
        raise ValueError(f"log_with={kind!r}: not installed: pip install {package}")
    made = LOGGER_TYPE_TO_CLASS[kind]
    if not made.requires_logging_directory:
        return made(name)
    if directory is None:
        raise ValueError(f"log_with={kind!r} writes files: say where (a directory)")
    return made(name, os.fspath(directory))


def _plain(value: Any) -> Any:
    return value if type(value) in (bool, int, float, str, type(None)) else str(value)
