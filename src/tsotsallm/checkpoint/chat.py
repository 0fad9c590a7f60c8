"""A chat template: the text that a conversation becomes. Checkpoints and GGUF files are rendered by the same code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tsotsallm.errors import ConversationError
from tsotsallm.files import one_line, quoted

Message = Mapping[str, str]


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template with the special tokens that it may name, such as `bos_token`."""

    source: str
    special_tokens: Mapping[str, Any] = field(default_factory=dict)

    def render(self, messages: Sequence[Message], *, answer: bool = True, continued: bool | None = None) -> str:
        """The text of a conversation, special tokens spelled out.

        With `answer` it ends where the assistant's next words belong: inside the last message where that is the assistant's
        own, which is then continued, else in a new turn; `continued` decides otherwise. ConversationError where the template
        refuses the conversation.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        if not messages:
            raise ConversationError("the conversation is empty; give it at least one message")
        continued = answer and (messages[-1]["role"] == "assistant" if continued is None else continued)
        try:
            [text], _ = render_jinja_template(
                conversations=[[dict(message) for message in messages]], chat_template=self.source,
                add_generation_prompt=answer and not continued, continue_final_message=continued, **self.special_tokens)
        except Exception as error:  # a template can raise anything
            roles = ", ".join(dict.fromkeys(str(message.get("role")) for message in messages))
            raise ConversationError(f"the model's chat template refuses the conversation ({one_line(error)}); its roles are "
                                    f"{quoted(roles)}: leave out or reorder what the template does not know") from None
        return str(text)


def pick(templates: Mapping[str, str], special_tokens: Mapping[str, Any]) -> ChatTemplate | None:
    """The template called `default`, or a single one whatever its name; None where there is none, or several without a default."""
    if not templates:
        return None
    source = templates.get("default") or (next(iter(templates.values())) if len(templates) == 1 else None)
    return None if source is None else ChatTemplate(source, special_tokens)
