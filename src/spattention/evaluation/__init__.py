"""What a trained model can do: loss, tasks, recall, and what its heads look at."""
