"""One process of ``benchmarks.ranks``, which begins it: it trains a guide together with others, or sends
the messages of such a training, without a language model.

    torchrun --nproc-per-node 2 -m benchmarks.one_rank train FOLDER
    torchrun --nproc-per-node 4 -m benchmarks.one_rank send FOLDER

FOLDER/job.json says what. What this process finds is in FOLDER/rank-N.json; what the first one tells the
others in each step, in FOLDER/told.pickle, from which ``send`` has it: by pickle, as the very messages
are measured; the folder is one that ``benchmarks.ranks`` has made for itself.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import lmppl
from lmppl import lm_sample
from lmppl.runtime.records import Record
from lmppl.testing import tiny_lm
from lmppl.training.inputs import Input
from lmppl.training.kept import hear_news
from lmppl.training.messages import unpack
from lmppl.training.options import FitOptions
from lmppl.training.ranks import ranks_of

TINY = "tiny"
PARTS = "small", "gradient", "told", "taken in"
"""What ``send`` measures: messages of a few numbers, the gradient, what is told of inputs, and the time
to take that in."""


@dataclass
class Job:
    """What to train, or how much to send.

    Args:
        model: as ``LM.from_pretrained`` takes it, or "tiny".
        dtype: None: what suits the machine.
        inputs: pairs of a beginning and an ending.
        steps, inputs_per_step, batch_size, seed: see ``fit``.
        max_tokens: of the text between them.
        shapes: of the gradients to send.
    """

    model: str
    dtype: str | None
    inputs: list[tuple[str, str]]
    steps: int
    inputs_per_step: int
    batch_size: int
    max_tokens: int
    seed: int = 0
    shapes: list[list[int]] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        (folder / "job.json").write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, folder: Path) -> Job:
        return cls(**json.loads((folder / "job.json").read_text()))

    def lm(self) -> lmppl.LM:
        if self.model == TINY:
            return tiny_lm("ab.", seed=0)
        return lmppl.LM.from_pretrained(self.model, dtype=self.dtype)


class Clock:
    """The messages of each step: what each is, its seconds and its bytes, in order."""

    def __init__(self) -> None:
        self.steps: list[list[tuple[str, float, int]]] = [[]]
        self.told: list[bytes] = []  # in each step, what was told of inputs, pickled
        self._largest = b""

    def next_step(self) -> None:
        self.told.append(self._largest)
        self.steps.append([])
        self._largest = b""

    @contextmanager
    def running(self) -> Iterator[None]:
        """Look at the clock before and after each message."""
        kept = {
            name: getattr(dist, name) for name in ("all_reduce", "broadcast", "all_gather_object")
        }
        try:
            for name, collective in kept.items():
                setattr(dist, name, self._timed(name, collective))
            yield
        finally:
            for name, collective in kept.items():
                setattr(dist, name, collective)

    def _timed(self, name: str, collective: Any) -> Any:
        def timed(first: Any, *rest: Any, **options: Any) -> Any:
            if name == "all_gather_object":
                message = pickle.dumps(rest[0])
                if _tells_of_inputs(unpack(rest[0])):
                    self._largest = max(self._largest, message, key=len)
                size = len(message)
            else:
                size = first.numel() * first.element_size()
            began = time.perf_counter()
            result = collective(first, *rest, **options)
            self.steps[-1].append((name, time.perf_counter() - began, size))
            return result

        return timed


def _tells_of_inputs(message: Any) -> bool:
    """Whether a message is that with the news of a step's inputs."""
    return all(isinstance(each, tuple) and isinstance(each[-1], dict) for each in message)


def train(job: Job, folder: Path, rank: int) -> dict[str, Any]:
    """Train: the seconds, samples and messages of each step but the first."""
    lm, clock, ends = job.lm(), Clock(), list[float]()

    def infill(beginning: str, ending: str) -> lmppl.Text:
        z = lm_sample("z", beginning, max_tokens=job.max_tokens, stop=".")
        lm_sample("ending", [beginning, z], obs=ending)
        return z

    def callback(figures: dict[str, Any]) -> None:
        clock.next_step()
        ends.append(time.perf_counter())

    guide = lmppl.LMGuide(infill, lm=lm)
    with clock.running():
        guide.fit(
            job.inputs, steps=job.steps, batch_size=job.batch_size, seed=job.seed,
            inputs_per_step=job.inputs_per_step, progress=False, callback=callback,
        )  # fmt: skip
    gradients = [p.grad for p in guide.parameters() if p.grad is not None]
    if rank == 0:
        (folder / "told.pickle").write_bytes(pickle.dumps(clock.told))
    return {
        "dtype": str(lm.dtype).removeprefix("torch."),
        "seconds": [end - begin for begin, end in zip(ends, ends[1:], strict=False)],
        "samples": guide.history.column("samples")[1:],
        "losses": guide.history.column("loss"),
        "messages": clock.steps[1 : job.steps],
        "shapes": [list(gradient.shape) for gradient in gradients],
        "gradient_bytes": sum(gradient.nbytes for gradient in gradients),
    }


def send(job: Job, folder: Path, rank: int) -> dict[str, Any]:
    """Send what a step sends, and take in what the others tell: seconds of ``PARTS``, by step."""
    ranks = ranks_of("inputs")
    steps = [unpack(pickle.loads(t)) for t in pickle.loads((folder / "told.pickle").read_bytes())]
    gradients = [torch.ones(shape) for shape in job.shapes]
    seconds: dict[str, list[float]] = {name: [] for name in PARTS}
    for number, told in enumerate(steps):
        dist.barrier()
        times = [time.perf_counter()]
        with ranks.together(f"step {number}"):
            pass
        ranks.agree(["parts"])
        ranks.sum([torch.zeros(2, dtype=torch.float64)])
        ranks.sum([torch.zeros(len(gradients))])
        ranks.gather([[]])
        times.append(time.perf_counter())
        ranks.sum(gradients)
        times.append(time.perf_counter())
        heard = ranks.gather(told)
        times.append(time.perf_counter())
        for *_, news in heard:
            hear_news(with_traces(), news)
        times.append(time.perf_counter())
        for name, begin, end in zip(PARTS, times, times[1:], strict=False):
            seconds[name].append(end - begin)
    return seconds


_RECORDS = [Record({"z": torch.tensor([number])}) for number in range(256)]


def with_traces() -> Input:
    """An input with as many traces as news may speak of."""
    input_ = Input(lambda: None, (), 0, FitOptions())
    input_.shared = {"buffer": _RECORDS, "stock": _RECORDS}
    return input_


if __name__ == "__main__":
    what, path = sys.argv[1], Path(sys.argv[2])
    number = int(os.environ.get("RANK", "0"))
    found = (train if what == "train" else send)(Job.read(path), path, number)
    (path / f"rank-{number}.json").write_text(json.dumps(found))
