"""data/prepare.py: where a data folder may stand, what it never replaces, and what a stop or a kill leaves of it."""

import contextlib
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from data import messages, places, prepare
from tern.files import sha256_file
from tern.shards import DataError, open_data

ROOT = Path(prepare.__file__).resolve().parents[1]
PROGRAM = [sys.executable, str(ROOT / "data" / "prepare.py")]
OPTIONS = ["--source", "text", "--vocab-size", "300", "--val-fraction", "0.1"]


def words(rng: random.Random, count: int) -> str:
    return " ".join("".join(rng.choices("etaoinshr", k=rng.randint(2, 7))) for _ in range(count))


def write_input(path: Path, seed: int, documents: int = 60) -> Path:
    rng = random.Random(seed)
    path.write_text("".join(json.dumps({"text": words(rng, 60)}) + "\n" for _ in range(documents)))
    return path


def run(out: object, source: Path, *options: str) -> int:
    return prepare.main([*OPTIONS, "--out", str(out), "--input", str(source), *options])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def one_error(capsys, *parts: str) -> None:
    error = capsys.readouterr().err
    assert error.startswith("error: "), error
    assert error.count("\n") == 1, error
    assert all(part in error for part in parts), error


def whole(folder: Path) -> bool:
    """Whether a reader that checks the manifest accepts the folder."""
    try:
        hashes = places.file_hashes(json.loads((folder / "manifest.json").read_text()))
        return (all(sha256_file(folder / name) == sha for name, sha in hashes.items())
                and {path.name for path in folder.glob("*.bin")} <= hashes.keys())
    except (OSError, ValueError, KeyError):
        return False


@pytest.fixture
def old(tmp_path) -> Path:
    return write_input(tmp_path / "old.jsonl", 1)


@pytest.fixture
def new(tmp_path) -> Path:
    return write_input(tmp_path / "new.jsonl", 2, 70)


@pytest.fixture
def place(tmp_path) -> Path:
    """An empty folder to put output folders into."""
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


# ---------------------------------------------------------------- names


def test_a_link_to_a_folder_stays_a_link(place, old, new):
    (place / "real").mkdir()
    (place / "link").symlink_to("real")
    for source in (old, new):
        assert run(place / "link", source) == 0
        assert (place / "link").is_symlink()
        assert whole(place / "real")
    assert sorted(os.listdir(place)) == ["link", "real"]


def test_a_dangling_link_gets_its_target(place, old):
    (place / "link").symlink_to("deep/target")
    assert run(place / "link", old) == 0
    assert (place / "link").is_symlink()
    assert whole(place / "deep" / "target")


@pytest.mark.parametrize("name", [".", "../here/"])
def test_the_current_directory_is_filled_in_place(place, old, new, monkeypatch, name):
    (place / "here").mkdir()
    monkeypatch.chdir(place / "here")
    number = (place / "here").stat().st_ino
    for source in (old, new):
        assert run(name, source) == 0
        assert whole(Path("."))
        assert (place / "here").stat().st_ino == number
        assert len(os.listdir(place / "here")) == 4
    assert os.listdir(place) == ["here"]


def test_a_folder_above_the_current_directory_is_filled_in_place(place, old, monkeypatch, capsys):
    (place / "a" / "lost+found").mkdir(parents=True)
    monkeypatch.chdir(place / "a" / "lost+found")
    assert run("..", old) == 0
    assert whole(place / "a")
    assert Path.cwd() == place / "a" / "lost+found"
    (place / "a" / "mine").mkdir()
    assert run("..", old) == 0, "up to date, so nothing is replaced"


def test_relative_paths_and_slashes(place, old, monkeypatch):
    monkeypatch.chdir(place)
    assert run("a/b///", old) == run("./a/../a/c", old) == 0
    assert whole(place / "a" / "b")
    assert contents(place / "a" / "b") == contents(place / "a" / "c")


@pytest.mark.parametrize("length", [246, 247])  # with what is added to it at most 255, and more
def test_a_long_name(place, old, new, length):
    out = place / ("n" * length)
    assert run(out, old) == run(out, new) == 0
    assert whole(out)
    assert os.listdir(place) == [out.name]


@pytest.mark.parametrize(("name", "message"), [
    ("n" * 256, "name too long"),
    ("file", "is not a folder"),
    ("file/x", "Not a directory"),
    ("loop", "oop"),
    ("bad\udcff", "not UTF-8"),
    ("/", "did not write"),
    ("/dev/null", "is not a folder"),
    ("blocked", "File exists"),
])
def test_a_place_that_cannot_work_is_refused_before_work_begins(place, old, capsys, monkeypatch, name, message):
    (place / "file").write_text("x")
    (place / ".blocked.partial").write_text("x")
    (place / "loop").symlink_to("loop")
    before = sorted(os.listdir(place))
    monkeypatch.setattr(prepare, "request_of", lambda *_: pytest.fail("work began"))
    assert run(place / name, old) == 1
    one_error(capsys, message.replace("name too long", "File name too long"), "--out")
    assert sorted(os.listdir(place)) == before


def test_an_empty_name_is_refused(old, capsys):
    with pytest.raises(SystemExit) as stopped:
        run("", old)
    assert stopped.value.code == 2
    one_error(capsys, "--out", "empty")


@pytest.mark.parametrize("name", ["notes.txt", "text_train_000007.bin"])
def test_a_strangers_file_in_our_folder_is_not_lost(place, old, new, capsys, name):
    assert run(place / "out", old) == 0
    (place / "out" / name).write_text("mine")
    before = contents(place / "out")
    capsys.readouterr()
    assert run(place / "out", new) == 1
    one_error(capsys, name, "is not replaced")
    assert contents(place / "out") == before


def test_a_file_put_there_during_the_run_is_not_lost(place, old, new, monkeypatch, capsys):
    assert run(place / "out", old) == 0
    real = prepare.encode

    def encode(*arguments):
        (place / "out" / "notes.txt").write_text("mine")
        real(*arguments)

    monkeypatch.setattr(prepare, "encode", encode)
    capsys.readouterr()
    assert run(place / "out", new) == 1
    one_error(capsys, "notes.txt")
    assert (place / "out" / "notes.txt").read_text() == "mine"
    assert os.listdir(place) == ["out"]


def test_parents_that_were_made_go_with_a_failed_run(place, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text("{}\n")
    assert run(place / "a" / "b" / "out", tmp_path / "a.jsonl") == 1
    assert os.listdir(place) == []


# ---------------------------------------------------------------- how a folder is replaced


def test_the_old_folder_is_there_until_the_new_one_is(place, old, new, monkeypatch):
    """One step: at no call of the commit is there none, or half of one."""
    assert run(place / "out", old) == 0
    seen, real = [], os.fsync

    def look(handle):
        seen.append((whole(place / "out"), sha256_file(place / "out" / "manifest.json")))
        real(handle)

    monkeypatch.setattr(places.os, "fsync", look)
    first = sha256_file(place / "out" / "manifest.json")
    assert run(place / "out", new) == 0
    last = sha256_file(place / "out" / "manifest.json")
    assert all(state for state, _ in seen)
    assert [sha for _, sha in seen] == [first] * (len(seen) - 1) + [last]
    assert len(seen) == 6, "every file and the folder before the swap, the parent after it"
    assert os.listdir(place) == ["out"]


def test_a_folder_keeps_its_mode(place, old, new):
    assert run(place / "out", old) == 0
    (place / "out").chmod(0o750)
    assert run(place / "out", new) == 0
    assert (place / "out").stat().st_mode & 0o777 == 0o750


def test_without_the_swap_of_linux_two_renames_do_it(place, old, new, monkeypatch):
    monkeypatch.setattr(places, "exchange", lambda *_: False)
    assert run(place / "out", old) == run(place / "out", new) == 0
    assert whole(place / "out")
    assert os.listdir(place) == ["out"]


def test_a_death_between_two_renames_loses_nothing(place, old, new):
    assert run(place / "out", old) == 0
    before = contents(place / "out")
    (place / "out").rename(place / ".out.old")
    (place / ".out.partial").mkdir()
    (place / "bad.jsonl").write_text("{}\n")
    assert run(place / "out", place / "bad.jsonl") == 1
    assert contents(place / "out") == before
    (place / "bad.jsonl").unlink()
    assert os.listdir(place) == ["out"]


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EXDEV, errno.EPERM])
def test_a_folder_that_cannot_be_renamed_is_filled_in_place(place, old, new, monkeypatch, number):
    """As for a mount of the same file system, which is only known when the rename fails."""
    def busy(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(places, "exchange", busy)
    (place / "out").mkdir()
    identity = (place / "out").stat().st_ino
    assert run(place / "out", old) == run(place / "out", new) == 0
    assert whole(place / "out")
    assert (place / "out").stat().st_ino == identity
    assert len(os.listdir(place / "out")) == 4
    assert os.listdir(place) == ["out"]


def test_a_mount_point_is_built_inside(place, old, new, monkeypatch):
    """A mount is simulated: it says so, and nothing beside it is ever made."""
    (place / "out" / "lost+found").mkdir(parents=True)
    monkeypatch.setattr(places.os.path, "ismount", lambda path: path == place / "out")
    monkeypatch.setattr(places.Place, "swap", lambda self: pytest.fail("renamed a mount"))
    monkeypatch.setattr(places, "sibling", lambda out, kind: Path("/nowhere") / kind)
    assert run(place / "out", old, "--shard-tokens", "900") == 0
    assert run(place / "out", new) == 0
    assert whole(place / "out")
    assert sorted(os.listdir(place / "out")) == ["lost+found", "manifest.json", "text_train_000000.bin",
                                                 "text_val_000000.bin", "tokenizer.model"]


MOUNTS = """import os, subprocess, sys
sys.path.insert(0, sys.argv[1])
from data import prepare
def mount(*arguments):
    subprocess.run(["mount", *arguments], check=True)
def run(name, out):
    return prepare.main([*sys.argv[2:], "--input", name + ".jsonl", "--out", out])
for folder in ("v", "b", "src", "ro/out", "small"):
    os.makedirs(folder)
mount("-t", "tmpfs", "none", "v")
mount("--bind", "src", "b")
mount("--bind", "ro", "ro")
mount("-t", "tmpfs", "none", "ro/out")
mount("-o", "remount,ro,bind", "ro")
mount("-t", "tmpfs", "-o", "size=100k", "none", "small")
before = sorted(os.listdir("."))
for out in ("v", "b", "ro/out"):
    for name in ("old", "new"):
        assert run(name, out) == 0
        assert len(os.listdir(out)) == 4, os.listdir(out)
assert run("big", "small/x") == run("big", "small") == 1
assert os.listdir("small") == []
assert sorted(os.listdir(".")) == before
"""


def test_real_mounts(tmp_path, old, new):
    """A tmpfs, a bind mount, a read-only parent and a full disk, where this machine lets us mount."""
    write_input(tmp_path / "big.jsonl", 3, 1_000)
    alone = ["unshare", "-rm"]
    try:
        subprocess.run([*alone, "mount", "-t", "tmpfs", "none", str(tmp_path)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting is not allowed here; the simulated mounts above stand for it")
    done = subprocess.run([*alone, sys.executable, "-c", MOUNTS, str(ROOT), *OPTIONS], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    errors = done.stderr.splitlines()
    assert len(errors) == 2
    assert all(line.startswith("error: ") and "small" in line and "No space left" in line for line in errors)


def test_a_read_only_folder_that_is_up_to_date_is_no_error(place, old, new, monkeypatch, capsys):
    assert run(place / "out", old) == 0

    def refuse(self, *_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert run(place / "out", old) == 0
    assert "up to date" in capsys.readouterr().out
    assert run(place / "out", new) == 1
    one_error(capsys, "cannot be written", "Read-only")
    assert run(place / "other", new) == 1
    one_error(capsys, "cannot be written", "Read-only")


# ---------------------------------------------------------------- two at once


def test_a_second_process_is_refused_at_once(place, old, new, monkeypatch, capsys):
    assert run(place / "out", old) == 0
    for out in (place / "out", place / "fresh"):
        first = places.Place(out)
        first.begin()
        (first.partial / "documents.spool").write_text("x")
        with monkeypatch.context() as patch:
            patch.setattr(prepare, "request_of", lambda *_: pytest.fail("work began"))
            capsys.readouterr()
            assert run(out, new) == 1
            one_error(capsys, "another process is preparing", str(out))
        assert (first.partial / "documents.spool").read_text() == "x"
        first.close()
        assert run(out, new) == 0
    assert sorted(os.listdir(place)) == ["fresh", "out"]


def test_a_second_process_is_refused_while_the_first_removes_the_old_folder(place, old, new, monkeypatch, capsys):
    assert run(place / "out", old) == 0
    results, real = [], places.remove_folder

    def remove(folder):
        if not results:
            results.append("asked")
            results.append(run(place / "out", old))
        real(folder)

    monkeypatch.setattr(places, "remove_folder", remove)
    capsys.readouterr()
    assert run(place / "out", new) == 0
    assert results == ["asked", 1]
    one_error(capsys, "another process is preparing")
    assert whole(place / "out")
    assert os.listdir(place) == ["out"]


def test_a_lock_of_a_dead_process_is_none(place, new):
    code = ("import sys, os; sys.path.insert(0, sys.argv[1]); from data import places; from pathlib import Path\n"
            "place = places.Place(Path(sys.argv[2])); place.begin()\n"
            "(place.partial / 'documents.spool').write_text('x')\n"
            "os.kill(os.getpid(), 9)")
    done = subprocess.run([sys.executable, "-c", code, str(ROOT), str(place / "out")])
    assert done.returncode == -9
    assert (place / ".out.partial" / "documents.spool").exists()
    assert run(place / "out", new) == 0
    assert whole(place / "out")
    assert os.listdir(place) == ["out"]


# ---------------------------------------------------------------- stops, kills, full disks


def killed_at(call: int, out: Path, source: Path) -> bool:
    """Run in a child process that is killed before its call-th step of the commit; False if it ended before that."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] == signal.SIGKILL
    calls, committing, commit = [0], [0], places.Place.commit

    def counting(place):
        committing[0] = 1
        commit(place)

    places.Place.commit = counting

    def counted(real):
        def change(*arguments, **options):
            calls[0] += committing[0]
            if calls[0] == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)
        return change

    for module, names in ((os, ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync", "remove", "chmod")),
                          (places, ("exchange",))):
        for name in names:
            setattr(module, name, counted(getattr(module, name)))
    os._exit(run(out, source))


def state_of(out: Path, before: dict[str, bytes]) -> str:
    """What training and scoring make of the folder."""
    if not out.exists() or not contents(out):
        return "none"
    try:
        open_data(out)
    except DataError:
        return "refused"
    assert whole(out), "what they accept is whole, not a part of it"
    return "old" if contents(out) == before else "new"


@pytest.mark.parametrize("kind", ["new", "replaced", "two renames", "in place", "in place, empty"])
def test_a_kill_anywhere_leaves_the_old_or_the_new_folder(place, old, new, monkeypatch, kind):
    """And in place, for the moments of the moves, one that a reader refuses and the next run completes."""
    out = place / "out"
    if kind == "two renames":
        monkeypatch.setattr(places, "exchange", lambda *_: False)
    if kind.startswith("in place"):
        monkeypatch.setattr(places.os.path, "ismount", lambda path: path == out)
    template, states, call, before = place.parent / "template", [], 0, {}
    assert run(template, old, "--shard-tokens", "900") == 0
    while True:
        call += 1
        shutil.rmtree(out, ignore_errors=True)
        if kind == "in place, empty":
            out.mkdir()
        elif kind != "new":
            shutil.copytree(template, out)
            before = contents(out)
        killed = killed_at(call, out, new)
        states.append(state_of(out, before))
        with monkeypatch.context() as patch:
            if states[-1] in ("refused", "new"):
                patch.setattr(prepare, "build", lambda *_: pytest.fail("built again"))
            assert run(out, new) == 0
        assert whole(out)
        assert os.listdir(place) == ["out"]
        if not killed:
            break
    order = list(dict.fromkeys(states))
    assert order == {"new": ["none", "new"], "replaced": ["old", "new"], "two renames": ["old", "none", "new"],
                     "in place": ["old", "refused", "new"], "in place, empty": ["none", "refused", "new"]}[kind]
    assert call > 8


def heed_signals() -> None:
    """In a child before its program: tests that run in the background, or under nohup, pass ignored signals on."""
    for number in places.SIGNALS:
        signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def blocked(command: list[str], said: str, **options: object) -> Iterator[subprocess.Popen]:
    """A program that has said so, and does nothing more."""
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                             preexec_fn=heed_signals, **options)
    try:
        while child.stdout.readline() not in (said + "\n", ""):
            pass
        yield child
    finally:
        child.kill()


def stop(child: subprocess.Popen, number: signal.Signals) -> str:
    """What it writes as its error when it gets a signal, with which it must end."""
    child.send_signal(number)
    output, error = child.communicate(timeout=300)
    assert child.returncode == 128 + number, (output, error)
    return error


@pytest.mark.parametrize("number", places.SIGNALS, ids=lambda number: number.name)
def test_a_signal_while_it_starts_is_one_line(tmp_path, number):
    """What data/prepare.py imports takes a second; here it takes for ever, in sleeps that no signal can slip past."""
    (tmp_path / "numpy.py").write_text(
        "import time\nprint('importing', flush=True)\nwhile True:\n    time.sleep(0.05)\n")
    with blocked(PROGRAM, "importing", env=os.environ | {"PYTHONPATH": str(tmp_path)}) as child:
        assert stop(child, number) == f"error: stopped by {number.name} before anything was begun\n"


BLOCKED = """import sys, os, hashlib, time
sys.path.insert(0, sys.argv.pop(1))
from data import prepare
moment = sys.argv.pop(1)
def text_documents(*_):
    yield "some words of a first document"
    print(moment, flush=True)
    while True:
        time.sleep(0.05)
def train_pieces(*_):
    print(moment, flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000_000)
for function in (text_documents, train_pieces):
    if moment in function.__name__:
        setattr(prepare, function.__name__, function)
os._exit(prepare.main())
"""


@pytest.mark.parametrize(("number", "moment"), [
    (signal.SIGTERM, "text_documents"), (signal.SIGINT, "train_pieces"), (signal.SIGHUP, "train_pieces")])
def test_a_signal_is_answered_at_once_with_one_line(place, old, number, moment):
    """Also while the tokenizer is trained: like that library, the stand-in does not return to Python for long."""
    assert run(place / "out", old) == 0
    before = contents(place / "out")
    command = [sys.executable, "-c", BLOCKED, str(ROOT), moment, *OPTIONS, "--shard-tokens", "900", "--input", str(old),
               "--out", str(place / "out")]
    with blocked(command, moment) as child:
        assert (place / ".out.partial" / "documents.spool").exists()
        error = stop(child, number)
    assert error.startswith(f"error: stopped by {number.name}")
    assert error.count("\n") == 1
    assert contents(place / "out") == before
    assert os.listdir(place) == ["out"]


def test_two_processes_write_the_same_bytes(place, old):
    for seed in ("1", "2"):
        subprocess.run([*PROGRAM, *OPTIONS, "--input", str(old), "--out", str(place / seed)], check=True, cwd=place,
                       stdout=subprocess.DEVNULL, env=os.environ | {"PYTHONHASHSEED": seed})
    assert contents(place / "1") == contents(place / "2")


def test_nohup_is_respected(place, old):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with places.handlers(places.stop):
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("moment", ["spool", "shard", "manifest", "fsync"])
def test_a_full_disk_leaves_the_old_folder(place, old, new, monkeypatch, capsys, moment):
    assert run(place / "out", old) == 0
    before = contents(place / "out")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    target = {"spool": (prepare.Spool, "__init__"), "shard": (prepare.ShardWriter, "close"),
              "manifest": (Path, "write_text"), "fsync": (places.os, "fsync")}[moment]
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(*target, full)
        assert run(place / "out", new) == 1
    one_error(capsys, str(place / ".out.partial"), "No space left", "free some space")
    assert contents(place / "out") == before
    assert os.listdir(place) == ["out"]


def test_a_disk_that_is_known_to_be_too_small_is_refused_before_work(place, tmp_path, monkeypatch, capsys):
    (tmp_path / "a.txt").write_text("word " * 10_000)
    monkeypatch.setattr(places.shutil, "disk_usage", lambda _: os.terminal_size((1, 2)) and type(
        "Usage", (), {"free": 49_999}))
    monkeypatch.setattr(prepare, "build", lambda *_: pytest.fail("work began"))
    assert run(place / "out", tmp_path / "a.txt") == 1
    one_error(capsys, "49,999 bytes free", "50,000", "--out")
    assert os.listdir(place) == []


@pytest.mark.parametrize("redirect", [">&-", "> /dev/full", "| head -c 1 > /dev/null"])
def test_an_output_that_cannot_be_written_costs_no_work(place, old, redirect):
    command = f'"$@" {redirect}'
    subprocess.run(["bash", "-c", command, "bash", *PROGRAM, *OPTIONS,
                    "--input", str(old), "--out", str(place / "out")], check=True, stdout=subprocess.DEVNULL)
    assert whole(place / "out")


# -- folders of others with our names ---------------------------------------------------------------------------------


NEEDED = [".out.old", ".out.partial", "out/.partial", "out/.complete"]


@pytest.mark.parametrize("where", NEEDED)
def test_what_others_keep_under_such_a_name_is_not_removed(tmp_path, capsys, where):
    for name in ("thesis.tex", "input.jsonl", "folder"):
        base = tmp_path / name
        held = base / where
        held.mkdir(parents=True)
        source = write_input(held / name if name == "input.jsonl" else base / "source.jsonl", 1)
        if name == "folder":
            (held / name).mkdir()
        elif name == "thesis.tex":
            (held / name).write_text("years of work")
        assert run(base / "out", source) == 1
        one_error(capsys, name, "change --out")
        assert (held / name).exists() and source.exists() and not (base / "out" / "manifest.json").exists()


@pytest.mark.parametrize("name", [".x.partial", ".x.old", ".partial", ".complete"])
def test_our_own_names_are_no_places_for_data(tmp_path, capsys, name):
    assert run(tmp_path / name, write_input(tmp_path / "source.jsonl", 1)) == 1
    one_error(capsys, "change --out")
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("where", NEEDED)
def test_a_folder_of_others_with_the_name_of_our_file_is_not_removed(place, old, capsys, where):
    thesis = place / where / "tokenizer.model" / "thesis.txt"
    thesis.parent.mkdir(parents=True)
    thesis.write_text("mine")
    assert run(place / "out", old) == 1
    one_error(capsys, "tokenizer.model", "did not write")
    assert thesis.read_text() == "mine"


@pytest.mark.parametrize("name", [".partial", ".complete", "lost+found/thesis.txt"])
def test_what_goes_with_a_folder_that_is_swapped_is_looked_at_too(place, old, capsys, name):
    mine = place / "out" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    assert run(place / "out", old) == 1
    one_error(capsys, Path(name).parts[0], "did not write")
    assert mine.read_text() == "mine"


def test_a_manifest_makes_no_file_ours(place, old, capsys):
    (place / "out").mkdir()
    (place / "out" / "thesis.txt").write_text("mine")
    (place / "out" / "manifest.json").write_text(json.dumps({
        "format": 1, "identity": "", "tokenizer": {"file": "thesis.txt", "sha256": ""}, "splits": {}}))
    assert run(place / "out", old) == 1
    one_error(capsys, "thesis.txt", "did not write")
    assert (place / "out" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("older", ['["thesis.txt"]', "no JSON", "3"])
def test_a_list_of_older_files_removes_only_ours(place, old, capsys, older):
    (place / "out" / ".complete").mkdir(parents=True)
    (place / "out" / ".complete" / "obsolete.json").write_text(older)
    (place / "out" / "thesis.txt").write_text("mine")
    assert run(place / "out", old) == 1
    one_error(capsys, "not w" if older[0] != "[" else "thesis.txt")
    assert (place / "out" / "thesis.txt").read_text() == "mine"


def test_what_others_put_into_the_folder_that_is_built_in_stays(place, old, monkeypatch, capsys):
    """Also when that happens after all that is looked at before."""
    real = prepare.encode

    def encode(*arguments):
        (place / ".out.partial" / "thesis.txt").write_text("mine")
        raise DataError("some error")

    monkeypatch.setattr(prepare, "encode", encode)
    assert run(place / "out", old) == 1
    assert os.listdir(place / ".out.partial") == ["thesis.txt"]
    monkeypatch.setattr(prepare, "encode", real)
    capsys.readouterr()
    assert run(place / "out", old) == 1
    one_error(capsys, "thesis.txt", "did not write")


def test_a_folder_that_comes_after_the_first_look_is_looked_at(place, capsys):
    ours = places.Place(place / "out")
    (place / ".out.partial").mkdir()
    (place / ".out.partial" / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="thesis.txt"):
        ours.begin()
    ours.close()
    assert (place / ".out.partial" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("where", NEEDED)
def test_an_input_in_a_folder_that_is_cleared_is_refused(place, where):
    """Also one whose name is ours."""
    (place / where).mkdir(parents=True)
    model = place / where / "tokenizer.model"
    model.write_text("mine")
    with pytest.raises(DataError, match="needed to build in; move it away"):
        places.Place(place / "out", [model])
    assert model.read_text() == "mine"


@pytest.mark.parametrize(("name", "message"), [
    ("g\u00e4".encode(), "this locale cannot spell the name; set LC_ALL=C.UTF-8"), (b"g\xff", "the name is not UTF-8")])
def test_a_name_that_the_locale_cannot_spell_is_not_called_damaged(place, old, name, message):
    command = [*PROGRAM, *OPTIONS, "--input", str(old), "--out"]
    env = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([*command, os.fsencode(place) + b"/" + name], env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert os.listdir(place) == []


def test_errors_and_progress_do_not_go_to_stdout_when_stderr_is_closed(place, monkeypatch, capsys):
    done = subprocess.run(["bash", "-c", '"$@" 2>&-', "bash", sys.executable, str(ROOT / "data" / "prepare.py"),
                           *OPTIONS, "--input", str(place / "none.txt"), "--out", str(place / "out")],
                          stdout=subprocess.PIPE, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    monkeypatch.setattr(sys, "stderr", None)
    progress = messages.Progress()
    progress.last -= 60
    progress.show("reading", 1)
    assert capsys.readouterr().out == ""
