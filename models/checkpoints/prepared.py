"""A checkpoint folder as people have it -> a folder as an import expects it: adapters merged, names without wrappers.

Tools leave prefixes in the names of tensors (`module.` of data parallelism, `_orig_mod.` of torch.compile,
`base_model.model.` of peft), and trainers leave folders without tokenizer files. A GGUF file becomes a folder first.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kernels.precision import Progress
from models.checkpoints import lora
from models.checkpoints.files import link_or_copy, require_space
from models.checkpoints.gguf import find_gguf, unpack
from models.checkpoints.shards import SINGLE_FILES, ShardWriter, find_shards, inspect_shards, read_tensors
from models.family import ImportRefused

WRAPPERS = ("module.", "_orig_mod.", "base_model.model.")
TOKENIZER_PATTERNS = ("token*", "*.model", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json",
                      "chat_template*", "*.jinja")  # fmt: skip


def prepared(
    source: Path, adapters: Sequence[lora.AdapterFolder], tokenizer: Path | None, target: Path, progress: Progress
) -> Path:
    """`source` itself if nothing has to change, else `target`, made here, with links to the files that stay.

    tokenizer: where files of a tokenizer are taken from that `source` lacks. Raises ImportRefused.
    """
    file = find_gguf(source)
    if file is not None:
        source = target.with_name(f"{target.name}-gguf")
        unpack(file, source, progress)
    if not (source / "config.json").is_file():
        return source  # the import says what is missing
    shards = find_shards(source)
    found = inspect_shards(shards)
    wrapper = wrapper_of(list(found))
    if not adapters and tokenizer is None and not wrapper:
        return source
    target.mkdir()
    weights = {path.name for path in shards} | {f"{name}.index.json" for name in SINGLE_FILES} | set(SINGLE_FILES)
    for path in source.iterdir():
        if path.is_file() and path.name not in weights:
            link_or_copy(path, target / path.name)
    if tokenizer is not None:
        _add_tokenizer(tokenizer, target)
    if not adapters and not wrapper:
        for path in source.iterdir():
            if path.name in weights:
                link_or_copy(path, target / path.name)
        return target
    merging = lora.read_all(adapters)
    infos = {name.removeprefix(wrapper): info for name, info in found.items()}
    for adapter in merging:
        adapter.check(infos)
    require_space(target, sum(info.num_bytes for info in infos.values()))
    writer = ShardWriter(target)
    what = "merging adapters" if adapters else "renaming tensors"
    for full_name, original in read_tensors(shards, progress, what):
        name, tensor = full_name.removeprefix(wrapper), original
        for adapter in merging:
            tensor = adapter.merged(name, tensor)
        writer.add(name, tensor)
    writer.finish()
    return target


def wrapper_of(names: list[str]) -> str:
    """The prefixes that all names have in common, of those that tools leave."""
    found = ""
    while names and (prefix := next((p for p in WRAPPERS if all(name.startswith(p) for name in names)), "")):
        found += prefix
        names = [name.removeprefix(prefix) for name in names]
    return found


def _add_tokenizer(tokenizer: Path, target: Path) -> None:
    files = {path for pattern in TOKENIZER_PATTERNS for path in tokenizer.glob(pattern) if path.is_file()}
    if not files:
        raise ImportRefused(f"--tokenizer {tokenizer}: there are no files of a tokenizer in it")
    for path in sorted(files):
        if not (target / path.name).exists():
            link_or_copy(path, target / path.name)
