// How the graph looks. Sign is told by colour and by dashes, membership in the known circuit by a colour and by its shape.
const GRAPH_STYLE = `
.stage:has(> .graph) { width: 100%; }
.graph { display: block; width: 100%; background: var(--paper); border: 1px solid var(--line); border-radius: 6px; cursor: grab; touch-action: pan-y; }
.graph:focus-visible { outline-offset: -2px; }
.graph text { font-size: 12px; fill: var(--ink); text-anchor: middle; dominant-baseline: central; pointer-events: none; user-select: none; }
.graph .names text { fill: var(--dim); font-size: inherit; }
.graph .names text.row { text-anchor: start; }
.graph .small { font-size: 9px; fill: var(--dim); }
.graph [data-item] { cursor: pointer; }
.graph path { fill: none; }
.graph .hit { stroke: transparent; stroke-width: 12; }
.graph .faint { opacity: 0.4; }
.graph.hovered .item:not(.hot) { opacity: 0.13; }
.keys { display: flex; flex-wrap: wrap; gap: 2px 16px; margin-top: 4px; font-size: 12px; color: var(--dim); }
.keys span { display: inline-flex; align-items: center; gap: 5px; }
.keys svg { width: 34px; height: 14px; overflow: visible; }
`;
const BOX = {wide: 66, high: 36};
const PORTS = {q: -22, k: 0, v: 22};
const BOXED = new Set(["input", "head", "group", "mlp", "logits"]);

const place = (graph, node) => ({x: node.column * graph.data.spacing[0], y: -node.row * graph.data.spacing[1]});
const most = (items) => Math.max(...items.map((item) => Math.abs(item.score ?? 0)), 1e-300);

function paint(graph) {
  const {data, svg, root} = graph, look = theme(root), colours = palette(true, look.dark);
  const rgb = (table, at) => `rgb(${table.slice(3 * at, 3 * at + 3)})`;
  const high = look.dark ? 190 : 175;
  const ink = {look, colours, plus: rgb(colours.plus, high), minus: rgb(colours.minus, high), truth: look.dark ? "#3ddc97" : "#067a52"};
  const frame = whole(graph);
  svg.style.height = `${clamp(((root.clientWidth || 640) * frame[3]) / frame[2], 280, 660)}px`;
  svg.setAttribute("viewBox", graph.view.join(" "));
  paintNames(graph);
  const strongest = most(data.edges);
  const edges = [...graph.edges].sort(([, a], [, b]) => a.kept - b.kept || Math.abs(a.score) - Math.abs(b.score));
  keyed(graph, graph.layers.edges, edges.map(([key, edge]) => [key, paintedEdge(graph, key, edge, strongest, ink)]));
  keyed(graph, graph.layers.nodes, [...graph.nodes].map(([key, node]) => [key, paintedNode(graph, key, node, ink)]));
  graph.ink = ink;
  graph.note.textContent = [data.threshold === null ? "" : `|score| ≥ ${number(data.threshold)}`,
    data.left_out ? `${count(data.left_out)} weaker edges are not drawn` : ""].filter(Boolean).join(" · ");
  paintLegend(graph, ink);
  mark(graph);
}

// Replaces the children of a layer; nothing in it has the focus, which the whole picture keeps.
function keyed(graph, layer, made) {
  layer.replaceChildren(...made.map(([, child]) => child));
  for (const [key, child] of made) graph.shown.set(key, child);
  for (const key of graph.shown.keys()) if (!graph.nodes.has(key) && !graph.edges.has(key)) graph.shown.delete(key);
}

// Names keep their size on the screen, as far as there is room for them.
function paintNames(graph) {
  const {data} = graph, {spots} = data, [across, up] = data.spacing, [left] = whole(graph);
  const scale = Math.min((graph.svg.clientWidth || 640) / graph.view[2], (graph.svg.clientHeight || 400) / graph.view[3]);
  const size = clamp(11.5 / scale, 6, 19);
  const lowest = Math.max(...data.nodes.map((node) => -node.row * up), 0) + 40;
  const room = (i) => across * Math.min(...[i - 1, i + 1].map((j) => Math.abs((spots[j] ?? Infinity) - spots[i])), 2);
  graph.svg.style.fontSize = `${size}px`;
  graph.layers.names.replaceChildren(
    ...data.columns.map((name, i) => element("text", {x: spots[i] * across, y: lowest}, shortened(readable(name), Math.max(2, Math.floor(room(i) / (0.58 * size)))))),
    ...data.rows.map((name, i) => element("text", {class: "row", x: left + 8, y: -i * up}, shortened(readable(name), 14))));
}

// ---- Edges
// From the top of the source to an input of the target. Edges past others in the same column bow to the side.
function course(graph, edge) {
  const from = graph.nodes.get(nodeKey(edge.source)), to = graph.nodes.get(nodeKey(edge.target));
  const a = place(graph, from), b = place(graph, to), [across, up] = graph.data.spacing;
  const x0 = a.x, y0 = a.y - reach(graph, from), x1 = b.x + (BOXED.has(to.kind) ? (PORTS[edge.channel] ?? 0) : 0), y1 = b.y + reach(graph, to);
  const bend = Math.max(14, Math.abs(y0 - y1) * 0.45);
  const bow = Math.abs(a.x - b.x) < 0.4 * across && Math.abs(a.y - b.y) > 1.3 * up ? 0.55 * across : 0;
  const c = [x0 + bow, y0 - bend, x1 + bow, y1 + bend];
  return {d: `M${x0} ${y0}C${c[0]} ${c[1]} ${c[2]} ${c[3]} ${x1} ${y1}`,
    middle: [(x0 + 3 * c[0] + 3 * c[2] + x1) / 8, (y0 + 3 * c[1] + 3 * c[3] + y1) / 8]};
}
const reach = (graph, node) => (BOXED.has(node.kind) ? BOX.high / 2 : radius(graph, node));
const radius = (graph, node) => 4.5 + 6 * Math.sqrt(Math.abs(node.score ?? 0) / graph.top);

function stroke(graph, edge, ink) {
  const grouped = graph.data.groups.length && edge.group !== null;
  const minus = grouped ? edge.group === 1 : edge.score < 0;
  return {colour: grouped && edge.group === 2 ? ink.look.ink : minus ? ink.minus : ink.plus, dash: minus ? "7 4" : null};
}

function paintedEdge(graph, key, edge, top, ink) {
  const {d, middle: [x, y]} = course(graph, edge), {colour, dash} = stroke(graph, edge, ink);
  const missing = edge.truth && !edge.kept, wide = 0.9 + 5 * (Math.abs(edge.score) / top);
  const parts = [element("path", {class: "hit", d})];
  if (edge.truth && edge.kept) parts.push(element("path", {d, stroke: ink.truth, "stroke-width": wide + 5, opacity: 0.35}));
  parts.push(missing ? element("path", {d, stroke: ink.truth, "stroke-width": 2.4, "stroke-dasharray": "1 6", "stroke-linecap": "round"})
    : element("path", {d, class: edge.kept ? null : "faint", stroke: colour, opacity: edge.kept ? 0.35 + 0.65 * Math.sqrt(Math.abs(edge.score) / top) : null, "stroke-width": edge.kept ? wide : Math.min(wide, 1.6), "stroke-dasharray": dash}));
  if (edge.truth) parts.push(element("polygon", {points: diamond(x, y, 5), fill: missing ? ink.look.paper : ink.truth, stroke: ink.truth, "stroke-width": 1.5}));
  return element("g", {class: "item edge", "data-item": key}, ...parts);
}
const diamond = (x, y, r) => `${x},${y - r} ${x + r},${y} ${x},${y + r} ${x - r},${y}`;

// ---- Nodes
function outline(graph, node, more, attributes) {
  const {x, y} = place(graph, node), r = radius(graph, node) + more;
  if (BOXED.has(node.kind)) {
    const [wide, high] = [BOX.wide + 2 * more, BOX.high + 2 * more];
    return element("rect", {x: x - wide / 2, y: y - high / 2, width: wide, height: high, rx: 6 + more, ...attributes});
  }
  if (node.kind.endsWith("error")) return element("polygon", {points: diamond(x, y, r * 1.2), ...attributes});
  if (node.kind === "embedding" || node.kind === "logit") return element("rect", {x: x - r, y: y - r, width: 2 * r, height: 2 * r, rx: 1.5, ...attributes});
  return element("circle", {cx: x, cy: y, r, ...attributes});
}

function paintedNode(graph, key, node, ink) {
  const {x, y} = place(graph, node), {look, colours} = ink, boxed = BOXED.has(node.kind), there = node.score !== null;
  const grouped = graph.data.groups.length && node.group !== null;
  const value = there ? colour(node.score, graph.top, "sqrt", colours) : null;
  const fill = grouped ? look.shade : value ? `rgb(${value})` : look.shade;
  const edge = grouped ? stroke(graph, node, ink) : {colour: look.ink, dash: node.kept ? null : "3 3"};
  const parts = [];
  if (node.truth) parts.push(outline(graph, node, 4.5, {fill: "none", stroke: ink.truth, "stroke-width": 2.4, "stroke-dasharray": node.kept ? null : "1 5", "stroke-linecap": "round"}));
  parts.push(outline(graph, node, 0, {fill, stroke: edge.colour, "stroke-width": node.kept ? 1.6 : 1, "stroke-dasharray": edge.dash, opacity: node.kept ? 1 : 0.6}));
  const text = !grouped && value ? inkOn(value) : look.ink;
  if (boxed) {
    parts.push(element("text", {x, y: there ? y - 6 : y, style: `fill:${text}`}, shortened(readable(node.label), 10)));
    if (there) parts.push(element("text", {x, y: y + 9, class: "small", style: `fill:${text}`}, short(node.score, graph.top)));
    for (const channel of node.ports) parts.push(element("text", {x: x + PORTS[channel], y: y + BOX.high / 2 + 7, class: "small"}, channel));
  } else if (node.kind === "logit") parts.push(element("text", {x, y: y - radius(graph, node) - 9, style: "font-size: inherit"}, shortened(readable(node.label), 12)));
  return element("g", {class: "item node", "data-item": key}, ...parts);
}
function short(value, top) {
  const size = Math.abs(value), sign = value < 0 ? "−" : "+";
  if (size < 1e-9 * top) return "0"; // what rounding leaves
  return sign + (size < 0.001 || size >= 1e4 ? size.toExponential(0).replace("-", "−") : String(Number(size.toPrecision(2))));
}

// ---- Marks: what the pointer is on, what is chosen with the keyboard, what the host shows
function mark(graph) {
  const hot = graph.hover, near = new Set(hot ? [hot] : []);
  for (const [key, edge] of graph.edges) {
    const ends = [nodeKey(edge.source), nodeKey(edge.target)];
    if (key === hot) ends.forEach((end) => near.add(end));
    else if (ends.includes(hot)) [key, ...ends].forEach((end) => near.add(end));
  }
  graph.svg.classList.toggle("hovered", Boolean(hot));
  for (const [key, child] of graph.shown) child.classList.toggle("hot", near.has(key));
  const ring = (key, attributes) => {
    const node = graph.nodes.get(key), edge = graph.edges.get(key);
    if (node) return [outline(graph, node, 8, {fill: "none", ...attributes})];
    return edge ? [element("path", {d: course(graph, edge).d, opacity: 0.7, ...attributes, "stroke-width": 9})] : [];
  };
  const {accent} = graph.ink.look;
  graph.layers.marks.replaceChildren(...ring(graph.selected, {class: "selected", stroke: accent, "stroke-width": 3}),
    ...(focused(graph) ? ring(graph.cursor, {class: "cursor", stroke: accent, "stroke-width": 2, "stroke-dasharray": "5 3"}) : []));
}

function paintLegend(graph, ink) {
  const {data} = graph, line = (attributes) => element("svg", {viewBox: "0 0 34 14"}, element("path", {d: "M0 7H34", fill: "none", "stroke-width": 3, ...attributes}));
  const sample = (shape, text) => element("span", {}, shape, text), {look} = ink;
  const dot = (shape) => element("svg", {viewBox: "0 0 34 14"}, shape);
  const keys = data.groups.length ? data.groups.map((name, group) => {
    const {colour, dash} = stroke(graph, {group, score: 0}, ink);
    return sample(line({stroke: colour, "stroke-dasharray": dash}), name);
  }) : [sample(line({stroke: ink.plus}), "positive"), sample(line({stroke: ink.minus, "stroke-dasharray": "7 4"}), "negative")];
  const all = [...data.nodes, ...data.edges];
  if (!data.groups.length && all.some((one) => !one.kept && !one.truth))
    keys.push(sample(line({stroke: ink.plus, "stroke-width": 1.5, opacity: 0.4}), "faint: not kept"));
  if (data.truth) {
    const crossed = (fill, dash) => element("svg", {viewBox: "0 0 34 14"},
      element("path", {d: "M0 7H34", fill: "none", stroke: ink.truth, "stroke-width": 2.5, "stroke-dasharray": dash, "stroke-linecap": "round"}),
      element("polygon", {points: diamond(17, 7, 5), fill, stroke: ink.truth, "stroke-width": 1.5}));
    keys.push(sample(crossed(ink.truth, null), "in the known circuit"), sample(crossed(look.paper, "1 6"), "in the known circuit, not kept"));
  }
  const kinds = new Set(data.nodes.map((node) => node.kind)), drawn = {fill: look.shade, stroke: look.ink, "stroke-width": 1.4};
  if (kinds.has("feature")) keys.push(sample(dot(element("circle", {cx: 17, cy: 7, r: 6, ...drawn})), "feature"));
  if ([...kinds].some((kind) => kind.endsWith("error"))) keys.push(sample(dot(element("polygon", {points: diamond(17, 7, 7), ...drawn})), "what the coder leaves"));
  if (kinds.has("embedding")) keys.push(sample(dot(element("rect", {x: 11, y: 1, width: 12, height: 12, ...drawn})), "token, logit"));
  graph.legend.replaceChildren(...keys);
}
