"""LMText: a language model as a Pyro distribution."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro.distributions.torch_distribution import TorchDistributionMixin

from lmppl import LM, LMText, Text
from lmppl.constraints import Regex
from lmppl.distributions import PAD, ToolCall, ToolResult, draw_texts, score_texts
from lmppl.testing import enumerate_site, naive_log_prob, tiny_byte_lm
from lmppl.testing import tiny_lm as trainable_tiny_lm


def tiny_lm(*args, **kwargs) -> LM:
    """A frozen one, as ``from_pretrained`` makes them."""
    lm = trainable_tiny_lm(*args, **kwargs)
    lm.model.requires_grad_(False)
    return lm


TINY = tiny_lm("ab.", seed=0)
A, B, DOT, EOS = range(4)
SITES = [
    {"max_tokens": 1},
    {"max_tokens": 3},
    {"max_tokens": 3, "stop": "."},
    {"max_tokens": 4, "stop": ["ab", "."]},  # a stop string of two tokens
    {"max_tokens": 3, "stop": ".", "temperature": 0.5},
    {"max_tokens": 3, "temperature": 2.5},
]


def values_of(d: LMText, ids: list[tuple[int, ...]]) -> torch.Tensor:
    return torch.stack([d.value(each) for each in ids])


# --- the density ---


@pytest.mark.parametrize("site", SITES, ids=str)
@pytest.mark.parametrize("lm", [TINY, tiny_lm("ab.", seed=1, eos=False)], ids=["eos", "no eos"])
def test_it_sums_to_one_over_its_values_and_equals_a_plain_forward(lm, site):
    d = LMText(lm, "ab", **site)
    table = enumerate_site(lm, lm.encode("ab"), **site)
    log_probs = d.log_prob(values_of(d, list(table)))
    assert float(log_probs.double().exp().sum()) == pytest.approx(1.0, abs=1e-5)
    torch.testing.assert_close(
        log_probs.double(), torch.tensor(list(table.values()), dtype=torch.float64),
        atol=1e-4, rtol=0,
    )  # fmt: skip


def test_a_distribution_says_what_it_is():
    assert repr(LMText(TINY, "ab", max_tokens=3)) == "LMText(tiny-ab.-0, 'ab', max_tokens=3)"
    d = LMText(TINY, "ab" * 20, max_tokens=3, stop=".", temperature=0.5)
    tail = "ab" * 12
    assert repr(d) == f"LMText(tiny-ab.-0, ...'{tail}', max_tokens=3, stop='.', temperature=0.5)"
    assert repr(LMText(TINY, "a", choices=["a", "b"])) == "LMText(tiny-ab.-0, 'a', 2 choices)"
    assert repr(LMText(TINY, "a", num_tokens=2)) == "LMText(tiny-ab.-0, 'a', num_tokens=2)"
    regex = LMText(TINY, "a", max_tokens=2, stop=["a", "b"], constraint=Regex("a|b"))
    shown = f"LMText(tiny-ab.-0, 'a', max_tokens=2, stop=['a', 'b'], {Regex('a|b')!r}"
    assert repr(regex) == f"{shown}, constrain='global')"
    assert repr(regex.expand((2,))) == f"{shown}, constrain='global', batch_shape=(2,))"


def test_every_other_sequence_has_probability_zero():
    d = LMText(TINY, "ab", max_tokens=3, stop=".")
    table = enumerate_site(TINY, TINY.encode("ab"), 3, ".")
    everything = torch.cartesian_prod(*[torch.arange(-1, 4)] * 3)  # (125, 3)
    inside = [tuple(t for t in row if t >= 0) for row in everything.tolist()]
    padded_right = [
        row == d.value(ids).tolist() for row, ids in zip(everything.tolist(), inside, strict=True)
    ]
    expected = [ok and ids in table for ids, ok in zip(inside, padded_right, strict=True)]
    assert sum(expected) == len(table)
    log_probs = d.log_prob(everything)
    assert (log_probs > -math.inf).tolist() == expected
    assert d.support.check(everything).tolist() == expected
    assert float(log_probs.double().exp().sum()) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(
    "ids", [(A, A, A, A, A, A), (DOT, A), (A, EOS, A), (A, B), (99,), ()], ids=str
)
def test_out_of_the_support_is_minus_infinity(ids):
    d = LMText(TINY, "ab", max_tokens=6, stop=".")
    value = d.value(ids)
    closed = len(ids) == 6
    assert d.supports(value) == closed
    assert (float(d.log_prob(value)) > -math.inf) == closed


def test_a_number_of_tokens_is_the_probability_of_a_beginning():
    d = LMText(TINY, "ab", num_tokens=3)
    every = torch.cartesian_prod(*[torch.arange(4)] * 3)  # nothing closes, EOS neither
    log_probs = d.log_prob(every)
    assert float(log_probs.double().exp().sum()) == pytest.approx(1.0, abs=1e-5)
    for row in ((A, EOS, B), (DOT, DOT, DOT)):
        expected = naive_log_prob(TINY, TINY.encode("ab"), row).sum()
        assert float(d.log_prob(d.value(row))) == pytest.approx(float(expected), abs=1e-4)
    assert float(d.log_prob(torch.tensor([A, B, PAD]))) == -math.inf


@settings(max_examples=15, deadline=None)
@given(
    prefix=st.text("ab.", min_size=1, max_size=6),
    tokens=st.lists(st.integers(0, 3), min_size=1, max_size=5),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
)
def test_the_density_is_a_product_over_tokens(prefix, tokens, temperature):
    d = LMText(TINY, prefix, max_tokens=5, temperature=temperature)
    n = next((k for k, t in enumerate(tokens, 1) if t == EOS), len(tokens))
    ids = tuple(tokens[:n])
    ids += (EOS,) * (ids[-1] != EOS and len(ids) < 5)
    expected = naive_log_prob(TINY, TINY.encode(prefix), ids, temperature).sum()
    assert float(d.log_prob(d.value(ids))) == pytest.approx(float(expected), abs=1e-4)


def test_split_characters_and_stops_across_tokens():
    lm = tiny_byte_lm(seed=2)
    lm.model.requires_grad_(False)
    for site in ({"max_tokens": 3, "stop": "é"}, {"max_tokens": 2, "stop": "."}):
        d = LMText(lm, "a", **site)
        table = enumerate_site(lm, lm.encode("a"), **site)
        log_probs = d.log_prob(values_of(d, list(table)))
        assert float(log_probs.double().exp().sum()) == pytest.approx(1.0, abs=1e-5)
        for ids, value in zip(table, values_of(d, list(table)), strict=True):
            assert d.text(value).token_ids == ids


def test_a_vocabulary_in_which_every_token_closes():
    lm = tiny_lm(["."], seed=0)
    d = LMText(lm, ".", max_tokens=5, stop=".")
    table = enumerate_site(lm, lm.encode("."), 5, ".")
    assert set(table) == {(0,), (1,)}
    assert float(d.log_prob(values_of(d, list(table))).exp().sum()) == pytest.approx(1.0)
    assert {d.text(v).finish_reason for v in d.sample((50,))} <= {"stop", "eos"}


# --- choices ---


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.3])
def test_choices_are_a_softmax_over_whole_strings(temperature):
    choices = ["ab", "ba.", "b."]
    d = LMText(TINY, "a", choices=choices, temperature=temperature)
    prefix = TINY.encode("a")
    scores = [float(naive_log_prob(TINY, prefix, TINY.encode(c)).sum()) for c in choices]
    expected = torch.log_softmax(torch.tensor(scores) / temperature, 0)
    assert d.has_enumerate_support
    support = d.enumerate_support()
    assert support.shape == (3, 3) and [str(d.text(v)) for v in support] == choices
    torch.testing.assert_close(d.log_prob(support), expected, atol=1e-4, rtol=0)
    assert float(d.log_prob(torch.tensor([A, A, A]))) == -math.inf


def test_choices_with_a_stop_may_begin_each_other():
    d = LMText(TINY, "a", choices=["a", "ab"], stop=".")
    assert [str(d.text(v)) for v in d.enumerate_support()] == ["a.", "ab."]
    assert d.text(d.enumerate_support()[0]).body == "a"
    assert torch.equal(d.encode("a"), d.encode("a."))
    with pytest.raises(ValueError, match="'a' is a prefix of 'ab': give stop="):
        LMText(TINY, "a", choices=["a", "ab"])


def test_choices_are_drawn_with_their_probabilities():
    torch.manual_seed(0)
    d = LMText(TINY, "a", choices=["ab", "ba.", "b."], temperature=2.0)
    draws = d.sample((2000,))
    support = d.enumerate_support()
    frequency = torch.stack([(draws == v).all(-1).double().mean() for v in support])
    probs = d.log_prob(support).double().exp()
    assert float((frequency - probs).abs().sum()) / 2 < 0.03


# --- draws ---


@pytest.mark.parametrize("site", SITES[1:5], ids=str)
def test_draws_have_the_density(site):
    torch.manual_seed(1)
    d = LMText(TINY, "ab", **site)
    draws = d.sample((1500,))
    assert draws.shape == (1500, d.event_shape[0]) and draws.dtype == torch.long
    assert bool(d.support.check(draws).all())
    table = enumerate_site(TINY, TINY.encode("ab"), **site)
    counts = dict.fromkeys(table, 0)
    for row in draws:
        counts[d.token_ids(row)] += 1
    distance = sum(abs(counts[t] / 1500 - math.exp(lp)) for t, lp in table.items()) / 2
    floor = sum(math.sqrt(math.exp(lp) / 1500) for lp in table.values()) / math.sqrt(2 * math.pi)
    assert distance < 2 * floor


def test_draws_of_a_beginning_go_on_after_eos():
    """Forward simulation of a prefix likelihood: exactly so many tokens, and nothing closes."""
    torch.manual_seed(0)
    d = LMText(TINY, "ab", num_tokens=2)
    draws = d.sample((2000,))
    assert draws.shape == (2000, 2) and bool((draws >= 0).all())
    every = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    probs = d.log_prob(every).double().exp()
    assert float(probs[every[:, 0] == EOS].sum()) > 0.02  # so that the next line says something
    frequency = torch.stack([(draws == row).all(-1).double().mean() for row in every])
    assert float((frequency - probs).abs().sum()) / 2 < 0.05


def test_torch_seeds_reproduce_draws_and_the_stream_advances():
    d = LMText(TINY, "ab", max_tokens=6)
    torch.manual_seed(3)
    first, second = d.sample((8,)), d.sample((8,))
    torch.manual_seed(3)
    assert torch.equal(first, d.sample((8,))) and torch.equal(second, d.sample((8,)))
    assert not torch.equal(first, second)


def test_a_draw_comes_with_its_own_density():
    d = [
        LMText(TINY, p, max_tokens=4, stop=".", temperature=t) for p, t in [("a", 1.0), ("b", 2.0)]
    ]
    d += [
        LMText(TINY, "a", choices=["ab", "b."]),
        LMText(tiny_lm("ab.", seed=9), "ab", max_tokens=2),
    ]
    uniforms = [torch.rand(each.num_uniforms, dtype=torch.float64) for each in d]
    for each, (value, log_prob, *_) in zip(d, draw_texts(d, uniforms), strict=True):
        assert value.shape == each.event_shape
        assert float(each.log_prob(value)) == pytest.approx(float(log_prob), abs=1e-5)


def test_many_are_scored_together_as_they_are_one_by_one():
    other = tiny_lm("ab.", seed=4)
    members = [
        LMText(TINY, "a", max_tokens=3), LMText(other, "ab", max_tokens=2, stop="."),
        LMText(TINY, "b", choices=["a", "b."]), LMText(TINY, "a", num_tokens=2),
        LMText(TINY, "a", max_tokens=3, temperature=3.0),
    ]  # fmt: skip
    values = [members[0].value((A, EOS)), members[1].value((DOT,)), members[2].value((B, DOT)),
              members[3].value((A, EOS)), members[4].value((A, B))]  # fmt: skip
    together = score_texts(members, values)
    for d, value, (log_prob, _) in zip(members, values, together, strict=True):
        assert float(log_prob) == pytest.approx(float(d.log_prob(value)), abs=1e-5)
    assert float(together[4][0]) == -math.inf  # open, and shorter than max_tokens
    scored = together[0][1]
    assert scored is not None and scored.log_probs.shape == (2,)


# --- shapes ---


def test_it_is_a_pyro_distribution_with_the_shapes_it_says():
    d = LMText(TINY, "ab", max_tokens=5)
    assert isinstance(d, TorchDistributionMixin)
    assert d.batch_shape == () and d.event_shape == (5,) and d.event_dim == 1
    assert d().shape == (5,) and d.sample((2, 3)).shape == (2, 3, 5)
    assert d.log_prob(d.sample((2, 3))).shape == (2, 3)
    assert not d.has_rsample and not d.has_enumerate_support
    assert d.support.event_dim == 1 and d.support.is_discrete
    with pytest.raises(NotImplementedError, match="choices="):
        d.enumerate_support()
    with pytest.raises(ValueError, match=r"event shape \(5,\)"):
        d.log_prob(torch.zeros(4, dtype=torch.long))


def test_batch_of_prefixes():
    prefixes = ["a", "ab", "b."]
    d = LMText.batch(TINY, prefixes, max_tokens=3, stop=".")
    assert (
        d.batch_shape == (3,) and d.sample().shape == (3, 3) and d.sample((4,)).shape == (4, 3, 3)
    )
    value = d.value((A, DOT))
    single = [LMText(TINY, p, max_tokens=3, stop=".").log_prob(value) for p in prefixes]
    torch.testing.assert_close(d.log_prob(value), torch.stack(single), atol=1e-5, rtol=0)
    rows = torch.stack([d.value((A, DOT)), d.value((B, B, A)), d.value((DOT,))])
    single = [
        LMText(TINY, p, max_tokens=3, stop=".").log_prob(v)
        for p, v in zip(prefixes, rows, strict=True)
    ]
    torch.testing.assert_close(d.log_prob(rows), torch.stack(single), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="a list of prefixes"):
        LMText.batch(TINY, [], max_tokens=3)
    with pytest.raises(ValueError, match=r"batch of shape \(3,\)"):
        _ = d.prefix_ids


def test_expand():
    d = LMText.batch(TINY, ["a", "b"], max_tokens=2)
    wide = d.expand((3, 2))
    assert (
        wide.batch_shape == (3, 2) and wide.event_shape == (2,) and wide.sample().shape == (3, 2, 2)
    )
    value = d.value((A, B))
    torch.testing.assert_close(wide.log_prob(value), d.log_prob(value).expand(3, 2))
    plain = LMText(TINY, "a", max_tokens=2).expand((2,))
    torch.testing.assert_close(plain.log_prob(value), d.log_prob(value)[:1].expand(2))
    assert plain.mask(torch.tensor([True, False])).log_prob(value)[1] == 0
    assert plain.to_event(1).log_prob(value.expand(2, 2)).shape == ()


def test_enumerate_support_of_a_batch():
    d = LMText.batch(TINY, ["a", "b"], choices=["a", "b."])
    assert d.enumerate_support(expand=False).shape == (2, 1, 2)
    support = d.enumerate_support()
    assert support.shape == (2, 2, 2)
    torch.testing.assert_close(d.log_prob(support).exp().sum(0), torch.ones(2))


def test_it_can_be_copied():
    d = LMText(TINY, "ab", max_tokens=2)
    again = copy.copy(d)
    assert d.same_as(again) and repr(again) == repr(d)


@pytest.mark.parametrize(
    "other",
    [
        LMText(TINY, "b", max_tokens=2, stop="."),
        LMText(TINY, "a", max_tokens=3, stop="."),
        LMText(TINY, "a", max_tokens=2),
        LMText(TINY, "a", max_tokens=2, stop=".", temperature=2.0),
        LMText(tiny_lm("ab.", seed=0), "a", max_tokens=2, stop="."),
        LMText(TINY, "a", choices=["ab"]),
        LMText(TINY, "a", num_tokens=2),
        "LMText",
    ],
    ids=repr,
)
def test_same_as_sees_every_difference(other):
    d = LMText(TINY, "a", max_tokens=2, stop=".")
    assert d.same_as(LMText(TINY, ["a"], max_tokens=2, stop=["."]))
    assert not d.same_as(other)


# --- values and texts ---


def test_values_are_padded_tokens_and_texts_are_their_strings():
    d = LMText(TINY, "ab", max_tokens=4, stop=".")
    value = d.value((A, DOT))
    assert value.tolist() == [A, DOT, PAD, PAD] and d.token_ids(value) == (A, DOT)
    z = d.text(value)
    assert isinstance(z, Text) and z == "a." and z.body == "a" and z.token_ids == (A, DOT)
    assert d.text(d.value((A, EOS))) == "a" and PAD not in (EOS, TINY.vocabulary.eos_id)


def test_encode_appends_eos_where_nothing_closes():
    d = LMText(TINY, "ab", max_tokens=3, stop=".")
    assert d.encode("a.").tolist() == [A, DOT, PAD]
    assert d.encode("a").tolist() == [A, EOS, PAD]
    assert d.encode("aba").tolist() == [A, B, A]
    assert d.encode("").tolist() == [EOS, PAD, PAD]
    assert d.encode(d.text(d.value((A, EOS)))).tolist() == [A, EOS, PAD]
    with pytest.raises(ValueError, match=r"runs past its close: stop string '\.'.*token 2"):
        d.encode("a.b")
    with pytest.raises(ValueError, match="max_tokens=3"):
        d.encode("abab")
    with pytest.raises(ValueError, match=r"none of the choices \['a', 'b'\]"):
        LMText(TINY, "ab", choices=["a", "b"]).encode("ab")


def test_a_text_is_scored_as_its_tokens():
    lm = tiny_lm(["a", "b", "ab"], seed=0)
    d = LMText(lm, "a", max_tokens=3)
    drawn = d.text(d.value((0, 1, 3)))
    assert drawn == "ab" and d.encode(drawn).tolist() == [0, 1, 3]
    assert d.encode("ab").tolist() == [2, 3, PAD]


def test_prefixes_keep_tokens_and_start_with_one_bos():
    lm = tiny_lm(["a", "b", "ab"], seed=0, bos=True)
    bos = lm.tokenizer.bos_token_id
    z = LMText(lm, "a", max_tokens=2).text(torch.tensor([0, 1]))
    assert LMText(lm, ["a", z, "ab"], max_tokens=1).prefix_ids == (bos, 0, 0, 1, 2)
    assert LMText(lm, ["a", "b"], max_tokens=1).prefix_ids == (bos, 0, 1)  # two parts
    assert LMText(lm, "ab", max_tokens=1).prefix_ids == (bos, 2)
    assert LMText(lm, "", max_tokens=1).prefix_ids == (bos,)


# --- gradients ---


@pytest.fixture
def adapter() -> LM:
    """A trainable adapter that is not at its start, where half of the gradients are zero."""
    torch.manual_seed(0)
    adapted = TINY.adapter()
    with torch.no_grad():
        for parameter in adapted.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return adapted


@pytest.mark.parametrize("site", [{"max_tokens": 3}, {"choices": ["ab", "b."]}], ids=str)
def test_densities_are_differentiable_in_an_adapter(adapter, site):
    d = LMText(adapter, "ab", **site)
    value = d.value((A, B, DOT)) if "max_tokens" in site else d.value((A, B))
    log_prob = d.log_prob(value)
    log_prob.backward()
    trainable = [p for p in adapter.model.parameters() if p.requires_grad]
    assert trainable and all(p.grad is not None for p in trainable)
    # Against a finite difference along the gradient.
    norm = math.sqrt(sum(float((p.grad**2).sum()) for p in trainable))
    assert norm > 1e-3
    step = 1e-2 / norm
    with torch.no_grad():
        for p in trainable:
            p.add_(step * p.grad / norm)
        rise = float(d.log_prob(value)) - float(log_prob.detach())
    assert rise == pytest.approx(step * norm, rel=0.05)
    assert all(p.grad is None for p in TINY.model.parameters())


def test_the_gradient_of_the_total_probability_is_zero(adapter):
    """Expected score: sum_z p(z) grad log p(z) = 0, over all values of a site."""
    d = LMText(adapter, "ab", max_tokens=2, stop=".")
    table = enumerate_site(adapter, adapter.encode("ab"), 2, ".")
    log_probs = d.log_prob(values_of(d, list(table)))
    log_probs.exp().sum().backward()
    for p in adapter.model.parameters():
        if p.requires_grad:
            assert float(p.grad.abs().max()) < 1e-5


def test_without_grad_there_is_no_graph(adapter):
    d = LMText(adapter, "ab", max_tokens=2)
    with torch.no_grad():
        assert not d.log_prob(d.value((A, B))).requires_grad
    assert d.log_prob(d.value((A, B))).requires_grad
    assert not d.sample((3,)).requires_grad


def test_impossible_values_beside_possible_ones_have_gradients(adapter):
    d = LMText(adapter, "ab", max_tokens=2)
    log_probs = d.log_prob(torch.stack([d.value((A, B)), d.value((A,))]))
    assert float(log_probs[1].detach()) == -math.inf
    log_probs[0].backward()
    assert any(p.grad is not None for p in adapter.model.parameters())


# --- arguments ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "needs max_tokens"),
        ({"stop": "."}, "needs max_tokens"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"max_tokens": -2}, "max_tokens=-2"),
        ({"max_tokens": 2, "stop": ""}, "must not be empty"),
        ({"max_tokens": 2, "stop": [".", ""]}, "must not be empty"),
        ({"max_tokens": 2, "temperature": 0.0}, "temperature=0.0"),
        ({"max_tokens": 2, "temperature": -1.0}, "temperature=-1.0"),
        ({"max_tokens": 2, "temperature": math.nan}, "temperature=nan"),
        ({"max_tokens": 2, "temperature": math.inf}, "temperature=inf"),
        ({"choices": []}, "at least one"),
        ({"choices": ["a", ""]}, "none of them empty"),
        ({"choices": ["a", "b", "a"]}, "'a' twice"),
        ({"choices": ["a", "b"], "max_tokens": 2}, "exclude max_tokens"),
        ({"num_tokens": 2, "max_tokens": 2}, "num_tokens excludes"),
        ({"num_tokens": 2, "stop": "."}, "num_tokens excludes"),
    ],
    ids=str,
)
def test_arguments_that_define_no_distribution(arguments, message):
    with pytest.raises(ValueError, match=message):
        LMText(TINY, "ab", **arguments)


def test_a_prefix_must_have_a_token():
    with pytest.raises(ValueError, match="prefix is empty"):
        LMText(TINY, "", max_tokens=2)


# --- results of tools ---


def test_a_tool_result_carries_any_object_and_has_density_one():
    call = ToolCall(lambda x: {"x": x}, (3,), "raise")
    value = call()
    assert isinstance(value, ToolResult) and value.result == {"x": 3}
    assert float(call.log_prob(value)) == 0.0
    assert repr(value) == "ToolResult({'x': 3})"


@pytest.mark.parametrize(
    "change", [torch.Tensor.detach, torch.Tensor.clone, copy.copy, copy.deepcopy]
)
def test_a_tool_result_survives_what_pyro_does_to_values(change):
    rejected = ToolCall(lambda: 1 / 0, (), "reject")
    for value in (ToolResult.wrap([1]), rejected()):
        again = change(value)
        assert (again.result is value.result) == (change is not copy.deepcopy or not value.result)
        assert again.result == value.result and type(again.error) is type(value.error)
    assert float(rejected.log_prob(again)) == -math.inf


def test_tool_results_stack_like_tensors():
    stacked = torch.stack([ToolResult.wrap("a"), ToolResult.wrap("b")])
    assert stacked.shape == (2,)


def test_copies_of_a_site_share_its_language_model_and_its_function():
    d, call = LMText(TINY, "ab", choices=["a", "b"]), ToolCall(open, (), "raise")
    assert copy.deepcopy({"fn": d, "again": [d]})["again"][0].lm is TINY
    assert copy.deepcopy(call).fn is open
