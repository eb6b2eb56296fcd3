"""A chat in the terminal, with streaming and history: `python -m examples.chat [QUESTION]`; see --help."""

from __future__ import annotations

import argparse
import sys

from openai import APIError, OpenAI
from openai.types.chat import ChatCompletionMessageParam


def answer(client: OpenAI, model: str, messages: list[ChatCompletionMessageParam]) -> None:
    """Print the answer to the last message as it is generated, and append it to `messages`."""
    text = ""
    try:
        with client.chat.completions.create(model=model, messages=messages, stream=True) as stream:
            for chunk in stream:
                piece = chunk.choices[0].delta.content or ""
                print(piece, end="", flush=True)
                text += piece
    except KeyboardInterrupt:
        text += " …"
    except APIError as error:
        messages.pop()
        print(f"Error: {error.message}", file=sys.stderr)
        return
    print()
    messages.append({"role": "assistant", "content": text})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.chat")
    parser.add_argument("question", nargs="*", help="answer this question and exit")
    parser.add_argument("--url", default="http://localhost:8000/v1")
    parser.add_argument("--model", default="chatglm2-6b")
    parser.add_argument("--key", default="none")
    parser.add_argument("--system", default="")
    chosen = parser.parse_args()
    client = OpenAI(base_url=chosen.url, api_key=chosen.key)
    opening: list[ChatCompletionMessageParam] = [{"role": "system", "content": chosen.system}] if chosen.system else []
    if chosen.question:
        answer(client, chosen.model, [*opening, {"role": "user", "content": " ".join(chosen.question)}])
        return
    print("Ctrl+C stops an answer, /new starts a new conversation, Ctrl+D exits.")
    messages = list(opening)
    while True:
        question = input("> ").strip()
        if question == "/new":
            messages = list(opening)
        elif question:
            messages.append({"role": "user", "content": question})
            answer(client, chosen.model, messages)


if __name__ == "__main__":
    try:
        main()
    except (EOFError, KeyboardInterrupt):
        print()
