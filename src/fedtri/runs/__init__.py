"""From a configuration to a run, and what is done with finished runs."""
