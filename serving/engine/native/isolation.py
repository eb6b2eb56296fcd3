"""Keeps a fault where it belongs: one row's in its row. Knows the sampler; decides nothing about requests."""

from __future__ import annotations

import logging

from torch import Tensor

from serving.engine.native.device import is_out_of_memory
from serving.engine.native.sampler import SampledToken, Sampler
from serving.engine.native.sequence import SequenceState
from serving.safe_traceback import where_from

logger = logging.getLogger(__name__)


def sample_isolated(sampler: Sampler, logits: Tensor, sequences: list[SequenceState]) -> list[SampledToken]:
    """`sampler.sample`, but where that raises, row by row: only the rows that raise alone fail.

    Raises what the sampler raised if no row of several can be sampled: then it is not the rows' fault.
    """
    try:
        return sampler.sample(logits, sequences)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        logger.error("sampling %d rows together failed; each is tried alone: %s", len(sequences), where_from(error))
        sampled = [_sample_one(sampler, logits[row : row + 1], sequence) for row, sequence in enumerate(sequences)]
        if len(sampled) > 1 and all(item.is_fault for item in sampled):
            raise
        return sampled


def _sample_one(sampler: Sampler, logits: Tensor, sequence: SequenceState) -> SampledToken:
    try:
        return sampler.sample(logits, [sequence])[0]
    except Exception as error:  # noqa: BLE001
        # the row's request is told; the traceback of the whole batch is in the log already
        logger.error("sequence %d cannot be sampled: %s", sequence.id, type(error).__name__)
        return SampledToken(None, is_fault=True)
