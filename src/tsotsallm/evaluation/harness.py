"""Run any task of lm-evaluation-harness on a streamed or resident model (extra `harness`)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from tsotsallm.errors import MissingExtraError, TaskError
from tsotsallm.evaluation.cache import ItemCache
from tsotsallm.evaluation.cost import fits
from tsotsallm.evaluation.examinee import Examinee
from tsotsallm.files import JsonObject

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

try:
    from lm_eval.api.model import TemplateLM
except ImportError:
    raise MissingExtraError("lm-eval", "harness", "evaluating tasks of lm-evaluation-harness") from None


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """An `Examinee` behind the interface that lm-evaluation-harness calls a model by."""

    backend = "causal"

    def __init__(self, examinee: Examinee) -> None:
        super().__init__()
        self.examinee = examinee
        self.cache = ItemCache(examinee.fingerprint, {"name": "harness", "device": str(examinee.device)})

    @property
    def eot_token_id(self) -> int:
        """EOS, or the start token where the tokenizer has no EOS."""
        end = self.examinee.codec.eos
        return self.examinee.start_token if end is None else end

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that nothing precedes."""
        return self.examinee.start_token

    @property
    def max_length(self) -> int:
        """Positions that the model knows, in tokens."""
        return self.examinee.context

    @property
    def tokenizer_name(self) -> str:
        """The model's name without slashes, by which the harness caches rendered prompts."""
        return self.examinee.name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """Tokens of a text, with the BOS that the tokenizer adds unless `add_special_tokens` is False."""
        if add_special_tokens is False:
            return self.examinee.codec.encode(string, prefix=False)
        return self.examinee.encode(string)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation rendered by the model's chat template, up to where the answer begins."""
        return self.examinee.codec.render(chat_history, answer=add_generation_prompt)

    def _loglikelihood_tokens(self, requests: Sequence[tuple[object, list[int], list[int]]],
                              **_: object) -> list[tuple[float, bool]]:
        pairs = [(tuple(context), tuple(continuation)) for _, context, continuation in requests]
        keys = [_key(pair) for pair in pairs]
        waiting = [index for index, key in enumerate(keys) if key not in self.cache.entries]
        for place, score in self.examinee.token_likelihoods([pairs[index] for index in waiting]):
            self.cache.add(keys[waiting[place]], {"total": score.total, "greedy": float(score.greedy)})
        scored = [self.cache.entries[key]["features"] for key in keys]
        return [(cast(float, features["total"]), bool(features["greedy"])) for features in scored]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log p of every request's whole text, in nats."""
        totals = dict(self.examinee.rolling([request.args[0] for request in requests]))
        return [totals[index] for index in range(len(requests))]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuation of every request's prompt, up to its stop texts; TaskError where a request samples."""
        asked = [(request.args[0], *self._limits(request.args[1])) for request in requests]
        keys = [_key(request) for request in asked]
        for limits in dict.fromkeys(request[1:] for request in asked):
            waiting = [index for index, request in enumerate(asked)
                       if request[1:] == limits and keys[index] not in self.cache.entries]

            def keep(place: int, text: str, waiting: list[int] = waiting) -> None:
                self.cache.add(keys[waiting[place]], {}, reply=text)

            if waiting:
                self.examinee.generate([asked[index][0] for index in waiting], *limits, keep)
        return [self.cache.entries[key]["reply"] for key in keys]

    @staticmethod
    def _limits(options: JsonObject) -> tuple[int, tuple[str, ...]]:
        """(most new tokens, stop texts) of a request; raises TaskError for one that samples."""
        if options.get("do_sample") and float(options.get("temperature", 1.0)) > 0:
            raise TaskError("the task samples its answers; generation here is greedy, so that results can be reproduced")
        until = options.get("until", [])
        return int(options.get("max_gen_toks", 256)), tuple([until] if isinstance(until, str) else until)


def _key(asked: tuple[object, ...]) -> str:
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:32]


def run_harness(examinee: Examinee, tasks: Sequence[str], *, limit: int | None = None, shots: int | None = None,
                include: str | Path | None = None) -> JsonObject:
    """Evaluate tasks of lm-evaluation-harness; returns its own results without the samples.

    `shots` are examples in the prompt, `include` is a folder of task files. Raises TaskError where a task is unknown or its
    data cannot be read.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if include is None else str(include))
    unknown = [name for name in tasks if name not in manager.all_tasks]
    if unknown:
        from tsotsallm.errors import nearest

        close = nearest(unknown[0], manager.all_tasks).partition(" (known")[0]
        raise TaskError(f"lm-evaluation-harness has no task {unknown[0]!r}{close}")
    try:
        evaluated = simple_evaluate(model=HarnessModel(examinee), tasks=list(tasks), limit=limit, num_fewshot=shots,
                                    task_manager=manager, log_samples=False, bootstrap_iters=100)
    except (OSError, ConnectionError) as error:
        raise TaskError(f"lm-evaluation-harness could not get the data of {', '.join(tasks)} ({type(error).__name__}); it "
                        "downloads them from the hub unless the task names local files") from None
    return {"results": evaluated["results"], "versions": evaluated["versions"], "n-samples": evaluated["n-samples"],
            "fits": fits(examinee.checkpoint)}
