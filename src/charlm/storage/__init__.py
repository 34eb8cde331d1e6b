"""The files of a run: models, states and logs, and the folder that holds them."""
