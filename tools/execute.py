"""Run notebooks, each in a clean kernel of this very Python, a few at a time.

    python tools/execute.py                      run nbs/*.ipynb and save the outputs in place
    python tools/execute.py --copy build/book    copy the project, export and run there
    python tools/execute.py --warm               fork the kernels from one warm process (Linux)
    python tools/execute.py --changed            those that differ from the last commit

A kernel loads torch, matplotlib and ipykernel in 2.3 seconds of a processor's time, for 25
notebooks a minute of `make test`: that is what --warm saves. nbclient does the rest, and
jupyter_client is told of it by its public names.
"""

import argparse
import asyncio
import base64
import io
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import EntryPoint
from pathlib import Path

import nbformat
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from jupyter_client.provisioning import KernelProvisionerFactory, LocalProvisioner
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
# What a notebook may need: the rest of the tree is not copied.
PARTS = [
    "nbs",
    "decoding_book",
    "benchmarks",
    "tools",
    "tests/oracle",
    "settings.ini",
    "setup.py",
    "_quarto.yml",
    "README.md",
]
# What takes longest, longest first: at the end no notebook runs alone for long.
LONG = [
    "07_beam",
    "18_kernels",
    "19_cuda",
    "16_entropy",
    "04_smollm",
    "06_greedy",
    "14_sampler",
    "17_entropix",
    "C_one_prompt",
    "15_fused",
    "08_noise",
    "22_shell",
    "21_four_bits",
    "05_exhaustive",
    "03_transformer",
    "11_topp",
]
# What a warm process has loaded: the libraries, and nothing of the book.
LIBRARIES = [
    "torch",
    "matplotlib.figure",
    "ipykernel.kernelapp",
    "ipykernel.ipkernel",
    "nbformat",
    "nbclient",
    "jupyter_client.provisioning",
]  # these for this script itself
ANSI = re.compile(r"\x1b\[[0-9;]*m")
# An exercise's check stands behind a #, for the reader to take away.
CHECK = re.compile(r"^# (check_\w+\(\w+\)).*$", re.M)
# What is run there: the empty hole does not pass. (That the solution passes, its own cell says.)
EMPTY = (
    "__import__('fastcore.test').test.test_fail(lambda: {}, msg='The empty hole passes the check.')"
)


SHOWN = "%.6g"  # how numbers are written that a cell ends on; in Jupyter, `%precision %.6g`


class ThisPython(AsyncKernelManager):
    "A kernel of the Python that runs this script, whatever kernels the user has registered."

    @property
    def kernel_spec(self):
        argv = [
            sys.executable,
            "-Xfrozen_modules=off",
            "-m",
            "ipykernel_launcher",
            "-f",
            "{connection_file}",
            "--log-level=40",
            f"--PlainTextFormatter.float_precision={SHOWN}",
        ]
        return KernelSpec(argv=argv, display_name="python3", language="python")


def become_kernel(
    arguments,  # of ipykernel_launcher
    env,  # environment
    cwd,  # working folder
):
    "In a process forked from the warm one: be a kernel, as one started from nothing would be."
    os.environ.update(env)
    os.chdir(cwd)
    here = ROOT / "tools"  # on the path of this script, not on a kernel's
    sys.path[:] = env["PYTHONPATH"].split(os.pathsep) + [p for p in sys.path if Path(p) != here]
    from ipykernel.kernelapp import launch_new_instance

    launch_new_instance(argv=[*arguments, f"--IPKernelApp.parent_handle={os.getppid()}"])


class Forked:
    "A forked process, as `subprocess.Popen` would show it."

    stdin = stdout = stderr = None

    def __init__(self, process):
        self.process, self.pid = process, process.pid
        self.wait, self.kill, self.terminate = process.join, process.kill, process.terminate

    def poll(self):
        return self.process.exitcode

    def send_signal(self, number):
        os.kill(self.pid, number)


class WarmProvisioner(LocalProvisioner):
    "Starts a kernel by a fork."

    async def launch_kernel(self, cmd, **kwargs):
        arguments = cmd[cmd.index("ipykernel_launcher") + 1 :]
        process = multiprocessing.get_context("forkserver").Process(
            target=become_kernel, args=(arguments, kwargs["env"], str(kwargs["cwd"])), daemon=True
        )
        process.start()
        self.process, self.pid = Forked(process), process.pid
        return self.connection_info


class WarmPython(ThisPython):
    "A kernel forked from a process that has loaded the libraries."

    @property
    def kernel_spec(self):
        spec = super().kernel_spec
        spec.metadata = {"kernel_provisioner": {"provisioner_name": "warm"}}
        return spec


def warm_up(
    env,  # the kernels' environment
):
    "Start the process that the kernels are forked from."
    warm = EntryPoint("warm", f"{__name__}:WarmProvisioner", KernelProvisionerFactory.GROUP_NAME)
    KernelProvisionerFactory.instance().provisioners["warm"] = warm
    os.environ.update(env, MPLBACKEND="module://matplotlib_inline.backend_inline")
    sys.warnoptions.append("ignore:resource_tracker")  # a bar's lock outlives its kernel, no more
    multiprocessing.set_forkserver_preload(LIBRARIES)
    multiprocessing.get_context("forkserver").Process(target=int).start()


def copy_project(
    dest,  # Folder to make anew, under build/
):
    "Copy what the book is made of to `dest`, and return `dest`."
    dest = Path(dest).resolve()
    shutil.rmtree(dest, ignore_errors=True)
    skip = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "*.pyc")
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, dest / part, ignore=skip)
        elif source.is_file():
            (dest / part).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, dest / part)
    return dest


def export(
    project,  # A folder with settings.ini and nbs/
):
    "Write the package of `project` from its notebooks."
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
    subprocess.run(
        [Path(sys.executable).with_name("nbdev_export")], cwd=project, env=env, check=True
    )


LOOPS = [  # the fast draw, and the model's step
    "import torch\n"
    "from decoding_book.fused import fused_sample\n"
    "for dtype in torch.float32, torch.float64: fused_sample(torch.zeros(1, 2, dtype=dtype))",
    "import torch\n"
    "from decoding_book.smollm import SmolLM2\n"
    "model = SmolLM2(weights='q4')\n"
    "cache = model.new_cache(1, 3)\n"
    "for n in 2, 1: model(torch.full((1, n), 5), cache=cache)",
]


def compile_loops(
    project,  # A folder with the package
):
    "Compile what is not compiled yet, before several kernels would each begin to."
    env = dict(os.environ, PYTHONPATH=str(project), PYTHONDONTWRITEBYTECODE="")
    for done in [
        subprocess.Popen([sys.executable, "-c", code], cwd=project, env=env, stderr=subprocess.PIPE)
        for code in LOOPS
    ]:
        _, wrong = done.communicate()
        if done.returncode:
            print(wrong.decode(), file=sys.stderr)


def share_loops(
    source,  # A folder with the package, its loops compiled
    target,  # A folder with a package of the same text: else it gets nothing
):
    "Compiled loops for another folder. numba takes them for a file of the same time and size."
    modules = sorted((source / "decoding_book").glob("*.py"))
    twins = [target / "decoding_book" / m.name for m in modules]
    if not all(t.is_file() and t.read_bytes() == m.read_bytes() for m, t in zip(modules, twins)):
        return
    for module, twin in zip(modules, twins):
        shutil.copystat(module, twin)
    kept = target / "decoding_book/__pycache__"
    kept.mkdir(exist_ok=True)
    for file in (source / "decoding_book/__pycache__").glob("*.nb[ci]"):
        shutil.copy2(file, kept)


def kernel_environment(
    project,  # The folder whose package the kernels import
    threads,  # Threads for each kernel
    scratch,  # An empty folder: no start-up file of the user's is read
):
    "Environment variables for the kernels."
    path = os.pathsep.join(filter(None, [str(project), os.environ.get("PYTHONPATH", "")]))
    return dict(
        os.environ,
        PYTHONPATH=path,
        TQDM_DISABLE="1",
        PYTHONHASHSEED="0",
        IPYTHONDIR=str(scratch),
        OMP_NUM_THREADS=str(threads),
        PYDEVD_DISABLE_FILE_VALIDATION="1",
        TOKENIZERS_PARALLELISM="false",
    )


def explain(
    path,  # The notebook
    nb,  # Its content
    error,  # What nbclient raised
):
    "A failure in words: the notebook, the cell, the traceback."
    n = next(
        (
            i
            for i, c in enumerate(nb.cells)
            if any(o.output_type == "error" for o in c.get("outputs", []))
            and "raises-exception" not in c.metadata.get("tags", [])
        ),
        None,
    )
    where = f"{path.name}, cell {n}" if n is not None else path.name
    return f"\nFAILED {where}\n{ANSI.sub('', str(error)).rstrip()}\n"


def with_holes_tried(
    source,  # A code cell
):
    "The cell, and where it ends an exercise, a line that fails if the empty hole passes the check."
    return CHECK.sub(lambda m: EMPTY.format(m[1]), source)


def fewer_colours(
    png,  # An image, base64
):
    "The image with at most 256 colours, where that is smaller: a third, for most figures."
    image = Image.open(io.BytesIO(base64.b64decode(png)))
    if image.mode == "P" or image.convert("RGBA").getextrema()[3] != (255, 255):
        return png  # done, or the page shines through, which a table of colours cannot say
    file = io.BytesIO()
    image = image.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=0)
    image.save(file, "PNG", optimize=True)
    smaller = base64.b64encode(file.getvalue()).decode()
    return min(smaller, png, key=len)


def shrink_figures(
    nb,  # A notebook
):
    "A notebook's figures take less room: a file ends at 300 KB."
    for cell in nb.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                data["image/png"] = fewer_colours(data["image/png"])


async def run_one(
    path,  # A notebook
    env,  # The kernel's environment
    gate,  # Semaphore that limits how many run at once
    width,  # Of the longest name, to align the progress lines
    timeout,  # Seconds allowed for one cell
    kernel,  # ThisPython or WarmPython
):
    "Run a notebook and save it; return the seconds it took, or None when it failed."
    async with gate:
        nb, start = nbformat.read(path, as_version=4), time.perf_counter()
        client = NotebookClient(
            nb,
            timeout=timeout,
            kernel_name="python3",
            record_timing=False,
            coalesce_streams=True,  # what is printed piece by piece is one output
            kernel_manager_class=kernel,
            shutdown_kernel="immediate",
            resources={"metadata": {"path": str(path.parent)}},
        )
        written = [cell.source for cell in nb.cells]
        for cell in nb.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
                cell.source = with_holes_tried(cell.source)
        try:
            await client.async_execute(env=env)
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
            print(explain(path, nb, error), file=sys.stderr, flush=True)
            return None
        for cell, source in zip(nb.cells, written):
            cell.source = source
        shrink_figures(nb)
        nbformat.write(nb, path)
        seconds = time.perf_counter() - start
        print(f"  {path.name:<{width}} {seconds:6.1f} s", flush=True)
        return seconds


async def run_all(
    paths,  # Notebooks
    project,  # The folder whose package they import
    jobs,  # How many at once
    timeout,  # Seconds allowed for one cell
    warm,  # Fork the kernels from one process
):
    "Run the notebooks, `jobs` at a time, those that take longest first; return those that failed."
    gate, width = asyncio.Semaphore(jobs), max(len(p.name) for p in paths)
    loop = asyncio.get_running_loop()  # nbclient would stop one kernel at Ctrl-C: stop all instead
    loop.add_signal_handler = loop.remove_signal_handler = lambda *args: None
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with tempfile.TemporaryDirectory() as scratch:
        env = kernel_environment(project, threads, scratch)
        kernel = WarmPython if warm and sys.platform == "linux" else ThisPython
        if kernel is WarmPython:
            warm_up(env)
        rank = {name: n for n, name in enumerate(LONG)}
        paths = sorted(paths, key=lambda p: rank.get(p.stem, len(LONG)))
        runs = [run_one(p, env, gate, width, timeout, kernel) for p in paths]
        seconds = await asyncio.gather(*runs)
    return [p for p, s in zip(paths, seconds) if s is None]


def asked_for(
    nbs,  # The folder of the notebooks
    names,  # Some of them; none: all
):
    "Their paths."
    paths = [nbs / Path(n).name for n in names] or sorted(nbs.glob("*.ipynb"))
    missing = [p.name for p in paths if not p.is_file()]
    if missing or not paths:
        sys.exit(f"no such notebook in {nbs}: {', '.join(missing) or '*.ipynb'}")
    return paths


def changed():
    "Names of the notebooks that differ from the last commit; outside a repository, of all."
    git = ["git", "-C", str(ROOT)]
    known = subprocess.run(
        [*git, "diff", "--name-only", "--relative", "HEAD", "--", "nbs"],
        capture_output=True,
        text=True,
    )
    new = subprocess.run(
        [*git, "ls-files", "--others", "--exclude-standard", "nbs"], capture_output=True, text=True
    )
    if known.returncode or new.returncode:
        return [p.name for p in asked_for(ROOT / "nbs", [])]
    names = [Path(line) for line in (known.stdout + new.stdout).splitlines()]
    return sorted(p.name for p in names if p.suffix == ".ipynb" and (ROOT / p).is_file())


def prepared(
    copy,  # A folder to copy the project to; none: run here
):
    "The project to run notebooks in, its loops compiled."
    if not copy:
        compile_loops(ROOT)
        return ROOT
    project = copy_project(copy)
    export(project)
    share_loops(ROOT, project)
    compile_loops(project)
    share_loops(project, ROOT)
    return project


def main():
    "Read the command line, run, report."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="notebooks of nbs/ (default: all)")
    parser.add_argument("--copy", metavar="DIR", help="run in a copy of the project")
    parser.add_argument("--jobs", type=int, default=2, help="notebooks at once (default 2)")
    parser.add_argument("--timeout", type=int, default=600, help="seconds for one cell")
    parser.add_argument(
        "--warm", action="store_true", help="fork the kernels from one warm process"
    )
    parser.add_argument(
        "--changed", action="store_true", help="those that differ from the last commit"
    )
    args = parser.parse_args()
    if args.changed:
        args.names = changed()
        if not args.names:
            compile_loops(ROOT)
            return print("No notebook differs from the last commit")
    project = prepared(args.copy)
    paths = asked_for(project / "nbs", args.names)
    print(f"Running {len(paths)} notebooks, {args.jobs} at a time", flush=True)
    start = time.perf_counter()
    try:
        failed = asyncio.run(run_all(paths, project, max(1, args.jobs), args.timeout, args.warm))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        os._exit(130)  # the kernels are gone: nbclient's own clean-up would only complain
    if failed:
        sys.exit(f"{len(failed)} of {len(paths)} failed: {', '.join(p.name for p in failed)}")
    print(f"  all {len(paths)} ran in {time.perf_counter() - start:.1f} s", flush=True)


if __name__ == "__main__":
    main()
