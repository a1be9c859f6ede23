// What every page of the site needs beside its theme: folds and frames for the keyboard, and the
// order of what is found.

// A solution's header opens by Enter and by space, as a button does.
for (const header of document.querySelectorAll(".callout-header[data-bs-toggle]")) {
  header.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    header.click();
  });
}

// What is wider than its box can be scrolled by keyboard.
const frames = new ResizeObserver((seen) => seen.forEach(({ target }) => {
  if (target.scrollWidth > target.clientWidth + 1) target.tabIndex = 0;
  else target.removeAttribute("tabindex");
}));
document.querySelectorAll("main pre, main table, main .math.display")
  .forEach((box) => frames.observe(box));

// Search: every word must occur. A page's name and a term where it is defined weigh most, then a
// section's name.
const words = (text) => (text || "").toLowerCase().match(/[\p{L}\p{N}]+/gu) || [];
const AT_THE_END = /^(exercises|references|in short)$/i;
const LISTS = /^(references|glossary|one prompt)\b/i; // pages that name all and explain none

function found(entry, asked) {
  const fields = [[entry.section ? 2 : 12, 1, words(entry.title)], [8, 1, words(entry.section)],
                  [12, 1, words(entry.terms)], [1, 3, words(entry.text)]];
  let score = 0;
  for (const word of asked) {
    let here = 0;
    for (const [weight, most, field] of fields) {
      const whole = field.filter((w) => w === word).length;
      const begun = field.filter((w) => w.startsWith(word)).length;
      const counted = Math.min(whole, most);
      here += weight * (counted + .5 * Math.min(begun - whole, most - counted));
    }
    if (!here) return 0;
    score += here;
  }
  return AT_THE_END.test(entry.section) || LISTS.test(entry.title) ? score / 8 : score;
}

const Fuzzy = window.Fuse; // the theme's, for what is misspelled
if (Fuzzy) window.Fuse = class {
  constructor(entries, options) {
    this.entries = entries;
    this.fuzzy = new Fuzzy(entries, options);
  }
  search(query, options) {
    const asked = words(query);
    const hits = this.entries.map((item) => ({ item, score: found(item, asked) }))
      .filter((hit) => hit.score);
    if (!asked.length || !hits.length) return this.fuzzy.search(query, options);
    return hits.sort((a, b) => b.score - a.score).slice(0, options.limit);
  }
};
