// Draws the figures of the page, again when theme, width or medium change.
(() => {
  "use strict";
  const root = document.documentElement;
  const plots = [...document.querySelectorAll(".plot")];
  const paper = window.matchMedia("print");
  const touch = window.matchMedia("(pointer: coarse)").matches;
  const PAPER_WIDTH = 660; // A4 and Letter, upright, have room for it
  const LABEL_ROOM = 24; // pixels for a tick label
  const NARROW = 600; // pixels

  const onPaper = () => paper.matches || root.classList.contains("print");

  // The figure's JSON with the present values of the page's colours.
  const specOf = (plot) => {
    const style = getComputedStyle(root);
    const colour = (_, value) => {
      const name = typeof value === "string" && /^var\((--[a-z]+)\)$/.exec(value);
      return name ? style.getPropertyValue(name[1]).trim() : value;
    };
    return JSON.parse(plot.parentElement.querySelector("script").textContent, colour);
  };

  // So many of the layers in sight get a label that none covers another.
  const thin = (axis, range, width) => {
    if (!axis.tickvals) return;
    const seen = axis.tickvals.map((_, i) => i).filter((i) => axis.tickvals[i] >= range[0] && axis.tickvals[i] <= range[1]);
    const every = Math.max(1, Math.ceil((seen.length * LABEL_ROOM) / Math.max(width - 90, 1)));
    const kept = seen.filter((_, order) => order % every === 0);
    axis.tickvals = kept.map((i) => axis.tickvals[i]);
    axis.ticktext = kept.map((i) => axis.ticktext[i]);
  };

  // Ticks at powers of ten only are too few once a part of a decade is in sight.
  const zoomed = (layout, now) => {
    Object.keys(layout).filter((key) => /^yaxis/.test(key) && layout[key].type === "log" && now).forEach((key) => {
      if (now[key].range[1] - now[key].range[0] < 1.5) layout[key].dtick = "D2";
    });
  };

  const draw = (plot) => {
    const { data, layout } = specOf(plot);
    layout.width = onPaper() ? PAPER_WIDTH : plot.clientWidth;
    if (layout.width < NARROW) layout.xaxis.autotickangles = [0, -90]; // a slanted name would begin left of the page
    if (touch) layout.dragmode = false; // one finger scrolls the page, two zoom into it
    const now = plot._fullLayout && plot._fullLayout.xaxis;
    zoomed(layout, plot._fullLayout);
    thin(layout.xaxis, now && layout.xaxis.tickvals ? now.range : layout.xaxis.range, layout.width);
    plot.dataset.width = layout.width;
    return Plotly.react(plot, data, layout, {
      displaylogo: false,
      showSendToCloud: false, // plotly's default is a button that uploads the figure
      plotlyServerURL: "",
      typesetMath: false, // a dollar in a name is a dollar
      displayModeBar: onPaper() || touch ? false : "hover",
      modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
    });
  };
  const drawAll = () => plots.forEach(draw);

  // The first point drawn for each layer or step.
  const stops = (plot) => {
    const found = new Map();
    plot.data.filter((trace) => !trace.yaxis || trace.yaxis === "y").forEach((trace, curveNumber) => {
      trace.x.forEach((x, pointNumber) => {
        if (trace.y[pointNumber] !== null && !found.has(x)) found.set(x, { curveNumber, pointNumber });
      });
    });
    return [...found.keys()].sort((a, b) => a - b).map((x) => found.get(x));
  };

  // The arrow keys walk along them.
  const walk = (plot) => {
    let at = -1;
    plot.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (event.key === "Escape") Plotly.Fx.unhover(plot);
      if (!step) return;
      event.preventDefault();
      const points = stops(plot);
      at = Math.min(points.length - 1, Math.max(0, at + step));
      Plotly.Fx.hover(plot, [points[at]]);
    });
    plot.addEventListener("blur", () => Plotly.Fx.unhover(plot));
  };

  plots.forEach((plot) => {
    draw(plot);
    walk(plot);
    plot.on("plotly_relayout", (event) => {
      if (Object.keys(event).some((key) => /^[xy]axis/.test(key))) draw(plot);
    });
  });
  const sized = new ResizeObserver((entries) => {
    entries.forEach(({ target }) => {
      if (!onPaper() && target.clientWidth !== Number(target.dataset.width)) draw(target);
    });
  });
  plots.forEach((plot) => sized.observe(plot));
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  paper.addEventListener("change", drawAll);
  window.addEventListener("beforeprint", () => {
    root.classList.add("print");
    drawAll();
  });
  window.addEventListener("afterprint", () => {
    root.classList.remove("print");
    drawAll();
  });
})();
