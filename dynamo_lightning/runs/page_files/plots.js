"use strict";
// Draws the plots in the theme's colors. Everything that a run wrote goes into text nodes or plotly's own escaping.
const report = { start: [] };

report.element = (name, attributes = {}, ...children) => {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
};

// Plotly reads a few tags in its texts.
report.plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;");

(() => {
  const { element, plain } = report;
  const page = JSON.parse(document.getElementById("page-data").textContent);
  const dashes = ["solid", "dash", "dot", "dashdot"];
  const symbols = ["circle", "square", "triangle-up", "cross"];
  const coarse = matchMedia("(pointer: coarse)").matches;
  const drawn = [];
  const wired = [];
  report.labels = page.labels;

  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const color = (number) => css(`--c${number % 8}`);
  const faded = (hex, alpha) => {
    const channels = [1, 3, 5].map((start) => parseInt(hex.slice(start, start + 2), 16));
    return `rgba(${channels.join(",")},${alpha})`;
  };

  const styled = (trace) => {
    const { color: number = 0, role, dash = 0 } = trace.meta || {};
    const own = color(number);
    const style = {
      line: { line: { color: own, width: 2, dash: dashes[dash % 4] }, marker: { color: own, size: 6 } },
      faint: { line: { color: faded(own, 0.35), width: 1 }, hoverinfo: "skip" },
      band: { fillcolor: faded(own, 0.18) },
      cross: { marker: { color: own, symbol: "x", size: 9 } },
      area: { line: { color: own, width: 1, dash: dashes[dash % 4] }, fillcolor: faded(own, 0.45) },
      bar: { marker: { color: own } },
    }[role];
    return { ...trace, name: plain(trace.name), ...style };
  };

  const axis = (title, more = {}) => ({
    title: { text: plain(title), standoff: 8 }, gridcolor: css("--line"), linecolor: css("--line"), zeroline: false,
    automargin: true, ...more,
  });

  const layoutOf = (plot) => {
    const more = plot.layout || {};
    const overIterations = plot.x_title === "RL iteration";
    const marks = overIterations ? page.marks.slice(0, 40) : [];
    const lines = marks.map((mark) => ({
      type: "line", x0: mark.iteration, x1: mark.iteration, yref: "paper", y0: 0, y1: 1,
      line: { color: css(mark.level === "error" ? "--error" : "--warning"), width: 1.5, dash: "dot" },
    }));
    const flags = marks.map((mark) => ({
      x: mark.iteration, y: 1, yref: "paper", yanchor: "bottom", text: "⚠", showarrow: false, captureevents: true,
      hovertext: plain(`${mark.run} ${mark.text}, iteration ${mark.iteration}`),
      font: { color: css(mark.level === "error" ? "--error" : "--warning") },
    }));
    return {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: css("--text"), size: 12 },
      margin: { l: 56, r: 12, t: marks.length ? 24 : 8, b: 40 }, hovermode: "closest", dragmode: coarse ? false : "zoom",
      legend: { orientation: "h", y: -0.22, yanchor: "top" }, barmode: more.barmode,
      xaxis: axis(plot.x_title), yaxis: axis(plot.y_title, more.yaxis),
      shapes: [...(more.shapes || []).map((s) => ({ ...s, line: { ...s.line, color: css("--muted") } })), ...lines],
      annotations: flags,
    };
  };

  const options = { displayModeBar: false, responsive: false };
  const redraw = () => drawn.forEach((draw) => draw());

  // --- numbers of a plot as a table, for screen readers and for copying ----------------------------------------------

  const numbersOf = (plot) => {
    const details = element("details", {}, element("summary", {}, "Numbers"));
    details.addEventListener("toggle", () => {
      if (!details.open || details.querySelector("table")) return;
      const traces = plot.traces.filter((trace) => !["band", "faint"].includes((trace.meta || {}).role));
      const values = new Map();
      traces.forEach((trace, column) => trace.x.forEach((x, row) => {
        if (!values.has(x)) values.set(x, []);
        values.get(x)[column] = trace.y[row];
      }));
      const keys = [...values.keys()];
      if (keys.every((key) => typeof key === "number")) keys.sort((a, b) => a - b);
      const step = Math.ceil(keys.length / 100);
      const heading = (text, scope) => element("th", { scope }, text);
      const head = element("tr", {}, heading(plot.x_title, "col"), ...traces.map((t) => heading(t.name, "col")));
      const rows = keys.filter((_, row) => row % step === 0).map((key) => element(
        "tr", {}, heading(key, "row"), ...traces.map((_, column) => element("td", {}, values.get(key)[column] ?? "–")),
      ));
      const caption = step > 1 ? `${plot.y_title}, every ${step}th of ${keys.length} rows` : plot.y_title;
      details.append(element(
        "div", { class: "scroll", tabindex: "0", role: "region", "aria-label": `Numbers: ${plot.title}` },
        element("table", {}, element("caption", {}, caption), element("thead", {}, head), element("tbody", {}, ...rows)),
      ));
    });
    return details;
  };

  // --- sections and figures -------------------------------------------------------------------------------------------

  const sections = new Map();
  const sectionOf = (name) => {
    if (!sections.has(name)) {
      const id = `section-${name.toLowerCase()}`;
      const grid = element("div", { class: "grid" });
      const heading = element("h2", { id: `${id}-title` }, name);
      document.getElementById("plots").append(
        element("section", { id, "aria-labelledby": `${id}-title` }, heading, grid),
      );
      sections.set(name, grid);
    }
    return sections.get(name);
  };

  const figureOf = (name, section, title, caption) => {
    const heading = element("h3", { id: `${name}-title` }, title);
    const target = element("div", { class: "plot", id: `plot-${name}`, role: "img", "aria-label": `${title}. ${caption}` });
    const figure = element("figure", { "aria-labelledby": `${name}-title` }, heading, element("p", {}, caption), target);
    sectionOf(section).append(figure);
    return { figure, target };
  };

  for (const plot of page.plots) {
    const { figure, target } = figureOf(plot.name, plot.section, plot.title, plot.caption);
    figure.append(numbersOf(plot));
    drawn.push(() => Plotly.react(target, plot.traces.map(styled), layoutOf(plot), options));
    if (plot.x_title === "RL iteration") {
      wired.push(() => target.on("plotly_click", (event) => report.showIteration(event.points[0].x)));
    }
  }

  // --- rollouts of each prompt against its success rate, with a slider -------------------------------------------------

  for (const { run, frames } of page.frames) {
    const name = `groups-${run}`;
    const label = page.labels.length > 1 ? `${page.labels[run]}: ` : "";
    const title = `${label}Rollouts of each prompt by the success rate expected of it`;
    const { figure, target } = figureOf(
      name, "Allocation", title,
      "The slider moves through the run. Color is the success rate observed; the page has the responses of diamonds, which open their group.",
    );
    const output = element("output", { id: `${name}-output`, for: `${name}-slider` });
    const slider = element("input", { type: "range", id: `${name}-slider`, min: 0, max: frames.length - 1, value: frames.length - 1 });
    const buttons = element("div", { class: "groups" });
    const highest = Math.max(...frames.flatMap((frame) => frame.sizes));
    figure.append(
      element("p", {}, element("label", { for: `${name}-slider` }, "RL iteration "), output), slider, buttons,
    );
    const traces = (frame) => [false, true].map((openable) => {
      const rows = frame.prompt_ids.map((_, row) => row)
        .filter((row) => report.hasGroup(run, frame.iteration, frame.prompt_ids[row]) === openable);
      return {
        type: "scatter", mode: "markers", name: openable ? "with responses" : "without",
        x: rows.map((row) => frame.expected[row]), y: rows.map((row) => frame.sizes[row]),
        customdata: rows.map((row) => frame.prompt_ids[row]),
        text: rows.map((row) => `observed ${frame.observed[row].toFixed(2)}`),
        hovertemplate: "expected %{x:.2f}, %{text}, %{y} rollouts<extra></extra>",
        marker: {
          symbol: openable ? "diamond" : "circle", size: openable ? 13 : 8, opacity: openable ? 1 : 0.7, cmin: 0, cmax: 1,
          color: rows.map((row) => frame.observed[row]), colorscale: "Viridis", showscale: openable || !rows.length,
          line: { color: css("--text"), width: openable ? 1.5 : 0.5 }, colorbar: { title: { text: "observed" }, thickness: 10 },
        },
      };
    }).map((trace, index, both) => {
      trace.marker.showscale = both[1].x.length ? index === 1 : index === 0;
      return trace;
    });
    const layout = () => ({
      ...layoutOf({ x_title: "success rate expected", y_title: "rollouts" }), showlegend: false,
      xaxis: axis("success rate expected", { range: [-0.03, 1.03] }), yaxis: axis("rollouts", { range: [0, highest * 1.08] }),
    });
    const draw = () => {
      const frame = frames[Number(slider.value)];
      output.textContent = frame.num_groups > frame.prompt_ids.length
        ? `${frame.iteration} (${frame.prompt_ids.length} of ${frame.num_groups} prompts)` : `${frame.iteration}`;
      slider.setAttribute("aria-valuetext", `iteration ${frame.iteration}`);
      Plotly.react(target, traces(frame), layout(), options);
      buttons.replaceChildren(...frame.prompt_ids.flatMap((id, row) => {
        if (!report.hasGroup(run, frame.iteration, id)) return [];
        const text = `Open the group of ${frame.sizes[row]} rollouts, observed ${frame.observed[row].toFixed(2)}`;
        const button = element("button", { type: "button" }, text);
        button.addEventListener("click", () => report.openGroup(run, frame.iteration, id));
        return [button];
      }));
    };
    slider.addEventListener("input", draw);
    drawn.push(() => draw());
    wired.push(() => {
      target.on("plotly_click", (event) => {
        const frame = frames[Number(slider.value)];
        report.openGroup(run, frame.iteration, event.points[0].customdata);
      });
    });
    report.start.push(() => {
      const hasResponses = (frame) => frame.prompt_ids.some((id) => report.hasGroup(run, frame.iteration, id));
      const latest = frames.findLastIndex(hasResponses);
      slider.value = latest < 0 ? frames.length - 1 : latest;
    });
  }

  // Drawn when all figures are there: a plot takes the width that its figure has then.
  report.start.push(() => {
    redraw();
    wired.forEach((wire) => wire());
    const resized = new ResizeObserver((entries) => entries.forEach(({ target }) => Plotly.Plots.resize(target)));
    document.querySelectorAll(".plot").forEach((target) => resized.observe(target));
  });

  const links = [...document.querySelectorAll("main h2[id]:not(#rollouts-title)")].map((heading) => element(
    "li", {}, element("a", { href: `#${heading.id}` }, heading.textContent),
  ));
  report.navigation = element("ul", {}, ...links);
  document.getElementById("sections").append(report.navigation);

  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  const print = (on) => () => {
    document.documentElement.classList.toggle("print", on);
    redraw();
    document.querySelectorAll(".plot").forEach((target) => Plotly.relayout(
      target, on ? { width: target.clientWidth, height: target.clientHeight } : { width: null, height: null, autosize: true },
    ));
  };
  addEventListener("beforeprint", print(true));
  addEventListener("afterprint", print(false));
})();
