"""Random answers under a mask: every one that ends is what was asked for, whatever the vocabulary is made of."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from models.families.chatglm2 import ChatGLM2Format
from models.families.chatglm3 import CALL
from models.tokenizers.sentencepiece import SentencePieceTokenizer
from serving.engine.interface import TokenMask
from serving.generation.interface import AnswerParser, RepeatedCall, TextDelta, Tool, ToolCallDelta, ToolSyntax
from serving.generation.structured.grammar import (
    AnswerConstraint,
    ChoiceAnswer,
    JsonAnswer,
    RegexAnswer,
    ToolUse,
    answer_grammar,
    arguments_schema,
    call_grammars,
    forced_grammar,
)
from serving.generation.structured.token_masks import (
    MAX_CACHED,
    MAX_CACHED_BYTES,
    Grammar,
    Grammars,
    MaskFailed,
    ToolCallMask,
)
from serving.generation.tools.call_parser import ConstrainedText, ToolCallParser
from serving.generation.tools.prompt import PLAIN
from tests.contract.tiny import chat_format
from tests.golden_data import CHATGLM2_TOKENIZER, needs_chatglm2_tokenizer

ENDINGS = (b'"', b"}", b"]", b'"}', b'"]', b",", b"0", b" ")  # sampled more often, so that answers end


class Answers:
    """Random answers in one vocabulary."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.format = (
            ChatGLM2Format(SentencePieceTokenizer(CHATGLM2_TOKENIZER))
            if kind == "real"
            else chat_format(folder, "chatglm2")
        )
        self.grammars = Grammars(self.format)
        self.tokens = self.grammars.vocabulary.tokens
        self._endings = np.array([t in ENDINGS or i in self.format.stop_token_ids for i, t in enumerate(self.tokens)])

    def compile(self, constraint: AnswerConstraint) -> Grammar:
        return self.grammars.compile(answer_grammar(constraint), "schema", "response_format")

    def allowed(self, mask: TokenMask) -> np.ndarray[Any, Any]:
        words = mask.allowed()
        if words is None:
            return np.arange(len(self.tokens))
        bits = np.unpackbits(words.numpy().view(np.uint8), bitorder="little")[: len(self.tokens)].astype(bool)
        return bits.nonzero()[0]

    def random(self, mask: TokenMask, choose: random.Random, length: int = 300) -> list[int] | None:
        """The tokens of an answer, None if it did not end."""
        token_ids: list[int] = []
        for _ in range(length):
            ids = self.allowed(mask)
            ending = ids[self._endings[ids]]
            ids = ending if len(ending) and choose.random() < 0.3 else ids
            token_id = int(ids[choose.randrange(len(ids))])
            mask.accept(token_id)
            if token_id in self.format.stop_token_ids:
                return token_ids
            token_ids.append(token_id)
        return None

    def text(self, token_ids: list[int]) -> str:
        return b"".join(self.tokens[i] for i in token_ids).decode()

    def texts(self, constraint: AnswerConstraint, count: int) -> list[str]:
        """What clients see of `count` answers, those left out that did not end."""
        grammar, choose = self.compile(constraint), random.Random(1)
        answers = [self.random(grammar.new_mask(), choose) for _ in range(count)]
        return [shown(ConstrainedText(), self.text(ids)) for ids in answers if ids is not None]


def shown(parser: AnswerParser, text: str) -> str:
    return "".join(part.text for part in [*parser.push(text), *parser.flush()] if isinstance(part, TextDelta))


@pytest.fixture(scope="module", params=["tiny", pytest.param("real", marks=needs_chatglm2_tokenizer)])
def answers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    return Answers(request.param, tmp_path_factory.mktemp("pieces"))


TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"v": {"type": "number"}, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
            "required": ["v", "next"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/node",
}
SCHEMAS: list[dict[str, Any]] = [
    {},
    {"type": "object"},
    TREE,
    {"type": "integer", "minimum": -5, "exclusiveMaximum": 12},
    {"type": "number", "exclusiveMinimum": 0, "maximum": 2.5},
    {"type": "integer", "multipleOf": 7},
    {"type": "string", "pattern": "^[A-Z]{2}[0-9]{1,3}$"},
    {"type": "string", "pattern": r"^\W\S\D\w\d[\W\d]$"},
    {"type": "string", "minLength": 2, "maxLength": 4},
    {"type": "string", "format": "date-time"},
    {"type": "string", "format": "uuid"},
    {"enum": [1, "a", None, True, {"x": [1]}, 1.5, '"q"\n', "é😀", ""]},
    {"type": ["string", "null"], "maxLength": 5},
    {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 2, "maxItems": 3},
    {"type": "array", "prefixItems": [{"type": "boolean"}], "items": {"type": "integer"}},
    {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": {"type": "boolean"}},
    {"type": "object", "patternProperties": {"^x": {"type": "null"}}, "additionalProperties": False},
    {"type": "object", "properties": {"": {}, 'a"b': {"type": "null"}, "é": False}, "required": ["", 'a"b']},
    {"allOf": [{"type": "string", "minLength": 2}, {"maxLength": 4, "pattern": "^[a-z]*$"}]},
    {"oneOf": [{"type": "object", "properties": {"k": {"const": c}}, "required": ["k"]} for c in ("a", "b")]},
    {"anyOf": [{"type": "boolean"}, {"type": "array", "items": {"type": "null"}, "maxItems": 2}]},
]


@pytest.mark.parametrize("number", range(len(SCHEMAS)))
def test_random_answers_parse_and_validate(answers: Answers, number: int) -> None:
    schema = SCHEMAS[number]
    validator = jsonschema.Draft202012Validator(schema)
    texts = answers.texts(JsonAnswer(schema, "response_format"), 20)
    assert texts
    for text in texts:
        validator.validate(json.loads(text))
        assert not re.search(r"\s{26}", text)


@pytest.mark.parametrize(
    "choices",
    [
        ("yes", "no"),
        ("a", "ab", "abc"),
        (" x", "x", "  x"),
        ("你好，", "é😀", "/[a-z]{2}$"),
        ("\n", "\t", '"\\'),
        ("True",),
    ],
)
def test_a_choice_is_exactly_one_of_the_choices(answers: Answers, choices: tuple[str, ...]) -> None:
    assert set(answers.texts(ChoiceAnswer(choices, "guided_choice"), 60)) == set(choices)


@pytest.mark.parametrize(
    "pattern",
    [
        r"\d{3}-\d{4}",
        r"^(a|b/c){1,3}$",
        r" ?x",
        r" {2}y?",
        r"[^\n]{1,4}",
        r"\W\S\D\s\w",
        r"[\W\d]{3}[^\w]",
        r"\$\d\\",
        "你|好",
        r"(?i)yes",
        "a\nb",
    ],
)
def test_what_is_shown_matches_the_pattern(answers: Answers, pattern: str) -> None:
    texts = answers.texts(RegexAnswer(pattern, "guided_regex"), 30)
    assert texts
    for text in texts:
        assert re.fullmatch(pattern, text), text


def argument_schemas(*tools: Tool) -> dict[str, dict[str, Any]]:
    """What the grammars take for tools."""
    return {tool.name: arguments_schema(tool) for tool in tools}


GREEDY_FOR_SPACE: list[tuple[str, str]] = [
    ("a document", answer_grammar(JsonAnswer(TREE, "response_format"))),
    ("any object", answer_grammar(JsonAnswer({"type": "object"}, "response_format"))),
    ("a call", forced_grammar(PLAIN, argument_schemas(Tool("grow", "", TREE)), ToolUse(is_required=True))),
    ("a call of any kind", forced_grammar(CALL, {"grow": {"type": "object"}}, ToolUse(is_required=True))),
]


@pytest.mark.parametrize(("what", "grammar"), GREEDY_FOR_SPACE, ids=lambda value: value if " " not in value[3:] else "")
@pytest.mark.parametrize("liked", [b" ", b"\n"], ids=["spaces", "lines"])
def test_a_model_that_likes_nothing_but_white_space_cannot_stay_in_it(
    what: str, grammar: str, liked: bytes, answers: Answers
) -> None:
    """Between the parts of a document; what stands inside of strings is the model's own."""
    mask = answers.grammars.compile(grammar, what, "tools").new_mask()
    text, longest, run = b"", 0, 0
    for _ in range(200):
        ids = [int(i) for i in answers.allowed(mask)]
        spaces = [i for i in ids if answers.tokens[i] and not answers.tokens[i].strip()]
        inside_string = len(re.findall(rb'(?<!\\)"', text)) % 2 == 1
        rest = [i for i in ids if i not in spaces] or ids
        liking = sorted(spaces, key=lambda i: answers.tokens[i].startswith(liked), reverse=True)
        choice = rest if inside_string or not spaces else liking
        ends = [i for i in choice if answers.tokens[i] in ENDINGS]
        token_id = (ends if inside_string and ends else choice)[0]
        mask.accept(token_id)
        if token_id in answers.format.stop_token_ids:
            break
        piece = answers.tokens[token_id]
        text += piece
        run = run + len(piece) if not inside_string and not piece.strip() else 0
        longest = max(longest, run)
    assert 1 <= longest <= 2, text  # ChatGLM3 itself breaks the line behind "grow"


def test_an_answer_may_begin_with_the_space_that_decoding_drops(answers: Answers) -> None:
    ids = {answers.tokens[i] for i in answers.allowed(answers.compile(ChoiceAnswer(("H",), "c")).new_mask())}
    assert b"H" in ids
    assert ids <= {b"H", b" ", b" H"}


def test_every_tokenization_of_a_text_is_allowed(answers: Answers) -> None:
    """A grammar that forces tokens would force the tokens of a greedy tokenizer, which no model was trained on."""
    grammar = answers.compile(ChoiceAnswer(("你好",), "c"))
    byte_tokens = [answers.tokens.index(bytes([byte])) for byte in "你好".encode()]
    mask = grammar.new_mask()
    for token_id in byte_tokens:
        assert token_id in answers.allowed(mask)
        mask.accept(token_id)
    assert set(answers.allowed(mask)) == answers.format.stop_token_ids


CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["x", "y"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = (Tool("weather", "", CITY), Tool("weather_now", "", {"type": "object", "additionalProperties": False}))


@pytest.mark.parametrize("syntax", [PLAIN, CALL])
def test_forced_calls_are_calls_and_fit_their_schemas(answers: Answers, syntax: Any) -> None:
    grammar = answers.grammars.compile(
        forced_grammar(syntax, argument_schemas(*TOOLS), ToolUse(is_required=True)), "", ""
    )
    choose, numbers = random.Random(2), set[int]()
    for _ in range(40):
        ids = answers.random(grammar.new_mask(), choose, 2000)
        assert ids is not None
        calls = called(ToolCallParser(syntax, ("weather", "weather_now"), ConstrainedText(), True), answers.text(ids))
        numbers.add(len(calls))
        for name, arguments in calls:
            schema = next(tool.parameters for tool in TOOLS if tool.name == name)
            jsonschema.validate(json.loads(arguments), schema)
    assert min(numbers) == 1
    assert max(numbers) > 1
    named = forced_grammar(syntax, argument_schemas(TOOLS[0]), ToolUse(is_required=True, name="weather"))
    ids = answers.random(answers.grammars.compile(named, "", "").new_mask(), choose)
    assert ids is not None
    assert [
        name for name, _ in called(ToolCallParser(syntax, ("weather",), ConstrainedText(), True), answers.text(ids))
    ] == ["weather"]


def called(parser: ToolCallParser, text: str) -> list[tuple[str, str]]:
    calls: list[tuple[str, str]] = []
    for part in [*parser.push(text), *parser.flush()]:
        if isinstance(part, RepeatedCall):
            break
        assert isinstance(part, ToolCallDelta), part
        if part.name is not None:
            calls.append((part.name, ""))
        calls[-1] = (calls[-1][0], calls[-1][1] + part.arguments)
    return calls


def call_mask(answers: Answers, syntax: ToolSyntax, tools: Sequence[Tool], use: ToolUse) -> ToolCallMask:
    """The mask of an answer that may begin a call by itself."""
    bodies, between = call_grammars(syntax, argument_schemas(*tools), use)
    compiled = {opening: answers.grammars.compile(text, "", "") for opening, text in bodies.items()}
    more = answers.grammars.compile(between, "", "") if between else None
    return ToolCallMask(compiled, more, answers.grammars.vocabulary, syntax.is_at_start)


@pytest.mark.parametrize("syntax", [PLAIN, CALL])
def test_a_call_that_the_model_begins_is_held_to_its_schema(answers: Answers, syntax: Any) -> None:
    mask = call_mask(answers, syntax, TOOLS, ToolUse(is_parallel=False))
    opening = syntax.opening.replace("{name}", "weather_now")
    begins = " " + opening if syntax.is_at_start else "So: a < b. " + opening
    token_ids = [answers.tokens.index(bytes([byte])) for byte in begins.encode()]
    for token_id in token_ids:
        assert token_id in answers.allowed(mask)
        mask.accept(token_id)
    rest = answers.random(mask, random.Random(3))
    assert rest is not None
    after = answers.text(rest)
    assert after.startswith(syntax.before[:3])
    assert after.endswith(syntax.after)


@pytest.mark.parametrize("syntax", [PLAIN, CALL])
def test_further_calls_are_held_to_their_own_schemas_and_the_answer_may_end_after_each(
    answers: Answers, syntax: Any
) -> None:
    """With ChatGLM3's syntax, where the opening is the name, each tool once had a grammar of all tools."""
    tools = (*TOOLS, Tool("her", "", CITY))  # "weather" ends as "her" does
    written = [(syntax.opening + syntax.before).replace("{name}", tool.name) for tool in tools]
    arguments = ('{"city": "x"}', "{}", '{"city":"y"}')
    calls = [begin + made + syntax.after for begin, made in zip(written, arguments, strict=True)]
    mask = call_mask(answers, syntax, tools, ToolUse())
    for i, text in enumerate(calls):
        for byte in ((syntax.separator if i else "") + text).encode():
            token_id = answers.tokens.index(bytes([byte]))
            assert token_id in answers.allowed(mask), (text, chr(byte))
            mask.accept(token_id)
        assert answers.format.stop_token_ids <= set(answers.allowed(mask))
    again = call_mask(answers, syntax, tools, ToolUse(is_parallel=False))
    for byte in calls[0].encode():
        again.accept(answers.tokens.index(bytes([byte])))
    assert set(answers.allowed(again)) == answers.format.stop_token_ids
    specified = answers.grammars.mask_of(mask.specification)
    for byte in calls[1].encode():
        specified.accept(answers.tokens.index(bytes([byte])))
    assert set(answers.allowed(specified)) > answers.format.stop_token_ids


def test_text_without_a_call_is_never_masked(answers: Answers) -> None:
    for syntax in (PLAIN, CALL):
        mask = call_mask(answers, syntax, TOOLS, ToolUse())
        for byte in b"1 < 2, weather_then\nweather\n<tool_ca> ":
            words = mask.allowed()
            forbidden = set(range(len(answers.tokens))) - set(answers.allowed(mask).tolist())
            assert words is None or all(len(answers.tokens[i]) > 1 for i in forbidden)
            mask.accept(answers.tokens.index(bytes([byte])))
        assert len(answers.allowed(mask)) == len(answers.tokens)


def test_a_token_that_was_not_allowed_raises(answers: Answers) -> None:
    mask = answers.compile(ChoiceAnswer(("a",), "c")).new_mask()
    with pytest.raises(MaskFailed):
        mask.accept(answers.tokens.index(b"z"))


def test_compiled_grammars_are_cached_and_masks_do_not_share_their_state(answers: Answers) -> None:
    one = answers.compile(ChoiceAnswer(("ab", "c"), "c"))
    first, second = one.new_mask(), answers.compile(ChoiceAnswer(("ab", "c"), "c")).new_mask()
    before = answers.allowed(second).tolist()
    first.accept(answers.tokens.index(b"a"))
    assert answers.allowed(second).tolist() == before
    assert answers.allowed(first).tolist() != before


def test_the_cache_of_grammars_is_bounded_by_their_size_too(answers: Answers) -> None:
    """64 grammars of the largest schemas would hold a gigabyte."""
    grammars = Grammars(answers.format)
    for i in range(MAX_CACHED + 5):
        grammars.compile(answer_grammar(ChoiceAnswer((f"small {i}",), "c")), "", "")
    assert grammars.num_cached == MAX_CACHED
    for i in range(12):
        grammars.compile(answer_grammar(ChoiceAnswer((f"large {i}", "x" * 30_000), "c")), "", "")
    assert grammars.num_cached * 30_000 * 100 < MAX_CACHED_BYTES
