// LaTeX between \( \), \[ \], $$ $$ or $ $ in Markdown -> MathML; a formula that is not closed stays as it was written.

import { temml } from "./vendor/markdown.js";

const PAIRS = [["\\[", "\\]", true], ["\\(", "\\)", false], ["$$", "$$", true]];
const LONGEST = 5000; // characters of a formula
export const MATH_TAGS = [
  "math", "menclose", "merror", "mfrac", "mi", "mmultiscripts", "mn", "mo", "mover", "mpadded", "mphantom", "mprescripts",
  "mroot", "mrow", "ms", "mspace", "msqrt", "mstyle", "msub", "msubsup", "msup", "mtable", "mtd", "mtext", "mtr", "munder",
  "munderover",
];
export const MATH_ATTRIBUTES = [
  "accent", "accentunder", "columnspan", "depth", "display", "displaystyle", "fence", "form", "height", "largeop",
  "linethickness", "lspace", "mathvariant", "maxsize", "minsize", "movablelimits", "notation", "rowspan", "rspace",
  "scriptlevel", "separator", "stretchy", "symmetric", "voffset", "width",
];

/** A plugin for markdown-it. */
export function mathematics(markdown) {
  markdown.inline.ruler.before("escape", "math", inline);
  markdown.block.ruler.before("fence", "math", block, { alt: ["paragraph", "reference", "blockquote", "list"] });
  markdown.renderer.rules.math = (tokens, index) => render(tokens[index].content, tokens[index].block);
}

function render(formula, isDisplayed) {
  const made = temml.renderToString(formula, { displayMode: isDisplayed, throwOnError: false, maxExpand: 200, maxSize: [20, 60] });
  return made.replace(/ style="[^"]*"/g, ""); // the page's policy forbids them
}

function inline(state, isSilent) {
  const { src, pos } = state;
  for (const [begin, end, isDisplayed] of PAIRS) {
    if (!src.startsWith(begin, pos)) continue;
    const stop = src.indexOf(end, pos + begin.length);
    const formula = src.slice(pos + begin.length, stop);
    const isFormula = stop > 0 && formula.trim() && formula.length <= LONGEST;
    if (!isSilent) add(state, isFormula ? formula : begin, isFormula, isDisplayed);
    state.pos = isFormula ? stop + end.length : pos + begin.length; // an open one keeps its backslash
    return true;
  }
  const found = src[pos] === "$" && /^\$(?! )((?:\\.|[^$\\\n])+?)(?<![ \\])\$(?!\d)/.exec(src.slice(pos, pos + LONGEST));
  if (!found) return false;
  if (!isSilent) add(state, found[1], true, false);
  state.pos += found[0].length;
  return true;
}

function add(state, content, isFormula, isDisplayed) {
  const token = state.push(isFormula ? "math" : "text", "", 0);
  token.content = content;
  token.block = isDisplayed;
}

/** A formula that begins a line and may hold what would be a list, a heading or a rule. */
function block(state, startLine, endLine, isSilent) {
  const start = state.bMarks[startLine] + state.tShift[startLine];
  const pair = PAIRS.find(([begin, , isDisplayed]) => isDisplayed && state.src.startsWith(begin, start));
  if (!pair) return false;
  const [begin, end] = pair;
  for (let line = startLine; line < endLine; line += 1) {
    const from = line === startLine ? start + begin.length : state.bMarks[line] + state.tShift[line];
    const stop = state.src.slice(0, state.eMarks[line]).indexOf(end, from);
    if (stop < 0) continue;
    if (state.src.slice(stop + end.length, state.eMarks[line]).trim() || stop - start > LONGEST) return false;
    if (isSilent) return true;
    const token = state.push("math", "", 0);
    token.content = state.src.slice(start + begin.length, stop);
    token.block = true;
    state.line = line + 1;
    return true;
  }
  return false;
}
