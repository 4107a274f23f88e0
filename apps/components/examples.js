// Rows of text, each token coloured by its number. Arrow keys go from token to token; the line below tells the number.
const EXAMPLES_STYLE = `
.examples:focus-visible { outline-offset: 2px; }
.examples .group { margin: 8px 0 2px; font-size: 12px; color: var(--dim); }
.examples .row { display: grid; grid-template-columns: 64px 1fr; gap: 8px; padding: 1px 0; line-height: 1.7; }
.examples .row .note { font-size: 12px; text-align: right; font-variant-numeric: tabular-nums; line-height: 2; }
.examples .piece { display: inline-block; min-width: 0.5em; padding: 0 1px; margin: 0 0.5px; border-radius: 3px; white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; max-width: 100%; line-height: 1.4; }
.examples .at { box-shadow: 0 0 0 1.5px var(--ink); font-weight: 600; }
.examples .here { box-shadow: 0 0 0 2px var(--accent); }
`;

function draw(root, data) {
  const view = memory(root, () => built(root));
  view.data = data;
  view.title.textContent = data.title;
  view.title.hidden = !data.title;
  view.box.setAttribute("aria-label", `${data.title || "Examples"}. Arrow keys go from token to token.`);
  view.rows = [];
  view.here = null;
  view.status.textContent = "";
  view.box.replaceChildren(...data.groups.flatMap(({name, rows}) => [element("div", {class: "group"}, name), ...rows.map((row) => line(view, row))]));
  coloured(view);
}

function built(root) {
  const view = {root, rows: [], here: null};
  view.title = element("h4");
  view.box = element("div", {class: "examples", tabindex: 0, role: "application"});
  view.status = element("div", {class: "status", "aria-live": "polite"});
  root.append(element("style", {}, EXAMPLES_STYLE), view.title, view.box, view.status);
  const spot = (event) => view.rows.flat().find((piece) => piece.node === event.target);
  view.box.addEventListener("pointerover", (event) => tell(view, spot(event) ?? null));
  view.box.addEventListener("pointerleave", () => tell(view, view.here));
  view.box.addEventListener("blur", () => go(view, null));
  view.box.addEventListener("keydown", (event) => {
    const step = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0]}[event.key];
    if (!step || event.ctrlKey || event.metaKey || event.altKey || !view.rows.length) return;
    const {row, column} = view.here ?? {row: step[0] < 0 ? view.rows.length : step[0] ? -1 : 0, column: null};
    const down = clamp(row + step[0], 0, view.rows.length - 1), last = view.rows[down].length - 1;
    go(view, view.rows[down][clamp(column === null ? Math.max(view.rows[down].at, 0) : column + step[1], 0, last)]);
    event.preventDefault();
  });
  watch(root, () => view.data && coloured(view));
  return view;
}

function line(view, row) {
  const index = view.rows.length;
  const pieces = row.tokens.map((token, column) => ({row: index, column, token, value: row.values[column],
    node: element("span", {class: column === row.at ? "piece at" : "piece"}, readable(token))}));
  pieces.at = row.at;
  view.rows.push(pieces);
  const spaced = row.tokens.slice(1).some((token) => /^[ \u0120\u2581]/.test(token)); // tokens bring their spaces along
  const text = pieces.flatMap((piece) => (spaced ? [piece.node] : [piece.node, " "]));
  return element("div", {class: "row"}, element("span", {class: "note"}, row.note), element("div", {dir: "auto"}, ...text));
}

function coloured(view) {
  const look = theme(view.root), colours = palette(true, look.dark);
  for (const piece of view.rows.flat()) {
    const rgb = piece.value ? colour(piece.value, view.data.top, "sqrt", colours) : null;
    piece.node.style.backgroundColor = rgb ? `rgb(${rgb})` : "";
    piece.node.style.color = rgb ? inkOn(rgb) : "";
  }
}

function go(view, piece) {
  view.here?.node.classList.remove("here");
  view.here = piece;
  piece?.node.classList.add("here");
  piece?.node.scrollIntoView({block: "nearest"});
  tell(view, piece);
}

function tell(view, piece) {
  view.status.textContent = piece ? `\u2068${readable(piece.token)}\u2069 · ${number(piece.value)} ${view.data.unit}` : "";
}
