"""Data sets in COCO format: reading, generating, batching."""
