"""Mutants that no test can notice, or is asked to, with the reason. The mutation run compares them with its own."""

SURVIVORS: dict[str, dict[str, str]] = {
    "kl": {},
    "masking": {},
    "ppo": {},
    "preference": {},
    "rating": {},
    "scores": {},
}
