"""Training runs in experiment trackers."""

import math
from pathlib import Path

import pytest
from accelerate import PartialState
from accelerate.logging import get_logger
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from accelerate.utils import LoggerType

import lmppl
from lmppl.testing.programs import CASES
from lmppl.training.tracking import tracker


class Fake(GeneralTracker):
    """Writes down what is asked of it."""

    name = "fake"
    requires_logging_directory = False

    def __init__(self, run_name="", fails=None):
        super().__init__()
        self.calls, self.fails, self.run_name = [], fails, run_name

    @property
    def tracker(self):
        return self.calls

    def _call(self, *call):
        self.calls.append(call)
        if call[0] == self.fails:
            raise RuntimeError(f"cannot {call[0]}")

    def start(self):
        self._call("start")

    def store_init_configuration(self, values):
        self._call("config", values)

    def log(self, values, step=None, **kwargs):
        self._call("log", values, step)

    def finish(self):
        self._call("finish")

    @property
    def names(self):
        return [call[0] for call in self.calls]


def track(log_with, directory=None, config=None):
    return tracker(log_with, directory=directory, name="infill", config=config or {})


# --- what is recorded ----------------------------------------------------------------------------


def test_only_finite_numbers_are_logged():
    fake = Fake()
    with track(fake) as log:
        log({"step": 7, "loss": 0.5, "log_z": -math.inf, "elbo": math.nan, "note": "x"})
        log({"step": 8, "loss": math.nan})
        log({"step": 9, "samples": 8, "eval_ess": 0.25})
    assert [call for call in fake.calls if call[0] == "log"] == [
        ("log", {"loss": 0.5}, 7),
        ("log", {"samples": 8, "eval_ess": 0.25}, 9),
    ]
    assert fake.names == ["start", "config", "log", "log", "finish"]


def test_the_configuration_is_made_plain():
    fake = Fake()
    config = {"steps": 3, "lr": None, "huber": 3.0, "on": True, "temperature": (1.0, 2.0)}
    with track(fake, config=config | {"where": Path("a")}):
        pass
    assert fake.calls[1] == (
        "config",
        {
            "steps": 3,
            "lr": None,
            "huber": 3.0,
            "on": True,
            "temperature": "(1.0, 2.0)",
            "where": "a",
        },
    )


def test_nothing_and_several():
    with track(None) as log:
        log({"step": 0, "loss": 1.0})
    one, two = Fake(), Fake()
    with track([one, two, one]) as log:  # the same one twice is one
        log({"step": 0, "loss": 1.0})
    assert one.calls == two.calls and one.names.count("log") == 1


def test_trackers_may_use_accelerates_log():
    """As Weights & Biases' does: it fails unless accelerate knows which process this is."""

    class Talks(Fake):
        def start(self):
            get_logger(__name__).debug("started")
            super().start()

    PartialState._reset_state()
    with track(talks := Talks()):
        pass
    assert talks.names == ["start", "config", "finish"]


# --- always finished -----------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, FloatingPointError])
def test_finished_when_training_fails(error):
    one, two = Fake(), Fake()
    with pytest.raises(error), track([one, two]):
        raise error
    assert one.names[-1] == two.names[-1] == "finish"


@pytest.mark.parametrize(
    ("fails", "finished"), [("start", False), ("config", True), ("log", True), ("finish", True)]
)
def test_finished_when_a_tracker_fails(fails, finished):
    one, two, three = Fake(), Fake(fails=fails), Fake()
    with pytest.raises(RuntimeError, match=f"cannot {fails}"), track([one, two, three]) as log:
        log({"step": 0, "loss": 1.0})
    assert one.names[-1] == "finish" and (two.names[-1] == "finish") == finished
    assert three.names[-1:] == (["finish"] if fails in ("log", "finish") else [])


# --- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", ["tensorbord", 3, Fake, ["tensorboard", "x"]])
def test_unknown_names(wrong, tmp_path):
    with (
        pytest.raises(ValueError, match=r"allowed: aim, .*tensorboard, .*wandb.*GeneralTracker"),
        track(wrong, tmp_path),
    ):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "package"), [("wandb", "wandb"), ("tensorboard", r"lmppl-pyro\[tracking\]")]
)
def test_names_that_are_not_installed(name, package, monkeypatch):
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: [])
    with pytest.raises(ValueError, match=f"'{name}': not installed: pip install {package}"):
        track(name, "somewhere").__enter__()


def test_installed_and_registered_names_are_made(monkeypatch):
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: [LoggerType.WANDB])
    made = []

    class Made(Fake):
        def __init__(self, run_name):
            super().__init__(run_name)
            made.append(self)

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", Made)
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "mine", Made)
    with track(["wandb", LoggerType.WANDB, "mine"]):
        pass
    assert len(made) >= 2 and {one.run_name for one in made} == {"infill"}
    assert all(one.names == ["start", "config", "finish"] for one in made)


# --- TensorBoard ---------------------------------------------------------------------------------


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_tensorboard_holds_a_real_run(tmp_path):
    case = CASES["one site"]
    guide = lmppl.LMGuide(case.program, lm=case.lm)
    config = {"steps": 3, "learning_rate": None, "reward_temperature": (1.0, 1.0)}
    with track("tensorboard", tmp_path, config) as log:
        guide.fit(
            [case.args], steps=3, seed=0, batch_size=8, progress=False,
            callback=log,
        )  # fmt: skip
    found = scalars(tmp_path / "infill")
    assert set(found) == set(guide.history[0]) - {"step"}
    for name, values in found.items():
        assert values == [
            (figures["step"], pytest.approx(figures[name], rel=1e-6)) for figures in guide.history
        ]


def test_tensorboard_needs_a_directory():
    with pytest.raises(ValueError, match="'tensorboard' writes files: say where"):
        track("tensorboard").__enter__()
