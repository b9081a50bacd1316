// Data enters the page through textContent and nothing else: what an agent wrote is never markup.
const POLICIES = { noop: "No-op", base: "Base", teacher: "Teacher", sft: "SFT", rl: "SFT+RL" };
const SIGNS = { pass: "✓", fail: "✗", quarantine: "!", error: "!", none: "–" };
const CHUNK = 32; // episodes in a chunk, as in report_data.py
const find = (id) => document.getElementById(id);
const label = (policy) => (Object.hasOwn(POLICIES, policy) ? POLICIES[policy] : String(policy));

function make(tag, kind, text, ...children) {
  const node = document.createElement(tag);
  if (kind) node.className = kind;
  if (text !== undefined && text !== null) node.textContent = text;
  node.append(...children);
  return node;
}

// The JSON in a compressed element; what was unpacked last is kept.
const unpacked = new Map();
function unpack(id) {
  let value = unpacked.get(id);
  unpacked.delete(id);
  value ??= (async () => {
    const bytes = Uint8Array.from(atob(find(id).textContent), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return JSON.parse(await new Response(stream).text());
  })();
  unpacked.set(id, value);
  if (unpacked.size > 16) unpacked.delete(unpacked.keys().next().value);
  return value;
}

const index = JSON.parse(find("index").textContent);
const body = async (number) => (await unpack("chunk-" + Math.floor(number / CHUNK)))[number % CHUNK];
const prompts = unpack("prompts");
