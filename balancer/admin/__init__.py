"""The admin server: the fleet's live state, picks for programs that send themselves, and why a service was picked."""
