"""How a fit works, and the smallest files that it can reach: arithmetic alone, before anything is measured."""

from __future__ import annotations

from dataclasses import dataclass

from tsotsallm.calibration import Calibration
from tsotsallm.checkpoint.spec import ModelSpec
from tsotsallm.compression import result_source
from tsotsallm.errors import StudyError
from tsotsallm.files import Json, JsonObject
from tsotsallm.fit.files import Files, Structure
from tsotsallm.fit.plans import Choices, Measured
from tsotsallm.fit.vocabularies import Vocabularies
from tsotsallm.planning import whole_spec
from tsotsallm.stages.neurons import Neurons
from tsotsallm.units import human_bytes

WIDTHS = (0.125, 0.25, 1 / 3, 0.5)


@dataclass(frozen=True)
class Settings:
    """How a fit works: texts, how much of them, how long.

    recover  stages that a cut model learns by before its matrices get their grids
    tune     the stage that the best candidate's numbers learn by, where minutes are left for it
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
    tune: JsonObject | None = None
    quick: bool = False

    @property
    def calibrated(self) -> Calibration:
        """How the calibration text is read."""
        return Calibration(self.calibration, self.windows, self.window, self.seed)

    @property
    def rounding(self) -> JsonObject:
        """Options of `quantize` for every candidate."""
        return {"couple": False, "passes": 0} if self.quick else {}


def files_of(model: str, vocabularies: Vocabularies, settings: Settings) -> Files:
    """The recipes and files of a model's candidates."""
    return Files(whole_spec(vocabularies.checkpoint(vocabularies.most)), vocabularies.entries, result_source(model),
                 settings.keep_text, settings.recover, settings.rounding)


def widths(whole: ModelSpec) -> list[float]:
    """Shares of neurons that can go: those that suit the grids, not those that were thought of."""
    left = [Neurons(feed_forward=share).kept_neurons(whole) for share in WIDTHS]
    return [1 - kept / whole.feed_forward for kept in dict.fromkeys(left) if kept != whole.feed_forward]


def removable(layers: int) -> int:
    """How many layers can go."""
    return layers // 2


def smallest(files: Files, vocabulary: int | None, removed: int, narrower: float) -> Choices:
    """The smallest file of a structure, whose size no measurement decides: every matrix on its smallest grid."""
    structure = Structure(tuple(range(removed)), narrower, vocabulary)
    return Choices.of(structure, files, Measured((), (), {}, {}))


def least(files: Files, vocabularies: Vocabularies) -> Choices:
    """The smallest file that a fit can make at all."""
    size = min(vocabularies.smaller(), default=vocabularies.most)
    return smallest(files, size, removable(files.whole.layers), max(widths(files.whole), default=0.0))


def require_reached(smallest: Choices, budget: int) -> None:
    """Raise StudyError where even the smallest file is larger than a budget."""
    if smallest.smallest > budget:
        structure = smallest.structure
        more = "" if structure.vocabulary is not None else ", or cut the vocabulary with --keep-text FILE"
        raise StudyError(f"the budget is {human_bytes(budget)}, but the smallest that this model can become here takes "
                         f"{human_bytes(smallest.smallest)} ({structure.name}, every matrix on its smallest grid); give "
                         f"more{more}")
