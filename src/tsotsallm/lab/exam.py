"""Ask a resident model questions and count the exact answers."""

from __future__ import annotations

import re
import string
from collections import defaultdict
from typing import Any

import torch

from tsotsallm.lab.texts import Question

_ARTICLES = {"a", "an", "the", "le", "la", "les", "un", "une", "l", "du"}


def normalise(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces."""
    words = re.sub(f"[{re.escape(string.punctuation)}«»’]", " ", text.lower()).split()
    return " ".join(word for word in words if word not in _ARTICLES)


@torch.no_grad()
def answers(model: Any, tokenizer: Any, questions: list[Question], max_new_tokens: int = 16,
            batch: int = 64) -> list[str]:
    """Greedy answers, up to the first line break; prompts of one length are run together."""
    by_length: dict[int, list[int]] = defaultdict(list)
    encoded = [tokenizer(question.prompt)["input_ids"] for question in questions]
    for index, ids in enumerate(encoded):
        by_length[len(ids)].append(index)
    found = [""] * len(questions)
    for indices in by_length.values():
        for start in range(0, len(indices), batch):
            chunk = indices[start:start + batch]
            ids = torch.tensor([encoded[index] for index in chunk], device=model.device)
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens,
                                 do_sample=False, pad_token_id=tokenizer.eos_token_id)
            for index, row in zip(chunk, out[:, ids.shape[1]:], strict=True):
                found[index] = tokenizer.decode(row, skip_special_tokens=True).split("\n")[0].strip()
    return found


def exact_share(model: Any, tokenizer: Any, questions: list[Question]) -> float:
    """The share of questions answered exactly, after normalising both sides."""
    given = answers(model, tokenizer, questions)
    return sum(normalise(text) == normalise(question.answer)
               for text, question in zip(given, questions, strict=True)) / len(questions)
