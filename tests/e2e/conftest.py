"""One running server for all end-to-end tests that only talk to it. TEST_ENGINE=vllm puts vLLM behind it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.e2e.server import VLLM, Server, serving


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    settings = VLLM if os.environ.get("TEST_ENGINE") == "vllm" else None
    with serving(tmp_path_factory.mktemp("bentoml"), settings) as running:
        yield running
