"""Measuring: reference statistics, metrics and their errors, the classifier, and the modes evaluate and compare."""
