"""The rules of who may import whom, read off the sources."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = ("dynamo_lite", "kvbm", "workers")

# What each part may import of the others. Within itself a part is free; the longest prefix counts.
ALLOWED: dict[str, tuple[str, ...]] = {
    "kvbm": (),
    "workers": (
        "dynamo_lite.plane",
        "dynamo_lite.config",
        "dynamo_lite.errors",
        "dynamo_lite.telemetry",
        "dynamo_lite.status",
        "dynamo_lite.tasks",
        "dynamo_lite.processes",
        "dynamo_lite.rdma",
        "dynamo_lite.transfer_plan",
        "dynamo_lite.transports",
        "kvbm",
    ),
    "dynamo_lite": ("kvbm.hashing", "kvbm.index", "kvbm.events", "kvbm.seed"),
    # The simulator puts a router before workers in one process, and a command of ours runs it.
    "workers.simulate": ("dynamo_lite.router", "dynamo_lite.plane", "dynamo_lite.config", "dynamo_lite.errors", "kvbm"),
    "dynamo_lite.simulate_cli": ("workers.simulate",),
}

# Inside dynamo_lite nothing imports a part above its own. Modules not named here serve all and import none of these.
LAYERS = (
    ("dynamo_lite.plane",),
    ("dynamo_lite.router",),
    ("dynamo_lite.frontend", "dynamo_lite.supervisor"),
    ("dynamo_lite.cli", "dynamo_lite.process"),
)

# The only places that may import a heavy or replaceable library.
CONFINED: dict[str, tuple[str, ...]] = {
    "vllm": (
        "workers.vllm_engine",
        "workers.vllm_arguments",
        "workers.vllm_stats",
        "workers.vllm_values",
        "workers.connector",
    ),
    "nixl": ("workers.transfer",),
    "nixl_cu12": ("workers.transfer",),
    "obstore": ("workers.transfer",),
    "nats": ("dynamo_lite.plane.bus",),
    "etcd3aio": ("dynamo_lite.plane.discovery",),
    "torch": ("workers",),
    "triton": ("workers.transfer.triton_pack",),
    "transformers": ("dynamo_lite.frontend.tokens",),  # lazily, for models that need it
    "pickle": (),
    "dill": (),
    "cloudpickle": (),
}

# An engine is started and closed by two calls, with no task group around them: `close` awaits its task. An async
# generator cannot have a group around its yields: it ends its task itself.
OWNS_A_TASK = ("workers.sim_engine", "workers.first_token")

BANNED_NAMES = ("utils", "helpers", "common")


@dataclass(frozen=True)
class Source:
    """A parsed module."""

    module: str
    tree: ast.Module


def sources() -> list[Source]:
    found = []
    for package in OURS:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found.append(Source(module, ast.parse(path.read_text(encoding="utf-8"), str(path))))
    return found


SOURCES = sources()
MODULES = {source.module for source in SOURCES}


def imports(tree: ast.AST, package: str = "") -> Iterator[str]:
    """Every module a tree imports, wherever the statement stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] + "." if node.level else ""
            module = f"{base}{node.module or ''}".rstrip(".")
            yield from (
                f"{module}.{alias.name}" if f"{module}.{alias.name}" in MODULES else module for alias in node.names
            )


def imports_of(source: Source) -> Iterator[str]:
    is_package = any(other.startswith(f"{source.module}.") for other in MODULES)
    yield from imports(source.tree, source.module if is_package else source.module.rpartition(".")[0])


def within(module: str, parts: Sequence[str]) -> bool:
    return any(module == part or module.startswith(f"{part}.") for part in parts)


def layer(module: str) -> int | None:
    return next((level for level, parts in enumerate(LAYERS) if within(module, parts)), None)


def breaches() -> Iterator[str]:
    for source in SOURCES:
        top = source.module.partition(".")[0]
        allowed = ALLOWED[max((part for part in ALLOWED if within(source.module, (part,))), key=len)]
        for imported in imports_of(source):
            line = f"{source.module} imports {imported}"
            if within(imported, OURS) and not within(imported, (top, *allowed)):
                yield line
            library = imported.partition(".")[0]
            if library in CONFINED and not within(source.module, CONFINED[library]):
                yield line


def test_the_parts_import_only_what_they_may() -> None:
    assert sorted(set(breaches())) == []


def test_no_part_of_dynamo_lite_imports_one_above_it() -> None:
    found = []
    for source in SOURCES:
        mine = layer(source.module)
        for imported in imports_of(source):
            theirs = layer(imported)
            if mine is not None and theirs is not None and theirs > mine:
                found.append(f"{source.module} imports {imported}")
            apart = source.module.split(".")[:2] != imported.split(".")[:2]
            if mine == theirs == layer("dynamo_lite.frontend") and apart:
                found.append(f"{source.module} imports {imported}")
    assert not found


def test_packages_have_no_cycles() -> None:
    """A package is a folder; modules directly in a top folder count as packages of their own."""

    def package(module: str) -> str:
        parts = module.split(".")
        return ".".join(parts[:2])

    graph: dict[str, set[str]] = {package(source.module): set() for source in SOURCES}
    for source in SOURCES:
        graph[package(source.module)] |= {
            package(imported) for imported in imports_of(source) if imported in MODULES
        } - {package(source.module)}
    while leaves := [name for name, needs in graph.items() if not needs & graph.keys()]:
        for leaf in leaves:
            del graph[leaf]
    assert not graph, "these import each other in a circle"


def test_tasks_come_from_a_task_group_only() -> None:
    """A task nobody holds may vanish, and its error with it."""
    found = []
    for source in [source for source in SOURCES if source.module not in OWNS_A_TASK]:
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = node.func.value
                is_asyncio = isinstance(owner, ast.Name) and owner.id == "asyncio"
                is_loop = isinstance(owner, ast.Call | ast.Name) and "loop" in ast.unparse(owner)
                if node.func.attr in ("create_task", "ensure_future") and (is_asyncio or is_loop):
                    found.append(f"{source.module}:{node.lineno}")
        found += [f"{source.module} imports {name}" for name in ("create_task",) if name in from_asyncio(source)]
    assert not found


def from_asyncio(source: Source) -> set[str]:
    return {
        alias.name
        for node in ast.walk(source.tree)
        if isinstance(node, ast.ImportFrom) and node.module == "asyncio"
        for alias in node.names
    }


def test_no_module_is_named_for_a_drawer() -> None:
    assert not [module for module in MODULES if module.rpartition(".")[2] in BANNED_NAMES]


@pytest.mark.parametrize(
    ("code", "package", "expected"),
    [
        ("import nats.aio.client", "", {"nats.aio.client"}),
        ("def f():\n from kvbm import index", "", {"kvbm.index"}),
        ("from ..plane import wire", "dynamo_lite.router", {"dynamo_lite.plane.wire"}),
        ("from .index import PrefixIndex", "kvbm", {"kvbm.index"}),
    ],
)
def test_the_reader_of_imports_sees_them_all(code: str, package: str, expected: set[str]) -> None:
    assert set(imports(ast.parse(code), package)) == expected
