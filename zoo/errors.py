"""Errors of the zoo: each gives the value, the expectation and the candidates."""

from tn import TnError


class ConfigError(TnError, ValueError):
    """A model's name or a field of its configuration is not valid."""


class CacheError(TnError, ValueError):
    """A key-value cache cannot take what it was given."""


class GenerateError(TnError, ValueError):
    """A prompt, a length or a sampling setting is not valid."""


class SavedModelError(TnError, ValueError):
    """A file of a saved model is missing, damaged or of another kind; the message names the file."""
