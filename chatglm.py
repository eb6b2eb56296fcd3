"""The command `chatglm`: serve, models, settings, chat and check, each a thin front of what exists."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
USAGE = """usage: chatglm COMMAND …

  serve [--port N] [--host H] [--model TAG]   start the server
  models inspect|import|quantize|list …       the model store
  settings                                    every setting with its value, its default and where the value is from
  chat [QUESTION] [--url URL]                 talk to a running server in the terminal
  check                                       whether settings, model and kernels are ready to serve
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 1 failed (with a message of one line), 2 wrong usage."""
    command, *rest = list(sys.argv[1:] if arguments is None else arguments) or [""]
    os.environ.setdefault("BENTOML_DO_NOT_TRACK", "true")
    match command:
        case "serve":
            return _serve(rest)
        case "models":
            from models.store.command_line import main as models

            return models(rest)
        case "settings":
            return _settings()
        case "check":
            return _check()
        case "chat":
            sys.argv = ["chatglm chat", *rest]
            runpy.run_module("examples.chat", run_name="__main__")
            return 0
        case "-h" | "--help" | "help":
            print(USAGE, end="")
            return 0
        case _:
            print(f"{USAGE}chatglm: there is no command {command!r}" if command else USAGE, file=sys.stderr)
            return 2


def _serve(rest: list[str]) -> int:
    """Becomes `bentoml serve` in this folder. `--model` is CHATGLM_MODEL."""
    if "--model" in rest:
        at = rest.index("--model")
        if at + 1 == len(rest):
            print("chatglm serve: --model needs the tag of a stored model", file=sys.stderr)
            return 2
        os.environ["CHATGLM_MODEL"] = rest[at + 1]
        del rest[at : at + 2]
    os.chdir(HERE)
    os.execv(sys.executable, [sys.executable, "-m", "bentoml", "serve", *rest])


def _settings() -> int:
    from serving.settings import PREFIX, Settings, SettingsError

    try:
        settings = Settings.from_environment(os.environ)
    except SettingsError as error:
        print(f"chatglm: {error}", file=sys.stderr)
        return 1
    for name, field in Settings.model_fields.items():
        value, default = getattr(settings, name), field.default
        origin = "environment" if name in settings.model_fields_set else "default"
        shown = "(set, not shown)" if name == "api_keys" and value else repr(value)
        print(f"{PREFIX}{name.upper()} = {shown}  [{origin}; default {default!r}]")
    return 0


def _check() -> int:
    """One line for each thing that a start needs."""
    from kernels import native_library
    from models.store.model_store import StoreError, ensure_demo, servable
    from serving.settings import Settings, SettingsError

    try:
        settings = Settings.from_environment(os.environ)
        stored = servable(ensure_demo() if settings.model == "chatglm2-demo" else settings.model)
    except (SettingsError, StoreError) as error:
        print(f"chatglm: {error}", file=sys.stderr)
        return 1
    print(f"settings: fine\nmodel: {stored.tag} ({stored.family})")
    is_compiled = native_library.load() is not None
    print("kernels: compiled" if is_compiled else "kernels: not compiled (install g++ and run make setup): slower")
    has_keys = bool(settings.api_keys or settings.api_keys_file)
    print("keys: required" if has_keys else "keys: none, so the server listens on loopback only by default")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BrokenPipeError:  # such as `chatglm settings | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
