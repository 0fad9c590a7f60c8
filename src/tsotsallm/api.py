"""Everything that the command line does, as one call each."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, cast, get_args

from torch import device as torch_device

from tsotsallm import compression
from tsotsallm.analysis import pictures
from tsotsallm.analysis.analyze import Analysis, Format
from tsotsallm.analysis.analyze import analyze as look_at
from tsotsallm.checkpoint.reader import EMBEDDED, Checkpoint, locate
from tsotsallm.checkpoint.view import View
from tsotsallm.checkpoint.writer import write_json
from tsotsallm.cluster.client import Cluster
from tsotsallm.cluster.examination import examine_on
from tsotsallm.cluster.generation import continuations_on
from tsotsallm.cluster.worker import parse_tls
from tsotsallm.compression import Calibration, check_device, plan
from tsotsallm.engine.llama import CacheType, Llama
from tsotsallm.engine.llama import installed as llama_installed
from tsotsallm.engine.speakers import continuations, speaker
from tsotsallm.engine.speaking import Question, Sampling
from tsotsallm.engine.speaking import texts as texts_of
from tsotsallm.errors import (
    CheckpointError,
    CorpusError,
    ExportError,
    MissingExtraError,
    ReportError,
    ResourceError,
    ServeError,
    StudyError,
    TsotsallmError,
)
from tsotsallm.evaluation.cost import Speed, check_fits, measure_gguf_speed
from tsotsallm.evaluation.engines import CachePerplexity, cache_perplexities
from tsotsallm.evaluation.examination import Examination, check_tasks, examine, plan_examination, text_task
from tsotsallm.evaluation.examine import (
    open_examinee,
    prepare,
)
from tsotsallm.evaluation.franken import OrderResult
from tsotsallm.evaluation.franken import study as study_orders
from tsotsallm.evaluation.perplexity import Kind, Perplexity, evaluate_perplexity
from tsotsallm.evaluation.tasks import Task, read_task
from tsotsallm.export.gguf import Dense, export_gguf
from tsotsallm.export.huggingface import export_huggingface
from tsotsallm.export.publish import modelfile_path, write_modelfile
from tsotsallm.export.publish import push as push_result
from tsotsallm.export.verify import read_back, verify_gguf
from tsotsallm.inspection import Anatomy, inspect_checkpoint
from tsotsallm.lab.texts import world_text
from tsotsallm.machine import bytes_from_text
from tsotsallm.report.document import Samples
from tsotsallm.report.fitted import fit_document
from tsotsallm.report.page import write as write_page
from tsotsallm.report.result import result_document
from tsotsallm.report.studied import study_document
from tsotsallm.run import Progress, Result
from tsotsallm.serve import bundle as bundles
from tsotsallm.serve.bundle import Bundled
from tsotsallm.streaming import corpus as texts
from tsotsallm.streaming.sweep import Tick, silent
from tsotsallm.study.fit import Fitted, target_of
from tsotsallm.study.fit import fit as find_fit
from tsotsallm.study.ledger import Ledger, Trial
from tsotsallm.study.spec import read_content as study_content
from tsotsallm.study.spec import spec_from
from tsotsallm.study.study import Found, open_study
from tsotsallm.study.study import run_study as try_all
from tsotsallm.study.units import Settings as FitSettings
from tsotsallm.study.workers import OnCluster
from tsotsallm.tables.annotate import TASKS as TABLE_TASKS
from tsotsallm.tables.jobs import Annotations
from tsotsallm.tables.jobs import annotate as annotate_all
from tsotsallm.tables.scoring import Gold, Score, domain_of, read_gold
from tsotsallm.tables.scoring import score as score_submissions
from tsotsallm.tables.world import world_tables_folder, write_world

Given = ParamSpec("Given")
SAMPLES, WORDS = 4, 8
"""Prompts of a report, and words of each where they are taken from a text."""
PART = 16
"""Prompts that are continued in one job."""


@dataclass(frozen=True)
class Computers:
    """A Dask cluster by its scheduler's address, and certificates where connections are encrypted."""

    scheduler: str
    tls_ca: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None

    @contextlib.contextmanager
    def cluster(self, say: Callable[[str], None]) -> Iterator[Cluster]:
        found = Cluster(self.scheduler, parse_tls(self.tls_ca, self.tls_cert, self.tls_key), say)
        try:
            yield found
        finally:
            found.close()


def _draw(out: Path) -> None:
    """A picture beside the curve of every training and beside every decision; without matplotlib the numbers alone."""
    try:
        for path in sorted(out.glob("training-*.json")):
            pictures.training_curve(json.loads(path.read_text("utf-8")), path.with_suffix(".png"))
        for path in sorted(out.glob("decision-*.json")):
            decision = json.loads(path.read_text("utf-8"))
            draw = next((kind for key, kind in (("ranks", pictures.ranks), ("grids", pictures.grids)) if key in decision),
                        pictures.selection)
            draw(decision, path.with_suffix(".png"))
    except MissingExtraError:
        return


def _drawn(compress: Callable[Given, Result]) -> Callable[Given, Result]:
    """The same, with pictures of what was learned and decided in the result."""
    @functools.wraps(compress)
    def drawn(*args: Given.args, **settings: Given.kwargs) -> Result:
        result = compress(*args, **settings)
        _draw(result.path)
        return result
    return drawn


compress = _drawn(compression.compress)


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


def evaluate_gguf(models: Sequence[str | Path], text: str | Path | None = None, *, reference: str | Path | None,
                  kv: Sequence[str] = ("f16",), context: int = 512, limit: int | None = None, task: str | None = None,
                  tick: Tick = silent) -> list[CachePerplexity]:
    """Perplexity of one GGUF file in llama.cpp with each type of key-value cache.

    `reference` is the checkpoint that the file was made from: its tokenizer cuts the text.
    """
    if len(models) != 1 or Path(models[0]).suffix != ".gguf" or task is not None:
        raise TsotsallmError("--kv compares caches of one GGUF file on a text, and a GGUF file is scored on a text only; "
                             "give one GGUF file with --text, or its checkpoint for tasks")
    if reference is None:
        raise TsotsallmError("name the checkpoint that the GGUF file was made from with --reference: its tokenizer cuts the "
                             "text")
    for kind in kv:
        if kind not in get_args(CacheType):
            raise TsotsallmError(f"--kv has {kind!r}; it takes {', '.join(get_args(CacheType))}, with commas between")
    content = world_text(test=True, characters=60_000) if text is None else texts.read_text(text)
    source = "the embedded world, test" if text is None else Path(text).name
    return cache_perplexities(Path(models[0]), Checkpoint.open(reference), content, source,
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
    tokenizer = checkpoint.tokenizer()
    models = {"model": View.of(checkpoint)}
    ids = list(tokenizer(content[:20 * tokens], verbose=False)["input_ids"])[:min(tokens, checkpoint.spec.context)]
    if reference is not None:
        original = Checkpoint.open(reference)
        if list(original.tokenizer()(content[:20 * tokens], verbose=False)["input_ids"])[:len(ids)] != ids:
            raise CheckpointError(f"{reference} segments the text differently from {model}: their pictures do not compare")
        models["original"] = View.of(original)
    window = min(window, checkpoint.spec.context, len(tokenizer(content[:20 * window], verbose=False)["input_ids"]))
    corpus = texts.calibration(content, tokenizer, windows=windows, length=window, seed=seed, source=source)
    return look_at(models, ids, corpus, Path(out), layers=layers, heads=heads, picture=picture,
                   device=torch_device(check_device(device)), scratch=None if scratch is None else Path(scratch), tick=tick)


def fit(model: str | Path, out: str | Path, *, device: str | None = None, size: int | str | None = None,
        faster_than: float | None = None, keep_text: Sequence[str | Path] = (), calibration: str | Path | None = None,
        windows: int = 32, window: int = 512, minutes: float = 60.0, recover: bool = False, quick: bool = False,
        tasks: Sequence[str | Path] = (), data: str | Path | None = None, limit: int | None = None, seed: int = 0,
        say: Callable[[str], None] = print,
        progress: Callable[[Progress], None] = lambda _now: None) -> tuple[Fitted, Examination | None]:
    """Find the best model for a device or for a GGUF file of a size: what was found, and the answers to the tasks.

    With `recover`, layers of a cut model learn from the original's before their numbers get fewer bits; `quick` rounds
    candidates in a third of the time, at some loss.
    """
    if tasks:
        check_tasks(tasks, data=data, limit=limit)
    checkpoint = Checkpoint.open(model)
    target = target_of(checkpoint.spec.kv_bytes_per_token(), device=device, faster_than=faster_than,
                       size=None if size is None else bytes_from_text(str(size), "--bytes"))
    settings = FitSettings(None if calibration is None else str(calibration), tuple(map(str, keep_text)), windows,
                           min(window, checkpoint.spec.context), seed, minutes=minutes,
                           recover=({"distill": {"mode": "layers"}},) if recover else (), quick=quick)
    found = find_fit(str(model), target, Path(out), settings, say, progress)
    answers = examine([model, found.path], tasks, data=data, limit=limit, reference=model) if tasks else None
    if answers is not None:
        content = json.loads((Path(out) / "fit.json").read_text("utf-8"))
        write_json(Path(out) / "fit.json", content | {"examination": answers.plain()})
    with _unless_missing(say, "the report"):
        text, _ = compression.calibration_text(checkpoint, Calibration(settings.calibration, windows, window, seed))
        samples = _samples({str(model): str(model), "fitted": str(found.path)}, _beginnings(text))
        write_page(fit_document(Path(out), [answers] if answers else [], samples), Path(out) / "report.html")
    return found, answers


@contextlib.contextmanager
def _unless_missing(say: Callable[[str], None], what: str) -> Iterator[None]:
    """Do without something for which an extra is missing, and tell so."""
    try:
        yield
    except MissingExtraError as error:
        say(f"{what} is left out: {error}")


def _samples(models: Mapping[str, str], prompts: Sequence[str], tokens: int = 40) -> Samples | None:
    """What models make of prompts; None where one is larger than memory."""
    try:
        for model in models.values():
            check_fits(model)
    except ResourceError:
        return None
    return Samples(prompts, {name: continuations(model, prompts, tokens, Sampling()) for name, model in models.items()})


def run_study(spec: str | Path, out: str | Path, *, model: str | Path = EMBEDDED, given: Mapping[str, str] | None = None,
          text: str | Path | None = None, calibration: str | Path | None = None, trials: int | None = None,
          hours: float | None = None, workers: Computers | None = None,
              say: Callable[[str], None] = print) -> Found:
    """Run a study of recipes, or go on with it; options stand in place of what its file says.

    With `workers`, trials run on a cluster.
    """
    content = study_content(spec)
    for part, name, value in (("evaluation", "text", text), ("calibration", "source", calibration)):
        if value is not None:
            content[part] = {**(content.get(part) or {}), name: str(value)}
    content |= {name: value for name, value in (("trials", trials), ("hours", hours)) if value is not None}
    layers = Checkpoint.open(model).spec.layers
    study = spec_from(Path(spec).stem, content, layers=layers, given=given)
    with workers.cluster(say) if workers is not None else contextlib.nullcontext() as cluster:
        found = try_all(study, str(model), Path(out), OnCluster(cluster) if cluster is not None else None, say)
    with _unless_missing(say, "the report"):
        write_page(study_document(Path(out)), Path(out) / "report.html")
    return found


def trials_of(folder: str | Path, numbers: Sequence[int]) -> list[Trial]:
    """Some trials of a study."""
    known = {trial.number: trial for trial in open_study(Path(folder)).trials}
    for number in numbers:
        if number not in known:
            raise StudyError(f"the study has no trial {number}; it has {min(known, default=0)} to {max(known, default=0)}")
    return [known[number] for number in numbers]


def notebook(folder: str | Path) -> list[dict[str, Any]]:
    """The lab notebook of a study: what was planned, done, learned, and done next."""
    open_study(Path(folder))
    with closing(Ledger(Path(folder))) as ledger:
        return ledger.notes()


def export_study(folder: str | Path, csv: str | Path) -> int:
    """Write a study's ledger as a table; the number of trials."""
    open_study(Path(folder))
    with closing(Ledger(Path(folder))) as ledger:
        return ledger.export_csv(Path(csv))


def inspect(model: str | Path) -> Anatomy:
    """Anatomy of a checkpoint: widths, parameters, bytes by part, cache and work per token."""
    return inspect_checkpoint(Checkpoint.open(model))


def to_huggingface(model: str | Path, out: str | Path, *, tick: Tick = silent) -> dict[str, Any]:
    """Write a checkpoint as a plain Hugging Face one, every weight dense; returns the path and notes."""
    return {"hf": str(out), "notes": export_huggingface(Checkpoint.open(model), Path(out), tick)}


def to_gguf(model: str | Path, out: str | Path, *, dense: str | None = None, ollama: bool = False, verify: bool = True,
            tick: Tick = silent) -> dict[str, Any]:
    """Write a checkpoint as GGUF; returns the paths, bytes and notes.

    Weights on no grid of GGUF are written as `dense`: f16, bf16 or f32. `ollama` adds a Modelfile. With `verify` the file
    is read back, and its log-probabilities are compared with llama.cpp's where that is installed.
    """
    if dense not in (None, *get_args(Dense)):
        raise ExportError(f"--dense is {dense!r}; it takes {', '.join(get_args(Dense))}")
    path = Path(out)
    if path.suffix != ".gguf":
        raise ExportError(f"{path} does not end in .gguf, as engines expect of such a file")
    modelfile = modelfile_path(path) if ollama else None        # refused before anything is written
    checkpoint = Checkpoint.open(model)
    name = str(model) if "/" in str(model) and not Path(model).exists() else checkpoint.directory.resolve().name
    found = export_gguf(checkpoint, path, dense=dense, name=name, tick=tick)    # type: ignore[arg-type]
    answer: dict[str, Any] = {"gguf": str(path), **found.plain()}
    answer["notes"] = list(answer["notes"])
    if modelfile is not None:
        answer["modelfile"] = str(write_modelfile(modelfile, path, found.adapter, checkpoint.spec.context))
    if verify:
        read_back(path)
        if not llama_installed():
            answer["notes"].append("not compared with llama.cpp, which is not installed: pip install 'tsotsallm[llama]'")
        else:
            with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
                states = Path(scratch) / "states.f32"
                answer["verified"] = verify_gguf(path, checkpoint, states, adapter=found.adapter).plain()
    return answer


def push(result: str | Path, repository: str, *, upload: bool = False, public: bool = False) -> dict[str, Any]:
    """Upload a result to the hub; a dry run unless `upload`."""
    return push_result(Path(result), repository, upload=upload, public=public)


def examine_on_cluster(models: Sequence[str | Path], tasks: Sequence[str | Path], workers: Computers, *,
                       data: str | Path | None = None, limit: int | None = None, seed: int = 0,
                       reference: str | Path | None = None, say: Callable[[str], None] = print) -> Examination:
    """Ask several models several tasks, each pair a job on a cluster; differences are to the first model."""
    with workers.cluster(say) as cluster:
        return examine_on(cluster, [str(model) for model in models], [str(task) for task in tasks],
                          data=None if data is None else str(data), limit=limit, seed=seed,
                          reference=None if reference is None else str(reference))


def generate_many(model: str | Path, prompts: str | Path, out: str | Path, *, tokens: int = 64, temperature: float = 0.0,
                  top_p: float = 1.0, top_k: int = 0, seed: int = 0, workers: Computers | None = None,
                  say: Callable[[str], None] = print) -> int:
    """Continue every line of a file; a JSON line for each goes to `out`, in their order. The number of lines.

    What an interrupted attempt wrote is not done again.
    """
    lines = texts.read_text(prompts).splitlines()
    if not any(lines):
        raise TsotsallmError(f"{prompts} holds no prompts; give a text file with one a line")
    path, sampling = Path(out), Sampling(temperature, top_p, top_k, seed)
    begun = path.read_text("utf-8").splitlines() if path.exists() else []
    done = [json.loads(line) for line in begun]
    if [one.get("prompt") for one in done] != lines[:len(done)]:
        raise TsotsallmError(f"{path} holds answers to other prompts; choose another name with -o, or delete it first")
    left = lines[len(done):]
    parts = [left[first:first + PART] for first in range(0, len(left), PART)]
    ready: dict[int, list[str]] = {}
    written = 0
    with contextlib.ExitStack() as stack:
        if workers is None:
            found: Iterator[tuple[int, list[str]]] = (
                (number, continuations(str(model), part, tokens, sampling)) for number, part in enumerate(parts))
        else:
            found = continuations_on(stack.enter_context(workers.cluster(say)), str(model), parts, tokens, sampling)
        for number, answers in found:
            ready[number] = answers
            while written in ready:
                with path.open("a", encoding="utf-8") as file:
                    for prompt, answer in zip(parts[written], ready.pop(written), strict=True):
                        file.write(json.dumps({"prompt": prompt, "text": answer}, ensure_ascii=False) + "\n")
                written += 1
                say(f"{len(done) + sum(map(len, parts[:written]))} of {len(lines)} prompts")
    return len(lines)


def write_report(paths: Sequence[str | Path], out: str | Path, *, reference: str | Path | None = None,
           text: str | Path | None = None, tasks: Sequence[str | Path] = (), data: str | Path | None = None,
           limit: int | None = None, seed: int = 0, prompts: str | Path | None = None, tokens: int = 40, speed: bool = False,
           country: str | None = None, tick: Tick = silent) -> list[Path]:
    """Write an HTML page, and its pictures as files, about a study, a fit, a result, or several results side by side.

    Results and fits are evaluated for it, beside `reference` where that is given or known: on `text` (of the embedded world
    without one), on `tasks`, and with `prompts`, a file of one a line, or beginnings of the text.
    """
    folder = Path(paths[0])
    alone = len(paths) == 1
    if alone and any((folder / name).exists() for name in ("ledger.sqlite", "trials.jsonl")):
        if reference or text or tasks or prompts or speed or country:
            raise ReportError("the report on a study is made from its ledger alone; give the folder and -o, nothing else")
        return write_page(study_document(folder), Path(out))
    fitted = alone and (folder / "fit.json").exists()
    models = [str(path) for path in paths]
    if fitted:
        reference = reference or str(json.loads((folder / "fit.json").read_text("utf-8"))["model"])
        models = [str(folder / "model")]
    elif reference is None and (Checkpoint.open(models[0]).provenance or {}).get("source") == EMBEDDED:
        reference = EMBEDDED
    asked = [*([str(reference)] if reference is not None else []), *models]
    same = {"limit": limit, "seed": seed, "reference": reference, "tick": tick}
    costly: dict[str, Any] = {"speed": speed, "country": country}
    found = []
    own_text = EMBEDDED in asked and text is None
    if text is not None or own_text:
        found.append(examine(asked, [text_task(512, world=own_text)], data=text, **same, **costly))     # type: ignore[arg-type]
        costly = {}
    if tasks:
        found.append(examine(asked, tasks, data=data, **same, **costly))    # type: ignore[arg-type]
    names = {"fitted" if fitted and model == models[0] else _name(model): model for model in asked}
    if len(names) < len(asked):
        names = {model: model for model in asked}
    samples = None
    if prompts is not None or text is not None or own_text:
        begun = [one for one in texts.read_text(prompts).splitlines() if one][:SAMPLES] if prompts is not None else (
            _beginnings(texts.read_text(text) if text is not None else world_text(test=True, characters=60_000)))
        samples = _samples(names, begun, tokens)
    if fitted:
        return write_page(fit_document(folder, found, samples), Path(out))
    return write_page(result_document(names, found, samples), Path(out))


def _name(model: str) -> str:
    return Path(model).resolve().name if Path(model).is_dir() else model


def _beginnings(text: str) -> list[str]:
    """The first words of some lines of a text, spread over it."""
    lines = [line for line in re.split(r"\n|<\|[^|]*\|>", text) if len(line.split()) > 2 * WORDS]
    return [" ".join(line.split()[:WORDS]) for line in lines[::max(1, len(lines) // SAMPLES)][:SAMPLES]]


def generate(model: str | Path, prompt: str, *, tokens: int = 64, temperature: float = 0.0, top_p: float = 1.0,
             top_k: int = 0, seed: int = 0, kv: str = "f16", adapter: str | Path | None = None) -> Iterator[str]:
    """The pieces of a text's continuation as they come: GGUF files in llama.cpp, checkpoints in transformers."""
    if tokens < 1:
        raise TsotsallmError(f"{tokens} new tokens cannot be written; ask for 1 or more")
    question = Question(prompt, tokens, Sampling(temperature, top_p, top_k, seed))
    return texts_of(speaker(model, kv=cast(CacheType, kv), adapter=None if adapter is None else Path(adapter)), question)


class Conversation:
    """Questions and answers one after another, with one model."""

    def __init__(self, model: str | Path, *, tokens: int = 256, temperature: float = 0.0, top_p: float = 1.0,
                 top_k: int = 0, seed: int = 0, kv: str = "f16", adapter: str | Path | None = None) -> None:
        self.messages: list[dict[str, str]] = []
        self.tokens, self.sampling = tokens, Sampling(temperature, top_p, top_k, seed)
        self.speaker = speaker(model, kv=cast(CacheType, kv), adapter=None if adapter is None else Path(adapter))
        if not self.speaker.converses:
            raise CheckpointError(f"{model} has no chat template: it completes text, but does not converse; use "
                                  "`tsotsallm generate`")

    def answer(self, question: str) -> Iterator[str]:
        """Yield the pieces of the answer; both become part of the conversation."""
        self.messages.append({"role": "user", "content": question})
        heard: list[str] = []
        for piece in texts_of(self.speaker, Question(tuple(self.messages), self.tokens, self.sampling)):
            heard.append(piece)
            yield piece
        self.messages.append({"role": "assistant", "content": "".join(heard)})


def _aloud(line: str) -> None:
    """Print a line that is heard at once, in a pipe too."""
    print(line, flush=True)


def serve(models: Sequence[str | Path], *, port: int = 8080, host: str = "127.0.0.1", key: str | None = None, slots: int = 4,
          queue: int = 16, max_tokens: int = 1024, timeout_s: float = 300.0, max_body: str | int = "1MB", kv: str = "f16",
          prompt_cache: bool = True, country: str | None = None, studio: str | Path | None = None,
          say: Callable[[str], None] = _aloud) -> None:
    """Serve models over HTTP until Ctrl-C; with `studio`, a folder, its page makes models there too.

    An address that other computers reach needs a key. With one slot and no prompt cache, the same seed gives the same text
    as `generate` does.
    """
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(str(error.name), "serve", "serving models") from None
    from tsotsallm.serve.app import check_rules, create_app, listening, run
    from tsotsallm.serve.jobs import Jobs
    from tsotsallm.serve.served import Loading, Models, load_all

    if not models and studio is None:
        raise ServeError("name a model to serve, such as a GGUF file or 'embedded'")
    if studio is not None and not Path(studio).is_dir():
        raise ServeError(f"{studio} is not a folder; make it first, or name one with --folder")
    rules = dataclasses.replace(check_rules(host, key), body_bytes=bytes_from_text(str(max_body), "--max-body"))
    place = listening(host, port)
    try:
        how = Loading(cast(CacheType, kv), slots, prompt_cache, country)
        served = Models(queue, timeout_s)
        load_all([str(model) for model in models], how, served, say)
        jobs = None if studio is None else Jobs(Path(studio).resolve())
        run(create_app(served, rules, most_tokens=max_tokens, jobs=jobs, how=how), place, say)
    finally:
        place.close()


def make_bundle(models: Sequence[str | Path], out: str | Path, *, platform: str | None = None, python: str | None = None,
                index: str | None = None, say: Callable[[str], None] = print) -> Bundled:
    """Write a folder with everything that a computer without a connection needs to run models."""
    return bundles.bundle([str(model) for model in models], Path(out), platform=platform, python=python, index=index,
                          say=say)


def verify_bundle(folder: str | Path) -> int:
    """Check every file of a bundle against its checksum; their number."""
    return bundles.verify(Path(folder))


def load(model: str | Path, *, dtype: str = "float32", device: str = "cpu") -> tuple[Any, Any]:
    """A checkpoint, ours included, as a transformers model and its tokenizer."""
    import torch

    from tsotsallm.engine.resident import resident

    checkpoint = Checkpoint.open(model)
    return resident(checkpoint, getattr(torch, dtype), check_device(device)), checkpoint.tokenizer()


# -- tables -------------------------------------------------------------------------------------------------------------

def annotate(tables: Sequence[str | Path] | str | Path, graph: Sequence[str | Path] | str | Path, out: str | Path, *,
             model: str | Path | None = None, smaller_model: str | Path | None = None, tasks: Sequence[str] = TABLE_TASKS,
             device: str = "cpu", workers: Computers | None = None,
             say: Callable[[str], None] = lambda _line: None) -> Annotations:
    """Annotate tables with a knowledge graph: cells with entities, columns with types, pairs of columns with properties.

    `tables` are CSV files or folders, `graph` RDF or label files; `embedded` is the invented world for either. With `model`
    a model decides where the graph is silent. `out` gets cea.csv, cta.csv and cpa.csv in SemTab's form, and
    annotations.jsonl with confidences and candidates. `smaller_model` (or 'none') is for workers
    without the memory for `model`.
    Raises TablesError where tables or graph cannot be used; a single table that cannot be read is reported in the result.
    """
    def several(one: Sequence[str | Path] | str | Path) -> list[str | Path]:
        return [one] if isinstance(one, (str, Path)) else list(one)

    with contextlib.ExitStack() as stack:
        cluster = stack.enter_context(workers.cluster(say)) if workers is not None else None
        return annotate_all(several(tables), several(graph), Path(out), model=None if model is None else str(model),
                            smaller=None if smaller_model is None else str(smaller_model), tasks=tasks,
                            device=check_device(device), cluster=cluster, say=say)


def score_tables(submissions: Sequence[str | Path], gold: str | Path, *, by_domain: bool = False,
                 tasks: Sequence[str] | None = None) -> list[Score]:
    """Precision, recall and F1 of folders that `annotate` wrote, as SemTab takes them; differences are to the first.

    `gold` is a folder with cea_gt.csv and the like, or of tables with X__URI columns, or 'embedded'.
    """
    return score_submissions(submissions, _gold(gold), domains=domain_of if by_domain else None, tasks=tasks)


def _gold(gold: str | Path) -> Gold:
    return read_gold(world_tables_folder() / "gold" if str(gold) == EMBEDDED else Path(gold))


def gold_tasks(gold: str | Path) -> tuple[str, ...]:
    """The tasks that a gold has targets of; refused where it has none."""
    return _gold(gold).tasks


def write_world_tables(folder: str | Path, *, count: int = 60, seed: int = 0) -> Path:
    """Write the embedded world's graph, tables and gold to a folder."""
    path = Path(folder)
    if path.exists():
        raise TsotsallmError(f"{path} exists; choose another name, or delete it first")
    return write_world(path, count=count, seed=seed)


__all__ = ["Calibration", "Examination", "analyze", "annotate", "check_tasks", "compress", "evaluate", "examine", "franken",
           "harness", "fit", "inspect", "load", "locate", "open_study", "plan", "plan_examination", "run_study",
           "score_tables", "text_task"]
