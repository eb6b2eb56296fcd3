"""The engine's port on vLLM: its scheduling, kernels and parallelism behind our token ids. Knows no text, no model.

Prompts go in as ids and tokens come out one by one; vLLM's tokenizer, detokenizer, stop strings and chat templates are
not used. Imports vllm, which has an environment of its own (requirements-vllm.txt).
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from typing import Any, Self, cast
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
    EngineError,
    EngineLimits,
    EngineStats,
    EngineStopped,
    NetworkShape,
    PoolingOutput,
    RequestFailed,
    RequestTooLarge,
    SamplingParams,
    Steps,
    TokenLogprob,
    TokenMask,
    TokenOutput,
)
from serving.engine.vllm.known_tokens import KNOWN_TOKENS, NUM_TOKENS, SPECIFICATION, MaskMaker
from serving.safe_traceback import where_from

logger = logging.getLogger(__name__)

MAX_TOP_LOGPROBS = 20
MAX_UNREAD = 64  # steps of one request that wait for a reader; vLLM joins further ones into one


def engine_arguments(
    folder: str,
    limits: EngineLimits,
    num_tokens: int,
    context_length: int,
    options: Mapping[str, Any],
    masks: MaskMaker,
) -> AsyncEngineArgs:
    """What vLLM is told. options: vLLM's own arguments, which go before ours. Raises TypeError for unknown names."""
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


class Watch(StatLoggerBase):
    """What vLLM says of itself, added up. vLLM makes one for each of its engines and calls it in the event loop."""

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
        """vLLM's own loggers say it already."""


class VllmEngine:
    """vLLM's AsyncLLM as an engine. It runs the network in processes of its own."""

    capabilities = EngineCapabilities(has_embeddings=False)

    def __init__(self, arguments: AsyncEngineArgs, limits: EngineLimits, shape: NetworkShape) -> None:
        """Load the weights: minutes for big ones. limits.kv_tokens is what vLLM then says. Any thread."""
        self._watch: list[Watch] = []
        config = arguments.create_engine_config()
        self._llm = AsyncLLM.from_vllm_config(config, stat_loggers=[self._new_watch])
        cache = config.cache_config
        kv_tokens = (cache.num_gpu_blocks or 0) * cache.block_size
        self.limits = EngineLimits(limits.max_sequences, limits.max_batch_tokens, kv_tokens)
        self.shape = shape
        self.max_model_len: int = config.model_config.max_model_len
        self.open: set[VllmSteps] = set()
        self._stopped = False

    def _new_watch(self, vllm_config: VllmConfig, engine_index: int = 0) -> Watch:
        watch = Watch(vllm_config, engine_index)
        self._watch.append(watch)
        return watch

    @property
    def is_alive(self) -> bool:
        return not (self._stopped or self._llm.errored)

    @property
    def is_busy(self) -> bool:
        return bool(self.open)

    @property
    def num_steps(self) -> int:
        return sum(watch.num_steps for watch in self._watch)

    @property
    def queue_seconds(self) -> deque[float]:
        return self._watch[0].queue_seconds if self._watch else deque()

    def stats(self) -> EngineStats:
        kv_tokens = self.limits.kv_tokens
        usage = max((watch.kv_usage for watch in self._watch), default=0.0)
        return EngineStats(
            num_running=sum(watch.num_running for watch in self._watch),
            num_waiting=sum(watch.num_waiting for watch in self._watch),
            kv_tokens_used=round(usage * kv_tokens),
            kv_tokens_total=kv_tokens,
            preemptions=sum(watch.preemptions for watch in self._watch),
            prompt_tokens=sum(watch.prompt_tokens for watch in self._watch),
            cached_tokens=sum(watch.cached_tokens for watch in self._watch),
            generated_tokens=sum(watch.generated_tokens for watch in self._watch),
        )

    def generate(
        self,
        prompt_ids: Sequence[int],
        samplings: Sequence[SamplingParams],
        priority: int = 0,
        masks: Sequence[TokenMask | None] | None = None,
    ) -> Steps[TokenOutput]:
        """See Engine. Raises RequestTooLarge."""
        needed = len(prompt_ids) + max(sampling.max_tokens for sampling in samplings)
        room = min(self.limits.kv_tokens, self.max_model_len)
        if needed > room:
            raise RequestTooLarge(
                f"prompt and answer need {needed} tokens of cache, and there are {room}", needed, room
            )
        answers = list(zip(samplings, masks or [None] * len(samplings), strict=True))
        return VllmSteps(self, self._llm, list(prompt_ids), answers, priority)

    def embed(self, texts: Sequence[tuple[Sequence[int], range]]) -> Steps[PoolingOutput]:
        raise RequestFailed("vLLM either generates or embeds; this one generates")

    def give_up(self) -> None:
        """End every request in flight; called in the event loop, by whoever sees no progress."""
        for steps in list(self.open):
            steps.fail(EngineStopped("the engine makes no progress"))

    def stop(self, max_seconds: float | None = None) -> None:
        """End vLLM's processes; requests in flight get EngineStopped."""
        self._stopped = True
        self._llm.shutdown(max_seconds)


class VllmSteps:
    """The answers to one prompt, each a request of vLLM's, because they are cancelled separately.

    vLLM's prefix cache lets the second choice reuse the prompt of the first. A reader who is slow holds nothing up:
    vLLM joins the steps that wait.
    """

    def __init__(
        self,
        engine: VllmEngine,
        llm: AsyncLLM,
        prompt: list[int],
        answers: Sequence[tuple[SamplingParams, TokenMask | None]],
        priority: int,
    ) -> None:
        self._engine = engine
        self._llm = llm
        self._prompt = prompt
        self._answers = answers
        self._priority = priority
        self._mailbox: asyncio.Queue[tuple[int, TokenOutput | EngineError]] = asyncio.Queue(MAX_UNREAD)
        self._open: dict[int, asyncio.Task[None]] = {}

    async def __aenter__(self) -> Self:
        if not self._engine.is_alive:
            raise EngineStopped("the engine is not running")
        self._open = {
            choice: asyncio.create_task(self._pump(choice, *answer)) for choice, answer in enumerate(self._answers)
        }
        self._engine.open.add(self)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._engine.open.discard(self)
        tasks = list(self._open.values())
        self.cancel(*self._open)
        await asyncio.gather(*tasks, return_exceptions=True)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[int, TokenOutput]:
        while self._open:
            choice, step = await self._mailbox.get()
            if choice not in self._open:
                continue  # it was cancelled while this was under way
            if isinstance(step, EngineError):
                del self._open[choice]
                raise step
            if step.finish_reason:
                del self._open[choice]
            return choice, step
        raise StopAsyncIteration

    def cancel(self, *choices: int) -> None:
        """vLLM aborts a request whose task is cancelled."""
        for choice in choices:
            self._open.pop(choice).cancel()

    def fail(self, error: EngineError) -> None:
        """Tell the reader and stop waiting for vLLM."""
        for choice, task in self._open.items():
            task.cancel()
            if self._mailbox.full():
                self._mailbox.get_nowait()
            self._mailbox.put_nowait((choice, error))

    async def _pump(self, choice: int, sampling: SamplingParams, mask: TokenMask | None) -> None:
        try:
            await self._run(choice, sampling, mask)
        except EngineDeadError:
            await self._mailbox.put((choice, EngineStopped("vLLM's engine process has ended")))
        except Exception as error:
            logger.exception("vLLM could not answer one request")
            await self._mailbox.put((choice, RequestFailed(f"vLLM could not answer: {type(error).__name__}")))

    async def _run(self, choice: int, sampling: SamplingParams, mask: TokenMask | None) -> None:
        prompt = TokensPrompt(prompt_token_ids=self._prompt)
        told = to_vllm(sampling, mask.specification if mask else None)
        outputs = self._llm.generate(prompt, told, f"{uuid4().hex}-{choice}", priority=self._priority)
        async with aclosing(outputs):
            async for output in outputs:
                for step in to_steps(cast("RequestOutput", output), sampling.num_top_logprobs):
                    if mask is not None and not _is_accepted(mask, step.token_id):
                        await self._mailbox.put((choice, RequestFailed("its mask refused a token")))
                        return
                    await self._mailbox.put((choice, step))


def _is_accepted(mask: TokenMask, token_id: int) -> bool:
    """Whether vLLM's processes held to the mask: one that fails there lets everything pass."""
    try:
        mask.accept(token_id)
    except Exception as error:  # noqa: BLE001
        logger.error("the mask of one request failed: %s", where_from(error))
        return False
    return True


def to_vllm(sampling: SamplingParams, specification: str | None = None) -> VllmSampling:
    """Our settings in vLLM's words; the distribution behind them is the same, the random numbers are not.

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


def to_steps(output: RequestOutput, num_top: int | None) -> list[TokenOutput]:
    """The tokens that one message of vLLM's brings; several if the reader was slow. Raises EngineStopped."""
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
