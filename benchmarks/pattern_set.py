"""The pattern-matching task of genlm-eval: its patterns, its prompt, and what matches.

Data: ``assets/pattern_matching/patterns.csv`` of https://github.com/genlm/genlm-eval (Apache-2.0), one
column ``regex``, 454 patterns (Lipkin et al., 2025, arXiv 2504.05410, appendix I). As there, a text
matches if all of it does and its characters are those of ``string.printable``.

This module needs neither lmppl nor genlm-control, so that both sides use it.
"""

from __future__ import annotations

import csv
import re._constants as sre  # type: ignore[import-not-found]
import re._parser as parser  # type: ignore[import-not-found]
import string
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import regex

PRINTABLE = frozenset(string.printable)

SYSTEM = (
    "You are a helpful assistant that generates strings matching regular expressions. "
    "Only output the exact string that matches the regex pattern, nothing more."
)
EXAMPLES = [("(ab)+", "ab"), ("(ab|cd)+", "cd"), ("[a-z]+", "hello")]


def read(path: Path) -> list[str]:
    """The patterns of a CSV file with a column ``regex``.

    Raises:
        ValueError: there is none.
    """
    with path.open(newline="") as file:
        rows = csv.DictReader(file)
        if "regex" not in (rows.fieldnames or ()):
            raise ValueError(
                f"{path} has no column 'regex': give genlm-eval's "
                "assets/pattern_matching/patterns.csv"
            )
        return [row["regex"] for row in rows]


def messages(pattern: str) -> list[dict[str, str]]:
    """genlm-eval's prompt for a chat model: its instruction, its three examples, the pattern."""
    turns = [{"role": "system", "content": SYSTEM}]
    for user, assistant in [*EXAMPLES, (pattern, "")]:
        turns.append({"role": "user", "content": user})
        turns.append({"role": "assistant", "content": assistant})
    return turns[:-1]


class Pattern:
    """What matches a pattern, by the package ``regex``, which knows texts that may yet match.

    (genlm-eval asks ``match`` whether a text may yet match, which takes the first alternative that
    ends and so denies beginnings of texts that do match; ``fullmatch`` does not.)
    """

    def __init__(self, pattern: str) -> None:
        self._compiled = regex.compile(pattern)

    def allows(self, prefix: str) -> bool:
        """Whether a match may begin so."""
        found = self._compiled.fullmatch(prefix, partial=True)
        return found is not None and set(prefix) <= PRINTABLE

    def complete(self, text: str) -> bool:
        """Whether the text is a match."""
        return self._compiled.fullmatch(text) is not None and set(text) <= PRINTABLE


# --- as a regular expression of the plainest kind ------------------------------------------------


def plain(pattern: str) -> str:
    """The same language in a syntax that everybody reads alike: groups, alternatives, repeats, and
    sets of printable characters by their codes. (Else ``\\d`` holds all digits of Unicode for one
    engine and ten for the other.)

    Raises:
        ValueError: it has more than a regular expression: a lookaround, a reference, an atomic
            group; an anchor within; flags that change what a character matches; or it is in
            another dialect than Python's. Or it matches no printable text.
    """
    try:
        parsed = parser.parse(pattern)
    except (re_error, RecursionError) as error:
        raise ValueError(f"{pattern!r} is no pattern of Python's re: {error}") from None
    if parsed.state.flags & (sre.SRE_FLAG_IGNORECASE | sre.SRE_FLAG_LOCALE | sre.SRE_FLAG_DOTALL):
        raise ValueError(f"{pattern!r} has flags")
    items = list(parsed)
    while items and items[0] in _BEGINS:
        del items[0]
    while items and items[-1] in _ENDS:
        del items[-1]
    return _sequence(items)


re_error = parser.error
_BEGINS = [(sre.AT, sre.AT_BEGINNING), (sre.AT, sre.AT_BEGINNING_STRING)]
_ENDS = [(sre.AT, sre.AT_END), (sre.AT, sre.AT_END_STRING)]
_CATEGORIES = {
    sre.CATEGORY_DIGIT: string.digits,
    sre.CATEGORY_SPACE: string.whitespace,
    sre.CATEGORY_WORD: string.ascii_letters + string.digits + "_",
}
_COMPLEMENTS = {
    sre.CATEGORY_NOT_DIGIT: sre.CATEGORY_DIGIT,
    sre.CATEGORY_NOT_SPACE: sre.CATEGORY_SPACE,
    sre.CATEGORY_NOT_WORD: sre.CATEGORY_WORD,
}


def _sequence(items: Iterable[tuple[Any, Any]]) -> str:
    return "".join(_item(code, argument) for code, argument in items)


def _item(code: Any, argument: Any) -> str:
    if code in (sre.MAX_REPEAT, sre.MIN_REPEAT):
        least, most, repeated = argument
        upper = "" if most == sre.MAXREPEAT else str(most)
        return f"(?:{_sequence(repeated)}){{{least},{upper}}}"
    if code is sre.BRANCH:
        return f"(?:{'|'.join(map(_sequence, argument[1]))})"
    if code is sre.SUBPATTERN:
        _, added, removed, inner = argument
        if added or removed:
            raise ValueError("flags of a group")
        return f"(?:{_sequence(inner)})"
    return _set_of(_characters(code, argument))


def _characters(code: Any, argument: Any) -> frozenset[str]:
    """The printable characters that one item matches."""
    if code is sre.ANY:
        return PRINTABLE - {"\n"}
    if code is sre.NOT_LITERAL:
        return PRINTABLE - {chr(argument)}
    if code is sre.LITERAL:
        return PRINTABLE & {chr(argument)}
    if code is sre.IN:
        negated = argument[0][0] is sre.NEGATE
        parts = argument[1:] if negated else argument
        members = frozenset[str]().union(*(_members(*part) for part in parts))
        return PRINTABLE - members if negated else PRINTABLE & members
    raise ValueError(f"{str(code).lower()} is more than a regular expression has")


def _members(code: Any, argument: Any) -> frozenset[str]:
    if code is sre.RANGE:
        return frozenset(c for c in PRINTABLE if argument[0] <= ord(c) <= argument[1])
    if code is sre.CATEGORY and argument in _COMPLEMENTS:
        return PRINTABLE - frozenset(_CATEGORIES[_COMPLEMENTS[argument]])
    if code is sre.CATEGORY:
        return frozenset(_CATEGORIES[argument])
    return frozenset(chr(argument))


def _set_of(characters: frozenset[str]) -> str:
    """A set by codes, as ``[\\x30-\\x39]``."""
    if not characters:
        raise ValueError("no printable character matches a part of it")
    runs = ((rf"\x{a:02x}", rf"\x{b:02x}") for a, b in _runs(sorted(map(ord, characters))))
    return f"[{''.join(a if a == b else f'{a}-{b}' for a, b in runs)}]"


def _runs(codes: list[int]) -> Iterator[tuple[int, int]]:
    first = codes[0]
    for code, following in zip(codes, [*codes[1:], None], strict=True):
        if following != code + 1:
            yield first, code
            if following is not None:
                first = following
