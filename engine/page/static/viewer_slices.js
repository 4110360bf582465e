// Three linked planes from the server's own slices: for browsers without WebGL2, and for scans that are too large for it.
// A layer is an array z, y, x in LPS order; z runs to the head, y to the back, x to the patient's left.

import { t } from "/static/words.js";

const PLANES = [
  { axis: "axial", along: 0, rows: 1, columns: 2, flip: false, marks: ["R", "L"] },
  { axis: "coronal", along: 1, rows: 0, columns: 2, flip: true, marks: ["R", "L"] },
  { axis: "sagittal", along: 2, rows: 0, columns: 1, flip: true, marks: ["A", "P"] },
];
const KEPT = 240; // slices in memory
// Inferno, seven of its colours.
const HEAT = [[0, 0, 4], [51, 10, 95], [120, 28, 109], [187, 55, 84], [237, 105, 37], [252, 181, 25], [252, 255, 164]];
const LESION = [64, 224, 208];
const COLDEST = 64; // of 255: what is left black

export class SliceViewer {
  constructor(stage, scan, changed) {
    this.scan = scan;
    this.changed = changed;
    this.position = scan.shape.map((n) => n >> 1);
    this.window = [-1350, 150];
    this.drag = "crosshair";
    this.opacity = { lesions: 0.4, heat: 0.6 };
    this.layers = { lesions: null, heat: null };
    this.kept = new Map();
    this.grid = document.createElement("div");
    this.grid.className = "planes";
    this.planes = PLANES.map((plane) => this.build(plane));
    stage.append(this.grid);
    this.observer = new ResizeObserver(() => this.draw());
    this.observer.observe(this.grid);
  }

  build(plane) {
    const box = Object.assign(document.createElement("div"), { className: "plane" });
    const canvas = document.createElement("canvas");
    canvas.tabIndex = 0;
    canvas.setAttribute("role", "img");
    const name = Object.assign(document.createElement("span"), { className: "name" });
    const slider = document.createElement("input");
    Object.assign(slider, { type: "range", min: 0, max: this.scan.shape[plane.along] - 1, step: 1 });
    slider.addEventListener("input", () => this.move(plane.along, Number(slider.value)));
    box.append(canvas, name, slider);
    plane.marks.forEach((mark, k) => box.append(Object.assign(document.createElement("span"), { className: `mark ${k ? "second" : "first"}`, textContent: mark })));
    this.grid.append(box);
    const built = { ...plane, box, canvas, name, slider, zoom: 1, shift: [0, 0], image: document.createElement("canvas") };
    this.listen(built);
    return built;
  }

  listen(plane) {
    const { canvas } = plane;
    const fingers = new Map();
    let button = 0;
    let spread = 0;
    canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      if (event.ctrlKey || event.metaKey) this.zoomBy(event.deltaY < 0 ? 1.15 : 1 / 1.15, plane);
      else this.move(plane.along, this.position[plane.along] + (event.deltaY < 0 ? 1 : -1));
    }, { passive: false });
    canvas.addEventListener("contextmenu", (event) => event.preventDefault());
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      fingers.set(event.pointerId, [event.clientX, event.clientY]);
      button = event.button;
      if (fingers.size === 1 && button === 0 && this.drag === "crosshair") this.pick(plane, event);
    });
    canvas.addEventListener("pointermove", (event) => {
      const before = fingers.get(event.pointerId);
      if (!before) return;
      const [dx, dy] = [event.clientX - before[0], event.clientY - before[1]];
      fingers.set(event.pointerId, [event.clientX, event.clientY]);
      if (fingers.size === 2) {
        const [a, b] = [...fingers.values()];
        const now = Math.hypot(a[0] - b[0], a[1] - b[1]);
        if (spread) this.zoomBy(now / spread, plane);
        spread = now;
        return;
      }
      const mode = button === 2 ? "window" : button === 1 ? "pan" : this.drag;
      if (mode === "window") {
        const [low, high] = this.window;
        const width = Math.max(2, high - low + 4 * dx);
        const level = (low + high) / 2 + 2 * dy;
        this.setWindow(level - width / 2, level + width / 2);
      } else if (mode === "pan") {
        plane.shift = [plane.shift[0] + dx, plane.shift[1] + dy];
        this.paint(plane);
      } else this.pick(plane, event);
    });
    const lift = (event) => { fingers.delete(event.pointerId); spread = 0; };
    canvas.addEventListener("pointerup", lift);
    canvas.addEventListener("pointercancel", lift);
    canvas.addEventListener("keydown", (event) => {
      const steps = { ArrowUp: 1, ArrowRight: 1, ArrowDown: -1, ArrowLeft: -1, PageUp: 10, PageDown: -10 };
      if (event.key in steps) this.move(plane.along, this.position[plane.along] + steps[event.key]);
      else if (event.key === "+" || event.key === "=") this.zoomBy(1.15, plane);
      else if (event.key === "-") this.zoomBy(1 / 1.15, plane);
      else if (event.key === "Home") this.move(plane.along, 0);
      else if (event.key === "End") this.move(plane.along, this.scan.shape[plane.along] - 1);
      else return;
      event.preventDefault();
    });
  }

  // ---------------------------------------------------------------- what the page asks for

  setWindow(low, high) {
    this.window = [low, high];
    this.draw();
    this.changed({ window: this.window });
  }

  setPosition(position) {
    this.position = position.map((value, axis) => Math.max(0, Math.min(this.scan.shape[axis] - 1, Math.round(value))));
    this.draw();
    this.changed({ position: this.position });
  }

  setLayer(kind, name) {
    this.layers[kind] = name;
    this.draw();
  }

  setOpacity(kind, value) {
    this.opacity[kind] = value;
    this.draw();
  }

  setDrag(mode) { this.drag = mode; }

  zoomBy(factor, plane = null) {
    for (const one of plane ? [plane] : this.planes) one.zoom = Math.max(1, Math.min(12, one.zoom * factor));
    this.draw();
  }

  reset() {
    for (const plane of this.planes) Object.assign(plane, { zoom: 1, shift: [0, 0] });
    this.draw();
  }

  destroy() {
    this.observer.disconnect();
    this.grid.remove();
  }

  // ---------------------------------------------------------------- drawing

  move(axis, index) {
    const position = [...this.position];
    position[axis] = index;
    this.setPosition(position);
  }

  async slice(layer, plane, index) {
    const key = `${layer}/${plane.axis}/${index}`;
    let found = this.kept.get(key);
    if (!found) {
      found = fetch(`/api/cases/${this.scan.id}/slices/${key}`).then(async (answer) => {
        if (!answer.ok) throw new Error(`slice ${answer.status}`);
        const bytes = await answer.arrayBuffer();
        return layer === "ct" ? new Int16Array(bytes) : new Uint8Array(bytes);
      });
      found.catch(() => this.kept.delete(key));
      this.kept.set(key, found);
      if (this.kept.size > KEPT) this.kept.delete(this.kept.keys().next().value);
    }
    return found;
  }

  draw() {
    for (const plane of this.planes) this.drawPlane(plane);
  }

  async drawPlane(plane) {
    const index = this.position[plane.along];
    plane.slider.value = index;
    plane.slider.setAttribute("aria-label", t(plane.axis));
    const all = this.scan.shape[plane.along];
    plane.name.textContent = `${t(plane.axis)} · ${t("slice", { n: index + 1, all })}`;
    plane.canvas.setAttribute("aria-label", plane.name.textContent);
    const job = (plane.job = (plane.job ?? 0) + 1);
    const names = ["ct", this.layers.lesions, this.layers.heat];
    let parts;
    try {
      parts = await Promise.all(names.map((name) => name && this.slice(name, plane, index)));
    } catch {
      return; // the connection is lost: the page says so
    }
    if (job !== plane.job) return; // the user has moved on
    this.render(plane, ...parts);
    this.paint(plane);
    if (plane.along === 2) this.changed({ value: this.valueHere() });
    for (const next of [index - 1, index + 1]) if (next >= 0 && next < all) this.slice("ct", plane, next).catch(() => {});
  }

  async valueHere() {
    const plane = this.planes[0];
    const [z, y, x] = this.position;
    return (await this.slice("ct", plane, z))[y * this.scan.shape[2] + x];
  }

  render(plane, hu, lesions, heat) {
    const [height, width] = [this.scan.shape[plane.rows], this.scan.shape[plane.columns]];
    Object.assign(plane.image, { width, height });
    const context = plane.image.getContext("2d");
    const image = context.createImageData(width, height);
    const [low, high] = this.window;
    const scale = 255 / Math.max(1, high - low);
    const pixels = new Uint32Array(image.data.buffer);
    for (let row = 0; row < height; row += 1) {
      const from = (plane.flip ? height - 1 - row : row) * width;
      for (let column = 0; column < width; column += 1) {
        const at = from + column;
        const grey = Math.max(0, Math.min(255, (hu[at] - low) * scale)) | 0;
        const hot = heat ? heat[at] : 0;
        const lesion = lesions ? lesions[at] : 0;
        if (hot <= COLDEST && !lesion) {
          pixels[row * width + column] = 0xff000000 | (grey << 16) | (grey << 8) | grey;
          continue;
        }
        let colour = [grey, grey, grey];
        if (hot > COLDEST) colour = mix(colour, heatColour(hot), this.opacity.heat * Math.min(1, (hot - COLDEST) / 90));
        if (lesion) {
          const edge = !lesions[at - 1] || !lesions[at + 1] || !lesions[at - width] || !lesions[at + width];
          colour = mix(colour, LESION, Math.min(1, this.opacity.lesions * (edge ? 2.2 : 0.6)));
        }
        image.data.set([...colour, 255], 4 * (row * width + column));
      }
    }
    context.putImageData(image, 0, 0);
  }

  /** Where the plane's image lies on its canvas, in CSS pixels. */
  frame(plane) {
    const { width, height } = plane.canvas.getBoundingClientRect();
    const [rows, columns] = [this.scan.shape[plane.rows], this.scan.shape[plane.columns]];
    const [high, wide] = [rows * this.scan.spacing[plane.rows], columns * this.scan.spacing[plane.columns]];
    const scale = Math.min(width / wide, height / high) * plane.zoom;
    const size = [wide * scale, high * scale];
    return { left: (width - size[0]) / 2 + plane.shift[0], top: (height - size[1]) / 2 + plane.shift[1], size, rows, columns, width, height };
  }

  paint(plane) {
    const frame = this.frame(plane);
    if (!frame.width || !plane.image.width) return;
    const ratio = window.devicePixelRatio || 1;
    const [wide, high] = [Math.round(frame.width * ratio), Math.round(frame.height * ratio)];
    if (plane.canvas.width !== wide || plane.canvas.height !== high) Object.assign(plane.canvas, { width: wide, height: high });
    const context = plane.canvas.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, frame.width, frame.height);
    context.imageSmoothingQuality = "high";
    context.drawImage(plane.image, frame.left, frame.top, ...frame.size);
    const row = this.position[plane.rows];
    const x = frame.left + ((this.position[plane.columns] + 0.5) / frame.columns) * frame.size[0];
    const y = frame.top + (((plane.flip ? frame.rows - 1 - row : row) + 0.5) / frame.rows) * frame.size[1];
    context.strokeStyle = "#ffd66b99";
    context.lineWidth = 1;
    context.beginPath();
    for (const [ax, ay, bx, by] of [[0, y, x - 9, y], [x + 9, y, frame.width, y], [x, 0, x, y - 9], [x, y + 9, x, frame.height]]) {
      context.moveTo(ax, ay);
      context.lineTo(bx, by);
    }
    context.stroke();
  }

  pick(plane, event) {
    const frame = this.frame(plane);
    const box = plane.canvas.getBoundingClientRect();
    const column = Math.floor(((event.clientX - box.left - frame.left) / frame.size[0]) * frame.columns);
    const row = Math.floor(((event.clientY - box.top - frame.top) / frame.size[1]) * frame.rows);
    const position = [...this.position];
    position[plane.columns] = column;
    position[plane.rows] = plane.flip ? frame.rows - 1 - row : row;
    this.setPosition(position);
  }
}

function mix(below, above, weight) {
  return below.map((value, k) => value + (above[k] - value) * weight);
}

function heatColour(value) {
  const at = (value / 255) * (HEAT.length - 1);
  const low = Math.min(HEAT.length - 2, Math.floor(at));
  return mix(HEAT[low], HEAT[low + 1], at - low);
}
