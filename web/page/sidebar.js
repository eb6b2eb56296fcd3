// The list of conversations.

import { byId, element, icon } from "./dom.js";
import { titleOf } from "./store.js";
import { say } from "./words.js";

export function drawList({ conversations, current, running, open, remove }) {
  byId("list").replaceChildren(...conversations.map((conversation) => {
    const title = titleOf(conversation);
    const isCurrent = conversation.id === current.id;
    const choose = element("button", { type: "button", class: "entry", title, onclick: () => open(conversation) }, title);
    if (isCurrent) choose.setAttribute("aria-current", "true");
    if (running.has(conversation.id)) choose.classList.add("busy");
    const words = say("remove", { title });
    const bin = element("button", { type: "button", class: "icon", "aria-label": words, title: words }, icon("trash"));
    bin.addEventListener("click", () => remove(conversation));
    return element("li", {}, choose, bin);
  }));
}
