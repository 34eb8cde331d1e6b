"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const characters = data.passage;
// Isolated, so that a character written from right to left does not reorder the text beside it.
const shown = (c) => `\u2068${c === "\n" ? "↵" : c === " " ? "␣" : c === "\t" ? "⇥" : c}\u2069`;
const find = (id) => document.getElementById(id);

// Fill `box` with a span for each character; call `show` with the index that is pointed at, tapped or moved to.
function fill(box, show) {
  const parts = document.createDocumentFragment();
  characters.forEach((c, at) => {
    const span = document.createElement("span");
    span.textContent = c === "\n" ? "↵\n" : c;
    span.dataset.at = at;
    parts.append(span);
  });
  box.append(parts);
  const spans = box.children;
  let now = 0;
  const go = (at, scroll) => {
    spans[now].classList.remove("on");
    now = Math.max(0, Math.min(spans.length - 1, at));
    spans[now].classList.add("on");
    if (scroll) {
      const top = spans[now].offsetTop;
      if (top < box.scrollTop || top > box.scrollTop + box.clientHeight - 30) box.scrollTop = top - 60;
    }
    show(now);
  };
  const at = (event) => event.target.dataset && event.target.dataset.at;
  const point = (event) => { if (at(event) !== undefined) go(Number(at(event)), false); };
  box.addEventListener("pointerover", point);
  box.addEventListener("click", point);
  box.addEventListener("focus", () => go(now, false));
  box.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -40, ArrowDown: 40 }[event.key];
    if (step) { event.preventDefault(); go(now + step, true); }
  });
  go(0, false);
  return spans;
}

function guesses(at) {
  const bits = data.bits[at];
  const surprise = find("surprise");
  const parts = document.createDocumentFragment();
  surprise.textContent = bits === null ? `${shown(characters[at])}: no prediction`
    : `${shown(characters[at])}: ${bits.toFixed(2)} bits, probability ${(100 * 2 ** -bits).toPrecision(3)}%`;
  (data.guesses[at] || []).forEach(([c, p]) => {
    const row = document.createElement("div");
    const name = document.createElement("span");
    name.textContent = shown(c);
    if (c === characters[at]) name.className = "actual";
    const meter = document.createElement("meter");
    meter.value = p;
    meter.setAttribute("aria-label", "probability");
    const share = document.createElement("span");
    share.textContent = `${(100 * p).toFixed(1)}%`;
    row.append(name, meter, share);
    parts.append(row);
  });
  find("guesses").replaceChildren(parts);
}
const letters = fill(find("surprisal"), guesses);
data.bits.forEach((bits, at) => {
  letters[at].style.backgroundColor = `rgba(var(--hot), ${Math.min((bits || 0) / 10, 1) * 0.6})`;
});

// For each unit a byte for each character: its activation from -127 to 127.
const bytes = Uint8Array.from(atob(data.activations), (c) => c.charCodeAt(0));
const activations = new Int8Array(bytes.buffer);
let row = 0;
const value = (at) => activations[row * characters.length + at] / 127;
const activation = (at) => {
  find("active").textContent = `unit ${data.units[row]} after ${shown(characters[at])}: ${value(at).toFixed(2)}`;
};
const colours = fill(find("unit-text"), activation);
function choose(unit) {
  const found = data.units.indexOf(unit);
  if (found < 0) { find("active").textContent = `unit ${unit} is not on this page`; return; }
  row = found;
  for (let at = 0; at < colours.length; at++) {
    const v = value(at);
    colours[at].style.backgroundColor = `rgba(var(--${v < 0 ? "cold" : "hot"}), ${Math.abs(v) * 0.6})`;
  }
  find("unit").value = unit;
  for (const button of find("best").children) button.setAttribute("aria-pressed", Number(button.value) === unit);
  activation(0);
}
function offer(name) {
  const parts = document.createDocumentFragment();
  data.features[name].forEach(([unit, r]) => {
    const button = document.createElement("button");
    button.type = "button";
    button.value = unit;
    button.textContent = `unit ${unit} (r = ${r.toFixed(2)})`;
    button.addEventListener("click", () => choose(unit));
    parts.append(button);
  });
  find("best").replaceChildren(parts);
  choose(data.features[name][0][0]);
}
const select = find("feature");
Object.keys(data.features).forEach((name) => select.add(new Option(name, name)));
select.addEventListener("change", () => offer(select.value));
find("unit").addEventListener("change", (event) => choose(Number(event.target.value)));
if (select.options.length) offer(select.value); else choose(data.units[0]);
