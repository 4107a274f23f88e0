async function draw(root, data, send) {
  const part = memory(root, () => {
    const canvas = element("canvas", {width: 480, height: 480, tabindex: 0, role: "img"});
    const title = element("h4"), status = element("div", {class: "status", "aria-live": "polite"});
    root.append(title, canvas, status);
    return {canvas, title, status};
  });
  part.title.textContent = data.title;
  part.canvas.setAttribute("aria-label", `Attention map ${data.title}`);
  const {rows, columns, values} = await packedValues(data.image, data.top);
  const pen = part.canvas.getContext("2d"), colours = palette(data.signed, theme(root).dark);
  const high = 480 / rows, wide = 480 / columns;
  for (let i = 0; i < values.length; i++) {
    const shown = colour(values[i], data.top, data.scale, colours);
    pen.fillStyle = shown ? `rgb(${shown})` : "transparent";
    pen.fillRect((i % columns) * wide, Math.floor(i / columns) * high, wide, high);
  }
  part.canvas.onclick = (event) => {
    const q = Math.floor((event.offsetY / 480) * rows), k = Math.floor((event.offsetX / 480) * columns);
    part.status.textContent = number(values[q * columns + k]);
    send("cell", [data.view[0] + q * data.size, data.view[2] + k * data.size]);
  };
}
