"""How much sooner a study ends with two single-threaded workers than with one, on this computer.

    python benchmarks/several_workers.py [--workers 1,2] [--study quick] [--model MODEL]

Scheduler and workers are processes of their own; each number of workers gets new ones, with nothing kept from before. The
ledgers must hold the same models, bit for bit.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.cluster.computers import computers
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.cluster.client import Cluster
from tsotsallm.study.spec import read_spec
from tsotsallm.study.study import run_study
from tsotsallm.study.workers import OnCluster


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", default="1,2", type=lambda text: [int(one) for one in text.split(",")])
    parser.add_argument("--study", default="quick")
    parser.add_argument("--model", default="embedded")
    asked = parser.parse_args()
    spec = read_spec(asked.study, layers=Checkpoint.open(asked.model).spec.layers)
    seconds: dict[int, float] = {}
    hashes = {}
    for count in asked.workers:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            os.environ["TSOTSALLM_CACHE"] = str(folder / "cache")
            with computers(folder, count, spaces=False) as cluster:
                for number in range(count):
                    cluster.start(f"worker{number}")
                client = Cluster(cluster.address)
                while len(client.workers) < count:
                    time.sleep(0.1)
                began = time.monotonic()
                found = run_study(spec, asked.model, folder / "study", OnCluster(client))
                seconds[count] = time.monotonic() - began
                hashes[count] = {trial.key: trial.facts["hashes"] for trial in found.trials}
                client.close()
        print(f"{count} worker{'s' * (count > 1)}: {len(found.trials)} trials in {seconds[count]:.1f} s, "
              f"{seconds[asked.workers[0]] / seconds[count]:.2f} times as fast as with {asked.workers[0]}", flush=True)
    print("the same models:", all(one == hashes[asked.workers[0]] for one in hashes.values()))


if __name__ == "__main__":
    main()
