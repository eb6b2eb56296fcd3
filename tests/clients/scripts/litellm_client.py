"""litellm with an OpenAI-compatible server."""

import json
import sys

import litellm

WHERE = {"api_base": sys.argv[1], "api_key": "none", "max_retries": 0, "num_retries": 0}
ASK = {"model": "openai/gpt-3.5-turbo", "messages": [{"role": "user", "content": "你好"}], **WHERE}


def main() -> None:
    whole = litellm.completion(**ASK)
    deltas = [chunk.choices[0].delta.content for chunk in litellm.completion(**ASK, stream=True)]
    pieces = [text for text in deltas if text]
    try:
        litellm.completion(**{**ASK, "model": "openai/nobody"})
        error = ""
    except litellm.NotFoundError as failure:
        error = str(failure)
    long = {**ASK, "messages": [{"role": "user", "content": "你好 " * 60_000}]}
    try:
        litellm.completion(**long)
        told_apart = False
    except litellm.ContextWindowExceededError:
        told_apart = True
    vectors = litellm.embedding(model="openai/gpt-3.5-turbo", input=["a", "b"], encoding_format="float", **WHERE)
    told = {
        "whole": whole.choices[0].message.content,
        "streamed": "".join(pieces),
        "num_pieces": len(pieces),
        "error": error,
        "too long a prompt is told apart": told_apart,
        "embeddings": len(vectors.data) == 2,
    }
    print(json.dumps(told))


main()
