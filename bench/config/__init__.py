"""What to run: configuration, suites and architectures."""
