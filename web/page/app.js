// The chat page: shows the state of its modules and handles clicks and keys.

import { answerLast } from "./answering.js";
import { Failure, listModels } from "./api.js";
import { byId, element, fitHeight, icon } from "./dom.js";
import { connectSettings, showSettings } from "./settings.js";
import { drawList } from "./sidebar.js";
import {
  apiKey, deleteConversation, loadConversations, newAnswer, newConversation, onOtherTab, preference, saveConversation,
  setApiKey, setPreference, titleOf,
} from "./store.js";
import { TurnView } from "./turns.js";
import { currentLanguage, preferredLanguage, say, sayFailure, setLanguage } from "./words.js";

const SAVE_EVERY_MS = 1000;
const NEAR_END_PX = 80;

const state = {
  conversations: loadConversations(),
  current: newConversation(),
  views: [], // of the current conversation's turns
  models: [],
  running: new Map(), // conversation id -> AbortController
  follows: true, // whether the page scrolls along with the answer
};

// ---- rendering

function show() {
  const { current, running } = state;
  const title = titleOf(current) || say("untitled");
  document.title = `${title} · ChatGLM2`;
  byId("title").textContent = title;
  byId("model").textContent = current.settings.model || state.models[0] || "";
  byId("welcome").hidden = current.turns.length > 0 || !byId("key-form").hidden;
  const isRunning = running.has(current.id);
  byId("send").hidden = isRunning;
  byId("stop").hidden = !isRunning;
  drawList({ ...state, open, remove });
}

function showTurns() {
  state.views = state.current.turns.map((turn, index) => viewOf(state.current, turn, index));
  byId("turns").replaceChildren(...state.views.map((view) => view.element));
  updateViews();
  show();
  state.follows = true;
  keepEndInSight();
}

function viewOf(conversation, turn, index) {
  return new TurnView(turn, {
    regenerate: () => answer(conversation),
    resend: (question) => resend(conversation, index, question),
  });
}

function updateViews() {
  state.views.forEach((view, index) => view.update(index === state.views.length - 1));
}

function keepEndInSight() {
  const scroll = byId("scroll");
  if (state.follows) scroll.scrollTop = scroll.scrollHeight;
  byId("down").hidden = state.follows;
}

/** Paints at most once a frame, and less often when painting is slow: long answers must not stall the page. */
function painter() {
  let isAsked = false;
  let notBefore = 0;
  const paint = () => {
    const begun = performance.now();
    if (begun < notBefore) {
      requestAnimationFrame(paint);
      return;
    }
    isAsked = false;
    state.views.at(-1)?.update(true);
    keepEndInSight();
    notBefore = performance.now() + 3 * (performance.now() - begun);
  };
  return () => {
    if (isAsked) return;
    isAsked = true;
    requestAnimationFrame(paint);
  };
}

const paintSoon = painter();

function toast(words, action = null) {
  const box = byId("toast");
  box.replaceChildren(words, ...(action ? [element("button", { type: "button", class: "quiet", onclick: action }, say("undo"))] : []));
  box.hidden = false;
  clearTimeout(toast.timer);
  toast.timer = setTimeout(() => (box.hidden = true), 6000);
}

// ---- conversations

function open(conversation) {
  state.current = conversation;
  setPreference("current", conversation.id);
  closeSidebar();
  showTurns();
  byId("question").focus();
}

function startNew() {
  const { current } = state;
  open(current.turns.length ? newConversation(current.settings) : current);
}

function keep(conversation) {
  if (!state.conversations.includes(conversation)) state.conversations.unshift(conversation);
  if (!saveConversation(conversation)) toast(say("storageFull"));
}

function remove(conversation) {
  state.running.get(conversation.id)?.abort();
  state.conversations = state.conversations.filter((other) => other !== conversation);
  deleteConversation(conversation.id);
  if (conversation === state.current) open(state.conversations[0] ?? newConversation(conversation.settings));
  else show();
  toast(say("deleted", { title: titleOf(conversation) }), () => {
    byId("toast").hidden = true;
    keep(conversation);
    open(conversation);
  });
}

function reloadFromOtherTab() {
  if (state.running.size) return; // this tab's state is newer
  state.conversations = loadConversations();
  const same = state.conversations.find((other) => other.id === state.current.id);
  if (same) {
    state.current = same;
    showTurns();
  } else show();
}

// ---- asking

function ask(question) {
  const conversation = state.current;
  if (state.running.has(conversation.id)) return;
  setPreference("current", conversation.id);
  conversation.turns.push({ question, answer: newAnswer() });
  answer(conversation);
}

function resend(conversation, index, question) {
  state.running.get(conversation.id)?.abort();
  conversation.turns.splice(index);
  conversation.turns.push({ question, answer: newAnswer() });
  answer(conversation);
}

async function answer(conversation) {
  const stopping = new AbortController();
  state.running.get(conversation.id)?.abort();
  state.running.set(conversation.id, stopping);
  let isShown = false;
  let savedAt = 0;
  const changed = () => {
    if (Date.now() - savedAt > SAVE_EVERY_MS) {
      savedAt = Date.now();
      keep(conversation);
    }
    if (conversation !== state.current) return;
    if (!isShown) showTurns();
    isShown = true;
    paintSoon();
  };
  const { models } = state;
  if (!models.length) models.push(...(await knownModels()));
  const made = await answerLast(conversation, { models, key: apiKey(), signal: stopping.signal, changed });
  if (state.running.get(conversation.id) === stopping) state.running.delete(conversation.id);
  if (state.conversations.includes(conversation) || made.status !== "stopped") keep(conversation);
  if (made.failure?.kind === "invalid_api_key") askForKey();
  if (conversation === state.current) {
    updateViews();
    keepEndInSight();
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
  state.running.get(state.current.id)?.abort();
}

// ---- the API key

function askForKey(error = "") {
  byId("key-form").hidden = false;
  byId("key-error").hidden = !error;
  byId("key-error").textContent = error;
  show();
  byId("key").focus();
}

async function tryKey(key) {
  try {
    state.models = await listModels(key);
    byId("key-form").hidden = true;
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
    ...say("suggestions").map((words) => element("button", { type: "button", onclick: () => ask(words) }, words)),
  );
  setTheme(preference("theme") || "auto");
  showTurns();
}

function setTheme(name) {
  setPreference("theme", name === "auto" ? "" : name);
  document.documentElement.dataset.theme = name;
  byId("theme").textContent = say(`theme_${name}`);
}

// ---- the sidebar on narrow screens

function toggleSidebar(isOpen) {
  document.body.classList.toggle("sidebar-open", isOpen);
  byId("shade").hidden = !isOpen;
  byId("menu").setAttribute("aria-expanded", String(isOpen));
}

function closeSidebar() {
  toggleSidebar(false);
}

// ---- event handlers

function connect() {
  const question = byId("question");
  for (const node of document.querySelectorAll("[data-icon]")) node.append(icon(node.dataset.icon));
  byId("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    const words = question.value.trim();
    if (!words || state.running.has(state.current.id)) return;
    question.value = "";
    fitHeight(question);
    ask(words);
  });
  question.addEventListener("input", () => fitHeight(question));
  question.addEventListener("keydown", (event) => {
    if (event.isComposing || event.keyCode === 229) return; // Enter confirms the input method's text
    if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      byId("ask").requestSubmit();
    } else if (event.key === "ArrowUp" && !question.value && state.views.length) {
      event.preventDefault();
      state.views.at(-1).edit();
    }
  });
  byId("stop").addEventListener("click", stop);
  byId("new").addEventListener("click", startNew);
  byId("menu").addEventListener("click", () => toggleSidebar(!document.body.classList.contains("sidebar-open")));
  byId("shade").addEventListener("click", closeSidebar);
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
    question.focus();
  });
  byId("open-settings").addEventListener("click", () => showSettings(state.current.settings, state.models));
  connectSettings({
    changed: () => {
      if (state.current.turns.length) keep(state.current);
      show();
    },
    forgetKey: () => {
      setApiKey("", false);
      location.reload();
    },
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !byId("settings").open) {
      closeSidebar();
      stop();
    } else if (event.key.toLowerCase() === "o" && event.shiftKey && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      startNew();
    }
  });
  addEventListener("pagehide", () => {
    for (const conversation of state.conversations) if (state.running.has(conversation.id)) saveConversation(conversation);
  });
  onOtherTab(reloadFromOtherTab);
}

setLanguage(preference("language") || preferredLanguage(navigator.languages));
state.current = state.conversations.find((one) => one.id === preference("current")) ?? state.current;
connect();
translate();
byId("question").focus();
tryKey(apiKey());
