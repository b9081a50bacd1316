"use strict";
// Data enters the page through textContent and nothing else: what an agent wrote is never markup.
const POLICIES = { noop: "No-op", teacher: "Teacher", sft: "SFT", rl: "SFT+RL" };
const SIGNS = { pass: "✓", fail: "✗", quarantine: "!", error: "!", none: "–" };
const find = (id) => document.getElementById(id);
const parsed = (id) => JSON.parse(find(id).textContent);
const label = (policy) => (Object.hasOwn(POLICIES, policy) ? POLICIES[policy] : String(policy));

function make(tag, kind, text, ...children) {
  const node = document.createElement(tag);
  if (kind) node.className = kind;
  if (text !== undefined && text !== null) node.textContent = text;
  node.append(...children);
  return node;
}

// --- curves: the value under the pointer -------------------------------------------------------
const number = (value) => Number(value.toPrecision(4)).toString();
for (const svg of document.querySelectorAll(".chart svg")) {
  const lines = JSON.parse(svg.dataset.lines);
  const seeds = JSON.parse(svg.dataset.seeds);
  const output = svg.parentNode.querySelector("output");
  const last = output.textContent;
  const cursor = document.createElementNS("http://www.w3.org/2000/svg", "line");
  cursor.setAttribute("class", "cursor");
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    const near = lines.map((line) =>
      line.reduce((a, b) => (Math.abs(b[2] - x) < Math.abs(a[2] - x) ? b : a)));
    for (const [name, value] of Object.entries({ x1: near[0][2], x2: near[0][2], y1: 10, y2: 166 }))
      cursor.setAttribute(name, value);
    svg.append(cursor);
    output.textContent = `step ${near[0][0]}  ` + near.map((p, i) => seeds[i] + number(p[1])).join(", ");
  });
  svg.addEventListener("pointerleave", () => {
    cursor.remove();
    output.textContent = last;
  });
}

// --- episodes: the list ------------------------------------------------------------------------
const index = parsed("index");
const prompts = parsed("prompts");
const list = find("list");
const detail = find("detail");
const filters = find("filters");
const searched = index.map((entry) =>
  [entry.task, entry.package, entry.operator, prompts[entry.prompt]].join("\n").toLowerCase());
let shown = [];
let chosen = -1;

for (const name of ["policy", "outcome", "operator", "source"]) {
  const select = filters.elements[name];
  select.append(new Option("all", ""));
  const values = [...new Set(index.map((entry) => String(entry[name])))];
  if (name !== "policy") values.sort();
  for (const value of values) select.append(new Option(name === "policy" ? label(value) : value, value));
}

function outcome(entry) {
  const known = Object.hasOwn(SIGNS, entry.outcome) ? entry.outcome : "none";
  return make("span", "outcome " + known, SIGNS[known]);
}

function row(entry, number) {
  const about = [label(entry.policy), entry.operator, entry.source, `${entry.turns} turns`];
  const node = make("div", "row", null, outcome(entry), make("span", "", entry.task),
    make("span", "about", about.filter((part) => part !== null && part !== "").join(" · ")));
  node.id = "row-" + number;
  node.setAttribute("role", "option");
  node.title = entry.task;
  return node;
}

function refilter() {
  const words = filters.elements.text.value.toLowerCase().split(/\s+/).filter(Boolean);
  const wanted = ["policy", "outcome", "operator", "source"]
    .map((name) => [name, filters.elements[name].value]).filter(([, value]) => value !== "");
  shown = [];
  const rows = document.createDocumentFragment();
  index.forEach((entry, number) => {
    if (!wanted.every(([name, value]) => String(entry[name]) === value)) return;
    if (!words.every((word) => searched[number].includes(word))) return;
    shown.push(number);
    rows.append(row(entry, number));
  });
  list.replaceChildren(rows);
  find("found").textContent = `${shown.length} shown`;
  mark();
}

function mark() {
  list.querySelector("[aria-selected]")?.removeAttribute("aria-selected");
  const node = find("row-" + chosen);
  if (!node) return list.removeAttribute("aria-activedescendant");
  node.setAttribute("aria-selected", "true");
  list.setAttribute("aria-activedescendant", node.id);
  node.scrollIntoView({ block: "nearest", behavior: "instant" });
}

// --- episodes: one of them ---------------------------------------------------------------------
function linkTo(entry) {
  return "#" + new URLSearchParams({ task: entry.task, from: entry.source, nth: entry.nth });
}

function pairs(entries) {
  const node = make("dl", "facts");
  for (const [name, value] of entries)
    if (value !== null && value !== undefined && value !== "")
      node.append(make("div", "", null, make("dt", "", name), make("dd", "", String(value))));
  return node;
}

const BLOCKS = new Set(["added", "removed", "place"]); // these break the line by their style

function coloured(text, kinds) {
  const node = make("pre");
  for (const line of text.split("\n")) {
    const kind = kinds(line);
    node.append(kind ? make("span", kind, line) : line, BLOCKS.has(kind) ? "" : "\n");
  }
  return node;
}

const diffLine = (line) =>
  /^(---|\+\+\+|@@|diff )/.test(line) ? "place" : line[0] === "+" ? "added" : line[0] === "-" ? "removed" : "";
const testLine = (line) =>
  /^(all \d+ tests pass|edited|submitted)/.test(line) ? "good"
    : /tests fail$|^still failing|^error: |Error\b|^test run ended early/.test(line) ? "bad" : "";

function callNode(call) {
  const rest = make("dl");
  for (const [name, value] of Object.entries(call.arguments ?? {})) {
    const text = typeof value === "string" ? value : JSON.stringify(value);
    const kind = call.name !== "edit" ? "" : name === "old" ? "removed" : name === "new" ? "added" : "";
    rest.append(make("dt", "", name), make("dd", "", null, make("span", kind, text)));
  }
  return make("div", "call", null, make("b", "", String(call.name)), rest);
}

function turnNode(turn, number) {
  const node = make("div", "turn", null, make("h4", "", `Turn ${number + 1}`));
  node.append(make("div", "label", "policy"), make("pre", "", turn.text));
  for (const call of turn.calls) node.append(callNode(call));
  for (const observation of turn.observations)
    node.append(make("div", "label", "observation"), coloured(String(observation), testLine));
  return node;
}

function verdictNode(verdict) {
  const node = make("div");
  for (const [name, title] of [["fail_to_pass", "had to be fixed"], ["pass_to_pass", "had to stay whole"]]) {
    const tests = Object.entries(verdict[name] ?? {});
    const bad = tests.filter(([, result]) => result !== "passed");
    if (tests.length) node.append(make("div", "", `${tests.length - bad.length} of ${tests.length} tests that ${title} pass`));
    if (bad.length) node.append(make("pre", "", bad.map(([id, result]) => `${result}  ${id}`).join("\n")));
  }
  const flags = verdict.flags ?? [];
  if (flags.length) node.append(make("div", "bad", "flags: " + flags.join(", ")));
  return node;
}

function open(number, remember = true) {
  chosen = number;
  mark();
  const entry = index[number];
  const body = parsed("episode-" + number);
  const fold = make("details", "", null, make("summary", "", "Task as the policy saw it"), make("pre", "", prompts[entry.prompt]));
  const siblings = make("p", "siblings", "Same task: ");
  index.forEach((other, at) => {
    if (other.task !== entry.task || at === number) return;
    const link = make("a", "", `${label(other.policy)} (${other.source}) `, outcome(other));
    link.href = linkTo(other);
    siblings.append(link);
  });
  const seconds = typeof body.seconds === "number" ? body.seconds.toFixed(1) + " s" : null;
  detail.replaceChildren(
    make("h3", "", null, outcome(entry), " " + entry.task),
    pairs([
      ["Verdict", entry.outcome], ["Policy", label(entry.policy)], ["Reward", body.reward],
      ["Stopped by", body.stop], ["Tokens", body.tokens ? `${body.tokens}, ${body.sampled} by the policy` : null],
      ["Time", seconds], ["Operator", entry.operator], ["Package", entry.package],
      ["Split", entry.split], ["Seed", entry.seed], ["Weights", body.weight_version >= 0 ? "version " + body.weight_version : null],
    ]),
    fold, ...(siblings.children.length ? [siblings] : []),
    ...body.turns.map(turnNode),
    make("h4", "", "Final diff"),
    body.patch ? coloured(body.patch.replace(/\n$/, ""), diffLine) : make("p", "none", "no change"),
    make("h4", "", "Verdict"), verdictNode(body.verdict ?? {}),
  );
  if (remember) history.replaceState(null, "", linkTo(entry));
}

function follow() {
  const want = new URLSearchParams(location.hash.slice(1));
  if (!want.has("task")) return;
  const fits = (entry) => entry.task === want.get("task")
    && (!want.has("policy") || entry.policy === want.get("policy"))
    && (!want.has("from") || entry.source === want.get("from"))
    && (!want.has("nth") || String(entry.nth) === want.get("nth"));
  const number = index.findIndex(fits);
  if (number < 0) return;
  if (!shown.includes(number)) {
    filters.reset();
    refilter();
  }
  open(number, false);
  find("episodes").scrollIntoView({ behavior: "instant" });
}

function move(by) {
  if (!shown.length) return;
  const at = shown.indexOf(chosen);
  open(shown[at < 0 ? 0 : Math.max(0, Math.min(shown.length - 1, at + by))]);
}

filters.addEventListener("input", refilter);
filters.addEventListener("submit", (event) => event.preventDefault());
list.addEventListener("click", (event) => {
  const node = event.target.closest(".row");
  if (node) open(Number(node.id.slice(4)));
});
window.addEventListener("hashchange", follow);
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.closest("input, select")) {
    if (event.key === "Escape") list.focus();
    return;
  }
  const inList = document.activeElement === list;
  const steps = { j: 1, k: -1, ...(inList ? { ArrowDown: 1, ArrowUp: -1 } : {}) };
  if (Object.hasOwn(steps, event.key)) move(steps[event.key]);
  else if (event.key === "Enter" && inList) {
    if (chosen < 0) move(0);
    detail.focus();
  } else if (event.key === "Escape") list.focus();
  else if (event.key === "/") filters.elements.text.focus();
  else return;
  event.preventDefault();
});
refilter();
follow();
