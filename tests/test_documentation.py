"""The manuals say what the code does: files, links, commands, flags with defaults, keys, promised strings.

Parsers are made from each script's ``parse_args`` alone, so that nothing heavy is imported.
"""

from __future__ import annotations

import argparse
import ast
import functools
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from config.schema import FIELDS, Config, keys_with_role
from engine.training.start import FINAL_FILE
from engine.training.train_state import fingerprint

REPOSITORY = Path(__file__).resolve().parents[1]
MANUALS = ("README.md", "README.zh-CN.md", "ARCHITECTURE.md")
CHINESE = "README.zh-CN.md"
LIGHT = {"__future__", "argparse", "os", "pathlib", "config", "engine.cli", "engine.environment"}
FLAG_TABLES = {
    "train.py": "6 第一阶段",
    "train_vlm.py": "7 第二阶段",
    "scripts/check_image_to_text.py": "8 单张检查",
    "scripts/run_overnight_300.py": "9 夜间网格",
    "scripts/check_data.py": "16 数据检查",
    "scripts/evaluate_reports.py": "17 报告评价",
    "scripts/prepare_data.py": "18 批量预处理",
    "scripts/adapt_language_model.py": "19 第零阶段",
    "scripts/report_folder.py": "21 整个文件夹的报告",
    "scripts/report_page.py": "20 报告页面",
}
SHOWN_TO_USERS = ["train_loss", "val_loss", "caption_loss", "平均 caption_loss", "最近 5 个 epoch 平均 caption_loss"]
SHOWN_TO_USERS += ["输入图像", "问题", "生成文本", "lm_head 已绑定到 input_embeddings"]
# Names that the code builds from parts, and the part to look for.
BUILT = {"stage1_state.previous.pt": "{path.stem}.previous"}
BUILT |= dict.fromkeys(("stage1_state.older.pt", "stage2_state.older.pt"), "{self.path.stem}.older")
BUILT |= dict.fromkeys(("vision_bridge_overnight_best_100epochs.pt", "overnight_best_summary_100epochs.txt"), 'epochs"')


def read(name: str) -> str:
    return (REPOSITORY / name).read_text(encoding="utf-8")


@functools.cache
def tracked() -> list[str]:
    if shutil.which("git"):
        command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, encoding="utf-8", check=False)
        if listed.returncode == 0:
            return listed.stdout.splitlines()
    skipped = {".venv", "outputs", ".git"}
    files = (path.relative_to(REPOSITORY) for path in REPOSITORY.rglob("*") if path.is_file())
    return [path.as_posix() for path in files if not skipped & set(path.parts)]


@functools.cache
def source() -> str:
    return "\n".join(read(name) for name in tracked() if name.endswith(".py") and not name.startswith("tests/"))


# ------------------------------------------------------------------ commands


def code_lines(text: str) -> list[str]:
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    return [line.strip() for block in blocks for line in block.splitlines()]


def commands(text: str) -> list[str]:
    """Lines of code blocks that start a script, and calls of one in the running text."""
    inline = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)
    starts = re.compile(r"(python3? |\.\\\S+\.ps1|accelerate launch |pip install |conda env create )")
    return [line for line in [*code_lines(text), *inline] if starts.match(line) and "..." not in line]


class _Parsed(Exception):
    """Carries the parser out of a script's ``parse_args``."""


@functools.cache
def parser_of(script: str) -> argparse.ArgumentParser:
    """The script's own parser; of its module only light imports, constants and ``parse_args`` are run."""
    tree = ast.parse(read(script))

    def is_needed(node: ast.stmt) -> bool:
        if isinstance(node, ast.ImportFrom):
            return node.module in LIGHT or node.module.split(".")[0] == "config"
        if isinstance(node, ast.Import):
            return all(alias.name in LIGHT for alias in node.names)
        if isinstance(node, ast.Assign):
            values = node.value.values if isinstance(node.value, ast.Dict) else [node.value]
            return all(isinstance(value, ast.Constant | ast.Tuple) for value in values)
        return isinstance(node, ast.FunctionDef) and node.name == "parse_args"

    doc = ast.get_docstring(tree)
    tree.body = [node for node in tree.body if is_needed(node)]
    names = {"__name__": "documented_script", "__doc__": doc}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REPOSITORY / "scripts"))
        exec(compile(tree, script, "exec"), names)  # noqa: S102  (the repository's own source)

        def carry(self: argparse.ArgumentParser, *_: object) -> None:
            raise _Parsed(self)

        patch.setattr(argparse.ArgumentParser, "parse_args", carry)
        with pytest.raises(_Parsed) as caught:
            names["parse_args"]()
    return caught.value.args[0]


@functools.cache
def powershell() -> ModuleType:
    """``tests/scripts/test_powershell.py``, which knows how the PowerShell scripts build their commands."""
    path = REPOSITORY / "tests" / "scripts" / "test_powershell.py"
    spec = importlib.util.spec_from_file_location("powershell_of_documentation", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def check_python(words: list[str]) -> None:
    script, arguments = words[0], words[1:]
    if script == "-c":
        compile(arguments[0], "documentation", "exec")
        return
    assert (REPOSITORY / script).is_file(), f"no such script: {script}"
    if script != "scripts/run_tests.py":  # passes everything on to pytest
        parser_of(script).parse_args(arguments)


def check_command(line: str) -> None:
    """Raises AssertionError, or SystemExit where a parser refuses a flag or its value."""
    program, *words = shlex.split(line.replace("\\", "/"))
    if program.endswith(".ps1"):
        name = program.removeprefix("./")
        assert name in powershell().TRAINING, f"no such script: {program}"
        script = powershell().TrainingScript(powershell().source_of(name))
        given = re.findall(r"(?<!\S)-([A-Za-z]+)", line)
        unknown = [word for word in given if f"${word.lower()}" not in {p.lower() for p in script.types}]
        assert not unknown, f"{name} has no parameter -{unknown[0]}"
        check_python([script.python_script, *script.command(shlex.join(words))])
    elif program == "accelerate":
        first = next(index for index, word in enumerate(words) if word.endswith(".py"))
        check_python(words[first:])
    elif program in ("pip", "conda"):
        for option, file in zip(words, words[1:], strict=False):
            assert option not in ("-r", "-f") or (REPOSITORY / file).is_file(), f"no such file: {file}"
    else:
        check_python(words)


@pytest.mark.parametrize("manual", MANUALS[:2])
def test_every_command_names_a_script_and_flags_that_exist(manual: str) -> None:
    found = commands(read(manual))
    assert len(found) >= 10
    for line in found:
        try:
            check_command(line)
        except (SystemExit, AssertionError) as problem:
            pytest.fail(f"{manual}: {line}: {problem}")


@pytest.mark.parametrize(
    "line",
    [
        "python trian.py --epochs 3",
        "python train.py --epoch_count 3",
        "python train.py --objective aline",
        "python scripts/check_image_to_text.py --imag_e a.nii.gz",
        "python scripts/run_overnight_300.py --epochs none",
        r".\run_train_5090.ps1 -Epoch 5",
        r".\run_stage2_train.ps1 -Epochs 2 --objective align",
        "pip install -r requirement.txt",
        'python -c "import torch; print("',
    ],
)
def test_a_wrong_command_would_be_noticed(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((SystemExit, AssertionError, SyntaxError)):
        check_command(line)


def test_versions_are_those_of_the_requirements() -> None:
    pinned = read("requirements.txt") + read("requirements-cuda.txt")
    named = [word for manual in MANUALS for word in re.findall(r"\b[\w-]+==[\w.]+", read(manual))]
    assert "torch==2.13.0" in named and all(requirement in pinned for requirement in named), named


PROMISED_COMMANDS = r"""
python train.py --epochs 3 --batch_size 4 --lr 1e-4
.\run_train_5090.ps1 -Epochs 5 -BatchSize 2 -Lr 1e-4
python train_vlm.py --epochs 2 --batch_size 1 --lr 1e-5 --vision_checkpoint outputs/vision_bridge_best_val.pt
python train_vlm.py --epochs 20 --batch_size 1 --lr 2e-5 --max_visual_tokens 96
python scripts/run_overnight_300.py
python scripts/run_overnight_300.py --no_grid
python scripts/check_image_to_text.py --checkpoint outputs/vision_bridge_best_val.pt --max_visual_tokens 64 --max_new_tokens 80
""".strip().splitlines()  # noqa: E501


@pytest.mark.parametrize("line", PROMISED_COMMANDS)
def test_promised_commands_are_in_the_manual_and_work(line: str) -> None:
    assert line in commands(read(CHINESE))
    check_command(line)


# ------------------------------------------------------------------ files, links, headings


def slug(heading: str) -> str:
    """The anchor that GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("manual", MANUALS)
def test_every_link_leads_somewhere(manual: str) -> None:
    text = read(manual)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        assert not file or (REPOSITORY / file).is_file(), f"{manual}: no file {file}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", read(file) if file else text, flags=re.MULTILINE)
            assert anchor in map(slug, headings), f"{manual}: no heading #{anchor}"


@pytest.mark.parametrize("manual", MANUALS)
def test_every_file_named_exists_or_is_written_by_the_code(manual: str) -> None:
    suffixes = "py|ps1|md|txt|yml|yaml|toml|json|jsonl|csv|pt|pth|png|db|log"
    names = set(re.findall(rf"(?<![\w./*:-])([\w.-]+(?:/[\w.-]+)*\.(?:{suffixes}))(?![\w.*])", read(manual)))
    assert len(names) > 10
    basenames = {Path(name).name for name in tracked()}
    for name in names:
        base = Path(name).name
        evidence = BUILT.get(base, re.sub(r"^stage[012]_", "_", base))
        if name.endswith((".py", ".ps1", ".md", ".yml", ".toml")):
            assert name in tracked() if "/" in name else base in basenames, f"{manual}: no file {name}"
        else:
            assert name in tracked() or base in basenames or evidence in source(), f"{manual}: nobody writes {name}"


def test_architecture_has_seven_sections_the_last_on_cmi_and_roi() -> None:
    text = read("ARCHITECTURE.md")
    headings = re.findall(r"^## (.*)$", text, flags=re.MULTILINE)
    assert [heading.split(".")[0] for heading in headings] == list("1234567")
    assert headings[6] == "7. CMI and RoI"
    seventh = text.split("\n## 7. ")[1]
    for key in ("use_cmi", "cmi_compress_to: 512", "roi_side: 7", "retrain"):
        assert key in seventh


def test_architecture_names_every_scan_backend_and_no_other() -> None:
    from models.selective_scan import BACKENDS

    section = read("ARCHITECTURE.md").split("\n## 5. ")[1].split("\n## 6. ")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, flags=re.MULTILINE) == [backend.name for backend in BACKENDS]


# ------------------------------------------------------------------ the reading path


def imports_of(file: str) -> set[str]:
    """Files of the project that ``file`` imports, as paths."""
    found = set()
    for node in ast.walk(ast.parse(read(file))):
        if (
            isinstance(node, ast.ImportFrom)
            and node.module
            and node.module.split(".")[0] in ("data", "engine", "models")
        ):
            candidates = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            paths = [name.replace(".", "/") for name in candidates]
            found |= {name for path in paths for name in (f"{path}.py", f"{path}/__init__.py") if name in tracked()}
    return found


def test_the_core_is_read_in_one_sitting() -> None:
    """At most 14 files and 2,200 lines, which import only each other and the machinery that is named beside them."""
    first = read("ARCHITECTURE.md").split("\n## 1. ")[1].split("\n## 2. ")[0]
    path = re.findall(r"^\| `([\w/]+\.py)` \|", first, flags=re.MULTILINE)
    assert path[0] == "train_vlm.py" and len(path) == len(set(path)) <= 14
    assert sum(len(read(file).splitlines()) for file in path) <= 2200
    machinery = first.split("| call | machinery |")[1]
    named = re.findall(r"`([\w/.]+)`", machinery)
    for file in path:
        for imported in imports_of(file) - set(path):
            assert any(imported == name or (name.endswith("/") and imported.startswith(name)) for name in named), (
                f"{file} imports {imported}, which ARCHITECTURE.md §1 does not name"
            )


def test_no_folder_has_more_than_16_python_files_and_imports_run_one_way() -> None:
    code = [Path(name) for name in tracked() if name.endswith(".py")]
    named = {Path("scripts"), Path("tests/scripts")}  # users know each command by its name
    folders = {path.parent for path in code} - named
    assert max(sum(path.parent == folder and path.name != "__init__.py" for path in code) for folder in folders) <= 16
    for path in code:
        top = path.parts[0]
        if top in ("data", "models"):
            other = {"data": "models", "models": "data"}[top]
            wrong = [name for name in imports_of(path.as_posix()) if name.startswith((f"{other}/", "engine/"))]
            assert not wrong, f"{path} imports {wrong}"
        if top in ("data", "models", "engine") and "phantom" not in path.parts:
            assert not [name for name in imports_of(path.as_posix()) if "/phantom/" in name], path


# ------------------------------------------------------------------ keys, flags, strings


def shown(default: object) -> str:
    if default is None:
        return "—"
    if isinstance(default, Path):
        default = default.as_posix()
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


def rows(text: str) -> dict[str, str]:
    """First cell → second cell of the table rows whose first cell is code."""
    return dict(re.findall(r"^\| `([^`]+)` \| ([^|]*?) \|", text, flags=re.MULTILINE))


def section(title: str) -> str:
    return read(CHINESE).split(f"\n## {title}")[1].split("\n## ")[0]


def test_every_configuration_key_is_in_the_chinese_manual_with_its_default() -> None:
    expected = {key: shown(getattr(Config(), key)) for key in FIELDS}
    assert rows(section("5 配置逐键说明")) == expected


@pytest.mark.parametrize("script", FLAG_TABLES)
def test_every_flag_is_in_the_chinese_manual_with_its_default(script: str) -> None:
    flags = [action for action in parser_of(script)._actions if action.option_strings]
    actions = [a for a in flags if a.help != argparse.SUPPRESS and a.dest != "help"]
    documented = {name: cell for name, cell in rows(section(FLAG_TABLES[script])).items() if name.startswith("--")}
    assert list(documented) == [action.option_strings[0] for action in actions]
    for action in actions:
        cell = documented[action.option_strings[0]]
        if action.nargs == 0:
            assert cell == "关"
        elif action.default not in (None, []):
            assert cell == shown(action.default), f"{action.option_strings[0]}: {action.default}"
        else:
            assert not cell.startswith("`")


@pytest.mark.parametrize("promise", SHOWN_TO_USERS)
def test_promised_strings_are_in_the_chinese_manual(promise: str) -> None:
    assert promise in read(CHINESE)


def code_of(text: str) -> set[str]:
    return set(re.findall("`([^`]+)`", text))


def test_what_must_agree_with_a_checkpoint_is_listed() -> None:
    """Section 7, and the keys' roles. Slices and the crop's side are in both lists, for 2-D and 3-D, or by policy."""
    [line] = [line for line in section("7 第二阶段").splitlines() if "必须与检查点一致" in line]
    must, may = line.split("编码器结构与预处理取自检查点；")[1].split("必须与检查点一致，否则报错；")
    both, policies = {"slices", "roi_side"}, {"roi_policy: lesion", "roi_policy: centre"}
    assert code_of(must) - policies == {*keys_with_role("arch"), *both}
    assert code_of(may.split("可以不同")[0]) - policies == {*keys_with_role("tokens"), *both}


def test_what_a_resumed_run_may_change_is_listed() -> None:
    flags = {"epochs", "lr", "seed", "warmup_ratio", "weight_decay", "max_grad_norm", "batch_size", "grad_accumulation"}
    compared = fingerprint(argparse.Namespace(**dict.fromkeys(flags, 1)), Config())
    [listed] = re.findall("配置中除 (.*?) 之外的键", section("10 续训与中断"))
    assert code_of(listed) == FIELDS.keys() - compared.keys()


def test_messages_that_the_manual_explains_are_the_codes() -> None:
    code = "\n".join(read(name) for name in tracked() if name.endswith(".py") and not name.startswith("tests/"))
    headings = re.findall(r"^\*\*(`.*?)\*\*", section("13 常见问题"), flags=re.MULTILINE)
    explained = [part.strip(" ,") for heading in headings for text in code_of(heading) for part in text.split("...")]
    assert len(explained) > 8
    for part in explained:
        assert part in code, f"no code says: {part}"


def test_the_checkpoint_that_stage_2_continues_from_is_named() -> None:
    assert f"continues from `outputs/{FINAL_FILE}`" in read("README.md")
    assert f"从 `outputs/{FINAL_FILE}` 继续" in section("7 第二阶段")
