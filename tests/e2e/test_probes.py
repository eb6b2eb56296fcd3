"""Kubernetes' probes, as the manifest has them, sent to a running server."""

from __future__ import annotations

import pytest
import requests
import yaml

from serving import __version__
from tests.e2e.server import Server
from tests.golden_data import REPOSITORY

MANIFEST = REPOSITORY / "deploy" / "kubernetes" / "base" / "deployment.yaml"


@pytest.mark.parametrize("probe", ["startupProbe", "livenessProbe", "readinessProbe"])
def test_a_ready_server_passes(probe: str, server: Server) -> None:
    pod = yaml.safe_load(MANIFEST.read_text(encoding="utf-8"))["spec"]["template"]["spec"]
    asked = pod["containers"][0][probe]
    reply = requests.get(f"{server.url}{asked['httpGet']['path']}", timeout=asked["timeoutSeconds"])
    assert 200 <= reply.status_code < 400  # what Kubernetes counts as success


def test_the_names_of_other_servers_are_answered(server: Server) -> None:
    for path in ("/health", "/ping"):
        assert requests.get(f"{server.url}{path}", timeout=10).status_code == 200
    assert requests.get(f"{server.url}/version", timeout=10).json() == {"version": __version__}
