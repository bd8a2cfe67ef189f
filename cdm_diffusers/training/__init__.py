"""Training of one stage: the loop, what a run is configured by, and what it leaves."""
