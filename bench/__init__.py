"""Measurements that are run by hand: each prints a table and writes JSON to bench/results."""
