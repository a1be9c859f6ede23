"A Python of its own."

import os
import subprocess
import sys
from pathlib import Path

import decoding_book


def run_python(code, cwd=Path(decoding_book.__file__).parent.parent, **env):
    "A new Python with the package that is tested; numba keeps its code where `env` says."
    env = {**os.environ, "PYTHONPATH": str(cwd), **env}
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=cwd, env=env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
