"""tsotsallm worker: this computer in a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tsotsallm.cli.common import TlsCa, TlsCert, TlsKey, answers
from tsotsallm.machine import THREADS


def worker(scheduler: Annotated[str, typer.Argument(help="Address of the cluster's scheduler, such as "
                                                         "tcp://192.168.1.5:8786.")],
           memory: Annotated[str | None, typer.Option(help="Memory in bytes that jobs may take, such as 4GB (default: most "
                                                           "of what is free).")] = None,
           threads: Annotated[int | None, typer.Option(help="Number of threads of a job (default: all cores).",
                                                       envvar=THREADS)] = None,
           work: Annotated[Path | None, typer.Option(help="Folder for models and results (default: in the cache).")] = None,
           name: Annotated[str | None, typer.Option(help="Name of this computer in the list of workers.")] = None,
           host: Annotated[str | None, typer.Option(help="Address of this computer, where it has several.")] = None,
           tls_ca: TlsCa = None, tls_cert: TlsCert = None, tls_key: TlsKey = None) -> None:
    """Let this computer work for a cluster.

    It does the jobs of studies, evaluations, generation and annotation.
    """
    with answers():
        from tsotsallm.cluster.worker import parse_tls, run_worker
        from tsotsallm.errors import ClusterError
        from tsotsallm.units import bytes_from_text

        most = None if memory is None else bytes_from_text(memory, "--memory", ClusterError)
        run_worker(scheduler, work=work, memory=most, threads=threads, name=name, host=host,
                   tls=parse_tls(tls_ca, tls_cert, tls_key))
