"""The last stage: measure what the codes do to the catalogue, and write it for people and machines."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from semids.arrays import Codes, Vectors, format_shape
from semids.config import QUANTIZERS, BuildConfig
from semids.curves import PLOT, find_curves
from semids.distortion import Distortion, NeighbourFigures, neighbour_figures
from semids.encoding import read_codes
from semids.errors import CorruptionError
from semids.fingerprints import code_digest, method_code
from semids.kmeans import sample_rows
from semids.metrics import measure_ids
from semids.page import render_markdown
from semids.parallel import in_order
from semids.pipeline import make_stage, multiplicities, read_quantizer
from semids.plots import plot_report, plot_training
from semids.progress import Progress
from semids.report import Report, SplitFigures
from semids.semantic_ids import read_code_columns
from semids.stages import MANIFEST, Ref, Stage, StageOutput, StageReader, library_versions, reference
from semids.store import read_sealed_json

log = logging.getLogger("semids")

MEASURED_ROWS = 1 << 14
NEIGHBOUR_SAMPLE = 20_000
NEIGHBOUR_QUERIES = 1_000


def plan_file(config: BuildConfig) -> Path:
    """Return where a run folder keeps what was predicted of a configuration; `semids.plan` writes it."""
    return Path(config.out) / "plans" / f"{config.label}.json"


def plan_name(config: BuildConfig) -> dict[str, Any]:
    """Return what a plan must be of to be shown: all of a configuration, however its paths are spelled."""
    values = config.model_dump(mode="json", exclude={"out": True, "catalogue": {"path"}})
    return {"catalogue_path": str(Path(config.catalogue.path).resolve()), **values}


def write_report(config: BuildConfig, items: Ref, vectors: Ref, model: Ref, codes: Ref) -> Stage:
    """Measure collisions, loads, distortion and neighbours, by split, and write report and plots."""
    quantizer = QUANTIZERS[config.quantizer]
    return make_stage(
        "report",
        "Write the report",
        partial(_write_report, config, items, vectors, model, codes),
        inputs={"items": items, "vectors": vectors, "model": model, "codes": codes},
        parameters={"title": config.label, "seed": config.seed},
        code=code_digest(_write_report, *method_code(quantizer, quantizer.freeze)),
    )


def _write_report(
    config: BuildConfig, items: Ref, vectors: Ref, model: Ref, codes: Ref, output: StageOutput
) -> dict[str, Any]:
    readers = [StageReader(ref.path) for ref in (items, vectors, *_training_steps(model), model, codes)]
    content_codes, sizes = read_codes(codes)
    counts = multiplicities(items)
    relative_mse = _measure_distortion(vectors, codes, counts, output.progress)

    def figures(name: str | None) -> SplitFigures:
        weights = counts[name] if name is not None else np.stack(list(counts.values())).sum(axis=0, dtype=np.uint32)
        step = f"measure the IDs of split {name}" if name is not None else "measure all IDs"
        ids = measure_ids(
            _chunks(content_codes, lambda done: output.progress(step, done, len(content_codes), "contents")),
            _chunks(weights),
            sizes=sizes,
        )
        return SplitFigures(ids, relative_mse[name].relative_mse, relative_mse[name].undefined_reason)

    report = Report(
        title=config.label,
        overall=figures(None),
        splits={name: figures(name) for name in counts},
        shape=config.shape,
        mapping=config.mapping,
        quantizer=config.quantizer,
        neighbours=_measure_neighbours(vectors, model, content_codes, seed=config.seed),
        training=tuple(
            {name: value for name, value in step.items() if name != "fingerprint"}
            for step in StageReader(model.path).summary["training"]
        ),
        catalogue=_catalogue(readers[0].summary),
        timings={reader.manifest["title"]: reader.manifest["run"]["seconds"] for reader in readers},
        peak_rss_bytes=max(reader.manifest["run"]["peak_rss_bytes"] for reader in readers),
        planned=tuple(_compare_with_plan(config, readers)),
        versions=library_versions(),
        fingerprint=codes.fingerprint,
    )
    output.commit_bytes("report.json", report.to_json().encode())
    for name, png in plot_report(report.overall.ids).items():
        output.commit_bytes(f"{name}.png", png)
    curves = find_curves(report.training)
    if curves is not None:
        output.commit_bytes(f"{PLOT}.png", plot_training(curves))
    output.commit_bytes("report.md", render_markdown(report, lambda name: f"{name}.png").encode())
    return {"title": config.label}


def _catalogue(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return what came in, as the report shows it."""
    texts = summary["kind"] == "texts"

    def counts(part: Mapping[str, Any]) -> dict[str, Any]:
        contents = {"distinct_texts": part["distinct_contents"]} if texts else {}
        return {"items": part["items"], "distinct_products": part.get("distinct_products"), **contents}

    splits = {name: counts(split) for name, split in summary["splits"].items()}
    return {**counts(summary), "quarantined": sum(summary["quarantined"].values()), "splits": splits}


def _compare_with_plan(config: BuildConfig, readers: Sequence[StageReader]) -> Iterator[dict[str, Any]]:
    """Yield what was predicted of each stage, and what it took; nothing without a plan of this configuration."""
    path = plan_file(config)
    if not path.exists():
        return
    try:
        plan = read_sealed_json(path)
    except CorruptionError:
        log.warning("the plan %s is damaged; the report goes without it", path)
        return
    if plan.get("plan_of") != plan_name(config):
        return
    runs = {reader.manifest["title"]: reader.manifest for reader in readers}
    for stage in plan["stages"]:
        manifest = runs.get(stage["title"])
        if manifest is not None:
            yield compare_stage(stage, manifest)


def compare_stage(planned: Mapping[str, Any], manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a plan predicted of a stage beside what its manifest says that it took: seconds and bytes."""
    return {
        "stage": planned["title"],
        "predicted_seconds": planned["seconds"],
        "seconds": manifest["run"]["seconds"],
        "predicted_memory_bytes": planned["memory"],
        "peak_bytes": manifest["run"]["peak_rss_bytes"],
        **_compare_device(planned, manifest),
        "predicted_disk_bytes": planned["disk"],
        "written_bytes": sum(record["bytes"] for record in manifest["files"].values()),
    }


def _compare_device(planned: Mapping[str, Any], manifest: Mapping[str, Any]) -> dict[str, int]:
    """Return the same of the memory of a CUDA device; nothing of a stage that was not predicted to use one."""
    taken, predicted = manifest["run"].get("peak_device_bytes"), planned.get("device_memory")
    return {"predicted_device_bytes": predicted, "peak_device_bytes": taken} if taken and predicted else {}


def _training_steps(model: Ref) -> list[Ref]:
    """Return the model's training steps whose folders lie beside it: all in its own run folder, none elsewhere."""
    beside: list[Ref] = []
    for step in StageReader(model.path).summary["training"]:
        folder = Path(model.path).parent / f"train-{step['step']}-{step['fingerprint'][:16]}"
        if (folder / MANIFEST).exists():
            beside.append(reference(folder))
    return beside


def _chunks(rows: NDArray[Any], told: Callable[[int], None] = lambda done: None) -> Iterator[NDArray[Any]]:
    for start in range(0, len(rows), MEASURED_ROWS):
        part = rows[start : start + MEASURED_ROWS]
        yield part
        told(start + len(part))


def _measure_distortion(
    vectors: Ref, codes: Ref, counts: Mapping[str, NDArray[np.uint32]], progress: Progress
) -> dict[str | None, Distortion]:
    """Return the distortion of each split, and of all of them together under None, weighted by items."""
    array = StageReader(vectors.path).array("vectors")
    errors = StageReader(codes.path).array("squared_errors")

    def nothing() -> dict[str, Distortion]:
        return {name: Distortion(array.layout.columns, errors.layout.columns) for name in counts}

    def measure(
        chunk: tuple[tuple[int, Vectors], tuple[int, NDArray[np.float32]]],
    ) -> tuple[int, dict[str, Distortion]]:
        (start, rows), (_, row_errors) = chunk
        stop, part = start + len(rows), nothing()
        for name, split_counts in counts.items():
            part[name].add(rows, row_errors, split_counts[start:stop])
        return stop, part

    chunks = zip(array.chunks(MEASURED_ROWS), errors.chunks(MEASURED_ROWS), strict=True)
    measured = nothing()
    for done, part in in_order(measure, chunks):
        for name, distortion in part.items():
            measured[name].merge(distortion)
        progress("measure distortion", done, array.layout.rows, "contents")
    overall = Distortion(array.layout.columns, errors.layout.columns)
    for distortion in measured.values():
        overall.merge(distortion)
    return {None: overall, **measured}


def _measure_neighbours(vectors: Ref, model: Ref, codes: Codes, *, seed: int) -> NeighbourFigures:
    rows = sample_rows(len(codes), NEIGHBOUR_SAMPLE, seed=seed)
    sample = StageReader(vectors.path).array("vectors").take(rows).astype(np.float32, copy=False)
    reconstructions = read_quantizer(model).decode(codes[rows])
    return neighbour_figures(sample, reconstructions, codes[rows], queries=NEIGHBOUR_QUERIES)


def read_report(ref: Ref) -> Report:
    """Return the report that a report stage wrote."""
    return Report.from_json(StageReader(ref.path).path("report.json").read_bytes())


def report_codes(path: Path, sizes: tuple[int, ...] | None) -> Report:
    """Return the report of a Parquet file of codes, of which nothing but the codes is known.

    Raises:
        UsageError: no such file or columns.
        CodesError: a code outside its codebook.
    """
    codes = read_code_columns(path, sizes)
    return Report(
        title=path.name,
        overall=SplitFigures(measure_ids(_chunks(codes), None, sizes=sizes)),
        shape=format_shape(sizes) if sizes else None,
        versions=library_versions(),
    )
