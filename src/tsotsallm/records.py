"""Records: dataclasses that JSON's plain data becomes and that become plain data again; options given as keywords."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self, TypeVar

from tsotsallm.errors import TsotsallmError, nearest
from tsotsallm.files import one_line, quoted

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Options = TypeVar("Options", bound="DataclassInstance")
_HINTS: dict[type, dict[str, object]] = {}
"""Record -> the types of its fields, which take long to resolve."""


class Record:
    """A dataclass that is read from JSON's plain data and written as such; its fields' types say what is accepted.

    A field that has a default, or may be None, may be missing. Keys that are no fields are passed over.
    """

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[object]]]

    @classmethod
    def read(cls, plain: object, where: str, kind: type[TsotsallmError], remedy: str) -> Self:
        """The record that plain data describes; raises `kind` with `where`, the fault and the remedy where it does not."""
        try:
            return cls.parsed(plain)
        except ValueError as fault:
            raise kind(f"{where} is damaged: {one_line(fault)}; {remedy}") from None

    @classmethod
    def parsed(cls, plain: object) -> Self:
        """The record that plain data describes; raises ValueError, naming the key, for a value of another type."""
        if not isinstance(plain, Mapping):
            raise ValueError(f"{quoted(plain)} stands where keys and values are expected")
        hints = _HINTS.get(cls) or _HINTS.setdefault(cls, typing.get_type_hints(cls))
        values, make = {}, typing.cast("Callable[..., Self]", cls)
        for item in dataclasses.fields(cls):
            required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
            if item.name in plain or required:
                values[item.name] = _typed(plain.get(item.name), hints[item.name], item.name)
        return make(**values)

    def plain(self) -> dict[str, object]:
        """The record as JSON's plain data, in the order of its fields."""
        return {item.name: _plain(getattr(self, item.name)) for item in dataclasses.fields(self)}


class Brief(Record):
    """A record whose plain data lacks the fields that are None and have that as their default."""

    def plain(self) -> dict[str, object]:
        """The record as JSON's plain data, in the order of its fields."""
        plain = super().plain()
        for item in dataclasses.fields(self):
            if item.default is None and plain[item.name] is None:
                del plain[item.name]
        return plain


def _plain(value: object) -> object:
    if isinstance(value, Record):
        return value.plain()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value


def _typed(value: object, hint: object, where: str) -> object:
    """The value as a field of type `hint` holds it; raises ValueError, naming `where`, where its type is another."""
    kind, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind is object:
        return value
    if kind in (types.UnionType, typing.Union):         # of something and None
        return None if value is None else _typed(value, inner[0], where)
    if isinstance(kind, type) and issubclass(kind, Record):
        try:
            return kind.parsed(value)
        except ValueError as fault:
            raise ValueError(f"in {where} {fault}") from None
    if kind in (list, tuple) and isinstance(value, (list, tuple)):
        hints = inner[:1] * len(value) if kind is list or inner[-1] is ... else inner
        if len(hints) == len(value):
            return kind(_typed(one, hints[place], f"{where}[{place}]") for place, one in enumerate(value))
    elif kind is dict and isinstance(value, dict):
        return {key: _typed(one, inner[1], f"{where}.{key}") for key, one in value.items()}
    elif type(value) is kind or (kind is float and type(value) is int):
        return value
    raise ValueError(f"{where} is {quoted(value)}" if value is not None else f"it has no {where}")


def amended(options: Options, keywords: Mapping[str, object], function: Callable[..., object]) -> Options:
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
