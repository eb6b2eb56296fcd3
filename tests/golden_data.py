"""Paths of the golden data: the repository's own, and the published tokenizers, which are not part of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
GOLDEN = REPOSITORY / "tests" / "golden" / "data"

# The tokenizers of ChatGLM-6B and ChatGLM2-6B have licences of their own, so a clone does not have them.
TOKENIZERS = Path(os.environ.get("TEST_TOKENIZERS") or REPOSITORY.parent / "shared" / "golden" / "tokenizer")
CHATGLM2_TOKENIZER = TOKENIZERS / "chatglm2-tokenizer.model"  # tokenizer.model of THUDM/chatglm2-6b
CHATGLM_TOKENIZER = TOKENIZERS / "chatglm-ice_text.model"  # ice_text.model of THUDM/chatglm-6b


def needs(file: Path, published_as: str) -> pytest.MarkDecorator:
    """Skip where `file` is not, and say which published file it is."""
    reason = f"needs {published_as} as {file.name} in the folder that TEST_TOKENIZERS names"
    return pytest.mark.skipif(not file.is_file(), reason=reason)


needs_chatglm2_tokenizer = needs(CHATGLM2_TOKENIZER, "tokenizer.model of THUDM/chatglm2-6b")
needs_chatglm_tokenizer = needs(CHATGLM_TOKENIZER, "ice_text.model of THUDM/chatglm-6b")
