// Small pictures of many heads, each a button. One picture of all is coloured here and cut by the style sheet.
const SMALLEST = 30, NAMED = 56; // pixels of a head on the screen, and from how many on its name stands below it
const MARGIN = 34; // left of the rows, for the layer, where heads are too small for names

function draw(root, data, send) {
  return updated(memory(root, () => built(root)), data, send);
}

function built(root) {
  const wall = {root, tiles: [], send: null, at: 0, ink: null};
  wall.title = element("h4");
  wall.grid = element("div", {class: "wall", role: "listbox", "aria-multiselectable": "true", "aria-label": "Heads"});
  wall.lasso = element("div", {class: "lasso", hidden: true});
  wall.status = element("div", {class: "status", "aria-live": "polite"});
  wall.count = element("span", {class: "note"});
  wall.none = element("button", {type: "button", click: () => select(wall, [])}, "Select none");
  root.append(wall.title,
    element("div", {class: "tools"}, wall.count, wall.none, element("details", {}, element("summary", {}, "Controls"),
      element("div", {class: "card"}, "Click opens a head. Shift or Ctrl and click selects it, a rectangle drawn with the " +
        "pointer selects all within. On the keyboard: arrows move, Enter opens, Space selects, Escape selects none."))),
    element("div", {class: "stage"}, wall.grid, wall.lasso), wall.status);
  listen(wall);
  watch(root, () => wall.data && arrange(wall));
  return wall;
}

async function updated(wall, data, send) {
  wall.send = send;
  const turn = (wall.turn = (wall.turn ?? 0) + 1);
  const sheet = wall.data?.image === data.image ? wall.sheet : await painted(data);
  if (turn !== wall.turn) return; // newer data came while this picture was decoded
  if (sheet !== wall.sheet && wall.sheet) URL.revokeObjectURL(wall.sheet);
  wall.sheet = sheet;
  wall.data = data;
  wall.selected = new Set(data.selected);
  wall.at = Math.min(wall.at, data.items.length - 1);
  wall.title.textContent = data.title;
  wall.title.hidden = !data.title;
  while (wall.tiles.length > data.items.length) wall.tiles.pop().remove();
  while (wall.tiles.length < data.items.length) {
    wall.tiles.push(element("div", {class: "head", role: "option", tabindex: -1},
      element("div", {class: "thumb"}), element("div", {class: "name"}), element("div", {class: "value"})));
    wall.grid.append(wall.tiles.at(-1));
  }
  const rows = Math.ceil(data.items.length / data.columns);
  wall.tiles.forEach((tile, i) => {
    const item = data.items[i], [thumb, , value] = tile.children;
    thumb.style.backgroundImage = `url("${wall.sheet}")`;
    thumb.style.backgroundSize = `${data.columns * 100}% ${rows * 100}%`;
    const part = (place, of) => (of > 1 ? (100 * place) / (of - 1) : 0);
    thumb.style.backgroundPosition = `${part(i % data.columns, data.columns)}% ${part(Math.floor(i / data.columns), rows)}%`;
    value.textContent = item.value === null ? "" : brief(item.value);
    tile.setAttribute("aria-label", words(item));
  });
  arrange(wall);
  mark(wall);
}

// The picture of all heads in colour, as the address of a blob. What is not there stays transparent.
async function painted(data) {
  const {width, height, channels: depth, bytes} = await picture(data.image);
  if (depth !== 1) throw new Error("its picture is not grey");
  const sheet = new OffscreenCanvas(width, height), pen = sheet.getContext("2d"), pixels = pen.createImageData(width, height);
  const {plus} = palette(false, false);
  for (let i = 0; i < bytes.length; i++) {
    if (!bytes[i]) continue;
    const from = 3 * Math.round(((bytes[i] - 1) / 254) * 255);
    pixels.data.set(plus.subarray(from, from + 3), 4 * i);
    pixels.data[4 * i + 3] = 255;
  }
  pen.putImageData(pixels, 0, 0);
  return URL.createObjectURL(await sheet.convertToBlob());
}

const words = (item) => `Layer ${item.layer}, head ${item.head}` + (item.value === null ? "" : `: ${number(item.value)}`) +
  (item.text ? ` · ${item.text}` : "");

// A row per layer where the page is wide enough, else as many in a row as fit.
function arrange(wall) {
  const gap = 6, wide = wall.root.clientWidth || 640, {columns, items} = wall.data;
  const room = (across, margin) => Math.floor((wide - margin + gap) / across) - gap;
  const layers = items.every((item, i) => item.layer === items[i - (i % columns)].layer);
  const named = room(columns, 0) >= NAMED, whole = named || (layers && room(columns, MARGIN) >= SMALLEST);
  const compact = whole && !named;
  const side = whole ? Math.min(room(columns, compact ? MARGIN : 0), 120) : NAMED;
  wall.across = whole ? columns : Math.max(1, Math.floor((wide + gap) / (NAMED + gap)));
  wall.grid.style.gridTemplateColumns = `repeat(${wall.across}, ${side}px)`;
  wall.grid.style.setProperty("--side", `${side}px`);
  wall.grid.style.paddingLeft = compact ? `${MARGIN}px` : "0";
  wall.grid.classList.toggle("compact", compact);
  wall.tiles.forEach((tile, i) => {
    const first = i % wall.across === 0, {layer, head} = items[i];
    tile.classList.toggle("first", first);
    tile.querySelector(".name").textContent = compact ? `L${layer}` : `L${layer} H${head}`;
  });
}

function mark(wall) {
  wall.tiles.forEach((tile, i) => {
    tile.setAttribute("aria-selected", String(wall.selected.has(i)));
    tile.tabIndex = i === wall.at ? 0 : -1;
  });
  const many = wall.selected.size;
  wall.count.textContent = `${count(wall.data.items.length)} heads, ${many ? count(many) : "none"} selected`;
  wall.none.disabled = !many;
}

function select(wall, chosen) {
  wall.selected = new Set([...chosen].sort((a, b) => a - b));
  mark(wall);
  wall.send("select", [...wall.selected]);
}
function toggle(wall, i) {
  const chosen = new Set(wall.selected);
  if (!chosen.delete(i)) chosen.add(i);
  select(wall, chosen);
}

function listen(wall) {
  const {grid, lasso} = wall;
  const index = (event) => wall.tiles.indexOf(event.target.closest(".head"));
  let start = null; // where the pointer went down: a rectangle grows from here
  const box = (event) => {
    const frame = grid.getBoundingClientRect();
    const [x, y] = [event.clientX - frame.left, event.clientY - frame.top];
    return {left: Math.min(x, start.x), right: Math.max(x, start.x), top: Math.min(y, start.y), bottom: Math.max(y, start.y)};
  };
  grid.addEventListener("pointerdown", (event) => {
    if (event.button || event.pointerType === "touch") return; // a finger scrolls the page
    const frame = grid.getBoundingClientRect();
    start = {x: event.clientX - frame.left, y: event.clientY - frame.top, drawn: false};
  });
  grid.addEventListener("pointermove", (event) => {
    if (!start) return;
    const {left, right, top, bottom} = box(event);
    if (!start.drawn && Math.hypot(right - left, bottom - top) < 6) return;
    if (!start.drawn) grid.setPointerCapture(event.pointerId);
    start.drawn = true;
    lasso.hidden = false;
    Object.assign(lasso.style, {left: `${left}px`, top: `${top}px`, width: `${right - left}px`, height: `${bottom - top}px`});
  });
  grid.addEventListener("pointerup", (event) => {
    if (start?.drawn) {
      const {left, right, top, bottom} = box(event), inside = wall.tiles.flatMap((tile, i) =>
        tile.offsetLeft < right && tile.offsetLeft + tile.offsetWidth > left && tile.offsetTop < bottom &&
        tile.offsetTop + tile.offsetHeight > top ? [i] : []);
      lasso.hidden = true;
      wall.drawn = event.timeStamp;
      select(wall, event.shiftKey || event.ctrlKey || event.metaKey ? [...wall.selected, ...inside] : inside);
    }
    start = null;
  });
  grid.addEventListener("pointercancel", () => {
    start = null;
    lasso.hidden = true;
  });
  grid.addEventListener("click", (event) => {
    const i = index(event);
    if (i < 0 || event.timeStamp - (wall.drawn ?? -1e9) < 50) return; // the click that ends a rectangle
    wall.tiles[i].focus();
    if (event.shiftKey || event.ctrlKey || event.metaKey) toggle(wall, i);
    else wall.send("open", i);
  });
  const tell = (i) => {
    if (i >= 0) wall.status.textContent = words(wall.data.items[i]);
  };
  grid.addEventListener("pointerover", (event) => tell(index(event)));
  grid.addEventListener("focusin", (event) => {
    enter(wall, index(event));
    tell(wall.at);
  });
  grid.addEventListener("pointerleave", () => {
    wall.status.textContent = "";
  });
  grid.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const last = wall.tiles.length - 1, column = wall.at % wall.across;
    const to = {ArrowLeft: wall.at - 1, ArrowRight: wall.at + 1, ArrowUp: wall.at - wall.across, ArrowDown: wall.at + wall.across,
      Home: wall.at - column, End: Math.min(wall.at - column + wall.across - 1, last)}[event.key];
    if (to !== undefined) wall.tiles[to >= 0 && to <= last ? to : wall.at].focus();
    else if (event.key === "Enter") wall.send("open", wall.at);
    else if (event.key === " ") toggle(wall, wall.at);
    else if (event.key === "Escape") select(wall, []);
    else return;
    event.preventDefault();
  });
}

// The head that the keyboard is on.
function enter(wall, i) {
  wall.tiles[wall.at].tabIndex = -1;
  wall.at = i;
  wall.tiles[i].tabIndex = 0;
}
