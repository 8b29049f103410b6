"""The competition's rule for a record: better than the last one by so many nats, at this p, over seeds."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pack
from records import rules
from records.rules import SubmissionError


@dataclass(frozen=True)
class SeedScore:
    val_bpb: float


@dataclass(frozen=True)
class Record:
    """Of an older submission.json, what a claim is tested against."""

    track: str
    seeds: list[SeedScore]
    data_sha256: dict[str, str]
    name: str = ""
    date: str = ""
    files: dict[str, rules.Listed] = field(default_factory=dict)


def p_value(values: list[float], record: list[float], margin: float = 0.0) -> float:
    """One-sided p of values that are no more than margin below the record's: the chance of such values if so.

    Against one number the t-test of one sample, against several Welch's. nan where nothing can be said: one value.
    """
    from scipy import stats  # a second to import, and only this needs it

    if len(values) < 2:
        return math.nan
    raised = [value + margin for value in values]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # equal values: p is then 0, 1 or nan, as it should be
        if len(record) == 1:
            return float(stats.ttest_1samp(raised, record[0], alternative="less").pvalue)
        return float(stats.ttest_ind(raised, record, equal_var=False, alternative="less").pvalue)


def margin_bpb(val_loss: float, val_bpb: float) -> float:
    """The nats of the rule in bits per byte, as a model's losses compare."""
    return rules.RECORD_NATS * val_bpb / val_loss if val_loss > 0 else math.inf


def weigh(values: list[float], others: list[float], margin: float) -> tuple[float, str]:
    """(p that values are not margin below others, the comparison in words), all of them bits per byte."""
    better, p = statistics.mean(others) - statistics.mean(values), p_value(values, others, margin)
    return p, (f"{better:+.6f} bpb better than {statistics.mean(others):.6f} (n = {len(others)}), p = "
               f"{p_value(values, others):.3g}; by {rules.RECORD_NATS} nats = {margin:.6f} bpb: p = {p:.3g}")


def read_record(text: str) -> tuple[list[float], Record | None]:
    """(bits per byte, the record) of --against: a number, a folder or its submission.json. Raises SubmissionError.

    For a number, and for a record of one seed, there is one value; for a number there is no record.
    """
    try:
        value = float(text)
    except ValueError:
        path = Path(text) / "submission.json" if Path(text).is_dir() else Path(text)
        record = rules.read_json(pack.read_bytes(path), Record, str(path))
        if not record.seeds:
            raise SubmissionError(f"{path}: has no seeds") from None
        return [seed.val_bpb for seed in record.seeds], record
    if not 0 < value < math.inf:
        raise SubmissionError(f"--against {text}: not a number of bits per byte")
    return [value], None


def weigh_claim(summary: Mapping, claimed: bool, against: str | None) -> tuple[list[str], str]:
    """(what speaks against the claim of a record, a line each; the statistics in words) by the competition's rule.

    Against a record whose program ran in turn with this one it must hold by that record's seeds and by the pairs: only
    these were on one machine in the same hours, but their logs are all that there is of those runs.
    summary: of rules.summarize. Raises SubmissionError where `against` cannot be read.
    """
    if against is None:
        if claimed:
            return ["a record is claimed and was not tested: give --against, the record's folder or its bits per byte"
                    ], "none made"
        return [], "none made"
    faults, values = [], [row["val_bpb"] for row in summary["seeds"]]
    others, record = read_record(against)
    if record and record.track != summary["track"]:
        faults.append(f"--against {against}: a record of track {record.track}, not {summary['track']}")
    if record and validation_hashes(record.data_sha256) != validation_hashes(summary["data_sha256"]):
        faults.append(f"--against {against}: scored on other validation data")
    margin = margin_bpb(summary["val_loss"], summary["val_bpb"])
    p, text = weigh(values, others, margin)
    rival = summary.get("rival")
    if record and rival and (record.name, record.date) == (rival["name"], rival["date"]):
        program = record.files.get("train_gpt.py")
        for row in rival["seeds"]:
            if program is None or list(row["code_sha256"].values()) != [program.sha256]:
                faults.append(f"--against {against}: seed {row['seed']} ran beside another program than that record's")
        pairs = [row["difference"] for row in rival["seeds"]]
        in_turn = p_value(pairs, [0.0], margin)
        text += f"; in turn with its program {-statistics.mean(pairs):+.6f} ({len(pairs)} pairs): p = {in_turn:.3g}"
        p = math.nan if math.isnan(in_turn) else max(p, in_turn)
    if claimed and not p < rules.RECORD_P:
        faults.append(f"a record is claimed, but: {text}, which must be below {rules.RECORD_P}")
    return faults, text


def validation_hashes(data_sha256: Mapping[str, str]) -> set[str]:
    return {sha for name, sha in data_sha256.items() if "_val_" in name}
