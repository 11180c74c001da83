# /// script
# dependencies = ["openai==3.57.0"]
# ///
"""The OpenAI SDK for Python."""

from __future__ import annotations

import os
import time
from typing import Any

import openai
from openai.types.chat import ChatCompletionFunctionToolParam, ChatCompletionMessageParam

TOOL: ChatCompletionFunctionToolParam = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}},
}
ASK: list[ChatCompletionMessageParam] = [{"role": "user", "content": "How is the weather?"}]

client = openai.OpenAI(base_url=os.environ["CORRAL_URL"], api_key=os.environ["CORRAL_KEY"])

whole = client.chat.completions.create(model="scripted/echo", messages=ASK)
assert whole.choices[0].message.content == "How is the weather?"
assert whole.usage is not None
assert whole.usage.total_tokens > 0

chunks = list(client.chat.completions.create(model="scripted/echo", messages=ASK, stream=True))
assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "How is the weather?"
*_, last = client.chat.completions.create(
    model="scripted/echo", messages=ASK, stream=True, stream_options={"include_usage": True}
)
assert last.usage is not None
assert (last.choices, last.usage.total_tokens > 0) == ([], True)

asked = client.chat.completions.create(model="scripted/weather", messages=ASK, tools=[TOOL])
(call,) = asked.choices[0].message.tool_calls or []
told: ChatCompletionMessageParam = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
answer: Any = asked.choices[0].message  # the SDK takes it back as it is, though its types do not say so
talk: list[ChatCompletionMessageParam] = [*ASK, answer, told]
assert client.chat.completions.create(model="scripted/weather", messages=talk).choices[0].message.content == "It rains."

assert "scripted/echo" in [model.id for model in client.models.list()]
assert client.models.retrieve("scripted/echo").owned_by == "scripted"
assert len(client.embeddings.create(model="scripted/words", input=[[1, 2], [3]]).data) == 2

try:
    client.chat.completions.create(model="nobody/nothing", messages=ASK)
except openai.NotFoundError as error:
    assert error.code == "model_not_found"
    assert "There is no model nobody/nothing" in str(error)
else:
    raise AssertionError("an unknown model was accepted")
began = time.monotonic()
try:
    client.chat.completions.create(model="openai/gpt-5", messages=ASK)
except openai.UnprocessableEntityError as error:
    assert error.code == "llm.provider_not_configured"
assert time.monotonic() - began < 5  # nothing was repeated

print("openai", openai.__version__)
