"""Google's generateContent, of Gemini and Vertex AI: spoken to upstreams only.

The shapes are those of ai.google.dev/api/generate-content and of google-genai 3.6 (November 2026).
"""
