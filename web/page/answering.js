// A question of a conversation -> its answer, streamed into the conversation's tree.

import { streamChat } from "./api.js";
import { DEFAULTS, contentOf, turnsTo } from "./tree.js";

/** The request for an answer. Questions that were never answered are left out. */
export function requestBody(conversation, answer, models) {
  const { settings } = conversation;
  const turns = turnsTo(conversation, answer.id);
  const messages = [];
  if (settings.system.trim()) messages.push({ role: "system", content: settings.system });
  for (const { question, answer: earlier } of turns.slice(0, -1)) {
    if (earlier.text) messages.push({ role: "user", content: contentOf(question) }, { role: "assistant", content: earlier.text });
  }
  messages.push({ role: "user", content: contentOf(turns.at(-1).question) });
  const body = { model: models.includes(settings.model) ? settings.model : models[0], messages };
  if (answer.text) {
    messages.push({ role: "assistant", content: answer.text });
    body.continue_final_message = true;
    body.add_generation_prompt = false;
  }
  for (const name of Object.keys(DEFAULTS)) {
    if (!["model", "system"].includes(name) && settings[name] !== DEFAULTS[name]) body[name] = settings[name];
  }
  return body;
}

/** Write an answer, or what follows its text so far; `changed` is called after every piece. */
export async function writeAnswer(conversation, answer, { models, key, signal, changed }) {
  const body = requestBody(conversation, answer, models);
  Object.assign(answer, { status: "running", failure: null, finish: null });
  changed();
  const begun = performance.now();
  let firstAt = null;
  try {
    for await (const chunk of streamChat(body, key, signal)) {
      if (chunk.usage) answer.usage = chunk.usage;
      const choice = chunk.choices[0];
      if (!choice) continue;
      if (choice.finish_reason) answer.finish = choice.finish_reason;
      const { content, reasoning_content: reasoning } = choice.delta;
      if (!content && !reasoning) continue;
      const now = performance.now();
      firstAt ??= now;
      answer.firstSeconds = (firstAt - begun) / 1000;
      answer.text += content ?? "";
      answer.reasoning += reasoning ?? "";
      answer.speed = speed(answer.usage, now - firstAt);
      changed();
    }
    answer.status = "done";
  } catch (error) {
    if (error.name === "AbortError") answer.status = "stopped";
    else {
      answer.status = "failed";
      answer.failure = error.kind
        ? { kind: kindOf(error, conversation.settings), message: error.message, seconds: error.seconds, limit: conversation.settings.max_tokens }
        : { kind: "server", message: String(error) };
    }
  }
  conversation.changed = Date.now();
  changed();
}

/** A prompt that would fit if the longest answer were shorter is not "too long a conversation". */
function kindOf(error, settings) {
  return error.kind === "context_length_exceeded" && settings.max_tokens > DEFAULTS.max_tokens ? "max_tokens_too_large" : error.kind;
}

/** Tokens per second after the first; null while there is nothing to measure. */
function speed(usage, milliseconds) {
  if (!usage || usage.completion_tokens < 2 || milliseconds <= 0) return null;
  return ((usage.completion_tokens - 1) / milliseconds) * 1000;
}
