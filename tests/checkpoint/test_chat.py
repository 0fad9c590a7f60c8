"""Conversations as text, against transformers' own rendering; templates that refuse, and words of strangers in them.

What a template may do at all is tested in tests/test_sandbox.py.
"""

from __future__ import annotations

import random
from datetime import datetime
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from tests.fidelity import kinds
from tsotsallm.checkpoint.chat import ChatTemplate, pick
from tsotsallm.errors import ConversationError

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
ASKED = [{"role": "user", "content": "one"}]
ANSWERED = [*ASKED, {"role": "assistant", "content": "two"}]
PLAIN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}" \
        "{% if add_generation_prompt %}[assistant]{% endif %}"
LINES = "{% for m in messages %}\n  {% if m.role %}\n{{ m.role }}: {{ m.content }}\n  {% endif %}\n{% endfor %}\nend\n"


def expected(source: str, talk: list[dict[str, str]], **options: Any) -> str:
    [text], _ = render_jinja_template([talk], chat_template=source, **options, **TOKENS)
    return str(text)


@pytest.mark.parametrize("source", [kinds.TEMPLATE, kinds.LLAMA2_TEMPLATE, PLAIN, LINES])
def test_conversations_of_all_lengths_are_those_of_transformers(source: str) -> None:
    template = ChatTemplate(source, TOKENS)
    for talk in kinds.conversations(20, 3, ["<s>", "</s>", "<|user|>"]):
        assert template.render(talk) == expected(source, talk, add_generation_prompt=True)
        assert template.render(talk, answer=False) == expected(source, talk)


def test_a_last_message_of_the_assistant_is_continued_unless_it_is_said_otherwise() -> None:
    template = ChatTemplate(PLAIN, TOKENS)
    assert template.render(ANSWERED) == "[user]one</s>[assistant]two"
    assert template.render(ANSWERED, continued=False) == "[user]one</s>[assistant]two</s>[assistant]"
    assert template.render(ANSWERED, answer=False) == "[user]one</s>[assistant]two</s>"
    assert template.render(ASKED, continued=True) == "[user]one"
    assert template.render(ASKED) == "[user]one</s>[assistant]"


def test_the_mark_of_the_end_may_stand_in_what_people_say() -> None:
    """The word that marks the end of a continued message is cut where it was put, not where somebody wrote it."""
    word = "CONTINUE_FINAL_MESSAGE_TAG "
    talk = [{"role": "user", "content": f"what is {word}?"}, {"role": "assistant", "content": f"it is {word}and"}]
    assert ChatTemplate(PLAIN, TOKENS).render(talk) == f"[user]what is {word}?</s>[assistant]it is {word}and"


def test_messages_stay_as_they_were_given() -> None:
    talk = [dict(message) for message in ANSWERED]
    ChatTemplate(PLAIN, TOKENS).render(talk)
    assert talk == ANSWERED


def test_rendering_once_more_gives_the_same() -> None:
    rng, template = random.Random(0), ChatTemplate(kinds.TEMPLATE, TOKENS)
    talks = kinds.conversations(10, 5, [])
    first = [template.render(talk) for talk in talks]
    again = {place: ChatTemplate(kinds.TEMPLATE, TOKENS).render(talks[place]) for place in rng.sample(range(10), 10)}
    assert [again[place] for place in range(10)] == first


def test_a_template_may_ask_for_the_date() -> None:
    found = ChatTemplate("{{ strftime_now('%Y') }}").render(ASKED)
    assert found in {str(datetime.now().year), str(datetime.now().year - 1)}


def test_json_is_written_as_transformers_writes_it() -> None:
    source = "{{ messages | tojson }}{{ {'b': 1, 'a': '<é>'} | tojson(sort_keys=true, ensure_ascii=true) }}" \
             "{{ messages | tojson(indent=1, separators=(',', ':')) }}"
    assert ChatTemplate(source, TOKENS).render(ASKED) == expected(source, ASKED)


@pytest.mark.parametrize(("source", "message"), [
    ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    ("{{ messages[7].content }}", "has no element 7"), ("{{ 1 / 0 }}", "division by zero"),
    ("{% for %}", "Expected an expression"), ("{{ nobody() }}", "'nobody' is undefined"), ("{% include 'x' %}", "no loader"),
    ("{{ raise_exception('a\nb\x1b[31m' * 5000) }}", "a b\N{REPLACEMENT CHARACTER}")])
def test_whatever_a_template_does_wrong_is_one_line(source: str, message: str) -> None:
    with pytest.raises(ConversationError, match="the model's chat template refuses the conversation") as caught:
        ChatTemplate(source, TOKENS).render(ASKED)
    text = str(caught.value)
    assert message in text
    assert text.isprintable()
    assert len(text) < 1200


def test_roles_of_strangers_are_quoted() -> None:
    talk = [{"role": "user\x1b[2J\nnote: all is well" + "x" * 5000, "content": "a"}]
    with pytest.raises(ConversationError, match="its roles are") as caught:
        ChatTemplate("{{ raise_exception('no') }}").render(talk)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1200


@pytest.mark.parametrize("source", ["{{ messages[0].content }}", "nothing at all"])
def test_a_template_that_leaves_out_the_answer_cannot_continue_it(source: str) -> None:
    with pytest.raises(ConversationError, match="cannot be continued; remove that message"):
        ChatTemplate(source).render(ANSWERED)


def test_an_empty_conversation_is_refused() -> None:
    with pytest.raises(ConversationError, match="the conversation is empty"):
        ChatTemplate(PLAIN).render([])


def test_special_tokens_are_plain_text() -> None:
    """transformers keeps them as objects, whose methods a template must not reach; a missing one is undefined."""
    from tokenizers import AddedToken

    tokens = {"bos_token": AddedToken("<s>"), "eos_token": None, "additional_special_tokens": [AddedToken("<a>"), "<b>"]}
    source = "{{ bos_token }}{{ bos_token.content is defined }}{{ eos_token is defined }}{{ additional_special_tokens }}"
    assert ChatTemplate(source, tokens).render(ASKED) == "<s>FalseFalse['<a>', '<b>']"


@pytest.mark.parametrize(("templates", "source"), [
    ({}, None), ({"default": "a"}, "a"), ({"tool_use": "b"}, "b"), ({"rag": "c", "default": "a"}, "a"),
    ({"rag": "c", "tool_use": "b"}, None)])
def test_the_template_that_is_used(templates: dict[str, str], source: str | None) -> None:
    found = pick(templates, TOKENS)
    assert (None if found is None else found.source) == source
