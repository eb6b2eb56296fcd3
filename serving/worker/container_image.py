"""What is chosen when a Bento is built, and the container image that it becomes. Knows nothing of requests."""

from __future__ import annotations

import re
from typing import Literal

from bentoml.images import Image
from pydantic import BaseModel, ConfigDict, Field, field_validator

PYTHON = "3.11"


class BuildArguments(BaseModel):
    """`bentoml build --arg NAME=VALUE`; BentoML writes them into the Bento and gives them back when it is served."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field("", description="What is served unless CHATGLM_MODEL says otherwise.")
    bundle: bool = Field(True, description="Whether the model becomes a part of the image.")
    engine: Literal["native", "vllm"] = Field("native", description="What runs the network unless CHATGLM_ENGINE says.")
    torch: str = Field("", description="uv's torch backend for the image (cpu, cu126, ...); empty takes the index's.")

    @property
    def environment(self) -> dict[str, str]:
        """What this says about settings; the real environment goes first."""
        model = {"CHATGLM_MODEL": self.model} if self.model else {}
        return model | ({"CHATGLM_ENGINE": self.engine} if self.engine != "native" else {})

    @field_validator("torch")
    @classmethod
    def _is_a_word(cls, torch: str) -> str:
        if not re.fullmatch(r"[a-z0-9.]*", torch):  # it becomes a part of a shell command
            raise ValueError("must be a name like cpu or cu126")
        return torch


def container_image(built: BuildArguments) -> Image:
    """A slim Python without a package cache, and without BentoML's layer of compilers and git, which only vLLM needs:
    it compiles kernels while it serves."""
    distro = "debian" if built.engine == "vllm" else "none"
    image = Image(base_image=f"python:{PYTHON}-slim", distro=distro, python_version=PYTHON, lock_python_packages=False)
    backend = f'[pip]\\ntorch-backend = "{built.torch}"\\n' if built.torch else ""
    configuration = "no-cache = true\\n" + backend
    image.run(f"mkdir -p /etc/uv && printf '{configuration}' > /etc/uv/uv.toml")
    return image
