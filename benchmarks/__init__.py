"""What takes minutes: proofs and measurements, each a target of the Makefile."""
