// A conversation as a tree: every question has its answers as children, every answer the questions that followed it.
//
// A conversation is { id, changed, title, draft, settings, nodes, leaf }; the path from `leaf` up to the root is what is
// shown and sent. Regenerating adds an answer, editing adds a question beside the old one: nothing is overwritten.
// A question is { id, parent, role: "user", text, files: [{ name, text }] }; for answers see `newAnswer`.

/** The documented defaults of the API; they are not sent, since the server has the same. null: not set. */
export const DEFAULTS = Object.freeze({
  model: "", system: "", temperature: 0.95, top_p: 0.7, max_tokens: 2048,
  seed: null, top_k: null, min_p: null, presence_penalty: null, frequency_penalty: null,
});

export function newConversation(settings = DEFAULTS) {
  return { id: newId(), changed: Date.now(), title: "", draft: "", settings: { ...DEFAULTS, ...settings }, nodes: [], leaf: null };
}

/** status: running, done, stopped or failed. Added to the conversation, but not shown before `select`. */
export function newAnswer(conversation, question) {
  const answer = {
    id: newId(), parent: question.id, role: "assistant", text: "", reasoning: "", status: "running", failure: null,
    finish: null, usage: null, firstSeconds: null, speed: null,
  };
  conversation.nodes.push(answer);
  return answer;
}

/** A question below `parent` (an answer's id, or null at the beginning). */
export function newQuestion(conversation, parent, text, files = []) {
  const question = { id: newId(), parent, role: "user", text, files };
  conversation.nodes.push(question);
  return question;
}

export function removeNode(conversation, node) {
  conversation.nodes = conversation.nodes.filter((other) => other !== node);
}

/** The shown turns from the first to the last: [{ question, answer }]. */
export function turnsOf(conversation) {
  return turnsTo(conversation, conversation.leaf);
}

/** The turns that lead to an answer, that one included. */
export function turnsTo(conversation, leaf) {
  const known = new Map(conversation.nodes.map((node) => [node.id, node]));
  const turns = [];
  for (let answer = known.get(leaf); answer;) {
    const question = known.get(answer.parent);
    turns.push({ question, answer });
    answer = known.get(question.parent);
  }
  return turns.reverse();
}

/** A node and those beside it, in the order in which they were made. */
export function versionsOf(conversation, node) {
  return conversation.nodes.filter((other) => other.parent === node.parent && other.role === node.role);
}

/** Show this node and what followed it last. */
export function select(conversation, node) {
  let shown = node;
  for (;;) {
    const next = conversation.nodes.filter((other) => other.parent === shown.id).at(-1);
    if (!next) break;
    shown = next;
  }
  conversation.leaf = shown.id;
}

export function titleOf(conversation) {
  if (conversation.title) return conversation.title;
  const first = turnsOf(conversation)[0]?.question;
  return first ? (first.text || first.files[0]?.name || "").trim().replace(/\s+/g, " ").slice(0, 60) : "";
}

/** The text of a question as it is sent: the files first, each in a fence that its text does not contain. */
export function contentOf(question) {
  const parts = question.files.map(({ name, text }) => {
    const longest = Math.max(2, ...(text.match(/`+/g) ?? []).map((ticks) => ticks.length));
    const fence = "`".repeat(longest + 1);
    return `${name}\n${fence}\n${text.replace(/\n$/, "")}\n${fence}`;
  });
  return [...parts, question.text].filter(Boolean).join("\n\n");
}

/** The shown turns as Markdown. */
export function markdownOf(conversation, names) {
  const parts = [`# ${titleOf(conversation)}`];
  for (const { question, answer } of turnsOf(conversation)) {
    parts.push(`**${names.question}**\n\n${contentOf(question)}`, `**${names.answer}**\n\n${answer.text}`);
  }
  return `${parts.join("\n\n")}\n`;
}

/** A stored or imported value -> a conversation; null if it is none. */
export function readConversation(value) {
  if (!value || typeof value.id !== "string") return null;
  const conversation = { ...newConversation(value.settings), ...value, settings: { ...DEFAULTS, ...value.settings } };
  if (Array.isArray(value.turns)) {
    // as the page of October 2026 stored it: a list of turns, without versions
    delete conversation.turns;
    for (const { question, answer } of value.turns) {
      const asked = newQuestion(conversation, conversation.leaf, question);
      conversation.leaf = Object.assign(newAnswer(conversation, asked), answer).id;
    }
  }
  if (!Array.isArray(conversation.nodes)) return null;
  for (const node of conversation.nodes) {
    if (node.status === "running") node.status = "stopped"; // what was running when the page was left is not any more
  }
  return conversation;
}

function newId() {
  return `${Date.now().toString(36)}-${Math.random().toString(36).slice(2, 8)}`;
}
