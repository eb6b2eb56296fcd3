"""Writes a GGUF model for llama.cpp with the shapes of the quarter model and random weights, for speed only.

    pip install gguf torch && python -m benchmarks.gguf_model --out /tmp/quarter-bf16.gguf
    llama-quantize /tmp/quarter-bf16.gguf /tmp/quarter-q8.gguf Q8_0

The layers are llama.cpp's `llama` layers with the quarter model's sizes, biases included. They rotate all channels of a
head where ChatGLM2 rotates half, which makes no measurable difference in speed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import gguf
import numpy
import torch

HIDDEN, FEED_FORWARD, LAYERS, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 1024, 3424, 9, 8, 2, 128, 65_024


def pieces() -> tuple[list[str], list[int]]:
    """(tokens: special, bytes, numbered words; the type of each)"""
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    words = [f"w{i}" for i in range(VOCABULARY - 3 - len(bytes_))]
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    kinds += [gguf.TokenType.BYTE] * len(bytes_) + [gguf.TokenType.NORMAL] * len(words)
    return ["<unk>", "<s>", "</s>", *bytes_, *words], [int(kind) for kind in kinds]


def write(out: Path) -> None:
    """Write one file, weights in bfloat16, norms and biases in float32."""
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_context_length(8192)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    tokens, kinds = pieces()
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{% for message in messages %}{{ message['content'] }}\n{% endfor %}")

    def matrix(name: str, rows: int, columns: int) -> None:
        values = torch.randn(rows, columns).mul_(0.02).bfloat16().view(torch.int16).numpy()
        writer.add_tensor(name, values.view(numpy.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)

    def vector(name: str, length: int, value: float) -> None:
        writer.add_tensor(name, numpy.full(length, value, dtype=numpy.float32))

    matrix("token_embd.weight", VOCABULARY, HIDDEN)
    matrix("output.weight", VOCABULARY, HIDDEN)
    vector("output_norm.weight", HIDDEN, 1.0)
    for layer in range(LAYERS):
        for name, rows in (("q", HEADS * HEAD_DIM), ("k", KV_HEADS * HEAD_DIM), ("v", KV_HEADS * HEAD_DIM)):
            matrix(f"blk.{layer}.attn_{name}.weight", rows, HIDDEN)
            vector(f"blk.{layer}.attn_{name}.bias", rows, 0.0)
        matrix(f"blk.{layer}.attn_output.weight", HIDDEN, HEADS * HEAD_DIM)
        matrix(f"blk.{layer}.ffn_gate.weight", FEED_FORWARD, HIDDEN)
        matrix(f"blk.{layer}.ffn_up.weight", FEED_FORWARD, HIDDEN)
        matrix(f"blk.{layer}.ffn_down.weight", HIDDEN, FEED_FORWARD)
        vector(f"blk.{layer}.attn_norm.weight", HIDDEN, 1.0)
        vector(f"blk.{layer}.ffn_norm.weight", HIDDEN, 1.0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    write(parser.parse_args().out)


if __name__ == "__main__":
    main()
