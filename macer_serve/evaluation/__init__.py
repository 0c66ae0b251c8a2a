"""Measuring smoothed classifiers on data sets: certification logs, and reports about these logs."""
