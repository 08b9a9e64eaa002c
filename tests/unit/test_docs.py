"""The pages of docs/ that name what the code has: nothing is missing there, and nothing is made up."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from dynamo_lite.config import Config, WorkerGroup, parse_bytes
from dynamo_lite.config_file import load_config

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"^\| `(?P<key>[a-z_.A-Z]+)` \| (?P<type>[^|]+) \| (?P<default>[^|]+) \| (?P<meaning>[^|]+) \|$", re.M)
LINK = re.compile(r"\]\((?!https?:)(?P<target>[^)#]+)(?:#[^)]*)?\)")
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
# What the pages name by its path, as `workers/remote.py` or `kvbm/`.
NAMED_PATH = re.compile(r"`((?:dynamo_lite|kvbm|workers|tests|configs|docs|scripts|requirements|benchmarks)/[\w./-]*)`")


def keys(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key with its default. The three groups of workers are alike, so the page calls them ROLE."""
    for name, field in model.model_fields.items():
        default = field.get_default(call_default_factory=True)
        if isinstance(default, BaseModel) and name != "workers":
            yield from keys(type(default), f"{prefix}{name}.")
        elif name == "workers":
            yield from keys(WorkerGroup, "workers.ROLE.")
        else:
            yield f"{prefix}{name}", default
            if default is None:
                for inner in get_args(field.annotation):  # of a part that may be left out
                    if isinstance(inner, type) and issubclass(inner, BaseModel):
                        yield from keys(inner, f"{prefix}{name}.")


def documented() -> dict[str, str]:
    """Key → default, as the page's tables have them."""
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    return {row["key"]: row["default"].strip().strip("`") for row in ROW.finditer(page)}


def test_every_configuration_key_is_on_the_page_and_no_other() -> None:
    assert sorted(documented()) == sorted(key for key, _ in keys(Config))


@pytest.mark.parametrize(("key", "default"), list(keys(Config)))
def test_the_page_tells_the_default_of(key: str, default: object) -> None:
    cell = documented()[key]
    if default is None or default is PydanticUndefined:
        assert cell == ("–" if default is None else "required")
        return
    told = yaml.safe_load(cell)
    expected = list(default) if isinstance(default, tuple) else default
    assert told == expected or parse_bytes(told) == expected


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_links_to_or_names_by_path_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    linked = [page.parent / found["target"] for found in LINK.finditer(text)]
    named = [ROOT / path for path in NAMED_PATH.findall(text)]
    assert [str(path) for path in linked + named if not path.exists()] == []


def test_the_readme_shows_a_configuration_that_loads(tmp_path: Path) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    assert blocks
    for block in blocks:
        file = tmp_path / "shown.yaml"
        file.write_text(block, encoding="utf-8")
        load_config(file)


def test_the_readme_gives_the_reason_for_every_dependency_and_no_other() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = project[project.index("\ndependencies") : project.index("[project.scripts]")]
    names = re.findall(r'"([A-Za-z0-9-]+)[=<>]', section)
    table = text[text.index("## Why each dependency") :]
    rows = [name for row in re.findall(r"^\| (`[^|]+) \|", table, re.M) for name in re.findall(r"`([a-z0-9-]+)`", row)]
    assert set(rows) - {"cpu", "cuda"} == set(names)
