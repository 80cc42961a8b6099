"""Warnings."""


def known_noise() -> None:
    """None yet."""
