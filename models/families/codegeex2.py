"""CodeGeeX2-6B: ChatGLM2's network and prompt with a tokenizer that adds no space in front. For writing code.

CodeGeeX2 is a base model: it is at its best continuing raw code, `# language: Python\\n# write a bubble sort\\n`,
through `/v1/completions`; the language tag is the caller's business. For chat its authors' demonstration server calls
the checkpoint's `chat`, which writes ChatGLM2's `[Round n]` prompt. So does this family: it keeps the history of a
conversation, where gluing messages together would lose who said what.
The tokenizer's own flag (add_dummy_prefix) is read by sentencepiece from the model file.
Sources: README and demo/fastapicpu.py of CodeGeeX2.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernels.precision import Precision, Progress
from models.families.chatglm2 import ROPE, import_network, load_network, open_format
from models.family import Family, LoadedNetwork

if TYPE_CHECKING:
    import torch


def _load(
    folder: Path, metadata: Mapping[str, Any], device: torch.device, precision: Precision, progress: Progress
) -> LoadedNetwork:
    return load_network(folder, metadata, device, precision, progress, open_format(folder))


FAMILY = Family(
    name="codegeex2",
    title="CodeGeeX2-6B, also -int4",
    import_checkpoint=import_network,
    load=_load,
    options=(ROPE,),
    open_format=open_format,
)
