"""Energy, CO₂ and water of running a model, through CodeCarbon; always labelled as measured or estimated."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType

from tsotsallm.errors import MissingExtraError, TsotsallmError, nearest
from tsotsallm.records import Record

WATER_LITRES_PER_KWH = 1.8
"""On-site water of an average US data centre (Shehabi et al. 2016, LBNL-1005775); a laptop itself uses none, and water used
to generate electricity is not counted."""
QUERIES = ((100, 300), (1000, 1000))
ANSWERS_A_DAY = 100
"""Answers a day, each to the first of QUERIES, of which a year is counted."""
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
    """Watt-hours of this machine for tokens and queries; CO₂ by the country's electricity mix, water by a stated factor.

    year_kwh, year_co2_kg  a year of ANSWERS_A_DAY answers a day; CO₂ in each of the countries asked for
    """

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
    year_kwh: float = 0.0
    year_co2_kg: dict[str, float] = field(default_factory=dict)


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


def carbon_by_country(countries: str) -> dict[str, float]:
    """Grams of CO₂ per kWh in each of some countries, given by codes with commas between; raises as `check_country`."""
    _library()
    from codecarbon.core.emissions import Emissions
    from codecarbon.core.units import Energy as Amount
    from codecarbon.external.geography import GeoMetadata
    from codecarbon.input import DataSource

    source, one = Emissions(DataSource()), Amount.from_energy(kWh=1.0)
    codes = [check_country(code.strip()) for code in countries.split(",")]
    return {code: 1000 * source.get_country_emissions(one, GeoMetadata(country_iso_code=code)) for code in codes}


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
              water_litres_per_kwh: float = WATER_LITRES_PER_KWH, *, carbon: Mapping[str, float] | None = None) -> Energy:
    """Energy for 1000 tokens and for the queries of QUERIES (tokens in, tokens out): power × time at the given rates.

    `carbon` has grams of CO₂ per kWh by country, for the CO₂ of a year; None: the country of the power alone.
    """
    prefill, decode = (power.watts / 3600 / rate for rate in (prefill_tokens_per_s, decode_tokens_per_s))
    queries = {f"{given} in, {made} out": given * prefill + made * decode for given, made in QUERIES}
    year = 365 * ANSWERS_A_DAY * next(iter(queries.values())) / 1000
    mixes = {power.country: power.carbon_g_per_kwh} if carbon is None else carbon
    label = f"{'measured' if power.measured else 'estimated'} ({power.source})"
    return Energy(power.watts, label, 1000 * prefill, 1000 * decode, queries, power.country, power.carbon_g_per_kwh,
                  {name: wh / 1000 * power.carbon_g_per_kwh for name, wh in queries.items()}, water_litres_per_kwh,
                  {name: wh * water_litres_per_kwh for name, wh in queries.items()}, year,
                  {country: year * grams / 1000 for country, grams in mixes.items()})
