// How the tile map is painted: pictures, numbers, crosses, axes and the bar of colours, all on one canvas.
const TOP = 8, RIGHT = 78; // pixels above the map, and for the bar of colours beside it
const LABELLED = 64; // tokens on a side that are shown as text
const LETTERS = 72; // pixels for a token and its position on an axis

// Where the map lies on the canvas, in CSS pixels: as wide as fits beside its axes, which are wider where they hold words; as high
// as its shape asks for.
function place(map) {
  const {queries, keys, query_labels, key_labels} = map.data;
  const left = query_labels.length ? LETTERS + 28 : 30 + 7 * count(queries - 1).length, under = key_labels.length ? LETTERS + 26 : 48;
  const wide = clamp((map.root.clientWidth || 640) - left - RIGHT, 120, 640);
  return {left, under, wide, high: clamp((wide * queries) / keys, Math.min(wide, 140), 640)};
}

function paint(map) {
  const {canvas, root, data} = map, {left, under, wide, high} = place(map), look = theme(root), ratio = devicePixelRatio || 1;
  const width = left + wide + RIGHT, height = TOP + high + under;
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
  }
  const pen = canvas.getContext("2d"), [q0, q1, k0, k1] = map.view;
  const x = (k) => left + ((k - k0) / (k1 - k0)) * wide, y = (q) => TOP + ((q - q0) / (q1 - q0)) * high;
  const frame = {x, y, left, under, wide, high, look, ratio, colours: palette(data.signed, look.dark)};
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, width, height);
  pen.save();
  pen.beginPath();
  pen.rect(left, TOP, wide, high);
  pen.clip();
  for (const layer of map.layers) paintLayer(pen, map, layer, frame);
  paintNumbers(pen, map, frame);
  paintCrosses(pen, map, frame);
  pen.restore();
  pen.strokeStyle = look.line;
  pen.strokeRect(left - 0.5, TOP - 0.5, wide + 1, high + 1);
  paintAxis(pen, map, frame, 0);
  paintAxis(pen, map, frame, 1);
  paintBar(pen, map, frame);
}

function paintLayer(pen, map, layer, {x, y, look, colours, ratio}) {
  const {data} = map, [q0, q1, k0, k1] = layer.view, made = [data.top, map.scale, data.signed, look.dark].join();
  if (layer.made !== made) {
    layer.cells = coloured(layer, data.top, map.scale, colours);
    layer.made = made;
  }
  const left = x(k0), upper = y(q0), cell = x(k0 + layer.size) - left;
  pen.save();
  pen.beginPath();
  pen.rect(left, upper, x(k1) - left, y(q1) - upper);
  pen.clip();
  pen.fillStyle = look.shade;
  pen.fillRect(left, upper, x(k1) - left, y(q1) - upper);
  pen.imageSmoothingEnabled = cell * ratio < 1;
  pen.drawImage(layer.cells, left, upper, x(k0 + layer.columns * layer.size) - left, y(q0 + layer.rows * layer.size) - upper);
  pen.restore();
}

function coloured({rows, columns, values}, top, scale, colours) {
  const cells = new OffscreenCanvas(columns, rows), pen = cells.getContext("2d"), pixels = pen.createImageData(columns, rows);
  const plus = opaque(colours.plus), minus = opaque(colours.minus), all = new Uint32Array(pixels.data.buffer);
  for (let i = 0; i < all.length; i++) {
    const value = values[i];
    if (Number.isNaN(value)) continue; // stays transparent
    all[i] = (value < 0 ? minus : plus)[Math.round(255 * level(value, top, scale))];
  }
  pen.putImageData(pixels, 0, 0);
  return cells;
}

// A table of [r, g, b, r, g, b, ...] as whole pixels, each one number in the order of this machine's bytes.
function opaque(table) {
  const bytes = new Uint8Array((4 * table.length) / 3).fill(255);
  for (let i = 0; i < table.length; i++) bytes[4 * Math.floor(i / 3) + (i % 3)] = table[i];
  return new Uint32Array(bytes.buffer);
}

// Where cells are large, their values stand in them.
function paintNumbers(pen, map, {x, y, look, colours}) {
  const {data, layer} = map, [q0, q1, k0, k1] = map.view;
  if (layer.size > 1 || x(1) - x(0) < 46 || y(1) - y(0) < 18) return;
  pen.font = `11px ${look.font}`;
  pen.textAlign = "center";
  pen.textBaseline = "middle";
  for (let q = Math.floor(q0); q < q1; q++)
    for (let k = Math.floor(k0); k < k1; k++) {
      const shown = found(map, q, k), rgb = shown && colour(shown.value, data.top, map.scale, colours);
      if (!rgb || shown.layer.size > 1) continue;
      pen.fillStyle = inkOn(rgb);
      pen.fillText(brief(shown.value), x(k + 0.5), y(q + 0.5));
    }
}

function paintCrosses(pen, map, {x, y, left: start, wide, high, look}) {
  const lines = ([q, k], size, style, dash) => {
    pen.strokeStyle = style;
    pen.setLineDash(dash);
    const [near, far, upper, lower] = [x(k), x(k + size), y(q), y(q + size)];
    if (far - near > 6) pen.strokeRect(near, upper, far - near, lower - upper);
    for (const across of far - near > 6 ? [near, far] : [(near + far) / 2]) stroke(pen, across, TOP, across, TOP + high);
    for (const down of lower - upper > 6 ? [upper, lower] : [(upper + lower) / 2]) stroke(pen, start, down, start + wide, down);
    pen.setLineDash([]);
  };
  const twice = (cell, size, style, dash) => { // a halo, so that the line is seen on dark and on bright cells
    pen.lineWidth = 3;
    lines(cell, size, look.dark ? "#0008" : "#fff8", []);
    pen.lineWidth = 1;
    lines(cell, size, style, dash);
  };
  const focused = map.root.getRootNode().activeElement === map.canvas && map.cursor;
  if (map.data.cross) twice(map.data.cross, 1, look.accent, []);
  if (map.cursor && (focused || !map.data.cross)) twice(map.cursor, 1, look.accent, []);
  const under = map.hover && found(map, ...map.hover);
  if (under) twice([under.rows[0], under.columns[0]], under.layer.size, look.ink, [3, 3]);
  if (!map.box) return;
  const [a, b] = map.box;
  pen.fillStyle = look.dark ? "#fff3" : "#0002";
  pen.fillRect(a.offsetX, a.offsetY, b.offsetX - a.offsetX, b.offsetY - a.offsetY);
  pen.strokeStyle = look.accent;
  pen.strokeRect(a.offsetX, a.offsetY, b.offsetX - a.offsetX, b.offsetY - a.offsetY);
}
function stroke(pen, ...[x0, y0, x1, y1]) {
  pen.beginPath();
  pen.moveTo(x0, y0);
  pen.lineTo(x1, y1);
  pen.stroke();
}

// Queries (side 0) down the left edge, keys (side 1) along the lower one. Keys are drawn with the page turned.
function paintAxis(pen, map, {x, y, left, under, wide, high, look}, side) {
  const [from, to] = map.view.slice(2 * side, 2 * side + 2), long = side ? wide : high, token = long / (to - from);
  const words = to - from <= LABELLED && (side ? map.data.key_labels : map.data.query_labels).length > 0;
  const step = words ? Math.max(1, Math.ceil(10 / token)) : tickStep((to - from) * ((side ? 54 : 26) / long));
  pen.save();
  pen.textBaseline = "middle";
  pen.font = `600 12px ${look.font}`;
  pen.fillStyle = look.dim;
  pen.textAlign = "center";
  if (side) pen.fillText("key (attended to)", left + wide / 2, TOP + high + (words ? under - 8 : 36));
  else {
    pen.translate(9, TOP + high / 2);
    pen.rotate(-Math.PI / 2);
    pen.fillText("query (attends)", 0, 0);
    pen.setTransform(devicePixelRatio || 1, 0, 0, devicePixelRatio || 1, 0, 0);
  }
  pen.font = `${words && token < 12 ? 10 : 11}px ${look.font}`;
  for (let position = Math.ceil(from / step) * step; position < to; position += step) {
    const middle = side ? x(position + 0.5) : y(position + 0.5), start = side ? left : TOP;
    if (middle < start || middle > start + long) continue;
    pen.strokeStyle = look.line;
    if (side) stroke(pen, middle, TOP + high, middle, TOP + high + 4);
    else stroke(pen, left - 4, middle, left, middle);
    const word = words ? label(map, side, position) : undefined;
    pen.save();
    pen.translate(side ? middle : left - 7, side ? TOP + high + 7 : middle);
    if (side && words) pen.rotate(-Math.PI / 2);
    pen.textAlign = side && !words ? "center" : "right";
    if (side && !words) pen.translate(0, 6);
    pen.fillStyle = word === undefined ? look.dim : look.ink;
    if (word === undefined) pen.fillText(count(position), 0, 0);
    else {
      const text = shortened(readable(word), 8), where = count(position);
      const [long, short] = [text, where].map((part) => pen.measureText(part).width);
      pen.fillText(text, 0, 0);
      pen.fillStyle = look.dim;
      if (long + short + 6 < LETTERS) pen.fillText(where, short - LETTERS, 0);
    }
    pen.restore();
  }
  pen.restore();
}
const tickStep = (least) => {
  const ten = 10 ** Math.floor(Math.log10(Math.max(least, 1)));
  return [1, 2, 5, 10].map((times) => times * ten).find((step) => step >= least - 1e-9);
};

function paintBar(pen, map, {left, wide, high, look, colours}) {
  const {top, signed, unit} = map.data, x = left + wide + 14, tall = Math.min(high, 260);
  for (let line = 0; line < tall; line++) {
    const share = signed ? 1 - (2 * line) / (tall - 1) : 1 - line / (tall - 1), at = 3 * Math.round(255 * Math.abs(share));
    pen.fillStyle = `rgb(${(share < 0 ? colours.minus : colours.plus).slice(at, at + 3)})`;
    pen.fillRect(x, TOP + line, 12, 1.5);
  }
  pen.strokeStyle = look.line;
  pen.strokeRect(x - 0.5, TOP - 0.5, 13, tall + 1);
  pen.font = `11px ${look.font}`;
  pen.fillStyle = look.ink;
  pen.textAlign = "left";
  pen.textBaseline = "middle";
  for (const share of signed ? [1, 0.5, 0, -0.5, -1] : [1, 0.75, 0.5, 0.25, 0]) {
    const middle = TOP + clamp((signed ? (1 - share) / 2 : 1 - share) * tall, 5, tall - 5);
    const value = Math.sign(share || 1) * (share || map.scale === "log" ? valueAt(Math.abs(share), top, map.scale) : 0);
    pen.fillText((map.scale === "log" && !share ? "≤ " : "") + brief(value), x + 17, middle);
  }
  pen.fillStyle = look.dim;
  pen.fillText(shortened(unit, 12), x, TOP + tall + 12);
}
