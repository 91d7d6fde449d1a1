"""Compiles every shipped Triton configuration for every checked GPU, without a GPU, and holds it to a budget.

    python tests/static/triton_budget.py              compile everything, compare with triton_budget.json
    python tests/static/triton_budget.py --quick      compile a sample, check that the table is of this kernel
    python tests/static/triton_budget.py --update     compile everything and write the table

What is read from the machine code (SASS), and the rules:
    spill       bytes of stack (the kernel has no arrays, so all of it is spilled registers)     0
    shared      bytes of shared memory a program takes                                            what the card has
    mma         the tensor-core instruction: HMMA (mma.sync), HGMMA (wgmma), UTC*MMA (tcgen05)    some, unless fp32
    inner       instructions of the inner loop                                     at most 8 % more than `unbiased`
    unbiased    the same of the logit kernel without bias, order and skipping, in the same configuration
    registers   of a thread
The inner loop is the shortest stretch from the target of a backward branch to that branch that holds a tensor-core
instruction (fp32: 64 FFMAs): the loop over key tiles. The loop over segments around it is longer.

A regression against the table fails too, under the Triton that made the table: more than 8 registers more (the step in
which hardware hands them out), any more shared memory, another tensor-core instruction, an inner loop more than 2 %
longer. Under other versions of Triton only the rules above count.
"""

import argparse
import hashlib
import inspect
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"  # read when triton is imported

import torch
import triton
from anima_fast.kernels import regional_attention as kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TABLE = Path(__file__).with_suffix(".json")
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
UNBIASED = kernel.Variant(has_bias=False, has_order=False, has_lse=True)
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(\S+)(.*?);", re.MULTILINE)
TENSOR_CORE = re.compile(r"HMMA|HGMMA|UTC\w*MMA")


def name(item: kernel.Shipped) -> str:
    switches = "+".join(s.removeprefix("has_") for s, on in item.variant._asdict().items() if on) or "plain"
    return f"sm_{item.arch} {item.combine} {TYPES[item.dtype]} D{item.block_d} {switches}"


def compile_ahead(item: kernel.Shipped):
    """The compilation a launch of this item asks for, with aligned pointers and strides."""
    jit = kernel._regional_attention_kernel
    constants = kernel.constants(item.combine, item.dtype, item.block_d, item.variant, item.config)
    options = {key: constants.pop(key) for key in list(constants) if key not in jit.arg_names}
    pointer = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), f"*{TYPES[item.dtype]}")
    pointer |= dict.fromkeys(("lse_ptr", "bias_ptr"), "*fp32")
    pointer |= dict.fromkeys(("order_ptr", "segments_ptr", "plan_index_ptr"), "*i32")
    if not item.variant.has_lse:
        constants["lse_ptr"] = None
    signature, attributes = {}, {}
    for position, arg in enumerate(jit.arg_names):
        if arg in constants:
            signature[arg] = "constexpr"
        elif arg in pointer or arg.startswith("stride_"):
            signature[arg] = pointer.get(arg, "i64")
            attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[arg] = "fp32" if arg == "qk_scale" else "i32"
    source = ASTSource(jit, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", item.arch, 32), options=options)


def inner_loop(instructions: list[tuple[int, str, str]]) -> int:
    """How many instructions the inner loop has; see the top of the file."""
    lengths = []
    for address, opcode, operands in instructions:
        target = re.search(r"0x([0-9a-f]+)", operands)
        if opcode.startswith("BRA") and target and int(target[1], 16) < address:
            body = [op for a, op, _ in instructions if int(target[1], 16) <= a <= address]
            if any(map(TENSOR_CORE.match, body)) or sum(op.startswith("FFMA") for op in body) >= 64:
                lengths.append(len(body))
    return min(lengths)


def measure(item: kernel.Shipped) -> dict:
    compiled = compile_ahead(item)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [CUOBJDUMP, "-res-usage", "-sass", cubin.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    instructions = [(int(a, 16), opcode, operands) for a, opcode, operands in INSTRUCTION.findall(text)]
    tensor_core = {m[0] for _, opcode, _ in instructions if (m := TENSOR_CORE.match(opcode))}
    return {
        "registers": int(re.search(r"REG:(\d+)", text)[1]),
        "spill": int(re.search(r"STACK:(\d+)", text)[1]),
        "shared": compiled.metadata.shared,
        "mma": "+".join(sorted(tensor_core)) or None,
        "inner": inner_loop(instructions),
    }


def measure_all(items: list[kernel.Shipped], jobs: int) -> dict[str, dict]:
    """Rows of the table for these items, in their order."""
    baseline = {item: item._replace(combine="logit", variant=UNBIASED) for item in items}
    # What differs in nothing the compiler sees is compiled once.
    todo = list(dict.fromkeys([*items, *baseline.values()]))
    with (
        # Machine code of before must not stand in for what the compiler makes now.
        tempfile.TemporaryDirectory(prefix="triton_budget") as os.environ["TRITON_CACHE_DIR"],
        multiprocessing.get_context("spawn").Pool(jobs) as pool,
    ):
        done = dict(zip(todo, pool.imap(measure, todo, chunksize=4), strict=True))
    rows = {}
    for item in items:
        c = item.config
        tile = f"{c.block_m}x{c.block_n} w{c.num_warps} s{c.num_stages}"
        rows[name(item)] = {"config": tile, **done[item], "unbiased": done[baseline[item]]["inner"]}
    return rows


def broken_rules(key: str, row: dict) -> list[str]:
    arch = int(re.match(r"sm_(\d+)", key)[1])
    broken = []
    if row["spill"]:
        broken.append(f"spills {row['spill']} bytes")
    if row["shared"] > SHARED_KIB[arch] * 1024:
        broken.append(f"takes {row['shared']} bytes of shared memory, the card has {SHARED_KIB[arch]} KiB")
    if row["mma"] is None and "fp32" not in key:
        broken.append("uses no tensor cores")
    if row["inner"] > 1.08 * row["unbiased"]:
        broken.append(f"inner loop of {row['inner']} instructions, {row['unbiased']} without bias")
    return broken


def regressions(row: dict, before: dict) -> list[str]:
    worse = []
    if row["registers"] > before["registers"] + 8:
        worse.append(f"registers {before['registers']} -> {row['registers']}")
    if row["shared"] > before["shared"]:
        worse.append(f"shared memory {before['shared']} -> {row['shared']}")
    if row["mma"] != before["mma"]:
        worse.append(f"tensor cores {before['mma']} -> {row['mma']}")
    if row["inner"] > 1.02 * before["inner"]:
        worse.append(f"inner loop {before['inner']} -> {row['inner']}")
    return worse


def fingerprint(items: list[kernel.Shipped]) -> str:
    """Of what the rows follow from, besides the version of Triton."""
    reading = map(inspect.getsource, (compile_ahead, inner_loop, measure, measure_all))
    text = "".join([kernel._regional_attention_kernel.src, repr(items), *reading])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def summary(rows: dict[str, dict]) -> str:
    biased = [row["inner"] / row["unbiased"] - 1 for key, row in rows.items() if "bias" in key]
    return (
        f"{len(rows)} compilations: at most {max(row['registers'] for row in rows.values())} registers, "
        f"{max(row['spill'] for row in rows.values())} bytes spilled, "
        f"{max(row['shared'] for row in rows.values()) / 1024:.0f} KiB of shared memory; "
        f"the bias lengthens the inner loop by {100 * max(biased):.1f} % at most"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--update", action="store_true", help="write the table")
    parser.add_argument("--quick", action="store_true", help="a sample, where that is enough")
    parser.add_argument("--jobs", type=int, default=2, help="compilations at a time (default 2)")
    parser.add_argument("--only", default="", help="a regular expression over names such as 'sm_90 blend bf16 D128'")
    args = parser.parse_args()
    if args.update and (args.quick or args.only):
        parser.error("--update writes the whole table: not with --quick or --only")

    items = list(kernel.shipped())
    made_by = {"triton": triton.__version__, "fingerprint": fingerprint(items)}
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {"rows": {}}
    if args.quick:
        # The compiler is a function: the table stands for what is not compiled, if it was made from this kernel.
        largest = [kernel.VARIANTS[combine][0] for combine in kernel.COMBINES]
        items = [i for i in items if i.variant in largest and i.block_d >= 64 and i.dtype == torch.bfloat16]
    items = [item for item in items if re.search(args.only, name(item))]
    rows = measure_all(items, args.jobs)
    print(summary(rows))

    failures = [f"{key}: {problem}" for key, row in rows.items() for problem in broken_rules(key, row)]
    worse = []
    if table.get("triton") == triton.__version__:
        for key in rows.keys() & table["rows"].keys():
            worse += [f"{key}: {problem}" for problem in regressions(rows[key], table["rows"][key])]
        if table["fingerprint"] != made_by["fingerprint"]:
            worse.append("the table was made from another kernel")
    print(*failures, *sorted(worse), sep="\n")

    if args.update:
        lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(row)}" for key, row in rows.items())
        head = json.dumps(made_by)[:-1]
        TABLE.write_text(f'{head}, "rows": {{\n{lines}\n}}}}\n')
    elif worse:
        print("If it is meant: python tests/static/triton_budget.py --update (minutes), and say why in the commit")
    return bool(failures or (worse and not args.update))


if __name__ == "__main__":
    sys.exit(main())
