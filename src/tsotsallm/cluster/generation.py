"""Continue many prompts on a cluster, a few per job."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tsotsallm.cluster.client import Cluster
from tsotsallm.cluster.inputs import Bundle
from tsotsallm.cluster.worker import Failure
from tsotsallm.engine.factory import continuations
from tsotsallm.engine.interface import Sampling
from tsotsallm.errors import ClusterError


def continuations_on(cluster: Cluster, model: str, parts: Sequence[Sequence[str]], tokens: int,
                     sampling: Sampling) -> Iterator[tuple[int, list[str]]]:
    """Yield (number of the part, its continuations) as they are done; every part of the prompts is one job.

    Raises ClusterError where a job fails.
    """
    bundle = Bundle.of(model)
    waiting = set(range(len(parts)))
    for number, part in enumerate(parts):
        cluster.submit(number, continued_there, (model, list(part), tokens, sampling), [bundle], 3 * bundle.bytes)
    while waiting:
        for number, result in cluster.finished():
            if isinstance(result, Failure):
                raise ClusterError(f"prompts of part {number}: {result.error}")
            waiting.discard(number)
            yield number, result


def continued_there(model: str, prompts: Sequence[str], tokens: int, sampling: Sampling, places: Mapping[str, str],
                    _folder: Path) -> list[str]:
    """Continue prompts on a worker by up to `tokens` tokens each; `places` maps the model to the worker's own path."""
    return continuations(places[model], prompts, tokens, sampling)
