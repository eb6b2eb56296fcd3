"""Implements `Engine` on vLLM's AsyncLLM: token ids in, token outputs into the request's queue.

vLLM's tokenizer, detokenizer, stop strings and chat templates are not used. Imports vllm, which has an environment of
its own (requirements-vllm.txt).
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from typing import Any, cast
from uuid import uuid4

from vllm import SamplingParams as VllmSampling
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.inputs import TokensPrompt
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.metrics.stats import IterationStats, SchedulerStats

from serving.engine.interface import (
    EngineCapabilities,
    EngineLimits,
    EngineStats,
    NetworkShape,
    SamplingParams,
    TokenMask,
)
from serving.engine.output_queue import OutputQueue, SequenceCommand
from serving.engine.outputs import (
    EngineStopped,
    PoolingOutput,
    RequestFailed,
    RequestTooLarge,
    TokenLogprob,
    TokenOutput,
)
from serving.engine.vllm.known_tokens import KNOWN_TOKENS, NUM_TOKENS, SPECIFICATION, MaskMaker
from serving.safe_traceback import where_from

logger = logging.getLogger(__name__)

MAX_TOP_LOGPROBS = 20


def engine_arguments(
    folder: str,
    limits: EngineLimits,
    num_tokens: int,
    context_length: int,
    options: Mapping[str, Any],
    masks: MaskMaker,
) -> AsyncEngineArgs:
    """The engine's configuration. options: vLLM's own arguments, which override ours. Raises TypeError for unknown
    names."""
    arguments: dict[str, Any] = {
        "model": folder,
        "skip_tokenizer_init": True,
        "generation_config": "vllm",  # every setting comes with the request
        "max_model_len": context_length,
        "max_num_seqs": limits.max_sequences,
        "max_logprobs": MAX_TOP_LOGPROBS,
        "enable_prefix_caching": True,
        "scheduling_policy": "priority",
        "logits_processors": [KNOWN_TOKENS, masks.processor],
        "additional_config": {NUM_TOKENS: num_tokens, **masks.config},
        "enable_log_requests": False,
    }
    return AsyncEngineArgs(**{**arguments, **options})


class Statistics(StatLoggerBase):
    """Sums of what vLLM reports. vLLM makes one for each of its engine cores and calls it in the event loop."""

    def __init__(self, vllm_config: VllmConfig, engine_index: int = 0) -> None:
        self.num_steps = 0
        self.num_running = self.num_waiting = 0
        self.kv_usage = 0.0
        self.preemptions = self.prompt_tokens = self.cached_tokens = self.generated_tokens = 0
        self.queue_seconds: deque[float] = deque(maxlen=4096)

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: object = None,
        engine_idx: int = 0,
    ) -> None:
        self.num_steps += 1
        if scheduler_stats is not None:
            self.num_running = scheduler_stats.num_running_reqs
            self.num_waiting = scheduler_stats.num_waiting_reqs
            self.kv_usage = scheduler_stats.kv_cache_usage
            self.cached_tokens += scheduler_stats.prefix_cache_stats.hits
        if iteration_stats is not None:
            self.preemptions += iteration_stats.num_preempted_reqs
            self.prompt_tokens += iteration_stats.num_prompt_tokens
            self.generated_tokens += iteration_stats.num_generation_tokens
            self.queue_seconds.extend(request.queued_time for request in iteration_stats.finished_requests)

    def log_engine_initialized(self) -> None:
        """vLLM's own loggers do that."""


class VllmEngine:
    """vLLM's AsyncLLM as an engine. It runs the network in processes of its own."""

    capabilities = EngineCapabilities(has_embeddings=False)

    def __init__(self, arguments: AsyncEngineArgs, limits: EngineLimits, shape: NetworkShape) -> None:
        """Load the weights, which takes minutes for large models. limits.kv_tokens is replaced by vLLM's own number.
        Any thread."""
        self._statistics: list[Statistics] = []
        config = arguments.create_engine_config()
        self._llm = AsyncLLM.from_vllm_config(config, stat_loggers=[self._new_statistics])
        cache = config.cache_config
        kv_tokens = (cache.num_gpu_blocks or 0) * cache.block_size
        self.limits = EngineLimits(limits.max_sequences, limits.max_batch_tokens, kv_tokens)
        self.shape = shape
        self.max_model_len: int = config.model_config.max_model_len
        self._queues: dict[asyncio.Task[None], OutputQueue[TokenOutput]] = {}  # of the requests in flight
        self._is_stopped = False

    def _new_statistics(self, vllm_config: VllmConfig, engine_index: int = 0) -> Statistics:
        statistics = Statistics(vllm_config, engine_index)
        self._statistics.append(statistics)
        return statistics

    @property
    def is_alive(self) -> bool:
        return not (self._is_stopped or self._llm.errored)

    @property
    def is_busy(self) -> bool:
        return bool(self._queues)

    @property
    def step_size(self) -> float:
        """See Engine: vLLM divides every prompt."""
        return 0.0

    @property
    def num_steps(self) -> int:
        return sum(each.num_steps for each in self._statistics)

    @property
    def queue_seconds(self) -> deque[float]:
        return self._statistics[0].queue_seconds if self._statistics else deque()

    def stats(self) -> EngineStats:
        kv_tokens = self.limits.kv_tokens
        usage = max((each.kv_usage for each in self._statistics), default=0.0)
        return EngineStats(
            num_running=sum(each.num_running for each in self._statistics),
            num_waiting=sum(each.num_waiting for each in self._statistics),
            kv_tokens_used=round(usage * kv_tokens),
            kv_tokens_cached=0,
            kv_tokens_total=kv_tokens,
            preemptions=sum(each.preemptions for each in self._statistics),
            prompt_tokens=sum(each.prompt_tokens for each in self._statistics),
            cached_tokens=sum(each.cached_tokens for each in self._statistics),
            generated_tokens=sum(each.generated_tokens for each in self._statistics),
        )

    def generate(
        self,
        prompt_ids: Sequence[int],
        samplings: Sequence[SamplingParams],
        queue: OutputQueue[TokenOutput],
        first_index: int = 0,
        priority: int = 0,
        masks: Sequence[TokenMask | None] | None = None,
    ) -> None:
        """See Engine. Each answer is a request of vLLM's, whose prefix cache computes the prompt once."""
        needed = len(prompt_ids) + max(sampling.max_tokens for sampling in samplings)
        size = min(self.limits.kv_tokens, self.max_model_len)
        if needed > size:
            raise RequestTooLarge(
                f"prompt and answer need {needed} tokens of cache, and there are {size}", needed, size
            )
        if not self.is_alive:
            raise EngineStopped("the engine is not running")
        for i, (sampling, mask) in enumerate(zip(samplings, masks or [None] * len(samplings), strict=True)):
            request = VllmRequest(self._llm, list(prompt_ids), sampling, mask, priority, queue, first_index + i)
            queue.add(first_index + i, request)
            self._queues[request.task] = queue
            request.task.add_done_callback(self._queues.pop)

    def embed(self, texts: Sequence[tuple[Sequence[int], range]], queue: OutputQueue[PoolingOutput]) -> None:
        raise RequestFailed("vLLM either generates or embeds; this one generates")

    def give_up(self) -> None:
        """See Engine. Called in the event loop."""
        for queue in set(self._queues.values()):
            queue.fail(EngineStopped("the engine makes no progress"))

    def stop(self, max_seconds: float | None = None) -> None:
        """End vLLM's processes; requests in flight get EngineStopped."""
        self._is_stopped = True
        self._llm.shutdown(max_seconds)


class VllmRequest:
    """One answer: a task that reads vLLM's outputs. Implements RunningSequence: vLLM aborts a request whose reader is
    cancelled, and joins the outputs that wait for a paused one."""

    def __init__(
        self,
        llm: AsyncLLM,
        prompt_ids: list[int],
        sampling: SamplingParams,
        mask: TokenMask | None,
        priority: int,
        queue: OutputQueue[TokenOutput],
        index: int,
    ) -> None:
        self._llm, self._prompt_ids, self._sampling, self._mask = llm, prompt_ids, sampling, mask
        self._priority, self._queue, self._index = priority, queue, index
        self._is_resumed = asyncio.Event()
        self._is_resumed.set()
        self.task = asyncio.create_task(self._read())

    @property
    def prompt_progress(self) -> None:
        """See RunningSequence: vLLM does not say how far a prompt is."""
        return None

    def send(self, command: SequenceCommand) -> None:
        """See RunningSequence."""
        match command:
            case "cancel":
                self.task.cancel()
            case "pause":
                self._is_resumed.clear()
            case "resume":
                self._is_resumed.set()

    async def _read(self) -> None:
        try:
            await self._read_outputs()
        except EngineDeadError:
            self._queue.put([(self._index, EngineStopped("vLLM's engine process has ended"))])
        except Exception as error:
            logger.exception("vLLM could not answer one request")
            self._queue.put([(self._index, RequestFailed(f"vLLM could not answer: {type(error).__name__}"))])

    async def _read_outputs(self) -> None:
        prompt = TokensPrompt(prompt_token_ids=self._prompt_ids)
        parameters = to_vllm(self._sampling, self._mask.specification if self._mask else None)
        outputs = self._llm.generate(prompt, parameters, f"{uuid4().hex}-{self._index}", priority=self._priority)
        async with aclosing(outputs):
            async for output in outputs:
                for token in to_token_outputs(cast("RequestOutput", output), self._sampling.num_top_logprobs):
                    if self._mask is not None and not _is_accepted(self._mask, token.token_id):
                        self._queue.put([(self._index, RequestFailed("its mask refused a token"))])
                        return
                    self._queue.put([(self._index, token)])
                await self._is_resumed.wait()


def _is_accepted(mask: TokenMask, token_id: int) -> bool:
    """Whether vLLM's processes followed the mask: one that fails there allows every token."""
    try:
        mask.accept(token_id)
    except Exception as error:  # noqa: BLE001
        logger.error("the mask of one request failed: %s", where_from(error))
        return False
    return True


def to_vllm(sampling: SamplingParams, specification: str | None = None) -> VllmSampling:
    """Our sampling parameters as vLLM's: the same distribution, other random numbers.

    specification: of the answer's mask.
    """
    return VllmSampling(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p or 1.0,
        top_k=sampling.top_k if sampling.top_p else 1,  # ours: top_p 0 keeps the most likely token
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=dict(sampling.logit_bias) or None,
        seed=sampling.seed,
        min_tokens=min(sampling.min_tokens, sampling.max_tokens),
        stop_token_ids=sorted(sampling.stop_token_ids),
        ignore_eos=True,  # the model's own end tokens are among stop_token_ids, if they are to count
        logprobs=sampling.num_top_logprobs,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        extra_args=None if specification is None else {SPECIFICATION: specification},
    )


def to_token_outputs(output: RequestOutput, num_top: int | None) -> list[TokenOutput]:
    """The tokens of one of vLLM's outputs; several if the reader was slow. Raises EngineStopped."""
    answer = output.outputs[0]
    reason = answer.finish_reason
    if reason not in (None, "stop", "length"):
        raise EngineStopped(f"vLLM ended the request: {reason}")
    cached = output.num_cached_tokens or 0
    token_ids = list(answer.token_ids)
    logprobs = cast("Sequence[Mapping[int, Any]]", answer.logprobs or [{}] * len(token_ids))
    last = len(token_ids) - 1
    return [
        TokenOutput(
            token_id,
            finish_reason=cast("Any", reason) if i == last else None,
            logprob=None if num_top is None else _logprob(token_id, logprobs[i], num_top),
            num_cached_tokens=cached,
        )
        for i, token_id in enumerate(token_ids)
    ]


def _logprob(token_id: int, entries: Mapping[int, Any], num_top: int) -> TokenLogprob:
    """vLLM gives the sampled token and the most likely ones, each with its rank from 1."""
    ranked = sorted((entry.rank, other, entry.logprob) for other, entry in entries.items() if entry.rank <= num_top)
    return TokenLogprob(token_id, entries[token_id].logprob, tuple((other, value) for _, other, value in ranked))
