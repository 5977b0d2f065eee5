"""Scores of samples, the networks they look through, and pictures."""
