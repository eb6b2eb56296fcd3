// The question field: typing, files, the draft of each conversation.

import { byId, element, fitHeight, icon, isOnPhone } from "./dom.js";
import { toast } from "./painting.js";
import { say } from "./words.js";

const SAVE_DRAFT_MS = 400;
const LARGEST_FILE = 1_000_000; // bytes

let files = []; // [{ name, text }] that go along with the question
let timer = 0;

/** Actions: ask(text, files), editLast(), drafted(text), isBusy(). */
export function connectComposer(actions) {
  const question = byId("question");
  byId("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    const words = question.value.trim();
    if ((!words && !files.length) || actions.isBusy()) return;
    const sent = files;
    clearTimeout(timer);
    showDraft("");
    actions.ask(words, sent);
  });
  question.addEventListener("input", () => {
    fitHeight(question);
    clearTimeout(timer);
    timer = setTimeout(() => actions.drafted(question.value), SAVE_DRAFT_MS);
  });
  addEventListener("pagehide", () => {
    if (timer && question.value) actions.drafted(question.value);
  });
  question.addEventListener("keydown", (event) => {
    if (event.isComposing || event.keyCode === 229) return; // Enter confirms the input method's text
    if (event.key === "Enter" && !event.shiftKey && !isOnPhone()) {
      event.preventDefault();
      byId("ask").requestSubmit();
    } else if (event.key === "ArrowUp" && !question.value) {
      event.preventDefault();
      actions.editLast();
    }
  });
  byId("attach").addEventListener("click", () => byId("files").click());
  byId("files").addEventListener("change", async (event) => {
    await addFiles(event.target.files);
    event.target.value = "";
  });
  byId("ask").addEventListener("dragover", (event) => event.preventDefault());
  byId("ask").addEventListener("drop", (event) => {
    event.preventDefault();
    addFiles(event.dataTransfer.files);
  });
}

/** Show another conversation's draft. */
export function showDraft(text) {
  clearTimeout(timer);
  timer = 0;
  files = [];
  showFiles();
  byId("question").value = text;
  byId("hint").textContent = say(isOnPhone() ? "hintPhone" : "hint");
  fitHeight(byId("question"));
}

export function focusComposer() {
  if (!isOnPhone()) byId("question").focus(); // there, it would open the keyboard
}

async function addFiles(chosen) {
  for (const file of chosen) {
    const text = file.size <= LARGEST_FILE ? await file.text() : null;
    if (text === null) toast(say("fileTooLarge", { name: file.name }));
    else if (text.includes("\u0000") || text.includes("\ufffd")) toast(say("fileNotText", { name: file.name }));
    else files.push({ name: file.name, text });
  }
  showFiles();
  focusComposer();
}

function showFiles() {
  byId("attached").replaceChildren(...files.map((file) => {
    const words = say("removeFile", { name: file.name });
    const button = element("button", { type: "button", class: "icon small", "aria-label": words, title: words }, icon("close"));
    button.addEventListener("click", () => {
      files = files.filter((other) => other !== file);
      showFiles();
    });
    return element("li", { class: "file" }, icon("file"), file.name, button);
  }));
}
