"""A deployment with simulated engines: one prefill and two decode workers, shared by the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.integration.serving.deployment import Deployment, serve
from tests.models import make_tiny_model

MODEL = "tiny"
SIM = {"decode_step_ms": 2.0, "prefill_ms_per_token": 0.1}


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def settings(model_path: Path, **more: Any) -> dict[str, Any]:
    workers = {"prefill": {"count": 1}, "decode": {"count": 2}}
    return {
        "model": str(model_path),
        "served_model_name": MODEL,
        "engine": "sim",
        "workers": workers,
        "sim": SIM,
    } | more


@pytest.fixture(scope="session")
def deployment(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    frontend = {"max_body": "256KiB"}
    with serve(tmp_path_factory.mktemp("deployment"), settings(model_path, frontend=frontend)) as running:
        yield running


@pytest.fixture(scope="session")
def client(deployment: Deployment) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{deployment.url}/v1", api_key="none", max_retries=0, timeout=60) as connected:
        yield connected


@pytest.fixture(scope="session")
def http(deployment: Deployment) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=deployment.url, timeout=60) as connected:
        yield connected
