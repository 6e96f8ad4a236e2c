"""Benchmarks that let anyone check the speed-up and that it is lossless."""
