"""The words of a program: lm_sample, tool, require, chat, use."""

from __future__ import annotations

import asyncio
import contextvars
import math
import threading
import warnings

import pyro
import pytest
import torch
from pyro import poutine

import lmppl
from lmppl import LMText, Text, chat, lm_sample, require, tool
from lmppl.distributions import PAD, ToolResult
from lmppl.primitives import _default_lm, _lasting, _warned, default_lm
from lmppl.testing import naive_log_prob, tiny_lm

LM = tiny_lm("ab.", seed=0)
LM.model.requires_grad_(False)
A, B, DOT, EOS = range(4)


@pytest.fixture(autouse=True)
def _fresh_state():
    _warned.clear()
    pyro.set_rng_seed(0)
    lasting = list(_lasting)
    with lmppl.use(LM):
        yield
    _lasting[:] = lasting
    assert not poutine.runtime._PYRO_STACK


def trace_of(program, *args):
    return poutine.trace(program).get_trace(*args)


# --- lm_sample ---


def test_a_latent_site_returns_a_text_and_records_its_tokens():
    def program():
        return lm_sample("z", "ab", max_tokens=4, stop=".")

    trace = trace_of(program)
    node = trace.nodes["z"]
    z = trace.nodes["_RETURN"]["value"]
    assert isinstance(z, Text) and isinstance(node["fn"], LMText) and not node["is_observed"]
    assert node["value"].shape == (4,) and node["value"].dtype == torch.long
    assert node["fn"].token_ids(node["value"]) == z.token_ids
    trace.compute_log_prob()
    expected = naive_log_prob(LM, LM.encode("ab"), z.token_ids).sum()
    assert float(node["log_prob_sum"]) == pytest.approx(float(expected), abs=1e-4)


def test_it_draws_without_any_handler():
    torch.manual_seed(1)
    first = lm_sample("z", "ab", max_tokens=4)
    torch.manual_seed(1)
    assert isinstance(first, Text) and first == lm_sample("z", "ab", max_tokens=4)
    assert lm_sample("y", "ab", obs="ba") == "ba"


@pytest.mark.parametrize(
    ("site", "obs", "scored"),
    [
        ({}, "ab", (A, B)),  # a beginning: no end factor
        ({"stop": "."}, "ab.", (A, B, DOT)),
        ({"stop": "."}, "ab", (A, B, EOS)),
        ({"max_tokens": 4}, "ab", (A, B, EOS)),
        ({"max_tokens": 2}, "ab", (A, B)),
        ({"max_tokens": 4, "stop": "."}, "", (EOS,)),
        ({"stop": ["ab", "."]}, "ab", (A, B)),
    ],
    ids=str,
)
def test_an_observed_site_scores_these_tokens(site, obs, scored):
    trace = trace_of(lambda: lm_sample("y", "ba", obs=obs, **site))
    node = trace.nodes["y"]
    assert node["is_observed"] and node["fn"].token_ids(node["value"]) == scored
    trace.compute_log_prob()
    expected = naive_log_prob(LM, LM.encode("ba"), scored).sum()
    assert float(node["log_prob_sum"]) == pytest.approx(float(expected), abs=1e-4)
    assert str(trace.nodes["_RETURN"]["value"]) == obs


def test_a_text_is_observed_with_its_own_tokens():
    lm = tiny_lm(["a", "b", "ab"], seed=0)
    drawn = LMText(lm, "a", max_tokens=3).text(torch.tensor([0, 1, 3]))
    for obs, ids in ((drawn, [0, 1, 3]), (str(drawn), [2])):
        trace = trace_of(lambda obs=obs: lm_sample("y", "a", obs=obs, lm=lm))
        assert trace.nodes["y"]["value"].tolist() == ids


def test_temperature_is_part_of_the_density():
    trace = trace_of(lambda: lm_sample("y", "ba", temperature=2.0, obs="ab"))
    expected = naive_log_prob(LM, LM.encode("ba"), (A, B), 2.0).sum()
    assert float(trace.log_prob_sum()) == pytest.approx(float(expected), abs=1e-4)


def test_choices():
    trace = trace_of(lambda: lm_sample("k", "ba", choices=["ab", "b."]))
    assert trace.nodes["_RETURN"]["value"] in ("ab", "b.")
    trace = trace_of(lambda: lm_sample("k", "ba", choices=["ab", "b."], obs="b."))
    assert trace.nodes["k"]["is_observed"]
    scores = torch.stack(
        [naive_log_prob(LM, LM.encode("ba"), ids).sum() for ids in ((A, B), (B, DOT))]
    )
    expected = torch.log_softmax(scores, 0)[1]
    assert float(trace.log_prob_sum()) == pytest.approx(float(expected), abs=1e-4)


def test_infer_hints_reach_the_site():
    trace = trace_of(lambda: lm_sample("z", "a", max_tokens=1, infer={"guide_prompt": "b"}))
    assert trace.nodes["z"]["infer"]["guide_prompt"] == "b"


def test_prefixes_join_texts_by_their_tokens():
    def program():
        z = lm_sample("z", "ab", max_tokens=2)
        w = lm_sample("w", ["b", z, "a"], max_tokens=2)
        lm_sample("y", z + w + ".", obs="a")

    nodes = trace_of(program).nodes
    tokens = {
        name: [t for t in nodes[name]["value"].tolist() if t not in (PAD, EOS)] for name in "zw"
    }
    assert nodes["w"]["fn"].prefix_ids == (B, *tokens["z"], A)
    assert nodes["y"]["fn"].prefix_ids == (*tokens["z"], *tokens["w"], DOT)


def test_several_language_models_in_one_program():
    other = tiny_lm("ab.", seed=5)
    foreign = tiny_lm("xyab.", seed=6)

    def program():
        z = lm_sample("z", "ab", max_tokens=2)
        w = lm_sample("w", [z, "a"], max_tokens=2, lm=other)
        lm_sample("y", str(z + w) + "x", lm=foreign, obs="yx")
        with lmppl.use(other):
            lm_sample("v", "a", obs="b")

    trace = trace_of(program)
    lms = [trace.nodes[name]["fn"].lm for name in ("z", "w", "y", "v")]
    assert lms == [LM, other, foreign, other]
    trace.compute_log_prob()
    for name in ("z", "w", "y", "v"):
        node = trace.nodes[name]
        fn = node["fn"]
        expected = naive_log_prob(fn.lm, fn.prefix_ids, fn.token_ids(node["value"])).sum()
        assert float(node["log_prob"].detach()) == pytest.approx(float(expected), abs=1e-4)


# --- plates ---


def test_sequential_plates_work_and_are_counted_once_each():
    def program():
        texts = []
        for i in pyro.plate("lines", 3):
            texts.append(lm_sample(f"z_{i}", "ab", max_tokens=2))
        return texts

    trace = trace_of(program)
    assert [name for name in trace.nodes if name.startswith("z_")] == ["z_0", "z_1", "z_2"]
    parts = [
        float(trace.nodes[f"z_{i}"]["fn"].log_prob(trace.nodes[f"z_{i}"]["value"]))
        for i in range(3)
    ]
    assert float(trace.log_prob_sum()) == pytest.approx(sum(parts), abs=1e-5)


def test_a_subsampled_plate_scales_its_observations():
    def program():
        for i in pyro.plate("data", 4, subsample_size=2):
            lm_sample(f"y_{i}", "ab", obs="ab")

    one = float(naive_log_prob(LM, LM.encode("ab"), (A, B)).sum())
    assert float(trace_of(program).log_prob_sum()) == pytest.approx(4 * one, abs=1e-3)


@pytest.mark.parametrize("obs", [None, "a"])
def test_a_vectorised_plate_is_an_error_that_shows_the_sequential_form(obs):
    def program():
        with pyro.plate("lines", 3):
            lm_sample("z", "ab", max_tokens=2, obs=obs)

    with pytest.raises(
        ValueError, match=r"site 'z'.*plate 'lines'.*for i in pyro.plate\('lines', n\)"
    ):
        trace_of(program)


def test_a_batch_of_texts_in_a_vectorised_plate_is_pyro_own_business():
    def program():
        with pyro.plate("lines", 2):
            return pyro.sample("z", LMText.batch(LM, ["a", "b"], max_tokens=2))

    trace = trace_of(program)
    assert trace.nodes["z"]["value"].shape == (2, 2)
    trace.compute_log_prob()
    assert trace.nodes["z"]["log_prob"].shape == (2,)


# --- use ---


def test_use_nests_and_comes_back():
    other = tiny_lm(seed=3)
    assert default_lm() is LM
    with lmppl.use(other) as lm:
        assert lm is other and default_lm() is other
        with pytest.raises(KeyError), lmppl.use(LM):
            raise KeyError
        assert default_lm() is other
    assert default_lm() is LM


def test_use_without_with_lasts():
    other, third = tiny_lm(seed=3), tiny_lm(seed=4)
    lmppl.use(other)
    assert default_lm() is other
    with lmppl.use(third):
        assert default_lm() is third
    assert default_lm() is other


def test_a_use_can_be_entered_later_and_again_and_within_itself():
    other = tiny_lm(seed=3)
    block = lmppl.use(other)
    for _ in range(2):
        with block:
            assert default_lm() is other
        assert default_lm() is LM
    with block, block:
        assert default_lm() is other
    assert default_lm() is LM
    contextvars.copy_context().run(lambda: [block.__enter__(), block.__exit__(None, None, None)])


@pytest.mark.parametrize("run", ["thread", "task"])
def test_a_lasting_default_is_seen_everywhere(run):
    """In other threads, and in later cells of a notebook, which may be tasks of their own."""
    other, seen = tiny_lm(seed=3), []

    def in_thread(do):
        thread = threading.Thread(target=do)
        thread.start()
        thread.join()

    async def notebook():
        async def cell(do):
            do()

        await asyncio.create_task(cell(lambda: lmppl.use(other)))
        await asyncio.create_task(cell(lambda: seen.append(default_lm())))

    token = _default_lm.set(None)
    try:
        if run == "task":
            asyncio.run(notebook())
        else:
            lmppl.use(other)
            in_thread(lambda: seen.append(default_lm()))
            with lmppl.use(LM):
                in_thread(lambda: seen.append(default_lm()))
        assert set(seen) == {other}
    finally:
        _default_lm.reset(token)


def test_a_block_is_not_seen_by_other_threads():
    seen = []
    with lmppl.use(tiny_lm(seed=3)) as lm:
        thread = threading.Thread(target=lambda: seen.append(default_lm()))
        thread.start()
        thread.join()
    assert seen[0] is not lm


def test_what_is_no_language_model_is_refused():
    with pytest.raises(TypeError, match=r"lmppl.LM.*given LlamaForCausalLM.*from_pretrained"):
        lmppl.use(LM.model)
    with pytest.raises(TypeError, match=r"site 'z'.*lmppl.LM"):
        lm_sample("z", "a", max_tokens=1, lm=LM.model)


# --- tool ---


def test_a_tool_is_called_once_and_recorded():
    calls = []

    def look_up(word, n):
        calls.append(word)
        return {"word": word, "n": n}

    def program():
        return tool("facts", look_up, "ab", 2)

    trace = trace_of(program)
    assert trace.nodes["_RETURN"]["value"] == {"word": "ab", "n": 2} and calls == ["ab"]
    assert trace.nodes["facts"]["value"].result == {"word": "ab", "n": 2}
    assert float(trace.log_prob_sum()) == 0.0
    assert tool("facts", look_up, "b", 1)["word"] == "b"  # without any handler


def test_replay_returns_the_result_without_calling_again():
    calls = []

    def program():
        z = lm_sample("z", "ab", max_tokens=2)
        return z, tool("count", lambda text: calls.append(text) or len(calls), z)

    trace = trace_of(program)
    replayed = trace_of(poutine.replay(program, trace=trace))
    assert len(calls) == 1
    assert replayed.nodes["_RETURN"]["value"] == trace.nodes["_RETURN"]["value"]
    trace.detach_()
    assert poutine.replay(program, trace=trace)() == trace.nodes["_RETURN"]["value"]
    assert len(calls) == 1


@pytest.mark.parametrize(
    "result", ["a plain string", 7, {"k": [1]}, None, ToolResult.wrap("wrapped")]
)
def test_a_tool_can_be_given_its_result(result):
    def program():
        return tool("search", lambda: pytest.fail("the tool was called"))

    if result is None:  # Pyro takes None for "not conditioned"
        result = ToolResult.wrap(None)
    found = pyro.condition(program, data={"search": result})()
    assert found is None or found in ("a plain string", 7, {"k": [1]}, "wrapped")
    assert found == (result.result if isinstance(result, ToolResult) else result)


def test_a_failing_tool_raises_or_rejects():
    def program(on_error):
        return tool("divide", lambda: 1 / 0, on_error=on_error)

    with pytest.raises(ZeroDivisionError):
        trace_of(program, "raise")
    trace = trace_of(program, "reject")
    assert float(trace.log_prob_sum()) == -math.inf
    assert trace.nodes["_RETURN"]["value"] is None
    assert isinstance(trace.nodes["divide"]["value"].error, ZeroDivisionError)


def test_a_tool_may_return_what_a_model_wrote_and_the_model_does_not_score_it():
    def program():
        z = lm_sample("z", "ab", max_tokens=2)
        same = tool("echo", lambda text: text, z)
        lm_sample("y", ["b", same], obs="a")
        return z, same

    trace = trace_of(program)
    z, same = trace.nodes["_RETURN"]["value"]
    assert same is z and trace.nodes["y"]["fn"].prefix_ids == LM.encode(["b", z])
    trace.compute_log_prob()
    assert float(trace.nodes["echo"]["log_prob_sum"]) == 0.0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: tool("t", len, "a", on_error="ignore"), ValueError, r"'t'.*'ignore'.*'reject'"),
        (lambda: tool("t", 3), TypeError, "'t'.*callable.*int"),
    ],
)
def test_bad_tools(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_tool_in_a_vectorised_plate_is_an_error_about_a_tool():
    def program():
        with pyro.plate("lines", 3):
            tool("t", len, "ab")

    with pytest.raises(ValueError, match=r"tool 't'.*plate 'lines'.*tool\(f't_\{i\}'"):
        trace_of(program)


# --- require ---


@pytest.mark.parametrize(
    ("condition", "log_prob"),
    [(True, 0.0), (False, -math.inf), (torch.tensor(True), 0.0), ("", -math.inf), ([1], 0.0)],
)
def test_require_is_a_factor_under_pyro(condition, log_prob):
    after = []

    def program():
        require("ok", condition)
        after.append(1)

    trace = trace_of(program)
    assert float(trace.log_prob_sum()) == log_prob and after == [1]
    assert trace.nodes["ok"]["is_observed"]


def test_a_program_that_meets_its_conditions_runs_bare_without_a_warning():
    def program():
        z = lm_sample("z", "ab", max_tokens=2)
        require("a text", isinstance(z, Text))
        return tool("len", len, z)

    assert program() <= 2


# --- chat ---

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }};{% endfor %}{% if add_generation_prompt %}>{% endif %}"  # noqa: E501


@pytest.fixture
def chat_lm():
    lm = tiny_lm(["a", "b", "ab", "s", "u", ":", ";", ">"], seed=0, bos=True)
    lm.tokenizer.chat_template = TEMPLATE
    return lm


def test_chat_is_a_prefix_in_which_texts_keep_their_tokens(chat_lm):
    z = LMText(chat_lm, "a", max_tokens=2).text(torch.tensor([0, 1]))
    messages = [{"role": "system", "content": "ab"}, {"role": "user", "content": z}]
    with lmppl.use(chat_lm):
        prefix = chat(messages)
        bare = chat(messages, add_generation_prompt=False)
    assert isinstance(prefix, Text)
    ids = LMText(chat_lm, prefix, max_tokens=1).prefix_ids
    bos = chat_lm.tokenizer.bos_token_id
    assert ids.count(bos) == 1 and ids[0] == bos
    assert [chat_lm.tokenizer.convert_ids_to_tokens(i) for i in ids[1:]] == [
        "s", ":", "ab", ";", "u", ":", "a", "b", ";", ">"
    ]  # fmt: skip
    assert not str(bare).endswith(">")


def test_chat_needs_a_template_and_whole_messages(chat_lm):
    with pytest.raises(ValueError, match="chat template"):
        chat([{"role": "user", "content": "a"}])
    with pytest.raises(ValueError, match="message 0"):
        chat([{"role": "user"}], lm=chat_lm)


# --- warnings ---


def test_a_latent_pasted_into_a_string_warns_once_per_site():
    def program(paste):
        z = lm_sample("z", "ab", max_tokens=8)
        lm_sample("w", paste(z), max_tokens=1)

    drawn = trace_of(lambda: lm_sample("z", "ab", max_tokens=8))
    drawn.nodes["z"]["value"] = drawn.nodes["z"]["fn"].encode("abba")
    run = poutine.replay(program, trace=drawn)
    message = r"site 'w'.*site 'z'.*plain str.*\[before, z, after\]"
    with pytest.warns(UserWarning, match=message) as caught:
        trace_of(run, lambda z: f"a{z}.")
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trace_of(run, lambda z: f"a{z}.")  # once
        _warned.clear()
        trace_of(run, lambda z: ["a", z, "."])  # tokens are kept
        trace_of(run, lambda z: "a" + z)
    with pytest.warns(UserWarning, match=message):
        trace_of(run, lambda z: z + f"a{z}.")  # its second half is not


def test_a_message_that_was_warned_of_hides_no_pasted_latent(chat_lm):
    """Another program's ``chat`` has warned of its own site of that name."""

    def program():
        z = lm_sample("z", "ab", max_tokens=8, lm=chat_lm)
        lm_sample("y", f"a{z}", max_tokens=1, lm=chat_lm)

    drawn = trace_of(lambda: lm_sample("z", "ab", max_tokens=8, lm=chat_lm))
    drawn.nodes["z"]["value"] = drawn.nodes["z"]["fn"].encode("abba")
    _warned.clear()
    _warned.add(("chat", "z"))
    with pytest.warns(UserWarning, match="site 'y': its prefix holds the text of site 'z'"):
        poutine.trace(poutine.replay(program, trace=drawn)).get_trace()


def test_a_latent_pasted_into_a_message_warns_once_per_site(chat_lm):
    def program(content):
        z = lm_sample("z", "ab", max_tokens=8, lm=chat_lm)
        chat(
            [{"role": "system", "content": "ab"}, {"role": "user", "content": content(z)}],
            lm=chat_lm,
        )

    drawn = trace_of(lambda: lm_sample("z", "ab", max_tokens=8, lm=chat_lm))
    drawn.nodes["z"]["value"] = drawn.nodes["z"]["fn"].encode("abba")
    run = poutine.replay(program, trace=drawn)
    parts = lambda text: [{"type": "text", "text": text}]  # noqa: E731
    message = r"chat\(\): a message holds the text of site 'z' as a plain str.*before \+ z"
    for content in (lambda z: f"a{z};", lambda z: str(z), lambda z: parts(f"{z}")):
        _warned.clear()
        with pytest.warns(UserWarning, match=message) as caught:
            trace_of(run, content)
        assert caught[0].filename == __file__  # not of lmppl
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            trace_of(run, content)  # once
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _warned.clear()
        for content in (lambda z: z, lambda z: "a" + z + ";", lambda z: "bbbb"):
            trace_of(run, content)  # tokens are kept


def test_a_prefix_that_ends_in_a_space_warns_once():
    lm = tiny_lm(["a", " ", "b"], seed=0)
    with pytest.warns(UserWarning, match="site 'z'.*ends in a space"):
        lm_sample("z", "a ", max_tokens=1, lm=lm)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lm_sample("z", "a ", max_tokens=1, lm=lm)
        lm_sample("w", ["a ", "b"], max_tokens=1, lm=lm)
        lm_sample("v", ["a ", Text(" ", (1,), lm.vocabulary)], max_tokens=1, lm=lm)
    with pytest.warns(UserWarning, match="site 'u'"):
        lm_sample("u", ["b", "a "], max_tokens=1, lm=lm)


def test_short_texts_are_found_by_chance_and_warn_of_nothing():
    def program():
        lm_sample("z", "ab", max_tokens=1)
        lm_sample("w", "abab.", max_tokens=1)

    trace_of(program)
