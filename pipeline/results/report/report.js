// Tables sort and filter, charts answer. Without it the page has every value, and figures of the best detectors.
{
  const made = (tag, properties = {}, ...children) => {
    const node = Object.assign(document.createElement(tag), properties);
    node.append(...children);
    return node;
  };

  // Tables

  const FEW_ROWS = 8; // need no filter

  const columnOf = (head) => head.cellIndex + (head.parentElement.rowIndex ? 1 : 0); // "Detector" spans both rows

  const valueOf = (row, column) => {
    const { value } = row.cells[column].dataset;
    return value === undefined || value === "" || Number.isNaN(+value) ? null : +value;
  };

  const sort = (head) => {
    const table = head.closest("table");
    const text = head.dataset.sort === "text";
    const first = head.dataset.first ?? "ascending";
    const second = first === "ascending" ? "descending" : "ascending";
    const order = head.getAttribute("aria-sort") === first ? second : first;
    for (const other of table.tHead.querySelectorAll("[aria-sort]")) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", order);
    const column = columnOf(head);
    const sign = order === "ascending" ? 1 : -1;
    const compare = (a, b) => {
      if (text) return sign * a.cells[column].textContent.localeCompare(b.cells[column].textContent);
      const [one, other] = [valueOf(a, column), valueOf(b, column)];
      if (one === null || other === null) return (one === null) - (other === null); // unknown ones last
      return sign * (one - other);
    };
    table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compare));
  };

  for (const head of document.querySelectorAll("th[data-sort]")) {
    // The title stays outside: browsers print what is inside a button on the first page of a table only.
    const button = made("button", { type: "button", ariaLabel: `Sort by ${head.textContent.trim()}` });
    head.append(button);
    head.addEventListener("click", () => sort(head));
  }

  for (const table of document.querySelectorAll('table:has(th[data-sort="text"])')) {
    const rows = [...table.tBodies[0].rows];
    if (rows.length <= FEW_ROWS) continue;
    const box = table.closest(".scroll");
    const input = made("input", { type: "search", autocomplete: "off" });
    input.setAttribute("aria-label", `Filter rows of ${box.getAttribute("aria-label")}`);
    const count = made("output");
    input.addEventListener("input", () => {
      const wanted = input.value.trim().toLowerCase();
      for (const row of rows) {
        const words = [...row.querySelectorAll("th, .text")].map((cell) => cell.textContent).join(" ");
        row.hidden = !words.toLowerCase().includes(wanted);
      }
      count.value = wanted ? `${rows.filter((row) => !row.hidden).length} of ${rows.length}` : "";
    });
    box.before(made("p", { className: "filter" }, made("label", {}, "Filter ", input), " ", count));
  }

  // Charts

  const data = JSON.parse(document.getElementById("charts").textContent);
  const BEST = 6; // detectors, drawn at first
  const UNIT = 10_000;
  const INK = "#222222", FAINT = "#d9d9d9"; // CSS turns them round where the page is dark
  const FONT = "11px system-ui, sans-serif";

  const swatch = ({ colour, dash, width = 2 }) => {
    const template = made("template", {
      innerHTML: `<svg class="swatch" viewBox="0 0 30 8" aria-hidden="true"><path d="M0 4H30" stroke="${colour}" `
        + `stroke-width="${width}" stroke-dasharray="${dash.join(" ")}"/></svg>`,
    });
    return template.content.firstChild;
  };

  const axis = (label, more) => ({
    label, labelFont: FONT, labelSize: 20, labelGap: 0, font: FONT, stroke: INK,
    grid: { stroke: FAINT, width: 1 }, ticks: { stroke: FAINT, width: 1, size: 4 }, ...more,
  });

  const share = (value) => (value === null || value === undefined ? "" : (value / UNIT).toFixed(4));

  // A line of the plot's own scales that is no series: from one point to another.
  const straight = (colour, dash, from, to) => (plot) => {
    const context = plot.ctx;
    const { left, top, width, height } = plot.bbox;
    context.save();
    context.beginPath();
    context.rect(left, top, width, height);
    context.clip();
    context.beginPath();
    context.strokeStyle = colour;
    context.lineWidth = devicePixelRatio;
    context.setLineDash(dash.map((part) => part * devicePixelRatio));
    context.moveTo(plot.valToPos(from[0], "x", true), from[1] === null ? top + height : plot.valToPos(from[1], "y", true));
    context.lineTo(plot.valToPos(to[0], "x", true), to[1] === null ? top : plot.valToPos(to[1], "y", true));
    context.stroke();
    context.restore();
  };

  const ARROWS = { ArrowLeft: -1, ArrowRight: 1 };

  // A figure with a chart as wide as there is room for, whose values the arrow keys read, too.
  const panel = (gallery, caption, alt, height, options, values) => {
    const host = made("div", { className: "chart", tabIndex: 0 });
    host.setAttribute("role", "group");
    host.setAttribute("aria-label", `${alt}. The keys ← and → read its values.`);
    const figure = made("figure", {}, made("figcaption", { textContent: caption }), host);
    gallery.append(figure);
    const size = () => ({ width: Math.max(host.clientWidth, 200), height });
    const plot = new uPlot({ ...size(), legend: { markers: { show: false } }, ...options }, values, host);
    host.addEventListener("keydown", (event) => {
      if (!(event.key in ARROWS)) return;
      event.preventDefault();
      const at = (plot.cursor.idx ?? -1) + ARROWS[event.key];
      const x = plot.data[0][Math.min(Math.max(at, 0), plot.data[0].length - 1)];
      plot.setCursor({ left: plot.valToPos(x, "x"), top: plot.over.clientHeight }, true, true);
    });
    new ResizeObserver(() => {
      if (host.clientWidth && !matchMedia("print").matches) plot.setSize(size());
    }).observe(host);
    return { plot, figure };
  };

  // A gallery in place of one of static figures.
  const galleryFor = (id) => {
    const still = document.querySelector(`#${id} .gallery`);
    const gallery = made("div", { className: "gallery" });
    still.before(gallery);
    return gallery;
  };

  const charts = []; // functions that show or hide one detector

  const rocChart = (gallery, set) => {
    const order = data.detectors.map((_, i) => i).sort((a, b) => set.auroc[b] - set.auroc[a] || a - b);
    const place = new Map(order.map((detector, at) => [detector, at + 1]));
    const best = `${set.auroc[order[0]].toFixed(3)}, of ${data.detectors[order[0]]}`;
    const options = {
      scales: { x: { time: false, range: (_, low, high) => [low, high] }, y: { range: [0, 1.005 * UNIT] } },
      axes: [
        axis("FPR: ID called OOD", { space: 60, size: 28 }),
        axis("TPR: OOD called OOD", { size: 36, values: (_, ticks) => ticks.map((tick) => tick / UNIT) }),
      ],
      cursor: { sync: { key: "roc" }, focus: { prox: 16 }, y: false },
      focus: { alpha: 0.25 },
      hooks: { drawClear: [straight("#aaaaaa", [], [0, 0], [1, UNIT])] },
      series: [
        { label: "AUROC", value: (_, rate) => (rate === null ? "TPR at FPR …" : `TPR at FPR ${rate}`) },
        ...order.map((detector) => ({
          label: made("span", {}, swatch(data.lines[detector]), `${set.auroc[detector].toFixed(3)} `, data.detectors[detector]),
          stroke: data.lines[detector].colour, dash: data.lines[detector].dash, width: 1.6,
          points: { show: false }, show: false, value: (_, value) => share(value),
        })),
      ],
    };
    const tpr = order.map((detector) => set.tpr[detector]);
    const alt = `ROC curves on ${set.dataset}; the largest area is ${best}`;
    const { plot } = panel(gallery, set.title, alt, 330, options, [data.rates, ...tpr]);
    charts.push((detector, shown) => plot.setSeries(place.get(detector), { show: shown }));
  };

  const scoreChart = (gallery, detector) => {
    const { low, high, threshold, shares } = data.scores[detector];
    const bins = shares[0].length;
    const edges = Array.from({ length: bins + 1 }, (_, i) => low + ((high - low) * i) / bins);
    const upTo = (counts) => [...counts, counts[bins - 1]]; // the last step ends at the last edge
    const area = { colour: "#b9b9b9", dash: [], width: 8 };
    const stepped = uPlot.paths.stepped({ align: 1 });
    const options = {
      scales: { x: { time: false, range: [low, high] }, y: { range: (_, least, most) => [0, 1.05 * (most || 1)] } },
      axes: [axis("score (higher = more OOD)", { space: 60, size: 28 }), axis("share of images", { size: 20, values: () => [] })],
      cursor: { y: false, drag: { x: false } },
      hooks: { draw: [straight(INK, [3, 2], [threshold, null], [threshold, null])] },
      series: [
        { label: "Dataset", value: (_, score) => (score === null ? "share at score …" : `share at score ${+score.toPrecision(4)}`) },
        ...data.samples.map((name, i) => ({
          label: made("span", {}, swatch(i ? data.lines[i - 1] : area), name),
          stroke: i ? data.lines[i - 1].colour : undefined, fill: i ? undefined : area.colour,
          dash: i ? data.lines[i - 1].dash : [], width: i ? 1.4 : 0,
          paths: stepped, points: { show: false }, value: (_, value) => share(value),
        })),
      ],
    };
    const alt = `Distributions of the ${data.detectors[detector]} scores of ${data.samples.join(", ")}`;
    return panel(gallery, data.detectors[detector], alt, 230, options, [edges, ...shares.map(upTo)]).figure;
  };

  const scoreCharts = (gallery) => {
    const figures = new Map(); // made when first shown
    charts.push((detector, shown) => {
      if (shown && !figures.has(detector)) figures.set(detector, scoreChart(gallery, detector));
      if (figures.has(detector)) figures.get(detector).hidden = !shown;
      const drawn = [...figures].sort(([a], [b]) => a - b).map(([, figure]) => figure);
      gallery.append(...drawn);
    });
  };

  // The list of detectors that all charts obey.
  const chooser = () => {
    const boxes = data.detectors.map((name, i) => {
      const box = made("input", { type: "checkbox", checked: i < BEST });
      box.addEventListener("change", () => charts.forEach((show) => show(i, box.checked)));
      return box;
    });
    const choose = (wanted) => boxes.forEach((box, i) => {
      if (box.checked === wanted(i)) return;
      box.checked = wanted(i);
      box.dispatchEvent(new Event("change"));
    });
    const button = (title, wanted) => {
      const node = made("button", { type: "button", textContent: title });
      node.addEventListener("click", () => choose(wanted));
      return node;
    };
    const buttons = [button(`Best ${BEST}`, (i) => i < BEST), button("All", () => true), button("None", () => false)];
    const labels = boxes.map((box, i) => made("label", {}, box, swatch(data.lines[i]), data.detectors[i]));
    return made(
      "fieldset", { className: "chooser" },
      made("legend", { textContent: "Detectors in the charts, best first" }),
      made("div", { className: "presets" }, ...(boxes.length > BEST ? buttons : buttons.slice(1))),
      made("div", { className: "choices" }, ...labels),
    );
  };

  if (data.roc.length) {
    const gallery = galleryFor("roc");
    for (const set of data.roc) rocChart(gallery, set);
  }
  scoreCharts(galleryFor("scores"));
  document.querySelector("#roc .gallery, #scores .gallery").before(chooser());
  data.detectors.slice(0, BEST).forEach((_, i) => charts.forEach((show) => show(i, true)));
  for (const still of document.querySelectorAll(".static")) still.hidden = true;
  for (const live of document.querySelectorAll(".live")) live.hidden = false;
}
