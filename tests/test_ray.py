"""``lmppl.ray``: a row an input, by Ray Data.

The first part needs no Ray cluster: it calls what actors call. The second starts one of two processors
on this machine.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from ray import cloudpickle

import lmppl
import lmppl.ray
from lmppl import lm_sample
from lmppl.ray import folder as folders
from lmppl.ray.folder import Folder
from lmppl.ray.rows import ANSWER, seed_of
from lmppl.runtime import nth_seed
from lmppl.testing import tiny_lm

LM = tiny_lm("ab.", seed=0)

# Ray Data warns of settings that it makes itself.
pytestmark = pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\.")


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    """The folder of a language model."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    LM.model.save_pretrained(folder)
    LM.tokenizer.save_pretrained(folder)
    return folder


def infill(x: str, y: str | None = None):
    z = lm_sample("z", x, max_tokens=3, stop=".")
    lm_sample("y", [x, z], max_tokens=None if y else 2, obs=y)
    return z


def inferring(program, **options):
    """In float32, so that answers are equal to rounding."""
    return lmppl.ray.Infer(program, **{"dtype": "float32", **options})


def rows_of(number, first=0):
    endings = ("aba", "ab", "b", "bb.", "a", "abb", "ba")
    return [{"key": i, "x": "ab.", "y": endings[i % 7]} for i in range(first, first + number)]


def answered(infer, rows):
    """The answers of some rows, in one batch, without Ray."""
    return infer()(pa.Table.from_pylist(rows)).to_pylist()


def assert_same(answers, others):
    """Equal to rounding, in any order."""
    ordered = [sorted(found, key=lambda row: str(row["key"])) for found in (answers, others)]
    assert [row["key"] for row in ordered[0]] == [row["key"] for row in ordered[1]]
    for one, other in zip(*ordered, strict=True):
        for name in ("num_samples", "notes", "seed", "error"):
            assert one[name] == other[name], name
        for name in ("log_evidence", "log_evidence_stderr", "ess"):
            assert one[name] == pytest.approx(other[name], abs=1e-4), name
        shares = [
            dict(zip(a["texts"] or (), a["weights"] or (), strict=True)) for a in (one, other)
        ]
        assert shares[0] == pytest.approx(shares[1], abs=1e-4)


# --- rows ------------------------------------------------------------------------------------------


def test_an_answer_is_what_the_posterior_says(lm):
    infer = inferring(infill, lm=lm, num_samples=20, seed=3, top=2, method="importance")
    rows = [{**row, "key": f"row {row['key']}"} for row in rows_of(3)]
    table = infer()(pa.Table.from_pylist(rows))
    assert table.column_names == ["key", "x", "y", *ANSWER.names]
    assert pa.schema([table.schema.field(name) for name in ANSWER.names]) == ANSWER
    for row, answer in zip(rows, table.to_pylist(), strict=True):
        assert {name: answer[name] for name in row} == row and answer["error"] is None
        posterior = lmppl.infer(
            infill,
            row["x"],
            row["y"],
            lm=LM,
            method="importance",
            num_samples=20,
            seed=answer["seed"],
        )
        for name in ("log_evidence", "log_evidence_stderr", "ess"):
            assert answer[name] == pytest.approx(getattr(posterior, name), abs=1e-4)
        best = list(posterior.probs("z").items())[:2]
        assert answer["texts"] == [str(text) for text, _ in best]
        assert answer["weights"] == pytest.approx([weight for _, weight in best], abs=1e-4)
        assert answer["num_samples"] == 20 and answer["notes"] == []


def test_a_split_run_is_the_whole_one_and_that_of_infer_batch(lm):
    infer = inferring(infill, lm=lm, num_samples=20, seed=3)
    rows = rows_of(7)
    whole = answered(infer, rows)
    assert_same(whole, answered(infer, rows[4:]) + answered(infer, rows[3:4] + rows[:3]))
    inputs = [(row["x"], row["y"]) for row in rows]
    for answer, posterior in zip(
        whole, lmppl.infer_batch(infill, inputs, lm=LM, num_samples=20, seed=3), strict=True
    ):
        assert answer["log_evidence"] == pytest.approx(posterior.log_evidence, abs=1e-4)
        assert answer["seed"] == posterior.info["seed"]
    other = answered(inferring(infill, lm=lm, num_samples=20, seed=4), rows)
    assert all(a["ess"] != b["ess"] for a, b in zip(whole, other, strict=True))


def test_seeds_are_those_of_keys_in_every_process():
    assert [seed_of(5, key) for key in range(3)] == [nth_seed(5, i) for i in range(3)]
    assert seed_of(0, "a") == 4599713599639652158
    assert seed_of(0, -1) != seed_of(0, 1) and seed_of(0, "1") != seed_of(0, 1)
    assert len({seed_of(0, f"{i}") for i in range(1000)}) == 1000


def test_batches_may_be_of_numpy_and_pandas(lm):
    """As ``map_batches`` gives them, where nobody says otherwise."""
    actor = inferring(infill, lm=lm, num_samples=5, site="z")()
    rows = [*rows_of(2), {"key": 2, "x": "b.", "y": None}]
    expected = actor(pa.Table.from_pylist(rows)).to_pylist()
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    arrays = {"key": np.array(columns["key"]), "x": np.array(columns["x"])}
    arrays["y"] = np.array(columns["y"], dtype=object)
    assert_same(actor(arrays).to_pylist(), expected)
    assert_same(actor(pd.DataFrame(columns)).to_pylist(), expected)


def test_what_is_null_is_left_to_the_default(lm):
    infer = inferring(infill, lm=lm, num_samples=5, on_error="return", site="z")
    rows = [{"key": 0, "x": "ab.", "y": None}, {"key": 1, "x": None, "y": "a"}]
    first, second = answered(infer, rows)
    (alone,) = answered(infer, [{"key": 0, "x": "ab."}])
    assert_same([first], [alone])
    assert "missing a required argument: 'x'" in second["error"] and second["texts"] is None


def test_an_input_that_fails_is_told_and_the_others_unharmed(lm):
    rows = rows_of(3)
    rows[1]["y"] = "no such letters"
    infer = inferring(infill, lm=lm, num_samples=5, on_error="return")
    answers = answered(infer, rows)
    assert answers[1]["error"].startswith(
        "ValueError: the tokenizer cannot encode 'no such letters'"
    )
    assert answers[1]["seed"] == nth_seed(0, 1) and answers[1]["ess"] is None
    assert_same([answers[0], answers[2]], answered(infer, [rows[0], rows[2]]))
    raising = inferring(infill, lm=lm, num_samples=5)
    with pytest.raises(
        RuntimeError, match=r"key=1 failed on node .*cannot encode.*on_error='return'"
    ) as e:
        answered(raising, rows)
    assert socket.gethostname() in str(e.value)


def test_all_samples_dead_is_an_error_of_the_input(lm):
    def program(x):
        lmppl.require("never", lm_sample("z", "a", max_tokens=1) == x)

    (answer,) = answered(
        inferring(program, lm=lm, num_samples=3, on_error="return"), [{"key": 0, "x": "no"}]
    )
    assert answer["error"].startswith("ZeroEvidenceError: all 3 samples")


def two_texts(x: str):
    a = lm_sample("a", x, choices=["a", "b"])
    return a, lm_sample("b", [x, a], choices=["a", "b"])


def test_of_several_sites_one_is_said(lm):
    rows = [{"key": 0, "x": "ab."}]
    with pytest.raises(
        RuntimeError, match="two_texts has the sites a, b: say what is to be ranked"
    ):
        answered(inferring(two_texts, lm=lm, method="exact"), rows)
    exact = lmppl.infer(two_texts, "ab.", lm=LM, method="exact")
    (answer,) = answered(inferring(two_texts, lm=lm, method="exact", site="b"), rows)
    assert answer["weights"] == pytest.approx(list(exact.probs("b").values()))
    both = inferring(two_texts, lm=lm, method="exact", site=lambda v: v["a"] + v["b"])
    (answer,) = answered(both, rows)
    assert sum(answer["weights"]) == pytest.approx(1) and len(answer["texts"][0]) == 2


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"id": 1, "x": "a"}], "no column 'key' .key=.* Columns: id, x"),
        ([{"key": None, "x": "a"}, {"key": 1, "x": "a"}], "row 0 has no 'key'"),
        ([{"key": 1.5, "x": "a"}], "holds double: keys are whole numbers or strings"),
        ([{"key": True, "x": "a"}], "holds bool"),
        ([{"key": "s", "x": "a"}] * 2, "several rows have the 'key' 's'"),
        ([{"key": 1, "x": "a", "why": "b"}], "infill has no argument 'why'.*arguments="),
        ([{"key": 1, "x": "a", "ess": 2.0}], "columns .'ess'., which answers have too"),
    ],
)
def test_rows_that_do_not_fit_are_refused(lm, rows, says):
    infer = inferring(infill, lm=lm, num_samples=2, on_error="return")
    with pytest.raises((ValueError, TypeError), match=says):
        answered(infer, rows)


def test_columns_that_are_no_arguments_are_kept(lm):
    infer = inferring(infill, lm=lm, num_samples=2, arguments=["x"], kwargs={"y": "a"}, key="id")
    (answer,) = answered(infer, [{"id": "r", "x": "ab.", "from": {"book": 3}}])
    assert answer["from"] == {"book": 3} and answer["error"] is None
    with pytest.raises(ValueError, match="no column 'x', which arguments= names"):
        answered(infer, [{"id": "r", "z": "ab."}])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"lm": LM}, "given a LM: each actor loads one of its own"),
        ({"lm": lambda: LM, "dtype": "float32"}, "dtype= and device= go with a name"),
        ({"guide": lmppl.LMGuide(infill, lm=LM)}, "guide.save"),
        ({"ess_treshold": 0.5}, "ess_threshold"),
        ({"method": "sms"}, "did you mean 'smc'"),
        ({"method": "gflownet"}, "would train a guide for every single input"),
        ({"num_samples": 0}, "num_samples=0"),
        ({"seed": -1}, "seed=-1"),
        ({"top": 0}, "top=0"),
        ({"on_error": "skip"}, "on_error='skip'"),
        ({"arguments": "x"}, "a list of names"),
        ({"site": 3}, "site must be a function"),
    ],
)
def test_what_cannot_be_inferred_is_refused_at_once(options, says):
    with pytest.raises((ValueError, TypeError), match=says):
        lmppl.ray.Infer(infill, **{"lm": "smollm2-135m-instruct", **options})


# --- actors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["/no/such/folder", "smollm3", None])
def test_a_language_model_that_a_node_cannot_load_names_both(source):
    def fetch_mine():
        raise OSError("the disk is gone")

    infer = inferring(infill, lm=source or fetch_mine, dtype=None)
    with pytest.raises(RuntimeError, match="cannot load the language model") as error:
        infer()
    assert (source or "fetch_mine") in str(error.value)
    assert f"node {socket.gethostname()}" in str(error.value)


def test_a_guide_is_loaded_from_its_folder(lm, tmp_path):
    guide = lmppl.LMGuide(infill, lm=LM)
    guide.fit([("ab.", "aba")], steps=1, batch_size=4, seed=0, progress=False)
    guide.save(tmp_path / "guide")
    infer = inferring(infill, lm=lm, guide=tmp_path / "guide", num_samples=10)
    (answer,) = answered(infer, rows_of(1))
    posterior = lmppl.infer(
        infill, "ab.", "aba", lm=LM, guide=guide, num_samples=10, seed=answer["seed"]
    )
    assert answer["log_evidence"] == pytest.approx(posterior.log_evidence, abs=1e-4)
    with pytest.raises(RuntimeError, match="cannot load the guide '/nowhere'"):
        inferring(infill, lm=lm, guide="/nowhere")()


def test_what_is_sent_to_actors_is_small_and_holds_no_model(lm):
    infer = inferring(infill, lm=lm, num_samples=3)
    sent = cloudpickle.dumps(infer)
    assert len(sent) < 10_000 and isinstance(infer, type)
    assert_same(answered(pickle.loads(sent), rows_of(2)), answered(infer, rows_of(2)))


def test_without_ray_the_error_says_what_to_install():
    code = "import sys; sys.modules['ray'] = None; import lmppl; import lmppl.ray"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (
        "ImportError: lmppl.ray needs Ray Data and pyarrow: pip install 'lmppl-pyro[ray]'"
        in done.stderr
    )


# --- folders ---------------------------------------------------------------------------------------


def answers_of(*keys):
    return pa.table({"key": list(keys), "error": pa.nulls(len(keys), pa.string())})


def test_a_folder_knows_what_is_answered(tmp_path):
    folder = Folder(tmp_path / "new" / "answers", "key", {"seed": 0})
    assert folder.keys() == set()
    folder.write(answers_of("a", "b"))
    folder.write(answers_of("c"))
    folder.write(answers_of("a", "b"))  # of an actor that was started again
    assert folder.keys() == {"a", "b", "c"}
    (tmp_path / "new" / "answers" / ".half.new").write_bytes(b"PAR1")
    assert Folder(f"file://{tmp_path}/new/answers", "key", {"seed": 0}).keys() == {"a", "b", "c"}
    with pytest.raises(
        ValueError, match="was answered with seed=0, given 1: choose another folder"
    ):
        Folder(tmp_path / "new" / "answers", "key", {"seed": 1}).keys()
    folder.write(answers_of("c", "d"))
    with pytest.raises(ValueError, match="key='c' is in .*parquet and in .*parquet: two runs"):
        folder.keys()


def test_a_folder_knows_who_died(tmp_path):
    folder = Folder(tmp_path / "new", "key", {})
    with pytest.raises(ValueError, match="an error"), folder.attempt("row", [1]) as deaths:
        assert deaths == 0
        raise ValueError("an error is no death")
    dead = [folder.attempt("row", [1]) for _ in range(3)]  # they do not come to the end of it
    assert [attempt.__enter__() for attempt in dead] == [0, 1, 2]
    with folder.attempt("batch", [1]) as of_batch, folder.attempt("row", [2]) as of_other:
        assert (of_batch, of_other) == (0, 0)
    with Folder(tmp_path / "new", "key", {}).attempt("row", [1]) as of_other_run:
        assert of_other_run == 0
    assert len(list((tmp_path / "new").iterdir())) == 3 and folder.keys() == set()
    with folder.attempt("row", [1]) as deaths:
        assert deaths == 3
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot write .*/file/.*begun: "):
        Folder(tmp_path / "file", "key", {}).attempt("row", [1]).__enter__()
    dead[0] = folder.attempt("row", [1])
    dead[0].__enter__()
    Folder(tmp_path / "new", "key", {}).forget_attempts()
    assert list((tmp_path / "new").iterdir()) == []


def test_settings_are_those_of_a_later_run_of_the_script():
    def settings(**options):
        infer = inferring(infill, lm="a", **options)
        return json.loads(json.dumps(infer.settings.described()))

    engine = lmppl.SMC(ess_threshold=0.5)
    assert settings(method=engine) == settings(method=lmppl.SMC(ess_threshold=0.5))
    told = [
        settings(), settings(seed=1), settings(num_samples=3), settings(method=engine),
        settings(method=lmppl.SMC(ess_threshold=0.6)), settings(ess_threshold=0.6),
        settings(kwargs={"y": "a"}), settings(site="z"), settings(dtype=torch.bfloat16),
    ]  # fmt: skip
    assert len({json.dumps(each) for each in told}) == len(told)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_leaves_nothing_of_a_batch(tmp_path, monkeypatch):
    folder = Folder(tmp_path, "key", {})
    file = Path(folder.write(answers_of("a")))

    class Known:
        hex = "known"

    monkeypatch.setattr(folders, "uuid4", Known)
    name = Path(folder.write(answers_of("b"))).stem
    (tmp_path / f"{name}.parquet").unlink()
    (tmp_path / f".{name}.known.new").symlink_to("/dev/full")
    with pytest.raises(OSError, match=f"cannot write .*{name}.parquet: .*No space left") as error:
        folder.write(answers_of("b"))
    assert error.value.__cause__.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == [file] and folder.keys() == {"a"}


# --- a cluster -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster():
    """Ray on this machine, with two processors."""
    try:
        ray.init(  # a new one, whatever cluster there may be
            "local", num_cpus=2, include_dashboard=False, object_store_memory=100 << 20,
            log_to_driver=False,
        )  # fmt: skip
        ray.data.DataContext.get_current().enable_progress_bars = False
        cloudpickle.register_pickle_by_value(sys.modules[__name__])  # actors cannot import it
        yield
    finally:
        ray.shutdown()


def data(rows):
    return ray.data.from_items(rows, override_num_blocks=1)


def killed_once(x: str, y: str, notes: str):
    """The process that first comes to a certain input dies; all others leave a note."""
    marker = Path(notes, "killed")
    if y == "bb." and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    Path(notes, f"threads {torch.get_num_threads()}").touch()
    Path(notes, f"x {x}").touch()
    return infill(x, y)


@pytest.mark.slow
def test_nothing_is_lost_and_nothing_twice(cluster, lm, tmp_path):
    """Two actors, of which one is killed; then one actor, with other batches, for what is new."""
    notes, out = tmp_path / "notes", tmp_path / "answers"
    notes.mkdir()
    rows = rows_of(11)
    rows[5]["y"] = "no such letters"
    options = {"num_samples": 20, "seed": 3, "on_error": "return"}
    infer = inferring(killed_once, lm=lm, kwargs={"notes": str(notes)}, **options)
    lmppl.ray.run(infer, data(rows[:8]), concurrency=2, batch_size=3, folder=out)
    assert {path.name for path in notes.iterdir()} == {"killed", "threads 1", "x ab."}
    files = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert sorted(pq.read_table(file).num_rows for file in files) == [2, 3, 3]
    rows[8:] = [{**row, "x": "ba."} for row in rows[8:]]
    (notes / "x ab.").unlink()
    answers = lmppl.ray.run(infer, data(rows), batch_size=2, folder=out)
    assert (notes / "x ba.").exists() and not (notes / "x ab.").exists()
    assert files.items() <= {path: path.stat().st_mtime_ns for path in out.iterdir()}.items()
    assert_same(answers.take_all(), answered(inferring(infill, lm=lm, **options), rows))
    assert len(list(out.iterdir())) == 5
    for row in pq.read_table(out).to_pylist():
        assert (row["error"] is not None) == (row["key"] == 5)


@pytest.mark.slow
def test_map_batches_takes_it_as_it_is(cluster, lm):
    infer = inferring(infill, lm=lm, num_samples=5)
    rows = rows_of(5)
    answers = data(rows).map_batches(infer, concurrency=1, batch_size=2).take_all()
    assert_same(answers, answered(infer, rows))
    with pytest.raises(
        ray.exceptions.RayError, match="cannot load the language model '/no/folder'"
    ):
        lost = inferring(infill, lm="/no/folder")
        lmppl.ray.run(lost, data(rows)).take_all()


@pytest.mark.slow
def test_rows_are_looked_over_before_anything_is_loaded(cluster, tmp_path):
    infer = inferring(infill, lm="/no/folder")
    twice = ray.data.from_items([*rows_of(4), *rows_of(1)], override_num_blocks=5)
    with pytest.raises(ValueError, match="several rows have the 'key' 0"):
        lmppl.ray.run(infer, twice)
    with pytest.raises(ValueError, match="has no argument 'why'"):
        lmppl.ray.run(infer, ray.data.from_items([rows_of(1)[0], {"key": 1, "why": "a"}]))
    (tmp_path / "a.json").write_text('{"key": 1, "x": "a"}\n{"key": 2, "x": "b"}\n')
    (tmp_path / "b.json").write_text('{"key": 3, "x": "b", "why": 1.5}\n')
    with pytest.raises(ValueError, match="has no argument 'why'"):
        lmppl.ray.run(
            infer, ray.data.read_json([str(tmp_path / "a.json"), str(tmp_path / "b.json")])
        )
    with pytest.raises(ValueError, match="the data set has no rows"):
        lmppl.ray.run(infer, data(rows_of(2)).limit(0))
    with pytest.raises(TypeError, match="ray.data.from_items"):
        lmppl.ray.run(infer, rows_of(2))
    with pytest.raises(TypeError, match="run takes lmppl.ray.Infer"):
        lmppl.ray.run(infill, data(rows_of(2)))
    Folder(tmp_path / "out", "key", infer.settings.described()).write(answers_of(0, 1))
    assert lmppl.ray.run(infer, data(rows_of(2)), folder=tmp_path / "out").count() == 2


def full(*args: object, **options: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def filling(x: str, y: str):
    """From a certain input on, the disk of its process is full."""
    if y == "bb.":
        pq.write_table = full
    return infill(x, y)


@pytest.mark.long
def test_a_full_disk_names_file_and_node_and_keeps_what_is_written(cluster, lm, tmp_path):
    infer = inferring(filling, lm=lm, num_samples=5)
    with pytest.raises(ray.exceptions.RayError, match="No space left on device") as error:
        lmppl.ray.run(infer, data(rows_of(6)), batch_size=2, folder=tmp_path / "out")
    assert f"node {socket.gethostname()} (" in str(error.value)
    assert f"cannot write {tmp_path}/out/" in str(error.value)
    (file,) = (tmp_path / "out").iterdir()
    assert pq.read_table(file)["key"].to_pylist() == [0, 1]


@pytest.mark.long
def test_an_input_that_fails_ends_the_run_by_its_key(cluster, lm):
    rows = rows_of(2)
    rows[1]["y"] = "no such letters"
    with pytest.raises(ray.exceptions.RayError, match="key=1 failed on node") as error:
        lmppl.ray.run(inferring(infill, lm=lm, num_samples=5), data(rows)).take_all()
    assert "on_error='return'" in str(error.value)


def deadly(x: str, y: str, notes: str):
    """An input that kills its process each time."""
    Path(notes, f"{y} {os.getpid()}").touch()
    if y == "bb.":
        os.kill(os.getpid(), signal.SIGKILL)
    return infill(x, y)


@pytest.mark.long
@pytest.mark.parametrize("on_error", ["return", "raise"])
def test_an_input_that_kills_its_process_does_so_three_times(cluster, lm, tmp_path, on_error):
    notes, out = tmp_path / "notes", tmp_path / "answers"
    notes.mkdir()
    rows, options = rows_of(4), {"num_samples": 5, "seed": 3, "on_error": on_error}
    (at,) = [i for i, row in enumerate(rows) if row["y"] == "bb."]
    infer = inferring(deadly, lm=lm, kwargs={"notes": str(notes)}, **options)

    def answer():
        return lmppl.ray.run(infer, data(rows), batch_size=4, folder=out)

    if on_error == "raise":
        with pytest.raises(ray.exceptions.RayError, match=f"key={at} .*2 processes died"):
            answer()
        assert not [path for path in out.iterdir() if path.suffix == ".parquet"]
    else:
        found = {row["key"]: row for row in answer().take_all()}
        assert found[at]["error"].startswith("RuntimeError: 2 processes died as they answered")
        others = [row for row in rows if row["key"] != at]
        expected = answered(inferring(infill, lm=lm, **options), others)
        assert_same([found[row["key"]] for row in others], expected)
        assert [path.suffix for path in out.iterdir()] == [".parquet"]
    assert len(list(notes.glob("bb. *"))) == 3
