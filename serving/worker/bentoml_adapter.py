"""BentoML's service, container image, log and parent process, changed where its published interface does not reach.

This file has every use of a name or a behaviour that BentoML does not publish; tests/unit/test_bentoml_adapter.py
fails when one of them changes. models/store/bentoml_adapter.py has those of the model store.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from contextlib import suppress
from typing import Any, cast

import attr
import bentoml
import click
from bentoml._internal.service.openapi.specification import Contact, OpenAPISpecification, PathItem
from bentoml.images import Image
from starlette.types import ASGIApp

from serving.openai.openapi import DESCRIPTION, VERSION, document
from serving.safe_traceback import where_from
from serving.settings import BuildArguments

PYTHON = "3.11"

LOGGER = "bentoml.chatglm"  # BentoML's workers print INFO lines of loggers below "bentoml", and warnings of all others
OUR_LOGGERS = ("serving", "models", "kernels")
# of BentoML, uvicorn and asyncio: those that log an exception of a request, whose message may quote the client
REQUEST_LOGGERS = ("bentoml.serve", "bentoml._internal.server.http_app", "uvicorn.error", "asyncio")

CONTACT = Contact(name="The operator of this server")  # not BentoML's own team


def worker_number() -> int:
    """Which of the service's workers this process is, counted from 0. BentoML counts from 1."""
    return (bentoml.server_context.worker_index or 1) - 1


def requested_address(host: str, port: int) -> tuple[str, int]:
    """Where `bentoml serve` was told to listen, by an option or its variable; by default `host` and `port`."""
    context = click.get_current_context(silent=True)
    options = context.params if context is not None else {}
    return options.get("host") or host, options.get("port") or port


def complete_log() -> None:
    """INFO lines of our own loggers are printed like BentoML's, and no line quotes a client. Once in a worker."""
    level = logging.getLogger(LOGGER).getEffectiveLevel()
    for name in OUR_LOGGERS:
        logging.getLogger(name).setLevel(level)  # BentoML's handler is the root logger's, too
    for name in REQUEST_LOGGERS:
        logging.getLogger(name).addFilter(_without_exception_message)


def _without_exception_message(record: logging.LogRecord) -> bool:
    """Replaces the traceback of a record by one without the exception's message. A filter: always True."""
    error = record.exc_info[1] if record.exc_info else None
    if error is not None:
        record.exc_info, record.exc_text = None, where_from(error)
    if record.name == "asyncio":  # its further lines show the task's exception
        record.msg, record.args = record.getMessage().partition("\n")[0], None
    return True


class BentoMLService(bentoml.Service[Any]):
    """BentoML's service without its time limit, and with the mounted routes in its OpenAPI document.

    The document is what `/docs.json` answers and what `bentoml build` writes into the Bento.
    """

    def to_asgi(self, is_main: bool = True) -> ASGIApp:
        """BentoML's time limit keeps a timer, and the request with it, until it runs out, however early the response
        is complete. Ours is `CHATGLM_REQUEST_TIMEOUT`."""
        from _bentoml_impl.server.app import ServiceAppFactory  # only a worker needs it

        self.inject_config()
        factory = ServiceAppFactory(self, is_main=is_main)
        factory.timeout = None
        return cast("ASGIApp", factory())

    @property
    def openapi_spec(self) -> OpenAPISpecification:
        spec = super().openapi_spec
        own = document()
        merged = cast("dict[str, dict[str, Any]]", spec.components)
        for kind, entries in own["components"].items():
            merged.setdefault(kind, {}).update(entries)
        items = {path: PathItem(**item) for path, item in own["paths"].items()}
        changed = attr.evolve(
            spec,
            openapi=VERSION,
            # BentoML's own text shows images from other hosts
            info=attr.evolve(spec.info, description=DESCRIPTION, version=own["info"]["version"], contact=CONTACT),
            tags=[*own["tags"], *(spec.tags or ())],
            paths={**items, **spec.paths},
            components=cast("Any", merged),
        )
        return cast("OpenAPISpecification", changed)


def container_image(built: BuildArguments) -> Image:
    """A slim Python without a package cache. A distribution that BentoML does not know gets no layer of compilers and
    git; only vLLM needs that layer, to compile kernels while it serves. uv reads /etc/uv/uv.toml."""
    distro = "debian" if built.engine == "vllm" else "none"
    image = Image(base_image=f"python:{PYTHON}-slim", distro=distro, python_version=PYTHON, lock_python_packages=False)
    backend = f'[pip]\\ntorch-backend = "{built.torch}"\\n' if built.torch else ""
    configuration = "no-cache = true\\n" + backend
    image.run(f"mkdir -p /etc/uv && printf '{configuration}' > /etc/uv/uv.toml")
    return image


def forward_second_signal() -> None:
    """In the parent process of `bentoml serve`: the second SIGTERM or SIGINT is sent to the workers.

    BentoML's process manager (circus) ignores every signal after the first. It uses `signal.signal`, which leaves the
    wake-up descriptor free for a thread that counts the signals.
    """
    reading, writing = socket.socketpair()
    writing.setblocking(False)
    signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
    writing.detach()  # the interpreter owns it from here on

    def count() -> None:
        num_signals = 0
        while numbers := reading.recv(64):
            for number in numbers:
                if number in (signal.SIGTERM, signal.SIGINT):
                    num_signals += 1
                    if num_signals > 1:
                        _terminate_children()

    threading.Thread(target=count, name="signals", daemon=True).start()


def _terminate_children() -> None:
    import psutil

    for child in psutil.Process().children(recursive=True):
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            os.kill(child.pid, signal.SIGTERM)


def gpu_resources(num_gpus: int, gpu_type: str) -> dict[str, Any]:
    """The decorator's `resources`. An unknown type is refused by BentoCloud, not here."""
    return {"gpu": num_gpus, "gpu_type": gpu_type} if gpu_type else {"gpu": num_gpus}
