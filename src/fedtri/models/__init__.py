"""Finds and loads models, chooses the layers that are adapted, and reads and writes PEFT adapters."""
