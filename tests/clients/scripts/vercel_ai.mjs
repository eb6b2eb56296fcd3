// The Vercel AI SDK with its provider for OpenAI-compatible servers.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, embedMany, generateObject, generateText, streamText } from "ai";
import { z } from "zod";

const provider = createOpenAICompatible({
  name: "ours",
  baseURL: process.argv[2],
  apiKey: "none",
  includeUsage: true,
  supportsStructuredOutputs: true,
});
const model = provider("gpt-3.5-turbo");
const once = { maxRetries: 0 };

const whole = await generateText({ model, prompt: "你好", ...once });
const stream = streamText({ model, prompt: "你好", ...once });
const pieces = [];
for await (const piece of stream.textStream) pieces.push(piece);
let error = "";
try {
  await generateText({ model: provider("nobody"), prompt: "hi", ...once });
} catch (failure) {
  if (APICallError.isInstance(failure)) error = failure.message;
}
const schema = z.object({ city: z.enum(["Paris", "Rome"]), warm: z.boolean() });
const { object } = await generateObject({ model, schema, prompt: "hi", ...once });
const { embeddings } = await embedMany({
  model: provider.textEmbeddingModel("gpt-3.5-turbo"),
  values: ["a", "b"],
  ...once,
});
console.log(
  JSON.stringify({
    whole: whole.text,
    streamed: pieces.join(""),
    num_pieces: pieces.length,
    error,
    usage: (await stream.usage).totalTokens > 0,
    object: typeof object.warm === "boolean",
    embeddings: embeddings.length === 2,
  }),
);
