"""The benchmarks of constraints run on a tiny model, and patterns keep their language. No times."""

from __future__ import annotations

import json
import math
import random
import re
import sys

import pytest

import lmppl
from benchmarks import pattern_set, patterns, steering
from benchmarks.pattern_set import Pattern
from lmppl.testing import tiny_lm

REGULAR = [r"^\d{2,3}(?:\.\d+)?$", r"a|ab*", r"(?x) [^\W\d_] . c # a comment", r"^-?[\s.-]{1,2}x$"]
PEER_OF_PATTERNS = """
import json, sys
print(json.dumps({"name": "1.0"}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    answer = {"log_evidence": -1.0 - request["seed"] % 2, "live": 2, "tokens": 6, "seconds": 50.0}
    holds_b = "b" in request["pattern"] or "x62" in request["pattern"]
    if request["sampler"] == "awrs" and not holds_b and request["seed"] == 1:
        answer = {"error": "ValueError: no"}
    print(json.dumps({**answer, "peak_bytes": None}), flush=True)
"""


def test_plain_patterns_keep_their_language():
    generator = random.Random(0)
    for pattern in REGULAR:
        plain, matched = re.compile(pattern_set.plain(pattern)), Pattern(pattern)
        for _ in range(2000):
            text = "".join(generator.choices("abc12_.- \n\u0663", k=generator.randint(0, 4)))
            assert bool(plain.fullmatch(text)) == matched.complete(text), (pattern, text)
    for pattern in (r"(a)\1", r"(?=a)b", r"a(?!b)", r"(?>a|b)c", r"a^b", r"(?i)a", r"\p{L}", "é"):
        with pytest.raises(ValueError, match="pattern|regular|flags|printable"):
            pattern_set.plain(pattern)


def test_a_pattern_knows_what_may_yet_match():
    pattern = Pattern(r"a|ab|(c)\1")
    assert all(map(pattern.allows, ["", "a", "ab", "c", "cc"]))
    assert not any(map(pattern.allows, ["b", "abb", "ca", "é"]))
    assert [t for t in ("", "a", "ab", "c", "cc") if pattern.complete(t)] == ["a", "ab", "cc"]


@pytest.mark.parametrize("kind", ["regex", "predicate"])
def test_patterns(kind, monkeypatch, tmp_path, capsys):
    lm = tiny_lm("ab.", seed=3)
    monkeypatch.setattr(lmppl.LM, "from_pretrained", lambda name, dtype: lm)
    monkeypatch.setattr(patterns, "prompt_of", lambda lm, pattern: "a")
    monkeypatch.setattr(
        patterns, "peer_command", lambda options, lm: [sys.executable, "-c", PEER_OF_PATTERNS]
    )
    (tmp_path / "patterns.csv").write_text('regex\n(a|b)+\n"b{50,}"\na+\n')
    out = tmp_path / "rows.json"
    options = {"patterns": tmp_path / "patterns.csv", "out": out, "kind": kind, "particles": 4}
    options |= {"max-tokens": 4, "seeds": 2, "reference": 400, "genlm-python": sys.executable}
    argv = [f"--{name}={value}" for name, value in options.items()]
    monkeypatch.setattr(sys, "argv", ["patterns", *argv])
    patterns.main()
    rows = {row["pattern"]: row for row in json.loads(out.read_text())}
    assert rows["b{50,}"]["skipped"]
    row = rows["(a|b)+"]
    task = patterns.Task("(a|b)+", kind, 4, 4)
    exact = lmppl.infer(
        patterns.program, "a", 3, {"regex": "[ab]+"}, lm=lm, method="exact", progress=False
    )
    assert row["reference"]["log_evidence"] == pytest.approx(exact.log_evidence, abs=0.1)
    ways = ["masks", "AWRS"] if kind == "regex" else ["AWRS"]
    assert list(row["runs"]) == list(patterns.methods(lm, None, task)) + [
        f"genlm-control, {way}" for way in ways
    ]
    assert [len(runs) for runs in row["runs"].values()] == [2] * len(row["runs"])
    assert rows["a+"]["failed"] == {"genlm-control, AWRS": "ValueError: no"}
    assert list(rows["a+"]["runs"]) == list(row["runs"])[:-1]
    before = out.read_text()
    capsys.readouterr()
    patterns.main()
    assert out.read_text() == before
    *lines, _, note = capsys.readouterr().out.splitlines()
    assert note == (
        "(2 patterns, and 1 that no text of the length matches; genlm-control, AWRS failed on 1)"
    )
    assert len(lines) == 2 + len(row["runs"]) and all(line.startswith("|") for line in lines)
    assert "| 50% | 0 of 2 |" in lines[-1] and "| 0.707 |" in lines[-1]


def test_runs_without_a_live_particle_count():
    runs = [{"log_evidence": None}, {"log_evidence": math.log(3.0)}]
    assert patterns.spread(runs) == math.inf
    assert patterns.relative_error(runs, math.log(2.0)) == pytest.approx(math.sqrt(0.625))
    assert patterns.bias(runs, 0.0) == pytest.approx(math.log(1.5))


def test_steering(monkeypatch, capsys):
    monkeypatch.setattr(lmppl.LM, "from_pretrained", lambda name: tiny_lm("ab.", seed=3))
    monkeypatch.setattr(steering, "CASES", {"a": "b[ab]|a[ab]{2}|a{9}|b{9}"})
    steering.main(["--particles", "50", "--seeds", "3", "--more-tokens", "0", "1"])
    rows = [
        [*map(str.strip, line.split("|"))]
        for line in capsys.readouterr().out.splitlines()
        if "a{9}" in line
    ]
    assert [row[-7] for row in rows] == ["2", "3"]
    assert all(row[-6] == "100%" != row[-5] for row in rows)
