"""How files become batches of ids: reading, cleaning, encoding, splitting and cutting, a piece at a time."""
