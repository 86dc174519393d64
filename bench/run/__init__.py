"""One run to its record: training, evaluation, checkpoints."""
