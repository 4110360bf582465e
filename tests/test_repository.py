"""Files that other tools read: Dockerfile, citation, changelog, the contributor's manual."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from dockerfile_parse import DockerfileParser

from tests.test_documentation import REPOSITORY, check_command, code_lines, read, tracked


@pytest.fixture(scope="module")
def docker(tmp_path_factory: pytest.TempPathFactory) -> DockerfileParser:
    copy = tmp_path_factory.mktemp("docker") / "Dockerfile"  # the parser opens its file for writing
    copy.write_text(read("Dockerfile"), encoding="utf-8")
    return DockerfileParser(path=str(copy))


def instructions(docker: DockerfileParser, name: str) -> list[str]:
    return [one["value"] for one in docker.structure if one["instruction"] == name]


def test_the_image_has_a_fixed_base_and_the_tested_torch(docker: DockerfileParser) -> None:
    known = {"FROM", "ARG", "ENV", "RUN", "WORKDIR", "COPY", "USER", "VOLUME", "EXPOSE", "ENTRYPOINT", "CMD", "COMMENT"}
    assert {one["instruction"] for one in docker.structure} <= known
    assert re.fullmatch(r"python:3\.11-slim-bookworm", docker.baseimage)
    installs = [run for run in instructions(docker, "RUN") if "pip install" in run]
    [torch] = re.findall(r"torch==[\d.]+", " ".join(installs))
    assert torch in read("requirements.txt").splitlines()
    assert "whl/${TORCH}" in installs[0] and "-r requirements.txt" in installs[0]
    arguments = instructions(docker, "ARG")
    assert "TORCH=cpu" in arguments and "cu130" in read("Dockerfile") and "cu130" in read("environment.yml")


def test_the_image_keeps_no_package_lists_and_runs_as_nobody_special(docker: DockerfileParser) -> None:
    for run in instructions(docker, "RUN"):
        if "apt-get install" in run:
            assert "--no-install-recommends" in run and "rm -rf /var/lib/apt/lists/*" in run
    order = [one["instruction"] for one in docker.structure]
    assert order.index("USER") > max(k for k, name in enumerate(order) if name == "RUN")
    copies = instructions(docker, "COPY")
    assert copies[0].split()[0] == "requirements.txt" and copies[-1] == ". ."
    assert "root" not in instructions(docker, "USER")


def test_the_image_starts_a_script_that_exists(docker: DockerfileParser) -> None:
    assert instructions(docker, "ENTRYPOINT") == ['["python"]']
    [command] = instructions(docker, "CMD")
    [script] = yaml.safe_load(command)
    assert script in tracked()
    ignored = read(".dockerignore").split()
    assert {".git", ".venv", "outputs"} <= set(ignored)
    needed = ("assets", "config", "data", "engine", "models", "scripts", "train.py", "requirements.txt")
    assert not set(needed) & set(ignored)


def test_citation_names_the_version_of_the_project_and_its_licence() -> None:
    citation = yaml.safe_load(read("CITATION.cff"))
    assert {"cff-version", "message", "title", "authors", "version", "license", "type"} <= set(citation)
    project = tomllib.loads(read("pyproject.toml"))["project"]
    assert str(citation["version"]) == project["version"]
    assert citation["license"] == "MIT" and read("LICENSE").startswith("MIT")
    assert citation["authors"] and citation["references"]


def test_the_changelog_has_the_version_and_what_comes_next() -> None:
    headings = re.findall(r"^## \[([^\]]+)\](?: - (\d{4}-\d\d-\d\d))?$", read("CHANGELOG.md"), flags=re.MULTILINE)
    version = tomllib.loads(read("pyproject.toml"))["project"]["version"]
    assert headings[0] == ("Unreleased", "") and version in dict(headings) and dict(headings)[version]


@pytest.mark.parametrize("manual", ["CONTRIBUTING.md", "CHANGELOG.md"])
def test_files_and_commands_that_are_named_exist(manual: str) -> None:
    text = read(manual)
    basenames = {Path(name).name for name in tracked()}
    named = re.findall(r"`([\w./-]+\.(?:py|md|tsv|yaml|cff))`", text) + re.findall(r"\]\((\w[\w./-]*\.md)\)", text)
    assert named
    for name in named:
        assert name in tracked() if "/" in name else name in basenames, f"{manual}: no file {name}"
    for folder in re.findall(r"`((?:config|data|models|engine|scripts|tests)/?[\w/]*)`", text):
        assert (REPOSITORY / folder).exists(), f"{manual}: no folder {folder}"
    for line in code_lines(text):
        if line.startswith("python"):
            check_command(line.partition("  #")[0])
