"""The text that models are calibrated on: files, conversations, data sets of the hub and what the model writes itself,
alone or several with shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tsotsallm import hub
from tsotsallm.checkpoint.codec import TextCodec
from tsotsallm.checkpoint.reader import Checkpoint, embedded_directory
from tsotsallm.engine.selftext import SelfText
from tsotsallm.errors import ConversationError, CorpusError, TsotsallmError
from tsotsallm.files import one_line, quoted
from tsotsallm.lab.texts import world_text
from tsotsallm.recipe import Recipe
from tsotsallm.streaming import corpus as texts
from tsotsallm.streaming.corpus import Corpus
from tsotsallm.streaming.sweep import Tick, silent
from tsotsallm.training.samples import is_instructions, read_conversations

DEFAULT_TEXT = "allenai/c4"
USUAL_WINDOW = 1024
SELF = "self"
"""The source that stands for text which the model writes itself, where no file or directory has this name."""


@dataclass(frozen=True)
class Calibration:
    """Where calibration text comes from, and how much of it is used."""

    source: str | None = None
    windows: int = 32
    window: int = 1024
    seed: int = 0


@dataclass(frozen=True)
class Source:
    """A file, a directory, a data set of the hub or `self`, and its share of the windows, 0 to 1."""

    name: str
    share: float = 1.0

    @property
    def is_self(self) -> bool:
        """Whether the model writes this text itself."""
        return self.name == SELF and not Path(SELF).exists()


def sources_of(given: str) -> list[Source]:
    """The sources of `a.txt`, or of `novels/:0.5,chats.jsonl:0.3,allenai/c4`; those without a share have equal parts of
    what is left.

    Raises CorpusError where shares do not add up to 1.
    """
    if Path(given).exists() or not given.strip():
        return [Source(given)]
    parts = [_named(part.strip()) for part in given.split(",")]
    if any(not name for name, _ in parts):
        raise CorpusError(f"--calibration {quoted(given)} has an empty name; it takes a text, or several as "
                          "novels/:0.5,chats.jsonl:0.5")
    stated = sum(share for _, share in parts if share is not None)
    open_ = sum(share is None for _, share in parts)
    if stated > 1 + 1e-9 or (open_ and stated >= 1) or (not open_ and abs(stated - 1) > 1e-6):
        raise CorpusError(f"the shares in --calibration {quoted(given)} add up to {stated:g}; together they must be 1, and "
                          "what has no share takes what is left")
    return [Source(name, (1 - stated) / open_ if share is None else share) for name, share in parts]


def _named(part: str) -> tuple[str, float | None]:
    name, colon, share = part.rpartition(":")
    try:
        value = float(share) if colon else -1.0
    except ValueError:
        value = -1.0
    return (name, value) if 0 < value <= 1 else (part, None)


def elsewhere(given: str, places: Mapping[str, str]) -> str:
    """The same sources by the paths that they have in another place."""
    if given in places:                 # a name that has a comma itself, which only where it comes from is seen to exist
        return places[given]
    found = sources_of(given)
    names = [places.get(source.name, source.name) for source in found]
    return names[0] if len(found) == 1 else ",".join(
        f"{name}:{source.share:.9g}" for name, source in zip(names, found, strict=True))


@dataclass(frozen=True)
class CalibrationText:
    """The text of each source, with its share of the windows, and what the text is called."""

    parts: tuple[tuple[str, float], ...]
    source: str

    @property
    def whole(self) -> str:
        """The texts one after another."""
        return "\n\n".join(text for text, _ in self.parts)

    def cut(self, share: float) -> tuple[CalibrationText, CalibrationText]:
        """The first `share` of every text, and the rest."""
        cuts = [(text, int(len(text) * share), part) for text, part in self.parts]
        return (replace(self, parts=tuple((text[:place], part) for text, place, part in cuts)),
                replace(self, parts=tuple((text[place:], part) for text, place, part in cuts)))

    def corpus(self, codec: TextCodec, asked: Calibration) -> Corpus:
        """Windows drawn by the seed, each source's number of them by its share; see `streaming.corpus.calibration`.

        Raises CorpusError where a source would get none.
        """
        counts = shared_out(asked.windows, [share for _, share in self.parts])
        if 0 in counts:
            raise CorpusError(f"of {asked.windows} windows source {counts.index(0) + 1} in {self.source} gets none; take "
                              "more --windows, or give it a larger share")
        drawn = [texts.calibration(text, codec, windows=count, length=asked.window, seed=asked.seed, source=self.source)
                 for (text, _), count in zip(self.parts, counts, strict=True)]
        return Corpus(tuple(window for part in drawn for window in part.windows), self.source)

    def written(self, folder: Path) -> str:
        """Write the texts into a folder; returns what names them as a calibration."""
        folder.mkdir(parents=True, exist_ok=True)
        names = []
        for number, (text, share) in enumerate(self.parts, 1):
            path = folder / f"calibration-{number}.txt"
            path.write_text(text, "utf-8")
            names.append(str(path) if len(self.parts) == 1 else f"{path}:{share:.9g}")
        return ",".join(names)


def shared_out(count: int, shares: Sequence[float]) -> list[int]:
    """`count` split by shares into whole numbers, by largest remainders, the first of equal ones first."""
    exact = [count * share / sum(shares) for share in shares]
    found = [int(value) for value in exact]
    by_rest = sorted(range(len(shares)), key=lambda place: found[place] - exact[place])
    for place in by_rest[:count - sum(found)]:
        found[place] += 1
    return found


def window_of(checkpoint: Checkpoint, asked: int | None, usual: int = USUAL_WINDOW) -> int:
    """The length of windows: what is asked for; None: the usual length, or all positions that the model knows where those
    are fewer. Raises CorpusError where more are asked for than it knows."""
    known = checkpoint.spec.context
    if asked is None:
        return min(usual, known)
    if asked > known:
        raise CorpusError(f"a window of {asked} tokens is longer than the {known} positions that the model knows; choose "
                          f"--window {known} or less")
    return asked


def check_windows(checkpoint: Checkpoint, calibration: Calibration) -> None:
    """Raise where a model cannot be calibrated with so many windows of such a length."""
    if calibration.windows < 1 or calibration.window < 2:
        raise CorpusError(f"{calibration.windows} windows of {calibration.window} tokens cannot calibrate; "
                          "take at least one window of 2 tokens")
    window_of(checkpoint, calibration.window)


def calibration_text(checkpoint: Checkpoint, calibration: Calibration, recipe: Recipe | None = None, *,
                     to_train: bool = False, tick: Tick = silent) -> CalibrationText:
    """The text that a recipe works on; without a source the embedded model's world, or the hub's C4.

    What the model writes itself is written now, where it was not before; `tick` shows how far it is.
    """
    if calibration.source is None and _is_embedded(checkpoint):
        return CalibrationText(((world_text(test=False, characters=5_000_000 if to_train else 400_000), 1.0),),
                               "the embedded world")
    given = calibration.source or DEFAULT_TEXT
    written = self_text(checkpoint, calibration)
    return CalibrationText(tuple((
        written.text(tick) if written is not None and source.is_self else
        _read(checkpoint, source.name, calibration, recipe), source.share) for source in sources_of(given)), given)


def self_text(checkpoint: Checkpoint, calibration: Calibration) -> SelfText | None:
    """What the model writes for the share that `self` has in a calibration; None where it has none. Writes nothing."""
    sources = sources_of(calibration.source or DEFAULT_TEXT)
    counts = shared_out(calibration.windows, [source.share for source in sources])
    count = max((count for source, count in zip(sources, counts, strict=True) if source.is_self), default=None)
    return None if count is None else SelfText(checkpoint, max(count, 1), calibration.window, calibration.seed)


def self_text_note(checkpoint: Checkpoint, calibration: Calibration) -> str | None:
    """What a plan says about text that the model is still to write; None where there is none, or it is written already."""
    found = self_text(checkpoint, calibration)
    if found is None or found.kept:
        return None
    return (f"the model first writes its own calibration text, about {found.tokens} tokens, with all of it in memory "
            "(some minutes, once)")


def with_self_written(checkpoint: Checkpoint, calibration: Calibration) -> str | None:
    """The sources of a calibration with the file of what the model writes in the place of `self`; it is written now.

    For other computers, whose own arithmetic would give another text.
    """
    found = self_text(checkpoint, calibration)
    given = calibration.source
    return given if given is None or found is None else elsewhere(given, {SELF: str(found.text_file())})


def _read(checkpoint: Checkpoint, name: str, calibration: Calibration, recipe: Recipe | None) -> str:
    if not hub.is_name(name):
        return conversations(checkpoint.codec, name) if is_instructions(name) else texts.read_text(name)
    if (obstacle := hub.obstacle()) is not None:
        raise CorpusError(_without_text(calibration, recipe, name, obstacle))
    try:
        return texts.hub_text(name)
    except TsotsallmError as error:
        raise CorpusError(_without_text(calibration, recipe, name, one_line(error))) from None


def conversations(codec: TextCodec, source: str) -> str:
    """The conversations of a .jsonl or .json file in the model's chat template, one after another.

    Raises CorpusError where the model does not converse, or with the line of a fault.
    """
    found = []
    for number, messages in read_conversations(source):
        if codec.chat is None:
            raise CorpusError(f"{source} holds conversations, but the tokenizer {codec.no_chat}; calibrate on text")
        try:
            found.append(codec.render(messages, answer=False))
        except ConversationError as error:
            raise CorpusError(f"{source}, line {number}: {error}") from None
    return "".join(found)


def read_sources(given: str) -> None:
    """Raise CorpusError where a source on this computer cannot be read; one that the model writes is not asked for."""
    for source in sources_of(given):
        if not hub.is_name(source.name) and not source.is_self:
            (read_conversations if is_instructions(source.name) else texts.read_text)(source.name)


def calibration_corpus(checkpoint: Checkpoint, calibration: Calibration, tick: Tick = silent) -> Corpus:
    """The token windows to calibrate on."""
    check_windows(checkpoint, calibration)
    return calibration_text(checkpoint, calibration, tick=tick).corpus(checkpoint.codec, calibration)


def text_obstacle(checkpoint: Checkpoint, calibration: Calibration, recipe: Recipe) -> str | None:
    """Why a recipe would be refused for want of text, and what can be done; None where there is text. Reads none."""
    if not recipe.needs_text or (calibration.source is None and _is_embedded(checkpoint)):
        return None
    written = self_text(checkpoint, calibration)
    if written is not None and (obstacle := written.obstacle()) is not None:
        return obstacle
    named = [source.name for source in sources_of(calibration.source or DEFAULT_TEXT) if hub.is_name(source.name)]
    if not named:
        return None
    obstacle = hub.obstacle()
    return None if obstacle is None else _without_text(calibration, recipe, named[0], obstacle)


def _without_text(calibration: Calibration, recipe: Recipe | None, source: str, obstacle: str) -> str:
    """What to do where a text is out of reach; every remedy in a line's length."""
    found = "none is given" if calibration.source is None else f"{source} is out of reach"
    size = calibration.windows * calibration.window * 5 // 1000
    other = recipe.without_text() if recipe is not None else None
    ways = [f"without text, at a higher loss: {other.line()}" if other is not None else
            "without text: another recipe, such as rtn:4"] if recipe is not None else []
    ways += [f"with a text of your own: --calibration FILE or DIR, about {size} kB of ordinary prose in the languages that "
             "matter to you", f"with text that the model writes itself, some minutes: --calibration {SELF}",
             f"with {source} from the hub: {obstacle}"]
    return f"calibration text is needed, and {found}; {'; '.join(ways)}"


def writes_its_text(checkpoint: Checkpoint) -> bool:
    """Whether a model without a text given is best calibrated on what it writes itself: one that converses, other than the
    embedded one, whose world is at hand."""
    return checkpoint.codec.chat is not None and not _is_embedded(checkpoint)


def _is_embedded(checkpoint: Checkpoint) -> bool:
    try:
        return checkpoint.directory.resolve() == embedded_directory().resolve()
    except TsotsallmError:
        return False
