"""What a recipe fetches of a model on the hub, both ways: all of it first, or layer by layer; and which way is chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tsotsallm.checkpoint.hub_source import Streamed
from tsotsallm.checkpoint.reader import Checkpoint, locate
from tsotsallm.checkpoint.spec import EMBEDDING
from tsotsallm.errors import HubError
from tsotsallm.machine import free_disk_bytes
from tsotsallm.recipe import Sweep
from tsotsallm.records import Record
from tsotsallm.stages.contract import Model
from tsotsallm.units import human_bytes

MORE = 1.02
"""Streaming that fetches at most this many times the model's bytes counts as fetching them once."""
ROOM = 0.9
"""Share of the free disk that a whole download may take."""
WHOLE, STREAMED = "whole", "streamed"


@dataclass(frozen=True)
class Download(Record):
    """What a model on the hub takes to read, in bytes; disk is what is needed besides that of the run itself.

    model           its name with the commit that is read
    way             whole: downloaded into the hub client's cache first; streamed: layer by layer
    cache_bytes     the bound of what streaming keeps on disk
    layer_visits    how often the recipe reads every layer
    again           what streaming fetches more than once -> bytes beyond the first time
    free_bytes      on the disk of the client's cache
    """

    model: str
    way: str
    whole_bytes: int
    whole_disk_bytes: int
    streamed_bytes: int
    cache_bytes: int
    layer_visits: int
    free_bytes: int
    again: dict[str, int] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """To be downloaded in the way that is chosen."""
        return self.whole_bytes if self.way == WHOLE else self.streamed_bytes

    def lines(self) -> list[str]:
        """Both ways, and which one is chosen."""
        lines = [f"{human_bytes(self.whole_bytes)} whole, with {human_bytes(self.whole_disk_bytes)} more disk, which stay "
                 f"for other commands ({human_bytes(self.free_bytes)} are free there)",
                 f"{human_bytes(self.streamed_bytes)} layer by layer, with {human_bytes(self.cache_bytes)} more disk",
                 "chosen: " + ("whole" if self.way == WHOLE else "layer by layer")]
        if self.again:
            lines.insert(2, "of these " + " and ".join(f"{human_bytes(size)} of {what}" for what, size in self.again.items())
                         + " more than once, since they do not stay in the cache; --cache-bytes sets its bound")
        return lines


def planned_download(checkpoint: Checkpoint, sweeps: Sequence[Sweep], models: Sequence[Model],
                     cache_bytes: int | None) -> Download | None:
    """What a recipe fetches of a model on the hub; None for a model on disk. `models[i]` is the model before stage i.

    `cache_bytes` is the user's bound, with which it streams; None: what the recipe needs. The cache is bounded by it.
    Raises HubError where the user's bound is too small.
    """
    source = checkpoint.source
    if not isinstance(source, Streamed):
        return None
    sizes, visits = source.sizes(), _visits(sweeps, models)
    text = any(sweep.needs.text or any(choice.needs.text for choice in sweep.choices) or sweep.training for sweep in sweeps)
    least = source.least_cache_bytes()
    if cache_bytes is not None and cache_bytes < least:
        raise HubError(f"--cache-bytes is {human_bytes(cache_bytes)}, but a layer or a matrix of "
                       f"{source.pinned.split('@')[0]} and what is on its way take {human_bytes(least)}; give at least that")
    bound = source.least_cache_bytes(embeddings=text) if cache_bytes is None else cache_bytes
    source.bound(bound, keeps=cache_bytes is not None)
    again: dict[str, int] = {}
    if bound < sizes.tensors + sizes.headers:
        embeddings = sum(size for name, size in sizes.ends.items() if name.startswith(EMBEDDING.removesuffix(".weight")))
        if visits > 1:
            again["the layers"] = (visits - 1) * sum(sizes.layers.values())
        if text and bound < source.least_cache_bytes(embeddings=True):
            again["the embeddings"] = embeddings
    streamed = sizes.tensors + sizes.headers + sum(again.values())
    free = free_disk_bytes(_client_cache())
    whole = cache_bytes is None and streamed > MORE * sizes.whole and sizes.whole < ROOM * free
    return Download(source.pinned, WHOLE if whole else STREAMED, sizes.whole, sizes.whole, streamed,
                    min(bound, sizes.whole), visits, free, again)


def fetch_if_room(model: str | Path, say: Callable[[str], None]) -> None:
    """Download a model on the hub whole where the disk holds it, for work that reads it many times; `say` reports which way.

    What is opened with `Checkpoint.streamed` is then on disk. Raises HubError where the hub does not give it.
    """
    source = Checkpoint.streamed(model).source
    if not isinstance(source, Streamed):
        return
    size, free = source.sizes().whole, free_disk_bytes(_client_cache())
    if size < ROOM * free:
        say(f"{model} is read many times: {human_bytes(size)} are downloaded whole first, and stay for other commands")
        locate(source.pinned)
    else:
        say(f"{model} is read many times, and its {human_bytes(size)} do not fit on the disk, of which {human_bytes(free)} "
            "are free: its layers are fetched again each time")


def _visits(sweeps: Sequence[Sweep], models: Sequence[Model]) -> int:
    """How often the passes of a recipe read every layer of the source."""
    visits, on_source, aimed = 0, True, True
    for number, sweep in enumerate(sweeps):
        on_source = number == 0 or (on_source and sweep.does_over)
        if on_source:
            visits += 1 + sum(stage.visits(models[sweep.first + place]) for place, stage in enumerate(sweep.stages))
            visits += 2 if sweep.needs.token_weights else 0
        elif aimed and sweep.edits:
            visits += 1                 # corrections aim at the source
        aimed = aimed and sweep.training is None and sweep.rewriting is None
    return visits


def _client_cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)
