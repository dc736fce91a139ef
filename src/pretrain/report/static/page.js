"use strict";
// The page's moving parts: data → plots, samples, events; a live page also reloads itself and answers prompts.
(() => {
  let page = JSON.parse(document.getElementById("data").textContent);
  let runs = page.runs;
  const plotted = () => page.groups ?? runs; // groups of seeds have a curve each, in a band from their least to their greatest
  const several = runs.length > 1;
  const byId = (id) => document.getElementById(id);

  /** An element with text and children; nothing is ever parsed as HTML. */
  function element(tag, properties = {}, ...children) {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  }

  // Numbers for people ---------------------------------------------------------------------------------------------

  const grouped = new Intl.NumberFormat("en");
  const short = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 4 });

  const scientific = (value) => (+value.toPrecision(3)).toExponential().replace("e+", "e");

  function plain(value) {
    if (value == null || !Number.isFinite(value)) return "";
    const size = Math.abs(value);
    if (size >= 1e15 || (size > 0 && size < 1e-3)) return scientific(value);
    return size >= 1e4 ? short.format(value) : String(+value.toPrecision(4));
  }

  function duration(seconds) {
    if (seconds == null) return "";
    if (seconds < 120) return `${+seconds.toPrecision(3)} s`;
    const minutes = Math.round(seconds / 60);
    if (minutes < 60) return `${minutes} min`;
    const hours = Math.floor(minutes / 60);
    if (hours < 48) return `${hours} h ${String(minutes % 60).padStart(2, "0")}`;
    return `${+(minutes / 1440).toPrecision(3)} days`;
  }

  // Axes -----------------------------------------------------------------------------------------------------------

  const AXES = {
    step: { label: "step", of: (run, table) => table.step },
    tokens: { label: "training tokens", of: (run, table) => table.tokens },
    time: { label: "time", of: (run, table) => table.time, format: duration },
    flops: {
      label: "FLOPs", format: (value) => value ? scientific(value) : "0",
      of: (run, table) => run.flops_per_token && table.tokens
        && table.tokens.map((tokens) => tokens == null ? null : tokens * run.flops_per_token),
    },
  };
  let axis = "step";

  const KNOWN = [
    {
      id: "loss", title: "Loss", unit: "nats per token", skips: true,
      lines: [
        { table: "train", column: "train/loss", label: "training, each step", faint: true },
        { table: "train", column: "train/smoothed_loss", label: "training, smoothed" },
        { table: "val", column: "train/eval_loss", label: "training, in evaluation", points: true, shade: 2 },
        { table: "val", column: "val/loss", label: "held out", points: true, shade: 1 },
        { table: "val", column: "val/loss of all", label: "all held-out text", points: true, shade: 1, single: true },
        { table: "val", column: "val/loss lowest", label: "held out, lowest", points: true, shade: 1, single: true },
        { table: "val", column: "test/loss", label: "test", points: true, shade: 3, single: true },
      ],
      rules: (run) => Object.entries(run.baselines ?? {}).map(([label, value]) => ({ label, value })),
    },
    {
      id: "bpb", title: "Bits per byte", unit: "held-out text",
      lines: [
        { table: "val", column: "val/bpb", label: "held out", points: true },
        { table: "val", column: "val/bpb of all", label: "all held-out text", points: true, single: true },
        { table: "val", column: "test/bpb", label: "test", points: true, shade: 3, single: true },
      ],
    },
    {
      id: "rate", title: "Learning rate and momentum", unit: "",
      lines: [
        { table: "train", column: "train/lr", label: "learning rate" },
        { table: "train", column: "train/momentum", label: "momentum", scale: "momentum", shade: 1 },
      ],
    },
    {
      id: "norm", title: "Gradient norm", unit: "before clipping", logarithmic: true, skips: true,
      lines: [{ table: "train", column: "train/grad_norm", label: "gradient norm" }],
      rules: (run) => run.clip ? [{ label: "clipped above", value: run.clip }] : [],
    },
    { id: "speed", title: "Throughput", unit: "tokens per second", lines: [{ table: "train", column: "train/tokens_per_second", label: "tokens per second" }] },
    { id: "core", title: "CORE", unit: "centered accuracy", lines: [{ table: "val", column: "val/core", label: "CORE", points: true }] },
  ];

  const has = (run, line) => (run[line.table][line.column] ?? []).some((value) => value != null);

  /** The plots that there are numbers for; what has no plot of its own here gets one with its name. */
  function wanted() {
    const plots = KNOWN.map((plot) => ({
      ...plot, lines: plot.lines.filter((line) => plotted().some((run) => has(run, line)) && (byId("each").checked || !line.faint)),
    }));
    const columns = [...new Set(plotted().flatMap((run) => Object.keys(run.val)))];
    const tasks = columns.filter((column) => column.startsWith("core/") && column.endsWith("/centered"));
    const lines = tasks.map((column, i) => ({ table: "val", column, label: column.slice("core/".length, -"/centered".length), points: true, shade: i }));
    if (!several) plots.push({ id: "core-tasks", title: "CORE by task", unit: "centered accuracy", lines });
    const taken = new Set(KNOWN.flatMap((plot) => plot.lines.map((line) => line.column)));
    for (const table of ["train", "val"]) {
      for (const column of new Set(plotted().flatMap((run) => Object.keys(run[table])))) {
        if (["step", "tokens", "time"].includes(column) || column.startsWith("core/") || taken.has(column) || / (low|high)$/.test(column)) continue;
        const line = { table, column, label: column, points: table === "val" };
        if (plotted().some((run) => has(run, line))) plots.push({ id: column, title: column, unit: "", lines: [line] });
      }
    }
    return plots.filter((plot) => plot.lines.length);
  }

  // Plots ----------------------------------------------------------------------------------------------------------

  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const DASHES = [[], [8, 4], [2, 3], [10, 3, 2, 3]];

  /** What a plot draws: its series as uPlot wants them, and the aligned data. */
  function contents(plot) {
    const series = [{ label: AXES[axis].label, value: (u, value) => (AXES[axis].format ?? plain)(value ?? u.data[0][u.data[0].length - 1]) }];
    const tables = [], bands = [];
    plotted().forEach((run, number) => {
      for (const source of ["train", "val"]) {
        const lines = plot.lines.filter((line) => line.table === source && has(run, line));
        const xs = lines.length && AXES[axis].of(run, run[source]);
        if (!xs) continue;
        let rows = [...xs.keys()].filter((row) => xs[row] != null);
        if (rows.some((row, i) => i && xs[row] <= xs[rows[i - 1]])) {
          rows = rows.sort((a, b) => xs[a] - xs[b]).filter((row, i, all) => !i || xs[row] > xs[all[i - 1]]);
        }
        tables.push([rows.map((row) => xs[row])]);
        for (const line of lines) {
          const columns = ["", " high", " low"].map((edge) => run[source][line.column + edge]).filter(Boolean);
          tables.at(-1).push(...columns.map((column) => rows.map((row) => positive(plot, line, column[row]))));
          const shade = color(`series-${(several ? number : line.shade ?? 0) % 8}`);
          series.push({
            label: several ? (plot.lines.length > 1 ? `${run.name}: ${line.label}` : run.name) : line.label,
            scale: line.scale ?? "y",
            stroke: line.faint ? fade(shade) : shade,
            width: line.faint ? 1 : 2,
            dash: several ? (line.points && plot.lines.length > 1 ? [4, 4] : DASHES[Math.floor(number / 8) % 4]) : [],
            paths: line.single ? () => null : undefined, // points alone
            points: line.points ? { show: true, size: line.single ? 10 : 6, fill: shade } : { show: run[source].step.length < 3 },
            value: (u, value, index, row) => plain(nearest(u.data[index], row ?? u.data[index].length - 1, value)),
          });
          if (columns.length === 1) continue;
          const mean = series.length - 1;
          for (let i = 0; i < 2; i++) series.push({ of: mean, class: "edge", label: "", scale: line.scale ?? "y", width: 0, points: { show: false }, stroke: shade });
          bands.push({ series: [mean + 1, mean + 2], fill: `${shade}30` });
        }
      }
    });
    return { series, bands, data: tables.length > 1 ? uPlot.join(tables) : tables[0] ?? [[]] };
  }

  /** A positive number cut, or raised, to its leading digit. */
  function leading(value, round) {
    const power = 10 ** Math.floor(Math.log10(value));
    return round(value / power) * power;
  }

  const isLogarithmic = (plot) => plot.logarithmic || (plot.id === "loss" && byId("logarithmic").checked);
  const positive = (plot, line, value) => isLogarithmic(plot) && !line.scale && value <= 0 ? null : value;
  const fade = (shade) => `${shade}70`;

  /** The value at a row, or the one before it that its curve has: curves are not measured at the same places. */
  function nearest(values, row, value) {
    while (value == null && row >= 0) value = values[row--];
    return value;
  }

  let drawn = [];
  let zoomed = false;

  function draw() {
    const at = window.scrollY;
    const before = zoomed && drawn.length ? { min: drawn[0].u.scales.x.min, max: drawn[0].u.scales.x.max } : null;
    drawn.forEach(({ u }) => u.destroy());
    byId("plots").replaceChildren();
    drawn = wanted().map(drawPlot);
    if (before) drawn.forEach(({ u }) => u.setScale("x", before));
    window.scrollTo(0, at);
  }

  function drawPlot(plot) {
    const box = element("div");
    const figure = element("figure", {},
      element("figcaption", {}, element("h3", {}, plot.title, " ", element("span", { className: "quiet", textContent: plot.unit }))), box);
    figure.dataset.plot = plot.id;
    byId("plots").append(figure);
    const { series, bands, data } = contents(plot);
    const ink = color("quiet"), grid = { stroke: color("grid"), width: 1 }, ticks = { stroke: color("rule"), width: 1 };
    const scales = { x: { time: false }, y: isLogarithmic(plot) ? { distr: 3, range: (u, low, high) => low == null ? [1, 10] : [leading(low / 1.05, Math.floor), leading(high * 1.05, Math.ceil)] } : {} };
    const look = { stroke: ink, grid, ticks, font: "12px system-ui, sans-serif" };
    const axes = [
      { ...look, label: AXES[axis].label, labelSize: 18, labelFont: look.font, size: 34, values: (_, all) => all.map(AXES[axis].format ?? plain) },
      { ...look, scale: "y", size: 58, values: (_, all) => all.map(plain) },
    ];
    if (series.some((one) => one.scale === "momentum")) {
      scales.momentum = {};
      axes.push({ ...look, scale: "momentum", side: 1, size: 50, grid: { show: false }, values: (_, all) => all.map(plain) });
    }
    const u = new uPlot({
      ...size(box, plot), series, bands, scales, axes,
      cursor: { sync: { key: "x", scales: ["x", null] }, drag: { x: true, y: false }, points: { size: 7 } },
      hooks: {
        draw: [(u) => { rules(u, plot); skips(u, plot); }],
        setSeries: [(u, number, { show }) => show != null && u.series.forEach((one, i) => number != null && one.of === number && u.setSeries(i, { show }))],
        setSelect: [(u) => { zoomed ||= u.select.width > 0; }],
      },
    }, data, box);
    u.over.addEventListener("dblclick", () => { zoomed = false; });
    const canvas = u.ctx.canvas;
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", inWords(plot));
    return { plot, u, box };
  }

  const size = (box, plot) => ({ width: Math.max(200, box.clientWidth), height: plot.id === "loss" && box.clientWidth > 500 ? 380 : 240 });

  /** A plot for those who cannot see it: where each curve begins and ends. */
  function inWords(plot) {
    const parts = [];
    for (const run of plotted()) {
      for (const line of plot.lines.filter((each) => !each.faint && has(run, each))) {
        const values = run[line.table][line.column].map((value, row) => [run[line.table].step[row], value]).filter((pair) => pair[1] != null);
        const [first, last] = [values[0], values[values.length - 1]];
        parts.push(`${several ? `${run.name}, ` : ""}${line.label}: ${plain(first[1])} at step ${first[0]}, ${plain(last[1])} at step ${last[0]}`);
      }
    }
    return `${plot.title}. ${parts.join("; ")}.`;
  }

  /** Level lines: the losses of counting alone, or where gradients are clipped. */
  function rules(u, plot) {
    const levels = new Map();
    for (const run of plot.rules ? plotted() : []) for (const rule of plot.rules(run)) levels.set(`${rule.label} ${rule.value}`, rule);
    if (levels.size > 6) return;
    const { ctx, bbox } = u, ratio = uPlot.pxRatio;
    ctx.save();
    ctx.strokeStyle = ctx.fillStyle = color("quiet");
    ctx.lineWidth = ratio;
    ctx.setLineDash([5 * ratio, 4 * ratio]);
    ctx.font = `${11 * ratio}px system-ui, sans-serif`;
    ctx.textAlign = "right";
    ctx.textBaseline = "bottom";
    for (const { label, value } of levels.values()) {
      const y = Math.round(u.valToPos(value, "y", true));
      if (!(y > bbox.top && y < bbox.top + bbox.height)) continue;
      ctx.beginPath();
      ctx.moveTo(bbox.left, y);
      ctx.lineTo(bbox.left + bbox.width, y);
      ctx.stroke();
      ctx.fillText(`${label} ${plain(value)}`.slice(0, 60), bbox.left + bbox.width - 4 * ratio, y - 2 * ratio);
    }
    ctx.restore();
  }

  /** A mark at the foot of a plot for each step that was skipped. */
  function skips(u, plot) {
    if (!plot.skips) return;
    const { ctx, bbox } = u, size = 5 * uPlot.pxRatio;
    ctx.save();
    ctx.fillStyle = color("bad");
    for (const run of plotted()) {
      const xs = AXES[axis].of(run, run.train);
      for (const [step] of xs ? run.skipped : []) {
        const row = lowerBound(run.train.step, step);
        const x = u.valToPos(xs[Math.min(row, xs.length - 1)], "x", true), foot = bbox.top + bbox.height;
        if (!(x >= bbox.left && x <= bbox.left + bbox.width)) continue;
        ctx.beginPath();
        ctx.moveTo(x - size, foot);
        ctx.lineTo(x + size, foot);
        ctx.lineTo(x, foot - 2 * size);
        ctx.fill();
      }
    }
    ctx.restore();
  }

  function lowerBound(values, wanted) {
    let low = 0, high = values.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (values[middle] < wanted) low = middle + 1; else high = middle;
    }
    return low;
  }

  /** New numbers into the plots; all are drawn again when there are others. */
  function update() {
    const plots = wanted();
    const same = plots.length === drawn.length && plots.every((plot, i) => plot.id === drawn[i].plot.id && plot.lines.length === drawn[i].plot.lines.length);
    const all = same && plots.map(contents);
    if (!same || all.some(({ series }, i) => series.length !== drawn[i].u.series.length)) return draw();
    drawn.forEach(({ plot, u }, i) => {
      u.setData(all[i].data, !zoomed);
      if (zoomed) u.redraw();
      u.ctx.canvas.setAttribute("aria-label", inWords(plot));
    });
  }

  // Tables, samples, events ----------------------------------------------------------------------------------------

  function table(heads, rows) {
    return element("table", {},
      element("thead", {}, element("tr", {}, ...heads.map((head) => element("th", { scope: "col", textContent: head })))),
      element("tbody", {}, ...rows.map((row) => element("tr", {}, ...row.map((cell) =>
        element("td", { className: typeof cell === "number" ? "number" : "wrap", textContent: typeof cell === "number" ? (Number.isInteger(cell) ? grouped.format(cell) : plain(cell)) : cell ?? "" }))))));
  }

  function showMeasured() {
    const columns = [...new Set(runs.flatMap((run) => Object.keys(run.val)))].filter((column) => column !== "val/loss lowest");
    const rows = runs.flatMap((run) => (run.val.step ?? []).map((_, row) => [...(several ? [run.name] : []), ...columns.map((column) => run.val[column]?.[row])]));
    byId("measured").hidden = !rows.length;
    byId("measured-table").replaceChildren(table([...(several ? ["run"] : []), ...columns], rows));
  }

  let chosenStep = Infinity; // of the sample that is shown; Infinity: always the newest
  const sampleSteps = () => [...new Set(runs.flatMap((run) => run.samples.map((sample) => sample.step)))].sort((a, b) => a - b);

  function written(sample) {
    const begun = sample.prompt && sample.text.startsWith(sample.prompt) ? sample.prompt : "";
    return element("pre", { className: "text" }, element("b", { textContent: begun }), sample.text.slice(begun.length));
  }

  function showSamples() {
    const steps = sampleSteps();
    byId("samples").hidden = !steps.length;
    if (!steps.length) return;
    const place = chosenStep === Infinity ? steps.length - 1 : Math.max(0, lowerBound(steps, chosenStep + 1) - 1);
    const step = steps[place], slider = byId("sample-step");
    slider.max = steps.length - 1;
    slider.value = place;
    slider.setAttribute("aria-valuetext", `after step ${step}`);
    byId("earlier").disabled = place === 0;
    byId("later").disabled = place === steps.length - 1;
    byId("sample-label").textContent = `after step ${grouped.format(step)} (${place + 1} of ${steps.length})`;
    byId("sample-texts").replaceChildren(...runs.flatMap((run) => {
      const newest = Math.max(...run.samples.map((each) => each.step).filter((each) => each <= step));
      const texts = run.samples.filter((each) => each.step === newest).map(written);
      return several && texts.length ? [element("h3", { textContent: `${run.name}, step ${newest}` }), ...texts] : texts;
    }));
    if (byId("all-samples").open) showAllSamples();
  }

  function showAllSamples() {
    byId("all-samples").querySelector("div").replaceChildren(...runs.flatMap((run) => run.samples.flatMap((sample, i) => {
      const head = element("h3", { textContent: `${several ? `${run.name}, ` : ""}step ${grouped.format(sample.step)}` });
      return sample.step === run.samples[i - 1]?.step ? [written(sample)] : [head, written(sample)];
    })));
  }

  function chooseSample(place) {
    const steps = sampleSteps();
    chosenStep = place >= steps.length - 1 ? Infinity : steps[Math.max(0, place)];
    showSamples();
  }

  function showEvents() {
    const rows = runs.flatMap((run) => run.events.map((event) => [...(several ? [run.name] : []), event.step, event.event, event.text]));
    byId("events").hidden = !rows.length;
    byId("events").querySelector("div").replaceChildren(table([...(several ? ["run"] : []), "step", "event", "what"], rows));
  }

  byId("sample-step").addEventListener("input", (event) => chooseSample(+event.target.value));
  byId("earlier").addEventListener("click", () => chooseSample(+byId("sample-step").value - 1));
  byId("later").addEventListener("click", () => chooseSample(+byId("sample-step").value + 1));
  byId("all-samples").addEventListener("toggle", () => { if (byId("all-samples").open) showAllSamples(); });
  byId("controls").addEventListener("submit", (event) => event.preventDefault());
  byId("controls").addEventListener("change", () => {
    const chosen = document.querySelector("input[name=axis]:checked").value;
    if (chosen !== axis) zoomed = false;
    axis = chosen;
    draw();
  });

  // The look: width, dark and light, paper ---------------------------------------------------------------------------

  new ResizeObserver(() => drawn.forEach(({ plot, u, box }) => {
    const wanted = size(box, plot);
    if (wanted.width !== u.width || wanted.height !== u.height) u.setSize(wanted);
  })).observe(byId("plots"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  const printing = (on) => () => { document.documentElement.classList.toggle("printing", on); draw(); };
  addEventListener("beforeprint", printing(true));
  addEventListener("afterprint", printing(false));

  document.querySelector("input[name=axis][value=step]").checked = true; // a reload may have kept others
  byId("each").checked = !several;
  showAll();
  draw();
  if (page.live) live();

  function showAll() {
    showMeasured();
    showSamples();
    showEvents();
  }

  // Live -------------------------------------------------------------------------------------------------------------

  function live() {
    const status = byId("status"), box = byId("ask"), send = byId("send");
    const POLL = 2000, LONGEST = 30000, SHARE = 0.02; // of the time that keeping up may take, beside training
    let timer;

    async function get(path, options) {
      const answer = await fetch(path, options).catch(() => {
        throw new Error("The server of this page does not answer; start it again with the same command.");
      });
      const text = await answer.text();
      if (!answer.ok) throw new Error(text);
      return text;
    }

    /** The page as it is now in place of this one; how far it is scrolled, zoomed and opened, and the box, stay. */
    async function reload() {
      const fresh = new DOMParser().parseFromString(await get("./"), "text/html");
      const open = [...document.querySelectorAll("#facts details[open]")].map((each) => each.id);
      page = JSON.parse(fresh.getElementById("data").textContent);
      runs = page.runs;
      for (const id of ["facts", "subtitle", "numbers"]) byId(id).replaceChildren(...fresh.getElementById(id).childNodes);
      open.forEach((id) => byId(id)?.setAttribute("open", ""));
      showAll();
      update();
    }

    async function poll() {
      clearTimeout(timer);
      if (document.hidden) return; // goes on when it is looked at again
      const begin = performance.now();
      let wait = POLL;
      try {
        const state = JSON.parse(await get("state"));
        if (state.fingerprint !== page.live.fingerprint) await reload();
        status.textContent = state.status;
        status.classList.toggle("bad", state.stuck);
        const step = runs[0].train.step.at(-1);
        document.title = step ? `${grouped.format(step)} · ${runs[0].name}` : runs[0].name;
        wait = Math.min(LONGEST, Math.max(POLL, (performance.now() - begin) / SHARE));
      } catch (error) {
        status.textContent = error.message;
        status.classList.add("bad");
      }
      timer = setTimeout(poll, wait);
    }
    document.addEventListener("visibilitychange", () => { if (!document.hidden) poll(); });
    poll();

    box.addEventListener("submit", async (event) => {
      event.preventDefault();
      const answer = byId("answer"), note = byId("answer-note");
      const wish = { prompt: byId("prompt").value };
      for (const name of ["max_tokens", "temperature", "top_k", "seed"]) wish[name] = byId(name).valueAsNumber;
      send.disabled = true;
      note.textContent = "The newest checkpoint is writing.";
      try {
        const { text, step, error } = JSON.parse(await get("prompt", {
          method: "POST", body: JSON.stringify(wish),
          headers: { "Content-Type": "application/json" },
        }));
        if (error) throw new Error(error);
        answer.replaceChildren(element("b", { textContent: wish.prompt }), text);
        answer.hidden = false;
        note.textContent = `Written by the model after step ${grouped.format(step)}.`;
      } catch (error) {
        note.textContent = error.message;
      }
      send.disabled = false;
    });
    byId("prompt").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !send.disabled) box.requestSubmit();
    });
  }
})();
