"""Where things are: imports run one way, the root holds three programs, and to import a file does nothing else."""

from __future__ import annotations

import ast
import functools
import json
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Each row may import what stands below it, and what is in the row itself; never what stands above.
ROWS = ("tests", "docs", "records", "ablations", "bench", "eval_bpb", "train_gpt", "pack", "data", "tern")
PROGRAMS = {"eval_bpb.py", "pack.py", "train_gpt.py"}
AS_THEY_RAN = ("records/track_", "records/history/")  # the programs of records, with layouts of their own


@functools.cache
def trees() -> dict[str, ast.Module]:
    """File name -> syntax tree of every Python file of the project."""
    files = [*ROOT.glob("*.py"), *(file for row in ROWS for file in (ROOT / row).rglob("*.py"))]
    names = sorted(file.relative_to(ROOT).as_posix() for file in files)
    return {name: ast.parse((ROOT / name).read_text(encoding="utf-8"), name) for name in names
            if not name.startswith(AS_THEY_RAN)}


def module_name(file: str) -> str:
    """records/plan.py -> records.plan, tern/__init__.py -> tern; tests import each other without their folder."""
    name = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return name.removeprefix("tests.")


def imported(nodes: Iterable[ast.AST]) -> Iterator[tuple[int, str]]:
    """(line, name) of what some nodes import; of `from a import b` a and a.b."""
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: relative imports are not read here"
            yield node.lineno, node.module
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


@functools.cache
def arrows() -> dict[str, dict[str, int]]:
    """File -> {file that it imports, in functions too: line}."""
    files = {module_name(file): file for file in trees()}
    found: dict[str, dict[str, int]] = {}
    for file, tree in trees().items():
        targets = found.setdefault(file, {})
        for line, name in imported(ast.walk(tree)):
            if name in files and files[name] != file:
                targets.setdefault(files[name], line)
    return found


def row(file: str) -> int:
    """Number of a file's row in ROWS."""
    return ROWS.index(Path(file).parts[0].removesuffix(".py"))


@pytest.mark.fast
def test_the_reader_sees_imports():
    """Otherwise all below would hold for nothing: known arrows, of each way to write one."""
    assert "train_gpt.py" in arrows()["eval_bpb.py"] and "pack.py" in arrows()["train_gpt.py"]
    assert "tern/entropy.py" in arrows()["pack.py"]
    assert "tests/independent_decoder.py" in arrows()["tests/test_format_page.py"]
    assert "tern/machine.py" in arrows()["bench/commits.py"], "an import inside a function"
    assert len(trees()) > 60


@pytest.mark.fast
def test_no_import_runs_upwards():
    """So no file of tern/ knows a program, either."""
    upward = [f"{file}:{line}: imports {target}" for file, targets in arrows().items()
              for target, line in targets.items() if row(target) < row(file)]
    assert not upward, "\n".join(upward)


@pytest.mark.fast
def test_no_imports_run_in_a_circle():
    try:
        TopologicalSorter({file: set(targets) for file, targets in arrows().items()}).prepare()
    except CycleError as e:
        pytest.fail("a circle of imports: " + " <- ".join(e.args[1]))


@pytest.mark.fast
def test_the_root_holds_the_three_programs():
    assert {file for file in trees() if "/" not in file} == PROGRAMS
    others = {folder.name for folder in ROOT.iterdir() if folder.is_dir() and folder.name not in ROWS
              and not folder.name.startswith(".") and not (folder / "pyvenv.cfg").exists() and any(folder.glob("*.py"))}
    assert not others, "a folder with programs that ROWS does not know"


@pytest.mark.fast
def test_the_trainer_is_one_file_whose_model_comes_soon():
    lines = (ROOT / "train_gpt.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 1500
    banner = next(number for number, line in enumerate(lines, 1) if line.startswith("# Model"))
    model = min(node.lineno for node in trees()["train_gpt.py"].body
                if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.lineno > banner)
    assert model <= 450


# Side effects -------------------------------------------------------------------------------------------------


def is_guard(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in (
        "__package__ in (None, '')", "__name__ == '__main__'")


def on_import(node: ast.AST) -> Iterator[ast.AST]:
    """The parts of a module that run when it is imported: not bodies of functions, nor what only a script runs."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or is_guard(child):
            continue
        yield child
        yield from on_import(child)


@pytest.mark.fast
def test_the_module_path_is_changed_by_scripts_alone():
    """`if __package__ in (None, "")` tells a script, which has its own folder on the path and not the root."""
    changed = [f"{file}:{node.lineno}: {ast.unparse(node)}" for file, tree in trees().items()
               for node in on_import(tree)
               if isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.path"]
    assert not changed, "\n".join(changed)


LOOK = """
import contextlib, importlib, json, os, signal, sys, threading, warnings
libraries, modules = json.loads(sys.stdin.read())
for name in libraries:  # what they do when they are imported is theirs
    with contextlib.suppress(ImportError):
        importlib.import_module(name)

def state():
    handlers = [str(signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    return {"sys.path": list(sys.path), "environment": dict(os.environ), "directory": os.getcwd(),
            "signal handlers": handlers, "threads": threading.active_count()}

def files():
    return sorted(os.path.join(folder, name) for place in sys.argv[1:] for folder, _, names in os.walk(place)
                  for name in names)

def look(module):
    before, held = state(), files()
    log = os.open("printed", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1), os.dup2(log, 2)
    try:
        importlib.import_module(module)
        found = [f"changes the {key}" for key, value in state().items() if value != before[key]]
    except BaseException as e:
        found = [f"{type(e).__name__}: {e}"]
    sys.stdout.flush(), sys.stderr.flush()
    if os.fstat(log).st_size:
        found.append("prints " + os.pread(log, 200, 0).decode(errors="replace"))
    return found + [f"writes {name}" for name in files() if name not in held and not name.endswith("/printed")]

for module in modules:
    read, write = os.pipe()
    child = os.fork()  # a process that has imported libraries and nothing of the project
    if not child:
        os.write(write, json.dumps(look(module)).encode())
        os._exit(0)
    os.close(write)
    with open(read, "rb") as said:
        print(json.dumps([module, json.loads(said.read() or b'["died"]')]), flush=True)
    os.waitpid(child, 0)
"""


def test_to_import_a_file_does_nothing_else(tmp_path):
    """Each in a process that has imported nothing else of the project: no line, no file, no change of the process."""
    copy, here = tmp_path / "copy", tmp_path / "here"
    here.mkdir()
    for file in trees():
        if row(file):  # tests are imported by pytest
            (copy / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, copy / file)
    modules = [module_name(file) for file in trees() if row(file)]
    own = {module.split(".")[0] for module in modules}
    libraries = sorted({name for file, tree in trees().items() if row(file) for _, name in imported(on_import(tree))
                        if name.split(".")[0] not in own})
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(copy), "HOME": str(here), "TMPDIR": str(here),
           "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-B", "-c", LOOK, str(copy), str(here)], cwd=here, env=env, text=True,
                          input=json.dumps([libraries, modules]), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    found = dict(map(json.loads, done.stdout.splitlines()))
    assert found.keys() == set(modules)
    odd = [f"{module}: {what}" for module, faults in found.items() for what in faults]
    assert not odd, "\n".join(odd)
