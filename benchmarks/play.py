"""Tokens a second of the page `play`, in a headless Chromium that reaches this machine only.

    make book && python -m benchmarks.play            five runs of 32 greedy tokens
    make book && python -m benchmarks.play --quick    one run, nothing recorded

Once with the headers that lend a page several threads, once without. `seconds` of a token are those
of the engine's step, of handing over its row, and of all, as the page measures them; medians.
"""

import shutil
import statistics
import sys
import threading

from benchmarks.common import ROOT, arguments, load, save

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PLACE = "document.querySelector('.kb-live')"
IDLE = f"""() => {{ const place = {PLACE};
  return place.board.engine && place.board.row && !('busy' in place.dataset); }}"""
WATCH = f"""() => {{
  const {{ core }} = {PLACE}.board.engine;
  globalThis.spent = {{ decode: [], getLogits: [] }};
  for (const name in spent) {{
    const call = core[name].bind(core);
    core[name] = async (...given) => {{
      const since = performance.now(), answer = await call(...given);
      spent[name].push((performance.now() - since) / 1000);
      return answer;
    }};
  }}
  return core.isMultithread(); }}"""
BEGIN = f"""() => {{ {PLACE}.board.text = null;
  {PLACE}.board.take('prompt=Once%20upon%20a%20time&temperature=0'); }}"""


def run(page):
    "Thirty-two tokens: seconds a token of the engine's step, of its row, of all."
    page.evaluate(BEGIN)
    page.wait_for_function(IDLE)
    page.evaluate("() => { for (const name in spent) spent[name] = []; }")
    page.get_by_role("button", name="Run 32", exact=True).click()
    page.wait_for_function(IDLE)
    data = page.evaluate(f"() => ({{ ...{PLACE}.dataset }})")
    spent = page.evaluate("spent")
    parts = [statistics.median(spent[name]) for name in ("decode", "getLogits")]
    return *parts, float(data["seconds"]) / int(data["tokens"])


def measured(browser, site, threads, runs):
    "One row of the record."
    from serve import server

    http = server(site, threads=threads)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    page = browser.new_context().new_page()
    page.set_default_timeout(300_000)
    page.goto(f"http://127.0.0.1:{http.server_port}/play.html")
    page.get_by_role("button", name="Load the model (98 MB)").click()
    page.wait_for_function(IDLE)
    several = page.evaluate(WATCH)
    found = [run(page) for _ in range(runs)]
    decode, row, whole = (statistics.median(column) for column in zip(*found))
    page.context.close()
    http.shutdown()
    out = {
        "headers": threads,
        "several threads": several,
        "tokens a second": round(1 / whole, 1),
        "least": round(1 / max(seconds for *_, seconds in found), 1),
        "seconds": {"step": round(decode, 4), "row": round(row, 4), "all": round(whole, 4)},
    }
    print(out, load(), flush=True)
    return out


def main():
    args = arguments(__doc__, "play.json", dict(runs=5), dict(runs=1))
    path, site = next(filter(None, map(shutil.which, BROWSERS)), None), ROOT / "_site"
    if path is None or not (site / "play/wllama.js").is_file():
        print("no Chromium, or no site with the engine: run `make book` first")
        return
    from playwright.sync_api import sync_playwright

    alone = ["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=alone)
        rows = [measured(browser, site, threads, args.runs) for threads in (True, False)]
        version = browser.version
        browser.close()
    if not args.quick:
        save(args.out, rows=rows, tokens=32, runs=args.runs, browser=f"Chromium {version}")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "tools"))
    main()
