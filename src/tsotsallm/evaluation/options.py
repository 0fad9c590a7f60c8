"""Options that many functions share: one frozen object, or keywords, which are checked against its fields."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

from tsotsallm.errors import nearest
from tsotsallm.streaming.sweep import Tick, silent

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Options = TypeVar("Options", bound="DataclassInstance")


@dataclass(frozen=True)
class RunOptions:
    """Where a computation runs and who hears of its progress.

    device   "cpu", or "cuda" where there is a GPU
    scratch  directory for hidden states; None takes the system's temporary one
    tick     called with the name of a step and the share of it that is done, 0 to 1
    """

    device: str = "cpu"
    scratch: str | Path | None = None
    tick: Tick = silent


class RunKeywords(TypedDict, total=False):
    """The fields of RunOptions, as keywords."""

    device: str
    scratch: str | Path | None
    tick: Tick


def amended(options: Options, keywords: Mapping[str, object], function: Callable[..., Any]) -> Options:
    """The options of a function with the values of its keywords in their place.

    Raises TypeError, with the nearest known name, for a keyword that neither the options nor the function have.
    """
    fields = [one.name for one in dataclasses.fields(options)]
    for name in keywords:
        if name not in fields:
            known = {*fields, *(one.name for one in inspect.signature(function).parameters.values()
                                if one.kind is not one.VAR_KEYWORD)}
            raise TypeError(f"{function.__name__}() has no option {name!r}{nearest(name, known)}")
    return dataclasses.replace(options, **keywords)
