// Markdown of the model -> elements. The text is untrusted: the elements contain no script, no style and no image.

import { DOMPurify, MarkdownIt, hljs } from "./vendor/markdown.js";
import { element, icon } from "./dom.js";
import { MATH_ATTRIBUTES, MATH_TAGS, mathematics } from "./math.js";
import { say } from "./words.js";

const LONGEST_HIGHLIGHTED = 20_000; // characters; longer code is not worth the time
const ALLOWED = {
  ALLOWED_TAGS: [
    "a", "blockquote", "br", "code", "del", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "li", "ol", "p", "pre",
    "s", "span", "strong", "table", "tbody", "td", "th", "thead", "tr", "ul", ...MATH_TAGS,
  ],
  ALLOWED_ATTR: ["class", "href", "start", ...MATH_ATTRIBUTES],
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
  RETURN_DOM_FRAGMENT: true,
};

const markdown = new MarkdownIt({ html: false, linkify: true, breaks: true, highlight });
markdown.use(mathematics);
// alignment as a class: the page's policy forbids style attributes
for (const rule of ["th_open", "td_open"]) {
  markdown.renderer.rules[rule] = (tokens, index) => {
    const aligned = /text-align:(\w+)/.exec(tokens[index].attrGet("style") ?? "");
    return `<${tokens[index].tag}${aligned ? ` class="${aligned[1]}"` : ""}>`;
  };
}
markdown.core.ruler.after("inline", "tasks", taskLists);
// an image is fetched without a click, and its address can carry the conversation away: it becomes a link
markdown.renderer.rules.image = (tokens, index) => {
  const address = markdown.utils.escapeHtml(tokens[index].attrGet("src") ?? "");
  return `<a href="${address}">${markdown.utils.escapeHtml(tokens[index].content || address)}</a>`;
};

/** `- [x] done` -> a box before the words. */
function taskLists(state) {
  state.tokens.forEach((token, index) => {
    const first = token.children?.[0];
    if (state.tokens[index - 2]?.type !== "list_item_open" || first?.type !== "text") return;
    first.content = first.content.replace(/^\[([ xX])\] /, (_, mark) => (mark === " " ? "☐ " : "☑ "));
  });
}

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

/** Copies text; also where the clipboard interface is missing, as it is on plain HTTP in a network, or refuses.
 * False if nothing was copied. */
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return copySelected(text);
  }
}

function copySelected(text) {
  const holder = element("textarea", { class: "off-screen", readonly: "" });
  holder.value = text;
  document.body.append(holder);
  holder.select();
  const isCopied = document.execCommand("copy");
  holder.remove();
  return isCopied;
}

/** A copy button, that says when it has. */
export function copyButton(text, attributes = {}) {
  const button = element("button", { type: "button", class: "quiet", ...attributes }, icon("copy"), say("copy"));
  button.addEventListener("click", async () => {
    const isCopied = await copyText(text());
    button.replaceChildren(icon(isCopied ? "check" : "close"), say(isCopied ? "copied" : "copyRefused"));
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
