"""Damage to files, by a seeded generator: bytes, values of JSON and YAML, headers of safetensors and GGUF, cells,
statements, templates, and things that are no files at all."""

from __future__ import annotations

import os
import random
import socket
from pathlib import Path

from tests.fuzz.binaries import GGUF, SAFETENSORS
from tests.fuzz.plain import BYTES, Damage, Impossible, Way, insert
from tests.fuzz.texts import BY_FORM

FORMS: dict[str, tuple[Way, ...]] = BY_FORM | {"safetensors": SAFETENSORS, "gguf": GGUF}


def damage(path: Path, form: str, outside: Path, rng: random.Random) -> Damage:
    """Damage one file of a form in place: mostly in one way, sometimes in several."""
    done = Damage()
    if rng.random() < 0.07:
        return _other_thing(path, outside, rng, done)
    if rng.random() < 0.02:
        path.unlink()
        done.steps.append("deleted")
        return done
    for _ in range(rng.choice((1, 1, 1, 1, 2, 3))):
        content, done.refused = path.read_bytes(), False    # a later step may undo an earlier one
        ways = FORMS.get(form, ())
        way = rng.choice(ways) if ways and rng.random() < 0.75 else rng.choice(BYTES)
        try:
            changed = way(content, rng, done)
        except Impossible:                                 # an earlier step left nothing that this one understands
            changed = insert(content, rng, done)
        path.write_bytes(changed)
    return done


def _other_thing(path: Path, outside: Path, rng: random.Random, done: Damage) -> Damage:
    """Put something in place of a file that is none, or is somebody else's."""
    targets = {"a link to /dev/zero": "/dev/zero", "a link to /dev/urandom": "/dev/urandom",
               "a link to /dev/null": "/dev/null",
               "a link to /proc/kmsg": "/proc/kmsg", "a link to /proc/self/mem": "/proc/self/mem",
               "a link to /dev/tty": "/dev/tty", "a dangling link": "nowhere/at/all", "a link to itself": path.name,
               "a link to a file outside": str(outside), "a link to a folder": str(outside.parent)}
    kind = rng.choice(("a directory", "a FIFO", "a socket", "an empty file", "a file without permissions", *targets))
    content = path.read_bytes()
    path.unlink()
    if kind == "a directory":
        path.mkdir()
    elif kind == "a FIFO":
        os.mkfifo(path)
    elif kind == "a socket":
        here = os.getcwd()
        os.chdir(path.parent)                               # a socket's address is short
        try:
            with socket.socket(socket.AF_UNIX) as one:
                one.bind(path.name)
        finally:
            os.chdir(here)
    elif kind == "an empty file":
        path.write_bytes(b"")
    elif kind == "a file without permissions":
        path.write_bytes(content)
        path.chmod(0)
    else:
        path.symlink_to(targets[kind])
    done.steps.append(kind)
    return done
