from __future__ import annotations

from pathlib import Path

import pytest

from dynamo_lite.config import Config
from dynamo_lite.config_file import load, load_config
from dynamo_lite.errors import ConfigError

REFERENCE = """\
kv_transfer:
  backend: nixl
  metadata_server: "tcp://coordination-node:5557"
  rdma_device: mlx5_0
  transport_threads: 4

workers:
  prefill:
    count: 4
    gpu_type: h100_sxm5
    tensor_parallel: 4
  decode:
    count: 8
    gpu_type: a100_80g
    tensor_parallel: 2
"""
CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "serve.yaml"


def refused(file: Path, text: str, *overrides: str) -> ConfigError:
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(file, overrides)
    return caught.value


def test_the_reference_file_loads_verbatim(file: Path) -> None:
    file.write_text(REFERENCE)
    config = load_config(file)
    assert (CONFIGS / "dynamo.yaml").read_text() == REFERENCE
    assert config.kv_transfer.metadata_server == ("tcp://coordination-node:5557",)
    assert config.kv_transfer.transport_threads == 4
    assert config.workers.prefill is not None
    assert config.workers.decode is not None
    assert (config.workers.prefill.count, config.workers.prefill.gpu_type) == (4, "h100_sxm5")
    assert (config.workers.decode.count, config.workers.decode.tensor_parallel) == (8, 2)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_configuration_loads(path: Path) -> None:
    load_config(path)


def test_an_empty_file_is_the_defaults(file: Path) -> None:
    file.write_text("# nothing\n")
    assert load_config(file) == Config()


def test_an_unknown_key_is_an_error_with_its_place_and_the_nearest_key(file: Path) -> None:
    error = refused(file, "workers:\n  decode:\n    cuont: 2\n")
    assert (error.file, error.line, error.column) == (str(file), 3, 5)
    assert str(error) == f"{file}:3:5: unknown key 'cuont' in workers.decode (did you mean 'count'?)"


def test_a_key_in_the_wrong_section_is_told_where_it_belongs(file: Path) -> None:
    assert "'port' belongs under 'frontend'" in str(refused(file, "port: 8000\n"))


def test_a_misspelt_key_of_another_section_is_found_there(file: Path) -> None:
    assert "did you mean 'kv_transfer.rdma_device'?" in str(refused(file, "rdma_devise: mlx5_0\n"))


@pytest.mark.parametrize(
    ("text", "line", "column", "sentence"),
    [
        ("frontend:\n  port: high\n", 2, 9, 'frontend.port must be a whole number, not "high"'),
        ("frontend:\n  port: true\n", 2, 9, "frontend.port must be a whole number, not true"),
        ("frontend:\n  port: '80'\n", 2, 9, 'frontend.port must be a whole number, not "80"'),
        ("frontend:\n  port: 70000\n", 2, 9, "frontend.port must be at most 65535, not 70000"),
        ("router: {temperature: -1}\n", 1, 23, "router.temperature must be at least 0.0, not -1"),
        ("router: {load_weight: 1}\n", 1, 9, "'load_weight' is no more: costs are milliseconds now"),
        ("frontend: 5\n", 1, 11, "frontend must be a section of 'key: value' lines, not 5"),
        ("model: 5\n", 1, 8, "model must be text; put it in quotes, not 5"),
        ("engine: vlm\n", 1, 9, "engine must be 'vllm' or 'sim', not \"vlm\""),
        ("etcd: {endpoints: here}\n", 1, 19, 'etcd.endpoints must be a list, not "here"'),
        ("etcd:\n  endpoints:\n    - http://a\n", 3, 7, "'http://a' is not an address"),
        ("kv_transfer: {metadata_server: node}\n", 1, 32, "'node' is not an address; write tcp://host:port"),
        ("kv_transfer: {staging: lots}\n", 1, 24, "'lots' is not a size; write for example 512MiB"),
        ("workers:\n  prefill:\n    count: 1\n", 2, 3, "workers needs at least one 'decode'"),
        ("workers: {decode: {count: 0}}\n", 1, 10, "workers needs at least one 'decode'"),
        ("telemetry:\n  traces:\n    file: a\n    otlp: http://b:1\n", 3, 5, "give 'file' or 'otlp', not both"),
        ("- a\n", 1, 1, "a configuration is made of 'key: value' lines"),
        ("model: [a\n", 2, 1, "not valid YAML"),
        ("? [a, b]\n: 1\n", 1, 3, "a key is one word"),
    ],
)
def test_a_wrong_value_is_an_error_at_its_line_and_column(
    file: Path, text: str, line: int, column: int, sentence: str
) -> None:
    error = refused(file, text)
    assert (error.line, error.column) == (line, column)
    assert sentence in str(error)


def test_a_key_given_twice_is_an_error(file: Path) -> None:
    error = refused(file, "model: a\nengine: sim\nmodel: b\n")
    assert str(error) == f"{file}:3:1: 'model' is given twice; first in line 1"


def test_all_errors_of_a_file_come_at_once_in_its_order(file: Path) -> None:
    error = refused(file, "engine: vlm\nfrontend:\n  port: high\n  hots: a\nmodle: b\n", "sim.kv_blocks=1")
    lines = str(error).splitlines()
    assert [line.removeprefix(f"{file}:").split(":")[0] for line in lines] == [
        "1",
        "3",
        "4",
        "5",
        "--set sim.kv_blocks=1",
    ]


def test_a_file_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load_config(tmp_path / "none.yaml")


def test_overrides_win_and_their_values_are_yaml(file: Path) -> None:
    file.write_text("frontend: {port: 1}\n")
    config = load_config(
        file,
        ["frontend.port=0", "workers.decode.args={enforce_eager: true}", "kv_transfer.staging=128MiB", "model=a=b"],
    )
    assert config.frontend.port == 0
    assert config.workers.decode is not None
    assert config.workers.decode.args == {"enforce_eager": True}
    assert config.kv_transfer.staging == 128 * 2**20
    assert config.model == "a=b"


def test_an_override_corrects_an_error_of_the_file(file: Path) -> None:
    file.write_text("frontend: {port: high}\n")
    assert load_config(file, ["frontend.port=1"]).frontend.port == 1


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("frontend.prot=1", "--set frontend.prot=1: unknown key 'prot' in frontend (did you mean 'port'?)"),
        ("frontend.port", "write --set section.key=value"),
        ("frontend..port=1", "write --set section.key=value"),
        ("frontend.port=[", "'[' is not valid YAML"),
        ("frontend.port=x", '--set frontend.port=x: frontend.port must be a whole number, not "x"'),
        ("model.name=x", "model must be text; put it in quotes, not a section"),
    ],
)
def test_an_error_in_an_override_names_the_override(file: Path, override: str, sentence: str) -> None:
    assert sentence in str(refused(file, "", override))


def test_a_section_without_content_is_a_section_of_defaults_but_null_is_none(file: Path) -> None:
    file.write_text("frontend:\nworkers:\n  prefill:\n  decode:\n  both: null\n")
    config = load_config(file)
    assert config.workers.prefill is not None
    assert config.workers.both is None
    assert config.frontend == Config().frontend


def test_anchors_and_merge_keys_work(file: Path) -> None:
    file.write_text("workers:\n  prefill: &w {count: 2, kv_cache: 1GiB}\n  decode:\n    <<: *w\n    count: 3\n")
    config = load_config(file)
    assert config.workers.decode is not None
    assert (config.workers.decode.count, config.workers.decode.kv_cache) == (3, 2**30)


def test_an_alias_that_contains_itself_is_refused(file: Path) -> None:
    assert "nested too deeply" in str(refused(file, "workers: &w\n  decode: *w\n"))


def test_a_later_error_about_a_setting_is_given_its_line(file: Path) -> None:
    file.write_text("workers:\n  decode:\n    kv_cache: 1TiB\n")
    source = load(file, ["model=x"])
    located = source.located(ConfigError("too much", key="workers.decode.kv_cache", hint="use less"))
    assert str(located) == f"{file}:3:5: too much (use less)"
    assert str(source.located(ConfigError("bad", key="model"))) == "--set model=x: bad"
    assert str(source.located(ConfigError("bad", key="workers.prefill.count"))) == f"{file}:1:1: bad"
    assert str(source.located(ConfigError("bad"))) == f"{file}: bad"


def test_one_metadata_server_or_a_list_of_them(tmp_path: Path) -> None:
    file = tmp_path / "two.yaml"
    file.write_text("kv_transfer:\n  metadata_server: [tcp://a:5557, tcp://b:5557]\n")
    assert load_config(file).kv_transfer.metadata_server == ("tcp://a:5557", "tcp://b:5557")
    file.write_text("kv_transfer:\n  metadata_server: [tcp://a:5557, b]\n")
    with pytest.raises(
        ConfigError,
        match=r"two\.yaml:2:35: kv_transfer\.metadata_server\.1: 'b' is not an address; write tcp://host:port",
    ):
        load_config(file)
