"""LangChain's ChatOpenAI and OpenAIEmbeddings."""

import json
import sys
from typing import Literal

import openai
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel


class Place(BaseModel):
    """What the model is made to say."""

    city: Literal["Paris", "Rome"]
    warm: bool


def main() -> None:
    where = {"base_url": sys.argv[1], "api_key": "none", "max_retries": 0}
    chat = ChatOpenAI(model="chatglm2-6b", stream_usage=True, **where)
    whole = chat.invoke("你好")
    chunks = list(chat.stream("你好"))
    pieces = [chunk.content for chunk in chunks if chunk.content]
    try:
        ChatOpenAI(model="nobody", **where).invoke("hi")
        error = ""
    except openai.NotFoundError as failure:
        error = str(failure)
    bound = chat.bind_tools([Place], tool_choice="Place", parallel_tool_calls=False)
    embeddings = OpenAIEmbeddings(model="chatglm2-6b", check_embedding_ctx_length=False, **where)
    told = {
        "whole": whole.content,
        "streamed": "".join(pieces),
        "num_pieces": len(pieces),
        "error": error,
        "usage": whole.usage_metadata["total_tokens"] > 0 and any(chunk.usage_metadata for chunk in chunks),
        "structured": isinstance(chat.with_structured_output(Place, method="json_schema").invoke("hi"), Place),
        "tools": bound.invoke("hi").tool_calls[0]["name"] == "Place",
        "responses": bool(ChatOpenAI(model="chatglm2-6b", use_responses_api=True, **where).invoke("你好").content),
        "embeddings": len(embeddings.embed_documents(["a", "b"])) == 2,
    }
    print(json.dumps(told))


main()
