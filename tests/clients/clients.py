"""Every client program, in an environment of its own, against a real server. Run by `make test-clients`.

A script gets the base URL, uses its client as its documentation says, and prints what it got as one JSON object.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from models.demo.corpus import SAMPLE_ANSWER
from tests.clients.environments import CLIENTS, Client
from tests.e2e.server import Server, serving

SCRIPTS = Path(__file__).parent / "scripts"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    settings = {"CHATGLM_ALIASES": "chatglm2-6b,gpt-3.5-turbo", "CHATGLM_THREADS": "1"}
    with serving(tmp_path_factory.mktemp("bentoml"), settings) as running:
        yield running


def run(client: Client, server: Server, home: Path) -> dict[str, Any]:
    """What the client's script printed."""
    if not client.is_there:
        reason = client.why_not.read_text(encoding="utf-8") if client.why_not.exists() else "run `make test-clients`"
        pytest.skip(f"{client.name}: {reason}")
    script = SCRIPTS / client.script
    if client.is_node:  # node looks for packages beside the script
        script = Path(shutil.copy(script, client.folder))
    done = subprocess.run(
        [str(client.program), str(script), server.base_url],
        cwd=client.folder,
        # a home of its own: no settings, keys or caches of whoever runs this
        env={"PATH": os.environ["PATH"], "HOME": str(home), "LANG": "C.UTF-8", "LITELLM_LOCAL_MODEL_COST_MAP": "True"},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    told: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return told


@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.name)
def test_a_client_reads_the_answer_the_stream_and_the_error(client: Client, server: Server, tmp_path: Path) -> None:
    told = run(client, server, tmp_path)
    assert told.pop("whole") == SAMPLE_ANSWER
    assert told.pop("streamed") == SAMPLE_ANSWER
    assert told.pop("num_pieces") > 3
    assert "nobody" in told.pop("error")
    for name, is_right in told.items():
        assert is_right is True, f"{client.name}: {name} is {is_right}"
