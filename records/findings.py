"""What a referee finds in a published folder: what can be recomputed, set against what is claimed.

A finding is true as it stands: it names the file and line that it rests on, and what cannot be said without running the
program is a note that says so. docs/check.md explains every rule.
"""

from __future__ import annotations

import ast
import json
import math
import re
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

from records import claim, rules, static
from records.published import (
    ADAPTED,
    BEFORE,
    OWN_SETTINGS,
    PICKLE_BEGINS,
    RUNNING,
    SIMPLE,
    Log,
    Number,
    Place,
    Published,
    Score,
    read_folder,
)
from records.rules import OFFICIAL, SubmissionError

ERROR, WARNING, NOTE = "error", "warning", "note"
SEVERITIES = (ERROR, WARNING, NOTE)

OFFICIAL_BYTES = 151_080_891  # of the competition's validation text, whatever the tokenizer
WHOLE_TEXT = 30_000_000  # tokens: fewer than any tokenizer in use makes of it (16,384 pieces make 36 million)
SAME_TEXT, OTHER_TEXT = 0.002, 0.02  # share by which its bytes may be off: rounding and a last window; nothing known
SMALL = 0.0005  # bits per byte: a quarter of what a record needs
ONE_STEP = 1.0  # seconds by which training may pass its limit: the field's trainers stop after the step that does


@dataclass(frozen=True)
class Finding:
    severity: str
    rule: str
    place: Place
    text: str
    do: str = ""

    def line(self) -> str:
        return f"{self.severity:<8}{self.rule:<10}{self.place}: {self.text}" + (f"; {self.do}" if self.do else "")


Found = Iterator[Finding]


@dataclass
class Case:
    """A folder, and what the rules share of it."""

    folder: Published
    against: str | None = None
    record: list[float] = field(default_factory=list)  # bits per byte to beat

    @property
    def json(self) -> Place:
        """Where a finding on submission.json as a whole stands."""
        return Place(self.folder.claim.file) if self.folder.claim else Place("submission.json")

    @property
    def seeds(self) -> list[int]:
        """Seeds that are claimed; those of the logs where none are."""
        claimed = self.folder.claim.seed_list if self.folder.claim else []
        return claimed or list(dict.fromkeys(log.seed for log in self.folder.logs if log.seed is not None))

    @cached_property
    def chosen(self) -> dict[int | str, tuple[Log, Score]]:
        """seed, or a log's name where it has none -> the log and the score in it that is claimed, or that it ends with.

        Of several logs of a seed the one that holds what is claimed of it, else the first at the top of the folder.
        """
        facts, bpb = (self.folder.claim.seeds, self.folder.claim.bpb) if self.folder.claim else ({}, None)
        groups: dict[int | str, list[Log]] = {}
        for log in sorted(self.folder.logs, key=lambda log: (log.name.count("/"), log.name)):
            if log.last() is not None:
                groups.setdefault(log.name if log.seed is None else log.seed, []).append(log)
        if set(self.seeds) & groups.keys():
            groups = {seed: logs for seed, logs in groups.items() if seed in self.seeds}
        claimed_names = self.claimed_names(groups, bpb)
        found: dict[int | str, tuple[Log, Score]] = {}
        for seed, logs in groups.items():
            said = facts.get(seed, {}).get("bpb") if isinstance(seed, int) else None
            pairs = [(log, score) for log in logs for score in reversed(log.finals())]
            exact = [pair for pair in pairs if said and pair[1].bpb.agrees(said.value, said.digits)]
            named = [pair for pair in pairs if pair[1].name in claimed_names]
            last = [(log, score) for log in logs if (score := log.last())]
            found[seed] = (exact or named or last)[0]
        return found

    def claimed_names(self, groups: dict, bpb: Number | None) -> list[str]:
        """Names of scores whose mean over the logs, or value in one, is the claimed figure."""
        if bpb is None:
            return []
        values: dict[str, list[Number]] = {}
        for logs in groups.values():
            for score in logs[0].finals():
                values.setdefault(score.name, []).append(score.bpb)
        means = [name for name, found in values.items()
                 if bpb.agrees(statistics.mean(n.value for n in found), found[0].digits)]
        return means or [name for name, found in values.items()
                         if any(bpb.agrees(n.value, n.digits) for n in found)]

    @property
    def left_out(self) -> list[Log]:
        """Logs with a score that stand for no seed: of one that another log stands for, or that is not claimed."""
        taken = [log.name for log, _ in self.chosen.values()]
        return [log for log in self.folder.logs if log.name not in taken and log.last() is not None]

    @property
    def values(self) -> list[float]:
        return [score.bpb.value for _, score in self.chosen.values()]

    def timed(self) -> bool:
        """Whether the track's limits of time are its own."""
        return not self.folder.non_record


# ---------------------------------------------------------------------------------------------------------------
# The folder itself
# ---------------------------------------------------------------------------------------------------------------


def check_folder(c: Case) -> Found:
    for severity, place, text in c.folder.faults:
        yield Finding(severity, "folder", place, text, "give the file itself" if "link" in text else "")
    if c.folder.readme is None:
        yield Finding(WARNING, "folder", Place("README.md"), "is missing", "the rules ask for one")
    if c.folder.claim is None:
        if not any(f"{place.file}".endswith(".json") for _, place, _ in c.folder.faults):
            yield Finding(ERROR, "folder", Place("submission.json"), "is missing, so nothing is claimed in it",
                          "write name, github_id, val_bpb and bytes_total into it")
    else:
        for keys in (("name", "record_name", "title", "model_name", "run_name"), ("github_id", "github", "author"),
                     ("val_bpb",)):
            if not any(key in c.folder.claim.value for key in keys):
                yield Finding(WARNING, "folder", c.json, f"has no key {keys[0]!r}", "the rules ask for it")
        if c.folder.claim.bpb is None:
            yield Finding(WARNING, "claim", c.json, "states no val_bpb as a number, so no score is claimed in it",
                          "write the mean of the seeds as val_bpb")
    if not c.folder.main:
        what = "none of the programs here trains, by their names" if c.folder.programs else "no Python program is here"
        yield Finding(WARNING if c.folder.programs else ERROR, "folder", Place("train_gpt.py"),
                      f"{what}, so bytes of code cannot be said", "submit train_gpt.py")
    if not c.folder.logs:
        yield Finding(WARNING, "folder", Place(c.folder.path.name), "no training log with a score or a step in it, so "
                      "nothing that is claimed can be set against anything", "submit the log of each seed")
    texts = {program.data.strip(): name for name, program in c.folder.programs.items()}
    for name, size in c.folder.files.items():
        if name.endswith((".log", ".txt")) and size < static.MAX_SOURCE and (
                other := texts.get(c.folder.read(name).strip())):
            yield Finding(ERROR, "folder", Place(name), f"is the program {other} and no log", "submit the log")
    for name in c.folder.files:
        with open(c.folder.path / name, "rb") as f:
            begin = f.read(4)
        if begin.startswith(PICKLE_BEGINS):
            yield Finding(NOTE, "pickle", Place(name), "is a pickle: it was not opened, and what loads it runs what it "
                          "says", "store tensors in a format that holds no code")


# ---------------------------------------------------------------------------------------------------------------
# Bytes
# ---------------------------------------------------------------------------------------------------------------


def check_bytes(c: Case) -> Found:
    cap, folder = OFFICIAL.cap_bytes, c.folder
    code = sum(folder.programs[name].size for name in folder.counted)
    parts = " + ".join(f"{name} {folder.programs[name].size:,}" for name in folder.counted)
    if folder.counted:
        how = ", ".join(f"{name} is packed ({folder.programs[name].packed}) and holds "
                        f"{len(folder.programs[name].text):,} bytes of program" for name in folder.counted
                        if folder.programs[name].packed)
        yield Finding(NOTE, "bytes", Place(folder.main), f"code as it lies here: {parts}"
                      + (f" = {code:,}" if len(folder.counted) > 1 else "") + " bytes" + (f"; {how}" if how else ""))
    models = [(log, model) for log, _ in c.chosen.values() if (model := log.model())]
    totals = [(log, total) for log, _ in c.chosen.values() if (total := log.size("total"))]
    other_models = [model for log in c.left_out if (model := log.model())]
    other_totals = [total for log in c.left_out if (total := log.size("total"))]
    for severity, stated_totals in ((ERROR, [total for _, total in totals]), (WARNING, other_totals)):
        for total in stated_totals:
            if total.value > cap:
                yield Finding(severity, "bytes", total.at, f"states {total.value:,.0f} bytes in all, "
                              f"{total.value - cap:,.0f} over the cap of {cap:,}"
                              + (", in a log that no score was taken from" if severity == WARNING else ""),
                              "store less: the cap is decimal megabytes")
    if models:
        _, largest = max(models, key=lambda pair: pair[1].value)
        if folder.counted and not any(total.value > cap for _, total in totals):
            total = largest.value + code
            text = f"model {largest.value:,.0f} + code as it lies here {code:,} = {total:,.0f} bytes"
            stated = max((t.value for _, t in totals), default=0)
            if total <= cap:
                yield Finding(NOTE, "bytes", largest.at, f"{text}, {cap - total:,.0f} below the cap")
            elif largest.value > cap:
                yield Finding(ERROR, "bytes", largest.at, f"{text}: the model alone is over the cap of {cap:,}",
                              "store less")
            elif 0 < stated <= cap:
                yield Finding(WARNING, "bytes", largest.at, f"{text}, {total - cap:,.0f} over the cap; the log "
                              f"counts {stated - largest.value:,.0f} of code", "submit the program as it is counted")
            else:
                yield Finding(ERROR, "bytes", largest.at, f"{text}, {total - cap:,.0f} over the cap of {cap:,}",
                              "pack the program or store less")
        yield from logged_code(c)
    elif folder.logs:
        yield Finding(NOTE, "bytes", Place(c.folder.logs[0].name), "no log states the bytes of a packed model, and it "
                      "is not known which file of the folder is one: bytes cannot be said")
    if folder.claim and (said := folder.claim.bytes_total):
        if said.value > cap:
            yield Finding(ERROR, "bytes", said.at, f"{said.name} is {said.value:,.0f}, over the cap of {cap:,}",
                          "store less")
        weighed = [*(m for _, m in models), *other_models]
        allowed = {t.value for t in (*(t for _, t in totals), *other_totals)}
        allowed |= {m.value for m in weighed} | {m.value + code for m in weighed}
        whole = {n for log in folder.logs for n in log.whole}
        means = [statistics.mean(v) for v in ([t.value for _, t in totals], [m.value for _, m in models]) if v]
        if allowed and said.value not in allowed | whole and not any(abs(said.value - m) <= 1 for m in means):
            near = min(allowed, key=lambda n: abs(n - said.value))
            yield Finding(WARNING, "bytes", said.at, f"{said.name} is {said.value:,.0f}, which no log states and which "
                          f"is not their model with the code that lies here; the nearest is {near:,.0f}",
                          "state the largest seed's")
    yield from quoted_bytes(c, models, totals, code)


def logged_code(c: Case) -> Found:
    """The code that a log weighs against the files that lie here."""
    counted = [c.folder.programs[name] for name in c.folder.counted]
    sums = {p.size for p in c.folder.programs.values()} | {len(p.text) for p in counted}
    sums.add(sum(p.size for p in counted))
    for log, _ in c.chosen.values():
        stated = [n for n in log.sizes if n.name == "code"]
        if stated and c.folder.programs and not any(n.value in sums for n in stated):
            main = c.folder.programs.get(c.folder.main)
            lies = f"{main.name} has {main.size:,}" if main else "none is a trainer by its name"
            yield Finding(WARNING, "code", stated[-1].at, f"the run weighed {stated[-1].value:,.0f} bytes of code, no "
                          f"program here has as many ({lies}): it ran another form or version of it",
                          "submit the program that ran")
            return


def quoted_bytes(c: Case, models: list, totals: list, code: int) -> Found:
    """Which of the bytes the README quotes."""
    if c.folder.readme is None or not models:
        return
    quoted: dict[int, int] = {}
    for i, line in enumerate(c.folder.readme.lines, 1):
        for m in re.finditer(r"(?<![\d.,])\d{1,3}(?:,\d{3}){2,3}(?![\d,])|(?<![\d.,])\d{7,9}(?![\d.])", line[:2000]):
            quoted.setdefault(int(m.group().replace(",", "")), i)
    kinds = {"a model as a log states it": [m.value for _, m in models],
             "a total as a log states it": [t.value for _, t in totals],
             "a model with the code as it lies here": [m.value + code for _, m in models]}
    hits = [(what, next(int(v) for v in values if v in quoted)) for what, values in kinds.items()
            if any(v in quoted for v in values)]
    if hits:
        yield Finding(NOTE, "bytes", Place(c.folder.readme.file, quoted[hits[0][1]]), "quotes "
                      + ", ".join(f"{value:,} ({what})" for what, value in hits))


# ---------------------------------------------------------------------------------------------------------------
# The score
# ---------------------------------------------------------------------------------------------------------------


def check_score(c: Case) -> Found:
    for seed, (log, score) in c.chosen.items():
        others = [f"{s.name or 'val_bpb'} {s.bpb.value:.8g} ({s.kind})" for s in log.finals() if s != score][-6:]
        name = f"seed {seed}" if isinstance(seed, int) else "no seed named"
        yield Finding(NOTE, "score", score.bpb.at, f"{name}: {score.name or 'val_bpb'} {score.bpb.value:.8g} "
                      f"({score.kind})" + (f"; beside it {', '.join(others)}" if others else ""))
    if c.left_out:
        names = ", ".join(log.name for log in c.left_out[:6])
        yield Finding(NOTE, "score", c.json, f"{len(c.left_out)} more log(s) with a score, of which none was taken, as "
                      f"they are of a seed that another log stands for or that is not claimed: {names}")
    values = c.values
    if len(values) > 1:
        yield Finding(NOTE, "score", c.json, f"recomputed over {len(values)} logs: mean {statistics.mean(values):.8f}, "
                      f"sample standard deviation {statistics.stdev(values):.8f}")
    said = c.folder.claim.bpb if c.folder.claim else None
    if said is None:
        return
    finals = [score for log in c.folder.logs for score in log.finals()]
    yield from claimed_mean(c, said)
    if not finals or not values:
        return
    kinds = {score.kind for _, score in c.chosen.values()}
    if len(kinds - {RUNNING}) > 1:
        listed = "; ".join(f"{seed}: {score.name} ({score.kind})" for seed, (_, score) in c.chosen.items())
        if c.folder.claim.seeds:
            yield Finding(WARNING, "score", c.json, f"scores of different kinds stand side by side: {listed[:300]}",
                          "compare one kind in all seeds")
    mean_of = said.agrees(statistics.mean(values), min(score.bpb.digits for _, score in c.chosen.values()))
    one_of = any(said.agrees(score.bpb.value, score.bpb.digits) for score in finals)
    if mean_of or one_of:
        before = [s for s in finals if s.kind == BEFORE and said.agrees(s.bpb.value, s.bpb.digits)]
        after = [s for s in finals if s.kind != BEFORE]
        if before and after and not any(said.agrees(s.bpb.value, s.bpb.digits) for s in after):
            yield Finding(ERROR, "score", said.at, f"{said.name} {said.value:g} is {before[0].name} of "
                          f"{before[0].bpb.at}, a score before quantization: not of what is submitted",
                          "claim the score of the file")
        elif len(values) > 1 and not mean_of and all(isinstance(seed, int) for seed in c.chosen) and not any(
                said.agrees(statistics.mean(v), 9) for v in seed_groups(c)):
            yield Finding(WARNING, "score", said.at, f"{said.name} {said.value:g} is that of one log, the mean of the "
                          f"{len(values)} is {statistics.mean(values):.6f}", "claim the mean")
        return
    if any(said.agrees(statistics.mean(v), 9) for v in seed_groups(c)):
        return
    everything = [s.bpb.value for log in c.folder.logs for s in log.scores if s.kind != RUNNING or log.last() is s]
    lowest, mean = min(s.bpb.value for s in finals), statistics.mean(values)
    held = any(log.holds(said.value, said.digits) for log in c.folder.logs)
    if said.value < min(everything) - 10.0 ** -said.digits and not held:
        yield Finding(ERROR, "score", said.at, f"{said.name} is {said.value:g}, below every score that a log here ends "
                      f"with: the lowest is {lowest:.8g}, their mean by seed {mean:.8f}", "claim what the logs state")
    elif not held:
        yield Finding(WARNING, "score", said.at, f"{said.name} is {said.value:g}, which is no log's score and not "
                      f"their mean ({mean:.8f})", "claim what the logs state, or submit the logs that have it")


def seed_groups(c: Case) -> list[list[float]]:
    """Values, by name of the score, of every set of logs that may be what a mean was taken over."""
    by_name: dict[tuple[str, str], dict[int | str, float]] = {}
    for log in c.folder.logs:
        for score in log.finals():
            seed = log.name if log.seed is None else log.seed
            for group in (log.name.rpartition("/")[0], "all"):
                by_name.setdefault((score.name, group), {}).setdefault(seed, score.bpb.value)
    return [list(values.values()) for values in by_name.values()]


def claimed_mean(c: Case, said: Number) -> Found:
    """submission.json against itself and, seed by seed, against the logs."""
    facts = {seed: row["bpb"] for seed, row in c.folder.claim.seeds.items() if "bpb" in row}
    if len(facts) > 1:
        values = [n.value for n in facts.values()]
        mean, digits = statistics.mean(values), min(n.digits for n in facts.values())
        if not said.agrees(mean, digits):
            some = any(said.agrees(v, digits) for v in values)
            small = abs(said.value - mean) < SMALL
            yield Finding(WARNING if some or small else ERROR, "score", said.at, f"{said.name} is {said.value:g}, the "
                          f"mean of the {len(values)} seeds that it has values of is {mean:.6f}"
                          + (": it is that of one of them" if some else ""), "claim the mean")
        std = c.folder.claim.number("val_bpb_std", "std_val_bpb", high=1.0)
        unit = 10.0 ** -min(digits, std.digits) if std else 0.0  # of the last digit: the values are rounded as well
        if std and not any(abs(std.value - f(values)) <= 1.6 * unit for f in (statistics.stdev, statistics.pstdev)):
            yield Finding(WARNING, "score", std.at, f"{std.name} is {std.value:g}; the seeds' values here have a "
                          f"sample standard deviation of {statistics.stdev(values):.6f} (that of a population is "
                          f"{statistics.pstdev(values):.6f})", "state the sample's")
    for seed, number in facts.items():
        logs = [log for log in c.folder.logs if log.seed == seed] or (
            [log for log in c.folder.logs if log.seed is None] if len(facts) == 1 else [])
        scored = [log for log in logs if log.finals()]
        if scored and not any(log.holds(number.value, number.digits) for log in c.folder.logs):
            score = c.chosen[seed][1] if seed in c.chosen else scored[0].last()
            severity = ERROR if number.value < score.bpb.value else WARNING
            yield Finding(severity, "score", number.at, f"{number.name} of seed {seed} is {number.value:g}, a number "
                          f"that no log prints; {score.bpb.at} has {score.name} {score.bpb.value:.8g}",
                          "state what the log does, or submit the log that has it")


def implied_bytes(score: Score, tokens: float) -> float | None:
    """Bytes of the text by a score's nats per token and bits per byte; None where the line is too coarse."""
    if score.loss is None or min(score.loss.digits, score.bpb.digits) < 4 or score.bpb.value < 0.1:
        return None
    return tokens * score.loss.value / (score.bpb.value * math.log(2))


def check_text(c: Case) -> Found:
    """Loss and bits per byte of a log give the bytes of the text that it scored."""
    seen: set[tuple[str, int]] = set()
    for log in c.folder.logs:
        if log.val_tokens is None:
            continue
        tokens = log.val_tokens.value
        sizes = [(score, size) for score in log.scores if (size := implied_bytes(score, tokens))]
        for score in log.finals():
            size = implied_bytes(score, tokens)
            if size is None or (score.tokens is not None and score.tokens < tokens / 2):
                continue  # of a few tokens, as a test of another kind
            if abs(size / tokens - 1) < SAME_TEXT < abs(tokens / OFFICIAL_BYTES - 1):
                continue  # the loss is one of a byte, which says nothing of the text
            share = size / OFFICIAL_BYTES
            alone = not any(other.bpb.value != score.bpb.value and abs(theirs / size - 1) < SAME_TEXT
                            for other, theirs in sizes if other.name != score.name)
            severity, verdict, do = text_verdict(share, tokens, alone)
            key = (severity, 0 if severity == NOTE else round(100 * share))
            if key in seen:
                continue
            seen.add(key)
            text = (f"{score.name}: val_loss {score.loss.value:g} and val_bpb {score.bpb.value:g} make {size:,.0f} "
                    f"bytes of the {tokens:,.0f} validation tokens ({log.val_tokens.at}), if all were scored; the "
                    f"official text has {OFFICIAL_BYTES:,}")
            if share > 1 + SAME_TEXT and tokens > WHOLE_TEXT:
                text += f", by which this would be {score.bpb.value * share:.4f}"
            yield Finding(severity, "text", score.bpb.at, text + verdict, do)


def text_verdict(share: float, tokens: float, alone: bool) -> tuple[str, str, str]:
    """(severity, what it says, what to do) of the share of the official text's bytes.

    alone: no other score of the log makes as many bytes. A text has its bytes whatever is scored, so a score alone may
    be one whose loss and bits are of different predictions.
    """
    if tokens <= WHOLE_TEXT:
        return WARNING, f": {share:.1%} of it, so the score is not of the whole text", "score all of it"
    if abs(share - 1) <= SAME_TEXT:
        return NOTE, ": the same but for rounding and the last window", ""
    if share > 1 + OTHER_TEXT and alone:
        return (WARNING, ": no other score of the log makes as many, so its loss and its bits may be of different "
                "predictions, as in a mixture", "print the loss of what is scored")
    if share > 1 + OTHER_TEXT:
        return (ERROR, ": bytes are counted that the text does not have, or it is another text, or part of one",
                "count the bytes of the decoded official text")
    return (WARNING, f": {share - 1:+.2%}, so another text, a part of it, or bytes counted otherwise",
            "say on what text and by which count")


def loss_beside(log: Log, score: Score) -> Number | None:
    """The loss of a score, or of another one in its log with the same bits per byte."""
    return score.loss or next((s.loss for s in log.finals() if s.loss and s.bpb.value == score.bpb.value), None)


def check_claim(c: Case) -> Found:
    """Against a given record, by the competition's rule."""
    if c.against is None:
        return
    pairs = list(c.chosen.values())
    losses = [(loss.value, score.bpb.value) for log, score in pairs if (loss := loss_beside(log, score))]
    values, place = c.values, c.folder.claim.bpb.at if c.folder.claim and c.folder.claim.bpb else c.json
    if len(values) < 2 or not losses:
        yield Finding(NOTE, "record", place, f"--against {c.against}: {len(values)} score(s), {len(losses)} of them "
                      "with a loss; p needs two, and a loss", "submit three seeds")
        return
    margin = claim.margin_bpb(*map(statistics.mean, zip(*losses, strict=True)))
    p, text = claim.weigh(values, c.record, margin)
    if p < rules.RECORD_P and len(values) >= rules.RECORD_SEEDS:
        yield Finding(NOTE, "record", place, f"{text}: a record by the rule")
    else:
        yield Finding(WARNING, "record", place, f"{text}: no record by the rule, which needs "
                      f"{rules.RECORD_SEEDS} seeds and p below {rules.RECORD_P}", "run more seeds, or do not claim one")


# ---------------------------------------------------------------------------------------------------------------
# Seeds and settings
# ---------------------------------------------------------------------------------------------------------------


def check_seeds(c: Case) -> Found:
    logs = c.folder.logs
    have = {log.seed for log in logs}
    nameless = [log for log in logs if log.seed is None]
    listed = c.folder.claim.seed_list if c.folder.claim else []
    for seed in listed:
        if logs and seed not in have and not nameless:
            yield Finding(WARNING, "seeds", c.folder.claim.at("seeds") if "seeds" in c.folder.claim.value else c.json,
                          f"seed {seed} is claimed and no log here is of it", "submit its log")
    for log in logs:
        if log.says_seed and log.printed_seed and log.printed_seed.value != log.named_seed:
            yield Finding(ERROR if log.named_seed > 9 else WARNING, "seeds", log.printed_seed.at,
                          f"the log says seed {log.printed_seed.value:.0f}, its name {log.named_seed}",
                          "name it by its seed, or submit the log of that seed")
    seen: dict[bytes, Log] = {}
    for log in logs:
        data = c.folder.read(log.name)
        other = seen.setdefault(data, log)
        if other.says_seed and log.says_seed and other.named_seed != log.named_seed:
            yield Finding(ERROR, "seeds", Place(log.name), f"is the same file as {other.name}, by their names of two "
                          "seeds", "submit each seed's own log")
    if c.timed() and logs and 0 < len(c.chosen) < rules.RECORD_SEEDS:
        yield Finding(NOTE, "seeds", c.json, f"{len(c.chosen)} seed(s) with a score; a record needs "
                      f"{rules.RECORD_SEEDS} or as many as show p < {rules.RECORD_P}")
    yield from same_settings(c)


def same_settings(c: Case) -> Found:
    chosen = [log for log, _ in c.chosen.values() if log.settings]
    if len(chosen) < 2 or not all(isinstance(seed, int) for seed in c.chosen):
        return
    first = chosen[0]
    for log in chosen[1:]:
        differ = [key for key in first.settings.keys() & log.settings.keys() if not OWN_SETTINGS.search(key)
                  and first.settings[key][0] != log.settings[key][0]
                  and all(SIMPLE.fullmatch(of.settings[key][0]) for of in (first, log))]
        if differ:
            shown = ", ".join(f"{key} {first.settings[key][0][:40]} and {log.settings[key][0][:40]}"
                              for key in sorted(differ)[:5])
            yield Finding(WARNING, "settings", log.settings[sorted(differ)[0]][1], f"{len(differ)} setting(s) are not "
                          f"those of {first.name}: {shown}", "compare runs of one setting")


def check_code(c: Case) -> Found:
    """The program that logs print against the one that lies here."""
    texts = {data.decode(errors="replace").strip().replace("\r\n", "\n"): name
             for name, program in c.folder.programs.items()
             for data in ((program.data, program.text) if name in c.folder.counted else (program.data,))}
    told = False
    for log, _ in c.chosen.values():
        if log.printed_code is None or not texts:
            continue
        place, text = log.printed_code
        text = "\n".join(line.rstrip("\r") for line in text.split("\n")).strip()
        if text in texts:
            if not told:
                yield Finding(NOTE, "code", place, f"the log prints the program {texts[text]} as it lies here")
            told = True
            continue
        name = c.folder.main or next(iter(c.folder.programs))
        here = c.folder.programs[name].text.decode(errors="replace").strip().splitlines()
        ours = text.splitlines()
        at = next((i for i, pair in enumerate(zip(ours, here, strict=False)) if pair[0] != pair[1]),
                  min(len(ours), len(here)))
        other = len(set(ours) ^ set(here))
        yield Finding(WARNING, "code", Place(log.name, place.line + at), f"the log prints another program than {name}: "
                      f"{other} lines are in one of them alone, the first difference is at its line {at + 1}",
                      "submit the program that ran")
    for name in c.folder.counted:
        if fault := c.folder.programs[name].opened.fault:
            yield Finding(WARNING, "code", Place(name), f"Python {static.PYTHON} cannot parse it ({fault[:120]}): "
                          "nothing of it was read", "say which Python it needs")


# ---------------------------------------------------------------------------------------------------------------
# Time
# ---------------------------------------------------------------------------------------------------------------


def check_time(c: Case) -> Found:
    limit = OFFICIAL.train_seconds
    for seed, (log, score) in c.chosen.items():
        ran = f" on {log.world_size.value:.0f} process(es)" if log.world_size else ", it is not known on what"
        over = ERROR if log.world_size and log.world_size.value >= OFFICIAL.gpus else WARNING
        last = log.steps[-1] if log.steps else None
        trained = log.stopped or (Number(last.seconds, last.at) if last else None)
        if trained and last:
            text = f"trained {trained.value:.1f} s in {last.step:,} steps{ran}"
            if c.timed() and trained.value > limit + ONE_STEP:
                yield Finding(over, "time", trained.at, f"{text}; the track allows {limit:.0f} s on {OFFICIAL.gpus} "
                              "GPUs", "train shorter")
            else:
                yield Finding(NOTE, "time", trained.at, text)
        averaged = next((s for s in reversed(log.steps) if s.average), None)
        if averaged and averaged.step > 200:
            product = averaged.step * averaged.average
            if abs(product - averaged.seconds) > 0.01 * max(product, averaged.seconds) + 0.5:
                yield Finding(WARNING, "time", averaged.at, f"{averaged.step:,} steps of {1000 * averaged.average:g} "
                              f"ms make {product:.1f} s, the line says {averaged.seconds:.1f}",
                              "say what the average leaves out")
        evaluated = log.eval_seconds or (
            Number(score.seconds, score.bpb.at, name=score.name) if score.seconds and score.kind != RUNNING else None)
        if evaluated and evaluated.value > OFFICIAL.score_seconds and c.timed():
            yield Finding(over, "time", evaluated.at, f"{evaluated.name} took {evaluated.value:.1f} s{ran}; the track "
                          f"allows {OFFICIAL.score_seconds:.0f} s on {OFFICIAL.gpus} GPUs", "score faster")
        if log.world_size and log.world_size.value < OFFICIAL.gpus and c.timed() and seed == next(iter(c.chosen)):
            yield Finding(NOTE, "time", log.world_size.at, f"ran on {log.world_size.value:.0f} process(es): steps and "
                          f"seconds on the track's {OFFICIAL.gpus} GPUs cannot be said")
    for seed, facts in (c.folder.claim.seeds if c.folder.claim else {}).items():
        steps, average, train = (facts.get(key) for key in ("steps", "step_avg", "train"))
        if steps and average and train and train.value > 1 and steps.value > 200:
            product = steps.value * average.value / 1000
            if abs(product - train.value) > 0.02 * max(product, train.value):
                yield Finding(WARNING, "time", steps.at, f"seed {seed}: {steps.value:,.0f} steps of {average.value:g} "
                              f"ms make {product:.1f} s, {train.name} is {train.value:g}", "state what was measured")


# ---------------------------------------------------------------------------------------------------------------
# The score's soundness, from code and tokenizer
# ---------------------------------------------------------------------------------------------------------------

# rule -> (severity, the search, what it says, what to do)
LOOKS: dict[str, tuple[str, Callable, str, str]] = {
    "data": (ERROR, static.validation_in_training, "validation shards are named where training files are",
             "train on training shards alone"),
    "adapt": (WARNING, static.unscored_adaptation, "takes the validation tokens and trains on them, and keeps no score "
              "itself: whether all of them were scored before it is not seen here", "score each token before that"),
    "network": (WARNING, static.network_uses, "speaks to the network, if this runs: the rules allow none in evaluation",
                "load what is in the folder"),
    "pickle": (WARNING, static.pickle_uses, "unpickles, which runs what a file says",
               "load with weights_only=True or another format"),
    "windows": (NOTE, static.tail_windows, "windows go on after one has reached the end, and each scores the last "
                "tokens again: fewer than one window of tokens, which no printed digit shows", "end at the first that "
                "reaches the end"),
}


def check_soundness(c: Case) -> Found:
    for name in c.folder.counted:
        program = c.folder.programs[name]
        if program.tree is None:
            continue
        for rule, (severity, look, text, do) in LOOKS.items():
            for node in first(look(program.tree), 3):
                switch = rule == "data" and any(isinstance(part, ast.IfExp) for part in ast.walk(node))
                what = "validation shards may be read as training files, by a switch" if switch else text
                yield Finding(WARNING if switch else severity, rule, Place(program.shown, node.lineno),
                              f"{what}: `{program.quote(node)}`", do)
        for node, text in first(static.byte_tables(program.tree), 2):
            yield Finding(WARNING, "bytes/tok", Place(program.shown, node.lineno), f"{text} `{program.quote(node)}`",
                          "count as the official build_sentencepiece_luts does")
    for log, _ in c.chosen.values():
        for key, (value, place) in log.settings.items():
            if re.search(r"train.*(files|pattern)", key) and static.VALIDATION.search(value):
                yield Finding(ERROR, "data", place, f"{key} is {value[:120]}: validation shards in training",
                              "train on training shards alone")
            if re.fullmatch(r"pre_?quant_?ttt(_enabled)?", key) and value in ("True", "1"):
                yield Finding(WARNING, "adapt", place, f"{key} is {value}: the model is trained on validation tokens "
                              "before it is quantized and scored", "score each token before training on it")


def first(found: Iterator, count: int) -> Iterator:
    """At most so many: a program that does a thing does it again."""
    for _, item in zip(range(count), found, strict=False):
        yield item


MAX_TOKENIZER = 1 << 25


def check_tokenizers(c: Case) -> Found:
    """The bytes of every submitted tokenizer's pieces against the text that it decodes."""
    for name in c.folder.tokenizers:
        if c.folder.files[name] > MAX_TOKENIZER:
            yield Finding(WARNING, "tokenizer", Place(name), f"{c.folder.files[name]:,} bytes: not opened")
            continue
        yield from audit_tokenizer(name, c.folder.read(name))
    for name in c.folder.files:
        if re.search(r"tokenizer[^/]*\.(json|pkl|tiktoken|vocab)$", name.lower()):
            yield Finding(NOTE, "tokenizer", Place(name), "may be a tokenizer, in a format that is not audited here: "
                          "whether its bytes are counted right cannot be said")


def audit_tokenizer(name: str, data: bytes) -> Found:
    import sentencepiece as spm

    from tern.shards import DataError
    from tern.tokenizers import check_tokenizer

    try:
        sp = spm.SentencePieceProcessor(model_proto=data)
        size = sp.vocab_size()
    except (RuntimeError, OSError, ValueError) as e:
        why = " ".join(str(e).split())[:120]
        yield Finding(WARNING, "tokenizer", Place(name), f"not a SentencePiece model ({why}): not audited",
                      "submit the .model file")
        return
    try:
        notes = check_tokenizer(sp, name)
    except DataError as e:
        yield Finding(WARNING, "tokenizer", Place(name), f"{size:,} pieces; by the official rule they do not stand for "
                      f"the bytes of the text: {str(e).removeprefix(f'{name}: ')}",
                      "prove the byte count on the decoded official text")
        return
    yield Finding(NOTE, "tokenizer", Place(name), f"{size:,} pieces; hard texts come back, and their bytes by the "
                  "official rule are those of the decoded text" + "".join(f"; {note}" for note in notes))


def check_unsaid(c: Case) -> Found:
    """What nobody can say who does not run it."""
    where = Place(c.folder.main or c.folder.path.name)
    yield Finding(NOTE, "unsaid", where, "whether this program gives these logs, and the packed model these bytes and "
                  "this score, cannot be said without running it")
    kinds = [score for _, score in c.chosen.values() if score.kind == ADAPTED]
    mixed = [s for s in kinds if re.search(r"n[-_]?gram|ppm|cache|mix|hedge|backoff|knn|integrated", s.name, re.I)]
    if mixed:
        yield Finding(NOTE, "unsaid", mixed[0].bpb.at, f"{mixed[0].name} mixes the model with counts of the text: "
                      "whether its probabilities sum to one at every token cannot be said without running it")
    elif kinds:
        yield Finding(NOTE, "unsaid", kinds[0].bpb.at, f"{kinds[0].name} adapts to the text: whether every token is "
                      "scored before it is trained on cannot be said without running it")


CHECKS: dict[str, Callable[[Case], Found]] = {
    "folder": check_folder, "bytes": check_bytes, "score": check_score, "text": check_text, "record": check_claim,
    "seeds": check_seeds, "code": check_code, "time": check_time, "soundness": check_soundness,
    "tokenizers": check_tokenizers, "unsaid": check_unsaid,
}


def to_beat(against: str) -> list[float]:
    """Bits per byte of --against: a number, one of our records, or a published folder. Raises SubmissionError."""
    try:
        return claim.read_record(against)[0]
    except ValueError:  # no number, and no submission.json of ours
        if not Path(against).is_dir():
            raise
    values = Case(read_folder(Path(against))).values
    if not values:
        raise SubmissionError(f"--against {against}: no log in it has a score; give its bits per byte")
    return values


def find(path: Path, against: str | None = None) -> tuple[Case, list[Finding]]:
    """(what was read, every finding, the worst first) of a published folder. Raises SubmissionError."""
    case = Case(read_folder(path), against, to_beat(against) if against else [])
    found: list[Finding] = []
    for name, function in CHECKS.items():
        try:
            found += function(case)
        except (ValueError, OSError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError,
                MemoryError) as e:  # what no rule foresaw: the others still speak
            found.append(Finding(ERROR, name, Place(path.name), "not checked: the rule could not deal with what it "
                                 f"read ({e!r})", "report it"))
    return case, sorted(dict.fromkeys(found), key=lambda f: SEVERITIES.index(f.severity))


def to_json(case: Case, found: list[Finding]) -> str:
    """The findings for programs, and what was read of score and bytes."""
    seeds = [{"seed": seed if isinstance(seed, int) else None, "log": log.name, "line": score.bpb.at.line,
              "name": score.name, "kind": score.kind, "val_bpb": score.bpb.value,
              "val_loss": score.loss.value if score.loss else None,
              "bytes_model": int(model.value) if (model := log.model()) else None,
              "bytes_total": int(total.value) if (total := log.size("total")) else None,
              "steps": log.steps[-1].step if log.steps else None,
              "train_seconds": log.stopped.value if log.stopped else log.steps[-1].seconds if log.steps else None}
             for seed, (log, score) in case.chosen.items()]
    counts = {severity: sum(f.severity == severity for f in found) for severity in SEVERITIES}
    code = {name: case.folder.programs[name].size for name in case.folder.counted}
    claimed = case.folder.claim.bpb.value if case.folder.claim and case.folder.claim.bpb else None
    value = {"folder": case.folder.path.name, "claimed_val_bpb": claimed, "seeds": seeds, "bytes_code": code,
             "counts": counts, "findings": [asdict(f) for f in found]}
    return json.dumps(value, indent=1) + "\n"
