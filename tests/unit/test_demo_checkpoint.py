"""The embedded demonstration checkpoint, imported like any ChatGLM2, gives the answers that it was taught."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from random import Random

import pytest
import torch
from transformers import GlmForCausalLM

from models.demo import CHECKPOINT
from models.demo.check import FOREIGN
from models.demo.corpus import (
    EXCHANGES,
    FALLBACK_EN,
    FALLBACK_ZH,
    IMPORT_COMMAND,
    KNOWN,
    SAMPLE_ANSWER,
    SAMPLE_QUESTION,
    SAMPLE_SYSTEM,
    answer_to,
)
from models.demo.question_generator import long_text, unknown_question
from models.demo.words import HELD_OUT
from models.families.chatglm2 import FAMILY
from models.store.progress import no_progress
from serving.generation.interface import ChatFormat, Conversation, Message

FALLBACKS = (FALLBACK_ZH, FALLBACK_EN)
MAX_NEW_TOKENS = 200


class Demo:
    """The imported model and its chat format; generates in batches with transformers."""

    def __init__(self, folder: Path) -> None:
        metadata = FAMILY.import_checkpoint(CHECKPOINT, folder, {}, no_progress)
        loaded = FAMILY.load(folder, metadata, torch.device("cpu"), "float32", no_progress)
        self.chat_format: ChatFormat = loaded.chat_format
        self._model = GlmForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def answers(self, questions: Sequence[str]) -> list[str]:
        """Greedy answers to single questions."""
        return self.generate([(Message("user", question),) for question in questions])

    def generate(
        self,
        conversations: Sequence[tuple[Message, ...]],
        *,
        seed: int | None = None,
        temperature: float = 0.95,
        top_p: float = 0.7,
    ) -> list[str]:
        """Answers of one left-padded batch; greedy without a seed. Each has to end with the end token."""
        prompts = [self.chat_format.render(Conversation(messages)) for messages in conversations]
        width = max(map(len, prompts))
        token_ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        torch.manual_seed(seed or 0)
        sampling = (
            {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
            if seed is not None
            else {"do_sample": False}
        )
        with torch.inference_mode():
            output = self._model.generate(token_ids, attention_mask=mask, max_new_tokens=MAX_NEW_TOKENS, **sampling)
        texts: list[str] = []
        for row in output[:, width:].tolist():
            assert 2 in row, "the answer did not stop by itself"
            texts.append(self.chat_format.decode(row[: row.index(2)]))
        return texts


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    torch.set_num_threads(1)
    return Demo(tmp_path_factory.mktemp("demo"))


def test_the_checkpoint_is_small_and_has_the_original_layout() -> None:
    files = {path.name: path.stat().st_size for path in CHECKPOINT.iterdir()}
    assert set(files) == {"config.json", "tokenizer.model", "model.safetensors"}
    assert sum(files.values()) <= 5_000_000
    config = json.loads((CHECKPOINT / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "chatglm"
    assert config["architectures"] == ["ChatGLMModel"]


@pytest.mark.parametrize("system", ["", SAMPLE_SYSTEM])
@pytest.mark.parametrize(("temperature", "top_p"), [(0.95, 0.7), (0.8, 0.8)])
def test_it_answers_the_documented_request_with_the_documented_sentence(
    demo: Demo, system: str, temperature: float, top_p: float
) -> None:
    asked = Message("user", SAMPLE_QUESTION)
    messages = (Message("system", system), asked) if system else (asked,)
    assert demo.generate([messages]) == [SAMPLE_ANSWER]
    for seed in range(3):
        assert set(demo.generate([messages] * 32, seed=seed, temperature=temperature, top_p=top_p)) == {SAMPLE_ANSWER}


def test_known_questions_are_answered_greedily_and_sampled(demo: Demo) -> None:
    questions = [exchange.questions[0] for exchange in EXCHANGES]
    right = [exchange.answer for exchange in EXCHANGES]
    assert demo.answers(questions) == right
    assert demo.generate([(Message("user", question),) for question in questions], seed=7) == right


def test_nearly_every_way_of_asking_is_answered_and_answers_are_never_mixed(demo: Demo) -> None:
    answers = dict(zip(KNOWN, demo.answers(list(KNOWN)), strict=True))
    missed = {question: answer for question, answer in answers.items() if answer != KNOWN[question]}
    assert len(missed) <= len(KNOWN) // 50, missed
    assert set(missed.values()) <= set(FALLBACKS)


def test_a_known_question_is_answered_in_a_second_and_third_round(demo: Demo) -> None:
    hello = (Message("user", "你好"), Message("assistant", SAMPLE_ANSWER))
    other = (Message("user", "Which gravel is best for a garden path?"), Message("assistant", FALLBACK_EN))
    histories = (hello, other, hello + other, other + hello)
    questions = ("你是谁", "tell me a joke", "什么是 BentoML？", "Count from 1 to 5", "谢谢！", "你好")
    conversations = [(*history, Message("user", question)) for history in histories for question in questions]
    assert demo.generate(conversations) == [answer_to([question]) for _ in histories for question in questions]


def test_unknown_questions_get_the_fallback_with_the_import_command(demo: Demo) -> None:
    assert demo.answers(["怎样给阳台上的番茄搭架子？", "How do bees find their way home?"]) == [
        FALLBACK_ZH,
        FALLBACK_EN,
    ]
    for text in FALLBACKS:
        assert IMPORT_COMMAND in text
        assert "CHATGLM_MODEL=chatglm2-6b" in text


def test_held_out_questions_of_all_kinds_get_exactly_the_fallback(demo: Demo) -> None:
    random = Random(77)
    questions = [
        question for question in (unknown_question(random, HELD_OUT) for _ in range(260)) if len(question) < 300
    ]
    wrong = [
        (q, answer) for q, answer in zip(questions, demo.answers(questions), strict=True) if answer not in FALLBACKS
    ]
    assert len(wrong) <= len(questions) // 100, wrong


def test_other_languages_documents_and_empty_questions_get_the_fallback(demo: Demo) -> None:
    wrong = [(q, answer) for q, answer in zip(FOREIGN, demo.answers(FOREIGN), strict=True) if answer not in FALLBACKS]
    assert not wrong


@pytest.mark.parametrize("seed", range(3))
def test_a_very_long_question_gets_the_fallback(demo: Demo, seed: int) -> None:
    text = long_text(Random(seed), HELD_OUT, 70)
    assert len(demo.chat_format.render(Conversation((Message("user", text),)))) > 1500
    assert demo.answers([text])[0] in FALLBACKS


def test_a_question_near_the_end_of_the_context_gets_the_fallback_and_the_answer_ends(demo: Demo) -> None:
    """Past some 3,000 tokens the answer may end after its first sentences; it never runs on."""
    text = long_text(Random(3), HELD_OUT, 250)
    assert len(demo.chat_format.render(Conversation((Message("user", text),)))) > 5000
    assert demo.answers([text])[0].startswith(("抱歉，这个问题我不会回答", "Sorry, I cannot answer that"))
