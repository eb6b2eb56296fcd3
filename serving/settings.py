"""Every knob, typed. Read once, by service.py, from environment variables named CHATGLM_<NAME>."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Literal, cast

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
        "auto",
        description="Format of the weights; `auto` takes 16 bits where they fit, full precision for small models.",
    )
    engine: Literal["native", "vllm"] = Field(
        "native", description="`vllm` runs the network in vLLM, which needs the environment of `requirements-vllm.txt`."
    )
    vllm_options: str = Field(
        "", description='vLLM\'s own engine arguments as a JSON object, like `{"pipeline_parallel_size": 2}`.'
    )
    workers: int = Field(
        1,
        ge=1,
        le=64,
        description="Processes that each serve a copy of the model, on a GPU of their own; limits hold for all.",
    )
    gpus_per_worker: int = Field(
        1, ge=1, le=64, description="GPUs that one copy is split over; above 1 only `ENGINE=vllm`."
    )
    quick_start: bool = Field(
        False, description="On a GPU: ready without compiling and recording, up to a minute earlier, and slower."
    )
    threads: int = Field(0, ge=0, description="CPU threads of the engine; 0 takes the cores this process may use.")
    kv_cache_gib: float = Field(0.0, ge=0, description="Memory for keys and values in GiB; 0 picks by free memory.")
    max_sequences: int = Field(64, ge=1, le=1024, description="Answers generated at once; others wait.")
    max_batch_tokens: int = Field(512, ge=16, le=65536, description="Rows of one engine step, prompts included.")
    drop_oldest_rounds: bool = Field(
        False, description="Leave the oldest rounds out of too long a conversation; `x-chatglm-dropped-rounds` counts."
    )
    max_n: int = Field(128, ge=1, le=128, description="Largest `n` of one request.")
    max_body_mib: float = Field(4.0, gt=0, description="Largest request body in MiB; larger ones get 413.")
    ping_seconds: float = Field(15.0, gt=0, description="Silence after which a stream sends a comment to stay open.")
    max_queued_requests: int = Field(
        256, ge=0, description="Answers that may wait beyond `MAX_SEQUENCES`; past it 429 with `Retry-After`."
    )
    max_queued_tokens: int = Field(
        1_000_000, ge=0, description="Prompt and answer tokens that may wait beyond the cache; past it 429."
    )
    client_requests_per_minute: int = Field(0, ge=0, description="Of one key, else one address; 0 is no limit.")
    client_tokens_per_minute: int = Field(0, ge=0, description="The same in tokens, prompt and answer.")
    client_max_concurrent: int = Field(0, ge=0, description="Requests of one key or address at once; 0 is no limit.")
    request_timeout: float = Field(
        1800.0, gt=0, description="Seconds for one request, then 504; `x-request-timeout` asks for less (408)."
    )
    stall_seconds: float = Field(60.0, gt=0, description="A client that reads nothing of its stream so long has left.")
    step_seconds: float = Field(
        300.0, ge=1, description="An engine step that takes longer hangs: `/livez` fails and the requests are told."
    )
    grace_seconds: float = Field(30.0, ge=0, description="For requests in flight at SIGTERM; then they are cut off.")
    api_keys: str = Field(
        "", description="Keys that open the API, separated by commas: plain or `sha256:<hex>`, then a space and a name."
    )
    api_keys_file: str = Field("", description="The same in a file, one a line; read again when it changes.")
    public_metrics: bool = Field(False, description="`/metrics` needs no key, though the API does.")
    public_docs: bool = Field(False, description="The documentation pages need no key, though the API does.")
    chat_page: bool = Field(True, description="A chat page for browsers at `/chat`, linked from `/`.")
    cors_origins: str = Field("", description="Web origins that browsers may call from, by commas; `*` is all.")
    access_log: Literal["text", "json", "off"] = Field("text", description="One line for each request on stdout.")
    otlp_endpoint: str = Field(
        "", description="Collector for OpenTelemetry traces (OTLP over HTTP), one span a request; empty is off."
    )

    @property
    def alias_names(self) -> tuple[str, ...]:
        return _listed(self.aliases)

    @property
    def api_key_list(self) -> tuple[str, ...]:
        return _listed(self.api_keys)

    @property
    def cors_origin_list(self) -> tuple[str, ...]:
        return _listed(self.cors_origins)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Settings:
        """Read CHATGLM_* variables. Raises SettingsError for a bad value or a name that does not exist."""
        values = {name[len(PREFIX) :].lower(): value for name, value in environment.items() if name.startswith(PREFIX)}
        try:
            settings = cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            name = PREFIX + str(first["loc"][0]).upper()
            if first["type"] == "extra_forbidden":
                raise SettingsError(f"{name} is not a setting; README.md lists them") from None
            raise SettingsError(f"{name}={first['input']!r}: {first['msg']}") from None
        settings._check_engine()
        return settings

    def _check_engine(self) -> None:
        """Raises SettingsError for what only the other engine has."""
        if self.engine == "native":
            if self.gpus_per_worker > 1:
                raise SettingsError(
                    "CHATGLM_GPUS_PER_WORKER above 1 needs CHATGLM_ENGINE=vllm, whose tensor_parallel_size it sets"
                )
            if self.vllm_options:
                raise SettingsError("CHATGLM_VLLM_OPTIONS needs CHATGLM_ENGINE=vllm")
            return
        if self.precision in ("int8", "int4"):
            raise SettingsError(
                f"CHATGLM_PRECISION={self.precision} is not for CHATGLM_ENGINE=vllm, which takes 16 or 32 bits"
            )
        self.vllm_arguments  # noqa: B018

    @property
    def vllm_arguments(self) -> dict[str, object]:
        """CHATGLM_VLLM_OPTIONS, read. Raises SettingsError."""
        try:
            options: object = json.loads(self.vllm_options or "{}")
        except ValueError:
            options = None
        if not isinstance(options, dict):
            raise SettingsError("CHATGLM_VLLM_OPTIONS is not a JSON object")
        return cast("dict[str, object]", options)


def _listed(text: str) -> tuple[str, ...]:
    return tuple(item.strip() for item in text.split(",") if item.strip())
