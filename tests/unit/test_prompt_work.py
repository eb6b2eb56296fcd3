"""The work of turning a conversation into ids, and ids into text, grows with their length, whatever they hold."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from models.families.chat_template import ControlNames
from models.families.chatglm2 import ChatGLM2Format
from models.families.chatglm3 import ChatGLM3Format
from models.families.hf import FAMILY
from models.store.progress import no_progress
from models.tokenizers.sentencepiece import SentencePieceTokenizer
from serving.generation.interface import ChatFormat, Conversation, Message, ToolCall
from serving.generation.tools import prompt as tool_prompt
from tests.cpu_time import cpu_seconds
from tests.hf_folders import write_folder, write_llama_style_pieces

MARKER = "0000000000000123456789"


def interrupted_one_by_one(names: list[str], text: str) -> str:
    """What `ControlNames.interrupted` means: search for the first name, interrupt it, search again from the start."""
    longest_first = sorted(names, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, longest_first)))
    while match := pattern.search(text):
        text = f"{text[: match.start() + 1]}{MARKER}{text[match.start() + 1 :]}"
    inner = text.strip()
    leading = text[: len(text) - len(text.lstrip())]
    trailing = text[len(leading) + len(inner) :]
    splits = [(name[:size], name[size:]) for name in names for size in range(1, len(name))]
    before = MARKER if inner.startswith(tuple(ending for _, ending in splits)) else ""
    after = MARKER if inner.endswith(tuple(beginning for beginning, _ in splits)) else ""
    return f"{leading}{before}{inner}{after}{trailing}"


def split_longest_first(names: list[str], text: str) -> list[tuple[str, bool]]:
    pattern = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    parts = re.split(f"({pattern})", text)
    return [(part, i % 2 == 1) for i, part in enumerate(parts) if part]


def test_names_are_found_as_by_searching_one_by_one() -> None:
    """Overlapping names, names inside names, names at the edges, line breaks and characters of regular expressions."""
    rng = random.Random(7)
    alphabet = "<|a]. \n"
    for _ in range(3000):
        names = list({"".join(rng.choices(alphabet, k=rng.randint(2, 5))) for _ in range(rng.randint(1, 8))})
        text = "".join(rng.choices([*alphabet, *names], k=rng.randint(0, 12)))
        found = ControlNames(names)
        assert found.interrupted(text, MARKER) == interrupted_one_by_one(names, text), (names, text)
        pieces = [(piece.text, piece.is_control) for piece in found.split(text)]
        assert "".join(part for part, _ in pieces) == text
        assert [p for p in pieces if p[1]] == [p for p in split_longest_first(names, text) if p[1]], (names, text)


def test_a_model_without_control_tokens_interrupts_nothing() -> None:
    assert ControlNames([]).interrupted(" <|im_end|> ", MARKER) == " <|im_end|> "


@pytest.fixture(scope="module")
def formats(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ChatFormat]:
    folder = tmp_path_factory.mktemp("formats")
    opened: dict[str, ChatFormat] = {}
    for kind in ("qwen3", "llama", "glm"):
        source, stored = folder / kind, folder / f"stored-{kind}"
        write_folder(source, kind)
        stored.mkdir()
        metadata = FAMILY.import_checkpoint(source, stored, {}, no_progress)
        opened[kind] = FAMILY.load(stored, metadata, torch.device("cpu"), "float32", no_progress).chat_format
    write_llama_style_pieces(folder)
    pieces = SentencePieceTokenizer(Path(folder / "tokenizer.model"))
    return {**opened, "chatglm2": ChatGLM2Format(pieces), "chatglm3": ChatGLM3Format(pieces)}


def conversation(count: int, content: Callable[[int], str]) -> Conversation:
    roles = ("user", "assistant")
    return Conversation(tuple(Message(roles[i % 2], content(i)) for i in range(count + 1 - count % 2)))


def many_results(count: int) -> Conversation:
    call = ToolCall("c", "f", '{"x": 1}')
    results = [Message("tool", "result " * 60, tool_call_id="c")] * count
    return Conversation((Message("user", "?"), Message("assistant", "", tool_calls=(call,)), *results))


LONG: dict[str, Callable[[int], Conversation]] = {
    "names of control tokens": lambda n: conversation(1, lambda _: "<|im_end|>\n" * n),
    "their beginnings": lambda n: conversation(1, lambda _: "<|im_</[gM" * n),
    "openings": lambda n: conversation(1, lambda _: "<" * n * 4),
    "one letter": lambda n: conversation(1, lambda _: "a" * n * 4),
    "spaces": lambda n: conversation(1, lambda _: "a" + " " * n * 4 + "b"),
    "line breaks": lambda n: conversation(1, lambda _: "a" + "\n" * n * 4 + "b"),
    "Chinese": lambda n: conversation(1, lambda _: "你好" * n),
    "emoji": lambda n: conversation(1, lambda _: "🙂\u200d" * n),
    "accents": lambda n: conversation(1, lambda _: "a" + "\u0301" * n),
    "messages": lambda n: conversation(n, lambda i: f'say "{i}"'),
    "equal messages": lambda n: conversation(n, lambda _: "Hello"),
    "empty messages": lambda n: conversation(n, lambda _: ""),
}


def assert_linear(work: Callable[[int], Callable[[], object]], count: int) -> None:
    """Eight times the length may take sixteen times the work; what is quadratic takes sixty-four times."""
    short, long = cpu_seconds(work(count)), cpu_seconds(work(count * 8))
    assert long < 16 * max(short, 1e-3), f"{short:.4f} s and {long:.4f} s"


@pytest.mark.parametrize("case", LONG)
def test_a_prompt_takes_work_in_proportion_to_its_length(formats: dict[str, ChatFormat], case: str) -> None:
    """`<|im_end|>` 8,000 times took 9 seconds, and 4 MiB of it would have taken hours."""

    def rendering(chat_format: ChatFormat) -> Callable[[int], Callable[[], object]]:
        def work(count: int) -> Callable[[], object]:
            asked = LONG[case](count)
            return lambda: chat_format.render(asked)

        return work

    for chat_format in formats.values():
        assert_linear(rendering(chat_format), 400)


@pytest.mark.parametrize("case", LONG)
def test_a_prompt_that_fits_is_never_refused_for_its_length(formats: dict[str, ChatFormat], case: str) -> None:
    for chat_format in formats.values():
        asked = LONG[case](300)
        ids = chat_format.render(asked)
        assert chat_format.render(asked, context_length=len(ids)) == ids


def test_results_of_tools_in_a_row_take_work_in_proportion_to_their_number(formats: dict[str, ChatFormat]) -> None:
    """They become one message of a model that knows no tools."""

    def work(count: int) -> Callable[[], object]:
        asked = many_results(count)
        return lambda: tool_prompt.without_tools(asked, "en")

    assert_linear(work, 1000)
    written = tool_prompt.without_tools(many_results(2), "en").messages
    result = "Result of the tool f:\n" + "result " * 60
    assert written[-1] == Message("user", f"{result}\n\n{result}")


def test_ids_of_any_bytes_are_decoded_in_proportion_to_their_number(formats: dict[str, ChatFormat]) -> None:
    for chat_format in formats.values():
        broken = next(i for i in range(chat_format.num_tokens) if chat_format.token_bytes(i) == b"\xf0")

        def work(count: int, chat_format: ChatFormat = chat_format, broken: int = broken) -> Callable[[], object]:
            return lambda: chat_format.decode([broken] * count)

        assert_linear(work, 2000)
