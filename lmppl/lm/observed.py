"""Observed text: the tokens that are scored, or why the site could not have produced it."""

from __future__ import annotations

from lmppl.lm.closing import Closing
from lmppl.text import Text


def encode_observed(obs: str, closing: Closing, site: str = "") -> tuple[int, ...]:
    """See :meth:`lmppl.lm.LM.encode_observed`; ``site`` begins every message."""
    if not isinstance(obs, str):
        raise TypeError(f"{site}an observed text is a str or a Text, not {type(obs).__name__}")
    vocabulary = closing.vocabulary
    try:
        ids = obs.token_ids if isinstance(obs, Text) else vocabulary.encode(obs)
    except ValueError as error:
        raise ValueError(f"{site}{error}") from error
    if not closing.closes:
        if not ids:
            raise ValueError(
                f"{site}the observed text is empty, so without stop or max_tokens it says nothing"
            )
        return ids
    closed = closing.scan(ids)
    if closed is None:
        if vocabulary.eos_id is None:
            raise ValueError(
                f"{site}the observed text {str(obs)!r} does not close the site "
                f"({_closers(closing)}), and the model has no EOS token that could be appended. "
                "Let it end as the site would, or leave out stop and max_tokens to score it as the "
                "beginning of a text."
            )
        return (*ids, vocabulary.eos_id)
    length, reason, stop = closed
    if length == len(ids):
        return ids
    where = f"at token {length} (character {len(vocabulary.decode(ids[:length]))})"
    if reason == "length":
        raise ValueError(
            f"{site}the observed text has {len(ids)} tokens, but max_tokens={closing.max_tokens} "
            f"closes the site {where}: {str(obs)!r}. Raise max_tokens or shorten the text."
        )
    what = f"stop string {stop!r}" if reason == "stop" else "an EOS token"
    rest = vocabulary.decode(ids[length:])
    raise ValueError(
        f"{site}the observed text {str(obs)!r} runs past its close: {what} closes it {where}, but "
        f"{rest!r} follows. Cut the text there, or change the site's stop."
    )


def _closers(closing: Closing) -> str:
    what = [f"stop={list(closing.stop)!r}"] if closing.stop else []
    if closing.max_tokens is not None:
        what.append(f"max_tokens={closing.max_tokens}")
    return ", ".join(what)
