"""Names of models on the hub: `hub:owner/name`, with a revision, or with a GGUF file in it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from tsotsallm.errors import HubError
from tsotsallm.files import quoted

PREFIX = "hub:"
COMMIT = re.compile(r"[0-9a-f]{40}")
_ID = re.compile(r"(?P<repository>\w[\w.-]{0,95}/\w[\w.-]{0,95})(?:@(?P<revision>\w[\w./-]{0,199}))?")
_NAME = re.compile(r"(?P<repository>\w[\w.-]{0,95}(?:/\w[\w.-]{0,95})?)(?:@(?P<revision>\w[\w.-]{0,199}))?"
                   r"(?:/(?P<file>.+\.gguf))?")


@dataclass(frozen=True)
class HubName:
    """A model on the hub.

    revision  a branch, a tag or a commit; None: the main branch
    file      a GGUF file in it; None: its checkpoint in safetensors
    """

    repository: str
    revision: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        return (f"{PREFIX}{self.repository}" + (f"@{self.revision}" if self.revision else "")
                + (f"/{self.file}" if self.file else ""))

    @property
    def source(self) -> str:
        """The name that results give it: without the prefix and the revision."""
        return self.repository + (f"/{self.file}" if self.file else "")


def hub_name(source: str | Path) -> HubName | None:
    """The model of the hub that a name stands for: `hub:...`, or a bare id owner/name; None for anything else.

    A bare id with the name of a file or folder that exists is that file or folder. Raises HubError where what follows `hub:`
    is no name.
    """
    text = str(source)
    if text.startswith(PREFIX):
        found = _ID.fullmatch(text.removeprefix(PREFIX)) or _NAME.fullmatch(text.removeprefix(PREFIX))
        if found is None or ".." in text.split("/"):
            raise HubError(f"{quoted(text)} is not a name of a model on the hub; names are such as hub:owner/name, "
                           "hub:owner/name@revision and hub:owner/name/file.gguf")
        return HubName(found["repository"], found["revision"], found.groupdict().get("file"))
    found = None if Path(source).exists() or isinstance(source, Path) else _ID.fullmatch(text)
    return None if found is None else HubName(found["repository"], found["revision"])
