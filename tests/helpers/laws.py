"Pearson's test with small cells pooled, by SciPy: independent of the book's `noise.chi_square`."

import numpy as np
from scipy.stats import chi2 as chi2_law


def chi_square(counts, q, n):
    "p-value of counts against probabilities; cells expected fewer than 5 times are pooled."
    counts, expected = np.asarray(counts, float), np.asarray(q, float) * n
    big = expected >= 5
    cells = list(zip(counts[big], expected[big]))
    if expected[~big].sum() > 1:
        cells.append((counts[~big].sum(), expected[~big].sum()))
    x = sum((c - e) ** 2 / e for c, e in cells)
    return chi2_law.sf(x, max(len(cells) - 1, 1))
