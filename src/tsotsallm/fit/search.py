"""The best model for a budget: measure what units cost and hurt, allocate, build, measure, correct, and again."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.checkpoint.view import View
from tsotsallm.checkpoint.writer import write_json
from tsotsallm.compression import plan as plan_of
from tsotsallm.engine.llama import in_process
from tsotsallm.engine.llama import installed as llama_installed
from tsotsallm.errors import MissingExtraError, StudyError, TsotsallmError
from tsotsallm.evaluation.cost import measure_gguf_speed
from tsotsallm.evaluation.in_llama import perplexity_in_llama
from tsotsallm.evaluation.perplexity import evaluate_perplexity
from tsotsallm.export.gguf import export_gguf
from tsotsallm.export.verify import read_back
from tsotsallm.files import JsonObject
from tsotsallm.fit.deadline import TimeUp
from tsotsallm.fit.files import Stages, Structure
from tsotsallm.fit.notes import Mixture
from tsotsallm.fit.plans import Choices, Corrections, Limits, Measured, Plan, corrected, plan_for, structures, unsure
from tsotsallm.fit.reach import Settings, require_reached
from tsotsallm.fit.rounds import Fitted, Round
from tsotsallm.fit.target import USUAL_BITS, Target
from tsotsallm.fit.units import Bench, Say
from tsotsallm.inspection import inspect_checkpoint
from tsotsallm.journal import Kind, begun_threads, held_work
from tsotsallm.machine import fingerprint
from tsotsallm.run.work import Progress
from tsotsallm.units import human_bytes, human_seconds, plus_minus

HOLDS = 0.15
"""A prediction holds when it is no further than this share from what is measured with the text that it is for."""
MOST_ROUNDS = 8
MORE_TEXT = 4
"""How many times the calibration text the best candidate is made anew with, where the time allows."""
TUNE_BYTES = 1024
"""Of a file's header, which has the recipe: the tuned candidate has one stage more."""
UNFINISHED = Kind("fit", frozenset({"model", "texts", "texts to keep"}),
                  ("calibration-*.txt", "store", "models", "reference", "units*.json*", "depth-*", "*.f32*", "*speed.gguf*",
                   "*round-*.gguf*"))


def fit(model: str, target: Target, out: Path, settings: Settings | None = None, say: Say = print,
        progress: Callable[[Progress], None] = lambda _now: None, *, heard: Callable[[Round], None] = lambda _one: None,
        restart: bool = False) -> Fitted:
    """Write the best model found for a target to OUT/model and OUT/model.gguf; what was found on the way to OUT/fit.json.

    What an interrupted fit measured and built stays in OUT/work and is taken over, or deleted first with `restart`; what
    units cost and hurt is kept in the cache for other targets. When the settings' minutes are over, the work in progress
    stops and the best candidate so far is the result. `heard` is called with every candidate once it is measured.
    Raises StudyError where the target cannot be met, or not in that time.
    """
    if (out / "model").exists():
        raise StudyError(f"{out / 'model'} exists already; choose another name with -o, or delete it first")
    if (out / "config.json").exists():
        raise StudyError(f"{out} is a model itself; choose another name with -o")
    if target.faster_than is not None and not llama_installed():
        raise MissingExtraError("xllamacpp", "llama", "measuring how fast a model is")
    asked = settings or Settings()
    try:
        bench = Bench(model, asked, out / "work", say, progress, target.bytes)
    except TimeUp:
        raise StudyError(f"{_minutes(asked.minutes)} while the model wrote text or answers; give more "
                         "--minutes, or a text of your own with --calibration FILE") from None
    identity = bench.identity | {"windows": asked.windows, "window": asked.window, "compared": asked.compared,
                                 "seed": asked.seed,
                                 "machine": fingerprint(None if restart else begun_threads(bench.work))}
    words = {"model": model, "texts": f"{_text_of(asked)} ({bench.characters} characters)",
             "texts to keep": ", ".join(asked.keep_text) or "none"}
    with held_work(bench.work, identity, UNFINISHED, words, restart=restart):
        try:
            return _Fit(bench, target, out, heard).run()
        except TimeUp:
            raise StudyError(_too_short(bench)) from None


def _minutes(count: float) -> str:
    return f"the {count:g} minute{' was' if count == 1 else 's were'} over"


def _too_short(bench: Bench) -> str:
    """Why there is no result after the time, and what is needed."""
    passes, seconds = 1, bench.mixture_seconds
    if seconds is None:                         # one to measure grids, one for a candidate
        planned = plan_of(bench.model, [{"quantize": {"bits_per_weight": USUAL_BITS}}], calibration=bench.calibration,
                          windows=bench.settings.windows, window=bench.settings.window)
        passes, seconds = 2, planned.expected_s
    return (f"{_minutes(bench.settings.minutes)} before a candidate was finished (at: {bench.doing}); what was "
            f"measured is kept in {bench.work}: the same command with more --minutes resumes, and needs at least "
            f"{max(1, math.ceil(passes * seconds / 60))} more")


def _text_of(settings: Settings) -> str:
    return settings.calibration or ", ".join(settings.keep_text) or "the default text"


class _Fit:
    """One fit while it goes on."""

    def __init__(self, bench: Bench, target: Target, out: Path,
                 heard: Callable[[Round], None] = lambda _one: None) -> None:
        self.bench, self.target, self.out, self.say, self.heard = bench, target, out, bench.say, heard
        self.rounds: list[Round] = []
        self.paths: list[Path] = []
        self.last: dict[Structure, Round] = {}      # the last candidate of each structure
        self.choices: list[Choices] = []
        self.corrections = Corrections()
        self.structure_pairs: list[tuple[float, float]] = []
        self.grid_pairs: list[tuple[float, float]] = []
        self.speed_pairs: list[tuple[float, float]] = []

    def run(self) -> Fitted:
        measured, mixture = self.bench.measure(speed=self.target.faster_than is not None)
        self.grid_pairs = [(mixture.predicted, mixture.measured)]
        self.choices = [Choices.of(structure, self.bench.files, measured) for structure in structures(measured)]
        require_reached(min(self.choices, key=lambda one: one.smallest), self.target.bytes)
        self._correct()
        while len(self.rounds) < MOST_ROUNDS and (plan := self._next(measured)) is not None:
            if not self._tried(partial(self._try, plan, measured)):
                break
        if self._best() is not None:
            self._once_more(measured, mixture)
            self._tune(measured)
        if (best := self._best()) is None:
            asked = self.target.faster_than
            made = f"the fastest of {len(self.rounds)} candidates made {self._fastest():.1f}" if self.rounds else (
                "no candidate is expected to be nearly as fast")
            raise StudyError(f"nothing of {human_bytes(self.target.bytes)} makes {asked} tokens a second here; {made}; ask "
                             "for less")
        return self._finish(best, measured)

    def _best(self) -> Round | None:
        return min((one for one in self.rounds if self._meets(one)), key=lambda one: one.measured, default=None)

    def _choices_of(self, candidate: Round) -> Choices:
        """The choices that a candidate was planned from."""
        return next(one for one in self.choices if one.structure.name == candidate.structure)

    # -- choosing -----------------------------------------------------------------------------------------------------

    def _next(self, measured: Measured) -> Plan | None:
        """The plan that is expected to lose least of those that are worth building; None where none is.

        Worth building is what may well be better than the best so far, given how far predictions may be off. A structure is
        built again only where it was too slow.
        """
        plans = [plan for choices in self.choices if (plan := self._plan(choices, measured)) is not None]
        fresh = [plan for plan in plans if plan.structure not in self.last or self._slow(self.last[plan.structure])]
        if not fresh:
            return None
        first = min(fresh, key=lambda plan: plan.loss)
        best = self._best()
        off = unsure((one.predicted, one.measured) for one in self.rounds)
        return first if best is None or first.loss * math.exp(-off) < best.measured else None

    def _plan(self, choices: Choices, measured: Measured) -> Plan | None:
        most = self.target.bytes
        if self.bench.settings.tune is not None:
            most = min(most, max(most - TUNE_BYTES, choices.smallest))      # tuning is left to chance where all is tight
        slowest = None if self.target.faster_than is None else 1 / self.target.faster_than
        limits = Limits(most, slowest)
        return plan_for(choices, measured, self.corrections, limits)

    def _slow(self, one: Round) -> bool:
        return one.bytes <= self.target.bytes and not self._meets(one)

    def _meets(self, one: Round) -> bool:
        fast = self.target.faster_than is None or (one.decode_tokens_per_s or 0) >= self.target.faster_than
        return one.bytes <= self.target.bytes and fast

    def _fastest(self) -> float:
        return max(one.decode_tokens_per_s or 0.0 for one in self.rounds)

    def _correct(self) -> None:
        self.corrections = Corrections(corrected(self.structure_pairs), corrected(self.grid_pairs),
                                       corrected(self.speed_pairs), bool(self.bench.settings.recover))

    # -- building -----------------------------------------------------------------------------------------------------

    def _once_more(self, measured: Measured, mixture: Mixture) -> None:
        """Survey and make the best candidate again with more calibration text, if the time allows; it mostly loses less."""
        best, settings = self._best(), self.bench.settings
        assert best is not None
        choices = self._choices_of(best)
        takes = MORE_TEXT * max(mixture.seconds, best.seconds) / 60
        if not settings.quick and self.bench.minutes_gone + takes < settings.minutes:
            windows = MORE_TEXT * settings.windows
            self.say(f"once more with {windows} windows of calibration text")
            self._tried(partial(self._again, choices, measured, windows))

    def _again(self, choices: Choices, measured: Measured, windows: int) -> None:
        """Make a structure with grids that a survey of itself, with so much text, chooses."""
        plan = self._plan(choices.surveyed(*self.bench.survey(choices.structure, windows)), measured)
        if plan is not None:
            self._try(plan, measured, windows)

    def _tune(self, measured: Measured) -> None:
        """Let the best candidate learn its scales and norms, if the time allows; it replaces the other if it loses less."""
        best, bench = self._best(), self.bench
        if bench.settings.tune is None or best is None:
            return
        recipe = [*best.recipe, bench.settings.tune]
        forecast = plan_of(bench.model, recipe, calibration=bench.calibration, windows=best.windows,
                           window=bench.settings.window)
        minutes = forecast.sweeps[-1].expected_s / 60
        if bench.minutes_gone + minutes > bench.settings.minutes:
            self.say(f"tuning is left out: it would take about {human_seconds(60 * minutes)}, and "
                     f"{human_seconds(60 * max(0.0, bench.settings.minutes - bench.minutes_gone))} are left")
            return
        self.say(f"tuning the best candidate, about {human_seconds(60 * minutes)}")
        self._tried(partial(self._try_tuned, best, recipe, measured))

    def _try_tuned(self, best: Round, recipe: Stages, measured: Measured) -> None:
        """Build a candidate again with a stage that tunes it, and measure that."""
        began, number = time.monotonic(), len(self.rounds)
        structure = self._choices_of(best).structure
        path = self.bench.compressed(recipe, best.windows)
        taken = self._exported(path, number)
        loss, error = self._lost(path, structure, measured)
        one = replace(best, number=number, recipe=recipe, predicted=best.measured, measured=loss, error=error, bytes=taken,
                      seconds=round(time.monotonic() - began, 1), tuned=True)
        self.rounds.append(one)
        self.paths.append(path)
        self.heard(one)
        self.say(f"round {number}: {one.name}: measured {plus_minus(loss, error)} after {best.measured:.3g}, "
                 f"{human_bytes(taken)} ({one.seconds:.0f} s)")

    def _exported(self, path: Path, number: int) -> int:
        """Write the GGUF file of a candidate; returns its bytes."""
        file = self._file(number)
        file.unlink(missing_ok=True)
        return export_gguf(Checkpoint.open(path), file, dense="f16", name=self.bench.files.source).bytes

    def _tried(self, make: Callable[[], None]) -> bool:
        """Whether a candidate could be built; where it could not, what was found before is enough, if anything was."""
        try:
            make()
        except TimeUp:
            if self._best() is None:
                raise
            self.say("the time is up: the best so far is the result")
            return False
        except TsotsallmError as error:
            if self._best() is None:
                raise
            self.say(f"{error}; the best so far stays")
            return False
        return True

    def _try(self, plan: Plan, measured: Measured, windows: int | None = None) -> None:
        """Build a candidate, tell of it, and learn from it."""
        before = self.corrections
        one, path = self._build(len(self.rounds), plan, measured, windows or self.bench.settings.windows)
        self.rounds.append(one)
        self.paths.append(path)
        self.last[plan.structure] = one
        if not before.known(plan.structure) and one.measured_structure > 0:
            self.structure_pairs.append((plan.structure_loss / before.structure, one.measured_structure))
        self.grid_pairs.append((plan.grids_loss / before.grids, max(one.measured - one.measured_structure, 1e-9)))
        if plan.seconds is not None and one.decode_tokens_per_s:
            self.speed_pairs.append((plan.seconds / before.seconds, 1 / one.decode_tokens_per_s))
        self._correct()
        speed = "" if one.decode_tokens_per_s is None else f", {one.decode_tokens_per_s:.1f} tokens/s" + (
            f" (predicted {one.predicted_tokens_per_s:.1f})" if one.predicted_tokens_per_s else "")
        self.heard(one)
        self.say(f"round {one.number}: {one.structure}: predicted {one.predicted:.3g}, measured "
                 f"{plus_minus(one.measured, one.error)}, {human_bytes(one.bytes)}{speed} ({one.seconds:.0f} s)")

    def _build(self, number: int, plan: Plan, measured: Measured, windows: int) -> tuple[Round, Path]:
        """Make a candidate and its GGUF file, and measure it."""
        began, bench, files, structure = time.monotonic(), self.bench, self.bench.files, plan.structure
        bench.doing, cut = f"candidate {number}", files.recovered(structure)
        structure_loss = measured.structure_loss(structure)
        if structure.narrower or len(cut) > len(files.cut(structure)):
            out = bench.compressed(cut, windows)
            structure_loss = self._lost(out, structure, measured)[0]
            shutil.rmtree(out)
        recipe = files.recipe(structure, plan.grids)
        out = bench.compressed(recipe, windows)
        taken, file = self._exported(out, number), self._file(number)
        expected = files.layout(structure, plan.grids).total_bytes
        assert taken == expected <= plan.bytes, (f"{file} has {taken} bytes where {expected} of at most {plan.bytes} were "
                                                 "computed: please report this with the model's name")
        loss, error = self._lost(out, structure, measured)
        speed = measure_gguf_speed(file).decode_tokens_per_s if self.target.faster_than else None
        return Round(number, structure.name, recipe, windows, plan.loss, loss, error, plan.structure_loss,
                     structure_loss, taken, speed, None if plan.seconds is None else 1 / plan.seconds,
                     round(time.monotonic() - began, 1)), out

    def _lost(self, path: Path, structure: Structure, measured: Measured) -> tuple[float, float]:
        """Nats a token of the largest vocabulary that a candidate loses in all, and the standard error."""
        loss, error = self.bench.loss_of(path, structure.vocabulary)
        share = self.bench.original(structure.vocabulary).tokens / self.bench.original(self.bench.most).tokens
        tokens = measured.vocabulary.get(structure.vocabulary, 0.0) if structure.vocabulary is not None else 0.0
        return tokens + share * loss, share * error

    def _file(self, number: int) -> Path:
        return self.bench.work / f"round-{number}.gguf"

    def _in_llama(self, file: Path, best: Round) -> JsonObject | None:
        """The divergence of the result's file as llama.cpp computes it, on the text that candidates were compared on."""
        if not in_process():
            return None
        structure = self._choices_of(best).structure
        try:
            found = perplexity_in_llama(file, self.bench.compared_text, "held-out text",
                                        context=self.bench.settings.window, name="fitted",
                                        reference=self.bench.original(structure.vocabulary).checkpoint,
                                        reference_name=self.bench.model)
        except TsotsallmError as error:
            self.say(f"the file is not compared in llama.cpp: {error}")
            return None
        return {key: value for key, value in found.plain().items() if key != "fits"}

    @staticmethod
    def _speed(file: Path) -> float | None:
        return measure_gguf_speed(file).decode_tokens_per_s if in_process() else None

    def _finish(self, best: Round, measured: Measured) -> Fitted:
        kept, file, path = self.out / "model.gguf", self._file(best.number), self.paths[best.number]
        self.say("the search is over: the result is compared with the original and timed")
        read_back(file)
        settings = self.bench.settings
        found = evaluate_perplexity(Checkpoint.open(path), self.bench.compared_text, source="held-out text",
                                    context=settings.window, reference=Checkpoint.streamed(self.bench.model), name="fitted",
                                    reference_name=self.bench.model)
        told = next(one for one in reversed(self.rounds)     # predictions are for so much calibration text
                    if one.structure == best.structure and one.windows == settings.windows and not one.tuned)
        holds = abs(told.predicted - told.measured) <= HOLDS * told.measured
        evaluation = {key: value for key, value in found.plain().items() if key != "fits"}
        fitted = Fitted(self.out / "model", kept, self.target, best, tuple(self.rounds), measured, self.corrections, holds,
                        round(60 * self.bench.minutes_gone, 1), evaluation,
                        self.bench.answered(View.of(Checkpoint.open(path))), self._in_llama(file, best),
                        best.decode_tokens_per_s or self._speed(file), inspect_checkpoint(self.bench.source).bytes)
        write_json(self.out / "fit.json", fitted.plain() | {
            "model": self.bench.model, "source": self.bench.source.fingerprint(), "settings": asdict(settings)})
        file.replace(kept)
        path.replace(self.out / "model")            # last: with it the fit is done
        shutil.rmtree(self.bench.work)
        return fitted
