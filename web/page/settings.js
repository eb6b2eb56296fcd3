// The dialog with a conversation's settings.

import { byId, element } from "./dom.js";
import { DEFAULTS, apiKey } from "./store.js";

const NUMBERS = ["temperature", "top_p", "max_tokens"];
const INPUTS = ["model", "system", ...NUMBERS];

let edited = null; // the settings that the dialog shows

/** Every change is applied at once; `changed` tells of it. */
export function connectSettings({ changed, forgetKey }) {
  for (const name of INPUTS) {
    const input = byId(`set-${name}`);
    input.addEventListener("input", () => {
      if (!input.checkValidity() || (NUMBERS.includes(name) && input.value === "")) return;
      edited[name] = NUMBERS.includes(name) ? Number(input.value) : input.value;
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
  for (const name of INPUTS) byId(`set-${name}`).value = edited[name];
  if (!edited.model) byId("set-model").selectedIndex = 0;
  showValues();
}

function showValues() {
  for (const output of byId("settings").querySelectorAll("output")) {
    output.textContent = edited[output.htmlFor.value.replace("set-", "")];
  }
}
