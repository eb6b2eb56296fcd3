"""With log-probabilities, the bytes of an answer's tokens, joined, are the answer's text, in every event of it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.families.answer_parsers import PLACEHOLDER, ExactAnswerParser, TrimmedAnswerParser
from models.families.chatglm_answer_parser import ChatGLMAnswerParser
from models.tokenizers.sentencepiece import SentencePieceTokenizer
from serving.engine.outputs import TokenLogprob, TokenOutput
from serving.generation.interface import AnswerParser, ChatEvent, Finished, TextDelta, ToolCallDelta, ToolSyntax
from serving.generation.output_processor import OutputProcessor, PlainTextParser
from serving.generation.tools.call_parser import ConstrainedText, ToolCallParser
from tests.contract.tiny import train_tokenizer

SYNTAX = ToolSyntax("<call>{name}", "", "</call>")
PARSERS = {
    "plain": PlainTextParser,
    "exact": ExactAnswerParser,
    "trimmed": TrimmedAnswerParser,
    "continued": lambda: TrimmedAnswerParser(has_begun=True),
    "chatglm": lambda: ChatGLMAnswerParser(TrimmedAnswerParser()),
    "constrained": ConstrainedText,
    "tools": lambda: ToolCallParser(SYNTAX, ("f",), TrimmedAnswerParser(), is_forced=False),
}
WORDS = ["Hello", " ", "\n", "你好", "😀", "é", ",", "，", PLACEHOLDER, "[[", "END", "EN", "a ' t", "好，"]
WORDS += ["👩\u200d👧", '<call>f{"a": 1}</call>']


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(file)
    return SentencePieceTokenizer(file)


def events(
    tokenizer: SentencePieceTokenizer,
    token_ids: list[int],
    parser: AnswerParser,
    stop: tuple[str, ...],
    has_logprobs: bool,
) -> list[ChatEvent]:
    ends = frozenset({tokenizer.eos})
    processor = OutputProcessor(
        tokenizer.decode, tokenizer.token_bytes, parser, stop, 1, ends, has_logprobs=has_logprobs
    )
    found: list[ChatEvent] = []
    for number, token_id in enumerate(token_ids):
        reason = "length" if number == len(token_ids) - 1 else None
        if not processor.is_over:
            found += processor.push(TokenOutput(token_id, reason, TokenLogprob(token_id, -1.0)))
    return found


def text_of(found: list[ChatEvent]) -> str:
    return "".join(event.text for event in found if isinstance(event, TextDelta))


ids = st.lists(st.integers(0, 420), max_size=40)
bytes_of_words = st.lists(st.sampled_from(WORDS), max_size=8).map("".join)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_shares_are_the_text_of_every_event_whatever_changed_it(
    tokenizer: SentencePieceTokenizer, data: st.DataObject
) -> None:
    words = tokenizer.encode(data.draw(bytes_of_words))
    token_ids = data.draw(st.one_of(ids, st.just(words), st.builds(lambda a, b: a + words + b, ids, ids)))
    token_ids = token_ids[: data.draw(st.integers(0, len(token_ids)))] or [5]  # may cut a character
    stop = data.draw(st.sampled_from([(), ("END",), ("o", "\n"), ("好",), (" ",)]))
    make = PARSERS[data.draw(st.sampled_from(sorted(PARSERS)))]
    found = events(tokenizer, token_ids, make(), stop, has_logprobs=True)
    for event in found:
        if isinstance(event, TextDelta):
            assert b"".join(token.share for token in event.tokens) == event.text.encode()
    assert text_of(found) == text_of(events(tokenizer, token_ids, make(), stop, has_logprobs=False))
    finished = found[-1]
    assert isinstance(finished, Finished)
    if not any(isinstance(event, ToolCallDelta) for event in found):
        num_listed = sum(len(event.tokens) for event in found if isinstance(event, TextDelta))
        assert num_listed in (finished.usage.completion_tokens, finished.usage.completion_tokens - 1)


@settings(max_examples=100, deadline=None)
@given(text=bytes_of_words)
def test_tokens_of_whole_characters_have_their_own_bytes(tokenizer: SentencePieceTokenizer, text: str) -> None:
    """But for the space that SentencePiece puts in front."""
    token_ids = tokenizer.encode(text)
    found = events(tokenizer, token_ids or [5], PlainTextParser(), (), has_logprobs=True)
    shares = [token.share for event in found if isinstance(event, TextDelta) for token in event.tokens]
    if token_ids:
        own = [tokenizer.token_bytes(token_id) for token_id in token_ids]
        assert shares == [own[0].removeprefix(b" "), *own[1:]]


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_cut_character_is_one_mark(tokenizer: SentencePieceTokenizer, length: int) -> None:
    token_ids = tokenizer.encode("a😀")[: length - 4]
    found = events(tokenizer, token_ids, PlainTextParser(), (), has_logprobs=True)
    assert text_of(found) == "a\ufffd"
    shares = [token.share for event in found if isinstance(event, TextDelta) for token in event.tokens]
    assert [share for share in shares if share] == [b"a", "\ufffd".encode()]


def test_text_comes_with_its_token_and_not_later(tokenizer: SentencePieceTokenizer) -> None:
    token_ids = tokenizer.encode("Hello world, 你好")
    found = events(tokenizer, token_ids, TrimmedAnswerParser(), (), has_logprobs=True)
    plain = events(tokenizer, token_ids, TrimmedAnswerParser(), (), has_logprobs=False)
    assert len(found) >= len(plain) - 2
