"""TSOTSALLM and other tools at equal bytes: same model, same calibration tokens, same scoring, in one run.

    python benchmarks/peers.py --model smol|embedded|PATH --work DIR [--only METHOD_OR_TOOL ...]
    python benchmarks/peers.py --model smol --work DIR --table      what there is, as Markdown and a picture
    python benchmarks/peers.py --model smol --work DIR --list       the methods by name, with their tools

Each method makes its model in a process of its own, whose wall time and peak memory count, with interpreter, imports,
loading and saving. A GGUF file by ggml also has the time of the importance matrix, ours that of the export. Tools
that are Python packages get an environment of their own, with pinned versions; one that cannot be installed, or fails, is in
the table with the reason. All calibrate on the token windows in DIR/calibration-*.json, which TSOTSALLM draws from the same
text by the same seed, and compute in float32, except where a package's kernel takes another type.

TSOTSALLM scores every result by one protocol: weights dequantised to float32 (GGUF files as they are read, others by the
package's own code), streamed; KL divergence from the original and perplexity on the same windows of held-out text, accuracy
on the same items. Sizes are those of the files with weights. Embeddings and head are in 16 bits, unless the method says
`whole`: then they are part of the mixture, by llama.cpp's rules or by our choice within the bytes of llama.cpp's file.
Bits per weight are those of the linears alone. Finished steps are kept in METHOD.json among the results and not repeated,
except with other settings.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tsotsallm.api.evaluate import text_and_source
from tsotsallm.api.export import to_huggingface
from tsotsallm.calibration import Calibration, calibration_corpus
from tsotsallm.checkpoint.gguf_file import GgufFile
from tsotsallm.checkpoint.gguf_place import gguf_path
from tsotsallm.checkpoint.reader import EMBEDDED, Checkpoint, layer_prefix
from tsotsallm.checkpoint.view import View
from tsotsallm.compression import plan
from tsotsallm.errors import TsotsallmError
from tsotsallm.evaluation.cost import measure_gguf_speed, parameters_of
from tsotsallm.evaluation.examination import Examination, examine
from tsotsallm.evaluation.perplexity import evaluate_perplexity
from tsotsallm.evaluation.results import TaskResult, compare
from tsotsallm.machine import use_threads

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import measured
from benchmarks.peer_environments import ENVIRONMENTS, environment_python
from benchmarks.peer_tables import write_tables
from tests.real_model import real_model

HERE = Path(__file__).resolve().parent
Record = dict[str, Any]
SHARED = Path(os.environ.get("TSOTSALLM_SHARED", HERE.parents[1] / "shared"))
PROSE = ("dracula.txt", "moby_dick.txt", "pride_and_prejudice.txt", "sherlock_holmes.txt", "factbook.txt")
CONTEXT = 512
SHARES = (0.7, 0.5, 0.35, 0.25)
"""Of the bytes of a 16-bit GGUF file, to which `fit` and single grids keep."""
UNIFORM = ("q8_0", "q6_k", "q5_k", "q4_k", "iq4_nl", "iq4_xs", "q3_k", "q2_k")


@dataclass(frozen=True)
class Method:
    """One way to a smaller model.

    tool      what makes it: `TSOTSALLM`, `ggml`, or the environment of a Python package
    settings  TSOTSALLM's recipe, ggml's type, or what the package's script reads
    whole     embeddings and head are part of it; else they are in 16 bits
    as_large  the method whose file sets the budget of this one
    share     of the bytes of the original's 16-bit GGUF file, which set the budget: `settings` is `fit`, or `uniform`, the
              largest single grid that keeps to it
    packed    ours in integers: the result is a checkpoint in compressed-tensors, as the packages write, not a GGUF file
    """

    name: str
    tool: str
    settings: Any
    whole: bool = False
    as_large: str | None = None
    packed: bool = False
    share: float | None = None
    line: str = ""

    @property
    def series(self) -> str:
        """The line in the picture that this method is a point of."""
        return self.line or self.tool


def methods() -> list[Method]:
    """All methods, those that set budgets before those that keep to them."""
    uniform = ("q4_0", "q4_k", "iq4_nl", "iq4_xs", "q3_k", "q2_k")
    files = ("Q4_K_M", "IQ4_XS", "Q3_K_M", "IQ3_M", "IQ3_S", "Q2_K", "IQ2_S")
    found = [Method(f"ggml-{grid}", "ggml", grid) for grid in (*uniform, "iq3_s", "iq2_s")]
    found += [Method(f"ggml-{kind}", "ggml", kind, whole=True, line="ggml, whole files") for kind in files]
    found += [Method(f"ours-{grid}", "TSOTSALLM", f"gptq:{grid}") for grid in uniform]
    found += [Method(f"ours-mixed-{kind}", "TSOTSALLM", "gptq:mixed", whole=True, as_large=f"ggml-{kind}",
                     line="TSOTSALLM, whole files") for kind in files]
    found += [Method(f"ours-{kind}-{share:.0%}".rstrip("%"), "TSOTSALLM", kind, whole=True, share=share,
                     line=f"TSOTSALLM, {kind}") for kind in ("fit", "uniform") for share in SHARES]
    found += [Method(f"ours-{bits}-64", "TSOTSALLM", f"gptq:{bits}:64", packed=True, line="TSOTSALLM, integers")
              for bits in (4, 3)]
    found += [Method(f"ours-{bits}-64-tuned", "TSOTSALLM", f"[{{quantize: {{bits: {bits}, group: 64}}}}, "
                     "{tune: {what: [scales, norms], steps: 50}}]", packed=True, line="TSOTSALLM, integers, tuned")
              for bits in (4, 3)]
    for bits in (4, 3):
        found += [Method(f"{tool}-{bits}-64", tool, {"bits": bits, "group": 64}) for tool in ("llm-compressor", "gptqmodel")]
        found += [Method(f"auto-round-{bits}-64-rtn", "auto-round", {"bits": bits, "group": 64, "iters": 0}),
                  Method(f"auto-round-{bits}-64", "auto-round", {"bits": bits, "group": 64, "iters": 50, "batch": 4},
                         line="auto-round, tuned")]
    return [*found, Method("torchao-4-64", "torchao", {"group": 64}), Method("quanto-4", "quanto", {"bits": 4})]


@dataclass(frozen=True)
class Exam:
    """What models are calibrated on and compared by; a text without file is the embedded world's.

    calibration  source of calibration text as `--calibration` takes it
    """

    calibration: str | None
    texts: dict[str, Path | None]
    tasks: tuple[str, ...]
    data: Path | None


def exam_of(model: str, data: Path) -> Exam:
    """Its own world for the embedded model, real texts and questions for all others."""
    if model == EMBEDDED:
        return Exam(None, {"its world": None}, ("world-closed", "world-open"), None)
    prose = ",".join(str(data / "calibration" / name) for name in PROSE)
    texts: dict[str, Path | None] = {"WikiText-2": data / "wikitext-2-raw" / "wiki.test.raw",
                                     "web text": data / "calibration" / "ewt_web_text.txt"}
    return Exam(prose, texts, ("arc-easy", "hellaswag", "piqa"), data)


@dataclass
class Bench:
    """One model, one folder of results."""

    asked: argparse.Namespace
    work: Path = field(init=False)
    exam: Exam = field(init=False)

    def __post_init__(self) -> None:
        self.work = self.asked.work.absolute()          # processes run in DIR/logs
        self.asked.environments = self.asked.environments.absolute()
        self.exam = exam_of(self.asked.model, self.asked.data.absolute())
        for folder in (self.asked.results, *(self.work / name for name in ("logs", "models", "reference"))):
            folder.mkdir(parents=True, exist_ok=True)

    # -- what everyone starts from ------------------------------------------------------------------------------------

    @cached_property
    def source(self) -> Path:
        """The original as a plain checkpoint, written from a GGUF file where that is what there is."""
        if self.asked.model == EMBEDDED:
            return Checkpoint.open(EMBEDDED).directory
        given = str(real_model()) if self.asked.model == "smol" else self.asked.model
        if gguf_path(given) is None:
            return Checkpoint.open(given).directory.absolute()
        out = self.work / "source"
        if not out.exists():
            to_huggingface(given, out)
        return out

    @cached_property
    def calibration(self) -> Path:
        """The token windows that everyone calibrates on, as JSON lists of ids; the recipe's own, drawn by the same seed."""
        out = self.work / f"calibration-{self.asked.windows}x{self.asked.window}.json"
        if not out.exists():
            settings = Calibration(self.exam.calibration, self.asked.windows, self.asked.window)
            corpus = calibration_corpus(Checkpoint.open(self.model), settings)
            write_json(out, [window.tolist() for window in corpus.windows])
        return out

    @property
    def model(self) -> str:
        """What TSOTSALLM opens as the original: the embedded model by its name, which brings its texts."""
        return EMBEDDED if self.asked.model == EMBEDDED else str(self.source)

    @property
    def as_text(self) -> list[str]:
        """The options of TSOTSALLM that calibrate on these windows."""
        given = [] if self.exam.calibration is None else ["--calibration", self.exam.calibration]
        return [*given, "--windows", str(self.asked.windows), "--window", str(self.asked.window)]

    def dense_gguf(self) -> Path:
        """The original as GGUF in float32, which ggml's quantiser reads."""
        out = self.work / "source.gguf"
        if not out.exists():
            self.tsotsallm("export", self.model, "--gguf", out, "--dense", "f32", "--no-verify", log="source")
        return out

    @cached_property
    def half_bytes(self) -> int:
        """Bytes of the original as GGUF in 16 bits."""
        out = self.work / "source-f16.gguf"
        if not out.exists():
            self.tsotsallm("export", self.model, "--gguf", out, "--dense", "f16", "--no-verify", log="source-f16")
        return out.stat().st_size

    def uniform(self, budget: int) -> str:
        """The single grid with the most bits whose file has at most `budget` bytes, embeddings and head on it too."""
        for grid in UNIFORM:
            recipe = f"[{{quantize: {{grid: {grid}, ends: {grid}}}}}]"
            if plan(self.model, recipe, windows=self.asked.windows, window=self.asked.window).result_bytes <= budget:
                return recipe
        raise measured.CommandError(f"no single grid makes a file of {budget} bytes")

    def importance(self) -> Record:
        """The importance matrix, with what it took."""
        out = self.work / f"importance-{self.asked.windows}x{self.asked.window}.gguf"
        note = out.with_suffix(".json")
        if not note.exists():
            out.unlink(missing_ok=True)
            took = self.tsotsallm("export", self.model, "--imatrix", out, *self.as_text, log="importance")
            write_json(note, {"path": str(out), "seconds": took.seconds, "peak_rss_bytes": took.peak_rss_bytes})
        return read_json(note)

    # -- processes ----------------------------------------------------------------------------------------------------

    def process(self, command: Sequence[str | Path], log: str) -> measured.Measured:
        """Run a command on the asked number of threads; its standard error is kept in DIR/logs."""
        threads = str(self.asked.threads)
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TSOTSALLM_THREADS", "NUMBA_NUM_THREADS")
        environment = dict.fromkeys(names, threads) | {
            "GPTQMODEL_CPU_WORKERS": str(max(2, self.asked.threads)),       # it refuses to load a model with one
            "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        return measured.run(command, environment=environment, log=self.work / "logs" / f"{log}.txt",
                            timeout_s=60 * self.asked.minutes, folder=self.work / "logs")

    def tsotsallm(self, *words: str | Path, log: str) -> measured.Measured:
        """Run a verb of TSOTSALLM."""
        return self.process([sys.executable, "-m", "tsotsallm", *words], log)

    def tool(self, method: Method, *words: str | Path, log: str) -> measured.Measured:
        """Run the script of a package in its environment."""
        python = environment_python(self.asked.environments, ENVIRONMENTS[method.tool])
        script = HERE / "peer_tools" / f"with_{method.tool.replace('-', '_')}.py"
        return self.process([python, script, *words], log)

    # -- the steps of a method ----------------------------------------------------------------------------------------

    def results_of(self, method: Method) -> Path:
        """Where the results of a method are kept."""
        return self.asked.results / f"{method.name}.json"

    def run(self, method: Method) -> None:
        """Make, score and time, from where an earlier run stopped; what fails is noted with the reason."""
        found = self.known(method)
        try:
            for step, do in (("made", self.make), ("scored", self.score), ("timed", self.time), ("examined", self.examine)):
                if step not in found and step not in self.asked.without:
                    print(f"{method.name}: to be {step} ...", flush=True)
                    found[step] = do(method, found)
                    write_json(self.results_of(method), found)
        except measured.CommandError as error:
            found["skipped"] = str(error)
            write_json(self.results_of(method), found)
            print(f"{method.name}: skipped: {error}", flush=True)

    def known(self, method: Method) -> Record:
        """The finished steps that were taken with the present settings; a reason to skip is forgotten."""
        fresh: Record = {"method": method.name, "tool": method.tool, "series": method.series, "whole": method.whole,
                         "settings": method.settings, "model": self.asked.model, "requirements": requirements(method),
                         "made_with": {"windows": self.asked.windows, "window": self.asked.window,
                                       "threads": self.asked.threads},
                         "scored_with": {"limit": self.asked.limit}, "examined_with": {"items": self.asked.items}}
        if not self.results_of(method).exists():
            return fresh
        before = read_json(self.results_of(method))
        if any(before[key] != fresh[key] for key in ("settings", "model", "made_with", "requirements")):
            return fresh
        kept = ("made", "timed", *(step for step in ("scored", "examined")
                                   if before[f"{step}_with"] == fresh[f"{step}_with"]))
        return fresh | {key: before[key] for key in kept if key in before}

    def make(self, method: Method, _found: Record) -> Record:
        """Produce the model; its files, their bytes, seconds and peak memory."""
        out = self.work / "models" / method.name
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        if method.tool == "ggml":
            runs = self.make_by_ggml(method, out)
        elif method.tool == "TSOTSALLM":
            runs = self.make_ours(method, out)
        else:
            words = ["make", self.source, out / "model", "--windows", self.calibration, "--settings",
                     json.dumps(method.settings)]
            taken = self.tool(method, *words, log=method.name)
            runs = {"quantise": {"seconds": taken.seconds, "peak_rss_bytes": taken.peak_rss_bytes}}
        return {"minutes": sum(run["seconds"] for run in runs.values()) / 60,
                "peak_rss_bytes": max(run["peak_rss_bytes"] for run in runs.values()), "runs": runs,
                **sizes(out, Checkpoint.open(self.model))}

    def make_by_ggml(self, method: Method, out: Path) -> dict[str, Record]:
        """A GGUF file by ggml's quantiser."""
        matrix = self.importance()
        command = [sys.executable, HERE / "ggml_files.py", self.dense_gguf(), out / "model.gguf", method.settings,
                   "--imatrix", matrix["path"], "--threads", str(self.asked.threads)]
        taken = self.process(command, method.name)
        return {"importance matrix": {key: matrix[key] for key in ("seconds", "peak_rss_bytes")},
                "quantise": {"seconds": taken.seconds, "peak_rss_bytes": taken.peak_rss_bytes}}

    def make_ours(self, method: Method, out: Path) -> dict[str, Record]:
        """A checkpoint, and a GGUF file of it."""
        recipe = method.settings
        if method.share is not None:
            budget = int(method.share * self.half_bytes)
            if method.settings == "fit":
                taken = self.tsotsallm("fit", self.model, "-o", out, "--bytes", str(budget), "--minutes",
                                       str(self.asked.fit_minutes), *self.as_text, log=f"{method.name}-fit")
                return {"fit": {"seconds": taken.seconds, "peak_rss_bytes": taken.peak_rss_bytes}}
            recipe = self.uniform(budget)
        if method.as_large is not None:
            other = next(one for one in methods() if one.name == method.as_large)
            if "made" not in self.known(other):
                self.run(other)
            if "made" not in (found := self.known(other)):
                raise measured.CommandError(f"{other.name}, whose size it keeps to, is not made")
            recipe = f"[{{quantize: {{file_bytes: {found['made']['bytes']}}}}}]"
        runs = {}
        commands = {"compress": ("compress", self.model, recipe, "-o", out / "model", *self.as_text),
                    "export": ("export", out / "model", "--gguf", out / "model.gguf", "--no-verify")}
        if method.packed:
            del commands["export"]
        for step, words in commands.items():
            taken = self.tsotsallm(*words, log=f"{method.name}-{step}")
            runs[step] = {"seconds": taken.seconds, "peak_rss_bytes": taken.peak_rss_bytes}
        return runs

    def scorable(self, method: Method) -> Path:
        """A checkpoint that TSOTSALLM reads, with the float32 values of a result."""
        out = self.work / "models" / method.name
        for own in (out / "model.gguf", out / "model"):
            if method.tool in ENVIRONMENTS:
                break
            if own.exists():
                return own
        dense = out / "dense"
        if (dense / "written").exists():
            return dense
        shutil.rmtree(dense, ignore_errors=True)
        shutil.copytree(self.source, dense, ignore=shutil.ignore_patterns("*.safetensors", "*.safetensors.index.json"))
        config = read_json(dense / "config.json")
        write_json(dense / "config.json", config | {"dtype": "float32", "torch_dtype": "float32"})
        self.tool(method, "dense", self.source, out / "model", dense / "model.safetensors", log=f"{method.name}-dense")
        (dense / "written").touch()
        return dense

    def score(self, method: Method, _found: Record) -> Record:
        """KL and perplexity on every text."""
        model, original = Checkpoint.open(self.scorable(method)), Checkpoint.open(self.model)
        texts = {}
        for name, path in self.exam.texts.items():
            content, _ = text_and_source(path, [self.asked.model], characters=2_600 * self.asked.limit)
            found = evaluate_perplexity(model, content, source=name, context=CONTEXT, limit=self.asked.limit,
                                        kept=self.work / "reference", reference=original)
            texts[name] = {"kl": found.kl, "kl_error": found.kl_standard_error, "perplexity": found.perplexity,
                           "reference_perplexity": found.reference_perplexity, "same_top_token": found.same_top_token,
                           "tokens": found.protocol.predicted_tokens}
        return {"texts": texts}

    @cached_property
    def original_results(self) -> list[TaskResult]:
        """What the original scores on every task."""
        return [row[0] for row in self.examination(self.model).results]

    def examination(self, model: str | Path) -> Examination:
        """One model on every task."""
        return examine([model], self.exam.tasks, data=self.exam.data, limit=self.asked.items)

    def examine(self, method: Method, _found: Record) -> Record:
        """Accuracy on every task, with its difference from the original on the same items."""
        own = self.examination(self.scorable(method)).results
        tasks = {}
        for name, before, (after,) in zip(self.exam.tasks, self.original_results, own, strict=True):
            one = next(one for one in compare([before, after]) if not one.group)
            assert one.differences[1] is not None
            tasks[name] = {"measure": one.measure, "items": one.items, "reference": one.scores[0].value,
                           "score": one.scores[1].value, "error": one.scores[1].standard_error,
                           "difference": one.differences[1].plain()}
        shutil.rmtree(self.work / "models" / method.name / "dense", ignore_errors=True)
        return {"tasks": tasks}

    def time(self, method: Method, _found: Record) -> Record:
        """New tokens per second where an engine runs the result on a CPU without making it dense first."""
        out = self.work / "models" / method.name
        if method.tool in ENVIRONMENTS:
            if not ENVIRONMENTS[method.tool].decodes:
                return {"engine": None, "decode_tokens_per_s": None}
            taken = self.tool(method, "speed", self.source, out / "model", log=f"{method.name}-speed")
            return {"engine": "transformers", **json.loads(taken.output.splitlines()[-1])}
        file = out / ("for-llama.gguf" if method.packed else "model.gguf")
        if method.packed and not file.exists():
            try:
                self.tsotsallm("export", out / "model", "--gguf", file, "--no-verify", log=f"{method.name}-export")
            except measured.CommandError:           # no type of GGUF holds these codes and scales
                return {"engine": None, "decode_tokens_per_s": None}
        speed = measure_gguf_speed(file, threads=self.asked.threads)
        return {"engine": "llama.cpp", "decode_tokens_per_s": speed.decode_tokens_per_s}


def requirements(method: Method) -> list[str]:
    """The pinned packages that a method is made with; ours and ggml's are those of the present environment."""
    found = ENVIRONMENTS.get(method.tool)
    return [] if found is None else [found.torch, *found.requirements]


def sizes(out: Path, original: Checkpoint) -> Record:
    """Bytes of the files with weights, and of the linears in them."""
    shapes = [original.shape_of(f"{layer_prefix(stored)}{name}") for stored in sorted(set(original.spec.layer_order))
              for name in original.layer_names(stored)]
    weights = sum(math.prod(shape) for shape in shapes if len(shape) == 2)
    others = parameters_of(View.of(original)) - weights
    file = out / "model.gguf"
    if file.exists():
        total, tensors = file.stat().st_size, GgufFile.open(file).tensors
        linear = sum(one.size for name, one in tensors.items() if name.startswith("blk.") and len(one.shape) == 2)
    else:
        files = [path for path in (out / "model").rglob("*") if path.suffix in (".safetensors", ".pt")]
        total = sum(path.stat().st_size for path in files)
        linear = sum(linear_bytes(path) if path.suffix == ".safetensors" else path.stat().st_size - 2 * others
                     for path in files)
    return {"bytes": total, "linear_bytes": linear, "bits_per_linear_weight": 8 * linear / weights}


def linear_bytes(path: Path) -> int:
    """Bytes of everything that belongs to linears in a safetensors file, whatever the types."""
    with path.open("rb") as file:
        entries = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    places = [entry["data_offsets"] for name, entry in entries.items() if "_proj." in name]
    return sum(end - begin for begin, end in places)


def write_json(path: Path, content: Any) -> None:
    """Write a file of JSON at once, so that a stop leaves the old one or the new one."""
    draft = path.with_name(path.name + ".draft")
    draft.write_text(json.dumps(content, indent=1), "utf-8")
    draft.replace(path)


def read_json(path: Path) -> Any:
    """What a file of JSON holds."""
    return json.loads(path.read_text("utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="smol (SmolLM2-135M-Instruct), embedded, or a model of your own")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", nargs="+", metavar="METHOD_OR_TOOL", help="methods, or all methods of a tool")
    parser.add_argument("--data", type=Path, default=SHARED / "data", help="folder with texts and questions")
    parser.add_argument("--environments", type=Path, help="where tools are installed (default: WORK/environments)")
    parser.add_argument("--results", type=Path, help="where results, table and picture go (default: WORK/results)")
    parser.add_argument("--windows", type=int, default=16, help="windows of calibration text")
    parser.add_argument("--window", type=int, default=512, help="tokens of a window of calibration text")
    parser.add_argument("--limit", type=int, default=60, help="windows of 512 tokens of every text to score on")
    parser.add_argument("--items", type=int, default=300, help="items of every task")
    parser.add_argument("--without", nargs="+", default=[], choices=("timed", "examined"),
                        help="steps that are left for later")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--fit-minutes", type=float, default=60, help="what `fit` may take for each size")
    parser.add_argument("--minutes", type=float, default=240, help="longest time of a step of a method")
    parser.add_argument("--table", action="store_true", help="write peers.md and peers.png from what there is")
    parser.add_argument("--list", action="store_true", help="print the methods")
    asked = parser.parse_args()
    asked.environments = asked.environments or asked.work / "environments"
    asked.results = (asked.results or asked.work / "results").absolute()
    names = {name for method in methods() for name in (method.name, method.tool)}
    if wrong := [name for name in asked.only or () if name not in names]:
        parser.error(f"there is no method or tool {wrong[0]!r}; --list prints them")
    chosen = [one for one in methods() if not asked.only or {one.name, one.tool} & set(asked.only)]
    if asked.list:
        print(*(f"{one.name:24} {one.tool:16} {one.settings}" for one in chosen), sep="\n")
        return
    if not asked.table:
        use_threads(asked.threads)
        bench = Bench(asked)
        try:
            for method in chosen:
                bench.run(method)
        except TsotsallmError as error:
            parser.exit(1, f"peers.py: {error}\n")
    order = [one.name for one in methods()]
    found = [read_json(path) for path in asked.results.glob("*.json")]
    write_tables(sorted(found, key=lambda one: order.index(one["method"])), asked.results)


if __name__ == "__main__":
    main()
