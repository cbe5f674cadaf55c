"""The rules of the house, as tests: format, types, what core may include, what stands where."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = ROOT / ".venv/bin"
ROOMS = {
    *("image", "dataplane", "provision", "tests"),
    *("mkosi.conf", "Makefile", "README.md", "pyproject.toml", "LICENSE"),
}
CORE_MAY_NOT = re.compile(
    r'#include\s*[<"](rte_|sys/|linux/|net/|time\.h|stdio\.h|unistd\.h|pthread|malloc\.h)'
)


def tracked(*patterns: str) -> list[str]:
    """What git knows of, or would after `git add`: a file that was just written is checked too."""
    argv = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns]
    names = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [name for name in names if (ROOT / name).is_file()]


def passes(argv: Sequence[str | Path]) -> None:
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"


def test_python_is_formatted() -> None:
    passes([BIN / "ruff", "format", "--diff", "--quiet"])


def test_python_has_no_lint() -> None:
    passes([BIN / "ruff", "check", "--quiet"])


@pytest.mark.timeout(180)  # a cold cache, on a busy machine
def test_python_types_are_right() -> None:
    passes([BIN / "mypy"])


def test_c_is_formatted() -> None:
    passes([BIN / "clang-format", "--dry-run", "-Werror", *tracked("*.c", "*.h")])


def test_core_includes_neither_io_nor_clock() -> None:
    found = [
        f"{name}:{number}: {line}"
        for name in tracked("dataplane/core/*.[ch]")
        if not name.endswith("_test.c")
        for number, line in enumerate((ROOT / name).read_text().splitlines(), 1)
        if CORE_MAY_NOT.search(line)
    ]
    assert not found, "core/ is pure, move this to a shell:\n" + "\n".join(found)


def test_shell_scripts_parse() -> None:
    for name in tracked():
        first = (ROOT / name).open("rb").readline()
        if re.match(rb"#!.*\b(ba)?sh\b", first):
            passes(["bash" if b"bash" in first else "sh", "-n", ROOT / name])


def test_nothing_stands_outside_the_rooms() -> None:
    top = {name.split("/")[0] for name in tracked()}
    assert {name for name in top if not name.startswith(".")} <= ROOMS


def test_no_file_names_a_package_server() -> None:
    """Where packages come from is the machine's business: no tracked file names one of its servers."""
    configured = [Path("/etc/apt/sources.list"), Path("/etc/pip.conf"), Path("/etc/xdg/pip/pip.conf")]
    configured += Path("/etc/apt/sources.list.d").glob("*")
    text = "\n".join(path.read_text() for path in configured if path.exists())
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    hosts = {host for line in lines for host in re.findall(r"https?://([A-Za-z0-9.-]{6,})", line)}
    found = [
        f"{name} names {host}"
        for name in tracked()
        for host in hosts
        if host.encode() in (ROOT / name).read_bytes()
    ]
    assert not found, "derive it from the machine's own configuration:\n" + "\n".join(found)


def makefile_verbs() -> dict[str, list[str]]:
    """Verb -> its recipe lines."""
    verbs: dict[str, list[str]] = {}
    for line in (ROOT / "Makefile").read_text().splitlines():
        if match := re.match(r"([a-z][a-z-]*):.*## ", line):
            verbs[match[1]] = recipe = []
        elif line.startswith("\t") and verbs:
            recipe.append(line)
        else:
            recipe = []
    return verbs


def test_a_verb_is_one_line_because_logic_lives_in_the_rooms() -> None:
    assert {verb: len(recipe) for verb, recipe in makefile_verbs().items() if len(recipe) > 1} == {}


def test_bare_make_lists_every_verb() -> None:
    listed = subprocess.run(
        ["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert {line.split()[0] for line in listed.splitlines()} == set(makefile_verbs())


def test_every_tool_that_a_verb_calls_exists() -> None:
    text = (ROOT / "Makefile").read_text()
    modules = re.findall(r"-m ([a-z][a-z.]+)", text)
    missing = [
        name for name in modules if "." in name and not (ROOT / (name.replace(".", "/") + ".py")).exists()
    ]
    assert not missing, f"the Makefile calls modules that are not there: {missing}"


def readme_commands() -> list[tuple[str, str]]:
    """(file, line) for every line of a fenced block of ```sh in a README."""
    return [
        (name, line.strip())
        for name in tracked("*.md")
        for block in re.findall(r"```(?:sh|shell|bash)\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)
        for line in block.splitlines()
        if line.strip() and not line.strip().startswith("#")
    ]


def test_every_make_verb_in_a_readme_exists() -> None:
    verbs = makefile_verbs()
    text = {name: (ROOT / name).read_text() for name in tracked("*.md")}
    used = {
        (name, verb)
        for name, page in text.items()
        for verb in re.findall(r"`(?:\w+=\S+ )*make ([a-z-]+)", page)
    }
    used |= {
        (name, match[1])
        for name, line in readme_commands()
        if (match := re.match(r"(?:sudo )?make ([a-z-]+)", line))
    }
    assert not {(name, verb) for name, verb in used if verb not in verbs}


def test_every_module_test_and_option_that_a_readme_runs_exists() -> None:
    """Of `python -m MODULE` and `pytest FILE --option`."""
    known = set(re.findall(r'"(--[a-z-]+)"', (ROOT / "tests/conftest.py").read_text()))
    for readme in tracked("*.md"):
        text = (ROOT / readme).read_text()
        for module in re.findall(r"python -m ([\w.]*\w)", text):
            path = ROOT / module.replace(".", "/")
            assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), f"{readme}: {module}"
        for words in re.findall(r"`pytest ([^`]+)`", text):
            files = re.findall(r"\S+\.py", words)
            assert all((ROOT / file).exists() for file in files), f"{readme}: pytest {words}"
            assert set(re.findall(r"--[a-z-]+", words)) <= known, f"{readme}: pytest {words}"


def test_every_file_that_a_readme_links_to_exists() -> None:
    missing = [
        f"{name}: {target}"
        for name in tracked("*.md")
        for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / name).read_text())
        if not (ROOT / name).parent.joinpath(target).exists()
    ]
    assert not missing
