"""Sharing a result: a Modelfile for Ollama, an upload to the hub."""

from __future__ import annotations

import re
from pathlib import Path

from tsotsallm.checkpoint.weights import weight_files
from tsotsallm.errors import CheckpointError, ExportError


def modelfile_path(gguf: Path) -> Path:
    """The path of a GGUF file's Modelfile, named after it so that a folder can hold several."""
    return gguf.with_suffix(".Modelfile")


def ollama_name(gguf: Path) -> str:
    """The name that Ollama can give the model of a GGUF file: lower case, and no other signs than - _ and ."""
    return re.sub(r"[^a-z0-9_.-]+", "-", gguf.stem.lower()).strip("-.") or "model"


def write_modelfile(path: Path, gguf: Path, adapter: Path | None, context: int) -> Path:
    """Write a Modelfile beside a GGUF file; Ollama reads the chat template from the file itself."""
    lines = [f"FROM ./{gguf.name}", *([f"ADAPTER ./{adapter.name}"] if adapter is not None else []),
             f"PARAMETER num_ctx {context}"]
    path.write_text("\n".join(lines) + "\n", "utf-8", errors="surrogateescape")     # the file's name, byte for byte
    return path


def push(result: Path, repository: str, *, upload: bool, public: bool) -> dict[str, object]:
    """Upload a result's files, or one GGUF file, to the hub, or only list them unless `upload`.

    Raises CheckpointError where there is no result, ExportError where the upload fails.
    """
    if result.is_dir():
        if not (result / "config.json").exists():
            raise CheckpointError(f"{result} holds no config.json: it is not a finished result")
        unused = weight_files(result).beside
        files = {str(path.relative_to(result)): path for path in sorted(result.rglob("*"))
                 if path.is_file() and str(path.relative_to(result)) not in unused}
    elif result.is_file():
        files = {path.name: path for path in (result, result.with_name(f"{result.stem}-adapter.gguf"),
                                              modelfile_path(result)) if path.is_file()}
    else:
        raise CheckpointError(f"{result} does not exist; give a result's directory or a GGUF file")
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise ExportError(f"{repository!r} is not a repository of the hub; it takes NAME/MODEL")
    if upload:
        _upload(files, repository, public=public)
    return {"repository": repository, "public": public, "uploaded": upload,
            "files": {name: path.stat().st_size for name, path in files.items()}}


def _upload(files: dict[str, Path], repository: str, *, public: bool) -> None:
    from huggingface_hub import HfApi

    try:
        hub = HfApi()
        hub.create_repo(repository, private=not public, exist_ok=True)
        for name, path in files.items():
            hub.upload_file(path_or_fileobj=path, path_in_repo=name, repo_id=repository)
    except Exception as error:  # the client's transport raises types of its own
        raise ExportError(f"the upload to {repository} stopped ({type(error).__name__}: {error}); log in with "
                          "`hf auth login`, check the connection, and run the same command again") from None
