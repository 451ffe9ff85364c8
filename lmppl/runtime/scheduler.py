"""Several engines side by side, whose particles share the language models' batches.

An engine is a loop that settles its own particles and draws for them (``batching``). Run as a
*member*, a coroutine of its own, it suspends where it would call a language model:

    until the first member has ended:
        if any member waits for scores:  answer all scores in one call
        else if any for states:          answer all states in one call
        else:                            answer all draws in one call
        resume those that got answers

Draws come last, since a batch of draws costs as many steps as its longest text: so engines that
came apart meet again at their next draw. Outside of a member ``ask`` calls the model at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

from greenlet import getcurrent, greenlet

from lmppl.distributions import draw_texts, score_texts
from lmppl.lm.meter.usage import Usage, total_usage
from lmppl.runtime.coroutine import Coroutine, GlobalState, suspend
from lmppl.runtime.particle import Wait


class _Stack(greenlet):
    """What a member runs on. (Its particles run on stacks of their own: whatever they call, such
    as another ``infer`` in a tool, is no engine of the batch.)"""

    elsewhere: Usage
    """Tokens since the process began that are not the member's."""


class Member(Coroutine):
    """A function, say an engine's run, that waits for its model calls beside other members.

    Args:
        fn: the function.
        global_state: the global state that it begins in.

    Attributes:
        waiting: what its particles wait for, all of one kind; empty when it has ended.
        error: the exception that it ended with, or None.
    """

    def __init__(self, fn: Callable[[], Any], global_state: GlobalState) -> None:
        super().__init__(fn, global_state, _Stack)
        self.waiting: Sequence[Wait] = ()
        self.error: Exception | None = None
        self._spent = Usage()

    def go_on(self, answers: list[Any] | Exception | None = None) -> None:
        """Run to the next wait or to the end, with the answers to ``waiting``, or with the
        exception that came instead."""
        answered = _usage(self.waiting, answers) if isinstance(answers, list) else Usage()
        stack = self._greenlet
        stack.elsewhere = total_usage() - self._spent - answered
        self.waiting = ()
        try:
            self.waiting = self.resume(answers) or ()
        except Exception as error:
            self.error = error
        finally:
            self._spent = total_usage() - stack.elsewhere

    def close(self) -> None:
        self.waiting = ()
        super().close()


def advance(members: Sequence[Member]) -> None:
    """One round: a call of the language models, and all who waited for it go on."""
    kinds = {member.waiting[0].kind for member in members if member.waiting}
    kind = next(kind for kind in ("score", "hidden", "draw") if kind in kinds)
    asking = [m for m in members if m.waiting and m.waiting[0].kind == kind]
    for member, answers in zip(asking, _answers([m.waiting for m in asking]), strict=True):
        member.go_on(answers)


def ask(waits: Sequence[Wait], *, grad: bool = False) -> list[Any]:
    """What each of some particles waits for (at least one; all of one kind, not ``"choose"``).

    Args:
        waits: what they wait for.
        grad: keep the graph of scores. Such are never computed with another member's, whose
            backward pass would free it.
    """
    if grad or not isinstance(getcurrent(), _Stack):
        return answer(waits, grad=grad)
    answers = suspend(waits)
    if isinstance(answers, Exception):
        raise answers
    return answers


def answer(waits: Sequence[Wait], *, grad: bool = False) -> list[Any]:
    """The same, by one call of each language model."""
    kind = waits[0].kind
    if kind == "hidden":
        return _hidden(waits)
    fns, names = [wait.fn for wait in waits], [wait.name for wait in waits]
    if kind == "draw":
        return draw_texts(fns, [w.uniforms for w in waits if w.uniforms is not None], names)
    values = [wait.value for wait in waits if wait.value is not None]
    score_closing = any(wait.score_closing for wait in waits)
    return score_texts(fns, values, names, grad=grad, score_closing=score_closing)


def own_usage() -> Usage:
    """Tokens since the process began; within a member, those of the member alone.

    What a member shares with others, it is charged for as if it had asked alone.
    """
    stack = getcurrent()
    return total_usage() - stack.elsewhere if isinstance(stack, _Stack) else total_usage()


def _hidden(waits: Sequence[Wait]) -> list[Any]:
    states: list[Any] = [None] * len(waits)
    for lm in {id(wait.fn): wait.fn for wait in waits}.values():
        members = [i for i, wait in enumerate(waits) if wait.fn is lm]
        found = lm.hidden([waits[i].prefix for i in members]).cpu()
        for i, state in zip(members, found, strict=True):
            states[i] = state
    return states


def _answers(asked: list[Sequence[Wait]]) -> list[list[Any] | Exception]:
    """The answers to each member, or the exception that its own requests raise."""
    try:
        answers = iter(answer([wait for waits in asked for wait in waits]))
        return [list(islice(answers, len(waits))) for waits in asked]
    except Exception as error:
        if len(asked) == 1:
            return [error]
    # Alone, everybody gets what is due to him: answers, or the error that his requests raise.
    return [alone for waits in asked for alone in _answers([waits])]


def _usage(waits: Sequence[Wait], answers: list[Any]) -> Usage:
    """The tokens of a call for these waits alone, in which equal requests are computed once."""
    sampled, scored = 0, set()
    for wait, each in zip(waits, answers, strict=True):
        fn = wait.fn
        if wait.kind == "hidden":
            continue
        value = each[0] if wait.kind == "draw" else wait.value
        if wait.kind == "draw" and fn.choices is None:
            sampled += len(fn.token_ids(value))
        elif fn.supports(value):  # what is outside has probability zero, whatever the model says
            texts = [fn.token_ids(value)] if fn.choices is None else fn.choices
            scored |= {(fn.lm, fn.choices is None, fn.prefix_ids, ids) for ids in texts}
    return Usage(sampled, sum(len(ids) for *_, ids in scored))
