// What the guard says of a picture, on the page.

const element = (id) => document.getElementById(id);
const number = (value) => value.toFixed(3);

const DONE = {
  none: "Passes",
  report: "Reported",
  warn: "Answered with a warning",
  blank: "Blanked",
  refuse: "Refused",
  raise: "Rejected",
};

export function clearVerdict(text, kind) {
  element("verdict").textContent = text;
  element("verdict").dataset.kind = kind;
  element("why").textContent = "";
  element("scores").hidden = true;
  element("region").hidden = true;
  element("reason").textContent = "null";
}

export function showVerdict(reply) {
  const said = reply.guard.pictures[0];
  const named = said.category ? `: ${said.category.replaceAll("_", " ")}` : "";
  const mark = said.action === "none" ? "✓" : "✕";
  element("verdict").textContent = `${mark} ${DONE[said.action] ?? said.action}${named}`;
  element("verdict").dataset.kind = said.action === "none" ? "good" : "bad";
  element("why").textContent = why(said, reply);
  element("reason").textContent = JSON.stringify(reply.guard, null, 2);
  showScores(reply);
  showRegion(reply.box, said.category ?? "");
}

function why(said, reply) {
  const parts = [];
  if (said.score !== null && said.score !== undefined) {
    parts.push(`${number(said.score)} exceeds ${number(said.threshold)}.`);
  }
  if (said.region && !reply.box) {
    parts.push(`It lies in ${said.region.part} ${said.region.index + 1}.`);
  }
  if (reply.ambiguous) parts.push(`Another program may show another picture: ${reply.ambiguous}.`);
  return parts.join(" ");
}

function showScores(reply) {
  const rows = Object.entries(reply.categories)
    .sort((a, b) => b[1].score - a[1].score)
    .map(([name, score]) => row(name.replaceAll("_", " "), score));
  if (reply.any_category) {
    const all = row("all together", reply.any_category);
    all.classList.add("all");
    rows.unshift(all);
  }
  element("scores").tBodies[0].replaceChildren(...rows);
  element("scores").hidden = rows.length === 0;
}

function row(name, { score, threshold }) {
  const line = document.createElement("tr");
  line.classList.toggle("over", score > threshold);
  const head = document.createElement("th");
  head.scope = "row";
  head.textContent = name;
  const bar = cell("bar");
  const track = part(bar, "track");
  part(track, "fill").style.width = `${100 * Math.min(1, score)}%`;
  part(track, "mark").style.left = `calc(${100 * Math.min(1, threshold)}% - 1px)`;
  const numbers = cell("number");
  numbers.textContent = `${number(score)} ${score > threshold ? ">" : "≤"} ${number(threshold)}`;
  line.append(head, bar, numbers);
  return line;
}

function cell(kind) {
  const made = document.createElement("td");
  made.className = kind;
  return made;
}

function part(parent, kind) {
  const made = document.createElement("div");
  made.className = kind;
  parent.append(made);
  return made;
}

function showRegion(box, category) {
  const region = element("region");
  region.hidden = box === null;
  if (box === null) return;
  region.style.left = `${100 * box.left}%`;
  region.style.top = `${100 * box.top}%`;
  region.style.width = `${100 * (box.right - box.left)}%`;
  region.style.height = `${100 * (box.bottom - box.top)}%`;
  region.classList.toggle("below", box.top < 0.12);
  region.classList.toggle("leftwards", box.left > 0.6);
  region.firstElementChild.textContent = category.replaceAll("_", " ");
}
