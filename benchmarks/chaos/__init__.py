"""`make chaos`: a fleet under every fault we know; each error is traced to its fault, each token counted."""
