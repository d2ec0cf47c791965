"use strict";
// Everything that a text contributes is set as textContent, never parsed.
const root = document.body.dataset.root;
const SVG = "http://www.w3.org/2000/svg";

function make(tag, text, className) {
  const out = document.createElement(tag);
  if (text !== undefined) out.textContent = text;
  if (className) out.className = className;
  return out;
}

document.addEventListener("keydown", (event) => {
  const typing = event.target.closest("input:not([type=range]), textarea");
  if (event.key === "Escape" && typing) typing.blur();
  if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
  const follow = (selector) => document.querySelector(selector)?.click();
  if (event.key === "/") { event.preventDefault(); document.querySelector("#q").focus(); }
  if (event.key === "j") follow("a[rel=next]");
  if (event.key === "k") follow("a[rel=prev]");
  if (event.key === "h") follow("a.home");
});

// The exported pages have no server: the search hides rows of the start page.
if (document.body.hasAttribute("data-exported")) {
  const field = document.querySelector("#q");
  field.form.addEventListener("submit", (event) => {
    if (document.querySelector("tr.row")) event.preventDefault();
  });
  field.addEventListener("input", () => {
    const wanted = field.value.trim().toLowerCase();
    for (const row of document.querySelectorAll("tr.row"))
      row.classList.toggle("filtered", !row.textContent.toLowerCase().includes(wanted));
  });
}

for (const box of document.querySelectorAll(".threshold")) {
  const groups = JSON.parse(box.dataset.groups);
  const all = groups.flatMap((group) => [...group.positives, ...group.negatives]);
  const start = Number(box.dataset.threshold);
  const low = Math.min(...all, start), high = Math.max(...all, start);
  const slider = box.querySelector("input"), output = box.querySelector("output");
  const rows = [...document.querySelectorAll(".flagged tbody tr")];
  const texts = [...document.querySelectorAll(".example.text")];
  const count = (shares, threshold) => shares.length
    ? `${shares.filter((share) => share > threshold).length} of ${shares.length}` : "–";
  const draw = (threshold) => {
    output.textContent = threshold.toFixed(4);
    rows.forEach((row, i) => {
      row.querySelector(".pos").textContent = count(groups[i].positives, threshold);
      row.querySelector(".neg").textContent = count(groups[i].negatives, threshold);
    });
    for (const text of texts)
      text.querySelector(".over").hidden = !(Number(text.dataset.share) > threshold);
  };
  slider.value = String(Math.round(1000 * (start - low) / (high - low || 1)));
  slider.addEventListener("input", () => draw(low + (high - low) * Number(slider.value) / 1000));
  draw(start);
}

for (const figure of document.querySelectorAll(".map[data-map]")) drawMap(figure);

async function drawMap(figure) {
  const answer = await fetch(`${root}api/map/${figure.dataset.map}`);
  if (!answer.ok) { figure.firstElementChild.textContent = "There is no map"; return; }
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "-1.1 -1.1 2.2 2.2");
  for (const [latent, x, y] of (await answer.json()).places.reverse()) {
    const link = document.createElementNS(SVG, "a");
    link.setAttribute("href", `${root}latent/${latent}`);
    const dot = document.createElementNS(SVG, "circle");
    dot.setAttribute("cx", x); dot.setAttribute("cy", y);
    dot.setAttribute("r", String(latent) === figure.dataset.map ? .05 : .035);
    if (String(latent) === figure.dataset.map) dot.setAttribute("class", "own");
    const title = document.createElementNS(SVG, "title");
    title.textContent = `latent ${latent}`;
    link.append(dot, title);
    link.setAttribute("aria-label", `latent ${latent}`);
    svg.append(link);
  }
  figure.removeAttribute("role");
  figure.replaceChildren(svg);
}

for (const form of document.querySelectorAll("form.try"))
  form.addEventListener("submit", (event) => { event.preventDefault(); read(form); });

async function read(form) {
  const state = form.querySelector(".state"), result = form.parentElement.querySelector(".result");
  const fired = form.parentElement.querySelector(".fired");
  state.textContent = "The model is reading…";
  const body = {
    prompt: form.elements.prompt.value, completion: form.elements.completion.value,
    latent: form.dataset.latent === "" ? null : Number(form.dataset.latent),
  };
  let answer;
  try {
    const got = await fetch(`${root}api/try`, {
      method: "POST", headers: {"content-type": "application/json"}, body: JSON.stringify(body),
    });
    answer = await got.json();
    if (!got.ok) throw new Error(answer.error);
  } catch (error) { state.textContent = String(error.message); return; }
  state.textContent = `${answer.tokens.length} tokens; choose one to see what fired on it`;
  result.hidden = false;
  const tokens = answer.tokens.map((token, at) => {
    const span = make("span", token.text, `token${token.step ? ` h${token.step}` : ""}${token.looked ? "" : " out"}`);
    if (token.step) { const mark = make("mark", token.text, span.className); return pick(mark, token, at); }
    return pick(span, token, at);
  });
  result.replaceChildren(...tokens);
  const wanted = form.dataset.at === "" ? answer.strongest : Number(form.dataset.at);
  if (tokens[wanted]) tokens[wanted].click();

  function pick(element, token, at) {
    element.tabIndex = 0;
    element.setAttribute("role", "button");
    const show = () => {
      for (const other of result.querySelectorAll(".on")) other.classList.remove("on");
      element.classList.add("on");
      fired.hidden = false;
      const list = make("ul", undefined, "plain");
      for (const [latent, value] of token.latents) {
        const item = make("li"), link = make("a", String(latent), "n");
        link.href = `${root}latent/${latent}`;
        item.append(link, " ", make("span", value.toPrecision(3), "soft"));
        list.append(item);
      }
      const why = token.looked ? "" : ": left out, special or an attention sink";
      fired.replaceChildren(make("h3", `Token ${at}${why}`), list);
    };
    element.addEventListener("click", show);
    element.addEventListener("keydown", (event) => { if (event.key === "Enter") show(); });
    return element;
  }
}
