"""Requests and answers of one API as those of another: pure modules, bytes and structs in, structs and bytes out.

A client's request is read into a Conversation, and that is written for the upstream; the answer is read into an Answer,
or its stream event by event into Steps, and those are written for the client. So each API is read once and written
once. What of a request cannot be carried is refused with the name of its field, or left out by a rule that
`docs/translation.md` tells, and then named. Nothing is dropped in silence.
"""
