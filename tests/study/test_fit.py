"""The best model for a budget: never over it, predicted against measured, budgets that cannot be met."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.conftest import build
from tsotsallm.checkpoint.anatomy import linear_shapes
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.errors import ResourceError, ResumeError, StudyError
from tsotsallm.evaluation.perplexity import evaluate_perplexity
from tsotsallm.lab.texts import world_text
from tsotsallm.planning import whole_spec
from tsotsallm.stages.allocation import candidates
from tsotsallm.study import fit as fitting
from tsotsallm.study import units as measuring
from tsotsallm.study.budget import (
    Choices,
    Corrections,
    Limits,
    Measured,
    Plan,
    Structure,
    corrected,
    plan_for,
    smallest,
    structures,
)
from tsotsallm.study.fit import Target, fit, target_of
from tsotsallm.study.units import Mixture, Settings

gguf = pytest.importorskip("gguf", reason="gguf is in the extra [gguf]")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers whose widths suit the simpler grids."""
    return build(tmp_path_factory.mktemp("fit") / "model", "llama3", dtype=torch.bfloat16, num_hidden_layers=3,
                 intermediate_size=128)


def settings(text: Path, **more: Any) -> Settings:
    return Settings(str(text), windows=4, window=32, compared=8, **more)


def units(spec: Any) -> Measured:
    """Losses of units that fall with bits, as measured ones do."""
    torch.manual_seed(1)
    shapes = {f"{layer}.{name}": shape for layer in range(spec.layers) for name, shape in linear_shapes(spec, layer).items()}
    shapes["model.embed_tokens"] = (spec.vocabulary, spec.hidden)
    grids = {key: {grid.type: float(torch.rand(())) * 4.0 ** -grid.bits_per_weight for grid in candidates(shape[1])}
             for key, shape in shapes.items()}
    return Measured((1, 0), (0.0, 0.004, 0.05), {0.0: 0.0, 0.25: 0.002}, grids)


def test_a_plan_is_as_good_as_trying_every_combination(model: Path) -> None:
    """Three matrices may choose, all others have one grid: the best of all combinations within the budget is found."""
    spec = whole_spec(Checkpoint.open(model))
    measured = units(spec)
    free = ["0.mlp.down_proj", "1.self_attn.o_proj", "model.embed_tokens"]
    for key, known in measured.grids.items():
        if key not in free:
            measured.grids[key] = dict.fromkeys(known, 0.0)
    shapes = {"0.mlp.down_proj": linear_shapes(spec, 0)["mlp.down_proj"],
              "1.self_attn.o_proj": linear_shapes(spec, 1)["self_attn.o_proj"],
              "model.embed_tokens": (spec.vocabulary, spec.hidden)}
    least, _ = smallest(spec, model, Measured((), (0.0,), {0.0: 0.0}, measured.grids))
    choices = [[(grid.stored_bytes(*shapes[key]), measured.grids[key][grid.type]) for grid in candidates(shapes[key][1])]
               for key in free]
    smaller = sum(min(size for size, _ in options) for options in choices)
    for budget in range(least, least + 6000, 1500):
        plan = plan_for(Structure(), spec, model, measured, Corrections(), Limits(budget))
        assert plan is not None
        assert plan.bytes <= budget
        best = min(sum(loss for _, loss in combination) for combination in itertools.product(*choices)
                   if sum(size for size, _ in combination) - smaller <= budget - least)
        largest_step = max(abs(a[1] - b[1]) for options in choices for a, b in itertools.pairwise(options))
        assert best - 1e-12 <= plan.grids_loss <= best + largest_step
    assert plan_for(Structure(), spec, model, measured, Corrections(), Limits(least - 1)) is None


def test_smaller_structures_take_over_when_bytes_run_out(model: Path) -> None:
    spec = whole_spec(Checkpoint.open(model))
    measured = units(spec)
    least, structure = smallest(spec, model, measured)
    assert structure == Structure((0, 1), 0.25)

    def best(more: int) -> Plan:
        plans = [plan_for(one, spec, model, measured, Corrections(), Limits(least + more)) for one in structures(measured)]
        return min((plan for plan in plans if plan is not None), key=lambda plan: plan.loss)

    plans = [best(more) for more in (0, 20_000, 150_000)]
    assert plans[0].structure == structure
    assert [plan.loss for plan in plans] == sorted((plan.loss for plan in plans), reverse=True)
    assert plans[2].structure == Structure()


def test_a_limit_of_seconds_is_kept_at_the_least_loss(model: Path) -> None:
    """Against trying every combination of three matrices' grids."""
    spec = whole_spec(Checkpoint.open(model))
    torch.manual_seed(3)
    measured = units(spec)
    measured.seconds.update({"q2_k": 3e-9, "q3_k": 3e-9, "q4_0": 1e-9, "q4_1": 1.2e-9, "q5_0": 2e-9, "q5_1": 2.2e-9,
                             "q8_0": 1.5e-9})
    choices = Choices.of(Structure(), spec, model, measured)
    some = list(choices.sizes)[:3]
    few = replace(choices, fixed=0, sizes={key: choices.sizes[key] for key in some},
                  losses={key: choices.losses[key] for key in some}, seconds={key: choices.seconds[key] for key in some})
    budget = 3 * max(few.sizes[some[0]])
    every = list(itertools.product(*(range(len(few.sizes[key])) for key in some)))
    times = sorted(few.total(few.seconds, dict(zip(some, places, strict=True))) for places in every)
    slack = max(abs(a - b) for key in some for a, b in itertools.pairwise(few.losses[key]))
    for limit in (times[len(times) // 8], times[len(times) // 2]):
        chosen = few.best(Limits(budget, limit))
        assert chosen is not None
        assert few.total(few.seconds, chosen) <= limit
        assert few.total(few.sizes, chosen) <= budget
        found = [few.total(few.losses, one) for one in (dict(zip(some, places, strict=True)) for places in every)
                 if few.total(few.seconds, one) <= limit and few.total(few.sizes, one) <= budget]
        assert few.total(few.losses, chosen) <= min(found) + slack
    assert few.best(Limits(budget, times[0] / 2)) is None


def test_corrections_are_mean_ratios_by_the_logarithm() -> None:
    assert corrected([]) == 1.0
    assert corrected([(1.0, 2.0), (1.0, 8.0)]) == pytest.approx(4.0)
    assert corrected([(0.0, 1.0)]) == 1.0


def test_a_fit_is_within_its_budget_and_measures_what_it_says(model: Path, text: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    least = 64 * 1024 + (model / "tokenizer.json").stat().st_size
    budget = least + 70_000
    found = fit(str(model), Target(budget), tmp_path / "out", settings(text), lines.append)
    assert found.gguf.stat().st_size == found.best.bytes <= budget
    assert found.best.measured == min(one.measured for one in found.rounds)
    assert [one.windows for one in found.rounds] == [4] * (len(found.rounds) - 1) + [16]    # the best, with more text
    assert found.rounds[-1].structure == min(found.rounds[:-1], key=lambda one: one.measured).structure
    told = [one for one in found.rounds if one.structure == found.best.structure and one.windows == 4][-1]
    assert found.holds == (abs(told.predicted - told.measured) <= 0.15 * told.measured)
    content = json.loads((tmp_path / "out" / "fit.json").read_text("utf-8"))
    assert content["best"]["measured"] == found.best.measured
    assert not (tmp_path / "out" / "work").exists()
    held_out = text.read_text("utf-8")[int(len(text.read_text("utf-8")) * (1 - measuring.HELD_OUT)):]
    again = evaluate_perplexity(Checkpoint.open(found.path), held_out, source="again", context=32, limit=8,
                                reference=Checkpoint.open(model))
    assert again.kl == pytest.approx(found.best.measured, rel=1e-4)
    assert math.isclose(found.evaluation["kl"], again.kl, rel_tol=1e-6)
    assert any("round 0" in line and "predicted" in line for line in lines)


def test_the_best_is_not_made_again_where_time_is_short(model: Path, text: Path, tmp_path: Path) -> None:
    budget = 64 * 1024 + (model / "tokenizer.json").stat().st_size + 70_000
    for name, how in (("late", settings(text, minutes=0.0)), ("quick", settings(text, quick=True))):
        found = fit(str(model), Target(budget), tmp_path / name, how, lambda _line: None)
        assert {one.windows for one in found.rounds} == {4}


def test_a_fit_that_cannot_make_more_keeps_the_best(model: Path, text: Path, tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """As where there is no room on the disk for the states of four times the text."""
    made = measuring.Bench.compressed

    def cramped(bench: measuring.Bench, recipe: Any, windows: int | None = None) -> Path:
        if windows == 4 * bench.settings.windows:
            raise ResourceError("no room")
        return made(bench, recipe, windows)

    monkeypatch.setattr(measuring.Bench, "compressed", cramped)
    lines: list[str] = []
    budget = Target(64 * 1024 + (model / "tokenizer.json").stat().st_size + 70_000)
    found = fit(str(model), budget, tmp_path / "out", settings(text), lines.append)
    assert {one.windows for one in found.rounds} == {4}
    assert any("no room; the best so far stays" in line for line in lines)
    assert found.gguf.stat().st_size == found.best.bytes


def test_work_that_was_begun_with_other_texts_is_refused(model: Path, text: Path, tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_args: Any, **_settings: Any) -> Any:
        raise KeyboardInterrupt

    budget = Target(10**6)
    with monkeypatch.context() as patch:
        patch.setattr(measuring.Bench, "measure", stop)
        with pytest.raises(KeyboardInterrupt):
            fit(str(model), budget, tmp_path / "out", settings(text), lambda _line: None)
    other = tmp_path / "other.txt"
    other.write_text(text.read_text("utf-8")[::-1], "utf-8")
    with pytest.raises(ResumeError, match="another texts"):
        fit(str(model), budget, tmp_path / "out", settings(other), lambda _line: None)


def test_texts_to_keep_are_calibrated_on_where_no_other_is_given(model: Path, text: Path, tmp_path: Path) -> None:
    """Nothing is asked of the hub, for the report neither."""
    other = tmp_path / "other.txt"
    other.write_text("Habari ya asubuhi.", "utf-8")
    source = Checkpoint.open(model)
    how = Settings(None, (str(text), str(other)), windows=2, window=32)
    assert measuring.whole_text(source, how) == text.read_text("utf-8") + "\nHabari ya asubuhi."
    assert measuring.whole_text(source, replace(how, calibration=str(other))) == "Habari ya asubuhi."


def test_a_float32_model_keeps_16_bits_where_the_budget_allows(text: Path, tmp_path: Path) -> None:
    """Matrices that no grid is needed for are counted with two bytes a number, and written so."""
    source = build(tmp_path / "model", "llama3", num_hidden_layers=3, intermediate_size=128)
    found = fit(str(source), Target(10**6), tmp_path / "out", settings(text, minutes=0.0), lambda _line: None)
    assert found.gguf.stat().st_size <= 10**6
    types = {tensor.tensor_type.name for tensor in gguf.GGUFReader(found.gguf).tensors if len(tensor.shape) == 2}
    assert "F32" not in types


def test_timing_goes_on_after_a_file_was_left(model: Path, text: Path, tmp_path: Path,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    bench = measuring.Bench(str(model), settings(text), tmp_path, lambda _line: None)
    (tmp_path / "speed.gguf").write_bytes(b"half a file")
    monkeypatch.setattr(measuring, "measure_gguf_speed", lambda _file: SimpleNamespace(decode_tokens_per_s=100.0))
    found = bench._seconds()
    assert "f16" in found
    assert all(seconds > 0 for seconds in found.values())
    assert not (tmp_path / "speed.gguf").exists()


def test_an_interrupted_ranking_leaves_the_next_one_as_it_is(text: Path, tmp_path: Path,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    calls = itertools.count()
    ranked = measuring.leave_one_out_losses

    def stopped(*args: Any) -> Any:
        if next(calls) < 1:
            return ranked(*args)

        def tick(_what: str, share: float) -> None:
            if share > 0.6:
                raise KeyboardInterrupt
        return ranked(*args[:-1], tick)

    larger = build(tmp_path / "larger", "llama3", dtype=torch.bfloat16, num_hidden_layers=5, intermediate_size=128)

    def bench(name: str) -> measuring.Bench:
        (tmp_path / name).mkdir(exist_ok=True)
        return measuring.Bench(str(larger), settings(text), tmp_path / name, lambda _line: None)

    whole = bench("whole")._depth()
    with monkeypatch.context() as patch:
        patch.setattr(measuring, "leave_one_out_losses", stopped)
        with pytest.raises(KeyboardInterrupt):
            bench("cut")._depth()
    assert bench("cut")._depth() == whole


@pytest.mark.slow
def test_fewer_neurons_and_tokens_together_use_their_budget(tmp_path: Path) -> None:
    """What is cut stands in a checkpoint of its own before its grids, with a tokenizer of its own."""
    keep = tmp_path / "keep.txt"
    keep.write_text(world_text(test=False, characters=20_000), "utf-8")
    how = Settings(None, (str(keep),), windows=2, window=64, compared=4, quick=True)
    bench = measuring.Bench("embedded", how, tmp_path / "out" / "work", lambda _line: None)
    bench.work.mkdir(parents=True)
    measured = units(bench.whole)
    measured.vocabulary[bench.most or 0] = 0.0
    target = Target(3_000_000)
    one = fitting._Fit(bench, target, tmp_path / "out")
    structure = Structure((), 1 / 3, bench.most)
    measured.width[1 / 3] = 0.01
    for number in range(2):
        plan = one._plan(structure, measured)
        assert plan is not None
        found, path = one._build(number, plan, measured, 2)
        assert 0.99 * target.bytes < found.bytes <= target.bytes
        assert path.exists()


def test_a_smaller_vocabulary_costs_what_the_text_costs_more(tmp_path: Path) -> None:
    text = tmp_path / "keep.txt"
    text.write_text(world_text(test=False, characters=30_000), "utf-8")
    bench = measuring.Bench("embedded", Settings(None, (str(text),), windows=2, window=128, compared=6), tmp_path / "work",
                            lambda _line: None)
    found = bench._vocabulary()
    assert bench.most == max(found) < 4096
    assert list(found.values()) == sorted(found.values())
    assert len(found) > 2
    nats = []
    for size in found:
        original = bench.original(size).checkpoint
        assert original.spec.vocabulary == size
        one = evaluate_perplexity(original, bench.compared_text, source="again", context=128)
        nats.append(one.loss * one.protocol.predicted_tokens)
    tokens = bench.original(bench.most).tokens
    assert list(found.values()) == pytest.approx([(one - nats[0]) / tokens for one in nats], rel=1e-4)


@pytest.mark.slow
def test_an_interrupted_fit_takes_over_what_was_measured(model: Path, text: Path, tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    budget = Target(64 * 1024 + (model / "tokenizer.json").stat().st_size + 70_000)
    whole = fit(str(model), budget, tmp_path / "whole", settings(text), lambda _line: None)

    def stop(*_args: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fitting._Fit, "_build", stop)
        with pytest.raises(KeyboardInterrupt):
            fit(str(model), budget, tmp_path / "cut", settings(text), lambda _line: None)
    lines: list[str] = []
    found = fit(str(model), budget, tmp_path / "cut", settings(text), lines.append)
    assert lines[0] == "taking over what was measured before"
    assert [one.measured for one in found.rounds] == [one.measured for one in whole.rounds]


def test_budgets_that_cannot_be_met_say_the_smallest_that_can(model: Path, text: Path, tmp_path: Path,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    measured = units(whole_spec(Checkpoint.open(model)))
    monkeypatch.setattr(measuring.Bench, "measure", lambda _bench, speed: (measured, Mixture(0.1, 0.1, 1.0)))
    with pytest.raises(StudyError, match=r"budget is 1 kB, but the smallest that this model can become here takes \d+"):
        fit(str(model), Target(1000), tmp_path / "out", settings(text), lambda _line: None)
    with pytest.raises(StudyError, match="one of them"):
        target_of(100, device=None, size=None, faster_than=None)
    with pytest.raises(StudyError, match="no device 'toaster'"):
        target_of(100, device="toaster", size=None, faster_than=None)
    with pytest.raises(StudyError, match="above 0"):
        target_of(100, device=None, size=5, faster_than=-1)
    siracusa = target_of(100, device="siracusa", size=None, faster_than=None)
    assert siracusa.bytes == 4 * 2**20                  # for weights alone
    assert target_of(100, device="pi4-4gb", size=None, faster_than=None).bytes == 3 * 10**9 - 512 * 100
    (tmp_path / "there" / "model").mkdir(parents=True)
    with pytest.raises(StudyError, match="exists already"):
        fit(str(model), Target(10**6), tmp_path / "there", settings(text), lambda _line: None)


@pytest.mark.slow
def test_a_speed_that_nothing_reaches_is_refused(model: Path, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="xllamacpp is in the extra [llama]")
    with pytest.raises(StudyError, match=r"tokens a second here|smallest"):
        fit(str(model), Target(10**6, faster_than=1e9), tmp_path / "out", settings(text), lambda _line: None)
