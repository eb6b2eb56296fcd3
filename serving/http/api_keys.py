"""Authorization header -> name of the API key. Keys come from settings or from a file; none is ever logged."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from serving.http.errors import INVALID_REQUEST, APIError

HASHED = re.compile(r"sha256:([0-9a-fA-F]{64})")
NAME = re.compile(r"[\w.@-]{1,64}")
ADMINISTRATOR = "admin"
RELOAD_SECONDS = 1.0  # between two checks whether the file has changed

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class APIKey:
    """What is known of an accepted key but the key itself."""

    name: str
    is_administrator: bool = False


class KeyFileError(Exception):
    """The list of keys is invalid; the message names the line, not the key."""


class APIKeys:
    """The accepted keys: only their SHA-256 digests are kept, each with a name for logs and limits.

    A file has one key a line, plain or `sha256:<64 hex digits>`, with an optional name after it, and after that the
    role `admin` for keys that may load and unload models; `#` begins a comment.
    It is read again when it changes. A file that is deleted or has no key revokes its keys: only those from settings
    are accepted then. While it is invalid in another way, the previous keys stay in use.
    """

    def __init__(self, listed: Iterable[str] = (), file: Path | None = None) -> None:
        """Raises KeyFileError."""
        self._listed = _parse(listed)
        self._file = file
        self._digest: bytes | None = None  # of the file's content when it was read last
        self._checked_at = -RELOAD_SECONDS
        self._keys = dict(self._listed)
        if file is not None:
            if not file.exists():
                raise KeyFileError("the key file cannot be read (FileNotFoundError)")
            self._read(file)
            if not self.num_keys:
                raise KeyFileError("the key file contains no key")

    @property
    def num_keys(self) -> int:
        return len(self._keys)

    def find(self, authorization: str | None) -> APIKey:
        """The key in an Authorization header. Raises APIError 401."""
        if not authorization:
            raise _refused(
                "You didn't provide an API key. You need to provide your API key in an Authorization header using "
                "Bearer auth (i.e. Authorization: Bearer YOUR_KEY)."
            )
        scheme, _, key = authorization.partition(" ")
        key = key.strip()
        if scheme.lower() != "bearer" or not key:
            raise _refused("Your Authorization header is malformed: it must read 'Bearer YOUR_KEY'.")
        self._reload()
        given = hashlib.sha256(key.encode("latin-1", "replace")).digest()
        # compared with all of them, so that the time taken does not tell which one matched
        found = [accepted for digest, accepted in self._keys.items() if hmac.compare_digest(digest, given)]
        if not found:
            raise _refused("Incorrect API key provided.")
        return found[0]

    def _reload(self) -> None:
        now = time.monotonic()
        if self._file is None or now - self._checked_at < RELOAD_SECONDS:
            return
        self._checked_at = now
        try:
            self._read(self._file)
        except KeyFileError as error:
            logger.error("the previous API keys stay in use: %s", error)

    def _read(self, file: Path) -> None:
        try:
            content = file.read_bytes()
        except FileNotFoundError:
            content = b""
        except OSError as error:
            raise KeyFileError(f"the key file cannot be read ({type(error).__name__})") from None
        digest = hashlib.sha256(content).digest()  # time and size may be those of the previous content
        if digest == self._digest:
            return
        self._digest = digest
        try:
            lines = content.decode().splitlines()
        except UnicodeDecodeError:
            raise KeyFileError("the key file is not UTF-8") from None
        self._keys = {**self._listed, **_parse(lines)}
        logger.info("%d API keys are in use", self.num_keys)
        if not self._keys:
            logger.error("the key file contains no key: all requests are refused until it has one")


def _parse(lines: Iterable[str]) -> dict[bytes, APIKey]:
    """{SHA-256 digest: key}. Raises KeyFileError."""
    keys: dict[bytes, APIKey] = {}
    for number, line in enumerate(lines, 1):
        parts = line.split("#", 1)[0].split()
        if not parts:
            continue
        if len(parts) > 3 or (len(parts) > 1 and not NAME.fullmatch(parts[1])):
            raise KeyFileError(f"key {number}: expected a key and at most one name of letters, digits and . _ - @")
        if len(parts) == 3 and parts[2] != ADMINISTRATOR:
            raise KeyFileError(f"key {number}: behind the name there can only be the role {ADMINISTRATOR}")
        hashed = HASHED.fullmatch(parts[0])
        if parts[0].startswith("sha256:") and not hashed:
            raise KeyFileError(f"key {number}: sha256: must be followed by 64 hexadecimal digits")
        digest = bytes.fromhex(hashed[1]) if hashed else hashlib.sha256(parts[0].encode()).digest()
        name = parts[1] if len(parts) > 1 else f"key-{digest.hex()[:8]}"
        keys[digest] = APIKey(name, is_administrator=len(parts) == 3)
    return keys


def _refused(message: str) -> APIError:
    return APIError(
        401, message, INVALID_REQUEST, None, "invalid_api_key", {"www-authenticate": 'Bearer realm="chatglm"'}
    )
