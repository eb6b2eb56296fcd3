"""Where the server listens by default, and what it says about that."""

from __future__ import annotations

import pytest

from serving.worker.listening import default_host, ready_lines


@pytest.mark.parametrize(
    ("has_keys", "environment", "host"),
    [
        (False, {}, "127.0.0.1"),
        (True, {}, "0.0.0.0"),
        (False, {"BENTO_PATH": "/home/bentoml/bento"}, "0.0.0.0"),
    ],
)
def test_a_server_without_keys_listens_on_loopback_outside_containers(
    has_keys: bool, environment: dict[str, str], host: str
) -> None:
    assert default_host(has_keys, environment) == host


@pytest.mark.parametrize(
    ("host", "has_keys", "url", "access"),
    [
        ("127.0.0.1", False, "http://127.0.0.1:81", "this machine only (loopback); no API key is needed"),
        ("0.0.0.0", False, "http://localhost:81", "no API key is needed (set CHATGLM_API_KEYS)"),
        ("::", True, "http://localhost:81", "every host that reaches this port; requests need an API key"),
        ("fd00::1", True, "http://[fd00::1]:81", "requests need an API key"),
    ],
)
def test_the_last_lines_of_a_start_say_address_and_access(host: str, has_keys: bool, url: str, access: str) -> None:
    first, page, last = ready_lines("model:1", [(host, 81)], has_keys, has_chat_page=True)
    assert first.endswith(f"{url}/v1")
    assert page.endswith(f"{url}/chat")
    assert access in last
