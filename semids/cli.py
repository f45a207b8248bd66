"""The command line: the whole job in one process, without Prefect."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from semids import results, runs
from semids.adopt import adopt_vectors
from semids.arrays import parse_shape
from semids.catalogue import is_vectors
from semids.config import BuildConfig, make_config, read_values
from semids.counts import count_catalogue, suppose_rows, suppose_vectors
from semids.errors import CorruptionError, SemidsError, StorageError, UsageError
from semids.page import render_text
from semids.plan import Finished, checking_runner, find_finished, leave_plan, plan_run
from semids.progress import TerminalProgress
from semids.remote import fetch
from semids.report import comparison_rows, format_table
from semids.reporting import read_report, report_codes
from semids.sample import write_sample_catalogue
from semids.stages import Ref
from semids.status import read_status
from semids.store import commit, run_lock
from semids.text import printable
from semids.verification import verify_run
from semids.work import Machine

OPTIONS: dict[str, tuple[str, str]] = {
    # option: (place in the configuration, help)
    "--id-column": ("catalogue.id_column", "column with the item ids"),
    "--text-column": ("catalogue.text_column", "column with the item texts"),
    "--template": ("catalogue.template", r"text from columns, as '{title}\nBrand: {brand}'"),
    "--vector-column": ("catalogue.vector_column", "column with vectors, instead of texts"),
    "--split-column": ("catalogue.split_column", "column with the split of each item"),
    "--brand-column": ("catalogue.brand_column", "column with brands, to count distinct products"),
    "--category-column": ("catalogue.category_column", "column with categories, to count distinct products"),
    "--model": ("embedder.model", "folder, hub id or package:NAME/FOLDER of a Hugging Face encoder"),
    "--revision": ("embedder.revision", "commit of a hub model"),
    "--seed": ("seed", "decides samples and starts"),
    "--out": ("out", "run folder; what it holds is reused"),
}
SHAPE_OPTIONS: dict[str, tuple[str, str]] = {
    "--shape": ("shape", "codebook sizes, first level first, as 256x256x256"),
    "--mapping": ("mapping", "nearest, uniform or capacity"),
    "--quantizer": ("quantizer", "how codebooks are made"),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, or that of sysexits(3) for the error that ended it."""
    to_terminal = sys.stderr.isatty()
    logging.basicConfig(level=logging.INFO if to_terminal else logging.WARNING, format="%(message)s", stream=sys.stderr)
    for chatty in ("transformers", "sentence_transformers", "huggingface_hub", "httpx", "faiss"):
        logging.getLogger(chatty).setLevel(logging.WARNING)

    def run() -> int:
        parsed = _parser().parse_args(arguments)
        return int(parsed.run(parsed) or 0)

    return exit_code_of(run)


def exit_code_of(run: Callable[[], int]) -> int:
    """Run a command and return its exit code, that of sysexits(3) for the error that ended it, which is printed."""
    try:
        return run()
    except SemidsError as error:
        print(f"semids: {printable(str(error))}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"semids: {printable(str(error))}; run the same command again: finished work is kept", file=sys.stderr)
        return StorageError.exit_code
    except KeyboardInterrupt:
        print("semids: interrupted; run the same command again to go on from here", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="semids", description="Turn a catalogue of items into semantic IDs.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)

    def command(name: str, run: Callable[[argparse.Namespace], int | None], help: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=help, description=help)
        added.set_defaults(run=run)
        return added

    tokenize = command("tokenize", _tokenize, "catalogue or vectors in, semantic IDs and a collision report out")
    tokenize.add_argument("input", nargs="?", help="catalogue (Parquet, JSONL, CSV) or vectors (.npy, Parquet)")
    _add_config(tokenize)
    _add_options(tokenize, OPTIONS | SHAPE_OPTIONS)
    tokenize.add_argument("--suffix", action="store_true", default=None, help="add a last token that makes IDs unique")

    plan = command("plan", _plan, "what tokenize will take: time, memory and disk of every stage, and whether it fits")
    plan.add_argument("input", nargs="?", help="catalogue or vectors")
    plan.add_argument("--rows", type=int, metavar="N", help="suppose so many items")
    plan.add_argument("--dimensions", type=int, metavar="D", help="with --rows: suppose vectors of so many dimensions")
    _add_config(plan)
    _add_options(plan, OPTIONS | SHAPE_OPTIONS)
    plan.add_argument("--suffix", action="store_true", default=None, help="as in tokenize")

    encode = command("encode", _encode, "give new items their IDs from a frozen model")
    encode.add_argument("model_folder", help="model folder, as runs/results/ITEMS/256x256x256-nearest-…/model")
    encode.add_argument("input", help="new items: catalogue or vectors")
    encode.add_argument(
        "--unique",
        action="store_true",
        help="give every new content an ID that none has; the model shown with the results knows them, for the next",
    )
    _add_options(encode, {k: v for k, v in OPTIONS.items() if k not in ("--split-column", "--seed")})

    adopt = command("adopt", _adopt, "register embeddings that were computed elsewhere or by an older version")
    adopt.add_argument("vectors", help=".npy in catalogue order, Parquet with the id column, or an older vectors stage")
    adopt.add_argument("input", nargs="?", help="catalogue that the vectors belong to")
    adopt.add_argument("--reason", required=True, help="kept on record beside the vectors")
    _add_config(adopt)
    _add_options(adopt, OPTIONS)

    report = command("report", _report, "collision figures of codes, also published ones, or of a run folder")
    report.add_argument("codes", help="Parquet with columns c0, c1, …, or a run folder")
    report.add_argument("--shape", help="codebook sizes; figures that need them are null without")
    report.add_argument("--json", action="store_true", help="print every figure as JSON")

    verify = command("verify", _verify, "check every committed file of a run folder against its digest")
    verify.add_argument("folder")

    status = command("status", _status, "what is done, running, dead or resumable in a run folder, at once")
    status.add_argument("folder")
    status.add_argument("--json", action="store_true", help="print everything as JSON")

    sample = command("sample", _sample, "write the sample catalogue, about 3,000 products")
    sample.add_argument("path", help="Parquet file to write")
    return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", help="YAML file with the configuration that the flows take; options override it")


def _add_options(parser: argparse.ArgumentParser, options: dict[str, tuple[str, str]]) -> None:
    for option, (place, text) in options.items():
        parser.add_argument(option, dest=place, metavar="X", help=text)
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any other parameter, as options.residual_kmeans.restarts=10",
    )


def _configured(parsed: argparse.Namespace) -> BuildConfig:
    """Return the configuration of a command that takes --config, with options over it."""
    if parsed.config is None:
        return _override({}, parsed, source="command line")
    return _override(read_values(parsed.config), parsed, source=parsed.config)


def _override(values: dict[str, Any], parsed: argparse.Namespace, *, source: str) -> BuildConfig:
    """Return the configuration of the values, with a command's options over them."""
    if parsed.input is not None:
        _put(values, "catalogue.path", parsed.input)
    for place, value in vars(parsed).items():
        if value is not None and (place in ("seed", "out", "suffix", *_places(SHAPE_OPTIONS)) or "." in place):
            _put(values, place, value.replace("\\n", "\n") if place == "catalogue.template" else value)
    for assignment in parsed.set:
        place, equals, value = assignment.partition("=")
        if not equals or not place.strip():
            raise UsageError(f"expected --set KEY=VALUE, got {assignment!r}")
        try:
            _put(values, place, yaml.safe_load(value))
        except yaml.YAMLError as error:
            raise UsageError(f"expected YAML after {place}=, got {value!r}: {error}") from error
    if not isinstance(values.get("catalogue"), dict) or not values["catalogue"].get("path"):
        raise UsageError(f"{source}: expected a catalogue: give INPUT, or a configuration with catalogue.path")
    return make_config(BuildConfig, values, source=source)


def _places(options: dict[str, tuple[str, str]]) -> list[str]:
    return [place for place, _ in options.values()]


def _put(values: dict[str, Any], place: str, value: Any) -> None:
    *parents, last = place.split(".")
    for parent in parents:
        inner = values.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise UsageError(f"expected the place of a parameter, got {place!r}: {parent!r} has nothing inside")
        values = inner
    values[last] = value


def _tokenize(parsed: argparse.Namespace) -> None:
    config = _configured(parsed)
    folder = Path(config.out)
    with run_lock(folder):
        config = runs.fetch_catalogue(config)
        run = checking_runner([config], runs.local_runner(folder, TerminalProgress()))
        refs = runs.build(config, run)
        where = results.publish(config, refs)
    _print_figures([refs.report])
    print(f"\nSemantic IDs, report and model: {where}")


def _plan(parsed: argparse.Namespace) -> None:
    rows, dimensions = parsed.rows, parsed.dimensions
    given = [number for number in (rows, dimensions) if number is not None]
    if any(number < 1 for number in given) or (dimensions and not rows):
        raise UsageError(f"expected --rows, and --dimensions with it, of at least 1, got {rows} and {dimensions}")
    supposed = dimensions and parsed.input is None and parsed.config is None
    if supposed:
        parsed.input = f"{rows}x{dimensions}.npy"
    config = _configured(parsed)
    folder = Path(config.out)
    with run_lock(folder):
        if not supposed:
            config = runs.fetch_catalogue(config)
        if dimensions:
            if not supposed and not is_vectors(config.catalogue):
                raise UsageError(
                    "expected --dimensions for a catalogue of vectors, got one of texts: their model tells"
                )
            counts = suppose_vectors(rows, dimensions)
        else:
            counts = count_catalogue(config, runs.local_runner(folder, TerminalProgress()))
            counts = suppose_rows(counts, rows) if rows else counts
        done = Finished() if rows else find_finished(config)
        plan = plan_run(config, counts, None, done)
        if plan.can_be_measured:
            plan = plan_run(config, counts, Machine(folder), done)
        if not rows and plan.to_do:
            leave_plan(config, plan)
    print(plan.describe())
    plan.check()
    print(f"\n{plan.verdict()}")


def _encode(parsed: argparse.Namespace) -> None:
    model_folder = Path(parsed.model_folder)
    for place in (assignment.partition("=")[0] for assignment in parsed.set):
        if not place.startswith(("catalogue.", "embedder.")):
            raise UsageError(
                f"encode cannot set {place}: codes come from the model, and no suffix is added; only catalogue and "
                "embedder can be told otherwise"
            )
    folder = Path(parsed.out or runs.ENCODED)
    with run_lock(folder):
        parsed.input = fetch(parsed.input, folder)
        config = _override(runs.encoding_config(model_folder, parsed.input), parsed, source=parsed.model_folder)
        run = runs.local_runner(folder, TerminalProgress())
        refs = runs.encode_items(config, model_folder, run, unique=parsed.unique)
        where = results.publish(config, refs, encoded=True)
    _print_figures([refs.report])
    print(f"\nSemantic IDs and report: {where}")
    if parsed.unique:
        print(f"Model for the next new items: {where / 'model'} ({model_folder} would give them the same IDs again)")


def _adopt(parsed: argparse.Namespace) -> None:
    config = _configured(parsed)
    folder = Path(config.out)
    with run_lock(folder):
        config = runs.fetch_catalogue(config)
        run = runs.local_runner(folder, TerminalProgress())
        vectors = adopt_vectors(config, Path(parsed.vectors), parsed.reason, run)
    print(f"Adopted as {vectors.path}: runs with this catalogue and model use these vectors.")


def _report(parsed: argparse.Namespace) -> None:
    path = Path(parsed.codes)
    if path.is_dir():
        rows = comparison_rows(results.published_reports(path))
        print(json.dumps(rows, indent=1) if parsed.json else format_table(rows))
        return
    report = report_codes(path, parse_shape(parsed.shape) if parsed.shape else None)
    print(report.to_json() if parsed.json else render_text(report))


def _print_figures(reports: Sequence[Ref]) -> None:
    print(format_table(comparison_rows(read_report(ref) for ref in reports)))


def _verify(parsed: argparse.Namespace) -> None:
    folder = Path(parsed.folder)
    if not (folder / "stages").is_dir():
        raise UsageError(f"{folder} is not a run folder: it has no stages folder")
    found = verify_run(folder)
    for fault in found.faults:
        print(printable(fault), file=sys.stderr)
    for unfinished in found.unfinished:
        print(f"{printable(str(unfinished))} is unfinished: interrupted, or under way", file=sys.stderr)
    if found.faults:
        raise CorruptionError(f"{len(found.faults)} faults among {found.checked} committed files and links")
    print(f"{found.checked} committed files and links are as they were written")


def _status(parsed: argparse.Namespace) -> None:
    found = read_status(Path(parsed.folder))
    for fault in found.faults:
        print(printable(fault), file=sys.stderr)
    print(found.to_json() if parsed.json else found.describe())
    if found.faults:
        raise CorruptionError(
            f"{len(found.faults)} faults; semids verify reads every file and finds what else there is"
        )


def _sample(parsed: argparse.Namespace) -> None:
    path = Path(parsed.path)
    if path.is_dir():
        raise UsageError(f"expected a file to write, got the folder {parsed.path}")
    commit(path, write_sample_catalogue)
    print(f"Sample catalogue: {parsed.path}")


if __name__ == "__main__":
    sys.exit(main())
