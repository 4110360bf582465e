// The page: a case is the list of its events, and everything shown is made from them. A reload reads them again.

import { chosenLanguage, currentLanguage, setLanguage, t, translate } from "/static/words.js";
import { SliceViewer } from "/static/viewer_slices.js";
import { NiivueViewer, fits } from "/static/viewer_niivue.js";

const $ = (id) => document.getElementById(id);
const PRESETS = { lung: [-1350, 150], mediastinum: [-160, 240], bone: [-500, 1300] };
const STAGES = ["upload", "reading", "checks", "segmentation", "vision", "writing"];
const SIDES = ["left", "right", "bilateral"];
const ZONES = ["upper", "middle", "lower"];
const HEADING = /^\s*([\p{Script=Han}]{2,6}|[A-Z][A-Za-z ]{2,24})[:：]\s*/u;
const SENDERS = 4; // files under way at one time

let status = {};
let firstStatus;
const statusKnown = new Promise((done) => { firstStatus = done; });
let viewer = null;
let source = null; // of events
let scan = null; // of the viewer: id, shape, spacing, affine
let state = blank();
let building = Promise.resolve();
let last = null; // what was sent last, to be sent again with a confirmation

function blank() {
  return { id: null, name: "", stages: {}, queue: null, findings: null, reports: [], shown: -1, sentence: null, answers: new Map(), edits: new Map(), layers: new Set(), drawn: {} };
}

// ------------------------------------------------------------------ small things

function make(tag, properties = {}, ...children) {
  const one = Object.assign(document.createElement(tag), properties);
  one.append(...children);
  return one;
}

async function call(path, method = "GET", body = null) {
  let answer;
  try {
    answer = await fetch(path, { method, body: body && JSON.stringify(body), headers: { "X-Report-Page": "1" } });
  } catch {
    throw new Error(t("lost"));
  }
  if (answer.status === 401) location.replace("/login");
  if (!answer.ok) throw new Error((await answer.json().catch(() => ({}))).error ?? `${answer.status}`);
  return answer;
}

function complain(line, confirm = null) {
  $("alert").hidden = false;
  $("alert").querySelector("p").textContent = line;
  $("confirm").hidden = !confirm;
  if (confirm) {
    $("confirm").textContent = t(`confirm_${confirm}`);
    $("confirm").onclick = () => { quiet(); start({ ...last, [confirm]: true }); };
  }
  $("alert").scrollIntoView({ block: "nearest" });
}

function quiet() { $("alert").hidden = true; }

const trying = (work) => async (...given) => {
  try {
    await work(...given);
  } catch (error) {
    complain(error.message);
  }
};

const percent = (value) => `${Math.round(100 * value)} %`;
const findingName = (name) => status.names?.[currentLanguage()]?.[name] ?? name;

// ------------------------------------------------------------------ sending a scan

async function filesOf(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  if (!entries.length) return [...transfer.files];
  const found = [];
  const walk = async (entry) => {
    if (entry.isFile) return found.push(await new Promise((done, failed) => entry.file(done, failed)));
    const reader = entry.createReader();
    for (;;) { // a reader gives a hundred at a time
      const some = await new Promise((done, failed) => reader.readEntries(done, failed));
      if (!some.length) return null;
      for (const one of some) await walk(one);
    }
  };
  for (const entry of entries) await walk(entry);
  return found;
}

function put(path, file, progress) {
  return new Promise((done, failed) => {
    const request = new XMLHttpRequest();
    request.open("PUT", path);
    request.setRequestHeader("X-Report-Page", "1");
    request.setRequestHeader("X-File-Name", encodeURIComponent(file.name));
    request.upload.onprogress = (event) => progress(event.loaded);
    request.onload = () => {
      if (request.status < 300) return done();
      let line = `${request.status}`;
      try { line = JSON.parse(request.responseText).error; } catch { /* no JSON */ }
      return failed(new Error(line));
    };
    request.onerror = () => failed(new Error(t("lost")));
    request.send(file);
  });
}

async function upload(id, files) {
  const all = files.reduce((sum, file) => sum + file.size, 0);
  const sent = new Map();
  const show = () => {
    const now = [...sent.values()].reduce((a, b) => a + b, 0);
    $("sent").value = all ? now / all : 0;
    $("sending").querySelector("span").textContent = `${(now / 2 ** 20).toFixed(0)} / ${(all / 2 ** 20).toFixed(0)} MB`;
  };
  $("sending").hidden = false;
  show();
  const waiting = [...files];
  const send = async () => {
    for (let file = waiting.shift(); file; file = waiting.shift()) {
      const mine = file;
      await put(`/api/cases/${id}/files`, mine, (bytes) => { sent.set(mine, bytes); show(); });
    }
  };
  try {
    await Promise.all(Array.from({ length: SENDERS }, send));
  } finally {
    $("sending").hidden = true;
  }
}

const start = trying(async (what) => {
  last = what;
  quiet();
  let seconds = null;
  if (what.files) {
    const files = what.files.filter((file) => !file.name.startsWith("."));
    const bytes = files.reduce((sum, file) => sum + file.size, 0);
    if (!files.length) throw new Error(t("emptyFolder"));
    if (bytes > status.most_bytes) throw new Error(t("tooLarge", { mb: Math.ceil(bytes / 2 ** 20), most: status.most_bytes / 2 ** 20 }));
  }
  const { case: id } = await (await call("/api/cases", "POST", {})).json();
  if (what.files) {
    const began = performance.now();
    await upload(id, what.files.filter((file) => !file.name.startsWith(".")));
    seconds = (performance.now() - began) / 1000;
  }
  const name = what.files?.[0]?.webkitRelativePath?.split("/")[0] || what.files?.[0]?.name;
  const { sample, force, accept_toy } = what;
  await call(`/api/cases/${id}/read`, "POST", { sample, force, accept_toy, name, question: $("first-question").value });
  open(id);
  if (seconds !== null) {
    state.stages.upload = { seconds };
    drawStages();
  }
});

// ------------------------------------------------------------------ events of a case

function open(id) {
  close();
  state.id = id;
  history.replaceState(null, "", `#case=${id}`);
  show("work");
  drawAll();
  source = new EventSource(`/api/cases/${id}/events`);
  source.onmessage = (message) => {
    apply(JSON.parse(message.data));
    if ($("alert").dataset.lost) {
      delete $("alert").dataset.lost;
      quiet();
    }
  };
  source.onerror = async () => {
    if (source?.readyState === EventSource.CLOSED) return gone();
    const answer = await fetch("/api/status").catch(() => null);
    if (answer) return null;
    $("alert").dataset.lost = "1";
    return complain(t("disconnected"));
  };
}

function gone() {
  close();
  history.replaceState(null, "", "/");
  show("start");
  complain(t("gone"));
}

function close() {
  source?.close();
  viewer?.destroy();
  viewer = $("stage").viewer = source = scan = null;
  state = blank();
}

const APPLY = {
  queue: (event) => { state.queue = event.place; drawStages(); },
  stage: (event) => { state.queue = null; state.stages[event.name] = { now: true }; drawStages(); },
  stage_done: (event) => { state.stages[event.name] = { seconds: event.seconds }; drawStages(); },
  volume: (event) => {
    state.name = event.name;
    scan = { ...event, id: state.id };
    $("scan-name").textContent = event.name;
    showViewer();
  },
  layer: (event) => { state.layers.add(event.name); viewer?.setLayer("lesions", event.any ? event.name : null); },
  findings: (event) => {
    state.findings = { ...event, rows: event.findings.map((one) => ({ ...one })) };
    drawFindings();
    drawFacts();
  },
  writing: (event) => {
    state.queue = null;
    state.reports[event.report] = { text: "", notice: event.notice, sentences: null };
    state.shown = event.report;
    state.sentence = null;
    $("edit").hidden = true;
    if (event.ticked) restoreRows(event.ticked);
    viewer?.setLayer("heat", null);
    drawReport();
  },
  text: (event) => { state.reports[event.report].text += event.text; drawReport(); },
  report: (event) => { state.reports[event.report] = event; drawReport(); drawFindings(); },
  question: (event) => { state.answers.set(event.number, { question: event.text, text: "", now: true }); drawAnswers(); },
  answer_text: (event) => { state.answers.get(event.number).text += event.text; drawAnswers(); },
  answer: (event) => { Object.assign(state.answers.get(event.number), { text: event.text, now: false }); drawAnswers(); },
  map: (event) => {
    state.layers.add(event.layer);
    const asked = state.sentence;
    if (!asked || asked.report !== event.report || asked.sentence !== event.sentence) return;
    asked.map = event;
    showMap();
  },
  error: (event) => {
    for (const one of Object.values(state.stages)) if (one.now) Object.assign(one, { now: false, failed: true });
    drawStages();
    if (event.of === "read") show("failed");
    if (["read", "write"].includes(event.of) && state.reports.length && !state.reports.at(-1).sentences) {
      state.reports.pop(); // the one that failed
      state.shown = state.reports.length - 1;
      drawReport();
    }
    complain(event.line, last ? event.confirm : null);
    drawFindings();
    drawPlace();
  },
  file: () => {
    if (!state.wanted) return; // a reload reads old events again
    state.wanted = false;
    make("a", { href: `/api/cases/${state.id}/dicom.zip`, download: "report_dicom.zip" }).click();
  },
  end: () => { state.queue = null; drawStages(); drawFindings(); },
  gone,
};

function apply(event) { APPLY[event.kind]?.(event); }

function show(which) {
  $("start").hidden = which === "work";
  $("work").hidden = which === "start" || (which === "failed" && !scan);
  $("new").hidden = which === "start";
}

// ------------------------------------------------------------------ drawing

function drawAll() {
  translate(document);
  drawState();
  drawStages();
  drawReport();
  drawFindings();
  drawAnswers();
  drawFacts();
  drawPlace();
  drawSamples();
}

function drawState() {
  const { model, failure } = status;
  $("state").textContent = failure ? `${t("failed")}: ${failure}` : model ? `${t("ready")} · ${model.checkpoint}` : t("loadingModel");
  $("state").className = `state ${failure ? "bad" : model ? "ready" : ""}`;
  document.querySelector(".standing").textContent = t("standing") + (status.demo ? ` ${t("demo")}` : "");
  $("language").textContent = currentLanguage() === "zh" ? "EN" : "中";
  $("language").lang = currentLanguage() === "zh" ? "en" : "zh";
}

function drawSamples() {
  const names = status.model?.samples ?? [];
  $("samples").hidden = !status.model;
  const chip = (textContent, sample) => make("li", {}, make("button", { type: "button", textContent, onclick: () => start({ sample }) }));
  $("samples").querySelector("ul").replaceChildren(...names.map(chip), chip(t("phantom"), "phantom"));
}

function drawStages() {
  const rows = STAGES.filter((name) => state.stages[name] || name !== "upload").map((name) => {
    const one = state.stages[name] ?? {};
    const row = make("li", { className: one.failed ? "failed" : one.now ? "now" : "seconds" in one ? "done" : "" }, t(`stage_${name}`));
    if ("seconds" in one) row.append(" ", make("span", { className: "s", textContent: t("seconds", { s: one.seconds.toFixed(1) }) }));
    return row;
  });
  if (state.queue) rows.push(make("li", { className: "now", textContent: t("queued", { n: state.queue }) }));
  $("stages").replaceChildren(...rows);
}

function drawFacts() {
  $("facts").replaceChildren(...(state.findings?.facts ?? []).map((line) => make("li", { textContent: line })));
}

/** Sections of a report: heading, and its pieces with their number. */
function sections(pieces) {
  const found = [];
  pieces.forEach((piece, number) => {
    const heading = piece.match(HEADING);
    if (heading || !found.length) found.push({ heading: heading?.[1] ?? "", pieces: [] });
    const text = heading ? piece.slice(heading[0].length) : piece;
    if (text.trim()) found.at(-1).pieces.push({ text: text.trim(), number });
  });
  return found;
}

function drawReport() {
  const report = state.reports[state.shown];
  $("report-card").hidden = !report;
  if (!report) return;
  const notes = [report.notice, report.cut && t("cut"), report.rewritten && t("rewritten")].filter(Boolean);
  $("notice").hidden = !notes.length;
  $("notice").textContent = notes.join(" ");
  $("versions").replaceChildren(...(state.reports.length > 1 ? state.reports.map((_, number) => {
    const button = make("button", { type: "button", textContent: t("version", { n: number + 1 }), onclick: () => choose(number) });
    button.setAttribute("role", "tab");
    button.setAttribute("aria-selected", String(number === state.shown));
    return button;
  }) : []));
  const done = Boolean(report.sentences);
  const altered = edited() !== null && edited().trim() !== report.marked?.trim();
  const before = state.reports[state.shown - 1]?.sentences?.map((one) => one.text.trim());
  const plain = altered ? edited() : report.text;
  const linked = done && !altered; // with the sentences that the model wrote
  const pieces = linked ? report.sentences.map((one) => one.text) : plain.split(/(?<=[。；;!！?？\n])/u);
  const parts = sections(pieces).map((section) => {
    const paragraph = make("p");
    for (const { text, number } of section.pieces) paragraph.append(...(linked ? sentence(report, number, text, before) : [text]));
    return [section.heading && make("h3", { textContent: section.heading }), paragraph];
  });
  $("report").replaceChildren(...parts.flat().filter(Boolean));
  if (!done) $("report").lastElementChild?.classList.add("caret");
  drawChanges(report, before);
  const editing = edited() !== null && !$("edit").hidden;
  $("report").hidden = editing;
  $("sentence-hint").hidden = editing || !done;
  $("sentence-hint").textContent = t(altered ? "editedHint" : "sentenceHint");
  $("discard").hidden = editing || !altered;
  $("toggle-edit").textContent = t(editing ? "editDone" : "edit");
  for (const button of $("report-card").querySelectorAll(".row.wrap button")) button.disabled = !done;
  $("downloads").replaceChildren(...(status.formats ?? []).concat(scan?.dicom ? ["dicom"] : []).map((kind) =>
    make("button", { type: "button", textContent: kind, disabled: !done, title: t(`as_${kind}`), onclick: () => download(kind) })));
  const reference = state.findings?.reference;
  $("reference").hidden = !reference || !done;
  $("reference").querySelector("p").textContent = reference ?? "";
  $("questions-card").hidden = !state.reports[0]?.sentences;
}

function sentence(report, number, text, before) {
  const one = report.sentences[number];
  const pressed = state.sentence?.report === state.shown && state.sentence.sentence === number;
  const changed = before && !before.includes(one.text.trim());
  const button = make("button", { type: "button", className: `sentence${changed ? " changed" : ""}`, textContent: text, onclick: () => point(number) });
  button.setAttribute("aria-pressed", String(pressed));
  button.dataset.sentence = number;
  const parts = [button];
  if (one.unsure) parts.push(make("span", { className: "tag unsure", textContent: t("unsure") }));
  if (one.confidence !== null) parts.push(make("span", { className: "tag", textContent: t("confidence", { p: percent(one.confidence) }) }));
  return [...parts, " "];
}

function drawChanges(report, before) {
  $("changes").hidden = !before || !report.sentences;
  if ($("changes").hidden) return;
  const now = report.sentences.map((one) => one.text.trim());
  const dropped = before.filter((text) => !now.includes(text));
  const same = !dropped.length && now.every((text) => before.includes(text));
  $("changes").replaceChildren(t(same ? "sameLine" : "changedLine"));
  if (dropped.length) $("changes").append(" ", make("del", { textContent: t("removedLine", { s: dropped.join("") }) }));
}

function choose(number) {
  state.shown = number;
  state.sentence = null;
  $("edit").hidden = true;
  viewer?.setLayer("heat", null);
  drawReport();
  drawPlace();
}

const point = trying(async (number) => {
  const one = state.reports[state.shown].sentences[number];
  state.sentence = { report: state.shown, sentence: number, map: null };
  drawReport();
  document.querySelector(`[data-sentence="${number}"]`)?.focus();
  if (one.place) viewer?.setPosition(one.place);
  drawPlace();
  await call(`/api/cases/${state.id}/map`, "POST", { report: state.shown, sentence: number });
});

async function showMap() {
  const { map } = state.sentence;
  const { place } = state.reports[map.report].sentences[map.sentence];
  viewer?.setPosition(place ?? map.peak);
  await viewer?.setLayer("heat", map.layer);
  drawPlace();
}

function drawPlace() {
  const { position, value } = state.drawn;
  const parts = [];
  if (position) {
    const [z, y, x] = position.map((n) => n + 1);
    parts.push(t("position", { z, y, x, hu: Number.isFinite(value) ? ` · ${Math.round(value)} HU` : "" }));
  }
  if (state.sentence) parts.push(t(state.sentence.map ? "mapped" : "mapping"));
  $("place").textContent = parts.join(" · ");
}

// ------------------------------------------------------------------ findings

function choice(values, chosen, label, name) {
  const select = make("select", {}, ...values.map((value) => make("option", { value: value ?? "", textContent: name(value) })));
  select.value = chosen ?? "";
  select.setAttribute("aria-label", label);
  return select;
}

function drawFindings() {
  const { findings } = state;
  $("findings-card").hidden = !findings;
  if (!findings) return;
  const { editable, rows } = findings;
  $("findings-hint").textContent = t(editable ? "findingsHint" : "notEditable");
  $("add").hidden = $("write").hidden = !editable;
  const active = document.activeElement?.dataset?.key;
  $("findings").replaceChildren(...rows.map((row, at) => findingRow(row, at, editable)));
  if (active) document.querySelector(`[data-key="${active}"]`)?.focus();
  $("write").disabled = !state.reports.at(-1)?.sentences;
}

/** The list as it was when a version was asked for: a reload would begin with the program's own. */
function restoreRows(ticked) {
  const rows = state.findings.rows.filter((row) => row.id !== null);
  for (const row of rows) {
    const given = ticked.find((one) => one.id === row.id);
    Object.assign(row, given ?? {}, { on: Boolean(given) });
  }
  const blank = { probability: null, measured: false, volume_ml: null, mean_hu: null, place: null };
  const own = ticked.filter((one) => one.id === null).map((one) => ({ ...blank, ...one, on: true }));
  state.findings.rows = [...rows, ...own];
  drawFindings();
}

function findingRow(row, at, editable) {
  const names = Object.keys(status.names?.zh ?? { [row.finding]: "" });
  const tick = make("input", { type: "checkbox", checked: row.on, onchange: (event) => { row.on = event.target.checked; drawFindings(); } });
  tick.setAttribute("aria-label", findingName(row.finding));
  const finding = choice(names, row.finding, t("findings"), findingName);
  finding.onchange = () => { row.finding = finding.value; drawFindings(); };
  const side = choice([null, ...SIDES], row.side, t("side"), (value) => t(value ? `side_${value}` : "unknown"));
  side.onchange = () => { row.side = side.value || null; };
  const zone = choice([null, ...ZONES], row.zone, t("zone"), (value) => t(value ? `zone_${value}` : "unknown"));
  zone.onchange = () => { row.zone = zone.value || null; };
  const size = make("input", { type: "number", min: 1, max: 500, step: 1, value: row.size_mm === null ? "" : Math.round(row.size_mm) });
  size.setAttribute("aria-label", `${t("size")} (mm)`);
  size.onchange = () => { row.size_mm = size.value === "" ? null : Number(size.value); };
  const why = make("span", { className: "why" }, t(row.measured ? "measured" : row.id === null ? "yours" : "predicted"));
  if (row.probability !== null) why.append(make("span", { textContent: `${t("probability")} ${percent(row.probability)}` }));
  if (row.volume_ml !== null) why.append(make("span", { textContent: `${row.volume_ml.toPrecision(2)} ml` }));
  if (row.mean_hu !== null) why.append(make("span", { textContent: `${Math.round(row.mean_hu)} HU` }));
  if (row.place) why.append(make("button", { type: "button", className: "quiet", textContent: t("show"), onclick: () => viewer?.setPosition(row.place) }));
  if (row.id === null) why.append(make("button", { type: "button", className: "quiet", textContent: t("remove"), onclick: () => { state.findings.rows.splice(at, 1); drawFindings(); } }));
  const controls = [tick, finding, side, zone, size];
  controls.forEach((control, k) => { control.disabled = !editable; control.dataset.key = `${at}-${k}`; });
  return make("li", { className: row.on ? "" : "off" }, tick, finding, side, zone, make("span", { className: "mm" }, size, "mm"), why);
}

// ------------------------------------------------------------------ questions

function drawAnswers() {
  $("answers").replaceChildren(...[...state.answers.values()].map(({ question, text, now }) =>
    make("li", {}, make("p", { className: "q", textContent: question }), make("p", { className: now ? "caret" : "", textContent: text }))));
}

// ------------------------------------------------------------------ the viewer

/** One viewer after the other: NiiVue does not like to lose its canvas while it loads. */
function showViewer() {
  building = building.then(build).catch((error) => console.warn(error));
}

async function build() {
  if (!scan) return;
  const mine = scan;
  const able = status.niivue && fits(scan.shape);
  $("viewer-kind").options[0].disabled = !able;
  $("viewer-kind").title = able ? "" : t("webgl");
  if (!able) $("viewer-kind").value = "slices";
  const changed = (which) => async (news) => {
    if (which() !== viewer) return; // one that is still loading
    if (news.window) drawWindow(news.window);
    if (news.position) state.drawn.position = news.position;
    if (news.value !== undefined) state.drawn.value = await news.value;
    drawPlace();
  };
  if (!(viewer instanceof SliceViewer)) { // at once, and until NiiVue has loaded its volume
    let slices = null;
    slices = new SliceViewer($("stage"), mine, changed(() => slices));
    await take(slices);
  }
  if ($("viewer-kind").value !== "niivue") return;
  let made = null;
  try {
    made = await NiivueViewer.create($("stage"), mine, changed(() => made));
    if (mine !== scan) return made.destroy();
    await take(made);
  } catch (error) {
    console.warn(error);
    $("viewer-kind").value = "slices";
  }
}

/** Let a viewer take the place of the one before: window, place, layers. */
async function take(next) {
  const before = viewer;
  for (const kind of ["lesions", "heat"]) next.setOpacity(kind, Number($(`${kind === "heat" ? "heat" : "lesion"}-opacity`).value));
  next.setDrag(document.querySelector("[data-drag][aria-checked=true]").dataset.drag);
  viewer = $("stage").viewer = next; // the property is for tests
  next.setWindow(...(before?.window ?? PRESETS.lung));
  next.setPosition(before?.position ?? scan.shape.map((n) => n >> 1));
  next.reveal?.();
  before?.destroy();
  if (state.layers.has("lesions")) await next.setLayer("lesions", "lesions");
  if (state.sentence?.map) await next.setLayer("heat", state.sentence.map.layer);
}

function drawWindow([low, high]) {
  $("window").textContent = `L ${Math.round((low + high) / 2)} · W ${Math.round(high - low)}`;
  for (const button of $("presets").children) {
    const [a, b] = PRESETS[button.dataset.preset];
    button.setAttribute("aria-pressed", String(Math.abs(a - low) < 1 && Math.abs(b - high) < 1));
  }
}

function chooseDrag(mode) {
  for (const button of $("drags").children) button.setAttribute("aria-checked", String(button.dataset.drag === mode));
  viewer?.setDrag(mode);
}

// ------------------------------------------------------------------ the report as a file

/** What a person has made of the version that is shown; null: nothing. */
const edited = () => state.edits.get(state.shown) ?? null;
const currentText = () => edited() ?? state.reports[state.shown]?.marked ?? "";

const download = trying(async (kind) => {
  if (kind === "dicom") {
    state.wanted = true;
    await call(`/api/cases/${state.id}/dicom`, "POST", { text: currentText(), report: state.shown });
    return;
  }
  const answer = await call(`/api/cases/${state.id}/export/${kind}`, "POST", { text: currentText(), report: state.shown, language: currentLanguage() });
  const name = decodeURIComponent(answer.headers.get("content-disposition").split("UTF-8''")[1]);
  const url = URL.createObjectURL(await answer.blob());
  make("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60000);
});

async function copy() {
  try {
    await navigator.clipboard.writeText(currentText());
  } catch { // the browser allows it over https and on this machine alone
    const area = make("textarea", { value: currentText() });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  $("copy").textContent = t("copied");
  setTimeout(() => { $("copy").textContent = t("copy"); }, 1500);
}

// ------------------------------------------------------------------ the model

function drawAbout() {
  const { model } = status;
  if (!model) return;
  const rows = {
    about_checkpoint: `${model.checkpoint} (${model.digest})`, about_trained: model.trained, about_language_model: model.language_model,
    about_findings_prompt: model.findings_prompt, about_device: `${model.device} · ${model.versions.device}`, about_scan_backend: model.scan_backend,
    about_verdict: model.verdict || t("noVerdict"), about_calibration: t(model.calibrated ? "calibrated" : "uncalibrated"),
    about_versions: Object.entries(model.versions).map((pair) => pair.join(" ")).join(" · "),
  };
  const list = (entries) => entries.flatMap(([key, value]) => [make("dt", { textContent: key }), make("dd", { textContent: String(value) })]);
  $("about-list").replaceChildren(...list(Object.entries(rows).map(([key, value]) => [t(key), value])));
  $("about-config").replaceChildren(...list(Object.entries(model.config)));
}

async function watchModel() {
  for (;;) {
    const answer = await fetch("/api/status").catch(() => null);
    if (answer?.status === 401) location.replace("/login");
    if (answer?.ok) {
      const news = await answer.json();
      const changed = JSON.stringify(news) !== JSON.stringify(status);
      status = news;
      if (changed) {
        drawState();
        drawSamples();
        drawFindings();
        drawReport();
      }
      firstStatus();
    }
    await new Promise((done) => setTimeout(done, status.model ? 10000 : 700));
  }
}

// ------------------------------------------------------------------ start

function setTheme(name) {
  document.documentElement.dataset.theme = name;
  localStorage.setItem("theme", name);
}

function listen() {
  const drop = $("drop");
  for (const kind of ["dragover", "dragenter"]) document.addEventListener(kind, (event) => { event.preventDefault(); drop.classList.add("over"); });
  for (const kind of ["dragleave", "drop"]) document.addEventListener(kind, (event) => { event.preventDefault(); drop.classList.remove("over"); });
  document.addEventListener("drop", trying(async (event) => start({ files: await filesOf(event.dataTransfer) })));
  for (const kind of ["file", "folder"]) {
    const input = $(`${kind}-input`);
    $(kind === "file" ? "files" : "folder").onclick = () => input.click();
    input.onchange = () => { const files = [...input.files]; input.value = ""; if (files.length) start({ files }); };
  }
  $("dismiss").onclick = quiet;
  $("new").onclick = trying(async () => {
    const { id } = state;
    close();
    history.replaceState(null, "", "/");
    quiet();
    show("start");
    if (id) await call(`/api/cases/${id}`, "DELETE");
  });
  $("model").onclick = () => { drawAbout(); $("about").showModal(); };
  $("close-about").onclick = () => $("about").close();
  $("theme").onclick = () => setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
  $("language").onclick = () => { setLanguage(currentLanguage() === "zh" ? "en" : "zh"); drawAll(); };
  for (const button of $("presets").children) button.onclick = () => viewer?.setWindow(...PRESETS[button.dataset.preset]);
  for (const button of $("drags").children) button.onclick = () => chooseDrag(button.dataset.drag);
  $("zoom-in").onclick = () => viewer?.zoomBy(1.25);
  $("zoom-out").onclick = () => viewer?.zoomBy(0.8);
  $("reset").onclick = () => viewer?.reset();
  $("lesion-opacity").oninput = (event) => viewer?.setOpacity("lesions", Number(event.target.value));
  $("heat-opacity").oninput = (event) => viewer?.setOpacity("heat", Number(event.target.value));
  $("viewer-kind").onchange = () => scan && showViewer();
  $("toggle-edit").onclick = () => {
    const opening = $("edit").hidden;
    if (opening) {
      $("edit").value = currentText();
    }
    state.edits.set(state.shown, $("edit").value);
    $("edit").hidden = !opening;
    drawReport();
    if (opening) $("edit").focus();
  };
  $("discard").onclick = () => { state.edits.delete(state.shown); drawReport(); };
  $("edit").oninput = () => { state.edits.set(state.shown, $("edit").value); };
  window.addEventListener("beforeunload", (event) => { // edits live in this page alone
    if ([...state.edits].some(([number, text]) => text.trim() !== state.reports[number]?.marked?.trim())) event.preventDefault();
  });
  $("copy").onclick = copy;
  $("add").onclick = () => {
    state.findings.rows.push({ id: null, on: true, finding: "nodule", side: "right", zone: "upper", size_mm: null, probability: null, measured: false, volume_ml: null, mean_hu: null, place: null });
    drawFindings();
    document.querySelector("#findings li:last-child select")?.focus();
  };
  $("write").onclick = trying(async () => {
    $("write").disabled = true;
    const findings = state.findings.rows.filter((row) => row.on);
    try {
      await call(`/api/cases/${state.id}/write`, "POST", { findings });
    } catch (error) {
      drawFindings(); // "write again" is there again
      throw error;
    }
  });
  $("ask-form").onsubmit = trying(async (event) => {
    event.preventDefault();
    const question = $("ask").value.trim();
    if (!question) return;
    $("ask").value = "";
    await call(`/api/cases/${state.id}/ask`, "POST", { question });
  });
}

setLanguage(chosenLanguage());
setTheme(localStorage.getItem("theme") ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"));
chooseDrag("crosshair");
drawWindow(PRESETS.lung);
listen();
drawAll();
watchModel();
const kept = location.hash.match(/^#case=([\w-]+)$/);
if (kept) statusKnown.then(() => open(kept[1])); // which viewer there is, and how findings are called
