"""A server started by a process that has itself imported the service."""

from __future__ import annotations

import os
from pathlib import Path

from serving.shared_folder import PREFIX, VARIABLE
from tests.e2e.server import serving


def test_the_folder_of_another_server_is_not_used(tmp_path: Path) -> None:
    """Its workers' pages and metrics are in there; and who did not make the folder did not end with exit code 1."""
    foreign = tmp_path / f"{PREFIX}{os.getpid()}-abc"
    foreign.mkdir()
    with serving(tmp_path, {VARIABLE: str(foreign)}):
        assert list(foreign.iterdir()) == []
