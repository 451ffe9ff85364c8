"""The example of many inputs: what it makes up, and that a run that was killed goes on."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import string
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import lmppl
import many_inputs
from lmppl.testing import tiny_lm

LM = tiny_lm(string.ascii_letters + " .,", seed=0)


def test_its_inputs_are_2000_and_no_two_alike():
    rows = many_inputs.inputs()
    assert len({row["key"] for row in rows}) == len({tuple(row.values()) for row in rows}) == 2000
    assert len({row["ending"] for row in rows[:40]}) == 10


def test_what_happened_then_tells_what_was_bought():
    beginning = "At the fair, Ida bought a"
    exact = lmppl.infer(many_inputs.bought, beginning, " It barked.", lm=LM, method="exact")
    prior = lmppl.infer(many_inputs.bought, beginning, ".", lm=LM, method="exact")
    assert exact.probs("thing") != pytest.approx(prior.probs("thing"), abs=1e-2)


@pytest.mark.long
def test_it_goes_on_where_it_was_killed(tmp_path):
    LM.model.save_pretrained(tmp_path / "lm")
    LM.tokenizer.save_pretrained(tmp_path / "lm")
    rows = [{**row, "key": i} for i, row in enumerate(many_inputs.inputs()[:120])]
    rows[7]["ending"] = "?"  # the tokenizer has none
    (tmp_path / "inputs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    out = tmp_path / "answers"
    command = [
        sys.executable, many_inputs.__file__, "--inputs", str(tmp_path / "inputs.jsonl"), "--out",
        str(out), "--model", str(tmp_path / "lm"), "--dtype", "float32", "--batch-size", "2",
    ]  # fmt: skip
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with open(tmp_path / "log", "w") as log:
        first = subprocess.Popen(
            [*command, "--actors", "2"], stdout=log, stderr=log, start_new_session=True
        )
        try:
            while len(list(out.glob("*.parquet"))) < 3:
                assert first.poll() is None, Path(log.name).read_text()
                time.sleep(0.02)
            first.kill()
            first.wait()
        finally:  # what it has started dies with it; but if it does not
            with contextlib.suppress(ProcessLookupError):
                os.killpg(first.pid, signal.SIGKILL)
    time.sleep(3)
    files = {path: path.stat().st_mtime_ns for path in out.glob("*.parquet")}
    assert 3 <= len(files) < 60
    done = subprocess.run([*command, "--actors", "1"], check=True, **options)
    assert f"120 answers in {out}, 1 of them errors" in done.stdout
    assert files.items() <= {path: path.stat().st_mtime_ns for path in out.iterdir()}.items()
    answers = {row["key"]: row for row in pq.read_table(out).to_pylist()}
    assert len(answers) == pq.read_table(out).num_rows == 120
    assert [key for key, row in answers.items() if row["error"]] == [7]
    inputs = [(row["beginning"], row["ending"]) for row in rows]
    posteriors = lmppl.infer_batch(many_inputs.bought, inputs, lm=LM, seed=0, on_error="return")
    for key, posterior in enumerate(posteriors):
        if key != 7:
            assert answers[key]["log_evidence"] == pytest.approx(posterior.log_evidence, abs=1e-3)
            assert answers[key]["texts"][0] == str(posterior.best("thing"))
