"use strict";
// The steps of a ledger. All numbers come from the ledger's JSON; which part of the picture is known
// at which step is written on its elements (data-at).

const { ledger, steps, jacobians } = JSON.parse(document.getElementById("data").textContent);
const { nodes, edges } = ledger;
const find = (id) => document.getElementById(id);
const view = find("view"), picture = view.querySelector("svg"), camera = find("camera");
const calm = matchMedia("(prefers-reduced-motion: reduce)");
let step = 0;

// ---- numbers

/** Four significant digits, as Python's .4g. */
function number(value, exact) {
  if (typeof value === "string" || exact) return String(value);
  if (value === 0) return Object.is(value, -0) ? "-0" : "0";
  const [digits, power] = value.toExponential(3).split("e");
  const short = (text) => text.includes(".") ? text.replace(/\.?0+$/, "") : text;
  if (power >= -4 && power < 4) return short(value.toFixed(3 - power));
  const size = String(Math.abs(power)).padStart(2, "0");
  return `${short(digits)}e${power < 0 ? "-" : "+"}${size}`;
}

const exact = (held) => !/float|complex/.test(held.dtype);
const count = (held) => held.shape.reduce((a, b) => a * b, 1);

/** The elements as {value, ref}: where they are in the held tensor. */
function elements(held) {
  const key = "values" in held ? "values" : "sample";
  const found = [];
  (function walk(part, path, below) {
    if (below === 0) found.push({ value: part, ref: path });
    else part.forEach((each, i) => walk(each, `${path}.${i}`, below - 1));
  })(held[key], key, key === "sample" ? 1 : held.shape.length);
  return found;
}

function text(value, held) {
  if (Array.isArray(value)) return `${number(value[0])}${String(number(value[1])).startsWith("-") ? "" : "+"}${number(value[1])}i`;
  return number(value, exact(held));
}

function make(tag, options = {}, ...inside) {
  const { className, ref, ...rest } = options;
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (ref) made.dataset.ref = ref;
  for (const [name, value] of Object.entries(rest)) made.setAttribute(name, value);
  made.append(...inside.filter((each) => each !== null && each !== undefined));
  return made;
}

/** One number, with its place in the ledger's JSON. */
const shown = (value, held, ref) => make("span", { ref }, text(value, held));

// ---- tensors

/** A tensor: a number, a few, or a heat map with shape and range. */
function tensor(held, path, label, colour) {
  const caption = make("figcaption", {}, label);
  const figure = make("figure", { className: `held ${colour}` });
  if (!held) {
    figure.append(make("b", {}, "none"), caption);
    return figure;
  }
  const all = elements(held);
  if (count(held) === 1) {
    figure.append(make("b", { className: colour }, shown(all[0].value, held, `${path}.${all[0].ref}`)), caption);
    return figure;
  }
  caption.append(make("br"), `[${held.shape.join(", ")}]`, ` ${held.dtype}`);
  if (count(held) <= 4 && count(held) > 0 && held.shape.length === 1) {
    const list = make("b", { className: `list ${colour}` }, "[");
    all.forEach((each, i) => list.append(i ? ", " : "", shown(each.value, held, `${path}.${each.ref}`)));
    list.append("]");
    figure.append(list, caption);
    return figure;
  }
  if (count(held) > 0) {
    figure.append(map(held, all, label), caption);
    for (const end of ["min", "max"]) {
      caption.append(make("span", { className: `range ${colour}` }, make("i", {}, end), " ",
        make("span", { ref: `${path}.${end}` }, number(held[end], exact(held)))));
    }
    if (!("values" in held)) caption.append(`${all.length} of ${count(held).toLocaleString("en")} drawn`);
    if (!held.finite) caption.append("not all finite");
  } else figure.append(make("b", {}, "empty"), caption);
  return figure;
}

const MINUS = [216, 96, 20], PLUS = [38, 110, 190], NAN = [200, 0, 200];

/** A heat map: blue is positive, orange negative, the stronger the larger; purple is nan. */
function map(held, all, label) {
  const sizes = "values" in held ? held.shape : [4, all.length / 4];
  let columns = sizes.length ? sizes[sizes.length - 1] : 1;
  if (!Number.isInteger(columns)) columns = all.length;
  const rows = Math.max(1, all.length / columns);
  const value = ({ value }) => {
    if (Array.isArray(value)) return Math.hypot(...value.map(Number));
    return { inf: Infinity, "-inf": -Infinity, nan: NaN }[value] ?? Number(value);
  };
  const values = all.map(value);
  const top = Math.max(...values.filter(Number.isFinite).map(Math.abs), 0) || 1;
  const canvas = make("canvas", { width: columns, height: rows, role: "img",
    "aria-label": `heat map of ${label} of shape ${held.shape.join(" by ")}, from ${number(held.min)} to ${number(held.max)}` });
  const cell = Math.min(96 / columns, 60 / rows, 16);
  canvas.style.width = `${Math.max(columns * cell, 14)}px`;
  canvas.style.height = `${Math.max(rows * cell, 8)}px`;
  const context = canvas.getContext("2d"), image = context.createImageData(columns, rows);
  values.forEach((each, i) => {
    const colour = Number.isNaN(each) ? NAN : each < 0 ? MINUS : PLUS;
    const strength = Number.isNaN(each) ? 1 : Math.min(Math.abs(each) / top, 1);
    image.data.set([...colour, Math.round(255 * strength)], 4 * i);
  });
  context.putImageData(image, 0, 0);
  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect();
    const column = Math.min(columns - 1, Math.floor((event.clientX - box.left) / box.width * columns));
    const row = Math.min(rows - 1, Math.floor((event.clientY - box.top) / box.height * rows));
    const each = all[Math.max(0, row) * columns + Math.max(0, column)];
    const index = each.ref.split(".").slice(1).join(", ");
    canvas.title = `[${"values" in held ? index : "sampled"}] = ${text(each.value, held)}`;
  });
  return canvas;
}

/** A tensor in a sentence. */
function said(held) {
  if (!held) return "nothing";
  const all = elements(held);
  if (count(held) === 1) return text(all[0].value, held);
  const shape = `a tensor of ${held.shape.join(" by ")}`;
  return count(held) ? `${shape} from ${number(held.min)} to ${number(held.max)}` : `an empty ${shape.slice(2)}`;
}

// ---- the current gate

const main = (node) => Math.max(0, node.upstreams.findIndex((each) => each));
const operands = (node) => edges.map((edge, i) => ({ edge, i })).filter(({ edge }) => edge.target === node.id);
const output = (node, which) => node.values.length > 1 ? `${node.name}[${which}]` : node.name;
const times = (n) => n === 1 ? "once" : n === 2 ? "twice" : `${n} times`;

function heading(phase, name, remark) {
  return [make("p", { className: "phase" }, phase), make("h2", {}, name, remark ? make("small", {}, remark) : null)];
}

function sourceOf(node) {
  const found = /^(.*):(\d+): (.*)$/s.exec(node.source ?? "");
  if (!found) return null;
  return make("p", { className: "source" }, make("b", {}, found[3]), `${found[1].split(/[\\/]/).pop()}, line ${found[2]}`);
}

const panels = {
  inputs() {
    const leaves = nodes.filter((node) => node.kind !== "gate");
    const given = leaves.slice(0, 24).map((node) =>
      tensor(node.values[0], `nodes.${node.id}.values.0`, node.name, "value"));
    const more = leaves.length > 24 ? make("p", {}, `and ${leaves.length - 24} more`) : null;
    const all = nodes.length - leaves.length;
    return {
      parts: [...heading("Start", "Inputs and parameters"),
        make("p", {}, "Forward computes and saves; backward applies the chain rule."),
        make("div", { className: "law terms given" }, ...given), more],
      sentence: `${leaves.length} inputs and parameters, ${all} gates.`,
    };
  },
  forward(node) {
    const given = operands(node);
    const terms = given.map(({ edge }) => {
      const source = nodes[edge.source];
      return tensor(source.values[edge.output], `nodes.${source.id}.values.${edge.output}`, output(source, edge.output), "value");
    });
    const results = node.values.map((held, i) => tensor(held, `nodes.${node.id}.values.${i}`, output(node, i), "value"));
    const names = given.map(({ edge }) => output(nodes[edge.source], edge.output)).join(", ");
    return {
      parts: [...heading("Forward", node.name, node.operation), sourceOf(node),
        make("div", { className: "law" }, make("h3", {}, `${node.operation}(${names})`), make("div", { className: "terms given" }, ...terms)),
        make("div", { className: "law" }, make("h3", {}, node.name), make("div", { className: "terms given" }, ...results))],
      sentence: `${node.name}, ${node.operation} of ${names || "nothing"}, gives ${node.values.map(said).join(" and ")}.`,
    };
  },
  base(_, bases) {
    const terms = bases.flatMap((id) => nodes[id].upstreams.map((held, i) => held &&
      tensor(held, `nodes.${id}.upstreams.${i}`, `dL/d${output(nodes[id], i)}`, "gradient"))).filter(Boolean);
    const names = bases.map((id) => nodes[id].name).join(", ");
    return {
      parts: [...heading("Base case", names),
        make("p", {}, "The backward pass starts with the gradient of the output: for the loss itself it is 1."),
        make("div", { className: "law terms given" }, ...terms)],
      sentence: `The gradient of ${names} is ${bases.map((id) => said(nodes[id].upstreams[main(nodes[id])])).join(" and ")}.`,
    };
  },
  backward(node) {
    const which = main(node);
    const upstreams = node.upstreams.map((held, i) => ({ held, i })).filter(({ held }) => held);
    const sentences = [];
    const laws = operands(node).filter(({ edge }) => edge.product).map(({ edge, i }) => {
      const source = nodes[edge.source], name = output(source, edge.output);
      const several = upstreams.length > 1;
      const terms = several ? [make("div", { className: "never" }, make("b", {}, "upstream"), "of each output, above")]
        : upstreams.map(({ held, i: place }) => tensor(held, `nodes.${node.id}.upstreams.${place}`, "upstream", "gradient"));
      const lost = edge.local && String(edge.local.shape) !== String(edge.product.shape);
      let middle, how;
      if (edge.local) {
        middle = [make("i", {}, "×"), tensor(edge.local, `edges.${i}.local`, "local", "local")];
        how = `times local ${said(edge.local)}${lost ? ", added up over what was broadcast," : ""}`;
      } else {
        middle = [make("i", {}, "×"), make("div", { className: "never" }, make("b", {}, "local"),
          jacobians[i] ? `a Jacobian of shape ${jacobians[i]}, never formed` : "a Jacobian, never formed")];
        how = `by the rule ${edge.rule}`;
      }
      sentences.push(`to ${name} ${how} goes ${said(edge.product)}`);
      const uses = edges.filter((other) => other.source === edge.source && other.output === edge.output && other.product).length;
      const remarks = [];
      if (lost) remarks.push("Summed over the dimensions along which it was broadcast.");
      if (uses > 1) remarks.push(`${name} is used ${times(uses)}: what its uses send adds up.`);
      return make("div", { className: "law" }, make("h3", {}, `dL/d${name}`),
        edge.rule && !edge.local ? make("p", { className: "rule" }, edge.rule) : null,
        make("div", { className: "terms" }, ...terms, ...middle, make("i", {}, "="),
          tensor(edge.product, `edges.${i}.product`, "downstream", "gradient")),
        remarks.length ? make("p", {}, remarks.join(" ")) : null);
    });
    if (upstreams.length > 1) {
      laws.unshift(make("div", { className: "law" }, make("h3", {}, "upstream"), make("div", { className: "terms given" },
        ...upstreams.map(({ held, i }) => tensor(held, `nodes.${node.id}.upstreams.${i}`, output(node, i), "gradient")))));
    }
    return {
      parts: [...heading("Backward", node.name, [node.operation, node.pattern].filter(Boolean).join(", ")), ...laws, sourceOf(node)],
      sentence: `${node.name}, ${node.pattern ?? node.operation}: upstream ${said(node.upstreams[which])}; ${sentences.join("; ")}.`,
    };
  },
};

// ---- a step

const known = [...picture.querySelectorAll("[data-at]")];
const wires = [...picture.querySelectorAll("path[data-edge]")];
const figures = new Map([...picture.querySelectorAll("[data-node]")].map((each) => [Number(each.dataset.node), each]));
const lines = [...document.querySelectorAll("#code li")];
const forwards = steps.filter(({ phase }) => phase === "forward").length;
const backwards = steps.filter(({ phase }) => phase === "backward").length;

function where() {
  const { phase } = steps[step];
  if (phase === "inputs") return "Start";
  if (phase === "base") return "Base case";
  return phase === "forward" ? `Forward ${step} of ${forwards}` : `Backward ${step - forwards - 1} of ${backwards}`;
}

function show(next, follow = true) {
  step = Math.min(Math.max(next, 0), steps.length - 1);
  const { phase, node, nodes: several = [] } = steps[step];
  const currents = node === undefined ? several : [node];
  for (const each of known) each.classList.toggle("future", Number(each.dataset.at) > step);
  for (const [id, each] of figures) each.classList.toggle("current", currents.includes(id));
  for (const each of wires) {
    const edge = edges[each.dataset.edge];
    each.classList.toggle("sends", phase === "forward" && edge.target === node);
    each.classList.toggle("returns", phase === "backward" && edge.target === node && edge.product !== null);
  }
  const lit = [];
  for (const line of lines) {
    const on = line.dataset.phase === phase && currents.some((id) => line.dataset.node === nodes[id].name);
    line.classList.toggle("lit", on);
    if (on) line.setAttribute("aria-current", "step"); else line.removeAttribute("aria-current");
    if (on) lit.push(line);
  }
  if (lit.length) reveal(lit);
  const { parts, sentence } = panels[phase](nodes[node], several);
  const panel = find("gate");
  panel.className = phase;
  panel.replaceChildren(...parts.filter(Boolean));
  panel.scrollTop = 0;
  find("said").textContent = `${where()}. ${sentence}`;
  find("count").textContent = where();
  find("scrub").value = step;
  find("scrub").setAttribute("aria-valuetext", where());
  document.body.dataset.step = step;
  if (follow && currents.length) look(currents);
  if (step === steps.length - 1) play(false);
}

/** Scroll the code so that these lines are seen, the first of them at least, and nothing else. */
function reveal(lines) {
  const box = find("code");
  const last = lines.at(-1);
  const top = lines[0].offsetTop - box.offsetTop - 24;
  const bottom = last.offsetTop + last.offsetHeight - box.offsetTop + 24;
  if (bottom > box.scrollTop + box.clientHeight) box.scrollTop = bottom - box.clientHeight;
  if (top < box.scrollTop) box.scrollTop = top;
}

let timer = null;
function play(on = timer === null) {
  clearInterval(timer);
  timer = null;
  if (on) {
    if (step === steps.length - 1) show(0);
    timer = setInterval(() => show(step + 1), 1100);
  }
  document.body.classList.toggle("playing", on);
  find("play").setAttribute("aria-label", on ? "Pause" : "Play");
}

function go(next) {
  play(false);
  show(next);
}

// ---- the camera

const whole = { width: Number(picture.dataset.width), height: Number(picture.dataset.height) };
let scale = 1, left = 0, top_ = 0;

function aim(to, x, y, gliding = false) {
  scale = Math.min(Math.max(to, 0.05), 6);
  // Some of the picture stays in sight.
  const keep = 60;
  left = Math.min(Math.max(x, keep - whole.width * scale), view.clientWidth - keep);
  top_ = Math.min(Math.max(y, keep - whole.height * scale), view.clientHeight - keep);
  view.classList.toggle("gliding", gliding && !calm.matches);
  camera.style.transform = `translate(${left}px, ${top_}px) scale(${scale})`;
  camera.style.setProperty("--scale", scale);
  camera.classList.toggle("far", scale < 0.5);
  camera.classList.toggle("farther", scale < 0.38);
}

const FOOT = 44; // where the legend and the buttons are
const fitting = () => Math.min(view.clientWidth / whole.width, (view.clientHeight - FOOT) / whole.height, 1.6);

let followed = false; // whether a step brought the camera nearer
function fit(gliding = false) {
  const to = fitting();
  followed = false;
  aim(to, (view.clientWidth - whole.width * to) / 2, (view.clientHeight - FOOT - whole.height * to) / 2, gliding);
}

function zoom(factor, x = view.clientWidth / 2, y = view.clientHeight / 2, gliding = true) {
  const to = Math.min(Math.max(scale * factor, 0.05), 6), ratio = to / scale;
  followed = true;
  aim(to, x - (x - left) * ratio, y - (y - top_) * ratio, gliding);
}

/** Bring gates into sight; near enough to be read, unless the reader chose another distance. */
function look(ids) {
  const boxes = ids.map((id) => figures.get(id)?.querySelector("rect")).filter(Boolean);
  if (!boxes.length) return;
  const x = boxes.map((box) => Number(box.getAttribute("x")) + Number(box.getAttribute("width")) / 2);
  const y = boxes.map((box) => Number(box.getAttribute("y")) + Number(box.getAttribute("height")) / 2);
  const shift = camera.querySelector("g").transform.baseVal.consolidate().matrix;
  const middle = (all) => (Math.min(...all) + Math.max(...all)) / 2;
  const near = !followed && scale < 0.7 ? 0.85 : scale;
  if (near !== scale) followed = true;
  const px = (middle(x) + shift.e) * near, py = (middle(y) + shift.f) * near;
  const inside = near === scale && px + left > 150 && px + left < view.clientWidth - 150
    && py + top_ > 90 && py + top_ < view.clientHeight - 110;
  if (!inside && !(near === scale && scale <= fitting() * 1.001)) {
    aim(near, view.clientWidth / 2 - px, view.clientHeight / 2 - py, true);
  }
}

view.addEventListener("wheel", (event) => {
  event.preventDefault();
  const box = view.getBoundingClientRect();
  const lines_ = event.deltaMode === 1 ? 16 : 1;
  zoom(Math.exp(-event.deltaY * lines_ * 0.0015), event.clientX - box.left, event.clientY - box.top, false);
}, { passive: false });

let dragged = null;
const fingers = new Map();
view.addEventListener("pointerdown", (event) => {
  if (event.target.closest("button") || event.button > 0) return;
  fingers.set(event.pointerId, event);
  dragged = { x: event.clientX, y: event.clientY, left, top: top_, moved: false };
});
view.addEventListener("pointermove", (event) => {
  if (!fingers.has(event.pointerId) || !dragged) return;
  if (fingers.size === 2) {
    const spread = () => { const [a, b] = [...fingers.values()]; return Math.hypot(a.clientX - b.clientX, a.clientY - b.clientY); };
    const before = spread();
    fingers.set(event.pointerId, event);
    const box = view.getBoundingClientRect(), [a, b] = [...fingers.values()];
    zoom(spread() / (before || 1), (a.clientX + b.clientX) / 2 - box.left, (a.clientY + b.clientY) / 2 - box.top, false);
    dragged = { ...dragged, x: event.clientX, y: event.clientY, left, top: top_, moved: true };
    return;
  }
  fingers.set(event.pointerId, event);
  const x = event.clientX - dragged.x, y = event.clientY - dragged.y;
  if (!dragged.moved && Math.hypot(x, y) < 4) return;
  if (!dragged.moved) view.setPointerCapture(event.pointerId);
  dragged.moved = true;
  followed = true;
  view.classList.add("dragging");
  aim(scale, dragged.left + x, dragged.top + y);
});
for (const end of ["pointerup", "pointercancel"]) {
  view.addEventListener(end, (event) => {
    fingers.delete(event.pointerId);
    view.classList.remove("dragging");
    if (!dragged || dragged.moved || end === "pointercancel") return;
    const gate = event.target.closest("[data-node]");
    if (gate) jump(Number(gate.dataset.node), steps[step].phase);
  });
}
for (const [id, figure] of figures) {
  const touching = wires.filter((each) => edges[each.dataset.edge].target === id || edges[each.dataset.edge].source === id);
  figure.addEventListener("pointerenter", () => touching.forEach((each) => each.classList.add("near")));
  figure.addEventListener("pointerleave", () => touching.forEach((each) => each.classList.remove("near")));
}

/** To the step of a gate: in the pass that is shown, or in the other. */
function jump(node, phase) {
  const pass = ["base", "backward"].includes(phase) ? "backward" : "forward";
  const found = (wanted) => steps.findIndex((each) => each.node === node && each.phase === wanted);
  const place = found(pass) >= 0 ? found(pass) : found("forward");
  if (place >= 0) go(place);
}

// ---- controls

find("first").onclick = () => go(0);
find("back").onclick = () => go(step - 1);
find("next").onclick = () => go(step + 1);
find("last").onclick = () => go(steps.length - 1);
find("play").onclick = () => play();
find("scrub").max = steps.length - 1;
find("scrub").oninput = (event) => go(Number(event.target.value));
find("in").onclick = () => zoom(1.35);
find("out").onclick = () => zoom(1 / 1.35);
find("fit").onclick = () => fit(true);
for (const line of lines) {
  if (line.dataset.node) {
    line.onclick = () => jump(nodes.findIndex((node) => node.name === line.dataset.node), line.dataset.phase);
  }
}

find("theme").onclick = () => {
  const dark = document.documentElement.dataset.theme
    ? document.documentElement.dataset.theme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = dark ? "light" : "dark";
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const onView = document.activeElement === view;
  const moves = { ArrowLeft: [60, 0], ArrowRight: [-60, 0], ArrowUp: [0, 60], ArrowDown: [0, -60] };
  if (event.shiftKey && moves[event.key]) {
    followed = true;
    aim(scale, left + moves[event.key][0], top_ + moves[event.key][1]);
    event.preventDefault();
    return;
  }
  const range = event.target.matches("input");
  const actions = {
    ArrowRight: range ? null : () => go(step + 1),
    ArrowLeft: range ? null : () => go(step - 1),
    ArrowDown: range || !onView && event.target.matches("section") ? null : () => go(step + 1),
    ArrowUp: range || !onView && event.target.matches("section") ? null : () => go(step - 1),
    Home: range ? null : () => go(0),
    End: range ? null : () => go(steps.length - 1),
    " ": event.target.matches("button") ? null : () => play(),
    "+": () => zoom(1.35), "=": () => zoom(1.35), "-": () => zoom(1 / 1.35), 0: () => fit(true),
  };
  const act = actions[event.key];
  if (!act) return;
  act();
  event.preventDefault();
});

new ResizeObserver(() => { if (!followed) fit(); }).observe(view);
fit();
show(0, false);
requestAnimationFrame(() => requestAnimationFrame(() => document.body.classList.add("ready")));
