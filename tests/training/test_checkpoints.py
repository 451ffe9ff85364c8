"""Checkpoints: a resumed run ends as an unbroken one, and none but the same run is resumed."""

import functools
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from guide_helpers import LM, QUICK, equal, infill, new_guide, weights
from peft import LoraConfig
from safetensors import SafetensorError

import lmppl
from lmppl import lm_sample
from lmppl.testing import tiny_lm
from lmppl.testing.programs import CASES
from lmppl.training.fingerprints import digest_of, program_fingerprint


def run(path, steps=9, program=infill, data=None, **options):
    guide = new_guide(program)
    data = data if data is not None else [("ab.", "a"), ("ab.", "b"), ("ba", "ab")]
    settings = {"checkpoint": path, "checkpoint_every": 3, "inputs_per_step": 2, **QUICK}
    guide.fit(data, steps=steps, **(settings | options))
    return guide


class _Stop(Exception):
    pass


def interrupted(path, at, **options):
    def stop(figures):
        if figures["step"] == at:
            raise _Stop

    with pytest.raises(_Stop):
        run(path, callback=stop, **options)


LIVES = {
    "vargrad": {},
    "forward": {"forward": 3.0},
    "tb": {"loss": "tb"},
    "ppo": {"loss": "ppo"},
    "simulated": {"simulate": 6, "loss": "wake"},
    "endless": {"simulate": math.inf},
    "early stopping": {"eval_data": [("ab.", "ab")], "eval_every": 2, "patience": 5},
}


@pytest.mark.parametrize("options", LIVES.values(), ids=LIVES)
def test_a_resumed_run_ends_as_an_unbroken_one(options, tmp_path):
    whole = run(tmp_path / "whole", **options)
    interrupted(tmp_path / "broken", 7, **options)
    resumed = run(tmp_path / "broken", resume=True, **options)
    assert equal(weights(resumed), weights(whole))
    assert _timeless(resumed.history) == _timeless(whole.history)


def test_a_resumed_guide_knows_the_sites_that_it_was_trained_on(tmp_path):
    whole = run(tmp_path / "run")
    again = run(tmp_path / "run", resume=True)  # no step is left
    assert list(whole.inner.sites.laws) == ["z"] == list(again.inner.sites.laws)


def _timeless(history):
    return [
        {k: v for k, v in figures.items() if not k.startswith("seconds_") and v == v}
        for figures in history
    ]


@pytest.mark.parametrize("name", ["beta and text", "choices", "tool", "hard constraint"])
def test_a_resumed_run_of_other_programs(name, tmp_path):
    case = CASES[name]

    def fit(path, **options):
        guide = lmppl.LMGuide(case.program, lm=case.lm)
        settings = {"checkpoint": path, "checkpoint_every": 2, **QUICK}
        return guide.fit([case.args], steps=5, **(settings | options))

    def stop(figures):
        if figures["step"] == 3:
            raise _Stop

    whole = fit(tmp_path / "whole")
    with pytest.raises(_Stop):
        fit(tmp_path / "broken", callback=stop)
    resumed = fit(tmp_path / "broken", resume=True)
    assert equal(weights(resumed), weights(whole))


def test_a_resumed_guide_program(tmp_path):
    def fit(path, **options):
        pyro.clear_param_store()
        q = LM.adapter()

        def program(x, y=None):
            z = lm_sample("z", x, max_tokens=2, stop=".", lm=q)
            pyro.param("unused", torch.zeros(2))
            return z

        guide = new_guide(program=program)
        settings = {"checkpoint": path, "checkpoint_every": 2, **QUICK}
        return guide.fit([("ab.", "a")], steps=5, **(settings | options))

    def stop(figures):
        if figures["step"] == 3:
            raise _Stop

    with torch.random.fork_rng():
        torch.manual_seed(0)
        whole = fit(tmp_path / "whole")
        whole_weights = weights(whole)
        torch.manual_seed(0)
        with pytest.raises(_Stop):
            fit(tmp_path / "broken", callback=stop)
        torch.manual_seed(7)  # the adapter's first weights don't matter any more
        resumed = fit(tmp_path / "broken", resume=True)
    assert equal(weights(resumed), whole_weights)
    pyro.clear_param_store()


SCRIPT = """
    import sys, time
    import lmppl
    from lmppl import lm_sample
    from lmppl.testing import tiny_lm, total_variation
    import torch
    torch.set_num_threads(1)

    def infill(x, y=None):
        z = lm_sample("z", x, max_tokens=2, stop=".")
        lm_sample("y", [x, z], max_tokens=2, obs=y)

    path, resume, slow = sys.argv[1], sys.argv[2] == "resume", sys.argv[2] == "slow"

    def report(figures):
        print(figures["step"], flush=True)
        if slow and figures["step"] == 7:
            time.sleep(60)

    guide = lmppl.LMGuide(infill, lm=tiny_lm("ab.", seed=0))
    guide.fit([("ab.", "a"), ("ba", "b")], steps=10, seed=0, batch_size=8, checkpoint=path,
              checkpoint_every=3, resume=resume, progress=False, callback=report)
    guide.save(path + "-guide")
"""


@pytest.mark.slow
def test_a_killed_process_is_resumed_bit_by_bit(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(SCRIPT))

    def call(name, how):
        command = [sys.executable, str(script), str(tmp_path / name), how]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def run_to_end(name, how):
        with call(name, how) as process:
            process.stdout.read()
        assert process.returncode == 0

    run_to_end("whole", "new")
    with call("broken", "slow") as killed:
        for line in killed.stdout:
            if line.strip() == "7":
                killed.send_signal(signal.SIGKILL)
                break
    assert killed.returncode == -signal.SIGKILL
    assert json.loads((tmp_path / "broken" / "checkpoint.json").read_text())["state"]["done"] == 6
    run_to_end("broken", "resume")
    files = ["adapter-0/adapter_model.safetensors", "guide.safetensors"]
    for file in files:
        one, two = ((tmp_path / f"{name}-guide" / file) for name in ("whole", "broken"))
        assert one.read_bytes() == two.read_bytes()


def test_a_checkpoint_is_no_folder_to_write_over(tmp_path):
    run(tmp_path / "run", steps=1)
    with pytest.raises(FileExistsError, match="resume=True goes on with the run in it"):
        run(tmp_path / "run", steps=1)
    (tmp_path / "thesis").mkdir()
    with pytest.raises(FileExistsError):
        run(tmp_path / "thesis", steps=1)


def other(x, y=None):
    z = lm_sample("z", x, max_tokens=2, stop=".")
    lm_sample("y", [z, x], max_tokens=2, obs=y)


@pytest.mark.parametrize(
    "change, what",
    [
        ({"program": other}, "program"),
        ({"data": [("ab.", "a"), ("ab.", "b"), ("ba", "bb")]}, "data"),
        ({"steps": 4}, "number of steps"),
        ({"batch_size": 10}, "option batch_size"),
        ({"seed": 1}, "seed"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_checkpoint_of_another_run_is_refused(change, what, tmp_path):
    run(tmp_path / "run", steps=3)
    with pytest.raises(ValueError, match=f"belongs to another run, its {what} differs"):
        run(tmp_path / "run", resume=True, **({"steps": 3} | change))


def test_the_checkpoint_of_another_model_or_version_is_refused(tmp_path):
    run(tmp_path / "run", steps=3)
    guide = lmppl.LMGuide(infill, lm=tiny_lm("ab.", seed=1))
    settings = {"checkpoint_every": 3, "inputs_per_step": 2, "resume": True, **QUICK}
    data = [("ab.", "a"), ("ab.", "b"), ("ba", "ab")]
    with pytest.raises(ValueError, match="its language model differs"):
        guide.fit(data, steps=3, checkpoint=tmp_path / "run", **settings)
    file = tmp_path / "run" / "checkpoint.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 99}))
    with pytest.raises(ValueError, match="has format 99; this version of lmppl reads"):
        run(tmp_path / "run", steps=3, resume=True)


def test_the_checkpoint_of_another_adapter_is_refused(tmp_path):
    run(tmp_path / "run", steps=3)
    guide = new_guide(lora=LoraConfig(r=16, lora_alpha=8, target_modules="all-linear"))
    settings = {"checkpoint_every": 3, "inputs_per_step": 2, "resume": True, **QUICK}
    data = [("ab.", "a"), ("ab.", "b"), ("ba", "ab")]
    with pytest.raises(ValueError, match="its adapters differs"):
        guide.fit(data, steps=3, checkpoint=tmp_path / "run", **settings)


def test_a_full_disk_stops_nothing_and_keeps_the_checkpoint(tmp_path, monkeypatch):
    run(tmp_path / "run", steps=3)
    before = (tmp_path / "run" / "checkpoint.json").read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lmppl.states.save_file", full)
    guide = new_guide()
    (tmp_path / "other").mkdir()
    with pytest.warns(UserWarning, match="could not be written .*No space left.*goes on"):
        guide.fit(
            [("ab.", "a")],
            steps=4,
            checkpoint=tmp_path / "other" / "run",
            checkpoint_every=3,
            **QUICK,
        )
    assert len(guide.history) == 4
    assert list((tmp_path / "other").iterdir()) == []  # nothing half-written is left
    assert (tmp_path / "run" / "checkpoint.json").read_bytes() == before


def test_resume_needs_a_place_and_a_seed():
    with pytest.raises(ValueError, match="resume=True needs checkpoint="):
        new_guide().fit([("ab.", "a")], steps=1, resume=True, **QUICK)
    with pytest.raises(ValueError, match="resume=True needs seed="):
        new_guide().fit([("ab.", "a")], steps=1, resume=True, checkpoint="x", batch_size=8)


def test_nothing_to_resume_is_a_new_run(tmp_path):
    assert equal(
        weights(run(tmp_path / "one", steps=3, resume=True)),
        weights(run(tmp_path / "two", steps=3)),
    )


def test_a_run_that_stopped_early_is_not_resumed(tmp_path, monkeypatch):
    values = itertools.chain([0.2, 0.5, 0.4, 0.3], itertools.repeat(0.9))
    monkeypatch.setattr(
        "lmppl.training.evaluation.evaluate", lambda *args, **kw: {"eval_ess": next(values)}
    )
    options = {"steps": 50, "eval_data": [("ab.", "b")], "eval_every": 2, "patience": 2}
    stopped = run(tmp_path / "run", **options)
    resumed = run(tmp_path / "run", resume=True, **options)
    assert len(stopped.history) == len(resumed.history) == 8
    assert resumed.notes == stopped.notes and len(resumed.notes) == 1
    assert equal(weights(resumed), weights(stopped))


def test_the_end_of_a_stream_is_saved(tmp_path):
    def stream():
        return iter([("ab.", "a"), ("ab.", "b"), ("ab.", "ab"), ("ba", "b")])

    with pytest.warns(UserWarning, match="the data ended after 2"):
        whole = run(tmp_path / "run", data=stream())
    assert json.loads((tmp_path / "run" / "checkpoint.json").read_text())["state"]["done"] == 2
    with pytest.warns(UserWarning, match="the data ended after 2"):
        resumed = run(tmp_path / "run", data=stream(), resume=True)
    assert len(resumed.history) == 2 and equal(weights(resumed), weights(whole))


def test_an_error_of_safetensors_stops_nothing(tmp_path, monkeypatch):
    """What it raises where it cannot write is no ``OSError``."""

    def full(*args, **kwargs):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("lmppl.states.save_file", full)
    with pytest.warns(UserWarning, match="could not be written .*No space left.*goes on"):
        guide = run(tmp_path / "run", steps=2)
    assert len(guide.history) == 2 and list(tmp_path.iterdir()) == []


FILES = ["checkpoint.json", "checkpoint.safetensors", "guide/guide.json"]
FILES += ["guide/guide.safetensors", "guide/adapter-0/adapter_config.json"]
FILES += ["guide/adapter-0/adapter_model.safetensors"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    run(folder, steps=2)
    return folder


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("how", ["shorter", "edited"])
def test_a_damaged_checkpoint_is_refused_by_the_name_of_the_file(file, how, checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "run")
    content = (tmp_path / "run" / file).read_bytes()
    edited = content.replace(b"16", b"17").replace(b"0", b"1")
    assert content != edited
    (tmp_path / "run" / file).write_bytes(content[:-10] if how == "shorter" else edited)
    with pytest.raises(ValueError, match=f"{file} was damaged or edited"):
        run(tmp_path / "run", steps=2, resume=True)


def test_a_checkpoint_is_found_where_an_interruption_left_it(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / ".run.old")
    (tmp_path / ".run.0.new").mkdir()  # half written
    again = run(tmp_path / "run", steps=2, resume=True)
    assert len(again.history) == 2  # and none of them again
    with pytest.raises(FileExistsError, match="resume=True goes on with the run in it"):
        run(tmp_path / "run", steps=2)


def test_what_an_interruption_left_is_put_back_by_the_next_checkpoint(tmp_path):
    whole = run(tmp_path / "whole", steps=4)
    interrupted(tmp_path / "broken", 3, steps=4)  # after the checkpoint of 3 steps
    os.replace(tmp_path / "broken", tmp_path / ".broken.old")
    (tmp_path / ".broken.0.new").mkdir()
    os.utime(tmp_path / ".broken.0.new", (0, 0))  # by now nobody writes to it any more
    resumed = run(tmp_path / "broken", steps=4, resume=True)
    assert equal(weights(resumed), weights(whole))
    assert sorted(os.listdir(tmp_path)) == ["broken", "whole"]


def test_a_learned_log_z_reads_the_same_state_when_resumed(tmp_path):
    """The first text's prompt depends on what was drawn before it."""

    def program(x, y):
        k = pyro.sample("k", dist.Bernoulli(0.5))
        lm_sample("z", "a." if k else x, max_tokens=2, stop=".")

    options = {"program": program, "data": [("b", "")], "loss": "tb", "seed": 3}
    whole = run(tmp_path / "whole", **options)
    interrupted(tmp_path / "broken", 4, **options)
    resumed = run(tmp_path / "broken", resume=True, **options)
    assert equal(weights(resumed), weights(whole))


def test_inputs_of_a_resumed_endless_stream_keep_their_numbers():
    from lmppl.training.inputs import Stream

    class One:
        index = 0

    stream = Stream((One() for _ in itertools.count()), skip=lambda num: None)
    stream.load_state_dict({"taken": 5})
    assert [each.index for each in stream.next(2)] == [5, 6]


def test_what_belongs_to_another_guide_is_not_resumed(tmp_path):
    run(tmp_path / "run", steps=3)
    guide = new_guide(condition_on=["y"])
    with pytest.raises(ValueError, match="its condition_on differs"):
        guide.fit(
            [("ab.", "a"), ("ab.", "b"), ("ba", "ab")],
            steps=3, inputs_per_step=2, checkpoint=tmp_path / "run", resume=True, **QUICK,
        )  # fmt: skip


def made(max_tokens, reward):
    def program(x, y):
        z = lm_sample("z", [x, y], max_tokens=max_tokens, stop=".")
        pyro.factor("reward", torch.tensor(_times(reward) * z.count("a")))

    return program


def _times(reward):
    return 2.0 * reward


def test_what_a_program_closes_over_and_calls_makes_it_the_one_that_it_is(tmp_path, monkeypatch):
    run(tmp_path / "run", steps=3, program=made(2, 1.0))
    again = run(tmp_path / "run", steps=3, program=made(2, 1.0), resume=True)
    assert len(again.history) == 3
    for other in (made(3, 1.0), made(2, -5.0)):
        with pytest.raises(ValueError, match="its program differs"):
            run(tmp_path / "run", steps=3, program=other, resume=True)
    monkeypatch.setitem(globals(), "_times", lambda reward: 3.0 * reward)
    with pytest.raises(ValueError, match="its program differs"):
        run(tmp_path / "run", steps=3, program=made(2, 1.0), resume=True)


class _Programs:
    step = 1

    def first(self, x, y):
        return lm_sample("z", [x, y], max_tokens=2)

    def second(self, x, y):
        return lm_sample("z", [x, y], max_tokens=3)

    second.__qualname__, second.__name__ = first.__qualname__, "first"

    def __call__(self, x, y):
        return x.step


step = 1  # of no program, though one has an attribute of that name


def swapped(program, order):
    @functools.wraps(program)
    def wrapper(x, y):
        return program(*(x, y)[::order])

    return wrapper


def test_what_makes_a_program_another_one(monkeypatch):
    programs = _Programs()
    prints = {
        program_fingerprint(each)
        for each in (
            programs, programs.first, programs.second, infill, swapped(infill, 1),
            swapped(infill, -1), functools.partial(infill, y="a"), functools.partial(infill, y="b"),
        )
    }  # fmt: skip
    assert len(prints) == 8
    assert program_fingerprint(swapped(infill, 1)) == program_fingerprint(swapped(infill, 1))
    before = program_fingerprint(programs)
    monkeypatch.setitem(globals(), "step", 2)
    assert program_fingerprint(programs) == before


def test_integers_of_numpy_are_integers(tmp_path):
    run(tmp_path / "run", steps=3, batch_size=np.int64(8))
    run(tmp_path / "run", steps=3, batch_size=8, resume=True)


def test_a_program_that_wraps_itself_has_a_fingerprint():
    def program(x, y):
        return lm_sample("z", [x, y], max_tokens=2)

    program.__wrapped__ = program
    assert program_fingerprint(program) == program_fingerprint(program)


def test_odd_data_has_a_digest():
    cyclic = [1]
    cyclic.append(cyclic)
    odd = [
        cyclic, torch.eye(3).to_sparse(), torch.zeros(2, dtype=torch.bfloat16), torch.tensor(1.0),
        np.ones(2), np.zeros(2), {"a": torch.ones(2)}, object(), frozenset({"a", "b"}), b"a", None,
    ]  # fmt: skip
    assert len({digest_of(each) for each in odd}) == len(odd)
    assert digest_of(torch.ones(2)) == digest_of(torch.ones(2)) != digest_of(torch.ones(2, 1))


def test_a_program_that_counts_its_calls_is_resumed(tmp_path):
    calls = 0

    def tick():
        nonlocal calls
        calls += 1

    def program(x, y):
        tick()
        assert calls
        lm_sample("z", [x, y], max_tokens=2, stop=".")

    run(tmp_path / "run", steps=3, program=program)
    assert calls > 0
    run(tmp_path / "run", steps=3, program=program, resume=True)


def test_other_demonstrations_and_arguments_to_simulate_on_are_another_run(tmp_path):
    sft = {"loss": "sft", "data": [("ab.", "a")], "steps": 3}
    run(tmp_path / "one", demonstrations=[{"z": "a."}], **sft)
    run(tmp_path / "one", demonstrations=[{"z": "a."}], resume=True, **sft)
    with pytest.raises(ValueError, match="its data differs"):
        run(tmp_path / "one", demonstrations=[{"z": "bb"}], resume=True, **sft)
    endless = {"simulate": math.inf, "steps": 3}
    run(tmp_path / "two", data=[("ab.", "a")], **endless)
    run(tmp_path / "two", data=[("ab.", "a")], resume=True, **endless)
    with pytest.raises(ValueError, match="its arguments to simulate on differs"):
        run(tmp_path / "two", data=[("ba", "a")], resume=True, **endless)


@pytest.mark.slow
def test_a_fingerprint_does_not_depend_on_the_process():
    script = """
        import functools
        from lmppl.training.fingerprints import program_fingerprint
        def program(x, n=1): return x in {"a", "b", "c", "dd", "eee"}
        print(program_fingerprint(program))
        print(len({program_fingerprint(functools.partial(program, n=n)) for n in (2, 3)}))
    """
    found = {
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)],
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in range(2)
    }  # fmt: skip
    assert len(found) == 1 and found.pop().endswith("\n2\n")
