"""A model server whose every answer carries a proof: certified inference by randomized smoothing."""

__version__ = "0.1.0"
