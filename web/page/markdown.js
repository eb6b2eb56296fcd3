// Markdown of the model -> elements. The text is untrusted: the elements contain no script, no style and no image.

import { DOMPurify, MarkdownIt, hljs } from "./vendor/markdown.js";
import { element, icon } from "./dom.js";
import { say } from "./words.js";

const LONGEST_HIGHLIGHTED = 20_000; // characters; longer code is not worth the time
const ALLOWED = {
  ALLOWED_TAGS: [
    "a", "blockquote", "br", "code", "del", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "li", "ol", "p", "pre",
    "s", "span", "strong", "table", "tbody", "td", "th", "thead", "tr", "ul",
  ],
  ALLOWED_ATTR: ["class", "href", "start"],
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
  RETURN_DOM_FRAGMENT: true,
};

const markdown = new MarkdownIt({ html: false, linkify: true, breaks: true, highlight });
// an image is fetched without a click, and its address can carry the conversation away: it becomes a link
markdown.renderer.rules.image = (tokens, index) => {
  const address = markdown.utils.escapeHtml(tokens[index].attrGet("src") ?? "");
  return `<a href="${address}">${markdown.utils.escapeHtml(tokens[index].content || address)}</a>`;
};

/** A fragment for the text of an answer. */
export function renderMarkdown(text) {
  const fragment = DOMPurify.sanitize(markdown.render(text), ALLOWED);
  for (const link of fragment.querySelectorAll("a")) {
    if (!link.hasAttribute("href")) continue;
    link.target = "_blank";
    link.rel = "noopener noreferrer nofollow";
    link.title = link.href; // shows the address, whatever the link's text says
  }
  for (const table of fragment.querySelectorAll("table")) {
    const frame = element("div", { class: "table", tabindex: "0" });
    table.replaceWith(frame);
    frame.append(table);
  }
  for (const block of fragment.querySelectorAll("pre")) frameCode(block);
  return fragment;
}

/** Copies text; also where the clipboard interface is missing, as it is on plain HTTP in a network. */
export async function copyText(text) {
  if (navigator.clipboard) {
    await navigator.clipboard.writeText(text);
    return;
  }
  const holder = element("textarea", { class: "off-screen", readonly: "" });
  holder.value = text;
  document.body.append(holder);
  holder.select();
  document.execCommand("copy");
  holder.remove();
}

/** A copy button, that says when it has. */
export function copyButton(text, attributes = {}) {
  const button = element("button", { type: "button", class: "quiet", ...attributes }, icon("copy"), say("copy"));
  button.addEventListener("click", async () => {
    await copyText(text());
    button.replaceChildren(icon("check"), say("copied"));
    setTimeout(() => button.replaceChildren(icon("copy"), say("copy")), 1500);
  });
  return button;
}

function highlight(code, name) {
  if (code.length > LONGEST_HIGHLIGHTED || !hljs.getLanguage(name)) return "";
  return hljs.highlight(code, { language: name, ignoreIllegals: true }).value;
}

function frameCode(block) {
  const code = block.querySelector("code");
  const name = /language-([\w+#-]+)/.exec(code?.className ?? "")?.[1] ?? say("code");
  const head = element("div", { class: "code-head" }, element("span", {}, name), copyButton(() => block.textContent));
  const frame = element("div", { class: "code" }, head);
  block.replaceWith(frame);
  block.tabIndex = 0; // long lines are scrolled by keyboard, too
  frame.append(block);
}
