"""Pages of the appendix that list things: every argument of the installed transformers, numbered
mistakes, words, works."""

import inspect
import json
import re
from pathlib import Path

import yaml
from helpers.project_files import ROOT
from transformers import GenerationConfig, GenerationMixin

# What a configuration keeps about itself, and Python's own.
NOT_ARGUMENTS = {"transformers_version", "self", "kwargs"}


def prose(name="C_from_generate", kind="markdown"):
    cells = json.loads((ROOT / f"nbs/{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    return "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == kind)


def section(title):
    return re.search(rf"^## {title}$(.*?)(?=^## )", prose(), re.M | re.S)[1]


def codes(text):
    return re.findall(r"`([\w-]+)`", text)


def named(title):
    "The arguments that a system's tables name in their first column."
    rows = re.findall(r"^\| (.+?) \|", section(title), re.M)
    return [name for row in rows for name in codes(row)]


def sentence(start):
    return codes(re.search(rf"^{start}.*$", section("transformers"), re.M)[0])


def test_every_argument_of_transformers_is_explained_or_left_out_by_name():
    arguments = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    arguments |= set(inspect.signature(GenerationMixin.generate).parameters)
    said = named("transformers") + sentence("Left out") + sentence("Group beams")
    assert len(said) == len(set(said)), "an argument is named twice"
    assert set(said) == arguments - NOT_ARGUMENTS


def test_the_other_systems_tables_name_what_they_are_asked_for_most():
    common = {"temperature", "top_p", "top_k", "min_p", "seed", "repetition_penalty"}
    assert common <= set(named("vLLM"))
    assert {"--temp", "--top-k", "--repeat-last-n", "--mirostat"} <= set(named("llama.cpp"))


def test_every_table_has_a_cell_for_each_column():
    for table in re.findall(r"(?:^\|.*\|\n)+", prose() + "\n", re.M):
        assert len({line.count("|") for line in table.splitlines()}) == 1, table


def test_mistakes_are_numbered_and_counted():
    text, found = prose("C_sources"), 0
    for part in re.split(r"^## ", text, flags=re.M)[1:]:
        numbers = [int(n) for n in re.findall(r"\*\*(\d+)\. ", part)]
        assert numbers == list(range(1, len(numbers) + 1)), part[:40]
        found += len(numbers)
    assert f"**You leave with** {found} mistakes" in text


def test_words_of_the_glossary_are_in_order():
    words = re.findall(r'^- <a id="[\w-]+"></a>\*\*(.+?)\*\*', prose("C_glossary"), re.M)
    assert words == sorted(words, key=str.lower) and len(words) == len(set(words)) >= 40


def pages(entry):
    "Notebook names in the order of the navigation."
    if isinstance(entry, str):
        return [Path(entry).stem]
    parts = entry["contents"] if isinstance(entry, dict) else entry
    return [name for part in parts for name in pages(part)]


def test_references_stand_under_the_titles_of_pages_in_their_order():
    config = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    names = pages(config["website"]["sidebar"]["contents"])
    titles = [re.search(r"^title: (.+)$", prose(name, "raw"), re.M)[1] for name in names]
    heads = re.findall(r"^## (.+)$", prose("references"), re.M)
    assert heads == [title for title in titles if title in heads] and len(heads) > 15
    for again in re.findall(r"as under \*(.+?)\*\.$", prose("references"), re.M):
        assert again in heads
