"""Measuring: reference statistics, metrics and their errors, the classifier; modes evaluate, compare, experiment."""
