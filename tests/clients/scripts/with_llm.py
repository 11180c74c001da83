# /// script
# dependencies = ["llm==0.36"]
# ///
"""The command line tool and library `llm`, which reads its models from a file and has no call that lists a server's."""

from __future__ import annotations

import json
import os
import tempfile
from importlib.metadata import version
from pathlib import Path

folder = Path(tempfile.mkdtemp())
os.environ["LLM_USER_PATH"] = str(folder)
folder.joinpath("extra-openai-models.yaml").write_text(
    "".join(
        f"- model_id: {name}\n  model_name: {model}\n  api_base: {os.environ['CORRAL_URL']}\n"
        "  api_key_name: corral\n  supports_tools: true\n"
        for name, model in (("echo", "scripted/echo"), ("weather", "scripted/weather"), ("nobody", "nobody/nothing"))
    )
)
folder.joinpath("keys.json").write_text(json.dumps({"corral": os.environ["CORRAL_KEY"]}))
import llm  # noqa: E402


def weather(city: str) -> str:
    """Tell the weather of a city."""
    return f"rain in {city}"


assert llm.get_model("echo").prompt("Hello", stream=False).text() == "Hello"
streamed = llm.get_model("echo").prompt("Hello there, how are you?", stream=True)
assert "".join(streamed) == "Hello there, how are you?"
assert streamed.usage().output > 0
assert llm.get_model("weather").chain("How is the weather?", tools=[weather]).text() == "It rains."
assert {"echo", "weather"} <= {each.model_id for each in llm.get_models()}

try:
    llm.get_model("nobody").prompt("Hello", stream=False).text()
except Exception as error:
    assert "There is no model nobody/nothing" in str(error), error
else:
    raise AssertionError("an unknown model was accepted")

print("llm", version("llm"))
