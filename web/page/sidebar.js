// The list of conversations: search, dates, names; a drawer on narrow screens.

import { byId, element, icon } from "./dom.js";
import { contentOf, titleOf } from "./tree.js";
import { currentLanguage, say } from "./words.js";

const DAY_MS = 86_400_000;

let actions = null;
let renamed = null; // the conversation whose name is a field now

/** open(conversation), remove(conversation), rename(conversation, title), redraw(). */
export function connectSidebar(given) {
  actions = given;
  byId("menu").addEventListener("click", () => toggle(!document.body.classList.contains("sidebar-open")));
  byId("shade").addEventListener("click", closeSidebar);
  byId("search").addEventListener("input", actions.redraw);
  byId("search").addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    event.stopPropagation();
    byId("search").value = "";
    actions.redraw();
    byId("question").focus();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key.toLowerCase() !== "k" || !(event.ctrlKey || event.metaKey) || event.shiftKey) return;
    event.preventDefault();
    toggle(true);
    byId("search").select();
  });
}

export function closeSidebar() {
  toggle(false);
}

export function drawList({ conversations, current, running }) {
  const words = byId("search").value.trim().toLowerCase();
  const listed = conversations.filter((one) => one.leaf && (!words || holds(one, words)));
  const parts = [];
  let last = "";
  for (const conversation of listed) {
    const day = dayOf(conversation.changed);
    if (day !== last) parts.push(element("li", { class: "day" }, day));
    last = day;
    parts.push(entry(conversation, conversation.id === current.id, running.has(conversation.id)));
  }
  if (words && !listed.length) parts.push(element("li", { class: "day" }, say("nothingFound")));
  byId("list").replaceChildren(...parts);
  byId("list").querySelector("input")?.focus();
}

function toggle(isOpen) {
  document.body.classList.toggle("sidebar-open", isOpen);
  byId("shade").hidden = !isOpen;
  byId("menu").setAttribute("aria-expanded", String(isOpen));
}

function holds(conversation, words) {
  const text = (node) => (node.role === "user" ? contentOf(node) : node.text);
  return titleOf(conversation).toLowerCase().includes(words) || conversation.nodes.some((node) => text(node).toLowerCase().includes(words));
}

function dayOf(time) {
  const midnight = new Date().setHours(0, 0, 0, 0);
  if (time >= midnight) return say("today");
  if (time >= midnight - DAY_MS) return say("yesterday");
  if (time >= midnight - 6 * DAY_MS) return say("thisWeek");
  return new Intl.DateTimeFormat(currentLanguage(), { year: "numeric", month: "long" }).format(time);
}

function entry(conversation, isCurrent, isBusy) {
  const title = titleOf(conversation);
  if (conversation === renamed) return element("li", {}, nameField(conversation, title));
  const when = new Intl.DateTimeFormat(currentLanguage(), { dateStyle: "medium", timeStyle: "short" }).format(conversation.changed);
  const choose = element("button", { type: "button", class: "entry", title: `${title}\n${when}` }, title);
  choose.addEventListener("click", () => actions.open(conversation));
  if (isCurrent) choose.setAttribute("aria-current", "true");
  if (isBusy) choose.classList.add("busy");
  const button = (name, kind, words, action) => {
    const made = element("button", { type: "button", class: `icon ${kind}`, "aria-label": words, title: words }, icon(name));
    made.addEventListener("click", action);
    return made;
  };
  return element(
    "li",
    {},
    choose,
    button("pencil", "rename", say("rename", { title }), () => startRenaming(conversation)),
    button("trash", "remove", say("remove", { title }), () => actions.remove(conversation)),
  );
}

function startRenaming(conversation) {
  renamed = conversation;
  actions.redraw();
}

function nameField(conversation, title) {
  const field = element("input", { "aria-label": say("rename", { title }), maxlength: "200" });
  field.value = title;
  const end = (isKept) => {
    if (renamed !== conversation) return;
    renamed = null;
    if (isKept) actions.rename(conversation, field.value);
    else actions.redraw();
  };
  field.addEventListener("blur", () => end(true));
  field.addEventListener("keydown", (event) => {
    event.stopPropagation();
    if (event.key === "Enter" && !event.isComposing) end(true);
    if (event.key === "Escape") end(false);
  });
  return field;
}
