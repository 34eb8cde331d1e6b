"""How a model learns: optimiser, learner, loop and saves."""
