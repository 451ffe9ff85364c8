"""Chat templates: what a ``Text`` in a message keeps, and what is refused."""

from __future__ import annotations

import pytest

from lmppl.lm.tokens.chat import apply_chat_template
from lmppl.lm.tokens.text import Text
from lmppl.testing import tiny_lm

# Tokens that overlap, so that other tokens of the same string would be seen.
LM = tiny_lm(["s", "u", ":", ";", ">", "a", "b", "ab", "\ue0f0", "\ue0f1", "0", "1"], seed=0)
A, B, AB = (LM.tokenizer.convert_tokens_to_ids(token) for token in ("a", "b", "ab"))
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}:{% if m['content'] is string %}{{ m['content'] | trim }}"
    "{% else %}{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{% endif %};{% endfor %}"
    "{% if add_generation_prompt %}>{% endif %}"
)
PLAIN_ONLY = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }};{% endfor %}"


def drawn(*ids: int) -> Text:
    return Text(LM.vocabulary.decode(ids), ids, LM.vocabulary)


@pytest.fixture
def rendered(monkeypatch):
    def render(messages, template=TEMPLATE, **options):
        monkeypatch.setattr(LM.tokenizer, "chat_template", template)
        return apply_chat_template(LM.vocabulary, messages, **options)

    return render


def tokens(text: Text) -> list[str]:
    return LM.tokenizer.convert_ids_to_tokens(list(text.token_ids))


def user(content):
    return [{"role": "u", "content": content}]


def test_a_text_keeps_its_tokens_and_a_str_is_tokenised(rendered):
    assert tokens(rendered(user("ab"))) == ["u", ":", "ab", ";", ">"]
    assert tokens(rendered(user(drawn(A, B)))) == ["u", ":", "a", "b", ";", ">"]
    assert tokens(rendered(user("ab" + drawn(A, B) + "ab"))) == [
        "u", ":", "ab", "a", "b", "ab", ";", ">"
    ]  # fmt: skip


def test_a_text_in_a_part_of_a_content_keeps_its_tokens(rendered):
    parts = [{"type": "text", "text": "ab"}, {"type": "text", "text": drawn(A, B)}]
    prefix = rendered(user(parts))
    assert prefix == "u:abab;>"
    assert tokens(prefix) == ["u", ":", "ab", "a", "b", ";", ">"]
    assert parts[1]["text"].token_ids == (A, B)  # the messages are left alone


def test_a_template_that_takes_no_parts_is_told_apart(rendered):
    with pytest.raises(ValueError, match=r"takes no such content.*before \+ z"):
        rendered(user([{"type": "text", "text": drawn(A, B)}]), PLAIN_ONLY)
    assert tokens(rendered(user(drawn(A, B)), PLAIN_ONLY))[2:4] == ["a", "b"]


@pytest.mark.parametrize(
    "mark", ["\ue0f0", "\ue0f1", "\ue0f00\ue0f1", "\ue0f00\ue0f10\ue0f00\ue0f1"]
)
@pytest.mark.parametrize("before", [False, True])
def test_no_character_of_a_message_is_taken_for_a_mark(rendered, mark, before):
    z = drawn(A, B)
    messages = [{"role": "s", "content": mark}, {"role": "u", "content": z}][:: 1 if before else -1]
    prefix = rendered(messages, add_generation_prompt=False)
    turns = [f"s:{mark};", "u:ab;"][:: 1 if before else -1]
    assert prefix == "".join(turns)
    assert tokens(prefix) == [
        t for turn in turns for t in (["u", ":", "a", "b", ";"] if "u" in turn else turn)
    ]


def test_ten_texts_in_one_chat(rendered):
    texts = [drawn(*((A, B) if i % 2 else (AB,))) for i in range(12)]
    messages = [{"role": "u", "content": z} for z in texts]
    ids = [
        i
        for z in texts
        for i in LM.vocabulary.encode("u:") + z.token_ids + LM.vocabulary.encode(";")
    ]
    assert list(rendered(messages, add_generation_prompt=False).token_ids) == ids


@pytest.mark.parametrize(
    ("messages", "error", "message"),
    [
        ("hello", TypeError, "a list of messages.*given str"),
        (None, TypeError, "a list of messages.*given NoneType"),
        ({"role": "u", "content": "a"}, TypeError, "a list of messages.*given dict"),
        (iter([]), TypeError, "a list of messages.*given list_iterator"),
        (["hello"], ValueError, "message 0 is 'hello'; it must be a dict"),
        ([*user("a"), {"role": "u"}], ValueError, "message 1 is .* keys 'role' and 'content'"),
    ],
)  # fmt: skip
def test_what_is_no_list_of_messages_is_refused(rendered, messages, error, message):
    with pytest.raises(error, match=message):
        rendered(messages)


def test_no_template_and_one_that_refuses(rendered):
    with pytest.raises(ValueError, match="has no chat template"):
        rendered(user("a"), None)
    with pytest.raises(ValueError, match="refuses the messages: two in a row"):
        rendered(user("a"), "{{ raise_exception('two in a row') }}")
