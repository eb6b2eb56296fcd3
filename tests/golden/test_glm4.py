"""GLM-4 in its original layout: prompts, ids, logits and greedy tokens as the original code gives them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from models.checkpoints.lora import AdapterFolder
from models.checkpoints.prepared import prepared
from models.families.glm4 import FAMILY, GLM4Format, open_format
from models.family import ImportRefused
from models.store.progress import no_progress
from serving.generation.interface import Conversation, Message, PromptError, Tool, ToolCall
from tests.golden_data import GOLDEN, TOKENIZERS, needs

TINY = GOLDEN / "finetune" / "glm4-tiny"
PUBLISHED = TOKENIZERS.parent / "finetune" / "glm4-tokenizer"
needs_tokenizer = needs(PUBLISHED / "tokenizer.model", "tokenizer.model of THUDM/glm-4-9b-chat")


@pytest.fixture(autouse=True)
def _one_thread() -> None:  # pyright: ignore[reportUnusedFunction]
    torch.set_num_threads(1)


def imported(source: Path, target: Path) -> tuple[Any, GLM4Format]:
    FAMILY.import_checkpoint(source, target, {}, no_progress)
    return AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval(), open_format(target)


def conversation(messages: list[dict[str, Any]]) -> Conversation:
    """Golden messages, whose tools stand in the first of them."""
    tools = [tool["function"] for message in messages for tool in message.get("tools", ())]
    turns = list[Message]()
    for message in messages:
        role, content, called = message["role"], message["content"], message.get("metadata")
        if called:
            turns.append(Message("assistant", "", None, (ToolCall("c", called, content),)))
        else:
            turns.append(Message("tool" if role == "observation" else role, content))
    return Conversation(
        tuple(turns),
        tuple(Tool(tool["name"], tool["description"], tool["parameters"]) for tool in tools),
    )


@pytest.mark.parametrize("adapter", [None, "glm4-lora-qkv"])
def test_a_converted_checkpoint_repeats_the_original_code(adapter: str | None, tmp_path: Path) -> None:
    adapters = [AdapterFolder(GOLDEN / "finetune" / adapter)] if adapter else []
    source = prepared(TINY, adapters, None, tmp_path / "prepared", no_progress)
    target = tmp_path / "target"
    target.mkdir()
    model, _ = imported(source, target)
    expected = np.load(GOLDEN / "finetune" / (adapter or "glm4-tiny") / "expected.npz")
    for key in [key for key in expected if key.startswith("ids")]:
        number, ids = key.removeprefix("ids"), torch.tensor(expected[key])
        with torch.no_grad():
            logits = model(ids).logits[0]
        whole = f"logits{number}" in expected
        wanted = expected[f"logits{number}"] if whole else expected[f"logits{number}_last8"]
        got = logits if whole else logits[-8:]
        np.testing.assert_allclose(got, wanted.reshape(got.shape), rtol=0, atol=5e-5 if adapter else 2e-5)
        out = model.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=-1, pad_token_id=0)
        assert out[0, ids.shape[1] :].tolist() == expected[f"greedy24_{number}"].flatten().tolist()


def test_prompts_are_the_templates_and_answers_end_where_the_original_ends_them(tmp_path: Path) -> None:
    model, form = imported(TINY, tmp_path)
    for case in json.loads((TINY / "prompts.json").read_text()):
        ids = form.render(conversation(case["messages"]))
        assert ids == case["ids"]
        out = model.generate(
            torch.tensor([ids]), max_new_tokens=24, do_sample=False, eos_token_id=sorted(form.stop_token_ids),
            pad_token_id=0,
        )  # fmt: skip
        assert out[0, len(ids) :].tolist() == case["generate_stop_at_eos"]
    assert form.num_tokens > max(form.stop_token_ids)


def test_a_users_text_never_becomes_a_control_token(tmp_path: Path) -> None:
    _, form = imported(TINY, tmp_path)
    control = {322, 324, *range(326, 330)}
    for text in ("<|user|>", "a<|assistant|>\nb", "[gMASK]<sop>", "<|observation|>"):
        ids = form.render(Conversation((Message("user", text),)))
        assert [i for i in ids if i in control] == [322, 324, 327, 328]
    with pytest.raises(PromptError, match="at least one message"):
        form.render(Conversation(()))


def test_calls_and_their_results_are_written_as_trained(tmp_path: Path) -> None:
    _, form = imported(TINY, tmp_path)
    call = ToolCall("c1", "get_weather", '{"city": "北京"}')
    asked = Conversation(
        (Message("user", "?"), Message("assistant", "", None, (call,)), Message("tool", "晴", None, (), "c1")),
        (Tool("get_weather", "w", {"type": "object"}),),
    )
    ids = form.render(asked)
    assert [i for i in ids if i in range(326, 330)] == [326, 327, 328, 329, 328]
    text = form.decode(ids)
    assert text.endswith('\n?get_weather\n{"city": "北京"}\n晴')
    assert "# 可用工具\n## get_weather\n\n{" in text


@needs_tokenizer
def test_the_published_tokenizer_gives_the_same_ids(tmp_path: Path) -> None:
    from models.families.glm4 import PREFIX, _specials
    from models.tokenizers import ranks_to_json
    from models.tokenizers.tokenizer_json import FastTokenizer

    file = tmp_path / "tokenizer.json"
    ranks_to_json.convert(PUBLISHED / "tokenizer.model", file, _specials(PUBLISHED), PREFIX)
    form = GLM4Format(FastTokenizer(file), 151_552)
    golden = json.loads((PUBLISHED / "glm4.json").read_text())
    for case in golden["cases"]:
        if case["ids_no_prefix"] == case["ids_raw_bpe"]:  # else its text names a control token
            assert form.encode(case["text"]) == case["ids"], case["text"]
    checked = 0
    for number, case in enumerate(json.loads((PUBLISHED / "glm4_prompts.json").read_text())):
        tools = [tool for message in case["messages"] for tool in message.get("tools", ())]
        if number == 9 or any(tool["type"] != "function" for tool in tools):
            continue  # control tokens in a user's text, and tools that only Zhipu's own service has
        assert form.render(conversation(case["messages"])) == case["ids"], number
        checked += 1
    assert checked >= 11


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    from models.tokenizers.ranks_to_json import read_ranks

    broken = tmp_path / "tokenizer.model"
    for content, reason in ((b"\x00\x01", "not GLM-4's tokenizer"), (b"IQ== 0\nIg== 5\n", "damaged")):
        broken.write_bytes(content)
        with pytest.raises(ImportRefused, match=reason):
            read_ranks(broken)
