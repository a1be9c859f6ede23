"The command: its options, what it shows, its sentences and statuses; in a terminal and in a pipe."

import dataclasses
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.shell import shown, start
from decoding_book import shell, smollm
from decoding_book.beam import beam_search
from decoding_book.entropix import BRANCHES, Decision, EntropySampler
from decoding_book.loop import generate
from decoding_book.sampler import ORDER, Sampler, Settings
from decoding_book.shell import KNOBS, harmless, main, read_options, shade, wants_colour
from decoding_book.show import surprisal

ROOT = Path(__file__).resolve().parent.parent
SEA = "The sea was"
CODES = re.compile(r"\x1b\[[0-9;]*m")
NOTICES = re.compile(r"^decoding_book: compiling .*\n", re.M)  # after a change of the package


@pytest.fixture(scope="module")
def small():
    "SmolLM2 as the command loads it."
    return shell.load_model(None, None)[0]


@pytest.fixture
def call(capsys):
    "Call the command in this process: status, output, errors."

    def call(*words):
        capsys.readouterr()  # what was written before, such as a progress bar of the package
        status = main([str(word) for word in words])
        out, error = capsys.readouterr()
        return status, out, NOTICES.sub("", error)

    return call


@pytest.fixture
def screen(monkeypatch):
    "Standard output becomes a terminal: call the command, see what it writes."

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    def call(*words, **environment):
        for name in ("NO_COLOR", "TERM"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "stdout", Terminal())
        assert main(list(words)) == 0
        return sys.stdout.getvalue()

    return call


# ---- the options


def test_the_knobs_are_the_sampler_s_in_the_order_in_which_they_act():
    defaults = {f.name: f.default for f in dataclasses.fields(Settings)}
    assert {name: knob[2] for name, knob in KNOBS.items()} == {
        name: defaults[name] or 0 for name in KNOBS
    }
    assert [name for name in KNOBS if name in ORDER] == list(ORDER)


def test_the_forms_are_the_model_s():
    assert shell.FORMS == (*smollm.PACKED | smollm.DTYPES,)


def test_help_teaches_every_option_and_its_default(call):
    status, out, _ = call("--help")
    assert status == 0
    others = ("--beam", "--entropy", "--model", "--weights", "--stop", "--explain", "--json")
    for name in (*map(shell.option, KNOBS), *others):
        assert re.search(rf"^  {name}\b", out, re.M), name
    text = " ".join(out.split())
    for default in ("(default 1)", "(default 0)", "(default 64)", "(default: q4"):
        assert default in text
    assert max(map(len, out.splitlines())) <= 100
    for line in re.findall(r"^  (?:.*\| )?decoding-book (.*?)(?:   .*)?$", out, re.M):
        read_options(re.findall(r"[^\s\"]+", line.replace(f'"{SEA}"', "sea").split('"')[-1]))


def test_help_and_slips_import_no_torch():
    code = "import sys; from decoding_book.shell import main\n"
    for words in (["--help"], ["a", "--top_p", "1"], ["a", "--seed", "x"], ["--version"]):
        code += f"main({words})\n"
    code += "print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "False", done.stderr


def test_version_is_the_package_s(call):
    import decoding_book

    assert call("--version")[:2] == (0, f"decoding-book {decoding_book.__version__}\n")


# ---- what is wrong


@pytest.mark.parametrize(
    "words, status, said",
    [
        ("--top_p .9", 2, "--top_p is no option; did you mean --top-p?"),
        ("--chatt", 2, "did you mean --chat?"),
        ("--xyzzy", 2, "--xyzzy is no option"),
        ("sea", 2, "'sea' is a second prompt: put quotes around"),
        ("--seed x", 2, "argument --seed: invalid int value: 'x'"),
        ("--weights q8", 2, "argument --weights: invalid choice: 'q8'"),
        ("--top-p", 2, "argument --top-p: expected one argument"),
        ("--beam 2 --entropy", 2, "either searched for or drawn"),
        ("--beam 2 --explain", 2, "a beam removes no token"),
        ("--beam 2 --top-k 3", 2, "--top-k has no effect with --beam"),
        ("--beam 2 --seed 3", 2, "--seed has no effect with --beam"),
        ("--entropy --min-p .1", 2, "--min-p has no effect with --entropy"),
        ("--top-p 1.5", 2, "top_p: 1.5 is outside (0, 1]"),
        ("--temperature -1", 2, "temperature: -1.0 is outside [0, inf)"),
        ("--temperature nan", 2, "temperature: nan is outside"),
        ("--seed -1", 2, "seed: -1 is outside 0..2^64 - 1"),
        ("--max-new-tokens 0", 2, "max_new_tokens: 0 is below 1"),
        ("--beam 0", 2, "width: 0 is below 1"),
        ("--model none.gguf", 1, "none.gguf: No such file or directory"),
        ("--model README.md", 1, "README.md is not a GGUF file"),
        ("--model nbs", 1, "nbs: Is a directory"),
        ("--model=", 2, "--model: '' names no file"),
    ],
)
def test_a_mistake_is_one_sentence_and_a_status(call, monkeypatch, words, status, said):
    monkeypatch.chdir(ROOT)
    found, out, error = call(SEA, *words.split())
    assert (found, out) == (status, "")
    assert error.startswith("decoding-book: ") and error.count("\n") == 1 and said in error


def test_an_empty_prompt_and_an_empty_stop_are_refused_by_name(call):
    for words, said in (([""], "prompt: '' is empty"), ([SEA, "--stop", ""], "stop: '' is empty")):
        status, out, error = call(*words)
        assert (status, out) == (2, "") and said in error


def test_a_prompt_that_fills_the_context_is_refused(call):
    status, out, error = call("a " * 9000, "--max-new-tokens", 1)
    assert (status, out) == (2, "") and "leave no room in a context of 8192" in error


def test_a_file_that_is_cut_off_is_a_sentence(call, tmp_path):
    cut = tmp_path / "cut.gguf"
    with open(smollm.weights_path(), "rb") as file:
        cut.write_bytes(file.read(100_000))
    status, out, error = call(SEA, "--model", cut)
    assert (status, out) == (1, "") and "truncated or damaged" in error and error.count("\n") == 1


def test_without_compiled_loops_it_goes_on_in_float32_and_names_the_extra(call, monkeypatch):
    from decoding_book import four_bits

    smollm.load.cache_clear()
    gone = "it needs the package numba. Run: pip install 'decoding_book[fast]'"
    monkeypatch.setattr(four_bits, "MISSING", gone)
    words = (SEA, "--temperature", 0, "--max-new-tokens", 1)
    status, out, error = call(*words)
    assert status == 0 and out.strip() and gone in error and error.count("\n") == 1
    status, out, error = call(*words, "--weights", "q4")
    assert (status, out) == (1, "") and gone in error and error.count("\n") == 1
    smollm.load.cache_clear()


def test_what_fails_in_the_middle_keeps_the_text_and_ends_in_a_sentence(call, small, monkeypatch):
    calls = []

    def fails_later(model, ids, **options):
        calls.append(ids)
        if len(calls) > 3:
            raise ValueError("the machine\nis on fire")
        return small(ids, **options)

    class Failing(type(small)):
        __call__ = fails_later

    broken = object.__new__(Failing)
    broken.__dict__.update(small.__dict__)
    monkeypatch.setattr(shell, "load_model", lambda path, form: (broken, None))
    status, out, error = call(SEA, "--temperature", 0)
    first = generate(small, SEA, max_new_tokens=3).text
    assert (status, out) == (1, first + "\n") and error == "decoding-book: the machine is on fire\n"


def test_what_fails_at_once_shows_nothing(call, monkeypatch):
    def fails(steps):
        raise shell.Refused(1, "no")
        yield

    monkeypatch.setattr(shell, "watched", fails)
    for words in ([SEA], [SEA, "--json"], [SEA, "--explain"]):
        assert call(*words) == (1, "", "decoding-book: no\n")


def test_a_bug_is_no_sentence(monkeypatch):
    def bug(path, form):
        raise AssertionError("a bug")

    monkeypatch.setattr(shell, "load_model", bug)
    with pytest.raises(AssertionError):
        main([SEA])


# ---- the prompt


@pytest.mark.parametrize("words", [[], ["-"]])
def test_the_prompt_may_come_through_a_pipe(call, monkeypatch, small, words):
    monkeypatch.setattr(sys, "stdin", io.StringIO(SEA + "\n"))
    words = [*words, "--temperature", "0", "--max-new-tokens", "4"]
    assert call(*words)[1] == generate(small, SEA, max_new_tokens=4).text + "\n"


def test_only_one_line_break_is_taken_off():
    assert shell.read_prompt(None, io.StringIO("a\n\n")) == "a\n"
    assert shell.read_prompt("a\n", None) == "a\n"


def test_no_prompt_at_a_terminal_does_not_wait():
    class Keyboard:
        def isatty(self):
            return True

    for pipe in (Keyboard(), None):
        with pytest.raises(shell.Refused, match="no prompt"):
            shell.read_prompt(None, pipe)


def test_bytes_that_are_no_text_are_refused(call, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), "utf-8"))
    status, out, error = call()
    assert (status, out) == (2, "") and "input is not a text in utf-8: byte 0 is 0xff" in error
    for words in ([SEA, "--stop", "ab\udcff"], ["é\udc80"]):
        status, out, error = call(*words)
        assert (status, out) == (2, "") and error.count("\n") == 1
        assert "is not a text in utf-8: byte 2 is 0x" in error


def test_options_may_stand_before_the_prompt():
    assert read_options(["--seed", "3", SEA, "--chat"]).prompt == SEA


# ---- the text is that of the package


def test_the_text_is_that_of_the_sampler(call, small):
    words = "--temperature .8 --top-k 40 --top-p .9 --min-p .02 --repetition-penalty 1.2 --seed 3"
    same = Sampler(temperature=0.8, top_k=40, top_p=0.9, min_p=0.02, repetition_penalty=1.2, seed=3)
    expected = generate(small, SEA, same, 12).text
    assert call(SEA, *words.split(), "--max-new-tokens", 12) == (0, expected + "\n", "")


def test_without_options_it_is_the_model_s_own_law(call, small):
    assert call(SEA, "--max-new-tokens", 6)[1] == generate(small, SEA, Sampler(), 6).text + "\n"


def test_stops_and_chat_are_those_of_the_package(call, small):
    text = generate(small, SEA, max_new_tokens=32).text
    stop = text[12:15]
    found = call(SEA, "--temperature", 0, "--stop", "zzz", "--stop", stop)[1]
    assert found == text[: text.index(stop)] + "\n"
    prompt = small.chat([{"role": "user", "content": SEA}])
    expected = generate(small, prompt, max_new_tokens=5).text
    assert call(SEA, "--chat", "--temperature", 0, "--max-new-tokens", 5)[1] == expected + "\n"


def test_a_beam_and_the_policy_are_those_of_the_package(call, small):
    best = beam_search(small, SEA, 3, 6)[0]
    assert call(SEA, "--beam", 3, "--max-new-tokens", 6)[1] == best.text + "\n"
    drawn = generate(small, SEA, EntropySampler(seed=5), 6).text
    assert call(SEA, "--entropy", "--seed", 5, "--max-new-tokens", 6)[1] == drawn + "\n"


def test_a_file_may_be_named(call, small):
    words = ("--model", smollm.weights_path(), "--weights", "float32", "--temperature", 0)
    found = call(SEA, *words, "--max-new-tokens", 3)
    assert found[1] == generate(small, SEA, max_new_tokens=3).text + "\n" and found[2] == ""


# ---- JSON and explanations


def test_json_is_one_object_that_can_be_replayed(call, small):
    words = ("--temperature", 0, "--max-new-tokens", 5, "--json")
    status, out, _ = call(SEA, *words)
    said, same = json.loads(out), generate(small, SEA, max_new_tokens=5)
    assert status == 0 and out.count("\n") == 1
    assert (said["prompt"], said["text"], said["reason"]) == (SEA, same.text, "length")
    assert said["settings"] == {"temperature": 0.0, "max_new_tokens": 5, "weights": "q4"}
    assert said["ids"] == same.ids.tolist() and said["prompt_ids"] == same.prompt_ids.tolist()
    assert said["logprobs"] == same.logprobs.tolist()
    for step, id, logprob in zip(said["steps"], said["ids"], said["logprobs"]):
        best = step["alternatives"][0]
        assert (best["id"], best["token"], best["logprob"]) == (id, small.decode([id]), logprob)
        assert step["bits"] == surprisal(logprob) and "stages" not in step


def test_json_explains_what_each_filter_removed(call, small):
    words = ("--top-k", 5, "--top-p", 0.8, "--max-new-tokens", 3, "--json", "--explain")
    steps = json.loads(call(SEA, *words)[1])["steps"]
    cut, ids = Sampler(top_k=5, top_p=0.8), small.encode(SEA)
    for step in steps:
        logits = small(torch.tensor([ids])).logits[0]
        trace = cut.trace(logits)
        for said, stage in zip(step["stages"], trace.stages, strict=True):
            assert (said["stage"], said["removed"]) == (stage.name, len(stage.removed))
            assert said["likeliest"] == [small.decode([i]) for i in stage.removed[:4]]
            assert said["mass"] == pytest.approx(1 - stage.mass, abs=1e-4)
        law = cut.distribution(logits)
        assert step["chance"] == pytest.approx(law[step["id"]].item(), abs=1e-3)
        ids.append(step["id"])


def test_the_policy_s_filters_are_those_of_its_decision():
    def filters(T, p, k, m):
        numbers = [torch.tensor([x]) for x in (0, 0, T, p, k, m)]
        return shell.filters_of(None, SimpleNamespace(decision=Decision(*numbers)))

    nan = float("nan")
    assert filters(nan, nan, -1, nan).temperature == 0  # the best, without a draw
    found = filters(0.5, 0.75, 20, 0.25)
    assert (found.temperature, found.top_p, found.top_k, found.min_p) == (0.5, 0.75, 20, 0.25)


def test_the_policy_names_its_branch(call):
    out = call(SEA, "--entropy", "--max-new-tokens", 3, "--json", "--explain")[1]
    steps = json.loads(out)["steps"]
    assert {s["branch"] for s in steps} <= set(BRANCHES) and len(steps) == 3
    assert all(s["entropy"] > 0 and s["stages"] for s in steps)


def test_a_beam_in_json_has_its_score(call, small):
    said = json.loads(call(SEA, "--beam", 3, "--max-new-tokens", 6, "--json")[1])
    best = beam_search(small, SEA, 3, 6)[0]
    assert (said["text"], said["ids"]) == (best.text, best.ids.tolist())
    assert (said["logprob"], said["score"]) == (best.logprob, best.score)
    assert said["settings"]["beam"] == 3 and said["reason"] == "length"


def test_an_answer_that_ends_by_itself_shows_no_end_mark(call, small):
    words = ("What is the capital of France?", "--chat", "--beam", 2, "--json")
    said = json.loads(call(*words)[1])
    assert said["reason"] == "eos" and said["ids"][-1] in small.end_ids
    assert said["text"] == small.decode(said["ids"][:-1]) == "The capital of France is Paris."
    assert call(*words[:-1])[1] == said["text"] + "\n"


def test_explain_prints_a_line_a_filter_and_the_text_at_the_end(call, small):
    out = call(SEA, "--top-k", 2, "--max-new-tokens", 2, "--explain")[1]
    lines, text = out.split("\n\n")
    assert text == generate(small, SEA, Sampler(top_k=2), 2).text + "\n"
    kinds = [line.split()[0] for line in lines.splitlines()]
    assert kinds == ["1", "logits", "top_k", "2", "logits", "top_k"]
    removed = re.findall(r"top_k 2 .* bits   removed (\d+), ([\d.]+)% of the mass: \S", lines)
    assert [int(n) for n, _ in removed] == [small.vocab_size - 2] * 2


# ---- colours


def test_a_terminal_shows_the_prompt_and_shades_each_token(screen, small):
    words = [SEA, "--temperature", "0", "--max-new-tokens", "5"]
    out, said = screen(*words), generate(small, SEA, max_new_tokens=5)
    pieces = [shade(s.text[0], surprisal(s.logprobs[0].item())) for s in said.steps]
    assert out == f"\x1b[2m{SEA}\x1b[0m" + "".join(pieces) + "\n"
    assert CODES.sub("", out) == SEA + said.text + "\n"
    plain = SEA + said.text + "\n"
    assert screen(*words, NO_COLOR="1") == screen(*words, "--no-color") == plain
    assert screen(*words, TERM="dumb") == screen(*words, "--color", "never") == plain
    assert screen(*words, NO_COLOR="") == out
    assert "\x1b" in screen(*words, "--color", "always", NO_COLOR="1")


def test_a_beam_on_a_terminal_is_shaded_too(screen, small):
    best = beam_search(small, SEA, 2, 4)[0]
    out = screen(SEA, "--beam", "2", "--max-new-tokens", "4")
    assert CODES.sub("", out) == SEA + best.text + "\n" and out.count("\x1b[38") > 1


def test_colour_is_for_terminals_unless_it_is_asked_for():
    assert wants_colour("always", False, {"NO_COLOR": "1"})
    assert not wants_colour("never", True, {}) and not wants_colour("auto", False, {})
    assert wants_colour("auto", True, {})


def test_shades_darken_and_leave_line_breaks_alone():
    assert shade("a", 0.9) == "a" and shade("", 9) == "" and shade("\n", 9) == "\n"
    first, second = shade(" a\n\nb", 4).split("\n\n")
    assert CODES.sub("", first) == " a" and first.endswith("\x1b[0m") and "b" in second
    grounds = [re.search(r"48;5;(\d+)", shade("a", n))[1] for n in range(1, 12)]
    assert len(set(grounds)) == 10 and grounds[-1] == grounds[-2]


def test_control_characters_command_no_terminal(screen):
    assert harmless("a\tb\né\u00a0🙂") == "a\tb\né\u00a0🙂"
    assert "\x1b" not in harmless("\x1b]0;title\x07\x9b") and "\r" not in harmless("a\rb")
    out = screen("a\x1b[31m", "--no-color", "--max-new-tokens", "1", "--temperature", "0")
    assert "\x1b" not in out


# ---- as a program


def test_a_terminal_sees_the_first_token_while_the_rest_is_computed_and_may_interrupt():
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # which the command would inherit
        signal.signal(signal.SIGINT, signal.default_int_handler)
    environment = {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | {"TERM": "xterm"}
    words = [SEA, "--temperature", "0", "--max-new-tokens", "3000", "--stop", "never said"]
    process, mine = start(words, env=environment, cwd=ROOT)
    seen, more = "", 0
    for piece in shown(mine):
        before, seen = NOTICES.sub("", CODES.sub("", seen)), seen + piece
        if len(before) > len(SEA):
            more += 1
        if more == 3:
            assert process.poll() is None  # it still works
            process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    assert "Traceback" not in seen and seen.endswith("\n") and "\x1b[38;5;16;48;5;" in seen
    assert NOTICES.sub("", CODES.sub("", seen)).startswith(SEA)


def test_a_closed_pipe_ends_it_without_a_word():
    command = f"{sys.executable} -m decoding_book '{SEA}' --explain | head -n 1"
    done = subprocess.run(
        ["bash", "-c", f"{command}; echo ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert NOTICES.sub("", done.stderr) == "" and done.stdout.splitlines()[1:] == ["141"]


ONE = f"'{SEA}' --max-new-tokens 1"
CLOSED, FULL = "standard output is closed", "standard output: No space left on device"


@pytest.mark.parametrize(
    "line, status, said",
    [
        ("- <&-", 1, "standard input is closed"),
        ("<&-", 2, "no prompt"),
        ("- 0>/dev/null", 1, "standard input: Bad file descriptor"),
        ("--help >&-", 1, CLOSED),
        (f"{ONE} >&-", 1, CLOSED),
        (f"{ONE} --json >/dev/full", 1, FULL),
        (f"{ONE} --explain >/dev/full", 1, FULL),
        (f"{ONE} --beam 2 >/dev/full", 1, FULL),
        ("--help >/dev/full", 1, FULL),
        ("--version >/dev/full", 1, FULL),
        ("--xyzzy 2>&-", 2, None),
        ("--xyzzy 2>/dev/full", 2, None),
        ("--help >&- 2>&-", 1, None),
        ("--help >/dev/full 2>/dev/full", 1, None),
        ("$'a\\xff'", 2, "the prompt is not a text in utf-8: byte 1 is 0xff"),
    ],
)
@pytest.mark.parametrize("buffered", ["", "1"], ids=["buffered", "unbuffered"])
def test_what_is_closed_or_full_is_a_sentence(line, status, said, buffered):
    "And never a traceback, also not of what Python does at its end."
    if buffered and ONE in line:
        pytest.skip("a token is written at once in either case")
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m decoding_book {line}"],
        capture_output=True,
        cwd=Path(shell.__file__).parent.parent,  # the package that is tested, or its broken copy
        env=os.environ | {"PYTHONUNBUFFERED": buffered},
    )
    error = NOTICES.sub("", done.stderr.decode())
    assert (done.returncode, done.stdout) == (status, b"")
    if said is None:
        assert error == ""
    else:
        assert error.startswith("decoding-book: ") and error.count("\n") == 1 and said in error


def test_an_output_that_lacks_a_letter_shows_another(monkeypatch, small):
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, "ascii"))
    text = generate(small, "Übung macht den Meister: é, ö,", max_new_tokens=12).text
    assert not text.isascii()
    words = ["Übung macht den Meister: é, ö,", "--temperature", "0", "--max-new-tokens", "12"]
    assert main(words) == 0
    assert out.getvalue() == (text + "\n").encode("ascii", "replace")


def test_interrupted_json_is_whole(call, small, monkeypatch):
    def interrupted(steps):
        for n, step in enumerate(steps):
            if n == 3:
                raise KeyboardInterrupt
            yield step

    monkeypatch.setattr(shell, "watched", interrupted)
    status, out, error = call(SEA, "--temperature", 0, "--json")
    said = json.loads(out)
    assert (status, error, said["reason"], len(said["ids"])) == (130, "", "interrupted", 3)


def test_an_interrupt_while_it_loads_is_quiet(call, monkeypatch):
    def interrupt(path, form):
        raise KeyboardInterrupt

    monkeypatch.setattr(shell, "load_model", interrupt)
    assert call(SEA) == (130, "", "")


@pytest.mark.parametrize("stop", ["coffee", "d coff", "cold coffee", "ffee"])
def test_a_beam_ends_before_a_stop_string(call, monkeypatch, stop):
    from decoding_book.toy import six_words

    world = six_words()
    world.form = "toy"
    monkeypatch.setattr(shell, "load_model", lambda path, form: (world, None))
    words = ("I", "--beam", 1, "--max-new-tokens", 5, "--stop", stop)
    want = generate(world, "I", max_new_tokens=5, stop=stop)
    said = json.loads(call(*words, "--json")[1])
    assert (said["text"], said["reason"]) == (want.text, want.reason) and want.reason == "stop"
    assert call(*words)[1] == want.text + "\n"
