"""Pure mathematics on tensors: masking, KL, PPO, preferences, ratings.

Nothing here knows of models, files or Ray. Masks are bool and True counts; inputs are masked before arithmetic, so that
whatever padding holds (NaN included) reaches neither a result nor a gradient; everything is computed in float32.
"""
