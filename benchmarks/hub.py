"""What reading a model from the hub layer by layer costs: bytes, disk and memory, with and without faults.

    python benchmarks/hub.py llama-3.2-1b --layers 2 --work /tmp/hub
    python benchmarks/hub.py llama-2-7b --layers 3 --recipe rtn:4 --work /tmp/hub

The hub is a server on this machine that speaks its protocol (`tests/remote/server.py`); the checkpoint is random, in the
shapes of `benchmarks/scale.py`. The command runs in a process of its own, whose peak resident memory the operating system
reports. Disk is sampled five times a second: unfinished work, result, and the caches of the hub's client and of the command.
`--faults RATE` closes a connection with that chance for every MiB that it sends; `--kill` kills the command when half of the
bytes were sent, and starts it again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from scale import SHAPES, make_checkpoint

from tests.remote.server import Faults, Hub, running
from tsotsallm.checkpoint.reader import Checkpoint

NAME = "random/model"


def bytes_in(*folders: Path) -> int:
    """Bytes of the files in folders, links not counted."""
    used = 0
    for folder in folders:
        for path in folder.rglob("*"):
            try:
                used += path.stat().st_size if path.is_file() and not path.is_symlink() else 0
            except OSError:
                continue
    return used


def digest(directory: Path) -> str:
    """SHA-256 over names and contents of the weights of a result."""
    found = hashlib.sha256()
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb") as file:
            found.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()[:16]


def measured(hub: Hub, source: Path, work: Path, recipe: str, faults: Faults, *, kill: bool,
             more: list[str]) -> dict[str, Any]:
    """One compression from the hub: what it fetched and took."""
    places = {name: work / name for name in ("out", "out.partial", "cache", "hf")}
    for place in places.values():
        shutil.rmtree(place, ignore_errors=True)
    hub.faults, hub.sent, hub.broken = faults, 0, 0
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(places["hf"]),
                   "TSOTSALLM_CACHE": str(places["cache"]), "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-m", "tsotsallm", "compress", f"hub:{NAME}", recipe, "-o", str(places["out"]), "--json",
               *more]
    peak, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.2):
            peak[0] = max(peak[0], bytes_in(*places.values()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    began, half = time.monotonic(), sum(path.stat().st_size for path in source.glob("*.safetensors")) // 2
    try:
        if kill:
            with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as killed:
                while hub.sent < half and killed.poll() is None:
                    time.sleep(0.05)
                killed.send_signal(signal.SIGKILL)
        finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    finally:
        stop.set()
        watcher.join()
    if finished.returncode:
        sys.exit(finished.stdout + finished.stderr)
    result = json.loads(finished.stdout)
    return {"sent": hub.sent, "broken": hub.broken, "peak_rss_bytes": result["peak_rss_bytes"],
            "elapsed_s": time.monotonic() - began, "disk_bytes": peak[0] - bytes_in(places["out"]),
            "result_bytes": bytes_in(places["out"]), "digest": digest(places["out"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--layers", type=int, help="fewer layers than the real model")
    parser.add_argument("--recipe", default="rtn:4")
    parser.add_argument("--faults", type=float, default=0.01, help="chance of a broken connection for every MiB")
    parser.add_argument("--kill", action="store_true", help="measure a kill in the middle as well")
    parser.add_argument("--compare", action="store_true", help="compress from the directory as well, and compare the bytes")
    parser.add_argument("--work", type=Path, default=Path("hub-benchmark"))
    asked, more = parser.parse_known_args()
    name = asked.shape + (f"-{asked.layers}" if asked.layers else "")
    source = asked.work.absolute() / name
    if not source.exists():
        building = source.with_name(f"{name}.building")
        shutil.rmtree(building, ignore_errors=True)
        make_checkpoint(building, SHAPES[asked.shape], asked.layers)
        building.rename(source)
    visited = sum(record.size for record in Checkpoint(source).records.values())
    digests = set()
    if asked.compare:
        local = asked.work / "local"
        shutil.rmtree(local, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "tsotsallm", "compress", str(source), asked.recipe, "-o", str(local), "--json",
                        *more], check=True, capture_output=True)
        digests.add(digest(local))
    print("| shape | recipe | faults | visited | downloaded | ratio | disk beyond the result | peak RAM | time |\n"
          "|---|---|---|---|---|---|---|---|---|")
    with running() as hub:
        hub.add(NAME, source)
        runs = [("none", Faults(), False), (f"{asked.faults:.0%} a MiB", Faults(rate=asked.faults), False)]
        runs += [("killed at half", Faults(), True)] if asked.kill else []
        for label, faults, kill in runs:
            found = measured(hub, source, asked.work.absolute(), asked.recipe, faults, kill=kill, more=more)
            digests.add(found["digest"])
            print(f"| {name} | `{asked.recipe}` | {label} ({found['broken']} broken) | {visited / 1e9:.3f} GB | "
                  f"{found['sent'] / 1e9:.3f} GB | {found['sent'] / visited:.4f} | {found['disk_bytes'] / 1e9:.2f} GB | "
                  f"{found['peak_rss_bytes'] / 1e9:.2f} GB | {found['elapsed_s']:.0f} s |", flush=True)
    print("the same bytes" if len(digests) == 1 else f"different bytes: {digests}")


if __name__ == "__main__":
    main()
