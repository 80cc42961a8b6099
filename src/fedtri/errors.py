"""The one exception users meet: a single line that says what, where, expected, got, and what to do."""


class FedtriError(Exception):
    """A mistake in input, configuration or a peer's message; the command line prints it and exits with 2."""
