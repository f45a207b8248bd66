"""RQ-VAE training: steps and loading by semids and by a plain reimplementation of the published step, in turns.

python -m tests.benchmarks rqvae
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from semids.progress import silent
from semids.quantizers._ranks import Ranks
from semids.quantizers._rqvae_layers import nearest_codewords
from semids.quantizers._rqvae_model import RqvaeModel
from semids.quantizers._rqvae_rows import StreamedRows, batch_places, epoch_order, read_ahead
from semids.quantizers._rqvae_steps import find_gradients, make_model, make_optimizer
from semids.quantizers.rqvae import RqvaeSettings
from semids.shards import ShardedArray, ShardLayout, shard_name, write_shards
from tests.benchmarks.measure import Contender, Record, take_turns
from tests.published_rqvae import Items, PublishedRqvae, copy_weights, published_step

PART = "rqvae"
ROWS = 100_000
SIZES = (512, 512, 512)
SETTINGS = RqvaeSettings(
    layers=(1024, 512, 256, 128), e_dim=64, batch_size=4096, sk_epsilons=(0.0, 0.01, 0.05), weight_decay=1e-5
)
STEPS = 8
"""Training steps of a repetition."""
REPETITIONS = 5
SEMIDS, PUBLISHED = "semids", "published step"


def measure_rqvae(vectors: NDArray[np.float16], folder: Path) -> None:
    """Measure STEPS training steps, an epoch of loading alone, and the parts of a step."""
    rows = vectors[:ROWS]
    layout = ShardLayout(len(rows), rows.shape[1], "float16")
    write_shards(folder, "rows", layout, lambda start, stop: rows[start:stop], fingerprint="", progress=silent)
    device = torch.device("cpu")
    array = ShardedArray(layout, lambda shard: folder / shard_name("rows", shard))
    source = StreamedRows(array, np.arange(len(rows)), device)
    items = Items(rows.astype(np.float32))

    def load() -> Iterator[torch.Tensor]:
        places = batch_places(epoch_order(len(rows), 0, seed=0), SETTINGS.batch_size, start=0, ranks=Ranks())
        return read_ahead(source.read, places, device)

    def load_as_published() -> Iterator[torch.Tensor]:
        return iter(DataLoader(items, batch_size=SETTINGS.batch_size, shuffle=True))

    model, published = _models(rows)
    optimizer = make_optimizer(SETTINGS, model)
    rival = torch.optim.AdamW(published.parameters(), lr=SETTINGS.lr, weight_decay=SETTINGS.weight_decay)

    def step(batch: torch.Tensor) -> None:
        find_gradients(model, optimizer, model(batch, len(batch)))
        optimizer.step()

    def step_as_published(batch: torch.Tensor) -> None:
        published_step(published, rival, batch)

    contenders = {
        f"{SEMIDS}, steps": Contender(lambda: _take(STEPS, load(), step), REPETITIONS),
        f"{PUBLISHED}, steps": Contender(lambda: _take(STEPS, load_as_published(), step_as_published), REPETITIONS),
        f"{SEMIDS}, loading": Contender(lambda: _take(None, load(), lambda batch: None), REPETITIONS),
        f"{PUBLISHED}, loading": Contender(lambda: _take(None, load_as_published(), lambda batch: None), REPETITIONS),
    }
    parts = {
        SEMIDS: _parts_of(model, step, next(load())),
        PUBLISHED: _parts_of(published, step_as_published, next(load_as_published())),
    }

    def finish(name: str, outcome: int) -> Mapping[str, Any]:
        return {"batches": outcome, "parts": parts[name.split(",")[0]]}

    facts = {
        "rows": ROWS,
        "dimensions": rows.shape[1],
        "sizes": SIZES,
        "batch_size": SETTINGS.batch_size,
        "layers": SETTINGS.layers,
        "e_dim": SETTINGS.e_dim,
        "sk_epsilons": SETTINGS.sk_epsilons,
        "sk_iters": SETTINGS.sk_iters,
    }
    take_turns(Record(PART, facts), contenders, finish)


def _models(rows: NDArray[np.float16]) -> tuple[RqvaeModel, PublishedRqvae]:
    """Return both networks with the same weights, and codewords among the latent vectors of the first rows."""
    model = make_model(SIZES, SETTINGS, rows.shape[1], seed=0)
    widths = (rows.shape[1], *SETTINGS.layers, SETTINGS.e_dim)
    published = PublishedRqvae(widths, SIZES, SETTINGS.sk_epsilons, iterations=SETTINGS.sk_iters, beta=SETTINGS.beta)
    first = torch.from_numpy(rows[: 8 * max(SIZES)].astype(np.float32))
    with torch.no_grad():
        model.scale.fill_(1 / float(first.std()))
        residuals = model.encode(first)
        for level, book in enumerate(model.codebooks):
            book.copy_(residuals[level::8][: len(book)])
            residuals = residuals - book[nearest_codewords(residuals, book)]
            published.books[level].weight.copy_(book)
        copy_weights(model, published)
    return model, published


def _take(steps: int | None, batches: Iterator[torch.Tensor], step: Callable[[torch.Tensor], None]) -> int:
    taken = 0
    for batch in batches:
        step(batch)
        taken += 1
        if taken == steps:
            break
    return taken


def _parts_of(model: torch.nn.Module, step: Callable[[torch.Tensor], None], batch: torch.Tensor) -> dict[str, float]:
    """Return the seconds that parts of a step take, mean of three after one."""
    seconds: dict[str, float] = defaultdict(float)
    marks: dict[str, float] = {}

    def begin(name: str) -> None:
        marks[name] = time.perf_counter()

    def end(name: str) -> None:
        seconds[name] += time.perf_counter() - marks[name]

    hooks: list[Any] = []
    for name in ("encoder", "decoder"):
        part: torch.nn.Module = getattr(model, name)
        hooks += [
            part.register_forward_pre_hook(lambda *_, name=name: begin(f"{name} forward")),
            part.register_forward_hook(lambda *_, name=name: end(f"{name} forward")),
        ]
    method = "choose" if isinstance(model, RqvaeModel) else "assign"
    original = getattr(model, method)

    def timed(*arguments: Any, **named: Any) -> Any:
        begin("assignment")
        found = original(*arguments, **named)
        end("assignment")
        return found

    step(batch)
    setattr(model, method, timed)
    started = time.perf_counter()
    for _ in range(3):
        step(batch)
    whole = (time.perf_counter() - started) / 3
    setattr(model, method, original)
    for hook in hooks:
        hook.remove()
    parts = {name: round(value / 3, 4) for name, value in seconds.items()}
    return {**parts, "gradients, optimizer, rest": round(whole - sum(parts.values()), 4), "whole": round(whole, 4)}
