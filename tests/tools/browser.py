"""Opens a page in headless Chromium and tells what went wrong there, and what each chart drew."""

import html
import json
import re
import shutil
import subprocess
from dataclasses import dataclass

import pytest

# Some systems call it so, others so.
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")

_HOOKS = """<script>
window.wrong = [];
for (const name of ["error", "warn"]) {
  const told = console[name];
  console[name] = (...words) => {
    window.wrong.push(name + ": " + words.join(" "));
    told.apply(console, words);
  };
}
window.addEventListener("error", (event) => window.wrong.push("uncaught: " + event.message));
window.addEventListener("unhandledrejection", (event) => window.wrong.push("rejected: " + event.reason));
document.addEventListener("securitypolicyviolation", (event) => {
  window.wrong.push("request: " + event.blockedURI);
});
</script>"""

# Goes through every choice, as a reader would, and tells the frame around it what is there.
_PROBE = """<script>
const pause = (time) => new Promise((resume) => setTimeout(resume, time));
async function drawn() {
  for (let tries = 0; tries < 400; tries++) {
    const waiting = [...document.querySelectorAll(".plot")].some(
      (plot) => plot.offsetParent && !plot.querySelector("svg g.role-mark") && !plot.matches(".broken"));
    if (!waiting) return;
    await pause(25);
  }
}
(async () => {
  const page = document.documentElement, marks = {}, kept = {};
  let widest = 0;
  const smallest = [];
  const chooser = document.getElementById("cell");
  for (const choice of chooser ? [...chooser.options].map((option) => option.value) : [null]) {
    if (choice) { chooser.value = choice; chooser.dispatchEvent(new Event("change")); }
    await drawn();
    for (const plot of document.querySelectorAll(".plot")) {
      if (!plot.offsetParent) continue;
      const found = plot.querySelectorAll("g.role-mark:is(.mark-symbol, .mark-line, .mark-rect) > path");
      marks[plot.dataset.figure] = [...found].filter((mark) => mark.getAttribute("d")).length;
      for (const text of plot.querySelectorAll("svg text")) {
        const scale = text.ownerSVGElement.getScreenCTM().a;
        if (text.textContent) smallest.push(scale * parseFloat(getComputedStyle(text).fontSize));
      }
    }
    for (const box of document.querySelectorAll(".cell:not([hidden]) .tokenbox")) {
      const slider = box.querySelector("input"), tokens = [...box.querySelectorAll("span.t")];
      const seen = [];
      for (const step of [0, Number(slider.max)]) {
        slider.value = step;
        slider.dispatchEvent(new Event("input"));
        tokens[3].dispatchEvent(new PointerEvent("pointerover", {bubbles: true}));
        seen.push({
          when: box.querySelector(".when").textContent,
          which: box.querySelector(".which").textContent,
          hidden: tokens.filter((token) => token.style.visibility === "hidden").length,
          shades: new Set(tokens.map((token) => token.style.background)).size,
        });
      }
      kept[box.dataset.cell] = {text: tokens.map((token) => token.textContent).join(""), seen};
    }
    widest = Math.max(widest, page.scrollWidth - page.clientWidth);
  }
  parent.postMessage({
    wrong: window.wrong, marks, kept, widest, smallest: Math.min(...smallest),
    resources: performance.getEntriesByType("resource").map((entry) => entry.name),
  }, "*");
})();
</script>"""

_FRAME = """<!doctype html><pre id="seen"></pre>
<iframe src="{name}" style="border:0;width:{width}px;height:3000px"></iframe>
<script>
window.addEventListener("message", (event) => {{
  document.getElementById("seen").textContent = JSON.stringify(event.data);
}});
</script>"""


@dataclass(frozen=True)
class Seen:
    """What a browser saw: ``marks`` by chart, ``kept`` by cell, the smallest print in pixels."""

    wrong: list
    marks: dict
    kept: dict
    widest: int
    smallest: float
    resources: list

    @property
    def faults(self):
        """Everything that a page must not have."""
        empty = [f"{name} has no marks" for name, count in self.marks.items() if not count]
        sideways = [f"scrolls sideways by {self.widest} pixels"] if self.widest > 0 else []
        return [*self.wrong, *(f"loads {name}" for name in self.resources), *empty, *sideways]


def open_page(page, folder, width=1280):
    """Open the HTML text of a page in a frame of ``width`` pixels, on a machine without a network."""
    browser = next(filter(None, map(shutil.which, NAMES)), None)
    if browser is None:
        pytest.skip(f"no browser is installed to open the page in; one of {', '.join(NAMES)} is needed")
    # The charts' runtime holds such tags as text: the page's own are the first and the last.
    before, end, after = page.replace("<style>", _HOOKS + "<style>", 1).rpartition("</body>")
    probed = before + _PROBE + end + after
    (folder / "probed.html").write_text(probed, encoding="utf-8")
    (folder / "frame.html").write_text(_FRAME.format(name="probed.html", width=width), encoding="utf-8")
    ran = subprocess.run(
        [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-background-networking",
            "--no-first-run",
            "--host-resolver-rules=MAP * ~NOTFOUND",
            f"--user-data-dir={folder / 'profile'}",
            f"--window-size={max(width, 600)},3000",
            "--virtual-time-budget=30000",
            "--dump-dom",
            (folder / "frame.html").as_uri(),
        ],
        capture_output=True,
        timeout=120,
    )
    told = re.search(r'<pre id="seen">(.+?)</pre>', ran.stdout.decode(), re.DOTALL)
    assert told, ran.stderr.decode()[-2000:]
    return Seen(**json.loads(html.unescape(told[1])))
