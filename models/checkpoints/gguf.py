"""A GGUF file -> a Hugging Face folder, by transformers' own reader: weights in 16 bits, tokenizer, chat template.

The values of the file's own quantisation are kept as closely as 16 bits allow; they can be quantised here again.
"""

from __future__ import annotations

from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from kernels.precision import Progress
from models.checkpoints.files import require_space, write_json
from models.checkpoints.shards import ShardWriter
from models.checkpoints.transformers_lock import TRANSFORMERS_LOCK
from models.family import ImportRefused

LARGEST_HALF = 65504.0


def find_gguf(source: Path) -> Path | None:
    """`source` itself, or the only GGUF file of a folder that is no checkpoint otherwise. Raises ImportRefused."""
    if source.suffix == ".gguf" and source.is_file():
        return source
    if not source.is_dir() or (source / "config.json").is_file():
        return None
    files = sorted(source.glob("*.gguf"))
    if len(files) > 1:
        raise ImportRefused(f"{source} holds {len(files)} GGUF files: give one of them, such as --from {files[0]}")
    return files[0] if files else None


def unpack(file: Path, target: Path, progress: Progress) -> None:
    """Write the model in `file` into the folder `target`, made here. Raises ImportRefused."""
    from transformers import AutoModelForCausalLM, AutoTokenizer  # seconds to import

    size = file.stat().st_size
    progress(0, size, "reading GGUF")
    where: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True, "trust_remote_code": False}
    try:
        # its progress bar would be drawn into the command's own
        with TRANSFORMERS_LOCK, redirect_stderr(StringIO()):
            tokenizer = AutoTokenizer.from_pretrained(file.parent, **where)
            model = cast("Any", AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **where))
    except ImportError as error:
        raise ImportRefused(f"GGUF files need the package gguf: {str(error).strip().splitlines()[0]}") from None
    except Exception as error:  # noqa: BLE001 - neither transformers nor gguf documents its exceptions
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise ImportRefused(f"transformers cannot read {file.name}: {reason}") from None
    progress(size, size, "reading GGUF")
    target.mkdir()
    state: dict[str, Tensor] = model.state_dict()
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    require_space(target, sum(2 * tensor.numel() for tensor in state.values()))
    fits = all(float(tensor.abs().max()) < LARGEST_HALF for tensor in state.values())
    dtype = torch.float16 if fits else torch.bfloat16
    writer = ShardWriter(target)
    for name, tensor in state.items():
        writer.add(name, tensor.to(dtype))
    writer.finish()
    config = {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    write_json(target / "config.json", config | {"dtype": str(dtype).removeprefix("torch.")})
    tokenizer.save_pretrained(target)
