"""Loads the demonstration model (the only trained model in the repository) for measurements in any precision."""

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
    """Import the checkpoint and load it once per precision."""
    family = FAMILIES["chatglm2"]
    with tempfile.TemporaryDirectory() as folder:
        metadata = family.import_checkpoint(CHECKPOINT, Path(folder), {}, no_progress)
        return {
            precision: family.load(Path(folder), metadata, torch.device("cpu"), precision, no_progress)
            for precision in precisions
        }


def conversation(question: str, *earlier: str) -> Conversation:
    """`earlier`: the contents of the previous messages, beginning with the user's."""
    roles = ("user", "assistant") * (len(earlier) // 2)
    history = [Message(role, content) for role, content in zip(roles, earlier, strict=True)]
    return Conversation((*history, Message("user", question)))
