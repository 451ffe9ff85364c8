"""Training in several processes: what one process gives, to rounding."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import chain, zip_longest
from pathlib import Path

import pytest

from lmppl.testing import tiny_lm

pytestmark = pytest.mark.long

HERE = Path(__file__).parent
# The last bits of sums and of batches of other shapes differ. Adam makes a step of full size of a
# gradient that is rounding alone, and clipped ratios (ppo) have kinks.
SCENARIOS = {
    "float32": 1e-3,
    "float64": 1e-3,
    "sites met by some": 1e-3,
    "learned log Z": 1e-3,
    "several updates": 2e-2,
    "maximum likelihood": 1e-3,
    "an idle rank": 1e-6,
    "a stream": 1e-3,
    "simulated": 1e-3,
    "learn": 1e-3,
    "some truncations": 1e-3,
    "adapters of sites": 1e-3,
    "a guide program": 1e-3,
    "learn in turn": 1e-3,
}


def launch(
    script: str, num: int, *args: object, check: bool = True, options: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """A script in so many processes, as a user starts them."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num}", *options]
    return subprocess.run(
        [sys.executable, *(torchrun if num > 1 else []), HERE / script, *map(str, args)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=check,
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each process of a run of 1, 2 and 3 has found."""
    found = {}
    for num in (1, 2, 3):
        folder = tmp_path_factory.mktemp(f"ranks-{num}")
        launch("several_ranks.py", num, folder)
        files = [folder / f"rank-{rank}.json" for rank in range(num)]
        found[num] = [json.loads(file.read_text()) for file in files]
    return found


def numbers(value: object) -> list[float]:
    """All numbers in a result, in order."""
    if isinstance(value, dict):
        return list(chain.from_iterable(numbers(value[key]) for key in sorted(value)))
    if isinstance(value, list):
        return list(chain.from_iterable(map(numbers, value)))
    return [float(value)]


@pytest.mark.parametrize("num", [2, 3])
@pytest.mark.parametrize("name", SCENARIOS)
def test_several_processes_train_as_one_does(results, name, num):
    (alone,), ranks = ([rank[name] for rank in results[k]] for k in (1, num))
    near = dict(abs=SCENARIOS[name], nan_ok=True)
    assert numbers(alone["first_gradients"]) and alone["history"]
    for rank in ranks:
        assert rank["first_gradients"] == pytest.approx(alone["first_gradients"], abs=1e-5)
        for what in sorted(alone.keys() - {"draws", "first_gradients", "notes", "told"}):
            assert numbers(rank[what]) == pytest.approx(numbers(alone[what]), **near), what
        assert rank["parameters"].keys() == alone["parameters"].keys()
        assert rank["parameters"] == ranks[0]["parameters"]  # to the last bit
        assert rank.get("notes") == alone.get("notes")


@pytest.mark.parametrize("num", [2, 3])
@pytest.mark.parametrize("name", [name for name in SCENARIOS if name != "several updates"])
def test_each_input_has_the_draws_that_it_has_in_one_process(results, name, num):
    """Whichever rank it falls to, replayed traces among them; no rank draws for others."""
    (alone,), ranks = ([rank[name]["draws"] for rank in results[k]] for k in (1, num))
    assert any(draw for step in alone for draw in step)
    for step, of_ranks in zip(alone, zip(*ranks, strict=True), strict=True):
        dealt = [one for place in zip_longest(*of_ranks) for one in place if one is not None]
        assert dealt == step
        sizes = [len(of_rank) for of_rank in of_ranks]
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("num", [1, 2, 3])
def test_idle_processes_are_said_once(results, num):
    first, *others = (rank["an idle rank"]["told"] for rank in results[num])
    assert len(first) == (num > 1) and not any(others)
    assert num == 1 or f"a step has 1 inputs for {num} processes, so {num - 1} of" in first[0]
    assert num == 1 or "parallel='split'" in first[0]
    assert not results[num][0]["float32"]["told"]


def test_it_is_shown_that_runs_of_other_seeds_differ(results):
    """The comparisons above can fail."""
    alone = results[1][0]
    one, two = (numbers(alone[name]["parameters"]) for name in ("float32", "float64"))
    assert one == pytest.approx(two, abs=1e-3)  # the same run, but for rounding
    assert math.dist(one, numbers(alone["a stream"]["parameters"])) > 0.1


# --- when a process dies -------------------------------------------------------------------------


def read(folder: Path, rank: int = 0) -> dict:
    return json.loads((folder / f"rank-{rank}.json").read_text())


def test_a_run_goes_on_when_a_process_was_killed(tmp_path):
    """torchrun starts all again, and they end at the same bits. Another number of processes comes to the
    same, but for rounding, and says so."""
    whole, restarted, ended = (tmp_path / name for name in ("whole", "restarted", "ended"))
    for folder in (whole, restarted, ended):
        folder.mkdir()
    script = "interrupted_ranks.py"
    launch(script, 2, whole, -1)
    launch(script, 2, restarted, 5, options=["--max-restarts=1"])
    assert (restarted / "killed").exists()
    assert read(restarted) == read(whole) == read(whole, rank=1)
    assert read(restarted)["warnings"] == []
    killed = launch(script, 2, ended, 5, check=False)
    assert killed.returncode != 0 and not (ended / "rank-0.json").exists()
    launch(script, 1, ended, 5)
    found = read(ended)
    assert numbers(found["parameters"]) == pytest.approx(
        numbers(read(whole)["parameters"]), abs=1e-3
    )
    assert found["losses"] == pytest.approx(read(whole)["losses"], abs=1e-3)
    (warning,) = found["warnings"]
    assert "was written by a run of 2 processes" in warning and "this one has 1 process" in warning


# --- what is told --------------------------------------------------------------------------------


DIFFERENT = ("data", "program", "language model", "seed", "eval_data", "option parallel")


def test_processes_that_train_something_else_are_told(tmp_path):
    printed = launch("different_ranks.py", 2, options=[f"--log-dir={tmp_path}", "--redirects=3"])
    del printed
    first, second = (
        next(tmp_path.rglob(f"{rank}/stdout.log")).read_text().splitlines() for rank in (0, 1)
    )
    assert first[:-1] == second[:-1]  # both are told, none waits for the other
    for line, what in zip(first, DIFFERENT, strict=False):
        assert line.startswith(f"{what}: the processes of this run differ in their {what}: rank 0")
    of_stream = first[len(DIFFERENT)]
    assert "stream: the processes of this run have read other inputs for step 1" in of_stream
    assert first[-2].startswith("inputs: [") and first[-1].startswith("none: [")
    assert first[-1] != second[-1]


# --- what goes wrong in one process --------------------------------------------------------------


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    """What each of two processes is told, by what went wrong in one of them."""
    folder = tmp_path_factory.mktemp("failures")
    launch("failing_ranks.py", 2, "all", folder, options=[f"--log-dir={folder}", "--redirects=3"])
    found = []
    for rank in (0, 1):
        lines = next(folder.rglob(f"{rank}/stdout.log")).read_text().splitlines()
        found.append(dict(line.split(": ", 1) for line in lines))
    return found


def test_an_error_of_one_process_is_raised_in_all(failures):
    first, second = failures
    by = f"rank 1 of 2 (machine {socket.gethostname()})"
    assert second["a tool"].startswith("ConnectionError: the tool is broken")
    assert second["a tool"].endswith(f"raised in {by}")
    assert f"RuntimeError: {by} has failed in step 2, so all processes" in first["a tool"]
    assert "ConnectionError: the tool is broken" in first["a tool"]
    assert second["a stream"].startswith("OSError: no such file")
    assert f"{by} has failed in the inputs of step 3" in first["a stream"]


def test_processes_that_are_out_of_step_are_told(failures):
    first, second = failures
    assert second["a callback"].startswith("OSError: no tracker")
    for line in (first["a callback"], second["another run"]):
        assert "are not at the same work: rank 0 is at step 2, rank 1 of 2" in line
        assert "at the beginning of a run. One has gone on after an error" in line


def test_a_process_group_that_is_made_late(failures):
    for one in failures:
        assert "a process group of 2 was begun after this run" in one["a late group"]


@pytest.mark.parametrize(
    "what",
    [
        "a guide from before the group", "after it", "after that", "a group that lmppl begins",
        "and another", "a full disk", "resumed",
    ],
)  # fmt: skip
def test_training_goes_on_after_what_all_have_met(failures, what):
    assert {one[what] for one in failures} == {failures[0]["alone"]}
    assert failures[0][what].startswith("loss ")


def test_a_full_disk_of_the_first_process(failures):
    """It is named, and the checkpoint before is whole: the run goes on from it."""
    first, second = failures
    assert first["warned"].startswith("the checkpoint of step 4 could not be written to /")
    assert f"by rank 0 of 2 (machine {socket.gethostname()}) (" in first["warned"]
    assert "File too large" in first["warned"] and "warned" not in second


ENDS = {
    "model": ["elsewhere", "every machine of a run needs the model under this name"],
    "gradient": [
        "a gradient: MemoryError: no memory for the gradient",
        "can't train together with the others: it has left the gradient of step 0 (MemoryError: no",
    ],
}


@pytest.mark.parametrize("what", ENDS)
def test_what_ends_one_process_ends_all(tmp_path, what):
    """At once, with an error that says which has met it. (torch's own limit is half an hour.)"""
    lm = tiny_lm("ab.", seed=0)
    lm.model.save_pretrained(tmp_path / "here")
    lm.tokenizer.save_pretrained(tmp_path / "here")
    began = time.perf_counter()
    ended = launch("failing_ranks.py", 2, what, tmp_path, check=False)
    assert ended.returncode != 0 and time.perf_counter() - began < 200
    printed = ended.stdout + ended.stderr
    for words in (*ENDS[what], f"rank 1 of 2 (machine {socket.gethostname()})"):
        assert words in printed
    assert "rank 0 of 2 (machine" not in printed or what == "gradient"
