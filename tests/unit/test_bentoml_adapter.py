"""What serving/worker/bentoml_adapter.py relies on and BentoML does not publish; a failure says what it is used for."""

from __future__ import annotations

import logging
import subprocess
import sys
from functools import cache
from typing import Any

import attr
import bentoml
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from serving.http.access_middleware import BENTOML_PATHS, HEALTH_PATHS, READY_PATHS
from serving.http.pages import FOLDER
from serving.openai.openapi import VERSION
from serving.settings import BuildArguments
from serving.worker.bentoml_adapter import LOGGER, REQUEST_LOGGERS, BentoMLService, container_image, worker_number
from tests.contract.tiny import send
from tests.golden_data import REPOSITORY


def changed(what: str, purpose: str, file: str = "serving/worker/bentoml_adapter.py") -> str:
    return f"BentoML no longer {what}, which {file} uses to {purpose}"


async def ours(_: Request) -> PlainTextResponse:
    return PlainTextResponse("ours")


class Outer:
    """A middleware that does nothing."""

    def __init__(self, app: Any) -> None:
        self.app = app


class Inner(Outer):
    """Another one."""


@cache
def service(service_class: type[Any] = BentoMLService) -> Any:
    """With the options of service.py and a route of our own at `/` and at `/mine`."""
    mounted = Starlette(routes=[Route("/", ours), Route("/mine", ours)])

    @bentoml.service(
        name="adapted",
        service_class=service_class,
        traffic={"timeout": 86400},
        tracing={"excluded_urls": "."},
        metrics={"enabled": False},
        logging={"access": {"enabled": False}},
    )
    @bentoml.asgi_app(mounted, path="/")
    class Adapted:
        @bentoml.api
        async def generate(self, prompt: str) -> str:
            return prompt

    Adapted.add_asgi_middleware(Outer)
    Adapted.add_asgi_middleware(Inner)
    return Adapted


@cache
def application(service_class: type[Any] = BentoMLService) -> Starlette:
    app = service(service_class).to_asgi()
    assert isinstance(app, Starlette), changed("serves a Starlette application", "serve its routes and ours together")
    return app


def middleware(service_class: type[Any] = BentoMLService) -> list[str]:
    return [getattr(each.cls, "__name__", "") for each in application(service_class).user_middleware]


def without_middleware(service_class: type[Any]) -> Starlette:
    """The routes alone: the two middlewares of this test answer nothing."""
    return Starlette(routes=application(service_class).routes)


def test_no_request_leaves_a_timer_behind() -> None:
    """BentoML's time limit keeps a timer of each request until it runs out: a day's worth, with `timeout=86400`."""
    from _bentoml_impl.server.app import ServiceAppFactory

    assert "TimeoutMiddleware" in middleware(bentoml.Service), changed(
        "adds TimeoutMiddleware to a service with a time limit", "remove it: the whole method can go"
    )
    bentoml.Service.inject_config(service())
    factory = ServiceAppFactory(service(), is_main=True)
    assert hasattr(factory, "timeout"), changed("has ServiceAppFactory.timeout", "turn its time limit off")
    assert "TimeoutMiddleware" not in middleware(), changed(
        "leaves TimeoutMiddleware out where ServiceAppFactory.timeout is None", "turn its time limit off"
    )


def test_middleware_that_is_added_first_is_outside_and_bentomls_own_is_off() -> None:
    names = middleware()
    assert names.index("Outer") < names.index("Inner"), changed(
        "applies the middleware that is added first outermost",
        "answer browsers' CORS requests before API keys are checked",
        "service.py",
    )
    unwanted = {"AccessLogMiddleware", "RunnerTrafficMetricsMiddleware", "HTTPTrafficMetricsMiddleware"} & set(names)
    assert not unwanted, f"BentoML adds {unwanted} though service.py turns its access log and its metrics off"


def test_the_document_has_bentomls_paths_and_ours() -> None:
    from bentoml._internal.service.openapi.specification import OpenAPISpecification, PathItem

    wanted = {"openapi", "info", "paths", "components"}
    assert wanted <= {field.name for field in attr.fields(OpenAPISpecification)}, changed(
        "has these fields of OpenAPISpecification", "add our routes to its document"
    )
    assert {"get", "post"} <= {field.name for field in attr.fields(PathItem)}, changed(
        "has PathItem.get and PathItem.post", "add our routes to its document"
    )
    assert isinstance(service().openapi_spec, OpenAPISpecification), changed(
        "describes a service by its property openapi_spec", "add our routes to its document"
    )
    document = send(without_middleware(BentoMLService), "GET", "/docs.json").json()
    assert document["openapi"] == VERSION
    assert {"/v1/chat/completions", "/generate", "/livez"} <= set(document["paths"])
    assert "ChatRequest" in document["components"]["schemas"]


def test_paths_that_access_rules_and_the_home_page_name_exist() -> None:
    app = without_middleware(BentoMLService)
    for path in {*HEALTH_PATHS, *BENTOML_PATHS} - {"/", "/generate", *READY_PATHS}:
        assert send(app, "GET", path).status_code == 200, changed(
            f"answers {path}", "treat it apart", "serving/http/access_middleware.py"
        )
    home = (FOLDER / "home.html").read_text(encoding="utf-8")
    files = [part.split('"')[0] for part in home.split('"./')[1:] if part.startswith("static_content/")]
    assert len(files) == 4
    for file in files:
        assert send(app, "GET", f"/{file}").status_code == 200, changed(
            f"serves {file}", "show the API's documentation", "web/page/home.html"
        )


def test_a_mounted_application_comes_first_and_leaves_other_paths_to_bentoml() -> None:
    app = without_middleware(BentoMLService)
    for path in ("/", "/mine"):
        assert send(app, "GET", path).text == "ours", changed(
            "matches mounted applications before its own pages", "replace its page at `/`", "service.py"
        )
    assert send(app, "GET", "/schema.json").status_code == 200, changed(
        "asks a mounted application's routes before it takes a path from others",
        "mount the API at `/` beside BentoML's own routes",
        "service.py",
    )


def test_workers_are_counted_from_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert hasattr(bentoml.server_context, "worker_index"), changed(
        "has server_context.worker_index", "give each worker its own GPU"
    )
    assert worker_number() == 0
    monkeypatch.setattr(bentoml.server_context, "worker_index", 3)
    assert worker_number() == 2


def test_info_lines_below_bentomls_logger_are_printed_in_workers() -> None:
    from bentoml._internal.log import SERVER_LOGGING_CONFIG

    name = LOGGER.split(".", 1)[0]
    configured = SERVER_LOGGING_CONFIG["loggers"].get(name, {})
    assert configured.get("level") == logging.INFO, changed(f"prints INFO lines of `{name}`", "log what is served")
    assert configured.get("handlers"), changed(f"prints INFO lines of `{name}`", "log what is served")


WORKER = """
import asyncio, logging, sys
from bentoml._internal.log import configure_server_logging
configure_server_logging()
from serving.worker.bentoml_adapter import REQUEST_LOGGERS, complete_log
complete_log()
logging.getLogger("serving.http.api_keys").info("an info line")
logging.getLogger("kernels.linears").info("another info line")
logging.getLogger("other.library").info("not shown")
for name in REQUEST_LOGGERS:
    try:
        int("MARKER")
    except ValueError:
        logging.getLogger(name).exception("a failure of %s", name)

async def fail():
    raise ValueError("MARKER")

async def run():
    asyncio.get_running_loop().create_task(fail())
    await asyncio.sleep(0.01)

asyncio.run(run())
"""


def test_our_info_lines_are_printed_and_exceptions_of_requests_without_their_messages() -> None:
    result = subprocess.run(
        [sys.executable, "-c", WORKER], cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=True
    )
    log = result.stdout + result.stderr
    assert "an info line" in log, changed("has its handler on the root logger", "print our INFO lines")
    assert "another info line" in log
    assert "not shown" not in log
    for name in set(REQUEST_LOGGERS) - {"asyncio"}:  # BentoML disables asyncio's
        assert f"a failure of {name}\nValueError\n" in log
    assert "MARKER" not in log


def test_the_image_has_compilers_for_vllm_only_and_is_installed_by_uv() -> None:
    from bentoml._internal.container.frontend import dockerfile

    assert "none" not in dockerfile.CONTAINER_METADATA
    (configure_uv,) = container_image(BuildArguments(torch="cpu")).commands
    assert 'torch-backend = "cpu"' in configure_uv
    vllm = container_image(BuildArguments(engine="vllm")).commands
    assert len(vllm) == 2, changed("installs compilers for the distribution `debian`", "compile vLLM's kernels")
    folder = REPOSITORY / dockerfile.__path__[0] / "templates"
    assert any(
        "uv pip install" in file.read_text() or "uv --directory" in file.read_text() for file in folder.iterdir()
    ), changed("installs packages with uv", "choose torch's build in /etc/uv/uv.toml")


PARENT = """
import os, signal, subprocess, sys, time
from circus.sighandler import SysHandler
from serving.worker.bentoml_adapter import forward_second_signal

forward_second_signal()
SysHandler(None)  # what BentoML's parent process handles signals with
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(0.3)
print(worker.poll())
os.kill(os.getpid(), signal.SIGTERM)
print(worker.wait(20))
"""


def test_the_second_signal_of_the_parent_process_reaches_the_workers() -> None:
    result = subprocess.run(
        [sys.executable, "-c", PARENT], cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.stdout.split() == ["None", "-15"], (
        changed("handles signals with signal.signal() in circus' SysHandler", "send a second signal to the workers")
        + result.stderr
    )
