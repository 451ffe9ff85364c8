"""The circumstances of a run: machine, versions, threads, date, revision."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.measuring import memory_method
from lmppl.report.machine import machine

PACKAGES = ("lmppl-pyro", "torch", "transformers", "peft")
ROOT = Path(__file__).parent.parent


def circumstances(lm: Any, mode: str, repeats: int) -> dict[str, Any]:
    """All that a reader needs in order to judge a result, or to repeat it."""
    return {
        "mode": mode,
        "repeats": repeats,
        "model": lm.name,
        "dtype": str(lm.dtype).removeprefix("torch."),
        "device": lm.device.type,
        "machine": machine(lm.device),
        "threads": torch.get_num_threads(),
        "load": _load(),
        "memory": memory_method(lm.device),
        "python": platform.python_version(),
        "versions": {package: metadata.version(package) for package in PACKAGES},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "revision": revision(),
    }


def revision() -> str:
    """The commit that is checked out, with ``+`` if files differ from it; "" outside git."""
    changed = _git(ROOT, "status", "--porcelain", "--", ".", ":!benchmarks/results", ":!docs")
    return commit_of(ROOT) + ("+" if changed else "")


def commit_of(checkout: Path) -> str:
    """The commit of a checkout, abbreviated; "" if it is none."""
    return _git(checkout, "rev-parse", "--short=12", "HEAD")


def _git(folder: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _load() -> float | None:
    """Processes that wanted to run in the last minute: far above 1 means a busy machine."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
