"""Events in, OpenAI's JSON out: the fold itself, on lists of events, without a model."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from serving.engine.outputs import TokenLogprob
from serving.generation.interface import Finished, TextDelta, TextToken, ToolCallDelta, Usage
from serving.http import server_sent_events as sse
from serving.openai.chat.response import ChatCompletionStream, to_completion
from serving.openai.common import ChunkOptions, Envelope, IndexedEvent
from serving.openai.completions.response import CompletionStream, PromptChoices, to_text_completion

ENVELOPE = Envelope("chatcmpl-X", 1_795_364_990, "chatglm2-6b", "fp_1")
HEAD = (
    '{"id":"chatcmpl-X","object":"chat.completion.chunk","created":1795364990,"model":"chatglm2-6b",'
    '"system_fingerprint":"fp_1","choices":['
)
PLAIN = ChunkOptions()
END = Finished("stop", Usage(17, 3, 5))


def token_bytes(token_id: int) -> bytes:
    return "你".encode()[token_id : token_id + 1] if token_id < 3 else chr(token_id).encode()


def stream(events: list[IndexedEvent], options: ChunkOptions = PLAIN, prompt_tokens: int = 17) -> list[str]:
    fold = ChatCompletionStream(ENVELOPE, options, token_bytes, prompt_tokens)
    chunks = [data(chunk) for index, event in events for chunk in fold.push(index, event)]
    *last, done = map(data, fold.end())
    assert done == "[DONE]"
    return chunks + last


def data(event: str) -> str:
    """What a server-sent event carries."""
    assert event.startswith("data: ")
    assert event.endswith("\n\n")
    return event[len("data: ") : -2]


def deltas(chunks: list[str]) -> list[tuple[int, dict[str, Any], str | None]]:
    choices = [choice for chunk in chunks for choice in json.loads(chunk)["choices"]]
    return [(choice["index"], choice["delta"], choice["finish_reason"]) for choice in choices]


def test_a_stream_is_byte_for_byte_what_every_client_was_seen_to_read() -> None:
    chunks = stream([(0, TextDelta("你")), (0, END)])
    assert chunks == [
        HEAD + '{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]}',
        HEAD + '{"index":0,"delta":{"content":"你"},"logprobs":null,"finish_reason":null}]}',
        HEAD + '{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop"}]}',
    ]


def test_usage_comes_only_when_asked_for_and_is_null_before() -> None:
    chunks = [json.loads(chunk) for chunk in stream([(0, TextDelta("x")), (0, END)], ChunkOptions(include_usage=True))]
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None, None, None]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["total_tokens"] == 20
    assert chunks[-1]["usage"]["prompt_tokens_details"]["cached_tokens"] == 5
    assert all("usage" not in json.loads(chunk) for chunk in stream([(0, TextDelta("x")), (0, END)]))


def test_running_usage_counts_up_to_the_true_total() -> None:
    options = ChunkOptions(include_usage=True, continuous_usage=True)
    one = TextDelta("A", num_tokens=1)
    chunks = stream([(0, one), (0, one), (0, END)], options)
    assert [json.loads(chunk)["usage"]["completion_tokens"] for chunk in chunks] == [1, 1, 2, 3, 3]
    assert {json.loads(chunk)["usage"]["prompt_tokens"] for chunk in chunks} == {17}


def test_choices_appear_in_order_even_if_a_later_one_speaks_first() -> None:
    shown = deltas(stream([(2, TextDelta("c")), (0, TextDelta("a")), (1, END), (0, END), (2, END)]))
    assert [index for index, delta, _ in shown if "role" in delta] == [0, 1, 2]
    assert shown[3] == (2, {"content": "c"}, None)


def test_the_first_delta_is_null_only_before_a_tool_call() -> None:
    call = ToolCallDelta(0, "call_1", "f", "")
    done = Finished("tool_calls", Usage(1, 1))
    shown = deltas(stream([(0, call), (0, ToolCallDelta(0, None, None, '{"a"')), (0, done)]))
    assert shown[0][1] == {"role": "assistant", "content": None}
    first = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "f", "arguments": ""}}
    assert shown[1][1] == {"tool_calls": [first]}
    assert shown[2][1] == {"tool_calls": [{"index": 0, "function": {"arguments": '{"a"'}}]}
    assert shown[3] == (0, {}, "tool_calls")


def test_a_whole_answer_with_a_call_has_the_same_call() -> None:
    events: list[IndexedEvent] = [
        (0, ToolCallDelta(0, "call_1", "f", "{")),
        (0, ToolCallDelta(0, None, None, "}")),
        (0, Finished("tool_calls", Usage(1, 1))),
    ]
    message = to_completion(events, ENVELOPE, PLAIN, token_bytes)["choices"][0]["message"]
    assert message["content"] is None
    assert message["tool_calls"] == [{"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]


def test_a_whole_answer_has_exactly_the_documented_keys_in_order() -> None:
    whole = to_completion([(0, TextDelta("hi")), (0, END)], ENVELOPE, PLAIN, token_bytes)
    assert json.dumps(whole) == (
        '{"id": "chatcmpl-X", "object": "chat.completion", "created": 1795364990, "model": "chatglm2-6b", "choices": '
        '[{"index": 0, "message": {"role": "assistant", "content": "hi", "refusal": null, "annotations": []}, '
        '"logprobs": null, "finish_reason": "stop"}], "usage": {"prompt_tokens": 17, "completion_tokens": 3, '
        '"total_tokens": 20, "prompt_tokens_details": {"cached_tokens": 5, "audio_tokens": 0}, '
        '"completion_tokens_details": {"reasoning_tokens": 0, "audio_tokens": 0, "accepted_prediction_tokens": 0, '
        '"rejected_prediction_tokens": 0}}, "service_tier": "default", "system_fingerprint": "fp_1"}'
    )


def test_line_separators_of_any_client_are_escaped() -> None:
    text = "a\u2028b\u2029c\x85d\r\ne"
    encoded = sse.event(sse.to_json({"content": text}))
    assert len(encoded.splitlines()) == 2
    assert json.loads(data(encoded)) == {"content": text}


def test_minus_infinity_has_a_number_in_json() -> None:
    impossible = TextDelta("A", (TextToken(TokenLogprob(65, float("-inf"), ((65, float("-inf")),)), b"A"),))
    whole = to_completion([(0, impossible), (0, END)], ENVELOPE, ChunkOptions(logprobs=True), token_bytes)
    entry = json.loads(sse.to_json(whole))["choices"][0]["logprobs"]["content"][0]
    assert (entry["logprob"], entry["top_logprobs"][0]["logprob"]) == (-9999.0, -9999.0)


def test_tokens_that_are_parts_of_a_character_are_told_by_their_bytes() -> None:
    parts = tuple(TextToken(TokenLogprob(token_id, -1.0), token_bytes(token_id)) for token_id in (0, 1, 2, 65))
    events = [(0, TextDelta("你A", parts)), (0, END)]
    prompts = PromptChoices(1, ("",))
    lists = to_text_completion([events], prompts, ENVELOPE, ChunkOptions(logprobs=True), token_bytes)
    legacy = lists["choices"][0]["logprobs"]
    assert legacy["tokens"] == ["bytes:\\xe4", "bytes:\\xbd", "bytes:\\xa0", "A"]
    assert legacy["text_offset"] == [0, 0, 0, 1]


def test_best_of_keeps_the_likeliest_per_token() -> None:
    events: list[IndexedEvent] = []
    for index, logprob in enumerate((-3.0, -1.0, -2.0)):
        events += [(index, TextDelta(str(index), (TextToken(TokenLogprob(65, logprob), b"%d" % index),))), (index, END)]
    whole = to_text_completion([events], PromptChoices(2, ("",)), ENVELOPE, PLAIN, token_bytes)
    assert [(choice["index"], choice["text"]) for choice in whole["choices"]] == [(0, "1"), (1, "2")]
    assert whole["usage"]["completion_tokens"] == 9


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=4)


@st.composite
def deltas_with_tokens(draw: st.DrawFn) -> TextDelta:
    """A text, split among up to three tokens anywhere, in the middle of characters too."""
    raw = draw(texts).encode()
    cuts = sorted(draw(st.lists(st.integers(0, len(raw)), max_size=2)))
    logprobs = st.builds(TokenLogprob, st.integers(3, 99), st.floats(-9, 0))
    shares = [raw[start:end] for start, end in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    return TextDelta(raw.decode(), tuple(TextToken(draw(logprobs), share) for share in shares))


parts = deltas_with_tokens()
answers = st.lists(st.lists(parts, max_size=5), min_size=1, max_size=3)


@given(answers, st.booleans(), st.randoms())
def test_chat_chunks_glued_together_are_the_whole_answer(
    per_choice: list[list[TextDelta]], logprobs: bool, random: Any
) -> None:
    options = ChunkOptions(logprobs=logprobs)
    events = _interleaved(per_choice, random)
    whole = to_completion(events, ENVELOPE, options, token_bytes)
    assert len(whole["choices"]) == len(per_choice)
    chunks = [json.loads(chunk) for chunk in stream(events, options)]
    for choice in whole["choices"]:
        own = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(c["delta"].get("content", "") for c in own) == choice["message"]["content"]
        assert own[-1]["finish_reason"] == choice["finish_reason"]
        if logprobs:
            entries = [entry for c in own if c["logprobs"] for entry in c["logprobs"]["content"]]
            assert entries == json.loads(sse.to_json(choice["logprobs"]["content"]))


@given(answers, st.booleans(), st.randoms())
def test_text_chunks_glued_together_are_the_whole_completion(
    per_choice: list[list[TextDelta]], logprobs: bool, random: Any
) -> None:
    options, prompts = ChunkOptions(logprobs=logprobs), PromptChoices(len(per_choice), ("" if logprobs else "echo ",))
    events = _interleaved(per_choice, random)
    whole = to_text_completion([events], prompts, ENVELOPE, options, token_bytes)
    assert len(whole["choices"]) == len(per_choice)
    fold = CompletionStream(prompts, ENVELOPE, options, token_bytes, [17])
    chunks = [json.loads(data(chunk)) for index, event in events for chunk in fold.push(index, event)]
    for choice in whole["choices"]:
        own = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(c["text"] for c in own) == choice["text"]
        for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset") if logprobs else ():
            glued = [entry for c in own if c["logprobs"] for entry in c["logprobs"][key]]
            assert glued == json.loads(sse.to_json(choice["logprobs"][key]))


def _interleaved(per_choice: list[list[TextDelta]], random: Any) -> list[IndexedEvent]:
    queues: list[list[IndexedEvent]] = [
        [*((index, part) for part in answer), (index, END)] for index, answer in enumerate(per_choice)
    ]
    events: list[IndexedEvent] = []
    while any(queues):
        events.append(random.choice([queue for queue in queues if queue]).pop(0))
    return events
