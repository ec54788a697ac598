"""The README's Python runs as it stands."""

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_python_examples_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, str(README), "exec"), {})
    printed = capsys.readouterr().out
    # What is trained from the start visibly learns: it begins at one half.
    (right,) = re.findall(r"right on new rows: ([\d.]+)", printed)
    assert float(right) > 0.95


def test_every_option_that_is_shown_exists():
    from typer.main import get_command

    from mpocompress.cli import app

    known = {
        option
        for command in get_command(app).commands.values()
        for parameter in command.params
        for option in parameter.opts
    }
    shown = set()
    for line in README.read_text(encoding="utf-8").splitlines():
        if line.startswith("mpocompress "):
            shown |= set(re.findall(r"(?<=\s)--[a-z-]+", line.partition("#")[0]))
    assert shown
    assert shown <= known
