"""Records: a trace that is run again from one is the trace that it was."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from guide_helpers import draw_samples, shaken

import lmppl
from lmppl import lm_sample, runtime, tool
from lmppl.guides.prompts import OPENING
from lmppl.runtime.records import Record, record_of_simulation, rescore
from lmppl.runtime.simulation import simulate
from lmppl.testing import tiny_lm
from lmppl.testing.programs import CASES
from lmppl.training.samples import Sample

LM = tiny_lm("ab.", seed=0)


def rescored(guide, record, case, program=None):
    args = case.args
    with lmppl.use(guide.base), torch.no_grad():
        proposer = guide.recaller(args, guide.observations(args))
        run = rescore(record, program or case.program, args, proposer)
        with runtime.ending([run]) as runs:
            runtime.run_to_end(runs)
    return Sample.of(run, "replay")


@pytest.mark.parametrize("case", CASES.values(), ids=str)
def test_a_rescored_trace_is_the_trace_itself(case):
    guide = shaken(lmppl.LMGuide(case.program, lm=case.lm))
    samples = draw_samples(guide, case.program, case.args, 6)
    scored = case.lm.usage.tokens_scored, case.lm.usage.tokens_sampled
    again = [rescored(guide, sample.record, case) for sample in samples]
    used = case.lm.usage.tokens_scored, case.lm.usage.tokens_sampled
    # Two runs for the observations of each are all that is asked of the model.
    assert used[0] - scored[0] < 6 * 50
    for one, two in zip(samples, again, strict=True):
        assert one.log_r == two.log_r and one.sites.keys() == two.sites.keys()
        for name, node in one.sites.items():
            assert torch.equal(node["value"], two.sites[name]["value"])
            assert torch.equal(node["log_prob"], two.sites[name]["log_prob"])
    live = [i for i, sample in enumerate(samples) if sample.proposer.draws]
    scores = [
        guide.score([each[i].proposer for i in live], grad=False) for each in (samples, again)
    ]
    for one, two in zip(*scores, strict=True):
        assert one.keys() == two.keys()
        for name in one:
            assert torch.equal(one[name][0], two[name][0])


def test_what_is_not_known_is_scored():
    case = CASES["observed text"]
    guide = lmppl.LMGuide(case.program, lm=case.lm)
    (sample,) = draw_samples(guide, case.program, case.args, 1)
    again = rescored(guide, sample.record.forgotten(), case)
    assert again.log_r == pytest.approx(sample.log_r, abs=1e-4)
    node = again.particle.sites["w"]
    assert node["scored"].closing_log_probs is not None  # so that it can be cut


def test_a_guide_program_scores_a_rescored_trace():
    case = CASES["one site"]
    q = case.lm.adapter()

    def program(x, y):
        lm_sample("z", x, max_tokens=3, stop=".", lm=q)

    guide = lmppl.LMGuide(case.program, lm=case.lm, program=program)
    guide.prepare(case.args)
    (sample,) = draw_samples(guide, case.program, case.args, 1)
    again = rescored(guide, sample.record, case)
    one, two = guide.score([sample.proposer, again.proposer], grad=False)
    assert float(one["z"][0]) == pytest.approx(float(two["z"][0]), abs=1e-5)


def test_tools_are_not_called_again():
    calls = []

    def count(text):
        calls.append(text)
        return len(calls)

    def program(x):
        z = lm_sample("z", x, max_tokens=2)
        pyro.factor("f", torch.tensor(float(tool("n", count, z))))

    guide = lmppl.LMGuide(program, lm=LM)
    (sample,) = draw_samples(guide, program, ("ab",), 1)
    num = len(calls)
    with lmppl.use(LM):
        observations = guide.observations(("ab",))
        num = len(calls)
        run = rescore(sample.record, program, ("ab",), guide.recaller(("ab",), observations))
    assert run.finished and len(calls) == num and run.log_joint == sample.log_r


def mixed(x):
    z = lm_sample("z", x, max_tokens=2, stop=".")
    pyro.sample("theta", dist.Beta(2.0, 2.0))
    lm_sample("k", [x, z], choices=["ab", "ba."])


def demonstrated(values):
    guide = lmppl.LMGuide(mixed, lm=LM)
    with lmppl.use(LM), torch.no_grad():
        recaller = guide.recaller(("ab",), guide.observations(("ab",)))
        run = rescore(Record(values), mixed, ("ab",), recaller, seed=1)
        with runtime.ending([run]) as runs:
            runtime.run_to_end(runs)
    return run


def test_texts_and_numbers_of_a_user():
    run = demonstrated({"z": "a.", "theta": 0.25, "k": "ba."})
    values = {name: node["value"] for name, node in run.latents.items()}
    assert run.sites["z"]["fn"].text(values["z"]) == "a."
    assert float(values["theta"]) == 0.25
    assert run.sites["k"]["fn"].text(values["k"]) == "ba."


def test_what_a_user_does_not_give_is_drawn():
    run = demonstrated({"theta": 0.5})
    assert run.finished and set(run.latents) == {"z", "theta", "k"}


@pytest.mark.parametrize(
    "values, message",
    [
        ({"z": "a.b"}, "a record: site 'z': the observed text 'a.b' runs past its close"),
        ({"theta": "a"}, "site 'theta' is no text but a Beta, given 'a'"),
        ({"theta": torch.ones(3)}, r"site 'theta' has shape \(\), given \(3,\)"),
        ({"w": "a"}, "a record has a value for 'w', which is no latent site of the program"),
        ({"k": "a"}, "site 'k': 'a' is none of the choices"),
    ],
)
def test_values_that_a_site_cannot_have(values, message):
    with pytest.raises(ValueError, match=message):
        demonstrated(values)


def test_whole_numbers_of_a_user_are_what_the_site_holds():
    def program(x, *_):
        k = pyro.sample("k", dist.Bernoulli(0.3))
        n = pyro.sample("n", dist.Categorical(torch.ones(3) / 3))
        lm_sample("z", "a" if k else x, max_tokens=2, stop=".")
        assert n.dtype == torch.long

    guide = lmppl.LMGuide(program, lm=LM)
    case = CASES["one site"]
    state = torch.get_rng_state()
    sample = rescored(guide, Record({"k": 1, "n": 2, "z": "a."}), case, program)
    assert float(sample.particle.sites["k"]["value"]) == 1.0
    assert sample.log_r > -float("inf") and torch.equal(torch.get_rng_state(), state)


def test_a_record_keeps_no_batch_in_memory():
    case = CASES["observed text"]
    guide = lmppl.LMGuide(case.program, lm=case.lm)
    sample = draw_samples(guide, case.program, case.args, 8)[0]
    terms = [scored.log_probs for _, scored in sample.record.known.values() if scored is not None]
    assert terms
    for tensor in terms:
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_the_error_of_a_tool_is_in_the_checkpoint(tmp_path):
    from lmppl.distributions import ToolResult
    from lmppl.states import read_state, write_state
    from lmppl.training.kept import record_of_state, record_state

    tools = {"t": ToolResult.wrap(None, KeyError("gone")), "u": ToolResult.wrap(None)}
    state = record_state(Record({"z": torch.tensor([1])}, tools=tools))
    write_state(tmp_path, "record", 1, state)
    again = record_of_state(read_state(tmp_path, "record", 1))
    assert torch.equal(again.values["z"], torch.tensor([1]))
    assert "gone" in str(again.tools["t"].error) and again.tools["u"].error is None


NOT_SIMULATED = {"factor", "scale"}
SEEDED = {"seed": 0, "progress": False}


@pytest.mark.parametrize("latents_known", [True, False])
@pytest.mark.parametrize(
    "case", [c for c in CASES.values() if c.name not in NOT_SIMULATED], ids=str
)
def test_what_a_simulation_found_out_is_what_the_program_computes(case, latents_known):
    guide = lmppl.LMGuide(case.program, lm=case.lm)
    with lmppl.use(case.lm), torch.no_grad():
        for one in simulate(case.program, case.args, 6, seed=1):
            program = one.program(case.program)
            record = record_of_simulation(one, latents_known=latents_known)
            log_r = []
            for each in (record, record.forgotten()):
                proposer = guide.recaller(case.args, guide.observations(case.args, program))
                run = rescore(each, program, case.args, proposer, complete=True)
                with runtime.ending([run]) as runs:
                    runtime.run_to_end(runs)
                log_r.append(run.log_joint)
            assert log_r[0] == pytest.approx(log_r[1], abs=1e-4)
            assert log_r[0] == pytest.approx(one.log_joint, abs=1e-4)
            found = guide.observations_of_simulation(one, program)
            by_runs = guide.observations(case.args, program)
            assert found == by_runs or (found is None and OPENING in by_runs)


def test_a_simulation_asks_no_model_again():
    case = CASES["observed text"]
    scored = []
    for batch_size in (2, 32):
        guide = lmppl.LMGuide(case.program, lm=case.lm)
        before = case.lm.usage.tokens_scored
        options = {"loss": "sft", "simulate": 32, "batch_size": batch_size, **SEEDED}
        guide.fit([case.args], steps=1, **options)
        scored.append(case.lm.usage.tokens_scored - before)
    assert scored[0] == scored[1]  # those of finding the guide's parameters
