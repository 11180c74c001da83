# /// script
# dependencies = ["litellm==1.110.2"]
# ///
"""LiteLLM as a library."""

from __future__ import annotations

import os
from importlib.metadata import version
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it downloads prices when it is imported
import litellm
import openai

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
ASK = [{"role": "user", "content": "How is the weather?"}]
PLACE = {"api_base": os.environ["CORRAL_URL"], "api_key": os.environ["CORRAL_KEY"]}


def complete(model: str, messages: list[dict[str, Any]], **more: Any) -> Any:
    return litellm.completion(model=f"openai/{model}", messages=messages, **PLACE, **more)


whole = complete("scripted/echo", ASK)
assert whole.choices[0].message.content == "How is the weather?"
assert whole.usage.total_tokens > 0
chunks = list(complete("scripted/echo", ASK, stream=True))
assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "How is the weather?"

asked = complete("scripted/weather", ASK, tools=[TOOL])
(call,) = asked.choices[0].message.tool_calls
told = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
talk = [*ASK, asked.choices[0].message.model_dump(), told]
assert complete("scripted/weather", talk, tools=[TOOL]).choices[0].message.content == "It rains."

# Its own listing asks only servers at the root of a host, so this is the SDK that it brings.
sdk = openai.OpenAI(base_url=PLACE["api_base"], api_key=PLACE["api_key"])
assert "scripted/echo" in [model.id for model in sdk.models.list()]

try:
    complete("nobody/nothing", ASK)
except litellm.NotFoundError as error:
    assert "There is no model nobody/nothing" in str(error)
else:
    raise AssertionError("an unknown model was accepted")

print("litellm", version("litellm"))
