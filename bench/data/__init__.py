"""Data sets in COCO format: reading, checking, downloading, generating, batching."""


class DataError(RuntimeError):
    """Data could not be read or loaded, for a reason other than a mistake of the user."""
