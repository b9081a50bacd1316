// --- links: the fragment holds the filters, the episode and what lies beside it ------------------
const NAMED = ["source", "nth", "task", "run"]; // these name an episode, also on a page made anew
const nameOf = (number) => NAMED.filter((key) => key in index[number]).map((key) => index[number][key]).join(".");
const numbers = new Map(index.map((_, number) => [nameOf(number), number]));

function fragment(state) {
  const words = new URLSearchParams();
  for (const name of [...Object.keys(FILTERS), "text"])
    if (filters.elements[name].value) words.set(name, filters.elements[name].value);
  if (state.chosen >= 0) words.set("open", nameOf(state.chosen));
  if (state.beside >= 0) words.set("beside", nameOf(state.beside));
  return "#" + words;
}

const remember = () => history.replaceState(null, "", fragment({ chosen, beside }));

function open(number, other = -1) {
  chosen = number;
  beside = other;
  find("viewer").classList.toggle("two", beside >= 0);
  reveal();
  detail.scrollTop = 0;
  (beside >= 0 ? openBoth(chosen, beside) : openOne(chosen)).catch((error) => {
    detail.replaceChildren(make("p", "bad", `This episode could not be read: ${error.message}`));
  });
}

function follow() {
  const words = new URLSearchParams(location.hash.slice(1));
  const known = [...Object.keys(FILTERS), "text", "open", "beside"];
  if (!known.some((name) => words.has(name))) return;
  filters.reset();
  for (const name of [...Object.keys(FILTERS), "text"])
    if (words.has(name)) filters.elements[name].value = words.get(name);
  refilter();
  if (words.has("open")) {
    const [number, other] = ["open", "beside"].map((name) => numbers.get(words.get(name)) ?? -1);
    if (number >= 0) open(number, other);
    else {
      chosen = beside = -1;
      detail.replaceChildren(make("p", "none", "The episode of this link is not on this page."));
    }
  }
  find("episodes").scrollIntoView({ behavior: "instant" });
}

// --- keys and clicks -----------------------------------------------------------------------------
function move(to) {
  if (!shown.length) return;
  open(shown[Math.max(0, Math.min(shown.length - 1, to))]);
  remember();
}

function filtered() {
  refilter();
  list.scrollTop = 0;
  reveal();
  remember();
}

filters.addEventListener("input", filtered);
filters.addEventListener("submit", (event) => event.preventDefault());
find("clear").addEventListener("click", () => {
  filters.reset();
  filtered();
});
list.addEventListener("click", (event) => {
  const node = event.target.closest(".row");
  if (node) move(shown.indexOf(Number(node.id.slice(4))));
});
window.addEventListener("hashchange", follow);

function key(event) {
  const at = shown.indexOf(chosen);
  const page = Math.max(1, Math.floor(list.clientHeight / ROW) - 1);
  const ends = { Home: 0, End: shown.length - 1 };
  const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page };
  const anywhere = { j: 1, k: -1 };
  const inText = document.activeElement === filters.elements.text;
  if (inText && event.key !== "Escape" && event.key !== "Enter" && event.key !== "ArrowDown") return false;
  if (!inText && event.target.closest("select") && event.key !== "Escape") return false;
  if (inText && event.key !== "Escape") {
    list.focus();
    if (at < 0 || event.key === "Enter") move(Math.max(0, at));
  } else if (document.activeElement === list && Object.hasOwn(steps, event.key)) move(at < 0 ? 0 : at + steps[event.key]);
  else if (document.activeElement === list && Object.hasOwn(ends, event.key)) move(ends[event.key]);
  else if (Object.hasOwn(anywhere, event.key)) move(at < 0 ? 0 : at + anywhere[event.key]);
  else if (event.key === "Enter" && document.activeElement === list) {
    if (chosen < 0) move(0);
    detail.focus();
  } else if (event.key === "d" && chosen >= 0) {
    open(chosen, beside >= 0 ? -1 : partnerOf(chosen));
    remember();
  } else if (event.key === "Escape") {
    if (beside >= 0 && !inText) {
      open(chosen);
      remember();
    }
    list.focus();
  } else if (event.key === "/") filters.elements.text.focus();
  else return false;
  return true;
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (key(event)) event.preventDefault();
});
refilter();
follow();
