"""Rules ignored with a reason: on the command line and in a project's file, by code, name, or beginning of a code."""

import os
from pathlib import Path

import pytest

from nanhunt.errors import NanhuntError
from nanhunt.findings import Finding, Location, Report, Skip, Verdict
from nanhunt.rules.registry import all_rules
from nanhunt.settings import ignored_rules

NH2 = [rule.code for rule in all_rules() if rule.code.startswith("NH2")]
HELP = 'write: [tool.nanhunt] ignore = {NH402 = "summed in float32 by our kernel"}'


@pytest.fixture
def project(tmp_path):
    """Writes a project's file; gives its folder."""

    def write(text):
        (tmp_path / "pyproject.toml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return tmp_path

    return write


def refusal(given=(), folder=None):
    with pytest.raises(NanhuntError) as caught:
        ignored_rules(given, folder)
    assert caught.value.exit_code == 2
    return caught.value


# What is understood


def test_nothing_is_ignored_without_a_word(tmp_path):
    assert ignored_rules((), tmp_path) == {}


@pytest.mark.parametrize("text", ["", "[tool.other]\nx = 1\n", "[tool.nanhunt]\n", "[tool.nanhunt]\nignore = {}\n"])
def test_project_that_says_nothing_ignores_nothing(project, text):
    assert ignored_rules((), project(text)) == {}


@pytest.mark.parametrize("word", ["NH304", "nh304", "lost-update"])
def test_rule_is_named_by_its_code_or_name(project, word):
    folder = project(f'[tool.nanhunt]\nignore = {{{word} = "the schedule ends at 0"}}\n')
    assert ignored_rules((), folder) == {"NH304": "the schedule ends at 0"}
    assert ignored_rules([f"{word}=the schedule ends at 0"], folder.parent) == {"NH304": "the schedule ends at 0"}


def test_table_may_be_written_out(project):
    folder = project('[tool.nanhunt.ignore]\nNH304 = "a"\nNH501 = "b"\n')
    assert ignored_rules((), folder) == {"NH304": "a", "NH501": "b"}


@pytest.mark.parametrize("start", ["NH2", "nh2"])
def test_beginning_of_a_code_is_every_rule_that_begins_so(tmp_path, start):
    assert ignored_rules([f"{start}=eigenvectors are detached"], tmp_path) == dict.fromkeys(
        NH2, "eigenvectors are detached"
    )
    tens = {code for code in NH2 if code.startswith("NH20")}
    assert set(ignored_rules([f"{start}0=x"], tmp_path)) == tens


def test_longer_beginning_and_whole_code_go_before_a_shorter_one(tmp_path):
    for given in (["NH2=a", "NH20=b", "NH203=c"], ["NH203=c", "NH20=b", "NH2=a"]):
        reasons = ignored_rules(given, tmp_path)
        assert reasons["NH203"] == "c"
        assert reasons["NH202"] == "b"
    assert ignored_rules(["zero-gradient=c", "NH2=a"], tmp_path)["NH205"] == "c"


def test_command_line_goes_before_the_project(project):
    folder = project('[tool.nanhunt]\nignore = {NH304 = "theirs", NH501 = "theirs"}\n')
    assert ignored_rules(["NH304=mine"], folder) == {"NH304": "mine", "NH501": "theirs"}
    assert ignored_rules(["NH3=mine"], folder)["NH304"] == "mine"


def test_reason_may_hold_anything(project):
    reason = 'a = b, "quoted", [bold], \u00fc'
    assert ignored_rules([f"NH304= {reason} "], project("")) == {"NH304": reason}


def test_file_is_looked_for_upwards_from_the_working_folder(project, monkeypatch):
    folder = project('[tool.nanhunt]\nignore = {NH304 = "a"}\n')
    below = folder / "scripts" / "today"
    below.mkdir(parents=True)
    monkeypatch.chdir(below)
    assert ignored_rules() == {"NH304": "a"}
    (folder / "scripts" / "pyproject.toml").write_text("[project]\nname = 'inner'\n")
    assert ignored_rules() == {}


def test_folder_of_that_name_is_no_file(tmp_path):
    (tmp_path / "pyproject.toml").mkdir()
    assert ignored_rules((), tmp_path) == {}


# What is refused


@pytest.mark.parametrize("text", ["NH304", "NH304=", "NH304=  ", "=x", "", "  =x"])
def test_command_line_without_rule_or_reason_is_refused(tmp_path, text):
    error = refusal([text], tmp_path)
    if text.partition("=")[2].strip():
        assert error.message.startswith("no rule ")
    else:
        assert error.message == f"--ignore {text!r} gives no reason"
        assert error.help == 'write: --ignore NH402="the reason"'


@pytest.mark.parametrize("word", ["NH999", "NH", "N", "H3", "NH3045", "lost", "*", "NH3*"])
def test_unknown_rule_is_refused(project, word):
    error = refusal([f"{word}=x"], project(""))
    assert (error.message, error.help) == (f"no rule {word!r}", "`nanhunt rules` lists them")
    folder = project(f'[tool.nanhunt.ignore]\n"{word}" = "x"\n')
    assert refusal((), folder).message == f"no rule {word!r}"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[tool]\nnanhunt = 5\n", "[tool.nanhunt] is no table"),
        ("[[tool.nanhunt]]\nignore = {}\n", "[tool.nanhunt] is no table"),
        ('[tool.nanhunt]\nignores = {NH304 = "x"}\n', "[tool.nanhunt] has an unknown key 'ignores'"),
        ('[tool.nanhunt]\nignore = "NH304"\n', "ignore in [tool.nanhunt] needs a reason for each rule"),
        ('[tool.nanhunt]\nignore = ["NH304"]\n', "ignore in [tool.nanhunt] needs a reason for each rule"),
        ("[tool.nanhunt]\nignore = {NH304 = true}\n", "ignore in [tool.nanhunt] gives no reason for NH304"),
        ('[tool.nanhunt]\nignore = {NH304 = ""}\n', "ignore in [tool.nanhunt] gives no reason for NH304"),
        ('[tool.nanhunt]\nignore = {NH304 = " \\t"}\n', "ignore in [tool.nanhunt] gives no reason for NH304"),
        ('[tool.nanhunt.ignore.NH304]\nx = "y"\n', "ignore in [tool.nanhunt] gives no reason for NH304"),
    ],
)
def test_wrong_table_is_refused(project, text, said):
    folder = project(text)
    error = refusal((), folder)
    assert error.message == f"{folder / 'pyproject.toml'}: {said}"
    assert error.help == HELP


def test_tool_that_is_no_table_says_nothing_of_us(project):
    assert ignored_rules((), project("tool = 3\n")) == {}


@pytest.mark.parametrize(
    "text",
    [
        "[tool.nanhunt\n",
        "ignore = {NH304 = 'a'\n",
        "a = 1\na = 2\n",
        b"\xff\xfe\x00",
        b"a = '\x00'\n",
        "x = " + "[" * 100_000,
        "x = " + "9" * 10_000,
        'x = "\\ud800"\n',
    ],
    ids=["table", "inline", "twice", "not utf-8", "nul", "deep", "long", "surrogate"],
)
def test_file_that_is_no_toml_is_refused(project, text):
    folder = project(text)
    error = refusal((), folder)
    assert error.message.startswith(f"cannot read {folder / 'pyproject.toml'}: ")
    assert "\n" not in error.message


def test_file_that_cannot_be_read_is_refused(project, monkeypatch):
    folder = project("")

    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied", "pyproject.toml")

    monkeypatch.setattr(Path, "read_text", denied)
    assert refusal((), folder).message == f"cannot read {folder / 'pyproject.toml'}: Permission denied"


def test_working_folder_that_is_gone_is_refused(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    os.rmdir(tmp_path / "gone")
    assert refusal().message == "cannot read the working folder: No such file or directory"


# What becomes of the finding


def found(code, name, severity="warning", tensor="head.weight"):
    location = Location("optimizer", tensor=tensor, step=3)
    return Finding(code, name, severity, "observed", name, "it is so", location)


def test_ignored_finding_is_shown_as_a_skip_with_the_reason():
    lost, log = found("NH304", "lost-update"), found("NH501", "log-of-nonpositive", "error")
    report = Report("a run", (), (lost, log), (), Verdict("observed", ()), skips=(Skip("x", "y"),))
    kept = report.ignoring({"NH304": "the schedule ends at 0", "NH999": "never"})
    assert kept.findings == (log,)
    assert kept.skips == (Skip("x", "y"), Skip("NH304 lost-update head.weight", "ignored: the schedule ends at 0"))
    assert report.ignoring({}).findings == (lost, log)
