// Tag, attributes and children -> an element. Text is always set as text, never as HTML.

const SVG = "http://www.w3.org/2000/svg";
const ICONS = {
  check: "M5 12.500l4.500 4.500L19 7.500",
  close: "M6 6l12 12M18 6L6 18",
  copy: "M9 9h10v11H9zM15 9V4H5v11h4",
  clip: "M8 12.500l6-6a3.200 3.200 0 0 1 4.500 4.500l-8 8a5 5 0 0 1-7-7l7.500-7.500",
  down: "M12 5v14M6 13l6 6 6-6",
  file: "M7 4h7l4 4v12H7zM14 4v4h4",
  left: "M14 7l-5 5 5 5",
  menu: "M4 7h16M4 12h16M4 17h16",
  pencil: "M4 20l1-4.500L16 4.500l3.500 3.500L8.500 19z",
  more: "M6 12h.01M12 12h.01M18 12h.01",
  play: "M8 6l10 6-10 6z",
  plus: "M12 5v14M5 12h14",
  redo: "M19.500 12a7.500 7.500 0 1 1-2.200-5.300L20 9.500M20 4v5.500h-5.500",
  right: "M10 7l5 5-5 5",
  send: "M12 19V5M5.500 11.500L12 5l6.500 6.500",
  sliders: "M4 8h9M17 8h3M4 16h3M11 16h9M15 5.500v5M9 13.500v5",
  stop: "M7 7h10v10H7z",
  trash: "M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13",
};

/** `element("button", { class: "quiet", onclick: f }, "text", child)`; null children are left out. */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

export function icon(name) {
  const picture = document.createElementNS(SVG, "svg");
  picture.setAttribute("viewBox", "0 0 24 24");
  picture.setAttribute("aria-hidden", "true");
  picture.classList.add("glyph");
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", ICONS[name]);
  picture.append(path);
  return picture;
}

export function byId(id) {
  return document.getElementById(id);
}

/** As tall as its text, up to a share of the window. */
export function fitHeight(area) {
  area.style.height = "auto";
  area.style.height = `${Math.min(area.scrollHeight + 2, innerHeight * 0.4)}px`;
}

/** Whether text is typed on glass: Enter then makes a line, since there is no Shift+Enter. */
export function isOnPhone() {
  return matchMedia("(hover: none) and (pointer: coarse)").matches;
}
