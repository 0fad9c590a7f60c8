"""What every unit of a model costs and hurts, measured once: layers, neurons, grids of matrices, tokens, seconds."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path

import torch

from tsotsallm.calibration import CalibrationText, calibration_text, check_windows, self_text_note
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.checkpoint.view import View
from tsotsallm.checkpoint.writer import write_json
from tsotsallm.compression import compress
from tsotsallm.errors import CorpusError
from tsotsallm.evaluation.conversations import Answered, answers_like, own_answers
from tsotsallm.evaluation.cost import bytes_of, measure_gguf_speed
from tsotsallm.evaluation.examinee import Examinee
from tsotsallm.evaluation.perplexity import evaluate_perplexity, evaluation_corpus, kept_states, window_features
from tsotsallm.export.gguf import export_gguf
from tsotsallm.files import Json, JsonObject
from tsotsallm.fit.deadline import Deadline
from tsotsallm.fit.files import Structure
from tsotsallm.fit.notes import Mixture, Ranking, read_units, write_units
from tsotsallm.fit.plans import HOPELESS, Choices, Corrections, Limits, Measured, corrected, plan_for
from tsotsallm.fit.reach import Settings, files_of, least, removable, require_reached, smallest, widths
from tsotsallm.fit.vocabularies import Vocabularies
from tsotsallm.machine import cache_root, fingerprint
from tsotsallm.run.work import Progress
from tsotsallm.stages.allocation import DENSE, MIXED, candidates
from tsotsallm.stages.quantize.sizes import matrix_weights
from tsotsallm.store import Store, key_of
from tsotsallm.streaming.corpus import Corpus, read_text
from tsotsallm.streaming.score import leave_one_out_losses
from tsotsallm.streaming.sweep import Tick, silent
from tsotsallm.training.samples import instruction_windows
from tsotsallm.version import __version__

HELD_OUT = 0.15
"""Share of the calibration text that candidates are compared on, and that nothing is calibrated on."""
NEEDED, NEEDED_RECOVERED = 2.0, 10.0
"""How many times what fewer bits alone lose a cut may lose by itself and still be of use: predictions are off, and layers
that learn win back most of it."""
KEPT = 8
"""How many times the bytes of the model what candidates have in common may take on disk."""
ANSWERS_SHARE = 0.5
"""What the answers to requests count in the loss of a model of conversations; the held-out text counts the rest."""
MEASURING = 0.35
"""Share of the time that measuring units may take before it becomes coarser."""

Say = Callable[[str], None]
ByGrid = dict[str, dict[str, float]]
"""Matrix -> grid -> loss in nats a token."""


def whole_text(checkpoint: Checkpoint, settings: Settings, tick: Tick = silent) -> CalibrationText:
    """The text that a fit calibrates and compares on: what is given, else the texts to keep, else the model's own."""
    if settings.keep_text and settings.calibration is None:
        return CalibrationText((("\n".join(read_text(name) for name in settings.keep_text), 1.0),), "the texts to keep")
    return calibration_text(checkpoint, settings.calibrated, tick=tick)


class Original:
    """The original with a vocabulary of some size (None: all tokens), and the text that candidates are compared on."""

    def __init__(self, checkpoint: Checkpoint, text: str, settings: Settings) -> None:
        self.checkpoint = checkpoint
        self.corpus = evaluation_corpus(text, checkpoint.codec, settings.window, "windows", "held-out text")
        self.tokens = sum(len(window) - 1 for window in self.corpus.windows)


class Bench:
    """A model with its texts, where candidates are made and measured; TimeUp where the settings' minutes are over.

    budget  bytes that a candidate may have: where time is short, units are measured only as far as it needs (None: all)
    """

    def __init__(self, model: str, settings: Settings, work: Path, say: Say,
                 progress: Callable[[Progress], None] = lambda _now: None, budget: int | None = None) -> None:
        self.model, self.settings, self.work, self.say, self.budget = model, settings, work, say, budget
        self.deadline = Deadline(settings.minutes)
        self._shown, self.doing = progress, "calibration text"
        self.source = Checkpoint.streamed(model)
        self.vocabularies = Vocabularies(self.source, settings.keep_text)
        self.files = files_of(model, self.vocabularies, settings)
        self.whole = self.files.whole
        self._require_possible()
        self._originals: dict[int | None, Original] = {}
        self._prepare_texts()
        self.doing = "the original's answers"
        self.answers = self._answers()

    def _require_possible(self) -> None:
        """Raise StudyError where the budget is below what arithmetic alone allows, ExportError where no file can be made."""
        self.files.vocabulary(self.most)
        if self.budget is not None:
            require_reached(least(self.files, self.vocabularies), self.budget)

    def progress(self, now: Progress) -> None:
        """Show what is going on, and stop it where the time is up."""
        self._shown(now)
        self.deadline.check()

    def tick(self, what: str) -> Tick:
        """Shows how far a measurement is, and stops it where the time is up."""
        return lambda _step, share: self.progress(Progress(-1, 1, f"{what}:", 0, 0, "", share))

    @cached_property
    def store(self) -> Store:
        """What candidates have in common."""
        return Store(self.work / "store", KEPT * bytes_of(View.of(self.source)))

    @cached_property
    def calibration(self) -> str:
        """The files with the text that is calibrated on."""
        return self.calibration_text.written(self.work)

    @property
    def minutes_gone(self) -> float:
        """Minutes since this fit began."""
        return self.deadline.minutes_gone

    @property
    def most(self) -> int | None:
        """The largest vocabulary that is thought of: the tokens that the texts to keep need; None: all."""
        return self.vocabularies.most

    def original(self, size: int | None) -> Original:
        """The original with a vocabulary of `size` tokens; opened once."""
        if size not in self._originals:
            self._originals[size] = Original(self.vocabularies.checkpoint(size), self.compared_text, self.settings)
        return self._originals[size]

    def _prepare_texts(self) -> None:
        """Part the text: what is calibrated on, and what candidates are compared on."""
        asked = self.settings
        check_windows(self.source, asked.calibrated)
        if (note := self_text_note(self.source, asked.calibrated)) is not None:
            self.say(note)
        text = whole_text(self.source, asked, lambda step, share: self.progress(
            Progress(-1, 1, "calibration:", 0, 0, step, share)))
        self.text_key, self.characters = key_of([text.source, *text.parts]), len(text.whole)
        self.calibration_text, compared = text.cut(1 - HELD_OUT)
        self.compared_text = compared.whole
        tokens = self.original(self.most).tokens
        wanted = asked.compared * (asked.window - 1)
        if tokens > wanted:
            self.compared_text = compared.cut(wanted / tokens)[0].whole
            self._originals.clear()
        codec = self.original(self.most).checkpoint.codec
        self.corpus = self.calibration_text.corpus(codec, asked.calibrated)

    def _answers(self) -> Corpus | None:
        """Requests that the original answered, on which candidates are compared too; None where it does not converse, or
        keeps only the tokens of some texts."""
        if self.most is not None or self.source.codec.chat is None:
            return None
        author = Examinee(View.of(self.source), self.model, self.work, tick=self.tick("answers"))
        try:
            found = own_answers(author)
        except CorpusError as error:
            self.say(f"candidates are compared on held-out text alone: {error}")
            return None
        self.say(f"candidates are compared on held-out text and, to a share of {ANSWERS_SHARE:.0%}, on the original's "
                 f"answers to {len(found)} requests")
        return instruction_windows(found, self.source.codec, self.source.spec.context, "answers")

    @property
    def identity(self) -> JsonObject:
        """All that measured units and models of a recipe depend on."""
        asked = self.settings
        return {"model": self.source.fingerprint(), "texts": self.text_key,
                "texts to keep": key_of([read_text(name) for name in asked.keep_text]),
                "windows": [asked.windows, asked.window, asked.compared, asked.seed], "machine": fingerprint(),
                "answers": None if self.answers is None else [self.answers.fingerprint(), ANSWERS_SHARE],
                "tsotsallm": __version__}

    @property
    def key(self) -> str:
        """A name for all that the measured units depend on."""
        return key_of([self.identity, self.settings.quick])

    # -- making and comparing -----------------------------------------------------------------------------------------

    def compressed(self, recipe: Sequence[Json], windows: int | None = None) -> Path:
        """The model that a recipe makes; one that an interrupted fit made is taken over."""
        windows = windows or self.settings.windows
        out = self.work / "models" / key_of([*recipe, windows])
        self.deadline.check()
        if not (out / "config.json").exists():
            out.parent.mkdir(exist_ok=True)
            compress(self.model, list(recipe), out, calibration=self.calibration, windows=windows,
                     window=self.settings.window, seed=self.settings.seed, store=self.store,
                     progress=self.progress)
        return out

    def loss(self, view: View, size: int | None) -> tuple[float, float]:
        """KL divergence from the original with a vocabulary, nats a token, and its standard error: on the compared text, and
        on the original's answers where there are some, mixed by ANSWERS_SHARE."""
        original, folder = self.original(size), self.work / "reference"
        folder.mkdir(exist_ok=True)
        device, tick = torch.device("cpu"), self.tick("comparing with the original")
        whole = View.of(original.checkpoint)
        states = kept_states(whole, original.corpus, folder, device, tick)
        sums, _ = window_features(view, original.corpus, (whole, states), device, self.work, tick)
        per_window = sums["kl"] / sums["tokens"]
        error = float(per_window.std() / len(per_window) ** 0.5) if len(per_window) > 1 else 0.0
        kl = float(sums["kl"].sum() / sums["tokens"].sum())
        if (answered := self.answered(view)) is None:
            return kl, error
        rest = 1 - ANSWERS_SHARE
        return (rest * kl + ANSWERS_SHARE * answered.kl,
                math.hypot(rest * error, ANSWERS_SHARE * answered.kl_standard_error))

    def answered(self, view: View) -> Answered | None:
        """How far a model is from the original on its answers; None where it is not compared on any."""
        if self.answers is None:
            return None
        folder = self.work / "reference"
        folder.mkdir(exist_ok=True)
        return answers_like(view, View.of(self.source), self.answers, folder, self.work, torch.device("cpu"))

    def loss_of(self, path: Path, size: int | None) -> tuple[float, float]:
        """(KL in nats per token, its standard error) of a written model with a vocabulary of `size` tokens."""
        return self.loss(View.of(Checkpoint.open(path)), size)

    # -- measuring ----------------------------------------------------------------------------------------------------

    def measure(self, *, speed: bool) -> tuple[Measured, Mixture]:
        """All units, and the model that was built on the way; what was measured before is taken over."""
        known = cache_root() / "units" / f"{self.key}.json"
        before = read_units(known)
        measured, mixture = before or self._grids()
        until = HOPELESS if speed else self._of_use(measured, mixture)
        if before is not None and until <= measured.until:
            self.say("taking over what was measured before")
        else:
            alone, order, depth = self._depth(until)
            measured = replace(measured, order=order, depth=depth, width=self._width(len(order), until),
                               vocabulary=self._vocabulary(), alone=alone, until=until)
        if speed and not measured.seconds:
            measured.seconds.update(self._seconds())
        if not self.deadline.beyond(MEASURING):
            known.parent.mkdir(parents=True, exist_ok=True)
            write_units(known, measured, mixture)
        return measured, mixture

    def _of_use(self, measured: Measured, mixture: Mixture) -> float:
        """Nats that a cut may lose by itself: where fewer bits alone lose much less, it is of no use, and neither are others
        that lose more."""
        most = {} if self.most is None else {self.most: 0.0}
        whole, structure = replace(measured, depth=(0.0,), width={0.0: 0.0}, vocabulary=most), Structure((), 0.0, self.most)
        plan = None if self.budget is None else plan_for(
            Choices.of(structure, self.files, whole), whole,
            Corrections(grids=corrected([(mixture.predicted, mixture.measured)])), Limits(self.budget))
        if plan is None:
            return HOPELESS
        return min(HOPELESS, (NEEDED_RECOVERED if self.settings.recover else NEEDED) * plan.loss)

    def _depth(self, until: float = HOPELESS) -> tuple[dict[int, float], tuple[int, ...], tuple[float, ...]]:
        """What each layer is worth by itself; which go first, and the loss with the first k of them gone, the rest ranked
        anew after each while time allows; no more go once the loss is above `until`."""
        view, layers = View.of(self.original(self.most).checkpoint), self.whole.layers
        ranking = Ranking.of(self._noted("depth"))
        self.doing, gone, losses = "removing layers", ranking.gone, ranking.losses
        kept = [layer for layer in range(layers) if layer not in gone]
        some = Corpus(self.corpus.windows[:max(4, self.settings.windows // 4)], self.corpus.source)
        while len(gone) < removable(layers) and losses[-1] <= until and not self._enough(len(gone)):
            if not ranking.next or not self.deadline.beyond(MEASURING / 2):
                scratch = self.work / f"depth-{key_of(kept)}"       # what was begun is taken over, of this ranking only
                base, found = leave_one_out_losses(view.reordered(kept), some, list(range(len(kept))), scratch,
                                                   torch.device("cpu"), self.tick("leaving out layers"))
                shutil.rmtree(scratch, ignore_errors=True)
                ranking.alone = ranking.alone or {layer: loss - base for layer, loss in found.items()}
                ranking.next = [kept[place] for place in sorted(found, key=lambda place: (found[place], place))]
            going = ranking.next[0]
            kept.remove(going)
            losses.append(self.loss(view.reordered(kept), self.most)[0])
            gone.append(ranking.next.pop(0))
            self._note("depth", ranking.plain())
            self.say(f"without layers {'+'.join(map(str, sorted(gone)))}: KL {losses[-1]:.3g}")
        return ranking.alone, tuple(gone), tuple(losses)

    def _enough(self, removed: int, narrower: float | None = None) -> bool:
        """Whether time is short, and the budget is within reach with so many layers fewer and so much narrower ones (None:
        the narrowest there are)."""
        if self.budget is None or not self.deadline.beyond(MEASURING):
            return False
        share = max(widths(self.whole), default=0.0) if narrower is None else narrower
        size = min(self.vocabularies.smaller(), default=self.most)
        return smallest(self.files, size, removed, share).smallest <= self.budget

    def _grids(self) -> tuple[Measured, Mixture]:
        """What every matrix loses on every grid by its own rounding and by that of its inputs, and how the sum of the first
        compares with a model that was built so."""
        began = time.monotonic()
        if found := self._noted("grids"):
            return self._of_grids(found), Mixture(**found["mixture"])
        self.doing = "grids of matrices"
        stage = {"quantize": {"bits_per_weight": 4.5} | self.settings.rounding}
        out = self.compressed([*self.vocabularies.stage(self.most), stage])
        decision = json.loads((out / "decision-1-quantize.json").read_text("utf-8"))
        loss, _ = self.loss_of(out, self.most)
        self.say(f"every matrix on a grid of its own, 4.5 bits: KL {loss:.3g} (predicted {decision['predicted_loss']:.3g})")
        mixture = Mixture(decision["predicted_loss"], loss, round(time.monotonic() - began, 1))
        losses = {"grids": decision["losses"], "activations": decision["losses_of_activations"]}
        self._note("grids", losses | {"mixture": asdict(mixture)})
        shutil.rmtree(out)
        return self._of_grids(losses), mixture

    @staticmethod
    def _of_grids(losses: JsonObject) -> Measured:
        """Units of which grids alone are known so far."""
        return Measured((), (0.0,), {0.0: 0.0}, losses["grids"], activations=losses["activations"])

    @property
    def mixture_seconds(self) -> float | None:
        """What making and comparing a model took here; None where none was made yet."""
        found = self._noted("grids")
        return float(found["mixture"]["seconds"]) if found else None

    def _noted(self, name: str) -> JsonObject:
        """What an interrupted measurement noted; empty where there was none."""
        path = self.work / f"units-{name}.json"
        found: JsonObject = json.loads(path.read_text("utf-8")) if path.exists() else {}
        return found

    def _note(self, name: str, plain: JsonObject) -> None:
        self.work.mkdir(parents=True, exist_ok=True)
        write_json(self.work / f"units-{name}.json", plain)

    def survey(self, structure: Structure, windows: int) -> tuple[ByGrid, ByGrid]:
        """What the matrices of a structure lose on every grid by their own rounding and by that of their inputs, measured on
        itself with so many windows."""
        stage = {"quantize": {"bits_per_weight": 16, "couple": False, "passes": 0}}
        out = self.compressed([*self.files.recovered(structure), stage], windows)
        decision = json.loads(next(out.glob("decision-*-quantize.json")).read_text("utf-8"))
        shutil.rmtree(out)
        return decision["losses"], decision["losses_of_activations"]

    def _width(self, removed: int, until: float = HOPELESS) -> dict[float, float]:
        """What shares of neurons cost, where so many layers can go, up to the first that costs more than `until`."""
        found = {0.0: 0.0} | {float(share): loss for share, loss in self._noted("width").items()}
        for taken in widths(self.whole):
            if max(found.values()) > until or self._enough(removed, max(found)):
                break
            if taken in found:
                continue
            self.doing = "fewer neurons"
            out = self.compressed(self.files.cut(Structure((), taken, self.most)))
            found[taken], _ = self.loss_of(out, self.most)
            self._note("width", {str(share): loss for share, loss in found.items()})
            left = round(taken * self.whole.feed_forward)
            self.say(f"{left} of {self.whole.feed_forward} neurons fewer: KL {found[taken]:.3g}")
            shutil.rmtree(out)
        return found

    def _vocabulary(self) -> dict[int, float]:
        """What vocabularies smaller than the texts need cost: more nats for the same text, by token of the largest.

        Text is then cut into other tokens, so that divergences do not compare; what the text costs in all does.
        """
        if self.most is None:
            return {}
        self.doing, found = "smaller vocabularies", {self.most: 0.0}
        found |= {int(size): loss for size, loss in self._noted("vocabulary").items()}
        whole = self.original(self.most)
        base: float | None = None
        for size in self.vocabularies.smaller():
            if size not in found:
                base = self._nats(self.most) if base is None else base
                found[size] = max(0.0, (self._nats(size) - base) / whole.tokens)
                self._note("vocabulary", {str(one): loss for one, loss in found.items()})
                self.say(f"{size} of {self.most} tokens: {found[size]:.3g} nats more")
            if found[size] > HOPELESS:
                break
        return found

    def _nats(self, size: int) -> float:
        original = self.original(size)
        found = evaluate_perplexity(original.checkpoint, self.compared_text, source="held-out text",
                                    context=self.settings.window, tick=self.tick("smaller vocabularies"))
        return found.loss * original.tokens

    def _seconds(self) -> dict[str, float]:
        """Seconds that a weight takes in a new token on every grid: the whole model on it, in llama.cpp."""
        grids = {grid.type for name in MIXED for d_in in (self.whole.hidden, self.whole.feed_forward)
                 for grid in candidates(d_in) if grid.type == name}
        weights = matrix_weights(self.whole)
        found: dict[str, float] = self._noted("seconds")
        for name in (*sorted(grids), DENSE):
            if name in found:
                continue
            stage = [] if name == DENSE else [{"quantize": {"grid": name, "ends": name, "method": "rtn"}}]
            recipe, file = [*self.vocabularies.stage(self.most), *stage], self.work / "speed.gguf"
            file.unlink(missing_ok=True)
            self.doing = "speed of grids"
            export_gguf(Checkpoint.open(self.compressed(recipe)) if recipe else self.source, file, dense="f16")
            rate = measure_gguf_speed(file).decode_tokens_per_s
            self.say(f"all on {name}: {rate:.1f} tokens a second")
            found[name] = 1 / rate / weights
            self._note("seconds", found)
            file.unlink()
        shutil.rmtree(self.work / "models", ignore_errors=True)
        return found
