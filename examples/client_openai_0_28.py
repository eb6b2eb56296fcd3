import openai

openai.api_base = "http://localhost:8000/v1"
openai.api_key = "none"

for chunk in openai.ChatCompletion.create(
    model="chatglm2-6b",
    messages=[{"role": "user", "content": "你好"}],
    stream=True,
):
    if hasattr(chunk.choices[0].delta, "content"):
        print(chunk.choices[0].delta.content, end="", flush=True)
