// A conversation's last question -> its answer, streamed into the stored conversation.

import { streamChat } from "./api.js";
import { DEFAULTS, newAnswer } from "./store.js";

/** The request for the conversation's last question. Questions that were never answered are left out. */
export function requestBody(conversation, models) {
  const { settings, turns } = conversation;
  const messages = [];
  if (settings.system.trim()) messages.push({ role: "system", content: settings.system });
  for (const { question, answer } of turns.slice(0, -1)) {
    if (answer.text) messages.push({ role: "user", content: question }, { role: "assistant", content: answer.text });
  }
  messages.push({ role: "user", content: turns.at(-1).question });
  const body = { model: models.includes(settings.model) ? settings.model : models[0], messages };
  for (const name of ["temperature", "top_p", "max_tokens"]) {
    if (settings[name] !== DEFAULTS[name]) body[name] = settings[name];
  }
  return body;
}

/** Write the answer to the last question into the conversation; `changed` is called after every piece. */
export async function answerLast(conversation, { models, key, signal, changed }) {
  const answer = newAnswer();
  conversation.turns.at(-1).answer = answer;
  changed();
  const begun = performance.now();
  let firstAt = null;
  try {
    for await (const chunk of streamChat(requestBody(conversation, models), key, signal)) {
      if (chunk.usage) answer.usage = chunk.usage;
      const choice = chunk.choices[0];
      if (!choice) continue;
      if (choice.finish_reason) answer.finish = choice.finish_reason;
      if (!choice.delta.content) continue;
      const now = performance.now();
      firstAt ??= now;
      answer.firstSeconds = (firstAt - begun) / 1000;
      answer.text += choice.delta.content;
      answer.speed = speed(answer.usage, now - firstAt);
      changed();
    }
    answer.status = "done";
  } catch (error) {
    if (error.name === "AbortError") answer.status = "stopped";
    else {
      answer.status = "failed";
      answer.failure = error.kind
        ? { kind: error.kind, message: error.message, seconds: error.seconds }
        : { kind: "server", message: String(error) };
    }
  }
  conversation.changed = Date.now();
  changed();
  return answer;
}

/** Tokens per second after the first; null while there is nothing to measure. */
function speed(usage, milliseconds) {
  if (!usage || usage.completion_tokens < 2 || milliseconds <= 0) return null;
  return ((usage.completion_tokens - 1) / milliseconds) * 1000;
}
