"""Inputs of tasks, and what is wrong with them."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import lmppl


class BadInput(Exception):
    """A file, prompt or package that the user can put right; the message says how."""


def lines_of(path: Path) -> list[str]:
    """The lines of a text file; see ``numbered_lines``."""
    return [line for _, line in numbered_lines(path)]


def numbered_lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a text file that are not blank, without spaces around them, and their numbers.

    Raises:
        BadInput: if there is no such file, it is no text, or it has no such line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is no text in UTF-8, see byte {error.start}") from error
    numbered = enumerate(text.split("\n"), 1)
    lines = [(number, line.strip()) for number, line in numbered if line.strip()]
    if not lines:
        raise BadInput(f"{path} has no line of text: give one input a line")
    return lines


def check_fits(lm: lmppl.LM, prompts: Sequence[str], max_tokens: int) -> None:
    """Check that so many tokens can follow each prompt.

    Raises:
        BadInput: for a prompt that is empty, or that with them exceeds the model's context.
    """
    for number, prompt in enumerate(prompts, 1):
        if not prompt.strip():
            raise BadInput(f"prompt {number} of {len(prompts)} is empty")
        tokens, context = len(lm.encode(prompt.rstrip())), lm.context_length
        if context is not None and tokens + max_tokens > context:
            raise BadInput(
                f"prompt {number} of {len(prompts)} ({prompt[:40]!r}...) has {tokens:,} tokens: with "
                f"{max_tokens} more it does not fit the context of {lm.name!r}, {context:,} tokens. "
                "Shorten it"
            )


def split(items: Sequence[Any], held_out: int, what: str) -> tuple[list[Any], list[Any]]:
    """What is trained on, and the last ``held_out``, which are not.

    Raises:
        BadInput: if nothing is left to train on; ``what`` has the items.
    """
    if len(items) <= held_out:
        raise BadInput(
            f"{what} has {len(items)} inputs, and the last {held_out} are held out, so none is left to "
            "train on: give more, or a smaller --held-out"
        )
    return list(items[:-held_out]), list(items[-held_out:])


def package(name: str, requirement: str, purpose: str) -> ModuleType:
    """Import an optional package; ``requirement`` is what pip calls it.

    Raises:
        BadInput: if it is not installed; says how to install it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise BadInput(f"{purpose} needs {name}: pip install '{requirement}'") from error
