"""Many prompts continued on a cluster, some to a job."""

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
    """Yield (number of the part, its continuations), as they are done."""
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
    return continuations(places[model], prompts, tokens, sampling)
