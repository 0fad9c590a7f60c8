"""TSOTSALLM: make LLaMA-family models small enough for the computer somebody already has."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tsotsallm.version import __version__ as __version__

if TYPE_CHECKING:
    from tsotsallm.api.annotating import annotate, score_tables
    from tsotsallm.api.exporting import push, to_gguf, to_huggingface
    from tsotsallm.api.finding import fit, run_study
    from tsotsallm.api.measuring import analyze, evaluate, franken, harness
    from tsotsallm.api.reducing import compress, inspect, load
    from tsotsallm.api.reporting import write_report
    from tsotsallm.api.talking import Conversation, generate
    from tsotsallm.compression import plan
    from tsotsallm.evaluation.examination import examine, plan_examination

_HOMES = {
    "api.annotating": ("annotate", "score_tables"), "api.exporting": ("push", "to_gguf", "to_huggingface"),
    "api.finding": ("fit", "run_study"), "api.measuring": ("analyze", "evaluate", "franken", "harness"),
    "api.reducing": ("compress", "inspect", "load"), "api.reporting": ("write_report",),
    "api.talking": ("Conversation", "generate"), "compression": ("plan",),
    "evaluation.examination": ("examine", "plan_examination")}

__all__ = ["Conversation", "analyze", "annotate", "compress", "evaluate", "examine", "fit", "franken", "generate", "harness",
           "inspect", "load", "plan", "plan_examination", "push", "run_study", "score_tables", "to_gguf", "to_huggingface",
           "write_report"]


def __getattr__(name: str) -> Any:
    # heavy libraries are imported when a function is first asked for, not when the package is
    for home, offered in _HOMES.items():
        if name in offered:
            return getattr(import_module(f"tsotsallm.{home}"), name)
    raise AttributeError(f"module 'tsotsallm' has no attribute {name!r}")
