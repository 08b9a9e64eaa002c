from __future__ import annotations

from pathlib import Path

from dynamo_lite.machine import Machine
from dynamo_lite.model_shape import ModelShape
from tests.models import make_tiny_model


def test_container_limits_bound_what_this_machine_offers(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1073741824\n")
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    machine = Machine.detect(tmp_path)
    assert machine.memory == 2**30
    assert machine.cores == 1
    assert machine.free_memory <= 2**30


def test_without_container_limits_the_whole_machine_counts(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "cpu.max").write_text("max 100000\n")
    machine, unlimited = Machine.detect(tmp_path), Machine.detect(tmp_path / "none")
    assert (machine.cores, machine.memory) == (unlimited.cores, unlimited.memory)


def test_a_models_shape_is_read_from_its_folder(tmp_path: Path) -> None:
    shape = ModelShape.read(make_tiny_model(tmp_path))
    assert shape is not None
    assert (shape.layers, shape.kv_heads, shape.head_dim, shape.max_length) == (4, 2, 32, 4096)
    assert shape.dtype == "float32"
    assert shape.weights == (tmp_path / "model.safetensors").stat().st_size
    assert shape.weight_bytes("auto") == shape.weights // 2
    assert shape.kv_bytes("float32", "auto") == 2 * 4 * 2 * 32 * 4
    assert shape.kv_bytes("float32", "fp8") == 2 * 4 * 2 * 32


def test_a_folder_without_a_usable_config_has_no_shape(tmp_path: Path) -> None:
    assert ModelShape.read(tmp_path) is None
    (tmp_path / "config.json").write_text("{}")
    assert ModelShape.read(tmp_path) is None
