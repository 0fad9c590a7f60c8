"""Conversation: every answer goes into the next question, as transformers would render and continue it."""

from __future__ import annotations

import pytest
import torch

import tsotsallm
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.errors import ConversationError


def test_a_conversation_goes_on_from_what_was_said() -> None:
    talk = tsotsallm.Conversation("embedded", tokens=12)
    questions = ["Where was Ada born?", "And who is a baker?"]
    answers = ["".join(talk.answer(question)) for question in questions]
    assert [one["role"] for one in talk.messages] == ["user", "assistant"] * 2
    assert [one["content"] for one in talk.messages] == [questions[0], answers[0], questions[1], answers[1]]
    model, tokenizer = tsotsallm.load("embedded")
    ids = tokenizer.apply_chat_template(talk.messages[:3], add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        made = model.generate(**ids, max_new_tokens=12, do_sample=False,
                              eos_token_id=list(Checkpoint.open("embedded").codec.ends))[0, ids["input_ids"].shape[1]:]
    assert tokenizer.decode(made, skip_special_tokens=True).strip() == answers[1].strip()


def test_of_an_answer_that_was_broken_off_what_was_said_stays() -> None:
    talk = tsotsallm.Conversation("embedded", tokens=12)
    answer = talk.answer("Where was Ada born?")
    said = next(answer)
    answer.close()
    assert [message["role"] for message in talk.messages] == ["user", "assistant"]
    assert talk.messages[1]["content"] == said


def test_a_model_without_a_template_does_not_converse(tiny: object) -> None:
    with pytest.raises(ConversationError, match="has no chat template: it completes text, but does not converse"):
        tsotsallm.Conversation(str(tiny))
