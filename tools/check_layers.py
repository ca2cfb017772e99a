#!/usr/bin/env python3
"""Holds the sources against the layering: a module includes only what stands below it, and core/ is pure.

The list of arrows is the one that the build uses: `elasticmoe_module(NAME USES ...)` in src/CMakeLists.txt."""
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
SRC = ROOT / "src"

# core/ decides: it may not tell the time, wait, lock, do I/O, or iterate in an order that differs between runs.
IMPURE = re.compile(
    r"#include <(thread|mutex|shared_mutex|condition_variable|atomic|chrono|ctime|fstream|iostream|cstdio|filesystem|future"
    r"|random|unordered_map|unordered_set|sys/.*|unistd\.h|time\.h|pthread\.h)>|#include \"base/clock\.h\"|\b(std::rand|srand|getenv|rand)\s*\(")


def uses():
    text = (SRC / "CMakeLists.txt").read_text()
    direct = {}
    for name, rest in re.findall(r"elasticmoe_module\((\w+)([^)]*)\)", text):
        match = re.search(r"USES ([\w ]+?)(?: LINKS|$)", rest.strip())
        direct[name] = match.group(1).split() if match else []
    def closure(name):
        seen = set()
        todo = [name]
        while todo:
            for below in direct[todo.pop()]:
                if below not in seen:
                    seen.add(below)
                    todo.append(below)
        return seen
    return {name: closure(name) for name in direct}


def main():
    allowed = uses()
    problems = []
    for path in sorted(SRC.rglob("*.h")) + sorted(SRC.rglob("*.cc")):
        module = path.relative_to(SRC).parts[0]
        for number, line in enumerate(path.read_text().splitlines(), 1):
            where = f"{path.relative_to(ROOT)}:{number}"
            if match := re.match(r'#include "(\w+)/', line):
                if match.group(1) != module and match.group(1) not in allowed[module]:
                    problems.append(f"{where}: {module} may not include {match.group(1)}")
            if module in ("core", "sim") and not path.name.endswith("_test.cc") and IMPURE.search(line):
                if module == "core" or "cstdio" not in line:
                    problems.append(f"{where}: {module} is pure, but: {line.strip()}")
    for problem in problems:
        print(problem)
    print(f"{len(allowed)} modules, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
