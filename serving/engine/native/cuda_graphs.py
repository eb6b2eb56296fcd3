"""Rows of a decode step -> hidden states and logits, by replaying a captured forward pass of fixed shape.

A decode step of a large network is a thousand small launches, which cost a fast card's host more time than the card
needs to run them. Here the rows of a step are padded to the next bucket and written into buffers that never move, so
that one captured graph serves every step of its bucket. Padding rows are token 0 at index 0 in a block of no sequence.

A graph replays what depends on nothing but the buffers. A network sees only its batch, so a graph can be replayed for
every batch whose spans are those it was captured with: one row each, causal.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from serving.engine.interface import CAUSAL, CausalLM, RaggedBatch, Span
from serving.engine.native.attention_cuda import Kernel, Packed, PackedAttention
from serving.engine.native.kv_memory import KVMemory
from serving.engine.native.sequence import BLOCK

logger = logging.getLogger(__name__)

MAX_BUCKET = 256
START_SECONDS = 30.0  # for capturing before the first request; the other buckets are captured when they are needed

# Takes a function that writes the same tensors at each call; returns a function that does the same, only faster.
CaptureFunction = Callable[[Callable[[], None]], Callable[[], None]]


def run_eagerly(run: Callable[[], None]) -> Callable[[], None]:
    """The capture function of devices without graphs."""
    run()
    return run


class CudaCapture:
    """Captures CUDA graphs. All share one memory pool, as no two of them ever run at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        with torch.cuda.device(self._device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # libraries initialize themselves in the first run, outside of the graph
                run()
                run()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                run()
        return graph.replay


@dataclass(frozen=True)
class Rows:
    """The rows of a step, on the host."""

    token_ids: list[int]
    indices: list[int]  # in their own sequence, from 0
    tables: list[Sequence[int]]  # the block table of their sequence
    is_causal: bool  # whether all sequences are causal


class DecodeGraph:
    """The forward pass of one bucket, with its buffers and its results."""

    def __init__(self, network: CausalLM, memory: KVMemory, kernel: Kernel, size: int, num_trained: int) -> None:
        device = network.device
        self._network, self._scratch, self._num_trained = network, memory.scratch_block, num_trained
        max_length = num_trained + network.shape.max_positions
        max_blocks = -(-max_length // BLOCK)
        self._staging = torch.zeros((size, 2 + max_blocks), dtype=torch.int32, pin_memory=device.type == "cuda")
        self._staging[:, 2:] = self._scratch
        self._num_rows = 0  # that `_staging` holds; padding follows
        self._written: list[tuple[Sequence[int], int, int] | None] = [None] * size  # the table in each row of it
        self._numbers = torch.zeros((size, 2 + max_blocks), dtype=torch.int32, device=device)  # the columns of Rows
        # token ids, indices in the cache, blocks, offsets, positions
        self._places = torch.zeros((5, size), dtype=torch.int64, device=device)
        self._packed = Packed(
            offsets=torch.arange(size + 1, dtype=torch.int32, device=device),
            tables=torch.zeros((size, max_blocks), dtype=torch.int32, device=device),
            lengths=torch.ones(size, dtype=torch.int32, device=device),
            max_rows=1,
            max_length=max_length,
        )
        token_ids, _, blocks, offsets, positions = self._places.unbind(0)
        self._batch = RaggedBatch(token_ids, positions, tuple(Span(i, i + 1, CAUSAL) for i in range(size)))
        self._attend = PackedAttention(memory, blocks, offsets, self._packed, kernel)
        self.hidden = self.logits = torch.empty(0, device=device)

    def forward(self) -> None:
        """From the buffers to the results."""
        self._places[:2].copy_(self._numbers[:, :2].T)
        self._packed.tables.copy_(self._numbers[:, 2:])
        indices = self._places[1]
        torch.add(self._numbers[:, 1], 1, out=self._packed.lengths)
        self._places[2].copy_(self._packed.tables.gather(1, (indices // BLOCK)[:, None])[:, 0])
        torch.remainder(indices, BLOCK, out=self._places[3])
        torch.sub(indices, self._num_trained, out=self._places[4]).clamp_(min=0)  # of padding rows too
        self.hidden = self._network.forward(self._batch, self._attend)
        self.logits = self._network.logits(self.hidden)

    def write(self, rows: Rows) -> None:
        """Fill the buffers. The last step's results have been read, so no kernel reads the buffers any more."""
        num_rows = len(rows.token_ids)
        self._staging[:num_rows, :2] = torch.tensor((rows.token_ids, rows.indices), dtype=torch.int32).T
        for row, table in enumerate(rows.tables):
            written = (table, len(table), table[-1])
            if not _is_same(self._written[row], written):
                blocks = torch.tensor(table[: self._staging.shape[1] - 2], dtype=torch.int32)
                self._staging[row, 2 : 2 + len(blocks)] = blocks
                self._written[row] = written
        for row in range(num_rows, self._num_rows):  # padding from now on
            self._staging[row, :2], self._staging[row, 2:], self._written[row] = 0, self._scratch, None
        self._num_rows = num_rows
        self._numbers.copy_(self._staging, non_blocking=True)


def _is_same(a: tuple[Sequence[int], int, int] | None, b: tuple[Sequence[int], int, int]) -> bool:
    """Whether two steps' row has the same block table: the same list, which only grows, of the same length."""
    return a is not None and a[0] is b[0] and a[1:] == b[1:]


class DecodeGraphs:
    """Graphs of decode steps by bucket. Called by the engine thread; `capture_all` before that thread runs."""

    def __init__(
        self,
        network: CausalLM,
        memory: KVMemory,
        kernel: Kernel,
        capture: CaptureFunction,
        max_rows: int,
        num_trained: int = 0,
    ) -> None:
        self._network, self._memory, self._kernel, self._capture = network, memory, kernel, capture
        self._num_trained = num_trained
        self._sizes = bucket_sizes(max_rows)
        self._graphs: dict[int, tuple[DecodeGraph, Callable[[], None]]] = {}  # size -> the graph, its replay
        self._is_broken = False
        self.capture_seconds = 0.0  # of all graphs so far

    @property
    def num_captured(self) -> int:
        return len(self._graphs)

    def capture_all(self, max_seconds: float = START_SECONDS) -> None:
        """Capture the buckets, small ones first, for at most `max_seconds`; logs the progress."""
        begun = time.monotonic()
        for number, size in enumerate(self._sizes, 1):
            if self._is_broken or time.monotonic() - begun > max_seconds:
                break
            self._graph(size)
            logger.info(
                "decode graphs: %d of %d, up to %d rows, %.1f s",
                number, len(self._sizes), size, time.monotonic() - begun,
            )  # fmt: skip

    def can_run(self, rows: Rows) -> bool:
        """Whether a graph exists or can be captured for a step of these decode rows."""
        is_short = max(rows.indices) < self._num_trained + self._network.shape.max_positions
        return not self._is_broken and len(rows.token_ids) <= self._sizes[-1] and rows.is_causal and is_short

    def run(self, rows: Rows) -> tuple[Tensor, Tensor] | None:
        """Hidden states [rows, hidden_size] and logits [rows, vocab_size] of these rows, valid until the next step.

        None if the forward pass cannot be captured on this device, which will not change.
        """
        num_rows = len(rows.token_ids)
        found = self._graph(next(size for size in self._sizes if size >= num_rows))
        if found is None:
            return None
        graph, replay = found
        graph.write(rows)
        replay()
        return graph.hidden[:num_rows], graph.logits[:num_rows]

    def _graph(self, size: int) -> tuple[DecodeGraph, Callable[[], None]] | None:
        if size in self._graphs or self._is_broken:
            return self._graphs.get(size)
        begun = time.monotonic()
        graph = DecodeGraph(self._network, self._memory, self._kernel, size, self._num_trained)
        graph.write(Rows([], [], [], True))
        try:
            self._graphs[size] = graph, self._capture(graph.forward)
        except Exception:
            # a network that reads from its device, or no memory left: everything works without graphs, slower
            logger.warning("decode steps cannot be captured as graphs; they run eagerly", exc_info=True)
            self._is_broken = True
            self._graphs.clear()
        self.capture_seconds += time.monotonic() - begun
        return self._graphs.get(size)


def bucket_sizes(max_rows: int) -> Sequence[int]:
    """Powers of two, the last one at least `max_rows` where MAX_BUCKET allows."""
    sizes = [1]
    while sizes[-1] < min(max_rows, MAX_BUCKET):
        sizes.append(2 * sizes[-1])
    return sizes
