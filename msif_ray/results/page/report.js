"use strict";
// Document text is untrusted: it is only ever set as text (textContent), never as markup.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);
  const state = { label: 0, query: 0 };
  const LINE = 31; // characters of a query in the list: its completion, and what comes before as far as there is room

  const make = (name, attributes = {}, ...children) => {
    const node = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    node.append(...children);
    return node;
  };
  const draw = (name, attributes, text) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const number = (value) => {
    const size = Math.abs(value);
    if (value === 0) return "0";
    if (size >= 1e6 || size < 1e-3) return value.toExponential(2).replace("-", "−").replace("e+", "e").replace("e-", "e−");
    return value.toLocaleString("en", size >= 1000 ? { maximumFractionDigits: 0 } : { maximumSignificantDigits: 3 }).replace("-", "−");
  };
  const signed = (value) => (value > 0 ? "+" : "") + number(value);
  const percent = (share) => (share >= 0.0995 ? (100 * share).toFixed(0) : share >= 0.00095 ? (100 * share).toFixed(1) : share > 0 ? "< 0.1" : "0") + "\u00a0%";
  const tokens = (count) => `${count.toLocaleString("en")} token${count === 1 ? "" : "s"}`;
  // 1 to 8 by size, or nothing where that is next to nothing.
  const shade = (value, largest) => {
    const level = Math.min(8, Math.ceil((8 * Math.abs(value)) / largest - 0.4));
    return largest > 0 && level > 0 ? (value > 0 ? "p" : "n") + level : "";
  };
  const results = () => data.scored[state.label].queries[state.query];

  // Queries ---------------------------------------------------------------
  const buttons = data.queries.map((query, index) => {
    const flag = make("i", { class: "flag", title: "see the notes on this query" }, "!", make("span", { class: "hidden-text" }, " see its notes"));
    const room = Math.max(8, LINE - query.completion.length);
    const ending = query.prompt.length > room ? "…" + query.prompt.slice(-room).trimStart() : query.prompt;
    const button = make("button", { type: "button" }, make("b", {}, flag, query.id), make("span", { dir: "auto" }, ending, make("em", {}, query.completion)));
    button.addEventListener("click", () => choose(state.label, index, true));
    at("queries").append(make("li", {}, button));
    return button;
  });
  const findQueries = () => {
    const wanted = at("find-query").value.toLowerCase();
    let found = 0;
    data.queries.forEach((query, index) => {
      const hit = `${query.id}\n${query.prompt}${query.completion}`.toLowerCase().includes(wanted) || (query.rather_than || "").toLowerCase().includes(wanted);
      buttons[index].parentNode.hidden = !hit;
      found += hit;
    });
    at("queries-found").textContent = wanted ? `${found} found` : "";
  };
  at("find-query").addEventListener("input", findQueries);
  at("queries").addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step) return;
    const open = buttons.filter((button) => !button.parentNode.hidden);
    const next = open[open.indexOf(document.activeElement) + step];
    if (next) next.focus();
    event.preventDefault();
  });

  const fact = (name, value) => [make("div", {}, make("dt", {}, name), make("dd", {}, value))];
  const showQuery = () => {
    const query = data.queries[state.query], found = results();
    at("query-title").textContent = query.id;
    const [before, inside, after] = query.explained, margin = query.rather_than !== null;
    at("prompt").textContent = query.prompt + before;
    at("completion").textContent = inside;
    at("after").textContent = after;
    const facts = [];
    if (margin) facts.push(...fact("rather than", query.rather_than));
    if (query.log_likelihood !== null) {
      facts.push(...fact(margin ? "log-likelihood above the other's" : "log-likelihood", `${number(query.log_likelihood)} nats`));
      if (query.tokens && !margin) {
        const several = query.tokens > 1 && data.said !== "class";
        const probability = percent(Math.exp(query.log_likelihood / query.tokens)) + (several ? `, ${tokens(query.tokens)}` : "");
        facts.push(...fact(several ? "geometric mean of its tokens’ probabilities" : "probability", probability));
      }
    }
    if (found.documents) {
      facts.push(...fact("documents scored", found.documents.toLocaleString("en")));
      facts.push(...fact("deviation of scores", number(found.deviation)));
      for (const [side, name] of [["supports", "supporting"], ["opposes", "opposing"]]) {
        const share = found[side].reduce((sum, each) => sum + each.share, 0);
        facts.push(...fact(`${name} shown`, `${percent(share)} of the whole`));
      }
    }
    if (found.energy !== null) facts.push(...fact("query kept", found.energy > 0.999999 ? "all of it" : `${percent(found.energy)}, mean rank ${number(found.rank)}`));
    at("query-facts").replaceChildren(...facts);
    const signals = found.signals.map(([title, detail]) => make("li", { class: "signal" }, make("strong", {}, `${title}.`), ` ${detail}`));
    at("query-signals").replaceChildren(...signals);
  };

  // Stages ----------------------------------------------------------------
  const showStages = () => {
    const place = at("stages");
    if (!place) return;
    const found = results().stages;
    if (!found.length) return place.replaceChildren(make("p", { class: "none" }, "These scores are compared with no other stage’s."));
    const head = ["scores", "share of the support", "supports", "opposes", "net", "documents"].map((name) => make("th", { scope: "col" }, name));
    const lines = found.map((each) => {
      const bar = make("i");
      bar.style.width = `${100 * each.share}%`;
      const all = each.documents === each.out_of ? "" : ` of ${each.out_of.toLocaleString("en")}`;
      return make("tr", {}, make("th", { scope: "row" }, each.label),
        make("td", {}, make("span", { class: "share", "aria-hidden": "true" }, bar), ` ${each.share === null ? "–" : percent(each.share)}`),
        ...[each.supports, each.opposes, each.net].map((value) => make("td", {}, signed(value))),
        make("td", {}, `${each.documents.toLocaleString("en")}${all}`));
    });
    place.replaceChildren(make("table", {}, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...lines)), make("p", { class: "quiet" }, `Sums over the documents of score/N, in nats of the ${data.said}’s log-likelihood: what leaving each one out would cost.`));
  };

  // Distribution ----------------------------------------------------------
  const showDistribution = () => {
    const found = results(), place = at("distribution");
    if (!found.documents) return place.replaceChildren(make("p", { class: "none" }, "No score."));
    const width = 640, height = 190, base = 150, left = 8, right = width - 8;
    const lowest = Math.min(found.lowest, 0), highest = Math.max(found.highest, 0), span = highest - lowest || 1;
    const x = (score) => left + ((score - lowest) / span) * (right - left);
    const most = Math.log1p(Math.max(...found.histogram));
    const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `Scores of ${found.documents} documents from ${number(found.lowest)} to ${number(found.highest)}, mean ${number(found.mean)}, standard deviation ${number(found.deviation)}. ${found.supports.length} supporting and ${found.opposes.length} opposing documents are marked.` });
    const step = (found.highest - found.lowest) / found.histogram.length;
    found.histogram.forEach((count, bin) => {
      if (!count) return;
      const from = x(found.lowest + bin * step), tall = Math.max(2, (Math.log1p(count) / most) * (base - 22));
      const bar = draw("rect", { class: "bar", x: from.toFixed(1), width: Math.max(1, x(found.lowest + (bin + 1) * step) - from - 1).toFixed(1), y: (base - tall).toFixed(1), height: tall.toFixed(1) });
      bar.append(draw("title", {}, `${count.toLocaleString("en")} documents from ${number(found.lowest + bin * step)} to ${number(found.lowest + (bin + 1) * step)}`));
      svg.append(bar);
    });
    svg.append(draw("line", { class: "axis", x1: left, x2: right, y1: base + 0.5, y2: base + 0.5 }));
    svg.append(draw("line", { class: "zero", x1: x(0), x2: x(0), y1: 14, y2: base + 18 }));
    const peak = Math.max(...found.histogram);
    svg.append(draw("text", { x: left, y: 11 }, `fullest bin: ${peak.toLocaleString("en")}`));
    for (const side of ["supports", "opposes"]) {
      for (const each of found[side]) {
        const mark = draw("path", { class: `tick-${side}`, d: `M${x(each.score).toFixed(1)} ${base + 2}l5 11h-10z`, "data-mark": `${side}-${each.rank}` });
        mark.append(draw("title", {}, `${each.id}: ${signed(each.score)}`));
        svg.append(mark);
      }
    }
    const zero = x(0), apart = 90;
    if (zero - left > apart) svg.append(draw("text", { x: left, y: height - 8 }, number(found.lowest)));
    if (right - zero > apart) svg.append(draw("text", { x: right, y: height - 8, "text-anchor": "end" }, number(found.highest)));
    svg.append(draw("text", { x: Math.min(Math.max(zero, 12), width - 12), y: height - 8, "text-anchor": "middle" }, "0"));
    place.replaceChildren(svg);
  };

  // Layers and maps -------------------------------------------------------
  const mapAt = new Map(data.maps.cells.map(([layer, kind], map) => [`${layer} ${kind}`, map])); // there may be thousands
  const showHeat = () => {
    const shares = results().heat[at("heat-side").value], { layers, kinds, whole } = data.maps, place = at("heat");
    if (!shares) return place.replaceChildren(make("p", { class: "none" }, "No document is shown on this side."));
    const largest = Math.max(...shares.map(Math.abs));
    const numbers = layers.length <= 12;
    const head = make("tr", {}, make("th", { scope: "col" }, "layer"), ...layers.map((layer) => make("th", { scope: "col" }, layer === null ? "–" : String(layer))), make("th", { scope: "col" }, "all"));
    const body = kinds.map((kind, row) => {
      let sum = 0;
      const line = make("tr", {}, make("th", { scope: "row" }, kind));
      layers.forEach((layer, column) => {
        const map = mapAt.get(`${column} ${row}`);
        if (map === undefined) return line.append(make("td", { class: "void" }));
        const share = shares[map] / whole, text = `${(100 * share).toFixed(share && Math.abs(share) < 0.095 ? 1 : 0).replace("-", "−")}`;
        sum += share;
        line.append(make("td", { class: shade(shares[map], largest), title: `${kind}, layer ${layer}: ${text} %` }, numbers ? text : make("span", { class: "hidden-text" }, text)));
      });
      line.append(make("td", { class: "sum" }, (100 * sum).toFixed(0).replace("-", "−")));
      return line;
    });
    place.replaceChildren(make("table", {}, make("caption", { class: "hidden-text" }, "Per cent of the sum of absolute shares, by layer and kind of map"), make("thead", {}, head), make("tbody", {}, ...body)), make("p", { class: "quiet" }, "Per cent of what all maps contribute to the scores of the documents shown on that side (signs ignored in the total). Blue supports, orange opposes."));
  };
  at("heat-side").addEventListener("change", showHeat);

  // Documents -------------------------------------------------------------
  const gap = (count) => make("span", { class: "gap", dir: "ltr" }, tokens(count));
  const card = (each, side) => {
    const text = make("p", { class: "text", dir: "auto" });
    const strong = [];
    for (const [before, words, scores] of each.segments) {
      if (before) text.append(gap(before));
      words.forEach((word, index) => {
        const score = (scores[index] * each.largest) / 1000, level = shade(scores[index], 1000);
        strong.push([word, score]);
        if (!level) return text.append(word);
        text.append(make("span", { class: level, title: signed(score) }, word));
      });
    }
    if (each.after) text.append(gap(each.after));
    const strongest = strong.sort((one, other) => Math.abs(other[1]) - Math.abs(one[1])).slice(0, 4).filter((token) => token[1]);
    const line = make("p", { class: "strongest" }, "strongest tokens ");
    strongest.forEach(([word, score], index) => line.append(index ? ", " : "", make("bdi", {}, `“${word}”`), ` ${signed(score)}`));
    const carriers = each.maps.map(([map, share]) => `${data.maps.names[map]} ${percent(Math.abs(share))}`);
    const maps = make("p", { class: "strongest" }, `strongest maps ${carriers.join(", ")}`);
    const norms = [["norm", each.norm], ["curvature norm", each.curvature_norm]].filter(([, value]) => value !== undefined)
      .map(([name, value]) => make("span", {}, `${name} ${number(value)}`));
    const bar = make("i");
    bar.style.width = `${Math.min(100, 100 * each.share)}%`;
    const score = make("span", { class: "score" }, signed(each.score));
    const node = make("li", { class: side }, make("article", { "aria-label": `rank ${each.rank}, ${each.id}, score ${signed(each.score)}` },
      make("div", { class: "head" }, make("span", { class: "rank" }, String(each.rank)), make("h4", {}, each.id), score),
      make("div", { class: "meta" }, make("span", { class: "share", "aria-hidden": "true" }, bar), make("span", {}, `${percent(each.share)} of the whole`), make("span", {}, tokens(each.n_tokens)), ...norms),
      text, line, maps));
    const mark = (on) => document.querySelector(`[data-mark="${side}-${each.rank}"]`)?.classList.toggle("tick-on", on);
    node.addEventListener("pointerenter", () => mark(true));
    node.addEventListener("pointerleave", () => mark(false));
    // A text that scrolls is reached by keyboard.
    requestAnimationFrame(() => { if (text.scrollHeight > text.clientHeight + 2) { text.tabIndex = 0; text.setAttribute("role", "region"); text.setAttribute("aria-label", `text of ${each.id}`); } });
    return node;
  };
  const orders = {
    rank: (one, other) => one.rank - other.rank,
    length: (one, other) => other.n_tokens - one.n_tokens,
    norm: (one, other) => (other.norm ?? 0) - (one.norm ?? 0), // one that is no number is not given
    "per-norm": (one, other) => Math.abs(other.score / (other.norm || 1)) - Math.abs(one.score / (one.norm || 1)),
    "per-curvature-norm": (one, other) => Math.abs(other.score / (other.curvature_norm || 1)) - Math.abs(one.score / (one.curvature_norm || 1)),
    id: (one, other) => one.id < other.id ? -1 : 1,
  };
  const showDocuments = () => {
    const wanted = at("find-document").value.toLowerCase();
    let shown = 0, all = 0;
    for (const side of ["supports", "opposes"]) {
      const found = results()[side].filter((each) => `${each.id}\n${each.segments.map((segment) => segment[1].join("")).join("\n")}`.toLowerCase().includes(wanted));
      all += results()[side].length;
      shown += found.length;
      found.sort(orders[at("order").value]);
      const nothing = make("li", { class: "none" }, wanted ? "None of the shown documents has that." : "No document has a score on this side.");
      at(side).replaceChildren(...(found.length ? found.map((each) => card(each, side)) : [nothing]));
    }
    at("documents-found").textContent = wanted ? `${shown} of ${all} documents` : "";
  };
  at("find-document").addEventListener("input", showDocuments);
  at("order").addEventListener("change", showDocuments);

  // The page --------------------------------------------------------------
  const choose = (label, query, remember) => {
    state.label = label;
    state.query = query;
    at("label").value = String(label);
    buttons.forEach((button, index) => button.setAttribute("aria-current", String(index === query)));
    buttons.forEach((button, index) => button.classList.toggle("flagged", data.scored[label].queries[index].signals.length > 0));
    showQuery();
    showStages();
    showDistribution();
    showHeat();
    showDocuments();
    document.title = `${data.queries[query].id} · influence report`;
    if (remember) history.replaceState(null, "", `#${label}/${query}`);
  };
  at("label").addEventListener("change", (event) => choose(Number(event.target.value), state.query, true));
  const open = () => {
    const [label, query] = location.hash.slice(1).split("/").map(Number);
    const known = data.scored[label]?.queries[query];
    choose(known ? label : 0, known ? query : 0, false);
    const list = at("queries"), entry = buttons[state.query].parentNode; // scrollIntoView would move where Tab begins
    if (entry.offsetTop + entry.offsetHeight > list.offsetTop + list.clientHeight) list.scrollTop = entry.offsetTop - list.offsetTop - list.clientHeight / 2;
  };
  window.addEventListener("hashchange", open);
  open();
})();
