"""Chat templates, which turn conversations into text; checkpoints and GGUF files share this code."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from tsotsallm.errors import ConversationError
from tsotsallm.files import one_line, quoted
from tsotsallm.sandbox import Environment, bounded, checked

Message = Mapping[str, str]


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template with the special tokens that it may refer to, such as `bos_token`."""

    source: str
    special_tokens: Mapping[str, object] = field(default_factory=dict)

    def render(self, messages: Sequence[Message], *, answer: bool = True, continued: bool | None = None) -> str:
        """The text of a conversation, special tokens spelled out.

        With `answer` it ends where the assistant speaks next: inside the last message where that is the assistant's own,
        which is then continued, else in a new turn; `continued` overrides this. Raises ConversationError where the
        conversation is empty or the template refuses it.
        """
        if not messages:
            raise ConversationError("the conversation is empty; give it at least one message")
        continued = answer and (messages[-1]["role"] == "assistant" if continued is None else continued)
        told = [dict(message) for message in messages]
        if continued:
            told[-1]["content"] += _CUT
        try:
            with bounded(sum(len(part) for message in told for part in message.values())):
                text = str(_compiled(self.source).render(
                    messages=told, tools=None, documents=None, add_generation_prompt=answer and not continued,
                    **_plain(self.special_tokens)))
        except Exception as error:  # a template can raise anything
            roles = ", ".join(dict.fromkeys(str(message.get("role")) for message in messages))
            raise ConversationError(f"the model's chat template refuses the conversation ({one_line(error)}); its roles are "
                                    f"{quoted(roles)}: leave out or reorder what the template does not allow") from None
        return _cut(text) if continued else text


_CUT = "CONTINUE_FINAL_MESSAGE_TAG "
"""Marks the end of a last message that is continued; what the template writes after it is cut off."""


def _cut(text: str) -> str:
    """A rendered conversation up to the end of its last message."""
    place = text.rfind(_CUT.strip())
    if place < 0:
        raise ConversationError("the model's chat template leaves out the assistant's last message, which therefore cannot "
                                "be continued; remove that message")
    return text[:place] if text.startswith(_CUT, place) else text[:place].rstrip()      # some templates trim a message


@functools.lru_cache(64)
def _compiled(source: str) -> Template:
    """A template compiled as in transformers, in a sandbox with limits."""
    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = checked("tojson", _to_json)
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
    return environment.from_string(source)


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for training; here they are rendered like any other text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The nodes between the tags, unchanged."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _refuse(message: object) -> None:
    raise TemplateError(str(message))


def _to_json(value: object, ensure_ascii: bool = False, indent: int | None = None, separators: tuple[str, str] | None = None,
             sort_keys: bool = False) -> str:
    """JSON without the HTML escapes of Jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _plain(tokens: Mapping[str, object]) -> dict[str, str | list[str]]:
    """Special tokens as plain text: their classes have methods that a template must not reach."""
    return {name: [str(one) for one in token] if isinstance(token, (list, tuple)) else str(token)
            for name, token in tokens.items() if token is not None}


def pick(templates: Mapping[str, str], special_tokens: Mapping[str, object]) -> ChatTemplate | None:
    """The template named `default`, or the only one; None where there is none, or several without a default."""
    if not templates:
        return None
    source = templates.get("default") or (next(iter(templates.values())) if len(templates) == 1 else None)
    return None if source is None else ChatTemplate(source, special_tokens)
