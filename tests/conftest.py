"""What all tests share: the size of the counts (`--full`), recorded results (`--record`), and the
built site (`--site`)."""

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():  # before anything imports Triton, transformers among it
    os.environ["TRITON_INTERPRET"] = "1"

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
# for benchmarks/; last, so that a broken copy of the package comes first
sys.path.append(str(ROOT))


class Recorder:
    "Gathers what tests record, from every worker."

    results = {}

    def pytest_runtest_logreport(self, report):
        self.results.update(v for k, v in report.user_properties if k == "record")


def pytest_addoption(parser):
    group = parser.getgroup("decoding book")
    group.addoption("--full", action="store_true", help="the full counts, not the quick ones")
    group.addoption("--record", metavar="FILE", help="write the recorded results to FILE")
    group.addoption("--site", metavar="DIR", help="test this built site, too")


def pytest_configure(config):
    config.pluginmanager.register(Recorder())
    config.addinivalue_line("markers", "pages: the built site, or a browser (`--site`)")
    # the same examples every time; the full counts look for new ones
    if not config.getoption("--full"):
        settings.register_profile("repeatable", derandomize=True)
        settings.load_profile("repeatable")
    if os.environ.get("PYTEST_XDIST_WORKER"):  # several tests run at once: a thread for each
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def full(request):
    "Whether to run the full counts: `n = 10_000 if full else 200`."
    return request.config.getoption("--full")


@pytest.fixture
def record(request):
    """`record(name, value)` keeps a result for benchmarks/verify.json. Values are what JSON can
    hold."""

    def keep(name, value):
        plain = json.loads(json.dumps(value, default=float))  # NumPy's numbers cannot travel
        request.node.user_properties.append(("record", (name, plain)))

    return keep


def git(*args):
    "The output of a git command, or '' outside a repository."
    done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def pytest_sessionfinish(session, exitstatus):
    "Write what was recorded, with the commit, the date and the machine."
    path = session.config.getoption("--record")
    if not path or hasattr(session.config, "workerinput"):
        return
    from benchmarks.common import now, processor, write

    out = {
        "commit": git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else ""),
        "date": now(),
        "machine": f"{processor()}, {os.cpu_count()} cores, {platform.system()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "full": session.config.getoption("--full"),
        "passed": exitstatus == 0,
        "results": dict(sorted(Recorder.results.items())),
    }
    write(Path(path), out)


@pytest.fixture(scope="session")
def site(request):
    "The folder of the built site."
    return Path(request.config.getoption("--site")).resolve()


@pytest.fixture(scope="session")
def browser():
    "Chromium or Chrome, which can reach this machine and nothing else."
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("no Chromium or Chrome on the PATH")
    playwright = pytest.importorskip("playwright.sync_api")
    alone = ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
    sandbox = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=alone + sandbox)
        yield browser
        browser.close()


def pytest_collection_modifyitems(config, items):
    "What a reader sees, `--site` tests: these wait until a site is named."
    for item in items:
        if {"site", "browser"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("pages")
            if not config.getoption("--site"):
                item.add_marker(pytest.mark.skip(reason="a page: make book, then make pages"))


@pytest.fixture(scope="session")
def reference():
    "SmolLM2's weights and entries as the package gguf reads them."
    from benchmarks.common import reference_weights
    from decoding_book.smollm import weights_path

    return reference_weights(weights_path())


@pytest.fixture(scope="session")
def peer(reference):
    "SmolLM2 as a model of transformers."
    from benchmarks.common import transformers_peer

    return transformers_peer(reference[0])


@pytest.fixture(scope="session")
def model():
    "SmolLM2."
    from decoding_book.smollm import SmolLM2

    return SmolLM2()


@pytest.fixture(scope="session")
def batch(model, full):
    "Greedy tokens of ten prompts of unequal length, decoded by SmolLM2 as one batch."
    from helpers.texts import PROMPTS

    from decoding_book.loop import generate

    assert len({len(model.encode(p)) for p in PROMPTS[:10]}) > 3
    return generate(
        model, PROMPTS[:10], max_new_tokens=64 if full else 24, ignore_eos=True, alternatives=2
    )


@pytest.fixture
def project(tmp_path):
    "A copy of the project to change at will."
    from execute import copy_project, share_loops

    copied = copy_project(tmp_path / "project")
    share_loops(ROOT, copied)
    return copied
