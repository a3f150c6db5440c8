"use strict";
/* Filter, sort and paginate a list. Without this script, everything is shown. */
document.querySelectorAll("[data-browse]").forEach((section) => {
  const list = section.querySelector(".items");
  const items = [...list.children];
  const pageSize = Number(section.dataset.browse);
  const bar = section.querySelector(".filters");
  const count = section.querySelector(".count");
  const pager = section.querySelector(".pager");
  const [previous, next] = pager.querySelectorAll("button");
  let page = 0;

  bar.querySelectorAll("select[data-key]").forEach((select) => {
    const key = select.dataset.key;
    const values = [...new Set(items.map((item) => item.dataset[key]))].filter(Boolean);
    if (select.options.length === 1) values.sort().forEach((value) => select.add(new Option(value, value)));
    select.closest("label").hidden = values.length < 2;
  });

  const fits = (item) => {
    const chosen = [...bar.querySelectorAll("select[data-key]")].every(
      (select) => !select.value || item.dataset[select.dataset.key] === select.value);
    const step = Number(item.dataset.step);
    const bound = (name) => bar.querySelector(`input[data-bound=${name}]`)?.value ?? "";
    return chosen && !(bound("low") !== "" && step < Number(bound("low"))) && !(bound("high") !== "" && step > Number(bound("high")));
  };

  const show = () => {
    const order = bar.querySelector("select[data-order]")?.value;
    const sorted = !order ? items : [...items].sort((a, b) => {
      const [key, sign] = order.split(":");
      const [first, second] = [a.dataset[key], b.dataset[key]];
      if (!first || !second) return (first ? 0 : 1) - (second ? 0 : 1); /* missing ones last */
      return Number(sign) * (Number(first) - Number(second));
    });
    const fitting = sorted.filter(fits);
    const pages = Math.max(1, Math.ceil(fitting.length / pageSize));
    page = Math.min(page, pages - 1);
    const from = page * pageSize;
    list.replaceChildren(...fitting.slice(from, from + pageSize));
    const to = Math.min(from + pageSize, fitting.length);
    count.textContent = fitting.length ? `${from + 1}–${to} of ${fitting.length}` : "no match";
    const focused = document.activeElement;
    previous.disabled = page === 0;
    next.disabled = page >= pages - 1;
    /* a disabled button loses the focus, and the keyboard its place */
    if (focused === next && next.disabled) previous.focus();
    if (focused === previous && previous.disabled) next.focus();
  };
  const turn = (by) => { page += by; show(); section.scrollIntoView({ block: "start" }); };

  bar.hidden = pager.hidden = false;
  bar.addEventListener("input", () => { page = 0; show(); });
  previous.addEventListener("click", () => turn(-1));
  next.addEventListener("click", () => turn(1));
  show();
});
