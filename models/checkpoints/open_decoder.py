"""A folder of safetensors and a transformers configuration -> the fastest CausalLM for a device and a precision."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from kernels import linears
from kernels.precision import Precision, Progress
from models.checkpoints.quantized import is_quantized, load_quantized
from models.checkpoints.transformers_lock import TRANSFORMERS_LOCK
from models.networks.flat_decoder import FlatDecoder, can_flatten
from models.networks.transformers_decoder import TransformersDecoder
from serving.engine.interface import CausalLM


def open_decoder(
    folder: Path, device: torch.device, precision: Precision, progress: Progress, num_tokens: int, max_positions: int
) -> CausalLM:
    """Raises ImportRefused for weights stored in another quantised precision, and what `load_transformers` raises."""
    if is_quantized(folder, precision):
        model = load_quantized(folder, progress)
    else:
        model = load_transformers(folder, device, precision, progress)
    if can_flatten(model):
        return FlatDecoder(model, precision, num_tokens, max_positions, progress, device)
    linears.pack(model, precision, device, progress)
    return TransformersDecoder(model, num_tokens, max_positions)


def load_transformers(folder: Path, device: torch.device, precision: Precision, progress: Progress) -> PreTrainedModel:
    """A transformers model, its weights mapped from safetensors and frozen, not packed yet; see `linears.load_device`.

    No network access, no code from the folder. Raises OSError or ValueError if transformers cannot load it by itself.
    """
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    load_device = linears.load_device(precision, device)
    disable_progress_bar()  # it would write into the server's log; `progress` reports to the caller
    progress(0, total, "weights")
    stored = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False).dtype
    with TRANSFORMERS_LOCK:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=linears.storage_dtype(precision, device, stored or torch.float32),
            # a device map sends every tensor to the device as it is read; on a CPU that happens anyway
            device_map=None if load_device.type == "cpu" else {"": load_device},
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    progress(total, total, "weights")
    return cast("PreTrainedModel", model.requires_grad_(False))
