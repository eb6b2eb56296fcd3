// One question with its answer -> elements, updated while the answer streams.

import { element, fitHeight, icon, isOnPhone } from "./dom.js";
import { copyButton, renderMarkdown } from "./markdown.js";
import { say, sayFailure } from "./words.js";

// text far from the window is plain until it comes near: three hundred answers open at once
const nearby = new IntersectionObserver(
  (entries) => entries.filter((entry) => entry.isIntersecting).forEach((entry) => entry.target.turnView.drawProse()),
  { rootMargin: "1500px 0px" },
);

/** Shows a turn { question, answer, questions, answers }: the last two are the versions of each.
 *
 * Actions: regenerate(), resend(text), carryOn(), show(node). `update` follows the answer while it is written. */
export class TurnView {
  constructor(turn, actions) {
    this.turn = turn;
    this.actions = actions;
    this.text = null; // that is drawn
    this.question = element("div", { class: "question" });
    this.thoughts = element("details", { class: "thoughts", hidden: "" });
    this.prose = element("div", { class: "prose" });
    this.notes = element("div", { class: "notes" });
    this.article = element("article", { class: "answer", "aria-label": say("answer") }, this.thoughts, this.prose, this.notes);
    this.element = element("li", { class: "turn" }, this.question, this.article);
    this.element.turnView = this;
    this.prose.textContent = turn.answer.text;
    nearby.observe(this.element);
    this.showQuestion();
  }

  /** Whether this view shows these nodes. */
  shows(turn) {
    return this.turn.question === turn.question && this.turn.answer === turn.answer;
  }

  showQuestion() {
    const { question, questions } = this.turn;
    const edit = element("button", { type: "button", class: "icon edit", "aria-label": say("edit"), title: say("edit") }, icon("pencil"));
    edit.addEventListener("click", () => this.edit());
    const files = question.files.map(({ name, text }) => element("span", { class: "file", title: text.slice(0, 300) }, icon("file"), name));
    const bubble = element("div", { class: "bubble" }, ...files, question.text);
    this.question.replaceChildren(...[this.versions(questions, question), edit, bubble].filter(Boolean));
  }

  /** Put the question into a field; Enter sends it again, Escape leaves it as it was. */
  edit() {
    const area = element("textarea", { "aria-label": say("edit"), rows: "1" });
    area.value = this.turn.question.text;
    const send = () => {
      const text = area.value.trim();
      if (text || this.turn.question.files.length) this.actions.resend(text);
    };
    const cancel = () => {
      this.showQuestion();
      this.question.querySelector(".edit").focus();
    };
    area.addEventListener("input", () => fitHeight(area));
    area.addEventListener("keydown", (event) => {
      if (event.isComposing) return;
      if (event.key === "Enter" && !event.shiftKey && !isOnPhone()) {
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

  /** `‹ 2/3 ›`, or null if there is one version. */
  versions(nodes, shown) {
    if (nodes.length < 2) return null;
    const index = nodes.indexOf(shown);
    const step = (to, label, name) => {
      const button = element("button", { type: "button", class: "icon small", "aria-label": label, title: label }, icon(name));
      button.disabled = !nodes[to];
      button.addEventListener("click", () => this.actions.show(nodes[to]));
      return button;
    };
    return element(
      "span",
      { class: "versions" },
      step(index - 1, say("previousVersion"), "left"),
      `${index + 1}/${nodes.length}`,
      step(index + 1, say("nextVersion"), "right"),
    );
  }

  /** The answer's Markdown, and what a model thought before it. */
  drawProse() {
    const { answer } = this.turn;
    const whole = answer.reasoning + answer.text;
    if (whole === this.text) return;
    this.text = whole;
    const { thoughts, words } = divided(answer);
    this.prose.replaceChildren(renderMarkdown(words));
    this.thoughts.hidden = !thoughts;
    if (thoughts) {
      const body = element("div", { class: "prose" }, renderMarkdown(thoughts));
      this.thoughts.replaceChildren(element("summary", {}, say("thoughts")), body);
    }
  }

  /** isLast: the last answer can be continued or made again; isWaiting: a new version of it is on its way. */
  update(isLast, isWaiting = false) {
    const { answer, answers } = this.turn;
    const isRunning = answer.status === "running" || isWaiting;
    if (isLast || this.text !== null) this.drawProse();
    this.article.setAttribute("aria-busy", String(isRunning));
    this.article.classList.toggle("running", isRunning);
    if (isRunning) {
      this.notes.replaceChildren(this.text && !isWaiting ? stats(answer) : dots());
      return;
    }
    const button = (name, words, kind, action) =>
      element("button", { type: "button", class: `quiet ${kind}`, onclick: action }, icon(name), words);
    const isCut = answer.text && (answer.finish === "length" || ["stopped", "failed"].includes(answer.status));
    this.notes.replaceChildren(
      ...[
        answer.failure && failureOf(answer),
        answer.finish === "length" && element("p", { class: "remark" }, say("lengthReached", { n: answer.usage?.completion_tokens ?? "?" })),
        element(
          "div",
          { class: "row" },
          this.versions(answers, answer),
          stats(answer),
          answer.text ? copyButton(() => answer.text, { class: "quiet copy-answer" }) : null,
          isLast && isCut ? button("play", say("carryOn"), "carry-on", this.actions.carryOn) : null,
          isLast ? button("redo", say(answer.failure ? "retry" : "regenerate"), "regenerate", this.actions.regenerate) : null,
        ),
      ].filter(Boolean),
    );
  }
}

/** What a model thought, in a field of its own or between <think> marks, and its answer. */
function divided({ text, reasoning }) {
  const found = /^\s*<think>([\s\S]*?)(?:<\/think>|$)/.exec(text);
  if (reasoning || !found) return { thoughts: reasoning, words: text };
  return { thoughts: found[1].trim(), words: text.slice(found[0].length) };
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
