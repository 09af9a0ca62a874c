"""A distributed LLM load balancer whose whole state lives in Redis."""

__version__ = "0.1.0"
