"""A tiny random ChatGLM2 on a real engine, and the ways to talk to the application in front of it."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx2
import sentencepiece
import torch
from openai import AsyncOpenAI
from starlette.applications import Starlette
from torch import Tensor
from transformers import GlmConfig, GlmForCausalLM

from models.families.chatglm2 import ChatGLM2Format
from models.families.chatglm3 import NUM_ROLES, ChatGLM3Format
from models.networks.transformers_decoder import TransformersDecoder
from models.tokenizers.sentencepiece import NUM_SPECIALS, SentencePieceTokenizer
from serving.engine.interface import AttentionFunction, CausalLM, EngineLimits, PromptLayout, RaggedBatch
from serving.engine.native.engine import NativeEngine
from serving.generation.interface import ChatFormat
from serving.generation.pipeline import RunningModel
from serving.openai.limits import ApiLimits
from serving.openai.router import create_app
from serving.registry import ModelRegistry, ServedModel

T = TypeVar("T")
CONTEXT = 256
USER = [{"role": "user", "content": "你好 hello"}]
NAME = "chatglm2-6b"


@dataclass
class HookedNetwork:
    """A network that is really another one, with something done before every forward: waiting, or failing."""

    network: CausalLM
    before: Callable[[], None]

    def __post_init__(self) -> None:
        self.shape, self.device, self.dtype = self.network.shape, self.network.device, self.network.dtype

    def layout(self, prompt_ids: Sequence[int]) -> PromptLayout:
        return self.network.layout(prompt_ids)

    def forward(self, batch: RaggedBatch, attend: AttentionFunction) -> Tensor:
        self.before()
        return self.network.forward(batch, attend)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.network.logits(hidden)


class Scripted:
    """A network that is really another one, but sure of the first tokens that it is asked for."""

    def __init__(self, network: CausalLM, token_ids: Sequence[int]) -> None:
        self.shape, self.device, self.dtype = network.shape, network.device, network.dtype
        self._network = network
        self._left = list(token_ids)

    def layout(self, prompt_ids: Sequence[int]) -> PromptLayout:
        return self._network.layout(prompt_ids)

    def forward(self, batch: RaggedBatch, attend: AttentionFunction) -> Tensor:
        return self._network.forward(batch, attend)

    def logits(self, hidden: Tensor) -> Tensor:
        logits = self._network.logits(hidden)
        if self._left:
            logits[:, self._left.pop(0)] += 1000.0
        return logits


def train_tokenizer(path: Path) -> None:
    """A SentencePiece model of 400 pieces with ChatGLM2's settings, in a few milliseconds."""
    texts = ["你好，世界。我是人工智能助理。", "Hello world, how are you today?", "The quick brown fox 0123456789"]
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts * 30),
        model_writer=written,
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        split_digits=True,
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    path.write_bytes(written.getvalue())


def chat_format(folder: Path, family: str) -> ChatFormat:
    file = folder / "tokenizer.model"
    if not file.exists():
        train_tokenizer(file)
    if family == "chatglm3":
        return ChatGLM3Format(SentencePieceTokenizer(file, NUM_SPECIALS + NUM_ROLES))
    return ChatGLM2Format(SentencePieceTokenizer(file))


def random_glm(num_tokens: int, context: int = CONTEXT) -> GlmForCausalLM:
    torch.set_num_threads(1)
    torch.manual_seed(11)
    config = GlmConfig(
        vocab_size=num_tokens,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=context,
        initializer_range=0.4,
        pad_token_id=0,
    )
    return GlmForCausalLM(config)


def random_network(num_tokens: int, context: int = CONTEXT) -> CausalLM:
    return TransformersDecoder(random_glm(num_tokens, context), num_tokens=num_tokens, max_positions=context)


@contextmanager
def serving(
    folder: Path,
    family: str = "chatglm2",
    before: Callable[[], None] | None = None,
    limits: ApiLimits | None = None,
    context: int = CONTEXT,
    script: str = "",
    drops_oldest_rounds: bool = False,
) -> Iterator[Starlette]:
    """The application with a model behind it, for as long as the block lasts.

    script: what the model's first answer begins with, unless a mask forbids it.
    """
    form = chat_format(folder, family)
    network = random_network(form.num_tokens, context)
    if script:
        network = Scripted(network, form.encode(script)[2:])  # without the prefix of a prompt
    engine = NativeEngine(
        network if before is None else HookedNetwork(network, before), EngineLimits(kv_tokens=max(4096, context))
    )
    engine.start()
    with in_front_of(RunningModel(engine, form, context, drops_oldest_rounds), limits) as app:
        yield app


@contextmanager
def in_front_of(model: RunningModel, limits: ApiLimits | None = None) -> Iterator[Starlette]:
    """The application with this started model behind it; ends the model's engine with the block."""
    served = ServedModel(
        NAME, ("chatglm", "gpt-3.5-turbo"), created=1_700_000_000, fingerprint="fp_test", running=model
    )
    try:
        yield create_app(ModelRegistry([served]), limits)
    finally:
        model.engine.stop()


def sdk(app: Starlette, work: Callable[[AsyncOpenAI], Awaitable[T]]) -> T:
    """Let the openai SDK work against the application, without a socket."""

    async def run() -> T:
        transport = httpx2.ASGITransport(app)
        async with httpx2.AsyncClient(transport=transport) as http:
            return await work(AsyncOpenAI(base_url="http://test", api_key="none", http_client=http, max_retries=0))

    return asyncio.run(run())


def send(app: Starlette, method: str, path: str, **request: Any) -> httpx2.Response:
    """One plain HTTP request."""

    async def run() -> httpx2.Response:
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://test") as http:
            return await http.request(method, path, **request)

    return asyncio.run(run())


def post(app: Starlette, path: str, body: dict[str, Any]) -> httpx2.Response:
    return send(app, "POST", path, json=body)


def chunks(response: httpx2.Response) -> list[dict[str, Any]]:
    """The events of a stream that ended well."""
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


def assert_openai_error(response: httpx2.Response, status: int | None = None) -> dict[str, Any]:
    """The one envelope with its four keys; returns what is in it."""
    if status is not None:
        assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    body = response.json()
    assert body.keys() == {"error"}
    error: dict[str, Any] = body["error"]
    assert list(error) == ["message", "type", "param", "code"]
    assert isinstance(error["message"], str)
    assert error["message"]
    assert isinstance(error["type"], str)
    assert error["param"] is None or isinstance(error["param"], str)
    assert error["code"] is None or isinstance(error["code"], str)
    return error
