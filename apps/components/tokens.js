// A page of tokens coloured by one of them. Where the weights between all tokens of the page are there, the token under
// the pointer or the keyboard colours the others at once; else, and without a pointer, the focus does.
function draw(root, data, send) {
  return updated(memory(root, () => built(root)), data, send);
}

function built(root) {
  const text = {root, tokens: [], at: 0, near: null, send: null};
  const button = (label, action) => element("button", {type: "button", click: action}, label);
  text.title = element("h4");
  text.previous = button("‹ Previous", () => turn(text, -1));
  text.next = button("Next ›", () => turn(text, 1));
  text.range = element("span", {class: "note"});
  text.number = element("input", {type: "number", min: 0, step: 1, "aria-label": "Position of a token"});
  text.form = element("form", {class: "tools", submit: (event) => {
    event.preventDefault();
    if (text.number.value !== "") pick(text, Number(text.number.value));
    text.number.value = "";
  }}, element("label", {}, "go to token", text.number), element("button", {type: "submit"}, "Go"));
  text.caption = element("div", {class: "caption"});
  text.legend = element("span", {class: "legend"}, element("span"), element("span", {class: "bar"}), element("span"));
  text.page = element("div", {class: "tokens", role: "listbox", "aria-label": "Tokens"});
  text.status = element("div", {class: "status", "aria-live": "polite"});
  root.append(text.title, element("div", {class: "tools"}, text.previous, text.range, text.next, text.form),
    element("div", {class: "tools"}, text.caption, text.legend), text.page, text.status);
  listen(text);
  watch(root, () => text.data && paint(text));
  return text;
}

async function updated(text, data, send) {
  text.send = send;
  const turn = (text.turn = (text.turn ?? 0) + 1);
  const tile = data.tile && (await packedValues(data.tile, data.top));
  if (turn !== text.turn) return; // newer data came while this picture was decoded
  const before = text.data, end = data.start + data.labels.length;
  text.data = data;
  text.tile = tile;
  text.title.textContent = data.title;
  text.title.hidden = !data.title;
  text.range.textContent = `tokens ${count(data.start)}–${count(end - 1)} of ${count(data.total)}`;
  text.previous.disabled = data.start === 0;
  text.next.disabled = end >= data.total;
  text.number.max = data.total - 1;
  if (!before || before.start !== data.start || String(before.labels) !== String(data.labels)) {
    const held = text.tokens.includes(text.root.getRootNode().activeElement);
    write(text);
    const inside = data.focus >= data.start && data.focus < end;
    text.at = text.edge === "last" ? data.labels.length - 1 : text.edge !== "first" && inside ? data.focus - data.start : 0;
    text.edge = text.near = null;
    if (held) text.tokens[text.at].focus({preventScroll: true});
  } else if (before.focus !== data.focus && data.focus >= data.start && data.focus < end) text.at = data.focus - data.start;
  paint(text);
  tell(text);
}

// The tokens as elements: as the text reads, with spaces between them only where the tokens do not bring them along.
function write(text) {
  const {labels, start} = text.data, marked = labels.some((label) => /^[ \u0120\u2581]\S/.test(label));
  const strong = labels.map((label) => /\p{L}/u.exec(label)?.[0]).filter(Boolean);
  const leftwards = strong.filter((letter) => /[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc]/.test(letter)).length;
  text.page.dir = leftwards > strong.length / 2 ? "rtl" : "ltr";
  text.tokens = labels.map((label, i) => element("span", {class: "token", role: "option", tabindex: -1, dir: "auto",
    "aria-label": `${start + i} ${readable(label)}`}, readable(label)));
  text.page.replaceChildren(...text.tokens.flatMap((token, i) => {
    const gap = marked || i === 0 || /^##/.test(labels[i]) ? [] : [" "];
    return [...gap, token, ...(/[\n\u010a]$/.test(labels[i]) ? [element("br")] : [])];
  }));
}

// The weight that token `from` of the page (an index) gives to, or gets from, token `to`; null where none is known.
function between(text, from, to, direction) {
  const {data, tile} = text;
  if (data.start + from === data.focus && direction === data.direction) return data.weights[to];
  if (!tile) return null;
  const value = direction === "from" ? tile.values[from * tile.columns + to] : tile.values[to * tile.columns + from];
  return Number.isNaN(value) ? null : value;
}

function paint(text) {
  const {data, tokens, near} = text, look = theme(text.root), colours = palette(true, look.dark);
  const source = near !== null && text.tile ? near : data.focus - data.start;
  const aside = source < 0 || source >= tokens.length; // the focus is on another page
  tokens.forEach((token, i) => {
    const weight = aside ? data.weights[i] : between(text, source, i, data.direction);
    const rgb = colour(weight, data.top, "sqrt", colours);
    token.style.backgroundColor = rgb ? `rgb(${rgb})` : "transparent";
    token.style.color = rgb ? inkOn(rgb) : look.dim;
    token.classList.toggle("focus", data.start + i === data.focus);
    token.classList.toggle("source", i === source);
    token.setAttribute("aria-selected", String(data.start + i === data.focus));
    token.tabIndex = i === text.at ? 0 : -1;
  });
  const name = aside ? `token ${count(data.focus)}, on another page,` : `token ${count(data.start + source)} ${quoted(data.labels[source])}`;
  text.caption.textContent = data.direction === "from" ? `Colour: what ${name} attends to` : `Colour: which tokens attend to ${name}`;
  const [low, bar, high] = text.legend.children, steps = [0, 0.25, 0.5, 0.75, 1];
  const stops = data.signed ? [...steps.slice(1).reverse().map((share) => -share), ...steps] : steps;
  bar.style.background = `linear-gradient(to right, ${stops.map((share) => {
    const at = 3 * Math.round(255 * Math.abs(share));
    return `rgb(${(share < 0 ? colours.minus : colours.plus).slice(at, at + 3)})`;
  })})`;
  low.textContent = data.signed ? brief(-data.top) : "0";
  high.textContent = `${brief(data.top)} (square-root scale)`;
}

// Isolated, so that a word read from right to left leaves the sentence around it as it is.
const quoted = (label) => `“\u2068${shortened(readable(label).trim(), 24)}\u2069”`;

function tell(text) {
  const {data, near} = text;
  if (near === null) {
    text.status.textContent = "";
    return;
  }
  const place = data.start + near, parts = [`token ${count(place)} ${quoted(data.labels[near])}`];
  const focus = data.focus - data.start, weight = data.weights[near];
  const known = (value) => (value === null ? "not there" : measured(value, data.top));
  parts.push(data.direction === "from" ? `from focus ${count(data.focus)}: ${known(weight)}` : `to focus ${count(data.focus)}: ${known(weight)}`);
  if (text.tile && focus >= 0 && focus < data.labels.length) {
    const back = between(text, focus, near, data.direction === "from" ? "to" : "from");
    parts.push(data.direction === "from" ? `to focus: ${known(back)}` : `from focus: ${known(back)}`);
  }
  if (text.tile) {
    const row = data.labels.map((_, i) => between(text, near, i, data.direction));
    const most = row.reduce((best, value, i) => (value !== null && (best < 0 || Math.abs(value) > Math.abs(row[best])) ? i : best), -1);
    if (most >= 0) parts.push(`${data.direction === "from" ? "attends most to" : "most attended by"} ${count(data.start + most)} ` +
      `${quoted(data.labels[most])}: ${known(row[most])}`);
  }
  text.status.textContent = parts.join(" · ");
}

function turn(text, step) {
  const {start, size, total} = text.data, last = Math.floor((total - 1) / size) * size;
  const to = clamp(start + step * size, 0, Math.max(last, start));
  if (to !== start) text.send("page", to);
}

// Makes a token, on whatever page, the focus.
function pick(text, position) {
  const {start, labels, size, total} = text.data, to = clamp(Math.round(position), 0, total - 1);
  if (to < start || to >= start + labels.length) text.send("page", Math.floor(to / size) * size);
  text.send("focus", to);
}

function listen(text) {
  const {page} = text, index = (event) => text.tokens.indexOf(event.target.closest?.(".token"));
  const approach = (i) => {
    const near = i < 0 ? null : i;
    if (near === text.near) return;
    text.near = near;
    paint(text);
    tell(text);
  };
  page.addEventListener("pointerover", (event) => index(event) >= 0 && approach(index(event)));
  page.addEventListener("pointerleave", () => approach(text.tokens.indexOf(text.root.getRootNode().activeElement)));
  page.addEventListener("focusin", (event) => {
    enter(text, index(event));
    approach(text.at);
  });
  page.addEventListener("focusout", (event) => !page.contains(event.relatedTarget) && approach(-1));
  page.addEventListener("click", (event) => {
    if (index(event) < 0 || String(getSelection())) return; // text is being selected
    text.tokens[index(event)].focus();
    pick(text, text.data.start + text.at);
  });
  page.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const on = page.dir === "rtl" ? -1 : 1, last = text.tokens.length - 1;
    const to = {ArrowLeft: text.at - on, ArrowRight: text.at + on, ArrowUp: beside(text, -1), ArrowDown: beside(text, 1),
      Home: 0, End: last}[event.key];
    if (to !== undefined && to >= 0 && to <= last) text.tokens[to].focus();
    else if (to < 0) leave(text, -1, "last");
    else if (to > last) leave(text, 1, "first");
    else if (event.key === "PageUp") turn(text, -1);
    else if (event.key === "PageDown") turn(text, 1);
    else if (event.key === "Enter" || event.key === " ") pick(text, text.data.start + text.at);
    else return;
    event.preventDefault();
  });
}

// Over the edge of the page: the next page is entered at its near end.
function leave(text, step, edge) {
  text.edge = edge;
  turn(text, step);
}

// The token that the keyboard is on.
function enter(text, i) {
  text.tokens[text.at].tabIndex = -1;
  text.at = i;
  text.tokens[i].tabIndex = 0;
}

// The token in the line above or below that is nearest to the present one.
function beside(text, step) {
  const here = text.tokens[text.at], middle = here.offsetLeft + here.offsetWidth / 2;
  const lines = text.tokens.map((token) => token.offsetTop);
  const others = lines.filter((line) => (step < 0 ? line < lines[text.at] - 4 : line > lines[text.at] + 4));
  if (!others.length) return text.at;
  const line = step < 0 ? Math.max(...others) : Math.min(...others);
  const apart = (i) => Math.abs(text.tokens[i].offsetLeft + text.tokens[i].offsetWidth / 2 - middle);
  return lines.reduce((best, top, i) => (Math.abs(top - line) <= 4 && (best < 0 || apart(i) < apart(best)) ? i : best), -1);
}
