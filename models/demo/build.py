"""Trains or checks the demonstration checkpoint: `python -m models.demo.build [--out DIR] [--check]`."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import sentencepiece
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GlmConfig, GlmForCausalLM

from models.demo import CHECKPOINT
from models.demo.check import check
from models.demo.training import STAGES, make_config, train_stage
from models.demo.vocabulary import train_vocabulary
from models.families.chatglm2 import FAMILY

SEED = 1
NUM_SPECIALS = 5  # [MASK], [gMASK], [sMASK], sop, eop
MAX_POSITIONS = 8192
_PADDED_TO = 64
_TENSORS_OF_LAYER = {
    "input_layernorm.weight": "input_layernorm.weight",
    "post_attention_layernorm.weight": "post_attention_layernorm.weight",
    "self_attn.o_proj.weight": "self_attention.dense.weight",
    "mlp.gate_up_proj.weight": "mlp.dense_h_to_4h.weight",
    "mlp.down_proj.weight": "mlp.dense_4h_to_h.weight",
}


class ProgressLine:
    """Prints steps, loss and time left: one line that is rewritten on a terminal, twenty lines elsewhere."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._loss = 0.0
        self._is_terminal = sys.stdout.isatty()

    def __call__(self, step: int, num_steps: int, loss: float) -> None:
        self._loss = loss if step == 1 else 0.95 * self._loss + 0.05 * loss
        if not self._is_terminal and step % (num_steps // 20):
            return
        left = (time.monotonic() - self._started) / step * (num_steps - step)
        line = f"step {step}/{num_steps}  loss {self._loss:.4f}  {left // 60:.0f} min {left % 60:02.0f} s left"
        print(f"\r{line}   " if self._is_terminal else line, end="" if self._is_terminal else "\n", flush=True)
        if self._is_terminal and step == num_steps:
            print()


def original_config(config: GlmConfig) -> dict[str, object]:
    """The config.json of ChatGLM2's own format, for the network's shape."""
    return {
        "model_type": "chatglm",
        "architectures": ["ChatGLMModel"],
        "add_bias_linear": False, "add_qkv_bias": True, "apply_query_key_layer_scaling": True,
        "apply_residual_connection_post_layernorm": False, "attention_dropout": 0.0,
        "attention_softmax_in_fp32": True, "bias_dropout_fusion": True,
        "ffn_hidden_size": config.intermediate_size,
        "fp32_residual_connection": False, "hidden_dropout": 0.0,
        "hidden_size": config.hidden_size,
        "kv_channels": config.head_dim,
        "layernorm_epsilon": config.rms_norm_eps,
        "multi_query_attention": True, "multi_query_group_num": config.num_key_value_heads,
        "num_attention_heads": config.num_attention_heads, "num_layers": config.num_hidden_layers,
        "original_rope": True, "padded_vocab_size": config.vocab_size, "post_layer_norm": True, "rmsnorm": True,
        "seq_length": config.max_position_embeddings,
        "use_cache": True, "torch_dtype": "float16", "tie_word_embeddings": False,
        "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip


def original_tensors(model: GlmForCausalLM) -> dict[str, Tensor]:
    """The network's weights in fp16 under ChatGLM2's own names, query, key and value in one tensor."""
    state = model.state_dict()
    config = model.config
    rotary = config.head_dim // 2
    tensors = {
        "transformer.embedding.word_embeddings.weight": state["model.embed_tokens.weight"],
        "transformer.rotary_pos_emb.inv_freq": 1.0 / 10000.0 ** (torch.arange(0, rotary, 2).float() / rotary),
        "transformer.encoder.final_layernorm.weight": state["model.norm.weight"],
        "transformer.output_layer.weight": state["lm_head.weight"],
    }
    for layer in range(config.num_hidden_layers):
        source, target = f"model.layers.{layer}", f"transformer.encoder.layers.{layer}"
        for native, original in _TENSORS_OF_LAYER.items():
            tensors[f"{target}.{original}"] = state[f"{source}.{native}"]
        for kind in ("weight", "bias"):
            parts = [state[f"{source}.self_attn.{name}_proj.{kind}"] for name in "qkv"]
            tensors[f"{target}.self_attention.query_key_value.{kind}"] = torch.cat(parts)
    return {name: tensor.half().contiguous() for name, tensor in sorted(tensors.items())}


def build(out: Path) -> None:
    """Train tokenizer and network, and write the three files of the checkpoint."""
    vocabulary = train_vocabulary()
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=vocabulary)
    num_tokens = tokenizer.get_piece_size() + NUM_SPECIALS
    config = make_config(-(-num_tokens // _PADDED_TO) * _PADDED_TO, MAX_POSITIONS)
    torch.manual_seed(SEED)
    model = GlmForCausalLM(config)
    for number, stage in enumerate(STAGES, start=1):
        print(f"stage {number} of {len(STAGES)}")
        train_stage(model, tokenizer, stage, SEED + number - 1, ProgressLine())
    out.mkdir(parents=True, exist_ok=True)
    (out / "tokenizer.model").write_bytes(vocabulary)
    (out / "config.json").write_text(json.dumps(original_config(config), indent=2) + "\n", encoding="utf-8")
    save_file(original_tensors(model), out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)


def check_checkpoint(folder: Path) -> bool:
    """Import the checkpoint as the model store does, and check its answers."""
    with tempfile.TemporaryDirectory() as target:
        FAMILY.import_checkpoint(folder, Path(target), {}, lambda done_bytes, total_bytes, what: None)
        model = GlmForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
        return check(model, sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")))


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code is 0 if the checkpoint passes its check."""
    parser = argparse.ArgumentParser(prog="python -m models.demo.build", description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=CHECKPOINT, help="folder of the checkpoint (default: the embedded one)"
    )
    parser.add_argument("--check", action="store_true", help="only check the answers of the checkpoint")
    parser.add_argument(
        "--threads", type=int, default=2, help="of the CPU; another number changes the last bits of the weights"
    )
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    if not chosen.check:
        build(chosen.out)
    return 0 if check_checkpoint(chosen.out) else 1


if __name__ == "__main__":
    sys.exit(main())
