"""Misuse of the public functions: one table. The message names the site or argument, what was given
and what is allowed; the type says whether it is the type that is wrong."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine

import lmppl
from lmppl import LMText, diagnose, infer, infer_batch, lm_sample, require, tool
from lmppl.report.history import History
from lmppl.testing import tiny_lm

LM = tiny_lm("ab.", seed=0, context_length=32)
LM.model.requires_grad_(False)


def program():
    return lm_sample("z", "ab", max_tokens=2)


def run(program_=program, *args, **options):
    """``infer`` with what is needed, unless it is given."""
    call = {"lm": LM, "method": "importance", "num_samples": 2, "seed": 0, **options}
    return infer(program_, *args, **call)


def site(name="z", prefix="ab", **arguments):
    if not {"choices", "max_tokens"} & set(arguments):
        arguments["max_tokens"] = 2
    return lambda: run(lambda: lm_sample(name, prefix, **arguments))


def conditioned(value, **arguments):
    return lambda: run(
        pyro.condition(lambda: lm_sample("z", "ab", max_tokens=2), data={"z": value}), **arguments
    )


def traced(value):
    """As ``conditioned``, by Pyro's own tools."""

    def trace():
        with lmppl.use(LM):
            poutine.trace(pyro.condition(program, data={"z": value})).get_trace()

    return trace


def after(act):
    """A program that draws a text and then does something with it."""
    return lambda: run(lambda: act(program()))


def guide(**arguments):
    return lambda: lmppl.LMGuide(program, lm=LM, **arguments)


def posterior():
    return run()


def text(**arguments):
    return LMText(LM, "ab", **arguments)


TWO = torch.tensor([True, False])
INT, SEED, NUMBER = "int of at least 1", "int of at least 0", "a number above 0"
HISTORY = History([{"step": 0, "loss": 1.0}])

MISUSE = {
    "lm_sample": [
        (site(name=3), ValueError, "a site's name must be a non-empty string, given 3"),
        (site(prefix=None), TypeError, "site 'z': a prefix is a string, .*list.* not NoneType"),
        (site(prefix=3), TypeError, "site 'z': a prefix is .* not int"),
        (site(prefix={"a": 1}), TypeError, "site 'z': a prefix is .* not dict"),
        (site(prefix={"a", "b"}), TypeError, "site 'z': a prefix is .* not set"),
        (site(prefix=iter("ab")), TypeError, "site 'z': a prefix is .* not str_ascii_iterator"),
        (site(prefix=np.array(["a"])), TypeError, "site 'z': a prefix is .* not ndarray"),
        (site(prefix=torch.tensor([1])), TypeError, "site 'z': a prefix is .* not Tensor"),
        (site(prefix=b"ab"), TypeError, "site 'z': a prefix holds strings and Texts, not int"),
        (site(prefix=["a", None]), TypeError, "site 'z': a prefix holds .* not NoneType"),
        (site(prefix=["a", ["b"]]), TypeError, "site 'z': a prefix holds .* not list"),
        (site(choices={"a": 1}), TypeError, "site 'z': choices=.*list of strings, given dict"),
        (site(choices={"a"}), TypeError, "site 'z': choices=.*list of strings, given set"),
        (site(choices=iter("ab")), TypeError, "site 'z': choices=.*list of strings, given str_ascii_it"),
        (site(choices=np.array(["a"])), TypeError, "site 'z': choices=.*strings, given ndarray"),
        (site(choices="ab"), TypeError, "site 'z': choices='ab': .*list of strings, given str"),
        (site(choices=3), TypeError, "site 'z': choices=3: .*list of strings, given int"),
        (site(choices=[1, 2]), TypeError, r"site 'z': choices=\[1, 2\]: .*given int among them"),
        (
            site(choices=["a.b", "b"], stop="."),
            ValueError,
            r"site 'z': choice 'a.b' with stop=\['.'\]: .*another stop=, or leave it out",
        ),
        (site(choices=["a.", "b"], stop=".."), ValueError, r"choice 'a.' with stop=\['..'\]"),
        (site(choices=["a", "b"], stop=[".", "b."]), ValueError, "choice 'b' with stop"),
        (site(choices=["a"], stop=["a", "."]), ValueError, "choice 'a' with stop"),
        (site(stop=3), TypeError, "site 'z': stop=3: .*a string or a list"),
        (site(stop={"."}), TypeError, "site 'z': stop={'.'}: .*a string or a list"),
        (site(stop=b"."), TypeError, "site 'z': stop=b'.': .*a string or a list"),
        (site(stop=np.array(["."])), TypeError, "site 'z': stop=array.*a string or a list"),
        (site(stop=[["a"]]), TypeError, r"site 'z': stop=.*: \['a'\] is not a string"),
        (site(choices=[["a"], ["b"]]), TypeError, r"site 'z': choices=\[\['a'\], .*given list"),
        (site(stop=["a", 3]), TypeError, "site 'z': stop=.*: 3 is not a string"),
        (site(temperature="hot"), TypeError, f"site 'z': temperature='hot': .*{NUMBER}"),
        (site(temperature=None), TypeError, f"site 'z': temperature=None: .*{NUMBER}"),
        (site(temperature=True), TypeError, f"site 'z': temperature=True: .*{NUMBER}"),
        (site(temperature=torch.ones(2)), TypeError, f"site 'z': temperature=tensor.*{NUMBER}"),
        (site(temperature=math.nan), ValueError, f"site 'z': temperature=nan: .*{NUMBER}"),
        (site(max_tokens=2.0), TypeError, f"site 'z': max_tokens=2.0: .*{INT}"),
        (site(max_tokens="2"), TypeError, f"site 'z': max_tokens='2': .*{INT}"),
        (site(max_tokens=True), TypeError, f"site 'z': max_tokens=True: .*{INT}"),
        (site(obs=["a"]), TypeError, "site 'z': obs must be a str or a Text, given list"),
        (site(obs=b"a"), TypeError, "site 'z': obs must be a str or a Text, given bytes"),
        (site(lm="gpt2"), TypeError, r"site 'z': lm .*given str.*from_pretrained\('gpt2'\)"),
        (site(infer="x"), TypeError, "site 'z': infer takes a dict of hints, given 'x'"),
    ],
    "a value given to a text": [
        (conditioned(torch.zeros(2)), TypeError, "site 'z': .*LongTensor.* given .*float32"),
        (conditioned(TWO), TypeError, "site 'z': .*LongTensor.* given .*bool"),
        (conditioned([0, 1]), TypeError, "site 'z': .*LongTensor.* given list"),
        (conditioned(3), TypeError, "site 'z': .*LongTensor.* given int"),
        (conditioned(torch.tensor([0, 99])), ValueError, r"site 'z': .*below 4, given \[0, 99\]"),
        (conditioned(torch.tensor([0, -2])), ValueError, r"site 'z': .*below 4, given \[0, -2\]"),
        (traced(torch.tensor([3, 0])), ValueError, r"site 'z': 2 tokens .* closes at token 1 \(eos\)"),
        (traced(torch.zeros(2)), TypeError, "site 'z': .*LongTensor.* given .*float32"),
        (conditioned(torch.tensor([0])), ValueError, r"site 'z': .*shape \(2,\), given .*\(1,\)"),
        (conditioned(torch.tensor(0)), ValueError, r"site 'z': .*shape \(2,\), given .*\(\)"),
        (conditioned(torch.zeros(5, 2).long()), ValueError, r"site 'z' .*batch.*\(5, 2\)"),
    ],
    "LMText": [
        (lambda: LMText("gpt2", "a", max_tokens=2), TypeError, r"lm takes .* given str.*'gpt2'\)"),
        (lambda: LMText(LM, None, max_tokens=2), TypeError, "a prefix is .* not NoneType"),
        (lambda: text(num_tokens="2"), TypeError, "num_tokens='2': .*int of at least 0"),
        (lambda: text(num_tokens=-1), ValueError, "num_tokens=-1: .*int of at least 0"),
        (lambda: text(max_tokens=2.5), TypeError, f"max_tokens=2.5: .*{INT}"),
        (lambda: LMText.batch(LM, "ab", max_tokens=2), ValueError, "list of prefixes, given 'ab'"),
        (lambda: text(max_tokens=2).log_prob("ab"), TypeError, "LongTensor.* given str"),
        (lambda: text(max_tokens=2).log_prob(torch.zeros(2)), TypeError, "LongTensor.*float32"),
    ],
    "require": [
        (after(lambda z: require("r", TWO)), TypeError, r"require 'r': .*tensor\(.*\.all\(\)"),
        (after(lambda z: require("r", TWO.numpy())), TypeError, r"'r': .*array\(.*\.any\(\)"),
        (after(lambda z: require("b" in z, "r")), ValueError, "requirement's name.*non-empty str"),
    ],
    "tool": [
        (after(lambda z: tool("t", "len", z)), TypeError, "tool 't': fn must be .*given str"),
        (after(lambda z: tool(len, z)), (TypeError, ValueError), "name must be .*given <built-in"),
        (
            after(lambda z: tool("t", len, z, on_error="rejct")),
            ValueError,
            "tool 't': on_error='rejct', allowed: 'raise', 'reject'; did you mean 'reject'",
        ),
    ],
    "use": [
        (lambda: lmppl.use("gpt2"), TypeError, r"lmppl.use: lm .*given str.*\('gpt2'\)"),
        (lambda: lmppl.use(None), TypeError, "lmppl.use: lm .*given NoneType"),
    ],
    "infer": [
        (lambda: run("infill"), TypeError, "model must be a function, given str"),
        (lambda: run(posterior()["z"][0]), TypeError, "model must be a function, given Text"),
        (lambda: run(lm="gpt2"), TypeError, r"infer: lm .*given str.*from_pretrained\('gpt2'\)"),
        (lambda: run(lm=LM.model), TypeError, r"infer: lm .*given LlamaFor.*lmppl.LM\(model, tok"),
        (lambda: run(method=lmppl.SMC), TypeError, r"the class SMC: make an object of it, SMC\(\)"),
        (lambda: run(method=None), TypeError, "method.* given NoneType; names: importance, smc"),
        (lambda: run(num_samples=True), TypeError, f"num_samples=True: .*{INT}"),
        (lambda: run(num_samples="8"), TypeError, f"num_samples='8': .*{INT}"),
        (lambda: run(num_samples=0), ValueError, f"num_samples=0: .*{INT}"),
        (lambda: run(seed="a"), TypeError, f"seed='a': .*{SEED}"),
        (lambda: run(seed=2.5), TypeError, f"seed=2.5: .*{SEED}"),
        (lambda: run(seed=True), TypeError, f"seed=True: .*{SEED}"),
        (lambda: run(seed=-1), ValueError, f"seed=-1: .*{SEED}"),
        (lambda: run(seed=2**64), ValueError, f"seed={2**64}: .*below 2"),
        (lambda: run(guide="q"), TypeError, "guide= takes .*LMGuide.* given str"),
        (lambda: run(callback=3), TypeError, "callback must be a function, given int"),
        (lambda: run(profile="x"), TypeError, "profile='x': it must be True or False"),
    ],
    "infer_batch": [
        (lambda: infer_batch(program, [()], lm="x"), TypeError, "lm takes .*given str"),
        (lambda: infer_batch(program, [()], method=lmppl.Exact), TypeError, r"the class Exact"),
        (lambda: infer_batch(program, [()], seed=-1), ValueError, f"seed=-1: .*{SEED}"),
        (lambda: infer_batch(program, [()], num_samples=True), TypeError, f"=True: .*{INT}"),
        (lambda: infer_batch(program, [()], at_once=0), ValueError, f"at_once=0: .*{INT}"),
        (lambda: infer_batch(program, [()], callback=3), TypeError, "callback must be a function"),
        (
            lambda: infer_batch(program, [()], on_error="returns"),
            ValueError,
            "on_error='returns', allowed: 'raise', 'return'; did you mean 'return'",
        ),
    ],
    "engines": [
        (lambda: lmppl.SMC(ess_threshold="x"), TypeError, "ess_threshold='x': .*at least 0 and"),
        (lambda: lmppl.SMC("systematic"), TypeError, "ess_threshold='systematic': .*a number"),
        (lambda: lmppl.SMC(ess_threshold=1.5), ValueError, "ess_threshold=1.5: .*at most 1"),
        (lambda: lmppl.SMC(resampling="resid"), ValueError, "='resid', .*did you mean 'residual'"),
        (lambda: lmppl.SMC(twist=3), ValueError, "twist=3, allowed: None, 'lookahead', 'flow', a call"),
        (lambda: lmppl.SMC(twist="look"), ValueError, "twist='look', allowed: None, 'lookahead'"),
        (lambda: lmppl.SMC(twist={"z": 3}), ValueError, "twist={'z': 3}, allowed: .*dict of callables"),
        (lambda: lmppl.SMC(twist_every=True), TypeError, f"twist_every=True: .*{INT}"),
        (lambda: lmppl.SMC(twist_every=0), ValueError, f"twist_every=0: .*{INT}"),
        (lambda: lmppl.SMC(twist_defense=2), ValueError, "twist_defense=2: .*at most 1"),
        (lambda: lmppl.Exact(max_traces="9"), TypeError, f"max_traces='9': .*{INT}"),
        (lambda: lmppl.Exact(max_traces=0), ValueError, f"max_traces=0: .*{INT}"),
        (lambda: lmppl.GFlowNet(steps=0), ValueError, f"steps=0: .*{INT}"),
        (lambda: lmppl.GFlowNet(steps="9"), TypeError, f"steps='9': .*{INT}"),
        (lambda: lmppl.GFlowNet(correct="no"), TypeError, "correct='no': .*True or False"),
        (lambda: lmppl.GFlowNet(fit=3), TypeError, "fit=3: it takes a dict"),
        (lambda: lmppl.GFlowNet(fit={"steps": 3}), TypeError, "fit={'steps': 3}: .*not steps="),
        (lambda: lmppl.Importance().run(program, num_samples=True), TypeError, f"=True: .*{INT}"),
        (lambda: lmppl.register_engine(3, lmppl.SMC), TypeError, "name must be a string, given 3"),
        (lambda: lmppl.register_engine("mine", lmppl.SMC()), TypeError, "engine must be a function"),
        (lambda: lmppl.register_engine("smc", lmppl.SMC), ValueError, "'smc' is registered"),
    ],
    "LMGuide": [
        (lambda: lmppl.LMGuide("infill", lm=LM), TypeError, "model must be a function, given str"),
        (lambda: lmppl.LMGuide(program, lm="gpt2"), TypeError, r"LMGuide: lm .*given str.*'gpt2'\)"),
        (lambda: lmppl.LMGuide(program, lm=LM, lora="x"), TypeError, "a peft.LoraConfig, given str"),
        (lambda: lmppl.LMGuide(program, lm=LM, program=3), TypeError, "program must be a function"),
        (guide(condition_on="y"), TypeError, "condition_on='y': give 'all' or a list"),
        (guide(condition_on=3), TypeError, "condition_on=3: give 'all' or a list"),
        (guide(condition_on=[3]), TypeError, r"condition_on=\[3\]: give .all. or a list of names"),
        (lambda: run(guide=lmppl.LMGuide), TypeError, "given the class LMGuide: make an object"),
        (lambda: guide()().fit("ab"), TypeError, "data must be a list of inputs, given one str"),
        (lambda: guide()().fit([()], steps="9"), TypeError, f"steps='9': .*{INT}"),
        (lambda: guide()().fit([()], seed="a"), TypeError, f"seed='a': .*{SEED}"),
        (lambda: guide()().fit([()], seed=-1), ValueError, f"seed=-1: .*{SEED}"),
        (lambda: guide()().fit([()], batchsize=8), TypeError, "'batchsize'; did you mean 'batch_size'"),
        (lambda: guide()().fit([()], training_tokens=0), ValueError, "training_tokens=0: .*least 1"),
    ],
    "fit and learn": [
        (lambda: guide()().fit([()], callback=3), TypeError, "callback must be a function, given int"),
        (lambda: guide()().fit([()], eval_every="9"), TypeError, f"eval_every='9': .*{INT}"),
        (lambda: guide()().fit([()], patience="9"), TypeError, f"patience='9': .*{INT}"),
        (lambda: guide()().fit([()], checkpoint_every=0), ValueError, f"checkpoint_every=0: .*{INT}"),
        (lambda: guide()().fit([()], resume="yes"), TypeError, "resume='yes': .*True or False"),
        (lambda: guide()().fit([()], learning_rate="x"), TypeError, f"learning_rate='x': .*{NUMBER}"),
        (lambda: guide()().fit([()], loss="vargard"), ValueError, "'vargard', .*did you mean 'vargrad'"),
        (lambda: guide()().fit(simulate="9"), TypeError, f"simulate='9': .*{INT}"),
        (lambda: guide()().fit(), ValueError, r"fit needs inputs: data=\[\(x, y\)"),
        (lambda: lmppl.learn(program, [()]), TypeError, r"learn takes a guide.*given function"),
        (lambda: lmppl.learn(guide()(), 3), TypeError, "data must be a list of inputs, given one int"),
        (lambda: lmppl.learn(guide()(), [()], "9"), TypeError, f"steps='9': .*{INT}"),
        (lambda: lmppl.learn(guide()(), [()], seed=-1), ValueError, f"seed=-1: .*{SEED}"),
        (lambda: lmppl.learn(guide()(), [()], method="me"), ValueError, "method='me', .*mean 'em'"),
        (lambda: lmppl.learn(guide()(), [()], num_samples=True), TypeError, f"=True: .*{INT}"),
    ],
    "diagnose": [
        (lambda: diagnose(3, lm=LM), TypeError, "model must be a function, given int"),
        (lambda: diagnose(program, lm="x"), TypeError, "lm takes .*given str"),
        (lambda: diagnose(program, 3, lm=LM), TypeError, "given 1 positional"),
        (lambda: diagnose(program, lm=LM, num_samples="9"), TypeError, "num_samples='9'.*least 2"),
        (lambda: diagnose(program, lm=LM, num_samples=1), ValueError, "num_samples=1.*least 2"),
        (lambda: diagnose(program, lm=LM, seed="a"), TypeError, f"seed='a': .*{SEED}"),
        (lambda: diagnose(program, lm=LM, posterior=3), TypeError, "posterior .*given int"),
        (lambda: diagnose(program, lm=LM, latents=3), TypeError, "latents .*list of dicts.* 3"),
        (lambda: diagnose(program, lm=LM, latents={"z": "a"}), TypeError, "latents .*list of dic"),
        (lambda: diagnose(program, lm=LM, latents=["ab"]), TypeError, "latents .*list of dicts"),
        (lambda: diagnose(program, lm=LM, guide=3), TypeError, "guide= takes .*given int"),
    ],
    "LM": [
        (lambda: lmppl.LM("gpt2", "gpt2"), TypeError, "str is not a causal language model"),
        (lambda: lmppl.LM(LM.model, None), TypeError, "tokenizer must be .* given None"),
        (lambda: lmppl.LM.from_pretrained(None), TypeError, "name_or_path=None: .*a name or a path"),
        (lambda: lmppl.LM.from_pretrained("x", dtype=3), ValueError, "dtype=3 .*use one of float"),
        (lambda: lmppl.LM.from_pretrained("x", device=3.5), ValueError, "device='3.5' cannot"),
        (lambda: LM.sample("a", "2", max_tokens=2), TypeError, "num_samples='2': .*at least 0"),
        (lambda: LM.sample("a", True, max_tokens=2), TypeError, "num_samples=True: .*at least 0"),
        (lambda: LM.sample("a", -1, max_tokens=2), ValueError, "num_samples=-1: .*at least 0"),
        (lambda: LM.sample("a", 2, max_tokens="2"), TypeError, f"max_tokens='2': .*{INT}"),
        (lambda: LM.sample("a", 2, max_tokens=2, seed="a"), TypeError, f"seed='a': .*{SEED}"),
        (lambda: LM.sample("a", 2, max_tokens=2, seed=-1), ValueError, f"seed=-1: .*{SEED}"),
        (lambda: LM.sample("a", 2, max_tokens=2, temperature="hot"), TypeError, "temperature='hot'"),
        (lambda: LM.sample(None, 2, max_tokens=2), TypeError, "a prefix is .* not NoneType"),
        (lambda: LM.log_prob(None, ["a"]), TypeError, "a prefix is .* not NoneType"),
        (lambda: LM.log_prob("a", None), TypeError, "continuations takes a list .* given None"),
        (lambda: LM.log_prob("a", [3]), TypeError, "an observed text is a str or a Text, not int"),
        (lambda: LM.log_prob("a", ["b"], temperature=0), ValueError, f"temperature=0: .*{NUMBER}"),
        (lambda: LM.adapter("lora"), TypeError, r"takes a peft.LoraConfig, given str \('lora'\)"),
    ],
    "Posterior": [
        (lambda: posterior().resample(0), ValueError, f"n=0: .*{INT}"),
        (lambda: posterior().resample(2.5), TypeError, f"n=2.5: .*{INT}"),
        (lambda: posterior().resample(True), TypeError, f"n=True: .*{INT}"),
        (lambda: posterior().resample(2, seed="a"), TypeError, f"seed='a': .*{SEED}"),
        (lambda: posterior().resample(2, seed=-1), ValueError, f"seed=-1: .*{SEED}"),
        (lambda: posterior()["zz"], KeyError, "site 'zz'; did you mean 'z'.*Sites: z"),
        (lambda: posterior()[0], KeyError, "site 0.*Sites: z"),
        (lambda: posterior().mean("z"), TypeError, r"site 'z' has no mean.*gives Text.*\.probs"),
        (lambda: posterior().mean(3), TypeError, "mean takes .* one site, .* one function .*given 3"),
        (lambda: posterior().mean("z", "n"), TypeError, "given 'z', 'n': ask for one after the other"),
        (lambda: posterior().quantile("z", 0.1, 0.9), TypeError, r"'z', 0.1, 0.9.* list: q=\[0.05"),
        (
            lambda: posterior().probs("z", "n"),
            TypeError,
            r"given 'z', 'n': .*probs\(lambda v: \(v\['z'\], v\['n'\]\)\), or .*table\('z', 'n', joint",
        ),
        (lambda: posterior().best(["z", "n"]), TypeError, r"given \['z', 'n'\]: .*best\(lambda v:"),
        (lambda: posterior().probs("z", True), TypeError, "'z', True. What else .*: returns="),
        (lambda: posterior().plot("z", posterior()), TypeError, "'z', Posterior. .*returns=, prior="),
        (lambda: posterior().mean(lambda v: None), TypeError, "the function has no mean.*gives None"),
        (lambda: posterior().mean(lambda v: v["z"]), TypeError, "the function has no mean.*gives Text"),
    ],
    "History": [
        (lambda: HISTORY.table("5"), TypeError, f"rows='5': .*{INT}"),
        (lambda: HISTORY.table(0), ValueError, f"rows=0: .*{INT}"),
        (lambda: HISTORY.smoothed("loss", 1.5), TypeError, f"window=1.5: .*{INT}"),
        (lambda: HISTORY.column("los"), ValueError, "no step has the figure 'los'.*loss"),
    ],
    "Memory": [
        (lambda: lmppl.Memory(batch_bytes="1G"), TypeError, f"batch_bytes='1G': .*{INT}"),
        (lambda: lmppl.Memory(training_tokens=0), ValueError, f"training_tokens=0: .*{INT}"),
        (lambda: lmppl.Memory(gradient_checkpointing="no"), TypeError, "='no': .*True or False"),
    ],
}  # fmt: skip
ROWS = [(of, *row) for of, rows in MISUSE.items() for row in rows]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [row[1:] for row in ROWS],
    ids=[f"{of}-{message}" for of, _, _, message in ROWS],
)
def test_misuse_is_told_apart(call, error, message):
    with pytest.raises(error, match=message):
        call()
    # Whatever went wrong, the global state is as before.
    assert not poutine.runtime._PYRO_STACK and torch.is_grad_enabled()


@pytest.mark.parametrize(
    "call",
    [
        lambda: run(seed=np.int64(3), num_samples=np.int32(2)),
        lambda: run(seed=torch.tensor(3)),
        lambda: run(seed=2**64 - 1, method="smc"),
        lambda: list(infer_batch(program, [()], lm=LM, num_samples=np.int64(2), seed=np.uint8(1))),
        lambda: diagnose(program, lm=LM, num_samples=np.int64(2), seed=np.int64(1)),
        lambda: run(method=lmppl.SMC(twist_every=np.int64(1), ess_threshold=np.float32(0.5))),
        lambda: run(method=lmppl.SMC(twist={"z": len})),
        site(max_tokens=np.int64(2), temperature=np.float32(0.5)),
        site(temperature=torch.tensor(0.5)),
        site(choices=("a", "b"), temperature=1),
        site(choices=["ab", "a"], stop=["b.", "."]),
        lambda: LM.sample("a", np.int64(2), max_tokens=np.int64(2), seed=np.int64(0)),
        lambda: LM.log_prob("a", "b", temperature=np.float64(2)),
        lambda: posterior().resample(np.int64(3), seed=np.int64(0)),
        lambda: HISTORY.table(np.int64(3)),
        lambda: lmppl.Memory(batch_bytes=np.int64(1000)),
        after(lambda z: require("r", np.bool_(True))),
        after(lambda z: require("r", torch.tensor([True]))),
        after(lambda z: require("r", [z])),
    ],
)  # fmt: skip
def test_numbers_of_other_libraries_are_taken(call):
    call()  # which raised, where they were not


def test_a_seed_of_another_type_is_the_same_seed():
    for seed in (np.int64(3), np.uint8(3), torch.tensor(3)):
        assert run(seed=seed)["z"] == run(seed=3)["z"]


def test_integer_tensors_of_other_types_are_token_ids():
    value = LMText(LM, "ab", max_tokens=2).encode("ab")
    for dtype in (torch.int32, torch.int16):
        model = pyro.condition(program, data={"z": value.to(dtype)})
        with lmppl.use(LM):
            trace = poutine.trace(model).get_trace()
        assert (
            torch.equal(trace.nodes["z"]["value"], value)
            and trace.nodes["_RETURN"]["value"] == "ab"
        )
