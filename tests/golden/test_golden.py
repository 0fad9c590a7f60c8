"""The weights that fourteen recipes over all stages give do not change by accident.

The same processor, libraries and thread count give the same bytes: where this machine is on record, SHA-256 decides.
Elsewhere the mean absolute weight is compared. A change that has to alter weights says why in docs/LOG.md and renews the
record in a commit of its own:

    TSOTSALLM_RENEW_GOLDEN=1 python -m pytest tests/golden
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open

import tsotsallm
from tsotsallm import machine
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.checkpoint.view import View

HERE = Path(__file__).parent
RECORD = HERE / "weights.json"
RECIPES: list[dict[str, str]] = yaml.safe_load((HERE / "recipes.yaml").read_text("utf-8"))
RENEW = "TSOTSALLM_RENEW_GOLDEN" in os.environ
GRAPH = "".join(f'<http://x/{s}> <http://www.w3.org/2000/01/rdf-schema#label> "{s}" .\n<http://x/{s}> <http://x/near> '
                f'<http://x/{o}> .\n' for s, o in (("stone", "river"), ("river", "mill"), ("mill", "lane")))


def here() -> str:
    """What decides the last bit besides the recipe."""
    facts = machine.fingerprint(1)
    names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
             if line.startswith("model name")] if Path("/proc/cpuinfo").exists() else []
    return ", ".join([facts["processor"], names[0] if names else "", facts["instruction_set"], f"torch {facts['torch']}",
                      f"transformers {facts['transformers']}"])


def weights_of(folder: Path) -> tuple[str, float]:
    """(SHA-256 over all tensors in the order of their names, mean absolute weight as the model is read)."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in sorted(file.keys()):
                tensor = file.get_tensor(name).contiguous()
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
                digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    checkpoint = Checkpoint.open(folder)
    total, count = 0.0, 0
    view = View.of(checkpoint)
    for layer in range(view.spec.layers):
        for tensor in view.layer(layer).values():
            total += float(tensor.double().abs().sum())
            count += tensor.numel()
    return digest.hexdigest(), total / count



@pytest.mark.parametrize("one", RECIPES, ids=lambda one: str(one["name"]))
def test_weights_are_those_on_record(one: dict[str, str], tiny: Path, text: Path, tmp_path: Path,
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(machine.COMPILED, "0")       # the same with and without Numba
    (tmp_path / "graph.nt").write_text(GRAPH)
    recipe = one["recipe"].replace("TEXT", str(text)).replace("GRAPH", str(tmp_path / "graph.nt"))
    with machine.on_threads(1):
        tsotsallm.compress(tiny if one["model"] == "tiny" else one["model"], recipe, tmp_path / "out", calibration=text,
                           windows=4, window=64)
    digest, mean = weights_of(tmp_path / "out")
    record: dict[str, Any] = json.loads(RECORD.read_text("utf-8")) if RECORD.exists() else {}
    if RENEW:
        known = record.setdefault(one["name"], {"sha256": {}})
        known["mean"] = mean
        known["sha256"][here()] = digest
        RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", "utf-8")
        return
    assert mean == pytest.approx(record[one["name"]]["mean"], rel=2e-3)
    if here() in record[one["name"]]["sha256"]:
        assert digest == record[one["name"]]["sha256"][here()]
