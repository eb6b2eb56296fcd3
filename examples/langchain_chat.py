"""LangChain's ChatOpenAI, streaming: `pip install langchain-openai`."""

from langchain_openai import ChatOpenAI
from pydantic import SecretStr

model = ChatOpenAI(base_url="http://localhost:8000/v1", api_key=SecretStr("none"), model="chatglm2-6b")

for chunk in model.stream("你好"):
    print(chunk.text, end="", flush=True)
