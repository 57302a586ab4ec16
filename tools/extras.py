"""Prints the requirements of some extras of pyproject.toml, one a line; `build` is the build's own.

Lets the Makefile install them before bnext itself is built, which an extra of bnext cannot.
"""

import re
import sys
from pathlib import Path


def requirements(names: list[str]) -> list[str]:
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text()  # no tomllib on 3.10
    lists = dict(re.findall(r"^(\w+) = \[(.*?)\]$", text, flags=re.MULTILINE | re.DOTALL))
    lists["build"] = lists["requires"]
    found = []
    for name in names:
        found += [r for r in re.findall(r'"([^"]+)"', lists[name]) if not r.startswith("bnext[")]
    return sorted(set(found))


if __name__ == "__main__":
    print("\n".join(requirements(sys.argv[1:])))
