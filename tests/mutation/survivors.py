# ruff: noqa: E501  (a mutant's name stays in one piece)
"""Mutants that no test can notice, or is asked to, with the reason. The mutation run compares them with its own."""

SURVIVORS: dict[str, dict[str, str]] = {
    "kl": {},
    "masking": {},
    "ppo": {
        "_HeadLogprobs.forward: ctx.set_materialize_grads(False) -> ctx.set_materialize_grads(True)": "zeros instead of None give the same gradient by a longer way",
        "gae: rewards_BR, values_BR = (zero_masked(rewards_BR, mask_BR), zero_masked(values_BR, mask_BR)) -> rewards_BR, values_BR = (zero_masked(rewards_BR, torch.ones_like(mask_BR)), zero_masked(values_BR, mask_BR))": "a reward enters by a sum that the mask selects: elsewhere it reaches neither value nor gradient",
        "policy_loss: advantages_BR = zero_masked(advantages_BR.detach(), mask_BR) -> advantages_BR = zero_masked(advantages_BR.detach(), torch.ones_like(mask_BR))": "the log-probs are masked before it and the losses after it",
        "policy_loss: log_ratio_BR = _log_ratio(logprobs_BR, old_logprobs_BR.detach(), mask_BR) -> log_ratio_BR = _log_ratio(logprobs_BR, old_logprobs_BR.detach(), torch.ones_like(mask_BR))": "the clamp has no gradient at NaN and infinities, and the losses are masked after it",
        "policy_loss: bound_BR = torch.where(advantages_BR < 0, -dual_clip * advantages_BR, math.inf) -> bound_BR = torch.where(advantages_BR <= 0, -dual_clip * advantages_BR, math.inf)": "an advantage of 0 has a loss of 0 and a bound of 0",
        "_log_ratio: return (zero_masked(logprobs_BR, mask_BR) - zero_masked(base_logprobs_BR, mask_BR)).clamp(-20, 20) -> return (zero_masked(logprobs_BR, mask_BR) - zero_masked(base_logprobs_BR, torch.ones_like(mask_BR))).clamp(-20, 20)": "the clamp has no gradient at NaN and infinities, and whoever calls it masks the result",
    },
    "preference": {
        "choice_probability: isinstance(logprob_a, Tensor) and isinstance(logprob_b, Tensor) -> isinstance(logprob_a, Tensor) or isinstance(logprob_b, Tensor)": "both are of one type, by the signature",
        "preference_loss: zero_masked(torch.as_tensor(margin, device=gap.device).expand_as(gap), present) -> zero_masked(torch.as_tensor(margin, device=gap.device).expand_as(gap), torch.ones_like(present))": "the scores are masked before it and the losses after it",
        "preference_loss: loss = partial_mean(zero_masked(weights, present) * losses, present, total) -> loss = partial_mean(zero_masked(weights, torch.ones_like(present)) * losses, present, total)": "where a pair is absent its weight is 0 by definition",
    },
    "rating": {},
    "scores": {},
}
