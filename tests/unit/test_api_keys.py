"""API keys: plain and hashed, from a variable and from a file that changes, and never in messages or logs."""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path

import pytest

from serving.http import api_keys as auth
from serving.http.api_keys import APIKeys, KeyFileError
from serving.http.errors import APIError

SECRET = "sk-secret-0123456789"


def refused(keys: APIKeys, authorization: str | None) -> APIError:
    with pytest.raises(APIError) as caught:
        keys.find(authorization)
    assert caught.value.status == 401
    assert caught.value.code == "invalid_api_key"
    assert caught.value.headers["www-authenticate"].startswith("Bearer")
    return caught.value


def test_plain_and_hashed_keys_open_and_have_names() -> None:
    hashed = hashlib.sha256(b"sk-other").hexdigest()
    keys = APIKeys([f"{SECRET} alice", f"sha256:{hashed}"])
    assert keys.num_keys == 2
    assert keys.find(f"Bearer {SECRET}").name == "alice"
    assert keys.find("bearer  sk-other").name == f"key-{hashed[:8]}"


@pytest.mark.parametrize(
    "authorization",
    [None, "", "Bearer", "Bearer ", f"Basic {SECRET}", f"Bearer {SECRET}x", f"Bearer {SECRET[:-1]}", "Bearer \xff\x00"],
)
def test_what_is_not_the_key_is_refused_without_repeating_it(authorization: str | None) -> None:
    error = refused(APIKeys([SECRET]), authorization)
    assert SECRET[:-1] not in error.message


def test_no_key_and_a_wrong_key_are_told_apart() -> None:
    keys = APIKeys([SECRET])
    assert refused(keys, None).message.startswith("You didn't provide an API key.")
    assert refused(keys, "Bearer no").message.startswith("Incorrect API key provided")


def test_a_changed_file_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "RELOAD_SECONDS", 0.0)
    file = tmp_path / "keys"
    file.write_text(f"# ours\n\n{SECRET} alice # the first\n")
    keys = APIKeys(file=file)
    assert keys.find(f"Bearer {SECRET}").name == "alice"
    file.write_text("sk-new bob\n")
    os.utime(file, ns=(1, 1))
    assert keys.find("Bearer sk-new").name == "bob"
    refused(keys, f"Bearer {SECRET}")


def test_a_change_of_equal_time_and_size_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "RELOAD_SECONDS", 0.0)
    file = tmp_path / "keys"
    file.write_text("sk-1 alice\n")
    os.utime(file, ns=(1, 1))
    keys = APIKeys(file=file)
    file.write_text("sk-2 alice\n")
    os.utime(file, ns=(1, 1))
    assert keys.find("Bearer sk-2").name == "alice"
    refused(keys, "Bearer sk-1")


@pytest.mark.parametrize("content", [None, "", "\n \n", "# sk-1 alice\n"])
def test_an_emptied_or_deleted_file_revokes_its_keys_and_no_others(
    content: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(auth, "RELOAD_SECONDS", 0.0)
    file = tmp_path / "keys"
    for listed in ([], ["sk-0 root"]):
        file.write_text("sk-1 alice\n")
        keys = APIKeys(listed, file)
        assert keys.find("Bearer sk-1").name == "alice"
        if content is None:
            file.unlink()
        else:
            file.write_text(content)
        refused(keys, "Bearer sk-1")
        if listed:
            assert keys.find("Bearer sk-0").name == "root"
        else:
            assert "all requests are refused" in caplog.text
        file.write_text("sk-2 bob\n")
        assert keys.find("Bearer sk-2").name == "bob"


@pytest.mark.parametrize("content", ["a b c\n", "sha256:12\n", "sk-x two/names\n", b"\xff\xfe"])
def test_a_file_that_became_wrong_changes_nothing_and_the_log_does_not_quote_it(
    content: str | bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(auth, "RELOAD_SECONDS", 0.0)
    file = tmp_path / "keys"
    file.write_text(SECRET)
    keys = APIKeys(file=file)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    os.utime(file, ns=(1, 1))
    with caplog.at_level(logging.ERROR):
        keys.find(f"Bearer {SECRET}")
    assert "the previous API keys stay in use" in caplog.text
    assert "sk-x" not in caplog.text


def test_a_wrong_file_at_the_start_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match="cannot be read"):
        APIKeys(file=tmp_path / "missing")
    (tmp_path / "empty").write_text("# nothing\n")
    with pytest.raises(KeyFileError, match="contains no key"):
        APIKeys(file=tmp_path / "empty")


def test_keys_are_held_as_digests_only() -> None:
    assert SECRET not in repr(vars(APIKeys([SECRET])))
