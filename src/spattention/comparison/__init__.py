"""Training runs that differ in attention and seed alone: plans, runs, and their report."""
