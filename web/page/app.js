// The chat page: shows the state of its modules, asks questions, handles clicks and keys.

import { writeAnswer } from "./answering.js";
import { Failure, listModels } from "./api.js";
import { connectComposer, focusComposer, showDraft } from "./composer.js";
import { byId, element, icon } from "./dom.js";
import { painter, toast } from "./painting.js";
import { connectSettings, showSettings } from "./settings.js";
import { connectSidebar, closeSidebar, drawList } from "./sidebar.js";
import {
  apiKey, deleteConversation, isLasting, loadConversations, onOtherTab, preference, saveConversation, setApiKey, setPreference,
} from "./store.js";
import { connectTransfer } from "./transfer.js";
import {
  newAnswer, newConversation, newQuestion, readConversation, removeNode, select, titleOf, turnsOf, versionsOf,
} from "./tree.js";
import { TurnView } from "./turns.js";
import { currentLanguage, preferredLanguage, say, sayFailure, setLanguage } from "./words.js";

const SAVE_EVERY_MS = 1000;
const NEAR_END_PX = 80;
const LONGEST_ANNOUNCED = 600; // characters

const state = {
  conversations: loadConversations(),
  current: newConversation(),
  views: [], // of the current conversation's shown turns
  models: [],
  running: new Map(), // conversation id -> { stopping: AbortController, answer }
  follows: true, // whether the page scrolls along with the answer
};

// ---- rendering

function show() {
  const { current, running } = state;
  const title = titleOf(current) || say("untitled");
  document.title = `${title} · ChatGLM2`;
  byId("title").textContent = title;
  byId("welcome").hidden = current.leaf !== null || running.has(current.id) || !byId("key-form").hidden;
  byId("system-note").hidden = !current.settings.system.trim();
  byId("system-note").textContent = `${say("system")}: ${current.settings.system}`;
  const isRunning = running.has(current.id);
  byId("send").hidden = isRunning;
  byId("stop").hidden = !isRunning;
  showModels();
  drawList(state);
}

function showModels() {
  const { models, current } = state;
  const chosen = models.includes(current.settings.model) ? current.settings.model : models[0];
  if (byId("model").options.length !== models.length) {
    byId("model").replaceChildren(...models.map((name) => element("option", { value: name }, name)));
  }
  if (chosen) byId("model").value = chosen;
}

/** Bring the list of turns up to date; only what has changed is made anew. */
function showTurns() {
  const { current } = state;
  const turns = turnsOf(current).map((turn) => ({
    ...turn, questions: versionsOf(current, turn.question), answers: versionsOf(current, turn.answer),
  }));
  const old = state.views;
  state.views = turns.map((turn, index) => {
    if (!old[index]?.shows(turn)) return new TurnView(turn, actionsOf(current, turn));
    old[index].turn = turn;
    return old[index];
  });
  const list = byId("turns");
  state.views.forEach((view, index) => {
    if (list.children[index] !== view.element) list.insertBefore(view.element, list.children[index] ?? null);
  });
  while (list.children.length > turns.length) list.lastChild.remove();
  const same = old.filter((view) => state.views.includes(view)).length;
  state.views.slice(Math.max(0, same - 1)).forEach((view) => updateView(view));
  show();
  keepEndInSight();
}

function updateView(view) {
  const isLast = view === state.views.at(-1);
  const waiting = state.running.get(state.current.id)?.answer;
  view.update(isLast, isLast && waiting !== undefined && waiting !== view.turn.answer && waiting.parent === view.turn.question.id);
}

function actionsOf(conversation, turn) {
  return {
    regenerate: () => answer(conversation, newAnswer(conversation, turn.question)),
    carryOn: () => answer(conversation, turn.answer),
    resend: (text) => {
      state.running.get(conversation.id)?.stopping.abort();
      ask(newQuestion(conversation, turn.question.parent, text, turn.question.files), conversation);
    },
    show: (node) => {
      select(conversation, node);
      keep(conversation);
      showTurns();
    },
  };
}

function keepEndInSight() {
  const scroll = byId("scroll");
  if (state.follows) scroll.scrollTop = scroll.scrollHeight;
  byId("down").hidden = state.follows;
}

const paintSoon = painter(() => {
  if (state.views.length) updateView(state.views.at(-1));
  keepEndInSight();
});

// ---- conversations

function open(conversation) {
  state.current = conversation;
  setPreference("current", conversation.id);
  closeSidebar();
  state.views = [];
  byId("turns").replaceChildren();
  state.follows = true;
  showDraft(conversation.draft);
  showTurns();
  focusComposer();
}

function startNew() {
  const { current } = state;
  open(current.leaf === null && !current.draft ? current : newConversation({ ...current.settings, system: "" }));
}

/** Store it; one without questions only while it has a draft or settings of its own. */
function keep(conversation) {
  if (!state.conversations.includes(conversation)) state.conversations.unshift(conversation);
  if (!saveConversation(conversation)) toast(say("storageFull"));
}

function remove(conversation) {
  state.running.get(conversation.id)?.stopping.abort();
  state.conversations = state.conversations.filter((other) => other !== conversation);
  deleteConversation(conversation.id);
  if (conversation === state.current) open(state.conversations.find((other) => other.leaf) ?? newConversation(conversation.settings));
  else show();
  toast(say("deleted", { title: titleOf(conversation) }), () => {
    byId("toast").hidden = true;
    keep(conversation);
    open(conversation);
  });
}

function rename(conversation, title) {
  conversation.title = title.trim();
  keep(conversation);
  show();
}

/** Conversations of a file; those that are here already stay. Returns how many are new. */
function bringIn(values) {
  const known = new Set(state.conversations.map((one) => one.id));
  const read = values.map(readConversation).filter((one) => one?.leaf && !known.has(one.id));
  read.forEach(keep);
  state.conversations.sort((one, other) => other.changed - one.changed);
  show();
  return read.length;
}

function reloadFromOtherTab() {
  if (state.running.size) return; // this tab's state is newer
  state.conversations = loadConversations();
  const same = state.conversations.find((other) => other.id === state.current.id);
  if (same) {
    state.current = same;
    state.views = [];
    byId("turns").replaceChildren();
    showTurns();
  } else show();
}

// ---- asking

function askNew(text, files) {
  const { current } = state;
  if (state.running.has(current.id)) return;
  setPreference("current", current.id);
  current.draft = "";
  state.follows = true;
  ask(newQuestion(current, current.leaf, text, files), current);
}

function ask(question, conversation) {
  const made = newAnswer(conversation, question);
  conversation.leaf = made.id;
  answer(conversation, made);
}

/** Write `made`. A new version of an answer is shown once it has text: until then the old one stays. */
async function answer(conversation, made) {
  const stopping = new AbortController();
  const run = { stopping, answer: made };
  state.running.get(conversation.id)?.stopping.abort();
  state.running.set(conversation.id, run);
  let savedAt = 0;
  const changed = () => {
    if (conversation.leaf !== made.id && (made.text || made.reasoning)) {
      conversation.leaf = made.id;
      if (conversation === state.current) showTurns();
    }
    if (Date.now() - savedAt > SAVE_EVERY_MS) {
      savedAt = Date.now();
      keep(conversation);
    }
    if (conversation === state.current) paintSoon();
  };
  if (conversation === state.current) showTurns();
  const { models } = state;
  if (!models.length) models.push(...(await knownModels()));
  await writeAnswer(conversation, made, { models, key: apiKey(), signal: stopping.signal, changed });
  if (state.running.get(conversation.id) === run) state.running.delete(conversation.id);
  if (conversation.leaf !== made.id) {
    removeNode(conversation, made); // it never had text, and the old version is still there
    if (made.failure) toast(sayFailure(made.failure));
  }
  if (state.conversations.includes(conversation) || made.status !== "stopped") keep(conversation);
  if (made.failure?.kind === "invalid_api_key") askForKey();
  if (conversation === state.current) {
    showTurns();
    byId("announcement").textContent = made.text.slice(0, LONGEST_ANNOUNCED);
  }
  show();
}

async function knownModels() {
  try {
    return await listModels(apiKey());
  } catch {
    return ["chatglm2-6b"]; // sending a question will show the error
  }
}

function stop() {
  state.running.get(state.current.id)?.stopping.abort();
}

// ---- the API key

function askForKey(error = "") {
  byId("key-form").hidden = false;
  byId("api-docs").hidden = true; // they need the key, which a link cannot send
  byId("key-error").hidden = !error;
  byId("key-error").textContent = error;
  show();
  byId("key").focus();
}

async function tryKey(key) {
  try {
    state.models = await listModels(key);
    byId("key-form").hidden = true;
    byId("api-docs").hidden = Boolean(key);
    show();
    return true;
  } catch (error) {
    if (!(error instanceof Failure)) throw error;
    if (error.kind === "invalid_api_key") askForKey(key ? say("errors").keyWrong : "");
    else toast(sayFailure(error));
    return false;
  }
}

// ---- language, theme

function translate() {
  document.documentElement.lang = currentLanguage() === "zh" ? "zh-CN" : "en";
  for (const node of document.querySelectorAll("[data-text]")) node.textContent = say(node.dataset.text);
  for (const node of document.querySelectorAll("[data-placeholder]")) node.placeholder = say(node.dataset.placeholder);
  for (const node of document.querySelectorAll("[data-label]")) {
    node.setAttribute("aria-label", say(node.dataset.label));
    if (node.tagName === "BUTTON") node.title = say(node.dataset.label);
  }
  byId("language").textContent = say("languageOther");
  byId("suggestions").replaceChildren(
    ...say("suggestions").map((words) => element("button", { type: "button", onclick: () => askNew(words, []) }, words)),
  );
  setTheme(preference("theme") || "auto");
  state.views = [];
  showTurns();
}

function setTheme(name) {
  setPreference("theme", name === "auto" ? "" : name);
  document.documentElement.dataset.theme = name;
  byId("theme").textContent = say(`theme_${name}`);
}

// ---- event handlers

function settingsChanged() {
  keep(state.current);
  show();
}

function connectPage() {
  for (const node of document.querySelectorAll("[data-icon]")) node.append(icon(node.dataset.icon));
  byId("stop").addEventListener("click", stop);
  byId("new").addEventListener("click", startNew);
  byId("down").addEventListener("click", () => {
    state.follows = true;
    keepEndInSight();
  });
  byId("scroll").addEventListener("scroll", (event) => {
    const { scrollHeight, scrollTop, clientHeight } = event.target;
    state.follows = scrollHeight - scrollTop - clientHeight < NEAR_END_PX;
    byId("down").hidden = state.follows;
  });
  byId("language").addEventListener("click", () => {
    setLanguage(currentLanguage() === "zh" ? "en" : "zh");
    setPreference("language", currentLanguage());
    translate();
  });
  byId("theme").addEventListener("click", () => {
    const names = ["auto", "light", "dark"];
    setTheme(names[(names.indexOf(document.documentElement.dataset.theme) + 1) % names.length]);
  });
  byId("key-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    const key = byId("key").value.trim();
    if (!key || !(await tryKey(key))) return;
    setApiKey(key, byId("key-keep").checked);
    byId("key").value = "";
    focusComposer();
  });
  byId("model").addEventListener("change", (event) => {
    state.current.settings.model = event.target.value;
    settingsChanged();
  });
  const openSettings = () => showSettings(state.current.settings, state.models);
  byId("open-settings").addEventListener("click", openSettings);
  byId("system-note").addEventListener("click", openSettings);
  document.addEventListener("keydown", (event) => {
    const isCommand = event.ctrlKey || event.metaKey;
    if (event.key === "Escape" && !byId("settings").open) {
      closeSidebar();
      stop();
    } else if (event.key.toLowerCase() === "o" && event.shiftKey && isCommand) {
      event.preventDefault();
      startNew();
    }
  });
  addEventListener("pagehide", () => {
    for (const conversation of state.conversations) if (state.running.has(conversation.id)) saveConversation(conversation);
  });
  onOtherTab(reloadFromOtherTab);
}

function connect() {
  connectPage();
  connectComposer({
    isBusy: () => state.running.has(state.current.id),
    ask: askNew,
    editLast: () => state.views.at(-1)?.edit(),
    drafted: (text) => {
      state.current.draft = text;
      setPreference("current", state.current.id);
      keep(state.current);
      drawList(state);
    },
  });
  connectSidebar({ open, remove, rename, redraw: () => drawList(state) });
  connectTransfer({ current: () => state.current, all: () => state.conversations, bringIn });
  connectSettings({
    changed: settingsChanged,
    forgetKey: () => {
      setApiKey("", false);
      location.reload();
    },
  });
}

setLanguage(preference("language") || preferredLanguage(navigator.languages));
state.current = state.conversations.find((one) => one.id === preference("current")) ?? state.current;
connect();
translate();
showDraft(state.current.draft);
focusComposer();
if (!isLasting) toast(say("storageBlocked"));
tryKey(apiKey());
