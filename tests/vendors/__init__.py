"""Fake vendors: upstreams that refuse what the real ones refuse, and say what a test wrote for them.

Each reads a request as its vendor's documentation tells it, not as our code writes it, and keeps its own account of the
tokens that it reported. What it refused stands in `refusals`: a test of a conversation that works ends with none.
"""
