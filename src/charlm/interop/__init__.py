"""Other programs' files: exports and imports."""
