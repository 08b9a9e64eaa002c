"""What workers do of each other before there is a request."""

from __future__ import annotations

from functools import partial

from tests.integration.serving.deployment import Deployment, until

MET = 'dynamo_lite_worker_peers{state="met"}'


def has_met(deployment: Deployment, name: str) -> bool:
    return deployment.metrics(name).get(MET) == 1


def test_workers_meet_without_any_request(apart: Deployment) -> None:
    for name in ("prefill-0", "decode-0"):
        until(partial(has_met, apart, name), f"{name} has met the other")


def test_a_worker_tells_others_of_one_transfer_agent_for_each_rank(apart: Deployment) -> None:
    agents = {name: record.agents for name, record in apart.instances().items()}
    assert {name: len(each) for name, each in agents.items()} == {"prefill-0": 1, "decode-0": 1}
    assert agents["prefill-0"] != agents["decode-0"]
