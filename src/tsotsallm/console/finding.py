"""Fits and studies on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tsotsallm.console.lines import table
from tsotsallm.console.measuring import print_examination

if TYPE_CHECKING:
    from tsotsallm.evaluation.examination import Examination
    from tsotsallm.study.fit import Fitted
    from tsotsallm.study.ledger import Trial
    from tsotsallm.study.study import Found


def print_fit(found: Fitted, answers: Examination | None) -> None:
    from tsotsallm.units import human_bytes, human_seconds

    table("Rounds", ["round", "structure", "windows", "predicted KL", "measured KL", "file", "tokens/s"], [
        [str(one.number), one.structure, str(one.windows), f"{one.predicted:.4f}", f"{one.measured:.4f} ± {one.error:.4f}",
         human_bytes(one.bytes), "" if one.decode_tokens_per_s is None else f"{one.decode_tokens_per_s:.1f}"]
        for one in found.rounds])
    best = found.best
    print(f"best    round {best.number}: {best.structure}; KL {best.measured:.4f} ± {best.error:.4f}, perplexity "
          f"{found.evaluation['perplexity']:.4f} (original {found.evaluation['reference_perplexity']:.4f}) on held-out "
          "text")
    print(f"file    {human_bytes(found.best.bytes)} of {human_bytes(found.target.bytes)}; the prediction "
          f"{'holds' if found.holds else 'does not hold'}; took {human_seconds(found.seconds)}")
    print(f"model   {found.path}\ngguf    {found.gguf}")
    if (report := found.path.parent / "report.html").exists():
        print(f"report  {report}")
    if answers is not None:
        print_examination(answers, groups=False)


def print_study(found: Found) -> None:
    from tsotsallm.study.verdict import size_of, verdict_markdown
    from tsotsallm.units import human_bytes

    best = {trial.number for trial in found.front}
    rows = []
    for trial in found.trials:
        measured = trial.measures.get(trial.level, {})
        rows.append([f"{trial.number:3} {trial.name}{' *' if trial.number in best else ''}", trial.status,
                     f"{measured['kl']:.4f} ± {measured['kl_error']:.4f}" if measured else trial.error,
                     f"{measured['perplexity']:.3f}" if measured else "",
                     human_bytes(trial.measures["model"]["bytes"]) if "model" in trial.measures else "", trial.level])
    table("Trials (* on the front)", ["trial", "status", "KL", "perplexity", "bytes", "evaluation"], rows)
    print(f"hypervolume {found.hypervolume:.6g} up to {', '.join(f'{one:.4g}' for one in found.reference)}")
    print(verdict_markdown(found.trials, size_of(found.objectives)))
    print(f"ledger  {found.folder}")
    if (report := found.folder / "report.html").exists():
        print(f"report  {report}")


def print_trials(trials: list[Trial]) -> None:
    import json

    rows = [["recipe", *("\n".join(json.dumps(stage) for stage in trial.recipe) for trial in trials)],
            ["reason", *(trial.reason for trial in trials)], ["status", *(trial.error or trial.status for trial in trials)]]
    for level in ("model", "cheap", "full"):
        names = sorted({name for trial in trials for name in trial.measures.get(level, {})})
        rows += [[f"{level} {name}", *(_told(trial.measures.get(level, {}).get(name)) for trial in trials)]
                 for name in names]
    rows += [[name, *(_told(trial.facts.get(name)) for trial in trials)] for name in ("seconds", "energy_wh", "reused")]
    table("Trials", ["", *(f"{trial.number}: {trial.name}" for trial in trials)], rows)


def _told(value: Any) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def print_notebook(notes: list[dict[str, Any]]) -> None:
    cycle = None
    for note in notes:
        if note["cycle"] != cycle:
            cycle = note["cycle"]
            print(f"\nCycle {cycle}")
        print(f"  {note['phase']}: {note['text']}")
