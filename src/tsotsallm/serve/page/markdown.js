// An answer's Markdown as elements. What a model writes is never trusted: markup in it is shown as text, the result is
// sanitized with a short list of elements and attributes, and nothing in it can load anything or name anything on the page.

import { copyButton } from "./buttons.js";
import { Marked } from "./vendor/marked.esm.js";
import DOMPurify from "./vendor/purify.es.mjs";

const ALLOWED = {
  ALLOWED_TAGS: ["p", "br", "strong", "em", "del", "code", "pre", "blockquote", "ul", "ol", "li", "h5", "h6", "hr", "a", "table", "thead", "tbody", "tr", "th", "td"],
  ALLOWED_ATTR: ["href", "start", "align"],       // no id, name, class or style: nothing on the page can be imitated or hidden
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};
const ENTITIES = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" };
const escaped = (text) => text.replace(/[&<>"]/g, (letter) => ENTITIES[letter]);
const formula = (name, level, start, rule) => ({
  name, level,
  start: (text) => text.match(start)?.index,
  tokenizer: (text) => { const found = rule.exec(text); return found ? { type: name, raw: found[0] } : undefined; },
  renderer: ({ raw }) => (level === "block" ? `<pre><code>${escaped(raw.trim())}</code></pre>` : `<code>${escaped(raw)}</code>`),
});

const marked = new Marked({
  gfm: true,
  breaks: true,                     // a model's line breaks are meant
  extensions: [                     // formulas stay as they are written: their signs are not Markdown's
    formula("formulaBlock", "block", /\$\$|\\\[/, /^(?:\$\$[^]+?\$\$|\\\[[^]+?\\\])[ \t]*(?:\n|$)/),
    formula("formulaDisplay", "inline", /\$\$|\\\[/, /^(?:\$\$[^]+?\$\$|\\\[[^]+?\\\])/),
    formula("formula", "inline", /\$|\\\(/, /^(?:\$(?=[^\s$])(?:[^$\n]*[^\s$\\])?\$(?!\d)|\\\([^]+?\\\))/),
  ],
  renderer: {
    html: ({ text, block }) => (block ? `<p>${escaped(text)}</p>` : escaped(text)),
    image: ({ raw }) => escaped(raw),               // nothing is loaded from elsewhere
    heading({ tokens, depth }) { const name = depth < 3 ? "h5" : "h6"; return `<${name}>${this.parser.parseInline(tokens)}</${name}>\n`; },
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
  },
});

/** A text as a fragment; every block takes its direction from its own letters. */
export function render(text) {
  let fragment;
  try {
    fragment = DOMPurify.sanitize(marked.parse(text), ALLOWED);
  } catch {                         // nested so deeply that the renderer gives up: as it is written
    fragment = document.createDocumentFragment();
    fragment.append(text);
  }
  for (const block of fragment.querySelectorAll("p, li, h5, h6, blockquote, td, th, ul, ol, table")) { block.dir = "auto"; }
  for (const link of fragment.querySelectorAll("a")) {
    if (link.hasAttribute("href")) { link.target = "_blank"; link.rel = "noopener noreferrer"; } else { link.replaceWith(...link.childNodes); }
  }
  for (const table of fragment.querySelectorAll("table")) { inBox(table, "wide").tabIndex = 0; }
  for (const code of fragment.querySelectorAll("pre")) {
    code.dir = "ltr";
    code.tabIndex = 0;              // it may be wider than the page
    inBox(code, "code").append(copyButton(() => code.textContent));
  }
  return fragment;
}

/** The pieces of text in a rendered answer, without its buttons. */
export function textNodes(place) {
  const walker = document.createTreeWalker(place, NodeFilter.SHOW_ELEMENT | NodeFilter.SHOW_TEXT,
    (node) => (node.nodeName === "BUTTON" ? NodeFilter.FILTER_REJECT : node.nodeType === Node.TEXT_NODE ? NodeFilter.FILTER_ACCEPT : NodeFilter.FILTER_SKIP));
  const found = [];
  while (walker.nextNode()) { found.push(walker.currentNode); }
  return found;
}

function inBox(node, name) {
  const box = document.createElement("div");
  box.className = name;
  node.replaceWith(box);
  box.append(node);
  return box;
}
