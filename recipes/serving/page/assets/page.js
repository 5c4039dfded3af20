// One picture at a time: judged when it is chosen, shown to the model when something is asked.

import { events, post, Problem, state } from "./api.js";
import { drawGrids } from "./codes.js";
import { clearVerdict, showVerdict } from "./verdict.js";

const element = (id) => document.getElementById(id);
const SMALL = 200; // pixels of a picture that is shown larger than it is
const MOST_TOKENS = 256;

const nothingYet = element("grids").firstElementChild;

let served = null;
let picture = null; // its data URI
let looking = new AbortController();
let asking = new AbortController();

function say(problem) {
  element("problem").textContent = problem;
  element("problem").hidden = problem === "";
}

// Runs `work`; what goes wrong is told on the page. What was given up is not.
async function told(work) {
  try {
    await work();
  } catch (error) {
    if (error.name === "AbortError") return;
    say(error instanceof Problem ? error.message : `The page failed: ${error.message}`);
  }
}

async function start() {
  served = await state();
  document.title = `${served.model} · vqguard`;
  element("model").textContent = served.model;
  element("map").textContent = `map ${served.map_version.slice(0, 12)}`;
  element("shadow").hidden = !served.shadow;
  element("undefended").hidden = served.undefended === null;
  const which = { control: "the control: trained as long, no guard", base: "the base, no guard" };
  element("kind").textContent = which[served.undefended] ?? "";
}

// -- the picture

function forget() {
  looking.abort();
  asking.abort();
  looking = new AbortController();
  picture = null;
  URL.revokeObjectURL(element("picture").src);
  element("picture").removeAttribute("src");
  element("shown").hidden = true;
  element("drop").hidden = false;
  element("another").hidden = true;
  element("size").textContent = element("distinct").textContent = element("cell").textContent = "";
  element("grids").replaceChildren(nothingYet);
  element("grids").className = "square empty";
  clearVerdict("No picture yet", "none");
  for (const id of ["guarded", "undefended"]) clearAnswer(id);
}

async function choose(files) {
  say("");
  if (files.length === 0) return;
  forget();
  if (files.length > 1) throw new Problem("One picture at a time, please.");
  const [file] = files;
  if (file.size > served.picture_bytes) {
    const megabytes = (bytes) => (bytes / 1e6).toFixed(1);
    throw new Problem(
      `The file is too large: ${megabytes(file.size)} MB, at most ${megabytes(served.picture_bytes)} MB are accepted.`,
    );
  }
  const signal = looking.signal;
  const uri = await dataUri(file);
  preview(file);
  clearVerdict("Judging …", "waiting");
  let reply;
  try {
    const response = await post("picture", { image_url: { url: uri } }, signal);
    reply = await response.json();
  } catch (error) {
    if (!signal.aborted) {
      forget();
      clearVerdict("Not judged", "none");
    }
    throw error;
  }
  picture = uri;
  element("size").textContent = `${reply.width} × ${reply.height} pixels.`;
  showVerdict(reply);
  showCodes(reply);
}

function preview(file) {
  const image = element("picture");
  image.src = URL.createObjectURL(file);
  image.onload = () => {
    const small = Math.max(image.naturalWidth, image.naturalHeight) < SMALL;
    image.parentElement.classList.toggle("small", small);
    // as large as the square allows, whatever its size
    const wide = image.naturalWidth >= image.naturalHeight;
    image.style.width = wide ? "100cqw" : "auto";
    image.style.height = wide ? "auto" : "100cqh";
  };
  element("shown").hidden = false;
  element("drop").hidden = true;
  element("another").hidden = false;
}

async function dataUri(file) {
  const reader = new FileReader();
  await new Promise((done, failed) => {
    reader.onload = done;
    reader.onerror = () => failed(new Problem("The file cannot be read."));
    reader.readAsDataURL(file);
  });
  const kind = /^image\/[a-z0-9.+-]+$/.test(file.type) ? file.type : "image/unknown";
  return `data:${kind};base64,${reader.result.slice(reader.result.indexOf(",") + 1)}`;
}

function showCodes(reply) {
  const codes = reply.grids.flatMap((grid) => grid.codes);
  if (codes.length === 0) {
    element("grids").textContent = "This guard judges alone: pictures are shown as they are.";
    return;
  }
  drawGrids(element("grids"), reply.grids, (text) => {
    element("cell").textContent = text;
    element("distinct").hidden = text !== "";
  });
  const distinct = new Set(codes).size;
  element("distinct").textContent =
    `${codes.length} tokens, ${distinct} different codewords of ${reply.codebook.toLocaleString("en")}.`;
}

// -- the question

function clearAnswer(id) {
  const article = element(id);
  article.querySelector(".said").textContent = "";
  const end = article.querySelector(".end");
  end.textContent = "";
  end.classList.remove("filtered");
}

async function ask() {
  say("");
  asking.abort();
  asking = new AbortController();
  const { signal } = asking;
  const shown = picture === null ? [] : [{ type: "image_url", image_url: { url: picture } }];
  const content = [...shown, { type: "text", text: element("question").value }];
  const body = {
    model: served.model,
    messages: [{ role: "user", content }],
    max_tokens: Math.min(MOST_TOKENS, served.new_tokens),
    stream: true,
  };
  const sides = [["guarded", "../v1/chat/completions"]];
  if (served.undefended !== null) sides.push(["undefended", "undefended"]);
  for (const [id] of sides) clearAnswer(id);
  busy(true);
  try {
    await Promise.all(sides.map(([id, path]) => told(() => answer(id, path, body, signal))));
  } finally {
    if (asking.signal === signal) busy(false);
  }
}

function busy(on) {
  element("send").hidden = on;
  element("stop").hidden = !on;
  if (on) element("stop").focus({ preventScroll: true });
  else if (document.activeElement === document.body) element("question").focus({ preventScroll: true });
}

async function answer(id, path, body, signal) {
  const said = element(id).querySelector(".said");
  const end = element(id).querySelector(".end");
  end.textContent = "…";
  try {
    let ending = null;
    for await (const event of events(await post(path, body, signal))) {
      const choice = event.choices?.[0];
      said.textContent += choice?.delta.content ?? event.piece ?? "";
      ending = choice?.finish_reason ?? event.end ?? ending;
      if (event.guard) element("reason").textContent = JSON.stringify(event.guard, null, 2);
    }
    end.textContent = {
      stop: "",
      length: "Cut at its longest.",
      content_filter: "Refused by the guard (content_filter).",
    }[ending] ?? "The answer broke off.";
    end.classList.toggle("filtered", ending === "content_filter");
  } catch (error) {
    end.textContent = error.name === "AbortError" ? "Stopped." : "Not answered.";
    throw error;
  }
}

// -- the person

element("file").addEventListener("change", (event) => {
  const files = [...event.target.files];
  event.target.value = ""; // the same file may be chosen again
  told(() => choose(files));
});
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dragging");
});
document.addEventListener("dragleave", (event) => {
  if (event.relatedTarget === null) document.body.classList.remove("dragging");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dragging");
  told(() => choose([...event.dataTransfer.files]));
});
document.addEventListener("paste", (event) => {
  const files = [...event.clipboardData.files];
  if (files.length > 0) told(() => choose(files));
});
element("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  told(ask);
});
element("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  element("ask").requestSubmit();
});
element("stop").addEventListener("click", () => asking.abort());

told(start);
