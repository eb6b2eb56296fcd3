// OpenAI's own SDK for Node.
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
const ask = { model: "gpt-3.5-turbo", messages: [{ role: "user", content: "你好" }] };

const whole = await client.chat.completions.create(ask);
const pieces = [];
for await (const chunk of await client.chat.completions.create({ ...ask, stream: true })) {
  if (chunk.choices[0]?.delta?.content) pieces.push(chunk.choices[0].delta.content);
}
let error = "";
try {
  await client.chat.completions.create({ ...ask, model: "nobody" });
} catch (failure) {
  if (failure instanceof OpenAI.NotFoundError) error = `${failure.code} ${failure.message}`;
}
const helped = await client.chat.completions.stream(ask).finalContent();
const response = await client.responses.create({ model: ask.model, input: "你好" });
const kinds = [];
for await (const event of await client.responses.create({ model: ask.model, input: "你好", stream: true })) {
  kinds.push(event.type);
}
const vectors = await client.embeddings.create({ model: ask.model, input: ["a", "b"] });
const text = whole.choices[0].message.content;
console.log(
  JSON.stringify({
    whole: text,
    streamed: pieces.join(""),
    num_pieces: pieces.length,
    error,
    "stream helper": helped === text,
    responses: response.output_text === text,
    "response events": kinds.at(0) === "response.created" && kinds.at(-1) === "response.completed",
    embeddings: vectors.data.length === 2 && vectors.data[0].embedding.length > 8,
  }),
);
