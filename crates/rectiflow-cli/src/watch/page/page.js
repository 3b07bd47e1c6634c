// The page: which runs are shown, how far back, and what the server is asked for.
//
// Twice a second it asks for what is new. Text from runs (names, reasons, paths) only ever becomes
// text nodes. A page with an element `frozen` has all its data in it and asks nobody.
"use strict";

const RUN_COLOURS = ["--c1", "--c0", "--c2", "--c3", "--c4", "--c5", "--c6", "--c7"];
const SERIES_COLOURS = ["--c1", "--c0", "--c2", "--c3", "--c4", "--c5", "--c6", "--c7"];
const MARK_COLOURS = {
  clip: "faint", skip: "amber", rewind: "stop", stop: "stop", resume: "calm", acknowledged: "calm",
  "save failed": "amber",
};
const MOST_SHOWN = 8;
const ASK_MS = 500;
const $ = (id) => document.getElementById(id);

function make(tag, kind, text) {
  const element = document.createElement(tag);
  if (kind) element.className = kind;
  if (text !== undefined) element.textContent = text;
  return element;
}

class Page {
  constructor(frozen) {
    this.frozen = frozen;
    this.runs = new Map(); // of those that are shown, by number
    this.list = [];
    this.zoom = [null, null];
    this.axis = this.kept("axis", "step");
    this.smooth = Number(this.kept("smooth", "2"));
    this.charts = [];
    this.crossAt = null;
    this.controls();
    this.readColours();
  }

  kept(name, otherwise) {
    try {
      return localStorage.getItem("rectiflow-" + name) || otherwise;
    } catch {
      return otherwise;
    }
  }

  keep(name, value) {
    try {
      localStorage.setItem("rectiflow-" + name, value);
    } catch { /* a page in a file may have no storage */ }
  }

  // The few controls above the charts.
  controls() {
    const bar = make("div", "controls");
    const axis = make("select");
    axis.id = "axis";
    axis.setAttribute("aria-label", "Horizontal axis");
    for (const [value, text] of [["step", "by step"], ["samples", "by sample"], ["time", "by time"]]) {
      const option = make("option", "", text);
      option.value = value;
      axis.append(option);
    }
    axis.value = this.axis;
    axis.addEventListener("change", () => {
      this.axis = axis.value;
      this.keep("axis", this.axis);
      this.zoomTo(null, null);
    });
    const label = make("label", "", "Smoothing ");
    const slider = make("input");
    slider.id = "smooth";
    slider.type = "range";
    slider.min = "0";
    slider.max = "20";
    slider.step = "0.5";
    slider.value = String(this.smooth);
    const shown = make("output");
    const tell = () => { shown.textContent = this.smooth ? this.smooth + " %" : "off"; };
    slider.addEventListener("input", () => {
      this.smooth = Number(slider.value);
      this.keep("smooth", String(this.smooth));
      tell();
      this.drawSoon();
    });
    tell();
    label.append(slider, shown);
    this.resetButton = make("button", "", "Show all");
    this.resetButton.id = "reset";
    this.resetButton.type = "button";
    this.resetButton.hidden = true;
    this.resetButton.addEventListener("click", () => this.zoomTo(null, null));
    const theme = make("button", "", "◐");
    theme.id = "theme";
    theme.type = "button";
    theme.title = "Light, dark, or as the system";
    theme.setAttribute("aria-label", theme.title);
    theme.addEventListener("click", () => {
      const next = {"": "light", light: "dark", dark: ""}[document.documentElement.dataset.theme || ""];
      this.setTheme(next);
      this.keep("theme", next || "system");
    });
    bar.append(axis, label, this.resetButton, make("span", "hint", "Drag to zoom, double-click for all"), theme);
    this.grid = make("div", "charts");
    this.gone = make("p", "problem", "The server does not answer; this is what it said last.");
    this.gone.hidden = true;
    $("live-charts").append(bar, this.gone, this.grid);
    this.setTheme({light: "light", dark: "dark"}[this.kept("theme", "system")] || "");
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.recolour());
    addEventListener("resize", () => this.drawSoon());
    addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.zoomTo(null, null);
    });
    document.addEventListener("visibilitychange", () => { if (!document.hidden) this.askSoon(0); });
  }

  setTheme(theme) {
    if (theme) document.documentElement.dataset.theme = theme; else delete document.documentElement.dataset.theme;
    if (this.colours) this.recolour();
  }

  recolour() {
    this.readColours();
    for (const chart of this.charts) chart.legendOf = null;
    this.arrange();
  }

  readColours() {
    const style = getComputedStyle(document.documentElement);
    const of = (name) => style.getPropertyValue(name).trim();
    this.colours = {};
    for (const name of ["ink", "faint", "grid", "amber", "stop", "calm"]) this.colours[name] = of("--" + name);
    this.runColours = RUN_COLOURS.map(of);
    this.seriesColours = SERIES_COLOURS.map(of);
  }

  async begin() {
    if (this.frozen) {
      this.setCharts(this.frozen.charts);
      this.frozen.replies.forEach((reply, id) => {
        this.runs.set(id, {id, name: reply.name, place: id});
        this.take(this.runs.get(id), reply);
      });
      this.arrange();
      return;
    }
    this.setCharts(await this.get("api/charts"));
    await this.refreshList();
    this.ask();
    setInterval(() => { if (!document.hidden) this.refreshList().catch(() => {}); }, 3000);
  }

  async get(address) {
    const answer = await fetch(address, {cache: "no-store"});
    if (!answer.ok) throw new Error(await answer.text());
    return answer.json();
  }

  setCharts({charts, parts}) {
    this.parts = parts;
    for (const spec of charts) {
      const chart = new Chart(spec, this);
      chart.card.hidden = true;
      this.charts.push(chart);
      this.grid.append(chart.card);
    }
  }

  // The list of runs, and which of them are shown: those of the address, or the last written.
  async refreshList() {
    const {runs} = await this.get("api/runs");
    const text = JSON.stringify(runs);
    const isFirst = !this.runs.size;
    if (text === this.listText && !isFirst) return;
    this.listText = text;
    this.list = runs;
    if (isFirst && runs.length) {
      const named = new URLSearchParams(location.hash.slice(1)).getAll("run");
      const chosen = runs.filter((run) => named.includes(run.name)).slice(0, MOST_SHOWN);
      for (const run of chosen.length ? chosen : runs.slice(0, 1)) this.show(run);
    }
    if (!runs.length) $("line").textContent = "No run has begun here yet.";
    this.drawList();
  }

  show(run) {
    const taken = new Set([...this.runs.values()].map((other) => other.place));
    let place = 0;
    while (taken.has(place)) place++;
    this.runs.set(run.id, {id: run.id, name: run.name, place});
    this.nameShown();
  }

  nameShown() {
    const named = new URLSearchParams();
    for (const run of this.runs.values()) named.append("run", run.name);
    history.replaceState(null, "", "#" + named);
  }

  drawList() {
    $("runs").hidden = this.list.length < 2;
    $("frame").classList.toggle("with-runs", this.list.length >= 2);
    $("runs-count").textContent = this.list.length;
    const filter = $("filter").value.toLowerCase();
    const items = document.createDocumentFragment();
    const found = this.list.filter((run) => run.name.toLowerCase().includes(filter));
    for (const run of found.slice(0, 500)) {
      const item = make("li");
      const label = make("label");
      const box = make("input");
      box.type = "checkbox";
      box.checked = this.runs.has(run.id);
      box.disabled = !box.checked && this.runs.size >= MOST_SHOWN;
      box.addEventListener("change", () => {
        if (box.checked) this.show(run); else if (this.runs.size > 1) this.runs.delete(run.id);
        this.nameShown();
        this.drawList();
        this.arrange();
        this.askSoon(0);
      });
      const swatch = make("i", "swatch");
      if (box.checked) swatch.style.background = this.runColours[this.runs.get(run.id).place % RUN_COLOURS.length];
      label.append(box, swatch, make("span", "run-name", run.name), make("span", "state " + stateKind(run.state), run.state));
      item.append(label);
      items.append(item);
    }
    if (found.length > 500) items.append(make("li", "hint", `and ${found.length - 500} more: filter by name`));
    $("runs-list").replaceChildren(items);
  }

  askSoon(ms) {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.ask(), ms);
  }

  // Asks for what is new of each run that is shown. Runs that have ended are asked less often.
  async ask() {
    if (this.frozen || this.isAsking) return;
    this.isAsking = true;
    let changed = false;
    try {
      for (const run of [...this.runs.values()]) {
        if (run.isOver && run.data && !run.isStale && performance.now() - run.asked < 5000) continue;
        if (document.hidden) continue;
        changed = await this.askOne(run) || changed;
      }
      changed = changed || !this.gone.hidden;
      this.gone.hidden = true;
    } catch (error) {
      this.gone.hidden = false;
      this.gone.textContent = "No new numbers: " + (error.message || error).slice(0, 400);
    }
    this.isAsking = false;
    if (changed) this.arrange(); else this.drawWords();
    this.askSoon(ASK_MS);
  }

  async askOne(run) {
    const ask = new URLSearchParams({axis: this.axis, bins: String(this.bins())});
    const began = this.axis === "time" ? run.began || 0 : 0;
    if (this.zoom[0] !== null) {
      ask.set("from", String(this.zoom[0] + began));
      ask.set("to", String(this.zoom[1] + began));
    }
    if (run.data && !run.isStale) {
      ask.set("generation", run.data.generation);
      ask.set("moments", run.data.moments);
      ask.set("acts", run.data.num_acts);
      ask.set("previews", run.data.num_previews);
    }
    run.isStale = false;
    run.asked = performance.now();
    const reply = await this.get(`api/runs/${run.id}?${ask}`);
    return this.take(run, reply);
  }

  bins() {
    return Math.max(200, Math.min(800, Math.round(innerWidth / 2)));
  }

  // Takes an answer; returns whether there is something to draw.
  take(run, reply) {
    const data = run.data;
    const isNew = !data || reply.is_whole || reply.moments !== data.moments || Boolean(reply.acts);
    run.isOver = !["running", "waiting"].includes(reply.status.state);
    if (reply.is_whole || !data) {
      run.data = reply;
      run.added = 0;
      run.began = reply.began;
    } else {
      append(data.view, reply.view);
      run.added += reply.moments - data.moments;
      for (const name of ["generation", "moments", "num_acts", "num_previews", "status", "ranks", "problem"]) {
        data[name] = reply[name];
      }
      if (reply.acts) data.acts = reply.acts;
      if (reply.previews) data.previews = reply.previews;
      // What is appended is not divided into bins.
      if (run.added > 3000) run.isStale = true;
    }
    return isNew;
  }

  zoomTo(from, to) {
    this.zoom = [from, to];
    this.resetButton.hidden = from === null;
    for (const run of this.runs.values()) run.isStale = true;
    this.leave();
    this.arrange();
    this.askSoon(0);
  }

  // Everything below is drawing.

  drawSoon() {
    if (this.frame) return;
    this.frame = requestAnimationFrame(() => {
      this.frame = null;
      for (const chart of this.charts) {
        if (!chart.card.hidden) chart.draw();
        chart.showCross(this.crossAt);
      }
      const root = document.documentElement.dataset;
      if (!root.ready && [...this.runs.values()].some((run) => run.data)) root.ready = Math.round(performance.now());
    });
  }

  main() {
    return this.runs.values().next().value;
  }

  // Gives every chart its series, and the page its words.
  arrange() {
    const runs = [...this.runs.values()].filter((run) => run.data);
    for (const chart of this.charts) {
      chart.series = [];
      for (const run of runs) chart.series.push(...this.seriesOf(chart.spec, run, runs.length > 1));
      const hasPoints = chart.series.some((series) => series.points.v.length || series.bad.length);
      chart.card.hidden = !hasPoints;
      if (hasPoints) {
        const last = chart.series.length ? chart.series.map((s) => s.label).join(", ") : "";
        chart.canvas.setAttribute("aria-label", `${chart.spec.title}: ${last}`.slice(0, 300));
        chart.showLegend();
      }
    }
    this.findMarks(runs);
    this.drawSoon();
    this.drawWords();
  }

  seriesOf(spec, run, isOneOfMany) {
    const {view} = run.data;
    const names = Object.keys(view.curves).filter((name) => name.startsWith(spec.name + "/"));
    names.sort((a, b) => order(a) - order(b) || (a < b ? -1 : 1));
    const place = this.placer(run);
    const runColour = this.runColours[run.place % this.runColours.length];
    return names.map((name, index) => {
      const points = view.curves[name];
      const share = names.length > 1 ? index / (names.length - 1) : 1;
      let colour = this.seriesColours[index % this.seriesColours.length];
      if (spec.ramp) colour = mix(this.seriesColours[0], this.seriesColours[1], share);
      const label = name.slice(spec.name.length + 1).replaceAll("_", " ");
      return {
        run,
        label: isOneOfMany ? (names.length > 1 ? `${run.name}: ${label}` : run.name) : label,
        colour: isOneOfMany ? runColour : colour,
        alpha: isOneOfMany && spec.ramp ? 0.35 + 0.65 * share : 1,
        dash: isOneOfMany && !spec.ramp && index ? [6, 3] : [],
        points,
        xs: points.s.map(place),
        xt: points.t ? points.t.map(place) : null,
        bad: (points.bad || []).map(([step]) => place(step)),
      };
    });
  }

  // From a step to a place on the axis, between the moments that the server has sent.
  placer(run) {
    if (this.axis === "step") return (step) => step;
    const {step: steps, samples, time} = run.data.view.axis;
    const values = this.axis === "samples" ? samples : time;
    const began = this.axis === "time" ? run.began : 0;
    return (step) => between(steps, values, step) - began;
  }

  findMarks(runs) {
    this.allMarks = [];
    for (const run of runs) {
      for (const act of run.data.acts.marks) {
        const x = this.axis === "time" ? act.time - run.began : act[this.axis];
        const colour = this.colours[MARK_COLOURS[act.action] || "amber"];
        this.allMarks.push({x, action: act.action, act, run, colour});
      }
    }
  }

  marks() {
    return this.allMarks || [];
  }

  // The horizontal range of all charts.
  range() {
    if (this.zoom[0] !== null) return this.zoom;
    let low = Infinity, high = -Infinity;
    for (const run of this.runs.values()) {
      if (!run.data) continue;
      const place = this.placer(run);
      const {step} = run.data.view.axis;
      if (!step.length) continue;
      low = Math.min(low, place(step[0]));
      high = Math.max(high, place(step[step.length - 1]));
    }
    if (!(high >= low)) return [0, 1];
    return high > low ? [low, high] : [low, low + 1];
  }

  axisName() {
    if (this.axis === "time") return "time in the run";
    return this.axis === "step" ? "steps" : "samples";
  }

  axisTicks(low, high, count) {
    if (this.axis !== "time") {
      const ticks = linearTicks(low, high, count);
      const step = ticks.length > 1 ? ticks[1] - ticks[0] : 1;
      const whole = step < 1000 && high >= 1e4;
      return ticks.map((at) => ({at, text: whole ? grouped(at) : shortNumber(at, 4)}));
    }
    const units = [1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 10800, 21600, 43200, 86400, 172800, 604800];
    const wanted = (high - low) / count;
    const unit = units.find((secs) => secs >= wanted) || 604800 * Math.ceil(wanted / 604800);
    const ticks = [];
    for (let at = Math.ceil(low / unit) * unit; at <= high; at += unit) {
      ticks.push({at, text: at ? duration(at).replace(/ 0 (s|min|h)$/, "") : "0"});
    }
    return ticks;
  }

  smoothing() {
    return this.smooth / 100;
  }

  hover(chart, x, event) {
    this.crossAt = x;
    for (const other of this.charts) if (!other.card.hidden) other.showCross(x);
    const tip = $("tip");
    tip.replaceChildren(...this.tipLines(chart, x));
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    const left = event.clientX + 16 + box.width < innerWidth ? event.clientX + 16 : event.clientX - 16 - box.width;
    const top = event.clientY + 16 + box.height < innerHeight ? event.clientY + 16 : event.clientY - 16 - box.height;
    tip.style.transform = `translate(${Math.max(4, left)}px, ${Math.max(4, top)}px)`;
  }

  tipLines(chart, x) {
    const found = chart.at(x);
    const lines = [];
    const step = found.length ? found[0].step : this.axis === "step" ? Math.round(x) : null;
    if (step !== null) {
      const run = found.length ? found[0].series.run : this.main();
      const {step: steps, samples, time} = run.data.view.axis;
      lines.push(make("b", "", "step " + grouped(step)));
      const secs = between(steps, time, step);
      const at = new Date(1000 * secs);
      const clock = isNaN(at) ? "" : `, ${at.toLocaleDateString()} ${at.toLocaleTimeString()}`;
      lines.push(make("div", "hint", `${grouped(between(steps, samples, step))} samples, ${duration(secs - run.began)} in${clock}`));
    }
    for (const {series, text} of found.slice(0, 16)) {
      const line = make("div", "value");
      const swatch = make("i", "swatch");
      swatch.style.background = series.colour;
      swatch.style.opacity = series.alpha;
      line.append(swatch, make("span", "", series.label), make("b", "", text));
      lines.push(line);
    }
    const near = this.marks().filter((mark) => Math.abs(chart.px(mark.x) - chart.px(x)) < 6);
    for (const mark of near.slice(-4)) lines.push(actLine(mark, this.runs.size > 1, "div"));
    return lines;
  }

  leave() {
    this.crossAt = null;
    $("tip").hidden = true;
    for (const chart of this.charts) chart.showCross(null);
  }

  drawWords() {
    if (this.frozen) {
      this.drawActs();
      return;
    }
    const run = this.main();
    if (!run || !run.data) return;
    const {status} = run.data;
    $("name").textContent = run.name;
    document.title = `${run.name}: rectiflow`;
    $("line").textContent = status.line;
    const state = $("state");
    state.hidden = false;
    state.textContent = status.state;
    state.className = "state " + stateKind(status.state);
    $("problem").hidden = !run.data.problem;
    $("problem").textContent = run.data.problem || "";
    $("progress").hidden = status.progress === null;
    $("progress").firstElementChild.style.width = 100 * (status.progress || 0) + "%";
    $("tiles").replaceChildren(...status.tiles.map(({name, value, note}) => {
      const tile = make("div", "tile");
      tile.append(make("span", "tile-name", name), make("b", "", value), make("span", "note", note));
      return tile;
    }));
    this.drawActs();
    this.drawPreviews();
    this.drawRanks(run);
  }

  drawActs() {
    const marks = this.marks().filter((mark) => mark.action !== "clip");
    const counts = {};
    for (const run of this.runs.values()) {
      if (!run.data) continue;
      for (const [kind, count] of Object.entries(run.data.acts.counts)) counts[kind] = (counts[kind] || 0) + count;
    }
    const kinds = Object.entries(counts);
    $("acts").hidden = !kinds.length;
    const key = JSON.stringify([counts, this.runs.size, this.axis]);
    if (key === this.actsKey) return;
    this.actsKey = key;
    $("acts-counts").textContent = kinds.map(([kind, count]) => `${kind}: ${grouped(count)}`).join(", ");
    const newest = marks.slice(-100).reverse();
    $("acts-list").replaceChildren(...newest.map((mark) => actLine(mark, this.runs.size > 1, "li")));
  }

  drawPreviews() {
    const shown = [...this.runs.values()].filter((run) => run.data && run.data.previews && run.data.previews.length);
    $("previews").hidden = !shown.length;
    const list = $("previews-list");
    const wanted = shown.map((run) => run.id).join();
    if (wanted !== this.previewsOf) {
      this.previewsOf = wanted;
      list.replaceChildren(...shown.map((run) => {
        run.viewer = new Previews(run, shown.length > 1);
        return run.viewer.box;
      }));
    }
    for (const run of shown) run.viewer.update(run.data.previews);
  }

  drawRanks(run) {
    const {ranks} = run.data;
    $("ranks").hidden = !ranks.length;
    if (!ranks.length) return;
    const colours = [this.colours.amber, this.seriesColours[0], this.seriesColours[3], this.seriesColours[2]];
    $("ranks-legend").replaceChildren(...this.parts.map((part, index) => {
      const key = make("span", "key");
      const swatch = make("i");
      swatch.style.background = colours[index];
      key.append(swatch, make("span", "", part));
      return key;
    }));
    const longest = Math.max(...ranks.map(({secs}) => secs.reduce((a, b) => a + b, 0)), 1e-9);
    $("ranks-list").replaceChildren(...ranks.map(({rank, secs, is_slowest}) => {
      const row = make("div", "rank" + (is_slowest ? " slowest" : ""));
      const bar = make("span", "rank-bar");
      secs.forEach((part, index) => {
        const piece = make("i");
        piece.style.width = 100 * part / longest + "%";
        piece.style.background = colours[index];
        piece.title = `${this.parts[index]}: ${digits(part, 3)} s`;
        bar.append(piece);
      });
      const total = secs.reduce((a, b) => a + b, 0);
      row.append(make("span", "rank-name", `rank ${rank}` + (is_slowest ? ", slowest" : "")), bar, make("span", "count", digits(total, 3) + " s"));
      return row;
    }));
  }
}

// The previews of a run: the newest, until the slider is moved.
class Previews {
  constructor(run, isNamed) {
    this.run = run;
    this.box = make("figure", "preview");
    this.caption = make("figcaption");
    this.name = isNamed ? run.name + ": " : "";
    this.picture = make("img");
    this.slider = make("input");
    this.slider.type = "range";
    this.slider.min = "0";
    this.slider.setAttribute("aria-label", "Which preview");
    this.slider.addEventListener("input", () => {
      this.follows = Number(this.slider.value) === this.list.length - 1;
      this.show(Number(this.slider.value));
    });
    this.follows = true;
    this.list = [];
    const frame = make("div", "wide");
    frame.append(this.picture);
    this.box.append(this.caption, this.slider, frame);
  }

  update(list) {
    const key = JSON.stringify([list, this.run.data.generation]);
    if (key === this.key) return;
    this.key = key;
    this.list = list;
    this.slider.max = String(list.length - 1);
    this.slider.hidden = list.length < 2;
    const index = this.follows ? list.length - 1 : Math.min(Number(this.slider.value), list.length - 1);
    this.slider.value = String(index);
    this.show(index);
  }

  show(index) {
    const [step, samples] = this.list[index];
    this.caption.textContent = `${this.name}step ${grouped(step)}, ${grouped(samples)} samples (${index + 1} of ${this.list.length})`;
    this.picture.alt = `One picture for each prompt at step ${grouped(step)}`;
    this.picture.src = `api/runs/${this.run.id}/previews/${index}?${this.run.data.generation}-${step}`;
  }
}

function actLine({act, run, colour}, isNamed, tag) {
  const line = make(tag, "act");
  const kind = make("b", "", act.action);
  kind.style.color = colour;
  line.append(kind, ` at step ${grouped(act.step)}`);
  if (isNamed) line.append(` of ${run.name}`);
  if (act.reason) line.append(`: ${act.reason}`);
  if (act.black_box) line.append(" ", make("code", "", `blackbox/${act.black_box}`));
  return line;
}

function stateKind(state) {
  return {running: "good", finished: "good", stopped: "bad", silent: "bad"}[state] || "";
}

// Raw losses come before those of tests.
function order(name) {
  return name.endsWith("/training") || name.endsWith("/all") || name.endsWith("/step") ? 0 : 1;
}

function mix(from, to, share) {
  const parse = (colour) => [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
  const [a, b] = [parse(from), parse(to)];
  return `rgb(${a.map((value, k) => Math.round(value + share * (b[k] - value))).join(", ")})`;
}

// Linear interpolation in two ascending columns.
function between(keys, values, key) {
  const k = lastAtMost(keys, key);
  if (k < 0) return values.length ? values[0] : 0;
  if (k + 1 >= keys.length || keys[k + 1] === keys[k]) return values[k];
  return values[k] + (key - keys[k]) / (keys[k + 1] - keys[k]) * (values[k + 1] - values[k]);
}

function append(view, more) {
  for (const name of ["step", "samples", "time"]) view.axis[name].push(...more.axis[name]);
  for (const [name, points] of Object.entries(more.curves)) {
    const known = view.curves[name];
    if (!known) {
      view.curves[name] = points;
      continue;
    }
    known.s.push(...points.s);
    known.v.push(...points.v);
    if (known.hi) {
      known.t.push(...points.s);
      known.hi.push(...points.v);
      known.m.push(...points.v);
      known.n.push(...points.s.map(() => 1));
    }
    if (points.bad) known.bad = (known.bad || []).concat(points.bad);
  }
}

const frozen = $("frozen");
const page = new Page(frozen ? JSON.parse(frozen.textContent) : null);
if (!frozen) $("filter").addEventListener("input", () => page.drawList());
if (matchMedia("(max-width: 900px)").matches && $("runs-box")) $("runs-box").open = false;
page.begin().catch((error) => { page.gone.hidden = false; page.gone.textContent = "No numbers: " + error.message; });
