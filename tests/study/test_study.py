"""Studies on a tiny model: every trial once, failures kept, interruptions without a trace, halving, Optuna's samplers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from tsotsallm.api.study import StudyOptions
from tsotsallm.compression import plan
from tsotsallm.errors import ResumeError, StudyError, TaskError, TsotsallmError
from tsotsallm.evaluation.examination import examine
from tsotsallm.recipe import Recipe
from tsotsallm.store import key_of
from tsotsallm.study import study as studies
from tsotsallm.study import trial as trials
from tsotsallm.study import workers
from tsotsallm.study.forecast import forecast_study
from tsotsallm.study.ledger import Ledger, Trial
from tsotsallm.study.spec import Spec, spec_from
from tsotsallm.study.study import Found, ledger_json, open_study, run_study
from tsotsallm.study.trial import Outcome, Setup, TrialJob, execute, may_reach_the_front
from tsotsallm.study.verdict import approach_of, verdict_lines, verdicts

SPACE = {"stages": [{"depth": {"remove": {"one_of": [0, 1]}, "importance": "cosine", "protect": {}}},
                    {"quantize": {"method": "rtn", "bits": {"one_of": [3, 8]}, "group": "channel"}}]}


def spec_of(text: Path, **more: Any) -> Spec:
    return spec_from("test", {**SPACE, "calibration": {"source": str(text), "windows": 2, "window": 32}, "cycle": 3,
                              "evaluation": {"text": str(text), "context": 32, "cheap": 2, "full": 6}, **more}, layers=3)


def test_every_recipe_is_tried_and_the_best_are_on_the_front(tiny: Path, text: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    found = run_study(spec_of(text), str(tiny), tmp_path / "study", say=lines.append)
    assert [trial.status for trial in found.trials] == ["done"] * 4
    assert len(lines) == 4
    by_bytes = {trial.number: trial.measures["model"]["bytes"] for trial in found.trials}
    assert by_bytes[1] == max(by_bytes.values())                # all layers, 8 bits
    assert {trial.level for trial in found.trials} <= {"cheap", "full"}
    assert 1 in {trial.number for trial in found.front}
    assert found.hypervolume > 0
    assert found == open_study(tmp_path / "study")
    notes = Ledger(tmp_path / "study").notes()
    assert [(note["cycle"], note["phase"]) for note in notes][:4] == [
        (0, "plan"), (0, "implement"), (0, "revise"), (0, "re-implement")]
    assert (tmp_path / "study" / "work" / "store").exists()
    assert not list((tmp_path / "study" / "work" / "models").iterdir())


def test_a_trial_that_fails_is_told_and_the_others_go_on(tiny: Path, text: Path, tmp_path: Path) -> None:
    spec = spec_of(text)
    recipes = {"too deep": [{"depth": {"remove": 9}}], "fine": ["rtn:8:channel"]}
    spec = spec_from("test", {key: value for key, value in spec.content.items() if key != "stages"} | {"recipes": recipes},
                     layers=3)
    found = run_study(spec, str(tiny), tmp_path / "study")
    assert [trial.status for trial in found.trials] == ["failed", "done"]
    assert "depth removes 9" in found.trials[0].error


def test_a_task_that_there_is_not_is_refused_before_the_first_trial(tiny: Path, text: Path, tmp_path: Path) -> None:
    spec = spec_of(text, evaluation={"text": str(text), "context": 32, "cheap": 2, "full": 6, "tasks": ["no-such-task"]})
    with pytest.raises(TaskError, match="no-such-task"):
        run_study(spec, str(tiny), tmp_path / "study")
    assert not (tmp_path / "study").exists()


def test_a_study_may_go_on_on_another_device_and_for_longer(tiny: Path, text: Path, tmp_path: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    """Where and how long it computes is no part of what is studied; every trial notes its device."""
    def here(setup: Setup, job: TrialJob, work: Path) -> Outcome:
        outcome = execute(replace(setup, device="cpu"), job, work)
        outcome.facts["setup"] = setup.plain()
        return outcome

    monkeypatch.setattr(studies, "check_device", lambda device: device)
    monkeypatch.setattr(workers, "execute", here)
    assert not run_study(spec_of(text, hours=1e-9), str(tiny), tmp_path / "study").trials
    found = run_study(spec_of(text, hours=1.0), str(tiny), tmp_path / "study", device="cuda")
    assert [trial.facts["setup"]["device"] for trial in found.trials] == ["cuda"] * 4


def test_a_device_that_there_is_not_is_refused(tiny: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(TsotsallmError, match="no device 'cuda:99'"):
        run_study(spec_of(text), str(tiny), tmp_path / "study", device="cuda:99")


def test_tasks_are_compared_with_the_original_on_the_same_items(tiny: Path, text: Path, tmp_path: Path) -> None:
    task, items = tmp_path / "shops.yaml", tmp_path / "items.csv"
    task.write_text("kind: choices\nlayouts: [{prompt: '{{question}}', choices: '[right, wrong]', answer: 0}]\n")
    words = sorted(set(re.findall(r"[a-z]{3,9}", text.read_text())))[:40]
    items.write_text("question,right,wrong\n" + "".join(
        f"What comes after {one}?, {two}, {three}\n" for one, two, three in zip(words, words[7:], words[19:], strict=False)))
    content = {"recipes": {"coarse": ["rtn:2:channel"]},
               "calibration": {"windows": 2, "window": 32}, "evaluation": {"context": 32, "cheap": None, "full": 6}}
    options = StudyOptions(text=text, calibration=text, tasks=[str(task)], data=items, limit=18)
    found = run_study(spec_from("test", options.amend(content), layers=3), str(tiny), tmp_path / "study")
    full = found.trials[0].measures["full"]
    [[original]] = examine([tiny], [str(task)], data=items, limit=18).results
    assert full[f"{task}_difference"] == pytest.approx(full[str(task)] - original.scores[0].value)
    assert full[f"{task}_low"] <= full[f"{task}_difference"] <= full[f"{task}_high"]
    assert full[f"{task}_low"] < full[f"{task}_high"]
    assert 0 < full["kl_median"] <= full["kl_99"] <= full["kl_999"]


class Stopped(KeyboardInterrupt):
    """What a test raises in the middle of a trial."""


def test_a_study_stopped_three_times_has_the_same_ledger(tiny: Path, text: Path, tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    run_study(spec_of(text), str(tiny), tmp_path / "whole")
    real, left = trials.evaluate_perplexity, [0, 2, 3]       # evaluations until the next stop

    def stopping(*args: Any, **settings: Any) -> Any:
        if left and left[0] == 0:
            left.pop(0)
            raise Stopped
        if left:
            left[0] -= 1
        return real(*args, **settings)

    monkeypatch.setattr(trials, "evaluate_perplexity", stopping)
    for _ in range(3):
        with pytest.raises(Stopped):
            run_study(spec_of(text), str(tiny), tmp_path / "cut")
    run_study(spec_of(text), str(tiny), tmp_path / "cut")
    assert ledger_json(tmp_path / "cut", repeatable=True) == ledger_json(tmp_path / "whole", repeatable=True)


@pytest.mark.parametrize("strategy", ["tpe", "nsga2", "random"])
def test_strategies_propose_the_same_after_a_stop(tiny: Path, text: Path, tmp_path: Path, strategy: str) -> None:
    if strategy != "random":
        pytest.importorskip("optuna", reason="optuna is in the extra [study]")
    spec = spec_of(text, strategy=strategy, trials=4, seed=3, stages=[
        {"quantize": {"method": "rtn", "bits": {"from": 2, "to": 8}, "group": {"one_of": ["channel", 32]}}}])
    whole = run_study(spec, str(tiny), tmp_path / "whole")
    half = spec_of(text, strategy=strategy, trials=2, seed=3, stages=spec.content["stages"])
    run_study(half, str(tiny), tmp_path / "cut")
    ledger = Ledger(tmp_path / "cut")
    study = ledger.study()
    assert study is not None
    ledger._base.execute("UPDATE study SET content = ?", [json.dumps(study | {"spec": spec.content})])
    ledger.close()
    found = run_study(spec, str(tiny), tmp_path / "cut")
    assert [trial.key for trial in found.trials] == [trial.key for trial in whole.trials]
    assert len({trial.key for trial in found.trials}) == 4
    if strategy != "random":
        assert (tmp_path / "whole" / "optuna.sqlite").exists()


@pytest.mark.parametrize("name", ["50% off", "a%20b", "100%", "a#b", "a?b=c&d", "{x} {{y}}", "日本é", "a'b;c:d@e", "%s+"])
def test_a_study_lies_in_a_folder_of_any_name(tmp_path: Path, name: str) -> None:
    """Optuna and its storage take the file's name as a part of a URL and of a template."""
    optuna = pytest.importorskip("optuna", reason="optuna is in the extra [study]")
    from tsotsallm.study.strategies import _address

    folder = tmp_path / name
    ledger = Ledger(folder)
    ledger.begin({"model": "m"})
    ledger.close()
    storage = _address(folder / "optuna.sqlite")
    optuna.create_study(study_name="test", storage=storage)
    assert [one.study_name for one in optuna.get_all_study_summaries(storage)] == ["test"]
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        name, f"{name}/ledger.sqlite", f"{name}/optuna.sqlite", f"{name}/trials.jsonl"]


def test_a_study_runs_and_is_reported_in_such_a_folder(tiny: Path, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("optuna", reason="optuna is in the extra [study]")
    folder = tmp_path / "50%20 {of} #1?"
    spec = spec_of(text, strategy="tpe", trials=2, seed=3, stages=[
        {"quantize": {"method": "rtn", "bits": {"from": 2, "to": 8}, "group": "channel"}}])
    found = run_study(spec, str(tiny), folder)
    assert [trial.status for trial in found.trials] == ["done"] * 2
    assert open_study(folder) == found
    assert (folder / "optuna.sqlite").exists()


def test_halving_gives_the_better_ones_more_text(tiny: Path, text: Path, tmp_path: Path) -> None:
    spec = spec_of(text, strategy="halving", trials=4, size_limit="1GB")
    found = run_study(spec, str(tiny), tmp_path / "study")
    full = [trial for trial in found.trials if "full" in trial.measures]
    assert len(full) == 2
    cheap = sorted(trial.measures["cheap"]["kl"] for trial in found.trials)
    assert sorted(trial.measures["cheap"]["kl"] for trial in full) == cheap[:2]
    assert not list((tmp_path / "study" / "work" / "models").iterdir())
    with pytest.raises(StudyError, match="within size_limit"):
        run_study(spec_of(text, strategy="halving", trials=2, size_limit="1kB"), str(tiny), tmp_path / "none")


@pytest.mark.parametrize("cheap", [None, 6])
def test_halving_without_a_cheap_evaluation_evaluates_fully(tiny: Path, text: Path, tmp_path: Path,
                                                            cheap: int | None) -> None:
    evaluation = {"text": str(text), "context": 32, "cheap": cheap, "full": 6}
    found = run_study(spec_of(text, strategy="halving", trials=2, size_limit="1GB", evaluation=evaluation), str(tiny),
                      tmp_path / "study")
    assert [trial.level for trial in found.trials] == ["full", "full"]
    assert found.front


def test_one_process_at_a_time(tiny: Path, text: Path, tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE) as other:
        (tmp_path / "lock").write_text(json.dumps([other.pid, psutil.Process(other.pid).create_time()]))
        with pytest.raises(ResumeError, match=f"process {other.pid} is working on"):
            run_study(spec_of(text), str(tiny), tmp_path)
        other.communicate()
    assert run_study(spec_of(text, trials=1), str(tiny), tmp_path).trials       # its holder is gone


def test_what_lies_surely_behind_the_front_is_not_evaluated_fully() -> None:
    known = [(0.1, 100.0), (0.5, 50.0)]
    assert may_reach_the_front(0.2, 0.0, 60.0, known)
    assert not may_reach_the_front(0.2, 0.04, 100.0, known)
    assert may_reach_the_front(0.2, 0.06, 100.0, known)
    assert not may_reach_the_front(0.6, 0.01, 55.0, known)


def test_groups_are_written_out_for_the_model_and_trials_are_still_known(tiny: Path, text: Path, tmp_path: Path) -> None:
    """The recipe of a trial is the one that ran; what tells trials apart is the recipe as the spec has it."""
    recipes = {"short": ["rtn:4"], "group": ["rtn:4:32"], "too wide": ["rtn:4:128"], "too deep": [{"depth": {"remove": 9}}]}
    spec = spec_from("test", {"recipes": recipes, "calibration": {"source": str(text)}, "evaluation": {
        "text": str(text), "context": 32, "cheap": None, "full": 2}}, layers=4)
    found = run_study(spec, str(tiny), tmp_path / "study")
    assert [trial.status for trial in found.trials] == ["done", "done", "failed", "failed"]
    assert [trial.recipe[0].get("quantize", {}).get("group") for trial in found.trials] == [32, 32, 128, None]
    assert found.trials[0].key == key_of(Recipe.parse("rtn:4").plain()) != found.trials[1].key
    assert found.trials[0].facts["hashes"] == found.trials[1].facts["hashes"]
    assert run_study(spec, str(tiny), tmp_path / "study").trials == found.trials


def test_another_spec_in_the_same_folder_is_refused(tiny: Path, text: Path, tmp_path: Path) -> None:
    run_study(spec_of(text, trials=1), str(tiny), tmp_path / "study")
    with pytest.raises(StudyError, match=r"\(spec.trials: 1 then, 2 now\)"):
        run_study(spec_of(text, trials=2), str(tiny), tmp_path / "study")
    with pytest.raises(StudyError, match="holds no study"):
        open_study(tmp_path / "nothing")


def test_the_verdict_names_the_best_of_a_size_and_how_sure_that_is(tiny: Path, text: Path, tmp_path: Path) -> None:
    full = spec_of(text, evaluation={"text": str(text), "context": 32, "cheap": None, "full": 6})
    found: Found = run_study(full, str(tiny), tmp_path / "study")
    best = verdicts(found.trials)
    assert best[-1].trial.number == 1
    assert approach_of(found.trials[2]) == "depth + quantize rtn 3 bits"
    for one in best:
        same = [trial for trial in found.trials if one.smallest <= trial.measures["model"]["bytes"] <= one.largest]
        assert one.trial.measures["full"]["kl"] == min(trial.measures["full"]["kl"] for trial in same)
    lines = verdict_lines(found.trials)
    assert sum(not line.startswith(" ") for line in lines) == len(best)
    assert not any("|" in line for line in lines)


def trial_of(number: int, bits: int, size: float, kl: float) -> Trial:
    return Trial(number, str(number), f"t{number}", [{"quantize": {"method": "rtn", "grid": "int", "bits": bits}}], {}, "",
                 status="done", measures={"model": {"bytes": size},
                                          "full": {"kl": kl, "kl_error": kl / 100, "perplexity": 3.0}})


def test_no_recipe_is_best_where_a_smaller_one_loses_less() -> None:
    trials = [trial_of(0, 4, 1e6, 0.0095), trial_of(1, 5, 2e6, 0.049), trial_of(2, 6, 3e6, 0.06), trial_of(3, 8, 5e6, 0.001)]
    best = verdicts(trials)
    assert [one.trial.number for one in best] == [0, 3]
    assert (best[0].smallest, best[0].largest) == (1e6, 3e6)
    assert best[0].rival == trials[1]


def test_a_forecast_counts_common_passes_once(tiny: Path, text: Path, tmp_path: Path) -> None:
    """By hand: the two trainings are each made once, the four roundings after them once each."""
    learned = {rank: [{"adapt": {"rank": rank, "steps": 2, "batch": 2, "window": 32}}] for rank in (2, 4)}
    recipes: dict[str, Any] = {f"{rank}-{bits}": [*learned[rank], f"rtn:{bits}:channel"]
                               for rank in learned for bits in (4, 8)}
    content = {"recipes": recipes | {"too deep": [{"depth": {"remove": 9}}]},
               "calibration": {"source": str(text), "windows": 2, "window": 32},
               "evaluation": {"text": str(text), "context": 32, "cheap": None, "full": 6}}
    found = forecast_study(spec_from("test", content, layers=3), str(tiny), tmp_path / "study")
    alone = {name: plan(tiny, recipe, calibration=text, windows=2, window=32) for name, recipe in recipes.items()}
    apart = sum(one.expected_s for one in alone.values())
    assert {len(one.sweeps) for one in alone.values()} == {2}
    twice = sum(alone[f"{rank}-4"].sweeps[0].expected_s for rank in learned)
    assert found.recipes == 4
    assert found.apart_s == pytest.approx(apart, rel=0.01)
    assert found.made_s == pytest.approx(apart - twice, rel=0.01)
    assert found.longest[1] == pytest.approx(max(one.expected_s for one in alone.values()), rel=0.01)
    assert found.ram_bytes >= max(one.ram_bytes for one in alone.values()) * 0.9
    assert found.evaluated_s > 0
    assert found.tasks_s == 0
    assert "depth removes 9" in found.impossible["too deep"]
    with pytest.raises(StudyError, match="draws recipes one after another"):
        forecast_study(spec_from("test", content | {"strategy": "random", "trials": 2}, layers=3), str(tiny), tmp_path)
