"""Prefixes by a model's chat template."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lmppl.lm.tokens.text import Text
from lmppl.lm.tokens.vocabulary import Vocabulary

# Stands for a Text while the template is rendered: private-use characters, which no template has.
_MARK = "\ue0f0{}\ue0f1"
_MARKS = re.compile("\ue0f0([0-9]+)\ue0f1")


def apply_chat_template(
    vocabulary: Vocabulary,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
) -> Text:
    """The messages in the model's chat format, as a text in which every ``Text`` keeps its tokens.

    Raises:
        ValueError: the tokenizer has no chat template, a message lacks a key, or the template
            refuses the messages.
    """
    tokenizer = vocabulary.tokenizer
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "chat(): this model's tokenizer has no chat template. Use an instruction-tuned model, "
            "set tokenizer.chat_template, or write the prefix out as text."
        )
    texts: list[Text] = []
    plain: list[dict[str, Any]] = []
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise ValueError(
                f"chat(): message {number} is {message!r}; it must be a dict with the keys 'role' "
                "and 'content'"
            )
        entry = dict(message)
        if isinstance(entry["content"], Text):
            texts.append(entry["content"])
            entry["content"] = _MARK.format(len(texts) - 1)
        plain.append(entry)
    try:
        rendered = tokenizer.apply_chat_template(
            plain, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:  # templates raise what they like
        raise ValueError(
            f"chat(): the model's chat template refuses the messages: {error}"
        ) from error
    # Splitting on one group alternates template text and numbers of Texts.
    pieces = _MARKS.split(rendered)
    result = Text("", (), vocabulary)
    for position, piece in enumerate(pieces):
        if position % 2:
            result = result + texts[int(piece)]
        elif piece:
            result = result + piece
    return result
