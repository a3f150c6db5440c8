// All pages work without this file. With it, a running run's page stays up to date.
"use strict";

const EVERY_MS = 3000;
const SLOW_MS = 15000;

function ago(date) {
  const seconds = Math.max(0, (Date.now() - date) / 1000);
  if (seconds < 90) return `${Math.round(seconds)} s ago`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min ago`;
  if (seconds < 129600) return `${Math.round(seconds / 3600)} h ago`;
  return `${Math.round(seconds / 86400)} days ago`;
}

function tellTimes(root) {
  for (const time of root.querySelectorAll("time[datetime]")) {
    const date = new Date(time.dateTime);
    time.textContent = ago(date);
    time.title = date.toLocaleString();
  }
}

// Replaces the content; what the reader has opened, checked, scrolled or focused stays so.
function replaceContent(part, text) {
  const fresh = new DOMParser().parseFromString(text, "text/html");
  const open = [...part.querySelectorAll("details")].map((details) => details.open);
  const checked = new Set([...part.querySelectorAll("input:checked")].map((input) => input.value));
  const focused = part.contains(document.activeElement) ? document.activeElement : null;
  const label = focused && (focused.getAttribute("aria-label") || focused.textContent);
  part.replaceChildren(...fresh.body.childNodes);
  part.querySelectorAll("details").forEach((details, i) => { details.open = open[i] || false; });
  part.querySelectorAll("input[type=checkbox]").forEach((input) => { input.checked = checked.has(input.value); });
  if (label) {
    const again = [...part.querySelectorAll(focused.tagName)].find(
      (element) => (element.getAttribute("aria-label") || element.textContent) === label);
    if (again) again.focus({ preventScroll: true });
  }
  tellTimes(part);
}

// Said aloud when a run starts, stops or ends, not at every step.
function tellState() {
  const said = document.querySelector("[data-said]");
  const state = document.querySelector(".progress .state");
  if (!said || !state || said.dataset.said === state.textContent) return;
  if (said.dataset.said) said.textContent = document.querySelector(".progress p").textContent.replace(/started.*/s, "").trim();
  said.dataset.said = state.textContent;
}

function keepFresh(part) {
  let tag = part.dataset.tag || "";
  async function look() {
    if (!document.hidden) {
      try {
        const answer = await fetch(part.dataset.live, { headers: { "If-None-Match": tag }, cache: "no-store" });
        if (answer.status === 200) {
          tag = answer.headers.get("ETag") || "";
          replaceContent(part, await answer.text());
          tellState();
        }
      } catch (error) {
        // the studio has ended, or is starting again: ask later
      }
    }
    tellTimes(document);
    setTimeout(look, "slow" in part.dataset ? SLOW_MS : EVERY_MS);
  }
  setTimeout(look, EVERY_MS);
}

function switchTheme(form) {
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const to = event.submitter.value;
    document.documentElement.dataset.theme = to;
    await fetch(`/theme?to=${to}&back=/assets/icon.svg`);
  });
}

// Nearest point of a curve to a step.
function nearest(points, step) {
  return points.reduce((best, point) => (Math.abs(point[0] - step) < Math.abs(best[0] - step) ? point : best), points[0]);
}

// Beside the pointer: the step under it, and each curve's value there.
function tellValues(event) {
  const figure = event.target.closest("figure[data-curves]");
  document.querySelectorAll(".readout, .cursor").forEach((old) => old.remove());
  const svg = figure && figure.querySelector("svg");
  if (!svg) return;
  const { span, place, curves } = JSON.parse(figure.dataset.curves);
  const box = svg.getBoundingClientRect();
  const share = ((event.clientX - box.left) / box.width - place[0]) / (place[1] - place[0]);
  if (share < 0 || share > 1 || event.clientY < box.top) return;
  const step = nearest(Object.values(curves).flat(), span[0] + share * (span[1] - span[0]))[0];
  const x = place[0] + ((step - span[0]) / (span[1] - span[0])) * (place[1] - place[0]);
  const line = document.createElementNS("http://www.w3.org/2000/svg", "line");
  const [, , width, height] = svg.getAttribute("viewBox").split(" ").map(Number);
  for (const [name, value] of Object.entries({ x1: x * width, x2: x * width, y1: 0, y2: 0.84 * height })) line.setAttribute(name, value);
  line.setAttribute("class", "cursor");
  svg.append(line);
  const note = document.createElement("div");
  note.className = "readout";
  note.append(Object.assign(document.createElement("b"), { textContent: `step ${Math.round(step)}` }));
  const many = Object.keys(curves).length > 1;
  for (const [label, points] of Object.entries(curves)) {
    note.append(Object.assign(document.createElement("div"), { textContent: `${many ? `${label} ` : ""}${nearest(points, step)[1]}` }));
  }
  figure.append(note);
  const room = figure.getBoundingClientRect();
  const left = box.left - room.left + x * box.width;
  note.style.top = `${box.top - room.top + 8}px`;
  note.style.left = `${Math.max(4, left + 12 + note.offsetWidth > room.width ? left - 12 - note.offsetWidth : left + 12)}px`;
}

document.addEventListener("pointermove", tellValues, { passive: true });
document.querySelectorAll("[data-live]").forEach(keepFresh);
document.querySelectorAll("form.theme").forEach(switchTheme);
document.querySelectorAll("select[name=sort]").forEach((select) => {
  select.addEventListener("change", () => select.form.requestSubmit());
});
tellTimes(document);
tellState();
