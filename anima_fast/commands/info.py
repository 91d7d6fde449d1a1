"""`anima-fast info`: what is installed, what the machine has, and which backends that makes usable."""

from __future__ import annotations

import argparse
import json

from ..bench.machine import describe
from ..dispatch import backends, forced_backend

__all__ = ["run"]


def run(options: argparse.Namespace) -> int:
    """Exit code 1 if some op has no usable backend but its reference."""
    machine = describe()
    usable = backends()
    forced = forced_backend()
    if options.json:
        print(json.dumps({**machine, "backends": usable, "forced_backend": forced}, indent=2))
    else:
        commit = f" (commit {machine['commit']})" if machine["commit"] else ""
        extension = machine["extension"]
        if extension["usable"]:
            openmp = "with OpenMP" if extension["openmp"] else "without OpenMP: one thread"
            others = ", ".join(isa for isa in extension["isas"] if isa != extension["isa"])
            built = f"uses {extension['isa']}{f' (also built: {others})' if others else ''}, {openmp}"
        else:
            built = extension["reason"]
        print(f"anima_fast  {machine['anima_fast']}{commit}")
        print(f"torch       {machine['torch']}")
        print(f"triton      {machine['triton'] or 'not installed'}")
        print(f"python      {machine['python']}, {machine['os']}")
        print(f"cpu         {machine['cpu']}, {machine['cores']} cores, torch uses {machine['threads']} threads")
        print(f"extension   {built}")
        if extension["cuda"]:
            compiled = ", ".join(extension["cuda"]["archs"])
            print(f"cuda code   {compiled or 'none: ' + extension['cuda']['reason']}")
        if not machine["devices"]:
            print(f"cuda        no device{'' if machine['cuda'] else ' (this torch is built without CUDA)'}")
        for index, device in enumerate(machine["devices"]):
            memory = device["memory_bytes"] / 2**30
            print(f"cuda:{index}      {device['name']}, compute capability {device['capability']}, {memory:.0f} GiB")
        for op, reasons in usable.items():
            print(f"\n{op}: backends in order of preference")
            for name, reason in reasons.items():
                print(f"  {name:<10} {reason or 'usable'}")
        if forced:
            print(f"\nANIMA_FAST_BACKEND={forced} forces that backend for every call")
    served = all(any(r is None for n, r in reasons.items() if n != "reference") for reasons in usable.values())
    return 0 if served else 1
