// Draws the charts that the page holds as JSON, in the style sheet's colours, light or dark as the reader has it.
(() => {
  "use strict";
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const touch = matchMedia("(pointer: coarse)").matches;
  const config = { responsive: true, displayModeBar: false, displaylogo: false, doubleClick: "reset" };

  function paint({ data, layout }) {
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(`--${name}`).trim();
    const count = Number(colour("colours"));
    for (const trace of data) {
      const own = trace.meta.colour === null ? colour("muted") : colour(`c${trace.meta.colour % count}`);
      trace.line = { ...trace.line, color: own };
      trace.marker = { ...trace.marker, color: own };
      if (trace.error_y) trace.error_y.color = own;
      if (trace.fill) trace.fillcolor = own + "2b";
    }
    const font = { family: getComputedStyle(document.body).fontFamily, size: 12, color: colour("muted") };
    const axis = { gridcolor: colour("line"), linecolor: colour("line"), zerolinecolor: colour("line"), automargin: true };
    Object.assign(layout, {
      font, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, uirevision: "kept",
      hovermode: layout.hovermode ?? "x unified", dragmode: touch ? false : "zoom",
      hoverlabel: { namelength: -1, bgcolor: colour("card"), bordercolor: colour("muted"), font: { ...font, color: colour("ink") } },
      margin: { l: 44, r: 12, t: 10, b: 40 },
    });
    const counted = layout.xaxis.title.text;
    if (counted === "step" || counted === "round") layout.xaxis.unifiedhovertitle = { text: `${counted} %{x:,d}` };
    layout.xaxis = { showgrid: false, zeroline: false, ticks: "outside", tickcolor: colour("line"), nticks: 7, ...layout.xaxis, ...axis };
    layout.yaxis = { nticks: 6, minexponent: 5, separatethousands: true, hoverformat: ".4~g", ...layout.yaxis, ...axis };
    return [data, layout, config];
  }

  function draw() {
    for (const [name, figure] of Object.entries(figures)) Plotly.react(`${name}-plot`, ...paint(figure));
  }

  function toggle(key) {
    const shown = key.getAttribute("aria-pressed") !== "true";
    const traces = key.dataset.traces.split(",").map(Number);
    key.setAttribute("aria-pressed", shown);
    for (const at of traces) figures[key.dataset.chart].data[at].visible = shown;
    Plotly.react(`${key.dataset.chart}-plot`, ...paint(figures[key.dataset.chart]));
  }

  draw();
  dark.addEventListener("change", draw);
  for (const key of document.querySelectorAll(".key")) key.addEventListener("click", () => toggle(key));
  document.documentElement.dataset.drawn = Object.keys(figures).length;
})();
