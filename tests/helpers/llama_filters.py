"""llama.cpp's filters as their definitions say, in plain Python over lists: one row, no tensors.

A row is a list of logits, -inf where removed. What comes back is the set of ids that stay, or the
new row.
"""

import math

INF = math.inf


def ranked(z):
    "Ids of the finite logits, best first, equals by lower id."
    return sorted((i for i, x in enumerate(z) if x > -INF), key=lambda i: (-z[i], i))


def shares(z):
    "The probabilities of the finite logits, by id."
    best = max(z)
    w = {i: math.exp(x - best) for i, x in enumerate(z) if x > -INF}
    total = math.fsum(w.values())
    return {i: x / total for i, x in w.items()}


def nats(z):
    "The entropy of a row."
    return -math.fsum(q * math.log(q) for q in shares(z).values() if q > 0)


def top_n_sigma(z, n):
    x = [v for v in z if v > -INF]
    mean = math.fsum(x) / len(x)
    sigma = math.sqrt(math.fsum((v - mean) ** 2 for v in x) / len(x))
    return {i for i, v in enumerate(z) if v > -INF and v >= max(z) - n * sigma}


def typical(z, p):
    q, H = shares(z), nats(z)
    order = sorted(q, key=lambda i: (abs(-math.log(q[i]) - H), i))
    kept, mass = set(), 0.0
    for i in order:
        kept.add(i)
        mass += q[i]
        if mass > p:
            break
    return kept


def tail_free(z, share):
    order, q = ranked(z), shares(z)
    if share >= 1 or len(order) <= 2:
        return set(order)
    p = [q[i] for i in order]
    first = [a - b for a, b in zip(p, p[1:])]
    second = [abs(a - b) for a, b in zip(first, first[1:])]
    total = math.fsum(second)
    parts = [x / total for x in second] if total > 1e-6 else [1 / len(second)] * len(second)
    running = 0.0
    for i, part in enumerate(parts):
        running += part
        if running > share and i >= 1:
            return set(order[:i])
    return set(order)


def xtc(z, threshold):
    "With the coin's yes."
    order, q = ranked(z), shares(z)
    last = 0
    for place, i in enumerate(order):
        if q[i] < threshold:
            break
        last = place
    return set(order[last:])


def dynamic_temperature(z, T, spread, exponent):
    n = sum(x > -INF for x in z)
    if spread <= 0 or n <= 1:
        return T
    low, high = max(0.0, T - spread), T + spread
    return low + (high - low) * (nats(z) / math.log(n)) ** exponent


def dry(z, text, multiplier, base, allowed, breakers=(), last_n=None):
    text = list(text) if last_n is None else list(text)[-last_n:]
    z, longest = list(z), {}
    for i in range(len(text) - 1):  # a repetition may end here
        n = 0
        while n <= i and text[i - n] == text[-1 - n] and text[-1 - n] not in breakers:
            n += 1
        if n >= allowed:
            longest[text[i + 1]] = max(longest.get(text[i + 1], 0), n)
    for token, n in longest.items():
        if token not in breakers:
            most = int(88.7228391 / math.log(base)) if base > 1.000001 else INF
            z[token] -= multiplier * base ** min(n - allowed, most)
    return z


def mirostat(z, limit):
    "The ids within the limit, in bits; the best if there is none."
    kept = {i for i, q in shares(z).items() if -math.log2(q) <= limit}
    return kept or {ranked(z)[0]}
