"""Compiles every CUDA kernel for every architecture, without a GPU, and holds it to a budget.

    python tests/static/cuda_budget.py              compile everything (minutes), compare with cuda_budget.json
    python tests/static/cuda_budget.py --quick      two architectures, check that the table is of these sources
    python tests/static/cuda_budget.py --update     compile everything and write the table

What ptxas says of each kernel (`-Xptxas -v`), and the rules:
    spill       bytes of registers stored to and loaded from memory        0
    stack       bytes of arrays that are not in registers                  0
    shared      bytes of static shared memory                              48 KiB
    registers   of a thread
Warnings are errors. sm_75 has no bf16 instructions, so bf16 kernels are not for it and have no row there.

A regression against the table fails too, under the nvcc that made the table: more than 8 registers more (the step in
which hardware hands them out), any more shared memory, a kernel that is not in the table. Under other versions of nvcc
only the rules count.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
TABLE = Path(__file__).with_suffix(".json")
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
ARCHS = (75, 80, 86, 89, 90, 100, 120)  # setup.py's
FLAGS = ["-O3", "-std=c++17", "-DNDEBUG", "-Icsrc", "-Werror", "all-warnings", "-Xptxas", "-v"]

ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def find_nvcc() -> str | None:
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    found = [shutil.which("nvcc", path=str(Path(home) / "bin")) for home in homes] + [shutil.which("nvcc")]
    return next(filter(None, found), None)


def readable(names: list[str]) -> list[str]:
    """ssd_chunk_scan_kernel<__half, 32> of the linker's name."""
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    # Without the parameters, the namespaces and the return type of a template.
    return [
        re.sub(r"^void |anima::|cuda::|\(anonymous namespace\)::|\([^()]*\)$", "", n) for n in done.stdout.split("\n")
    ]


def measure(source: Path, arch: int) -> dict[str, dict]:
    """Rows of one source for one architecture."""
    with tempfile.TemporaryDirectory(prefix="cuda_budget") as folder:
        target = f"-gencode=arch=compute_{arch},code=sm_{arch}"
        command = [find_nvcc(), *FLAGS, target, "-cubin", str(source.relative_to(ROOT)), "-o", f"{folder}/out.cubin"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    text = done.stdout + done.stderr
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{text[-8000:]}")
    found = list(ENTRY.finditer(text))
    rows = {}
    for name, match in zip(readable([m["name"] for m in found]), found, strict=True):
        if arch < 80 and "bfloat16" in name:
            continue
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        rows[f"sm_{arch} {name}"] = {
            "registers": int(match["registers"]),
            "spill": int(match["stores"]) + int(match["loads"]),
            "stack": int(match["stack"]),
            "shared": int(shared[1]) if shared else 0,
        }
    return rows


def measure_all(archs: tuple[int, ...], jobs: int) -> dict[str, dict]:
    todo = [(source, arch) for arch in archs for source in SOURCES]
    with ThreadPoolExecutor(jobs) as pool:
        parts = pool.map(lambda item: measure(*item), todo)
        return {key: row for part in parts for key, row in sorted(part.items())}


def broken_rules(row: dict) -> list[str]:
    broken = [f"{row[what]} bytes of {what}" for what in ("spill", "stack") if row[what]]
    return broken + ([f"{row['shared']} bytes of shared memory"] if row["shared"] > 48 * 1024 else [])


def regressions(row: dict, before: dict | None) -> list[str]:
    if before is None:
        return ["is not in the table"]
    worse = []
    if row["registers"] > before["registers"] + 8:
        worse.append(f"registers {before['registers']} -> {row['registers']}")
    if row["shared"] > before["shared"]:
        worse.append(f"shared memory {before['shared']} -> {row['shared']}")
    return worse


def version() -> str:
    text = subprocess.run([find_nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"V([\d.]+)", text)[1]


def fingerprint() -> str:
    """Of what the rows follow from, besides the version of nvcc."""
    files = [p for folder in ("cuda", "common") for p in sorted((ROOT / "csrc" / folder).iterdir())]
    return hashlib.sha256(repr(FLAGS).encode() + b"".join(p.read_bytes() for p in files)).hexdigest()[:16]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--update", action="store_true", help="write the table")
    parser.add_argument("--quick", action="store_true", help="two architectures")
    parser.add_argument("--jobs", type=int, default=2, help="compilations at a time (default 2)")
    args = parser.parse_args()
    if args.update and args.quick:
        parser.error("--update writes the whole table: not with --quick")

    made_by = {"nvcc": version(), "fingerprint": fingerprint()}
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {"rows": {}}
    archs = ARCHS
    if args.quick:
        # The compiler is a function: the table stands for what is not compiled, if it was made from these sources.
        # Turing takes paths of its own; of the others, the sources choose one.
        later = ARCHS[1:]
        archs = (75, later[int(made_by["fingerprint"], 16) % len(later)])
    rows = measure_all(archs, args.jobs)
    registers = max(row["registers"] for row in rows.values())
    print(f"{len(rows)} kernels for {', '.join(f'sm_{a}' for a in archs)}: at most {registers} registers")

    failures = [f"{key}: {problem}" for key, row in rows.items() for problem in broken_rules(row)]
    worse = []
    if table.get("nvcc") == made_by["nvcc"]:
        for key, row in rows.items():
            worse += [f"{key}: {problem}" for problem in regressions(row, table["rows"].get(key))]
        if table["fingerprint"] != made_by["fingerprint"]:
            worse.append("the table was made from other sources")
    print(*failures, *sorted(worse), sep="\n")

    if args.update:
        lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(row)}" for key, row in rows.items())
        TABLE.write_text(f'{json.dumps(made_by)[:-1]}, "rows": {{\n{lines}\n}}}}\n')
    elif worse:
        print("If it is meant: python tests/static/cuda_budget.py --update (minutes), and say why in the commit")
    return bool(failures or (worse and not args.update))


if __name__ == "__main__":
    sys.exit(main())
