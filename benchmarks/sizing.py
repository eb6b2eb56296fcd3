"""Computes ChatGLM2-6B's memory from its shapes, and the price of a million tokens from a benchmark result.

python -m benchmarks.sizing                                           (the tables of docs/operations.md)
python -m benchmarks.sizing --price 1.20 benchmarks/results/FILE.json  (per million tokens at 1.20 an hour)
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.shapes import SHAPES, VOCABULARY
from serving.engine.native.device import GPU_CACHE_SHARE

GB, GIB = 10**9, 2**30
KV_HEADS, HEAD_DIM = 2, 128
CONTEXT = 8192
INT8_BYTES, INT4_BYTES = 34 / 32, 18 / 32  # of a weight, with the scale of its group of 32


def parameters() -> tuple[int, int, int]:
    """(in the layers' matrices, in the head and in the embedding each, others)"""
    shape = SHAPES["6b"]
    hidden, inner, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    heads = shape["num_attention_heads"] * HEAD_DIM
    qkv = heads + 2 * KV_HEADS * HEAD_DIM
    matrices = layers * (hidden * qkv + heads * hidden + 3 * hidden * inner)
    return matrices, VOCABULARY * hidden, layers * (qkv + 2 * hidden) + hidden


def weight_bytes(precision: str) -> float:
    """Bytes of the weights in memory. int8 and int4 keep the embedding in 16 bits, int4 the head in 8."""
    matrices, table, others = parameters()
    match precision:
        case "int8":
            return (matrices + table) * INT8_BYTES + 2 * (table + others)
        case "int4":
            return matrices * INT4_BYTES + table * INT8_BYTES + 2 * (table + others)
        case _:
            return (matrices + 2 * table + others) * (4 if precision == "float32" else 2)


def kv_bytes_per_token(num_bytes: int) -> int:
    """Bytes of one token's keys and values in all layers. num_bytes: per number."""
    return SHAPES["6b"]["num_hidden_layers"] * 2 * KV_HEADS * HEAD_DIM * num_bytes


def conversations(gpu_gib: int) -> tuple[int, int]:
    """(tokens in the KV cache, conversations of 8,192 tokens) beside the 16-bit weights on a GPU of this memory."""
    free = gpu_gib * GIB - weight_bytes("bfloat16") - GIB  # 1 GiB for CUDA itself
    tokens = int(free * GPU_CACHE_SHARE / kv_bytes_per_token(2))
    return tokens, tokens // CONTEXT


def tables() -> str:
    """The tables of docs/operations.md as Markdown."""
    lines = ["| weights | memory |", "|---|---|"]
    lines += [f"| `{p}` | {weight_bytes(p) / GB:.1f} GB |" for p in ("float32", "bfloat16", "int8", "int4")]
    lines.append("")
    lines.append(
        "| GPU | tokens in the KV cache beside 16-bit weights | conversations of 1,000 tokens | of 8,192 tokens |"
    )
    lines += ["|---|---|---|---|"]
    for gib in (16, 24, 40, 80):
        tokens, full = conversations(gib)
        lines.append(f"| {gib} GiB | {tokens:,} | {tokens // 1000} | {full} |")
    return "\n".join(lines) + "\n"


def cost_per_million(price_per_hour: float, tokens_per_second: float) -> float:
    """Price of a million generated tokens on a machine that constantly generates at this rate."""
    return price_per_hour / (tokens_per_second * 3600) * 1e6


def costs(report: dict[str, Any], price: float) -> list[str]:
    """One line per server and load of a result file of benchmarks.load."""
    lines: list[str] = []
    for result in report["results"]:
        for name, figures in result["figures"].items():
            rate = float(figures["tokens_per_second"])
            cost = cost_per_million(price, rate)
            lines.append(f"{name}, {result['concurrency']} at once: {rate:.0f} tokens/s, {cost:.2f} per million tokens")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="*", type=Path)
    parser.add_argument("--price", type=float, help="price of one hour of the machine, in any currency")
    arguments = parser.parse_args()
    if not arguments.results:
        print(tables(), end="")
    for path in arguments.results:
        print(*costs(json.loads(path.read_text(encoding="utf-8")), arguments.price or 1.0), sep="\n")


if __name__ == "__main__":
    main()
