"""tern/settings.py: where a setting's value comes from, and every way to get it wrong."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from tern import settings
from tern.settings import ConfigError, need, setting

pytestmark = pytest.mark.fast


@dataclass(frozen=True)
class Oven:
    """A program's settings, one of each type."""

    degrees: int = setting(180, "how hot", 0, 300, in_file=True)
    minutes: float = setting(45.0, "how long; 100% is done", 0, in_file="changed")
    fan: bool = setting(False, "whether air moves")
    bread_name: str = setting("", "what it is", free=True)

    def __post_init__(self):
        settings.check_types(self)
        need(self.degrees < 250 or self.fan, self, "degrees", "needs the fan")


PRESETS = {"slow": {}, "fast": {"degrees": 240, "minutes": 10}}


def resolve(*argv: str, **env: str) -> tuple[str, Oven, dict[str, str]]:
    return settings.resolve(Oven, PRESETS, "slow", "Bake.", list(argv), env)


def test_defaults_then_preset_then_environment_then_command_line():
    assert resolve() == ("slow", Oven(), {})
    preset, oven, origin = resolve("--preset", "fast", "--degrees", "200", "--bread_name=rye", MINUTES="9", FAN="on",
                                   DEGREES="100", BREAD_NAME="")
    assert preset == "fast" and oven == Oven(200, 9.0, True, "rye")
    assert origin == {"degrees": "command line", "minutes": "environment", "fan": "environment",
                      "bread_name": "command line"}
    preset, oven, origin = resolve("--minutes", "1", PRESET="fast")
    assert (preset, oven.degrees, origin["degrees"]) == ("fast", 240, "preset")
    assert resolve("--preset", "slow", PRESET="fast")[0] == "slow"
    with pytest.raises(AttributeError):
        oven.degrees = 1


def test_a_switch_is_read_in_words():
    for value, texts in ((True, ("1", "true", "on", "TRUE")), (False, ("0", "false", "off"))):
        assert all(resolve("--fan", text)[1].fan is value for text in texts)


@pytest.mark.parametrize("argv", [["--no-such-flag", "1"], ["--degrees"], ["--preset", "huge"], ["--deg", "1"], ["x"]])
def test_what_is_no_setting_is_one_line_and_status_2(argv, capsys):
    with pytest.raises(SystemExit) as e:
        resolve(*argv)
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.parametrize(("argv", "env", "said"), [
    (["--degrees", "x"], {}, "degrees='x': a int"),
    (["--degrees", "1.5"], {}, "degrees='1.5'"),
    ([], {"FAN": "maybe"}, "environment fan='maybe'"),
    (["--fan", "2"], {}, "command line fan='2'"),
    ([], {"PRESET": "nope"}, "PRESET='nope': choose one of slow, fast"),
    (["--minutes", "nan"], {}, "minutes=nan: must be between 0 and inf"),
    (["--minutes", "inf"], {}, "minutes=inf"),
    (["--minutes", "-1"], {}, "minutes=-1.0"),
    (["--degrees", "99999999999999999999"], {}, "degrees=99999999999999999999: must be between 0 and 300"),
    (["--degrees", "260"], {}, "degrees=260: needs the fan"),
    ([], {"DEGREES": "301"}, r"degrees=301: must .*from the environment, DEGREES"),
])
def test_a_bad_value_is_named_with_what_would_do(argv, env, said):
    with pytest.raises(ConfigError, match=said):
        resolve(*argv, **env)


def test_types_are_those_of_the_defaults():
    assert Oven(minutes=3).minutes == 3  # a whole number will do for a float
    for wrong in ({"degrees": 3.0}, {"degrees": True}, {"fan": 1}, {"bread_name": None}, {"minutes": "3"}):
        with pytest.raises(ConfigError, match=f"{next(iter(wrong))}=.*must be a"):
            Oven(**wrong)


def test_every_setting_has_its_default_and_its_reason_in_the_help(capsys):
    with pytest.raises(SystemExit) as e:
        resolve("--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert e.value.code == 0 and shown.count("(default") == 5
    assert "how long; 100% is done (default: 45.0)" in shown and "whether air moves (default: off)" in shown


def test_another_value_of_a_free_setting_is_the_same_run():
    theirs = {"degrees": 180, "minutes": 45.0, "fan": True, "bread_name": "rye"}
    assert settings.differences(theirs, Oven(fan=True)) == []
    assert settings.differences(theirs, Oven(190)) == ["degrees=180 (now 190)", "fan=True (now False)"]
    assert settings.differences({"degrees": 180}, Oven()) == []  # as saved before the others were there
    assert settings.differences("rubbish", Oven(fan=True)) == ["fan=False (now True)"]


def test_a_file_has_what_it_is_rebuilt_from_and_nothing_else():
    assert settings.for_file(Oven(fan=True)) == {"degrees": 180}
    for oven in (Oven(), Oven(200, 9.0)):
        assert Oven(**settings.from_file(Oven, settings.for_file(oven))) == oven
    for held, said in (({}, "'degrees' is missing"), ({"minutes": 9.0}, "'degrees' is missing"), (None, "missing"),
                       ({"degrees": 1, "fan": True}, "'fan' is not known"), ({"degrees": 1, "\n": 2}, "is not known")):
        with pytest.raises(ConfigError, match=said) as e:
            settings.from_file(Oven, held)
        assert "\n" not in str(e.value)
