"""The folder that data/prepare.py writes: where it may stand, its locks, the one step that replaces it, signals."""

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

from data.messages import say
from tern.files import folder_identity, sha256_file
from tern.shards import DataError

LOST_AND_FOUND = "lost+found"  # stands in the root of a file system
INNER_PARTIAL, INNER_COMPLETE = ".partial", ".complete"
OBSOLETE = "obsolete.json"  # in INNER_COMPLETE: the files of the older folder
# Every name that this program writes into a folder that it builds.
OWN_NAMES = re.compile(r"(documents|pieces)\.spool|tokenizer\.model|manifest\.json|[^/]+_(train|val)_\d{6,}\.bin|"
                       + re.escape(OBSOLETE))
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(BaseException):
    """A signal asked this process to end; the argument is its number."""


def stop(number: int, frame: object) -> None:
    """Signal handler: end through every cleanup, which no second signal may cut short."""
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    raise Stopped(number)


@contextlib.contextmanager
def handlers(handler: object) -> Iterator[None]:
    """Give the signals that end a process this handler for a while; one that is ignored (nohup) stays so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, old in before.items():
        if old not in (signal.SIG_IGN, None):
            signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            if old not in (signal.SIG_IGN, None):
                signal.signal(number, old)


def file_hashes(manifest: dict) -> dict[str, str]:
    shards = [shard for split in manifest["splits"].values() for shard in split["shards"]]
    return {entry["file"]: entry["sha256"] for entry in [manifest["tokenizer"], *shards]}


def up_to_date(out: Path, request: dict) -> bool:
    """True when the folder was written for this very request and every file still has its hash."""
    try:
        manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
        if any(manifest[key] != value for key, value in request.items()):
            return False
        hashes = file_hashes(manifest)
        if manifest["identity"] != folder_identity(hashes):
            return False
        for name, expected in hashes.items():
            if sha256_file(out / name) != expected:
                say(f"{out / name} was changed since it was written; building again")
                return False
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return True


def written_files(folder: Path) -> set[str]:
    """The files that the folder's manifest says this program wrote, with the manifest; empty without a manifest."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if not {"format", "identity", "splits"} <= manifest.keys():
            return set()
        names = {"manifest.json", *file_hashes(manifest)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()
    return {name for name in names if isinstance(name, str) and OWN_NAMES.fullmatch(name)}


def stranger(folder: Path, kept: set[str]) -> str:
    """Something in the folder that this program did not write, so that the folder is not replaced; empty if none.

    kept: names that a replacement leaves alone.
    """
    return min(set(os.listdir(folder)) - written_files(folder) - kept, default="")


def own_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """What a folder that is built in holds: the files that have this program's names, and all the rest."""
    own, rest = [], []
    for path in sorted(folder.iterdir()):
        is_own = OWN_NAMES.fullmatch(path.name) and path.is_file() and not path.is_symlink()
        (own if is_own else rest).append(path)
    return own, rest


def refuse_strangers(folder: Path) -> None:
    """Raises DataError if a folder that a dead process seems to have left holds what this program does not write."""
    if rest := own_files(folder)[1]:
        raise DataError(f"{folder} holds {rest[0].name}, which this program did not write, and is needed to build in; "
                        "move it away or change --out")


def sibling(out: Path, kind: str) -> Path:
    """`.NAME.kind` beside the folder, or a short name where that would be too long for a file system."""
    name = f".{out.name}.{kind}"
    if len(os.fsencode(name)) > 255:
        name = f".{hashlib.sha256(os.fsencode(out.name)).hexdigest()[:32]}.{kind}"
    return out.parent / name


def sync(path: Path) -> None:
    """Wait until a file, or the list of a folder's files, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_durable(folder: Path) -> None:
    """Wait until the folder and its files are on the disk."""
    for path in [*folder.iterdir(), folder]:
        sync(path)


def remove_folder(folder: Path) -> None:
    """Remove a folder and the files of this program in it, also where its mode forbids that; others keep theirs."""
    with contextlib.suppress(OSError):
        folder.chmod(0o700)
    with contextlib.suppress(OSError):
        for path in own_files(folder)[0]:
            with contextlib.suppress(OSError):
                path.unlink()
        folder.rmdir()


def exchange(first: Path, second: Path) -> bool:
    """Swap two folders in one step. False where the system or the file system cannot; raises OSError otherwise."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of Linux
    if rename(here, os.fsencode(first), here, os.fsencode(second), swap) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(second))


class Place:
    """The output folder: where it is built, who may write to it, and the one step that makes it the new one.

    An ordinary folder is built beside itself and swapped. A mount point, the current directory (or one above it) and
    a folder whose parent cannot be written cannot be renamed: there the new files are built in OUT/.partial, which
    becomes OUT/.complete in one step, and are then moved up; a later run finishes that if it was cut short. Between
    those moves a reader finds files that are not the manifest's, an error, and never a smaller data set.

    A process holds a lock on every folder it works on, which the system drops when the process ends. Raises DataError
    where the folder cannot be written, is another process's, or holds what this program did not write, and where a
    file of `inputs` lies in a folder that is cleared before it is read.
    """

    def __init__(self, out: Path, inputs: Iterable[Path] = ()) -> None:
        try:
            self.out = out.resolve()
            str(self.out).encode("utf-8")
            exists = self.out.exists() or self.out.is_symlink()
            if exists and not self.out.is_dir():
                raise DataError(f"{out} exists and is not a folder, so it is not replaced; remove it or change --out")
        except UnicodeEncodeError:
            try:
                os.fsencode(self.out).decode("utf-8")
            except UnicodeDecodeError:
                raise DataError(f"{out}: the name is not UTF-8, so the tokenizer's library cannot open files in it; "
                                "change --out") from None
            raise DataError(f"{out}: this locale cannot spell the name; set LC_ALL=C.UTF-8, or change --out") from None
        except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
            raise DataError(f"{out} cannot be a folder ({reason_of(error)}); change --out") from None
        if re.fullmatch(r"(?s)\..+\.(partial|old)", self.out.name) or self.out.name in (INNER_PARTIAL, INNER_COMPLETE):
            raise DataError(f"{out}: such a name is this program's own, for folders that it builds in; change --out")
        self.partial, self.made, self.locks = None, [], {}
        self.beside, self.old = sibling(self.out, "partial"), sibling(self.out, "old")
        try:
            self.refuse_inputs(inputs)
            self.recover()
        except OSError as error:
            self.close()
            raise DataError(f"{self.out} cannot be used ({reason_of(error)}); change --out") from None
        except BaseException:
            self.close()
            raise

    def refuse_inputs(self, inputs: Iterable[Path]) -> None:
        """Raises DataError for an input in a folder that is cleared or filled."""
        folders = (self.beside, self.old, self.out / INNER_PARTIAL, self.out / INNER_COMPLETE)
        for path in inputs:
            if folder := next((folder for folder in folders if path.resolve().is_relative_to(folder)), None):
                raise DataError(f"{path} lies in {folder}, which is needed to build in; move it away or change --out")

    def check(self, inside: bool) -> None:
        """Raises DataError for a folder that holds something else than ours; one that is not renamed may hold
        lost+found, and what is built inside."""
        kept = {LOST_AND_FOUND} if inside else set()
        if self.partial == self.out / INNER_PARTIAL:
            kept.add(INNER_PARTIAL)
        if self.out.is_dir() and (name := stranger(self.out, kept)):
            raise DataError(f"{self.out} exists and holds {name}, which this program did not write, so it is not "
                            "replaced; move that away or change --out")

    def hold(self, folder: Path) -> None:
        """Lock a folder until close(). Raises DataError if another process has."""
        while folder not in self.locks:
            try:
                handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            except FileNotFoundError:
                return  # its process ended just now
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(handle)
                raise DataError(f"another process is preparing {self.out}; wait until it has ended or change "
                                "--out") from None
            except OSError:
                pass  # a network file system that cannot lock folders
            with contextlib.suppress(OSError):
                if os.path.samestat(os.fstat(handle), os.stat(folder)):
                    self.locks[folder] = handle
                    return
            os.close(handle)  # swapped or removed since it was opened: lock what stands there now

    def recover(self) -> None:
        """Finish or clear what a process that died here left."""
        inner, complete = self.out / INNER_PARTIAL, self.out / INNER_COMPLETE
        left = [path for path in (self.beside, self.old, inner, complete) if path.is_dir()]
        if not left:
            return
        for folder in ([self.out] if self.out.is_dir() else []) + left:
            self.hold(folder)
        for folder in left:
            if folder.is_dir():  # its process may just have ended
                refuse_strangers(folder)
        if complete.is_dir():
            say(f"finishing what an earlier run had completed in {self.out}")
            with handlers(signal.SIG_IGN):
                move_up(self.out)
        if self.old.is_dir() and not self.out.exists() and written_files(self.old):
            self.old.rename(self.out)
        for folder in (self.beside, self.old, inner):
            if folder.is_dir():
                remove_folder(folder)
            self.unlock(folder)

    def begin(self) -> None:
        """Make and lock the empty folder that is built in."""
        try:
            self.recover()  # again, because another process may have come and died meanwhile
            if self.out.is_dir():
                self.hold(self.out)
            inside = self.out.is_dir() and (os.path.ismount(self.out) or is_above_here(self.out))
            self.check(inside)
            if not inside:
                try:
                    self.make(self.beside)
                except OSError as error:
                    if not self.out.is_dir() or error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                        raise
                    inside = True
            if inside:
                self.make(self.out / INNER_PARTIAL)
        except OSError as error:
            raise DataError(f"{self.out} cannot be written ({reason_of(error)}); change --out or its "
                            "permissions") from None

    def check_space(self, need: int) -> None:
        """Raises DataError where less than `need` bytes are free."""
        free = shutil.disk_usage(self.partial).free
        if free < need:
            raise DataError(f"{self.out}: the disk has {free:,} bytes free and this needs at least {need:,}; free some "
                            "or change --out")

    def make(self, partial: Path) -> None:
        """Make and lock an empty folder; what a dead process left in it goes. Raises DataError if others use it."""
        for folder in reversed([folder for folder in partial.parents if not folder.exists()]):
            folder.mkdir(exist_ok=True)
            self.made.append(folder)
        while partial not in self.locks:
            partial.mkdir(exist_ok=True)
            self.hold(partial)
        refuse_strangers(partial)
        self.partial = partial
        for path in partial.iterdir():
            path.unlink()

    def commit(self) -> None:
        """Put the new folder in the place of the old one."""
        self.check(inside=self.partial.parent == self.out)
        make_durable(self.partial)
        if self.partial.parent != self.out:
            try:
                with handlers(signal.SIG_IGN):
                    self.swap()
                return
            except OSError as error:
                if not self.out.is_dir() or error.errno not in (errno.EBUSY, errno.EXDEV, errno.EPERM, errno.EACCES):
                    raise
            # A mount of the same file system, or a parent whose folders belong to their owners: known only now.
            outside = self.partial
            self.make(self.out / INNER_PARTIAL)
            for path in outside.iterdir():
                shutil.copyfile(path, self.partial / path.name)
            remove_folder(outside)
            make_durable(self.partial)
        with handlers(signal.SIG_IGN):
            obsolete = sorted(written_files(self.out) - {"manifest.json"})
            (self.partial / OBSOLETE).write_text(json.dumps(obsolete), encoding="utf-8")
            make_durable(self.partial)
            self.partial.rename(self.out / INNER_COMPLETE)
            move_up(self.out)

    def swap(self) -> None:
        if not self.out.is_dir():
            self.partial.rename(self.out)
        else:
            self.partial.chmod(self.out.stat().st_mode & 0o7777)
            if not exchange(self.partial, self.out):
                # A process that dies between the two leaves none at `out`; the next one puts the old one back.
                self.out.rename(self.old)
                try:
                    self.partial.rename(self.out)
                except OSError:
                    self.old.rename(self.out)
                    raise
                remove_folder(self.old)
        sync(self.out.parent)

    def unlock(self, folder: Path) -> None:
        if folder in self.locks:
            os.close(self.locks.pop(folder))

    def close(self) -> None:
        """Remove what is not the new folder, and let others in."""
        with handlers(signal.SIG_IGN):
            if self.partial is not None:
                remove_folder(self.partial)
            for folder in reversed(self.made):
                with contextlib.suppress(OSError):  # those above a new folder are not empty
                    folder.rmdir()
            for folder in list(self.locks):
                self.unlock(folder)


def move_up(out: Path) -> None:
    """Move the files of OUT/.complete up and remove the older ones. Can be cut short anywhere and called again.

    The manifest goes first: until the last file has followed, the folder has files that are not the manifest's.
    """
    complete = out / INNER_COMPLETE
    names, older = set(os.listdir(complete)), []
    try:
        if names:
            older = [str(name) for name in json.loads((complete / OBSOLETE).read_text(encoding="utf-8"))]
    except (FileNotFoundError, ValueError, TypeError):
        raise DataError(f"{complete} was not written by this program; move it away or change --out") from None
    for name in sorted(names - {OBSOLETE}, key=lambda name: (name != "manifest.json", name)):
        os.replace(complete / name, out / name)
    if OBSOLETE in names:
        written = written_files(out)
        for name in older:
            if name not in written and OWN_NAMES.fullmatch(name):
                (out / name).unlink(missing_ok=True)
        sync(out)
        (complete / OBSOLETE).unlink()
    complete.rmdir()


def is_above_here(folder: Path) -> bool:
    """Whether the current directory is the folder or lies in it, so that swapping it would leave us in the old one."""
    try:
        return Path.cwd().resolve().is_relative_to(folder)
    except OSError:  # it was removed
        return False


def reason_of(error: Exception) -> str:
    """What the system says, in its own words and with the path it says it of."""
    strerror, name = getattr(error, "strerror", None), getattr(error, "filename", None)
    return f"{strerror}: {os.fspath(name)}" if strerror and name else strerror or str(error) or type(error).__name__
