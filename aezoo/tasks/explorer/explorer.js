// The page of `aezoo explore`: encoders and decoders run here by ONNX Runtime Web. See aezoo/tasks/explore.py, which
// writes manifest.json and the files that it names. Text of the manifest only ever becomes text of the page.
//
// Pixels are shares of white, 0 to 1, channels first; a code is a vector of all its numbers.

import * as ort from "./runtime/ort.wasm.bundle.min.mjs";

ort.env.wasm.numThreads = 1; // more would need headers of the host
ort.env.wasm.wasmPaths = { wasm: new URL("runtime/ort-wasm-simd-threaded.wasm", import.meta.url).href };
ort.env.logLevel = "error";

const TOLERANCE = 1e-4; // relative to the largest number, or to 1
const MOST_CARDS = 3, MOST_SLIDERS = 16, MOST_BARS = 128, NEIGHBOURS = 5, GRID = 11;
const COLOURS = ["#4e79a7", "#f28e2b", "#e15759", "#76b7b2", "#59a14f", "#edc948", "#b07aa1", "#ff9da7", "#9c755f", "#8f8f8f"];
const byId = id => document.getElementById(id);
const rounded = x => Number(x.toPrecision(4)).toString();

// ---- files -----------------------------------------------------------------------------------------------------------

async function read(path) {
  const answer = await fetch(new URL(path, import.meta.url));
  if (!answer.ok) throw new Error(`${path} is missing (${answer.status})`);
  return answer.arrayBuffer();
}

const floats = async path => new Float32Array(await read(path));

/** The images of a file of bytes, one after the other, as shares of white. */
async function images(part) {
  if (!part) return [];
  const all = new Uint8Array(await read(part.file));
  return Array.from({ length: part.n }, (_, i) => Float32Array.from(all.subarray(i * SIZE, (i + 1) * SIZE), b => b / 255));
}

const manifest = await read("manifest.json").then(bytes => JSON.parse(new TextDecoder().decode(bytes))).catch(error => {
  report(error);
  throw error;
});
const [CHANNELS, HEIGHT, WIDTH] = manifest.shape;
const SIZE = CHANNELS * HEIGHT * WIDTH;

const sets = manifest.sets.map(set => {
  let found;
  const load = async () => ({ ...set, test: await images(set.test), train: await images(set.train) });
  return { name: set.name, load: () => (found ??= load()) };
});

// ---- drawing ---------------------------------------------------------------------------------------------------------

function draw(canvas, pixels, colour) {
  canvas.width = WIDTH;
  canvas.height = HEIGHT;
  const image = new ImageData(WIDTH, HEIGHT), places = HEIGHT * WIDTH;
  for (let i = 0; i < places; i++) {
    const rgb = colour ? colour(pixels[i]) : [0, 1, 2].map(c => 255 * pixels[(CHANNELS === 3 ? c : 0) * places + i]);
    image.data.set([...rgb, 255], 4 * i); // which clamps and rounds
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
}

/** Black, purple, orange, yellow for 0 to 1, as the legend has it. */
function heat(x) {
  const stops = [[0, 0, 0], [120, 28, 109], [237, 105, 37], [252, 255, 164]];
  const place = Math.min(Math.max(x, 0), 1) * 3, k = Math.min(Math.floor(place), 2);
  return stops[k].map((low, c) => low + (place - k) * (stops[k + 1][c] - low));
}

/** A canvas of as many pixels as it covers on the screen; its context counts in CSS pixels. */
function sharp(canvas) {
  const { width, height } = canvas.getBoundingClientRect(), ratio = devicePixelRatio || 1;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  return [context, width, height];
}

const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function thumbnail(pixels, caption) {
  const figure = document.createElement("figure"), canvas = document.createElement("canvas");
  canvas.className = "picture";
  draw(canvas, pixels);
  figure.append(canvas);
  const text = document.createElement("figcaption");
  text.textContent = caption;
  figure.append(text);
  return figure;
}

// ---- running ---------------------------------------------------------------------------------------------------------

let queue = Promise.resolve();

/** One run at a time. */
function infer(session, values, type, shape) {
  const given = { [session.inputNames[0]]: new ort.Tensor(type, values, shape) };
  const found = queue.then(() => session.run(given));
  queue = found.catch(() => {});
  return found;
}

/** Calls that come while one is running become one call after it. */
function latest(run) {
  let running = false, again = false;
  const call = async () => {
    again = true;
    if (running) return;
    running = true;
    try {
      while (again) {
        again = false;
        await run();
      }
    } catch (error) {
      report(error);
    } finally {
      running = false;
    }
  };
  call.isIdle = () => !running;
  return call;
}

function report(error) {
  const status = byId("status");
  status.hidden = false;
  status.className = "bad";
  status.textContent = `Something went wrong: ${error.message ?? error}`;
  console.error(error);
}

const ARRAYS = { uint8: Uint8Array, float32: Float32Array, float64: Float64Array };

/** A model's graphs, and what the page knows of its codes. */
class Model {
  constructor(about) {
    Object.assign(this, about);
    this.size = about.code_shape.reduce((a, b) => a * b, 1);
  }

  async load() {
    const open = name => ort.InferenceSession.create(new URL(`${this.folder}/${name}.onnx`, import.meta.url).href);
    this.encoder = await open("encode");
    this.decoder = await open("decode");
    this.scorer = this.score ? await open("score") : null;
    const codes = this.n_codes ? await floats(`${this.folder}/codes.bin`) : new Float32Array(0);
    this.codes = Array.from({ length: this.n_codes }, (_, i) => codes.subarray(i * this.size, (i + 1) * this.size));
    this.data = this.set === null ? null : await sets[this.set].load();
    this.train = this.data && this.codes_are_of_set ? this.data.train : [];
    if (this.n_codes) this.summarise(await floats(`${this.folder}/axes.bin`));
    this.difference = await this.verify();
    return this;
  }

  summarise(axes) {
    const n = this.n_codes, size = this.size;
    this.mean = new Float32Array(size);
    this.codes.forEach(code => code.forEach((value, d) => (this.mean[d] += value / n)));
    this.low = new Float32Array(size);
    this.high = new Float32Array(size);
    const variance = new Float64Array(size), column = new Float32Array(n);
    for (let d = 0; d < size; d++) {
      this.codes.forEach((code, i) => {
        column[i] = code[d];
        variance[d] += (code[d] - this.mean[d]) ** 2 / n;
      });
      [this.low[d], this.high[d]] = limits(column);
    }
    this.order = [...variance.keys()].sort((a, b) => variance[b] - variance[a]);
    this.start = this.codes[nearest(this.codes, this.mean, 1)[0].index];
    const unit = d => Float32Array.from({ length: size }, (_, i) => Number(i === d));
    this.axes = this.order.slice(0, 32).map(d => ({ name: `z${d}`, vector: unit(d), origin: 0 }));
    if (size > 2) {
      const principal = [0, 1].map(k => {
        const vector = axes.subarray(k * size, (k + 1) * size);
        return { name: `principal axis ${k + 1}`, vector, origin: dot(vector, this.mean) };
      });
      this.axes = [...principal, ...this.axes];
    } else this.axes.sort((a, b) => a.name.localeCompare(b.name));
  }

  /** Pixels as those of the training data. */
  prepare(pixels) {
    return this.is_binary ? pixels.map(x => Number(x > 0.5)) : pixels;
  }

  /** The code, the reconstruction and the score of pixels. */
  async all(pixels) {
    const shape = [1, ...manifest.shape];
    const values = ARRAYS[this.dtype].from(pixels, x => (this.dtype === "uint8" ? Math.round(255 * x) : x * this.white));
    const z = Float32Array.from((await infer(this.encoder, values, this.dtype, shape)).z.data);
    const found = { z, x_hat: (await this.decode([z]))[0], score: null };
    if (this.scorer) {
      const outputs = await infer(this.scorer, values, this.dtype, shape);
      found.score = Number(outputs.score.data[0]);
      found.isAnomaly = this.threshold === null ? null : Boolean(outputs.is_anomaly.data[0]);
    }
    return found;
  }

  /** Codes to pixels. */
  async decode(codes) {
    const given = new Float32Array(codes.length * this.size);
    codes.forEach((z, i) => given.set(z, i * this.size));
    const { x_hat } = await infer(this.decoder, given, "float32", [codes.length, ...this.code_shape]);
    return codes.map((_, i) => Float32Array.from(x_hat.data.subarray(i * SIZE, (i + 1) * SIZE), x => x / this.white));
  }

  /** The largest difference from the Python model for the inputs that came with it. */
  async verify() {
    const inputs = await images(manifest.check), wanted = await floats(`${this.folder}/check.bin`);
    const length = wanted.length / inputs.length;
    let worst = 0;
    for (const [i, pixels] of inputs.entries()) {
      const found = await this.all(pixels), row = wanted.subarray(i * length, (i + 1) * length);
      const parts = [[found.z, row.subarray(0, this.size)], [found.x_hat, row.subarray(this.size, this.size + SIZE)]];
      if (this.scorer) parts.push([[found.score], row.subarray(this.size + SIZE)]);
      for (const [values, expected] of parts) {
        const largest = expected.reduce((most, x) => Math.max(most, Math.abs(x)), 1);
        expected.forEach((x, k) => {
          const off = Math.abs(values[k] - x) / largest;
          worst = off <= worst ? worst : off; // NaN is worse
        });
      }
    }
    return worst;
  }
}

const dot = (a, b) => a.reduce((sum, x, i) => sum + x * b[i], 0);

function limits(values) {
  const sorted = Float32Array.from(values).sort(), last = sorted.length - 1;
  const low = sorted[Math.floor(0.01 * last)], high = sorted[Math.ceil(0.99 * last)];
  const middle = (low + high) / 2, half = Math.max((high - low) / 2, 1e-3) * 1.1;
  return [middle - half, middle + half];
}

function nearest(codes, z, k) {
  const all = codes.map((code, index) => {
    let sum = 0;
    for (let d = 0; d < z.length; d++) sum += (code[d] - z[d]) ** 2;
    return { index, distance: Math.sqrt(sum) };
  });
  return all.sort((a, b) => a.distance - b.distance).slice(0, k);
}

const loaded = new Map();

function model(index) {
  if (!loaded.has(index)) loaded.set(index, new Model(manifest.models[index]).load());
  return loaded.get(index);
}

// ---- the image -------------------------------------------------------------------------------------------------------

const input = { clean: new Float32Array(SIZE), pixels: new Float32Array(SIZE), sigma: 0, gaussian: gaussian(SIZE) };

function gaussian(n) {
  let seed = 1;
  const uniform = () => {
    // mulberry32
    seed = (seed + 0x6d2b79f5) | 0;
    let t = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
  return Float32Array.from({ length: n }, () => Math.sqrt(-2 * Math.log(1 - uniform())) * Math.cos(2 * Math.PI * uniform()));
}

function inputChanged() {
  // as a picture of bytes holds it
  const byte = x => Math.round(255 * Math.min(Math.max(x, 0), 1)) / 255;
  input.pixels = input.clean.map((x, i) => byte(x + input.sigma * input.gaussian[i]));
  draw(byId("canvas"), input.pixels);
  cards.forEach(card => card.inputChanged());
}

function setInput(pixels) {
  input.clean = Float32Array.from(pixels);
  document.querySelectorAll("#samples button").forEach(button => button.setAttribute("aria-pressed", "false"));
  inputChanged();
}

function setUpDrawing() {
  const canvas = byId("canvas"), radius = Math.max(HEIGHT / 20, 0.8);
  const brush = (x, y) => {
    for (let row = 0; row < HEIGHT; row++) {
      for (let column = 0; column < WIDTH; column++) {
        const ink = Math.min(Math.max(radius + 0.5 - Math.hypot(column + 0.5 - x, row + 0.5 - y), 0), 1);
        const place = row * WIDTH + column;
        input.clean[place] = Math.max(input.clean[place], ink);
      }
    }
  };
  let last = null;
  const move = event => {
    const box = canvas.getBoundingClientRect();
    const here = [((event.clientX - box.left) / box.width) * WIDTH, ((event.clientY - box.top) / box.height) * HEIGHT];
    const from = last ?? here, steps = Math.ceil(Math.hypot(here[0] - from[0], here[1] - from[1]) * 2) + 1;
    for (let k = 1; k <= steps; k++) brush(...here.map((to, axis) => from[axis] + ((to - from[axis]) * k) / steps));
    last = here;
    setInput(input.clean);
  };
  if (CHANNELS === 1) {
    canvas.addEventListener("pointerdown", event => {
      canvas.setPointerCapture(event.pointerId);
      last = null;
      move(event);
    });
    canvas.addEventListener("pointermove", event => canvas.hasPointerCapture(event.pointerId) && move(event));
  }
  byId("canvas-hint").textContent = CHANNELS === 1 ? "Draw here with the pointer, or drop an image." : "Drop an image here.";
  canvas.setAttribute("aria-label", "The image that the models are given");
  canvas.setAttribute("role", "img");
  byId("blank").addEventListener("click", () => setInput(new Float32Array(SIZE)));
}

/** An image file, fitted into the size of the samples. */
async function openImage(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    return report(new Error(`${file.name} is not an image that this browser can read`));
  }
  const surface = new OffscreenCanvas(WIDTH, HEIGHT), context = surface.getContext("2d");
  const scale = Math.min(WIDTH / bitmap.width, HEIGHT / bitmap.height);
  const size = [bitmap.width * scale, bitmap.height * scale];
  context.imageSmoothingQuality = "high";
  context.fillRect(0, 0, WIDTH, HEIGHT);
  const place = [(WIDTH - size[0]) / 2, (HEIGHT - size[1]) / 2];
  if (byId("invert").checked) context.filter = "invert(1)";
  context.drawImage(bitmap, ...place, ...size);
  const { data } = context.getImageData(0, 0, WIDTH, HEIGHT), places = HEIGHT * WIDTH;
  setInput(Float32Array.from({ length: SIZE }, (_, i) => {
    const at = 4 * (i % places);
    if (CHANNELS === 3) return data[at + Math.floor(i / places)] / 255;
    return (0.299 * data[at] + 0.587 * data[at + 1] + 0.114 * data[at + 2]) / 255;
  }));
}

function setUpFiles() {
  const canvas = byId("canvas");
  let file = null;
  const open = given => {
    file = given ?? file;
    if (file) openImage(file);
  };
  byId("file").addEventListener("change", event => open(event.target.files[0]));
  byId("invert").addEventListener("change", () => open());
  for (const kind of ["dragover", "dragleave", "drop"]) {
    canvas.addEventListener(kind, event => {
      event.preventDefault();
      canvas.classList.toggle("dropping", kind === "dragover");
      if (kind === "drop") open(event.dataTransfer.files[0]);
    });
  }
  byId("noise").addEventListener("input", event => {
    input.sigma = Number(event.target.value);
    byId("noise-value").textContent = event.target.value;
    inputChanged();
  });
}

async function showSamples(index) {
  const set = await sets[index].load();
  byId("set-note").textContent = set.note;
  byId("samples").replaceChildren(...set.test.map((pixels, i) => {
    const button = document.createElement("button"), canvas = document.createElement("canvas");
    const label = set.test_labels ? `, ${set.classes?.[set.test_labels[i]] ?? set.test_labels[i]}` : "";
    button.type = "button";
    button.setAttribute("aria-label", `sample ${i}${label}`);
    button.setAttribute("aria-pressed", "false");
    canvas.className = "picture";
    draw(canvas, pixels);
    button.append(canvas);
    button.addEventListener("click", () => {
      setInput(pixels);
      button.setAttribute("aria-pressed", "true");
    });
    return button;
  }));
}

async function setUpSamples(first) {
  const shown = manifest.sets.flatMap((set, i) => (set.test ? [i] : []));
  byId("samples-part").hidden = !shown.length;
  const select = byId("set");
  select.append(...shown.map(i => new Option(sets[i].name, i)));
  select.disabled = shown.length < 2;
  select.addEventListener("change", () => showSamples(Number(select.value)).catch(report));
  if (!shown.length) return;
  select.value = shown.includes(first) ? first : shown[0];
  await showSamples(Number(select.value));
}

// ---- a model's card --------------------------------------------------------------------------------------------------

let cards = [];

class Card {
  constructor(loadedModel) {
    this.model = loadedModel;
    this.element = byId("card").content.cloneNode(true).firstElementChild;
    this.parts = Object.fromEntries([...this.element.querySelectorAll("[data-part]")].map(e => [e.dataset.part, e]));
    this.inputChanged = latest(() => this.showInput());
    this.codeChanged = latest(() => this.showCode());
    this.gridChanged = latest(() => this.showGrid());
    this.introduce();
    if (loadedModel.n_codes && !loadedModel.no_plane) this.setUpWalk();
    else {
      this.parts.walk.hidden = true;
      this.parts["no-plane"].hidden = false;
      this.parts["no-plane"].textContent = loadedModel.no_plane;
    }
  }

  introduce() {
    const { model: m, parts } = this;
    parts.title.textContent = m.label;
    const shape = m.code_shape.length > 1 ? ` (${m.code_shape.join(" × ")})` : "";
    parts.about.textContent = `${m.model}: ${SIZE} numbers to a code of ${m.size}${shape} and back.`;
    const good = m.difference <= TOLERANCE;
    parts.verified.className = good ? "hint" : "bad";
    const off = `largest difference ${m.difference.toExponential(1)} of the largest number, for ${manifest.check.n} inputs`;
    parts.verified.textContent = good
      ? `✓ Checked here: the numbers equal those of the Python model (${off}).`
      : `Do not trust this card: its numbers are not those of the Python model (${off}).`;
    parts.calibration.textContent = m.calibration ? `Threshold: ${m.calibration}.` : "";
  }

  // -- the image

  async showInput() {
    const { model: m, parts } = this, given = m.prepare(input.pixels), clean = m.prepare(input.clean), noisy = input.sigma > 0;
    const { z, x_hat, score, isAnomaly } = await m.all(given);
    Object.assign(this, { zOfInput: z, x_hat, score, isAnomaly });
    draw(parts.given, given);
    draw(parts.output, x_hat);
    const places = HEIGHT * WIDTH, error = new Float32Array(places), of = noisy ? clean : given;
    x_hat.forEach((x, i) => (error[i % places] += Math.abs(x - of[i]) / CHANNELS));
    // one scale for all cards, so that they can be compared
    this.largestError = error.reduce((a, b) => Math.max(a, b), 0);
    const most = Math.max(0.1, ...cards.map(card => card.largestError ?? 0));
    draw(parts.error, error.map(x => x / most), heat);
    parts.scale.textContent = `0 to ${most.toFixed(2)}`;
    if (this.errorScale !== most) {
      this.errorScale = most;
      cards.forEach(card => card.errorScale && card.errorScale !== most && card.inputChanged());
    }
    const mse = (a, b) => a.reduce((sum, x, i) => sum + (x - b[i]) ** 2, 0) / SIZE;
    parts["given-caption"].textContent = `${noisy ? "With noise" : "Image"}${m.is_binary ? ", black or white" : ""}`;
    parts["output-caption"].textContent = noisy ? "Cleaned by the model" : "Reconstruction";
    parts.errors.textContent = noisy
      ? `Mean squared error to the image without noise: ${mse(given, clean).toFixed(4)} before, ${mse(x_hat, clean).toFixed(4)} after the model.`
      : `Mean squared error ${mse(x_hat, given).toFixed(4)}.`;
    this.showScore();
    this.showBars(z);
    this.showNearest(parts.nearest, z);
    this.drawPlane();
  }

  showScore() {
    const { model: m, parts, score, isAnomaly } = this;
    parts.meter.hidden = score === null || m.threshold === null;
    if (score === null) {
      parts.score.textContent = m.no_score;
      return;
    }
    const text = `Anomaly score ${rounded(score)} (${m.score})`;
    if (m.threshold === null) {
      parts.score.textContent = `${text}; no threshold, since there were no held-out samples to calibrate it on.`;
      return;
    }
    parts.score.className = isAnomaly ? "bad" : "good";
    parts.score.textContent = isAnomaly
      ? `${text}, above the threshold of ${rounded(m.threshold)}: unusual, it would be flagged.`
      : `${text}, not above the threshold of ${rounded(m.threshold)}: nothing unusual.`;
    parts.meter.classList.toggle("above", isAnomaly);
    // half of the width is the threshold; scores may be negative
    const share = m.threshold > 0 ? score / (2 * m.threshold) : 0.5 + (score - m.threshold) / (4 * Math.abs(m.threshold) + 1e-9);
    parts.meter.firstElementChild.style.width = `${100 * Math.min(Math.max(share, 0), 1)}%`;
  }

  showBars(z) {
    const { model: m, parts } = this;
    const shown = z.length <= MOST_BARS ? [...z.keys()] : (m.order ?? [...z.keys()]).slice(0, MOST_BARS).sort((a, b) => a - b);
    const [context, width, height] = sharp(parts.bars), values = shown.map(d => z[d]);
    const top = Math.max(0, ...values), bottom = Math.min(0, ...values), range = top - bottom || 1;
    const y = value => 4 + ((top - value) / range) * (height - 8), step = width / shown.length;
    context.fillStyle = css("--accent");
    values.forEach((value, k) => {
      context.fillRect(k * step, Math.min(y(0), y(value)), Math.max(step - (step > 3 ? 1 : 0), 0.5), Math.max(Math.abs(y(value) - y(0)), 0.5));
    });
    context.fillStyle = css("--soft");
    context.fillRect(0, y(0), width, 1);
    const which = shown.length < z.length ? `the ${shown.length} of ${z.length} numbers that vary most` : `all ${z.length} numbers`;
    const few = z.length <= 4 ? `: ${[...z].map(rounded).join(", ")}` : `, from ${rounded(Math.min(...values))} to ${rounded(Math.max(...values))}`;
    parts["bars-caption"].textContent = `The code: ${which}${few}`;
    parts.bars.setAttribute("role", "img");
    parts.bars.setAttribute("aria-label", parts["bars-caption"].textContent);
  }

  showNearest(place, z) {
    const { train, codes, data } = this.model;
    if (!train.length) {
      place.textContent = "There are no training samples here.";
      return;
    }
    place.replaceChildren(...nearest(codes, z, NEIGHBOURS).map(({ index, distance }) => {
      const label = data.train_labels ? `${data.classes?.[data.train_labels[index]] ?? data.train_labels[index]}\n` : "";
      return thumbnail(train[index], `${label}${distance && distance < 0.01 ? distance.toExponential(1) : distance.toPrecision(3)}`);
    }));
  }

  // -- the codes

  setUpWalk() {
    const { model: m, parts } = this;
    this.z = Float32Array.from(m.start);
    this.across = m.axes[0];
    this.up = m.axes[1];
    parts["plane-part"].hidden = parts.axes.hidden = !this.up;
    for (const [select, key, other] of [[parts.across, "across", "up"], [parts.up, "up", "across"]]) {
      select.append(...m.axes.map((axis, i) => new Option(axis.name, i)));
      select.value = m.axes.indexOf(this[key]);
      select.addEventListener("change", () => {
        const chosen = m.axes[Number(select.value)];
        if (chosen === this[other]) this[other] = this[key]; // two axes, so they change places
        this[key] = chosen;
        parts.across.value = m.axes.indexOf(this.across);
        parts.up.value = m.axes.indexOf(this.up);
        this.measurePlane();
        this.codeChanged();
        this.gridChanged();
      });
    }
    this.setUpSliders();
    if (this.up) this.setUpPlane();
    parts["to-input"].addEventListener("click", () => this.zOfInput && this.moveTo(this.zOfInput));
    parts["to-mean"].addEventListener("click", () => this.moveTo(m.mean));
    this.codeChanged();
  }

  setUpSliders() {
    const { model: m, parts } = this, shown = m.order.slice(0, MOST_SLIDERS);
    const which = shown.length < m.size ? `The ${shown.length} of ${m.size} numbers that vary most` : "The numbers of the code";
    parts["sliders-title"].textContent = which;
    this.sliders = shown.map(d => {
      const row = document.createElement("div"), name = document.createElement("span");
      const slider = document.createElement("input"), output = document.createElement("output");
      row.className = "slider";
      name.textContent = `z${d}`;
      slider.setAttribute("aria-label", `z${d}`);
      Object.assign(slider, { type: "range", min: m.low[d], max: m.high[d], step: (m.high[d] - m.low[d]) / 200 });
      slider.addEventListener("input", () => {
        this.z[d] = Number(slider.value);
        this.codeChanged();
        this.gridChanged();
      });
      row.append(name, slider, output);
      return { d, slider, output, row };
    });
    parts.sliders.replaceChildren(...this.sliders.map(({ row }) => row));
  }

  moveTo(z) {
    this.z = Float32Array.from(z);
    this.codeChanged();
    this.gridChanged();
  }

  async showCode() {
    const { parts } = this, z = Float32Array.from(this.z), [pixels] = await this.model.decode([z]);
    this.decoded = pixels;
    const isImage = pixels.every(Number.isFinite);
    if (isImage) draw(parts.decoded, pixels);
    parts["decoded-caption"].textContent = isImage ? "Decoded from this code" : "The output of the decoder is not finite here";
    for (const { d, slider, output } of this.sliders) {
      slider.value = z[d];
      output.textContent = z[d].toFixed(2);
    }
    this.showNearest(parts.near, z);
    this.drawPlane();
  }

  // -- the plane

  /** Where a code lies on the plane, in the units of its axes. */
  place(z) {
    return [this.across, this.up].map(({ vector, origin }) => dot(vector, z) - origin);
  }

  /** The code at a place of the plane that else is the current one. */
  codeAt([u, v]) {
    const [a, b] = [this.across.vector, this.up.vector], here = this.place(this.z);
    // axes may be skew: a number of the code beside a principal axis
    const c = dot(a, b), du = u - here[0], dv = v - here[1], of = 1 - c * c;
    const [alpha, beta] = [(du - c * dv) / of, (dv - c * du) / of];
    return this.z.map((value, d) => value + alpha * a[d] + beta * b[d]);
  }

  measurePlane() {
    this.points = this.model.codes.map(code => this.place(code));
    this.range = [0, 1].map(axis => limits(this.points.map(point => point[axis])));
    this.grid = null;
  }

  setUpPlane() {
    const { model: m, parts } = this, canvas = parts.plane;
    this.measurePlane();
    parts.points.textContent = m.points;
    canvas.setAttribute("aria-label", `Plane of the codes of ${m.label}: the arrow keys move the point`);
    const labels = this.labels();
    const names = [...new Set(labels)].sort((a, b) => a - b);
    parts.legend.append(...names.map(label => {
      const entry = document.createElement("span"), dot_ = document.createElement("i");
      dot_.style.background = COLOURS[label % COLOURS.length];
      entry.append(dot_, String(m.data.classes?.[label] ?? label));
      return entry;
    }));
    const move = event => {
      const box = canvas.getBoundingClientRect();
      const shares = [(event.clientX - box.left) / box.width, 1 - (event.clientY - box.top) / box.height];
      this.z = this.codeAt(shares.map((share, axis) => {
        const [low, high] = this.range[axis];
        return low + Math.min(Math.max(share, 0), 1) * (high - low);
      }));
      this.codeChanged();
    };
    canvas.addEventListener("pointerdown", event => {
      canvas.setPointerCapture(event.pointerId);
      move(event);
    });
    canvas.addEventListener("pointermove", event => canvas.hasPointerCapture(event.pointerId) && move(event));
    const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };
    canvas.addEventListener("keydown", event => {
      const step = steps[event.key];
      if (!step) return;
      event.preventDefault();
      const here = this.place(this.z);
      this.z = this.codeAt(here.map((value, axis) => value + (step[axis] * (this.range[axis][1] - this.range[axis][0])) / 40));
      this.codeChanged();
    });
    parts.grid.addEventListener("change", this.gridChanged);
  }

  labels() {
    const { codes_are_of_set, data, codes } = this.model;
    return codes_are_of_set && data.train_labels ? data.train_labels.slice(0, codes.length) : [];
  }

  async showGrid() {
    if (!this.up) return;
    if (!this.parts.grid.checked) this.grid = null;
    else {
      const centre = k => (k + 0.5) / GRID, at = (axis, share) => this.range[axis][0] + share * (this.range[axis][1] - this.range[axis][0]);
      const places = Array.from({ length: GRID * GRID }, (_, k) => [at(0, centre(k % GRID)), at(1, 1 - centre(Math.floor(k / GRID)))]);
      this.grid = (await this.model.decode(places.map(place => this.codeAt(place)))).map(pixels => {
        const canvas = document.createElement("canvas");
        draw(canvas, pixels);
        return canvas;
      });
    }
    this.drawPlane();
  }

  drawPlane() {
    if (!this.up || !this.points) return;
    const [context, width, height] = sharp(this.parts.plane);
    const toScreen = point => point.map((value, axis) => {
      const [low, high] = this.range[axis], share = (value - low) / (high - low);
      return axis ? (1 - share) * height : share * width;
    });
    context.fillStyle = css("--panel");
    context.fillRect(0, 0, width, height);
    if (this.grid) {
      const size = [width / GRID, height / GRID];
      this.grid.forEach((canvas, k) => context.drawImage(canvas, (k % GRID) * size[0], Math.floor(k / GRID) * size[1], ...size));
    } else {
      const labels = this.labels(), radius = this.points.length > 300 ? 2.2 : 3;
      context.globalAlpha = 0.75;
      this.points.forEach((point, i) => {
        const [x, y] = toScreen(point);
        context.fillStyle = labels.length ? COLOURS[labels[i] % COLOURS.length] : css("--accent");
        context.beginPath();
        context.arc(x, y, radius, 0, 2 * Math.PI);
        context.fill();
      });
      context.globalAlpha = 1;
    }
    context.font = "12px system-ui, sans-serif";
    context.strokeStyle = this.grid ? "#000" : css("--panel");
    context.fillStyle = this.grid ? "#fff" : css("--text");
    context.lineWidth = 4;
    for (const [align, text, x, y] of [["right", this.across.name, width - 6, height - 6], ["left", this.up.name, 6, 14]]) {
      context.textAlign = align;
      context.strokeText(text, x, y);
      context.fillText(text, x, y);
    }
    const mark = (z, colour, radius, cross) => {
      const [x, y] = toScreen(this.place(z));
      for (const [line, style] of [[5, css("--panel")], [2.5, colour]]) {
        context.lineWidth = line;
        context.strokeStyle = style;
        context.beginPath();
        context.arc(x, y, radius, 0, 2 * Math.PI);
        if (cross) {
          for (const [dx, dy] of [[1, 0], [-1, 0], [0, 1], [0, -1]]) {
            context.moveTo(x + dx * radius, y + dy * radius);
            context.lineTo(x + dx * (radius + 6), y + dy * (radius + 6));
          }
        }
        context.stroke();
      }
    };
    if (this.zOfInput) mark(this.zOfInput, css("--good"), 5, false);
    mark(this.z, css("--text"), 7, true);
  }

  redraw() {
    if (this.zOfInput) this.showBars(this.zOfInput);
    this.drawPlane();
  }
}

// ---- the page --------------------------------------------------------------------------------------------------------

/** The indices of the models that the address names, or else the first ones. */
function chosenModels() {
  const labels = manifest.models.map(({ label }) => label);
  const named = new URLSearchParams(location.search).getAll("model").map(name => labels.indexOf(name));
  const known = named.filter(index => index >= 0).slice(0, MOST_CARDS);
  return known.length ? known : [...labels.keys()].slice(0, labels.length <= MOST_CARDS ? MOST_CARDS : 1);
}

async function showModels(chosen) {
  const models = await Promise.all(chosen.map(model));
  cards = models.map(found => new Card(found));
  byId("cards").replaceChildren(...cards.map(card => card.element));
  const address = new URL(location.href);
  address.search = new URLSearchParams(chosen.map(index => ["model", manifest.models[index].label]));
  history.replaceState(null, "", address);
  cards.forEach(card => card.inputChanged());
}

function setUpPickers(chosen) {
  const count = Math.min(MOST_CARDS, manifest.models.length);
  const selects = Array.from({ length: count }, (_, place) => {
    const select = document.createElement("select"), label = document.createElement("label");
    label.textContent = place ? "beside " : "";
    select.setAttribute("aria-label", `model ${place + 1}`);
    if (place) select.append(new Option("none", ""));
    select.append(...manifest.models.map((about, i) => new Option(about.label, i)));
    select.value = chosen[place] ?? "";
    label.append(select);
    byId("pickers").append(label);
    return select;
  });
  const change = latest(() => showModels([...new Set(selects.filter(s => s.value !== "").map(s => Number(s.value)))]));
  selects.forEach(select => select.addEventListener("change", change));
  document.querySelector(".picker").hidden = manifest.models.length < 2;
}

async function start() {
  const chosen = chosenModels();
  byId("version").textContent = ` ${manifest.aezoo_version}`;
  byId("lead").textContent =
    `An encoder compresses an image of ${CHANNELS > 1 ? `${CHANNELS} × ` : ""}${HEIGHT} × ${WIDTH} = ${SIZE} numbers to a short code, ` +
    "and a decoder reconstructs it from the code. Choose an image, or draw one, and see what is kept. " +
    "Then move through the codes: every place is an image.";
  setUpDrawing();
  setUpFiles();
  setUpPickers(chosen);
  byId("main").hidden = false;
  byId("status").textContent = "Loading the models.";
  await setUpSamples(manifest.models[chosen[0]].set);
  await showModels(chosen);
  const first = document.querySelector("#samples button");
  if (first) first.click();
  else inputChanged();
  new ResizeObserver(() => cards.forEach(card => card.redraw())).observe(byId("cards"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => cards.forEach(card => card.redraw()));
  byId("status").hidden = true;
  // for the console
  window.explorer = { manifest, input, setInput, get cards() { return cards; } };
}

start().catch(report);
