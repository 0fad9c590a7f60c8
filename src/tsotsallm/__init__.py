"""TSOTSALLM: make LLaMA-family models small enough for the computer somebody already has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from tsotsallm.api import (
        Conversation,
        analyze,
        annotate,
        compress,
        evaluate,
        examine,
        fit,
        franken,
        generate,
        harness,
        inspect,
        load,
        plan,
        plan_examination,
        push,
        run_study,
        score_tables,
        to_gguf,
        to_huggingface,
        write_report,
    )

__all__ = ["Conversation", "analyze", "annotate", "compress", "evaluate", "examine", "fit", "franken", "generate", "harness",
           "inspect", "load", "plan", "plan_examination", "push", "run_study", "score_tables", "to_gguf", "to_huggingface",
           "write_report"]


def __getattr__(name: str) -> Any:
    # heavy libraries are imported when a function is first asked for, not when the package is
    if name in __all__:
        from tsotsallm import api

        return getattr(api, name)
    raise AttributeError(f"module 'tsotsallm' has no attribute {name!r}")
