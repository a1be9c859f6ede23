// The draw of one row, as `decoding_book.sampler.draw` makes it: the same token, on every row.
//
// In a page: <script src="draw.js"></script>, then decodingBook.draw(logits, settings, key).
// In a module: import "./draw.js", then the same. In Node: require("./draw.js").
//
// Nothing here calls Math.log, Math.exp or Math.pow, whose last bits differ from engine to engine.
// What decides is made of whole numbers and of + - * / on floats, which all machines round alike.
(() => {
  const LN2_HIGH = 6.93147180369123816490e-1, LN2_LOW = 1.90821492927058770002e-10;
  const LOG2_E = 1.4426950408889634, SQRT_HALF = 0.7071065902709961;
  const LOG_SERIES = [
    6.666666666666735130e-1, 3.999999999940941908e-1, 2.857142874366239149e-1,
    2.222219843214978396e-1,
    1.818357216161805012e-1, 1.531383769920937332e-1, 1.479819860511658591e-1];
  const EXP_SERIES = [1];                                   // 1, 1, 1/2, 1/6, ... 1/11!
  for (let i = 1, factorial = 1; i < 12; i++) EXP_SERIES.push(1 / (factorial *= i));
  const SPAN = {                                            // smallest normal and largest float
    single: { tiny: 1.1754943508222875e-38, most: 3.4028234663852886e38, round: Math.fround },
    double: { tiny: 2.2250738585072014e-308, most: Number.MAX_VALUE, round: (x) => x },
  };

  const float = new DataView(new ArrayBuffer(8));

  // 2^n, made of its bits
  function power(n) {
    float.setUint32(0, (n + 1023) << 20);
    float.setUint32(4, 0);
    return float.getFloat64(0);
  }

  // [m, e] with x = m 2^e and m from 1/2 to 1, for a positive x
  function split(x) {
    if (x < SPAN.double.tiny) {
      const [m, e] = split(x * 2 ** 54);
      return [m, e - 54];
    }
    float.setFloat64(0, x);
    const high = float.getUint32(0);
    float.setUint32(0, (high & 0xfffff) | (1022 << 20));
    return [float.getFloat64(0), (high >>> 20) - 1022];
  }

  // the natural logarithm of a positive number
  function log(x) {
    let [m, e] = split(x);
    if (m < SQRT_HALF) [m, e] = [2 * m, e - 1];
    const f = m - 1, s = f / (2 + f), z = s * s, w = z * z;
    const [c3, c5, c7, c9, c11, c13, c15] = LOG_SERIES;
    const series = z * (c3 + w * (c7 + w * (c11 + w * c15))) + w * (c5 + w * (c9 + w * c13));
    const half = 0.5 * f * f, rest = s * (half + series) + e * LN2_LOW;
    return e * LN2_HIGH - ((half - rest) - f);
  }

  // e^d for d up to 0
  function exp(d) {
    if (d < -700) return 0;
    const n = Math.floor(d * LOG2_E + 0.5);
    const r = (d - n * LN2_HIGH) - n * LN2_LOW;
    let y = 0;
    for (let i = 11; i >= 0; i--) y = y * r + EXP_SERIES[i];
    return y * power(n);
  }

  // 32 bits stirred
  function mix(x) {
    x = Math.imul(x ^ (x >>> 16), 0x21f0aaad);
    x = Math.imul(x ^ (x >>> 15), 0x735a2d97);
    return (x ^ (x >>> 15)) >>> 0;
  }

  // five words: the seed's two (a number below 2^53, or a BigInt), row, position, draw
  function keyState({ seed = 0, row = 0, position = 0, draw = 0 } = {}) {
    const whole = BigInt(seed);
    const words = [Number(whole & 0xffffffffn), Number(whole >> 32n), row, position, draw];
    let a = 0x243f6a88, b = 0x85a308d3;
    for (const word of words) {
      a = mix(a ^ word);
      b = mix(b ^ a);
    }
    return [a, b];
  }

  // the Gumbel noise of 32 bits, a float32
  function noise(bits) {
    return Math.fround(-log(-log(1 - (bits + 0.5) / 4294967296)));
  }

  // scores: the logits at temperature T; -inf stays
  function temperature(logits, T, { tiny, most, round }) {
    const best = logits.reduce((x, y) => Math.max(x, y), -Infinity);
    const t = round(Math.min(Math.max(T, tiny), most));
    const shift = Number.isFinite(round(best / t)) ? 0 : best;
    return logits.map((z) => z > -Infinity ? Math.max(round(round(z - shift) / t), -most) : z);
  }

  // ids of all that is not -inf, best first, equals by lower id. A float32's bits, made ascending,
  // and its id are one whole number below 2^52: plain numbers sort ten times faster than pairs.
  function ranked(scores) {
    const ids = [];
    for (let i = 0; i < scores.length; i++) if (scores[i] > -Infinity) ids.push(i);
    if (!(scores instanceof Float32Array) || scores.length > 2 ** 20) {
      return ids.sort((i, j) => scores[j] - scores[i] || i - j);
    }
    const bits = new Int32Array(scores.map((s) => s + 0).buffer);    // no -0
    const up = (b) => b < 0 ? 2147483648 - (b & 0x7fffffff) : 2147483648 + b;
    const keys = new Float64Array(ids.length);
    ids.forEach((i, n) => { keys[n] = (4294967296 - up(bits[i])) * 2 ** 20 + i; });
    keys.sort().forEach((key, n) => { ids[n] = key % 2 ** 20 | 0; });
    return ids;
  }

  // how many of the ranked ids top-p keeps, of all that the weights of `ids` hold
  function prefix(ids, weights, p, boundary) {
    const line = p * ids.reduce((sum, i) => sum + weights[i], 0);
    let before = 0, n = 0;
    const stays = {
      include: () => before < line,
      exceed: () => before <= line,
      exclude: (i) => n === 0 || before + weights[i] <= line,
    }[boundary];
    while (n < ids.length && stays(ids[n])) before += weights[ids[n++]];
    return n;
  }

  // The filters: from a state { scores, whole, ids, span, asked } to the ids that stay. `whole` is
  // all that was there at first, `ids` what is left, both best first.
  const FILTERS = {
    top_k({ scores, ids, asked: { topK, ties } }) {
      if (topK >= ids.length) return ids;
      let n = topK;
      while (ties !== "exact" && n < ids.length && scores[ids[n]] === scores[ids[n - 1]]) n++;
      return ids.slice(0, n);
    },
    top_p({ scores, whole, ids, sorted, asked: { topP, ties, boundary, joint } }) {
      const best = scores[ids[0]], among = joint ? whole : ids;
      const coins = power(Math.min(52 - (32 - Math.clz32(scores.length - 1)), 50));
      const weights = new Float64Array(scores.length);
      for (const i of among) weights[i] = Math.floor(exp(scores[i] - best) * coins + 0.5);
      // an ascending sort that keeps equals as they stood, read from its end: of these, torch's
      // sort promises none, and may leave another order
      const rank = sorted || (ties === "exact" ? among : highFirst(scores, among.slice()));
      const kept = rank.slice(0, prefix(rank, weights, topP, boundary));
      return kept.length === among.length ? ids : common(ids, kept, scores.length);
    },
    min_p({ scores, ids, span, asked: { minP } }) {
      const line = log(minP), best = scores[ids[0]];
      return ids.filter((i) => span.round(scores[i] - best) >= line);
    },
  };
  const IS_ON = {
    temperature: ({ temperature: T }) => T !== 1,
    top_k: ({ topK }) => topK > 0,
    top_p: ({ topP }) => topP < 1,
    min_p: ({ minP }) => minP > 0,
  };

  const highFirst = (scores, ids) => ids.sort((i, j) => scores[j] - scores[i] || j - i);

  // the ids, in their order, that are also among others; all are below `size`
  function common(ids, others, size) {
    const there = new Uint8Array(size);
    for (const i of others) there[i] = 1;
    return ids.filter((i) => there[i]);
  }

  // `DIALECTS` of decoding_book.sampler, in the names of this file.
  const DIALECTS = {
    "book": {},
    "huggingface": { ties: "all" },
    "vllm": { ties: "presorted", order: ["temperature", "min_p", "top_k", "top_p"] },
    "sglang": { boundary: "exceed", joint: true, countPrompt: "none" },
    "llama.cpp": { order: ["top_k", "top_p", "min_p", "temperature"], penaltyWindow: 64,
                   countPrompt: "all" },
  };
  const DEFAULTS = {
    temperature: 1, topK: 0, topP: 1, minP: 0, repetitionPenalty: 1, penaltyWindow: Infinity,
    countPrompt: "repetition", order: ["temperature", "top_k", "top_p", "min_p"], ties: "exact",
    boundary: "include", joint: false,
  };

  function refuse(name, value) {
    throw new RangeError(`${name}: ${value}`);
  }

  // Settings of a dialect, with what is asked of one's own.
  function dialect(system, settings = {}) {
    if (!Object.hasOwn(DIALECTS, system)) refuse("dialect", system);
    return { ...DIALECTS[system], ...settings };
  }

  function check(logits, { temperature: T, topK, topP, minP, order, ties, boundary }) {
    if (!(T >= 0 && T < Infinity)) refuse("temperature", T);
    if (!(Number.isInteger(topK) && topK >= 0)) refuse("topK", topK);
    if (!(topP > 0 && topP <= 1)) refuse("topP", topP);
    if (!(minP >= 0 && minP <= 1)) refuse("minP", minP);
    if ([...order].sort().join() !== [...DEFAULTS.order].sort().join()) refuse("order", order);
    if (!["exact", "all", "presorted"].includes(ties)) refuse("ties", ties);
    if (!["include", "exceed", "exclude"].includes(boundary)) refuse("boundary", boundary);
    for (const z of logits) if (!(z < Infinity)) refuse("logits", z);
    if (!logits.some((z) => z > -Infinity)) refuse("logits", "no finite logit");
  }

  // The logits after the repetition penalty on a text: ids, of which the first `given` are the
  // prompt. A token that was said gets z / theta if z > 0, else z * theta.
  function penalize(logits, ids, given, settings = {}) {
    const { repetitionPenalty: theta, penaltyWindow, countPrompt } = { ...DEFAULTS, ...settings };
    if (!(theta > 0 && theta < Infinity)) refuse("repetitionPenalty", theta);
    const round = logits instanceof Float32Array ? Math.fround : (x) => x;
    const from = Math.max(ids.length - penaltyWindow, countPrompt === "none" ? given : 0);
    const z = logits.slice(), t = round(theta);
    if (t === 1) return z;
    for (const i of new Set(ids.slice(from))) {
      if (!Number.isFinite(z[i])) continue;
      z[i] = round(z[i] > 0 ? z[i] / t : z[i] * t);
      if (!Number.isFinite(z[i])) refuse("repetitionPenalty", theta);
    }
    return z;
  }

  // What the filters keep of a row: { scores, best, ids, mass, stages }, ids in rank order, and for
  // `race` the same ids with their scores below the best; stages: how many each filter left. A
  // Float32Array is reckoned in float32, as torch does; any other numbers in float64.
  function filter(logits, settings = {}) {
    const asked = { ...DEFAULTS, ...settings };
    check(logits, asked);
    const span = logits instanceof Float32Array ? SPAN.single : SPAN.double;
    const on = asked.order.filter((name) => IS_ON[name](asked));
    const first = on[0] === "temperature" && asked.temperature > 0 && on.shift();
    const warm = () => temperature(logits, asked.temperature, span);
    const state = { scores: first ? warm() : logits.slice(), span, asked }, stages = [];
    state.ids = state.whole = ranked(state.scores);
    for (const name of on) {
      if (name !== "temperature") {
        if (name === "top_k" && asked.ties === "presorted") {
          state.sorted = highFirst(state.scores, state.ids.slice());
        }
        state.ids = FILTERS[name](state);
      } else if (asked.temperature === 0) state.ids = state.ids.slice(0, 1);
      else {
        state.scores = warm();
        state.whole = ranked(state.scores);
        state.ids = common(state.whole, state.ids, state.scores.length);
      }
      stages.push([name, state.ids.length]);
    }
    const { scores, ids } = state, best = scores[ids[0]];
    const order = Int32Array.from(ids), gaps = new Float64Array(ids.length);
    let mass = 0;
    order.forEach((i, n) => {
      gaps[n] = span.round(scores[i] - best);
      mass += exp(scores[i] - best);
    });
    return { scores, best, ids, order, gaps, mass, stages };
  }

  // Less bits, more noise: it is at most that of the least number that begins with as many zeros.
  const MOST_NOISE = Array.from({ length: 33 }, (_, n) => noise(n > 31 ? 0 : 2 ** (31 - n)));

  // A token's run in the race: [score, noise, their sum], of which the largest sum wins.
  function run(kept, key, i) {
    const [a, b] = keyState(key);
    const round = kept.scores instanceof Float32Array ? Math.fround : (x) => x;
    const score = round(kept.scores[i] - kept.best), luck = noise(mix(mix(i ^ a) ^ b));
    return [score, luck, round(score + luck)];
  }

  // The token that wins under a key, of what `filter` kept. A token whose most noise leaves it
  // behind the best so far is passed over by its bits alone; behind it all others are, too, once
  // no noise at all would do.
  function race(kept, key = {}) {
    const { order, gaps } = kept, [a, b] = keyState(key);
    const single = kept.scores instanceof Float32Array;
    let token = -1, top = -Infinity, near = -Infinity;
    for (let n = 0; n < order.length && gaps[n] + MOST_NOISE[32] >= near; n++) {
      const i = order[n], bits = mix(mix(i ^ a) ^ b);
      if (gaps[n] + MOST_NOISE[Math.clz32(bits)] < near) continue;
      const sum = gaps[n] + noise(bits), score = single ? Math.fround(sum) : sum;
      if (score > top || (score === top && i < token)) {
        [token, top] = [i, score];
        near = top - 1e-6 * (1 + Math.abs(top));      // rounding moves a sum by less
      }
    }
    return token;
  }

  // One token: { token, kept, logprob, ids }. Settings: temperature, topK, topP, minP, and what a
  // dialect sets. Key: seed, row, position, draw.
  function draw(logits, settings = {}, key = {}) {
    const kept = filter(logits, settings), token = race(kept, key);
    return { token, kept: kept.ids.length, logprob: logprob(kept, token), ids: kept.ids };
  }

  // The log-probability of a token that was kept.
  function logprob({ scores, best, mass }, token) {
    return scores[token] - best - log(mass);
  }

  // Entropy in bits and varentropy in bits squared, of what was kept.
  function measures({ scores, best, ids, mass }) {
    const weight = (i) => exp(scores[i] - best) / mass;
    const mean = ids.reduce((sum, i) => sum + weight(i) * (scores[i] - best), 0);
    const square = ids.reduce((sum, i) => sum + weight(i) * (scores[i] - best - mean) ** 2, 0);
    const ln2 = log(2);
    return { entropy: (log(mass) - mean) / ln2, varentropy: square / ln2 ** 2 };
  }

  const book = {
    draw, filter, race, run, penalize, dialect, logprob, measures, DIALECTS,
    noise, keyState, mix, exp, log,
  };
  globalThis.decodingBook = book;
  if (typeof module === "object") module.exports = book;
})();
