"""Training runs in experiment trackers (TensorBoard, Weights & Biases, ...), by accelerate's."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # accelerate is imported when a run is tracked
    from accelerate.tracking import GeneralTracker


@contextmanager
def tracker(
    log_with: Any,
    *,
    directory: str | os.PathLike[str] | None,
    name: str,
    config: Mapping[str, Any],
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Start trackers, and finish them when the block ends, however it ends.

    Args:
        log_with: None, the name of a tracker that accelerate knows (``"tensorboard"``,
            ``"wandb"``, ``"mlflow"``, ``"trackio"``, ...), an ``accelerate.tracking.GeneralTracker``
            object, or a list of these. An object is started and finished here too.
        directory: for trackers that write files.
        name: of the project (TensorBoard: a folder in ``directory``).
        config: what the run was asked to do; what is no number, string, bool or None is recorded
            as its ``str``.

    Yields:
        What records a step's figures: those that are finite numbers (``"step"`` is the axis).

    Raises:
        ValueError: for a name that accelerate does not know, one whose package is not installed, or
            one that needs a directory and has none.
    """
    trackers: list[GeneralTracker] = []

    def log(figures: Mapping[str, Any]) -> None:
        finite = {
            name: value
            for name, value in figures.items()
            if name != "step" and isinstance(value, (int, float)) and math.isfinite(value)
        }
        for one in trackers if finite else ():
            one.log(finite, step=figures["step"])

    if log_with is not None:
        from accelerate import PartialState

        wanted = log_with if isinstance(log_with, (list, tuple)) else [log_with]
        trackers = [_tracker(kind, directory, name) for kind in dict.fromkeys(wanted)]
        PartialState()  # which process this is: accelerate's trackers ask for it, and no more
    plain = {
        key: value if type(value) in (bool, int, float, str, type(None)) else str(value)
        for key, value in config.items()
    }
    with ExitStack() as stack:
        for one in trackers:
            one.start()
            stack.callback(one.finish)
            one.store_init_configuration(plain)
        yield log


def _tracker(kind: Any, directory: str | os.PathLike[str] | None, name: str) -> GeneralTracker:
    """A tracker by its name, or as it was given."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
    from accelerate.utils import LoggerType

    if isinstance(kind, GeneralTracker):
        return kind
    kind = str(kind) if isinstance(kind, LoggerType) else kind
    if not isinstance(kind, str) or kind not in LOGGER_TYPE_TO_CLASS:
        raise ValueError(
            f"log_with={kind!r}, allowed: {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}, an "
            "accelerate.tracking.GeneralTracker object, or a list of these"
        )
    # Kinds that the user registered with accelerate are in neither of its lists.
    if kind in LoggerType and LoggerType(kind) not in get_available_trackers():
        package = "lmppl-pyro[tracking]" if kind == "tensorboard" else kind
        raise ValueError(f"log_with={kind!r}: not installed: pip install {package}")
    made = LOGGER_TYPE_TO_CLASS[kind]
    if not made.requires_logging_directory:
        return made(name)
    if directory is None:
        raise ValueError(f"log_with={kind!r} writes files: say where (a directory)")
    return made(name, os.fspath(directory))
