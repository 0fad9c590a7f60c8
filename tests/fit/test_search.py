"""The best model for a budget: never over it, predicted against measured, budgets that cannot be met."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from tests.conftest import build
from tests.fit.parts import settings, units
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.errors import CorpusError, ExportError, ResourceError, ResumeError, StudyError
from tsotsallm.evaluation.perplexity import evaluate_perplexity
from tsotsallm.fit import search as fitting
from tsotsallm.fit import units as measuring
from tsotsallm.fit.deadline import Deadline, TimeUp
from tsotsallm.fit.files import Files, Structure
from tsotsallm.fit.notes import Mixture
from tsotsallm.fit.plans import Choices
from tsotsallm.fit.reach import Settings, files_of, least
from tsotsallm.fit.search import fit
from tsotsallm.fit.target import Target
from tsotsallm.fit.vocabularies import Vocabularies
from tsotsallm.lab.texts import world_text
from tsotsallm.planning import whole_spec

gguf = pytest.importorskip("gguf", reason="gguf is in the extra [gguf]")


def test_a_fit_is_within_its_budget_and_measures_what_it_says(model: Path, text: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    budget = 64 * 1024 + (model / "tokenizer.json").stat().st_size + 70_000
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
    assert found.in_llama is not None       # activations rounded to 8 bits move it a little
    assert found.evaluation["kl"] < found.in_llama["kl"] < found.evaluation["kl"] + 0.002
    assert found.in_llama["protocol"]["tokens_sha256"] == found.evaluation["protocol"]["tokens_sha256"]
    assert any("round 0" in line and "predicted" in line for line in lines)
    largest = max(one.bytes for one in found.rounds)
    assert largest > 0.98 * budget          # a small file is used up to one step of a small matrix


def test_a_tokenizer_that_no_file_can_hold_is_refused_before_anything_is_measured(text: Path, tmp_path: Path) -> None:
    source = build(tmp_path / "model", "llama3", num_hidden_layers=3, intermediate_size=128)
    content = json.loads((source / "tokenizer.json").read_text("utf-8"))
    content["model"]["merges"] = []
    (source / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    with pytest.raises(ExportError, match="without merges"):
        fit(str(source), Target(10**6), tmp_path / "out", settings(text), pytest.fail)


def test_the_best_learns_its_scales_where_minutes_are_left(model: Path, text: Path, tmp_path: Path) -> None:
    budget = 64 * 1024 + (model / "tokenizer.json").stat().st_size + 45_000
    stage: dict[str, Any] = {"tune": {"steps": 12, "batch": 2, "window": 32, "learning_rate": 0.01}}
    lines: list[str] = []
    found = fit(str(model), Target(budget), tmp_path / "out", settings(text, tune=stage, quick=True), lines.append)
    *before, tuned = found.rounds
    assert tuned.tuned
    assert not any(one.tuned for one in before)
    assert tuned.predicted == min(one.measured for one in before)
    assert tuned.recipe[-1] == stage
    assert 0 < tuned.bytes - min(before, key=lambda one: one.measured).bytes < 1024        # the recipe in the header
    assert found.best.measured == min(one.measured for one in found.rounds)
    assert found.gguf.stat().st_size == found.best.bytes <= budget
    assert any("tuning the best candidate" in line for line in lines)


def test_tuning_is_left_out_where_time_is_short(model: Path, text: Path, tmp_path: Path) -> None:
    budget = 64 * 1024 + (model / "tokenizer.json").stat().st_size + 70_000
    lines: list[str] = []
    long: dict[str, Any] = {"tune": {"steps": 10 ** 9}}
    found = fit(str(model), Target(budget), tmp_path / "out", settings(text, tune=long, quick=True), lines.append)
    assert not any(one.tuned for one in found.rounds)
    assert any("tuning is left out" in line for line in lines)


def test_the_best_is_not_made_again_where_time_is_short(model: Path, text: Path, tmp_path: Path) -> None:
    budget = 64 * 1024 + (model / "tokenizer.json").stat().st_size + 70_000
    found = fit(str(model), Target(budget), tmp_path / "quick", settings(text, quick=True), lambda _line: None)
    assert {one.windows for one in found.rounds} == {4}


def up_after(lines: list[str], begins: str) -> type[Deadline]:
    """A deadline that passes once a line was said."""
    class Passing(Deadline):
        def check(self) -> None:
            if any(line.startswith(begins) for line in lines):
                raise TimeUp

    return Passing


def test_what_is_going_on_when_the_time_is_up_stops_and_the_best_stays(model: Path, text: Path, tmp_path: Path,
                                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(measuring, "Deadline", up_after(lines, "round 0"))
    monkeypatch.setattr(fitting, "unsure", lambda _pairs: 100.0)        # another candidate is always worth building
    budget = Target(64 * 1024 + (model / "tokenizer.json").stat().st_size + 70_000)
    found = fit(str(model), budget, tmp_path / "out", settings(text, quick=True), lines.append)
    assert len(found.rounds) == 1
    assert lines[-2:] == ["the time is up: the best so far is the result",
                          "the search is over: the result is compared with the original and timed"]
    assert found.gguf.stat().st_size == found.best.bytes <= budget.bytes


def test_where_no_candidate_is_finished_in_time_the_work_stays(model: Path, text: Path, tmp_path: Path,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    work = tmp_path / "out" / "work"
    with monkeypatch.context() as patch:
        patch.setattr(measuring, "Deadline", up_after(lines, "without layers"))
        with pytest.raises(StudyError, match=rf"the 1 minute was over before a candidate was finished \(at: .*\); .*"
                                             rf"kept in {work}: .* more minutes resumes, and needs at least 1 more"):
            fit(str(model), Target(10**6), tmp_path / "out", settings(text, minutes=1.0), lines.append)
    [gone] = json.loads((work / "units-depth.json").read_text("utf-8"))["gone"]
    assert lines[-1].startswith(f"without layers {gone}:")

    def never(*_args: Any) -> Any:
        raise AssertionError("what was measured is measured again")

    monkeypatch.setattr(measuring, "leave_one_out_losses", never)       # of three layers one can go, which is known
    monkeypatch.setattr(measuring.Bench, "_grids", stop)
    with pytest.raises(KeyboardInterrupt):
        fit(str(model), Target(10**6), tmp_path / "out", settings(text, minutes=2.0), lines.append)


def test_units_are_measured_only_as_far_as_a_late_fit_needs(model: Path, text: Path, tmp_path: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring.Deadline, "beyond", lambda _self, _share: True)
    (tmp_path / "work").mkdir()
    bench = measuring.Bench(str(model), settings(text), tmp_path / "work", lambda _line: None, budget=10**6)
    assert bench._depth() == ({}, (), (0.0,))
    assert bench._width(0) == {0.0: 0.0}
    bench.budget = least(bench.files, bench.vocabularies).smallest
    assert len(bench._depth()[1]) == 1


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


def test_work_that_was_begun_otherwise_is_refused_with_both_values(model: Path, text: Path, tmp_path: Path,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring.Bench, "_require_possible", lambda _bench: None)      # no file holds what this text keeps
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
                                              " finish it with those, or delete it and start again with restart=True"):
            fit(str(source), Target(10**6), tmp_path / "out", how, lambda _line: None)
    begun(model, tmp_path / "named", settings(same_name))
    same_name.write_text(text.read_text("utf-8")[::-1], "utf-8")
    with pytest.raises(ResumeError, match=rf"\(texts: {same_name} \({length} characters\), changed since\)"):
        fit(str(model), Target(10**6), tmp_path / "named", settings(same_name), lambda _line: None)


@pytest.mark.parametrize("steps", [2, 40, pytest.param(100, marks=pytest.mark.slow)])
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
    assert "run.json" in before
    assert steps == 2 or {"models", "store"} & before
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
    refused("not recognised as unfinished work of fit, so restart=True deletes nothing")
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
    with pytest.raises(StudyError, match="is a model itself"):
        fit(str(model), Target(10**6), model, settings(text))
    assert not (model / "work").exists()


def test_a_fit_without_text_says_what_to_give(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CorpusError, match=r"^calibration text is needed, and none is given; with a text of your own: "
                                          r"calibration=FILE or DIR, .*; with allenai/c4 from the hub: "):
        fit(str(model), Target(10**6), tmp_path / "out", Settings(windows=2, window=32))
    assert not (tmp_path / "out").exists()


def test_a_float32_model_keeps_16_bits_where_the_budget_allows(text: Path, tmp_path: Path,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices that no grid is needed for are counted with two bytes a number, and written so."""
    source = build(tmp_path / "model", "llama3", num_hidden_layers=3, intermediate_size=128)
    monkeypatch.setattr(fitting, "MOST_ROUNDS", 1)
    found = fit(str(source), Target(10**6), tmp_path / "out", settings(text, quick=True), lambda _line: None)
    assert found.gguf.stat().st_size <= 10**6
    types = {tensor.tensor_type.name for tensor in gguf.GGUFReader(found.gguf).tensors if len(tensor.shape) == 2}
    assert "F32" not in types


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
        plan = one._plan(Choices.of(structure, bench.files, measured), measured)
        assert plan is not None
        found, path = one._build(number, plan, measured, 2)
        assert 0.995 * target.bytes < found.bytes <= target.bytes
        assert path.exists()


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


def _parts(model: Path) -> tuple[Files, Vocabularies]:
    vocabularies = Vocabularies(Checkpoint.open(model), ())
    return files_of(str(model), vocabularies, Settings()), vocabularies


def test_budgets_that_cannot_be_met_say_the_smallest_that_can(model: Path, text: Path, tmp_path: Path,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    measured = units(whole_spec(Checkpoint.open(model)))
    monkeypatch.setattr(measuring.Bench, "measure", lambda _bench, speed: (measured, Mixture(0.1, 0.1, 1.0)))
    sizes = []
    for budget in (1000, least(*_parts(model)).smallest - 1):     # before any text is read, and with units known
        with pytest.raises(StudyError, match=r"the smallest that this model can become here takes ([\d.]+ kB)") as refused:
            fit(str(model), Target(budget), tmp_path / "out", settings(tmp_path / "no such text"), lambda _line: None)
        sizes.append(re.findall(r"takes ([\d.]+ kB)", str(refused.value)))
    assert sizes[0] == sizes[1]
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(measuring, "least", lambda *_: SimpleNamespace(smallest=0))
    with pytest.raises(StudyError, match=r"budget is 1 kB, but the smallest that this model can become here takes \d+"):
        fit(str(model), Target(1000), tmp_path / "out", settings(text), lambda _line: None)
    (tmp_path / "there" / "model").mkdir(parents=True)
    with pytest.raises(StudyError, match="exists already"):
        fit(str(model), Target(10**6), tmp_path / "there", settings(text), lambda _line: None)


@pytest.mark.slow
def test_a_speed_that_nothing_reaches_is_refused(model: Path, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="xllamacpp is in the extra [llama]")
    with pytest.raises(StudyError, match=r"tokens a second here|smallest"):
        fit(str(model), Target(10**6, faster_than=1e9), tmp_path / "out", settings(text), lambda _line: None)
