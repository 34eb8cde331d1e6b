"""The uses of a trained model: writing text, scoring text, filling in blanks."""
