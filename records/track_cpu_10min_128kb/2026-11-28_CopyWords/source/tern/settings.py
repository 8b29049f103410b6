"""Settings of a program: one frozen dataclass, filled from defaults < preset < environment < command line."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import field, fields, replace
from typing import Any

from tern.command import Parser
from tern.errors import Foreseen


class ConfigError(Foreseen):
    """A setting that cannot be used; the message names it, its value and what to do."""

    status, shared = 2, True


def setting(default, why: str, low: float = -math.inf, high: float = math.inf, free: bool = False,
            in_file: bool | str = False):
    """A field of the dataclass: its default, which also says its type, the reason for it, and the range of a number.

    free: it changes no formula, so a run may be resumed with another value. in_file: a model is rebuilt from it, so an
    artifact has it; "changed": only where it is not the default, which is what files without it mean.
    """
    return field(default=default, metadata={"why": why, "low": low, "high": high, "free": free, "in_file": in_file})


def need(ok: bool, config, name: str, rule: str) -> None:
    """Raises ConfigError, which names the setting, its value and the rule, unless ok."""
    if not ok:
        raise ConfigError(f"{name}={getattr(config, name)!r}: {rule}")


def check_types(config) -> None:
    """Raises ConfigError unless every setting has the type of its default and, if a number, lies in its range."""
    for f in fields(config):
        value, kind, low, high = getattr(config, f.name), type(f.default), f.metadata["low"], f.metadata["high"]
        whole_for_float = kind is float and type(value) is int
        need(type(value) is kind or whole_for_float, config, f.name, f"must be a {kind.__name__}")
        if kind is int:
            high = min(high, 2**63 - 1)
        if kind in (int, float):
            finite = abs(value) < math.inf
            need(low <= value <= high and finite, config, f.name, f"must be between {low} and {high}")


def formula(config) -> dict:
    """The settings that decide what a run computes."""
    return {f.name: getattr(config, f.name) for f in fields(config) if not f.metadata["free"]}


def for_file(config) -> dict:
    """The settings that an artifact has."""
    return {f.name: getattr(config, f.name) for f in fields(config)
            if f.metadata["in_file"] is True or f.metadata["in_file"] and getattr(config, f.name) != f.default}


def from_file(config_class: type[Any], held: object) -> dict:
    """What an artifact says, as arguments for the settings' class. Raises ConfigError unless it says just what a model
    is rebuilt from: with a setting of another version that is left out it would be another model."""
    known = {f.name: f.metadata["in_file"] for f in fields(config_class) if f.metadata["in_file"]}
    held = held if isinstance(held, dict) else {}
    missing = [name for name, needed in known.items() if needed is True and name not in held]
    wrong = missing or [name for name in held if name not in known]
    if wrong:
        raise ConfigError(f"the artifact's configuration is not one of this trainer: {str(wrong[0])[:40]!a} is "
                          + ("missing" if missing else "not known"))
    return held


def check_start(held: Mapping | None, config, where: str) -> None:
    """Raises ConfigError unless the run's model computes what one whose file says held, as in for_file, does.

    The lengths of sequences may be others, and attention's window where training's sequences fit in it. held None: a
    checkpoint of a run, whose tensors may start other models.
    """
    if held is None:
        return
    known = {f.name: f.default for f in fields(config) if f.metadata["in_file"]} | dict(held)
    for name, value in known.items():
        ours = getattr(config, name, None)
        holds_all = name == "attn_window" and all(w == 0 or w >= config.train_seq_len for w in (value, ours))
        if value != ours and name not in ("train_seq_len", "eval_seq_len") and not holds_all:
            raise ConfigError(f"{where}: its model has {name}={str(value)[:40]}, this run's {ours}: give the same")


def differences(theirs: object, config) -> list[str]:
    """Where other settings, a JSON object's, would compute something else; a setting that they lack has its default,
    as one that came later did nothing then."""
    known = {f.name: f.default for f in fields(config)} | (theirs if isinstance(theirs, dict) else {})
    return [f"{name}={known[name]} (now {value})" for name, value in formula(config).items() if known[name] != value]


def parse(name: str, text: str, kind: type, where: str):
    """The value of a setting's text. Raises ConfigError, which says where the text is from."""
    try:
        if kind is bool:
            return {"1": True, "true": True, "on": True, "0": False, "false": False, "off": False}[text.lower()]
        return kind(text)
    except (ValueError, KeyError):
        raise ConfigError(f"{where} {name}={text!r}: a {kind.__name__} is needed") from None


def resolve(config_class: type[Any], presets: Mapping[str, dict], default_preset: str, description: str,
            argv: list[str], env: Mapping[str, str]) -> tuple[str, Any, dict[str, str]]:
    """(preset, settings, where each that is no default came from).

    The environment has upper-case names. Raises ConfigError; argparse exits on an unknown flag.
    """
    kinds = {f.name: type(f.default) for f in fields(config_class)}
    p = Parser(description=description, allow_abbrev=False)
    p.add_argument("--preset", choices=presets, help=f"named settings (default here: {default_preset})")
    for f in fields(config_class):
        shown = {True: "on", False: "off"}[f.default] if isinstance(f.default, bool) else f.default
        text = f"{f.metadata['why']} (default: {shown})".replace("%", "%%")
        names = dict.fromkeys(("--" + f.name.replace("_", "-"), "--" + f.name))  # both spellings
        p.add_argument(*names, metavar=kinds[f.name].__name__.upper(), help=text)
    args = vars(p.parse_args(argv))
    preset = args.pop("preset") or env.get("PRESET") or default_preset
    if preset not in presets:
        raise ConfigError(f"PRESET={preset!r}: choose one of {', '.join(presets)}")
    values, origin = dict(presets[preset]), dict.fromkeys(presets[preset], "preset")
    in_env = {name: env[name.upper()] for name in kinds if env.get(name.upper(), "") != ""}
    in_argv = {name: text for name, text in args.items() if text is not None}
    for where, texts in (("environment", in_env), ("command line", in_argv)):
        for name, text in texts.items():
            values[name], origin[name] = parse(name, text, kinds[name], where), where
    try:
        return preset, config_class(**values), origin
    except ConfigError as e:
        name = str(e).partition("=")[0]
        if origin.get(name) == "environment":
            raise ConfigError(f"{e} (from the environment, {name.upper()})") from None
        raise


def changed(config, name: str, value):
    """config with one setting changed; None where that is no valid configuration."""
    try:
        return replace(config, **{name: value})
    except ConfigError:
        return None


def largest(fits: Callable[[int], bool], start: int, step: int) -> int:
    """The largest multiple of step that fits; fits must hold up to it. 0 if none does.

    Tries numbers up to some 1,000 times the start.
    """
    low, high = 0, 1  # in units of step: low fits or is 0
    while fits(high * step) and high * step < 1000 * start:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * step) else (low, middle)
    return low * step
