// Nodes in columns and rows, rows upwards, joined by edges. The host says where they stand and what is kept.
const ZOOMED = 8; // times the whole graph, at most

function draw(root, data, send) {
  const graph = memory(root, () => built(root));
  const before = graph.data;
  graph.send = send;
  graph.data = data;
  graph.nodes = new Map(data.nodes.map((node) => [nodeKey(node.id), node]));
  graph.edges = new Map(data.edges.map((edge) => [edgeKey(edge), edge]));
  graph.top = most(data.nodes);
  graph.selected = data.selected === null ? null : typeof data.selected === "string" ? nodeKey(data.selected) : edgeKey(data.selected);
  for (const name of ["cursor", "hover"]) if (!item(graph, graph[name])) graph[name] = null;
  graph.cursor ??= item(graph, graph.selected) ? graph.selected : null;
  graph.title.textContent = data.title;
  graph.title.hidden = !data.title;
  graph.svg.setAttribute("aria-label", `Graph ${data.title}: ${data.nodes.length} nodes and ${data.edges.length} edges. ` +
    "Arrow keys go from node to node, Shift and arrows through the edges of a node, Enter takes what is chosen, plus and minus zoom, zero shows all.");
  const shape = ({columns, rows, spacing}) => JSON.stringify([columns, rows, spacing]);
  if (!before || shape(before) !== shape(data)) graph.view = whole(graph);
  paint(graph);
  tell(graph, graph.hover ?? (focused(graph) ? graph.cursor : null));
}

const nodeKey = (id) => `n ${id}`;
const edgeKey = ({source, target, channel}) => `e ${source}->${target}<${channel}>`;
const item = (graph, key) => key && (graph.nodes.get(key) ?? graph.edges.get(key));
const focused = (graph) => graph.root.getRootNode().activeElement === graph.svg;

function built(root) {
  const graph = {root, shown: new Map(), hover: null, cursor: null, view: null};
  graph.title = element("h4");
  graph.style = element("style", {}, GRAPH_STYLE);
  graph.svg = element("svg", {class: "graph", tabindex: 0, role: "application", preserveAspectRatio: "xMidYMid meet"});
  graph.layers = Object.fromEntries(["names", "marks", "edges", "nodes"].map((name) => [name, element("g", {class: name})]));
  graph.svg.append(...Object.values(graph.layers));
  graph.tip = element("div", {class: "tip", "aria-hidden": "true", hidden: true});
  graph.status = element("div", {class: "status", "aria-live": "polite"});
  graph.note = element("span", {class: "note"});
  graph.legend = element("div", {class: "keys"});
  const button = (text, label, action) => element("button", {type: "button", "aria-label": label, title: label, click: action}, text);
  root.append(graph.style, graph.title,
    element("div", {class: "tools"}, button("−", "Zoom out", () => zoom(graph, 1.4)), button("+", "Zoom in", () => zoom(graph, 1 / 1.4)),
      button("Show all", "Show the whole graph", () => move(graph, whole(graph))), graph.note,
      element("details", {}, element("summary", {}, "Controls"), element("div", {class: "card"},
        "Click takes a node or an edge, drag moves, Ctrl and wheel zoom (the wheel alone once the graph has the focus), double click shows all. " +
        "On the keyboard: arrows go from node to node, Shift and arrows through the edges of a node, Enter takes, " +
        "Escape lets go, + and − zoom, 0 shows all."))),
    element("div", {class: "stage"}, graph.svg, graph.tip), graph.legend, graph.status);
  listen(graph);
  watch(root, () => graph.data && paint(graph));
  return graph;
}

// ---- Moving
// The part that shows everything: [x, y, width, height] in the units of the picture.
function whole({data}) {
  const [across, up] = data.spacing, xs = data.nodes.map((node) => node.column * across), ys = data.nodes.map((node) => -node.row * up);
  const far = (values, add) => Math.max(...values, 0) + add, near = (values, add) => Math.min(...values, 0) - add;
  const left = near(xs, 138), top = near(ys, 34);
  return [left, top, far(xs, 56) - left, far(ys, 52) - top];
}

function move(graph, [x, y, wide, high]) {
  const [left, top, most, tall] = whole(graph);
  graph.view = [clamp(x, left - wide / 2, left + most - wide / 2), clamp(y, top - high / 2, top + tall - high / 2), wide, high];
  graph.svg.setAttribute("viewBox", graph.view.join(" "));
  paintNames(graph);
}

// Zooms about a point of the picture, by default about its middle.
function zoom(graph, factor, point) {
  const [x, y, wide, high] = graph.view, most = whole(graph)[2];
  const by = clamp(factor, most / ZOOMED / wide, (1.2 * most) / wide), [px, py] = point ?? [x + wide / 2, y + high / 2];
  move(graph, [px - (px - x) * by, py - (py - y) * by, wide * by, high * by]);
}

// A place on the screen in the units of the picture.
function spot(graph, event) {
  const matrix = graph.svg.getScreenCTM();
  const {x, y} = new DOMPoint(event.clientX, event.clientY).matrixTransform(matrix.inverse());
  return [x, y];
}

function listen(graph) {
  const {svg} = graph, under = (event) => event.target.closest?.("[data-item]")?.dataset.item ?? null;
  let start = null, dragged = -1e9;
  svg.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && !event.metaKey && !focused(graph)) return; // the page scrolls
    event.preventDefault();
    zoom(graph, Math.exp(clamp(event.deltaY * (event.deltaMode ? 30 : 1), -300, 300) * 0.002), spot(graph, event));
  }, {passive: false});
  svg.addEventListener("pointerdown", (event) => {
    if (!event.button && event.isPrimary) start = {x: event.clientX, y: event.clientY, view: graph.view, moved: false};
  });
  svg.addEventListener("pointermove", (event) => {
    if (start && !start.moved && Math.hypot(event.clientX - start.x, event.clientY - start.y) > 4) {
      start.moved = true;
      svg.setPointerCapture(event.pointerId);
    }
    if (!start?.moved) return point(graph, under(event), event);
    const {a} = svg.getScreenCTM(), [x, y, wide, high] = start.view;
    move(graph, [x - (event.clientX - start.x) / a, y - (event.clientY - start.y) / a, wide, high]);
    dragged = event.timeStamp;
  });
  for (const name of ["pointerup", "pointercancel"]) svg.addEventListener(name, () => (start = null));
  svg.addEventListener("pointerleave", () => point(graph, null));
  svg.addEventListener("click", (event) => {
    const key = under(event);
    if (event.timeStamp - dragged < 80 || !key) return;
    graph.cursor = key;
    take(graph, key);
  });
  svg.addEventListener("dblclick", (event) => under(event) || move(graph, whole(graph)));
  svg.addEventListener("focus", () => {
    tell(graph, graph.cursor);
    mark(graph);
  });
  svg.addEventListener("blur", () => mark(graph));
  svg.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const step = {ArrowUp: [0, -1], ArrowDown: [0, 1], ArrowLeft: [-1, 0], ArrowRight: [1, 0]}[event.key];
    if (step && event.shiftKey) walk(graph, step[0] + step[1]);
    else if (step) go(graph, nearest(graph, step));
    else if (event.key === "Enter" && graph.cursor) take(graph, graph.cursor);
    else if (event.key === "Escape") go(graph, null);
    else if (event.key === "+" || event.key === "=") zoom(graph, 1 / 1.4);
    else if (event.key === "-" || event.key === "_") zoom(graph, 1.4);
    else if (event.key === "0") move(graph, whole(graph));
    else return;
    event.preventDefault();
  });
}

// ---- Choosing
function point(graph, key, event) {
  if (event && key) {
    const frame = graph.svg.parentElement.getBoundingClientRect();
    graph.tip.style.left = `${event.clientX - frame.left}px`;
    graph.tip.style.top = `${event.clientY - frame.top}px`;
    graph.tip.classList.toggle("flip", event.clientX - frame.left > frame.width / 2);
  }
  if (key === graph.hover) return;
  graph.hover = key;
  tell(graph, key ?? (focused(graph) ? graph.cursor : null));
  mark(graph);
}

function go(graph, key) {
  graph.cursor = key;
  tell(graph, key);
  mark(graph);
  const at = key && (graph.nodes.get(key) ?? graph.nodes.get(nodeKey(graph.edges.get(key).target)));
  if (!at) return;
  const {x, y} = place(graph, at), [left, top, wide, high] = graph.view;
  const outside = (value, from, size) => Math.min(0, value - from - 0.08 * size) + Math.max(0, value - from - 0.92 * size);
  const [across, down] = [outside(x, left, wide), outside(y, top, high)];
  if (across || down) move(graph, [left + across, top + down, wide, high]);
}

function take(graph, key) {
  mark(graph);
  const node = graph.nodes.get(key);
  if (node) return graph.send("node", node.id);
  const {source, target, channel} = graph.edges.get(key);
  graph.send("edge", {source, target, channel});
}

// The next node in a direction: a step to the side counts for more than a step ahead.
function nearest(graph, [right, down]) {
  const from = graph.nodes.get(graph.cursor) ?? graph.nodes.get(nodeKey(graph.edges.get(graph.cursor)?.source));
  if (!from) return graph.nodes.keys().next().value ?? null;
  const here = place(graph, from);
  let best = null, least = Infinity;
  for (const [key, node] of graph.nodes) {
    const {x, y} = place(graph, node), ahead = right * (x - here.x) + down * (y - here.y);
    const aside = Math.abs(right ? y - here.y : x - here.x);
    if (ahead > 1 && ahead + 2.5 * aside < least) [best, least] = [key, ahead + 2.5 * aside];
  }
  return best ?? graph.cursor ?? nodeKey(from.id);
}

// Goes through the edges of the node that was chosen last, the strongest first.
function walk(graph, step) {
  if (graph.nodes.has(graph.cursor)) graph.walked = graph.nodes.get(graph.cursor).id;
  const own = [...graph.edges].filter(([, edge]) => edge.source === graph.walked || edge.target === graph.walked)
    .sort(([, a], [, b]) => Math.abs(b.score) - Math.abs(a.score)).map(([key]) => key);
  if (!own.length) return;
  const at = own.indexOf(graph.cursor);
  go(graph, own[at < 0 ? (step > 0 ? 0 : own.length - 1) : (at + step + own.length) % own.length]);
}

// ---- Words
function tell(graph, key) {
  const found = item(graph, key), text = found ? words(graph, key, found) : "";
  graph.status.textContent = text;
  graph.tip.textContent = text;
  graph.tip.hidden = !text || key !== graph.hover;
}

function words(graph, key, found) {
  const {unit, groups, truth} = graph.data, node = graph.nodes.get(key);
  const name = (id) => graph.nodes.get(nodeKey(id))?.text || graph.nodes.get(nodeKey(id))?.label || id;
  const input = {q: "query input of ", k: "key input of ", v: "value input of "}[found.channel] ?? "";
  const said = [node ? found.text || found.label : `${name(found.source)} → ${input}${name(found.target)}`];
  if (found.score !== null) said.push(`${number(found.score)}${unit ? ` ${unit}` : ""}`);
  if (groups.length && found.group !== null) said.push(groups[found.group]);
  else if (found.score !== null || !node) said.push(found.kept ? "kept" : "not kept");
  if (truth) said.push(found.truth ? "in the known circuit" : "not in the known circuit");
  return said.map((part) => readable(part)).join(" · ");
}
