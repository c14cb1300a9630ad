"""Mutants that no test can notice, or is asked to, with the reason. The mutation run compares them with its own."""

SURVIVORS: dict[str, dict[str, str]] = {
    "kl": {},
    "masking": {},
    "ppo": {},
    "preference": {
        "choice_probability: isinstance(logprob_a, Tensor) and isinstance(logprob_b, Tensor) -> "
        "isinstance(logprob_a, Tensor) or isinstance(logprob_b, Tensor)": "both are of one type, by the signature",
        "preference_loss: zero_masked(torch.as_tensor(margin, device=gap.device).expand_as(gap), present) -> "
        "zero_masked(torch.as_tensor(margin, device=gap.device).expand_as(gap), torch.ones_like(present))": (
            "the scores are masked before it and the losses after it: NaN reaches neither value nor gradient"
        ),
        "preference_loss: loss = partial_mean(zero_masked(weights, present) * losses, present, total) -> "
        "loss = partial_mean(zero_masked(weights, torch.ones_like(present)) * losses, present, total)": (
            "where a pair is absent its weight is 0 by definition"
        ),
    },
    "rating": {},
    "scores": {},
}
