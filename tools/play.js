// The model alive on the page: SmolLM2 in WebAssembly (wllama, that is llama.cpp), the book's own
// draw on its rows. board.js shows a step's row, cuts and race: its Board is extended here.
//
// A place for it: <div class="knob-board kb-live"></div>. The address keeps prompt and settings.
(() => {
  const given = globalThis.knobBoard, book = globalThis.decodingBook, { Board, beam } = given;
  const { HERE: BOARD, KNOBS, START, load, make, percent, plural, read, spoken, written } =
    given.tools;
  const HERE = document.currentScript.src.replace(/[^/]*$/, "");
  const PROMPT = "Once upon a time", CONTEXT = 1024, MOST = 256, RUN = 32, BEAM = 8;
  const KEPT = "decoding-book-model";               // the name of the browser's own store
  const DECODERS = {
    "Greedy": { temperature: 0 },
    "Sampling: the model's own law": {},
    "Top-k 40": { top_k: 40 },
    "Top-p .9": { top_p: 0.9 },
    "Temperature 0.7, top-p .9": { temperature: 0.7, top_p: 0.9 },
    "Temperature 1.5, min-p .1": { temperature: 1.5, min_p: 0.1 },
  };
  const OFF = Object.fromEntries(KNOBS.map(({ name, off }) => [name, off]));
  const megabytes = (n) => `${Math.round(n / 1e6)} MB`;
  const button = (says, act, more = {}) => {
    const made = make("button", { type: "button", ...more }, says);
    made.addEventListener("click", act);
    return made;
  };

  // ---- the model's file: from the browser's own store, or from beside the page

  const address = () => `${HERE}${given.engine.model}?${given.engine.digest}`;
  const store = async () => { try { return await caches.open(KEPT); } catch { return null; } };

  async function heldFile() {
    const found = await (await store())?.match(address());
    const file = found && await found.blob();
    return file?.size === given.engine.bytes ? file : null;
  }

  async function loadedFile(progress) {
    const answer = await fetch(address()), parts = [];
    if (!answer.ok) throw new Error(`the model's file is not there (${answer.status})`);
    const reader = answer.body.getReader();
    for (let n = 0, piece; !(piece = await reader.read()).done;) {
      parts.push(piece.value);
      progress(n += piece.value.length);
    }
    const file = new Blob(parts), kept = await store();
    if (file.size !== given.engine.bytes) throw new Error("the model's file is not whole");
    try {
      for (const old of await kept?.keys() ?? []) await kept.delete(old);
      await kept?.put(address(), new Response(file));
    } catch { /* no room: then it is loaded again next time */ }
    return file;
  }

  // ---- the engine: ids in, a row of log-probabilities out

  class Engine {
    static async of(file) {
      const { Wllama } = await import(`${HERE}wllama.js`), quiet = () => {};
      const engine = new Engine();
      engine.held = [];                             // the ids whose keys and values it keeps
      engine.pieces = {};
      engine.core = new Wllama(
        { "single-thread/wllama.wasm": `${HERE}single.wasm`,
          "multi-thread/wllama.wasm": `${HERE}multi.wasm` },
        { suppressNativeLog: true, logger: { debug: quiet, log: quiet, warn: quiet,
                                             error: quiet } });
      await engine.core.loadModel([file], { n_ctx: CONTEXT });
      return engine;
    }

    encode(text) { return this.core.tokenize(text); }
    isEnd(token) { return this.core.isTokenEOG(token); }

    async bytes(token) { return (this.pieces[token] ??= await this.core.detokenize([token])); }

    // The row after `ids`. The first `prompt` of them are always read in one go and the others one
    // at a time, so equal ids give equal rows, bit for bit, whatever was read before.
    async row(ids, prompt) {
      const { core, held } = this;
      let n = 0;
      while (n < held.length && n < ids.length - 1 && held[n] === ids[n]) n++;
      this.held = [];                               // nothing is sure if this fails
      if (n < prompt) {
        await core.kvClear();
        n = 0;
      } else if (n < held.length) await core.kvRemove(n, -1);
      for (let end; n < ids.length; n = end) {
        end = n < prompt ? prompt : n + 1;
        await core.decode(ids.slice(n, end), {});
      }
      const found = await core.getLogits(-1), row = new Float32Array(found.length).fill(-Infinity);
      for (const { token, p } of found) if (p > 0) row[token] = book.log(p);
      this.held = ids.slice();
      return row;
    }
  }

  // ---- the page

  class Play extends Board {
    // before the model is there: what it costs, or why it cannot be
    build() {
      const p = this.part;
      this.points = [];                             // the row of each step so far, the newest last
      p.intro = make("div", { class: "kb-load" });
      p.said = make("p", { class: "kb-said", role: "status" });
      p.body = make("div", { hidden: "" });
      this.place.replaceChildren(p.intro, p.body);
      p.body.append(
        this.buildText(), this.buildActions(), p.said,
        make("div", { class: "kb-main" }, this.buildTable(), this.buildNumbers()),
        this.buildKnobs(),
        p.race = make("section", { class: "kb-panel", "aria-label": "The race", hidden: "" }),
        p.search = make("section", { class: "kb-panel", "aria-label": "Beam search", hidden: "" }),
        this.buildPython());
      p.heats = make("section");                    // the board's panels that have no place here
      p.thousand = make("section");
      this.offer();
    }

    async offer() {
      if (!given.engine) {
        return this.cannot("This site was built without the engine, for npm or the network was "
          + "not there.");
      }
      if (location.protocol === "file:") {
        return this.cannot("A page that was opened from a file may not load a model: type ",
          make("code", {}, "make serve"), " in the book's folder and open the address that it "
          + "names.");
      }
      const held = await heldFile().catch(() => null);
      const size = megabytes(given.engine.bytes), p = this.part;
      p.load = button(held ? "Start the model" : `Load the model (${size})`, () => this.start());
      p.intro.replaceChildren(p.load, make("p", { class: "kb-note" }, held
        ? `This browser has kept the model (${size}): nothing large is loaded. `
        : `The model's file has ${size}; this browser keeps it for your next visit. What you type `
          + "stays on this machine."));
      if (held) p.intro.lastChild.append(button("Forget it", () => this.forget()));
    }

    cannot(...why) {
      this.part.intro.replaceChildren(make("p", { class: "kb-said", role: "status" }, ...why,
        " ", make("a", { href: `${BOARD}../board.html` }, "The knob board"),
        " shows recorded rows instead."));
    }

    async forget() {
      await caches.delete(KEPT);
      await this.offer();
      this.part.load.focus();
    }

    async start() {
      const p = this.part, { bytes } = given.engine;
      const bar = make("progress", { max: bytes, value: 0, "aria-label": "The model's file" });
      const said = make("p", { class: "kb-note", role: "status" }, "Loading …");
      const count = make("p", { class: "kb-note", "aria-hidden": "true" });   // the bar says it
      p.intro.replaceChildren(bar, said, count);
      try {
        const file = await heldFile().catch(() => null) ?? await loadedFile((n) => {
          bar.value = n;
          count.textContent = `${Math.round(n / 1e6)} of ${megabytes(bytes)}`;
        });
        count.remove();
        bar.removeAttribute("value");
        said.textContent = "The model is being prepared …";
        this.engine = await Engine.of(file);
        await load("rows", "rows.js");
      } catch (error) {
        this.cannot(`The model could not be started in this browser: ${error.message}.`);
        return;
      }
      p.intro.hidden = true;
      p.body.hidden = false;
      await this.act(() => this.begin());
      p.step.focus();
    }

    buildText() {
      const p = this.part;
      p.prompt = make("textarea", { id: `${this.id}-prompt`, rows: 2, spellcheck: "false" });
      p.prompt.addEventListener("input", () => {
        this.state.prompt = p.prompt.value;
        this.keep();
      });
      p.prompt.addEventListener("keydown", (event) => {
        if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) p.begin.click();
      });
      p.begin = button("Begin", () => this.act(() => this.begin()));
      p.text = make("p", { class: "kb-pieces", tabindex: 0, role: "region",
                           "aria-label": "The text so far" });
      p.text.addEventListener("click", ({ target }) => {
        const at = target.closest("[data-at]")?.dataset.at;
        if (at) this.act(() => this.back(Number(at)));
      });
      return make("div", { class: "kb-text" }, make("label", { for: p.prompt.id }, "Prompt"),
        make("div", { class: "kb-prompt" }, p.prompt, p.begin), p.text);
    }

    buildActions() {
      const p = this.part;
      p.step = button("Step", () => this.act(() => this.step()));
      p.run = button(`Run ${RUN}`, () => this.running ? (this.running = false) : this.run());
      p.back = button("Back", () => this.act(() => this.back(this.points.length - 2)));
      p.beam = button("Beam search", () => this.act(() => this.searchOn()));
      p.width = make("select", { id: `${this.id}-width` },
        ...[1, 2, 3, 4].map((width) => make("option", width === 3 ? { selected: "" } : {}, width)));
      return make("div", { class: "kb-actions" }, p.step, p.run, p.back, p.beam,
        make("label", { for: p.width.id }, "of width"), p.width);
    }

    // each token's name is a button that takes it
    buildTable() {
      const table = super.buildTable(), p = this.part;
      for (const line of p.lines) {
        line.take = button("", () => this.act(() => this.accept(Number(line.row.dataset.token))),
                           { class: "kb-take", title: "Take this token" });
        line.name.replaceChildren(line.take);
      }
      return table;
    }

    buildKnobs() {
      const p = this.part, id = `${this.id}-decoder`;
      const names = [...Object.keys(DECODERS), "Your own knobs"];
      p.decoder = make("select", { id },
        ...names.map((says) => make("option", { value: says }, says)));
      p.decoder.addEventListener("change", () =>
        this.change({ ...OFF, ...DECODERS[p.decoder.value] }));
      return make("div", { class: "kb-decoder" }, make("div", { class: "kb-text" },
        make("label", { for: id }, "Decoder"), p.decoder), super.buildKnobs());
    }

    // ---- what happens

    // one thing at a time; what goes wrong is said; whether it went well
    async act(what) {
      if (this.busy) return false;
      this.busy = true;
      this.place.dataset.busy = "";
      try {
        await (this.doing = what());
        return true;
      } catch (error) {
        this.say(`That failed: ${error.message}.`);
        return false;
      } finally {
        this.busy = false;
        delete this.place.dataset.busy;
      }
    }

    // whether there is a text of the prompt that stands there: begun now if it was not
    async ready() {
      return this.row && this.text === this.state.prompt ? true : this.begin();
    }

    async begin() {
      const text = this.state.prompt, ids = await this.engine.encode(text);
      if (!ids.length) return this.say("Type a prompt first.");
      if (ids.length > CONTEXT - MOST) {
        return this.say(`The prompt has ${plural(ids.length, "token")}; ${CONTEXT - MOST} fit.`);
      }
      this.say("Reading the prompt …");
      this.points = [await this.point(ids, ids.length)];
      this.text = text;
      this.part.search.hidden = true;               // it looked ahead from another text
      await this.refresh();
      return true;
    }

    // a point in the text: what the board calls a row
    async point(ids, prompt) {
      const bytes = await Promise.all(ids.map((i) => this.engine.bytes(i)));
      const logits = await this.engine.row(ids, prompt);
      return { ids, given: prompt, bytes, logits, leading: {} };
    }

    // the token that wins the race, or one taken by hand
    async accept(token) {
      const { row } = this;
      if (this.law?.row !== row) await this.weigh();
      if (this.law?.row !== row) throw new Error("this row has not been read");
      const { drawn } = this;
      token ??= drawn;
      if (row.ids.length - row.given >= MOST) return this.say(`${MOST} new tokens are all here.`);
      const p = this.law.before(token), coming = this.point([...row.ids, token], row.given);
      await this.showLate();                        // while the engine is at work
      const next = await coming;
      delete row.raw;                               // made again if one comes back
      Object.assign(row, { took: token, share: p, byHand: token !== drawn });
      this.points.push(next);
      if (!this.running) return this.refresh();
      this.showText(next);
      this.late = await this.weigh();
    }

    // In a run a row's table and race are drawn when the next row has been ordered.
    async showLate() {
      if (!this.late) return;
      await new Promise((done) => setTimeout(done));
      this.show();
      this.late = false;
    }

    async step() {
      if (this.text !== this.state.prompt || !this.row) await this.begin();
      else await this.accept();
    }

    async run() {
      if (this.busy) return;
      const p = this.part, since = performance.now();
      let n = 0;
      this.running = true;
      p.run.textContent = "Stop";
      const fine = await this.act(async () => {
        for (let end = !await this.ready(), had; this.running && n < RUN && !end; n++) {
          had = this.points.length;
          end = this.engine.isEnd(this.drawn);
          await this.accept();
          if (this.points.length === had) break;
        }
        await this.showLate();
      });
      const seconds = (performance.now() - since) / 1000;
      this.running = false;
      p.run.textContent = `Run ${RUN}`;
      if (!n || !fine) return;
      this.say(`${plural(n, "token")} in ${seconds.toFixed(1)} s, ${(n / seconds).toFixed(1)} a `
        + `second. ${this.sentence()}`);
      Object.assign(this.place.dataset, { tokens: n, seconds });
    }

    // the next tokens by beam search on the model's own law, to step through; the text stays
    async searchOn() {
      if (!await this.ready()) return;
      const { engine } = this, { ids, given: prompt } = this.row;
      const width = Number(this.part.width.value);
      const limit = Math.min(BEAM, CONTEXT - ids.length);
      if (!limit) return this.say(`${CONTEXT} tokens are all that the engine holds.`);
      let n = 0;
      const steps = await beam.search((more) => {
        this.say(`Beam search: row ${++n} of at most ${1 + width * (limit - 1)} …`);
        return engine.row([...ids, ...more], prompt);
      }, (token) => engine.isEnd(token), width, limit);
      const paths = steps.flatMap(({ kept, cut }) => [...kept, ...cut]);
      const tokens = new Set([...ids, ...paths.flatMap((path) => path.ids)]), bytes = {};
      for (const token of tokens) bytes[token] = [...await engine.bytes(token)];
      const textOf = (some) => new TextDecoder().decode(
        Uint8Array.from(some.flatMap((token) => bytes[token])));
      this.searched = { ids, width, limit, steps };
      this.part.search.hidden = false;
      const title = make("h3", { class: "kb-title" }, `Beam search of width ${width}`);
      beam.show(this.part.search, title, beam.stepper(steps, textOf(ids), textOf));
      this.part.search.scrollIntoView({ block: "nearest" });
      this.say(`Beam search: ${plural(steps.length, "step")}, ${plural(n, "row")}.`);
    }

    async back(at) {
      if (at < 0 || at >= this.points.length) return;
      this.points.length = at + 1;
      await this.refresh();
    }

    // ---- what the board asks

    get row() { return this.points.at(-1); }
    get drawnIs() { return "Next"; }
    get hash() { return written({ ...this.state, draw: 0 }); }
    get rowInPython() {
      return 'logits = SmolLM2(weights="q4")(ids).logits.log_softmax(-1)    # near the page\'s row';
    }

    // settings from the address
    take(text) {
      const [state, wrong] = read(text.includes("=") ? text : "", () => true);
      this.state = { ...state, prompt: state.prompt || PROMPT, draw: 0 };
      this.race = true;
      this.wrong = wrong.length ? `Not understood, and left out: ${wrong.join(", ")}. ` : "";
      if (!this.engine || this.text === this.state.prompt) return this.refresh();
      this.running = false;                         // a run on the former text ends
      this.showKnobs();
      Promise.resolve(this.doing).catch(() => {}).then(() => this.act(() => this.begin()));
    }

    async refresh(panel) {
      if (this.row) await super.refresh(panel);
      else this.showKnobs();
    }

    showKnobs() {
      super.showKnobs();
      const same = ([, knobs]) => KNOBS.every(({ name, off }) =>
        this.state[name] === (knobs[name] ?? off));
      this.part.decoder.value = Object.entries(DECODERS).find(same)?.[0] ?? "Your own knobs";
    }

    // the text: a shade for each new token's surprisal, a mark for one taken by hand
    showText({ ids, given: prompt, bytes }) {
      const words = new TextDecoder();
      const piece = (i, n) => {
        const text = words.decode(bytes[n], { stream: true }) || "…";
        if (n < prompt) return make("span", { class: "kb-given" }, text);
        const { share, byHand } = this.points[n - prompt], bits = -Math.log2(share);
        const span = make("span", {
          class: `kb-new${byHand ? " kb-hand" : ""}`, "data-at": n - prompt,
          title: `${percent(share)}, ${bits.toFixed(1)} bits${byHand ? ", taken by hand" : ""}: `
            + "go back to here" }, text);
        span.style.setProperty("--bits", `${Math.min(40, 4 * bits).toFixed(0)}%`);
        return span;
      };
      this.part.text.replaceChildren(...ids.map(piece), make("span", {
        class: "kb-next", "aria-label": "the next token" }, "?"));
      this.part.text.scrollTop = this.part.text.scrollHeight;
      this.part.back.setAttribute("aria-disabled", this.points.length < 2);
    }
  }

  for (const place of document.querySelectorAll(".kb-live")) place.board = new Play(place);
})();
