"""Answers in conversations: who writes them, which tokens are scored, and that models are compared there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import tsotsallm
from tests.conftest import build, build_talking
from tests.fit.parts import settings
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.checkpoint.view import View
from tsotsallm.engine import selftext
from tsotsallm.engine.resident import resident
from tsotsallm.errors import CorpusError, TsotsallmError
from tsotsallm.evaluation import conversations
from tsotsallm.evaluation.conversations import own_answers
from tsotsallm.evaluation.examinee import Examinee
from tsotsallm.evaluation.perplexity import evaluate_perplexity
from tsotsallm.fit import units as measuring

CHATS = [[("user", "Who sings?"), ("assistant", "The teacher sings."), ("user", "When?"), ("assistant", "At night.")],
         [("user", "Say yes."), ("assistant", "Yes.")]]


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_talking(tmp_path_factory.mktemp("talking") / "model")


@pytest.fixture(scope="module")
def rounded(talking: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("rounded") / "model"
    tsotsallm.compress(talking, "rtn:4:32", out)
    return out


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": [{"role": role, "content": text} for role, text in chat]}) + "\n"
                            for chat in CHATS), "utf-8")
    return path


def author(path: Path, tmp_path: Path, *, by_sweeps: bool | None = None) -> Examinee:
    return Examinee(View.of(Checkpoint.open(path)), path.name, tmp_path, by_sweeps=by_sweeps)


def logits_of(path: Path, ids: list[int]) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        found: Tensor = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return found


def naive(path: Path, original: Path) -> tuple[float, float, int]:
    """(KL, loss, tokens) by whole logits of transformers, answer by answer, each after what the template puts before it."""
    codec = Checkpoint.open(original).codec
    kl, loss, tokens = 0.0, 0.0, 0
    for chat in CHATS:
        messages = [{"role": role, "content": text} for role, text in chat]
        ids = codec.conversation(messages, answer=False)
        p, q = logits_of(original, ids), logits_of(path, ids)
        for place, message in enumerate(messages):
            if message["role"] == "assistant":
                begin = len(codec.conversation(messages[:place]))
                end = len(codec.conversation(messages[:place + 1], answer=False))
                for at in range(begin, end):
                    kl += float((p[at - 1].exp() * (p[at - 1] - q[at - 1])).sum())
                    loss -= float(q[at - 1, ids[at]])
                    tokens += 1
    return kl / tokens, loss / tokens, tokens


def test_only_answers_are_scored_as_transformers_scores_them(talking: Path, rounded: Path, chats: Path,
                                                             tmp_path: Path) -> None:
    dense = tmp_path / "dense"
    resident(Checkpoint.open(rounded)).save_pretrained(dense)
    found = tsotsallm.examine([rounded], ["conversations"], data=chats, reference=talking)
    kl, loss, tokens = naive(dense, talking)
    by_name = {one.measure: one.scores[0].value for one in found.comparisons}
    assert int(found.results[0][0].features["tokens"].sum()) == tokens
    assert by_name["KL from reference"] == pytest.approx(kl, abs=1e-5)
    assert by_name["perplexity"] == pytest.approx(float(torch.tensor(loss).exp()), rel=1e-4)


@pytest.mark.parametrize("by_sweeps", [False, True])
def test_own_answers_are_what_transformers_writes(talking: Path, tmp_path: Path, by_sweeps: bool) -> None:
    writer = author(talking, tmp_path, by_sweeps=by_sweeps)
    found, codec = own_answers(writer), writer.codec
    assert 0 < len(found) <= conversations.ANSWERS
    assert all(request["content"] in selftext.prompts("compare") for _, (request, _) in found)
    model = resident(writer.checkpoint)
    for _, (request, answer) in found[:4]:
        prompt = torch.tensor([codec.conversation([request])])
        new = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, pad_token_id=0,
                             max_new_tokens=conversations.ANSWER_TOKENS)[0, prompt.shape[1]:].tolist()
        ends = [place for place, token in enumerate(new) if token in codec.ends]
        assert answer["content"] == selftext.cleaned(codec.continuation(new[:ends[0]] if ends else new))


def test_answers_are_written_once(talking: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = own_answers(author(talking, tmp_path))
    monkeypatch.setattr(conversations, "generate_resident", lambda *_args: pytest.fail("written again"))
    assert own_answers(author(talking, tmp_path)) == first


def test_all_models_are_compared_on_the_answers_of_the_first(talking: Path, rounded: Path) -> None:
    found = tsotsallm.examine([talking, rounded], ["conversations"], limit=3)
    assert len({one.protocol["data_sha256"] for one in found.results[0]}) == 1
    assert all(len(one.ids) == 3 for one in found.results[0])


def test_a_folder_of_several_tasks_may_hold_conversations(talking: Path, chats: Path) -> None:
    of_file = tsotsallm.examine([talking], ["conversations"], data=chats)
    without = tsotsallm.examine([talking], ["conversations"], data=chats.parent)
    assert len(without.results[0][0].ids) > len(CHATS)          # its own answers
    chats.rename(chats.with_name(conversations.CONVERSATIONS_FILE))
    of_folder = tsotsallm.examine([talking], ["conversations"], data=chats.parent)
    assert of_folder.results[0][0].protocol["data_sha256"] == of_file.results[0][0].protocol["data_sha256"]


def test_who_cannot_answer_is_told_what_to_give(tmp_path: Path) -> None:
    plain = build(tmp_path / "plain", "llama2", num_hidden_layers=2)
    with pytest.raises(CorpusError, match=r"no chat template.*data=FILE\.jsonl"):
        tsotsallm.examine([plain], ["conversations"])
    with pytest.raises(TsotsallmError, match="takes 1 or more"):
        tsotsallm.examine([plain], ["conversations"], limit=0)


def test_a_fit_of_a_model_that_converses_counts_its_answers(talking: Path, rounded: Path, text: Path,
                                                            tmp_path: Path) -> None:
    said: list[str] = []
    bench = measuring.Bench(str(talking), settings(text), tmp_path, said.append)
    loss, error = bench.loss_of(rounded, None)
    assert any("answers to" in line for line in said)
    of_text = evaluate_perplexity(Checkpoint.open(rounded), bench.compared_text, source="text", context=32,
                                  reference=Checkpoint.open(talking))
    answered = bench.answered(View.of(Checkpoint.open(rounded)))
    assert answered is not None
    assert of_text.kl is not None
    share = measuring.ANSWERS_SHARE
    assert loss == pytest.approx((1 - share) * of_text.kl + share * answered.kl, rel=1e-6)
    assert 0 < error < loss
    assert answered.tail.kl_median <= answered.tail.kl_99 <= answered.tail.kl_999


def test_a_fit_that_keeps_some_texts_only_compares_on_them(talking: Path, text: Path, tmp_path: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring.Bench, "_require_possible", lambda _bench: None)      # no merge is left for a GGUF file
    bench = measuring.Bench(str(talking), settings(text, keep_text=(str(text),)), tmp_path, lambda _line: None)
    assert bench.answers is None
