"""What every unit of a model costs and hurts, measured once: layers, neurons, grids of matrices, tokens, seconds."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch

from tsotsallm.calibration import Calibration, CalibrationText, calibration_text, check_windows, self_text_note
from tsotsallm.checkpoint.gguf_layout import Entry, vocabulary_entries
from tsotsallm.checkpoint.gguf_vocabulary import read_vocabulary
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.checkpoint.view import View
from tsotsallm.checkpoint.writer import write_json
from tsotsallm.compression import compress, result_source, with_vocabulary
from tsotsallm.errors import CheckpointError
from tsotsallm.evaluation.cost import bytes_of, measure_gguf_speed
from tsotsallm.evaluation.perplexity import evaluate_perplexity, evaluation_corpus, kept_states, window_features
from tsotsallm.export.gguf import export_gguf
from tsotsallm.files import Json, JsonObject
from tsotsallm.fit.files import Files, Stages, Structure
from tsotsallm.fit.plans import Measured
from tsotsallm.machine import cache_root, fingerprint
from tsotsallm.planning import whole_spec
from tsotsallm.recipe import Recipe
from tsotsallm.run.work import Progress
from tsotsallm.stages.allocation import DENSE, MIXED, candidates
from tsotsallm.stages.neurons import Neurons
from tsotsallm.stages.quantize.sizes import matrix_weights
from tsotsallm.store import Store, key_of
from tsotsallm.streaming.corpus import Corpus, read_text
from tsotsallm.streaming.score import leave_one_out_losses
from tsotsallm.streaming.sweep import Tick, silent
from tsotsallm.version import __version__

HELD_OUT = 0.15
"""Share of the calibration text that candidates are compared on, and that nothing is calibrated on."""
WIDTHS = (0.125, 0.25, 1 / 3, 0.5)
VOCABULARIES = (0.75, 0.5, 0.25)
"""Shares of the tokens that the texts need."""
HOPELESS = 2.0
"""Units are taken no further once they cost so many nats a token."""
KEPT = 8
"""How many times the bytes of the model what candidates have in common may take on disk."""
MEASURING = 0.35
"""Share of the time that measuring units may take before it becomes coarser."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """How a fit works: texts, how much of them, how long.

    recover  stages that a cut model learns by before its matrices get their grids
    quick    candidates are rounded in a third of the time, and lose some more by it
    """

    calibration: str | None = None
    keep_text: tuple[str, ...] = ()
    windows: int = 32
    window: int = 512
    seed: int = 0
    compared: int = 16
    minutes: float = 60.0
    recover: tuple[Json, ...] = ()
    quick: bool = False

    @property
    def calibrated(self) -> Calibration:
        """How the calibration text is read."""
        return Calibration(self.calibration, self.windows, self.window, self.seed)

    @property
    def rounding(self) -> JsonObject:
        """Options of `quantize` for every candidate."""
        return {"couple": False, "passes": 0} if self.quick else {}


@dataclass(frozen=True)
class Mixture:
    """The first model built: every matrix on a grid of its own. The loss predicted and measured, and what it took."""

    predicted: float
    measured: float
    seconds: float


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

    @cached_property
    def entries(self) -> tuple[Entry, ...]:
        """The keys of a GGUF file that describe its vocabulary; ExportError where GGUF has none like it."""
        return tuple(vocabulary_entries(read_vocabulary(self.checkpoint.codec)))


class Bench:
    """A model with its texts, where candidates are made and measured."""

    def __init__(self, model: str, settings: Settings, work: Path, say: Say,
                 progress: Callable[[Progress], None] = lambda _now: None) -> None:
        self.model, self.settings, self.work, self.say, self.progress = model, settings, work, say, progress
        self.began = time.monotonic()
        self.source = Checkpoint.open(model)
        self._originals: dict[int | None, Original] = {}
        self._prepare_texts()
        self.whole = whole_spec(self.original(self.most).checkpoint)
        self.files = Files(self.whole, lambda size: self.original(size).entries, result_source(model), settings.keep_text,
                           settings.recover, settings.rounding)

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
        return (time.monotonic() - self.began) / 60

    @cached_property
    def most(self) -> int | None:
        """The largest vocabulary that is thought of: the tokens that the texts to keep need; None: all."""
        if not self.settings.keep_text:
            return None
        return with_vocabulary(self.source, Recipe.parse(self.vocabulary_stage(None))).spec.vocabulary

    def vocabulary_stage(self, size: int | None) -> Stages:
        """The stage that cuts the vocabulary to `size` tokens; none where no texts are retained."""
        keep = list(self.settings.keep_text)
        return [{"vocabulary": {"keep": keep} | ({} if size is None else {"size": size})}] if keep else []

    def original(self, size: int | None) -> Original:
        """The original with a vocabulary of `size` tokens; opened once."""
        if size not in self._originals:
            checkpoint = self.source if size is None else with_vocabulary(self.source,
                                                                          Recipe.parse(self.vocabulary_stage(size)))
            self._originals[size] = Original(checkpoint, self.compared_text, self.settings)
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

    @property
    def identity(self) -> JsonObject:
        """All that measured units and models of a recipe depend on."""
        asked = self.settings
        return {"model": self.source.fingerprint(), "texts": self.text_key,
                "texts to keep": key_of([read_text(name) for name in asked.keep_text]),
                "windows": [asked.windows, asked.window, asked.compared, asked.seed], "machine": fingerprint(),
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
        if not (out / "config.json").exists():
            out.parent.mkdir(exist_ok=True)
            compress(self.model, list(recipe), out, calibration=self.calibration, windows=windows,
                     window=self.settings.window, seed=self.settings.seed, store=self.store,
                     progress=self.progress)
        return out

    def loss(self, view: View, size: int | None) -> tuple[float, float]:
        """KL divergence from the original with a vocabulary on the compared text, nats a token, and its standard error."""
        original, folder = self.original(size), self.work / "reference"
        folder.mkdir(exist_ok=True)
        device = torch.device("cpu")
        whole = View.of(original.checkpoint)
        states = kept_states(whole, original.corpus, folder, device, lambda _what, _share: None)
        sums, _ = window_features(view, original.corpus, (whole, states), device, self.work)
        per_window = sums["kl"] / sums["tokens"]
        error = float(per_window.std() / len(per_window) ** 0.5) if len(per_window) > 1 else 0.0
        return float(sums["kl"].sum() / sums["tokens"].sum()), error

    def loss_of(self, path: Path, size: int | None) -> tuple[float, float]:
        """(KL in nats per token, its standard error) of a written model with a vocabulary of `size` tokens."""
        return self.loss(View.of(Checkpoint.open(path)), size)

    # -- measuring ----------------------------------------------------------------------------------------------------

    def measure(self, *, speed: bool) -> tuple[Measured, Mixture]:
        """All units, and the model that was built on the way; what was measured before is taken over."""
        here, known = self.work / "units.json", cache_root() / "units" / f"{self.key}.json"
        before = read_units(here) or read_units(known)
        if before is not None:
            self.say("taking over what was measured before")
            measured, mixture = before
        else:
            alone, order, depth = self._depth()
            grids, mixture = self._grids()
            measured = Measured(order, depth, self._width(), grids, self._vocabulary(), alone)
        write_units(here, measured, mixture)
        if speed and not measured.seconds:
            measured.seconds.update(self._seconds())
            write_units(here, measured, mixture)
        if self.minutes_gone < MEASURING * self.settings.minutes:
            known.parent.mkdir(parents=True, exist_ok=True)
            write_units(known, measured, mixture)
        return measured, mixture

    def _depth(self) -> tuple[dict[int, float], tuple[int, ...], tuple[float, ...]]:
        """What each layer is worth by itself; which go first, and the loss with the first k of them gone, the rest ranked
        anew after each while time allows."""
        view, layers = View.of(self.original(self.most).checkpoint), self.whole.layers
        kept, gone, losses = list(range(layers)), list[int](), [0.0]
        ranked, alone = list[int](), dict[int, float]()
        some = Corpus(self.corpus.windows[:max(4, self.settings.windows // 4)], self.corpus.source)
        while len(gone) < layers // 2:
            if not ranked or self.minutes_gone < MEASURING / 2 * self.settings.minutes:
                scratch = self.work / f"depth-{key_of(kept)}"       # what was begun is taken over, of this ranking only
                base, found = leave_one_out_losses(view.reordered(kept), some, list(range(len(kept))), scratch,
                                                   torch.device("cpu"), lambda _what, _share: None)
                shutil.rmtree(scratch, ignore_errors=True)
                alone = alone or {layer: loss - base for layer, loss in found.items()}
                ranked = [kept[place] for place in sorted(found, key=lambda place: (found[place], place))]
            going = ranked.pop(0)
            kept.remove(going)
            gone.append(going)
            losses.append(self.loss(view.reordered(kept), self.most)[0])
            self.say(f"without layers {'+'.join(map(str, sorted(gone)))}: KL {losses[-1]:.4f}")
            if losses[-1] > HOPELESS:
                break
        return alone, tuple(gone), tuple(losses)

    def _grids(self) -> tuple[dict[str, dict[str, float]], Mixture]:
        """What every matrix loses on every grid, and how the sum compares with a model that was built so."""
        began = time.monotonic()
        stage = {"quantize": {"bits_per_weight": 4.5} | self.settings.rounding}
        out = self.compressed([*self.vocabulary_stage(self.most), stage])
        decision = json.loads((out / "decision-1-quantize.json").read_text("utf-8"))
        loss, _ = self.loss_of(out, self.most)
        self.say(f"every matrix on a grid of its own, 4.5 bits: KL {loss:.4f} (predicted {decision['predicted_loss']:.4f})")
        shutil.rmtree(out)
        return decision["losses"], Mixture(decision["predicted_loss"], loss, round(time.monotonic() - began, 1))

    def survey(self, structure: Structure, windows: int) -> dict[str, dict[str, float]]:
        """What the matrices of a structure lose on every grid, measured on itself with so many windows."""
        stage = {"quantize": {"bits_per_weight": 16, "couple": False, "passes": 0}}
        out = self.compressed([*self.files.recovered(structure), stage], windows)
        decision = json.loads(next(out.glob("decision-*-quantize.json")).read_text("utf-8"))
        shutil.rmtree(out)
        found: dict[str, dict[str, float]] = decision["losses"]
        return found

    def _width(self) -> dict[float, float]:
        """What shares of neurons cost: those that are taken, which suit the grids, not those that were thought of."""
        found, seen = {0.0: 0.0}, {self.whole.feed_forward}
        for share in WIDTHS:
            stage = Neurons(feed_forward=share)
            if (left := stage.kept_neurons(self.whole)) in seen:
                continue
            seen.add(left)
            taken = 1 - left / self.whole.feed_forward
            out = self.compressed(self.files.cut(Structure((), taken, self.most)))
            found[taken], _ = self.loss_of(out, self.most)
            self.say(f"{self.whole.feed_forward - left} of {self.whole.feed_forward} neurons fewer: KL {found[taken]:.4f}")
            shutil.rmtree(out)
            if found[taken] > HOPELESS or self.minutes_gone > MEASURING * self.settings.minutes:
                break
        return found

    def _vocabulary(self) -> dict[int, float]:
        """What vocabularies smaller than the texts need cost: more nats for the same text, by token of the largest.

        Text is then cut into other tokens, so that divergences do not compare; what the text costs in all does.
        """
        if self.most is None:
            return {}
        found = {self.most: 0.0}
        whole = self.original(self.most)
        base = self._nats(self.most)
        for share in VOCABULARIES:
            size = int(self.most * share)
            try:
                cut = json.loads(self.original(size).checkpoint.token_files["tokenizer.json"])
            except CheckpointError:         # fewer than bytes and special tokens
                break
            if not cut["model"]["merges"]:  # which GGUF has no vocabulary for
                break
            found[size] = max(0.0, (self._nats(size) - base) / whole.tokens)
            self.say(f"{size} of {self.most} tokens: {found[size]:.4f} nats more")
            if found[size] > HOPELESS:
                break
        return found

    def _nats(self, size: int) -> float:
        original = self.original(size)
        found = evaluate_perplexity(original.checkpoint, self.compared_text, source="held-out text",
                                    context=self.settings.window)
        return found.loss * original.tokens

    def _seconds(self) -> dict[str, float]:
        """Seconds that a weight takes in a new token on every grid: the whole model on it, in llama.cpp."""
        grids = {grid.type for name in MIXED for d_in in (self.whole.hidden, self.whole.feed_forward)
                 for grid in candidates(d_in) if grid.type == name}
        weights = matrix_weights(self.whole)
        found = {}
        for name in (*sorted(grids), DENSE):
            stage = [] if name == DENSE else [{"quantize": {"grid": name, "ends": name, "method": "rtn"}}]
            recipe, file = [*self.vocabulary_stage(self.most), *stage], self.work / "speed.gguf"
            file.unlink(missing_ok=True)
            export_gguf(Checkpoint.open(self.compressed(recipe)) if recipe else self.source, file, dense="f16")
            rate = measure_gguf_speed(file).decode_tokens_per_s
            self.say(f"all on {name}: {rate:.1f} tokens a second")
            found[name] = 1 / rate / weights
            file.unlink()
        shutil.rmtree(self.work / "models", ignore_errors=True)
        return found


def write_units(path: Path, measured: Measured, mixture: Mixture) -> None:
    """Write what was measured, so that a later fit finds it."""
    write_json(path, plain_units(measured) | {"mixture": asdict(mixture)})


def plain_units(measured: Measured) -> JsonObject:
    """Units as JSON holds them."""
    plain = asdict(measured)
    for name in ("width", "vocabulary", "alone"):
        plain[name] = {str(key): value for key, value in plain[name].items()}
    return plain


def read_units(path: Path) -> tuple[Measured, Mixture] | None:
    """What was measured before; None where nothing was, or where the file is damaged."""
    try:
        plain = json.loads(path.read_text("utf-8"))
        return _measured(plain), Mixture(**plain["mixture"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _measured(plain: JsonObject) -> Measured:
    return Measured(tuple(plain["order"]), tuple(plain["depth"]),
                    {float(share): loss for share, loss in plain["width"].items()}, plain["grids"],
                    {int(size): loss for size, loss in plain["vocabulary"].items()},
                    {int(layer): loss for layer, loss in plain["alone"].items()}, plain["seconds"])
