"""What is published: the version in all its places, workflows and forms, and the page of a Space."""

import re
import runpy
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from analysis.test_rollouts import make_record

from mentor_trl import __version__
from mentor_trl.cli import main as cli
from mentor_trl.training.rollout_log import save_records


ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml"))
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.fixture
def release(tmp_path):
    """The script of a release, and a copy of the files that it reads and writes."""
    (tmp_path / "mentor_trl").mkdir()
    for name in ("mentor_trl/version.py", "CITATION.cff", "CHANGELOG.md", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    return runpy.run_path(str(ROOT / ".ci" / "prepare_release.py")), tmp_path


def test_a_release_is_one_version_in_all_places(release):
    script, root = release
    assert script["problems"](f"v{__version__}", root) == []
    for name in ("CITATION.cff", "CHANGELOG.md"):
        (root / name).write_text((root / name).read_text().replace(__version__, "9.9.9"))
    tag, citation, changelog = script["problems"]("v1.2.3", root)
    assert "v1.2.3" in tag and __version__ in tag and "CITATION" in citation and "starts with 9.9.9" in changelog
    with pytest.raises(SystemExit):
        script["main"]("v1.2.3", "https://host/o/n", root)
    assert (root / "README.md").read_text() == (ROOT / "README.md").read_text()


def test_links_of_a_release_lead_to_its_tag(release):
    script, root = release
    html = '<img src="a/b.svg"> <a href="https://x/y">'
    assert script["absolute"](html, "https://h/o/n", "v1") == html.replace("a/b.svg", "https://h/o/n/raw/v1/a/b.svg")
    script["main"](f"v{__version__}", "https://host/o/n", root)
    targets = [found["target"] for found in script["TARGET"].finditer((root / "README.md").read_text())]
    assert targets and all(target.startswith(("#", "https://")) for target in targets)
    assert f'Changelog = "https://host/o/n/blob/v{__version__}/CHANGELOG.md"' in (root / "pyproject.toml").read_text()


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_run_what_is_there(path):
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"} and workflow[True]  # YAML reads `on` as a truth
    text = path.read_text()
    called = re.findall(r"\bmake ((?:[a-z-]+ ?)+)(?=[A-Z\n]|$)", text)
    assert {word for words in called for word in words.split()} <= TARGETS
    files = re.findall(r"(?<![\w/])\.ci/[\w.]+", text)
    assert called or files
    assert all((ROOT / name).exists() for name in files)
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 120 and all(("uses" in step) != ("run" in step) for step in job["steps"])


def test_everything_that_ci_runs_is_a_target():
    called = re.findall(r"^make (.+)$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    assert {"lint", "dist", "docs", "test", "test-slow", "test-vllm"} == set(called) <= TARGETS


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_issue_forms_ask_for_the_environment(path):
    form = yaml.safe_load(path.read_text())
    assert form["name"] and form["description"]
    fields = {field["id"]: field for field in form["body"]}
    assert all(field["attributes"]["label"] for field in fields.values())
    assert "`mentor-trl env`" in fields["environment"]["attributes"]["description"]


def test_env_names_what_is_installed(capsys):
    assert cli.main(["env"]) == 0
    facts = dict(line.removeprefix("- ").split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert facts["mentor-trl"] == __version__ and re.match(r"\d", facts["trl"])
    assert {"platform", "python", "torch", "transformers", "accelerate", "devices"} <= set(facts)
    assert "deepspeed" not in facts or re.match(r"\d", facts["deepspeed"])


def test_the_page_of_the_space_is_made_by_its_command(tmp_path, monkeypatch, capsys):
    _, front, text = (ROOT / "examples" / "space" / "README.md").read_text().split("---\n", 2)
    settings = yaml.safe_load(front)
    assert settings["sdk"] == "static" and len(settings["short_description"]) <= 60
    record = make_record(["4", " +", " 7"], branch=[1, 2], replaced=[2])
    save_records(tmp_path / "RUN", [record, replace(record, row=1)])
    monkeypatch.chdir(tmp_path)
    choose, make = re.findall(r"^mentor-trl (.*?)(?: +#.*)?$", text, re.MULTILINE)
    assert cli.main(choose.split()) == 0 and "mixed" in capsys.readouterr().out
    assert cli.main(make.split()) == 0
    page = (tmp_path / "examples" / "space" / settings["app_file"]).read_text()
    assert (
        page.count("<section") == 2 and 'class="t replaced"' in page and not re.search(r"<script|src=|@import", page)
    )
