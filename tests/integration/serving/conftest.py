"""Deployments of a tiny real model on real vLLM, NIXL, NATS and etcd, shared by the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.serving.deployment import Deployment, serve
from tests.integration.serving.requests import MODEL
from tests.models import MAX_LENGTH, make_tiny_model

GROUP: dict[str, Any] = {"count": 1, "gpu_type": "cpu", "kv_cache": "96MiB", "threads": 1}


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Everything but the workers. fp32, in which the order of additions does not change a token."""
    folder = make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")
    return {
        "model": str(folder),
        "served_model_name": MODEL,
        "dtype": "float32",
        "max_model_len": MAX_LENGTH,
        "kv_transfer": {"verify": True},
    }


@pytest.fixture(scope="session")
def apart(base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """One prefill and one decode worker."""
    workers = {"prefill": GROUP, "decode": GROUP}
    with serve(tmp_path_factory.mktemp("apart"), base | {"workers": workers}) as deployment:
        yield deployment


@pytest.fixture(scope="session")
def apart_by_layer(base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """One prefill and one decode worker; a piece takes one layer of 64 blocks, and a step any prompt."""
    one_step = {"args": {"max_num_batched_tokens": MAX_LENGTH}}
    config = {
        "workers": {"prefill": GROUP | one_step, "decode": GROUP},
        "kv_transfer": {"verify": True, "piece": "1MiB", "staging": "8MiB"},
    }
    with serve(tmp_path_factory.mktemp("apart_by_layer"), base | config) as deployment:
        yield deployment


@pytest.fixture(scope="session")
def tiered(base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """One worker with room for two of the longest prompts on its device, and for some more in its host memory."""
    small = GROUP | {"kv_cache": "18MiB"}
    tiers = {"workers": {"both": small}, "kv_tiers": {"host": {"size": "64MiB"}}}
    with serve(tmp_path_factory.mktemp("tiered"), base | tiers) as deployment:
        yield deployment


@pytest.fixture(scope="session")
def tiered_apart(base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """One prefill and one decode worker, both with a host tier."""
    small = GROUP | {"kv_cache": "18MiB"}
    tiers = {"workers": {"prefill": small, "decode": small}, "kv_tiers": {"host": {"size": "64MiB"}}}
    with serve(tmp_path_factory.mktemp("tiered_apart"), base | tiers) as deployment:
        yield deployment


def behind_host(folder: Path) -> dict[str, Any]:
    """One worker with little room on its device, less in host memory, and a disk tier that is written to at once."""
    return {
        "workers": {"both": GROUP | {"kv_cache": "18MiB"}},
        "kv_tiers": {
            "host": {"size": "16MiB"},
            "disk": {"path": str(folder), "size": "256MiB", "flush_interval_ms": 0},
        },
    }


@pytest.fixture(scope="session")
def on_disk(base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """See `behind_host`."""
    folder = tmp_path_factory.mktemp("on_disk")
    with serve(folder, base | behind_host(folder / "kv")) as deployment:
        yield deployment


@pytest.fixture(scope="session")
def pair(base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Two workers that do both, with host tiers. Requests go to the idle one, and it pulls what the other one holds."""
    config: dict[str, Any] = {
        "workers": {"both": GROUP | {"count": 2, "kv_cache": "18MiB"}},
        "kv_tiers": {"host": {"size": "64MiB"}},
        "kv_transfer": {"verify": True, "pull": "always"},
        "router": {"mode": "least_loaded"},
    }
    with serve(tmp_path_factory.mktemp("pair"), base | config) as deployment:
        yield deployment


@pytest.fixture(scope="session")
def together(base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """One worker that does both."""
    with serve(tmp_path_factory.mktemp("together"), base | {"workers": {"both": GROUP}}) as deployment:
        yield deployment
