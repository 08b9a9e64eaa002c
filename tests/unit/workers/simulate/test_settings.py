"""Other policies, other workers, other blocks."""

from __future__ import annotations

import pytest

from dynamo_lite.config import Config, Workers
from dynamo_lite.errors import ConfigError
from workers.simulate.settings import POLICIES, Split, gpus, in_blocks, variant


@pytest.mark.parametrize(("text", "split"), [("8", Split(both=8)), ("2:6", Split(2, 6)), (" 12:1 ", Split(12, 1))])
def test_a_split_is_read_and_told(text: str, split: Split) -> None:
    assert Split.parse(text) == split
    assert str(split) == text.strip()


@pytest.mark.parametrize("text", ["", "0", "2:0", "eight", "1:2:3", "-1"])
def test_what_is_no_split_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="write 8 for aggregated workers"):
        Split.parse(text)


def test_a_split_without_prefill_workers_is_one_of_aggregated_ones() -> None:
    assert Split.parse("0:4") == Split(both=4)


def test_the_configuration_has_a_split_too() -> None:
    workers = Workers.model_validate({"prefill": {"count": 2}, "decode": {"count": 3}, "both": {"count": 4}})
    assert Split.of(workers) == Split(2, 3, 4)
    assert str(Split.of(workers)) == "2:3+4"


def test_roles_are_as_they_are_configured_or_as_the_others() -> None:
    given = Workers.model_validate(
        {"decode": {"tensor_parallel": 2, "max_num_seqs": 9}, "prefill": {"tensor_parallel": 4}}
    )
    apart = Split(3, 5).workers(given)
    assert apart.prefill is not None
    assert apart.decode is not None
    assert (apart.prefill.tensor_parallel, apart.decode.tensor_parallel) == (4, 2)
    assert gpus(apart) == 3 * 4 + 5 * 2
    together = Split(both=8).workers(given)
    assert (together.prefill, together.decode) == (None, None)
    assert together.both is not None
    assert (together.both.count, together.both.max_num_seqs) == (8, 9)


def test_a_variant_has_its_policy_and_keeps_the_rest() -> None:
    config = Config.model_validate({"router": {"prefill_candidates": 7}, "workers": {"both": {}}})
    for policy in POLICIES:
        one = variant(config, policy, Split(both=3))
        assert (one.router.mode, one.router.prefill_candidates, Split.of(one.workers)) == (policy, 7, Split(both=3))


def test_blocks_of_another_size_hold_as_many_tokens_and_take_as_long() -> None:
    config = Config.model_validate({"sim": {"block_size": 16, "kv_blocks": 320, "transfer_ms_per_block": 0.5}})
    large = in_blocks(config, 64)
    assert (large.sim.block_size, large.sim.kv_blocks, large.sim.transfer_ms_per_block) == (64, 80, 2.0)
    named = config.model_copy(update={"block_size": 32})
    assert in_blocks(named, 64).sim.kv_blocks == 160
    assert in_blocks(named, 64).block_size is None


def test_blocks_that_are_too_large_for_the_memory_are_refused() -> None:
    with pytest.raises(ConfigError, match="do not hold two of the trace's, of 4096") as caught:
        in_blocks(Config.model_validate({"sim": {"block_size": 16, "kv_blocks": 300}}), 4096)
    assert caught.value.key == "sim.kv_blocks"
