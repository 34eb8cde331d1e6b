"""What a trained model is asked: to write, to score, to fill in."""
