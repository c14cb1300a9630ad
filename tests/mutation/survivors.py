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
        "logprobs_from_hidden: hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor, temperature: float=1.0, chunk: int=1024 -> hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor, temperature: float=1.0, chunk: int=1025": "a default of memory, which changes no result",
        "policy_loss: loss_BR = loss_BR * zero_masked(weights_BR.detach(), mask_BR) -> loss_BR = loss_BR * zero_masked(weights_BR.detach(), torch.ones_like(mask_BR))": "the losses are masked after it, and the log-probs before",
        "_log_ratio: return (zero_masked(logprobs_BR, mask_BR) - zero_masked(base_logprobs_BR, mask_BR)).clamp(-20, 20) -> return (zero_masked(logprobs_BR, torch.ones_like(mask_BR)) - zero_masked(base_logprobs_BR, mask_BR)).clamp(-20, 20)": "the clamp has no gradient at NaN and infinities, and whoever calls it masks the result",
        "_HeadLogprobs._chunks: shape = (max((part.stop - part.start for part in parts), default=0), len(weight_VH)) -> shape = (max((part.stop - part.start for part in parts), default=1), len(weight_VH))": "where there is no token, a row that nothing reads",
        "_HeadLogprobs._chunks: torch.log_softmax(logits.div_(temperature), -1, out=logprobs) -> torch.log_softmax(logits.div_(temperature), 1, out=logprobs)": "the last of two dimensions is the second",
        "importance_weights: zero_masked(_log_ratio(old_logprobs_BR, rollout_logprobs_BR, mask_BR).exp().clamp(max=cap), mask_BR) -> zero_masked(_log_ratio(old_logprobs_BR, rollout_logprobs_BR, torch.ones_like(mask_BR)).exp().clamp(max=cap), mask_BR)": "the clamp has no gradient at NaN and infinities, and the result is masked",
    },
    "preference": {
        "choice_probability: isinstance(logprob_a, Tensor) and isinstance(logprob_b, Tensor) -> isinstance(logprob_a, Tensor) or isinstance(logprob_b, Tensor)": "both are of one type, by the signature",
        "preference_loss: zero_masked(torch.as_tensor(margin, device=gap.device).expand_as(gap), present) -> zero_masked(torch.as_tensor(margin, device=gap.device).expand_as(gap), torch.ones_like(present))": "the scores are masked before it and the losses after it",
        "preference_loss: loss = partial_mean(zero_masked(weights, present) * losses, present, total) -> loss = partial_mean(zero_masked(weights, torch.ones_like(present)) * losses, present, total)": "where a pair is absent its weight is 0 by definition",
    },
    "rating": {
        "fit_elo: by_pair.setdefault((min(a, b), max(a, b)), []).append(p if a < b else 1 - p) -> by_pair.setdefault((min(a, b), max(a, b)), []).append(p if a <= b else 1 - p)": "a player who meets itself was refused before",
        "fit_elo: pairs_P2 = np.array(list(by_pair), dtype=int).reshape(-1, 2) -> pairs_P2 = np.array(list(by_pair), dtype=int).reshape(-2, 2)": "numpy takes any negative length for the unknown one",
        "_strengths: range(200) -> range(201)": "a limit that no design reaches",
        "_strengths: hessian_SKK = incidence_PK.T @ (curvature_SP[..., None] * incidence_PK) + PRIOR * np.eye(free.sum()) -> hessian_SKK = incidence_PK.T @ (curvature_SP[..., None] * incidence_PK) - PRIOR * np.eye(free.sum())": "it bends a step by a millionth; the maximum, where the gradient is 0, stays",
        "_strengths: s_SK[:, free] += step_SK * np.minimum(1, 0.5 / np.maximum(longest, 1e-12)) -> s_SK[:, free] += step_SK * np.minimum(1, 1.0 / np.maximum(longest, 1e-12))": "twice the step still converges on every design tried; half is the margin that makes it certain",
        "_strengths: s_SK[:, free] += step_SK * np.minimum(1, 0.5 / np.maximum(longest, 1e-12)) -> s_SK[:, free] += step_SK * np.minimum(1, 0.5 / np.maximum(longest, 2e-12))": "it only keeps a division by 0 away",
        "_strengths: longest.max() < 0.0001 -> longest.max() <= 0.0001": "it only says when the steps, which shrink quadratically, are short enough",
        "_strengths: longest.max() < 0.0001 -> longest.max() < 0.0002": "it only says when the steps, which shrink quadratically, are short enough",
    },
    "scores": {},
}
