"""Bias, penalties, min-p and grammars: transformers' own arithmetic as the oracle, and both engines alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from tests.engine.conftest import PROMPT
from tsotsallm.engine.interface import Piece, Question, Sampling, Speaker, said
from tsotsallm.engine.transformer import Transformer
from tsotsallm.errors import TsotsallmError

TOKENS = 20


def greedy(ours: Transformer, ids: Sequence[int], how: Sampling) -> list[int]:
    """The definition of the penalties, spelled out token by token."""
    made = list(ids)
    for _ in range(TOKENS):
        with torch.no_grad():
            logits = ours.model(torch.tensor([made])).logits[0, -1].tolist()
        for token, bias in how.logit_bias:
            logits[token] += bias
        seen = made[-how.repeat_last_n:] if how.repeat_last_n else []
        for token, times in Counter(seen).items():
            logits[token] *= 1 / how.repetition_penalty if logits[token] > 0 else how.repetition_penalty
            logits[token] -= times * how.frequency_penalty + how.presence_penalty
        made.append(max(range(len(logits)), key=logits.__getitem__))
        if made[-1] in ours.codec.ends:
            return made[len(ids):-1]
    return made[len(ids):]


def likeliest(ours: Transformer, rank: int = 0) -> int:
    with torch.no_grad():
        return int(ours.model(torch.tensor([ours.tokenize(PROMPT)])).logits[0, -1].topk(rank + 1).indices[rank])


OPTIONS: dict[str, dict[str, Any]] = {
    "nothing": {}, "min_p": {"min_p": 0.3}, "presence": {"presence_penalty": 1.5}, "frequency": {"frequency_penalty": 0.8},
    "repetition": {"repetition_penalty": 1.3}, "reward": {"presence_penalty": -2.0, "repetition_penalty": 0.8},
    "short": {"repetition_penalty": 3.0, "repeat_last_n": 6}, "long": {"frequency_penalty": 0.5, "repeat_last_n": 1000},
    "off": {"repetition_penalty": 1.5, "presence_penalty": 2.0, "repeat_last_n": 0},
    "all": {"repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.5, "min_p": 0.1, "top_k": 5,
            "top_p": 0.9},
    "ban": {"logit_bias": ((-1, -100.0),)}, "nudge": {"logit_bias": ((-2, 3.0),)}, "force": {"logit_bias": ((-2, 100.0),)},
    "bias and penalty": {"logit_bias": ((-2, 6.0),), "repetition_penalty": 1.2, "frequency_penalty": 1.0}}


def option(ours: Transformer, name: str) -> Sampling:
    """An option; -1 and -2 stand for the likeliest tokens after the prompt."""
    how = dict(OPTIONS[name])
    if "logit_bias" in how:
        how["logit_bias"] = tuple((likeliest(ours, -token - 1), bias) for token, bias in how["logit_bias"])
    return Sampling(**how)


@pytest.mark.parametrize("name", OPTIONS)
def test_greedy_text_is_that_of_the_definition(both: dict[str, Speaker], ours: Transformer, name: str) -> None:
    how, ids = option(ours, name), ours.tokenize(PROMPT)
    expected = ours.codec.continuation(greedy(ours, ids, how))
    for engine, one in both.items():
        assert said(one, Question(PROMPT, TOKENS, how)) == expected, engine


def test_the_options_change_the_text(ours: Transformer) -> None:
    plain = said(ours, Question(PROMPT, TOKENS))
    same = {name for name in OPTIONS if said(ours, Question(PROMPT, TOKENS, option(ours, name))) == plain}
    assert same == {"nothing", "min_p", "off"}


def test_repetition_penalty_and_bias_are_transformers_own(ours: Transformer) -> None:
    ids = torch.tensor([ours.tokenize(PROMPT)])
    token = likeliest(ours)
    for how, theirs in (({"repetition_penalty": 1.4, "repeat_last_n": 1000}, {"repetition_penalty": 1.4}),
                        ({"logit_bias": ((token, -7.5),)}, {"sequence_bias": {(token,): -7.5}})):
        new = ours.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False,
                                  pad_token_id=0, **theirs)[0, ids.shape[1]:].tolist()
        kept = [one for one in new if one not in ours.codec.ends]
        assert said(ours, Question(PROMPT, TOKENS, Sampling(**how))) == ours.codec.continuation(kept)


def test_log_probabilities_are_told_before_bias_and_penalties(both: dict[str, Speaker], ours: Transformer) -> None:
    how = option(ours, "bias and penalty")
    ids = ours.tokenize(PROMPT)
    made = greedy(ours, ids, how)
    with torch.no_grad():
        shares = ours.model(torch.tensor([[*ids, *made]])).logits[0].log_softmax(-1)
    expected = [float(shares[len(ids) + place - 1, token]) for place, token in enumerate(made)]
    for one in both.values():
        told: list[float | None] = []

        def hear(piece: Piece, told: list[float | None] = told) -> bool:
            told += [token.logprob for token in piece.tokens]
            return False

        one.speak(Question(PROMPT, len(made), how, likeliest=1), hear)
        assert told == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("name", ["checkpoint", "gguf"])
def test_draws_are_from_the_tokens_that_are_left(both: dict[str, Speaker], ours: Transformer, name: str) -> None:
    """Temperature comes before top-p and min-p, on both engines: with more temperature more tokens are left."""
    with torch.no_grad():
        logits = ours.model(torch.tensor([ours.tokenize(PROMPT)])).logits[0, -1]
    for temperature, how in ((3.0, {"min_p": 0.5}), (2.0, {"top_p": 0.4})):
        shares = (logits / temperature).softmax(-1)
        best = shares.argsort(descending=True)
        before = shares[best].cumsum(0) - shares[best]
        count = int((shares >= 0.5 * shares.max()).sum()) if "min_p" in how else int((before < 0.4).sum())
        left = {ours.codec.continuation([int(token)]) for token in best[:count]}
        assert len(left) > 2                            # without temperature one or two would be
        drawn = {said(both[name], Question(PROMPT, 1, Sampling(temperature, seed=seed, **how))) for seed in range(40)}
        assert drawn <= left
        assert len(drawn) > 2


def test_a_grammar_holds_and_a_checkpoint_refuses_it(both: dict[str, Speaker]) -> None:
    gguf, checkpoint = both["gguf"], both["checkpoint"]
    assert said(gguf, Question(PROMPT, 8, Sampling(grammar='root ::= "yes" | "no"'))) in ("yes", "no")
    assert {said(gguf, Question(PROMPT, 8, Sampling(2.0, seed=seed, grammar="root ::= [0-9]{2}"))).isdigit()
            for seed in range(4)} == {True}
    with pytest.raises(TsotsallmError, match="export MODEL --gguf"):
        said(checkpoint, Question(PROMPT, 8, Sampling(grammar='root ::= "yes"')))
    for wrong in ("root ::= x", "root ::= root \"a\"", "nothing", " "):
        with pytest.raises(TsotsallmError, match="grammar"):
            said(gguf, Question(PROMPT, 8, Sampling(grammar=wrong)))
    for wrong in ("%llguidance {}\nstart: yes\"", 'root ::= "a" \0 "b"'):   # llama.cpp would answer without a grammar
        with pytest.raises(TsotsallmError, match="not GBNF"):
            Sampling(grammar=wrong)


@pytest.mark.parametrize("name", ["checkpoint", "gguf"])
def test_tokens_that_the_model_lacks_are_named(both: dict[str, Speaker], ours: Transformer, name: str) -> None:
    size = ours.model.config.vocab_size
    assert said(both[name], Question(PROMPT, 2, Sampling(logit_bias=((size - 1, -1.0),))))
    for token in (size, 999_999_999, -1):
        with pytest.raises(TsotsallmError, match=f"token {token}, .* 0 to {size - 1}"):
            said(both[name], Question(PROMPT, 2, Sampling(logit_bias=((token, 1.0),))))


@pytest.mark.parametrize("how", [{"min_p": 1.5}, {"min_p": -0.1}, {"repetition_penalty": 0.0}, {"repeat_last_n": -1}])
def test_impossible_sampling_is_refused(how: dict[str, Any]) -> None:
    with pytest.raises(TsotsallmError, match="is not possible"):
        Sampling(**how)
