"""Prefixes by a model's chat template."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lmppl.lm.tokens.text import Text
from lmppl.lm.tokens.vocabulary import Vocabulary


def apply_chat_template(
    vocabulary: Vocabulary,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
) -> Text:
    """The messages in the model's chat format, as a text in which every ``Text`` keeps its tokens,
    wherever in a message it stands.

    Raises:
        TypeError: what is no list of messages.
        ValueError: no chat template, a message that lacks a key, or that the template refuses.
    """
    _check_messages(messages)
    tokenizer = vocabulary.tokenizer
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        raise ValueError(
            "chat(): this model's tokenizer has no chat template. Use an instruction-tuned model, "
            "set tokenizer.chat_template, or write the prefix out as text."
        )
    # While the template is rendered, a mark that no message has stands for each Text.
    written = "\n".join(strings_of([messages, template]))
    marks = (f"\ue0f0{number}\ue0f1" for number in itertools.count())
    mark = next(mark for mark in marks if mark not in written)
    texts: list[Text] = []
    plain = _without_texts(messages, texts, mark)
    try:
        rendered = tokenizer.apply_chat_template(
            plain, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:  # templates raise what they like
        raise ValueError(
            f"chat(): the model's chat template refuses the messages: {error}"
        ) from error
    if repr(mark)[1:-1] in rendered:
        raise ValueError(
            "chat(): the model's chat template writes a message with a Text in it as Python or "
            "JSON would: it takes no such content. Give it as one string, 'content': before + z"
        )
    result = Text("", (), vocabulary)
    # Splitting on one group alternates what the template wrote and the numbers of Texts.
    for position, piece in enumerate(re.split(f"{mark}([0-9]+){mark}", rendered)):
        if piece:
            result = result + (texts[int(piece)] if position % 2 else piece)
    return result


def _check_messages(messages: Any) -> None:
    if isinstance(messages, str) or not isinstance(messages, Sequence):
        raise TypeError(
            "chat() takes a list of messages, [{'role': 'user', 'content': ...}], given "
            f"{type(messages).__name__} ({messages!r})"
        )
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise ValueError(
                f"chat(): message {number} is {message!r}; it must be a dict with the keys 'role' "
                "and 'content'"
            )


def strings_of(value: Any) -> Iterator[str]:
    """The plain strings in nested lists and dicts; no ``Text``."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from strings_of(part)
    elif isinstance(value, str) and not isinstance(value, Text):
        yield value


def _without_texts(value: Any, texts: list[Text], mark: str) -> Any:
    """A copy of nested lists and dicts with a mark for every ``Text``, which goes to ``texts``."""
    if isinstance(value, Text):
        texts.append(value)
        return f"{mark}{len(texts) - 1}{mark}"
    if isinstance(value, Mapping):
        return {key: _without_texts(part, texts, mark) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_texts(part, texts, mark) for part in value]
    return value
