"""What to run: backbones, rows, recipes and suites, each fact once. Data for `bench.config`."""
