// Line charts on canvases: scales, ticks, curves with their extremes, marks, zoom by dragging.
//
// A chart knows nothing of runs. It draws series: {label, colour, alpha, dash, xs, points, dots},
// where points is what the server sends: s and v (steps and values), and for bins t, hi, m and n
// (steps of the largest values, largest values, means, counts).
"use strict";

const PAD = {left: 56, right: 12, top: 10, bottom: 34};

function niceStep(span, count) {
  const raw = span / Math.max(1, count);
  const power = Math.pow(10, Math.floor(Math.log10(raw)));
  const lead = raw / power;
  return (lead < 1.5 ? 1 : lead < 3.5 ? 2 : lead < 7.5 ? 5 : 10) * power;
}

function linearTicks(low, high, count) {
  const step = niceStep(high - low, count);
  const ticks = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9 && ticks.length < 50; k++) {
    ticks.push(k * step);
  }
  return ticks;
}

function logTicks(low, high, count) {
  const decades = Math.log10(high / low);
  if (decades < 0.7) return linearTicks(low, high, count);
  const leads = decades <= 2.2 ? [1, 2, 5] : [1];
  const skip = Math.max(1, Math.ceil(decades / count));
  const ticks = [];
  for (let e = Math.floor(Math.log10(low)); e <= Math.log10(high) + 1; e++) {
    if (leads.length === 1 && e % skip !== 0) continue;
    for (const lead of leads) {
      const tick = lead * Math.pow(10, e);
      if (tick >= low * 0.999 && tick <= high * 1.001) ticks.push(tick);
    }
  }
  return ticks;
}

function digits(value, count) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e15 || size < 1e-4) return value.toExponential(Math.max(0, count - 1)).replace(/\.?0+e/, "e");
  return String(Number(value.toPrecision(count)));
}

function shortNumber(value, count = 3) {
  const size = Math.abs(value);
  for (const [unit, name] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e4, "k"]]) {
    if (size >= unit) return digits(unit === 1e4 ? value / 1e3 : value / unit, count) + name;
  }
  return digits(value, count);
}

function grouped(value) {
  return Math.round(value).toLocaleString("en-US");
}

function duration(secs) {
  if (!isFinite(secs)) return "?";
  const s = Math.max(0, Math.round(secs));
  if (s < 60) return s + " s";
  if (s < 3600) return Math.floor(s / 60) + " min " + s % 60 + " s";
  if (s < 86400) return Math.floor(s / 3600) + " h " + Math.floor(s % 3600 / 60) + " min";
  return Math.floor(s / 86400) + " d " + Math.floor(s % 86400 / 3600) + " h";
}

// Values in the unit of their chart.
function valueText(value, scale, count = 4) {
  if (scale === "share") return digits(100 * value, Math.min(count, 3)) + " %";
  if (scale === "bytes") {
    const units = ["B", "kB", "MB", "GB", "TB"];
    let k = 0;
    while (Math.abs(value) >= 999.5 && k < 4) { value /= 1000; k++; }
    return digits(value, 3) + " " + units[k];
  }
  return count <= 3 || Math.abs(value) >= 1e6 ? shortNumber(value, count) : digits(value, count);
}

// The index of the last element that is not above x; -1 if there is none.
function lastAtMost(sorted, x) {
  let low = 0, high = sorted.length;
  while (low < high) {
    const mid = (low + high) >> 1;
    if (sorted[mid] <= x) low = mid + 1; else high = mid;
  }
  return low - 1;
}

// An exponential moving average over bins, with bias correction: `share` of the values weigh most.
function smoothed(points, share) {
  const means = points.m || points.v;
  const counts = points.n;
  let total = 0;
  for (let k = 0; k < means.length; k++) total += counts ? counts[k] : 1;
  const keep = 1 - 1 / Math.max(1, share * total);
  let sum = 0, weight = 0;
  const smooth = new Array(means.length);
  for (let k = 0; k < means.length; k++) {
    const left = Math.pow(keep, counts ? counts[k] : 1);
    sum = left * sum + (1 - left) * means[k];
    weight = left * weight + (1 - left);
    smooth[k] = sum / weight;
  }
  return smooth;
}

class Chart {
  constructor(spec, page) {
    this.spec = spec;
    this.page = page;
    this.series = [];
    this.hidden = new Set();
    this.log = spec.scale === "log";
    this.build();
  }

  build() {
    const make = (tag, kind, parent) => {
      const element = document.createElement(tag);
      element.className = kind;
      if (parent) parent.append(element);
      return element;
    };
    this.card = make("figure", "chart");
    const head = make("figcaption", "", this.card);
    make("b", "", head).textContent = this.spec.title;
    this.unitText = make("span", "unit", head);
    this.unitText.textContent = this.spec.unit;
    this.logButton = make("button", "small", head);
    this.logButton.type = "button";
    this.logButton.title = "Logarithmic or linear axis";
    this.logButton.addEventListener("click", () => {
      this.log = !this.log;
      this.draw();
    });
    this.wideButton = make("button", "small", head);
    this.wideButton.type = "button";
    this.wideButton.title = "Larger or smaller";
    this.wideButton.setAttribute("aria-label", "Larger or smaller");
    this.wideButton.textContent = "⤢";
    this.wideButton.addEventListener("click", () => {
      this.card.classList.toggle("large");
      this.draw();
    });
    this.area = make("div", "area", this.card);
    this.canvas = make("canvas", "", this.area);
    this.canvas.setAttribute("role", "img");
    this.cross = make("i", "cross", this.area);
    this.selection = make("i", "selection", this.area);
    this.legend = make("div", "legend", this.card);
    this.listen();
  }

  // Dragging zooms, a double click shows everything, moving shows values.
  listen() {
    const area = this.area;
    let from = null;
    const place = (event) => event.clientX - area.getBoundingClientRect().left;
    area.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      from = place(event);
      if (event.pointerType === "mouse") area.setPointerCapture(event.pointerId);
    });
    area.addEventListener("pointermove", (event) => {
      const x = place(event);
      if (from !== null && Math.abs(x - from) > 6) {
        const left = Math.max(PAD.left, Math.min(from, x));
        const right = Math.min(this.width - PAD.right, Math.max(from, x));
        this.selection.style.left = left + "px";
        this.selection.style.width = Math.max(0, right - left) + "px";
        this.selection.classList.add("on");
      }
      this.page.hover(this, this.dataAt(x), event);
    });
    const end = (event) => {
      this.selection.classList.remove("on");
      if (from === null) return;
      const x = place(event);
      const begin = from;
      from = null;
      if (Math.abs(x - begin) > 6) {
        const a = this.dataAt(Math.min(begin, x)), b = this.dataAt(Math.max(begin, x));
        if (b > a) this.page.zoomTo(a, b);
      } else {
        this.page.hover(this, this.dataAt(x), event);
      }
    };
    area.addEventListener("pointerup", end);
    area.addEventListener("pointercancel", () => {
      from = null;
      this.selection.classList.remove("on");
    });
    area.addEventListener("pointerleave", (event) => {
      if (event.pointerType === "mouse") this.page.leave();
    });
    area.addEventListener("dblclick", () => this.page.zoomTo(null, null));
  }

  dataAt(pixel) {
    const share = (pixel - PAD.left) / Math.max(1, this.width - PAD.left - PAD.right);
    return this.x0 + Math.min(1, Math.max(0, share)) * (this.x1 - this.x0);
  }

  showCross(x) {
    const at = this.px(x);
    const inside = x !== null && at >= PAD.left - 1 && at <= this.width - PAD.right + 1;
    this.cross.classList.toggle("on", inside);
    if (inside) this.cross.style.transform = `translateX(${at}px)`;
  }

  px(x) {
    return PAD.left + (x - this.x0) / (this.x1 - this.x0 || 1) * (this.width - PAD.left - PAD.right);
  }

  py(y) {
    const share = this.log
      ? (Math.log(y) - Math.log(this.y0)) / (Math.log(this.y1) - Math.log(this.y0) || 1)
      : (y - this.y0) / (this.y1 - this.y0 || 1);
    return this.height - PAD.bottom - share * (this.height - PAD.bottom - PAD.top);
  }

  shown() {
    return this.series.filter((series) => !this.hidden.has(series.label));
  }

  // The vertical range of what is in the horizontal one: nothing in it is cut off.
  findRange() {
    let low = Infinity, high = -Infinity, leastPositive = Infinity;
    for (const {points, xs, xt} of this.shown()) {
      const look = (x, value) => {
        if (x < this.x0 || x > this.x1) return;
        if (value < low) low = value;
        if (value > high) high = value;
        if (value > 0 && value < leastPositive) leastPositive = value;
      };
      for (let k = 0; k < points.v.length; k++) {
        look(xs[k], points.v[k]);
        if (points.hi) look(xt[k], points.hi[k]);
      }
    }
    this.drawnLog = this.log && leastPositive < Infinity;
    if (!(high >= low)) { low = 0; high = 1; this.drawnLog = false; }
    const {scale} = this.spec;
    if (this.drawnLog) {
      low = leastPositive;
      high = Math.max(high, low);
      const room = Math.max(1.02, Math.pow(high / low, 0.05));
      this.y0 = low / room;
      this.y1 = high * room;
    } else {
      if (scale !== "log") { low = Math.min(0, low); high = Math.max(0, high); }
      if (low === high) high = low + (Math.abs(low) || 1);
      const room = 0.05 * (high - low);
      this.y0 = scale !== "log" && low === 0 ? 0 : low - room;
      this.y1 = high + room;
    }
  }

  draw() {
    const box = this.area.getBoundingClientRect();
    if (box.width < 40) return;
    this.width = box.width;
    this.height = box.height;
    const scale = window.devicePixelRatio || 1;
    this.canvas.width = Math.round(this.width * scale);
    this.canvas.height = Math.round(this.height * scale);
    const pen = this.canvas.getContext("2d");
    pen.setTransform(scale, 0, 0, scale, 0, 0);
    [this.x0, this.x1] = this.page.range();
    const wanted = this.log;
    this.findRange();
    this.log = this.drawnLog;
    this.logButton.textContent = wanted ? "log" : "lin";
    this.drawAxes(pen);
    pen.save();
    pen.beginPath();
    pen.rect(PAD.left, 0, this.width - PAD.left - PAD.right, this.height - PAD.bottom + 1);
    pen.clip();
    this.drawMarks(pen);
    for (const series of this.shown()) this.drawSeries(pen, series);
    pen.restore();
    this.log = wanted;
    this.drawnWith = {log: this.drawnLog};
  }

  drawAxes(pen) {
    const {colours} = this.page;
    const right = this.width - PAD.right, bottom = this.height - PAD.bottom;
    pen.font = "12px system-ui, -apple-system, 'Segoe UI', sans-serif";
    pen.lineWidth = 1;
    pen.textBaseline = "middle";
    pen.textAlign = "right";
    const rows = Math.max(2, Math.round((bottom - PAD.top) / 48));
    const ticks = this.log ? logTicks(this.y0, this.y1, rows) : linearTicks(this.y0, this.y1, rows);
    for (const tick of ticks) {
      const y = Math.round(this.py(tick)) + 0.5;
      pen.strokeStyle = colours.grid;
      pen.beginPath();
      pen.moveTo(PAD.left, y);
      pen.lineTo(right, y);
      pen.stroke();
      pen.fillStyle = colours.faint;
      pen.fillText(valueText(tick, this.spec.scale, 3), PAD.left - 7, y);
    }
    pen.textBaseline = "top";
    pen.textAlign = "center";
    const name = this.page.axisName();
    const columns = Math.max(2, Math.round((right - PAD.left) / 95));
    for (const tick of this.page.axisTicks(this.x0, this.x1, columns)) {
      const x = this.px(tick.at);
      if (x < PAD.left - 1 || x > right + 1) continue;
      pen.strokeStyle = colours.grid;
      pen.beginPath();
      pen.moveTo(Math.round(x) + 0.5, bottom);
      pen.lineTo(Math.round(x) + 0.5, bottom + 4);
      pen.stroke();
      pen.fillText(tick.text, x, bottom + 6);
    }
    pen.textAlign = "right";
    pen.fillText(name, right, bottom + 20);
    pen.strokeStyle = colours.faint;
    pen.beginPath();
    pen.moveTo(PAD.left, Math.round(bottom) + 0.5);
    pen.lineTo(right, Math.round(bottom) + 0.5);
    pen.stroke();
  }

  drawMarks(pen) {
    const bottom = this.height - PAD.bottom;
    for (const mark of this.page.marks()) {
      if (mark.x < this.x0 || mark.x > this.x1) continue;
      const x = Math.round(this.px(mark.x)) + 0.5;
      pen.strokeStyle = mark.colour;
      pen.fillStyle = mark.colour;
      if (mark.action === "clip") {
        pen.globalAlpha = 0.6;
        pen.fillRect(x - 0.5, bottom - 5, 1, 5);
        pen.globalAlpha = 1;
        continue;
      }
      pen.globalAlpha = 0.75;
      pen.lineWidth = 1;
      pen.setLineDash([3, 3]);
      pen.beginPath();
      pen.moveTo(x, PAD.top);
      pen.lineTo(x, bottom);
      pen.stroke();
      pen.setLineDash([]);
      pen.globalAlpha = 1;
      pen.beginPath();
      pen.moveTo(x - 5, 1);
      pen.lineTo(x + 5, 1);
      pen.lineTo(x, 10);
      pen.fill();
    }
  }

  // The raw curve through the smallest and the largest value of each bin, and the smoothed one.
  drawSeries(pen, series) {
    const {points, xs, xt} = series;
    const usable = (value) => !this.log || value > 0;
    const isDense = points.v.length > 60 && !series.dots;
    const share = isDense ? this.page.smoothing() : 0;
    const line = (count, x, y) => {
      pen.beginPath();
      let isUp = true;
      for (let k = 0; k < count; k++) {
        const value = y(k);
        if (!usable(value)) { isUp = true; continue; }
        const px = this.px(x(k)), py = this.py(value);
        if (isUp) pen.moveTo(px, py); else pen.lineTo(px, py);
        isUp = false;
      }
      pen.stroke();
    };
    pen.strokeStyle = series.colour;
    pen.lineJoin = "round";
    pen.setLineDash([]);
    if (points.hi) {
      pen.globalAlpha = 0.42 * series.alpha;
      pen.lineWidth = 1;
      const isFirst = (k) => points.s[k >> 1] <= points.t[k >> 1];
      const low = (k) => (k % 2 === 0) === isFirst(k);
      line(2 * points.v.length, (k) => low(k) ? xs[k >> 1] : xt[k >> 1],
        (k) => low(k) ? points.v[k >> 1] : points.hi[k >> 1]);
    } else {
      pen.globalAlpha = (share > 0 ? 0.42 : 1) * series.alpha;
      pen.lineWidth = share > 0 ? 1 : 1.75;
      if (!share) pen.setLineDash(series.dash);
      line(points.v.length, (k) => xs[k], (k) => points.v[k]);
    }
    pen.globalAlpha = series.alpha;
    pen.setLineDash(series.dash);
    if (share > 0 || points.hi) {
      pen.lineWidth = 2;
      const smooth = smoothed(points, share);
      series.smooth = share > 0 ? smooth : null;
      line(smooth.length, (k) => xs[k], (k) => smooth[k]);
    } else {
      series.smooth = null;
    }
    pen.setLineDash([]);
    pen.fillStyle = series.colour;
    if (!isDense && points.v.length <= 60) {
      for (let k = 0; k < points.v.length; k++) {
        if (!usable(points.v[k])) continue;
        pen.beginPath();
        pen.arc(this.px(xs[k]), this.py(points.v[k]), 2.6, 0, 7);
        pen.fill();
      }
    }
    // Values without a place on the axis stand at its upper end.
    pen.globalAlpha = 1;
    pen.font = "bold 13px system-ui, sans-serif";
    pen.textAlign = "center";
    pen.fillStyle = this.page.colours.stop;
    for (const x of series.bad) {
      if (x >= this.x0 && x <= this.x1) pen.fillText("✕", this.px(x), PAD.top);
    }
  }

  // The values at a place, one line a series.
  at(x) {
    const found = [];
    for (const series of this.shown()) {
      const {points, xs} = series;
      if (!xs.length) continue;
      let k = lastAtMost(xs, x);
      if (k < 0 || (k + 1 < xs.length && xs[k + 1] - x < x - xs[k])) k++;
      const near = Math.abs(this.px(xs[k]) - this.px(x));
      if (near > 40 && (points.v.length > 60 || xs[k] > x)) continue;
      let text = valueText(points.m ? points.m[k] : points.v[k], this.spec.scale);
      if (points.n && points.n[k] > 1) {
        text += ` (${valueText(points.v[k], this.spec.scale, 3)} … ${valueText(points.hi[k], this.spec.scale, 3)})`;
      }
      if (series.smooth) text += `, smooth ${valueText(series.smooth[k], this.spec.scale)}`;
      found.push({series, text, step: points.s[k]});
    }
    return found;
  }

  showLegend() {
    const wanted = this.series.map((series) => series.label + series.colour + series.alpha + series.dash).join("|") +
      [...this.hidden].join("|");
    if (wanted === this.legendOf) return;
    this.legendOf = wanted;
    this.legend.replaceChildren();
    if (this.series.length < 2) return;
    for (const series of this.series) {
      const item = document.createElement("button");
      item.type = "button";
      item.className = "key" + (this.hidden.has(series.label) ? " off" : "");
      item.setAttribute("aria-pressed", String(!this.hidden.has(series.label)));
      const swatch = document.createElement("i");
      swatch.style.background = series.colour;
      swatch.style.opacity = series.alpha;
      if (series.dash.length) swatch.className = "dashed";
      const text = document.createElement("span");
      text.textContent = series.label;
      item.append(swatch, text);
      item.addEventListener("click", () => {
        if (!this.hidden.delete(series.label)) this.hidden.add(series.label);
        this.showLegend();
        this.draw();
      });
      this.legend.append(item);
    }
  }
}
