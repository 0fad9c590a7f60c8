"""Untrusted Jinja templates: no access to Python's internals, and limits on their steps and on the text they make."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import jinja2.utils
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from tsotsallm.files import quoted

MOST_STEPS, MOST_CHARACTERS = 200_000, 10_000_000
"""Limits of one rendering: loop iterations and calls, and characters produced, discarded ones included."""
MORE_STEPS, MORE_CHARACTERS = 10, 100
"""What each character of the input adds to these limits."""
MOST_NUMBER = 100_000
"""Limit of widths, counts and indents."""
MOST_DIGITS = 300
_FORMAT = re.compile(r"\d{6}|\*|\{[^{}]*\{")
"""Matches a width of six digits, or one that is itself a value."""
_STEPS, _JOINED = "tsotsallm_steps", "tsotsallm_joined"


@dataclass
class _Left:
    """What is left of the limits of a rendering."""

    steps: int = MOST_STEPS
    characters: int = MOST_CHARACTERS

    def step(self) -> None:
        self.steps -= 1
        if self.steps < 0:
            raise SecurityError("it takes more steps than a template should")

    def make(self, size: float) -> None:
        if size > self.characters:
            raise SecurityError("it makes more text than a template should")
        self.characters -= int(size)


_left: ContextVar[_Left] = ContextVar("left")


@contextmanager
def bounded(input_characters: int = 0) -> Iterator[None]:
    """Limit the steps and the text of templates compiled and rendered inside; beyond them SecurityError, a TemplateError."""
    token = _left.set(_Left(MOST_STEPS + MORE_STEPS * input_characters,
                            MOST_CHARACTERS + MORE_CHARACTERS * input_characters))
    try:
        yield
    finally:
        _left.reset(token)


def _now() -> _Left:
    found = _left.get(None)
    return _Left() if found is None else found


class Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with loops, calls, operators and filters counted; use it inside `bounded`."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.filters = {name: checked(name, function) for name, function in self.filters.items()}
        self.filters |= {_STEPS: _counted, _JOINED: _joined}
        del self.globals["lipsum"]
        self.globals |= {"namespace": Namespace, "dict": _Dict()}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        found: nodes.Template = _Counting().visit(super()._parse(source, name, filename))
        return found

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        """Join the parts of a rendered text, their characters counted."""
        return _joined(parts)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """The sandboxed form of `str.format`, refused for widths that no text needs; None where `value` is not one."""
        found = super().wrap_str_format(value)
        if found is not None:
            _check_format(str(value.__self__))
        return found

    def call_binop(self, context: Context, operator: str, left: object, right: object) -> object:
        """Apply an operator, its step and the size of its result counted."""
        _now().step()
        _now().make(_size_of(operator, left, right))
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: object, *args: object, **kwargs: object) -> object:
        """Call a function or method, its step, its arguments and the size of its result counted."""
        _now().step()
        name, owner = getattr(__obj, "__name__", ""), getattr(__obj, "__self__", None)
        if isinstance(owner, (str, bytes, list, tuple, int, float)):
            _check_arguments(name, owner, (*args, *kwargs.values()))
        return _charged(super().call(__context, __obj, *args, **kwargs))


class Namespace(jinja2.utils.Namespace):
    """Variables that a template may set from inside a loop; names that begin with an underscore are refused."""

    def __init__(*args: object, **kwargs: object) -> None:
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            _refuse_hidden(name)
        jinja2.utils.Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: object) -> None:
        _refuse_hidden(name)
        super().__setitem__(name, value)


class _Dict:
    """`dict` without the attributes of a class."""

    def __call__(self, *args: object, **kwargs: object) -> dict[str, object]:
        return dict(*args, **kwargs)


def _refuse_hidden(name: object) -> None:
    if not isinstance(name, str) or name.startswith("_"):
        raise SecurityError(f"a namespace has no {quoted(name)}")


class _Counting(NodeTransformer):
    """Wraps what every loop iterates over, and the texts that `~` joins, in counters."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, _STEPS, [], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        return nodes.Filter(nodes.List(node.nodes, lineno=node.lineno), _JOINED, [], [], None, None, lineno=node.lineno)


def _counted(values: Iterable[object]) -> Iterator[object]:
    for value in values:
        _now().step()
        yield value


def _joined(parts: Iterable[object]) -> str:
    found = []
    for part in parts:
        text = str(part)
        _now().make(len(text))
        found.append(text)
    return "".join(found)


def _size_of(operator: str, left: object, right: object) -> float:
    """Characters, elements or digits that an operator produces; raises SecurityError for numbers that are too large."""
    if operator == "%" and isinstance(left, (str, bytes)):
        _check_format(left)
        return len(left)
    sizes = [len(operand) if isinstance(operand, (str, bytes, list, tuple)) else None for operand in (left, right)]
    if operator == "+":
        return sum(size or 0 for size in sizes)
    if operator == "*":
        if sizes[0] is None and sizes[1] is None:
            return _digits(left) + _digits(right)
        times = right if sizes[1] is None else left
        return (sizes[0] or sizes[1] or 0) * max(0, times) if isinstance(times, int) else 0
    if operator == "**" and isinstance(right, int) and _digits(left) * abs(right) > MOST_DIGITS:
        raise SecurityError(f"it makes a number of more than {MOST_DIGITS} digits")
    return 0


def _digits(number: object) -> float:
    found = number.bit_length() / math.log2(10) if isinstance(number, int) else 1
    if found > MOST_DIGITS:
        raise SecurityError(f"it makes a number of more than {MOST_DIGITS} digits")
    return found


def _check_format(text: str | bytes) -> None:
    if _FORMAT.search(text if isinstance(text, str) else text.decode("latin-1")):
        raise SecurityError("it formats with a width that no text needs")


def _check_arguments(name: str, value: object, arguments: tuple[object, ...]) -> None:
    """Raise SecurityError where a method or filter of a text or list would produce something huge."""
    if name == "format":
        _check_format(str(value))
        return
    if name == "replace" and len(arguments) > 1 and isinstance(value, (str, bytes)):
        old, new = str(arguments[0]), str(arguments[1])
        _now().make(len(value) + (str(value).count(old) if old else len(value) + 1) * len(new))
        return
    if name == "join" and arguments:
        separator, parts = (str(value), arguments[0]) if isinstance(value, str) else (str(arguments[0]), value)
        _now().make(len(separator) * (len(parts) if hasattr(parts, "__len__") else 1))
        return
    for argument in arguments:
        if isinstance(argument, (int, float)) and argument > MOST_NUMBER:
            raise SecurityError(f"{name} is given a number above {MOST_NUMBER}")
        if isinstance(argument, (str, bytes)):
            _now().make(len(argument))


def _charged(value: object) -> object:
    if isinstance(value, (str, bytes, list, tuple)):
        _now().make(len(value))
    return value


def checked(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter with its steps, arguments and results counted; its first argument, after a context if any, is the value."""
    hidden = 0 if getattr(function, "jinja_pass_arg", None) is None else 1

    @functools.wraps(function)
    def counted(*args: object, **kwargs: object) -> object:
        _now().step()
        value, *arguments = args[hidden:] or (None,)
        if name in ("indent", "join", "replace", "format") or not isinstance(value, (int, float)):
            _check_arguments(name, value, (*arguments, *kwargs.values()))
        elif name == "round" and any(isinstance(argument, int) and abs(argument) > MOST_DIGITS
                                     for argument in (*arguments, *kwargs.values())):
            raise SecurityError("it rounds to more digits than a number has")
        return _charged(function(*args, **kwargs))

    return counted
