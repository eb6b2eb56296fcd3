// The dialog with a conversation's settings.

import { byId, element } from "./dom.js";
import { apiKey } from "./store.js";
import { DEFAULTS } from "./tree.js";
import { say } from "./words.js";

const OPTIONAL = ["seed", "top_k", "min_p", "presence_penalty", "frequency_penalty"]; // empty: not sent
const NUMBERS = ["temperature", "top_p", "max_tokens", ...OPTIONAL];
const INPUTS = ["model", "system", ...NUMBERS];

let edited = null; // the settings that the dialog shows

/** Every valid change is applied at once; `changed` tells of it. */
export function connectSettings({ changed, forgetKey }) {
  for (const name of INPUTS) {
    const input = byId(`set-${name}`);
    input.addEventListener("input", () => {
      if (!check(name)) return;
      edited[name] = !NUMBERS.includes(name) ? input.value : input.value === "" ? null : Number(input.value);
      showValues();
      changed();
    });
  }
  byId("defaults").addEventListener("click", () => {
    Object.assign(edited, DEFAULTS);
    fill();
    changed();
  });
  byId("forget-key").addEventListener("click", forgetKey);
  byId("settings").addEventListener("click", (event) => {
    if (event.target === event.currentTarget) event.currentTarget.close(); // a click outside of the dialog
  });
}

export function showSettings(settings, models) {
  edited = settings;
  byId("set-model").replaceChildren(...models.map((name) => element("option", { value: name }, name)));
  byId("forget-key").hidden = !apiKey();
  fill();
  byId("settings").showModal();
}

function fill() {
  for (const name of INPUTS) byId(`set-${name}`).value = edited[name] ?? "";
  if (!edited.model) byId("set-model").selectedIndex = 0;
  INPUTS.forEach(check);
  showValues();
}

/** Whether the field's value can be used; if not, the reason stands below it, and the old value stays in force. */
function check(name) {
  const input = byId(`set-${name}`);
  const isMissing = NUMBERS.includes(name) && !OPTIONAL.includes(name) && input.value === "";
  const isValid = input.checkValidity() && !isMissing;
  const reason = byId(`why-${name}`);
  if (reason) {
    reason.hidden = isValid;
    const { min, max } = input;
    reason.textContent = isValid ? "" : say(max ? "outOfRange" : "belowRange", { min, max, value: edited[name] ?? "–" });
    input.setAttribute("aria-invalid", String(!isValid));
  }
  return isValid;
}

function showValues() {
  for (const output of byId("settings").querySelectorAll("output")) {
    output.textContent = edited[output.htmlFor.value.replace("set-", "")];
  }
}
