"""Anthropic's messages: what clients ask for in them, and what is asked of Anthropic's and compatible services.

Shapes as of docs.anthropic.com/en/api/messages and the types of Anthropic's SDK 2.12 (November 2026).
"""
