"Text with a shape: automata against re, masks against their definition, laws against enumeration."

import importlib.util
import json
import math
import pickle
import random
import re
from collections import Counter

import jsonschema
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from decoding_book.beam import beam_search
from decoding_book.constrained import (
    OVER,
    Adaptive,
    Automaton,
    Branching,
    Constrained,
    Futures,
    Grammar,
    Parser,
    Pattern,
    Shape,
    Vocabulary,
    beginnings,
    characters,
    fitting_law,
    json_pattern,
    log_weights,
    utf8,
)
from decoding_book.entropix import EntropySampler
from decoding_book.loop import Context, Draw, Prediction, generate, greedy
from decoding_book.noise import chi_square
from decoding_book.sampler import Mirostat, Sampler
from decoding_book.scale import decode_batch, decode_file, results
from decoding_book.smollm import SmolLM2
from decoding_book.speculative import AcceptReject, ModelDrafter, speculate
from decoding_book.toy import TableModel, sequence_law, six_words

SIGNS = "aabbc 1٣é:😀]-\n"
PATTERNS = [
    r"yes|no|maybe",
    r"(a|b)*abb",
    r"\d{4}-\d\d-\d\d",
    r" \d\d?:\d\d( am| pm)?",
    r"[A-Z][a-z]+( [a-z]+){1,4}\.",
    r"\w{1,12}",
    r"\W{1,5}",
    r"[^a-z]{2,6}",
    r"é+[à-ü]*",
    r"[😀-😂]{1,3}",
    r"\u00e9\x41.",
    r"(\s\S){1,4}",
    r"\D\d\D",
    r"(((a?b)*c)?d){2,3}",
    r"-?(0|[1-9]\d*)(\.\d+)?",
    r"[0-9a-f]{8}(-[0-9a-f]{4}){3}",
    r"[a-z]+@[a-z]+\.(com|org)",
    r"#[0-9a-fA-F]{6}",
    r"(\+\d{1,3} )?\d{3}-\d{4}",
    r"<b>[^<>]{0,20}</b>",
    r"[^\W\d_]{3,9}",
    r"(?:ha){1,5}!",
    r"x{,3}y{2,}z",
    r"\(\d+, \d+\)",
    r"[\]\[^-]{1,4}",
    r"(|a)(|b)c",
    r"\t*\S+\n?",
    r"[一-龥]{2,4}。",
    r"(Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day",
    r"[ab]{1,6}|[cd]{1,6}",
]


def text_of(**limits):
    return {"type": "string", **limits}


def record_of(properties, required):
    return {"type": "object", "properties": properties, "required": required}


INTEGER, NUMBER = {"type": "integer"}, {"type": "number"}
SCHEMAS = [
    record_of({"name": text_of(maxLength=9), "age": INTEGER}, ["name", "age"]),
    record_of({"a": text_of(maxLength=4), "b": NUMBER, "c": {"type": "boolean"}}, ["b"]),
    record_of({"a": {"type": "null"}, "b": {"type": "boolean"}}, []),
    {"type": "array", "items": INTEGER, "minItems": 1, "maxItems": 4},
    {"type": "array", "items": text_of(minLength=1, maxLength=3)},
    {"type": "array", "items": {"type": "boolean"}, "maxItems": 0},
    {"enum": ["red", "green", 3, None, 'é "q"', [1, {"x": True}]]},
    {"type": "integer", "enum": [1, -20, "three", True]},
    {"const": {"x": [1, 2, "y"]}},
    text_of(),
    text_of(minLength=2, maxLength=5),
    NUMBER,
    INTEGER,
    {"type": ["string", "null"], "maxLength": 4},
    {"anyOf": [INTEGER, {"type": "array", "items": {"type": "null"}, "maxItems": 2}]},
    record_of({"who": record_of({"n": text_of(maxLength=5)}, ["n"]), "n": INTEGER}, ["who"]),
    record_of({"tags": {"type": "array", "items": text_of(maxLength=4), "maxItems": 3}}, []),
    record_of({"deep": record_of({"er": record_of({"x": NUMBER}, [])}, ["er"])}, ["deep"]),
    {"type": "array", "items": record_of({"k": {"enum": ["a", "b"]}}, ["k"]), "maxItems": 3},
    record_of({'say "hi"\n': {"type": "boolean", "description": "a note"}}, ['say "hi"\n']),
]


@pytest.fixture(scope="module")
def small():
    "SmolLM2 from its four bits."
    return SmolLM2(weights="q4")


@pytest.fixture(scope="module")
def vocabulary(small):
    return Vocabulary.of(small)


@pytest.fixture(scope="module")
def world():
    return six_words()


COFFEE = r"I (\w+ ){0,2}coffee "


# ---- automata


@pytest.mark.parametrize("pattern", PATTERNS)
def test_an_automaton_accepts_what_fullmatch_accepts(pattern, full):
    rng, automaton = random.Random(pattern), Automaton(pattern)
    near = re.sub(r"[^\w ]|\d", "", pattern)[:6] + SIGNS
    for _ in range(20_000 if full else 200):
        text = "".join(rng.choices(near, k=rng.randrange(8)))
        assert automaton.fits(text) == bool(re.fullmatch(pattern, text)), text


TREES = st.recursive(
    st.sampled_from(["a", "b", "é", r"\d", "[^a]", ".", "[b-é]", r"\s"]),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda t: t[0] + t[1]),
        st.tuples(inner, inner).map(lambda t: f"({t[0]}|{t[1]})"),
        st.tuples(inner, st.sampled_from(["?", "*", "+", "{2}", "{1,2}", "{,2}", "{2,}"])).map(
            lambda t: f"(?:{t[0]}){t[1]}"
        ),
    ),
    max_leaves=6,
)


@given(TREES, st.lists(st.text(alphabet="abé1 \n", max_size=6), max_size=8))
def test_any_pattern_of_the_subset_means_what_it_means_to_re(pattern, texts):
    automaton = Automaton(pattern)
    for text in texts:
        assert automaton.fits(text) == bool(re.fullmatch(pattern, text))


@pytest.mark.parametrize("atom", [r"\w", r"\D", ".", r"[^é\s]", "[à-ü]", "x", r"\."])
def test_a_class_is_the_set_that_re_knows(atom):
    known = {c for a, b in characters(atom) for c in range(a, b + 1)}
    for c in [*range(0x3000), *range(0x3000, 0x110000, 17)]:
        if not 0xD800 <= c < 0xE000:
            assert (c in known) == bool(re.fullmatch(atom, chr(c)))


@given(st.integers(0, 0x10FFFF), st.integers(0, 0x10FFFF), st.integers(0, 0x10FFFF))
def test_ranges_of_bytes_spell_a_range_of_characters(a, b, c):
    if 0xD800 <= c < 0xE000:
        return
    a, b = sorted((a, b))
    spans = [(max(a, x), min(b, y)) for x, y in [(0, 0xD7FF), (0xE000, 0x10FFFF)]]
    spelt = chr(c).encode()
    found = [
        all(low <= byte <= high for byte, (low, high) in zip(spelt, ranges))
        for ranges in utf8(tuple((x, y) for x, y in spans if x <= y))
        if len(ranges) == len(spelt)
    ]
    assert sum(found) == (a <= c <= b)  # by one sequence, or by none


@pytest.mark.parametrize(
    "pattern, says",
    [
        ("a**", "two repeats of one part, at 2 of 'a**'"),
        ("a*?", "two repeats of one part"),
        ("a{2}{3}", "two repeats of one part"),
        ("a{3,2}", "{3,2} repeats nothing"),
        ("(a", "a ( without its )"),
        ("a)", "a ) without its ("),
        ("^a", "'^a' is not understood, at 0"),
        ("a$", "'$' is not understood, at 1"),
        (r"(?=a)b", "'(?' is not understood"),
        (r"(?P<n>a)", "'(?' is not understood"),
        (r"(a)\1", r"'\\1' is not understood"),
        (r"\bx", r"'\\b' is not understood"),
        ("[ab", "'[a' is not understood"),
        ("[z-a]", "bad character range"),
        ("*a", "'*a' is not understood"),
        ("a{x}", "'{x' is not understood"),
    ],
)
def test_what_is_not_in_the_subset_is_refused_with_its_place(pattern, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        Automaton(pattern)


def test_an_automaton_that_grows_too_large_says_so(monkeypatch):
    monkeypatch.setattr(Branching, "most", 1000)
    with pytest.raises(ValueError, match="pattern: more than 1000 states"):
        Automaton("(a{50}){50}")
    monkeypatch.setattr(Automaton, "most", 100)
    automaton, rng = Automaton("(a|b)*a(a|b){9}"), random.Random(0)
    with pytest.raises(ValueError, match="pattern: more than 100 states"):
        automaton.read(automaton.start, rng.choices(b"ab", k=10**4))


def test_a_pattern_is_text():
    with pytest.raises(TypeError, match="pattern: 7 is not a str"):
        Parser(7)


# ---- masks


def slow_mask(shape, state):
    "The definition: each token on its own."
    out = []
    for i, token in enumerate(shape.vocabulary.tokens):
        if i in shape.vocabulary.ends:
            out.append(shape.automaton.accepts(state))
        else:
            out.append(bool(token) and shape.alive(shape.automaton.read(state, token)))
    return out


@pytest.mark.parametrize("pattern", [PATTERNS[3], PATTERNS[5], PATTERNS[8], r"(.|\n)*"])
def test_a_mask_is_its_definition_on_every_token(vocabulary, pattern):
    shape, rng = Pattern(pattern, vocabulary), random.Random(1)
    state = shape.start
    for _ in range(3):
        mask = shape.allowed(state)
        assert mask.tolist() == slow_mask(shape, state)
        choices = mask.nonzero()[:, 0].tolist()
        state = shape.advance(state, rng.choice(choices))
        if state == OVER:
            break


def tokens_and_ends(words):
    return Vocabulary([*(w.encode() for w in words), b""], [len(words)])


@given(
    st.lists(st.text(alphabet="ab", min_size=1, max_size=3), min_size=1, max_size=4, unique=True),
    st.sampled_from(["(ab)*", "a(b|ab)a?", "b{2,5}", "(aab|b)*a", "(a|b){3}", "abab"]),
)
def test_a_token_is_allowed_exactly_if_some_text_of_tokens_completes_it(words, pattern):
    "Against a search through all texts of up to eight tokens."
    fitting, level = [], [()]
    for _ in range(8):
        level = [(*t, i) for t in level for i in range(len(words))]
        level = [t for t in level if len("".join(words[i] for i in t)) <= 8][:3000]
        fitting += [t for t in level if re.fullmatch(pattern, "".join(words[i] for i in t))]
    firsts = {t[0] for t in fitting}
    own = tokens_and_ends(words)
    if not fitting and not re.fullmatch(pattern, ""):
        with pytest.raises(ValueError, match="no text of these tokens fits"):
            Pattern(pattern, own)
        return
    shape = Pattern(pattern, own)
    assert set(shape.allowed(shape.start).nonzero()[:, 0].tolist()) - {len(words)} == firsts
    assert shape.allowed(shape.start)[len(words)] == bool(re.fullmatch(pattern, ""))


def test_states_without_an_end_are_cut(world, vocabulary):
    shape = Pattern("(cold co|I like )", world)
    assert shape.allowed(shape.start).tolist() == [False, False, True, False, False, False]
    with pytest.raises(ValueError, match="no text of these tokens fits 'col'"):
        Pattern("col", world)
    assert 4 not in vocabulary.single  # SmolLM2 has no token for the byte 4
    for nowhere in ("\x04", "a\x04|\U00050000b", r"[^\s\S]", "\ud800"):
        with pytest.raises(ValueError, match="no text of these tokens fits"):
            Pattern(nowhere, vocabulary)
    cut = Pattern("a(\x04|b)|c\x04", vocabulary)
    assert set(cut.allowed(1).nonzero()[:, 0].tolist()) == {
        i for i, t in enumerate(vocabulary.tokens) if t in (b"a", b"ab")
    }


def test_control_tokens_and_empty_ones_are_no_text(small, vocabulary):
    anything = Pattern(r"(.|\n)*", vocabulary).allowed(1)
    for name in ("<|im_start|>", "<|endoftext|>"):
        assert not anything[small.encode(name)[0]]
    assert anything[small.eos]
    assert tokens_and_ends(["a", ""]).tokens == [b"a", None, None]


def test_a_token_may_end_inside_a_character(vocabulary):
    shape = Pattern("[😀-😂]{2}", vocabulary)
    half = vocabulary.tokens.index(b"\xf0\x9f")
    assert shape.allowed(shape.start)[half]
    state = shape.advance(shape.start, half)
    inside = [vocabulary.tokens[i] for i in shape.allowed(state).nonzero()[:, 0].tolist()]
    assert inside and all(t[0] == 0x98 for t in inside)
    assert not shape.allowed(state)[vocabulary.ends[0]]


def test_the_seam_refuses_what_does_not_fit(vocabulary, world):
    shape = Pattern("ab", vocabulary)
    for token in (vocabulary.tokens.index(b"b"), vocabulary.ends[0], 1):
        with pytest.raises(ValueError, match=f"token: {token}, .* does not fit here"):
            shape.advance(shape.start, token)
    with pytest.raises(ValueError, match="token: 49152 is above 49151"):
        shape.advance(shape.start, 49152)
    state = shape.advance(shape.start, vocabulary.tokens.index(b"ab"))
    over = shape.advance(state, vocabulary.ends[0])
    assert over == OVER == shape.advance(over, vocabulary.ends[0])
    assert shape.allowed(over).nonzero()[:, 0].tolist() == vocabulary.ends
    with pytest.raises(ValueError, match="ends: no end mark"):
        Vocabulary([b"a"], [])
    with pytest.raises(ValueError, match="ends: id 3"):
        Vocabulary([b"a"], [3])
    with pytest.raises(TypeError, match="model: the tokens of object are not known as bytes"):
        Pattern("a", object())
    with pytest.raises(ValueError, match="no end mark"):
        Vocabulary.of(six_words(eos=None))


def test_masks_are_kept_up_to_a_number_and_prepared(vocabulary):
    shape = Pattern("a{30}", vocabulary)
    n = shape.prepare()
    assert n == len(shape.masks) == 31
    first = shape.allowed(1)
    assert shape.allowed(1) is first
    few = Pattern("a{30}", vocabulary)
    few.most = 5
    assert few.prepare() == 5
    assert few.allowed(3).equal(shape.allowed(3)) and len(few.masks) == 5


# ---- choosers


class Noise:
    "A model of random logits over a real vocabulary: cheap, and it wants nothing."

    def __init__(self, model, seed=0, scale=4.0):
        self.vocab_size, self.eos, self.end_ids = model.vocab_size, model.eos, model.end_ids
        self.encode, self.decode, self.weights = model.encode, model.decode, model.weights
        self.generator, self.scale = torch.Generator().manual_seed(seed), scale

    def __call__(self, ids, mask=None, cache=None, last_only=True, attention=False):
        z = torch.randn(len(ids), self.vocab_size, generator=self.generator)
        z[:, self.eos] += 4  # else a text that may go on seldom ends
        return Prediction(self.scale * z)


def check_texts(results, fits, limit):
    "All texts that ended by themselves fit; the others were cut by length. How many ended."
    ended = 0
    for text, ids, why in zip(results.text, results.ids, results.reason):
        if why == "length":
            assert len(ids) == limit
        else:
            assert why == "eos" and fits(text), text
            ended += 1
    return ended


def fits_schema(schema):
    def fits(text):
        jsonschema.validate(json.loads(text), schema)
        return re.fullmatch(json_pattern(schema), text)

    return fits


def fits_pattern(pattern):
    return lambda text: re.fullmatch(pattern, text)


def shapes_and_checks():
    pairs = [(p, fits_pattern(p)) for p in PATTERNS]
    return pairs + [(json_pattern(s), fits_schema(s)) for s in SCHEMAS]


def test_generated_texts_fit(small, vocabulary, full, record):
    "30 patterns and 20 schemas; random logits for most texts, the real model for some."
    assert len(PATTERNS) == 30 and len(SCHEMAS) == 20
    pairs = shapes_and_checks()
    rows, limit, ended, total = (196, 120, 0, 0) if full else (3, 25, 0, 0)
    for n, (pattern, fits) in enumerate(pairs if full else pairs[::7]):
        shape = Pattern(pattern, vocabulary)
        for scale in (1.0, 6.0) if full else (3.0,):
            out = generate(
                Noise(small, n, scale),
                ["x"] * (rows // 2 if full else rows),
                Constrained(shape, Sampler(seed=n)),
                limit,
            )
            ended, total = ended + check_texts(out, fits, limit), total + len(out)
        if full:
            prompts = ["The answer is", "Example:", "In JSON:", "I say"]
            out = generate(small, prompts, Constrained(shape, Sampler(seed=n)), 60)
            ended, total = ended + check_texts(out, fits, 60), total + len(out)
    record("constrained texts, all fit", total)
    record("constrained texts that ended before the limit", ended)
    assert total >= 10_000 or not full
    assert ended > total / 2


@pytest.mark.parametrize(
    "choose",
    [greedy, Sampler(seed=4, top_p=0.9), EntropySampler(seed=4, attention=False)],
    ids=["greedy", "sampler", "policy"],
)
def test_each_chooser_and_each_row_with_its_own_shape(small, vocabulary, choose):
    patterns = [PATTERNS[0], "[0-9]{4}-[0-9]{2}", r"[a-z]{1,6}"]
    shapes = [Pattern(p, vocabulary) for p in patterns]
    prompts = ["Yes or no?", "Today is", "A word:"]
    out = generate(Noise(small), prompts, Constrained(shapes, choose), 9)
    for text, why, pattern in zip(out.text, out.reason, patterns):
        assert why == "eos" and re.fullmatch(pattern, text), text


def test_a_row_is_the_same_alone_and_in_any_batch(world):
    shapes = [Pattern(p, world) for p in (COFFEE, r"(cold |like ){1,3}", r"(\w+ ){2}")]
    both = generate(world, ["", "I", "cold coffee"], Constrained(shapes, Sampler(seed=8)), 5)
    for i, prompt in enumerate(["", "I", "cold coffee"]):
        own = Constrained(shapes[i], Sampler(seed=8), rows=[i])
        assert generate(world, [prompt], own, 5).ids[0].equal(both.ids[i])
    again = Constrained(shapes, Sampler(seed=8))  # one chooser, two calls: nothing is left in it
    for _ in range(2):
        out = generate(world, ["", "I", "cold coffee"], again, 5)
        assert all(a.equal(b) for a, b in zip(out.ids, both.ids))


def test_a_state_is_read_again_where_the_context_does_not_know_it(world):
    shape, seen = Pattern(COFFEE, world), []
    chooser = Constrained(shape)

    def choose(prediction, context):
        fresh = Context(context.ids, context.mask, context.prompt_lengths, context.row)
        known, new = chooser(prediction, context), chooser(prediction, fresh)
        chooser(prediction, context)  # asked twice at one place: nothing moves
        seen.append(known.ids.equal(new.ids) and context.memory[chooser] == fresh.memory[chooser])
        return known

    generate(world, ["", "water"], choose, 5)
    assert all(seen) and len(seen) > 2


def test_beams_stay_in_the_shape_and_find_the_best_text(world):
    law = fitting_law(world, Pattern(COFFEE, world), 5)
    by_q = max(law, key=lambda ids: law[ids][1])
    by_p = max(law, key=lambda ids: law[ids][0])
    for dialect, best in ((None, by_q), ("huggingface", by_p)):
        model = world if dialect is None else wider(world)
        shape = Constrained(Pattern(COFFEE, model))
        found = beam_search(model, "", 40, 5, n_best=9, process=shape, dialect=dialect)
        assert tuple(found[0].ids.tolist()) == best
        assert all(tuple(h.ids.tolist()) in law for h in found)
    assert by_q != by_p


def wider(world, size=100):
    "The same world with words that never come: transformers' rule needs many candidates."
    more = size - world.vocab_size

    class Wide(type(world)):
        def __call__(self, ids, **options):
            return Prediction(torch.nn.functional.pad(world(ids).logits, (0, more), value=-1e9))

    wide = Wide.__new__(Wide)
    wide.__dict__.update(world.__dict__)
    wide.vocab_size, wide.words = size, [*world.words, *(f"-{i}" for i in range(more))]
    return wide


def test_a_beam_takes_no_policy_in_a_shape(world):
    policy = Constrained(Pattern(COFFEE, world), EntropySampler(attention=False))
    with pytest.raises(TypeError, match="process: Constrained chooses tokens"):
        beam_search(world, "", 2, 5, process=policy)
    drawn = Constrained(Pattern(COFFEE, world), Sampler(top_k=1))  # filters act behind the mask
    assert len(beam_search(world, "", 9, 5, n_best=9, process=drawn)) == 1


def test_beams_on_the_real_model(small, vocabulary):
    shape = Pattern(r" (yes|no)(, \w+){1,2}\.", vocabulary)
    for h in beam_search(small, "Is it? Answer:", 2, 7, n_best=2, process=Constrained(shape)):
        assert not h.finished or re.fullmatch(shape.automaton.pattern, h.text)


def test_a_stop_or_the_length_may_cut(world):
    out = generate(world, "", Constrained(Pattern(r"(\w+ ){4}", world)), 2)
    assert out.reason == "length" and len(out.ids) == 2
    assert log_weights(out).tolist() == [-torch.inf]
    with pytest.raises(TypeError, match="result: Draw is no draw of a Constrained"):
        log_weights(generate(world, "", greedy, 2))


def test_errors_of_choosers_name_the_row(world):
    shape = Pattern(COFFEE, world)
    with pytest.raises(TypeError, match="shape: 'x' is no Shape"):
        Constrained("x")
    with pytest.raises(TypeError, match="shape: 3 is no Shape"):
        Constrained([shape, 3])
    with pytest.raises(TypeError, match="choose: 1 is not callable"):
        Constrained(shape, 1)
    with pytest.raises(ValueError, match="shape: 1 shapes, and there is a row 1"):
        generate(world, ["", ""], Constrained([shape]), 3)

    def stubborn(prediction, context):
        return Draw(torch.zeros(len(prediction.logits), dtype=torch.long))

    with pytest.raises(ValueError, match="choose: row 0: 0 is not allowed by the shape"):
        generate(world, "", Constrained(shape, stubborn), 3)
    with pytest.raises(ValueError, match="shape: of 6 tokens, and the model has 3"):
        generate(TableModel([1, 0, 0], [[1, 0, 0]] * 3, eos=2), "", Constrained(shape), 3)
    never = TableModel([0.5, 0.5, 0], [[0.5, 0.5, 0]] * 3, ["a", "b", "end"], eos="end")
    with pytest.raises(ValueError, match="row 0 has no finite score for any allowed token"):
        generate(never, "", Constrained(Pattern("a ", never)), 3)
    ids = torch.tensor([[1, 0]])
    place = Context(ids, ids >= 0, torch.tensor([1]), torch.tensor([7]))
    with pytest.raises(ValueError, match="row 7: token: 0, b'cold ', does not fit here"):
        Constrained(shape)(Prediction(torch.zeros(1, 6)), place)


def test_many_prompts_keep_their_numbers(world, tmp_path):
    source = tmp_path / "prompts.jsonl"
    source.write_text("\n".join(json.dumps({"prompt": "I"}) for _ in range(7)))
    choose = Constrained(Pattern(r"(\w+ ){1,2}coffee ", world), Sampler(seed=3))
    found = []
    for batch in (2, 7):
        decode_file(source, tmp_path / str(batch), six_words, choose, batch=batch, max_new_tokens=4)
        found.append([record["ids"] for record in results(tmp_path / str(batch))])
    assert found[0] == found[1] and len(set(map(tuple, found[0]))) > 1


# ---- JSON


@pytest.mark.parametrize("schema", SCHEMAS, ids=range(20))
def test_texts_of_a_schema_are_valid_and_no_others_fit(schema):
    automaton, rng = Automaton(json_pattern(schema, space="")), random.Random(2)
    for text in (
        "",
        "null",
        "true",
        "-1.5e+3",
        "12",
        '"ab"',
        '"abc\\n"',
        "[1,2]",
        "{}",
        "[]",
        "[null]",
    ):
        try:
            value = json.loads(text)
            jsonschema.validate(value, schema)
        except (ValueError, jsonschema.ValidationError):
            assert not automaton.fits(text), text
    found = 0
    for _ in range(60):
        state, out = 1, b""
        while len(out) < 90:
            if automaton.accepts(state) and rng.random() < 0.5:
                break
            row = [b for b in range(32, 127) if automaton.read(state, bytes([b]))]
            if not row:
                break
            out += bytes([rng.choice(row)])
            state = automaton.read(state, out[-1:])
        if automaton.accepts(state):
            jsonschema.validate(json.loads(out), schema)
            found += 1
    assert found > 5


def test_lengths_count_characters_and_an_escape_is_one():
    automaton = Automaton(json_pattern(text_of(minLength=2, maxLength=3)))
    for text, ok in [
        ('"a"', False),
        ('"ab"', True),
        ('"é😀日"', True),
        ('"abcd"', False),
        (r'"\n\u00e9"', True),
        (r'"\ud83d\ude00"', False),
        ('"a\nb"', False),
        (r'"\x"', False),
    ]:
        assert automaton.fits(text) == ok, text


def test_values_of_an_enum_are_of_the_type_that_is_asked_for():
    values = [1, 2.0, 2.5, "1", True, None, [1], {"a": 1}]
    for kind, texts in [
        ("integer", ["1", "2.0"]),
        ("number", ["1", "2.0", "2.5"]),
        ("boolean", ["true"]),
        (["null", "array", "object"], ["null", "[1]", '{"a":1}']),
    ]:
        automaton = Automaton(json_pattern({"enum": values, "type": kind}))
        for value in values:
            text = json.dumps(value)
            assert automaton.fits(text) == (text.replace(": ", ":") in texts), (kind, text)


def test_members_come_in_order_and_may_be_left_out():
    schema = record_of({"a": INTEGER, "b": INTEGER, "c": INTEGER}, ["b"])
    automaton = Automaton(json_pattern(schema))
    good = ['{"b":1}', '{"a":1,"b":2}', '{"b": 2, "c": 3}', '{"a":1, "b":2, "c":3}']
    bad = ["{}", '{"a":1}', '{"b":1,"a":2}', '{"b":1,}', '{,"b":1}', '{"b":01}', '{ "b":1}']
    assert all(map(automaton.fits, good)) and not any(map(automaton.fits, bad))


@pytest.mark.parametrize(
    "schema, says",
    [
        ({"$ref": "#/x"}, "schema: $: '$ref' is not understood"),
        ({}, "schema: $: type None is not understood"),
        ("string", "schema: $: 'string' is no schema"),
        ({"type": "date"}, "schema: $: type 'date' is not understood"),
        ({"type": "integer", "minimum": 3}, "'minimum' is not understood"),
        ({"type": "string", "pattern": "a"}, "'pattern' is not understood"),
        ({"type": "array"}, "schema: $[]: None is no schema"),
        ({"enum": []}, "no value is left"),
        ({"type": "null", "enum": [1]}, "no value is left"),
        (record_of({}, ["a"]), "required 'a' is no property"),
        (record_of({"a": {"type": "array", "items": {"oneOf": []}}}, []), "$.a[]: 'oneOf'"),
        (text_of(minLength=3, maxLength=2), "$: maxLength: 2 is below 3"),
        (text_of(minLength=-1), "$: minLength: -1 is below 0"),
        (text_of(maxLength=1.5), "$: maxLength: 1.5 is not an integer"),
        ({"const": float("nan")}, "not JSON compliant"),
        ({"type": "string", "anyOf": [{"type": "integer"}]}, "$: 'type' is not understood here"),
        ({"const": 1, "enum": [2]}, "$: 'const' beside 'enum'"),
        ({"type": []}, "$: type [] is not understood"),
        ({"type": "enum"}, "$: type 'enum' is not understood"),
        ({"type": [["null"]]}, "$: type ['null'] is not understood"),
        ({"anyOf": []}, "$: anyOf: [] is no list of at least one entry"),
        ({"enum": "abc"}, "$: enum: 'abc' is no list"),
        ({"enum": [{1: 2}]}, "{1: 2} is no object"),
        ({"type": "object", "properties": {1: {"type": "null"}}}, "$: properties: {1:"),
        ({"type": "object", "properties": ["a"]}, "$: properties: ['a'] is no object"),
        (
            {"type": "object", "required": "a", "properties": {"a": INTEGER}},
            "required: 'a' is no list",
        ),
        (
            {"type": "object", "additionalProperties": True},
            "an object that is open is not understood",
        ),
        (
            {"type": "array", "items": INTEGER, "maxItems": None},
            "$: maxItems: None is not an integer",
        ),
        ({"type": "integer", "enum": [math.inf]}, "no value is left"),
        ({"enum": [{3}]}, "{3}: Object of type set"),
    ],
)
def test_schemas_beyond_the_subset_are_refused_with_their_path(schema, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        json_pattern(schema)


# ---- llguidance behind the same seam

grammars = pytest.mark.skipif(
    not importlib.util.find_spec("llguidance"), reason="the extra `grammar` is not installed"
)


def follow_both(ours, theirs, vocabulary, rng, longest=40):
    """Along a random text: llguidance allows no other tokens, and fewer only where bytes are
    forced, or in an escape, which must be one that is needed."""
    a, b, out = ours.start, theirs.start, []
    for _ in range(longest):
        ma, mb = ours.allowed(a), theirs.allowed(b)
        assert not (mb & ~ma).any(), vocabulary.text(out)
        if not ma.equal(mb):
            first = {vocabulary.tokens[i][:1] for i in ma.nonzero()[:, 0].tolist()}
            text = b"".join(vocabulary.tokens[i] for i in out)
            assert len(first) == 1 or re.search(rb"(?<!\\)(\\\\)*\\(u[0-9a-f]{0,3})?$", text), text
        token = rng.choice(mb.nonzero()[:, 0].tolist())
        a, b = ours.advance(a, token), theirs.advance(b, token)
        if token in vocabulary.ends:
            return vocabulary.text(out)
        out.append(token)


@grammars
@pytest.mark.parametrize("schema", SCHEMAS, ids=range(20))
def test_llguidance_agrees_on_schemas(vocabulary, schema, full):
    closed = json.loads(
        json.dumps(schema).replace('"required"', '"additionalProperties": false, "required"')
    )
    theirs = Grammar("json_schema", closed, vocabulary, whitespace_flexible=False)
    ours, rng = Pattern(json_pattern(closed, space=""), vocabulary), random.Random(3)
    for _ in range(20 if full else 2):
        text = follow_both(ours, theirs, vocabulary, rng)
        if text is not None:
            jsonschema.validate(json.loads(text), schema)


@grammars
def test_llguidance_in_the_loop_and_its_errors(small, vocabulary):
    shape = Grammar("regex", r"[a-z]{2,5}( [0-9]{2})?", vocabulary)
    assert isinstance(shape, Shape)
    out = generate(small, ["A word:", "Another:"], Constrained(shape, Sampler(seed=1)), 12)
    assert all(re.fullmatch(r"[a-z]{2,5}( [0-9]{2})?", t) for t in out.text)
    nested = Grammar("lark", 'start: "(" start ")" | "x"', vocabulary)
    text = generate(small, "(", Constrained(nested), 20).text
    assert re.fullmatch(r"\(*x\)*", text) and text.count("(") == text.count(")")
    with pytest.raises(ValueError, match="does not fit here"):
        shape.advance(shape.start, vocabulary.ends[0])
    with pytest.raises(ValueError, match="kind: 'xml' is not one of"):
        Grammar("xml", "", vocabulary)
    with pytest.raises(ValueError, match="grammar: "):
        Grammar("regex", "(a", vocabulary)


def test_without_llguidance_the_error_says_what_to_install(vocabulary, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(ImportError, match=r"pip install 'decoding_book\[grammar\]'"):
        Grammar("regex", "a", vocabulary)


# ---- laws


def columns(law):
    return torch.tensor(list(law.values()), dtype=torch.float64).T


def variation(a, b):
    return (a - b).abs().sum().item() / 2


@pytest.mark.parametrize(
    "pattern", [COFFEE, r"(\w+ ){0,3}(coffee|water) ", "I |coffee ", r"(I like )?(cold )?coffee "]
)
def test_the_conditional_law_is_that_of_enumeration(world, pattern, record):
    everything = sequence_law(world, 5)
    truth = {
        ids: p
        for ids, p in everything.items()
        if ids[-1] == world.eos
        and re.fullmatch(pattern, "".join(f"{world.words[i]} " for i in ids[:-1]))
    }
    law = fitting_law(world, Pattern(pattern, world), 5)
    assert set(law) == set(truth)
    Z, own = sum(truth.values()), sum(p for p, _ in law.values())
    worst = max(abs(law[ids][0] / own - truth[ids] / Z) for ids in truth)
    record("conditional law against enumeration, largest difference", worst)
    assert worst < 1e-12 and abs(sum(q for _, q in law.values()) - 1) < 1e-12
    assert variation(columns(law)[0] / own, columns(law)[1]) > 0.05  # masking is not conditioning


def test_the_masked_law_is_what_masked_draws_follow(world, full):
    shape, rows = Pattern(COFFEE, world), 20_000 if full else 1000
    law = fitting_law(world, shape, 5)
    out = generate(world, [""] * rows, Constrained(shape, Sampler(seed=6)), 5)
    drawn = [tuple(ids.tolist()) for ids in out.ids]
    counts = torch.tensor([drawn.count(ids) for ids in law])
    p, q = columns(law)
    assert counts.sum() == rows and chi_square(counts, q) > 1e-4
    assert chi_square(counts, p / p.sum()) < 1e-9
    weights = log_weights(out)
    own = torch.tensor([law[ids][0] / law[ids][1] for ids in drawn], dtype=torch.float64)
    assert torch.allclose(weights.exp(), own, rtol=1e-12)
    assert abs(weights.exp().mean() - p.sum()) < 4 * weights.exp().std() / rows**0.5


def test_weights_and_laws_know_a_temperature_and_a_prompt(world):
    cold = Sampler(temperature=0.5)
    shape = Pattern(r"(cold |coffee ){1,2}", world)
    law = fitting_law(world, shape, 3, law=cold.distribution, prompt="I")
    all_texts = sequence_law(world, 3, law=cold.distribution, prompt="I")
    for ids, (p, _) in law.items():
        assert abs(p - all_texts[ids]) < 1e-12
    assert abs(sum(q for _, q in law.values()) - 1) < 1e-12


def all_futures(world, shape, n):
    futures, before = Futures(), {}
    for text, row in beginnings(world, shape, n):
        if text:
            futures.follow(text[:-1], text[-1], before[text[:-1]][text[-1]].item())
        before[text] = row
        futures.visit(text, 0, row.sum().item())
    return futures


@pytest.mark.parametrize("pattern", [COFFEE, "I |coffee ", r"(\w+ ){0,3}(coffee|water) "])
def test_known_futures_give_the_true_law(world, pattern):
    shape = Pattern(pattern, world)
    futures = all_futures(world, shape, 5)
    p, q = columns(fitting_law(world, shape, 5, futures=futures))
    assert (p / p.sum() - q).abs().max() < 1e-12
    assert abs(futures.chance[()] - p.sum()) < 1e-12


def test_an_adaptive_chooser_draws_by_its_futures_and_comes_close(world, full):
    shape = Pattern(COFFEE, world)
    p, q = columns(fitting_law(world, shape, 5))
    learner = Adaptive(shape)
    for n in range(3000 if full else 100):
        learner.choose = Sampler(seed=n)
        generate(world, "", learner, 5)
    _, learned = columns(fitting_law(world, shape, 5, futures=learner.futures))
    truth = p / p.sum()
    assert variation(learned, truth) < (2e-3 if full else 0.035) < variation(q, truth) / 10
    rows, known = 4000 if full else 800, all_futures(world, shape, 5)
    out = generate(world, [""] * rows, Adaptive(shape, Sampler(seed=1), futures=known), 5)
    drawn = [tuple(ids.tolist()) for ids in out.ids]
    law = fitting_law(world, shape, 5)
    counts = torch.tensor([drawn.count(ids) for ids in law])
    big = truth > 0.005
    both = [torch.cat([x[big], x[~big].sum()[None]]) for x in (counts, truth)]
    assert chi_square(*both) > 1e-4
    assert torch.allclose(
        log_weights(out).exp(), p.sum().expand(rows), rtol=1e-9
    )  # nothing to mend


def test_futures_are_kept_by_prompt_and_chances_only_fall(world):
    shape = Pattern(r"(\w+ ){0,2}coffee ", world)
    learner, last = Adaptive(shape, Sampler(seed=2)), {}
    for n in range(15):
        learner.choose = Sampler(seed=n)
        generate(world, ["I", "cold"], learner, 3)
        now = dict(learner.futures.chance)
        assert all(now[ids] <= chance + 1e-12 for ids, chance in last.items())
        last = now
    given = [tuple(world.encode(text)) for text in ("I", "cold")]
    assert all(0 < last[ids] < 1 for ids in given) and last[given[0]] != last[given[1]]


def test_rejection_is_conditioning(world, full):
    rows = 60_000 if full else 1500
    law = fitting_law(world, Pattern(COFFEE, world), 5)
    p, q = columns(law)
    out = generate(world, [""] * rows, Sampler(seed=9), 5)
    kept = [ids for ids in (tuple(t.tolist()) for t in out.ids) if ids in law]
    counts, truth = torch.tensor([kept.count(ids) for ids in law]), p / p.sum()
    big = truth > 0.01
    both = [torch.cat([x[big], x[~big].sum()[None]]) for x in (counts, truth)]
    assert chi_square(*both) > 1e-4
    assert abs(len(kept) / rows - p.sum()) < 0.02


def other_world():
    "A drafter that knows little: the toy world's words, its rows turned round."
    w = six_words(eos=None)
    return TableModel(w.logs[0].exp(), w.logs[1].flip(1).exp(), w.words, eos="stop")


def test_the_published_rule_in_a_shape_has_the_masked_law(world):
    shape, counts = Pattern("I (like |coffee |cold )", world), Counter()
    law = fitting_law(world, shape, 5, prompt="stop")
    choose = Constrained(shape, AcceptReject(Sampler(seed=1)))
    found = speculate(world, ["stop"] * 150, choose, 5, drafter=ModelDrafter(other_world()))
    counts.update(tuple(ids.tolist()) for ids in found.ids)
    assert chi_square([counts[ids] for ids in law], [q for _, q in law.values()]) > 1e-4


def test_an_adaptive_chooser_learns_nothing_from_drafts(world):
    shape = Pattern(r"I (\w+ ){0,2}coffee ", world)
    plain, drafted = (Adaptive(shape, Sampler(seed=1)) for _ in range(2))
    a = generate(world, ["stop"] * 30, plain, 6)
    b = speculate(world, ["stop"] * 30, drafted, 6, drafter=ModelDrafter(other_world()))
    assert all(x.equal(y) for x, y in zip(a.ids, b.ids))
    assert plain.futures.chance == drafted.futures.chance


def test_a_drafter_that_cannot_say_what_fits_costs_passes_only(world):
    rows = torch.zeros(6, 6)
    rows[:, 0] = 1
    stubborn = TableModel(rows[0].tolist(), rows, world.words, eos="stop")  # "cold", always
    choose = Constrained(Pattern("(I |coffee ){2,3}", world), Sampler(seed=1))
    found = speculate(world, ["I", "cold"], choose, 5, drafter=ModelDrafter(stubborn))
    assert found.text == generate(world, ["I", "cold"], choose, 5).text


def test_choosers_inside_keep_their_numbers(world):
    shape = Pattern(r"(\w+ ){3}", world)
    for inner in (Mirostat(2.0, sampler=Sampler(seed=1)), AcceptReject(Sampler(seed=1))):
        texts = []
        for size in (1, 2, 4):
            parts = [
                decode_batch(
                    world, n, [("I", None)] * size, Constrained(shape, inner), max_new_tokens=4
                )
                for n in range(0, 4, size)
            ]
            texts.append([record["text"] for part in parts for record in part])
        assert texts[0] == texts[1] == texts[2] and len(set(texts[0])) > 1


def test_more_shapes_than_rows_are_refused(world):
    shapes = [Pattern("I ", world)] * 3
    with pytest.raises(ValueError, match="shape: 3 shapes for 2 rows"):
        generate(world, ["", ""], Constrained(shapes), 3)
    with pytest.raises(ValueError, match="shape: 3 shapes for 2 rows"):
        beam_search(world, ["", ""], 2, 3, process=Constrained(shapes))


def test_a_text_that_a_stop_string_cut_has_no_weight(world):
    choose = Constrained(Pattern("(I |coffee ){3}", world), Sampler(seed=1))
    whole, cut = (generate(world, ["I"] * 4, choose, 4, stop=stop) for stop in (None, "coffee"))
    assert log_weights(whole).isfinite().all() and set(cut.reason) == {"stop"}
    assert log_weights(cut).isinf().all()
    assert log_weights(pickle.loads(pickle.dumps(whole))).equal(log_weights(whole))


def test_space_is_a_pattern_of_its_own():
    automaton = Automaton(json_pattern({"type": "array", "items": {"type": "null"}}, space=" |\n"))
    assert all(map(automaton.fits, ["[null,\nnull, null]", "[null]"]))
    assert not any(map(automaton.fits, ["[null,\n]", "[null,null]", "[null,"]))


def test_a_vocabulary_is_of_bytes():
    for tokens in (["a ", "b "], [1, 2]):
        with pytest.raises(TypeError, match="tokens: .*, id 0, is neither bytes nor None"):
            Vocabulary(tokens, [1])
