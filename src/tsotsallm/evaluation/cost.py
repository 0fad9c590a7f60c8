"""What a model costs: weights, memory, cache and operations; and its speed, measured on this machine."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import TypedDict

import torch
import yaml

from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.checkpoint.shapes import layer_shapes, work_of
from tsotsallm.checkpoint.view import View
from tsotsallm.errors import ResourceError, TsotsallmError
from tsotsallm.evaluation.energy import Energy, Power, carbon_by_country, energy_of
from tsotsallm.inspection import end_shapes, inspect_checkpoint
from tsotsallm.machine import chosen_threads, cores, free_ram_bytes, total_ram_bytes
from tsotsallm.records import Record
from tsotsallm.units import human_bytes

NONZERO_ROWS = 16_384


@dataclass(frozen=True)
class Speed:
    """Speed of a model that is whole in memory, in a process of its own: checkpoints in float32, GGUF files as they are.

    grown_bytes  memory that the process took for the model and its cache, without its libraries
    """

    prompt_tokens: int
    new_tokens: int
    load_s: float
    first_token_s: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    peak_rss_bytes: int
    grown_bytes: int
    device: str
    threads: int
    energy: Energy | None = None


@dataclass(frozen=True)
class Cost(Record):
    """Bytes on disk as stored, and in memory in float32, as transformers runs a model on a CPU; MACs of 512 tokens."""

    model: str
    parameters: int
    nonzero_parameters: int
    disk_bytes: int
    disk_bytes_by_part: dict[str, int]
    float32_bytes: int
    float32_bytes_by_part: dict[str, int]
    kv_cache_bytes_per_token: int
    linear_macs_per_token: int
    attention_macs_per_token_pair: int
    prefill_512_macs: int
    decode_after_512_macs: int
    fits: dict[str, bool]
    speed: Speed | None = None


class Device(TypedDict):
    """A target device of devices.yaml: what it is, the bytes that it has for weights, and where the figure comes from."""

    about: str
    weight_bytes: int
    source: str


def parameters_of(view: View) -> int:
    """Parameters of the model that a view shows; a layer that runs twice counts once."""
    stored = {view.stored(index): index for index in range(view.spec.layers)}
    layers = sum(math.prod(shape) for index in stored.values() for shape in layer_shapes(view.spec, index).values())
    return layers + sum(math.prod(shape) for shape in end_shapes(view.checkpoint).values())


def bytes_of(view: View) -> int:
    """Bytes of the weights that a view shows, as stored; a layer that runs twice counts twice."""
    ends = sum(record.size for record in view.checkpoint.end_records().values())
    return ends + sum(record.size for index in range(view.spec.layers) for record in view.layer_records(index).values())


def devices() -> dict[str, Device]:
    """Name -> target device, from the packaged devices.yaml."""
    text = resources.files("tsotsallm").joinpath("devices.yaml").read_text("utf-8")
    listed: dict[str, Device] = yaml.safe_load(text)
    return listed


THIS_COMPUTER = "this-computer"
OWN_SHARE = 0.5
"""Share of this computer's memory for a model; its system and other programs have the rest."""


def devices_here() -> dict[str, Device]:
    """The same, and before them the computer that this runs on."""
    memory = total_ram_bytes()
    own = Device(about=f"this computer, with half of its {human_bytes(memory)} of memory", source="measured",
                 weight_bytes=int(OWN_SHARE * memory))
    return {THIS_COMPUTER: own} | devices()


def count_nonzero(checkpoint: Checkpoint) -> int:
    """Parameters that are not zero, every stored layer counted once; reads every tensor, one at a time."""
    spec = checkpoint.spec
    count = 0
    for name, (rows, *_) in end_shapes(checkpoint).items():
        for first in range(0, rows, NONZERO_ROWS):
            count += int(torch.count_nonzero(checkpoint.rows(name, first, min(first + NONZERO_ROWS, rows))))
    for stored in sorted(set(spec.layer_order)):
        names = layer_shapes(spec, spec.layer_order.index(stored))
        layer = checkpoint.layer(stored)
        count += sum(int(torch.count_nonzero(layer[name])) for name in names)
    return count


def fits(checkpoint: Checkpoint, context: int = 512) -> dict[str, bool]:
    """Target device -> whether it holds the stored weights and a 16-bit cache of `context` tokens."""
    weights, cache = inspect_checkpoint(checkpoint).bytes, context * checkpoint.spec.kv_bytes_per_token()
    return devices_with_room(weights, cache)


def devices_with_room(weight_bytes: int, cache_bytes: float) -> dict[str, bool]:
    """Target device -> whether it holds weights of these bytes and such a cache."""
    return {device: weight_bytes <= room_for_weights(facts, int(cache_bytes)) for device, facts in devices().items()}


def room_for_weights(device: Device, cache_bytes: int) -> int:
    """Bytes that a device has for weights beside a cache, which some devices keep in another memory."""
    return int(device["weight_bytes"]) - (0 if device.get("cache_apart") else cache_bytes)


def cost_of(checkpoint: Checkpoint, name: str, *, context: int = 512, speed: Speed | None = None) -> Cost:
    """What a checkpoint costs, and on which devices it runs with `context` tokens."""
    anatomy, work = inspect_checkpoint(checkpoint), work_of(checkpoint.spec)
    in_float32 = {part: 4 * count for part, count in anatomy.parameters_by_part.items()}
    return Cost(name, anatomy.parameters, count_nonzero(checkpoint), anatomy.bytes, anatomy.bytes_by_part,
                4 * anatomy.parameters, in_float32, anatomy.kv_cache_bytes_per_token, work.linear, work.attention,
                work.prefill(512), work.decode(512), fits(checkpoint, context), speed)


def check_fits(model: str | Path, device: str = "cpu") -> None:
    """Raise ResourceError unless a model fits in free memory whole, in float32, with a fifth to spare."""
    needed = 4 * inspect_checkpoint(Checkpoint.open(model)).parameters
    free = free_ram_bytes() if device == "cpu" else int(torch.cuda.mem_get_info(device)[0])
    if needed * 1.2 > free:
        raise ResourceError(f"{model} takes {human_bytes(needed)} in float32, but only {human_bytes(free)} are free: its "
                            "speed cannot be measured here; leave out --speed and --country, or measure on a larger machine")


def measure_speed(model: str | Path, *, device: str = "cpu", country: str | None = None) -> Speed:
    """Load a model in a process of its own, run a prompt and decode; medians of three rounds.

    With a country's three-letter code (or several, with commas), energy is estimated as well. Raises ResourceError where the
    model does not fit in memory, TsotsallmError where the process fails.
    """
    check_fits(model, device)
    return _measured(model, [str(model), device], country)


def measure_gguf_speed(file: str | Path, *, threads: int | None = None, country: str | None = None) -> Speed:
    """Speed of a GGUF file in llama.cpp on `threads` threads, by default the chosen number, else one per core.

    With a country's code (or several, with commas), energy is estimated as well.
    """
    return _measured(file, [str(file), str(threads or chosen_threads() or cores())], country)


def _measured(model: str | Path, arguments: list[str], countries: str | None) -> Speed:
    """What `evaluation.speed` measures in a process of its own: the speed, and energy where countries are named."""
    carbon = None if countries is None else carbon_by_country(countries)
    arguments += [] if carbon is None else [next(iter(carbon))]
    process = subprocess.run([sys.executable, "-m", "tsotsallm.evaluation.speed", *arguments], capture_output=True,
                             text=True, check=False)
    if process.returncode:
        raise TsotsallmError(f"the speed of {model} could not be measured: {process.stderr.strip().splitlines()[-1:]}")
    measured = json.loads(process.stdout.splitlines()[-1])
    power, speed = measured.pop("power"), Speed(**measured)
    return speed if power is None else replace(speed, energy=energy_of(
        Power(**power), speed.prefill_tokens_per_s, speed.decode_tokens_per_s, carbon=carbon))
