"""Tiny random encoders as sentence-transformers and transformers save them, and what they compute for one text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn.functional import normalize
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    Qwen3Config,
    Qwen3Model,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
    XLMRobertaModel,
)

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghijklmnopqrstuvwxyz", *(f"w{i}" for i in range(70))]
SMALL: dict[str, Any] = {
    "vocab_size": len(WORDS),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 66,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}
Kind = Literal["bert", "xlm-roberta", "qwen3", "reranker"]


def write_encoder(
    folder: Path, kind: Kind, pooling: str = "mean_tokens", prompts: dict[str, str] | None = None
) -> Path:
    """A checkpoint folder."""
    torch.manual_seed(7)
    folder.mkdir(parents=True)
    model: Any
    match kind:
        case "bert":
            model = BertModel(BertConfig(**SMALL))
        case "xlm-roberta":
            model = XLMRobertaModel(XLMRobertaConfig(**SMALL, type_vocab_size=1))
        case "qwen3":
            model = Qwen3Model(Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=8))
        case "reranker":
            config = XLMRobertaConfig(**SMALL, type_vocab_size=1, num_labels=1)
            model = XLMRobertaForSequenceClassification(config)
    model.save_pretrained(folder)
    _tokenizer(has_end_only=kind == "qwen3").save(str(folder / "tokenizer.json"))
    if kind != "reranker":
        _write_json(
            folder / "modules.json",
            [
                {"type": "sentence_transformers.models.Transformer", "path": ""},
                {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"},
            ],
        )
        (folder / "1_Pooling").mkdir()
        _write_json(folder / "1_Pooling" / "config.json", {f"pooling_mode_{pooling}": True})
        _write_json(folder / "config_sentence_transformers.json", {"prompts": prompts or {}})
    return folder


def _tokenizer(has_end_only: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(WORDS[:4])
    first = "" if has_end_only else "[CLS] "
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first}$A [SEP]", pair=f"{first}$A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


def _write_json(file: Path, value: object) -> None:
    file.write_text(json.dumps(value), encoding="utf-8")


def ids_of(text: str, has_end_only: bool = False) -> list[int]:
    """Independent of the tokenizer: words by their place in the list."""
    words = [WORDS.index(word) if word in WORDS[4:] else 1 for word in text.split()]
    return [*([] if has_end_only else [2]), *words, 3]


@torch.inference_mode()
def reference_vector(folder: Path, text: str, pooling: str) -> list[float]:
    """By transformers alone, without a batch."""
    model = AutoModel.from_pretrained(folder).eval()
    ids = torch.tensor([ids_of(text, isinstance(model.config, Qwen3Config))])
    hidden = model(input_ids=ids).last_hidden_state[0]
    pooled = {"cls_token": hidden[0], "mean_tokens": hidden.mean(0), "lasttoken": hidden[-1]}[pooling]
    vector: list[float] = normalize(pooled, dim=0).tolist()
    return vector


@torch.inference_mode()
def reference_score(folder: Path, query: str, document: str) -> float:
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    ids = torch.tensor([ids_of(query) + ids_of(document)[1:]])
    return float(model(input_ids=ids).logits[0, 0].sigmoid())
