"""The machine: processes, devices, locks, signals, logs."""
