// Conversations and preferences in the browser's storage: one entry each, so that two tabs do not overwrite each other.

const CONVERSATION = "chatglm.conversation.";
const PREFERENCE = "chatglm.";

/** The documented defaults of the API; they are not sent, since the server has the same. */
export const DEFAULTS = Object.freeze({ model: "", system: "", temperature: 0.95, top_p: 0.7, max_tokens: 2048 });

/** A conversation is { id, changed, settings, turns: [{ question, answer }] }; see `newAnswer`. */
export function newConversation(settings = DEFAULTS) {
  const id = `${Date.now().toString(36)}-${Math.random().toString(36).slice(2, 8)}`;
  return { id, changed: Date.now(), settings: { ...DEFAULTS, ...settings }, turns: [] };
}

/** status: running, done, stopped or failed. */
export function newAnswer() {
  return { text: "", status: "running", failure: null, finish: null, usage: null, firstSeconds: null, speed: null };
}

export function titleOf(conversation) {
  return conversation.turns.length ? conversation.turns[0].question.trim().replace(/\s+/g, " ").slice(0, 60) : "";
}

/** All that are kept, the newest first. */
export function loadConversations() {
  const found = [];
  for (const name of Object.keys(localStorage)) {
    if (!name.startsWith(CONVERSATION)) continue;
    const conversation = parse(localStorage.getItem(name));
    if (conversation && Array.isArray(conversation.turns)) found.push(settle(conversation));
  }
  return found.sort((one, other) => other.changed - one.changed);
}

/** False if the browser's storage is full. */
export function saveConversation(conversation) {
  try {
    localStorage.setItem(CONVERSATION + conversation.id, JSON.stringify(conversation));
    return true;
  } catch {
    return false;
  }
}

export function deleteConversation(id) {
  localStorage.removeItem(CONVERSATION + id);
}

/** Calls `changed` when another tab has saved or deleted a conversation. */
export function onOtherTab(changed) {
  addEventListener("storage", (event) => {
    if (event.key === null || event.key.startsWith(CONVERSATION)) changed();
  });
}

export function preference(name) {
  return localStorage.getItem(PREFERENCE + name) ?? "";
}

export function setPreference(name, value) {
  if (value) localStorage.setItem(PREFERENCE + name, value);
  else localStorage.removeItem(PREFERENCE + name);
}

/** The API key: for this tab, unless it was to be kept. */
export function apiKey() {
  return sessionStorage.getItem(`${PREFERENCE}key`) ?? preference("key");
}

export function setApiKey(key, isKept) {
  setPreference("key", isKept ? key : "");
  if (key) sessionStorage.setItem(`${PREFERENCE}key`, key);
  else sessionStorage.removeItem(`${PREFERENCE}key`);
}

/** What was running when the page was left is not running any more. */
function settle(conversation) {
  conversation.settings = { ...DEFAULTS, ...conversation.settings };
  for (const turn of conversation.turns) {
    if (turn.answer.status === "running") turn.answer.status = "stopped";
  }
  return conversation;
}

function parse(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null; // not written by this page, or damaged: ignored
  }
}
