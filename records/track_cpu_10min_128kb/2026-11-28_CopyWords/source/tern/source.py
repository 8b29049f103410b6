"""The program's own files: which they are, and the one file that they compress to, as a referee weighs code.

The list is not written down anywhere: it is what the programs import, and what that imports, among the files here.
"""

from __future__ import annotations

import ast
import base64
import functools
import hashlib
import json
import lzma
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from tern.errors import Foreseen

PROGRAMS = ("train_gpt.py", "eval_bpb.py", "pack.py")
# What a submission does without: functions import it, and say so where it is not.
APART = {"tern.conversions"}
MAX_SOURCE, MAX_SOURCES = 1 << 20, 1 << 22  # bytes of one module, and of all

# Of LZMA2's settings these were the smallest on our sources, by 0.3%. The dictionary covers them.
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": MAX_SOURCES, "pb": 0}]

# No double quote after the sources (base 85 has none), so that the line in the docstring finds them.
HEAD = r'''"""A ternary GPT under a byte budget: training, the artifact and its score in one file.

    python train_gpt.py --help                            # train: every setting
    python train_gpt.py eval_bpb model.tern --data DIR    # score an artifact
    python train_gpt.py pack inspect model.tern           # what its bytes are spent on

Read source/ beside this file instead. This is what it compresses to, made by tern/source.py: comments and docstrings
dropped, JSON of module name to text, xz, base 85. To print the modules without running them:

    python -c "import base64, json, lzma; text = open('train_gpt.py').read().split(chr(34))[-2]; \
    print(*json.loads(lzma.decompress(base64.b85decode(text))).values(), sep=chr(10))"
"""
import base64
import json
import linecache
import lzma
import sys
import types

SOURCES = "'''
TAIL = '''"
for name, source in json.loads(lzma.decompress(base64.b85decode(SOURCES))).items():
    module = sys.modules[name] = types.ModuleType(name)  # before it runs: dataclasses look their module up
    module.__file__ = __file__
    if '.' in name:
        setattr(sys.modules[name.split('.')[0]], name.split('.')[1], module)
    path = f'{__file__}/{name}.py'
    linecache.cache[path] = len(source), None, source.splitlines(True), path  # for inspect, traceback
    exec(compile(source, path, 'exec'), module.__dict__)
if __name__ == '__main__':
    program = sys.argv.pop(1) if sys.argv[1:2] and sys.argv[1] in ('eval_bpb', 'pack') else 'train_gpt'
    sys.exit(sys.modules[program].main())
'''


class SourceError(Foreseen):
    """Sources, or the one file made of them, that cannot be used; the message says what, where and what to do."""


def in_bundle() -> bool:
    """Whether this module runs from the one file of a submission and not from its own."""
    return Path(__file__).name != "source.py"


def command_of(program: str) -> list[str]:
    """Script and arguments that run "train_gpt", "eval_bpb" or "pack" in a fresh process, from a bundle too."""
    if in_bundle():
        return [str(Path(__file__).resolve()), program]
    return [str(root() / f"{program}.py")]


def root() -> Path:
    """The folder of the programs."""
    return Path(__file__).resolve().parents[0 if in_bundle() else 1]


def module_name(file: str) -> str:
    """tern/metric.py -> tern.metric, tern/__init__.py -> tern."""
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imported(source: bytes, where: str, inside: bool = True) -> set[str]:
    """Names of the modules, and of what is taken from them, that a source imports; inside: in functions too.

    Raises SourceError unless it is Python.
    """
    outside, everywhere = imports(source, where)
    return set(everywhere if inside else outside)


@functools.lru_cache(maxsize=256)
def imports(source: bytes, where: str) -> tuple[frozenset[str], frozenset[str]]:
    """imported() at the top level, and everywhere."""
    tree = parse(source, where)
    found: tuple[set[str], set[str]] = set(), set()
    for names, nodes in zip(found, (tree.body, statements(tree)), strict=True):
        for node in nodes:
            if isinstance(node, ast.Import):
                names.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module)
                names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return frozenset(found[0]), frozenset(found[1])


def parse(source: bytes, where: str) -> ast.Module:
    """The syntax tree of a module of reasonable size. Raises SourceError."""
    try:
        if len(source) > MAX_SOURCE:
            raise ValueError(f"{len(source):,} bytes, at most {MAX_SOURCE:,} are read")
        return ast.parse(source.decode())
    except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
        raise SourceError(f"{where}: not a Python module ({e})") from None


def statements(tree: ast.Module) -> Iterator[ast.AST]:
    """All statements, and what statements are in: ast.walk without the expressions, which are most of what there is."""
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        yield node
        for field in ("body", "orelse", "finalbody", "handlers", "cases"):
            pending += getattr(node, field, ())


def needed_by(programs: Iterable[str], read: Callable[[str], bytes | None]) -> tuple[str, ...]:
    """The programs and the files that they import, and what these import, also inside functions, but APART; sorted.

    read: file name -> its bytes, or None where there is none: what is not among the files is a library's. Raises
    SourceError.
    """
    texts: dict[str, bytes | None] = {}
    pending = list(programs)
    while pending:
        file = pending.pop()
        texts[file] = read(file)
        if texts[file] is None:
            continue
        for name in imported(texts[file], file) - APART:
            path = name.replace(".", "/")
            pending += [other for other in (f"{path}.py", f"{path}/__init__.py") if other not in texts]
    return tuple(sorted(file for file, text in texts.items() if text is not None))


def read_file(name: str) -> bytes | None:
    """The bytes of a file below root(); None where there is none."""
    path = root() / name
    return path.read_bytes() if path.is_file() else None


@functools.cache
def code_files() -> tuple[str, ...]:
    """The files, relative to root(), that training, packing and scoring need beside libraries; sorted.

    In a bundle that is the one file that it is.
    """
    if in_bundle():
        return (Path(__file__).name,)
    return needed_by(PROGRAMS, read_file)


def read_sources() -> dict[str, bytes]:
    """File name -> bytes of code_files(), as they are now."""
    return {name: (root() / name).read_bytes() for name in code_files()}


def in_order(sources: Mapping[str, bytes]) -> list[str]:
    """Names of the source files, each after those that it imports when it is loaded. Raises SourceError."""
    files, order = {module_name(name): name for name in sorted(sources)}, []

    def visit(module: str, above: tuple[str, ...]) -> None:
        if files[module] in order or module in above:
            return
        needed = imported(sources[files[module]], files[module], inside=False)
        if "." in module:
            needed.add(module.split(".")[0])
        for name in sorted(needed & files.keys()):
            visit(name, (*above, module))
        order.append(files[module])

    for module in files:
        visit(module, ())
    return order


def strip(source: bytes, where: str) -> str:
    """A module's text without comments and docstrings; its own docstring stays, --help prints it.

    Raises SourceError unless it is Python of a reasonable size.
    """
    tree = parse(source, where)
    for node in statements(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    try:
        return ast.unparse(tree)
    except (ValueError, RecursionError, MemoryError) as e:
        raise SourceError(f"{where}: not a Python module ({e})") from None


def strip_modules(sources: Mapping[str, bytes]) -> dict[str, str]:
    """Module name -> stripped text, in order of dependence. sources: file name -> bytes. Raises SourceError."""
    return {module_name(name): strip(sources[name], name) for name in in_order(sources)}


def compress(sources: Mapping[str, bytes]) -> bytes:
    """The sources (file name -> bytes) as the one file holds them, in base 85. The same bytes for the same sources, on
    one version of Python and liblzma. Raises SourceError."""
    text = json.dumps(strip_modules(sources), ensure_ascii=False).encode()
    data = lzma.compress(text, format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC32, filters=FILTERS)
    return base64.b85encode(data)


def one_file(sources: Mapping[str, bytes]) -> bytes:
    """The one file that the sources (file name -> bytes) compress to. Raises SourceError."""
    return HEAD.encode() + compress(sources) + TAIL.encode()


def code_bytes(sources: Mapping[str, bytes] | None = None) -> int:
    """Bytes of code, as a referee counts them: of the one file. sources: of a run (default: as they are now)."""
    sources = read_sources() if sources is None else sources
    if in_bundle():
        return sum(map(len, sources.values()))
    return len(one_file(sources))


def take_apart(program: bytes) -> tuple[str, bytes]:
    """(sha256 of all that is around the sources, the sources in base 85) of a one file. Raises SourceError."""
    mark = HEAD.splitlines()[-1].encode()
    begin = program.find(mark) + len(mark)
    end = program.find(b'"', begin)
    if begin < len(mark) or end < 0:
        raise SourceError("train_gpt.py: holds no sources, as the one that records/bundle.py writes does")
    return hashlib.sha256(program[:begin] + program[end:]).hexdigest(), program[begin:end]


FRAME = take_apart((HEAD + TAIL).encode())[0]  # of what one_file makes


def unpack(packed: bytes) -> bytes:
    """The JSON of module name -> text, without running any of it, of what compress() gave. Raises SourceError."""
    try:
        decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=1 << 26)
        text = decoder.decompress(base64.b85decode(packed), MAX_SOURCES)
        if not decoder.eof or decoder.unused_data:
            raise ValueError(f"not one stream of at most {MAX_SOURCES:,} bytes")
        return text
    except (ValueError, lzma.LZMAError) as e:
        raise SourceError(f"train_gpt.py: its sources cannot be unpacked ({e})") from None
