"""Where the time of a run goes: ``with lmppl.profile() as p:`` and ``infer(..., profile=True)``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from lmppl.lm.meter.work import KINDS, Kind, WorkRecord, recording
from lmppl.report.tables import Block, Report, profile_blocks

# Forward, and as much again for the gradients of inputs: the base is frozen.
_PASSES_OF_TRAINING = 2


@dataclass(frozen=True)
class Work:
    """One kind of language-model work.

    Attributes:
        kind: ``"sampled"``, ``"scored"``, ``"trained"`` or ``"read"`` (see ``Profile``).
        tokens: that were drawn, scored or trained on; 0 for ``"read"``. Equal requests count once.
        seconds: that the work took, its bookkeeping included.
        passes: forward passes through a model.
        rows: of their batches, all passes together; a row may hold several texts.
        positions: computed in the forward passes, with prompts, padding and a new model's probe.
        outputs: positions that went through the output layer.
        flops: of the matrix products with the models' weights, not attention's own: 2 a parameter
            and position (of the output layer: and position that goes through it), and twice that
            for ``"trained"``, as a frozen model with a LoRA adapter needs gradients of inputs only.
        gemm_seconds: what these products would take alone, at the rate that ``F.linear`` reaches
            on this device with the models' own weights and as many rows as a pass has on
            average (the nearest power of two); None if it could not be measured.
    """

    kind: str
    tokens: int
    seconds: float
    passes: int
    rows: int
    positions: int
    outputs: int
    flops: int
    gemm_seconds: float | None

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens a second; None if there are no tokens."""
        return self.tokens / self.seconds if self.tokens and self.seconds else None

    @property
    def mean_batch(self) -> float | None:
        """Rows of a forward pass, on average; None if there were no passes."""
        return self.rows / self.passes if self.passes else None

    @property
    def roofline(self) -> float | None:
        """The share of the seconds that the matrix products need; 1 is as fast as can be. None if
        there were no passes, or the rate could not be measured."""
        if not self.seconds or self.gemm_seconds is None:
            return None
        return self.gemm_seconds / self.seconds


class Profile(Report):
    """Where the time went.

    Its figures are there when its block, or ``infer``, has ended. All language models of the
    process count, those of other threads too. Time is never counted twice.

    Attributes:
        sampled: drawing texts, prompts included.
        scored: scoring texts without a gradient: observations, choices, rewards, lookaheads.
        trained: scoring texts with a gradient to trained parameters, and the backward passes.
        read: reading what comes next, or a state, without drawing or scoring a text: enumeration
            by ``"exact"``, and the heads of guides.
        seconds: of the whole, by the wall clock.

    Raises:
        RuntimeError: a figure is asked for before the block has ended.
    """

    sampled: Work
    scored: Work
    trained: Work
    read: Work
    seconds: float

    def __getattr__(self, name: str) -> Any:  # of what is not there yet
        if name in Profile.__annotations__:
            raise RuntimeError("a profile has its figures when its with block has ended")
        raise AttributeError(f"a Profile has no attribute {name!r}")

    @property
    def works(self) -> list[Work]:
        """The kinds of work that were done."""
        works = [getattr(self, kind) for kind in KINDS]
        return [work for work in works if work.passes or work.seconds]

    @property
    def seconds_outside(self) -> float:
        """Seconds outside the language models: programs, tools, weights, optimiser, ..."""
        return max(0.0, self.seconds - sum(work.seconds for work in self.works))

    @property
    def share_outside(self) -> float:
        """``seconds_outside`` as a share of all seconds."""
        return self.seconds_outside / self.seconds if self.seconds else 0.0

    @property
    def passes(self) -> int:
        """Forward passes through language models."""
        return sum(work.passes for work in self.works)

    @property
    def mean_batch(self) -> float | None:
        """Rows of a forward pass, on average; None if there were no passes."""
        return sum(work.rows for work in self.works) / self.passes if self.passes else None

    def summary(self) -> dict[str, Any]:
        """The profile in plain Python values, as the table shows it.

        ``"works"`` has one dict a kind of work, with the attributes and properties of ``Work``.
        """
        rates = ("tokens_per_second", "mean_batch", "roofline")
        figures = ("seconds", "seconds_outside", "share_outside", "passes", "mean_batch")
        works = [vars(work) | {name: getattr(work, name) for name in rates} for work in self.works]
        return {name: getattr(self, name) for name in figures} | {"works": works}

    def _blocks(self) -> list[Block]:
        if "seconds" not in vars(self):
            return ["Profile: its with block has not ended"]
        return profile_blocks(self.summary())


@contextmanager
def profile() -> Iterator[Profile]:
    """Measure where time goes in the block.

    ```python
    with lmppl.profile() as p:
        guide.fit(inputs, steps=100)
    print(p)
    ```

    Blocks may nest; each sees all that happens in it. While one is open, every call of a language
    model waits for its device at its begin and end. The rates that the work is compared with are
    measured when the block ends, in a fraction of a second that no profile counts, and remembered.

    Yields:
        A ``Profile``, which has its figures when the block has ended, also by an exception.
    """
    result = Profile()
    ledger, record = None, WorkRecord()
    try:
        with recording() as (ledger, record):
            yield result
    finally:
        if ledger is not None:
            with ledger.pause():  # of whoever profiles what is around this one
                vars(result).update({kind: _work(kind, record) for kind in KINDS})
            result.seconds = record.seconds


def _work(kind: Kind, record: WorkRecord) -> Work:
    groups = [passes for (work, _), passes in record.passes.items() if work == kind]
    times = _PASSES_OF_TRAINING if kind == "trained" else 1
    flops = sum(sum(group.matrices.flops(group.positions, group.outputs)) for group in groups)
    gemm_seconds = None
    with suppress(RuntimeError):  # of the device: too little memory, or what ended the block
        alone = [
            group.matrices.seconds(group.positions, group.outputs, group.passes) for group in groups
        ]
        known = [seconds for seconds in alone if seconds is not None]
        gemm_seconds = times * sum(known) if groups and len(known) == len(groups) else None
    counts = {
        name: sum(getattr(group, name) for group in groups)
        for name in ("passes", "rows", "positions", "outputs")
    }
    tokens, seconds = getattr(record.usage, f"tokens_{kind}", 0), record.kinds[kind]
    return Work(kind, tokens, seconds, **counts, flops=times * flops, gemm_seconds=gemm_seconds)
