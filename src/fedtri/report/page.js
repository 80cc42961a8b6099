"use strict";
// Draws each figure when it comes into view; legends, sliders and tables are ordinary controls, so that keys reach them.
const SCHEME = matchMedia("(prefers-color-scheme: dark)");
const swap = JSON.parse(document.getElementById("colours").textContent);
const drawn = new Map();
const make = (tag, more = {}, ...inside) => {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(more)) node.setAttribute(key, value);
  node.append(...inside);
  return node;
};

function parse(name) {
  let text = document.getElementById("data-" + name).textContent;
  if (SCHEME.matches) for (const [light, dark] of swap) text = text.replaceAll(light, dark);
  const found = JSON.parse(text);
  const style = getComputedStyle(document.documentElement);
  const [ink, line, page] = ["--ink", "--line", "--page"].map((v) => style.getPropertyValue(v).trim());
  const { layout } = found;
  const narrow = innerWidth < 640;
  layout.showlegend = false;
  delete layout.title;
  layout.autosize = true;
  layout.margin = { l: narrow ? 44 : 56, r: 12, t: layout.annotations?.some((a) => a.yref === "paper") ? 24 : 12, b: 44 };
  layout.paper_bgcolor = layout.plot_bgcolor = "rgba(0,0,0,0)";
  layout.font = { ...layout.font, color: ink, size: narrow ? 12 : 13 };
  layout.hoverlabel = { bgcolor: page, bordercolor: line, font: { color: ink } };
  layout.dragmode = false;
  for (const axis of Object.keys(layout).filter((k) => /^[xy]axis/.test(k)))
    layout[axis] = { ...layout[axis], gridcolor: line, linecolor: line, tickcolor: line, fixedrange: true };
  const [first] = found.data;
  if (narrow && first.type === "heatmap" && layout.yaxis.scaleanchor) {
    first.colorbar = { ...first.colorbar, orientation: "h", y: 1, yanchor: "bottom", xanchor: "center" };
    layout.height = innerWidth + 40;
  }
  return found;
}

async function draw(node) {
  const name = node.dataset.figure;
  const before = drawn.get(name);
  const figure = parse(name);
  const meta = figure.layout.meta || {};
  if (before) figure.data.forEach((trace, i) => { trace.visible = before.data[i].visible ?? true; });
  const plot = node.querySelector(".plot");
  drawn.set(name, figure);
  plot.style.height = figure.layout.height + "px";
  await Plotly.react(plot, figure.data, figure.layout, { displayModeBar: false, responsive: true });
  if (!before) {
    legend(node, plot, figure);
    if (meta.steps && meta.steps.length > 1) slider(node, plot, figure, meta.steps);
    const details = node.querySelector("details");
    details.addEventListener("toggle", () => { if (details.open) table(details, drawn.get(name)); });
  } else {
    legend(node, plot, figure);
    const range = node.querySelector("input[type=range]");
    if (range) range.dispatchEvent(new Event("input"));
  }
  node.dataset.drawn = "yes";
}

function swatch(trace) {
  const colour = trace.fillcolor || (trace.line && trace.line.color) || (trace.marker && trace.marker.color) || "currentColor";
  const picture = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  for (const [key, value] of Object.entries({ width: 22, height: 12, "aria-hidden": "true" })) picture.setAttribute(key, value);
  const part = (tag, more) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [key, value] of Object.entries(more)) node.setAttribute(key, value);
    picture.append(node);
  };
  const flat = Array.isArray(colour) ? colour[0] : colour;
  const dashes = { dash: "6 3", dot: "2 3", dashdot: "6 3 2 3" };
  if (trace.type === "bar" || trace.fill) part("rect", { width: 22, height: 12, fill: flat, rx: 2 });
  else if (trace.mode === "markers") {
    const marks = { square: "M6 1h10v10h-10z", "square-open": "M7 2h8v8h-8z", diamond: "M11 0l6 6-6 6-6-6z", "triangle-up": "M11 0l6 11h-12z",
      "triangle-left": "M5 6l11-6v12z", "triangle-right": "M17 6l-11-6v12z", "line-ns-open": "M11 0v12", cross: "M9 0h4v4h4v4h-4v4h-4v-4h-4v-4h4z",
      x: "M6 2l2-2 3 3 3-3 2 2-3 4 3 4-2 2-3-3-3 3-2-2 3-4z", star: "M11 0l2 4h4l-3 3 1 5-4-3-4 3 1-5-3-3h4z", hexagon: "M8 1h6l3 5-3 5h-6l-3-5z" };
    const shape = trace.marker.symbol || "circle";
    const open = shape.endsWith("-open");
    if (marks[shape]) part("path", { d: marks[shape], fill: open ? "none" : flat, stroke: flat, "stroke-width": open ? 2 : 0 });
    else part("circle", { cx: 11, cy: 6, r: 5, fill: flat });
  } else part("path", { d: "M0 6h22", stroke: flat, "stroke-width": 3, "stroke-dasharray": dashes[trace.line && trace.line.dash] || "none" });
  return picture;
}

function legend(node, plot, figure) {
  const box = node.querySelector(".keys");
  const open = new Map([...box.querySelectorAll("button")].map((b) => [b.dataset.key, b]));
  const groups = new Map();
  const clients = [];
  figure.data.forEach((trace, i) => {
    if (trace.meta === "client") return clients.push(i);
    if (trace.type === "heatmap") return;
    const key = trace.legendgroup || trace.name || "";
    if (!groups.has(key)) groups.set(key, { places: [], sample: null });
    groups.get(key).places.push(i);
    if (trace.meta !== "hidden" && trace.showlegend !== false) groups.get(key).sample = trace;
  });
  for (const [key, { places, sample }] of groups) {
    if (!sample || (groups.size === 1 && !clients.length)) continue;
    if (open.has(key)) { open.get(key).firstChild.replaceWith(swatch(sample)); continue; }
    const button = make("button", { type: "button", "aria-pressed": "true" }, swatch(sample), sample.name);
    button.dataset.key = key;
    button.addEventListener("click", () => {
      const show = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", show);
      for (const i of places) drawn.get(node.dataset.figure).data[i].visible = show;
      Plotly.restyle(plot, { visible: show }, places);
    });
    box.append(button);
  }
  if (clients.length && !node.querySelector(".pick")) {
    const select = make("select", {}, make("option", { value: "" }, "none"), make("option", { value: "*" }, "all"));
    clients.forEach((i) => select.append(make("option", { value: i }, figure.data[i].name)));
    select.addEventListener("change", () => {
      const shown = clients.map((i) => (select.value === "*" || select.value === String(i) ? true : "legendonly"));
      clients.forEach((i, k) => { drawn.get(node.dataset.figure).data[i].visible = shown[k]; });
      Plotly.restyle(plot, { visible: shown }, clients);
    });
    box.after(make("label", { class: "pick" }, "Clients:", select));
  }
}

function slider(node, plot, figure, steps) {
  const range = make("input", { type: "range", min: 0, max: steps.length - 1, value: steps.length - 1, step: 1 });
  const said = make("output", {}, "");
  range.addEventListener("input", () => {
    let at = Number(range.value);
    said.textContent = "round " + steps[at].round;
    range.setAttribute("aria-valuetext", "round " + steps[at].round);
    while (steps[at].same) at -= 1;
    const { names, z } = steps[at];
    Object.assign(drawn.get(node.dataset.figure).data[0], { z, x: names, y: names });
    Plotly.restyle(plot, { z: [z], x: [names], y: [names] }, [0]);
    const details = node.querySelector("details");
    if (details.open) table(details, drawn.get(node.dataset.figure));
  });
  node.querySelector(".keys").after(make("label", { class: "step" }, "Round", range, said));
  said.textContent = "round " + steps.at(-1).round;
}

const said = (value) => value == null || Number.isNaN(value) ? "–"
  : typeof value === "number" ? String(Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : Number(value.toPrecision(4))) : String(value);

// the same numbers as the picture, as a table: one row a place on the axis of rounds or names, one column a series
function table(details, figure) {
  const traces = figure.data.filter((t) => t.meta !== "hidden" && (t.visible !== "legendonly" || t.meta !== "client"));
  let heads, rows;
  if (traces[0].type === "heatmap") {
    heads = ["", ...traces[0].x];
    rows = traces[0].y.map((name, i) => [name, ...traces[0].z[i]]);
  } else {
    const flip = traces.some((t) => Array.isArray(t.y) && typeof t.y.find((v) => v != null) === "string");
    const [place, value] = flip ? ["y", "x"] : ["x", "y"];
    const places = [...new Set(traces.flatMap((t) => t[place].filter((v) => v != null)))];
    if (!flip && places.every((p) => typeof p === "number")) places.sort((a, b) => a - b);
    const axis = figure.layout[flip ? "yaxis" : "xaxis"];
    heads = [(axis && axis.title && axis.title.text) || "", ...traces.map((t) => t.showlegend === false && t.legendgroup ? t.legendgroup + ", upper" : t.name)];
    const maps = traces.map((t) => new Map(t[place].map((p, i) => [p, t[value][i]])));
    rows = places.map((p) => [p, ...maps.map((m) => m.get(p))]);
  }
  const body = make("tbody", {}, ...rows.map((row) => make("tr", {}, make("th", { scope: "row" }, said(row[0])), ...row.slice(1).map((v) => make("td", {}, said(v))))));
  const head = make("thead", {}, make("tr", {}, ...heads.map((h) => make("th", { scope: "col" }, said(h)))));
  details.querySelector(".scroll").replaceChildren(make("table", {}, head, body));
}

const nodes = [...document.querySelectorAll("figure[data-figure]")];
const watch = new IntersectionObserver((seen) => {
  for (const { isIntersecting, target } of seen) if (isIntersecting) { watch.unobserve(target); draw(target); }
}, { rootMargin: "300px" });
// the words and tables are shown first: compiling the drawing library takes longer than all the rest
function library() {
  const script = document.getElementById("plotly");
  if (script.type) script.replaceWith(Object.assign(make("script"), { id: "plotly", textContent: script.textContent }));
}
addEventListener("load", () => requestAnimationFrame(() => setTimeout(() => {
  library();
  nodes.forEach((node) => watch.observe(node));
})));
SCHEME.addEventListener("change", () => nodes.filter((node) => node.dataset.drawn).forEach(draw));
addEventListener("beforeprint", () => { library(); nodes.filter((node) => !node.dataset.drawn).forEach(draw); });
