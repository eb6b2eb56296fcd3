// Conversations and preferences in the browser's storage: one entry each, so that two tabs do not overwrite each other.

import { readConversation } from "./tree.js";

const CONVERSATION = "chatglm.conversation.";
const PREFERENCE = "chatglm.";

const local = storage("localStorage");
const session = storage("sessionStorage");

/** False where the browser's settings forbid storage: everything then lasts until the page is closed. */
export const isLasting = local.isLasting;

/** All that are kept, the newest first. */
export function loadConversations() {
  const found = [];
  for (const name of local.names()) {
    if (!name.startsWith(CONVERSATION)) continue;
    const conversation = readConversation(parse(local.get(name)));
    if (conversation) found.push(conversation);
  }
  return found.sort((one, other) => other.changed - one.changed);
}

/** False if the browser's storage is full. */
export function saveConversation(conversation) {
  return local.set(CONVERSATION + conversation.id, JSON.stringify(conversation));
}

export function deleteConversation(id) {
  local.remove(CONVERSATION + id);
}

/** Calls `changed` when another tab has saved or deleted a conversation. */
export function onOtherTab(changed) {
  addEventListener("storage", (event) => {
    if (event.key === null || event.key.startsWith(CONVERSATION)) changed();
  });
}

export function preference(name) {
  return local.get(PREFERENCE + name) ?? "";
}

export function setPreference(name, value) {
  if (value) local.set(PREFERENCE + name, value);
  else local.remove(PREFERENCE + name);
}

/** The API key: for this tab, unless it was to be kept. */
export function apiKey() {
  return session.get(`${PREFERENCE}key`) ?? preference("key");
}

export function setApiKey(key, isKept) {
  setPreference("key", isKept ? key : "");
  if (key) session.set(`${PREFERENCE}key`, key);
  else session.remove(`${PREFERENCE}key`);
}

/** One of the browser's storages, or a Map where it may not be used. */
function storage(kind) {
  let kept = null;
  try {
    kept = window[kind];
    kept.getItem(PREFERENCE);
  } catch {
    const map = new Map();
    return {
      isLasting: false,
      names: () => [...map.keys()],
      get: (name) => map.get(name) ?? null,
      set: (name, value) => Boolean(map.set(name, value)),
      remove: (name) => map.delete(name),
    };
  }
  return {
    isLasting: true,
    names: () => Object.keys(kept),
    get: (name) => kept.getItem(name),
    set: (name, value) => {
      try {
        kept.setItem(name, value);
        return true;
      } catch {
        return false;
      }
    },
    remove: (name) => kept.removeItem(name),
  };
}

function parse(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null; // not written by this page, or damaged: ignored
  }
}
