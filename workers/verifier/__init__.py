"""One verifier: sequences, KV blocks, scheduler, planner, runner, judge. No Ray, no HTTP."""
