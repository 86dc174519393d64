"""The harness: one run from configuration to record."""
