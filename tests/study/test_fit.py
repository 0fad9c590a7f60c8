"""The best model for a budget: never over it, predicted against measured, budgets that cannot be met."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from tests.conftest import build
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.checkpoint.shapes import linear_shapes
from tsotsallm.errors import CorpusError, ResourceError, ResumeError, StudyError
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


def stop(*_args: Any, **_settings: Any) -> Any:
    raise KeyboardInterrupt


def begun(model: Path, out: Path, how: Settings) -> None:
    """A fit that was stopped before it measured anything."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring.Bench, "measure", stop)
        with pytest.raises(KeyboardInterrupt):
            fit(str(model), Target(10**6), out, how, lambda _line: None)


def test_work_that_was_begun_otherwise_is_refused_with_both_values(model: Path, text: Path, tmp_path: Path) -> None:
    begun(model, tmp_path / "out", settings(text))
    other, same_name = tmp_path / "other.txt", tmp_path / text.name
    other.write_text(text.read_text("utf-8")[::-1], "utf-8")
    shutil.copy(text, same_name)
    second = build(tmp_path / "second", "llama3", dtype=torch.bfloat16, num_hidden_layers=3, intermediate_size=128, seed=5)
    length = len(text.read_text("utf-8"))
    for source, how, changed in (
            (model, replace(settings(text), windows=2), "windows: 4 then, 2 now"),
            (model, replace(settings(text), window=16, seed=7), r"window: 32 then, 16 now; seed: 0 then, 7 now"),
            (model, replace(settings(text), compared=5), "compared: 8 then, 5 now"),
            (model, settings(other), rf"texts: {text} \({length} characters\) then, {other} \({length} characters\) now"),
            (model, replace(settings(text), keep_text=(str(text),)), f"texts to keep: none then, {text} now"),
            (second, settings(text), f"model: {model} then, {second} now")):
        with pytest.raises(ResumeError, match=rf"holds unfinished work that was started with other inputs \(.*{changed}.*\);"
                                              " finish it with those, or delete it and start again with --restart"):
            fit(str(source), Target(10**6), tmp_path / "out", how, lambda _line: None)
    begun(model, tmp_path / "named", settings(same_name))
    same_name.write_text(text.read_text("utf-8")[::-1], "utf-8")
    with pytest.raises(ResumeError, match=rf"\(texts: {same_name} \({length} characters\), changed since\)"):
        fit(str(model), Target(10**6), tmp_path / "named", settings(same_name), lambda _line: None)


@pytest.mark.parametrize("steps", [2, 40, pytest.param(150, marks=pytest.mark.slow)])
def test_restart_begins_again_with_other_options(model: Path, text: Path, tmp_path: Path, steps: int) -> None:
    """Whatever a fit had measured and built until it was stopped goes."""
    count = itertools.count()

    def after(_now: Any) -> None:
        if next(count) == steps:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(str(model), Target(10**6), tmp_path / "out", settings(text), lambda _line: None, after)
    work = tmp_path / "out" / "work"
    before = {path.name for path in work.iterdir()}
    assert {"run.json", "models", "store"} <= before
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring.Bench, "measure", stop)
        with pytest.raises(KeyboardInterrupt):
            fit(str(model), Target(10**6), tmp_path / "out", replace(settings(text), windows=2), restart=True)
    assert [path.name for path in work.iterdir()] == ["run.json"]
    assert json.loads((work / "run.json").read_text("utf-8"))["windows"] == 2


def test_restart_deletes_nothing_that_is_not_a_fits(model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    work = out / "work"

    def refused(message: str, *, restart: bool = True) -> None:
        before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        with pytest.raises(ResumeError, match=message):
            fit(str(model), Target(10**6), out, settings(text), restart=restart)
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before

    work.mkdir(parents=True)
    (work / "thesis.txt").write_text("years")
    for restart in (True, False):           # a folder of that name would be deleted when a fit is done
        refused(r"work exists and is not unfinished work \(it holds thesis.txt, but no run.json\)", restart=restart)
    (work / "run.json").write_text('{"source": {}, "recipe": [], "corpus": null, "machine": {}}')      # a compression's
    refused("not recognised as unfinished work of fit, so --restart deletes nothing")
    shutil.rmtree(out)
    begun(model, out, settings(text))
    (work / "thesis.txt").write_text("years")
    refused("holds thesis.txt beside the unfinished work of fit")
    (work / "thesis.txt").unlink()
    (work / "lock").write_text(json.dumps([os.getppid(), psutil.Process(os.getppid()).create_time()]))
    refused("is working on")
    (work / "lock").unlink()
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "data").write_text("kept")
    (work / "models").symlink_to(precious, target_is_directory=True)
    real = tmp_path / "real"
    work.rename(real)
    work.symlink_to(real, target_is_directory=True)
    refused("not recognised as unfinished work of fit")
    work.unlink()
    real.rename(work)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring.Bench, "measure", stop)
        with pytest.raises(KeyboardInterrupt):
            fit(str(model), Target(10**6), out, settings(text), restart=True)
    assert not (work / "models").exists()
    assert (precious / "data").read_text() == "kept"


def test_a_finished_fit_is_not_restarted(model: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "model").mkdir(parents=True)
    with pytest.raises(StudyError, match="exists already"):
        fit(str(model), Target(10**6), tmp_path / "out", settings(text), restart=True)
    assert (tmp_path / "out" / "model").exists()


def test_a_fit_without_text_says_what_to_give(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CorpusError, match=r"^calibration text is needed, and none is given; with a text of your own: "
                                          r"--calibration FILE or DIR, .*; with allenai/c4 from the hub: "):
        fit(str(model), Target(10**6), tmp_path / "out", Settings(windows=2, window=32))
    assert not (tmp_path / "out").exists()


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
