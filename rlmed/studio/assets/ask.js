"use strict";
// The page Ask: files go to the server as they are (their names stay here), views are chosen, the answer is read line by line.
(() => {
  const form = document.getElementById("ask");
  const at = (id) => document.getElementById(id);
  const mostImages = Number(form.dataset.mostImages);
  const views = [];
  let asking = null;
  let numbered = 0;

  const make = (tag, properties = {}, ...children) => {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(properties)) {
      if (name in element && name !== "list") element[name] = value;
      else element.setAttribute(name, value);
    }
    element.append(...children);
    return element;
  };

  const send = async (path, body, signal) => {
    const json = !(body instanceof Blob);
    const answer = await fetch(path, {
      method: "POST", signal, body: json ? JSON.stringify(body) : body,
      headers: { "Content-Type": json ? "application/json" : "application/octet-stream" },
    });
    if (answer.ok) return answer;
    const type = answer.headers.get("Content-Type") || "";
    throw new Error(type.startsWith("application/json") ? (await answer.json()).error : `the server says ${answer.status}`);
  };

  // ---- files

  const problem = (name, text) => at("problems").append(make("li", {}, `${name}: ${text}`));

  const upload = async (input) => {
    const files = Array.from(input.files).filter((file) => !file.name.startsWith("."));
    if (!files.length) return;
    at("problems").replaceChildren();
    at("files").disabled = at("folder").disabled = true;
    const sent = [];
    try {
      for (const [number, file] of files.entries()) {
        at("progress").textContent = `sending file ${number + 1} of ${files.length}`;
        try {
          sent.push({ name: file.webkitRelativePath || file.name, id: (await (await send("/ask/files", file)).json()).id });
        } catch (error) {
          problem(file.name, error.message);
        }
      }
      if (sent.length) {
        at("progress").textContent = "opening";
        const opened = await (await send("/ask/sources", { files: sent.map((file) => file.id) })).json();
        for (const one of opened.problems) problem(sent[one.file].name, one.text);
        for (const source of opened.sources) addView(source, nameOf(source.files.map((place) => sent[place].name)));
      }
    } catch (error) {
      problem("files", error.message);
    } finally {
      at("progress").textContent = "";
      at("files").disabled = at("folder").disabled = false;
      input.value = "";
    }
  };

  // ---- views

  const nameOf = (files) => (files.length === 1 ? files[0] : `${files[0]} and ${files.length - 1} more`);

  const labelled = (text, id, control) => [make("label", { htmlFor: id }, text), control];

  const addView = (source, name, like = null) => {
    if (views.length >= mostImages) {
      problem(name, `a question has at most ${mostImages} images`);
      return;
    }
    const id = `view-${++numbered}`;
    const planes = Object.keys(source.planes);
    const plane = planes.includes("axial") ? "axial" : planes[0];
    const view = like ? { ...like } : {
      source: source.id, plane, index: Math.floor(source.planes[plane] / 2), volume: 0,
      window: source.windows.length ? source.windows[0].name : "", center: 40, width: 400,
    };
    const image = make("img", { alt: "" });
    const said = make("p", { className: "said", role: "alert" });
    const most = Math.max(...Object.values(source.planes));
    const entry = { view, image, source, name, element: null };
    let waiting = null;
    let running = null;

    const draw = async () => {
      if (running) running.abort();
      const mine = (running = new AbortController());
      try {
        const answer = await fetch(`/ask/picture?${new URLSearchParams(view)}`, { signal: mine.signal });
        if (answer.ok) {
          const blob = await answer.blob();
          if (mine.signal.aborted) return;
          URL.revokeObjectURL(image.src);
          image.src = URL.createObjectURL(blob);
          image.alt = most > 1 ? `slice ${view.index + 1}${view.plane && ` ${view.plane}`} of ${name}` : name;
          image.hidden = false;
          said.textContent = "";
        } else refuse((await answer.json()).error);
      } catch (error) {
        if (error.name !== "AbortError") refuse("the server does not answer");
      }
    };
    // no picture is left that would seem to be the one of these values
    const refuse = (text) => {
      URL.revokeObjectURL(image.src);
      image.removeAttribute("src");
      image.alt = "";
      image.hidden = true;
      said.textContent = `Not shown: ${text}`;
    };
    const change = () => {
      clearTimeout(waiting);
      waiting = setTimeout(draw, 40);
    };

    const controls = make("div", { className: "controls" });
    const slider = make("input", { type: "range", id: `${id}-slice`, min: 0, step: 1 });
    const count = make("output", { htmlFor: `${id}-slice` });
    const settle = () => {
      const last = source.planes[view.plane] - 1;
      view.index = Math.min(view.index, last);
      slider.max = last;
      slider.value = view.index;
      count.textContent = `${view.index + 1} of ${last + 1}`;
      slider.setAttribute("aria-valuetext", `slice ${view.index + 1} of ${last + 1}`);
      views.forEach((other) => other.settle());
    };
    if (planes.length > 1) {
      const select = make("select", { id: `${id}-plane` }, ...planes.reverse().map((one) => make("option", { value: one, selected: one === view.plane }, one)));
      select.addEventListener("change", () => {
        view.plane = select.value;
        view.index = Math.floor(source.planes[view.plane] / 2);
        settle();
        change();
      });
      controls.append(...labelled("plane", select.id, select));
    }
    if (most > 1) {
      slider.addEventListener("input", () => {
        view.index = Number(slider.value);
        settle();
        change();
      });
      controls.append(...labelled("slice", slider.id, make("div", { className: "slice" }, slider, count)));
    }
    if (source.volumes > 1) {
      const number = make("input", { type: "number", id: `${id}-volume`, min: 1, max: source.volumes, value: view.volume + 1 });
      number.addEventListener("input", () => {
        view.volume = Math.max(0, Math.min(source.volumes, Math.floor(Number(number.value))) - 1);
        settle();
        change();
      });
      controls.append(...labelled("volume", number.id, number));
    }
    if (source.windows.length) {
      const select = make("select", { id: `${id}-window` }, ...source.windows.map((one) => make("option", { value: one.name, selected: one.name === view.window }, one.label)));
      const two = ["center", "width"].map((what) => {
        const input = make("input", { type: "number", step: "any", value: view[what], "aria-label": `window ${what}` });
        input.addEventListener("input", () => {
          view[what] = input.value === "" ? NaN : Number(input.value);
          change();
        });
        return input;
      });
      const own = make("div", { className: "two", hidden: view.window !== "custom" }, ...two);
      select.addEventListener("change", () => {
        view.window = select.value;
        const preset = source.windows.find((one) => one.name === select.value);
        if (preset.width) two.forEach((input, number) => (input.value = view[["center", "width"][number]] = number ? preset.width : preset.center));
        own.hidden = select.value !== "custom";
        change();
      });
      controls.append(...labelled("window", select.id, make("div", {}, select, own)));
    }
    const remove = make("button", { type: "button", "aria-label": `Remove image ${name}` }, "Remove");
    remove.addEventListener("click", () => {
      const place = views.indexOf(entry);
      views.splice(place, 1);
      entry.element.remove();
      ((views[place] || views[place - 1] || {}).element || at("files")).querySelector?.("button")?.focus();
      number();
    });
    const buttons = make("div", { className: "buttons" }, remove);
    entry.settle = () => {};
    if (most > 1) {
      const more = make("button", { type: "button" }, "Another slice");
      const why = make("span", { className: "note", role: "status" });
      more.addEventListener("click", () => addView(source, name, { ...view, index: unseen(view, source) }));
      entry.settle = () => {
        more.disabled = views.length >= mostImages || unseen(view, source) === null;
        why.textContent = !more.disabled ? "" : views.length >= mostImages ? `a question has at most ${mostImages} images`
          : `all slices${view.plane && ` of this ${view.plane} plane`} are shown`;
      };
      buttons.append(more, why);
    }
    const heading = (entry.heading = make("div", { className: "name" }));
    entry.title = () => (heading.textContent = `${views.indexOf(entry) + 1}. ${name}${source.modality && ` · ${source.modality}`}`);
    entry.element = make("li", { className: "view" }, heading,
      ...source.notes.map((note) => make("p", { className: "note" }, note)),
      make("div", { className: "frame" }, image), said, controls, buttons);
    views.push(entry);
    at("views").append(entry.element);
    settle();
    number();
    draw();
  };

  const number = () => views.forEach((entry) => {
    entry.title();
    entry.settle();
  });

  // the slice nearest to a view's that no view shows, of the same plane and volume; null if all are shown
  const unseen = (view, source) => {
    const same = (other) => ["source", "plane", "volume"].every((one) => other[one] === view[one]);
    const shown = new Set(views.filter((entry) => same(entry.view)).map((entry) => entry.view.index));
    const count = source.planes[view.plane];
    for (let away = 1; away < count; away++) {
      const free = [view.index + away, view.index - away].find((index) => index >= 0 && index < count && !shown.has(index));
      if (free !== undefined) return free;
    }
    return null;
  };

  // ---- question

  const settleTask = () => {
    const task = at("task").value;
    at("for-options").hidden = ["open", "grounding", "report"].includes(task);
    at("options-label").textContent = task === "labels" ? "All possible labels, one a line" : "Options, one a line";
  };

  const question = () => ({
    model: at("model").value,
    question: at("question").value,
    task: at("task").value,
    options: at("for-options").hidden ? [] : at("options").value.split("\n").map((line) => line.trim()).filter(Boolean),
    modality: at("modality").value.trim(),
    temperature: Number(at("temperature").value),
    seed: Number(at("seed").value),
    max_tokens: Number(at("tokens").value),
    blank: at("blank").checked,
    views: views.map((entry) => entry.view),
  });

  // ---- answer

  const SVG = "http://www.w3.org/2000/svg";
  const boxes = (found) => {
    const drawing = document.createElementNS(SVG, "svg");
    drawing.setAttribute("class", "boxes");
    drawing.setAttribute("role", "img");
    drawing.setAttribute("aria-label", `boxes of the answer: ${found.length}`);
    for (const kind of ["halo", "answer"]) {
      for (const [x0, y0, x1, y1] of found) {
        const box = document.createElementNS(SVG, "rect");
        const sides = { x: x0, y: y0, width: x1 - x0, height: y1 - y0 };
        for (const [name, value] of Object.entries(sides)) box.setAttribute(name, `${(100 * value).toFixed(2)}%`);
        box.setAttribute("class", kind);
        drawing.append(box);
      }
    }
    return drawing;
  };

  // what stands in tags is shown without them, also while it is written
  const parts = (text) => {
    const opened = text.replace(/^\s*<think>/, "");
    const end = opened.search(/<\/think>|<answer>/);
    const reasoning = end < 0 ? opened.replace(/<[^<>]{0,8}$/, "") : opened.slice(0, end);
    return reasoning.trim();
  };

  // adds what is new, so that a screen reader says it once
  const write = (element, text) => {
    const shown = element.textContent;
    if (text.startsWith(shown)) {
      if (text.length > shown.length) element.append(text.slice(shown.length));
    } else element.textContent = text;
    element.scrollTop = element.scrollHeight;
  };

  const share = (value) => (value === null ? ["–"] : [make("meter", { min: 0, max: 1, value, "aria-hidden": "true" }), `${(100 * value).toFixed(1)}\u00a0%`]);

  const table = (options) => {
    const after = options.some((one) => one.after !== null);
    const best = options.reduce((one, other) => (other[after ? "after" : "direct"] > one[after ? "after" : "direct"] ? other : one));
    const body = options.map((one) => make("tr", { className: one === best ? "chosen" : "" },
      make("td", {}, `${one.letter}) ${one.text}`), make("td", {}, ...share(one.after)), make("td", {}, ...share(one.direct))));
    const head = ["probability of", "after the reasoning", "without reasoning"].map((text) => make("th", { scope: "col" }, text));
    return make("table", {}, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...body));
  };

  const fresh = (asked) => {
    at("notes").replaceChildren();
    at("failure").hidden = true;
    at("result").hidden = false;
    at("result").scrollIntoView({ block: "start" });
    const sides = {};
    for (const name of ["image", "blank"]) {
      const element = at(`side-${name}`);
      const find = (selector) => element.querySelector(selector);
      sides[name] = { element, text: "", shown: find(".shown"), written: find(".written"), words: find(".words"), explained: find(".explained"), options: find(".options-of-answer") };
      for (const part of ["shown", "written", "words", "explained", "options"]) sides[name][part].replaceChildren();
      element.hidden = name === "blank" && !(asked.blank && asked.views.length);
      for (const entry of views) {
        const copy = make("img", { src: entry.image.src, alt: name === "blank" ? "a grey picture of the same size" : entry.image.alt });
        if (name === "blank") copy.className = "grey";
        const caption = views.length > 1 ? [make("figcaption", {}, entry.heading.textContent)] : [];
        sides[name].shown.append(make("figure", {}, copy, ...caption));
      }
    }
    return sides;
  };

  const follow = (event, sides) => {
    const side = sides[event.side];
    if (event.state) at("state").textContent = `${event.state} …`;
    if (event.note) at("notes").append(make("p", { className: "warning" }, event.note));
    if (event.error) {
      at("failure").textContent = event.error;
      at("failure").hidden = false;
    }
    if ("keep" in event) {
      side.text = side.text.slice(0, event.keep) + event.text;
      write(side.written, parts(side.text));
    }
    if (event.answer) {
      const { words, explained, boxes: found, finish_reason: ending, reasoning } = event.answer;
      write(side.written, reasoning ?? side.text);
      side.words.textContent = `Answer: ${words}`;
      side.explained.textContent = [explained, ending === "length" ? "cut at the most tokens" : ""].filter(Boolean).join("; ");
      if (found.length) side.shown.firstElementChild?.append(boxes(found));
    }
    if (event.options) side.options.replaceChildren(make("div", { className: "scroll" }, table(event.options)));
  };

  const ask = async () => {
    if (asking) return;
    asking = new AbortController();
    at("submit").disabled = true;
    at("stop").disabled = false;
    at("state").textContent = "sending …";
    const asked = question();
    const sides = fresh(asked);
    let ended = "";
    try {
      const reader = (await send("/ask/answer", asked, asking.signal)).body.pipeThrough(new TextDecoderStream()).getReader();
      let rest = "";
      for (;;) {
        const { value, done } = await reader.read();
        if (done) break;
        const lines = (rest + value).split("\n");
        rest = lines.pop();
        for (const line of lines) {
          const event = JSON.parse(line);
          if (event.done) ended = "done";
          if (event.error) ended = "failed";
          follow(event, sides);
        }
      }
      if (!ended) follow({ error: "the answer broke off: is the studio still running?" }, sides);
    } catch (error) {
      if (error.name === "AbortError") ended = "stopped";
      else follow({ error: error.message }, sides);
    } finally {
      asking = null;
      at("submit").disabled = false;
      at("stop").disabled = true;
      at("state").textContent = ended;
    }
  };

  for (const id of ["files", "folder"]) at(id).addEventListener("change", () => upload(at(id)));
  at("task").addEventListener("change", settleTask);
  at("stop").addEventListener("click", () => asking?.abort());
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    ask();
  });
  settleTask();
})();
