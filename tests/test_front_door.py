"What `from decoding_book import …` finds, and what it costs."

import ast
import importlib
import inspect
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from front_door import MAP

import decoding_book
from decoding_book.toy import six_words

ROOT = Path(__file__).resolve().parent.parent
HOMES = {name: module for module, _, names in MAP for name in names.split()}
CONTRACT = """stream generate score TableModel exhaustive_search greedy_search beam_search
temperature top_k top_p min_p repetition_penalty top_p_mask Sampler fused_sample entropy varentropy
attention_measures EntropySampler Decision SmolLM2 GPT greedy draw Key Generation
Hypothesis""".split()


def fresh(code):
    "What a new process prints."
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_names_of_the_contract_are_there():
    assert set(CONTRACT) <= set(decoding_book.__all__) <= set(dir(decoding_book))


@pytest.mark.parametrize("name", decoding_book.__all__)
def test_a_name_is_what_its_module_holds(name):
    held = getattr(importlib.import_module(f"decoding_book.{HOMES[name]}"), name)
    found = getattr(decoding_book, name)
    assert found is held or found.__wrapped__ is held


def test_a_module_named_as_its_function_is_both():
    from decoding_book import entropy, greedy, temperature
    from decoding_book.temperature import temperature as function

    z = torch.tensor([[1.0, 2.0, 4.0]])
    assert temperature(z, 2).equal(function(z, 2))
    assert inspect.signature(temperature) == inspect.signature(function)
    assert entropy(z).shape == (1,)
    assert entropy.varentropy is decoding_book.varentropy
    assert decoding_book.generate(six_words(), "I like", greedy).text == " cold coffee"


def test_the_first_import_of_a_name_may_come_before_or_after_its_module():
    use = "decoding_book.temperature(__import__('torch').tensor([[1., 2.]]), 2).tolist()"
    for first in "", "import decoding_book.temperature;", "from decoding_book import temperature;":
        assert fresh(f"import decoding_book; {first} print({use})") == "[[0.5, 1.0]]"


def test_an_unknown_name_is_an_attribute_error_and_an_import_error():
    with pytest.raises(AttributeError, match="top_q"):
        getattr(decoding_book, "top_q")  # noqa: B009
    with pytest.raises(ImportError, match="top_q"):
        from decoding_book import top_q  # noqa: F401


def test_classes_of_the_front_door_can_be_pickled():
    key = decoding_book.Key(3, 1)
    assert pickle.loads(pickle.dumps(key)) == key


def test_an_import_of_the_package_loads_nothing_and_takes_less_than_50_ms(record):
    code = (
        "import sys, time; t = time.perf_counter(); import decoding_book;"
        "import json; print(json.dumps([time.perf_counter() - t, 'torch' in sys.modules]))"
    )
    runs = [json.loads(fresh(code)) for _ in range(3)]
    record("import decoding_book, milliseconds", round(1000 * min(r[0] for r in runs), 2))
    assert not any(r[1] for r in runs)
    assert min(r[0] for r in runs) < 0.05


def test_type_checkers_see_the_same_names():
    tree = ast.parse(Path(decoding_book.__file__).read_text(encoding="utf-8"))
    block = next(n for n in tree.body if isinstance(n, ast.If))
    seen = {a.asname: n.module for n in block.body for a in n.names}
    assert seen == HOMES


def test_the_front_door_is_what_its_table_says():
    done = subprocess.run([sys.executable, ROOT / "tools/front_door.py", "--check"], cwd=ROOT)
    assert done.returncode == 0


def test_every_module_is_on_the_map():
    modules = {p.stem for p in (ROOT / "decoding_book").glob("[a-z]*.py")}
    assert modules == {
        line.split()[0] for line in decoding_book.__doc__.split("\n\n")[-1].splitlines()
    }


# Where names were before they moved; "import *" gives those that it gave.
OLD_ADDRESSES = {
    "beam": ["RULES"],
    "exhaustive": ["whole"],
    "loop": ["log_normalizer"],
    "sampler": ["RULES"],
    "smollm": [
        "_parse",
        "NUMBERS",
        "BLOCKS",
        "HuggingFace",
        "HuggingFaceCache",
        "read_gguf",
        "dequantise",
    ],
    "temperature": ["check_logits", "per_row"],
    "transformer": ["save_checkpoint", "load_checkpoint", "fingerprint", "cache_folder"],
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("module", "name"), [(m, n) for m, ns in OLD_ADDRESSES.items() for n in ns]
)
def test_an_old_address_still_works(module, name):
    assert getattr(importlib.import_module(f"decoding_book.{module}"), name) is not None


def test_a_moved_name_is_the_one_at_its_new_address_and_warns():
    from decoding_book import huggingface, smollm

    with pytest.warns(DeprecationWarning, match="is decoding_book.huggingface.HuggingFace now"):
        assert smollm.HuggingFace is huggingface.HuggingFace
    for module in OLD_ADDRESSES:
        with pytest.raises(AttributeError, match="Nothing"):
            _ = importlib.import_module(f"decoding_book.{module}").Nothing


def test_import_star_of_smollm_gives_the_reading_of_files_too():
    names = {}
    exec("from decoding_book.smollm import *", names)
    assert {"SmolLM2", "read_gguf", "dequantise"} <= set(names)
