"""The backbone, detectors around it, their weights and optimizer."""
