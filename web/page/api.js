// The HTTP API as this page uses it: the list of models, and one streamed answer.

const BASE = new URL("v1/", new URL(".", document.baseURI));
const KINDS = new Set([
  "context_length_exceeded", "invalid_api_key", "model_loading", "model_load_failed", "model_not_found",
  "rate_limit_exceeded", "shutting_down",
]);

/** What went wrong: `kind` has a sentence in words.js, `message` is the server's own. */
export class Failure extends Error {
  constructor(kind, message = "", seconds = 5) {
    super(message || kind);
    this.kind = kind;
    this.message = message;
    this.seconds = seconds;
  }
}

/** The names of the models that chat. Throws Failure. */
export async function listModels(key) {
  const reply = await call("models", { headers: headers(key) });
  return (await reply.json()).data.filter((model) => model.abilities.includes("chat")).map((model) => model.id);
}

/** The chunks of one answer, parsed. Throws Failure, or AbortError when `signal` stops it. */
export async function* streamChat(body, key, signal) {
  const reply = await call("chat/completions", {
    method: "POST",
    headers: { ...headers(key), "content-type": "application/json" },
    body: JSON.stringify({
      ...body,
      stream: true,
      stream_options: { include_usage: true, continuous_usage_stats: true },
    }),
    signal,
  });
  for await (const data of serverSentData(reply.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Failure("server", chunk.error.message);
    yield chunk;
  }
  throw new Failure("cut"); // a complete stream ends with [DONE]
}

/** The data of every event of a `text/event-stream`. */
export async function* serverSentData(stream) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      let part;
      try {
        part = await reader.read();
      } catch (error) {
        throw error.name === "AbortError" ? error : new Failure("cut");
      }
      if (part.done) return;
      const lines = (rest + decoder.decode(part.value, { stream: true })).split(/\r?\n/);
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
        else if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // the stream may have ended already
  }
}

async function call(path, options) {
  let reply;
  try {
    reply = await fetch(new URL(path, BASE), { ...options, cache: "no-store", credentials: "same-origin" });
  } catch (error) {
    throw error.name === "AbortError" ? error : new Failure("unreachable");
  }
  if (reply.ok) return reply;
  let told = {};
  try {
    told = (await reply.json()).error ?? {};
  } catch {
    told = { message: `HTTP ${reply.status}` }; // a proxy's error, which is not JSON of ours
  }
  throw new Failure(kindOf(reply.status, told.code), told.message ?? "", waitOf(reply));
}

function kindOf(status, code) {
  if (KINDS.has(code)) return code;
  if (status === 401 || status === 403) return "invalid_api_key";
  if (status === 429) return "rate_limit_exceeded";
  if ([502, 503, 504].includes(status)) return "unreachable";
  return status >= 500 ? "server" : "refused";
}

function waitOf(reply) {
  const seconds = Number(reply.headers.get("retry-after"));
  return seconds > 0 ? Math.ceil(seconds) : 5;
}

function headers(key) {
  return key ? { authorization: `Bearer ${key}` } : {};
}
