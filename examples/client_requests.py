import json

import requests

response = requests.post(
    "http://localhost:8000/v1/chat/completions",
    json={
        "model": "chatglm2-6b",
        "messages": [{"role": "system", "content": "你是一个人工智能助理"}, {"role": "user", "content": "你好"}],
        "temperature": 0.95,
        "top_p": 0.7,
        "max_tokens": 2048,
        "stream": True,
    },
    stream=True,
)
for line in response.iter_lines():
    if not line:
        continue
    data = line.decode("utf-8").removeprefix("data: ")
    if data == "[DONE]":
        break
    line_json = json.loads(data)
    delta = line_json["choices"][0]["delta"]
    if "content" in delta:
        print(delta["content"], end="", flush=True)
