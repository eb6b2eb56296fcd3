"""Tool calls are parsed however an answer is cut; tools become text for models that were not trained to call any."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable

import pytest

from models.families.answer_parsers import ExactAnswerParser, TrimmedAnswerParser
from models.families.chatglm2 import round_prompt
from models.families.chatglm3 import CALL
from models.families.hf import HERMES
from serving.generation.interface import (
    AnswerParser,
    AnswerPart,
    Conversation,
    Message,
    RepeatedCall,
    TextDelta,
    Tool,
    ToolCall,
    ToolCallDelta,
    ToolSyntax,
)
from serving.generation.tools.call_parser import JsonEnd, ToolCallParser
from serving.generation.tools.prompt import PLAIN, without_tools

ARGUMENTS = '{"city": "a \\"}{ b\\\\", "days": [1, {"x": "</tool_call>"}]}'
SYNTAXES = {"plain": PLAIN, "hermes": HERMES, "chatglm3": CALL}
NAMES = ("weather", "weather_now")


def call(syntax: ToolSyntax, name: str, arguments: str) -> str:
    begin = (syntax.opening + syntax.before).replace("{name}", name)
    return f"{begin}{arguments}{syntax.after}"


def cuts(text: str, choose: random.Random) -> Iterable[str]:
    while text:
        size = choose.randint(1, 6)
        yield text[:size]
        text = text[size:]


def read(parser: AnswerParser, pieces: Iterable[str]) -> tuple[str, list[tuple[str, str]]]:
    """What is shown as text, and (name, arguments) of the calls."""
    parts: list[AnswerPart] = [part for piece in pieces for part in parser.push(piece)] + parser.flush()
    calls: list[tuple[str, str]] = []
    for part in parts:
        match part:
            case ToolCallDelta(index, str(call_id), str(name), arguments):
                assert index == len(calls)
                assert call_id.startswith("call_")
                calls.append((name, arguments))
            case ToolCallDelta(index, None, None, arguments):
                assert index == len(calls) - 1
                calls[-1] = (calls[-1][0], calls[-1][1] + arguments)
            case TextDelta():
                assert not calls, "no text comes after a call"
            case RepeatedCall():
                raise AssertionError("no call was repeated")
    return "".join(part.text for part in parts if isinstance(part, TextDelta)), calls


@pytest.mark.parametrize("kind", SYNTAXES)
@pytest.mark.parametrize("is_forced", [False, True])
def test_calls_are_read_however_the_answer_is_cut(kind: str, is_forced: bool) -> None:
    syntax = SYNTAXES[kind]
    text = syntax.separator.join([call(syntax, "weather_now", ARGUMENTS), call(syntax, "weather", "{}")])
    choose = random.Random(3)
    for _ in range(50):
        parser = ToolCallParser(syntax, NAMES, TrimmedAnswerParser(), is_forced)
        assert read(parser, cuts(f" {text}", choose)) == ("", [("weather_now", ARGUMENTS), ("weather", "{}")])


@pytest.mark.parametrize("syntax", [PLAIN, HERMES])
def test_text_in_front_of_a_call_is_shown_without_the_white_space_between(syntax: ToolSyntax) -> None:
    choose = random.Random(4)
    for _ in range(50):
        parser = ToolCallParser(syntax, NAMES, ExactAnswerParser(), is_forced=False)
        shown = read(parser, cuts(f"a < b, <tool \n\n{call(syntax, 'weather', ARGUMENTS)}", choose))
        assert shown == ("a < b, <tool", [("weather", ARGUMENTS)])


@pytest.mark.parametrize("kind", SYNTAXES)
@pytest.mark.parametrize("text", ["Hello", "1 < 2 <tool_cal", "weather is fine", "weather", "x\nweather\n", "<<<", ""])
def test_what_is_no_call_is_text_and_nothing_is_lost(kind: str, text: str) -> None:
    choose = random.Random(5)
    for _ in range(20):
        parser = ToolCallParser(SYNTAXES[kind], NAMES, ExactAnswerParser(), is_forced=False)
        assert read(parser, cuts(text, choose)) == (text, [])


def test_text_goes_out_as_soon_as_it_cannot_be_a_call() -> None:
    parser = ToolCallParser(CALL, NAMES, ExactAnswerParser(), is_forced=False)
    assert parser.push("wea") == []
    assert parser.push("ry") == [TextDelta("weary")]
    parser = ToolCallParser(PLAIN, NAMES, ExactAnswerParser(), is_forced=False)
    assert parser.push("a <") == [TextDelta("a")]
    assert parser.push("b") == [TextDelta(" <b")]


def test_arguments_go_out_as_they_come() -> None:
    parser = ToolCallParser(PLAIN, NAMES, ExactAnswerParser(), is_forced=True)
    (first,) = parser.push('<tool_call>{"name": "weather", "arguments": ')
    assert isinstance(first, ToolCallDelta)
    assert (first.name, first.arguments) == ("weather", "")
    assert parser.push('{"ci') == [ToolCallDelta(0, None, None, '{"ci')]
    assert parser.push('ty": 1}}') == [ToolCallDelta(0, None, None, 'ty": 1}')]


@pytest.mark.parametrize("kind", SYNTAXES)
def test_a_repeated_call_ends_the_answer(kind: str) -> None:
    """A model of 135M parameters, held to calls, wrote one call eight times, until `max_tokens`."""
    syntax, choose = SYNTAXES[kind], random.Random(7)
    first, other = call(syntax, "weather", ARGUMENTS), call(syntax, "weather", ARGUMENTS.replace("1", "2"))
    text = syntax.separator.join([first, other, call(syntax, "weather_now", ARGUMENTS), first, other])
    for _ in range(50):
        parser = ToolCallParser(syntax, NAMES, ExactAnswerParser(), is_forced=True)
        parts = [part for piece in cuts(text, choose) for part in parser.push(piece)]
        assert parts.pop() == RepeatedCall()
        called = [(part.index, part.name) for part in parts if isinstance(part, ToolCallDelta) and part.name]
        assert called == [(0, "weather"), (1, "weather"), (2, "weather_now")]
        written = [
            [part.arguments for part in parts if isinstance(part, ToolCallDelta) and part.index == i] for i in range(3)
        ]
        assert ["".join(pieces) for pieces in written] == [ARGUMENTS, ARGUMENTS.replace("1", "2"), ARGUMENTS]
        assert parser.push("more") == []
        assert parser.flush() == []


def test_the_beginning_of_a_repeated_call_is_not_sent() -> None:
    parser = ToolCallParser(PLAIN, NAMES, ExactAnswerParser(), is_forced=True)
    parser.push(call(PLAIN, "weather", '{"city": "x"}'))
    assert parser.push('\n<tool_call>{"name": "weather", "arguments": {"city": "') == []
    begun, rest = parser.push("y")
    assert isinstance(begun, ToolCallDelta)
    assert (begun.index, begun.name) == (1, "weather")
    assert rest == ToolCallDelta(1, None, None, '{"city": "y')


@pytest.mark.parametrize("document", [ARGUMENTS, "{}", '{"a": "\\\\"}', '{"a": "\\u0022}"}', "[[], {}]"])
def test_the_end_of_a_document_is_found_in_pieces(document: str) -> None:
    choose = random.Random(6)
    for _ in range(50):
        end, seen = JsonEnd(), 0
        for piece in cuts(document + "}}]]", choose):
            size = end.push(piece)
            if size is not None:
                assert document.startswith((document + "}}]]")[: seen + size])
                assert seen + size == len(document)
                break
            seen += len(piece)


WEATHER = Tool("weather", "Tells the weather.", {"type": "object", "properties": {"city": {"type": "string"}}})
HISTORY = (
    Message("system", "Be brief."),
    Message("user", "Weather?"),
    Message(
        "assistant", "Wait.", tool_calls=(ToolCall("1", "weather", '{"city": "x"}'), ToolCall("2", "weather", "{}"))
    ),
    Message("tool", "sunny", tool_call_id="1"),
    Message("tool", "rainy", tool_call_id="2"),
    Message("user", "And now?"),
)


@pytest.mark.parametrize("language", ["zh", "en"])
def test_a_conversation_with_tools_becomes_one_that_alternates(language: str) -> None:
    plain = without_tools(Conversation(HISTORY, (WEATHER,)), "zh" if language == "zh" else "en")
    assert not plain.tools
    assert [message.role for message in plain.messages] == ["system", "user", "assistant", "user"]
    assert not any(message.tool_calls for message in plain.messages)
    system, _, asked, results = (message.content for message in plain.messages)
    assert system.startswith("Be brief.")
    described = next(line for line in system.split("\n") if line.startswith("{"))
    assert json.loads(described)["parameters"] == WEATHER.parameters
    assert asked == (
        'Wait.\n<tool_call>{"name": "weather", "arguments": {"city": "x"}}</tool_call>\n'
        '<tool_call>{"name": "weather", "arguments": {}}</tool_call>'
    )
    assert [word for word in results.split() if word in ("sunny", "rainy", "And")] == ["sunny", "rainy", "And"]
    assert "问：" in round_prompt(plain)


@pytest.mark.parametrize(
    ("arguments", "written"), [("", "{}"), ('{"b":  1}', '{"b":  1}'), ('{"city": "Bei', '"{\\"city\\": \\"Bei"')]
)
def test_an_earlier_call_whose_arguments_were_cut_is_quoted(arguments: str, written: str) -> None:
    history = (Message("assistant", "", tool_calls=(ToolCall("1", "f", arguments),)), Message("tool", "x"))
    plain = without_tools(Conversation(history), "en")
    assert plain.messages[0].content == f'<tool_call>{{"name": "f", "arguments": {written}}}</tool_call>'


def test_earlier_calls_become_text_without_tools_too() -> None:
    plain = without_tools(Conversation(HISTORY[1:5]), "en")
    assert [message.role for message in plain.messages] == ["user", "assistant", "user"]
    assert "sunny" in plain.messages[2].content
