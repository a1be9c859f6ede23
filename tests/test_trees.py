"The drawings of trees and of beams: bands, labels and boxes that fit."

import re
from xml.etree import ElementTree

import pytest

from decoding_book.beam import beam_search
from decoding_book.toy import sequence_law, six_words
from decoding_book.trees import bands, beam_html, branches, record_html, tree_html


def drawing(html):
    return ElementTree.fromstring(re.search(r"<svg.*</svg>", html, re.S)[0])


SVG = "{http://www.w3.org/2000/svg}"


def test_tree_bands_fit():
    w = six_words()
    law = {tuple(w.words[i] for i in ids): p for ids, p in sequence_law(w, 5).items()}
    mass, after = branches(law)
    assert abs(mass[()] - 1) < 1e-9 and abs(mass[("cold",)] - 0.25) < 1e-9
    assert after[()][:2] == [("I",), ("cold",)]  # the most probable on top
    for least in (0.0, 0.002, 0.05):
        found = bands(law, least)
        for level in range(1, 6):
            spans = sorted((top, h) for _, n, top, h, _ in found if n == level)
            assert all(a + h <= b + 1e-9 for (a, h), (b, _) in zip(spans, spans[1:]))
        assert sum(n for prefix, *_, n in found if prefix is None or prefix in law) == len(law)
        assert all(h >= least for prefix, _, _, h, _ in found if prefix is not None)
    assert [round(b[3], 9) for b in bands({("a",): 0.5, ("b",): 0.3, ("c",): 0.2}, 0.4)] == [
        0.5,
        0.5,
    ]


def test_tree_labels_are_inside_their_bands():
    w = six_words()
    law = {tuple(w.words[i] for i in ids): p for ids, p in sequence_law(w, 5).items()}
    best, greedy = "cold coffee I like stop".split(), "I like cold coffee stop".split()
    svg = drawing(tree_html(law, {"best": best, "greedy": greedy}))
    rects = [
        [float(r.get(k)) for k in ("x", "y", "width", "height")]
        for r in svg.iter(f"{SVG}rect")
        if r.get("class") is None
    ]
    right = max(x + width for x, _, width, _ in rects)
    for text in svg.iter(f"{SVG}text"):
        x, y = float(text.get("x")), float(text.get("y"))
        if x > right:
            continue  # the names of the paths
        size = 9.5 if text.get("class") else 11
        inside = [
            r
            for r in rects
            if r[0] < x < r[0] + r[2] and r[1] - 1.5 <= y - 0.75 * size and y <= r[1] + r[3] + 0.5
        ]
        assert len(inside) == 1, "".join(text.itertext())
        assert x + 0.62 * size * len("".join(text.itertext())) <= inside[0][0] + inside[0][2] + 2
    assert len([r for r in svg.iter(f"{SVG}rect") if r.get("class") == "p"]) == 10
    titles = ["".join(t.itertext()) for t in svg.iter(f"{SVG}title")]
    assert any(t.startswith("cold coffee I like stop: 3.6 %") for t in titles)
    assert {"best", "greedy"} <= {"".join(t.itertext()) for t in svg.iter(f"{SVG}text")}


def test_names_of_equal_paths_stand_apart():
    text = ("a", "b")
    svg = drawing(tree_html({text: 1.0}, {"greedy": text, "beam": text, "best": text}, tall=60))
    names = [
        float(t.get("y"))
        for t in svg.iter(f"{SVG}text")
        if "".join(t.itertext()) in ("greedy", "beam", "best")
    ]
    assert len(names) == 3 and all(b - a >= 14 for a, b in zip(sorted(names), sorted(names)[1:]))


def test_paths_outside_the_tree_are_refused():
    with pytest.raises(ValueError, match=r"paths: 'best' is \('b',\)"):
        tree_html({("a",): 1.0}, {"best": ("b",)})
    for bad in ({("a",): 1.1}, {("a",): -0.5, ("b",): 1.0}, {}):
        with pytest.raises(ValueError, match="probabilities sum to"):
            branches(bad)


def test_the_step_that_cuts_a_text_has_a_cross():
    world = six_words()
    lost = world.encode("cold coffee I like stop")
    for width, cut_at in ((1, 1), (2, None)):  # the winner of width 2 is not lost
        found = beam_search(world, "", width, 5)
        svg = drawing(record_html(found.steps, world.decode, found[0].ids.tolist(), lost=lost))
        titles = ["".join(t.itertext()) for t in svg.iter(f"{SVG}title")]
        crosses = [t for t in titles if "is cut" in t]
        assert crosses == ([f"step {cut_at}: the dashed text is cut"] if cut_at else [])


def test_the_way_to_the_cross_is_drawn_whether_the_cut_text_has_a_box_or_not():
    def entry(ids):
        return dict(ids=ids, token="x", text="x", logprob=-1.0, score=-1.0, finished=False)

    kept = [([entry((0,)), entry((1,))], []), ([entry((0, 0)), entry((0, 1))], [])]
    drawn = [kept[0], (kept[1][0], [entry((1, 0))])]
    for steps in (kept, drawn):
        svg = drawing(beam_html(steps, lost=(1, 0, 0)))
        paths = [p.get("class") for p in svg.iter(f"{SVG}path")]
        assert paths.count("x") == 1 and paths.count("e lost") == 1
        boxes = [r for r in svg.iter(f"{SVG}rect") if r.get("class") == "lost"]
        assert len(boxes) == (2 if steps is drawn else 1)


def test_beam_boxes_do_not_overlap():
    found = beam_search(six_words(), "", 3, 5)
    html = record_html(found.steps, six_words().decode, found[0].ids.tolist())
    svg = drawing(html)
    boxes = [(float(r.get("x")), float(r.get("y"))) for r in svg.iter(f"{SVG}rect") if r.get("rx")]
    assert len(boxes) == len(set(boxes)) == sum(len(kept) + len(cut) for kept, cut in found.steps)
    for x, y in boxes:
        assert not [1 for u, v in boxes if (u, v) != (x, y) and abs(u - x) < 54 and abs(v - y) < 28]
    wins = [r for r in svg.iter(f"{SVG}rect") if r.get("class") == "win"]
    assert len(wins) == 5 and html in found._repr_html_()
    with pytest.raises(ValueError, match="empty"):
        beam_html([])
