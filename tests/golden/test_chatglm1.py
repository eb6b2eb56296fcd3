"""ChatGLM-6B (v1) gives what the original 2023 code gave: logits, greedy tokens, ids, prompts, answers."""

from __future__ import annotations

import itertools
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from models.checkpoints.chatglm import convert, load_network, read_config, tensor_names
from models.checkpoints.files import read_json
from models.checkpoints.shards import find_shards, read_tensors
from models.families import chatglm
from models.families.answer_parsers import TrimmedAnswerParser
from models.families.chatglm_answer_parser import ChatGLMAnswerParser, clean_up_spaces, widen
from models.family import ImportRefused
from models.networks.chatglm import ChatGLMNetwork
from models.store.progress import no_progress
from models.tokenizers.chatglm import ChatGLMTokenizer
from serving.generation.interface import Conversation, Message, PromptError, TextDelta, Tool
from tests.golden_data import CHATGLM_TOKENIZER, GOLDEN, needs_chatglm_tokenizer
from tests.original_chatglm import train_tokenizer, write_checkpoint
from tests.reference_attention import ReferenceAttention, forward, greedy

TINY = GOLDEN / "model" / "glm1-tiny"
NUM_PROMPTS = 5
END = 505  # suppressed in the golden greedy runs
TOLERANCE = 3e-5  # on logits of standard deviation 7.8 and magnitude 41; the original itself is 5e-5 from float64
SUFFIX = [130001, 130004]

torch.set_num_threads(1)


def golden(name: str) -> Any:
    return json.loads((GOLDEN / name).read_text(encoding="utf-8"))


def conversation(*contents: str, system: str | None = None, continue_final: bool = False) -> Conversation:
    """A conversation of alternating roles, user first."""
    roles = ("user", "assistant")
    turns = tuple(Message(roles[i % 2], content) for i, content in enumerate(contents))
    head = () if system is None else (Message("system", system),)
    return Conversation(head + turns, continue_final=continue_final)


# --- the network ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ChatGLMNetwork:
    """The golden checkpoint, converted and opened as an import would."""
    stored = tmp_path_factory.mktemp("glm1-tiny")
    config = read_config(read_json(TINY / "config.json"))
    convert(TINY, stored, config, 0, no_progress)
    return load_network(stored, config, torch.device("cpu"), "float32", no_progress)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    expected = numpy.load(TINY / "expected.npz")
    return [expected[f"ids{k}"][0].tolist() for k in range(NUM_PROMPTS)]


@pytest.mark.parametrize("k", range(NUM_PROMPTS))
def test_the_logits_of_each_prompt_are_the_originals(tiny: ChatGLMNetwork, prompts: list[list[int]], k: int) -> None:
    expected = numpy.load(TINY / "expected.npz")[f"last_logits{k}"][0]
    rows = {0: (prompts[k], 0, tiny.layout(prompts[k]))}
    logits = forward(tiny, ReferenceAttention(), rows)[0]
    assert numpy.abs(logits.numpy() - expected).max() <= TOLERANCE


def test_one_ragged_batch_of_all_prompts_has_the_same_logits(tiny: ChatGLMNetwork, prompts: list[list[int]]) -> None:
    expected = numpy.load(TINY / "expected.npz")
    rows = {k: (prompt, 0, tiny.layout(prompt)) for k, prompt in enumerate(prompts)}
    for k, logits in forward(tiny, ReferenceAttention(), rows).items():
        assert numpy.abs(logits.numpy() - expected[f"last_logits{k}"][0]).max() <= TOLERANCE


def test_64_greedy_tokens_are_the_originals_alone_and_in_one_batch(
    tiny: ChatGLMNetwork, prompts: list[list[int]]
) -> None:
    expected = numpy.load(TINY / "expected.npz")
    answers = [expected[f"greedy64_{k}"].tolist() for k in range(NUM_PROMPTS)]
    assert greedy(tiny, prompts, 64, frozenset({END})) == answers
    assert greedy(tiny, prompts[3:4], 64, frozenset({END})) == answers[3:4]


def test_an_answer_is_the_same_when_text_after_sop_is_prefilled_in_parts(
    tiny: ChatGLMNetwork, prompts: list[list[int]]
) -> None:
    prompt = prompts[3]
    layout = tiny.layout(prompt)
    whole = forward(tiny, ReferenceAttention(), {0: (prompt, 0, layout)})[0]
    attention = ReferenceAttention()
    cut = layout.num_two_way + 2
    forward(tiny, attention, {0: (prompt[:cut], 0, layout)})
    parts = forward(tiny, attention, {0: (prompt[cut:], cut, layout)})[0]
    assert torch.allclose(whole, parts, rtol=0, atol=TOLERANCE)


def test_ids_without_sop_or_mask_have_a_layout(tiny: ChatGLMNetwork) -> None:
    layout = tiny.layout([7, 8, 9])
    assert (layout.num_two_way, layout.mask_index) == (3, 2)
    assert torch.isfinite(forward(tiny, ReferenceAttention(), {0: ([7, 8, 9], 0, layout)})[0]).all()


# --- the checkpoint ---------------------------------------------------------------------------------------------------


def imported(source: Path, target: Path) -> dict[str, Any]:
    target.mkdir()
    return chatglm.FAMILY.import_checkpoint(source, target, {}, no_progress)


@pytest.mark.parametrize("num_image_tokens", [0, 20_000])
def test_a_checkpoint_is_imported_opened_and_answers(tmp_path: Path, num_image_tokens: int) -> None:
    source = tmp_path / "source"
    source.mkdir()
    write_checkpoint(source, num_image_tokens)
    metadata = imported(source, tmp_path / "stored")
    shutil.rmtree(source)
    model = chatglm.FAMILY.load(tmp_path / "stored", metadata, torch.device("cpu"), "float32", no_progress)
    prompt = model.chat_format.render(conversation("hello model"))
    assert metadata["context_length"] == model.network.shape.max_positions == 128
    assert min(prompt) >= num_image_tokens
    assert model.chat_format.decode(prompt) == "hello model"
    layout = model.network.layout(prompt)
    assert (layout.num_two_way, layout.mask_index) == (len(prompt) - 1, len(prompt) - 2)
    assert len(greedy(model.network, [prompt], 4)[0]) == 4


def pack(weights: dict[str, torch.Tensor], bits: int) -> dict[str, torch.Tensor]:
    """Quantise the linears and the embedding as the original's QuantizedLinear and QuantizedEmbedding do."""
    packed = dict(weights)
    for name, weight in weights.items():
        if "layernorm" in name or name.endswith("bias") or name == "lm_head.weight":
            continue
        scale = (weight.float().abs().amax(dim=1) / (2 ** (bits - 1) - 1)).half()
        whole = torch.round(weight.float() / scale.float()[:, None]).to(torch.int8)
        packed[name] = whole if bits == 8 else (whole[:, 0::2] << 4) | (whole[:, 1::2] & 15)
        packed[f"{name}_scale"] = scale
    return packed


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_checkpoint_is_read_within_half_a_step_and_half_precision(tmp_path: Path, bits: int) -> None:
    source = tmp_path / "source"
    source.mkdir()
    weights = write_checkpoint(source, quantization_bit=bits)
    packed = pack(weights, bits)
    save_file(packed, source / "model.safetensors")
    metadata = imported(source, tmp_path / "stored")
    model = chatglm.FAMILY.load(tmp_path / "stored", metadata, torch.device("cpu"), "float32", no_progress)
    assert isinstance(model.network, ChatGLMNetwork)
    opened = dict(read_tensors(find_shards(tmp_path / "stored"), no_progress))
    for old, new in tensor_names(model.network.config).items():
        original = weights[old].float()
        half_step = packed[f"{old}_scale"].float()[:, None] / 2 if f"{old}_scale" in packed else 0.0
        assert ((opened[new] - original).abs() <= half_step + original.abs() * 1e-3).all(), old


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ({"pre_seq_len": 128}, "add --prefix"),
        ({"quantization_bit": 3}, "quantization_bit=3"),
        ({"model_type": "llama"}, "llama"),
        ({"padded_vocab_size": 65024}, "chatglm2"),
        ({"position_encoding_2d": False}, "position_encoding_2d"),
        ({"hidden_size": 64}, "shape"),
        ({"num_layers": 3}, "lacks"),
        ({"num_layers": 1}, "network lacks"),
        ({"gmask_token_id": 1}, "do not fit"),
        ({"quantization_bit": 4}, "lacks .*_scale"),
    ],
)
def test_a_checkpoint_that_cannot_be_right_is_refused(
    tmp_path: Path, overrides: dict[str, object], reason: str
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    write_checkpoint(source, **overrides)
    with pytest.raises(ImportRefused, match=reason):
        imported(source, tmp_path / "stored")


# --- the tokenizer ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ice_text() -> ChatGLMTokenizer:
    return ChatGLMTokenizer(CHATGLM_TOKENIZER, num_image_tokens=0)


@needs_chatglm_tokenizer
def test_every_golden_string_has_the_originals_ids_and_text(ice_text: ChatGLMTokenizer) -> None:
    cases = golden("tokenizer/chatglm1.json")["encode"]
    assert [ice_text.encode(case["text"]) for case in cases] == [case["ids"] for case in cases]
    decoded = [clean_up_spaces(ice_text.decode(case["ids"])) for case in cases]
    assert decoded == [case["decoded"] for case in cases]


CONTROL_NAMES = ["<sop>", "<eop>", "[MASK]", "[gMASK]", "[sMASK]", "<pad>", "</s>", "<s>", "<unk>"]
WHITE_SPACE_NAMES = ["<n>", "<|tab|>", "<|blank_2|>", "<|blank_80|>", "＜n＞", "<\x01n>", "﹤|tab|﹥"]


@needs_chatglm_tokenizer
@pytest.mark.parametrize("name", CONTROL_NAMES + WHITE_SPACE_NAMES)
def test_the_name_of_a_control_token_stays_text(ice_text: ChatGLMTokenizer, name: str) -> None:
    """The original turns it into the token, so that "<eop>" in a question ends the question: deliberately different."""
    control = {0, 1, 2, 3, *range(130000, 130008)}
    white_space = {4, *range(130008, 130088)}
    for text in (name, f"a {name} b", f"{name}{name}", f"你好{name}", f"<{name}", f"\n{name}\n    x"):
        ids = ice_text.encode(text)
        num_white_space = sum(token_id in white_space for token_id in ids)
        assert not control & set(ids), text
        assert num_white_space == text.count("\n") + text.count("    "), text
        as_written = name.replace("\x01", "").translate(str.maketrans("＜＞﹤﹥", "<><>"))
        assert ice_text.decode(ids) == text.replace(name, as_written), text


@needs_chatglm_tokenizer
def test_generated_strings_have_the_ids_of_sentencepiece_itself(ice_text: ChatGLMTokenizer) -> None:
    """Against the plain rule of the original, on strings that name no token."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(CHATGLM_TOKENIZER))
    chooser = random.Random(7)
    parts = ["你好", "世界，", "a b", "  ", "\n", "\t", " " * 5, "😀", "naïve ", "x = {}", "<div>", "é", "\u3000", "<1"]
    for _ in range(2000):
        text = "".join(chooser.choices(parts, k=chooser.randint(1, 12)))
        prepared = text.replace("\n", "<n>").replace("\t", "<|tab|>")
        for length in range(80, 1, -1):
            prepared = prepared.replace(" " * length, f"<|blank_{length}|>")
        assert ice_text.encode(text) == pieces.encode(prepared), text


@needs_chatglm_tokenizer
def test_tokens_have_bytes_and_incomplete_characters_are_not_text(ice_text: ChatGLMTokenizer) -> None:
    wave = ice_text.encode("👋")[1:]
    assert b"".join(map(ice_text.token_bytes, wave)) == "👋".encode()
    assert set(ice_text.decode(wave[:2])) == {"\ufffd"}
    assert ice_text.token_bytes(130010) == b"   "
    assert ice_text.token_bytes(130004) == b""
    assert ice_text.decode([130001, 130004, 74874, 130005, 999_999]) == "你好"


def test_a_lone_surrogate_is_refused(tmp_path: Path) -> None:
    train_tokenizer(tmp_path / "ice_text.model")
    with pytest.raises(PromptError, match="surrogate") as caught:
        ChatGLMTokenizer(tmp_path / "ice_text.model", 0).encode("a\ud800", "prompt")
    assert caught.value.param == "prompt"


# --- the prompt -------------------------------------------------------------------------------------------------------


def test_golden_prompts_are_the_originals() -> None:
    for case in golden("prompt/chatglm1_prompts.json")["cases"]:
        contents = [text for pair in case["history"] for text in pair] + [case["query"]]
        assert chatglm.prompt_text(conversation(*contents)) == (case["prompt"], "")


@needs_chatglm_tokenizer
def test_the_special_tokens_follow_the_text(ice_text: ChatGLMTokenizer) -> None:
    chat_format = chatglm.ChatGLMFormat(ice_text, *SUFFIX, 130005)
    assert chat_format.render(conversation("你好")) == [5, 74874, *SUFFIX]
    assert chat_format.encode("你好") == [5, 74874, *SUFFIX]
    continued = chat_format.render(conversation("你好", "你好", continue_final=True))
    assert continued == [5, 74874, *SUFFIX, 5, 74874]


def test_a_system_message_is_written_before_the_last_question() -> None:
    assert chatglm.prompt_text(conversation("c", system="S:")) == ("S:c", "")
    text, _ = chatglm.prompt_text(conversation("a", "b", "c", system="S:"))
    assert text == "[Round 0]\n问：a\n答：b\n[Round 1]\n问：S:c\n答："


def test_conversations_that_the_format_does_not_support_are_refused() -> None:
    tool = Tool("f", "", {})
    with pytest.raises(PromptError) as caught:
        chatglm.prompt_text(Conversation((Message("user", "a"),), tools=(tool,)))
    assert caught.value.param == "tools"
    for messages in ((), (Message("system", "a"),), (Message("assistant", "a"),)):
        with pytest.raises(PromptError):
            chatglm.prompt_text(Conversation(messages))


def test_messages_of_one_role_are_one_turn_and_an_answer_in_front_answers_an_empty_question() -> None:
    turns = Message("assistant", "a"), Message("user", "b"), Message("user", "c")
    text, _ = chatglm.prompt_text(Conversation(turns))
    assert text == "[Round 0]\n问：\n答：a\n[Round 1]\n问：b\nc\n答："


# --- the answer -------------------------------------------------------------------------------------------------------


def parsed(*chunks: str) -> str:
    parser = ChatGLMAnswerParser(TrimmedAnswerParser())
    parts = [part for chunk in chunks for part in parser.push(chunk)] + parser.flush()
    return "".join(part.text for part in parts if isinstance(part, TextDelta))


def test_golden_answers_are_the_originals() -> None:
    for case in golden("prompt/process_response.json")["chatglm1"]:
        assert parsed(case["in"]) == case["out"]
        assert parsed(*case["in"]) == case["out"]


def test_a_continued_answer_depends_on_the_last_character_and_keeps_its_space(tmp_path: Path) -> None:
    train_tokenizer(tmp_path / "ice_text.model")
    chat_format = chatglm.ChatGLMFormat(ChatGLMTokenizer(tmp_path / "ice_text.model", 0), *SUFFIX, 130005)
    for beginning, text, shown in (("你好", "!", "！"), ("hello", "!", "!"), ("hello", " a", " a"), ("", " a", "a")):
        parser = chat_format.parser(beginning)
        parts = [*parser.push(text), *parser.flush()]
        assert "".join(part.text for part in parts if isinstance(part, TextDelta)) == shown


WORDS = st.sampled_from([*" ',.!?:;ntsmvrex\n中。", "[[训练时间]]", "[[训练", "时间]]", "  ", " n't", " 're", "' "])


@settings(max_examples=400, deadline=None)
@given(st.lists(WORDS, max_size=24), st.lists(st.integers(0, 60), max_size=8))
def test_an_answer_parsed_in_pieces_equals_the_answer_parsed_whole(words: list[str], cuts: list[int]) -> None:
    text = "".join(words)
    whole = widen(clean_up_spaces(text).strip().replace("[[训练时间]]", "2023年"))
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[start:stop] for start, stop in itertools.pairwise(edges)]
    assert parsed(*pieces) == whole
    assert parsed(*text) == whole
