"""The PowerShell scripts: they parse, run on 5.1, and the command that they build is one that train*.py takes."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tree_sitter_powershell
from tree_sitter import Language, Node, Parser

REPOSITORY = Path(__file__).resolve().parents[2]
TRAINING = {"run_train_5090.ps1": "train", "run_stage2_train.ps1": "train_vlm"}
STAGE1, STAGE2 = TRAINING
SCRIPTS = [*TRAINING, "scripts/invoke_python.ps1"]
# Operators of PowerShell 7 that 5.1 does not know.
TOO_NEW = {"&&", "||", "??", "??=", "?.", "?["}


def parse(source: str) -> Node:
    return Parser(Language(tree_sitter_powershell.language())).parse(source.encode()).root_node


def walk(node: Node, *kinds: str) -> Iterator[Node]:
    if not kinds or node.type in kinds:
        yield node
    for child in node.children:
        yield from walk(child, *kinds)


def text(node: Node) -> str:
    return node.text.decode()


def defects(source: str) -> list[str]:
    """What the grammar does not understand, or misses, or what Windows PowerShell 5.1 would refuse."""
    found = []
    for node in walk(parse(source)):
        line = node.start_point[0] + 1
        if node.is_error or node.is_missing:
            found.append(f"line {line}: {'missing ' + node.type if node.is_missing else 'not understood'}")
        elif node.child_count == 0 and node.type != "comment" and text(node) in TOO_NEW:
            found.append(f"line {line}: {text(node)} needs PowerShell 7")
    return found


class TrainingScript:
    """What a training script declares: parameters, arguments (literals and $Variables), the Python file it runs."""

    def __init__(self, source: str) -> None:
        root = parse(source)
        self.types, self.defaults, self.patterns = {}, {}, {}
        for parameter in walk(root, "script_parameter"):
            name = next(text(c) for c in parameter.children if c.type == "variable")
            self.types[name] = text(next(walk(parameter, "type_literal"))).strip("[]").strip()
            default = next((text(d) for d in walk(parameter, "script_parameter_default")), "=")
            self.defaults[name] = default.lstrip("= ").strip("'")
            for attribute in walk(parameter, "attribute"):
                if "ValidatePattern" in text(attribute):
                    self.patterns[name] = text(next(walk(attribute, "verbatim_string_characters"))).strip("'")
        assigned = next(a for a in walk(root, "assignment_expression") if text(a).startswith("$arguments"))
        array = next(walk(assigned, "array_expression"))
        leaves = list(walk(array, "verbatim_string_characters", "variable"))
        # What follows the array: "+ $TrainArguments", the flags that are passed through.
        leaves += [n for n in walk(assigned, "variable") if n.start_byte >= array.end_byte]
        command = text(next(c for c in walk(root, "command") if text(c).startswith("&")))
        self.python_script = re.search(r"-Script '([^']+)' -Arguments \$arguments$", command)[1]
        self.arguments = [text(n).strip("'") for n in leaves]

    def command(self, call: str) -> list[str]:
        """The arguments that ``call`` (without the script's name) makes of this script."""
        given, rest, words = dict(self.defaults), [], iter(shlex.split(call))
        for word in words:
            if word.startswith("-") and not word.startswith("--"):
                name = next(p for p in self.types if p.lower() == f"${word[1:].lower()}")
                given[name] = next(words)
                assert re.fullmatch(self.patterns.get(name, ".*"), given[name]), f"{given[name]} refused for {name}"
            else:
                rest.append(word)
        return [word for a in self.arguments for word in (rest if a == "$TrainArguments" else [given.get(a, a)])]


def source_of(name: str) -> str:
    return (REPOSITORY / name).read_text(encoding="ascii")  # 5.1 reads a file without BOM as ANSI


def accepted(stage: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    monkeypatch.setattr(sys, "argv", [f"{stage}.py", *arguments])
    return importlib.import_module(stage).parse_args()


@pytest.mark.parametrize("name", SCRIPTS)
def test_parses_and_runs_on_5_1(name: str) -> None:
    assert defects(source_of(name)) == []


def test_a_redirected_line_on_stderr_does_not_end_the_run() -> None:
    """5.1 makes an error record of it (2>&1, Tee-Object), at which 'Stop' would end the script."""
    root = parse(source_of("scripts/invoke_python.ps1"))
    call = next(node for node in walk(root, "command") if text(node).startswith("& $python"))
    settings = [text(node) for node in walk(root, "assignment_expression") if node.start_byte < call.start_byte]
    preferences = [line for line in settings if line.startswith("$ErrorActionPreference")]
    assert preferences[-1] == "$ErrorActionPreference = 'Continue'"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("param(", "param(("),
        ("'1e-4'", "'1e-4"),
        ("[int] $Epochs = 5,", "[int] $Epochs = ,"),
        ("exit $LASTEXITCODE", "& { Get-Item x"),
        ("exit $LASTEXITCODE", "Get-Item x && exit 0"),
        ("exit $LASTEXITCODE", "exit ($LASTEXITCODE ?? 1)"),
    ],
)
def test_a_broken_script_is_noticed(old: str, new: str) -> None:
    source = source_of(STAGE1)
    assert old in source and defects(source.replace(old, new, 1))


@pytest.mark.parametrize(
    ("name", "call", "expected"),
    [
        (STAGE1, "-BatchSize 3 -Lr 1e-3", {"epochs": 5, "batch_size": 3, "lr": 1e-3}),
        (STAGE1, "", {"epochs": 5, "batch_size": 2, "lr": 1e-4, "objective": "align"}),
        (STAGE1, "-epochs 1 --objective align", {"epochs": 1, "objective": "align"}),
        (STAGE2, "", {"epochs": 20, "batch_size": 1, "lr": 2e-5, "max_visual_tokens": 96, "from_scratch": False}),
        (STAGE2, "-Epochs 2 -Lr 1E-05 --from_scratch", {"epochs": 2, "lr": 1e-5, "from_scratch": True}),
        (STAGE2, "-BatchSize 3 -MaxVisualTokens 64", {"batch_size": 3, "max_visual_tokens": 64}),
    ],
)
def test_builds_a_command_that_the_stage_takes(name: str, call: str, expected: dict, monkeypatch) -> None:
    script = TrainingScript(source_of(name))
    assert script.python_script == f"{TRAINING[name]}.py"
    args = vars(accepted(TRAINING[name], script.command(call), monkeypatch))
    assert {key: args[key] for key in expected} == expected


@pytest.mark.parametrize("name", TRAINING)
def test_the_examples_of_its_help_work(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    script = TrainingScript(source_of(name))
    examples = re.findall(rf"(?m)^\.\\{re.escape(name)}(.*)$", source_of(name).replace("\r", ""))
    assert len(examples) == 2
    for example in examples:
        accepted(TRAINING[name], script.command(example), monkeypatch)


@pytest.mark.parametrize("name", TRAINING)
def test_learning_rate_is_text_with_a_decimal_point(name: str) -> None:
    """As [double] it would be written with the culture's comma."""
    script = TrainingScript(source_of(name))
    assert script.types["$Lr"] == "string" and script.types["$Epochs"] == script.types["$BatchSize"] == "int"
    pattern = re.compile(script.patterns["$Lr"])
    assert all(pattern.search(good) for good in ("1e-4", "2e-5", "0.0001", "1E-05", ".5", "3"))
    for bad in ("0,0001", "1e", "-1e-4", "1e-4;rm", "", "1e-4 --epochs 9"):
        assert not pattern.search(bad)


@pytest.mark.parametrize("shell", [shell for shell in ("pwsh", "powershell") if shutil.which(shell)])
@pytest.mark.parametrize("status", [0, 7])
def test_runs_for_real(shell: str, status: int, tmp_path: Path) -> None:
    """With a train.py that prints its arguments and leaves with a status of its own."""
    folder = tmp_path / "a folder with [brackets]"
    (folder / "scripts").mkdir(parents=True)
    for name in SCRIPTS:
        shutil.copy(REPOSITORY / name, folder / name)
    program = f"import os, sys; print(sys.argv[1:], os.getcwd(), '报告'); sys.exit({status})"
    (folder / "train.py").write_text(program, encoding="utf-8")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "VIRTUAL_ENV": sys.prefix, "PATH": path}
    call = ["-NoProfile", "-File", str(folder / "run_train_5090.ps1"), "-Lr", "1e-4", "--objective", "align"]
    if os.name == "nt":
        call[:0] = ["-ExecutionPolicy", "Bypass"]
    options = {"capture_output": True, "encoding": "utf-8", "check": False, "timeout": 120}
    done = subprocess.run([shutil.which(shell), *call], env=environment, **options)
    assert done.returncode == status, done.stderr
    expected = ["--epochs", "5", "--batch_size", "2", "--lr", "1e-4", "--objective", "align"]
    assert str(expected) in done.stdout and folder.name in done.stdout and "报告" in done.stdout
