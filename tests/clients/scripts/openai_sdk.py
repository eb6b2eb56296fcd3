"""The SDK of 1.x, 2.x and 3.x."""

import json
import sys
from typing import Literal

import openai
from pydantic import BaseModel

client = openai.OpenAI(base_url=sys.argv[1], api_key="none", max_retries=0)
ASK = {"model": "gpt-3.5-turbo", "messages": [{"role": "user", "content": "你好"}]}


class Place(BaseModel):
    """What the model is made to say."""

    city: Literal["Paris", "Rome"]
    warm: bool


def main() -> None:
    whole = client.chat.completions.create(**ASK)
    chunks = list(client.chat.completions.create(**ASK, stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    with client.chat.completions.stream(**ASK) as stream:
        helped = stream.get_final_completion().choices[0].message.content
    try:
        client.chat.completions.create(**{**ASK, "model": "nobody"})
        error = ""
    except openai.NotFoundError as failure:
        error = f"{failure.code} {failure}"
    with client.responses.stream(model="gpt-3.5-turbo", input="你好") as events:
        response = events.get_final_response() if list(events) else None
    tool = openai.pydantic_function_tool(Place, name="place")
    choice = {"type": "function", "function": {"name": "place"}}
    called = client.chat.completions.parse(**ASK, tools=[tool], tool_choice=choice, parallel_tool_calls=False)
    vectors = client.embeddings.create(model="gpt-3.5-turbo", input=["a", "b"])
    told = {
        "whole": whole.choices[0].message.content,
        "streamed": "".join(pieces),
        "num_pieces": len(pieces),
        "error": error,
        "usage": chunks[-1].usage.total_tokens == whole.usage.total_tokens,
        "request id": bool(whole._request_id),
        "stream helper": helped == whole.choices[0].message.content,
        "responses": response.output_text == whole.choices[0].message.content,
        "parsed": isinstance(
            client.chat.completions.parse(**ASK, response_format=Place).choices[0].message.parsed, Place
        ),
        "tool": isinstance(called.choices[0].message.tool_calls[0].function.parsed_arguments, Place),
        "embeddings": len(vectors.data) == 2 and len(vectors.data[0].embedding) > 8,
        "models": "gpt-3.5-turbo" in [model.id for model in client.models.list()],
        "completions": client.completions.create(model="gpt-3.5-turbo", prompt="hi", max_tokens=3).object
        == "text_completion",
    }
    print(json.dumps(told))


main()
