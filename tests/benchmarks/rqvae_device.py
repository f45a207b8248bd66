"""RQ-VAE training on a CUDA device: rows a second of whole trainings, in turns, and what 300 epochs would take.

    python -m tests.benchmarks.rqvae_device VECTORS.npy

The settings are those of `rqvae-1024-512x3.yaml`, with fewer epochs. Contenders differ in what PyTorch is given: rows
that stay on the device, rows streamed from their files, float32 instead of bfloat16. The published step gets its batch
for nothing: its dataset, asked for one item at a time, is left out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import yaml

from semids.progress import silent
from semids.quantizers import _rqvae_layers, _rqvae_rows
from semids.quantizers._rqvae_memory import training_device_bytes
from semids.quantizers._rqvae_train import Job, train
from semids.quantizers._rqvae_work import weight_count, widths_of
from semids.quantizers.rqvae import RqvaeSettings
from semids.shards import ShardedArray, ShardLayout, shard_name, write_shards
from tests.benchmarks.measure import circumstances, record_path
from tests.published_rqvae import PublishedRqvae, published_step

PART = "rqvae_device"
CONFIG = Path(__file__).parents[2] / "deployments/configs/rqvae-1024-512x3.yaml"
SHORT = {"warmup_epochs": 2, "epochs": 8, "eval_step": 8}
TURNS = 2
CATALOGUE = 54_513_856
RESIDENT, STREAMED, FLOAT32 = "semids", "rows streamed", "float32"
PUBLISHED = "published step"
CHANGES: dict[str, tuple[tuple[Any, str, Any], ...]] = {
    RESIDENT: (),
    STREAMED: ((_rqvae_rows, "fits_device", lambda *_: False),),
    FLOAT32: ((_rqvae_layers, "MIXED_ON", frozenset()),),
}


def main() -> None:
    """Measure, write the raw figures, and print them."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.rqvae_device", description=__doc__)
    parser.add_argument("vectors", type=Path)
    vectors = np.load(parser.parse_args().vectors, mmap_mode="r")
    config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    settings = RqvaeSettings(**config["options"]["rqvae"] | SHORT)
    sizes = tuple(map(int, config["shape"].split("x")))
    body: dict[str, Any] = {
        "config": CONFIG.name,
        "changes": SHORT,
        "rows": len(vectors),
        "device": torch.cuda.get_device_name(),
        "bf16_flops": product_rate(),
        **circumstances(),
        "contenders": {name: [] for name in (*CHANGES, PUBLISHED)},
    }
    with tempfile.TemporaryDirectory() as folder:
        layout = ShardLayout(len(vectors), vectors.shape[1], "float16")
        write_shards(
            Path(folder), "rows", layout, lambda start, stop: vectors[start:stop], fingerprint="", progress=silent
        )
        array = ShardedArray(layout, lambda shard: Path(folder) / shard_name("rows", shard))
        job = Job(sizes, settings, 0, array, np.arange(len(vectors)), None)
        body["predicted_device_bytes"] = training_device_bytes(sizes, settings, layout)
        for _ in range(TURNS):
            for name in CHANGES:
                with changed(name):
                    body["contenders"][name].append(train_timed(job))
                print(name, body["contenders"][name][-1], flush=True)
        body["contenders"][PUBLISHED].append(time_published(job))
        print(PUBLISHED, body["contenders"][PUBLISHED], flush=True)
    body["projection"] = project(body, job)
    record_path(PART).write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(body["projection"], indent=1))


def product_rate() -> float:
    """Return the operations a second of a bfloat16 product of matrices of 8,192 rows and columns."""
    left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    seconds: list[float] = []
    for _ in range(12):
        torch.cuda.synchronize()
        started = time.perf_counter()
        torch.mm(left, right)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return 2 * 8192**3 / statistics.median(seconds[2:])


@contextmanager
def changed(name: str) -> Generator[None]:
    """Have a training be a contender's."""
    with ExitStack() as stack:
        for module, attribute, value in CHANGES[name]:
            stack.enter_context(mock.patch.object(module, attribute, value))
        yield


def train_timed(job: Job) -> Mapping[str, Any]:
    """Train, and return the seconds of steps of whole batches, of epochs and of the whole; memory; what was learnt."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    p, marks = job.settings, list[tuple[float, int]]()
    started = time.perf_counter()

    def told(what: str, done: int, total: int) -> None:
        if what == "train":
            marks.append((time.perf_counter(), done))

    trained = train(job, told)
    whole = time.perf_counter() - started
    steps = [
        now - last
        for (last, before_it), (now, done) in itertools.pairwise(marks)
        if done - before_it == p.batch_size and before_it % trained.rows and before_it > p.warmup_epochs * trained.rows
    ]
    ends = [at for at, done in marks if done % trained.rows == 0]
    epochs = [now - last for last, now in zip(ends[p.warmup_epochs :], ends[p.warmup_epochs + 1 :], strict=False)]
    (found,) = trained.state.evaluations
    return {
        "step": round(statistics.median(steps), 5),
        "epoch": round(statistics.median(epochs), 4),
        "rows_of_an_epoch": trained.rows,
        "whole": round(whole, 2),
        "peak_device_bytes": torch.cuda.max_memory_allocated() - before,
        "loss": trained.state.losses[-1],
        "held_out": {name: found[name] for name in ("relative_mse", "collision_rate", "agreement")},
    }


def time_published(job: Job) -> Mapping[str, Any]:
    """Return the median seconds of a published step of a batch that is on the device."""
    p = job.settings
    rows = torch.from_numpy(job.vectors.take(job.rows[: p.batch_size])).cuda().float()
    rows = (rows - rows.mean(dim=0)) / rows.std()
    widths = widths_of(p, rows.shape[1])
    model = PublishedRqvae(widths, job.sizes, p.sk_epsilons, iterations=p.sk_iters, beta=p.beta).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=p.lr, weight_decay=p.weight_decay)
    with torch.no_grad():
        latents = model.encoder(rows[: len(rows) // 8])
        for level, book in enumerate(model.books):
            book.weight.copy_(latents[level :: len(model.books)][: len(book.weight)])
    seconds: list[float] = []
    for _ in range(6):
        torch.cuda.synchronize()
        started = time.perf_counter()
        published_step(model, optimizer, rows)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return {"step": round(statistics.median(seconds[1:]), 5)}


def project(body: Mapping[str, Any], job: Job) -> dict[str, Any]:
    """Return what the committed configuration would take of the whole catalogue, and the floor that products set.

    Its products: two operations a weight and row on the way forth, four on the way back, of which the rows need none.
    """
    epochs = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))["options"]["rqvae"]["epochs"]
    widths = widths_of(job.settings, job.vectors.layout.columns)
    flops = 6 * 2 * weight_count(widths) - 2 * widths[0] * widths[1]
    floor = epochs * CATALOGUE * flops / body["bf16_flops"]
    found: dict[str, Any] = {"floor_minutes": round(floor / 60, 2)}
    for name, runs in body["contenders"].items():
        step = min(run["step"] for run in runs)
        minutes = epochs * CATALOGUE / job.settings.batch_size * step / 60
        found[name] = {
            "rows_a_second": round(job.settings.batch_size / step),
            "minutes": round(minutes, 1),
            "floor_share": round(floor / 60 / minutes, 3),
        }
    return found


if __name__ == "__main__":
    main()
