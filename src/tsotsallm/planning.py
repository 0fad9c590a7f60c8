"""The forecast: memory, disk, operations, the floor of the time, resulting bytes; no tensor is read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.checkpoint.shapes import input_groups, layer_shapes, linear_shapes
from tsotsallm.checkpoint.spec import EMBEDDING, ModelSpec
from tsotsallm.downloads import STREAMED, Download, planned_download
from tsotsallm.errors import ResourceError
from tsotsallm.machine import (
    chosen_by_caller,
    free_disk_bytes,
    free_ram_bytes,
    gemm_flops_per_second,
    require_disk,
    rss_bytes,
)
from tsotsallm.numerics.rounding import OUTPUTS
from tsotsallm.pace import Kind, expected
from tsotsallm.recipe import Recipe, Sweep
from tsotsallm.records import Record
from tsotsallm.stages.contract import LayerFile, Model, Needs, Stage
from tsotsallm.stages.costs import (
    Conditions,
    Cost,
    activation_bytes,
    forward_flops,
    gradient_bytes_per_token,
    layer_weights,
)
from tsotsallm.streaming.hidden import batch_tokens
from tsotsallm.streaming.sweep import FEW, follows_alone
from tsotsallm.units import human_bytes

FILE_BYTES = 64 << 10
"""Of a result besides its tensors: headers, config, provenance."""
ENLARGED = 1.01
"""A file that is less than this many times as large as its source does not count as larger: norms and headers differ."""
BYTES_EDITED = 2
"""For each weight of a linear that was edited, until the layer is written: its codes, or values as they are stored."""
ARENA_BYTES = 150 << 20
"""Memory that matrix libraries and the allocator take beyond our tensors (measured: 60 to 140 MB)."""


@dataclass(frozen=True)
class SweepForecast:
    """One pass: its stages, peak memory, scratch on disk, operations and the shortest time they can take here.

    engine      how a pass that trains does so: resident or streamed
    weights     in the linears that it visits
    expected_s  how long it is likely to take, by `runs` passes like it on this computer (none: by passes elsewhere)
    """

    stages: list[str]
    layers: int
    ram_bytes: int
    scratch_bytes: int
    flops: float
    floor_s: float
    engine: str
    weights: int
    kind: Kind
    expected_s: float
    runs: int


@dataclass(frozen=True)
class Forecast(Record):
    """What a recipe will take and give. Bytes of the result are an upper bound that is exact but for headers.

    recipe    as one line, with what it left to the model's widths written out
    download  what it fetches of a model on the hub; None for a model on disk
    """

    recipe: str
    sweeps: list[SweepForecast]
    windows: int
    window: int
    parameters: int
    result_parameters: int
    bytes: int
    result_bytes: int
    disk_bytes: int
    free_ram_bytes: int
    free_disk_bytes: int
    flops_per_second: float
    warnings: list[str] = field(default_factory=list)
    download: Download | None = None

    @property
    def ram_bytes(self) -> int:
        """Peak memory of the largest pass, the interpreter included."""
        return max(sweep.ram_bytes for sweep in self.sweeps)

    @property
    def floor_s(self) -> float:
        """The shortest time that all passes can take on this machine, in seconds."""
        return sum(sweep.floor_s for sweep in self.sweeps)

    @property
    def expected_s(self) -> float:
        """How long all passes are likely to take, in seconds."""
        return sum(sweep.expected_s for sweep in self.sweeps)

    @property
    def runs(self) -> int:
        """How many passes on this computer the least known pass is judged by."""
        return min(sweep.runs for sweep in self.sweeps)

    def refuse_if_too_large(self, out: Path, already: int = 0) -> None:
        """Raise ResourceError when free memory or disk cannot hold the run, of which `already` bytes are on disk."""
        if self.ram_bytes > self.free_ram_bytes + rss_bytes():
            raise ResourceError(
                f"the run needs {human_bytes(self.ram_bytes)} of memory and {human_bytes(self.free_ram_bytes)} are free; "
                "close other programs, choose method rtn or magnitude (no Gram), or try anyway with --force")
        require_disk("the run", self.disk_bytes, out.parent, already=already,
                     remedy="make room, write to another disk with -o, calibrate on fewer windows, or try anyway with "
                            "--force")

    def plain(self) -> dict[str, object]:
        """The forecast as plain data for JSON."""
        return super().plain() | {"ram_bytes": self.ram_bytes, "floor_s": self.floor_s,
                                "expected_s": self.expected_s}


def make_plan(checkpoint: Checkpoint, recipe: Recipe, out: Path, *, windows: int, window: int,
              device: str = "cpu", keep_stages: bool = False, cache_bytes: int | None = None) -> Forecast:
    """Check a recipe against a checkpoint and forecast its run on `windows` of `window` tokens (at most its context).

    `cache_bytes` bounds what is kept on disk of a model on the hub; None: what the recipe needs.
    """
    spec = whole_spec(checkpoint)
    window = min(window, spec.context)
    recipe.check(spec, sparse=checkpoint.is_sparse)
    recipe = recipe.resolved(spec)
    rate = gemm_flops_per_second("float32", device)
    base = max(rss_bytes(), 400 << 20) + ARENA_BYTES
    before_ends = sum(record.size for record in checkpoint.end_records().values())
    tokens = checkpoint.shape_of(EMBEDDING)[0]
    ends = before_ends * spec.vocabulary // tokens if spec.vocabulary < tokens else before_ends
    stored = {layer: sum(record.size for record in checkpoint.layer_records(layer).values())
              for layer in checkpoint.names_by_layer}
    packed = {layer: any(name.endswith((".weight_packed", ".weight_blocks")) for name in names)
              for layer, names in checkpoint.names_by_layer.items()}
    start = Model(whole_spec(checkpoint), tuple(
        LayerFile(layer, stored[layer], packed[layer]) for layer in checkpoint.spec.layer_order), ends,
        checkpoint.storage.itemsize, checkpoint.is_sparse, spec.quantization is not None,
        from_gguf=checkpoint.source.keeps_types)
    models = recipe.models(start)
    conditions = Conditions(windows, window, free_ram_bytes() + rss_bytes() - base)
    planned = recipe.sweeps(one_stage_each=keep_stages)
    sweeps: list[SweepForecast] = []
    results: list[int] = []
    notes: list[str] = [*checkpoint.notes]
    for number, sweep in enumerate(planned, 1):
        cost, model = _sweep_cost(sweep, recipe.stages, models, conditions), models[sweep.last + 1]
        weights = sum(layer_weights(model.spec, layer) for layer in range(model.spec.layers))
        kind = _kind_of(sweep, cost, device)
        likely = expected(kind, cost.flops / rate, weights)
        sweeps.append(SweepForecast([stage.name for stage in sweep.stages], len(model.layers), base + cost.ram_bytes,
                                    cost.scratch_bytes, cost.flops, cost.flops / rate, cost.engine, weights, kind,
                                    likely.seconds, likely.runs))
        notes += [note for stage in sweep.stages for note in stage.remarks(models[sweep.last + 1])]
        # a pass before the last writes repeats out
        results.append(FILE_BYTES + replace(models[sweep.last + 1],
                                            shares_repeats=recipe.shared and number == len(planned)).bytes)
    last, spec = models[-1], models[-1].spec
    kept_layers = {layer.source for layer in last.layers} if recipe.shared else last.layers
    widest = max(d_in for _, d_in in linear_shapes(spec, 0).values())
    warnings = notes
    if any(sweep.needs.gram for sweep in planned) and windows * window < widest:
        warnings.append(f"{windows * window} calibration tokens are fewer than the {widest} inputs of the widest linear: "
                        "its Gram has not full rank, damping covers it; more windows are better")
    if any(sweep.needs.held_out for sweep in planned) and windows * window < FEW * widest:
        warnings.append(f"{windows * window} calibration tokens are little for {widest} inputs: linears with more than "
                        f"{windows * window // FEW} hold out a quarter of them, and are rounded to nearest where that has "
                        "the smaller error there")
    source_bytes = before_ends + sum(stored.values())
    if (larger := enlarged("the result", results[-1] - FILE_BYTES, source_bytes)) is not None:
        warnings.append(larger)
    # a sweep reads the result before it, and joins its parts into shards while both are on disk
    kept = [sum(results[:number] if keep_stages else results[max(number - 1, 0):number]) for number in range(len(results))]
    disk = max(before + 2 * result for before, result in zip(kept, results, strict=True))
    download = planned_download(checkpoint, planned, models, cache_bytes)
    fetched = 0 if download is None else download.cache_bytes if download.way == STREAMED else download.whole_disk_bytes
    return Forecast(
        recipe.line(), sweeps, windows, window, parameters_of(checkpoint.spec, range(checkpoint.spec.stored_layers), tokens),
        parameters_of(spec, range(len(kept_layers))), source_bytes, results[-1],
        disk + fetched + max(sweep.scratch_bytes for sweep in sweeps), free_ram_bytes(), free_disk_bytes(out), rate,
        warnings, download)


def _kind_of(sweep: Sweep, cost: Cost, device: str) -> Kind:
    needs = [item.name for item in fields(Needs) if getattr(sweep.needs, item.name)]
    return Kind(Recipe(sweep.stages).line(), " ".join([*needs, cost.engine]).strip(), chosen_by_caller(),
                bool(cost.engine), device)


def enlarged(what: str, size: int, source: int) -> str | None:
    """What to tell whoever is about to write a file that is larger than its source; None where it is not, sizes in bytes."""
    if size <= ENLARGED * source:
        return None
    return (f"{what} takes {human_bytes(size)}, more than the {human_bytes(source)} of its source; for a smaller file take "
            "a grid of GGUF (gptq:q4_k), a mixture of them (gptq:mixed:4.5), or `tsotsallm fit` with a size")


def whole_spec(checkpoint: Checkpoint) -> ModelSpec:
    """The spec with every executed layer written out."""
    spec = checkpoint.spec
    return ModelSpec(spec.config, spec.quantization, tuple(range(spec.layers)))


def parameters_of(spec: ModelSpec, layers: range, tokens: int | None = None) -> int:
    """Numbers in embeddings, head and final norm, and in `layers` of a model; `tokens` in place of its own vocabulary."""
    ends = (tokens or spec.vocabulary) * spec.hidden * (1 if spec.tied else 2) + spec.hidden
    return ends + sum(math.prod(shape) for layer in layers for shape in layer_shapes(spec, layer).values())


def _sweep_cost(sweep: Sweep, stages: Sequence[Stage], models: Sequence[Model], conditions: Conditions) -> Cost:
    """What a pass takes: each of its stages, and what they need together. `models[i]` is the model before stage i."""
    cost = Cost()
    for place in range(sweep.first, sweep.last + 1):
        cost |= stages[place].forecast(models[place], conditions)
    edited = models[sweep.first + len(sweep.choices)]       # a choice of layers is made before any layer is edited
    if sweep.edits or sweep.rewriting is not None:
        spec = edited.spec
        needs = sweep.needs
        flops = sum(_observing_flops(spec, sweep, layer, conditions) for layer in range(spec.layers))
        ram = max(_editing_bytes(spec, sweep, layer, conditions.window) for layer in {0, spec.layers - 1})
        states = 4 * conditions.tokens * spec.hidden        # the hidden states of all windows, in float32
        scratch = (4 if needs.original_inputs else 2) * states if needs.gram else 0
        cost |= Cost(ram, scratch, flops)
        if needs.token_weights:
            cost = _with_token_weights(cost, spec, conditions)
    return cost


def _with_token_weights(cost: Cost, spec: ModelSpec, conditions: Conditions) -> Cost:
    """The cost of a pass with a sweep back through the model before it, whose results stay on disk."""
    tokens, window = conditions.tokens, conditions.window
    metrics = sum(d_out * min(d_out, OUTPUTS) for d_out, _ in linear_shapes(spec, 0).values())
    back = (int(1.25 * 4 * layer_weights(spec, 0)) + 4 * metrics + gradient_bytes_per_token(spec, window)
            * batch_tokens(spec.hidden))
    flops = 6.0 * tokens * spec.vocabulary * spec.hidden + sum(
        4 * forward_flops(spec, layer, tokens, window) for layer in range(spec.layers))
    return Cost(max(cost.ram_bytes + 2 * metrics, back),
                max(cost.scratch_bytes, (spec.layers + 4) * 4 * tokens * spec.hidden) + 2 * spec.layers * metrics,
                cost.flops + flops, cost.engine)


def _observing_flops(spec: ModelSpec, sweep: Sweep, layer: int, conditions: Conditions) -> float:
    """Operations of the inputs of a layer's linears, their Grams and factors, and of the layer's outputs."""
    needs, tokens = sweep.needs, conditions.tokens
    shapes = linear_shapes(spec, layer)
    groups = input_groups(shapes)
    flops = 0.0
    if needs.gram:
        forward = forward_flops(spec, layer, tokens, conditions.window)
        last = 2.0 * tokens * math.prod(shapes[list(shapes)[-1]])
        widths = [shapes[group[0]][1] for group in groups]
        flops += forward - last + 2.0 * tokens * sum(width ** 2 for width in widths)
        if needs.original_inputs:       # through the layer as it was, what differs, and what each linear makes of it
            flops += forward + sum(2.0 * d_out * d_in ** 2 for d_out, d_in in shapes.values())
            for group in groups:
                outputs, width = sum(shapes[name][0] for name in group), shapes[group[0]][1]
                flops += (4.0 * tokens * outputs * width if follows_alone([shapes[name] for name in group]) else
                          2.0 * (tokens + outputs) * width ** 2)
        if needs.second_observation:
            flops += forward - last + 2.0 * tokens * sum(shapes[group[0]][1] ** 2 for group in groups if len(group) == 1)
        if layer + 1 < spec.layers:
            flops += forward
    factors = sum(edit.needs.factor for edit in sweep.edits if edit.applies_to(layer, spec.layers))
    return flops + factors * sum(shapes[group[0]][1] ** 3 / 3 for group in groups)


def _editing_bytes(spec: ModelSpec, sweep: Sweep, layer: int, window: int) -> int:
    """Memory while a layer is edited: the weights and Grams of linears whose turn is still to come, what those before were
    given, and the working copies of the one that is edited."""
    edits, needs = sweep.edits, sweep.needs
    shapes = linear_shapes(spec, layer)
    weights, edited, peak = 4 * layer_weights(spec, layer), 0, 0
    copies = 4 if any(edit.surveys for edit in edits) else 1        # factors for several orders
    groups = input_groups(shapes)
    grams = [0] * len(groups)
    for place, group in enumerate(groups):
        width, alike = shapes[group[0]][1], [shapes[name] for name in group]
        if needs.gram:
            grams[place] += 4 * width ** 2 * copies
        if needs.original_inputs:
            grams[place] += 4 * (math.prod(alike[0]) if follows_alone(alike) else width ** 2)
    observed = weights + sum(grams) + activation_bytes(spec, window)
    # one factor stands in its Gram's place; with two edits that need factors the second is another matrix
    second_factor = sum(edit.needs.factor for edit in edits) > 1
    for place, group in enumerate(groups):
        for d_out, d_in in (shapes[name] for name in group):
            work = 4 * d_in ** 2 * second_factor + max((edit.work_bytes(d_out, d_in) for edit in edits),
                                                       default=16 * d_out * d_in)
            peak = max(peak, weights + edited + sum(grams[place:]) + work)
            if edits:
                weights -= 4 * d_out * d_in
                edited += BYTES_EDITED * d_out * d_in
    return max(observed, peak)
