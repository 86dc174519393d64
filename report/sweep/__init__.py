"""The report of a sweep: cost against resolution, its growth, and where full attention loses."""
