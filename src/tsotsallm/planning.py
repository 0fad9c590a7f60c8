"""The forecast: memory, disk, operations, the floor of the time, resulting bytes; no tensor is read."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.checkpoint.shapes import input_groups, layer_shapes, linear_shapes
from tsotsallm.checkpoint.spec import EMBEDDING, ModelSpec
from tsotsallm.errors import ResourceError
from tsotsallm.machine import free_disk_bytes, free_ram_bytes, gemm_flops_per_second, rss_bytes
from tsotsallm.numerics.rounding import OUTPUTS
from tsotsallm.recipe import Recipe, Sweep
from tsotsallm.stages.base import LayerChoice
from tsotsallm.stages.depth import Depth
from tsotsallm.stages.layers import Layers
from tsotsallm.stages.retraining import Retraining
from tsotsallm.streaming.hidden import BATCH_TOKENS
from tsotsallm.training.engines import HEAD_ROWS, MICRO_TOKENS
from tsotsallm.training.samples import MOST_HELD_OUT
from tsotsallm.units import human_bytes

HEADER_BYTES_PER_TENSOR = 200
FILE_BYTES = 64 << 10
RESIDENT_SHARE = 0.8
"""A whole model is trained in memory when it takes at most so much of what is free."""
ARENA_BYTES = 150 << 20
"""Memory that matrix libraries and the allocator take beyond our tensors (measured: 60 to 140 MB)."""


@dataclass(frozen=True)
class SweepForecast:
    """One pass: its stages, peak memory, scratch on disk, operations and the shortest time they can take here.

    `engine` says how a pass that trains does so: resident or streamed.
    """

    stages: list[str]
    layers: int
    ram_bytes: int
    scratch_bytes: int
    flops: float
    floor_s: float
    engine: str = ""


@dataclass(frozen=True)
class Forecast:
    """What a recipe will take and give. Bytes of the result are an upper bound that is exact but for headers.

    recipe  as one line, with what it left to the model's widths written out
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

    @property
    def ram_bytes(self) -> int:
        return max(sweep.ram_bytes for sweep in self.sweeps)

    @property
    def floor_s(self) -> float:
        return sum(sweep.floor_s for sweep in self.sweeps)

    def refuse_if_too_large(self, out: Path, already: int = 0) -> None:
        """Raise ResourceError when free memory or disk cannot hold the run, of which `already` bytes are on disk."""
        if self.ram_bytes > self.free_ram_bytes + rss_bytes():
            raise ResourceError(
                f"the run needs {human_bytes(self.ram_bytes)} of memory and {human_bytes(self.free_ram_bytes)} are free; "
                "close other programs, choose method rtn or magnitude (no Gram), or try anyway with --force")
        if self.disk_bytes > self.free_disk_bytes + already:
            raise ResourceError(
                f"the run needs {human_bytes(self.disk_bytes)} of disk at {out.parent} and "
                f"{human_bytes(self.free_disk_bytes)} are free; make room, write to another disk with -o, calibrate on "
                "fewer windows, or try anyway with --force")

    def plain(self) -> dict[str, Any]:
        return asdict(self) | {"ram_bytes": self.ram_bytes, "floor_s": self.floor_s}


def make_plan(checkpoint: Checkpoint, recipe: Recipe, out: Path, *, windows: int, window: int,
              device: str = "cpu", keep_stages: bool = False) -> Forecast:
    """Check a recipe against a checkpoint and forecast its run on `windows` of `window` tokens (at most its context)."""
    spec = whole_spec(checkpoint)
    window = min(window, spec.context)
    recipe.check(spec, sparse=checkpoint.is_sparse)
    recipe = recipe.resolved(spec)
    rate = gemm_flops_per_second("float32", device)
    base = max(rss_bytes(), 300 << 20) + ARENA_BYTES
    before_ends = sum(record.size for record in checkpoint.end_records().values())
    tokens = checkpoint.shape_of(EMBEDDING)[0]
    ends = before_ends * spec.vocabulary // tokens if spec.vocabulary < tokens else before_ends
    stored = {layer: sum(record.size for record in checkpoint.layer_records(layer).values())
              for layer in checkpoint.names_by_layer}
    packed = {layer: any(name.endswith((".weight_packed", ".weight_blocks")) for name in names)
              for layer, names in checkpoint.names_by_layer.items()}
    layers = before = [_Layer(layer, stored[layer], packed[layer]) for layer in checkpoint.spec.layer_order]
    sweeps: list[SweepForecast] = []
    results: list[int] = []
    notes: list[str] = [*checkpoint.notes]
    planned = recipe.sweeps(one_stage_each=keep_stages)
    for number, sweep in enumerate(planned, 1):
        layers, before = (before if sweep.does_over else layers), layers
        forecast, spec, layers = _sweep_forecast(spec, layers, sweep, windows, window, base, rate,
                                                 checkpoint.storage.itemsize)
        sweeps.append(forecast)
        notes += [note for edit in sweep.edits for note in edit.remarks(spec)]
        if recipe.shared and number == len(planned):
            layers = list({layer.source: layer for layer in layers}.values())
        for edit in sweep.edits:
            ends = edit.end_bytes(spec, ends)
        budgets = [most for edit in sweep.edits if (most := edit.model_bytes(spec)) is not None]
        whole = ends + sum(layer.size for layer in layers)
        results.append(FILE_BYTES + min([whole, *budgets]))
    widest = max(d_in for _, d_in in linear_shapes(spec, 0).values())
    warnings = notes
    if any(sweep.observes for sweep in planned) and windows * window < widest:
        warnings.append(f"{windows * window} calibration tokens are fewer than the {widest} inputs of the widest linear: "
                        "its Gram has not full rank, damping covers it; more windows are better")
    # a sweep reads the result before it, and joins its parts into shards while both are on disk
    kept = [sum(results[:number] if keep_stages else results[max(number - 1, 0):number]) for number in range(len(results))]
    disk = max(before + 2 * result for before, result in zip(kept, results, strict=True))
    return Forecast(
        recipe.line(), sweeps, windows, window, _parameters(checkpoint.spec, range(checkpoint.spec.stored_layers), tokens),
        _parameters(spec, range(len(layers))), before_ends + sum(stored.values()), results[-1],
        disk + max(sweep.scratch_bytes for sweep in sweeps), free_ram_bytes(), free_disk_bytes(out), rate, warnings)


@dataclass(frozen=True)
class _Layer:
    """A layer on its way through the recipe: the stored layer that it comes from, and its bytes now."""

    source: int
    size: int
    packed: bool = False


def whole_spec(checkpoint: Checkpoint) -> ModelSpec:
    """The spec with every executed layer written out."""
    spec = checkpoint.spec
    return ModelSpec(spec.config, spec.quantization, tuple(range(spec.layers)))


def _parameters(spec: ModelSpec, layers: range, tokens: int | None = None) -> int:
    ends = (tokens or spec.vocabulary) * spec.hidden * (1 if spec.tied else 2) + spec.hidden
    return ends + sum(math.prod(shape) for layer in layers for shape in layer_shapes(spec, layer).values())


def _edited(layer: _Layer, spec: ModelSpec, index: int, sweep: Sweep, element: int) -> _Layer:
    """The layer after the edits of a sweep: packed, dense again, or untouched."""
    edits = [edit for edit in sweep.edits if edit.applies_to(index, spec.layers)]
    if not edits:
        return layer
    linears = linear_shapes(spec, index)
    size, packed = 0, False
    for name, shape in layer_shapes(spec, index).items():
        linear = linears.get(name.removesuffix(".weight"))
        found = [edit.grid_for(linear[1]) for edit in edits] if linear is not None else []
        grid = next((one for one in reversed(found) if one is not None), None)
        packed = packed or grid is not None
        if grid is not None and linear is not None:
            size += grid.stored_bytes(*linear, element) + 3 * HEADER_BYTES_PER_TENSOR
        else:
            size += math.prod(shape) * element + HEADER_BYTES_PER_TENSOR
    if packed:
        size += math.ceil(max(edit.extra_bits for edit in edits) / 8 * sum(math.prod(shape) for shape in linears.values()))
    if beside := max(edit.adapter_bytes(linears, spec.layers, element) for edit in edits):
        size += beside + 4 * HEADER_BYTES_PER_TENSOR * len(linears)
    return _Layer(layer.source, size, packed)


def _chosen(layers: list[_Layer], choice: LayerChoice) -> list[_Layer]:
    """The layers that a choice leaves; where the plan cannot know which, those that leave the most bytes."""
    if isinstance(choice, Layers):
        return [layers[index] for index in choice.resolve(len(layers))]
    seen: set[int] = set()
    first_time = [layer.source not in seen and not seen.add(layer.source) for layer in layers]  # type: ignore[func-returns-value]
    largest = sorted(range(len(layers)), key=lambda index: (first_time[index], layers[index].size), reverse=True)
    return [layers[index] for index in sorted(largest[:choice.layers_after(len(layers))])]




def _sweep_forecast(spec: ModelSpec, layers: list[_Layer], sweep: Sweep, windows: int, window: int, base: int, rate: float,
                    element: int) -> tuple[SweepForecast, ModelSpec, list[_Layer]]:
    tokens = windows * window
    ram, scratch, flops = 0, 0, 0.0
    for choice in sweep.choices:
        choice_ram, choice_scratch, choice_flops = _choice_cost(spec, choice, windows, window)
        ram, scratch, flops = max(ram, choice_ram), max(scratch, choice_scratch), flops + choice_flops
        layers = _chosen(layers, choice)
        spec = spec.with_layers(len(layers))
    if sweep.edits:
        ram = max(ram, max(_edit_ram(spec, sweep, layer, window) for layer in {0, spec.layers - 1}))
        for layer in range(spec.layers):
            flops += _edit_flops(spec, sweep, layer, tokens, window)
        if sweep.observes:
            scratch = max(scratch, (4 if sweep.follows_original else 2) * 4 * tokens * spec.hidden)
        if sweep.weighs_tokens:
            metrics = sum(d_out * min(d_out, OUTPUTS) for d_out, _ in linear_shapes(spec, 0).values())
            scratch = max(scratch, (spec.layers + 4) * 4 * tokens * spec.hidden) + 2 * spec.layers * metrics
            ram = max(ram + 2 * metrics, int(1.25 * 4 * _layer_weights(spec, 0)) + 4 * metrics
                      + _layer_activations(spec, window) * BATCH_TOKENS)
            flops += 6.0 * tokens * spec.vocabulary * spec.hidden + sum(
                4 * _forward_flops(spec, layer, tokens, window) for layer in range(spec.layers))
        layers = [_edited(layer, spec, index, sweep, element) for index, layer in enumerate(layers)]
    if sweep.narrowing is not None:
        ram = max(ram, max(_edit_ram(spec, sweep, layer, window) for layer in {0, spec.layers - 1}))
        scratch = max(scratch, 2 * 4 * tokens * spec.hidden)
        flops += sum(_edit_flops(spec, sweep, layer, tokens, window) for layer in range(spec.layers))
        flops += spec.layers * sweep.narrowing.flops(spec)
        spec = sweep.narrowing.spec_after(spec)
        layers = [_Layer(layer.source, sum(math.prod(shape) * element + HEADER_BYTES_PER_TENSOR for shape in
                                           layer_shapes(spec, index).values())) for index, layer in enumerate(layers)]
    engine = ""
    if sweep.training is not None:
        engine, training_ram, training_scratch, training_flops = _training_cost(spec, sweep.training, layers,
                                                                                free_ram_bytes() + rss_bytes() - base)
        ram, scratch, flops = max(ram, training_ram), max(scratch, training_scratch), flops + training_flops
        layers = _trained(spec, sweep.training, layers, element)
    names = [stage.name for stage in sweep.stages]
    return SweepForecast(names, spec.layers, base + ram, scratch, flops, flops / rate, engine), spec, layers


def _training_cost(spec: ModelSpec, stage: Retraining, layers: list[_Layer], free: int) -> tuple[str, int, int, float]:
    """(engine, memory beyond the base, scratch, operations) of a stage that trains.

    Resident it is forward and backward through frozen weights; streamed, every layer is computed once more. Both pass
    the head by three times. Factors are kept with their gradient, two moments and their best values.
    """
    tokens = stage.tokens_a_step(spec)
    window = min(stage.window, spec.context)
    dense = 4 * max(_layer_weights(spec, layer) for layer in (0, spec.layers - 1))
    ends = 4 * spec.vocabulary * spec.hidden * (1 if spec.tied else 2)
    state = 5 * 4 * stage.trained_values(spec)
    head = 4 * HEAD_ROWS * (spec.hidden + 3 * BATCH_TOKENS)
    a_layer = _layer_activations(spec, window)
    weights = sum(layer.size if layer.packed else dense for layer in layers)
    resident = weights + ends + state + head + spec.layers * a_layer * min(tokens, max(MICRO_TOKENS, window))
    streamed = int(1.25 * dense) + state + head + a_layer * max(BATCH_TOKENS, window)
    forward = sum(_forward_flops(spec, layer, tokens, window) for layer in range(spec.layers))
    looks = -(-stage.steps // stage.look_every) + 1
    if stage.layerwise:
        seen = stage.samples_seen * window
        passes = 2 * seen + 3 * stage.steps * tokens + looks * min(MOST_HELD_OUT, stage.samples_seen) * window
        ram = int(1.25 * dense) + state + a_layer * window
        return "layer by layer", ram, 4 * 4 * seen * spec.hidden, forward * passes / tokens
    engine = stage.engine
    if engine == "auto":
        engine = "resident" if resident < RESIDENT_SHARE * free else "streamed"
    past_head = 2.0 * tokens * spec.vocabulary * spec.hidden
    a_look = MOST_HELD_OUT * window * (forward + past_head) / tokens
    a_step = (2 if engine == "resident" else 3) * forward + 3 * past_head
    flops = max(1, len(stage.sources)) * (stage.steps * a_step + looks * a_look)
    if engine == "resident":
        return engine, resident, 0, flops
    return engine, streamed, (spec.layers + 4) * 4 * max(tokens, MOST_HELD_OUT * window) * spec.hidden, flops


def _layer_activations(spec: ModelSpec, window: int) -> int:
    """Bytes a token that a layer keeps for its gradient."""
    return 4 * (8 * spec.hidden + 4 * spec.feed_forward) + 2 * 4 * spec.heads * window


def _trained(spec: ModelSpec, stage: Retraining, layers: list[_Layer], element: int) -> list[_Layer]:
    """The layers with the factors that stay beside them."""
    found = []
    for index, layer in enumerate(layers):
        kept = stage.kept_values(spec, index, packed=layer.packed)
        found.append(replace(layer, size=layer.size + element * sum(kept) + 2 * HEADER_BYTES_PER_TENSOR * len(kept)))
    return found


def _layer_weights(spec: ModelSpec, layer: int) -> int:
    return sum(math.prod(shape) for shape in layer_shapes(spec, layer).values())


def _forward_flops(spec: ModelSpec, layer: int, tokens: int, window: int) -> float:
    linears = sum(math.prod(shape) for shape in linear_shapes(spec, layer).values())
    return 2.0 * tokens * linears + 2.0 * tokens * window * spec.heads * spec.head_dim


def _activation_bytes(spec: ModelSpec, window: int) -> int:
    tokens = max(BATCH_TOKENS, window)
    return 4 * tokens * (6 * spec.hidden + 3 * spec.feed_forward)


def _choice_cost(spec: ModelSpec, choice: LayerChoice, windows: int, window: int) -> tuple[int, int, float]:
    """(memory beyond the base, scratch, operations) of a stage that chooses layers."""
    if not isinstance(choice, Depth) or choice.remove == 0:
        return 0, 0, 0.0
    tokens = windows * window
    layer_bytes = 4 * max(_layer_weights(spec, layer) for layer in (0, spec.layers - 1))
    candidates = choice.protect.open_layers(spec.layers)
    rounds = choice.remove if choice.iterative else 1
    state_bytes = 4 * tokens * spec.hidden
    head_flops = 2.0 * tokens * spec.vocabulary * spec.hidden
    head_bytes = 4 * 8192 * (spec.hidden + 2 * BATCH_TOKENS)
    forward = [_forward_flops(spec, layer, tokens, window) for layer in range(spec.layers)]
    ram = int(layer_bytes * 1.25) + _activation_bytes(spec, window) + head_bytes
    if choice.importance == "magnitude":
        return layer_bytes, 0, 0.0
    if choice.importance == "cosine":
        return ram, 2 * state_bytes, rounds * 2 * sum(forward)
    if choice.importance == "taylor":
        return ram + layer_bytes, (spec.layers + 3) * state_bytes, rounds * (4 * sum(forward) + 3 * head_flops)
    branches = [sum(candidate < layer for candidate in candidates) for layer in range(spec.layers)]
    flops = sum(cost * (1 + count) for cost, count in zip(forward, branches, strict=True))
    return ram, (2 + len(candidates)) * state_bytes, rounds * (flops + (1 + len(candidates)) * head_flops)


def _edit_flops(spec: ModelSpec, sweep: Sweep, layer: int, tokens: int, window: int) -> float:
    edits, observes = sweep.edits, sweep.observes
    shapes = linear_shapes(spec, layer)
    groups = input_groups(shapes)
    flops = 0.0
    again = any(edit.observes_again for edit in edits)
    if observes:
        forward = _forward_flops(spec, layer, tokens, window)
        last = 2.0 * tokens * math.prod(shapes[list(shapes)[-1]])
        widths = [shapes[group[0]][1] for group in groups]
        flops += forward - last + 2.0 * tokens * sum(width ** 2 for width in widths)
        if sweep.follows_original:      # through the layer as it was, what differs, and what each linear makes of it
            flops += forward + 2.0 * tokens * sum(width ** 2 for width in widths) + sum(
                4.0 * d_out * d_in ** 2 for d_out, d_in in shapes.values())
        if again:
            flops += forward - last + 2.0 * tokens * sum(shapes[group[0]][1] ** 2 for group in groups if len(group) == 1)
        if layer + 1 < spec.layers:
            flops += forward
    for edit in edits:
        if edit.applies_to(layer, spec.layers):
            flops += sum(edit.flops(*shape) for shape in shapes.values())
            if edit.uses_factor:
                flops += sum(shapes[group[0]][1] ** 3 / 3 for group in groups)
    return flops


def _edit_ram(spec: ModelSpec, sweep: Sweep, layer: int, window: int) -> int:
    """Memory beyond the base while a layer is edited: weights, Grams, the working copies of its widest linear."""
    edits, observes = sweep.edits, sweep.observes
    shapes = linear_shapes(spec, layer)
    weights = 4 * _layer_weights(spec, layer)
    grams = 4 * sum(shapes[group[0]][1] ** 2 for group in input_groups(shapes)) if observes else 0
    grams *= (2 if sweep.follows_original else 1) + (3 if any(edit.surveys for edit in edits) else 0)    # factors
    work = 0
    for d_out, d_in in shapes.values():
        # one factor stands in its Gram's place; with two edits that need factors the second is another matrix
        factors = 4 * d_in ** 2 * (sum(edit.uses_factor for edit in edits) > 1)
        copies = 4 * 4 * d_out * d_in
        work = max(work, factors + copies)
    return weights + grams + max(work, _activation_bytes(spec, window))
