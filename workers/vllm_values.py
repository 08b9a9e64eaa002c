"""Our sampling settings and outputs as vLLM's, and back."""

from __future__ import annotations

from typing import Any

from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from dynamo_lite.plane.wire import Sampling, TokenLogprob
from workers.engine import Output


def sampling_params(sampling: Sampling, kv_transfer: dict[str, Any] | None) -> SamplingParams:
    """Ours as vLLM's. Text stop strings and EOS are the frontend's: only ids in `stop_token_ids` end a sequence."""
    return SamplingParams(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        seed=sampling.seed,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        min_tokens=sampling.min_tokens,
        stop_token_ids=list(sampling.stop_token_ids),
        ignore_eos=True,
        logprobs=sampling.logprobs,
        logit_bias=sampling.logit_bias,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        extra_args={"kv_transfer_params": kv_transfer} if kv_transfer is not None else None,
    )


def output(result: RequestOutput, cached: int | None) -> Output:
    (sequence,) = result.outputs
    token_ids = list(sequence.token_ids)
    logprobs = None
    if sequence.logprobs is not None:
        logprobs = [
            TokenLogprob(
                token_id,
                position[token_id].logprob,
                tuple((other, entry.logprob) for other, entry in position.items()),
            )
            for token_id, position in zip(token_ids, sequence.logprobs, strict=True)
        ]
    stop = sequence.stop_reason
    return Output(token_ids, logprobs, sequence.finish_reason, stop if isinstance(stop, int) else None, cached)
