"""Texts that models continue."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypedDict, Unpack, cast

from tsotsallm.api.computers import Computers
from tsotsallm.cluster.generation import continuations_on
from tsotsallm.engine.factory import continuations, speaker
from tsotsallm.engine.interface import Question, Sampling
from tsotsallm.engine.interface import texts as texts_of
from tsotsallm.engine.llama import CacheType
from tsotsallm.errors import CorpusError, TsotsallmError
from tsotsallm.files import DATA_BYTES, lines, read_utf8
from tsotsallm.records import amended

TOGETHER = 16
"""Prompts that are continued in one job."""


class SamplingKeywords(TypedDict, total=False):
    """The fields of Sampling, as keywords."""

    temperature: float
    top_p: float
    top_k: int
    seed: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    repeat_last_n: int
    logit_bias: tuple[tuple[int, float], ...]
    grammar: str | None


def generate(model: str | Path, prompt: str, *, tokens: int = 64, kv: str = "f16", adapter: str | Path | None = None,
             context: int | None = None, say: Callable[[str], None] = lambda _note: None, sampling: Sampling | None = None,
             **keywords: Unpack[SamplingKeywords]) -> Iterator[str]:
    """The pieces of a text's continuation as they come: GGUF files in llama.cpp, checkpoints in transformers.

    At most `tokens` new tokens; `kv` is the type of a GGUF file's key-value cache, `adapter` a GGUF adapter for it,
    `context` how many tokens prompt and answer can have together. How tokens are chosen is given as `sampling` or as
    keywords (temperature, top_p, top_k, seed, ...). `say` receives notes on how the model reads prompts.
    """
    if tokens < 1:
        raise TsotsallmError(f"{tokens} new tokens cannot be written; ask for 1 or more")
    question = Question(prompt, tokens, amended(sampling or Sampling(), keywords, generate))
    loaded = speaker(model, kv=cast(CacheType, kv), adapter=None if adapter is None else Path(adapter), context=context)
    for note in loaded.notes:
        say(f"note: {note}")
    return texts_of(loaded, question)


def generate_many(model: str | Path, prompts: str | Path, out: str | Path, *, tokens: int = 64,
                  workers: Computers | None = None, say: Callable[[str], None] = print, sampling: Sampling | None = None,
                  **keywords: Unpack[SamplingKeywords]) -> int:
    """Continue every line of a file; `out` gets a JSON line for each, in the same order. Returns the number of lines.

    Answers that an interrupted attempt wrote are kept. With `workers` the prompts are split over a cluster.
    """
    sampling = amended(sampling or Sampling(), keywords, generate_many)
    asked, path = read_prompts(prompts), Path(out)
    done = _answered(path, asked)
    left = asked[done:]
    jobs = [left[first:first + TOGETHER] for first in range(0, len(left), TOGETHER)]
    ready: dict[int, list[str]] = {}
    written = 0
    with contextlib.ExitStack() as stack:
        if workers is None:
            results: Iterator[tuple[int, list[str]]] = (
                (number, continuations(str(model), job, tokens, sampling)) for number, job in enumerate(jobs))
        else:
            results = continuations_on(stack.enter_context(workers.cluster(say)), str(model), jobs, tokens, sampling)
        for number, answers in results:
            ready[number] = answers
            while written in ready:
                with path.open("a", encoding="utf-8") as file:
                    for prompt, answer in zip(jobs[written], ready.pop(written), strict=True):
                        file.write(json.dumps({"prompt": prompt, "text": answer}, ensure_ascii=False) + "\n")
                written += 1
                say(f"{done + sum(map(len, jobs[:written]))} of {len(asked)} prompts")
    return len(asked)


def read_prompts(source: str | Path) -> list[str]:
    """The prompts of a text file, one per line. Raises CorpusError where there are none."""
    try:
        prompts = lines(read_utf8(Path(source), CorpusError, DATA_BYTES))
    except FileNotFoundError:
        raise CorpusError(f"{source} does not exist; give a text file with one prompt per line") from None
    if not any(prompts):
        raise CorpusError(f"{source} holds no prompts; give a text file with one per line")
    return prompts


def _answered(path: Path, prompts: Sequence[str]) -> int:
    """How many prompts an interrupted attempt answered; a line that was cut off is removed."""
    content = path.read_bytes() if path.exists() else b""
    whole = content[:content.rfind(b"\n") + 1]
    try:
        begun = [json.loads(line)["prompt"] for line in whole.split(b"\n")[:-1]]
    except (ValueError, TypeError, KeyError):
        begun = [None]
    if begun != list(prompts[:len(begun)]) or (not whole and content and not content.startswith(b"{")):
        raise TsotsallmError(f"{path} holds something else, not answers to these prompts; choose another name with -o, or "
                             "delete it first")
    if len(whole) < len(content):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return len(begun)
