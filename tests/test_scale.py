"Many prompts: the split does not matter, nothing is lost or repeated, errors are recorded."

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from decoding_book.constrained import Constrained, Pattern
from decoding_book.entropix import EntropySampler
from decoding_book.loop import Draw, generate, greedy
from decoding_book.sampler import Mirostat, Sampler
from decoding_book.scale import (
    Decoder,
    decode_batch,
    decode_file,
    numbered,
    part_file,
    read_prompts,
    results,
    write_lines,
    write_results,
)
from decoding_book.smollm import SmolLM2
from decoding_book.toy import TableModel, six_words

SAMPLER = Sampler(temperature=0.9, seed=5)
WORDS = ["I", "coffee", "cold", "I like", "water"]


def ray_is_here():
    pytest.importorskip("ray", reason="the extra `scale` is not installed: run by make verify")


@pytest.fixture
def source(tmp_path):
    "Twenty-three prompts, one a line."
    path = tmp_path / "prompts.jsonl"
    lines = (json.dumps({"prompt": WORDS[i % 5]}) for i in range(23))
    path.write_text("\n".join(lines))
    return path


def texts(folder):
    return [record["text"] for record in results(folder)]


def alone(number, prompt):
    return generate(six_words(), [prompt], replace(SAMPLER, rows=torch.tensor([number]))).text[0]


@pytest.mark.parametrize("size", [1, 4, 23, 100])
def test_the_split_does_not_matter(source, tmp_path, size):
    told = decode_file(source, tmp_path / "out", six_words, SAMPLER, batch=size)
    assert told == {"prompts": 23, "errors": 0}
    assert texts(tmp_path / "out") == [alone(i, WORDS[i % 5]) for i in range(23)]


@pytest.mark.parametrize("wrapped", [Mirostat(2.0, sampler=SAMPLER), partial])
def test_a_key_inside_another_chooser_is_the_prompt_s_too(tmp_path, wrapped):
    source, found = tmp_path / "same.jsonl", []
    source.write_text('"I"\n' * 5)
    if wrapped is partial:
        wrapped = Constrained(Pattern(r"[ a-z]*", six_words()), SAMPLER)
    for size in (1, 2, 4):
        decode_file(source, tmp_path / str(size), six_words, wrapped, batch=size)
        found.append(texts(tmp_path / str(size)))
    assert found[0] == found[1] == found[2] and len(set(found[0])) > 1
    assert SAMPLER in (getattr(wrapped, "sampler", None), getattr(wrapped, "choose", None))


def test_a_probability_of_zero_is_null_in_a_record(tmp_path):
    "JSON has no infinity."

    def make():
        return TableModel([0.5, 0.5, 0], torch.tensor([[0, 1, 0], [1, 0, 0], [0, 0, 1]]))

    def refuse(name):
        raise AssertionError(name)

    source = tmp_path / "p.jsonl"
    source.write_text("[0]\n[1]\n")
    decode_file(source, tmp_path / "out", make, trace=True, max_new_tokens=2)
    lines = part_file(tmp_path / "out", 0).read_text().splitlines()
    first, _ = (json.loads(line, parse_constant=refuse) for line in lines)
    assert first["trace"][0] == {"top_ids": [1, 0, 2], "top_logprobs": [0.0, None, None]}

    def never(prediction, context):
        return Draw(torch.tensor([2]))

    assert decode_batch(make(), 0, [([0], None)], never, max_new_tokens=1)[0]["logprobs"] == [None]


def test_a_run_with_a_set_goes_on_in_another_process(source, tmp_path):
    "Whose sets have another order."
    code = (
        "import sys\nfrom decoding_book.scale import decode_file\n"
        "from decoding_book.toy import six_words\n"
        "decode_file(*sys.argv[1:], six_words, stop={'coffee', 'water', 'cold', 'like', 'I'})\n"
    )
    command = [sys.executable, "-c", code, source, tmp_path / "out"]
    for seed in ("1", "2"):
        env = dict(os.environ, PYTHONHASHSEED=seed)
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_a_record_holds_what_the_loop_gives(source, tmp_path):
    decode_file(source, tmp_path / "out", six_words, greedy, batch=9, trace=True, max_new_tokens=3)
    for record in results(tmp_path / "out"):
        want = generate(six_words(), record["prompt"], max_new_tokens=3)
        assert record["ids"] == want.ids.tolist() and record["text"] == want.text
        assert record["logprobs"] == want.logprobs.tolist() and record["reason"] == want.reason
        assert [step["top_ids"] for step in record["trace"]] == [
            step.top_ids[0].tolist() for step in want.steps
        ]


@pytest.mark.parametrize("choose", [SAMPLER, EntropySampler(attention=False, seed=5)])
def test_numbers_stand_in_the_key(choose):
    assert numbered(choose, [7, 9]).rows.tolist() == [7, 9]
    assert numbered(greedy, [7]) is greedy


class FailsOnce:
    "A model that breaks off at its n-th call."

    def __init__(self, n):
        self.world, self.left = six_words(), n
        self.vocab_size, self.eos, self.context = 6, self.world.eos, self.world.context
        self.start_ids, self.encode, self.decode = [], self.world.encode, self.world.decode

    def __call__(self, *args, **kwargs):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return self.world(*args, **kwargs)


@pytest.mark.parametrize("calls", [1, 4, 9])
def test_an_interrupted_run_goes_on_where_it_was(source, tmp_path, calls):
    run = partial(decode_file, source, tmp_path / "out", choose=SAMPLER, batch=5)

    def model():
        return FailsOnce(calls)

    with pytest.raises(KeyboardInterrupt):
        run(make_model=model)
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("part-*")}
    assert len(done) < 5 and all(len(path.read_text().splitlines()) == 5 for path in done)
    calls = 10**9
    assert run(make_model=model) == {"prompts": 23, "errors": 0}
    assert all(path.stat().st_mtime_ns == time for path, time in done.items())
    assert texts(tmp_path / "out") == [alone(i, WORDS[i % 5]) for i in range(23)]


def test_a_batch_given_to_a_second_worker_is_decoded_once(tmp_path):
    "Ray gives the batch of a worker that died to another; its file may be there already."
    work = dict(batch=0, first=0, rows=json.dumps([("I", None)]))
    part_file(tmp_path, 0).write_text("done\n")
    assert Decoder(six_words, tmp_path, SAMPLER, False, {})(work) == {"batch": 0}
    assert part_file(tmp_path, 0).read_text() == "done\n"


def test_a_part_has_its_name_when_it_is_whole(tmp_path, monkeypatch):
    def stop(self, other):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        write_lines(part_file(tmp_path, 0), [{"number": 0}])
    assert not part_file(tmp_path, 0).exists() and not list(results(tmp_path))


@pytest.mark.parametrize("size", [1, 4])
def test_what_is_no_prompt_is_an_error_and_the_run_goes_on(tmp_path, size):
    source = tmp_path / "some.jsonl"
    lines = ['"I"', '{"prompt": ""}', '{"prompt": null}', '{"text": "I"}', "[0, 1]", "[0, 99]"]
    lines += ['["I", "like"]', '"tea"', "[0, 0, 0, 0, 0]", "[true]", '{"prompt": "I"}', '"\xe9']
    source.write_bytes("\n".join(lines).encode("latin-1"))
    told = decode_file(source, tmp_path / "out", six_words, SAMPLER, batch=size)
    assert told == {"prompts": 12, "errors": 8}
    said = [record["error"] for record in results(tmp_path / "out")]
    assert [i for i, error in enumerate(said) if error is None] == [0, 1, 4, 10]
    for i, words in (
        (2, "neither text nor"),
        (3, "line 4: there is no 'prompt'"),
        (5, "99"),
        (6, "neither"),
        (7, "'tea'"),
        (8, "leave no room"),
        (9, "neither"),
        (11, "line 12"),
    ):
        assert words in said[i], said[i]


def test_a_line_that_is_too_deep_is_an_error(tmp_path):
    source = tmp_path / "deep.jsonl"
    source.write_text('"I"\n' + "[" * 100_000 + '\n"I"\n')
    assert decode_file(source, tmp_path / "out", six_words) == {"prompts": 3, "errors": 1}


@pytest.mark.parametrize(
    "line",
    [
        "NaN",
        "-Infinity",
        "1e999",
        "[1, NaN]",
        '{"prompt": NaN}',
        '{"prompt": "\\ud800"}',
        "[1e999]",
    ],
)
def test_what_no_json_can_hold_is_an_error_of_its_line(tmp_path, line):
    source = tmp_path / "some.jsonl"
    source.write_text(f'"I"\n{line}\n{{"prompt": "I", "score": NaN}}\n')
    told = decode_file(source, tmp_path / "out", six_words)
    assert told == {"prompts": 3, "errors": 1}
    write_results(tmp_path / "out", tmp_path / "all.jsonl")

    def refuse(name):
        raise AssertionError(name)

    lines = (tmp_path / "all.jsonl").read_text(encoding="utf-8").splitlines()
    _, wrong, _ = (json.loads(text, parse_constant=refuse) for text in lines)
    assert wrong["error"].startswith("line 2: ") and wrong["prompt"] is None


@pytest.mark.parametrize("column", [3, None, b"prompt", ["prompt"]])
def test_a_column_that_is_no_name_stops_the_run(source, tmp_path, column):
    with pytest.raises(TypeError, match="column: .* is not a name"):
        decode_file(source, tmp_path / "out", six_words, column=column)
    assert not list((tmp_path / "out").glob("*"))


def test_a_folder_that_another_job_has_begun_is_refused(source, tmp_path):
    "Before its first part, too; and a folder whose note is lost or spoilt."
    run = partial(decode_file, source, tmp_path / "out", choose=SAMPLER)

    def make():
        with pytest.raises(ValueError, match="batch: 7, but .* was begun with 5: take another"):
            run(make_model=six_words, batch=7)
        return six_words()

    assert run(make_model=make, batch=5) == {"prompts": 23, "errors": 0}
    plan = tmp_path / "out" / "plan.json"
    for spoilt in ("", "{", "[1]", "3", '"x"'):
        plan.write_text(spoilt)
        with pytest.raises(ValueError, match="folder: .*plan.json is no plan"):
            run(make_model=make, batch=5)
    plan.unlink()
    with pytest.raises(ValueError, match="folder: .* has parts, no plan: take another folder"):
        run(make_model=make, batch=5)


def test_a_folder_without_parts_may_begin_anew(source, tmp_path):
    with pytest.raises(ValueError, match="max_new_tokens"):
        decode_file(source, tmp_path / "out", six_words, max_new_tokens=-1)
    assert not list((tmp_path / "out").glob("*"))
    told = decode_file(source, tmp_path / "out", six_words, max_new_tokens=2, stop={"coffee"})
    assert told["errors"] == 0


def test_settings_are_compared_to_the_last_number(tmp_path):
    "The text of a long tensor leaves most of it out."
    source, many = tmp_path / "p.jsonl", 1200
    source.write_text("[1]\n[2]\n")

    def make():
        return TableModel([1 / many] * many, torch.full((many, many), 1 / many))

    def biased(token):
        return Sampler(logit_bias=torch.zeros(many).index_fill(0, torch.tensor(token), 50.0))

    decode_file(source, tmp_path / "out", make, biased(600), max_new_tokens=2)
    decode_file(source, tmp_path / "out", make, biased(600), max_new_tokens=2)
    with pytest.raises(ValueError, match="choose: "):
        decode_file(source, tmp_path / "out", make, biased(700), max_new_tokens=2)


def test_results_of_nothing_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no run"):
        write_results(tmp_path / "none", tmp_path / "out.jsonl")


def test_an_empty_prompt_of_a_model_without_a_start_is_an_error(model):
    empty, hello = decode_batch(model, 0, [("", None), ("Hello", None)], max_new_tokens=2)
    assert "empty" in empty["error"] and hello["text"] and hello["error"] is None


def test_a_failing_row_does_not_take_its_batch_along(tmp_path, source):
    class Broken(FailsOnce):
        def __call__(self, ids, *args, **kwargs):
            if (ids == 4).any():
                raise RuntimeError("no water")
            return self.world(ids, *args, **kwargs)

    told = decode_file(source, tmp_path / "out", partial(Broken, 0), batch=2, max_new_tokens=1)
    said = [record["error"] for record in results(tmp_path / "out")]
    assert told["errors"] == sum(error is not None for error in said) == 4
    assert {"RuntimeError: no water", None} == set(said)


@pytest.mark.parametrize(
    "change",
    [dict(batch=6), dict(choose=replace(SAMPLER, seed=6)), dict(max_new_tokens=3)],
    ids=str,
)
def test_parts_of_two_runs_do_not_meet(source, tmp_path, change):
    run = partial(decode_file, source, tmp_path / "out", six_words)
    run(**dict(choose=SAMPLER, batch=5))
    with pytest.raises(ValueError, match=next(iter(change)).replace("max_new_tokens", "options")):
        run(**dict(choose=SAMPLER, batch=5) | change)
    source.write_text('"I"')
    with pytest.raises(ValueError, match="source: "):
        run(**dict(choose=SAMPLER, batch=5))


@pytest.mark.parametrize("name, value", [("batch", 0), ("workers", -1), ("max_new_tokens", 0.5)])
def test_a_wrong_option_stops_the_run(source, tmp_path, name, value):
    with pytest.raises((ValueError, TypeError), match=name):
        decode_file(source, tmp_path / "out", six_words, **{name: value})
    assert not list(results(tmp_path / "out"))


def test_a_missing_package_is_named(source, tmp_path, monkeypatch):
    for package in ("ray", "pyarrow.parquet"):
        monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(ImportError, match=r"ray.*decoding_book\[scale\]"):
        decode_file(source, tmp_path / "out", six_words, workers=2)
    with pytest.raises(ImportError, match=r"pyarrow.*decoding_book\[scale\]"):
        list(read_prompts("some.parquet"))


def test_parquet_in_and_out(tmp_path):
    pytest.importorskip("pyarrow", reason="the extra `scale` is not installed")
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist([{"text": w} for w in [*WORDS, None]])
    pyarrow.parquet.write_table(table, tmp_path / "in.parquet")
    told = decode_file(
        tmp_path / "in.parquet", tmp_path / "out", six_words, SAMPLER, column="text", trace=True
    )
    assert told == {"prompts": 6, "errors": 1}
    write_results(tmp_path / "out", tmp_path / "out.parquet")
    found = pyarrow.parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert [row["text"] for row in found] == texts(tmp_path / "out")
    assert found[0]["ids"] == next(results(tmp_path / "out"))["ids"]
    write_results(tmp_path / "out", tmp_path / "out.jsonl")
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    assert list(map(json.loads, lines)) == list(results(tmp_path / "out"))


def test_columns_of_other_types_are_errors_of_their_rows(tmp_path):
    pytest.importorskip("pyarrow", reason="the extra `scale` is not installed")
    from datetime import datetime
    from decimal import Decimal

    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "in.parquet"
    for n, value in enumerate(
        (float("nan"), b"I", datetime(2026, 1, 1), Decimal(1), True, {"a": 1})
    ):
        pyarrow.parquet.write_table(pyarrow.table({"prompt": [value, value]}), path)
        told = decode_file(path, tmp_path / f"out {n}", six_words)
        assert told == {"prompts": 2, "errors": 2}
        write_results(tmp_path / f"out {n}", tmp_path / "out.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"prompt": [[0, 1], None]}), path)
    assert decode_file(path, tmp_path / "ids", six_words) == {"prompts": 2, "errors": 1}
    with pytest.raises(ValueError, match=r"column: 'text' is not in .*, which has \['prompt'\]"):
        decode_file(path, tmp_path / "none", six_words, column="text")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="source: .*in.parquet is not whole"):
        decode_file(path, tmp_path / "none", six_words)


# ---------------------------------------------------------------- two workers of Ray


def kills_itself_once(mark):
    "A model's maker. The first worker that decodes its fourth batch is killed."

    class Killed(FailsOnce):
        def __call__(self, *args, **kwargs):
            self.left += 1
            if self.left == 12 and not mark.exists():
                mark.write_text("killed")
                os.kill(os.getpid(), signal.SIGKILL)
            return self.world(*args, **kwargs)

    return Killed(0)


@pytest.fixture
def ray(monkeypatch):
    ray_is_here()
    import ray

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(__import__("sys").path))
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


def test_two_workers_and_one_that_is_killed(ray, source, tmp_path):
    run = partial(decode_file, source, tmp_path / "out", choose=SAMPLER, batch=2, workers=2)
    make = partial(kills_itself_once, tmp_path / "mark")
    try:
        run(make_model=make)
    except Exception:  # Ray may give up: then the run is resumed
        run(make_model=make)
    assert (tmp_path / "mark").exists()
    assert [record["number"] for record in results(tmp_path / "out")] == list(range(23))
    assert texts(tmp_path / "out") == [alone(i, WORDS[i % 5]) for i in range(23)]


def test_a_thousand_prompts_on_two_workers(ray, tmp_path, full, record):
    "Id for id the tokens of one process with the same batches."
    n = 1000 if full else 48
    source = tmp_path / "prompts.jsonl"
    source.write_text("".join(json.dumps(f"{i} things about the sea:") + "\n" for i in range(n)))
    torch.set_num_threads(1)
    make, found = partial(SmolLM2, weights="q4"), {}
    choose = Sampler(temperature=0.8, top_p=0.95, seed=1)
    for workers in (2, 0):
        out = tmp_path / f"{workers} workers"
        decode_file(source, out, make, choose, workers=workers, max_new_tokens=12)
        found[workers] = [row["ids"] for row in results(out)]
    assert len(found[2]) == n and found[2] == found[0]
    assert part_file(tmp_path / "2 workers", 0).exists()
    record("scale: prompts on two workers, id for id those of one process", n)
