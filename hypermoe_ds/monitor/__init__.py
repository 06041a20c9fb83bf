"""Compute the metrics of a run and write them to the console, files and dashboards."""
