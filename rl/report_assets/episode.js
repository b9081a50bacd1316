// --- episodes: one of them -----------------------------------------------------------------------
const detail = find("detail");
const BLOCKS = new Set(["added", "removed", "place"]); // these break the line by their style

function pairs(entries) {
  const node = make("dl", "facts");
  for (const [name, value] of entries)
    if (value !== null && value !== undefined && value !== "")
      node.append(make("div", "", null, make("dt", "", name), make("dd", "", String(value))));
  return node;
}

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
    // of a whole suite only what did not pass is recorded
    const whole = name === "fail_to_pass" || verdict.judged_in !== "full";
    if (tests.length && whole) node.append(make("div", "", `${tests.length - bad.length} of ${tests.length} tests that ${title} pass`));
    if (bad.length) node.append(make("pre", "", bad.map(([id, result]) => `${result}  ${id}`).join("\n")));
  }
  if (verdict.build && verdict.build !== "passed") node.append(make("div", "bad", "the build fails: " + verdict.build));
  const flags = Array.isArray(verdict.flags) ? verdict.flags : [];
  if (flags.length) node.append(make("div", "bad", "flags: " + flags.join(", ")));
  return node;
}

function factsOf(entry, shown) {
  const seconds = typeof shown.seconds === "number" ? shown.seconds.toFixed(1) + " s" : null;
  return pairs([
    ["Verdict", entry.outcome], ["Environment", shown.environment],
    ["Verdict in the other", (shown.other_verdict || {}).verdict],
    ["Flags", entry.flags.join(", ")], ["Run", entry.run],
    ["Policy", label(entry.policy)], ["Reward", shown.reward], ["Stopped by", shown.stop],
    ["Tokens", shown.tokens ? `${shown.tokens}, ${shown.sampled} by the policy` : null],
    ["Time", seconds], ["Operator", entry.operator], ["Package", entry.package],
    ["Split", entry.split], ["Seed", entry.seed], ["File", entry.source],
    ["Weights", shown.weight_version >= 0 ? "version " + shown.weight_version : null],
  ]);
}

const who = (entry) => [entry.run, label(entry.policy)].filter(Boolean).join(" · ") + ` (${entry.source}, ${entry.nth + 1})`;

// Links to the other episodes of the task, each also beside this one.
function siblings(number) {
  const entry = index[number];
  const node = make("ul", "siblings");
  index.forEach((other, at) => {
    if (other.task !== entry.task || at === number) return;
    const open = make("a", "", who(other) + " ", outcome(other));
    open.href = fragment({ chosen: at, beside: -1 });
    const both = make("a", "both", "side by side");
    both.href = fragment({ chosen: number, beside: at });
    node.append(make("li", "", null, open, both));
  });
  return node.children.length ? [make("details", "others", null, make("summary", "", `${node.children.length} more of this task`), node)] : [];
}

function heading(entry, number, ...more) {
  const link = make("a", "link", "link");
  link.href = fragment({ chosen: number, beside: -1 });
  link.title = "a link to this episode under these filters";
  return make("div", "heading", null, make("h3", "", null, outcome(entry), " " + entry.task), ...more, link);
}

async function openOne(number) {
  const entry = index[number];
  const [shown, texts] = await Promise.all([body(number), prompts]);
  if (number !== chosen || beside >= 0) return; // another was opened meanwhile
  const partner = partnerOf(number);
  const more = [];
  if (partner >= 0) {
    const both = make("a", "link", `beside ${label(index[partner].policy)}`);
    both.href = fragment({ chosen: number, beside: partner });
    both.title = "side by side (d)";
    more.push(both);
  }
  detail.replaceChildren(
    heading(entry, number, ...more), factsOf(entry, shown),
    make("details", "", null, make("summary", "", "Task as the policy saw it"), make("pre", "", texts[entry.prompt])),
    ...siblings(number), ...shown.turns.map(turnNode), make("h4", "", "Final diff"),
    shown.patch ? coloured(shown.patch.replace(/\n$/, ""), diffLine) : make("p", "none", "no change"),
    make("h4", "", "Verdict"), verdictNode(shown.verdict ?? {}),
  );
}
