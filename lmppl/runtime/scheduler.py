"""Several engines side by side, whose particles share the language models' batches.

An engine is a loop that runs its particles to their draws and draws for them (``batching``). Run as a
*member*, a coroutine of its own, it suspends where it would call a language model:

    until the first member has ended:
        if any member waits for scores:  answer all scores in one call
        else if any for states:          answer all states in one call
        else:                            answer all draws in one call
        resume those that got answers

Draws come last, since a batch of draws costs as many steps as its longest text: so engines that
came apart meet again at their next draw. Outside of a member ``ask`` calls the model at once. A member
may itself run members (the islands of SMC, of an input of ``infer_batch``): then what these ask for
together, it asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

from greenlet import getcurrent

from lmppl.exclusive import Stack
from lmppl.lm.meter.work import Usage, total_usage
from lmppl.runtime import waits as kinds
from lmppl.runtime.coroutine import Coroutine, GlobalState, suspend
from lmppl.runtime.waits import ModelWait, ScoredTokens


class _Stack(Stack):
    """What a member runs on. (Its particles run on stacks of their own: whatever they call, such
    as another ``infer`` in a tool, is no engine of the batch.)"""

    elsewhere: Usage
    """Tokens since the process began that are not the member's."""


class Member(Coroutine):
    """A function, say an engine's run, that waits for its model calls beside other members.

    Attributes:
        waiting: what its particles wait for, all of one type; empty when it has ended.
        error: the exception that it ended with, or None.
    """

    def __init__(self, fn: Callable[[], Any], global_state: GlobalState) -> None:
        super().__init__(fn, global_state, _Stack)
        self.waiting: Sequence[ModelWait] = ()
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


_TURNS = kinds.ScoreWait, kinds.HiddenWait, kinds.LateScoresWait, kinds.DrawWait


def advance(members: Sequence[Member]) -> None:
    """One round: a call of the language models, and all who waited for it go on."""
    waits = {type(member.waiting[0]) for member in members if member.waiting}
    first = next(wait for wait in _TURNS if wait in waits)
    asking = [member for member in members if member.waiting and type(member.waiting[0]) is first]
    for member, answers in zip(asking, _answers([m.waiting for m in asking]), strict=True):
        member.go_on(answers)


def run_members(members: Sequence[Member]) -> None:
    """Run all to their ends, side by side. Raises the first exception of one; the others may be
    suspended then."""
    for member in members:
        member.go_on()
    while True:
        for member in members:
            if member.error is not None:
                raise member.error
        running = [member for member in members if not member.finished]
        if not running:
            return
        advance(running)


def ask(waits: Sequence[ModelWait], *, grad: bool = False) -> list[Any]:
    """What each of some particles waits for (at least one; all of one type).

    With ``grad`` the graph of scores is kept. Such are never computed with another member's, whose
    backward pass would free it.
    """
    if grad or not isinstance(getcurrent(), _Stack):
        return type(waits[0]).answer(waits, grad=grad)
    answers = suspend(waits)
    if isinstance(answers, Exception):
        raise answers
    return answers


def own_usage() -> Usage:
    """Tokens since the process began; within a member, those of the member alone.

    What a member shares with others, it is charged for as if it had asked alone.
    """
    stack = getcurrent()
    return total_usage() - stack.elsewhere if isinstance(stack, _Stack) else total_usage()


def _answers(asked: list[Sequence[ModelWait]]) -> list[list[Any] | Exception]:
    """The answers to each member, or the exception that its own requests raise."""
    try:
        answers = iter(ask([wait for waits in asked for wait in waits]))
        return [list(islice(answers, len(waits))) for waits in asked]
    except Exception as error:
        if len(asked) == 1:
            return [error]
    # Alone, everybody gets what is due to him: answers, or the error that his requests raise.
    return [alone for waits in asked for alone in _answers([waits])]


def _usage(waits: Sequence[ModelWait], answers: list[Any]) -> Usage:
    """The tokens of a call for these waits alone, in which equal requests are computed once."""
    sampled, scored = 0, set[ScoredTokens]()
    for wait, answer in zip(waits, answers, strict=True):
        drawn, texts = wait.work(answer)
        sampled += drawn
        scored |= texts
    return Usage(sampled, sum(len(ids) for *_, ids in scored))
