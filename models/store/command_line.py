"""The command line of the model store: `import`, `quantize` and `list`. Knows arguments, signals and exit codes."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TextIO

from kernels.precision import Progress
from models.families import FAMILIES
from models.family import ImportRefused
from models.store.model_store import StoredModel, StoreError, import_model, quantize_model, resolve, stored_models
from models.store.progress import ProgressPrinter, readable_bytes


class Interrupted(Exception):
    """A person or a system asked this process to end."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"signal {signal_number}")
        self.exit_code = 128 + signal_number


class Stoppable:
    """A progress that ends the import when a signal has asked for it.

    The exception is raised between two tensors and not where the signal happens to strike: inside torch's and
    safetensors' C code Python swallows it or turns it into another error. A second signal does not wait.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._signal: int | None = None

    def __call__(self, done_bytes: int, total_bytes: int, what: str) -> None:
        if self._signal is not None:
            raise Interrupted(self._signal)
        self._progress(done_bytes, total_bytes, what)

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None:
            raise Interrupted(number)
        self._signal = number


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Exit codes: 0 done, 1 refused (one line says why), 2 wrong usage, 130 interrupted."""
    parsed = _parser().parse_args(arguments)
    os.environ.setdefault("BENTOML_DO_NOT_TRACK", "true")  # an import tells nobody
    command: Callable[[argparse.Namespace], None] = parsed.run
    try:
        command(parsed)
    except (ImportRefused, StoreError) as refusal:
        print(f"Error: {refusal}", file=sys.stderr)
        return 1
    except OSError as error:
        # a full disk, a folder that may not be read: the reason and the file are all that helps
        print(f"Error: {error.strerror or error}: {error.filename or parsed.command}", file=sys.stderr)
        return 1
    except Interrupted as interrupted:
        print("Interrupted; nothing was imported.", file=sys.stderr)
        return interrupted.exit_code
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m models.store", description="Models in the Bento model store.")
    commands = parser.add_subparsers(dest="command", required=True)
    families = "; ".join(f"{family.name}: {family.title}" for family in FAMILIES.values())
    importing = commands.add_parser("import", help="convert a checkpoint folder into the store")
    importing.set_defaults(run=_import)
    importing.add_argument("family", metavar="FAMILY", help=families)
    importing.add_argument(
        "--from", dest="source", metavar="DIR", type=Path, required=True, help="the checkpoint folder"
    )
    importing.add_argument("--name", metavar="NAME[:VERSION]", help="default: the folder's name and a new version")
    options = {option.name: option for family in FAMILIES.values() for option in family.options}
    for option in options.values():
        importing.add_argument(f"--{option.name}", metavar="|".join(option.choices) or "VALUE", help=option.help)
    quantizing = commands.add_parser("quantize", help="store a model again with weights of 8 or 4 bits")
    quantizing.set_defaults(run=_quantize)
    quantizing.add_argument("tag", metavar="NAME[:VERSION]", help="a model in the store")
    quantizing.add_argument("precision", choices=("int8", "int4"))
    quantizing.add_argument("--name", metavar="NAME[:VERSION]", help="default: the model's name and the precision")
    commands.add_parser("list", help="show what is in the store").set_defaults(run=_list)
    return parser


def _import(arguments: argparse.Namespace) -> None:
    names = {option.name for family in FAMILIES.values() for option in family.options}
    chosen = {name: getattr(arguments, name.replace("-", "_")) for name in names}
    options = {name: str(value) for name, value in chosen.items() if value is not None}
    with _stoppable() as progress:
        tag = import_model(arguments.family, arguments.source, arguments.name, options, progress)
    stored = _say_stored(tag)
    if stored.metadata.get("weights_only"):
        print("Warning: the folder has no tokenizer.model, so only the weights were imported; it cannot be served.")


def _quantize(arguments: argparse.Namespace) -> None:
    with _stoppable() as progress:
        tag = quantize_model(arguments.tag, arguments.precision, arguments.name, progress)
    _say_stored(tag)


@contextmanager
def _stoppable() -> Iterator[Stoppable]:
    printer = ProgressPrinter(sys.stderr)
    stoppable = Stoppable(printer)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stoppable.on_signal)
    try:
        yield stoppable
    finally:
        printer.close()


def _say_stored(tag: str) -> StoredModel:
    stored = resolve(tag)
    print(f"{tag} is in the model store ({readable_bytes(_size_on_disk(stored.path))}, {stored.path})")
    return stored


def _list(arguments: argparse.Namespace) -> None:
    print_list(sys.stdout)


def print_list(stream: TextIO) -> None:
    """The table of `list`: tag, family, precision, size, context, imported when."""
    rows = [("TAG", "FAMILY", "PRECISION", "SIZE", "CONTEXT", "IMPORTED")]
    for stored in sorted(stored_models(), key=lambda stored: (stored.metadata["imported"], stored.tag)):
        metadata = stored.metadata
        precision, came_from = str(metadata.get("dtype", "?")), metadata.get("source_precision")
        rows.append(
            (
                stored.tag,
                stored.family,
                precision if came_from in (None, precision) else f"{precision} (from {came_from})",
                readable_bytes(_size_on_disk(stored.path)),
                str(metadata.get("context_length", "?")),
                str(metadata["imported"]),
            )
        )
    if len(rows) == 1:
        print("nothing yet; import a model: python -m models.store import FAMILY --from DIR", file=stream)
        return
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip(), file=stream)


def _size_on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
