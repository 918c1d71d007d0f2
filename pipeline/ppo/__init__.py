"""PPO's mathematics: pure functions on tensors. No model, no accelerator, no configuration object.

Shapes: B samples, R response tokens, right-padded. Masks are boolean, True on real tokens.
"""
