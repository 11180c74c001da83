// The OpenAI SDK for Node.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.env.CORRAL_URL, apiKey: process.env.CORRAL_KEY });
const ask = [{ role: "user", content: "How is the weather?" }];
const tool = { type: "function", function: { name: "weather", parameters: { type: "object", properties: {} } } };

const whole = await client.chat.completions.create({ model: "scripted/echo", messages: ask });
assert.equal(whole.choices[0].message.content, "How is the weather?");
assert.ok(whole.usage.total_tokens > 0);

let text = "";
for await (const chunk of await client.chat.completions.create({ model: "scripted/echo", messages: ask, stream: true })) {
  text += chunk.choices[0].delta.content ?? "";
}
assert.equal(text, "How is the weather?");

const asked = await client.chat.completions.create({ model: "scripted/weather", messages: ask, tools: [tool] });
const [call] = asked.choices[0].message.tool_calls;
const talk = [...ask, asked.choices[0].message, { role: "tool", tool_call_id: call.id, content: "rain" }];
const told = await client.chat.completions.create({ model: "scripted/weather", messages: talk, tools: [tool] });
assert.equal(told.choices[0].message.content, "It rains.");

const listed = [];
for await (const model of client.models.list()) listed.push(model.id);
assert.ok(listed.includes("scripted/echo"));

await assert.rejects(client.chat.completions.create({ model: "nobody/nothing", messages: ask }), (error) => {
  assert.ok(error instanceof OpenAI.NotFoundError);
  return error.code === "model_not_found";
});
const began = Date.now();
await assert.rejects(client.chat.completions.create({ model: "openai/gpt-5", messages: ask }));
assert.ok(Date.now() - began < 5000); // nothing was repeated

console.log("openai (node)", JSON.parse(readFileSync("node_modules/openai/package.json")).version);
