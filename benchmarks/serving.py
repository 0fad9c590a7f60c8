"""The service under load: many clients for a while, against the same model asked without it.

    python benchmarks/serving.py [--clients 16] [--seconds 60] [--slots 4] [--model FILE.gguf]

Clients ask for streams one after another; those that are turned away (429) come again. Told are answers and refusals,
failures, the service's memory over time (first and last ten seconds), tokens a second of all clients together, and of the
same engine in a process of its own with one question at a time and with as many as there are slots.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil

import tsotsallm

TOKENS = 48
PROMPTS = ("Question: Where was Ada born? Answer:", "The town of", "Once upon a time", "Question: What is bread? Answer:")

DIRECT = """
import sys, threading, time
from pathlib import Path
from tsotsallm.engine.llama import Llama
from tsotsallm.engine.interface import Question, Sampling
path, slots, seconds, tokens = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
engine, made = Llama(path, slots=slots), []
engine.speak(Question("The", 2), lambda piece: False)
end = time.monotonic() + seconds
def work(number):
    while time.monotonic() < end:
        question = Question(PROMPTS[number % len(PROMPTS)], tokens, Sampling(1.0, seed=len(made)))
        made.append(engine.speak(question, lambda piece: False).tokens)
began = time.monotonic()
threads = [threading.Thread(target=work, args=(number,)) for number in range(slots)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(sum(made) / (time.monotonic() - began))
"""


def direct(path: Path, slots: int, seconds: float) -> float:
    """Tokens a second of the engine without the service, in a process of its own."""
    program = [sys.executable, "-c", f"PROMPTS = {PROMPTS!r}\n{DIRECT}", str(path), str(slots), str(seconds), str(TOKENS)]
    found = subprocess.run(program, capture_output=True, text=True, check=True)
    return float(found.stdout)


class Load:
    """Clients of a service, and what became of their requests."""

    def __init__(self, address: str, clients: int, seconds: float) -> None:
        self.address, self.clients, self.seconds = address, clients, seconds
        self.lock = threading.Lock()
        self.answers = self.refusals = self.tokens = 0
        self.failures: list[str] = []
        self.latencies: list[float] = []

    def run(self, process: psutil.Process) -> tuple[float, list[tuple[float, int]]]:
        began = time.monotonic()
        end, memory = began + self.seconds, list[tuple[float, int]]()
        threads = [threading.Thread(target=self.client, args=(number, end)) for number in range(self.clients)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            memory.append((time.monotonic() - began, process.memory_info().rss))
            time.sleep(0.5)
        return time.monotonic() - began, memory

    def client(self, number: int, end: float) -> None:
        asked = 0
        while time.monotonic() < end:
            asked += 1
            body = {"prompt": PROMPTS[(number + asked) % len(PROMPTS)], "max_tokens": TOKENS, "temperature": 1.0,
                    "stream": True, "stream_options": {"include_usage": True}}
            request = urllib.request.Request(f"{self.address}/v1/completions", json.dumps(body).encode(),
                                             {"Content-Type": "application/json"})
            began = time.monotonic()
            try:
                with urllib.request.urlopen(request, timeout=120) as answer:
                    events = [json.loads(line[6:]) for line in answer if line.startswith(b"data: {")]
                faults = [event["error"]["message"] for event in events if "error" in event]
                with self.lock:
                    self.failures += faults
                    self.answers += not faults
                    self.tokens += 0 if faults else events[-1]["usage"]["completion_tokens"]
                    self.latencies.append(time.monotonic() - began)
            except urllib.error.HTTPError as error:
                with self.lock:
                    if error.code == 429:
                        self.refusals += 1
                    else:
                        self.failures.append(f"{error.code}: {error.read()[:200]!r}")
                time.sleep(float(error.headers.get("Retry-After", 1)) if error.code == 429 else 0)
            except OSError as error:
                with self.lock:
                    self.failures.append(repr(error))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--queue", type=int, default=8)
    parser.add_argument("--model", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = asked.model or Path(folder) / "embedded.gguf"
        if asked.model is None:
            tsotsallm.to_gguf("embedded", path, verify=False)
        one, many = direct(path, 1, 10), direct(path, asked.slots, 10)
        command = [sys.executable, "-m", "tsotsallm", "serve", str(path), "--port", "0", "--slots", str(asked.slots),
                   "--queue", str(asked.queue)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as service:
            assert service.stdout is not None
            address = next(line.split()[1].rstrip("/") for line in service.stdout if line.startswith("open "))
            load = Load(address, asked.clients, asked.seconds)
            taken, memory = load.run(psutil.Process(service.pid))
            service.terminate()
        first, last = (statistics.median(size for at, size in memory if low <= at <= high)
                       for low, high in ((0, 10), (asked.seconds - 10, asked.seconds)))
        print(f"{asked.clients} clients, {taken:.0f} s: {load.answers} answers, {load.refusals} turned away (429), "
              f"{len(load.failures)} failures {load.failures[:3]}")
        print(f"seconds of an answer: median {statistics.median(load.latencies):.2f}, largest {max(load.latencies):.2f}")
        print(f"memory: {first / 1e6:.1f} MB in the first ten seconds, {last / 1e6:.1f} MB in the last: "
              f"{(last / first - 1):+.1%}")
        print(f"tokens a second: service {load.tokens / taken:.0f}; engine alone {many:.0f} with {asked.slots} at a time, "
              f"{one:.0f} with one")


if __name__ == "__main__":
    main()
