// --- two episodes of one task, side by side ------------------------------------------------------
const RANK = Object.keys(POLICIES);
let beside = -1;

// What an episode is put beside: the same try of the policy before RL, or after it; else any other.
function partnerOf(number) {
  const entry = index[number];
  const want = { rl: "sft", sft: "rl", teacher: "rl", base: "rl", noop: "rl" }[entry.policy];
  const rest = index.map((_, at) => at).filter((at) => at !== number && index[at].task === entry.task);
  const score = (at) => {
    const other = index[at];
    const twin = entry.run && other.run !== entry.run ? other.policy === entry.policy : other.policy === want && other.run === entry.run;
    return 4 * twin + 2 * other.source.startsWith("eval") + (other.nth === entry.nth);
  };
  return rest.length ? rest.reduce((a, b) => (score(b) > score(a) ? b : a)) : -1;
}

// Lines of two texts beside each other: pairs of equal lines, and lines that one side has alone
// (longest common subsequence; where that would take too long, all between the common ends differ).
function aligned(left, right) {
  const a = left.split("\n"), b = right.split("\n");
  let start = 0, end = 0;
  while (start < a.length && start < b.length && a[start] === b[start]) start++;
  while (end < a.length - start && end < b.length - start && a[a.length - 1 - end] === b[b.length - 1 - end]) end++;
  const same = (lines) => lines.map((line) => [line, line]);
  const n = a.length - start - end, m = b.length - start - end;
  const found = same(a.slice(0, start));
  if (n * m > 1e6) {
    for (let i = 0; i < Math.max(n, m); i++) found.push([i < n ? a[start + i] : null, i < m ? b[start + i] : null]);
  } else {
    const length = Array.from({ length: n + 1 }, () => new Uint32Array(m + 1));
    for (let i = n - 1; i >= 0; i--)
      for (let j = m - 1; j >= 0; j--)
        length[i][j] = a[start + i] === b[start + j] ? length[i + 1][j + 1] + 1 : Math.max(length[i + 1][j], length[i][j + 1]);
    for (let i = 0, j = 0; i < n || j < m; ) {
      if (i < n && j < m && a[start + i] === b[start + j]) found.push([a[start + i++], b[start + j++]]);
      else if (j >= m || (i < n && length[i + 1][j] >= length[i][j + 1])) found.push([a[start + i++], null]);
      else found.push([null, b[start + j++]]);
    }
  }
  return found.concat(same(a.slice(a.length - end)));
}

// Rows of two cells: equal lines, or what the left has instead of what the right has.
function panes(left, right, kinds = () => "") {
  const node = make("div", "panes lines");
  let alone = [[], []];
  const flush = () => {
    for (let i = 0; i < Math.max(alone[0].length, alone[1].length); i++)
      alone.forEach((lines, side) =>
        node.append(i < lines.length ? make("span", side ? "only added" : "only removed", lines[i] || " ") : make("span", "gap", " ")));
    alone = [[], []];
  };
  for (const [a, b] of aligned(left, right)) {
    if (a !== null && a === b) {
      flush();
      node.append(make("span", "same " + kinds(a), a || " "), make("span", "same " + kinds(a), a || " "));
    } else {
      if (a !== null) alone[0].push(a);
      if (b !== null) alone[1].push(b);
    }
  }
  flush();
  return node;
}

const turnText = (turn) => [turn.text, ...turn.observations.map((seen) => "── observation\n" + seen)].join("\n");

async function openBoth(number, other) {
  const rank = (at) => [RANK.indexOf(index[at].policy), at];
  const order = [number, other].sort((a, b) => rank(a)[0] - rank(b)[0] || a - b);
  const [bodies, texts] = [await Promise.all(order.map(body)), await prompts];
  if (number !== chosen || other !== beside) return;
  const [left, right] = bodies;
  const close = make("a", "link", "close");
  close.href = fragment({ chosen: number, beside: -1 });
  close.title = "back to one episode (Esc)";
  const heads = order.map((at, side) => make("div", "", null,
    make("h3", "", null, outcome(index[at]), " " + who(index[at])), factsOf(index[at], bodies[side])));
  const turns = Array.from({ length: Math.max(left.turns.length, right.turns.length) }, (_, turn) => {
    const [a, b] = bodies.map((shown) => shown.turns[turn]);
    return [make("h4", "", `Turn ${turn + 1}`), panes(a ? turnText(a) : "", b ? turnText(b) : "")];
  });
  detail.replaceChildren(
    make("div", "heading", null, make("h3", "", index[number].task), close),
    make("div", "panes", null, ...heads),
    make("details", "", null, make("summary", "", "Task as the policies saw it"), make("pre", "", texts[index[number].prompt])),
    make("h4", "", "Final diff"), panes(left.patch || "no change", right.patch || "no change", diffLine),
    make("h4", "", "Verdict"), make("div", "panes", null, ...bodies.map((shown) => verdictNode(shown.verdict ?? {}))),
    ...turns.flat(), ...siblings(number),
  );
}
