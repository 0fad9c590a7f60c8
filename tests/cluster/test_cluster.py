"""Three processes and more: every trial once though a worker dies, files sent where they are missing, memory respected."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import tsotsallm
from tests.cluster.computers import Computers, computers
from tests.study.test_study import spec_of
from tsotsallm.api.computers import Computers as Cluster_
from tsotsallm.api.evaluate import examine_on_cluster
from tsotsallm.api.generate import generate_many
from tsotsallm.cluster.client import Cluster
from tsotsallm.cluster.worker import parse_tls
from tsotsallm.errors import ClusterError
from tsotsallm.study.spec import Spec, spec_from
from tsotsallm.study.study import run_study
from tsotsallm.study.workers import OnCluster

pytest.importorskip("distributed", reason="distributed is in the extra [cluster]")
pytestmark = pytest.mark.slow

SPACE = {"stages": [{"depth": {"remove": {"one_of": [0, 1]}, "importance": "cosine", "protect": {}}},
                    {"quantize": {"method": "gptq", "bits": {"one_of": [3, 4, 6, 8]}, "group": "channel"}}]}


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Computers]:
    (tmp_path / "computers").mkdir()
    with computers(tmp_path / "computers", 2) as found:
        yield found


def spec(text: Path) -> Spec:
    content = spec_of(text, cycle=8).content | SPACE
    content["evaluation"] = content["evaluation"] | {"cheap": None}         # so that order does not matter
    return spec_from("test", content, layers=3)


def test_a_worker_dies_and_every_trial_is_there_once(cluster: Computers, tiny: Path, text: Path, tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """The model has a relative path, which leads nowhere on the workers: it is sent to them. A single process finds the same
    models, bit for bit."""
    monkeypatch.chdir(tiny.parent)
    for name in ("one", "two"):
        cluster.start(name)
    lines: list[str] = []
    at_work = threading.Event()

    def heard(line: str) -> None:
        lines.append(line)
        trials = [line for line in lines if line.lstrip()[:1].isdigit()]        # of trials that are done
        if trials and {line.rpartition(" ")[2] for line in lines if line.startswith("sending")} == {"one", "two"}:
            at_work.set()

    def kill() -> None:
        at_work.wait(240)
        cluster.kill("one")                             # in the middle of its next trial

    killer = threading.Thread(target=kill)
    killer.start()
    client = Cluster(cluster.address, say=heard)
    try:
        while len(client.workers) < 2:                  # so that both have work from the first
            time.sleep(0.1)
        found = run_study(spec(text), tiny.name, tmp_path / "study", OnCluster(client), heard)
    finally:
        client.close()
        killer.join()
    assert [trial.status for trial in found.trials] == ["done"] * 8, [trial.error for trial in found.trials]
    assert Counter(trial.key for trial in found.trials).most_common(1)[0][1] == 1
    assert any("a worker has left" in line for line in lines)
    sent = Counter(line.rpartition(" ")[2] for line in lines if line.startswith(f"sending {tiny.name}"))
    assert sent == {"one": 1, "two": 1}
    alone = run_study(spec(text), tiny.name, tmp_path / "alone")
    assert {trial.key: trial.facts["hashes"] for trial in found.trials} == {
        trial.key: trial.facts["hashes"] for trial in alone.trials}
    assert {trial.key: trial.measures["full"]["kl"] for trial in found.trials} == pytest.approx(
        {trial.key: trial.measures["full"]["kl"] for trial in alone.trials}, rel=1e-5)
    if cluster.spaces:
        addresses = {line.split("tcp://")[1].rpartition(":")[0] for line in lines if "a worker has left" in line}
        assert addresses == {"10.117.0.2"}


def test_a_small_worker_gets_nothing_that_is_too_large(cluster: Computers, tiny: Path, text: Path, tmp_path: Path) -> None:
    cluster.start("small", "--memory", "1MB")
    client = Cluster(cluster.address)
    try:
        while not client.workers:
            time.sleep(0.2)
        found = run_study(spec(text), str(tiny), tmp_path / "small", OnCluster(client))
        assert {trial.status for trial in found.trials} == {"failed"}
        assert "more than any worker has: small" in found.trials[0].error
        cluster.start("large")
        while len(client.workers) < 2:
            time.sleep(0.2)
        found = run_study(spec(text), str(tiny), tmp_path / "large", OnCluster(client))
        assert {trial.status for trial in found.trials} == {"done"}
    finally:
        client.close()


def test_tasks_and_prompts_give_what_one_computer_gives(cluster: Computers, tiny: Path, text: Path, tmp_path: Path) -> None:
    cluster.start("one")
    cluster.start("two")
    there = Cluster_(cluster.address)
    asked = {"limit": 6, "seed": 3}
    found = examine_on_cluster(["embedded", "embedded"], ["world-closed"], there, **asked, say=lambda _line: None)
    alone = tsotsallm.examine(["embedded", "embedded"], ["world-closed"], **asked)
    assert [one.plain() for one in found.comparisons] == [one.plain() for one in alone.comparisons]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"{number} is the number of" for number in range(40)), "utf-8")
    generate_many("embedded", prompts, tmp_path / "far.jsonl", tokens=4, workers=there, say=lambda _line: None)
    far = [json.loads(line) for line in (tmp_path / "far.jsonl").read_text("utf-8").splitlines()]
    (tmp_path / "near.jsonl").write_text("".join(json.dumps(one) + "\n" for one in far[:20]), "utf-8")
    generate_many("embedded", prompts, tmp_path / "near.jsonl", tokens=4, say=lambda _line: None)
    near = [json.loads(line) for line in (tmp_path / "near.jsonl").read_text("utf-8").splitlines()]
    assert near == far
    assert [one["prompt"] for one in far] == prompts.read_text("utf-8").splitlines()


def test_encrypted_connections_need_certificates(tmp_path: Path, tiny: Path, text: Path) -> None:
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=tsotsallm",
            "-keyout", str(tmp_path / "key.pem"), "-out", str(tmp_path / "cert.pem")]
    try:
        subprocess.run(made, check=True, capture_output=True)
    except OSError:
        pytest.skip("openssl is not installed: it makes the certificates of this test")
    files = [str(tmp_path / name) for name in ("cert.pem", "cert.pem", "key.pem")]
    (tmp_path / "computers").mkdir()
    with computers(tmp_path / "computers", 1, tls=files, spaces=False) as cluster:
        assert cluster.address.startswith("tls://")
        cluster.start("one")
        client = Cluster(cluster.address, parse_tls(*files))
        found = run_study(spec(text), str(tiny), tmp_path / "study", OnCluster(client))
        client.close()
        assert {trial.status for trial in found.trials} == {"done"}
        with pytest.raises(ClusterError, match="no scheduler answers"):
            Cluster(cluster.address.replace("tls://", "tcp://"))


def test_what_does_not_fit_together_is_told(tmp_path: Path) -> None:
    for arguments, message in (
            (["worker", "here"], "not the address of a scheduler"), (["worker", "tls://127.0.0.1:1"], "do not go together"),
            (["worker", "tcp://127.0.0.1:1", "--tls-ca", "x"], "together"),
            (["worker", "tcp://127.0.0.1:1", "--memory", "much"], "--memory"),
            (["study", "quick", "-o", str(tmp_path / "s"), "--workers", "tcp://127.0.0.1:1"], "no scheduler answers"),
            (["study", "quick", "-o", str(tmp_path / "s"), "--tls-ca", "x"], "belong to --workers"),
            (["evaluate", "embedded", "--workers", "tcp://127.0.0.1:1"], "give --task"),
            (["generate", "embedded", "--workers", "tcp://127.0.0.1:1"], "--prompts FILE")):
        found = subprocess.run([sys.executable, "-m", "tsotsallm", *arguments], capture_output=True, text=True,
                               check=False)
        assert found.returncode in (1, 2), found
        assert message in found.stderr, found.stderr
        assert "Traceback" not in found.stderr
