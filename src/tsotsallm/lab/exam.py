"""Questions to a model in memory, and the share of exact answers."""

from __future__ import annotations

import re
import string
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from tsotsallm.engine.generation import generate_resident
from tsotsallm.lab.texts import ExamQuestion

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ENGLISH_ARTICLES = frozenset({"a", "an", "the"})
WORLD_ARTICLES = ENGLISH_ARTICLES | {"le", "la", "les", "un", "une", "l", "du"}


def normalise(text: str, articles: Collection[str] = WORLD_ARTICLES) -> str:
    """A text in lower case, without punctuation and articles, with single spaces."""
    words = re.sub(f"[{re.escape(string.punctuation)}«»‘’´]", " ", text.lower()).split()
    return " ".join(word for word in words if word not in articles)


def answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: Sequence[ExamQuestion],
            max_new_tokens: int = 16) -> list[str]:
    """Greedy answers of at most `max_new_tokens` tokens each, up to the first line break."""
    def text(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=False))

    def done(tokens: Sequence[int]) -> bool:
        return tokens[-1] == tokenizer.eos_token_id or "\n" in text(tokens)

    prompts = [tokenizer(question.prompt)["input_ids"] for question in questions]
    given = dict(generate_resident(model, prompts, max_new_tokens, done))
    return [text(given[index]).split("\n")[0].removesuffix(tokenizer.eos_token).strip() for index in range(len(questions))]


def exact_share(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: Sequence[ExamQuestion]) -> float:
    """The share of questions that are answered exactly, after normalising both sides."""
    given = answers(model, tokenizer, questions)
    return sum(normalise(text) == normalise(question.answer)
               for text, question in zip(given, questions, strict=True)) / len(questions)
