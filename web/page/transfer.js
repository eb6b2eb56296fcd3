// Conversations -> files and back: one as Markdown, all as JSON.

import { byId, element } from "./dom.js";
import { copyText } from "./markdown.js";
import { toast } from "./painting.js";
import { markdownOf, titleOf } from "./tree.js";
import { say } from "./words.js";

const FORMAT = "chatglm-conversations";

/** current(), all(), bringIn(values). */
export function connectTransfer({ current, all, bringIn }) {
  const on = (id, action) => byId(id).addEventListener("click", () => {
    byId("more-menu").hidePopover();
    action();
  });
  on("copy-markdown", async () => {
    const text = markdownOf(current(), { question: say("question"), answer: say("answer") });
    toast(say((await copyText(text)) ? "copied" : "copyRefused"));
  });
  on("save-markdown", () => {
    const text = markdownOf(current(), { question: say("question"), answer: say("answer") });
    save(`${titleOf(current()).replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40) || "chat"}.md`, text, "text/markdown");
  });
  on("export", () => {
    const kept = all().filter((one) => one.leaf);
    save("conversations.json", JSON.stringify({ format: FORMAT, version: 1, conversations: kept }, null, 1), "application/json");
  });
  on("import", () => byId("import-file").click());
  byId("import-file").addEventListener("change", async (event) => {
    const [file] = event.target.files;
    const found = file ? parse(await file.text()) : null;
    event.target.value = "";
    if (file) toast(found ? say("imported", { n: bringIn(found) }) : say("importRefused", { name: file.name }));
  });
}

function parse(text) {
  try {
    const value = JSON.parse(text);
    return value.format === FORMAT && Array.isArray(value.conversations) ? value.conversations : null;
  } catch {
    return null;
  }
}

function save(name, text, type) {
  const address = URL.createObjectURL(new Blob([text], { type: `${type};charset=utf-8` }));
  element("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}
