"""Presets for well-known providers.

A preset exists without configuration, so that agents can refer to the provider before an admin configures it.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec


class ProviderPreset(msgspec.Struct, frozen=True):
    """The kind and the address of a well-known provider. If `needs_key` is true, the provider requires an API key."""

    kind: str
    base_url: str
    needs_key: bool = True


PRESETS: Mapping[str, ProviderPreset] = {
    "anthropic": ProviderPreset("anthropic", "https://api.anthropic.com"),
    "deepseek": ProviderPreset("openai", "https://api.deepseek.com/v1"),
    "gemini": ProviderPreset("openai", "https://generativelanguage.googleapis.com/v1beta/openai"),
    "groq": ProviderPreset("openai", "https://api.groq.com/openai/v1"),
    "llamacpp": ProviderPreset("openai", "http://127.0.0.1:8080/v1", needs_key=False),
    "mistral": ProviderPreset("openai", "https://api.mistral.ai/v1"),
    "ollama": ProviderPreset("openai", "http://127.0.0.1:11434/v1", needs_key=False),
    "openai": ProviderPreset("openai", "https://api.openai.com/v1"),
    "openrouter": ProviderPreset("openai", "https://openrouter.ai/api/v1"),
    "vllm": ProviderPreset(
        "openai", "http://127.0.0.1:8001/v1", needs_key=False
    ),  # its usual port 8000 is Corral's own
}
