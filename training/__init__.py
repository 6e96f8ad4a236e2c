"""Training of drafters: synthesize, drafter, calibrate, evaluate, export."""
