"""Writes random models in ChatGLM2's shape, for speed only, as a Hugging Face folder that any server can load.

python -m benchmarks.shapes quarter --out /tmp/quarter      (0.25 billion parameters, vocabulary 65,024)
python -m benchmarks.shapes 6b --out /tmp/6b                (ChatGLM2-6B's true shape, 12.5 GB)
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GlmConfig, GlmForCausalLM

from models.store.progress import ProgressPrinter

VOCABULARY, NUM_TOKENS = 65_024, 64_794
SHARD_BYTES = 2 * 10**9
SHAPES = {
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4},
    "quarter": {"hidden_size": 1024, "intermediate_size": 3424, "num_hidden_layers": 9, "num_attention_heads": 8},
    "6b": {"hidden_size": 4096, "intermediate_size": 13_696, "num_hidden_layers": 28, "num_attention_heads": 32},
}
TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"


def config(name: str) -> GlmConfig:
    """The configuration that importing a ChatGLM2 checkpoint of this size writes."""
    return GlmConfig(
        vocab_size=VOCABULARY,
        **SHAPES[name],
        num_key_value_heads=2,
        head_dim=128,
        attention_bias=True,
        rms_norm_eps=1e-5,
        max_position_embeddings=8192,
        eos_token_id=2,
        pad_token_id=0,
        dtype="bfloat16",
    )


def random_model(
    name: str, dtype: torch.dtype, num_layers: int | None = None, device: torch.device | None = None
) -> GlmForCausalLM:
    """The network with random weights, generated on `device` (default: the CPU) with fixed seeds."""
    shape = config(name)
    shape.num_hidden_layers = num_layers or shape.num_hidden_layers
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            model = GlmForCausalLM(shape)
        model = model.to_empty(device=device or "cpu")
        model.model.rotary_emb.__init__(shape)  # its frequencies are no parameters and have no values on meta
        model.model.rotary_emb.to(device or "cpu")
    finally:
        torch.set_default_dtype(previous)
    for parameter_name, parameter in model.named_parameters():
        _fill(parameter.data, parameter_name)
    return model.eval().requires_grad_(False)


def write_folder(name: str, out: Path) -> None:
    """Write config, tokenizer, chat template and sharded bfloat16 weights."""
    out.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        meta = GlmForCausalLM(config(name))
    config(name).save_pretrained(out)
    settings = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(settings | {"architectures": ["GlmForCausalLM"]}))
    _write_tokenizer(out)
    printer = ProgressPrinter(sys.stderr)
    total = sum(p.numel() * 2 for p in meta.parameters())
    shard: dict[str, torch.Tensor] = {}
    index: dict[str, str] = {}
    done = number = 0
    for parameter_name, parameter in meta.named_parameters():
        tensor = torch.empty(parameter.shape, dtype=torch.bfloat16)
        _fill(tensor, parameter_name)
        shard[parameter_name] = tensor
        done += tensor.nbytes
        printer(done, total, "random weights")
        if sum(t.nbytes for t in shard.values()) > SHARD_BYTES or done == total:
            number += 1
            file = f"model-{number:05d}.safetensors"
            save_file(shard, out / file, metadata={"format": "pt"})
            index |= dict.fromkeys(shard, file)
            shard = {}
    printer.close()
    (out / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    )


def _fill(tensor: torch.Tensor, name: str) -> None:
    generator = torch.Generator(tensor.device).manual_seed(sum(name.encode()))
    if tensor.ndim == 1:
        tensor.fill_(1.0 if name.endswith("norm.weight") else 0.0)
    else:
        tensor.normal_(0.0, 0.02, generator=generator)


def _write_tokenizer(out: Path) -> None:
    """Bytes, and numbered words up to the size of ChatGLM2's vocabulary: every id has a text, no merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = ["<unk>", "<s>", "</s>", *alphabet]
    pieces += [f"w{i}" for i in range(NUM_TOKENS - len(pieces))]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "chat_template": TEMPLATE}
    (out / "tokenizer_config.json").write_text(json.dumps(settings))
    (out / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "pad_token_id": 0}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    write_folder(arguments.shape, arguments.out)


if __name__ == "__main__":
    main()
