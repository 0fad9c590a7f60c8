"""What models know, lose and cost."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast, get_args

from torch import device as torch_device

from tsotsallm.analysis.analyze import Analysis, Format
from tsotsallm.analysis.analyze import analyze as look_at
from tsotsallm.api.computers import Computers
from tsotsallm.checkpoint.reader import EMBEDDED, Checkpoint
from tsotsallm.checkpoint.view import View
from tsotsallm.cluster.examination import examine_on
from tsotsallm.compression import check_device
from tsotsallm.engine.llama import CacheType, Llama
from tsotsallm.errors import CheckpointError, CorpusError, TsotsallmError
from tsotsallm.evaluation.cost import Speed, measure_gguf_speed
from tsotsallm.evaluation.examination import Examination, examine, text_task
from tsotsallm.evaluation.franken import OrderResult
from tsotsallm.evaluation.franken import study as study_orders
from tsotsallm.evaluation.kv_cache import CachePerplexity, cache_perplexities
from tsotsallm.evaluation.perplexity import Kind, Perplexity, evaluate_perplexity
from tsotsallm.evaluation.task_run import open_examinee, prepare
from tsotsallm.evaluation.tasks import Task, read_task
from tsotsallm.lab.texts import world_text
from tsotsallm.run.run import Result
from tsotsallm.streaming import corpus as texts
from tsotsallm.streaming.sweep import Tick, silent


def examine_stages(model: str | Path, result: Result, tasks: Sequence[str | Path | Task], *, data: str | Path | None = None,
                   limit: int | None = None, device: str = "cpu", tick: Tick = silent) -> Examination:
    """Ask the original and the model after every kept stage the same tasks."""
    return examine([model, *result.stages, result.path], tasks, data=data, limit=limit, reference=model, device=device,
                   tick=tick)


def evaluate(model: str | Path, text: str | Path | None = None, *, context: int = 512, protocol: Kind = "windows",
             reference: str | Path | None = None, device: str = "cpu", scratch: str | Path | None = None,
             limit: int | None = None, tick: Tick = silent) -> Perplexity:
    """Perplexity and, against a reference, KL divergence on a text; without one, on the embedded world's test text."""
    checkpoint = Checkpoint.open(model)
    if text is None:
        if EMBEDDED not in (str(model), str(reference)):
            raise CorpusError("give the text to evaluate on with --text FILE; only the embedded model brings its own")
        source, content = "the embedded world, test", world_text(test=True, characters=60_000)
    else:
        source, content = Path(text).name, texts.read_text(text)
    return evaluate_perplexity(
        checkpoint, content, source=source, context=context, kind=protocol, device=check_device(device),
        reference=Checkpoint.open(reference) if reference is not None else None, name=str(model),
        reference_name=str(reference or ""), scratch=None if scratch is None else Path(scratch), limit=limit, tick=tick)


def evaluate_gguf(models: Sequence[str | Path], text: str | Path | None = None, *, reference: str | Path | None = None,
                  kv: Sequence[str] = ("f16",), context: int = 512, limit: int | None = None, task: str | None = None,
                  tick: Tick = silent) -> list[CachePerplexity]:
    """Perplexity of one GGUF file in llama.cpp with each type of key-value cache.

    `reference` is the checkpoint that the file was made from, if there is one: its tokenizer cuts the text, else the file's.
    """
    if len(models) != 1 or Path(models[0]).suffix != ".gguf" or task is not None:
        raise TsotsallmError("--kv compares caches of one GGUF file on a text, and a GGUF file is scored on a text only; "
                             "give one GGUF file with --text, or its checkpoint for tasks")
    for kind in kv:
        if kind not in get_args(CacheType):
            raise TsotsallmError(f"--kv has {kind!r}; it takes {', '.join(get_args(CacheType))}, with commas between")
    if text is None and str(reference) != EMBEDDED:
        raise CorpusError("give the text to evaluate on with --text FILE; only the embedded model brings its own")
    content = world_text(test=True, characters=60_000) if text is None else texts.read_text(text)
    source = "the embedded world, test" if text is None else Path(text).name
    return cache_perplexities(Path(models[0]), None if reference is None else Checkpoint.open(reference), content, source,
                              [cast(CacheType, kind) for kind in kv], context=context, limit=limit, tick=tick)


def gguf_speeds(models: Sequence[str | Path], *, text: str | Path | None = None, task: str | None = None,
                kv: str = "f16", reference: str | Path | None = None) -> dict[str, Speed]:
    """File -> its speed and memory in llama.cpp, on all cores."""
    if text is not None or task is not None or kv != "f16" or reference is not None:
        raise TsotsallmError("--speed times GGUF files by themselves; leave --text, --task, --kv and --reference out")
    for model in models:
        if Path(model).suffix != ".gguf":
            raise TsotsallmError(f"{model} is no GGUF file; time GGUF files and checkpoints one kind at a time")
        Llama(Path(model))                      # what is wrong with a file is told here
    return {str(model): measure_gguf_speed(model) for model in models}


def harness(model: str | Path, tasks: Sequence[str], *, limit: int | None = None, shots: int | None = None,
            include: str | Path | None = None, device: str = "cpu", scratch: str | Path | None = None,
            tick: Tick = silent) -> dict[str, Any]:
    """Evaluate tasks of lm-evaluation-harness over the streaming scorer; `include` is a folder of own task files."""
    from tsotsallm.evaluation.harness import run_harness

    with tempfile.TemporaryDirectory(dir=scratch, ignore_cleanup_errors=True) as folder:
        return run_harness(open_examinee(model, Path(folder), device=check_device(device), tick=tick), tasks, limit=limit,
                           shots=shots, include=include)


def franken(model: str | Path, text: str | Path | None = None, *, task: str | Path | None = None,
            data: str | Path | None = None, limit: int | None = None, seed: int = 0, only: Sequence[str] | None = None,
            device: str = "cpu", scratch: str | Path | None = None, tick: Tick = silent) -> Iterator[OrderResult]:
    """The layer-order study of FRANKEN-LLAMA on a model: 25 orders, rescaled to its number of layers, the whole one first.

    Perplexity and KL divergence are of the text (of the embedded world without one), accuracy of a task, if one is named.
    """
    if text is None and str(model) != EMBEDDED:
        raise CorpusError("give the text to evaluate on with --text FILE; only the embedded model brings its own")
    of_text = prepare(text_task(world=text is None), text, limit=limit)
    of_task = prepare(read_task(task), data, limit=limit, seed=seed) if task is not None else None
    view = View.of(Checkpoint.open(model))
    where = check_device(device)
    with tempfile.TemporaryDirectory(dir=scratch, ignore_cleanup_errors=True) as folder:
        yield from study_orders(view, str(model), of_text, of_task, Path(folder), device=where, only=only, tick=tick)


def analyze(model: str | Path, text: str | Path | None, out: str | Path, *, reference: str | Path | None = None,
            layers: Sequence[int] | None = None, heads: Sequence[int] | None = None, tokens: int = 256, windows: int = 16,
            window: int = 256, seed: int = 0, picture: Format = "png", device: str = "cpu",
            scratch: str | Path | None = None, tick: Tick = silent) -> Analysis:
    """Look inside a model, beside its original where one is given: pictures and analysis.json go to `out`.

    Attention and states are those of the first `tokens` tokens of the text, importance and outliers of its windows.
    """
    if text is None and EMBEDDED not in (str(model), str(reference)):
        raise CorpusError("give the text to look at the model with by --text FILE; only the embedded model brings its own")
    checkpoint = Checkpoint.open(model)
    content = world_text(test=True, characters=100_000) if text is None else texts.read_text(text)
    source = "the embedded world, test" if text is None else Path(text).name
    codec = checkpoint.codec
    models = {"model": View.of(checkpoint)}
    ids = codec.encode(content[:20 * tokens])[:min(tokens, checkpoint.spec.context)]
    if reference is not None:
        original = Checkpoint.open(reference)
        if original.codec.encode(content[:20 * tokens])[:len(ids)] != ids:
            raise CheckpointError(f"{reference} segments the text differently from {model}: their pictures do not compare")
        models["original"] = View.of(original)
    window = min(window, checkpoint.spec.context, len(codec.encode(content[:20 * window])))
    corpus = texts.calibration(content, codec, windows=windows, length=window, seed=seed, source=source)
    return look_at(models, ids, corpus, Path(out), layers=layers, heads=heads, picture=picture,
                   device=torch_device(check_device(device)), scratch=None if scratch is None else Path(scratch), tick=tick)


def examine_on_cluster(models: Sequence[str | Path], tasks: Sequence[str | Path], workers: Computers, *,
                       data: str | Path | None = None, limit: int | None = None, seed: int = 0,
                       reference: str | Path | None = None, say: Callable[[str], None] = print) -> Examination:
    """Ask several models several tasks, each pair a job on a cluster; differences are to the first model."""
    with workers.cluster(say) as cluster:
        return examine_on(cluster, [str(model) for model in models], [str(task) for task in tasks],
                          data=None if data is None else str(data), limit=limit, seed=seed,
                          reference=None if reference is None else str(reference))
