"""Scores of a GGUF file in llama.cpp: its own server and transformers give the same, and the divergence is what it says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import tsotsallm
from tests import llama
from tsotsallm.api.evaluate import evaluate_in_llama, plan_in_llama
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.engine import library
from tsotsallm.engine.library import Forced
from tsotsallm.errors import CheckpointError, CorpusError, MissingExtraError, TsotsallmError
from tsotsallm.evaluation import in_llama
from tsotsallm.export.gguf import export_gguf
from tsotsallm.streaming.corpus import evaluation_windows

pytest.importorskip("xllamacpp", reason="xllamacpp is in the extra [llama]")
IDS = [1, 17, 40, 33, 90, 120, 7, 64, 200, 3, 55, 81]


@pytest.fixture(scope="module")
def exact(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exact") / "exact.gguf"
    export_gguf(Checkpoint.open(tiny), path, dense="f32")
    return path


def test_all_places_of_a_window_at_once_are_what_the_server_says_one_by_one(exact: Path) -> None:
    with Forced(exact, 64) as forced:
        assert forced.vocabulary == 256
        found, again = forced.log_probabilities(IDS), forced.log_probabilities(IDS)
        fewer = forced.log_probabilities(IDS[:5])
    assert torch.equal(found, again)
    torch.testing.assert_close(fewer, found[:5], rtol=1e-3, atol=1e-3)
    expected = llama.Llama(exact, 256).log_probabilities(IDS)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-2)      # a cache in 16 bits
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(len(IDS)), rtol=1e-4, atol=0)


def test_the_divergence_in_llama_cpp_is_that_of_its_log_probabilities(exact: Path, tiny: Path, text: Path,
                                                                      tmp_path: Path) -> None:
    same = evaluate_in_llama(exact, text, reference=tiny, context=48, limit=3)
    assert same.kl == pytest.approx(0, abs=1e-5)
    assert same.perplexity == pytest.approx(same.reference_perplexity, rel=1e-3)
    assert same.protocol.arithmetic == "llama.cpp, cache in f16"
    tsotsallm.compress(tiny, "rtn:q4_0", tmp_path / "coarse")
    export_gguf(Checkpoint.open(tmp_path / "coarse"), tmp_path / "coarse.gguf")
    found = evaluate_in_llama(tmp_path / "coarse.gguf", text, reference=tiny, context=48, limit=3)
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    corpus = evaluation_windows(text.read_text(), Checkpoint.open(tiny).codec, 48, "text").first(3)
    losses, divergences, agree = [], [], []
    with Forced(tmp_path / "coarse.gguf", 48) as forced, torch.no_grad():
        for window in corpus.windows:
            q, p = forced.log_probabilities(window.tolist())[:-1], model(window[None]).logits[0, :-1].log_softmax(-1)
            losses.append(-q.gather(1, window[1:, None]).mean())
            divergences.append((p.exp() * (p - q)).sum(-1).mean())
            agree.append((p.argmax(-1) == q.argmax(-1)).float().mean())
    assert found.loss == pytest.approx(float(torch.stack(losses).mean()), rel=1e-4)
    assert found.kl == pytest.approx(float(torch.stack(divergences).mean()), rel=1e-3)
    assert found.same_top_token == pytest.approx(float(torch.stack(agree).mean()), abs=1e-6)
    assert found.tail is not None
    alone = evaluate_in_llama(tmp_path / "coarse.gguf", text, context=48, limit=3)
    assert alone.perplexity == pytest.approx(found.perplexity, rel=1e-6)
    assert alone.kl is None


def test_a_forecast_counts_windows_tokens_and_the_reference(exact: Path, tiny: Path, text: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_llama, "gemm_flops_per_second", lambda: 1e3)
    alone = plan_in_llama(exact, text, context=48, limit=3)
    assert (alone.how, alone.items, alone.tokens) == ("llama.cpp", 3, 144)
    assert alone.floor_s == pytest.approx(3 * alone.pass_s)
    beside = plan_in_llama(exact, text, reference=tiny, context=48, limit=3)
    model = AutoModelForCausalLM.from_pretrained(tiny)
    multiplied = sum(weight.numel() for weight in model.parameters() if weight.ndim == 2)       # the head is tied or counted
    if not model.config.tie_word_embeddings:
        multiplied -= model.get_input_embeddings().weight.numel()
    assert beside.floor_s - 3 * beside.pass_s == pytest.approx(2 * multiplied * 144 / 1e3)


def test_what_cannot_be_scored_is_refused(exact: Path, stories: Path, text: Path, tmp_path: Path,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CorpusError, match="at most the"):
        evaluate_in_llama(exact, text, context=1_000_000)
    with pytest.raises(CheckpointError, match="cannot be compared token by token"):
        evaluate_in_llama(exact, text, reference=stories, context=32, limit=1)
    with pytest.raises(CheckpointError, match="cannot be compared token by token"):
        plan_in_llama(exact, text, reference=stories, context=32, limit=1)
    (tmp_path / "no.gguf").write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(CheckpointError, match="cannot load"):
        Forced(tmp_path / "no.gguf", 32)
    monkeypatch.setattr(library, "DEFAULTS", (1, 2, 3, 4))
    with pytest.raises(TsotsallmError, match="install the one in constraints"):
        Forced(exact, 32)
    monkeypatch.setattr(library.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(MissingExtraError, match="llama"):
        Forced(exact, 32)
