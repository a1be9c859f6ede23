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
    return EXP_SERIES.reduceRight((y, c) => y * r + c, 0) * power(n);
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

  // the ranked ids before which the weights hold less than a share p
  function prefix(ids, weights, p) {
    const line = p * ids.reduce((sum, i) => sum + weights[i], 0);
    let before = 0;
    return ids.filter((i) => {
      const stays = before < line;
      before += weights[i];
      return stays;
    });
  }

  function check(logits, { temperature: T, topK, topP, minP }) {
    const refuse = (name, value) => { throw new RangeError(`${name}: ${value}`); };
    if (!(T >= 0 && T < Infinity)) refuse("temperature", T);
    if (!(Number.isInteger(topK) && topK >= 0)) refuse("topK", topK);
    if (!(topP > 0 && topP <= 1)) refuse("topP", topP);
    if (!(minP >= 0 && minP <= 1)) refuse("minP", minP);
    for (const z of logits) if (!(z < Infinity)) refuse("logits", z);
    if (!logits.some((z) => z > -Infinity)) refuse("logits", "no finite logit");
  }

  // What the filters keep of a row: { scores, best, ids }, ids in rank order. A Float32Array is
  // reckoned in float32, as torch does; any other numbers in float64.
  function filter(logits, settings = {}) {
    const asked = { temperature: 1, topK: 0, topP: 1, minP: 0, ...settings };
    check(logits, asked);
    const span = logits instanceof Float32Array ? SPAN.single : SPAN.double;
    const greedy = asked.temperature === 0;
    const scores = temperature(logits, greedy ? 1 : asked.temperature, span);
    let ids = Array.from(scores.keys()).filter((i) => scores[i] > -Infinity);
    ids.sort((i, j) => scores[j] - scores[i] || i - j);
    const best = scores[ids[0]], k = greedy ? 1 : asked.topK;
    if (k) ids = ids.slice(0, k);
    if (asked.topP < 1) {
      const coins = power(Math.min(52 - (32 - Math.clz32(scores.length - 1)), 50));
      const weights = Array.from(scores, (s) => Math.floor(exp(s - best) * coins + 0.5));
      ids = prefix(ids, weights, asked.topP);
    }
    const line = asked.minP > 0 ? log(asked.minP) : -Infinity;
    return { scores, best, ids: ids.filter((i) => span.round(scores[i] - best) >= line) };
  }

  // One token: { token, kept, logprob, ids }. Settings: temperature, topK, topP, minP. Key: seed,
  // row, position, draw.
  function draw(logits, settings = {}, key = {}) {
    const { scores, best, ids } = filter(logits, settings);
    const round = logits instanceof Float32Array ? Math.fround : (x) => x;
    const [a, b] = keyState(key);
    let token = -1, top = -Infinity, mass = 0;
    for (const i of ids) {
      const score = round(round(scores[i] - best) + noise(mix(mix(i ^ a) ^ b)));
      if (score > top || (score === top && i < token)) [token, top] = [i, score];
      mass += exp(scores[i] - best);
    }
    return { token, kept: ids.length, logprob: scores[token] - best - log(mass), ids };
  }

  const book = { draw, filter, noise, keyState, mix, exp, log };
  globalThis.decodingBook = book;
  if (typeof module === "object") module.exports = book;
})();
