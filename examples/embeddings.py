"""Embeds texts as vectors of length 1 and prints their dot products: larger for texts of similar meaning."""

from openai import OpenAI

TEXTS = ["今天天气真好", "今天是个大晴天", "The stock market fell"]

client = OpenAI(base_url="http://localhost:8000/v1", api_key="none")

vectors = [item.embedding for item in client.embeddings.create(model="chatglm2-6b", input=TEXTS).data]
for text, vector in zip(TEXTS, vectors, strict=True):
    product = sum(one * other for one, other in zip(vectors[0], vector, strict=True))
    print(f"{product:6.3f}  {text}")
