"""OpenAI's chat completions, as clients ask for them and as upstreams give them.

The upstreams are OpenAI, Azure, and the many that speak the same API with habits of their own: vLLM, SGLang, Ollama,
DeepSeek, Moonshot, Mistral, OpenRouter. What comes from them is read with patience, what goes to them is plain.
"""
