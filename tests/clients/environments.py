"""Makes one environment for each client under .state/clients, since their requirements clash. Says why where it cannot.

`python -m tests.clients.environments` makes what is missing; what is there is left alone.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.golden_data import REPOSITORY

ROOT = REPOSITORY / ".state" / "clients"
INSTALL_SECONDS = 900


@dataclass(frozen=True)
class Client:
    """A client program and what it needs. `script` is run by `program` of its environment with the server's address."""

    name: str
    packages: tuple[str, ...]
    script: str
    is_node: bool = False

    @property
    def folder(self) -> Path:
        return ROOT / self.name

    @property
    def why_not(self) -> Path:
        """Holds the reason when the environment could not be made."""
        return ROOT / f"{self.name}.why-not"

    @property
    def program(self) -> Path:
        node = shutil.which("node")
        return Path(node or "node") if self.is_node else self.folder / "bin" / "python"

    @property
    def is_there(self) -> bool:
        return (self.folder / "complete").exists()


CLIENTS = (
    Client("openai-0.28", ("openai==0.28.1", "numpy==2.4.6"), "openai_0_28.py"),
    Client("openai-1", ("openai==1.109.1",), "openai_sdk.py"),
    Client("openai-2", ("openai==2.54.0",), "openai_sdk.py"),
    Client("openai-3", ("openai==3.57.0",), "openai_sdk.py"),
    Client("langchain", ("langchain-openai==1.7.3",), "langchain_client.py"),
    Client("litellm", ("litellm==1.94.0",), "litellm_client.py"),
    Client("llm", ("llm==0.36",), "llm_cli.py"),
    Client("openai-node", ("openai@6.49.0",), "openai_node.mjs", is_node=True),
    Client("vercel-ai", ("ai@5.0.277", "@ai-sdk/openai-compatible@1.0.61", "zod@4.6.7"), "vercel_ai.mjs", is_node=True),
)


def make(client: Client) -> str | None:
    """The reason why this client's environment cannot be made; None if it is there."""
    if client.is_there:
        return None
    if client.is_node and not (shutil.which("npm") and shutil.which("node")):
        return "node and npm are not installed"
    shutil.rmtree(client.folder, ignore_errors=True)
    client.folder.mkdir(parents=True)
    for command in _commands(client):
        try:
            done = subprocess.run(
                command,
                cwd=client.folder,
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=INSTALL_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"`{' '.join(command[:4])} ...` took more than {INSTALL_SECONDS} seconds"
        if done.returncode != 0:
            lines = (done.stderr or done.stdout).strip().splitlines()
            return lines[-1] if lines else f"exit code {done.returncode}"
    (client.folder / "complete").touch()
    return None


def _commands(client: Client) -> list[list[str]]:
    if client.is_node:
        (client.folder / "package.json").write_text(json.dumps({"private": True, "type": "module"}))
        return [["npm", "install", "--no-audit", "--no-fund", "--save-exact", *client.packages]]
    python = str(client.folder / "bin" / "python")
    quiet = ["--quiet", "--disable-pip-version-check"]
    return [
        [sys.executable, "-m", "venv", str(client.folder)],
        [python, "-m", "pip", "install", *quiet, *client.packages],
    ]


def main() -> None:
    ROOT.mkdir(parents=True, exist_ok=True)
    for client in CLIENTS:
        reason = make(client)
        client.why_not.unlink(missing_ok=True)
        if reason is not None:
            client.why_not.write_text(reason, encoding="utf-8")
        print(f"{client.name}: {reason or 'ready'}", flush=True)


if __name__ == "__main__":
    main()
