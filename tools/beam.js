// Beam search on the page `play`, and what each of its steps did: the same search as the package's
// `beam_search`, and the same words as its `stepper_html`, whose style and script engine.js brings.
(() => {
  const given = globalThis.knobBoard, { make, percent } = given.tools;

  // ---- the search

  // the ids of the n largest values of a row; equal ones by the lower id
  function leading(row, n) {
    const best = [];
    for (let i = 0; i < row.length; i++) {
      if (best.length === n && !(row[i] > row[best[n - 1]])) continue;
      const after = best.findIndex((other) => row[other] < row[i]);
      best.splice(after < 0 ? best.length : after, 0, i);
      best.length = Math.min(best.length, n);
    }
    return best;
  }

  function byIds(one, other) {
    const at = one.ids.findIndex((id, n) => id !== other.ids[n]);
    return at < 0 ? one.ids.length - other.ids.length : one.ids[at] - (other.ids[at] ?? -1);
  }
  const bestFirst = (one, other) => other.total - one.total || byIds(one, other);

  // Keep the `width` best texts at every length; ended ones compete with those that go on.
  // `rowOf(ids)` gives the log-probabilities after new ids. Each step: what is kept, what is cut.
  async function search(rowOf, isEnd, width, limit) {
    const steps = [];
    let running = [{ ids: [], total: 0, ended: false }], ended = [];
    while (running.length && steps.length < limit) {
      const pool = [...ended];
      for (const path of running.sort(byIds)) {     // neighbours share most of what was read
        const row = await rowOf(path.ids);
        for (const id of leading(row, 2 * width)) {
          if (row[id] > -Infinity) pool.push({ ids: [...path.ids, id],
                                               total: path.total + row[id], ended: isEnd(id) });
        }
      }
      pool.sort(bestFirst);
      const kept = pool.slice(0, width);
      steps.push({ kept, cut: pool.slice(width, 2 * width) });
      running = kept.filter((path) => !path.ended);
      ended = kept.filter((path) => path.ended);
    }
    return steps;
  }

  // ---- what it did

  // what is invisible is made visible, and does not turn the line around
  const MARKS = { "\n": "↵", "\t": "⇥", "\r": "␍", "\u200c": "\u200c", "\u200d": "\u200d" };
  const HIDDEN = /[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}]/gu;
  const code = (c) => `‹${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}›`;
  const inLine = (text, most = 60) => {
    const line = [...text.replace(HIDDEN, (c) => MARKS[c] ?? code(c))];
    return line.length <= most ? line.join("") : `…${line.slice(-most).join("")}`;
  };

  function listed(names) {
    const quoted = names.map((name) => `"${name}"`);
    if (quoted.length > 3) return `${quoted.length} texts`;
    return [quoted.slice(0, -1).join(", "), ...quoted.slice(-1)].filter(Boolean).join(" and ");
  }

  // what a step did to the text that wins in the end: its place before (0 at the start) and now
  function standing(name, was, now) {
    if (now === 1) return `"${name}" ${was > 1 ? "overtakes: first place." : "is in front."}`;
    return `"${name}" ${was && was < now ? "falls back to" : was > now ? "moves up to"
      : "waits in"} place ${now}.`;
  }

  function line(path, name, fate, followed) {
    const p = Math.exp(path.total), width = `width:${Number((100 * p).toPrecision(3))}%`;
    return make("li", { class: `${followed ? "dw-w" : ""} ${fate === "cut" ? "dw-d" : ""}` },
      make("i", { "data-p": 2, style: width }), make("b", {}, name), " ",
      make("span", { "data-p": 1 }), " ", make("span", { "data-p": 2 }, percent(p)), " ",
      make("em", { "data-p": 2 }, fate));
  }

  function panel({ kept, cut }, said, name, isFollowed) {
    const fate = (path) => !kept.includes(path) ? "cut" : path.ended ? "kept, ended" : "kept";
    const lines = [...kept, ...cut].map((path) =>
      line(path, name(path.ids), fate(path), isFollowed(path.ids)));
    return make("div", {}, make("ul", { class: "dw-l" }, ...lines),
      ...said.map((sentence, n) => make("p", { "data-p": n + 1, "data-name": "" }, sentence)));
  }

  // The steps as the stepper takes them; `textOf(ids)` is the text of new ids.
  function stepper(steps, prompt, textOf) {
    const name = (ids) => inLine(textOf(ids)), best = steps.at(-1).kept[0];
    const isFollowed = (ids) => ids.every((id, n) => id === best.ids[n]);
    let before = [], was = 0;
    const frames = steps.map((step, n) => {
      const { kept, cut } = step, now = kept.findIndex(({ ids }) => isFollowed(ids)) + 1;
      const going = before.filter((path) => !path.ended).map(({ ids }) => name(ids));
      const over = before.filter((path) => path.ended && [...kept, ...cut].includes(path));
      const said = [
        !n ? `After "${inLine(prompt)}" the model scores every token. These are the best.`
          : (over.length ? `Ended, and competing as before: `
              + `${listed(over.map(({ ids }) => name(ids)))}. ` : "")
            + `Continued with every token: ${listed(going)}. These are the best.`,
        `${kept.length === 1 ? "The best one stays" : `The ${kept.length} best stay`}. `
          + standing(name(best.ids.slice(0, n + 1)), was, now)
          + (n + 1 < steps.length ? "" : ` The search is over: "${name(best.ids)}", `
            + `${percent(Math.exp(best.total))}.`),
      ];
      [before, was] = [kept, now];
      return make("li", { class: "dw-f" }, make("p", {}, `Step ${n + 1}`),
        make("div", { class: "dw-c" }, panel(step, said, name, isFollowed)));
    });
    const style = make("style", {}, given.stepper.style);
    return make("div", { class: "dw", role: "group", "aria-label": "Step by step" }, style,
      make("ol", { class: "dw-o" }, ...frames));
  }

  // Put the stepper there: its script starts all that have not begun.
  function show(place, ...inside) {
    place.replaceChildren(...inside, make("script", {}, given.stepper.script));
  }

  given.beam = { search, show, stepper };
})();
