// --- curves: the value under the pointer -------------------------------------------------------
const number = (value) => Number(value.toPrecision(4)).toString();
for (const svg of document.querySelectorAll(".chart svg")) {
  const lines = JSON.parse(svg.dataset.lines);
  const labels = JSON.parse(svg.dataset.labels);
  const output = svg.parentNode.querySelector("output");
  const last = output.textContent;
  const cursor = document.createElementNS("http://www.w3.org/2000/svg", "line");
  cursor.setAttribute("class", "cursor");
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    const nearest = (line) =>
      line.reduce((a, b) => (Math.abs(b[2] - x) < Math.abs(a[2] - x) ? b : a));
    const near = lines.map((line) => (line.length ? nearest(line) : null));
    const at = near.find(Boolean);
    for (const [name, value] of Object.entries({ x1: at[2], x2: at[2], y1: 10, y2: 166 }))
      cursor.setAttribute(name, value);
    svg.append(cursor);
    const values = near.map((point, i) => point && labels[i] + number(point[1])).filter(Boolean);
    output.textContent = `step ${at[0]}  ${values.join(", ")}`;
  });
  svg.addEventListener("pointerleave", () => {
    cursor.remove();
    output.textContent = last;
  });
}
