"use strict";
// Draws the report's figures in the page's colours; prompts are kept once and looked up by their number.
const report = JSON.parse(document.getElementById("report").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
const mouse = matchMedia("(hover: hover) and (pointer: fine)");

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function traces(figure) {
  return figure.data.map((trace) => {
    // The blue that is told apart best on white is too dark on black.
    const marked = JSON.parse(JSON.stringify(trace).replaceAll("#0072b2", colour("--blue")));
    if (trace.meta === "prompts") {
      marked.text = trace.customdata.map((number) => report.prompts[number]);
    }
    return marked;
  });
}

function layout(figure) {
  const ink = colour("--ink"), line = colour("--line");
  const themed = structuredClone(figure.layout);
  themed.paper_bgcolor = themed.plot_bgcolor = "rgba(0,0,0,0)";
  themed.font = { ...themed.font, color: ink, family: getComputedStyle(document.body).fontFamily };
  themed.hoverlabel = { bgcolor: colour("--raised"), bordercolor: line, font: { color: ink, size: 13 }, align: "left" };
  // Dragging zooms with a mouse; under a finger it has to scroll the page.
  themed.dragmode = mouse.matches ? "zoom" : false;
  for (const [name, axis] of Object.entries(themed)) {
    if (/^[xy]axis/.test(name)) {
      Object.assign(axis, { gridcolor: line, zerolinecolor: line, linecolor: line, tickcolor: line });
    }
  }
  for (const shape of themed.shapes ?? []) {
    shape.line.color = ink;
  }
  return themed;
}

function draw(place) {
  const figure = report.figures[place.dataset.figure];
  const options = { responsive: true, displaylogo: false, displayModeBar: mouse.matches ? "hover" : false };
  Plotly.react(place, traces(figure), layout(figure), options);
}

const places = [...document.querySelectorAll(".plot")];
places.forEach(draw);
dark.addEventListener("change", () => places.forEach(draw));
for (const choice of document.querySelectorAll("select[data-plot]")) {
  choice.addEventListener("change", () => {
    const place = document.getElementById(choice.dataset.plot);
    place.dataset.figure = choice.value;
    place.setAttribute("aria-label", report.figures[choice.value].label);
    draw(place);
  });
}
