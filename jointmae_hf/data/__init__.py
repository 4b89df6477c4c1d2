"""Readers and builders of point-cloud data sets."""
