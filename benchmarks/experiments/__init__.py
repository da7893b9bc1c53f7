"""Training runs of the evidence page: plans, a ledger of their results, and the page."""
