"The drawings of trees and of beams: bands and boxes that fit; steps that say what was done."

import math
import pickle
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import torch

from decoding_book.beam import beam_search
from decoding_book.exhaustive import exhaustive_search
from decoding_book.loop import Draw, generate
from decoding_book.show import percent
from decoding_book.toy import TableModel, sequence_law, six_words
from decoding_book.trees import (
    bands,
    beam_html,
    beam_panels,
    branches,
    loop_panels,
    record_html,
    stepper_html,
    tree_html,
)


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


# ---- step by step


class Items(HTMLParser):
    "The text of each step of a stepper, and the widths of its bars."

    def __init__(self, html):
        super().__init__()
        self.steps, self.bars, self.tags = [], [], []
        self.skipped = False
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        self.skipped = tag in ("style", "script")
        if attributes.get("class") == "dw-f":
            self.steps.append("")
        if tag == "i":
            self.bars.append(attributes["style"])

    def handle_data(self, data):
        if self.steps and not self.skipped:
            self.steps[-1] += data


def fourth(prediction, context):
    "The fourth most probable token."
    return Draw(prediction.logits.topk(4).indices[:, 3])


@pytest.mark.parametrize("choose", [None, fourth])
@pytest.mark.parametrize("alternatives", [0, 3, 6])
def test_a_step_of_the_loop_says_what_the_record_says(choose, alternatives):
    w = six_words()
    g = generate(w, "I", *filter(None, [choose]), max_new_tokens=4, alternatives=alternatives)
    panels = loop_panels(g)
    assert len(panels) == len(g.ids) == len(Items(stepper_html(g)).steps)
    text = "I"
    for panel, step, id, lp in zip(panels, g.steps, g.ids.tolist(), g.logprobs.tolist()):
        ids = torch.tensor(w.encode(text))[None]
        logits = w(ids).logits[0]
        word, q = w.words[id], logits.softmax(-1)
        (chosen,) = [line for line in panel.lines if line.fate == "chosen"]
        assert (chosen.name.strip("·"), chosen.score) == (word, f"{logits[id]:.2f}")
        assert math.isclose(chosen.p, math.exp(lp), rel_tol=1e-6)
        assert math.isclose(sum(line.p for line in panel.lines), 1, abs_tol=1e-5)
        named = [line.name for line in panel.lines][:alternatives]
        assert named == [w.words[i] for i in step.top_ids[0].tolist()]
        assert panel.before == text and panel.said[0].startswith(f'After "{text}"')
        rank = (q > q[id]).sum().item() + 1
        if alternatives:
            largest = w.words[q.argmax()]
            assert f'The largest: "{largest}" {logits.max():.2f}.' in panel.said[0]
            assert f': "{largest}" {percent(q.max().item())}.' in panel.said[1]
            where = f"not among the {alternatives} most probable"
            if rank <= alternatives:
                where = f"number {rank} by probability"
            if rank == 1:
                where = "the most probable"
            assert where in panel.said[2]
        text += " " + word
        assert f'Appended: "{text}".' in panel.said[3]
    ends = {"eos": "end mark", "length": "last token allowed"}
    assert ends[g.reason] in panels[-1].said[3] and "end mark" not in panels[0].said[3]


@pytest.mark.parametrize("width", [1, 2, 3, 8])
@pytest.mark.parametrize("prompt", ["", "coffee"])
def test_a_step_of_a_beam_says_what_the_record_says(width, prompt):
    w = six_words()
    found = beam_search(w, prompt, width, 5)
    best = tuple(exhaustive_search(w, prompt, 5)[0].ids.tolist())
    panels = beam_panels(found, best)
    was = 0
    for panel, (kept, cut) in zip(panels, found.steps):
        paths = kept + cut
        assert [line.name for line in panel.lines] == [w.decode(list(p.ids)) for p in paths]
        assert [line.p for line in panel.lines] == [math.exp(p.total) for p in paths]
        assert [line.fate[:4] for line in panel.lines] == ["kept"] * len(kept) + ["cut"] * len(cut)
        assert [line.fate.endswith("ended") for line in panel.lines] == [
            p.finished and p in kept for p in paths
        ]
        places = [i for i, p in enumerate(kept, 1) if p.ids == best[: len(p.ids)]]
        now = places[0] if places else None
        said = panel.said[1]
        assert ("is cut" in said) == (was is not None and now is None)
        assert ("waits in place" in said) == (now is not None and now > 1 and was in (0, now))
        assert ("overtakes" in said) == (now == 1 and was is not None and was > 1)
        was = now
    assert f'The search is over: "{w.decode(found[0].ids.tolist())}"' in panels[-1].said[1]


def test_cold_waits_and_overtakes_and_width_one_loses_it():
    w = six_words()
    found = {f"width {k}": beam_search(w, "", k, 5) for k in (1, 2, 3)}
    steps = Items(stepper_html(found)).steps
    assert len(steps) == 5
    assert steps[0].count('"cold" waits in place 2') == 2 and steps[0].count('"cold" is cut') == 1
    assert steps[2].count('"cold coffee I" overtakes: first place.') == 2


def test_a_finished_text_that_transformers_sets_aside_is_not_called_lost():
    w = six_words()
    found = beam_search(w, "coffee", 2, 5, dialect="huggingface", early_stopping="never")
    said = " ".join(p.said[1] for p in beam_panels(found, (w.eos,)))
    assert "leaves the beam" in said and "is cut" not in said


ODD = ["<b>&", "$x$", "a\\b", '"', "</script>", "\u202e", "'"]


def test_any_token_can_stand_in_a_step():
    w = TableModel([1 / 7] * 7, [[1 / 7] * 7] * 7, ODD)
    for result in (generate(w, "", max_new_tokens=2, alternatives=7), beam_search(w, "", 7, 1)):
        html = stepper_html({"<$>": result}, caption="$<i>")
        items = Items(html)
        for token in set(ODD) - {"\u202e"}:
            assert token in items.steps[0]
        assert "\u202e" not in html and "‹202E›" in items.steps[0]
        assert items.tags.count("script") == 1 and "b" in items.tags
        body = html.split("</style>")[1].split("<script>")[0]
        assert not re.search(r"\$[^<]|\\[^<]", body.replace('data-name="&lt;$&gt;: "', ""))


def test_a_saved_generation_has_scores_less_a_constant():
    g = generate(six_words(), "I", max_new_tokens=3)
    saved = pickle.loads(pickle.dumps(g))
    fresh, old = loop_panels(g), loop_panels(saved)
    assert "less a constant" in old[0].said[0] and "less a constant" not in fresh[0].said[0]
    assert [p.said[2:] for p in old] == [p.said[2:] for p in fresh]
    beam = beam_search(six_words(), "", 2, 5)
    assert stepper_html(pickle.loads(pickle.dumps(beam))) == stepper_html(beam)


def test_rows_stand_side_by_side_and_a_long_record_says_that_it_is_cut():
    w = TableModel([0.5, 0.5], [[0.5, 0.5], [0.4, 0.6]], ["I", "coffee"])
    batch = generate(w, ["I", "coffee"], max_new_tokens=12)
    html = stepper_html(batch)
    assert "<b>row 0</b>" in html and "<b>row 1</b>" in html
    assert "The first 10 of 12 steps." in html and len(Items(html).steps) == 10
    assert len(Items(stepper_html(batch, most=12)).steps) == 12
    uneven = {"one": generate(w, "I", max_new_tokens=1), "two": beam_search(w, "", 2, 2)}
    assert "It is over." in Items(stepper_html(uneven)).steps[1]
    for nothing in (exhaustive_search(w, "", 2), "text"):
        with pytest.raises(ValueError, match="no record of steps"):
            stepper_html(nothing)
