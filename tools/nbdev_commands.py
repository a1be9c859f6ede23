"""Replace the commands of nbdev that would harm this project, in the environment's own folder of
commands: each then says, in one sentence, what to type instead. `make env` does it; CONTRIBUTING.md
lists all commands.

    .venv/bin/python tools/nbdev_commands.py
"""

import sys
from pathlib import Path

CONFIG = "would write a second configuration of the site into nbs/"
BEGIN = "is for a project that does not exist yet"
REFUSED = {  # command -> why not, what to type
    "nbdev_docs": (CONFIG, "make book"),
    "nbdev_preview": (CONFIG, "make book"),
    "nbdev_proc_nbs": (CONFIG, "make book"),
    "nbdev_prepare": (CONFIG, "make export test"),
    "nbdev_readme": ("would render the index with Quarto", "make export"),
    "nbdev_contributing": ("would render a notebook that is not there", "make export"),
    "nbdev_sidebar": ("has nothing to write: the chapters stand in _quarto.yml", "make book"),
    "nbdev_install": ("would install Quarto as root", "make env"),
    "nbdev_install_quarto": ("would install Quarto as root", "make book"),
    "nbdev_new": (BEGIN, "make lab"),
    "nbdev_create_config": (BEGIN, "make lab"),
    "nbdev_migrate": (BEGIN, "make lab"),
}


def install(
    folder,  # Where an environment keeps its commands
):
    "Write a script for each refused command."
    for command, (why, instead) in REFUSED.items():
        sentence = f"{command} {why}: type `{instead}`."
        script = Path(folder) / command
        script.write_text(
            f"#!{sys.executable}\nimport sys\nsys.exit({sentence!r})\n", encoding="utf-8"
        )
        script.chmod(0o755)


if __name__ == "__main__":
    install(Path(sys.executable).parent)
