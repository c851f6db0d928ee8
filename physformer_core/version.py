"""The version, in one place: packaging, run records and picture metadata read it from here."""

__version__ = "0.2.0"
