from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from dynamo_lite import model_store
from dynamo_lite.config import Config
from dynamo_lite.errors import ConfigError, StartError
from dynamo_lite.model_shape import ModelShape
from tests.models import make_tiny_model


class Heard:
    def __init__(self) -> None:
        self.phases: list[str] = []

    def __call__(self, phase: str, detail: str) -> None:
        self.phases.append(phase)


async def test_the_embedded_model_is_converted_once_even_when_two_starts_race(tmp_path: Path) -> None:
    heard = Heard()
    log = tmp_path / "model.log"
    folders = await asyncio.gather(*(model_store.prepare(Config(), tmp_path, log, heard) for _ in range(2)))
    assert folders[0] == folders[1]
    assert heard.phases == ["converting"]
    assert ModelShape.read(folders[0]) == model_store.EMBEDDED_SHAPE
    tokenizer = Tokenizer.from_file(str(folders[0] / "tokenizer.json"))
    assert tokenizer.encode("The capital of France is Paris.").ids == [504, 3575, 282, 4649, 314, 7042, 30]
    assert [path for path in (tmp_path / "models").iterdir() if "unfinished" in path.name] == []

    again = Heard()
    assert await model_store.prepare(Config(), tmp_path, log, again) == folders[0]
    assert again.phases == []


async def test_a_conversion_cut_short_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    started = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        task = group.create_task(
            model_store.prepare(Config(), tmp_path, tmp_path / "log", lambda phase, detail: started.set())
        )
        await started.wait()
        task.cancel()
    assert task.cancelled()
    assert [path.name for path in (tmp_path / "models").iterdir() if not path.name.startswith(".")] == []
    folder = await model_store.prepare(Config(), tmp_path, tmp_path / "log", Heard())
    assert (folder / "model.safetensors").is_file()


async def test_a_folder_is_used_as_it_is(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "tiny")
    config = Config(model=str(folder))
    heard = Heard()
    assert await model_store.prepare(config, tmp_path / "cache", tmp_path / "log", heard) == folder
    assert heard.phases == []
    shape = model_store.shape(config)
    assert shape is not None
    assert shape.layers == 4


@pytest.mark.parametrize("model", ["/no/such/folder", "./none", "a/b/c", "not a model"])
async def test_what_can_be_no_model_is_a_configuration_error(tmp_path: Path, model: str) -> None:
    with pytest.raises(ConfigError, match="no Hugging Face id") as caught:
        await model_store.prepare(Config(model=model), tmp_path, tmp_path / "log", Heard())
    assert caught.value.key == "model"


async def test_a_folder_without_a_model_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        await model_store.prepare(Config(model=str(tmp_path)), tmp_path, tmp_path / "log", Heard())


async def test_a_hub_that_cannot_be_reached_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    heard = Heard()
    with pytest.raises(StartError, match=r"acme/none is not in the cache and huggingface\.co cannot be reached"):
        await model_store.prepare(Config(model="acme/none"), tmp_path, tmp_path / "log", heard)
    assert heard.phases == ["downloading"]
    assert model_store.shape(Config(model="acme/none")) is None
