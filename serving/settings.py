"""Every knob, typed. Read once, by service.py, from environment variables named CHATGLM_<NAME>."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

PREFIX = "CHATGLM_"


class SettingsError(Exception):
    """An environment variable is wrong; the message is one clear line for a person."""


class Settings(BaseModel):
    """What an operator may choose. The defaults serve the demonstration model on any machine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(
        "chatglm2-demo", description="Tag of the model in the Bento model store, `name` or `name:version`."
    )
    aliases: str = Field(
        "chatglm2-6b,chatglm", description="Other names that the model answers to, separated by commas."
    )
    accept_any_model: bool = Field(False, description="Answer to every model name instead of 404 for unknown ones.")
    device: str = Field("auto", description="`auto` (CUDA, else MPS, else CPU), `cpu`, `cuda`, `cuda:1`, `mps`.")
    precision: Literal["auto", "float32", "bfloat16", "float16", "int8", "int4"] = Field(
        "auto", description="Format of the weights; `auto` takes 16 bits for all but small models."
    )
    threads: int = Field(0, ge=0, description="CPU threads of the engine; 0 takes the cores this process may use.")
    kv_cache_gib: float = Field(0.0, ge=0, description="Memory for keys and values in GiB; 0 picks by free memory.")
    max_sequences: int = Field(64, ge=1, le=1024, description="Answers generated at once; others wait.")
    max_batch_tokens: int = Field(512, ge=16, le=65536, description="Rows of one engine step, prompts included.")
    max_n: int = Field(128, ge=1, le=128, description="Largest `n` of one request.")
    max_body_mib: float = Field(4.0, gt=0, description="Largest request body in MiB; larger ones get 413.")
    ping_seconds: float = Field(15.0, gt=0, description="Silence after which a stream sends a comment to stay open.")

    @property
    def alias_names(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in self.aliases.split(",") if name.strip())

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Settings:
        """Read CHATGLM_* variables. Raises SettingsError for a bad value or a name that does not exist."""
        values = {name[len(PREFIX) :].lower(): value for name, value in environment.items() if name.startswith(PREFIX)}
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            name = PREFIX + str(first["loc"][0]).upper()
            if first["type"] == "extra_forbidden":
                raise SettingsError(f"{name} is not a setting; README.md lists them") from None
            raise SettingsError(f"{name}={first['input']!r}: {first['msg']}") from None
