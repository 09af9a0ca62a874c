"""OpenAI's responses API as a client speaks it; upstreams that have it get such requests as they are.

Shapes are those of platform.openai.com/docs/api-reference/responses and of its SDK's types (November 2026).
"""
