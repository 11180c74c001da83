# /// script
# dependencies = ["instructor==1.17.0"]
# ///
"""Instructor, which reads structured results out of tool calls."""

from __future__ import annotations

import os
from importlib.metadata import version

import instructor
import openai
from pydantic import BaseModel


class City(BaseModel):
    """A city."""

    name: str


plain = openai.OpenAI(base_url=os.environ["CORRAL_URL"], api_key=os.environ["CORRAL_KEY"])
client = instructor.from_openai(plain, mode=instructor.Mode.TOOLS)
ASK = [{"role": "user", "content": "Which city?"}]

city, whole = client.chat.completions.create_with_completion(model="scripted/city", messages=ASK, response_model=City)
assert city.name == "Bern"
assert whole.usage.total_tokens > 0
*_, last = client.chat.completions.create_partial(model="scripted/city", messages=ASK, response_model=City, stream=True)
assert last.name == "Bern"
text = client.chat.completions.create(model="scripted/echo", messages=ASK, response_model=None)
assert text.choices[0].message.content == "Which city?"
assert "scripted/city" in [model.id for model in plain.models.list()]

try:
    client.chat.completions.create(model="nobody/nothing", messages=ASK, response_model=City, max_retries=0)
except Exception as error:
    assert "There is no model nobody/nothing" in str(error), error
else:
    raise AssertionError("an unknown model was accepted")

print("instructor", version("instructor"))
