"""tern/source.py: which files are the program, and that the one file that is submitted is that program."""

from __future__ import annotations

import ast
import hashlib
import json
import subprocess
import sys

import pytest

from conftest import NAME, ROOT, ended, metrics, started, tiny_args
from tern import source
from tern.source import SourceError

SOURCES = {
    "tern/__init__.py": b'"""A package."""\n',
    "tern/low.py": b'"""Low."""\n\nfrom __future__ import annotations\n\n# a reason\nX = 1\n',
    "pack.py": b'"""Pack."""\nimport json\n\nfrom tern import low\n\n\ndef main():\n    """Doc."""\n    return low.X\n',
    "train_gpt.py": b'"""Train."""\nimport pack\n\n\nclass A:\n    """Only a docstring."""\n\n\ndef main():\n'
                    b'    import eval_bpb\n    print("ran", pack.main(), eval_bpb.main(), A.__doc__)\n    return 3\n',
    "eval_bpb.py": b'"""Score."""\nimport train_gpt\n\n\ndef main():\n    return train_gpt.__doc__\n',
}


# -- which files ---------------------------------------------------------------------------------------------------


def test_the_files_are_what_the_three_programs_import():
    """Seen from outside: what lies in this folder of all that Python has loaded."""
    program = ("import sys, train_gpt, eval_bpb, pack\n"
               "files = [getattr(module, '__file__', None) for module in sys.modules.values()]\n"
               "print(*[file for file in files if file], sep='\\n')")
    done = ended(started(sys.executable, "-c", program))
    loaded = {line.removeprefix(f"{ROOT}/") for line in done.stdout.splitlines() if line.startswith(f"{ROOT}/")
              and "site-packages" not in line}
    assert done.returncode == 0 and loaded == set(source.code_files()), done.stderr
    assert set(source.PROGRAMS) <= loaded and list(source.code_files()) == sorted(loaded)


@pytest.mark.fast
def test_sources_are_the_bytes_on_disk():
    sources = source.read_sources()
    assert tuple(sources) == source.code_files() and not source.in_bundle()
    assert all(text == (ROOT / name).read_bytes() for name, text in sources.items())
    assert {name for name in sources if "/" not in name} == {p.name for p in ROOT.glob("*.py")} == set(source.PROGRAMS)


# -- the one file --------------------------------------------------------------------------------------------------


def defined(text: str) -> list[str]:
    return [node.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.ClassDef)]


@pytest.mark.fast
def test_only_comments_and_docstrings_are_dropped():
    for name, text in source.read_sources().items():
        stripped = source.strip(text, name)
        assert defined(stripped) == defined(text.decode()), name
        assert ast.get_docstring(ast.parse(stripped)) == ast.get_docstring(ast.parse(text)), "--help prints it"


@pytest.mark.fast
def test_a_small_program_runs_from_its_one_file(tmp_path):
    program = source.one_file(SOURCES)
    assert program == source.one_file(dict(reversed(SOURCES.items())))
    assert source.code_bytes(SOURCES) == len(program)
    frame, packed = source.take_apart(program)
    assert frame == source.FRAME
    modules = json.loads(source.unpack(packed))
    assert list(modules) == ["tern", "tern.low", "pack", "train_gpt", "eval_bpb"], "each after what it imports"
    assert "reason" not in modules["tern.low"] and "Doc." not in modules["pack"] and "Pack." in modules["pack"]
    (tmp_path / "train_gpt.py").write_bytes(program)
    done = subprocess.run([sys.executable, "train_gpt.py"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (3, "ran 1 Train. None\n", "")
    assert [p.name for p in tmp_path.iterdir()] == ["train_gpt.py"]


@pytest.mark.fast
def test_nothing_hides_around_the_sources_or_in_them():
    program = source.one_file(SOURCES)
    _, packed = source.take_apart(program)
    for other in (b"import os\n" + program, program + b"print(1)\n", program.replace(b"import sys", b"import os", 1)):
        assert source.take_apart(other)[0] != source.FRAME
    for none in (b"", b"print(1)", program[: len(program) // 2]):
        with pytest.raises(SourceError, match="train_gpt.py: holds no sources"):
            source.take_apart(none)
    for damaged in (b"", packed[:-5], packed[5:], b"~~" + packed, packed + packed):
        with pytest.raises(SourceError, match="train_gpt.py: its sources cannot be unpacked"):
            source.unpack(damaged)


@pytest.mark.fast
@pytest.mark.parametrize("text", [b"def", b"\xff", b"x\0", b"#" * (source.MAX_SOURCE + 1)],
                         ids=["syntax", "UTF-8", "zero", "size"])
def test_sources_that_are_not_python_are_refused(text):
    for use in (lambda: source.strip(text, "a.py"), lambda: source.one_file(SOURCES | {"pack.py": text})):
        with pytest.raises(SourceError, match=r"(a|pack).py: not a Python module"):
            use()


def test_the_one_file_is_the_program(tiny_run, data_dir, tmp_path):
    """Alone in a folder it trains to the same bytes, and scores, in a process of its own, to the last digit."""
    folder, _ = tiny_run
    program = source.one_file(source.read_sources())
    (tmp_path / "train_gpt.py").write_bytes(program)

    def alone(*argv: object) -> str:
        done = ended(started(sys.executable, "-E", "train_gpt.py", *argv, cwd=tmp_path, OMP_NUM_THREADS="1"))
        assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr
        return done.stdout

    assert "(logits identical bit for bit)" in alone(*tiny_args(data_dir, "runs"))
    mine = tmp_path / "runs" / NAME
    assert (mine / "model.tern").read_bytes() == (folder / "model.tern").read_bytes()
    header, final = metrics(mine, "header")[0], metrics(mine, "final")[0]
    assert header["source_sha256"] == {"train_gpt.py": hashlib.sha256(program).hexdigest()}
    assert final["bytes_code"] == len(program) == metrics(folder, "final")[0]["bytes_code"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["runs", "train_gpt.py"]

    alone("eval_bpb", mine / "model.tern", "--data", data_dir, "--stride", 32, "--json", "score.json")
    scores = [json.loads(path.read_text()) for path in (tmp_path / "score.json", folder / "score.json")]
    for kind in ("chunked", "sliding"):
        assert scores[0][kind]["val_bpb"] == scores[1][kind]["val_bpb"], kind
    assert "blocks.1.mlp.fc.weight" in alone("pack", "inspect", folder / "model.tern")
