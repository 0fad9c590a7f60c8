"""The best model for a budget: measure what units cost and hurt, allocate, build, measure, correct, and again."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.checkpoint.view import View
from tsotsallm.checkpoint.writer import write_json
from tsotsallm.compression import Calibration, calibration_text, compress, with_vocabulary
from tsotsallm.errors import StudyError
from tsotsallm.evaluation.cost import devices, measure_gguf_speed
from tsotsallm.evaluation.perplexity import evaluate_perplexity, evaluation_corpus, kept_states, window_features
from tsotsallm.export.gguf import export_gguf
from tsotsallm.export.verify import read_back
from tsotsallm.machine import human_bytes
from tsotsallm.planning import whole_spec
from tsotsallm.recipe import Recipe
from tsotsallm.stages.neurons import Neurons
from tsotsallm.store import Store
from tsotsallm.streaming.corpus import Corpus
from tsotsallm.streaming.corpus import calibration as windows_of
from tsotsallm.streaming.score import leave_one_out_losses
from tsotsallm.study.budget import Corrections, Measured, Plan, Structure, best_plans, corrected, smallest

HELD_OUT = 0.15
"""Share of the calibration text that candidates are compared on, and that nothing is calibrated on."""
WIDTHS = (0.25, 1 / 3, 0.5)
HOPELESS = 2.0
"""Layers are removed no further once that costs so many nats a token."""
WORTH = 0.98
"""Another structure is built only if it is expected to lose less than this share of what the best one does."""
HOLDS = 0.15
"""A prediction holds when it is no further than this share from what is measured."""
MOST_ROUNDS = 8
MEASURING = 0.35
"""Share of the time that measuring units may take before it becomes coarser."""


@dataclass(frozen=True)
class Target:
    """What the result must meet: bytes of the GGUF file, tokens a second on this machine."""

    bytes: int
    faster_than: float | None = None
    device: str | None = None


@dataclass(frozen=True)
class Round:
    """A candidate: what was expected of it, what it is. Losses in nats a token (KL divergence), bytes of the GGUF file."""

    number: int
    structure: str
    recipe: list[Any]
    predicted: float
    measured: float
    error: float
    predicted_structure: float
    measured_structure: float
    bytes: int
    decode_tokens_per_s: float | None
    seconds: float
    note: str = ""


@dataclass(frozen=True)
class Fitted:
    """The result of a fit."""

    path: Path
    gguf: Path
    target: Target
    best: Round
    rounds: tuple[Round, ...]
    measured: Measured
    corrections: Corrections
    holds: bool
    seconds: float
    evaluation: dict[str, Any] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        plain = asdict(self) | {"path": str(self.path), "gguf": str(self.gguf)}
        plain["measured"]["width"] = {str(share): loss for share, loss in self.measured.width.items()}
        return plain


@dataclass(frozen=True)
class Settings:
    """How a fit works: texts, how much of them, how long."""

    calibration: str | None = None
    keep_text: tuple[str, ...] = ()
    windows: int = 32
    window: int = 512
    seed: int = 0
    compared: int = 16
    minutes: float = 60.0
    recover: tuple[Any, ...] = ()


def target_of(spec_bytes_per_token: int, *, device: str | None, size: int | None, faster_than: float | None,
              context: int = 512) -> Target:
    """A target from a device's name or a size; a device also holds the 16-bit cache of `context` tokens."""
    if (device is None) == (size is None):
        raise StudyError("say what the model must fit: --device NAME or --bytes SIZE, one of them; `tsotsallm devices` "
                         "lists the devices")
    if faster_than is not None and faster_than <= 0:
        raise StudyError(f"--faster-than is {faster_than}; it takes tokens a second above 0")
    if size is not None:
        return Target(size, faster_than)
    known = devices()
    if device not in known:
        raise StudyError(f"there is no device {device!r}; `tsotsallm devices` lists them: {', '.join(known)}")
    return Target(int(known[device]["weight_bytes"]) - context * spec_bytes_per_token, faster_than, device)


def fit(model: str, target: Target, out: Path, settings: Settings | None = None,
        say: Callable[[str], None] = print) -> Fitted:
    """Write the best model found for a target to OUT/model and OUT/model.gguf; what was found on the way to OUT/fit.json.

    What an interrupted fit measured and built stays in OUT/work and is taken over.
    """
    if (out / "model").exists():
        raise StudyError(f"{out / 'model'} exists already; choose another name with -o, or delete it first")
    return _Fit(model, target, out, settings or Settings(), say).run()


class _Fit:
    """One fit while it goes on."""

    def __init__(self, model: str, target: Target, out: Path, settings: Settings, say: Callable[[str], None]) -> None:
        self.model, self.target, self.out, self.settings, self.say = model, target, out, settings, say
        self.began = time.monotonic()
        self.work = out / "work"
        self.work.mkdir(parents=True, exist_ok=True)
        self.store = Store(self.work / "store", 1 << 40)
        self.vocabulary = [{"vocabulary": {"keep": list(settings.keep_text)}}] if settings.keep_text else []
        source = Checkpoint.open(model)
        self.checkpoint = with_vocabulary(source, Recipe.parse(self.vocabulary)) if self.vocabulary else source
        self.whole = whole_spec(self.checkpoint)
        self.directory = source.directory
        self._prepare_texts(source)
        self.device = torch.device("cpu")

    @property
    def minutes_gone(self) -> float:
        return (time.monotonic() - self.began) / 60

    def _prepare_texts(self, source: Checkpoint) -> None:
        """Part the text: what is calibrated on, and what candidates are compared on."""
        texts = self.settings.keep_text if self.settings.keep_text and self.settings.calibration is None else ()
        if texts:
            text = "\n".join(Path(name).read_text("utf-8") for name in texts)
        else:
            text, _ = calibration_text(source, Calibration(self.settings.calibration, self.settings.windows,
                                                           self.settings.window, self.settings.seed))
        cut = int(len(text) * (1 - HELD_OUT))
        self.calibration = self.work / "calibration.txt"
        self.calibration.write_text(text[:cut], "utf-8")
        self.compared_text = text[cut:]
        tokenizer = self.checkpoint.tokenizer()
        corpus = evaluation_corpus(self.compared_text, tokenizer, self.settings.window, "windows", "held-out text")
        self.compared = corpus.first(self.settings.compared)
        self.corpus = windows_of(text[:cut], tokenizer, windows=self.settings.windows, length=self.settings.window,
                                 seed=self.settings.seed, source="calibration text")

    # -- measuring units ----------------------------------------------------------------------------------------------

    def run(self) -> Fitted:
        measured, probe = self._measure()
        least, structure = smallest(self.whole, self.directory, measured)
        if least > self.target.bytes:
            raise StudyError(f"the budget is {human_bytes(self.target.bytes)}, but the smallest that this model can become "
                             f"here takes {human_bytes(least)} ({structure.name}, every matrix on its smallest grid); give "
                             "more" + ("" if self.vocabulary else ", or cut the vocabulary with --keep-text FILE"))
        return self._search(measured, probe)

    def _measure(self) -> tuple[Measured, list[tuple[float, float]]]:
        known = self.work / "units.json"
        if known.exists():
            plain = json.loads(known.read_text("utf-8"))
            self.say("taking over what was measured before")
            return Measured(tuple(plain["order"]), tuple(plain["depth"]), {float(share): loss for share, loss in
                            plain["width"].items()}, plain["grids"]), [tuple(pair) for pair in plain["probe"]]
        order, depth = self._depth()
        grids, probe = self._grids()
        width = self._width()
        measured = Measured(order, depth, width, grids)
        write_json(known, asdict(measured) | {"width": {str(share): loss for share, loss in width.items()}, "probe": probe})
        return measured, probe

    def _kl(self, view: View) -> tuple[float, float]:
        """KL divergence from the original on the text that candidates are compared on, and its standard error."""
        original = View.of(self.checkpoint)
        states = kept_states(original, self.compared, self._reference(), self.device, lambda _what, _share: None)
        sums = window_features(view, self.compared, (original, states), self.device, self.work)
        per_window = sums["kl"] / sums["tokens"]
        error = float(per_window.std() / len(per_window) ** 0.5) if len(per_window) > 1 else 0.0
        return float(sums["kl"].sum() / sums["tokens"].sum()), error

    def _reference(self) -> Path:
        folder = self.work / "reference"
        folder.mkdir(exist_ok=True)
        return folder

    def _depth(self) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Which layers go first, and the loss with the first k of them gone; ranked anew after each while time allows."""
        view, layers = View.of(self.checkpoint), self.whole.layers
        kept, gone, losses = list(range(layers)), list[int](), [0.0]
        ranked: list[int] = []
        some = Corpus(self.corpus.windows[:max(4, self.settings.windows // 4)], self.corpus.source)
        while len(gone) < layers // 2:
            if not ranked or self.minutes_gone < MEASURING / 2 * self.settings.minutes:
                _, found = leave_one_out_losses(view.reordered(kept), some, list(range(len(kept))), self.work / "depth",
                                                self.device, lambda _what, _share: None)
                shutil.rmtree(self.work / "depth", ignore_errors=True)
                ranked = [kept[place] for place in sorted(found, key=lambda place: (found[place], place))]
            going = ranked.pop(0)
            kept.remove(going)
            gone.append(going)
            losses.append(self._kl(view.reordered(kept))[0])
            self.say(f"without layers {'+'.join(map(str, sorted(gone)))}: KL {losses[-1]:.4f}")
            if losses[-1] > HOPELESS:
                break
        return tuple(gone), tuple(losses)

    def _grids(self) -> tuple[dict[str, dict[str, float]], list[tuple[float, float]]]:
        """What every matrix loses on every grid, and how the sum compares with a model that was built so."""
        out = self._compressed("grids", [*self.vocabulary, {"quantize": {"bits_per_weight": 4.5}}])
        decision = json.loads((out / "decision-1-quantize.json").read_text("utf-8"))
        loss, _ = self._kl(View.of(Checkpoint.open(out)))
        self.say(f"every matrix on a grid of its own, 4.5 bits: KL {loss:.4f} (predicted {decision['predicted_loss']:.4f})")
        shutil.rmtree(out)
        return decision["losses"], [(decision["predicted_loss"], loss)]

    def _width(self) -> dict[float, float]:
        """What shares of neurons cost."""
        found, seen = {0.0: 0.0}, {self.whole.feed_forward}
        for share in WIDTHS:
            stage = Neurons(feed_forward=share)
            if (left := stage.kept_neurons(self.whole)) in seen:
                continue
            seen.add(left)
            out = self._compressed(f"width-{left}", [*self.vocabulary, {"neurons": {"feed_forward": share}}])
            found[share], _ = self._kl(View.of(Checkpoint.open(out)))
            self.say(f"{self.whole.feed_forward - left} of {self.whole.feed_forward} neurons fewer: KL {found[share]:.4f}")
            shutil.rmtree(out)
            if found[share] > HOPELESS or self.minutes_gone > MEASURING * self.settings.minutes:
                break
        return found

    def _compressed(self, name: str, recipe: Sequence[Any]) -> Path:
        out = self.work / name
        if not (out / "config.json").exists():
            compress(self.model, list(recipe), out, calibration=self.calibration, windows=self.settings.windows,
                     window=self.settings.window, seed=self.settings.seed, store=self.store)
        return out

    # -- rounds -------------------------------------------------------------------------------------------------------

    def _search(self, measured: Measured, probe: list[tuple[float, float]]) -> Fitted:
        structure_pairs: list[tuple[float, float]] = []
        grid_pairs = list(probe)
        known: dict[Structure, float] = {}
        rounds: list[Round] = []
        places: dict[int, Path] = {}
        budget = self.target.bytes
        corrections = Corrections(1.0, corrected(grid_pairs))
        while len(rounds) < MOST_ROUNDS:
            plans = best_plans(self.whole, self.directory, measured, corrections, budget, known)
            fresh = [plan for plan in plans if plan.structure not in known]
            good = [one for one in rounds if self._meets(one)]
            if not fresh or (good and fresh[0].loss > WORTH * min(one.measured for one in good)):
                break
            if rounds and self.minutes_gone > self.settings.minutes:
                self.say("the time is up")
                break
            one, path = self._build(len(rounds), fresh[0], budget)
            rounds.append(one)
            places[one.number] = path
            known[fresh[0].structure] = one.measured_structure
            if fresh[0].structure_loss > 0 and one.measured_structure > 0:
                structure_pairs.append((fresh[0].structure_loss / corrections.structure, one.measured_structure))
            grid_pairs.append((fresh[0].grids_loss / corrections.grids, max(one.measured - one.measured_structure, 1e-9)))
            corrections = Corrections(corrected(structure_pairs), corrected(grid_pairs))
            self._tell(one)
            if self.target.faster_than and one.decode_tokens_per_s and one.decode_tokens_per_s < self.target.faster_than:
                budget = int(budget * 0.98 * one.decode_tokens_per_s / self.target.faster_than)
                known.clear()
                self.say(f"too slow: the budget becomes {human_bytes(budget)}")
        good = [one for one in rounds if self._meets(one)]
        if not good:
            fastest = max(one.decode_tokens_per_s or 0 for one in rounds)
            raise StudyError(f"none of {len(rounds)} candidates makes {self.target.faster_than} tokens a second here; the "
                             f"fastest made {fastest:.1f}; ask for less")
        best = min(good, key=lambda one: one.measured)
        return self._finish(best, rounds, places, measured, corrections)

    def _meets(self, one: Round) -> bool:
        fast = self.target.faster_than is None or (one.decode_tokens_per_s or 0) >= self.target.faster_than
        return one.bytes <= self.target.bytes and fast

    def _build(self, number: int, plan: Plan, budget: int) -> tuple[Round, Path]:
        """Make a candidate, its GGUF file within the budget, and measure both its structure and the whole."""
        began = time.monotonic()
        made = [*self.vocabulary, *plan.structure.stages(self.whole.layers)]
        recover = list(self.settings.recover) if plan.structure != Structure() else []
        structure_loss = plan.structure_loss
        if plan.structure.narrower or recover:
            out = self._compressed(f"structure-{number}", [*made, *recover])
            structure_loss, _ = self._kl(View.of(Checkpoint.open(out)))
            shutil.rmtree(out)
        wanted = budget
        for attempt in range(4):
            recipe = [*made, *recover, {"quantize": {"file_bytes": wanted}}]
            out = self._compressed(f"round-{number}-{attempt}", recipe)
            file = self.work / f"round-{number}.gguf"
            file.unlink(missing_ok=True)
            export_gguf(Checkpoint.open(out), file)
            size = file.stat().st_size
            if size <= budget:
                break
            shutil.rmtree(out)
            wanted -= size - budget + (64 << attempt)
        else:
            raise StudyError(f"the file of {plan.structure.name} stays above {human_bytes(budget)} ({human_bytes(size)}); "
                             "report this, with the model's name")
        loss, error = self._kl(View.of(Checkpoint.open(out)))
        speed = measure_gguf_speed(file).decode_tokens_per_s if self.target.faster_than else None
        return Round(number, plan.structure.name, recipe, plan.loss, loss, error, plan.structure_loss, structure_loss, size,
                     speed, round(time.monotonic() - began, 1)), out

    def _tell(self, one: Round) -> None:
        speed = "" if one.decode_tokens_per_s is None else f", {one.decode_tokens_per_s:.1f} tokens/s"
        self.say(f"round {one.number}: {one.structure}: predicted {one.predicted:.4f}, measured {one.measured:.4f} ± "
                 f"{one.error:.4f}, {human_bytes(one.bytes)}{speed} ({one.seconds:.0f} s)")

    def _finish(self, best: Round, rounds: list[Round], places: dict[int, Path], measured: Measured,
                corrections: Corrections) -> Fitted:
        kept = self.out / "model.gguf"
        file = self.work / f"round-{best.number}.gguf"
        read_back(file)
        found = evaluate_perplexity(Checkpoint.open(places[best.number]), self.compared_text, source="held-out text",
                                    context=self.settings.window, limit=self.settings.compared,
                                    reference=Checkpoint.open(self.model), name="fitted", reference_name=self.model)
        holds = abs(best.predicted - best.measured) <= HOLDS * best.measured
        file.replace(kept)
        places[best.number].replace(self.out / "model")
        evaluation = {key: value for key, value in found.plain().items() if key != "fits"}
        fitted = Fitted(self.out / "model", kept, self.target, best, tuple(rounds), measured, corrections, holds,
                        round(time.monotonic() - self.began, 1), evaluation)
        write_json(self.out / "fit.json", fitted.plain() | {"model": self.model, "source": self.checkpoint.fingerprint(),
                                                            "settings": asdict(self.settings)})
        shutil.rmtree(self.work)
        return fitted
