"""How much faster two actors of Ray answer many inputs than one, each with one thread.

    python -m benchmarks --only ray_actors

Both answer the same inputs with the same seeds, in turns, by ``lmppl.ray.run``. Starting processes and
loading the model, some ten seconds a run, are not counted: actors answer one batch untimed and then wait
for each other, and what is timed is from the beginning of the first batch to the end of the last. What
the two share is the memory bus, and the process that hands out batches.

Expect nearly twice the samples a second on two processors with nothing else to do. The actors are two
processes of one thread each; the number of threads that the table's heading names is that of others.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.bench import Bench
from benchmarks.measuring import Timed, ratios
from benchmarks.results import Goal, Row, Skipped
from lmppl import lm_sample

BATCH = 2  # inputs


def run(bench: Bench) -> list[Row]:
    if (os.cpu_count() or 1) < 2:
        raise Skipped("two actors need two processors")
    try:
        import ray

        import lmppl.ray
    except ImportError:
        raise Skipped("Ray is not installed: `pip install -e '.[ray]'` does it") from None
    num, samples, tokens, prompt = bench.choose(
        smoke=(6, 2, 2, 4), quick=(24, 64, 16, 32), full=(48, 64, 16, 32)
    )
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    ray.init(  # a new one, whatever cluster there may be
        "local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR"
    )
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        with tempfile.TemporaryDirectory() as folder:
            infer = lmppl.ray.Infer(
                continued, lm=_source(bench, Path(folder)), method="importance", num_samples=samples,
                dtype=str(bench.lm.dtype).removeprefix("torch."), kwargs={"max_tokens": tokens},
            )  # fmt: skip
            one, two = Timed("one actor"), Timed("two actors")
            busy: list[float] = []
            for number in range(bench.repeats):
                texts = [bench.text(prompt, number * num + i) for i in range(num)]
                for side, actors in ((one, 1), (two, 2)):
                    seconds, drawn, share = measure(infer, texts, actors)
                    side.seconds.append(seconds)
                    side.tokens.append(drawn)
                    busy += [share] * (actors == 2)
    finally:
        ray.shutdown()
    rates = [num * samples / side.median for side in (one, two)]
    return [
        Row.of(
            f"{num} inputs x {samples} samples of {tokens} tokens, one thread an actor",
            [two, one],
            ratios(one, two),
            unit="x",
            goal=Goal(1.7),
            figures={"samples_per_second": rates, "busy": busy},
            note=f"{rates[0]:.0f} samples a second with one actor, {rates[1]:.0f} with two, which were "
            f"busy {median(busy):.0%} of the time",
        )
    ]


def continued(x: str, max_tokens: int) -> None:
    """The program: so many tokens after a prompt."""
    lm_sample("z", x, max_tokens=max_tokens)


def measure(infer: Any, texts: list[str], actors: int) -> tuple[float, int, float]:
    """Seconds from the first batch to the last, the tokens that were drawn, and the share of the time
    in which an actor has a batch."""
    import ray

    import lmppl.ray

    rows = ray.data.from_items(
        [{"key": i, "x": text} for i, text in enumerate(texts)], override_num_blocks=1
    )
    with tempfile.TemporaryDirectory() as folder:
        answers = lmppl.ray.run(
            _timed(infer, Path(folder), actors), rows, concurrency=actors, batch_size=BATCH
        ).take_all()
    if len({row["process"] for row in answers}) != actors:
        raise RuntimeError(f"not all of {actors} actors have had a batch")
    seconds = max(row["ended"] for row in answers) - min(row["began"] for row in answers)
    batches = {(row["began"], row["ended"], row["drawn"]) for row in answers}
    drawn = sum(tokens for _, _, tokens in batches)
    return seconds, drawn, sum(end - begin for begin, end, _ in batches) / (actors * seconds)


def _timed(infer: Any, folder: Path, actors: int) -> Any:
    """Actors that say when they answered each batch, and begin together."""

    class Infer(infer):
        def __init__(self) -> None:
            super().__init__()
            import pyarrow as pa

            super().__call__(pa.table({"key": [0], "x": ["a"]}))  # untimed
            (folder / str(os.getpid())).touch()
            while len(list(folder.iterdir())) < actors:
                time.sleep(0.01)

        def __call__(self, batch: Any) -> Any:
            import pyarrow as pa

            before, began = self.lm.tokens_sampled, time.time()
            table = super().__call__(batch)
            told = {
                "began": began, "ended": time.time(), "process": os.getpid(),
                "drawn": self.lm.tokens_sampled - before,
            }  # fmt: skip
            for name, value in told.items():
                table = table.append_column(name, pa.array([value] * len(table)))
            return table

    return Infer


def _source(bench: Bench, folder: Path) -> str:
    """Where actors find the model: by its name, or in the folder, where it is written."""
    if bench.source is not None:
        return bench.source
    bench.lm.model.save_pretrained(folder)
    bench.lm.tokenizer.save_pretrained(folder)
    return str(folder)
