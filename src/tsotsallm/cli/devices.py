"""tsotsallm devices: what a model can be fitted to."""

from __future__ import annotations

from tsotsallm.cli.common import AsJson, answers, print_json


def devices(as_json: AsJson = False) -> None:
    """List target devices and the memory they have for a model."""
    with answers(as_json):
        from tsotsallm.cli.lines import table
        from tsotsallm.evaluation import cost
        from tsotsallm.units import human_bytes

        known = cost.devices_here()
        if as_json:
            print_json(known)
            return
        table("Devices", ["device", "for weights and cache", "about", "source"],
              [[name, human_bytes(facts["weight_bytes"]), facts["about"], facts["source"]]
               for name, facts in known.items()])
