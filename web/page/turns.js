// One question with its answer -> elements, updated while the answer streams.

import { element, fitHeight, icon } from "./dom.js";
import { copyButton, renderMarkdown } from "./markdown.js";
import { say, sayFailure } from "./words.js";

/** Shows a turn; `update` follows the answer while it is written. Actions: regenerate(), resend(question). */
export class TurnView {
  constructor(turn, actions) {
    this.turn = turn;
    this.actions = actions;
    this.text = null; // that is shown
    this.question = element("div", { class: "question" });
    this.prose = element("div", { class: "prose" });
    this.notes = element("div", { class: "notes" });
    this.article = element("article", { class: "answer", "aria-label": say("answer") }, this.prose, this.notes);
    this.element = element("li", { class: "turn" }, this.question, this.article);
    this.showQuestion();
    this.update(false);
  }

  showQuestion() {
    const edit = element("button", { type: "button", class: "icon edit", "aria-label": say("edit"), title: say("edit") });
    edit.append(icon("pencil"));
    edit.addEventListener("click", () => this.edit());
    this.question.replaceChildren(edit, element("div", { class: "bubble" }, this.turn.question));
  }

  /** Put the question into a field; Enter sends it again, Escape leaves it as it was. */
  edit() {
    const area = element("textarea", { "aria-label": say("edit"), rows: "1" });
    area.value = this.turn.question;
    const send = () => {
      const question = area.value.trim();
      if (question) this.actions.resend(question);
    };
    const cancel = () => {
      this.showQuestion();
      this.question.querySelector(".edit").focus();
    };
    area.addEventListener("input", () => fitHeight(area));
    area.addEventListener("keydown", (event) => {
      if (event.isComposing) return;
      if (event.key === "Enter" && !event.shiftKey) {
        event.preventDefault();
        send();
      } else if (event.key === "Escape") {
        event.stopPropagation();
        cancel();
      }
    });
    const buttons = element(
      "div",
      { class: "row" },
      element("button", { type: "button", class: "quiet", onclick: cancel }, say("cancel")),
      element("button", { type: "button", class: "primary", onclick: send }, say("sendEdited")),
    );
    this.question.replaceChildren(element("div", { class: "editor" }, area, buttons));
    fitHeight(area);
    area.focus();
  }

  /** isLast: only the last answer can be made again without losing others. */
  update(isLast) {
    const { answer } = this.turn;
    const isRunning = answer.status === "running";
    if (answer.text !== this.text) {
      this.text = answer.text;
      this.prose.replaceChildren(renderMarkdown(answer.text));
    }
    this.article.setAttribute("aria-busy", String(isRunning));
    this.article.classList.toggle("running", isRunning);
    if (isRunning) {
      this.notes.replaceChildren(answer.text ? stats(answer) : dots());
      return;
    }
    const again = element("button", { type: "button", class: "quiet regenerate", onclick: this.actions.regenerate });
    again.append(icon("redo"), say(answer.failure ? "retry" : "regenerate"));
    this.notes.replaceChildren(
      ...[
        answer.failure && failureOf(answer),
        answer.finish === "length" && element("p", { class: "remark" }, say("lengthReached", { n: answer.usage?.completion_tokens ?? "?" })),
        element(
          "div",
          { class: "row" },
          stats(answer),
          answer.text ? copyButton(() => answer.text, { class: "quiet copy-answer" }) : null,
          isLast ? again : null,
        ),
      ].filter(Boolean),
    );
  }
}

function failureOf({ failure }) {
  const told = element("div", { class: "failure", role: "alert" }, element("p", {}, sayFailure(failure)));
  if (failure.message && failure.kind !== "refused") told.append(element("small", {}, failure.message));
  return told;
}

function stats(answer) {
  const parts = [];
  if (answer.status === "stopped") parts.push(say("stopped"));
  if (answer.usage) {
    parts.push(say("tokens", { prompt: answer.usage.prompt_tokens, completion: answer.usage.completion_tokens }));
  }
  if (answer.speed) parts.push(say("speed", { speed: rounded(answer.speed) }));
  if (answer.firstSeconds !== null) parts.push(say("wait", { seconds: answer.firstSeconds.toFixed(2) }));
  return element("span", { class: "stats" }, parts.join(" · "));
}

function rounded(value) {
  return value < 10 ? value.toFixed(1) : String(Math.round(value));
}

function dots() {
  return element("span", { class: "dots", role: "status", "aria-label": say("thinking") }, element("i"), element("i"), element("i"));
}
