"""From run directories to tables, figures and one HTML page; imports no torch, so it works where a run never could."""
