"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const plots = [...document.querySelectorAll(".plot")];

// ---- charts

async function unpackPlotly() {
  const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  document.head.append(script);
}

// What light and dark decide; the traces have colours that are readable on both.
function ground() {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(name).trim();
  const axis = { gridcolor: colour("--line"), linecolor: colour("--line"), tickcolor: colour("--line") };
  return {
    paper_bgcolor: colour("--card"), plot_bgcolor: colour("--card"),
    font: { color: colour("--text"), size: 12, family: getComputedStyle(document.body).fontFamily },
    hoverlabel: { bgcolor: colour("--card"), bordercolor: colour("--line"), font: { color: colour("--text") } },
    xaxis: axis, yaxis: axis,
  };
}

function merged(base, more) {
  const result = { ...base };
  for (const [name, value] of Object.entries(more)) {
    const nested = value && typeof value === "object" && !Array.isArray(value);
    result[name] = nested ? merged(base[name] ?? {}, value) : value;
  }
  return result;
}

function drawAll() {
  const config = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d"] };
  const layout = ground();
  return Promise.all(plots.map((plot) => {
    const chart = data.charts[plot.dataset.chart];
    return Plotly.react(plot, chart.data, merged(chart.layout, layout), config);
  }));
}

async function showCharts() {
  try {
    await unpackPlotly();
    await drawAll();
    document.documentElement.dataset.ready = "true";
  } catch (error) {
    for (const plot of plots) plot.textContent = `This browser cannot draw the charts: ${error.message}`;
    return;
  }
  const redraw = () => { drawAll(); for (const plot of plots) Plotly.Plots.resize(plot); };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  matchMedia("print").addEventListener("change", redraw);
}

// ---- samples

function showSamples({ measures, first, rows }) {
  const element = (id) => document.getElementById(id);
  const body = document.querySelector("#sample-table tbody");
  const heads = [...document.querySelectorAll("#sample-table th")];
  const controls = ["search", "which", "measure", "low", "high", "size"].map(element);
  const [search, which, measure, low, high, size] = controls;
  measures.forEach((name, i) => measure.append(new Option(name, i, i === first, i === first)));
  let [sortBy, descending, page] = ["number", false, 0];

  function records() {
    const m = Number(measure.value);
    return rows.map(([prompt, before, after, kl, beforeScores, afterScores], i) => ({
      number: i + 1, prompt, before, beforeScore: beforeScores[m], after, afterScore: afterScores[m],
      change: afterScores[m] - beforeScores[m], kl,
    }));
  }

  function wanted(record) {
    const text = search.value.toLowerCase();
    if (text && !`${record.prompt}\n${record.before}\n${record.after}`.toLowerCase().includes(text)) return false;
    if (which.value === "up" && !(record.change > 0)) return false;
    if (which.value === "down" && !(record.change < 0)) return false;
    if (low.value !== "" && record.afterScore < Number(low.value)) return false;
    return high.value === "" || record.afterScore <= Number(high.value);
  }

  function compare(a, b) {
    const [x, y] = [a[sortBy], b[sortBy]];
    const order = typeof x === "string" ? x.localeCompare(y) : x - y;
    return (descending ? -order : order) || a.number - b.number;
  }

  function cell(text, label, kind = "") {
    const td = document.createElement("td");
    td.textContent = text;
    if (label) td.dataset.label = label;
    td.className = kind;
    return td;
  }

  function rowOf(r) {
    const tr = document.createElement("tr");
    const change = `${r.change > 0 ? "+" : ""}${r.change.toFixed(3)}`;
    tr.append(
      cell(r.number, "#", "n"), cell(r.prompt, "prompt"),
      cell(r.before, "before"), cell(r.beforeScore.toFixed(3), "score before", "n"),
      cell(r.after, "after"), cell(r.afterScore.toFixed(3), "score after", "n"),
      cell(change, "change", `n ${r.change > 0 ? "up" : r.change < 0 ? "down" : ""}`), cell(r.kl.toFixed(2), "KL", "n"),
    );
    return tr;
  }

  function show() {
    const found = records().filter(wanted).sort(compare);
    const pageSize = Number(size.value);
    page = Math.max(0, Math.min(page, Math.ceil(found.length / pageSize) - 1));
    const start = page * pageSize;
    const shown = found.slice(start, start + pageSize);
    body.replaceChildren(...shown.map(rowOf));
    const place = shown.length ? `${start + 1}–${start + shown.length} of ${found.length}` : "none";
    element("place").textContent = found.length < rows.length ? `${place} (filtered from ${rows.length})` : place;
    element("previous").disabled = page === 0;
    element("next").disabled = start + pageSize >= found.length;
    for (const head of heads) {
      const active = head.firstElementChild.dataset.sort === sortBy;
      if (active) head.setAttribute("aria-sort", descending ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    }
  }

  for (const head of heads) {
    head.firstElementChild.addEventListener("click", (event) => {
      const column = event.currentTarget.dataset.sort;
      descending = column === sortBy ? !descending : typeof records()[0][column] !== "string" && column !== "number";
      [sortBy, page] = [column, 0];
      show();
    });
  }
  for (const control of controls) control.addEventListener("input", () => { page = 0; show(); });
  element("filters").addEventListener("submit", (event) => event.preventDefault());
  element("previous").addEventListener("click", () => { page -= 1; show(); });
  element("next").addEventListener("click", () => { page += 1; show(); });
  show();
}

if (data.samples) showSamples(data.samples);
showCharts();
