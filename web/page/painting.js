// Changes of the page -> repaints that are not too frequent, and short messages at its bottom.

import { byId, element } from "./dom.js";
import { say } from "./words.js";

const TOAST_MS = 6000;

/** Calls `paint` at most once a frame, and less often when it is slow: long answers must not stall the page. */
export function painter(paint) {
  let isAsked = false;
  let notBefore = 0;
  const attempt = () => {
    const begun = performance.now();
    if (begun < notBefore) {
      requestAnimationFrame(attempt);
      return;
    }
    isAsked = false;
    paint();
    notBefore = performance.now() + 3 * (performance.now() - begun);
  };
  return () => {
    if (isAsked) return;
    isAsked = true;
    requestAnimationFrame(attempt);
  };
}

/** Words for a few seconds; with `undo`, a button that calls it. */
export function toast(words, undo = null) {
  const box = byId("toast");
  const button = undo && element("button", { type: "button", class: "quiet", onclick: undo }, say("undo"));
  box.replaceChildren(words, ...(button ? [button] : []));
  box.hidden = false;
  clearTimeout(toast.timer);
  toast.timer = setTimeout(() => (box.hidden = true), TOAST_MS);
}
