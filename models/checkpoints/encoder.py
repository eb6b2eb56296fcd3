"""Folders of embedding models and cross-encoders -> checked folders of links, with what sentence-transformers says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from kernels.precision import Precision, Progress
from models.checkpoints.files import first_line, read_json, read_optional
from models.checkpoints.transformers_lock import TRANSFORMERS_LOCK
from models.family import ImportRefused

if TYPE_CHECKING:
    import torch

    from models.networks.encoder import TransformersEncoder

TOKENIZER_FILE = "tokenizer.json"
MODULES = ("Transformer", "Pooling", "Normalize")
SWITCHES = (
    "pooling_mode_cls_token", "pooling_mode_mean_tokens", "pooling_mode_lasttoken", "pooling_mode_max_tokens",
    "pooling_mode_mean_sqrt_len_tokens", "pooling_mode_weightedmean_tokens",
)  # fmt: skip
POOLINGS = {
    "pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean", "pooling_mode_lasttoken": "last",
    "cls": "cls", "mean": "mean", "lasttoken": "last",
}  # fmt: skip
# encoders whose positions begin behind the padding's id
SHIFTED_POSITIONS = ("roberta", "xlm-roberta", "camembert", "xlm-roberta-xl")
DECODERS = ("qwen2", "qwen3", "mistral", "llama", "gemma2", "gemma3_text")  # pooled by their last token


def is_cross_encoder(config: Mapping[str, Any]) -> bool:
    return any(str(name).endswith("ForSequenceClassification") for name in config.get("architectures") or ())


def pooling_of(folder: Path) -> dict[str, Any]:
    """{pooling, normalize, prompts, default_prompt, max_length} by the files of sentence-transformers.

    A folder without them is pooled by its first token, as BERT and its relatives were trained. Raises ImportRefused.
    """
    found: dict[str, Any] = {"pooling": "cls", "prompts": {}, "default_prompt": None}
    modules = folder / "modules.json"
    if modules.is_file():
        for module in _modules(modules):
            kind = str(module.get("type", "")).rpartition(".")[2]
            if kind not in MODULES:
                raise ImportRefused(f"its modules.json has a module {kind!r}, which is not supported")
            if kind == "Pooling":
                found["pooling"] = _pooling(read_json(folder / str(module["path"]) / "config.json"))
    elif str(read_json(folder / "config.json").get("model_type")) in DECODERS:
        found["pooling"] = "last"
    sentence = read_optional(folder / "config_sentence_transformers.json")
    prompts: Mapping[str, Any] = sentence.get("prompts") or {}
    found["prompts"] = {str(name): str(text) for name, text in prompts.items()}
    found["default_prompt"] = sentence.get("default_prompt_name")
    found["max_length"] = read_optional(folder / "sentence_bert_config.json").get("max_seq_length")
    return found


def _pooling(config: Mapping[str, Any]) -> str:
    named = config.get("pooling_mode")  # of newer sentence-transformers; older ones have a switch for each mode
    chosen = [str(named)] if named else [name for name in config if name in SWITCHES and config[name] is True]
    if len(chosen) != 1 or chosen[0] not in POOLINGS:
        raise ImportRefused(
            f"its pooling ({', '.join(chosen) or 'none'}) is not supported: cls, mean and lasttoken are"
        )
    if config.get("include_prompt") is False:
        raise ImportRefused("its pooling leaves out the prompt's tokens (include_prompt), which is not supported")
    return POOLINGS[chosen[0]]


def _modules(file: Path) -> list[Mapping[str, Any]]:
    try:
        found: object = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ImportRefused(f"{file} is not valid JSON ({error}): download it again") from None
    return [cast("dict[str, Any]", each) for each in found if isinstance(each, dict)] if isinstance(found, list) else []


def context_length(folder: Path, config: Mapping[str, Any], max_length: int | None) -> int:
    """Tokens of one input, special ones included."""
    positions = int(config.get("max_position_embeddings") or 512)
    if config.get("model_type") in SHIFTED_POSITIONS:
        positions -= int(config.get("pad_token_id") or 0) + 1
    named = read_optional(folder / "tokenizer_config.json").get("model_max_length")
    limits = [limit for limit in (max_length, named) if isinstance(limit, int) and 0 < limit < 10**6]
    return min(positions, *limits) if limits else positions


def import_encoder(source: Path, target: Path, progress: Progress, is_reranker: bool) -> dict[str, Any]:
    """Link the weights and the tokenizer into `target`; return the metadata. Raises ImportRefused."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from models.checkpoints import hf

    config = read_json(source / "config.json")
    if is_cross_encoder(config) != is_reranker:
        what, family = ("a cross-encoder", "reranker") if not is_reranker else ("no cross-encoder", "embedding")
        raise ImportRefused(f"this is {what}: import it with the family {family}")
    if config.get("model_type") not in CONFIG_MAPPING:
        raise ImportRefused(
            f"transformers does not know model_type {config.get('model_type')!r}; code of a model's own is never run"
        )
    if is_reranker and len(config.get("id2label") or (0,)) > 1:
        raise ImportRefused("it classifies into several labels; a cross-encoder for reranking has one")
    described: dict[str, Any] = {"pooling": "scores"} if is_reranker else pooling_of(source)
    hf.import_tokenizer(source, target)
    hf.write_config(source, target)
    metadata = hf.import_weights(source, target, progress)
    length = context_length(source, config, described.pop("max_length", None))
    metadata |= {key: value for key, value in described.items() if value is not None} | {
        "context_length": length,
        "pad_id": int(config.get("pad_token_id") or 0),
    }
    _check(target, metadata)
    return metadata


def _check(target: Path, metadata: Mapping[str, Any]) -> None:
    """Raises ImportRefused unless transformers finds every weight and the tokenizer fits the embedding."""
    from transformers.utils.logging import disable_progress_bar

    from models.tokenizers.encoder import EncoderTokenizer

    disable_progress_bar()  # it would be drawn into the command's own progress bar
    try:
        with TRANSFORMERS_LOCK:
            model, found = _auto_class(metadata).from_pretrained(
                target, device_map="meta", local_files_only=True, trust_remote_code=False, output_loading_info=True
            )
    except Exception as error:  # noqa: BLE001 - transformers documents no exception types
        raise ImportRefused(f"transformers cannot load this checkpoint: {first_line(error)}") from None
    missing = sorted(str(key) for key in found["missing_keys"] if not str(key).startswith("pooler."))
    if missing:
        raise ImportRefused(f"the checkpoint does not fit config.json (missing weights: {missing[0]} …)")
    largest = max(EncoderTokenizer(target / TOKENIZER_FILE).encode("a b c").token_ids, default=0)
    if largest >= int(model.config.vocab_size):
        raise ImportRefused(f"the tokenizer has token {largest}, and the network has {model.config.vocab_size}")


def _auto_class(metadata: Mapping[str, Any]) -> Any:
    from transformers import AutoModel, AutoModelForSequenceClassification

    return AutoModelForSequenceClassification if metadata["pooling"] == "scores" else AutoModel


def open_encoder(
    folder: Path, metadata: Mapping[str, Any], device: torch.device, precision: Precision
) -> TransformersEncoder:
    """The network of an imported folder. No network access, no remote code."""
    import torch

    from models.networks.encoder import TransformersEncoder

    dtype = getattr(torch, precision)
    with TRANSFORMERS_LOCK:
        model = _auto_class(metadata).from_pretrained(
            folder, dtype=dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
    pooling, length = metadata["pooling"], int(metadata["context_length"])
    return TransformersEncoder(model.to(device), pooling, length, int(metadata["pad_id"]))
