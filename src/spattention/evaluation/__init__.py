"""Measures of a trained model: loss by position, tasks, recall, and statistics of its heads."""
