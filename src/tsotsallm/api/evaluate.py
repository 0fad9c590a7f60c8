"""What models know, lose and cost: one function for each kind of evaluation."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Unpack, cast, get_args

from tsotsallm.api.computers import Computers
from tsotsallm.checkpoint.gguf_place import first_part, gguf_path, is_gguf
from tsotsallm.checkpoint.reader import EMBEDDED, Checkpoint
from tsotsallm.cluster.examination import examine_on
from tsotsallm.compression import check_device
from tsotsallm.engine.llama import CacheType, Llama
from tsotsallm.errors import CorpusError, TsotsallmError
from tsotsallm.evaluation.cost import Speed, measure_gguf_speed
from tsotsallm.evaluation.energy import carbon_by_country
from tsotsallm.evaluation.examination import Examination, examine
from tsotsallm.evaluation.forecast import TaskForecast
from tsotsallm.evaluation.in_llama import forecast_in_llama, perplexity_in_llama
from tsotsallm.evaluation.kv_cache import CachePerplexity, cache_perplexities
from tsotsallm.evaluation.options import RunKeywords, RunOptions
from tsotsallm.evaluation.perplexity import Kind, Perplexity, evaluate_perplexity
from tsotsallm.evaluation.task_run import open_examinee
from tsotsallm.evaluation.tasks import Task
from tsotsallm.files import JsonObject
from tsotsallm.lab.texts import world_text
from tsotsallm.records import amended
from tsotsallm.run.run import Result
from tsotsallm.streaming import corpus as texts
from tsotsallm.streaming.sweep import Tick, silent

WORLD_CHARACTERS = 60_000
"""Characters of the embedded world's test text that models are scored on."""


def text_and_source(text: str | Path | None, models: Iterable[str | Path | None],
                    characters: int = WORLD_CHARACTERS) -> tuple[str, str]:
    """(text, its name): that of a file, or the embedded world's test text where the embedded model is among the models.

    Raises CorpusError where there is neither.
    """
    if text is not None:
        return texts.read_text(text, "--text"), Path(text).name
    if EMBEDDED not in map(str, models):
        raise CorpusError("give a text to evaluate on with --text FILE; only the embedded model comes with its own")
    return world_text(test=True, characters=characters), "the embedded world, test"


def evaluate(model: str | Path, text: str | Path | None = None, *, context: int = 512, protocol: Kind = "windows",
             reference: str | Path | None = None, limit: int | None = None, options: RunOptions | None = None,
             **keywords: Unpack[RunKeywords]) -> Perplexity:
    """Perplexity and, against a reference, KL divergence on a text; without one, on the embedded world's test text.

    The text is scored in windows of `context` tokens, or line by line with the protocol `rows`; `limit` takes the first
    windows. Where it runs is given as `options` or as keywords: device, scratch, tick.
    """
    options = amended(options or RunOptions(), keywords, evaluate)
    checkpoint = Checkpoint.streamed(model)
    original = Checkpoint.streamed(reference) if reference is not None else None
    content, source = text_and_source(text, (model, reference))
    return evaluate_perplexity(
        checkpoint, content, source=source, reference=original,
        name=str(model), reference_name=str(reference or ""), context=context, kind=protocol, limit=limit,
        device=check_device(options.device), scratch=options.scratch, tick=options.tick)


def evaluate_gguf(models: Sequence[str | Path], text: str | Path | None = None, *, reference: str | Path | None = None,
                  kv: Sequence[str] = ("f16",), context: int = 512, limit: int | None = None, task: str | None = None,
                  tick: Tick = silent) -> list[CachePerplexity]:
    """Perplexity of one GGUF file in llama.cpp with each type of key-value cache.

    `reference` is the checkpoint that the file was made from, if there is one: its tokenizer splits the text, else the
    file's own does.
    """
    if len(models) != 1 or not is_gguf(models[0]) or task is not None:
        raise TsotsallmError("--kv compares caches of one GGUF file on a text in llama.cpp; give one GGUF file with --text, "
                             "or leave out --kv")
    for kind in kv:
        if kind not in get_args(CacheType):
            raise TsotsallmError(f"--kv has {kind!r}; it takes {', '.join(get_args(CacheType))}, separated by commas")
    content, source = text_and_source(text, (reference,))
    tokens_of = None if reference is None else Checkpoint.streamed(reference)
    return cache_perplexities(_runnable(models[0]), tokens_of, content, source,
                              [cast(CacheType, kind) for kind in kv], context=context, limit=limit, tick=tick)


def evaluate_in_llama(model: str | Path, text: str | Path | None = None, *, reference: str | Path | None = None,
                      context: int = 512, limit: int | None = None, tick: Tick = silent) -> Perplexity:
    """Perplexity of a GGUF file in llama.cpp and, against a reference, its KL divergence there; windows run at once.

    llama.cpp rounds activations too, so that this is what the user of the file gets. The reference is streamed in float32.
    """
    original = None if reference is None else Checkpoint.streamed(reference)
    content, source = text_and_source(text, (reference,))
    return perplexity_in_llama(_runnable(model), content, source, context=context, limit=limit, reference=original,
                               reference_name=str(reference or ""), name=str(model), tick=tick)


def plan_in_llama(model: str | Path, text: str | Path | None = None, *, reference: str | Path | None = None,
                  context: int = 512, limit: int | None = None) -> TaskForecast:
    """How long `evaluate_in_llama` takes on this computer; two windows are scored to find out."""
    original = None if reference is None else Checkpoint.streamed(reference)
    content, source = text_and_source(text, (reference,))
    return forecast_in_llama(_runnable(model), content, source, context=context, limit=limit, reference=original,
                             reference_name=str(reference or ""), name=str(model))


def _runnable(model: str | Path) -> Path:
    """The file of a GGUF model that llama.cpp loads."""
    file = gguf_path(model)
    assert file is not None, f"{model} is no GGUF file"
    return first_part(file)


def gguf_speeds(models: Sequence[str | Path], *, text: str | Path | None = None, task: str | None = None,
                kv: str = "f16", reference: str | Path | None = None, country: str | None = None) -> dict[str, Speed]:
    """File -> its speed and memory in llama.cpp, on all cores; with a country (or several, with commas) also its energy."""
    if text is not None or task is not None or kv != "f16" or reference is not None:
        raise TsotsallmError("--speed times GGUF files by themselves; leave out --text, --task, --kv and --reference")
    if country is not None:
        carbon_by_country(country)
    for model in models:
        if not is_gguf(model):
            raise TsotsallmError(f"{model} is no GGUF file; time GGUF files and checkpoints one kind at a time")
        Llama(_runnable(model))                 # reports what is wrong with a file before any is timed
    return {str(model): measure_gguf_speed(_runnable(model), country=country) for model in models}


def harness(model: str | Path, tasks: Sequence[str], *, limit: int | None = None, shots: int | None = None,
            include: str | Path | None = None, device: str = "cpu", scratch: str | Path | None = None,
            tick: Tick = silent) -> JsonObject:
    """Evaluate tasks of lm-evaluation-harness with the streaming scorer; `include` is a folder with task files of one's own.

    `limit` takes the first items of every task, `shots` solved examples before each.
    """
    from tsotsallm.evaluation.harness import run_harness

    with tempfile.TemporaryDirectory(dir=scratch, ignore_cleanup_errors=True) as folder:
        return run_harness(open_examinee(model, Path(folder), device=check_device(device), tick=tick), tasks, limit=limit,
                           shots=shots, include=include)


def examine_stages(model: str | Path, result: Result, tasks: Sequence[str | Path | Task], *, data: str | Path | None = None,
                   limit: int | None = None, device: str = "cpu", tick: Tick = silent) -> Examination:
    """Evaluate the original and the model after every kept stage on the same tasks."""
    return examine([model, *result.stages, result.path], tasks, data=data, limit=limit, reference=model, device=device,
                   tick=tick)


def examine_on_cluster(models: Sequence[str | Path], tasks: Sequence[str | Path], workers: Computers, *,
                       data: str | Path | None = None, limit: int | None = None, seed: int = 0,
                       reference: str | Path | None = None, say: Callable[[str], None] = print) -> Examination:
    """Evaluate models on tasks, each pair a job on a cluster; differences are to the first model."""
    with workers.cluster(say) as cluster:
        return examine_on(cluster, [str(model) for model in models], [str(task) for task in tasks],
                          data=None if data is None else str(data), limit=limit, seed=seed,
                          reference=None if reference is None else str(reference))
