"""What HTTP client libraries cost for a request and for a stream, ours among them."""
