"""Measuring smoothed classifiers on a data set: certification logs on disk, and the report made from them."""
