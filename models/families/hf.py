"""Any Hugging Face decoder that transformers loads by itself, with its own chat template (Llama, Qwen, GLM-4, …)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernels.precision import Precision, Progress
from models.families.answer_parsers import ExactAnswerParser
from models.family import Family, ImportOption, ImportRefused, LoadedNetwork
from serving.generation.interface import AnswerParser, Conversation, Language, ToolSyntax

if TYPE_CHECKING:
    import torch

    from models.families.chat_template import ChatTemplate
    from models.tokenizers.tokenizer_json import FastTokenizer

TEMPLATE = ImportOption(
    name="template",
    help="the prompt of a model without a chat template: vicuna (Vicuna, WizardLM)",
    choices=("vicuna",),
)

# How Hermes, Qwen and many others write calls; recognised by the opening in their templates.
HERMES = ToolSyntax("<tool_call>", '\n{"name": "{name}", "arguments": ', "}\n</tool_call>")


class HFFormat:
    """Conversation -> ids and back, by the model's own template and tokenizer. Answers are as the model wrote them."""

    tool_syntax: ToolSyntax | None
    language: Language = "en"

    def __init__(
        self, tokenizer: FastTokenizer, template: ChatTemplate, stop_token_ids: frozenset[int], has_hermes_calls: bool
    ) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self.tool_syntax = HERMES if has_hermes_calls else None
        self.stop_token_ids = stop_token_ids
        self.num_tokens = tokenizer.num_tokens

    def render(self, conversation: Conversation) -> list[int]:
        return self._tokenizer.encode(self._template.render(conversation))

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode_plain(text)

    def decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids)

    def parser(self, begun: str = "") -> AnswerParser:
        return ExactAnswerParser()

    def token_bytes(self, token_id: int) -> bytes:
        return self._tokenizer.token_bytes(token_id)


def open_format(folder: Path) -> HFFormat:
    """The chat format of a stored folder. Raises ImportRefused if it does not say where an answer ends."""
    from models.checkpoints import hf as hf_checkpoint
    from models.families.chat_template import ChatTemplate
    from models.tokenizers.tokenizer_json import FastTokenizer

    file = folder / hf_checkpoint.TOKENIZER_FILE
    named = hf_checkpoint.named_tokens(folder)
    tokenizer = FastTokenizer(file, named.values())
    for key in ("bos_token", "eos_token"):
        ids = hf_checkpoint.token_ids(folder, f"{key}_id")
        name = tokenizer.name_of(ids[0]) if ids and key not in named else None
        if name is not None:
            named[key] = name
    end = tokenizer.id_of(named.get("eos_token", ""))
    stop = {*hf_checkpoint.token_ids(folder, "eos_token_id"), *(() if end is None else (end,))}
    if not stop:
        raise ImportRefused("neither generation_config.json nor config.json nor the tokenizer names an eos token")
    default, tools = (folder / name for name in (hf_checkpoint.TEMPLATE_FILE, hf_checkpoint.TOOL_TEMPLATE_FILE))
    source = default.read_text(encoding="utf-8")
    tool_source = tools.read_text(encoding="utf-8") if tools.is_file() else source
    template = ChatTemplate(source, named, tokenizer.control_names, tool_source)
    return HFFormat(tokenizer, template, frozenset(stop), HERMES.opening in tool_source)


def _import_checkpoint(source: Path, target: Path, options: Mapping[str, str], progress: Progress) -> dict[str, Any]:
    from models.checkpoints import hf as hf_checkpoint
    from models.families.chat_template import VICUNA

    config = hf_checkpoint.read_config(source)
    length = hf_checkpoint.context_length(config)
    hf_checkpoint.take_template(source, target, VICUNA if options.get("template") == "vicuna" else None)
    hf_checkpoint.take_tokenizer(source, target)
    hf_checkpoint.write_config(source, target)
    open_format(target)
    metadata = hf_checkpoint.take_weights(source, target, progress)
    hf_checkpoint.check_weights(target)
    return metadata | {"context_length": length}


def _load(
    folder: Path, metadata: Mapping[str, Any], device: torch.device, precision: Precision, progress: Progress
) -> LoadedNetwork:
    from models.networks.transformers_decoder import open_decoder

    chat_format = open_format(folder)
    network = open_decoder(
        folder, device, precision, progress, chat_format.num_tokens, max_positions=int(metadata["context_length"])
    )
    return LoadedNetwork(network, chat_format)


FAMILY = Family(
    name="hf",
    title="any Hugging Face decoder with a chat template (Llama, Qwen, Mistral, GLM-4 …), and Vicuna-style models",
    import_checkpoint=_import_checkpoint,
    load=_load,
    options=(TEMPLATE,),
    open_format=open_format,
)
