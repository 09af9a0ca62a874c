"""How fast we are beside others, in one run on one machine, and what each feature of ours costs."""
