"""Numbers of the host for the device, sent without waiting for what the device is doing. A leaf."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor on `device`, in its turn. Plain `.to` would first wait for every step under way on a GPU.

    The copy is made from pinned memory, which torch keeps until the copy is done.
    """
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def send_numbers(numbers: Sequence[int], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """[numbers] on `device`."""
    return send(torch.tensor(numbers, dtype=dtype), device)
