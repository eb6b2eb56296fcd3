"""What a folder of somebody's model is, in one line, and what to do with it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.checkpoints import lora
from models.checkpoints.encoder import is_cross_encoder
from models.checkpoints.files import has_role_tokens, is_lfs_pointer, read_json
from models.checkpoints.gguf import find_gguf
from models.checkpoints.prepared import wrapper_of
from models.checkpoints.ptuning import NAME
from models.checkpoints.shards import find_shards, inspect_shards
from models.family import ImportRefused

ENCODER_CLASSES = ("BertModel", "RobertaModel", "Qwen2Model", "Qwen3Model", "MistralModel")


@dataclass(frozen=True)
class Inspection:
    """what: in words. family: to import it with; None if it cannot be imported by itself, and `advice` says why."""

    what: str
    family: str | None = None
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.what}: {self.advice}" if self.advice else self.what


def inspect(folder: Path) -> Inspection:
    """Reads configurations and the headers of weights, no weights. Raises ImportRefused for damaged files."""
    if find_gguf(folder) is not None:
        return Inspection("a GGUF file", "hf")
    if not folder.is_dir():
        return Inspection("not a folder", None, "give the folder of a downloaded checkpoint")
    if lora.is_adapter(folder):
        return _adapter(folder)
    pointers = [path.name for path in sorted(folder.iterdir()) if path.is_file() and is_lfs_pointer(path)]
    if pointers:
        return Inspection(
            f"a clone with Git LFS pointers instead of files ({', '.join(pointers[:3])})",
            None,
            "run `git lfs install`, then `git lfs pull` in it",
        )
    if not (folder / "config.json").is_file():
        inner = sorted(path.parent.name for path in folder.glob("*/config.json"))
        where = f"; there are folders with one in it: {', '.join(inner[:4])}" if inner else ""
        return Inspection("a folder without config.json", None, f"give the folder of a downloaded checkpoint{where}")
    config = read_json(folder / "config.json")
    return _chatglm(folder, config) if config.get("model_type") == "chatglm" else _other(folder, config)


def _adapter(folder: Path) -> Inspection:
    config = read_json(folder / lora.CONFIG_FILE)
    base = str(config.get("base_model_name_or_path") or "an unnamed base")
    if config.get("peft_type") != "LORA":
        return Inspection(
            f"an adapter of the type {config.get('peft_type')} for {base}", None, "only LORA can be merged"
        )
    return Inspection(
        f"a LoRA adapter for {base} (rank {config.get('r')})",
        None,
        f"import the base with it: import FAMILY --from BASE --adapter {folder}",
    )


def _chatglm(folder: Path, config: dict[str, Any]) -> Inspection:
    names = _tensor_names(folder)
    if names and all(NAME in name for name in names):
        return Inspection(
            f"a P-Tuning v2 prefix of {config.get('pre_seq_len')} tokens",
            None,
            f"import the base with it: import FAMILY --from BASE --prefix {folder}",
        )
    quantised = config.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method", "?") if isinstance(quantised, dict) else "?"
        return Inspection(f"a ChatGLM quantised by {method}", None, "import the 16-bit checkpoint and quantise it here")
    if "vision_config" in config:
        return Inspection("a GLM-4V checkpoint, which takes images", None, "it cannot be imported")
    wrapped = wrapper_of(names)
    note = f" ({len(names)} tensors carry the prefix `{wrapped}`, which the import removes)" if wrapped else ""
    bits = config.get("quantization_bit")
    note += f", int{bits}" if bits else ""
    note += " with a P-Tuning v2 prefix" if any(NAME in name for name in names) else ""
    if "padded_vocab_size" not in config:
        return Inspection(f"ChatGLM-6B, the first version{note}", "chatglm")
    if int(config.get("padded_vocab_size") or 0) > 100_000 or _has_rank_tokenizer(folder):
        return Inspection(f"GLM-4 in its original layout{note}", "glm4")
    has_roles = has_role_tokens(folder)
    if has_roles is not None:
        return Inspection(f"ChatGLM{3 if has_roles else 2}-6B{note}", "chatglm3" if has_roles else "chatglm2")
    return Inspection(f"ChatGLM2-6B, ChatGLM3-6B or CodeGeeX2 without its tokenizer's code{note}", "chatglm2")


def _has_rank_tokenizer(folder: Path) -> bool:
    """Whether tokenizer.model is GLM-4's: lines of base64 and a rank."""
    file = folder / "tokenizer.model"
    if not file.is_file():
        return False
    first = file.read_bytes()[:200].partition(b"\n")[0].split(b" ")
    return len(first) == 2 and first[1].isdigit()


def _tensor_names(folder: Path) -> list[str]:
    """[] where the weights are not there."""
    try:
        shards = find_shards(folder)
    except ImportRefused:
        return []
    return sorted(inspect_shards(shards))


def _other(folder: Path, config: dict[str, Any]) -> Inspection:
    kind = config.get("model_type")
    if is_cross_encoder(config):
        return Inspection(f"a cross-encoder of the type {kind}", "reranker")
    is_sentence_model = (folder / "modules.json").is_file()
    if is_sentence_model or any(str(name).endswith(ENCODER_CLASSES) for name in config.get("architectures") or ()):
        return Inspection(f"an embedding model of the type {kind}", "embedding")
    quantised = config.get("quantization_config")
    if isinstance(quantised, dict):
        method = str(quantised.get("quant_method", "?"))
        why = (
            "its weights are stored in a layout of that package"
            if method == "bitsandbytes"
            else "import the 16-bit checkpoint and quantise it here"
        )
        return Inspection(f"a model of the type {kind} quantised by {method}", None, why)
    if config.get("is_encoder_decoder"):
        return Inspection(f"an encoder-decoder of the type {kind}", None, "only decoders can be served")
    return Inspection(f"a Hugging Face model of the type {kind}", "hf")
