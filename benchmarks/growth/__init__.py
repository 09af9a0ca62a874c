"""How costs grow: Redis' CPU, a worker's memory, its own CPU, and what should not grow at all."""
