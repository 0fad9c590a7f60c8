"""TSOTSALLM: make LLaMA-family models small enough for the computer somebody already has."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from tsotsallm.version import __version__ as __version__

if TYPE_CHECKING:
    from tsotsallm.api.analyze import analyze
    from tsotsallm.api.annotate import annotate
    from tsotsallm.api.chat import Conversation
    from tsotsallm.api.compress import compress
    from tsotsallm.api.evaluate import evaluate, harness
    from tsotsallm.api.export import to_gguf, to_huggingface
    from tsotsallm.api.fit import fit
    from tsotsallm.api.franken import franken
    from tsotsallm.api.generate import generate
    from tsotsallm.api.inspect import inspect
    from tsotsallm.api.load import load
    from tsotsallm.api.push import push
    from tsotsallm.api.report import write_report
    from tsotsallm.api.study import run_study
    from tsotsallm.api.tables import score_tables
    from tsotsallm.compression import plan
    from tsotsallm.evaluation.examination import examine, plan_examination

_HOMES = {
    "analyze": "api.analyze", "annotate": "api.annotate", "Conversation": "api.chat", "compress": "api.compress",
    "evaluate": "api.evaluate", "harness": "api.evaluate", "to_gguf": "api.export", "to_huggingface": "api.export",
    "fit": "api.fit", "franken": "api.franken", "generate": "api.generate", "inspect": "api.inspect", "load": "api.load",
    "push": "api.push", "write_report": "api.report", "run_study": "api.study", "score_tables": "api.tables",
    "plan": "compression", "examine": "evaluation.examination", "plan_examination": "evaluation.examination"}

__all__ = ["Conversation", "analyze", "annotate", "compress", "evaluate", "examine", "fit", "franken", "generate", "harness",
           "inspect", "load", "plan", "plan_examination", "push", "run_study", "score_tables", "to_gguf", "to_huggingface",
           "write_report"]


def __getattr__(name: str) -> Any:
    # heavy libraries are imported when a function is first asked for, not when the package is
    if name in _HOMES:
        return getattr(import_module(f"tsotsallm.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'tsotsallm' has no attribute {name!r}")


class _Package(ModuleType):
    """This package: a subpackage that is called like one of its functions does not take the function's place."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
