"""Pictures a second of `anima-fast batch` by the number of its workers, each round in a shuffled order.

    python benchmarks/batch.py                           a tiny random Anima (tests/tiny_pipeline.py)
    python benchmarks/batch.py --model DIR --jobs 200 --workers 1 2 --rounds 5 --json F

Two rates: of the whole command, start-up included, and of the time in which every worker has work, from when the last
of them has finished its first batch to when the first has finished its last. The same jobs each time, and the pictures
are compared: equal bit for bit, or the run is no measurement.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

from anima_fast.bench.machine import describe
from anima_fast.commands.regions import parse_size
from anima_fast.files import write_atomic
from anima_fast.runner import journal

_COLOURS = ("red", "green", "blue", "yellow")
_THINGS = ("cat", "house", "tree", "circle", "square", "triangle")


def write_jobs(folder: Path, options: argparse.Namespace) -> None:
    """A third of the jobs has no region, a third one, a third two."""
    width, height = parse_size(options.size)
    for name, start in (("left", 0), ("right", width // 2)):
        mask = Image.new("L", (width, height), 0)
        mask.paste(255, (start, 0, start + width // 2, height))
        mask.save(folder / f"{name}.png")
    chance = random.Random(0)

    def prompt() -> str:
        return f"{chance.choice(_COLOURS)} {chance.choice(_THINGS)}"

    with open(folder / "jobs.jsonl", "w", encoding="utf-8") as file:
        for i in range(options.jobs):
            regions = [{"mask": f"{name}.png", "prompt": prompt()} for name in ("left", "right")[: i % 3]]
            job = {"id": f"job{i}", "prompt": prompt(), "seed": i, "regions": regions}
            file.write(json.dumps({**job, "size": options.size, "steps": options.steps}) + "\n")


def measure(folder: Path, model: str, workers: int, options: argparse.Namespace) -> dict:
    """One run into an empty directory, which is left for `pictures`."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    code = "import sys; from anima_fast.cli import main; sys.exit(main(sys.argv[1:]))"
    command = ["batch", f"{folder}/jobs.jsonl", "--out", str(out), "--model", model, "--engine", options.engine]
    command += ["--workers", str(workers), "--threads", str(options.threads), "--batch-size", str(options.batch_size)]
    command += ["--device", options.device, "--json"]
    begun, started = time.time(), time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True)
    seconds = time.perf_counter() - started
    if done.returncode:
        sys.exit(f"batch ended with status {done.returncode}: {done.stderr or done.stdout}")
    events = journal.read(out)
    of_worker: dict[str, list[dict]] = {}
    for event in events:
        if event["event"] == "done":
            of_worker.setdefault(event["worker"], []).append(event)
    if len(of_worker) != workers:
        sys.exit(f"{len(of_worker)} of {workers} workers had work: more --jobs are needed")
    firsts = [times[times[0]["rows"] - 1]["time"] for times in of_worker.values()]
    full_from, full_to = max(firsts), min(times[-1]["time"] for times in of_worker.values())
    full = sum(full_from < event["time"] <= full_to for times in of_worker.values() for event in times)
    batch_seconds = statistics.median(e["seconds"] * e["rows"] for times in of_worker.values() for e in times)
    ready = [first - events[0]["time"] - batch_seconds for first in firsts]
    return {
        "workers": workers,
        "seconds": round(seconds, 3),
        "jobs_per_second": round(options.jobs / seconds, 3),
        "jobs_per_second_full": round(full / (full_to - full_from), 3) if full else None,
        "full_seconds": round(max(0.0, full_to - full_from), 3),
        "command_start_seconds": round(events[0]["time"] - begun, 3),
        "worker_start_seconds": [round(value, 3) for value in ready],
        "batch_seconds": round(batch_seconds, 4),
    }


def pictures(folder: Path) -> str:
    """One sum of all of them."""
    found = hashlib.sha256()
    for path in sorted((folder / "out").glob("*.png")):
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()


def writing(folder: Path, count: int = 200) -> dict:
    """What the main process does for a picture: the file and its line in the journal, both flushed to the disk."""
    data = [path.read_bytes() for path in sorted((folder / "out").glob("*.png"))]
    place = folder / "writing"
    place.mkdir()
    times = []
    with journal.Journal(place) as log:
        for i in range(count):
            started = time.perf_counter()
            write_atomic(place / f"{i}.png", data[i % len(data)])
            log.add("done", id=str(i), digest="0" * 16, file=f"{i}.png", bytes=0, line=i, seconds=0.0, rows=4)
            times.append(time.perf_counter() - started)
    size = round(statistics.mean(map(len, data)))
    return {"picture_bytes": size, "median_seconds": statistics.median(times), "largest_seconds": max(times)}


def summarise(rows: list[dict]) -> list[dict]:
    found = []
    for workers in sorted({row["workers"] for row in rows}):
        own = [row for row in rows if row["workers"] == workers]
        summary: dict = {"workers": workers, "rounds": len(own)}
        for name in ("seconds", "jobs_per_second", "jobs_per_second_full", "command_start_seconds", "batch_seconds"):
            values = [row[name] for row in own if row[name] is not None]
            summary[name] = round(statistics.median(values), 4) if values else None
        starts = [value for row in own for value in row["worker_start_seconds"]]
        summary["worker_start_seconds"] = round(statistics.median(starts), 3)
        for name in ("jobs_per_second", "jobs_per_second_full"):
            first = found[0][name] if found else summary[name]
            summary[f"times_{name}"] = round(summary[name] / first, 3) if first and summary[name] else None
        found.append(summary)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="default: a tiny random one")
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--size", default="128x128")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--threads", type=int, default=1, help="of each worker")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--engine", choices=("local", "ray"), default="local")
    parser.add_argument("--json", metavar="F")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = options.model
        if model is None:
            sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
            import tiny_pipeline

            model = f"{name}/model"
            tiny_pipeline.save(model)
        write_jobs(folder, options)
        chance = random.Random(1)
        sums = set()
        for number in range(options.rounds):
            for workers in chance.sample(options.workers, len(options.workers)):
                row = {"round": number, **measure(folder, model, workers, options)}
                print(json.dumps(row), flush=True)
                rows.append(row)
                sums.add(pictures(folder))
        if len(sums) != 1:
            sys.exit("the pictures are not the same in every run")
        found = {
            "machine": describe(),
            "settings": vars(options),
            "writing": writing(folder),
            "rows": rows,
            "summary": summarise(rows),
        }
    print(json.dumps({"writing": found["writing"], "summary": found["summary"]}, indent=1))
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
