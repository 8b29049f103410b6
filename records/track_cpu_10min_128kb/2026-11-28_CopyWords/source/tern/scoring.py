"""A score by a fresh process, which has only the file."""

from __future__ import annotations

import json
import os
import secrets
import shlex
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tern import command, processes
from tern.files import sha256_file
from tern.shards import AuditError


def score_in_fresh_process(program: Sequence[str], artifact: Path, options: Sequence[str], count: int,
                           env: Mapping[str, str], data_sha256: Mapping[str, str], show: Callable[[str], None]) -> dict:
    """Run the scoring program on the file, in `count` processes, keep its JSON as score.json beside it, and return it;
    what is behind that score becomes details.json.

    program: script and arguments before the file; options: those after it. env: what is added to the environment.
    data_sha256: file -> sha256 of what must be scored. show: takes the lines that are printed. Raises AuditError.
    """
    out, details = (artifact.parent / f".{name}.{secrets.token_hex(4)}.tmp" for name in ("score.json", "details.json"))
    words = [*processes.launcher(count), *program, str(artifact), *options]
    env = processes.environment_alone(os.environ) | dict(env) | {command.FOLLOWED: str(os.getpid())}
    done = subprocess.run([*words, "--json", str(out), "--details", str(details)], env=env, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace")
    for line in done.stdout.rstrip().splitlines():
        show(f"| {line}")
    if done.returncode or not out.exists():
        raise AuditError(f"scoring failed (status {done.returncode}); see above, or run: {shlex.join(words)}")
    scored = json.loads(out.read_text(encoding="utf-8"))
    expected = {name: sha for name, sha in data_sha256.items() if name in scored["data"]["sha256"]}
    if scored["artifact"]["sha256"] != sha256_file(artifact) or scored["data"]["sha256"] != expected:
        raise AuditError(f"{out}: the scored artifact or data are not those of this run; do not change files while it "
                         "scores")
    out.replace(artifact.parent / "score.json")
    if details.exists():
        details.replace(artifact.parent / "details.json")
    return scored
