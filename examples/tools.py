"""Lets the model call a function with arguments that match its schema, and sends the result back for an answer."""

import json

from openai import OpenAI
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam

WEATHER = {"北京": "晴，23 度", "上海": "小雨，19 度"}
TOOL: ChatCompletionToolParam = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": list(WEATHER)}},
            "required": ["city"],
        },
    },
}

client = OpenAI(base_url="http://localhost:8000/v1", api_key="none")
messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": "北京今天天气怎么样？"}]

reply = client.chat.completions.create(
    model="chatglm2-6b", messages=messages, tools=[TOOL], tool_choice="required", parallel_tool_calls=False
)
(call,) = reply.choices[0].message.tool_calls or ()
assert call.type == "function"
arguments = json.loads(call.function.arguments)
print(f"{call.function.name}({arguments}) -> {WEATHER[arguments['city']]}")

messages.append({"role": "assistant", "tool_calls": [call.model_dump()]})  # type: ignore[typeddict-item]
messages.append({"role": "tool", "tool_call_id": call.id, "content": WEATHER[arguments["city"]]})
reply = client.chat.completions.create(model="chatglm2-6b", messages=messages, tools=[TOOL], max_tokens=100)
print(reply.choices[0].message.content)
