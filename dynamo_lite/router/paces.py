"""How fast each worker is, from what the workers report of themselves.

A worker of which something is not known yet is taken to be like others of its kind, and where nobody knows, a guess
keeps the order right: computing takes longest, then farther tiers, then nearer ones. What a worker measures is noisy.
Where it is about what others of its kind measure, theirs is taken for it, too, or noise would decide between equals.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median

from dynamo_lite.plane.wire import Line, Rates
from dynamo_lite.router.cost import Pace
from kvbm.events import Tier

PREFILL: Line = (5.0, 0.1)
STEP: Line = (10.0, 0.05)
TRANSFER: Line = (3.0, 0.0)  # and as part of computing a token:
_MOVED = 0.05
_TIERS = {Tier.HOST: 0.05, Tier.DISK: 0.15, Tier.OBJECT: 1.0}  # likewise
ANSWER_TOKENS = 128.0
_TOKENS, _BATCH = 1024, 8  # amounts that speeds are compared by
ALIKE = 1.5  # times as much, or as little, is noise among workers of one kind


def pace(own: Rates, kin: Sequence[Rates]) -> Pace:
    """Of a worker that reports `own`; `kin`: what all workers of its kind report, itself included."""
    prefill = _settled(own.prefill, [each.prefill for each in kin]) or PREFILL
    token = prefill[1]
    pull = _settled(own.pull, [each.pull for each in kin])
    onboard = {
        tier: _settled(own.onboard.get(tier), [each.onboard.get(tier) for each in kin]) or (0.0, part * token)
        for tier, part in _TIERS.items()
    }
    answers = [each.answer_tokens for each in kin if each.answer_tokens is not None]
    return Pace(
        prefill=prefill,
        step=_settled(own.step, [each.step for each in kin], _BATCH) or STEP,
        transfer=pull or (TRANSFER[0], _MOVED * token),
        pull=pull,
        onboard=onboard,
        answer_tokens=median(answers) if answers else ANSWER_TOKENS,
    )


def _settled(own: Line | None, kin: Iterable[Line | None], amount: float = _TOKENS) -> Line | None:
    """What to believe of one that measured `own`. `amount`: what they are compared by."""
    known = [each for each in kin if each is not None]
    if not known:
        return None
    usual = (median(each[0] for each in known), median(each[1] for each in known))
    if own is None:
        return usual
    mine, theirs = own[0] + own[1] * amount, usual[0] + usual[1] * amount
    return usual if mine <= ALIKE * theirs and theirs <= ALIKE * mine else own
