// The page of `tmad web`: a photograph, strokes over it, the server's answer. Coordinates are the picture's pixels.
"use strict";

const $ = (id) => document.getElementById(id);
const paint = $("paint"), pen = paint.getContext("2d", { willReadFrequently: true });
const stage = $("stage"), cursor = $("cursor");

// A browser's canvas has an end; larger photographs get a coarser mask, which the server brings to their size.
const MOST_MASK_PIXELS = 16e6;
const HOLE = "#e0245e";

let token = sessionStorage.getItem("token");
let original = null;  // the photograph as it was opened: {file, url}
let now = null;       // what is shown and filled next: {file, url, about, source}
let width = 0, height = 0, shrink = 1;
let strokes = [], past = [];
let drawing = null;   // the stroke that is being drawn
let at = null;        // the brush, {x, y}
let asked = null;     // the request under way
let zoom = 1;

if (location.hash.startsWith("#token=")) {
  token = decodeURIComponent(location.hash.slice(7));
  sessionStorage.setItem("token", token);
  history.replaceState(null, "", location.pathname);
}

function say(text, wrong = false) {
  $("status").textContent = text;
  $("status").classList.toggle("wrong", wrong);
}

async function ask(address, options = {}) {
  const headers = { ...options.headers, ...(token ? { Authorization: `Bearer ${token}` } : {}) };
  let response;
  try {
    response = await fetch(address, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer; does `tmad web` still run?");
  }
  if (response.ok) return response;
  if (response.status === 401) throw new Error("This page needs the token: open the whole address that `tmad web` printed.");
  const text = await response.text();
  let reason = `the server answered ${response.status}`;
  try { reason = JSON.parse(text).error; } catch { /* not ours */ }
  throw new Error(reason[0].toUpperCase() + reason.slice(1) + (reason.endsWith(".") ? "" : "."));
}

// Pictures ---------------------------------------------------------------------------------------------------------

// An address under which the browser shows *file*; formats that it does not know come back from the server as PNG.
async function shown(file) {
  for (const blob of [() => file, async () => (await ask("show", { method: "POST", body: file })).blob()]) {
    const image = new Image();
    image.src = URL.createObjectURL(await blob());
    try {
      await image.decode();
      return image;
    } catch { URL.revokeObjectURL(image.src); }
  }
  throw new Error(`${file.name} cannot be shown.`);
}

async function open(file) {
  if (asked) return;
  say(`Opening ${file.name}…`);
  try {
    const image = await shown(file);
    [width, height] = [image.naturalWidth, image.naturalHeight];
    shrink = Math.min(1, Math.sqrt(MOST_MASK_PIXELS / (width * height)));
    paint.width = Math.ceil(width * shrink);
    paint.height = Math.ceil(height * shrink);
    $("marks").setAttribute("viewBox", `0 0 ${width} ${height}`);
    original = { file, image };
    now = { file, image, about: null, source: null };
    strokes = []; past = []; zoom = 1; at = null;
    $("before").src = image.src;
    $("tools").disabled = false;
    stage.hidden = false;
    show();
    say(`${file.name}, ${width} × ${height}. Paint over what should go, then fill.`);
    paint.focus({ preventScroll: true });
  } catch (error) { say(error.message, true); }
}

// Bring the page in line with `now`, `strokes` and `past`.
function show() {
  const filled = now.about !== null;
  $("after").hidden = !filled;
  if (filled) $("after").src = now.image.src;
  $("result").hidden = !filled;
  $("save").hidden = !filled;
  if (filled) {
    $("save").href = URL.createObjectURL(now.file);
    $("save").download = now.file.name.replace(/(\.[^.]*)?$/, "_filled$1");
    $("compare").value = 0;
    compare();
    $("notes").replaceChildren(...now.about.notes.map((note) => {
      const item = document.createElement("li");
      item.textContent = note;
      return item;
    }));
  }
  $("undo").disabled = past.length === 0;
  mark(null);
  fit();
  redraw();
}

function fit() {
  // The whole picture in the view, no larger than its pixels.
  const across = Math.min($("view").clientWidth, (0.8 * innerHeight * width) / height, width);
  stage.style.width = `${Math.max(80, across) * zoom}px`;
}

function compare() { stage.style.setProperty("--cut", `${$("compare").value}%`); }

// The hole ---------------------------------------------------------------------------------------------------------

function redraw() {
  pen.setTransform(1, 0, 0, 1, 0, 0);
  pen.clearRect(0, 0, paint.width, paint.height);
  pen.setTransform(shrink, 0, 0, shrink, 0, 0);
  for (const stroke of strokes) draw(stroke);
  if (drawing) draw(drawing);
}

function draw(stroke) {
  pen.globalCompositeOperation = stroke.tool === "eraser" ? "destination-out" : "source-over";
  pen.fillStyle = pen.strokeStyle = HOLE;
  if (stroke.tool === "mask") {
    pen.drawImage(stroke.hole, 0, 0, width, height);
  } else if (stroke.tool === "box") {
    const [a, b] = [stroke.points[0], stroke.points.at(-1)];
    pen.fillRect(Math.min(a.x, b.x), Math.min(a.y, b.y), Math.abs(a.x - b.x), Math.abs(a.y - b.y));
  } else {
    pen.lineCap = pen.lineJoin = "round";
    pen.lineWidth = stroke.size;
    pen.beginPath();
    pen.moveTo(stroke.points[0].x, stroke.points[0].y);
    for (const point of stroke.points) pen.lineTo(point.x, point.y);
    pen.stroke();
    // A line without length has no ends to be round.
    pen.beginPath();
    pen.arc(stroke.points[0].x, stroke.points[0].y, stroke.size / 2, 0, 2 * Math.PI);
    pen.fill();
  }
}

const tool = () => document.querySelector("input[name=tool]:checked").value;

function down() {
  if (!now || asked) return;
  drawing = { tool: tool(), size: Number($("size").value), points: [at] };
  redraw();
}

function move(point) {
  at = point;
  if (drawing) { drawing.points.push(point); redraw(); }
  showCursor();
  mark(point);
}

function up() {
  if (!drawing) return;
  remember();
  strokes = [...strokes, drawing];
  drawing = null;
  redraw();
  showCursor();
}

function remember() { past.push({ now, strokes }); $("undo").disabled = false; }

function undo() {
  if (drawing) { drawing = null; return redraw(); }
  if (asked || past.length === 0) return;
  ({ now, strokes } = past.pop());
  show();
  say("Undone.");
}

function showCursor() {
  cursor.hidden = at === null;
  if (at === null) return;
  const scale = stage.clientWidth / width, side = tool() === "box" ? 12 : Number($("size").value) * scale;
  cursor.style.cssText = `left:${at.x * scale}px;top:${at.y * scale}px;width:${side}px;height:${side}px`;
  cursor.className = `${tool() === "box" ? "square" : ""} ${drawing ? "down" : ""}`;
}

// A mask file: white is the hole, as everywhere.
async function takeMask(file) {
  try {
    const image = await shown(file);
    if (image.naturalWidth !== width || image.naturalHeight !== height) {
      throw new Error(`The mask has ${image.naturalWidth} × ${image.naturalHeight} pixels, the photograph ${width} × ${height}.`);
    }
    const hole = document.createElement("canvas");
    [hole.width, hole.height] = [paint.width, paint.height];
    const context = hole.getContext("2d");
    context.imageSmoothingEnabled = false;
    context.drawImage(image, 0, 0, hole.width, hole.height);
    const pixels = context.getImageData(0, 0, hole.width, hole.height), data = pixels.data;
    let marked = 0;
    for (let i = 0; i < data.length; i += 4) {
      const white = Math.max(data[i], data[i + 1], data[i + 2]) > 127;
      data.set([0xe0, 0x24, 0x5e, white ? 255 : 0], i);
      marked += white;
    }
    if (!marked) throw new Error("Nothing in the mask is white: white is the hole.");
    context.putImageData(pixels, 0, 0);
    remember();
    strokes = [...strokes, { tool: "mask", hole }];
    redraw();
    say(`${(100 * marked / (hole.width * hole.height)).toFixed(1)} % of the picture is marked.`);
  } catch (error) { say(error.message, true); }
}

// The hole as a PNG file, white on black; null if nothing is marked.
async function maskFile() {
  const pixels = pen.getImageData(0, 0, paint.width, paint.height), data = pixels.data;
  let marked = false;
  for (let i = 0; i < data.length; i += 4) {
    const white = data[i + 3] > 127;
    data.fill(white ? 255 : 0, i, i + 3);
    data[i + 3] = 255;
    marked ||= white;
  }
  if (!marked) return null;
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [paint.width, paint.height];
  canvas.getContext("2d").putImageData(pixels, 0, 0);
  return new Promise((done) => canvas.toBlob(done, "image/png"));
}

// Filling ----------------------------------------------------------------------------------------------------------

async function fill() {
  if (asked) return asked.abort();
  if (!now) return;
  const mask = await maskFile();
  if (!mask) return say("Nothing is marked: paint over what should go.", true);
  const form = new FormData();
  form.append("photo", now.file, now.file.name);
  form.append("mask", mask, "mask.png");
  if (shrink < 1) form.append("scale_masks", "true");
  asked = new AbortController();
  $("fill").textContent = "Cancel";
  const began = performance.now(), watch = setInterval(progress, 1000);
  say("Filling…");
  try {
    const response = await ask("fill", {
      method: "POST", body: form, signal: asked.signal, headers: { Accept: "multipart/form-data" },
    });
    const answer = await response.formData();
    const about = JSON.parse(answer.get("about"));
    const file = new File([answer.get("picture")], now.file.name, { type: answer.get("picture").type });
    const image = await shown(file);
    remember();
    now = { file, image, about, source: now.image };
    strokes = [];
    show();
    say(`${(100 * about.hole_fraction).toFixed(2)} % filled in ${((performance.now() - began) / 1000).toFixed(1)} s.`);
  } catch (error) {
    say(error.name === "AbortError" ? "Cancelled; the marks are as they were." : error.message, error.name !== "AbortError");
  } finally {
    clearInterval(watch);
    asked = null;
    $("fill").textContent = "Fill";
  }
}

async function progress() {
  try {
    const { here } = await (await ask("state")).json();
    if (asked) say(here > 1 ? `Waiting: ${here} pictures are on their way.` : "Filling…");
  } catch { /* the answer to the picture will say it */ }
}

// Where the texture of the cell at *point* was taken from: marked on the picture, and enlarged beside it.
let markedCell = null;
function mark(point) {
  const about = now && now.about, k = about && about.patch_size;
  const index = about && point ? about.cells.findIndex(([y, x]) => point.y >= y && point.y < y + k && point.x >= x && point.x < x + k) : -1;
  if (markedCell && markedCell.about === about && markedCell.index === index) return;
  markedCell = { about, index };
  if (index < 0) { $("marks").replaceChildren(); return; }
  const box = ([y, x], kind) => {
    const rect = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    for (const [name, value] of Object.entries({ x, y, width: k, height: k, class: kind })) rect.setAttribute(name, value);
    return rect;
  };
  $("marks").replaceChildren(box(about.cells[index], "cell"), ...about.candidates[index].map((corner) => box(corner, "")));
  $("windows").replaceChildren(...about.candidates[index].map(([y, x]) => {
    const canvas = document.createElement("canvas");
    canvas.width = canvas.height = k;
    canvas.title = `from ${x}, ${y}`;
    canvas.getContext("2d").drawImage(now.source, x, y, k, k, 0, 0, k, k);
    return canvas;
  }));
}

// Hands and keys ---------------------------------------------------------------------------------------------------

function pointOf(event) {
  const box = paint.getBoundingClientRect();
  return { x: ((event.clientX - box.left) * width) / box.width, y: ((event.clientY - box.top) * height) / box.height };
}

paint.addEventListener("pointerdown", (event) => {
  if (event.button !== 0) return;
  paint.setPointerCapture(event.pointerId);
  at = pointOf(event);
  down();
  showCursor();
});
paint.addEventListener("pointermove", (event) => {
  const events = event.getCoalescedEvents ? event.getCoalescedEvents() : [];
  for (const one of events.length ? events : [event]) move(pointOf(one));
});
paint.addEventListener("pointerup", up);
paint.addEventListener("pointercancel", up);
paint.addEventListener("pointerleave", () => { if (!drawing) { at = null; showCursor(); } });

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
paint.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  at ??= { x: width / 2, y: height / 2 };
  if (event.key in ARROWS) {
    const step = event.shiftKey ? 1 : Math.max(1, Number($("size").value) / 2);
    const [x, y] = ARROWS[event.key];
    move({ x: Math.min(width, Math.max(0, at.x + step * x)), y: Math.min(height, Math.max(0, at.y + step * y)) });
  } else if (event.key === " ") {
    if (drawing) up(); else down();
    showCursor();
  } else if (event.key === "Escape" && drawing) {
    drawing = null;
    redraw();
  } else return;
  event.preventDefault();
});
paint.addEventListener("blur", up);

document.addEventListener("keydown", (event) => {
  if (!now || event.altKey) return;
  const key = event.key.toLowerCase();
  if ((event.ctrlKey || event.metaKey) && key === "z") { event.preventDefault(); return undo(); }
  if (event.ctrlKey || event.metaKey) return;
  const chosen = { b: "brush", e: "eraser", r: "box" }[key];
  if (chosen) { document.querySelector(`input[value=${chosen}]`).checked = true; showCursor(); }
  if (key === "[" || key === "]") {
    $("size").value = Number($("size").value) * (key === "]" ? 1.25 : 0.8);
    showCursor();
  }
  if (key === "f") fill();
});

$("open").addEventListener("change", () => { if ($("open").files[0]) open($("open").files[0]); $("open").value = ""; });
$("mask").addEventListener("change", () => { if ($("mask").files[0]) takeMask($("mask").files[0]); $("mask").value = ""; });
$("undo").addEventListener("click", undo);
$("fill").addEventListener("click", fill);
$("compare").addEventListener("input", compare);
$("larger").addEventListener("click", () => { zoom = Math.min(8, zoom * 1.5); fit(); });
$("smaller").addEventListener("click", () => { zoom = Math.max(1, zoom / 1.5); fit(); });
addEventListener("resize", () => { if (now) fit(); });

for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    document.body.classList.toggle("dropping", kind === "dragover");
    if (kind === "drop" && event.dataTransfer.files[0]) open(event.dataTransfer.files[0]);
  });
}
document.addEventListener("paste", (event) => { if (event.clipboardData.files[0]) open(event.clipboardData.files[0]); });
