"""Programs of others, read and never run: what they import and call, and what is packed inside of them."""

from __future__ import annotations

import ast
import base64
import binascii
import bz2
import lzma
import platform
import re
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from tern.source import MAX_SOURCE, MAX_SOURCES

NETWORK = {"socket", "ssl", "urllib", "http", "requests", "huggingface_hub", "ftplib", "smtplib", "httpx", "aiohttp"}
PICKLE = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
DYNAMIC = {"importlib", "imp", "runpy"}
# Our own programs have no use for these; those of others may.
SPEAKING = NETWORK | {"asyncio", "socketserver", "telnetlib", "urllib3", "websockets", "xmlrpc"}
ELSEWHERE = "torch.hub", "multiprocessing.connection"
PICKLE_CALLS = {"torch.load", "torch.save", "pandas.read_pickle", "torch.hub.load", "pd.read_pickle"}
DYNAMIC_CALLS = {"__import__", "exec", "eval", "compile"}


def dotted(node: ast.expr) -> str:
    """a.b.c as it is written; empty for anything else."""
    if isinstance(node, ast.Attribute):
        left = dotted(node.value)
        return f"{left}.{node.attr}" if left else ""
    return node.id if isinstance(node, ast.Name) else ""


def forbidden(tree: ast.AST) -> Iterator[str]:
    """What a module imports or calls for network, pickle or code from elsewhere; what it builds up is not found."""
    for node in fetching_commands(tree):
        yield f"line {node.lineno} starts a command that fetches"
    for node in ast.walk(tree):
        imported = []
        if isinstance(node, ast.Import):
            imported = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imported = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in imported:
            root = name.split(".")[0]
            if root in SPEAKING | PICKLE | DYNAMIC or name in PICKLE_CALLS or name.startswith(ELSEWHERE):
                yield f"line {node.lineno} imports {name}"
        if isinstance(node, ast.Call):
            name = dotted(node.func)
            unpickles = any(k.arg == "allow_pickle" and getattr(k.value, "value", True) is not False
                            for k in node.keywords)
            if name in PICKLE_CALLS | DYNAMIC_CALLS or unpickles:
                yield f"line {node.lineno} calls {name or 'a function'}{' with allow_pickle' if unpickles else ''}"


# ---------------------------------------------------------------------------------------------------------------
# A file of a program, as it lies and unpacked
# ---------------------------------------------------------------------------------------------------------------


PYTHON = ".".join(platform.python_version_tuple()[:2])


class Unreadable(ValueError):
    """A file that is no Python of a reasonable size; the message says why."""


def parse(source: bytes) -> ast.Module:
    """The syntax tree, by the encoding that the source declares. Raises Unreadable."""
    if len(source) > MAX_SOURCE:
        raise Unreadable(f"{len(source):,} bytes, at most {MAX_SOURCE:,} are read")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes that a later Python refuses
            return ast.parse(source)
    except SyntaxError as e:
        raise Unreadable(f"line {e.lineno}: {e.msg}") from None
    except (ValueError, RecursionError, MemoryError) as e:
        raise Unreadable(str(e) or type(e).__name__) from None


@dataclass(frozen=True)
class Opened:
    """What a Python file holds: of a packed one the program inside."""

    text: bytes
    packed: str = ""  # how it is packed, as "base 85, xz"; empty if it is not
    fault: str = ""  # why it cannot be parsed
    tree: ast.Module | None = None


@dataclass(frozen=True)
class Program:
    """A Python file. It is opened when something of it is asked for: folders have dozens that nobody asks about."""

    name: str
    data: bytes  # as it lies there

    @property
    def size(self) -> int:
        return len(self.data)

    @cached_property
    def opened(self) -> Opened:
        """Nothing of it is run. What is packed in it is unpacked, once."""
        try:
            tree = parse(self.data)
        except Unreadable as e:
            return Opened(self.data, fault=str(e))
        found = unpacked(tree)
        if found is None:
            return Opened(self.data, tree=tree)
        packed, text = found
        try:
            return Opened(text, packed, tree=parse(text))
        except Unreadable as e:
            return Opened(text, packed, f"what is packed in it: {e}")

    @property
    def text(self) -> bytes:
        return self.opened.text

    @property
    def packed(self) -> str:
        return self.opened.packed

    @property
    def tree(self) -> ast.Module | None:
        return self.opened.tree

    @property
    def shown(self) -> str:
        """Its name, for a line number in it."""
        return f"{self.name} (unpacked)" if self.packed else self.name

    @cached_property
    def lines(self) -> list[str]:
        return self.text.decode(errors="replace").splitlines()

    def quote(self, node: ast.AST) -> str:
        """What is written at a node, cut: minified files have long lines."""
        line = self.lines[node.lineno - 1] if node.lineno <= len(self.lines) else ""
        return line.encode()[node.col_offset:].decode(errors="replace").strip()[:100]


PACKED_FROM = 1000  # characters of a string that may hold a program
DECODERS: dict[str, Callable[[bytes], bytes]] = {
    "base 85": base64.b85decode, "base 64": lambda data: base64.b64decode(data, validate=True),
    "ASCII 85": base64.a85decode, "bytes": bytes,
}


def unpack_lzma(data: bytes) -> bytes:
    return lzma.LZMADecompressor(memlimit=1 << 28).decompress(data, MAX_SOURCES)


def unpack_raw_lzma(data: bytes) -> bytes:
    decoder = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "preset": 6}])
    return decoder.decompress(data, MAX_SOURCES)


EXPANDERS: dict[str, Callable[[bytes], bytes]] = {
    "xz": unpack_lzma, "raw LZMA": unpack_raw_lzma,
    "zlib": lambda data: zlib.decompressobj(zlib.MAX_WBITS | 32).decompress(data, MAX_SOURCES),  # gzip too
    "bzip2": lambda data: bz2.BZ2Decompressor().decompress(data, MAX_SOURCES),
}


def unpacked(tree: ast.Module) -> tuple[str, bytes] | None:
    """(how, the program) of a file that holds another one, compressed in a string, and little else."""
    strings = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)
               and isinstance(node.value, str | bytes) and len(node.value) >= PACKED_FROM]
    for value in sorted(strings, key=len, reverse=True)[:3]:
        data = value.encode(errors="replace") if isinstance(value, str) else value
        for coding, decode in DECODERS.items():
            try:
                raw = decode(data)
            except (ValueError, binascii.Error):
                continue
            for packing, expand in EXPANDERS.items():
                try:
                    text = expand(raw)
                    text.decode()
                except (ValueError, EOFError, OSError, lzma.LZMAError, zlib.error):
                    continue
                if len(text) > len(raw) and re.search(rb"\b(import|def)\b", text):
                    return f"{coding}, {packing}", text
    return None


def imports_of(tree: ast.AST) -> Iterator[tuple[ast.stmt, str]]:
    """(statement, module) of every import, also inside functions; of `from a import b` a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name
        elif isinstance(node, ast.ImportFrom):
            if node.module:
                yield node, node.module
            for alias in node.names:
                yield node, f"{node.module}.{alias.name}" if node.module else alias.name


def needed(main: str, programs: Mapping[str, Program]) -> list[str]:
    """The main program's file and the files beside it that it imports, and what these import."""
    found, pending = [], [main]
    while pending:
        name = pending.pop()
        if name in found:
            continue
        found.append(name)
        tree = programs[name].tree
        folder = name.rpartition("/")[0]
        for _, module in imports_of(tree) if tree else ():
            path = module.replace(".", "/")
            pending += [file for at in dict.fromkeys((folder, "")) for file in
                        (f"{at}/{path}.py".lstrip("/"), f"{at}/{path}/__init__.py".lstrip("/")) if file in programs]
    return found


# ---------------------------------------------------------------------------------------------------------------
# What a program does that a referee asks about. Each gives nodes to be quoted; what is built up is not found
# ---------------------------------------------------------------------------------------------------------------

FETCHES = re.compile(r"\b(pip3? install|curl|wget|git clone)\b|\bpip\b.*\binstall\b")
PORTS_ONLY = {"socket"}  # of which distributed programs use ports of their own machine


def network_uses(tree: ast.AST) -> Iterator[ast.AST]:
    """Imports of what speaks to other machines, and commands that fetch."""
    for node, module in imports_of(tree):
        root = module.split(".")[0]
        if root in NETWORK - PORTS_ONLY and module not in ("urllib.parse", "http.HTTPStatus"):
            yield node
    yield from fetching_commands(tree)


def fetching_commands(tree: ast.AST) -> Iterator[ast.Call]:
    """Calls that start a program which fetches, as far as its words are in the call."""
    for node in ast.walk(tree):
        starts = isinstance(node, ast.Call) and dotted(node.func).startswith(("subprocess.", "os.system", "os.popen"))
        if starts and FETCHES.search(constants(node)):
            yield node


def pickle_uses(tree: ast.AST) -> Iterator[ast.AST]:
    """Calls that unpickle whatever a file holds; torch.load only where it says so (since PyTorch 2.6 it does not)."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        given = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
        loads = name.split(".")[0] in PICKLE and name.rpartition(".")[2] in ("load", "loads", "Unpickler")
        if loads or (name == "torch.load" and given.get("weights_only", True) is False):
            yield node


def constants(node: ast.AST) -> str:
    """All strings below a node."""
    return " ".join(part.value for part in ast.walk(node)
                    if isinstance(part, ast.Constant) and isinstance(part.value, str))


VALIDATION = re.compile(r"fineweb_val|_val_|val_\*")


def validation_in_training(tree: ast.AST) -> Iterator[ast.AST]:
    """Where a name of training files is given a pattern of validation shards."""
    for node in ast.walk(tree):
        pairs: list[tuple[str, ast.AST]] = []
        if isinstance(node, ast.Assign):
            pairs = [(dotted(target), node.value) for target in node.targets if isinstance(target, ast.expr)]
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            pairs = [(dotted(node.target), node.value)]
        elif isinstance(node, ast.keyword) and node.arg:
            pairs = [(node.arg, node.value)]
        for name, value in pairs:
            name = name.rpartition(".")[2].lower()
            if re.search(r"train.*(files|pattern|glob|shards|path)", name) and "val" not in name and (
                    VALIDATION.search(constants(value))):
                yield value


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    yield from (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def words(node: ast.AST) -> set[str]:
    """Every name, attribute and argument below a node, in lower case."""
    found = set()
    for part in ast.walk(node):
        for key in ("id", "attr", "arg"):
            value = getattr(part, key, None)
            if isinstance(value, str):
                found.add(value.lower())
    return found


SCORES = re.compile(r"loss_sum|nll|bpb|byte_count|byte_sum|token_count|total_loss|loss_total|val_loss|scored")
TRAINS = re.compile(r"train_loader|loader$|next_batch|train_files|train_batch|train_stream|train_tokens|"
                    r"distributedtoken|shuffledsequence")


def unscored_adaptation(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    """Functions that take the validation tokens and train on them, and keep no score while they do."""
    called = {dotted(node.func).rpartition(".")[2] for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in functions(tree):
        arguments = {a.arg.lower() for a in [*node.args.args, *node.args.kwonlyargs]}
        if node.name not in called or not arguments & {"val_tokens", "val_data", "valid_tokens"}:
            continue
        held = words(node)
        if {"backward", "step"} <= held and not any(SCORES.search(w) or TRAINS.search(w) for w in held):
            yield node


def byte_tables(tree: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """(where, what is wrong) in the functions that make the field's tables of bytes per SentencePiece token."""
    for node in functions(tree):
        calls = {dotted(part.func).rpartition(".")[2]: part for part in ast.walk(node) if isinstance(part, ast.Call)}
        if "id_to_piece" not in calls or not any("lead" in word for word in words(node)):
            continue
        if "is_byte" not in calls:
            yield calls["id_to_piece"], ("it does not ask is_byte: a byte-fallback piece as <0x41> is one byte and "
                                         "counts six")
        for part in ast.walk(node):
            if (isinstance(part, ast.BinOp) and isinstance(part.op, ast.Add) and isinstance(part.right, ast.Constant)
                    and part.right.value == 1 and "encode" in words(part.left) and "len" in words(part.left)):
                yield part, ("the bytes of a piece are raised by one, and the leading space is added again where it "
                             "is counted: is it counted twice?")


def tail_windows(tree: ast.AST) -> Iterator[ast.AST]:
    """Lists of sliding windows that go on after one has reached the end, each of which scores the last tokens again:
    range(0, total, stride) with no more asked than that a token is left, scored from max(length - stride, 0)."""
    from_end = any(isinstance(node, ast.Call) and dotted(node.func) == "max" and len(node.args) == 2
                   and isinstance(node.args[0], ast.BinOp) and isinstance(node.args[0].op, ast.Sub)
                   and "stride" in dotted(node.args[0].right) for node in ast.walk(tree))
    for node in ast.walk(tree):
        if not from_end or not isinstance(node, ast.ListComp) or len(node.generators) != 1:
            continue
        loop = node.generators[0]
        if (isinstance(loop.iter, ast.Call) and dotted(loop.iter.func) == "range" and len(loop.iter.args) == 3
                and "stride" in dotted(loop.iter.args[2]) and len(loop.ifs) == 1
                and "min" in words(loop.ifs[0])):
            yield node
