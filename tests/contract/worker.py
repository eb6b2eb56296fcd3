"""The application inside AccessMiddleware, on a real engine of a chosen size, and clients with keys of their own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from starlette.types import Message

from serving.admission.admission_control import Admission, AdmissionLimits
from serving.engine.interface import EngineLimits
from serving.engine.native.engine import NativeEngine
from serving.generation.pipeline import RunningModel
from serving.http.access_middleware import AccessMiddleware, AccessPolicy, RouteNames, ServerState
from serving.http.api_keys import APIKeys
from serving.http.json_body import BodyMiddleware
from serving.http.request_context import RequestContext
from serving.openai.limits import ApiLimits
from serving.openai.router import create_app
from serving.registry import ModelRegistry, ServedModel
from serving.worker.health import HealthMonitor
from tests.contract.tiny import CONTEXT, NAME, HookedNetwork, chat_format, random_network

KEYS = ["sk-alice alice", "sk-bob bob"]
CHAT = "/v1/chat/completions"


@dataclass(frozen=True)
class Worker:
    """Everything of one worker."""

    app: AccessMiddleware
    engine: NativeEngine
    model: RunningModel
    admission: Admission
    state: ServerState
    monitor: HealthMonitor
    records: list[RequestContext]


@contextmanager
def running_worker(
    folder: Path,
    before: Callable[[], None] | None = None,
    engine_limits: EngineLimits | None = None,
    admission_limits: AdmissionLimits | None = None,
    limits: ApiLimits | None = None,
    keys: list[str] | None = None,
    max_step_seconds: float = 60.0,
    hooked: type[HookedNetwork] = HookedNetwork,
) -> Iterator[Worker]:
    """A worker without BentoML around it, for as long as the block lasts."""
    format_ = chat_format(folder, "chatglm2")
    network = random_network(format_.num_tokens)
    engine = NativeEngine(network if before is None else hooked(network, before), engine_limits or EngineLimits())
    engine.start()
    model = RunningModel(engine, format_, CONTEXT)
    registry = ModelRegistry([ServedModel(NAME, running=model)])
    admission = Admission(admission_limits or AdmissionLimits())
    state = ServerState()
    app = create_app(registry, limits, admission=admission)
    records: list[RequestContext] = []
    accepted = APIKeys(KEYS if keys is None else keys)
    observers = (lambda record, _: records.append(record),)
    policy = AccessPolicy(accepted if accepted.num_keys else None, state, observers=observers)
    mounted = BodyMiddleware(Prefixed(app), (limits or ApiLimits()).body)
    try:
        yield Worker(
            AccessMiddleware(mounted, policy, RouteNames([])),
            engine,
            model,
            admission,
            state,
            HealthMonitor(registry, admission, state, max_step_seconds),
            records,
        )
    finally:
        engine.stop(5.0)


class Prefixed:
    """Mounts the application at /v1, as BentoML does."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self._app({**scope, "root_path": "/v1"}, receive, send)


def body(content: str = "你好", **fields: Any) -> dict[str, Any]:
    return {"model": NAME, "messages": [{"role": "user", "content": content}], "temperature": 0, **fields}


@asynccontextmanager
async def client(worker: Worker, name: str = "alice") -> AsyncIterator[httpx2.AsyncClient]:
    headers = {"authorization": f"Bearer sk-{name}"}
    transport = httpx2.ASGITransport(worker.app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://test", headers=headers, timeout=60) as http:
        yield http


async def at_rest(worker: Worker, seconds: float = 10.0) -> None:
    """Wait until no slot, no admission and no request is in use; fail if that does not happen."""
    async with asyncio.timeout(seconds):
        while True:
            stats = worker.engine.stats()
            in_use = (stats.num_running, stats.num_waiting, stats.kv_tokens_used, worker.admission.num_answers)
            if not any(in_use) and not worker.state.num_in_flight:
                return
            await asyncio.sleep(0.01)


class SlowReader:
    """An ASGI client that reads the head and a few pieces of a stream and then blocks every send."""

    def __init__(self, worker: Worker, payload: bytes, num_taken: int = 3) -> None:
        self._worker = worker
        self._payload = payload
        self._num_taken = num_taken
        self.num_pieces = 0
        self.resume = asyncio.Event()
        self.last = b""

    async def run(self) -> None:
        sent = False
        never = asyncio.Event()

        async def receive() -> Message:
            nonlocal sent
            if sent:
                await never.wait()
            sent = True
            return {"type": "http.request", "body": self._payload, "more_body": False}

        async def send(message: Message) -> None:
            if message["type"] == "http.response.body":
                self.num_pieces += 1
                self.last = message["body"]
                if self.num_pieces > self._num_taken:
                    await self.resume.wait()

        headers = [(b"authorization", b"Bearer sk-alice"), (b"content-type", b"application/json")]
        scope = {
            "type": "http", "method": "POST", "path": CHAT, "root_path": "", "query_string": b"", "headers": headers,
            "client": ("192.0.2.1", 1), "server": ("test", 80), "scheme": "http", "http_version": "1.1",
        }  # fmt: skip
        await self._worker.app(scope, receive, send)
