"""Decode steps with fixed shapes, recorded once and replayed: on a GPU as CUDA graphs. Knows rows; decides nothing.

A decode step of a large network is a thousand small launches, which take a fast card longer to be told than to do.
Here the rows of a step are padded to the next bucket and written into buffers that never move, so that one recording of
the forward pass serves every step of its bucket. Padding rows are token 0 at index 0 in a place that nobody owns.

A recording replays what depends on nothing but the buffers. A network sees only its batch, so it may be replayed for
every batch whose spans are those it was recorded with: one row each, causal.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from serving.engine.interface import CAUSAL, CausalLM, RaggedBatch, Span
from serving.engine.native.attention import KVMemory
from serving.engine.native.attention_cuda import Kernel, Packed, PackedAttention
from serving.engine.native.batch import Rows

logger = logging.getLogger(__name__)

MAX_BUCKET = 256
START_SECONDS = 30.0  # for recording before the first request; buckets that are left are recorded when they are needed

# Runs a function that writes the same tensors each time it is called, and returns what does that again, only faster.
Recorder = Callable[[Callable[[], None]], Callable[[], None]]


def play_eagerly(run: Callable[[], None]) -> Callable[[], None]:
    """The recorder of devices that cannot record."""
    run()
    return run


class CudaRecorder:
    """Records CUDA graphs. All share one pool of memory, as no two of them are ever under way."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        with torch.cuda.device(self._device):
            beside = torch.cuda.Stream()
            beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(beside):  # libraries set themselves up in the first run, which no graph may hold
                run()
                run()
            torch.cuda.current_stream().wait_stream(beside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                run()
        return graph.replay


@dataclass(frozen=True)
class Decoded:
    """What a forward pass gave, for the rows that were asked for. Valid until the next step."""

    hidden: Tensor  # [rows, hidden_size]
    logits: Tensor  # [rows, vocab_size]


class Recording:
    """The forward pass of one bucket, its buffers and its results."""

    def __init__(self, network: CausalLM, memory: KVMemory, kernel: Kernel, size: int, scratch: int) -> None:
        """scratch: a place that no sequence owns."""
        device = network.device
        self._network, self._scratch = network, scratch
        self._staging = torch.empty((4, size), dtype=torch.int64, pin_memory=device.type == "cuda")
        self._numbers = torch.zeros((4, size), dtype=torch.int64, device=device)  # ids, indices, places, first places
        self._packed = Packed(
            offsets=torch.arange(size + 1, dtype=torch.int32, device=device),
            starts=torch.zeros(size + 1, dtype=torch.int32, device=device),
            lengths=torch.ones(size, dtype=torch.int32, device=device),
            max_rows=1,
            max_length=network.shape.max_positions,
        )
        token_ids, indices, places, _ = self._numbers.unbind(0)
        self._batch = RaggedBatch(token_ids, indices, tuple(Span(i, i + 1, CAUSAL) for i in range(size)))
        self._attend = PackedAttention(memory, places, self._packed, kernel)
        self.hidden = self.logits = torch.empty(0, device=device)

    def forward(self) -> None:
        """From the buffers to the results."""
        _, indices, _, starts = self._numbers.unbind(0)
        self._packed.starts[:-1].copy_(starts)
        torch.add(indices, 1, out=self._packed.lengths)
        self.hidden = self._network.forward(self._batch, self._attend)
        self.logits = self._network.logits(self.hidden)

    def write(self, rows: Rows) -> None:
        """Fill the buffers. The last step's results have been read, so nothing reads the buffers any more."""
        padding = self._staging.shape[1] - len(rows.token_ids)
        scratch = [self._scratch] * padding
        zeros = [0] * padding
        columns = (rows.token_ids + zeros, rows.indices + zeros, rows.places + scratch, rows.starts + scratch)
        self._staging.copy_(torch.tensor(columns, dtype=torch.int64))
        self._numbers.copy_(self._staging, non_blocking=True)


class DecodeGraphs:
    """Forward passes of decode steps by bucket. Called by the engine thread; `prepare` before there is one."""

    def __init__(
        self, network: CausalLM, memory: KVMemory, kernel: Kernel, record: Recorder, max_rows: int, scratch: int
    ) -> None:
        self._network, self._memory, self._kernel, self._record = network, memory, kernel, record
        self._scratch = scratch
        self._sizes = bucket_sizes(max_rows)
        self._recordings: dict[int, tuple[Recording, Callable[[], None]]] = {}
        self._is_broken = False
        self.record_seconds = 0.0  # all recordings so far

    @property
    def num_recorded(self) -> int:
        return len(self._recordings)

    def prepare(self, max_seconds: float = START_SECONDS) -> None:
        """Record the buckets, small ones first, for as long as `max_seconds`. Says in the log how far it is."""
        begun = time.monotonic()
        for number, size in enumerate(self._sizes, 1):
            if self._is_broken or time.monotonic() - begun > max_seconds:
                break
            self._recorded(size)
            logger.info(
                "decode graphs: %d of %d, up to %d rows, %.1f s",
                number, len(self._sizes), size, time.monotonic() - begun,
            )  # fmt: skip

    def can_run(self, rows: Rows) -> bool:
        """Whether a step that decodes these rows, each for itself, fits a recording."""
        is_short = max(rows.indices) < self._network.shape.max_positions
        return not self._is_broken and len(rows.token_ids) <= self._sizes[-1] and rows.is_causal and is_short

    def run(self, rows: Rows) -> Decoded | None:
        """The forward pass of these rows; None if it cannot be recorded here, which will not change."""
        num_rows = len(rows.token_ids)
        found = self._recorded(next(size for size in self._sizes if size >= num_rows))
        if found is None:
            return None
        recording, play = found
        recording.write(rows)
        play()
        return Decoded(recording.hidden[:num_rows], recording.logits[:num_rows])

    def _recorded(self, size: int) -> tuple[Recording, Callable[[], None]] | None:
        if size in self._recordings or self._is_broken:
            return self._recordings.get(size)
        begun = time.monotonic()
        recording = Recording(self._network, self._memory, self._kernel, size, self._scratch)
        recording.write(Rows([], [], [], [], True))
        try:
            self._recordings[size] = recording, self._record(recording.forward)
        except Exception:
            # a network that asks its device something, or no memory left: everything works without graphs, slower
            logger.warning("decode steps cannot be recorded; the engine goes on without", exc_info=True)
            self._is_broken = True
            self._recordings.clear()
        self.record_seconds += time.monotonic() - begun
        return self._recordings.get(size)


def bucket_sizes(max_rows: int) -> Sequence[int]:
    """Powers of two, the last one at least `max_rows` where MAX_BUCKET allows."""
    sizes = [1]
    while sizes[-1] < min(max_rows, MAX_BUCKET):
        sizes.append(2 * sizes[-1])
    return sizes
