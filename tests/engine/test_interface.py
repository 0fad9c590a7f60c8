"""Engines that answer: tokens and log-probabilities against transformers' own, stop texts, sampling, cancelling, prompts."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.engine.conftest import PROMPT
from tsotsallm.api.generate import generate_many, read_prompts
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.engine.interface import Piece, Question, Sampling, Speaker, said, texts
from tsotsallm.engine.resident import resident
from tsotsallm.engine.transformer import Transformer
from tsotsallm.errors import CorpusError, TsotsallmError


def heard_of(one: Speaker, question: Question) -> list[Piece]:
    heard: list[Piece] = []
    one.speak(question, lambda piece: bool(heard.append(piece)))    # type: ignore[func-returns-value]
    return heard


def test_greedy_text_and_likelihoods_are_transformers_own(family_checkpoint: Path) -> None:
    checkpoint = Checkpoint.open(family_checkpoint)
    model, one = resident(checkpoint), Transformer(checkpoint)
    ids = torch.tensor([one.tokenize("The river of words runs on")])
    heard = heard_of(one, Question(ids[0].tolist(), 14, likeliest=3))
    new = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=14, do_sample=False,
                         pad_token_id=0)[0, ids.shape[1]:].tolist()
    with torch.no_grad():
        shares = model(torch.cat([ids, torch.tensor([new])], 1)).logits[0].log_softmax(-1)
    tokens = [token for piece in heard for token in piece.tokens]
    kept = new[:-1] if new[-1] == checkpoint.tokenizer().eos_token_id else new
    assert [token.logprob for token in tokens] == pytest.approx(
        [float(shares[ids.shape[1] + place - 1, token]) for place, token in enumerate(kept)], abs=1e-4)
    best = shares[ids.shape[1] - 1].topk(3)
    assert [one.logprob for one in tokens[0].likeliest] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert "".join(piece.text for piece in heard) == one.codec.continuation(kept).rstrip("�")


def test_the_engines_agree(both: dict[str, Speaker]) -> None:
    for question in (Question(PROMPT, 12, likeliest=4), Question(PROMPT, 40, stop=(".",)),
                     Question(({"role": "user", "content": "Where was Ada born?"},), 12)):
        first, second = (heard_of(one, question) for one in both.values())
        assert "".join(piece.text for piece in first).strip() == "".join(piece.text for piece in second).strip()
        ours, theirs = ([token for piece in heard for token in piece.tokens] for heard in (first, second))
        assert [token.text for token in ours] == [token.text for token in theirs]
        assert [token.logprob for token in ours] == pytest.approx([token.logprob for token in theirs], abs=2e-3)
        plain, other = ([[re.sub(r"<[|].*[|]>", "", one.text) for one in token.likeliest[:2]] for token in tokens]
                        for tokens in (ours, theirs))           # llama.cpp has no text for special tokens
        assert plain == other
    first, second = (one.tokenize(PROMPT) for one in both.values())
    assert first == second
    first, second = (list(one.prompt_tokens(first, 2, lambda: False)) for one in both.values())
    assert first[0].logprob is second[0].logprob is None
    assert [token.logprob for token in first[1:]] == pytest.approx([token.logprob for token in second[1:]], abs=2e-3)
    assert [token.text for token in first] == [token.text for token in second]


@pytest.mark.parametrize("name", ["checkpoint", "gguf"])
def test_how_answers_end(both: dict[str, Speaker], name: str) -> None:
    one = both[name]
    whole = said(one, Question(PROMPT, 30))
    stop = whole.strip().split()[2]
    text = said(one, Question(PROMPT, 30, stop=(stop, "never there")))
    assert text == whole[:whole.index(stop)]
    end = one.speak(Question(PROMPT, 5), lambda piece: False)
    assert (end.finish, end.tokens, end.prompt_tokens) == ("length", 5, len(one.tokenize(PROMPT)))
    heard: list[str] = []
    end = one.speak(Question(PROMPT, 400), lambda piece: heard.append(piece.text) or len(heard) >= 3)  # type: ignore[func-returns-value]
    assert end.finish == "cancelled"
    assert len(heard) <= 4
    for piece in texts(one, Question(PROMPT, 400)):         # whoever stops listening ends it
        assert piece
        break
    with pytest.raises(TsotsallmError, match="token"):
        said(one, Question("word " * 3000, 3))
    with pytest.raises(TsotsallmError, match="token"):
        said(one, Question([1, 999_999], 3))


@pytest.mark.parametrize("name", ["checkpoint", "gguf"])
def test_sampling_is_the_seed_s_and_the_temperature_s(both: dict[str, Speaker], name: str) -> None:
    one = both[name]

    def drawn(seed: int, **how: float) -> str:
        return said(one, Question(PROMPT, 8, Sampling(seed=seed, **{"temperature": 1.0, **how})))   # type: ignore[arg-type]

    assert drawn(3) == drawn(3)
    assert len({drawn(seed) for seed in range(6)}) > 1
    assert {drawn(seed, top_k=1) for seed in range(3)} == {said(one, Question(PROMPT, 8))}
    assert {drawn(seed, top_p=1e-6) for seed in range(3)} == {said(one, Question(PROMPT, 8))}


def test_first_tokens_are_drawn_by_their_probabilities(ours: Transformer) -> None:
    """Two of the likeliest tokens at temperature 2: counts within four standard errors of what the softmax says."""
    count = 400
    with torch.no_grad():
        logits = ours.model(torch.tensor([ours.tokenize(PROMPT)])).logits[0, -1]
    best = (logits / 2).topk(2)
    share = float(best.values.softmax(-1)[0])
    found = Counter(said(ours, Question(PROMPT, 1, Sampling(2.0, 1.0, 2, seed))) for seed in range(count))
    first = ours.codec.tokenizer.decode([int(best.indices[0])])
    assert abs(found[first] / count - share) < 4 * (share * (1 - share) / count) ** 0.5


def test_whole_characters_only(ours: Transformer) -> None:
    """Half characters wait for the rest; what never becomes a character is told at no time."""
    ids = ours.tokenize("é") + ours.tokenize("ñ")
    assert any(token.startswith("Ã") for token in ours.codec.tokenizer.convert_ids_to_tokens(ids)) or len(ids) >= 2
    for seed in range(5):
        for piece in heard_of(ours, Question("À côté, garçon", 20, Sampling(1.5, 1.0, 0, seed))):
            assert "�" not in piece.text


def test_many_prompts_go_on_after_a_line_that_was_cut_off(tiny: Path, tmp_path: Path) -> None:
    prompts, whole, cut = tmp_path / "prompts.txt", tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    prompts.write_text("one\ntwo\nthree", "utf-8")
    generate_many(tiny, prompts, whole, tokens=2, say=lambda _line: None)
    lines = whole.read_bytes().splitlines(keepends=True)
    cut.write_bytes(lines[0] + lines[1][:7])
    assert generate_many(tiny, prompts, cut, tokens=2, say=lambda _line: None) == 3
    assert cut.read_bytes() == whole.read_bytes()
    for content in (b"a letter\n", b"a letter", b'["no answer"]\n', b'{"prompt": "other", "text": ""}\n'):
        cut.write_bytes(content)
        with pytest.raises(TsotsallmError, match="something else"):
            generate_many(tiny, prompts, cut, tokens=2, say=lambda _line: None)
        assert cut.read_bytes() == content


def test_prompts_end_at_line_feeds_alone(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffone\u2028two\x85three\x0bfour\x1cfive\r\n\r\nsix\rseven\n".encode())
    assert read_prompts(path) == ["one\u2028two\x85three\x0bfour\x1cfive", "", "six\rseven"]
    for content, message in ((b"\n\n", "holds no prompts"), (b"one\n\xff", "line 2 is not UTF-8"), (None, "does not exist")):
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(CorpusError, match=message):
            read_prompts(path)
        path.touch()


INTERRUPTED = """
import random, signal, threading
from tsotsallm.engine.interface import Answer, Piece, texts

class Talkative:
    def speak(self, question, heard):
        while not heard(Piece("x", ())):
            pass
        return Answer("stop", 0, 0, 0, 0)

signal.signal(signal.SIGINT, signal.default_int_handler)     # in the background, shells have it ignored, which is inherited
main, draw = threading.get_ident(), random.Random(0)
for _ in range(500):
    try:
        press = threading.Timer(0.001 + 0.003 * draw.random(), signal.pthread_kill, (main, signal.SIGINT))
        press.start()
        for piece in texts(Talkative(), None):
            pass
    except KeyboardInterrupt:
        pass
print("still here")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends no signals to a thread")
def test_ctrl_c_at_any_moment_ends_an_answer() -> None:
    """Between two lines of a Queue's get(), within 51 presses, it had left a lock taken: the answer went on for ever."""
    found = subprocess.run([sys.executable, "-c", INTERRUPTED], timeout=120, capture_output=True, text=True, check=False)
    assert (found.stdout, found.returncode) == ("still here\n", 0), found.stderr
