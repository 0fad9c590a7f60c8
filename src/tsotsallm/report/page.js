"use strict";
(function () {
  const tip = document.getElementById("tip");
  function show(mark, x, y) {
    tip.textContent = mark.getAttribute("aria-label");
    tip.hidden = false;
    const wide = tip.offsetWidth, high = tip.offsetHeight;
    tip.style.left = Math.max(6, Math.min(x + 12, window.innerWidth - wide - 6)) + "px";
    tip.style.top = (y + high + 20 < window.innerHeight ? y + 14 : Math.max(6, y - high - 10)) + "px";
  }
  function hide() { tip.hidden = true; }
  document.querySelectorAll("svg .tip").forEach(function (mark) {
    const title = mark.querySelector("title");
    if (title) { title.remove(); }        // the page shows tips itself, on touch screens too
    mark.addEventListener("pointerenter", function (event) { show(mark, event.clientX, event.clientY); });
    mark.addEventListener("pointerleave", function (event) { if (event.pointerType === "mouse") { hide(); } });
    mark.addEventListener("focus", function () {
      const box = mark.getBoundingClientRect();
      show(mark, box.right, box.top);
    });
    mark.addEventListener("blur", hide);
  });
  document.addEventListener("keydown", function (event) { if (event.key === "Escape") { hide(); } });
  window.addEventListener("scroll", hide, { passive: true });
  window.addEventListener("beforeprint", function () {
    document.querySelectorAll("details").forEach(function (one) { one.open = true; });
  });
})();
