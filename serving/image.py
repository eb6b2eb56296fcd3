"""What is chosen when a Bento is built, and the container image that it becomes. Knows nothing of requests."""

from __future__ import annotations

import re

from bentoml.images import Image
from pydantic import BaseModel, ConfigDict, Field, field_validator

PYTHON = "3.11"


class BuildArguments(BaseModel):
    """`bentoml build --arg NAME=VALUE`; BentoML writes them into the Bento and gives them back when it is served."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field("", description="What is served unless CHATGLM_MODEL says otherwise.")
    bundle: bool = Field(True, description="Whether the model becomes a part of the image.")
    torch: str = Field("", description="uv's torch backend for the image (cpu, cu126, ...); empty takes the index's.")

    @property
    def environment(self) -> dict[str, str]:
        """What this says about settings; the real environment goes first."""
        return {"CHATGLM_MODEL": self.model} if self.model else {}

    @field_validator("torch")
    @classmethod
    def _is_a_word(cls, torch: str) -> str:
        if not re.fullmatch(r"[a-z0-9.]*", torch):  # it becomes a part of a shell command
            raise ValueError("must be a name like cpu or cu126")
        return torch


def container_image(torch: str) -> Image:
    """A slim Python without BentoML's layer of compilers and git, which nothing here needs; no package cache in it."""
    image = Image(base_image=f"python:{PYTHON}-slim", distro="none", python_version=PYTHON, lock_python_packages=False)
    configuration = "no-cache = true\\n" + (f'[pip]\\ntorch-backend = "{torch}"\\n' if torch else "")
    image.run(f"mkdir -p /etc/uv && printf '{configuration}' > /etc/uv/uv.toml")
    return image
