"""CodeGeeX2-6B: ChatGLM2's network and prompt with a tokenizer that adds no space in front. For writing code.

CodeGeeX2 is a base model: it is best at continuing raw code, `# language: Python\\n# write a bubble sort\\n`,
through `/v1/completions`; the language tag is the caller's task. For chat its authors' demonstration server calls the
checkpoint's `chat`, which writes ChatGLM2's `[Round n]` prompt; so does this family, because it keeps apart who said
what. The tokenizer's own flag (add_dummy_prefix) is read by sentencepiece from the model file.
Sources: README and demo/fastapicpu.py of CodeGeeX2.
"""

from __future__ import annotations

from models.families.chatglm2 import ROPE, import_checkpoint, open_format
from models.families.decoder import load_with
from models.family import Family

FAMILY = Family(
    name="codegeex2",
    title="CodeGeeX2-6B, also -int4",
    import_checkpoint=import_checkpoint,
    load=load_with(open_format),
    options=(ROPE,),
    open_format=open_format,
)
