// What the components share: where they draw, colours, the numbers inside pictures, the words of tokens.

// Draws into `place` (an element, or the shadow root a host made), again on the same root when called again.
const roots = new WeakMap();
function mount(place, data, send) {
  let root = roots.get(place);
  if (!root) {
    const inside = place instanceof ShadowRoot ? place : place.shadowRoot ?? place.attachShadow({mode: "open"});
    root = element("div", {class: "workbench"});
    inside.append(element("style", {}, STYLE), root);
    roots.set(place, root);
  }
  attempt(root, () => draw(root, data, send));
}

// A figure that cannot be drawn says so in its place; the next data may draw it.
async function attempt(root, action) {
  root.querySelector(":scope > .failure")?.remove();
  try {
    await action();
  } catch (error) {
    root.querySelector(":scope > .failure")?.remove();
    root.prepend(element("p", {class: "failure", role: "alert"}, `This figure could not be drawn: ${error.message}`));
    console.error(error);
  }
}

// What a component keeps between two draws on the same root; `build` makes it once.
const memories = new WeakMap();
function memory(root, build) {
  if (!memories.has(root)) memories.set(root, build());
  return memories.get(root);
}

// Strings among the children become text, never markup. Functions among the attributes are listeners.
const SVG = new Set(["svg", "g", "path", "rect", "line", "circle", "ellipse", "text", "tspan", "title", "defs", "marker",
  "polygon", "polyline", "pattern", "clipPath"]);
function element(tag, attributes = {}, ...children) {
  const made = SVG.has(tag) ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") made.addEventListener(name, value);
    else if (value !== null && value !== undefined && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

// Calls `action` when the width of `root` or the colour scheme changes, as long as `root` is in the page.
function watch(root, action) {
  const scheme = matchMedia("(prefers-color-scheme: dark)");
  const changed = () => (root.isConnected ? action() : scheme.removeEventListener("change", changed));
  scheme.addEventListener("change", changed);
  new ResizeObserver(() => requestAnimationFrame(action)).observe(root);
}

// One call of `action` in the next frame, however often the returned function is called before it.
function perFrame(action) {
  let waiting = 0;
  return () => {
    waiting ||= requestAnimationFrame(() => {
      waiting = 0;
      action();
    });
  };
}

// One call of `action`, `pause` milliseconds after the last call of the returned function.
function settled(action, pause) {
  let timer = 0;
  return (...values) => {
    clearTimeout(timer);
    timer = setTimeout(() => action(...values), pause);
  };
}

const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

// ---- PNG: decoded here, since a canvas may give back other numbers (colour management, protection of privacy).
const pictures = new Map();
function picture(url) {
  if (!pictures.has(url)) {
    pictures.set(url, decoded(url));
    if (pictures.size > 12) pictures.delete(pictures.keys().next().value);
  }
  return pictures.get(url);
}

// {width, height, channels, bytes} of an 8-bit PNG in a data URL: grey, RGB, or the places in a palette.
async function decoded(url) {
  const text = atob(url.slice(url.indexOf(",") + 1)), file = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) file[i] = text.charCodeAt(i); // a call per sign takes many times as long
  const view = new DataView(file.buffer);
  const width = view.getUint32(16), height = view.getUint32(20);
  const channels = {0: 1, 2: 3, 3: 1}[file[25]];
  if (view.getUint32(0) !== 0x89504e47 || file[24] !== 8 || !channels || file[28] !== 0)
    throw new Error("its picture is not an 8-bit PNG that is grey, RGB or has a palette");
  const parts = [];
  for (let at = 8; at < file.length; at += 12 + view.getUint32(at))
    if (view.getUint32(at + 4) === 0x49444154) parts.push(file.subarray(at + 8, at + 8 + view.getUint32(at)));
  const stream = new Blob(parts).stream().pipeThrough(new DecompressionStream("deflate"));
  const raw = new Uint8Array(await new Response(stream).arrayBuffer());
  return {width, height, channels, bytes: unfiltered(raw, width, height, channels)};
}

function unfiltered(raw, width, height, step) {
  const line = width * step, bytes = new Uint8Array(line * height);
  for (let y = 0; y < height; y++) {
    const filter = raw[y * (line + 1)], from = y * (line + 1) + 1, to = y * line;
    if (filter === 0) {
      bytes.set(raw.subarray(from, from + line), to);
      continue;
    }
    for (let x = 0; x < line; x++) {
      const left = x >= step ? bytes[to + x - step] : 0;
      const up = y ? bytes[to + x - line] : 0;
      let guess = 0;
      if (filter === 1) guess = left;
      else if (filter === 2) guess = up;
      else if (filter === 3) guess = (left + up) >> 1;
      else if (filter === 4) {
        const corner = x >= step && y ? bytes[to + x - line - step] : 0;
        const a = Math.abs(up - corner), b = Math.abs(left - corner), c = Math.abs(left + up - 2 * corner);
        guess = a <= b && a <= c ? left : b <= c ? up : corner;
      }
      bytes[to + x] = raw[from + x] + guess;
    }
  }
  return bytes;
}

// The numbers of a packed picture, row by row; NaN is what is not there.
async function packedValues(url, top) {
  const {width, height, channels, bytes} = await picture(url);
  if (channels !== 1 || height % 3) throw new Error("its picture holds no packed values");
  const rows = height / 3, count = rows * width, values = new Float64Array(count);
  for (let i = 0; i < count; i++) {
    const size = top * ((bytes[i] * 256 + bytes[count + i]) / 65535) ** 2, kind = bytes[2 * count + i];
    values[i] = kind === 255 ? NaN : kind === 128 ? -size : size;
  }
  return {rows, columns: width, values};
}

// ---- Colour
const VIRIDIS = "440154 481467 482576 453781 404688 39558c 33638d 2d718e 287d8e 238a8d 1f968b 20a386 29af7f 3dbc74 56c667 75d054 95d840 bade28 dde318 fde725";
const BLUES = {light: "f7f7f7 d6e6f2 a6cbe6 6aa6d3 3a7fba 1c5a98 0a3a6e", dark: "1b1e26 1a3354 1c5087 2571bd 3f93e0 6cb4f7 9fd2ff"};
const ORANGES = {light: "f7f7f7 fbe3c6 f7c07f ee963c d66f10 a84f06 713203", dark: "1b1e26 46290f 743f10 a95b14 dd7e26 f79a43 ffbe7a"};

function ramp(stops) {
  const points = stops.split(" ").map((hex) => [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16)));
  const table = new Uint8ClampedArray(256 * 3);
  for (let i = 0; i < 256; i++) {
    const place = (i / 255) * (points.length - 1), below = Math.min(Math.floor(place), points.length - 2);
    for (let c = 0; c < 3; c++)
      table[3 * i + c] = points[below][c] + (points[below + 1][c] - points[below][c]) * (place - below);
  }
  return table;
}

// {plus, minus}: 256 colours each for v >= 0 and v < 0. Blue is positive and orange negative where signs are shown.
const palettes = new Map();
function palette(signed, dark) {
  const name = signed ? (dark ? "dark" : "light") : "plain";
  if (!palettes.has(name)) {
    const plus = ramp(signed ? BLUES[name] : VIRIDIS);
    palettes.set(name, {plus, minus: signed ? ramp(ORANGES[name]) : plus});
  }
  return palettes.get(name);
}

// Where |value| lies between 0 and `top`, 0 ... 1. The logarithmic scale shows the four decades below `top`.
function level(value, top, scale) {
  const share = clamp(Math.abs(value) / top, 0, 1);
  if (scale === "sqrt") return Math.sqrt(share);
  if (scale === "log") return share > 0 ? clamp(1 + Math.log10(share) / 4, 0, 1) : 0;
  return share;
}
// The value at a level: the inverse of `level`.
function valueAt(share, top, scale) {
  if (scale === "sqrt") return top * share * share;
  if (scale === "log") return top * 10 ** (4 * (share - 1));
  return top * share;
}

// [r, g, b] of a value; null where it is not there.
function colour(value, top, scale, colours) {
  if (value === null || Number.isNaN(value)) return null;
  const at = 3 * Math.round(255 * level(value, top, scale));
  return (value < 0 ? colours.minus : colours.plus).slice(at, at + 3);
}
// Black or white, whichever has the higher contrast (as WCAG 2 reckons it) on [r, g, b].
function inkOn(rgb) {
  const [r, g, b] = Array.from(rgb, (c) => (c <= 10 ? c / 3294 : ((c / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#000000" : "#ffffff";
}

// The colours of the page, as the style gives them to `root`; `dark` says whether its text is bright.
function theme(root) {
  const style = getComputedStyle(root), ink = style.color, [r, g, b] = channels(ink);
  return {ink, paper: style.backgroundColor, line: style.borderTopColor, dim: style.outlineColor, accent: style.caretColor,
    shade: style.textDecorationColor, font: style.fontFamily, dark: 0.299 * r + 0.587 * g + 0.114 * b > 140};
}
function channels(css) {
  const numbers = (css.match(/[\d.]+/g) ?? [0, 0, 0]).slice(0, 3).map(Number); // none once taken out of the page
  return css.startsWith("color(") ? numbers.map((share) => 255 * share) : numbers;
}

// ---- Words
function number(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "not there";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e5 || size < 1e-4) return value.toExponential(2).replace("-", "\u2212").replace("e-", "e\u2212");
  return String(Number(value.toPrecision(4))).replace("-", "\u2212");
}

// A value that came in a packed picture with this `top`: only the digits that the picture keeps.
function measured(value, top) {
  if (!value) return number(value);
  const steps = 65535 * Math.sqrt(clamp(Math.abs(value) / top, 0, 1));
  return number(Number(value.toPrecision(clamp(Math.floor(Math.log10(steps)) + 1, 1, 4))));
}
// The same where there is little room.
function brief(value) {
  const size = Math.abs(value);
  if (size && (size < 0.001 || size >= 1e4)) return value.toExponential(0).replace(/-/g, "−");
  return String(Number(value.toPrecision(2))).replace("-", "−");
}
const count = (whole) => whole.toLocaleString("en");

// A token as it can be read: what cannot be seen gets a sign, and the marks tokenizers use for spaces and bytes go.
const SIGNS = {"\n": "↵", "\r": "␍", "\t": "⇥", "\u00a0": "⍽", "\u007f": "␡"};
function readable(token) {
  const text = String(token).replace(/[\u0120\u2581]/g, " ").replace(/\u010a/g, "\n").replace(/^##(?=[\p{L}\p{N}])/u, "");
  if (/^[\p{Cf}\u200b]*$/u.test(text)) return "∅";
  if (/^ +$/.test(text)) return "␣".repeat(text.length);
  return text.replace(/[\u0000-\u001f\u007f\u00a0]/g, (sign) => SIGNS[sign] ?? String.fromCharCode(0x2400 + sign.charCodeAt(0)));
}
// At most `length` letters of it; letters as a reader counts them, so that no emoji is cut.
const letters = new Intl.Segmenter(undefined, {granularity: "grapheme"});
function shortened(text, length) {
  const parts = Array.from(letters.segment(text), (part) => part.segment);
  return parts.length > length ? parts.slice(0, length - 1).join("") + "…" : text;
}
