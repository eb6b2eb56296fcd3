"""The image as an operator runs it: any user, nothing writable but /store and /tmp, no network but its port."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests
import yaml
from openai import OpenAI

from models.demo.corpus import SAMPLE_ANSWER
from tests.e2e.server import environment, free_port
from tests.golden_data import REPOSITORY

ENGINE = os.environ.get("CONTAINER_ENGINE", "")
STORE_IMAGE, BUNDLED_IMAGE = (os.environ.get(f"TEST_IMAGE_{name}", "") for name in ("STORE", "BUNDLED"))
START_SECONDS = 180
CLOSED = ["--read-only", "--tmpfs", "/tmp", "--tmpfs", "/store:mode=1777", "--cap-drop=ALL", "--user", "12345:0"]

pytestmark = pytest.mark.skipif(
    not (ENGINE and STORE_IMAGE and BUNDLED_IMAGE),
    reason="`make test-container` builds the images that these tests run",
)


@dataclass(frozen=True)
class Container:
    """A running one, and where it answers."""

    id: str
    url: str

    def log(self) -> str:
        result = subprocess.run([ENGINE, "logs", self.id], capture_output=True, encoding="utf-8", check=True)
        return result.stdout + result.stderr


@contextmanager
def running(image: str, *options: str, arguments: tuple[str, ...] = ()) -> Iterator[Container]:
    """A container on loopback, ready; removed afterwards."""
    port = free_port()
    command = [ENGINE, "run", "--detach", "--publish", f"127.0.0.1:{port}:8000", *options, image, *arguments]
    started = subprocess.run(command, capture_output=True, encoding="utf-8", check=True, timeout=60)
    container = Container(started.stdout.strip().splitlines()[-1], f"http://127.0.0.1:{port}")
    try:
        wait_until_ready(container)
        yield container
    finally:
        subprocess.run([ENGINE, "rm", "--force", container.id], capture_output=True, check=False, timeout=60)


def wait_until_ready(container: Container) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        try:
            if requests.get(f"{container.url}/readyz", timeout=2).status_code == 200:
                return
        except requests.RequestException:
            pass  # the port is not open yet
        time.sleep(0.2)
    raise AssertionError(f"the container did not become ready:\n{container.log()}")


def answer(container: Container, model: str = "chatglm2-6b") -> str:
    client = OpenAI(base_url=f"{container.url}/v1", api_key="none")
    parts = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "你好"}], temperature=0, stream=True
    )
    return "".join(part.choices[0].delta.content or "" for part in parts)


@pytest.mark.parametrize("image", [STORE_IMAGE, BUNDLED_IMAGE], ids=["store", "bundled"])
def test_it_serves_the_openai_sdk_to_any_user_from_a_read_only_root(image: str) -> None:
    with running(image, *CLOSED) as container:
        assert answer(container) == SAMPLE_ANSWER


def test_it_serves_a_mounted_model_store(tmp_path: Path) -> None:
    """The store is read-only and belongs to another user; the model in it is not in the image."""
    importing = [
        "-m",
        "models.store",
        "import",
        "chatglm2",
        "--from",
        "models/demo/checkpoint",
        "--name",
        "mine:v1",
    ]
    subprocess.run(
        [shutil.which("python") or "python", *importing],
        cwd=REPOSITORY,
        env=environment(tmp_path),
        check=True,
        capture_output=True,
        timeout=300,
    )
    mount = ["--volume", f"{tmp_path / 'models'}:/store/models:ro", "--env", "CHATGLM_MODEL=mine:v1"]
    tmp_path.chmod(0o755)
    with running(STORE_IMAGE, *CLOSED, *mount) as container:
        client = OpenAI(base_url=f"{container.url}/v1", api_key="none")
        assert next(iter(client.models.list())).id == "mine"
        assert answer(container, "mine") == SAMPLE_ANSWER


def test_kubernetes_probes_and_the_health_check_are_answered() -> None:
    path = REPOSITORY / "deploy" / "kubernetes" / "base" / "deployment.yaml"
    pod = yaml.safe_load(path.read_text(encoding="utf-8"))["spec"]["template"]["spec"]
    (server,) = pod["containers"]
    with running(BUNDLED_IMAGE, *CLOSED) as container:
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            reply = requests.get(
                container.url + server[probe]["httpGet"]["path"], timeout=server[probe]["timeoutSeconds"]
            )
            assert reply.status_code == 200
        inspected = subprocess.run([ENGINE, "inspect", container.id], capture_output=True, check=True)
        (facts,) = json.loads(inspected.stdout)
        check = facts["Config"]["Healthcheck"]["Test"]
        assert check[0] == "CMD"
        subprocess.run([ENGINE, "exec", container.id, *check[1:]], check=True, timeout=30)
        subprocess.run(
            [ENGINE, "exec", container.id, *server["lifecycle"]["preStop"]["exec"]["command"][:1], "0"],
            check=True,
            timeout=30,
        )


def test_stopping_lets_a_stream_finish() -> None:
    with running(BUNDLED_IMAGE, *CLOSED) as container:
        client = OpenAI(base_url=f"{container.url}/v1", api_key="none", max_retries=0)
        stream = client.chat.completions.create(
            model="chatglm", messages=[{"role": "user", "content": "你好"}], stream=True, temperature=0
        )
        first = next(iter(stream))
        stopping = subprocess.Popen([ENGINE, "stop", "--time", "40", container.id], stdout=subprocess.DEVNULL)
        text = "".join(part.choices[0].delta.content or "" for part in [first, *stream])
        assert text == SAMPLE_ANSWER
        assert stopping.wait(60) == 0


def test_a_model_that_is_not_there_ends_the_container_with_one_line() -> None:
    result = subprocess.run(
        [ENGINE, "run", "--rm", *CLOSED, "--env", "CHATGLM_MODEL=nobody:v1", STORE_IMAGE],
        capture_output=True,
        encoding="utf-8",
        timeout=START_SECONDS,
        check=False,
    )
    assert result.returncode == 1
    assert "the model store has no 'nobody:v1'" in result.stdout + result.stderr


def test_the_image_holds_no_compiler_and_no_package_cache() -> None:
    script = "! command -v gcc && ! command -v git && ! test -e ~root/.cache/uv && ! test -w /home/bentoml/bento/src"
    subprocess.run(
        [ENGINE, "run", "--rm", "--entrypoint", "sh", *CLOSED, STORE_IMAGE, "-c", script], check=True, timeout=60
    )
