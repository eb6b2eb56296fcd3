"""Environment variables CHATGLM_<NAME> -> Settings, read once by service.py; arguments of a build -> BuildArguments."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

PREFIX = "CHATGLM_"
# what Kubernetes puts into every container beside a service named `chatglm` or `chatglm-...`
INJECTED = re.compile(r"(.+_)?(SERVICE_HOST|SERVICE_PORT(_.+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)")
INJECTED_ADDRESS = re.compile(r"(tcp|udp|sctp)://")


class SettingsError(Exception):
    """A setting is invalid; the message is one line for the operator."""


def _split(text: str) -> tuple[str, ...]:
    return tuple(item.strip() for item in text.split(",") if item.strip())


def _is_injected(name: str, value: str) -> bool:
    """Whether an orchestrator set this variable to tell where another service is. name: without the prefix."""
    is_address = name.rpartition("_")[2] == "PORT" and INJECTED_ADDRESS.match(value) is not None
    return is_address or INJECTED.fullmatch(name) is not None


def _suggestion(name: str) -> str:
    """The setting whose name is most like this one, in words; '' if none is."""
    known = [PREFIX + field.upper() for field in Settings.model_fields]
    similar = get_close_matches(name, known, n=1, cutoff=0.8)
    return f": did you mean {similar[0]}?" if similar else ""


Precision = Literal["auto", "float32", "bfloat16", "float16", "int8", "int4"]
Listed = Annotated[tuple[str, ...], BeforeValidator(_split)]  # separated by commas


class Settings(BaseModel):
    """The service's configuration. The defaults serve the demonstration model on any machine.

    The text below each setting is its description in docs/settings.md.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    model: str = "chatglm2-demo"
    """Tag of the model in the Bento model store, `name` or `name:version`."""
    models: Listed = ()
    """Several models instead, separated by commas: the first is the default; `*` means every stored one."""
    models_file: str = ""
    """YAML file with several models and settings of their own (docs/models.md)."""
    preload: Listed = ("first",)
    """Models to load at the start, separated by commas; or `first`, `all`, `none`. The others load when asked for."""
    memory_gib: float = Field(0.0, ge=0)
    """Memory of all models together in GiB, caches included; 0 takes 80 % of what is free at the start."""
    idle_minutes: float = Field(0.0, ge=0)
    """Unload a model after so many minutes without requests; 0 keeps it until its memory is needed."""
    load_seconds: float = Field(300.0, gt=0)
    """Seconds that a request waits while its model is loaded; then 503."""
    aliases: Listed = ("chatglm2-6b", "chatglm")
    """Other names that the model answers to, separated by commas."""
    accept_any_model: bool = False
    """Accept every model name in requests instead of answering 404 for unknown ones."""
    device: str = "auto"
    """`auto` (CUDA, else MPS, else CPU), `cpu`, `cuda`, `cuda:1` or `mps`."""
    precision: Precision = "auto"
    """Weight format; `auto` uses 16 bits where they fit, and full precision for small models."""
    engine: Literal["native", "vllm"] = "native"
    """`vllm` runs the model in vLLM and needs the packages of `requirements-vllm.txt`."""
    vllm_options: str = ""
    """Further engine arguments of vLLM as a JSON object, for example `{"pipeline_parallel_size": 2}`."""
    workers: int = Field(1, ge=1, le=64)
    """Worker processes, each with a copy of the model on its own GPU; request limits apply to all together."""
    gpus_per_worker: int = Field(1, ge=1, le=64)
    """Number of GPUs that one copy of the model is split over; more than 1 requires `ENGINE=vllm`."""
    gpu_type: str = ""
    """BentoCloud's name of the GPU to run on, such as `nvidia-l4`; empty leaves the choice to BentoCloud."""
    quick_start: bool = False
    """On a GPU: skip CUDA graph capture; ready seconds earlier, but slower."""
    threads: int = Field(0, ge=0)
    """CPU threads of the engine; 0 uses all cores available to the process."""
    kv_cache_gib: float = Field(0.0, ge=0)
    """Size of the KV cache in GiB; 0 chooses it by the free memory."""
    context_length: int = Field(0, ge=0)
    """Maximum tokens of prompt and answer together; 0 takes what the model was trained for."""
    kv_precision: Literal["auto", "16", "8"] = "auto"
    """Bits of a cached number: `8` holds nearly twice the tokens (a scale for each token and head); `auto` is 16."""
    max_sequences: int = Field(64, ge=1, le=1024)
    """Maximum number of answers generated concurrently; further ones are queued."""
    max_batch_tokens: int = Field(512, ge=16, le=65536)
    """Maximum number of tokens processed per step, prompt tokens included; 2048 on a GPU unless it is set."""
    drop_oldest_rounds: bool = False
    """Drop the oldest rounds of too long a conversation; `x-chatglm-dropped-rounds` gives their number."""
    unknown_fields: Literal["refuse", "ignore"] = "refuse"
    """Request fields that do not exist: a 400, or served without them and named in `x-chatglm-ignored-fields`."""
    max_n: int = Field(128, ge=1, le=128)
    """Maximum value of `n` in a request."""
    max_body_mib: float = Field(4.0, gt=0)
    """Maximum size of a request body in MiB; larger ones get 413."""
    ping_seconds: float = Field(15.0, gt=0)
    """A stream without data for this many seconds sends a comment to keep the connection open."""
    max_queued_requests: int = Field(256, ge=0)
    """Maximum number of answers queued beyond `MAX_SEQUENCES`; beyond it 429 with `Retry-After`."""
    max_queued_tokens: int = Field(1_000_000, ge=0)
    """Maximum number of prompt and completion tokens queued beyond the KV cache; beyond it 429."""
    client_requests_per_minute: int = Field(0, ge=0)
    """Requests per minute per API key (per IP address without keys); 0 means no limit."""
    client_tokens_per_minute: int = Field(0, ge=0)
    """Prompt and completion tokens per minute per API key (per IP address without keys); 0 means no limit."""
    client_max_concurrent: int = Field(0, ge=0)
    """Concurrent requests per API key (per IP address without keys); 0 means no limit."""
    request_timeout: float = Field(1800.0, gt=0)
    """Timeout of a request in seconds, then 504; the header `x-request-timeout` can shorten it (408)."""
    stall_seconds: float = Field(60.0, gt=0)
    """A streaming client that reads nothing for this many seconds is treated as disconnected."""
    step_seconds: float = Field(300.0, ge=1)
    """A step that exceeds this is treated as hung: `/livez` fails and requests in flight get an error."""
    exit_on_failed_load: bool = False
    """Exit with code 1 when the model cannot be loaded, instead of staying up with a failing `/livez`."""
    grace_seconds: float = Field(30.0, ge=0)
    """Seconds that requests in flight have to finish after SIGTERM before they are aborted."""
    api_keys: Listed = ()
    """Accepted API keys, separated by commas: plain or `sha256:<hex>`, then optionally a space and a name."""
    api_keys_file: str = ""
    """File with such keys, one per line; read again when it changes."""
    public_metrics: bool = False
    """`/metrics` requires no key, even if the API does."""
    public_docs: bool = False
    """The documentation pages require no key, even if the API does."""
    chat_page: bool = True
    """Serve a chat page for browsers at `/chat`, linked from `/`."""
    cors_origins: Listed = ()
    """Origins from which browsers may call the API (CORS), separated by commas; `*` allows all."""
    access_log: Literal["text", "json", "off"] = "text"
    """Access log on stdout, one line per request: `text`, `json` or `off`."""
    otlp_endpoint: str = ""
    """OTLP/HTTP endpoint for OpenTelemetry traces, one span per request; empty disables them."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Settings:
        """Raises SettingsError for an invalid value and for a name that does not exist."""
        values = {
            name[len(PREFIX) :].lower(): value
            for name, value in environment.items()
            if name.startswith(PREFIX) and not _is_injected(name[len(PREFIX) :], value)
        }
        try:
            settings = cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            name = PREFIX + str(first["loc"][0]).upper()
            if first["type"] == "extra_forbidden":
                raise SettingsError(
                    f"{name} is not a setting{_suggestion(name)}; docs/settings.md lists them"
                ) from None
            raise SettingsError(f"{name}={first['input']!r}: {first['msg']}") from None
        settings._check_engine()
        settings._check_models()
        return settings

    def _check_models(self) -> None:
        """Raises SettingsError for two answers to the question which models are served."""
        given = [name for name in ("model", "models", "models_file") if getattr(self, name) and self._is_given(name)]
        if len(given) > 1:
            raise SettingsError(f"set one of {' and '.join(PREFIX + name.upper() for name in given)}")
        if self.engine == "vllm" and given and given != ["model"]:
            raise SettingsError("CHATGLM_ENGINE=vllm serves one model: set CHATGLM_MODEL")

    def _is_given(self, name: str) -> bool:
        return name in self.model_fields_set

    def _check_engine(self) -> None:
        """Raises SettingsError for options that the chosen engine does not support."""
        if self.engine == "native":
            if self.gpus_per_worker > 1:
                raise SettingsError("CHATGLM_GPUS_PER_WORKER above 1 requires CHATGLM_ENGINE=vllm (tensor parallelism)")
            if self.vllm_options:
                raise SettingsError("CHATGLM_VLLM_OPTIONS requires CHATGLM_ENGINE=vllm")
            return
        if self.precision in ("int8", "int4"):
            raise SettingsError(f"CHATGLM_PRECISION={self.precision} is not supported by CHATGLM_ENGINE=vllm")
        self.vllm_arguments  # noqa: B018

    def check_stored_model(self, tag: str, family: str, metadata: Mapping[str, Any], runs_on_vllm: bool) -> None:
        """Raises SettingsError if this stored model cannot be served with this engine or precision."""
        if self.engine == "vllm" and not runs_on_vllm:
            raise SettingsError(f"vLLM does not support the family {family}: use CHATGLM_ENGINE=native")
        stored_precision = metadata.get("quantized")
        if stored_precision and (self.engine == "vllm" or self.precision not in ("auto", stored_precision)):
            wanted = "CHATGLM_ENGINE=vllm" if self.engine == "vllm" else f"CHATGLM_PRECISION={self.precision}"
            raise SettingsError(f"{tag} is stored in {stored_precision}; for {wanted} serve {metadata['source']}")

    def served_models(self, stored_names: Callable[[], Sequence[str]]) -> list[ModelSettings]:
        """The models to serve, the default first. Raises SettingsError.

        stored_names: of the models in the store, for `*`.
        """
        if self.models_file:
            chosen = _read_models(Path(self.models_file))
        else:
            tags = self.models or (self.model,)
            chosen = [ModelSettings(model=tag) for tag in (stored_names() if tags == ("*",) else tags)]
        if not chosen:
            raise SettingsError("CHATGLM_MODELS=*, and the model store has no model: import one")
        if not chosen[0].aliases:
            chosen[0] = chosen[0].model_copy(update={"aliases": self.aliases})
        names = [each.served_name for each in chosen]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise SettingsError(f"two models are named {twice[0]!r}: give them names in CHATGLM_MODELS_FILE")
        loads = {"first": names[:1], "all": names, "none": []}
        preloaded = {name for given in self.preload for name in loads.get(given, [given])}
        if unknown := sorted(preloaded - set(names)):
            raise SettingsError(f"CHATGLM_PRELOAD names {unknown[0]!r}; served are {', '.join(names)}")
        if self.models == ("*",) and not self._is_given("preload"):
            preloaded = set()
        return [
            each if each.preload is not None else each.model_copy(update={"preload": each.served_name in preloaded})
            for each in chosen
        ]

    def of(self, model: ModelSettings) -> Settings:
        """With the settings that this model has of its own."""
        own = {name: value for name, value in model.model_dump().items() if value is not None}
        return self.model_copy(update={name: own[name] for name in OWN_SETTINGS if name in own})

    @property
    def vllm_arguments(self) -> dict[str, object]:
        """CHATGLM_VLLM_OPTIONS as a dictionary. Raises SettingsError."""
        try:
            options: object = json.loads(self.vllm_options or "{}")
        except ValueError:
            options = None
        if not isinstance(options, dict):
            raise SettingsError("CHATGLM_VLLM_OPTIONS is not a JSON object")
        return cast("dict[str, object]", options)


class ModelSettings(BaseModel):
    """One model of CHATGLM_MODELS_FILE. What it leaves out is as the settings say."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(min_length=1)  # tag in the store
    name: str = ""  # that requests use; the tag's own by default
    aliases: tuple[str, ...] = ()
    preload: bool | None = None
    precision: Precision | None = None
    context_length: int | None = Field(default=None, ge=0)
    kv_cache_gib: float | None = Field(default=None, ge=0)
    kv_precision: Literal["auto", "16", "8"] | None = None
    max_sequences: int | None = Field(default=None, ge=1, le=1024)
    drop_oldest_rounds: bool | None = None

    @property
    def served_name(self) -> str:
        return self.name or self.model.partition(":")[0]


OWN_SETTINGS = ("precision", "context_length", "kv_cache_gib", "kv_precision", "max_sequences", "drop_oldest_rounds")


class _ModelsFile(BaseModel):
    """`models:` and a list."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    models: list[ModelSettings] = Field(min_length=1)


def _read_models(file: Path) -> list[ModelSettings]:
    """Raises SettingsError that names the line of the file or the field."""
    import yaml

    try:
        return list(_ModelsFile.model_validate(yaml.safe_load(file.read_text(encoding="utf-8"))).models)
    except OSError as error:
        raise SettingsError(f"CHATGLM_MODELS_FILE: {file} cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise SettingsError(f"CHATGLM_MODELS_FILE: {file} is not valid YAML ({reason[:200]})") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise SettingsError(f"CHATGLM_MODELS_FILE: {where}: {first['msg']}") from None


class BuildArguments(BaseModel):
    """What `bentoml build --arg NAME=VALUE` chooses. BentoML stores it in the Bento and restores it at start."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    model: str = ""
    """Model that is served unless CHATGLM_MODEL is set."""
    models: str = ""
    """Several models instead, separated by commas; all of them are bundled."""
    bundle: bool = True
    """Whether the model is part of the Bento and so of its image."""
    engine: Literal["native", "vllm"] = "native"
    """Engine that is used unless CHATGLM_ENGINE is set."""
    torch: str = ""
    """uv's torch backend for the image (cpu, cu126, ...); empty uses the index's."""

    def complete(self, environment: Mapping[str, str]) -> dict[str, str]:
        """The environment with the settings that follow from the build, which it overrides."""
        chosen = {"CHATGLM_MODEL": self.model, "CHATGLM_MODELS": self.models}
        if any(environment.get(name) for name in (*chosen, "CHATGLM_MODELS_FILE")):
            chosen = {}
        return {"CHATGLM_ENGINE": self.engine, **{name: tag for name, tag in chosen.items() if tag}, **environment}

    @field_validator("torch")
    @classmethod
    def _check_torch(cls, torch: str) -> str:
        if not re.fullmatch(r"[a-z0-9.]*", torch):  # it becomes part of a shell command
            raise ValueError("must be a name like cpu or cu126")
        return torch
