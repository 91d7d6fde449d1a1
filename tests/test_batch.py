"""`anima-fast batch` on a tiny random Anima: what comes out, and that nothing is lost or painted twice."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import http.server
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers", "0.42", reason="needs diffusers >= 0.42: pip install 'anima-fast[diffusers]'")
pytest.importorskip("transformers", reason="needs transformers: pip install 'anima-fast[diffusers]'")
pytest.importorskip("accelerate", reason="needs accelerate: diffusers loads Anima's transformer with it")

import numpy as np
import tiny_encoder
import tiny_pipeline
from PIL import Image
from test_cli import refused, run

from anima_fast.commands import batch as command
from anima_fast.runner import batch, journal, workers
from anima_fast.runner.jobs import Batch, Job, digest, group, read_jobs
from anima_fast.runner.request import Request, read_record

pytestmark = pytest.mark.usefixtures("one_thread")

POSIX = pytest.mark.skipif(sys.platform == "win32", reason="signals")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, box in (("left.png", (0, 0, 50, 64)), ("right.png", (50, 0, 96, 64))):
        image = Image.new("L", (96, 64), 0)
        image.paste(255, box)
        image.save(name)
    return tmp_path


LEFT, RIGHT = {"mask": "left.png", "prompt": "a red house"}, {"mask": "right.png", "prompt": "a tree", "strength": 0.8}
SMALL = {"size": "96x64", "steps": 2}


def some_jobs(count=6):
    """Of two shapes, with no, one or two regions, and prompts of many lengths."""
    words = ["cat", "a red house", "", "green tree, left " * 3, "right"]
    return [
        {
            **SMALL,
            "id": f"job{i}",
            "prompt": words[i % 5],
            "negative": words[i % 3],
            "seed": i,
            "size": [64, 64] if i % 6 == 5 else [96, 64],
            "regions": [LEFT, RIGHT][: i % 3],
        }
        for i in range(count)
    ]


def write(jobs, name="jobs.jsonl"):
    Path(name).write_text("".join(f"{json.dumps(job)}\n" if isinstance(job, dict) else f"{job}\n" for job in jobs))


def paint(capsys, model, *options, out="out"):
    """Exit code and report of a run in this process."""
    workers = () if "--workers" in options else ("--workers", 0)
    code, text, err = run(capsys, "batch", "jobs.jsonl", "--out", out, "--model", model, "--json", *workers, *options)
    return code, json.loads(text), err


def events(kind, out="out"):
    return [event for event in journal.read(Path(out)) if event["event"] == kind]


def pixels(path):
    return np.array(Image.open(path)).astype(int)


def test_every_picture_is_that_of_generate(capsys, folder, model):
    jobs = some_jobs()
    write(jobs)
    code, report, err = paint(capsys, model)
    assert (code, err) == (0, "") and report["painted"] == 6 and report["bad"] == []
    assert {event["rows"] for event in events("done")} == {5 - 1, 1}  # five of one shape in batches of four
    assert paint(capsys, model, "--batch-size", 1, out="single")[0] == 0
    for job in jobs:
        options = ["--prompt", job["prompt"], "--negative", job["negative"], "--seed", job["seed"], "--steps", 2]
        options += ["--size", "{}x{}".format(*job["size"]), "--dtype", "fp32"]
        for region in job["regions"]:
            options += ["--region", f"{region['mask']}={region['prompt']}"]
        if job["regions"]:
            options += ["--region-strength", *[region.get("strength", 1) for region in job["regions"]]]
        assert run(capsys, "generate", "--model", model, *options, "--out", "alone.png")[0] == 0
        name = f"{job['id']}.png"
        assert Path("single", name).read_bytes() == Path("alone.png").read_bytes()
        difference = np.abs(pixels(Path("out", name)) - pixels("alone.png"))
        assert difference.max() <= 1  # other rows beside it change the rounding, no more
        assert digest(read_record(str(Path("out", name)))) == digest(read_record("alone.png"))


def test_large_pictures_and_chunks(capsys, folder, model):
    """They are those of `generate`, and large ones do not share a launch, whatever they are given to."""
    large = {**SMALL, "prompt": "cat", "regions": [LEFT, RIGHT], "hires": 1.5, "tiled": True, "tile": 96, "overlap": 32}
    chunk = {**SMALL, "prompt": "tree", "attention_chunk": 7}
    write([{**(large if name in "ab" else chunk), "id": name, "seed": i} for i, name in enumerate("abcd")])
    code, report, _ = paint(capsys, model)
    assert code == 0, report
    assert [event["rows"] for event in events("done")] == [1, 1, 2, 2]
    for name in "abcd":
        assert run(capsys, "generate", "--like", f"out/{name}.png", "--out", "alone.png")[0] == 0
        difference = np.abs(pixels(f"out/{name}.png") - pixels("alone.png"))
        assert difference.max() <= (0 if name in "ab" else 1)
    assert pixels("out/a.png").shape == (96, 144, 3)
    pipe = tiny_pipeline.build()
    together = batch.paint(pipe, [read_record(f"out/{name}.png") for name in "ab"])
    for name, image in zip("ab", together, strict=True):
        assert np.abs(np.array(image).astype(int) - pixels(f"out/{name}.png")).max() <= 1


def test_a_picture_to_start_from(capsys, folder, model):
    """Without a size it is that of the image, as its camera held it."""
    turned = Image.new("RGB", (70, 100), "red")
    exif = turned.getexif()
    exif[0x0112] = 6  # a quarter turn
    turned.save("photo.jpg", exif=exif)
    job = {"prompt": "cat", "image": "photo.jpg", "strength": 0.5, "steps": 4}
    write([{**job, "id": "a"}, {**job, "id": "b", "size": "64x64"}, {**job, "id": "c", "seed": 1}])
    assert paint(capsys, model)[0] == 0
    assert [pixels(f"out/{name}.png").shape[:2] for name in "abc"] == [(64, 96), (64, 64), (64, 96)]
    options = ["--prompt", "cat", "--image", "photo.jpg", "--strength", 0.5, "--steps", 4, "--seed", 0]
    assert run(capsys, "generate", "--model", model, *options, "--device", "cpu", "--out", "alone.png")[0] == 0
    assert np.abs(pixels("out/a.png") - pixels("alone.png")).max() <= 1


def test_another_encoder(capsys, folder, model):
    """Jobs with it are painted as `generate` does; one of another width is refused, and the rest goes on."""
    for name, width in (("fits", 32), ("narrow", 24)):
        Path(name).mkdir()
        tiny_encoder.save(Path(name, "enc.safetensors"), dataclasses.replace(tiny_encoder.CONFIG, head_size=width))
    job = {**SMALL, "prompt": "a red cat", "regions": [LEFT]}
    fits, narrow = ({"file": f"{name}/enc.safetensors", "recurrence": "mamba2"} for name in ("fits", "narrow"))
    write([{**job, "id": "a"}, {**job, "id": "b", "encoder": fits}, {**job, "id": "c", "encoder": narrow}])
    code, report, _ = paint(capsys, model)
    assert (code, report["painted"], report["failed"]) == (1, 2, 1)
    reason = "encoder: got an encoder of 24 dimensions; allowed: 32, the model's"
    assert (report["bad"][0]["id"], report["bad"][0]["reason"]) == ("c", reason)
    assert (pixels("out/a.png") != pixels("out/b.png")).any()
    assert read_record("out/b.png").encoder.sums.keys() == {fits["file"]}
    code, _, err = run(capsys, "generate", "--like", "out/b.png", "--out", "alone.png")
    assert (code, err) == (0, "") and Path("alone.png").read_bytes() == Path("out/b.png").read_bytes()


def test_seeds_and_names(capsys, folder, model):
    write([{**SMALL, "prompt": "cat", "seeds": [3, 1], "id": "cat"}, {**SMALL, "prompt": "cat", "seed": 2}])
    assert paint(capsys, model)[0] == 0
    names = {path.stem for path in Path("out").glob("*.png")}
    assert names >= {"cat-3", "cat-1"} and len(names) == 3
    assert [read_record(f"out/cat-{seed}.png").seed for seed in (3, 1)] == [3, 1]


def test_it_goes_on_where_it_stopped(capsys, folder, model, monkeypatch):
    """After any loss: of pictures, of the journal, of half its last line. What is there is not painted again."""
    write(some_jobs())
    paint(capsys, model)
    whole = {path.name: path.read_bytes() for path in Path("out").glob("*.png")}
    painted = []

    def watched(pipe, requests):
        painted.append([request.seed for request in requests])
        return paint_rows(pipe, requests)

    paint_rows = batch.paint
    monkeypatch.setattr(batch, "paint", watched)
    assert paint(capsys, model)[1]["before"] == 6 and painted == []

    log = Path("out", journal.NAME)
    log.write_bytes(log.read_bytes() + b'{"event": "done", "id"')
    Path("out/job1.png").unlink()
    Path("out/.job1.png.abc").write_bytes(b"half")
    code, report, _ = paint(capsys, model)
    assert (code, report["painted"], report["before"]) == (0, 1, 5)
    assert painted == [[0, 1, 2, 3]]  # in the batch that it was in before, so that it is the same
    assert not Path("out/.job1.png.abc").exists()

    log.unlink()
    assert paint(capsys, model)[1]["before"] == 6 and len(painted) == 1
    assert all(event["recovered"] for event in events("done")) and len(events("done")) == 6
    assert {path.name: path.read_bytes() for path in Path("out").glob("*.png")} == whole

    write(some_jobs(9))
    assert paint(capsys, model)[1]["painted"] == 3


def test_another_picture_is_not_overwritten(capsys, folder, model):
    write([{**SMALL, "prompt": "cat", "id": "a"}, {**SMALL, "prompt": "tree", "id": "b"}])
    Path("out").mkdir()
    Image.new("RGB", (8, 8)).save("out/a.png")
    before = Path("out/a.png").read_bytes()
    code, report, _ = paint(capsys, model)
    assert code == 1 and (report["painted"], report["failed"]) == (1, 1)
    assert "a.png is there and is the picture of another request" in report["bad"][0]["reason"]
    assert Path("out/a.png").read_bytes() == before
    write([{**SMALL, "prompt": "house", "id": "b"}])
    assert "of another request" in paint(capsys, model)[1]["bad"][0]["reason"]


BAD = {
    "{": "no JSON: Expecting property name",
    "[]": "the line: got list; allowed: a JSON object",
    '{"seed": 1}': "prompt: got nothing",
    '{"prompt": 1}': "prompt: got 1; allowed: a string",
    '{"prompt": "a", "steps": "many"}': 'steps: got "many"; allowed: a whole number',
    '{"prompt": "a", "steps": true}': "steps: got true",
    '{"prompt": "a", "steps": 0}': "steps: got 0",
    '{"prompt": "a", "guidance": "4"}': 'guidance: got "4"; allowed: a number',
    '{"prompt": "a", "colour": 1}': "colour: an unknown field; allowed: prompt, negative,",
    '{"prompt": "a", "size": "100x64"}': "size: got 100x64; allowed: multiples of 16",
    '{"prompt": "a", "size": [64]}': "size: got [64]",
    '{"prompt": "a", "size": "big"}': "size: got 'big'",
    '{"prompt": "a", "id": "../a"}': "id: got '../a'",
    '{"prompt": "a", "seeds": []}': "seeds: got []",
    '{"prompt": "a", "seed": 1, "seeds": [1]}': "seed, seeds: got both",
    '{"prompt": "a", "outside": "none"}': "outside: got 'none'; allowed: all | base",
    '{"prompt": "a", "plan": {"mode": "medium"}}': "plan: mode: got 'medium'",
    '{"prompt": "a", "regions": [1]}': "regions[0]: got int",
    '{"prompt": "a", "regions": [{"mask": "left.png"}]}': "regions[0].prompt: got nothing",
    '{"prompt": "a", "regions": [{"mask": "no.png", "prompt": "b"}]}': "regions[0].mask: no file 'no.png'",
    '{"prompt": "a", "regions": [{"mask": "jobs.jsonl", "prompt": "b"}]}': "which cannot be read",
    '{"prompt": "a", "image": "no.png"}': "image: no file 'no.png'",
    '{"prompt": "a", "image": "jobs.jsonl"}': "image: got 'jobs.jsonl', which cannot be read",
    '{"prompt": "a", "image": "a--b.png"}': "image: no file 'a--b.png'",
    '{"prompt": "a", "attention_chunk": 0}': "attention-chunk: got 0",
    '{"prompt": "a", "encoder": {"files": "x"}}': "encoder.files: an unknown field; allowed: file, recurrence,",
    '{"prompt": "a", "encoder": {}}': "encoder.file: got nothing",
    '{"prompt": "a", "encoder": {"file": 5}}': "encoder.file: got 5; allowed: a string",
    '{"prompt": "a", "encoder": {"file": "no.safetensors"}}': "encoder.file: no file 'no.safetensors'",
    '{"prompt": "a", "encoder": {"file": "left.png", "recurrence": "x"}}': "recurrence: got 'x'; allowed: gdn | mamba2",
    '{"prompt": "a", "model": "./nowhere"}': "model: no directory './nowhere'",
    '{"prompt": "good twice", "id": "GOOD"}': "id: 'GOOD' is that of line 1 too",
}


def test_bad_jobs_are_recorded_and_the_rest_goes_on(capsys, folder, model):
    write([{**SMALL, "prompt": "cat", "id": "good"}, "", *BAD])
    code, out, err = run(capsys, "batch", "jobs.jsonl", "--out", "out", "--model", model, "--dry-run")
    assert code == 1 and out.startswith(f"{len(BAD) + 1} pictures: 0 there already, 1 to paint, {len(BAD)} bad\n")
    assert "line 3: no JSON" in err and err.endswith(f"and {len(BAD) - 10} more\n")
    assert not Path("out").exists()
    code, report, _ = paint(capsys, model)
    assert code == 1 and (report["jobs"], report["painted"], report["failed"]) == (len(BAD) + 1, 1, len(BAD))
    for recorded in (report["bad"], events("failed")):
        assert [wrong["line"] for wrong in recorded] == list(range(3, len(BAD) + 3))
        for wrong, message in zip(recorded, BAD.values(), strict=True):
            assert message in wrong["reason"]


def test_dry_run(capsys, folder, model):
    write(some_jobs(8))
    code, out, _ = run(capsys, "batch", "jobs.jsonl", "--out", "out", "--model", model, "--dry-run", "--json")
    report = json.loads(out)
    assert code == 0 and report["left"] == 8 and not Path("out").exists()
    assert [(g["size"], g["jobs"], g["batches"]) for g in report["groups"]] == [("96x64", 7, 2), ("64x64", 1, 1)]


def test_groups(folder):
    Image.new("RGB", (64, 64)).save("photo.png")
    changes = [
        {},
        {"seed": 4, "negative": "x", "regions": [LEFT]},
        {"steps": 3},
        {"guidance": 1.0},
        {"plan": {"eps": 0.1}},
    ]
    changes += [{"model": "other"}, {"image": "photo.png"}, {"dtype": "bf16"}, {"end": 0.5}, {}]
    changes += [{"hires": 2}] * 2
    write([{**SMALL, "prompt": "cat", "id": str(i), **change} for i, change in enumerate(changes)])
    jobs, bad = read_jobs("jobs.jsonl")
    assert bad == [] and jobs[0].digest == jobs[9].digest
    found = [[job.id for job in of.jobs] for of in group(jobs, 8)]
    assert found == [["0", "1", "9"], ["2"], ["3"], ["4"], ["6"], ["8"], ["10"], ["11"], ["5"], ["7"]]


def test_one_bad_row(capsys, folder, model, monkeypatch):
    """What fails in a batch fails alone."""

    def picky(pipe, requests):
        if any(request.prompt == "right" for request in requests):
            raise torch.OutOfMemoryError("too large")
        return paint_rows(pipe, requests)

    paint_rows = batch.paint
    monkeypatch.setattr(batch, "paint", picky)
    write(some_jobs())
    code, report, _ = paint(capsys, model)
    assert code == 1 and report["painted"] == 5
    assert [(wrong["id"], wrong["reason"]) for wrong in report["bad"]] == [("job4", "OutOfMemoryError: too large")]


def test_nan_is_of_its_row():
    """The model gives NaN in one row: the other pictures of the batch are there."""
    pipe = tiny_pipeline.build()
    requests = [Request(prompt, size=(64, 64), steps=1) for prompt in ("cat", "tree")]
    decode = pipe.vae.decode
    pipe.vae.decode = lambda z, **k: (torch.cat([decode(z[:1], **k)[0], decode(z[1:], **k)[0] * torch.nan]),)
    good, reason = batch.paint(pipe, requests)
    assert good.size == (64, 64) and reason == "the model gave NaN in fp32"


def test_a_model_that_cannot_be_loaded(capsys, folder, model):
    Path("broken").mkdir()
    Path("broken/modular_model_index.json").write_text('{"_class_name": "AnimaModularPipeline"}')
    write([{**SMALL, "prompt": "cat", "id": "a"}, {**SMALL, "prompt": "cat", "id": "b", "model": "broken"}])
    code, report, _ = paint(capsys, model)
    assert code == 1 and report["painted"] == 1 and report["bad"][0]["id"] == "b"
    assert "model: got 'broken', whose" in report["bad"][0]["reason"]


@pytest.mark.parametrize(
    ("code", "processes", "message"),
    [
        (errno.ENOSPC, 1, "the disk is full, with 4 pictures to paint; the pictures so far are whole; the same"),
        (errno.EDQUOT, 0, "the disk quota is used up, with 4"),
        (errno.EROFS, 0, "cannot be written to (the file system is read-only); the pictures so far"),
        (errno.EIO, 0, "cannot be written to (the disk reports an error); the pictures so far"),
    ],
)
def test_the_disk_is_full(capsys, folder, model, monkeypatch, code, processes, message):
    def full(path, data):
        if path.name == "job2.png":
            raise OSError(code, os.strerror(code))
        write_atomic(path, data)

    write(some_jobs())
    write_atomic = command.write_atomic
    monkeypatch.setattr(command, "write_atomic", full)
    options = ["--model", model, "--workers", processes, "--threads", 1]
    assert message in refused(capsys, "batch", "jobs.jsonl", "--out", "out", *options)
    assert not multiprocessing.active_children()
    monkeypatch.undo()
    os.chdir(folder)
    assert paint(capsys, model)[1]["before"] == 2
    assert Counter(event["id"] for event in events("done")) == {f"job{i}": 1 for i in range(6)}


@POSIX
def test_the_system_stops_a_line_in_its_middle(capsys, folder, model):
    """A limit of the kernel's, as a full disk would: the journal's line of the first picture is written in half."""
    import resource

    write(some_jobs(3))
    Path("out").mkdir()
    limit = 100_000
    log = Path("out", journal.NAME)
    log.write_text(json.dumps({"event": "note", "text": "x" * (limit - 300)}) + "\n")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        message = refused(capsys, "batch", "jobs.jsonl", "--out", "out", "--model", model, "--workers", 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "a file is too big, with 3 pictures to paint; the pictures so far are whole; the same" in message
    assert log.stat().st_size == limit and not log.read_bytes().endswith(b"\n")
    assert [path.name for path in Path("out").glob("*.png")] == ["job0.png"]
    whole = Path("out/job0.png").read_bytes()
    code, report, _ = paint(capsys, model)
    assert (code, report["before"], report["painted"]) == (0, 1, 2) and Path("out/job0.png").read_bytes() == whole
    assert [(event["id"], event.get("recovered")) for event in events("done")] == [
        ("job0", True), ("job1", None), ("job2", None)
    ]  # fmt: skip


def test_a_directory_that_goes_away(capsys, folder, model, monkeypatch):
    def gone(path, data):
        shutil.rmtree("out")
        write_atomic(path, data)

    write(some_jobs(1))
    write_atomic = command.write_atomic
    monkeypatch.setattr(command, "write_atomic", gone)
    message = refused(capsys, "batch", "jobs.jsonl", "--out", "out", "--model", model, "--workers", 0)
    assert "--out out: it is no longer there; the same command begins anew" in message


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="a place where nobody may write, root neither")
@pytest.mark.parametrize("out", ["/sys/kernel", "/sys/anima_fast"])
def test_a_read_only_place(capsys, folder, model, out):
    write(some_jobs(1))
    message = refused(capsys, "batch", "jobs.jsonl", "--out", out, "--model", model, "--workers", 0)
    assert f"--out {out}: cannot be written to (" in message


@POSIX
def test_what_is_refused(capsys, folder, model):
    write(some_jobs(1))
    Path("empty").write_text("\n")
    Path("binary").write_bytes(b"\xff\xfe\x00")
    Path("out").mkdir()
    common = ["--model", model, "--workers", "0"]
    with journal.Journal(Path("out")):
        assert "into which another run is painting" in refused(capsys, "batch", "jobs.jsonl", "--out", "out", *common)
    for name, message in [("nowhere", "no file 'nowhere'"), ("empty", "which is empty"), ("binary", "not UTF-8 text")]:
        assert message in refused(capsys, "batch", name, "--out", "out", *common)
    assert "which is a file" in refused(capsys, "batch", "jobs.jsonl", "--out", "left.png", *common)
    assert "but 'left.png' is a file" in refused(capsys, "batch", "jobs.jsonl", "--out", "left.png/out", *common)
    assert "--engine ray" in refused(capsys, "batch", "jobs.jsonl", "--out", "out", "--address", "auto", *common)
    assert "--workers: got -1" in refused(capsys, "batch", "jobs.jsonl", "--out", "out", "--workers", "-1")


@POSIX
def test_a_worker_that_dies(capsys, folder, model):
    """Two workers, each killed once with SIGKILL: every job once, the same pictures as without."""
    write(some_jobs(16))
    paint(capsys, model, "--batch-size", 2, "--threads", 1, out="whole")
    killed = []

    def kill():
        while len(killed) < 2:
            time.sleep(0.05)
            done = len(events("done")) if Path("out").exists() else 0
            for process in multiprocessing.active_children():
                if done > 3 * len(killed) and process.pid not in killed:
                    killed.append(process.pid)
                    os.kill(process.pid, signal.SIGKILL)
                    break

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    code, report, _ = paint(capsys, model, "--workers", 2, "--batch-size", 2, "--threads", 1)
    killer.join(10)
    assert code == 0 and report["painted"] == 16 and len(killed) == 2
    assert Counter(event["id"] for event in events("done")) == {f"job{i}": 1 for i in range(16)}
    for event in events("done"):
        got, expected = Path("out", event["file"]), Path("whole", event["file"])
        if event["rows"] > 1:
            assert got.read_bytes() == expected.read_bytes()
        assert np.abs(pixels(got) - pixels(expected)).max() <= 1
    assert not multiprocessing.active_children()


def test_the_queue():
    jobs = [Job(str(i), i, Request("a", model="x" if i < 2 else "y"), "") for i in range(4)]
    wanted = frozenset("0123")
    first, second = Batch(0, tuple(jobs[:2]), wanted), Batch(1, tuple(jobs[2:]), frozenset("3"))
    queue = workers._Queue([first, second])
    assert queue.take(second.model) is second and queue.take(None) is first and queue.take(None) is None
    assert queue.lost(second, "bang") is None
    alone = queue.take(None)
    assert alone.jobs == (jobs[3],) and alone.number == 1
    for _ in range(workers.TRIES - 1):
        assert queue.lost(alone, "bang") is None and queue.take(None) is alone
    assert queue.lost(alone, "bang").pictures == (f"its worker died {workers.TRIES} times (bang)",)
    with pytest.raises(RuntimeError, match=r"6 workers died one after the other \(bang\)"):
        for _ in range(2):
            queue.lost(first, "bang")


def test_jobs_that_kill_their_worker_at_the_end():
    """Two of them are the last: both are given up, though that takes as many deaths as end a run that has jobs left."""
    jobs = [Job(str(i), i, Request("a"), "") for i in range(2)]
    queue = workers._Queue([Batch(i, (job,), frozenset(job.id)) for i, job in enumerate(jobs)])
    given_up = []
    while batch := queue.take(None):
        painted = queue.lost(batch, "bang")
        given_up += [] if painted is None else [painted.jobs[0].id]
    assert given_up == ["0", "1"] and queue.deaths == workers._DEATHS


# Imports once, then runs the command in one child after the other, each killed after a random time but the last.
KILLED = """
    import os, random, signal, sys, time
    import torch, diffusers, transformers
    from anima_fast.cli import main
    import anima_fast.runner.workers
    torch.set_num_threads(1)
    seed, kills, longest = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    chance = random.Random(seed)
    for i in range(kills + 1):
        child = os.fork()
        if child == 0:
            os._exit(main(sys.argv[4:]))
        if i < kills:
            time.sleep(chance.uniform(0, longest))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        print(status, flush=True)
"""


def killed_and_resumed(model, count, kills, longest, steps):
    write([{**job, "steps": steps} for job in some_jobs(count)])
    script = textwrap.dedent(KILLED)
    command = ["batch", "jobs.jsonl", "--model", str(model), "--workers", "0", "--batch-size", "4", "--out"]
    seed = random.randrange(1000)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    results = []
    for arguments in (["0", "0", "0", *command, "whole"], [str(seed), str(kills), str(longest), *command, "out"]):
        found = subprocess.run(
            [sys.executable, "-c", script, *arguments], capture_output=True, text=True, env=environment
        )
        results.append(found.stdout.split("\n"))
        assert found.returncode == 0, found.stderr
    statuses = [line for line in results[1] if line.isdigit()]
    assert len(statuses) == kills + 1 and statuses[-1] == "0", (seed, results[1])
    assert {path.name: path.read_bytes() for path in Path("whole").glob("*.png")} == {
        path.name: path.read_bytes() for path in Path("out").glob("*.png")
    }, seed
    assert len(list(Path("out").glob("*.png"))) == count
    assert Counter(event["id"] for event in events("done")) == {f"job{i}": 1 for i in range(count)}, seed
    assert {path.name for path in Path("out").iterdir() if path.suffix != ".png"} == {journal.NAME}
    return statuses.count("9")


@POSIX
def test_killed_at_random_moments(folder, model):
    killed_and_resumed(model, count=16, kills=4, longest=1.5, steps=2)


@POSIX
@pytest.mark.slow
def test_200_jobs_killed_20_times(folder, model):
    assert killed_and_resumed(model, count=200, kills=20, longest=5.0, steps=25) >= 15


def worker_processes(parent):
    """Linux knows the children of a process that is not ours; multiprocessing's resource tracker is not one of them."""
    found = []
    with contextlib.suppress(OSError):
        for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
            if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(int(child))
    return found


def killed_with_workers(model, count, kills, longest, steps):
    """Two workers, each process of the three killed at random moments; the main one is started again."""
    write([{**job, "steps": steps} for job in some_jobs(count)])
    command = [sys.executable, "-m", "anima_fast.cli", "batch", "jobs.jsonl", "--model", str(model), "--threads", "1"]
    subprocess.run([*command, "--out", "whole"], check=True, capture_output=True)
    seed = random.randrange(1000)
    chance = random.Random(seed)
    killed = Counter()
    while True:
        process = subprocess.Popen(
            [*command, "--workers", "2", "--out", "out"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        while killed.total() < kills:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(chance.uniform(0, longest))
            if process.poll() is not None:
                break
            victims = {process.pid: "main"} if chance.random() < 0.5 else {}
            victims = victims or dict.fromkeys(worker_processes(process.pid), "worker")
            if victims:
                victim = chance.choice(list(victims))
                os.kill(victim, signal.SIGKILL)
                killed[victims[victim]] += 1
                if victim == process.pid:
                    break
        _, err = process.communicate(timeout=600)
        if process.returncode == 0:
            break
        # by chance the killer strikes so often that no worker finishes anything, which ends a run too
        assert process.returncode == -signal.SIGKILL or "died one after the other" in err, (seed, err)
    assert Counter(event["id"] for event in events("done")) == {f"job{i}": 1 for i in range(count)}, (seed, killed)
    assert not events("failed")
    assert {path.name for path in Path("out").iterdir()} == {f"job{i}.png" for i in range(count)} | {journal.NAME}
    whole = {event["id"]: event for event in events("done", "whole")}
    for event in events("done"):
        got, expected = Path("out", event["file"]), Path("whole", event["file"])
        if event.get("rows") == whole[event["id"]]["rows"]:
            assert got.read_bytes() == expected.read_bytes(), (seed, event)
        assert np.abs(pixels(got) - pixels(expected)).max() <= 1, (seed, event)
    return killed


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds another process's children in /proc")
@pytest.mark.slow
def test_200_jobs_of_two_workers_killed_20_times(folder, model):
    killed = killed_with_workers(model, count=200, kills=20, longest=16.0, steps=40)
    assert killed["main"] >= 2 and killed["worker"] >= 2, killed


@POSIX
def test_workers_end_with_a_parent_that_is_killed(folder, model):
    write(some_jobs(40))
    command = [sys.executable, "-m", "anima_fast.cli", "batch", "jobs.jsonl", "--model", str(model), "--out", "out"]
    parent = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        while not (Path("out").exists() and events("done")):
            assert parent.poll() is None
            time.sleep(0.1)
    finally:
        parent.kill()
        parent.wait()
    until = time.monotonic() + 20
    while True:  # the session's leader has gone; the others of its process group must follow
        try:
            os.killpg(parent.pid, 0)
        except ProcessLookupError:
            break
        assert time.monotonic() < until, "a worker outlived its parent"
        time.sleep(0.1)


def test_an_address_where_no_ray_is(capsys, folder, model, monkeypatch):
    write(some_jobs(1))
    common = ["batch", "jobs.jsonl", "--out", "out", "--model", model, "--engine", "ray", "--device", "cpu"]
    find_spec = workers.importlib.util.find_spec
    another = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    another.RequestHandlerClass.log_message = lambda *_: None
    threading.Thread(target=another.serve_forever, daemon=True).start()
    for there, address, message in [
        (None, "127.0.0.1:1", "ray not installed: pip install"),
        (object(), "ray://127.0.0.1:1", "no Ray cluster answers at 'ray://127.0.0.1:1' ([Errno "),
        (object(), "127.0.0.1:99999", "no Ray cluster answers at '127.0.0.1:99999' ("),
        (object(), "no.such.invalid:6379", "no Ray cluster answers at 'no.such.invalid:6379' ([Errno "),
        (object(), f"127.0.0.1:{another.server_port}", "(what answers there is no Ray; its dashboard is at another"),
    ]:
        monkeypatch.setattr(
            workers.importlib.util, "find_spec", lambda name, there=there: there if name == "ray" else find_spec(name)
        )
        assert message in refused(capsys, *common, "--address", address)
    another.shutdown()
    another.server_close()
    assert not list(Path("out").glob("*.png"))


@POSIX
@pytest.mark.slow
def test_ray_and_a_worker_of_it_that_dies(capsys, folder, model):
    """The same bytes as without Ray, every job once, though an actor's process is killed on the way."""
    pytest.importorskip("ray")
    write(some_jobs(24))
    paint(capsys, model, "--batch-size", 2, out="whole")
    command = [sys.executable, "-m", "anima_fast.cli", "batch", "jobs.jsonl", "--model", str(model), "--out", "out"]
    command += ["--engine", "ray", "--workers", "1", "--threads", "1", "--batch-size", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (Path("out").exists() and events("done")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    os.kill(int(events("done")[0]["worker"].split("process ")[1].split()[0]), signal.SIGKILL)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "died; its batch is given out again" in err
    assert Counter(event["id"] for event in events("done")) == {f"job{i}": 1 for i in range(24)}
    assert len({event["worker"] for event in events("done")}) == 2
    for event in events("done"):
        got, expected = Path("out", event["file"]), Path("whole", event["file"])
        if event["rows"] > 1:
            assert got.read_bytes() == expected.read_bytes()
        assert np.abs(pixels(got) - pixels(expected)).max() <= 1
