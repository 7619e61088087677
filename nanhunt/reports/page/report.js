"use strict";
(() => {
  const source = document.getElementById("heat-data");
  if (!source || !window.Plotly) {
    document.documentElement.dataset.ready = performance.now().toFixed(0);
    return;
  }
  const heat = JSON.parse(source.textContent);
  // Plotly reads names as markup of its own; here they are only names.
  const plain = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const shortened = (text, most) => (text.length > most ? "…" + text.slice(1 - most) : text);
  const names = heat.rows.map(plain);
  const steps = heat.columns.map(plain);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const printing = window.matchMedia("print");
  const SYMBOL_PX = 14;

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const every = (number, most) => {
    const size = Math.max(1, Math.ceil(number / most));
    return [...Array(Math.ceil(number / size)).keys()].map((place) => place * size);
  };
  const whole = (log) => `1e${log}`;

  function tens([low, high]) {
    const size = Math.max(1, Math.ceil((high - low) / 6));
    const ticks = [];
    for (let tick = Math.ceil(low / size) * size; tick <= high; tick += size) ticks.push(tick);
    return ticks;
  }

  function cells(places, fill) {
    const z = names.map(() => steps.map(() => null));
    for (const [row, column] of places) z[row][column] = 1;
    return {
      type: "heatmap", z, showscale: false, hoverinfo: "skip", zmin: 0, zmax: 1, hoverongaps: false,
      xgap: 0, colorscale: [[0, fill], [1, fill]],
    };
  }

  // Of non-finite cells too small to hold a symbol each, the first one in every SYMBOL_PX has it.
  function symbols(places, width, height) {
    const tall = Math.max(1, Math.ceil(SYMBOL_PX * names.length / height));
    const wide = Math.max(1, Math.ceil(SYMBOL_PX * steps.length / width));
    const taken = new Set();
    return places.filter(([row, column]) => {
      const block = `${Math.floor(row / tall)} ${Math.floor(column / wide)}`;
      return !taken.has(block) && taken.add(block);
    });
  }

  const tall = () => Math.min(Math.max(names.length * 17, 150), 620);

  function traces(plot, width) {
    const [zmin, zmax] = plot.range;
    const ticks = tens(plot.range);
    const words = new Map(plot.nonfinite.map(([row, column, word]) => [row * steps.length + column, word]));
    const zeros = new Set(plot.zeros.map(([row, column]) => row * steps.length + column));
    const text = plot.logs.map((line, row) => line.map((value, column) => {
      const place = row * steps.length + column;
      if (words.has(place)) return words.get(place);
      if (zeros.has(place)) return "exactly 0";
      return value === null ? "not sampled" : `about 10^${value.toFixed(1)}`;
    }));
    const hover = names.map((name, row) => steps.map((step, column) => `${name}<br>step ${step}: ${text[row][column]}`));
    const shown = symbols(plot.nonfinite, width * 0.6, tall());
    const marks = heat.marks.filter((mark) => mark.row !== null);
    return [
      {
        type: "heatmap", z: plot.logs, zmin, zmax, colorscale: "Viridis",
        text: hover, hoverinfo: "text", hoverongaps: true,
        colorbar: {
          thickness: 10, outlinewidth: 0, tickvals: ticks, ticktext: ticks.map(whole), len: 1,
          tickfont: { color: colour("--soft") },
        },
      },
      cells(plot.zeros, colour("--zero")),
      cells(plot.nonfinite, colour("--nonfinite")),
      {
        type: "scatter", mode: "markers", hoverinfo: "skip", x: shown.map((cell) => cell[1]), y: shown.map((cell) => cell[0]),
        marker: { symbol: "x-thin", size: 6, line: { width: 1.5, color: colour("--on-nonfinite") } },
      },
      {
        type: "scatter", mode: "markers", hoverinfo: "skip", cliponaxis: false, x: marks.map((mark) => mark.column), y: marks.map((mark) => mark.row),
        marker: { symbol: "circle-open", size: 17, color: colour("--paper"), line: { width: 6 } },
      },
      {
        type: "scatter", mode: "markers+text", hoverinfo: "skip", cliponaxis: false,
        x: marks.map((mark) => mark.column), y: marks.map((mark) => mark.row), text: marks.map((mark) => ` ${plain(mark.code)} `),
        textposition: marks.map((mark) => mark.column > steps.length / 2 ? "middle left" : "middle right"),
        textfont: { color: colour("--text"), size: 12, weight: 700, shadow: Array(5).fill(`0 0 4px ${colour("--paper")}`).join() },
        marker: { symbol: "circle-open", size: 17, color: colour("--fault"), line: { width: 3 } },
      },
    ];
  }

  const pen = document.createElement("canvas").getContext("2d");
  pen.font = "11px system-ui, sans-serif";
  const widest = (texts) => Math.max(...texts.map((text) => pen.measureText(text).width));

  function layout(width) {
    const height = tall();
    const rows = every(names.length, height / 15);
    const most = width < 480 ? 16 : 30;
    const labels = rows.map((place) => shortened(heat.labels[place], most));
    const columns = every(steps.length, Math.max(3, width / 70));
    const lines = heat.marks.filter((mark) => mark.row === null).map((mark) => ({
      type: "line", xref: "x", yref: "paper", x0: mark.column, x1: mark.column, y0: 0, y1: 1,
      line: { color: colour("--fault"), width: 2, dash: "dot" },
    }));
    return {
      height: height + 48,
      // Given here, for plotly finds its own margins by drawing everything twice.
      margin: { l: Math.ceil(widest(labels)) + 14, r: 62, t: 8, b: 40, autoexpand: false },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: colour("--empty"),
      font: { family: "system-ui, sans-serif", size: 11, color: colour("--text") }, showlegend: false, dragmode: width < 480 ? false : "zoom",
      xaxis: {
        title: { text: "step", standoff: 6 }, tickvals: columns, ticktext: columns.map((place) => steps[place]),
        showgrid: false, zeroline: false, range: [-0.5, steps.length - 0.5], tickangle: 0,
      },
      yaxis: {
        tickvals: rows, ticktext: labels.map((label) => `${plain(label)} `),
        showgrid: false, zeroline: false, range: [names.length - 0.5, -0.5],
      },
      shapes: lines, hoverlabel: { align: "left" },
    };
  }

  const boxes = heat.plots.map((_, place) => document.getElementById(`plot-${place}`));
  const draw = () => Promise.all(boxes.map((box, place) => window.Plotly.react(
    box, traces(heat.plots[place], box.clientWidth), layout(box.clientWidth),
    { responsive: true, displaylogo: false, displayModeBar: false },
  )));
  draw().then(() => { document.documentElement.dataset.ready = performance.now().toFixed(0); });
  dark.addEventListener("change", draw);
  printing.addEventListener("change", draw);
})();
