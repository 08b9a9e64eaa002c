from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from dynamo_lite.errors import PrefillFailed
from dynamo_lite.plane.layout import KvLayout
from dynamo_lite.plane.wire import Incarnation, PushTarget, RankTarget
from dynamo_lite.tasks import scope
from workers.connector.protocol import (
    NO_STAGING,
    Command,
    FirstToken,
    GiveUp,
    Prepare,
    ReceiveEnded,
    ReceiveOpened,
    ReceivePlanned,
    Reopen,
    Settle,
    Skipped,
)
from workers.engine import TransferReport
from workers.receives import Receives

RANKS = 2
PREPARE = Prepare("r", 256, 3, 100)
LAYOUT = KvLayout(1, 16, 2, RANKS, 4, 4, "float32", "NHKD", "NHKD")


class ScriptedPrefill:
    """A RemotePrefill whose candidates answer as the test says."""

    def __init__(self, *candidates: str) -> None:
        self.left = list(candidates)
        self.asked = ""
        self.targets: list[PushTarget] = []
        self.reasons: list[str] = []
        self.reports: list[TransferReport] = []
        self.failures: list[str] = []
        self.stopped = False
        self.first_token: Callable[[int], None] | None = None
        self.reported = asyncio.Event()
        self.called = asyncio.Event()
        self.answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def plan(self, here: int) -> int:
        raise AssertionError("asked by engines only")

    @property
    def more(self) -> bool:
        return bool(self.left)

    async def ask(self, target: PushTarget, first_token: Callable[[int], None] | None = None) -> int:
        self.asked = self.left.pop(0)
        self.targets.append(target)
        self.first_token = first_token
        self.called.set()
        return await asyncio.shield(self.answer)

    def fail(self, cause: str) -> None:
        answer, self.answer = self.answer, asyncio.get_running_loop().create_future()
        self.called.clear()
        answer.set_exception(PrefillFailed(cause))

    def stop(self) -> None:
        self.stopped = True

    def skipped(self, reason: str) -> None:
        self.reasons.append(reason)

    def failed(self, cause: str) -> None:
        self.failures.append(cause)

    def transferred(self, report: TransferReport) -> None:
        self.reports.append(report)
        self.reported.set()


class Bench:
    """Receives, with the commands they gave."""

    def __init__(self, group: asyncio.TaskGroup) -> None:
        self.commands: list[Command] = []
        self.told = asyncio.Event()
        self.receives = Receives(Incarnation("d"), LAYOUT, self._command, 0.2, group)

    def _command(self, command: Command) -> None:
        self.commands.append(command)
        self.told.set()

    async def next_command(self) -> Command:
        async with asyncio.timeout(5):
            while not self.commands:
                await self.told.wait()
                self.told.clear()
        return self.commands.pop(0)

    def open(self, transfer_id: int = 256) -> None:
        for rank in range(RANKS):
            target = RankTarget(b"md", f"d:{rank}", 0, 0, "DRAM", 100, (rank,))
            self.receives.handle(ReceiveOpened("r", transfer_id, rank, 3, 100, target))

    def plan(self) -> None:
        for rank in range(RANKS):
            self.receives.handle(ReceivePlanned("r", rank))

    def arrive(self, transfer_id: int = 256) -> None:
        for rank in range(RANKS):
            self.receives.handle(ReceiveEnded("r", transfer_id, rank, "", 50, 7, 2, "shm", 10 + rank, 20 + rank))


@asynccontextmanager
async def bench() -> AsyncIterator[Bench]:
    async with asyncio.timeout(10), scope() as group:
        yield Bench(group)


async def test_the_first_candidate_is_asked_once_every_rank_has_staging() -> None:
    async with bench() as made:
        remote = ScriptedPrefill("p0")
        receive = made.receives.expect("r", remote)
        made.open()
        await remote.called.wait()
        (target,) = remote.targets
        assert (target.transfer_id, target.first_token, target.tokens) == (256, 48, 100)
        assert (target.first_block, target.num_blocks) == (3, 7)
        assert [rank.agent_name for rank in target.ranks] == ["d:0", "d:1"]
        assert receive.local_blocks == 3
        made.arrive()
        remote.answer.set_result(0)
        await remote.reported.wait()
        (report,) = remote.reports
        assert (report.bytes, report.blocks, report.pieces) == (100, 7, 4)
        assert (report.started_ns, report.ended_ns) == (10, 21)
        assert made.commands == []


async def test_a_failed_candidate_that_said_so_frees_its_staging_and_the_next_gets_a_new_transfer() -> None:
    async with bench() as made:
        remote = ScriptedPrefill("p0", "p1")
        made.receives.expect("r", remote)
        made.open()
        await remote.called.wait()
        remote.fail("refused")
        assert await made.next_command() == Settle(256, "p0", closed=True)
        assert await made.next_command() == Reopen("r", 256)
        made.open(257)
        await remote.called.wait()
        assert remote.targets[-1].transfer_id == 257
        remote.fail("gone")
        assert await made.next_command() == Settle(257, "p1", closed=False)
        assert await made.next_command() == GiveUp("r", 257)


async def test_blocks_that_never_arrive_after_a_success_are_computed_here() -> None:
    async with bench() as made:
        remote = ScriptedPrefill("p0")
        made.receives.expect("r", remote)
        made.open()
        await remote.called.wait()
        remote.answer.set_result(0)
        assert await made.next_command() == Settle(256, "p0", closed=True)
        assert await made.next_command() == GiveUp("r", 256)
        assert remote.reports == []
        assert remote.failures == ["lost"]


async def test_a_corrupt_piece_fails_the_attempt_at_once_and_the_next_candidate_is_asked() -> None:
    async with bench() as made:
        remote = ScriptedPrefill("p0", "p1")
        made.receives.expect("r", remote)
        made.open()
        await remote.called.wait()
        made.receives.handle(ReceiveEnded("r", 256, 1, "corrupt"))
        remote.answer.set_result(0)  # every piece was written, as far as the prefill worker knows
        assert await made.next_command() == Settle(256, "p0", closed=True)
        assert await made.next_command() == Reopen("r", 256)
        assert remote.failures == ["corrupt"]


async def test_an_aborted_request_waits_for_its_candidate_before_its_staging_is_free() -> None:
    async with bench() as made:
        remote = ScriptedPrefill("p0", "p1")
        made.receives.expect("r", remote)
        made.open()
        await remote.called.wait()
        made.receives.release("r")
        assert remote.stopped
        assert made.commands == []
        remote.fail("cancelled")
        assert await made.next_command() == Settle(256, "p0", closed=True)
        await asyncio.sleep(0)
        assert made.commands == [], "no other candidate is asked"


async def test_a_reply_that_is_lost_after_all_blocks_have_arrived_costs_nothing() -> None:
    async with bench() as made:
        remote = ScriptedPrefill("p0", "p1")
        made.receives.expect("r", remote)
        made.open()
        await remote.called.wait()
        made.arrive()
        remote.fail("gone")
        await remote.reported.wait()
        assert made.commands == []


async def test_one_rank_that_has_all_its_blocks_when_another_fails_ends_remote_prefills() -> None:
    async with bench() as made:
        remote = ScriptedPrefill("p0", "p1")
        made.receives.expect("r", remote)
        made.open()
        await remote.called.wait()
        made.receives.handle(ReceiveEnded("r", 256, 0, "", 50, 7, 2, "shm", 10, 20))
        remote.fail("gone")
        assert await made.next_command() == Settle(256, "p0", closed=False)
        assert await made.next_command() == GiveUp("r", 256)


async def test_ranks_that_disagree_about_staging_all_give_it_back() -> None:
    async with bench() as made:
        remote = ScriptedPrefill("p0")
        made.receives.expect("r", remote)
        target = RankTarget(b"md", "d:0", 0, 0, "DRAM", 100, (0,))
        made.receives.handle(ReceiveOpened("r", 256, 0, 3, 7, target))
        made.receives.handle(ReceiveEnded("r", 256, 1, NO_STAGING))
        assert await made.next_command() == Settle(256, "", closed=True)
        assert await made.next_command() == GiveUp("r", 256)
        assert remote.targets == []


async def test_staging_granted_after_an_abort_is_free_at_once() -> None:
    async with bench() as made:
        made.receives.expect("r", ScriptedPrefill("p0"))
        made.receives.release("r")
        made.open()
        assert made.commands == [Settle(256, "", closed=True)] * RANKS


async def test_the_reason_for_computing_here_is_passed_on() -> None:
    async with bench() as made:
        remote = ScriptedPrefill("p0")
        made.receives.expect("r", remote)
        made.receives.handle(Skipped("r", "prefix hit"))
        made.receives.handle(ReceiveEnded("r", 256, 0, NO_STAGING))
        assert remote.reasons == ["prefix hit", "no staging"]


async def test_the_first_token_is_told_to_the_connectors_before_anybody_else_has_it() -> None:
    async with bench() as made:
        remote = ScriptedPrefill("p0")
        receive = made.receives.expect("r", remote, first_token=True)
        made.open()
        await remote.called.wait()
        assert receive.first_token is not None
        assert remote.first_token is not None
        receive.first_token.add_done_callback(lambda _: made.commands.append(GiveUp("marks the moment", 0)))
        remote.first_token(42)
        assert await receive.first_token == 42
        assert made.commands[0] == FirstToken("r", 42)
        made.arrive()
        remote.answer.set_result(0)
        await remote.reported.wait()
        made.receives.release("r")
        await asyncio.sleep(0)
        assert [command for command in made.commands if isinstance(command, FirstToken)] == [FirstToken("r", 42)]


async def test_the_first_token_stays_what_the_client_has_whatever_the_next_candidate_chooses() -> None:
    async with bench() as made:
        remote = ScriptedPrefill("p0", "p1")
        receive = made.receives.expect("r", remote, first_token=True)
        made.open()
        await remote.called.wait()
        assert remote.first_token is not None
        remote.first_token(42)
        remote.fail("cancelled")
        assert await made.next_command() == FirstToken("r", 42)
        assert isinstance(await made.next_command(), Settle)
        assert isinstance(await made.next_command(), Reopen)
        made.open(257)
        await remote.called.wait()
        remote.first_token(43)
        assert receive.first_token is not None
        assert receive.first_token.result() == 42
        remote.fail("cancelled")
        assert isinstance(await made.next_command(), Settle)
        assert isinstance(await made.next_command(), GiveUp)
        assert made.commands == []


async def test_an_engine_that_waits_for_a_first_token_hears_when_none_will_come() -> None:
    async with bench() as made:
        remote = ScriptedPrefill("p0")
        receive = made.receives.expect("r", remote, first_token=True)
        made.open()
        await remote.called.wait()
        remote.fail("gone")
        assert isinstance(await made.next_command(), Settle)
        assert isinstance(await made.next_command(), GiveUp)
        assert await made.next_command() == FirstToken("r", None)
        assert remote.first_token is not None
        remote.first_token(42)  # late, by a message that was on its way
        assert receive.first_token is not None
        assert not receive.first_token.done()


async def test_a_receive_that_never_got_staging_waits_for_no_first_token() -> None:
    async with bench() as made:
        made.receives.expect("r", ScriptedPrefill("p0"), first_token=True)
        made.receives.handle(ReceiveEnded("r", 256, 0, NO_STAGING))
        assert await made.next_command() == FirstToken("r", None)


async def test_a_prefill_worker_is_asked_before_the_engine_has_planned_the_prompt() -> None:
    async with bench() as made:
        remote = ScriptedPrefill("p0")
        made.receives.expect("r", remote, prepare=PREPARE)
        assert await made.next_command() == PREPARE
        assert made.receives.unplanned == 1
        made.open()
        await remote.called.wait()
        made.plan()
        assert made.receives.unplanned == 0
        made.arrive()
        remote.answer.set_result(0)
        await remote.reported.wait()
        assert made.commands == []


async def test_nobody_has_a_first_token_before_the_engine_has_planned_to_receive() -> None:
    async with bench() as made:
        remote = ScriptedPrefill("p0")
        receive = made.receives.expect("r", remote, first_token=True, prepare=PREPARE)
        assert await made.next_command() == PREPARE
        made.open()
        await remote.called.wait()
        assert remote.first_token is not None
        remote.first_token(42)
        assert made.commands == []
        made.plan()
        assert made.commands == [FirstToken("r", 42)]
        assert receive.first_token is not None
        assert receive.first_token.result() == 42


async def test_an_engine_that_computes_the_prompt_after_all_ends_what_was_asked_for() -> None:
    async with bench() as made:
        remote = ScriptedPrefill("p0", "p1")
        receive = made.receives.expect("r", remote, first_token=True, prepare=PREPARE)
        assert await made.next_command() == PREPARE
        made.open()
        await remote.called.wait()
        assert remote.first_token is not None
        remote.first_token(42)
        made.receives.handle(Skipped("r", "prefix changed"))
        assert await made.next_command() == GiveUp("r", 256)
        assert remote.stopped
        remote.fail("cancelled")
        assert await made.next_command() == Settle(256, "p0", closed=True)
        assert receive.first_token is not None
        assert not receive.first_token.done(), "the engine chooses another one itself"
        assert receive.local_blocks is None
        made.receives.release("r")
        assert made.commands == []


async def test_an_abort_before_the_engine_has_planned_the_prompt_gives_its_staging_up() -> None:
    async with bench() as made:
        made.receives.expect("r", ScriptedPrefill("p0"), prepare=PREPARE)
        made.receives.release("r")
        made.open()
        assert made.commands == [PREPARE, GiveUp("r", 256), *[Settle(256, "", closed=True)] * RANKS]


async def test_a_request_planned_after_its_last_candidate_failed_hears_that_no_first_token_comes() -> None:
    async with bench() as made:
        remote = ScriptedPrefill("p0")
        made.receives.expect("r", remote, first_token=True, prepare=PREPARE)
        assert await made.next_command() == PREPARE
        made.open()
        await remote.called.wait()
        remote.fail("gone")
        assert await made.next_command() == Settle(256, "p0", closed=False)
        assert await made.next_command() == GiveUp("r", 256)
        assert made.commands == []
        made.plan()
        assert made.commands == [FirstToken("r", None)]
        made.receives.release("r")
        assert made.receives.unplanned == 0


async def test_staging_granted_after_the_last_candidate_failed_is_free_at_once_though_the_plan_is_still_to_come() -> (
    None
):
    async with bench() as made:
        remote = ScriptedPrefill("p0")
        made.receives.expect("r", remote, prepare=PREPARE)
        assert await made.next_command() == PREPARE
        made.open()
        await remote.called.wait()
        remote.fail("refused")
        assert await made.next_command() == Settle(256, "p0", closed=True)
        assert await made.next_command() == GiveUp("r", 256)
        made.open(257)
        assert made.commands == [Settle(257, "", closed=True)] * RANKS
