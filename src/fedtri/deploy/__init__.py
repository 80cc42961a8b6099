"""Running on a real network: the two ends of a Flower run, and what a consortium needs to start one."""
