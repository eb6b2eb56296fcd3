"""The command line of the model store: arguments -> calls of `model_store`, and errors -> exit codes.

python -m models.store inspect DIR
python -m models.store import chatglm2 --from DIR [--name NAME[:VERSION]] [--adapter DIR[=WEIGHT]] [--tokenizer DIR]
python -m models.store import chatglm2 OWNER/NAME[@REVISION]
python -m models.store import DIR|OWNER/NAME
python -m models.store quantize NAME[:VERSION] int8|int4 [--name NAME[:VERSION]]
python -m models.store list
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from kernels.precision import Progress
from models.families import FAMILIES
from models.family import ImportOption, ImportRefused
from models.store import hub
from models.store.model_store import StoredModel, StoreError, import_model, quantize_model, resolve, stored_models
from models.store.progress import ProgressPrinter, readable_bytes

if TYPE_CHECKING:
    from models.checkpoints.inspection import Inspection


class Interrupted(Exception):
    """The process received SIGINT or SIGTERM."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"signal {signal_number}")
        self.exit_code = 128 + signal_number


class InterruptibleProgress:
    """A Progress that raises Interrupted after a signal, between two tensors.

    Raised by the signal handler itself, inside the C code of torch or safetensors, the exception would be swallowed or
    turned into another error. A second signal raises at once.
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
    """Exit codes: 0 done, 1 failed (with a message of one line), 2 wrong usage, 130 or 143 interrupted."""
    parsed = _parser().parse_args(arguments)
    os.environ.setdefault("BENTOML_DO_NOT_TRACK", "true")  # no usage statistics of an import
    command: Callable[[argparse.Namespace], None] = parsed.run
    try:
        command(parsed)
    except (ImportRefused, StoreError) as refusal:
        print(f"Error: {refusal}", file=sys.stderr)
        return 1
    except OSError as error:
        # such as a full disk or an unreadable folder
        print(f"Error: {error.strerror or error}: {error.filename or parsed.command}", file=sys.stderr)
        return 1
    except Interrupted as interrupted:
        print("Interrupted; nothing was stored.", file=sys.stderr)
        return interrupted.exit_code
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m models.store", description="Import, quantise and list models in the Bento model store."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    families = "; ".join(f"{family.name}: {family.title}" for family in FAMILIES.values())
    importing = commands.add_parser("import", help="convert a checkpoint folder into the store")
    importing.set_defaults(run=_import)
    importing.add_argument("family", metavar="FAMILY", help=f"{families}; or a SOURCE, whose family is proposed")
    importing.add_argument(
        "source", metavar="SOURCE", nargs="?", help="OWNER/NAME on Hugging Face, modelscope:OWNER/NAME, or a folder"
    )
    importing.add_argument("--from", dest="folder", metavar="DIR", help="a checkpoint folder or a GGUF file")
    importing.add_argument(
        "--adapter", metavar="DIR[=WEIGHT]", action="append", default=[], help="a LoRA adapter to merge; repeatable"
    )
    importing.add_argument("--tokenizer", metavar="DIR", type=Path, help="take missing tokenizer files from here")
    importing.add_argument("--name", metavar="NAME[:VERSION]", help="default: the folder's name and a new version")
    for option in _family_options().values():
        importing.add_argument(f"--{option.name}", metavar="|".join(option.choices) or "VALUE", help=option.help)
    quantizing = commands.add_parser("quantize", help="store a model again with weights of 8 or 4 bits")
    quantizing.set_defaults(run=_quantize)
    quantizing.add_argument("tag", metavar="NAME[:VERSION]", help="a model in the store")
    quantizing.add_argument("precision", choices=("int8", "int4"))
    quantizing.add_argument("--name", metavar="NAME[:VERSION]", help="default: the model's name and the precision")
    inspecting = commands.add_parser("inspect", help="say what a folder or a repository is and what to do with it")
    inspecting.set_defaults(run=_inspect)
    inspecting.add_argument("source", metavar="DIR|OWNER/NAME")
    commands.add_parser("list", help="show what is in the store").set_defaults(run=_list)
    return parser


def _family_options() -> dict[str, ImportOption]:
    return {option.name: option for family in FAMILIES.values() for option in family.options}


def _import(arguments: argparse.Namespace) -> None:
    chosen = {name: getattr(arguments, name.replace("-", "_")) for name in _family_options()}
    options = {name: str(value) for name, value in chosen.items() if value is not None}
    if arguments.source and arguments.folder:
        raise ImportRefused(f"give one source: {arguments.source} or --from {arguments.folder}")
    family, text = arguments.family, arguments.source or arguments.folder
    if text is None:
        text, family = family, _proposed_family(family)
    repository = None if arguments.folder else hub.parse(text)
    name, origin = arguments.name, None
    with _interruptible_progress() as progress:
        if repository is None:
            source = Path(text)
        else:
            source, origin = hub.download(repository, progress), str(repository)
            name = name or repository.default_name
        tag = import_model(family, source, name, options, progress, arguments.adapter, arguments.tokenizer, origin)
    model = _print_stored(tag)
    if model.metadata.get("weights_only"):
        print("Warning: the folder has no tokenizer.model, so only the weights were imported; it cannot be served.")


def _proposed_family(text: str) -> str:
    """The family that fits a folder or a repository, once the operator agrees. Raises ImportRefused."""
    if text in FAMILIES:
        raise ImportRefused(f"which model? import {text} OWNER/NAME, or import {text} --from DIR")
    found = _inspected(text)
    if found.family is None:
        raise ImportRefused(f"{text} is {found}")
    command = _import_command(found.family, text)
    if not sys.stdin.isatty():
        raise ImportRefused(f"{text} is {found.what}; to import it as that: {command}")
    if input(f"{text} is {found.what}. {command}? [y/N] ").strip().lower() not in ("y", "yes"):
        raise ImportRefused("nothing was imported; name the family: import FAMILY --from DIR")
    return found.family


def _inspected(text: str) -> Inspection:
    """Of a repository the small files are enough."""
    from models.checkpoints.inspection import inspect  # imports torch, which `list` does not need

    repository = hub.parse(text)
    if repository is None or repository.file is not None:
        return inspect(Path(text))
    with _interruptible_progress() as progress:
        return inspect(hub.download(repository, progress, with_weights=False))


def _inspect(arguments: argparse.Namespace) -> None:
    found = _inspected(arguments.source)
    if found.family is None:
        print(f"{arguments.source} is {found}")
    else:
        print(f"{arguments.source} is {found.what}\n{_import_command(found.family, arguments.source)}")


def _import_command(family: str, text: str) -> str:
    return f"import {family} {text}" if hub.parse(text) else f"import {family} --from {text}"


def _quantize(arguments: argparse.Namespace) -> None:
    with _interruptible_progress() as progress:
        tag = quantize_model(arguments.tag, arguments.precision, arguments.name, progress)
    _print_stored(tag)


@contextmanager
def _interruptible_progress() -> Iterator[InterruptibleProgress]:
    printer = ProgressPrinter(sys.stderr)
    progress = InterruptibleProgress(printer)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, progress.on_signal)
    try:
        yield progress
    finally:
        printer.close()


def _print_stored(tag: str) -> StoredModel:
    model = resolve(tag)
    print(f"{tag} is in the model store ({readable_bytes(_size_on_disk(model.path))}, {model.path})")
    return model


def _list(arguments: argparse.Namespace) -> None:
    """Print a table of the models, the newest last."""
    rows = [("TAG", "FAMILY", "PRECISION", "SIZE", "CONTEXT", "IMPORTED")]
    for model in sorted(stored_models(), key=lambda model: (model.metadata["imported"], model.tag)):
        metadata = model.metadata
        precision, original = str(metadata.get("dtype", "?")), metadata.get("source_precision")
        rows.append(
            (
                model.tag,
                model.family,
                precision if original in (None, precision) else f"{precision} (from {original})",
                readable_bytes(_size_on_disk(model.path)),
                str(metadata.get("context_length", "?")),
                str(metadata["imported"]),
            )
        )
    if len(rows) == 1:
        print("There are no models yet; import one: python -m models.store import FAMILY --from DIR")
        return
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _size_on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
