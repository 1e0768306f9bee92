"""The code on the pages: each block of Python runs, with one namespace per page, and each command is there."""

from __future__ import annotations

import contextlib
import doctest
import io
import re
import runpy
import shlex
import sys
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch

from fastbn.cli import main
from tests.docs.pages import PAGES, ROOT, Block, blocks, named

# Blocks of Python that cannot run in a test, by page. Each says why where it stands.
NOT_RUN = {"docs/tools.md": 1}
# Languages whose blocks are no code of ours: text, what Sphinx reads, and none.
OTHER = {"", "text", "console", "{toctree}", "{include}", "{eval-rst}", "toctree", "include", "eval-rst"}
READ = {page: blocks(page.read_text()) for page in PAGES}
PYTHON = {page: [block for block in of if block.language == "python"] for page, of in READ.items()}


def with_blocks(*, needs: bool):
    """Return the pages with blocks of Python, or those with some that need packages, each with its marks."""
    params = []
    for page, of in PYTHON.items():
        packages = sorted({package for block in of for package in block.needs})
        if any(not block.is_generated for block in of) and (packages or not needs):
            marks = [pytest.mark.needs(*packages)] if needs else []
            params.append(pytest.param(page, id=named(page), marks=marks))
    return params


@pytest.fixture(autouse=True)
def _as_before():
    """Undo what a page may leave behind in torch."""
    state, options = torch.get_rng_state(), vars(torch._tensor_str.PRINT_OPTS).copy()
    yield
    torch.set_rng_state(state)
    vars(torch._tensor_str.PRINT_OPTS).update(options)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def run(page: Path, block: Block, namespace: dict) -> None:
    """Run a block: as a session where it has prompts, and what it prints is to be what it shows."""
    where = f"{named(page)}:{block.line}"
    if not block.code.lstrip().startswith(">>> "):
        exec(compile("\n" * block.line + block.code, str(page), "exec"), namespace)
        return
    test = doctest.DocTestParser().get_doctest(block.code, namespace, where, str(page), block.line)
    test.globs = namespace
    failures: list[str] = []
    doctest.DocTestRunner(verbose=False).run(test, out=failures.append, clear_globs=False)
    assert not failures, "".join(failures)


def run_page(page: Path, monkeypatch, *, needs: bool) -> None:
    namespace = {"__name__": "__page__"}
    monkeypatch.setitem(sys.modules, "__page__", type(sys)("__page__"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about torch.jit and others
        for block in PYTHON[page]:
            if not block.is_generated and block.not_run is None and (needs or not block.needs):
                run(page, block, namespace)


@pytest.mark.parametrize("page", with_blocks(needs=False))
def test_blocks_run(page, monkeypatch):
    run_page(page, monkeypatch, needs=False)


@pytest.mark.parametrize("page", with_blocks(needs=True))
def test_blocks_that_need_packages_run(page, monkeypatch):
    run_page(page, monkeypatch, needs=True)


def test_blocks_that_do_not_run_are_counted():
    counted = Counter(named(page) for page, of in PYTHON.items() for block in of if block.not_run is not None)
    assert counted == NOT_RUN


def test_every_block_says_what_it_is():
    known = {"python", "sh"} | OTHER
    assert [(named(page), block.line) for page, of in READ.items() for block in of if block.language not in known] == []


def test_what_a_page_says_of_a_block_is_read():
    text = "\n".join(
        [
            "<!-- setup\nx = 1\n-->\n```python\nx + 1\n```\n",
            "*Not run by the tests of this page: it needs a GPU.*\n\n```python\nx\n```\n",
            "*Needs the packages `a` and `b`.*\n\n```python\nx\n```\n",
            "A sentence.\n\n<!-- module.name -->\n```python\nx\n```\n\n```sh\nls\n```",
        ]
    )
    setup, plain, not_run, needs, generated, shell = blocks(text)
    assert setup.is_setup and setup.code == "x = 1\n" and plain == Block("python", "x + 1\n", 4)
    assert not_run.not_run == "it needs a GPU" and needs.needs == ("a", "b")
    assert generated.is_generated and shell == Block("sh", "ls\n", 27)


def test_a_block_that_is_wrong_is_found():
    page = ROOT / "README.md"
    with pytest.raises(ZeroDivisionError):
        run(page, Block("python", "1 / 0", 1), {})
    with pytest.raises(AssertionError, match="Expected:\n *3"):
        run(page, Block("python", ">>> 1 + 1\n3\n", 1), {})


# Programs of others that pages name. The rest is looked into.
PROGRAMS = {"pip", "ruff", "clang-format", "pre-commit", "cmake", "ctest", ".", "source", "pytest", "git"}


def commands(code: str) -> list[list[str]]:
    """Return the words of each command of a block of shell, without the variables that are set before it."""
    code = re.sub(r"""^((?:[^'"#\n]|'[^']*'|"[^"]*")*?)(^|\s)#.*$""", r"\1", code, flags=re.MULTILINE)
    lexer = shlex.shlex(code.replace("\\\n", " "), posix=True, punctuation_chars="&|;<>()\n")
    lexer.whitespace, lexer.commenters, lexer.whitespace_split = " \t\r", "", True
    found: list[list[str]] = [[]]
    skip_target = False
    for word in lexer:
        if set(word) <= set("&|;\n"):
            found.append([])
        elif set(word) <= set("<>"):
            skip_target = True
        elif skip_target:
            skip_target = False
        elif found[-1] or not re.match(r"\w+=", word):
            found[-1].append(word)
    return [words for words in found if words and words != ["export"]]


def help_of(module: str, *command: str) -> str:
    """Return what `python -m module command --help` prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as ended, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module, *command, "--help"])
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    assert ended.value.code in (0, None), module
    return printed.getvalue()


def missing(words: list[str]) -> str | None:
    """Return what is wrong with a command, or None."""
    program, *rest = words
    program = program.rsplit("/", 1)[-1] if "/bin/" in program else program
    options = {word.partition("=")[0] for word in rest if re.match(r"--\w", word)}
    if program == "fastbn":
        output = io.StringIO()
        with contextlib.redirect_stdout(output), pytest.raises(SystemExit) as ended:
            main([*rest[: bool(rest and not rest[0].startswith("-"))], "--help"])
        if ended.value.code:
            return f"no such command: fastbn {rest[0]}"
        return _absent(options, output.getvalue())
    if program in ("python", "python3"):
        if not rest or rest[0] != "-m":
            return None if rest and (ROOT / rest[0]).is_file() else f"no such file: {rest[:1]}"
        if rest[1] in ("venv", "pip", "pytest", "timeit", "build", "http.server"):
            return None
        printed = help_of(rest[1])
        if rest[2:] and re.fullmatch(r"[a-z]+", rest[2]):
            printed += help_of(rest[1], rest[2])
        return _absent(options, printed)
    if program == "nox":
        sessions = set(re.findall(r"@nox\.session\ndef (\w+)", (ROOT / "noxfile.py").read_text()))
        asked = set(rest[rest.index("-s") + 1 :]) if "-s" in rest else set()
        return None if asked <= sessions else f"no such session: {asked - sessions}"
    if "/" in program:
        return None if (ROOT / program).is_file() else f"no such file: {program}"
    return None if program in PROGRAMS else f"no such program: {program}"


def _absent(options: set[str], text: str) -> str | None:
    absent = sorted(option for option in options if not re.search(rf"{option}\b", text))
    return f"no such option: {' '.join(absent)}" if absent else None


SHELL = [page for page, of in READ.items() if any(block.language == "sh" for block in of)]


@pytest.mark.parametrize("page", SHELL, ids=named)
def test_commands_exist(page):
    wrong = {
        f"{named(page)}:{block.line} {shlex.join(words)}": missing(words)
        for block in READ[page]
        if block.language == "sh" and block.not_run is None
        for words in commands(block.code)
    }
    assert {command: why for command, why in wrong.items() if why is not None} == {}


@pytest.mark.parametrize(
    "line, why",
    [
        ("fastbn gone", "no such command"),
        ("A=1 fastbn verify --gone", "no such option: --gone"),
        ("python -m bench --gone=3", "no such option: --gone"),
        ("python docs/gone.py > x", "no such file"),
        ("nox -s gone", "no such session"),
        ("gone --help  # a comment", "no such program"),
        ("pip install x && bench/gone.sh", "no such file"),
    ],
)
def test_a_command_that_is_gone_is_found(line, why):
    assert missing(commands(line)[-1]).startswith(why)
