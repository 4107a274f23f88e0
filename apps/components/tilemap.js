// A map of queries x keys that can be moved and zoomed. The host sends one picture for the part in view; pictures that
// are there already are stretched until the next one comes. Axes, cross and numbers are drawn over it.
const NARROWEST = 4; // tokens on a side when zoomed in fully
const LAYERS = 6; // pictures of one map that are kept

function draw(root, data, send) {
  return updated(memory(root, () => built(root)), data, send);
}

async function updated(map, data, send) {
  map.send = send;
  const turn = (map.turn = (map.turn ?? 0) + 1);
  // The same picture comes again with another cross, scale or focus: neither its numbers nor its colours are made again.
  const shown = map.layer?.image === data.image && map.layer.top === data.top ? map.layer : await packedValues(data.image, data.top);
  const {values, cells, made} = shown;
  const layer = {...data, values, cells, made};
  if (turn !== map.turn) return; // newer data came while this picture was decoded
  const before = map.data;
  const same = before && data.source && data.source === before.source;
  const kept = same ? map.layers.filter((other) => String(other.view) !== String(layer.view)) : [];
  map.layers = [...kept, layer].slice(-LAYERS).sort((a, b) => b.size - a.size);
  map.data = data;
  map.layer = layer;
  if (!before || adopted(map, before)) {
    map.view = [...data.view];
    map.asked = [];
  }
  if (before?.scale !== data.scale) map.scale = data.scale;
  if (!map.cursor || String(before?.cross) !== String(data.cross)) map.cursor = data.cross ?? null;
  map.title.textContent = data.title;
  map.title.hidden = !data.title;
  map.canvas.setAttribute("aria-label", `Attention map ${data.title}: ${data.queries} queries by ${data.keys} keys. ` +
    "Arrow keys move, plus and minus zoom, zero shows all, Shift and arrows choose a cell, Enter takes it.");
  map.note.textContent = data.exact && data.size === 1 ? "exact" : data.size === 1 ? "one cell per token"
    : `cells of ${data.size} × ${data.size} tokens`;
  map.scales.value = map.scale;
  tell(map, map.hover ?? null);
  paint(map);
}

// Whether the view of new data is taken over: not when it answers what was asked for here, nor when it did not change.
function adopted(map, before) {
  const {data} = map;
  if (data.queries !== before.queries || data.keys !== before.keys) return true;
  const answers = map.asked.findIndex((asked) => asked.every((edge, side) => {
    const outwards = side % 2 ? data.view[side] - edge : edge - data.view[side];
    return outwards >= 0 && outwards <= data.size;
  }));
  if (answers >= 0) {
    map.asked.splice(0, answers);
    return false;
  }
  return String(data.view) !== String(before.view);
}

function built(root) {
  const map = {root, layers: [], asked: [], hover: null, cursor: null, scale: "sqrt", pointers: new Map()};
  map.redraw = perFrame(() => paint(map));
  map.settle = settled(() => ask(map), 120);
  map.title = element("h4");
  map.canvas = element("canvas", {tabindex: 0, role: "application", class: "map"});
  map.tip = element("div", {class: "tip", "aria-hidden": "true", hidden: true});
  map.status = element("div", {class: "status", "aria-live": "polite"});
  map.note = element("span", {class: "note"});
  map.scales = element("select", {"aria-label": "Colour scale", change: () => {
    map.scale = map.scales.value;
    map.send("scale", map.scale);
    map.redraw();
  }}, ...["linear", "sqrt", "log"].map((name) => element("option", {value: name}, name)));
  const button = (text, label, action) => element("button", {type: "button", "aria-label": label, title: label, click: action}, text);
  const tools = element("div", {class: "tools"},
    button("−", "Zoom out", () => zoom(map, 1.6)), button("+", "Zoom in", () => zoom(map, 1 / 1.6)),
    button("Show all", "Show the whole map", () => all(map)), element("label", {}, "scale", map.scales), map.note,
    element("details", {}, element("summary", {}, "Controls"), element("div", {class: "card"},
      "Wheel or pinch zooms, drag moves, Shift and drag zooms to a box, double click shows all, click takes a cell. " +
      "On the keyboard: arrows move, + and − zoom, 0 shows all, Shift and arrows choose a cell, Enter takes it.")));
  root.append(map.title, tools, element("div", {class: "stage"}, map.canvas, map.tip), map.status);
  listen(map);
  watch(root, () => map.data && paint(map));
  return map;
}

// ---- Moving
// Where on the canvas an event was; the event itself would tell it anew later.
const spotOf = ({offsetX, offsetY}) => ({offsetX, offsetY});

function listen(map) {
  const {canvas, pointers} = map;
  let start = null; // where the pointer went down, and what was in view then
  canvas.addEventListener("wheel", (event) => {
    const factor = Math.exp(clamp(event.deltaY * (event.deltaMode ? 30 : 1), -300, 300) * 0.002);
    const whole = map.view.every((edge, side) => edge === [0, map.data.queries, 0, map.data.keys][side]);
    if (factor > 1 && whole) return; // nothing to zoom out to: the page scrolls
    event.preventDefault();
    zoom(map, factor, at(map, event));
  }, {passive: false});
  canvas.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    canvas.setPointerCapture(event.pointerId);
    pointers.set(event.pointerId, spotOf(event));
    start = {spot: spotOf(event), view: [...map.view], moved: false, box: event.shiftKey, fingers: [...pointers.values()]};
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!pointers.has(event.pointerId)) return point(map, at(map, event), event);
    pointers.set(event.pointerId, spotOf(event));
    if (Math.hypot(event.offsetX - start.spot.offsetX, event.offsetY - start.spot.offsetY) > 4) start.moved = true;
    if (!start.moved) return;
    if (pointers.size === 2) pinch(map, start, [...pointers.values()]);
    else if (start.box) map.box = [start.spot, spotOf(event)];
    else {
      const {wide, high} = place(map), [q0, q1, k0, k1] = start.view;
      const dq = ((start.spot.offsetY - event.offsetY) / high) * (q1 - q0), dk = ((start.spot.offsetX - event.offsetX) / wide) * (k1 - k0);
      move(map, [q0 + dq, q1 + dq, k0 + dk, k1 + dk]);
    }
    point(map, null);
    map.redraw();
  });
  const up = (event) => {
    const last = pointers.delete(event.pointerId) && !pointers.size;
    if (!last || !start) return;
    if (map.box) {
      const corners = map.box.map((corner) => at(map, corner, true));
      map.box = null;
      const [q0, q1] = [corners[0].q, corners[1].q].sort((a, b) => a - b), [k0, k1] = [corners[0].k, corners[1].k].sort((a, b) => a - b);
      move(map, [q0, Math.max(q1, q0 + NARROWEST), k0, Math.max(k1, k0 + NARROWEST)]);
    } else if (!start.moved && event.type === "pointerup") {
      const spot = at(map, event);
      if (spot && event.timeStamp - (map.clicked ?? -1e9) > 350) take(map, spot); // the second click of two shows all
      map.clicked = event.timeStamp;
    }
    start = null;
    map.redraw();
  };
  canvas.addEventListener("pointerup", up);
  canvas.addEventListener("pointercancel", up);
  canvas.addEventListener("pointerleave", () => point(map, null));
  canvas.addEventListener("dblclick", () => all(map));
  canvas.addEventListener("focus", map.redraw);
  canvas.addEventListener("blur", map.redraw);
  canvas.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const step = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]}[event.key];
    if (step && event.shiftKey) choose(map, step);
    else if (step) {
      const [q0, q1, k0, k1] = map.view, dq = step[0] * Math.max(1, (q1 - q0) / 10), dk = step[1] * Math.max(1, (k1 - k0) / 10);
      move(map, [q0 + dq, q1 + dq, k0 + dk, k1 + dk]);
    } else if (event.key === "+" || event.key === "=") zoom(map, 1 / 1.6);
    else if (event.key === "-" || event.key === "_") zoom(map, 1.6);
    else if (event.key === "0") all(map);
    else if (event.key === "Enter") take(map, chosen(map));
    else return;
    event.preventDefault();
  });
}

// Shows the part `view`, moved or cut so that it lies inside the map, and asks the host for it.
function move(map, view) {
  const sides = [[view[0], view[1], map.data.queries], [view[2], view[3], map.data.keys]];
  map.view = sides.flatMap(([from, to, tokens]) => {
    const wide = Math.min(to - from, tokens), start = clamp(from, 0, tokens - wide);
    return [start, start + wide];
  });
  map.redraw();
  map.settle();
}
const all = (map) => move(map, [0, map.data.queries, 0, map.data.keys]);

// Zooms about a place, by default the chosen cell if it is in view, else the middle.
function zoom(map, factor, spot) {
  const [q0, q1, k0, k1] = map.view;
  if (!spot) {
    const [q, k] = map.cursor ?? [-1, -1];
    spot = q >= q0 && q < q1 && k >= k0 && k < k1 ? {q: q + 0.5, k: k + 0.5} : {q: (q0 + q1) / 2, k: (k0 + k1) / 2};
  }
  const least = Math.max(...[[q0, q1], [k0, k1]].map(([a, b]) => Math.min(NARROWEST, b - a) / (b - a)));
  const by = Math.max(factor, least);
  move(map, [spot.q - (spot.q - q0) * by, spot.q + (q1 - spot.q) * by, spot.k - (spot.k - k0) * by, spot.k + (k1 - spot.k) * by]);
}

function pinch(map, start, fingers) {
  const apart = ([a, b]) => Math.max(Math.hypot(a.offsetX - b.offsetX, a.offsetY - b.offsetY), 10);
  map.view = [...start.view];
  const middle = {offsetX: (fingers[0].offsetX + fingers[1].offsetX) / 2, offsetY: (fingers[0].offsetY + fingers[1].offsetY) / 2};
  zoom(map, apart(start.fingers) / apart(fingers), at(map, middle, true));
}

function ask(map) {
  const {queries, keys} = map.data, [q0, q1, k0, k1] = map.view;
  const view = [Math.floor(q0 + 1e-6), Math.min(queries, Math.ceil(q1 - 1e-6)), Math.floor(k0 + 1e-6), Math.min(keys, Math.ceil(k1 - 1e-6))];
  if (String(view) === String(map.asked.at(-1) ?? map.data.view)) return;
  map.asked = [...map.asked, view].slice(-8);
  map.send("view", view);
}

// ---- Choosing
// The tokens under the pointer, fractions of a token kept: {q, k}; null beside the map unless `cut` is asked for.
function at(map, event, cut = false) {
  const {left, wide, high} = place(map), [q0, q1, k0, k1] = map.view;
  const x = (event.offsetX - left) / wide, y = (event.offsetY - TOP) / high;
  if (!cut && (x < 0 || x >= 1 || y < 0 || y >= 1)) return null;
  return {q: q0 + clamp(y, 0, 1) * (q1 - q0), k: k0 + clamp(x, 0, 1) * (k1 - k0)};
}

function point(map, spot, event) {
  const cell = spot && [Math.floor(spot.q), Math.floor(spot.k)];
  if (event && spot) {
    map.tip.style.left = `${event.offsetX}px`;
    map.tip.style.top = `${event.offsetY}px`;
    map.tip.classList.toggle("flip", event.offsetX > map.canvas.clientWidth / 2);
  }
  if (String(cell) === String(map.hover)) return;
  map.hover = cell;
  tell(map, cell);
  map.redraw();
}

function chosen(map) {
  const [q0, q1, k0, k1] = map.view, [q, k] = map.cursor ?? [(q0 + q1 - 1) / 2, (k0 + k1 - 1) / 2];
  return {q: clamp(Math.floor(q), Math.floor(q0), Math.ceil(q1) - 1), k: clamp(Math.floor(k), Math.floor(k0), Math.ceil(k1) - 1)};
}

// Moves the chosen cell by one cell of the picture, and the view after it; at first it is the middle one.
function choose(map, [down, right]) {
  const {queries, keys} = map.data, {q, k} = chosen(map), step = map.cursor ? (found(map, q, k)?.layer.size ?? 1) : 0;
  map.cursor = [clamp(q + down * step, 0, queries - 1), clamp(k + right * step, 0, keys - 1)];
  const [q0, q1, k0, k1] = map.view;
  const dq = Math.min(0, map.cursor[0] - q0) || Math.max(0, map.cursor[0] + 1 - q1), dk = Math.min(0, map.cursor[1] - k0) || Math.max(0, map.cursor[1] + 1 - k1);
  if (dq || dk) move(map, [q0 + dq, q1 + dq, k0 + dk, k1 + dk]);
  tell(map, map.cursor);
  map.redraw();
}

function take(map, {q, k}) {
  map.cursor = [Math.floor(q), Math.floor(k)];
  tell(map, map.cursor);
  map.redraw();
  map.send("cell", map.cursor);
}

// The cell of the finest picture that covers a query and a key: {layer, value, rows: [q0, q1], columns: [k0, k1]}.
function found(map, q, k) {
  for (const layer of [...map.layers].reverse()) {
    const [q0, q1, k0, k1] = layer.view;
    if (q < q0 || q >= q1 || k < k0 || k >= k1) continue;
    const row = Math.floor((q - q0) / layer.size), column = Math.floor((k - k0) / layer.size);
    const span = (from, index, to) => [from + index * layer.size, Math.min(from + (index + 1) * layer.size, to)];
    return {layer, value: layer.values[row * layer.columns + column], rows: span(q0, row, q1), columns: span(k0, column, k1)};
  }
  return null;
}

function label(map, side, position) {
  const labels = side ? map.data.key_labels : map.data.query_labels;
  return labels[position - map.data.view[2 * side]];
}

function tell(map, cell) {
  const shown = cell && found(map, ...cell);
  let text = cell ? "no picture of this part yet" : "";
  if (shown) {
    const name = (side, [from, to]) => {
      const word = ["query", "key"][side], token = label(map, side, from);
      if (to - from > 1) return `${side ? "keys" : "queries"} ${count(from)}–${count(to - 1)}`;
      return token === undefined ? `${word} ${count(from)}` : `${word} ${count(from)} \u2068${shortened(readable(token).trim(), 24)}\u2069`;
    };
    const there = !Number.isNaN(shown.value);
    text = `${name(0, shown.rows)} · ${name(1, shown.columns)}: ${measured(shown.value, shown.layer.top)}${there ? ` ${map.data.unit}` : ""}`;
  }
  map.status.textContent = text;
  map.tip.textContent = text;
  map.tip.hidden = !map.hover || !text;
}
