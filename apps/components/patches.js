// An image with its patches coloured by the attention between one token, the query, and all others. Where the weights of
// all tokens are there, another query is shown at once; else when the host has answered.
const SIDE = 520; // pixels of the longer side of the image
const BAR = 84; // pixels for the colour bar beside it

function draw(root, data, send) {
  return updated(memory(root, () => built(root)), data, send);
}

function built(root) {
  const map = {root, query: 0, hover: null, opacity: 0.6, scale: "sqrt", send: null};
  map.redraw = perFrame(() => paint(map));
  map.settle = settled(() => map.send("query", map.query), 120);
  map.title = element("h4");
  map.caption = element("div", {class: "caption"});
  map.canvas = element("canvas", {tabindex: 0, role: "application", class: "map"});
  map.tip = element("div", {class: "tip", "aria-hidden": "true", hidden: true});
  map.extra = element("div", {class: "tools", role: "group", "aria-label": "Tokens that are no patches"});
  map.status = element("div", {class: "status", "aria-live": "polite"});
  const slider = element("input", {type: "range", min: 0, max: 1, step: 0.05, value: map.opacity, "aria-label": "Strength of the colours", input: () => {
    map.opacity = Number(slider.value);
    map.redraw();
  }});
  const scales = element("select", {"aria-label": "Colour scale", change: () => {
    map.scale = scales.value;
    map.redraw();
  }}, ...["sqrt", "linear", "log"].map((name) => element("option", {value: name}, name)));
  root.append(map.title, element("div", {class: "tools"}, element("label", {}, "colours over the image", slider), element("label", {}, "scale", scales)),
    map.caption, map.extra, element("div", {class: "stage"}, map.canvas, map.tip), map.status);
  listen(map);
  watch(root, () => map.data && paint(map));
  return map;
}

async function updated(map, data, send) {
  map.send = send;
  const turn = (map.turn = (map.turn ?? 0) + 1), before = map.data;
  const picture = before?.image === data.image ? map.picture : element("img", {src: data.image, alt: ""});
  await picture.decode();
  const tile = data.tile && (await packedValues(data.tile, data.top));
  if (turn !== map.turn) return; // newer data came while this was decoded
  Object.assign(map, {data, picture, tile});
  if (before?.query !== data.query || String(before.grid) !== String(data.grid)) map.query = data.query;
  map.title.textContent = data.title;
  map.title.hidden = !data.title;
  const [rows, columns] = data.grid;
  map.canvas.setAttribute("aria-label", `Image of ${rows} rows and ${columns} columns of patches ${data.title}. ` +
    "Arrow keys or a click choose the query patch, Home and End the first and the last.");
  buttons(map);
  tell(map, map.hover);
  paint(map);
}

// The weight between the query and a token; null where there is none. It may be of the last query that the host answered.
function weight(map, token) {
  const {data, tile} = map;
  if (!tile) return data.weights[token];
  const value = data.direction === "from" ? tile.values[map.query * tile.columns + token] : tile.values[token * tile.columns + map.query];
  return Number.isNaN(value) ? null : value;
}

// The largest weight of the query, which gets the strongest colour: the weights of another one may all be smaller.
function strongest(map) {
  return map.data.weights.reduce((top, _, token) => Math.max(top, Math.abs(weight(map, token) ?? 0)), 0) || map.data.top;
}

function name(map, token) {
  const {extra, grid} = map.data, patch = token - extra.length;
  return patch < 0 ? extra[token] : `row ${Math.floor(patch / grid[1])}, column ${patch % grid[1]}`;
}

// ---- Choosing
function listen(map) {
  const {canvas} = map;
  canvas.addEventListener("pointermove", (event) => {
    map.tip.style.left = `${event.offsetX}px`;
    map.tip.style.top = `${event.offsetY}px`;
    map.tip.classList.toggle("flip", event.offsetX > canvas.clientWidth / 2);
    hover(map, at(map, event));
  });
  canvas.addEventListener("pointerleave", () => hover(map, null));
  canvas.addEventListener("click", (event) => {
    const token = at(map, event);
    if (token !== null) choose(map, token);
  });
  canvas.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const {grid: [rows, columns], extra} = map.data, patch = Math.max(map.query - extra.length, 0);
    const row = Math.floor(patch / columns), column = patch % columns;
    const to = {
      ArrowUp: [row - 1, column], ArrowDown: [row + 1, column], ArrowLeft: [row, column - 1], ArrowRight: [row, column + 1],
      Home: [0, 0], End: [rows - 1, columns - 1],
    }[event.key];
    if (!to) return;
    event.preventDefault();
    choose(map, extra.length + clamp(to[0], 0, rows - 1) * columns + clamp(to[1], 0, columns - 1));
  });
}

function choose(map, token) {
  if (token === map.query) return;
  map.query = token;
  tell(map, map.hover);
  map.redraw();
  map.settle();
}

function hover(map, token) {
  if (token === map.hover) return;
  map.hover = token;
  tell(map, token);
  map.redraw();
}

// The patch under the pointer as the number of its token; null beside the image.
function at(map, event) {
  const {wide, high} = place(map), {grid: [rows, columns], extra} = map.data;
  const row = Math.floor((event.offsetY / high) * rows), column = Math.floor((event.offsetX / wide) * columns);
  return row < 0 || row >= rows || column < 0 || column >= columns ? null : extra.length + row * columns + column;
}

function tell(map, token) {
  const {direction, unit} = map.data, own = name(map, map.query);
  map.caption.textContent = direction === "from" ? `Colour: where the query (${own}) looks` : `Colour: which tokens look at the query (${own})`;
  const value = token === null ? null : weight(map, token);
  const text = token === null ? "" : `${name(map, token)}: ${value === null ? "not there" : `${number(value)} ${unit}`}`;
  map.tip.textContent = text;
  map.tip.hidden = token === null;
  const here = weight(map, map.query);
  map.status.textContent = text || `${own}: ${here === null ? "not there" : `${number(here)} ${unit}`} on itself`;
}

// ---- Drawing
// How large the image is on the page, in CSS pixels.
function place(map) {
  const {naturalWidth, naturalHeight} = map.picture, room = clamp((map.root.clientWidth || 640) - BAR, 120, SIDE);
  const by = Math.min(room / naturalWidth, SIDE / naturalHeight);
  return {wide: naturalWidth * by, high: naturalHeight * by};
}

function buttons(map) {
  const {extra} = map.data;
  map.extra.hidden = !extra.length;
  if (map.extra.children.length !== extra.length)
    map.extra.replaceChildren(...extra.map((_, token) => element("button", {type: "button", click: () => choose(map, token),
      pointerenter: () => hover(map, token), pointerleave: () => hover(map, null)})));
  extra.forEach((label, token) => (map.extra.children[token].textContent = label));
}

function paint(map) {
  const {canvas, root, data} = map, {wide, high} = place(map), look = theme(root), ratio = devicePixelRatio || 1;
  const width = wide + BAR, height = high + 2, colours = palette(data.signed, look.dark), top = strongest(map);
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
  }
  const pen = canvas.getContext("2d"), [rows, columns] = data.grid;
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, width, height);
  pen.imageSmoothingEnabled = map.picture.naturalWidth > wide;
  pen.drawImage(map.picture, 0, 0, wide, high);
  const box = (r0, c0, r1, c1) => [(c0 * wide) / columns, (r0 * high) / rows, ((c1 - c0) * wide) / columns, ((r1 - r0) * high) / rows];
  const patch = (token) => {
    const index = token - data.extra.length, row = Math.floor(index / columns), column = index % columns;
    return box(row, column, row + 1, column + 1);
  };
  for (let token = data.extra.length; token < data.weights.length; token++) {
    const rgb = colour(weight(map, token), top, map.scale, colours);
    pen.fillStyle = rgb ? `rgb(${rgb})` : look.shade;
    pen.globalAlpha = map.opacity;
    pen.fillRect(...patch(token));
  }
  pen.globalAlpha = 1;
  paintGrid(pen, map, wide, high);
  for (const window of data.windows) outline(pen, box(...window), 2, "#ffffff", "#000000");
  if (map.query >= data.extra.length) outline(pen, patch(map.query), 3, look.accent, look.dark ? "#000000" : "#ffffff");
  if (map.hover !== null && map.hover >= data.extra.length) outline(pen, patch(map.hover), 1, "#ffffff", "#000000");
  paintBar(pen, map, {wide, high, look, colours, top});
  data.extra.forEach((label, token) => {
    const button = map.extra.children[token], value = weight(map, token), rgb = colour(value, top, map.scale, colours);
    button.style.backgroundColor = rgb ? `rgb(${rgb})` : "transparent";
    button.style.color = rgb ? inkOn(rgb) : look.ink;
    button.style.outline = token === map.query ? `3px solid ${look.accent}` : "";
    button.setAttribute("aria-pressed", String(token === map.query));
    button.setAttribute("aria-label", `${label}: ${number(value)}`);
  });
}

function paintGrid(pen, map, wide, high) {
  const [rows, columns] = map.data.grid;
  if (Math.min(wide / columns, high / rows) < 6) return;
  pen.strokeStyle = "rgb(128 128 128 / 45%)";
  pen.lineWidth = 1;
  pen.beginPath();
  for (let row = 0; row <= rows; row++) (pen.moveTo(0, (row * high) / rows), pen.lineTo(wide, (row * high) / rows));
  for (let column = 0; column <= columns; column++) (pen.moveTo((column * wide) / columns, 0), pen.lineTo((column * wide) / columns, high));
  pen.stroke();
}

// A frame inside of its box, with a halo so that it is seen on dark and on bright patches.
function outline(pen, [x, y, wide, high], width, style, halo) {
  for (const [line, ink] of [[width + 2, halo], [width, style]]) {
    pen.lineWidth = line;
    pen.strokeStyle = ink;
    pen.strokeRect(x + width / 2 + 1, y + width / 2 + 1, wide - width - 2, high - width - 2);
  }
}

function paintBar(pen, map, {wide, high, look, colours, top}) {
  const {signed, unit} = map.data, left = wide + 14, tall = Math.min(high - 20, 260);
  for (let line = 0; line < tall; line++) {
    const share = signed ? 1 - (2 * line) / (tall - 1) : 1 - line / (tall - 1), from = 3 * Math.round(255 * Math.abs(share));
    pen.fillStyle = `rgb(${(share < 0 ? colours.minus : colours.plus).slice(from, from + 3)})`;
    pen.fillRect(left, line + 1, 12, 1.5);
  }
  pen.lineWidth = 1;
  pen.strokeStyle = look.line;
  pen.strokeRect(left - 0.5, 0.5, 13, tall + 1);
  pen.font = `11px ${look.font}`;
  pen.textAlign = "left";
  pen.textBaseline = "middle";
  pen.fillStyle = look.ink;
  for (const share of signed ? [1, 0.5, 0, -0.5, -1] : [1, 0.75, 0.5, 0.25, 0]) {
    const middle = clamp((signed ? (1 - share) / 2 : 1 - share) * tall, 6, tall - 5);
    const value = Math.sign(share || 1) * (share || map.scale === "log" ? valueAt(Math.abs(share), top, map.scale) : 0);
    pen.fillText((map.scale === "log" && !share ? "≤ " : "") + brief(value), left + 17, middle);
  }
  pen.fillStyle = look.dim;
  pen.fillText(shortened(unit, 12), left, tall + 13);
}
