"""How files become batches of ids."""
