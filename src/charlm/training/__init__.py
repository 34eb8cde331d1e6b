"""How a model learns: the optimiser, the steps, the loop around them, and its saves."""
