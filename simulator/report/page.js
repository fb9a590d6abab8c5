"use strict";
const DATA = JSON.parse(document.getElementById("report-data").textContent);
const OPTIONS = {
  mode: "vega-lite", renderer: "svg",
  actions: {export: {svg: true, png: true}, source: false, compiled: false, editor: false},
  scaleFactor: {svg: 1, png: 2},
};

// Charts ---------------------------------------------------------------------------------------------------

// Legends break into as many columns as there is width for.
function fitLegends(node, width) {
  if (Array.isArray(node)) { node.forEach((item) => fitLegends(item, width)); return; }
  if (node === null || typeof node !== "object") return;
  for (const [key, value] of Object.entries(node)) {
    if (key === "legend" && value && value.columns) {
      const domain = (node.scale && node.scale.domain) || [];
      const longest = Math.max(4, ...domain.map((name) => String(name).length));
      value.symbolLimit = 0;
      value.columns = Math.max(1, Math.min(8, Math.floor((width - 40) / (longest * 6.6 + 30))));
    }
    else if (key === "legend" && value && value.gradientLength) value.gradientLength = Math.min(240, width - 60);
    else if (key !== "data" && key !== "datasets") fitLegends(value, width);
  }
}

function fitted(name, width) {
  const spec = structuredClone(DATA.figures[name]);
  fitLegends(spec, width);
  Object.assign(spec.config.axis, {labelOverlap: "greedy", labelSeparation: 5});
  if (spec.facet) {
    const columns = Math.max(1, Math.min(spec.columns || 4, Math.floor(width / 150)));
    spec.columns = columns;
    spec.spec.width = Math.floor((width - 95 - 20 * (columns - 1)) / columns);
  } else {
    spec.width = width;
    spec.autosize = {type: "fit-x", contains: "padding"};
  }
  return spec;
}

const drawnWidth = new Map();

async function draw(plot) {
  const width = Math.floor(plot.clientWidth);
  if (!width || drawnWidth.get(plot) === width) return;
  drawnWidth.set(plot, width);
  try {
    const name = plot.dataset.figure;
    await vegaEmbed(plot, fitted(name, width), {...OPTIONS, downloadFileName: name});
  } catch (error) {
    plot.classList.add("broken");
    plot.textContent = "This chart could not be drawn: " + error.message;
    console.error(error);
  }
}

async function drawVisible() {
  for (const plot of document.querySelectorAll(".plot")) {
    if (!plot.offsetParent) continue;
    await draw(plot);
    // Lets the page answer between two charts.
    await new Promise((resume) => setTimeout(resume, 0));
  }
  document.documentElement.dataset.drawn = "yes";
}

// Kept tokens ----------------------------------------------------------------------------------------------

// Lightness tells how many heads hold a token; print turns white where it gets dark.
function shade(share) {
  const mix = (light, dark) => Math.round(light + (dark - light) * share);
  return `rgb(${mix(244, 8)}, ${mix(247, 48)}, ${mix(252, 107)})`;
}

function paint(token, held, heads) {
  const share = held / heads;
  token.style.visibility = "";
  token.style.background = held ? shade(share) : "none";
  token.style.color = held ? (share > 0.64 ? "#fff" : "#000") : "#767676";
}

function keptTokens(box) {
  const kept = DATA.kept[box.dataset.cell];
  const text = DATA.texts[kept.text];
  const packed = atob(kept.counts);
  const starts = [0];
  for (const time of kept.times) starts.push(starts[starts.length - 1] + time);
  const slider = box.querySelector("input");
  const when = box.querySelector(".when");
  const which = box.querySelector(".which");
  const parts = [box.querySelector(".prompt .tokens"), box.querySelector(".decoded .tokens")];
  const tokens = text.pieces.map((piece, position) => {
    const token = document.createElement("span");
    token.className = "t";
    token.textContent = piece;
    token.dataset.position = position;
    parts[position < text.prompt ? 0 : 1].append(token);
    return token;
  });
  let shown = kept.times.length - 1;
  let pointed = null;
  function held(position) {
    const at = kept.size * (starts[shown] + position);
    return packed.charCodeAt(at) + (kept.size === 2 ? 256 * packed.charCodeAt(at + 1) : 0);
  }
  function tell() {
    if (pointed === null) { which.textContent = "Point at a token, or tap it, to see how many hold it."; return; }
    const where = `Token ${pointed} (${pointed < text.prompt ? "prompt" : "decoded"}) “${text.pieces[pointed].trim()}”`;
    which.textContent = pointed >= kept.times[shown] ? `${where}: not decoded yet.`
      : `${where}: held by ${held(pointed)} of ${kept.heads} heads (${Math.round(100 * held(pointed) / kept.heads)}%).`;
  }
  function show() {
    shown = Number(slider.value);
    const time = kept.times[shown];
    let sum = 0, gone = 0;
    for (let position = 0; position < tokens.length; position++) {
      if (position >= time) { tokens[position].style.visibility = "hidden"; continue; }
      const count = held(position);
      sum += count;
      gone += count === 0;
      paint(tokens[position], count, kept.heads);
    }
    const words = `After ${time} of ${tokens.length} tokens: ${Math.round(sum / kept.heads)} entries per head on average; `
      + `${gone} tokens are held by no head.`;
    when.textContent = words;
    slider.setAttribute("aria-valuetext", words);
    tell();
  }
  function point(event) {
    const token = event.target.closest("span.t");
    if (!token) return;
    if (pointed !== null) tokens[pointed].classList.remove("on");
    pointed = Number(token.dataset.position);
    token.classList.add("on");
    tell();
  }
  box.addEventListener("pointerover", point);
  box.addEventListener("click", point);
  slider.addEventListener("input", show);
  slider.max = kept.times.length - 1;
  slider.value = shown;
  box.querySelectorAll(".legend span").forEach((sample) => {
    paint(sample, Number(sample.dataset.share) * kept.heads, kept.heads);
  });
  show();
}

// One cell at a time ---------------------------------------------------------------------------------------

const begun = new Set();

function showCell(name) {
  document.querySelectorAll(".cell").forEach((cell) => { cell.hidden = cell.id !== name; });
  document.querySelectorAll(`#${name} .tokenbox`).forEach((box) => {
    if (!begun.has(box)) keptTokens(box);
    begun.add(box);
  });
  return drawVisible();
}

const chooser = document.getElementById("cell");
if (chooser) {
  chooser.addEventListener("change", () => showCell(chooser.value));
  showCell(chooser.value);
} else {
  drawVisible();
}
let waiting = 0;
window.addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(drawVisible, 200); });
