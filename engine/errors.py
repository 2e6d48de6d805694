"""What can go wrong in the engine, apart from bad arguments (ValueError)."""


class ModelError(ValueError):
    """A model that cannot be loaded or would not compute what its config.json says."""
