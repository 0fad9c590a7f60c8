"""tsotsallm evaluate: what models know, lose and cost, by one of several kinds of evaluation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from tsotsallm.cli.common import (
    AsJson,
    Data,
    Device,
    EvaluationCountry,
    ItemsSeed,
    Scratch,
    Speed,
    Threads,
    TlsCa,
    TlsCert,
    TlsKey,
    Workers,
    answers,
    computers_from,
    print_json,
    to_stderr,
)
from tsotsallm.files import Json, JsonObject

if TYPE_CHECKING:
    from tsotsallm.evaluation.cost import Cost
    from tsotsallm.evaluation.cost import Speed as MeasuredSpeed
    from tsotsallm.evaluation.energy import Energy
    from tsotsallm.evaluation.examination import Examination
    from tsotsallm.evaluation.forecast import TaskForecast
    from tsotsallm.evaluation.kv_cache import CachePerplexity
    from tsotsallm.evaluation.perplexity import Kind, Perplexity
    from tsotsallm.evaluation.results import Comparison
    from tsotsallm.evaluation.tasks import Task


def evaluate(models: Annotated[list[str], typer.Argument(help="Models to evaluate: checkpoints, or GGUF files; differences "
                                                              "are to the first.")],
             text: Annotated[Path | None, typer.Option(help="UTF-8 text file to report the perplexity of.")] = None,
             task: Annotated[str | None, typer.Option(help="Tasks to evaluate on, separated by commas: names that "
                                                           "`tsotsallm tasks` lists, YAML files, or BIG-bench JSON "
                                                           "files.")] = None,
             harness: Annotated[str | None, typer.Option(help="Tasks of lm-evaluation-harness, separated by "
                                                              "commas.")] = None,
             data: Data = None,
             limit: Annotated[int | None, typer.Option(help="Evaluate at most this number of items of every task, selected "
                                                            "by the seed, or of windows of the text.")] = None,
             seed: ItemsSeed = 0,
             context: Annotated[int, typer.Option(help="Length of a window of --text in tokens, BOS included.")] = 512,
             protocol: Annotated[str, typer.Option(help="How --text is split: windows, or rows (each line by itself).")] =
             "windows",
             reference: Annotated[str | None, typer.Option(help="The original model, for the KL divergence.")] = None,
             kv: Annotated[str, typer.Option(help="Number types of a GGUF file's key-value cache, separated by commas: f32, "
                                                  "f16, q8_0, q4_0.")] = "f16",
             speed: Speed = False, country: EvaluationCountry = None,
             by_sweeps: Annotated[bool, typer.Option(help="Generate by sweeps although the model fits in memory.")] = False,
             stream: Annotated[bool, typer.Option(help="Score a GGUF file layer by layer in float32, without llama.cpp.")] =
             False,
             plan_only: Annotated[bool, typer.Option("--plan", help="Only forecast how it would run, and how long.")] =
             False,
             groups: Annotated[bool, typer.Option(help="Show every group of items (subjects, languages).")] = False,
             workers: Workers = None, tls_ca: TlsCa = None, tls_cert: TlsCert = None, tls_key: TlsKey = None,
             device: Device = "cpu", scratch: Scratch = None, threads: Threads = None, as_json: AsJson = False) -> None:
    """Score models on a text or on tasks, and compare them.

    With standard errors, paired differences and costs; one layer at a time is in memory.
    """
    with answers(as_json):
        request = Request(models, text, task, harness, data, limit, seed, context, protocol, reference, kv, speed, country,
                          by_sweeps, plan_only, groups, device, scratch, as_json, stream)
        request.check()
        computers = computers_from(workers, tls_ca, tls_cert, tls_key) if harness is None else None
        if computers is not None:
            _on_cluster(request, computers)
        else:
            _kind_of(request)(request)


@dataclass(frozen=True)
class Request:
    """The options of `tsotsallm evaluate`."""

    models: list[str]
    text: Path | None
    task: str | None
    harness: str | None
    data: Path | None
    limit: int | None
    seed: int
    context: int
    protocol: str
    reference: str | None
    kv: str
    speed: bool
    country: str | None
    by_sweeps: bool
    plan_only: bool
    groups: bool
    device: str
    scratch: Path | None
    as_json: bool
    stream: bool = False

    def check(self) -> None:
        """Raise where options do not belong together, so that none is ignored."""
        from tsotsallm.errors import TsotsallmError, nearest

        if sum(one is not None for one in (self.text, self.task, self.harness)) > 1:
            raise TsotsallmError("--text, --task and --harness are three kinds of evaluation; choose one at a time")
        if self.data is not None and self.task is None and self.harness is None:
            raise TsotsallmError("--data belongs to --task or --harness; a text to score is given with --text")
        if (self.task or self.harness) and (self.context != 512 or self.protocol != "windows"):
            raise TsotsallmError("--context and --protocol belong to --text; a task's own file has its context and protocol")
        if self.harness and (self.plan_only or self.reference):
            raise TsotsallmError("--plan and --reference do not reach tasks of lm-evaluation-harness; leave them out")
        if self.protocol not in ("windows", "rows"):
            raise TsotsallmError(f"there is no protocol {self.protocol!r}{nearest(self.protocol, ('windows', 'rows'))}")

    @property
    def runs_in_llama_cpp(self) -> bool:
        """Whether GGUF files are scored in llama.cpp: one of them on a text, or the speed of any.

        Tasks, comparisons, rows and `--stream` read them layer by layer, as does everything where there is no llama.cpp.
        """
        from tsotsallm.checkpoint.gguf_place import is_gguf
        from tsotsallm.engine.llama import installed

        if all(not is_gguf(model) for model in self.models):
            return False
        streams = self.stream or self.task is not None or len(self.models) > 1 or self.protocol != "windows" or (
            not installed())
        return self.speed or not streams

    @property
    def kind(self) -> Kind:
        """The protocol, once checked."""
        return cast("Kind", self.protocol)

    def questions(self) -> tuple[list[str | Task], Path | None]:
        """(tasks, their data); a text is a task of its own."""
        from tsotsallm.errors import TsotsallmError
        from tsotsallm.evaluation.examination import text_task

        if self.task is not None:
            return list(self.task.split(",")), self.data
        if self.text is None and "embedded" not in (*self.models, self.reference):
            raise TsotsallmError("give a text to evaluate on with --text FILE, or a task with --task; only the embedded "
                                 "model comes with its own text")
        return [text_task(self.context, self.kind, world=self.text is None)], self.text

    def output(self, plain: Json, show: Callable[[], None]) -> None:
        """Print the JSON form of a result where that is asked for, else show it."""
        print_json(plain) if self.as_json else show()


# -- one function for each kind of evaluation -------------------------------------------------------------------------

def _kind_of(request: Request) -> Callable[[Request], None]:
    """What a request that needs no cluster asks for."""
    from tsotsallm.engine.llama import in_process

    if request.harness is not None:
        return _harness
    if request.kv != "f16" or request.runs_in_llama_cpp:
        if request.speed:
            return _gguf_speeds
        return _gguf_text if request.kv == "f16" and in_process() else _gguf_caches
    if request.plan_only:
        return _forecast
    if request.task is None and len(request.models) == 1 and not (request.speed or request.country):
        return _one_text
    return _examination


def _harness(request: Request) -> None:
    """Tasks of lm-evaluation-harness, model by model."""
    from tsotsallm.api.evaluate import harness

    scored = {model: harness(model, str(request.harness).split(","), limit=request.limit, include=request.data,
                             device=request.device, scratch=request.scratch) for model in request.models}
    request.output(scored, lambda: print_harness(scored))


def _on_cluster(request: Request, computers: Any) -> None:
    """Tasks on the workers of a cluster."""
    from tsotsallm.api.evaluate import examine_on_cluster
    from tsotsallm.errors import TsotsallmError

    if request.task is None or request.speed or request.country or request.plan_only or request.by_sweeps or (
            request.device != "cpu"):
        raise TsotsallmError("--workers evaluates tasks on a cluster; give --task, and leave out --speed, --country, "
                             "--plan, --by-sweeps and --device")
    scores = examine_on_cluster(request.models, request.task.split(","), computers, data=request.data, limit=request.limit,
                                seed=request.seed, reference=request.reference, say=to_stderr)
    request.output(scores.plain(), lambda: print_examination(scores, groups=request.groups))


def _check_gguf(request: Request) -> None:
    """Raise where options do not reach llama.cpp."""
    from tsotsallm.errors import TsotsallmError

    if (request.country and not request.speed) or request.by_sweeps or request.protocol != "windows":
        raise TsotsallmError("--country without --speed, --by-sweeps and --protocol do not reach GGUF files in llama.cpp, "
                             "which scores windows; leave them out, or add --stream")


def _require_no_plan(request: Request, what: str) -> None:
    """Raise where a forecast is asked for of what has none."""
    from tsotsallm.errors import TsotsallmError

    if request.plan_only:
        raise TsotsallmError(f"--plan does not forecast {what} of a GGUF file; leave out --plan")


def _gguf_speeds(request: Request) -> None:
    """Speed and memory of GGUF files in llama.cpp."""
    from tsotsallm.api.evaluate import gguf_speeds

    _check_gguf(request)
    _require_no_plan(request, "--speed")
    speeds = gguf_speeds(request.models, text=request.text, task=request.task, kv=request.kv, reference=request.reference,
                         country=request.country)
    request.output({model: asdict(one) for model, one in speeds.items()}, lambda: print_speeds(speeds))


def _gguf_text(request: Request) -> None:
    """Perplexity of a GGUF file in llama.cpp, and its KL divergence from a reference."""
    from tsotsallm.api.evaluate import evaluate_in_llama, plan_in_llama
    from tsotsallm.cli.lines import step_bar

    _check_gguf(request)
    if request.plan_only:
        found = plan_in_llama(request.models[0], request.text, reference=request.reference, context=request.context,
                              limit=request.limit)
        request.output([found.plain()], lambda: print_forecasts([found]))
        return
    bar, tick = step_bar(request.as_json)
    with bar:
        score = evaluate_in_llama(request.models[0], request.text, reference=request.reference, context=request.context,
                                  limit=request.limit, tick=tick)
    request.output(score.plain(), lambda: print_perplexity(score))


def _gguf_caches(request: Request) -> None:
    """Perplexity of a GGUF file in llama.cpp, by type of key-value cache."""
    from tsotsallm.api.evaluate import evaluate_gguf
    from tsotsallm.cli.lines import step_bar

    _check_gguf(request)
    _require_no_plan(request, "--kv" if request.kv != "f16" else "a text without xllamacpp (extra [llama])")
    bar, tick = step_bar(request.as_json)
    with bar:
        caches = evaluate_gguf(request.models, request.text, kv=request.kv.split(","), context=request.context,
                               reference=request.reference, limit=request.limit, task=request.task, tick=tick)
    request.output([one.plain() for one in caches], lambda: print_caches(caches))


def _one_text(request: Request) -> None:
    """Perplexity of one checkpoint on a text, and its KL divergence from a reference."""
    from tsotsallm.api.evaluate import evaluate
    from tsotsallm.cli.lines import step_bar

    bar, tick = step_bar(request.as_json)
    with bar:
        score = evaluate(request.models[0], request.text, context=request.context, protocol=request.kind,
                         reference=request.reference, limit=request.limit, device=request.device, scratch=request.scratch,
                         tick=tick)
    request.output(score.plain(), lambda: print_perplexity(score))


def _forecast(request: Request) -> None:
    """How an evaluation would run, and how long."""
    from tsotsallm.evaluation.examination import plan_examination

    tasks, data = request.questions()
    forecasts = plan_examination(request.models, tasks, data=data, limit=request.limit, seed=request.seed,
                                 device=request.device, by_sweeps=request.by_sweeps or None)
    request.output([one.plain() for one in forecasts], lambda: print_forecasts(forecasts))


def _examination(request: Request) -> None:
    """Tasks, or a text, on one or several checkpoints."""
    from tsotsallm.cli.lines import step_bar
    from tsotsallm.evaluation.examination import examine

    tasks, data = request.questions()
    bar, tick = step_bar(request.as_json)
    with bar:
        scores = examine(request.models, tasks, data=data, limit=request.limit, seed=request.seed,
                         reference=request.reference, device=request.device, speed=request.speed, country=request.country,
                         by_sweeps=request.by_sweeps or None, scratch=request.scratch, tick=tick)
    request.output(scores.plain(), lambda: print_examination(scores, groups=request.groups))


# -- printing ---------------------------------------------------------------------------------------------------------

def print_speeds(speeds: dict[str, MeasuredSpeed]) -> None:
    """Print one row per GGUF file."""
    from tsotsallm.cli.lines import table
    from tsotsallm.units import human_bytes

    table("Speed in llama.cpp", ["file", "new tokens per second", "prompt tokens per second", "memory taken", "threads"],
          [[name, f"{one.decode_tokens_per_s:.1f}", f"{one.prefill_tokens_per_s:.1f}", human_bytes(one.grown_bytes),
            str(one.threads)] for name, one in speeds.items()])
    energies = {name: one.energy for name, one in speeds.items() if one.energy is not None}
    if energies:
        table("Energy", ["", *energies], energy_rows(list(energies.values())))
        print(energy_note(next(iter(energies.values()))))


def energy_rows(energies: list[Energy]) -> list[list[str]]:
    """Power, watt-hours of tokens and queries, and a year of answers, a column for each model."""
    from tsotsallm.evaluation.energy import ANSWERS_A_DAY

    rows = [["power", *(f"{one.power_w:.1f} W" for one in energies)],
            ["Wh, 1000 prompt tokens", *(f"{one.prefill_wh_per_1000_tokens:.3g}" for one in energies)],
            ["Wh, 1000 new tokens", *(f"{one.decode_wh_per_1000_tokens:.3g}" for one in energies)]]
    rows += [[f"query of {query}", *(f"{one.query_wh[query]:.3g} Wh, {one.query_co2_g[query]:.3g} g CO₂, "
                                     f"{one.query_water_ml[query]:.3g} ml water" for one in energies)]
             for query in energies[0].query_wh]
    return [*rows, [f"a year, {ANSWERS_A_DAY} a day", *(f"{one.year_kwh:.3g} kWh; kg CO₂: " + ", ".join(
        f"{country} {kg:.3g}" for country, kg in one.year_co2_kg.items()) for one in energies)]]


def energy_note(energy: Energy) -> str:
    """How the energy is known, and by what CO₂ and water follow from it."""
    return (f"energy {energy.label}; {energy.country}: {energy.carbon_g_per_kwh:.0f} g CO₂ per kWh; water "
            f"{energy.water_litres_per_kwh} litres per kWh; a year is of queries of {next(iter(energy.query_wh))}")


def print_caches(caches: list[CachePerplexity]) -> None:
    """Print one row per type of cache."""
    from tsotsallm.cli.lines import table
    from tsotsallm.units import human_bytes

    rows = [[one.kv, f"{one.perplexity:.4f}", f"{one.late:.4f}", f"{one.bytes_per_token:,.0f} B",
             human_bytes(one.bytes_per_token * one.context)] for one in caches]
    table(f"key-value caches on {caches[0].source}, windows of {caches[0].context} tokens",
          ["cache", "perplexity", "second half", "per token", "per window"], rows)


def print_perplexity(score: Perplexity) -> None:
    """Print the measures of one model on a text, its protocol, and the devices that it fits."""
    from tsotsallm.cli.lines import print_notes, table
    from tsotsallm.units import plus_minus

    rows = [["perplexity", f"{score.perplexity:.4f}",
             "" if score.reference_perplexity is None else f"{score.reference_perplexity:.4f}"],
            ["nats per token", plus_minus(score.loss, score.loss_standard_error), ""]]
    if score.bits_per_byte is not None:
        rows.append(["bits per byte", f"{score.bits_per_byte:.4f}", ""])
    if score.kl is not None:
        rows.append(["KL from original", plus_minus(score.kl, score.kl_standard_error), ""])
        rows.append(["same top token", f"{score.same_top_token:.1%}", ""])
    if (tail := score.tail) is not None:
        rows.append(["KL of tokens: median", f"{tail.kl_median:.3g}", ""])
        rows += [[f"  {share} of the tokens below", f"{value:.3g}", ""]
                 for share, value in (("99%", tail.kl_99), ("99.9%", tail.kl_999))]
        rows.append(["top token's probability, RMS change", f"{tail.top_probability_rms:.1%}", ""])
    protocol = score.protocol
    table(f"{score.model} on {protocol.text}", ["", "model", "original"], rows)
    print(f"protocol: {protocol.kind} of {protocol.context} tokens{', one BOS each' if protocol.bos else ''}, "
          f"{protocol.predicted_tokens} predicted tokens, {protocol.arithmetic}; ± is one standard error")
    print(f"fits: {', '.join(name for name, holds in score.fits.items() if holds) or 'none of the target devices'}")
    print_notes(score.notes)


def print_examination(scores: Examination, *, groups: bool) -> None:
    """Print one row per measure, then the costs.

    Scores have their standard errors, differences to the first model their intervals.
    """
    from tsotsallm.cli.lines import short_names, table

    shown = [one for one in scores.comparisons if groups or not one.group]
    several = len(scores.models) > 1
    names = short_names(scores.models)
    header = ["task", "measure", "items", *names, *(f"{name} − {names[0]}" for name in names[1:])]
    rows = [[one.task + (f" ({one.group})" if one.group else ""), one.measure.replace("of which", "·"), str(one.items),
             *score_cells(one), *_differences(one)] for one in shown]
    table("Scores", header, rows)
    for name, model in zip(names, scores.models, strict=True):
        if name != model:
            print(f"{name}: {model}")
    print("± is one standard error" + ("; differences with their paired 95% interval, ≈ where they are within noise, "
                                       "p of McNemar's test for right-or-wrong items" if several else ""))
    for row in scores.results:
        for result in row:
            for note in result.notes:
                print(f"note  {result.task}, {result.model}: {note}")
    print_costs(scores.costs)


def _number(value: float, share: bool, *, sign: bool = False) -> str:
    plus = "+" if sign else ""
    return f"{100 * value:{plus}.1f}" if share else f"{value:{plus}.4g}"


def score_cells(one: Comparison) -> list[str]:
    """What a table shows of the models' scores: value and standard error."""
    from tsotsallm.units import plus_minus

    unit = " %"
    if one.share:
        return [_number(score.value, True) + unit if score.standard_error is None else
                f"{_number(score.value, True)} ± {_number(score.standard_error, True)}{unit}" for score in one.scores]
    return [plus_minus(score.value, score.standard_error) for score in one.scores]


def _differences(one: Comparison) -> list[str]:
    cells = []
    for difference in one.differences:
        if difference is not None:
            mark = "≈ " if difference.within_noise else ""
            p = "" if difference.p is None else f" p {difference.p:.2g}"
            cells.append(f"{mark}{_number(difference.value, one.share, sign=True)} "
                         f"[{_number(difference.low, one.share)}, {_number(difference.high, one.share)}]{p}")
    return cells


def print_costs(costs: tuple[Cost, ...]) -> None:
    """Print one column per model: bytes, work, and what was measured of speed and energy."""
    from tsotsallm.cli.lines import short_names, table
    from tsotsallm.units import human_bytes

    parts = [part for part in costs[0].disk_bytes_by_part if any(cost.disk_bytes_by_part[part] for cost in costs)]
    rows = [["parameters", *(f"{cost.parameters:,}" for cost in costs)],
            ["of which not zero", *(f"{cost.nonzero_parameters:,}" for cost in costs)],
            ["bytes on disk", *(human_bytes(cost.disk_bytes) for cost in costs)],
            *([f"  {part}", *(human_bytes(cost.disk_bytes_by_part[part]) for cost in costs)] for part in parts),
            ["in memory as float32", *(human_bytes(cost.float32_bytes) for cost in costs)],
            *([f"  {part}", *(human_bytes(cost.float32_bytes_by_part[part]) for cost in costs)] for part in parts),
            ["KV cache per token, 16 bit", *(human_bytes(cost.kv_cache_bytes_per_token) for cost in costs)],
            ["MACs, prompt of 512", *(f"{cost.prefill_512_macs:.4g}" for cost in costs)],
            ["MACs, a token after 512", *(f"{cost.decode_after_512_macs:.4g}" for cost in costs)]]
    if all(cost.speed for cost in costs):
        speeds = [cost.speed for cost in costs if cost.speed]
        rows += [["prompt tokens per second", *(f"{speed.prefill_tokens_per_s:.1f}" for speed in speeds)],
                 ["new tokens per second", *(f"{speed.decode_tokens_per_s:.1f}" for speed in speeds)],
                 ["time to first token", *(f"{speed.first_token_s:.3f} s of {speed.prompt_tokens}" for speed in speeds)],
                 ["peak memory", *(human_bytes(speed.peak_rss_bytes) for speed in speeds)]]
        energies = [speed.energy for speed in speeds if speed.energy]
        rows += energy_rows(energies) if energies else []
    fits = [", ".join(name for name, holds in cost.fits.items() if holds) or "none" for cost in costs]
    rows.append(["fits", *fits])
    table("Cost", ["", *short_names([cost.model for cost in costs])], rows)
    for energy in [cost.speed.energy for cost in costs if cost.speed and cost.speed.energy][:1]:
        print(energy_note(energy))


def print_forecasts(forecasts: list[TaskForecast]) -> None:
    """Print one row per task and model: how it would run, and the least time that it takes."""
    from tsotsallm.cli.lines import table
    from tsotsallm.units import human_seconds

    table("Evaluation", ["task", "model", "items", "how", "tokens", "passes over the weights", "floor of time"],
          [[one.task, one.model, str(one.items), one.how, f"{one.tokens:,}", str(one.passes), human_seconds(one.floor_s)]
           for one in forecasts])
    slow = [one for one in forecasts if one.how == "sweeps"]
    if slow:
        print(f"{slow[0].model} does not fit in memory: it generates by sweeps, one pass over its weights per token, "
              f"{human_seconds(slow[0].pass_s)} or more each")


def print_harness(scored: dict[str, JsonObject]) -> None:
    """Print one row per task and metric, as lm-evaluation-harness names them."""
    from tsotsallm.cli.lines import table
    from tsotsallm.units import plus_minus

    names = [(task, metric) for found in list(scored.values())[:1] for task, values in found["results"].items()
             for metric, value in values.items() if isinstance(value, float) and "_stderr" not in metric]

    def cell(found: JsonObject, task: str, metric: str) -> str:
        values = found["results"].get(task, {})
        error = values.get(metric.replace(",", "_stderr,"))
        return plus_minus(values[metric], error if isinstance(error, float) else None) if metric in values else ""

    table("lm-evaluation-harness", ["task", "metric", *scored],
          [[task, metric.partition(",")[0], *(cell(found, task, metric) for found in scored.values())]
           for task, metric in names])
    for model, found in scored.items():
        print(f"{model} fits: {', '.join(name for name, holds in found['fits'].items() if holds) or 'no target device'}")
