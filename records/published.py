"""The folder of a published submission, in the field's own layout: its logs, claims, programs, tokenizers, with where.

A folder holds README.md, submission.json, the logs of the seeds and train_gpt.py, each under any name; keys and lines
have as many spellings as authors. What is read here is what is printed: which score a log ends with, how many bytes,
steps and seconds it states, each with its file and line. Nothing of a folder is run, and all of it is hostile: it is
read up to limits (MAX_*), never through links.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from records import rules, static
from records.rules import SubmissionError

MAX_FILES, MAX_DEPTH = 2000, 16  # files and nested folders that are looked at
MAX_READ, MAX_ALL = 1 << 25, 1 << 28  # bytes of one file, and of all that is read
MAX_LINE = 2000  # characters of a log's line that are looked at


@dataclass(frozen=True)
class Place:
    """Where something is said."""

    file: str
    line: int = 0  # 0: the file as a whole

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


@dataclass(frozen=True)
class Number:
    """What a line states; digits: after the point."""

    value: float
    at: Place
    digits: int = 0
    name: str = ""

    def agrees(self, other: float, digits: int = 99) -> bool:
        """Whether the other is this number, where either may be rounded or cut to its digits."""
        return abs(self.value - other) <= 1.01 * 10.0 ** -min(self.digits, digits)


# ---------------------------------------------------------------------------------------------------------------
# Logs
# ---------------------------------------------------------------------------------------------------------------

# What a score is of: by its name and what else its line says.
RUNNING, BEFORE, CHUNKED, SLIDING, ADAPTED, OTHER = (
    "in training", "before quantization", "roundtrip", "sliding", "adapted", "other")


@dataclass(frozen=True)
class Score:
    """A score that a log prints, under the log's own name for it."""

    name: str
    kind: str
    bpb: Number
    loss: Number | None
    seconds: float | None  # of evaluation, as the line says
    stride: int | None = None
    tokens: int | None = None  # that were scored, where the line says so


@dataclass(frozen=True)
class Step:
    """A training step that was logged."""

    step: int
    seconds: float
    average: float | None  # seconds a step, as printed
    at: Place


@dataclass
class Log:
    """What one log prints."""

    name: str
    named_seed: int | None = None  # of its file's name
    says_seed: bool = False  # whether the name has the word; s2 may be a second stage
    printed_seed: Number | None = None
    scores: list[Score] = field(default_factory=list)  # every one, in order
    steps: list[Step] = field(default_factory=list)
    sizes: list[Number] = field(default_factory=list)  # bytes of model, code and total, in order
    settings: dict[str, tuple[str, Place]] = field(default_factory=dict)
    world_size: Number | None = None
    val_tokens: Number | None = None
    stopped: Number | None = None  # seconds of training, as the line says that ends it
    eval_seconds: Number | None = None  # of all evaluation, where a line says so
    printed_code: tuple[Place, str] | None = None
    numbers: dict[int, set[str]] = field(default_factory=dict)  # digits after the point -> decimals, as written
    whole: set[int] = field(default_factory=set)  # whole numbers of five digits and more

    @property
    def seed(self) -> int | None:
        return int(self.printed_seed.value) if self.printed_seed else self.named_seed

    def finals(self) -> list[Score]:
        """The last of each name that is a result: the one with most digits where a name comes twice."""
        last: dict[str, Score] = {}
        for score in self.scores:
            if score.kind in (RUNNING, OTHER):
                continue
            old = last.get(score.name)
            if (old is None or score.bpb.digits >= old.bpb.digits
                    or not old.bpb.agrees(score.bpb.value, score.bpb.digits)):
                seconds = score.seconds if score.seconds is not None or old is None else old.seconds
                stride = score.stride or (old.stride if old else None)
                tokens = score.tokens or (old.tokens if old else None)
                kind = score.kind if old is None or stride == score.stride else old.kind
                score = replace(score, kind=kind, seconds=seconds, stride=stride, tokens=tokens)
            else:
                score = replace(old, seconds=old.seconds or score.seconds)
            last.pop(score.name, None)
            last[score.name] = score
        return list(last.values())

    def last(self) -> Score | None:
        """The result that it ends with, else the last score of its training."""
        finals = [score for score in self.finals() if score.kind != BEFORE] or self.finals()
        return (finals or [s for s in self.scores if s.kind == RUNNING] or [None])[-1]

    def size(self, kind: str) -> Number | None:
        """The last bytes that it prints of "model", "code" or "total"; of the packed model where it names several."""
        found = [number for number in self.sizes if number.name == kind]
        return found[-1] if found else None

    def model(self) -> Number | None:
        """Bytes of the model that is submitted: as printed, else the total less the code."""
        model, code, total = self.size("model"), self.size("code"), self.size("total")
        if model is None and total and code and total.value > code.value:
            return Number(total.value - code.value, total.at, name="total less code")
        return model

    def holds(self, value: float, digits: int) -> bool:
        """Whether any number that it prints is this one, rounded or cut to so many digits or fewer."""
        return any(abs(float(text) - value) <= 1.01 * 10.0 ** -min(digits, places)
                   for places, texts in self.numbers.items() if places >= min(digits, 4) for text in texts)


NUMBER = r"([-+]?\d{1,6}\.\d{1,18})(?![\d%])"
PAIR = re.compile(rf"(?:val_?|q_)?loss\s*[=:]\s*{NUMBER}[\s,;|]*(?:val_?|q_)?bpb\s*[=:]\s*{NUMBER}", re.IGNORECASE)
RIAP = re.compile(rf"(?:val_?|q_)?bpb\s*[=:]\s*{NUMBER}[\s,;|(]*(?:val_?|q_)?loss\s*[=:]\s*{NUMBER}", re.IGNORECASE)
ALONE = re.compile(rf"([\w.-]{{0,60}}?)_?(?:bpb|bits per byte)(?:_exact)?\s*(?:\(([^()]{{0,40}})\))?\s*[=:]?\s*"
                   rf"{NUMBER}", re.IGNORECASE)
IS_CODE = re.compile(r"""^\s*(#|//|f?["']|\(|log\d?\(|print\(|return |def |if |assert |\|)|\bf["']|\{\w""")
STEP = re.compile(r"^\s*(?:step[:\s=]*)?(\d{1,8})/\d{1,9}\b|^\s*(?:step|iter)[:\s=]+(\d{1,8})\b", re.IGNORECASE)
TRAIN_TIME = re.compile(r"\b(?:train_)?time[:=]\s*([\d.]{1,16})\s*(ms|s|m)\b")
STEP_AVG = re.compile(r"(?:\b|_)avg[:=]\s*([\d.]{1,16})\s*ms\b")
EVAL_TIME = re.compile(r"\b(?:eval_time|elapsed|ttt_time|time)[:=]\s*([\d.]{1,16})\s*(ms|s)\b")
PASSING = re.compile(r"\d+\s*/\s*\d+|chunk|windows|running|batch|\bep(och)?\b|\bstep\b|\biter|^tt[pg]\b|\[|%|progress|"
                     r"\blayer|trial|\bat step", re.IGNORECASE)
NOT_OURS = re.compile(r"(?:^|[\W_])(delta|gain|improve\w*|gap|baseline|sota|target|previous|best|record|vs|std|diff|"
                      r"threshold|expected|degradation|cost|leader\w*|prior|margin|merged)(?:$|[\W_])", re.IGNORECASE)
IS_BEFORE = re.compile(r"pre[-_ ]?quant|post[-_ ]?(ema|swa|avg|average)|\bema\b|ema_eval|swa_eval|\braw\b|fp32|bf16|"
                       r"post_train|unquantized|\bfloat|before[-_ ]?quant|diagnostic(?! quantized)", re.IGNORECASE)
IS_ADAPTED = re.compile(r"ttt|slot|n[-_]?gram|adapt|ppm|cache|two_pass|online|knn|mixer|hedge|lora_eval|dyneval|"
                        r"dynamic|integrated|backoff|tilt", re.IGNORECASE)
IS_SLIDING = re.compile(r"slid(e|ing)|(^|_| )sw\d*(_| |$)|stride", re.IGNORECASE)
IS_CHUNKED = re.compile(r"roundtrip|quant|int\d|final|artifact|non[-_]?overlap|ternary|chunked|standard|^val$|^$",
                        re.IGNORECASE)
SIZE = re.compile(r"([A-Za-z][\w+ ()./=-]{0,60}?)\s{0,8}[:=]\s{0,8}(\d[\d,_]{3,14})(?![.\d])(\s{0,3}(?:bytes|B)\b)?")
UNIT = re.compile(r"\d\s{0,3}B\b")
PARTS = re.compile(r"(\d{5,11}) bytes \(model[:=]\s?(\d{5,11})\s+code[:=]\s?(\d{3,9})\)")  # a total and its parts
SIZES = re.compile(r"^\s*(?:model|budget)[:=](?:(\d{5,11})\s+code[:=](\d{3,9})\s+total[:=])?(\d{5,11})(?:\b|/)")
NOT_A_SIZE = re.compile(r"trial|target|limit|budget|payload|raw|baseline|est|remain|headroom|margin|cap\b|memory|"
                        r"alloc|uncompressed|param|per_|stored|token|sent|max_|needed|reserve|float|fp32|original",
                        re.IGNORECASE)
SEED = re.compile(r"(?:^|[\s,(])(?:seed|SEED)\s{0,3}[:=]\s{0,3}(\d{1,10})\b")
SEED_IN_NAME = re.compile(r"seed[_=-]?(\d{1,10})(?!\d)|(?:^|[_\W])s(\d{1,10})(?=[._-])", re.IGNORECASE)
SETTING = re.compile(r"^\s{1,8}(\w{2,40}): (\S.{0,200})$")
PREFIX = re.compile(r"^(?:\s?\[[^\[\]]{1,40}\]:?|1\d{9}\.\d{1,9}\s{1,3}|"  # a tag, seconds since 1970, or a time
                    r"\d{4}-\d\d-\d\d[ T][\d:,.]{8,16}\s{0,3}[-:]?\s{0,3})")
DECIMAL = re.compile(r"(?<![\d.])\d{1,3}\.(\d{3,18})(?!\d)")
WHOLE = re.compile(r"(?<![\d.])\d[\d,]{4,16}(?![.\d])")
COLOUR = re.compile(r"\x1b\[[0-9;]{0,12}[A-Za-z]")
SIMPLE = re.compile(r"[\w.+-]{1,40}")  # a value that can be compared
RULE = re.compile(r"^={60,}\s*$")
OWN_SETTINGS = re.compile(r"seed|^log$|every$|run_id|log_?file|path|dir$|_dir_|files|rank|artifact|^name$|data|"
                          r"output|checkpoint|timestamp", re.IGNORECASE)  # that differ between seeds of one submission


def number_of(text: str, at: Place, name: str = "") -> Number:
    return Number(float(text), at, len(text.partition(".")[2]), name)


def decode(data: bytes) -> str:
    """Text of a file whose encoding nobody says: UTF-16 by its mark, else UTF-8 with what is none replaced."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return data.decode("utf-16", errors="replace")
    return data.decode("utf-8-sig", errors="replace")


def is_text(data: bytes) -> bool:
    return data[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" not in data[:4096]


def clean(line: str) -> str:
    """A line without colours, ranks and times before it."""
    line = COLOUR.sub("", line[:MAX_LINE]).rstrip()
    for _ in range(3):
        shorter = PREFIX.sub("", line)
        if shorter == line:
            break
        line = shorter
    return line


def code_ranges(lines: list[str]) -> list[tuple[int, int]]:
    """[begin, end) of the program that a log prints: between lines of =, or before the first one."""
    bounds = [-1, *(i for i, line in enumerate(lines) if RULE.match(line)), len(lines)]
    found = []
    for a, b in zip(bounds, bounds[1:], strict=False):
        part = lines[a + 1 : b]
        imports = sum(line.startswith(("import ", "from ")) for line in part)
        if len(part) > 20 and imports >= 3 and any(line.lstrip().startswith("def ") for line in part):
            begin = next(i for i, line in enumerate(part) if re.match(r'import |from |"""|#', line))
            end = b if b < len(lines) else end_of_code(lines, a + 1, b)
            if end > a + 1 + begin:
                found.append((a + 1 + begin, end))
    return found


def end_of_code(lines: list[str], a: int, b: int) -> int:
    """Where a program that no line of = ends ends: after the body of its last `if __name__`, else where it begins."""
    for i in range(b - 1, a, -1):
        if lines[i].startswith("if __name__"):
            return next((j for j in range(i + 1, b) if lines[j] and not lines[j].startswith((" ", "\t"))), b)
    return a


def kind_of(name: str, rest: str, is_step: bool) -> str:
    """What a score is of, by its name and what follows it on the line."""
    if is_step or PASSING.search(name):
        return RUNNING
    if NOT_OURS.search(name):
        return OTHER
    if IS_BEFORE.search(name) and not IS_ADAPTED.search(name):
        return BEFORE
    if re.search(r"pre[-_ ]?ttt|before[-_ ]?ttt|without|\bno[-_ ]", name, re.IGNORECASE):
        name = re.sub(r"ttt", "", name, flags=re.IGNORECASE)
    if IS_ADAPTED.search(name) or re.search(r"eval_mode:\w*ttt", rest):
        return ADAPTED
    if IS_SLIDING.search(name) or IS_SLIDING.search(rest):
        return SLIDING
    return CHUNKED if IS_CHUNKED.search(name) else OTHER


def read_scores(line: str, at: Place) -> Iterator[Score]:
    """The scores of one line."""
    step = STEP.match(line)
    spans: list[tuple[int, int]] = []
    first = True
    for pattern, order in ((PAIR, (1, 2)), (RIAP, (2, 1))):
        for m in pattern.finditer(line):
            if any(a < m.end() and m.start() < b for a, b in spans):
                continue
            loss, bpb = (number_of(m.group(i), at) for i in order)
            name = line[: m.start()] if first else line[spans[-1][1] : m.start()]
            spans.append(m.span())
            yield make_score(name, line[m.end():], bpb, loss, bool(step))
            first = False
    for m in ALONE.finditer(line):
        if any(a < m.end() and m.start() < b for a, b in spans):
            continue
        name = line[max((b for _, b in spans if b <= m.start()), default=0) : m.start()]
        name = " ".join(part for part in (name.strip(), m.group(1), m.group(2)) if part)
        spans.append(m.span())
        yield make_score(name, line[m.end():], number_of(m.group(3), at), None, bool(step))


def make_score(name: str, rest: str, bpb: Number, loss: Number | None, is_step: bool) -> Score:
    """A score from the words before and after its numbers."""
    name = re.sub(r"^.*\b(?:eval_)?time[:=]\S+", "", name)  # of an earlier score on its line
    name = re.sub(r"[\s:=|,>*-]+$", "", re.sub(r"^[\s:=|,>*#.-]+", "", name))
    name = re.sub(r"[_ ]exact\b|(^|[_ ])val$", "", name)[-80:]
    name = re.sub(r"^final step:\d+$", "final", name)
    is_step &= name != "final"
    seconds = None
    if m := EVAL_TIME.search(rest):
        seconds = float_or(m.group(1)) / (1000 if m.group(2) == "ms" else 1)
    stride = re.search(r"stride[:=]\s?(\d{1,6})\b", rest)
    kind = OTHER if not 0 < bpb.value < 30 else kind_of(name, rest, is_step)
    tokens = re.search(r"\btokens[:=]\s?(\d{1,12})\b", rest)
    return Score(name, kind, bpb, loss, seconds, *(int(m.group(1)) if m else None for m in (stride, tokens)))


def float_or(text: str, default: float = math.nan) -> float:
    try:
        return float(text)
    except ValueError:
        return default


def size_kind(name: str, has_unit: bool, line: str) -> str:
    """ "model", "code" or "total" of what states bytes in a line; empty for anything else."""
    name = name.lower().strip()
    if not has_unit and "byte" not in name and "size" not in name or NOT_A_SIZE.search(name):
        return ""
    if "submission" in name or "total" in name and re.search(r"artifact|model|code|int\d|size|train_log", line.lower()):
        return "total"
    if "code" in name or name.endswith(".py"):
        return "code"
    if re.search(r"^q$|model|artifact|serialized|compressed|quantized|blob|int\d|ternary|weights", name):
        return "model"
    return ""


def read_log(name: str, text: str) -> Log:
    """What a log prints. Lines are split at line feeds alone, as editors count them; bars redraw themselves in one."""
    log = Log(name)
    if m := SEED_IN_NAME.search(name.rpartition("/")[2]):
        log.named_seed, log.says_seed = int(m.group(1) or m.group(2)), m.group(1) is not None
    lines = text.split("\n")
    ranges = code_ranges(lines)
    for a, b in ranges[:1]:
        log.printed_code = log.printed_code or (Place(name, a + 1), "\n".join(lines[a:b]))
    skipped = {i for a, b in ranges for i in range(a, b)}
    sliding_mode = ""
    for i, raw in enumerate(lines):
        if i in skipped:
            continue
        for part in raw.split("\r"):
            line = clean(part)
            if line and not IS_CODE.search(line):
                if "final_eval_mode:sliding_window" in line:  # of the score that follows
                    sliding_mode = line[line.index("final_eval_mode"):]
                read_line(log, line, Place(name, i + 1), sliding_mode)
    trim_raw_sizes(log)
    return log


def read_line(log: Log, line: str, at: Place, sliding_mode: str) -> None:
    """Add what one line prints."""
    for m in DECIMAL.finditer(line):
        log.numbers.setdefault(len(m.group(1)), set()).add(m.group())
    low = line.lower()
    if "bytes" in low or "size" in low:
        log.whole.update(int(m.group().replace(",", "")) for m in WHOLE.finditer(line))
    if "bpb" in low or "bits per byte" in low:
        for score in read_scores(line, at):
            if sliding_mode and score.kind == CHUNKED:
                score = replace(score, kind=SLIDING)
            log.scores.append(score)
    step = STEP.match(line)
    if time := TRAIN_TIME.search(line):
        scale = {"ms": 1e-3, "s": 1.0, "m": 60.0}[time.group(2)]
        seconds = float_or(time.group(1)) * scale
        if step and math.isfinite(seconds):
            average = STEP_AVG.search(line)
            log.steps.append(Step(int(step.group(1) or step.group(2)), seconds,
                                  float_or(average.group(1)) / 1000 if average else None, at))
        elif line.lstrip().startswith("stopping_early") and math.isfinite(seconds):
            log.stopped = Number(seconds, at, name="seconds of training")
            if at_step := re.search(r"step:\s?(\d{1,8})/", line):
                log.steps.append(Step(int(at_step.group(1)), seconds, None, at))
    if log.printed_seed is None and (m := SEED.search(line)):
        log.printed_seed = Number(int(m.group(1)), at)
    if log.world_size is None and (m := re.search(r"\bworld_size\s?[:=]\s?(\d{1,4})\b", line)):
        log.world_size = Number(int(m.group(1)), at)
    if log.val_tokens is None and (
            m := re.search(r"(?:val_loader.{0,300}tokens|^\s*val_tokens)\s?[:=]\s?(\d{3,12})\b", line)):
        log.val_tokens = Number(int(m.group(1)), at)
    if m := re.search(r"^\s*total_eval_time\s?[:=]\s?([\d.]{1,12})\s?s\b", line):
        log.eval_seconds = Number(float_or(m.group(1), 0.0), at, name="evaluation")
    if not log.steps and (m := SETTING.match(line)):
        log.settings.setdefault(m.group(1), (m.group(2), at))
    elif not log.steps and re.match(r"\s?train_batch_tokens:|tie_embeddings:", line):
        for key, value in re.findall(r"(\w{2,40}):(\S{1,100})", line):
            log.settings.setdefault(key, (value, at))
    read_sizes(log, line, at)


def read_sizes(log: Log, line: str, at: Place) -> None:
    """Add the bytes that one line states."""
    low = line.lower()
    if m := PARTS.search(line):
        log.sizes += [Number(int(text), at, 1, kind) for kind, text in
                      zip(("total", "model", "code"), m.groups(), strict=True)]
        return
    if m := SIZES.search(line):
        log.sizes += [Number(int(text), at, 1, kind) for kind, text in
                      zip(("model", "code", "total"), m.groups(), strict=True) if text]
        return
    if "trial" in low or not ("byte" in low or "size" in low or UNIT.search(line)):
        return  # most lines
    for m in SIZE.finditer(line):
        kind, value = size_kind(m.group(1), bool(m.group(3)), line), int(m.group(2).replace(",", "").replace("_", ""))
        if kind and 1000 <= value < 1 << 40:
            packed = not re.fullmatch(r"(serialized model|total submission size|model)", m.group(1).strip().lower())
            log.sizes.append(Number(value, at, digits=int(packed), name=kind))


def trim_raw_sizes(log: Log) -> None:
    """Drop the bytes of what is not packed: the field's trainers print both, the packed one under a longer name."""
    raw = {n.value for n in log.sizes if n.name == "model" and not n.digits}
    code = {n.value for n in log.sizes if n.name == "code"}
    for kind in ("model", "total"):
        packed = any(n.name == kind and n.digits for n in log.sizes)
        log.sizes = [n for n in log.sizes if n.name != kind or n.digits or not packed
                     and n.value < 2 * rules.OFFICIAL.cap_bytes]
    if any(n.name == "model" and n.digits for n in log.sizes):
        log.sizes = [n for n in log.sizes if n.name != "total" or n.digits
                     or n.value not in {a + b for a in raw for b in code}]


# ---------------------------------------------------------------------------------------------------------------
# What is claimed: submission.json under any name
# ---------------------------------------------------------------------------------------------------------------


@dataclass
class Claim:
    """What submission.json says, where it says it."""

    file: str
    value: dict
    lines: list[str]

    def at(self, *keys: str) -> Place:
        """The line of a key, looked for below the lines of the keys that it is in."""
        line = 0
        for key in keys:
            line = next((i for i in range(line, len(self.lines)) if f'"{key}"' in self.lines[i]), line)
        return Place(self.file, line + 1)

    def number(self, *names: str, low: float = 0.0, high: float = math.inf) -> Number | None:
        """The first of these keys that has a number between the bounds."""
        for name in names:
            value = self.value.get(name)
            if is_number(value) and low < value < high:
                return self.stated(value, self.at(name), name)
            if isinstance(value, dict) and is_number(value.get("mean")) and low < value["mean"] < high:
                return self.stated(value["mean"], self.at(name, "mean"), f"{name}.mean")
        return None

    def stated(self, value: float, at: Place, name: str) -> Number:
        """A number with the digits that its line has: 1.0640 is not 1.064."""
        line = self.lines[at.line - 1] if at.line <= len(self.lines) else ""
        written = [len(digits) for whole, digits in re.findall(r"(-?\d{1,20})\.?(\d{0,20})", line[:MAX_LINE])
                   if float(f"{whole}.{digits or 0}") == value]
        return Number(float(value), at, max(written, default=len(repr(value).partition(".")[2])), name)

    @property
    def bpb(self) -> Number | None:
        said = self.number("val_bpb", "mean_val_bpb", "val_bpb_mean", "val_bpb_3seed_mean", "bpb", "validation_bpb",
                           "final_val_bpb", "score", "best_val_bpb", high=30.0)
        # Some write it as val_loss; nats of a token are more.
        return said or (self.number("val_loss", low=0.2, high=1.6) if "val_bpb" not in self.value else None)

    @property
    def loss(self) -> Number | None:
        return self.number("val_loss", "mean_val_loss", "val_loss_mean", high=30.0)

    @property
    def bytes_total(self) -> Number | None:
        return self.number("bytes_total", "total_bytes", "total_submission_bytes", "submission_bytes",
                           "total_submission_bytes_max", low=1000)

    @property
    def bytes_code(self) -> Number | None:
        return self.number("bytes_code", "code_bytes", low=100)

    @property
    def seeds(self) -> dict[int, dict[str, Number]]:
        """seed -> {"bpb", "bytes", "steps", "step_avg", "train", "eval"} as far as it says them of that seed."""
        found: dict[int, dict[str, Number]] = {}
        for group, value in self.value.items():
            rows: list[tuple[str, object]] = []
            if isinstance(value, dict):
                rows = [(key, row) for key, row in value.items() if re.fullmatch(r"(seed[_ -]?)?\d{1,10}", key)]
            elif isinstance(value, list):
                rows = [(str(int(row["seed"])), row) for row in value
                        if isinstance(row, dict) and is_number(row.get("seed")) and 0 <= row["seed"] < 10**10
                        and row["seed"] % 1 == 0]
            for key, row in rows:
                seed = int(re.sub(r"\D", "", key))
                if isinstance(row, dict):
                    facts = self.seed_facts(row, group, key)
                elif is_number(row) and re.search(r"bpb|seed|result|score", group) and 0.2 < row < 5:
                    facts = {"bpb": self.stated(row, self.at(group, key), group)}
                else:
                    continue
                found[seed] = facts | found.get(seed, {})
        return found

    def seed_facts(self, row: Mapping, group: str, seed: str) -> dict[str, Number]:
        """What a seed's own object says, by SEED_KEYS."""
        facts = {}
        for fact, keys in SEED_KEYS.items():
            for key in keys:
                if is_number(row.get(key)):
                    facts[fact] = self.stated(row[key], self.at(group, seed, key), key)
                    break
        return facts

    @property
    def seed_list(self) -> list[int]:
        """The seeds that it names, in any way."""
        listed = self.value.get("seeds")
        plain = [s for s in listed if type(s) is int] if isinstance(listed, list) else []
        return list(dict.fromkeys([*plain, *self.seeds]))


SEED_KEYS = {
    "bpb": ("val_bpb", "val_bpb_exact", "final_val_bpb", "ttt_bpb", "post_ttt_val_bpb", "bpb"),
    "bytes": ("artifact_bytes", "bytes_total", "total_bytes", "total_submission_bytes"),
    "steps": ("steps", "step_stop", "train_steps"),
    "step_avg": ("step_avg_ms", "ms_per_step"),
    "train": ("train_time_s", "train_s", "train_time_seconds", "training_time_seconds"),
    "eval": ("eval_time_s", "ttt_eval_time_s", "eval_s", "eval_time_seconds"),
}


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# ---------------------------------------------------------------------------------------------------------------
# The folder
# ---------------------------------------------------------------------------------------------------------------


@dataclass
class Published:
    """A folder as it was read. faults: (severity, place, text) of what could not be."""

    path: Path
    non_record: bool  # by the name of the folder that it lies in, or its own words
    files: dict[str, int] = field(default_factory=dict)  # regular files -> bytes
    faults: list[tuple[str, Place, str]] = field(default_factory=list)
    claim: Claim | None = None
    readme: Claim | None = None  # its lines alone
    logs: list[Log] = field(default_factory=list)
    programs: dict[str, static.Program] = field(default_factory=dict)
    main: str = ""  # of programs, the trainer
    counted: list[str] = field(default_factory=list)  # the trainer and what it imports of the folder
    tokenizers: list[str] = field(default_factory=list)
    pickles: list[str] = field(default_factory=list)

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()


def is_ours(folder: Path) -> bool:
    """Whether a folder is one that records/bundle.py wrote: by its submission.json, or by source/ if that is broken."""
    try:
        with open(folder / "submission.json", "rb") as f:
            value = rules.parse_json(f.read(MAX_READ), "submission.json")
    except (OSError, SubmissionError):
        value = None
    ours = isinstance(value, dict) and "files" in value and "claim" in value
    return ours or (folder / "source" / "pack.py").is_file()


LOG_NAMES = (".log", ".txt", ".out", ".stdout", ".err", ".tsv", "")
PICKLE_BEGINS = tuple(bytes([0x80, protocol]) for protocol in range(2, 6))


def read_folder(path: Path) -> Published:
    """A published folder. Raises SubmissionError if there is none to look at."""
    found = Published(path, "non_record" in path.resolve().parent.name)
    scan(found)
    left = MAX_ALL
    texts: dict[str, bytes] = {}
    for name, size in sorted(found.files.items()):
        suffix = Path(name).suffix.lower()
        if suffix == ".model":
            found.tokenizers.append(name)
        if suffix not in (*LOG_NAMES, ".json", ".md", ".py") or size > MAX_READ or size > left:
            if suffix in (*LOG_NAMES, ".json", ".md", ".py"):
                found.faults.append(("warning", Place(name), f"{size:,} bytes, more than are read here: not looked at"))
            continue
        left -= size
        try:
            texts[name] = found.read(name)
        except OSError as e:
            found.faults.append(("warning", Place(name), f"cannot be read ({e.strerror})"))
    read_claim(found, texts)
    read_programs(found, texts)
    for name, data in texts.items():
        if Path(name).suffix.lower() in LOG_NAMES and is_text(data):
            log = read_log(name, decode(data))
            if log.steps or any(score.kind in (RUNNING, CHUNKED, SLIDING, ADAPTED) for score in log.scores):
                found.logs.append(log)
    words = str(found.claim.value.get("track", ""))[:200] if found.claim else ""
    words += " ".join(found.readme.lines[:40])[:8000] if found.readme else ""
    found.non_record |= bool(re.search(r"non[-_ ]?record|unlimited", words, re.IGNORECASE))
    return found


def scan(found: Published) -> None:
    """List the regular files. Raises SubmissionError."""
    pending = [(found.path, 0)]
    try:
        while pending:
            folder, depth = pending.pop()
            with os.scandir(folder) as entries:
                for entry in entries:
                    name = Path(entry.path).relative_to(found.path).as_posix()
                    if entry.is_dir(follow_symlinks=False):
                        if depth >= MAX_DEPTH:
                            found.faults.append(("warning", Place(name), "folders nested too deep: not looked at"))
                        elif entry.name != ".git":
                            pending.append((Path(entry.path), depth + 1))
                    elif entry.is_file(follow_symlinks=False):
                        found.files[name] = entry.stat(follow_symlinks=False).st_size
                    else:
                        found.faults.append(("error", Place(name), "a link or not a file: it is not followed, and "
                                             "what it stands for is not part of the submission"))
                    if len(found.files) + len(pending) + len(found.faults) > MAX_FILES:
                        raise SubmissionError(f"{found.path}: more than {MAX_FILES:,} files; give the folder of one "
                                              "submission")
    except OSError as e:
        raise SubmissionError(f"cannot read {found.path}: {e.strerror}; give the folder of a submission") from None
    if not found.files:
        raise SubmissionError(f"{found.path}: holds no files; give the folder of a submission")


def read_claim(found: Published, texts: Mapping[str, bytes]) -> None:
    """submission.json, or what is there in its place, and README.md."""
    readmes = sorted((n for n in texts if Path(n).name.lower() == "readme.md"), key=lambda n: (n.count("/"), n))
    if readmes:
        found.readme = Claim(readmes[0], {}, decode(texts[readmes[0]]).split("\n"))
    names = sorted((n for n in texts if n.lower().endswith(".json") and "submission" in Path(n).name.lower()),
                   key=lambda n: (n != "submission.json", n.count("/"), n))
    for name in names:
        data = texts[name]
        try:
            try:
                value = rules.parse_json(data, name)
            except SubmissionError:
                if data[:3] != b"\xef\xbb\xbf":
                    raise
                value = rules.parse_json(data[3:], name)
                found.faults.append(("warning", Place(name, 1), "begins with a byte order mark, which JSON does not "
                                     "have: write it without"))
            if not isinstance(value, dict):
                raise SubmissionError(f"{name}: not an object of keys and values")
        except SubmissionError as e:
            found.faults.append(("error", Place(name), str(e).removeprefix(f"{name}: ")))
            continue
        found.claim = Claim(name, value, decode(data).split("\n"))
        return


def read_programs(found: Published, texts: Mapping[str, bytes]) -> None:
    """The Python files, which of them is the trainer, and what it needs."""
    for name, data in texts.items():
        if name.endswith(".py"):
            found.programs[name] = static.Program(name, data)
    # By name, as the rules have it; else what trains by its name; else the one there is.
    ranked = sorted(found.programs, key=lambda n: (n != "train_gpt.py", n.count("/"), "train_gpt" not in n,
                                                   "train" not in n, -found.programs[n].size))
    if ranked and ("train" in ranked[0] or len(ranked) == 1):
        found.main = ranked[0]
        found.counted = static.needed(found.main, found.programs)
