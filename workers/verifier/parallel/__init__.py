"""Tensor- and expert-parallel verifiers: one target spread over ranks.

Rank 0 is the engine: it alone schedules, plans, judges, drafts and samples. The others hold their share of the weights and
of the KV, and run the forwards that rank 0 announces. Whatever becomes a shape comes from rank 0.
"""
