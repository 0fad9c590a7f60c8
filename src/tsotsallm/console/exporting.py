"""What was exported, on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass


def print_export(found: dict[str, Any]) -> None:
    """What was written, what it weighs, what its reader should know."""
    from tsotsallm.units import human_bytes

    for name in ("gguf", "adapter", "modelfile", "hf"):
        if found.get(name):
            size = f" ({human_bytes(found['bytes'])})" if name == "gguf" else ""
            print(f"{found[name]}{size}")
    if found.get("bytes_by_type"):
        print("weights: " + ", ".join(f"{human_bytes(size)} {kind}" for kind, size in found["bytes_by_type"].items()))
    if verified := found.get("verified"):
        cut = (f"cuts {verified['different']} of {verified['texts']} texts otherwise, as accepted "
               f"({', '.join(verified['examples'])})"
               if verified["different"] else f"cuts {verified['texts']} texts into the same tokens")
        print(f"llama.cpp {cut}, ends answers at the same tokens, and its log-probabilities of {verified['tokens']} "
              "tokens differ by "
              f"{verified['mean']:.2g} nats on average ({verified['largest']:.2g} at most; {verified['bound']:g} allowed)")
    for note in found["notes"]:
        print(f"note: {note}")


def print_push(found: dict[str, Any]) -> None:
    """What was, or would be, uploaded."""
    from tsotsallm.units import human_bytes

    for name, size in found["files"].items():
        print(f"{human_bytes(size):>10}  {name}")
    where = f"{found['repository']} ({'public' if found['public'] else 'private'})"
    print(f"uploaded to {where}" if found["uploaded"] else f"nothing was sent; with --upload this goes to {where}")
