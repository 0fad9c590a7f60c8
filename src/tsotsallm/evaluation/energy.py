"""Energy, CO₂ and water of running a model, through CodeCarbon; always labelled as measured or estimated."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

from tsotsallm.errors import MissingExtraError, TsotsallmError, nearest
from tsotsallm.records import Record

WATER_LITRES_PER_KWH = 1.8
"""On-site water of an average US data centre (Shehabi et al. 2016, LBNL-1005775); a laptop itself uses none, and water used
to generate electricity is not counted."""
QUERIES = ((100, 300), (1000, 1000))
MEASURED_MODES = {"intel_rapl": "RAPL", "intel_power_gadget": "Intel Power Gadget", "apple_powermetrics": "powermetrics"}


@dataclass(frozen=True)
class Power:
    """Mean power while a model ran, and how it is known."""

    watts: float
    measured: bool
    source: str
    country: str
    carbon_g_per_kwh: float


@dataclass(frozen=True)
class Energy(Record):
    """Watt-hours of this machine for tokens and queries; CO₂ by the country's electricity mix, water by a stated factor."""

    power_w: float
    label: str
    prefill_wh_per_1000_tokens: float
    decode_wh_per_1000_tokens: float
    query_wh: dict[str, float]
    country: str
    carbon_g_per_kwh: float
    query_co2_g: dict[str, float]
    water_litres_per_kwh: float
    query_water_ml: dict[str, float]


def _library() -> ModuleType:
    try:
        found: ModuleType = importlib.import_module("codecarbon")
    except ImportError:
        raise MissingExtraError("codecarbon", "energy", "estimating energy and CO₂") from None
    return found


def check_country(country: str) -> str:
    """Return a three-letter ISO code that CodeCarbon's table of electricity mixes knows; raise TsotsallmError otherwise."""
    _library()
    from codecarbon.input import DataSource

    known = DataSource().get_global_energy_mix_data()
    if country not in known:
        raise TsotsallmError(f"--country is {country!r}; it takes an ISO code of three letters"
                             f"{nearest(country.upper(), known).partition(' (known')[0]}, such as CMR, KEN, IND, FRA")
    return country


def measure_power(country: str, work: Callable[[], object], seconds: float = 6.0) -> Power:
    """Mean power of this machine while it repeats `work` for `seconds`, by CodeCarbon's offline tracker."""
    import time

    codecarbon = _library()
    tracker = codecarbon.OfflineEmissionsTracker(country_iso_code=country, save_to_file=False, log_level="critical",
                                                 measure_power_secs=1, allow_multiple_runs=True)
    tracker.start()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        work()
    tracker.stop()
    emissions = tracker.final_emissions_data
    modes = {getattr(part, "_mode", "") for part in tracker._hardware} - {"", None}
    measured = {MEASURED_MODES[mode] for mode in modes if mode in MEASURED_MODES}
    if emissions.gpu_energy > 0:
        measured.add("NVML")
    source = f"CodeCarbon {codecarbon.__version__}, " + (
        f"{' and '.join(sorted(measured))} for the processor, a constant for memory" if measured else
        f"from the load of {emissions.cpu_model} and its thermal design power, a constant for memory")
    return Power(emissions.energy_consumed * 3_600_000 / emissions.duration, bool(measured), source, country,
                 1000 * emissions.emissions / emissions.energy_consumed)


@contextmanager
def tracked(country: str, facts: dict[str, object]) -> Iterator[None]:
    """Write the watt-hours that the block takes on this machine to `facts["energy_wh"]`."""
    codecarbon = _library()
    tracker = codecarbon.OfflineEmissionsTracker(country_iso_code=country, save_to_file=False, log_level="critical",
                                                 measure_power_secs=5, allow_multiple_runs=True)
    tracker.start()
    try:
        yield
    finally:
        tracker.stop()
        facts["energy_wh"] = 1000 * tracker.final_emissions_data.energy_consumed


def energy_of(power: Power, prefill_tokens_per_s: float, decode_tokens_per_s: float,
              water_litres_per_kwh: float = WATER_LITRES_PER_KWH) -> Energy:
    """Energy for 1000 tokens and for the queries of QUERIES (tokens in, tokens out): power × time at the given rates."""
    prefill, decode = (power.watts / 3600 / rate for rate in (prefill_tokens_per_s, decode_tokens_per_s))
    queries = {f"{given} in, {made} out": given * prefill + made * decode for given, made in QUERIES}
    label = f"{'measured' if power.measured else 'estimated'} ({power.source})"
    return Energy(power.watts, label, 1000 * prefill, 1000 * decode, queries, power.country, power.carbon_g_per_kwh,
                  {name: wh / 1000 * power.carbon_g_per_kwh for name, wh in queries.items()}, water_litres_per_kwh,
                  {name: wh * water_litres_per_kwh for name, wh in queries.items()})
