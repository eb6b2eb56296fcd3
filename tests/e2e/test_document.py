"""The document that a running server and a built Bento show."""

from __future__ import annotations

import requests

from serving.openai.openapi import document
from tests.e2e.server import Server


def test_the_served_document_describes_the_whole_api(server: Server) -> None:
    told = requests.get(f"{server.url}/docs.json", timeout=10).json()
    own = document()
    for path, item in own["paths"].items():
        assert told["paths"][path] == item
        assert path.removeprefix("/v1") not in told["paths"]
    for name, schema in own["components"]["schemas"].items():
        assert told["components"]["schemas"][name] == schema
    assert "/generate" in told["paths"]
    assert "swagger-ui" in requests.get(server.url, timeout=10).text
