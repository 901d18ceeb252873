"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const safe = (text) => String(text).replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`);
  const short = (text, length) => (text.length > length ? text.slice(0, length - 1) + "…" : text);
  // A name in two lines where it is too long for one, broken behind a "_".
  const lines = (text, room) => {
    if (text.length <= room) return text;
    const breaks = [...text].flatMap((letter, i) => (letter === "_" && i < room ? [i + 1] : [])), at = breaks.length ? breaks[breaks.length - 1] : room - 1;
    return `${text.slice(0, at)}\n${short(text.slice(at), room)}`;
  };
  const narrow = () => innerWidth < 640;
  const charts = []; // [element, options(), chart]
  const number = (x) => (x === null ? "not measured" : Math.abs(x) >= 1e5 || (x !== 0 && Math.abs(x) < 1e-3) ? x.toExponential(1) : Number(x.toPrecision(3)).toLocaleString("en"));

  const tooltip = () => ({
    confine: true, backgroundColor: css("--card"), borderColor: css("--line"), textStyle: { color: css("--ink"), fontSize: 13 },
    extraCssText: "white-space:normal;max-width:min(30rem,86vw);overflow-wrap:anywhere;border-radius:8px",
  });
  const axis = (more) => ({
    axisLine: { lineStyle: { color: css("--line") } }, axisTick: { show: false }, axisLabel: { color: css("--soft"), hideOverlap: true },
    splitLine: { lineStyle: { color: css("--line") } }, nameTextStyle: { color: css("--soft") }, ...more,
  });
  function draw(element, options) {
    const entry = charts.find((one) => one[0] === element) || [element, options, null];
    if (!charts.includes(entry)) charts.push(entry);
    entry[1] = options;
    const { height, ...option } = options();
    element.style.height = `${height}px`;
    if (!entry[2]) entry[2] = echarts.init(element, null, { renderer: "canvas" });
    else entry[2].resize();
    entry[2].setOption({ animation: false, ...option }, true);
    return entry[2];
  }
  const later = "IntersectionObserver" in window ? new IntersectionObserver((seen) => {
    for (const one of seen) if (one.isIntersecting) { later.unobserve(one.target); one.target.start(); }
  }, { rootMargin: "600px" }) : null;
  // What is far below is drawn when it comes near: a page of many layers opens at once.
  const whenSeen = (element, start) => { if (!later) return start(); element.start = start; later.observe(element); };

  // One layer: boxes and lines.
  const PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6BB1", "#A6761D"];
  const colours = (kind) => Object.fromEntries(kind.groups.map((group, i) => [group.name, group.name.startsWith("R1 ") ? css("--accent") : PALETTE[i % PALETTE.length]]));
  function place(kind, width) {
    const rail = kind.boxes.some((box) => box.kind === "residual") ? 44 : 8;
    const rows = new Map();
    for (const box of kind.boxes) if (box.kind !== "residual") rows.set(box.row, [...(rows.get(box.row) || []), box]);
    const most = Math.max(...[...rows.values()].map((row) => row.length));
    const wide = Math.max(96, Math.min(150, (width - rail) / most - 12));
    const fits = Math.max(1, Math.floor((width - rail) / (wide + 10)));
    const places = new Map();
    let y = 30;
    for (const row of [...rows.keys()].sort((a, b) => a - b)) {
      const boxes = rows.get(row);
      for (let from = 0; from < boxes.length; from += fits) {
        const part = boxes.slice(from, from + fits), step = (width - rail) / part.length;
        part.forEach((box, i) => places.set(box.key, [rail + step * (i + 0.5), y]));
        y += from + fits < boxes.length ? 58 : 84;
      }
    }
    return { places, wide, height: y - 30, rail };
  }
  const rounded = (w, h, r = 9) => `path://M${r},0H${w - r}Q${w},0,${w},${r}V${h - r}Q${w},${h},${w - r},${h}H${r}Q0,${h},0,${h - r}V${r}Q0,0,${r},0Z`;
  function diagram(kind, width, lit) {
    const { places, wide, height, rail } = place(kind, width), colour = colours(kind);
    const dim = (of) => (lit && lit !== of ? 0.12 : 1);
    const touched = new Set(kind.lines.filter((line) => line.of === lit).flatMap((line) => [line.start, line.end]));
    const nodes = kind.boxes.filter((box) => places.has(box.key)).map((box) => ({
      id: box.key, name: box.key, value: places.get(box.key), symbol: rounded(wide, 42), symbolSize: [wide, 42], box,
      itemStyle: { color: css(box.kind === "norm" || box.kind === "outside" ? "--card" : "--chip"), borderWidth: box.blocked.length ? 2 : 1,
        borderColor: css(box.blocked.length ? "--bad" : "--soft"), borderType: box.kind === "outside" || box.blocked.length ? "dashed" : "solid",
        opacity: lit && !touched.has(box.key) ? 0.25 : 1 },
      label: { opacity: lit && !touched.has(box.key) ? 0.35 : 1 },
    }));
    const edges = [], ends = [];
    // Lines begin and end at points on the boxes' edges: a library that knows of boxes by their radius leaves gaps.
    const port = (key, right, below) => {
      const [x, y] = places.get(key), id = `${key}@${right},${below}`;
      if (!nodes.some((node) => node.id === id)) nodes.push({ id, name: id, value: [x + right, y + below], symbolSize: 0.1, label: { show: false }, rail: true });
      return id;
    };
    for (const line of kind.lines) {
      const out = line.start === "residual", into = line.end === "residual";
      let [source, target] = [line.start, line.end];
      if (out || into) { // the residual is a rail at the left: each line has a point of its own on it
        const at = places.get(out ? target : source), id = `${line.start}>${line.end}`;
        if (!at) continue;
        ends.push(at[1] + (into ? 9 : -9));
        nodes.push({ id, name: id, value: [18, at[1] + (into ? 9 : -9)], symbolSize: 7, itemStyle: { color: css("--soft"), opacity: dim(line.of) }, label: { show: false }, rail: true });
        if (out) source = id; else target = id;
        if (into) source = port(line.start, -wide / 2, 9); else target = port(line.end, -wide / 2, -9);
      }
      if (!out && !into) {
        const [a, b] = [places.get(line.start), places.get(line.end)];
        if (!a || !b) continue;
        const side = a[1] === b[1], down = a[1] < b[1], right = a[0] < b[0] ? 1 : -1, aside = line.kind === "R2" || line.kind === "other" ? 14 : 0;
        source = side ? port(line.start, (right * wide) / 2, 0) : port(line.start, aside, down ? 21 : -21);
        target = side ? port(line.end, (-right * wide) / 2, 0) : port(line.end, aside, down ? -21 : 21);
      }
      edges.push({ source, target, line, lineStyle: {
        color: colour[line.of] || css("--soft"), width: lit === line.of ? 3.5 : 2, opacity: dim(line.of), type: line.kind === "query_key" ? "dotted" : out || into ? "dashed" : "solid", curveness: 0 } });
    }
    if (ends.length) {
      for (const [id, y] of [["^", 4], ["v", height + 14]]) nodes.push({ id, name: id, value: [18, y], symbolSize: 1, label: { show: false }, rail: true });
      edges.unshift({ source: "^", target: "v", rail: true, lineStyle: { color: css("--soft"), width: 7, opacity: 0.45 } });
    }
    return {
      height: height + 24, tooltip: { ...tooltip(), formatter: (p) => {
        if (p.dataType === "edge") return p.data.rail ? "The residual stream" : `<b>${safe(p.data.line.of)}</b><br>${safe(data.kinds[p.data.line.kind] || p.data.line.kind)}`;
        if (!p.data.box) return "The residual stream";
        const { box } = p.data, count = box.count > 1 ? ` × ${box.count}` : "";
        return `<b>${safe(box.name)}</b> ${safe(box.shape)}${count}<br>${box.about.map(safe).join("<br>")}`; } },
      grid: { left: 0, right: 0, top: 0, bottom: 0 }, xAxis: { show: false, min: 0, max: width }, yAxis: { show: false, min: 0, max: height + 24, inverse: true },
      series: [{ type: "graph", coordinateSystem: "cartesian2d", data: nodes, links: edges, edgeSymbol: ["none", "arrow"], edgeSymbolSize: [0, 8],
        emphasis: { scale: false, lineStyle: { width: 4 } },
        label: { show: true, color: css("--ink"), fontSize: wide < 110 ? 10.5 : 12, lineHeight: 15, formatter: ({ data: node }) => {
          if (!node.box) return "";
          const parts = node.box.name.split("."), last = parts[parts.length - 1], room = Math.floor(wide / 6.6);
          const inside = parts.length > 2 ? parts[parts.length - 2] + " " : "", count = node.box.count > 1 ? ` ×${node.box.count}` : "";
          if (!node.box.shape) return lines(last, room);
          const shape = node.box.shape.replace(/,/g, "") + count;
          const fits = [inside + shape, shape, shape.replace(/ /g, "")].find((text) => text.length < room) || node.box.shape.replace(/,/g, "");
          return `${short(last, room)}\n${short(fits, room + 2)}`; } } }],
    };
  }
  data.layers.forEach((kind, index) => {
    const element = document.getElementById(`layer-${index}`), buttons = [...document.querySelectorAll(`[data-layer="${index}"]`)];
    let lit = null;
    const again = () => draw(element, () => diagram(kind, element.clientWidth, lit));
    whenSeen(element, () => {
      const colour = colours(kind);
      again();
      buttons.forEach((button) => {
        const group = kind.groups[button.dataset.group].name;
        button.querySelector(".swatch").style.background = colour[group];
        button.addEventListener("click", () => {
          lit = lit === group ? null : group;
          buttons.forEach((one) => one.setAttribute("aria-pressed", String(one === button && lit !== null)));
          again();
        });
      });
    });
  });

  // The residual stream: who writes and who reads, over depth.
  data.residual.forEach((space, index) => {
    const element = document.getElementById(`residual-${index}`);
    whenSeen(element, () => draw(element, () => ({
      height: 190, tooltip: { ...tooltip(), formatter: (p) => p.seriesType === "line" ? safe(space.name) : `<b>${safe(p.data.name)}</b><br>${p.seriesName} the residual${p.data.layer === null ? "" : `, layer ${p.data.layer}`}` },
      legend: { textStyle: { color: css("--soft") }, data: ["writes", "reads"], top: 0 },
      grid: { left: 8, right: 14, top: 34, bottom: 8, containLabel: true },
      xAxis: axis({ type: "value", name: "layer", nameLocation: "middle", nameGap: 24, min: -1, max: space.depth, minInterval: 1, splitLine: { show: false }, axisLabel: { color: css("--soft"), formatter: (x) => (x < 0 || x >= space.depth ? "" : x) } }),
      yAxis: { show: false, min: -1, max: 1 }, dataZoom: [{ type: "inside", filterMode: "none", zoomOnMouseWheel: "ctrl" }],
      series: [
        { type: "line", name: "stream", data: [[-1, 0], [space.depth, 0]], symbol: "none", lineStyle: { width: 8, color: css("--soft"), opacity: 0.45 }, silent: true },
        { type: "scatter", name: "writes", symbol: "triangle", symbolRotate: 180, color: "#D55E00", symbolSize: space.depth > 60 ? 8 : 12, data: space.writes.map((one) => ({ value: [one.at, 0.45], ...one })) },
        { type: "scatter", name: "reads", symbol: "triangle", symbolRotate: 180, color: "#0072B2", symbolSize: space.depth > 60 ? 8 : 12, data: space.reads.map((one) => ({ value: [one.at, -0.45], ...one })) },
      ],
    })));
  });

  // Heat maps over depth.
  const RAMP = ["#0d0887", "#5b02a3", "#9a179b", "#cb4678", "#eb7852", "#fdb32f", "#f0f921"];
  function heat({ x, y, values, low, high, title, xName, tell, log }) {
    const at = (v) => (log ? Math.log10(Math.max(v, 1e-9)) : v);
    const cells = values.flatMap((row, j) => row.map((v, i) => [i, j, v === null ? "-" : at(v), v]));
    return {
      height: Math.max(150, y.length * (y.length > 40 ? 6 : 24)) + 108, title: undefined, tooltip: { ...tooltip(), formatter: (p) => tell(p.data[0], p.data[1], p.data[3]) },
      grid: { left: 8, right: 12, top: 12, bottom: 74, containLabel: true },
      xAxis: axis({ type: "category", data: x, name: xName, nameLocation: "middle", nameGap: 26 }), yAxis: axis({ type: "category", data: y.map((one) => short(String(one), narrow() ? 18 : 30)), inverse: true }),
      visualMap: { dimension: 2, min: at(low), max: Math.max(at(high), at(low) + 1e-6), calculable: true, orient: "horizontal", left: "center", bottom: 0, itemHeight: narrow() ? 110 : 170, itemWidth: 12,
        textStyle: { color: css("--soft") }, inRange: { color: RAMP }, formatter: (v) => number(log ? 10 ** v : v) },
      series: [{ type: "heatmap", data: cells, emphasis: { itemStyle: { borderColor: css("--ink"), borderWidth: 1 } } }],
    };
  }
  const range = (...tables) => { const all = tables.flat(2).filter((v) => v !== null && v > -1e30); return [Math.min(...all), Math.max(...all)]; };
  const measured = data.measured, chosen = (id) => document.getElementById(id).value;
  const onChange = (ids, again) => ids.forEach((id) => document.getElementById(id).addEventListener("change", again));
  if (measured) {
    const linears = measured.linears, layers = measured.layers;
    const depth = () => {
      const key = chosen("measure"), [low, high] = range(measured.before[key], measured.after[key]);
      for (const side of ["before", "after"]) draw(document.getElementById(`depth-${side}`), () => heat({ x: layers, y: linears, values: measured[side][key], low: Math.max(low, 1e-6), high, log: true, xName: "layer",
        tell: (i, j, v) => `<b>${safe(linears[j])}</b>, layer ${layers[i]}<br>${safe(measured.measures[key])}: ${number(v)}` }));
    };
    const tokens = () => {
      const j = Number(chosen("token-linear")), [low, high] = range(measured.before.tokens[j], measured.after.tokens[j]);
      for (const side of ["before", "after"]) draw(document.getElementById(`tokens-${side}`), () => heat({ x: measured.text.map((one) => short(one, 10)), y: layers, values: measured[side].tokens[j], low: Math.max(low, 1e-6), high, log: true, xName: "token",
        tell: (t, l, v) => `token ${t} “${safe(measured.text[t])}”, layer ${layers[l]}<br>largest value of ${safe(linears[j])}'s input: ${number(v)}` }));
    };
    const noise = () => {
      const name = chosen("snr-strategy"), [low, high] = range(measured.snr[name].before, measured.snr[name].after);
      for (const side of ["before", "after"]) draw(document.getElementById(`snr-${side}`), () => heat({ x: layers, y: linears, values: measured.snr[name][side], low, high, log: false, xName: "layer",
        tell: (i, j, v) => `<b>${safe(linears[j])}</b>, layer ${layers[i]}<br>signal to noise: ${number(v)} dB` }));
    };
    for (const [id, start, ids] of [["depth-before", depth, ["measure"]], ["tokens-before", tokens, ["token-linear"]], ["snr-before", noise, ["snr-strategy"]]])
      whenSeen(document.getElementById(id), () => { start(); onChange(ids, start); });
    const cost = document.getElementById("cost");
    if (cost) whenSeen(cost, () => draw(cost, () => ({
      height: measured.cost.length * 24 + 60, tooltip: { ...tooltip(), formatter: (p) => `<b>${safe(measured.cost[p.dataIndex].path)}</b><br>perplexity ${number(p.value)} % above float when it alone is int8` },
      grid: { left: 8, right: 24, top: 8, bottom: 34, containLabel: true }, xAxis: axis({ type: "value", name: "% above float", nameLocation: "middle", nameGap: 24 }),
      yAxis: axis({ type: "category", inverse: true, data: measured.cost.map((one) => short(one.path.replace(/^model\.layers\./, ""), narrow() ? 24 : 48)) }),
      series: [{ type: "bar", color: "#D55E00", data: measured.cost.map((one) => one.percent) }],
    })));
  }

  // Themes and widths.
  const redraw = () => charts.forEach(([element, options]) => draw(element, options));
  let waiting = 0;
  addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(redraw, 80); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  const toggle = document.getElementById("theme"), dark = () => css("--bg").startsWith("#0");
  const name = () => { toggle.textContent = dark() ? "Light theme" : "Dark theme"; };
  toggle.addEventListener("click", () => { document.documentElement.dataset.theme = dark() ? "light" : "dark"; name(); redraw(); });
  name();
  document.documentElement.dataset.ready = "true";
})();
