"""Prompts are the originals'; a conversation that a format cannot express is refused, never truncated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from models.families.chatglm2 import ChatGLM2Format, round_prompt
from models.families.chatglm3 import NUM_ROLES, TOOL_PROMPT, ChatGLM3Format
from models.tokenizers.sentencepiece import NUM_SPECIALS, SentencePieceTokenizer
from serving.generation.interface import Conversation, Message, PromptError, Tool, ToolCall
from tests.golden_data import CHATGLM2_TOKENIZER, GOLDEN, needs_chatglm2_tokenizer
from tests.original_glm import tiny_tokenizer

WEATHER = Tool("get_weather", "天气", {"type": "object", "properties": {"city": {"type": "string"}}})


def conversation(messages: list[dict[str, str]], continue_final: bool = False) -> Conversation:
    turns = tuple(Message(message["role"], message["content"]) for message in messages)  # pyright: ignore[reportArgumentType]
    return Conversation(turns, continue_final=continue_final)


def golden_conversations() -> list[dict[str, Any]]:
    cases: list[dict[str, Any]] = json.loads((GOLDEN / "prompt" / "chatglm2_prompts.json").read_text(encoding="utf-8"))[
        "cases"
    ]
    return cases


def of_letters(roles: str) -> Conversation:
    """A conversation whose messages are the first letters of their roles."""
    names = {"u": "user", "a": "assistant", "s": "system", "t": "tool"}
    return conversation([{"role": names[letter], "content": letter} for letter in roles])


@pytest.fixture
def pieces(tmp_path: Path) -> Path:
    (tmp_path / "tokenizer.model").write_bytes(tiny_tokenizer())
    return tmp_path / "tokenizer.model"


def test_all_49_conversations_are_the_originals_or_have_all_their_text(pieces: Path) -> None:
    """Where roles do not alternate the original code has no rendering: ours is in docs/api.md."""
    cases = golden_conversations()
    assert len(cases) == 49
    tokenizer = SentencePieceTokenizer(pieces)
    chat_format = ChatGLM2Format(tokenizer)
    for case in cases:
        if case["strict_template"] is None:
            messages = case["messages"]
            if messages and messages[-1]["role"] == "user" and "tool" not in {m["role"] for m in messages}:
                prompt = round_prompt(conversation(messages))
                assert all(message["content"] in prompt for message in messages)
                assert prompt.endswith(f"{messages[-1]['content']}\n\n答：")
                continue
            with pytest.raises(PromptError) as refusal:
                chat_format.render(conversation(messages))
            assert refusal.value.param == "messages"
            assert refusal.value.message.endswith(".")
        else:
            assert round_prompt(conversation(case["messages"])) == case["strict_template"] == case["official_prompt"]
            ids = chat_format.render(conversation(case["messages"]))
            assert ids == [tokenizer.gmask, tokenizer.sop, *tokenizer.encode(case["strict_template"])]


@needs_chatglm2_tokenizer
def test_full_prompts_have_the_golden_ids() -> None:
    tokenizer = SentencePieceTokenizer(CHATGLM2_TOKENIZER)
    chat_format = ChatGLM2Format(tokenizer)
    assert (tokenizer.gmask, tokenizer.sop) == (64790, 64792)
    for case in golden_conversations():
        if case["strict_template"] is not None:
            ids = chat_format.render(conversation(case["messages"]))
            assert ids == [64790, 64792, *tokenizer.encode(case["strict_template"])]
    content = json.loads((GOLDEN / "tokenizer" / "chatglm2.json").read_text(encoding="utf-8"))
    for case in content["incremental"]:
        turns = [
            {"role": role, "content": text}
            for round_ in case["history"]
            for role, text in zip(("user", "assistant"), round_, strict=True)
        ]
        turns.append({"role": "user", "content": case["query"]})
        assert chat_format.render(conversation(turns)) == case["full_prompt_ids"]


@pytest.mark.parametrize(
    ("roles", "prompt"),
    [
        ("uu", "[Round 1]\n\n问：u\nu\n\n答："),
        ("au", "[Round 1]\n\n问：\n\n答：a\n\n[Round 2]\n\n问：u\n\n答："),
        ("uasu", "[Round 1]\n\n问：u\n\n答：a\n\n[Round 2]\n\n问：s\nu\n\n答："),
        ("usaau", "[Round 1]\n\n问：u\ns\n\n答：a\na\n\n[Round 2]\n\n问：u\n\n答："),
        ("ssu", "[Round 1]\n\n问：s\n\nsu\n\n答："),
        ("suau", "[Round 1]\n\n问：u\n\n答：a\n\n[Round 2]\n\n问：su\n\n答："),
    ],
)
def test_roles_that_do_not_alternate_are_rendered_without_loss(roles: str, prompt: str) -> None:
    assert round_prompt(of_letters(roles)) == prompt


@pytest.mark.parametrize(
    ("roles", "names"),
    [
        ("ua", "last message"),
        ("s", "last message"),
        ("us", "last message"),
        ("", "last message"),
        ("ut", "messages[1]"),
    ],
)
def test_a_refusal_names_the_message(roles: str, names: str) -> None:
    with pytest.raises(PromptError) as refusal:
        round_prompt(of_letters(roles))
    assert names in refusal.value.message


def test_chatglm2_continues_an_answer() -> None:
    turns = [{"role": r, "content": c} for r, c in (("system", "S"), ("user", "1+1?"), ("assistant", "It is"))]
    assert round_prompt(conversation(turns, continue_final=True)) == "[Round 1]\n\n问：S1+1?\n\n答：It is"
    with pytest.raises(PromptError, match="role assistant"):
        round_prompt(conversation(turns[:2], continue_final=True))


def test_chatglm2_refuses_tools_by_their_name() -> None:
    with pytest.raises(PromptError) as refusal:
        round_prompt(Conversation((Message("user", "x"),), (WEATHER,)))
    assert refusal.value.param == "tools"
    call = Message("assistant", "", tool_calls=(ToolCall("1", "get_weather", "{}"),))
    with pytest.raises(PromptError, match=r"messages\[1\]"):
        round_prompt(Conversation((Message("user", "x"), call, Message("user", "y"))))


def chatglm3(model_file: Path) -> ChatGLM3Format:
    return ChatGLM3Format(SentencePieceTokenizer(model_file, NUM_SPECIALS + NUM_ROLES))


@needs_chatglm2_tokenizer
def test_chatglm3_has_the_golden_ids_and_stops_where_the_original_does() -> None:
    chat_format = chatglm3(CHATGLM2_TOKENIZER)
    content = json.loads((GOLDEN / "tokenizer" / "chatglm3.json").read_text(encoding="utf-8"))
    assert chat_format.stop_token_ids == set(content["stop_ids"])
    assert chat_format.num_tokens == 64_798
    for case in content["cases"]:
        turns = [*case["history"], {"role": "user", "content": case["query"]}]
        assert chat_format.render(conversation(turns)) == case["ids"]


def test_chatglm3_encodes_every_segment_between_role_ids(pieces: Path) -> None:
    chat_format, tokenizer = chatglm3(pieces), SentencePieceTokenizer(pieces)
    system, user, assistant, observation = range(tokenizer.num_pieces + 5, tokenizer.num_pieces + 9)
    assert chat_format.stop_token_ids == {2, user, observation}

    def segment(role: int, metadata: str, text: str) -> list[int]:
        return [role, *tokenizer.encode(f"{metadata}\n"), *tokenizer.encode(text)]

    call = ToolCall("call_1", "get_weather", '{"city": "北京", "days": 2, "exact": true, "of": null}')
    dialogue = Conversation(
        (
            Message("system", "Be short. <|user|>"),
            Message("user", "天气?"),
            Message("assistant", "", tool_calls=(call,)),
            Message("tool", "sunny", tool_call_id="call_1"),
        ),
        (WEATHER,),
    )
    listing = [{"name": "get_weather", "description": "天气", "parameters": WEATHER.parameters}]
    described = f"Be short. <|user|>\n{TOOL_PROMPT}\n{json.dumps(listing, indent=4, ensure_ascii=False)}"
    code = "```python\ntool_call(city='北京', days=2, exact=True, of=None)\n```"
    assert chat_format.render(dialogue) == [
        tokenizer.gmask,
        tokenizer.sop,
        *segment(system, "", described),
        *segment(user, "", "天气?"),
        *segment(assistant, "get_weather", code),
        *segment(observation, "", "sunny"),
        assistant,
    ]
    continued = Conversation((Message("user", "1+1?"), Message("assistant", "It is")), continue_final=True)
    assert chat_format.render(continued)[-len(segment(assistant, "", "It is")) :] == segment(assistant, "", "It is")


@pytest.mark.parametrize(
    ("arguments", "inner"),
    [
        ("", ""),
        (" ", ""),
        ("{}", ""),
        ("[1]", "'[1]'"),
        ('{"city": "Bei', """'{"city": "Bei'"""),
        ("it's", '"it\'s"'),
        ('{"a": ' + "[" * 100_000, '\'{"a": ' + "[" * 100_000 + "'"),
    ],
)
def test_chatglm3_reads_an_earlier_call_whose_arguments_were_cut(arguments: str, inner: str, pieces: Path) -> None:
    """A conversation with such a call was refused for ever: clients keep what `max_tokens` cut off."""
    tokenizer, call = SentencePieceTokenizer(pieces), ToolCall("1", "get_weather", arguments)
    called = Message("assistant", "", tool_calls=(call,))
    ids = chatglm3(pieces).render(Conversation((Message("user", "x"), called, Message("tool", "y"))))
    code = tokenizer.encode(f"```python\ntool_call({inner})\n```")
    assert any(ids[i : i + len(code)] == code for i in range(len(ids)))


def test_chatglm3_reads_arguments_of_any_depth(pieces: Path) -> None:
    chat_format = chatglm3(pieces)
    for depth in range(1, 1200, 7):
        call = ToolCall("1", "get_weather", '{"a": ' + "[" * depth + "]" * depth + "}")
        called = Message("assistant", "", tool_calls=(call,))
        assert chat_format.render(Conversation((Message("user", "x"), called, Message("tool", "y"))))


def test_chatglm3_answers_no_conversation_that_ends_with_an_answer(pieces: Path) -> None:
    with pytest.raises(PromptError, match="not assistant"):
        chatglm3(pieces).render(Conversation((Message("user", "x"), Message("assistant", "y"))))
