"""A Hugging Face folder that transformers loads by itself -> a checked folder of links to its files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.logging import disable_progress_bar

from kernels.precision import Progress
from models.checkpoints.files import (
    first_line,
    link_or_copy,
    read_json,
    read_optional,
    refuse_lfs_pointer,
    require_space,
    write_json,
)
from models.checkpoints.hf_config import check_config
from models.checkpoints.shards import ShardWriter, find_shards, inspect_shards, read_tensors
from models.checkpoints.transformers_lock import TRANSFORMERS_LOCK
from models.family import ImportRefused
from models.tokenizers.sentencepiece_to_json import convert

TOKENIZER_FILE = "tokenizer.json"
TEMPLATE_FILE = "chat_template.jinja"
TOOL_TEMPLATE_FILE = "chat_template_tool_use.jinja"
CONFIGURATION_FILES = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
MULTIMODAL_KEYS = ("vision_config", "audio_config", "text_config", "thinker_config")
PROBLEMS = ("missing", "mismatched", "unexpected")  # of the weights that transformers loads
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def read_config(source: Path) -> PretrainedConfig:
    """Check `config.json`. Raises ImportRefused for models that transformers does not load as a decoder by itself."""
    config = read_json(source / "config.json")
    model_type = config.get("model_type")
    if model_type == "chatglm":
        raise ImportRefused("this is a ChatGLM: import it with the family chatglm, chatglm2 or chatglm3")
    if (source / "modules.json").is_file():
        raise ImportRefused("this is an embedding model: import it with the family embedding")
    if model_type not in CONFIG_MAPPING:
        why = "it needs code of its own, which is never run" if "auto_map" in config else "it is too new or misspelled"
        raise ImportRefused(f"transformers does not know model_type {model_type!r} ({why})")
    if config.get("is_encoder_decoder") or model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ImportRefused(f"model_type {model_type!r} is not a decoder for text generation")
    multimodal = next((key for key in MULTIMODAL_KEYS if key in config), None)
    if multimodal is not None:
        raise ImportRefused(f"config.json has {multimodal!r}: multimodal models cannot be imported")
    if config.get("quantization_config"):
        raise ImportRefused("the checkpoint is quantised (quantization_config): import the unquantised one")
    try:
        parsed = AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001 - transformers documents no exception types
        raise ImportRefused(f"transformers cannot read config.json: {first_line(error)}") from None
    check_config(config, parsed)
    return cast("PretrainedConfig", parsed)


def import_weights(source: Path, target: Path, progress: Progress) -> dict[str, Any]:
    """Link safetensors shards into `target`, or convert `.bin` shards. Returns metadata."""
    shards = find_shards(source)
    found = inspect_shards(shards)
    total, done = sum(info.num_bytes for info in found.values()), 0
    if all(shard.suffix == ".safetensors" for shard in shards):
        for shard in shards:
            link_or_copy(shard, target / shard.name)
            done += sum(info.num_bytes for info in found.values() if info.shard == shard)
            progress(done, total, shard.name)
        index = source / "model.safetensors.index.json"
        if index.is_file() and not (target / "model.safetensors").is_file():
            link_or_copy(index, target / index.name)
    else:
        require_space(target, total)
        writer = ShardWriter(target)
        for name, tensor in read_tensors(shards, progress):
            writer.add(name, tensor)
        writer.finish()
    floats = [info.dtype for info in found.values() if info.dtype.is_floating_point]
    precisions = sorted(str(dtype).removeprefix("torch.") for dtype in floats)
    parameters = sum(math.prod(info.shape) for info in found.values())
    return {"dtype": max(precisions, key=precisions.count, default="float32"), "parameters": parameters}


def check_weights(target: Path) -> None:
    """Raise ImportRefused unless every weight of the network is there with its shape; transformers would invent it.

    Loads onto the meta device: names and shapes are compared, no weights are read.
    """
    disable_progress_bar()  # it would be drawn into the command's own progress bar
    try:
        with TRANSFORMERS_LOCK:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                target,
                device_map="meta",
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except Exception as error:  # noqa: BLE001 - transformers documents no exception types
        raise ImportRefused(f"transformers cannot load this checkpoint: {first_line(error)}") from None
    modules = {name for name, _ in loaded[0].named_modules()}
    problems: dict[str, set[str]] = {kind: {str(key) for key in loaded[1][f"{kind}_keys"]} for kind in PROBLEMS}
    # weights of further modules, such as a multi-token prediction, change no logits
    problems["unexpected"] = {name for name in problems["unexpected"] if name.rsplit(".", 2)[0] in modules}
    for what, keys in problems.items():
        names = sorted(keys)
        if names:
            raise ImportRefused(f"the checkpoint does not fit config.json ({what} weights: {names[0]} …)")


def import_tokenizer(source: Path, target: Path) -> None:
    """Link `tokenizer.json`, or convert the folder's tokenizer to one."""
    for name in CONFIGURATION_FILES:
        if (source / name).is_file():
            link_or_copy(source / name, target / name)
    original = source / TOKENIZER_FILE
    if original.is_file():
        refuse_lfs_pointer(original)
        link_or_copy(original, target / TOKENIZER_FILE)
        return
    pieces = source / "tokenizer.model"
    if pieces.is_file():
        refuse_lfs_pointer(pieces)
        has_bos = read_optional(source / "tokenizer_config.json").get("add_bos_token") is not False
        convert(pieces, target / TOKENIZER_FILE, read_optional(source / "added_tokens.json"), has_bos)
        return
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False, use_fast=True)
        tokenizer.backend_tokenizer.save(str(target / TOKENIZER_FILE))
    except Exception as error:  # noqa: BLE001 - transformers documents no exception types
        raise ImportRefused(
            f"{source} has no {TOKENIZER_FILE}, and transformers cannot convert its tokenizer: {first_line(error)}"
        ) from None


def named_tokens(folder: Path) -> dict[str, str]:
    """bos_token, eos_token and so on -> the token's text, by the folder's configuration."""
    named: dict[str, str] = {}
    for file in (folder / "special_tokens_map.json", folder / "tokenizer_config.json"):
        configuration = read_optional(file)
        for key in NAMED_TOKENS:
            value = configuration.get(key)
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str) and text:
                named[key] = text
    return named


def token_ids(folder: Path, key: str) -> list[int]:
    """bos_token_id or eos_token_id of generation_config.json and config.json: a number, a list or nothing."""
    ids: list[int] = []
    for name in ("generation_config.json", "config.json"):
        value = read_optional(folder / name).get(key)
        ids += [token_id for token_id in (value if isinstance(value, list) else [value]) if isinstance(token_id, int)]
    return ids


def import_template(source: Path, target: Path, chosen: str | None) -> None:
    """Write the chat templates as files: `chosen` if the operator named one, else the model's own."""
    templates = {"default": chosen} if chosen is not None else _own_templates(source)
    default = templates.get("default")
    if not default:
        raise ImportRefused(f"{source} has no chat template; name the one it was trained with: --template vicuna")
    (target / TEMPLATE_FILE).write_text(default, encoding="utf-8")
    if tools := templates.get("tool_use"):
        (target / TOOL_TEMPLATE_FILE).write_text(tools, encoding="utf-8")


def _own_templates(source: Path) -> Mapping[str, str]:
    """By name, in transformers' order of preference: a .jinja file, chat_template.json, tokenizer_config.json."""
    if (source / TEMPLATE_FILE).is_file():
        additional = sorted((source / "additional_chat_templates").glob("*.jinja"))
        named = {file.stem: file.read_text(encoding="utf-8") for file in additional}
        return {**named, "default": (source / TEMPLATE_FILE).read_text(encoding="utf-8")}
    for name in ("chat_template.json", "tokenizer_config.json"):
        value = read_optional(source / name).get("chat_template")
        if isinstance(value, str):
            return {"default": value}
        if isinstance(value, dict):
            return {str(name): str(text) for name, text in value.items()}
        if isinstance(value, list):
            return {str(entry["name"]): str(entry["template"]) for entry in value}
    return {}


def write_config(source: Path, target: Path) -> None:
    """config.json without auto_map, which would make transformers look for remote code."""
    config = read_json(source / "config.json")
    write_json(target / "config.json", {key: value for key, value in config.items() if key != "auto_map"})
