// NiiVue as the page's viewer, with the interface of viewer_slices.js.

const DRAGS = { crosshair: 8, window: 9, pan: 3 };
const MOST_VOXELS = 250e6; // beyond it a browser's graphics memory is full
const MOST_WITHOUT_GPU = 10e6; // where the processor draws: a larger scan loads for a minute
let module = null;

/** Whether this browser can show a scan of this shape. */
export function fits(shape) {
  const gl = document.createElement("canvas").getContext("webgl2");
  if (!gl) return false;
  const renderer = gl.getParameter(gl.getExtension("WEBGL_debug_renderer_info")?.UNMASKED_RENDERER_WEBGL ?? gl.RENDERER);
  const most = /swiftshader|llvmpipe|software|basic render/i.test(renderer) ? MOST_WITHOUT_GPU : MOST_VOXELS;
  gl.getExtension("WEBGL_lose_context")?.loseContext();
  return shape.reduce((a, b) => a * b) <= most;
}

export class NiivueViewer {
  static async create(stage, scan, changed) {
    module ??= await import("/niivue.js");
    const viewer = new NiivueViewer(scan, changed);
    await viewer.load(stage);
    return viewer;
  }

  constructor(scan, changed) {
    this.scan = scan;
    this.changed = changed;
    this.window = [-1350, 150];
    this.opacity = { lesions: 0.4, heat: 0.6 };
    this.shown = {}; // kind → NVImage
    this.inverse = invert(scan.affine);
    this.busy = Promise.resolve();
  }

  async load(stage) {
    this.canvas = document.createElement("canvas");
    this.canvas.tabIndex = 0;
    this.canvas.className = "loading";
    stage.append(this.canvas);
    this.nv = new module.Niivue({
      dragAndDropEnabled: false, isRadiologicalConvention: true, multiplanarShowRender: 0, sliceType: 3, logLevel: "error",
      backColor: [0, 0, 0, 1], crosshairColor: [1, 0.84, 0.42, 0.7], fontColor: [1, 0.84, 0.42, 1], dragMode: DRAGS.window,
      dragModePrimary: DRAGS.crosshair, loadingText: "", multiplanarPadPixels: 2, crosshairGap: 9, crosshairWidthUnit: "mm", sagittalNoseLeft: true,
    });
    await this.nv.attachToCanvas(this.canvas);
    this.nv.onLocationChange = (place) => this.moved(place);
    this.nv.onIntensityChange = (volume) => {
      if (volume.id !== this.nv.volumes[0]?.id) return;
      this.window = [volume.cal_min, volume.cal_max];
      this.changed({ window: this.window });
    };
    await this.nv.loadVolumes([{ url: this.url("ct"), name: "ct.nii", colormap: "gray", cal_min: this.window[0], cal_max: this.window[1] }]);
    this.canvas.addEventListener("keydown", (event) => {
      const steps = { ArrowUp: 1, ArrowDown: -1, PageUp: 10, PageDown: -10 };
      if (!(event.key in steps)) return;
      event.preventDefault();
      event.stopPropagation();
      this.setPosition([this.position[0] + steps[event.key], this.position[1], this.position[2]]);
    }, true);
    this.arrange = () => this.nv.setCustomLayout(this.canvas.clientWidth > this.canvas.clientHeight
      ? [{ sliceType: 0, position: [0, 0, 0.64, 1] }, { sliceType: 1, position: [0.64, 0, 0.36, 0.5] }, { sliceType: 2, position: [0.64, 0.5, 0.36, 0.5] }]
      : [{ sliceType: 0, position: [0, 0, 1, 0.62] }, { sliceType: 1, position: [0, 0.62, 0.5, 0.38] }, { sliceType: 2, position: [0.5, 0.62, 0.5, 0.38] }]);
    this.arrange();
    window.addEventListener("resize", this.arrange);
    this.setPosition(this.scan.shape.map((n) => n >> 1));
  }

  reveal() { this.canvas.className = ""; }

  url(layer) { return `/api/cases/${this.scan.id}/volumes/${layer}.nii`; }

  moved(place) {
    const [x, y, z] = apply(this.inverse, place.mm);
    this.position = [z, y, x].map((value, axis) => Math.max(0, Math.min(this.scan.shape[axis] - 1, Math.round(value))));
    this.changed({ position: this.position, value: place.values?.[0]?.value });
  }

  setWindow(low, high) {
    this.window = [low, high];
    const [volume] = this.nv.volumes;
    if (!volume) return;
    Object.assign(volume, { cal_min: low, cal_max: high });
    this.nv.updateGLVolume();
    this.changed({ window: this.window });
  }

  setPosition(position) {
    const [z, y, x] = position.map((value, axis) => Math.max(0, Math.min(this.scan.shape[axis] - 1, Math.round(value))));
    this.position = [z, y, x];
    this.nv.scene.crosshairPos = this.nv.mm2frac(apply(this.scan.affine, [x, y, z]));
    this.nv.drawScene();
    this.nv.createOnLocationChange?.();
    this.changed({ position: this.position });
  }

  /** One layer after the other: NiiVue numbers its volumes. */
  setLayer(kind, name) {
    this.busy = this.busy.then(async () => {
      if (this.shown[kind]) this.nv.removeVolume(this.shown[kind]);
      this.shown[kind] = null;
      if (!name) return;
      const heat = kind === "heat";
      const image = await module.NVImage.loadFromUrl({
        url: this.url(name), name: `${name}.nii`, colormap: heat ? "warm" : "green2cyan", opacity: this.opacity[kind],
        cal_min: heat ? 64 : 0.5, cal_max: heat ? 255 : 1,
      });
      this.nv.addVolume(image);
      this.shown[kind] = image;
      this.setPosition(this.position);
    }).catch((error) => console.warn(error));
    return this.busy;
  }

  setOpacity(kind, value) {
    this.opacity[kind] = value;
    const at = this.nv.volumes.indexOf(this.shown[kind]);
    if (at > 0) this.nv.setOpacity(at, value);
  }

  setDrag(mode) { this.nv.opts.dragModePrimary = DRAGS[mode]; }

  zoomBy(factor) {
    const pan = this.nv.scene.pan2Dxyzmm;
    pan[3] = Math.max(1, Math.min(12, pan[3] * factor));
    this.nv.drawScene();
  }

  reset() {
    this.nv.scene.pan2Dxyzmm = [0, 0, 0, 1];
    this.nv.drawScene();
  }

  destroy() {
    window.removeEventListener("resize", this.arrange);
    this.nv.cleanup?.();
    this.canvas.remove();
    const { gl } = this.nv;
    this.busy.finally(() => setTimeout(() => gl?.getExtension("WEBGL_lose_context")?.loseContext(), 5000));
  }
}

function apply(matrix, [x, y, z]) {
  return matrix.slice(0, 3).map((row) => row[0] * x + row[1] * y + row[2] * z + row[3]);
}

/** Inverse of an affine 4 × 4 matrix, by cofactors of its 3 × 3 part. */
function invert(m) {
  const at = (r, c) => m[r % 3][c % 3];
  const cofactor = (r, c) => at(r + 1, c + 1) * at(r + 2, c + 2) - at(r + 1, c + 2) * at(r + 2, c + 1);
  const determinant = [0, 1, 2].reduce((sum, c) => sum + m[0][c] * cofactor(0, c), 0);
  const rows = [0, 1, 2].map((r) => [0, 1, 2].map((c) => cofactor(c, r) / determinant));
  return [...rows.map((row) => [...row, -(row[0] * m[0][3] + row[1] * m[1][3] + row[2] * m[2][3])]), [0, 0, 0, 1]];
}
