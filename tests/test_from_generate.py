'"From generate to here": the page names every argument that the installed transformers has.'

import inspect
import json
import re

from helpers.project_files import ROOT
from transformers import GenerationConfig, GenerationMixin

PAGE = ROOT / "nbs/C_from_generate.ipynb"
# What a configuration keeps about itself, and Python's own.
NOT_ARGUMENTS = {"transformers_version", "self", "kwargs"}


def prose():
    cells = json.loads(PAGE.read_text(encoding="utf-8"))["cells"]
    return "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")


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
