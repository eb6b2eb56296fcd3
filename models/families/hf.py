"""Any Hugging Face decoder that transformers loads by itself: conversations through the model's own chat template."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernels.precision import Progress
from models.families.answer_parsers import ExactAnswerParser, TrimmedAnswers
from models.families.decoder import load_with
from models.family import Family, ImportOption, ImportRefused
from serving.generation.interface import (
    AnswerParser,
    Conversation,
    Language,
    Message,
    PromptError,
    Tool,
    ToolSyntax,
)

if TYPE_CHECKING:
    from models.families.chat_template import ChatTemplate
    from models.tokenizers.tokenizer_json import FastTokenizer

TEMPLATE = ImportOption(
    name="template",
    help="the prompt of a model without a chat template: vicuna (Vicuna, WizardLM)",
    choices=("vicuna",),
)

# How Hermes, Qwen and many others write calls; their templates contain the opening.
HERMES = ToolSyntax("<tool_call>", '\n{"name": "{name}", "arguments": ', "}\n</tool_call>")


class HFFormat(TrimmedAnswers["FastTokenizer"]):
    """Conversation -> ids and back, by the model's own template and tokenizer. Answers are not edited."""

    tool_syntax: ToolSyntax | None
    language: Language = "en"

    def __init__(
        self,
        tokenizer: FastTokenizer,
        template: ChatTemplate,
        stop_token_ids: frozenset[int],
        has_hermes_calls: bool,
        num_rows: int,
    ) -> None:
        """num_rows: of the network's embedding. Tokens at and behind it do not exist for this model."""
        super().__init__(tokenizer)
        self._template = template
        self.tool_syntax = HERMES if has_hermes_calls else None
        self.has_reasoning = template.has_reasoning
        self.stop_token_ids = stop_token_ids
        self.num_tokens = min(tokenizer.num_tokens, num_rows)

    def render(self, conversation: Conversation, context_length: int | None = None) -> list[int]:
        return self._tokenizer.encode(self._template.render(conversation), "messages", context_length)

    def encode(self, text: str, context_length: int | None = None) -> list[int]:
        return self._tokenizer.encode_plain(text, context_length)

    def parser(self, begun: str = "") -> AnswerParser:
        return ExactAnswerParser()

    def check_tokens(self) -> None:
        """Raises ImportRefused if a prompt can have a token that the network has no embedding for.

        A control token that the template never writes, such as a [PAD] added for training, is no obstacle.
        """
        first = self.num_tokens
        behind = range(first, self._tokenizer.num_tokens)
        in_text = {i for i in behind if self._tokenizer.token_bytes(i) and self._tokenizer.name_of(i) is None}
        if found := in_text | {i for i in self._written_ids() if i >= first}:
            raise ImportRefused(
                f"the tokenizer has tokens for prompts (such as {min(found)}) behind the network's {first} "
                "(vocab_size of config.json): it belongs to another model, or the model was not resized for it"
            )

    def _written_ids(self) -> set[int]:
        """Ids that the tokenizer puts in front of texts and those that the template writes around messages."""
        user, system, answer = Message("user", "a"), Message("system", "a"), Message("assistant", "a")
        ids = set(self.encode("a"))
        for messages in ((user,), (user, answer, user), (system, user)):
            for tools in ((), (Tool("a", "a", {}),)):
                with suppress(PromptError):  # not every template has every role, or tools
                    ids.update(self.render(Conversation(messages, tools)))
        return ids


def open_format(folder: Path) -> HFFormat:
    """The chat format of a stored folder. Raises ImportRefused if the folder names no end-of-text token."""
    from models.checkpoints.files import read_json
    from models.checkpoints.hf import TEMPLATE_FILE, TOKENIZER_FILE, TOOL_TEMPLATE_FILE, named_tokens, token_ids
    from models.families.chat_template import ChatTemplate
    from models.tokenizers.tokenizer_json import FastTokenizer

    named = named_tokens(folder)
    tokenizer = FastTokenizer(folder / TOKENIZER_FILE, named.values())
    for key in ("bos_token", "eos_token"):
        ids = token_ids(folder, f"{key}_id")
        name = tokenizer.name_of(ids[0]) if ids and key not in named else None
        if name is not None:
            named[key] = name
    end = tokenizer.id_of(named.get("eos_token", ""))
    num_rows = int(read_json(folder / "config.json").get("vocab_size") or tokenizer.num_tokens)
    stop = {i for i in (*token_ids(folder, "eos_token_id"), *(() if end is None else (end,))) if i < num_rows}
    if not stop:
        raise ImportRefused(
            "neither generation_config.json nor config.json nor the tokenizer names an eos token that the network has"
        )
    source, tool_file = (folder / TEMPLATE_FILE).read_text(encoding="utf-8"), folder / TOOL_TEMPLATE_FILE
    tool_source = tool_file.read_text(encoding="utf-8") if tool_file.is_file() else source
    template = ChatTemplate(source, named, tokenizer.control_names, tool_source)
    return HFFormat(tokenizer, template, frozenset(stop), HERMES.opening in tool_source, num_rows)


def _import_checkpoint(source: Path, target: Path, options: Mapping[str, str], progress: Progress) -> dict[str, Any]:
    from models.checkpoints import hf
    from models.checkpoints.hf_config import context_length
    from models.families.chat_template import VICUNA

    length = context_length(hf.read_config(source))
    hf.import_template(source, target, VICUNA if options.get("template") == "vicuna" else None)
    hf.import_tokenizer(source, target)
    hf.write_config(source, target)
    open_format(target).check_tokens()
    metadata = hf.import_weights(source, target, progress)
    hf.check_weights(target)
    return metadata | {"context_length": length}


FAMILY = Family(
    name="hf",
    title="any Hugging Face decoder with a chat template (Llama, Qwen, Mistral, GLM-4 …), and Vicuna-style models",
    import_checkpoint=_import_checkpoint,
    load=load_with(open_format),
    options=(TEMPLATE,),
    open_format=open_format,
)
