# /// script
# dependencies = ["langchain-openai==1.7.4"]
# ///
"""LangChain with `langchain-openai`."""

from __future__ import annotations

import os
from importlib.metadata import version

import openai
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings


@tool
def weather(city: str) -> str:
    """Tell the weather of a city."""
    return f"rain in {city}"


def chat(model: str) -> ChatOpenAI:
    return ChatOpenAI(model=model, base_url=os.environ["CORRAL_URL"], api_key=os.environ["CORRAL_KEY"])


echo = chat("scripted/echo")
whole = echo.invoke("Hello")
assert whole.content == "Hello"
assert whole.usage_metadata["total_tokens"] > 0
assert "".join(chunk.text for chunk in echo.stream("Hello")) == "Hello"

asking = chat("scripted/weather").bind_tools([weather])
talk = [HumanMessage("How is the weather?")]
asked = asking.invoke(talk)
(call,) = asked.tool_calls
assert (call["name"], call["args"]) == ("weather", {"city": "Bern"})
talk += [asked, ToolMessage(weather.invoke(call["args"]), tool_call_id=call["id"])]
assert asking.invoke(talk).content == "It rains."

assert "scripted/echo" in [model.id for model in echo.root_client.models.list()]
words = OpenAIEmbeddings(
    model="scripted/words",
    base_url=os.environ["CORRAL_URL"],
    api_key=os.environ["CORRAL_KEY"],
    check_embedding_ctx_length=False,  # else it downloads a tokenizer
)
assert len(words.embed_documents(["red", "blue"])) == 2

try:
    chat("nobody/nothing").invoke("Hello")
except openai.NotFoundError as error:
    assert error.code == "model_not_found"
else:
    raise AssertionError("an unknown model was accepted")

print("langchain-openai", version("langchain-openai"))
