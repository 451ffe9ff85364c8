"""Learning the program's parameters, against the evidence by enumeration."""

import math
import shutil
import traceback
from pathlib import Path
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from accelerate.tracking import GeneralTracker
from guide_helpers import shaken

import lmppl
from lmppl import lm_sample, require
from lmppl.states import read_state
from lmppl.testing import enumerate_program, guide_log_probs, tiny_lm
from lmppl.training.checkpoints import FORMAT
from lmppl.training.inputs import Input
from lmppl.training.learn import learn
from lmppl.training.losses import VarGrad
from lmppl.training.m_step import MStep
from lmppl.training.options import FitOptions

# The labels cannot be shown to the guide in three letters; its weights make up for it.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}:UserWarning")
    for message in (
        "the automatic guide cannot see",
        r"inputs \d+ and \d+ of the data",
    )
]

LM = tiny_lm("ab.", seed=0)
DATA = [("ab.", 1.0), ("ab.", 1.0), ("ab.", 0.0), ("ba", 1.0)]


@pytest.fixture(autouse=True)
def fresh_store():
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()


def labelled(x, label):
    z = lm_sample("z", x, max_tokens=2, stop=".")
    p = pyro.param("p", torch.tensor(0.5), constraint=dist.constraints.unit_interval)
    pyro.sample("label", dist.Bernoulli(p if "b" in z else 1 - p), obs=torch.tensor(label))


def evidence(program, data=DATA):
    with torch.no_grad():
        return sum(enumerate_program(program, *args, lm=LM).log_evidence for args in data)


def best_p():
    """The maximum of the exact evidence, on a grid."""
    found = {}
    for k in range(1, 40):
        pyro.get_param_store()["p"] = torch.tensor(k / 40)
        found[k / 40] = evidence(labelled)
    return max(found, key=found.get)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["em", "wake-sleep"])
def test_a_parameter_comes_to_the_maximum_of_the_evidence(method):
    pyro.param("p", torch.tensor(0.5), constraint=dist.constraints.unit_interval)
    expected = best_p()
    assert 0.05 < expected < 0.95 and abs(expected - 0.5) > 0.1
    pyro.clear_param_store()
    guide = lmppl.LMGuide(labelled, lm=LM)
    history = learn(
        guide, DATA, 60, method=method, guide_steps=1, num_samples=24, seed=0, progress=False,
        model_learning_rate=0.1, batch_size=16,
    )  # fmt: skip
    assert float(pyro.param("p").detach()) == pytest.approx(expected, abs=0.08)
    assert len(history) == 60 and len(guide.history) == 60


@pytest.mark.slow
def test_an_adapter_of_the_model_learns_the_data():
    m = LM.adapter()

    def program(x, y):
        z = lm_sample("z", x, max_tokens=2, stop=".", lm=m)
        lm_sample("y", [x, z], max_tokens=2, obs=y, lm=m)

    data = [("ab.", "ba"), ("ba", "ba")]
    before = evidence(program, data)
    base = [p.detach().clone() for p in LM.model.parameters()]
    guide = lmppl.LMGuide(program, lm=LM)
    history = learn(guide, data, 30, guide_steps=1, seed=0, progress=False, batch_size=16)
    after = evidence(program, data)
    assert after > before + 2.0
    assert history[-1]["log_evidence"] == pytest.approx(after / 2, abs=0.3)
    assert history[-1]["model_ess"] > 0.5
    assert all(torch.equal(p, q) for p, q in zip(base, LM.model.parameters(), strict=True))


@pytest.mark.slow
def test_the_gradient_is_that_of_the_evidence():
    """Fisher's identity: with the exact posterior as guide, in the mean over its draws."""
    pyro.param("p", torch.tensor(0.3), constraint=dist.constraints.unit_interval)
    args = ("ab.", 1.0)
    guide = lmppl.LMGuide(labelled, lm=LM)  # untrained: weights do the rest
    options = FitOptions()
    with lmppl.use(LM):
        one = Input(labelled, args, 0, options)
        learner = MStep(guide, [one], options, 1e-9, 1, 4000)
        (parameter,) = learner.named_parameters().values()
        learner.step([one], 0, seed=0)
        found = float(parameter.grad)
    step, values = 1e-3, []
    for sign in (1, -1):
        with torch.no_grad():
            parameter += sign * step
            values.append(evidence(labelled, [args]))
            parameter -= sign * step
    slope = (values[0] - values[1]) / (2 * step)
    assert abs(slope) > 0.1 and found == pytest.approx(-slope, abs=0.03)


def test_the_weights_of_an_m_step_are_those_of_the_mixture():
    """R over the density of the mixture of guide, program and buffer, against enumeration; and each
    of the three has as many draws as its share says."""
    pyro.param("p", torch.tensor(0.3), constraint=dist.constraints.unit_interval)
    args = ("ab.", 1.0)
    guide = shaken(lmppl.LMGuide(labelled, lm=LM))
    with lmppl.use(LM), torch.no_grad():
        traces = list(enumerate_program(labelled, *args, lm=LM))
        log_q = guide_log_probs(guide, labelled, args, traces, LM).tolist()
        exact = {
            trace.values["z"]: (trace.log_joint, q) for trace, q in zip(traces, log_q, strict=True)
        }
        options = FitOptions(prior_fraction=0.25, replay_fraction=0.5)
        one = Input(labelled, args, 0, options)
        learner = MStep(guide, [one], options, 1e-9, 1, 8)
        for number in range(2):  # the buffer is empty at first
            kept = {key[0][1:]: record.log_r for key, record in one.buffer._records.items()}
            total = sum(math.exp(log_r) for log_r in kept.values())
            (drawn,) = learner._draw([(one, number)])
            learner._keep([one], [drawn])
            counts = {"b": 4 if kept else 0, "p": 2, "q": 2 if kept else 6}
            for record, log_weight, _ in drawn.values():
                (key,) = record.discrete_key
                log_r, log_q_z = exact[record.tokens]
                likelihood = 0.3 if "b" in LM.vocabulary.decode(record.tokens) else 0.7
                density = counts["q"] * math.exp(log_q_z)
                density += counts["p"] * math.exp(log_r) / likelihood
                if key[1:] in kept:
                    density += counts["b"] * math.exp(kept[key[1:]]) / total
                assert log_weight == pytest.approx(log_r - math.log(density / 8), abs=1e-4)
                assert log_weight <= math.log(8 / counts["p"])  # of the likelihood over its share


@pytest.mark.slow
def test_a_mixture_weight_comes_to_its_maximum_though_the_guide_is_young():
    """48 causes, of which 12 draws for each of 8 inputs find few: all draws then weigh alike, and
    draws of the guide alone leave the weight near 0.5 (0.36 as the mean of these seeds)."""
    num = 24
    table = torch.full((2 * num, 2 * num), 0.02 / (2 * num)) + 0.98 * torch.eye(2 * num)

    def mixture(y):
        w = pyro.param("w", torch.tensor(0.5), constraint=dist.constraints.unit_interval)
        shares = torch.cat([w.expand(num) / num, (1 - w).expand(num) / num])
        z = pyro.sample("z", dist.Categorical(shares))
        pyro.sample("y", dist.Categorical(table[z]), obs=torch.tensor(y))

    def guide_program(y):
        logits = pyro.param(f"q{y}", torch.zeros(2 * num))
        pyro.sample("z", dist.Categorical(logits=logits))

    data = [(y,) for y in range(10)] + [(num + y,) for y in range(22)]
    grid = torch.linspace(0.001, 0.999, 999)
    of_each = torch.stack([table[:num].mean(0), table[num:].mean(0)])[:, [y for (y,) in data]]
    evidence = (grid[:, None] * of_each[0] + (1 - grid[:, None]) * of_each[1]).log().sum(1)
    best = float(grid[evidence.argmax()])
    assert best == pytest.approx(0.309)
    means = []
    for seed in range(3):
        pyro.clear_param_store()
        path = []
        guide = lmppl.LMGuide(mixture, lm=LM, program=guide_program)
        learn(
            guide, data, 50, num_samples=12, inputs_per_step=8, learning_rate=0.1, seed=seed,
            model_learning_rate=0.1, progress=False,
            callback=lambda figures, path=path: path.append(float(pyro.param("w").detach())),
        )  # fmt: skip
        means.append(sum(path[-10:]) / 10)
    assert sum(means) / 3 == pytest.approx(best, abs=0.02)


def test_stored_rewards_are_scored_anew():
    """With the rewards of the first model, a replayed trace would have another u than a new one."""
    pyro.param("p", torch.tensor(0.5), constraint=dist.constraints.unit_interval)
    guide = lmppl.LMGuide(labelled, lm=LM)
    seen = []

    def look(self, batch, **rest):
        for sample in batch.samples:
            node = sample.particle.sites["label"]
            p = float(pyro.param("p").detach())
            b = "b" in sample.particle.sites["z"]["fn"].text(sample.particle.sites["z"]["value"])
            expected = math.log(p if b == bool(float(node["value"])) else 1 - p)
            seen.append((sample.origin, float(node["log_prob_sum"]) - expected))
        return original(self, batch, **rest)

    original = VarGrad.of
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VarGrad, "of", look)
        learn(guide, DATA, 8, guide_steps=1, seed=0, progress=False, model_learning_rate=0.2)
    assert {"replay", "prior", "guide"} <= {origin for origin, _ in seen}
    assert max(abs(error) for _, error in seen) < 1e-5


@pytest.mark.parametrize("method", ["em", "wake-sleep"])
def test_texts_are_scored_anew_too(method):
    """Dreams as well, a batch of which is used while the model changes."""
    m = LM.adapter()

    def program(x):
        lm_sample("z", x, max_tokens=2, stop=".", lm=m)
        lm_sample("y", "b", max_tokens=1, obs="a", lm=m)

    guide = lmppl.LMGuide(program, lm=LM)
    values = []

    def look(self, batch, **rest):
        for node in (sample.particle.sites["y"] for sample in batch.samples):
            now = float(m.log_prob("b", [node["fn"].text(node["value"])], max_tokens=1))
            values.append(float(node["log_prob_sum"]) - now)
        return original(self, batch, **rest)

    original = VarGrad.of
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VarGrad, "of", look)
        learn(
            guide, [("ab.",)], 5, method=method, guide_steps=1, loss="vargrad", seed=0,
            progress=False, model_learning_rate=0.01, batch_size=8,
        )  # fmt: skip
    assert float(m.log_prob("b", ["a"], max_tokens=1)) > float(
        LM.log_prob("b", ["a"], max_tokens=1)
    )
    assert max(abs(each) for each in values) < 1e-4


def test_a_program_without_parameters():
    def program(x):
        lm_sample("z", x, max_tokens=1)

    with pytest.raises(ValueError, match="the program has nothing to learn"):
        learn(lmppl.LMGuide(program, lm=LM), [("ab",)], 1)


def test_a_guide_and_a_model_that_share_parameters():
    m = LM.adapter()

    def program(x):
        lm_sample("z", x, max_tokens=1, lm=m)

    guide = lmppl.LMGuide(program, lm=LM, program=program)
    guide.prepare(("ab",))
    with pytest.raises(ValueError, match="train the same parameters"):
        learn(guide, [("ab",)], 1)


@pytest.mark.parametrize(
    "options, message",
    [({"method": "mcmc"}, "method='mcmc'"), ({"num_samples": 0}, "num_samples=0")],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        learn(lmppl.LMGuide(labelled, lm=LM), DATA, 1, **options)


def test_the_m_step_has_draws_of_its_own(monkeypatch):
    """Not the numbers that the guide has just learned from."""
    from lmppl import runtime

    seeds = {"trainer.py": set(), "m_step.py": set()}
    original = runtime.start

    def start(*args, seed, **options):
        callers = [Path(frame.filename).name for frame in traceback.extract_stack()]
        if callers[-2] == "behaviour.py":  # else it looks at what the program observes
            for name in seeds.keys() & set(callers):
                seeds[name].add(seed)
        return original(*args, seed=seed, **options)

    monkeypatch.setattr(runtime, "start", start)
    guide = lmppl.LMGuide(labelled, lm=LM)
    learn(guide, DATA[:2], steps=3, seed=0, batch_size=8, reward_temperature=(1.0, 2.0))
    assert all(seeds.values()) and not seeds["trainer.py"] & seeds["m_step.py"]
    assert guide.tempered_target == 2.0


def test_parameters_that_only_later_inputs_use_are_learned():
    def program(x, label):
        lm_sample("z", x, max_tokens=1)
        p = pyro.param(f"p_{x}", torch.tensor(0.5), constraint=dist.constraints.unit_interval)
        pyro.sample("label", dist.Bernoulli(p), obs=torch.tensor(label))

    guide = lmppl.LMGuide(program, lm=LM)
    learn(guide, [("a", 1.0), ("b", 0.0)], steps=15, seed=0, batch_size=8, model_learning_rate=0.1)
    assert pyro.param("p_a") > 0.6 and pyro.param("p_b") < 0.4


def test_inputs_without_a_live_trace_are_reported():
    def program(x, possible):
        lm_sample("z", x, max_tokens=1)
        p = pyro.param("p", torch.tensor(0.5), constraint=dist.constraints.unit_interval)
        require("r", possible)
        pyro.sample("label", dist.Bernoulli(p), obs=torch.tensor(1.0))

    options = {"steps": 2, "seed": 0, "batch_size": 8, "progress": False}
    with pytest.warns(UserWarning, match=r"inputs \[1\] of the data were skipped"):
        learn(lmppl.LMGuide(program, lm=LM), [("a", True), ("a", False)], **options)
    with pytest.raises(ValueError, match="no trace of any input had a positive probability"):
        learn(lmppl.LMGuide(program, lm=LM), [("a", False)], **options)


def test_held_out_evidence():
    guide = lmppl.LMGuide(labelled, lm=LM)
    history = learn(
        guide, DATA[:2], 5, eval_data=[("ba", 1.0), ("ba", 0.0)], eval_every=2, eval_samples=256,
        seed=0, batch_size=8, guide_steps=1, model_learning_rate=0.1, progress=False,
    )  # fmt: skip
    assert [each["step"] for each in history if "eval_log_z" in each] == [1, 3, 4]
    exact = evidence(labelled, [("ba", 1.0), ("ba", 0.0)]) / 2
    assert history[-1]["eval_log_z"] == pytest.approx(exact, abs=0.1)
    assert history[-1]["eval_elbo"] <= history[-1]["eval_log_z"] + 1e-6


def test_a_model_under_which_a_held_out_input_is_dead_is_not_the_best(monkeypatch):
    """The others' evidence alone may be better."""
    values = [{"eval_log_z": z} for z in (-3.0, -1.0, -2.0, -2.5, -2.2)]
    values[1]["eval_dead"] = 1.0
    found = iter(values)
    monkeypatch.setattr("lmppl.training.evaluation.evaluate", lambda *args, **options: next(found))
    options = {"seed": 0, "batch_size": 8, "guide_steps": 1, "progress": False}
    guide = lmppl.LMGuide(labelled, lm=LM)
    held_out = {"eval_data": [("ba", 0.0)], "eval_every": 1, "patience": 2}
    learn(guide, DATA, 5, **held_out, **options)
    (note,) = guide.notes
    assert note == "stopped after 5 steps: no better held-out log evidence since step 2"


def test_dead_held_out_inputs_are_counted():
    def program(x, possible, label):
        labelled(x, label)
        require("r", possible)

    options = {"seed": 0, "batch_size": 8, "guide_steps": 1, "progress": False, "eval_samples": 8}
    guide = lmppl.LMGuide(program, lm=LM)
    held_out = [("ab.", True, 1.0), ("ab.", False, 1.0)]
    history = learn(guide, [("ab.", True, 1.0)], 1, eval_data=held_out, **options)
    assert history[-1]["eval_dead"] == 1.0 and math.isfinite(history[-1]["eval_log_z"])


class _Tracker(GeneralTracker):
    name = "list"
    requires_logging_directory = False
    tracker = None

    def __init__(self):
        super().__init__()
        self.config, self.figures = {}, []

    def store_init_configuration(self, values):
        self.config = values

    def log(self, values, step=None, **kwargs):
        self.figures.append({**values, "step": step})


def test_figures_of_learning_go_to_trackers():
    log = _Tracker()
    options = {"seed": 3, "batch_size": 8, "guide_steps": 1, "progress": False}
    history = learn(lmppl.LMGuide(labelled, lm=LM), DATA, 3, log_with=log, **options)
    assert log.config == {"steps": 3, "seed": 3, "method": "em", "loss": "vargrad"}
    assert [each["log_evidence"] for each in log.figures] == history.column("log_evidence")
    assert [each["step"] for each in log.figures] == [0, 1, 2]


def test_few_effective_samples_are_noted():
    def hard(x, label):
        lm_sample("z", x, max_tokens=2, stop=".")
        t = pyro.sample("t", dist.Normal(0.0, 1.0))
        p = pyro.param("p", torch.tensor(0.5), constraint=dist.constraints.unit_interval)
        pyro.factor("hard", -1e4 * (t - 1.0) ** 2)
        pyro.sample("label", dist.Bernoulli(p), obs=torch.tensor(label))

    options = {"seed": 0, "batch_size": 8, "guide_steps": 1, "progress": False}
    guide = lmppl.LMGuide(hard, lm=LM)
    learn(guide, DATA, 2, num_samples=16, learning_rate=1e-6, **options)
    (note,) = [each for each in guide.notes if "effective samples" in each]
    assert note.startswith("the M-steps had ") and "of 16 draws" in note
    guide = lmppl.LMGuide(labelled, lm=LM)
    learn(guide, DATA, 2, num_samples=16, **options)
    assert not any("effective samples" in each for each in guide.notes)


def test_learning_stops_at_the_best_held_out_evidence(monkeypatch):
    m = LM.adapter()
    values, seen = iter([-3.0, -1.0, -2.0, -1.5]), {}

    def program(x, label):
        z = lm_sample("z", x, max_tokens=2, stop=".", lm=m)
        p = pyro.param("p", torch.tensor(0.5), constraint=dist.constraints.unit_interval)
        pyro.sample("label", dist.Bernoulli(p if "b" in z else 1 - p), obs=torch.tensor(label))

    def parameters():
        own = [p for p in m.model.parameters() if p.requires_grad]
        return [p.detach().clone() for p in (*own, pyro.param("p"), *guide.parameters())]

    def evaluate(guide, inputs, num, seed, sharing):
        assert len(inputs) == 1
        value = next(values)
        seen[value] = parameters()
        return {"eval_log_z": value}

    monkeypatch.setattr("lmppl.training.evaluation.evaluate", evaluate)
    guide = lmppl.LMGuide(program, lm=LM)
    settings = {"seed": 0, "batch_size": 8, "guide_steps": 1, "progress": False}
    history = learn(
        guide, DATA, 50, eval_data=[("ba", 0.0)], eval_every=2, patience=2, **settings
    )  # fmt: skip
    assert len(history) == 8
    assert all(torch.equal(a, b) for a, b in zip(parameters(), seen[-1.0], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(seen[-1.5], seen[-1.0], strict=True))
    assert guide.notes == ["stopped after 8 steps: no better held-out log evidence since step 3"]
    with pytest.raises(ValueError, match="patience=2 needs eval_data="):
        learn(guide, DATA, 1, patience=2)
    with pytest.raises(ValueError, match="eval_every=0"):
        learn(guide, DATA, 1, eval_data=DATA, eval_every=0)
    with pytest.raises(TypeError, match="item 1 of eval_data"):
        learn(guide, DATA, 1, eval_data=[("ba", 0.0), "ba"])


def test_learning_that_diverges_puts_the_best_program_and_guide_back(monkeypatch):
    monkeypatch.setattr("lmppl.training.callbacks._WINDOW", 2)
    guide = lmppl.LMGuide(labelled, lm=LM)
    kept = []

    def parameters():
        return [*guide.parameters(), pyro.get_param_store()._params["p"]]

    def catastrophe(figures):
        if figures["step"] == 3:
            kept.extend(p.detach().clone() for p in parameters())
        elif figures["step"] > 3:
            figures["log_evidence"] = -500.0
            shaken(guide, size=1.0)
            with torch.no_grad():
                parameters()[-1].add_(1.0)

    settings = {"seed": 0, "batch_size": 8, "guide_steps": 1, "progress": False}
    rates = {"learning_rate": 1e-9, "model_learning_rate": 1e-9}
    message = "the log evidence fell to -500.0 .* for a program also model_learning_rate"
    with pytest.raises(FloatingPointError, match=message):
        learn(guide, DATA, 20, callback=catastrophe, **rates, **settings)
    assert len(guide.history) == 6
    torch.testing.assert_close([p.detach() for p in parameters()], kept, atol=1e-6, rtol=0.0)


class _Stop(Exception):
    pass


def _learned(path, *, method="em", stop_at=None, **options):
    """A program with an adapter and a number, learned in 4 steps: its parameters, the guide's and
    the figures."""
    pyro.clear_param_store()
    m = LM.adapter()  # its first weights are random

    def program(x, label):
        z = lm_sample("z", x, max_tokens=2, stop=".", lm=m)
        start = torch.tensor(0.5)
        p = pyro.param(f"p_{x}", start, constraint=dist.constraints.unit_interval)
        pyro.sample("label", dist.Bernoulli(p if "b" in z else 1 - p), obs=torch.tensor(label))

    def stop(figures):
        if figures["step"] == stop_at:
            raise _Stop

    guide = lmppl.LMGuide(program, lm=LM)
    settings = {"steps": 4, "guide_steps": 1, "num_samples": 4, "batch_size": 8, "seed": 0}
    settings |= {"checkpoint": path, "checkpoint_every": 2, "progress": False, "callback": stop}
    settings |= {"inputs_per_step": 1}
    history = learn(guide, DATA, method=method, **(settings | options))
    own = [p for p in m.model.parameters() if p.requires_grad]
    params = [pyro.param("p_ab.").detach(), pyro.param("p_ba").detach()]
    figures = [
        {k: v for k, v in each.items() if not k.startswith("seconds_") and v == v}
        for each in history
    ]
    return [*own, *params, *guide.parameters()], figures


@pytest.mark.parametrize(
    "options",
    [
        {"eval_data": [("ba", 0.0)], "eval_every": 1, "eval_samples": 8, "patience": 5},
        {"method": "wake-sleep", "guide_steps": 2},
        {"method": "wake-sleep", "loss": "wake"},
    ],
    ids=["em, held-out", "wake-sleep", "wake-sleep by wake"],
)
def test_resumed_learning_ends_as_unbroken(options, tmp_path):
    torch.manual_seed(0)
    whole, figures = _learned(tmp_path / "whole", **options)
    torch.manual_seed(0)
    with pytest.raises(_Stop):
        _learned(tmp_path / "broken", stop_at=3, **options)
    torch.manual_seed(7)
    resumed, again = _learned(tmp_path / "broken", resume=True, **options)
    assert len(whole) == len(resumed) > 4
    assert all(torch.equal(one, two) for one, two in zip(whole, resumed, strict=True))
    assert [each["step"] for each in figures] == [0, 1, 2, 3]
    assert figures == again


def test_the_checkpoint_of_other_learning_is_refused(tmp_path):
    path = tmp_path / "run"
    _learned(path)
    with pytest.raises(FileExistsError, match="resume=True goes on with the run in it"):
        _learned(path)
    for change, what in (
        ({"num_samples": 5}, "num_samples"),
        ({"method": "wake-sleep", "loss": "vargrad"}, "method"),
        ({"model_learning_rate": 0.5}, "model_learning_rate"),
        ({"steps": 5}, "number of steps"),
    ):
        with pytest.raises(ValueError, match=f"belongs to another run, its {what} differs"):
            _learned(path, resume=True, **change)
    guide = lmppl.LMGuide(labelled, lm=LM)
    with pytest.raises(ValueError, match="belongs to another run, its program differs"):
        learn(guide, DATA, 5, seed=0, checkpoint=path, resume=True)
    with pytest.raises(ValueError, match="belongs to another run"):  # of learning, not of a guide
        lmppl.LMGuide(labelled, lm=LM).fit(DATA, 10, seed=0, checkpoint=path, resume=True)


def test_learning_goes_on_with_parameters_that_are_hard_to_find(tmp_path, monkeypatch):
    """A resumed run comes to a branch late, and its parameter goes on from where it was."""
    branch = SimpleNamespace(is_open=True)

    def program(x, label):
        lm_sample("z", x, max_tokens=1)
        p = pyro.param("p", torch.tensor(0.5), constraint=dist.constraints.unit_interval)
        if branch.is_open:
            p = p * pyro.param("rare", torch.tensor(0.5), constraint=dist.constraints.positive)
        pyro.sample("label", dist.Bernoulli(p), obs=torch.tensor(label))

    def run(folder, stop_at=None, **options):
        def look(figures):
            if figures["step"] == stop_at:
                raise _Stop

        settings = {"seed": 0, "batch_size": 8, "checkpoint": tmp_path / folder, "progress": False}
        settings |= {"checkpoint_every": 1, "callback": look, "guide_steps": 1, "num_samples": 4}
        settings |= {"model_learning_rate": 0.5}
        guide = lmppl.LMGuide(program, lm=LM)
        learn(guide, [("a", 1.0)], 3, **settings, **options)
        found = "rare" in pyro.get_param_store()
        return pyro.param("rare").detach().clone() if found else None

    whole = run("whole")
    pyro.clear_param_store()
    with pytest.raises(_Stop):
        run("broken", stop_at=1)  # after a step that no checkpoint has
    kept = read_state(tmp_path / "broken", "checkpoint", FORMAT)["parts"]["m_step"]
    shutil.copytree(tmp_path / "broken", tmp_path / "copy")

    # The first step comes to it, and no run before: value and optimiser are as they were.
    restore = MStep.load_state_dict

    def restore_and_open(*args):
        restore(*args)
        branch.is_open = True

    pyro.clear_param_store()
    branch.is_open = False
    with monkeypatch.context() as patch:
        patch.setattr(MStep, "load_state_dict", restore_and_open)
        assert torch.equal(run("broken", resume=True), whole)

    # No run comes to it. The checkpoints have it all the same.
    pyro.clear_param_store()
    branch.is_open = False
    with pytest.warns(UserWarning, match="'rare' had been learned, but no run of the program"):
        assert run("copy", resume=True) is None
    branch.is_open = True
    run("copy", resume=True)
    assert torch.equal(
        pyro.get_param_store()._params["rare"].detach(), kept["values"]["params.rare"]
    )


def test_a_weight_that_no_run_uses_any_more_is_an_error(tmp_path):
    uses = SimpleNamespace(adapter=LM.adapter())

    def program(x):
        lm_sample("z", x, max_tokens=1)
        pyro.param("p", torch.tensor(0.5))
        lm_sample("y", x, obs="a", lm=uses.adapter)

    def run(**options):
        settings = {"seed": 0, "batch_size": 8, "checkpoint": tmp_path / "run", "progress": False}
        learn(lmppl.LMGuide(program, lm=LM), [("a",)], 2, **settings, **options)

    run()
    uses.adapter = None
    with pytest.raises(
        ValueError, match="a weight of an adapter that no run of the program has used"
    ):
        run(resume=True)
