"""The fast executor: clients share passes of real tokens alone through forward passes that are written out."""
