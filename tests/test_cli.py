"""The command `gsprune`: its commands, what it says of a wrong one, completion."""

from __future__ import annotations

import sys

import pytest
from facts import assert_tells

from gsprune import cli


def test_a_command_that_does_not_exist_leads_to_the_nearest(capsys):
    assert cli.main(["reprot", "x"]) == 1
    assert_tells(capsys.readouterr().err.strip(), "reprot", "did you mean 'report'?", *cli.COMMANDS)


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--help"])
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, (*_, what) in cli.COMMANDS.items():
        assert name in text
        assert what in text


@pytest.mark.parametrize("name", [*cli.COMMANDS])
def test_every_command_has_a_help_of_its_own(name, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: gsprune {name}")


def test_completion_knows_commands_and_their_options(capsys):
    pytest.importorskip("shtab")
    assert cli.main(["--print-completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert all(name in script for name in cli.COMMANDS)
    assert "--tracking-uri" in script
    assert "--sparsity" in script
    assert cli.main(["--print-completion", "cmd"]) == 1
    assert_tells(capsys.readouterr().err.strip(), "cmd", "bash", "zsh")


def test_completion_without_its_package_says_which(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert cli.main(["--print-completion", "bash"]) == 1
    assert_tells(capsys.readouterr().err.strip(), "shtab", "gsprune[app]")
