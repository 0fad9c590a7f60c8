"""Whole inputs to damage, small and built on the spot: checkpoints of several kinds, recipes, studies, tasks, graphs,
tables, GGUF files; and the verbs that read each of their files."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

import tsotsallm
from tests.conftest import SHARED, build
from tests.tables.towns import TURTLE

TEMPLATE = ("{{ bos_token }}{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
            "{% if add_generation_prompt %}[assistant] {% endif %}")
LABEL = "http://www.w3.org/2000/01/rdf-schema#label"
TABLE = "City,Country,People\nRome,Italy,2873000\nParis,France,2103000\nParis,United States,24171\n"
LABELS = {"Q1": {"label": "Paris", "aliases": ["Lutetia"], "description": "capital of France"}, "Q2": "Rome",
          "Q3": ["Italy", "Italie"], "P4": {"label": "lies in", "kind": "property"}}
RECIPES = {
    "prune": "- depth: {remove: 1, importance: magnitude, protect: {first: 0, last: 0}}\n"
             "- sparsity: {method: wanda, prune: 2, group: 4}\n",
    "round": "- quantize: {method: rtn, bits: 4, group: 32, ends: q8_0}\n",
    "gptq": "- sparsity: {prune: 1, group: 4}\n- quantize: {method: gptq, bits: 8, group: 32, damp: 0.01}\n"
            "- compensate: {rank: 2, method: eora}\n",
    "order": "- layers: {order: [1, 0, '0-1'], shared: true}\n- quantize: {method: rtn, grid: q4_0}\n",
    "width": "- neurons: {feed_forward: 0.34}\n",
    "train": "- adapt: {rank: 2, targets: [q, v], steps: 1, batch: 1, window: 16}\n",
    "tokens": "- vocabulary: {keep: [in/words.txt]}\n",
}
STUDY = """about: two recipes
stages:
  - depth: {remove: {one_of: [0, 1]}, importance: magnitude, protect: {first: 0, last: 0}}
  - quantize: {method: rtn, bits: {from: 3, to: 8}, group: channel}
strategy: random
trials: 1
seed: 3
objectives: [kl, bytes]
calibration: {windows: 2, window: 16}
evaluation: {cheap: 1, full: 2, context: 16}
"""
NAMED_STUDY = """recipes:
  plain: ["rtn:8:channel"]
  cut: [{layers: {order: [0]}}]
strategy: all
trials: 1
evaluation: {cheap: null, full: 2, context: 16}
"""
CHOICES = """about: a choice
kind: choices
layouts:
  - {prompt: "Question: {{question}}\\nAnswer:", choices: choices, answer: gold, group: subject}
  - {prompt: "{{text | trim}}", choices: "['no', 'yes']", answer: "label | int"}
"""
ANSWERS = """kind: answers
max_new_tokens: 2
stop: ["\\n", "."]
layouts:
  - {prompt: "{{question}}", answers: answers}
"""
TEXTS = "kind: perplexity\nprotocol: windows\ncontext: 16\nlayouts:\n  - {text: '{{text}}', group: file}\n"
ROWS = [{"question": "Is it red?", "choices": ["no", "yes"], "gold": 1, "subject": "a", "answers": ["yes", "it is"]},
        {"question": "Where — or when?", "choices": ["here", "then", "no"], "gold": 0, "subject": "b", "answers": "here"}]
BIG_BENCH = {"name": "sums", "description": "sums", "keywords": ["x"], "task_prefix": "Think.\n", "examples": [
    {"input": "2+2?", "target_scores": {"3": 0, "4": 1}}, {"input": "1+1?", "target_scores": {"2": 1, "3": 0}}]}


@dataclass(frozen=True)
class Verb:
    """A command on a base, which lies in the folder `in`; `{model}` is a whole checkpoint, `{file}` the damaged file."""

    name: str
    arguments: tuple[str, ...]
    cost: float = 1.0                           # a verb that takes long is drawn less often
    spoken: str = ""


@dataclass(frozen=True)
class Target:
    """One file of a base, how it is damaged, and who reads it."""

    base: str
    file: str
    form: str
    verbs: tuple[Verb, ...]
    share: float = 1.0


def _verb(name: str, line: str, cost: float = 1.0, spoken: str = "") -> Verb:
    return Verb(name, tuple(line.split()), cost, spoken)


INSPECT = _verb("inspect", "inspect in")
PLAN = _verb("plan", "plan in gptq:8:32 -o out")
EVALUATE = _verb("evaluate", "evaluate in --text words.txt --context 16 --limit 2", 1.5)
ROUND = _verb("compress", "compress in rtn:8:32 -o out", 2)
BLOCKS = _verb("compress-blocks", "compress in rtn:q8_0 -o out", 2)
CALIBRATED = _verb("compress-calibrated", "compress in gptq:8:32 -o out --calibration words.txt --windows 2 --window 16", 4)
NARROWED = _verb("compress-tokens", "compress in tokens.yaml -o out", 2)
EXPORT = _verb("export", "export in --gguf out.gguf --no-verify", 1.5)
VERIFIED = _verb("export-verified", "export in --gguf out.gguf", 12)
PLAIN = _verb("export-hf", "export in --hf out", 1.5)
GENERATE = _verb("generate", "generate in hello --tokens 2", 1.5)
CHAT = _verb("chat", "chat in --tokens 2", 1.5, "hello\n")
TASK = _verb("evaluate-task", "evaluate in --task answers.yaml --data rows.jsonl", 2)
PUSH = _verb("push", "push in NAME/MODEL")
REPORT = _verb("report", "report in -o out.html", 6)
READERS = (INSPECT, PLAN, EVALUATE, ROUND, BLOCKS, CALIBRATED, NARROWED, EXPORT, VERIFIED, PLAIN, GENERATE, CHAT, TASK, PUSH)
WEIGHERS = (INSPECT, PLAN, EVALUATE, ROUND, BLOCKS, CALIBRATED, EXPORT, PLAIN, GENERATE)
SPEAKERS = (EVALUATE, CALIBRATED, NARROWED, EXPORT, VERIFIED, GENERATE, CHAT, TASK)
PLAN_RECIPE = _verb("plan-recipe", "plan {model} {file} -o out --windows 2 --window 16")
RUN_RECIPE = _verb("compress-recipe", "compress {model} {file} -o out --calibration words.txt --windows 2 --window 16", 4)
STUDY_RUN = _verb("study", "study {file} -o out --model {model} --text words.txt --calibration words.txt --trials 1", 8)
ASK = _verb("evaluate-task", "evaluate {model} --task {task} --data {data}", 2)
ASK_PLAN = _verb("evaluate-plan", "evaluate {model} --task {task} --data {data} --plan", 1)
TEXT = _verb("evaluate-text", "evaluate {model} --text {file} --context 16 --limit 2", 2)
CALIBRATE = _verb("calibrate", "compress {model} gptq:8:32 -o out --calibration {file} --windows 2 --window 16", 4)
PROMPTS = _verb("generate-many", "generate {model} --prompts {file} -o out.jsonl --tokens 1", 2)
ANNOTATE = _verb("annotate", "annotate {table} --graph {graph} -o out", 3)
SCORE = _verb("tables-score", "tables score in/submission --gold in/gold")
GGUF_INSPECT = _verb("inspect-gguf", "inspect {file}")
GGUF_GENERATE = _verb("generate-gguf", "generate {file} hello --tokens 2", 2)
GGUF_CHAT = _verb("chat-gguf", "chat {file} --tokens 2", 2, "hello\n")
GGUF_EVALUATE = _verb("evaluate-gguf", "evaluate {file} --text words.txt --context 16 --limit 1 --reference {model}", 3)
GGUF_ADAPTER = _verb("generate-adapter", "generate in/model.gguf hello --tokens 2 --adapter {file}", 2)
SOURCE_STREAM = _verb("evaluate-source", "evaluate {file} --text words.txt --context 16 --limit 1 --stream", 1.5)
SOURCE_SKIP = _verb("compress-source", "compress {file} skip:0 -o out", 1.5)
SOURCE_BLOCKS = _verb("compress-source-blocks", "compress {file} rtn:q8_0 -o out", 2)
SOURCE_TOKENS = _verb("compress-source-tokens", "compress {file} tokens.yaml -o out", 3)
SOURCE_PLAN = _verb("plan-source", "plan {file} gptq:8:32 -o out")
SOURCE_EXPORT = _verb("export-source", "export {file} --gguf out.gguf --no-verify", 1.5)
SOURCE_PLAIN = _verb("export-source-hf", "export {file} --hf out", 1.5)
SOURCE_READERS = (GGUF_INSPECT, SOURCE_STREAM, SOURCE_SKIP, SOURCE_BLOCKS, SOURCE_TOKENS, SOURCE_PLAN, SOURCE_EXPORT,
                  SOURCE_PLAIN)
STUDY_SHOW = _verb("study-show", "study show in")

CANNOT = {("pieces", NARROWED), ("integers", NARROWED), ("fewer", NARROWED), ("fewer", EXPORT), ("fewer", VERIFIED),
          ("stories", NARROWED), ("stories", CHAT), ("stories", PLAN), ("stories", ROUND), ("stories", CALIBRATED)}
"""Verbs that refuse a whole base: a vocabulary without merges, widths that no group of 32 divides, no chat template."""
SOURCES = "sources"
"""The base of GGUF files that are read as models, without llama.cpp."""
SOURCE_FAMILIES = ("gemma3", "phi", "olmo3", "granite", "ministral3", "qwen3")
"""Those among them that are made for it: windows, shifted norms, fused linears, scaled positions, scaled branches."""
CHECKPOINTS = ("tied", "adapted", "blocks", "integers", "pieces", "fewer", "stories")
_SIDE = (("config.json", "json", READERS, 3.0), ("tokenizer.json", "tokenizer", SPEAKERS, 2.0),
         ("tokenizer_config.json", "json", SPEAKERS, 1.0), ("generation_config.json", "json", SPEAKERS, 1.0),
         ("chat_template.jinja", "template", (VERIFIED, CHAT, CHAT, EXPORT), 1.0),
         ("special_tokens_map.json", "json", SPEAKERS, 0.5), ("model.safetensors.index.json", "json", READERS, 2.0),
         ("adapter/adapter_config.json", "json", WEIGHERS, 2.0), ("adapter/adapter_model.safetensors", "safetensors",
                                                                  WEIGHERS, 2.0),
         ("tsotsallm.json", "json", (*READERS, PUSH, REPORT, REPORT), 1.0), ("vocabulary.json", "json", READERS, 2.0),
         ("tsotsallm.run.json", "json", (INSPECT, REPORT), 0.3), ("README.md", "text", (PUSH, INSPECT), 0.1),
         ("tokenizer.model", "text", SPEAKERS, 0.2))


@functools.cache
def targets(root: Path) -> list[Target]:
    """Every file that the built bases hold, in a fixed order."""
    found = []
    for name in CHECKPOINTS:
        weight = 0.5 if name == "stories" else 1.0      # real weights, but a megabyte of them
        for file, form, verbs, share in _SIDE:
            if (root / name / file).exists():
                found.append(Target(name, file, form, verbs, share * weight))
        shards = sorted(path.name for path in (root / name).glob("model*.safetensors"))
        found += [Target(name, shard, "safetensors", WEIGHERS, 4.0 * weight / len(shards)) for shard in shards]
    found += [Target("recipes", f"{name}.yaml", "yaml", (PLAN_RECIPE, RUN_RECIPE), 0.9) for name in RECIPES]
    found += [Target("studies", "open.yaml", "yaml", (STUDY_RUN,), 1.0), Target("studies", "named.yaml", "yaml", (STUDY_RUN,
                                                                                                                  ), 0.5)]
    asking = (ASK, ASK_PLAN)
    found += [Target("tasks", file, form, asking, share) for file, form, share in (
        ("choices.yaml", "yaml", 1.2), ("answers.yaml", "yaml", 0.7), ("texts.yaml", "yaml", 0.5), ("sums.json", "json",
                                                                                                    1.2),
        ("rows.jsonl", "jsonl", 1.5), ("rows.json", "json", 0.5), ("rows.csv", "csv", 1.0), ("text.txt", "text", 0.5))]
    found += [Target("texts", "prose.txt", "text", (TEXT, CALIBRATE, PROMPTS), 1.0)]
    found += [Target("graphs", file, form, (ANNOTATE,), share) for file, form, share in (
        ("graph.ttl", "rdf", 2.5), ("graph.nt", "rdf", 2.5), ("labels.json", "json", 0.7), ("labels.jsonl", "jsonl", 0.5),
        ("labels.csv", "csv", 0.5), ("table.csv", "csv", 2.5))]
    found += [Target("scores", file, form, (SCORE,), 0.3) for file, form in (
        ("gold/cea_gt.csv", "csv"), ("gold/cta_gt.csv", "csv"), ("gold/cta_ancestor.json", "json"), ("submission/cea.csv",
                                                                                                     "csv"))]
    gguf = (GGUF_INSPECT, GGUF_GENERATE, GGUF_CHAT, GGUF_EVALUATE)
    found += [Target("ggufs", "model.gguf", "gguf", gguf, 4.0), Target("ggufs", "blocks.gguf", "gguf", gguf, 3.0),
              Target("ggufs", "model-adapter.gguf", "gguf", (GGUF_ADAPTER,), 1.0)]
    found += [Target(SOURCES, file, "gguf", SOURCE_READERS, 1.0) for file in (
        *(f"{family}.gguf" for family in SOURCE_FAMILIES), "rounded.gguf", "pieces.gguf")]
    found += [Target("study", "ledger.sqlite", "bytes", (STUDY_SHOW,), 0.3), Target("study", "trials.jsonl", "jsonl",
                                                                                    (STUDY_SHOW,), 0.3)]
    able = [replace(one, verbs=tuple(verb for verb in one.verbs if (one.base, verb) not in CANNOT)) for one in found]
    return [one for one in able if (root / one.base / one.file).exists()]


def places(target: Target) -> dict[str, str]:
    """What the names in braces of a verb stand for: paths in a case's folder."""
    file = f"in/{target.file}"
    data = {"choices.yaml": "in/rows.jsonl", "answers.yaml": "in/rows.jsonl", "texts.yaml": "in/text.txt", "sums.json": file}
    task = {"rows.jsonl": "in/choices.yaml", "rows.json": "in/choices.yaml", "rows.csv": "in/choices.yaml",
            "text.txt": "in/texts.yaml"}
    return {"model": "model", "file": file, "data": data.get(target.file, file), "task": task.get(target.file, file),
            "graph": file if target.file != "table.csv" else "in/graph.ttl",
            "table": file if target.file == "table.csv" else "in/table.csv"}


# -- building ------------------------------------------------------------------------------------------------------------


def build_bases(root: Path) -> None:
    """Write all bases; the same bytes every time."""
    root.mkdir(parents=True)
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        _build(root)


def _build(root: Path) -> None:
    words = root / "words.txt"
    words.write_text(_words(20), "utf-8")
    (root / "tokens.yaml").write_text("- vocabulary: {keep: [words.txt]}\n", "utf-8")
    (root / "answers.yaml").write_text(ANNOTATED_ANSWERS, "utf-8")
    (root / "rows.jsonl").write_text(json.dumps(ROWS[1]) + "\n", "utf-8")
    small: dict[str, Any] = {"num_hidden_layers": 2}
    tied = build(root / "tied", "llama3", dtype=torch.bfloat16, shard="60KB", **small)
    _beside(tied)
    pieces = build(root / "pieces", "llama2", dtype=torch.float16, vocab_size=320, hidden_size=32, intermediate_size=64,
                   eos_token_id=2, bos_token_id=1, **small)
    sentencepiece().save_pretrained(pieces)
    _beside(pieces, tokenizer=False)
    quick: dict[str, Any] = {"calibration": words, "windows": 2, "window": 16}
    tsotsallm.compress(tied, "rtn:8:32, eora:2", root / "adapted", **quick)
    tsotsallm.compress(tied, [{"quantize": {"method": "rtn", "grid": "q4_0", "ends": "q8_0"}}], root / "blocks")
    tsotsallm.compress(pieces, "rtn:4:32", root / "integers")
    tsotsallm.compress(tied, [{"vocabulary": {"keep": [str(words)]}}], root / "fewer")
    if (SHARED / "models" / "stories260k").exists():
        shutil.copytree(SHARED / "models" / "stories260k", root / "stories", ignore=shutil.ignore_patterns("SOURCE.txt"),
                        copy_function=shutil.copyfile)
        (root / "stories").chmod(0o755)
    _texts(root)
    ggufs = root / "ggufs"
    ggufs.mkdir()
    tsotsallm.to_gguf(root / "adapted", ggufs / "model.gguf", dense="f16", verify=False)
    tsotsallm.to_gguf(root / "blocks", ggufs / "blocks.gguf", verify=False)
    (root / SOURCES).mkdir()
    for family in SOURCE_FAMILIES:
        model = build(root / "made" / family, family, **small)
        tsotsallm.to_gguf(model, root / SOURCES / f"{family}.gguf", dense="f16", verify=False)
    tsotsallm.to_gguf(pieces, root / SOURCES / "pieces.gguf", verify=False)
    tsotsallm.to_gguf(root / "blocks", root / SOURCES / "rounded.gguf", verify=False)
    shutil.rmtree(root / "made")
    tsotsallm.run_study(root / "studies" / "named.yaml", root / "study", model=str(tied), text=words, trials=2)
    shutil.rmtree(root / "study" / "work", ignore_errors=True)


ANNOTATED_ANSWERS = ANSWERS.replace("max_new_tokens: 2", "max_new_tokens: 1")


def _words(lines: int) -> str:
    rng = random.Random(4)
    words = ["".join(rng.choices("aeiou rstlnm", k=rng.randint(2, 8))) for _ in range(60)]
    return "\n".join(" ".join(rng.choices(words, k=12)) for _ in range(lines))


def _beside(model: Path, *, tokenizer: bool = True) -> None:
    """The files that a hub's checkpoint has beside its weights and tokenizer."""
    (model / "chat_template.jinja").write_text(TEMPLATE, "utf-8")
    (model / "generation_config.json").write_text(json.dumps(
        {"bos_token_id": 0, "eos_token_id": [1, 2], "do_sample": True, "temperature": 0.6, "top_p": 0.9, "max_length": 200}))
    if tokenizer:
        content = json.loads((model / "tokenizer_config.json").read_text("utf-8"))
        (model / "special_tokens_map.json").write_text(json.dumps(
            {key: content[key] for key in ("bos_token", "eos_token") if key in content}))
    else:
        (model / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": {
            "content": "</s>", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}}))


def sentencepiece() -> PreTrainedTokenizerFast:
    """320 pieces as SentencePiece's BPE has them: special ones, all bytes, letters and some merges."""
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz.,"]
    merges = [("▁", letter) for letter in "aeiorstlnm"] + [("t", "h"), ("th", "e"), ("a", "n")]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters,
              *("".join(pair) for pair in merges)]
    pieces += [f"<free{number}>" for number in range(320 - len(pieces))]
    tokenizer = Tokenizer(models.BPE(vocab={piece: number for number, piece in enumerate(pieces)}, merges=merges,
                                     unk_token="<unk>",
                                     fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([])
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _texts(root: Path) -> None:
    """Recipes, studies, tasks, graphs and tables."""
    files: dict[str, str] = {f"recipes/{name}.yaml": text for name, text in RECIPES.items()}
    files |= {"recipes/words.txt": _words(5), "studies/open.yaml": STUDY, "studies/named.yaml": NAMED_STUDY,
              "tasks/choices.yaml": CHOICES, "tasks/answers.yaml": ANSWERS, "tasks/texts.yaml": TEXTS,
              "tasks/sums.json": json.dumps(BIG_BENCH), "tasks/rows.jsonl": "\n".join(map(json.dumps, ROWS)) + "\n",
              "tasks/rows.json": json.dumps({"data": ROWS}), "tasks/text.txt": _words(4), "texts/prose.txt": _words(12),
              "tasks/rows.csv": 'text,label\n"Is it red, or\nblue?",1\nIs it ""so""?,0\n',
              "graphs/graph.ttl": TURTLE, "graphs/graph.nt": _triples(), "graphs/table.csv": TABLE,
              "graphs/labels.json": json.dumps(LABELS),
              "graphs/labels.jsonl": '{"id": "Q1", "label": "Paris"}\n{"id": "Q2", "label": "Rome", "aliases": ["Roma"]}\n',
              "graphs/labels.csv": "id,label,description\nQ1,Paris,capital\nQ2,Rome,city\n",
              "scores/gold/cea_gt.csv": '"t","1","0","http://x/rome"\n"t","2","0","http://x/paris http://x/texas"\n',
              "scores/gold/cta_gt.csv": '"t","0","http://x/City"\n', "scores/gold/cta_ancestor.json":
              json.dumps({"http://x/City": {"http://x/Place": 1}}),
              "scores/submission/cea.csv": '"t","1","0","http://x/rome"\n"t","2","0","http://x/usa"\n',
              "scores/submission/cta.csv": '"t","0","http://x/Place"\n'}
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")


def _triples() -> str:
    lines = []
    for name, label in (("rome", "Rome"), ("italy", "Italy"), ("paris", "Paris"), ("france", "France"), ("texas", "Paris"),
                        ("usa", "United States")):
        lines.append(f'<http://x/{name}> <{LABEL}> "{label}"@en .')
    lines += ["<http://x/rome> <http://x/in> <http://x/italy> .", "<http://x/paris> <http://x/in> <http://x/france> .",
              "<http://x/texas> <http://x/in> <http://x/usa> ."]
    return "\n".join(lines * 1) + "\n"


def copied(source: Path, target: Path) -> None:
    """The files of a folder, with the modes of new files."""
    shutil.copytree(source, target, copy_function=shutil.copyfile)


def walked(folder: Path) -> Iterator[Path]:
    """Everything under a folder, links not followed."""
    for path in sorted(folder.iterdir()):
        yield path
        if path.is_dir() and not path.is_symlink():
            yield from walked(path)
