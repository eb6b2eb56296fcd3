"""The demonstration model, the only trained one that is always here, opened for measurements in any precision."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from kernels.precision import Precision
from models.demo import CHECKPOINT
from models.families import FAMILIES
from models.family import LoadedNetwork
from models.store.progress import no_progress
from serving.generation.interface import Conversation, Message

QUESTIONS = ["你好", "你是谁？", "Hello", "What can you do?", "介绍一下你自己", "晚上睡不着应该怎么办", "谢谢", "再见"]


def demo(precisions: list[Precision]) -> dict[Precision, LoadedNetwork]:
    """The imported checkpoint, loaded once for each precision."""
    family = FAMILIES["chatglm2"]
    with tempfile.TemporaryDirectory() as folder:
        metadata = family.import_checkpoint(CHECKPOINT, Path(folder), {}, no_progress)
        return {
            precision: family.load(Path(folder), metadata, torch.device("cpu"), precision, no_progress)
            for precision in precisions
        }


def asked(question: str, *earlier: str) -> Conversation:
    """`earlier`: what was said before, the user first."""
    roles = ("user", "assistant") * (len(earlier) // 2)
    said = [Message(role, content) for role, content in zip(roles, earlier, strict=True)]
    return Conversation((*said, Message("user", question)))
