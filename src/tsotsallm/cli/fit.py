"""tsotsallm fit: the best model for a device or a size."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tsotsallm.cli.common import (
    AsJson,
    Calibration,
    Data,
    Items,
    Model,
    Restart,
    Threads,
    Window,
    Windows,
    WindowsSeed,
    answers,
    names_in,
    print_json,
    to_stderr,
)

if TYPE_CHECKING:
    from tsotsallm.evaluation.examination import Examination
    from tsotsallm.fit.rounds import Fitted


def fit(model: Model,
        out: Annotated[Path | None, typer.Option("-o", "--out", help="Directory to write the model, its GGUF file and the "
                                                                     "report to (default: NAME-small).")] = None,
        device: Annotated[str | None, typer.Option(help="Name of the device; `tsotsallm devices` lists them.")] = None,
        size: Annotated[str | None, typer.Option("--bytes", help="Largest size of the GGUF file in bytes, such as 700MB "
                                                                 "(default: 4.5 bits a weight, or what this computer "
                                                                 "holds).")] = None,
        faster_than: Annotated[float | None, typer.Option(help="Lowest speed in tokens per second, measured on this "
                                                               "machine.")] = None,
        keep_text: Annotated[list[Path] | None, typer.Option(help="Text file in a language to keep; may be given several "
                                                                  "times.")] = None,
        calibration: Calibration = None, windows: Windows = 32, window: Window = None,
        minutes: Annotated[float | None, typer.Option(help="Minutes after which the search stops; the best candidate so far "
                                                         "is the result (default: by the forecast).")] = None,
        recover: Annotated[bool, typer.Option(help="Let the layers of a cut model learn from the original's.")] = False,
        tune: Annotated[bool, typer.Option(help="Let the best candidate learn its scales and norms, where minutes are left "
                                                "for it.")] = False,
        quick: Annotated[bool, typer.Option(help="Round candidates in a third of the time, at some loss.")] = False,
        task: Annotated[str | None, typer.Option(help="Tasks to evaluate the original and the result on, separated by "
                                                      "commas.")] = None,
        data: Data = None, limit: Items = None, seed: WindowsSeed = 0, restart: Restart = False, threads: Threads = None,
        as_json: AsJson = False) -> None:
    """Find the best model for this computer, a device or a file size.

    Writes the model, its GGUF file with a Modelfile, and a report.
    """
    with answers(as_json):
        from tsotsallm.api.fit import fit
        from tsotsallm.cli.lines import candidate_line, progress_bar
        from tsotsallm.fit.target import FitsAlready

        bar, show = progress_bar(as_json, minutes)
        try:
            with bar:
                fitted, scores = fit(
                    model, out, device=device, size=size, faster_than=faster_than, say=to_stderr if as_json else print,
                    progress=show, keep_text=keep_text or (), calibration=calibration, windows=windows, window=window,
                    minutes=minutes, recover=recover, tune=tune, quick=quick, tasks=names_in(task), data=data, limit=limit,
                    seed=seed, restart=restart, heard=candidate_line)
        except FitsAlready as found:
            print_json({"fits_already": True, "message": str(found)}) if as_json else print(found)
            return
        if as_json:
            print_json(fitted.plain() | ({"examination": scores.plain()} if scores else {}))
            return
        print_fit(fitted, scores)
        print(in_plain_words(fitted))
        print("run it:", *(f"  {line}" for line in ways_to_run(fitted.gguf)), sep="\n")


def in_plain_words(fitted: Fitted) -> str:
    """What a result weighs, what it needs, what was lost, and how fast it is, as far as that was measured."""
    from tsotsallm.checkpoint.reader import Checkpoint
    from tsotsallm.engine.llama import most_context
    from tsotsallm.units import human_bytes

    spec = Checkpoint.open(fitted.path).spec
    context = most_context(spec.context)
    same, best = fitted.evaluation["same_top_token"], fitted.best
    speed = "" if fitted.tokens_per_s is None else f" Here it writes about {fitted.tokens_per_s:.0f} tokens a second."
    memory = human_bytes(best.bytes + context * spec.kv_bytes_per_token())
    return (f"The file has {human_bytes(best.bytes)}, where the original has {human_bytes(fitted.before)}. To run, it takes "
            f"about {memory} of memory with a conversation of {context} tokens. On text that it was not calibrated on, it "
            f"expects the same next token as the original in {same:.0%} of all places, and its perplexity is "
            f"{fitted.evaluation['perplexity']:.4g} where the original's is "
            f"{fitted.evaluation['reference_perplexity']:.4g}.{speed}")


def ways_to_run(gguf: Path) -> list[str]:
    """Commands that run a file, one for each engine."""
    from tsotsallm.export.publish import modelfile_path, ollama_name

    name, file = ollama_name(gguf.parent / f"{gguf.parent.name}.gguf"), shlex.quote(str(gguf))
    return [f"tsotsallm chat {file}", f"llama-server -m {file}",
            f"ollama create {name} -f {shlex.quote(str(modelfile_path(gguf)))} && ollama run {name}"]


def print_fit(fitted: Fitted, scores: Examination | None) -> None:
    """Print one row per candidate, then the best one, and the scores on tasks where there are some."""
    from tsotsallm.cli.evaluate import print_examination
    from tsotsallm.cli.lines import table
    from tsotsallm.units import human_bytes, human_seconds, plus_minus

    table("Rounds", ["round", "structure", "windows", "predicted KL", "measured KL", "file", "tokens/s"], [
        [str(one.number), one.name, str(one.windows), f"{one.predicted:.3g}", plus_minus(one.measured, one.error),
         human_bytes(one.bytes), "" if one.decode_tokens_per_s is None else f"{one.decode_tokens_per_s:.1f}"]
        for one in fitted.rounds])
    best = fitted.best
    print(f"best    round {best.number}: {best.name}; KL {plus_minus(best.measured, best.error)}, perplexity "
          f"{fitted.evaluation['perplexity']:.4f} (original {fitted.evaluation['reference_perplexity']:.4f}) on held-out "
          "text")
    if (engine := fitted.in_llama) is not None:
        print(f"engine  KL {plus_minus(engine['kl'], engine['kl_standard_error'])} on the same text in llama.cpp, which "
              "rounds activations too")
    if (answered := fitted.answered) is not None:
        print(f"answers KL {plus_minus(answered.kl, answered.kl_standard_error)}, the same likeliest token in "
              f"{answered.same_top_token:.1%}, on the original's answers to {answered.conversations} requests")
    print(f"file    {human_bytes(best.bytes)} of {human_bytes(fitted.target.bytes)}; the prediction "
          f"{'holds' if fitted.holds else 'does not hold'}; took {human_seconds(fitted.seconds)}")
    print(f"model   {fitted.path}\ngguf    {fitted.gguf}")
    if (report := fitted.path.parent / "report.html").exists():
        print(f"report  {report}")
    if scores is not None:
        print_examination(scores, groups=False)
