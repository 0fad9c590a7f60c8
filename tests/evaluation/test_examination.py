"""Whole evaluations: against counting by hand, resumed, compared, and refused where numbers do not compare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tsotsallm
from tests.conftest import build
from tsotsallm.api.evaluate import gguf_speeds
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.checkpoint.view import View
from tsotsallm.errors import TsotsallmError
from tsotsallm.evaluation.cost import cost_of, devices
from tsotsallm.evaluation.task_run import Examinee, open_examinee


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    words = "one two three four five six seven eight nine ten".split()
    rows = [{"query": " ".join(rng.choice(words, 5)), "choices": [" ".join(rng.choice(words, rng.integers(1, 4)))
                                                                  for _ in range(3)], "gold": int(rng.integers(3))}
            for _ in range(40)]
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def by_hand(model: Path, questions: Path) -> list[list[float]]:
    """log p of every choice by the resident model, one sequence at a time."""
    resident = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    found = []
    for line in questions.read_text().splitlines():
        row = json.loads(line)
        prompt = tokenizer(row["query"] + "\nAnswer:")["input_ids"]
        found.append([])
        for choice in row["choices"]:
            ids = tokenizer(row["query"] + "\nAnswer: " + choice)["input_ids"]
            with torch.no_grad():
                log_p = resident(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            found[-1].append(sum(float(log_p[place - 1, ids[place]]) for place in range(len(prompt), len(ids))))
    return found


def test_accuracy_is_that_of_counting_by_hand(tiny: Path, questions: Path) -> None:
    result = tsotsallm.examine([tiny], ["piqa"], data=questions).results[0][0]
    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    totals = by_hand(tiny, questions)
    right = [int(np.argmax(total) == row["gold"]) for total, row in zip(totals, rows, strict=True)]
    norm = [int(np.argmax([one / len(choice) for one, choice in zip(total, row["choices"], strict=True)]) == row["gold"])
            for total, row in zip(totals, rows, strict=True)]
    scores = {score.measure: score for score in result.scores}
    assert scores["acc"].value == pytest.approx(np.mean(right))
    assert scores["acc_norm"].value == pytest.approx(np.mean(norm))
    assert scores["acc"].standard_error == pytest.approx(np.std(right, ddof=1) / len(right) ** 0.5)


def test_a_stopped_evaluation_goes_on_with_the_items_that_are_left(tiny: Path, questions: Path,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    likelihoods = Examinee.likelihoods

    def stop(self: Examinee, items: Any) -> Any:
        asked.append(len(items))
        for number, found in enumerate(likelihoods(self, items)):
            if len(asked) == 1 and number == 15:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr(Examinee, "likelihoods", stop)
    with pytest.raises(KeyboardInterrupt):
        tsotsallm.examine([tiny], ["piqa"], data=questions)
    resumed = tsotsallm.examine([tiny], ["piqa"], data=questions)
    again = tsotsallm.examine([tiny], ["piqa"], data=questions)
    assert asked == [40, 25, 0]
    assert [score.value for score in resumed.results[0][0].scores] == [score.value for score in again.results[0][0].scores]
    monkeypatch.undo()


def test_another_model_does_not_take_over_the_cache(tiny: Path, questions: Path, tmp_path: Path, text: Path) -> None:
    recipe = '[{sparsity: {prune: 3, group: 4, per_layer: {1: {prune: 1}, 2: {prune: 1}, 3: {prune: 1}}}}]'
    tsotsallm.compress(tiny, recipe, tmp_path / "a", calibration=text, windows=4, window=64)
    tsotsallm.compress(tiny, recipe.replace("1: {prune: 1}", "1: {prune: 2}"), tmp_path / "b", calibration=text, windows=4,
                       window=64)
    first, second = (open_examinee(tmp_path / name, tmp_path).fingerprint for name in "ab")
    assert first != second


def test_models_are_compared_in_pairs(tiny: Path, questions: Path, tmp_path: Path) -> None:
    tsotsallm.compress(tiny, "rtn:2:channel", tmp_path / "coarse")
    found = tsotsallm.examine([tiny, tiny, tmp_path / "coarse"], ["piqa"], data=questions)
    accuracy = next(one for one in found.comparisons if one.measure == "acc")
    _, same, other = accuracy.differences
    assert same is not None
    assert (same.value, same.low, same.high, same.p) == (0, 0, 0, 1)
    assert other is not None
    assert other.value == pytest.approx(accuracy.scores[2].value - accuracy.scores[0].value)
    assert other.low <= other.value <= other.high
    assert json.loads(json.dumps(found.plain()))["comparisons"][0]["items"] == 40


def test_numbers_of_different_protocols_are_refused(tiny: Path, questions: Path) -> None:
    from tsotsallm.evaluation.results import compare

    all_items = tsotsallm.examine([tiny], ["piqa"], data=questions).results[0][0]
    some = tsotsallm.examine([tiny], ["piqa"], data=questions, limit=20).results[0][0]
    with pytest.raises(TsotsallmError, match=r"data_sha256.*limit"):
        compare([all_items, some])


def test_models_of_other_contexts_and_tokenizers_answer_the_same_questions(tiny: Path, questions: Path,
                                                                           stories: Path) -> None:
    found = tsotsallm.examine([tiny, stories], ["piqa"], data=questions)
    assert all(one.differences[1] is not None for one in found.comparisons)


def test_bits_per_byte_of_other_tokenizers_take_the_whole_text(tmp_path: Path, text: Path, stories: Path) -> None:
    other = build(tmp_path / "other", "llama3", max_position_embeddings=512)
    with pytest.raises(TsotsallmError, match="without a limit"):
        tsotsallm.examine([stories, other], ["wikitext-2"], data=text, limit=2)


def test_a_wrong_model_name_is_told_before_the_first_is_scored(tiny: Path, questions: Path, tmp_path: Path,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Examinee, "likelihoods", lambda *_: pytest.fail("scored"))
    with pytest.raises(TsotsallmError, match="no-such"):
        tsotsallm.examine([tiny, tmp_path / "no-such"], ["piqa"], data=questions)


def test_a_model_in_memory_stays_there_for_the_next_task(tiny: Path, tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    examinee = open_examinee(tiny, tmp_path)
    examinee.generate(["one"], 2, (), lambda _index, _text: None)
    monkeypatch.setattr(Examinee, "free_bytes", 0)
    assert not examinee.generates_by_sweeps
    examinee.forget_model()
    assert examinee.generates_by_sweeps


def test_long_texts_are_scored_in_passes(tiny: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tsotsallm.evaluation import task_run

    whole = tsotsallm.examine([tiny], ["wikitext-2"], data=text).results[0][0].scores
    monkeypatch.setattr(task_run, "CHUNK_BYTES", 4 * Checkpoint.open(tiny).spec.hidden * 600)
    monkeypatch.setenv("TSOTSALLM_CACHE", str(text.parent / "another"))
    passes = tsotsallm.examine([tiny], ["wikitext-2"], data=text).results[0][0].scores
    assert [score.value for score in passes] == pytest.approx([score.value for score in whole], rel=1e-6)


def test_models_with_other_tokenizers_compare_by_bits_per_byte(stories: Path, tmp_path: Path, text: Path) -> None:
    other = build(tmp_path / "other", "llama3", max_position_embeddings=512)
    found = tsotsallm.examine([stories, other], ["wikitext-2"], data=text)
    assert [one.measure for one in found.comparisons] == ["bits per byte"]
    difference = found.comparisons[0].differences[1]
    assert difference is not None
    assert difference.low < difference.value < difference.high


def test_perplexity_by_language_and_from_a_reference(tiny: Path, tmp_path: Path, text: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    content = text.read_text()
    for name, part in (("udhr_one", content[:800]), ("udhr_two", content[800:2000])):
        (folder / f"{name}.txt").write_text(part)
    tsotsallm.compress(tiny, "rtn:3:channel", tmp_path / "small")
    found = tsotsallm.examine([tiny, tmp_path / "small"], ["udhr"], data=folder, reference=tiny)
    rows = {(one.measure, one.group): one for one in found.comparisons}
    assert rows["KL from reference", ""].scores[0].value == pytest.approx(0, abs=1e-9)
    assert rows["KL from reference", "one"].scores[1].value > 0
    alone = tsotsallm.evaluate(tiny, folder / "udhr_two.txt", context=min(512, Checkpoint.open(tiny).spec.context))
    assert rows["perplexity", "two"].scores[0].value == pytest.approx(alone.perplexity)
    assert rows["bits per byte", "two"].scores[0].value == pytest.approx(alone.bits_per_byte)


def test_generation_by_sweeps_gives_the_same_answers(tiny: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"question": f"what is {number}", "answer": ["7"]}) for number in range(12)))
    replies = []
    for by_sweeps in (False, True):
        examinee = open_examinee(tiny, tmp_path / "scratch", by_sweeps=by_sweeps)
        told: dict[int, str] = {}
        examinee.generate([f"Question: what is {number}?\nAnswer:" for number in range(12)], 8, ("\n",), told.__setitem__)
        replies.append(told)
    assert replies[0] == replies[1]


# -- cost -----------------------------------------------------------------------------------------------------------


def test_cost_counts_bytes_and_zeros_as_the_files_hold_them(tiny: Path, tmp_path: Path, text: Path) -> None:
    from safetensors.torch import load_file

    tsotsallm.compress(tiny, "wanda:2:4", tmp_path / "sparse", calibration=text, windows=4, window=64)
    cost = cost_of(Checkpoint.open(tmp_path / "sparse"), "sparse")
    tensors = load_file(tmp_path / "sparse" / "model.safetensors")
    assert cost.nonzero_parameters == sum(int(torch.count_nonzero(tensor)) for tensor in tensors.values())
    assert cost.disk_bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert cost.parameters == sum(tensor.numel() for tensor in tensors.values())
    assert cost.fits == dict.fromkeys(devices(), True)


def test_speed_and_energy_are_measured_in_a_process_of_their_own(tiny: Path) -> None:
    pytest.importorskip("codecarbon", reason="the energy extra is not installed")
    found = tsotsallm.examine([tiny], ["world-open"], limit=3, country="CMR").costs[0]
    assert found.speed is not None
    assert found.speed.decode_tokens_per_s > 0
    energy = found.speed.energy
    assert energy is not None
    assert energy.label.startswith(("measured (", "estimated ("))
    assert energy.decode_wh_per_1000_tokens == pytest.approx(energy.power_w / 3.6 / found.speed.decode_tokens_per_s)
    query = energy.query_wh["100 in, 300 out"]
    assert query == pytest.approx(0.1 * energy.prefill_wh_per_1000_tokens + 0.3 * energy.decode_wh_per_1000_tokens)
    assert energy.query_co2_g["100 in, 300 out"] == pytest.approx(query / 1000 * energy.carbon_g_per_kwh)
    assert 250 < energy.carbon_g_per_kwh < 350       # Cameroon: mostly hydropower and gas
    assert energy.year_kwh == pytest.approx(36.5 * query)
    assert energy.year_co2_kg == {"CMR": pytest.approx(energy.year_kwh * energy.carbon_g_per_kwh / 1000)}
    with pytest.raises(TsotsallmError, match="three letters"):
        tsotsallm.examine([tiny], ["world-open"], limit=3, country="Cameroon")


def test_a_view_is_examined_without_being_written(tiny: Path, tmp_path: Path, questions: Path) -> None:
    view = View.of(Checkpoint.open(tiny)).reordered([0, 2, 2, 3])
    tsotsallm.compress(tiny, [{"layers": {"order": [0, 2, 2, 3]}}], tmp_path / "written")
    asked = [("one two three", [" four", " five six"])]
    [(_, seen)] = Examinee(view, "view", tmp_path).likelihoods(asked)
    [(_, written)] = open_examinee(tmp_path / "written", tmp_path).likelihoods(asked)
    assert [one.total for one in seen] == pytest.approx([one.total for one in written], rel=1e-6)


def test_the_energy_of_a_gguf_file_is_that_of_llama_cpp(tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("codecarbon", reason="the energy extra is not installed")
    pytest.importorskip("xllamacpp", reason="xllamacpp is in the extra [llama]")
    tsotsallm.to_gguf("embedded", tmp_path / "model.gguf", verify=False)
    [speed] = gguf_speeds([tmp_path / "model.gguf"], country="CMR,FRA").values()
    energy = speed.energy
    assert energy is not None
    assert energy.decode_wh_per_1000_tokens == pytest.approx(energy.power_w / 3.6 / speed.decode_tokens_per_s)
    assert list(energy.year_co2_kg) == ["CMR", "FRA"]
    assert energy.year_co2_kg["CMR"] > 3 * energy.year_co2_kg["FRA"]         # mostly nuclear
    with pytest.raises(TsotsallmError, match="three letters"):
        gguf_speeds([tmp_path / "model.gguf"], country="CMR,France")
