"""What LiteLLM's provider prefixes mean: which API is behind them, where, and which variable holds the key.

Bases and variables are those of LiteLLM's provider pages (docs.litellm.ai/docs/providers, November 2026).
"""

from __future__ import annotations

import msgspec

from balancer.domain import ApiStyle


class Vendor(msgspec.Struct, frozen=True, kw_only=True):
    """Where a prefix's models are served; `api_base` empty: the configuration must name it.

    `responses` false: it has no /v1/responses, and LiteLLM too makes chat completions of such requests.
    `remark` is told with every import that meets the vendor.
    """

    api_base: str = ""
    variable: str = ""
    api_style: ApiStyle = "openai"
    responses: bool = True
    is_azure: bool = False
    remark: str = ""


_OLLAMA = Vendor(
    api_base="http://localhost:11434",
    remark="Ollama is asked through its OpenAI-compatible API, /v1, and not through /api as LiteLLM does",
)

VENDORS: dict[str, Vendor] = {
    "openai": Vendor(api_base="https://api.openai.com/v1", variable="OPENAI_API_KEY"),
    "text-completion-openai": Vendor(api_base="https://api.openai.com/v1", variable="OPENAI_API_KEY"),
    "anthropic": Vendor(api_base="https://api.anthropic.com", variable="ANTHROPIC_API_KEY", api_style="anthropic"),
    "azure": Vendor(variable="AZURE_API_KEY", is_azure=True),
    "cerebras": Vendor(api_base="https://api.cerebras.ai/v1", variable="CEREBRAS_API_KEY", responses=False),
    "deepinfra": Vendor(api_base="https://api.deepinfra.com/v1/openai", variable="DEEPINFRA_API_KEY", responses=False),
    "deepseek": Vendor(api_base="https://api.deepseek.com/v1", variable="DEEPSEEK_API_KEY", responses=False),
    "fireworks_ai": Vendor(api_base="https://api.fireworks.ai/inference/v1", variable="FIREWORKS_AI_API_KEY"),
    "gemini": Vendor(
        api_base="https://generativelanguage.googleapis.com",
        variable="GEMINI_API_KEY",
        api_style="google",
        remark="Gemini is asked through its own API, which has chat, messages and responses but no /v1/embeddings: for "
        "those add a provider with api_base https://generativelanguage.googleapis.com/v1beta/openai",
    ),
    "groq": Vendor(api_base="https://api.groq.com/openai/v1", variable="GROQ_API_KEY"),
    "mistral": Vendor(api_base="https://api.mistral.ai/v1", variable="MISTRAL_API_KEY", responses=False),
    "moonshot": Vendor(api_base="https://api.moonshot.ai/v1", variable="MOONSHOT_API_KEY", responses=False),
    "nvidia_nim": Vendor(
        api_base="https://integrate.api.nvidia.com/v1", variable="NVIDIA_NIM_API_KEY", responses=False
    ),
    "ollama": _OLLAMA,
    "ollama_chat": _OLLAMA,
    "openrouter": Vendor(api_base="https://openrouter.ai/api/v1", variable="OPENROUTER_API_KEY"),
    "sambanova": Vendor(api_base="https://api.sambanova.ai/v1", variable="SAMBANOVA_API_KEY", responses=False),
    "together_ai": Vendor(api_base="https://api.together.xyz/v1", variable="TOGETHERAI_API_KEY", responses=False),
    "xai": Vendor(api_base="https://api.x.ai/v1", variable="XAI_API_KEY"),
    # Servers of one's own; without a key nobody asks for one.
    "custom_openai": Vendor(),
    "hosted_vllm": Vendor(),
    "litellm_proxy": Vendor(),
    "llamafile": Vendor(api_base="http://127.0.0.1:8080/v1"),
    "lm_studio": Vendor(),
    "openai_like": Vendor(),
    "vllm": Vendor(),
    "xinference": Vendor(),
}

FOREIGN = frozenset(
    {
        *(
            "ai21",
            "aiohttp_openai",
            "aleph_alpha",
            "auto_router",
            "azure_ai",
            "azure_text",
            "bedrock",
            "bedrock_converse",
        ),
        *("clarifai", "cloudflare", "codestral", "cohere", "cohere_chat", "databricks", "huggingface", "jina_ai"),
        *("maritalk", "nlp_cloud", "oobabooga", "palm", "petals", "predibase", "replicate", "sagemaker"),
        *(
            "sagemaker_chat",
            "snowflake",
            "text-completion-codestral",
            "triton",
            "vertex_ai",
            "vertex_ai_beta",
            "voyage",
        ),
        *("watsonx", "watsonx_text"),
    }
)
"""Prefixes behind which is an API that we do not speak, or that asks for another kind of credential."""

ROUTES = ("responses/", "o_series/", "gpt5_series/", "chat/")
"""What LiteLLM lets stand between a prefix and the model to choose its own code's way; no part of the model."""


def vendor_of(model: str, named: str = "") -> tuple[str, str]:
    """The prefix and the model behind it, of `litellm_params.model`; known here or not.

    `named` is `custom_llm_provider`. Without a prefix the model's own name decides, as in LiteLLM.
    """
    prefix, slash, rest = model.partition("/")
    if slash and (prefix in VENDORS or prefix in FOREIGN):
        return prefix, rest
    if named:
        return named, rest if slash and prefix == named else model
    if slash:
        return prefix, rest
    for start, vendor in (("claude", "anthropic"), ("gemini", "vertex_ai"), ("command", "cohere")):
        if model.startswith(start):
            return vendor, model
    return "openai", model
