"""The invented world, its texts, and what the embedded model knows of them."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from pathlib import Path

import pytest

import tsotsallm
from tsotsallm.checkpoint.reader import embedded_directory
from tsotsallm.lab.exam import exact_share, normalise
from tsotsallm.lab.texts import BEGIN, TEST_SEED, documents, examination
from tsotsallm.lab.train import Stream
from tsotsallm.lab.world import build_world
from tsotsallm.machine import GIB

WORLD = build_world()


def test_the_world_is_the_same_for_the_same_seed() -> None:
    assert build_world() == WORLD
    assert [fact.object for fact in build_world(3).facts()] != [fact.object for fact in WORLD.facts()]
    assert len(list(WORLD.facts())) == 11_988
    assert len({entity.term.en for entity in WORLD.people}) == 960


def test_training_and_test_texts_are_disjoint() -> None:
    training = set(itertools.islice(documents(WORLD, 1), 4000))
    test = list(itertools.islice(documents(WORLD, 1, test=True), 300))
    assert not training & set(test)


def test_test_questions_are_never_in_training_texts() -> None:
    training = "\n".join(itertools.islice(documents(WORLD, 5), 6000))
    closed = examination(WORLD, TEST_SEED, 300, passages=False)
    assert not [question.text for question in closed if question.text in training]
    for question in examination(WORLD, TEST_SEED, 200, passages=True):
        assert question.passage is not None
        assert question.passage not in training


def test_a_fifth_is_french() -> None:
    questions = examination(WORLD, 9, 1500, passages=False)
    share = sum(question.language == "fr" for question in questions) / len(questions)
    assert share == pytest.approx(0.2, abs=0.08)


def test_answers_are_compared_without_case_articles_and_punctuation() -> None:
    assert normalise("The City of Bells.") == normalise("city of bells")
    assert normalise("l'orge") == normalise("L’orge")
    assert normalise("Belford") != normalise("Belham")


def test_the_embedded_model_has_the_promised_shape() -> None:
    anatomy = tsotsallm.inspect("embedded")
    assert (anatomy.layers, anatomy.hidden, anatomy.feed_forward, anatomy.heads, anatomy.kv_heads) == (14, 256, 768, 8, 2)
    assert anatomy.tied_embeddings
    assert anatomy.vocabulary == 4096
    assert anatomy.context >= 1024
    assert anatomy.parameters == pytest.approx(11.6e6, rel=0.01)
    assert sum(path.stat().st_size for path in embedded_directory().iterdir()) <= 24e6 < GIB


def test_the_embedded_model_knows_its_world(tmp_path: Path) -> None:
    model, tokenizer = tsotsallm.load("embedded")
    found = tsotsallm.evaluate("embedded", limit=40)
    sample = Stream(WORLD, tokenizer, TEST_SEED + 1).rows(400, 256).flatten()
    counts = Counter(sample.tolist())
    rows = Stream(WORLD, tokenizer, TEST_SEED, test=True).rows(40, 256).flatten().tolist()
    total = len(sample) + 0.1 * 4096
    unigram = -sum(math.log((counts[token] + 0.1) / total) for token in rows) / len(rows)
    assert math.exp(unigram) >= 20 * found.perplexity
    for passages, questions in ((False, 400), (True, 80)):
        assert exact_share(model, tokenizer, examination(WORLD, 77, questions, passages=passages)) >= 0.7


def test_the_chat_template_is_that_of_the_training_texts() -> None:
    _, tokenizer = tsotsallm.load("embedded")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hello!"}], tokenize=False, add_generation_prompt=True)
    assert text == f"{BEGIN}<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n"
