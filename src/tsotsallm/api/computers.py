"""The computers of a cluster, as a caller names them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tsotsallm.cluster.client import Cluster
from tsotsallm.cluster.worker import parse_tls


@dataclass(frozen=True)
class Computers:
    """A Dask cluster by its scheduler's address, and certificates where connections are encrypted."""

    scheduler: str
    tls_ca: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None

    @contextlib.contextmanager
    def cluster(self, say: Callable[[str], None]) -> Iterator[Cluster]:
        """The cluster, connected; `say` hears of workers that come and go. Raises ClusterError where it is out of reach."""
        connected = Cluster(self.scheduler, parse_tls(self.tls_ca, self.tls_cert, self.tls_key), say)
        try:
            yield connected
        finally:
            connected.close()
