"""The data plane: requests in, one service picked, bytes back."""
