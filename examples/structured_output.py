"""Requests an answer that follows a JSON schema, and parses it into a class."""

from typing import Literal

from openai import OpenAI
from pydantic import BaseModel


class Season(BaseModel):
    name: Literal["spring", "summer", "autumn", "winter"]
    is_cold: bool


client = OpenAI(base_url="http://localhost:8000/v1", api_key="none")

completion = client.chat.completions.parse(
    model="chatglm2-6b",
    messages=[{"role": "user", "content": "Which season comes after autumn? Answer in JSON."}],
    response_format=Season,
)
print(completion.choices[0].message.parsed)
