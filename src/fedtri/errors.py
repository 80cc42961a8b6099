"""The one exception that users meet. Its message is one line: what, where, expected, got, and what to do."""


class FedtriError(Exception):
    """A mistake in input, in the configuration, or in a message from another machine.

    The command line prints its message and exits with code 2.
    """
