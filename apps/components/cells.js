// The cells of a grid of jobs as squares, coloured and marked by state.

const STATES = {
  d: {name: "done", light: "#2166ac", dark: "#5aa9e6"},
  f: {name: "failed", light: "#d6604d", dark: "#ff8a6b"},
  r: {name: "running", light: "#e6b422", dark: "#ffd75e"},
  m: {name: "missing", light: "", dark: ""},
};
const LEAST = 4, LARGEST = 26, ROOM = 16000;

function draw(root, data, send) {
  const grid = memory(root, () => build(root));
  Object.assign(grid, {data, send});
  grid.heading.textContent = data.title;
  grid.heading.hidden = !data.title;
  grid.at = clamp(data.selected ?? grid.at, 0, Math.max(0, data.states.length - 1));
  legend(grid);
  paint(grid);
}

function build(root) {
  const canvas = element("canvas", {class: "map", tabindex: 0, role: "application"});
  const grid = {root, canvas, at: 0, heading: element("h4"), status: element("div", {class: "status", "aria-live": "polite"}),
    keys: element("div", {class: "tools"})};
  root.append(grid.heading, grid.keys, canvas, grid.status);
  listen(grid);
  watch(root, () => grid.data && paint(grid));
  return grid;
}

function legend(grid) {
  const dark = theme(grid.root).dark, counts = {};
  for (const letter of grid.data.states) counts[letter] = (counts[letter] ?? 0) + 1;
  grid.keys.replaceChildren(...Object.entries(STATES).map(([letter, state]) => {
    const swatch = element("canvas", {width: 14, height: 14, "aria-hidden": "true"});
    square(swatch.getContext("2d"), 0, 0, 14, letter, dark, theme(grid.root));
    return element("label", {}, swatch, `${count(counts[letter] ?? 0)} ${state.name}`);
  }));
  const said = Object.entries(STATES).map(([letter, state]) => `${counts[letter] ?? 0} ${state.name}`).join(", ");
  grid.canvas.setAttribute("aria-label", `${grid.data.states.length} cells: ${said}. Arrow keys move, Enter opens a cell.`);
}

// Squares as large as fit in a picture of `ROOM` square pixels per ten pixels of width, in whole pixels.
function paint(grid) {
  const {canvas, data, root} = grid, n = data.states.length, colours = theme(root);
  const width = Math.max(root.clientWidth, 100), ratio = window.devicePixelRatio || 1;
  grid.size = clamp(Math.floor(Math.sqrt((width * ROOM) / 40 / Math.max(n, 1))), LEAST, LARGEST);
  grid.across = Math.max(1, Math.min(n, Math.floor(width / grid.size)));
  const rows = Math.ceil(n / grid.across);
  Object.assign(canvas, {width: grid.across * grid.size * ratio, height: rows * grid.size * ratio});
  Object.assign(canvas.style, {width: `${grid.across * grid.size}px`, height: `${rows * grid.size}px`});
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  for (let i = 0; i < n; i++)
    square(pen, (i % grid.across) * grid.size, Math.floor(i / grid.across) * grid.size, grid.size, data.states[i], colours.dark, colours);
  for (const [i, line] of [[data.selected, 3], [document.activeElement === canvas || root.getRootNode().activeElement === canvas ? grid.at : null, 1.5]])
    if (i !== null && i < n) {
      pen.strokeStyle = colours.ink;
      pen.lineWidth = line;
      pen.strokeRect((i % grid.across) * grid.size, Math.floor(i / grid.across) * grid.size, grid.size - 1, grid.size - 1);
    }
}

// A failed cell has a cross and a running one a dot, so that colour does not tell alone.
function square(pen, x, y, size, letter, dark, colours) {
  const inner = size - (size > 5 ? 2 : 1), colour = STATES[letter][dark ? "dark" : "light"];
  if (!colour) {
    pen.strokeStyle = colours.line;
    pen.lineWidth = 1;
    pen.strokeRect(x + 0.5, y + 0.5, inner - 1, inner - 1);
    return;
  }
  pen.fillStyle = colour;
  pen.fillRect(x, y, inner, inner);
  if (size < 7) return;
  pen.strokeStyle = pen.fillStyle = dark ? "#111318" : letter === "r" ? "#111318" : "#ffffff";
  pen.lineWidth = Math.max(1, size / 9);
  pen.beginPath();
  if (letter === "f") {
    for (const [a, b] of [[0.25, 0.75], [0.75, 0.25]]) {
      pen.moveTo(x + inner * a, y + inner * 0.25);
      pen.lineTo(x + inner * b, y + inner * 0.75);
    }
    pen.stroke();
  } else if (letter === "r") {
    pen.arc(x + inner / 2, y + inner / 2, inner / 5, 0, 7);
    pen.fill();
  }
}

function tell(grid, i) {
  const {data} = grid, of = `cell ${count(i + 1)} of ${count(data.states.length)}`;
  grid.status.textContent = `${of}, ${STATES[data.states[i]].name}${data.titles[i] ? `: ${shortened(data.titles[i], 160)}` : ""}`;
}

function listen(grid) {
  const {canvas} = grid;
  const under = (event) => {
    const x = Math.floor(event.offsetX / grid.size), i = Math.floor(event.offsetY / grid.size) * grid.across + x;
    return x >= 0 && x < grid.across && i >= 0 && i < grid.data.states.length ? i : -1;
  };
  canvas.addEventListener("pointermove", (event) => {
    const i = under(event);
    if (i >= 0) tell(grid, i);
    else grid.status.textContent = "";
  });
  canvas.addEventListener("pointerleave", () => {
    grid.status.textContent = "";
  });
  canvas.addEventListener("click", (event) => {
    const i = under(event);
    if (i < 0) return;
    grid.at = i;
    grid.send("cell", i);
  });
  for (const name of ["focus", "blur"]) canvas.addEventListener(name, () => paint(grid));
  canvas.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const last = grid.data.states.length - 1;
    const step = {ArrowLeft: -1, ArrowRight: 1, ArrowUp: -grid.across, ArrowDown: grid.across}[event.key];
    const to = event.key === "Home" ? 0 : event.key === "End" ? last : step === undefined ? null : grid.at + step;
    if (event.key === "Enter" && last >= 0) grid.send("cell", grid.at);
    else if (to === null) return;
    else if (to >= 0 && to <= last) {
      grid.at = to;
      paint(grid);
      tell(grid, to);
    }
    event.preventDefault();
  });
}
