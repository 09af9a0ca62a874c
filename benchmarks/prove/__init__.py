"""`make prove`: millions of decisions under faults, and the check that each is right and every token is counted."""
