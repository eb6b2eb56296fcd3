"""The SDK of 2023, as the documentation of ChatGLM2's API uses it."""

import json
import sys

import openai

openai.api_base, openai.api_key = sys.argv[1], "none"
ASK = {"model": "gpt-3.5-turbo", "messages": [{"role": "user", "content": "你好"}]}

whole = openai.ChatCompletion.create(**ASK)
pieces = [
    chunk.choices[0].delta.content
    for chunk in openai.ChatCompletion.create(**ASK, stream=True)
    if hasattr(chunk.choices[0].delta, "content")
]
try:
    openai.ChatCompletion.create(**{**ASK, "model": "nobody"})
    error = ""
except openai.error.InvalidRequestError as failure:
    error = f"{failure.code} {failure}"
vectors = openai.Embedding.create(model="gpt-3.5-turbo", input=["a", "b"])
raw = openai.Completion.create(model="gpt-3.5-turbo", prompt="hi", max_tokens=3, logprobs=2)
told = {
    "whole": whole.choices[0].message.content,
    "streamed": "".join(pieces),
    "num_pieces": len(pieces),
    "error": error,
    "models": "gpt-3.5-turbo" in [model.id for model in openai.Model.list().data],
    "embeddings": len(vectors.data) == 2 and len(vectors.data[0].embedding) > 8,
    "completions": len(raw.choices[0].logprobs.tokens) <= 3,
}
print(json.dumps(told))
