// --- episodes: filters and the list, of which only what is in view exists ------------------------
const list = find("list");
const filters = find("filters");
const ROW = 52; // px, as in report.css
const ANY_FLAG = "any flag", NO_FLAG = "no flag";

// filter -> the values of an entry that it may name
const FILTERS = {
  run: (entry) => [entry.run],
  policy: (entry) => [entry.policy],
  outcome: (entry) => [entry.outcome],
  task: (entry) => [entry.task],
  tool: (entry) => entry.tools,
  flag: (entry) => [...entry.flags, entry.flags.length ? ANY_FLAG : NO_FLAG],
  operator: (entry) => [entry.operator],
  source: (entry) => [entry.source],
};
const valuesOf = (name, entry) =>
  FILTERS[name](entry).filter((value) => value !== undefined && value !== null).map(String);

const searched = index.map((entry) => [entry.task, entry.package, entry.operator, ...entry.flags].join("\n").toLowerCase());
let shown = index.map((_, number) => number);
let chosen = -1;

for (const name of Object.keys(FILTERS)) {
  const select = filters.elements[name];
  const values = [...new Set(index.flatMap((entry) => valuesOf(name, entry)))];
  if (name !== "policy" && name !== "run") values.sort();
  if (name === "flag") values.sort((a, b) => (b === ANY_FLAG) - (a === ANY_FLAG) || (b === NO_FLAG) - (a === NO_FLAG));
  select.append(new Option("all", ""), ...values.map((value) => new Option(name === "policy" ? label(value) : value, value)));
  select.closest("label").hidden = values.length < 2;
}

function outcome(entry) {
  const known = Object.hasOwn(SIGNS, entry.outcome) ? entry.outcome : "none";
  const node = make("span", "outcome " + known, SIGNS[known]);
  node.title = entry.outcome;
  return node;
}

function row(number, place) {
  const entry = index[number];
  const about = [entry.run, label(entry.policy), entry.operator, entry.source, `${entry.turns} turns`];
  const node = make("div", "row", null, outcome(entry), make("span", "name", entry.task),
    make("span", "flag", entry.flags.length ? "⚑" : ""),
    make("span", "about", about.filter((part) => part !== undefined && part !== null && part !== "").join(" · ")));
  node.id = "row-" + number;
  node.setAttribute("role", "option");
  node.setAttribute("aria-setsize", shown.length);
  node.setAttribute("aria-posinset", place + 1);
  if (number === chosen) node.setAttribute("aria-selected", "true");
  node.style.top = place * ROW + "px";
  node.title = [entry.task, ...entry.flags].join("\n");
  return node;
}

const rows = make("div", "rows");
list.append(rows);

function draw() {
  const first = Math.max(0, Math.floor(list.scrollTop / ROW) - 8);
  const last = Math.min(shown.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW) + 8);
  rows.replaceChildren(...shown.slice(first, last).map((number, at) => row(number, first + at)));
  if (find("row-" + chosen)) list.setAttribute("aria-activedescendant", "row-" + chosen);
  else list.removeAttribute("aria-activedescendant");
}

function refilter() {
  const words = filters.elements.text.value.toLowerCase().split(/\s+/).filter(Boolean);
  const wanted = Object.keys(FILTERS)
    .map((name) => [name, filters.elements[name].value]).filter(([, value]) => value !== "");
  shown = [];
  let passed = 0;
  index.forEach((entry, number) => {
    if (!wanted.every(([name, value]) => valuesOf(name, entry).includes(value))) return;
    if (!words.every((word) => searched[number].includes(word))) return;
    shown.push(number);
    passed += entry.outcome === "pass";
  });
  rows.style.height = shown.length * ROW + "px";
  const share = shown.length ? `, ${((100 * passed) / shown.length).toFixed(1)} % pass` : "";
  find("found").textContent = `${shown.length.toLocaleString("en")} shown${share}`;
  find("clear").hidden = !wanted.length && !words.length;
  draw();
}

// Bring the chosen row into view, and draw.
function reveal() {
  const place = shown.indexOf(chosen);
  if (place >= 0) {
    const top = place * ROW;
    if (top < list.scrollTop) list.scrollTop = top;
    else if (top + ROW > list.scrollTop + list.clientHeight) list.scrollTop = top + ROW - list.clientHeight;
  }
  draw();
}

let drawing = false;
list.addEventListener("scroll", () => {
  if (drawing) return;
  drawing = true;
  requestAnimationFrame(() => {
    drawing = false;
    draw();
  });
});
window.addEventListener("resize", draw);

// What the task said is searched too, once it is unpacked.
prompts.then((texts) => {
  index.forEach((entry, number) => (searched[number] += "\n" + texts[entry.prompt].toLowerCase()));
  if (filters.elements.text.value) refilter();
});
