// The knob board: SmolLM2's next-token rows under temperature, top-k, top-p, min-p and a penalty.
// What is kept and what is drawn comes from draw.js; rows and words from scripts beside this file.
//
// A place for it in a page: <div class="knob-board" data-settings="prompt=capital&top_p=.9"></div>
// Without data-settings the address keeps the settings: board.html#prompt=capital&top_p=.9
// data-knobs="temperature top_p dialect" shows only these knobs, data-rows="12" fewer tokens,
// data-doubt="open" entropy and its map, which are folded in a chapter.
// play.js makes of it the page on which the model itself runs.
(() => {
  const book = globalThis.decodingBook, given = (globalThis.knobBoard ??= {});
  const HERE = document.currentScript.src.replace(/[^/]*$/, "");
  const BUILT = "knob-board-is-built";
  const KNOBS = [
    { name: "temperature", says: "Temperature", min: 0, max: 2, step: 0.05, off: 1,
      fits: (x) => x >= 0 && x <= 1e6, hint: (x) => x === 0 ? "greedy" : x === 1 ? "off" : "" },
    { name: "top_k", says: "Top-k", off: 0, step: 1,
      stops: [0, 1, 2, 3, 4, 5, 7, 10, 15, 20, 30, 40, 50, 75, 100, 200, 500, 1000, 5000],
      fits: (x) => Number.isInteger(x) && x >= 0 && x < 1e9, hint: (x) => x === 0 ? "off" : "" },
    { name: "top_p", says: "Top-p", min: 0.01, max: 1, step: 0.01, off: 1,
      fits: (x) => x > 0 && x <= 1, hint: (x) => x === 1 ? "off" : "" },
    { name: "min_p", says: "Min-p", min: 0, max: 0.5, step: 0.01, off: 0,
      fits: (x) => x >= 0 && x <= 1, hint: (x) => x === 0 ? "off" : "" },
    { name: "repetition_penalty", says: "Repetition penalty", min: 1, max: 2, step: 0.05, off: 1,
      fits: (x) => x > 0 && x <= 1e3, hint: (x) => x === 1 ? "off" : "" },
  ];
  const DIALECTS = {
    "book": ["This book", "Temperature, top-k, top-p, min-p. Equal tokens: the lower id first."],
    "huggingface": ["Hugging Face", "The book's order. All that equal the k-th token stay."],
    "vllm": ["vLLM", "Temperature, min-p, top-k, top-p. All that equal the k-th token stay."],
    "sglang": ["SGLang", "Top-p measures the whole row, even after top-k, and takes one more token "
      + "where the sum is just p. The penalty does not count the prompt."],
    "llama.cpp": ["llama.cpp", "Top-k, top-p, min-p, and temperature last. The penalty counts the "
      + "last 64 tokens."],
  };
  const HEATS = [0, 0.3, 0.5, 0.7, 1, 1.3, 1.6, 2];
  const START = { prompt: "", dialect: "book", seed: "0", draw: 0,
                  ...Object.fromEntries(KNOBS.map(({ name, off }) => [name, off])) };

  // ---- small helpers

  function make(tag, attributes = {}, ...inside) {
    const svg = /^(svg|g|line|circle|text|path|title)$/.test(tag);
    const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag)
      : document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    node.append(...inside);
    return node;
  }

  // one script of data, once
  const asked = {};
  function load(name, file) {
    return (asked[name] ??= new Promise((done, fail) => {
      if (given[name]) return done(given[name]);
      const script = make("script", { src: HERE + file });
      script.onload = () => done(given[name]);
      script.onerror = () => { delete asked[name]; fail(new Error(`${file} could not be read`)); };
      document.head.append(script);
    }));
  }

  async function inflated(text) {
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  }

  // 65536 halves as floats, by their bits
  let halves;
  function floats(bytes) {
    halves ??= Float32Array.from({ length: 65536 }, (_, bits) => {
      const sign = bits >> 15 ? -1 : 1, e = bits >> 10 & 31, m = bits & 1023;
      if (e === 31) return m ? NaN : sign * Infinity;
      return sign * (e ? (1024 + m) * 2 ** (e - 25) : m * 2 ** -24);
    });
    const V = bytes.length / 2;
    return Float32Array.from({ length: V }, (_, i) => halves[bytes[i] << 8 | bytes[V + i]]);
  }

  const rowsRead = {};
  const logitsOf = (name) => (rowsRead[name] ??=
    load(name, `row-${name}.js`).then(inflated).then(floats).catch((error) => {
      delete rowsRead[name];
      throw error;
    }));
  let wordsRead;
  const wordsOf = () => (wordsRead ??= load("words", "words.js").then(inflated)
    .then((bytes) => new TextDecoder().decode(bytes).split("\n")).catch((error) => {
      wordsRead = null;
      throw error;
    }));

  const percent = (p) => p <= 0 ? "0 %" : p < 1e-5 ? "< 0.001 %"
    : p >= 0.9995 && p < 1 ? "> 99.9 %" : `${(100 * p).toFixed(p >= 0.01 ? 1 : 3)} %`;
  const plural = (n, word) => `${n.toLocaleString("en").replace(/,/g, " ")} ${word}${n === 1
    ? "" : "s"}`;
  const NAMES = { "·": "space", "↵": "new line", "⇥": "tab" };
  const spoken = (word) => NAMES[word] ?? (word.replace(/·/g, " ").trim() || "spaces");

  const numberIn = (text) => text.trim() === "" ? NaN : Number(text);
  const mark = (field, good) => good ? field.removeAttribute("aria-invalid")
    : field.setAttribute("aria-invalid", "true");             // an empty value would say false

  // ---- settings, as the address holds them

  function read(text, isPrompt = (name) => given.rows.some((r) => r.name === name)) {
    const wrong = [], out = { ...START };
    for (const [name, value] of new URLSearchParams(text)) {
      const knob = KNOBS.find((k) => k.name === name), x = numberIn(value);
      if (knob ? knob.fits(x) : name === "draw" && Number.isInteger(x) && x >= 0 && x < 2 ** 32) {
        out[name] = x;
      } else if (name === "seed" && /^\d{1,20}$/.test(value) && BigInt(value) < 2n ** 64n) {
        out.seed = String(BigInt(value));
      } else if (name === "dialect" && Object.hasOwn(DIALECTS, value)) out.dialect = value;
      else if (name === "prompt" && isPrompt(value)) out.prompt = value;
      else wrong.push(`${name}=${value}`);
    }
    return [out, wrong];
  }

  function written(state) {
    const said = Object.keys(START).filter((name) => state[name] !== START[name]);
    return said.map((name) => `${name}=${encodeURIComponent(state[name])}`).join("&");
  }

  const settingsOf = (state) => book.dialect(state.dialect, {
    temperature: state.temperature, topK: state.top_k, topP: state.top_p, minP: state.min_p,
    repetitionPenalty: state.repetition_penalty,
  });

  // ---- what is computed of a row

  // the mass of a row of which `filter` kept a part, as it measures that part: after temperature
  const whole = ({ scores, best }) =>
    scores.reduce((sum, s) => s > -Infinity ? sum + book.exp(s - best) : sum, 0);

  // what the kept tokens hold: of the row that is drawn from, and of the model's own
  function shares({ held, mass }, { temperature: T, repetition_penalty: theta }) {
    const heat = T > 1 ? "heated" : T < 1 ? "cooled" : "";
    const made = [theta === 1 ? "" : "penalised", heat].filter(Boolean).join(" and ");
    return made ? `${percent(held)} of the ${made} row, ${percent(mass)} of the row before`
      : `${percent(mass)} of the model's mass`;
  }

  function lawOf(row, logits, state) {
    const settings = settingsOf(state);
    const z = book.penalize(logits, row.ids, row.given, settings);
    const kept = book.filter(z, settings), raw = (row.raw ??= book.filter(logits));
    const order = state.repetition_penalty === 1 ? raw : book.filter(z);
    const before = (i) => Math.exp(raw.scores[i] - raw.best) / raw.mass;
    const stays = new Set(kept.ids);
    const after = (i) => stays.has(i) ? Math.exp(kept.scores[i] - kept.best) / kept.mass : 0;
    const all = kept.ids.length === order.ids.length;
    const mass = all ? 1 : kept.ids.reduce((sum, i) => sum + before(i), 0);
    const held = all || state.temperature === 0 ? 1 : kept.mass / whole(kept);
    return { kept, raw, order: order.ids, before, after, stays, mass, held, row, settings, z,
             doubt: book.measures(kept), doubtBefore: book.measures(raw) };
  }

  const keyOf = (law, state, draw) =>
    ({ seed: BigInt(state.seed), row: 0, position: law.row.ids.length, draw });

  // bins that expect five draws or more: the leading tokens, and all others together
  function bins(law, counts, n) {
    const out = [];
    let rest = { words: "all others", expected: 0, seen: 0, tokens: 0 };
    for (const i of law.kept.ids) {
      const expected = n * law.after(i), seen = counts.get(i) ?? 0;
      if (expected >= 5 && out.length < 14 && !rest.tokens) out.push({ token: i, expected, seen });
      else {
        rest = { ...rest, expected: rest.expected + expected, seen: rest.seen + seen,
                 tokens: rest.tokens + 1 };
      }
    }
    if (rest.tokens && (rest.expected >= 5 || !out.length)) out.push(rest);
    else if (rest.tokens) {
      const last = out.pop();
      out.push({ ...rest, expected: rest.expected + last.expected, seen: rest.seen + last.seen,
                 tokens: rest.tokens + 1 });
    }
    return out;
  }

  // how often a fair draw gives a chi-squared above x: the tail of the law with so many degrees
  function tail(x, degrees) {
    let term = 1, sum = 0;
    if (degrees % 2 === 0) {
      for (let i = 0; i < degrees / 2; i++) {
        sum += term;
        term *= x / 2 / (i + 1);
      }
      return Math.exp(-x / 2) * sum;
    }
    term = Math.sqrt(2 * x / Math.PI);
    for (let i = 1; i < degrees; i += 2) {
      sum += term;
      term *= x / (i + 2);
    }
    return 1 - erf(Math.sqrt(x / 2)) + Math.exp(-x / 2) * sum;
  }

  function erf(x) {
    if (x > 6) return 1;
    let term = x, sum = x;
    for (let n = 1; term > 1e-17 * sum; n++) sum += (term *= 2 * x * x / (2 * n + 1));
    return 2 / Math.sqrt(Math.PI) * Math.exp(-x * x) * sum;
  }

  // ---- one board

  class Board {
    constructor(place) {
      this.place = place;
      this.alone = place.dataset.settings === undefined;      // then the address is its own
      const all = [...KNOBS.map((knob) => knob.name), "dialect"].join(" ");
      this.shown = (place.dataset.knobs || all).split(" ");
      this.rows = Number(place.dataset.rows) || 40;
      this.part = {};
      this.id = `kb${document.querySelectorAll(`.${BUILT}`).length}`;
      place.classList.add(BUILT);
      this.build();
      const address = () => location.hash.slice(1);
      this.take(this.alone ? address() : place.dataset.settings);
      if (this.alone) {
        addEventListener("hashchange", () => {
          if (!address().includes("=")) return;              // a heading of the page
          this.take(address());
          this.place.scrollIntoView();
        });
      }
    }

    // settings from text; what is wrong with them is said and left out
    take(text) {
      const [state, wrong] = read(text.includes("=") ? text : "");
      this.state = { ...state, prompt: state.prompt || given.rows[0].name };
      this.race = this.thousand = this.heats = false;
      if (new URLSearchParams(text).has("draw")) this.race = true;
      this.wrong = wrong.length ? `Not understood, and left out: ${wrong.join(", ")}. ` : "";
      this.refresh();
    }

    // ---- the page

    build() {
      const p = this.part;
      this.place.replaceChildren(
        this.buildText(), this.buildKnobs(),
        p.said = make("p", { class: "kb-said", role: "status" }, "Reading the row …"),
        make("div", { class: "kb-main" }, this.buildTable(), this.buildNumbers()),
        this.buildActions(),
        p.race = make("section", { class: "kb-panel", "aria-label": "The race", hidden: "" }),
        p.heats = make("section", { class: "kb-panel", "aria-label": "The same luck", hidden: "" }),
        p.thousand = make("section", { class: "kb-panel", "aria-label": "A thousand draws",
                                       hidden: "" }),
        this.buildPython());
    }

    buildText() {
      const p = this.part, groups = [make("optgroup", { label: "Prompts" }),
                                     make("optgroup", { label: "Along one text" })];
      for (const row of given.rows) {
        const line = row.text.replace(/\s+/g, " "), end = line.slice(-36);
        const short = end === line ? line : `… ${end.slice(end.indexOf(" ") + 1)}`;
        groups[row.name.startsWith("story") ? 1 : 0].append(
          make("option", { value: row.name }, `${row.kind}: ${short}`));
      }
      p.prompt = make("select", { id: `${this.id}-prompt` }, ...groups);
      p.prompt.addEventListener("change", () => this.change({ prompt: p.prompt.value, draw: 0 }));
      return make("div", { class: "kb-text" },
        make("label", { for: p.prompt.id }, "Text so far"), p.prompt,
        p.text = make("p", { class: "kb-pieces" }));
    }

    buildKnobs() {
      const box = make("div", { class: "kb-knobs" });
      for (const knob of KNOBS) {
        const id = `${this.id}-${knob.name}`, ends = knob.stops
          ? { min: 0, max: knob.stops.length - 1, step: 1 }
          : { min: knob.min, max: knob.max, step: knob.step };
        const range = make("input", { type: "range", id, ...ends });
        const number = make("input", { type: "number", step: knob.stops ? 1 : "any", min: 0,
                                       "aria-label": `${knob.says}, a number`,
                                       inputmode: "decimal" });
        const hint = make("span", { class: "kb-hint" });
        range.addEventListener("input", () => this.change({
          [knob.name]: knob.stops ? knob.stops[range.value] : Number(range.value) }));
        number.addEventListener("input", () => {
          const x = numberIn(number.value);
          mark(number, knob.fits(x));
          if (knob.fits(x)) this.change({ [knob.name]: x }, number);
        });
        number.addEventListener("blur", () => this.showKnobs());
        const all = make("div", { class: "kb-knob" },
          make("div", { class: "kb-top" }, make("label", { for: id }, knob.says), hint), range,
          number);
        all.hidden = !this.shown.includes(knob.name);
        this.part[knob.name] = { range, number, hint };
        box.append(all);
      }
      const [dialect, choices] = this.buildChoices();
      box.append(dialect);
      return make("div", {}, box, this.part.note, choices);
    }

    buildChoices() {
      const p = this.part, id = this.id;
      p.dialect = make("select", { id: `${id}-dialect`, "aria-describedby": `${id}-note` },
        ...Object.entries(DIALECTS).map(([name, [says]]) => make("option", { value: name }, says)));
      p.dialect.addEventListener("change", () => this.change({ dialect: p.dialect.value }));
      p.note = make("p", { class: "kb-note", id: `${id}-note` });
      p.seed = make("input", { type: "text", inputmode: "numeric", id: `${id}-seed`,
                               autocomplete: "off", size: 8 });
      p.seed.addEventListener("input", () => {
        const good = /^\d{1,20}$/.test(p.seed.value) && BigInt(p.seed.value) < 2n ** 64n;
        mark(p.seed, good);
        if (good) this.change({ seed: String(BigInt(p.seed.value)), draw: 0 }, p.seed);
      });
      p.seed.addEventListener("blur", () => this.showKnobs());
      const reset = make("button", { type: "button" }, "All off");
      reset.addEventListener("click", () => this.change({ ...START, prompt: this.state.prompt }));
      const share = make("button", { type: "button" }, "Copy link");
      share.addEventListener("click", () => this.share());
      const dialect = make("div", { class: "kb-knob kb-dialect" },
        make("label", { for: p.dialect.id }, "Cuts as"), p.dialect);
      dialect.hidden = p.note.hidden = !this.shown.includes("dialect");
      return [dialect, make("div", { class: "kb-choices" },
        make("label", { for: p.seed.id }, "Seed"), p.seed, reset, share)];
    }

    buildTable() {
      const p = this.part;
      p.lines = Array.from({ length: this.rows }, () => {
        const line = { name: make("th", { scope: "row" }, "…"), before: make("td", {}, ""),
                       after: make("td", {}, ""), one: make("i"), two: make("i") };
        line.row = make("tr", {}, line.name,
          make("td", { class: "kb-bar", "aria-hidden": "true" }, line.one, line.two), line.before,
          line.after);
        return line;
      });
      const head = ["token", "", "model", "after"].map((word) =>
        word ? make("th", { scope: "col" }, word) : make("td", { "aria-hidden": "true" }));
      return make("div", { class: "kb-bars", tabindex: 0, role: "region",
                           "aria-label": `The ${this.rows} leading tokens, before and after` },
        make("table", {}, make("thead", {}, make("tr", {}, ...head)),
             make("tbody", {}, ...p.lines.map((line) => line.row))));
    }

    buildList(names) {
      const list = make("dl", { class: "kb-numbers" });
      for (const [name, says] of Object.entries(names)) {
        this.part[name] = make("dd", {}, "–");
        list.append(make("div", {}, make("dt", {}, says), this.part[name]));
      }
      return list;
    }

    // entropy and its map wait folded in a chapter, unless it asks for them
    buildNumbers() {
      const open = this.alone || this.place.dataset.doubt ? { open: "" } : {};
      const map = this.part.map = make("svg", { viewBox: "0 0 320 230", role: "img",
        class: "kb-map", "aria-label": "The entropy map" });          // until a row is there
      return make("div", { class: "kb-side" },
        this.buildList({ kept: "kept", mass: "they hold", stages: "filter by filter" }),
        make("details", { class: "kb-doubt", ...open },
          make("summary", {}, "How undecided the row is"),
          this.buildList({ entropy: "entropy", varentropy: "varentropy" }),
          make("p", { class: "kb-note" }, "Entropy: 0 when sure, 1 bit for two equal tokens. "
            + "Varentropy: how far the tokens' surprises are from each other. The map has both."),
          map));
    }

    buildActions() {
      const p = this.part, button = (says, act) => {
        const made = make("button", { type: "button" }, says);
        made.addEventListener("click", act);
        return made;
      };
      p.one = button("Draw one", () => this.drawOne());
      p.many = button("Draw a thousand", () => this.drawMany());
      p.luck = button("The same luck at other temperatures", () => {
        this.heats = true;
        this.change({}, null, p.heats);
      });
      return make("div", { class: "kb-actions" }, p.one, p.many, p.luck);
    }

    buildPython() {
      const p = this.part;
      p.python = make("code");
      const box = make("pre", { tabindex: 0 }, p.python);
      const parts = [make("details", { class: "kb-python" },
                          make("summary", {}, "The same draw in Python"), box)];
      if (!this.alone) {
        p.link = make("a", {}, "This board on a page of its own");
        parts.push(make("p", { class: "kb-note" }, p.link));
      }
      return make("div", {}, ...parts);
    }

    // ---- from controls to settings

    change(what, typing = null, panel = null) {
      this.state = { ...this.state, ...what };
      this.wrong = "";
      if (Object.keys(what).some((name) => name !== "draw")) this.thousand = false;
      if ("prompt" in what && what.draw === 0) this.race = this.heats = false;
      this.typing = typing;
      this.keep();
      if (!this.waiting) {
        this.waiting = true;
        this.fresh = new Promise((done) => requestAnimationFrame(() => {
          this.waiting = false;
          done(this.refresh(panel));
        }));
      }
    }

    // the settings as text: a drawn token belongs to them
    get hash() {
      const draw = this.race ? `draw=${this.state.draw}` : "";
      return [written({ ...this.state, draw: 0 }), draw].filter(Boolean).join("&");
    }

    // and in the address
    keep() {
      if (!this.alone) return;
      const page = location.href.split("#")[0];
      try { history.replaceState(null, "", `${page}${this.hash && "#"}${this.hash}`); }
      catch { /* a frame that has no address */ }
    }

    async share() {
      const page = new URL(this.alone ? location.href : "../board.html", HERE);
      page.hash = this.hash;
      try {
        await navigator.clipboard.writeText(page.href);
        this.say("The link is copied.");
      } catch {
        this.say(`The link: ${page.href}`);
      }
    }

    // at once, and instead of a sentence that was to come
    say(text) {
      clearTimeout(this.saying);
      this.part.said.textContent = text;
    }

    drawOne() {
      const again = this.race;
      this.race = true;
      this.change({ draw: again ? this.state.draw + 1 : this.state.draw }, null, this.part.race);
    }

    // ---- from settings to the page

    get row() { return given.rows.find((r) => r.name === this.state.prompt); }

    async refresh(panel) {
      this.showKnobs();
      this.showText(this.row);
      if (await this.weigh()) this.show(panel);
    }

    // what is kept of this row and drawn from it; whether that is still what is asked for
    async weigh() {
      const wanted = this.state, turn = (this.turn = (this.turn ?? 0) + 1);
      const { row } = this;
      try {
        const law = lawOf(row, row.logits ?? await logitsOf(row.name), wanted);
        const few = !this.race && !this.heats
          && law.order.slice(0, this.rows).every((i) => i in row.leading);
        const words = few ? row.leading : await wordsOf();
        if (turn !== this.turn) return false;
        const drawn = this.race && book.race(law.kept, keyOf(law, wanted, wanted.draw));
        Object.assign(this, { law, words, drawn });
      } catch (error) {
        this.say(`This row could not be shown: ${error.message}.`);
        return false;
      }
      return true;
    }

    show(panel) {
      this.showTable();
      this.showNumbers();
      this.showRace();                    // marks the winner in the table
      this.showHeats();
      this.part.thousand.hidden = !this.thousand;
      this.showPython();
      this.place.dataset.ready = this.hash;
      clearTimeout(this.saying);
      const text = this.sentence();
      this.saying = setTimeout(() => this.say(text), panel ? 0 : 250);
      if (panel) panel.scrollIntoView({ block: "nearest" });
    }

    get drawnIs() { return "Drawn"; }

    sentence() {
      const { law, law: { kept, doubt, after }, drawn: i } = this;
      const word = this.race && spoken(this.words[i]);
      const drawn = this.race ? `${this.drawnIs}: “${word}”, ${percent(after(i))}. ` : "";
      return `${this.wrong}${drawn}${plural(kept.ids.length, "token")} kept: `
        + `${shares(law, this.state)}, ${doubt.entropy.toFixed(2)} bits of entropy.`;
    }

    showKnobs() {
      const { part: p, state } = this;
      for (const knob of KNOBS) {
        const { range, number, hint } = p[knob.name], x = state[knob.name];
        const place = knob.stops && knob.stops.findLastIndex((stop) => stop <= x);
        range.value = knob.stops ? place : x;
        range.setAttribute("aria-valuetext", [x, knob.hint(x)].filter((s) => s !== "").join(", "));
        hint.textContent = knob.hint(x);
        if (this.typing !== number) {
          number.value = x;
          number.removeAttribute("aria-invalid");
        }
      }
      p.prompt.value = state.prompt;
      p.dialect.value = state.dialect;
      p.note.textContent = DIALECTS[state.dialect][1];
      if (this.typing !== p.seed) {
        p.seed.value = state.seed;
        p.seed.removeAttribute("aria-invalid");
      }
      this.typing = null;
    }

    showText(row) {
      const on = this.state.repetition_penalty !== 1;
      const { penaltyWindow = Infinity, countPrompt } = settingsOf(this.state);
      const from = Math.max(row.ids.length - penaltyWindow, countPrompt === "none" ? row.given : 0);
      this.part.text.replaceChildren(
        ...row.pieces.map((piece, n) => make("span", {
          class: (n < row.given ? "kb-given" : "kb-new") + (on && n >= from ? " kb-counts" : ""),
        }, piece)), make("span", { class: "kb-next", "aria-label": "the next token" }, "?"));
    }

    showTable() {
      const { law, words } = this, leading = law.order.slice(0, this.rows);
      const most = Math.max(...leading.map((i) => Math.max(law.before(i), law.after(i))));
      this.part.lines.forEach((line, n) => {
        const i = leading[n], before = law.before(i), after = law.after(i), cut = !law.stays.has(i);
        const name = make(cut ? "s" : "span", {}, words[i]);
        (line.take ?? line.name).replaceChildren(name);
        line.row.className = cut ? "kb-cut" : "";
        line.row.dataset.token = i;
        line.one.style.width = `${100 * before / most}%`;
        line.two.style.width = `${100 * after / most}%`;
        line.before.textContent = percent(before);
        line.after.textContent = cut ? "cut" : percent(after);
      });
    }

    showNumbers() {
      const { part: p, law } = this;
      const both = (a, b, unit) => `${a.toFixed(2)} → ${b.toFixed(2)} ${unit}`;
      p.kept.textContent = `${plural(law.kept.ids.length, "token")}`;
      p.mass.textContent = shares(law, this.state);
      p.entropy.textContent = both(law.doubtBefore.entropy, law.doubt.entropy, "bits");
      p.varentropy.textContent = both(law.doubtBefore.varentropy, law.doubt.varentropy, "bits²");
      p.stages.textContent = law.kept.stages.map(([name, n]) =>
        `${KNOBS.find((knob) => knob.name === name).says.toLowerCase()} leaves ${n}`).join(", ")
        || "none is on";
      this.showMap();
    }

    showMap() {
      const { law, part: p } = this, before = law.doubtBefore, after = law.doubt;
      const x = (h) => 34 + 274 * Math.min(h, 15) / 15, y = (v) => 196 - 178 * Math.min(v, 30) / 30;
      const dot = (d, kind, r) => make("circle", { cx: x(d.entropy).toFixed(1), class: kind, r,
                                                   cy: y(d.varentropy).toFixed(1) });
      const word = (a, b, text, more = {}) => make("text", { x: a, y: b, ...more }, text);
      p.map.setAttribute("aria-label", "The entropy map: entropy from "
        + `${before.entropy.toFixed(1)} to ${after.entropy.toFixed(1)} bits, varentropy from `
        + `${before.varentropy.toFixed(1)} to ${after.varentropy.toFixed(1)} bits squared.`);
      p.map.replaceChildren(
        make("path", { d: "M34 18V196H308", class: "kb-axis" }),
        ...[0, 5, 10, 15].map((h) => word(x(h), 210, h, { "text-anchor": "middle" })),
        ...[0, 10, 20, 30].map((v) => word(29, y(v) + 4, v, { "text-anchor": "end" })),
        word(308, 225, "entropy, bits", { "text-anchor": "end" }),
        word(38, 14, "varentropy, bits²"),
        word(40, 190, "sure"), word(304, 190, "many equals", { "text-anchor": "end" }),
        word(304, 30, "a few, and a long tail", { "text-anchor": "end" }),
        ...given.rows.map((row) => dot(row, "kb-other", 2)),
        make("line", { x1: x(before.entropy), y1: y(before.varentropy), x2: x(after.entropy),
                       y2: y(after.varentropy), class: "kb-way" }),
        dot(before, "kb-was", 5), dot(after, "kb-is", 5));
    }

    // the race of one draw: each token runs its score, then its luck
    showRace() {
      const { part: p, law, state, words } = this;
      p.race.hidden = !this.race;
      if (!this.race) return;
      const key = keyOf(law, state, state.draw), winner = this.drawn;
      const run = (i) => [i, ...book.run(law.kept, key, i)];
      const leading = law.kept.ids.slice(0, 10).map(run);
      if (!leading.some(([i]) => i === winner)) leading.push(run(winner));
      const low = Math.min(...leading.flatMap(([, score, , sum]) => [score, sum])) - 0.2;
      const high = Math.max(...leading.flatMap(([, score, , sum]) => [score, sum])) + 0.2;
      const x = (s) => `${(100 * (s - low) / (high - low)).toFixed(2)}%`;
      const line = ([i, score, luck, sum]) => {
        const y = i === winner ? 3 : 2, rank = law.kept.ids.indexOf(i) + 1;
        const svg = make("svg", { "aria-hidden": "true", height: 22, width: "100%" },
          make("line", { x1: x(score), x2: x(sum), y1: 11, y2: 11, "stroke-width": y,
                         class: luck < 0 ? "kb-back" : "kb-luck" }),
          make("circle", { cx: x(score), cy: 11, r: 4, class: "kb-score" }),
          make("circle", { cx: x(sum), cy: 11, r: 5, class: "kb-sum" }));
        const number = (s) => (s < 0 ? "−" : "") + Math.abs(s).toFixed(2);
        return make("tr", { class: i === winner ? "kb-wins" : "" },
          make("th", { scope: "row" }, words[i], rank > 10 ? ` (no. ${rank})` : ""),
          make("td", { class: "kb-track" }, svg), make("td", {}, number(score)),
          make("td", {}, (luck < 0 ? "" : "+") + number(luck)), make("td", {}, number(sum)));
      };
      const head = ["token", "", "score", "luck", "sum"].map((word) =>
        word ? make("th", { scope: "col" }, word) : make("td"));
      p.race.replaceChildren(
        make("h3", { class: "kb-title" }, "The race: ", make("b", {}, words[winner]), " wins"),
        make("p", { class: "kb-note" }, "Each token starts at its score (ring: logit over "
          + "temperature, the best at 0) and goes as far as its luck, the key's noise, carries it. "
          + `The largest sum is the token. Key: seed ${state.seed}, row 0, position ${
            key.position}, draw ${state.draw}.`),
        make("div", { class: "kb-scroll", tabindex: 0, role: "region", "aria-label": "The runs" },
          make("table", { class: "kb-races" }, make("thead", {}, make("tr", {}, ...head)),
               make("tbody", {}, ...leading.map(line)))));
      for (const { row } of p.lines) {
        if (Number(row.dataset.token) === winner) row.classList.add("kb-drawn");
      }
    }

    // the same key under other temperatures
    showHeats() {
      const { part: p, law, state, words } = this;
      p.heats.hidden = !this.heats;
      if (!this.heats) return;
      const heats = [...new Set([...HEATS, state.temperature])].sort((a, b) => a - b);
      const items = heats.map((T) => {
        const kept = book.filter(law.z, { ...law.settings, temperature: T });
        const i = book.race(kept, keyOf(law, state, state.draw));
        return make("li", T === state.temperature ? { "aria-current": "true" } : {},
          make("span", {}, `T ${T}`), make("b", {}, words[i]),
          make("span", {}, percent(Math.exp(book.logprob(kept, i)))));
      });
      p.heats.replaceChildren(
        make("h3", { class: "kb-title" }, "The same luck at other temperatures"),
        make("p", { class: "kb-note" }, "One key, so one noise for each token: only the scores are "
          + `stretched. Seed ${state.seed}, draw ${state.draw}; press Draw one for other luck.`),
        make("ul", { class: "kb-heats" }, ...items));
    }

    // draws 0 to 999 of the seed, in slices that leave the page alive
    async drawMany() {
      await this.fresh;                     // the row that is asked for, not the one before
      const { law, state, part: p } = this, counts = new Map(), n = 1000;
      const asked = () => written({ ...this.state, draw: 0 }), before = asked();
      if (law?.row !== this.row) return;
      p.many.setAttribute("aria-busy", "true");
      this.say("Drawing a thousand …");
      for (let i = 0, since = performance.now(); i < n; i++) {
        const token = book.race(law.kept, keyOf(law, state, i));
        counts.set(token, (counts.get(token) ?? 0) + 1);
        if (performance.now() - since > 30) {
          await new Promise((done) => setTimeout(done));
          since = performance.now();
        }
        if (asked() !== before) break;
      }
      p.many.removeAttribute("aria-busy");
      this.words = await wordsOf();
      if (asked() !== before) return;
      this.thousand = true;
      this.showThousand(bins(law, counts, n));
      p.thousand.hidden = false;
      p.thousand.scrollIntoView({ block: "nearest" });
    }

    showThousand(found) {
      const { part: p, words } = this;
      const most = 1.02 * Math.max(...found.flatMap((b) => [b.seen, b.expected]));
      const chi = found.reduce((sum, b) => sum + (b.seen - b.expected) ** 2 / b.expected, 0);
      const degrees = found.length - 1, above = degrees ? tail(chi, degrees) : 1;
      const free = `χ² = ${chi.toFixed(2)} with ${plural(degrees, "degree")} of freedom.`;
      const verdict = degrees ? `${free} A fair draw is further from the law in ${
        percent(above)} of all cases.` : "Only one outcome: there is nothing to test.";
      const lines = found.map((b) => {
        const bar = make("i"), mark = make("i", { class: "kb-mark" });
        bar.style.width = `${100 * b.seen / most}%`;
        mark.style.left = `${100 * b.expected / most}%`;
        const name = b.tokens ? `${plural(b.tokens, "token")} more` : words[b.token];
        return make("tr", {}, make("th", { scope: "row" }, name),
          make("td", { class: "kb-bar", "aria-hidden": "true" }, bar, mark),
          make("td", {}, String(b.seen)), make("td", {}, b.expected.toFixed(1)));
      });
      const head = ["token", "", "drawn", "law"].map((word) =>
        word ? make("th", { scope: "col" }, word) : make("td", { "aria-hidden": "true" }));
      p.thousand.replaceChildren(
        make("h3", { class: "kb-title" }, "A thousand draws against the law"),
        make("p", { class: "kb-note" }, `${verdict} `,
             `Keys: seed ${this.state.seed}, draws 0 to 999.`),
        make("table", { class: "kb-counts" }, make("thead", {}, make("tr", {}, ...head)),
             make("tbody", {}, ...lines)));
      Object.assign(p.thousand.dataset, { chi, degrees, above,
                                          seen: JSON.stringify(found.map((b) => b.seen)) });
      this.say(`A thousand drawn. ${verdict}`);
    }

    get rowInPython() {
      return "logits = SmolLM2()(ids).logits.half().float()      # the board's rows are halves";
    }

    showPython() {
      const { state, law } = this, own = KNOBS.filter((k) => state[k.name] !== k.off)
        .map((k) => `, ${k.name}=${state[k.name]}`).join("");
      this.part.python.textContent = [
        "import torch",
        "from decoding_book import Key, Sampler, SmolLM2, draw",
        "from decoding_book.sampler import penalize",
        "",
        `ids = torch.tensor([[${law.row.ids.join(", ")}]])`,
        this.rowInPython,
        `sampler = Sampler.dialect("${state.dialect}"${own})`,
        `z = penalize(logits, sampler, ids, prompt_lengths=${law.row.given})`,
        `key = Key(seed=${state.seed}, row=0, position=${law.row.ids.length}, draw=${state.draw})`,
        "draw(z, sampler, key).ids",
      ].join("\n");
      if (this.part.link) this.part.link.href = `${HERE}../board.html#${this.hash}`;
    }
  }

  // A board in a chapter is built when the reader comes near.
  const build = (place) => load("rows", "rows.js").then(() => { place.board = new Board(place); });
  const near = new IntersectionObserver((seen) => seen.forEach(({ isIntersecting, target }) => {
    if (!isIntersecting) return;
    near.unobserve(target);
    build(target);
  }), { rootMargin: "900px" });
  Object.assign(given, { Board, tools: {
    HERE, KNOBS, START, load, make, percent, plural, read, spoken, wordsOf, written } });
  for (const place of document.querySelectorAll(".knob-board:not(.kb-live)")) {
    if (place.dataset.settings === undefined) build(place);
    else near.observe(place);
  }
})();
