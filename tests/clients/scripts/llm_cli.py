"""Simon Willison's `llm` command with a model of its configuration file."""

import json
import os
import subprocess
import sys
from pathlib import Path

LLM = str(Path(sys.executable).with_name("llm"))
home = Path(os.environ["HOME"]) / "llm"
home.mkdir(parents=True)
lines = []
for name in ("gpt-3.5-turbo", "nobody"):
    lines.append(f"- model_id: our-{name}\n  model_name: {name}\n  api_base: {sys.argv[1]}\n")
(home / "extra-openai-models.yaml").write_text("".join(lines))


def ask(model: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [LLM, "-m", model, *options, "你好"],
        env={**os.environ, "LLM_USER_PATH": str(home), "OPENAI_API_KEY": "none"},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )


streamed = ask("our-gpt-3.5-turbo")
told = {
    "whole": ask("our-gpt-3.5-turbo", "--no-stream").stdout.strip(),
    "streamed": streamed.stdout.strip(),
    "num_pieces": len(streamed.stdout),
    "error": ask("our-nobody").stderr,
}
print(json.dumps(told))
