"""The checkpoint that one pass writes: layer by layer, each in the journal when it is safe, then everything else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from tsotsallm.checkpoint.adapter import LowRank, is_adapter, owner_of
from tsotsallm.checkpoint.reader import PACKED, Checkpoint, layer_prefix, read_packed
from tsotsallm.checkpoint.shards import Piece, read_header, sha256
from tsotsallm.checkpoint.view import View
from tsotsallm.checkpoint.writer import Writer
from tsotsallm.errors import ResumeError
from tsotsallm.journal import Journal, LayerWritten
from tsotsallm.numerics.grids import Grid, grid_from
from tsotsallm.training.loop import Curve
from tsotsallm.training.trainee import LayerChanges

Grids = dict[str, Grid | None]
"""Linear -> the grid that it is stored on, None for dense."""


class Output:
    """A pass's checkpoint while it is written; layers that an interrupted attempt finished are taken over."""

    def __init__(self, directory: Path, journal: Journal, number: int) -> None:
        self.writer = Writer(directory)
        self.journal, self.number = journal, number
        self.grids: dict[int, Grids] = {}
        self.digests: dict[int, str | None] = {}
        for entry in journal.find(LayerWritten, number):
            part = self.writer.part(entry.layer)
            if entry.sha256 and (not part.exists() or sha256(part) != entry.sha256):
                raise ResumeError(f"{part} is not what was written there; begin again with --restart")
            self.grids[entry.layer] = {name: None if grid is None else grid_from(grid) for name, grid in entry.grids.items()}

    @property
    def finished_layers(self) -> int:
        """Layers that the journal holds as written."""
        return len(self.journal.find(LayerWritten, self.number))

    def settled(self, index: int, curve: Curve | None = None) -> None:
        """Note that the layer and all that the next one needs are on disk; `curve` is that of its training."""
        grids = {name: grid.plain() if grid is not None else None for name, grid in self.grids[index].items()}
        self.journal.add(LayerWritten(self.number, index, self.digests[index], grids, curve))

    def write(self, view: View, index: int, learned: LayerChanges) -> None:
        """Write what became of a layer of `view`, and everything else of it as stored."""
        written: dict[str, Piece] = {}
        grids = self.grids[index] = {}
        prefix = layer_prefix(view.stored(index))
        edited, beside = learned.merged, learned.beside
        for name, stored in view.layer_records(index).items():
            module, _, leaf = name.rpartition(".")
            owner = owner_of(name) if is_adapter(name) else module
            if name in learned.changed:
                written[name] = learned.changed[name]
                continue
            if (owner in edited and leaf in ("weight", *PACKED)) or (owner in {*edited, *beside} and is_adapter(name)):
                continue
            view.checkpoint.require_finite(prefix + name)
            written[name] = stored
            if name.endswith((".weight_packed", ".weight_blocks")):
                grids[module] = view.checkpoint.grid_of(prefix + module)
            elif name.endswith(".weight") and len(stored.shape) == 2 and not is_adapter(name):
                grids[module] = None
        for name, linear in edited.items():
            written |= linear.tensors()
            grids[name] = linear.stored.grid if linear.stored is not None else None
        for name, low_rank in beside.items():
            written |= low_rank.tensors(name)
        self.digests[index] = self.writer.write_layer(index, written)

    def write_dense(self, index: int, tensors: dict[str, Tensor]) -> None:
        """Write a layer of which every tensor is new."""
        self.grids[index] = {name.removesuffix(".weight"): None for name, tensor in tensors.items() if tensor.ndim == 2}
        self.digests[index] = self.writer.write_layer(index, dict(tensors))

    def repeat(self, index: int, original: int, *, by_name: bool) -> None:
        """Give a layer what an earlier one has: by name only, or written out."""
        self.grids[index], self.digests[index] = self.grids[original], None
        if not by_name:
            stored = read_header(self.writer.part(original)).items()
            self.digests[index] = self.writer.write_layer(
                index, {name.removeprefix(layer_prefix(original)): record for name, record in stored})

    def read(self, index: int) -> dict[str, Tensor]:
        """The effective float32 tensors of a layer written earlier."""
        prefix = layer_prefix(index)
        records = {name.removeprefix(prefix): record for name, record in read_header(self.writer.part(index)).items()}
        tensors = {f"{name}.weight": read_packed(records, name, grid).unpack().dequantise()
                   for name, grid in self.grids[index].items() if grid is not None}
        tensors |= {name: record.read().float() for name, record in records.items()
                    if name.rpartition(".")[2] not in PACKED and not is_adapter(name)}
        for name in self.grids[index]:
            if (found := LowRank.read(records, name)) is not None:
                tensors[f"{name}.weight"] = found.added_to(tensors[f"{name}.weight"])
        return tensors

    def finish(self, source: Checkpoint, view: View, first_visit: list[int], ends: dict[str, Tensor],
               end_grids: Mapping[str, Grid], config: Mapping[str, object] | None = None) -> None:
        """Write what is not a layer, and join the parts; layers with an earlier `first_visit` are stored by name only.

        `ends` stand in place of the matrices that `end_grids` names, `config` in place of the view's.
        """
        layers = view.spec.layers
        written: dict[str, Piece] = {}
        named: Grids = dict(end_grids)
        for name, piece in view.checkpoint.end_pieces().items():
            module = name.rpartition(".")[0]
            if module in end_grids:
                continue
            view.checkpoint.require_finite(name)
            written[name] = piece
            if view.checkpoint.is_packed(module):
                named[module] = view.checkpoint.grid_of(module)
        written.update(ends)
        self.writer.write_ends(written, layers)
        source.source.release()
        unique = [index for index in range(layers) if first_visit[index] == index]
        place = {index: number for number, index in enumerate(unique)}
        named |= {layer_prefix(place[index]) + name: grid for index in unique for name, grid in self.grids[index].items()}
        order = [place[first] for first in first_visit] if len(unique) < layers else None
        self.writer.finish(source, config or view.spec.config, named, order, unique, layers)
