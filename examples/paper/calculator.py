"""A small calculator for programs whose text is a language model's: nothing is evaluated as code."""

from __future__ import annotations

import operator
import re

MOST_DIGITS = 6
"""Of a number that it reads."""

_OPERATIONS = {"+": operator.add, "-": operator.sub}
_EXPRESSION = re.compile(r"\s*(-?[0-9]+)((?:\s*[+-]\s*[0-9]+)*)\s*=?\s*")
_TERM = re.compile(r"([+-])\s*([0-9]+)")
_MOST_CHARACTERS = 200


def calculate(expression: str) -> int:
    """The value of a sum such as ``"12 - 5 + 3 ="``, from left to right.

    Args:
        expression: whole numbers of at most ``MOST_DIGITS`` digits, the first one maybe negative, with +
            and - between them; spaces don't matter, nor does an equals sign at the end.

    Raises:
        ValueError: if it is no sum, or too large a one to be meant.
    """
    if len(expression) > _MOST_CHARACTERS:
        raise ValueError(f"{expression[:20]!r}... is longer than {_MOST_CHARACTERS} characters")
    match = _EXPRESSION.fullmatch(expression)
    if match is None:
        raise ValueError(f"{expression!r} is no sum of whole numbers")
    terms = _TERM.findall(match[2])
    for number in (match[1], *(number for _, number in terms)):
        if len(number.lstrip("-")) > MOST_DIGITS:
            raise ValueError(f"{expression!r} has a number of more than {MOST_DIGITS} digits")
    result = int(match[1])
    for sign, number in terms:
        result = _OPERATIONS[sign](result, int(number))
    return result


def calculate_in_words(expression: str) -> str:
    """The value as text, or what is wrong with the expression: a program may let the model read on."""
    try:
        return str(calculate(expression))
    except ValueError:
        return "error"
